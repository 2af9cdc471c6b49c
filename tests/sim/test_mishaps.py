"""The schedules of what goes wrong."""

from __future__ import annotations

from itertools import pairwise

import pytest

from balancer.sim.jobs import Job
from balancer.sim.mishaps import (
    Bypass,
    Crash,
    Hang,
    Straggle,
    bypassing,
    deaths,
    flapping,
    stragglers,
)

NAMES = [f"h{n}" for n in range(8)]


def test_stragglers_are_slow_about_a_ninth_of_the_time() -> None:
    """Eighty seconds on average, every ten minutes; each host for itself, one spell at a time."""
    found = stragglers(NAMES, 100_000.0, 1)
    assert all(isinstance(each, Straggle) and each.factor == 0.2 for each in found)
    share = sum(each.for_s for each in found if isinstance(each, Straggle)) / (8 * 100_000.0)
    assert 0.09 < share < 0.15
    for name in NAMES:
        mine = [each for each in found if isinstance(each, Straggle) and each.machine == name]
        assert all(one.at + one.for_s <= two.at for one, two in pairwise(mine))


def test_deaths_are_two_of_each_kind_and_one_that_flaps() -> None:
    """Ninety seconds each; whoever flaps does nothing else."""
    found = deaths(NAMES, 3600.0, 1)
    long = [each for each in found if isinstance(each, Crash | Hang) and each.for_s == 90.0]
    assert sorted(type(each).__name__ for each in long) == ["Crash", "Crash", "Hang", "Hang"]
    (flaps,) = {each.machine for each in found if each not in long}
    assert flaps not in {each.machine for each in long}


def test_schedules_come_from_the_seed() -> None:
    """The same one, the same schedule."""
    assert stragglers(NAMES, 3600.0, 1) == stragglers(NAMES, 3600.0, 1)
    assert deaths(NAMES, 3600.0, 1) != deaths(NAMES, 3600.0, 2)


def test_flapping_is_up_and_down_in_turn() -> None:
    """Ten seconds down, twenty up."""
    assert flapping("h", 5.0, 60.0) == [Crash("h", 5.0, 10.0), Crash("h", 35.0, 10.0)]


def test_a_quarter_goes_straight_to_the_hosts() -> None:
    """40 % of it, and its share of the rest, to one."""
    jobs = [Job(float(n), "m", 10, 5) for n in range(8000)]
    kept, strangers = bypassing(jobs, NAMES, 1)
    assert len(kept) + len(strangers) == 8000
    assert 0.23 < len(strangers) / 8000 < 0.27
    counts = sorted(sum(each.machine == name for each in strangers) for name in NAMES)
    assert 0.43 < counts[-1] / len(strangers) < 0.52
    assert all(isinstance(each, Bypass) and each.output_tokens == 5 for each in strangers)


def test_jobs_that_follow_others_cannot_be_taken_out() -> None:
    """Their places in the list would change."""
    with pytest.raises(ValueError, match="follow"):
        bypassing([Job(0.0, "m", 1, 1, after=(0, 1.0))], NAMES, 1)
