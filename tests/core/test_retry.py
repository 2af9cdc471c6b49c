"""Retries: which repeats a call may have, and what they may cost all together."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.domain import (
    Attempt,
    Call,
    Dialect,
    Kind,
    Outcome,
    PlacementKey,
    Principal,
    Purpose,
    Role,
    Route,
    Verdict,
)
from balancer.core.retry import Budget, again, excluded, repeats_crash
from balancer.core.verdicts import TABLE, Before
from tests.core.clocks import ManualClock

CALL = Call(
    id="1",
    route=Route("POST", "/api/chat", Dialect.OLLAMA, "chat", Kind.ONE, replayable=True),
    model="llama",
    key=PlacementKey("llama"),
    streaming=True,
    purpose=Purpose.RUN,
    replayable=True,
    principal=Principal("anonymous", Role.USER),
    arrived_at=0.0,
    deadline=None,
    body=b"",
)
FAULT = Outcome(Verdict.FAULT, 50.0, 50.1)
CRASH = replace(FAULT, crash=True)
LOAD = Outcome(Verdict.UNFIT, 50.0, 50.1, caused_load=True)
LONG = Outcome(Verdict.SLOW, 50.0, 55.1)
UNCLEAR = Outcome(Verdict.UNCLEAR, 50.0, 50.1, status=500)
STALE = Outcome(Verdict.STALE, 50.0, 50.1)


@pytest.fixture
def clock() -> ManualClock:
    """Time by hand."""
    return ManualClock()


@pytest.fixture
def budget(clock: ManualClock) -> Budget:
    """The defaults: a fifth of the calls of 10 s, and 1/s besides."""
    return Budget(clock)


def tried(*outcomes: Outcome) -> list[Attempt]:
    """Attempts on distinct backends, in order."""
    return [Attempt(n, f"b{n}", outcome) for n, outcome in enumerate(outcomes, 1)]


def spent(budget: Budget, attempts: list[Attempt], call: Call = CALL) -> float | None:
    """What a repeat cost; None: there was none."""
    before = budget.tokens
    if not again(call, attempts, budget):
        assert budget.tokens == before
        return None
    return round(before - budget.tokens, 6)


# -- may it be tried again ---------------------------------------------------------------------


@pytest.mark.parametrize("verdict", list(Verdict))
def test_the_table_decides(budget: Budget, verdict: Verdict) -> None:
    """After one ending, it is the verdict's row that allows another attempt, or not."""
    allowed = TABLE[verdict].before in (Before.ANOTHER, Before.ONE_OTHER, Before.SAME_FRESH)
    assert again(CALL, tried(Outcome(verdict, 50.0, 50.1)), budget) == allowed


def test_some_rows_by_name(budget: Budget) -> None:
    """The table is not read upside down: faults go elsewhere, callers' mistakes do not."""
    allowed = [v for v in Verdict if again(CALL, tried(Outcome(v, 50.0, 50.1)), budget)]
    assert {Verdict.FAULT, Verdict.BUSY, Verdict.MISSING, Verdict.STALE} <= set(allowed)
    assert not {Verdict.OK, Verdict.CALLER, Verdict.GONE, Verdict.BROKEN} & set(allowed)


def test_as_many_backends_as_there_are(budget: Budget) -> None:
    """Quick faults and busy backends are bounded by the pool, not by a number of attempts."""
    busy = Outcome(Verdict.BUSY, 50.0, 50.1, status=503)
    assert again(CALL, tried(*[busy, FAULT] * 5), budget)


def test_never_after_commit(budget: Budget) -> None:
    """What the client has seen begin cannot begin again."""
    assert not again(CALL, tried(replace(FAULT, committed=True)), budget)


def test_not_past_the_deadline(budget: Budget) -> None:
    """An attempt that ended at the deadline was the last."""
    call = replace(CALL, deadline=50.1)
    assert not again(call, tried(FAULT), budget)
    assert again(call, tried(replace(FAULT, ended_at=50.09)), budget)


def test_what_costs_money_is_sent_once(budget: Budget) -> None:
    """A call that is not replayable is repeated only if nothing of it went out."""
    call = replace(CALL, replayable=False)
    assert not again(call, tried(FAULT), budget)
    assert again(call, tried(FAULT), budget, unsent=True)
    assert again(call, tried(replace(FAULT, verdict=Verdict.NO_ROUTE)), budget)


def test_an_unclear_answer_is_asked_for_twice(budget: Budget) -> None:
    """One other backend may say otherwise; whatever failed between does not count."""
    assert again(CALL, tried(UNCLEAR), budget)
    assert not again(CALL, tried(UNCLEAR, replace(UNCLEAR, status=501)), budget)
    assert again(CALL, tried(UNCLEAR, FAULT), budget)
    assert not again(CALL, tried(UNCLEAR, FAULT, UNCLEAR), budget)


@pytest.mark.parametrize("outcome", [CRASH, LOAD, LONG])
def test_harm_is_bounded(budget: Budget, outcome: Outcome) -> None:
    """Two crashes, two loads or two long attempts are enough for one call."""
    assert again(CALL, tried(outcome, FAULT), budget)
    assert not again(CALL, tried(outcome, outcome), budget)
    assert not again(CALL, tried(outcome, FAULT, outcome), budget)
    assert not again(CALL, tried(outcome, outcome, FAULT), budget)


