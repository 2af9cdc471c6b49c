"""A client that leaves: the host hears of it within a second, and nobody is blamed."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random
from typing import Any

import pytest

from balancer.core.events import AttemptEnded, LoadStarted
from balancer.sim.host import Settings
from tests.e2e.stage import (
    CHAT,
    LANES,
    ROUTES,
    STREAMS,
    Asking,
    in_each_lane,
    is_whole,
    models,
    moves,
    now,
    verdicts,
    virtual,
)
from tests.rig import Rig, running

pytestmark = pytest.mark.usefixtures("quiet")

LIMIT_S = 1.0
ABORTS = 200
GENERATING = ("chat", "generate", "v1 chat", "v1 completions", "v1 responses", "v1 messages")


async def leave(rig: Rig, when: str, number: int, rng: Random) -> float:
    """One client that leaves at the moment named; when it left."""
    route = rng.choice(GENERATING)
    streams = when == "mid-stream" or (when == "before the first byte" and rng.random() < 0.5)
    path, body = ROUTES[route]
    body = body | {"stream": streams}
    lane = rng.choice(list(LANES.values()))
    asking = await Asking.of(rig, path, body, X_Request_Id=f"call-{number}", **lane)
    if when == "mid-stream":
        await asking.head()
        for _ in range(rng.randrange(1, 8)):
            await asking.record()
    else:
        await asking.wire.writer.drain()
        await asyncio.sleep(rng.uniform(0.01, 0.09 if when == "before the first byte" else 1.5))
    asking.hang_up()
    return now()


@virtual
async def test_two_hundred_aborts_reach_the_hosts() -> None:
    """Streaming or not, before or after the first byte: within a second, all of them."""
    rng = Random(7)
    more: dict[str, Any] = {"settings": Settings(num_parallel=64), "backend": {"slots": 64}}
    async with running(3, models=models(0.0), **more) as rig:
        for host in rig.fleet:
            await rig.warm(host.name, "m")
        kinds = ("before the first byte", "mid-stream", "non-streaming")
        left: list[asyncio.Task[float]] = []
        async with asyncio.TaskGroup() as group:
            for number in range(ABORTS):
                left.append(group.create_task(leave(rig, kinds[number % 3], number, rng)))
                await asyncio.sleep(0.02)
        calls = await rig.ended(ABORTS)
        await asyncio.sleep(LIMIT_S)
        seen = {dict(each.headers).get("X-Request-Id"): each for each in rig.forwarded()}
        waits = []
        for number, task in enumerate(left):
            each = seen[f"call-{number}"]
            assert each.ending == "client-gone"
            waits.append((each.ended_at or now()) - task.result())
        assert len(waits) == ABORTS
        assert max(waits) < LIMIT_S
        assert Counter(call.outcome for call in calls) == {"client_abort": ABORTS}
        assert {call.phase for call in calls} == {"before_first_token", "streaming"}
        assert {verdict for _, verdict in verdicts(rig)} == {"gone"}
        assert moves(rig) == []
        await rig.idle()
        assert [host.host.running for host in rig.fleet] == [0, 0, 0]
        assert all(m.load.in_flight() == 0 for m in rig.balancer.pool.members.values())
        assert is_whole(await rig.ask("POST", "/api/chat", CHAT), "/api/chat")


@virtual
async def test_two_hundred_aborts_at_once() -> None:
    """All in one moment in the middle of their streams; other clients' answers stay whole."""
    more: dict[str, Any] = {"settings": Settings(num_parallel=256), "backend": {"slots": 256}}
    async with running(2, models=models(0.0), **more) as rig:
        for host in rig.fleet:
            await rig.warm(host.name, "m")
        leaving = [await Asking.of(rig, "/api/chat", CHAT) for _ in range(ABORTS)]
        staying = [await Asking.of(rig, "/api/chat", CHAT) for _ in range(10)]
        for asking in leaving:
            await asking.head()
            await asking.record()
        at = now()
        for asking in leaving:
            asking.hang_up()
        for asking in staying:
            await asking.head()
            assert is_whole(await asking.rest(), "/api/chat")
            asking.close()
        gone = [seen for seen in rig.forwarded() if seen.ending == "client-gone"]
        assert len(gone) == ABORTS
        assert max(seen.ended_at or 0.0 for seen in gone) - at < LIMIT_S
        assert Counter(verdict for _, verdict in verdicts(rig)) == {"gone": ABORTS, "ok": 10}
        assert moves(rig) == []


