"""The world in virtual time: what comes of calls, with the real core and with the baselines."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from balancer.core.admission import QueueLimits
from balancer.core.knobs import Knobs
from balancer.core.plan import Plan
from balancer.core.strategy import STRATEGIES
from balancer.sim.machine import work_of
from balancer.sim.world import (
    BASELINES,
    HOST_TYPES,
    Bypass,
    Crash,
    Hang,
    Job,
    Machine,
    Mishap,
    Model,
    Record,
    Report,
    Straggle,
    World,
    flapping,
)

POLICIES = (*STRATEGIES, *BASELINES)
TYPE = HOST_TYPES["rtx3090"]
M, N = Model("m"), Model("n")


def machines(count: int, **more: int) -> list[Machine]:
    """Equal hosts, h0 and so on."""
    return [Machine(f"h{number}", TYPE, **more) for number in range(count)]


def world(count: int = 2, policy: str = "least-loaded", **more: object) -> World:
    """Equal hosts with m in memory, and laws to go by."""
    usual: dict[str, object] = {
        "warm": {f"h{number}": ["m"] for number in range(count)},
        "check_invariants": True,
        "slots_known": True,
    }
    return World(machines(count), [M, N], policy=policy, **{**usual, **more})  # type: ignore[arg-type]


def one(report: Report) -> Record:
    """The only record."""
    (record,) = report.records
    return record


def statuses(report: Report) -> list[str]:
    """How the calls ended."""
    return [record.status for record in report.records]


# -- calm ---------------------------------------------------------------------------------------


def calm(seed: int = 1, count: int = 40) -> list[Job]:
    """A small workload of two models."""
    rng = random.Random(seed)
    return [
        Job(
            rng.uniform(0, 60),
            rng.choice("mn"),
            rng.randint(10, 1000),
            rng.randint(1, 200),
            conversation=rng.choice(["", "c"]),
            turn=turn,
        )
        for turn in range(count)
    ]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_answers_a_calm_workload(policy: str) -> None:
    """All of it, the first byte before the end, by a backend that is there."""
    report = world(policy=policy).run(calm())
    assert statuses(report) == ["done"] * 40
    for record in report.records:
        assert record.first_at is not None
        assert record.ended_at is not None
        assert record.arrived_at < record.first_at <= record.ended_at <= report.until
        assert record.backend in ("h0", "h1")
    assert report.loads >= 1
    assert sum(report.loads_by.values()) <= report.loads


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_makes_the_same_world(policy: str) -> None:
    """To the last digit, mishaps included."""
    mishaps = [Crash("h0", 5.0, 10.0), Straggle("h1", 20.0, 10.0), Hang("h0", 30.0, 8.0)]
    runs = [
        world(policy=policy, mishaps=mishaps, seed=7, check_invariants=False).run(calm(3))
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_another_seed_makes_another_world() -> None:
    """Checks come at other times, so that there is something to be the same."""
    events = {world(seed=seed).run(calm(3)).events for seed in range(4)}
    assert len(events) > 1


def test_one_call_takes_what_the_host_takes() -> None:
    """The balancer itself costs no time."""
    record = one(world(1).run([Job(1.0, "m", 100, 101)]))
    assert record.first_at is not None
    assert record.first_at == pytest.approx(1.0 + work_of(100, 0) / 3860 + 0.02)
    assert record.ended_at == pytest.approx(record.first_at + 100 / 112)
    assert (record.attempts, record.queued_s, record.backend) == (1, 0.0, "h0")


def test_a_cold_call_waits_for_a_detached_load() -> None:
    """Which is counted, by its reason; the call is queued meanwhile and then sent warm."""
    report = world(1).run([Job(1.0, "n", 100, 10)])
    record = one(report)
    assert record.queued_s == pytest.approx(4.9 / 1.5 + 1.0)
    assert (report.loads, report.loads_by) == (1, {"no copy in memory": 1})


def test_known_slots_are_kept_to() -> None:
    """The fifth call waits with us, not with the host."""
    report = world(1).run([Job(1.0, "m", 100, 200) for _ in range(5)])
    assert sum(record.queued_s > 0 for record in report.records) == 1


def test_unknown_slots_are_not_told() -> None:
    """The core begins with what it believes."""
    report = world(1, slots_known=False).run([Job(1.0, "m", 100, 200) for _ in range(5)])
    assert sum(record.queued_s > 0 for record in report.records) == 3


def test_a_turn_finds_what_the_one_before_left() -> None:
    """Jobs of a conversation need no chain: each begins with the one before."""
    jobs = [
        Job(1.0, "m", 200, 50, conversation="c", turn=0),
        Job(9.0, "m", 300, 50, conversation="c", turn=1, after=(0, 2.0)),
    ]
    first, second = world(1).run(jobs).records
    assert (first.cached, second.cached) == (0, 250)


def test_streams_tell_their_lease_how_far_they_are() -> None:
    """At least every half a second."""
    made = world(1)
    seen: list[tuple[float, int]] = []

    def look() -> None:
        assert made.shell is not None
        seen.extend(
            (made.timeline.now, attempt.lease.run.records) for attempt in made.shell.running
        )

    for tenth in range(60):
        made.timeline.at(1.05 + tenth / 10, look)
    record = one(made.run([Job(1.0, "m", 100, 501)]))
    assert record.first_at is not None
    assert len(seen) > 30
    for at, records in seen:
        expected = max(0.0, (at - record.first_at) * 112)
        assert expected - 57 <= records <= expected + 2


def test_what_the_plan_foresees_is_recorded() -> None:
    """From the grant to the first byte."""
    record = one(world(1, "plan").run([Job(1.0, "m", 1000, 10)]))
    assert record.predicted_s is not None
    assert record.predicted_s > 0.0


def test_knobs_reach_the_plan() -> None:
    """As they are, or by name."""
    for knobs in (Knobs(plan_depth=3), {"plan_depth": 3.0}):
        made = world(1, "plan", knobs=knobs)
        assert made.shell is not None
        assert isinstance(made.shell.scheduler, Plan)
        assert made.shell.scheduler.knobs == Knobs(plan_depth=3)


# -- when calls come and go -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["least-loaded", "push-least-loaded"])
def test_a_job_may_follow_another(policy: str) -> None:
    """So long after its end, whatever time it tells itself."""
    jobs = [Job(1.0, "m", 100, 50), Job(0.0, "m", 100, 50, after=(0, 3.0))]
    first, second = world(1, policy).run(jobs).records
    assert first.ended_at is not None
    assert second.arrived_at == first.ended_at + 3.0
    assert second.status == "done"


@pytest.mark.parametrize("policy", POLICIES)
def test_clients_leave(policy: str) -> None:
    """While they wait, while they are served, or too late to matter."""
    jobs = [Job(1.0, "m", 100, 1000, leaves_after=2.0) for _ in range(8)]
    jobs.append(Job(1.0, "m", 100, 2, leaves_after=50.0))
    report = world(1, policy).run(jobs)
    assert Counter(statuses(report)) == {"left": 8, "done": 1}
    assert {r.ended_at for r in report.records if r.status == "left"} == {3.0}


def test_a_run_may_end_early() -> None:
    """Then some calls are not finished, and some have never come."""
    jobs = [Job(1.0, "m", 100, 1000), Job(50.0, "m", 100, 10)]
    report = world(1).run(jobs, until=5.0)
    assert statuses(report) == ["unfinished", "never"]
    assert report.until == 5.0


def test_a_full_queue_refuses() -> None:
    """At once, before anything was tried."""
    jobs = [Job(1.0, "m", 100, 500) for _ in range(6)]
    report = world(1, queue=QueueLimits(1, 1, 60.0)).run(jobs)
    assert Counter(statuses(report)) == {"done": 5, "refused": 1}
    assert [r.error[:10] for r in report.records if r.status == "refused"] == ["Queue full"]


# -- mishaps ------------------------------------------------------------------------------------


def test_a_crash_before_the_first_byte_is_answered_elsewhere() -> None:
    """By another attempt, and nobody notices."""
    jobs = [Job(1.0, "m", 3000, 10) for _ in range(2)]
    report = world(mishaps=[Crash("h0", 1.1, 30.0)]).run(jobs)
    assert statuses(report) == ["done", "done"]
    assert {record.backend for record in report.records} == {"h1"}
    assert sorted(record.attempts for record in report.records) == [1, 2]


def test_a_crash_after_it_is_not() -> None:
    """What was begun cannot be begun anew."""
    record = one(world(1, mishaps=[Crash("h0", 3.0, 30.0)]).run([Job(1.0, "m", 100, 1000)]))
    assert (record.status, record.ended_at, record.attempts) == ("cut", 3.0, 1)


def test_a_crash_takes_a_load_with_it() -> None:
    """The call that waited for it is served elsewhere."""
    report = world(policy="least-loaded", mishaps=[Crash("h0", 2.0, 60.0)]).run(
        [Job(1.0, "n", 100, 10)]
    )
    assert one(report).status == "done"
    assert one(report).backend == "h1"
    assert report.loads == 2


def test_a_silent_host_is_found_out() -> None:
    """Calls that had no byte go elsewhere in half a minute; those behind never go there."""
    jobs = [Job(1.0 + step, "m", 100, 50) for step in range(60)]
    report = world(mishaps=[Hang("h0", 5.01, 300.0)]).run(jobs)
    found = Counter(statuses(report))
    assert found["done"] + found["cut"] == 60
    slowest = max(r.first_at - r.arrived_at for r in report.records if r.first_at is not None)
    assert 20.0 < slowest < 40.0


def test_a_host_that_comes_back_is_used_again() -> None:
    """Its breaker's trial passes, and the model is loaded once more."""
    mishaps = [Crash("h0", 5.0, 10.0)]
    report = world(1, mishaps=mishaps).run([Job(2.0 * step, "m", 100, 20) for step in range(1, 30)])
    assert statuses(report)[-1] == "done"
    assert set(statuses(report)) <= {"done", "cut", "lost"}
    assert report.loads == 1


