"""The gate over pybreaker: its rules one by one, then any history at all."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pybreaker
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from balancer.core.breaker import Gate, Permit, Rule
from balancer.core.domain import BreakerState, Mark
from tests.core.clocks import ManualClock

if TYPE_CHECKING:
    from collections.abc import Callable

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
CREDIT, BLAME, NEITHER = Mark.CREDIT, Mark.BLAME, Mark.NEITHER
LEGAL = {(CLOSED, OPEN), (OPEN, HALF_OPEN), (HALF_OPEN, OPEN), (HALF_OPEN, CLOSED)}
HOST = Rule(3, 30.0, minimum=10, ratio=0.5)


class Bench:
    """A gate with everything around it in reach."""

    def __init__(self, rule: Rule = HOST, *, seed: int = 1, cap_s: float = 60.0) -> None:
        self.clock = ManualClock()
        self.moves: list[tuple[BreakerState, BreakerState, str, float]] = []
        self.seen: list[BreakerState] = []
        self.softly = True
        self.gate = Gate(
            "gpu0",
            self.clock,
            random.Random(seed),
            rule,
            backoff_s=1.0,
            backoff_max_s=cap_s,
            half_open_max_s=60.0,
            on_move=self._moved,
            may_open_softly=lambda: self.softly,
        )

    def _moved(self, old: BreakerState, new: BreakerState, reason: str, retry_in_s: float) -> None:
        self.moves.append((old, new, reason, retry_in_s))
        self.seen.append(self.gate.state)

    def settle(self, mark: Mark, count: int = 1, weight: int = 1, successes: int = 1) -> None:
        """Calls of clients that end with *mark*, one after the other."""
        for _ in range(count):
            permit = self.gate.acquire()
            assert permit is not None
            permit.settle(mark, weight, "refused", successes)

    def trial(self) -> Permit:
        """A trial, as soon as one may be had."""
        self.clock.advance(self.gate.retry_in())
        permit = self.gate.acquire_trial()
        assert permit is not None
        return permit

    def failed_trial(self) -> float:
        """Let a trial fail; returns the wait for the next."""
        self.trial().settle(BLAME, reason="still refused")
        return self.gate.retry_in()


@pytest.fixture
def bench() -> Bench:
    """A gate with the rules of a backend."""
    return Bench()


# -- pybreaker itself --------------------------------------------------------------------------


class Ear(pybreaker.CircuitBreakerListener):
    """Writes down what pybreaker tells, and what its register shows at that moment."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, str]] = []

    def state_change(
        self,
        cb: pybreaker.CircuitBreaker,
        old_state: pybreaker.CircuitBreakerState | None,
        new_state: pybreaker.CircuitBreakerState,
    ) -> None:
        old = "" if old_state is None else old_state.name
        self.heard.append((old, new_state.name, cb.current_state))


def test_pybreaker_moves_and_tells() -> None:
    """open, half_open, close move the register and tell once each, before it shows the move."""
    ear = Ear()
    register = pybreaker.CircuitBreaker(listeners=[ear])
    assert (register.current_state, ear.heard) == ("closed", [])
    register.open()
    assert register.current_state == "open"
    register.half_open()
    assert register.current_state == "half-open"
    register.close()
    assert register.current_state == "closed"
    assert ear.heard == [
        ("closed", "open", "closed"),
        ("open", "half-open", "open"),
        ("half-open", "closed", "half-open"),
    ]


def test_pybreaker_never_moves_by_itself() -> None:
    """However long it was open, only a call run through it would half-open it: we run none."""
    register = pybreaker.CircuitBreaker(reset_timeout=0)
    register.open()
    assert (register.current_state, register.state.name) == ("open", "open")


def test_pybreaker_tells_again_when_opened_twice() -> None:
    """Opening an open breaker is told as a move, which is why the gate never does it."""
    ear = Ear()
    register = pybreaker.CircuitBreaker(listeners=[ear])
    register.open()
    register.open()
    assert [(old, new) for old, new, _ in ear.heard] == [("closed", "open"), ("open", "open")]


