"""
Whether a call that failed may be tried again, and what all the trying may cost.

What each verdict allows stands in `verdicts.TABLE`; here are the bounds around it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from balancer.core.domain import Attempt, Call, Verdict
from balancer.core.verdicts import TABLE, Before

MAX_CRASHES: Final = 2  # a query of death must not go round the whole pool
MAX_LOADS: Final = 2
MAX_LONG: Final = 2
LONG_S: Final = 5.0
CHEAP_S: Final = 1.0
CHEAP, DEAR = 0.2, 1.0


class Budget:
    """
    What repeats may cost, as a share of the calls of the last seconds.

    Each call puts *ratio* tokens in, which lapse after *ttl_s*; each repeat takes some out. On top
    stands a reserve, so that a quiet balancer can fail over too. Retries stay a share of the load
    however much fails, which is what keeps an outage from feeding itself.

    Args:
        ratio: Tokens per call.
        reserve_per_s: Tokens per second that are there without any call.

    Attributes:
        refused: How often a repeat was refused, by the reason given for it.

    Source:
        Finagle's ``RetryBudget``: a token bucket over a sliding window, with a reserve.
    """

    SLICES: Final = 10

    def __init__(
        self,
        clock: Callable[[], float],
        ratio: float = 0.2,
        ttl_s: float = 10.0,
        reserve_per_s: float = 1.0,
    ) -> None:
        self.ratio = ratio
        self.refused: dict[str, int] = {}
        self._clock = clock
        self._ttl_s = ttl_s
        self._reserve = reserve_per_s * ttl_s
        self._slices: deque[tuple[float, float]] = deque()  # (began at, tokens in less tokens out)

    @property
    def tokens(self) -> float:
        """What is left to spend."""
        return self._left(self._clock())

    def note_call(self) -> None:
        """A call came in."""
        self._add(self._clock(), self.ratio)

    def spend(self, cost: float, reason: str = "") -> bool:
        """Take *cost* tokens; False: not there, none are taken, and *reason* is counted."""
        now = self._clock()
        if self._left(now) < cost - 1e-9:
            self.refused[reason] = self.refused.get(reason, 0) + 1
            return False
        self._add(now, -cost)
        return True

    def _add(self, now: float, tokens: float) -> None:
        self._trim(now)
        if self._slices and now - self._slices[-1][0] < self._ttl_s / self.SLICES:
            began_at, sum_ = self._slices.pop()
            self._slices.append((began_at, sum_ + tokens))
        else:
            self._slices.append((now, tokens))

    def _left(self, now: float) -> float:
        self._trim(now)
        return self._reserve + sum(tokens for _, tokens in self._slices)

    def _trim(self, now: float) -> None:
        while self._slices and now - self._slices[0][0] >= self._ttl_s:
            self._slices.popleft()


def again(
    call: Call,
    attempts: Sequence[Attempt],
    budget: Budget,
    *,
    unsent: bool = False,
    earlier: int = 0,
) -> bool:
    """
    Whether *call* may be tried once more, on a backend that is not `excluded`.

    If so, the repeat is paid for from *budget*. *attempts* are all so far, the last one just ended,
    nothing of it passed on; *unsent* says that nothing of its request had gone out, which is what
    a call that is not replayable needs, unless the backend does not even know the route. The loads
    of the *earlier* attempts count no more: they were of other models.
    """
    last = attempts[-1]
    untouched = unsent or last.outcome.verdict is Verdict.NO_ROUTE
    if last.outcome.committed or not (call.replayable or untouched):
        return False
    if call.deadline is not None and last.outcome.ended_at >= call.deadline:
        return False
    if not _allowed(attempts) or _worn_out(attempts, earlier):
        return False
    return _is_free(attempts) or budget.spend(_cost(last), last.outcome.verdict.value)


def excluded(attempts: Sequence[Attempt]) -> frozenset[str]:
    """
    The backends a further attempt must keep away from: all that were tried.

    Only one that closed a kept connection stays, once: it never saw the request.
    """
    stale = [a.backend for a in attempts if a.outcome.verdict is Verdict.STALE]
    seen = {a.backend for a in attempts if a.outcome.verdict is not Verdict.STALE}
    return frozenset(seen | {name for name in stale if stale.count(name) > 1})


def repeats_crash(attempts: Sequence[Attempt]) -> bool:
    """Whether a crash after *attempts* is a repeated one: nobody is blamed for those."""
    return any(attempt.outcome.crash for attempt in attempts)


def _allowed(attempts: Sequence[Attempt]) -> bool:
    """What the table says of the last verdict."""
    verdict = attempts[-1].outcome.verdict
    before = TABLE[verdict].before
    if before is Before.ONE_OTHER:
        return sum(a.outcome.verdict is verdict for a in attempts) == 1
    return before in (Before.ANOTHER, Before.SAME_FRESH)


def _worn_out(attempts: Sequence[Attempt], earlier: int) -> bool:
    """Whether the call has done enough harm, or taken enough time."""
    outcomes = [attempt.outcome for attempt in attempts]
    return (
        sum(o.crash for o in outcomes) >= MAX_CRASHES
        or sum(o.caused_load for o in outcomes[earlier:]) >= MAX_LOADS
        or sum(o.ended_at - o.sent_at > LONG_S for o in outcomes) >= MAX_LONG
    )


def _is_free(attempts: Sequence[Attempt]) -> bool:
    """A kept connection that was closed costs a backend nothing, the first time."""
    last = attempts[-1]
    return last.outcome.verdict is Verdict.STALE and last.backend not in excluded(attempts)


def _cost(attempt: Attempt) -> float:
    """Cheap if it failed so soon that no work can have been done."""
    long = attempt.outcome.ended_at - attempt.outcome.sent_at > CHEAP_S
    return DEAR if long else CHEAP
