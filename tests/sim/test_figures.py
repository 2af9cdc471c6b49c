"""What is told of a run, on reports made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from balancer.sim.figures import (
    RATIOS,
    answered,
    figures,
    jain,
    medians,
    prediction_ratios,
    quantile,
)
from balancer.sim.jobs import Job, Record, Report

END = 1000.0


def job(**more: Any) -> Job:
    """A call of 1,000 tokens of prompt and 100 of answer."""
    return Job(**{"at": 0.0, "model": "m", "prompt_tokens": 1000, "output_tokens": 100, **more})


def report(*records: Record, **more: Any) -> Report:
    """A run that ended after a thousand seconds."""
    told: dict[str, Any] = {"loads": 0, "loads_by": {}, "evictions": 0, "until": END, **more}
    return Report(records, **told)


def done(index: int, at: float, first_s: float, all_s: float, **more: Any) -> Record:
    """An answer, in seconds from its arrival."""
    return Record(index, at, at + first_s, at + all_s, status="done", **more)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        (range(1, 101), 0.99, 99),
        (range(1, 101), 0.5, 50),
        ([7.0], 0.99, 7.0),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([1.0, 2.0], 1.0, 2.0),
    ],
)
def test_a_quantile_is_one_of_the_values(values: Any, share: float, expected: float) -> None:
    """The least that so large a share does not exceed, in whatever order they come."""
    assert quantile(values, share) == expected


def test_of_nothing_there_is_no_figure() -> None:
    """Not a zero that would look good."""
    assert math.isnan(quantile([], 0.5))
    assert math.isnan(jain([]))
    assert math.isnan(figures([], report())["ttft_p99"])


def test_what_is_not_answered_takes_until_the_end_of_the_run() -> None:
    """Lost, refused, unfinished: no first token; cut: a first token, but no end."""
    jobs = [job() for _ in range(5)]
    calls = answered(
        jobs,
        report(
            done(0, 10.0, 1.0, 3.0),
            Record(1, 20.0, None, 25.0, status="lost"),
            Record(2, 30.0, None, 30.0, status="refused"),
            Record(3, 40.0, 42.0, 45.0, status="cut"),
            Record(4, 50.0, 51.0, None, status="unfinished"),
        ),
    )
    assert [call.ttft_s for call in calls] == [1.0, 980.0, 970.0, 2.0, 1.0]
    assert [call.e2e_s for call in calls] == [3.0, 980.0, 970.0, 960.0, 950.0]


def test_losses_are_told_apart() -> None:
    """Before the first token and after it."""
    told = figures(
        [job() for _ in range(5)],
        report(
            done(0, 10.0, 1.0, 3.0),
            Record(1, 20.0, None, 25.0, status="lost"),
            Record(2, 30.0, None, 30.0, status="refused"),
            Record(3, 40.0, 42.0, 45.0, status="cut"),
            Record(4, 50.0, None, None, status="unfinished"),
        ),
    )
    assert (told["calls"], told["lost"], told["refused"], told["cut"]) == (5, 3, 1, 1)
    assert told["goodput"] == pytest.approx(0.2)


def test_what_never_came_or_came_early_does_not_count() -> None:
    """A turn whose conversation broke off; what arrived before the hosts had warmed up."""
    jobs = [job() for _ in range(3)]
    run = report(done(0, 10.0, 9.0, 9.0), done(1, 130.0, 1.0, 2.0), Record(2, math.inf), loads=4)
    told = figures(jobs, run, skip_s=120.0)
    assert (told["calls"], told["ttft_p99"]) == (1, 1.0)
    assert told["loads"] == 2000.0  # of all that came


@pytest.mark.parametrize(
    ("more", "first_s", "all_s", "good"),
    [
        ({}, 3.0, 13.0, True),
        ({}, 3.1, 4.0, False),  # 2 s and 1 ms for each token of the prompt
        ({}, 1.0, 11.1, False),  # 0.1 s for each token of the answer
        ({"batch": True}, 110.0, 120.0, True),
        ({"batch": True}, 1.0, 120.1, False),
        ({"output_tokens": 0}, 3.0, 3.0, True),
        ({"output_tokens": 0}, 3.01, 3.01, False),
    ],
)
def test_goodput(more: dict[str, Any], first_s: float, all_s: float, good: bool) -> None:
    """As quick as a user may expect; batch and embeddings have measures of their own."""
    (call,) = answered([job(**more)], report(done(0, 0.0, first_s, all_s)))
    assert call.is_good is good


def test_groups_are_told_apart() -> None:
    """Batch giving way does not look like failure in the figures of the others."""
    jobs = [job(), job(batch=True), job(output_tokens=0)]
    told = figures(
        jobs, report(done(0, 0.0, 1.0, 2.0), done(1, 0.0, 60.0, 70.0), done(2, 0.0, 5.0, 5.0))
    )
    assert told["interactive ttft_p99"] == 1.0
    assert told["batch ttft_p99"] == 60.0
    assert told["ttft_p99"] == 60.0
    assert not any(name.startswith("interactive") for name in figures(jobs[:1], report()))


def test_the_share_of_prompts_that_was_not_evaluated() -> None:
    """Of those that were evaluated or known at all: a lost call had no prompt."""
    told = figures(
        [job(), job(), job()],
        report(
            done(0, 0.0, 1.0, 2.0, cached=900),
            done(1, 0.0, 1.0, 2.0),
            Record(2, 0.0, status="lost"),
        ),
    )
    assert told["cached"] == pytest.approx(900 / 2000)


def test_jains_index() -> None:
    """One for equals, one over their number if one has all; of means of each key's TTFT."""
    assert jain([0.2, 0.2, 0.2]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    jobs = [job(who="a"), job(who="a"), job(who="b")]
    told = figures(
        jobs, report(done(0, 0.0, 1.0, 2.0), done(1, 0.0, 3.0, 4.0), done(2, 0.0, 4.0, 5.0))
    )
    assert told["jain"] == pytest.approx((1 / 2 + 1 / 4) ** 2 / (2 * (1 / 4 + 1 / 16)))


def test_predictions_are_held_against_what_came_from_the_commit_on() -> None:
    """Waiting with us is not in it; without a prediction there is no ratio."""
    runs = report(
        done(0, 0.0, 5.0, 6.0, predicted_s=1.0, queued_s=4.0),
        done(1, 0.0, 3.0, 6.0, predicted_s=1.0),
        done(2, 0.0, 90.0, 91.0, predicted_s=1.0),
        done(3, 0.0, 5.0, 6.0),
        Record(4, 0.0, predicted_s=1.0),
    )
    counts = prediction_ratios(runs)
    assert sum(counts) == 3
    assert counts[-1] == 1
    assert counts[RATIOS.index(1.1)] == 1
    assert counts[RATIOS.index(4.0)] == 1


def test_medians_over_seeds() -> None:
    """Of each figure by itself; one that a run does not tell is not zero there."""
    runs = [{"a": 1.0, "b": 5.0}, {"a": 9.0}, {"a": 2.0, "b": 7.0}]
    assert medians(runs) == {"a": 2.0, "b": 6.0}
