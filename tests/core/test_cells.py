"""Cells: who is in which, where calls go, and that the whole is still one scheduler."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from balancer.core import cells
from balancer.core.admission import QueueLimits
from balancer.core.cells import Cells
from balancer.core.domain import Allowance, Call, Principal, Role, Verdict
from balancer.core.pins import Pin, Pins
from balancer.core.plan import Plan
from balancer.core.scheduler import Ticket, Unwanted
from balancer.core.sight import Sight
from balancer.core.strategy import build, cell_count
from tests.core.bench import Bench, backend, call, canon, key, outcome, tried
from tests.core.planned import at_rest, where

NAMES = [f"gpu{n}" for n in range(6)]


class Celled(Bench):
    """The core with three cells of two backends each, which have m:1 in memory."""

    def __init__(self) -> None:
        super().__init__("plan", limits=QueueLimits(10_000, 10_000, 900.0))
        self.shape(*(backend(name, slots=1) for name in NAMES))
        for name in NAMES:
            self.up(name, "m:1", "o:1", loaded=["m:1"])
        self.cells = Cells(self.pool, self._plan, self.limits.may_start, 3)
        self.dispatcher.exchange(self.cells)

    @staticmethod
    def _plan(view: Sight, may_start: Callable[[Call, int], bool]) -> Plan:
        return Plan(view, may_start=may_start)

    def cell(self, name: str) -> int:
        """The number of a backend's cell."""
        return next(cell.number for cell in self.cells.cells if name in cell.names)

    def is_at_rest(self) -> bool:
        """Whether nothing is counted any more."""
        idle = all(at_rest(cell.plan) and not cell.calls for cell in self.cells.cells)
        return idle and not self.cells.waiting()


@pytest.fixture
def bench() -> Iterator[Celled]:
    """Three cells of two."""
    found = Celled()
    yield found
    found.close()


# -- who is where --------------------------------------------------------------------------------


@pytest.mark.parametrize(("backends", "count"), [(0, 1), (64, 1), (65, 3), (240, 10), (1000, 42)])
def test_so_many_backends_make_so_many_cells(backends: int, count: int) -> None:
    """A pool that one plan can look through is not cut."""
    assert cells.count(backends) == count


@pytest.mark.parametrize(
    ("backends", "before", "count"),
    [(64, 3, 3), (36, 3, 3), (35, 3, 1), (108, 3, 3), (109, 3, 5), (64, 1, 1), (65, 1, 3)],
)
def test_a_pool_that_grows_and_shrinks_is_not_dealt_anew_each_time(
    backends: int, before: int, count: int
) -> None:
    """What was learned of caches is lost by it."""
    assert cells.count(backends, before) == count


def test_a_big_pool_is_dealt_into_cells_and_one_with_tiers_is_not() -> None:
    """Whoever is second choice over the whole pool must not be first in some cell."""
    bench = Bench("plan")
    bench.shape(*(f"gpu{n}" for n in range(70)))
    assert cell_count(bench.pool) == 3
    assert isinstance(build("plan", bench.pool), Cells)
    bench.shape(*(backend(f"gpu{n}", priority=100 + n % 2) for n in range(70)))
    assert cell_count(bench.pool) == 1
    assert isinstance(build("plan", bench.pool), Plan)


def test_each_cell_gets_of_every_kind(bench: Celled) -> None:
    """Like cards: those that are alike are not put together."""
    bench.shape(*(backend(name, weight=1.0 + (n > 2)) for n, name in enumerate(NAMES)))
    fresh = Cells(bench.pool, bench._plan, bench.limits.may_start, 3)
    for cell in fresh.cells:
        weights = [bench[name].backend.weight for name in cell.names]
        assert sorted(weights) == [1.0, 2.0]


def test_who_comes_goes_to_the_smallest_cell_and_nobody_moves(bench: Celled) -> None:
    """What was learned of a backend stays with it."""
    before = {name: bench.cell(name) for name in NAMES}
    left = NAMES[1]
    bench.shape(*(backend(name, slots=1) for name in [*NAMES, "new"] if name != left))
    assert bench.cell("new") == before[left]
    assert {n: bench.cell(n) for n in NAMES if n != left} == {
        n: c for n, c in before.items() if n != left
    }
    assert Counter(map(bench.cell, [n for n in [*NAMES, "new"] if n != left])) == {0: 2, 1: 2, 2: 2}


