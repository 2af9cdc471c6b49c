"""The front by itself: one way in, one event per request, and what we rely on in aiohttp."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import pytest
from aiohttp import web

from balancer.core.domain import Admitted, Dialect, Kind, Principal, Role
from balancer.core.errors import BadRequest, Forbidden, NoBackend, OptionError
from balancer.core.events import CallEnded, Event, Mishap
from balancer.net.bodies import read_body
from balancer.net.listener import listen, make_server
from balancer.net.server import TICKED, Exchange, Front
from tests.e2e.stage import virtual
from tests.net.peer import both
from tests.sim.wire import Reply, Wire

pytestmark = pytest.mark.usefixtures("quiet")
Answer = Callable[[Exchange], Awaitable[web.StreamResponse]]
HOST = b"Host: localhost\r\n"


class FakeDoor:
    """Lets everybody in, as a user, but for those who ask to be refused."""

    guarded = 0

    takes_path = False
    discreet = False
    key = ""
    asked = 0

    @property
    def rules(self) -> tuple[object, ...]:
        """What decides."""
        return (self.discreet, self.takes_path)

    def preflight(self, request: web.BaseRequest, allow: str) -> tuple[tuple[str, str], ...] | None:
        """There is none."""
        return None

    def cors(self, request: web.BaseRequest) -> tuple[tuple[str, str], ...]:
        """As for a page that is welcome."""
        return (("Vary", "Origin"),)

    def admit(self, request: web.BaseRequest, now: float, path: str, key: str) -> Admitted:
        """Welcome, unless told otherwise."""
        self.key = key
        self.asked += 1
        if "X-Refuse" in request.headers:
            raise Forbidden(request.headers["X-Refuse"])
        return Admitted(Principal("somebody", Role.USER), "192.0.2.1", self.discreet)

    def require(self, principal: Principal, role: Role) -> None:
        """An admin's right must be one's own."""
        if role is Role.ADMIN and principal.role is not Role.ADMIN:
            raise Forbidden("not an admin")

    def guard(self, request: web.BaseRequest, principal: Principal, *, metrics: bool) -> None:
        """Count."""
        self.guarded += 1


async def hello(_: Exchange) -> web.StreamResponse:
    """A short answer."""
    return web.Response(body=b"hello", content_type="text/plain")


@dataclass
class Stage:
    """A listening front with handlers of the test's own."""

    port: int
    front: Front
    door: FakeDoor
    events: list[Event]

    @property
    def ended(self) -> list[CallEnded]:
        """What was told of requests."""
        return [event for event in self.events if isinstance(event, CallEnded)]

    async def begin(self, path: str, method: str = "GET", headers: bytes = b"") -> Wire:
        """Send one request without a body."""
        wire = await Wire.connect(self.port)
        line = f"{method} {path} HTTP/1.1\r\n".encode()
        wire.writer.write(line + HOST + headers + b"\r\n")
        return wire

    async def ask(self, path: str, method: str = "GET", headers: bytes = b"") -> Reply:
        """The same, and read the answer."""
        wire = await self.begin(path, method, headers)
        try:
            return await wire.reply(method)
        finally:
            wire.close()


@asynccontextmanager
async def staged(
    handler: Answer = hello,
    *,
    pages: Mapping[tuple[str, str], Answer] = MappingProxyType({}),
    is_draining: Callable[[], bool] = lambda: False,
    **more: Any,
) -> AsyncIterator[Stage]:
    """A front on a free port; *handler* answers every route."""
    door, events = FakeDoor(), list[Event]()
    front = Front(
        dict.fromkeys(Kind, handler),
        pages,
        frozenset({"/_balancer/live"}),
        door,
        events.append,
        asyncio.get_running_loop().time,
        is_draining,
        "token-1",
        lambda: "Sat, 21 Nov 2026 00:00:00 GMT",
        **more,
    )
    server = make_server(front, keepalive_s=75.0, head_timeout_s=10.0, max_header=64 * 1024)
    sock = socket.create_server(("127.0.0.1", 0))
    listening = await listen(server, sock)
    try:
        yield Stage(sock.getsockname()[1], front, door, events)
    finally:
        listening.close()
        await server.shutdown(0.1)
        assert not front.running


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what no event tells."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


# -- one event per request ------------------------------------------------------------------------


