"""Whose turn it is: batch, shares and keys, with the real pool."""

from __future__ import annotations

import itertools
import math

import pytest

from balancer.core.knobs import Knobs
from balancer.core.plan import Plan
from balancer.core.scheduler import Commit, Ticket
from tests.core.bench import PoolBench, backend, call
from tests.core.planned import Planned, where


def test_batch_leaves_room(bench: Planned) -> None:
    """It does not take the last slots, which the next interactive call finds free."""
    bench.shape(backend("a", slots=20))
    bench.up("a", "m:1", loaded=["m:1"])
    running = [bench.submit(id=f"b{n}", batch=True) for n in range(20)]
    assert sum(map(bool, where(*running))) == 18
    assert where(bench.submit(id="chat")) == ["a"]
    bench.pour(1.0, 60, *running)
    assert where(*running).count("a") == 18


def test_batch_is_patient_but_not_for_ever(bench: Planned) -> None:
    """After a minute it is a call like any other."""
    bench.take(Plan(bench.pool, Knobs(batch_floor=1e-9)))
    bench.shape(backend("a", slots=20))
    bench.up("a", "m:1", loaded=["m:1"])
    bench.end(bench.submit(id="had its share", batch=True))
    running = [bench.submit(id=f"r{n}") for n in range(18)]
    batch = bench.submit(id="batch", batch=True)
    bench.pour(59.0, 60, *running)
    assert where(batch) == [""]
    bench.pour(2.0, 60, *running)
    assert where(batch) == ["a"]


def test_batch_gets_its_floor() -> None:
    """A tenth of the commits, however many interactive calls there are."""
    bench = PoolBench()
    bench.shape(backend("a", slots=1))
    bench.up("a", "m:1", loaded=["m:1"])
    plan = Plan(bench.pool, Knobs(batch_patience_s=1e6))
    seq, went = itertools.count(), []
    for number in range(10):
        asked = call(id=f"b{number}", batch=True, fair_key="batch")
        plan.enqueue(Ticket(asked, next(seq), frozenset(), (), bench.clock(), math.inf))
    for number in range(60):
        asked = call(id=f"c{number}", fair_key="chat")
        plan.enqueue(Ticket(asked, next(seq), frozenset(), (), bench.clock(), math.inf))
        bench.clock.advance(1.0)
        for effect in plan.plan(bench.clock()):
            if isinstance(effect, Commit):
                lease = bench.pool.lease(effect.ticket.call, "a", 1, "warm")
                assert lease is not None
                bench.pool.note = plan.note
                went.append(effect.ticket.call.batch)
                lease.release()
                for ledger, track in list(plan.books.tracks.values()):
                    plan.books._strike(ledger, track, bench.clock())
                plan.books.tracks.clear()
    assert 0.05 <= sum(went[10:]) / len(went[10:]) <= 0.25


def test_a_light_key_is_not_behind_a_heavy_ones_hundred(bench: Planned) -> None:
    """It is the next to go."""
    bench.shape(backend("a", slots=1))
    bench.up("a", "m:1", loaded=["m:1"])
    first = bench.submit(fair_key="big", prompt_tokens=1000)
    heavy = [bench.submit(id=f"b{n}", fair_key="big", prompt_tokens=1000) for n in range(100)]
    light = bench.submit(id="light", fair_key="small", prompt_tokens=1000)
    bench.end(first)
    assert where(light) == ["a"]
    assert not any(where(*heavy))


def test_a_key_with_its_share_of_slots_lets_others_by(bench: Planned) -> None:
    """But nobody is held back where nobody else waits, and nobody stands behind it."""
    bench.shape(backend("a", slots=4))
    bench.up("a", "m:1", loaded=["m:1"])
    running = [bench.submit(id=f"x{n}", fair_key="x") for n in range(3)]
    other = bench.submit(id="z", fair_key="z")
    bench.plan.turns.fair.tag("y", 1000.0, 1.0, bench.clock())  # y has used more of late
    waiting = [bench.submit(id=f"w{n}", fair_key="x") for n in range(2)]
    late = bench.submit(id="y", fair_key="y")
    bench.end(other)
    assert where(*waiting, late) == ["", "", "a"]
    bench.end(late)
    assert where(*waiting) == ["a", ""]
    bench.end(running[0])
    assert where(*waiting) == ["a", "a"]


@pytest.mark.parametrize("nonsense", [{"tokens_in": 1 << 62}, {"tokens_out": 1 << 62}])
def test_a_backend_that_tells_nonsense_costs_nobody_his_turn(
    bench: Planned, nonsense: dict[str, int]
) -> None:
    """Else its owner would wait for ever, and with so late a time all would be alike."""
    bench.shape(backend("a", slots=1))
    bench.up("a", "m:1", loaded=["m:1"])
    bench.end(bench.submit(fair_key="x"), **nonsense)
    running = bench.submit(fair_key="y")
    waiting = [bench.submit(id=f"r{n}", fair_key=who) for n, who in enumerate("xy")]
    bench.end(running)
    assert where(*waiting) == ["a", ""]
    bench.end(waiting[0])
    assert bench.plan.turns.fair.virtual_time < 60.0
