"""How long answers get, and how much of one that is under way is still to come; in tokens."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, Final

from balancer.core.speeds import ignore

UNKNOWN: Final = 200.0
TRUSTED: Final = 8  # samples of a key's own
EDGES: Final = tuple(math.floor(4 * 1.35**i) for i in range(28))
HALVED_AT: Final = 2000
REBUILT_EVERY: Final = 20
LONGEST: Final = 1_000_000
MOST_MODELS: Final = 1000
MOST_PAIRS: Final = 2000  # of model and key

_BINS: Final = len(EDGES) + 1  # the last one is open


class _Histogram:
    """Lengths seen, by geometric bins; what is old fades."""

    __slots__ = ("_fresh", "_tails", "counts", "sums", "total", "weight")

    def __init__(self) -> None:
        self.counts = array("d", bytes(8 * _BINS))
        self.sums = array("d", bytes(8 * _BINS))
        self.weight = self.total = 0.0
        self._tails: list[tuple[float, float]] = []
        self._fresh = 0

    def add(self, tokens: int) -> None:
        place = bisect_left(EDGES, tokens)
        self.counts[place] += 1.0
        self.sums[place] += tokens
        self.weight += 1.0
        self.total += tokens
        self._fresh += 1
        if self.weight > HALVED_AT:
            self.counts = array("d", (count / 2 for count in self.counts))
            self.sums = array("d", (each / 2 for each in self.sums))
            self.settle()

    def settle(self) -> None:
        """Add up anew: sums kept by adding would drift."""
        self.weight, self.total = math.fsum(self.counts), math.fsum(self.sums)
        self._tails = []

    def left(self, got: float) -> float:
        """The mean of what lies beyond *got*, were it cut there."""
        if not self._tails or self._fresh >= min(REBUILT_EVERY, 1 + self.weight // 8):
            self._rebuild()
        n, beyond = self._tails[bisect_left(EDGES, got)]
        if n < 0.5:
            return max(20.0, 0.3 * got)
        return max(4.0, beyond / n - got)

    def _rebuild(self) -> None:
        """For each bin, count and sum of those behind it and half of its own."""
        tails = zip(_suffixes(self.counts), _suffixes(self.sums), strict=True)
        self._tails = [
            (n - count / 2, s - each / 2)
            for (n, s), count, each in zip(tails, self.counts, self.sums, strict=True)
        ]
        self._fresh = 0


class Lengths:
    """
    Lengths of answers, by model and by who asked.

    Args:
        discarded: Told kind and value of the first sample that was beyond belief.
    """

    def __init__(self, *, discarded: Callable[[str, float], None] = ignore) -> None:
        self._discarded: Callable[[str, float], None] | None = discarded
        self._models: dict[str, _Histogram] = {}
        self._pairs: dict[tuple[str, str], _Histogram] = {}

    def learn(self, model: str, who: str, tokens: int) -> None:
        """An answer came to its own end; not of embeddings, which have none."""
        if not 1 <= tokens <= LONGEST:
            return self._discard(tokens)
        _latest(self._models, model, MOST_MODELS).add(tokens)
        _latest(self._pairs, (model, who), MOST_PAIRS).add(tokens)
        return None

    def mean(self, model: str, who: str) -> float:
        """What an answer is expected to be long, before its first token."""
        histogram = self._of(model, who)
        return UNKNOWN if histogram is None else histogram.total / histogram.weight

    def left(self, model: str, who: str, got: float) -> float:
        """
        What is expected to come behind *got* tokens.

        The more came already, the longer it may still be: that of the mean is left is not so.
        """
        histogram = self._of(model, who)
        if histogram is None:
            return max(UNKNOWN - got, 20.0, 0.3 * got)
        return histogram.left(got)

    def _of(self, model: str, who: str) -> _Histogram | None:
        own = self._pairs.get((model, who))
        if own is not None and own.weight >= TRUSTED:
            return own
        return self._models.get(model)

    def _discard(self, value: float) -> None:
        if self._discarded is not None:
            self._discarded("length", value)
            self._discarded = None

    def dump(self) -> dict[str, Any]:
        """What was learned of models, as plain JSON; who asked is nobody else's business."""
        return {
            model: {"counts": list(each.counts), "sums": list(each.sums)}
            for model, each in self._models.items()
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take up what `dump` gave, but for what cannot be."""
        for model, row in list(kept.items())[-MOST_MODELS:]:
            histogram = _restored(row)
            if histogram is None:
                self._discard(math.nan)
            else:
                self._models[model] = histogram


def _latest(table: dict[Any, _Histogram], key: Any, most: int) -> _Histogram:
    """The histogram of *key*, made if need be at the cost of the one unused for longest."""
    histogram = table.pop(key, None) or _Histogram()
    table[key] = histogram
    if len(table) > most:
        del table[next(iter(table))]
    return histogram


def _suffixes(values: array[float]) -> list[float]:
    return list(accumulate(reversed(values)))[::-1]


def _restored(row: Any) -> _Histogram | None:
    """None: it is no histogram."""
    try:
        histogram = _Histogram()
        histogram.counts, histogram.sums = array("d", row["counts"]), array("d", row["sums"])
        histogram.settle()
    except (KeyError, TypeError, OverflowError, ValueError):
        return None
    lows = (1, *(edge + 1 for edge in EDGES))
    bins = zip(histogram.counts, histogram.sums, lows, (*EDGES, LONGEST), strict=False)
    fit = all(
        count >= 0 and low * count * 0.999 <= each <= high * count * 1.001
        for count, each, low, high in bins
    )
    whole = len(histogram.counts) == len(histogram.sums) == _BINS
    return histogram if whole and fit and 0 < histogram.weight <= HALVED_AT else None
