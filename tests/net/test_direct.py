"""
The direct way: the same answers as in a task, and nothing left over however it ends.

That a call went the direct way is seen by what it did not ask for: `Proxy.go_on`, which every task
goes through.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from balancer.app import Stop
from balancer.core.domain import Call
from balancer.core.errors import Forbidden
from balancer.core.events import Mishap
from balancer.core.pool import Lease
from balancer.core.verdicts import Failure, FailureKind
from balancer.net.listener import HIGH_WATER
from balancer.net.upstream import Handle, Sink
from balancer.sim.loop import run
from tests.e2e.stage import (
    CHAT,
    ROUTES,
    SLOW,
    STREAMS,
    WORDS,
    Asking,
    error_of,
    is_whole,
    now,
    records,
    said,
    settled,
    verdicts,
    virtual,
    warm,
)
from tests.net.peer import both, until
from tests.rig import Rig
from tests.sim.wire import Reply, Wire

pytestmark = pytest.mark.usefixtures("quiet")
NDJSON = [("Content-Type", "application/x-ndjson")]
LINE = b'{"model":"m","message":{"role":"assistant","content":"x"},"done":false}\n'
DONE = b'{"model":"m","message":{"role":"assistant","content":""},"done":true,"eval_count":1}\n'
PAGE = "https://chat.example"
KEY = "0123456789abcdef-user"


def forgiven(rig: Rig) -> list[str]:
    """What was told of bugs; from here on it does not count as one of ours."""
    told = [event.error for event in rig.events.of(Mishap)]
    rig.events.events = [e for e in rig.events.events if not isinstance(e, Mishap)]
    return told


# -- the same answers -----------------------------------------------------------------------------


def head_of(reply: Reply) -> dict[str, str]:
    """A head without what is different each time: the answer tells times, of some length."""
    changing = ("Date", "Content-Length")
    return {name.lower(): value for name, value in reply.headers if name not in changing}


@pytest.mark.parametrize("config", ["usual", "minimal", "page"])
@pytest.mark.parametrize("route", ROUTES)
@virtual
async def test_an_answer_is_the_same_either_way(route: str, config: str) -> None:
    """Status, every header, framing, records and words; also what is told of it."""
    path, body = ROUTES[route]
    settings: dict[str, Any] = {}
    sent = {"X_Request_Id": "mine", "Content_Type": "application/json"}
    if config == "page":
        settings = {"cors.allow_origins": [PAGE]}
        sent |= {"Origin": PAGE}
    elif config == "minimal":
        keys = [{"name": "u", "role": "user", "key": KEY}]
        settings = {"server.headers": "minimal", "auth.keys": keys, "auth.anonymous": "never"}
        sent |= {"X_Api_Key": KEY}
    async with warm(1, config=settings) as (rig, tasks):
        await rig.ask("POST", path, body, **sent)  # now the prompt is in the host's cache
        direct = await rig.ask("POST", path, body, **sent)
        assert tasks == [], "it went another way"
        slow = await rig.ask("POST", path, body, **sent, **SLOW)
        assert tasks == ["mine"]
        assert is_whole(direct, path)
        assert is_whole(slow, path)
        assert head_of(direct) == head_of(slow)
        assert [name for name, _ in direct.headers] == [name for name, _ in slow.headers]
        assert direct.get("x-request-id") == "mine"
        assert (direct.get("x-balancer-backend") is None) is (config == "minimal")
        assert (direct.get("access-control-allow-origin") == PAGE) is (config == "page")
        assert direct.framing == slow.framing
        if "embed" not in path and route != "v1 responses, streamed":  # is_whole looks at that
            assert said(direct) == said(slow) == "".join(WORDS)
        assert (direct.framing == "chunked") is (route in STREAMS)
        if route in STREAMS:
            assert len(records(direct)) == len(records(slow))
        same: dict[str, Any] = {
            "at": 0.0,
            "planned": None,
            "duration_s": 0.0,
            "first_byte_s": 0.0,
            "upstream_s": 0.0,
        }
        one, other = (replace(told, **same, bytes_out=0) for told in rig.calls()[1:])
        assert one == other
        first, second = rig.forwarded()[1:]
        assert dict(first.headers) == dict(second.headers)
        assert first.body == second.body


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"model": "nobody", "messages": []}),
        ("/v1/chat/completions", {"model": "nobody", "messages": []}),
        ("/v1/messages", {"model": "nobody", "messages": []}),
        ("/api/chat", {"messages": []}),
        ("/api/chat", {"model": "m", "messages": 7}),
        ("/api/generate", {"model": "m", "keep_alive": 0}),
        ("/api/generate", {"model": "m"}),
    ],
)
@virtual
async def test_what_is_not_simply_answered_is_the_same_too(path: str, body: Any) -> None:
    """Refusals in their words, loads, unloads, and what only a backend can refuse."""
    told = []
    for headers in ({}, SLOW):
        async with warm() as (rig, _):
            reply = await rig.ask("POST", path, body, X_Request_Id="mine", **headers)
            shown = {k: v for k, v in json.loads(reply.body).items() if "duration" not in k}
            shown.pop("created_at", None)
            head = head_of(reply)
            head.pop("x-balancer-queue-ms", None)
            told.append((reply.status, head, shown, [e.outcome for e in rig.calls()]))
    assert told[0] == told[1]


@both
async def test_a_connection_is_kept_through_all_kinds_of_answers() -> None:
    """Direct, handed over and failed over, refused, told at once: one after the other, in order."""
    in_turn = {"routing.strategy": "round-robin"}  # the next is another's, on a new connection
    async with warm(2, speed=100.0, config=in_turn) as (rig, tasks):
        await rig.warm("b", "m")
        asking = await Asking.of(rig, "/api/chat", CHAT, X_Request_Id="1")
        await asking.head()
        assert is_whole(await asking.rest(), "/api/chat")
        rig.fleet["a"].faults.reset_head(1)
        rig.fleet["b"].faults.reset_head(1)
        sent = [CHAT, CHAT | {"model": "nobody"}, CHAT, CHAT | {"stream": False}]
        for n, body in enumerate(sent):
            asking.send(rig, "/api/chat", body, X_Request_Id=f"{n + 2}")
        statuses = []
        for _ in sent:
            statuses.append((await asking.head()).status)
            await asking.rest()
        assert statuses[1:] == [404, 200, 200]
        assert "1" not in tasks
        assert {"2", "3"} <= {*tasks}
        asking.close()
        assert [told.request_id for told in await rig.ended(5)] == ["1", "2", "3", "4", "5"]


# -- bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", ["two", "bytes"])
@virtual
async def test_a_body_in_pieces_goes_the_direct_way(pieces: str) -> None:
    """Most clients send head and body in two writes."""
    async with warm() as (rig, tasks):
        wire = await rig.connect()
        body = json.dumps(CHAT | {"stream": False}).encode()
        head = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        wire.writer.write(head.encode())
        step = 7 if pieces == "bytes" else len(body)
        for at in range(0, len(body), step):
            await asyncio.sleep(0.001)
            wire.writer.write(body[at : at + step])
        reply = await wire.reply()
        assert is_whole(reply, "/api/chat")
        assert tasks == []
        assert settled(rig, "ok", "ok").bytes_in == len(body)
        wire.close()


@virtual
async def test_a_body_that_stops_is_refused_as_ever() -> None:
    """408 after the usual time; the connection is closed, since nobody knows what follows."""
    async with warm() as (rig, _):
        wire, began = await rig.connect(), now()
        wire.writer.write(
            b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        )
        reply = await wire.reply()
        assert (reply.status, reply.get("connection")) == (408, "close")
        assert now() - began == pytest.approx(30.0, abs=1.0)
        settled(rig, "timeout", None)
        wire.close()


# -- leaving --------------------------------------------------------------------------------------


async def _body(rig: Rig) -> None:
    wire = await rig.connect()
    wire.writer.write(b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await until(lambda: any(c._messages for c in rig.balancer._server.connections))
    wire.writer.transport.abort()


async def _queued(rig: Rig) -> None:
    (holder,) = rig.balancer.front.running
    leaving = await Asking.of(rig, "/api/chat", CHAT)
    await rig.events.until(lambda: bool(rig.balancer.dispatcher.waiting()))
    leaving.hang_up()
    await until(lambda: rig.balancer.front.running == {holder})


async def _before(rig: Rig) -> None:
    rig.fleet["a"].faults.hang_inference()
    leaving = await Asking.of(rig, "/api/chat", CHAT)
    await until(lambda: bool(rig.forwarded()))
    leaving.hang_up()


async def _streaming(rig: Rig) -> None:
    rig.fleet["a"].script(
        "/api/chat", headers=NDJSON, segments=[LINE], framing="chunked", ending="stall"
    )
    leaving = await Asking.of(rig, "/api/chat", CHAT)
    await leaving.head()
    await leaving.record()
    leaving.hang_up()


async def _finished(rig: Rig) -> None:
    rig.fleet["a"].script(
        "/api/chat", headers=NDJSON, segments=[LINE, DONE], framing="chunked", ending="stall"
    )
    leaving = await Asking.of(rig, "/api/chat", CHAT)
    await leaving.head()
    while not leaving.reply.body.endswith(DONE):
        await leaving.record()
    leaving.hang_up()


@pytest.mark.parametrize(
    ("leave", "outcome", "verdict", "phase"),
    [
        (_body, "client_abort", None, ""),
        (_before, "client_abort", "gone", "before_first_token"),
        (_streaming, "client_abort", "gone", "streaming"),
        (_finished, "ok", "ok", ""),
    ],
)
@both
async def test_a_client_that_leaves_is_told_once_and_costs_nothing(
    leave: Callable[[Rig], Any], outcome: str, verdict: str | None, phase: str
) -> None:
    """At any time: the host hears of it, the slot is free, nobody is blamed."""
    async with warm() as (rig, tasks):
        await leave(rig)
        await rig.ended()
        assert settled(rig, outcome, verdict, phase=phase).status in (200, 499)
        assert tasks == []
        if verdict is not None:
            await until(lambda: rig.forwarded()[-1].ending == "client-gone")


@both
async def test_a_client_that_leaves_the_queue_takes_nothing_with_it() -> None:
    """The call never goes up, and the one that runs is not disturbed."""
    async with warm(backend={"slots": 1}) as (rig, _):
        rig.fleet["a"].script(
            "/api/chat", headers=NDJSON, segments=[LINE], framing="chunked", ending="stall"
        )
        holder = await Asking.of(rig, "/api/chat", CHAT)
        await holder.head()
        await _queued(rig)
        (told,) = await rig.ended()
        assert (told.outcome, told.phase, told.backend) == ("client_abort", "queued", "")
        assert len(rig.forwarded()) == 1
        assert rig.balancer.pool.running == 1
        holder.hang_up()
        await rig.ended(2)


@pytest.mark.parametrize("grants", [False, True])
@both
async def test_a_queued_call_may_lose_its_client_before_a_task_has_it(*, grants: bool) -> None:
    """In the turn in which it was handed over, also if a slot becomes free in that very turn."""
    async with warm(backend={"slots": 1}) as (rig, tasks):
        rig.fleet["a"].script(
            "/api/chat", headers=NDJSON, segments=[LINE], framing="chunked", ending="stall"
        )
        holder = await Asking.of(rig, "/api/chat", CHAT)
        await holder.head()
        (lease,) = rig.balancer.pool.members["a"].leases
        proxy, loop = cast("Any", rig.balancer.proxy), asyncio.get_running_loop()
        submit, lost = proxy.submit, list[Any]()

        def submitted(course: Any) -> Any:
            (waiting,) = (e for e in rig.balancer.front.running if not e.attempts)
            lost.append(waiting.request.connection.transport)
            if grants:
                loop.call_soon(lease.release)
            loop.call_soon(waiting.request.connection.connection_lost, ConnectionResetError())
            return submit(course)

        proxy.submit = submitted
        leaving = await Asking.of(rig, "/api/chat", CHAT)
        await rig.ended()
        (told,) = rig.calls()
        assert (told.outcome, told.phase) == ("client_abort", "queued")
        assert tasks == []
        assert len(rig.forwarded()) == 1
        assert rig.balancer.pool.running == (0 if grants else 1)
        lost[0].abort()
        holder.hang_up()
        leaving.hang_up()
        await rig.ended(2)


async def held_up(rig: Rig, path: str, body: object) -> socket.socket:
    """A call whose client reads nothing."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    loop, sent = asyncio.get_running_loop(), json.dumps(body).encode()
    await loop.sock_connect(sock, ("127.0.0.1", rig.port))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(sent)}\r\n\r\n"
    await loop.sock_sendall(sock, head.encode() + sent)
    return sock