def test_a_cell_sees_its_own_backends_and_no_others(bench: Celled) -> None:
    """In everything that it may ask of the pool."""
    wanted = call("m:1")
    for cell in bench.cells.cells:
        view = cell.plan._view
        assert {b.name for b in view.backends()} == cell.names
        assert {p.name for p in view.places(wanted, frozenset())} == cell.names
        assert {c.backend for c in view.candidates(wanted, frozenset())} == cell.names
    assert bench.pool.take_token(NAMES[0], key("o:1"), "somebody's")
    seen = [len(cell.plan._view.loading(key("o:1"))) for cell in bench.cells.cells]
    assert seen.pop(bench.cell(NAMES[0])) == 1
    assert seen == [0, 0]


# -- calls ---------------------------------------------------------------------------------------


def test_every_slot_of_every_cell_is_used(bench: Celled) -> None:
    """By as many calls as there are slots, whatever cells are home to their model."""
    clients = [bench.submit(id=f"r{n}") for n in range(6)]
    bench.sleep(5.0)
    assert sorted(where(*clients)) == NAMES
    late = bench.submit(id="late")
    assert late.waits
    clients[3].lease.settle(outcome(now=bench.clock()))
    bench.sleep(5.0)
    assert where(late) == where(clients[3])
    for client in (*clients[:3], *clients[4:], late):
        client.lease.settle(outcome(now=bench.clock()))
    assert bench.is_at_rest()


def test_a_conversation_stays_in_its_cell(bench: Celled) -> None:
    """Where its prompt is cached, if that is not much busier; other conversations go elsewhere."""
    turns: list[int] = []
    for turn in range(4):
        client = bench.submit(id=f"r{turn}", session="one")
        turns.append(bench.cell(where(client)[0]))
        other = bench.submit(id=f"o{turn}", session=f"other {turn}")
        for each in (client, other):
            each.lease.settle(outcome(now=bench.clock()))
    assert len(set(turns)) == 1


def test_who_cannot_be_served_in_a_cell_is_moved(bench: Celled) -> None:
    """The backends of his cell go away while he waits."""
    clients = [bench.submit(id=f"r{n}") for n in range(6)]
    bench.sleep(3.0)
    late = bench.submit(id="late")
    (waiting,) = bench.cells.waiting()
    home = bench.cells._of[waiting]
    for name in home.names:
        bench.check(name, ok=False, connected=False, count=3)
    bench.sleep(3.0)
    assert bench.cells._of[waiting] is not home
    there = next(c for c in clients if where(c)[0] in bench.cells._of[waiting].names)
    there.lease.settle(outcome(now=bench.clock()))
    assert where(late) == where(there)
    for each in (*clients, late):
        if not each.lease.settled:
            each.lease.settle(outcome(now=bench.clock()))
    assert bench.is_at_rest()


def test_who_was_tried_is_not_asked_again_in_another_cell(bench: Celled) -> None:
    """A call that must keep away from both backends of a cell waits in another one."""
    away = frozenset(bench.cells.cells[0].names | bench.cells.cells[1].names)
    client = bench.submit(excluded=away, attempts=(), seq=1)
    assert where(client)[0] in bench.cells.cells[2].names


def test_a_limit_holds_over_all_cells(bench: Celled) -> None:
    """What one cell starts in a pass, the next one counts."""
    owner = Principal("o", Role.USER, allowance=Allowance(slots=2))
    others = [bench.submit(id=f"o{n}") for n in range(6)]
    clients = [bench.submit(id=f"r{n}", principal=owner, owner="key:o") for n in range(5)]
    bench.sleep(3.0)
    bench.pool.changed = lambda: None
    for client in others:
        client.lease.settle(outcome(now=bench.clock()))
    bench.pool.changed = bench.dispatcher.kick
    bench.sleep(3.0)
    assert sum(not client.waits for client in clients) == 2


def test_nobody_is_counted_twice_who_leaves(bench: Celled) -> None:
    """A call that is withdrawn, and one whose backend leaves the pool while it runs."""
    first = bench.submit()
    bench.shape(*(backend(name, slots=1) for name in NAMES if name != where(first)[0]))
    first.lease.settle(outcome(Verdict.GONE, bench.clock()))
    others = [bench.submit(id=f"r{n}") for n in range(6)]
    (late,) = (client for client in others if client.waits)
    assert late.ticket is not None
    bench.dispatcher.withdraw(late.ticket)
    for client in others:
        if client is not late:
            client.lease.settle(outcome(now=bench.clock()))
    assert bench.is_at_rest()


# -- one scheduler -------------------------------------------------------------------------------


