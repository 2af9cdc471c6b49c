"""An HTTP/1.1 server on raw sockets, framed as Go's: headers in its order, one write one chunk.

Everything happens in callbacks of the running loop and at once: no task, no await. That leaves
room for what a well-behaved server never does: resets, cuts, garbage and standing still.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal
from urllib.parse import unquote

Headers = Sequence[tuple[str, str]]
Framing = Literal["length", "chunked", "close", "none"]

BUFFERED_BYTES = 2048
"""A longer body than this goes out chunked."""
HIGH_WATER_BYTES = 1 << 16
_HEAD_LIMIT_BYTES = 1 << 20
_READ_BYTES = 1 << 18
_LINGER_BYTES = 1 << 18  # of a body nobody wants, read before the connection is closed
_NO_LINGER = struct.pack("ii", 1, 0)


class BadRequestError(Exception):
    """What Go's server refuses by itself: `args` are the status and a detail."""


@dataclass(slots=True)
class Request:
    """A request with its body."""

    method: str
    target: str
    version: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    @property
    def path(self) -> str:
        """The decoded path."""
        return unquote(self.target.partition("?")[0])

    @property
    def query(self) -> str:
        """What follows the `?`, with it, or nothing."""
        _, mark, query = self.target.partition("?")
        return mark + query

    def get(self, name: str) -> str | None:
        """The first header of that name in lower case."""
        return next((value for key, value in self.headers if key.lower() == name), None)

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection outlives the answer."""
        return self.version == "HTTP/1.1" and (self.get("connection") or "").lower() != "close"


class Exchange:
    """One request and the answer being made to it."""

    def __init__(self, connection: "Connection", request: Request) -> None:
        self.request = request
        self.on_gone: Callable[[], None] | None = None
        """The client hung up before the end."""
        self.on_drain: Callable[[], None] | None = None
        """The client reads again after `paused`."""
        self.on_end: Callable[[], None] | None = None
        """The last byte was handed to the kernel's care, or the connection broken off."""
        self.on_body: Callable[[bytes], None] | None = None
        """A piece of a body that is streamed (`Server.streams`)."""
        self.on_body_end: Callable[[], None] | None = None
        self.started = False
        self.ended = False
        self._connection = connection
        self._chunked = False
        self._silent = request.method == "HEAD"
        self._closes = not request.keeps_alive

    @property
    def paused(self) -> bool:
        """The client does not read what was written."""
        return self._connection.backlog_bytes > HIGH_WATER_BYTES

    def reply(self, status: int, headers: Headers, body: bytes = b"") -> None:
        """A whole answer, framed by its size."""
        if status == 204:
            self.start(status, headers, "none")
        elif len(body) > BUFFERED_BYTES:
            self.start(status, headers, "none" if self._silent else "chunked")
        else:
            self.start(status, headers, "length", len(body))
        self.write(body)
        self.finish()

    def start(
        self,
        status: int,
        headers: Headers,
        framing: Framing,
        length: int = 0,
        reason: str | None = None,
    ) -> None:
        """The head. `close` frames by closing the connection, `none` says there is no body."""
        self.started = True
        if framing == "chunked" and self.request.version == "HTTP/1.0":
            framing = "close"
        self._chunked = framing == "chunked"
        self._silent = self._silent or framing == "none"
        self._closes = self._closes or framing == "close" or self._connection.is_receiving
        lines = [f"HTTP/1.1 {status} {reason or HTTPStatus(status).phrase}"]
        if self.request.version == "HTTP/1.0":
            lines = [lines[0].replace("HTTP/1.1", "HTTP/1.0", 1)]
        lines += [f"{name}: {value}" for name, value in headers]
        lines.append(f"Date: {self._connection.server.date()}")
        if framing == "length":
            lines.append(f"Content-Length: {length}")
        if self._closes and self.request.version == "HTTP/1.1":
            lines.append("Connection: close")
        if framing == "chunked":
            lines.append("Transfer-Encoding: chunked")
        lines.append("\r\n")
        self._connection.send("\r\n".join(lines).encode("latin-1"))

    def write(self, data: bytes) -> None:
        """Body bytes: in chunked framing one chunk."""
        if not data or self._silent or self.ended:
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._connection.send(data)

    def finish(self) -> None:
        """The end, as it should be."""
        if self._chunked and not self._silent and not self.ended:
            self._connection.send(b"0\r\n\r\n")
        self._end()
        if self._closes:
            self._connection.close()
        else:
            self._connection.next_request()

    def cut(self) -> None:
        """Closes the connection where it stands."""
        self._end()
        self._connection.close()

    def reset(self) -> None:
        """Resets the connection."""
        self._end()
        self._connection.reset()

    def go_on(self) -> None:
        """Asks a client that waits for it to send its body."""
        if (self.request.get("expect") or "").lower() == "100-continue":
            self._connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def raw(self, data: bytes) -> None:
        """Bytes outside all framing."""
        self.started = True
        self._connection.send(data)

    def gone(self) -> None:
        """The client has hung up (called by the connection)."""
        if not self.ended:
            self.ended = True
            if self.on_gone is not None:
                self.on_gone()

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            if self.on_end is not None:
                self.on_end()


