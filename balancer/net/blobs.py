"""
Blobs: the files that a model is made of, on their way to every backend that may be asked to.

Laws:
- Bytes go to the backends as they come, as fast as the slowest takes them.
- What a backend has missed is sent to it before a model is made of it, if it is kept (`spool`).
- A backend that fails is left out and named; the upload is good if one has taken it.
- An answer may come before the client has sent everything; it is heard all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import PayloadEncodingError

from balancer.core import verdicts
from balancer.core.errors import BadRequest, RequestTimeout
from balancer.core.fanout import failure
from balancer.core.orders import digest_of
from balancer.net.bodies import BODY_STALL_S, ask_for_body
from balancer.net.reach import NATIVE, Reach, Scope, document
from balancer.net.server import Exchange
from balancer.net.spool import Copy, Spool, pieces
from balancer.net.tasks import Tasks
from balancer.net.upstream import ClientUpstream, Target, UpstreamError

HEAD_S: Final = 10.0
PIECES: Final = 8  # of an upload that wait for one backend

Tell = Callable[[Exchange, str, Sequence[str], Mapping[str, str]], None]


class Blobs:
    """
    The handler of ``/api/blobs/``.

    Args:
        tell: Hears which backends took a blob, and which did not.
    """

    def __init__(
        self,
        reach: Reach,
        upstream: ClientUpstream,
        tasks: Tasks,
        tell: Tell,
        spool: Spool | None,
    ) -> None:
        self._reach = reach
        self._upstream = upstream
        self._tasks = tasks
        self._tell = tell
        self._spool = spool

    async def handle(self, exchange: Exchange) -> web.StreamResponse:
        """HEAD: whether all have it. POST: to all that do not, as it comes."""
        self._reach.require("create", exchange)
        digest = digest_of(exchange.argument)
        if digest is None:
            raise BadRequest("invalid digest format")
        scope = self._reach.scope("create", None)
        if not scope.groups:
            raise self._reach.nobody("a blob", scope)
        wanted = self._reach.once(scope.names)
        exchange.backend = ",".join(wanted)
        lacking = await self.lacking(wanted, digest)
        headers = exchange.headers() | self._reach.skipped(scope)
        if exchange.request.method == "HEAD":
            kind = {"Content-Type": NATIVE} if lacking else {}
            return web.Response(status=404 if lacking else 200, headers=headers | kind)
        if lacking:
            return await self._upload(exchange, digest, lacking, headers)
        return await _early(exchange, web.Response(status=200, headers=headers))

    async def lacking(self, names: Sequence[str], digest: str) -> list[str]:
        """Which of them do not have a blob; one that does not answer is one of those."""

        async def asks(name: str) -> bool:
            try:
                status, _, _ = await self._upstream.ask(
                    self._reach.target(name), "HEAD", f"/api/blobs/{digest}", limit_s=HEAD_S
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
            _Pump(name, self._upstream, self._reach.target(name), f"/api/blobs/{digest}", sent)
            for name in names
        ]
        copy = None if self._spool is None else self._spool.begin()
        try:
            for pump in pumps:
                pump.start(self._tasks)
            ask_for_body(request)
            exchange.bytes_in = await _poured(request, pumps, copy)
            await asyncio.gather(*(pump.end(self._reach.settings.idle_s) for pump in pumps))
            # A backend that stored it has compared the digest, so the copy is whole and right.
            is_right = any(pump.status == 201 for pump in pumps)
            if self._spool is not None and copy is not None and is_right and await copy.end():
                self._spool.keep(digest, copy)
                copy = None
        finally:
            for pump in pumps:
                pump.stop()
            if copy is not None:
                copy.drop()
        return await _early(exchange, self._uploaded(exchange, pumps, headers))

    def _uploaded(
        self, exchange: Exchange, pumps: Sequence[_Pump], headers: dict[str, str]
    ) -> web.Response:
        done = [pump.name for pump in pumps if pump.has_taken]
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
        return document(exchange, status or 502, {"error": exchange.error}, NATIVE)

    async def having(self, scope: Scope, digests: Sequence[str]) -> Scope:
        """Those that have all the blobs; if nobody has, all: their own answer is the best one."""
        lacking: dict[str, str] = {}
        for digest in digests:
            names = await self.lacking(scope.names, digest)
            have = await asyncio.gather(*(self._sent_again(name, digest) for name in names))
            lacking |= {name: digest for name, has in zip(names, have, strict=True) if not has}
        left = [[name for name in group if name not in lacking] for group in scope.groups]
        found = [group for group in left if group]
        if not found:
            return scope
        without = {
            name: f"does not have the blob {digest[:19]}…; upload it again"
            for name, digest in lacking.items()
        }
        return Scope(found, scope.skipped | without)

    async def _sent_again(self, name: str, digest: str) -> bool:
        """Whether a backend has a blob now, because it was kept."""
        path = None if self._spool is None else self._spool.find(digest)
        if path is None:
            return False
        target, headers = self._reach.target(name), [("Content-Type", "application/octet-stream")]
        pump = _Pump(name, self._upstream, target, f"/api/blobs/{digest}", headers)
        pump.start(self._tasks)
        try:
            async with aclosing(pieces(path)) as parts:  # type: ignore[type-var]
                async for piece in parts:
                    await pump.put(piece)
            await pump.end(self._reach.settings.idle_s)
        except OSError:
            return False
        finally:
            pump.stop()
        return pump.has_taken


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
    def has_taken(self) -> bool:
        return self.status in (200, 201)

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


async def _poured(request: web.BaseRequest, pumps: Sequence[_Pump], copy: Copy | None) -> int:
    """
    Read the client's body into every pump, and the copy.

    Raises:
        RequestTimeout: It stops coming.
        BadRequest: It is not framed as HTTP has it.
    """
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
        if copy is not None:
            await copy.put(piece)
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
