"""
The listener: aiohttp's server and parser, set up for a proxy.

Laws:
- aiohttp parses every request; no byte of a client is read as HTTP anywhere else.
- A head, a body's framing and a client that does not read are bounded here, for all answers alike.
- A request that can be answered on the spot is: in the turn in which its last byte came, without
  a task of its own. Everything else goes to aiohttp's loop, one request of a connection at a time.

What is private in aiohttp and used here, a test keeps an eye on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from typing import Any, Final, Protocol

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong, PayloadEncodingError
from aiohttp.http_parser import HttpRequestParser, RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import ERROR, RequestHandler

from balancer.net.visitor import Visitor

BACKLOG: Final = 4096
HEAD_END: Final = b"\r\n\r\n"
HEAD_LINES: Final = 4  # how many lines of the longest kind may make up a head
MAX_FRAMING: Final = 64 * 1024  # bytes that frame a body in chunks,
FRAMING_RATIO: Final = 16  # and so many for each byte of it; one chunk per byte takes six
MAX_HEADERS: Final = 128
SMALL: Final = 64 * 1024  # bytes of a body that is waited for without a task,
SMALL_BODY_S: Final = 0.05  # and for how long
WRITE_STALL_S: Final = 60.0  # in which a client must take something
HIGH_WATER, LOW_WATER = 64 * 1024, 16 * 1024  # of what is held for a client
UNSENT: Final = 128 * 1024  # of which the kernel holds so much; a stopped reader costs no more
PLAIN: Final = "text/plain; charset=utf-8"
TOO_LONG: Final = b"431 Request Header Fields Too Large"


def check_parser() -> None:
    """
    Refuse to run on aiohttp's pure-Python parser, which accepts what a proxy must not.

    Raises:
        RuntimeError: The C parser is not there.
    """
    if "_http_parser" not in HttpRequestParser.__module__:
        raise RuntimeError(
            "aiohttp was installed without its C parser; install a binary wheel of aiohttp"
        )


class Reader(Protocol):
    """Whoever writes to a client: told how the client reads."""

    def held_up(self) -> None:
        """It is behind: what is written now is only held for it."""

    def caught_up(self) -> None:
        """It has taken nearly all."""

    def lost(self) -> None:
        """It has gone."""


class Live(Protocol):
    """A request being answered without a task."""

    def gone(self) -> None:
        """Its client has left. The last that it hears."""


class Answering(Protocol):
    """Whoever answers requests."""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one, however long it takes."""

    def at_once(self, request: Request) -> bool:
        """
        Answer one on the spot, or begin to, if that needs no waiting. False: it is for `handle`.

        What has begun is in the connection's `live` until it calls `answered` or `hand_over`;
        `handle` then finds in `request.handed` how to go on.
        """

    def malformed(self, client: str, status: int) -> None:
        """What could not be parsed was answered so."""

    def dropped(self, request: Request) -> None:
        """Its client has left before `handle` could go on with it."""


class Request(web.BaseRequest):
    """
    A request whose answer goes out without the headers that aiohttp adds by itself.

    Attributes:
        begun: The answer's head has gone out.
        hidden: Headers that this client is not sent.
        known_version: It is HTTP/1.0 or 1.1; anything else is answered as 1.0.
        handed: What was begun on the spot and could not be ended there.
    """

    ATTRS = web.BaseRequest.ATTRS | {"begun", "handed", "hidden", "known_version"}
    begun = False
    hidden: tuple[str, ...] = ()
    known_version = True
    handed: Any = None

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        self.begun = True
        response.headers.popall("Server", None)
        for name in self.hidden:
            response.headers.popall(name, None)

    @property
    def connection(self) -> ClientConnection:
        """Where it came from."""
        assert isinstance(self._protocol, ClientConnection)  # noqa: S101 - we make both
        return self._protocol

    def resumed(self, writer: Any, task: Any) -> Request:
        """The same, now that aiohttp answers it."""
        self._payload_writer, self._task = writer, task
        return self


