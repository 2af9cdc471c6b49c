"""
Whose turn it is: tags of the fair queue, shares of slots, the gate for batch, and who has hope yet.

Laws:
- None of them may start something by itself, each may only keep a call back, and none for ever:
  batch has its floor and its patience, and a key that has its share waits only while others do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from balancer.core.books import Books
from balancer.core.cost import Need
from balancer.core.domain import Call, Outcome, PlacementKey, Purpose, Verdict
from balancer.core.fair import FairQueue
from balancer.core.knobs import Knobs
from balancer.core.ledger import Track
from balancer.core.lengths import LONGEST
from balancer.core.queues import Queues, Waiter
from balancer.core.scheduler import Ticket
from balancer.core.sight import Sight

FRONT: Final = -1.0  # the tag of a call that is tried again
READ_PER_S: Final = 3000.0  # what a call is charged for, in tokens
WRITTEN_PER_S: Final = 60.0
CLASS_WINDOW_S: Final = 60.0
LEAST_CLASSED: Final = 5.0  # commits of late, from which on batch has a floor
FLOOR_AFTER_S: Final = 1.0
MOST_KEYS: Final = 4096


@dataclass(slots=True)
class _Classes:
    """Commits of late, all and batch; they fade."""

    all: float = 0.0
    batch: float = 0.0
    at: float = 0.0

    def add(self, now: float, *, batch: bool) -> None:
        self.fade(now)
        self.all += 1.0
        self.batch += batch

    def fade(self, now: float) -> None:
        kept = math.exp((self.at - now) / CLASS_WINDOW_S)
        self.all, self.batch, self.at = self.all * kept, self.batch * kept, now


class Turns:
    """
    The turns.

    Attributes:
        fair: The queue that the tags are of.
    """

    def __init__(self, view: Sight, knobs: Knobs, books: Books, queues: Queues) -> None:
        self.fair = FairQueue()
        self._view = view
        self._knobs = knobs
        self._books = books
        self._queues = queues
        self._classes: dict[PlacementKey, _Classes] = {}
        self._slots: dict[str, tuple[int, int]] = {}  # by model: tick, slots of all copies

    # -- tags ----------------------------------------------------------------------------------

    def admit(self, ticket: Ticket, need: Need, now: float) -> Waiter:
        """Give a ticket its place; one that is tried again has paid, and is in front."""
        waiter = Waiter(ticket, FRONT, need, 0.0)
        if not ticket.attempts:
            self.charge(waiter, now)
        return waiter

    def charge(self, waiter: Waiter, now: float) -> None:
        """Let its key pay for it; its tag is what comes of that."""
        call, need = waiter.ticket.call, waiter.need
        waiter.charge = _charge(need.prompt, need.answer)
        waiter.tag = self.fair.tag(_line(call), waiter.charge, self._weight(call), now)

    def preview(self, ticket: Ticket, need: Need) -> Waiter:
        """What `admit` would make of it; nothing is charged."""
        tag = FRONT if ticket.attempts else self.fair.next_tag(_line(ticket.call))
        return Waiter(ticket, tag, need, 0.0)

    def give_back(self, waiter: Waiter) -> None:
        """It left unserved."""
        if waiter.charge:
            call = waiter.ticket.call
            self.fair.give_back(_line(call), waiter.charge, self._weight(call), waiter.tag)

    def went(self, waiter: Waiter, now: float) -> None:
        """It was committed."""
        call = waiter.ticket.call
        self.fair.advance(waiter.tag)
        classes = self._classes.get(call.key)
        if classes is None:
            if len(self._classes) > MOST_KEYS:
                self._classes.clear()
            classes = self._classes[call.key] = _Classes(at=now)
        classes.add(now, batch=call.batch)

    def settle(self, track: Track, outcome: Outcome) -> None:
        """It has ended: what it truly cost is known."""
        call, usage = track.call, outcome.usage
        is_told = outcome.verdict is Verdict.OK and call.purpose is Purpose.RUN
        if not is_told or call.embedding:
            return
        read, written = usage.tokens_in or track.prompt, track.written(usage) or 0
        if max(read, written) > LONGEST:  # what a backend tells may be nonsense
            return
        true = _charge(read, written)
        charged = _charge(track.charged, track.answer)
        self.fair.settle(_line(call), true - charged, self._weight(call))

    def _weight(self, call: Call) -> float:
        return self._knobs.batch_weight if call.batch else 1.0

    # -- shares --------------------------------------------------------------------------------

    def share(self, key: PlacementKey) -> int:
        """Slots that one key of fairness may have while another waits."""
        return max(1, math.floor(self._all_slots(key) * (1.0 - self._knobs.batch_reserve)))

    def has_its_share(self, call: Call) -> bool:
        """Whether it has to let others by, if there are any."""
        mine = self._books.in_flight.get((call.key.model, call.fair_key), 0)
        return mine >= self.share(call.key)

    def _all_slots(self, key: PlacementKey) -> int:
        """Slots of all copies in memory."""
        books, model = self._books, key.model
        known = self._slots.get(model)
        if known is None or known[0] != books.ticks:
            total = sum(
                self._view.slots(name, model)
                for name in books.backends
                if any(it.model == model for it in books.in_memory(name))
            )
            known = self._slots[model] = (books.ticks, total)
        return known[1]

    def is_gate_open(self, waiter: Waiter, now: float, *, when_free: bool = False) -> bool:
        """
        Whether batch may take slots of this key now.

        Args:
            when_free: Where none is free, as it will be when one is.
        """
        knobs, key = self._knobs, waiter.ticket.call.key
        slots = self._all_slots(key)
        if not slots:
            return True
        used = sum(ledger.in_flight(key.model) for ledger in self._books.ledgers.values())
        if max(slots - used, when_free) > knobs.batch_reserve * slots:
            return True
        classes = self._classes.get(key)
        if classes is None:
            return False
        classes.fade(now)
        if now - waiter.ticket.queued_at <= FLOOR_AFTER_S or classes.all < LEAST_CLASSED:
            return False
        return classes.batch < knobs.batch_floor * classes.all

    # -- too many ------------------------------------------------------------------------------

    def is_overloaded(self, now: float) -> bool:
        """Whether so many wait that those who can still be quick go first."""
        knobs, waiters = self._knobs, self._queues.waiters
        if len(waiters) <= knobs.triage_depth * max(1, len(self._books.backends)):
            return False
        # Who came first stands first, as a rule.
        return any(
            now - waiter.ticket.queued_at >= knobs.triage_after_s for waiter in waiters.values()
        )

    def has_hope(self, waiter: Waiter, now: float) -> bool:
        """Whether it can still be quick, or has waited so long that it must not be put off."""
        knobs, waited_s = self._knobs, now - waiter.ticket.queued_at
        target_s = knobs.hope_s + knobs.hope_per_token_s * waiter.need.prompt
        return (
            waited_s <= target_s or waited_s >= knobs.triage_patience_s or waiter.ticket.call.batch
        )


def _charge(read: float, written: float) -> float:
    """Seconds of a middling GPU."""
    return read / READ_PER_S + written / WRITTEN_PER_S


def _line(call: Call) -> str:
    """Whose line it stands in: nobody's batch is ahead of his own interactive calls."""
    return f"{call.fair_key}\nbatch" if call.batch else call.fair_key
