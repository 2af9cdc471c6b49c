"""What one key may use, and what it hears beyond."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from balancer.core.domain import Allowance, Call, Principal, Role, Usage, Verdict
from balancer.core.errors import BadRequest, RateLimited
from balancer.core.limits import MOST_CALLERS, USUAL_ANSWER, Limits
from balancer.core.running import Run
from balancer.core.scheduler import Began, Ended
from tests.core.bench import call, outcome
from tests.core.clocks import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    """Time by hand."""
    return ManualClock()


@pytest.fixture
def limits(clock: ManualClock) -> Limits:
    """Nobody has used anything."""
    return Limits(clock)


def of(owner: str = "key:web", more: dict[str, Any] | None = None, **allowed: int) -> Call:
    """A call of somebody who may use so much."""
    principal = Principal("web", Role.USER, allowance=Allowance(**allowed))
    return replace(call(), principal=principal, owner=owner, **(more or {}))


def retry_s(limits: Limits, asked: Call) -> float | None:
    """When to come back; None: at once."""
    try:
        limits.charge(asked)
    except RateLimited as error:
        return error.retry_after_s
    return None


def test_requests_are_counted_by_the_minute(limits: Limits, clock: ManualClock) -> None:
    """As many as there are at once; then one at a time as the minute goes by."""
    asked = of(rpm=6)
    assert [retry_s(limits, asked) for _ in range(6)] == [None] * 6
    assert retry_s(limits, asked) == pytest.approx(10.0)
    clock.advance(4.0)
    assert retry_s(limits, asked) == pytest.approx(6.0)
    clock.advance(6.01)
    assert retry_s(limits, asked) is None
    assert retry_s(limits, asked) == pytest.approx(9.99)
    assert limits.refused == {"rpm": 3}


def test_asking_ahead_tells_the_same_and_counts_nothing(limits: Limits, clock: ManualClock) -> None:
    """Of a caller nobody has heard of, of one with something left, and of one with nothing."""
    asked = of(rpm=1, tokens_per_minute=1000, more={"prompt_tokens": 600})
    assert [limits.foresee(asked) for _ in range(3)] == [None] * 3
    assert limits.standing(asked.owner) == {}
    assert retry_s(limits, asked) is None
    tokens_only = of(tokens_per_minute=1000, more={"prompt_tokens": 600})
    for limit, one in (("rpm", asked), ("tokens_per_minute", tokens_only)):
        before, foretold = limits.standing(one.owner), limits.foresee(one)
        assert isinstance(foretold, RateLimited)
        assert f"(limits.{limit})" in foretold.text
        assert (limits.standing(one.owner), limits.refused.get(limit)) == (before, None)
        with pytest.raises(RateLimited, match=re.escape(foretold.text)):
            limits.charge(one)
    clock.advance(60.01)
    assert limits.foresee(asked) is None
    long = of(max_num_predict=8, more={"output_tokens": 9})
    assert isinstance(limits.foresee(long), BadRequest)
    assert "max_num_predict" not in limits.refused


def test_who_rests_saves_no_more_than_a_minute(limits: Limits, clock: ManualClock) -> None:
    """A day without a call is not a day's worth of calls at once."""
    asked = of(rpm=2)
    clock.advance(86_400.0)
    assert [retry_s(limits, asked) is None for _ in range(3)] == [True, True, False]


def test_one_does_not_pay_for_another(limits: Limits) -> None:
    """Each key has a minute of its own, and no limit is no limit."""
    assert retry_s(limits, of("key:a", rpm=1)) is None
    assert retry_s(limits, of("key:b", rpm=1)) is None
    assert retry_s(limits, of("key:a", rpm=1)) is not None
    assert [limits.charge(of("key:a")) for _ in range(100)] == [None] * 100


def test_the_text_names_the_limit(limits: Limits) -> None:
    """And whose it is; an address is nobody's business."""
    for owner, whose in (("key:web", "The key 'web'"), ("ip:192.0.2.1", "A caller without a key")):
        asked = of(owner, rpm=1)
        limits.charge(asked)
        with pytest.raises(RateLimited) as caught:
            limits.charge(asked)
        assert caught.value.text == (
            f"{whose} may use 1 requests a minute (limits.rpm), and has. Retry after 60 s."
        )
        assert caught.value.status == 429


def test_tokens_are_estimated_then_settled(limits: Limits) -> None:
    """What was really used is what counts in the end, once."""
    asked = of(tokens_per_minute=1000, more={"prompt_tokens": 100})
    charge = limits.charge(asked)
    assert charge is not None
    assert limits.standing("key:web")["tokens_per_minute"] == (900 - USUAL_ANSWER, 1000)
    for _ in range(2):
        charge.settle(Usage(tokens_in=50, tokens_out=20))
    assert limits.standing("key:web")["tokens_per_minute"] == (930, 1000)


