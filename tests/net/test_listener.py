"""
The listener by itself, before a desk that answers on the spot, later, or in a task.

What a path begins with says how it is answered: `/now` on the spot; `/live` too, but only when the
test (or a timer) says so; `/hand` is begun on the spot and handed over; `/task` is left to a task;
`/wait` too, and its task waits for the test.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import MAX_MSG_QUEUE_SIZE, RequestHandler

from balancer.net import listener as subject
from balancer.net.listener import (
    HIGH_WATER,
    SMALL,
    SMALL_BODY_S,
    WRITE_STALL_S,
    ClientConnection,
    Request,
    check_parser,
    listen,
    make_server,
)
from balancer.net.outlet import Outlet, Written
from tests.e2e.stage import now, virtual
from tests.net.peer import both, until
from tests.sim.wire import Wire

pytestmark = pytest.mark.usefixtures("quiet")
HOST = b"Host: localhost\r\n"
LARGE = bytes(range(256)) * 4 * 40_000  # more than all buffers on the way hold


def get(path: str, headers: bytes = b"", version: bytes = b"1.1") -> bytes:
    """A request without a body."""
    return b"GET %s HTTP/%s\r\n" % (path.encode(), version) + HOST + headers + b"\r\n"


def post(path: str, body: bytes = b"body", headers: bytes = b"") -> bytes:
    """A request with one."""
    length = b"Content-Length: %d\r\n" % len(body)
    return b"POST %s HTTP/1.1\r\n" % path.encode() + HOST + length + headers + b"\r\n" + body


class Call:
    """A request that is answered later, without a task."""

    def __init__(self, desk: Desk, request: Request, body: bytes) -> None:
        self._desk = desk
        self.request = request
        self.body = body
        self.outlet = Outlet(request, str)
        self.told: list[str] = []
        request.connection.live = self

    def gone(self) -> None:
        """Its client has left."""
        self._desk.log.append(f"gone {self.request.path}")

    def held_up(self) -> None:
        """The client is behind."""
        self.told.append("held up")

    def caught_up(self) -> None:
        """It has taken nearly all."""
        self.told.append("caught up")

    def lost(self) -> None:
        """It has left."""
        self.told.append("lost")

    def answer(self, body: bytes | None = None) -> None:
        """Answer it."""
        said = b"%s live %d" % (self.request.path.encode(), len(self.body))
        body = said if body is None else body
        self.outlet.begin(200, {}, len(body))
        self.outlet.end(body)
        self._desk.done(self.request, self.outlet)


class Desk:
    """
    Answers requests.

    Attributes:
        log: What happened, in order: how a request was begun, and how it ended.
        calls: Those that are answered later.
        depths: How deep in the stack each was asked for.
        large: The body of an answer to a path that says so.
        leaves: The client leaves in the turn in which its request comes.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.calls: list[Call] = []
        self.depths: list[int] = []
        self.go = asyncio.Event()
        self.after_s: float | None = None  # in which `/live` is answered by itself
        self.large = LARGE
        self.leaves = False
        self.port = 0
        self.server: web.Server = None  # type: ignore[assignment]

    def at_once(self, request: Request) -> bool:
        """On the spot, or begun there."""
        assert request.content.is_eof(), "asked for before the body was there"
        how = request.path[1:5]
        if self.leaves:  # before any task gets its turn
            loop = asyncio.get_running_loop()
            loop.call_soon(request.connection.connection_lost, ConnectionResetError())
        if how in ("task", "wait"):
            return False
        depth, frame = 0, sys._getframe()
        while frame.f_back is not None:
            depth, frame = depth + 1, frame.f_back
        self.depths.append(depth)
        self.log.append(f"spot {request.path}")
        body = request.content.read_nowait()
        if how == "live":
            self.calls.append(Call(self, request, body))
            if self.after_s is not None:
                asyncio.get_running_loop().call_later(self.after_s, self.calls[-1].answer)
            return True
        if how == "hand":
            request.handed = body
            request.connection.hand_over(request)
            return True
        outlet = Outlet(request, str)
        answer = self.large if "large" in request.path else b"%s now" % request.path.encode()
        outlet.begin(200, {}, len(answer))
        outlet.end(answer)
        self.done(request, outlet)
        return True

    def done(self, request: Request, outlet: Outlet) -> None:
        """It is answered."""
        self.log.append(f"done {request.path}")
        request.connection.answered(keep_alive=outlet.keep_alive)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """In a task."""
        assert isinstance(request, Request)
        request.connection.picked_up()
        self.log.append(f"task {request.path}")
        try:
            if request.path.startswith("/wait"):
                await self.go.wait()
            if "large" in request.path:
                outlet = Outlet(request, str)
                outlet.begin(200, {}, len(self.large))
                outlet.end(self.large)
                await outlet.taken()
                return Written(200, outlet)
            handed = request.handed
            body = await request.read() if handed is None else handed
        except asyncio.CancelledError:
            self.log.append(f"cancelled {request.path}")
            raise
        self.log.append(f"done {request.path}")
        return web.Response(body=b"%s task %d" % (request.path.encode(), len(body)))

    def malformed(self, client: str, status: int) -> None:
        """It could not be parsed."""
        self.log.append(f"malformed {client} {status}")

    def dropped(self, request: Request) -> None:
        """Its client has left before a task had it."""
        handed = "" if request.handed is None else f" with {request.handed!r}"
        self.log.append(f"dropped {request.path}{handed}")

    @property
    def open(self) -> int:
        """Connections."""
        return len(self.server.connections)

    async def connect(self, *, warm: bool = True) -> Wire:
        """A connection, of which aiohttp's loop has heard unless it is not *warm*."""
        wire = await Wire.connect(self.port)
        if warm:
            wire.writer.write(get("/now/warm"))
            assert (await wire.reply()).status == 200
            self.log.clear()
            self.depths.clear()
        return wire