async def test_a_request_is_told_once_with_who_what_and_how_much() -> None:
    """Whoever asked, by what name, which route, and the bytes of the answer."""
    async with staged() as stage:
        await stage.ask("/api/tags?secret=1", headers=b"User-Agent: test/1\r\n")
        (told,) = stage.ended
        assert (told.method, told.path, told.endpoint) == ("GET", "/api/tags", "tags")
        assert (told.client, told.key, told.user_agent) == ("192.0.2.1", "somebody", "test/1")
        assert (told.status, told.outcome, told.bytes_out) == (200, "ok", 5)
        assert not told.inference


@pytest.mark.parametrize(
    ("path", "headers", "status", "outcome", "endpoint"),
    [
        ("/nope", b"", 404, "rejected", "other"),
        ("/api/chat", b"", 405, "rejected", "other"),
        ("/api/tags", b"X-Refuse: no\r\n", 403, "rejected", "other"),
        ("/api/a//b", b"", 400, "rejected", "other"),
        ("/api/status", b"", 403, "rejected", "cloud_status"),
    ],
)
async def test_a_refusal_is_told_too(
    path: str, headers: bytes, status: int, outcome: str, endpoint: str
) -> None:
    """With its reason, as one event."""
    async with staged() as stage:
        assert (await stage.ask(path, headers=headers)).status == status
        (told,) = stage.ended
        assert (told.status, told.outcome, told.endpoint) == (status, outcome, endpoint)


async def test_a_refusal_without_a_text_has_no_body() -> None:
    """As Ollama's 403."""
    async with staged() as stage:
        reply = await stage.ask("/", headers=b"X-Refuse:\r\n")
        assert (reply.status, reply.body, reply.get("content-type")) == (403, b"", None)
        assert reply.get("content-length") == "0"


async def test_a_bug_is_a_mishap_and_a_legible_500() -> None:
    """The text of the error stays with us; the request id tells where to look."""

    async def buggy(_: Exchange) -> web.StreamResponse:
        raise LookupError("inside knowledge")

    async with staged(buggy) as stage:
        reply = await stage.ask("/v1/models", headers=b"X-Request-Id: r-7\r\n")
        assert reply.status == 500
        assert json.loads(reply.body)["error"]["message"] == (
            "internal error of the balancer [req r-7]"
        )
        (mishap,) = [event for event in stage.events if isinstance(event, Mishap)]
        assert (mishap.where, mishap.error) == ("request", "LookupError: inside knowledge")
        assert [told.outcome for told in stage.ended] == ["upstream_error"]


async def test_a_bug_inside_an_answer_cuts_it() -> None:
    """A second head would pass for a part of the first answer, so nothing more is written."""

    async def buggy(exchange: Exchange) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(exchange.request)
        await response.write(b"half")
        raise LookupError("oops")

    async with staged(buggy) as stage:
        reply = await stage.ask("/")
        assert reply.status == 200
        assert reply.ended in ("cut", "reset")
        assert b"internal error" not in reply.body
        assert len([event for event in stage.events if isinstance(event, Mishap)]) == 1
        assert [told.outcome for told in stage.ended] == ["upstream_error"]


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
async def test_a_client_that_leaves_ends_its_handler(how: str) -> None:
    """At once, and it is told as a client that left; a half-close counts as leaving."""
    log: list[str] = []

    async def patient(_: Exchange) -> web.StreamResponse:
        log.append("began")
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            log.append("ended")
        return web.Response()

    async with staged(patient) as stage:
        wire = await stage.begin("/")
        await until(lambda: log == ["began"])
        match how:
            case "close":
                wire.close()
            case "reset":
                wire.writer.transport.abort()
            case _:
                wire.writer.write_eof()
        await until(lambda: log == ["began", "ended"])
        await until(lambda: bool(stage.ended))
        (told,) = stage.ended
        assert (told.status, told.outcome) == (499, "client_abort")
        wire.close()


# -- who gets in, and where -----------------------------------------------------------------------


