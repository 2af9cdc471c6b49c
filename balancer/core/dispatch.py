"""
The conductor: tickets in, leases out.

Laws:
- Every change (submit, settle, flip, reload, timer) ends in `kick`, which lets the scheduler plan
  and carries its effects out in the same turn. Where nobody waits there is nothing to plan.
- A ticket is answered exactly once: granted, refused, or withdrawn by its owner.
- Nothing here awaits; the shell hears through callbacks, which must not raise.
- A call that comes when nobody waits, and can start, is granted without a pass: there is nothing
  to plan, nobody to be late and nothing to wake for. It gets what a pass would have given it.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol, runtime_checkable

from balancer.core.admission import Admission
from balancer.core.domain import Attempt, Call, Candidate, Residency
from balancer.core.errors import (
    AttemptsExhausted,
    BalancerError,
    DeadlineExceeded,
    Forbidden,
    NoBackend,
    QueueTimeout,
    UnknownModel,
    UnknownRoute,
    WaitTooLong,
)
from balancer.core.events import CallQueued, Emit, Hears, LeaseGranted, RetryGranted
from balancer.core.limits import Limits
from balancer.core.load import OVER_S
from balancer.core.pool import Lease, Pool, Prospect, ProspectKind, discreet
from balancer.core.scheduler import (
    Began,
    Commit,
    CommitRefused,
    Fact,
    FirstByte,
    Load,
    LoadAnswered,
    LoadRefused,
    Option,
    Refuse,
    Rehearsal,
    Scheduler,
    Ticket,
    TicketState,
    Turn,
    Unload,
)
from balancer.core.spread import Spread
from balancer.core.tiers import highest

MAX_PASSES: Final = 4
PASS_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
LATE_S: Final = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
# To look a member up in its enum takes longer than most of what is done with it here.
WAITING, GRANTED = TicketState.WAITING, TicketState.GRANTED


@dataclass(frozen=True, slots=True)
class Answer:
    """What a backend said that may have to be relayed: status, content type, body."""

    status: int
    content_type: str
    body: bytes


class LoadFailed(BalancerError):
    """The load a call waited for has failed; counts as an attempt of that call."""

    status = 503
    code = "load_failed"
    shown = False  # another attempt follows, or what all of them said

    def __init__(self, attempt: Attempt, answer: Answer | None) -> None:
        super().__init__(attempt.outcome.text)
        self.attempt = attempt
        self.answer = answer


@dataclass(frozen=True, slots=True)
class Forecast:
    """
    What would become of a call.

    Args:
        kind: ``now``; ``load``: it waits for one; ``queue``: for a slot; ``away``: for a backend
            to come back; ``refused``.
        status: 200, or that of the refusal.
        backend: Where it would go, or where the load is; empty: not known.
        wait_s: An estimate; inf: nobody can tell.
        text: For people.
        options: The scheduler's candidates, best first.
        barred: Why others that may serve it are none, for people, by backend.
        turn: Its place in the queue, None: that has no such order.
        prompt_tokens: What it was planned with; None: as it is.
    """

    kind: str
    status: int
    backend: str
    wait_s: float
    text: str
    options: tuple[Option, ...]
    barred: Mapping[str, str] = field(default_factory=dict)
    turn: Turn | None = None
    prompt_tokens: int | None = None


@runtime_checkable
class Estimating(Protocol):
    """A scheduler that can tell how long calls will wait."""

    def wait_estimate(self, ticket: Ticket, now: float) -> float:
        """Seconds until *ticket*, which may wait here or nowhere, gets a slot; inf: unknown."""


class _Glance:
    """The pool through a window: what is asked about here does not count as asked for."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.loading = pool.loading
        self.priorities = pool.priorities

    def candidates(self, call: Call, excluded: frozenset[str]) -> list[Candidate]:
        """Backends that may serve *call* now."""
        standings = self._pool.standings(call, excluded)
        return [standing.candidate for standing in standings if standing.bar is None]


@dataclass(slots=True)
class _Owner:
    """Who hears about a ticket."""

    on_grant: Callable[[Lease], None]
    on_refuse: Callable[[BalancerError], None]


