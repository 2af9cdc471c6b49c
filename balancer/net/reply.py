"""
The client's side of an answer: its head, its records, heartbeats between them, its end.

Laws:
- A streaming call that has nothing to tell for a while is answered 200 and a heartbeat, a record
  that says nothing; proxies and clients hang up on silence. It commits nothing: attempts go on.
- Once the head is out, whatever brought it out, every end is told inside the stream.
- A heartbeat stands between records: never inside one, never behind the last.
- Only the call's own task writes; a timer merely wakes it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from aiohttp import web

from balancer.core.dialect import heartbeat, retold, trailer
from balancer.core.dispatch import Answer
from balancer.core.domain import Call, Framing
from balancer.core.errors import BalancerError, CutStream
from balancer.net import writing
from balancer.net.attempt import framing_of
from balancer.net.server import Exchange, outcome_of

T = TypeVar("T")
CONTENT_TYPES: Final = {
    Framing.NDJSON: "application/x-ndjson",
    Framing.SSE: "text/event-stream",
}
ENDS: Final = {Framing.NDJSON: b"\n", Framing.SSE: b"\n\n"}


class Reply:
    """
    The answer to one call, as far as it has got.

    Args:
        after_s: Silence before the first heartbeat, which brings the head out; None: it waits for
            the answer.
        every_s: Silence before each further one; None: there is none.
        stamp: The wall time as Ollama writes it.
    """

    def __init__(
        self,
        exchange: Exchange,
        call: Call,
        clock: Callable[[], float],
        stamp: Callable[[], str],
        *,
        after_s: float | None,
        every_s: float | None,
    ) -> None:
        self._exchange = exchange
        self._call = call
        self._clock = clock
        self._stamp = stamp
        has_heartbeat = heartbeat(call, "") is not None
        self._patience_s = after_s if has_heartbeat else None
        self._every_s = every_s if has_heartbeat else None
        self._quiet_since = clock()
        self._stream: web.StreamResponse | None = None
        self._framing = Framing.JSON  # of the stream
        self._timer: asyncio.TimerHandle | None = None

    @property
    def begun(self) -> bool:
        """Whether the head is out."""
        return self._stream is not None

    def close(self) -> None:
        """Nothing more is to be written; idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- silence -------------------------------------------------------------------------------

    async def until(self, awaited: asyncio.Future[T]) -> T:
        """What *awaited* brings; heartbeats go out while it does not come."""
        while not awaited.done():
            await asyncio.wait((awaited,), timeout=self._left_s())
            if not awaited.done():
                await self.beat()
        return awaited.result()

    async def beat(self) -> None:
        """Write a heartbeat if one is due; the caller knows that no record is half written."""
        left_s = self._left_s()
        record = heartbeat(self._call, self._stamp()) if left_s == 0.0 else None
        if record is not None:
            await self.begin({"Content-Type": CONTENT_TYPES[self._call.framing]})
            await self.write(record)

    def rousing(self, rouse: Callable[[], None]) -> None:
        """From now on, call *rouse* whenever a heartbeat is due."""
        self._timer = None
        left_s = self._left_s()
        if left_s == 0.0:
            rouse()
            left_s = self._every_s
        if left_s is not None:
            self._timer = asyncio.get_running_loop().call_later(left_s, self.rousing, rouse)

    def _left_s(self) -> float | None:
        """Seconds until a heartbeat is due; None: never."""
        if self._patience_s is None:
            return None
        return max(0.0, self._quiet_since + self._patience_s - self._clock())

    # -- writing -------------------------------------------------------------------------------

    async def begin(self, headers: Mapping[str, str]) -> None:
        """Bring the head of a stream out, unless a heartbeat has done so."""
        if self._stream is None:
            exchange = self._exchange
            exchange.status = 200
            self._stream = web.StreamResponse(headers={**headers, **exchange.headers()})
            self._framing = framing_of(self._stream.headers.get("Content-Type", ""))
            if self._framing is not Framing.JSON:
                self._stream.headers["X-Accel-Buffering"] = "no"
            fits = self._framing is self._call.framing  # else a heartbeat would be none
            self._patience_s = self._every_s if fits else None
            await self._stream.prepare(exchange.request)

    async def write(self, data: bytes) -> None:
        """Write whole records, or what need not be whole. Raises ConnectionError."""
        assert self._stream is not None  # noqa: S101 - `begin` comes first
        self._exchange.bytes_out += len(data)
        await writing.write(self._exchange.request, self._stream, data)
        self._quiet_since = self._clock()

    # -- ends ----------------------------------------------------------------------------------

    async def end(self, last: bytes = b"") -> web.StreamResponse:
        """End the stream with *last*, if the client is still there."""
        assert self._stream is not None  # noqa: S101 - `begin` comes first
        self.close()
        with contextlib.suppress(ConnectionError):
            if last:
                await self.write(last)
            await writing.end(self._exchange.request, self._stream)
        return self._stream

    def abort(self) -> web.StreamResponse:
        """Break the body off: the one way to say that it failed where no record fits."""
        assert self._stream is not None  # noqa: S101 - `begin` comes first
        self.close()
        if self._exchange.request.transport is not None:
            self._exchange.request.transport.abort()
        return self._stream

    async def refuse(self, error: BalancerError, number: int = 0) -> web.StreamResponse:
        """Tell an error of ours where its status line would come too late."""
        exchange = self._exchange
        exchange.outcome = exchange.outcome or outcome_of(error)
        exchange.error = exchange.error or error.text
        told = exchange.told(error)
        record = trailer(told, exchange.dialect, self._framing, exchange.id, number)
        return self.abort() if record is None else await self.end(record)

    async def answer(self, answer: Answer, headers: Mapping[str, str]) -> web.StreamResponse:
        """
        Tell an answer that was collected whole: as it is, or inside a stream that has begun.

        Raises:
            CutStream: It does not fit there.
        """
        if self._stream is None:
            self._exchange.status = answer.status
            return web.Response(status=answer.status, body=answer.body, headers=headers)
        kind, framing = framing_of(answer.content_type), self._framing
        if answer.status != 200:
            told = retold(answer.status, answer.body, self._exchange.dialect, framing)
            return await self.end(told)
        body = answer.body.strip()
        if kind is Framing.JSON and framing is Framing.NDJSON:
            body = body.replace(b"\n", b" ")  # one document is one record; Ollama ends so at once
        else:
            self.check(kind)
        return await self.end(body + ENDS[framing])

    def check(self, framing: Framing) -> None:
        """
        Whether an answer so framed can still be told.

        Raises:
            CutStream: The head that is out has promised another kind.
        """
        if self._stream is not None and framing is not self._framing:
            who = f"backend {self._exchange.backend}"
            raise CutStream(f"{who} sent one document where a stream was asked for")