def test_begins_closed_and_blameless(bench: Bench) -> None:
    """A new gate admits calls, waits for nothing and holds nothing against its backend."""
    gate = bench.gate
    assert (gate.state, gate.reason, gate.trips, gate.stale) == (CLOSED, "", 0, 0)
    assert (gate.soft, gate.grow, gate.tripped_midstream, gate.one_at_a_time) == (
        False,
        True,
        False,
        False,
    )
    assert gate.since == bench.clock.now


# -- opening -----------------------------------------------------------------------------------


def test_opens_on_blames_in_a_row(bench: Bench) -> None:
    """The third blame in a row opens it, with the last reason, and live calls are refused."""
    bench.settle(BLAME, 2)
    assert bench.gate.state is CLOSED
    bench.settle(BLAME)
    assert (bench.gate.state, bench.gate.reason) == (OPEN, "refused")
    assert (bench.gate.trips, bench.gate.soft) == (1, False)
    assert bench.gate.acquire() is None


def test_a_credit_ends_the_row(bench: Bench) -> None:
    """Blames count in a row only as long as no credit comes between."""
    for _ in range(3):
        bench.settle(BLAME, 2)
        bench.settle(CREDIT, 4)
    assert bench.gate.state is CLOSED


def test_neither_leaves_the_row_alone(bench: Bench) -> None:
    """A client that hangs up says nothing about the backend, for or against."""
    bench.settle(BLAME, 2)
    bench.settle(NEITHER, 5)
    assert bench.gate.state is CLOSED
    bench.settle(BLAME)
    assert bench.gate.state is OPEN


def test_a_weighty_blame_opens_alone() -> None:
    """A load failure weighs 2 and opens a breaker that takes two in a row."""
    bench = Bench(Rule(2, 120.0, minimum=6))
    bench.settle(BLAME, weight=2)
    assert bench.gate.state is OPEN


def test_opens_on_the_ratio(bench: Bench) -> None:
    """Half of the outcomes failing opens it softly, once there are enough of them."""
    for _ in range(4):
        bench.settle(CREDIT)
        bench.settle(BLAME)
    bench.settle(CREDIT)
    assert bench.gate.state is CLOSED
    bench.settle(BLAME)
    assert (bench.gate.state, bench.gate.soft) == (OPEN, True)
    assert bench.gate.reason == "5 of 10 failed in 30 s, last: refused"


def test_a_credit_never_opens() -> None:
    """Becoming the minimum's last outcome does not make a good answer the culprit."""
    bench = Bench(Rule(9, 30.0, minimum=10))
    bench.settle(BLAME, 8)
    bench.settle(CREDIT, 2)
    assert bench.gate.state is CLOSED


def test_the_window_forgets(bench: Bench) -> None:
    """Outcomes older than the window do not count for the ratio; younger ones do."""
    for _ in range(4):
        bench.settle(BLAME)
        bench.settle(CREDIT)
    bench.clock.advance(30)
    bench.settle(BLAME)
    bench.settle(CREDIT)
    bench.settle(BLAME)
    assert bench.gate.state is CLOSED
    bench.clock.advance(15)
    for _ in range(4):
        bench.settle(CREDIT)
        bench.settle(BLAME)
    assert bench.gate.state is OPEN


def test_the_window_forgets_by_tenths(bench: Bench) -> None:
    """Outcomes leave the window a tenth at a time, and however many there are, it stays small."""
    gate = bench.gate
    for _ in range(400):
        bench.clock.advance(0.1)
        bench.settle(CREDIT)
        assert len(gate._tally._buckets) <= 11
    full, _ = gate._tally.seen(gate.rule, bench.clock.now)
    assert 270 <= full <= 300
    bench.clock.advance(15)
    half, _ = gate._tally.seen(gate.rule, bench.clock.now)
    assert 120 <= half <= 150


