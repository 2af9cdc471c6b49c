"""Long silences: what a streaming client hears, and what becomes of the call behind it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest

from balancer.app import Stop
from balancer.core.events import CallEnded, LoadEnded
from tests.e2e.stage import (
    CHAT,
    ROUTES,
    STREAMS,
    Asking,
    error_of,
    is_whole,
    models,
    moves,
    now,
    records,
    verdicts,
    virtual,
)
from tests.rig import Rig, running
from tests.sim.wire import Reply

pytestmark = pytest.mark.usefixtures("quiet")

ONE = {"slots": 1}
STAMP = rb"2[0-9]{3}-[0-9]{2}-[0-9]{2}T[0-9:]{8}(\.[0-9]{1,9})?Z"
HEAD = rb'{"model":"m","created_at":"' + STAMP + rb'",'
BEATS = {
    "chat, streamed": HEAD + rb'"message":{"role":"assistant","content":""},"done":false}\n',
    "generate, streamed": HEAD + rb'"response":"","done":false}\n',
    "v1 chat, streamed": rb": heartbeat\n\n",
    "v1 completions, streamed": rb": heartbeat\n\n",
    "v1 responses, streamed": rb": heartbeat\n\n",
    "v1 messages, streamed": rb'event: ping\ndata: {"type":"ping"}\n\n',
}
NATIVE, SSE = "application/x-ndjson", "text/event-stream"
JSON = [("Content-Type", "application/json; charset=utf-8")]
TYPES = {route: NATIVE if "/api/" in ROUTES[route][0] else SSE for route in STREAMS}
LINE = b'{"model":"m","message":{"role":"assistant","content":"x"},"done":false}\n'
DONE = b'{"model":"m","message":{"role":"assistant","content":""},"done":true}\n'

every_stream = pytest.mark.parametrize("route", STREAMS)


def beats(route: str, reply: Reply) -> int:
    """How many heartbeats an answer begins with."""
    return len(without_beats(route, reply)[0])


def without_beats(route: str, reply: Reply) -> tuple[list[bytes], bytes]:
    """The heartbeats an answer begins with, and what is behind them."""
    leading = re.match(b"(?:" + BEATS[route] + b")*", reply.body)
    assert leading is not None
    found = [match[0] for match in re.finditer(BEATS[route], leading[0])]
    return found, reply.body[leading.end() :]


async def timed(asking: Asking) -> list[tuple[float, bytes]]:
    """What comes in a stream up to its end, with the times."""
    came = []
    while data := await asking.record():
        came.append((now(), data))
    return came


def error_behind(route: str, reply: Reply) -> str:
    """The text of the one record behind the heartbeats, which must be an error in the dialect."""
    _, rest = without_beats(route, reply)
    assert (reply.status, reply.ended, reply.get("content-type")) == (200, "clean", TYPES[route])
    if TYPES[route] == NATIVE:
        (line,) = rest.splitlines()
        told = json.loads(line)
        assert told.keys() == {"error"}
        return str(told["error"])
    assert rest.endswith(b"\n\n")
    *event, data = rest.removesuffix(b"\n\n").split(b"\n")
    told = json.loads(data.removeprefix(b"data: "))
    if "messages" in route:
        assert (event, told["type"]) == ([b"event: error"], "error")
    elif "responses" in route:
        assert (event, told["type"], told["sequence_number"]) == ([b"event: error"], "error", 0)
        assert told["message"] == told["error"]["message"]
    else:
        assert event == []
    return str(told["error"]["message"])


async def ask(rig: Rig, route: str, **headers: str) -> Reply:
    """One call on a route."""
    path, body = ROUTES[route]
    return await rig.ask("POST", path, body, **headers)


def last(rig: Rig) -> CallEnded:
    """What was told of the last call."""
    return rig.calls()[-1]


@asynccontextmanager
async def holding(where: str, **config: object) -> AsyncIterator[Rig]:
    """One host that a call waits for without end: in the queue, or as an attempt."""
    config = {"timeouts.idle": -1, "timeouts.first_byte": -1, **config}
    async with running(1, models=models(0.0), backend=ONE, config=config) as rig:
        await rig.warm("a", "m")
        if where == "attempt":
            rig.fleet["a"].faults.hang_inference()
            yield rig
            return
        script: Any = {"headers": [("Content-Type", NATIVE)], "framing": "chunked", "times": 1}
        rig.fleet["a"].script("/api/chat", segments=[LINE, (1e6, DONE)], **script)
        other = await Asking.of(rig, "/api/chat", CHAT)
        await other.head()
        yield rig
        other.hang_up()


# -- what is heard ------------------------------------------------------------------------------


@every_stream
@virtual
async def test_a_load_is_waited_for_with_signs_of_life(route: str) -> None:
    """At 20 s the head and a heartbeat, every 15 s another; the answer behind is the host's."""
    path, body = ROUTES[route]
    async with running(2, models=models(60.0)) as rig:
        asking, began = await Asking.of(rig, path, body, X_Request_Id="mine"), now()
        head = await asking.head()
        assert (head.status, head.get("content-type")) == (200, TYPES[route])
        assert (head.get("x-request-id"), head.get("x-accel-buffering")) == ("mine", "no")
        assert not [name for name, _ in head.headers if name.startswith("X-Balancer")]
        came = [(round(at - began, 1), data) for at, data in await timed(asking)]
        assert [at for at, _ in came[:4]] == [20.0, 35.0, 50.0, came[3][0]]
        assert came[3][0] > 60.0
        found, rest = without_beats(route, asking.reply)
        assert len(found) == 3
        assert rest == bytes(rig.forwarded()[-1].written)
        asking.close()
        (told,) = await rig.ended()
        assert (told.status, told.outcome, told.backend, told.attempts) == (200, "ok", "a", 1)
        assert told.bytes_out == len(asking.reply.body)
        assert told.first_byte_s is not None
        assert told.first_byte_s > 60.0, "a heartbeat is not the first byte"