@in_each_lane
@virtual
async def test_clients_that_leave_the_queue(headers: dict[str, str]) -> None:
    """They reach no host at all, and those behind them move up."""
    async with running(1, models=models(0.0), backend={"slots": 1}) as rig:
        await rig.warm("a", "m")
        first = await Asking.of(rig, "/api/chat", CHAT, **headers)
        await first.head()
        queued = [await Asking.of(rig, "/api/chat", CHAT, **headers) for _ in range(50)]
        await rig.events.until(lambda: len(rig.balancer.dispatcher.waiting()) == 50)
        at = now()
        for asking in queued[:-1]:
            asking.hang_up()
        calls = await rig.ended(49)
        assert now() - at < LIMIT_S
        assert {(call.outcome, call.phase) for call in calls} == {("client_abort", "queued")}
        for asking in (first, queued[-1]):
            if asking is not first:
                await asking.head()
            assert is_whole(await asking.rest(), "/api/chat")
            asking.close()
        assert len(rig.forwarded()) == 2
        assert verdicts(rig) == [("a", "ok")] * 2


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
@virtual
async def test_a_client_that_leaves_while_its_load_runs(path: str) -> None:
    """Its ticket is gone at once; no call of its own ever reaches the host."""
    async with running(1, models=models(10.0)) as rig:
        asking = await Asking.of(rig, path, CHAT | {"stream": True})
        await rig.events.until(lambda: bool(rig.events.of(LoadStarted)))
        await asyncio.sleep(1.0)
        at = now()
        asking.hang_up()
        await rig.ended()
        assert now() - at < LIMIT_S
        await asyncio.sleep(30.0)
        assert rig.forwarded() == []


@virtual
async def test_a_client_that_leaves_between_two_tries() -> None:
    """After a failed first attempt, while it waits for another host: nothing more is sent."""
    async with running(2, models=models(10.0)) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].faults.reset_head()
        asking = await Asking.of(rig, "/api/chat", CHAT)
        await rig.events.until(lambda: bool(rig.events.of(LoadStarted)))
        asking.hang_up()
        (told,) = await rig.ended()
        assert (told.outcome, told.phase) == ("client_abort", "queued")
        await asyncio.sleep(15.0)
        assert len(rig.forwarded()) == 1


TERMINAL = {
    "chat, streamed": [b'{"message":{"content":"a"},"done":false}\n', b'{"done":true}\n'],
    "generate, streamed": [b'{"response":"a","done":false}\n', b'{"done":true,"response":""}\n'],
    "v1 chat, streamed": [
        b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n',
        b"data: [DONE]\n\n",
    ],
    "v1 completions, streamed": [b'data: {"choices":[{"text":"a"}]}\n\n', b"data: [DONE]\n\n"],
    "v1 responses, streamed": [
        b'event: response.output_text.delta\ndata: {"delta":"a"}\n\n',
        b'event: response.completed\ndata: {"response":{}}\n\n',
    ],
    "v1 messages, streamed": [
        b'event: content_block_delta\ndata: {"delta":{"text":"a"}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ],
}


@in_each_lane
@pytest.mark.parametrize("route", STREAMS)
@virtual
async def test_who_leaves_after_the_last_record_has_had_all(
    route: str, headers: dict[str, str]
) -> None:
    """Hanging up behind the terminal record is a good end: ok for the call and for the host."""
    path, body = ROUTES[route]
    kind = "text/event-stream" if path.startswith("/v1/") else "application/x-ndjson"
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].script(
            path,
            headers=[("Content-Type", kind)],
            segments=[*TERMINAL[route], (60.0, b"\n")],
            framing="chunked",
        )
        asking = await Asking.of(rig, path, body, **headers)
        await asking.head()
        while asking.reply.body != b"".join(TERMINAL[route]):
            await asking.record()
        asking.hang_up()
        (told,) = await rig.ended()
        assert (told.outcome, told.phase, told.status) == ("ok", "", 200)
        (attempt,) = rig.events.of(AttemptEnded)
        assert (attempt.outcome.verdict.value, attempt.outcome.committed) == ("ok", True)
        await asyncio.sleep(LIMIT_S)
        assert rig.forwarded()[-1].ending == "client-gone"


