"""Who waits, and for what: one queue for each placement key, in order of the calls' tags."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from balancer.core.cost import Need
from balancer.core.decisions import Choice
from balancer.core.domain import PlacementKey
from balancer.core.scheduler import Ticket
from balancer.core.sight import Place


@dataclass(slots=True, eq=False)
class Waiter:
    """
    A ticket in the plan's queue, with what was thought of it last.

    Args:
        charge: In the fair queue.
        choice: What it does best; None: nothing, or it was not weighed yet.
        declined_at: When it held beside a free slot first.
        declined_until: After this it takes a free slot, though another seems better.
        gated_at: When it gave way first, as batch.
        barred: A backend whose slot was not to be had in this pass.
        seen: What had moved when it was weighed last.
        tick: From which on that may be kept for a while.
        weighed: The tick at which it was weighed in full.
    """

    ticket: Ticket
    tag: float
    need: Need
    charge: float
    choice: Choice | None = None
    declined_at: float | None = None
    declined_until: float = math.inf
    gated_at: float | None = None
    barred: str = ""
    seen: int = -1
    tick: int = -1
    weighed: int = -1

    @property
    def order(self) -> tuple[float, int]:
        """Its place in the queue."""
        return (self.tag, self.ticket.seq)


@dataclass(slots=True, eq=False)
class Queue:
    """
    The calls that wait for one placement key, in order of their tags.

    Args:
        fresh: Who waits is not who was looked at last.
        seen: What had moved when it was looked at.
        tick: At which that was.
        looked: Who was weighed then.
        free: Backends with a free slot, as of the three that follow.
        mixed: Routes that not every backend may have.
        choosy: Some calls' context is for us to choose.
    """

    key: PlacementKey
    waiters: list[Waiter] = field(default_factory=list)
    fresh: bool = True
    seen: int = -1
    tick: int = -1
    looked: list[Waiter] = field(default_factory=list)
    free: set[str] = field(default_factory=set)
    free_of: Mapping[str, Place] | None = None
    free_seen: int = -1
    free_tick: int = -1
    mixed: bool = False
    choosy: bool = False

    def place(self, waiter: Waiter) -> int:
        """How many are before it."""
        return bisect.bisect_left(self.waiters, waiter.order, key=order)


class Queues:
    """
    All of them.

    Attributes:
        by_key: None of them is empty.
        waiters: Everybody in them, by ticket.
    """

    def __init__(self) -> None:
        self.by_key: dict[PlacementKey, Queue] = {}
        self.waiters: dict[Ticket, Waiter] = {}

    def add(self, waiter: Waiter) -> None:
        """It waits from now on."""
        call = waiter.ticket.call
        self.waiters[waiter.ticket] = waiter
        queue = self.by_key.get(call.key)
        if queue is None:
            queue = self.by_key[call.key] = Queue(call.key)
        bisect.insort(queue.waiters, waiter, key=order)
        queue.fresh = True
        feature = queue.waiters[0].ticket.call.route.feature
        last = queue.waiters[-1].ticket.call.route.feature
        queue.choosy = queue.choosy or call.origin is not None
        queue.mixed = queue.mixed or call.route.feature != feature or feature != last

    def remove(self, ticket: Ticket) -> Waiter | None:
        """It waits no more; None: it did not."""
        waiter = self.waiters.pop(ticket, None)
        if waiter is None:
            return None
        queue = self.by_key[ticket.call.key]
        del queue.waiters[queue.place(waiter)]
        queue.fresh = True
        if not queue.waiters:
            del self.by_key[ticket.call.key]
        return waiter

    def waiting(self) -> list[Ticket]:
        """All tickets that wait, in order."""
        return [waiter.ticket for waiter in sorted(self.waiters.values(), key=order)]


def order(waiter: Waiter) -> tuple[float, int]:
    """Its place in the queue."""
    return waiter.order


def head_order(queue: Queue) -> tuple[float, int]:
    """The place of whoever is next; nobody's is the last."""
    return queue.waiters[0].order if queue.waiters else (math.inf, 0)
