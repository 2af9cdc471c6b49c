"""Whatever comes in is answered as Ollama or OpenAI would answer it, and touches no backend."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from balancer.core.domain import Dialect
from balancer.ops.log import Bridge, LogWriter, configure
from balancer.sim.loop import run
from tests.conftest import Start
from tests.rig import Rig, running
from tests.sim.wire import Reply

TEXT = "text/plain"
NATIVE = "application/json; charset=utf-8"
HOST = b"Host: localhost\r\n"
MAX_BODY = 100_000
in_module = pytest.mark.asyncio(loop_scope="module")
pytestmark = pytest.mark.usefixtures("quiet")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Rig]:
    """Three hosts for all requests that change nothing."""
    async with running(config={"server.max_body": MAX_BODY}) as rig:
        yield rig


def message(reply: Reply) -> str:
    """The text of an error, in whichever of the three shapes."""
    told = json.loads(reply.body)["error"]
    return str(told if isinstance(told, str) else told["message"])


def shape(reply: Reply) -> Dialect:
    """Whose shape of an error it is."""
    told = json.loads(reply.body)
    if isinstance(told["error"], str):
        return Dialect.OLLAMA
    return Dialect.ANTHROPIC if told.get("type") == "error" else Dialect.OPENAI


# -- what is no HTTP, or could be read in two ways ------------------------------------------------

POST = b"POST /api/chat HTTP/1.1\r\n" + HOST
GET = b"GET / HTTP/1.1\r\n" + HOST
CHUNKS = b"Transfer-Encoding: chunked\r\n\r\n"
MALFORMED = {
    "no request line": b"GARBAGE secret\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00secret\r\n\r\n",
    "HTTP/9.9": b"GET /secret HTTP/9.9\r\n" + HOST + b"\r\n",
    "a method in lower case": b"get /secret HTTP/1.1\r\n" + HOST + b"\r\n",
    "a method nobody knows": b"BREW /secret HTTP/1.1\r\n" + HOST + b"\r\n",
    "a header without colon": b"GET / HTTP/1.1\r\nHost localhost secret\r\n\r\n",
    "a blank before the colon": b"GET / HTTP/1.1\r\nHost : secret\r\n\r\n",
    "NUL in a value": GET + b"X: secret\x00\r\n\r\n",
    "bare line feeds": b"GET /secret HTTP/1.1\nHost: localhost\n\n",
    "no Host": b"GET /secret HTTP/1.1\r\n\r\n",
    "two Hosts": GET + b"Host: secret\r\n\r\n",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a negative length": POST + b"Content-Length: -1\r\n\r\n{}",
    "a length of 23 digits": POST + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
    "length and chunks": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n",
    "identity": POST + b"Transfer-Encoding: identity\r\n\r\n",
    "a chunk size of letters": POST
    + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nsecret\r\n0\r\n\r\n",
    "more headers than 128": GET + b"".join(b"X-%d: secret\r\n" % n for n in range(300)) + b"\r\n",
    "the same length twice": POST + b"Content-Length: 2\r\n" * 2 + b"\r\n{}",
    "a list of lengths": POST + b"Content-Length: 2, 2\r\n\r\n{}",
    "a length with a sign": POST + b"Content-Length: +2\r\n\r\n{}",
    "a hexadecimal length": POST + b"Content-Length: 0x2\r\n\r\n{}",
    "chunks and length": POST + CHUNKS[:-2] + b"Content-Length: 5\r\n\r\n0\r\n\r\n",
    "almost chunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked and a comma": POST + b"Transfer-Encoding: chunked,\r\n\r\n0\r\n\r\n",
    "a header on two lines": GET + b"X: secret\r\n secret\r\n\r\n",
    "an encoding on two lines": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "a bare line feed in the head": GET + b"X: secret\nY: secret\r\n\r\n",
    "a bare carriage return": GET + b"X: secret\rY: secret\r\n\r\n",
    "the same Host twice": GET + HOST + b"\r\n",
    "a blank in a name": GET + b"X secret: x\r\n\r\n",
    "a header without a name": GET + b": secret\r\n\r\n",
    "an escape in a value": GET + b"User-Agent: \x1b[31msecret\r\n\r\n",
    "NUL in the path": b"GET /secret\x00 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a blank in the path": b"GET /secret secret HTTP/1.1\r\n" + HOST + b"\r\n",
    "tabs in the request line": b"GET\t/secret\tHTTP/1.1\r\n" + HOST + b"\r\n",
    "HTTP/1.2": b"GET /secret HTTP/1.2\r\n" + HOST + b"\r\n",
    "a preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a chunk of negative size": POST + CHUNKS + b"-1\r\nx",
    "a chunk of 18 digits": POST + CHUNKS + b"f" * 18 + b"\r\nx",
    "a line feed in an extension": POST + CHUNKS + b"2;a\n\r\n{}\r\n0\r\n\r\n",
    "a chunk's size and a bare line feed": POST + CHUNKS + b"2\n{}\r\n0\r\n\r\n",
    "more than the chunk has": POST + CHUNKS + b"2\r\n{}secret\r\n0\r\n\r\n",
    "a length as trailer": POST + CHUNKS + b"2\r\n{}\r\n0\r\nContent-Length: 5\r\n\r\n",
    "a flood of trailers": POST + CHUNKS + b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
    "bytes beyond ASCII in the path": b"GET /\xffsecret HTTP/1.1\r\n" + HOST + b"\r\n",
    "bytes beyond ASCII in the query": b"GET /?\xc3\xa9=secret HTTP/1.1\r\n" + HOST + b"\r\n",
}


@in_module
@pytest.mark.parametrize("name", MALFORMED)
async def test_what_cannot_be_parsed_is_refused(shared: Rig, name: str) -> None:
    """A fixed text without what was sent, and the connection is closed."""
    before = len(shared.calls())
    reply, rest = await last_reply(shared, MALFORMED[name])
    assert (reply.status, reply.body) == (400, b"400 Bad Request")
    assert reply.get("content-type") == "text/plain; charset=utf-8"
    assert rest == b""
    (told,) = shared.calls()[before:]
    assert (told.endpoint, told.status, told.outcome) == ("malformed", 400, "rejected")
    assert told.client == "127.0.0.1"
    assert "secret" not in repr(told)


@in_module
@pytest.mark.parametrize("where", [b"GET /%s HTTP/1.1\r\n" + HOST, GET + b"X: %s\r\n"])
async def test_too_long_a_line_is_refused(shared: Rig, where: bytes) -> None:
    """70 kB in the request line or in a header is a 431."""
    reply, rest = await last_reply(shared, where % (b"a" * 70_000) + b"\r\n")
    assert (reply.status, reply.body) == (431, b"431 Request Header Fields Too Large")
    assert rest == b""


@in_module
@pytest.mark.parametrize("lines", [1, 100])
async def test_too_long_a_head_is_refused_before_all_of_it_has_come(
    shared: Rig, lines: int
) -> None:
    """No line is too long, nor are they too many; 431 although the head has not ended."""
    before, wire = len(shared.calls()), await shared.connect()
    for number in range(5):  # 300 kB; the limit of a whole head is four times that of a line
        for part in range(lines):
            wire.writer.write(b"" if number or part else GET)
            wire.writer.write(b"X-%d-%d: %s\r\n" % (number, part, b"a" * (60_000 // lines)))
        await wire.writer.drain()
        await asyncio.sleep(0)
    reply = await wire.reply()
    assert (reply.status, reply.body) in (
        (431, b"431 Request Header Fields Too Large"),
        (400, b"400 Bad Request"),
        (0, b""),  # the rest of what was sent had not been read: a reset may outrun the answer
    )
    wire.close()
    await shared.ended(before + 1)
    told = shared.calls()[before:]
    assert [(each.endpoint, each.status) for each in told] == [
        ("malformed", 431 if lines == 1 else 400)
    ]


UNCLEAR = {
    "gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunks on 1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "HTTP/2.0": b"GET / HTTP/2.0\r\n" + HOST + b"\r\n",
    "HTTP/0.9": b"GET / HTTP/0.9\r\n" + HOST + b"\r\n",
    "a websocket": GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "h2c and a websocket": GET
    + b"Connection: Upgrade\r\nUpgrade: h2c\r\nUpgrade: websocket\r\n\r\n",
    "a list of upgrades": GET + b"Connection: Upgrade\r\nUpgrade: h2c, websocket\r\n\r\n",
    "CONNECT": b"CONNECT evil.example:443 HTTP/1.1\r\n" + HOST + b"\r\n",
    "OPTIONS *": b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",
    "another authority": b"GET http://evil.example/api/tags HTTP/1.1\r\n" + HOST + b"\r\n",
    "a name before the authority": b"GET http://localhost@evil/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "another scheme": b"GET ftp://localhost/api/tags HTTP/1.1\r\n" + HOST + b"\r\n",
    "a fragment": b"GET /api/tags#x HTTP/1.1\r\n" + HOST + b"\r\n",
    "a slash too much": b"GET //api/tags HTTP/1.1\r\n" + HOST + b"\r\n",
    "an authority in the path": b"GET //evil.example/api/tags HTTP/1.1\r\n" + HOST + b"\r\n",
    "two slashes at the end": b"GET /api/tags// HTTP/1.1\r\n" + HOST + b"\r\n",
    "dots": b"POST /api/x/../chat HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n\r\n",
    "dots at the end": b"GET /api/tags/.. HTTP/1.1\r\n" + HOST + b"\r\n",
    "escaped dots": b"GET /api/%2e%2E/api/tags HTTP/1.1\r\n" + HOST + b"\r\n",
    "one dot": b"GET /api/./tags HTTP/1.1\r\n" + HOST + b"\r\n",
    "an escaped slash": b"GET /api%2ftags HTTP/1.1\r\n" + HOST + b"\r\n",
    "escaped dots after a model": b"GET /v1/models/%2e%2e/x HTTP/1.1\r\n" + HOST + b"\r\n",
    "dots after our authority": b"GET http://localhost/x/../y HTTP/1.1\r\n" + HOST + b"\r\n",
    "an authority without Host": b"GET http://evil.example/ HTTP/1.0\r\n\r\n",
    "an escaped NUL": b"GET /api/%00tags HTTP/1.1\r\n" + HOST + b"\r\n",
    "escaped line feeds": b"GET /v1/models/a%0d%0aX:%20y HTTP/1.1\r\n" + HOST + b"\r\n",
    "an escaped escape": b"GET /api/%1b[31mtags HTTP/1.1\r\n" + HOST + b"\r\n",
    "an escaped DEL": b"GET /api/%7ftags HTTP/1.1\r\n" + HOST + b"\r\n",
    "escapes that are no UTF-8": b"GET /api/%ff HTTP/1.1\r\n" + HOST + b"\r\n",
}
SERVED = b'{"model":"llama3.2","prompt":"x","stream":false}'
GOOD = POST.replace(b"chat", b"generate") + b"Content-Length: %d\r\n\r\n" % len(SERVED) + SERVED


@in_module
@pytest.mark.parametrize("lane", [b"", b"X-Request-Timeout: 60\r\n"], ids=["direct", "a task"])
@pytest.mark.parametrize("name", [*MALFORMED, *UNCLEAR])
async def test_what_comes_behind_a_good_call_is_refused_as_ever(
    shared: Rig, name: str, lane: bytes
) -> None:
    """While it runs: the call is answered in full, then the refusal comes, and the end."""
    asked, raw = len(shared.forwarded()), {**MALFORMED, **UNCLEAR}[name]
    wire = await shared.connect()
    wire.writer.write(GOOD.replace(HOST, HOST + lane))
    async with asyncio.timeout(5):
        while not shared.balancer.front.running:
            await asyncio.sleep(0)
    wire.writer.write(raw)
    good = await wire.reply("POST")
    assert (good.status, good.ended, json.loads(good.body)["done"]) == (200, "clean", True)
    refused = await wire.reply(raw.partition(b" ")[0].decode("latin-1"))
    async with asyncio.timeout(5):
        assert await wire.reader.read() == b""
    wire.close()
    assert refused.status == 400
    assert len(shared.forwarded()) == asked + 1


@in_module
@pytest.mark.parametrize("name", MALFORMED)
async def test_what_comes_in_one_read_with_a_good_call_is_refused_as_ever(
    shared: Rig, name: str
) -> None:
    """The parser tells of its error only, so the call is not begun; nothing is taken for it."""
    asked, before, wire = len(shared.forwarded()), len(shared.calls()), await shared.connect()
    wire.writer.write(GOOD + MALFORMED[name])
    refused = await wire.reply("POST")
    async with asyncio.timeout(5):
        assert await wire.reader.read() == b""
    wire.close()
    assert (refused.status, refused.body) == (400, b"400 Bad Request")
    assert len(shared.forwarded()) == asked
    assert [told.endpoint for told in shared.calls()[before:]] == ["malformed"]


BROKEN = {
    "a chunk size of letters": b"zz\r\nsecret\r\n",
    "a chunk of 18 digits": b"f" * 18 + b"\r\nsecret",
    "more than the chunk has": b"2\r\nsecret\r\n",
    "mostly extensions": b"".join(b"1;%s\r\n \r\n" % (b"e" * 4000) for _ in range(40)),
    "an endless extension": b"1;" + b"e" * 100_000,
}


@in_module
@pytest.mark.parametrize("name", BROKEN)
async def test_a_body_that_breaks_on_the_way_is_refused_at_once(shared: Rig, name: str) -> None:
    """400 when it breaks, not 408 half a minute later; nothing behind it is read."""
    before, wire = len(shared.calls()), await shared.connect()
    wire.writer.write(POST + CHUNKS + b"1\r\n{\r\n")
    while not shared.balancer.front.running:
        await asyncio.sleep(0)
    wire.writer.write(BROKEN[name])
    reply = await untouching(shared, wire.reply("POST"))
    async with asyncio.timeout(5):
        assert await wire.reader.read() == b""
    wire.close()
    assert (reply.status, reply.get("connection")) == (400, "close")
    assert "not framed" in message(reply)
    (told,) = shared.calls()[before:]
    assert (told.endpoint, told.status) == ("chat", 400)


async def test_what_frames_chunks_is_dropped(start: Start) -> None:
    """Extensions and trailers reach no host, and nothing they say is believed."""
    rig = await start(1)
    body = b'{"model":"llama3.2","prompt":"x","stream":false}'
    head = POST.replace(b"chat", b"generate") + CHUNKS
    chunks = b"".join(b"1;a=b\r\n%c\r\n" % byte for byte in body)
    reply = await rig.raw(head, chunks, b"0\r\nX-Trailer: secret\r\n\r\n")
    assert reply.status == 200
    (seen,) = rig.forwarded()
    assert seen.body == body
    assert "secret" not in repr(seen.headers)


@in_module
async def test_requests_one_behind_the_other_are_answered_in_order(shared: Rig) -> None:
    """A pipeline is served; what comes behind a malformed request is not."""
    wire = await shared.connect()
    ask = b"GET /%s HTTP/1.1\r\n" + HOST + b"\r\n"
    wire.writer.write(ask % b"api/version" + ask % b"nope" + ask % b"")
    assert [(await wire.reply()).status for _ in range(3)] == [200, 404, 200]
    wire.writer.write(b"GARBAGE\r\n\r\n" + ask % b"api/version")
    assert (await wire.reply()).status == 400
    assert await wire.reader.read() == b""
    wire.close()


@in_module
@pytest.mark.parametrize("format", ["json", "logfmt", "console"])
async def test_no_line_of_the_log_can_be_forged(shared: Rig, format: Any) -> None:  # noqa: A002
    """Line feeds and escapes in path, User-Agent, id, model and query stay inside their field."""
    lines = io.StringIO()
    log = configure(stream=lines, is_tty=False, env={}, wall=time.monotonic, format=format)
    forged = 'x\r\n{"event":"forged"}\x1b[2J\u2028\x9b31m'
    body = json.dumps({"model": forged, "prompt": forged}).encode()
    before = len(shared.calls())
    await shared.ask("POST", "/api/generate", body, X_Request_Id="a b")
    raw = b"GET /%s?%%0a HTTP/1.1\r\n" + HOST + b"User-Agent: x\xc2\x9b31m\xe2\x80\xa8y\r\n\r\n"
    for path in (b"a%0d%0aforged", b"v1/models/%E2%80%A8forged%C2%9B2J", b"%C2%85forged"):
        await shared.raw(raw % path)
    told = shared.calls()[before:]
    assert len(told) == 4
    writer = LogWriter(log)
    for event in told:
        writer(event)
        writer(replace(event, model=forged, user_agent=forged, error=forged, request_id=forged))
    text = lines.getvalue()
    assert text.count("\n") == len(text.splitlines()) == 8
    assert all(char.isprintable() or char == "\n" for char in text)


@in_module
@pytest.mark.parametrize("name", UNCLEAR)
async def test_what_could_mean_two_things_is_refused(shared: Rig, name: str) -> None:
    """400 in Ollama's shape, and the connection is closed: what follows may be anything."""
    reply, rest = await last_reply(shared, UNCLEAR[name])
    assert (reply.status, reply.get("content-type")) == (400, NATIVE)
    v1 = UNCLEAR[name].startswith(b"GET /v1/")
    assert shape(reply) is (Dialect.OPENAI if v1 else Dialect.OLLAMA)
    assert rest == b""
    assert reply.version in ("HTTP/1.1", "HTTP/1.0"), "never one of which we know nothing"
    assert reply.get("connection") == "close" or reply.version != "HTTP/1.1"


