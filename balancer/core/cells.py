"""
Big pools: backends are dealt into cells, each with a plan of its own.

What a plan looks at for one decision grows with its backends and with who waits for them. In cells
it does not: a decision among a thousand backends costs what it costs among two dozen.

Laws:
- A backend is in one cell, from when it comes to when it leaves the pool.
- A call waits in one cell, chosen when it comes: of those that have its model in memory, and the
  few that are home to it, the one that has least to do for its size. A conversation would rather
  stay where it was.
- Nobody waits in a cell that cannot serve him while another could, or in a long queue beside a
  short one: every second some move.
- No cell is chosen by chance, and a turn ends by count, so that a recorded run can be replayed.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final
from zlib import crc32

from balancer.core.demand import Demand
from balancer.core.domain import Backend, Call, PlacementKey, Residency
from balancer.core.keeping import Keeping
from balancer.core.outlook import compared
from balancer.core.pins import Pin, Pins
from balancer.core.plan import Plan
from balancer.core.running import Run
from balancer.core.scheduler import (
    Began,
    Changed,
    Commit,
    CommitRefused,
    Effect,
    Ended,
    Fact,
    FirstByte,
    LoadAnswered,
    LoadRefused,
    Option,
    Rehearsal,
    Ticket,
    Unwanted,
    View,
    WakeAt,
)
from balancer.core.sight import Place, Sight
from balancer.core.window import Window

FROM: Final = 64  # backends; up to so many are one cell
SIZE: Final = 24  # backends in a cell, about
LOOK_S: Final = 1.0
WARM_S: Final = 1.0  # for which a look at what is in memory is kept
TURN: Final = 4  # cells that plan in one turn
TRIED: Final = 3  # cells, in which a call looks for a free slot before it waits
STAYS: Final = 0.7  # what a cell's load counts where the conversation has been
NO_COPY: Final = 0.02  # beside its load, where the model is not in memory
SPILLS: Final = 2.0  # times the load of another, from which on calls move there
SPILLED: Final = 8  # calls for one model that move at once
MOST_ARRIVALS: Final = 4096  # of which shares are made
MOST_CONVERSATIONS: Final = 20_000
MOST_KEPT: Final = 1000
NO_PLACES: Final[Mapping[int, Sequence[Place]]] = {}

MayStart = Callable[[Call, int], bool]
Make = Callable[[Sight, MayStart], Plan]


def count(backends: int, before: int = 0) -> int:
    """How many cells so many backends make; as many as *before*, as long as that will do."""
    if before > 1 and SIZE / 2 <= backends / before <= SIZE * 1.5:
        return before
    return 1 if backends <= FROM else math.ceil(backends / SIZE)


@dataclass(slots=True, eq=False)
class Cell:
    """
    Some backends and their plan.

    Args:
        names: The backends.
        calls: That wait or run here.
        wake_at: When it wants to plan though nothing happens.
        dirty: Something has happened.
        hurries: Somebody has come who may not wait: it plans at once, or he is refused.
    """

    number: int
    plan: Plan
    names: set[str]
    calls: int = 0
    wake_at: float = math.inf
    dirty: bool = True
    hurries: bool = False
    _sized: tuple[int, float] = field(default=(-1, 1.0))

    def capacity(self) -> float:
        """Tokens a second, about, that it can write."""
        books = self.plan.books
        if self._sized[0] != books.ticks:
            rates = (books.ledger(name).speed.decode_rate for name in self.names)
            self._sized = (books.ticks, max(1.0, sum(rates)))
        return self._sized[1]

    def load(self) -> float:
        """What it has to do, for its size."""
        return self.calls / self.capacity()


class Cells:
    """
    The scheduler of a big pool.

    Args:
        make: Makes the plan of a cell.
        may_start: As of `Plan`.
        cells: How many there are.
    """

    def __init__(self, view: Sight, make: Make, may_start: MayStart, cells: int) -> None:
        self._view = view
        self._outer_may_start = may_start
        self._keeping = Keeping(view)
        self._pins_of: Pins | None = None
        self._allotted: list[Pins] = []
        self._cell_of: dict[str, Cell] = {}
        self._of: dict[Ticket, Cell] = {}  # who waits
        self._sent: dict[Ticket, Cell] = {}  # in this pass; may come back
        self._runs: dict[int, Cell] = {}
        self._started: Counter[str] = Counter()  # in this pass, by owner, in cells before
        self._groups: dict[
            tuple[PlacementKey, str], tuple[Sequence[Place], int, dict[int, list[Place]]]
        ] = {}
        self._warm_in: dict[tuple[PlacementKey, str], tuple[float, set[int]]] = {}
        self._arrivals: Counter[str] = Counter()
        self._conversations: OrderedDict[str | int, int] = OrderedDict()
        self._look_at = -math.inf
        self._looked = 0
        self._first = 0
        names = self._deal(cells)
        self.cells = [self._cell(number, make, names[number]) for number in range(cells)]
        self._cell_of = {name: cell for cell in self.cells for name in cell.names}

    def _cell(self, number: int, make: Make, names: set[str]) -> Cell:
        def found(call: Call, excluded: frozenset[str], exists: bool) -> Sequence[Place]:  # noqa: FBT001 - as of `Found`
            return self._by_cell(call, excluded, exists=exists).get(number, ())

        window = Window(self._view, names, found, lambda: self._pins(number))
        return Cell(number, make(window, self._may_start), names)

    def _may_start(self, call: Call, besides: int) -> bool:
        return self._outer_may_start(call, besides + self._started[call.owner])

    # -- who is where --------------------------------------------------------------------------

    def _deal(self, cells: int) -> list[set[str]]:
        """Like cards, so that each cell gets of every kind."""
        dealt: list[set[str]] = [set() for _ in range(cells)]
        for at, backend in enumerate(sorted(self._view.backends(), key=_kind)):
            dealt[at % cells].add(backend.name)
        return dealt

    def _reshape(self) -> None:
        """Those who left are gone; who is new goes to the smallest cell."""
        self._groups.clear()
        there = {backend.name: backend for backend in self._view.backends()}
        for name in [name for name in self._cell_of if name not in there]:
            self._cell_of.pop(name).names.discard(name)
        for backend in sorted(there.values(), key=_kind):
            if backend.name not in self._cell_of:
                cell = min(self.cells, key=lambda cell: (len(cell.names), cell.number))
                cell.names.add(backend.name)
                self._cell_of[backend.name] = cell

    def _pins(self, number: int) -> Pins:
        """Those that a cell is to keep, as of a moment ago."""
        if self._view.pins is not self._pins_of:
            self._allot()
        return self._allotted[number]

    def _allot(self) -> None:
        """Deal the pins out."""
        self._pins_of = self._view.pins
        dealt: list[list[Pin]] = [[] for _ in self.cells]
        for pin in self._pins_of:
            for number, copies in self._copies(pin).items():
                dealt[number].append(replace(pin, copies=copies))
        self._allotted = [Pins(pins) for pins in dealt]

    def _copies(self, pin: Pin) -> dict[int, int]:
        """
        How many copies of it each cell is to keep.

        A pin to named backends is kept where these are, one to any in its model's homes: by each
        as many as can serve it there.
        """
        if pin.backends:
            named = [cell for cell in self.cells if not cell.names.isdisjoint(pin.backends)]
            return {cell.number: pin.copies for cell in named}
        groups = self._by_cell(self._keeping.stand_in(pin.key), frozenset())
        copies, left = dict[int, int](), pin.copies
        for number in _homes(pin.model, groups):
            copies[number] = min(left, len(groups[number]))
            left -= copies[number]
            if not left:
                break
        return copies

    def _by_cell(
        self, call: Call, excluded: frozenset[str], *, exists: bool = False
    ) -> Mapping[int, Sequence[Place]]:
        """Where *call* may be served now, by number of the cell."""
        places = self._view.places(call, excluded, exists=exists)
        of = (call.key, call.route.feature)
        known = None if excluded else self._groups.get(of)
        if known is not None and known[0] is places and known[1] == len(places):
            return known[2]
        found: dict[int, list[Place]] = {}
        for place in places:
            cell = self._cell_of.get(place.name)
            if cell is not None:
                found.setdefault(cell.number, []).append(place)
        if not excluded:
            if len(self._groups) > MOST_KEPT:
                self._groups.clear()
            self._groups[of] = (places, len(places), found)
        return found

    # -- which cell ----------------------------------------------------------------------------

    def _choose(self, call: Call, excluded: frozenset[str], now: float) -> list[Cell]:
        """Cells for a call, the best first; where nobody can serve it now, any will do."""
        groups = self._by_cell(call, excluded)
        model = call.key.model
        if not groups:
            return [self.cells[_homes(model, range(len(self.cells)))[0]]]
        share = self._arrivals[model] / max(1, self._arrivals.total())
        wanted = max(2, math.ceil(2.0 * share * len(self.cells) + 0.5))
        warm, was = self._warm(call, groups, now), self._was(call)
        homes = warm.union(_homes(model, groups)[:wanted])
        if was in groups:
            homes.add(was)

        def price(number: int) -> tuple[float, int]:
            load = self.cells[number].load() * (STAYS if number == was else 1.0)
            return (load if number in warm else load + NO_COPY, number)

        return [self.cells[number] for number in sorted(homes, key=price)]

    def _warm(self, call: Call, groups: Mapping[int, Sequence[Place]], now: float) -> set[int]:
        """The cells that have it in memory, as of a moment ago."""
        of = (call.key, call.route.feature)
        known = self._warm_in.get(of)
        if known is None or now >= known[0]:
            if len(self._warm_in) > MOST_KEPT:
                self._warm_in.clear()
            found = {
                number
                for number, places in groups.items()
                if any(place.copy.residency(now) is Residency.LOADED for place in places)
            }
            known = self._warm_in[of] = (now + WARM_S, found)
        return known[1].intersection(groups)

    def _was(self, call: Call) -> int:
        """The cell in which its conversation was last; -1: it is new."""
        for link in _links(call):
            number = self._conversations.get(link)
            if number is not None:
                return number
        return -1

    def _goes(self, call: Call, cell: Cell) -> None:
        """It was taken by a cell."""
        self._arrivals[call.key.model] += 1
        if self._arrivals.total() > MOST_ARRIVALS:
            self._arrivals = Counter({m: n // 2 for m, n in self._arrivals.items() if n > 1})
        link = next(_links(call), None)
        if link is not None:
            self._conversations[link] = cell.number
            self._conversations.move_to_end(link)
            if len(self._conversations) > MOST_CONVERSATIONS:
                self._conversations.popitem(last=False)

    # -- who waits -----------------------------------------------------------------------------

    def enqueue(self, ticket: Ticket) -> None:
        """Take a waiting ticket in; one that could not be sent goes back to its cell."""
        cell = self._sent.pop(ticket, None)
        if cell is None:
            cell = self._choose(ticket.call, ticket.excluded, ticket.queued_at)[0]
            self._goes(ticket.call, cell)
        self._enter(ticket, cell)

    def _enter(self, ticket: Ticket, cell: Cell) -> None:
        self._of[ticket] = cell
        cell.calls += 1
        cell.dirty = True
        cell.hurries = cell.hurries or ticket.limit_at <= ticket.queued_at
        cell.plan.enqueue(ticket)

    def withdraw(self, ticket: Ticket) -> None:
        """Forget a ticket; one that is not here is no mistake."""
        cell = self._of.pop(ticket, None)
        if cell is not None:
            cell.calls -= 1
        else:
            cell = self._sent.pop(ticket, None)
        if cell is not None:
            cell.dirty = True
            cell.plan.withdraw(ticket)

    def waiting(self) -> list[Ticket]:
        """All tickets that wait, the oldest first."""
        return sorted(self._of, key=lambda ticket: (ticket.queued_at, ticket.seq))

    def _look_at_next(self, now: float) -> None:
        """At the next cell where anybody waits."""
        for _ in self.cells:
            self._looked = (self._looked + 1) % len(self.cells)
            cell = self.cells[self._looked]
            if cell.plan.queues.by_key:
                self._look(cell, now)
                return

    def _look(self, cell: Cell, now: float) -> None:
        """Let those move who wait where they cannot be served, or would be served later."""
        for queue in list(cell.plan.queues.by_key.values()):
            call = queue.waiters[0].ticket.call
            groups = self._by_cell(call, frozenset())
            there, last = self._choose(call, frozenset(), now)[0], len(queue.waiters) - SPILLED
            stuck = bool(groups) and cell.number not in groups
            is_long = bool(groups) and cell.load() > SPILLS * there.load() + NO_COPY
            for at, waiter in enumerate(list(queue.waiters)):
                ticket = waiter.ticket
                if ticket.excluded or ticket.call.route.feature != call.route.feature:
                    self._move_stuck(ticket, cell, now)
                elif there is not cell and (stuck or (is_long and at and at >= last)):
                    self._move(ticket, cell, there)

    def _move_stuck(self, ticket: Ticket, cell: Cell, now: float) -> None:
        groups = self._by_cell(ticket.call, ticket.excluded)
        if groups and cell.number not in groups:
            self._move(ticket, cell, self._choose(ticket.call, ticket.excluded, now)[0])

    def _move(self, ticket: Ticket, cell: Cell, there: Cell) -> None:
        cell.plan.withdraw(ticket)
        cell.calls -= 1
        cell.dirty = True
        self._enter(ticket, there)

    # -- facts ---------------------------------------------------------------------------------

    def note(self, fact: Fact) -> None:
        """Tell it to the cell that it is of."""
        cell: Cell | None
        match fact:
            case Unwanted():
                for each in self.cells:
                    each.plan.note(fact)
                return
            case Changed("", _, _):
                self._reshape()
                self._allot()
                for each in self.cells:
                    each.plan.note(fact)
                    each.dirty = True
                return
            case Began(run):
                cell = self._begins(run)
            case FirstByte(run, _):
                cell = self._runs.get(id(run))
            case Ended(run, _, _):
                cell = self._runs.pop(id(run), None)
                if cell is not None:
                    cell.calls -= 1
            case CommitRefused(ticket, _):
                cell = self._sent.get(ticket)
            case LoadAnswered() | LoadRefused() | Changed():
                cell = self._cell_of.get(fact.backend)
        if cell is not None:
            cell.plan.note(fact)
            cell.dirty = True

    def _begins(self, run: Run) -> Cell | None:
        cell = self._cell_of.get(run.backend)
        if cell is not None and id(run) not in self._runs:
            self._runs[id(run)] = cell
            cell.calls += 1
        return cell

    def learned(self, now: float) -> dict[str, Any]:
        """What would be a pity to forget; of what all learn, what the first ones did."""
        told, demand = dict[str, Any](), Demand()
        for cell in self.cells:
            _merge(told, cell.plan.learned(now))
            demand.add(cell.plan.books.demand, now)
        return told | {"demand": demand.dump(now)}

    def recall(self, learned: Mapping[str, Any], now: float, age_s: float) -> None:
        """Take over what another has learned; what cannot be believed is left out."""
        for cell in self.cells:
            cell.plan.recall(learned, now, age_s, share=1.0 / len(self.cells))

    # -- passes --------------------------------------------------------------------------------

    def begin(self, ticket: Ticket, now: float) -> Commit | None:
        """Decide for a ticket that waits nowhere yet, while no other does."""
        self._sent.clear()
        for cell in self._choose(ticket.call, ticket.excluded, now)[:TRIED]:
            commit = cell.plan.begin(ticket, now)
            if commit is not None:
                self._goes(ticket.call, cell)
                self._sent[ticket] = cell
                return commit
        return None

    def wake_at(self) -> float:
        """When to plan again though nothing happens; inf: never."""
        return min(cell.plan.wake_at() for cell in self.cells)

    def plan(self, now: float) -> list[Effect]:
        """One pass: of the cells where something has happened, or that wanted to be woken."""
        effects: list[Effect] = []
        self._sent.clear()
        if now >= self._look_at:  # at one of them, so that no turn is long
            self._look_at = now + LOOK_S / len(self.cells)
            self._allot()
            self._look_at_next(now)
        due = [c for c in self.cells if c.dirty or now >= min(c.wake_at, c.plan.wake_at())]
        count = len(self.cells)
        due.sort(key=lambda cell: (not cell.hurries, (cell.number - self._first) % count))
        for cell in due[:TURN]:
            self._plan(cell, now, effects)
        self._started.clear()  # from here on whoever is granted is counted
        if due:
            self._first = (due[:TURN][-1].number + 1) % count
        at = now if len(due) > TURN else min(cell.wake_at for cell in self.cells)
        if at < math.inf:
            effects.append(WakeAt(at))
        return effects

    def _plan(self, cell: Cell, now: float, effects: list[Effect]) -> None:
        cell.dirty, cell.hurries, cell.wake_at = False, False, math.inf
        for effect in cell.plan.plan(now):
            if isinstance(effect, WakeAt):
                cell.wake_at = min(cell.wake_at, effect.at)
                continue
            if isinstance(effect, Commit):
                ticket = effect.ticket
                del self._of[ticket]
                cell.calls -= 1
                self._sent[ticket] = cell
                self._started[ticket.call.owner] += 1
            effects.append(effect)

    # -- for people ----------------------------------------------------------------------------

    def wait_estimate(self, ticket: Ticket, now: float) -> float:
        """Seconds until *ticket* may start; 0: at once; inf: nobody can tell."""
        return self._home(ticket, now).plan.wait_estimate(ticket, now)

    def rehearse(self, ticket: Ticket, view: View, now: float) -> Rehearsal:
        """What would be decided for *ticket*, and what it would cost in the other cells."""
        home = self._home(ticket, now)
        told = home.plan.rehearse(ticket, view, now)
        rest, barred = list[Option](), dict(told.barred)
        for cell in self.cells:
            if cell is not home:
                other = cell.plan.rehearse(ticket, view, now)
                rest += other.options
                barred |= other.barred
        rest.sort(key=_total_s)
        if told.options:  # each cell has one that comes first there
            best_s = _total_s(told.options[0])
            rest = [replace(each, why=compared(_total_s(each), best_s)) for each in rest]
        return replace(told, options=(*told.options, *rest), barred=barred)

    def _home(self, ticket: Ticket, now: float) -> Cell:
        return self._of.get(ticket) or self._choose(ticket.call, ticket.excluded, now)[0]


def _kind(backend: Backend) -> tuple[float, int, int, str]:
    """Backends that are alike stand together."""
    return (backend.weight, backend.vram_bytes or 0, backend.slots or 0, backend.name)


def _homes(model: str, numbers: Iterable[int]) -> list[int]:
    """Cells in the order in which they are home to a model; who comes or goes moves few."""
    return sorted(numbers, key=lambda number: crc32(f"{number}/{model}".encode()))


def _links(call: Call) -> Iterator[str | int]:
    """What tells a conversation, the surest first; what many have in common does not."""
    if call.session:
        yield call.session
    for hashed, _ in reversed(call.chain[call.shared :]):
        yield hashed


def _total_s(option: Option) -> float:
    return option.terms["total_s"]


def _merge(into: dict[str, Any], told: Mapping[str, Any]) -> None:
    """Take over what is not there yet, down to the last leaf."""
    for name, value in told.items():
        there = into.setdefault(name, {} if isinstance(value, dict) else value)
        if isinstance(there, dict) and isinstance(value, dict):
            _merge(there, value)
