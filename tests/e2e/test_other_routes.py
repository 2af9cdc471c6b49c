"""Forms, compressed bodies, routes that not every Ollama has, and routes that nobody knows yet."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from balancer.core.events import Mishap
from balancer.core.routes import TABLE
from balancer.sim.delivery import Seen
from balancer.sim.host import SimModel
from tests.e2e.stage import (
    CHAT,
    ROUTES,
    WORDS,
    Asking,
    error_of,
    is_whole,
    models,
    moves,
    verdicts,
    virtual,
)
from tests.rig import Rig, running

if sys.version_info >= (3, 14):
    from compression.zstd import compress
else:
    from backports.zstd import compress

pytestmark = pytest.mark.usefixtures("quiet")

GIN = (404, "text/plain", b"404 page not found")


def gin(reply: Any) -> tuple[int, str | None, bytes]:
    """What makes a 404 gin's own."""
    return reply.status, reply.get("content-type"), reply.body


def asked(rig: Rig, path: str) -> list[Seen]:
    """What hosts were sent on a path, in order; not our questions whether they have it."""
    seen = [one for host in rig.fleet for one in host.requests if one.path == path]
    return sorted((one for one in seen if one.method == "POST"), key=lambda one: one.started_at)


# -- /v1/messages/count_tokens -----------------------------------------------------------------

COUNT = "/v1/messages/count_tokens"