async def last_reply(rig: Rig, raw: bytes) -> tuple[Reply, bytes]:
    """The answer to a request and whatever comes after it until the connection is closed."""
    before = len(rig.inference())
    wire = await rig.connect()
    wire.writer.write(raw)
    reply = await wire.reply(raw.partition(b" ")[0].decode("latin-1"))
    async with asyncio.timeout(5):
        rest = await wire.reader.read()
    wire.close()
    assert len(rig.inference()) == before, "no host may be asked"
    return reply, rest


@in_module
async def test_other_spellings_that_mean_one_thing_are_served(shared: Rig) -> None:
    """A final slash, an escaped letter, our own authority, h2c offered, a length on GET."""
    spellings = [
        b"GET /api/version/ HTTP/1.1\r\n" + HOST,
        b"GET /api/%76ersion HTTP/1.1\r\n" + HOST,
        b"GET http://localhost/api/version?x HTTP/1.1\r\n" + HOST,
        b"GET HTTP://LOCALHOST/api/version HTTP/1.1\r\n" + HOST,
        b"GET /api/version HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
        b"GET /api/version HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n",
        b"GET /api/version HTTP/1.0\r\n",
    ]
    for raw in spellings:
        reply = await shared.raw(raw + b"\r\n")
        assert (reply.status, reply.body) == (200, b'{"version":"0.33.0"}'), raw