async def routed(exchange: Exchange) -> web.StreamResponse:
    """What the call was routed by."""
    told = f"{exchange.path} {exchange.argument} {exchange.dialect.value}"
    return web.Response(text=told)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/k/s3cret/api/tags", "/api/tags  ollama"),
        ("/k/s3cret/", "/  ollama"),
        ("/k/s3cret", "/  ollama"),
        ("/k/s3cret/v1/models", "/v1/models  openai"),
        ("/%6b/s3cret/v1/models", "/v1/models  openai"),
        ("/k/s3cret/v1/models/a%2Fb", "/v1/models/a/b a/b openai"),
        ("/k/s%33cret/v1/models", "/v1/models  openai"),
        ("http://localhost/k/s3cret/v1/models", "/v1/models  openai"),
    ],
)
async def test_a_key_in_front_of_the_path_is_for_the_door(path: str, told: str) -> None:
    """The call is routed by the rest, and nobody is told the key."""
    async with staged(routed) as stage:
        stage.door.takes_path = True
        reply = await stage.ask(path)
        assert (reply.status, reply.body) == (200, told.encode())
        assert stage.door.key == "s3cret"
        (ended,) = stage.ended
        assert "s3cret" not in repr(ended)
        assert "/k/***" in ended.path


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/k/s3cret/api/tags", 404),
        ("/k/s3cret%2Fapi/tags", 400),
        ("/k/s3cret/api%2Ftags", 400),
        ("/k/s3cret/../api/tags", 400),
        ("/k/s3cret//api/tags", 400),
        ("/k/s3cret/api/tags#", 400),
        ("/K/s3cret/api/tags", 404),
        ("/v1/k/s3cret/models", 404),
    ],
)
@pytest.mark.parametrize("takes_path", [True, False])
async def test_a_key_where_none_belongs_is_not_told_either(
    path: str, status: int, *, takes_path: bool
) -> None:
    """A path that is refused, or is none, may hold one all the same."""
    if takes_path and path == "/k/s3cret/api/tags":
        return
    async with staged(routed) as stage:
        stage.door.takes_path = takes_path
        reply = await stage.ask(path)
        assert reply.status == status
        assert stage.door.key == ""
        assert "s3cret" not in repr(stage.ended) + reply.body.decode()


async def test_backends_are_not_told_to_whom_they_do_not_concern() -> None:
    """Neither in headers nor in errors of ours; in the log they are."""

    async def answer(exchange: Exchange) -> web.StreamResponse:
        if exchange.path == "/api/ps":
            raise NoBackend("gpu1: connection refused", retry_after_s=7.0)
        if exchange.path == "/api/version":
            raise OptionError("option num_ctx must be of type integer")
        headers = exchange.headers() | {"X-Balancer-Backend": "gpu1", "X-Balancer-Queue-Ms": "3"}
        return web.Response(text="ok", headers=headers)

    async with staged(answer) as stage:
        for discreet in (False, True):
            stage.door.discreet = discreet
            told = await stage.ask("/")
            assert (told.get("x-balancer-backend") is None) is discreet
            assert (told.get("x-balancer-queue-ms") is None) is discreet
            assert told.get("x-request-id")
            failed = await stage.ask("/api/ps")
            assert (failed.status, b"gpu1" in failed.body) == (503, not discreet)
            assert failed.get("retry-after") == "7"
            assert stage.ended[-1].error == "gpu1: connection refused"
            option = await stage.ask("/api/version")
            assert b"num_ctx" in option.body


async def test_the_open_pages_ask_nobody() -> None:
    """A probe is answered before the door; the other pages are guarded."""
    pages = {("GET", path): hello for path in ("/_balancer/live", "/_balancer/status", "/metrics")}
    async with staged(pages=pages) as stage:
        refused = b"X-Refuse: no\r\n"
        assert (await stage.ask("/_balancer/live", headers=refused)).status == 200
        assert (await stage.ask("/_balancer/status", headers=refused)).status == 403
        assert (await stage.ask("/metrics", headers=refused)).status == 403
        assert stage.door.guarded == 0
        for path in ("/_balancer/status", "/metrics", "/_balancer/nope"):
            await stage.ask(path)
        assert stage.door.guarded == 3
        endpoints = [told.endpoint for told in stage.ended]
        assert endpoints[-3:] == ["balancer", "metrics", "balancer"]


async def test_a_draining_balancer_refuses_and_closes() -> None:
    """503 with a time to come back; what is no route is told as ever."""
    async with staged(is_draining=lambda: True) as stage:
        reply = await stage.ask("/api/tags")
        assert (reply.status, reply.get("connection")) == (503, "close")
        assert reply.get("retry-after") == "5"
        assert (await stage.ask("/nope")).status == 404


