"""The connections to one target, over real sockets, in both kinds of loops."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from balancer.core import routes
from balancer.core.verdicts import Failure, FailureKind
from balancer.net import connections
from balancer.net.connecting import Way
from balancer.net.connections import IDLE_S, LIFETIME_S, MAX_CONNECTING, MAX_IDLE
from balancer.net.upstream import Target
from tests.e2e.stage import virtual
from tests.needs import program
from tests.net.parts import FakeLease, Tape, a_call
from tests.net.peer import OK, Door, Line, Peer, answering, both, door, until
from tests.rig import dead_url

pytestmark = pytest.mark.usefixtures("quiet")
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


async def forever(line: Line) -> None:
    """Answer every request."""
    while True:
        await line.request()
        line.send(OK)


async def mute(line: Line) -> None:
    """Read a request, and say nothing."""
    await line.request()
    await line.closed()


async def together(there: Door, count: int) -> None:
    """So many calls at once, all answered."""
    tapes = [Tape() for _ in range(count)]
    for tape in tapes:
        there.open(tape)
    for tape in tapes:
        await tape.over()
        assert tape.ends == [None]


# -- taking and giving back -----------------------------------------------------------------------


@both
async def test_a_request_over_a_kept_connection_is_written_at_once() -> None:
    """Before `open` returns, without a task; the answer is pushed by the read that brings it."""
    seen = asyncio.Event()

    async def serve(line: Line) -> None:
        await line.request()
        line.send(OK)
        await line.request()
        seen.set()
        line.send(OK)
        await line.closed()

    async with Peer(serve) as peer, door(peer) as there:
        await there.told()
        tape = Tape()
        before = asyncio.all_tasks()
        there.open(tape, body=b"now")
        assert asyncio.all_tasks() == before
        assert there.idle == 0
        await seen.wait()
        await tape.over()
        assert (tape.status, tape.body, tape.ends) == (200, b"ok", [None])
        assert peer.accepted == 1


@both
async def test_the_warmest_is_taken_first() -> None:
    """So that a surplus grows old."""
    served: list[int] = []

    async def serve(line: Line) -> None:
        number = peer.accepted
        while True:
            await line.request()
            served.append(number)
            line.send(OK)

    async with Peer(serve) as peer, door(peer) as there:
        await together(there, 3)
        for _ in range(4):
            await there.told()
        assert peer.accepted == 3
        assert served[3:] == [served[-1]] * 4


@virtual
async def test_what_rests_too_long_is_closed() -> None:
    """Each by itself, while the one in use stays."""
    async with Peer(forever) as peer, door(peer) as there:
        await together(there, 3)
        for _ in range(8):
            await asyncio.sleep(IDLE_S / 4)
            await there.told()
        assert (there.idle, peer.open, peer.accepted) == (1, 1, 3)
        await asyncio.sleep(IDLE_S + 1)
        assert (there.idle, peer.open) == (0, 0)


@virtual
async def test_a_surplus_is_closed_one_by_one() -> None:
    """Without any call that would look at it."""
    async with Peer(forever) as peer, door(peer) as there:
        first, second = Tape(), Tape()
        there.open(first)
        there.open(second, replayable=False)
        await first.over()
        await second.over()
        await asyncio.sleep(IDLE_S / 2)
        await there.told()
        await asyncio.sleep(IDLE_S / 2 + 1)
        assert there.idle == 1
        await asyncio.sleep(IDLE_S / 2)
        assert (there.idle, peer.open) == (0, 0)


@both
async def test_a_connection_that_is_being_closed_is_not_taken() -> None:
    """Although its end has not been told yet."""
    async with Peer(forever) as peer, door(peer) as there:
        await together(there, 2)
        there.upstream._connections["a"]._idle[-1].data_received(b"unasked")
        assert there.idle == 2
        assert (await there.told()).ends == [None]
        assert (peer.accepted, there.upstream.stale) == (2, {})


@virtual
async def test_what_is_too_old_is_not_used_again() -> None:
    """However busy it was."""
    async with Peer(forever) as peer, door(peer) as there:
        for _ in range(int(LIFETIME_S / 20) + 1):
            await there.told()
            await asyncio.sleep(20)
        assert peer.accepted == 2


@both
async def test_no_more_than_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coldest goes."""
    monkeypatch.setattr(connections, "MAX_IDLE", 3)
    assert MAX_IDLE == 64
    async with Peer(forever) as peer, door(peer) as there:
        await together(there, 6)
        assert there.idle == 3
        await until(lambda: peer.open == 3)