@in_module
async def test_a_scanner_does_not_flood_the_log(
    shared: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fifty malformed requests the log has a line or two, and no traceback."""
    lines = io.StringIO()
    log = configure(stream=lines, is_tty=False, env={}, wall=time.monotonic)
    monkeypatch.setattr(logging.getLogger(), "handlers", [Bridge(log, time.monotonic)])
    for _ in range(50):
        await shared.raw(b"GARBAGE\r\n\r\n")
    told = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert 1 <= len(told) <= 3
    assert {line["event"] for line in told} == {"malformed_request"}
    assert {line["client.address"] for line in told} == {"127.0.0.1"}
    assert "Traceback" not in lines.getvalue()


# -- routes ---------------------------------------------------------------------------------------


@in_module
@pytest.mark.parametrize(
    "path",
    ["/nope", "/api", "/api/nope", "/v1/nope", "/v1", "/api/chat/x", "/API/tags", "/metrics/x",
     "/api/tags;x", "/api/tags%20", "/favicon.ico"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_an_unknown_route_is_told_as_ollama_does(shared: Rig, method: str, path: str) -> None:
    """404 with gin's text."""
    reply = await untouching(shared, shared.ask(method, path))
    assert (reply.status, reply.get("content-type")) == (404, TEXT)
    assert reply.body == b"404 page not found"


@in_module
@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/api/chat", "POST"),
        ("PUT", "/api/generate", "POST"),
        ("DELETE", "/v1/chat/completions", "POST"),
        ("POST", "/api/tags", "GET, HEAD"),
        ("POST", "/api/tags/", "GET, HEAD"),
        ("POST", "/", "GET, HEAD"),
        ("HEAD", "/api/ps", "GET"),
        ("HEAD", "/v1/models", "GET"),
        ("PATCH", "/v1/models/x", "GET"),
        ("TRACE", "/api/version", "GET, HEAD"),
        ("GET", "/api/blobs/sha256:00", "HEAD, POST"),
        ("GET", "/api/delete", "DELETE"),
    ],
)
async def test_a_wrong_method_is_told_as_ollama_does(
    shared: Rig, method: str, path: str, allow: str
) -> None:
    """405 with gin's text and the methods that would do."""
    reply = await untouching(shared, shared.ask(method, path))
    assert (reply.status, reply.get("allow"), reply.get("content-type")) == (405, allow, TEXT)
    assert reply.body == (b"" if method == "HEAD" else b"405 method not allowed")