def test_the_last_one_standing_is_spared_the_ratio(bench: Bench) -> None:
    """A soft opening asks first; refused, the gate says to go slow, and a hard one still opens."""
    bench.softly = False
    for _ in range(5):
        bench.settle(CREDIT)
        bench.settle(BLAME)
    assert bench.gate.state is CLOSED
    assert bench.gate.one_at_a_time
    bench.clock.advance(60)
    assert not bench.gate.one_at_a_time
    bench.settle(BLAME, 2)
    assert bench.gate.state is OPEN
    assert not bench.gate.one_at_a_time


def test_the_spared_one_opens_once_another_stands(bench: Bench) -> None:
    """Leave to open softly is asked with every blame, not once."""
    bench.softly = False
    for _ in range(6):
        bench.settle(CREDIT)
        bench.settle(BLAME)
    bench.softly = True
    bench.settle(CREDIT)
    assert bench.gate.state is CLOSED
    bench.settle(BLAME)
    assert bench.gate.state is OPEN


def test_trip_opens_at_once(bench: Bench) -> None:
    """The watchdog's word opens a closed breaker; an open one keeps its reason and its wait."""
    bench.gate.trip("silent for 20 s")
    assert (bench.gate.state, bench.gate.reason, bench.gate.trips) == (OPEN, "silent for 20 s", 1)
    before = bench.gate.retry_in()
    bench.gate.trip("again")
    assert (bench.gate.reason, bench.gate.trips) == ("silent for 20 s", 1)
    assert bench.gate.retry_in() == before


def test_trip_opens_a_half_open_one(bench: Bench) -> None:
    """A trip during a trial opens again and makes the trial's result old news."""
    bench.gate.trip("silent")
    permit = bench.trial()
    bench.gate.trip("still silent")
    permit.settle(CREDIT)
    assert (bench.gate.state, bench.gate.stale) == (OPEN, 1)


def test_streams_dying_together_open_it_once(bench: Bench) -> None:
    """Of 20 calls that end after the third blame, 17 are dropped and counted."""
    permits = [bench.gate.acquire() for _ in range(20)]
    for permit in permits:
        assert permit is not None
        permit.settle(BLAME, reason="cut")
    assert (bench.gate.trips, bench.gate.stale, len(bench.moves)) == (1, 17, 1)


# -- the way back ------------------------------------------------------------------------------


def test_no_trial_before_its_time(bench: Bench) -> None:
    """Open means nobody, until the wait is over; then one trial, and no live call."""
    assert bench.gate.acquire_trial() is None
    assert (bench.gate.due(), bench.gate.retry_in()) == (False, 0)
    bench.gate.trip("silent")
    wait_s = bench.gate.retry_in()
    bench.clock.advance(wait_s - 0.001)
    assert bench.gate.acquire_trial() is None
    assert not bench.gate.due()
    bench.clock.advance(0.002)
    assert bench.gate.due()
    permit = bench.gate.acquire_trial()
    assert permit is not None
    assert permit.trial
    assert bench.gate.state is HALF_OPEN
    assert bench.gate.acquire() is None


def test_one_trial_at_a_time(bench: Bench) -> None:
    """Of a hundred that ask at once, half-open admits one."""
    bench.gate.trip("silent")
    bench.trial()
    assert [bench.gate.acquire_trial() for _ in range(99)] == [None] * 99
    assert not bench.gate.due()
    assert bench.gate.retry_in() == 60.0


def test_a_passed_trial_closes(bench: Bench) -> None:
    """One credit closes, and what was held against it before is forgotten."""
    bench.settle(BLAME, 3)
    bench.trial().settle(CREDIT)
    assert (bench.gate.state, bench.gate.retry_in()) == (CLOSED, 0)
    bench.settle(BLAME, 2)
    assert bench.gate.state is CLOSED


def test_a_cancelled_trial_gives_its_permit_back(bench: Bench) -> None:
    """A trial that ends without a finding decides nothing; the next one may go at once."""
    bench.gate.trip("silent")
    bench.trial().settle(NEITHER)
    assert (bench.gate.state, bench.gate.due(), bench.gate.retry_in()) == (HALF_OPEN, True, 0)
    assert bench.gate.acquire_trial() is not None


