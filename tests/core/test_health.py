"""Health: what checks make of a backend."""

from __future__ import annotations

import random

import pytest

from balancer.core.domain import CheckResult
from balancer.core.health import Health
from tests.core.clocks import ManualClock

GOOD = CheckResult(ok=True, latency_s=0.01, version="0.12.0")
BAD = CheckResult(ok=False, latency_s=2.0, error="timeout")
DEAD = CheckResult(ok=False, latency_s=0.0, error="refused", connected=False)


@pytest.fixture
def clock() -> ManualClock:
    """Time by hand."""
    return ManualClock()


@pytest.fixture
def health(clock: ManualClock) -> Health:
    """The default settings: every 5 s, three bad ones down, two good ones up."""
    return Health(clock, random.Random(1), 5.0, 3, 2)


def flips(health: Health, *results: CheckResult) -> list[bool | None]:
    """What each check flips."""
    return [health.observe(result) for result in results]


def test_begins_unknown_and_due(health: Health, clock: ManualClock) -> None:
    """Before the first check nothing is known, the backend is not used, and a check is due."""
    assert (health.state, health.up, health.hard_down) == ("unknown", False, False)
    assert (health.due_in(), health.since, health.version) == (0, clock.now, None)


def test_the_first_check_decides(health: Health, clock: ManualClock) -> None:
    """One good check is enough at the beginning."""
    clock.advance(3)
    assert flips(health, GOOD) == [True]
    assert (health.state, health.up, health.since) == ("up", True, clock.now)
    assert (health.version, health.last_error) == ("0.12.0", "")


def test_the_first_check_decides_against_it_too(health: Health) -> None:
    """One bad check is enough at the beginning; coming up takes *rise* from then on."""
    assert flips(health, BAD) == [False]
    assert (health.state, health.last_error) == ("down", "timeout")
    assert flips(health, GOOD, GOOD) == [None, True]


def test_falls_after_three_in_a_row(health: Health) -> None:
    """Only bad checks in a row bring it down, and only the flip is told."""
    health.observe(GOOD)
    assert flips(health, BAD, BAD, GOOD, BAD, BAD) == [None] * 5
    assert flips(health, BAD, BAD) == [False, None]
    assert health.state == "down"


def test_rises_after_two_in_a_row(health: Health) -> None:
    """Only good checks in a row bring it up again."""
    flips(health, GOOD, BAD, BAD, BAD)
    assert flips(health, GOOD, BAD, GOOD) == [None] * 3
    assert flips(health, GOOD, GOOD) == [True, None]


def test_checks_are_spread(health: Health, clock: ManualClock) -> None:
    """The interval is kept give or take a fifth, and drawn anew each time, not each look."""
    pauses = []
    for _ in range(200):
        health.observe(GOOD)
        pauses.append(health.due_in())
        assert health.due_in() == pauses[-1]
    assert 4.0 <= min(pauses) < 4.2
    assert 5.8 < max(pauses) <= 6.0
    clock.advance(10)
    assert health.due_in() == 0


def test_coming_up_is_checked_quickly(health: Health) -> None:
    """After the first good check of a backend that is down the next follows in a second."""
    flips(health, BAD)
    assert health.due_in() >= 4.0
    health.observe(GOOD)
    assert health.due_in() == pytest.approx(1.0)
    health.observe(GOOD)
    assert health.due_in() >= 4.0


def test_hard_down_needs_both(health: Health) -> None:
    """Only a backend that is down and refuses connections is known to be dead."""
    flips(health, GOOD, DEAD, DEAD)
    assert not health.hard_down
    flips(health, DEAD)
    assert health.hard_down
    flips(health, BAD)
    assert not health.hard_down
    flips(health, DEAD, GOOD)
    assert not health.hard_down


def test_facts_of_the_last_check(health: Health) -> None:
    """A good check clears the error; a bad one keeps the version that was told before."""
    flips(health, GOOD, BAD)
    assert (health.version, health.last_error) == ("0.12.0", "timeout")
    flips(health, CheckResult(ok=True, latency_s=0.1, version="0.13.0"))
    assert (health.version, health.last_error) == ("0.13.0", "")


def test_settings_can_be_replaced(health: Health) -> None:
    """New settings hold at once, also for the pause under way; nothing seen is forgotten."""
    flips(health, GOOD, BAD)
    health.configure(1.0, 2, 1)
    assert 0.8 <= health.due_in() <= 1.2
    assert flips(health, BAD) == [False]
    assert flips(health, GOOD) == [True]
    health.configure(100.0, 2, 1)
    assert health.due_in() <= 1.2
