"""
Answers of backends, in pieces, beside a strict reader of HTTP.

Whatever comes: the sink hears one end, and what it hears is what the reader finds, in all pieces
alike; a connection that comes back carries the next answer, and nothing of the last one.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from balancer.core.verdicts import FailureKind
from balancer.net.connection import MAX_HEAD_BYTES, MAX_HEADERS, MAX_INTERIM
from bench.fuzzing import chance, corpus
from tests.net.test_connection import SHORT, Bench, Tape

WORDS = (
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\0",
        b" ",
        b"\t",
        b":",
        b"\r\n\r\n",
        b"0\r\n\r\n",
        b"5\r\n",
        b";a=b",
    ),
    *(b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"Connection: close\r\n", b"Connection: keep-alive\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
    *(
        b"HTTP/1.1 103 E\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.0",
        b"HTTP/1.1 204 N\r\n\r\n",
        SHORT,
    ),
    *(b"HTTP/1.1 304 N\r\nContent-Length: 3\r\n\r\n", b"Upgrade: h2c\r\n", b"Trailer: x\r\n", b"-"),
    *(
        b"ffffffffffffffff\r\n",
        b"00000000000000005\r\n",
        b"+5",
        b"0x5",
        b"5 ",
        b" 5",
        b"\xff",
        b",",
    ),
    *(b"X: " + b"y" * 5000 + b"\r\n", b"X: y\r\n" * 140, b";" + b"e" * 3000, b"200", b"101", b"1"),
    *(b"HTTP/1.1 104 X\r\nContent-Length: 3\r\n\r\n", b"HTTP/1.1 199 X\r\n", b"104", b"199"),
    *(b" continued\r\n", b"X:\r\n", b": y\r\n", b"X : y\r\n", b"Proxy-Connection: keep-alive\r\n"),
    *(
        b"Transfer-Encoding: \r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"transfer-encoding:chunked \r\n",
    ),
)
CUT = (FailureKind.CUT, FailureKind.RESET)
RECORDS = (
    b'{"a":1}\n' * 5,
    b'{"a":"0\\r\\n"}\n{"b":2}\n0\r\n\r\n',
    b"data: x\n\n" * 3,
    b"\n\n\n\r\n",
)
RECORD = re.compile(rb".*?\n+|.+", re.DOTALL)
READ = re.compile(rb".*?\n\r\n|.+", re.DOTALL)  # as hosts write: a chunk in each


def make(rng: random.Random) -> bytes:
    """What comes over the connection until it ends."""
    data = rng.choice(corpus.answers())
    if rng.random() < 0.3:
        data = _made(rng)
    return chance.mutated(rng, data, WORDS, rng.choice((0, 1, 1, 2, 4)))


def _made(rng: random.Random) -> bytes:
    body = rng.choice((b"", b"hello", b"\r\n0\r\n\r\n", b"x" * 3000, *RECORDS))
    data = rng.choice((b"", b"HTTP/1.1 100 Continue\r\n\r\n" * rng.randint(1, 9)))
    status = rng.choice((b"200 OK", b"204 No", b"304 Not", b"404 Not Found", b"500", b"200 "))
    data += rng.choice((b"HTTP/1.1 ", b"HTTP/1.0 ")) + status + b"\r\n"
    for _ in range(rng.randint(0, 3)):
        data += rng.choice((b"X-A: b\r\n", b"Connection: close\r\n", b"Y:\tz \r\n", b"Empty:\r\n"))
    how = rng.randrange(3)
    if how == 0:
        return data + b"Content-Length: %d\r\n\r\n" % len(body) + body
    if how == 1:
        return data + b"\r\n" + body
    data += b"Transfer-Encoding: chunked\r\n\r\n"
    records = rng.random() < 0.5
    for part in RECORD.findall(body) if records else chance.pieces(rng, body):
        extension = b"" if records else rng.choice((b"", b";a", b';a="b"'))
        data += b"%x%b\r\n%b\r\n" % (len(part), extension, part)
    return data + b"0\r\n" + rng.choice((b"", b"T: 1\r\n")) + b"\r\n"


# -- a strict reader ---------------------------------------------------------------------------

# Nobody reads the reason, and line ends before an answer mean nothing.
STATUS = re.compile(rb"[\r\n]*HTTP/1\.([01]) ([1-5][0-9]{2})( [^\r\n]*)?\r\n")
HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*\r\n")
CHUNK = re.compile(rb"([0-9A-Fa-f]+)(;[\t\x20-\x7e\x80-\xff]*)?\r\n")
EXTENSION = re.compile(rb'(?:;[a-z]+(?:=(?:[a-z]+|"[a-z ]*"))?)*')  # that all readers take
FRAMING = ("content-length", "transfer-encoding", "connection", "upgrade")  # of the answer alone


class _WrongError(ValueError):
    """No HTTP, or none that everybody would understand alike."""


class _ShortError(ValueError):
    """There should be more."""


@dataclass(slots=True)
class Answer:
    """
    What the reader finds.

    Args:
        state: ``complete``, ``open`` (it ends with the connection), ``short``, ``wrong``.
        end: Where it ends.
        unclear: Some readers may refuse it.
    """

    state: str = "short"
    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    end: int = 0
    keep: bool = False
    unclear: bool = False


def reference(data: bytes, *, bare: bool) -> Answer:
    """The answer in *data*."""
    answer = Answer(unclear=b"\t\r\n" in data)  # behind a coding it makes another one
    try:
        _read(data, answer, bare=bare)
    except _WrongError:
        answer.state = "wrong"
    except _ShortError:
        answer.state = "short"
    return answer


def _match(pattern: re.Pattern[bytes], data: bytes, at: int) -> re.Match[bytes]:
    found = pattern.match(data, at)
    if found is None:
        raise _ShortError if data.find(b"\r\n", at) < 0 else _WrongError
    return found


def _headers(data: bytes, at: int, before: int = 0) -> tuple[list[tuple[str, str]], int]:
    told = []
    while not data.startswith(b"\r\n", at):
        found = _match(HEADER, data, at)
        told.append((found[1].decode(), found[2].decode("utf-8", "surrogateescape")))
        at = found.end()
        if len(told) + before > MAX_HEADERS:
            raise _WrongError
    return told, at + 2


def _read(data: bytes, answer: Answer, *, bare: bool) -> None:
    at = interim = 0
    while True:
        line = _match(STATUS, data, at)
        status, (headers, at) = int(line[2]), _headers(data, line.end())
        if not 100 <= status < 200 or status == 101:
            break
        interim += 1
        answer.unclear |= any(name.lower() in FRAMING for name, _ in headers)
        if interim > MAX_INTERIM:
            raise _WrongError
    told = [(name.lower(), value) for name, value in headers]
    lengths = [value for name, value in told if name == "content-length"]
    codings = [value.lower() for name, value in told if name == "transfer-encoding"]
    bad_length = len(lengths) > 1 or not all(map(_is_length, lengths))
    bad_coding = codings and (codings != ["chunked"] or lengths or line[1] == b"0")
    if status == 101 or bad_length or bad_coding:
        raise _WrongError
    answer.status, answer.headers = status, headers
    answer.unclear |= "proxy-connection" in dict(told)  # the parser takes it for the other
    asked = {each.strip().lower() for name, value in told for each in value.split(",")
             if name == "connection"}  # fmt: skip
    stays = "close" not in asked and (line[1] == b"1" or "keep-alive" in asked)
    if bare or status in (204, 304):
        answer.keep = stays and not lengths and not codings and not bare
        answer.end, answer.state = at, "complete"
    elif codings:
        _chunks(data, at, answer)
        answer.keep = stays
    elif lengths:
        answer.body = data[at : at + int(lengths[0])]
        answer.end = at + len(answer.body)
        answer.keep = stays
        answer.state = "complete" if len(answer.body) == int(lengths[0]) else "short"
    else:
        answer.body, answer.end, answer.state = data[at:], len(data), "open"


def _is_length(text: str) -> bool:
    return re.fullmatch("[0-9]+", text) is not None and int(text) < 1 << 64


def _chunks(data: bytes, at: int, answer: Answer) -> None:
    while True:
        line = _match(CHUNK, data, at)
        size, at = int(line[1], 16), line.end()
        answer.unclear |= EXTENSION.fullmatch(line[2] or b"") is None
        if size >= 1 << 64:
            raise _WrongError
        if size == 0:
            break
        answer.body += data[at : at + size]
        if len(data) < at + size + 2:
            raise _ShortError if b"\r\n".startswith(data[at + size :]) else _WrongError
        if data[at + size : at + size + 2] != b"\r\n":
            raise _WrongError
        at += size + 2
    full = len(answer.headers) == MAX_HEADERS  # then no trailer may come; else any number
    trailers, answer.end = _headers(data, at, MAX_HEADERS if full else -len(data))
    answer.unclear |= any(name.lower() in FRAMING for name, _ in trailers)
    answer.state = "complete"


# -- the check ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Heard:
    """
    What came of it.

    Args:
        failure: None: it ended well.
        back: Its connection came back,
        open: and what came behind the answer did not close it.
    """

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    failure: FailureKind | None
    back: bool
    open: bool


def check(data: bytes, rng: random.Random) -> None:
    """Hold what the sink hears against the strict reader, in one piece and in many."""
    bare, ends, full = rng.random() < 0.1, rng.choice(("eof", "reset")), rng.random() < 0.05
    found = reference(data, bare=bare)
    pieces = (chance.pieces(rng, data), chance.pieces(rng, data), READ.findall(data))
    for parts in ([data] if data else [], *pieces):
        heard = _transaction(parts, rng, bare=bare, ends=ends, full=full)
        _agrees(heard, found, data, ends=ends, whole=len(parts) <= 1, full=full)


class _Passing(Tape):
    """Takes chunks with their framing, as soon as there is a head."""

    def chunk(self, data: bytes, lines: list[bytes]) -> None:
        """A whole chunk."""
        part = b"".join(line + b"\n" for line in lines[1:-2])
        assert data == b"%x\r\n%b\r\n" % (len(part), part), "not framed as we would"
        self.data(part)


def _transaction(
    parts: list[bytes], rng: random.Random, *, bare: bool, ends: str, full: bool
) -> Heard:
    bench, tape = Bench(), _Passing()
    if rng.random() < 0.3:
        bench.warm()
    bench.line.room = 5 if full else math.inf
    transaction = bench.begin(tape, b"b" * rng.choice((0, 10, 100_000)), bare=bare)
    for part in parts:
        if bench.line.closing:
            break
        if rng.random() < 0.1:
            transaction.pause()
        if not bench.line.reading:
            transaction.resume()
        bench.connection.data_received(part)
        if tape.status:
            transaction.pass_chunks(tape)
        _is_bounded(bench)
    if not tape.ends and not bench.line.closing:
        if ends == "eof":
            bench.connection.eof_received()
        bench.connection.connection_lost(None if ends == "eof" else ConnectionResetError(104, "x"))
    stale = bool(bench.home.repeated)
    assert len(tape.ends) + stale == 1, "it has not ended, or twice"
    assert len(bench.wheel) == stale, "it is still watched"
    back = bench.connection in bench.home.free
    is_open = back and not bench.line.closing
    assert back or bench.line.closing or ends in ("eof", "reset")
    if is_open:
        _is_clean(bench)
    end = None if stale else tape.ends[0]
    kind = FailureKind.RESET if stale else None if end is None else end.kind
    return Heard(tape.status, tape.headers, tape.body, kind, back, is_open)


def _is_bounded(bench: Bench) -> None:
    connection = cast("Any", bench.connection)
    assert len(connection._headers) <= MAX_HEADERS  # noqa: SLF001 - memory is bounded by these
    assert bench.line.closing or not connection._parts  # noqa: SLF001
    assert bench.line.closing or connection._quiet_bytes <= MAX_HEAD_BYTES  # noqa: SLF001


def _is_clean(bench: Bench) -> None:
    """The next answer over it is the next answer."""
    assert bench.line.reading
    assert not bench.line.buffered
    told = bench.told(SHORT)
    assert (told.status, told.body, told.ends) == (200, b"ok", [None])
    assert [name for name, _ in told.headers] == ["Content-Length"]


def _agrees(
    heard: Heard, found: Answer, data: bytes, *, ends: str, whole: bool, full: bool
) -> None:
    behind = data[found.end :].strip(b"\r\n") != b""  # line ends the parser passes over
    told: Callable[[], tuple[Any, ...]] = lambda: (heard.status, heard.headers, heard.body)  # noqa: E731
    wanted = (found.status, found.headers, found.body)
    if heard.open:
        assert found.state == "complete", f"to be used again, though it is {found.state}"
        assert not behind, "to be used again, though more came behind"
        assert not full, "to be used again, though the request was not sent"
    if found.unclear and heard.failure is FailureKind.MALFORMED:
        return
    if found.state == "wrong":
        assert heard.failure is not None, "it passes, though it is no clear HTTP"
    elif found.state == "complete" and not behind:
        assert (heard.failure, *told()) == (None, *wanted)
        kept = found.keep and not full
        sure = found.end == len(data) and not found.unclear
        assert heard.open is kept or not sure, "kept or not, against the rules"
    elif found.state == "complete" and (whole or heard.failure):
        assert heard.failure in (None, FailureKind.MALFORMED)
        assert found.body.startswith(heard.body)
    elif found.state == "complete":
        assert told() == wanted
    elif found.state == "open":
        assert (heard.failure is None) is (ends == "eof")
        assert told() == wanted
    else:
        assert heard.failure in (*CUT, FailureKind.MALFORMED), "it ends, though it was cut short"
        assert heard.failure is FailureKind.MALFORMED or found.body == heard.body