def test_a_settled_permit_is_deaf(bench: Bench) -> None:
    """Settling twice changes nothing, not even the count of stale ones."""
    bench.gate.trip("silent")
    permit = bench.trial()
    permit.settle(NEITHER)
    other = bench.gate.acquire_trial()
    assert other is not None
    permit.settle(CREDIT)
    assert (bench.gate.state, bench.gate.stale) == (HALF_OPEN, 0)
    assert bench.gate.acquire_trial() is None


def test_cut_streams_ask_for_two_trials(bench: Bench) -> None:
    """Tripped in mid-stream, it closes after two good trials, also if one in between fails."""
    bench.gate.trip("cut", successes=2)
    assert bench.gate.tripped_midstream
    bench.trial().settle(CREDIT)
    assert bench.gate.state is HALF_OPEN
    bench.trial().settle(BLAME, reason="refused")
    assert bench.gate.tripped_midstream
    bench.trial().settle(CREDIT)
    bench.trial().settle(CREDIT)
    assert bench.gate.state is CLOSED


def test_a_rule_that_trips_on_cuts_asks_for_two_trials(bench: Bench) -> None:
    """The blame that opens it says how many trials it takes; another opening takes one again."""
    bench.settle(BLAME, 3, successes=2)
    assert (bench.gate.successes, bench.gate.tripped_midstream) == (2, True)
    bench.gate.reset()
    bench.settle(BLAME, 3)
    assert (bench.gate.successes, bench.gate.tripped_midstream) == (1, False)


def test_reasons_are_never_empty(bench: Bench) -> None:
    """Blames without a text still make a reason for people."""
    for _ in range(3):
        permit = bench.gate.acquire()
        assert permit is not None
        permit.settle(BLAME)
    assert bench.gate.reason == "failures in a row"
    bench.trial().settle(BLAME)
    assert bench.gate.reason == "trial failed"


# -- waits -------------------------------------------------------------------------------------


def test_waits_double_up_to_the_cap(bench: Bench) -> None:
    """Each failed trial doubles the wait; jitter only adds, by a half, and a tenth at the cap."""
    bench.gate.trip("silent")
    waits = [bench.gate.retry_in()] + [bench.failed_trial() for _ in range(100)]
    plain = [min(60.0, 2.0**n) for n in range(101)]
    bounds = [(p - 1e-6, min(1.5 * p, 66.0) + 1e-6) for p in plain]
    assert all(low <= w <= high for (low, high), w in zip(bounds, waits, strict=True))
    assert len(set(waits)) == 101


@given(seed=st.integers(0, 2**32), base=st.floats(0.1, 20), cap=st.floats(0.1, 600))
@settings(max_examples=100)
def test_waits_keep_their_bounds(seed: int, base: float, cap: float) -> None:
    """For any base and cap, no wait is shorter than the plain one, nor a tenth above the cap."""
    bench = Bench(seed=seed, cap_s=cap)
    bench.gate.backoff_s = base
    bench.gate.trip("silent")
    for n in range(12):
        plain = min(cap, base * 2.0**n)
        slack = 1e-9 * bench.clock.now
        assert plain - slack <= bench.gate.retry_in() <= min(1.1 * cap, 1.5 * plain) + slack
        bench.failed_trial()


def test_growth_can_be_frozen(bench: Bench) -> None:
    """With most of the pool open, failed trials do not lengthen the wait."""
    bench.gate.grow = False
    bench.gate.trip("silent")
    assert all(1.0 <= bench.failed_trial() <= 1.5 for _ in range(5))
    bench.gate.grow = True
    assert 2.0 <= bench.failed_trial() <= 3.0


def test_growth_outlives_a_short_recovery(bench: Bench) -> None:
    """A breaker that flaps waits longer each time."""
    bench.settle(BLAME, 3)
    bench.trial().settle(CREDIT)
    bench.settle(CREDIT)
    bench.clock.advance(59)
    bench.settle(BLAME, 3)
    assert 2.0 <= bench.gate.retry_in() <= 3.0