async def untouching(rig: Rig, asked: Coroutine[Any, Any, Reply]) -> Reply:
    """An answer that no host was asked for."""
    before = len(rig.inference())
    reply = await asked
    assert len(rig.inference()) == before, "no host may be asked"
    return reply


# -- bodies ---------------------------------------------------------------------------------------

CHAT, GENERATE, EMBED = "/api/chat", "/api/generate", "/api/embed"
V1_CHAT, V1_COMPLETIONS, V1_EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
EVERYWHERE = (CHAT, GENERATE, EMBED, "/api/embeddings", V1_CHAT, V1_COMPLETIONS, V1_EMBED)
MESSAGES = b'"messages":[{"role":"user","content":"x"}]'
BODIES: list[tuple[str, bytes, int, str]] = [
    *((path, b"{oops", 400, "invalid character 'o'") for path in EVERYWHERE),
    *((path, b'{"model":"m"', 400, "unexpected EOF") for path in EVERYWHERE),
    *((path, b"", 400, "EOF" if path.startswith("/v1/") else "missing") for path in EVERYWHERE),
    *((path, b"[1]", 400, "cannot unmarshal array") for path in EVERYWHERE),
    *((path, b'"\xff"', 400, "") for path in EVERYWHERE),
    (CHAT, b"{" + MESSAGES + b"}", 400, "model is required"),
    (GENERATE, b'{"prompt":"x"}', 404, "model '' not found"),
    (EMBED, b'{"input":"x"}', 404, "model '' not found"),
    ("/api/embeddings", b'{"prompt":"x"}', 400, "model is required"),
    ("/api/show", b"{}", 400, "model is required"),
    (V1_CHAT, b"{" + MESSAGES + b"}", 400, "model is required"),
    (V1_COMPLETIONS, b'{"prompt":"x"}', 404, "model '' not found"),
    (V1_EMBED, b'{"input":"x"}', 404, "model '' not found"),
    (CHAT, b'{"model":5,' + MESSAGES + b"}", 400, "cannot unmarshal number"),
    (CHAT, b'{"model":"m","messages":"x"}', 400, "cannot unmarshal string"),
    (CHAT, b'{"model":"m","stream":"yes",' + MESSAGES + b"}", 400, "cannot unmarshal string"),
    (CHAT, b'{"model":"m","options":[],' + MESSAGES + b"}", 400, "cannot unmarshal array"),
    (V1_CHAT, b'{"model":"m","messages":[]}', 400, "[] is too short - 'messages'"),
    (V1_CHAT, b'{"model":"m","max_tokens":"x",' + MESSAGES + b"}", 400, "cannot unmarshal"),
    (V1_EMBED, b'{"model":"m"}', 400, "invalid input"),
    (EMBED, b'{"model":"m","input":5}', 400, "invalid input type"),
    (GENERATE, b'{"model":"/","prompt":"x"}', 400, "invalid model name"),
    (GENERATE, b'{"model":"m","keep_alive":true}', 400, "Unsupported type: 'bool'"),
    (GENERATE, b'{"model":"m","keep_alive":"5"}', 400, 'missing unit in duration "5"'),
    (GENERATE, b'{"model":"m","options":{"num_ctx":"x"}}', 500, "must be of type integer"),
    (GENERATE, b'{"model":"m","options":{"num_gpu":[]}}', 500, "must be of type integer"),
    (GENERATE, b'{"model":"nope","prompt":"x"}', 404, "model 'nope' not found"),
    (GENERATE, b'{"model":"llama3.1","prompt":"x"}', 404, "Closest: llama3.2"),
    (CHAT, b'{"model":"nope",' + MESSAGES + b"}", 404, "model 'nope' not found"),
    (EMBED, b'{"model":"nope","input":"x"}', 404, 'model "nope" not found'),
    ("/api/show", b'{"model":"nope"}', 404, "model 'nope:latest' not found"),
    (V1_CHAT, b'{"model":"nope",' + MESSAGES + b"}", 404, "model 'nope' not found"),
    (V1_EMBED, b'{"model":"nope","input":"x"}', 404, "not found"),
    (GENERATE, b'{"model":"nope","prompt":"","keep_alive":0}', 404, "model 'nope' not found"),
    (GENERATE, b'{"model":"m","Model":"n"}', 400, "two spellings"),
    (GENERATE, b'{"model":"m","options":{},"options":{}}', 400, "options"),
    (GENERATE, b'{"model":"' + b"m" * 50_000 + b'"}', 400, "invalid model name"),
    (GENERATE, b'{"x":' + b"[" * 50_000 + b"]" * 49_000 + b"}", 400, ""),
]


