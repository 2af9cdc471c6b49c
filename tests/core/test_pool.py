"""Members: who may serve, what is granted, and what follows from how it ended."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from balancer.core.domain import (
    BreakerState,
    Candidate,
    CheckResult,
    Mark,
    Residency,
    Switch,
    Verdict,
)
from balancer.core.errors import BalancerError
from balancer.core.events import (
    AttemptEnded,
    AttemptFailed,
    BackendDrained,
    BreakerMoved,
    BreakersReset,
    CatalogChanged,
    CheckEnded,
    HealthFlipped,
    LoadEnded,
    LoadStarted,
    MemberJoined,
    MemberLeft,
    Suspected,
    SwitchMoved,
)
from balancer.core.pool import (
    MOST_KNOWN,
    GateSettings,
    Lease,
    PoolSettings,
    Prospect,
    ProspectKind,
    discreet,
)
from balancer.core.scheduler import Began, Changed, Ended, Fact, FirstByte, LoadingNow
from balancer.core.verdicts import Judgement
from balancer.core.watchdog import Suspect
from tests.core.bench import GB, PoolBench, backend, call, canon, key, outcome, resident, tag

V = Verdict
CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
M = canon("m:1")


@pytest.fixture
def bench() -> PoolBench:
    """Backends a and b, up, both with m:1 in memory and n:1 on disk."""
    bench = PoolBench()
    bench.shape("a", "b")
    for name in "ab":
        bench.up(name, "m:1", "n:1", loaded=["m:1"])
    return bench


def granted(bench: PoolBench, name: str = "a", model: str = "m:1") -> Lease:
    lease = bench.lease(name, model)
    assert lease is not None
    return lease


def settle(bench: PoolBench, lease: Lease, verdict: Verdict = V.OK, **more: object) -> None:
    lease.settle(outcome(verdict, bench.clock(), **more))


def prospect(bench: PoolBench, model: str = "m:1", excluded: str = "", **more: Any) -> Prospect:
    return bench.pool.prospect(call(model, **more), frozenset(excluded))


def names_of(candidates: list[Candidate]) -> list[str]:
    return [c.backend for c in candidates]


def usable(bench: PoolBench, model: str = "m:1", excluded: str = "") -> str:
    """The names of the backends that may serve now, run together."""
    return "".join(names_of(bench.pool.candidates(call(model), frozenset(excluded))))


def trip(bench: PoolBench, name: str = "a") -> None:
    """Open a backend's breaker."""
    bench.blame(name, V.FAULT, 3)
    assert bench[name].gate.state is OPEN


def trip_model(bench: PoolBench, name: str = "a", model: str = "m:1") -> None:
    """Open the breaker of a model on a backend; the model is in memory again."""
    bench.blame(name, V.UNFIT, model=model, weight=2)
    assert bench[name].models[canon(model)].state is OPEN
    bench.holds(name, model)


# -- shape -------------------------------------------------------------------------------------


def test_backends_join_unknown_and_unused() -> None:
    """A new member is told, and serves nothing before its first check."""
    bench = PoolBench()
    assert bench.shape("a", "b") == (["a", "b"], [])
    assert [event.url for event in bench.of(MemberJoined)] == ["http://a:11434", "http://b:11434"]
    assert not bench.pool.is_ready()
    assert bench.changes == 1


def test_the_same_backend_keeps_its_memory(bench: PoolBench) -> None:
    """A reload that changes slots or rules forgets nothing and cuts nothing."""
    member, lease = bench["a"], granted(bench)
    trip(bench, "b")
    assert bench.shape(backend("a", slots=5, deny=("n:1",)), "b") == ([], [])
    assert bench["a"] is member
    assert bench["b"].gate.state is OPEN
    assert bench.pool.running == 1
    assert usable(bench) == "a"
    assert usable(bench, "n:1") == "", "the new rule holds at once"
    assert bench["a"].load.slots(M) == 5
    settle(bench, lease)
    assert bench.pool.running == 0


def test_a_removed_backend_ends_what_it_runs(bench: PoolBench) -> None:
    """It is forgotten at once; its calls end in peace and teach nobody anything."""
    lease, member = granted(bench), bench["a"]
    assert bench.shape("b") == ([], ["a"])
    assert [event.backend for event in bench.of(MemberLeft)] == ["a"]
    assert usable(bench) == "b"
    assert bench.lease("a") is None
    lease.moved()
    settle(bench, lease, V.FAULT)
    assert member.gate.acquire() is not None
    assert [event.outcome.verdict for event in bench.of(AttemptEnded)] == [V.FAULT]


def test_another_url_is_another_backend(bench: PoolBench) -> None:
    """The same name elsewhere begins with nothing, and late news of the old one is not its own."""
    old, member = granted(bench), bench["a"]
    assert bench.shape(backend("a", url="http://elsewhere:1"), "b") == (["a"], ["a"])
    assert bench["a"] is not member
    assert usable(bench) == "b"
    bench.up("a", "m:1", loaded=["m:1"])
    new = granted(bench)
    bench.clock.advance(9.0)
    old.moved()
    settle(bench, old, V.FAULT, weight=9)
    assert bench["a"].load.first_byte_s(M) == 0.0
    assert bench["a"].load.in_flight() == 1
    assert bench["a"].gate.state is CLOSED
    settle(bench, new)


def test_a_removed_backends_load_ends_in_silence(bench: PoolBench) -> None:
    """Its token went with it; the same name with another url starts with a free one."""
    assert bench.pool.take_token("a", key("n:1"), "test")
    bench.shape("b")
    bench.pool.end_load("a", key("n:1"), outcome(V.FAULT))
    bench.shape("a", "b")
    assert bench.pool.take_token("a", key("n:1"), "test")
    assert bench.of(LoadEnded) == []


def test_new_settings_reach_everybody(bench: PoolBench) -> None:
    """Checks, the watchdog, and the rules of breakers, those that exist included."""
    bench.blame("a", V.OK)
    settings = PoolSettings(
        host=GateSettings(2, 1.0, 60.0, 30.0, 10),
        model=GateSettings(1, 10.0, 600.0, 120.0, 6),
        fall=1,
        first_byte_s=90.0,
    )
    bench.pool.configure(settings)
    bench.shape("a", "b")
    assert bench.pool.watchdog.first_byte_s == 90.0
    bench.blame("a", V.UNFIT)
    assert bench["a"].models[M].state is OPEN
    bench.blame("b", V.FAULT, 2)
    assert bench["b"].gate.state is OPEN
    bench.check("a", ok=False)
    assert usable(bench, "n:1") == ""


# -- what may serve ----------------------------------------------------------------------------


def test_a_candidate_is_told_as_it_is(bench: PoolBench) -> None:
    """Everything the scheduler may know, for this key."""
    lease, other = granted(bench), granted(bench, "a", "n:1")
    bench.clock.advance(0.5)
    lease.moved()
    assert bench.pool.take_token("a", key("n:1"), "test")
    first, second = bench.pool.candidates(call(), frozenset())
    assert first == Candidate("a", Residency.LOADED, 1, 2, 2, False, 0.5, 4096, 4 * GB, 1)
    assert second == Candidate("b", Residency.LOADED, 0, 2, 0, True, 0.0, 4096, 4 * GB, 1)
    assert bench.pool.candidates(call("n:1"), frozenset("b"))[0].residency is Residency.LOADING
    settle(bench, lease)
    settle(bench, other)


def test_only_streams_teach_the_time_to_first_byte(bench: PoolBench) -> None:
    """A whole answer's first byte comes with its last."""
    lease = bench.lease("a", streaming=False)
    assert lease is not None
    bench.clock.advance(7.0)
    lease.moved()
    lease.moved()
    assert bench["a"].load.first_byte_s(M) == 0.0
    settle(bench, lease)


def suspect_a(bench: PoolBench) -> None:
    lease = bench.lease("a")
    assert lease is not None
    bench.clock.advance(bench.pool.watchdog.silence_s)
    assert bench.pool.suspects()
    settle(bench, lease)


BARS: dict[str, tuple[Callable[[PoolBench], object], str]] = {
    "not listed": (lambda b: b.lists("a", "n:1"), "b"),
    "rules": (lambda b: b.shape(backend("a", deny=("m:*",)), "b"), "b"),
    "not allowed": (lambda b: b.shape(backend("a", allow=("n:1",)), "b"), "b"),
    "no such route": (lambda b: b.catalog.note_no_route("a", "chat"), "b"),
    "not enabled": (lambda b: b.shape(backend("a", enabled=False), "b"), "disabled"),
    "disabled": (lambda b: b.pool.turn("a", Switch.DISABLED), "disabled"),
    "draining": (lambda b: b.pool.turn("a", Switch.DRAINING), "draining"),
    "down": (
        lambda b: b.check("a", ok=False, count=3, error="refused"),
        "down, refused, next check in . s",
    ),
    "breaker": (trip, "breaker open (was fault), next trial in 2 s"),
    "model's breaker": (trip_model, "breaker of this model open (was unfit), next trial in 1. s"),
    "suspect": (suspect_a, "silent, a canary is under way"),
    "busy": (
        lambda b: b.blame("a", V.BUSY, retry_after_s=2.5),
        "busy, cooling off for 3 s",
    ),
    "misconfigured": (lambda b: b.blame("a", V.MISCONFIGURED), "busy, cooling off for 1 s"),
}