async def test_a_handler_is_found_by_operation_then_by_kind() -> None:
    """And hears which route it is, and what stood in its path."""
    heard: list[tuple[str, str, Dialect]] = []

    async def note(exchange: Exchange) -> web.StreamResponse:
        assert exchange.route is not None
        heard.append((exchange.route.operation, exchange.argument, exchange.dialect))
        return web.Response()

    async with staged(note) as stage:
        for path in (
            "/v1/models/hf.co%2Fa%2Fb:Q4",
            "/v1/models/a/b",
            "/v1/models/x/",
            "/v1/models/",
        ):
            assert (await stage.ask(path)).status == 200
    assert heard == [
        ("model", "hf.co/a/b:Q4", Dialect.OPENAI),
        ("model", "a/b", Dialect.OPENAI),
        ("model", "x", Dialect.OPENAI),
        ("models", "", Dialect.OPENAI),
    ]


# -- headers --------------------------------------------------------------------------------------


async def test_every_answer_carries_the_request_id_and_no_server() -> None:
    """Refusals too; CORS headers and those of the operator come with it."""
    async with staged(extra_headers={"X-Extra": "1"}) as stage:
        for path, status in (("/api/nope", 404), ("/api/a//b", 400), ("/api/status", 403)):
            reply = await stage.ask(path, headers=b"X-Request-Id: abc\r\n")
            assert (reply.status, reply.get("x-request-id")) == (status, "abc")
            assert reply.get("server") is None
            assert reply.get("x-extra") == "1"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (b"abc-DEF_0.9:x", True),
        (b"x" * 128, True),
        (b"x" * 129, False),
        (b"a b", False),
        (b'a"b', False),
        (b"a\tb", False),
        (b"\xc3\xa9", False),
        (b"", False),
    ],
)
async def test_a_request_id_is_taken_over_if_it_is_harmless(given: bytes, kept: bool) -> None:
    """It ends up in logs and headers; anything else gets one of ours."""
    async with staged(new_id=lambda: "ours") as stage:
        reply = await stage.ask("/nope", headers=b"X-Request-Id: " + given + b"\r\n")
        assert reply.get("x-request-id") == (given.decode() if kept else "ours")
        assert stage.ended[0].request_id == reply.get("x-request-id")


async def test_two_requests_on_one_connection_are_two_exchanges() -> None:
    """Also when they come at once; each is told, in order."""
    async with staged() as stage:
        wire = await Wire.connect(stage.port)
        get = b"GET %s HTTP/1.1\r\n" + HOST + b"\r\n"
        wire.writer.write(get % b"/nope" + get % b"/api/tags")
        assert [(await wire.reply()).status for _ in range(2)] == [404, 200]
        wire.close()
        assert [told.path for told in stage.ended] == ["/nope", "/api/tags"]


async def test_an_offer_of_http_2_is_passed_over() -> None:
    """Java's client makes one with its first request; body and connection stay in use."""
    async with staged(echo) as stage:
        headers = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
        wire = await stage.begin("/api/chat", "POST", headers + b"Content-Length: 5\r\n")
        wire.writer.write(b"hello")
        first = await wire.reply()
        wire.writer.write(b"GET /api/tags HTTP/1.1\r\n" + HOST + b"\r\n")
        second = await wire.reply()
        wire.close()
        assert (first.status, first.body, second.status) == (200, b"hello", 200)


async def test_nothing_behind_an_unclear_request_is_read() -> None:
    """A second request in the same bytes may be what somebody smuggled."""
    async with staged() as stage:
        wire = await Wire.connect(stage.port)
        wire.writer.write(
            b"POST /api/chat HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n"
            b"0\r\n\r\nGET /api/tags HTTP/1.1\r\n" + HOST + b"\r\n"
        )
        assert (await wire.reply()).status == 400
        assert await wire.reader.read() == b""
        wire.close()
        assert len(stage.ended) == 1


# -- bodies ---------------------------------------------------------------------------------------


async def echo(exchange: Exchange) -> web.StreamResponse:
    """What came."""
    clock = asyncio.get_running_loop().time
    return web.Response(body=await read_body(exchange, 100, clock), content_type="text/plain")


async def test_a_client_that_waits_is_told_to_go_on() -> None:
    """`100 Continue` is sent when the body is wanted, not before: see also the 413."""
    async with staged(echo) as stage:
        headers = b"Content-Length: 5\r\nExpect: 100-Continue\r\n"
        wire = await stage.begin("/api/chat", "POST", headers)
        assert await wire.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        wire.writer.write(b"hello")
        reply = await wire.reply()
        wire.close()
        assert (reply.status, reply.body) == (200, b"hello")