@every_stream
@virtual
async def test_a_full_queue_is_waited_in_with_signs_of_life(route: str) -> None:
    """Behind them comes the answer, once a slot is free."""
    async with running(1, models=models(0.0), backend=ONE) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].faults.slow(20.0)  # forty seconds for an answer
        first = await Asking.of(rig, "/api/chat", CHAT)
        await first.head()
        reply = await ask(rig, route)
        found, rest = without_beats(route, reply)
        assert len(found) == 2
        assert rest.startswith(bytes(rig.forwarded()[-1].written)[:20])
        assert is_whole(reply, ROUTES[route][0])
        first.hang_up()


@every_stream
@virtual
async def test_a_silent_attempt_is_failed_over_behind_heartbeats(route: str) -> None:
    """The host that hangs is found out as ever, another answers, and the bytes are its own."""
    async with running(2, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].faults.hang_inference()
        reply = await ask(rig, route)
        found, rest = without_beats(route, reply)
        assert len(found) >= 1
        assert rest == bytes(rig.forwarded()[-1].written)
        assert [backend for backend, _ in verdicts(rig)] == ["a", "b"]
        assert verdicts(rig)[1] == ("b", "ok")
        assert (last(rig).outcome, last(rig).backend, last(rig).attempts) == ("ok", "b", 2)


@pytest.mark.parametrize("fault", ["reset_head", "queue_full", "garbage"])
@every_stream
@virtual
async def test_the_same_failures_are_retried_as_without_heartbeats(route: str, fault: str) -> None:
    """A heartbeat commits nothing: a host that fails behind it costs the client nothing."""
    async with running(2, models=models(30.0)) as rig:
        asking = await Asking.of(rig, *ROUTES[route])
        await asking.head()
        getattr(rig.fleet["a"].faults, fault)()
        reply = await asking.rest()
        found, rest = without_beats(route, reply)
        assert len(found) == 3
        assert rest == bytes(rig.forwarded()[-1].written)
        assert is_whole(reply, ROUTES[route][0])
        assert (last(rig).outcome, last(rig).backend) == ("ok", "b")
        asking.close()


@pytest.mark.parametrize("route", [name for name in ROUTES if name not in STREAMS])
@virtual
async def test_a_whole_answer_is_waited_for_in_silence(route: str) -> None:
    """Its status line would be a guess, so nothing comes before it."""
    async with running(1, models=models(60.0)) as rig:
        asking, began = await Asking.of(rig, *ROUTES[route]), now()
        head = await asking.head()
        assert now() - began >= 60.0
        assert head.get("x-balancer-backend") == "a"
        assert is_whole(await asking.rest(), ROUTES[route][0])
        asking.close()


@virtual
async def test_a_load_asked_for_is_waited_for_in_silence() -> None:
    """Ollama answers it with one document, whatever was said of a stream."""
    async with running(1, models=models(60.0)) as rig:
        reply = await rig.ask("POST", "/api/generate", {"model": "m", "stream": True})
        assert (reply.framing, json.loads(reply.body)["done_reason"]) == ("length", "load")


