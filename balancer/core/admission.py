"""How many calls may wait, and when the next may be worth a try."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from balancer.core.errors import QueueFull, WaitTooLong


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """
    Bounds on waiting: calls in all, calls per model, seconds.

    Args:
        adaptive: Who would wait too long is told at once.
    """

    max_depth: int = 512
    max_depth_per_model: int = 64
    max_wait_s: float = 120.0
    adaptive: bool = True


def too_long(wait_s: float, max_wait_s: float, left_s: float, chance: float) -> WaitTooLong | None:
    """
    What a call is refused with that would hardly get a slot in time; None: it may well.

    Args:
        wait_s: How long it would wait, estimated.
        left_s: Until its own deadline; inf: it has none.
        chance: 0..1, by which some come back sooner and some later.
    """
    if wait_s <= min(max_wait_s, left_s):
        return None
    retry_s = math.inf if math.isinf(wait_s) else (wait_s - max_wait_s / 2) * (0.75 + chance / 2)
    retry_s = min(60.0, max(1.0, retry_s))
    limit = "queue.max_wait" if max_wait_s <= left_s else "its own time limit"
    error = WaitTooLong(
        f"A slot would come free in about {_told(wait_s)}, and this call may wait only "
        f"{_told(min(max_wait_s, left_s))} ({limit}). Retry after {math.ceil(retry_s)} s.",
        retry_after_s=math.ceil(retry_s),
    )
    error.wait_s = wait_s
    return error


def _told(seconds: float) -> str:
    return "an hour or more" if seconds >= 3600.0 else f"{max(0.0, seconds):.0f} s"


class Admission:
    """
    Counts who waits, and how fast the queue drains.

    A refusal carries a Retry-After from the drain rate of the last minute, so that clients come
    back when there is likely to be room.

    Args:
        chance: 0..1.

    Attributes:
        refused: How often, by why: max_depth, max_depth_per_model, wait.
    """

    WINDOW_S = 60.0

    def __init__(
        self,
        limits: QueueLimits,
        clock: Callable[[], float],
        chance: Callable[[], float] = lambda: 0.5,
    ) -> None:
        self.limits = limits
        self.refused: dict[str, int] = {}
        self._chance = chance
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

    def check(self, model: str, *, asked: bool = True) -> None:
        """
        Raise QueueFull if one more call for *model* may not wait.

        Args:
            asked: There is such a call; else nobody is refused, and nothing counted.

        Raises:
            QueueFull: With the depth, and when to come back.
        """
        limit = self.limit(model)
        if limit:
            raise self.full(model, limit, asked=asked)

    def limit(self, model: str) -> str:
        """Which limit keeps one more call for *model* out; empty: none does."""
        if self._waiting[model] >= self.limits.max_depth_per_model:
            return "max_depth_per_model"
        return "max_depth" if self.is_full() else ""

    def full(
        self, model: str, limit: str, *, asked: bool = True, gives_way: bool = False
    ) -> QueueFull:
        """
        What a call is refused with that this *limit* keeps out.

        Args:
            asked: As for `check`.
            gives_way: It was in, and another caller, who has fewer there, takes its place.
        """
        whom, depth = "", self.depth
        if limit == "max_depth_per_model":
            whom, depth = " for this model", self._waiting[model]
        wait_s = self.drain_s(depth)
        retry_s = min(60.0, max(1.0, wait_s / 2))
        why = " The most are of one caller, this one too; other callers have fewer." * gives_way
        error = QueueFull(
            f"Queue full: {depth} calls wait{whom}, about {wait_s:.0f} s.{why} Retry after "
            f"{retry_s:.0f} s, or ask the operator to raise queue.{limit}.",
            retry_after_s=retry_s,
        )
        error.wait_s = wait_s
        if asked:
            self._count(limit)
        return error

    def check_wait(self, wait_s: float, left_s: float) -> None:
        """
        Raise WaitTooLong if a call that would wait so long need not even begin.

        Args:
            wait_s: Estimated.
            left_s: Until the call's own deadline.
        """
        limits = self.limits
        if limits.adaptive and limits.max_wait_s:
            error = too_long(wait_s, limits.max_wait_s, left_s, self._chance())
            if error is not None:
                self._count("wait")
                raise error

    def _count(self, why: str) -> None:
        self.refused[why] = self.refused.get(why, 0) + 1

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
