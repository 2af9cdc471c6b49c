"""
One transaction with a backend, and the connection it goes over.

Laws:
- A connection carries at most one transaction at a time, and is parsed anew for each.
- A transaction is detached before anybody is told of its end: whoever is told may begin the next
  one at once, over this very connection.
- Callbacks of the parser only take notes. The sink is called when the parser has returned; after
  each call of it, look whether the transaction is still there.
- A read that does not parse, and whatever stood before in it, is not forwarded.
- A chunk that is passed on with its framing is, byte by byte, what we would have made of it: it
  came whole in a read of its own, where the parser stood at a chunk's beginning.
- What is not beyond doubt is not used again: only a whole answer of known length, behind which
  nothing came but line ends, over which the parser passes, to a request that was sent whole.
- Bytes that nobody asked for close the connection.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from balancer.core.verdicts import Failure, FailureKind
from balancer.net.connecting import told
from balancer.net.wheel import Wheel

SEND_STALL_S: Final = 30.0
SEND_BYTES_PER_S: Final = 1e6  # slower than any network that a model is served over
STALE_S: Final = 5.0  # what is lost later was not lost already when we sent
JOINED_BYTES: Final = 64 * 1024  # head and body go out in one write up to here
PIECE_BYTES: Final = 256 * 1024
HIGH_WATER: Final = 64 * 1024
LOW_WATER: Final = 16 * 1024
MAX_HEAD_BYTES: Final = 64 * 1024  # also of anything else in an answer that is not its body
MAX_HEADERS: Final = 128
MAX_INTERIM: Final = 8
EMPTY_INTERIM: Final = (100, 102, 103)  # of which the parser knows that they have no body
CHUNK_MAX: Final = 0xFFF  # bytes of the longest chunk that may be passed on with its framing
CHUNK_READ: Final = CHUNK_MAX + 8  # the read that holds it is shorter
STOPPED: Final = Failure(FailureKind.CUT, "the balancer stopped")
FAILED: Final = Failure(FailureKind.CUT, "the balancer failed")


def _heads() -> list[bytes]:
    """The first line of a chunk of ours, by the size of all of it; some sizes none has."""
    heads = [b"\n"] * CHUNK_READ  # which no line holds
    for size in range(1, CHUNK_MAX + 1):
        head = b"%x\r" % size
        heads[len(head) + size + 3] = head
    return heads


HEADS: Final = _heads()


class Sink(Protocol):
    """Who receives what a backend answers. Methods are synchronous and do not raise."""

    def head(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        """The answer's head."""

    def data(self, data: bytes) -> None:
        """Bytes of its body, de-chunked, as they came."""

    def end(self) -> None:
        """It is complete."""

    def fail(self, failure: Failure) -> None:
        """It is not, and will not be."""


class Chunks(Protocol):
    """Who receives a body in chunks, where it comes in such."""

    def chunk(self, data: bytes, lines: list[bytes]) -> None:
        """A whole chunk, and its lines: of the body are all but the first and the last two."""


class Handle(Protocol):
    """One transaction under way."""

    def pause(self) -> None:
        """Stop reading from the backend."""

    def resume(self) -> None:
        """Go on reading."""

    def turn(self, sink: Sink) -> None:
        """What comes from now on is for *sink*."""

    def pass_chunks(self, chunks: Chunks) -> None:
        """What may be passed on with its framing is for *chunks*; all else is for the sink."""

    def moved_at(self) -> float:
        """When anything last moved on the way to the backend or back."""

    def abort(self) -> None:
        """Close the connection at once; the sink hears nothing more. Idempotent."""


class Home(Protocol):
    """Where a connection belongs."""

    def back(self, connection: BackendConnection) -> None:
        """It is free, and may be used again."""

    def lost(self, connection: BackendConnection) -> None:
        """It is closed, and carried nothing."""

    def stale(self, transaction: Transaction) -> None:
        """The request met a connection that was closed already: nobody has seen it."""