@asynccontextmanager
async def serving(
    *, keepalive_s: float = 75.0, head_timeout_s: float = 10.0, max_header: int = 8190
) -> AsyncIterator[Desk]:
    """A desk behind a listener."""
    desk = Desk()
    desk.server = make_server(
        desk, keepalive_s=keepalive_s, head_timeout_s=head_timeout_s, max_header=max_header
    )
    sock = socket.create_server(("127.0.0.1", 0))
    desk.port = sock.getsockname()[1]
    listening = await listen(desk.server, sock)
    try:
        yield desk
    finally:
        listening.close()
        await desk.server.shutdown(0.1)
        await until(lambda: not desk.open)


async def replies(wire: Wire, count: int) -> list[bytes]:
    """So many bodies, in the order in which they come."""
    async with asyncio.timeout(20):
        got = [await wire.reply() for _ in range(count)]
    assert {reply.status for reply in got} == {200}, got
    return [reply.body for reply in got]


async def ended(wire: Wire) -> float:
    """When the connection is closed by the server; by then nothing more may come."""
    with suppress(ConnectionResetError):  # as it is if something comes that nobody reads
        assert await wire.reader.read() == b""
    return now()


# -- many at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("count", [2, 31, 32, 33, 40, 200])
@both
async def test_any_number_in_one_read_is_answered_in_order(count: int, *, warm: bool) -> None:
    """Also beyond what aiohttp lets wait; and one is not answered inside another."""
    async with serving() as desk:
        wire = await desk.connect(warm=warm)
        wire.writer.write(b"".join(get(f"/now/{n}") for n in range(count)))
        told = await replies(wire, count)
        assert [body.split()[0] for body in told] == [b"/now/%d" % n for n in range(count)]
        assert len({*desk.depths}) <= 2, "one depth on the spot, one out of aiohttp's loop"
        assert [line for line in desk.log if line.startswith("done")] == [
            f"done /now/{n}" for n in range(count)
        ]
        if count < MAX_MSG_QUEUE_SIZE:
            assert not [line for line in desk.log if line.startswith("task")]
        wire.close()


@pytest.mark.parametrize("kind", ["now", "task", "hand", "live"])
@pytest.mark.parametrize("count", [5, 31, 32, 40, 100])
@both
async def test_what_comes_behind_a_live_request_waits_for_it(kind: str, count: int) -> None:
    """However much that is, and nothing of it is forgotten: the client need not send more."""
    async with serving() as desk:
        wire = await desk.connect()
        wire.writer.write(post("/live/first"))
        await until(lambda: len(desk.calls) == 1)
        wire.writer.write(b"".join(get(f"/{kind}/{n}") for n in range(count)))
        await asyncio.sleep(0.01)
        assert desk.log == ["spot /live/first"]
        desk.after_s = 0.0
        desk.calls[0].answer()
        told = await replies(wire, count + 1)
        paths = [f"/{kind}/{n}".encode() for n in range(count)]
        assert [body.split()[0] for body in told] == [b"/live/first", *paths]
        wire.close()


