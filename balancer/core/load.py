"""
Load of one backend: calls in flight, how many it takes, how fast it answers, and when to let it be.

Models are canonical names. Where a model may be None, it means the whole backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from balancer.core.slots import SlotBelief

HALF_LIFE_S: Final = 10.0
FADE_S: Final = 60.0  # in which half of what was believed of an unused backend is forgotten
COOL_OFF_S: Final = (1.0, 2.0, 4.0, 8.0)
MAX_RETRY_AFTER_S: Final = 60.0
RAMP_S: Final = 30.0
# Timers fire a little early, and so small a sum may not move a clock: such a wait is over.
OVER_S: Final = 1e-6


class PeakEwma:
    """
    An estimate that believes bad news at once and good news slowly.

    Source:
        Peak-EWMA, after Finagle's balancer and tower's ``load::PeakEwma``.
    """

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._at = 0.0
        self.value = 0.0

    def observe(self, sample: float, now: float) -> None:
        """
        Fold one sample in.

        A sample above the estimate replaces it at once; one below draws it down with the half-life,
        by the time since the last sample. The first sample becomes the estimate.

        Raises:
            ValueError: *sample* is negative or not finite.
        """
        if not math.isfinite(sample) or sample < 0:
            raise ValueError(f"a sample must be finite and not negative, not {sample}")
        excess = max(0.0, self.value - sample)
        self.value = sample + excess * 0.5 ** ((now - self._at) / self._half_life_s)
        self._at = now

    def faded(self, now: float) -> float:
        """
        The estimate as it is worth by now.

        Without a sample it fades: who is avoided for bad news would otherwise never bring good.
        """
        since_s = now - self._at
        return self.value * math.pow(0.5, since_s / FADE_S) if since_s > 0.0 else self.value


@dataclass(slots=True)
class _Rest:
    """A cool-off: which step comes next, and until when the last one lasts."""

    level: int = 0
    until: float = 0.0


class Load:
    """
    What runs on one backend and what it can take.

    Args:
        configured: Slots per model, None: not known.
        half_life_s: Of the estimate of time to first byte.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        configured: int | None = None,
        *,
        half_life_s: float = HALF_LIFE_S,
    ) -> None:
        self.belief = SlotBelief(configured)
        self._clock = clock
        self._half_life_s = half_life_s
        self._in_flight: dict[str, int] = {}
        self._total = 0
        self._first_byte: dict[str, PeakEwma] = {}
        self._rests: dict[str | None, _Rest] = {}
        self._ramp_from = -math.inf

    # -- in flight and slots -------------------------------------------------------------------

    def enter(self, model: str) -> None:
        """A call begins."""
        self._in_flight[model] = self._in_flight.get(model, 0) + 1
        self._total += 1

    def leave(self, model: str) -> None:
        """A call has ended. Raises ValueError if none was in flight."""
        count = self._in_flight.get(model)
        if not count:
            raise ValueError(f"no call on {model!r} is in flight")
        self._total -= 1
        if count > 1:
            self._in_flight[model] = count - 1
        else:
            del self._in_flight[model]

    def in_flight(self, model: str | None = None) -> int:
        """Calls that run, on one model or in all."""
        return self._total if model is None else self._in_flight.get(model, 0)

    def look(self, model: str, now: float) -> tuple[int, int, int, float]:
        """Calls in flight on *model* and in all, slots, time to first byte: of each in one go."""
        ewma = self._first_byte.get(model)
        return (
            self._in_flight.get(model, 0),
            self._total,
            self.slots(model),
            0.0 if ewma is None else ewma.faded(now),
        )

    def counts(self) -> dict[str, int]:
        """Calls that run, by model."""
        return dict(self._in_flight)

    @property
    def configured(self) -> int | None:
        """Slots per model, None: not known."""
        return self.belief.configured

    @configured.setter
    def configured(self, slots: int | None) -> None:
        self.belief.configured = slots

    def slots(self, model: str) -> int:
        """Calls at once that *model* is believed to take; fewer while the backend warms up."""
        if self._ramp_from == -math.inf:
            return self.belief.believed(model)
        return self._ramped(self._clock() - self._ramp_from, self.belief.believed(model))

    def start_ramp(self) -> None:
        """It has just recovered: one slot now, all of them after half a minute, linearly."""
        self._ramp_from = self._clock()

    @staticmethod
    def _ramped(passed_s: float, full: int) -> int:
        if passed_s >= RAMP_S - OVER_S:
            return full
        return 1 + math.floor((full - 1) * (passed_s + OVER_S) / RAMP_S)

    # -- speed ---------------------------------------------------------------------------------

    def note_first_byte(self, model: str, first_byte_s: float, *, alone: bool = True) -> None:
        """
        Fold one time to first byte in, in seconds from request sent; of a loaded model only.

        Args:
            alone: No other call ran here when this one began. Beside others it may have waited for
                them: then it can show that the backend is quicker than thought, never slower.
        """
        ewma = self._first_byte.get(model)
        if ewma is None:
            ewma = self._first_byte[model] = PeakEwma(self._half_life_s)
        elif not alone:
            first_byte_s = min(first_byte_s, ewma.value)
        ewma.observe(first_byte_s, self._clock())

    def first_byte_s(self, model: str | None) -> float:
        """Estimated time to first byte, of the slowest model if None; 0: nothing known."""
        now = self._clock()
        if model is None:
            return max((ewma.faded(now) for ewma in self._first_byte.values()), default=0.0)
        ewma = self._first_byte.get(model)
        return 0.0 if ewma is None else ewma.faded(now)

    # -- saturation ----------------------------------------------------------------------------

    def note_busy(self, model: str | None, retry_after_s: float | None = None) -> None:
        """
        It refused a call: let it be for 1, 2, 4, then 8 s, or as long as it asks for, up to 60 s.

        Refusals that come while it is cooling off anyway do not lengthen the next one.
        """
        now = self._clock()
        rest = self._rests.setdefault(model, _Rest())
        if not self._left_s(model, now):
            rest.until = now + COOL_OFF_S[rest.level]
            rest.level = min(rest.level + 1, len(COOL_OFF_S) - 1)
        if retry_after_s is not None:
            rest.until = max(rest.until, now + min(retry_after_s, MAX_RETRY_AFTER_S))

    def note_ok(self, model: str) -> None:
        """It answered: the next cool-off is one step shorter. One under way runs its time."""
        if not self._rests:
            return
        for key in (None, model):
            rest = self._rests.get(key)
            if rest is not None:
                rest.level = max(0, rest.level - 1)
                if not rest.level and not self._left_s(key, self._clock()):
                    del self._rests[key]  # as if it had never been

    @property
    def is_resting(self) -> bool:
        """Whether it is cooling off, or did of late: then time alone changes `cooling_s`."""
        return bool(self._rests)

    def cooling_s(self, model: str | None) -> float:
        """Seconds it is still to be left alone, the longest of any model if None; 0: it is not."""
        if not self._rests:
            return 0.0
        now = self._clock()
        keys = (None, model) if model is not None else tuple(self._rests)
        return max((self._left_s(key, now) for key in keys), default=0.0)

    def _left_s(self, key: str | None, now: float) -> float:
        left_s = self._rests[key].until - now if key in self._rests else 0.0
        return left_s if left_s > OVER_S else 0.0

    # -- time ----------------------------------------------------------------------------------

    @property
    def is_changing(self) -> bool:
        """Whether time alone may allow more here."""
        return bool(self._rests) or self._ramp_from != -math.inf

    def next_change_s(self) -> float:
        """Seconds until time alone allows more here: a cool-off ends, a slot is added; or inf."""
        now = self._clock()
        rests = (self._left_s(key, now) for key in self._rests)
        return min([self._next_slot_s(now), *(left_s for left_s in rests if left_s)])

    def _next_slot_s(self, now: float) -> float:
        passed_s, waits = now - self._ramp_from, []
        for full in self.belief.counts:
            slots = self._ramped(passed_s, full)
            if slots < full:
                waits.append(RAMP_S * slots / (full - 1) - passed_s)
        return min(waits, default=math.inf)
