"""How long a client may go without reading."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from balancer.net import writing
from tests.e2e.stage import now, virtual
from tests.sim.wire import Wire

LARGE = bytes(range(256)) * 4 * 40_000  # more than all buffers on the way hold


class Server:
    """Answers every request with one body, and remembers how that went."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.failures: list[Exception] = []
        self.over = asyncio.Event()
        self.returned: web.StreamResponse | None = None
        self.port = 0
        self.server = web.Server(self.handle)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer as the front does."""
        response = web.Response(status=201, body=self.body, headers={"X-Kept": "1"})
        try:
            self.returned = await writing.whole(request, response)
        except ConnectionError as error:
            self.failures.append(error)
            raise asyncio.CancelledError from None
        finally:
            self.over.set()
        assert (self.returned is response) == (len(self.body) <= writing.PIECE)
        return self.returned


@asynccontextmanager
async def serving(body: bytes) -> AsyncIterator[Server]:
    """A server on loopback."""
    it = Server(body)
    sock = socket.create_server(("127.0.0.1", 0))
    listener = await asyncio.get_running_loop().create_server(it.server, sock=sock)
    it.port = sock.getsockname()[1]
    yield it
    listener.close()
    await it.server.shutdown(0.1)


async def call(port: int, *, buffer: int | None = None) -> socket.socket:
    """A request on a bare socket, of which nothing is read."""
    sock = socket.socket()
    if buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", port))
    await loop.sock_sendall(sock, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return sock


@pytest.mark.parametrize("size", [0, 1, writing.PIECE, writing.PIECE + 1, 5 * writing.PIECE + 7])
@virtual
async def test_an_answer_is_the_same_in_pieces(size: int) -> None:
    """Status, headers, length and bytes; the connection is good for the next one."""
    async with serving(LARGE[:size]) as server:
        wire = await Wire.connect(server.port)
        for _ in range(2):
            wire.writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            reply = await wire.reply()
            assert (reply.status, reply.get("x-kept"), reply.body) == (201, "1", LARGE[:size])
            assert (reply.framing, reply.get("content-length")) == ("length", str(size))
        wire.close()


@virtual
async def test_a_client_that_does_not_read_is_given_up() -> None:
    """After a minute; the connection is cut at once, with what we still held for it."""
    async with serving(LARGE) as server:
        sock, began = await call(server.port, buffer=4096), now()
        await server.over.wait()
        assert now() - began == pytest.approx(60.0, abs=1.0)
        assert [str(error) for error in server.failures] == ["the client stopped reading"]
        await asyncio.sleep(0.1)
        assert server.server.connections == []
        got = 0
        while piece := await asyncio.get_running_loop().sock_recv(sock, 1 << 20):
            got += len(piece)
        assert 0 < got < len(LARGE)
        sock.close()


@virtual
async def test_a_client_that_reads_slowly_is_not() -> None:
    """However long it takes in all, as long as something moves within each minute."""
    async with serving(LARGE) as server:
        sock, began, got = await call(server.port, buffer=65536), now(), 0
        loop = asyncio.get_running_loop()
        while not server.over.is_set():
            await asyncio.sleep(30.0)
            for _ in range(50):
                got += len(await loop.sock_recv(sock, 1 << 17))
        assert now() - began > 120.0
        assert server.failures == []
        while got < len(LARGE):
            got += len(await loop.sock_recv(sock, 1 << 20))
        sock.close()