@both
async def test_a_client_may_leave_while_a_whole_answer_waits_for_it() -> None:
    """The backend has long been free, and its answer was good; the client has not had it."""
    answer = b'{"embeddings":[[' + b"0.125," * 1_390_000 + b"0]]}"  # just below what is held whole
    async with warm() as (rig, tasks):
        rig.fleet["a"].script("/api/embed", segments=[answer])
        sock = await held_up(rig, "/api/embed", {"model": "e", "input": "x"})
        await rig.events.until(lambda: bool(verdicts(rig)))
        assert rig.balancer.pool.running == 0
        (exchange,) = rig.balancer.front.running
        assert exchange.outlet.is_held_up
        assert rig.calls() == []
        sock.close()
        await rig.ended()
        told = settled(rig, "client_abort", "ok", phase="before_first_token")
        assert told.status == 200
        assert tasks == []


# -- back-pressure --------------------------------------------------------------------------------


@both
async def test_a_slow_reader_holds_its_backend_back_and_misses_nothing() -> None:
    """What is held for it is bounded; when it reads on, all comes, byte for byte."""
    line = b'{"model":"m","message":{"content":"' + b"x" * 100_000 + b'"},"done":false}\n'
    segments = [*[line] * 200, DONE]
    async with warm() as (rig, tasks):
        rig.fleet["a"].script("/api/chat", headers=NDJSON, segments=segments, framing="chunked")
        sock = await held_up(rig, "/api/chat", CHAT)
        await until(lambda: any(e.outlet.is_held_up for e in rig.balancer.front.running))
        (exchange,) = rig.balancer.front.running
        for _ in range(50):
            await asyncio.sleep(0.001)
        transport = exchange.request.connection.transport
        assert transport is not None
        assert transport.get_write_buffer_size() < HIGH_WATER + 1_000_000
        assert exchange.outlet.bytes_out < 10_000_000
        assert rig.balancer.pool.running == 1
        got, loop = b"", asyncio.get_running_loop()
        async with asyncio.timeout(20):
            while not got.endswith(b"\r\n0\r\n\r\n"):
                got += await loop.sock_recv(sock, 1 << 20)
        sock.close()
        await rig.ended()
        reader = asyncio.StreamReader(limit=1 << 26)
        reader.feed_data(got)
        asking = Asking(Wire(reader, None))  # type: ignore[arg-type]
        await asking.head()
        assert (await asking.rest()).body == b"".join(segments)
        assert settled(rig, "ok", "ok").bytes_out == sum(map(len, segments))
        assert tasks == []