def test_strangers_take_slots() -> None:
    """Calls past the balancer are served as ours are, and cost ours their time."""
    strangers = [Bypass("h0", 1.0, "m", 100, 500) for _ in range(4)]
    alone = one(world(1).run([Job(1.5, "m", 100, 10)]))
    beside = one(world(1, mishaps=strangers).run([Job(1.5, "m", 100, 10)]))
    assert alone.first_at is not None
    assert beside.first_at is not None
    assert beside.first_at > alone.first_at + 3.0


def test_a_straggler_is_slow_for_its_time() -> None:
    """And no longer."""
    jobs = [Job(1.0, "m", 100, 101), Job(60.0, "m", 100, 101)]
    slow, quick = world(1, mishaps=[Straggle("h0", 0.5, 30.0)]).run(jobs).records
    assert slow.ended_at is not None
    assert quick.ended_at is not None
    assert slow.ended_at - 1.0 == pytest.approx(5 * (quick.ended_at - 60.0))


# -- the laws -----------------------------------------------------------------------------------


def chaos(seed: int, policy: str, count: int = 50) -> Report:
    """A small random world with all that can go wrong in it, run to its end."""
    rng = random.Random(seed)
    types = list(HOST_TYPES.values())
    hosts = [
        Machine(f"h{n}", rng.choice(types), rng.choice([1, 2, 4]), max_models=rng.choice([1, 2, 3]))
        for n in range(rng.randint(1, 4))
    ]
    models = [
        Model(f"m{n}", rng.choice([0.5, 2.0, 4.9]), rng.choice([1.0, 3.0, 8.0]))
        for n in range(rng.randint(1, 4))
    ]
    models.append(Model("e", 0.3, 0.14, 0.0, embedding=True))
    names = [host.name for host in hosts]
    made = World(
        hosts,
        models,
        policy=policy,
        seed=seed,
        warm={names[0]: ["e"]},
        slots_known=rng.random() < 0.5,
        mishaps=trouble(rng, names, models),
        check_invariants=True,
        queue=rng.choice([None, QueueLimits(30, 10, 20.0), QueueLimits()]),
    )
    return made.run(calls(rng, models, count))