KINDS = ("now", "live", "task", "hand")


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("cut", [None, "between", "in the last head", "in the last body"])
@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, repeat=2)))
@both
async def test_two_requests_of_all_kinds_are_answered_in_order(
    kinds: Sequence[str], cut: str | None, *, warm: bool
) -> None:
    """In one read or in two, on a connection that is new or not; the connection stays in use."""
    async with serving() as desk:
        wire = await desk.connect(warm=warm)
        desk.after_s = 0.002
        first, last = (post(f"/{kind}/{n}") for n, kind in enumerate(kinds))
        match cut:
            case None:
                pieces = [first + last]
            case "between":
                pieces = [first, last]
            case "in the last head":
                pieces = [first + last[:9], last[9:]]
            case _:
                pieces = [first + last[:-2], last[-2:]]
        for piece in pieces:
            wire.writer.write(piece)
            await asyncio.sleep(0.001)
        told = await replies(wire, 2)
        assert [body.split()[0].decode() for body in told] == [
            f"/{kind}/{n}" for n, kind in enumerate(kinds)
        ]
        bodies = [body.split()[2] for body in told if not body.endswith(b" now")]
        assert bodies == [b"4"] * len(bodies)
        wire.writer.write(get("/now/again"))
        assert await replies(wire, 1) == [b"/now/again now"]
        wire.close()


@both
async def test_three_live_requests_in_one_read_are_begun_one_after_the_other() -> None:
    """Each when the one before it was answered, also if that is in the turn in which it began."""
    async with serving() as desk:
        wire = await desk.connect()
        wire.writer.write(post("/live/0") + post("/live/1") + post("/live/2"))
        for n in range(3):
            await until(lambda n=n: len(desk.calls) == n + 1)  # type: ignore[misc]
            desk.calls[n].answer()
        assert len(await replies(wire, 3)) == 3
        assert desk.log == [f"{what} /live/{n}" for n in range(3) for what in ("spot", "done")]
        wire.close()


# -- bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sized", [4, 1000, SMALL])
@virtual
async def test_a_small_body_that_comes_late_is_waited_for_without_a_task(sized: int) -> None:
    """Most clients send it right behind its head, in a write of its own."""
    async with serving() as desk:
        wire = await desk.connect()
        for _ in range(2):
            whole = post("/live", b"x" * sized)
            desk.after_s = 0.0
            wire.writer.write(whole[:-sized])
            await asyncio.sleep(SMALL_BODY_S / 2)
            assert desk.log == []
            wire.writer.write(whole[-sized:])
            assert await replies(wire, 1) == [b"/live live %d" % sized]
            assert desk.log == ["spot /live", "done /live"]
            desk.log.clear()
        await asyncio.sleep(60.0)
        assert desk.open == 1, "the timer of the body is no timer of the connection"
        wire.close()


@virtual
async def test_a_request_may_come_byte_by_byte() -> None:
    """Its head in its own time, its body in a short one; nothing is lost between the two."""
    async with serving() as desk:
        wire = await desk.connect()
        desk.after_s = 0.0
        for byte in post("/live", b"abcd"):
            wire.writer.write(bytes([byte]))
            await asyncio.sleep(0.01)
        assert await replies(wire, 1) == [b"/live live 4"]
        assert desk.log == ["spot /live", "done /live"]
        wire.close()


@pytest.mark.parametrize("piece_s", [0.02, 60.0])
@virtual
async def test_a_small_body_that_stops_is_for_a_task(piece_s: float) -> None:
    """After 50 ms in all, however much came of it meanwhile; there it has its own limits."""
    async with serving() as desk:
        wire = await desk.connect()
        began = now()
        wire.writer.write(post("/live", b"x" * 100)[:-100])
        while not desk.log:
            await asyncio.sleep(min(piece_s, 0.001) if piece_s > 1 else piece_s)
            if piece_s < 1 and not desk.log:
                wire.writer.write(b"x")
        assert now() - began == pytest.approx(SMALL_BODY_S, abs=0.03)
        assert desk.log == ["task /live"]
        wire.writer.write(b"x" * 100)
        assert await replies(wire, 1) == [b"/live task 100"]
        wire.close()