@in_module
@pytest.mark.parametrize("spelling", ["{}", "{}/"])  # on the spot, and in a task
@pytest.mark.parametrize("path", sorted({path for path, *_ in BODIES}))
async def test_a_bad_body_is_told(shared: Rig, path: str, spelling: str) -> None:
    """Ollama's status and, as near as may be, its text, in the shape of the route."""
    for _, body, status, text in [row for row in BODIES if row[0] == path]:
        reply = await untouching(shared, shared.ask("POST", spelling.format(path), body))
        assert (reply.status, reply.get("content-type")) == (status, NATIVE), body[:60]
        assert text in message(reply), body[:60]
        assert shape(reply) is (Dialect.OPENAI if path.startswith("/v1") else Dialect.OLLAMA)
        assert len(reply.body) < 1000 or b"mmm" in body
        if status == 404:
            assert reply.get("x-should-retry") == "false"


@in_module
@pytest.mark.parametrize("path", [CHAT, V1_CHAT, "/api/show"])
async def test_a_body_too_large_is_refused_before_it_is_read(shared: Rig, path: str) -> None:
    """413 for a length that is declared, without asking the client to go on."""
    declared = MAX_BODY + 1 if path != "/api/show" else 1024 * 1024 + 1
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {declared}\r\n"
    wire = await shared.connect()
    wire.writer.write(f"{head}Expect: 100-continue\r\n\r\n".encode())
    reply = await untouching(shared, wire.reply())
    wire.close()
    assert (reply.status, reply.interim, reply.get("connection")) == (413, [], "close")
    assert "server.max_body" in message(reply)