@both
async def test_a_connection_that_the_backend_closes_at_rest_is_forgotten() -> None:
    """The next call has a new one, and nothing was stale."""
    async with Peer(answering(OK)) as peer, door(peer) as there:
        await there.told()
        for task in peer._tasks:
            task.cancel()
        await until(lambda: there.idle == 0)
        assert (await there.told()).ends == [None]
        assert (peer.accepted, there.upstream.stale) == (2, {})


@both
@pytest.mark.parametrize(
    "unasked", [b"H", OK, b"HTTP/1.1 408 Timeout\r\nConnection: close\r\n\r\n"]
)
async def test_bytes_that_nobody_asked_for_close_it(unasked: bytes) -> None:
    """They are no answer to the next request."""
    say = asyncio.Event()

    async def serve(line: Line) -> None:
        await line.request()
        line.send(OK)
        await say.wait()
        line.send(unasked)
        await line.closed()

    async with Peer(serve) as peer, door(peer) as there:
        await there.told()
        say.set()
        await until(lambda: peer.open == 0)
        assert there.idle == 0


# -- stale connections ----------------------------------------------------------------------------


def once(how: str) -> Callable[[Line], Any]:
    """Answer one request on the first connection, then end it in this way; serve the others."""
    count = 0

    async def serve(line: Line) -> None:
        nonlocal count
        count += 1
        if count > 1:
            await forever(line)
        await line.request()
        line.send(OK)
        await line.request() if how != "half" else await line.reader.read(10)
        if how == "reset":
            line.reset()

    return serve


@both
@pytest.mark.parametrize("how", ["close", "reset", "half"])
async def test_a_request_that_meets_a_closed_connection_is_sent_once_more(how: str) -> None:
    """Over a new one; the caller hears of nothing but the answer, and it is counted."""
    async with Peer(once(how)) as peer, door(peer) as there:
        await there.told()
        body = b"x" * (2_000_000 if how == "half" else 10)
        tape = await there.told(body=body)
        assert (tape.body, tape.ends) == (b"ok", [None])
        assert (peer.accepted, there.upstream.stale) == (2, {"a": 1})


@both
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_new_connection_is_tried_but_once(how: str) -> None:
    """What the backend does to that is its own doing."""

    async def serve(line: Line) -> None:
        await line.request()
        if peer.accepted == 1:
            line.send(OK)
            await line.request()
        if how == "reset":
            line.reset()

    async with Peer(serve) as peer, door(peer) as there:
        await there.told()
        tape = await there.told()
        assert (tape.failure.kind, tape.failure.accepted) == (FailureKind.RESET, True)
        assert not tape.failure.reused
        assert (peer.accepted, there.upstream.stale) == (2, {"a": 1})


@both
@pytest.mark.parametrize("count", [1, 20, len(OK) - 3])
async def test_what_has_begun_to_answer_is_not_stale(count: int) -> None:
    """RST after some bytes of an answer: the request may have been carried out."""

    async def serve(line: Line) -> None:
        await line.request()
        line.send(OK)
        await line.request()
        line.send(OK[:count])
        await asyncio.sleep(0.05)  # else the reset overtakes them
        line.reset()

    async with Peer(serve) as peer, door(peer) as there:
        await there.told()
        tape = await there.told()
        assert tape.failure.kind is (FailureKind.CUT if count > 38 else FailureKind.RESET)
        assert (peer.accepted, there.upstream.stale) == (1, {})


@both
async def test_a_stale_hit_empties_what_is_at_rest() -> None:
    """Where one was closed, the others were, too: no second call meets one."""

    async def serve(line: Line) -> None:
        number = peer.accepted
        await line.request()
        line.send(OK)
        if number <= 4:
            await line.request()
            return
        await forever(line)

    async with Peer(serve) as peer, door(peer) as there:
        await together(there, 4)
        await there.told()
        assert (there.idle, peer.accepted) == (1, 5)
        await until(lambda: peer.open == 1)
        await there.told()
        assert there.upstream.stale == {"a": 1}


