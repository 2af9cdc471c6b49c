"""
The shell of the product, pretended: carries calls between the real core and simulated hosts.

What it does with a call it does as the proxy does: asks for a lease, sends, settles by how it
ended, and tries again elsewhere as long as no byte has come and the rules of repeats allow it.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, Protocol

from balancer.core import names, routes, verdicts
from balancer.core.admission import Admission, QueueLimits
from balancer.core.body import read
from balancer.core.catalog import Catalog
from balancer.core.chains import NOTHING, chain
from balancer.core.dispatch import Dispatcher, LoadFailed
from balancer.core.domain import (
    Attempt,
    Backend,
    Call,
    Outcome,
    PlacementKey,
    Principal,
    Purpose,
    Role,
    Usage,
    Verdict,
)
from balancer.core.errors import BalancerError
from balancer.core.events import Event, LoadStarted
from balancer.core.knobs import Knobs
from balancer.core.plan import Plan
from balancer.core.pool import Lease, Pool, PoolSettings
from balancer.core.retry import Budget, again, excluded, repeats_crash
from balancer.core.scheduler import Ticket, TicketState
from balancer.core.strategy import build
from balancer.core.verdicts import Failure, FailureKind, Judgement
from balancer.sim.bodies import request
from balancer.sim.jobs import Job, Record
from balancer.sim.machine import Host, Loss, Model, Told, Work
from balancer.sim.probing import OK, Prober, judge
from balancer.sim.timeline import Entry, Timeline

LOOK_S: Final = 0.05  # between writes of a stream
TICK_S: Final = 0.5
IDLE_S: Final = 300.0
CHAT: Final = routes.find("POST", "/api/chat")
EMBED: Final = routes.find("POST", "/api/embed")
# As the product makes it of its defaults: no trial of a backend is given up before a load is.
USUAL: Final = PoolSettings(
    host=replace(PoolSettings().host, half_open_max_s=PoolSettings().load_s + 60.0)
)
WIDE: Final = QueueLimits(10**9, 10**9, 1e9)
GONE: Final = Judgement(Verdict.GONE)

Over = Callable[[Record, str], None]


class Watch(Protocol):
    """Somebody who looks whether all goes by the laws."""

    def granted(self, course: Course, lease: Lease) -> None:
        """A call got a lease."""

    def heard(self, event: Event) -> None:
        """The core told something."""


class Course:
    """What one call has been through so far."""

    __slots__ = (
        "answered",
        "asked_at",
        "attempt",
        "call",
        "excluded",
        "is_over",
        "job",
        "record",
        "seq",
        "ticket",
        "tried",
    )

    def __init__(self, job: Job, record: Record, call: Call) -> None:
        self.job = job
        self.record = record
        self.call = call
        self.tried: tuple[Attempt, ...] = ()
        self.excluded: frozenset[str] = frozenset()
        self.answered = False  # a host said something that could be relayed
        self.seq: int | None = None
        self.ticket: Ticket | None = None
        self.attempt: Try | None = None
        self.asked_at = 0.0
        self.is_over = False

    def __str__(self) -> str:
        return f"call {self.record.job}"


class Try:
    """One attempt: the sink of a request."""

    __slots__ = (
        "_by",
        "course",
        "first_at",
        "host",
        "lease",
        "moved_at",
        "sent_at",
        "told",
        "work",
    )

    def __init__(self, by: Shell, course: Course, lease: Lease, host: Host) -> None:
        job = course.job
        self._by = by
        self.course = course
        self.lease = lease
        self.host = host
        self.sent_at = self.moved_at = by.timeline.now
        self.first_at: float | None = None
        self.told = 0  # tokens that the lease has heard of
        self.work = Work(
            job.model,
            self,
            job.prompt_tokens,
            job.output_tokens,
            chain=job.chain,
            conversation=job.conversation,
        )

    def first(self, work: Work) -> None:  # noqa: ARG002 - a sink
        """Its first token came."""
        now = self._by.timeline.now
        self.first_at = self.moved_at = self.course.record.first_at = now
        self.told = 1
        self.lease.on_revoke = None
        self.lease.moved()
        self._by.streaming()

    def ended(self, work: Work, told: Told) -> None:  # noqa: ARG002 - a sink
        """It was answered in full."""
        if self.told < told.output_tokens:
            self.lease.moved(told.output_tokens - self.told)
        usage = Usage(
            told.prompt_tokens,
            told.output_tokens,
            told.load_s,
            told.prompt_s,
            told.decode_s,
            told.total_s,
        )
        self.course.record.cached = told.cached
        self._by.settle(self, OK, usage)
        self._by.over(self.course, "done")

    def failed(self, work: Work, loss: Loss) -> None:  # noqa: ARG002 - a sink
        """It came to nothing."""
        judgement, answer = judge(loss, committed=self.first_at is not None)
        self._by.failed(self, judgement, answered=answer is not None)

    def look(self) -> None:
        """Tell the lease what has come since the last time."""
        came, now = self.host.tokens(self.work), self._by.timeline.now
        if came > self.told:
            self.lease.moved(came - self.told)
            self.told, self.moved_at = came, now
        elif now - self.moved_at >= IDLE_S:
            self.host.cancel(self.work)
            failure = Failure(FailureKind.IDLE)
            judgement = verdicts.of_failure(failure, committed=True, received=1)
            self._by.failed(self, judgement, answered=False)

    def revoke(self, judgement: Judgement) -> None:
        """The pool gave up on this backend before a byte came."""
        self.lease.on_revoke = None
        self.host.cancel(self.work)
        self._by.timeline.after(0.0, self._revoked, judgement)

    def _revoked(self, judgement: Judgement) -> None:
        if not self.lease.settled:
            self._by.failed(self, judgement, answered=False)


class Shell:
    """
    The real core, driven before simulated hosts.

    Args:
        policy: Of the core's scheduler, by name.
        slots_known: Whether the backends' slots are configured.
        memory_known: Whether their memory is.
        over: Told once of each call how it ended.

    Attributes:
        running: Attempts under way.
        loads_by: Detached loads begun, by reason.
    """

    def __init__(
        self,
        policy: str,
        hosts: Mapping[str, Host],
        models: Sequence[Model],
        timeline: Timeline,
        rng: random.Random,
        over: Over,
        *,
        slots_known: bool,
        memory_known: bool = True,
        ps_interval_s: float,
        queue: QueueLimits | None,
        watch: Watch | None = None,
        settings: PoolSettings | None = None,
        knobs: Knobs | None = None,
    ) -> None:
        clock = timeline.clock
        self.timeline = timeline
        self.hosts = hosts
        self.running: dict[Try, None] = {}
        self.loads_by: Counter[str] = Counter()
        self._over = over
        self._watch = watch
        self._courses: dict[int, Course] = {}
        self._keys = {model.name: _key(model) for model in models}
        self._embeds = frozenset(model.name for model in models if model.embedding)
        self._principals: dict[str, Principal] = {}
        self.catalog = Catalog(clock)
        self.pool = Pool(settings or USUAL, self.catalog, clock, rng, self._emit, self._hears)
        told = {"slots_known": slots_known, "memory_known": memory_known}
        self.pool.reshape([_backend(host, **told) for host in hosts.values()])
        canonical = {key.model: name for name, key in self._keys.items()}
        self.prober = Prober(hosts, self.pool, timeline, rng, canonical, ps_interval_s)
        self.scheduler = build(policy, self.pool, knobs=knobs)
        self.dispatcher = Dispatcher(
            self.pool,
            self.scheduler,
            Admission(queue or WIDE, clock),
            clock,
            self._emit,
            self._wake_at,
            self.prober.load,
            self.prober.unload,
            self._hears,
        )
        self.prober.dispatcher = self.dispatcher
        self.pool.changed = self.dispatcher.kick
        self.budget = Budget(clock)
        self._wanted_at = math.inf
        self._alarm: Entry | None = None
        self.prober.start()
        self._is_looking = False
        timeline.after(TICK_S, self._tick)

    def _hears(self, kind: type[Event]) -> bool:  # noqa: ARG002 - the core's question
        return self._watch is not None

    def _emit(self, event: Event) -> None:
        if isinstance(event, LoadStarted):
            self.loads_by[event.why] += 1
        if self._watch is not None:
            self._watch.heard(event)

    # -- calls ---------------------------------------------------------------------------------

    def take(self, job: Job, record: Record) -> None:
        """A call comes in."""
        self.budget.note_call()
        course = self._courses[record.job] = Course(job, record, self._call(job, record))
        self._submit(course)

    def leave(self, record: Record) -> None:
        """Its client hangs up."""
        course = self._courses.get(record.job)
        if course is None or course.is_over:
            return
        if course.ticket is not None:
            self.dispatcher.withdraw(course.ticket)
            record.queued_s += self.timeline.now - course.asked_at
        attempt = course.attempt
        if attempt is not None:
            attempt.host.cancel(attempt.work)
            self.settle(attempt, GONE, Usage())
        self.over(course, "left")

    def _call(self, job: Job, record: Record) -> Call:
        principal = self._principals.get(job.who)
        if principal is None:
            principal = Principal(job.who or "anonymous", Role.USER)
            self._principals[job.who] = principal
        embeds = job.model in self._embeds
        key, route = self._keys[job.model], EMBED if embeds else CHAT
        # Sizes are read off a body, as the product reads them, and are no better than there.
        _, body = request(record.job, job, embeds=embeds)
        told = read(route, body)
        is_choice = self.dispatcher.is_choice(key.model)
        links, shared = chain(body, route, key.model) if is_choice else NOTHING
        return Call(
            f"c{record.job}",
            route,
            job.model,
            key,
            streaming=not embeds,
            purpose=Purpose.RUN,
            replayable=True,
            principal=principal,
            arrived_at=record.arrived_at,
            deadline=None,
            body=b"",
            prompt_tokens=told.prompt_tokens,
            embedding=embeds,
            fair_key=job.who,
            batch=job.batch,
            inputs=told.inputs,
            chain=links,
            shared=shared,
        )

    def _submit(self, course: Course) -> None:
        if course.is_over:
            return
        course.asked_at = self.timeline.now
        try:
            ticket = self.dispatcher.submit(
                course.call,
                partial(self._granted, course),
                partial(self._refused, course),
                excluded=course.excluded,
                attempts=course.tried,
                seq=course.seq,
            )
        except BalancerError as error:
            self._give_up(course, error)
            return
        course.seq = ticket.seq
        if ticket.state is TicketState.WAITING:
            course.ticket = ticket

    def _granted(self, course: Course, lease: Lease) -> None:
        """A lease; what is sent now is answered later, never from within."""
        course.ticket = None
        record = course.record
        record.queued_s += self.timeline.now - course.asked_at
        record.backend = lease.backend.name
        record.attempts += 1
        record.predicted_s = self._predicted_s(lease)
        if self._watch is not None:
            self._watch.granted(course, lease)
        attempt = Try(self, course, lease, self.hosts[lease.backend.name])
        lease.on_revoke = attempt.revoke
        course.attempt = attempt
        self.running[attempt] = None
        attempt.host.submit(attempt.work)

    def _predicted_s(self, lease: Lease) -> float | None:
        """From the grant to the first byte, if the scheduler foresees such things."""
        if not isinstance(self.scheduler, Plan):
            return None
        ledger, call = self.scheduler.ledgers.get(lease.backend.name), lease.call
        track = None if ledger is None else ledger.models.get(call.key.model, {}).get(id(call))
        return None if track is None else track.first_token_s

    def _refused(self, course: Course, error: BalancerError) -> None:
        """As soon as the pass that refused it is over."""
        course.ticket = None
        course.record.queued_s += self.timeline.now - course.asked_at
        self.timeline.after(0.0, self._hear, course, error)

    def _hear(self, course: Course, error: BalancerError) -> None:
        if course.is_over:
            return
        if isinstance(error, LoadFailed):
            self._count(course, error.attempt, answered=error.answer is not None, unsent=True)
        else:
            self._give_up(course, error)

    def _give_up(self, course: Course, error: BalancerError) -> None:
        course.record.error = error.text
        self.over(course, "lost" if course.tried else "refused")

    def settle(self, attempt: Try, judgement: Judgement, usage: Usage) -> Outcome:
        """Give the lease back with what came of it."""
        course = attempt.course
        outcome = Outcome(
            judgement.verdict,
            attempt.sent_at,
            self.timeline.now,
            status=200 if attempt.first_at is not None else None,
            first_byte_at=attempt.first_at,
            usage=usage,
            committed=attempt.first_at is not None,
            weight=judgement.weight,
            text=judgement.text,
            crash=judgement.crash,
            blameless=judgement.blameless,
            unreached=judgement.unreached,
            repeated_crash=judgement.crash and repeats_crash(course.tried),
        )
        self.running.pop(attempt, None)
        course.attempt = None
        attempt.lease.on_revoke = None
        attempt.lease.settle(outcome)
        return outcome

    def failed(self, attempt: Try, judgement: Judgement, *, answered: bool) -> None:
        """An attempt came to nothing: after its first byte that is the end of the call."""
        course, lease = attempt.course, attempt.lease
        outcome = self.settle(attempt, judgement, Usage())
        if attempt.first_at is not None:
            course.record.error = judgement.text
            self.over(course, "cut")
            return
        tried = Attempt(lease.number, lease.backend.name, outcome)
        self._count(course, tried, answered=answered, unsent=outcome.unreached)

    def _count(self, course: Course, tried: Attempt, *, answered: bool, unsent: bool) -> None:
        course.tried += (tried,)
        course.answered = course.answered or answered
        if self._again(course, unsent=unsent):
            self._submit(course)
        else:
            course.record.error = tried.outcome.text
            self.over(course, "lost")

    def _again(self, course: Course, *, unsent: bool) -> bool:
        """Whether to try once more, and where not; whoever is the only one may be tried twice."""
        keep_away, last = excluded(course.tried), course.tried[-1]
        waits = last.outcome.unreached and not course.answered
        if waits and not self.dispatcher.is_served_elsewhere(course.call, keep_away):
            keep_away -= {last.backend}
        course.excluded = keep_away
        return again(course.call, course.tried, self.budget, unsent=unsent)

    def over(self, course: Course, status: str) -> None:
        """The call is answered, however."""
        course.is_over = True
        self._courses.pop(course.record.job, None)
        self._over(course.record, status)

    def close(self) -> None:
        """Nothing happens any more: give back what is out."""
        self.pool.changed = lambda: None
        for attempt in self.running:
            attempt.lease.release()

    # -- time ----------------------------------------------------------------------------------

    def _wake_at(self, at: float) -> None:
        self._wanted_at = at
        if at < math.inf and (self._alarm is None or at < self._alarm[0]):
            if self._alarm is not None:
                self.timeline.cancel(self._alarm)
            self._alarm = self.timeline.at(at, self._wake)

    def _wake(self) -> None:
        """An alarm may be early: then it is set anew, and nobody was woken for nothing."""
        self._alarm = None
        if self._wanted_at > self.timeline.now:
            self._wake_at(self._wanted_at)
        else:
            self._wanted_at = math.inf
            self.dispatcher.kick()

    def _tick(self) -> None:
        """Trials and the watchdog."""
        self.prober.look_around()
        self.timeline.after(TICK_S, self._tick)

    def streaming(self) -> None:
        """A stream has begun: from now on its tokens come in time."""
        if not self._is_looking:
            self._is_looking = True
            self.timeline.at((math.floor(self.timeline.now / LOOK_S) + 1) * LOOK_S, self._look)

    def _look(self) -> None:
        """All hosts write what they have, at the same instants."""
        streams = [attempt for attempt in self.running if attempt.first_at is not None]
        for attempt in streams:
            attempt.look()
        self._is_looking = bool(streams)
        if streams:
            self.timeline.after(LOOK_S, self._look)


def _key(model: Model) -> PlacementKey:
    return PlacementKey(names.parse(model.name).canonical)


def _backend(host: Host, *, slots_known: bool, memory_known: bool) -> Backend:
    slots = host.machine.slots if slots_known else None
    memory = round(host.machine.type.memory_gb * 1e9) if memory_known else None
    return Backend(host.name, f"http://{host.name}.invalid:11434", slots, vram_bytes=memory)