@in_module
async def test_a_body_in_chunks_too_large_is_refused(shared: Rig) -> None:
    """413 as soon as it is too much."""
    chunk = b"%x\r\n%s\r\n" % (50_000, b" " * 50_000)
    reply = await untouching(
        shared, shared.raw(POST + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 3)
    )
    assert (reply.status, reply.get("connection")) == (413, "close")


async def test_a_body_as_large_as_allowed_is_served(start: Start) -> None:
    """The limit itself is allowed, in chunks too, and a host gets it with a length."""
    rig = await start(1, config={"server.max_body": MAX_BODY})
    body = b'{"model":"llama3.2","prompt":"x","stream":false}'.ljust(MAX_BODY)
    assert (await rig.ask("POST", GENERATE, body)).status == 200
    head = b"POST /api/generate HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    assert (await rig.raw(head, chunk)).status == 200
    plain, chunked = rig.forwarded()
    assert plain.body == chunked.body == body
    assert dict(chunked.headers)["Content-Length"] == str(MAX_BODY)
    assert "Transfer-Encoding" not in dict(chunked.headers)


@in_module
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd, zstd", "gzip, identity"])
@pytest.mark.parametrize("path", [GENERATE, V1_CHAT])
async def test_a_compressed_body_is_refused(shared: Rig, path: str, encoding: str) -> None:
    """415 that names the encoding."""
    asked = shared.ask("POST", path, b"\x1f\x8b", Content_Encoding=encoding)
    reply = await untouching(shared, asked)
    assert reply.status == 415
    assert encoding in message(reply)


# -- who may ask ----------------------------------------------------------------------------------


