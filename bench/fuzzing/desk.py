"""
A client's connection without a socket, a loop whose time is not real, and who answers there.
"""

from __future__ import annotations

import asyncio
import logging
import selectors
import zlib
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, PayloadEncodingError

from balancer.net.listener import HIGH_WATER, Request
from balancer.net.outlet import Outlet

BODY_S = 30.0  # in which a body has to come
KINDS = ("now", "now", "live", "task", "hand", "late", "skip", "big")  # how a path is answered
BIG_BYTES = 200_000


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: by which it is known again in its answer."""

    method: str
    path: str
    body: bytes

    @property
    def mark(self) -> bytes:
        """What its answer says."""
        body = b"" if self.path.startswith("/skip") else self.body
        return f"{self.method} {self.path} {len(body)} {zlib.crc32(body):x}".encode()


class JumpingSelector(selectors.DefaultSelector):
    """No sockets are here: asked to wait, it moves the clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Nothing is ever ready."""
        assert timeout is not None, "everything waits for ever"
        self.now += max(timeout, 0.0)
        return []


class StillLoop(asyncio.SelectorEventLoop):
    """Its time passes only where nothing else is to be done."""

    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Virtual seconds."""
        return self._jumping.now


class Line(asyncio.Transport):
    """
    What a client's connection is to the server.

    Args:
        slow_s: After which what was written is taken; None: at once.
    """

    def __init__(self, slow_s: float | None) -> None:
        super().__init__({"peername": ("192.0.2.7", 4711), "sockname": ("192.0.2.1", 80)})
        self._loop = asyncio.get_running_loop()
        self._slow_s = slow_s
        self._held = 0
        self._paused = False
        self._closing = False
        self.protocol: Any = None
        self.written = bytearray()
        self.reading = True
        self.closed_at: float | None = None
        self.closed = asyncio.Event()
        self.wrote_at = 0.0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take it."""
        assert not self._closing, "written to, though it is closed"
        self.written += data
        self.wrote_at = self._loop.time()
        if self._slow_s is not None:
            if not self._held:
                self._loop.call_later(self._slow_s, self._take)
            self._held += len(data)
            if self._held > HIGH_WATER and not self._paused:
                self._paused = True
                self.protocol.pause_writing()

    def writelines(self, parts: Any) -> None:
        """The same."""
        self.write(b"".join(parts))

    def _take(self) -> None:
        self._held = 0
        if self.closed_at is not None:
            return
        if self._paused:
            self._paused = False
            self.protocol.resume_writing()
        if self._closing and not self._held:
            self.lose(None)

    def close(self) -> None:
        """Close it behind what is held."""
        if not self._closing:
            self._closing = True
            if not self._held:
                self._loop.call_soon(self.lose, None)

    def abort(self) -> None:
        """Close it at once."""
        self._closing = True
        self._loop.call_soon(self.lose, None)

    def lose(self, error: Exception | None) -> None:
        """It is gone."""
        self._closing = True
        if self.closed_at is None:
            self.closed_at = self._loop.time()
            self.closed.set()
            self.protocol.connection_lost(error)

    def is_closing(self) -> bool:
        """Whether it is of no more use."""
        return self._closing

    def get_write_buffer_size(self) -> int:
        """What is held."""
        return self._held

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """They are ours."""

    def pause_reading(self) -> None:
        """Read no more."""
        self.reading = False

    def resume_reading(self) -> None:
        """Read on."""
        self.reading = True

    def is_reading(self) -> bool:
        """Whether it is read."""
        return self.reading


class Call:
    """A request that is answered later, without a task."""

    def __init__(self, desk: Desk, request: Request, body: bytes) -> None:
        self._desk, self._request, self._body = desk, request, body
        self._timer = asyncio.get_running_loop().call_later(0.2, self._answer)
        request.connection.live = self

    def gone(self) -> None:
        """Its client has left."""
        self._timer.cancel()
        self._desk.open.remove(self._request)

    def _answer(self) -> None:
        self._desk.answer(self._request, self._body)


class Desk:
    """
    Answers requests; what their paths begin with says how.

    Attributes:
        open: Those that were begun and not ended.
        done: Those that were answered, in that order; a body that came damaged is None.
    """

    def __init__(self) -> None:
        self.open: list[Request] = []
        self.done: list[tuple[str, str, bytes | None]] = []

    def at_once(self, request: Request) -> bool:
        """On the spot, or begun there."""
        assert request.content.is_eof(), "asked for before the body was there"
        assert not self.open, "asked for while another is under way"
        how = request.raw_path[1:5]
        if how in ("task", "late", "skip") or request.content.exception() is not None:
            return False
        self.open.append(request)
        body = request.content.read_nowait()
        if how == "live":
            Call(self, request, body)
        elif how == "hand":
            request.handed = body
            request.connection.hand_over(request)
        else:
            self.answer(request, body)
        return True

    def answer(self, request: Request, body: bytes) -> None:
        """Answer it without a task."""
        outlet, said = Outlet(request, str), self._said(request, body)
        outlet.begin(200, {}, len(said))
        outlet.end(b"" if request.method == "HEAD" else said)
        self.open.remove(request)
        request.connection.answered(keep_alive=outlet.keep_alive)

    def _said(self, request: Request, body: bytes) -> bytes:
        self.done.append((request.method, request.raw_path, body))
        said = Asked(request.method, request.raw_path, body).mark
        return said + b"." * (BIG_BYTES if request.raw_path.startswith("/big") else 0)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """In a task."""
        assert isinstance(request, Request)
        request.connection.picked_up()
        if request.handed is None:
            assert not self.open, "asked for while another is under way"
            self.open.append(request)
        try:
            return await self._answered(request)
        except (PayloadEncodingError, TimeoutError):
            self.done.append((request.method, request.raw_path, None))
            response = web.Response(status=400, body=b"damaged")
            response.force_close()
            return response
        finally:
            self.open.remove(request)

    async def _answered(self, request: Request) -> web.StreamResponse:
        if request.raw_path.startswith("/late"):
            await asyncio.sleep(1.0)
        body = request.handed
        if body is None:
            body = b"" if request.raw_path.startswith("/skip") else await _whole(request)
        return web.Response(body=self._said(request, body))

    def malformed(self, client: str, status: int) -> None:
        """It could not be parsed."""
        assert (client, status // 100) == ("192.0.2.7", 4)

    def dropped(self, request: Request) -> None:
        """Its client has left before a task had it."""
        if request in self.open:
            self.open.remove(request)


async def _whole(request: Request) -> bytes:
    body = b""
    async with asyncio.timeout(BODY_S):
        while part := await request.content.readany():
            body += part
    return body


class Ear(logging.Handler):
    """Hears what libraries complain of; of what could not be parsed they may."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, HttpProcessingError):
            self.heard.append(f"{record.getMessage()} {error!r}")
