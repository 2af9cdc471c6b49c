"""Who waits: order, and what a queue knows of those in it."""

from __future__ import annotations

import math

from balancer.core.cost import Need
from balancer.core.queues import Queue, Queues, Waiter, head_order
from balancer.core.scheduler import Ticket
from tests.core.bench import call, key


def waiter(tag: float, seq: int, model: str = "m:1", path: str = "/api/chat") -> Waiter:
    """Somebody who waits."""
    asked = call(model, path, id=f"r{seq}")
    return Waiter(Ticket(asked, seq, frozenset(), (), 0.0, math.inf), tag, Need(1, 1, 1), 0.0)


def test_in_order_of_tags_and_then_of_arrival() -> None:
    """Over all keys, whatever the order in which they were taken in."""
    queues = Queues()
    for each in (waiter(2.0, 1), waiter(1.0, 4, "n:1"), waiter(1.0, 3), waiter(-1.0, 9)):
        queues.add(each)
    assert [ticket.seq for ticket in queues.waiting()] == [9, 3, 4, 1]
    assert [each.ticket.seq for each in queues.by_key[key("m:1")].waiters] == [9, 3, 1]


def test_who_is_ahead() -> None:
    """Of the same key only; also of one who waits nowhere."""
    queues = Queues()
    first, second = waiter(1.0, 1), waiter(2.0, 2)
    for each in (second, first, waiter(0.0, 3, "n:1")):
        queues.add(each)
    queue = queues.by_key[key("m:1")]
    assert queue.place(first) == 0
    assert queue.place(second) == 1
    assert queue.place(waiter(math.inf, 0)) == 2


def test_no_queue_is_empty() -> None:
    """It goes with the last; who is not there is no mistake, and each of equal tags is found."""
    queues = Queues()
    twins = [waiter(1.0, seq) for seq in range(3)]
    for each in twins:
        queues.add(each)
    assert queues.remove(twins[1].ticket) is twins[1]
    assert queues.remove(twins[1].ticket) is None
    assert queues.by_key[key("m:1")].waiters == [twins[0], twins[2]]
    for each in (twins[0], twins[2]):
        assert queues.remove(each.ticket) is each
    assert (queues.by_key, queues.waiters) == ({}, {})


def test_whoever_comes_or_goes_makes_it_fresh() -> None:
    """What was thought of the queue before is not kept."""
    queues = Queues()
    first, second = waiter(1.0, 1), waiter(2.0, 2)
    queues.add(first)
    queue = queues.by_key[key("m:1")]
    queue.fresh = False
    queues.add(second)
    assert queue.fresh
    queue.fresh = False
    queues.remove(first.ticket)
    assert queue.fresh


def test_routes_are_mixed_once_they_were() -> None:
    """By one that waits for another, also when the first has gone."""
    queues = Queues()
    first, plain, odd = waiter(1.0, 1), waiter(2.0, 2), waiter(3.0, 3, path="/api/generate")
    queues.add(first)
    queues.add(plain)
    queue = queues.by_key[key("m:1")]
    assert not queue.mixed
    queues.add(odd)
    queues.remove(first.ticket)
    assert queue.mixed


def test_the_queue_of_nobody_is_the_last() -> None:
    """Others are in the order of those who are next."""
    one, other = Queue(key("m:1"), [waiter(5.0, 1)]), Queue(key("n:1"), [waiter(3.0, 2)])
    assert sorted([Queue(key("o:1")), one, other], key=head_order)[:2] == [other, one]
