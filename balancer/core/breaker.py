"""
The circuit breaker: pybreaker keeps the state, the gate around it decides.

Laws:
- Nothing is ever run through pybreaker: neither its ``call`` nor ``calling`` survives asyncio,
  cancellation or streams. It is the register of state, moved by `open`, `half_open`, `close`.
- Only a trial closes a breaker, apart from the operator; no timer and no late answer does.
- A permit belongs to the stretch of state that granted it. News from an earlier stretch is
  counted and dropped.
- The gate moves only when somebody calls one of its methods; asking for its state moves nothing.
- `Gate.state` repeats what the register says, as it is asked for with every call.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pybreaker import (
    STATE_CLOSED,
    STATE_HALF_OPEN,
    STATE_OPEN,
    CircuitBreaker,
    CircuitBreakerListener,
    CircuitBreakerState,
)

from balancer.core.domain import BreakerState, Mark

# To look a member up in its enum takes longer than most of what is done with it here.
CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
BLAME, NEITHER = Mark.BLAME, Mark.NEITHER
STATES: Final = {
    STATE_CLOSED: CLOSED,
    STATE_OPEN: OPEN,
    STATE_HALF_OPEN: HALF_OPEN,
}
FORGET_S: Final = 60.0
MAX_DOUBLINGS: Final = 64  # beyond any cap, below what a float can hold
# Timers fire a little early, and so small a sum may not move a clock: such a wait is over.
OVER_S: Final = 1e-6

OnMove = Callable[[BreakerState, BreakerState, str, float], None]


@dataclass(frozen=True, slots=True)
class Rule:
    """
    When a closed breaker opens: hard on blames in a row, soft on a ratio over a window.

    Args:
        in_a_row: Blames without a credit between them, by weight.
        window_s: What the ratio looks back on, in *buckets* parts.
        minimum: Outcomes in the window before the ratio means anything.
        ratio: Share of blames, from which the breaker opens.
    """

    in_a_row: int
    window_s: float
    buckets: int = 10
    minimum: int = 10
    ratio: float = 0.5


@dataclass(slots=True)
class _Bucket:
    began_at: float
    outcomes: int = 0
    blames: int = 0


class _Tally:
    """
    What was seen since the breaker closed: blames in a row, and counts over the window.

    Source:
        Two detectors side by side, one for outages and one for partial ones, with exact buckets
        instead of a moving average: as in linkerd2-proxy and Finagle.
    """

    def __init__(self) -> None:
        self.blames_in_a_row = 0
        self.credits = 0
        self._buckets: deque[_Bucket] = deque()
        self.outcomes = self.blames = 0  # in all buckets, those that have lapsed since included

    def note(self, mark: Mark, weight: int, rule: Rule, now: float) -> None:
        """Count one outcome. A weight counts in the row; in the window an outcome is one."""
        blamed = mark is BLAME
        self.blames_in_a_row = self.blames_in_a_row + weight if blamed else 0
        self.credits += not blamed
        buckets = self._buckets
        if buckets and now - buckets[0].began_at >= rule.window_s:
            self._trim(rule, now)
        if not buckets or now - buckets[-1].began_at >= rule.window_s / rule.buckets:
            buckets.append(_Bucket(now))
        bucket = buckets[-1]
        bucket.outcomes += 1
        bucket.blames += blamed
        self.outcomes += 1
        self.blames += blamed

    def seen(self, rule: Rule, now: float) -> tuple[int, int]:
        """Outcomes and blames in the window."""
        self._trim(rule, now)
        return self.outcomes, self.blames

    def exceeds(self, rule: Rule, now: float) -> bool:
        """Whether the share of blames in the window is too large."""
        outcomes, blames = self.seen(rule, now)
        return blames > 0 and outcomes >= rule.minimum and blames >= rule.ratio * outcomes

    def _trim(self, rule: Rule, now: float) -> None:
        while self._buckets and now - self._buckets[0].began_at >= rule.window_s:
            lapsed = self._buckets.popleft()
            self.outcomes -= lapsed.outcomes
            self.blames -= lapsed.blames


class Permit:
    """The gate's leave for one exchange, to be settled exactly once."""

    __slots__ = ("_gate", "generation", "settled", "trial")

    def __init__(self, gate: Gate, generation: int, *, trial: bool) -> None:
        self._gate = gate
        self.generation = generation
        self.trial = trial
        self.settled = False

    def settle(self, mark: Mark, weight: int = 1, reason: str = "", successes: int = 1) -> None:
        """
        Tell the gate how the exchange ended; a second time tells nothing.

        A blame counts for *weight* blames in a row. Should it open the breaker, *reason* says
        why, for people, and *successes* trials must pass before it closes: 2 for a cut stream.
        """
        if not self.settled:
            self.settled = True
            self._gate._settle(self, mark, weight, reason, successes)  # noqa: SLF001 - two halves


