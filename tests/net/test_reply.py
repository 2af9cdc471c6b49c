"""What a client hears while its answer does not come, and how it is told what comes late."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from balancer.core.dispatch import Answer
from balancer.core.domain import Framing
from balancer.core.errors import CutStream, QueueTimeout
from balancer.net.reply import Reply
from balancer.net.server import Exchange
from tests.e2e.stage import now, virtual
from tests.net.parts import a_call
from tests.sim.wire import Reply as Got
from tests.sim.wire import Wire

CHAT, V1, CLAUDE = "/api/chat", "/v1/chat/completions", "/v1/messages"
BEAT = (
    b'{"model":"m","created_at":"STAMP","message":{"role":"assistant","content":""},"done":false}\n'
)
COMMENT = b": heartbeat\n\n"
JSON = "application/json"
NATIVE = {"Content-Type": "application/x-ndjson"}
Handle = Callable[[Reply, Exchange], Awaitable[web.StreamResponse]]


async def told(
    handle: Handle, path: str = CHAT, *, streaming: bool = True, **times: float | None
) -> tuple[Got, Exchange]:
    """What a client gets of a reply that *handle* makes, and what would be logged."""
    told: list[Exchange] = []
    wrong: list[BaseException] = []

    async def serve(request: web.BaseRequest) -> web.StreamResponse:
        call = a_call(path, streaming=streaming)
        exchange = Exchange(request, "r1", path, now(), call.route.dialect)
        told.append(exchange)
        limits: Any = {"after_s": 20.0, "every_s": 15.0, **times}
        reply = Reply(exchange, call, now, lambda: "STAMP", **limits)
        try:
            return await handle(reply, exchange)
        except BaseException as error:
            wrong.append(error)
            raise
        finally:
            reply.close()

    server = web.Server(serve)
    sock = socket.create_server(("127.0.0.1", 0))
    listener = await asyncio.get_running_loop().create_server(server, sock=sock)
    wire = await Wire.connect(sock.getsockname()[1])
    wire.writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    got = await wire.reply()
    wire.close()
    listener.close()
    await server.shutdown(0.1)
    for error in wrong:
        raise error
    return got, told[0]


def late(seconds: float, outcome: object = "here") -> asyncio.Future[object]:
    """Something that comes after a while."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def come() -> None:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    loop.call_later(seconds, come)
    return future


@pytest.mark.parametrize(
    ("seconds", "count"), [(0.0, 0), (19.9, 0), (20.1, 1), (34.9, 1), (35.1, 2), (100.0, 6)]
)
@virtual
async def test_silence_is_counted_from_the_last_word(seconds: float, count: int) -> None:
    """One after `after_s`, then one each `every_s`; what is waited for is handed over."""

    async def handle(reply: Reply, _: Exchange) -> web.StreamResponse:
        assert await reply.until(late(seconds)) == "here"
        assert reply.begun == (count > 0)
        await reply.begin(NATIVE)
        return await reply.end(b"last\n")

    got, exchange = await told(handle)
    assert got.body == BEAT * count + b"last\n"
    assert (got.status, exchange.status, exchange.bytes_out) == (200, 200, len(got.body))


@virtual
async def test_what_is_waited_for_may_fail() -> None:
    """Its error comes through, and can be told behind the heartbeats."""

    async def handle(reply: Reply, _: Exchange) -> web.StreamResponse:
        try:
            await reply.until(late(40.0, QueueTimeout("full")))
        except QueueTimeout as error:
            return await reply.refuse(error)
        raise AssertionError

    got, exchange = await told(handle)
    assert got.body == BEAT * 2 + b'{"error":"full [req r1]"}\n'
    assert (exchange.outcome, exchange.error) == ("shed", "full")


@pytest.mark.parametrize(
    ("path", "streaming", "times"),
    [
        (CHAT, False, {}),
        (V1, False, {}),
        ("/api/embed", True, {}),
        (CHAT, True, {"after_s": None}),
    ],
)
@virtual
async def test_who_gets_none(path: str, streaming: bool, times: dict[str, None]) -> None:
    """Answers that are one document, and where it is not wanted."""

    async def handle(reply: Reply, _: Exchange) -> web.StreamResponse:
        await reply.until(late(500.0))
        assert not reply.begun
        return await reply.answer(Answer(201, JSON, b"{}"), {"Content-Type": JSON})

    got, exchange = await told(handle, path, streaming=streaming, **times)
    assert (got.status, got.body, exchange.status) == (201, b"{}", 201)


NATIVELY = b'{"type":"error","error":{"type":"api_error","message":"native"}}'
ERROR = b'{"error":{"message":"no","type":"x","param":null,"code":null}}'


