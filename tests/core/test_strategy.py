"""Strategies by name."""

from __future__ import annotations

import pytest

from balancer.core.decisions import Decisions
from balancer.core.domain import Call
from balancer.core.greedy import POLICIES, Greedy
from balancer.core.knobs import Knobs
from balancer.core.plan import Plan
from balancer.core.scheduler import Ticket
from balancer.core.strategy import STRATEGIES, build
from tests.core.bench import PoolBench, call


def nobody(_: Call, __: int) -> bool:
    """No key may start anything."""
    return False


def test_each_has_its_name() -> None:
    """The plan, and every greedy policy."""
    bench = PoolBench()
    made = {name: type(build(name, bench.pool)) for name in STRATEGIES}
    assert made == {"plan": Plan, **dict.fromkeys(POLICIES, Greedy)}


def test_there_is_no_other() -> None:
    """Whoever asks hears of it, and gets no default."""
    with pytest.raises(KeyError):
        build("random", PoolBench().pool)


def test_the_plan_gets_its_knobs() -> None:
    """Those given, or the usual ones."""
    bench = PoolBench()
    told = build("plan", bench.pool, knobs=Knobs(plan_depth=7))
    usual = build("plan", bench.pool)
    assert isinstance(told, Plan)
    assert isinstance(usual, Plan)
    assert (told.knobs.plan_depth, usual.knobs) == (7, Knobs())


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_another_saw_today_is_forgotten(name: str) -> None:
    """A newcomer watches anew, or not at all: nobody would take back that a backend is slow."""
    decisions = Decisions()
    decisions.slow["a"] = 0.4
    build(name, PoolBench().pool, decisions=decisions)
    assert decisions.slow == {}


@pytest.mark.parametrize("name", STRATEGIES)
def test_all_of_them_ask_whether_a_call_may_start(name: str) -> None:
    """A free slot alone is not enough: its key's own limit counts, at once and in a pass."""
    bench = PoolBench()
    bench.start("a", "m:1", loaded=["m:1"])
    now = bench.clock()
    for may_start, starts in ((lambda *_: True, True), (nobody, False)):
        scheduler = build(name, bench.pool, may_start)
        ticket = Ticket(call(), 1, frozenset(), (), now, now + 60)
        assert (scheduler.begin(ticket, now) is not None) is starts
        waiting = Ticket(call(id="r2"), 2, frozenset(), (), now, now + 60)
        scheduler.enqueue(waiting)
        scheduler.plan(now)
        assert (waiting in scheduler.waiting()) is not starts
