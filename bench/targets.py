"""What the data plane is to reach, and whether it did."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from figures import Results
from tables import heading, number, table

OURS = "ours"
BARE = "ours-bare"


@dataclass(frozen=True, slots=True)
class Target:
    """A figure of ours and its limit."""

    text: str
    read: Callable[[Results], float]
    limit: float
    unit: str
    at_least: bool = False

    def row(self, results: Results) -> list[str]:
        """Text, limit, value and verdict."""
        value = self.read(results)
        sign = "≥" if self.at_least else "≤"
        met = value >= self.limit if self.at_least else value <= self.limit
        verdict = "not measured" if math.isnan(value) else "met" if met else "MISSED"
        goal = f"{sign} {self.limit:g} {self.unit}"
        return [self.text, goal, f"{number(value)} {self.unit}", verdict]


def _against(
    text: str,
    scenario: str,
    figure: str,
    limit: float,
    base: str = "nginx",
    *,
    at_least: bool = False,
) -> Target:
    def read(results: Results) -> float:
        return results.ratio(scenario, OURS, figure, base)

    return Target(text, read, limit, f"× {base}", at_least)


def _speed(text: str, scenario: str, limit: float, base: str = "nginx") -> Target:
    return _against(text, scenario, "per_core_s", limit, base, at_least=True)


def _plain(text: str, scenario: str, figure: str, limit: float, unit: str) -> Target:
    return Target(text, lambda results: results.median(scenario, OURS, figure), limit, unit)


def _lost(text: str, scenario: str) -> Target:
    def read(results: Results) -> float:
        known = results.has(scenario, OURS)
        return results.errors(scenario, OURS).total() if known else math.nan

    return Target(text, read, 0, "errors")


def _chores(text: str, scenario: str) -> Target:
    """CPU of everything on, beyond that of the bare relay."""

    def read(results: Results) -> float:
        return 100 * (results.ratio(scenario, OURS, "cpu_us", BARE) - 1)

    return Target(text, read, 25, "%")


TARGETS = (
    _speed("Chunks per core-second, 100 streams of 50/s", "streams100", 0.85),
    _speed("", "streams100", 1.0, "go"),
    _speed("Chunks per core-second, 400 streams of 50/s", "streams400", 0.85),
    _speed("", "streams400", 1.0, "go"),
    _speed("2 kB chats per core-second, as many as there can be", "chat", 0.25),
    _speed("2 kB chats per core-second, 1,000 calls/s", "chat1000", 0.25),
    _speed("GET /api/tags from the catalogue, as many as there can be", "tags", 0.40),
    _speed("GET /api/tags from the catalogue, 1,000 calls/s", "tags1000", 0.40),
    _against("Added TTFB at 100 arrivals/s, p50", "ttfb", "added ttfb_p50_us", 2.5),
    _against("Added delay p99, real-time priority", "delay", "added delay_p99_us", 1.5),
    _plain("Memory of an idle stream", "idle", "stream_kib", 20, "KiB"),
    _against("2,000 streams: added delay p99", "many2000", "added delay_p99_us", 2.0),
    _lost("2,000 streams: lost", "many2000"),
    _lost("5,000 streams: lost", "many5000"),
    _plain("Abort reaches the backend, streaming, p99", "abort", "abort_p99_ms", 50, "ms"),
    _plain("Abort reaches the backend, silent, p99", "abort-idle", "abort_p99_ms", 50, "ms"),
    _plain("Abort beside 400 streams, p99", "abort-load", "abort_p99_ms", 250, "ms"),
    _speed("20 MB uploads, MB per core-second", "upload", 0.5),
    _chores("Everything on against the bare relay, chat", "chat"),
    _chores("Everything on against the bare relay, chunks", "streams400"),
)


def targets_table(results: Results, *, markdown: bool) -> Iterator[str]:
    """Every target, whether it is met or was not measured."""
    yield from heading("Targets", markdown=markdown)
    rows = [target.row(results) for target in TARGETS]
    yield from table(["", "target", "measured", ""], rows, markdown=markdown, texts=4)
