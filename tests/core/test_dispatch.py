"""The conductor: everybody who waits is answered once, at the right moment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from balancer.core import errors
from balancer.core.admission import QueueLimits
from balancer.core.dispatch import MAX_PASSES, LoadFailed
from balancer.core.domain import Allowance, Call, Mark, Principal, Residency, Role, Switch, Verdict
from balancer.core.errors import BalancerError, Draining
from balancer.core.events import AttemptEnded, CallQueued, LeaseGranted, RetryGranted
from balancer.core.greedy import (
    OVERDUE_EXTRA_S,
    OVERDUE_FACTOR,
    POLICIES,
    Greedy,
    load_estimate_s,
)
from balancer.core.pool import Lease
from balancer.core.scheduler import (
    Commit,
    CommitRefused,
    Effect,
    Ended,
    Fact,
    Load,
    LoadAnswered,
    LoadRefused,
    Refuse,
    Ticket,
    TicketState,
    Unload,
)
from tests.core.bench import GB, Bench, Client, backend, call, canon, key, outcome, tag, tried

V = Verdict
LIMITS = QueueLimits(max_depth=6, max_depth_per_model=3, max_wait_s=20.0)


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Backends a and b of one slot each, with m:1 in memory and n:1 on disk; short queues."""
    bench = Bench(limits=LIMITS)
    bench.shape(backend("a", slots=1), backend("b", slots=1))
    for name in "ab":
        bench.up(name, "m:1", "n:1", loaded=["m:1"])
    yield bench
    bench.close()


def settle(bench: Bench, client: Client, verdict: Verdict = V.OK, **more: object) -> None:
    client.lease.settle(outcome(verdict, bench.clock(), **more))


def fill(bench: Bench, count: int = 2) -> list[Client]:
    """Take the slots."""
    clients = [bench.submit(id=f"f{number}") for number in range(count)]
    assert all(client.leases for client in clients)
    return clients


def at_rest(bench: Bench) -> bool:
    """Nothing runs, nothing waits, nothing is counted."""
    counted = bench.admission.depth or bench.pool.running or bench.dispatcher.waiting()
    return not counted and bench.dispatcher._owners == {}


# -- a slot is free ----------------------------------------------------------------------------


def test_a_call_with_room_is_granted_at_once(bench: Bench) -> None:
    """Before `submit` returns; nobody is told of a wait that was none."""
    client = bench.submit()
    assert client.ticket is not None
    assert client.ticket.state is TicketState.GRANTED
    (event,) = bench.of(LeaseGranted)
    assert (event.call_id, event.backend, event.attempt, event.waited_s) == ("r1", "a", 1, 0.0)
    assert bench.of(CallQueued) == []
    settle(bench, client)
    assert at_rest(bench)


@pytest.mark.parametrize("heard", [True, False])
def test_a_grant_is_counted_and_a_retry_told_whoever_hears(bench: Bench, *, heard: bool) -> None:
    """A first grant only to who wants to hear; a retry with what came before."""
    bench.dispatcher._hears = lambda _: heard
    first = bench.submit()
    retry = bench.submit(attempts=(tried("a"),), excluded=frozenset("a"))
    told = bench.of(LeaseGranted)
    assert [event.attempt for event in told] == ([1, 2] if heard else [2])
    assert isinstance(told[-1], RetryGranted)
    assert (told[-1].backend, told[-1].after) == ("b", tried("a"))
    assert bench.dispatcher.grants == {"warm": 1, "failover": 1}
    settle(bench, first)
    settle(bench, retry)