@pytest.mark.parametrize("bar", BARS)
def test_every_bar_keeps_a_backend_out(bench: PoolBench, bar: str) -> None:
    """Not a candidate, no lease past the scheduler; what is alone so says why."""
    put_up, told = BARS[bar]
    assert usable(bench) == "ab"
    put_up(bench)
    assert usable(bench) == "b"
    assert bench.lease("a") is None
    if told != "b":
        text = prospect(bench, excluded="b").text
        assert re.search(rf"\(a: {told.replace('(', '.').replace(')', '.')}\)", text), text


CODES = {
    "not listed": "not listed",
    "rules": "rule",
    "not allowed": "rule",
    "no such route": "route",
    "not enabled": "disabled",
    "disabled": "disabled",
    "draining": "draining",
    "down": "down",
    "breaker": "breaker",
    "model's breaker": "model breaker",
    "suspect": "suspect",
    "busy": "cooling",
    "misconfigured": "cooling",
}


@pytest.mark.parametrize("bar", BARS)
def test_every_bar_has_a_code_and_a_text(bench: PoolBench, bar: str) -> None:
    """One for programs, one for people; and asking is not asking for the model."""
    put_up, _ = BARS[bar]
    put_up(bench)
    before = dict(bench["a"].asked)
    a, b = bench.pool.standings(call(), frozenset())
    assert a.bar is not None
    assert (a.bar.code, b.bar) == (CODES[bar], None)
    assert a.bar.text
    assert (a.returns_in_s > 0 or bar == "suspect", b.returns_in_s) == (True, 0.0)
    bench.pool.prospect(call(), frozenset(), exists=False)
    assert bench["a"].asked == before, "a dry run must not make a trial load the model"


def test_who_was_tried_or_never_read_stands_aside(bench: PoolBench) -> None:
    """The one will not do, of the other nobody knows."""
    bench.shape("a", "b", "c")
    a, _, c = bench.pool.standings(call(), frozenset("a"))
    assert a.bar is not None
    assert c.bar is not None
    assert (a.bar.code, c.bar.code) == ("excluded", "unread")
    assert (a.returns_in_s, c.returns_in_s) == (math.inf, math.inf)


def start_trial(bench: PoolBench) -> None:
    bench.clock.advance(10.0)
    assert len(list(bench.pool.due_trials())) == 1


def lose(bench: PoolBench) -> None:
    bench.check("a", ok=False, count=3)
    bench.clock.advance(60.0)


TRIALS: dict[str, tuple[Callable[[PoolBench], object], str]] = {
    "open": (lambda b: None, "next trial in 2 s"),
    "due": (lambda b: b.clock.advance(10.0), "a trial is due"),
    "under way": (start_trial, "a trial is under way"),
    "down": (lose, "a trial when it is up again"),
    "disabled": (lambda b: b.pool.turn("a", Switch.DISABLED), "no trial while it is disabled"),
}


@pytest.mark.parametrize("case", TRIALS)
def test_when_the_next_trial_is(bench: PoolBench, case: str) -> None:
    """A backend that is down, or switched off, has none, however long it waited."""
    trip(bench)
    happens, told = TRIALS[case]
    happens(bench)
    assert bench.pool.view("a").breakers[0].trial == told
    assert bench.pool.view("b").breakers[0].trial == ""


def test_a_models_trial_waits_for_somebody_who_asks(bench: PoolBench) -> None:
    """Nothing is loaded only to try it."""
    trip_model(bench, "a", "n:1")
    told = next(b for b in bench.pool.view("a").breakers if b.model == "n:1")
    assert told.trial.startswith("next trial in")
    bench.holds("a")
    bench.clock.advance(1000.0)
    told = next(b for b in bench.pool.view("a").breakers if b.model == "n:1")
    assert told.trial == "a trial when a call asks for it"


def test_an_excluded_backend_is_no_candidate(bench: PoolBench) -> None:
    """Whoever was tried is not tried again."""
    assert usable(bench, excluded="a") == "b"


def test_a_model_in_memory_with_a_free_slot_is_room(bench: PoolBench) -> None:
    """On disk is not; full is not."""
    assert bench.pool.has_room(call())
    assert not bench.pool.has_room(call("n:1"))
    leases = [granted(bench, name) for name in "aabb"]
    assert not bench.pool.has_room(call())
    for lease in leases:
        settle(bench, lease)


def test_time_alone_is_told_in_advance(bench: PoolBench) -> None:
    """The end of a cool-off is no event: the dispatcher must ask for the instant."""
    assert bench.pool.next_change(bench.clock()) == math.inf
    bench.blame("a", V.BUSY)
    assert bench.pool.next_change(bench.clock()) == bench.clock() + 1.0
    assert PoolBench().pool.next_change(0.0) == math.inf


# -- prospects ---------------------------------------------------------------------------------


def test_a_usable_backend_is_an_open_prospect(bench: PoolBench) -> None:
    """Nothing more to say."""
    assert prospect(bench) == Prospect(ProspectKind.OPEN)


def test_the_first_to_be_back_sets_the_time(bench: PoolBench) -> None:
    """Breaker, check or cool-off: whichever backend may serve first; the operator has no time."""
    trip(bench)
    bench.pool.turn("b", Switch.DRAINING)
    away = prospect(bench)
    assert away.kind is ProspectKind.AWAY
    assert away.retry_in_s == pytest.approx(bench["a"].gate.retry_in())
    assert re.fullmatch(
        r"No backend can serve 'm:1' now \(a: breaker open \(was fault\), next trial in 2 s; "
        r"b: draining\)\. Retry after [12] s\.",
        away.text,
    )
    bench.pool.turn("a", Switch.DISABLED)
    away = prospect(bench)
    assert math.isinf(away.retry_in_s)
    assert away.text == "No backend can serve 'm:1' now (a: disabled; b: draining)."


def test_the_later_of_two_waits_counts(bench: PoolBench) -> None:
    """Cooling off for a minute and a trial in a second: a minute."""
    bench.blame("a", V.BUSY, retry_after_s=60.0)
    bench["a"].gate.trip("test")
    assert prospect(bench, excluded="b").retry_in_s == pytest.approx(60.0)


def test_a_backend_that_is_down_is_back_with_its_next_check(bench: PoolBench) -> None:
    """That is the earliest anybody can know."""
    bench.check("a", ok=False, count=3)
    away = prospect(bench, excluded="b")
    assert away.retry_in_s == pytest.approx(bench["a"].health.due_in())
    assert 0 < away.retry_in_s <= 6.0


def test_a_trial_under_way_may_end_any_moment(bench: PoolBench) -> None:
    """Half-open counts as about to be back, not as the longest a trial may take."""
    trip_model(bench)
    bench.clock.advance(bench["a"].models[M].retry_in())
    due = prospect(bench, excluded="b")
    assert "a trial is due" in due.text
    (trial,) = bench.pool.due_trials()
    away = prospect(bench, excluded="b")
    assert away.retry_in_s == 0.0
    assert "a trial is under way" in away.text
    trial.permit.settle(Mark.NEITHER)


def test_all_tried_is_exhausted(bench: PoolBench) -> None:
    """Those who have the model were asked."""
    assert prospect(bench, excluded="ab").kind is ProspectKind.EXHAUSTED


def test_an_unknown_model_is_not_found_and_something_close_is_named(bench: PoolBench) -> None:
    """Ollama's words, in which its clients look for 'not found'."""
    bench.lists("b", "llama3.2:1b")
    unknown = prospect(bench, "llama3.3:1b")
    assert unknown.kind is ProspectKind.UNKNOWN
    assert unknown.text == (
        "model 'llama3.3:1b' not found on any of 2 backends, try pulling it first (ollama pull "
        "llama3.3:1b goes to all 2). Closest: llama3.2:1b"
    )
    assert prospect(bench, "zzzzzz", path="/api/embed").text.startswith('model "zzzzzz" not found')
    bench.shape("a")
    assert prospect(bench, "zzzzzz").text == (
        "model 'zzzzzz' not found, try pulling it first (ollama pull zzzzzz)"
    )


def test_a_model_known_only_where_nobody_answers_is_away(bench: PoolBench) -> None:
    """Never 'not found': clients would pull it, or believe it stopped."""
    bench.lists("b", "n:1")
    bench.check("a", ok=False, count=3, error="HTTP 404: Not Found")
    away = prospect(bench)
    assert away.kind is ProspectKind.AWAY
    assert "a: down" in away.text
    assert "not found" not in away.text.lower()
    bench.clock.advance(86400.0)
    assert prospect(bench).kind is ProspectKind.UNKNOWN, "a day later it is forgotten"