@both
async def test_a_client_may_leave_while_it_holds_its_backend_back() -> None:
    """The backend is let go at once, though nothing is read from it."""
    line = b'{"model":"m","message":{"content":"' + b"x" * 100_000 + b'"},"done":false}\n'
    async with warm() as (rig, tasks):
        rig.fleet["a"].script(
            "/api/chat", headers=NDJSON, segments=[line] * 200, framing="chunked", ending="stall"
        )
        sock = await held_up(rig, "/api/chat", CHAT)
        await until(lambda: any(e.outlet.is_held_up for e in rig.balancer.front.running))
        sock.close()
        await rig.ended()
        settled(rig, "client_abort", "gone", phase="streaming")
        await until(lambda: rig.forwarded()[-1].ending == "client-gone")
        assert tasks == []


# -- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@both
async def test_a_first_attempt_that_fails_is_followed_by_another(*, stream: bool) -> None:
    """In a task, with all that has happened so far; the client sees one good answer."""
    async with warm(2, speed=100.0) as (rig, tasks):
        rig.fleet["a"].faults.reset_head()
        reply = await rig.ask("POST", "/api/chat", CHAT | {"stream": stream}, X_Request_Id="mine")
        assert is_whole(reply, "/api/chat")
        assert tasks == ["mine"]
        assert (reply.get("x-balancer-attempts"), reply.get("x-balancer-backend")) == ("2", "b")
        assert [name for name, _ in verdicts(rig)] == ["a", "b"]


