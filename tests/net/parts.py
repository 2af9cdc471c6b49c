"""Small stand-ins for what surrounds a module of `net`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from balancer.core import routes
from balancer.core.domain import Backend, Call, PlacementKey, Principal, Purpose, Role
from balancer.core.pool import Lease
from balancer.core.verdicts import Failure, Judgement
from tests.sim.wire import Reply, Wire

_CALL = Call(
    id="r1",
    route=routes.find("POST", "/api/chat"),
    model="m",
    key=PlacementKey("registry.ollama.ai/library/m:latest"),
    streaming=True,
    purpose=Purpose.RUN,
    replayable=True,
    principal=Principal("anonymous", Role.USER),
    arrived_at=0.0,
    deadline=None,
    body=b"{}",
)


def a_call(path: str = "/api/chat", **more: Any) -> Call:
    """A call on a route."""
    return replace(_CALL, route=routes.find("POST", path), **more)


class FakeLease:
    """A lease that only remembers what was done with it."""

    def __init__(self, url: str = "http://127.0.0.1:9", name: str = "a") -> None:
        self.backend = Backend(name, url)
        self.on_revoke: Callable[[Judgement], None] | None = None
        self.moves = 0
        self.remote = False

    def moved(self) -> None:
        """One more move."""
        self.moves += 1

    @property
    def as_lease(self) -> Lease:
        """Itself, for whoever wants a real one."""
        return cast("Lease", self)


class Tape:
    """A sink that writes everything down."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Sequence[tuple[str, str]] = ()
        self.pieces: list[bytes] = []
        self.ends: list[Failure | None] = []
        self._over = asyncio.Event()
        self._begun = asyncio.Event()

    @property
    def body(self) -> bytes:
        """All that came."""
        return b"".join(self.pieces)

    @property
    def failure(self) -> Failure:
        """How it failed; fails itself if it did not."""
        (end,) = self.ends
        assert end is not None
        return end

    def head(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        """The answer's head, once."""
        assert not self.status
        assert not self.ends
        self.status, self.headers = status, headers

    def data(self, data: bytes) -> None:
        """Bytes, after the head and before the end."""
        assert self.status
        assert not self.ends
        assert data
        self.pieces.append(data)
        self._begun.set()

    def end(self) -> None:
        """The end."""
        self._end(None)

    def fail(self, failure: Failure) -> None:
        """The other end."""
        self._end(failure)

    def _end(self, how: Failure | None) -> None:
        self.ends.append(how)
        self._over.set()
        self._begun.set()

    async def over(self) -> None:
        """Wait for the end."""
        await self._over.wait()

    async def begun(self) -> None:
        """Wait for the first bytes of the body, or the end."""
        await self._begun.wait()


class FakeTransport:
    """A client's socket: what was written, and how it was closed. Its client reads when told to."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.done: list[str] = []

    @property
    def sent(self) -> bytes:
        """All that was written."""
        return b"".join(self.writes)

    def is_closing(self) -> bool:
        """Whether it is of no more use."""
        return bool(self.done)

    def write(self, data: bytes) -> None:
        """One write."""
        assert not self.done
        self.writes.append(data)

    def abort(self) -> None:
        """Close at once."""
        self.done.append("abort")


class FakeConnection:
    """A client's connection as an outlet sees it."""

    def __init__(self) -> None:
        self.transport: FakeTransport | None = FakeTransport()
        self.writing_paused = False
        self.reader: Any = None


class FakeRequest:
    """A request as far as its answer depends on it."""

    def __init__(
        self, version: tuple[int, int] = (1, 1), *, keep_alive: bool = True, method: str = "POST"
    ) -> None:
        self.version = version
        self.keep_alive = keep_alive
        self.method = method
        self.hidden: tuple[str, ...] = ()
        self.begun = False
        self.connection = FakeConnection()


async def read_off(sent: bytes) -> Reply:
    """An answer as a client reads it whose connection ends behind it."""
    reader = asyncio.StreamReader()
    reader.feed_data(sent)
    reader.feed_eof()
    return await Wire(reader, cast("asyncio.StreamWriter", None)).reply()
