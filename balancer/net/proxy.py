"""
Inference: identify, queue, send, judge, fail over.

Laws:
- The line is *commit*: the first non-error record passed on to the client. Before it a failure is
  answered by another backend; after it never, and never in silence.
- A lease is settled in the frame that got it, whatever happens, cancellation included.
- Leaving is nobody's fault: a client that hangs up costs a backend nothing but the call.

What follows commit is the matter of `relay`; how the client is told, and kept from thinking us
dead, that of `reply`; a first attempt that needs no waiting, that of `direct`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from aiohttp import web

from balancer.core import names
from balancer.core.aliases import Aliases
from balancer.core.body import Body, read, renamed
from balancer.core.chains import NOTHING, Chain, chain
from balancer.core.contexts import Contexts, applied, context_of, written
from balancer.core.dispatch import Answer, Dispatcher, LoadFailed
from balancer.core.domain import Attempt as Tried
from balancer.core.domain import Call, Outcome, PlacementKey, Purpose, Role, Route, Usage, Verdict
from balancer.core.errors import (
    AttemptsExhausted,
    BadRequest,
    BalancerError,
    DeadlineExceeded,
    Draining,
    Forbidden,
    NoBackend,
    Unavailable,
    UnknownModel,
)
from balancer.core.limits import Limits
from balancer.core.memory import Memory
from balancer.core.pool import Lease, discreet
from balancer.core.retry import Budget, again, excluded
from balancer.core.routes import EMBEDDING
from balancer.core.scheduler import Ticket
from balancer.core.sharing import MANY_INPUTS, Share, Sharing, owner_of
from balancer.core.verdicts import Judgement
from balancer.net.attempt import Attempt
from balancer.net.bodies import read_body
from balancer.net.forwarding import Forwarding
from balancer.net.judging import in_dialect, judge, outcome_of
from balancer.net.outlet import Written
from balancer.net.relay import Relay, resolving
from balancer.net.reply import Reply
from balancer.net.server import Exchange
from balancer.net.upstream import Upstream
from balancer.net.visitor import Asked

MAX_DEADLINE_S: Final = 3600.0
_OK: Final = Verdict.OK
_RUN: Final = Purpose.RUN
# Nobody serves the model; another may do instead.
_LOST: Final = (NoBackend, AttemptsExhausted, UnknownModel, Forbidden)
RELAYED: Final = {"content-type": "Content-Type", "cache-control": "Cache-Control"}


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """
    Limits of the proxy: bytes and seconds; None: none.

    Args:
        heartbeat_after_s, heartbeat_s: Of silence before the first heartbeat, and each further one.
        by_prefix: Conversations are known by how they begin, and are told apart for whoever
            chooses a backend.
    """

    max_body: int = 256 * 1024 * 1024
    total_s: float | None = None
    heartbeat_after_s: float | None = 20.0
    heartbeat_s: float | None = 15.0
    aliases: Aliases = field(default_factory=Aliases)
    sharing: Sharing = field(default_factory=Sharing)
    by_prefix: bool = False


class Grant:
    """What comes of a ticket: a lease or a refusal, at once or later."""

    __slots__ = ("_come", "error", "is_abandoned", "lease")

    def __init__(self) -> None:
        self.lease: Lease | None = None
        self.error: BalancerError | None = None
        self.is_abandoned = False
        self._come: asyncio.Future[None] | None = None

    def grant(self, lease: Lease) -> None:
        """A lease; given back if nobody waits for it any more."""
        if self.is_abandoned:
            lease.release()
            return
        self.lease = lease
        self._tell()

    def refuse(self, error: BalancerError) -> None:
        """A refusal."""
        self.error = error
        self._tell()

    def abandon(self) -> None:
        """Nobody waits any more."""
        self.is_abandoned = True
        if self.lease is not None:
            self.lease.release()

    async def wait(self) -> Lease:
        """Wait for the lease. Raises what it was refused with."""
        if self.lease is None and self.error is None:
            self._come = asyncio.get_running_loop().create_future()
            await self._come
        if self.lease is None:
            assert self.error is not None  # noqa: S101 - one of the two has come
            raise self.error
        return self.lease

    def _tell(self) -> None:
        if self._come is not None and not self._come.done():
            self._come.set_result(None)


@dataclass(slots=True)
class Course:
    """
    What a call has been through so far.

    Args:
        others: The same call for the models that may take over, best first.
        earlier: How many of the attempts were with models that have given way.
        waiting: The ticket that it waits with, if it does.
        has_failed: The last attempt came to nothing, and nobody has said yet what follows.
        error: What it is to be refused with.
    """

    call: Call
    others: tuple[Call, ...]
    reply: Reply
    earlier: int = 0
    tried: tuple[Tried, ...] = ()
    excluded: frozenset[str] = frozenset()
    answer: Answer | None = None
    seq: int | None = None
    waiting: tuple[Ticket, Grant] | None = None
    has_failed: bool = False
    error: Exception | None = None
    unsent: bool = False  # of the last attempt, nothing had gone out
    fetched: bool = False  # the model was pulled for this call

    def add(self, tried: Tried, answer: Answer | None, *, unsent: bool = False) -> None:
        """An attempt that came to nothing."""
        self.has_failed = True
        self.tried += (tried,)
        if answer is not None:
            self.answer = answer
        elif tried.outcome.verdict is not Verdict.STALE and self._only_missing():
            # "Not found" here is not the whole truth once another that has the model has failed.
            self.answer = None
        self.unsent = unsent

    @property
    def with_model(self) -> tuple[Tried, ...]:
        """The attempts with the model that is now to serve."""
        return self.tried[self.earlier :]

    def _only_missing(self) -> bool:
        """Whether all answers so far said that the model is not there."""
        answered = [t for t in self.tried if t.outcome.status is not None]
        return all(t.outcome.verdict is Verdict.MISSING for t in answered)


class Proxy:
    """
    The handler of every route that one backend answers.

    Args:
        memory: Of which the bodies take their room.
        unload: Answers a call that unloads a model, which goes to every backend that has it.
        token: Ours in ``Via``.
        stamp: The wall time as Ollama writes it.
        limits: What each key may use.

    Attributes:
        stopping: From now on a backend's connection that ends was ended by us.
        explore: Finds out who has a route that not everybody has, before a model is loaded for it.
        fetch: Begins to pull what a call needs and nobody has; the future tells why it failed,
            empty if it did not. None: it may not be.
        forwarded: The headers of a request that go up.
        contexts: The operator's rules about contexts and keep_alive; None: there are none.
    """

    def __init__(
        self,
        settings: ProxySettings,
        memory: Memory,
        dispatcher: Dispatcher,
        upstream: Upstream,
        budget: Budget,
        clock: Callable[[], float],
        unload: Callable[[Exchange, Call], object],
        token: str,
        stamp: Callable[[], str],
        limits: Limits | None = None,
    ) -> None:
        self.settings = settings
        self.memory = memory
        self.limits = limits or Limits(clock)
        self.dispatcher = dispatcher
        self.upstream = upstream
        self.budget = budget
        self.clock = clock
        self._unload = unload
        self._stamp = stamp
        self.stopping = False
        self.forwarded = Forwarding(token)
        self.contexts: Contexts | None = None
        self.explore: Callable[[Call], Awaitable[None]] = _nothing
        self.fetch: Callable[[Exchange, Call], asyncio.Future[str] | None] = lambda *_: None

    async def handle(self, exchange: Exchange) -> web.StreamResponse:
        """Answer one inference call."""
        if self.dispatcher.admission.is_full():  # tell it before the body is read
            share = self._share(exchange)
            self.dispatcher.check_room(share.key_for(share.session))
        exchange.hold = self.memory.hold(owner=owner_of(exchange.principal, exchange.client))
        most = self.settings.max_body
        return await self.answer(
            exchange, await read_body(exchange, most, self.clock, exchange.hold)
        )

    async def answer(self, exchange: Exchange, body: bytes | bytearray) -> web.StreamResponse:
        """The same, the body having been read."""
        call = self.identify(exchange, body)
        del body  # the call alone has it, and lets it go at commit
        call, *others = self._meant(exchange, call)
        if call.route.optional:
            await self.explore(call)
        if call.purpose is Purpose.UNLOAD:
            if exchange.principal.role is not Role.ADMIN:
                raise Forbidden("Unloading a model needs a key with the role admin.")
            return await self._unload(exchange, call)  # type: ignore[no-any-return, misc]
        exchange.charge = self.limits.charge(call)
        self.budget.note_call()
        course = self.course(exchange, call, others)
        del call, others
        return await self.go_on(exchange, course)

    def course(self, exchange: Exchange, call: Call, others: Sequence[Call] = ()) -> Course:
        """The beginning of a call's way."""
        settings = self.settings
        reply = exchange.reply = Reply(
            exchange,
            call,
            self.clock,
            self._stamp,
            after_s=settings.heartbeat_after_s,
            every_s=settings.heartbeat_s,
        )
        return Course(call, tuple(others), reply)

    async def go_on(self, exchange: Exchange, course: Course) -> web.StreamResponse:
        """Serve a call from wherever it has got to."""
        try:
            try:
                async with asyncio.timeout_at(course.call.deadline) as limit:
                    await self._serve(exchange, course, limit)
            except TimeoutError:
                raise DeadlineExceeded("The call's time limit has passed.") from None
        except BalancerError as error:
            if not course.reply.begun:
                raise
            course.reply.refuse(error)
        await exchange.outlet.taken()
        return Written(exchange.status, exchange.outlet)

    # -- identify ------------------------------------------------------------------------------

    def identify(self, exchange: Exchange, body: bytes | bytearray) -> Call:
        """
        What a request asks for.

        Raises:
            BalancerError: It asks for nothing, or for what its caller may not have.
        """
        route = exchange.route
        if route is None:
            raise BadRequest("no route")
        query = exchange.request.raw_path.partition("?")[2]
        visitor = exchange.visitor
        asked = None if visitor is None else visitor.asked
        if asked is None or asked.rules is not self.settings.sharing:
            kind = exchange.request.headers.get("Content-Type", "")
            upward, limit_s = self.forwarded.kept(exchange), _wanted_s(exchange)
            asked = Asked(upward, kind, limit_s, self._share(exchange), self.settings.sharing)
            if visitor is not None:
                visitor.asked = asked
        share = asked.share
        told: Body = read(route, body, asked.content_type, query, share.before)
        session = share.session_for(told.session)
        exchange.streaming = told.streaming
        exchange.use(told.model, told.key.model)
        links, shared = self._chain(route, told, body)
        total_s, arrived_at = asked.limit_s, exchange.started_at
        if self.settings.total_s is not None:
            total_s = min(self.settings.total_s, total_s or math.inf)
        return Call(
            exchange.id,
            route,
            told.model,
            told.key,
            told.streaming,
            told.purpose,
            route.replayable and not told.name.cloud and not self.memory.is_over,
            exchange.principal,
            arrived_at,
            None if total_s is None else arrived_at + total_s,
            body,
            asked.upward,
            query,
            told.keep_alive,
            told.prompt_tokens,
            told.output_tokens,
            route.operation in EMBEDDING,
            fair_key=share.key_for(session),
            batch=share.batch or told.inputs > MANY_INPUTS,
            inputs=told.inputs,
            chain=links,
            shared=shared,
            session=session,
            owner=share.owner,
        )

    def _chain(self, route: Route, told: Body, body: bytes | bytearray) -> tuple[Chain, int]:
        """How the prompt begins, where that may say which backend answers it soonest."""
        if not self.settings.by_prefix or told.purpose is not _RUN:
            return NOTHING
        model = told.key.model  # an alias, too: whoever says it once says it again
        if not self.dispatcher.is_choice(model) and self.settings.aliases.find(model) is None:
            return NOTHING
        return chain(body, route, model)

    def _share(self, exchange: Exchange) -> Share:
        """Whose share of the pool the calls behind a head use up."""
        header = exchange.request.headers.get
        sharing, principal = self.settings.sharing, exchange.principal
        return sharing.share(principal, exchange.client, exchange.user, header)

    def _meant(self, exchange: Exchange, call: Call) -> list[Call]:
        """The call; for an alias one for each of its models, from the one that is to serve on."""
        alias = self.settings.aliases.find(call.key.model)
        if alias is None:
            return [self.placed(exchange, call)]
        exchange.alias = call.model
        calls = [_for_model(call, model) for model in alias.models]
        first, *others = calls[self.dispatcher.choose(calls) :]
        return [self._named(exchange, first), *others]

    def _named(self, exchange: Exchange, call: Call) -> Call:
        """A call for an alias, its body naming the model that is to serve."""
        kind = exchange.request.headers.get("Content-Type", "")
        exchange.model = call.model
        body = renamed(call.route, call.body, kind, call.model)
        return self.placed(exchange, replace(call, body=body))

    def placed(self, exchange: Exchange, call: Call) -> Call:
        """The call as the operator's rules about contexts and keep_alive have it."""
        if self.contexts is None or not self.contexts.rules.any:
            return call
        placed = self.contexts.place(call)
        exchange.num_ctx = placed.num_ctx
        exchange.num_ctx_asked = None if placed.num_ctx is None else placed.asked
        return applied(call, placed)

    # -- the attempt loop ----------------------------------------------------------------------

    async def _serve(self, exchange: Exchange, course: Course, limit: asyncio.Timeout) -> None:
        if course.error is not None:
            raise course.error
        while True:
            if course.has_failed:
                course.has_failed = False
                if not self._goes_on(exchange, course):
                    self._give_up(exchange, course)
                    return
            if self.stopping and course.waiting is None:  # else a lease may have come already
                raise _draining()
            try:
                lease = await self._acquire(exchange, course)
            except LoadFailed as failed:
                answer = in_dialect(failed.answer, exchange.dialect)
                course.add(failed.attempt, answer, unsent=True)
                exchange.attempts = len(course.tried)
                exchange.backend = failed.attempt.backend
                continue
            except BalancerError as error:
                if isinstance(error, _LOST) and self._falls(exchange, course):
                    continue
                if isinstance(error, UnknownModel) and await self._fetched(exchange, course):
                    continue
                if isinstance(error, Unavailable) and course.answer is not None:
                    self._give_up(exchange, course)
                    return
                self._tell_alias(exchange, error)
                raise
            if await self._attempt(exchange, course, lease, limit):
                return

    def _tell_alias(self, exchange: Exchange, error: BalancerError) -> None:
        """Whoever asked for an alias is told of all its models, none of which is there."""
        if exchange.alias and isinstance(error, UnknownModel):
            alias = self.settings.aliases.find(names.parse(exchange.alias).canonical)
            if alias is not None:  # it was not taken away meanwhile
                raise UnknownModel(alias.absent(error.text)) from error

    async def _fetched(self, exchange: Exchange, course: Course) -> bool:
        """
        Whether the model that nobody had is there now, pulled because the settings say so.

        Raises:
            UnknownModel: It was tried in vain.
            Draining: We stop.
        """
        fetching = None if course.fetched else self.fetch(exchange, course.call)
        if fetching is None:
            return False
        course.fetched = True
        try:
            await asyncio.wait((fetching,))
            failure = fetching.result()
        except asyncio.CancelledError:
            if fetching.cancelled():  # by us; who leaves or is late cancels only the waiting
                raise _draining() from None
            raise
        finally:
            fetching.cancel()
        if failure:
            told = f"model '{course.call.model}' not found, and it could not be pulled: {failure}"
            raise UnknownModel(told)
        return True

    def submit(self, course: Course) -> Grant:
        """
        Ask for a lease; it may come before this returns.

        Raises:
            BalancerError: The call cannot even wait.
        """
        grant = Grant()
        ticket = self.dispatcher.submit(
            course.call,
            grant.grant,
            grant.refuse,
            excluded=course.excluded,
            attempts=course.tried,
            seq=course.seq,
        )
        course.seq = ticket.seq
        course.waiting = (ticket, grant)
        return grant

    def withdraw(self, exchange: Exchange, course: Course) -> None:
        """The client has left while the call waited, if it did; a lease goes back."""
        if course.waiting is not None:
            exchange.phase = "queued"
            ticket, grant = course.waiting
            course.waiting = None
            self.dispatcher.withdraw(ticket)
            grant.abandon()

    async def _acquire(self, exchange: Exchange, course: Course) -> Lease:
        """Wait for a lease; a grant that comes as the client leaves is given back."""
        began = self.clock()
        try:
            grant = self.submit(course) if course.waiting is None else course.waiting[1]
            lease = await grant.wait()
        except asyncio.CancelledError:
            self.withdraw(exchange, course)
            raise
        finally:
            exchange.queue_s += self.clock() - began
            course.waiting = None
        return lease

    async def _attempt(
        self, exchange: Exchange, course: Course, lease: Lease, limit: asyncio.Timeout
    ) -> bool:
        """One try. False: it failed before commit, and `course` tells how."""
        attempt = self.begin(exchange, course, lease)
        try:
            self.send(exchange, course, lease, attempt)
            await attempt.first()
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            relay = self.decided(exchange, course, lease, attempt, resolving(ended))
            if relay is not None:
                await _followed(relay, ended, limit)
        except BaseException:
            self.gone(course, lease, attempt)
            raise
        return not course.has_failed

    def begin(self, exchange: Exchange, course: Course, lease: Lease) -> Attempt:
        """A lease's attempt; nothing has been sent."""
        exchange.backend, exchange.why = lease.backend.name, lease.why
        exchange.attempts = lease.number
        exchange.run = lease.run
        exchange.phase = "before_first_token"
        return Attempt(course.call, lease, self.clock)

    def send(self, exchange: Exchange, course: Course, lease: Lease, attempt: Attempt) -> None:
        """Send what *begin* began; should it raise, by a bug of ours, the lease is still held."""
        call, origin = course.call, course.call.origin
        if origin is not None:
            exchange.num_ctx = written(call)
            exchange.num_ctx_asked = None if exchange.num_ctx is None else context_of(origin.sent)
            if exchange.hold is not None and call.body is not origin.body:
                exchange.hold.settle(len(origin.body) + len(call.body))
        attempt.handle = self.upstream.open(lease, call, attempt)

    def decided(
        self,
        exchange: Exchange,
        course: Course,
        lease: Lease,
        attempt: Attempt,
        on_over: Callable[[], None],
    ) -> Relay | None:
        """
        Act on an attempt that can be judged.

        The relay of an answer that has begun, which ends with *on_over*. None: the attempt is
        over, its lease settled; either it was answered, or `course` has a failure more.
        """
        if attempt.head_at is not None:
            exchange.upstream_s = attempt.head_at - attempt.sent_at
        if attempt.begun:
            course.reply.check(attempt.framing)
            exchange.phase = "streaming"
            exchange.first_byte_s = self.clock() - exchange.started_at
            outcome = partial(self._outcome, course, attempt)
            relay = Relay(
                exchange, course.reply, lease, attempt, outcome, lambda: self.stopping, on_over
            )
            self._commit(exchange, course)
            relay.start(self._headers(exchange, attempt.headers))
            return relay
        judgement, answer, usage = judge(
            course.call, attempt, remote=lease.remote, stopping=self.stopping
        )
        outcome_ = self._outcome(course, attempt, judgement, usage)
        lease.settle(outcome_)
        attempt.abort()
        if judgement.verdict is _OK and answer is not None:
            exchange.usage = usage
            exchange.first_byte_s = self.clock() - exchange.started_at
            self._whole(exchange, course, answer)
        else:
            tried = Tried(lease.number, lease.backend.name, outcome_)
            course.add(tried, answer, unsent=outcome_.unreached)
        return None

    @staticmethod
    def _commit(exchange: Exchange, course: Course) -> None:
        """From now on nothing is sent again."""
        course.call.let_go()
        course.others = ()
        if exchange.hold is not None:
            exchange.hold.give_back()

    def gone(self, course: Course, lease: Lease, attempt: Attempt) -> None:
        """The client left, a deadline passed, or we have a bug: nobody is to blame."""
        attempt.abort()
        lease.settle(self._outcome(course, attempt, Judgement(Verdict.GONE), Usage()))

    def _outcome(
        self, course: Course, attempt: Attempt, judgement: Judgement, usage: Usage
    ) -> Outcome:
        return outcome_of(course.call, attempt, course.tried, judgement, usage, self.clock())

    def _goes_on(self, exchange: Exchange, course: Course) -> bool:
        """Whether to try once more: with the same model as long as anybody can serve it."""
        if course.others:
            tried = excluded(course.with_model)
            if not self.dispatcher.is_served_elsewhere(course.call, tried):
                return self._falls(exchange, course) or self._again(course)
        return self._again(course) or self._falls(exchange, course)

    def _falls(self, exchange: Exchange, course: Course) -> bool:
        """Whether the next model of an alias takes over: one that can be served now."""
        served = self.dispatcher.is_served_elsewhere
        at = next((at for at, c in enumerate(course.others) if served(c, frozenset())), None)
        count = len(course.tried)
        if at is None or (count > course.earlier and not self._may_repeat(course, count)):
            return False
        course.call = self._named(exchange, course.others[at])
        course.others = course.others[at + 1 :]
        course.earlier, course.excluded = count, frozenset()
        return True

    def _may_repeat(self, course: Course, earlier: int) -> bool:
        return again(course.call, course.tried, self.budget, unsent=course.unsent, earlier=earlier)

    def _again(self, course: Course) -> bool:
        """
        Whether to try once more, and where not.

        A backend that could not even be connected to stays a choice if it is the only one: then
        the call waits for its breaker's trial, and outlasts a restart of a single host. An answer
        that could be relayed is not kept waiting for that.
        """
        keep_away = excluded(course.with_model)
        waits = course.tried[-1].outcome.unreached and course.answer is None
        if waits and not self.dispatcher.is_served_elsewhere(course.call, keep_away):
            keep_away -= {course.tried[-1].backend}
        course.excluded = keep_away
        last = course.tried[-1].outcome
        unclear = last.verdict is Verdict.UNCLEAR and not last.caused_load
        if unclear and not self.dispatcher.is_warm_elsewhere(course.call, keep_away):
            return False  # worth a second opinion, not a load, which may evict what others use
        return self._may_repeat(course, course.earlier)

    # -- answers -------------------------------------------------------------------------------

    def _headers(self, exchange: Exchange, upstream: Sequence[tuple[str, str]]) -> dict[str, str]:
        headers = exchange.headers()
        for name, value in upstream:
            known = RELAYED.get(name.lower())
            if known is not None:
                headers.setdefault(known, value)
        headers["X-Balancer-Backend"] = exchange.backend
        headers["X-Balancer-Attempts"] = str(exchange.attempts)
        headers["X-Balancer-Route"] = exchange.why or "failover"
        headers["X-Balancer-Queue-Ms"] = str(round(exchange.queue_s * 1000))
        return headers

    def _whole(self, exchange: Exchange, course: Course, answer: Answer) -> None:
        """An answer that was collected whole."""
        headers = self._headers(exchange, (("Content-Type", answer.content_type),))
        course.reply.answer(answer, headers)

    def _give_up(self, exchange: Exchange, course: Course) -> None:
        """Relay the last answer of a backend; where there was none, 503 and what was tried."""
        last = course.tried[-1].outcome
        if last.verdict is Verdict.STOPPED:
            raise _draining()
        exchange.outcome = "upstream_error" if last.verdict is not Verdict.CALLER else "rejected"
        exchange.error = last.text
        if course.answer is not None:
            self._whole(exchange, course, course.answer)
            return
        tried = "; ".join(f"{each.backend}: {discreet(each.outcome.text)}" for each in course.tried)
        raise AttemptsExhausted(
            f"{course.call.model!r} could not be served: {tried}", retry_after_s=5.0
        )


async def _followed(relay: Relay, ended: asyncio.Future[None], limit: asyncio.Timeout) -> None:
    """Wait for a relay's end; the call's time limit ends it from here."""
    try:
        await ended
    except asyncio.CancelledError:
        if not limit.expired():
            relay.lost()
            raise
        relay.stop()


async def _nothing(_: Call) -> None:
    """Whoever builds the whole puts something better in its place."""


def _for_model(call: Call, model: str) -> Call:
    """The same call for another model; its body still has the first one's name."""
    name = names.parse(model)
    options = () if name.cloud else call.key.options
    return replace(
        call,
        model=model,
        key=PlacementKey(name.canonical, options),
        replayable=call.replayable and not name.cloud,
    )


def _draining() -> Draining:
    return Draining("The balancer is stopping.", retry_after_s=5.0)


def _wanted_s(exchange: Exchange) -> float | None:
    """The client's own time limit, seconds; at most an hour. Nonsense is ignored."""
    headers = exchange.request.headers
    text = headers.get("X-Request-Timeout") or headers.get("Request-Timeout")
    try:
        wanted = float(text) if text else 0.0
    except ValueError:
        return None
    return min(wanted, MAX_DEADLINE_S) if wanted > 0 else None