def test_a_damaged_model_is_not_told_as_not_found(bench: PoolBench) -> None:
    """The backend lists it and denies it: its own words must not come through a 503."""
    for _ in range(3):
        lease = granted(bench)
        settle(bench, lease, V.MISSING, text="model 'm:1' not found")
        bench.clock.advance(1.0)
        bench.lists("a", "m:1", "n:1")
    assert bench["a"].models[M].state is OPEN
    text = prospect(bench, excluded="b").text
    assert "model 'm:1' missing" in text


def test_rules_that_allow_it_nowhere_are_told_as_such(bench: PoolBench) -> None:
    """The model is there, and stays where it is: nothing to pull, nothing to wait for."""
    bench.shape(backend("a", deny=("m:*",)), backend("b", allow=("n:*",)))
    told = prospect(bench)
    assert told.kind is ProspectKind.FORBIDDEN
    assert "not found" not in told.text


def test_a_route_that_nobody_has_is_told_as_such(bench: PoolBench) -> None:
    """The model is there; an older Ollama lacks the route."""
    for name in "ab":
        bench.catalog.note_no_route(name, "chat")
    told = prospect(bench)
    assert (told.kind, told.retry_in_s) == (ProspectKind.AWAY, math.inf)
    assert "/api/chat" in told.text
    assert prospect(bench, path="/api/generate").kind is ProspectKind.OPEN


def test_a_route_that_need_not_be_there_is_none_if_nobody_has_it(bench: PoolBench) -> None:
    """Waiting would not help: it is not that a backend is too old."""
    path = "/v1/messages/count_tokens"
    bench.catalog.note_no_route("a", "v1_count_tokens")
    assert prospect(bench, path=path).kind is ProspectKind.OPEN
    bench.catalog.note_no_route("b", "v1_count_tokens")
    assert prospect(bench, path=path).kind is ProspectKind.NO_ROUTE


def test_nothing_is_unknown_before_everybody_was_asked() -> None:
    """A start is no reason for a 404, and no backend at all is none either."""
    bench = PoolBench()
    assert prospect(bench).text == "There is no backend yet."
    bench.shape("a", "b")
    bench.up("a", "n:1")
    early = prospect(bench)
    assert (early.kind, early.retry_in_s) == (ProspectKind.AWAY, 0.5)
    bench.up("b", "n:1")
    assert prospect(bench).kind is ProspectKind.UNKNOWN


def test_whom_nobody_reached_yet_may_have_it() -> None:
    """So "not found" would be a lie: 503 at once, that names the backend and what is close."""
    bench = PoolBench()
    bench.shape("a", "b")
    bench.up("a", "llama3.2:1b")
    bench.check("b", ok=False, error="404 Not Found")
    away = prospect(bench, "llama3.3:1b")
    assert (away.kind, away.retry_in_s) == (ProspectKind.AWAY, math.inf)
    assert away.text == (
        "Nobody has 'llama3.3:1b', but not all backends have answered yet (b: 404 missing). "
        "Closest: llama3.2:1b"
    )


def test_whom_nobody_reaches_for_a_minute_is_waited_for_no_more() -> None:
    """A computer that is switched off would else make a 503 of every misspelt name."""
    bench = PoolBench()
    bench.shape("a", "b")
    bench.up("a", "llama3.2:1b")
    bench.check("b", ok=False)
    bench.clock.advance(59)
    assert prospect(bench, "llama3.3:1b").kind is ProspectKind.AWAY
    bench.clock.advance(2)
    assert prospect(bench, "llama3.3:1b").kind is ProspectKind.UNKNOWN


@pytest.mark.parametrize("reason", ["disabled", "denied"])
def test_whom_nobody_would_use_need_not_answer(reason: str) -> None:
    """A backend that the operator or its rules rule out cannot make a model unknown."""
    bench = PoolBench()
    bench.pool.reshape([backend("a"), backend("b", deny=("m*",) if reason == "denied" else ())])
    bench.up("a", "n:1")
    bench.check("b", ok=False)
    assert prospect(bench).kind is ProspectKind.AWAY or reason == "denied"
    if reason == "disabled":
        bench.pool.turn("b", Switch.DISABLED)
    assert prospect(bench).kind is ProspectKind.UNKNOWN


def test_a_list_that_cannot_be_read_settles_the_question(bench: PoolBench) -> None:
    """Whoever waits for it hears; of a backend that has left nothing is heard."""
    bench.shape("a", "b", "c")
    bench.check("c")
    assert prospect(bench, "zzz").kind is ProspectKind.AWAY
    before = bench.changes
    bench.pool.note_failed("c")
    bench.pool.note_failed("zzz")
    assert bench.changes == before + 1
    assert prospect(bench, "zzz").retry_in_s == math.inf
    assert prospect(bench, "zzz").text.endswith("(c: its models are not read yet).")


def test_discretion_spares_every_spelling() -> None:
    """Clients look for the words without regard to case."""
    assert discreet("Not Found: NOT FOUND") == "missing: missing"


# -- leases ------------------------------------------------------------------------------------


def test_a_lease_takes_a_slot_and_gives_it_back_once(bench: PoolBench) -> None:
    """Settled a second time it changes nothing and tells nothing."""
    lease = granted(bench)
    assert bench["a"].load.counts() == {M: 1}
    assert bench.pool.running == 1
    settle(bench, lease)
    settle(bench, lease, V.FAULT)
    assert bench["a"].load.counts() == {}
    assert [event.outcome.verdict for event in bench.of(AttemptEnded)] == [V.OK]


def test_slots_are_never_exceeded(bench: PoolBench) -> None:
    """The third call on two slots gets nothing, whatever the scheduler thought."""
    leases = [granted(bench), granted(bench)]
    assert bench.lease("a") is None
    assert bench.lease("zzz") is None
    for lease in leases:
        settle(bench, lease)


@pytest.mark.parametrize("verdict", V)
def test_an_attempt_that_failed_is_told_as_such(bench: PoolBench, verdict: V) -> None:
    """Even if nobody hears of the others; what a caller did is no failure."""
    bench.blame("a", verdict)
    harmless = verdict in (V.OK, V.CALLER, V.GONE, V.STOPPED)
    assert len(bench.of(AttemptEnded)) == 1
    assert len(bench.of(AttemptFailed)) == (not harmless)
    bench.events.clear()
    bench.pool._hears = lambda _: False
    bench.shape("b", "c")
    bench.up("b", "m:1")
    bench.blame("b", verdict)
    assert len(bench.of(AttemptEnded)) == (not harmless)


def test_a_lease_that_was_not_needed_teaches_nothing(bench: PoolBench) -> None:
    """Given back unsent: no mark, and the attempt says so."""
    bench.blame("a", V.FAULT, 2)
    granted(bench).release()
    (_, _, event) = bench.of(AttemptEnded)
    assert (event.outcome.verdict, event.outcome.text) == (V.STOPPED, "never sent")
    bench.blame("a", V.FAULT)
    assert bench["a"].gate.state is OPEN, "three in a row, the one between counted for nothing"


def test_a_lease_that_is_dropped_warns(bench: PoolBench) -> None:
    """Nobody may forget to settle."""
    lease = granted(bench)
    leases = [lease]
    bench["a"].leases.clear()
    del lease
    with pytest.warns(ResourceWarning, match="a lease on a leaked"):
        leases.clear()


def test_a_lease_says_what_it_was_for(bench: PoolBench) -> None:
    """Number, why and whether a load was waited for go on to whoever holds it."""
    lease = bench.pool.lease(call(), "a", 3, "cold")
    assert lease is not None
    assert (lease.number, lease.why, lease.cold) == (3, "cold", True)
    lease.release()


def test_revoking_asks_the_holder_once_nothing_has_come(bench: PoolBench) -> None:
    """Without a holder, after a byte, or after the end it is not asked."""
    heard: list[str] = []
    lease, begun = granted(bench), granted(bench)
    lease.revoke(Judgement(V.FAULT, text="nobody listens"))
    lease.on_revoke = begun.on_revoke = lambda judgement: heard.append(judgement.text)
    begun.moved()
    for each in (lease, begun):
        each.revoke(Judgement(V.FAULT, text="dead"))
    assert heard == ["dead"]
    settle(bench, lease)
    lease.revoke(Judgement(V.FAULT, text="late"))
    assert heard == ["dead"]
    settle(bench, begun)


def test_the_scheduler_hears_of_first_bytes_and_ends(bench: PoolBench) -> None:
    """How long each took, and whether it went well."""
    facts: list[Fact] = []
    bench.pool.note = facts.append
    lease = granted(bench)
    bench.clock.advance(2.0)
    lease.moved()
    lease.moved()
    bench.clock.advance(3.0)
    settle(bench, lease)
    bench.blame("b", V.FAULT)
    began, first, ended, *others = facts
    run = lease.run
    start = run.at
    assert (began, first) == (Began(run), FirstByte(run, start + 2.0))
    assert isinstance(ended, Ended)
    assert (ended.run, ended.at, ended.outcome.verdict) == (run, start + 5.0, V.OK)
    assert (run.backend, run.key, run.first_at, run.records) == ("a", key("m:1"), start + 2.0, 2)
    failed = [fact for fact in others if isinstance(fact, Ended)]
    assert [(fact.run.backend, fact.outcome.verdict) for fact in failed] == [("b", V.FAULT)]