@pytest.mark.parametrize("stops", [True, False])
@virtual
async def test_a_body_may_begin_while_another_request_is_live(*, stops: bool) -> None:
    """When that is answered, it is waited for as any other is: not for ever."""
    async with serving() as desk:
        wire = await desk.connect()
        wire.writer.write(post("/live/1") + post("/live/2", b"abcd")[:-2])
        await asyncio.sleep(100.0)
        assert desk.log == ["spot /live/1"]
        desk.calls[0].answer()
        assert len(await replies(wire, 1)) == 1
        desk.log.clear()
        desk.after_s = 0.0
        if stops:
            await asyncio.sleep(SMALL_BODY_S + 0.001)
            assert desk.log == ["task /live/2"]
        wire.writer.write(b"cd")
        assert await replies(wire, 1) == [b"/live/2 task 4" if stops else b"/live/2 live 4"]
        wire.close()


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"x" * (SMALL + 1), b"Content-Length: %d\r\n" % (SMALL + 1)),
        (b"4\r\nabcd\r\n0\r\n\r\n", b"Transfer-Encoding: chunked\r\n"),
        (b"abcd", b"Content-Length: 4\r\nExpect: 100-continue\r\n"),
    ],
)
@virtual
async def test_any_other_body_is_for_a_task_at_once(body: bytes, headers: bytes) -> None:
    """One that is large, of unknown length, or that its client holds back until it is wanted."""
    async with serving() as desk:
        wire = await desk.connect()
        wire.writer.write(b"POST /now HTTP/1.1\r\n" + HOST + headers + b"\r\n")
        await asyncio.sleep(0.001)
        assert desk.log == ["task /now"]
        wire.writer.write(body)
        (told,) = await replies(wire, 1)
        assert told in (b"/now task 4", b"/now task %d" % len(body))
        wire.close()


# -- leaving --------------------------------------------------------------------------------------


STAGES = {
    "a head on its way": (get("/now")[:-2], []),
    "a small body on its way": (post("/live")[:-2], ["dropped /live"]),
    "live": (post("/live"), ["spot /live", "gone /live"]),
    "live, more behind it": (post("/live") * 3, ["spot /live", "gone /live"]),
    "in a task": (post("/wait"), ["task /wait", "cancelled /wait"]),
    "answered": (get("/now"), ["spot /now", "done /now"]),
}


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("stage", STAGES)
@both
async def test_whoever_answers_hears_once_that_the_client_left(stage: str, how: str) -> None:
    """Whatever it was doing; and no connection is left over."""
    sent, told = STAGES[stage]
    async with serving() as desk:
        wire = await desk.connect()
        wire.writer.write(sent)
        if told and not told[0].startswith("dropped"):
            await until(lambda: len(desk.log) > len(told) - 2 and bool(desk.log))
        else:
            connection: Any = desk.server.connections[0]
            await until(lambda: bool(connection._messages or connection._head_bytes))
        match how:
            case "close":
                wire.close()
            case "reset":
                wire.writer.transport.abort()
            case _:
                wire.writer.write_eof()
        await until(lambda: not desk.open)
        assert desk.log == told
        wire.close()


@pytest.mark.parametrize("path", ["/hand", "/task"])
@both
async def test_a_client_may_leave_between_two_hands(path: str) -> None:
    """Handed over, or left to a task, and not picked up: what it holds has to go back."""
    async with serving() as desk:
        wire = await desk.connect()
        (connection,) = desk.server.connections
        transport, desk.leaves = connection.transport, True
        wire.writer.write(post(path))
        await until(lambda: not desk.open)
        assert transport is not None
        transport.abort()
        await asyncio.sleep(0.01)
        handed = ["spot /hand", "dropped /hand with b'body'"]
        assert desk.log == (handed if path == "/hand" else ["dropped /task"])
        wire.close()


@both
async def test_the_reader_of_a_client_hears_of_its_end_first() -> None:
    """It knows better than anybody how far the answer has got."""
    async with serving() as desk:
        wire = await desk.connect()
        wire.writer.write(post("/live"))
        await until(lambda: bool(desk.calls))
        (call,) = desk.calls
        call.outlet.read_by(call)
        call.outlet.begin(200, {}, None)
        call.outlet.write(b"x")
        await until(lambda: bool(call.outlet.bytes_out))
        wire.writer.transport.abort()
        await until(lambda: bool(desk.log[1:]))
        assert (call.told, desk.log) == (["lost"], ["spot /live", "gone /live"])


# -- connections ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@both
async def test_a_connection_is_closed_where_the_client_says_so(kind: str) -> None:
    """Behind its answer; what it sends behind that is not looked at."""
    async with serving() as desk:
        desk.after_s = 0.0
        wire = await desk.connect()
        wire.writer.write(post(f"/{kind}", headers=b"Connection: close\r\n"))
        await until(lambda: bool(desk.log))
        wire.writer.write(get("/now/more"))
        reply = await wire.reply()
        assert (reply.status, reply.get("connection")) == (200, "close")
        await ended(wire)
        assert not [line for line in desk.log if "more" in line]
        wire.close()