@virtual
async def test_heartbeats_of_the_first_attempt_are_followed_by_the_answer_of_the_second() -> None:
    """Within one stream, whose head went out before anybody knew who would answer."""
    async with warm(2) as (rig, tasks):
        rig.fleet["a"].script(
            "/api/chat", headers=NDJSON, segments=[(40.0, b"")], ending="cut", framing="chunked"
        )
        asking, began = await Asking.of(rig, "/api/chat", CHAT, X_Request_Id="mine"), now()
        head = await asking.head()
        assert now() - began == pytest.approx(20.0, abs=0.5)
        assert tasks == [], "it is still the first attempt"
        reply = await asking.rest()
        assert tasks == ["mine"]
        assert head.get("x-balancer-backend") is None, "nobody knew it when the head went out"
        beats, rest = records(reply)[:2], records(reply)[2:]
        assert [beat["message"]["content"] for beat in beats] == ["", ""]
        assert "".join(each["message"]["content"] for each in rest) == "".join(WORDS)
        assert is_whole(reply, "/api/chat")
        assert [name for name, _ in verdicts(rig)] == ["a", "b"]
        (told,) = rig.calls()
        assert (told.backend, told.attempts, told.outcome) == ("b", 2, "ok")
        asking.close()


@virtual
async def test_a_stream_that_was_begun_by_heartbeats_ends_with_an_error() -> None:
    """If nobody can answer after all; its status line is long gone."""
    async with warm() as (rig, tasks):
        script: dict[str, Any] = {"headers": NDJSON, "framing": "chunked", "times": None}
        rig.fleet["a"].script("/api/chat", segments=[(30.0, b"")], ending="cut", **script)
        reply = await rig.ask("POST", "/api/chat", CHAT, X_Request_Id="mine")
        assert (reply.status, reply.ended) == (200, "clean")
        assert "in the middle of the answer" in records(reply)[-1]["error"]
        assert tasks == ["mine"]
        assert rig.calls()[0].outcome in ("shed", "upstream_error")