# -- what follows from an end ------------------------------------------------------------------


def test_success_is_learned(bench: PoolBench) -> None:
    """The model is in memory with these options, cool-offs shorten, trouble is forgotten."""
    bench.blame("a", V.MISCONFIGURED, text="refuses us: who")
    assert bench["a"].trouble == "refuses us: who"
    bench.clock.advance(1.0)
    lease = granted(bench, "a", "n:1")
    settle(bench, lease)
    assert bench["a"].trouble == ""
    assert bench.pool.candidates(call("n:1"), frozenset("b"))[0].residency is Residency.LOADED


def test_faults_in_a_row_open_the_backends_breaker(bench: PoolBench) -> None:
    """Three, without a success between them; every model there is affected, others are not."""
    bench.blame("a", V.FAULT, 2)
    bench.blame("a", V.OK)
    bench.blame("a", V.FAULT, 2)
    assert usable(bench) == "ab"
    bench.blame("a", V.FAULT)
    assert usable(bench) == usable(bench, "n:1") == "b"
    (event,) = bench.of(BreakerMoved)
    assert (event.backend, event.model, event.old, event.new) == ("a", None, CLOSED, OPEN)
    assert event.reason == "was fault"


def test_a_model_that_fails_is_out_there_alone(bench: PoolBench) -> None:
    """One load failure opens its breaker; what is in memory is asked again."""
    bench.refreshed.clear()
    bench.blame("a", V.UNFIT, weight=2)
    assert usable(bench) == "b"
    assert usable(bench, "n:1") == "ab"
    assert bench.refreshed == ["a"]
    (event,) = bench.of(BreakerMoved)
    assert event.model == "m:1"


def test_several_models_that_fail_are_the_backends_fault(bench: PoolBench) -> None:
    """Two within a minute, until three such failures: no weight of a model's counts for it."""
    bench.blame("a", V.UNFIT, model="m:1")
    bench.blame("a", V.UNFIT, model="n:1")
    bench.blame("a", V.UNFIT, model="m:1", weight=9)
    assert bench["a"].gate.state is CLOSED
    bench.blame("a", V.UNFIT, model="n:1")
    assert bench["a"].gate.state is OPEN


def test_models_that_fail_now_and_then_are_not(bench: PoolBench) -> None:
    """Each alone in its minute is its own fault."""
    for model in ("m:1", "n:1", "m:1", "n:1"):
        bench.blame("a", V.UNFIT, model=model)
        bench.clock.advance(61.0)
    assert bench["a"].gate.state is CLOSED


def test_a_call_that_kills_runners_opens_one_breaker(bench: PoolBench) -> None:
    """Its second crash is held against nobody."""
    bench.blame("a", V.UNFIT, weight=2, crash=True)
    bench.blame("b", V.UNFIT, weight=2, crash=True, repeated_crash=True)
    assert usable(bench) == "b"


def test_a_missing_model_is_forgotten_there(bench: PoolBench) -> None:
    """The list is read again; a trial of it is not worth a load any more."""
    bench["a"].asked[M] = key("m:1")
    bench.refreshed.clear()
    bench.blame("a", V.MISSING)
    assert usable(bench) == "b"
    assert bench.refreshed == ["a"]
    assert bench["a"].asked == {}
    assert bench["a"].gate.state is CLOSED


def test_a_route_that_is_lacking_is_remembered(bench: PoolBench) -> None:
    """For that route there, and no other."""
    bench.blame("a", V.NO_ROUTE)
    assert usable(bench) == "b"
    assert prospect(bench, excluded="b", path="/api/generate").kind is ProspectKind.OPEN


def test_a_load_that_finds_no_route_says_nothing_of_the_calls(bench: PoolBench) -> None:
    """Loads go by a route of our choice."""
    assert bench.pool.take_token("a", key("n:1"), "test")
    bench.pool.end_load("a", key("n:1"), outcome(V.NO_ROUTE))
    assert prospect(bench, excluded="b", path="/api/generate").kind is ProspectKind.OPEN


@pytest.mark.parametrize("verdict", [V.CALLER, V.UNCLEAR, V.ACCOUNT, V.STALE, V.GONE, V.STOPPED])
def test_what_is_nobodys_fault_leaves_no_trace(bench: PoolBench, verdict: Verdict) -> None:
    """However often."""
    bench.blame("a", verdict, 20)
    assert usable(bench) == "ab"
    assert bench.of(BreakerMoved) == []


def test_a_ratio_does_not_open_the_last_one(bench: PoolBench) -> None:
    """Half of ten failed: b could take over, then nobody could."""
    for name in "ab":
        for _ in range(5):
            bench.blame(name, V.OK)
            bench.blame(name, V.FAULT)
    assert bench["a"].gate.state is OPEN
    assert bench["b"].gate.state is CLOSED


def test_the_last_one_takes_it_slow_until_it_is_better(bench: PoolBench) -> None:
    """Kept closed only because nobody else is there: one call at a time; time alone ends it."""
    bench.shape("a")
    for _ in range(5):
        bench.blame("a", V.OK)
        bench.blame("a", V.FAULT)
    lease = granted(bench)
    assert bench.lease("a") is None
    assert bench.pool.candidates(call(), frozenset())[0].slots == 1
    turns = 0
    while bench.pool.candidates(call(), frozenset())[0].slots == 1:
        turns += 1
        bench.clock.now = bench.pool.next_change(bench.clock())
    assert turns == 10
    assert bench.pool.next_change(bench.clock()) == math.inf
    settle(bench, lease)


def test_the_last_one_that_is_held_by_time_is_let_go_by_time(bench: PoolBench) -> None:
    """What went well lapses first: from then on one call at a time, and the end of that is told."""
    bench.shape("a")
    bench.blame("a", V.OK, count=20)
    bench.clock.advance(25.0)
    for _ in range(5):
        bench.blame("a", V.OK)
        bench.blame("a", V.FAULT)
    assert bench.pool.next_change(bench.clock()) == math.inf
    bench.clock.advance(6.0)
    assert bench.pool.slots("a", M) == 1
    told: list[Fact] = []
    bench.pool.note = told.append
    while bench.pool.slots("a", M) == 1:
        bench.clock.now = bench.pool.next_change(bench.clock())
    bench.pool.tell_time(bench.clock())
    assert told == [Changed("a", at=bench.clock())]
    assert bench.pool.next_change(bench.clock()) == math.inf


def test_the_last_one_for_a_model_is_not_opened_for_a_ratio_either(bench: PoolBench) -> None:
    """Whether the other has the model, may serve it and still trusts it is what counts."""

    def half_bad(name: str) -> BreakerState:
        for _ in range(6):
            bench.blame(name, V.OK)
            bench.blame(name, V.UNFIT)
            bench.holds(name, "m:1")
            if bench[name].models[M].state is OPEN:
                break
        return bench[name].models[M].state

    trip_model(bench, "b")
    assert half_bad("a") is CLOSED
    bench.pool.reset("b")
    bench.shape("a", backend("b", deny=("m:1",)))
    assert half_bad("a") is CLOSED
    bench.shape("a", backend("b", enabled=False))
    assert half_bad("a") is CLOSED
    bench.shape("a", "b")
    assert half_bad("a") is OPEN


def test_most_backends_open_at_once_is_our_own_fault() -> None:
    """The waits do not grow while most of the pool is open; when it is not, they do."""
    bench = PoolBench()
    bench.shape("a", "b", "c")
    for name in "abc":
        bench.up(name, "m:1", loaded=["m:1"])
    trip(bench, "a")
    assert bench["c"].gate.grow
    trip(bench, "b")
    assert not bench["c"].gate.grow
    bench.pool.reset("a")
    bench.pool.reset("b")
    trip(bench, "c")
    assert bench["c"].gate.grow


def test_the_only_backend_is_not_most_of_the_pool() -> None:
    """One of one is no majority that would speak against us."""
    bench = PoolBench()
    bench.start("a", "m:1", loaded=["m:1"])
    trip(bench, "a")
    assert bench["a"].gate.grow


# -- loads -------------------------------------------------------------------------------------


def test_a_backend_has_one_load_token(bench: PoolBench) -> None:
    """Taken by one load, back when that ends, and told both times."""
    assert bench.pool.take_token("a", key("n:1"), "no copy in memory")
    assert not bench.pool.take_token("a", key("m:1"), "again")
    assert not bench.pool.take_token("zzz", key("m:1"), "nobody")
    assert bench.pool.loading(key("n:1")) == [LoadingNow("a", bench.clock(), key("n:1"))]
    bench.clock.advance(4.0)
    bench.pool.end_load("a", key("n:1"), outcome())
    assert bench.pool.loading(key("n:1")) == []
    assert bench.pool.candidates(call("n:1"), frozenset("b"))[0].residency is Residency.LOADED
    (began,), (ended,) = bench.of(LoadStarted), bench.of(LoadEnded)
    assert (began.backend, began.model, began.why) == ("a", "n:1", "no copy in memory")
    assert (ended.ok, ended.load_s) == (True, 4.0)