class ClientConnection(RequestHandler):
    """
    One client connection.

    aiohttp uses one time limit both for idle keep-alive and for a head that does not come; a
    short one races the clients' pools, a long one lets half-sent heads sit. It also bounds a
    head's lines and their number but not their sum, and not what frames a body in chunks.

    Args:
        max_head: Bytes of a whole head.

    Attributes:
        reader: Told how the client reads what is written to it.
        live: The request that is being answered without a task.
        visitor: Who asks here, as far as that is remembered.
    """

    __slots__ = (
        "_answering",
        "_at_it",
        "_body",
        "_coming",
        "_framing_bytes",
        "_head_bytes",
        "_head_timer",
        "_is_chunked",
        "_is_started",
        "_last_body",
        "_max_head",
        "_request",
        "_stall_timer",
        "head_timeout_s",
        "live",
        "reader",
        "visitor",
    )

    def __init__(
        self,
        *args: Any,
        answering: Answering,
        head_timeout_s: float,
        max_head: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.head_timeout_s = head_timeout_s
        self._answering = answering
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._max_head = max_head
        self._head_bytes = 0
        self._body: StreamReader | None = None
        self._last_body: Any = None
        self._is_chunked = False  # the last body
        self._coming: StreamReader | None = None  # a small body that is waited for
        self._framing_bytes = 0
        self._at_it = False
        self._is_started = False
        self._request: Request | None = None  # that nobody has begun to answer
        self.reader: Reader | None = None
        self.live: Live | None = None
        self.visitor: Visitor | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client."""
        super().connection_made(transport)
        if self.transport is not None:
            self.transport.set_write_buffer_limits(high=HIGH_WATER, low=LOW_WATER)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        self._arm()

    # -- requests ------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Bytes of it."""
        request, queued, body = self._current_request, len(self._messages), self._last_body
        drains = body is not None and not body.is_eof()  # what comes is no head
        had = body.total_bytes if drains else 0
        waiter, self._waiter = self._waiter, None  # what is answered on the spot wakes nobody
        super().data_received(data)
        self._waiter = waiter
        came = len(self._messages) > queued
        if request is not None and not request.content.is_eof():
            self._check_body(request.content, len(data), broken=came)
        if came and self._messages:
            message, self._last_body = self._messages[-1]
            self._is_chunked = isinstance(message, RawRequestMessage) and message.chunked
        self._answer()
        if came or drains:
            self._head_bytes = 0
            if not self._awaits_body:
                self._disarm()
            if self._goes_on(data, 0 if came else had):
                self._begin_head(1)
        elif data and not self._holds_more:
            self._begin_head(len(data))

    @property
    def _holds_more(self) -> bool:
        """Whether what came has not been parsed, and may be more than a part of a head."""
        return self._buffer_paused or self._upgraded

    def _goes_on(self, data: bytes, had: int) -> bool:
        """
        Whether a read goes on behind the request that ended in it: with a part of a head.

        Args:
            had: Bytes of its body from before.
        """
        body = self._last_body
        if data.endswith(HEAD_END) or body is None or not body.is_eof() or self._holds_more:
            return False
        size = 0 if self._is_chunked else body.total_bytes - had
        return not HEAD_END.endswith(data[: len(data) - size][-len(HEAD_END) :])

    def _begin_head(self, size: int) -> None:
        """So many bytes more of a head that is not complete."""
        self._head_bytes += size
        if self._head_bytes <= self._max_head:
            if self._head_timer is None:
                self._arm()
        elif not self._is_busy:
            self._refuse_head()
        elif self.transport is not None:
            self.transport.abort()  # no answer fits into the one that is under way

    async def start(self) -> None:
        """aiohttp's loop: answers one request after the other."""
        self._is_started = True
        if self.live is not None:  # what came behind it has to wait
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        await super().start()

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - aiohttp's
        """Read on, where reading was paused."""
        # aiohttp calls this for every body read and every body's end, paused or not.
        if self._reading_paused:
            super().resume_reading(resume_parser)

    @property
    def _is_busy(self) -> bool:
        """Whether any request is not answered yet."""
        return bool(self._messages) or self._current_request is not None

    @property
    def _is_idle(self) -> bool:
        """Whether aiohttp's loop has no request, and no other is live."""
        waits = not self._is_started if self._waiter is None else not self._waiter.done()
        return waits and self.live is None and self._request is None

    @property
    def _awaits_body(self) -> bool:
        """Whether a small body is on its way, and no task waits for it."""
        return bool(self._messages) and self._waiter is not None and self._is_idle

    def _answer(self) -> None:
        """Answer what came: on the spot as far as that goes, then by aiohttp's loop."""
        self._at_it = True
        while self._messages and self._is_idle:
            message, body = self._messages[0]
            if _is_coming(message, body):
                self._await_body(body)
                break
            if not self._answer_at_once(message, body):
                self._wake()
                break
        self._at_it = False

    def _await_body(self, body: StreamReader) -> None:
        """Wait for it without a task, once and not for long."""
        if body is not self._coming:
            self._coming = body
            self._disarm()
            self._arm(SMALL_BODY_S)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _answer_at_once(self, message: Any, body: StreamReader) -> bool:
        """Whether it is answered, or being answered; else it is for aiohttp's loop."""
        if (
            not isinstance(message, RawRequestMessage)
            or message.version != HttpVersion11
            or message.upgrade
            or not body.is_eof()
            or self._buffer_paused
            or self._close
            or self._force_close
        ):
            return False
        request = _request(message, body, self, None, None)
        if not self._answering.at_once(request):
            self._request = request
            return False
        self._request_in_progress = self.live is not None
        return True

    def hand_over(self, request: Request) -> None:
        """Let aiohttp's loop go on with a request that was taken on the spot."""
        self.live = self.reader = None
        self._request_in_progress = False
        self._request = request
        self._wake()

    def answered(self, *, keep_alive: bool) -> None:
        """A request that was taken on the spot has been answered."""
        self.live = self.reader = None
        self._messages.popleft()
        if self._parser is not None:  # it stops at as many as wait, and what stops must go on
            self._parser.message_consumed()
        self._request_in_progress = False
        if self._handler_waiter is not None and not self._handler_waiter.done():
            self._handler_waiter.set_result(None)
        if not keep_alive or self._close or self._force_close:
            self.force_close()
        else:
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
            if not self._at_it:
                self._answer()

    def made(self, message: Any, payload: Any, writer: Any, task: Any) -> Request:
        """The request for aiohttp's loop: the one that was made before, if it was."""
        request = self._request
        if request is None or request._message is not message:  # noqa: SLF001 - our own
            request = _request(message, payload, self, writer, task)
        self._request = None if message is ERROR else request  # errors it answers by itself
        return request.resumed(writer, task)

    def picked_up(self) -> None:
        """Somebody answers the request that was made for aiohttp's loop."""
        self._request = None

    # -- limits --------------------------------------------------------------------------------

    def _check_body(self, body: StreamReader, more: int, *, broken: bool) -> None:
        """
        End a body that is damaged, or whose chunks are mostly extensions.

        Args:
            broken: What came could not be parsed; aiohttp tells whoever reads next, not the
                reader of this body, who would wait for the rest of it.
        """
        self._framing_bytes = more + (self._framing_bytes if body is self._body else 0)
        self._body = body
        if broken or self._framing_bytes > MAX_FRAMING + FRAMING_RATIO * body.total_bytes:
            body.set_exception(PayloadEncodingError("bad chunks"))
            self._messages.clear()
            self._lingering_time = 0.0  # there is no telling where it would end

    def _refuse_head(self) -> None:
        """Answer a head that is too long before all of it has come."""
        if self.transport is not None and not self.transport.is_closing():
            peer = self.transport.get_extra_info("peername")
            self._answering.malformed(str(peer[0]) if isinstance(peer, tuple) else "", 431)
            head = f"HTTP/1.0 431 {TOO_LONG.decode()[4:]}\r\nContent-Type: {PLAIN}\r\n"
            head += f"Content-Length: {len(TOO_LONG)}\r\nConnection: close\r\n\r\n"
            self.transport.write(head.encode() + TOO_LONG)
        self.force_close()

    def _arm(self, limit_s: float | None = None) -> None:
        limit_s = self.head_timeout_s if limit_s is None else limit_s
        self._head_timer = self._loop.call_later(limit_s, self._expired)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _expired(self) -> None:
        self._head_timer = None
        if self._awaits_body:
            self._wake()
        elif not self._is_busy:
            self.force_close()
        elif self._head_bytes:
            self._arm()  # for when all before it is answered

    def _process_keepalive(self) -> None:
        if self.live is None and not self._awaits_body:
            super()._process_keepalive()
        else:  # aiohttp takes a connection for idle whose loop waits
            self._keepalive_handle = self._loop.call_later(
                self._keepalive_timeout, self._process_keepalive
            )

    # -- how the client reads ------------------------------------------------------------------

    def force_close(self) -> None:
        """Close it behind what is held for the client, which has to take it."""
        transport = self.transport
        super().force_close()
        if transport is not None:
            if self.live is not None:
                transport.abort()  # whoever answers is not told before all is taken
            elif self._stall_timer is None and transport.get_write_buffer_size():
                self._watch_stall(transport, math.inf)

    def pause_writing(self) -> None:
        """The client is behind."""
        super().pause_writing()
        if self.transport is not None:
            self._watch_stall(self.transport, math.inf)
        if self.reader is not None:
            self.reader.held_up()

    def resume_writing(self) -> None:
        """It has taken nearly all."""
        super().resume_writing()
        if self.transport is not None:  # else it is closing, and has to take all
            self._end_stall()
        if self.reader is not None:
            self.reader.caught_up()

    def _watch_stall(self, transport: asyncio.Transport, before: float) -> None:
        """Give up a client that has taken nothing since *before* so much was held for it."""
        held = transport.get_write_buffer_size()
        if held < before:
            self._stall_timer = self._loop.call_later(
                WRITE_STALL_S, self._watch_stall, transport, held
            )
        else:
            transport.abort()  # closing would wait for it to read

    def _end_stall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def connection_lost(self, exc: BaseException | None) -> None:
        """It has left."""
        self._disarm()
        self._force_close = True
        request, self._request = self._request, None
        if self._awaits_body and request is None:
            request = _request(*self._messages[0], self, None, None)
        if self.reader is not None:
            self.reader.lost()
        if self.live is not None:
            self.live.gone()
            self.live = None
        elif request is not None:
            self._answering.dropped(request)
        super().connection_lost(exc)
        self._end_stall()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - may hold a line of the client's input
    ) -> web.StreamResponse:
        """What cannot be parsed is answered with a fixed text, without what was sent."""
        self.log_exception("Error handling request from %s", request.remote, exc_info=exc)
        if isinstance(exc, LineTooLong):
            status = 431
        if isinstance(exc, HttpProcessingError):
            self._answering.malformed(request.remote or "", status)
        texts = {400: b"400 Bad Request", 431: TOO_LONG}
        response = web.Response(status=status, body=texts.get(status, b"error"))
        response.headers["Content-Type"] = PLAIN
        response.force_close()
        return response