@virtual
async def test_a_document_behind_heartbeats_is_an_error_of_its_backend() -> None:
    """What does not fit into a stream that has begun is not put there."""
    async with warm() as (rig, _):
        rig.fleet["a"].script("/v1/chat/completions", segments=[(30.0, b'{"choices":[]}')])
        reply = await rig.ask("POST", "/v1/chat/completions", CHAT | {"stream": True})
        assert reply.ended == "clean"
        assert b"choices" not in reply.body
        assert "one document where a stream was asked for" in str(records(reply)[-1])
        assert rig.balancer.pool.running == 0
        assert len(rig.calls()) == 1


@pytest.mark.parametrize("how", ["cut", "reset", "stall", "half"])
@virtual
async def test_a_stream_that_breaks_is_never_ended_in_silence(how: str) -> None:
    """A record where one fits, else it is broken off; either way it is told once."""
    async with warm(config={"timeouts.idle": "10s"}) as (rig, tasks):
        long = b'{"message":{"content":"' + b"x" * 1_100_000
        script: Any = {
            "headers": NDJSON,
            "segments": [LINE, (0.1, long if how == "half" else LINE), (0.1, LINE[:9])],
            "framing": "chunked",
            "ending": "cut" if how == "half" else how,
        }
        rig.fleet["a"].script("/api/chat", **script)
        reply = await rig.ask("POST", "/api/chat", CHAT)
        if how == "half":
            assert reply.ended in ("cut", "reset")
        else:
            assert reply.ended == "clean"
            assert records(reply)[-1].keys() == {"error"}
        await rig.ended()
        settled(rig, "upstream_error", "stalled" if how == "stall" else "broken")
        assert tasks == []


# -- bugs of ours ---------------------------------------------------------------------------------


