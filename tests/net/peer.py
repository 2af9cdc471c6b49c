"""A backend played by hand, byte by byte, the door to it, and both kinds of loops to meet in."""

from __future__ import annotations

import asyncio
import inspect
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import wraps
from types import TracebackType
from typing import Any, Self

import pytest

from balancer.core.events import Event
from balancer.net.tasks import Tasks
from balancer.net.upstream import ClientUpstream, Handle, Target
from tests.loops import LOOPS
from tests.net.parts import FakeLease, Tape, a_call

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def both(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in a loop of asyncio's, then in one of uvloop's."""

    @wraps(test)
    def wrapped(*args: Any, loop: str, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(test(*args, **kwargs))

    told = inspect.signature(test)
    added = inspect.Parameter("loop", inspect.Parameter.KEYWORD_ONLY)
    del wrapped.__wrapped__
    wrapped.__signature__ = told.replace(  # type: ignore[attr-defined]
        parameters=[*told.parameters.values(), added], return_annotation=None
    )
    made: Callable[..., None] = pytest.mark.parametrize("loop", list(LOOPS))(wrapped)
    return made


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what no event tells."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


class Line:
    """One connection, as the backend sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> bytes:
        """The head and body of the next request; raises IncompleteReadError if there is none."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return head + await self.reader.readexactly(length)

    def send(self, data: bytes) -> None:
        """Bytes, at once."""
        self.writer.write(data)

    async def closed(self) -> bytes:
        """What comes until the other side is gone."""
        try:
            return await self.reader.read(-1)
        except ConnectionError:
            return b""

    def reset(self) -> None:
        """Send RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER: none
        self.writer.transport.abort()


class Peer:
    """
    A backend whose every connection is served by a function.

    Attributes:
        accepted: Connections so far.
        requests: What `Line.request` cannot know: kept by whoever serves.
        open: Connections that are served now.
    """

    def __init__(
        self, serve: Callable[[Line], Awaitable[None]], tls: ssl.SSLContext | None = None
    ) -> None:
        self._serve = serve
        self._tls = tls
        self._tasks: set[asyncio.Task[Any]] = set()
        self.accepted = 0
        self.requests: list[bytes] = []

    @property
    def open(self) -> int:
        """Connections that are served now."""
        return len(self._tasks)

    @property
    def url(self) -> str:
        """Where it is reached."""
        scheme = "https" if self._tls else "http"
        return f"{scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(Line(reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()
            await asyncio.sleep(0)  # the socket closes in the next turn


class Door:
    """The way to a peer."""

    def __init__(self, upstream: ClientUpstream, target: Target) -> None:
        self.upstream = upstream
        self.target = target
        upstream.targets["a"] = target

    def open(self, tape: Tape, **call: Any) -> Handle:
        """Send a call, pushed onto *tape*."""
        lease = FakeLease(self.target.url)
        return self.upstream.open(lease.as_lease, a_call(**call), tape)

    async def told(self, **call: Any) -> Tape:
        """Send a call and wait for its end."""
        tape = Tape()
        self.open(tape, **call)
        async with asyncio.timeout(10):
            await tape.over()
        return tape

    @property
    def idle(self) -> int:
        """Connections at rest."""
        return self.upstream.idle().get("a", 0)


@asynccontextmanager
async def door(peer: Peer, **target: Any) -> AsyncIterator[Door]:
    """A door to *peer*, behind which nothing is left over."""
    events: list[Event] = []
    tasks = Tasks(events.append, asyncio.get_running_loop().time)
    upstream = ClientUpstream({}, tasks)
    try:
        yield Door(upstream, replace(Target(peer.url), **target))
        assert len(upstream._ground.wheel) == 0
        await until(lambda: len(tasks) == 0)
    finally:
        await upstream.close()
        await tasks.close()
    await until(lambda: peer.open == 0)
    assert events == []


def answering(*answers: bytes) -> Callable[[Line], Awaitable[None]]:
    """Serve each request on a connection with the next of these answers, then wait for its end."""

    async def serve(line: Line) -> None:
        for answer in answers:
            await line.request()
            line.send(answer)
        await line.closed()

    return serve
