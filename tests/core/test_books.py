"""The books: what the plan learns of slots and speeds, and what outlives it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from balancer.core.dispatch import LoadFailed
from balancer.core.domain import Verdict
from balancer.core.events import SampleDiscarded
from balancer.core.pins import Pin, Pins
from balancer.core.scheduler import Changed, LoadRefused
from tests.core.bench import backend, call, key, resident, tried
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


def test_a_load_of_ours_is_no_strangers_use(bench: Planned) -> None:
    """Its time to expire is a new one in each reading while it loads, and when that has ended."""
    bench.start("a", "m:1")
    bench.pool.pins = Pins([Pin(M, ("a",), 1, key("m:1"))])
    bench.dispatcher.kick()
    bench.sleep(3.0)
    assert bench.loads
    for minute in range(5, 9):
        bench.holds("a", "m:1", minute=minute)
        bench.sleep(1.0)
    bench.loaded()
    bench.holds("a", "m:1", minute=9)
    assert not bench.plan.books.is_strangers("a", M, bench.clock())
    bench.sleep(70.0)
    bench.holds("a", "m:1", minute=15)
    assert bench.plan.books.is_strangers("a", M, bench.clock())


@pytest.mark.parametrize(("moved", "is_use"), [("00.000001Z", False), ("00.1Z", True)])
def test_a_time_to_expire_that_trembles_is_no_use(bench: Planned, moved: str, is_use: bool) -> None:
    """Whoever reckons it anew for each reading may be off by a little."""
    bench.start("a", "m:1", loaded=["m:1"])
    row = resident("m:1") | {"expires_at": f"2026-11-21T12:05:{moved}"}
    bench.pool.note_ps("a", [row], bench.clock())
    assert bench.plan.books.is_strangers("a", M, bench.clock()) is is_use


def test_when_what_was_kept_was_found_beyond_belief(bench: Planned) -> None:
    """By the clock, though nothing has run there yet."""
    bench.start("a", "m:1", loaded=["m:1"])
    told = {"speeds": {"a": {"prompt_rate": 1e12, "samples": {"prompt": 9}}}}
    bench.plan.recall(told, bench.clock(), 0.0)
    bench.plan.note(Changed("a", at=bench.clock()))
    assert {event.at for event in bench.of(SampleDiscarded)} == {bench.clock()}
    assert bench.clock() > 0.0


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


def test_who_left_while_busy_is_not_who_comes_back(bench: Planned) -> None:
    """The name is used again for another machine: nothing of the first is taken for the new one."""
    bench.shape(backend("a", slots=None), "b")
    bench.up("a", "m:1", loaded=["m:1"])
    running = bench.submit()
    bench.speed("a", **SLOW)
    bench.shape("b")
    bench.shape(backend("a", slots=None, url="http://new:11434", weight=2.0), "b")
    bench.up("a", "m:1", loaded=["m:1"])
    ledger = bench.plan.books.ledger("a")
    assert ledger.is_idle
    assert not ledger.speed.is_measured
    assert ledger.speed.prompt(M, bench.plan.books.model(M).size) > SLOW["prompt_rate"]
    believed = bench["a"].load.belief
    before = believed.dump()
    bench.pour(1.0, 60, running)
    assert believed.dump() == before
    assert not believed._trying
    bench.end(running)
    assert at_rest(bench.plan)


def test_what_ends_after_its_backend_left_may_tell_nonsense(bench: Planned) -> None:
    """A sample beyond belief of a machine that is no more: told, and nothing breaks."""
    bench.start("a", "m:1", loaded=["m:1"])
    running = bench.submit(prompt_tokens=1000)
    bench.pour(1.0, 60, running)
    bench.shape(backend("a", url="http://new:11434"))
    bench.end(running, tokens_in=10**9, tokens_out=60, prompt_s=0.03)
    assert [told.kind for told in bench.of(SampleDiscarded)] == ["prompt_rate"]
    assert at_rest(bench.plan)


@pytest.mark.parametrize("ok", [True, False])
def test_a_load_that_ends_after_its_backend_left_leaves_nothing_behind(
    bench: Planned, *, ok: bool
) -> None:
    """No ledger is made for a name that is nobody's."""
    bench.start("a", "m:1")
    bench.start("b", "m:1")
    bench.submit()
    (load,) = bench.loads
    other = "b" if load.backend == "a" else "a"
    bench.shape(other)
    bench.loaded(verdict=Verdict.OK if ok else Verdict.STOPPED)
    bench.dispatcher._note(LoadRefused(load.backend, load.key))
    bench.dispatcher._note(Changed(load.backend))
    assert set(bench.plan.ledgers) == {other}


def test_what_a_load_that_came_to_nothing_was_to_leave_is_not_expected(bench: Planned) -> None:
    """That others have gone by the time somebody else loads the model says nothing of room."""
    bench.shape(backend("a", slots=2))
    bench.up("a", "m:1", "o:1", loaded=["m:1"])
    cold = bench.submit("o:1")
    bench.loaded(verdict=Verdict.OVERDUE)
    assert isinstance(cold.error, LoadFailed)
    bench.holds("a")
    bench.sleep(400.0)
    bench.holds("a", "o:1")
    assert bench.plan.books.room("a").too_much is None


def test_what_runs_yet_on_a_backend_that_left_tells_nothing_of_it(bench: Planned) -> None:
    """Nor of another one under its name."""
    bench.shape("a", "b")
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    clients = [bench.submit(id=f"r{n}", prompt_tokens=1000) for n in range(4)]
    bench.shape("b", backend("a", url="http://elsewhere:11434"))
    for client in clients:
        bench.clock.advance(1.0)
        client.lease.moved()
    assert set(bench.plan.decisions.ratios) == {"b"}
    bench.shape("b")
    bench.end(*clients)
    assert set(bench.plan.decisions.ratios) == {"b"}
    assert at_rest(bench.plan)


def test_a_giant_does_not_pass_for_the_usual_prompt(bench: Planned) -> None:
    """What a host would cut off does not count, nor all that is many times the mean."""
    bench.shape(backend("a"))
    bench.up("a", "m:1", loaded=["m:1"])
    books = bench.plan.books
    books.arrived(call(prompt_tokens=2_600_000), 0.0)
    assert books.usual_prompt(M) == 4096
    for _ in range(100):
        books.arrived(call(prompt_tokens=100), 0.0)
    usual = books.usual_prompt(M)
    assert usual < 150
    books.arrived(call(prompt_tokens=2_600_000), 0.0)
    assert books.usual_prompt(M) < 1.2 * usual
    for _ in range(100):
        books.arrived(call(prompt_tokens=3000), 0.0)
    assert books.usual_prompt(M) > 2500


def test_a_giant_teaches_nothing_of_how_long_tokens_are(bench: Planned) -> None:
    """The host has counted what it read, not what was sent."""
    bench.shape(backend("a"))
    bench.up("a", "m:1", loaded=["m:1"])
    bench.end(bench.submit(prompt_tokens=2_600_000), tokens_in=4096, tokens_out=10)
    assert bench.plan.books.need(call(prompt_tokens=1000)).prompt == 1000.0
    bench.end(bench.submit(prompt_tokens=1000), tokens_in=500, tokens_out=10)
    assert bench.plan.books.need(call(prompt_tokens=1000)).prompt < 1000.0