class Transaction:
    """
    One call: the handle that steers it. Over once it has no sink.

    Args:
        head: Of the request.
        bare: The answer has no body, whatever its head says: HEAD.
        patient: Silence before the answer's head has no limit; else that of any other.
        idle_s: Longest silence; None: any.
    """

    __slots__ = (
        "bare",
        "body",
        "chunks",
        "connecting",
        "connection",
        "head",
        "idle_s",
        "patient",
        "paused",
        "sink",
        "wheel",
    )

    def __init__(
        self,
        sink: Sink,
        head: bytes,
        body: bytes | bytearray,
        wheel: Wheel,
        *,
        bare: bool,
        patient: bool,
        idle_s: float | None,
    ) -> None:
        self.sink: Sink | None = sink
        self.head = head
        self.body = body
        self.wheel = wheel
        self.bare = bare
        self.patient = patient
        self.idle_s = math.inf if idle_s is None else idle_s
        self.paused = False
        self.chunks: Chunks | None = None
        self.connection: BackendConnection | None = None
        self.connecting: asyncio.Task[None] | None = None
        wheel.add(self)

    def pause(self) -> None:
        """Stop reading."""
        if not self.paused:
            self.paused = True
            if self.connection is not None:
                self.connection.hold()

    def resume(self) -> None:
        """Go on reading; the time until now was no silence of the backend's."""
        if self.paused:
            self.paused = False
            if self.connection is not None:
                self.connection.release()

    def turn(self, sink: Sink) -> None:
        """What comes from now on is for *sink*."""
        if self.sink is not None:
            self.sink = sink

    def pass_chunks(self, chunks: Chunks) -> None:
        """What may be passed on with its framing is for *chunks*; all else is for the sink."""
        if self.sink is not None:
            self.chunks = chunks

    def moved_at(self) -> float:
        """When anything last moved; -inf: there is no connection."""
        return -math.inf if self.connection is None else self.connection.touched

    def abort(self) -> None:
        """Give up."""
        self.leave()

    def fail(self, failure: Failure) -> None:
        """Give up and say so."""
        sink = self.leave()
        if sink is not None:
            sink.fail(failure)

    def leave(self) -> Sink | None:
        """End, and close the connection, made or being made; whom to tell, None: nobody."""
        sink, self.sink, self.chunks = self.sink, None, None
        self.wheel.discard(self)
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.drop()
        connecting, self.connecting = self.connecting, None
        if connecting is not None:
            connecting.cancel()
        return sink

    def due(self) -> float:
        """See the wheel; connecting has limits of its own."""
        return math.inf if self.connection is None else self.connection.due(self)

    def expire(self) -> None:
        """Our limit was passed."""
        if self.connection is not None:
            self.fail(self.connection.overdue())


class _OddError(Exception):
    """Legal to the parser, not to us."""


