"""
One transaction over one connection: what is parsed, what is pushed, what may be used again.

Without sockets, since every cut of every answer is tried; over sockets in test_connections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from balancer.core.verdicts import Failure, FailureKind
from balancer.net.connection import (
    HIGH_WATER,
    JOINED_BYTES,
    LOW_WATER,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    PIECE_BYTES,
    SEND_STALL_S,
    STALE_S,
    BackendConnection,
    Transaction,
)
from balancer.net.wheel import Wheel

OK = b"HTTP/1.1 200 OK\r\n"
SHORT = OK + b"Content-Length: 2\r\n\r\nok"


class FakeLoop:
    """A clock, and the one timer."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.due: tuple[float, Callable[[], None]] | None = None

    def time(self) -> float:
        return self.now

    def call_at(self, at: float, action: Callable[[], None]) -> FakeLoop:
        self.due = at, action
        return self

    def cancel(self) -> None:
        self.due = None

    def sleep(self, seconds: float) -> None:
        """Let time pass, and do what is due."""
        until = self.now + seconds
        while self.due is not None and self.due[0] <= until:
            (at, action), self.due = self.due, None
            self.now = max(self.now, at)
            action()
        self.now = until


class FakeTransport:
    """Takes what is written until told to be full; is closed in the next turn, as real ones are."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.writes = 0
        self.closing = False
        self.reading = True
        self.room = math.inf
        self.buffered = 0
        self.limits: tuple[int, int] | None = None
        self.protocol: BackendConnection | None = None

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        self.limits = high, low

    def write(self, data: bytes | memoryview) -> None:
        assert not self.closing, "uvloop raises here"
        self.writes += 1
        self.written += data
        taken = min(self.room, len(data))
        self.room -= taken
        self.buffered += len(data) - int(taken)
        if self.buffered > HIGH_WATER and self.protocol is not None:
            self.protocol.pause_writing()

    def drain(self) -> None:
        """The kernel takes all there is, and whatever comes."""
        self.room, was = math.inf, self.buffered
        self.buffered = 0
        if was > HIGH_WATER and self.protocol is not None:
            self.protocol.resume_writing()

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


@dataclass
class FakeHome:
    """Remembers what it was told."""

    free: list[BackendConnection] = field(default_factory=list)
    gone: list[BackendConnection] = field(default_factory=list)
    repeated: list[Transaction] = field(default_factory=list)

    def back(self, connection: BackendConnection) -> None:
        assert not connection.is_busy
        self.free.append(connection)

    def lost(self, connection: BackendConnection) -> None:
        self.gone.append(connection)

    def stale(self, transaction: Transaction) -> None:
        assert transaction.connection is None
        self.repeated.append(transaction)


class Tape:
    """A sink that checks the order, and does what a test has it do at each step."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self.pieces: list[bytes] = []
        self.ends: list[Failure | None] = []
        self.deaf = False
        self.at: dict[str, Callable[[], None]] = {}

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def failure(self) -> Failure:
        (end,) = self.ends
        assert end is not None
        return end

    def _did(self, what: str) -> None:
        self.at.get(what, lambda: None)()

    def head(self, status: int, headers: Any) -> None:
        assert not self.status
        assert not self.ends
        assert not self.deaf
        self.status, self.headers = status, list(headers)
        self._did("head")

    def data(self, data: bytes) -> None:
        assert self.status
        assert data
        assert not self.ends
        assert not self.deaf
        self.pieces.append(data)
        self._did("data")

    def end(self) -> None:
        assert self.status
        assert not self.ends
        assert not self.deaf
        self.ends.append(None)
        self._did("end")

    def fail(self, failure: Failure) -> None:
        assert not self.ends
        assert not self.deaf
        self.ends.append(failure)
        self._did("fail")


class Bench:
    """A connection, and all around it."""

    def __init__(self) -> None:
        self.loop = FakeLoop()
        self.wheel = Wheel(cast("Any", self.loop))
        self.home = FakeHome()
        self.renew()

    def renew(self) -> None:
        """Another connection."""
        self.line = FakeTransport()
        self.connection = BackendConnection(self.home, self.loop.time)
        self.connection.connection_made(cast("Any", self.line))
        self.line.protocol = self.connection

    def begin(self, tape: Tape | None = None, body: bytes = b"{}", **more: Any) -> Transaction:
        """Begin a transaction."""
        told = {"bare": False, "patient": True, "idle_s": 300.0} | more
        transaction = Transaction(tape or Tape(), b"HEAD\r\n\r\n", body, self.wheel, **told)
        self.connection.begin(transaction)
        return transaction

    def feed(self, *pieces: bytes) -> None:
        """Reads, as long as it is not closed."""
        for piece in pieces:
            if piece and not self.line.closing:
                self.connection.data_received(piece)

    def told(self, *pieces: bytes, **more: Any) -> Tape:
        """The answer in these pieces."""
        tape = Tape()
        self.begin(tape, **more)
        self.feed(*pieces)
        return tape

    def warm(self) -> None:
        """Have it used once."""
        assert self.told(SHORT).ends == [None]
        assert self.home.free == [self.connection]
        self.home.free.clear()
        self.line.written.clear()
        self.line.writes = 0

    @property
    def kept(self) -> bool:
        """It may be used again; else it must be closed."""
        assert bool(self.home.free) is not self.line.closing
        return bool(self.home.free)


