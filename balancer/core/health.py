"""
Health of one backend, from its checks alone.

Laws:
- No request changes health and no check closes a breaker.
- Flips are reported, not samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final, Literal

from balancer.core.domain import CheckResult

State = Literal["unknown", "up", "down"]

JITTER: Final = 0.2
COMING_UP_S: Final = 1.0
# Timers fire a little early, and so small a sum may not move a clock: such a wait is over.
OVER_S: Final = 1e-6


class Health:
    """
    Judges checks; somebody else makes them.

    The first check decides at once, good or bad. After that it takes *fall* bad ones in a row to
    go down, *rise* good ones to come up.

    Args:
        interval_s: Between two checks, give or take a fifth; a second while it is coming up.

    Attributes:
        state: ``unknown`` before the first check, then ``up`` or ``down``.
        since: The instant of the last flip, or of the beginning.
        version: The last one told.
        last_error: Of the latest check; empty if it was good.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        rng: random.Random,
        interval_s: float,
        fall: int,
        rise: int,
    ) -> None:
        self._clock = clock
        self._rng = rng
        self._interval_s = interval_s
        self._fall = fall
        self._rise = rise
        self.state: State = "unknown"
        self.since = self._due_at = clock()
        self.version: str | None = None
        self.last_error = ""
        self._connected = True
        self._streak = 0  # checks in a row that speak against the state

    @property
    def up(self) -> bool:
        """Whether it may be used; unknown is not up."""
        return self.state == "up"

    @property
    def hard_down(self) -> bool:
        """Down, and not even a connection: whatever still hangs there is dead."""
        return self.state == "down" and not self._connected

    def due_in(self) -> float:
        """Seconds until the next check should be made; 0: now."""
        left_s = self._due_at - self._clock()
        return left_s if left_s > OVER_S else 0.0

    def observe(self, result: CheckResult) -> bool | None:
        """Fold one check in; True: it came up by this, False: it went down, None: neither."""
        now = self._clock()
        self.version = result.version or self.version
        self.last_error = "" if result.ok else result.error
        self._connected = result.connected
        flip = self._judge(ok=result.ok)
        if flip is not None:
            self.state, self.since, self._streak = "up" if flip else "down", now, 0
        coming_up = result.ok and self.state == "down"
        self._due_at = now + (COMING_UP_S if coming_up else self._pause_s())
        return flip

    def configure(self, interval_s: float, fall: int, rise: int) -> None:
        """Take new settings over; what was seen so far still counts."""
        self._interval_s, self._fall, self._rise = interval_s, fall, rise
        self._due_at = min(self._due_at, self._clock() + self._pause_s())

    def _judge(self, *, ok: bool) -> bool | None:
        if self.state == "unknown":
            return ok
        if ok is self.up:
            self._streak = 0
            return None
        self._streak += 1
        return ok if self._streak >= (self._rise if ok else self._fall) else None

    def _pause_s(self) -> float:
        return self._interval_s * self._rng.uniform(1 - JITTER, 1 + JITTER)