@pytest.mark.parametrize(
    ("never", "heads", "count"), [("heartbeat_after", 60.0, 0), ("heartbeat", 20.0, 1)]
)
@virtual
async def test_no_heartbeat_where_none_is_wanted(never: str, heads: float, count: int) -> None:
    """The head then waits for the answer; or there is one heartbeat and no more."""
    async with running(1, models=models(60.0), config={f"streaming.{never}": -1}) as rig:
        asking, began = await Asking.of(rig, "/api/chat", CHAT), now()
        await asking.head()
        assert now() - began == pytest.approx(heads, abs=1.0)
        await asking.rest()
        assert beats("chat, streamed", asking.reply) == count
        asking.close()


@virtual
async def test_without_further_ones_the_middle_stays_silent_too() -> None:
    """`streaming.heartbeat` is about every silence but the first."""
    pieces: list[bytes | tuple[float, bytes]] = [LINE, (100.0, DONE)]
    async with running(1, models=models(0.0), config={"streaming.heartbeat": -1}) as rig:
        await rig.warm("a", "m")
        script: Any = {"headers": [("Content-Type", NATIVE)], "framing": "chunked"}
        rig.fleet["a"].script("/api/chat", segments=pieces, **script)
        assert (await rig.ask("POST", "/api/chat", CHAT)).body == LINE + DONE


@virtual
async def test_a_reload_counts_for_the_next_call() -> None:
    """Both settings are live."""
    async with running(1, models=models(60.0)) as rig:
        rig.config.update({"streaming.heartbeat_after": "5s", "streaming.heartbeat": "30s"})
        rig.balancer.reload_now()
        asking, began = await Asking.of(rig, "/api/chat", CHAT), now()
        await asking.head()
        came = [round(at - began, 1) for at, _ in (await timed(asking))[:2]]
        assert came == [5.0, 35.0]
        asking.close()


@virtual
async def test_an_old_client_gets_them_too() -> None:
    """HTTP/1.0 has no chunks: the body ends with the connection."""
    async with running(1, models=models(30.0)) as rig:
        body = json.dumps(CHAT).encode()
        head = f"POST /api/chat HTTP/1.0\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        reply = await rig.raw(head.replace("Host: x", "Host: localhost").encode(), body)
        assert (reply.framing, beats("chat, streamed", reply)) == ("close", 1)
        assert reply.body.endswith(b"}\n")
        assert records(reply)[-1]["done"] is True


# -- errors behind heartbeats -------------------------------------------------------------------


@every_stream
@virtual
async def test_the_queues_limit_is_told_in_the_stream(route: str) -> None:
    """As an error of the dialect, and in the log as what it is."""
    async with holding("queue", **{"queue.max_wait": "40s"}) as rig:
        began = now()
        reply = await ask(rig, route)
        assert now() - began == pytest.approx(40.0, abs=0.1)
        assert beats(route, reply) == 2
        assert "No slot came free for 'm' in 40 s" in error_behind(route, reply)
        assert (last(rig).status, last(rig).outcome) == (200, "shed")
        assert "No slot" in last(rig).error


@pytest.mark.parametrize("told", ["own", "native", "text"])
@every_stream
@virtual
async def test_a_hosts_refusal_is_told_in_the_stream(route: str, told: str) -> None:
    """Of the host's whole answer an error record is made, in whatever dialect it speaks."""
    path, body = ROUTES[route]
    text = "the host's <own> ☃ text"
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        errors: dict[str, Any] = {
            "own": {"error": text},
            "native": {"error": text},
            "text": None,
        }
        if told == "own" and "v1" in path:
            errors["own"] = {"error": {"message": text, "type": "x", "param": None, "code": None}}
        if told == "own" and "messages" in path:
            errors["own"] = {"type": "error", "error": {"type": "x", "message": text}}
        answer = text.encode() if told == "text" else json.dumps(errors[told], indent=1).encode()
        rig.fleet["a"].script(path, status=422, headers=JSON, segments=[(25.0, answer)])
        reply = await ask(rig, route)
        assert beats(route, reply) == 1
        assert error_behind(route, reply) == text
        if told == "own" and "v1" in path:
            assert b'"type":"x"' in reply.body
        assert (last(rig).status, last(rig).outcome) == (200, "rejected")
        assert last(rig).backend == "a"
        assert body["model"] == "m"