def test_where_nobody_waits_nothing_is_planned(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the shell asked to call, once more than it takes to call it off."""
    asked: list[float] = []
    monkeypatch.setattr(bench.dispatcher, "_wake_at", asked.append)
    settle(bench, bench.submit())
    bench.dispatcher.kick()
    assert asked == []
    clients = [bench.submit() for _ in range(5)]
    assert math.isfinite(asked[-1])
    for client in clients:
        settle(bench, client)
    assert asked[-1] == math.inf
    asked.clear()
    settle(bench, bench.submit())
    bench.dispatcher.kick()
    assert asked == []


def test_a_lease_says_why_it_is_where_it_is(bench: Bench) -> None:
    """The first that holds: short-context, failover, only, cold, warm."""
    assert bench.submit().lease.why == "warm"
    assert bench.submit(attempts=(tried("a"),), excluded=frozenset("a")).lease.why == "failover"
    bench.shape(backend("a", slots=9), backend("b", slots=9))
    bench.holds("b", "m:1", context=10)
    assert bench.submit(prompt_tokens=50).lease.why == "warm"
    again = bench.submit(prompt_tokens=50, attempts=(tried("a"),), excluded=frozenset("a"))
    assert again.lease.why == "short-context"
    bench.pool.turn("b", Switch.DRAINING)
    assert bench.submit().lease.why == "only"
    for lease in [*bench["a"].leases, *bench["b"].leases]:
        lease.release()


def test_attempts_are_numbered(bench: Bench) -> None:
    """A lease knows how often its call was tried before."""
    client = bench.submit(attempts=(tried("a"),), excluded=frozenset("a"))
    assert client.lease.number == 2
    settle(bench, client)


# -- no slot is free ---------------------------------------------------------------------------


def test_a_call_waits_for_a_slot_and_gets_the_first(bench: Bench) -> None:
    """In the turn in which it comes free, and not before."""
    first, second = fill(bench)
    waiting = bench.submit()
    assert waiting.waits
    assert bench.of(CallQueued)[-1].depth == 1
    bench.sleep(3.0)
    settle(bench, second)
    assert waiting.lease.backend.name == "b"
    assert bench.of(LeaseGranted)[-1].waited_s == 3.0
    settle(bench, first)
    settle(bench, waiting)
    assert at_rest(bench)


def test_who_waits_longest_goes_first_and_a_retry_keeps_its_place(bench: Bench) -> None:
    """A call that failed elsewhere has waited already."""
    first, second = fill(bench)
    third, fourth = bench.submit(id="3"), bench.submit(id="4")
    assert first.ticket is not None
    settle(bench, first, V.FAULT)
    assert third.lease.backend.name == "a"
    again = bench.submit(
        id="1", attempts=(tried("a"),), excluded=frozenset("a"), seq=first.ticket.seq
    )
    assert [ticket.call.id for ticket in bench.dispatcher.waiting()] == ["1", "4"]
    settle(bench, second)
    assert again.lease.backend.name == "b"
    for client in (third, again, fourth):
        settle(bench, client)
    assert at_rest(bench)


def test_a_call_that_leaves_makes_room(bench: Bench) -> None:
    """Withdrawn it hears nothing more, and a second time is no mistake."""
    clients = fill(bench)
    gone, next_ = bench.submit(), bench.submit()
    assert gone.ticket is not None
    bench.dispatcher.withdraw(gone.ticket)
    bench.dispatcher.withdraw(gone.ticket)
    assert gone.ticket.state is TicketState.WITHDRAWN
    settle(bench, clients[0])
    assert gone.waits
    assert not next_.waits
    settle(bench, clients[1])
    settle(bench, next_)
    assert at_rest(bench)


def test_a_cool_off_ends_without_any_event(bench: Bench) -> None:
    """The timer is asked for the very instant."""
    bench.shape(backend("a", slots=1))
    bench.blame("a", V.BUSY)
    waiting = bench.submit()
    assert waiting.waits
    assert bench.wake_at == bench.clock() + 1.0
    bench.sleep(1.0)
    settle(bench, waiting)


def test_what_is_believed_again_is_used(bench: Bench) -> None:
    """Memory was not read for too long and no load could begin; the same reading again is news."""
    bench.shape(backend("a", slots=1))
    bench.clock.advance(60.0)
    assert bench.pool.take_token("a", key("n:1"), "somebody else's")
    waiting = bench.submit()
    assert waiting.waits
    bench.holds("a", "m:1")
    settle(bench, waiting)


def test_slots_that_grow_with_time_are_used_as_they_come(bench: Bench) -> None:
    """After a recovery one slot, after half a minute all; nobody waits for an event."""
    bench.shape(backend("a", slots=3))
    bench.recover("a", "m:1", loaded=["m:1"])
    clients = [bench.submit() for _ in range(3)]
    assert [client.waits for client in clients] == [False, True, True]
    bench.sleep(15.0)
    assert [client.waits for client in clients] == [False, False, True]
    bench.dispatcher.admission.limits = QueueLimits(max_wait_s=600.0)
    bench.sleep(4.9)
    assert clients[2].waits
    bench.dispatcher.withdraw(clients[2].ticket)  # type: ignore[arg-type]
    late = bench.submit()
    bench.sleep(10.1)
    assert not late.waits
    for client in (*clients[:2], late):
        settle(bench, client)
    assert at_rest(bench)


# -- limits ------------------------------------------------------------------------------------


def test_a_queue_has_a_limit_and_the_refusal_a_reason(bench: Bench) -> None:
    """When it may wait no longer it hears how many wait, and when to come back."""
    fill(bench)
    waiting = bench.submit()
    bench.sleep(19.9)
    assert waiting.waits
    bench.sleep(0.1)
    assert isinstance(waiting.error, errors.QueueTimeout)
    assert waiting.error.text == (
        "No slot came free for 'm:1' in 20 s (queue.max_wait); 1 calls wait for it."
    )
    assert waiting.error.retry_after_s == 10.0, "two have left in twenty seconds"
    assert waiting.ticket is not None
    assert waiting.ticket.state is TicketState.REFUSED


def test_a_caller_may_set_a_shorter_limit(bench: Bench) -> None:
    """Its own deadline is told as such; a later one than the queue's changes nothing."""
    fill(bench)
    waiting = bench.submit(deadline=bench.clock() + 5.0)
    patient = bench.submit(deadline=bench.clock() + 500.0)
    bench.sleep(5.0)
    assert isinstance(waiting.error, errors.DeadlineExceeded)
    bench.sleep(15.0)
    assert isinstance(patient.error, errors.QueueTimeout)


def test_a_deadline_that_has_passed_is_refused_at_once(bench: Bench) -> None:
    """Free slots or not: nobody waits for the answer."""
    late = bench.submit(deadline=bench.clock())
    assert isinstance(late.error, errors.DeadlineExceeded)
    assert at_rest(bench)


def test_a_full_queue_refuses_new_calls_only(bench: Bench) -> None:
    """Those tried before are always admitted: they hold no more than they held."""
    fill(bench)
    waiting = [bench.submit() for _ in range(3)]
    refused = bench.submit()
    assert isinstance(refused.error, errors.QueueFull)
    assert refused.ticket is None
    again = bench.submit(attempts=(tried("a"),), excluded=frozenset("a"))
    assert again.waits
    for client in (*waiting, again):
        assert client.ticket is not None
        bench.dispatcher.withdraw(client.ticket)


@pytest.mark.parametrize("limits", [QueueLimits(3, 9), QueueLimits(9, 3)])
def test_one_owner_cannot_fill_the_queue_for_others(bench: Bench, limits: QueueLimits) -> None:
    """Who has most waiting gives way, the newest call first, until others have as many."""
    bench.dispatcher.admission.limits = limits
    fill(bench)
    many = [bench.submit(fair_key="many", id=f"r{number}") for number in range(3)]
    assert isinstance(bench.submit(fair_key="many").error, errors.QueueFull)
    few = bench.submit(fair_key="few")
    assert (few.waits, many[0].waits, many[1].waits) == (True, True, True)
    assert isinstance(many[2].error, errors.QueueFull)
    assert "other callers have fewer" in many[2].error.text
    assert many[2].error.retry_after_s
    assert isinstance(bench.submit(fair_key="few").error, errors.QueueFull), "that would be turned"
    third = bench.submit(fair_key="third")
    assert (third.waits, many[0].waits) == (True, True)
    assert isinstance(many[1].error, errors.QueueFull)
    assert isinstance(bench.submit(fair_key="fourth").error, errors.QueueFull), "one each is fair"
    assert bench.dispatcher.admission.depth == 3
    assert sum(bench.dispatcher.admission.refused.values()) == 5
    for client in (many[0], few, third):
        assert client.ticket is not None
        bench.dispatcher.withdraw(client.ticket)


def test_the_one_that_gives_way_is_told_how_many_wait(bench: Bench) -> None:
    """As many as may: not one more, for the call that takes its place."""
    bench.dispatcher.admission.limits = QueueLimits(2, 9)
    fill(bench)
    bench.submit(fair_key="many")
    newest = bench.submit(fair_key="many")
    bench.submit(fair_key="few")
    assert "Queue full: 2 calls wait," in newest.error.text


def test_who_gives_way_gives_batch_first_and_never_what_was_tried(bench: Bench) -> None:
    """A call that was tried has been let in already."""
    bench.dispatcher.admission.limits = QueueLimits(3, 3)
    fill(bench)
    more: dict[str, Any] = {"attempts": (tried("a"),), "excluded": frozenset("a")}
    batch, plain = bench.submit(fair_key="x", batch=True), bench.submit(fair_key="x")
    again = bench.submit(fair_key="x", **more)
    assert bench.submit(fair_key="y").waits
    assert isinstance(batch.error, errors.QueueFull)
    assert (plain.waits, again.waits) == (True, True)
    for client in (plain, again):
        assert client.ticket is not None


def test_who_gives_way_and_comes_again_takes_nobodys_place(bench: Bench) -> None:
    """The queue stays within its bounds, though a refusal may set off a call at once."""
    bench.dispatcher.admission.limits = QueueLimits(2, 2)
    fill(bench)
    bench.submit(fair_key="many")
    heard: list[BalancerError] = []

    def once_more(error: BalancerError) -> None:
        heard.append(error)
        heard.append(bench.submit(fair_key="many").error)

    bench.dispatcher.submit(call(fair_key="many"), lambda _: None, once_more)
    few = bench.submit(fair_key="few")
    assert few.waits
    assert [type(error) for error in heard] == [errors.QueueFull] * 2
    assert bench.dispatcher.admission.depth == 2


def test_before_a_call_is_read_only_who_could_not_wait_anyway_is_refused(bench: Bench) -> None:
    """Whatever model it is for."""
    bench.dispatcher.admission.limits = QueueLimits(2, 2)
    fill(bench)
    bench.dispatcher.check_room("many")
    for _ in range(2):
        bench.submit(fair_key="many")
    bench.dispatcher.check_room("few")
    with pytest.raises(errors.QueueFull, match=r"queue\.max_depth"):
        bench.dispatcher.check_room("many")


def test_a_forecast_knows_who_gives_way(bench: Bench) -> None:
    """A call that would take another's place is not foretold a refusal; nobody is refused."""
    bench.dispatcher.admission.limits = QueueLimits(2, 2)
    fill(bench)
    waiting = [bench.submit(fair_key="many") for _ in range(2)]
    assert bench.dispatcher.forecast(call(fair_key="few")).kind == "queue"
    assert bench.dispatcher.forecast(call(fair_key="many")).kind == "refused"
    assert all(client.waits for client in waiting)
    assert not bench.dispatcher.admission.refused


def test_a_full_queue_stands_in_nobodys_way_who_need_not_wait(bench: Bench) -> None:
    """The limits are on waiting."""
    bench.dispatcher.admission.limits = QueueLimits(0, 0)
    client = bench.submit()
    settle(bench, client)
    assert isinstance(bench.submit("n:1").error, errors.QueueFull), "this one must wait for a load"


def test_what_nobody_has_is_not_found_even_if_the_queue_is_full(bench: Bench) -> None:
    """A mistake of the caller's is told before a shortage of ours."""
    bench.dispatcher.admission.limits = QueueLimits(0, 0)
    assert isinstance(bench.submit("zzz").error, errors.UnknownModel)


# -- nobody can serve it -----------------------------------------------------------------------


def test_a_call_waits_for_a_backend_that_will_be_back_in_time(bench: Bench) -> None:
    """Both breakers open: it waits for the trial, through it, and is granted when one closes."""
    for name in "ab":
        bench.blame(name, V.FAULT, 3)
    waiting = bench.submit()
    assert waiting.waits
    bench.sleep(2.0)
    trials = list(bench.pool.due_trials())
    bench.check("a")
    bench.lists("a", "m:1")
    assert waiting.waits, "a trial under way may end any moment"
    for trial in trials:
        trial.permit.settle(Mark.CREDIT)
    settle(bench, waiting)
    assert at_rest(bench)


def test_a_call_waits_through_the_trial_of_its_model(bench: Bench) -> None:
    """The longest such a trial may take is longer than any wait; that is no reason to refuse."""
    bench.shape(backend("a", slots=1))
    bench.blame("a", V.UNFIT, weight=2)
    bench.holds("a", "m:1")
    waiting = bench.submit()
    bench.sleep(15.0)
    (trial,) = bench.pool.due_trials()
    bench.lists("a", "m:1")
    assert waiting.waits
    trial.permit.settle(Mark.CREDIT)
    settle(bench, waiting)


def test_a_call_nobody_will_be_back_for_is_refused_at_once(bench: Bench) -> None:
    """Longer away than it may wait, or until an operator acts: 503 with a time to come back."""
    bench.shape(backend("a", slots=1))
    bench.blame("a", V.BUSY, retry_after_s=40.0)
    refused = bench.submit()
    assert isinstance(refused.error, errors.NoBackend)
    assert refused.error.retry_after_s == 40.0
    bench.pool.turn("a", Switch.DRAINING)
    assert bench.submit().error.retry_after_s == 10.0


def test_who_waits_is_told_when_waiting_is_in_vain(bench: Bench) -> None:
    """At once, not at the end of its limit."""
    fill(bench)
    waiting = bench.submit()
    for name in "ab":
        assert waiting.waits
        bench.pool.turn(name, Switch.DRAINING)
    assert isinstance(waiting.error, errors.NoBackend)
    assert waiting.error.text == "No backend can serve 'm:1' now (a: draining; b: draining)."


def test_a_model_that_is_gone_everywhere_is_not_found(bench: Bench) -> None:
    """Whoever waited for it hears so."""
    fill(bench)
    waiting = bench.submit()
    bench.lists("a", "n:1")
    assert waiting.waits
    bench.lists("b", "n:1")
    assert isinstance(waiting.error, errors.UnknownModel)


def test_a_model_known_only_where_nobody_answers_is_never_not_found(bench: Bench) -> None:
    """It waits, and then it is a 503 that names the backend."""
    bench.lists("b", "n:1")
    bench.check("a", ok=False, count=3, error="404 Not Found")
    waiting = bench.submit()
    bench.sleep(20.0)
    assert isinstance(waiting.error, errors.NoBackend)
    assert "a: down" in waiting.error.text
    assert "not found" not in waiting.error.text.lower()


def test_who_waits_is_looked_at_again_only_after_a_change(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timer that rings changes nobody's prospects."""
    fill(bench)
    waiting = bench.submit()
    monkeypatch.setattr(bench.pool, "prospect", lambda *_: pytest.fail("asked again"))
    bench.dispatcher.kick()
    bench.sleep(10.0)
    assert waiting.waits


def test_calls_alike_in_model_are_not_alike_in_route(bench: Bench) -> None:
    """One route is gone everywhere: those who need it hear so, the others wait on."""
    fill(bench)
    chat, plain = bench.submit(), bench.submit(path="/api/generate")
    embed = bench.submit(path="/api/embed")
    for name in "ab":
        bench.catalog.note_no_route(name, "embed")
    bench.pool.turn("a", Switch.SERVING)
    assert isinstance(embed.error, errors.NoBackend)
    assert chat.waits
    assert plain.waits


def test_a_route_that_nobody_has_and_need_not_have_is_none(bench: Bench) -> None:
    """Not for somebody to be waited for, but unknown."""
    for name in "ab":
        bench.catalog.note_no_route(name, "v1_count_tokens")
    refused = bench.submit(path="/v1/messages/count_tokens")
    assert isinstance(refused.error, errors.UnknownRoute)
    assert "/v1/messages/count_tokens" in refused.error.text


def test_a_call_that_was_tried_everywhere_hears_what_happened(bench: Bench) -> None:
    """Each backend with its text, none of which may read as 'not found'."""
    attempts = (tried("a", V.FAULT), tried("b", V.MISSING, 2))
    refused = bench.submit(attempts=attempts, excluded=frozenset("ab"))
    assert isinstance(refused.error, errors.AttemptsExhausted)
    assert refused.error.text == (
        "Every backend that could serve 'm:1' failed: a: was fault; b: was missing"
    )
    assert isinstance(bench.submit(excluded=frozenset("ab")).error, errors.NoBackend)


def test_a_call_that_was_tried_and_has_nowhere_left_hears_both(bench: Bench) -> None:
    """What happened, and why the rest is out of use."""
    bench.pool.turn("b", Switch.DRAINING)
    refused = bench.submit(attempts=(tried("a"),), excluded=frozenset("a"))
    assert isinstance(refused.error, errors.NoBackend)
    assert refused.error.text.endswith("(b: draining). Tried before: a: was fault")


def test_a_model_the_rules_keep_from_everybody_is_forbidden(bench: Bench) -> None:
    """No time to come back, and no invitation to pull."""
    bench.shape(backend("a", deny=("*",)), backend("b", deny=("*",)))
    refused = bench.submit()
    assert isinstance(refused.error, errors.Forbidden)
    assert refused.error.retry_after_s is None


# -- loads -------------------------------------------------------------------------------------


def test_a_cold_call_waits_for_its_load(bench: Bench) -> None:
    """One load for all who want the model; when it is there they are served, cold and warm."""
    cold, other = bench.submit("n:1"), bench.submit("n:1")
    (load,) = bench.loads
    assert (load.backend, load.key, load.ticket) == ("a", key("n:1"), cold.ticket)
    bench.sleep(3.0)
    assert len(bench.loads) == 1
    bench.loaded()
    assert (cold.lease.why, cold.lease.cold) == ("cold", True)
    assert other.waits
    settle(bench, cold)
    assert other.lease.why == "warm"
    settle(bench, other)
    assert at_rest(bench)


def test_the_call_a_load_was_for_hears_of_its_failure(bench: Bench) -> None:
    """As of an attempt of its own, with the backend's answer; the next who waits gets a load."""
    first, second = bench.submit("n:1", id="1"), bench.submit("n:1", id="2")
    load = bench.loaded(verdict=V.UNFIT, weight=2, text="invalid file magic")
    error = first.error
    assert isinstance(error, LoadFailed)
    assert error.text == "invalid file magic"
    assert (error.attempt.number, error.attempt.backend) == (1, load.backend)
    assert error.attempt.outcome.caused_load
    assert error.answer is not None
    assert second.waits
    (load,) = bench.loads
    assert (load.backend, load.ticket) == ("b", second.ticket)
    bench.loaded()
    settle(bench, second)
    assert at_rest(bench)


def test_a_load_that_fails_without_blame_is_not_repeated_for_the_same_call(bench: Bench) -> None:
    """The breaker stays closed; what keeps the backend from being asked again is the news."""
    first = bench.submit("n:1")
    bench.loaded(verdict=V.UNCLEAR)
    assert isinstance(first.error, LoadFailed)
    assert bench.loads == []
    again = bench.submit("n:1", attempts=(first.error.attempt,), excluded=frozenset("a"), seq=1)
    assert [load.backend for load in bench.loads] == ["b"]
    bench.loaded()
    assert again.lease.why == "failover"
    settle(bench, again)


def test_a_load_that_was_stopped_is_neither_made_nor_failed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call hears nothing and waits on; the scheduler hears of no success; another begins."""
    cold, told = bench.submit("n:1"), list[Fact]()
    (load,) = bench.loads
    bench.loads.clear()
    bench.pool.end_load(load.backend, load.key, outcome(Verdict.STOPPED, bench.clock()))
    monkeypatch.setattr(bench.scheduler, "note", told.append)
    bench.dispatcher.load_stopped(load)
    assert told == [LoadRefused(load.backend, load.key)]
    assert [again.ticket for again in bench.loads] == [cold.ticket]
    assert cold.waits


def test_a_load_may_end_when_nobody_waits_for_it_any_more(bench: Bench) -> None:
    """Its call left: the load goes on, and its failure is nobody's."""
    gone = bench.submit("n:1")
    assert gone.ticket is not None
    bench.dispatcher.withdraw(gone.ticket)
    assert bench.pool.loading(key("n:1"))
    bench.loaded(verdict=V.UNFIT)
    assert gone.waits
    assert at_rest(bench)


def test_a_call_takes_what_comes_first(bench: Bench) -> None:
    """While its load is under way the model turns up elsewhere; the load's end is no news."""
    waiting = bench.submit("n:1")
    bench.holds("b", "m:1", "n:1")
    assert waiting.lease.backend.name == "b"
    bench.loaded(verdict=V.UNFIT, weight=2)
    assert waiting.errors == []
    settle(bench, waiting)


def test_the_limit_rests_while_a_load_is_under_way(bench: Bench) -> None:
    """The load's own budget bounds that wait; afterwards the queue's begins anew."""
    bench.shape(backend("a", slots=1))
    waiting = bench.submit("n:1")
    bench.sleep(190.0)
    assert waiting.waits
    assert bench.lease("a", "n:1") is not None
    bench.loaded()
    assert waiting.waits, "loaded, and taken by somebody else"
    bench.sleep(19.9)
    assert waiting.waits
    bench.sleep(0.1)
    assert isinstance(waiting.error, errors.QueueTimeout)


def test_a_deadline_does_not_rest(bench: Bench) -> None:
    """The caller's own limit holds through a load, also when it is renewed."""
    waiting = bench.submit("n:1", deadline=bench.clock() + 30.0)
    bench.sleep(29.9)
    assert waiting.waits
    bench.sleep(0.1)
    assert isinstance(waiting.error, errors.DeadlineExceeded)


@pytest.mark.parametrize("why", ["down", "tried"])
def test_the_limit_does_not_rest_for_a_load_that_cannot_help(bench: Bench, why: str) -> None:
    """The backend that loads has died, or the call has failed there before."""
    bench.lists("b", "m:1")
    loading = bench.submit("n:1")
    assert [load.backend for load in bench.loads] == ["a"]
    if why == "down":
        bench.check("a", ok=False, count=3)
        bench.sleep(18.0)
        assert isinstance(loading.error, errors.NoBackend)
    else:
        bench.lists("b", "m:1", "n:1")
        bench["b"].loading = bench["a"].loading
        again = bench.submit("n:1", attempts=(tried("b"),), excluded=frozenset("ab"))
        assert isinstance(again.error, errors.AttemptsExhausted)


def test_a_load_elsewhere_renews_no_limit(bench: Bench) -> None:
    """Those who cannot go there did not wait for it."""
    bench.pool.turn("b", Switch.DISABLED)
    bench.submit("n:1")
    bench.pool.turn("b", Switch.SERVING)
    bench["b"].loading = bench["a"].loading  # its token is taken: nothing can start there
    other = bench.submit("n:1", attempts=(tried("a"),), excluded=frozenset("a"))
    assert other.ticket is not None
    limit_at = other.ticket.limit_at
    bench.sleep(5.0)
    bench.loaded()
    assert other.ticket.limit_at == limit_at


def test_a_load_on_a_backend_that_goes_away_is_not_waited_for(bench: Bench) -> None:
    """Another is loaded, and the call is served there."""
    waiting = bench.submit("n:1")
    bench.pool.turn("a", Switch.DRAINING)
    assert [load.backend for load in bench.loads] == ["a", "b"]
    bench.loads.reverse()
    bench.loaded()
    assert waiting.lease.backend.name == "b"
    bench.loaded()
    settle(bench, waiting)
    assert at_rest(bench)


def test_an_overdue_load_is_not_waited_for(bench: Bench) -> None:
    """The timer asks for the instant at which another backend is tried."""
    bench.submit("n:1")
    limit_s = OVERDUE_FACTOR * load_estimate_s(4 * GB) + OVERDUE_EXTRA_S
    bench.sleep(limit_s - 0.1)
    assert len(bench.loads) == 1
    bench.sleep(0.1)
    assert [load.backend for load in bench.loads] == ["a", "b"]


def test_a_second_copy_is_loaded_when_it_is_worth_it(bench: Bench) -> None:
    """Every copy full for as long as a load would take: the timer tells, nobody else."""
    bench.holds("b")
    first = bench.submit()
    waiting = bench.submit()
    bench.sleep(load_estimate_s(4 * GB) - 0.1)
    assert bench.loads == []
    bench.sleep(0.1)
    assert [load.backend for load in bench.loads] == ["b"]
    bench.loaded()
    assert waiting.lease.backend.name == "b"
    settle(bench, first)
    settle(bench, waiting)
    assert at_rest(bench)


def test_a_token_that_comes_back_wakes_who_waits_for_it(bench: Bench) -> None:
    """Two cold models, one backend: the second load begins as the first ends."""
    bench.shape(backend("a", slots=1))
    bench.lists("a", "m:1", "n:1", "o:1")
    first, second = bench.submit("n:1"), bench.submit("o:1")
    assert [load.key for load in bench.loads] == [key("n:1")]
    bench.loaded()
    assert [load.key for load in bench.loads] == [key("o:1")]
    bench.loaded(verdict=V.OVERDUE)
    assert isinstance(second.error, LoadFailed)
    settle(bench, first)
    assert at_rest(bench)


# -- in the midst of things --------------------------------------------------------------------


def test_a_grant_may_set_off_more_calls(bench: Bench) -> None:
    """Submitted out of a call-back, they are planned in the same turn."""
    inner: list[Client] = []

    def granted(lease: Lease) -> None:
        inner.append(bench.submit(id="inner"))
        lease.release()

    bench.dispatcher.submit(call(), granted, lambda _: None)
    assert [client.lease.backend.name for client in inner] == ["b"]
    settle(bench, inner[0])
    assert at_rest(bench)


def test_a_refusal_may_set_off_more_calls(bench: Bench) -> None:
    """A shell that tries again at once, while others are being refused."""
    again: list[Client] = []
    clients = fill(bench)
    for _ in range(2):
        bench.dispatcher.submit(call(), lambda _: None, lambda _: again.append(bench.submit()))
    bench.sleep(20.0)
    assert len(again) == 2
    assert all(client.waits for client in again)
    for client in clients:
        settle(bench, client)
    for client in again:
        settle(bench, client)
    assert at_rest(bench)


def withdrawing(bench: Bench, victim: Client) -> Callable[[Lease], None]:
    """A grant at which somebody else leaves."""

    def granted(lease: Lease) -> None:
        assert victim.ticket is not None
        bench.dispatcher.withdraw(victim.ticket)
        lease.release()

    return granted


def test_who_leaves_while_others_are_answered_gets_no_lease(bench: Bench) -> None:
    """Planned in the same pass, and gone when its turn comes: no slot is touched for it."""
    clients = fill(bench)
    victim = Client(call(id="victim"))
    bench.dispatcher.submit(call(), withdrawing(bench, victim), lambda _: None)
    victim = bench.submit(id="victim")
    granted = withdrawing(bench, victim)
    owner = next(iter(bench.dispatcher._owners.values()))
    owner.on_grant = granted
    bench.pool.changed = lambda: None
    for client in clients:
        settle(bench, client)
    bench.dispatcher.kick()
    assert victim.waits
    assert "victim" not in [event.call_id for event in bench.of(AttemptEnded)]
    bench.pool.changed = bench.dispatcher.kick
    assert at_rest(bench)
    assert bench.scheduler.waiting() == []


def test_who_leaves_while_others_are_answered_gets_no_load(bench: Bench) -> None:
    """The same for a load that nobody waits for any more."""
    (hog,) = fill(bench, 1)
    bench.pool.turn("b", Switch.DRAINING)
    victim = Client(call())
    ticket = bench.dispatcher.submit(call(), lambda _: None, lambda _: None)
    bench["a"].loading = None
    victim = bench.submit("n:1", id="victim")
    bench.loaded(verdict=V.STOPPED)  # its load is gone: it will be planned anew
    victim = bench.submit("n:1", id="victim")
    assert bench.loads
    bench.loads.clear()
    bench["a"].loading = None
    bench.dispatcher._owners[ticket].on_grant = withdrawing(bench, victim)
    settle(bench, hog)
    assert bench.loads == []
    assert at_rest(bench)


def test_a_slot_lost_in_the_same_turn_is_waited_for_again(bench: Bench) -> None:
    """Between plan and lease a call-back closed the backend: the ticket goes back to its place."""
    clients = fill(bench)
    facts: list[Fact] = []
    note = bench.scheduler.note
    bench.scheduler.note = lambda fact: (facts.append(fact), note(fact))[1]  # type: ignore[func-returns-value, method-assign]

    def closing(lease: Lease) -> None:
        lease.release()
        bench.pool.turn("b", Switch.DRAINING)

    bench.pool.changed = lambda: None
    bench.dispatcher.submit(call(), closing, lambda _: None)
    unlucky = bench.submit(id="unlucky")
    for client in clients:
        settle(bench, client)
    bench.pool.changed = bench.dispatcher.kick
    hog = bench.lease("a")
    assert hog is not None
    hog.release()
    assert unlucky.lease.backend.name == "a"
    refused = [fact for fact in facts if isinstance(fact, CommitRefused)]
    assert [fact.backend for fact in refused] == ["b"]
    settle(bench, unlucky)
    assert at_rest(bench)


def test_turns_end_even_if_call_backs_never_do(bench: Bench) -> None:
    """A call-back that sets off another each time: the rest is left to the timer."""
    granted = 0

    def again(lease: Lease) -> None:
        nonlocal granted
        granted += 1
        lease.release()
        if granted < 50:
            bench.dispatcher.submit(call(), again, lambda _: None)

    bench.dispatcher.submit(call(), again, lambda _: None)
    assert granted == MAX_PASSES
    assert bench.wake_at == bench.clock(), "at once, but not in this turn"
    bench.sleep(0.0)
    assert granted == 50
    assert at_rest(bench)


def test_everybody_is_answered_when_the_balancer_ends(bench: Bench) -> None:
    """Waiting calls hear why; leases that are out are not touched."""
    clients = fill(bench)
    waiting = [bench.submit(), bench.submit("n:1")]
    bench.dispatcher.refuse_all(Draining("stopping"))
    assert [type(client.error) for client in waiting] == [Draining, Draining]
    assert bench.dispatcher.waiting() == []
    assert bench.pool.running == 2
    for client in clients:
        settle(bench, client)


# -- schedulers --------------------------------------------------------------------------------


def test_schedulers_can_be_exchanged_under_load(bench: Bench) -> None:
    """Waiting tickets move over in their order; nobody is answered twice or forgotten."""
    clients = fill(bench)
    waiting = [bench.submit(), bench.submit()]
    bench.dispatcher.exchange(Greedy(POLICIES["round-robin"], bench.pool))
    assert bench.dispatcher.waiting() == [client.ticket for client in waiting]
    for client in clients:
        settle(bench, client)
    for client in waiting:
        settle(bench, client)
    assert at_rest(bench)
    assert bench.scheduler.waiting() != []  # the old one is not asked any more


@pytest.mark.parametrize("policy", ["plan", "least-loaded"])
@pytest.mark.parametrize(
    "size", [0, -1, 1 << 63, pytest.param(10**400, id="huge"), 1e300, "7", True]
)
def test_a_backend_that_tells_nonsense_of_a_size_stops_nobody(policy: str, size: Any) -> None:
    """Neither calls that start nor those that wait or need a load: it counts as not told."""
    bench = Bench(policy)
    for name in "ab":
        bench.start(name, "m:1", "n:1", loaded=["m:1"])
        told: list[Any] = [tag(model) | {"size": size} for model in ("m:1", "n:1")]
        bench.pool.note_tags(name, told, bench.clock())
    clients = [bench.submit() for _ in range(5)]
    cold = bench.submit("n:1")
    assert [bool(client.leases) for client in clients] == [True] * 4 + [False]
    assert cold.waits
    assert bench.loads
    bench.close()


@pytest.mark.parametrize("began", [False, True])
def test_a_call_that_tries_a_slot_too_many_is_not_waited_for_by_another_scheduler(
    bench: Bench, *, began: bool
) -> None:
    """Else no slot would ever be tried there again: nobody tells how it ended."""
    belief, model = bench["a"].load.belief, canon("m:1")
    belief.configured = None
    belief.first_byte(model, 1, bench.clock(), was_probe=False)
    bench.clock.advance(10.0)
    assert belief.may_probe(model, bench.clock())
    belief.probing(model, bench.clock())
    lease = bench.pool.lease(call("m:1"), "a", 1, "warm", probe=True)
    assert lease is not None
    bench.dispatcher.exchange(Greedy(POLICIES["round-robin"], bench.pool))
    if began:
        lease.moved()
    lease.settle(outcome(V.OK, bench.clock()))
    bench.clock.advance(60.0)
    assert belief.may_probe(model, bench.clock())


def test_what_was_learned_goes_on_with_another_scheduler(bench: Bench) -> None:
    """By a reload; and from a file, with its age."""
    told: dict[str, Any] = {"speeds": {"a": {}}}
    bench.dispatcher.recall(told, 60.0)
    bench.dispatcher.exchange(Greedy(POLICIES["round-robin"], bench.pool))
    assert bench.dispatcher.learned() == told


def test_a_free_slot_in_a_lower_tier_is_no_room(bench: Bench) -> None:
    """Nobody is sent there while a higher one can serve, so the queue's bounds hold."""
    bench.shape(backend("a", slots=1), backend("b", slots=1, priority=50))
    assert bench.pool.priorities == {"a": 100, "b": 50}
    running = bench.submit()
    assert running.lease.backend.name == "a"
    waiting = [bench.submit() for _ in range(3)]
    assert all(client.waits for client in waiting)
    assert isinstance(bench.submit().error, errors.QueueFull)
    assert bench.dispatcher.forecast(call()).kind == "refused"
    bench.check("a", ok=False, count=3)
    assert [client.lease.backend.name for client in waiting if client.leases] == ["b"]
    settle(bench, running)
    for client in waiting:
        settle(bench, client)
    bench.shape(backend("a"), backend("b"))
    assert bench.pool.priorities == {}


class Scripted(Greedy):
    """A scheduler that says what the test says."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(POLICIES["least-loaded"], bench.pool)
        self.script: list[Effect] = []
        self.plans = 0
        self.facts: list[Fact] = []

    def plan(self, now: float) -> list[Effect]:
        self.plans += 1
        return list(self.script)

    def begin(self, ticket: Ticket, now: float) -> None:
        """Everything is said by the script."""

    def note(self, fact: Fact) -> None:
        self.facts.append(fact)


@pytest.fixture
def scripted(bench: Bench) -> Scripted:
    """The bench's dispatcher with a scheduler by script."""
    scheduler = Scripted(bench)
    bench.dispatcher.exchange(scheduler)
    return scheduler


def test_a_scheduler_may_refuse_and_unload(bench: Bench, scripted: Scripted) -> None:
    """The whole door is carried out, also what the greedy ones never say."""
    client = bench.submit()
    assert client.ticket is not None
    unload = Unload("a", key("m:1"))
    scripted.script = [Refuse(client.ticket, errors.QueueTimeout("hopeless")), unload]
    bench.dispatcher.kick()
    assert client.error.text == "hopeless"
    assert bench.unloads == [unload]


def test_a_load_whose_token_is_taken_does_not_spin(bench: Bench, scripted: Scripted) -> None:
    """Asked for again and again by each pass, it is refused once in each, and wakes nobody."""
    client = bench.submit("n:1")
    assert client.ticket is not None
    assert bench.pool.take_token("a", key("m:1"), "somebody else's")
    scripted.script = [Load(client.ticket, "a", key("n:1"), "why")]
    plans = scripted.plans
    bench.dispatcher.kick()
    assert scripted.plans == plans + 1
    assert bench.loads == []
    assert bench.wake_at == client.ticket.limit_at


def test_a_commit_that_is_refused_does_not_spin(bench: Bench, scripted: Scripted) -> None:
    """It is noted back, the ticket waits on, and one kick is one pass."""
    assert bench.lease("a") is not None
    client = bench.submit()
    assert client.ticket is not None
    scripted.withdraw(client.ticket)  # as a plan does with what it commits
    scripted.script = [Commit(client.ticket, "a", "warm")]
    plans = scripted.plans
    bench.dispatcher.kick()
    assert scripted.plans == plans + 1
    assert scripted.facts[1:] == [CommitRefused(client.ticket, "a")]
    assert client.waits
    assert scripted.waiting() == [client.ticket]


def test_the_scheduler_hears_what_came_of_its_plans(bench: Bench, scripted: Scripted) -> None:
    """Ends of leases and of loads reach whichever scheduler is there."""
    lease = bench.lease("a")
    assert lease is not None
    bench.clock.advance(2.0)
    lease.settle(outcome())
    client = bench.submit("n:1")
    assert client.ticket is not None
    load = Load(client.ticket, "a", key("n:1"), "why")
    scripted.script = [load]
    bench.dispatcher.kick()
    scripted.script = []
    bench.loaded()
    ended, answered = (f for f in scripted.facts if isinstance(f, Ended | LoadAnswered))
    assert isinstance(ended, Ended)
    assert (ended.run.backend, ended.run.key) == ("a", key("m:1"))
    assert answered == LoadAnswered("a", key("n:1"), ok=True, load_s=1.0)
    bench.dispatcher.refuse_all(Draining("end"))


def test_a_ticket_that_waits_has_a_timer(bench: Bench) -> None:
    """With nobody waiting the timer is off; with somebody it is never later than the limit."""
    assert bench.wake_at == math.inf
    clients = fill(bench)
    waiting = bench.submit()
    assert bench.wake_at == bench.clock() + 20.0
    settle(bench, clients[0])
    assert bench.wake_at == math.inf
    settle(bench, clients[1])
    settle(bench, waiting)


def test_errors_of_loads_are_errors_of_ours(bench: Bench) -> None:
    """If a shell lets one through, it is a 503 with a text."""
    client = bench.submit("n:1")
    bench.loaded(verdict=V.FAULT)
    assert isinstance(client.error, BalancerError)
    assert (client.error.status, client.error.code) == (503, "load_failed")


def test_a_load_of_another_variant_does_not_count_as_ours(bench: Bench) -> None:
    """Limits rest for the very options that are being loaded."""
    bench.shape(backend("a", slots=1))
    bench.submit("n:1", options={"num_ctx": 1})
    other = bench.submit("n:1", options={"num_ctx": 2})
    found = bench.pool.candidates(other.call, frozenset())
    assert [c.residency for c in found] == [Residency.ON_DISK]
    bench.sleep(20.0)
    assert isinstance(other.error, errors.QueueTimeout)
    assert canon("n:1") in other.call.key.model


def test_a_call_is_what_was_submitted(bench: Bench) -> None:
    """The lease carries the very call."""
    wanted: list[Call] = []
    one = call(id="the one")
    bench.dispatcher.submit(one, lambda lease: wanted.append(lease.call), lambda _: None)
    assert wanted == [one]


def test_a_shell_may_ask_whether_to_look_elsewhere(bench: Bench) -> None:
    """Somebody else could serve the call now, or nobody could."""
    assert bench.dispatcher.is_served_elsewhere(call(), frozenset("a"))
    bench.pool.turn("b", Switch.DRAINING)
    assert not bench.dispatcher.is_served_elsewhere(call(), frozenset("a"))


# -- forecasts ---------------------------------------------------------------------------------


def drained(bench: Bench) -> None:
    for name in "ab":
        bench.pool.turn(name, Switch.DRAINING)


def broken(bench: Bench) -> None:
    for name in "ab":
        bench[name].gate.trip("test")


def emptied(bench: Bench) -> None:
    for name in "ab":
        bench.holds(name)


def loading(bench: Bench) -> None:
    emptied(bench)
    assert bench.pool.take_token("a", key("m:1"), "test")


def unlisted(bench: Bench) -> None:
    for name in "ab":
        bench.lists(name, "n:1")


FORECASTS: dict[str, tuple[Callable[[Bench], object], str, int, str, str]] = {
    "free": (lambda b: None, "now", 200, "a", "goes to a now"),
    "full": (fill, "queue", 200, "", "waits in the queue for a slot"),
    "cold": (emptied, "load", 200, "a", "is loaded on a first"),
    "loading": (loading, "load", 200, "a", "waits for the load on a"),
    "drained": (drained, "refused", 503, "", "a: draining; b: draining"),
    "broken": (broken, "away", 200, "", "waits for a backend to come back"),
    "unknown": (unlisted, "refused", 404, "", "not found"),
    "forbidden": (
        lambda b: b.shape(*(backend(n, deny=("m:*",)) for n in "ab")),
        "refused",
        403,
        "",
        "rule it out",
    ),
}


@pytest.mark.parametrize("case", FORECASTS)
def test_a_forecast_says_what_then_happens(bench: Bench, case: str) -> None:
    """And asking changes nothing: no event, no queue, no load, nobody else's turn."""
    happens, kind, status, backend, text = FORECASTS[case]
    happens(bench)
    events, loads = len(bench.events), len(bench.loads)
    asked = {name: dict(bench[name].asked) for name in "ab"}
    told = bench.dispatcher.forecast(call())
    assert (told.kind, told.status, told.backend) == (kind, status, backend)
    assert text in told.text
    assert (len(bench.events), len(bench.loads)) == (events, loads)
    assert {name: dict(bench[name].asked) for name in "ab"} == asked
    assert bench.dispatcher.waiting() == []
    client = bench.submit()
    if kind == "refused":
        assert (client.error.status, client.error.text) == (status, told.text)
    elif kind == "now":
        (lease,) = client.leases
        assert lease.backend.name == backend
    else:
        assert client.waits
        assert kind != "load" or bench["a"].loading is not None
    for lease in client.leases:
        lease.release()


def test_a_forecast_of_a_full_queue(bench: Bench) -> None:
    """Whoever may not wait hears what `submit` would say."""
    fill(bench)
    bench.admission.limits = QueueLimits(max_depth_per_model=1)
    waiting = bench.submit()
    told = bench.dispatcher.forecast(call())
    assert (told.kind, told.status) == ("refused", 503)
    assert "queue.max_depth_per_model" in told.text
    assert told.text == bench.submit().error.text
    bench.admission.limits = QueueLimits(max_wait_s=0.0)
    told = bench.dispatcher.forecast(call())
    assert (told.kind, told.status) == ("refused", 503)
    assert "queue.max_wait" in told.text
    assert waiting.waits


def test_a_forecast_warns_of_a_wait_that_is_too_long(bench: Bench) -> None:
    """The estimate, and the setting that ends the wait before it."""
    fill(bench)
    bench.admission.limits = QueueLimits(max_wait_s=0.5)
    told = bench.dispatcher.forecast(call())
    assert (told.kind, told.wait_s) == ("queue", 5.0 / 2)
    assert "queue.max_wait" in told.text


def test_a_forecast_without_some(bench: Bench) -> None:
    """Where it would go if that one had failed it."""
    assert bench.dispatcher.forecast(call(), frozenset("a")).backend == "b"
    told = bench.dispatcher.forecast(call(), frozenset("ab"))
    assert (told.kind, told.status) == ("refused", 503)


# -- which of several models -------------------------------------------------------------------


def choice(bench: Bench, *models: str, exists: bool = True) -> str:
    """The model chosen of these."""
    calls = [call(model) for model in models]
    return models[bench.dispatcher.choose(calls, exists=exists)]


def test_the_first_model_that_can_be_served_now_is_chosen(bench: Bench) -> None:
    """In memory or not, busy or not; one that nobody has is passed over."""
    assert choice(bench, "n:1", "m:1") == "n:1"
    assert choice(bench, "x:1", "m:1", "n:1") == "m:1"
    fill(bench)
    assert choice(bench, "m:1", "n:1") == "m:1"


def test_with_none_now_the_first_known_is_chosen(bench: Bench) -> None:
    """It may come back; with none known either, the first: its refusal says what to do."""
    for name in "ab":
        bench.check(name, ok=False, count=3)
    assert choice(bench, "x:1", "n:1", "m:1") == "n:1"
    assert choice(bench, "x:1", "y:1") == "x:1"


def test_to_ask_which_leaves_no_trace_unless_there_is_a_call(bench: Bench) -> None:
    """What is asked about is not worth a trial; what is called is."""
    for name in "ab":
        bench[name].gate.trip("3 in a row")
    choice(bench, "m:1", exists=False)
    assert bench["a"].asked == {}
    choice(bench, "m:1")
    assert canon("m:1") in bench["a"].asked


def test_who_is_behind_the_chosen_is_not_asked_for(bench: Bench) -> None:
    """A trial must load nothing for an alias's second model while the first one serves."""
    bench["b"].gate.trip("3 in a row")
    bench.lists("a", "m:1")
    assert choice(bench, "m:1", "n:1") == "m:1"
    assert list(bench["b"].asked) == [canon("m:1")]
    assert choice(bench, "n:1", "m:1") == "m:1"
    assert canon("n:1") in bench["b"].asked, "that one is wanted, and only missing for now"


def test_who_comes_back_by_itself_is_chosen_before_who_does_not(bench: Bench) -> None:
    """Nobody knows when the operator's drain ends."""
    bench.lists("a", "m:1")
    bench.lists("b", "n:1")
    bench.pool.turn("a", Switch.DRAINING)
    assert choice(bench, "m:1", "x:1") == "m:1"
    bench.check("b", ok=False, count=3)
    assert choice(bench, "m:1", "n:1") == "n:1"
    assert choice(bench, "x:1", "m:1") == "m:1", "known all the same: 503, not 404"


def test_a_hint_names_only_what_the_caller_may_hear_of(bench: Bench) -> None:
    """Also when two wait for one model, and it goes away."""
    bench.lists("a", "m:1", "mine:1", "mine:12")
    bench.lists("b", "m:1")
    fill(bench)
    first = bench.submit("mine:1")
    few = Principal("k", Role.USER, ("m:1", "mine:1"))
    second = bench.submit("mine:1", principal=few)
    assert first.waits
    assert second.waits
    bench.lists("a", "m:1", "mine:12")
    assert "mine:12" in first.error.text
    assert "mine:12" not in second.error.text


@pytest.mark.parametrize("fails", [False, True])
def test_who_waits_for_the_first_list_hears_when_it_is_empty(*, fails: bool) -> None:
    """Or when it cannot be read: what is known of the model then is all there is to know."""
    bench = Bench()
    bench.shape("a")
    bench.check("a")
    client = bench.submit("n:1")
    assert client.waits
    if fails:
        bench.pool.note_failed("a")
    else:
        bench.lists("a")
    assert isinstance(client.error, errors.NoBackend if fails else errors.UnknownModel)


def test_a_call_that_leaves_its_weights_is_marked(bench: Bench) -> None:
    """Only then; a failover to the same weights is one."""
    rows = [tag(model) | {"digest": "f" * 64} for model in ("m:1", "n:1")]
    bench.pool.note_tags("b", rows, bench.clock())
    bench.holds("b", "m:1")
    client = bench.submit()
    assert (client.lease.backend.name, client.lease.why) == ("b", "only")
    settle(bench, client, V.FAULT)
    other = bench.submit(excluded=frozenset("b"), attempts=(tried("b"),), seq=1)
    assert (other.lease.backend.name, other.lease.why) == ("a", "other-weights")
    settle(bench, other)


# -- what a key may use ------------------------------------------------------------------------


def limited(slots: int, owner: str = "key:few") -> dict[str, Any]:
    """Of a call whose key may have so many at once."""
    allowed = Allowance(slots=slots)
    return {"owner": owner, "principal": Principal("few", Role.USER, allowance=allowed)}


def leave(bench: Bench, client: Client) -> None:
    """It does not wait any longer."""
    assert client.ticket is not None
    bench.dispatcher.withdraw(client.ticket)


@pytest.mark.parametrize("policy", [*POLICIES, "plan"])
def test_what_is_beyond_the_slots_of_a_key_waits(policy: str) -> None:
    """While others go on, before and behind it; then it is its turn, and nothing is lost."""
    bench = Bench(policy)
    bench.shape(backend("a", slots=4))
    bench.up("a", "m:1", loaded=["m:1"])
    mine = [bench.submit(**limited(1)) for _ in range(3)]
    others = [bench.submit(owner="key:other") for _ in range(2)]
    assert [client.waits for client in mine] == [False, True, True]
    assert [client.waits for client in others] == [False, False]
    for number in range(3):
        settle(bench, mine[number])
        assert [client.waits for client in mine[number + 1 :]] == [False, True][: 2 - number]
    for client in others:
        settle(bench, client)
    assert at_rest(bench)
    assert bench.limits.all_running() == {}


def test_one_pass_keeps_to_the_slots_of_a_key() -> None:
    """Also where several come free at once."""
    bench = Bench()
    bench.shape(backend("a", slots=4))
    bench.up("a", "m:1")
    mine = [bench.submit(**limited(2)) for _ in range(4)]
    assert all(client.waits for client in mine)
    bench.holds("a", "m:1")
    bench.loaded()
    assert [client.waits for client in mine] == [False, False, True, True]
    for client in mine:
        settle(bench, client)
    assert at_rest(bench)


def test_a_key_at_its_slots_loads_nothing() -> None:
    """A call that may not start needs no copy."""
    bench = Bench()
    bench.shape(backend("a", slots=4))
    bench.up("a", "m:1", "n:1", loaded=["m:1"])
    running = bench.submit(**limited(1))
    waiting = bench.submit("n:1", **limited(1))
    assert bench.loads == []
    settle(bench, running)
    assert [load.key.model for load in bench.loads] == [canon("n:1")]
    leave(bench, waiting)
    bench.close()


def test_who_waits_for_his_own_slots_hears_so() -> None:
    """The pool is not to blame; and the queue's bounds hold for him, too."""
    bench = Bench(limits=LIMITS)
    bench.shape(backend("a", slots=9))
    bench.up("a", "m:1", loaded=["m:1"])
    first = bench.submit(**limited(1))
    late = [bench.submit(**limited(1)) for _ in range(4)]
    assert isinstance(late.pop().error, errors.QueueFull)
    bench.sleep(20.0)
    for client in late:
        assert isinstance(client.error, errors.QueueTimeout)
        assert "1 calls running, as many as it may (limits.slots)" in client.error.text
    settle(bench, first)
    assert at_rest(bench)


# -- who would wait in vain --------------------------------------------------------------------


def busy(bench: Bench, seconds: float) -> list[Client]:
    """Every slot is taken by calls like one that took so long."""
    first = bench.submit()
    bench.clock.advance(seconds)
    for name in "ab":
        bench.holds(name, "m:1")
    settle(bench, first)
    return fill(bench)


def test_who_would_wait_in_vain_is_refused_on_arrival(bench: Bench) -> None:
    """By how long calls hold their slots, and how many are before it."""
    running = busy(bench, 30.0)
    waiting = bench.submit()  # two slots for its 30 s: 15
    assert waiting.waits
    refused = bench.submit()
    assert isinstance(refused.error, errors.WaitTooLong)
    assert refused.error.wait_s == pytest.approx(30.0)
    assert "about 30 s, and this call may wait only 20 s" in refused.error.text
    for client in (*running, waiting):
        settle(bench, client)
    assert at_rest(bench)


def test_how_wrong_an_estimate_was_is_counted(bench: Bench) -> None:
    """Whether the wait was longer or shorter, and by how much; passes are timed beside it."""
    running = busy(bench, 30.0)
    waiting = bench.submit()
    bench.sleep(5.0)
    settle(bench, running.pop())
    assert not waiting.waits
    late = bench.dispatcher.late
    assert late["shorter"].sum == pytest.approx(10.0)
    assert sum(late["longer"].counts) == 0
    assert sum(late["shorter"].counts) == 1
    assert sum(bench.dispatcher.pass_s.counts) > 0
    for client in (*running, waiting):
        settle(bench, client)


def test_a_call_with_little_time_is_refused_sooner(bench: Bench) -> None:
    """By its own deadline; who has time enough waits."""
    running = busy(bench, 30.0)
    refused = bench.submit(deadline=bench.clock() + 10.0)
    assert isinstance(refused.error, errors.WaitTooLong)
    assert "its own time limit" in refused.error.text
    waiting = bench.submit(deadline=bench.clock() + 16.0)
    assert waiting.waits
    for client in (*running, waiting):
        settle(bench, client)


def test_before_anything_is_known_nobody_is_refused(bench: Bench) -> None:
    """A guess is no estimate."""
    running = fill(bench)
    waiting = [bench.submit(deadline=bench.clock() + 1.0) for _ in range(3)]
    assert all(client.waits for client in waiting)
    ticket = waiting[0].ticket
    assert ticket is not None
    assert bench.dispatcher.estimate_s(ticket) == math.inf
    for client in (*running, *waiting):
        settle(bench, client)


def test_a_free_slot_is_never_refused(bench: Bench) -> None:
    """However long calls have taken."""
    settle(bench, busy(bench, 300.0)[0])
    assert not bench.submit().errors
    bench.close()


def test_who_waits_for_a_load_is_not_refused(bench: Bench) -> None:
    """A load takes what it takes; without it the model would never be there."""
    settle(bench, bench.submit())
    waiting = bench.submit("n:1", deadline=bench.clock() + 1.0)
    assert waiting.waits
    leave(bench, waiting)


def test_who_has_been_let_in_is_not_refused_later(bench: Bench) -> None:
    """A call that is tried again keeps its place, whatever the estimate is now."""
    running = busy(bench, 300.0)
    again = bench.submit(attempts=(tried("a"),), seq=1)
    assert again.waits
    for client in (*running, again):
        settle(bench, client)


def test_the_operator_may_let_them_wait() -> None:
    """`queue.adaptive: false`."""
    bench = Bench(limits=QueueLimits(max_wait_s=20.0, adaptive=False))
    bench.shape(backend("a", slots=1), backend("b", slots=1))
    for name in "ab":
        bench.up(name, "m:1", loaded=["m:1"])
    busy(bench, 300.0)
    assert bench.submit().waits
    bench.dispatcher.refuse_all(Draining("over"))
    bench.close()


def test_a_forecast_knows_of_early_refusals(bench: Bench) -> None:
    """As a call would hear it; to wonder counts as no refusal."""
    running = busy(bench, 60.0)
    told = bench.dispatcher.forecast(call())
    assert (told.kind, told.status) == ("refused", 503)
    assert told.wait_s == pytest.approx(30.0)
    assert told.text == "would wait about 30 s, longer than queue.max_wait"
    assert isinstance(bench.submit().error, errors.WaitTooLong)
    assert bench.admission.refused == {"wait": 1}
    for client in running:
        settle(bench, client)


def test_what_time_changed_is_told_once(bench: Bench) -> None:
    """Also when nobody waits any more: not at each turn from then on."""
    bench.recover("a", "m:1", loaded=["m:1"])
    busy = fill(bench)
    waiting = bench.submit()
    (refused,) = (client for client in busy if client.lease.backend.name == "b")
    settle(bench, refused, V.BUSY)
    assert waiting.waits
    leave(bench, waiting)
    told: list[Fact] = []
    bench.pool.note = told.append
    for _ in range(9):
        bench.clock.advance(60.0)
        bench.dispatcher._is_timed, bench.dispatcher._due = True, bench.clock()
        bench.dispatcher.kick()
    assert len(told) <= 2