class Opening:
    """The door to backends, whose first opening goes wrong."""

    def __init__(self, rig: Rig, how: str) -> None:
        self._upstream = rig.balancer.upstream
        self._how = how
        self.opened = 0

    def open(self, lease: Lease, call: Call, sink: Sink) -> Handle:
        """Send a call."""
        self.opened += 1
        if self.opened > 1:
            return self._upstream.open(lease, call, sink)
        if self._how == "raises":
            raise LookupError("inside knowledge")
        handle = self._upstream.open(lease, call, sink)
        handle.abort()
        sink.fail(Failure(FailureKind.CONNECT))
        return handle


@virtual
async def test_a_door_that_fails_at_once_is_a_failed_attempt() -> None:
    """Before it has returned what is to be waited for."""
    async with warm(2) as (rig, tasks):
        await rig.warm("b", "m")
        rig.balancer.proxy.upstream = Opening(rig, "fails")
        reply = await rig.ask("POST", "/api/chat", CHAT, X_Request_Id="mine")
        assert is_whole(reply, "/api/chat")
        assert tasks == ["mine"]
        assert [verdict for _, verdict in verdicts(rig)] == ["fault", "ok"]


def broken(*_: object, **__: object) -> Any:
    """A bug."""
    raise LookupError("inside knowledge")


