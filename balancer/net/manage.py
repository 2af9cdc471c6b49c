"""
Pull, push, create, copy, delete and blobs: one client's order, carried out where it belongs.

Laws:
- An order goes to every backend it concerns, once per store. One that fails is told, and hides
  nothing of the others; one that is away is left out, and told too.
- Progress is a stream that Ollama itself could have sent.
- What has changed is read again before the last word, so that the client's next call finds it.
- Uploads are never kept: bytes go to the backends as they come, as fast as the slowest takes them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.http_exceptions import PayloadEncodingError

from balancer.core import verdicts
from balancer.core.dialect import compact
from balancer.core.domain import Call, Kind, PlacementKey, Purpose, Role, Switch
from balancer.core.errors import (
    BadRequest,
    BalancerError,
    Forbidden,
    NoBackend,
    RequestTimeout,
    UnknownModel,
)
from balancer.core.events import Emit, OrderEnded
from balancer.core.fanout import SUCCESS, Merger, Record, failure
from balancer.core.names import quoted
from balancer.core.orders import Order, digest_of, read
from balancer.core.pool import Pool
from balancer.core.stores import Keeper, groups
from balancer.net import writing
from balancer.net.prober import Prober
from balancer.net.server import BODY_STALL_S, Exchange, Handler, ask_for_body, read_body
from balancer.net.spread import Spread
from balancer.net.tasks import Tasks
from balancer.net.upstream import ClientUpstream, Target, UpstreamError

_Key = tuple[str, str, tuple[str, ...], bytes, bool]  # operation, model, backends, body, names

NDJSON: Final = "application/x-ndjson"
JSON: Final = "application/json"
NATIVE: Final = "application/json; charset=utf-8"
HEAD_S: Final = 10.0
DO_S: Final = 60.0  # for a copy or a delete on one backend
PIECES: Final = 8  # of an upload that wait for one backend


@dataclass(frozen=True, slots=True)
class Right:
    """Who may do something, and where: ``never``, ``admin`` or ``user``; ``all`` or names."""

    allow: str = "admin"
    target: tuple[str, ...] = ("all",)


@dataclass(frozen=True, slots=True)
class ManageSettings:
    """Rights by operation; how many downloads at once; seconds of silence; bytes of a body."""

    rights: Mapping[str, Right]
    parallel: int = 3
    idle_s: float | None = 600.0
    max_body: int = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Scope:
    """Where an order goes, and which backends it leaves out, with the reason."""

    groups: list[list[str]]
    skipped: dict[str, str]

    @property
    def names(self) -> list[str]:
        return [name for group in self.groups for name in group]


class Manage:
    """
    The handlers of the routes that change what is installed.

    Args:
        forwarded: The headers that go up with a request, ours among them.
        tasks: Owns the work.
    """

    def __init__(
        self,
        settings: ManageSettings,
        pool: Pool,
        upstream: ClientUpstream,
        prober: Prober,
        tasks: Tasks,
        clock: Callable[[], float],
        emit: Emit,
        forwarded: Callable[[Exchange], tuple[tuple[str, str], ...]],
    ) -> None:
        self.settings = settings
        self._pool = pool
        self._catalog = pool.catalog
        self._upstream = upstream
        self._prober = prober
        self._tasks = tasks
        self._clock = clock
        self._emit = emit
        self._forwarded = forwarded
        self._running: dict[_Key, Spread] = {}

    def handlers(self) -> Mapping[str | Kind, Handler]:
        """By operation."""
        return {
            "pull": self.pull,
            "push": self.push,
            "create": self.create,
            "copy": self.copy,
            "delete": self.delete,
            "blobs": self.blobs,
        }

    # -- streams of progress -------------------------------------------------------------------

    async def pull(self, exchange: Exchange) -> web.StreamResponse:
        """To every backend whose rules allow the model; at once where it is there already."""
        order = await self._read(exchange)
        model = order.name.canonical
        if self._catalog.aliases.find(model) is not None:
            return await self._pull_alias(exchange, order)
        may = self._may("pull", exchange)
        named = self._named(exchange) if may else frozenset()
        scope = self._scope("pull", model, named)
        lacks = any(not self._catalog.lists(name, model) for name in scope.names)
        unsure = bool(named and scope.skipped) or not scope.names
        is_there = bool(self._catalog.holders(model)) and not (may and (lacks or unsure))
        if is_there and not _is_update(exchange, may=may):
            return await self._at_once(exchange, order)
        self._require("pull", exchange)
        return await self._spread(exchange, order, scope)

    async def _pull_alias(self, exchange: Exchange, order: Order) -> web.StreamResponse:
        """Coding agents pull what they are to use; no registry knows our aliases."""
        alias = self._catalog.aliases.find(order.name.canonical)
        if alias is None or self._catalog.meant(alias.canonical) is not None:
            return await self._at_once(exchange, order)
        stands_for = ", ".join(alias.models)
        raise BadRequest(f"{order.model!r} is an alias (models.aliases); pull: {stands_for}")

    async def push(self, exchange: Exchange) -> web.StreamResponse:
        """From one backend that has it."""
        order = await self._read(exchange)
        self._require("push", exchange)
        scope = self._holders("push", order.name.canonical)
        if not scope.groups and not scope.skipped:
            raise UnknownModel(f"model '{order.model}' not found")
        if scope.groups:
            scope = _Scope([scope.groups[0][:1]], {})
        return await self._spread(exchange, order, scope)

    async def create(self, exchange: Exchange) -> web.StreamResponse:
        """Where what it is made of is: the model it starts from, and its blobs."""
        order = await self._read(exchange)
        self._require("create", exchange)
        scope = self._scope("create", order.name.canonical)
        if order.source is not None and self._catalog.holders(order.source.canonical):
            scope = self._only(scope, order.source.canonical)
        if order.digests:
            scope = await self._with_blobs(scope, order.digests)
        return await self._spread(exchange, order, scope)

    async def _at_once(self, exchange: Exchange, order: Order) -> web.StreamResponse:
        """What a pull says that has nothing to do."""
        if not order.streaming:
            return _answer(exchange, 200, {"status": SUCCESS}, JSON)
        headers = exchange.headers() | {"Content-Type": NDJSON}
        lines = [{"status": "pulling manifest"}, {"status": SUCCESS}]
        return web.Response(body=b"".join(map(_line, lines)), headers=headers)

    async def _spread(self, exchange: Exchange, order: Order, scope: _Scope) -> web.StreamResponse:
        """Join the same order if it is under way, else begin it; then tell how it goes."""
        if not scope.groups:
            raise self._nobody(order.model, scope)
        body = order.body()
        route = exchange.route
        assert route is not None  # noqa: S101 - only routes lead here
        names = not exchange.discreet
        key = (route.operation, order.name.canonical, tuple(scope.names), body, names)
        spread = self._running.get(key)
        if spread is None or not spread.is_open:
            spread = self._begin(exchange, order, scope, body)
            self._running[key] = spread
            task = spread.start(self._tasks, f"{route.operation} of {order.model[:80]}")
            task.add_done_callback(partial(self._ended, key, spread, exchange))
        exchange.backend = ",".join(scope.names)
        if order.streaming:
            return await self._stream(exchange, spread)
        return await self._sum(exchange, spread)

    def _begin(self, exchange: Exchange, order: Order, scope: _Scope, body: bytes) -> Spread:
        route = exchange.route
        assert route is not None  # noqa: S101 - only routes lead here
        model = order.name.canonical
        call = Call(
            id=exchange.id,
            route=route,
            model=order.model,
            key=PlacementKey(model),
            streaming=True,
            purpose=Purpose.RUN,
            replayable=False,
            principal=exchange.principal,
            arrived_at=exchange.started_at,
            deadline=None,
            body=body,
            headers=self._forwarded(exchange),
        )

        async def stands(name: str) -> str:
            await self._prober.relist(name)
            return self._stands(name, model)

        return Spread(
            scope.groups,
            {name: self._target(name) for name in scope.names},
            Merger(scope.names, self._clock, scope.skipped, names=not exchange.discreet),
            call,
            self._upstream,
            parallel=self.settings.parallel,
            idle_s=self.settings.idle_s,
            stands=stands,
        )

    def _stands(self, name: str, model: str) -> str:
        """What a backend has under a name: its digest, empty if it has nothing."""
        if not self._catalog.lists(name, model):
            return ""
        return self._catalog.digest(name, model) or "?"

    def _ended(self, key: _Key, spread: Spread, exchange: Exchange, _: object) -> None:
        if self._running.get(key) is spread:
            del self._running[key]
        merger = spread.merger
        done, failed = merger.succeeded, merger.failed
        self._tell(exchange, key[0], done, failed, is_whole=merger.is_over)

    def _tell(
        self,
        exchange: Exchange,
        operation: str,
        done: Sequence[str],
        failed: Mapping[str, str],
        *,
        is_whole: bool = True,
    ) -> None:
        event = OrderEnded(
            self._clock(),
            operation,
            exchange.model or exchange.argument,
            exchange.principal.name,
            tuple(done),
            tuple(f"{name}: {text}" for name, text in failed.items()),
            is_whole,
        )
        self._emit(event)

    async def _stream(self, exchange: Exchange, spread: Spread) -> web.StreamResponse:
        """Every record as it comes."""
        exchange.streaming = True
        response: web.StreamResponse | None = None
        async with aclosing(spread.watch()) as records:  # type: ignore[type-var]
            async for record in records:
                if "error" in record:
                    exchange.outcome, exchange.error = "upstream_error", str(record["error"])
                if response is None and "error" in record and not spread.told and spread.status:
                    return _answer(exchange, spread.status, record, JSON)
                if response is None:
                    response = web.StreamResponse(headers=exchange.headers())
                    response.headers["Content-Type"] = NDJSON
                    response.headers["X-Accel-Buffering"] = "no"
                    exchange.status = 200
                    await response.prepare(exchange.request)
                line = _line(record)
                exchange.bytes_out += len(line)
                await writing.write(exchange.request, response, line)
        if response is None:
            raise NoBackend("The order was broken off.", retry_after_s=5.0)
        await writing.end(exchange.request, response)
        return response

    async def _sum(self, exchange: Exchange, spread: Spread) -> web.StreamResponse:
        """The last record alone."""
        last: Record = {}
        async with aclosing(spread.watch()) as records:  # type: ignore[type-var]
            async for record in records:
                last = record
        if not last:
            raise NoBackend("The order was broken off.", retry_after_s=5.0)
        if "error" in last:
            exchange.outcome, exchange.error = "upstream_error", str(last["error"])
            return _answer(exchange, spread.status or 500, last, JSON)
        return _answer(exchange, 200, last, JSON)

    # -- whole answers -------------------------------------------------------------------------

    async def copy(self, exchange: Exchange) -> web.StreamResponse:
        """On every backend that has the source."""
        order = await self._read(exchange)
        self._require("copy", exchange)
        source = order.source.canonical if order.source is not None else ""
        text = str(order.fields.get("source"))
        scope = self._holders("copy", source, order.name.canonical)
        if not self._catalog.holders(source):
            raise UnknownModel(f"model {quoted(text)} not found")
        return await self._everywhere(exchange, order, scope, source)

    async def delete(self, exchange: Exchange) -> web.StreamResponse:
        """On every backend that has it; one that has it no more has done it."""
        order = await self._read(exchange)
        self._require("delete", exchange)
        scope = self._holders("delete", order.name.canonical)
        if not scope.groups and not scope.skipped:
            raise UnknownModel(f"model '{order.model}' not found")
        return await self._everywhere(exchange, order, scope, None)

    async def _everywhere(
        self, exchange: Exchange, order: Order, scope: _Scope, like: str | None
    ) -> web.StreamResponse:
        """
        Do it on each, once per store; 200 if all have done it.

        Args:
            like: The model whose files the order's name has afterwards; None: it is gone.
        """
        if not scope.groups:
            raise self._nobody(order.model, scope)
        body = compact(order.fields)
        route = exchange.route
        assert route is not None  # noqa: S101 - only routes lead here
        answers: dict[str, tuple[int, bytes]] = {}

        async def on(name: str) -> None:
            try:
                status, _, told = await self._upstream.ask(
                    self._target(name), route.method, route.path, body, limit_s=DO_S
                )
            except UpstreamError as error:
                status, told = 0, compact({"error": error.failure.text})
            answers[name] = status, told
            await self._prober.relist(name)

        async def in_turn(group: Sequence[str]) -> None:
            await on(group[0])
            for name in group[1:]:
                await self._prober.relist(name)
                wanted = "" if like is None else self._stands(name, like)
                if self._stands(name, order.name.canonical) != wanted:
                    await on(name)

        exchange.backend = ",".join(scope.names)
        await asyncio.gather(*(in_turn(group) for group in scope.groups))
        return self._joined(exchange, route.operation, answers, scope)

    def _joined(
        self,
        exchange: Exchange,
        operation: str,
        answers: Mapping[str, tuple[int, bytes]],
        scope: _Scope,
    ) -> web.StreamResponse:
        gone = {name for name, (status, _) in answers.items() if status == 404}
        done = [name for name, (status, _) in answers.items() if status == 200]
        fine = {*done, *gone} if operation == "delete" and done else {*done}
        failed = {
            name: verdicts.error_text(body) or f"HTTP {status}"
            for name, (status, body) in answers.items()
            if name not in fine
        }
        self._tell(exchange, operation, done, failed)
        headers = _skipped(scope)
        if not failed:
            return web.Response(status=200, headers=exchange.headers() | headers)
        statuses = {status for name, (status, _) in answers.items() if name in failed}
        same = statuses.pop() if len(statuses) == 1 and not done else 500
        exchange.outcome = "rejected" if same < 500 else "upstream_error"
        exchange.error = failure(failed, done, names=not exchange.discreet)
        told = {"error": exchange.error}
        return _answer(exchange, same or 502, told, NATIVE, headers)

    # -- blobs ---------------------------------------------------------------------------------

    async def blobs(self, exchange: Exchange) -> web.StreamResponse:
        """HEAD: whether all have it. POST: to all that do not, as it comes."""
        self._require("create", exchange)
        digest = digest_of(exchange.argument)
        if digest is None:
            raise BadRequest("invalid digest format")
        scope = self._scope("create", None)
        if not scope.groups:
            raise self._nobody("a blob", scope)
        wanted = self._once(scope.names)
        exchange.backend = ",".join(wanted)
        lacking = await self._lacking(wanted, digest)
        headers = exchange.headers() | _skipped(scope)
        if exchange.request.method == "HEAD":
            kind = {"Content-Type": NATIVE} if lacking else {}
            return web.Response(status=404 if lacking else 200, headers=headers | kind)
        if lacking:
            return await self._upload(exchange, digest, lacking, headers)
        return await _early(exchange, web.Response(status=200, headers=headers))

    def _once(self, names: Sequence[str]) -> list[str]:
        """One of each store that the operator named: what is not kept cannot be sent once more."""
        stores = {name: self._pool.members[name].backend.store or (name,) for name in names}
        return list({store: name for name, store in reversed(stores.items())}.values())[::-1]

    async def _lacking(self, names: Sequence[str], digest: str) -> list[str]:
        """Which of them do not have a blob; one that does not answer is one of those."""

        async def asks(name: str) -> bool:
            try:
                status, _, _ = await self._upstream.ask(
                    self._target(name), "HEAD", f"/api/blobs/{digest}", limit_s=HEAD_S
                )
            except UpstreamError:
                return True
            return status != 200

        lacks = await asyncio.gather(*map(asks, names))
        return [name for name, does in zip(names, lacks, strict=True) if does]

    async def _upload(
        self, exchange: Exchange, digest: str, names: Sequence[str], headers: dict[str, str]
    ) -> web.StreamResponse:
        request = exchange.request
        length = request.headers.get("Content-Length")
        sent = [("Content-Type", "application/octet-stream")]
        sent += [("Content-Length", length)] if length is not None else []
        pumps = [
            _Pump(name, self._upstream, self._target(name), f"/api/blobs/{digest}", sent)
            for name in names
        ]
        try:
            for pump in pumps:
                pump.start(self._tasks)
            ask_for_body(request)
            exchange.bytes_in = await _poured(request, pumps)
            await asyncio.gather(*(pump.end(self.settings.idle_s) for pump in pumps))
        finally:
            for pump in pumps:
                pump.stop()
        return await _early(exchange, self._uploaded(exchange, pumps, headers))

    def _uploaded(
        self, exchange: Exchange, pumps: Sequence[_Pump], headers: dict[str, str]
    ) -> web.Response:
        done = [pump.name for pump in pumps if pump.status in (200, 201)]
        failed = {pump.name: pump.text for pump in pumps if pump.name not in done}
        self._tell(exchange, "blob", done, failed)
        if done:
            skipped = [headers.get("X-Balancer-Skipped", ""), *failed]
            told = ", ".join(name for name in skipped if name)
            return web.Response(
                status=201, headers=headers | ({"X-Balancer-Skipped": told} if told else {})
            )
        statuses = {pump.status for pump in pumps}
        status = statuses.pop() if len(statuses) == 1 else 500
        exchange.outcome = "rejected" if 400 <= status < 500 else "upstream_error"
        exchange.error = failure(failed, done, names=not exchange.discreet)
        return _answer(exchange, status or 502, {"error": exchange.error}, NATIVE)

    async def _with_blobs(self, scope: _Scope, digests: Sequence[str]) -> _Scope:
        """Those that have all the blobs; if nobody has, all: their own answer is the best one."""
        lacking: dict[str, str] = {}
        for digest in digests:
            for name in await self._lacking(scope.names, digest):
                lacking[name] = digest
        left = [[name for name in group if name not in lacking] for group in scope.groups]
        found = [group for group in left if group]
        if not found:
            return scope
        without = {
            name: f"does not have the blob {digest[:19]}…; upload it again"
            for name, digest in lacking.items()
        }
        return _Scope(found, scope.skipped | without)

    # -- where ---------------------------------------------------------------------------------

    def _named(self, exchange: Exchange) -> frozenset[str]:
        """The backends that our own command line limits a pull to; empty: it does not."""
        names = exchange.request.headers.get("X-Balancer-To", "").replace(",", " ").split()
        for name in names:
            if name not in self._pool.members:
                known = ", ".join(self._pool.members)
                raise BadRequest(f"no backend {quoted(name[:64])}. There are: {known}.")
        return frozenset(names)

    def _scope(
        self, operation: str, model: str | None, among: frozenset[str] = frozenset()
    ) -> _Scope:
        """Every backend that may have the model, by store; those that are away are left out."""
        target = self.settings.rights[operation].target
        chosen, skipped = [], {}
        for name, member in self._pool.members.items():
            backend = member.backend
            if not backend.enabled or backend.provider or not {"all", name} & set(target):
                continue
            if among and name not in among:
                continue
            if model is not None and not self._pool.allows(backend, model):
                continue
            if member.switch is not Switch.SERVING:
                skipped[name] = f"is {member.switch.value}"
            elif member.health.up:
                chosen.append(name)
            else:
                known = member.health.state == "down"
                skipped[name] = "is down" if known else "has not answered yet"
        return _Scope(self._grouped(chosen), skipped)

    def _holders(self, operation: str, model: str, made: str | None = None) -> _Scope:
        """Those that have a model, and may have what is made of it."""
        return self._only(self._scope(operation, made), model)

    def _only(self, scope: _Scope, model: str) -> _Scope:
        found = [[n for n in group if self._catalog.lists(n, model)] for group in scope.groups]
        away = set(self._catalog.holders(model))
        skipped = {name: why for name, why in scope.skipped.items() if name in away}
        return _Scope([group for group in found if group], skipped)

    def _grouped(self, names: Sequence[str]) -> list[list[str]]:
        return groups(
            Keeper(
                name,
                self._pool.members[name].backend.store,
                (urlsplit(self._pool.members[name].backend.url).hostname or "").lower(),
                frozenset((m, self._catalog.digest(name, m)) for m in self._catalog.listed(name)),
            )
            for name in names
        )

    def _target(self, name: str) -> Target:
        known = self._upstream.targets.get(name)
        return known if known is not None else Target(self._pool.members[name].backend.url)

    def _nobody(self, model: str, scope: _Scope) -> BalancerError:
        if not scope.skipped:
            return NoBackend(f"No backend may take {model!r}.", retry_after_s=30.0)
        told = "; ".join(f"{name} {why}" for name, why in scope.skipped.items())
        return NoBackend(f"No backend can take {model!r} now: {told}.", retry_after_s=5.0)

    # -- who -----------------------------------------------------------------------------------

    async def _read(self, exchange: Exchange) -> Order:
        route = exchange.route
        assert route is not None  # noqa: S101 - only routes lead here
        body = await read_body(exchange, self.settings.max_body, self._clock)
        order = read(route.operation, body)
        if order.source is not None:
            exchange.use(order.source.display, order.source.canonical)
        exchange.use(order.model, order.name.canonical)
        return order

    def _may(self, operation: str, exchange: Exchange) -> bool:
        allow = self.settings.rights[operation].allow
        return allow == "user" or (allow == "admin" and exchange.principal.role is Role.ADMIN)

    def _require(self, operation: str, exchange: Exchange) -> None:
        if self._may(operation, exchange):
            return
        if self.settings.rights[operation].allow == "never":
            raise Forbidden(
                f"This balancer does not {operation} models (manage.{operation}.allow)."
            )
        raise Forbidden(
            f"To {operation} models here takes a key with the role admin "
            f"(manage.{operation}.allow)."
        )


class _Pump:
    """An upload to one backend: a few pieces wait, then whoever pours waits too."""

    def __init__(
        self,
        name: str,
        upstream: ClientUpstream,
        target: Target,
        path: str,
        headers: Sequence[tuple[str, str]],
    ) -> None:
        self.name = name
        self.status = 0
        self.text = "did not take it"
        self._upstream = upstream
        self._target = target
        self._path = path
        self._headers = headers
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(PIECES)
        self._task: asyncio.Task[Any] | None = None
        self._taken = False

    def start(self, tasks: Tasks) -> None:
        self._task = tasks.spawn(self._run(), f"upload to {self.name}")

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    @property
    def is_over(self) -> bool:
        return self._taken or (self._task is not None and self._task.done())

    async def put(self, piece: bytes | None) -> None:
        """Hand on a piece; nothing happens once the backend has answered, or does not read."""
        if self.is_over:
            return
        try:
            async with asyncio.timeout(BODY_STALL_S):
                await self._pieces.put(piece)
        except TimeoutError:
            self.text = "stopped reading the upload"
            self.stop()

    async def end(self, limit_s: float | None) -> None:
        """No more pieces; wait for the backend's answer."""
        await self.put(None)
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=limit_s)

    async def _run(self) -> None:
        try:
            self.status, body = await self._upstream.upload(
                self._target, self._path, self._body(), self._headers
            )
        except UpstreamError as error:
            self.text = error.failure.text
            await self._look()
        else:
            self.text = verdicts.error_text(body) or f"HTTP {self.status}"
        finally:
            self._taken = True
            while not self._pieces.empty():  # whoever waits to put one must not wait for ever
                self._pieces.get_nowait()

    async def _look(self) -> None:
        """A backend that has the blob already answers early, and the answer may get lost."""
        try:
            status, _, _ = await self._upstream.ask(
                self._target, "HEAD", self._path, limit_s=HEAD_S
            )
        except UpstreamError:
            return
        self.status = 200 if status == 200 else 0

    async def _body(self) -> AsyncIterator[bytes]:
        while (piece := await self._pieces.get()) is not None:
            yield piece