class Dispatcher:
    """
    Pairs waiting calls with backends.

    Args:
        wake_at: Asks the shell to call `kick` at that instant (at the latest); inf: never.
        on_load: Asks the shell to carry out a detached load whose token was taken.
        on_unload: Asks the shell to unload a model.
        hears: Whether first grants are to be told.
        limits: What each key may use.
        stopwatch: Seconds, for `pass_s`; None: the clock, which may stand still meanwhile.

    Attributes:
        grants: Attempts begun so far, by the reason of each.
        pass_s: How long the scheduler took for each pass.
        late: By how much waiting calls waited longer, or shorter, than estimated when they came.
    """

    def __init__(
        self,
        pool: Pool,
        scheduler: Scheduler,
        admission: Admission,
        clock: Callable[[], float],
        emit: Emit,
        wake_at: Callable[[float], None],
        on_load: Callable[[Load], None],
        on_unload: Callable[[Unload], None],
        hears: Hears = lambda _: True,
        limits: Limits | None = None,
        stopwatch: Callable[[], float] | None = None,
    ) -> None:
        self._stopwatch = stopwatch or clock
        self.pass_s = Spread(PASS_S)
        self.late = {"longer": Spread(LATE_S), "shorter": Spread(LATE_S)}
        self._limits = limits or Limits(clock)
        self.grants: dict[str, int] = {}
        self._hears = hears
        self._pool = pool
        self._scheduler = scheduler
        self._admission = admission
        self._clock = clock
        self._emit = emit
        self._wake_at = wake_at
        self._on_load = on_load
        self._on_unload = on_unload
        self._owners: dict[Ticket, _Owner] = {}
        self._seq = 0
        self._planning = False
        self._again = False
        self._seen_outlook: object = None
        self._pushed = 0
        self._ends: list[tuple[float, bool, int, Ticket]] = []  # a heap; some are out of date
        self._is_timed = False  # the shell was asked to call
        self._due = math.inf  # then
        self._changes_at = math.inf  # when time alone may change something in the pool
        pool.note = self._note

    @property
    def admission(self) -> Admission:
        """The bounds on waiting."""
        return self._admission

    def exchange(self, scheduler: Scheduler) -> None:
        """Take another scheduler; waiting tickets move over, and what has been learned."""
        now = self._clock()
        scheduler.recall(self._scheduler.learned(now), now, 0.0)
        for run in self._pool.runs():
            scheduler.note(Began(run))
            if run.first_at is not None:
                scheduler.note(FirstByte(run, run.first_at))
        for ticket in self._scheduler.waiting():
            scheduler.enqueue(ticket)
        self._scheduler = scheduler

    def learned(self) -> dict[str, Any]:
        """What the scheduler has learned, as plain JSON."""
        return self._scheduler.learned(self._clock())

    def recall(self, learned: Mapping[str, Any], age_s: float) -> None:
        """Give the scheduler what one had *learned* so long ago."""
        self._scheduler.recall(learned, self._clock(), age_s)

    def waiting(self) -> list[Ticket]:
        """All tickets that wait, in order."""
        return list(self._scheduler.waiting())

    def estimate_s(self, ticket: Ticket) -> float:
        """How long *ticket* is still to wait for a slot; inf: nobody can tell."""
        if not isinstance(self._scheduler, Estimating):
            return math.inf
        return self._scheduler.wait_estimate(ticket, self._clock())

    def _note(self, fact: Fact) -> None:
        self._limits.note(fact)
        self._scheduler.note(fact)

    def submit(
        self,
        call: Call,
        on_grant: Callable[[Lease], None],
        on_refuse: Callable[[BalancerError], None],
        *,
        excluded: frozenset[str] = frozenset(),
        attempts: tuple[Attempt, ...] = (),
        seq: int | None = None,
    ) -> Ticket:
        """
        Queue *call*; exactly one of the callbacks follows, perhaps before this returns.

        Args:
            excluded: Backends it may not use.
            attempts: What was tried before; such a call keeps its *seq* and is always admitted.

        Raises:
            BalancerError: It cannot wait: queue full, model unknown, nobody can ever serve it.
        """
        now = self._clock()
        limit_at, deadline = now + self._admission.limits.max_wait_s, call.deadline
        if deadline is not None and deadline < limit_at:
            limit_at = deadline
        is_new = seq is None and not attempts and not excluded
        if seq is None:
            seq = self._seq + 1
        ticket = Ticket(call, seq, excluded, attempts, now, limit_at)
        if is_new and not self._owners and not self._planning:
            is_late = deadline is not None and deadline <= now
            if not is_late and self._begin(ticket, on_grant):
                return ticket
        gives_way = self._check(ticket)
        self._seq = max(self._seq, seq)
        self._owners[ticket] = _Owner(on_grant, on_refuse)
        self._may_wait_until(ticket, limit_at)
        told = None
        if gives_way is not None:
            model, limit = gives_way.call.key.model, self._admission.limit(call.key.model)
            told = self._admission.full(model, limit, gives_way=True)
        self._admission.entered(call.key.model)
        self._scheduler.enqueue(ticket)
        if gives_way is not None and told is not None:
            self._refuse(gives_way, told)
        self.kick(now)  # so that one that may not wait at all is planned for, too
        if ticket.state is WAITING:
            self._emit(CallQueued(now, call.id, call.model, self._admission.depth))
        return ticket

    def _begin(self, ticket: Ticket, on_grant: Callable[[Lease], None]) -> bool:
        """Grant at once what can start; False: it cannot, and nothing has changed."""
        if not self._limits.may_start(ticket.call):
            return False
        commit = self._scheduler.begin(ticket, ticket.queued_at)
        if commit is None:
            return False
        why = self._why(commit)
        lease = self._pool.lease(
            ticket.call, commit.backend, 1, why, probe=commit.probe, slots=commit.slots
        )
        if lease is None:
            self._scheduler.note(CommitRefused(ticket, commit.backend))
            return False
        self._seq = ticket.seq
        lease.run.planned = commit.planned
        ticket.state = GRANTED
        self._admission.passed()
        self._planning = True  # what the callback asks for comes after it, as in a pass
        try:
            self._granted(ticket, lease, on_grant, ticket.queued_at)
        finally:
            self._planning = False
        if self._again:
            self._plan(MAX_PASSES - 1)
        elif not self._is_timed:
            self._arm()
        return True

    def check_room(self, who: str) -> None:
        """
        Raise QueueFull if no call of that key of fairness could wait, whatever is not known of it.

        Raises:
            QueueFull: As `submit` would.
        """
        if self._admission.is_full() and self._gives_way(who) is None:
            self._admission.check("")

    def _check(self, ticket: Ticket) -> Ticket | None:
        """Who is to give way to it; None: nobody. Raises what is told to one that cannot wait."""
        call, now, gives_way = ticket.call, ticket.queued_at, None
        prospect = self._pool.prospect(call, ticket.excluded)
        if not ticket.attempts:
            if not _can_wait(prospect, now, math.inf):
                raise refusal(call.model, prospect)
            has_room = self._pool.has_room(call)
            if not has_room or not self._limits.may_start(call):
                gives_way = self._makes_room(call)
                if gives_way is None:
                    self._admission.check(call.key.model)
            if not has_room:
                self._check_wait(ticket)
        if not _can_wait(prospect, now, ticket.limit_at):
            raise refusal(call.model, prospect, ticket.attempts)
        return gives_way

    def _makes_room(self, call: Call) -> Ticket | None:
        """Whose place a call may take that finds the queue full; None: nobody's, or it is not."""
        model = call.key.model
        limit = self._admission.limit(model)
        if not limit:
            return None
        return self._gives_way(call.fair_key, model if limit == "max_depth_per_model" else None)

    def _gives_way(self, who: str, model: str | None = None) -> Ticket | None:
        """
        The newest call, batch first, of whoever has most waiting; None: that is no more than fair.

        It is where *who* asks and has two less: then neither has cause to ask for it back.

        Args:
            model: Only those for it count; None: all.
        """
        waiting = [t for t in self._owners if model is None or t.call.key.model == model]
        counts = Counter(ticket.call.fair_key for ticket in waiting)
        most = max(counts.values(), default=0)
        if most < counts[who] + 2:
            return None
        theirs = [t for t in waiting if counts[t.call.fair_key] == most and not t.attempts]
        return max(theirs, key=lambda t: (t.call.batch, t.seq), default=None)

    def _check_wait(self, ticket: Ticket) -> None:
        """Raises what is told to a call for which no slot will come free in time."""
        call, now = ticket.call, ticket.queued_at
        if not self._admission.limits.adaptive or not self.is_warm_elsewhere(call, ticket.excluded):
            return  # a load takes what it takes: the queue's limit rests meanwhile
        wait_s = ticket.estimate_s = self.estimate_s(ticket)
        if wait_s < math.inf:
            left_s = math.inf if call.deadline is None else call.deadline - now
            self._admission.check_wait(wait_s, left_s)

    def forecast(
        self, call: Call, excluded: frozenset[str] = frozenset(), ticket: Ticket | None = None
    ) -> Forecast:
        """
        What would become of *call*, were it submitted now; nothing comes of asking.

        Args:
            ticket: Its own, if it waits already.
        """
        now, max_wait_s = self._clock(), self._admission.limits.max_wait_s
        view, is_new = _Glance(self._pool), ticket is None
        if ticket is None:
            ticket = Ticket(call, self._seq + 1, excluded, (), now, now + max_wait_s)
        plan = self._scheduler.rehearse(ticket, view, now)
        told = self._foretold(ticket, plan, view)
        if told.kind == "refused" and ticket in self._owners:  # it was admitted, before
            told = Forecast("queue", 200, plan.holds, plan.wait_s, "waits in the queue", ())
        if is_new:
            tokens = plan.prompt_tokens or call.prompt_tokens
            beyond = self._limits.foresee(replace(call, prompt_tokens=tokens))
            if beyond is not None:
                told = Forecast("refused", beyond.status, "", math.inf, beyond.text, ())
        return replace(
            told,
            options=plan.options,
            barred=plan.barred,
            turn=plan.turn,
            prompt_tokens=plan.prompt_tokens,
        )

    def _foretold(self, ticket: Ticket, plan: Rehearsal, view: _Glance) -> Forecast:
        call, max_wait_s = ticket.call, self._admission.limits.max_wait_s
        prospect = self._pool.prospect(call, ticket.excluded, exists=False)
        error = self._hopeless(ticket, prospect, view)
        if error is not None:
            return Forecast("refused", error.status, "", math.inf, error.text, ())
        if isinstance(plan.effect, Commit):
            goes = plan.effect.backend
            return Forecast("now", 200, goes, 0.0, f"goes to {goes} now", ())
        usable = {c.backend for c in view.candidates(call, ticket.excluded)}
        under_way = [load.backend for load in view.loading(call.key) if load.backend in usable]
        if isinstance(plan.effect, Load):
            text = f"is loaded on {plan.effect.backend} first"
            return Forecast("load", 200, plan.effect.backend, plan.wait_s, text, ())
        loads = plan.holds or next(iter(under_way), "")
        if loads in under_way:
            return Forecast("load", 200, loads, plan.wait_s, f"waits for the load on {loads}", ())
        if prospect.kind is not ProspectKind.OPEN:
            text = f"waits for a backend to come back. {prospect.text}"
            return Forecast("away", 200, "", prospect.retry_in_s, text, ())
        if not max_wait_s:
            text = "no slot is free, and queue.max_wait lets nobody wait"
            return Forecast("refused", QueueTimeout.status, "", math.inf, text, ())
        text = plan.text or "waits in the queue for a slot"
        is_long = max_wait_s < plan.wait_s < math.inf
        if is_long and self._admission.limits.adaptive and self.estimate_s(ticket) < math.inf:
            text = f"would wait about {plan.wait_s:.0f} s, longer than queue.max_wait"
            return Forecast("refused", WaitTooLong.status, "", plan.wait_s, text, ())
        if is_long:
            text += f"; after {max_wait_s:.0f} s (queue.max_wait) it is refused"
        return Forecast("queue", 200, plan.holds, plan.wait_s, text, ())

    def _hopeless(self, ticket: Ticket, prospect: Prospect, view: _Glance) -> BalancerError | None:
        """What `submit` would refuse it with."""
        now, call = self._clock(), ticket.call
        if not _can_wait(prospect, now, math.inf):
            return refusal(call.model, prospect)
        candidates = highest(view.candidates(call, frozenset()), view.priorities)
        if not any(c.residency is Residency.LOADED and c.in_flight < c.slots for c in candidates):
            limit = self._admission.limit(call.key.model)
            if limit and self._makes_room(call) is None:
                return self._admission.full(call.key.model, limit, asked=False)
        return None if _can_wait(prospect, now, ticket.limit_at) else refusal(call.model, prospect)

    def choose(self, calls: Sequence[Call], *, exists: bool = True) -> int:
        """
        Which of the *calls*, equal but for their model, is to be made.

        The first that can be served now; else the first whose model is known, and which waiting
        may help; else the first that is known; else the first. Calls that do not *exist*, and
        those behind one that can be served, leave no trace.
        """
        ranks = []
        for at, call in enumerate(calls):
            prospect = self._pool.prospect(call, frozenset(), exists=exists)
            if prospect.kind is ProspectKind.OPEN:
                return at
            known = prospect.kind is ProspectKind.AWAY and self._pool.catalog.knows(call.key.model)
            ranks.append((not known, known and math.isinf(prospect.retry_in_s), at))
        return min(ranks)[-1]

    def is_served_elsewhere(self, call: Call, excluded: frozenset[str]) -> bool:
        """Whether a backend that is not *excluded* could serve *call* now."""
        return self._pool.prospect(call, excluded).kind is ProspectKind.OPEN

    def is_choice(self, model: str) -> bool:
        """Whether there is more than one backend to choose from for *model*."""
        return self._pool.is_choice(model)

    def is_warm_elsewhere(self, call: Call, excluded: frozenset[str]) -> bool:
        """Whether a backend that is not *excluded* has the model in memory."""
        return Residency.LOADED in self._pool.residencies(call, excluded)

    def withdraw(self, ticket: Ticket) -> None:
        """The owner is gone; idempotent."""
        if self._finish(ticket, TicketState.WITHDRAWN) is not None:
            self.kick()

    def load_ended(
        self, load: Load, attempt: Attempt | None, answer: Answer | None, load_s: float
    ) -> None:
        """
        A detached load was answered. *attempt* tells of a failure, None: it succeeded.

        The call it was for hears of a failure as of an attempt of its own; others wait on.
        """
        ok = attempt is None
        self._scheduler.note(LoadAnswered(load.backend, load.key, ok, load_s))
        self._rested(load)
        if attempt is not None and load.ticket is not None:
            self._refuse(load.ticket, LoadFailed(attempt, answer))
        elif load.ticket is not None and answer is not None:
            load.ticket.loaded_on = load.backend
        self.kick()

    def load_stopped(self, load: Load) -> None:
        """A detached load was given up before it was answered: its call waits on, unblamed."""
        self._scheduler.note(LoadRefused(load.backend, load.key))
        self._rested(load)
        self.kick()

    def _rested(self, load: Load) -> None:
        """The queue's limit rested while the load was under way."""
        now, key = self._clock(), load.key
        for ticket in self._owners:
            wanted = ticket.call.key
            if wanted.model != key.model or wanted != key:
                continue
            if load.backend not in ticket.excluded:
                self._may_wait_until(ticket, self._limit(ticket, now))

    def kick(self, now: float | None = None) -> None:
        """
        Plan, and carry out what was planned; re-entrant calls are folded into one more pass.

        Args:
            now: For whom it is done; None: the clock's.
        """
        if self._planning:
            self._again = True
        elif self._owners or (self._is_timed and self._clock() >= self._due):
            self._again = True
            self._plan(MAX_PASSES, now)
        else:
            self._seen_outlook = self._pool.outlook
            if not self._is_timed:
                self._arm()

    def _arm(self) -> None:
        """Have us called when the scheduler wants to be asked though nothing happens."""
        at = self._scheduler.wake_at()
        if at < math.inf:
            self._wake(at)

    def _plan(self, passes: int, now: float | None = None) -> None:
        self._planning = True
        try:
            for _ in range(passes):
                if not self._again:
                    break
                self._again = False
                self._pass(self._clock() if now is None else now)
                now = None
        finally:
            self._planning = False
        if self._again:  # enough for one turn of the loop
            self._wake(self._clock())

    def _wake(self, at: float) -> None:
        self._is_timed, self._due = at < math.inf, at
        self._wake_at(at)

    def refuse_all(self, error: BalancerError) -> None:
        """Answer everybody who waits; for the end of a drain."""
        for ticket in list(self._owners):
            self._refuse(ticket, error)

    def _pass(self, now: float) -> None:
        owners = self._owners
        if owners:
            # What may not wait at all still gets a free slot: so some expire after the plan.
            self._expire(self._late(now, planned=False), now)
        if self._pool.outlook != self._seen_outlook:
            self._seen_outlook = self._pool.outlook
            self._review()
        if now >= self._changes_at - OVER_S:
            self._pool.tell_time(now)
        wake, began = math.inf, self._stopwatch()
        effects = self._scheduler.plan(now)
        self.pass_s.observe(self._stopwatch() - began)
        for effect in effects:
            match effect:
                case Commit():
                    self._commit(effect, now)
                case Load():
                    self._load(effect)
                case Unload():
                    self._on_unload(effect)
                case Refuse(ticket, error):
                    self._refuse(ticket, error)
                case _:
                    wake = min(wake, effect.at)
        self._changes_at = self._pool.next_change(now)
        if owners:
            self._expire(self._late(now, planned=True), now)
            limit_at = self._ends[0][0] if self._ends else math.inf
            wake = min(wake, self._changes_at, limit_at)
        self._wake(wake)

    def _commit(self, commit: Commit, now: float) -> None:
        ticket = commit.ticket
        if ticket not in self._owners:  # it left while others were answered
            return
        call = ticket.call
        why = self._why(commit)
        number = len(ticket.attempts) + 1
        lease = None
        if self._limits.may_start(call):
            lease = self._pool.lease(
                call, commit.backend, number, why, probe=commit.probe, slots=commit.slots
            )
        if lease is None:
            self._scheduler.note(CommitRefused(ticket, commit.backend))
            self._scheduler.enqueue(ticket)
            return
        owner = self._owners[ticket]
        self._finish(ticket, GRANTED)
        lease.run.planned = commit.planned
        if ticket.estimate_s < math.inf:
            late_s = now - ticket.queued_at - ticket.estimate_s
            self.late["longer" if late_s > 0.0 else "shorter"].observe(abs(late_s))
        self._granted(ticket, lease, owner.on_grant, now)

    def _granted(
        self, ticket: Ticket, lease: Lease, on_grant: Callable[[Lease], None], now: float
    ) -> None:
        why, attempts = lease.why, ticket.attempts
        self.grants[why] = self.grants.get(why, 0) + 1
        if attempts or self._hears(LeaseGranted):
            call, waited_s = ticket.call, now - ticket.queued_at
            told = (now, call.id, call.model, lease.backend.name, lease.number, waited_s, why)
            self._emit(RetryGranted(*told, attempts[-1]) if attempts else LeaseGranted(*told))
        on_grant(lease)

    def _why(self, commit: Commit) -> str:
        """The first that holds: other-weights, short-context, failover, only, cold, warm."""
        ticket = commit.ticket
        peculiar = self._pool.peculiarity(ticket.call, ticket.excluded, commit.backend)
        if peculiar == "other-weights":
            return peculiar
        if commit.why == "short-context":
            return commit.why
        if ticket.attempts:
            return "failover"
        return peculiar or ("cold" if ticket.cold else commit.why)

    def _load(self, load: Load) -> None:
        ticket = load.ticket
        is_wanted = ticket is None or ticket in self._owners
        if not is_wanted or not self._pool.take_token(
            load.backend,
            load.key,
            load.why,
            victims=load.victims,
            expected_s=load.expected_s,
            evict_s=load.evict_s,
        ):
            self._scheduler.note(LoadRefused(load.backend, load.key))
            return
        if ticket is not None:
            ticket.cold = True
            ticket.load_on = load.backend
        self._on_load(load)
        self._again = True  # only now does the scheduler see it, and say when it is overdue

    def _expire(self, tickets: Sequence[Ticket], now: float) -> None:
        for ticket in tickets:
            call = ticket.call
            if call.deadline is not None and call.deadline <= now:
                self._refuse(ticket, DeadlineExceeded("The call's own deadline has passed."))
            elif self._is_loading(ticket):
                # The load budget bounds this wait, not the queue's limit.
                self._may_wait_until(ticket, self._limit(ticket, now))
            else:
                self._refuse(ticket, self._overdue(ticket))

    def _is_loading(self, ticket: Ticket) -> bool:
        """Whether a load is under way that may yet serve the call."""
        return Residency.LOADING in self._pool.residencies(ticket.call, ticket.excluded)

    def _may_wait_until(self, ticket: Ticket, at: float) -> None:
        ticket.limit_at = at
        deadline = ticket.call.deadline
        is_ours = deadline is None or deadline > at  # where both end, its own deadline is told
        self._pushed += 1
        heapq.heappush(self._ends, (at, is_ours, self._pushed, ticket))
        if len(self._ends) > 2 * len(self._owners) + 64:
            self._ends = [entry for entry in self._ends if self._is_current(entry)]
            heapq.heapify(self._ends)

    def _is_current(self, entry: tuple[float, bool, int, Ticket]) -> bool:
        return entry[3] in self._owners and entry[3].limit_at == entry[0]

    def _late(self, now: float, *, planned: bool) -> list[Ticket]:
        """Whose limit has passed; those at theirs only when *planned* for, or by their deadline."""
        late, ends = [], self._ends
        while ends:
            at, is_ours, _, ticket = ends[0]
            if not self._is_current(ends[0]):
                heapq.heappop(ends)
            elif at < now or (at <= now and (planned or not is_ours)):
                heapq.heappop(ends)
                late.append(ticket)
            else:
                break
        return late

    def _limit(self, ticket: Ticket, now: float) -> float:
        limit_at = now + max(1.0, self._admission.limits.max_wait_s)
        return limit_at if ticket.call.deadline is None else min(limit_at, ticket.call.deadline)

    def _overdue(self, ticket: Ticket) -> BalancerError:
        prospect = self._pool.prospect(ticket.call, ticket.excluded)
        slots = ticket.call.principal.allowance.slots
        if prospect.kind is ProspectKind.OPEN and not self._limits.may_start(ticket.call):
            return QueueTimeout(
                f"Its key had {slots} calls running, as many as it may (limits.slots), for "
                f"{self._admission.limits.max_wait_s:.0f} s (queue.max_wait).",
                retry_after_s=10.0,
            )
        if prospect.kind is ProspectKind.OPEN:
            ahead = self._admission.depths().get(ticket.call.key.model, 1)
            return QueueTimeout(
                f"No slot came free for {ticket.call.model!r} in "
                f"{self._admission.limits.max_wait_s:.0f} s (queue.max_wait); {ahead} calls wait "
                "for it.",
                retry_after_s=self._admission.drain_s(ahead),
            )
        return refusal(ticket.call.model, prospect, ticket.attempts)

    def _review(self) -> None:
        """Something in the pool changed: refuse those whom waiting cannot help any more."""
        prospects: dict[tuple[object, ...], Prospect] = {}
        for ticket in list(self._owners):
            call = ticket.call
            alike = (call.key, call.model, call.route, ticket.excluded, call.principal.models)
            if alike not in prospects:
                prospects[alike] = self._pool.prospect(call, ticket.excluded)
            prospect = prospects[alike]
            if not _can_wait(prospect, self._clock(), ticket.limit_at):
                self._refuse(ticket, refusal(ticket.call.model, prospect, ticket.attempts))

    def _refuse(self, ticket: Ticket, error: BalancerError) -> None:
        owner = self._finish(ticket, TicketState.REFUSED)
        if owner is not None:
            owner.on_refuse(error)

    def _finish(self, ticket: Ticket, state: TicketState) -> _Owner | None:
        owner = self._owners.pop(ticket, None)
        if owner is None:
            return None
        ticket.state = state
        self._scheduler.withdraw(ticket)
        self._admission.left(ticket.call.key.model)
        return owner