async def test_a_refusal_reaches_a_client_that_is_still_sending() -> None:
    """The rest is read away for a moment: a reset would destroy the answer on its way."""
    async with staged(echo) as stage:
        headers = b"Content-Length: 4000000\r\n"
        wire = await stage.begin("/api/chat", "POST", headers)
        for _ in range(40):
            wire.writer.write(b"x" * 100_000)
        reply = await wire.reply()
        wire.close()
        assert (reply.status, reply.ended) == (413, "clean")


@virtual
async def test_a_body_that_becomes_nonsense_is_no_bug_of_ours() -> None:
    """Chunks that stop making sense are a body that does not go on."""
    async with staged(echo) as stage:
        wire = await stage.begin("/api/chat", "POST", b"Transfer-Encoding: chunked\r\n")
        await asyncio.sleep(1)
        wire.writer.write(b"5\r\nhello\r\nzz\r\n")
        reply = await wire.reply()
        wire.close()
        assert 400 <= reply.status < 500
        assert not [event for event in stage.events if isinstance(event, Mishap)]


# -- on the spot ----------------------------------------------------------------------------------


class Catalogue:
    """What is known without asking anybody, and whether it was told on the spot."""

    def __init__(self, size: int = 5) -> None:
        self.body = b"x" * size
        self.tasks = 0
        self.error: Exception | None = None
        self.kind = "text/plain; charset=utf-8"

    def known(self, exchange: Exchange) -> tuple[bytes, str]:
        """The document."""
        if self.error is not None:
            raise self.error
        exchange.model = "m"
        return self.body, self.kind

    async def handle(self, exchange: Exchange) -> web.StreamResponse:
        """The same, in a task."""
        self.tasks += 1
        body, kind = self.known(exchange)
        return web.Response(body=body, headers={**exchange.headers(), "Content-Type": kind})

    def staged(self, **more: Any) -> AbstractAsyncContextManager[Stage]:
        """A front that knows it."""
        known = dict.fromkeys(("tags", "version", "root"), self.known)
        return staged(self.handle, known=known, **more)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/api/tags", "/api/version", "/", "/api/tags?x=1"])
@pytest.mark.parametrize("discreet", [False, True])
@both
async def test_what_is_known_is_told_the_same_on_the_spot(
    method: str, path: str, *, discreet: bool
) -> None:
    """Head, body, and what is told of it; to HEAD without the body, with its length."""
    catalogue = Catalogue()
    extra = {"X-Extra": "1", "X-Balancer-Version": "9"}
    async with catalogue.staged(extra_headers=extra) as stage:
        stage.door.discreet = discreet
        line = f"{method} {path} HTTP/1.1\r\n".encode() + HOST
        got = []
        for more in (b"", b"Connection: close\r\n", b"Expect: 100-continue\r\n"):
            wire = await Wire.connect(stage.port)
            wire.writer.write(line + b"X-Request-Id: r1\r\n" + more + b"\r\n")
            got.append(await wire.reply(method))
            if b"close" in more:
                assert await wire.reader.read() == b""
            else:
                wire.writer.write(line + b"\r\n")
                assert (await wire.reply(method)).status == 200
            wire.close()
        await until(lambda: len(stage.ended) == 5)
        assert catalogue.tasks == 1, "the one with Expect"
        direct, closing, slow = got
        heads = [{n.lower(): v for n, v in reply.headers if n != "Date"} for reply in got]
        assert heads[0] == heads[2]
        assert heads[1] == {**heads[0], "connection": "close"}
        assert heads[0]["content-length"] == "5"
        assert direct.body == closing.body == slow.body == (b"" if method == "HEAD" else b"xxxxx")
        assert (direct.get("x-extra"), direct.get("x-balancer-version") is None) == ("1", discreet)
        told = [replace(each, at=0.0, duration_s=0.0, bytes_out=0) for each in stage.ended]
        first, second = (each for n, each in enumerate(told) if n in (0, 3))
        assert first == second


async def test_what_is_expected_in_vain_is_refused_on_any_path() -> None:
    """417, also for what would be told on the spot."""
    catalogue = Catalogue()
    async with catalogue.staged() as stage:
        assert (await stage.ask("/api/tags", headers=b"Expect: the-unexpected\r\n")).status == 417


