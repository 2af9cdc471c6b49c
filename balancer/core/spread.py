"""How values are spread: counts between bounds, of what comes too often to be told each time."""

from __future__ import annotations

from bisect import bisect_left


class Spread:
    """
    A histogram.

    Args:
        bounds: Upper ones, rising; a value on a bound counts below it.

    Attributes:
        counts: One more than there are bounds.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