@pytest.mark.parametrize(
    ("usage", "records", "left"),
    [
        (Usage(), 0, 1000),  # nothing came of it
        (Usage(), 300, 600),  # it was left in the middle
        (Usage(tokens_in=10, tokens_out=5), 300, 690),
        (Usage(tokens_out=5), 0, 895),
    ],
)
def test_what_no_backend_tells_is_counted(
    limits: Limits, usage: Usage, records: int, left: int
) -> None:
    """Who hangs up before the end pays for what came."""
    charge = limits.charge(of(tokens_per_minute=1000, more={"prompt_tokens": 100}))
    assert charge is not None
    charge.settle(usage, records)
    assert limits.standing("key:web")["tokens_per_minute"] == (left, 1000)


def test_who_leaves_while_nothing_is_seen_yet_pays_as_charged(limits: Limits) -> None:
    """The prompt was read, and an answer in one piece written in part; else it would be free."""
    asked = of(tokens_per_minute=1000, more={"prompt_tokens": 100, "output_tokens": 50})
    for usage, records, used in (
        (Usage(), 0, 150),
        (Usage(), 7, 107),
        (Usage(tokens_in=90, tokens_out=3), 0, 93),
    ):
        before = limits.standing("key:web").get("tokens_per_minute", (1000, 1000))[0]
        charge = limits.charge(asked)
        assert charge is not None
        charge.settle(usage, records, left=True)
        assert limits.standing("key:web")["tokens_per_minute"][0] == before - used


def test_a_limit_that_was_lifted_is_not_told(limits: Limits) -> None:
    """A reload may lift it while calls run."""
    limits.note(Began(Run(of(slots=2), "a", 0.0)))
    assert limits.standing("key:web") == {"slots": (1, 2)}
    limits.note(Began(Run(of(), "a", 0.0)))
    assert limits.standing("key:web") == {}


def test_more_than_a_minute_holds_is_waited_for(limits: Limits, clock: ManualClock) -> None:
    """A prompt larger than the limit comes through with a full minute, and is owed after."""
    large = of(tokens_per_minute=600, more={"prompt_tokens": 1200, "embedding": True})
    assert retry_s(limits, large) is None
    assert retry_s(limits, of(tokens_per_minute=600, more={"embedding": True})) is not None
    clock.advance(60.0)
    assert retry_s(limits, large) == pytest.approx(60.0)
    clock.advance(60.01)
    assert retry_s(limits, large) is None


def test_nonsense_of_a_backend_does_not_lock_out_for_ever(
    limits: Limits, clock: ManualClock
) -> None:
    """The debt has an end."""
    charge = limits.charge(of(tokens_per_minute=60))
    assert charge is not None
    charge.settle(Usage(tokens_in=10**30, tokens_out=10**30))
    clock.advance(2 * 3600.0)
    assert retry_s(limits, of(tokens_per_minute=60)) is None


def test_what_is_refused_costs_nothing(limits: Limits) -> None:
    """Neither of the two limits is touched by a call that the other refuses."""
    asked = of(rpm=2, tokens_per_minute=300)
    assert retry_s(limits, asked) is None
    assert retry_s(limits, asked) is not None
    assert limits.standing("key:web")["rpm"] == (1, 2)


def test_too_long_an_answer_is_refused_not_cut(limits: Limits) -> None:
    """Only if it is asked for; who says nothing gets what the model gives."""
    for tokens in (None, 1, 64):
        limits.charge(of(max_num_predict=64, more={"output_tokens": tokens}))
    with pytest.raises(BadRequest, match=r"at most 64 tokens \(limits.max_num_predict\), not 65"):
        limits.charge(of(max_num_predict=64, more={"output_tokens": 65}))
    assert limits.refused == {"max_num_predict": 1}


def test_slots_are_counted_from_grant_to_end(limits: Limits) -> None:
    """Whatever became of it; others are not concerned."""
    asked = of(slots=2)
    runs = [Run(asked, "a", 0.0) for _ in range(2)]
    assert limits.may_start(asked)
    limits.note(Began(runs[0]))
    assert limits.may_start(asked)
    assert not limits.may_start(asked, 1)
    limits.note(Began(runs[1]))
    assert not limits.may_start(asked)
    assert limits.may_start(of("key:b", slots=2))
    assert limits.may_start(of())
    assert limits.standing("key:web") == {"slots": (0, 2)}
    for run, verdict in zip(runs, (Verdict.OK, Verdict.GONE), strict=True):
        limits.note(Ended(run, outcome(verdict), 0.0))
        assert limits.may_start(asked)
    assert limits.all_running() == {}


def test_nobody_is_remembered_for_ever(limits: Limits) -> None:
    """Ten thousand callers take no more room than there is."""
    for number in range(10_000):
        limits.charge(of(f"ip:{number}", rpm=1, tokens_per_minute=1000))
        run = Run(of(f"ip:{number}", slots=1), "a", 0.0)
        limits.note(Began(run))
        limits.note(Ended(run, outcome(), 0.0))
    assert len(limits._buckets) <= MOST_CALLERS
    assert limits.all_running() == {}
    assert limits._slots == {}