@virtual
async def test_tokens_are_counted_by_a_host_that_can() -> None:
    """Who has it is found out first; nobody is blamed."""
    async with running(2, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        rig.fleet["b"].counts_tokens = True
        for _ in range(2):
            reply = await rig.ask("POST", COUNT, CHAT)
            assert (reply.status, json.loads(reply.body).keys()) == (200, {"input_tokens"})
            told = [reply.get(f"x-balancer-{name}") for name in ("backend", "attempts")]
            assert told == ["b", "1"]
        assert verdicts(rig) == [("b", "ok"), ("b", "ok")]
        assert {call.endpoint for call in rig.calls()} == {"v1_count_tokens"}
        assert moves(rig) == []


@virtual
async def test_where_nobody_counts_tokens_the_404_is_ollamas() -> None:
    """At once, and no model is loaded for it; also without any model."""
    async with running(2, models=models(0.0)) as rig:
        for _ in range(3):
            assert gin(await rig.ask("POST", COUNT, CHAT)) == GIN
        assert asked(rig, COUNT) == []
        assert not any(host.host.counts["loads_started"] for host in rig.fleet)
        assert gin(await rig.ask("POST", COUNT, {})) == GIN
        assert {(call.status, call.outcome) for call in rig.calls()} == {(404, "rejected")}
        assert "no model is named" in rig.calls()[-1].error


@virtual
async def test_an_unknown_model_is_unknown_there_too() -> None:
    """Anthropic's shape: that the route may be missing is another matter."""
    async with running(1, models=models(0.0)) as rig:
        reply = await rig.ask("POST", COUNT, CHAT | {"model": "none"})
        assert (reply.status, json.loads(reply.body)["error"]["type"]) == (404, "not_found_error")


# -- /v1/audio/transcriptions ------------------------------------------------------------------

AUDIO = "/v1/audio/transcriptions"
FORM_TYPE = "multipart/form-data; boundary=b-b"


def form(model: str = "ear", **more: str) -> bytes:
    """A form with a file of odd bytes."""
    fields = {"model": model, **more}
    head = b"--b-b\r\nContent-Disposition: form-data; name="
    parts = [b'%b"%b"\r\n\r\n%b\r\n' % (head, k.encode(), v.encode()) for k, v in fields.items()]
    file = head + b'"file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n%b\r\n'
    return file % (b"RIFF\0\xff\r\n--b-\r\n" * 5000) + b"".join(parts) + b"--b-b--\r\n"


def hearing() -> tuple[SimModel, ...]:
    """One that hears, and the others, which do not."""
    hears = ("completion", "audio")
    return (SimModel("ear", capabilities=hears, words=WORDS, load_s=2.0), *models())


@virtual
async def test_a_recording_is_transcribed() -> None:
    """The form goes up byte for byte with its type; the answer is JSON, or the bare text."""
    async with running(2, models=hearing()) as rig:
        reply = await rig.ask("POST", AUDIO, form(), Content_Type=FORM_TYPE)
        assert json.loads(reply.body) == {"text": "".join(WORDS).strip()}
        bare = await rig.ask("POST", AUDIO, form(response_format="text"), Content_Type=FORM_TYPE)
        assert (bare.status, bare.get("content-type")) == (200, "text/plain")
        assert bare.body.decode() == "".join(WORDS).strip()
        first, second = asked(rig, AUDIO)
        assert (first.body, second.body) == (form(), form(response_format="text"))
        assert dict(first.headers)["Content-Type"] == FORM_TYPE
        assert [call.model for call in rig.calls()] == ["ear", "ear"]
        assert {verdict for _, verdict in verdicts(rig)} == {"ok"}


@pytest.mark.parametrize("response_format", ["json", "text"])
@pytest.mark.parametrize("fault", ["refuse", "crash"])
@virtual
async def test_a_transcription_fails_over(fault: str, response_format: str) -> None:
    """Also where the host's way of telling a crash is a 200 without a byte."""
    async with running(2, models=hearing()) as rig:
        await rig.warm("a", "ear")
        if fault == "crash":
            rig.fleet["a"].faults.error_line(3)
        else:
            rig.fleet["a"].faults.refuse()
        body = form(response_format=response_format)
        reply = await rig.ask("POST", AUDIO, body, Content_Type=FORM_TYPE)
        assert (reply.status, reply.get("x-balancer-backend")) == (200, "b")
        assert "w19" in reply.body.decode()
        assert verdicts(rig) == [("a", "unfit" if fault == "crash" else "fault"), ("b", "ok")]


@virtual
async def test_what_a_host_says_of_a_recording_is_relayed() -> None:
    """A model that cannot hear, from the host; a form that is none, from us."""
    async with running(1, models=hearing()) as rig:
        deaf = await rig.ask("POST", AUDIO, form("m"), Content_Type=FORM_TYPE)
        assert (deaf.status, "does not support multimodal" in error_of(deaf)) == (400, True)
        none = await rig.ask("POST", AUDIO, form(), Content_Type="application/json")
        assert (none.status, "isn't multipart" in error_of(none)) == (400, True)
        unknown = await rig.ask("POST", AUDIO, form("none"), Content_Type=FORM_TYPE)
        assert (unknown.status, "'none' not found" in error_of(unknown)) == (404, True)
        query = await rig.ask("POST", f"{AUDIO}?model=m", form(), Content_Type=FORM_TYPE)
        assert query.status == 400
        assert len(asked(rig, AUDIO)) == 1


@virtual
async def test_a_client_that_leaves_a_transcription() -> None:
    """The host hears of it."""
    async with running(1, models=hearing()) as rig:
        await rig.warm("a", "ear")
        wire = await rig.connect()
        head = f"POST {AUDIO} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM_TYPE}\r\n"
        wire.writer.write(f"{head}Content-Length: {len(form())}\r\n\r\n".encode() + form())
        await asyncio.sleep(0.1)
        wire.writer.transport.abort()
        assert [call.outcome for call in await rig.ended()] == ["client_abort"]
        await asyncio.sleep(1.0)
        assert asked(rig, AUDIO)[-1].ending == "client-gone"


# -- routes that nobody knows yet --------------------------------------------------------------

LATER = "/v1/systemone"
JSON = [("Content-Type", "application/json")]
SSE = [("Content-Type", "text/event-stream")]


@virtual
async def test_a_route_to_come_is_passed_on() -> None:
    """To a host with the model, the body as it is; any status of success and any type will do."""
    answers: list[tuple[int, str, bytes]] = [
        (200, "application/json", b'{"done":false}'),
        (200, "image/png", b"\x89PNG\0"),
        (200, "text/plain", b""),
        (201, "application/json", b"{}"),
        (404, "application/json", b'{"error":"voice not found"}'),
        (409, "text/plain", b"no"),
    ]
    async with running(2, models=[SimModel("other"), *models(0.0)]) as rig:
        for status, kind, text in answers:
            for host in rig.fleet:
                host.script(LATER, status=status, headers=[("Content-Type", kind)], segments=[text])
            body = b'{"name" : "m",  "what": [1]}'
            reply = await rig.ask("POST", f"{LATER}/?a=b", body)
            assert (reply.status, reply.get("content-type"), reply.body) == (status, kind, text)
            assert asked(rig, LATER)[-1].body == body
            for host in rig.fleet:
                host._scripts = type(host._scripts)()
        assert len(asked(rig, LATER)) == len(answers)
        assert {call.endpoint for call in rig.calls()} == {"other"}
        assert {call.model for call in rig.calls()} == {"m"}
        assert not {verdict for _, verdict in verdicts(rig)} - {"ok", "caller"}
        assert moves(rig) == []
        assert (await rig.ask("GET", "/api/tags")).body.count(b'"m:latest"') >= 1


@pytest.mark.parametrize("path", ["/v1/systemone", "/api/later"])
@virtual
async def test_a_stream_of_a_route_to_come(path: str) -> None:
    """Framed by its type, passed on as it is; a clean end is an end, a cut is told."""
    chunks = [b"event: a\ndata: 1\n\n", b"data: 2\n\n"]
    async with running(1, models=models(0.0)) as rig:
        host = rig.fleet["a"]
        host.script(path, headers=SSE, segments=chunks, framing="chunked")
        reply = await rig.ask("POST", path, {"model": "m", "stream": True})
        assert (reply.body, reply.ended) == (b"".join(chunks), "clean")
        host.script(path, headers=SSE, segments=chunks, framing="chunked", ending="cut")
        reply = await rig.ask("POST", path, {"model": "m", "stream": True})
        assert reply.body.startswith(b"".join(chunks) + b"data: {")
        assert "closed the connection" in reply.body.decode()
        assert [call.outcome for call in await rig.ended(2)] == ["ok", "upstream_error"]


@pytest.mark.parametrize("status", [500, 503])
@virtual
async def test_a_route_to_come_is_sent_once(status: int) -> None:
    """Whatever a host says or does with it, nobody else is asked, and it is relayed."""
    text = b'{"error":"x"}'
    async with running(2, models=models(0.0)) as rig:
        for host in rig.fleet:
            await rig.warm(host.name, "m")
            host.script(LATER, status=status, headers=JSON, segments=[text])
        reply = await rig.ask("POST", LATER, {"model": "m"})
        assert (reply.status, reply.body) == (status, text)
        assert len(asked(rig, LATER)) == 1


@virtual
async def test_what_was_never_sent_may_go_elsewhere() -> None:
    """A host that cannot be reached, or does not know the route."""
    for what in ("refuse", "no route"):
        async with running(2, models=models(0.0)) as rig:
            await rig.warm("a", "m")
            if what == "refuse":
                rig.fleet["a"].faults.refuse()
            rig.fleet["b"].script(LATER, headers=JSON, segments=[b"{}"])
            reply = await rig.ask("POST", LATER, {"model": "m"})
            assert (reply.status, reply.get("x-balancer-backend")) == (200, "b")


@virtual
async def test_a_route_that_nobody_has() -> None:
    """Gin's 404 once all were asked whether they have it; later nobody is bothered any more."""
    async with running(2, models=models(0.0)) as rig:
        for _ in range(3):
            assert gin(await rig.ask("POST", LATER, {"model": "m"})) == GIN
            questions = [one for host in rig.fleet for one in host.requests if one.path == LATER]
            assert [one.method for one in questions] == ["GET", "GET"]
        assert not any(host.host.counts["loads_started"] for host in rig.fleet)
        rig.fleet["a"].script("/v1/another", headers=JSON, segments=[b"{}"])
        rig.fleet["b"].script("/v1/another", headers=JSON, segments=[b"{}"])
        assert (await rig.ask("POST", "/v1/another", {"model": "m"})).status == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (LATER, b"{}"),
        (LATER, b"[]"),
        (LATER, b"model=m"),
        (LATER, b""),
        ("/v2/x", b'{"model":"m"}'),
        ("/api/experimental/x", b'{"model":"m"}'),
        ("/v1/a;b", b'{"model":"m"}'),
    ],
)
@virtual
async def test_what_cannot_be_routed_is_no_route(path: str, body: bytes) -> None:
    """Gin's 404 from us."""
    async with running(1, models=models(0.0)) as rig:
        assert gin(await rig.ask("POST", path, body)) == GIN
        assert asked(rig, path) == []
        assert rig.events.of(Mishap) == []


