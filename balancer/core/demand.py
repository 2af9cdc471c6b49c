"""How often each placement key is asked for: a short memory and a long one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from balancer.core.domain import PlacementKey

NEGLIGIBLE: Final = 0.01  # arrivals expected within the long memory
LEAST_HEARD: Final = 0.05  # of a memory, before which its rates are not set right in full
MOST_KEYS: Final = 4000  # clients choose options, so there is no end of keys
MOST_PER_S: Final = 1e6


class Demand:
    """
    Arrival rates, in calls per second.

    Args:
        fast_s, slow_s: In which all but a third of the past is forgotten.
    """

    def __init__(self, fast_s: float = 120.0, slow_s: float = 1800.0) -> None:
        if not (fast_s > 0 and slow_s > 0):
            raise ValueError(f"memories must be positive, not {fast_s} and {slow_s} s")
        self.fast_s, self.slow_s = fast_s, slow_s
        self._rates: dict[PlacementKey, tuple[float, float, float]] = {}  # at, fast, slow
        self._since: float | None = None  # the first arrival of all; -inf: before our time
        self._until_sweep = 1

    def arrived(self, key: PlacementKey, now: float) -> None:
        """A call for it has come."""
        if self._since is None:
            self._since = now
        fast_s, slow_s = self.fast_s, self.slow_s
        at, fast, slow = self._rates.pop(key, (now, 0.0, 0.0))  # the order: the last arrival
        ago_s = at - now if at < now else 0.0
        fast = fast * math.exp(ago_s / fast_s) + 1.0 / fast_s
        slow = slow * math.exp(ago_s / slow_s) + 1.0 / slow_s
        self._rates[key] = (now, fast, slow)
        self._until_sweep -= 1
        if self._until_sweep <= 0:
            self._sweep(now)

    def fast(self, key: PlacementKey, now: float) -> float:
        """Calls per second, of late."""
        rates = self._rates.get(key)
        if rates is None:
            return 0.0
        return rates[1] * self._kept(rates[0], now, self.fast_s)

    def recent(self, key: PlacementKey, now: float) -> float:
        """Calls of late, counted: a single one is one, however short the time since the start."""
        rates = self._rates.get(key)
        if rates is None:
            return 0.0
        return rates[1] * self.fast_s * math.exp(min(rates[0] - now, 0.0) / self.fast_s)

    def slow(self, key: PlacementKey, now: float) -> float:
        """Calls per second, in the long run."""
        rates = self._rates.get(key)
        if rates is None:
            return 0.0
        return rates[2] * self._kept(rates[0], now, self.slow_s)

    def _kept(self, at: float, now: float, memory_s: float) -> float:
        """
        What is left by now of a rate known *at*, set right for a memory that is not full yet.

        Nothing came before the first arrival because nobody listened: a rate that fills up slowly
        would take what is wanted all day for something rare.
        """
        heard_s = now - (now if self._since is None else self._since)
        filled = 1.0 - math.exp(-max(heard_s, LEAST_HEARD * memory_s) / memory_s)
        return math.exp(min(at - now, 0.0) / memory_s) / filled

    def forget(self, model: str) -> None:
        """Nobody has asked for it, with whatever options."""
        for key in [key for key in self._rates if key.model == model]:
            del self._rates[key]

    def keys(self) -> tuple[PlacementKey, ...]:
        """What is asked for at all, the latest last."""
        return tuple(self._rates)

    def _sweep(self, now: float) -> None:
        """Forget what nobody wants; each key is looked at once per arrival, in the mean."""
        least = NEGLIGIBLE / self.slow_s
        for key in [key for key in self._rates if self.slow(key, now) < least]:
            del self._rates[key]
        for key in list(self._rates)[: max(0, len(self._rates) - MOST_KEYS)]:
            del self._rates[key]
        self._until_sweep = max(64, len(self._rates) // 2)

    def dump(self, now: float) -> dict[str, Any]:
        """The rates as they are *now*, as plain JSON; not of what nobody wants any more."""
        return {
            "rates": [
                [model, [list(each) for each in options], self.fast(key, now), self.slow(key, now)]
                for key in self._rates
                for model, options in (key,)
                if self.slow(key, now) >= NEGLIGIBLE / self.slow_s
            ]
        }

    def add(self, other: Demand, now: float) -> None:
        """Count as heard here what another has."""
        keys, pair = dict.fromkeys((*self.keys(), *other.keys())), (self, other)
        self._rates = {
            key: (now, sum(d.fast(key, now) for d in pair), sum(d.slow(key, now) for d in pair))
            for key in keys
        }
        self._since = -math.inf
        self._sweep(now)

    def restore(
        self, kept: Mapping[str, Any], now: float, age_s: float, share: float = 1.0
    ) -> None:
        """
        Take up what `dump` gave *age_s* ago, but for what cannot be.

        Args:
            share: Of the calls, that will come here.
        """
        rows = kept.get("rates")
        for row in rows[-MOST_KEYS:] if isinstance(rows, list) else ():
            try:
                model, options, fast, slow = row
                key = PlacementKey(model, tuple((name, value) for name, value in options))
                fit = 0 <= fast <= MOST_PER_S and 0 <= slow <= MOST_PER_S
                hash(key)
            except (TypeError, ValueError):
                continue
            if fit and isinstance(model, str):
                self._rates[key] = (now - max(0.0, age_s), fast * share, slow * share)
                self._since = -math.inf
        self._sweep(now)
