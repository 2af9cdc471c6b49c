"""Recorded runs of the virtual world: each decision can be made again, what is rare is told."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest

from balancer.core.decisions import replay, terms_of, version
from balancer.core.events import (
    DrainRequested,
    Event,
    LoadStarted,
    Planned,
    SampleDiscarded,
    SlotsBelieved,
    Straggling,
)
from balancer.core.knobs import Knobs
from balancer.core.plan import Plan
from balancer.sim.world import HOST_TYPES, Crash, Job, Machine, Mishap, Model, Straggle, World

E = TypeVar("E", bound=Event)
M, N, O = Model("m"), Model("n"), Model("o", 9.1, 14.7)  # noqa: E741 - names as in m, n, o
UNLIKE = [
    Machine("a", HOST_TYPES["rtx4090"], slots=2),
    Machine("b", HOST_TYPES["rtx3060"], slots=2),
    Machine("c", HOST_TYPES["m1max"], slots=2),
]


def recorded(world: World, jobs: Sequence[Job]) -> list[Event]:
    """All that the plan tells in that run."""
    assert world.shell is not None
    plan, told = world.shell.scheduler, list[Event]()
    assert isinstance(plan, Plan)
    plan.decisions.emit, plan.decisions.hears = told.append, lambda _: True
    world.run(jobs)
    return told


def of(kind: type[E], told: Sequence[Event]) -> list[E]:
    """Those of one kind."""
    return [event for event in told if isinstance(event, kind)]


def busy(seed: int, count: int = 250) -> list[Job]:
    """More than three unlike hosts can take at once, of three models, some of it batch."""
    rng = random.Random(seed)
    return [
        Job(
            rng.uniform(0.0, 90.0),
            rng.choices("mno", (6, 3, 1))[0],
            rng.randint(20, 3000),
            rng.randint(5, 300),
            who=rng.choice("xyz"),
            batch=rng.random() < 0.2,
            conversation=rng.choice(["", "c", "d"]),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_recorded_run_can_be_replayed(seed: int) -> None:
    """Each price in each record follows from what stands beside it, to the last digit."""
    mishaps: list[Mishap] = [Straggle("a", 20.0, 20.0), Crash("b", 50.0, 10.0)]
    world = World(UNLIKE, [M, N, O], warm={"a": ["m"], "b": ["n"]}, mishaps=mishaps, seed=seed)
    records, knobs = of(Planned, recorded(world, busy(seed))), Knobs()
    assert {record.kind for record in records} == {"go", "hold", "load"}
    assert {record.knobs for record in records} == {version(knobs)}
    assert any(len(record.options) > 1 for record in records)
    for record in records:
        assert record.options[0].backend == record.backend
        for option in record.options:
            assert replay(record, option, knobs) == terms_of(option)


def test_what_is_chosen_is_the_cheapest() -> None:
    """But for those who held long enough beside a free slot, and where the cheapest was a guess."""
    records = of(Planned, recorded(World(UNLIKE, [M], warm={"a": ["m"]}), busy_with_one()))
    dear = 0
    for record in records:
        totals = [option.terms["total"] for option in record.options]
        dear += totals[0] > min(totals)
    assert len(records) > 100
    assert dear <= 0.08 * len(records)


def busy_with_one() -> list[Job]:
    """The same for one model, without batch."""
    return [Job(job.at, "m", job.prompt_tokens, job.output_tokens) for job in busy(4)]


def test_the_same_run_makes_the_same_record() -> None:
    """To the last digit: nothing in it is chance, or the time of day."""
    runs = [recorded(World(UNLIKE, [M, N, O], seed=5), busy(5)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0]


def world(**more: Any) -> World:
    """Two equal hosts with a model in memory."""
    machines = [Machine(name, HOST_TYPES["rtx3090"]) for name in "ab"]
    return World(machines, [M, N, O], **{"warm": {"a": ["m"], "b": ["m"]}, **more})


def test_a_straggler_is_told_when_it_turns() -> None:
    """Once when it becomes slow, once when it is no more; not at every tick between."""
    mishaps = [Straggle("a", 30.0, 60.0)]
    jobs = [Job(0.5 * number, "m", 200, 200) for number in range(300)]
    told = of(Straggling, recorded(world(mishaps=mishaps, slots_known=True), jobs))
    mine = [event for event in told if event.backend == "a"]
    slow = [event for event in mine if 30.0 < event.at < 90.0]
    assert (slow[0].reason, slow[0].factor < 0.7) == ("slow", True)
    turns = [event.reason == "slow" for event in mine]
    assert turns == [number % 2 == 0 for number in range(len(turns))]
    assert mine[-1].reason == "recovered"


def test_slots_that_are_found_are_told() -> None:
    """Hosts take four at once, and two are believed at first."""
    jobs = [Job(0.3 * number, "m", 100, 300) for number in range(200)]
    told = of(SlotsBelieved, recorded(world(), jobs))
    assert {(event.reason, event.after) for event in told} >= {("seen", 3), ("seen", 4)}
    for event in told:
        assert (event.model, event.after - event.before) == ("m:latest", 1)


def test_a_drain_is_told() -> None:
    """The only host is busy with what leaves no room for another: at last it must run dry."""
    only = [Machine("a", HOST_TYPES["rtx3060"], slots=1)]
    jobs = [Job(0.5 * number, "m", 100, 250) for number in range(60)]
    jobs.append(Job(6.0, "n", 100, 50))
    run = World(only, [M, N], warm={"a": ["m"]}, slots_known=True)
    drain, *_ = of(DrainRequested, recorded(run, jobs))
    assert (drain.backend, drain.victim, drain.wanted) == ("a", "m:latest", "n:latest")
    assert drain.cost_s > drain.last_s > 0.0


def test_a_sample_beyond_belief_is_told_once() -> None:
    """Of each backend and kind, with its value."""
    run = world()
    told = recorded(run, [Job(1.0, "m", 100, 50)])
    assert of(SampleDiscarded, told) == []
    assert run.shell is not None
    plan = run.shell.scheduler
    assert isinstance(plan, Plan)
    speed, size = plan.ledgers["a"].speed, plan.books.model("m:latest").size
    for _ in range(3):
        speed.learn_prompt("m:latest", size, 1e9)
    (event,) = of(SampleDiscarded, told)
    assert (event.backend, event.kind, event.value) == ("a", "prompt_rate", 1e9)


def test_loads_tell_what_they_were_expected_to_take() -> None:
    """And what goes for them."""
    run = World([Machine("a", HOST_TYPES["rtx3060"])], [M, N], warm={"a": ["m"]}, slots_known=True)
    told: list[Event] = []
    assert run.shell is not None
    run.shell.pool._emit = told.append
    run.run([Job(5.0, "n", 100, 50)])
    (load,) = of(LoadStarted, told)
    assert (load.model, load.why, load.victims) == ("n:latest", "call", ("m:latest",))
    assert load.expected_s > 1.0
