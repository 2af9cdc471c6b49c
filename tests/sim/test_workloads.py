"""The workloads by name: what they load their hosts with, and what goes wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from balancer.sim.calls import MODELS, STANDARD
from balancer.sim.jobs import Job
from balancer.sim.mishaps import Bypass, Crash, Hang, Straggle
from balancer.sim.traces import Traces
from balancer.sim.workloads import Workload, capacity, hosts, service_s, stretched, workloads

SMALL = workloads(Traces(), 0.02)
NAMED = {
    *("many-models", "bursty", "six-unlike", "twelve-mixed", "equal", "one-slot"),
    *("code-bursts", "bursts", "stragglers", "deaths", "bypass", "chat", "mooncake"),
    "chat-common",
    *("tenants", "fair-calm", "fair-flood", "big-64", "big-64-models", "big-256"),
    *("big-256-models", "big-1000", "big-1000-models"),
}


def test_all_are_there() -> None:
    """Under their names."""
    assert SMALL.keys() == NAMED
    assert all(name == workload.name for name, workload in SMALL.items())


def test_what_a_call_takes_by_hand() -> None:
    """1,000 tokens of prompt and 101 of answer on a 3090 with four slots."""
    (machine,) = hosts((1, "rtx3090"))
    job = Job(0.0, STANDARD.name, 1000, 101)
    expected = 1000 * 1.05 / 3860 + 0.02 + 100 * (1 + 0.13 * 3) / (4 * 112)
    assert service_s(machine, STANDARD, job) == pytest.approx(expected)
    cached = 300 * (1 + 1e-4 * (700 + 150)) / 3860 + 0.02 + 100 * 1.39 / 448
    assert service_s(machine, STANDARD, job, cached=0.7) == pytest.approx(cached)


def test_a_bigger_model_is_slower_by_hand() -> None:
    """A 14.8B model of 9 GB; one that only embeds decodes nothing."""
    (machine,) = hosts((1, "a100"), slots=1)
    prompt = 500 * 1.025 / (5800 * 8 / 14.8) + 0.02
    decode = 50 / (138 * (4.9 / 9.0) ** 0.95)
    job = Job(0.0, MODELS[4].name, 500, 51)
    assert service_s(machine, MODELS[4], job) == pytest.approx(prompt + decode)
    embedding = Job(0.0, MODELS[2].name, 500, 0)
    expected = 500 * 1.025 / (5800 * 12) + 0.02  # more than twelve times as fast is none
    assert service_s(machine, MODELS[2], embedding) == pytest.approx(expected)


def test_capacity_is_the_sum_over_hosts_of_what_the_mean_call_allows() -> None:
    """One over the mean of the calls' times, host by host."""
    machines = hosts((2, "rtx3060"), (1, "rtx4090"))
    jobs = [Job(0.0, STANDARD.name, 800, 200), Job(0.0, STANDARD.name, 100, 10)]
    by_hand = 0.0
    for machine in machines:
        by_hand += 2 / sum(service_s(machine, STANDARD, job) for job in jobs)
    assert capacity(machines, [STANDARD], jobs) == pytest.approx(by_hand)


def test_calls_are_stretched_to_the_utilisation_wanted() -> None:
    """Twice the utilisation, half the time; no utilisation, their own times."""
    machines = hosts((1, "rtx3090"))
    jobs = [Job(float(at), STANDARD.name, 500, 100) for at in range(101)]
    half = stretched(jobs, machines, [STANDARD], 0.5, 0.0)
    assert 101 / half[-1].at == pytest.approx(0.5 * capacity(machines, [STANDARD], jobs))
    full = stretched(jobs, machines, [STANDARD], 1.0, 0.0)
    assert [job.at * 2 for job in full] == pytest.approx([job.at for job in half])
    assert stretched(jobs, machines, [STANDARD], 0.0, 0.0) is jobs


