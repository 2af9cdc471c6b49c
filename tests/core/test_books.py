"""The books: what the plan learns of slots and speeds, and what outlives it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from balancer.core.scheduler import Changed
from tests.core.bench import backend, call, tried
from tests.core.planned import SLOW, M, Planned, at_rest, where


def test_slots_are_tried_one_at_a_time(bench: Planned) -> None:
    """Three streams side by side prove three slots; only first attempts that stream try it."""
    bench.shape(backend("a", slots=None))
    bench.up("a", "m:1", loaded=["m:1"])
    running = [bench.submit(id=f"r{n}") for n in range(2)]
    bench.pour(6.0, 60, *running)
    for more in ({"streaming": False}, {"batch": True}, {"attempts": (tried("b"),), "seq": 0}):
        client = bench.submit(id="no", **more)
        assert where(client) == [""]
        assert client.ticket is not None
        bench.dispatcher.withdraw(client.ticket)
    probe, other = bench.submit(id="probe"), bench.submit(id="other")
    assert where(probe, other) == ["a", ""]
    assert probe.lease.run.probe
    bench.pour(0.5, 60, *running, probe)
    assert bench["a"].load.slots(M) == 3
    bench.pour(6.0, 60, *running, probe)
    assert where(other) == ["a"]


def test_a_probe_that_fails_takes_the_belief_no_further(bench: Planned) -> None:
    """It answered only after another had ended."""
    bench.shape(backend("a", slots=None))
    bench.up("a", "m:1", loaded=["m:1"])
    running = [bench.submit(id=f"r{n}") for n in range(2)]
    bench.pour(6.0, 60, *running)
    probe = bench.submit(id="probe")
    bench.end(running[0])
    bench.pour(1.0, 60, running[1], probe)
    assert bench["a"].load.slots(M) == 2
    assert not bench["a"].load.belief.may_probe(M, bench.clock() + 5.0)


def test_who_waits_behind_fewer_streams_than_believed_lowers_the_belief(bench: Planned) -> None:
    """The next call does not go into that queue."""
    bench.shape(backend("a", slots=None), backend("b", slots=None))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    bench.speed("b", **SLOW)
    running = [bench.submit(id=f"r{n}", prompt_tokens=100) for n in range(2)]
    assert where(*running) == ["a", "a"]
    bench.pour(5.0, 60, running[0])
    assert bench["a"].load.slots(M) == 1
    assert bench["b"].load.slots(M) == 2


def test_a_straggler_is_avoided(bench: Planned) -> None:
    """As soon as its streams tell so, and not before."""
    for name in "ab":
        bench.start(name, "m:1", loaded=["m:1"])
        bench.speed(name)
    first = bench.submit(id="first")
    second = bench.submit(id="second")
    assert where(first, second) == ["a", "b"]
    bench.pour(1.0, 60, first, second)
    for _ in range(6):
        first.lease.moved(3)
        second.lease.moved(30)
        bench.sleep(0.5)
    bench.end(second)
    assert where(bench.submit(id="third")) == ["b"]
    assert where(bench.submit(id="fourth")) == ["b"]


def test_what_was_learned_outlives_a_restart(bench: Planned) -> None:
    """As JSON; also of backends that come later."""
    bench.shape(backend("a", slots=None), backend("b", slots=None))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    for number in range(12):
        client = bench.submit(id=f"r{number}", prompt_tokens=1000)
        bench.pour(2.0, 90, client)
        bench.end(client, tokens_in=1500, tokens_out=180, prompt_s=0.5, decode_s=2.0)
    bench["a"].load.belief.restore({"believed": {M: 5}})
    plan = bench.plan
    kept = json.loads(json.dumps(plan.learned(bench.clock())))
    other = Planned()
    other.shape(backend("a", slots=None))
    other.plan.recall(kept, other.clock(), 0.0)
    other.shape(backend("a", slots=None), backend("b", slots=None))
    other.up("b", "m:1", loaded=["m:1"])
    other.up("a", "m:1", loaded=["m:1"])
    again = json.loads(json.dumps(other.plan.learned(other.clock())))
    assert again["speeds"]["a"] == kept["speeds"]["a"]
    assert again["slots"] == kept["slots"]
    assert again["ratios"] == kept["ratios"] != {}
    assert again["lengths"] == kept["lengths"]
    assert again["rooms"] == kept["rooms"]
    assert other["a"].load.slots(M) == 5
    rates = [(key, fast, slow) for _, key, fast, slow in kept["demand"]["rates"]]
    assert rates == [
        (key, pytest.approx(fast), pytest.approx(slow))
        for _, key, fast, slow in again["demand"]["rates"]
    ]


GARBAGE: list[Any] = [None, 7, "x", [], [1], {"a": 99}, {"a": None}, {"a": []}, {"a": {"a": {}}}]
PARTS = ("speeds", "rooms", "slots", "lengths", "demand", "ratios", "reuse")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("told", GARBAGE, ids=repr)
def test_what_cannot_be_is_not_taken_up(part: str, told: Any) -> None:
    """It is as if that part had not been kept."""
    bench, fresh = Planned(), Planned()
    for each in (bench, fresh):
        each.start("a", "m:1", loaded=["m:1"])
    bench.plan.recall({part: told}, bench.clock(), 0.0)
    fresh.plan.recall({}, fresh.clock(), 0.0)
    for each in (bench, fresh):
        each.plan.note(Changed("a", at=each.clock()))
    assert bench.plan.learned(bench.clock()) == fresh.plan.learned(fresh.clock())


# -- what is known ------------------------------------------------------------------------------


def test_a_runners_cache_is_as_large_as_it_is_now(bench: Planned) -> None:
    """By its context and slots, both of which may become others."""
    bench.shape(backend("a", slots=None))
    bench.up("a", "m:1", loaded=["m:1"])
    books, belief = bench.plan.books, bench["a"].load.belief
    ledger = books.ledgers["a"]

    def tokens() -> int:
        return books._cache_tokens(ledger, M) - 65_536

    assert tokens() == tokens() == 2 * 4096
    belief.restore({"believed": {M: 5}})
    assert tokens() == 5 * 4096
    bench.holds("a", "m:1", context=8192)
    assert tokens() == 5 * 8192


def test_a_call_that_never_began_is_taken_back(bench: Planned) -> None:
    """Promised, then neither here nor counted; what nobody knows of is no mistake."""
    bench.start("a", "m:1", loaded=["m:1"])
    books, asked, now = bench.plan.books, call(), bench.clock()
    assert not books.is_promised(asked)
    books.enter(asked, "a", now, books.need(asked), None)
    assert books.is_promised(asked)
    assert books.in_flight == {(M, ""): 1}
    for _ in range(2):
        books.take_back(asked)
        assert at_rest(bench.plan)