@pytest.mark.parametrize(
    ("error", "status", "outcome"),
    [
        (BadRequest("no way"), 400, "rejected"),
        (NoBackend("nobody", retry_after_s=3.0), 503, "shed"),
        (LookupError("inside knowledge"), 500, "upstream_error"),
    ],
)
async def test_what_fails_on_the_spot_is_told_where_all_errors_are(
    error: Exception, status: int, outcome: str
) -> None:
    """In the dialect of the path, once; a bug is a mishap, and its text stays here."""
    catalogue = Catalogue()
    catalogue.error = error
    async with catalogue.staged() as stage:
        wire = await Wire.connect(stage.port)
        wire.writer.write(b"GET /api/tags HTTP/1.1\r\n" + HOST + b"\r\n")
        reply = await wire.reply()
        assert reply.status == status
        assert b"inside knowledge" not in reply.body
        catalogue.error = None
        wire.writer.write(b"GET /api/tags HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await wire.reply()).status == 200
        wire.close()
        assert [told.outcome for told in stage.ended] == [outcome, "ok"]
        mishaps = [event.error for event in stage.events if isinstance(event, Mishap)]
        assert mishaps == (["LookupError: inside knowledge"] if status == 500 else [])


async def test_a_line_end_in_a_header_is_a_bug_that_stays_here() -> None:
    """The client gets a legible refusal without it."""
    catalogue = Catalogue()
    catalogue.kind = "text/plain\r\nX-Evil: 1"
    async with catalogue.staged() as stage:
        reply = await stage.ask("/api/tags")
        assert (reply.status, reply.get("x-evil")) == (500, None)
        (mishap,) = [event for event in stage.events if isinstance(event, Mishap)]
        assert "line end" in mishap.error


@both
async def test_who_asks_and_never_reads_is_not_told_for_ever() -> None:
    """What is held for it is bounded: beyond that its requests wait, and then its bytes."""
    catalogue = Catalogue(300_000)
    async with catalogue.staged() as stage:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, ("127.0.0.1", stage.port))
            asked = b"GET /api/tags HTTP/1.1\r\n" + HOST + b"\r\n"
            for _ in range(20):
                with suppress(BlockingIOError):
                    sock.send(asked * 20)
                for _ in range(5):
                    await asyncio.sleep(0.001)
            held = [exchange.outlet for exchange in stage.front.running]
            assert len(held) == 1
            assert held[0].is_held_up
            transport = held[0].request.transport
            assert transport is not None
            assert transport.get_write_buffer_size() < 2 * len(catalogue.body)
            assert len(stage.ended) < 20
        await until(lambda: not stage.front.running)
        assert stage.ended[-1].outcome == "client_abort"


@virtual
async def test_who_reads_late_gets_all_that_it_asked_for() -> None:
    """In order, through the same waiting; meanwhile nothing was cut."""
    catalogue = Catalogue(300_000)
    async with catalogue.staged() as stage:
        wire = await Wire.connect(stage.port)
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        asked = b"GET /api/tags HTTP/1.1\r\n" + HOST + b"\r\n"
        wire.writer.write(asked * 60)
        await asyncio.sleep(50.0)
        wire.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(60):
            assert (await wire.reply()).body == catalogue.body
        wire.close()
        assert [told.outcome for told in stage.ended] == ["ok"] * 60


