"""What `bench` found: medians and quartiles, what is noise, as a table and as a document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from balancer import __version__
from balancer.cli.bench_rounds import Crowd, Sample, Turns
from balancer.cli.screen import plain, table

BENCH_VERSION: Final = 1
FEW: Final = 8  # pairs, for quartiles to mean something
ENOUGH: Final = 100  # gaps, for the slowest hundredth of them to mean something
SLOW_LOAD_S: Final = 1.0
LITTLE_S: Final = 0.001


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of some values, and the middle half of them."""

    median: float
    q1: float
    q3: float
    count: int

    @property
    def is_noise(self) -> bool:
        """As a difference: a quarter of the values says the opposite of another quarter."""
        return self.q1 <= 0 <= self.q3


@dataclass(frozen=True, slots=True)
class Report:
    """
    Everything that was measured.

    Args:
        balancer: Where it is.
        rounds: That were wanted.
        talks: With tokens; the others, without tokens, say what the way itself costs.
        notes: What the reader should know beside the figures.
    """

    balancer: str
    model: str
    context: int | None
    tokens: int
    rounds: int
    took_s: float
    talks: Turns
    empties: Turns
    versions: Turns
    crowd: Crowd | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def wrong(self) -> Counter[str]:
        """What went wrong how often; what our own clock cut off did not."""
        return Counter(text for text, late in _wrong(self) if not late)

    @property
    def late(self) -> int:
        """Calls that were cut off because the time was over."""
        return sum(late for _, late in _wrong(self))

    @property
    def ok(self) -> bool:
        """No call failed, and some through the balancer were measured."""
        return not self.wrong and any(not sample.wrong for sample in self.talks.through)


def _wrong(report: Report) -> Iterable[tuple[str, bool]]:
    crowd = report.crowd.samples if report.crowd else ()
    for turns in (report.talks, report.empties, report.versions):
        for sample in (*turns.first_calls, *turns.through, *turns.direct):
            if sample.wrong:
                yield sample.wrong, sample.late
    for sample in crowd:
        if sample.wrong:
            yield sample.wrong, sample.late


