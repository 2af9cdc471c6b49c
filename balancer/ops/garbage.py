"""
How rarely Python looks for garbage that is held in cycles, and how long everything stands still
when it does.

A look at all objects stops every stream: with two thousand of them some 130,000 objects take 15 to
25 ms, and by Python's usual thresholds that happens again and again. A call leaves nothing in
cycles, so there is little to find. What exists when we begin is set aside for good; of the rest,
the young are looked at once there are 50,000 more (5 ms at most), and all of them hardly ever.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, Final

THRESHOLDS: Final = (50_000, 50, 50)
USUAL: Final = gc.get_threshold()


class Garbage:
    """
    Python's collector, steered by us.

    Args:
        paused: Told of each look: the generation (0, 1, 2) and the seconds. It is called from
            within any line of anybody's: it must not raise, nor add to what others look through.
    """

    def __init__(self, clock: Callable[[], float], paused: Callable[[int, float], None]) -> None:
        self._clock = clock
        self._paused = paused
        self._steers = False
        self._began_at: float | None = None

    def begin(self) -> None:
        """From now on collect seldom, and tell."""
        gc.freeze()
        self._steers = True
        gc.set_threshold(*THRESHOLDS)
        gc.callbacks.append(self._told)

    def end(self) -> None:
        """Give the collector its usual thresholds back; what was set aside stays so."""
        if self._steers:
            self._steers = False
            gc.callbacks.remove(self._told)
            gc.set_threshold(*USUAL)

    def _told(self, phase: str, info: Mapping[str, Any]) -> None:
        if phase == "start":
            self._began_at = self._clock()
        elif self._began_at is not None:
            self._paused(info["generation"], self._clock() - self._began_at)
            self._began_at = None