@both
async def test_what_must_not_be_sent_twice_is_sent_once() -> None:
    """It takes a new connection although one is at rest, and its loss is told."""

    async def serve(line: Line) -> None:
        await line.request()
        if peer.accepted == 1:
            line.send(OK)
            await line.closed()

    async with Peer(serve) as peer, door(peer) as there:
        await there.told()
        tape = await there.told(replayable=False)
        assert tape.failure.kind is FailureKind.RESET
        assert (peer.accepted, there.upstream.stale) == (2, {})


@both
async def test_an_abort_from_between_stale_and_new() -> None:
    """Nobody is told, and nothing is left over."""
    async with Peer(once("close")) as peer, door(peer) as there:
        await there.told()
        tape = Tape()
        handle = there.open(tape)
        while not there.upstream.stale:
            await asyncio.sleep(0)
        handle.abort()
        await until(lambda: peer.open == 0)
        assert tape.ends == []


# -- connecting -----------------------------------------------------------------------------------


@both
async def test_no_more_than_so_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for their turn, and all come through."""
    at_once, most = 0, 0
    connect = Way.connect

    async def slowly(self: Any, made: Any) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.01)
        try:
            return await connect(self, made)
        finally:
            at_once -= 1

    monkeypatch.setattr(Way, "connect", slowly)
    async with Peer(forever) as peer, door(peer) as there:
        await together(there, 3 * MAX_CONNECTING)
        assert most == MAX_CONNECTING
        assert peer.accepted == 3 * MAX_CONNECTING


@both
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4, 5, 6, 8, 12])
async def test_an_abort_while_connecting(turns: int) -> None:
    """At whatever point: no connection, no task is left, and nobody is told."""
    async with Peer(forever) as peer, door(peer) as there:
        tape = Tape()
        handle = there.open(tape)
        for _ in range(turns):
            await asyncio.sleep(0)
        handle.abort()
        handle.abort()
        ended = list(tape.ends)
        await asyncio.sleep(0.02)
        assert tape.ends == ended
        await until(lambda: peer.open == there.idle)


@both
async def test_a_backend_that_refuses_is_told_at_once() -> None:
    """To each of many; the request was never sent."""
    async with Peer(forever) as peer, door(peer, url=dead_url()) as there:
        for tape in await asyncio.gather(*(there.told() for _ in range(40))):
            assert tape.failure == Failure(FailureKind.CONNECT, "connection refused")


# -- requests and answers -------------------------------------------------------------------------


@both
@pytest.mark.parametrize("size", [0, 100, 65_536, 65_537, 5_000_000])
async def test_a_request_arrives_as_it_was(size: int) -> None:
    """Of any size, one after the other over one connection."""
    body = bytes(n * 7 % 256 for n in range(1000)) * (size // 1000 + 1)
    seen: list[bytes] = []

    async def serve(line: Line) -> None:
        while True:
            seen.append(await line.request())
            line.send(OK)

    async with Peer(serve) as peer, door(peer) as there:
        for _ in range(2):
            assert (await there.told(body=bytearray(body[:size]))).ends == [None]
        assert [one.partition(b"\r\n\r\n")[2] == body[:size] for one in seen] == [True, True]
        assert peer.accepted == 1


@both
@pytest.mark.parametrize("closes", [False, True])
async def test_an_answer_before_the_request_is_sent(*, closes: bool) -> None:
    """It is told; the rest is not sent, and the connection carries nothing more."""

    async def serve(line: Line) -> None:
        await line.reader.readuntil(b"\r\n\r\n")
        line.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        if closes:
            line.writer.write_eof()
        await asyncio.sleep(0.05)
        rest = await line.closed()
        assert len(rest) < 200_000_000

    async with Peer(serve) as peer, door(peer) as there:
        tape = await there.told(body=b"x" * 200_000_000)
        assert (tape.status, tape.body, tape.ends) == (413, b"no", [None])
        assert there.idle == 0
        await until(lambda: peer.open == 0)


@both
async def test_a_slow_backend_is_not_flooded() -> None:
    """A large request waits in our hands, not in the transport's."""
    go = asyncio.Event()

    async def serve(line: Line) -> None:
        await go.wait()
        await line.request()
        line.send(OK)

    async with Peer(serve) as peer, door(peer) as there:
        tape = Tape()
        handle: Any = there.open(tape, body=b"x" * 50_000_000)
        await until(lambda: handle.connection is not None and not handle.connection._writable)
        await asyncio.sleep(0.02)
        assert handle.connection._transport.get_write_buffer_size() < 1_000_000
        go.set()
        await tape.over()
        assert tape.ends == [None]