def test_only_the_load_under_way_can_end(bench: PoolBench) -> None:
    """Another key, no load, no backend: nothing happens."""
    bench.pool.end_load("a", key("n:1"), outcome())
    assert bench.pool.take_token("a", key("n:1"), "test")
    bench.pool.end_load("a", key("m:1"), outcome())
    bench.pool.end_load("zzz", key("n:1"), outcome())
    assert bench.of(LoadEnded) == []
    bench.pool.end_load("a", key("n:1"), outcome())
    assert len(bench.of(LoadEnded)) == 1


def test_a_load_needs_both_breakers_closed(bench: PoolBench) -> None:
    """No load where no call may go; no permit is lost by asking."""
    trip_model(bench, "a", "n:1")
    assert not bench.pool.take_token("a", key("n:1"), "test")
    assert bench.pool.take_token("a", key("m:1"), "test")
    trip(bench, "b")
    assert not bench.pool.take_token("b", key("m:1"), "test")


def test_a_trials_load_needs_no_permit(bench: PoolBench) -> None:
    """The trial holds its own; what it finds is learned, but its marks are the trial's."""
    trip_model(bench, "a", "n:1")
    assert bench.pool.take_token("a", key("n:1"), "trial", trial=True)
    assert not bench.pool.take_token("a", key("n:1"), "trial", trial=True)
    bench.pool.end_load("a", key("n:1"), outcome(V.UNFIT, weight=9))
    assert bench["a"].gate.state is CLOSED
    assert not bench["a"].loading


def test_a_failed_load_counts_like_a_call(bench: PoolBench) -> None:
    """A load failure of weight two opens the model's breaker there."""
    assert bench.pool.take_token("a", key("n:1"), "test")
    bench.pool.end_load("a", key("n:1"), outcome(V.UNFIT, weight=2))
    assert usable(bench, "n:1") == "b"
    assert not bench.of(LoadEnded)[0].ok


def test_a_load_of_what_was_there_with_other_options_is_told(bench: PoolBench) -> None:
    """By what was in memory when it began, even if that is gone by its end."""
    bench.holds("a", "n:1", context=4096)
    assert bench.pool.take_token("a", key("n:1", num_ctx=8192), "test")
    bench.holds("a")
    bench.pool.end_load("a", key("n:1", num_ctx=8192), outcome())
    assert bench.pool.take_token("a", key("n:1", num_ctx=8192, num_thread=4), "test")
    bench.pool.end_load("a", key("n:1", num_ctx=8192, num_thread=4), outcome())
    assert bench.pool.take_token("b", key("n:1", num_ctx=8192), "test")
    bench.pool.end_load("b", key("n:1", num_ctx=8192), outcome())
    assert [ended.reloads for ended in bench.of(LoadEnded)] == ["num_ctx", "options", ""]


def test_a_load_that_fails_with_the_usual_options_counts(bench: PoolBench) -> None:
    """Those that the operator pinned are no caller's choice; any others say nothing."""
    pinned, other = key("n:1", num_ctx=8192), key("n:1", num_ctx=4096)
    bench.pool.usual = lambda _: pinned
    for wanted, names in ((other, "ab"), (pinned, "b")):
        assert bench.pool.take_token("a", wanted, "test")
        bench.pool.end_load("a", wanted, outcome(V.UNFIT, weight=2, caused_load=True))
        assert usable(bench, "n:1") == names


def test_nothing_is_planned_between_a_loads_end_and_its_news(bench: PoolBench) -> None:
    """The pool keeps still, breakers that open included; after a trial's load nobody follows."""
    assert bench.pool.take_token("a", key("n:1"), "test")
    before, version = bench.changes, bench.pool.version
    bench.pool.end_load("a", key("n:1"), outcome(V.UNFIT, weight=2))
    assert bench.changes == before
    assert bench.pool.version > version
    assert bench.pool.take_token("a", key("n:1"), "trial", trial=True)
    bench.pool.end_load("a", key("n:1"), outcome())
    assert bench.changes > before


# -- checks ------------------------------------------------------------------------------------


def test_the_first_check_decides(bench: PoolBench) -> None:
    """Good: lists are to be read; bad: it is down, and its list is not waited for."""
    bench.shape("a", "b", "c", "d")
    bench.refreshed.clear()
    bench.check("c")
    bench.check("d", ok=False)
    assert bench.refreshed == ["c"]
    assert [(e.backend, e.up) for e in bench.of(HealthFlipped)][-2:] == [("c", True), ("d", False)]
    assert bench["c"].load.slots(M) == 2, "no slow start at the start"
    assert bench.of(HealthFlipped)[-2].reason == "Ollama 0.12.0"


def test_checks_of_a_backend_that_has_left_change_nothing(bench: PoolBench) -> None:
    """Late news is no error."""
    before = len(bench.events)
    bench.check("zzz")
    bench.lists("zzz", "m:1")
    bench.holds("zzz", "m:1")
    assert len(bench.events) == before


def test_a_backend_goes_down_and_comes_back_slowly(bench: PoolBench) -> None:
    """Three bad checks, two good ones; what was in memory is unknown, and slots grow again."""
    bench.check("a", ok=False, count=2)
    assert usable(bench) == "ab"
    bench.check("a", ok=False)
    assert usable(bench) == "b"
    assert bench.catalog.loaded("a") == []
    bench.check("a")
    assert usable(bench) == "b"
    bench.refreshed.clear()
    bench.check("a")
    assert usable(bench) == "ab"
    assert bench.refreshed == ["a"]
    assert bench["a"].load.slots(M) == 1
    assert len(bench.of(CheckEnded)) == 7
    assert bench["a"].gate.state is CLOSED, "checks do not touch the breaker"


def test_only_certain_death_takes_calls_away(bench: PoolBench) -> None:
    """Down but still connecting may be slow; not even a connection is dead: whoever waits goes."""
    heard: list[Judgement] = []
    lease, begun = granted(bench), granted(bench)
    lease.on_revoke = begun.on_revoke = heard.append
    begun.moved()
    bench.check("a", ok=False, count=3)
    assert heard == []
    bench.check("a", ok=False, connected=False, error="refused")
    assert heard == [Judgement(V.FAULT, text="is down: refused")]
    settle(bench, lease, V.FAULT)
    settle(bench, begun)


def test_calls_may_end_while_they_are_taken_away(bench: PoolBench) -> None:
    """Settling inside the call-back disturbs nobody, breakers that open by it included."""
    bench.shape(backend("a", slots=3), "b")
    for lease in [granted(bench) for _ in range(3)]:
        lease.on_revoke = lambda _, lease=lease: settle(bench, lease, V.FAULT)
    bench.check("a", ok=False, connected=False, count=3)
    assert bench.pool.running == 0
    assert bench["a"].gate.state is OPEN


def test_a_good_check_brings_a_trial_forward_once(bench: PoolBench) -> None:
    """It never closes the breaker."""
    trip(bench)
    assert bench["a"].gate.retry_in() > 0
    bench.check("a")
    assert bench["a"].gate.state is OPEN
    assert bench["a"].gate.retry_in() == 0


def test_lists_are_told_when_they_change(bench: PoolBench) -> None:
    """The same again is no news; the last backend to be read for the first time is."""
    before = len(bench.of(CatalogChanged))
    changes = bench.changes
    bench.lists("a", "m:1", "n:1")
    assert bench.changes == changes
    bench.holds("a", "m:1")
    assert len(bench.of(CatalogChanged)) == before
    bench.lists("a", "m:1")
    bench.holds("a")
    assert [(e.models, e.loaded) for e in bench.of(CatalogChanged)][before:] == [
        (1, ("m:1",)),
        (1, ()),
    ]
    bench.shape("a", "b", "c")
    changes = bench.changes
    bench.lists("c")
    assert bench.changes == changes + 1, "empty as before, but now it is known"


# -- trials ------------------------------------------------------------------------------------


def due(bench: PoolBench) -> list[tuple[str, str | None]]:
    """The trials that are due, each given back undecided."""
    trials = list(bench.pool.due_trials())
    for trial in trials:
        trial.permit.settle(Mark.NEITHER)
    return [(trial.backend, trial.model) for trial in trials]


def test_an_open_breaker_is_tried_when_its_time_has_come(bench: PoolBench) -> None:
    """Not before, one at a time, and only a trial that passes closes it."""
    trip(bench)
    assert due(bench) == []
    bench.clock.advance(60.0)
    (trial,) = bench.pool.due_trials()
    assert (trial.backend, trial.model, trial.midstream) == ("a", None, False)
    assert list(bench.pool.due_trials()) == []
    assert bench.lease("a") is None, "half-open takes no call"
    trial.permit.settle(Mark.CREDIT)
    assert usable(bench) == "ab"
    assert bench["a"].load.slots(M) == 1, "it starts slowly"


def test_cut_streams_ask_for_longer_trials(bench: PoolBench) -> None:
    """Two in a row must pass, each long enough to be cut."""
    bench.blame("a", V.BROKEN, 3)
    bench.clock.advance(60.0)
    for state in (HALF_OPEN, CLOSED):
        (trial,) = bench.pool.due_trials()
        assert trial.midstream
        trial.permit.settle(Mark.CREDIT)
        assert bench["a"].gate.state is state