@pytest.mark.parametrize("where", ["open", "identify", "submit", "decided", "judged"])
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
@virtual
async def test_a_bug_is_a_mishap_and_a_legible_500(
    where: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told once, without its text; whatever was held is given back."""
    async with warm() as (rig, _):
        proxy: Any = rig.balancer.proxy
        if where == "open":
            proxy.upstream = Opening(rig, "raises")
        elif where == "judged":
            monkeypatch.setattr("balancer.net.proxy.judge", broken)
        else:
            setattr(proxy, where, broken)
        reply = await rig.ask("POST", path, CHAT | {"stream": False}, X_Request_Id="mine")
        monkeypatch.undo()
        assert reply.status == 500
        assert "internal error of the balancer [req mine]" in error_of(reply)
        assert forgiven(rig) == ["LookupError: inside knowledge"]
        verdict = None if where in ("identify", "submit") else "gone"
        settled(rig, "upstream_error", verdict)


@pytest.mark.parametrize("slow", [{}, SLOW])
@virtual
async def test_a_body_that_cannot_be_written_gives_its_lease_back(
    slow: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context is written into it behind the grant: a bug there must not keep the slot."""
    config = {"models.num_ctx": {"policy": "reuse"}}
    async with warm(1, config=config) as (rig, _):
        monkeypatch.setattr("balancer.net.proxy.written", broken)
        reply = await rig.ask("POST", "/api/chat", CHAT | {"stream": False}, **slow)
        monkeypatch.undo()
        assert reply.status == 500
        assert forgiven(rig) == ["LookupError: inside knowledge"]
        settled(rig, "upstream_error", "gone")
        assert (rig.balancer.pool.running, rig.balancer.proxy.memory.held) == (0, 0)
        assert (await rig.ask("POST", "/api/chat", CHAT)).status == 200


@virtual
async def test_a_body_that_is_written_anew_counts_beside_the_one_that_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is kept in case the next attempt needs another context."""
    async with warm(1, config={"models.num_ctx": {"policy": "reuse", "default": 4096}}) as (rig, _):
        proxy, seen = rig.balancer.proxy, list[tuple[int, int]]()

        def opened(lease: Lease, call: Call, sink: Sink) -> Handle:
            origin = call.origin
            assert origin is not None
            kept = 0 if call.body is origin.body else len(origin.body)
            seen.append((proxy.memory.held, len(call.body) + kept))
            return rig.balancer.upstream.open(lease, call, sink)

        monkeypatch.setattr(proxy, "upstream", SimpleNamespace(open=opened))
        for body in (CHAT, CHAT | {"options": {"num_ctx": 8192}}, CHAT):
            assert (await rig.ask("POST", "/api/chat", body)).status == 200
        await rig.ended()
        assert [held for held, _ in seen] == [wanted for _, wanted in seen]
        assert max(held for held, _ in seen) > 2 * len(json.dumps(CHAT))
        assert proxy.memory.held == 0


@virtual
async def test_a_bug_inside_an_answer_cuts_it() -> None:
    """A second head would pass for a part of the first answer."""
    async with warm() as (rig, _):
        proxy, decided = cast("Any", rig.balancer.proxy), rig.balancer.proxy.decided

        def late(*args: Any) -> Any:
            decided(*args)
            raise LookupError("inside knowledge")

        proxy.decided = late
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert reply.ended in ("cut", "reset")
        assert b"internal error" not in reply.body
        await rig.ended()
        assert forgiven(rig) == ["LookupError: inside knowledge"]
        settled(rig, "upstream_error", "gone", phase="")


@virtual
async def test_a_header_with_a_line_end_is_a_bug_that_stays_here() -> None:
    """Wherever it came from: the client gets a legible refusal without it."""
    async with warm() as (rig, _):
        proxy, headers = cast("Any", rig.balancer.proxy), rig.balancer.proxy._headers

        def evil(*args: Any) -> dict[str, str]:
            return headers(*args) | {"X-Balancer-Backend": "a\r\nX-Evil: 1"}

        proxy._headers = evil
        for stream in (True, False):
            reply = await rig.ask("POST", "/api/chat", CHAT | {"stream": stream})
            assert (reply.status, reply.get("x-evil")) == (500, None)
        assert all("line end" in text for text in forgiven(rig))
        await rig.ended(2)
        assert rig.balancer.pool.running == 0


@virtual
async def test_a_refusal_of_the_caller_is_no_bug() -> None:
    """It is told in its own words, from wherever it comes."""
    async with warm() as (rig, _):

        def refuse(*_: object) -> Any:
            raise Forbidden("not you")

        proxy: Any = rig.balancer.proxy
        proxy.identify = refuse
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert (reply.status, "not you" in error_of(reply)) == (403, True)
        settled(rig, "rejected", None)


# -- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [True, False])
@virtual
async def test_a_drain_ends_a_live_call_with_an_error(*, begun: bool) -> None:
    """After its time: in a record if the stream has begun, else as a refusal."""
    async with warm(config={"server.drain_timeout": "5s"}) as (rig, tasks):
        if not begun:
            rig.fleet["a"].faults.hang_inference()
        else:
            rig.fleet["a"].script(
                "/api/chat", headers=NDJSON, segments=[LINE], framing="chunked", ending="stall"
            )
        asking = await Asking.of(rig, "/api/chat", CHAT, X_Request_Id="mine")
        await asyncio.sleep(1.0)
        stopping = asyncio.get_running_loop().create_task(rig.balancer.wait())
        rig.balancer.stop(Stop("SIGTERM"))
        began = now()
        head = await asking.head()
        reply = await asking.rest()
        await stopping
        assert 4.0 < now() - began < 8.0
        if begun:
            assert (head.status, reply.ended) == (200, "clean")
            assert "stopp" in str(records(reply)[-1]["error"])
        else:
            assert (head.status, "stopping" in error_of(reply)) == (503, True)
        assert tasks == ([] if begun else ["mine"])
        settled(rig, "shed", "stopped")
        asking.close()


@virtual
async def test_a_drain_waits_for_a_live_call() -> None:
    """As long as it may; its answer is whole, and its connection closed behind it."""
    async with warm(config={"server.drain_timeout": "60s"}) as (rig, tasks):
        asking = await Asking.of(rig, "/api/chat", CHAT)
        await asking.head()
        stopping = asyncio.get_running_loop().create_task(rig.balancer.wait())
        rig.balancer.stop(Stop("SIGTERM"))
        assert is_whole(await asking.rest(), "/api/chat")
        await stopping
        settled(rig, "ok", "ok")
        assert tasks == []
        asking.close()


def test_nothing_is_begun_while_the_proxy_stops() -> None:
    """What comes between the end of a drain and that of the listener is refused in a task."""

    async def scenario() -> None:
        async with warm() as (rig, _):
            rig.balancer.proxy.stopping = True
            reply = await rig.ask("POST", "/api/chat", CHAT)
            assert (reply.status, "stopping" in error_of(reply)) == (503, True)
            assert rig.forwarded() == []
            rig.balancer.proxy.stopping = False

    run(scenario())