async def _poured(request: web.BaseRequest, pumps: Sequence[_Pump]) -> int:
    """Read the client's body into every pump. Raises RequestTimeout if it stops coming."""
    size = 0
    while not all(pump.is_over for pump in pumps):
        try:
            async with asyncio.timeout(BODY_STALL_S):
                piece = await request.content.readany()
        except TimeoutError:
            raise RequestTimeout("The upload stopped coming.") from None
        except PayloadEncodingError:
            raise BadRequest("the request's body is not framed as HTTP has it") from None
        if not piece:
            break
        size += len(piece)
        await asyncio.gather(*(pump.put(piece) for pump in pumps))
    return size


async def _early(exchange: Exchange, response: web.Response) -> web.StreamResponse:
    """
    Answer although the client may still be sending.

    Some clients hear of it only when they have sent everything, and would hear nothing if the
    connection were closed before.
    """
    request = exchange.request
    if not request.can_read_body or request.content.at_eof():
        return response
    response.force_close()
    if request.headers.get("Expect") is None:
        exchange.status = response.status
        exchange.outcome = exchange.outcome or "ok"
        await response.prepare(request)
        await response.write_eof()
        with suppress(TimeoutError, PayloadEncodingError, ConnectionError):
            while not request.content.at_eof():
                async with asyncio.timeout(BODY_STALL_S):
                    await request.content.readany()
    return response


def _is_update(exchange: Exchange, *, may: bool) -> bool:
    """
    Whether somebody wants the newest version of what is there.

    Ollama's own command line pulls only what a person asked for; coding agents pull at every
    start, and would each time ask the registry.
    """
    request = exchange.request
    agent = request.headers.get("User-Agent", "")
    return may and (agent.startswith("ollama/") or "X-Balancer-Update" in request.headers)


def _line(record: Mapping[str, Any]) -> bytes:
    return compact(record) + b"\n"


def _answer(
    exchange: Exchange,
    status: int,
    value: Mapping[str, Any],
    kind: str,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    exchange.status = status
    merged = exchange.headers() | {"Content-Type": kind, **(headers or {})}
    return web.Response(status=status, body=compact(value), headers=merged)


def _skipped(scope: _Scope) -> dict[str, str]:
    return {"X-Balancer-Skipped": ", ".join(scope.skipped)} if scope.skipped else {}