def test_what_is_learned_is_told_as_one_and_taken_over_by_another(bench: Celled) -> None:
    """Each backend's part under its name, whatever cell it is in."""
    for cell in bench.cells.cells:
        for name in cell.names:
            rates = {"prompt_rate": 1500.0 + cell.number, "decode_rate": 60.0, "load_rate": 1.0}
            samples = dict.fromkeys(("prompt", "decode", "load"), 20)
            cell.plan.books.ledger(name).speed.restore({**rates, "samples": samples})
    learned = bench.cells.learned(bench.clock())
    assert sorted(learned["speeds"]) == NAMES
    fresh = Cells(bench.pool, bench._plan, bench.limits.may_start, 2)
    fresh.recall(learned, bench.clock(), 0.0)
    for cell in fresh.cells:
        for name in cell.names:
            rate = cell.plan.books.ledger(name).speed.prompt_rate
            assert rate == pytest.approx(1500.0 + bench.cell(name))


def test_what_waits_moves_over_to_another_dealing(bench: Celled) -> None:
    """A pool that has grown is dealt anew, while calls run and wait."""
    clients = [bench.submit(id=f"r{n}") for n in range(8)]
    bench.sleep(3.0)
    bench.cells = Cells(bench.pool, bench._plan, bench.limits.may_start, 2)
    bench.dispatcher.exchange(bench.cells)
    assert len(bench.cells.waiting()) == 2
    for client in clients:
        bench.sleep(2.0)
        client.lease.settle(outcome(now=bench.clock()))
    assert bench.is_at_rest()


def test_explain_shows_the_backends_of_all_cells(bench: Celled) -> None:
    """The first is where it would go, the others stand by what they would cost."""
    bench.submit(id="before", prompt_tokens=20_000)
    told = bench.dispatcher.forecast(call("m:1", arrived_at=bench.clock()))
    assert sorted(option.backend for option in told.options) == NAMES
    assert told.options[0].backend == told.backend
    leads = [option.why.partition(":")[0] for option in told.options]
    assert leads == ["comes first", *["costs more"] * 5], "not the first of each cell"
    prices = [option.terms["total_s"] for option in told.options[2:]]
    assert prices == sorted(prices)
    assert where(bench.submit()) == [told.backend]


def test_a_wait_is_estimated_by_the_cell_of_the_call(bench: Celled) -> None:
    """Zero while a slot is free there."""
    now = bench.clock()
    ticket = Ticket(call("m:1"), 1, frozenset(), (), now, now + 60.0)
    assert bench.cells.wait_estimate(ticket, now) == 0.0


def test_nothing_to_do_is_nothing_to_wake_for(bench: Celled) -> None:
    """As for one plan."""
    assert bench.cells.wake_at() == math.inf


@pytest.mark.parametrize("backends", [(), (NAMES[0], NAMES[4])])
def test_a_pin_is_kept_once_and_not_in_every_cell(bench: Celled, backends: tuple[str, ...]) -> None:
    """Any one copy is the first home's to keep; named backends are those of their cells."""
    bench.pool.pins = Pins([Pin(canon("o:1"), backends, 1, key("o:1"))])
    bench.dispatcher.kick()
    asked: list[str] = []
    for _ in range(20):
        bench.sleep(1.0)
        asked += [load.backend for load in bench.loads]
        while bench.loads:
            load: Any = bench.loaded()
            bench.holds(load.backend, "m:1", "o:1")
    assert sorted(asked) == sorted(backends) if backends else len(asked) == 1


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("hosts", [(0, 1), (1, 2), (2, 0)])
def test_a_pin_is_kept_where_its_model_is(
    bench: Celled, hosts: tuple[int, int], copies: int
) -> None:
    """Though its first home has none of it, or fewer than are wanted."""
    names = [min(bench.cells.cells[number].names) for number in hosts]
    for name in names:
        bench.lists(name, "m:1", "p:1")
    bench.pool.pins = Pins([Pin(canon("p:1"), (), copies, key("p:1"))])
    bench.dispatcher.kick()
    asked: list[str] = []
    for _ in range(10):
        bench.sleep(1.0)
        while bench.loads:
            asked.append(bench.loads[0].backend)
            bench.holds(bench.loaded().backend, "m:1", "p:1")
    assert len(asked) == copies
    assert set(asked) <= set(names)


def test_a_pin_is_kept_elsewhere_when_its_home_goes_away(bench: Celled) -> None:
    """And by nobody while nobody can."""
    bench.pool.pins = Pins([Pin(canon("o:1"), (), 1, key("o:1"))])
    bench.dispatcher.kick()
    bench.sleep(3.0)
    first = bench.loads[0].backend
    bench.holds(bench.loaded().backend, "m:1", "o:1")
    for name in sorted(bench.cells.cells[bench.cell(first)].names):
        bench.check(name, ok=False, connected=False, count=3)
    bench.sleep(5.0)
    assert bench.cell(bench.loads[-1].backend) != bench.cell(first)
    for name in NAMES:
        bench.check(name, ok=False, connected=False, count=3)
    bench.loads.clear()
    bench.sleep(5.0)
    assert bench.loads == []