@pytest.mark.parametrize(("headers", "kept"), [(b"", False), (b"Connection: keep-alive\r\n", True)])
@both
async def test_http_1_0_is_answered_in_a_task(headers: bytes, *, kept: bool) -> None:
    """And the connection kept if that was asked for; a method of HTTP/1.1 may follow."""
    async with serving() as desk:
        wire = await desk.connect(warm=False)
        wire.writer.write(get("/now", headers, b"1.0"))
        assert (await wire.reply()).body == b"/now task 0"
        if kept:
            wire.writer.write(get("/now"))
            assert await replies(wire, 1) == [b"/now now"]
        else:
            await ended(wire)
        assert desk.log[0] == "task /now"
        wire.close()


@virtual
async def test_an_idle_connection_is_closed_after_its_time() -> None:
    """Counted from the last answer, on the spot or not; a live request is not idle."""
    async with serving(keepalive_s=30.0) as desk:
        wire = await desk.connect()
        await asyncio.sleep(20.0)
        wire.writer.write(get("/now"))
        await replies(wire, 1)
        await asyncio.sleep(20.0)
        wire.writer.write(post("/live"))
        await asyncio.sleep(100.0)
        desk.calls[0].answer()
        await replies(wire, 1)
        began = now()
        await asyncio.sleep(29.0)
        assert desk.open == 1
        assert await ended(wire) - began == pytest.approx(30.0, abs=1.0)
        wire.close()


@pytest.mark.parametrize("offset_s", [-0.02, -0.001, 0.0])
@virtual
async def test_a_request_on_its_way_is_not_cut_by_the_time_of_an_idle_connection(
    offset_s: float,
) -> None:
    """Its body may come just when the connection would have been closed."""
    async with serving(keepalive_s=30.0) as desk:
        desk.after_s = 0.0
        wire = await desk.connect()
        (connection,) = desk.server.connections
        await asyncio.sleep(connection._next_keepalive_close_time - now() + offset_s - 0.001)
        wire.writer.write(post("/live")[:-4])
        await asyncio.sleep(0.03)
        wire.writer.write(b"body")
        assert await replies(wire, 1) == [b"/live live 4"]
        began = now()
        assert await ended(wire) - began == pytest.approx(30.0, abs=2.0)
        wire.close()


@pytest.mark.parametrize("before", ["nothing", "now", "live", "task", "body"])
@virtual
async def test_a_head_must_come_in_its_time(before: str) -> None:
    """The first, and each behind an answer; a connection that is silent may be so for longer."""
    async with serving(head_timeout_s=5.0) as desk:
        desk.after_s = 0.5
        wire = await desk.connect(warm=False)
        if before != "nothing":
            wire.writer.write(post(f"/{'live' if before == 'body' else before}"))
            await replies(wire, 1)
            await asyncio.sleep(60.0)
            assert desk.open == 1
        began = now()
        if before == "body":
            wire.writer.write(post("/now/")[:-1])
            await asyncio.sleep(30.0)
            assert (desk.open, desk.log[-1]) == (1, "task /now/"), "a body has limits of its own"
            wire.writer.write(b"y")
            await replies(wire, 1)
        else:
            wire.writer.write(b"POST /now HT")
            await asyncio.sleep(4.0)
            wire.writer.write(b"T")
            assert await ended(wire) - began == pytest.approx(5.0, abs=0.1)
        wire.close()


CHUNKED = b"POST /%s HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n"


@pytest.mark.parametrize("framing", ["none", "length", "chunked"])
@pytest.mark.parametrize("cut", ["before", "in the head", "in the end"])
@pytest.mark.parametrize("first", KINDS)
@virtual
async def test_a_head_that_begins_behind_a_request_has_its_time_too(
    first: str, framing: str, cut: str
) -> None:
    """In the same read, however that request is framed and answered, and wherever reads end."""
    request = {
        "none": get(f"/{first}"),
        "length": post(f"/{first}"),
        "chunked": CHUNKED % first.encode() + b"0\r\n\r\n",
    }[framing]
    at = {"before": 0, "in the head": 9, "in the end": len(request) - 1}[cut]
    async with serving(head_timeout_s=5.0) as desk:
        desk.after_s = 0.5
        wire = await desk.connect()
        for rest in (b"", b"POST /now HT"):  # with none of it the connection may stay
            wire.writer.write(request[:at])
            await asyncio.sleep(0.01)
            began = now()
            wire.writer.write(request[at:] + rest)
            await replies(wire, 1)
            if not rest:
                await asyncio.sleep(30.0)
                assert desk.open == 1
        assert await ended(wire) - began == pytest.approx(5.0, abs=0.1)
        wire.close()