def trouble(rng: random.Random, names: list[str], models: list[Model]) -> list[Mishap]:
    """A handful of mishaps within a minute."""
    found: list[Mishap] = []
    for kind in rng.sample(range(5), rng.randint(0, 5)):
        host, at, for_s = rng.choice(names), rng.uniform(0, 60), rng.choice([3.0, 20.0, 90.0])
        if kind == 0:
            found.append(Crash(host, at, for_s))
        elif kind == 1:
            found.append(Hang(host, at, for_s, connects=rng.random() < 0.7))
        elif kind == 2:
            found.append(Straggle(host, at, for_s))
        elif kind == 3:
            found += flapping(host, at, at + 40, 5.0, 4.0)
        else:
            model = rng.choice(models).name
            found += [Bypass(host, rng.uniform(0, 60), model, 500, 100) for _ in range(10)]
    return found


def calls(rng: random.Random, models: list[Model], count: int) -> list[Job]:
    """Calls of all kinds within a minute."""
    found = []
    for index in range(count):
        model = rng.choice(models)
        job = Job(
            rng.uniform(0, 60),
            model.name,
            rng.randint(1, 2000),
            0 if model.embedding else rng.randint(1, 300),
            who=rng.choice("abc"),
            batch=rng.random() < 0.2,
            conversation=rng.choice(["", "x", "y"]),
            turn=index,
        )
        if index > 5 and rng.random() < 0.3:
            job = replace(job, after=(rng.randrange(index), rng.expovariate(1 / 5)))
        if rng.random() < 0.2:
            job = replace(job, leaves_after=rng.expovariate(1 / 20))
        found.append(job)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_laws_hold_whatever_happens(seed: int) -> None:
    """After every event of a small world; the plan in all of them, the others in turn."""
    greedy = [policy for policy in STRATEGIES if policy != "plan"]
    for policy in ("plan", greedy[seed % len(greedy)]):
        ended = statuses(chaos(seed, policy))
        assert {"unfinished", "never"}.isdisjoint(ended)
