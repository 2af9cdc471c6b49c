"""
The way of a small call from end to end, cut and broken off anywhere, in both kinds of loops.

The backend is played by hand, byte by byte; a host beside it answers the checks.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.core.events import AttemptEnded
from balancer.net.upstream import ClientUpstream, Target
from balancer.sim import loop as loops
from tests.e2e.stage import CHAT, ROUTES, STREAMS, error_of, is_whole, records, virtual, warm
from tests.net.peer import Line, Peer, until
from tests.rig import Rig
from tests.sim.wire import Reply, Wire

pytestmark = pytest.mark.usefixtures("quiet", "each_loop")
NEVER_OPEN = {"breaker.host.in_a_row": 1_000_000, "breaker.model.in_a_row": 1_000_000}
LANES = {"direct": "", "a task": "X-Request-Timeout: 600\r\n"}
TURNS = 4  # of the loop, within which what was written is read at the other end


async def breathe() -> None:
    """Let what was written be read, alone."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """*data*, cut there; a cut beyond its end is taken from its beginning again."""
    at = sorted({cut % len(data) for cut in cuts} - {0})
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


@dataclass(slots=True)
class Stage:
    """The balancer, and a backend that does as it is told."""

    rig: Rig
    tasks: list[str]
    seen: list[bytes] = field(default_factory=list)
    answers: list[list[bytes]] = field(default_factory=list)

    async def answering(self, line: Line) -> None:
        """Serve a connection."""
        while True:
            self.seen.append(await line.request())
            for piece in self.answers.pop(0):
                line.send(piece)
                await breathe()

    def nothing_left(self, calls: int) -> None:
        """So many calls have been told, each once, and nothing is held or runs."""
        rig = self.rig
        assert len(rig.calls()) == calls
        assert len({told.request_id for told in rig.calls()}) == calls
        assert rig.balancer.pool.running == 0
        assert not rig.balancer.front.running
        assert not rig.balancer.dispatcher.waiting()
        assert rig.balancer.proxy.memory.held == 0
        assert all(member.load.in_flight() == 0 for member in rig.balancer.pool.members.values())

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Wire]:
        """A connection of a client, gone in the end."""
        wire = await self.rig.connect()
        try:
            yield wire
        finally:
            wire.writer.transport.abort()

    async def left(self) -> None:
        """Wait until no client is connected, and the backend has no call."""
        server: Any = self.rig.balancer._server
        await until(lambda: not server.connections)
        await self.rig.idle()


@asynccontextmanager
async def staged(
    serve: Callable[[Line], Awaitable[None]] | None = None, hosts: int = 1
) -> AsyncIterator[Stage]:
    """
    Calls for host `a` go to a backend that *serve* plays; checks go to the host.

    Without *serve* it answers each request with the next of `Stage.answers`, piece by piece.
    """
    config = {"queue.max_wait": "1s", **NEVER_OPEN}
    async with warm(hosts, config=config) as (rig, tasks):
        stage = Stage(rig, tasks)
        proxy: Any = rig.balancer.proxy
        async with Peer(serve or stage.answering) as peer:
            targets = {**rig.balancer.upstream.targets, "a": Target(peer.url)}
            proxy.upstream = ClientUpstream(targets, rig.balancer.exchanges)
            try:
                yield stage
                await stage.left()
            finally:
                await proxy.upstream.close()
            await until(lambda: peer.open == 0)


def request(path: str, body: object, *, lane: str = "direct", chunks: Iterable[int] = ()) -> bytes:
    """A call as bytes; with a length, or in chunks that end at *chunks*."""
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{LANES[lane]}".encode()
    cuts = list(chunks)
    if not cuts:
        return head + b"Content-Length: %d\r\n\r\n" % len(payload) + payload
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(payload, cuts)


def chunked(data: bytes, cuts: Iterable[int]) -> bytes:
    """Framed in chunks."""
    framed = b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in pieces(data, cuts))
    return framed + b"0\r\n\r\n"


# -- answers --------------------------------------------------------------------------------------


RECORDS: dict[str, tuple[bytes, ...]] = {
    "/api/chat": (b'{"message":{"content":%s},"done":false}\n', b'{"done":true,"x":%s}\n'),
    "/api/generate": (
        b'{"response":%s,"done":false}\n',
        b'{"done":true,"response":%s}\n',
    ),
    "/v1/chat/completions": (
        b'data: {"choices":[{"delta":{"content":%s}}]}\n\n',
        b'data: {"choices":[],"x":%s}\n\n',
        b"data: [DONE]\n\n",
    ),
    "/v1/completions": (b'data: {"choices":[{"text":%s}]}\n\n', b"data: [DONE]\n\n"),
    "/v1/responses": (
        b'event: response.output_text.delta\ndata: {"delta":%s}\n\n',
        b'event: response.completed\ndata: {"response":{}}\n\n',
    ),
    "/v1/messages": (
        b'event: content_block_delta\ndata: {"delta":{"text":%s}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ),
}


def spoken(route: str, word: str) -> list[bytes]:
    """The records of a good answer on a route; a document is one."""
    path, _ = ROUTES[route]
    quoted = json.dumps(word, ensure_ascii=False).encode()
    kinds: tuple[bytes, ...] = (b'{"model":"m","done":true,"choices":[],"word":%s}',)
    if route in STREAMS:
        kinds = RECORDS[path]
    elif "embed" in path:
        kinds = (b'{"embeddings":[[0.5]],"word":%s}',)
    return [kind % quoted if b"%s" in kind else kind for kind in kinds]


def answer(route: str, word: str, chunks: Iterable[int] = ()) -> tuple[bytes, bytes]:
    """A good answer as bytes, and its body; a stream, or with *chunks*, in chunks."""
    parts = spoken(route, word)
    body, cuts = b"".join(parts), list(chunks)
    kind = "application/json"
    if route in STREAMS:
        kind = "text/event-stream" if "/v1/" in ROUTES[route][0] else "application/x-ndjson"
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n".encode()
    if route in STREAMS or cuts:
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body, cuts), body
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body, body


# -- any cut --------------------------------------------------------------------------------------

CUTS = st.lists(st.integers(0, 4000), max_size=8)


@dataclass(frozen=True, slots=True)
class Said:
    """One call of a conversation."""

    route: str
    lane: str
    word: str
    request_chunks: list[int]
    answer_chunks: list[int]
    answer_cuts: list[int]


SAID = st.builds(
    Said,
    st.sampled_from(list(ROUTES)),
    st.sampled_from(list(LANES)),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.just([]) | CUTS,
    st.just([]) | CUTS,
    CUTS,
)


async def conversation(stage: Stage, said: list[Said], cuts: list[int]) -> None:
    """Calls one behind the other on one connection, all of it cut; each is answered in full."""
    rig, before = stage.rig, len(stage.rig.calls())
    answers = [answer(each.route, each.word, each.answer_chunks) for each in said]
    stage.answers = [
        pieces(whole, each.answer_cuts) for (whole, _), each in zip(answers, said, strict=True)
    ]
    bodies = [ROUTES[each.route][1] | {"word": each.word} for each in said]
    stage.seen.clear()
    sent = b"".join(
        request(ROUTES[each.route][0], body, lane=each.lane, chunks=each.request_chunks)
        for each, body in zip(said, bodies, strict=True)
    )
    async with stage.client() as wire:
        for piece in pieces(sent, cuts):
            wire.writer.write(piece)
            await breathe()
        for (_, body), each in zip(answers, said, strict=True):
            reply = await wire.reply("POST")
            assert (reply.status, reply.ended, reply.body) == (200, "clean", body)
            assert reply.framing == ("chunked" if each.route in STREAMS else "length")
    heads = [seen.partition(b"\r\n\r\n") for seen in stage.seen]
    assert [json.loads(body) for _, _, body in heads] == bodies
    paths = [f"POST {ROUTES[each.route][0]} HTTP/1.1".encode() for each in said]
    assert [head.partition(b"\r\n")[0] for head, _, _ in heads] == paths
    await stage.left()
    await rig.ended(before + len(said))
    assert {told.outcome for told in rig.calls()[before:]} == {"ok"}
    stage.nothing_left(before + len(said))


def test_any_cut_of_requests_and_answers_gives_the_same_bytes() -> None:
    """Every route, both lanes, lengths and chunks, several calls on a connection, in order."""
    with asyncio.Runner(loop_factory=loops.VirtualLoop) as runner:
        stack = AsyncExitStack()
        stage = runner.run(stack.enter_async_context(staged()))

        @settings(max_examples=250, deadline=None)
        @given(st.lists(SAID, min_size=1, max_size=3), CUTS)
        def check(said: list[Said], cuts: list[int]) -> None:
            runner.run(conversation(stage, said, cuts))

        try:
            check()
        finally:
            runner.run(stack.aclose())


@pytest.mark.parametrize("lane", LANES)
@virtual
async def test_a_request_may_come_byte_by_byte_and_be_answered_so(lane: str) -> None:
    """All routes: the lane is the one meant, whatever the pieces."""
    async with staged() as stage:
        for route in ROUTES:
            each = Said(route, lane, "☃", [], [], list(range(4000)))
            await conversation(stage, [each], list(range(4000)))
        assert len(stage.tasks) == (0 if lane == "direct" else len(ROUTES))


# -- clients that leave ---------------------------------------------------------------------------

BODY = CHAT | {"stream": False}


@pytest.mark.parametrize("lane", ["direct", "a task", "chunks"])
@virtual
async def test_a_client_may_leave_at_every_byte_of_its_request(lane: str) -> None:
    """Nothing is told before the head is there, then it is told once."""
    if lane == "chunks":
        sent = request("/api/chat", BODY, chunks=[20, 40])
    else:
        sent = request("/api/chat", BODY, lane=lane)
    head = sent.index(b"\r\n\r\n") + 4

    async def serve(line: Line) -> None:
        stage.seen.append(await line.request())
        await line.closed()

    async with staged(serve) as stage:
        calls = 0
        for count in range(len(sent)):
            async with stage.client() as wire:
                wire.writer.write(sent[:count])
                await breathe()
            calls += count >= head
            await stage.rig.ended(calls)
            await stage.left()
            stage.nothing_left(calls)
        assert {told.outcome for told in stage.rig.calls()} == {"client_abort"}
        assert stage.seen == [], "only a whole request is a call"
        assert stage.rig.events.of(AttemptEnded) == []


ANSWERS = {
    "a document": answer("chat", "x"),
    "a document in chunks": answer("chat", "x", [10, 30]),
    "a stream": answer("chat, streamed", "x", [10, 45]),
    "events": answer("v1 chat, streamed", "x", [10, 60, 61]),
}
ASKED = {
    "a document": "chat",
    "a document in chunks": "chat",
    "a stream": "chat, streamed",
    "events": "v1 chat, streamed",
}


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("kind", ANSWERS)
@virtual
async def test_a_client_may_leave_at_every_byte_of_its_answer(kind: str, lane: str) -> None:
    """The backend hears of it, its slot is free, nobody is blamed, and it is told once."""
    whole, body = ANSWERS[kind]
    path, asked = ROUTES[ASKED[kind]]
    sent = request(path, asked, lane=lane)
    part = b""

    async def serve(line: Line) -> None:
        await line.request()
        line.send(part)
        given_all.set()
        stage.seen.append(await line.closed())

    async with staged(serve) as stage:
        given_all = asyncio.Event()
        for count in range(len(whole)):
            part = whole[:count]
            given_all.clear()
            async with stage.client() as wire:
                wire.writer.write(sent)
                await given_all.wait()
                await breathe()
            await stage.rig.ended(count + 1)
            await stage.left()
            await until(lambda count=count: len(stage.seen) == count + 1)  # type: ignore[misc]
            stage.nothing_left(count + 1)
        assert set(stage.seen) == {b""}
        told = [each.outcome.verdict.value for each in stage.rig.events.of(AttemptEnded)]
        assert len(told) == len(whole)
        last = whole.rindex(body[-3:].strip()) if kind in ("a stream", "events") else len(whole)
        assert set(told[:last]) == {"gone"}
        assert {call.outcome for call in stage.rig.calls()[:last]} == {"client_abort"}
        assert len(stage.tasks) == (0 if lane == "direct" else len(whole))


# -- backends that die ----------------------------------------------------------------------------


def ended_well(reply: Reply, route: str, body: bytes) -> None:
    """The answer is whole, or says that it is not, in a way its reader cannot miss."""
    if reply.status != 200:
        assert reply.status in (500, 503)
        assert reply.ended == "clean"
        assert error_of(reply)
    elif reply.ended == "clean" and route in STREAMS:
        assert reply.body == body or "error" in records(reply)[-1]
        assert reply.body == body or b"[DONE]" not in reply.body
    elif reply.ended == "clean":
        assert reply.body == body
    else:
        assert reply.ended in ("cut", "reset")


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("how", ["closes", "resets"])
@pytest.mark.parametrize("kind", ANSWERS)
@virtual
async def test_a_backend_may_die_at_every_byte_of_its_answer(
    kind: str, how: str, lane: str
) -> None:
    """No other can help: the client is told, never with half an answer that looks whole."""
    whole, body = ANSWERS[kind]
    route = ASKED[kind]
    path, asked = ROUTES[route]
    sent, part = request(path, asked, lane=lane), b""

    async def serve(line: Line) -> None:
        await line.request()
        line.send(part)
        await breathe()
        if how == "resets":
            line.reset()

    async with staged(serve) as stage:
        for count in range(len(whole) + 1):
            part = whole[:count]
            async with stage.client() as wire:
                wire.writer.write(sent)
                reply = await wire.reply("POST")
            ended_well(reply, route, body)
            if count == len(whole):
                assert (reply.status, reply.body) == (200, body)
            await stage.rig.ended(count + 1)
            await stage.left()
            stage.nothing_left(count + 1)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("how", ["closes", "resets"])
@virtual
async def test_a_backend_may_die_at_any_byte_of_a_request(how: str, lane: str) -> None:
    """Whatever it has read of it: another answers, and the client sees one good answer."""
    takes = list(range(0, 240, 16))

    async def serve(line: Line) -> None:
        await line.reader.readexactly(takes[len(stage.rig.calls())])
        if how == "resets":
            line.reset()

    async with staged(serve, 2) as stage:
        await stage.rig.warm("b", "m")
        sent = request("/api/chat", BODY, lane=lane)
        for number in range(len(takes)):
            async with stage.client() as wire:
                wire.writer.write(sent)
                reply = await wire.reply("POST")
            assert is_whole(reply, "/api/chat"), reply
            assert reply.get("x-balancer-backend") == "b"
            await stage.rig.ended(number + 1)
            await stage.left()
            stage.nothing_left(number + 1)


# -- early answers, slow readers ------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 3_000_000])
@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("closes", [True, False])
@virtual
async def test_an_answer_may_come_before_the_request_was_taken(
    size: int, status: int, *, closes: bool
) -> None:
    """The backend has read one byte; its answer counts, and the next call is not mixed up in it."""
    whole, body = answer("chat", "early")
    early = whole.replace(b"200 OK", b"400 Bad") if status == 400 else whole
    if closes:
        early = early.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)

    async def serve(line: Line) -> None:
        while True:
            await line.reader.readexactly(1)
            line.send(early)
            if closes:
                await line.closed()
            await line.request()  # the rest of it, if it comes

    async with staged(serve) as stage, stage.client() as wire:
        for calls in (1, 2, 3):
            wire.writer.write(request("/api/chat", BODY | {"more": "x" * size}))
            reply = await wire.reply("POST")
            assert (reply.status, reply.body, reply.ended) == (status, body, "clean")
            await stage.rig.ended(calls)
            await stage.rig.idle()
            stage.nothing_left(calls)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("route", ["chat", "chat, streamed", "v1 chat, streamed"])
@virtual
async def test_a_client_that_reads_slowly_misses_nothing(route: str, lane: str) -> None:
    """Megabytes that it takes in small pieces, with pauses; the end is told when it has all."""
    word = "x" * 300_000
    body = b"".join(spoken(route, word)[:1] * 20 + spoken(route, "end")[1:])
    if route == "chat":
        word = "x" * 6_000_000
        body = b"".join(spoken(route, word))
    head = answer(route, "")[0].partition(b"\r\n\r\n")[0].splitlines()[:2]
    whole = b"\r\n".join([*head, b"Transfer-Encoding: chunked", b"", b""])
    whole += chunked(body, range(0, len(body), 99_991))

    async def serve(line: Line) -> None:
        await line.request()
        line.send(whole)
        await line.closed()

    async with staged(serve) as stage:
        path, asked = ROUTES[route]
        reader = asyncio.StreamReader(limit=1 << 14)  # little is read ahead of who asks
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: protocol, "127.0.0.1", stage.rig.port
        )
        transport.write(request(path, asked, lane=lane))
        got, turns = bytearray(), 0
        while not got.endswith(b"\r\n0\r\n\r\n") and not (got and route == "chat" and body in got):
            got += await reader.read(1 << 16)
            turns += 1
            if turns % 8 == 0:
                await asyncio.sleep(0.5)
                assert stage.rig.calls() == [] or len(got) > len(body) // 2
        transport.close()
        whole_reader = asyncio.StreamReader(limit=1 << 26)
        whole_reader.feed_data(bytes(got))
        reply = await Wire(whole_reader, None).reply("POST")  # type: ignore[arg-type]
        assert (reply.status, reply.ended, reply.body) == (200, "clean", body)
        (told,) = await stage.rig.ended()
        assert (told.outcome, told.bytes_out) == ("ok", len(body))
        await stage.left()
        stage.nothing_left(1)
        assert len(stage.tasks) == (0 if lane == "direct" else 1)