class BackendConnection(asyncio.Protocol):
    """
    One connection to a backend.

    Attributes:
        born_at: When it was made.
        idle_since: When it ended its last transaction.
        touched: When anything last moved on it.
        epoch: For its home: what it has lived through.
    """

    __slots__ = (
        "_chunked",
        "_chunks",
        "_clock",
        "_head_bytes",
        "_headers",
        "_heard",
        "_home",
        "_interim",
        "_is_interim",
        "_keep",
        "_marks",
        "_over",
        "_parser",
        "_parts",
        "_quiet_bytes",
        "_rest",
        "_send_by",
        "_sent",
        "_sized",
        "_status",
        "_told",
        "_transaction",
        "_transport",
        "_used",
        "_why",
        "_writable",
        "born_at",
        "epoch",
        "idle_since",
        "on_body",
        "on_chunk_complete",
        "on_chunk_header",
        "touched",
    )

    def __init__(self, home: Home, clock: Callable[[], float], epoch: int = 0) -> None:
        self._home = home
        self._clock = clock
        self.epoch = epoch
        self.born_at = self.idle_since = self.touched = clock()
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._transaction: Transaction | None = None
        self._parser: Any = None
        self._parts: list[bytes] = []
        self.on_body = self._parts.append
        self._chunks: Chunks | None = None  # while a read may be a chunk of its own
        self._marks: list[None] = []  # not empty: a chunk has ended, and no other has begun
        self.on_chunk_header = self._marks.clear
        self.on_chunk_complete = partial(self._marks.append, None)
        self._rest: memoryview | None = None
        self._send_by = math.inf
        self._used = False
        self._writable = True
        self._sent = False
        self._reset()

    def _reset(self) -> None:
        """Ready to parse an answer."""
        self._headers: list[tuple[str, str]] = []
        self._status = 0
        self._told = False
        self._over = False
        self._keep = False
        self._heard = False
        self._chunked = False
        self._sized = False
        self._chunks = None
        self._marks.clear()
        self._is_interim = False
        self._interim = 0
        self._head_bytes = 0
        self._quiet_bytes = 0
        self._why = ""

    # -- its life ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It stands."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(HIGH_WATER, LOW_WATER)

    @property
    def is_closing(self) -> bool:
        """It is of no more use."""
        return self._transport.is_closing()

    @property
    def is_busy(self) -> bool:
        """It carries a transaction."""
        return self._transaction is not None

    def drop(self) -> None:
        """Close it at once."""
        self._transaction = self._chunks = None
        self._rest = None
        self._transport.abort()

    def eof_received(self) -> None:
        """The backend sends no more; what we still have to send would be in vain."""
        self._gone(None)
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        self._gone(exc)
        self._parser = None

    def _gone(self, error: Exception | None) -> None:
        transaction = self._transaction
        if transaction is None:
            self._home.lost(self)
        elif self._told and not (self._sized or self._chunked) and error is None:
            self._over = True  # this is how an answer without a length ends
            self._finish(transaction)
        elif self._used and not self._heard and self._clock() - self.touched <= STALE_S:
            self._transaction = transaction.connection = self._chunks = None
            self._rest = None
            self._home.stale(transaction)
        else:
            kind = FailureKind.CUT if self._told else FailureKind.RESET
            detail = "" if error is None else told(error)
            transaction.fail(Failure(kind, detail, accepted=self._sent))

    # -- the request ---------------------------------------------------------------------------

    def begin(self, transaction: Transaction) -> None:
        """Carry it; the request is written before this returns, as far as it can be."""
        self._transaction = transaction
        transaction.connection = self
        self.touched = self._clock()
        self._reset()
        self._parser = HttpResponseParser(self)
        self._sent = False
        if self._transport.is_closing():
            self._gone(None)
            return
        if transaction.paused:
            self._transport.pause_reading()
        if len(transaction.body) <= JOINED_BYTES:
            self._transport.write(transaction.head + transaction.body)
        else:
            self._transport.write(transaction.head)
            self._rest = memoryview(transaction.body)
        self._push()
        if not self._sent:
            self._send_by = self.touched + SEND_STALL_S + len(transaction.body) / SEND_BYTES_PER_S
            transaction.wheel.by(self._send_by)

    def pause_writing(self) -> None:
        """The transport holds enough."""
        self._writable = False

    def resume_writing(self) -> None:
        """It has room again."""
        self._writable = True
        if self._transaction is not None and not self._sent and not self._told:
            self._push()

    def _push(self) -> None:
        """Send what the transport takes; then it is the backend's turn."""
        rest = self._rest
        while self._writable and rest:
            if self._transport.is_closing():
                return
            self._rest = rest[PIECE_BYTES:]
            self._transport.write(rest[:PIECE_BYTES])
            rest = self._rest
        transaction = self._transaction
        if not self._writable or transaction is None:
            return
        self._rest = None
        self._sent = True
        if not transaction.patient:
            self.touched = self._clock()
            transaction.wheel.by(self.due(transaction))

    # -- limits --------------------------------------------------------------------------------

    def due(self, transaction: Transaction) -> float:
        """When the limit of the present phase passes."""
        if transaction.paused:  # the client is slow, not the backend
            return math.inf
        if self._told:
            return self.touched + transaction.idle_s
        if not self._sent:
            return self._send_by
        return math.inf if transaction.patient else self.touched + transaction.idle_s

    def overdue(self) -> Failure:
        """What it means that it has passed."""
        sent = self._sent or self._told
        kind = FailureKind.IDLE if sent else FailureKind.SEND_STALL
        return Failure(kind, accepted=self._sent)

    def hold(self) -> None:
        """Read no more; one more read may still come, and is taken."""
        self._transport.pause_reading()

    def release(self) -> None:
        """Read on."""
        self._transport.resume_reading()
        transaction = self._transaction
        if transaction is not None:
            self.touched = self._clock()
            transaction.wheel.by(self.due(transaction))

    # -- the answer ----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """A read: parse it, then tell what it held."""
        if self._chunks is not None and len(data) < CHUNK_READ:
            lines = data.split(b"\n")
            if lines[0] == HEADS[len(data)] and not lines[-1] and lines[-2] == b"\r":
                self.touched = self._clock()
                try:
                    self._chunks.chunk(data, lines)
                except Exception:
                    if self._transaction is not None:
                        self._transaction.fail(FAILED)
                    raise
                return
        transaction = self._transaction
        if transaction is None:
            self.drop()
            return
        self.touched = self._clock()
        self._heard = True
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self._garbled(transaction, self._why or str(error))
            return
        try:
            self._tell(transaction, data)
        except Exception:
            transaction.fail(FAILED)  # a bug of ours; whoever waits must not wait for ever
            raise

    def _tell(self, transaction: Transaction, read: bytes) -> None:
        sink = transaction.sink
        if sink is None:
            return
        if self._status and not self._told:
            self._begun(transaction)
            sink.head(self._status, self._headers)
            if self._transaction is not transaction or transaction.sink is None:
                return
            sink = transaction.sink
        parts = self._parts
        if parts:
            self._quiet_bytes = 0
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()
            sink.data(data)
        elif not self._over:
            self._quiet_bytes += len(read)
            if self._quiet_bytes > MAX_HEAD_BYTES:
                self._garbled(transaction, "too much beside the answer")
        if self._transaction is not transaction:
            return
        if self._over:
            self._finish(transaction)
        else:
            # Behind a chunk no line ends but that of the next one's size, of which we would know.
            self._chunks = transaction.chunks if self._marks and read[-1:] == b"\n" else None

    def _begun(self, transaction: Transaction) -> None:
        """The head is here: what was not sent by now will not be."""
        self._told = True
        transaction.head = transaction.body = b""  # it will not be sent again
        self._rest = None
        if transaction.bare:
            self._parts.clear()
        if not self._over:
            transaction.wheel.by(self.due(transaction))

    def _finish(self, transaction: Transaction) -> None:
        """The answer is complete."""
        keep = self._keep and self._sent and not self._transport.get_write_buffer_size()
        sink, transaction.sink, transaction.chunks = transaction.sink, None, None
        self._transaction = transaction.connection = self._chunks = None
        transaction.wheel.discard(transaction)
        if not keep:
            self.drop()
        else:
            self._used = True
            self._parser = None
            self._headers = []
            if transaction.paused:
                self._transport.resume_reading()
            self.idle_since = self.touched
            self._home.back(self)
        if sink is not None:
            try:
                sink.end()
            except Exception:  # a bug of ours; whoever waits must not wait for ever
                sink.fail(FAILED)
                raise

    def _garbled(self, transaction: Transaction, why: str) -> None:
        transaction.fail(Failure(FailureKind.MALFORMED, why, accepted=self._sent))

    # -- called by the parser ------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """An answer; there is only one."""
        if self._over:
            self._odd("bytes after the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, of which nobody hears."""
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > MAX_HEAD_BYTES or len(self._headers) >= MAX_HEADERS:
            self._odd("an endless head")
        if self._status:
            return
        if len(name) == 17 and name.lower() == b"transfer-encoding":
            # With a tab behind it the parser takes it for another coding.
            if self._chunked or value.rstrip(b" ").lower() != b"chunked":
                self._odd("an unknown transfer coding")
            self._chunked = True
        elif len(name) == 14 and name.lower() == b"content-length":
            self._sized = True
        text = value.decode("utf-8", "surrogateescape")
        self._headers.append((name.decode("ascii"), text.strip(" \t")))

    def on_headers_complete(self) -> None:
        """A head: of the answer, or of one before it that says nothing."""
        status = self._parser.get_status_code()
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            self._odd(f"HTTP {version}")
        if self._chunked and version == "1.0":
            self._odd("an unknown transfer coding")
        self._is_interim = 100 <= status < 200 and status != 101
        if self._is_interim:
            self._interim += 1
            if self._interim > MAX_INTERIM:
                self._odd("endless interim answers")
            if (self._sized or self._chunked) and status not in EMPTY_INTERIM:
                self._odd("an interim answer with a body")
        elif not 200 <= status <= 599:
            self._odd(f"status {status}")
        else:
            self._status = status
            self._over = self._transaction is not None and self._transaction.bare

    def on_message_complete(self) -> None:
        """Its end."""
        if self._is_interim:
            self._headers = []
            self._chunked = self._sized = False
        elif not self._over:
            self._over = True
            # What has no body and tells of one all the same: no telling what follows.
            bodiless = self._status in (204, 304)
            framed = (self._sized or self._chunked) is not bodiless
            self._keep = framed and self._parser.should_keep_alive()

    def _odd(self, why: str) -> None:
        self._why = why
        raise _OddError
