"""
Pull, push, create, copy, delete and blobs: one client's order, carried out where it belongs.

Laws:
- An order goes to every backend it concerns, once per store. One that fails is told, and hides
  nothing of the others; one that is away is left out, and told too.
- Progress is a stream that Ollama itself could have sent.
- What has changed is read again before the last word, so that the client's next call finds it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Final

from aiohttp import web

from balancer.core import routes, verdicts
from balancer.core.dialect import compact
from balancer.core.domain import Call, Kind, PlacementKey, Purpose, Route
from balancer.core.errors import (
    BadRequest,
    NoBackend,
    UnknownModel,
)
from balancer.core.events import Emit, OrderEnded
from balancer.core.fanout import SUCCESS, Merger, Record, failure
from balancer.core.names import quoted
from balancer.core.orders import Order, read
from balancer.core.pool import Pool
from balancer.net.blobs import Blobs
from balancer.net.bodies import read_body
from balancer.net.prober import Prober
from balancer.net.reach import JSON, NATIVE, ManageSettings, Reach, Scope, document
from balancer.net.server import Exchange, Handler
from balancer.net.spool import Spool
from balancer.net.spread import Spread
from balancer.net.tasks import Tasks
from balancer.net.upstream import ClientUpstream, UpstreamError

_Key = tuple[str, str, tuple[str, ...], bytes, bool]  # operation, model, backends, body, names

NDJSON: Final = "application/x-ndjson"
DO_S: Final = 60.0  # for a copy or a delete on one backend


class Manage:
    """
    The handlers of the routes that change what is installed.

    Args:
        forwarded: The headers that go up with a request, ours among them.
        tasks: Owns the work.
        spool: Keeps uploads for backends that missed them; None: nothing is kept.
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
        spool: Spool | None = None,
    ) -> None:
        self.reach = Reach(settings, pool, upstream)
        self._blobs = Blobs(self.reach, upstream, tasks, self._tell, spool)
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
            "blobs": self._blobs.handle,
        }

    # -- streams of progress -------------------------------------------------------------------

    async def pull(self, exchange: Exchange) -> web.StreamResponse:
        """To every backend whose rules allow the model; at once where it is there already."""
        order = await self._read(exchange)
        model = order.name.canonical
        if self._catalog.aliases.find(model) is not None:
            return await self._pull_alias(exchange, order)
        may = self.reach.may("pull", exchange)
        named = self.reach.named(exchange) if may else frozenset()
        scope = self.reach.scope("pull", model, named)
        lacks = any(not self._catalog.lists(name, model) for name in scope.names)
        unsure = bool(named and scope.skipped) or not scope.names
        is_there = bool(self._catalog.holders(model)) and not (may and (lacks or unsure))
        if is_there and not _is_update(exchange, may=may):
            return await self._at_once(exchange, order)
        self.reach.require("pull", exchange)
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
        self.reach.require("push", exchange)
        scope = self.reach.holders("push", order.name.canonical)
        if not scope.groups and not scope.skipped:
            raise UnknownModel(f"model '{order.model}' not found")
        if scope.groups:
            scope = Scope([scope.groups[0][:1]], {})
        return await self._spread(exchange, order, scope)

    async def create(self, exchange: Exchange) -> web.StreamResponse:
        """Where what it is made of is: the model it starts from, and its blobs."""
        order = await self._read(exchange)
        self.reach.require("create", exchange)
        scope = self.reach.scope("create", order.name.canonical)
        if order.source is not None and self._catalog.holders(order.source.canonical):
            scope = self.reach.only(scope, order.source.canonical)
        if order.digests:
            scope = await self._blobs.having(scope, order.digests)
        return await self._spread(exchange, order, scope)

    async def _at_once(self, exchange: Exchange, order: Order) -> web.StreamResponse:
        """What a pull says that has nothing to do."""
        if not order.streaming:
            return document(exchange, 200, {"status": SUCCESS}, JSON)
        headers = exchange.headers() | {"Content-Type": NDJSON}
        lines = [{"status": "pulling manifest"}, {"status": SUCCESS}]
        return web.Response(body=b"".join(map(_line, lines)), headers=headers)

    async def _spread(self, exchange: Exchange, order: Order, scope: Scope) -> web.StreamResponse:
        """Join the same order if it is under way, else begin it; then tell how it goes."""
        if not scope.groups:
            raise self.reach.nobody(order.model, scope)
        route = exchange.route
        assert route is not None  # noqa: S101 - only routes lead here
        spread = self._join(exchange, route, order, scope)
        if order.streaming:
            return await self._stream(exchange, spread)
        return await self._sum(exchange, spread)

    def _join(self, exchange: Exchange, route: Route, order: Order, scope: Scope) -> Spread:
        body = order.body()
        names = not exchange.discreet
        key = (route.operation, order.name.canonical, tuple(scope.names), body, names)
        spread = self._running.get(key)
        if spread is None or not spread.is_open:
            spread = self._begin(exchange, route, order, scope, body)
            self._running[key] = spread
            task = spread.start(self._tasks, f"{route.operation} of {order.model[:80]}")
            task.add_done_callback(partial(self._ended, key, spread, exchange))
        exchange.backend = ",".join(scope.names)
        return spread

    def fetch(self, exchange: Exchange, call: Call) -> asyncio.Task[str] | None:
        """
        Pull the model that a call needs, if settings and rights allow it.

        What the task brings is why it failed; empty: the model is there. Cancelled, it leaves the
        download to others who wait for it, and ends it if there are none.
        """
        model = call.key.model
        may = self.reach.settings.auto_pull and self.reach.may("pull", exchange)
        if not may or verdicts.is_cloud(model) or self._catalog.aliases.find(model):
            return None
        order = read("pull", compact({"model": call.model}))
        scope = self.reach.scope("pull", call.key.model)
        if not scope.groups:
            return None
        spread = self._join(exchange, routes.find("POST", "/api/pull"), order, scope)
        return self._tasks.spawn(_outcome(spread), f"{call.model[:80]} for a call")

    def _begin(
        self, exchange: Exchange, route: Route, order: Order, scope: Scope, body: bytes
    ) -> Spread:
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
            {name: self.reach.target(name) for name in scope.names},
            Merger(scope.names, self._clock, scope.skipped, names=not exchange.discreet),
            call,
            self._upstream,
            parallel=self.reach.settings.parallel,
            idle_s=self.reach.settings.idle_s,
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

    async def _stream(self, exchange: Exchange, spread: Spread) -> web.StreamResponse:
        """Every record as it comes."""
        exchange.streaming = True
        response: web.StreamResponse | None = None
        async with aclosing(spread.watch()) as records:  # type: ignore[type-var]
            async for record in records:
                if "error" in record:
                    exchange.outcome, exchange.error = "upstream_error", str(record["error"])
                if response is None and "error" in record and not spread.told and spread.status:
                    return document(exchange, spread.status, record, JSON)
                if response is None:
                    response = web.StreamResponse(headers=exchange.headers())
                    response.headers["Content-Type"] = NDJSON
                    response.headers["X-Accel-Buffering"] = "no"
                    exchange.status = 200
                    await response.prepare(exchange.request)
                line = _line(record)
                exchange.bytes_out += len(line)
                await response.write(line)
        if response is None:
            raise NoBackend("The order was broken off.", retry_after_s=5.0)
        await response.write_eof()
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
            return document(exchange, spread.status or 500, last, JSON)
        return document(exchange, 200, last, JSON)

    # -- whole answers -------------------------------------------------------------------------

    async def copy(self, exchange: Exchange) -> web.StreamResponse:
        """On every backend that has the source."""
        order = await self._read(exchange)
        self.reach.require("copy", exchange)
        source = order.source.canonical if order.source is not None else ""
        text = str(order.fields.get("source"))
        scope = self.reach.holders("copy", source, order.name.canonical)
        if not self._catalog.holders(source):
            raise UnknownModel(f"model {quoted(text)} not found")
        return await self._everywhere(exchange, order, scope, source)

    async def delete(self, exchange: Exchange) -> web.StreamResponse:
        """On every backend that has it; one that has it no more has done it."""
        order = await self._read(exchange)
        self.reach.require("delete", exchange)
        scope = self.reach.holders("delete", order.name.canonical)
        if not scope.groups and not scope.skipped:
            raise UnknownModel(f"model '{order.model}' not found")
        return await self._everywhere(exchange, order, scope, None)

    async def _everywhere(
        self, exchange: Exchange, order: Order, scope: Scope, like: str | None
    ) -> web.StreamResponse:
        """
        Do it on each, once per store; 200 if all have done it.

        Args:
            like: The model whose files the order's name has afterwards; None: it is gone.
        """
        if not scope.groups:
            raise self.reach.nobody(order.model, scope)
        body = compact(order.fields)
        route = exchange.route
        assert route is not None  # noqa: S101 - only routes lead here
        answers: dict[str, tuple[int, bytes]] = {}

        async def on(name: str) -> None:
            try:
                status, _, told = await self._upstream.ask(
                    self.reach.target(name), route.method, route.path, body, limit_s=DO_S
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
        try:
            await asyncio.gather(*(in_turn(group) for group in scope.groups))
        except asyncio.CancelledError:
            done = [name for name, (status, _) in answers.items() if status == 200]
            self._tell(exchange, route.operation, done, {}, is_whole=False)
            raise
        return self._joined(exchange, route.operation, answers, scope)

    def _joined(
        self,
        exchange: Exchange,
        operation: str,
        answers: Mapping[str, tuple[int, bytes]],
        scope: Scope,
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
        headers = self.reach.skipped(scope)
        if not failed:
            return web.Response(status=200, headers=exchange.headers() | headers)
        statuses = {status for name, (status, _) in answers.items() if name in failed}
        same = statuses.pop() if len(statuses) == 1 and not done else 500
        exchange.outcome = "rejected" if same < 500 else "upstream_error"
        exchange.error = failure(failed, done, names=not exchange.discreet)
        told = {"error": exchange.error}
        return document(exchange, same or 502, told, NATIVE, headers)

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

    async def _read(self, exchange: Exchange) -> Order:
        route = exchange.route
        assert route is not None  # noqa: S101 - only routes lead here
        body = bytes(await read_body(exchange, self.reach.settings.max_body, self._clock))
        order = read(route.operation, body)
        if order.source is not None:
            exchange.use(order.source.display, order.source.canonical)
        exchange.use(order.model, order.name.canonical)
        return order


async def _outcome(spread: Spread) -> str:
    """Why nobody has it, though it was pulled; empty: somebody has it."""
    error = "the pull was broken off"
    async with aclosing(spread.watch()) as records:  # type: ignore[type-var]
        async for record in records:
            error = str(record["error"]) if "error" in record else ""
    return "" if spread.merger.succeeded else error


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