@virtual
async def test_a_head_may_wait_for_the_answers_before_it() -> None:
    """Begun behind one that takes long it ends nothing; completed, it is answered and forgotten."""
    async with serving(head_timeout_s=5.0) as desk:
        wire = await desk.connect()
        wire.writer.write(get("/wait/0"))
        await asyncio.sleep(1.0)
        wire.writer.write(get("/task/1") + get("/now/2")[:9])
        await asyncio.sleep(28.0)
        assert desk.open == 1
        desk.go.set()
        await replies(wire, 2)
        wire.writer.write(get("/now/2")[9:])
        await replies(wire, 1)
        await asyncio.sleep(30.0)
        wire.writer.write(get("/wait/3") + b"GET")
        await replies(wire, 1)
        began = now()
        assert await ended(wire) - began == pytest.approx(5.0, abs=0.1)
        wire.close()


@pytest.mark.parametrize("behind", ["nothing", "now", "live"])
@virtual
async def test_a_head_is_bounded_in_all(behind: str) -> None:
    """Not only each of its lines; the answer to it is the last."""
    async with serving(max_header=1000) as desk:
        desk.after_s = 0.0
        wire = await desk.connect(warm=False)
        if behind != "nothing":
            wire.writer.write(post(f"/{behind}"))
            await replies(wire, 1)
        wire.writer.write(b"GET /now HTTP/1.1\r\n" + HOST)
        for n in range(6):
            wire.writer.write(b"X-%d: " % n + b"x" * 900 + b"\r\n")
            await asyncio.sleep(0.1)
        reply = await wire.reply()
        assert (reply.status, reply.get("connection")) == (431, "close")
        assert desk.log[-1] == "malformed 127.0.0.1 431"
        await until(lambda: not desk.open)
        wire.close()


@pytest.mark.parametrize("first", KINDS)
@both
async def test_what_cannot_be_parsed_is_answered_behind_what_could(first: str) -> None:
    """In its turn, told once, and nothing that was sent is in it."""
    async with serving() as desk:
        desk.after_s = 0.001
        wire = await desk.connect()
        wire.writer.write(post(f"/{first}"))
        await until(lambda: bool(desk.log))
        wire.writer.write(b"GET /se\x00cret HTTP/1.1\r\n\r\n")
        await replies(wire, 1)
        reply = await wire.reply()
        assert (reply.status, reply.body) == (400, b"400 Bad Request")
        await ended(wire)
        assert [line for line in desk.log if "malformed" in line] == ["malformed 127.0.0.1 400"]
        wire.close()


# -- the end --------------------------------------------------------------------------------------


@virtual
async def test_a_shutdown_waits_for_what_is_live() -> None:
    """Its answer goes out whole; then the connection is closed, and nothing more is begun."""
    async with serving() as desk:
        wire = await desk.connect()
        wire.writer.write(post("/live") + get("/now/behind"))
        await asyncio.sleep(0.1)
        stopping = asyncio.get_running_loop().create_task(desk.server.shutdown(5.0))
        await asyncio.sleep(3.0)
        assert not stopping.done()
        wire.writer.write(get("/now/late"))
        desk.calls[0].answer()
        began = now()
        assert await replies(wire, 1) == [b"/live live 4"]
        await ended(wire)
        await stopping
        assert now() - began < 1.0
        assert desk.log == ["spot /live", "done /live"]
        wire.close()


@pytest.mark.parametrize("reads", [True, False])
@virtual
async def test_a_shutdown_ends_what_is_live_after_its_time(*, reads: bool) -> None:
    """Whoever answers is told, also for a client that reads nothing."""
    async with serving() as desk:
        sock = await call(desk.port, post("/live"))
        await asyncio.sleep(0.1)
        (live,) = desk.calls
        live.outlet.begin(200, {}, None)
        live.outlet.write(b"x" if reads else LARGE)
        assert live.outlet.is_held_up is not reads
        began = now()
        await desk.server.shutdown(5.0)
        assert 5.0 <= now() - began < 11.0
        await asyncio.sleep(0.1)
        assert desk.log == ["spot /live", "gone /live"]
        assert desk.open == 0
        sock.close()


@virtual
async def test_a_shutdown_waits_for_what_was_handed_over_meanwhile() -> None:
    """A live request that cannot be answered on the spot after all is one that runs."""
    async with serving() as desk:
        wire = await desk.connect()
        wire.writer.write(post("/live"))
        await asyncio.sleep(0.1)
        stopping = asyncio.get_running_loop().create_task(desk.server.shutdown(5.0))
        await asyncio.sleep(1.0)
        (call,) = desk.calls
        call.request.handed = b"handed"
        call.request.connection.hand_over(call.request)
        assert await replies(wire, 1) == [b"/live task 6"]
        await stopping
        wire.close()