# -- compressed bodies -------------------------------------------------------------------------

ZSTD = [name for name in ROUTES if name.startswith("v1 ") and "streamed" not in name]


@pytest.mark.parametrize("route", ZSTD)
@virtual
async def test_a_body_that_comes_as_zstd(route: str) -> None:
    """The host gets it plain; the log counts what came in."""
    path, body = ROUTES[route]
    plain = json.dumps(body).encode()
    async with running(1, models=models(0.0)) as rig:
        packed = compress(plain)
        reply = await rig.ask("POST", path, packed, Content_Encoding="zstd")
        assert is_whole(reply, path)
        (seen,) = asked(rig, path)
        assert seen.body == plain
        headers = {name.lower(): value for name, value in seen.headers}
        assert "content-encoding" not in headers
        assert headers["content-length"] == str(len(plain))
        assert rig.calls()[0].bytes_in == len(packed)


@virtual
async def test_a_bomb_is_a_413() -> None:
    """A few bytes that would be many: told so, and no host is asked."""
    async with running(1, models=models(0.0), config={"server.max_body": 100_000}) as rig:
        path = "/v1/chat/completions"
        bomb = compress(b'{"model":"m","x":"' + b"x" * 50_000_000 + b'"}')
        assert len(bomb) < 10_000
        reply = await rig.ask("POST", path, bomb, Content_Encoding="zstd")
        assert (reply.status, "server.max_body" in error_of(reply)) == (413, True)
        damaged = await rig.ask("POST", path, b"{}", Content_Encoding="zstd")
        assert (damaged.status, "decompress" in error_of(damaged)) == (400, True)
        assert asked(rig, path) == []


