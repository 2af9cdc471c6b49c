"""How many may wait, and what those hear who may not."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest

from balancer.core.admission import Admission, QueueLimits, too_long
from balancer.core.errors import QueueFull, WaitTooLong
from tests.core.clocks import ManualClock

LIMITS = QueueLimits(max_depth=4, max_depth_per_model=2, max_wait_s=10.0)


@pytest.fixture
def clock() -> ManualClock:
    """Time by hand."""
    return ManualClock()


@pytest.fixture
def admission(clock: ManualClock) -> Admission:
    """Four in all, two per model."""
    return Admission(LIMITS, clock)


def enter(admission: Admission, *models: str) -> None:
    """So many begin to wait."""
    for model in models:
        admission.entered(model)


def test_counts_who_waits(admission: Admission) -> None:
    """Depth in all and per model; who has left is not listed any more."""
    enter(admission, "a", "a", "b")
    admission.left("b")
    assert admission.depth == 2
    assert admission.depths() == {"a": 2}


def test_a_model_may_not_take_the_whole_queue(admission: Admission) -> None:
    """The limit per model refuses that model and no other."""
    enter(admission, "a", "a")
    with pytest.raises(QueueFull, match=r"2 calls wait for this model.*queue\.max_depth_per_model"):
        admission.check("a")
    admission.check("b")
    assert not admission.is_full()


def test_the_whole_queue_has_an_end(admission: Admission) -> None:
    """The limit in all refuses everybody."""
    enter(admission, "a", "a", "b", "c")
    with pytest.raises(QueueFull, match=r"4 calls wait, about .*queue\.max_depth\."):
        admission.check("d")
    assert admission.is_full()


def test_looking_leaves_no_trace(admission: Admission) -> None:
    """Names that callers make up are not remembered."""
    for number in range(100):
        admission.check(f"made-up-{number}")
        admission.entered(f"made-up-{number}")
        admission.left(f"made-up-{number}")
    assert admission.depths() == {}
    assert len(admission._waiting) == 0


def test_new_limits_hold_at_once(admission: Admission) -> None:
    """A reload changes the bounds of the queue that is there."""
    enter(admission, "a", "a")
    admission.limits = QueueLimits(4, 3)
    admission.check("a")


def test_the_wait_is_guessed_before_anything_has_left(admission: Admission) -> None:
    """Without a rate there is still an answer."""
    assert admission.drain_s(10) == 30.0


def test_the_wait_follows_the_rate_of_the_last_minute(
    admission: Admission, clock: ManualClock
) -> None:
    """Two calls per second have left: ten go in five seconds; what is older is forgotten."""
    enter(admission, *"a" * 61)
    admission.left("a")
    clock.advance(100.0)
    for _ in range(60):
        clock.advance(0.5)
        admission.left("a")
    assert admission.drain_s(10) == pytest.approx(10 / (60 / 29.5))
    clock.advance(61.0)
    assert admission.drain_s(10) == 30.0


def test_the_wait_has_bounds(admission: Admission, clock: ManualClock) -> None:
    """Never less than a second, never more than ten minutes."""
    enter(admission, *"a" * 40)
    for _ in range(30):
        admission.left("a")
    assert admission.drain_s(1) == 1.0
    clock.advance(59.0)
    assert admission.drain_s(100_000) == 600.0


def test_a_refusal_says_when_to_come_back(admission: Admission) -> None:
    """Half the time the queue would take: by then there is room."""
    enter(admission, "a", "a")
    with pytest.raises(QueueFull) as caught:
        admission.check("a")
    assert caught.value.retry_after_s == 15.0


@pytest.mark.parametrize(
    ("wait_s", "max_wait_s", "left_s", "chance", "retry_s"),
    [
        (120.0, 120.0, math.inf, 0.5, None),
        (121.0, 120.0, math.inf, 0.5, 60),
        (100.0, 120.0, math.inf, 0.0, None),
        (14.0, 10.0, math.inf, 0.5, 9),
        (14.0, 10.0, math.inf, 0.0, 7),
        (14.0, 10.0, math.inf, 1.0, 12),
        (5.0, 120.0, 4.0, 0.5, 1),
        (5.0, 120.0, -1.0, 0.5, 1),
        (1e12, 120.0, math.inf, 0.5, 60),
        (math.inf, 120.0, math.inf, 0.5, 60),
    ],
)
def test_who_would_wait_in_vain_is_told_at_once(
    wait_s: float, max_wait_s: float, left_s: float, chance: float, retry_s: int | None
) -> None:
    """Beyond what it may wait, or its own limit; with when to come back, spread by chance."""
    error = too_long(wait_s, max_wait_s, left_s, chance)
    assert (error and error.retry_after_s) == retry_s
    assert error is None or error.wait_s == wait_s


def test_the_estimate_is_told() -> None:
    """In words, with the limit that it breaks."""
    error = too_long(300.0, 120.0, math.inf, 0.5)
    assert error is not None
    assert error.text == (
        "A slot would come free in about 300 s, and this call may wait only 120 s "
        "(queue.max_wait). Retry after 60 s."
    )
    error = too_long(9000.0, 120.0, 30.0, 0.5)
    assert error is not None
    assert "in about an hour or more, and" in error.text
    assert "only 30 s (its own time limit)" in error.text


def test_early_refusals_are_counted_and_can_be_turned_off(clock: ManualClock) -> None:
    """Not where nobody may wait at all: there a free slot is all that counts."""
    for limits, refused in (
        (QueueLimits(max_wait_s=10.0), {"wait": 1}),
        (QueueLimits(max_wait_s=10.0, adaptive=False), {}),
        (QueueLimits(max_wait_s=0.0), {}),
    ):
        admission = Admission(limits, clock)
        with suppress(WaitTooLong):
            admission.check_wait(11.0, math.inf)
        assert admission.refused == refused


def test_a_full_queue_tells_how_long_it_is(admission: Admission) -> None:
    """As a header has it, too; and is counted by which bound it was."""
    enter(admission, "a", "a")
    with pytest.raises(QueueFull) as caught:
        admission.check("a")
    assert caught.value.wait_s == admission.drain_s(2)
    enter(admission, "b", "b")
    with pytest.raises(QueueFull):
        admission.check("c")
    with pytest.raises(QueueFull):
        admission.check("c", asked=False)  # somebody wonders what would become of such a call
    assert admission.refused == {"max_depth_per_model": 1, "max_depth": 1}