def test_a_backend_that_is_away_is_not_tried(bench: PoolBench) -> None:
    """Down, disabled, or not enabled: there is nothing to learn."""
    trip(bench)
    bench.clock.advance(60.0)
    bench.pool.turn("a", Switch.DISABLED)
    assert due(bench) == []
    bench.pool.turn("a", Switch.DRAINING)
    assert due(bench) == [("a", None)]
    bench.shape(backend("a", enabled=False), "b")
    assert due(bench) == []
    bench.shape("a", "b")
    bench.check("a", ok=False, count=3)
    assert due(bench) == []


def test_a_model_in_memory_is_tried_at_once(bench: PoolBench) -> None:
    """A canary is enough; while the backend itself is open its models wait."""
    trip_model(bench)
    assert due(bench) == []
    bench.clock.advance(60.0)
    bench["a"].gate.trip("test")
    assert due(bench) == []
    bench.pool.reset("a")
    trip_model(bench)
    bench.clock.advance(60.0)
    assert due(bench) == [("a", M)]


def test_a_model_that_is_not_in_memory_is_tried_if_somebody_asks(bench: PoolBench) -> None:
    """Since it opened, and only while no other load is under way there."""
    bench.blame("a", V.UNFIT, weight=2)
    bench.holds("a")
    bench.clock.advance(60.0)
    assert due(bench) == []
    assert usable(bench) == "b", "asked"
    assert bench.pool.take_token("a", key("n:1"), "test")
    assert due(bench) == []
    bench.pool.end_load("a", key("n:1"), outcome())
    assert due(bench) == [("a", M)]


def test_who_asked_before_it_opened_does_not_count(bench: PoolBench) -> None:
    """Each opening forgets: nobody may want the model any more."""
    trip(bench)
    usable(bench)
    usable(bench, "n:1")
    assert list(bench["a"].asked) == [M, canon("n:1")]
    bench.clock.advance(60.0)
    (trial,) = bench.pool.due_trials()
    trial.permit.settle(Mark.BLAME)
    assert bench["a"].asked == {}
    bench.pool.reset("a")
    bench["a"].asked[canon("n:1")] = key("n:1")
    trip_model(bench)
    assert list(bench["a"].asked) == [canon("n:1")]


def test_a_model_that_is_well_is_not_tried(bench: PoolBench) -> None:
    """One breaker open, another closed: one trial."""
    bench.blame("a", V.OK, model="n:1")
    trip_model(bench)
    bench.clock.advance(60.0)
    assert due(bench) == [("a", M)]
    (_, gate) = bench["a"].models.values()
    assert gate.state is HALF_OPEN


@pytest.mark.parametrize("news", ["", "restarted", "other models in memory"])
def test_a_restart_or_other_models_in_memory_are_a_fresh_start(bench: PoolBench, news: str) -> None:
    """What failed may fit now: the next wait is short; the model's own comings are no news."""
    for _ in range(3):
        trip_model(bench)
        bench.clock.advance(60.0)
        for trial in bench.pool.due_trials():
            trial.permit.settle(Mark.CREDIT)
    if news == "restarted":
        bench.check("a", ok=False, count=3)
        bench.check("a", count=2)
        bench.clock.advance(30.0)
    elif news:
        bench.holds("a", "m:1", "n:1")
    bench.holds("a", "m:1")
    lease = granted(bench)
    settle(bench, lease, V.UNFIT, weight=2)
    is_short = bench["a"].models[M].retry_in() <= 15.0
    assert is_short is bool(news)


def test_a_trial_of_a_backend_that_has_left_moves_nothing(bench: PoolBench) -> None:
    """It was removed while its trial was out."""
    trip(bench)
    bench.clock.advance(60.0)
    (trial,) = bench.pool.due_trials()
    bench.shape("b")
    before = bench.changes
    trial.permit.settle(Mark.CREDIT)
    assert bench.changes == before


def test_trials_survive_what_they_set_in_motion(bench: PoolBench) -> None:
    """Half-opening one breaker wakes the dispatcher, which may make another one meanwhile."""
    trip_model(bench)
    bench.clock.advance(60.0)
    leases: list[Lease] = []
    bench.pool.changed = lambda: leases.append(granted(bench, "a", "n:1"))
    trials = bench.pool.due_trials()
    assert [trial.model for trial in trials] == [M]
    assert len(leases) == 1
    bench.pool.changed = lambda: None
    settle(bench, leases[0])


# -- suspicion ---------------------------------------------------------------------------------


def suspicion(bench: PoolBench) -> Suspect:
    """A call on a that nothing has come of, for so long that it is suspect."""
    (suspect,) = bench.pool.suspects()
    assert (suspect.backend, suspect.model) == ("a", M)
    return suspect


def test_silence_sets_a_model_aside(bench: PoolBench) -> None:
    """Told once, and out of use until told more."""
    lease = granted(bench)
    assert bench.pool.suspects() == []
    bench.clock.advance(25.0)
    suspicion(bench)
    assert usable(bench) == "b"
    assert usable(bench, "n:1") == "ab"
    assert bench.pool.suspects() == []
    (event,) = bench.of(Suspected)
    assert (event.backend, event.model, event.silent_s) == ("a", "m:1", 25.0)
    settle(bench, lease)


def test_an_answered_canary_acquits(bench: PoolBench) -> None:
    """The model is used again; the call that hangs is left in peace, at first."""
    lease = granted(bench)
    lease.on_revoke = lambda judgement: pytest.fail(judgement.text)
    bench.clock.advance(25.0)
    bench.pool.acquit(suspicion(bench), answered=True)
    assert usable(bench) == "ab"
    assert bench.pool.suspects() == []
    settle(bench, lease)


def test_a_call_that_stays_silent_beside_canaries_is_lost(bench: PoolBench) -> None:
    """It goes elsewhere, and nobody is blamed; if a load explains the silence it stays."""
    heard: list[Judgement] = []
    lease = granted(bench)
    lease.on_revoke = heard.append
    bench.clock.advance(25.0)
    bench.pool.acquit(suspicion(bench), answered=True)
    bench.clock.advance(25.0)
    second = suspicion(bench)
    bench.pool.acquit(second, answered=False)
    assert heard == []
    bench.clock.advance(25.0)
    bench.pool.acquit(suspicion(bench), answered=True)
    assert [(j.verdict, j.blameless) for j in heard] == [(V.SLOW, True)]
    settle(bench, lease, V.SLOW, blameless=True, weight=9)
    assert usable(bench) == "ab"


def test_a_stuck_canary_convicts_the_backend(bench: PoolBench) -> None:
    """Nothing else moves there: its breaker opens, and whoever had no byte goes elsewhere."""
    heard: list[Judgement] = []
    lease, other = granted(bench), granted(bench, "a", "n:1")
    lease.on_revoke = other.on_revoke = heard.append
    bench.clock.advance(25.0)
    first, second = bench.pool.suspects()
    assert not first.others_move
    bench.pool.convict(first, "stuck")
    assert bench["a"].gate.state is OPEN
    assert bench["a"].gate.reason == "stuck"
    assert heard == [Judgement(V.SLOW, text="stuck")] * 2
    for each in (lease, other):
        settle(bench, each, V.SLOW)
    bench.pool.acquit(second, answered=True)
    assert usable(bench) == "b"


def test_a_stuck_model_beside_others_that_move_is_convicted_alone(bench: PoolBench) -> None:
    """The model's breaker opens, the backend's does not, however many calls hung there."""
    heard: list[str] = []
    bench.shape(backend("a", slots=5), "b")
    hung = [granted(bench) for _ in range(4)]
    bench.clock.advance(24.0)
    well = granted(bench, "a", "n:1")
    well.moved()
    bench.clock.advance(1.0)
    for lease in [*hung, well]:
        lease.on_revoke = lambda judgement: heard.append(judgement.text)
    suspect = suspicion(bench)
    assert suspect.others_move
    bench.pool.convict(suspect, "stuck")
    for lease in hung:
        settle(bench, lease, V.SLOW, text="stuck")
    assert heard == ["stuck"] * 4
    assert bench["a"].models[M].state is OPEN
    assert bench["a"].gate.state is CLOSED
    assert usable(bench, "n:1") == "ab"
    settle(bench, well)


def test_verdicts_on_a_backend_that_has_left_are_void(bench: PoolBench) -> None:
    """It was removed while its canary was out."""
    lease = granted(bench)
    bench.clock.advance(25.0)
    suspect = suspicion(bench)
    bench.shape("b")
    bench.pool.convict(suspect, "stuck")
    bench.pool.acquit(suspect, answered=True)
    assert bench.pool.suspects() == []
    settle(bench, lease)


# -- the operator ------------------------------------------------------------------------------