class Gate(CircuitBreakerListener):
    """
    One breaker: of a backend, or of one model on a backend.

    Args:
        name: For people.
        rule: When it opens.
        backoff_s: Wait before the first trial; doubles with each opening in a stretch of trouble.
        backoff_max_s: No wait grows beyond this, a tenth of jitter aside.
        half_open_max_s: Half-open for so long without a decision, it opens again.
        on_move: Told of every move: old, new, reason, seconds until the next trial. The register
            shows the new state by then. It must not move this gate.
        may_open_softly: Asked before the ratio opens it; False for the last one standing.

    Attributes:
        grow: False: openings do not lengthen the wait (most of the pool is open: suspect us).
        reason: Why it opened last; empty if it never did.
        trips: Openings so far, those after a trial without result not counted.
        stale: Settlements dropped because they told of an earlier stretch of state.
        soft: Whether the last opening was for a ratio.
        since: The instant of the last move.
        successes: Trials in a row that must pass before it closes.
        state: Closed, open or half-open.

    Source:
        Permits with a generation, after gobreaker; the wait in seconds as Polly tells it.
    """

    def __init__(
        self,
        name: str,
        clock: Callable[[], float],
        rng: random.Random,
        rule: Rule,
        *,
        backoff_s: float,
        backoff_max_s: float,
        half_open_max_s: float,
        on_move: OnMove,
        may_open_softly: Callable[[], bool] = lambda: True,
    ) -> None:
        self.name = name
        self.rule = rule
        self.backoff_s = backoff_s
        self.backoff_max_s = backoff_max_s
        self.half_open_max_s = half_open_max_s
        self.grow = True
        self.reason = ""
        self.trips = 0
        self.stale = 0
        self.soft = False
        self.since = clock()
        self.successes = 1
        self._clock = clock
        self._rng = rng
        self._on_move = on_move
        self._may_open_softly = may_open_softly
        self._generation = 0
        self._tally = _Tally()
        self._growth = 0
        self._wait_s = 0.0
        self._due_at = 0.0
        self._brought_forward = False
        self._live = False
        self._passed = 0
        self._register = CircuitBreaker(name=name, listeners=[self])
        self.state = STATES[self._register.current_state]

    # -- being asked ---------------------------------------------------------------------------

    @property
    def tripped_midstream(self) -> bool:
        """Whether streams were cut when it opened: its trials must run long enough to be cut."""
        return self.successes > 1

    @property
    def is_blamed(self) -> bool:
        """Whether a blame counts still: then time alone may change `one_at_a_time`, either way."""
        return self._tally.blames > 0

    @property
    def one_at_a_time(self) -> bool:
        """Closed, though the ratio says otherwise: the last one standing should take it slow."""
        if not self._tally.blames:
            return False
        return self.state is CLOSED and self._tally.exceeds(self.rule, self._clock())

    def due(self) -> bool:
        """Whether `acquire_trial` is worth calling now."""
        return self.state is not CLOSED and self.retry_in() == 0

    def retry_in(self) -> float:
        """Seconds until a trial may be had at the latest; 0: now, or none is needed."""
        if self.state is CLOSED:
            return 0.0
        if self.state is HALF_OPEN and not self._live:
            return 0.0
        return self._left_s(self._clock())

    # -- permits -------------------------------------------------------------------------------

    def acquire(self) -> Permit | None:
        """A permit for a call of a client; None unless closed."""
        if self.state is not CLOSED:
            return None
        return Permit(self, self._generation, trial=False)

    def acquire_trial(self) -> Permit | None:
        """The permit of a trial; None: closed, not due, or a trial is under way."""
        now = self._clock()
        self._expire(now)
        if not self.due():
            return None
        if self.state is OPEN:
            self._move(HALF_OPEN, "trial", now)
        self._live = True
        return Permit(self, self._generation, trial=True)

    def _settle(self, permit: Permit, mark: Mark, weight: int, reason: str, successes: int) -> None:
        now = self._clock()
        if self.state is HALF_OPEN:
            self._expire(now)
        if permit.generation != self._generation:
            self.stale += 1
            return
        if permit.trial:
            self._live = False
        if mark is NEITHER:
            return
        if not permit.trial:
            self._tally.note(mark, weight, self.rule, now)
            if mark is BLAME:
                self._judge(reason, successes, now)
        elif mark is BLAME:
            self._trip(reason or "trial failed", max(successes, self.successes), now)
        else:
            self._passed += 1
            if self._passed >= self.successes:
                self._move(CLOSED, "trial passed", now)

    def _judge(self, reason: str, successes: int, now: float) -> None:
        """Open, if the rule says so after the blame that was just counted."""
        tally, rule = self._tally, self.rule
        if tally.blames_in_a_row >= rule.in_a_row:
            self._trip(reason or "failures in a row", successes, now)
        elif tally.exceeds(rule, now) and self._may_open_softly():
            outcomes, blames = tally.seen(rule, now)
            text = f"{blames} of {outcomes} failed in {rule.window_s:g} s, last: {reason}"
            self._trip(text, successes, now, soft=True)

    # -- from outside --------------------------------------------------------------------------

    def trip(self, reason: str, successes: int = 1) -> None:
        """Open at once, whatever was counted; an open breaker stays as it is."""
        if self.state is not OPEN:
            self._trip(reason, successes, self._clock())

    def reset(self) -> None:
        """Close by hand, and forget all that was held against it."""
        now = self._clock()
        if self.state is OPEN:
            self._move(HALF_OPEN, "reset", now)
        if self.state is HALF_OPEN:
            self._move(CLOSED, "reset", now)
        self._tally = _Tally()
        self.forget_growth()

    def forget_growth(self) -> None:
        """The next wait is the shortest again: the backend restarted, or holds other models."""
        self._growth = 0
        self._brought_forward = False

    def bring_forward(self) -> None:
        """
        A check passed: try now instead of later, once.

        Only once in a stretch of trouble, or until `forget_growth`: after a trial failed in spite
        of passing checks, they have shown that they prove nothing, and the backoff must hold.
        """
        if self.state is OPEN and not self._brought_forward:
            self._brought_forward = True
            self._due_at = min(self._due_at, self._clock())

    # -- moves ---------------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        """Half-open for too long: open again. Nothing was learned, so the wait does not grow."""
        if self.state is HALF_OPEN and not self._left_s(now):
            self._open("no trial was decided in time", now)

    def _left_s(self, now: float) -> float:
        """Until the first trial while open; until it opens again while half-open."""
        left_s = self._due_at - now
        return left_s if left_s > OVER_S else 0.0

    def _trip(self, reason: str, successes: int, now: float, *, soft: bool = False) -> None:
        """Open, and wait longer than the last time, unless that is forgotten."""
        if self.state is CLOSED:
            quiet_s = max(FORGET_S, 2 * self._wait_s)
            if self._tally.credits and now - self.since >= quiet_s:
                self._growth = 0
        if self.grow or not self._growth:
            self._growth += 1
        self.trips += 1
        self.reason, self.soft, self.successes = reason, soft, successes
        self._open(reason, now)

    def _open(self, reason: str, now: float) -> None:
        self._wait_s = self._delay_s()
        self._due_at = now + self._wait_s
        self._move(OPEN, reason, now)

    def _delay_s(self) -> float:
        """
        The wait of this opening: the doubled backoff and up to half as much, never beyond 1.1 caps.

        What would lie beyond is not cut off but spread below: waits at the cap must not fall in
        step.

        Source:
            Exponential backoff whose jitter only adds, up to a half, as in linkerd2-proxy.
        """
        doublings = min(max(self._growth - 1, 0), MAX_DOUBLINGS)
        plain_s = min(self.backoff_max_s, self.backoff_s * 2.0**doublings)
        room_s = min(0.5 * plain_s, 1.1 * self.backoff_max_s - plain_s)
        return plain_s + self._rng.uniform(0, room_s)

    def _move(self, new: BreakerState, reason: str, now: float) -> None:
        """Move the register; `state_change` hears of it first, then *on_move*."""
        old = self.state
        self.since = now
        if new is OPEN:
            self._register.open()
        elif new is HALF_OPEN:
            self._due_at = now + self.half_open_max_s
            self._register.half_open()
        else:
            self._register.close()
        self.state = STATES[self._register.current_state]
        self._on_move(old, new, reason, self.retry_in())

    def state_change(
        self,
        cb: CircuitBreaker,  # noqa: ARG002 - pybreaker's signature
        old_state: CircuitBreakerState | None,  # noqa: ARG002 - as above
        new_state: CircuitBreakerState,
    ) -> None:
        """
        Begin a new stretch of state: earlier permits tell nothing any more.

        Called by pybreaker *before* the register shows the new state. It must not raise: the
        register would keep the old state.
        """
        self._generation += 1
        self._live = False
        self._passed = 0
        if new_state.name == STATE_CLOSED:
            self._tally = _Tally()
            self._brought_forward = False