@pytest.mark.parametrize("name", sorted(NAMED - {"mooncake", "bypass"}))
def test_a_workload_has_its_utilisation(name: str) -> None:
    """Whatever was drawn; a second seed draws other calls."""
    workload = SMALL[name]
    jobs = workload.jobs(1)
    span_s = max(job.at for job in jobs)
    able = capacity(workload.machines, workload.models, jobs, workload.cached)
    assert len(jobs) / span_s / able == pytest.approx(workload.u)
    assert jobs == workload.jobs(1) != workload.jobs(2)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_workload_can_be_run(name: str) -> None:
    """Known models, each on a host it fits; what is warm fits in memory; parameters are told."""
    workload = SMALL[name]
    models = {model.name: model for model in workload.models}
    jobs = workload.jobs(1)
    assert {job.model for job in jobs} <= models.keys()
    for model in {job.model for job in jobs}:
        assert any(models[model].fits(machine) for machine in workload.machines), model
    for machine in workload.machines:
        warm = [models[model] for model in workload.warm.get(machine.name, ())]
        assert len(set(warm)) == len(warm) <= machine.max_models
        assert sum(model.memory_gb(machine) for model in warm) <= machine.type.memory_gb
        assert machine.context >= 4096
    assert f"u={workload.u:g}" in workload.parameters() or not workload.u
    assert workload.about in workload.parameters()


def test_hosts_as_published() -> None:
    """Types, counts, slots and contexts of the rows that differ."""
    told = {name: workload.parameters().split(");")[0] for name, workload in SMALL.items()}
    assert told["one-slot"] == "8×rtx3090 (S=1, ctx 4096, 3 models"
    assert told["chat"] == "8×rtx3090 (S=4, ctx 8192, 3 models"
    assert told["mooncake"].startswith("3×rtx3090 (S=2, ctx 32768")
    assert [machine.type.name for machine in SMALL["six-unlike"].machines] == [
        *("cpu", "m1max", "rtx3060", "rtx3090", "rtx4090", "a100")
    ]
    assert len(SMALL["twelve-mixed"].machines) == 12
    assert [len(SMALL[f"big-{count}"].machines) for count in (64, 256, 1000)] == [64, 256, 1000]


def test_mishaps() -> None:
    """Two crashes and two hangs of 90 s and one host that flaps; stragglers; strangers."""
    large = workloads(Traces(), 0.5)
    died = large["deaths"].mishaps(1)
    assert [type(one) for one in died if getattr(one, "for_s", 0) == 90.0].count(Crash) == 2
    assert sum(isinstance(one, Hang) for one in died) == 2
    assert len({one.machine for one in died if getattr(one, "for_s", 0) == 10.0}) == 1
    slow = large["stragglers"].mishaps(1)
    assert slow
    assert all(isinstance(one, Straggle) and one.factor == 0.2 for one in slow)
    jobs, strangers = large["bypass"].cast(1)
    assert all(isinstance(one, Bypass) for one in strangers)
    assert len(strangers) / (len(jobs) + len(strangers)) == pytest.approx(0.25, abs=0.03)
    assert not large["equal"].mishaps(1)


def fair(workload: Workload, who: str) -> list[Job]:
    """The calls of one key, without their times."""
    return [replace(job, at=0.0) for job in workload.jobs(3) if job.who == who]


def test_the_two_fair_workloads_differ_in_the_large_key_alone() -> None:
    """One sends a hundred times as much as the other, three times what the pool can; or u = 0.7."""
    whole = workloads(Traces(), 0.2)
    flood, calm = whole["fair-flood"], whole["fair-calm"]
    assert fair(flood, "small") == fair(calm, "small")
    small, large = len(fair(flood, "small")), len(fair(flood, "large"))
    assert large == 100 * small
    assert sum(machine.slots for machine in flood.machines) >= 8
    small_u = 3.0 / 101.0
    wanted = small * (0.7 - small_u) / small_u
    assert len(fair(calm, "large")) == pytest.approx(wanted, abs=1)
    spans = [max(job.at for job in one.jobs(3)) for one in (flood, calm)]
    assert spans[0] == pytest.approx(spans[1], rel=0.15)  # the small one's rate is the same