@both
async def test_a_slow_reader_holds_the_backend_back() -> None:
    """While it is paused no more than one read comes; afterwards all, in order."""
    pieces = [bytes([n % 256]) * 100_000 for n in range(300)]

    async def serve(line: Line) -> None:
        await line.request()
        line.send(b"HTTP/1.1 200 OK\r\nContent-Length: 30000000\r\n\r\n")
        for piece in pieces:
            line.send(piece)
            await line.writer.drain()
        await line.closed()

    async with Peer(serve) as peer, door(peer) as there:
        tape = Tape()
        handle = there.open(tape)
        await tape.begun()
        for _ in range(3):
            handle.pause()
            held = len(tape.body)
            await asyncio.sleep(0.02)
            assert len(tape.body) - held <= 262_144
            assert len(tape.body) < 30_000_000
            handle.resume()
            await until(lambda held=held: len(tape.body) > held + 262_144)  # type: ignore[misc]
        await tape.over()
        assert tape.body == b"".join(pieces)
        assert there.idle == 1


@both
async def test_an_answer_that_ends_with_its_connection() -> None:
    """Without a length the end of the connection is its end, and a reset is none."""

    async def serve(line: Line) -> None:
        await line.request()
        line.send(b"HTTP/1.1 200 OK\r\n\r\nsome ")
        await line.writer.drain()
        await asyncio.sleep(0.02)
        if peer.accepted == 2:
            line.reset()
        else:
            line.send(b"text")
            line.writer.write_eof()
            await line.closed()

    async with Peer(serve) as peer, door(peer) as there:
        tape = await there.told()
        assert (tape.body, tape.ends) == (b"some text", [None])
        assert (await there.told()).failure.kind is FailureKind.CUT
        assert there.idle == 0


