"""What others do, as it is described."""

from __future__ import annotations

from collections import Counter

import pytest

from balancer.sim.world import (
    HOST_TYPES,
    Crash,
    Hang,
    Job,
    Machine,
    Mishap,
    Model,
    Report,
    World,
)

TYPE = HOST_TYPES["rtx3090"]
PUSHES = ("push-least-loaded", "push-warm-first", "push-round-robin")


def world(policy: str, count: int = 3, warm: str = "m", *mishaps: Mishap) -> World:
    """Equal hosts with four slots; *warm*, if any, in memory of the first."""
    hosts = [Machine(f"h{n}", TYPE) for n in range(count)]
    models = [Model("m"), Model("n"), Model("huge", 30.0)]
    return World(hosts, models, policy=policy, warm={"h0": [warm] if warm else []}, mishaps=mishaps)


def at_once(count: int, model: str = "m", output: int = 500) -> list[Job]:
    """So many calls, a millisecond apart."""
    return [Job(1.0 + n / 1000, model, 100, output) for n in range(count)]


def backends(report: Report) -> list[str]:
    """Where each call went."""
    return [record.backend for record in report.records]


def statuses(report: Report) -> list[str]:
    """How each ended."""
    return [record.status for record in report.records]


def test_least_loaded_counts_all_calls_and_rotates() -> None:
    """Warm or cold is all one; of equals who was used longest ago."""
    report = world("push-least-loaded").run(at_once(6))
    assert backends(report) == ["h0", "h1", "h2"] * 2
    report = world("push-least-loaded").run([Job(float(n * 20), "m", 10, 2) for n in range(6)])
    assert backends(report) == ["h0", "h1", "h2"] * 2


def test_warm_first_goes_where_the_model_is() -> None:
    """However many wait there; and where it was asked for, before it is loaded."""
    report = world("push-warm-first").run(at_once(20))
    assert set(backends(report)) == {"h0"}
    assert report.loads == 0
    report = world("push-warm-first", 3, "").run(at_once(5, "n"))
    assert len(set(backends(report))) == 1
    assert report.loads == 1


def test_round_robin_takes_turns() -> None:
    """Whatever is where."""
    report = world("push-round-robin").run(at_once(7))
    assert backends(report) == ["h0", "h1", "h2", "h0", "h1", "h2", "h0"]


def test_pushed_calls_know_no_slots() -> None:
    """The fifth waits in the host's queue, not with us."""
    report = world("push-least-loaded", 1).run(at_once(5))
    assert [record.queued_s for record in report.records] == [0.0] * 5
    first = [record.first_at for record in report.records]
    assert first[4] is not None
    assert first[4] > 5.0


def test_the_central_queue_knows_them() -> None:
    """First come, first served; the fifth waits for a warm slot, as long as it may."""
    report = world("central-warm", 1).run(at_once(5))
    assert [record.queued_s > 0 for record in report.records] == [False] * 4 + [True]


def test_the_central_queue_waits_ten_seconds_for_a_warm_backend() -> None:
    """Then it loads another copy."""
    report = world("central-warm", 2).run(at_once(5, output=4000))
    assert backends(report) == ["h0"] * 4 + ["h1"]
    assert report.records[4].queued_s == pytest.approx(10.0, abs=0.6)
    assert report.loads == 1


def test_the_central_queue_loads_what_is_nowhere() -> None:
    """Once: the next one waits for that load."""
    report = world("central-warm", 2).run(at_once(2, "n", 5))
    assert len(set(backends(report))) == 1
    assert report.loads == 1


def test_only_who_lists_the_model_is_asked() -> None:
    """What fits nowhere is served nowhere."""
    report = world("push-least-loaded").run(at_once(1, "huge"))
    assert statuses(report) == ["lost"]


@pytest.mark.parametrize("policy", PUSHES)
def test_refused_connections_go_on_to_the_next(policy: str) -> None:
    """And after three bad checks nobody is sent there."""
    mishaps = [Crash("h0", 1.0, 600.0)]
    jobs = [Job(2.0 + n, "m", 10, 2) for n in range(60)]
    report = world(policy, 3, "", *mishaps).run(jobs)
    assert Counter(statuses(report)) == {"done": 60}
    late = report.records[30:]
    assert {record.attempts for record in late} == {1}
    assert "h0" not in {record.backend for record in late}


@pytest.mark.parametrize("policy", [*PUSHES, "central-warm"])
def test_what_breaks_is_lost(policy: str) -> None:
    """Before the first byte or after it; nobody watches over a host that hangs."""
    report = world(policy, 1, "m", Crash("h0", 2.0, 5.0)).run(at_once(1))
    assert statuses(report) == ["cut"]
    report = world(policy, 1, "m", Hang("h0", 1.001, 90.0)).run(at_once(1))
    assert statuses(report) == ["lost"]
    assert report.records[0].ended_at == pytest.approx(91.001)
