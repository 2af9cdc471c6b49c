"""
Inference: identify, queue, send, judge, fail over.

Laws:
- The line is *commit*: the first non-error record passed on to the client. Before it a failure is
  answered by another backend; after it never, and never in silence.
- A lease is settled in the frame that got it, whatever happens, cancellation included.
- Leaving is nobody's fault: a client that hangs up costs a backend nothing but the call.

What follows commit is the matter of `relay`; how the client is told, and kept from thinking us
dead, that of `reply`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from aiohttp import web

from balancer.core import names, verdicts
from balancer.core.aliases import Aliases
from balancer.core.body import Body, read, renamed
from balancer.core.dialect import relayed
from balancer.core.dispatch import Answer, Dispatcher, LoadFailed
from balancer.core.domain import (
    OTHER,
    Call,
    Dialect,
    Outcome,
    PlacementKey,
    Purpose,
    Role,
    Route,
    Usage,
    Verdict,
)
from balancer.core.domain import (
    Attempt as Tried,
)
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
from balancer.core.framing import json_terminal
from balancer.core.pool import Lease, discreet
from balancer.core.retry import Budget, again, excluded, repeats_crash
from balancer.core.routes import EMBEDDING, FREE_FORM
from balancer.core.verdicts import Judgement
from balancer.net.attempt import Attempt
from balancer.net.relay import STOPPING, Relay
from balancer.net.reply import Reply
from balancer.net.server import Exchange, read_body
from balancer.net.upstream import Upstream

MAX_DEADLINE_S: Final = 3600.0
# Nobody serves the model; another may do instead.
_LOST: Final = (NoBackend, AttemptsExhausted, UnknownModel, Forbidden)
RELAYED: Final = frozenset({"content-type", "cache-control"})
# Hop-by-hop, ours to set, or credentials: none of these goes up.
WITHHELD: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
        "content-encoding",
        "expect",
        "host",
        "origin",
        "access-control-request-method",
        "access-control-request-headers",
        "cookie",
        "authorization",
        "x-api-key",
        "api-key",
        "x-goog-api-key",
        "x-auth-token",
        # The address as it was asked for may hold a key in its path.
        "referer",
        "x-original-uri",
        "x-original-url",
        "x-rewrite-url",
        "x-envoy-original-path",
        "forwarded",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-proto",
        "x-forwarded-prefix",
        "x-real-ip",
        "accept-encoding",
        "via",
        "x-request-id",
        "x-request-timeout",
        "request-timeout",
    }
)


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """
    Limits of the proxy: bytes and seconds; None: none.

    Args:
        heartbeat_after_s, heartbeat_s: Of silence before the first heartbeat, and each further one.
    """

    max_body: int = 256 * 1024 * 1024
    replay_memory: int = 512 * 1024 * 1024
    total_s: float | None = None
    heartbeat_after_s: float | None = 20.0
    heartbeat_s: float | None = 15.0
    aliases: Aliases = field(default_factory=Aliases)


@dataclass(slots=True)
class _Course:
    """
    What a call has been through so far.

    Args:
        others: The same call for the models that may take over, best first.
        earlier: How many of the attempts were with models that have given way.
    """

    call: Call
    others: tuple[Call, ...]
    reply: Reply
    limit: asyncio.Timeout
    earlier: int = 0
    tried: tuple[Tried, ...] = ()
    excluded: frozenset[str] = frozenset()
    answer: Answer | None = None
    seq: int | None = None
    unsent: bool = False  # of the last attempt, nothing had gone out
    fetched: bool = False  # the model was pulled for this call

    def add(self, tried: Tried, answer: Answer | None, *, unsent: bool = False) -> None:
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
        unload: Answers a call that unloads a model, which goes to every backend that has it.
        token: Ours in ``Via``.
        stamp: The wall time as Ollama writes it.

    Attributes:
        stopping: From now on a backend's connection that ends was ended by us.
        explore: Finds out who has a route that not everybody has, before a model is loaded for it.
        fetch: Begins to pull what a call needs and nobody has; the future tells why it failed,
            empty if it did not. None: it may not be.
    """

    def __init__(
        self,
        settings: ProxySettings,
        dispatcher: Dispatcher,
        upstream: Upstream,
        budget: Budget,
        clock: Callable[[], float],
        unload: Callable[[Exchange, Call], object],
        token: str,
        stamp: Callable[[], str],
    ) -> None:
        self.settings = settings
        self._dispatcher = dispatcher
        self._upstream = upstream
        self._budget = budget
        self._clock = clock
        self._unload = unload
        self._token = token
        self._stamp = stamp
        self._replay_bytes = 0
        self.stopping = False
        self.explore: Callable[[Call], Awaitable[None]] = _nothing
        self.fetch: Callable[[Exchange, Call], asyncio.Future[str] | None] = lambda *_: None

    async def handle(self, exchange: Exchange) -> web.StreamResponse:
        """Answer one inference call."""
        if self._dispatcher.admission.is_full():
            self._dispatcher.admission.check("")  # before the body is read
        body = await read_body(exchange, self.settings.max_body, self._clock)
        call = self._identify(exchange, body)
        exchange.streaming = call.streaming
        exchange.use(call.model, call.key.model)
        call, *others = self._meant(exchange, call)
        if call.route.optional:
            await self.explore(call)
        if call.purpose is Purpose.UNLOAD:
            if exchange.principal.role is not Role.ADMIN:
                raise Forbidden("Unloading a model needs a key with the role admin.")
            return await self._unload(exchange, call)  # type: ignore[no-any-return, misc]
        reply = self._reply(exchange, call)
        self._replay_bytes += len(body)
        try:
            return await self._in_time(exchange, call, others, reply)
        except BalancerError as error:
            if not reply.begun:
                raise
            return await reply.refuse(error)
        finally:
            reply.close()
            self._replay_bytes -= len(body)

    def _reply(self, exchange: Exchange, call: Call) -> Reply:
        return Reply(
            exchange,
            call,
            self._clock,
            self._stamp,
            after_s=self.settings.heartbeat_after_s,
            every_s=self.settings.heartbeat_s,
        )

    async def _in_time(
        self, exchange: Exchange, call: Call, others: Sequence[Call], reply: Reply
    ) -> web.StreamResponse:
        try:
            async with asyncio.timeout_at(call.deadline) as limit:
                return await self._serve(exchange, _Course(call, tuple(others), reply, limit))
        except TimeoutError:
            raise DeadlineExceeded("The call's time limit has passed.") from None

    # -- identify ------------------------------------------------------------------------------

    def _identify(self, exchange: Exchange, body: bytes) -> Call:
        route = exchange.route
        if route is None:
            raise BadRequest("no route")
        query = exchange.request.raw_path.partition("?")[2]
        told: Body = read(route, body, exchange.request.headers.get("Content-Type", ""), query)
        limits = [s for s in (self.settings.total_s, _wanted_s(exchange)) if s is not None]
        deadline = exchange.started_at + min(limits) if limits else None
        return Call(
            id=exchange.id,
            route=route,
            model=told.model,
            key=told.key,
            streaming=told.streaming,
            purpose=told.purpose,
            replayable=route.replayable
            and not told.name.cloud
            and self._replay_bytes + len(body) <= self.settings.replay_memory,
            principal=exchange.principal,
            arrived_at=exchange.started_at,
            deadline=deadline,
            body=body,
            headers=self.forwarded(exchange),
            query=query,
            keep_alive=told.keep_alive,
            prompt_tokens=told.prompt_tokens,
            output_tokens=told.output_tokens,
            embedding=route.operation in EMBEDDING,
        )

    def _meant(self, exchange: Exchange, call: Call) -> list[Call]:
        """The call; for an alias one for each of its models, from the one that is to serve on."""
        alias = self.settings.aliases.find(call.key.model)
        if alias is None:
            return [call]
        exchange.alias = call.model
        calls = [_for_model(call, model) for model in alias.models]
        first, *others = calls[self._dispatcher.choose(calls) :]
        return [self._named(exchange, first), *others]

    @staticmethod
    def _named(exchange: Exchange, call: Call) -> Call:
        """A call for an alias, its body naming the model that is to serve."""
        kind = exchange.request.headers.get("Content-Type", "")
        exchange.model = call.model
        return replace(call, body=renamed(call.route, call.body, kind, call.model))

    def forwarded(self, exchange: Exchange) -> tuple[tuple[str, str], ...]:
        """The client's headers that go up, and ours."""
        headers = exchange.request.headers
        lines = ",".join(headers.getall("Connection", []))
        named = {name.strip().lower() for name in lines.split(",")}
        kept = [
            (name, value)
            for name, value in headers.items()
            if not _is_withheld(name.lower()) and name.lower() not in named
        ]
        kept += [
            ("Accept-Encoding", "identity"),
            ("X-Forwarded-For", exchange.client),
            # Behind the others: two balancers in a circle must each see that they were there.
            ("Via", ", ".join([*headers.getall("Via", []), f"1.1 {self._token}"])),
            ("X-Request-Id", exchange.id),
        ]
        return tuple(kept)

    # -- the attempt loop ----------------------------------------------------------------------

    async def _serve(self, exchange: Exchange, course: _Course) -> web.StreamResponse:
        self._budget.note_call()
        while True:
            if self.stopping:
                raise _draining()
            try:
                lease = await self._acquire(exchange, course)
            except LoadFailed as failed:
                answer = _in_dialect(failed.answer, exchange.dialect)
                course.add(failed.attempt, answer, unsent=True)
                exchange.attempts = len(course.tried)
                exchange.backend = failed.attempt.backend
                if not self._goes_on(exchange, course):
                    return await self._give_up(exchange, course)
                continue
            except BalancerError as error:
                if isinstance(error, _LOST) and self._falls(exchange, course):
                    continue
                if isinstance(error, UnknownModel) and await self._fetched(exchange, course):
                    continue
                if isinstance(error, Unavailable) and course.answer is not None:
                    return await self._give_up(exchange, course)
                raise
            response = await self._attempt(exchange, course, lease)
            if response is not None:
                return response
            if not self._goes_on(exchange, course):
                return await self._give_up(exchange, course)

    async def _fetched(self, exchange: Exchange, course: _Course) -> bool:
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
            failure = await course.reply.until(fetching)
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

    async def _acquire(self, exchange: Exchange, course: _Course) -> Lease:
        """Wait for a lease; a grant that comes as the client leaves is given back."""
        granted: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        began = self._clock()

        def grant(lease: Lease) -> None:
            if granted.done():
                lease.release()
            else:
                granted.set_result(lease)

        def refuse(error: BalancerError) -> None:
            if not granted.done():
                granted.set_exception(error)

        ticket = self._dispatcher.submit(
            course.call,
            grant,
            refuse,
            excluded=course.excluded,
            attempts=course.tried,
            seq=course.seq,
        )
        course.seq = ticket.seq
        try:
            return await course.reply.until(granted)
        except (asyncio.CancelledError, ConnectionError):  # the client has left, or stopped reading
            exchange.phase = "queued"
            self._dispatcher.withdraw(ticket)
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                granted.result().release()
            raise
        finally:
            exchange.queue_s += self._clock() - began

    async def _attempt(
        self, exchange: Exchange, course: _Course, lease: Lease
    ) -> web.StreamResponse | None:
        """One try; None: it failed before commit, and `course` tells how."""
        call = course.call
        exchange.backend, exchange.why = lease.backend.name, lease.why
        exchange.attempts = lease.number
        attempt = Attempt(call, lease, self._clock)
        try:
            attempt.handle = self._upstream.open(lease, call, attempt)
            exchange.phase = "before_first_token"
            await course.reply.until(attempt.first())
            if attempt.head_at is not None:
                exchange.upstream_s = attempt.head_at - attempt.sent_at
            if attempt.begun:
                course.reply.check(attempt.framing)
                exchange.phase = "streaming"
                exchange.first_byte_s = self._clock() - exchange.started_at
                relay = self._relay(exchange, course, lease, attempt)
                return await relay.run(self._headers(exchange, attempt.headers))
            judgement, answer, usage = self._judge(call, attempt, remote=lease.remote)
            outcome = self._outcome(course, attempt, judgement, usage)
            lease.settle(outcome)
            attempt.handle.abort()
            if judgement.verdict is Verdict.OK and answer is not None:
                exchange.usage = usage
                exchange.first_byte_s = self._clock() - exchange.started_at
                return await self._whole(exchange, course, answer)
            tried = Tried(lease.number, lease.backend.name, outcome)
            course.add(tried, answer, unsent=outcome.unreached)
            return None
        except BaseException:
            # The client left, a deadline passed, or we have a bug: nobody is to blame.
            if attempt.handle is not None:
                attempt.handle.abort()
            lease.settle(self._outcome(course, attempt, Judgement(Verdict.GONE), Usage()))
            raise

    def _relay(self, exchange: Exchange, course: _Course, lease: Lease, attempt: Attempt) -> Relay:
        return Relay(
            exchange,
            course.reply,
            lease,
            attempt,
            course.limit,
            partial(self._outcome, course, attempt),
            lambda: self.stopping,
        )

    def _goes_on(self, exchange: Exchange, course: _Course) -> bool:
        """Whether to try once more: with the same model as long as anybody can serve it."""
        if course.others:
            tried = excluded(course.with_model)
            if not self._dispatcher.is_served_elsewhere(course.call, tried):
                return self._falls(exchange, course) or self._again(course)
        return self._again(course) or self._falls(exchange, course)

    def _falls(self, exchange: Exchange, course: _Course) -> bool:
        """Whether the next model of an alias takes over: one that can be served now."""
        served = self._dispatcher.is_served_elsewhere
        at = next((at for at, c in enumerate(course.others) if served(c, frozenset())), None)
        count = len(course.tried)
        if at is None or (count > course.earlier and not self._may_repeat(course, count)):
            return False
        course.call = self._named(exchange, course.others[at])
        course.others = course.others[at + 1 :]
        course.earlier, course.excluded = count, frozenset()
        return True

    def _may_repeat(self, course: _Course, earlier: int) -> bool:
        return again(course.call, course.tried, self._budget, unsent=course.unsent, earlier=earlier)

    def _again(self, course: _Course) -> bool:
        """
        Whether to try once more, and where not.

        A backend that could not even be connected to stays a choice if it is the only one: then
        the call waits for its breaker's trial, and outlasts a restart of a single host. An answer
        that could be relayed is not kept waiting for that.
        """
        keep_away = excluded(course.with_model)
        waits = course.tried[-1].outcome.unreached and course.answer is None
        if waits and not self._dispatcher.is_served_elsewhere(course.call, keep_away):
            keep_away -= {course.tried[-1].backend}
        course.excluded = keep_away
        last = course.tried[-1].outcome
        unclear = last.verdict is Verdict.UNCLEAR and not last.caused_load
        if unclear and not self._dispatcher.is_warm_elsewhere(course.call, keep_away):
            return False  # worth a second opinion, not a load, which may evict what others use
        return self._may_repeat(course, course.earlier)

    def _judge(
        self, call: Call, attempt: Attempt, *, remote: bool
    ) -> tuple[Judgement, Answer | None, Usage]:
        """Judge an attempt that has not begun a stream."""
        if attempt.revoked is not None:
            return attempt.revoked, None, Usage()
        if attempt.failure is not None and (attempt.status in (0, 200)):
            if self.stopping:
                return STOPPING, None, Usage()
            received = attempt.received
            judged = verdicts.of_failure(attempt.failure, committed=False, received=received)
            return judged, None, Usage()
        if attempt.status != 200 and not attempt.complete:
            text = f"HTTP {attempt.status} with an endless error"
            return Judgement(Verdict.UNCLEAR, text=text), None, Usage()
        body = attempt.take()
        answer = Answer(attempt.status, attempt.content_type, body)
        if attempt.status != 200:
            judged = verdicts.of_answer(call.route, attempt.status, body, remote=remote)
            if judged.verdict is Verdict.FAULT:
                return judged, None, Usage()
            return judged, answer, Usage()
        is_json = "json" in attempt.content_type
        if call.route.operation in FREE_FORM and not (body and is_json):
            return _judge_freely(call.route, answer)
        if attempt.opened is not None:
            return self._judge_opened(attempt, answer, remote=remote)
        ending = json_terminal(call.route, body)
        if not body or not ending.whole:
            return Judgement(Verdict.FAULT, text="sent an answer that is not whole"), None, Usage()
        return Judgement(Verdict.OK), answer, ending.usage

    @staticmethod
    def _judge_opened(
        attempt: Attempt, answer: Answer, *, remote: bool
    ) -> tuple[Judgement, Answer | None, Usage]:
        opened = attempt.opened
        if opened is not None and opened.kind == "error":
            return verdicts.of_record(opened.error_text, remote=remote), answer, Usage()
        if opened is not None and opened.blank_model:
            text = "lost its runner before the first token"
            return Judgement(Verdict.UNFIT, 1, crash=True, text=text), None, Usage()
        return Judgement(Verdict.FAULT, text="ended its answer without a record"), None, Usage()

    def _outcome(
        self, course: _Course, attempt: Attempt, judgement: Judgement, usage: Usage
    ) -> Outcome:
        now = self._clock()
        return Outcome(
            verdict=judgement.verdict,
            sent_at=attempt.sent_at,
            ended_at=now,
            status=attempt.status or None,
            first_byte_at=attempt.first_byte_at,
            body_bytes=attempt.received,
            usage=usage,
            weight=judgement.weight,
            text=judgement.text,
            crash=judgement.crash,
            blameless=judgement.blameless,
            odd_name=names.parse(course.call.model).local,
            unreached=judgement.unreached,
            repeated_crash=judgement.crash and repeats_crash(course.tried),
            retry_after_s=_retry_after(attempt.headers) if attempt.status in (429, 503) else None,
        )

    # -- answers -------------------------------------------------------------------------------

    def _headers(self, exchange: Exchange, upstream: Sequence[tuple[str, str]]) -> dict[str, str]:
        headers = {name: value for name, value in upstream if name.lower() in RELAYED}
        headers |= exchange.headers()
        headers["X-Balancer-Backend"] = exchange.backend
        headers["X-Balancer-Attempts"] = str(exchange.attempts)
        headers["X-Balancer-Route"] = exchange.why or "failover"
        headers["X-Balancer-Queue-Ms"] = str(round(exchange.queue_s * 1000))
        return headers

    async def _whole(
        self, exchange: Exchange, course: _Course, answer: Answer
    ) -> web.StreamResponse:
        """An answer that was collected whole."""
        headers = self._headers(exchange, (("Content-Type", answer.content_type),))
        return await course.reply.answer(answer, headers)

    async def _give_up(self, exchange: Exchange, course: _Course) -> web.StreamResponse:
        """Relay the last answer of a backend; where there was none, 503 and what was tried."""
        last = course.tried[-1].outcome
        if last.verdict is Verdict.STOPPED:
            raise _draining()
        exchange.outcome = "upstream_error" if last.verdict is not Verdict.CALLER else "rejected"
        exchange.error = last.text
        if course.answer is not None:
            return await self._whole(exchange, course, course.answer)
        tried = "; ".join(f"{each.backend}: {discreet(each.outcome.text)}" for each in course.tried)
        raise AttemptsExhausted(
            f"{course.call.model!r} could not be served: {tried}", retry_after_s=5.0
        )


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


def _is_withheld(name: str) -> bool:
    """Whether a header stays here; web servers in front put identities and tokens into some."""
    return name in WITHHELD or name.startswith(("x-forwarded-", "x-auth-request-"))


def _judge_freely(route: Route, answer: Answer) -> tuple[Judgement, Answer | None, Usage]:
    """A whole answer of any type; a transcription of no bytes is how Ollama tells a crash."""
    if answer.body or route.operation == OTHER:
        return Judgement(Verdict.OK), answer, Usage()
    text = "lost its runner: it answered nothing"
    return Judgement(Verdict.UNFIT, 1, crash=True, text=text), None, Usage()


def _in_dialect(answer: Answer | None, dialect: Dialect) -> Answer | None:
    """A load's answer, which is Ollama's own, as the caller would have had it."""
    text = None if answer is None else verdicts.error_text(answer.body)
    if answer is None or text is None or dialect is Dialect.OLLAMA:
        return answer
    return replace(answer, body=relayed(answer.status, text, dialect))


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


def _retry_after(headers: Sequence[tuple[str, str]]) -> float | None:
    text = next((value for name, value in headers if name.lower() == "retry-after"), "")
    return float(text) if text.isascii() and text.isdecimal() else None
