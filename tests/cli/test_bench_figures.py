"""What is made of samples: medians, what is noise, the table, the document."""

from __future__ import annotations

from dataclasses import replace

import pytest

from balancer.cli.bench_figures import (
    Report,
    Spread,
    added,
    document,
    lines,
    pool,
    quantile,
    spread,
)
from balancer.cli.bench_rounds import Crowd, Sample, Turns


def turns(*pairs: tuple[Sample, Sample]) -> Turns:
    """Rounds in which everything went well."""
    direct, through = [one for one, _ in pairs], [other for _, other in pairs]
    return Turns(direct, through, list(pairs), rounds=len(pairs))


def firsts(*pairs: tuple[float, float]) -> Turns:
    """Rounds of which the wait for the first token is all that is known, directly and not."""
    return turns(*((Sample("a", one), Sample("a", other)) for one, other in pairs))


def talk(first_s: float, gap_s: float = 0.02, backend: str = "a") -> Sample:
    """A call of 32 tokens."""
    return Sample(backend, first_s, (gap_s,) * 31, 32)


TALKS = turns(*((talk(0.1), talk(0.1 + 0.001 * n)) for n in range(1, 10)))
SMALL = firsts(*[(0.001, 0.003), (0.001, 0.002), (0.002, 0.004)] * 3)
REPORT = Report("http://b", "m", 4096, 32, 10, 12.3, TALKS, SMALL, SMALL)


def test_quantiles() -> None:
    """Between neighbours in proportion; of one value it is that."""
    assert [quantile([3, 1, 2, 4], share) for share in (0, 0.5, 1)] == [1, 2.5, 4]
    assert quantile([10, 20], 0.25) == 12.5
    assert quantile([7], 0.99) == 7


def test_spread() -> None:
    """Of what is known; of nothing there is none."""
    assert spread([1.0, None, 2.0, 3.0]) == Spread(2.0, 1.5, 2.5, 3)
    assert spread([None]) is None


@pytest.mark.parametrize(
    ("q1", "q3", "noise"), [(-1, 1, True), (0, 1, True), (1, 2, False), (-2, -1, False)]
)
def test_a_difference_of_either_sign_is_noise(q1: float, q3: float, noise: bool) -> None:
    """As far as its quartiles tell."""
    assert Spread((q1 + q3) / 2, q1, q3, 9).is_noise is noise


def test_differences_are_made_pair_by_pair() -> None:
    """So that a slow backend in one round does not look like a slow balancer."""
    made = firsts((1.0, 1.1), (5.0, 5.1), (9.0, 9.1))
    found = added(made, lambda sample: sample.first_s)
    assert found is not None
    assert (found.median, found.q1, found.q3) == pytest.approx((0.1, 0.1, 0.1))
    assert added(made, lambda sample: sample.rate) is None


def test_the_table() -> None:
    """Every way a row; every cost with its quartiles, and noise called noise."""
    told = lines(REPORT)
    assert told[0] == "m, 32 tokens a call, context 4096: 9 of 10 rounds in 12 s"
    assert told[2].split("  ")[0] == "WAY"
    assert told[3].startswith("through the balancer  9      105 ms (103 to 107)  50.0 (50.0 to 50.")
    assert told[4].startswith("a, directly           9      100 ms (100 to 100)  50.0 (50.0 to 50.")
    assert told[4].split()[-4:] == ["20", "ms", "20", "ms"]
    assert "  first token          +5.00 ms (+3.00 to +7.00), 9 pairs" in told
    assert "  gap between tokens   below the noise (+0.00 to +0.00 ms), 9 pairs" in told
    assert "  tokens/s             below the noise (+0.0 to +0.0), 9 pairs" in told
    assert "  call without tokens  +2.00 ms (+1.00 to +2.00), 9 pairs" in told
    assert not [line for line in told if line.startswith("!")]


def test_what_is_slower_by_less_is_told_with_its_sign() -> None:
    """A difference below zero is one, too."""
    report = replace(REPORT, versions=firsts(*[(0.002, 0.001)] * 8))
    assert "  GET /api/version     −1.00 ms (−1.00 to −1.00), 8 pairs" in lines(report)


def test_too_few_to_tell() -> None:
    """Three pairs have no quartiles worth the name, and few gaps no slowest hundredth."""
    few = turns(*[(talk(0.1), talk(0.2))] * 3)
    told = "\n".join(lines(replace(REPORT, talks=few)))
    assert "first token          too few pairs to tell (3)" in told
    assert told.splitlines()[3].endswith("20 ms    –")


def test_no_call_went_both_ways() -> None:
    """Then there is no cost to tell, and that is said; the rest is shown."""
    alone = Turns(through=[talk(0.1)] * 3, rounds=3)
    told = "\n".join(lines(replace(REPORT, talks=alone, empties=Turns(), versions=Turns())))
    assert "cannot be told: no call went both ways" in told
    assert "through the balancer  3      100 ms" in told
    nothing = Report("http://b", "m", None, 32, 1, 0.0, Turns(), Turns(), Turns())
    assert "through the balancer  0      –" in "\n".join(lines(nothing))
    assert not nothing.ok


def test_failures_count_and_what_we_cut_off_does_not() -> None:
    """Each is told once, with how often; a load that calls waited for is told, too."""
    bad = Sample("", wrong="gpu1, directly: 500: boom")
    late = Sample("", wrong="through the balancer: no end in time", late=True)
    talks = Turns(direct=[bad, bad], through=[late, replace(talk(0.1), load_s=3.0)])
    report = replace(REPORT, talks=talks, notes=("a\x1b note",))
    assert lines(report)[-4:] == [
        "! a? note",
        "! 1 call waited for the model to be loaded: look at medians only",
        "! 1 call cut off, not counted: the time was over",
        "! 2 calls failed: gpu1, directly: 500: boom",
    ]
    assert not report.ok
    assert replace(REPORT, talks=Turns(through=[late, talk(0.1)])).ok
    assert not replace(REPORT, talks=Turns(through=[late])).ok


def test_many_at_once() -> None:
    """Tokens of all over the time that all took; failures give none."""
    bad = Sample("", wrong="503: full")
    crowd = Crowd(4, (talk(0.1), talk(0.3), talk(0.2, backend="b"), bad), took_s=2.0)
    found = pool(crowd)
    assert (found.calls, found.tokens_per_s, found.calls_per_s) == (3, 48.0, 1.5)
    assert (found.first_p50_s, found.first_p99_s) == (0.2, None)
    told = lines(replace(REPORT, crowd=crowd))
    assert "4 callers at once, through the balancer: 3 calls in 2.0 s (a 2, b 1)" in told
    assert "  48.0 tokens/s in all, 1.50 calls/s; first token p50 200 ms, p99 –" in told
    assert told[-1] == "! 1 call failed: 503: full"


def test_the_document() -> None:
    """The same for scripts."""
    doc = document(replace(REPORT, crowd=Crowd(2, (talk(0.1),), 1.0)))
    assert (doc["bench_version"], doc["ok"], doc["model"]) == (1, True, "m")
    assert [(way["name"], way["through"]) for way in doc["ways"]] == [
        ("balancer", True),
        ("a", False),
    ]
    assert doc["added"]["first_s"]["median"] == pytest.approx(0.005)
    assert doc["added"]["first_s"]["noise"] is False
    assert doc["added"]["rate"]["noise"] is True
    assert doc["pool"]["tokens_per_s"] == 32
    assert document(REPORT)["pool"] is None
