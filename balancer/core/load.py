"""temporary"""
from __future__ import annotations
import math
from collections import Counter
from collections.abc import Callable

class Load:
    def __init__(self, clock: Callable[[], float], configured: int | None = None) -> None:
        self._clock = clock
        self.configured = configured
        self._n: Counter[str] = Counter()
        self._ewma: dict[str | None, float] = {}
        self._cool: dict[str | None, tuple[float, int]] = {}
        self._ramp_at = -1e9

    def enter(self, m: str) -> None:
        self._n[m] += 1

    def leave(self, m: str) -> None:
        self._n[m] -= 1
        if not self._n[m]:
            del self._n[m]

    def counts(self) -> dict[str, int]:
        return dict(self._n)

    def in_flight(self, m: str | None = None) -> int:
        return self._n.total() if m is None else self._n[m]

    def slots(self, m: str) -> int:
        s = self.configured or 2
        share = min(1.0, (self._clock() - self._ramp_at) / 30)
        return max(1, int(s * share))

    def start_ramp(self) -> None:
        self._ramp_at = self._clock()

    def note_first_byte(self, m: str, s: float) -> None:
        for k in (m, None):
            old = self._ewma.get(k, s)
            self._ewma[k] = s if s > old else old + 0.2 * (s - old)

    def first_byte_s(self, m: str | None) -> float:
        return self._ewma.get(m, 0.0)

    def note_busy(self, m: str | None, retry_after_s: float | None = None) -> None:
        until, n = self._cool.get(m, (0.0, 0))
        wait = min(60.0, retry_after_s) if retry_after_s else min(8.0, 2.0**n)
        self._cool[m] = (self._clock() + wait, n + 1)

    def note_ok(self, m: str) -> None:
        self._cool.pop(m, None)

    def cooling_s(self, m: str | None) -> float:
        now = self._clock()
        return max(0.0, max((self._cool.get(k, (0.0, 0))[0] for k in (m, None)), default=0.0) - now)

    def next_change_s(self) -> float:
        now = self._clock()
        waits = [u - now for u, _ in self._cool.values() if u > now]
        if now - self._ramp_at < 30:
            waits.append(1.0)
        return min(waits, default=math.inf)