# -- how a client reads ---------------------------------------------------------------------------


async def call(port: int, request: bytes, *, buffer: int = 4096) -> socket.socket:
    """A request on a bare socket, of which nothing is read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", port))
    await loop.sock_sendall(sock, request)
    return sock


@pytest.mark.parametrize("size", [0, 1, HIGH_WATER, HIGH_WATER + 1, 5 * HIGH_WATER + 7])
@pytest.mark.parametrize("kind", ["now", "task"])
@both
async def test_an_answer_of_any_size_comes_whole(kind: str, size: int) -> None:
    """The connection is good for the next one."""
    async with serving() as desk:
        desk.large = LARGE[:size]
        wire = await desk.connect()
        for _ in range(2):
            wire.writer.write(get(f"/{kind}/large"))
            assert await replies(wire, 1) == [LARGE[:size]]
        wire.close()


@pytest.mark.parametrize("headers", [b"", b"Connection: close\r\n"])
@pytest.mark.parametrize("kind", ["now", "task", "wait"])
@virtual
async def test_a_client_that_does_not_read_is_given_up(kind: str, headers: bytes) -> None:
    """After a minute; the connection is cut at once, with what we still held for it."""
    async with serving() as desk:
        desk.go.set()
        sock, began = await call(desk.port, get(f"/{kind}/large", headers)), now()
        await until(lambda: bool(desk.log))
        while desk.open and now() - began < 200.0:
            await asyncio.sleep(0.5)
        assert now() - began == pytest.approx(WRITE_STALL_S, abs=1.5)
        got = 0
        while piece := await asyncio.get_running_loop().sock_recv(sock, 1 << 20):
            got += len(piece)
        assert 0 < got < len(LARGE)
        assert desk.log[-1] == (
            f"done /{kind}/large" if kind == "now" else f"cancelled /{kind}/large"
        )
        sock.close()


@virtual
async def test_a_closed_connection_whose_client_does_not_read_is_given_up() -> None:
    """Also where so little is held for it that nobody was told that it is behind."""
    async with serving() as desk:
        sock = await call(desk.port, post("/live", headers=b"Connection: close\r\n"))
        await until(lambda: bool(desk.calls))
        (live,) = desk.calls
        transport = live.request.transport
        assert transport is not None
        live.outlet.begin(200, {}, None)
        while not transport.get_write_buffer_size():
            live.outlet.write(b"x" * 4096)
        assert not live.outlet.is_held_up
        live.outlet.end()
        desk.done(live.request, live.outlet)
        began = now()
        while desk.open and now() - began < 200.0:
            await asyncio.sleep(0.5)
        assert now() - began == pytest.approx(WRITE_STALL_S, abs=1.5)
        sock.close()


@pytest.mark.parametrize("headers", [b"", b"Connection: close\r\n"])
@pytest.mark.parametrize("kind", ["now", "task"])
@virtual
async def test_a_client_that_reads_slowly_is_not(kind: str, headers: bytes) -> None:
    """However long it takes in all, as long as something moves within each minute."""
    async with serving() as desk:
        sock, began = await call(desk.port, get(f"/{kind}/large", headers), buffer=65536), now()
        loop, got = asyncio.get_running_loop(), b""
        while len(got) < len(LARGE):
            if now() - began < 200.0:
                await asyncio.sleep(30.0)
            for _ in range(20):
                got += await loop.sock_recv(sock, 1 << 17)
        assert now() - began > 120.0
        assert got.endswith(LARGE[-1000:])
        sock.close()


@both
async def test_who_writes_is_told_how_its_client_reads() -> None:
    """Once when it falls behind, once when it has caught up; what is written meanwhile is held."""
    async with serving() as desk:
        wire = await desk.connect()
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        wire.writer.write(post("/live"))
        await until(lambda: bool(desk.calls))
        (call,) = desk.calls
        call.outlet.read_by(call)
        call.outlet.begin(200, {}, None)
        call.outlet.write(LARGE)
        await until(lambda: bool(call.told))
        call.outlet.write(b"more")
        assert call.told == ["held up"]
        assert call.outlet.is_held_up
        wire.writer.transport.resume_reading()  # type: ignore[attr-defined]
        reading = asyncio.get_running_loop().create_task(wire.reply())
        await until(lambda: call.told == ["held up", "caught up"])
        call.outlet.end()
        desk.done(call.request, call.outlet)
        assert (await reading).body == LARGE + b"more"
        wire.close()


# -- what we rely on ------------------------------------------------------------------------------


def test_the_parser_in_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts what a proxy must not pass on; with the one in C nothing is said."""
    check_parser()
    monkeypatch.setattr(subject, "HttpRequestParser", HttpRequestParserPy)
    with pytest.raises(RuntimeError, match="binary wheel"):
        check_parser()
    assert HttpRequestParser is not HttpRequestParserPy


