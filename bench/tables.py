"""The tables of the data plane benchmark, for a terminal or in Markdown."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from figures import BASE, Results
from scenarios import SCENARIOS, Group

Cell = Callable[[Results, str, str], str]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a group's table."""

    title: str
    cell: Cell


def number(value: float) -> str:
    """Three digits or more; a dash where there is none."""
    if math.isnan(value):
        return "–"
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def _median(title: str, figure: str, scale: float = 1.0) -> Column:
    return Column(title, lambda found, *at: number(found.median(*at, figure) * scale))


def _added(title: str, figure: str) -> Column:
    """What a proxy adds; in brackets what there is without one."""

    def cell(found: Results, scenario: str, peer: str) -> str:
        if peer == "direct":
            return f"({number(found.median(scenario, peer, figure))})"
        return number(found.median(scenario, peer, f"added {figure}"))

    return Column(title, cell)


def _quartiles(figure: str, scale: float = 1.0) -> Column:
    def cell(found: Results, scenario: str, peer: str) -> str:
        low, high = found.quartiles(scenario, peer, figure)
        return (
            "–"
            if math.isnan(low) or low == high == 0
            else f"{number(low * scale)} … {number(high * scale)}"
        )

    return Column("quartiles", cell)


def _ratio(figure: str) -> Column:
    def cell(found: Results, scenario: str, peer: str) -> str:
        none = peer == "direct" and figure.startswith("added ")
        return "–" if none else number(found.ratio(scenario, peer, figure))

    return Column(f"× {BASE}", cell)


def _errors() -> Column:
    return Column("errors", lambda found, *at: str(found.errors(*at).total() or "–"))


_SPEED = (_quartiles("per_core_s"), _ratio("per_core_s"))
_COLUMNS: Mapping[Group, tuple[Column, ...]] = {
    Group.CALLS: (
        _median("calls (MB)/core-s", "per_core_s"),
        *_SPEED,
        _median("µs CPU", "cpu_us"),
        _median("cores used", "cores"),
    ),
    Group.STREAMS: (
        _median("chunks/core-s", "per_core_s"),
        *_SPEED,
        _median("µs CPU", "cpu_us"),
        _median("cores used", "cores"),
        _added("added delay p50, µs", "delay_p50_us"),
        _added("p99, µs", "delay_p99_us"),
        _ratio("added delay_p99_us"),
        _median("chunks/read", "chunks_per_read"),
    ),
    Group.TTFB: (
        _added("added TTFB p50, µs", "ttfb_p50_us"),
        _quartiles("added ttfb_p50_us"),
        _ratio("added ttfb_p50_us"),
        _added("p99, µs", "ttfb_p99_us"),
        _median("µs CPU", "cpu_us"),
    ),
    Group.DELAY: (
        _added("added delay p50, µs", "delay_p50_us"),
        _quartiles("added delay_p50_us"),
        _ratio("added delay_p50_us"),
        _added("p99, µs", "delay_p99_us"),
        _quartiles("added delay_p99_us"),
        _ratio("added delay_p99_us"),
        _median("chunks/read", "chunks_per_read"),
    ),
    Group.ABORTS: (
        _median("close to origin p50, ms", "abort_p50_ms"),
        _quartiles("abort_p50_ms"),
        _median("p99, ms", "abort_p99_ms"),
        _median("aborts", "aborts"),
        _median("never seen", "unseen"),
    ),
    Group.MEMORY: (
        _median("KiB per stream", "stream_kib"),
        _quartiles("stream_kib"),
        _ratio("stream_kib"),
    ),
}
_IN_SHORT = (
    *(
        (name, _ratio("per_core_s"))
        for name in ("tags", "chat", "chat50k", "churn", "upload", "streams100", "streams400")
    ),
    ("ttfb", _added("added TTFB p50, µs", "ttfb_p50_us")),
    ("delay", _added("added delay p99, µs", "delay_p99_us")),
    ("idle", _median("KiB per idle stream", "stream_kib")),
)


def group_table(
    group: Group, results: Results, names: Sequence[str], *, markdown: bool
) -> Iterator[str]:
    """All scenarios of a group that were measured, proxy by proxy; no line if there was none."""
    columns = (*_COLUMNS[group], _errors())
    rows = []
    for name in results.scenarios:
        if SCENARIOS[name].group is group:
            for at, peer in enumerate(peer for peer in names if results.has(name, peer)):
                cells = [column.cell(results, name, peer) for column in columns]
                rows.append(["" if at else name, peer, *cells])
    if rows:
        yield from heading(str(group), markdown=markdown)
        about = [row[0] for row in rows if row[0]]
        yield "; ".join(f"{name}: {SCENARIOS[name].about}" for name in about) + "."
        yield ""
        yield from table(["", "", *(c.title for c in columns)], rows, markdown=markdown, texts=2)


def short_table(results: Results, names: Sequence[str], *, markdown: bool) -> Iterator[str]:
    """One line a proxy."""
    chosen = [(name, column) for name, column in _IN_SHORT if name in results.scenarios]
    if chosen:
        heads = [name if "×" in column.title else column.title for name, column in chosen]
        rows = [
            [peer, *(column.cell(results, name, peer) for name, column in chosen)] for peer in names
        ]
        yield from heading(
            f"In short: calls, chunks, MB per core-second × {BASE}", markdown=markdown
        )
        yield from table(["", *heads], rows, markdown=markdown, texts=1)


def heading(text: str, *, markdown: bool) -> list[str]:
    """Return the lines of a heading."""
    return ["", f"### {text}", ""] if markdown else ["", text, "=" * len(text)]


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool, texts: int
) -> Iterator[str]:
    """
    Lines of a table.

    Args:
        heads: Titles of its columns.
        rows: Their cells.
        markdown: For a document instead of a terminal.
        texts: So many columns hold text and are set to the left; those of figures to the right.
    """
    widths = [max(len(row[at]) for row in (heads, *rows)) for at in range(len(heads))]
    left = [at < texts for at in range(len(heads))]
    for row in (heads, *rows):
        cells = [
            cell.ljust(width) if flush else cell.rjust(width)
            for cell, width, flush in zip(row, widths, left, strict=True)
        ]
        yield ("| " + " | ".join(cells) + " |") if markdown else "  ".join(cells).rstrip()
        if row is heads:
            rules = [
                "-" * width if flush else "-" * (width - 1) + ":"
                for width, flush in zip(widths, left, strict=True)
            ]
            yield (
                ("| " + " | ".join(rules) + " |")
                if markdown
                else "-" * (sum(widths) + 2 * len(widths))
            )
