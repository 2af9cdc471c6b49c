"""Trouble under traffic: no call lost, no stream cut in silence, nothing left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest

from balancer.sim.loop import run
from balancer.sim.storm import Course, Damage, courses, ride, weather

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quiet")]

QUICK = (
    "killed",
    "reset in the stream",
    "error as first record",
    "500 for one model, loading",
    "restarted",
    "slow load",
)
LONG = ("hanging", "frozen")


def ridden(kind: str, seed: int) -> Damage:
    """A short storm in virtual time, and what it did."""
    course = courses.get(kind, Course())
    return run(ride(kind, replace(course, seconds=20.0, hits=5, most=3, rate=10.0, seed=seed)))


def assert_unharmed(damage: Damage) -> None:
    """What must hold whatever the weather."""
    fates = damage.tally.fates()
    told = [each for each in damage.tally.seen if each.fate in ("lost", "silent")]
    assert told == [], damage.row()
    assert fates["ok"] + fates["cut"] == damage.calls > 100
    assert damage.mishaps == []
    assert (damage.left_running, damage.left_waiting) == (0, 0)


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("kind", QUICK)
def test_a_storm(kind: str, seed: int) -> None:
    """A fault put in and healed under ten calls a second, in both dialects, one model cold."""
    damage = ridden(kind, seed)
    assert_unharmed(damage)
    assert damage.wasted or kind == "slow load"
    if kind not in ("killed", "restarted", "reset in the stream", "slow load"):
        assert damage.tally.fates()["cut"] == 0


@pytest.mark.parametrize("kind", LONG)
def test_a_storm_of_silence(kind: str) -> None:
    """Hosts that say nothing cost time, and no call."""
    damage = ridden(kind, 2)
    assert_unharmed(damage)
    assert 0 < damage.wasted < 20
    assert damage.tally.first_s(1.0) < 40.0


def test_every_weather_has_a_name_of_its_own() -> None:
    """The list the fault table is made from holds what these tests pick from it."""
    assert set(QUICK) | set(LONG) <= set(weather)
    assert set(courses) <= set(weather)