# -- statistics --------------------------------------------------------------------------------


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of them lies, between neighbours in proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Iterable[float | None]) -> Spread | None:
    """Median and quartiles of what is known; None: nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    q1, median, q3 = (quantile(known, share) for share in (0.25, 0.5, 0.75))
    return Spread(median, q1, q3, len(known))


def added(turns: Turns, of: Callable[[Sample], float | None]) -> Spread | None:
    """The differences that the balancer made, pair by pair."""
    both = ((of(direct), of(through)) for direct, through in turns.pairs)
    return spread(
        None if direct is None or through is None else through - direct for direct, through in both
    )


def _first_s(sample: Sample) -> float:
    return sample.first_s


def _rate(sample: Sample) -> float | None:
    return sample.rate


def _gap_s(sample: Sample) -> float | None:
    """The usual one of a call."""
    return quantile(sample.gaps_s, 0.5) if sample.gaps_s else None


@dataclass(frozen=True, slots=True)
class Way:
    """How calls went that took the same way: through the balancer, or to one backend."""

    name: str
    through: bool
    calls: int
    first_s: Spread | None
    rate: Spread | None
    gap_p50_s: float | None
    gap_p99_s: float | None
    gaps: int


def ways(talks: Turns) -> list[Way]:
    """Through the balancer, then each backend by itself."""
    names = sorted({sample.backend for sample in talks.direct})
    direct = [_way(n, [s for s in talks.direct if s.backend == n], through=False) for n in names]
    return [_way("balancer", talks.through, through=True), *direct]


def _way(name: str, samples: Sequence[Sample], *, through: bool) -> Way:
    good = [sample for sample in samples if not sample.wrong]
    gaps = [gap for sample in good for gap in sample.gaps_s]
    return Way(
        name,
        through,
        len(good),
        spread(map(_first_s, good)),
        spread(map(_rate, good)),
        quantile(gaps, 0.5) if gaps else None,
        quantile(gaps, 0.99) if len(gaps) >= ENOUGH else None,
        len(gaps),
    )


@dataclass(frozen=True, slots=True)
class Pool:
    """What many calls at once got out of all backends together."""

    callers: int
    calls: int
    took_s: float
    tokens_per_s: float
    calls_per_s: float
    first_p50_s: float | None
    first_p99_s: float | None
    backends: dict[str, int]


def pool(crowd: Crowd) -> Pool:
    """The figures of a crowd."""
    good = [sample for sample in crowd.samples if not sample.wrong]
    firsts = [sample.first_s for sample in good]
    took_s = crowd.took_s or 1e-9
    return Pool(
        crowd.callers,
        len(good),
        crowd.took_s,
        sum(sample.tokens for sample in good) / took_s,
        len(good) / took_s,
        quantile(firsts, 0.5) if firsts else None,
        quantile(firsts, 0.99) if len(firsts) >= ENOUGH else None,
        dict(sorted(Counter(sample.backend or "not told" for sample in good).items())),
    )


# -- for people --------------------------------------------------------------------------------


def lines(report: Report) -> list[str]:
    """What is printed."""
    context = f", context {report.context}" if report.context else ""
    head = (
        f"{plain(report.model)}, {report.tokens} tokens a call{context}: "
        f"{report.talks.rounds} of {report.rounds} rounds in {report.took_s:.0f} s"
    )
    told = [head, "", *_ways_table(report), "", *_cost(report)]
    if report.crowd is not None:
        told += ["", *_pool_lines(pool(report.crowd))]
    notes = _notes(report)
    return [*told, *([""] if notes else []), *(f"! {note}" for note in notes)]


def _ways_table(report: Report) -> list[str]:
    head = ("WAY", "CALLS", "FIRST TOKEN", "TOKENS/S", "GAP P50", "GAP P99")
    rows = [
        (
            "through the balancer" if way.through else f"{plain(way.name)}, directly",
            str(way.calls),
            _spread(way.first_s, _ms, " ms"),
            _spread(way.rate, _number, ""),
            _alone(way.gap_p50_s),
            _alone(way.gap_p99_s),
        )
        for way in ways(report.talks)
    ]
    return table([head, *rows], indent="")


def _cost(report: Report) -> list[str]:
    rows = [
        ("first token", _change(added(report.talks, _first_s), _ms, " ms")),
        ("gap between tokens", _change(added(report.talks, _gap_s), _ms, " ms")),
        ("tokens/s", _change(added(report.talks, _rate), _number, "")),
        ("call without tokens", _change(added(report.empties, _first_s), _ms, " ms")),
        ("GET /api/version", _change(added(report.versions, _first_s), _ms, " ms")),
    ]
    if not report.talks.pairs and not report.empties.pairs:
        return ["What the balancer costs cannot be told: no call went both ways."]
    head = "What the balancer adds (median of the differences, pair by pair; quartiles in brackets)"
    return [head, *table(rows), "  GET /api/version is answered by the balancer itself."]


def _pool_lines(found: Pool) -> list[str]:
    shares = ", ".join(f"{plain(name)} {count}" for name, count in found.backends.items())
    first = f"p50 {_alone(found.first_p50_s)}, p99 {_alone(found.first_p99_s)}"
    rates = f"{found.tokens_per_s:.1f} tokens/s in all, {found.calls_per_s:.2f} calls/s"
    calls = f"{found.calls} calls in {found.took_s:.1f} s ({shares or 'none'})"
    return [
        f"{found.callers} callers at once, through the balancer: {calls}",
        f"  {rates}; first token {first}",
    ]


def _notes(report: Report) -> list[str]:
    notes = [plain(note) for note in report.notes]
    samples = (*report.talks.through, *report.talks.direct)
    slow = sum(sample.load_s > SLOW_LOAD_S for sample in samples)
    if slow:
        notes.append(f"{_calls(slow)} waited for the model to be loaded: look at medians only")
    if report.late:
        notes.append(f"{_calls(report.late)} cut off, not counted: the time was over")
    notes += [f"{_calls(count)} failed: {text}" for text, count in report.wrong.most_common()]
    return notes


def _calls(count: int) -> str:
    return "1 call" if count == 1 else f"{count} calls"


def _spread(found: Spread | None, show: Callable[[float], str], unit: str) -> str:
    if found is None:
        return "–"
    return f"{show(found.median)}{unit} ({show(found.q1)} to {show(found.q3)})"


def _change(found: Spread | None, show: Callable[[float], str], unit: str) -> str:
    if found is None:
        return "–"
    if found.count < FEW:
        return f"too few pairs to tell ({found.count})"
    q1, median, q3 = (
        f"{'+' if value >= 0 else '−'}{show(abs(value))}"
        for value in (found.q1, found.median, found.q3)
    )
    middle = "below the noise" if found.is_noise else f"{median}{unit}"
    return f"{middle} ({q1} to {q3}{unit if found.is_noise else ''}), {found.count} pairs"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}" if abs(seconds) < 10 * LITTLE_S else f"{1000 * seconds:.0f}"


def _number(value: float) -> str:
    return f"{value:.1f}"


def _alone(seconds: float | None) -> str:
    return "–" if seconds is None else f"{_ms(seconds)} ms"


# -- for scripts -------------------------------------------------------------------------------


def document(report: Report) -> dict[str, Any]:
    """What ``--json`` prints. Times are seconds; of differences, more is slower."""
    return {
        "bench_version": BENCH_VERSION,
        "version": __version__,
        "ok": report.ok,
        "balancer": report.balancer,
        "model": report.model,
        "context": report.context,
        "tokens": report.tokens,
        "rounds": report.talks.rounds,
        "took_s": report.took_s,
        "ways": [asdict(way) for way in ways(report.talks)],
        "added": {
            "first_s": _told(added(report.talks, _first_s)),
            "gap_s": _told(added(report.talks, _gap_s)),
            "rate": _told(added(report.talks, _rate)),
            "empty_call_s": _told(added(report.empties, _first_s)),
            "version_s": _told(added(report.versions, _first_s)),
        },
        "pool": asdict(pool(report.crowd)) if report.crowd else None,
        "failed": dict(report.wrong),
        "late": report.late,
        "notes": list(report.notes),
    }


def _told(found: Spread | None) -> dict[str, Any] | None:
    return None if found is None else {**asdict(found), "noise": found.is_noise}