PRIVATE = (
    "_buffer_paused",
    "_close",
    "_current_request",
    "_force_close",
    "_handler_waiter",
    "_keepalive_handle",
    "_keepalive_timeout",
    "_lingering_time",
    "_loop",
    "_messages",
    "_next_keepalive_close_time",
    "_parser",
    "_reading_paused",
    "_request_in_progress",
    "_upgraded",
    "_waiter",
)


@pytest.mark.parametrize("name", PRIVATE)
def test_private_names_of_a_connection_are_still_there(name: str) -> None:
    """What is read here must be what aiohttp writes, and the other way round."""
    slots = [n for cls in RequestHandler.__mro__ for n in getattr(cls, "__slots__", ())]
    assert slots.count(name) == 1
    assert name not in ClientConnection.__slots__


def test_all_private_names_are_in_that_list() -> None:
    """Read off the source: those of ours are slots, the rest is aiohttp's."""
    source = inspect.getsource(ClientConnection)
    used = {word.split("(")[0] for word in _attributes(source) if word.startswith("_")}
    ours = {*ClientConnection.__slots__, *vars(ClientConnection)}
    assert used - ours - {"_message", "_payload"} == {*PRIVATE}


def _attributes(source: str) -> list[str]:
    marks = "".join(char if char.isalnum() or char in "_." else " " for char in source)
    return [part for word in marks.split() for part in word.split(".")[1:] if part]


def test_hooks_are_still_called_as_we_override_them() -> None:
    """A method that aiohttp no longer calls, or calls with other arguments, would do nothing."""
    assert list(inspect.signature(web.BaseRequest._prepare_hook).parameters) == ["self", "response"]
    for name in ("handle_error", "resume_reading", "force_close", "start", "_process_keepalive"):
        wanted = list(inspect.signature(getattr(RequestHandler, name)).parameters)
        assert list(inspect.signature(getattr(ClientConnection, name)).parameters) == wanted, name
    for name in (
        "connection_made",
        "data_received",
        "connection_lost",
        "pause_writing",
        "resume_writing",
    ):
        assert callable(getattr(BaseProtocol, name, getattr(RequestHandler, name)))


def test_requests_are_made_as_aiohttp_makes_them() -> None:
    """What a request is made of, and where it keeps what we put there ourselves."""
    made = list(inspect.signature(web.BaseRequest.__init__).parameters)
    assert made[:7] == ["self", "message", "payload", "protocol", "payload_writer", "task", "loop"]
    source = inspect.getsource(web.BaseRequest)
    for name in ("_message", "_payload", "_payload_writer", "_protocol", "_task"):
        assert f"self.{name} = " in source, name


def test_the_parser_counts_what_was_taken_off() -> None:
    """Else it would stop for good at as many requests as may wait."""
    assert callable(HttpRequestParser.message_consumed)
    assert "self._parser.message_consumed()" in inspect.getsource(RequestHandler.start)
    assert isinstance(StreamReader.is_eof, Callable)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["now", "live", "task", "hand"])
@both
async def test_each_request_is_taken_off_once(kind: str) -> None:
    """Told twice the parser would let more wait than it should."""
    async with serving() as desk:
        desk.after_s = 0.001
        wire = await desk.connect()
        (connection,) = desk.server.connections
        parser: Any = connection._parser
        told = list[str]()

        def consumed() -> None:
            told.append(kind)
            parser.message_consumed()

        watched: Any = SimpleNamespace(feed_data=parser.feed_data, message_consumed=consumed)
        connection._parser = watched
        wire.writer.write(get(f"/{kind}/0") + post(f"/{kind}/1") + get("/now"))
        await replies(wire, 3)
        assert len(told) == 3
        wire.close()


async def test_the_server_hands_its_settings_to_each_connection() -> None:
    """`_kwargs` of aiohttp's server hold them."""
    front: Any = SimpleNamespace(handle=None, malformed=None)
    server = make_server(front, keepalive_s=75.0, head_timeout_s=3.0, max_header=1000)
    connection = server()
    assert isinstance(connection, ClientConnection)
    assert (connection.keepalive_timeout, connection.head_timeout_s) == (75.0, 3.0)
    assert (connection.max_field_size, connection.max_headers) == (1000, 128)
    assert connection._max_head == 4000
    assert server.handler_cancellation
