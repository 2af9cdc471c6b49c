"""How many calls may wait, and when the next may be worth a try."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from balancer.core.errors import QueueFull


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds on waiting: calls in all, calls per model, seconds."""

    max_depth: int = 512
    max_depth_per_model: int = 64
    max_wait_s: float = 120.0


class Admission:
    """
    Counts who waits, and how fast the queue drains.

    A refusal carries a Retry-After from the drain rate of the last minute, so that clients come
    back when there is likely to be room.
    """

    WINDOW_S = 60.0

    def __init__(self, limits: QueueLimits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self._clock = clock
        self._waiting: Counter[str] = Counter()
        self._left: deque[float] = deque(maxlen=1024)

    @property
    def depth(self) -> int:
        """Calls that wait in all."""
        return self._waiting.total()

    def depths(self) -> dict[str, int]:
        """Calls that wait, by canonical model name."""
        return {model: n for model, n in self._waiting.items() if n}

    def is_full(self) -> bool:
        """Whether nobody at all may come in."""
        return self.depth >= self.limits.max_depth

    def check(self, model: str) -> None:
        """
        Raise QueueFull if one more call for *model* may not wait.

        Raises:
            QueueFull: With the depth, and when to come back.
        """
        mine = self._waiting[model]
        if mine >= self.limits.max_depth_per_model:
            key, depth = "queue.max_depth_per_model", mine
        elif self.is_full():
            key, depth = "queue.max_depth", self.depth
        else:
            return
        wait_s = self.drain_s(depth)
        whom = "" if key == "queue.max_depth" else " for this model"
        retry_s = min(60.0, max(1.0, wait_s / 2))
        text = (
            f"Queue full: {depth} calls wait{whom}, about {wait_s:.0f} s. Retry after "
            f"{retry_s:.0f} s, or ask the operator to raise {key}."
        )
        raise QueueFull(text, retry_after_s=retry_s)

    def entered(self, model: str) -> None:
        """One more waits."""
        self._waiting[model] += 1

    def left(self, model: str) -> None:
        """One waits no more."""
        self._waiting[model] -= 1
        if self._waiting[model] <= 0:
            del self._waiting[model]
        self.passed()

    def passed(self) -> None:
        """One went through; it may not even have waited."""
        self._left.append(self._clock())

    def drain_s(self, depth: int) -> float:
        """Seconds until *depth* calls have left, at the rate of the last minute; 1..600."""
        now = self._clock()
        recent = [at for at in self._left if at > now - self.WINDOW_S]
        if not recent:
            return 30.0
        rate = len(recent) / max(1.0, now - recent[0])
        return min(600.0, max(1.0, depth / rate))
