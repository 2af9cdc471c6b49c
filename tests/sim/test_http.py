"""Framing and connections, with an app that answers what the test says."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from balancer.sim.http import BUFFERED_BYTES, Exchange, Server
from balancer.sim.loop import run

from .wire import Reply, Wire

GET = b"GET /x?y=1 HTTP/1.1\r\nHost: h\r\n\r\n"


@asynccontextmanager
async def serving(app: Callable[[Exchange], None]) -> AsyncIterator[tuple[Server, Wire]]:
    """A server and one connection to it."""
    server = Server(app, date=lambda: "today", loop=asyncio.get_running_loop())
    wire = await Wire.connect(server.listen("127.0.0.1", 0))
    yield server, wire
    wire.close()
    await asyncio.sleep(0.01)
    server.close()


def answered(app: Callable[[Exchange], None], *requests: bytes) -> list[Reply]:
    """The replies to requests sent in as many writes with a pause between them."""

    async def scenario() -> list[Reply]:
        async with serving(app) as (_, wire):
            for part in requests:
                wire.writer.write(part)
                await asyncio.sleep(0.1)
            wire.writer.write_eof()
            replies = []
            while (reply := await wire.reply()).ended != "no response":
                replies.append(reply)
                if reply.ended == "closed":
                    break
            return replies

    return run(scenario())


def echo(exchange: Exchange) -> None:
    """Answers with the body."""
    exchange.reply(200, [("A", "1")], exchange.request.body)


@pytest.mark.parametrize("body", [b"x" * BUFFERED_BYTES, b"x" * (BUFFERED_BYTES + 1)])
def test_size_decides_the_framing(body: bytes) -> None:
    """Up to 2 KB with a length, above as one chunk; Date and length come last."""
    (reply,) = answered(lambda exchange: exchange.reply(200, [("A", "1")], body), GET)
    if len(body) <= BUFFERED_BYTES:
        assert [name for name, _ in reply.headers] == ["A", "Date", "Content-Length"]
    else:
        assert [name for name, _ in reply.headers] == ["A", "Date", "Transfer-Encoding"]
    assert reply.segments == [body]


def test_bodies_come_by_length_or_in_chunks_in_any_pieces() -> None:
    """Chunked wins over a length; extensions and trailers are skipped."""
    head = b"POST / HTTP/1.1\r\nHost: h\r\n"
    chunked = (
        head + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n"
        b"3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nT: v\r\n\r\n"
    )
    plain = head + b"Content-Length: 5\r\n\r\nabcde"
    pieces = [(chunked + plain)[at : at + 7] for at in range(0, len(chunked + plain), 7)]
    assert [reply.body for reply in answered(echo, *pieces)] == [b"abcde", b"abcde"]


@pytest.mark.parametrize(
    ("request_bytes", "status", "text"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400, b"400 Bad Request: missing required Host header"),
        (b"nonsense\r\n\r\n", 400, b"400 Bad Request"),
        (b"GET / HTTP/2.0\r\nHost: h\r\n\r\n", 505, b"unsupported protocol version"),
        (b"GET / HTTP/1.1\r\nHost: h\r\nBad Name: x\r\n\r\n", 400, b"400 Bad Request"),
        (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n", 400, b"400 Bad Request"),
        (
            b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            400,
            b"400 Bad Request",
        ),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * (1 << 20), 431, b"431 Request Header"),
    ],
)
def test_what_is_no_request_is_refused_and_closed(
    request_bytes: bytes, status: int, text: bytes
) -> None:
    """As Go's server does it, without a length."""
    (reply,) = answered(echo, request_bytes)
    assert (reply.status, reply.framing) == (status, "close")
    assert text in reply.body


def test_connection_close_is_kept_to() -> None:
    """The reply says so and the connection ends; HTTP/1.0 ends without saying so."""
    one = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    old = b"GET / HTTP/1.0\r\n\r\n"
    (closing,) = answered(echo, one + one)
    assert [name for name, _ in closing.headers][-1] == "Connection"
    (reply,) = answered(lambda exchange: exchange.reply(200, [], b"x" * 5000), old)
    assert (reply.version, reply.framing, len(reply.body)) == ("HTTP/1.0", "close", 5000)


def test_head_has_no_body() -> None:
    """The length of what GET would have had, and nothing after it."""
    head = b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n"

    async def scenario() -> tuple[Reply, Reply]:
        async with serving(lambda exchange: exchange.reply(200, [], b"abc")) as (_, wire):
            wire.writer.write(head + GET)
            return await wire.reply("HEAD"), await wire.reply()

    first, second = run(scenario())
    assert (first.get("content-length"), first.body) == ("3", b"")
    assert second.body == b"abc"


def test_continue_is_said_when_the_body_is_held_back() -> None:
    """Once the head is there and not a byte of the body."""

    async def scenario() -> Reply:
        async with serving(echo) as (_, wire):
            wire.writer.write(
                b"POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
            )
            interim = await wire.reader.readuntil(b"\r\n\r\n")
            assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
            wire.writer.write(b"ab")
            return await wire.reply()

    assert run(scenario()).body == b"ab"


def test_the_end_of_the_client_is_told_once() -> None:
    """Also when it resets the connection in mid-answer."""
    gone: list[str] = []

    def app(exchange: Exchange) -> None:
        exchange.on_gone = lambda: gone.append("gone")
        exchange.start(200, [], "chunked")
        exchange.write(b"x")

    async def scenario() -> None:
        async with serving(app) as (server, wire):
            wire.writer.write(GET)
            await wire.reader.readuntil(b"x\r\n")
            wire.writer.transport.abort()
            await asyncio.sleep(0.01)
            assert not server.connections

    run(scenario())
    assert gone == ["gone"]


def test_frozen_it_buffers_what_it_should_send() -> None:
    """Nothing goes out or comes in until it thaws, then all of it."""
    pending: list[Exchange] = []

    async def scenario() -> None:
        async with serving(pending.append) as (server, wire):
            wire.writer.write(GET)
            await asyncio.sleep(0.1)
            server.freeze()
            pending[0].reply(200, [], b"late")
            wire.writer.write(GET)
            await asyncio.sleep(10.0)
            assert len(pending) == 1
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.0):
                    await wire.reader.read(1)
            server.thaw()
            assert (await wire.reply()).body == b"late"
            assert len(pending) == 2
            pending[1].reply(200, [])

    run(scenario())