@pytest.mark.parametrize(
    ("path", "answer", "behind"),
    [
        (CHAT, Answer(404, JSON, b'{"error":"no","more":1}'), b'{"error":"no","more":1}\n'),
        (CHAT, Answer(404, "text/plain", b"no\nthing"), b'{"error":"no thing"}\n'),
        (CHAT, Answer(500, JSON, b""), b'{"error":"HTTP 500"}\n'),
        (CHAT, Answer(200, JSON, b'{\n"done":true}'), b'{ "done":true}\n'),
        (CHAT, Answer(200, NATIVE["Content-Type"], b'{"a":1}\n{"b":2}'), b'{"a":1}\n{"b":2}\n'),
        (V1, Answer(422, JSON, ERROR + b"\n"), b"data: " + ERROR + b"\n\n"),
        (V1, Answer(200, "text/event-stream", b"data: 1\n\n"), b"data: 1\n\n"),
        (
            CLAUDE,
            Answer(529, JSON, b'{"error":"native"}'),
            b"event: error\ndata: " + NATIVELY + b"\n\n",
        ),
    ],
)
@virtual
async def test_a_whole_answer_behind_heartbeats(path: str, answer: Answer, behind: bytes) -> None:
    """It is told as the record that fits."""

    async def handle(reply: Reply, _: Exchange) -> web.StreamResponse:
        await reply.until(late(20.1))
        return await reply.answer(answer, {"Content-Type": answer.content_type})

    got, _ = await told(handle, path)
    assert got.body.endswith(b"\n" + behind)
    assert got.body.count(b"\n" + behind) == 1


@pytest.mark.parametrize("kind", [Framing.JSON, Framing.NDJSON])
@virtual
async def test_what_does_not_fit_is_not_passed_on(kind: Framing) -> None:
    """Before the head is out anything fits."""

    async def handle(reply: Reply, _: Exchange) -> web.StreamResponse:
        reply.check(kind)
        await reply.until(late(20.1))
        reply.check(Framing.SSE)
        with pytest.raises(CutStream, match="one document"):
            reply.check(kind)
        return await reply.end()

    got, _ = await told(handle, V1)
    assert got.body == COMMENT


@virtual
async def test_the_timer_of_a_stream_follows_what_is_written() -> None:
    """It rouses when there was nothing for `every_s`, again if nothing comes of it, then never."""
    roused: list[float] = []

    async def handle(reply: Reply, _: Exchange) -> web.StreamResponse:
        began = now()
        await reply.begin(NATIVE)
        reply.rousing(lambda: roused.append(round(now() - began, 1)))
        await asyncio.sleep(10.0)
        await reply.write(b"one\n")  # puts it off to 25
        await asyncio.sleep(16.0)
        await reply.beat()  # at 26: the next at 41
        await asyncio.sleep(40.0)  # nothing is written: also at 56
        await reply.end()
        await asyncio.sleep(100.0)
        return await reply.end()

    got, _ = await told(handle)
    assert got.body == b"one\n" + BEAT
    assert roused == [25.0, 41.0, 56.0]


@virtual
async def test_a_stream_of_another_kind_has_no_heartbeats() -> None:
    """What a backend sends may be framed as nobody expects: one of ours would break it."""
    roused: list[float] = []

    async def handle(reply: Reply, _: Exchange) -> web.StreamResponse:
        await reply.begin({"Content-Type": "text/event-stream"})
        reply.rousing(lambda: roused.append(now()))
        await asyncio.sleep(100.0)
        await reply.beat()
        return await reply.end()

    got, _ = await told(handle)
    assert (got.body, roused) == (b"", [])


@virtual
async def test_a_heartbeat_that_is_not_due_is_none() -> None:
    """`beat` may be called whenever no record is half written."""

    async def handle(reply: Reply, _: Exchange) -> web.StreamResponse:
        await reply.beat()
        assert not reply.begun
        await reply.begin(NATIVE)
        await reply.beat()
        return await reply.end()

    got, _ = await told(handle)
    assert got.body == b""


@virtual
async def test_an_error_in_one_document_breaks_it_off() -> None:
    """No record fits there, and a good end would be a lie."""

    async def handle(reply: Reply, _: Exchange) -> web.StreamResponse:
        await reply.begin({"Content-Type": JSON})
        await reply.write(b'{"half')
        return await reply.refuse(CutStream("gone"))

    got, exchange = await told(handle, streaming=False)
    assert got.ended in ("cut", "reset", "no response")
    assert exchange.outcome == "upstream_error"