@in_module
@pytest.mark.parametrize("path", ["/", "/api/chat", "/nope", "/v1/models"])
@pytest.mark.parametrize(
    "headers",
    [
        b"Host: evil.example\r\n",
        b"Host: a@localhost\r\n",
        b"Host: localhost.evil.example\r\n",
        b"Host: 93.184.216.34\r\n",
        HOST + b"Origin: http://evil.example\r\n",
        HOST + b"Origin: null\r\n",
        HOST + b"Origin: http://localhost.evil.example\r\n",
        HOST + b"Origin: chrome-extension://abc\r\n",
    ],
)
async def test_foreign_pages_are_refused(shared: Rig, path: str, headers: bytes) -> None:
    """403 without a body, as Ollama on a loopback address answers; the path does not matter."""
    for method in (b"GET", b"POST", b"OPTIONS"):
        ask = b"Access-Control-Request-Method: POST\r\n" if method == b"OPTIONS" else b""
        raw = b"%s %s HTTP/1.1\r\n%s%s\r\n" % (method, path.encode(), headers, ask)
        reply = await untouching(shared, shared.raw(raw))
        assert (reply.status, reply.body, reply.get("content-length")) == (403, b"", "0")
        assert reply.get("access-control-allow-origin") is None


@in_module
@pytest.mark.parametrize(
    "origin",
    ["http://localhost:3000", "https://127.0.0.1", "app://obsidian.md", "tauri://localhost"],
)
async def test_local_pages_are_welcome(shared: Rig, origin: str) -> None:
    """A preflight is answered 204 for any path; answers and errors carry the origin."""
    asked = {"Origin": origin, "Access_Control_Request_Method": "POST"}
    for path, allow in ((CHAT, "POST"), ("/nope", None)):
        reply = await untouching(shared, shared.ask("OPTIONS", path, **asked))
        assert (reply.status, reply.body, reply.get("allow")) == (204, b"", allow)
        assert reply.get("access-control-allow-origin") == origin
    for path, status in (("/api/tags", 200), ("/nope", 404), ("/v1/models/nope", 404)):
        reply = await shared.ask("GET", path, Origin=origin)
        assert reply.status == status
        assert reply.get("access-control-allow-origin") == origin
        assert reply.get("vary") == "Origin"


@in_module
@pytest.mark.parametrize("path", [b"/api/generate", b"/api/version"])
async def test_who_was_welcome_once_is_not_for_ever(shared: Rig, path: bytes) -> None:
    """On a connection that was let in, each request is looked at for itself."""
    body = SERVED if path == b"/api/generate" else b""
    method = b"POST" if body else b"GET"
    end = b"Content-Length: %d\r\n\r\n" % len(body) + body
    foreign = [
        b"Host: evil.example\r\n",
        HOST + b"Origin: http://evil.example\r\n",
        HOST + b"Origin: null\r\n",
        b"X: y\r\n" + HOST + b"Origin: http://localhost.evil.example\r\n",
    ]
    for headers in foreign:
        asked, wire = len(shared.forwarded()), await shared.connect()
        for sent, status in ((HOST, 200), (HOST, 200), (headers, 403), (HOST, 200)):
            wire.writer.write(b"%s %s HTTP/1.1\r\n" % (method, path) + sent + end)
            reply = await wire.reply(method.decode())
            assert reply.status == status, sent
            if reply.get("connection") == "close":
                break
        wire.close()
        assert reply.status in (200, 403)
        assert len(shared.forwarded()) - asked in ((2, 3) if body else (0,))


@in_module
async def test_a_request_that_has_been_here_is_refused(shared: Rig) -> None:
    """508 that says where to look, if a backend turns out to be ourselves."""
    body = {"model": "llama3.2", "prompt": "x", "stream": False}
    assert (await shared.ask("POST", GENERATE, body)).status == 200
    via = dict(shared.forwarded()[-1].headers)["Via"]
    reply = await untouching(shared, shared.ask("POST", GENERATE, body, Via=f"1.1 a, {via}"))
    assert reply.status == 508
    assert "to itself" in message(reply)
    assert reply.get("x-should-retry") == "false"
    other = await shared.ask("POST", GENERATE, body, Via="1.1 some-other-proxy")
    assert other.status == 200


# -- clients that do not go on --------------------------------------------------------------------


async def closed_after(rig: Rig, *pieces: tuple[float, bytes]) -> tuple[float, Reply | None]:
    """Seconds until the balancer closes a connection on which such pieces came, and its answer."""
    loop, wire = asyncio.get_running_loop(), await rig.connect()
    began = loop.time()
    for at, piece in pieces:
        await asyncio.sleep(began + at - loop.time())
        wire.writer.write(piece)
    reply = await wire.reply()
    await wire.reader.read()
    wire.close()
    return loop.time() - began, reply if reply.status else None


