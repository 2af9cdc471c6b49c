"""A clock that moves only when told."""

from __future__ import annotations


class ManualClock:
    """Monotonic seconds, by hand."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass."""
        self.now += seconds
