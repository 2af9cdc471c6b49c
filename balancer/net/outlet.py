"""
One answer on its way to a client, framed by us.

Laws:
- Nothing of a backend's framing passes: the head is made of fields, the body is framed anew.
- The head goes out with the first bytes behind it, in one write; each further part is one write.
- Nothing here waits. Whoever writes more than a client reads is told by its `reader`, and what is
  written to a client that has left goes nowhere.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Final

from aiohttp import HttpVersion11, web

from balancer.net.listener import ClientConnection, Reader, Request

_REASONS: Final = {status.value: status.phrase for status in HTTPStatus}
_LINES: Final = {
    code: f"HTTP/1.1 {code} {_REASONS.get(code, 'Unknown')}" for code in range(200, 600)
}
_LAST: Final = b"0\r\n\r\n"


class Dates:
    """The time of day as HTTP tells it, made once a second."""

    def __init__(self, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self._clock = clock
        self._wall = wall
        self._until = -math.inf
        self._text = ""

    def __call__(self) -> str:
        """The time of day, for a header."""
        now = self._clock()
        if now >= self._until:
            wall = self._wall()
            self._until = now + 1.0 - wall % 1.0
            self._text = formatdate(wall, usegmt=True)
        return self._text


class Outlet:
    """
    The answer to one request.

    Args:
        date: The time of day as HTTP tells it.

    Attributes:
        chunks: Takes parts that stand framed as `write` would frame them; None: not now.
        passed_bytes: Of the body so far, what went out that way.
        keep_alive: Another request may follow on the connection.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "_date",
        "_head",
        "_written_bytes",
        "chunks",
        "keep_alive",
        "passed_bytes",
        "request",
    )

    def __init__(self, request: Request, date: Callable[[], str]) -> None:
        self.request = request
        self._connection: ClientConnection = request.connection
        self._date = date
        self._head = b""
        self._chunked = False
        self._written_bytes = self.passed_bytes = 0
        self.chunks: asyncio.Transport | None = None
        self.keep_alive = request.keep_alive

    @property
    def bytes_out(self) -> int:
        """Of the body so far, without its framing."""
        return self._written_bytes + self.passed_bytes

    def read_by(self, reader: Reader) -> None:
        """From now on tell *reader* how the client reads what is written."""
        self._connection.reader = reader
        if self._connection.writing_paused:
            reader.held_up()

    def begin(self, status: int, headers: Mapping[str, str], length: int | None) -> None:
        """
        Set out, in the head's own words; it goes out with what comes first.

        Args:
            length: Bytes of body; None: not known yet.
        """
        request = self.request
        modern = request.version >= HttpVersion11
        lines = [_LINES[status]]
        hidden = request.hidden
        for name, value in headers.items():
            if name not in hidden:
                lines.append(f"{name}: {value}")
        lines.append(f"Date: {self._date()}")
        if length is not None:
            if status != HTTPStatus.NO_CONTENT:  # which may not have one
                lines.append(f"Content-Length: {length}")
        elif modern:
            self._chunked = True
            lines.append("Transfer-Encoding: chunked")
        else:
            self.keep_alive = False
        if not self.keep_alive:
            lines.append("Connection: close")
        elif not modern:
            lines.append("Connection: keep-alive")
        text = "\r\n".join(lines)
        if text.count("\n") != len(lines) - 1 or text.count("\r") != len(lines) - 1:
            raise ValueError("a header with a line end")
        request.begun = True
        self._head = f"{text}\r\n\r\n".encode("utf-8", "surrogateescape")

    def write(self, data: bytes) -> None:
        """Send a part of the body."""
        self._written_bytes += len(data)
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        transport = self._connection.transport
        if self._head:
            data, self._head = self._head + data, b""
            self.chunks = transport if self._chunked else None
        if transport is not None and not transport.is_closing():
            transport.write(data)

    def end(self, last: bytes = b"") -> None:
        """Send the last part, and the body's end."""
        self._written_bytes += len(last)
        self.chunks = None
        if self._chunked:
            last = b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last) if last else _LAST
        if self._head:
            last, self._head = self._head + last, b""
        transport = self._connection.transport
        if last and transport is not None and not transport.is_closing():
            transport.write(last)
        self._connection.reader = None

    @property
    def is_held_up(self) -> bool:
        """Whether the client is behind."""
        return self._connection.writing_paused and self._connection.transport is not None

    async def taken(self) -> None:
        """Wait until the client has taken nearly all; whoever waits is cancelled if it leaves."""
        if self.is_held_up:
            waiting = _Taken()
            self.read_by(waiting)
            await waiting.taken

    def abort(self) -> None:
        """Break the body off: the one way to say that it failed where nothing else can."""
        self._head = b""
        self.chunks = None
        self._connection.reader = None
        self.keep_alive = False
        if self._connection.transport is not None:
            self._connection.transport.abort()


class _Taken:
    """Waits for a client to catch up."""

    def __init__(self) -> None:
        self.taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def held_up(self) -> None:
        """It is."""

    def caught_up(self) -> None:
        """Now it has."""
        if not self.taken.done():
            self.taken.set_result(None)

    def lost(self) -> None:
        """Whoever waits is cancelled with its task."""


class Written(web.StreamResponse):
    """What aiohttp is told of an answer that went out through an outlet."""

    def __init__(self, status: int, outlet: Outlet) -> None:
        super().__init__(status=status)
        self._outlet = outlet

    @property
    def keep_alive(self) -> bool:
        """Whether another request may follow."""
        return self._outlet.keep_alive

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing is left to do."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to do."""
