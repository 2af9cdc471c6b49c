"""Fair queueing: whose turn it is."""

from __future__ import annotations

import heapq
import math
import random

import pytest

from balancer.core import fair
from balancer.core.fair import FairQueue


@pytest.fixture
def queue() -> FairQueue:
    """Nobody has asked yet."""
    return FairQueue()


def test_a_key_stands_behind_itself(queue: FairQueue) -> None:
    """Each call begins where the one before ends; half the weight makes it twice as long."""
    assert [queue.tag("ann", 2.0, 1.0, 0.0) for _ in range(3)] == [0.0, 2.0, 4.0]
    assert [queue.tag("bob", 2.0, 0.5, 0.0) for _ in range(2)] == [0.0, 4.0]


def test_a_newcomer_stands_at_the_head(queue: FairQueue) -> None:
    """Ahead of a heavy key's backlog, yet not ahead of what has gone out."""
    for _ in range(100):
        queue.tag("heavy", 1.0, 1.0, 0.0)
    queue.advance(7.0)
    queue.advance(3.0)
    assert queue.tag("light", 1.0, 1.0, 0.0) == 7.0
    assert queue.tag("heavy", 1.0, 1.0, 0.0) == 100.0


def test_the_next_tag_can_be_known_beforehand(queue: FairQueue) -> None:
    """Of who has a line and of who has none; nothing comes of asking."""
    queue.tag("ann", 2.0, 1.0, 0.0)
    queue.advance(1.0)
    for who, tag in (("ann", 2.0), ("bob", 1.0)):
        assert queue.next_tag(who) == queue.next_tag(who) == tag
        assert queue.tag(who, 1.0, 1.0, 0.0) == tag


def test_what_was_cheaper_than_thought_is_settled(queue: FairQueue) -> None:
    """And what was dearer: later calls stand earlier or later for it, by weight."""
    queue.tag("ann", 2.0, 1.0, 0.0)
    queue.settle("ann", 3.0, 1.0)
    assert queue.tag("ann", 2.0, 1.0, 0.0) == 5.0
    queue.settle("ann", -1.0, 0.5)
    assert queue.tag("ann", 2.0, 1.0, 0.0) == 5.0
    queue.settle("new", 4.0, 1.0)
    assert queue.tag("new", 1.0, 1.0, 0.0) == 4.0
    queue.settle("never seen", -4.0, 1.0)
    assert queue.tag("never seen", 1.0, 1.0, 0.0) == 0.0


def test_the_newest_gets_back_what_it_was_charged(queue: FairQueue) -> None:
    """Then the one before is the newest; of those in the middle the charge stays."""
    tags = [queue.tag("ann", 2.0, 1.0, 0.0) for _ in range(4)]
    queue.give_back("ann", 2.0, 1.0, tags[1])
    queue.give_back("ann", 2.0, 1.0, tags[3])
    queue.give_back("ann", 2.0, 1.0, tags[3])
    queue.give_back("ann", 2.0, 1.0, tags[2])
    assert queue.tag("ann", 2.0, 1.0, 0.0) == 4.0
    queue.give_back("bob", 2.0, 1.0, 0.0)
    assert len(queue) == 1


def test_a_settlement_does_not_hide_which_is_newest(queue: FairQueue) -> None:
    """Another call of the key may end while it waits."""
    queue.tag("ann", 2.0, 1.0, 0.0)
    tag = queue.tag("ann", 2.0, 1.0, 0.0)
    queue.settle("ann", 1.0, 1.0)
    queue.give_back("ann", 2.0, 1.0, tag)
    assert queue.tag("ann", 2.0, 1.0, 0.0) == 3.0


@pytest.mark.parametrize(
    ("cost", "weight"),
    [(-1.0, 1.0), (1.0, 0.0), (1.0, -2.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)],
)
def test_no_cost_or_weight_without_sense(queue: FairQueue, cost: float, weight: float) -> None:
    """A negative one would put a key ahead of all, nought divide by nought."""
    with pytest.raises(ValueError, match="weight"):
        queue.tag("ann", cost, weight, 0.0)
    with pytest.raises(ValueError, match="weight"):
        queue.give_back("ann", cost, weight, 0.0)
    with pytest.raises(ValueError, match="weight"):
        queue.settle("ann", cost if cost > 0 or math.isnan(cost) else math.inf, weight)
    assert len(queue) == 0


def test_keys_are_forgotten_once_they_are_as_good_as_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with a debt stay; of too many the ones heard of least lately go."""
    monkeypatch.setattr(fair, "MOST_KEYS", 50)
    queue = FairQueue()
    queue.tag("debtor", 1000.0, 1.0, 0.0)
    for step in range(45):
        queue.advance(queue.tag(f"k{step}", 1.0, 1.0, 0.0) + 1.0)
    assert len(queue) < 20
    assert queue.tag("debtor", 1.0, 1.0, 0.0) == 1000.0
    for step in range(2000):
        queue.tag(f"n{step}", 1.0, 1.0, 0.0)
    assert len(queue) <= 150


def test_a_flood_takes_no_more_than_its_share() -> None:
    """Served one after the other, two busy keys share by weight, and a light one hardly waits."""
    rng, queue = random.Random(4), FairQueue()
    heap: list[tuple[float, int, str, float]] = []
    served = dict.fromkeys(("flood", "fair", "half"), 0.0)
    ahead_of_light: list[int] = []
    weights = {"flood": 1.0, "fair": 1.0, "half": 0.5, "light": 1.0}

    def ask(who: str, number: int) -> float:
        cost = rng.uniform(0.5, 1.5)
        tag = queue.tag(who, cost, weights[who], 0.0)
        heapq.heappush(heap, (tag, number, who, cost))
        return tag

    for number in range(3000):
        ask("flood", number)
    for number in range(3000, 4000):
        ask("fair", number)
        ask("half", number + 1000)
    for number in range(10_000, 11_000):
        if number % 50 == 0:
            tag = ask("light", number)
            ahead_of_light.append(sum(1 for entry in heap if entry < (tag, number, "", 0.0)))
        tag, _, who, cost = heapq.heappop(heap)
        queue.advance(tag)
        if who in served:
            served[who] += cost
    assert served["flood"] == pytest.approx(served["fair"], rel=0.05)
    assert served["half"] == pytest.approx(served["fair"] / 2, rel=0.05)
    assert max(ahead_of_light) <= 3
