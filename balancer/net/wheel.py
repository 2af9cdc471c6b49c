"""
One timer for all that is under way, instead of one for each.

Whoever is watched tells when its limit passes, if nothing moves until then. The timer is set to the
earliest of these; what has moved meanwhile tells a later one when it fires.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Final, Protocol

GRAIN_S: Final = 0.25  # between two rounds; so late a limit may be noticed


class Timed(Protocol):
    """What has a limit."""

    def due(self) -> float:
        """When its limit passes, on the loop's clock; inf: never."""

    def expire(self) -> None:
        """It has passed."""


class Wheel:
    """
    The watched and their timer. A loop in which nothing has a limit has no timer.

    Who comes under an earlier limit than it had says so with `by`; a later one needs no word.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watched: set[Timed] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._at = math.inf

    def __len__(self) -> int:
        return len(self._watched)

    def __iter__(self) -> Iterator[Timed]:
        """Those watched now; they may come and go meanwhile."""
        return iter(tuple(self._watched))

    def add(self, timed: Timed) -> None:
        """Watch it."""
        self._watched.add(timed)

    def discard(self, timed: Timed) -> None:
        """Watch it no more."""
        self._watched.discard(timed)

    def by(self, at: float) -> None:
        """Somebody's limit passes then."""
        if at < self._at:
            self._set(at)

    def close(self) -> None:
        """No timer any more."""
        self._set(math.inf)

    def _set(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._at = at
        self._timer = None if math.isinf(at) else self._loop.call_at(at, self._turn)

    def _turn(self) -> None:
        now = self._loop.time()
        self._timer, self._at = None, math.inf
        nearest = now  # where a bug ends the round, the next one looks at the rest
        try:
            nearest = self._round(now)
        finally:
            if not math.isinf(nearest):
                self.by(max(nearest, now + GRAIN_S))

    def _round(self, now: float) -> float:
        """Look at all; when the next limit passes."""
        nearest = math.inf
        for timed in self:
            at = timed.due()
            if at <= now:
                timed.expire()
            elif at < nearest:
                nearest = at
        return nearest
