"""Counts between bounds."""

from __future__ import annotations

from balancer.core.spread import Spread


def test_values_fall_between_bounds() -> None:
    """One on a bound counts below it, as Prometheus has it; the last is open."""
    spread = Spread((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        spread.observe(value)
    assert (spread.counts, spread.sum) == ([2, 2, 1], 14.0)