@every_stream
@virtual
async def test_a_model_that_is_missing_after_all(route: str) -> None:
    """The 404 of the last host that was asked is told in the stream."""
    path, _ = ROUTES[route]
    missing = b'{"error":"model \'m\' not found"}'
    async with running(2, models=models(0.0)) as rig:
        for host in rig.fleet:
            await rig.warm(host.name, "m")
            host.script(path, status=404, headers=JSON, segments=[(15.0, missing)])
        reply = await ask(rig, route)
        assert beats(route, reply) == 1
        assert error_behind(route, reply) == "model 'm' not found"
        assert [verdict for _, verdict in verdicts(rig)] == ["missing", "missing"]
        assert last(rig).status == 200


@every_stream
@virtual
async def test_an_error_record_of_the_host_passes_as_it_is(route: str) -> None:
    """A stream that begins with an error is not answered twice: its bytes are the answer."""
    path, _ = ROUTES[route]
    native = TYPES[route] == NATIVE
    bare = b'{"error":"wrong option"}'
    record = bare + b"\n" if native else b"event: error\ndata: " + bare + b"\n\n"
    headers = [("Content-Type", TYPES[route])]
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        script: Any = {"headers": headers, "framing": "chunked"}
        rig.fleet["a"].script(path, segments=[(25.0, record)], **script)
        reply = await ask(rig, route)
        assert without_beats(route, reply)[1] == record
        assert (len(without_beats(route, reply)[0]), last(rig).outcome) == (1, "upstream_error")


@every_stream
@virtual
async def test_loads_that_fail_everywhere(route: str) -> None:
    """What was tried is told in the stream; each host was asked, as without heartbeats."""
    async with running(2, models=models(15.0)) as rig:
        for host in rig.fleet:
            host.faults.fail("m", after_s=14.0)
        reply = await ask(rig, route)
        assert beats(route, reply) == 1
        assert "llama-server process has terminated" in error_behind(route, reply)
        assert [event.backend for event in rig.events.of(LoadEnded)] == ["a", "b"]
        assert (last(rig).status, last(rig).outcome) == (200, "upstream_error")


@every_stream
@virtual
async def test_all_attempts_fail(route: str) -> None:
    """Where no host gave an answer to pass on, ours says what was tried."""
    async with running(2, models=models(0.0)) as rig:
        for host in rig.fleet:
            await rig.warm(host.name, "m")
            script: Any = {"framing": "chunked", "ending": "reset"}
            host.script(ROUTES[route][0], segments=[(12.0, b"")], **script)
        reply = await ask(rig, route)
        assert beats(route, reply) == 1
        text = error_behind(route, reply)
        assert text.startswith("'m' could not be served: a: closed the connection")
        assert text.endswith(f"[req {reply.get('x-request-id')}]")
        assert (last(rig).status, last(rig).outcome) == (200, "upstream_error")


@pytest.mark.parametrize("where", ["queue", "attempt"])
@every_stream
@virtual
async def test_a_time_limit_is_told_in_the_stream(route: str, where: str) -> None:
    """Wherever the call was then; nobody is blamed."""
    async with holding(where) as rig:
        began = now()
        reply = await ask(rig, route, X_Request_Timeout="25")
        assert now() - began == pytest.approx(25.0, abs=0.1)
        assert beats(route, reply) == 1
        text = error_behind(route, reply)
        assert "time limit" in text or "deadline" in text
        assert (last(rig).status, last(rig).outcome) == (200, "timeout")
        assert moves(rig) == []


@pytest.mark.parametrize("where", ["queue", "attempt"])
@every_stream
@virtual
async def test_a_stop_is_told_in_the_stream(route: str, where: str) -> None:
    """When the time to end in peace is over, all who wait hear of it."""
    async with holding(where, **{"server.drain_timeout": "10s"}) as rig:
        asking = await Asking.of(rig, *ROUTES[route])
        await asking.head()
        rig.balancer.stop(Stop("test"))
        reply, _ = await asyncio.gather(asking.rest(), rig.balancer.wait())
        assert "The balancer is stopping" in error_behind(route, reply)
        assert {told.outcome for told in rig.calls()} == {"shed"}
        asking.close()


# -- one document where a stream was asked for --------------------------------------------------


