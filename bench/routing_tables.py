"""The tables of the scheduler's bench, for a terminal or in Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from routing_targets import Found, judged
from tables import heading, number, table

from balancer.sim.figures import GROUPS, RATIOS

COLUMNS: Final = (
    ("TTFT p50", "ttft_p50"),
    ("p99", "ttft_p99"),
    ("end-to-end p99", "e2e_p99"),
    ("goodput", "goodput"),
    ("loads/1,000", "loads"),
    ("lost", "lost"),
    ("cut", "cut"),
    ("cached", "cached"),
    ("Jain", "jain"),
)
PARTS: Final = COLUMNS[:4] + COLUMNS[5:7]
SHARES: Final = {"goodput", "cached", "jain"}


def _cell(figures: Mapping[str, float], name: str) -> str:
    value = figures.get(name)
    if value is None:
        return "–"
    return f"{value:.3f}" if name.rsplit(" ", maxsplit=1)[-1] in SHARES else number(value)


def workload_table(
    name: str, about: str, found: Mapping[str, Mapping[str, float]], *, markdown: bool
) -> Iterator[str]:
    """All policies on one workload, and its groups of calls where it has several."""
    yield from heading(name, markdown=markdown)
    yield about + ". Seconds."
    yield ""
    rows = [[policy, *(_cell(at, figure) for _, figure in COLUMNS)] for policy, at in found.items()]
    yield from table(["", *(title for title, _ in COLUMNS)], rows, markdown=markdown, texts=1)
    parts = [
        [group if not number else "", policy, *(_cell(at, f"{group} {f}") for _, f in PARTS)]
        for group in GROUPS
        for number, (policy, at) in enumerate(found.items())
        if f"{group} calls" in at
    ]
    if parts:
        yield ""
        heads = ["of these", "", *(title for title, _ in PARTS)]
        yield from table(heads, parts, markdown=markdown, texts=2)


def targets_table(found: Found, policy: str, *, markdown: bool) -> Iterator[str]:
    """What is to be reached, and what was; no line if nothing of it was measured."""
    rows = [
        [
            target.workload,
            target.text,
            f"{'≥' if target.is_least else '≤'} {number(target.bound)}",
            number(value),
            "met" if met else "MISSED",
        ]
        for target, value, met in judged(found, policy)
    ]
    if rows:
        yield from heading(f"Targets: {policy}", markdown=markdown)
        yield from table(["", "", "wanted", "found", ""], rows, markdown=markdown, texts=2)


def ratios_table(counts: Mapping[str, Sequence[int]], *, markdown: bool) -> Iterator[str]:
    """How often the first token took so many times as long as was predicted at the commit."""
    heads = ["", *(f"≤ {edge:g}" for edge in RATIOS), "more", "within 1.5 ×"]
    rows = []
    for name, bins in counts.items():
        total = sum(bins)
        if total:
            near = sum(
                count for count, edge in zip(bins, RATIOS, strict=False) if 0.67 < edge <= 1.5
            )
            rows.append([name, *(f"{count / total:.1%}" for count in [*bins, near])])
    if rows:
        yield from heading("Actual over predicted TTFT, from the commit", markdown=markdown)
        yield from table(heads, rows, markdown=markdown, texts=1)