def test_growth_is_forgotten_after_a_good_while(bench: Bench) -> None:
    """A minute closed with a success makes the next wait the shortest again."""
    bench.settle(BLAME, 3)
    bench.trial().settle(CREDIT)
    bench.settle(CREDIT)
    bench.clock.advance(60)
    bench.settle(BLAME, 3)
    assert bench.gate.retry_in() <= 1.5


def test_growth_is_not_forgotten_without_a_success(bench: Bench) -> None:
    """An idle backend has proved nothing, however long it was closed."""
    bench.settle(BLAME, 3)
    bench.trial().settle(CREDIT)
    bench.clock.advance(3600)
    bench.settle(BLAME, 3)
    assert bench.gate.retry_in() >= 2.0


def test_a_long_wait_is_forgotten_slowly(bench: Bench) -> None:
    """After a wait of a minute, twice that of quiet is asked for, no less and no more."""
    bench.gate.trip("silent")
    for quiet, waits_s in ((1.99, 60.0), (2.01, 1.0)):
        for _ in range(7):
            last_s = bench.failed_trial()
        bench.trial().settle(CREDIT)
        bench.settle(CREDIT)
        bench.clock.advance(quiet * last_s)
        bench.settle(BLAME, 3)
        assert waits_s <= bench.gate.retry_in() <= 1.5 * waits_s


def test_growth_is_forgotten_on_request(bench: Bench) -> None:
    """After a restart of the backend a failed trial waits as for the first time."""
    bench.gate.trip("silent")
    for _ in range(5):
        bench.failed_trial()
    bench.gate.forget_growth()
    assert 1.0 <= bench.failed_trial() <= 1.5


def test_half_open_has_an_end(bench: Bench) -> None:
    """A trial nobody settles is given up after the maximum; the wait does not grow."""
    bench.gate.trip("silent")
    permit = bench.trial()
    bench.clock.advance(59.9)
    assert bench.gate.acquire_trial() is None
    assert bench.gate.state is HALF_OPEN
    bench.clock.advance(0.2)
    assert bench.gate.due()
    assert bench.gate.acquire_trial() is None
    assert (bench.gate.state, bench.gate.trips, bench.gate.reason) == (OPEN, 1, "silent")
    assert 1.0 <= bench.gate.retry_in() <= 1.5
    permit.settle(CREDIT)
    assert (bench.gate.state, bench.gate.stale) == (OPEN, 1)


def test_a_trial_settled_too_late_is_stale(bench: Bench) -> None:
    """Half-open ends at its maximum even if nobody looked meanwhile."""
    bench.gate.trip("silent")
    permit = bench.trial()
    bench.clock.advance(60)
    permit.settle(CREDIT)
    assert (bench.gate.state, bench.gate.stale) == (OPEN, 1)


# -- from outside ------------------------------------------------------------------------------


def test_a_check_brings_the_trial_forward_once(bench: Bench) -> None:
    """Good checks shorten one wait; when the trial fails all the same, the backoff holds."""
    bench.gate.bring_forward()
    bench.gate.trip("silent")
    for _ in range(5):
        bench.failed_trial()
    bench.gate.bring_forward()
    assert bench.gate.due()
    wait_s = bench.failed_trial()
    bench.gate.bring_forward()
    assert bench.gate.retry_in() == wait_s
    bench.gate.forget_growth()
    bench.gate.bring_forward()
    assert bench.gate.due()


def test_bringing_forward_never_puts_off(bench: Bench) -> None:
    """A trial that is overdue stays due, and each stretch of trouble has its own first check."""
    bench.gate.trip("silent")
    bench.clock.advance(100)
    bench.gate.bring_forward()
    assert bench.gate.due()
    bench.trial().settle(CREDIT)
    bench.gate.trip("silent")
    bench.gate.bring_forward()
    assert bench.gate.due()