def test_the_operators_switch_outranks_everything(bench: PoolBench) -> None:
    """Healthy and closed, and still not used; told, and told again on the way back."""
    lease = granted(bench)
    bench.pool.turn("a", Switch.DRAINING)
    assert usable(bench) == "b"
    assert bench.pool.running == 1, "what runs may end"
    settle(bench, lease)
    bench.pool.turn("a", Switch.SERVING)
    assert usable(bench) == "ab"
    assert [event.switch for event in bench.of(SwitchMoved)] == [Switch.DRAINING, Switch.SERVING]
    with pytest.raises(KeyError):
        bench.pool.turn("zzz", Switch.DISABLED)


def test_a_switch_that_stands_there_already_is_not_turned(bench: PoolBench) -> None:
    """Whoever repeats himself is told so, and nobody else."""
    assert bench.pool.turn("a", Switch.DRAINING, "ops")
    assert not bench.pool.turn("a", Switch.DRAINING, "night")
    assert [(event.backend, event.by) for event in bench.of(SwitchMoved)] == [("a", "ops")]
    assert len(bench.of(BackendDrained)) == 1


def test_a_drain_ends_with_the_last_that_runs(bench: PoolBench) -> None:
    """Calls and a load of ours; told once, and not where nobody drains."""
    first, second, elsewhere = granted(bench), granted(bench), granted(bench, "b")
    assert bench.pool.take_token("a", key("n:1"), "test")
    bench.pool.turn("a", Switch.DRAINING)
    settle(bench, first)
    settle(bench, elsewhere)
    bench.pool.end_load("a", key("n:1"), outcome(now=bench.clock()))
    assert bench.of(BackendDrained) == []
    settle(bench, second)
    assert [event.backend for event in bench.of(BackendDrained)] == ["a"]
    bench.pool.turn("b", Switch.DISABLED)
    assert len(bench.of(BackendDrained)) == 1


def test_a_load_can_be_the_last_to_end(bench: PoolBench) -> None:
    """A backend that loads is not drained."""
    assert bench.pool.take_token("a", key("n:1"), "test")
    bench.pool.turn("a", Switch.DRAINING)
    assert bench.of(BackendDrained) == []
    bench.pool.end_load("a", key("n:1"), outcome(now=bench.clock()))
    assert [event.backend for event in bench.of(BackendDrained)] == ["a"]


def test_a_reset_is_told_with_who_did_it(bench: PoolBench) -> None:
    """Even where nothing was open: somebody did something."""
    assert not bench.pool.reset("a", "ops")
    trip_model(bench)
    assert bench.pool.reset("a", "ops")
    assert [(event.backend, event.by) for event in bench.of(BreakersReset)] == [("a", "ops")] * 2


def test_breakers_can_be_closed_by_hand(bench: PoolBench) -> None:
    """The backend's and its models', all of them."""
    trip_model(bench)
    bench["a"].gate.trip("test")
    bench.pool.reset("a")
    assert usable(bench) == "ab"
    with pytest.raises(KeyError):
        bench.pool.reset("zzz")


# -- seeing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bar", ["not enabled", "disabled", "draining", "down", "breaker"])
def test_ready_needs_one_backend_that_could_serve(bench: PoolBench, bar: str) -> None:
    """Each of the facts alone is enough to be of no use."""
    bench.shape("a")
    assert bench.pool.is_ready()
    put_up, _ = BARS[bar]
    put_up(bench)
    keep = bench["a"].backend
    bench.shape(keep)
    assert not bench.pool.is_ready()


def test_a_snapshot_shows_every_member(bench: PoolBench) -> None:
    """Everything people and metrics ask for, in words they know."""
    bench.shape("a", "b", "c")
    lease = granted(bench)
    trip_model(bench, "a", "n:1")
    bench.holds("a", "m:1")
    assert bench.pool.take_token("a", key("m:1", num_ctx=1), "test")
    bench.check("b", ok=False, count=3, error="refused")
    a, b, c = bench.pool.snapshot()
    assert (a.name, a.url, a.up, a.error, a.version) == ("a", "http://a:11434", True, "", "0.12.0")
    assert (a.switch, a.enabled, a.slots, a.in_flight) == (Switch.SERVING, True, 2, {"m:1": 1})
    assert [(g.model, g.state) for g in a.breakers] == [
        (None, CLOSED),
        ("m:1", CLOSED),
        ("n:1", OPEN),
    ]
    assert (a.loading, a.loading_s) == ("m:1", 2.0)
    assert (a.available, a.loaded) == (("m:1", "n:1"), ("m:1",))
    assert a.vram_bytes == resident("m:1")["size_vram"]
    assert (b.up, b.error, b.loading, b.loading_s) == (False, "refused", None, 0.0)
    assert (c.up, c.version) == (None, None)
    settle(bench, lease)


def test_a_refusal_of_ours_is_no_event_of_the_pool(bench: PoolBench) -> None:
    """Asking what waiting may bring changes nothing anybody hears of."""
    before, changes = len(bench.events), bench.changes
    prospect(bench)
    prospect(bench, "zzz")
    assert (len(bench.events), bench.changes) == (before, changes)
    assert not issubclass(Prospect, BalancerError)


# -- one name, other weights -------------------------------------------------------------------


def differing(*groups: str, at: tuple[str, ...] = ("2026-11-21T12:00:00Z",) * 3) -> PoolBench:
    """Backends by group, up; each group lists m:1 with weights of its own, modified *at*."""
    bench = PoolBench()
    bench.shape(*"".join(groups))
    for number, group in enumerate(groups):
        for name in group:
            bench.check(name)
            row = tag("m:1") | {"digest": f"{number}" * 64, "modified_at": at[number]}
            bench.pool.note_tags(name, [row], bench.clock())
    return bench


def embedders(bench: PoolBench, excluded: str = "") -> str:
    """Who may embed now, run together."""
    asked = call("m:1", "/api/embed", embedding=True)
    return "".join(names_of(bench.pool.candidates(asked, frozenset(excluded))))


def test_calls_stay_on_the_weights_most_backends_have() -> None:
    """Embeddings and others alike; who has other weights may not serve, and is told why."""
    bench = differing("a", "bc")
    assert (usable(bench), embedders(bench)) == ("bc", "bc")
    standings = {each.backend: each for each in bench.pool.standings(call("m:1"), frozenset())}
    bar = standings["a"].bar
    assert bar is not None
    assert (bar.code, bar.text) == ("weights", "has other weights of this model")
    assert standings["a"].returns_in_s == math.inf
    assert standings["b"].bar is None


@pytest.mark.parametrize(
    ("at", "stays"),
    [
        (("2026-11-21T12:00:00Z", "2026-11-22T12:00:00Z"), "b"),
        (("2026-11-22T12:00:00Z", "2026-11-21T12:00:00Z"), "a"),
        (("2026-11-21T12:00:00Z", "2026-11-21T12:00:00Z"), "b"),
    ],
)
def test_of_as_many_the_newest_then_the_greatest_digest(at: tuple[str, str], stays: str) -> None:
    """A tie is decided by the time of modification, and by the digest's text last."""
    bench = differing("a", "b", at=at)
    assert (usable(bench), embedders(bench)) == (stays, stays)


def test_embeddings_wait_rather_than_leave_their_weights() -> None:
    """An outage moves nothing: other calls go to other weights, embeddings wait for theirs."""
    bench = differing("a", "bc")
    for name in "bc":
        bench.check(name, ok=False, count=3)
    assert (usable(bench), embedders(bench)) == ("a", "")
    told = prospect(bench, path="/api/embed", embedding=True)
    assert told.kind is ProspectKind.AWAY
    assert "b: down" in told.text
    assert "a:" not in told.text, "it could not serve this even if it were waited for"
    assert 0 < told.retry_in_s < math.inf
    assert bench.lease("a", path="/api/embed", embedding=True) is None
    settle(bench, granted(bench, "a"))


def test_a_failed_conversation_may_leave_its_weights() -> None:
    """Once all with the usual weights were tried, the rest may; an embedding has nobody left."""
    bench = differing("a", "bc")
    assert usable(bench, excluded="b") == "c"
    assert (usable(bench, excluded="bc"), embedders(bench, excluded="bc")) == ("a", "")
    told = prospect(bench, excluded="bc", path="/api/embed", embedding=True)
    assert told.kind is ProspectKind.EXHAUSTED


def test_who_is_disabled_or_not_allowed_has_no_say() -> None:
    """Weights that could never be served must not bind the calls."""
    bench = differing("a", "bc")
    bench.pool.turn("b", Switch.DRAINING)
    assert embedders(bench) == "c", "one that drains counts still"
    bench.pool.turn("b", Switch.DISABLED)
    bench.shape("a", "b", backend("c", deny=("m:1",)))
    assert (usable(bench), embedders(bench)) == ("a", "a")


def test_a_say_is_lost_and_had_back_with_the_switch() -> None:
    """Of itself, and at once: nothing else has changed since calls were last told apart."""
    bench = differing("ad", "bc")
    assert embedders(bench) == "bc"
    bench.pool.turn("b", Switch.DISABLED)
    assert embedders(bench) == "ad"
    bench.pool.turn("b", Switch.SERVING)
    assert embedders(bench) == "bc"