def test_only_loads_are_a_matter_of_the_model(budget: Budget) -> None:
    """Those of models that gave way count no more; what ran long or crashed does."""
    assert again(CALL, tried(LOAD, LOAD), budget, earlier=2)
    assert again(CALL, tried(LOAD, LOAD, LOAD), budget, earlier=2)
    assert not again(CALL, tried(LOAD, LOAD, LOAD, LOAD), budget, earlier=2)
    assert not again(CALL, tried(CRASH, CRASH), budget, earlier=2)
    assert not again(CALL, tried(LONG, LONG), budget, earlier=2)


def test_five_seconds_are_not_long(budget: Budget) -> None:
    """An attempt is long beyond five seconds, not at them."""
    quick = replace(LONG, ended_at=55.0)
    assert again(CALL, tried(quick, quick), budget)


def test_kinds_of_harm_do_not_add_up(budget: Budget) -> None:
    """One of each is not two of any."""
    assert again(CALL, tried(CRASH, LOAD, LONG), budget)


def test_only_a_first_crash_blames() -> None:
    """After a crash, a further one is a repeated one; other failures are no crashes."""
    assert not repeats_crash(tried())
    assert not repeats_crash(tried(FAULT, LOAD))
    assert repeats_crash(tried(CRASH, FAULT))


# -- the same backend again --------------------------------------------------------------------


def test_every_backend_is_tried_once() -> None:
    """What was tried is kept away from, whatever it said."""
    assert excluded(tried()) == frozenset()
    assert excluded(tried(FAULT, UNCLEAR)) == {"b1", "b2"}


def test_a_closed_connection_may_be_tried_afresh(budget: Budget) -> None:
    """The first stale connection of a backend costs nothing and excludes nobody."""
    once = [Attempt(1, "a", STALE)]
    assert excluded(once) == frozenset()
    assert spent(budget, once) == 0


def test_a_closed_connection_counts_the_second_time(budget: Budget) -> None:
    """Stale again, or failing on the fresh connection, the backend is out and the repeat costs."""
    twice = [Attempt(1, "a", STALE), Attempt(2, "a", STALE)]
    assert excluded(twice) == {"a"}
    assert spent(budget, twice) == 0.2
    assert excluded([Attempt(1, "a", STALE), Attempt(2, "a", FAULT)]) == {"a"}
    elsewhere = [Attempt(1, "a", STALE), Attempt(2, "b", STALE)]
    assert excluded(elsewhere) == frozenset()
    assert spent(budget, elsewhere) == 0


# -- the budget --------------------------------------------------------------------------------


@pytest.mark.parametrize(("took_s", "cost"), [(0.0, 0.2), (1.0, 0.2), (1.1, 1.0), (60.0, 1.0)])
def test_what_did_work_costs_more(budget: Budget, took_s: float, cost: float) -> None:
    """An immediate failure costs a fifth of one that took more than a second."""
    assert spent(budget, tried(replace(FAULT, ended_at=50.0 + took_s))) == cost


def test_an_empty_budget_ends_the_trying(budget: Budget) -> None:
    """With nothing left the call is answered as it stands; the refusal is counted by verdict."""
    assert budget.spend(10.0)
    assert spent(budget, tried(FAULT)) is None
    assert spent(budget, tried(LONG)) is None
    assert spent(budget, tried(FAULT)) is None
    assert budget.refused == {"fault": 2, "slow": 1}


def test_what_may_not_be_repeated_costs_nothing(budget: Budget) -> None:
    """The budget is asked last, so that a refusal by the rules is neither paid nor counted."""
    assert spent(budget, tried(CRASH, CRASH)) is None
    assert budget.refused == {}


def test_the_reserve_is_there_without_calls(budget: Budget) -> None:
    """One token per second of the window, spendable at once, and back when the window is past."""
    assert [budget.spend(1.0) for _ in range(11)] == [True] * 10 + [False]


def test_what_was_spent_comes_back(budget: Budget, clock: ManualClock) -> None:
    """Ten seconds after the spending, the reserve stands again."""
    budget.spend(10.0)
    clock.advance(9.9)
    assert not budget.spend(0.2)
    clock.advance(0.1)
    assert budget.spend(10.0)


def test_what_was_counted_is_summed_up(budget: Budget, clock: ManualClock) -> None:
    """However many calls come in, what is kept of them is a tenth of the window each."""
    for _ in range(3000):
        clock.advance(0.01)
        budget.note_call()
        assert len(budget._slices) <= 11
    assert 180 <= budget.tokens - 10 <= 200


def test_calls_pay_for_repeats(clock: ManualClock) -> None:
    """Five calls pay for one dear repeat, for ten seconds; the share can be changed."""
    budget = Budget(clock, reserve_per_s=0.0)
    assert not budget.spend(0.2)
    for _ in range(5):
        budget.note_call()
    clock.advance(9.9)
    assert budget.spend(1.0)
    assert not budget.spend(0.2)
    budget.ratio = 0.5
    budget.note_call()
    assert budget.tokens == pytest.approx(0.5)
    clock.advance(10)
    assert budget.tokens == 0


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.2, 1.0]), st.floats(0, 3)), min_size=1, max_size=200)
)
def test_no_window_overspends(steps: list[tuple[float, float]]) -> None:
    """In any ten seconds (less the grain of one) repeats cost what calls and reserve gave."""
    clock = ManualClock(0.0)
    budget = Budget(clock)
    calls: list[float] = []
    costs: list[tuple[float, float]] = []
    for cost, passed_s in steps:
        clock.advance(passed_s)
        now = clock.now
        if not cost:
            budget.note_call()
            calls.append(now)
        elif budget.spend(cost):
            costs.append((now, cost))
            spent = sum(c for at, c in costs if at >= now - 9.0)
            assert spent <= 10.0 + 0.2 * sum(at > now - 10.0 for at in calls) + 1e-6