@pytest.mark.parametrize("state", list(BreakerState))
def test_reset_closes_from_anywhere(bench: Bench, state: BreakerState) -> None:
    """The operator's reset closes by legal moves only and wipes the slate."""
    bench.settle(BLAME, 2)
    if state is not CLOSED:
        bench.gate.trip("silent")
    if state is HALF_OPEN:
        bench.trial()
    bench.gate.reset()
    assert bench.gate.state is CLOSED
    assert {(old, new) for old, new, *_ in bench.moves} <= LEGAL
    bench.settle(BLAME, 2)
    assert bench.gate.state is CLOSED
    bench.gate.trip("silent")
    assert bench.gate.retry_in() <= 1.5


def test_every_move_is_told(bench: Bench) -> None:
    """Old, new, reason and wait are told, when the register shows the new state already."""
    bench.settle(BLAME, 3)
    wait_s = bench.gate.retry_in()
    bench.trial().settle(CREDIT)
    assert bench.moves == [
        (CLOSED, OPEN, "refused", wait_s),
        (OPEN, HALF_OPEN, "trial", 0.0),
        (HALF_OPEN, CLOSED, "trial passed", 0.0),
    ]
    assert bench.seen == [OPEN, HALF_OPEN, CLOSED]
    assert bench.gate.since == bench.clock.now


# -- any history -------------------------------------------------------------------------------


class Histories(RuleBasedStateMachine):
    """Whatever is done to a gate, in whatever order, with whatever delays."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(Rule(3, 30.0, minimum=4))
        self.gate = self.bench.gate
        self.permits: list[Permit] = []
        self.told = 0
        self.opens_at = 0.0

    def _facts(self) -> tuple[object, ...]:
        gate = self.gate
        seen = gate._tally.seen(gate.rule, self.bench.clock.now)
        row = (gate._tally.blames_in_a_row, gate._tally.credits)
        return (gate.state, gate.trips, gate._growth, gate._due_at, gate._passed, seen, row)

    def _overdue(self) -> bool:
        late = self.bench.clock.now + 1e-6 >= self.gate.since + self.gate.half_open_max_s
        return self.gate.state is HALF_OPEN and late

    @rule()
    def call(self) -> None:
        """A live call is admitted if and only if the breaker is closed."""
        closed = self.gate.state is CLOSED
        permit = self.gate.acquire()
        assert (permit is not None) == closed
        if permit is not None:
            self.permits.append(permit)

    @rule()
    def trial(self) -> None:
        """A trial is admitted when the wait is over, and not before."""
        early = self.gate.state is OPEN and self.bench.clock.now + 1e-6 < self.opens_at
        busy = any(p.trial and not p.settled for p in self._current())
        closed, overdue = self.gate.state is CLOSED, self._overdue()
        permit = self.gate.acquire_trial()
        assert (permit is None) == (early or busy or closed or overdue)
        if permit is not None:
            self.permits.append(permit)

    @precondition(lambda self: self.permits)
    @rule(
        pick=st.integers(0, 100),
        mark=st.sampled_from(list(Mark)),
        weight=st.integers(1, 2),
        successes=st.integers(1, 2),
    )
    def settle(self, pick: int, mark: Mark, weight: int, successes: int) -> None:
        """Marks count once, in their own stretch of state; NEITHER never."""
        permit = self.permits[pick % len(self.permits)]
        old = permit.generation != self.gate._generation
        quiet = permit.settled or mark is NEITHER or old
        before, stale, overdue = self._facts(), self.gate.stale, self._overdue()
        dropped = not permit.settled and (old or overdue)
        permit.settle(mark, weight, "reason", successes)
        assert self.gate.stale == stale + dropped
        if quiet and not (overdue and dropped):
            assert self._facts() == before

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.5, 7.0, 30.0, 61.0, 130.0, 700.0]))
    def wait(self, seconds: float) -> None:
        """Time alone moves nothing."""
        state = self.gate.state
        self.bench.clock.advance(seconds)
        assert self.gate.state is state

    @rule(seconds=st.floats(0, 1))
    def wait_until_due(self, seconds: float) -> None:
        """The wait told is the wait: after it, a trial is due."""
        self.bench.clock.advance(self.gate.retry_in() + seconds)
        assert self.gate.due() == (self.gate.state is not CLOSED)

    @rule(successes=st.integers(1, 2))
    def trip(self, successes: int) -> None:
        """The watchdog leaves it open."""
        self.gate.trip("silent", successes)
        assert self.gate.state is OPEN

    @rule()
    def reset(self) -> None:
        """The operator leaves it closed."""
        self.gate.reset()
        assert self.gate.state is CLOSED

    @rule()
    def forward(self) -> None:
        """A good check may make the trial due, and never later."""
        before = self.gate.retry_in()
        self.gate.bring_forward()
        assert self.gate.retry_in() <= before
        self.opens_at = min(self.opens_at, self.bench.clock.now + self.gate.retry_in())

    @rule()
    def forget(self) -> None:
        """A restart of the backend moves nothing."""
        before = self.gate.state, self.gate.retry_in()
        self.gate.forget_growth()
        assert (self.gate.state, self.gate.retry_in()) == before

    @rule(grow=st.booleans(), softly=st.booleans())
    def pool(self, grow: bool, softly: bool) -> None:
        """What the pool decides about growth and soft openings."""
        self.gate.grow, self.bench.softly = grow, softly

    def _current(self) -> list[Permit]:
        return [p for p in self.permits if p.generation == self.gate._generation]

    @invariant()
    def trials_are_counted(self) -> None:
        """The gate's count is that of the live trials of this stretch, never above one."""
        live = [p for p in self._current() if p.trial and not p.settled]
        assert len(live) <= 1
        assert self.gate._live == bool(live)

    @invariant()
    def moves_are_legal(self) -> None:
        """Only the four moves, each from where the last one ended, with a wait within bounds."""
        for index in range(self.told, len(self.bench.moves)):
            old, new, _, wait_s = self.bench.moves[index]
            assert (old, new) in LEGAL
            assert old is (self.bench.moves[index - 1][1] if index else CLOSED)
            if new is OPEN:
                self.opens_at = self.gate.since + wait_s
                assert 1.0 - 1e-6 <= wait_s <= 66.0 + 1e-6
            else:
                assert wait_s == 0
        self.told = len(self.bench.moves)

    def teardown(self) -> None:
        """From every state reached, trials that pass close it again."""
        for _ in range(6):
            self.bench.clock.advance(self.gate.retry_in())
            permit = self.gate.acquire_trial()
            if permit is not None:
                permit.settle(CREDIT)
        assert self.gate.state is CLOSED
        assert self.gate.acquire() is not None