def _is_coming(message: Any, body: StreamReader) -> bool:
    """Whether a small body has begun to come: most clients send it right behind its head."""
    if body.is_eof() or not isinstance(message, RawRequestMessage) or message.chunked:
        return False
    length = message.headers.get("Content-Length", "")
    is_small = length.isascii() and length.isdecimal() and len(length) <= 5 and int(length) <= SMALL
    return is_small and "Expect" not in message.headers


def _request(
    message: Any, body: Any, protocol: ClientConnection, writer: Any, task: Any
) -> Request:
    """What the server makes of a parsed head."""
    known = message.version in (HttpVersion10, HttpVersion11)
    if not known:
        message = message._replace(version=HttpVersion10, should_close=True)
    request = Request(message, body, protocol, writer, task, asyncio.get_running_loop())
    request.known_version = known
    return request


def _made(message: Any, body: Any, protocol: ClientConnection, writer: Any, task: Any) -> Request:
    return protocol.made(message, body, writer, task)


class Server(web.Server):
    """aiohttp's server with our connections."""

    def __init__(self, answering: Answering, *, head_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(answering.handle, request_factory=_made, **kwargs)  # type: ignore[arg-type]
        self._head_timeout_s = head_timeout_s
        self._answering = answering

    def __call__(self) -> RequestHandler:
        """One connection more."""
        return ClientConnection(
            self,
            loop=self._loop,
            answering=self._answering,
            head_timeout_s=self._head_timeout_s,
            max_head=HEAD_LINES * self._kwargs["max_field_size"],
            **self._kwargs,
        )


def make_server(
    answering: Answering, *, keepalive_s: float, head_timeout_s: float, max_header: int
) -> Server:
    """aiohttp's low-level server, set up for a proxy."""
    return Server(
        answering,
        head_timeout_s=head_timeout_s,
        handler_cancellation=True,
        keepalive_timeout=keepalive_s,
        max_line_size=max_header,
        max_field_size=max_header,
        max_headers=MAX_HEADERS,
        auto_decompress=False,
        lingering_time=2.0,
        access_log=None,
        tcp_keepalive=True,
        logger=logging.getLogger("aiohttp.server"),
    )


async def listen(server: Server, sock: socket.socket) -> asyncio.Server:
    """Serve on a bound socket."""
    sock.listen(BACKLOG)  # uvloop keeps it to itself if somebody else was first
    loop = asyncio.get_running_loop()
    return await loop.create_server(server, sock=sock, backlog=BACKLOG)
