"""The product over HTTP before hosts of the virtual world: the same calls, the same figures."""

from __future__ import annotations

import random

import pytest

from balancer.sim.figures import figures
from balancer.sim.jobs import Job, Report
from balancer.sim.loop import run
from balancer.sim.machine import HOST_TYPES, Machine, Model
from balancer.sim.wired import Wired
from balancer.sim.workloads import UNLIKE
from balancer.sim.world import World

pytestmark = pytest.mark.usefixtures("quiet")

M, E = Model("m"), Model("e", 0.3, 0.14, 0.0, embedding=True)
ONE = (Machine("h0", HOST_TYPES["rtx3090"]),)


def both(machines: tuple[Machine, ...], jobs: list[Job], *, warm: bool = True) -> list[Report]:
    """What comes of the jobs over HTTP, and in the virtual world."""
    held = {machine.name: ["m", "e"] for machine in machines} if warm else {}
    wired = run(Wired(machines, [M, E], warm=held).run(jobs, 3600.0))
    return [wired, World(machines, [M, E], warm=held).run(jobs, 3600.0)]


def slice_of_unlike(count: int = 60) -> list[Job]:
    """Calls for six hosts, none like another, at a pace that leaves them time."""
    rng = random.Random(1)
    return [
        Job(0.8 * place, "m", rng.randint(50, 2000), rng.randint(5, 150), who=f"u{place % 3}")
        for place in range(count)
    ]


def test_a_call_takes_as_long_over_http_as_in_the_virtual_world() -> None:
    """To the millisecond: warm, cold, embedded, and the next turn of a conversation."""
    talk = [
        Job(40.0, "m", 600, 40, conversation="c", chain=((1, 600),)),
        Job(0.0, "m", 900, 40, "", False, "c", 1, ((1, 600), (2, 640), (3, 900)), 0, (2, 5.0)),
    ]
    jobs = [Job(1.0, "m", 500, 100), Job(20.0, "e", 300, 0), *talk]
    wired, world = both(ONE, jobs, warm=False)
    assert [r.status for r in wired.records] == ["done"] * len(jobs)
    for ours, theirs in zip(wired.records, world.records, strict=True):
        assert ours.first_at == pytest.approx(theirs.first_at, abs=0.002)
        assert ours.ended_at == pytest.approx(theirs.ended_at, abs=0.002)
        assert (ours.cached, ours.backend) == (theirs.cached, theirs.backend)
    assert (wired.loads, wired.loads_by) == (world.loads, world.loads_by)
    assert wired.records[3].cached > 500


def test_a_slice_is_answered_as_in_the_virtual_world() -> None:
    """TTFT p50 and p99 within a quarter or 50 ms, and nothing is lost."""
    jobs = slice_of_unlike()
    ours, theirs = (figures(jobs, report) for report in both(UNLIKE, jobs))
    assert (ours["calls"], ours["lost"], ours["cut"]) == (len(jobs), 0, 0)
    for name in ("ttft_p50", "ttft_p99"):
        assert ours[name] <= max(1.25 * theirs[name], theirs[name] + 0.05), name


def test_every_decision_is_that_of_the_virtual_world() -> None:
    """More models than memory: calls, loads and what goes for them, at the same instants."""
    models = [Model(f"m{size}", float(size), 1.6 * size) for size in (4, 5, 6, 7, 8, 9)]
    rng = random.Random(2)
    jobs = [
        Job(0.113 + 0.7131 * place, rng.choice(models).name, rng.randint(2, 2000), length, "u")
        for place, length in enumerate(rng.choices(range(5, 150), k=150))
    ]
    machines = tuple(
        Machine(name, HOST_TYPES[name], max_models=2) for name in ("rtx3060", "rtx3090", "m1max")
    )
    wired = run(Wired(machines, models).run(jobs, 3600.0))
    world = World(machines, models).run(jobs, 3600.0)
    assert wired.evictions > 0
    assert (wired.loads_by, wired.evictions) == (world.loads_by, world.evictions)
    for ours, theirs in zip(wired.records, world.records, strict=True):
        assert (ours.backend, ours.status) == (theirs.backend, theirs.status), ours.job
        assert ours.first_at == pytest.approx(theirs.first_at, abs=0.001)
        assert ours.ended_at == pytest.approx(theirs.ended_at, abs=0.001)
    waits_s = [record.first_at - record.arrived_at for record in wired.records if record.first_at]
    assert max(waits_s) > 20.0, "nobody was sent a heartbeat, which is no token"


def test_calls_of_one_instant_come_in_order() -> None:
    """The first of the list takes the one slot, in both."""
    machines = (Machine("h0", HOST_TYPES["rtx3090"], slots=1),)
    jobs = [Job(1.0, "m", 100, 50 + place) for place in range(6)]
    for report in both(machines, jobs):
        firsts = [record.first_at for record in report.records]
        assert firsts == sorted(firsts, key=lambda at: at or 0.0)


def test_who_leaves_is_let_go() -> None:
    """The host drops the call, and the slot serves the next one at once."""
    jobs = [Job(0.0, "m", 100, 1400, leaves_after=2.0), Job(3.0, "m", 100, 10)]
    wired, _ = both(ONE, jobs)
    assert [r.status for r in wired.records] == ["left", "done"]
    second = wired.records[1]
    assert second.first_at == pytest.approx(second.arrived_at + 0.047, abs=0.005)


def test_what_the_run_ends_before_is_left_open() -> None:
    """A call that is not answered in time stays unfinished, and the product still closes."""
    jobs = [Job(0.0, "m", 100, 1400)]
    report = run(Wired(ONE, [M], warm={"h0": ["m"]}).run(jobs, until=1.0))
    (record,) = report.records
    assert (record.status, record.first_at is None) == ("unfinished", False)


def test_settings_reach_the_product() -> None:
    """A key's limit of calls a minute holds, and the refusal is told."""
    config: dict[str, object] = {"limits.rpm": 1}
    jobs = [Job(0.1 * place, "m", 100, 5, who="u") for place in range(3)]
    report = run(Wired(ONE, [M], warm={"h0": ["m"]}, config=config).run(jobs))
    assert [r.status for r in report.records] == ["done", "lost", "lost"]
    assert "429" in report.records[1].error or "minute" in report.records[1].error