Histories.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestHistories = Histories.TestCase


def _step(history: Histories, rng: random.Random) -> None:
    """One of the machine's rules, by plain chance."""
    steps: list[Callable[[], None]] = [
        history.call,
        history.trial,
        lambda: history.wait(rng.choice([0.1, 1.0, 2.5, 7.0, 30.0, 61.0, 130.0])),
        lambda: history.wait_until_due(rng.random()),
        lambda: history.trip(rng.randint(1, 2)),
        history.reset,
        history.forward,
        history.forget,
        lambda: history.pool(rng.random() < 0.5, rng.random() < 0.5),
    ]
    weights = [12, 6, 6, 4, 1, 1, 1, 1, 1]
    if history.permits:
        marks = rng.choice([[CREDIT], [BLAME], list(Mark)])
        late = -rng.randint(1, min(8, len(history.permits))) % len(history.permits)
        steps.append(
            lambda: history.settle(late, rng.choice(marks), rng.randint(1, 2), rng.randint(1, 2))
        )
        weights.append(12)
    rng.choices(steps, weights)[0]()


def test_thousands_of_histories() -> None:
    """The same rules hold over 2,500 seeded histories of 60 steps; a failure names its seed."""
    for seed in range(2500):
        history, rng = Histories(), random.Random(seed)
        try:
            for _ in range(60):
                _step(history, rng)
                history.trials_are_counted()
                history.moves_are_legal()
            history.teardown()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