@pytest.mark.parametrize("pretty", [False, True])
@virtual
async def test_a_document_is_the_last_record_of_a_native_stream(pretty: bool) -> None:
    """So Ollama answers what is done at once: one line of the same shape, ended as a line."""
    document = json.loads(DONE)
    body = json.dumps(document, indent=1 if pretty else None).encode()
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].script("/api/chat", headers=JSON, segments=[(25.0, body)])
        reply = await rig.ask("POST", "/api/chat", CHAT)
        _, rest = without_beats("chat, streamed", reply)
        assert rest.count(b"\n") == 1
        assert json.loads(rest) == document
        assert beats("chat, streamed", reply) == 1
        assert (last(rig).outcome, verdicts(rig)) == ("ok", [("a", "ok")])


@pytest.mark.parametrize("route", [name for name in STREAMS if TYPES[name] == SSE])
@virtual
async def test_a_document_does_not_fit_into_events(route: str) -> None:
    """A client that reads chunks could make nothing of it: it is told so, and nobody is blamed."""
    path, _ = ROUTES[route]
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].script(path, headers=JSON, segments=[(25.0, b'{"choices":[]}')])
        reply = await ask(rig, route)
        assert "one document where a stream was asked for" in error_behind(route, reply)
        assert (last(rig).status, last(rig).outcome) == (200, "upstream_error")
        assert moves(rig) == []


@every_stream
@virtual
async def test_a_stream_of_another_kind_does_not_fit(route: str) -> None:
    """Nor do lines fit among events, or a document too large to be held among lines."""
    path, _ = ROUTES[route]
    native = TYPES[route] == NATIVE
    segments = [(25.0, b"data: {}\n\n" if native else LINE)]
    headers = [("Content-Type", SSE if native else NATIVE)]
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].script(path, headers=headers, segments=segments, framing="chunked")
        reply = await ask(rig, route)
        assert "one document where a stream" in error_behind(route, reply)
        assert verdicts(rig) == [("a", "gone")]


# -- silence in the middle ----------------------------------------------------------------------


@every_stream
@virtual
async def test_silence_in_the_middle_is_filled_too(route: str) -> None:
    """Every 15 s, until `timeouts.idle` ends it as ever."""
    async with running(1, models=models(0.0), config={"timeouts.idle": "40s"}) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].faults.stall(2 if TYPES[route] == NATIVE else 5)
        asking, began = await Asking.of(rig, *ROUTES[route]), now()
        await asking.head()
        assert now() - began < 5.0
        came = await timed(asking)
        at = [when for when, data in came if re.fullmatch(BEATS[route], data)]
        assert len(at) == 2
        assert [round(b - a) for a, b in pairwise(at)] == [15]
        assert b"stopped in the middle" in came[-1][1]
        assert not re.search(BEATS[route], came[-1][1])
        assert verdicts(rig) == [("a", "stalled")]
        asking.close()


@virtual
async def test_an_answer_that_pauses_goes_on_behind_them() -> None:
    """They stand between records only, and what the host sent is all there, in order."""
    pieces: list[tuple[float, bytes]] = [(1.0, LINE + LINE[:30]), (40.0, LINE[30:]), (40.0, DONE)]
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        headers = [("Content-Type", NATIVE)]
        rig.fleet["a"].script("/api/chat", headers=headers, segments=pieces, framing="chunked")
        reply = await rig.ask("POST", "/api/chat", CHAT)
        beat = BEATS["chat, streamed"]
        assert re.sub(beat, b"", reply.body) == LINE + LINE + DONE
        assert len(re.findall(beat, reply.body)) == 4
        assert last(rig).outcome == "ok"


@virtual
async def test_half_a_record_is_left_alone() -> None:
    """Of a record too long to be held a part was passed on: nothing of ours may follow it."""
    long = b'{"message":{"content":"' + b"x" * (2 << 20)
    pieces = [(0.0, LINE), (0.1, long), (50.0, b'"},"done":false}\n'), (50.0, DONE)]
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        headers = [("Content-Type", NATIVE)]
        rig.fleet["a"].script("/api/chat", headers=headers, segments=pieces, framing="chunked")
        reply = await rig.ask("POST", "/api/chat", CHAT)
        beat = BEATS["chat, streamed"]
        assert re.sub(beat, b"", reply.body) == LINE + long + b'"},"done":false}\n' + DONE
        assert len(re.findall(beat, reply.body)) == 3
        assert [json.loads(line) for line in reply.body.splitlines()]