# -- what is pushed -------------------------------------------------------------------------------


def test_a_short_answer() -> None:
    """Head, data, end; the request was one write; the connection comes back before the end."""
    bench, tape = Bench(), Tape()
    order: list[object] = []
    tape.at["end"] = lambda: order.append(list(bench.home.free))
    transaction = bench.begin(tape, b"body")
    assert (bytes(bench.line.written), bench.line.writes) == (b"HEAD\r\n\r\nbody", 1)
    assert bench.line.limits == (HIGH_WATER, LOW_WATER)
    bench.feed(OK + b"Content-Type:  a/b \r\nX-\xc3\xbc: 1\r\n".replace(b"X-\xc3\xbc", b"X-u"),
               b"x: \xc3\xbc\xff\r\nContent-Length: 5\r\n\r\nhe", b"llo")  # fmt: skip
    assert (tape.status, tape.pieces, tape.ends) == (200, [b"he", b"llo"], [None])
    assert tape.headers == [("Content-Type", "a/b"), ("X-u", "1"), ("x", "ü\udcff"),
                            ("Content-Length", "5")]  # fmt: skip
    assert order == [[bench.connection]]
    assert (transaction.connection, transaction.sink, len(bench.wheel)) == (None, None, 0)
    assert transaction.body == transaction.head == b""


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, bytes, str]:
    """A legal answer, its body, and how it is framed: length, chunked, eof."""
    body = draw(st.binary(max_size=200))
    framing = draw(st.sampled_from(["length", "chunked", "eof"]))
    early = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\nContent-Length: 9\r\n\r\n"
    interim = draw(st.sampled_from([early, b"HTTP/1.1 104 X\r\nLink: x\r\n\r\n"]))
    wire = interim * draw(st.integers(0, 8))
    wire += b"HTTP/1.1 %d\r\n" % draw(st.sampled_from([200, 201, 400, 404, 500, 503, 599]))
    for n in range(draw(st.integers(0, 4))):
        wire += b"X-%d: %s\r\n" % (n, b"v" * n)
    if framing == "length":
        return wire + b"content-LENGTH: %d\r\n\r\n" % len(body) + body, body, framing
    if framing == "eof":
        return wire + b"\r\n" + body, body, framing
    wire += b"Transfer-Encoding: Chunked\r\n\r\n"
    cuts = sorted({0, len(body), *draw(st.lists(st.integers(0, len(body)), max_size=5))})
    for start, stop in pairwise(cuts):
        extension = draw(st.sampled_from([b"", b";a", b";a=b", b';a="b c"']))
        size = draw(st.sampled_from([b"%x", b"%X", b"000%x"])) % (stop - start)
        wire += size + extension + b"\r\n" + body[start:stop] + b"\r\n"
    trailers = draw(st.sampled_from([b"", b"X-Trailer: 1\r\n", b"A: 1\r\nB: \r\n"]))
    return wire + b"0\r\n" + trailers + b"\r\n", body, framing


def cut(data: bytes, at: list[int]) -> Iterator[bytes]:
    """Pieces of *data*."""
    for start, stop in pairwise(sorted({0, len(data), *(n % (len(data) + 1) for n in at)})):
        yield data[start:stop]


@settings(max_examples=300, deadline=None)
@given(answers(), st.lists(st.integers(0, 2000), max_size=12))
def test_any_cut_gives_the_same_bytes(answer: tuple[bytes, bytes, str], at: list[int]) -> None:
    """Whatever arrives together: the same body, one end, and kept only if its length was told."""
    wire, body, framing = answer
    bench = Bench()
    tape = bench.told(*cut(wire, at))
    if framing == "eof":
        assert tape.ends == []
        bench.connection.eof_received()
    assert (tape.body, tape.ends) == (body, [None])
    assert not [name for name, _ in tape.headers if name in ("X-Trailer", "A", "Link")]
    assert bench.kept is (framing != "eof")


CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
EVERY = {
    "length": OK + b"Content-Length: 5\r\nX: y\r\n\r\nhello",
    "chunked": CHUNKED + b"3;x=y\r\nhel\r\n02\r\nlo\r\n0\r\nT: 1\r\n\r\n",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 5\r\n\r\nhello",
    "eof": OK + b"\r\nhello",
    "http/1.0": b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello",
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_a_cut_at_every_byte(name: str) -> None:
    """In two, and into single bytes; then the next answer over the same connection is whole."""
    wire = EVERY[name]
    pieces = [[wire[:at], wire[at:]] for at in range(len(wire))]
    for cuts in [*pieces, [wire[at : at + 1] for at in range(len(wire))]]:
        bench = Bench()
        tape = bench.told(*cuts)
        if name == "eof":
            bench.connection.connection_lost(None)
        assert (tape.body, tape.ends) == (b"hello", [None])
        if bench.kept:
            again = bench.told(SHORT)
            assert (again.body, again.ends) == (b"ok", [None])
            assert [name for name, _ in again.headers] == ["Content-Length"]


@pytest.mark.parametrize("name", EVERY)
def test_an_answer_cut_short_at_every_byte(name: str) -> None:
    """Before the head is complete it is reset, in the body cut; never an end, never kept."""
    wire = EVERY[name]
    head = wire.index(b"\r\n\r\n", wire.index(b"200")) + 4
    for at in range(len(wire)):
        for error in (None, ConnectionResetError(104, "x")):
            bench = Bench()
            tape = bench.told(wire[:at])
            if at >= head and name == "eof" and error is None:
                continue
            bench.connection.connection_lost(error)
            kind = FailureKind.CUT if at >= head else FailureKind.RESET
            detail = "" if error is None else "connection reset by peer"
            assert tape.failure == Failure(kind, detail, accepted=True)
            assert bench.home.free == []
            assert b"hello".startswith(tape.body)


# -- what is not believed -------------------------------------------------------------------------

ODD = {
    "no HTTP": b"\x00\x17garbage\r\n\r\n",
    "HTTP/0.9": b"HTTP/0.9 200 OK\r\nContent-Length: 0\r\n\r\n",
    "HTTP/2": b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.2": b"HTTP/1.2 200 OK\r\nContent-Length: 0\r\n\r\n",
    "status 99": b"HTTP/1.1 99 OK\r\nContent-Length: 0\r\n\r\n",
    "status 099": b"HTTP/1.1 099 OK\r\nContent-Length: 0\r\n\r\n",
    "status 600": b"HTTP/1.1 600 OK\r\nContent-Length: 0\r\n\r\n",
    "status 999": b"HTTP/1.1 999 OK\r\nContent-Length: 0\r\n\r\n",
    "status 2000": b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
    "switching": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "switching, told": b"HTTP/1.1 101 S\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "nine interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 9 + SHORT,
    "an interim body": b"HTTP/1.1 104 X\r\nContent-Length: 3\r\n\r\nabc" + SHORT,
    "an interim body in chunks": b"HTTP/1.1 104 X\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3\r\nabc\r\n0\r\n\r\n" + SHORT,
    "length and chunks": OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "two lengths": OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    "a signed length": OK + b"Content-Length: +2\r\n\r\nok",
    "a list of lengths": OK + b"Content-Length: 2, 2\r\n\r\nok",
    "an endless length": OK + b"Content-Length: 99999999999999999999999\r\n\r\nok",
    "gzip": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "identity": OK + b"Transfer-Encoding: identity\r\n\r\nok",
    "chunked twice": OK + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunked, twice": OK + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n",
    "chunked and a tab": OK + b"Transfer-Encoding: chunked\t\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "chunks in 1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a folded header": OK + b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n",
    "a blank in a name": OK + b"X : a\r\nContent-Length: 0\r\n\r\n",
    "a null in a value": OK + b"X: a\0b\r\nContent-Length: 0\r\n\r\n",
    "a lone line feed": OK + b"X: a\nContent-Length: 0\r\n\r\n",
    "a lone carriage return": OK + b"X: a\rb\r\nContent-Length: 0\r\n\r\n",
    "no size": CHUNKED + b"zz\r\nab\r\n0\r\n\r\n",
    "a negative size": CHUNKED + b"-1\r\nab\r\n0\r\n\r\n",
    "an endless size": CHUNKED + b"fffffffffffffffff\r\nab\r\n",
    "a chunk too long": CHUNKED + b"1\r\nab\r\n0\r\n\r\n",
    "bytes behind the answer": SHORT + b"more",
    "an answer behind the answer": SHORT + SHORT,
    "an answer behind chunks": CHUNKED + b"0\r\n\r\n" + SHORT,
    "bytes behind the last answer": OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nokmore",
    "a body where there is none": b"HTTP/1.1 204 No\r\nContent-Length: 2\r\n\r\nok",
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_is_refused(name: str) -> None:
    """In one read: nothing of it is told but that it is no HTTP; the connection is closed."""
    bench = Bench()
    tape = bench.told(ODD[name])
    assert tape.failure.kind is FailureKind.MALFORMED
    assert tape.failure.accepted
    assert (tape.status, tape.pieces, bench.kept) == (0, [], False)


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_never_leaves_a_connection_to_be_used(name: str) -> None:
    """Byte by byte: whatever was told before, it ends once, and nothing goes over it again."""
    bench = Bench()
    tape = bench.told(*(ODD[name][at : at + 1] for at in range(len(ODD[name]))))
    assert len(tape.ends) == 1
    assert bench.line.closing
    for free in bench.home.free:  # it came back with its answer, and what came behind closed it
        assert free.is_closing


@pytest.mark.parametrize("stray", [b"\n", b"\r\n", b"\r\n\r\n"])
def test_line_ends_around_an_answer_mean_nothing(stray: bytes) -> None:
    """Whatever they came with: the next answer over the connection is the next answer."""
    bench = Bench()
    for answer in (stray + SHORT, SHORT + stray, CHUNKED + b"0\r\n\r\n" + stray, SHORT):
        tape = bench.told(answer)
        assert (tape.status, tape.ends, bench.kept) == (200, [None], True)
        assert tape.body == (b"ok" if SHORT in answer else b"")


@pytest.mark.parametrize(("count", "kind"), [(0, None), (1, None), (8, None), (9, "malformed")])
def test_interim_answers(count: int, kind: str | None) -> None:
    """Skipped, as long as there are few."""
    bench = Bench()
    tape = bench.told(*[b"HTTP/1.1 102 Processing\r\n\r\n"] * count, SHORT)
    assert (tape.ends == [None]) is (kind is None)
    if kind is None:
        assert (tape.status, tape.body, bench.kept) == (200, b"ok", True)


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize(
    ("headers", "kept"),
    [(b"", True), (b"Content-Length: 5\r\n", False), (b"Transfer-Encoding: chunked\r\n", False)],
)
def test_answers_without_a_body(status: int, headers: bytes, *, kept: bool) -> None:
    """They end with their head; one that tells of a body is not to be trusted further."""
    bench = Bench()
    tape = bench.told(b"HTTP/1.1 %d X\r\n%s\r\n" % (status, headers))
    assert (tape.status, tape.pieces, tape.ends) == (status, [], [None])
    assert bench.kept is kept


@pytest.mark.parametrize("rest", [b"", b"hel", b"hello"])
def test_a_head_alone(rest: bytes) -> None:
    """What HEAD asks for ends with the head, whatever length it tells; it is never used again."""
    bench = Bench()
    tape = bench.told(OK + b"Content-Length: 5\r\n\r\n" + rest, bare=True)
    assert (tape.status, tape.pieces, tape.ends) == (200, [], [None])
    assert not bench.kept
    bench = Bench()
    assert bench.told(OK + b"Content-Length: 5\r\n\r\nhello" + SHORT, bare=True).status == 0
    assert not bench.kept


@pytest.mark.parametrize("header", [b"Connection: close", b"Connection: x, Close"])
def test_a_connection_that_the_backend_closes_is_not_kept(header: bytes) -> None:
    """Nor one of HTTP/1.0, unless it says so."""
    bench = Bench()
    assert bench.told(OK + header + b"\r\nContent-Length: 2\r\n\r\nok").ends == [None]
    assert not bench.kept
    bench = Bench()
    assert bench.told(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok").ends == [None]
    assert not bench.kept


def heads(size: int, count: int) -> bytes:
    """Headers of so many bytes in all, of that number."""
    told = b"Content-Length: 0\r\n" + b"X: \r\n" * (count - 2)
    return OK + told + b"Y: " + b"y" * (size - len(told) - 5) + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("size", "count", "good"),
    [
        (MAX_HEAD_BYTES, 3, True),
        (MAX_HEAD_BYTES + 1, 3, False),
        (9000, MAX_HEADERS, True),
        (9000, MAX_HEADERS + 1, False),
    ],
)
def test_the_head_has_limits(size: int, count: int, *, good: bool) -> None:
    """In bytes and in headers, in one read as in many."""
    wire = heads(size, count)
    for step in (len(wire), 1000):
        bench = Bench()
        tape = bench.told(*(wire[at : at + step] for at in range(0, len(wire), step)))
        assert (tape.ends == [None]) is good
        if not good:
            assert tape.failure.kind is FailureKind.MALFORMED


@pytest.mark.parametrize(
    "begin",
    [
        OK + b"X: ",
        OK + b"X",
        b"HTTP/1.1 200 ",
        CHUNKED + b"0\r\nX: ",
        CHUNKED + b"1;",
    ],
)
def test_nothing_beside_the_body_is_endless(begin: bytes) -> None:
    """No header, reason, trailer or chunk extension fills our memory, or keeps us for ever."""
    bench = Bench()
    tape = bench.told(begin, *[b"x" * 1000] * (MAX_HEAD_BYTES // 1000 + 2))
    assert tape.failure.kind is FailureKind.MALFORMED
    assert not bench.kept


def test_small_frames_for_hours_are_no_flood() -> None:
    """What stands between pieces of a body is counted from one piece to the next."""
    bench = Bench()
    tape = bench.told(OK + b"Transfer-Encoding: chunked\r\n\r\n")
    for _ in range(MAX_HEAD_BYTES // 3 + 10):
        bench.feed(b"1\r\n", b"x", b"\r\n")
    bench.feed(b"0\r\n\r\n")
    assert tape.ends == [None]


def test_a_byte_that_nobody_asked_for_closes_the_connection() -> None:
    """An answer to nothing would be taken for the answer to the next request."""
    bench = Bench()
    bench.warm()
    bench.connection.data_received(SHORT)
    assert bench.line.closing
    bench.connection.connection_lost(None)
    assert bench.home.gone == [bench.connection]


# -- the request ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, JOINED_BYTES - 1, JOINED_BYTES])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_small_request_is_one_write(size: int, kind: type[bytes | bytearray]) -> None:
    """Head and body together."""
    bench = Bench()
    bench.begin(body=cast("bytes", kind(size)))
    assert (bench.line.writes, len(bench.line.written)) == (1, 8 + size)


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_large_request_goes_as_the_transport_takes_it(
    kind: type[bytes | bytearray],
) -> None:
    """Piece by piece, never more than one piece too many; then the answer is waited for."""
    bench, body = Bench(), bytes(range(256)) * 6000
    bench.line.room = 100
    tape = bench.told(body=kind(body))
    assert len(bench.line.written) <= 8 + PIECE_BYTES
    for _ in range(20):
        had = len(bench.line.written)
        bench.line.drain()
        bench.line.room = 10
        assert len(bench.line.written) - had <= len(body)
    bench.line.drain()
    assert bytes(bench.line.written) == b"HEAD\r\n\r\n" + body
    bench.feed(SHORT)
    assert tape.ends == [None]
    assert bench.kept


def test_an_answer_before_the_request_was_sent_ends_the_sending() -> None:
    """It is told; the rest of the request is not sent, and could never become the next one."""
    bench = Bench()
    bench.line.room = 10
    tape = bench.told(OK, b"Content-Length: 2\r\n\r\n", body=b"x" * 1_000_000)
    assert tape.status == 200
    had = len(bench.line.written)
    bench.line.drain()
    bench.feed(b"ok")
    assert (tape.ends, bench.kept) == ([None], False)
    assert len(bench.line.written) == had <= 8 + PIECE_BYTES


@pytest.mark.parametrize("size", [10, JOINED_BYTES])
def test_a_request_still_in_the_buffer_was_not_sent(size: int) -> None:
    """An answer that comes before the kernel has it all leaves the connection unfit."""
    bench = Bench()
    bench.line.room = 5
    tape = bench.told(SHORT, body=b"x" * size)
    assert (tape.ends, bench.kept) == ([None], False)


def test_an_interim_answer_does_not_end_the_sending() -> None:
    """It answers nothing."""
    bench = Bench()
    bench.line.room = 10
    tape = bench.told(b"HTTP/1.1 100 Continue\r\n\r\n", body=b"x" * 1_000_000)
    bench.line.drain()
    assert len(bench.line.written) == 8 + 1_000_000
    bench.feed(SHORT)
    assert tape.ends == [None]
    assert bench.kept


def test_a_loss_while_sending_says_that_it_was_not_accepted() -> None:
    """Whether the backend had it all decides what may have killed it."""
    bench = Bench()
    bench.line.room = 10
    tape = bench.told(body=b"x" * 1_000_000)
    bench.connection.connection_lost(BrokenPipeError(32, "x"))
    assert tape.failure == Failure(FailureKind.RESET, "broken pipe")


# -- lost connections -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, ConnectionResetError(104, "x")])
@pytest.mark.parametrize("eof", [False, True])
def test_a_used_connection_lost_without_a_byte_is_stale(
    error: Exception | None, *, eof: bool
) -> None:
    """Nobody is told; its home has the request sent once more."""
    bench = Bench()
    bench.warm()
    transaction = bench.begin(tape := Tape())
    if eof:
        bench.connection.eof_received()
    bench.connection.connection_lost(error)
    assert bench.home.repeated == [transaction]
    assert (tape.ends, transaction.connection, transaction.body) == ([], None, b"{}")
    assert transaction.sink is tape
    assert not bench.connection.is_busy
    bench.renew()
    bench.connection.begin(transaction)
    bench.feed(SHORT)
    assert tape.ends == [None]


@pytest.mark.parametrize("how", ["fresh", "answered", "late", "interim"])
def test_other_losses_are_failures(how: str) -> None:
    """A new connection, some byte of an answer, or some time: then the backend lost it."""
    bench = Bench()
    if how != "fresh":
        bench.warm()
    tape = bench.told()
    if how == "answered":
        bench.feed(b"H")
    elif how == "interim":
        bench.feed(b"HTTP/1.1 100 Continue\r\n\r\n")
    elif how == "late":
        bench.loop.sleep(STALE_S + 0.1)
    bench.connection.connection_lost(None)
    assert bench.home.repeated == []
    assert tape.failure == Failure(FailureKind.RESET, accepted=True)


def test_a_connection_that_is_closed_already_is_not_written_to() -> None:
    """A new one failed before it was used, one used before is stale."""
    bench = Bench()
    bench.line.closing = True
    tape = bench.told()
    assert tape.failure.kind is FailureKind.RESET
    assert not tape.failure.accepted
    bench = Bench()
    bench.warm()
    bench.line.closing = True
    transaction = bench.begin()
    assert bench.home.repeated == [transaction]


def test_a_transport_that_closes_while_we_send_is_not_written_to() -> None:
    """Room that comes after the end is not used."""
    bench = Bench()
    bench.line.room = 10
    bench.begin(body=b"x" * 1_000_000)
    bench.line.closing = True
    bench.line.drain()
    assert len(bench.line.written) <= 8 + PIECE_BYTES


# -- limits ---------------------------------------------------------------------------------------


def test_silence_before_the_head_has_no_limit_if_we_are_patient() -> None:
    """A model may be loading; in the answer, silence has one."""
    bench = Bench()
    tape = bench.told(idle_s=20.0)
    bench.loop.sleep(1e5)
    bench.feed(OK + b"Content-Length: 2\r\n\r\n")
    bench.loop.sleep(19.9)
    bench.feed(b"o")
    bench.loop.sleep(19.9)
    assert tape.ends == []
    bench.loop.sleep(0.4)
    assert tape.failure == Failure(FailureKind.IDLE, accepted=True)
    assert not bench.kept


def test_silence_before_the_head_has_the_same_limit_if_we_are_not() -> None:
    """It counts from the moment the request was sent."""
    bench = Bench()
    bench.line.room = 10
    tape = bench.told(body=b"x" * 1_000_000, idle_s=20.0, patient=False)
    bench.loop.sleep(19.0)
    bench.line.drain()
    bench.loop.sleep(19.9)
    assert tape.ends == []
    bench.loop.sleep(0.4)
    assert tape.failure == Failure(FailureKind.IDLE, accepted=True)


def test_no_limit_is_none() -> None:
    """Nor a timer."""
    bench = Bench()
    tape = bench.told(OK + b"Content-Length: 2\r\n\r\n", idle_s=None, patient=False)
    assert bench.loop.due is None
    bench.loop.sleep(1e9)
    assert tape.ends == []


def test_sending_has_a_limit_that_grows_with_the_request() -> None:
    """Whatever is taken meanwhile."""
    bench = Bench()
    bench.line.room = 10
    tape = bench.told(body=b"x" * 10_000_000)
    bench.loop.sleep(SEND_STALL_S + 9.9)
    assert tape.ends == []
    bench.loop.sleep(0.2)
    assert tape.failure == Failure(FailureKind.SEND_STALL)


def test_a_pause_is_no_silence() -> None:
    """While nothing is read no limit passes; afterwards it counts from there."""
    bench = Bench()
    transaction = bench.begin(tape := Tape(), idle_s=20.0)
    bench.feed(OK + b"Content-Length: 9\r\n\r\n")
    transaction.pause()
    transaction.pause()
    assert not bench.line.reading
    bench.feed(b"o")  # one read may still come
    bench.loop.sleep(1e4)
    assert (tape.body, tape.ends) == (b"o", [])
    transaction.resume()
    transaction.resume()
    assert bench.line.reading
    bench.loop.sleep(19.9)
    assert tape.ends == []
    bench.loop.sleep(0.4)
    assert tape.failure.kind is FailureKind.IDLE


def test_a_pause_from_before_the_connection_holds() -> None:
    """Who pauses while it connects is not read to."""
    bench = Bench()
    transaction = Transaction(Tape(), b"", b"", bench.wheel, bare=False, patient=True, idle_s=1.0)
    transaction.pause()
    bench.connection.begin(transaction)
    assert not bench.line.reading
    transaction.resume()
    assert bench.line.reading


def test_a_connection_comes_back_reading() -> None:
    """Else its end would not be noticed."""
    bench, tape = Bench(), Tape()
    transaction = bench.begin(tape)
    tape.at["data"] = transaction.pause
    bench.feed(SHORT)
    assert tape.ends == [None]
    assert bench.kept
    assert bench.line.reading


# -- steering from within -------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["head", "data", "end", "fail"])
def test_an_abort_from_within_the_sink(when: str) -> None:
    """Nothing is told after it, and nothing is kept; at the end there is nothing left to abort."""
    bench, tape = Bench(), Tape()
    transaction = bench.begin(tape)

    def abort() -> None:
        transaction.abort()
        transaction.abort()
        tape.deaf = True

    tape.at[when] = abort
    if when == "fail":
        bench.feed(b"garbage\r\n\r\n")
    else:
        bench.feed(SHORT)
    assert bench.line.closing is (when != "end")
    assert bool(bench.home.free) is (when == "end")
    assert len(tape.ends) == (when in ("end", "fail"))
    bench.connection.connection_lost(None)
    assert len(bench.wheel) == 0


@pytest.mark.parametrize("at", range(len(SHORT)))
def test_an_abort_at_each_byte_of_the_answer(at: int) -> None:
    """The connection is closed then and there; whatever comes later is for nobody."""
    bench = Bench()
    transaction = bench.begin(tape := Tape())
    bench.feed(SHORT[:at])
    transaction.abort()
    tape.deaf = True
    assert bench.line.closing
    bench.connection.data_received(SHORT[at:])
    bench.connection.resume_writing()
    bench.connection.connection_lost(None)
    transaction.pause()
    transaction.resume()
    assert (tape.ends, bench.home.free, len(bench.wheel)) == ([], [], 0)


def test_the_next_transaction_may_begin_from_within_the_end() -> None:
    """Over the same connection, which carries one at a time."""
    bench, first, second = Bench(), Tape(), Tape()

    def again() -> None:
        assert bench.home.free == [bench.connection]
        bench.begin(second)

    first.at["end"] = again
    bench.begin(first)
    bench.feed(SHORT)
    assert second.ends == []
    bench.feed(SHORT)
    assert (first.ends, second.ends, second.body) == ([None], [None], b"ok")


class Chunked(Tape):
    """A sink that takes chunks, too."""

    def __init__(self) -> None:
        super().__init__()
        self.chunks: list[bytes] = []

    def chunk(self, data: bytes, lines: list[bytes]) -> None:
        assert data.split(b"\n") == lines
        self.chunks.append(data)
        self.data(b"".join(line + b"\n" for line in lines[1:-2]))


CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
LINE = b'{"a":1}\n'


def framed(data: bytes) -> bytes:
    """A chunk as we make them."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def chunked(*reads: bytes) -> tuple[Bench, Chunked]:
    """An answer in chunks, whose head came with a first one."""
    bench, tape = Bench(), Chunked()
    bench.begin(tape).pass_chunks(tape)
    bench.feed(CHUNKED + framed(LINE), *reads)
    return bench, tape


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 255, 256, 257, 4094, 4095])
def test_a_chunk_in_a_read_of_its_own_is_passed_as_it_is(size: int) -> None:
    """It is what we would make of it; the parser, which has not seen it, goes on behind it."""
    line = b"x" * (size - 1) + b"\n"
    bench, tape = chunked(framed(line), framed(LINE), b"0\r\n\r\n")
    assert tape.chunks == [framed(line), framed(LINE)]
    assert (tape.body, tape.ends) == (LINE + line + LINE, [None])
    assert bench.kept


@pytest.mark.parametrize(
    "read",
    [
        framed(b"no line"),
        framed(LINE) + framed(LINE),
        b"8 \r\n" + LINE + b"\r\n",
        b"08\r\n" + LINE + b"\r\n",
        b"8;a=b\r\n" + LINE + b"\r\n",
        framed(LINE[:-1] * 4 + b"\n").upper(),
        b"C\r\n" + b"a" * 11 + b"\n\r\n",
        framed(b"x" * 4095 + b"\n"),
        b"8\r\n" + b"\n\r\n" * 9,
        b"7\r\n" + LINE + b"\r\n",
        b"9\r\n" + LINE + b"\r\n",
        b"+8\r\n" + LINE + b"\r\n",
        b"8\n" + LINE + b"\r\n",
        b"\n\r\n",
        b"\r\n",
        b"0\r\n\r\n",
    ],
)
def test_whatever_else_comes_is_parsed(read: bytes) -> None:
    """Nothing of a framing that is not our own goes past the parser."""
    expected = Bench()
    plain = expected.told(CHUNKED + framed(LINE), read)
    bench, tape = chunked(read)
    assert tape.chunks == []
    assert (tape.body, [*map(str, tape.ends)]) == (plain.body, [*map(str, plain.ends)])
    assert bench.line.closing is expected.line.closing


@pytest.mark.parametrize("cut", range(1, 13))
def test_behind_a_part_of_a_chunk_nothing_is_taken_for_one(cut: int) -> None:
    """What looks like a chunk may stand inside of one."""
    inner = framed(LINE)
    outer = framed(b"12345\r\n" + inner + b"\n")
    at = outer.index(inner)
    start, rest = outer[:at], outer[at + len(inner) :]
    bench, tape = chunked(start, inner, rest, framed(LINE))
    assert tape.chunks == [framed(LINE)]
    assert tape.body == LINE + b"12345\r\n" + inner + b"\n" + LINE
    bench, tape = chunked(inner[:cut], inner[cut:], inner)
    assert tape.chunks == [inner]
    assert tape.body == LINE * 3
    assert not bench.line.closing


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_reads_of_any_size_bring_the_same_body(data: st.DataObject) -> None:
    """Every chunk that is passed is byte by byte what we would have made of it."""
    texts = st.lists(st.text(alphabet="a\r\n1", min_size=1, max_size=30).map(str.encode))
    pieces = data.draw(texts)
    odd = data.draw(st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces)))
    chunks = [b"0" * is_odd + framed(piece) for piece, is_odd in zip(pieces, odd, strict=True)]
    whole = b"".join(chunks) + b"0\r\n\r\n"
    ends = [sum(map(len, chunks[:i])) for i in range(len(chunks) + 1)]
    at = data.draw(st.lists(st.sampled_from(ends) | st.integers(0, len(whole))))
    marks = [0, *sorted(at), len(whole)]
    bench, tape = chunked(*(whole[a:b] for a, b in pairwise(marks)))
    assert tape.body == LINE + b"".join(pieces)
    assert tape.ends == [None]
    assert bench.kept
    for chunk in tape.chunks:
        size, _, rest = chunk.partition(b"\r\n")
        assert chunk == framed(rest[:-2])
        assert chunk.endswith(b"\n\r\n")
        assert size == b"%x" % (len(rest) - 2)


def test_chunks_of_one_answer_are_nothing_to_the_next() -> None:
    """The connection's next answer goes to its own sink."""
    bench, first = chunked(framed(LINE), b"0\r\n\r\n")
    second = bench.told(CHUNKED + framed(LINE), framed(LINE), b"0\r\n\r\n")
    assert len(first.chunks) == 1
    assert (second.body, second.ends) == (LINE * 2, [None])
    over = bench.begin(first := Chunked())
    bench.feed(SHORT)
    over.pass_chunks(first)
    assert over.chunks is None, "they would hold each other"


def test_a_bug_in_taking_a_chunk_ends_the_answer() -> None:
    """Whoever waits must not wait for ever."""
    bench, tape = chunked(framed(LINE))

    def bug() -> None:
        raise RuntimeError("bug")

    tape.at["data"] = bug
    with pytest.raises(RuntimeError, match="bug"):
        bench.feed(framed(LINE))
    assert tape.failure.detail == "the balancer failed"
    assert bench.line.closing


def test_a_chunk_is_a_movement() -> None:
    """A stream of chunks is not silent."""
    bench, tape = chunked()
    for _ in range(3):
        bench.loop.sleep(200.0)
        bench.feed(framed(LINE))
    assert len(tape.chunks) == 3
    bench.loop.sleep(301.0)
    assert tape.failure.kind is FailureKind.IDLE


def test_a_sink_may_be_replaced() -> None:
    """Whoever relays takes over from whoever judged, at any point before the end."""
    bench, first, second = Bench(), Tape(), Tape()
    transaction = bench.begin(first)

    def hand_over() -> None:
        second.status = 200
        transaction.turn(second)

    first.at["head"] = hand_over
    bench.feed(SHORT)
    assert (first.pieces, second.pieces, second.ends) == ([], [b"ok"], [None])
    transaction.turn(Tape())
    assert transaction.sink is None


def test_when_anything_moved() -> None:
    """Without a connection nothing ever did."""
    bench = Bench()
    transaction = Transaction(Tape(), b"", b"", bench.wheel, bare=False, patient=True, idle_s=1.0)
    assert transaction.moved_at() == -math.inf
    bench.connection.begin(transaction)
    bench.loop.sleep(5.0)
    assert transaction.moved_at() == bench.loop.now - 5.0
    bench.feed(b"H")
    assert transaction.moved_at() == bench.loop.now


def test_a_bug_in_a_sink_is_told() -> None:
    """The call fails, and the loop hears of the bug."""
    bench, tape = Bench(), Tape()

    def broken() -> None:
        raise RuntimeError("a bug")

    tape.at["head"] = broken
    bench.begin(tape)
    with pytest.raises(RuntimeError, match="a bug"):
        bench.feed(SHORT)
    assert tape.failure == Failure(FailureKind.CUT, "the balancer failed")
    assert bench.line.closing


def test_a_bug_in_a_sink_s_last_word_is_told() -> None:
    """Nobody else would ever tell the call that it is over."""
    bench, told = Bench(), list[Failure]()

    class Broken(Tape):
        def end(self) -> None:
            raise RuntimeError("a bug")

        def fail(self, failure: Failure) -> None:
            told.append(failure)

    bench.begin(Broken())
    with pytest.raises(RuntimeError, match="a bug"):
        bench.feed(SHORT)
    assert told == [Failure(FailureKind.CUT, "the balancer failed")]


# -- the model ------------------------------------------------------------------------------------


class States(RuleBasedStateMachine):
    """
    Whatever happens in whatever order: the tape checks what it is told, and what may carry the next
    transaction has answered the last one whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.transaction: Transaction | None = None
        self.tape = Tape()
        self.wire = b""
        self.body, self.framing = b"", ""
        self.whole = self.fed = self.size = 0
        self.full = False

    @property
    def line(self) -> FakeTransport:
        """The present connection's."""
        return self.bench.line

    @precondition(lambda self: self.transaction is None)
    @rule(
        answer=answers(),
        extra=st.sampled_from([b"", b"", b"", b"x", SHORT]),
        size=st.sampled_from([0, 10, JOINED_BYTES, JOINED_BYTES + 1, 10**6]),
        full=st.booleans(),
        patient=st.booleans(),
    )
    def begin(
        self,
        answer: tuple[bytes, bytes, str],
        extra: bytes,
        size: int,
        *,
        full: bool,
        patient: bool,
    ) -> None:
        """Take what is free, or a new connection."""
        if self.line.closing or self.bench.connection not in self.bench.home.free:
            self.bench.renew()
        self.bench.home.free.clear()
        self.bench.home.repeated.clear()
        self.line.written.clear()
        self.wire, self.body = answer[0] + extra, answer[1]
        self.whole, self.framing = len(answer[0]), answer[2]
        if self.framing == "eof":
            self.body += extra
        self.fed, self.size, self.full = 0, size, full
        self.line.room = 5 if full else math.inf
        self.tape = Tape()
        self.transaction = self.bench.begin(
            self.tape, b"b" * size, patient=patient, idle_s=20.0, bare=False
        )

    @precondition(lambda self: self.transaction is not None and self.fed < len(self.wire))
    @rule(size=st.integers(1, 300))
    def read(self, size: int) -> None:
        """Some bytes of the answer."""
        if self.line.reading and not self.line.closing:
            data = self.wire[self.fed : self.fed + size]
            self.fed += len(data)
            self.bench.feed(data)

    @precondition(lambda self: self.bench.home.free and not self.line.closing)
    @rule()
    def read_on(self) -> None:
        """What came behind the answer."""
        if self.fed < len(self.wire):
            self.bench.feed(self.wire[self.fed :])
            assert self.line.closing

    @precondition(lambda self: self.transaction is not None)
    @rule()
    def drain(self) -> None:
        """The kernel takes what there is."""
        self.line.drain()

    @precondition(lambda self: self.transaction is not None)
    @rule(what=st.sampled_from(["pause", "resume"]))
    def steer(self, what: str) -> None:
        """Back-pressure."""
        getattr(self.transaction, what)()

    @rule(seconds=st.floats(0.0, 50.0))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.bench.loop.sleep(seconds)

    @precondition(lambda self: self.transaction is not None)
    @rule()
    def abort(self) -> None:
        """The client has gone."""
        assert self.transaction is not None
        self.transaction.abort()
        self.tape.deaf = True
        assert self.line.closing or self.tape.ends
        self.transaction = None

    @rule(error=st.sampled_from([None, ConnectionResetError(104, "x")]), eof=st.booleans())
    def lose(self, error: Exception | None, *, eof: bool) -> None:
        """The connection is lost."""
        if eof and not self.line.closing and self.line.reading:
            self.bench.connection.eof_received()
        self.line.closing = True
        self.bench.connection.connection_lost(error)
        if self.bench.home.repeated:
            assert self.fed == 0
            (transaction,) = self.bench.home.repeated
            self.bench.home.repeated.clear()
            self.bench.renew()
            self.bench.connection.begin(transaction)

    @invariant()
    def is_sane(self) -> None:
        """At most one end; a free connection has no transaction, and nothing unsent."""
        assert len(self.tape.ends) <= 1
        assert self.body.startswith(self.tape.body)
        if self.tape.ends == [None] and self.framing != "eof":
            assert self.tape.body == self.body
        assert len(self.bench.wheel) == (self.transaction is not None and not self.tape.ends)
        for free in self.bench.home.free:
            if not free.is_closing:
                assert not free.is_busy
                assert self.tape.ends == [None]
                assert self.fed == self.whole
                assert not self.line.buffered
                assert len(self.line.written) == 8 + self.size
        if self.tape.ends:
            assert self.line.closing or self.bench.home.free
            self.transaction = None


States.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestStates = States.TestCase
