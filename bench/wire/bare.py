"""
The bare relay: our listener, outlet and connections to backends, with nothing between them.

    python bench/wire/bare.py PORT ORIGIN_PORT

What the balancer costs beyond this is the price of deciding, guarding, telling and failing over.
"""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Sequence

import uvloop
from aiohttp import web

from balancer.core import routes
from balancer.core.domain import Call, PlacementKey, Principal, Purpose, Role
from balancer.core.events import Event
from balancer.core.verdicts import Failure
from balancer.net.connecting import Resolver, Target
from balancer.net.connection import Handle
from balancer.net.connections import Connections, Ground
from balancer.net.listener import Request, listen, make_server
from balancer.net.outlet import Outlet
from balancer.net.tasks import Tasks
from balancer.net.wheel import Wheel

NOBODY = Principal("anonymous", Role.USER)
KEY = PlacementKey("bench:latest")


class Passing:
    """One call, passed on as it comes."""

    def __init__(self, request: Request) -> None:
        self._outlet = Outlet(request, lambda: "Sat, 21 Nov 2026 00:00:00 GMT")
        self._connection = request.connection
        self.handle: Handle | None = None

    def head(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        """The backend's head."""
        told = {k: v for k, v in headers if k.lower() in ("content-type", "content-length")}
        length = next((v for k, v in told.items() if k.lower() == "content-length"), None)
        kind = {k: v for k, v in told.items() if k.lower() == "content-type"}
        self._outlet.begin(status, kind, None if length is None else int(length))
        self._outlet.read_by(self)
        if self.handle is not None:
            self.handle.pass_chunks(self)

    def data(self, data: bytes) -> None:
        """A read's worth of the body."""
        self._outlet.write(data)

    def chunk(self, data: bytes, lines: list[bytes]) -> None:
        """A chunk as we would make it."""
        outlet = self._outlet
        if outlet.chunks is None:
            self.data(data[len(lines[0]) + 1 : -2])
        elif not outlet.chunks.is_closing():
            outlet.chunks.write(data)

    def end(self) -> None:
        """The end."""
        self._outlet.end()
        self._connection.answered(keep_alive=self._outlet.keep_alive)

    def fail(self, failure: Failure) -> None:
        """Break it off, too."""
        print(failure, file=sys.stderr)
        self._outlet.abort()

    def held_up(self) -> None:
        """The client is behind."""
        if self.handle is not None:
            self.handle.pause()

    def caught_up(self) -> None:
        """It is not any more."""
        if self.handle is not None:
            self.handle.resume()

    def lost(self) -> None:
        """It has left."""

    def gone(self) -> None:
        """The same, as the connection tells it."""
        if self.handle is not None:
            self.handle.abort()


class Bare:
    """Sends everything to one backend."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """What does not come in one piece is not for this bench."""
        raise web.HTTPNotImplemented(text=request.path)

    def at_once(self, request: Request) -> bool:
        """Pass it on."""
        route = routes.find(request.method, request.path)
        call = Call(
            id="",
            route=route,
            model="bench:latest",
            key=KEY,
            streaming=True,
            purpose=Purpose.RUN,
            replayable=True,
            principal=NOBODY,
            arrived_at=0.0,
            deadline=None,
            body=request.content.read_nowait(),
            headers=(("Content-Type", "application/json"),),
        )
        passing = Passing(request)
        request.connection.live = passing
        passing.handle = self._connections.send(call, passing, patient=True)
        return True

    def malformed(self, client: str, status: int) -> None:
        """Tell."""
        print(client, status, file=sys.stderr)

    def dropped(self, request: Request) -> None:
        """Nobody counts."""


def _tell(event: Event) -> None:
    print(event, file=sys.stderr)


async def serve(port: int, url: str) -> None:
    """Until a signal comes."""
    loop = asyncio.get_running_loop()
    tasks = Tasks(_tell, loop.time)
    ground = Ground(loop, tasks, Wheel(loop), Resolver(loop))
    bare = Bare(Connections("origin", Target(url), ground))
    server = make_server(bare, keepalive_s=75.0, head_timeout_s=10.0, max_header=64 * 1024)
    sock = socket.create_server(("127.0.0.1", port), backlog=4096)
    await listen(server, sock)
    print(f"ready {port}", flush=True)
    over = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, over.set)
    await over.wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(int(sys.argv[1]), f"http://127.0.0.1:{sys.argv[2]}"))
