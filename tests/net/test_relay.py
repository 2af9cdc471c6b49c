"""Committed answers: how each of their ends is told, and what it means for backend and log."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from balancer.net.relay import Relay
from balancer.sim.host import SimModel
from tests.conftest import Start
from tests.e2e.stage import CHAT, Asking, models, now, records, verdicts, virtual
from tests.rig import running

pytestmark = pytest.mark.usefixtures("quiet")
NDJSON = [("Content-Type", "application/x-ndjson")]
LINE = b'{"model":"m","message":{"role":"assistant","content":"x"},"done":false}\n'
DONE = b'{"model":"m","message":{"role":"assistant","content":""},"done":true,"eval_count":1}\n'
V1 = ("/v1/chat/completions", CHAT | {"stream": True})


@pytest.mark.parametrize(
    ("path", "body", "headers", "last"),
    [
        ("/api/chat", CHAT, NDJSON, [LINE, DONE]),
        (*V1, [("Content-Type", "text/event-stream")], [b'data: {"a":1}\n\n', b"data: [DONE]\n\n"]),
    ],
)
@virtual
async def test_leaving_after_the_last_record_is_no_leaving(
    path: str, body: Any, headers: Any, last: list[bytes]
) -> None:
    """Some clients hang up as soon as they have all: that is a success, of the backend too."""
    async with running(1, models=models()) as rig:
        await rig.warm("a", "m")
        late: tuple[float, bytes] = (30.0, b"")  # the end of the body
        rig.fleet["a"].script(path, headers=headers, segments=[*last, late], framing="chunked")
        asking = await Asking.of(rig, path, body)
        await asking.head()
        while not asking.reply.body.endswith(last[-1]):
            await asking.record()
        asking.hang_up()
        (told,) = await rig.ended()
        assert (told.outcome, told.status, told.phase) == ("ok", 200, "")
        assert verdicts(rig) == [("a", "ok")]


@virtual
async def test_a_client_that_stops_reading_is_given_up() -> None:
    """After a minute without progress its slot is needed by others."""
    chunks = (b'{"message":{"content":"' + b"x" * 1_000_000 + b'"},"done":false}\n',) * 60
    endless = SimModel("m", chunks=chunks, decode_tps=1e6)
    async with running(1, models=[endless]) as rig:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop, began = asyncio.get_running_loop(), now()
            await loop.sock_connect(sock, ("127.0.0.1", rig.port))
            body = json.dumps(CHAT).encode()
            length = f"Content-Length: {len(body)}\r\n\r\n".encode()
            head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n"
            await loop.sock_sendall(sock, head + length + body)
            (told,) = await rig.ended(limit_s=120.0)
        assert now() - began == pytest.approx(60.0, abs=5.0)
        assert (told.outcome, told.phase) == ("client_abort", "streaming")
        assert verdicts(rig) == [("a", "gone")]
        assert told.bytes_out < 40_000_000, "the backend was held back"
        await asyncio.sleep(1)
        assert rig.forwarded()[-1].ending == "client-gone"


@pytest.mark.parametrize(("path", "body"), [("/api/chat", CHAT), V1])
@virtual
async def test_silence_in_a_stream_ends_it_with_an_error(path: str, body: Any) -> None:
    """After `timeouts.idle` the client is told, and the host need not go on."""
    async with running(1, models=models(0.0), config={"timeouts.idle": "14s"}) as rig:
        rig.fleet["a"].faults.stall(2)
        began = now()
        reply = await rig.ask("POST", path, body)
        assert 14.0 < now() - began < 17.0
        assert (reply.status, reply.ended) == (200, "clean")
        told = records(reply)
        assert len(told) == 3
        assert "stopped in the middle of the answer" in str(told[-1]["error"])
        assert verdicts(rig) == [("a", "stalled")]
        await asyncio.sleep(0.5)
        assert rig.forwarded()[-1].ending == "client-gone"


@pytest.mark.parametrize(("path", "body"), [("/api/chat", CHAT), V1])
@virtual
async def test_a_time_limit_in_a_stream_ends_it_with_an_error(path: str, body: Any) -> None:
    """What came is kept, and the end is told as what it is."""
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        began = now()
        reply = await rig.ask("POST", path, body, X_Request_Timeout="1.5")
        assert now() - began == pytest.approx(1.5, abs=0.1)
        assert (reply.status, reply.ended) == (200, "clean")
        told = records(reply)
        assert len(told) > 10
        assert "time limit" in str(told[-1]["error"])
        assert "[DONE]" not in told
        assert rig.balancer.pool.running == 0


@pytest.mark.parametrize("fault", ["cut", "reset"])
async def test_a_document_cut_after_its_beginning_was_sent_is_cut_for_the_client(
    start: Start, fault: str
) -> None:
    """No record of ours fits into half a document, so the body must not end well."""
    rig = await start(1, models=models(0.0))
    await rig.warm("a", "e")
    ending: Any = fault
    rig.fleet["a"].script(
        "/api/embed",
        segments=[b'{"embeddings":[[', *[b"0.125," * 200_000] * 9, (0.05, b"0]")],
        framing="chunked",
        ending=ending,
    )
    reply = await rig.ask("POST", "/api/embed", {"model": "e", "input": "x"})
    assert reply.status == 200
    assert reply.ended in ("cut", "reset")
    assert [told.outcome for told in await rig.ended()] == ["upstream_error"]


@pytest.mark.parametrize(
    ("path", "body", "headers", "record", "last"),
    [
        ("/api/chat", CHAT, NDJSON, LINE, DONE),
        (*V1, [("Content-Type", "text/event-stream")], b'data: {"a":1}\n\n', b"data: [DONE]\n\n"),
    ],
)
@virtual
async def test_chunks_that_pass_as_they_are_count_as_all_others(
    path: str, body: Any, headers: Any, record: bytes, last: bytes
) -> None:
    """Whether a record had a chunk of its own changes nothing of what is told."""
    async with running(1, models=models()) as rig:
        await rig.warm("a", "m")
        segments: list[Any] = [record, *[(0.5, record)] * 6, (0.5, record * 2), (0.5, record)]
        segments += [(0.5, last)]
        rig.fleet["a"].script(path, headers=headers, segments=segments, framing="chunked")
        passed = []
        write = Relay.chunk

        def chunk(self: Relay, data: bytes, lines: list[bytes]) -> None:
            passed.append(data)
            write(self, data, lines)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Relay, "chunk", chunk)
            reply = await rig.ask("POST", path, body)
        assert len(passed) >= 6
        assert (reply.body, reply.ended) == (record * 10 + last, "clean")
        (told,) = await rig.ended()
        assert (told.outcome, told.bytes_out) == ("ok", len(reply.body))
        assert verdicts(rig) == [("a", "ok")]


@pytest.mark.parametrize(
    ("path", "body", "headers", "record", "last"),
    [
        ("/api/chat", CHAT, NDJSON, LINE, DONE),
        (*V1, [("Content-Type", "text/event-stream")], b'data: {"a":1}\n\n', b"data: [DONE]\n\n"),
    ],
)
@virtual
async def test_each_record_counts_however_they_come(
    path: str, body: Any, headers: Any, record: bytes, last: bytes
) -> None:
    """Several in one read, or one in two: whoever watches the pace of a backend sees them all."""
    async with running(1, models=models()) as rig:
        await rig.warm("a", "m")
        half = len(record) // 2
        later = [(1.0, record * 5), (1.0, record[:half]), (1.0, record[half:]), (1.0, last)]
        segments: list[Any] = [record, *later]
        rig.fleet["a"].script(path, headers=headers, segments=segments, framing="chunked")
        asking = await Asking.of(rig, path, body)
        await asking.head()
        (run,) = rig.balancer.pool.runs()
        seen = []
        for _ in segments:
            await asyncio.sleep(0.9)
            seen.append(run.records)
            await asyncio.sleep(0.1)
        assert seen == [1, 6, 6, 7, 8]
        asking.hang_up()
        await rig.ended()
