"""What the rounds of a benchmark come to: medians, quartiles, ratios, what a proxy adds."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol

BASE = "nginx"
NONE = math.nan


class Sampled(Protocol):
    """One proxy in one round of one scenario."""

    @property
    def scenario(self) -> str:
        """Its name."""

    @property
    def peer(self) -> str:
        """The proxy's."""

    @property
    def round(self) -> int:
        """Which."""

    @property
    def figures(self) -> Mapping[str, float]:
        """By name, the unit at its end."""

    @property
    def errors(self) -> Mapping[str, int]:
        """How many, by kind."""


class Results:
    """All samples of a run; a figure that nobody measured is not a number."""

    def __init__(self, samples: Sequence[Sampled]) -> None:
        self.samples = samples
        self.scenarios = list(dict.fromkeys(sample.scenario for sample in samples))
        self._by: dict[tuple[str, str], dict[int, Sampled]] = defaultdict(dict)
        for sample in samples:
            self._by[sample.scenario, sample.peer][sample.round] = sample

    def has(self, scenario: str, peer: str) -> bool:
        """Whether that proxy took part."""
        return bool(self._by.get((scenario, peer)))

    def values(self, scenario: str, peer: str, figure: str) -> list[float]:
        """
        One value a round; a sample with errors measures nothing.

        Args:
            scenario: Its name.
            peer: The proxy's.
            figure: A figure's name; "added " before it: minus that of no proxy in the same round.
        """
        name = figure.removeprefix("added ")
        direct = self._by.get((scenario, "direct"), {})
        found = []
        for turn, sample in sorted(self._by.get((scenario, peer), {}).items()):
            value = NONE if sample.errors else sample.figures.get(name, NONE)
            if name != figure:
                value -= direct[turn].figures.get(name, NONE) if turn in direct else NONE
            if not math.isnan(value):
                found.append(value)
        return found

    def median(self, scenario: str, peer: str, figure: str) -> float:
        """Median of the rounds."""
        values = self.values(scenario, peer, figure)
        return statistics.median(values) if values else NONE

    def quartiles(self, scenario: str, peer: str, figure: str) -> tuple[float, float]:
        """First and third."""
        values = self.values(scenario, peer, figure)
        return quantile(values, 0.25), quantile(values, 0.75)

    def ratio(self, scenario: str, peer: str, figure: str, base: str = BASE) -> float:
        """Ratio of the medians; none where the base's lies in the noise, at or below zero."""
        below = self.median(scenario, base, figure)
        return self.median(scenario, peer, figure) / below if below > 0 else NONE

    def errors(self, scenario: str, peer: str) -> Counter[str]:
        """All of its rounds together."""
        found: Counter[str] = Counter()
        for sample in self._by.get((scenario, peer), {}).values():
            found.update(sample.errors)
        return found


def quantile(values: Sequence[float], share: float) -> float:
    """Quantile, between the ranks where it falls there."""
    if not values:
        return NONE
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