@both
async def test_a_head_alone_ends_the_call() -> None:
    """The length it tells is that of nothing."""
    route = next(one for one in routes.TABLE if one.method == "HEAD")

    async def serve(line: Line) -> None:
        assert (await line.request()).startswith(b"HEAD ")
        line.send(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n")
        await line.closed()

    async with Peer(serve) as peer, door(peer) as there:
        call, tape = a_call(), Tape()
        object.__setattr__(call, "route", route)
        there.upstream.open(FakeLease(peer.url).as_lease, call, tape)
        await tape.over()
        assert (tape.status, tape.body, tape.ends) == (200, b"", [None])
        assert there.idle == 0


@both
async def test_an_abort_at_each_byte_reaches_the_backend() -> None:
    """Soon, whatever was sent by then; nothing is kept."""
    gone: list[int] = []

    async def serve(line: Line) -> None:
        await line.request()
        at = peer.accepted - 1
        line.send((STREAM + b"2\r\nok\r\n" + LAST)[:at])
        await line.closed()
        gone.append(at)

    async with Peer(serve) as peer, door(peer) as there:
        for at in range(len(STREAM) + 8):
            tape = Tape()
            handle = there.open(tape)
            await until(lambda at=at: peer.accepted == at + 1)  # type: ignore[misc]
            await asyncio.sleep(0)
            handle.abort()
            async with asyncio.timeout(1):
                await until(lambda at=at: len(gone) == at + 1)  # type: ignore[misc]
            assert tape.ends == []
            assert there.idle == 0


@both
async def test_a_call_may_begin_from_within_the_end_of_another() -> None:
    """The next takes the very connection of the last."""

    class Chain(Tape):
        def end(self) -> None:
            super().end()
            tapes.append(Chain())
            if len(tapes) <= 50:
                there.open(tapes[-1])

    async with Peer(forever) as peer, door(peer) as there:
        tapes = [Chain()]
        there.open(tapes[0])
        await until(lambda: len(tapes) == 51)
        assert (peer.accepted, there.idle) == (1, 1)


HOSTILE = [
    OK + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison",
    OK + b"poison",
    b"HTTP/1.1 204 No\r\nContent-Length: 6\r\n\r\n",
    b"HTTP/1.1 304 No\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\npoison",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 8\r\n\r\nokpoison",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\npoison",
    b"HTTP/1.1 101 S\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\npoison",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 9,
]


@both
@pytest.mark.parametrize("poison", HOSTILE)
@pytest.mark.parametrize("later", [False, True])
async def test_a_hostile_backend_never_answers_the_next_call(poison: bytes, *, later: bool) -> None:
    """Whatever it sends beside its answer, in one read or after it: the next has its own."""

    async def serve(line: Line) -> None:
        await line.request()
        if peer.accepted > 1:
            line.send(OK)
            await line.closed()
            return
        if later:
            line.send(poison[:-6])
            await line.writer.drain()
            await asyncio.sleep(0.01)
            line.send(poison[-6:])
        else:
            line.send(poison)
        await line.closed()

    async with Peer(serve) as peer, door(peer) as there:
        first = await there.told()
        assert b"poison" not in first.body
        await until(lambda: peer.open == 0)
        second = await there.told()
        assert (second.body, second.ends) == (b"ok", [None])


# -- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1, and its key."""
    room = tmp_path_factory.mktemp("papers")
    subprocess.run(
        [program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt",
         "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1", "-subj", "/CN=x", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=room, check=True, capture_output=True,
    )  # fmt: skip
    return room


def contexts(papers: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's, and that of who trusts it."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(papers / "cert.pem", papers / "key.pem")
    return server, ssl.create_default_context(cafile=str(papers / "cert.pem"))


@both
async def test_a_connection_over_tls_is_used_again(papers: Path) -> None:
    """One handshake for many calls, small and large; a stale one is noticed as over plain TCP."""
    server, client = contexts(papers)

    async def serve(line: Line) -> None:
        for _ in range(4):
            await line.request()
            line.send(OK)
        await line.request()

    async with Peer(serve, server) as peer, door(peer, tls=client) as there:
        for size in (10, 65_536, 3_000_000, 10):
            assert (await there.told(body=b"x" * size)).ends == [None]
        assert peer.accepted == 1
        assert (await there.told()).ends == [None]
        assert (peer.accepted, there.upstream.stale) == (2, {"a": 1})


@both
async def test_an_abort_and_a_pause_over_tls(papers: Path) -> None:
    """As over plain TCP."""
    server, client = contexts(papers)
    gone = asyncio.Event()

    async def serve(line: Line) -> None:
        await line.request()
        line.send(STREAM)
        try:
            while True:
                line.send(b"186A0\r\n" + b"x" * 100_000 + b"\r\n")
                await line.writer.drain()
                await asyncio.sleep(0)  # drain alone lets nobody else run until it must wait
        finally:
            gone.set()

    async with Peer(serve, server) as peer, door(peer, tls=client) as there:
        tape = Tape()
        handle = there.open(tape)
        await tape.begun()
        handle.pause()
        await asyncio.sleep(0.05)
        held = len(tape.body)
        await asyncio.sleep(0.05)
        assert len(tape.body) - held < 1_000_000
        handle.resume()
        await until(lambda: len(tape.body) > held)
        handle.abort()
        await asyncio.wait_for(gone.wait(), 5)
        assert tape.ends == []


@both
async def test_a_certificate_that_nobody_trusts_is_told(papers: Path) -> None:
    """And nothing is sent."""
    server, _ = contexts(papers)
    async with Peer(forever, server) as peer, door(peer) as there:
        tape = await there.told()
        assert tape.failure.kind is FailureKind.CONNECT
        assert "its certificate is not trusted" in tape.failure.detail
        there.upstream.targets["a"] = Target(peer.url, tls=False)
        assert (await there.told()).ends == [None]