class Connection:
    """One accepted socket: parses requests one after the other, never two at a time."""

    def __init__(self, server: "Server", sock: socket.socket) -> None:
        self.server = server
        self.exchange: Exchange | None = None
        self._sock = sock
        self._in = bytearray()
        self._out = bytearray()
        self._is_closing = False
        self._is_parsing = False
        self._writes = False
        self._intake: _Intake | None = None
        self._linger_bytes = _LINGER_BYTES
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not server.frozen:
            self.thaw()

    @property
    def backlog_bytes(self) -> int:
        """What the kernel has not taken yet."""
        return len(self._out)

    @property
    def is_receiving(self) -> bool:
        """A streamed body has not come to its end."""
        return self._intake is not None

    @property
    def _closed(self) -> bool:
        return self._sock.fileno() < 0

    # -- standing still -------------------------------------------------------------------------

    def freeze(self) -> None:
        """Neither reads nor writes."""
        self.server.loop.remove_reader(self._sock)
        self._stop_writing()

    def thaw(self) -> None:
        """Reads and writes again."""
        self.server.loop.add_reader(self._sock, self._readable)
        self._flush()

    # -- reading --------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data and self._is_closing:
            self._linger_bytes -= len(data)
            if self._linger_bytes <= 0:
                self._destroy()
        elif data:
            self._in += data
            self._receive()
            self.next_request()
        else:
            self._lose()

    def _receive(self) -> None:
        """Hands on what there is of a streamed body."""
        intake, exchange = self._intake, self.exchange
        if intake is None or exchange is None:
            return
        try:
            for piece in intake.feed(self._in):
                if exchange.on_body is not None and not exchange.ended:
                    exchange.on_body(piece)
        except BadRequestError as error:
            self._refuse(*error.args)
            return
        if intake.done:
            self._intake = None
            if exchange.on_body_end is not None and not exchange.ended:
                exchange.on_body_end()

    def next_request(self) -> None:
        """Goes on to the next request if the last one is answered and the next one is here."""
        if self._is_parsing:
            return
        self._is_parsing = True
        try:
            while not self._closed and not self._is_closing:
                if self.exchange is not None and not self.exchange.ended:
                    return
                self.exchange = None
                if self.server.closes_idle and not self._in:
                    self.close()
                    return
                request = self._parse()
                if request is None:
                    return
                self.exchange = Exchange(self, request)
                self.server.app(self.exchange)
                self._receive()
        except BadRequestError as error:
            self._refuse(*error.args)
        finally:
            self._is_parsing = False

    def _parse(self) -> Request | None:
        head_end = self._in.find(b"\r\n\r\n")
        if head_end < 0:
            if len(self._in) > _HEAD_LIMIT_BYTES:
                raise BadRequestError(431, "")
            return None
        request = _parse_head(bytes(self._in[:head_end]))
        start = head_end + 4
        if self.server.streams(request):
            self._intake = _Intake(request)
            del self._in[:start]
            return request
        coding = (request.get("transfer-encoding") or "").lower()
        if coding == "chunked":
            body, end = _dechunk(self._in, start)
        else:
            length = request.get("content-length") or "0"
            if not length.isdecimal():
                raise BadRequestError(400, "")
            end = start + int(length)
            body = bytes(self._in[start:end]) if end <= len(self._in) else None
        if body is None:
            self._continue(request, held=len(self._in) == start)
            return None
        request.body = body
        del self._in[:end]
        return request

    def _continue(self, request: Request, *, held: bool) -> None:
        if held and (request.get("expect") or "").lower() == "100-continue":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _refuse(self, status: int, detail: str) -> None:
        """As Go's own server refuses: no length, no date, then the connection is closed."""
        text = f"{status} {HTTPStatus(status).phrase}" + (f": {detail}" if detail else "")
        self.send(
            f"HTTP/1.1 {text}\r\nContent-Type: text/plain; charset=utf-8\r\n"
            f"Connection: close\r\n\r\n{text}".encode()
        )
        self.close()

    # -- writing --------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Bytes for the client, in the kernel's hands at once if it takes them."""
        if self._closed or self._is_closing:
            return
        if self._out or self.server.frozen:
            self._out += data
            return
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._lose()
            return
        if sent < len(data):
            self._out += memoryview(data)[sent:]
            self._flush()

    def _flush(self) -> None:
        if self._closed or self.server.frozen:
            return
        if self._out:
            was_paused = len(self._out) > HIGH_WATER_BYTES
            try:
                del self._out[: self._sock.send(self._out)]
            except BlockingIOError:
                pass
            except OSError:
                self._lose()
                return
            if was_paused and len(self._out) <= HIGH_WATER_BYTES:
                self._drained()
        if self._out and not self._writes:
            self._writes = True
            self.server.loop.add_writer(self._sock, self._flush)
        elif not self._out:
            self._stop_writing()
            if self._is_closing:
                self._shut()

    def _drained(self) -> None:
        if self.exchange is not None and self.exchange.on_drain is not None:
            self.exchange.on_drain()

    def _stop_writing(self) -> None:
        if self._writes:
            self._writes = False
            self.server.loop.remove_writer(self._sock)

    # -- ends -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Closes once all is written; what is still being sent is read for a while."""
        self._is_closing = True
        if not self._out:
            self._shut()

    def _shut(self) -> None:
        if self._intake is None:
            self._destroy()
            return
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def drop(self) -> None:
        """Closes at once; a running exchange ends where it stands."""
        if self.exchange is not None and not self.exchange.ended:
            self.exchange.cut()
        self._destroy()

    def reset(self) -> None:
        """Sends RST."""
        if not self._closed:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            self._destroy()

    def _lose(self) -> None:
        """The client has gone."""
        self._destroy()
        if self.exchange is not None:
            self.exchange.gone()

    def _destroy(self) -> None:
        if self._closed:
            return
        self.server.loop.remove_reader(self._sock)
        self._stop_writing()
        self._sock.close()
        self.server.connections.pop(self, None)