class Ticking:
    """A reply that wants to be looked after."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def tick(self, now: float) -> None:
        """Note when."""
        self.at.append(now)


@virtual
async def test_what_runs_is_looked_after_twice_a_second() -> None:
    """By one timer for all, which rests while nothing runs."""
    ticking, go = Ticking(), asyncio.Event()

    async def slow(exchange: Exchange) -> web.StreamResponse:
        exchange.reply = ticking
        await go.wait()
        return web.Response(body=b"ok")

    async with staged(slow) as stage:
        for _ in range(2):
            go.clear()
            ticking.at.clear()
            wire = await stage.begin("/")
            await until(lambda: bool(stage.front.running))
            await asyncio.sleep(10.0)
            go.set()
            assert (await wire.reply()).status == 200
            wire.close()
            assert 19 <= len(ticking.at) <= 21
            gaps = [b - a for a, b in pairwise(ticking.at)]
            assert gaps == pytest.approx([0.5] * len(gaps), abs=0.01)
            count = len(ticking.at)
            await asyncio.sleep(10.0)
            assert len(ticking.at) == count
            assert stage.front._ticking is None


# -- who asks again -------------------------------------------------------------------------------


@virtual
async def test_who_asks_again_in_the_same_words_is_known_for_a_second() -> None:
    """On its own connection; another word, another rule, or time, and the door is asked anew."""
    catalogue = Catalogue()
    async with catalogue.staged() as stage:
        wire, door = await Wire.connect(stage.port), stage.door

        async def ask(headers: bytes = b"", method: bytes = b"GET") -> int:
            wire.writer.write(method + b" /api/tags HTTP/1.1\r\n" + HOST + headers + b"\r\n")
            await wire.reply(method.decode())
            return door.asked

        assert await ask(b"X-Request-Id: 1\r\n") == 1
        assert await ask(b"X-Request-Id: 2\r\n") == 1
        assert await ask(b"x-request-id: 2\r\n") == 2
        assert await ask(b"X-Api-Key: 1\r\n") == 3
        assert await ask(b"X-Api-Key: 2\r\n") == 4
        assert await ask(b"X-Api-Key: 2\r\n", b"HEAD") == 5
        assert await ask(b"X-Api-Key: 2\r\n", b"HEAD") == 5
        door.discreet = True
        assert await ask(b"X-Api-Key: 2\r\n", b"HEAD") == 6
        await asyncio.sleep(1.1)
        assert await ask(b"X-Api-Key: 2\r\n", b"HEAD") == 7
        assert await ask(b"X-Refuse: no\r\n") == 8
        assert await ask(b"X-Refuse: no\r\n") == 9, "who was refused is not remembered"
        wire.close()
        assert {told.key for told in stage.ended[:-2]} == {"somebody"}
        assert {told.client for told in stage.ended[:-2]} == {"192.0.2.1"}
        other = await Wire.connect(stage.port)
        other.writer.write(b"GET /api/tags HTTP/1.1\r\n" + HOST + b"\r\n")
        await other.reply()
        other.close()
        assert door.asked == 10


@virtual
async def test_who_is_known_is_still_refused_what_is_not_for_it() -> None:
    """A drain, a circle and a role are asked for each request."""
    draining = [False]
    catalogue = Catalogue()
    async with catalogue.staged(is_draining=lambda: draining[0]) as stage:
        wire = await Wire.connect(stage.port)
        asked = b"GET /api/tags HTTP/1.1\r\n" + HOST + b"Via: 1.1 token-2\r\n\r\n"
        wire.writer.write(asked)
        assert (await wire.reply()).status == 200
        draining[0] = True
        wire.writer.write(asked)
        assert (await wire.reply()).status == 503
        wire.close()
        draining[0] = False
        for _ in range(2):
            assert (await stage.ask("/api/tags", headers=b"Via: 1.1 token-1\r\n")).status == 508


# -- late refusals --------------------------------------------------------------------------------


async def test_a_refusal_raised_late_keeps_its_shape() -> None:
    """A handler may refuse at any time before it answers."""

    async def refuse(_: Exchange) -> web.StreamResponse:
        raise BadRequest("no <b>way</b>")

    async with staged(refuse) as stage:
        native, openai = await stage.ask("/api/tags"), await stage.ask("/v1/models")
        assert native.body == b'{"error":"no \\u003cb\\u003eway\\u003c/b\\u003e"}'
        assert json.loads(openai.body)["error"]["type"] == "invalid_request_error"


@virtual
async def test_many_answers_are_looked_at_a_few_at_a_time() -> None:
    """Each about twice a second, and never more of them at once than delay nobody."""
    async with staged() as stage:
        seen: list[tuple[float, int]] = []
        now = asyncio.get_running_loop().time

        class Looked:
            """One answer."""

            def __init__(self, number: int) -> None:
                self.number = number

            def tick(self, at: float) -> None:
                """Note it."""
                seen.append((at, self.number))

        for number in range(5 * TICKED // 2):
            exchange: Any = object.__new__(Exchange)
            exchange.reply = Looked(number)
            stage.front.running.add(exchange)
        began = now()
        stage.front._tick()
        await asyncio.sleep(10.0)
        stage.front.running.clear()
        by_turn = Counter(at for at, _ in seen)
        assert max(by_turn.values()) <= TICKED
        times: dict[int, list[float]] = {}
        for at, number in seen:
            times.setdefault(number, []).append(at - began)
        assert len(times) == 5 * TICKED // 2
        for told in times.values():
            assert all(0.3 <= b - a <= 0.8 for a, b in pairwise(told))