@pytest.mark.parametrize("route", ["chat, streamed", "v1 chat, streamed", "v1 messages, streamed"])
@virtual
async def test_nothing_comes_behind_the_last_record(route: str) -> None:
    """However late the host ends the body."""
    ends = {
        "chat, streamed": LINE + DONE,
        "v1 chat, streamed": b'data: {"choices":[{}]}\n\ndata: [DONE]\n\n',
        "v1 messages, streamed": b"event: content_block_delta\ndata: {}\n\n"
        b"event: message_stop\ndata: {}\n\n",
    }
    path, body = ROUTES[route]
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        segments: list[bytes | tuple[float, bytes]] = [ends[route], (100.0, b"")]
        script: Any = {"headers": [("Content-Type", TYPES[route])], "framing": "chunked"}
        rig.fleet["a"].script(path, segments=segments, **script)
        reply = await rig.ask("POST", path, body)
        assert reply.body == ends[route]


# -- leaving ------------------------------------------------------------------------------------

INSTANTS = (0.1, 19.9, 20.0, 20.1, 34.9, 35.0, 35.1)


async def assert_unharmed(rig: Rig, where: str, others: int) -> None:
    """The call that was left has given everything back, and nobody is blamed for it."""
    (told,) = await rig.ended()
    assert told.outcome == "client_abort"
    assert told.phase == ("before_first_token" if where == "attempt" else "queued")
    assert (rig.balancer.pool.running, rig.balancer.dispatcher.waiting()) == (others, [])
    assert moves(rig) == []
    assert verdicts(rig) == ([("a", "gone")] if where == "attempt" else [])


@pytest.mark.parametrize("after_s", INSTANTS)
@pytest.mark.parametrize("where", ["queue", "attempt"])
@virtual
async def test_who_leaves_costs_nobody_anything(where: str, after_s: float) -> None:
    """Before, at and after a heartbeat, slot and ticket are given back."""
    async with holding(where) as rig:
        asking = await Asking.of(rig, "/api/chat", CHAT)
        await asyncio.sleep(after_s)
        asking.hang_up()
        await assert_unharmed(rig, where, int(where == "queue"))
        if after_s != 20.0:
            assert last(rig).status == (499 if after_s < 20.0 else 200)


@pytest.mark.parametrize("after_s", INSTANTS)
@virtual
async def test_who_leaves_a_load_does_not_end_it(after_s: float) -> None:
    """The load is for whoever comes next, as without heartbeats."""
    async with running(1, models=models(60.0)) as rig:
        asking = await Asking.of(rig, "/api/chat", CHAT)
        await asyncio.sleep(after_s)
        asking.hang_up()
        await assert_unharmed(rig, "load", 0)
        assert is_whole(await rig.ask("POST", "/api/chat", CHAT), "/api/chat")
        assert [event.ok for event in rig.events.of(LoadEnded)] == [True]


@pytest.mark.parametrize("where", ["queue", "attempt"])
@virtual
async def test_who_does_not_read_heartbeats_is_given_up(where: str) -> None:
    """After a minute in which nothing could be written, wherever the call is by then."""
    more = {"streaming.heartbeat": 0.001, "queue.max_wait": "1h"}
    async with holding(where, **more) as rig:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop, body = asyncio.get_running_loop(), json.dumps(CHAT).encode()
            await loop.sock_connect(sock, ("127.0.0.1", rig.port))
            head = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
            await loop.sock_sendall(sock, head.encode() + b"\r\n\r\n" + body)
            await rig.ended(limit_s=1800.0)
        await assert_unharmed(rig, where, int(where == "queue"))


@virtual
async def test_a_call_that_ends_leaves_no_timer_behind() -> None:
    """Ended well, refused, or left in the middle: nothing of it is called later."""
    async with running(1, models=models(0.0)) as rig:
        await rig.ask("POST", "/api/chat", CHAT)
        await rig.ask("POST", "/v1/chat/completions", CHAT | {"stream": True, "model": "none"})
        leaving = await Asking.of(rig, "/api/chat", CHAT)
        await leaving.head()
        leaving.hang_up()
        await rig.ended(3)
        loop: Any = asyncio.get_running_loop()
        waiting = [str(handle) for handle in loop._scheduled if not handle.cancelled()]
        assert not [text for text in waiting if "Reply.rousing" in text]


@virtual
async def test_refusals_before_the_first_heartbeat_keep_their_status() -> None:
    """Only silence brings the head out early."""
    async with holding("queue", **{"queue.max_wait": "19s"}) as rig:
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert (reply.status, "No slot" in error_of(reply)) == (503, True)
        assert last(rig).status == 503