def test_another_version_may_have_the_route() -> None:
    """Who is known to be too old for it serves it from the check on that tells of another."""
    bench = PoolBench()
    bench.start("a", "m:1", loaded=["m:1"])
    messages = call("m:1", "/v1/messages")
    for version, serves in (("0.12.0", False), ("0.20.0", True), ("0.12.0", False)):
        bench.pool.observe("a", CheckResult(True, 0.01, version))
        assert bool(bench.pool.candidates(messages, frozenset())) is serves, version
        assert bench.pool.candidates(call("m:1"), frozenset())


def test_of_endless_options_not_all_are_kept(bench: PoolBench) -> None:
    """What clients choose freely must not fill the memory."""
    for number in range(3 * MOST_KNOWN):
        bench.pool.candidates(call("m:1", options={"num_ctx": number + 1}), frozenset())
    assert len(bench.pool._known) <= MOST_KNOWN + 1


def test_stubs_have_no_say_in_which_weights_are_usual() -> None:
    """However many they are: else nobody who has weights at all could serve."""
    bench = differing("a", "b")
    bench.shape(*"abcd")
    for name in "cd":
        bench.check(name)
        row = tag("m:1") | {"remote_model": "m:1", "digest": "9" * 64}
        bench.pool.note_tags(name, [row], bench.clock())
    assert bench.pool.strangers(call("m:1")) == frozenset("acd")


def test_same_weights_everywhere_bind_nobody(bench: PoolBench) -> None:
    """Without a conflict there are no strangers."""
    assert bench.pool.strangers(call("m:1")) == frozenset()
    assert embedders(bench) == "ab"


# -- cloud models ----------------------------------------------------------------------------------

FAR = "far:cloud"


@pytest.fixture
def cloudy() -> PoolBench:
    """Three backends up with m:1 in memory, of which b and c are marked for cloud models."""
    bench = PoolBench()
    bench.shape("a", backend("b", cloud=True), backend("c", cloud=True))
    for name in "abc":
        bench.up(name, "m:1", loaded=["m:1"])
    return bench


def served_by(bench: PoolBench, model: str) -> str:
    return "".join(c.backend for c in bench.pool.candidates(call(model), frozenset()))


def test_a_cloud_model_goes_to_the_marked_whatever_they_list(cloudy: PoolBench) -> None:
    """And a model of ours goes where it is, marked or not."""
    cloudy.lists("a", "m:1", FAR)
    assert served_by(cloudy, FAR) == "bc"
    assert served_by(cloudy, "m:1") == "abc"
    standing = cloudy.pool.standings(call(FAR), frozenset())[0]
    assert standing.bar is not None
    assert "cloud: true" in standing.bar.text
    assert math.isinf(standing.returns_in_s)


def test_without_a_mark_one_account_serves(bench: PoolBench) -> None:
    """The first that lists the stub, also while it is down: the next one is somebody else's."""
    bench.lists("b", FAR)
    assert served_by(bench, FAR) == "b"
    bench.lists("a", FAR)
    assert served_by(bench, FAR) == "a"
    for _ in range(3):
        bench.check("a", ok=False)
    assert served_by(bench, FAR) == ""
    assert prospect(bench, FAR).kind is ProspectKind.AWAY


def test_an_unknown_cloud_model_tells_what_to_do(bench: PoolBench) -> None:
    """As any model that nobody has, and how cloud models are switched on."""
    told = prospect(bench, FAR)
    assert told.kind is ProspectKind.UNKNOWN
    assert told.text.startswith("model 'far:cloud' not found")
    assert "cloud: true" in told.text


def test_a_cloud_model_takes_nothing_of_a_gpu(cloudy: PoolBench) -> None:
    """It is as good as loaded, has no slots to run out of, and does not count as work there."""
    leases = [granted(cloudy, "b", FAR) for _ in range(20)]
    far = cloudy.pool.candidates(call(FAR), frozenset())[0]
    assert (far.backend, far.residency, far.in_flight) == ("b", Residency.LOADED, 20)
    assert far.in_flight < far.slots
    near = cloudy.pool.candidates(call("m:1"), frozenset())[1]
    assert (near.backend, near.in_flight, near.host_in_flight) == ("b", 0, 0)
    cloudy.clock.advance(3600.0)
    assert cloudy.pool.suspects() == []
    for lease in leases:
        settle(cloudy, lease)
    assert cloudy["b"].models == {}
    assert cloudy.catalog.resident("b", canon(FAR)) is None


@pytest.mark.parametrize("verdict", [v for v in V if v not in (V.OK, V.NO_ROUTE)])
def test_nothing_that_goes_wrong_far_away_counts_here(cloudy: PoolBench, verdict: Verdict) -> None:
    """Neither breaker hears of it, nothing cools off, nothing is read again."""
    cloudy.refreshed.clear()
    for _ in range(20):
        settle(cloudy, granted(cloudy, "b", FAR), verdict, weight=2)
    assert cloudy["b"].gate.state is CLOSED
    assert cloudy["b"].models == {}
    assert not cloudy["b"].load.cooling_s(None)
    assert cloudy.refreshed == []
    assert served_by(cloudy, FAR) == "bc"


def test_that_it_cannot_be_reached_is_its_own_fault(cloudy: PoolBench) -> None:
    """Whatever it was to pass on."""
    for _ in range(3):
        settle(cloudy, granted(cloudy, "b", FAR), V.FAULT, unreached=True)
    assert cloudy["b"].gate.state is OPEN
    served_by(cloudy, FAR)
    assert cloudy["b"].asked == {}, "a trial must not ask for a cloud model"


def test_who_speaks_for_the_account(cloudy: PoolBench) -> None:
    """The first that is marked and up, as configured; not one that is disabled."""

    def speaker() -> str:
        member = cloudy.pool.account()
        return "" if member is None else member.name

    assert speaker() == "b"
    for _ in range(3):
        cloudy.check("b", ok=False)
    assert speaker() == "c"
    cloudy.pool.turn("c", Switch.DISABLED)
    assert speaker() == "b"
    marked = backend("z", cloud=True)
    cloudy.shape(marked, backend("b", cloud=True))
    cloudy.up("z")
    assert speaker() == "z"
    cloudy.shape("a", "b")
    assert speaker() == ""
    cloudy.shape("b")
    assert speaker() == "b"


def test_the_provider_takes_over_nothing_of_ours(bench: PoolBench) -> None:
    """Next to it a host is still the last one, which no ratio of failures takes out."""
    far = backend("p", cloud=True, provider=True)
    bench.shape("a", far)
    bench.check("p")
    assert not bench.pool._has_other("a", None)
    bench.shape("a", "b", far)
    bench.up("b", "m:1")
    assert bench.pool._has_other("a", None)
    assert bench["p"].health.due_in() > 40.0


def test_who_is_answered_in_between_does_not_fail_in_a_row(cloudy: PoolBench) -> None:
    """A host that only passes calls on has no other calls that could speak for it."""
    for _ in range(5):
        settle(cloudy, granted(cloudy, "b", FAR), V.FAULT, unreached=True)
        settle(cloudy, granted(cloudy, "b", FAR), V.OK)
    assert cloudy["b"].gate.state is CLOSED


def test_a_stuck_gpu_takes_no_cloud_call_with_it(cloudy: PoolBench) -> None:
    """Such a call cannot be repeated, and its silence is somebody else's."""
    revoked: list[str] = []
    near, far = granted(cloudy, "b"), granted(cloudy, "b", FAR)
    near.on_revoke = lambda _: revoked.append("near")
    far.on_revoke = lambda _: revoked.append("far")
    cloudy.clock.advance(60.0)
    (suspect,) = cloudy.pool.suspects()
    cloudy.pool.convict(suspect, "stuck")
    assert revoked == ["near"]
    assert list(cloudy["b"].asked) == [canon("m:1")], "a trial must not ask for a cloud model"
    settle(cloudy, near)
    settle(cloudy, far)


def test_a_call_that_cannot_be_repeated_stays_where_it_is(bench: PoolBench) -> None:
    """A backend that leaves the configuration is not dead."""
    revoked: list[str] = []
    lease = bench.lease("a", replayable=False)
    assert lease is not None
    lease.on_revoke = lambda _: revoked.append("a")
    bench.shape("b")
    assert revoked == []
    settle(bench, lease)


def test_a_provider_that_keeps_its_list_to_itself_hides_no_model_of_ours(bench: PoolBench) -> None:
    """It has none: that its list is not read makes no 503 of a model that nobody has."""
    bench.shape("a", "b", backend("p", cloud=True, provider=True))
    bench.check("p")
    bench.pool.note_failed("p")
    assert prospect(bench, "zzz").kind is ProspectKind.UNKNOWN


def test_there_is_a_choice_where_more_than_one_has_the_model(bench: PoolBench) -> None:
    """As lists and members have it now."""
    is_choice = bench.pool.is_choice
    bench.start("c", "x:1", "y:1")
    assert not is_choice(key("x:1").model)
    bench.start("d", "x:1")
    assert (is_choice(key("x:1").model), is_choice(key("y:1").model)) == (True, False)
    bench.lists("d", "x:1", "y:1")
    assert is_choice(key("y:1").model)
    bench.shape("c")
    assert not is_choice(key("y:1").model)