class Server:
    """A listening socket that can be closed and bound to the same port again."""

    def __init__(
        self,
        app: Callable[[Exchange], None],
        *,
        date: Callable[[], str],
        loop: asyncio.AbstractEventLoop,
        streams: Callable[[Request], bool] = lambda _: False,
    ) -> None:
        self.app = app
        self.streams = streams
        """Whether a request is handed on before its body has come."""
        self.date = date
        self.loop = loop
        self.connections: dict[Connection, None] = {}
        self.accepted = 0
        self.frozen = False
        self.closes_idle = False
        self._listener: socket.socket | None = None

    def listen(self, host: str, port: int) -> int:
        """Binds and accepts; returns the port."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
            sock.listen(1024)
        except OSError:
            sock.close()
            raise
        self._listener = sock
        self.closes_idle = False
        if not self.frozen:
            self.loop.add_reader(sock, self._accept, sock)
        port_bound: int = sock.getsockname()[1]
        return port_bound

    @property
    def listening(self) -> bool:
        """Whether new connections are taken."""
        return self._listener is not None

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(100):
            try:
                accepted, _ = sock.accept()
            except OSError:
                return
            self.accepted += 1
            self.connections[Connection(self, accepted)] = None

    def refuse(self) -> None:
        """Stops listening and closes idle connections; the others close after their answer."""
        self._close_listener()
        self.closes_idle = True
        for connection in list(self.connections):
            connection.next_request()

    def _close_listener(self) -> None:
        if self._listener is not None:
            self.loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def drop_all(self) -> None:
        """Closes every connection where it stands."""
        for connection in list(self.connections):
            connection.drop()

    def freeze(self) -> None:
        """Stands still; the kernel goes on accepting into its backlog."""
        self.frozen = True
        if self._listener is not None:
            self.loop.remove_reader(self._listener)
        for connection in self.connections:
            connection.freeze()

    def thaw(self) -> None:
        """Goes on."""
        self.frozen = False
        if self._listener is not None:
            self.loop.add_reader(self._listener, self._accept, self._listener)
        for connection in list(self.connections):
            connection.thaw()

    def close(self) -> None:
        """Stops listening and drops everything."""
        self._close_listener()
        self.drop_all()


class _Intake:
    """Takes a body off the wire as it comes."""

    def __init__(self, request: Request) -> None:
        length = request.get("content-length") or "0"
        self._is_chunked = (request.get("transfer-encoding") or "").lower() == "chunked"
        if not self._is_chunked and not length.isdecimal():
            raise BadRequestError(400, "")
        self._left = 0 if self._is_chunked else int(length)
        self.done = not self._is_chunked and not self._left

    def feed(self, data: bytearray) -> Iterable[bytes]:
        """What of `data` is body; it is taken out of it."""
        while data and not self.done:
            if self._left:
                piece = bytes(data[: self._left])
                del data[: len(piece)]
                self._left -= len(piece)
                self.done = not self._left and not self._is_chunked
                yield piece
            elif not self._next_chunk(data):
                return

    def _next_chunk(self, data: bytearray) -> bool:
        """Reads the line before a chunk, and the one behind the last."""
        if data[:2] == b"\r\n":
            del data[:2]
        line_end = data.find(b"\r\n")
        if line_end < 0:
            return False
        try:
            self._left = int(data[:line_end].partition(b";")[0], 16)
        except ValueError:
            raise BadRequestError(400, "") from None
        if not self._left:
            if data[line_end + 2 : line_end + 4] != b"\r\n":
                return False
            line_end += 2
            self.done = True
        del data[: line_end + 2]
        return True


def _parse_head(head: bytes) -> Request:
    first, *lines = head.decode("latin-1").lstrip("\r\n").split("\r\n")
    with contextlib.suppress(ValueError):
        method, target, version = first.split(" ")
        headers = list(_header_pairs(lines))
        if version not in {"HTTP/1.0", "HTTP/1.1"}:
            raise BadRequestError(505, "unsupported protocol version")
        request = Request(method, target, version, headers)
        if request.get("host") is None and version == "HTTP/1.1":
            raise BadRequestError(400, "missing required Host header")
        return request
    raise BadRequestError(400, "")


def _header_pairs(lines: Iterable[str]) -> Iterable[tuple[str, str]]:
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or name.split() != [name]:
            raise BadRequestError(400, "")
        yield name, value.strip()


def _dechunk(data: bytearray, start: int) -> tuple[bytes | None, int]:
    """The body of a chunked message and where it ends; None if more must come."""
    parts: list[bytes] = []
    while (line_end := data.find(b"\r\n", start)) >= 0:
        try:
            size = int(data[start:line_end].partition(b";")[0], 16)
        except ValueError:
            raise BadRequestError(400, "") from None
        start, end = line_end + 2, line_end + 2 + size
        if size == 0:
            trailer_end = data.find(b"\r\n", start)
            while trailer_end > start:
                start, trailer_end = trailer_end + 2, data.find(b"\r\n", trailer_end + 2)
            return (b"".join(parts), start + 2) if trailer_end == start else (None, start)
        if len(data) < end + 2:
            break
        parts.append(bytes(data[start:end]))
        start = end + 2
    return None, start