@in_each_lane
@virtual
async def test_who_leaves_before_the_last_record_is_gone(headers: dict[str, str]) -> None:
    """One record earlier it is an abort."""
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        asking = await Asking.of(rig, "/api/chat", CHAT, **headers)
        await asking.head()
        while b" w15" not in asking.reply.body:
            await asking.record()
        asking.hang_up()
        (told,) = await rig.ended()
        assert (told.outcome, told.phase) == ("client_abort", "streaming")
        assert verdicts(rig) == [("a", "gone")]


@in_each_lane
@virtual
async def test_a_client_that_stops_reading_is_let_go(headers: dict[str, str]) -> None:
    """After a minute of a full pipe its slot comes free and the host may stop; nobody is blamed."""
    half = [(0.01, b'{"response":"' + b"x" * 100_000 + b'","done":false}\n')] * 400
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        kind = [("Content-Type", "application/x-ndjson")]
        rig.fleet["a"].script("/api/generate", headers=kind, segments=half, framing="chunked")
        wire = await rig.connect()
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        asking = Asking(wire)
        asking.send(rig, "/api/generate", {"model": "m", "prompt": "hi"}, **headers)
        await asyncio.sleep(90.0)
        (told,) = await rig.ended()
        assert told.outcome == "client_abort"
        assert verdicts(rig) == [("a", "gone")]
        assert 60.0 <= told.duration_s < 80.0
        asking.hang_up()


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
@pytest.mark.parametrize("where", ["queue", "load", "first byte", "stream"])
@virtual
async def test_a_calls_own_time_limit(where: str, path: str) -> None:
    """It ends the call wherever it is: 504, or an error record; the host is left, unblamed."""
    load_s = 10.0 if where == "load" else 0.0
    async with running(1, models=models(load_s, speed=0.3), backend={"slots": 1}) as rig:
        if where != "load":
            await rig.warm("a", "m")
        others = []
        if where == "queue":
            others.append(await Asking.of(rig, path, CHAT | {"stream": True}))
            await others[0].head()
        if where == "first byte":
            rig.fleet["a"].faults.hang_inference()
        asking = await Asking.of(rig, path, CHAT | {"stream": True}, X_Request_Timeout="4.5")
        began = now()
        await asking.head()
        reply = await asking.rest()
        asking.close()
        assert now() - began == pytest.approx(4.5, abs=0.01)
        assert (reply.status, reply.ended) == (200 if where == "stream" else 504, "clean")
        assert b"time limit has passed" in reply.body or b"deadline has passed" in reply.body
        assert (b'"error"' in reply.body, b"[DONE]" in reply.body) == (True, False)
        for each in others:
            each.hang_up()
        told = (await rig.ended())[0]
        assert (told.outcome, told.status) == ("timeout", reply.status)
        await asyncio.sleep(LIMIT_S)
        gone = [seen.ending for seen in rig.forwarded()]
        assert set(gone) <= {"client-gone"}
        assert len(gone) == (0 if where == "load" else 1)
        assert moves(rig) == []
