"""Check results to up and down; when to check next."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from balancer.core.domain import CheckResult

JITTER: Final = 0.2
RISING_S: Final = 1.0


class Health:
    """Counts consecutive check results and tells flips."""

    def __init__(self, clock: Callable[[], float], rng: random.Random, interval_s: float, fall: int, rise: int) -> None:
        self._clock, self._rng = clock, rng
        self.configure(interval_s, fall, rise)
        self.state = "unknown"
        self.last_error = ""
        self.since = clock()
        self._good = self._bad = 0
        self._next_at = clock()
        self._connected = True

    def configure(self, interval_s: float, fall: int, rise: int) -> None:
        self._interval_s, self._fall, self._rise = interval_s, fall, rise

    @property
    def up(self) -> bool:
        return self.state == "up"

    @property
    def hard_down(self) -> bool:
        return self.state == "down" and not self._connected

    def due_in(self) -> float:
        return max(0.0, self._next_at - self._clock())

    def observe(self, result: CheckResult) -> bool | None:
        now = self._clock()
        self._connected = result.connected
        self.last_error = result.error
        if result.ok:
            self._good, self._bad = self._good + 1, 0
        else:
            self._good, self._bad = 0, self._bad + 1
        flip = None
        if self.state == "unknown":
            flip = result.ok
        elif self.state == "down" and self._good >= self._rise:
            flip = True
        elif self.state == "up" and self._bad >= self._fall:
            flip = False
        if flip is not None:
            self.state, self.since = ("up" if flip else "down"), now
        wait = self._interval_s * (1 + self._rng.uniform(-JITTER, JITTER))
        if self.state == "down" and self._good:
            wait = min(wait, RISING_S)
        self._next_at = now + wait
        return flip