def test_who_ran_in_the_last_pass_is_counted_once(bench: Celled) -> None:
    """What people are told of a key's limit does not count its calls twice."""
    owner = Principal("o", Role.USER, allowance=Allowance(slots=2))
    others = [bench.submit(id=f"o{n}") for n in range(6)]
    client = bench.submit(id="r", principal=owner, owner="key:o")
    bench.pool.changed = lambda: None
    for other in others:
        other.lease.settle(outcome(now=bench.clock()))
    bench.pool.changed = bench.dispatcher.kick
    bench.dispatcher.kick()
    assert not client.waits
    told = bench.dispatcher.forecast(call("m:1", id="s", principal=owner, owner="key:o"))
    assert (told.kind, told.text) == ("now", f"goes to {told.backend} now")


def test_who_waits_for_a_route_that_others_do_not_wait_for_is_moved(bench: Celled) -> None:
    """Though whoever is before him in the queue may stay."""
    clients = [bench.submit(id=f"r{n}") for n in range(6)]
    bench.sleep(3.0)
    first = bench.submit(id="first")
    (waiting,) = bench.cells.waiting()
    home = bench.cells._of[waiting]
    for name in NAMES:
        if name not in home.names:
            bench.catalog.note_no_route(name, "v1_completions")
    late = bench.submit(id="late", path="/v1/completions")
    assert late.ticket is not None
    assert bench.cells._of[late.ticket] is home
    for name in NAMES:
        bench.catalog.note_version(name, f"0.20.{int(name in home.names)}")  # all may have it anew
        if name in home.names:
            bench.catalog.note_no_route(name, "v1_completions")
    bench.sleep(3.0)
    assert bench.cells._of[waiting] is home
    assert bench.cells._of[late.ticket] is not home
    for client in clients:
        client.lease.settle(outcome(now=bench.clock()))
    bench.sleep(3.0)
    assert not first.waits
    assert not late.waits


def test_who_is_stuck_is_moved_soon_in_however_many_cells(bench: Celled) -> None:
    """Those where nobody waits are not looked at in between."""
    bench.cells = Cells(bench.pool, bench._plan, bench.limits.may_start, 6)
    bench.dispatcher.exchange(bench.cells)
    clients = [bench.submit(id=f"r{n}") for n in range(6)]
    bench.submit(id="late")
    (waiting,) = bench.cells.waiting()
    home = bench.cells._of[waiting]
    bench.sleep(1.0)
    bench.cells._looked = home.number
    (name,) = home.names
    bench.check(name, ok=False, connected=False, count=3)
    bench.sleep(1.0)
    assert bench.cells._of[waiting] is not home
    assert len(clients) == 6


def test_who_may_not_wait_is_planned_for_at_once(
    bench: Celled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whosever turn it is: else he is refused beside a free slot."""
    monkeypatch.setattr(cells, "TURN", 1)
    bench.admission.limits = QueueLimits(10_000, 10_000, 0.0)
    for first in range(3):
        for cell in bench.cells.cells:
            cell.dirty = True
        bench.cells._first = first
        away = frozenset(bench.cells.cells[0].names | bench.cells.cells[1].names)
        client = bench.submit(id=f"r{first}", excluded=away, attempts=(tried("gpu0"),), seq=1)
        client.lease.settle(outcome(now=bench.clock()))


def test_what_is_wanted_is_neither_lost_nor_multiplied_by_another_dealing(bench: Celled) -> None:
    """The demand of all cells is that of the pool, before and after."""
    for _ in range(5):
        clients = [bench.submit(id=f"r{n}") for n in range(6)]
        bench.sleep(5.0)
        for client in clients:
            client.lease.settle(outcome(now=bench.clock()))
    wanted, now = key("m:1"), bench.clock()
    parts = [cell.plan.books.demand.fast(wanted, now) for cell in bench.cells.cells]
    assert min(parts) > 0.0
    ((_, _, fast, _),) = bench.cells.learned(now)["demand"]["rates"]
    assert fast == pytest.approx(sum(parts))
    fresh = Cells(bench.pool, bench._plan, bench.limits.may_start, 2)
    fresh.recall(bench.cells.learned(now), now, 0.0)
    parts = [cell.plan.books.demand.fast(wanted, now) for cell in fresh.cells]
    assert sum(parts) == pytest.approx(fast)


def test_what_nobody_wants_is_forgotten_in_every_cell(bench: Celled) -> None:
    """Else the others would load it again, as asked for."""
    now = bench.clock()
    for cell in bench.cells.cells:
        cell.plan.books.arrived(call("m:1"), now)
    bench.pool.note(Unwanted(canon("m:1")))
    assert not any(cell.plan.books.demand.keys() for cell in bench.cells.cells)