SLOW: dict[str, tuple[list[tuple[float, bytes]], tuple[float, float], int | None]] = {
    "nothing at all": ([], (9.9, 10.1), None),
    "half a head": ([(0, b"GET / HT")], (9.9, 10.1), None),
    "a head in drops": (
        [(n, b"GET / HTTP/1.1\r\n"[n : n + 1]) for n in range(9)], (9.9, 10.1), None
    ),
    "half a second head": (
        [(0, GET + b"\r\n"), (40, b"GET / HTTP/1.1\r\n")], (49.9, 50.1), 200
    ),
    "no second request": ([(0, GET + b"\r\n")], (74.9, 76.1), 200),
    "no body": ([(0, POST + b"Content-Length: 9\r\n\r\n")], (29.9, 32.1), 408),
    "a body that stops": (
        [(0, POST + b"Content-Length: 99999\r\n\r\n" + b" " * 60_000), (20, b"{")],
        (49.9, 52.1),
        408,
    ),
    "a body in drops": (
        [(0, POST + b"Content-Length: 99\r\n\r\n"), *((n, b" ") for n in range(1, 12))],
        (10.9, 13.1),
        408,
    ),
    "a body in small pieces, for ever": (
        [
            (0, POST + b"Content-Length: 99999999\r\n\r\n"),
            *((n, b" " * 20_000) for n in range(5, 320, 5)),
        ],
        (304.9, 322.1),
        408,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SLOW)
def test_who_does_not_go_on_is_given_up(name: str) -> None:
    """
    A head has 10 s, a body 30 s between two pieces, an idle connection 75 s.

    After five minutes a body needs 100 KiB a second.
    """
    pieces, (least, most), status = SLOW[name]

    async def scenario() -> tuple[float, Reply | None]:
        async with running(1) as rig:
            return await closed_after(rig, *pieces)

    seconds, reply = run(scenario())
    assert least <= seconds <= most
    assert (reply and reply.status) == status
    if status == 408 and reply is not None:
        assert "body" in message(reply)


def test_a_crowd_without_heads_keeps_nobody_out() -> None:
    """Three hundred connections that send half a head: others are served, and all are closed."""

    async def scenario() -> float:
        loop = asyncio.get_running_loop()
        async with running(1) as rig:
            crowd = [await rig.connect() for _ in range(300)]
            for wire in crowd:
                wire.writer.write(b"GET / HT")
            began = loop.time()
            assert (await rig.ask("GET", "/api/version")).status == 200
            await asyncio.gather(*(wire.reader.read() for wire in crowd))
            for wire in crowd:
                wire.close()
            return loop.time() - began

    assert 9.9 <= run(scenario()) <= 10.1


def test_a_slow_body_that_goes_on_is_served() -> None:
    """A body may take its time as long as it moves."""

    async def scenario() -> Reply:
        async with running(1) as rig:
            wire = await rig.connect()
            body = b'{"model":"llama3.2","prompt":"x","stream":false}'.ljust(100_000)
            wire.writer.write(
                POST.replace(b"chat", b"generate") + b"Content-Length: 100000\r\n\r\n"
            )
            for at in range(0, len(body), 10_000):
                wire.writer.write(body[at : at + 10_000])
                await asyncio.sleep(8)
            reply = await wire.reply()
            wire.close()
            return reply

    assert run(scenario()).status == 200


# -- unloading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (GENERATE, {"model": "llama3.2", "keep_alive": 0}),
        (GENERATE, {"model": "llama3.2:latest", "prompt": "", "keep_alive": "0s", "stream": True}),
        (CHAT, {"model": "library/llama3.2", "messages": [], "keep_alive": 0}),
    ],
)
async def test_an_unload_reaches_every_host_that_has_the_model(
    start: Start, path: str, body: dict[str, Any]
) -> None:
    """Hosts that hold it let go of it, the others are not asked, one document answers."""
    rig = await start(3)
    await rig.warm("a", "llama3.2")
    await rig.warm("c", "llama3.2")
    await rig.warm("c", "qwen3:0.6b")
    before = len(rig.inference())
    reply = await rig.ask("POST", path, body)
    assert (reply.status, reply.get("content-type")) == (200, NATIVE)
    told = json.loads(reply.body)
    assert (told["model"], told["done"], told["done_reason"]) == (body["model"], True, "unload")
    assert rig.loaded() == {"a": [], "b": [], "c": ["qwen3:0.6b"]}
    assert len(rig.inference()) == before + 2
    assert reply.get("x-balancer-backend") == "a,c"


async def test_an_unload_of_what_is_not_loaded_is_a_success(start: Start) -> None:
    """As with Ollama, if the model exists; no host is asked."""
    rig = await start(2)
    asked = rig.ask("POST", GENERATE, {"model": "llama3.2", "keep_alive": 0})
    reply = await untouching(rig, asked)
    assert reply.status == 200
    assert json.loads(reply.body)["done_reason"] == "unload"


async def test_an_unload_that_fails_somewhere_is_told(start: Start) -> None:
    """503 that names the host which could not be told; the others have let go."""
    rig = await start(2)
    await rig.warm("a", "llama3.2")
    await rig.warm("b", "llama3.2")
    rig.fleet["a"].faults.reset_head()
    reply = await rig.ask("POST", GENERATE, {"model": "llama3.2", "keep_alive": 0})
    assert reply.status == 503
    assert "from a." in message(reply)
    assert rig.loaded()["b"] == []
