"""
Requests of clients, many on a connection and in pieces, beside a strict reader of HTTP.

Whatever comes: each request that was begun is ended, answers come in the order of the requests, in
all pieces alike; then the connection is closed in its time, and nothing is left or complained of.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from balancer.net.listener import MAX_HEADERS, make_server
from bench.fuzzing import chance, corpus
from bench.fuzzing.desk import BODY_S, KINDS, Asked, Desk, Ear, Line, StillLoop

HEAD_S, KEEPALIVE_S, SOON_S = 10.0, 75.0, 5.0
LONGEST_S = 1000.0  # in which any connection has to be closed
HOST = b"Host: localhost\r\n"
WORDS = (
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\r\n\r\n", b"0\r\n\r\n", b"5\r\n", b";a"),
    *(b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"Connection: close\r\n", b"Connection: keep-alive\r\n", b"Expect: 100-continue\r\n", HOST),
    *(b"Upgrade: h2c\r\nConnection: Upgrade\r\n", b"HTTP/1.0", b"GET /now HTTP/1.1\r\n" + HOST),
    *(
        b"CONNECT a:1 HTTP/1.1\r\n",
        b"Upgrade: websocket\r\nConnection: upgrade\r\n",
        b"HEAD /live ",
    ),
    *(b"ffffffffffffffff\r\n", b"+5", b"0x5", b"\xff", b",X: " + b"y" * 9000 + b"\r\n", b"/"),
    *(
        b"X: y\r\n" * 140,
        b";" + b"e" * 70_000,
        b" continued\r\n",
        b"X:\r\n",
        b"Content-Encoding: gzip\r\n",
    ),
    *(b"Sec-WebSocket-Key1: x\r\n", b"Transfer-Encoding: \r\n", b"y" * 70_000, b"POST", b"/task"),
)


# -- inputs ------------------------------------------------------------------------------------


def make(rng: random.Random) -> bytes:
    """What a client sends."""
    if rng.random() < 0.2:
        data = rng.choice(corpus.requests())
    else:
        many = rng.choice((1, 1, 2, 2, 3, 5, 70))
        data = b"".join(_request(rng, small=many > 5) for _ in range(many))
    return chance.mutated(rng, data, WORDS, rng.choice((0, 0, 1, 1, 2, 4)))


def _request(rng: random.Random, *, small: bool) -> bytes:
    method = rng.choice((b"GET", b"POST", b"POST", b"POST", b"HEAD"))
    path = f"/{rng.choice(KINDS)}/{rng.randrange(100)}".encode()
    head = (
        b"%b %b HTTP/1.%b\r\n" % (method, path, rng.choice((b"1", b"1", b"1", b"1", b"0"))) + HOST
    )
    if rng.random() < 0.05:
        head += rng.choice((b"Connection: close\r\n", b"Connection: keep-alive\r\n"))
    if method != b"POST":
        return head + b"\r\n"
    body = b"b" * rng.choice((0, 1, 5, 300) if small else (0, 1, 5, 300, 70_000))
    if rng.random() < 0.6 or b"HTTP/1.0" in head:
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    for part in chance.pieces(rng, body):
        head += b"%x\r\n%b\r\n" % (len(part), part)
    return head + b"0\r\n\r\n"


# -- a strict reader ---------------------------------------------------------------------------

METHODS = (b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS")
LINE = re.compile(rb"(%b) (/[!-~]*) HTTP/1\.([01])\r\n" % b"|".join(METHODS))
HEADER = re.compile(rb"([A-Za-z0-9-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*\r\n")
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[a-z]*)?\r\n")
_SHORT = b"|".join(method[:end] for method in METHODS for end in range(len(method)))
BEGUN = {  # a part of a line, of which more may come
    LINE: re.compile(
        rb"%b|(%b)( (/[!-~]*( (HTTP/1\.[01]\r?)?)?)?)?" % (_SHORT, b"|".join(METHODS))
    ),
    HEADER: re.compile(rb"\r|[A-Za-z0-9-]*|[A-Za-z0-9-]+:[\t\x20-\x7e\x80-\xff]*\r?"),
    CHUNK: re.compile(rb"[0-9A-Fa-f]{0,8}|[0-9A-Fa-f]+(;[a-z]*)?\r?"),
}
SPECIAL = (b"upgrade", b"expect", b"sec-websocket-key1", b"te", b"trailer", b"keep-alive")
CLEAR_BYTES = 4000  # of a head that passes no limit


@dataclass(slots=True)
class Found:
    """
    What the reader finds.

    Args:
        asked: Requests that everybody understands alike.
        state: Of what comes behind them: ``none``, ``head`` and ``body`` (a part of one),
            ``closed`` (it was the last request), ``unclear``.
    """

    asked: list[Asked] = field(default_factory=list)
    state: str = "none"


class _UnclearError(ValueError):
    pass


class _PartError(ValueError):
    pass


def reference(data: bytes) -> Found:
    """The requests in *data*."""
    found, at = Found(), 0
    try:
        while at < len(data):
            found.state = "head"
            method, path, version, headers, at = _head(data, at)
            found.state = "body"
            body, at = _body(data, at, headers)
            found.asked.append(Asked(method, path, body))
            found.state = "none"
            told = b",".join(value.lower() for name, value in headers if name == b"connection")
            asked = [each.strip() for each in told.split(b",")]
            if b"close" in asked or (version == b"0" and b"keep-alive" not in asked):
                found.state = "unclear" if data[at:].strip(b"\r\n") else "closed"
                break
    except _PartError:
        pass
    except _UnclearError:
        found.state = "unclear"
    return found


def _match(pattern: re.Pattern[bytes], data: bytes, at: int) -> re.Match[bytes]:
    found = pattern.match(data, at)
    if found is None:
        rest = data[at : at + CLEAR_BYTES + 1]
        may_be = len(rest) <= CLEAR_BYTES and BEGUN[pattern].fullmatch(rest)
        raise _PartError if may_be else _UnclearError
    return found


Headers = list[tuple[bytes, bytes]]


def _head(data: bytes, at: int) -> tuple[str, str, bytes, Headers, int]:
    line, start = _match(LINE, data, at), at
    headers: Headers = []
    at = line.end()
    if at - start > CLEAR_BYTES:
        raise _UnclearError
    while not data.startswith(b"\r\n", at):
        found = _match(HEADER, data, at)
        name, value = found[1].lower(), found[2]
        odd = name in SPECIAL or name in dict(headers) or len(headers) == MAX_HEADERS
        odd |= name == b"content-length" and re.fullmatch(rb"[0-9]{1,9}", value) is None
        odd |= name == b"transfer-encoding" and (value.lower(), line[3]) != (b"chunked", b"1")
        headers.append((name, value))
        at = found.end()
        odd |= at - start > CLEAR_BYTES
        if odd or {b"transfer-encoding", b"content-length"} <= set(dict(headers)):
            raise _UnclearError
    if b"host" not in dict(headers) and line[3] == b"1":
        raise _UnclearError
    return line[1].decode(), line[2].decode(), line[3], headers, at + 2


def _body(data: bytes, at: int, headers: Headers) -> tuple[bytes, int]:
    told = dict(headers)
    if b"transfer-encoding" in told:
        return _chunks(data, at)
    body = data[at : at + int(told.get(b"content-length", b"0"))]
    if len(body) < int(told.get(b"content-length", b"0")):
        raise _PartError
    return body, at + len(body)


def _chunks(data: bytes, at: int) -> tuple[bytes, int]:
    body, began = b"", at
    while True:
        line = _match(CHUNK, data, at)
        size, at = int(line[1], 16), line.end()
        if size == 0:
            break
        body += data[at : at + size]
        at += size
        end = data[at : at + 2]
        if end != b"\r\n":
            raise _PartError if b"\r\n".startswith(end) else _UnclearError
        at += 2
    while not data.startswith(b"\r\n", at):
        raise _UnclearError if data[at:] not in (b"", b"\r") else _PartError
    if at - began > len(body) * 10 + CLEAR_BYTES:
        raise _UnclearError
    return body, at + 2


# -- the check ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Client:
    """
    How a client behaves.

    Args:
        ends: ``waits`` until it is closed, ``shuts`` its side, or ``leaves``.
    """

    parts: list[bytes]
    ends: str
    slow_s: float | None
    seed: int


@dataclass(slots=True)
class Talk:
    """
    What came of it.

    Args:
        quiet_s: From the last byte on either side until it was closed.
        done: As `Desk.done`.
    """

    answers: list[tuple[int, bytes]]
    done: list[tuple[str, str, bytes | None]]
    quiet_s: float


def check(data: bytes, rng: random.Random) -> None:
    """Have clients send it in several ways, and hold the answers against the strict reader."""
    found = reference(data)
    ends = rng.choice(("waits", "waits", "shuts", "leaves"))
    slow_s = rng.choice((None, None, None, 0.1, 3.0))
    talks = []
    for parts in ([data] if data else [], chance.pieces(rng, data), chance.pieces(rng, data)):
        talk = _run(_talk(Client(parts, ends, slow_s, rng.getrandbits(32))))
        talks.append(talk)
        _agrees(talk, found, ends)
    if ends == "waits":
        for talk in talks[1:]:
            for one, other in zip(talk.done, talks[0].done, strict=False):
                damaged = None in (one[-1], other[-1])  # or with too much around its bytes
                assert one == other or damaged, "it depends on the pieces"


def _agrees(talk: Talk, found: Found, ends: str) -> None:
    wanted = [(200, b"" if asked.method == "HEAD" else asked.mark) for asked in found.asked]
    got = [(status, body.rstrip(b".")) for status, body in talk.answers]
    clear = got[: len(wanted)]
    refused = [n for n, (status, _) in enumerate(got) if status != 200]
    assert refused in ([], [len(got) - 1]), "something came behind a refusal"
    if found.state == "unclear" and refused and refused[0] < len(wanted):
        clear = got[: refused[0]]
    assert clear == wanted[: len(clear)], "other answers than were asked for"
    if ends != "waits":
        return
    if found.state in ("none", "closed"):
        assert got == wanted, "not every request was answered"
    elif found.state != "unclear":
        assert len(got) >= len(wanted), "not every request was answered"
    _is_in_time(talk, found)


def _is_in_time(talk: Talk, found: Found) -> None:
    if found.state == "closed":
        assert talk.quiet_s <= SOON_S, "not closed behind the last answer"
    elif found.state == "head":
        assert talk.quiet_s <= HEAD_S + 1.0, "a part of a head may stay"
    elif found.state == "body":
        assert talk.quiet_s <= BODY_S + SOON_S, "a part of a body may stay"
    elif found.state == "none" and talk.answers:
        assert abs(talk.quiet_s - KEEPALIVE_S) < SOON_S, "an idle connection has another time"
    assert talk.quiet_s <= KEEPALIVE_S + SOON_S


def _run(talk: Coroutine[Any, Any, Talk]) -> Talk:
    ear, loop = Ear(), StillLoop()
    loggers = [logging.getLogger(name) for name in ("aiohttp", "asyncio")]
    loop.set_exception_handler(lambda _, context: ear.heard.append(str(context)))
    for logger in loggers:
        logger.addHandler(ear)
        logger.propagate = False
    try:
        told = loop.run_until_complete(talk)
        assert ear.heard == [], "complained of"
        return told
    finally:
        loop.close()
        for logger in loggers:
            logger.removeHandler(ear)
            logger.propagate = True


async def _talk(client: Client) -> Talk:
    rng, desk = random.Random(client.seed), Desk()
    server = make_server(desk, keepalive_s=KEEPALIVE_S, head_timeout_s=HEAD_S, max_header=8190)
    line = Line(client.slow_s)
    line.protocol = server()
    line.protocol.connection_made(line)
    fed_at = await _send(client.parts, line, rng)
    if client.ends != "waits":
        await asyncio.sleep(rng.choice((0.0, 0.1, 2.0)))
    if client.ends == "leaves" and line.closed_at is None:
        line.lose(ConnectionResetError(104, "x"))
    elif client.ends == "shuts" and not line.is_closing() and not line.protocol.eof_received():
        line.close()
    with suppress(TimeoutError):
        await asyncio.wait_for(line.closed.wait(), LONGEST_S)
    assert line.closed_at is not None, "it is never closed"
    await asyncio.sleep(SOON_S)
    assert desk.open == [], "a request was begun and not ended"
    assert server.connections == []
    assert len(asyncio.all_tasks()) == 1, "a task is left"
    cut = client.ends != "waits" or client.slow_s is not None
    answers = _answers(bytes(line.written), [method for method, *_ in desk.done], cut=cut)
    return Talk(answers, desk.done, line.closed_at - max(fed_at, line.wrote_at))


async def _send(parts: list[bytes], line: Line, rng: random.Random) -> float:
    """When the last of it was sent."""
    loop, pauses = asyncio.get_running_loop(), 5
    for part in parts:
        asked_at = loop.time()
        while not line.reading and not line.is_closing():
            assert loop.time() < asked_at + LONGEST_S, "it reads no more"
            await asyncio.sleep(0.05)
        if line.is_closing():
            break
        line.protocol.data_received(part)
        if pauses and rng.random() < 0.1:
            pauses -= 1
            await asyncio.sleep(rng.choice((0.01, 0.06, 0.3)))
        for _ in range(rng.choice((0, 0, 1, 3))):
            await asyncio.sleep(0)
    return loop.time()


ANSWER = re.compile(rb"HTTP/1\.[01] ([0-9]{3}) [^\r\n]*\r\n((?:[^\r\n]+\r\n)*)\r\n")


def _answers(wire: bytes, methods: list[str], *, cut: bool) -> list[tuple[int, bytes]]:
    """What was written, taken apart; nothing may be left over, but of one that was cut."""
    told, at = list[tuple[int, bytes]](), 0
    while at < len(wire):
        head = ANSWER.match(wire, at)
        assert head is not None, "what was written is no answer"
        status, at = int(head[1]), head.end()
        length = re.search(rb"(?mi)^content-length: *([0-9]+)\r$", head[2])
        assert length is not None, "an answer without a length"
        is_bare = len(told) < len(methods) and methods[len(told)] == "HEAD" and status == 200
        size = 0 if is_bare else int(length[1])
        assert cut or at + size <= len(wire), "an answer is cut"
        told.append((status, wire[at : at + size]))
        at += size
    return told