def _can_wait(prospect: Prospect, now: float, limit_at: float) -> bool:
    if prospect.kind not in (ProspectKind.OPEN, ProspectKind.AWAY):
        return False
    return prospect.kind is ProspectKind.OPEN or now + prospect.retry_in_s <= limit_at


def refusal(model: str, prospect: Prospect, attempts: tuple[Attempt, ...] = ()) -> BalancerError:
    """Why nobody serves *model* (as asked for), after those *attempts*."""
    if prospect.kind is ProspectKind.UNKNOWN:
        return UnknownModel(prospect.text)
    if prospect.kind is ProspectKind.FORBIDDEN:
        return Forbidden(prospect.text)
    if prospect.kind is ProspectKind.NO_ROUTE:
        return UnknownRoute(prospect.text)
    tried = "; ".join(f"{a.backend}: {discreet(a.outcome.text)}" for a in attempts)
    if attempts and prospect.kind is ProspectKind.EXHAUSTED:
        return AttemptsExhausted(
            f"Every backend that could serve {model!r} failed: {tried}", retry_after_s=5.0
        )
    text = f"{prospect.text} Tried before: {tried}" if tried else prospect.text
    return NoBackend(text, retry_after_s=_sane(prospect.retry_in_s))


def _sane(wait_s: float) -> float:
    return 10.0 if math.isinf(wait_s) else min(60.0, max(1.0, wait_s))
