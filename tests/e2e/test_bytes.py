"""What a host writes is what the client reads, byte for byte, and each record as it comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

import pytest

from balancer.sim.host import SimModel
from balancer.sim.loop import run
from tests.conftest import Start
from tests.e2e.stage import LANES, in_each_lane
from tests.rig import Rig, running
from tests.sim.wire import Reply

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
GENERATE: dict[str, Any] = {"model": "m", "prompt": "hi"}
RESPONSES: dict[str, Any] = {"model": "m", "input": "hi"}
EMBED: dict[str, Any] = {"model": "e", "input": ["a", "b"]}
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": ("/api/generate", GENERATE | {"stream": False}),
    "generate, streamed": ("/api/generate", GENERATE),
    "chat": ("/api/chat", CHAT | {"stream": False}),
    "chat, streamed": ("/api/chat", CHAT),
    "embed": ("/api/embed", EMBED),
    "embeddings": ("/api/embeddings", {"model": "e", "prompt": "a"}),
    "v1 chat": ("/v1/chat/completions", CHAT),
    "v1 chat, streamed": ("/v1/chat/completions", CHAT | {"stream": True}),
    "v1 chat, streamed with usage": (
        "/v1/chat/completions",
        CHAT | {"stream": True, "stream_options": {"include_usage": True}},
    ),
    "v1 completions": ("/v1/completions", GENERATE),
    "v1 completions, streamed": ("/v1/completions", GENERATE | {"stream": True}),
    "v1 embeddings": ("/v1/embeddings", EMBED),
    "v1 responses": ("/v1/responses", RESPONSES),
    "v1 responses, streamed": ("/v1/responses", RESPONSES | {"stream": True}),
    "v1 messages": ("/v1/messages", CHAT | {"max_tokens": 100}),
    "v1 messages, streamed": ("/v1/messages", CHAT | {"max_tokens": 100, "stream": True}),
}
WORDS = ("☃", " é", " 漢字", ' "quoted"\n', " 🎈", " <&>\u2028", "\u0085", " {", "\\n", " end")
NDJSON = [("Content-Type", "application/x-ndjson")]
SSE = [("Content-Type", "text/event-stream")]
JSON = [("Content-Type", "application/json; charset=utf-8")]


def by_byte(chunk: bytes) -> Iterable[bytes]:
    """One byte at a time."""
    return (chunk[at : at + 1] for at in range(len(chunk)))


def inside_characters(chunk: bytes) -> Iterable[bytes]:
    """A cut before the last byte of each character that has several."""
    cuts = [at for at, byte in enumerate(chunk) if 0x80 <= byte < 0xC0]
    return (chunk[a:b] for a, b in zip([0, *cuts], [*cuts, len(chunk)], strict=True))


def in_halves(chunk: bytes) -> Iterable[bytes]:
    """One cut in the middle."""
    return (chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :])


SPLITS: dict[str, Callable[[bytes], Iterable[bytes]] | None] = {
    "as it is": None,
    "by byte": by_byte,
    "inside characters": inside_characters,
    "in halves": in_halves,
}


def models(**more: Any) -> list[SimModel]:
    """One that speaks in odd characters, one that embeds."""
    quick = partial(SimModel, prompt_tps=1e6, decode_tps=1e5)
    return [quick("m", words=WORDS, **more), quick("e", capabilities=("embedding",))]


def assert_same(rig: Rig, reply: Reply, *, ended: str = "clean") -> bytes:
    """The host's last answer is the client's; returns it."""
    seen = rig.forwarded()[-1]
    assert (reply.status, reply.ended) == (seen.status, ended)
    assert reply.body == bytes(seen.written)
    return reply.body


@pytest.mark.parametrize("route", ROUTES)
async def test_bytes_are_the_hosts(start: Start, route: str) -> None:
    """However the network cuts an answer, the client reads the same bytes, in whole records."""
    rig = await start(1, models=models())
    path, body = ROUTES[route]
    for (name, split), headers in product(SPLITS.items(), LANES.values()):
        rig.fleet["a"].segmenter = split
        reply = await rig.ask("POST", path, body, **headers)
        answer = assert_same(rig, reply)
        assert answer, name
        if reply.framing == "chunked":
            record_end = b"\n\n" if "event-stream" in (reply.get("content-type") or "") else b"\n"
            assert all(segment.endswith(record_end) for segment in reply.segments), name
    assert "streamed" not in route or reply.framing == "chunked"


@pytest.mark.parametrize("split", [None, in_halves])
async def test_a_last_record_of_megabytes(start: Start, split: Any) -> None:
    """The `context` of generate makes a last line of 5 MB, which passes whole and is understood."""
    rig = await start(1, models=models(context_ints=800_000))
    rig.fleet["a"].segmenter = split
    answer = assert_same(rig, await rig.ask("POST", "/api/generate", GENERATE))
    last = answer.splitlines()[-1]
    assert len(last) > 5_000_000
    (told,) = await rig.ended()
    assert (told.outcome, told.usage.tokens_out) == ("ok", json.loads(last)["eval_count"])


LONG = "a ☃ " * 1_000_000
BIG: dict[str, tuple[str, Any, Any, list[bytes]]] = {
    "chat": (
        "/api/chat",
        CHAT,
        NDJSON,
        [
            b'{"model":"m","message":{"role":"assistant","content":"x"},"done":false}\n',
            json.dumps({"model": "m", "message": {"content": LONG}, "done": True}).encode() + b"\n",
        ],
    ),
    "v1 chat": (
        "/v1/chat/completions",
        CHAT | {"stream": True},
        SSE,
        [
            b'data: {"model":"m","choices":[{"index":0,"delta":{"content":"x"}}]}\n\n',
            b"data: "
            + json.dumps({"model": "m", "choices": [{"delta": {"content": LONG}}]}).encode()
            + b"\n\ndata: [DONE]\n\n",
        ],
    ),
    "embed": (
        "/api/embed",
        EMBED,
        JSON,
        [json.dumps({"model": "e", "embeddings": [[0.125] * 800_000]}).encode()],
    ),
    "more than is held": (
        "/api/embed",
        EMBED,
        JSON,
        [json.dumps({"model": "e", "embeddings": [[0.125] * 1_400_000]}).encode()],
    ),
}


@in_each_lane
@pytest.mark.parametrize("route", BIG)
async def test_megabytes_in_odd_pieces(start: Start, route: str, headers: dict[str, str]) -> None:
    """Records of megabytes pass in pieces that fit nothing, first bytes before the last is made."""
    path, body, kind, records = BIG[route]
    rig = await start(1, models=models())
    await rig.warm("a", body["model"])
    text = b"".join(records)
    assert len(text) > 5_000_000
    pieces = [text[at : at + 65_521] for at in range(0, len(text), 65_521)]
    framing: Any = "length" if kind is JSON else "chunked"
    rig.fleet["a"].script(path, headers=kind, segments=pieces, framing=framing)
    assert assert_same(rig, await rig.ask("POST", path, body, **headers)) == text
    assert [told.outcome for told in await rig.ended()] == ["ok"]


@pytest.mark.parametrize(
    ("path", "body", "headers", "records"),
    [
        (
            "/api/chat",
            CHAT,
            NDJSON,
            [
                b'{"message":{"content":"a"},"done":false}\n',
                b'{"message":{"content":"b"},"done":false}\r\n',
                b'{"done":true}\n',
            ],
        ),
        (
            "/v1/chat/completions",
            CHAT | {"stream": True},
            SSE,
            [
                b'data: {"choices":[{}]}\n\n',
                b': a comment\n\ndata: {"x":1}\n\n',
                b"data: [DONE]\n\n",
            ],
        ),
    ],
)
def test_each_record_comes_when_it_is_made(
    path: str, body: Any, headers: Any, records: list[bytes]
) -> None:
    """A record is passed on at once, not with the next one or at the end."""

    async def scenario() -> list[tuple[float, bytes]]:
        async with running(1, models=models()) as rig:
            await rig.warm("a", "m")
            segments = [(10.0, record) for record in records]
            rig.fleet["a"].script(path, headers=headers, segments=segments, framing="chunked")
            loop, wire = asyncio.get_running_loop(), await rig.connect()
            began = loop.time()
            payload = json.dumps(body).encode()
            wire.writer.write(
                f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n\r\n"
                .encode() + payload
            )  # fmt: skip
            await wire.reader.readuntil(b"\r\n\r\n")
            came = []
            while size := int(await wire.reader.readuntil(b"\r\n"), 16):
                data = await wire.reader.readexactly(size + 2)
                came.append((round(loop.time() - began, 1), data[:-2]))
            await wire.reader.readexactly(2)
            wire.close()
            return came

    expected = [(10.0 * (n + 1), record) for n, record in enumerate(records)]
    assert run(scenario()) == expected


async def test_a_request_reaches_the_host_as_it_was_sent(start: Start) -> None:
    """Spaces, escapes, unknown fields and the query go up untouched."""
    rig = await start(1, models=models())
    body = b'\n{ "model" :"m", "prompt":"\\u2603 \xe2\x98\x83","x":[1e3, 1.0],"stream":false }  '
    reply = await rig.ask("POST", "/api/generate?a=%2F&b=1+2", body)
    assert reply.status == 200
    (seen,) = rig.forwarded()
    assert seen.body == body
    assert dict(seen.headers)["Content-Length"] == str(len(body))


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (400, JSON, b'{"error":"the host\'s own \xe2\x98\x83 text"}'),
        (422, [("Content-Type", "text/plain")], b"not even JSON\n"),
        (413, JSON, b'{"error":' + b'"x' * 20_000 + b'"}'),
    ],
)
async def test_a_hosts_refusal_passes_as_it_is(
    start: Start, status: int, headers: Any, body: bytes
) -> None:
    """Status, content type and body of an error that is the caller's are the host's."""
    rig = await start(2, models=models())
    for host in rig.fleet:
        host.script("/api/chat", status=status, headers=headers, segments=[body])
    reply = await rig.ask("POST", "/api/chat", CHAT)
    assert (reply.status, reply.get("content-type")) == (status, headers[0][1])
    assert_same(rig, reply)
    assert len(rig.forwarded()) == 1
