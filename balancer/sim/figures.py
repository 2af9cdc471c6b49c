"""What is told of a run of the virtual world: latencies, goodput, loads, losses, fairness."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from balancer.sim.jobs import Job, Record, Report

Wanted = Callable[[Job], bool]
GROUPS: Final[Mapping[str, Wanted]] = {
    "all": lambda _: True,
    "interactive": lambda job: not job.batch and job.output_tokens > 0,
    "batch": lambda job: job.batch,
    "small": lambda job: job.who == "small",
    "large": lambda job: job.who == "large",
}
RATIOS: Final = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)  # edges of bins


@dataclass(frozen=True, slots=True)
class Answered:
    """
    One call and what became of it, in seconds from its arrival at the balancer.

    Args:
        ttft_s: To the first token; the end of the run, if none came.
        e2e_s: To the end of the answer; the end of the run, if it was not all there.
    """

    job: Job
    record: Record
    ttft_s: float
    e2e_s: float

    @property
    def is_good(self) -> bool:
        """Whether it was as quick as a user may expect."""
        job = self.job
        if self.record.status != "done":
            return False
        if job.batch:
            return self.e2e_s <= 120.0
        decode_s = self.e2e_s - self.ttft_s
        in_time = self.ttft_s <= 2.0 + 0.001 * job.prompt_tokens
        return in_time and decode_s <= 0.1 * job.output_tokens + 1e-9


def answered(jobs: Sequence[Job], report: Report, skip_s: float = 0.0) -> list[Answered]:
    """Every call that arrived after *skip_s*."""
    found = []
    for record in report.records:
        if record.status == "never" or record.arrived_at < skip_s:
            continue
        first_at = report.until if record.first_at is None else record.first_at
        ended_at = report.until
        if record.status == "done" and record.ended_at is not None:
            ended_at = record.ended_at
        arrived_at = record.arrived_at
        job = jobs[record.job]
        found.append(Answered(job, record, first_at - arrived_at, ended_at - arrived_at))
    return found


def quantile(values: Iterable[float], share: float) -> float:
    """The least value that so large a share does not exceed; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 if all are equal, 1/n if one has all; NaN of nothing."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else math.nan


def figures(jobs: Sequence[Job], report: Report, skip_s: float = 0.0) -> dict[str, float]:
    """Everything told of one run; figures of a group of calls are prefixed by its name."""
    calls = answered(jobs, report, skip_s)
    told = _of(calls)
    for name, wanted in GROUPS.items():
        group = [call for call in calls if wanted(call.job)]
        if group and len(group) < len(calls):
            told |= {f"{name} {figure}": value for figure, value in _of(group).items()}
    arrived = sum(record.status != "never" for record in report.records)
    told["loads"] = 1000.0 * report.loads / max(1, arrived)
    told["evictions"] = 1000.0 * report.evictions / max(1, arrived)
    by_key: dict[str, list[float]] = {}
    for call in calls:
        by_key.setdefault(call.job.who, []).append(call.ttft_s)
    told["jain"] = jain([1.0 / max(1e-3, statistics.fmean(times)) for times in by_key.values()])
    return told


def _of(calls: Sequence[Answered]) -> dict[str, float]:
    ttft = [call.ttft_s for call in calls]
    e2e = [call.e2e_s for call in calls]
    prompts = sum(call.job.prompt_tokens for call in calls if call.record.first_at is not None)
    return {
        "calls": len(calls),
        "ttft_p50": quantile(ttft, 0.5),
        "ttft_p99": quantile(ttft, 0.99),
        "e2e_p99": quantile(e2e, 0.99),
        "goodput": statistics.fmean(call.is_good for call in calls) if calls else math.nan,
        "lost": sum(call.record.first_at is None for call in calls),
        "refused": sum(call.record.status == "refused" for call in calls),
        "cut": sum(
            call.record.first_at is not None and call.record.status != "done" for call in calls
        ),
        "cached": sum(call.record.cached for call in calls) / prompts if prompts else 0.0,
    }


def prediction_ratios(report: Report) -> list[int]:
    """Counts of actual over predicted TTFT, in the bins that `RATIOS` cut."""
    counts = [0] * (len(RATIOS) + 1)
    for record in report.records:
        if record.first_at is not None and record.predicted_s:
            ratio = (record.first_at - record.arrived_at - record.queued_s) / record.predicted_s
            counts[sum(ratio > edge for edge in RATIOS)] += 1
    return counts


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure over the seeds."""
    names = {name for run in runs for name in run}
    return {name: statistics.median(run[name] for run in runs if name in run) for name in names}