@virtual
async def test_a_compressed_body_may_be_as_large_as_ollama_takes_it() -> None:
    """However much is taken plain, so that a few bytes cannot ask for all of that."""
    async with running(1, models=models(0.0), config={"server.max_body": "256MiB"}) as rig:
        text = json.dumps(CHAT).encode()
        for over, status in ((0, 200), (1, 413)):
            body = compress(text + b" " * ((20 << 20) - len(text) + over))
            reply = await rig.ask("POST", "/v1/chat/completions", body, Content_Encoding="zstd")
            assert reply.status == status
        assert "20971520 bytes" in error_of(reply)


# -- methods and expectations ------------------------------------------------------------------


def spellings() -> Iterator[tuple[str, str, int]]:
    """Host, path, and how an OPTIONS without Origin is answered there."""
    for path in ("/api/chat", "/api/chat/", "/v1/messages", "/v1/models/x"):
        yield "localhost", path, 204
        yield "localhost:11434", path, 204
        yield "127.0.0.1", path, 405
        yield "[::1]:80", path, 405
    yield "localhost", "/nope", 404


@virtual
async def test_options_without_an_origin() -> None:
    """By name on loopback what is allowed, by address gin's 405."""
    async with running(1, models=models(0.0)) as rig:
        for host, path, status in spellings():
            raw = f"OPTIONS {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
            reply = await rig.raw(raw, method="OPTIONS")
            assert reply.status == status, (host, path)
            if status != 404:
                assert reply.get("allow") == ("GET" if "models" in path else "POST")
            if status == 204:
                assert reply.body == b""


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "OPTIONS")


@virtual
async def test_methods_of_every_route() -> None:
    """Of all paths: what a host says to a wrong method is what we say, and none is asked."""
    async with running(1, models=models(0.0)) as rig:
        known: dict[str, set[str]] = {}
        for route in TABLE:
            known.setdefault(route.path.partition("{")[0], set()).add(route.method)
        for stem, methods in known.items():
            path = f"{stem}x" if stem.endswith("/") and stem != "/" else stem
            count = len(asked(rig, path))
            for method in set(METHODS) - methods:
                reply = await rig.ask(method, path)
                assert (reply.status, reply.get("allow")) == (405, ", ".join(sorted(methods)))
                assert reply.get("content-type") == "text/plain"
                assert reply.body == (b"" if method == "HEAD" else b"405 method not allowed")
                slash = await rig.ask(method, f"{path}/" if path != "/" else path)
                assert (slash.status, slash.get("allow")) == (405, reply.get("allow"))
            assert len(asked(rig, path)) == count, path


@virtual
async def test_a_slash_at_the_end_is_forgiven() -> None:
    """On inference routes as on the others; what goes up has none."""
    async with running(1, models=models(0.0)) as rig:
        asking = await Asking.of(rig, "/v1/messages/", CHAT | {"max_tokens": 100})
        assert (await asking.head()).status == 200
        await asking.rest()
        asking.close()
        assert len(asked(rig, "/v1/messages")) == 1


@pytest.mark.parametrize(
    "more", [b"Expect: miracles\r\n", b"Expect: 100-continue\r\nExpect: x\r\n"]
)
@virtual
async def test_another_expectation_is_told_as_go_does(more: bytes) -> None:
    """417 without a word, and the connection is closed."""
    async with running(1, models=models(0.0)) as rig:
        head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
        reply = await rig.raw(head + more + b"\r\n{}", method="POST")
        assert (reply.status, reply.body, reply.get("connection")) == (417, b"", "close")
        (told,) = rig.calls()
        assert (told.status, told.outcome, told.error) == (
            417,
            "rejected",
            "unsupported expectation",
        )
