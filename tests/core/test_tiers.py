"""Tiers: who is considered, and who only where nobody else can serve."""

from __future__ import annotations

import pytest

from balancer.core.domain import Candidate, Residency
from balancer.core.tiers import highest, order, tiers
from tests.core.bench import backend


def candidate(name: str) -> Candidate:
    """One that may serve."""
    return Candidate(name, Residency.LOADED, 0, 1, 0, True, 0.0, None, 0)


@pytest.mark.parametrize(
    ("names", "found"),
    [("abcd", "ab"), ("dcba", "ba"), ("cd", "c"), ("d", "d"), ("xd", "d"), ("x", "x"), ("", "")],
)
def test_only_the_highest_tier_that_is_there_counts(names: str, found: str) -> None:
    """In the order given; one that nobody knows comes last of all."""
    there = [candidate(name) for name in names]
    chosen = highest(there, {"a": 100, "b": 100, "c": 50, "d": 0})
    assert "".join(c.backend for c in chosen) == found


def test_without_tiers_everybody_counts() -> None:
    """And nothing is looked at."""
    there = [candidate("a"), candidate("b")]
    assert highest(there, {}) is there


def test_backends_of_one_tier_are_none_worth_telling() -> None:
    """Whatever its number; so that nobody looks at tiers where there are none."""
    assert tiers([]) == {}
    assert tiers([backend("a", priority=7), backend("b", priority=7)]) == {}
    assert tiers([backend("a"), backend("b", priority=7)]) == {"a": 100, "b": 7}


def test_by_tier_as_long_as_it_is_not_dear() -> None:
    """What costs more than patience allows stands behind all others, and is alike."""
    there = [(12.0, 9), (3.0, 9), (1.0, 5), (11.0, 5), (10.0, 5), (0.1, 1)]
    told = sorted(there, key=lambda each: order(each[0], each[1], 10.0))
    assert told == [(3.0, 9), (1.0, 5), (10.0, 5), (0.1, 1), (12.0, 9), (11.0, 5)]
