"""A stop: readiness first, then the door, then what runs; never in silence."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from balancer.app import Stop
from balancer.core.events import Stopped, Stopping
from balancer.sim.host import Settings
from tests.e2e.stage import (
    CHAT,
    ROUTES,
    STREAMS,
    Asking,
    error_of,
    is_whole,
    models,
    now,
    records,
    verdicts,
    virtual,
)
from tests.rig import Rig, running

pytestmark = pytest.mark.usefixtures("quiet")

SLOW = {"speed": 0.1}  # a stream of twenty words takes twenty seconds
PATIENT: dict[str, Any] = {"settings": Settings(num_parallel=4), "backend": {"slots": 2}}


@asynccontextmanager
async def stopping(rig: Rig, lag_s: float = 0.0) -> AsyncIterator[asyncio.Task[None]]:
    """The stop is asked for, and has ended when the block has."""
    waiting = asyncio.get_running_loop().create_task(rig.balancer.wait())
    rig.balancer.stop(Stop("SIGTERM", lag_s))
    yield waiting
    await waiting


async def ready(rig: Rig) -> tuple[int, Any]:
    """What readiness says."""
    reply = await rig.ask("GET", "/_balancer/ready")
    return reply.status, json.loads(reply.body).get("reason")


@virtual
async def test_a_drain_in_order() -> None:
    """Not ready while it serves; then closed, refusing on kept connections; what runs ends well."""
    async with running(1, models=models(0.0, **SLOW), **PATIENT) as rig:
        await rig.warm("a", "m")
        kept = await rig.connect()
        assert await ready(rig) == (200, None)
        calls = [await Asking.of(rig, "/api/chat", CHAT) for _ in range(2)]
        whole = await Asking.of(rig, "/api/chat", CHAT | {"stream": False})
        await asyncio.sleep(1.0)
        assert len(rig.balancer.dispatcher.waiting()) == 1
        async with stopping(rig, lag_s=5.0) as done:
            await asyncio.sleep(1.0)
            assert await ready(rig) == (503, "draining")
            late = await Asking.of(
                rig, "/api/chat", CHAT
            )  # a load balancer has not heard of it yet
            await asyncio.sleep(5.0)
            with pytest.raises(ConnectionRefusedError):
                await rig.connect()
            asking = Asking(kept)
            asking.send(rig, "/api/chat", CHAT)
            refused = await asking.head()
            assert (refused.status, refused.get("connection")) == (503, "close")
            assert int(refused.get("retry-after") or 0) >= 1
            assert "stopping" in error_of(await asking.rest())
            assert await kept.reader.read() == b""
            kept.close()
            for each in (*calls, whole, late):
                await each.head()
                assert is_whole(await each.rest(), "/api/chat")
                each.close()
            assert not done.done()
        (begun,), (ended,) = rig.events.of(Stopping), rig.events.of(Stopped)
        assert (begun.reason, begun.running, begun.queued) == ("SIGTERM", 2, 1)
        assert ended.cut == 0
        assert [call.outcome for call in rig.calls() if call.inference].count("ok") == 4


@virtual
async def test_a_stop_with_nothing_to_do_is_quick() -> None:
    """Idle kept connections do not hold it up."""
    async with running(1, models=models()) as rig:
        idle = [await rig.connect() for _ in range(5)]
        began = now()
        async with stopping(rig):
            pass
        assert now() - began < 1.0
        for wire in idle:
            assert await wire.reader.read() == b""
            wire.close()


@pytest.mark.parametrize(
    ("who", "least_s"),
    [("nobody", 0.0), ("a probe", 5.0), ("a probe long ago", 0.0), ("a client at rest", 5.0)],
)
@virtual
async def test_only_who_may_notice_is_waited_for(who: str, least_s: float) -> None:
    """Readiness is taken back for those who ask for it, or are connected; else it is no use."""
    async with running(1, models=models()) as rig:
        wire = None
        if who.startswith("a probe"):
            assert await ready(rig) == (200, None)
        if who == "a probe long ago":
            await asyncio.sleep(61.0)
        if who == "a client at rest":
            wire = await rig.connect()
            await asyncio.sleep(0.1)
        began = now()
        async with stopping(rig, lag_s=5.0):
            pass
        assert least_s <= now() - began < least_s + 1.0
        if wire is not None:
            wire.close()


@virtual
async def test_queued_calls_are_served_in_a_drain() -> None:
    """Those who wait when the stop begins get their turn, a cold one its load."""
    more = PATIENT | {"backend": {"slots": 1}}
    async with running(1, models=models(3.0), **more) as rig:
        calls = [await Asking.of(rig, "/api/chat", CHAT) for _ in range(5)]
        await asyncio.sleep(1.0)
        assert len(rig.balancer.dispatcher.waiting()) == 5
        async with stopping(rig):
            for each in calls:
                await each.head()
                assert is_whole(await each.rest(), "/api/chat")
                each.close()


@pytest.mark.parametrize("route", STREAMS)
@pytest.mark.parametrize("how", ["second stop", "drain timeout"])
@virtual
async def test_what_is_cut_is_told_so(route: str, how: str) -> None:
    """An error record ends the stream, in its dialect; the host is left at once, and not blamed."""
    path, body = ROUTES[route]
    limit = {"server.drain_timeout": "3s" if how == "drain timeout" else "5m"}
    async with running(1, models=models(0.0, **SLOW), config=limit) as rig:
        await rig.warm("a", "m")
        asking = await Asking.of(rig, path, body)
        await asking.head()
        for _ in range(3):
            await asking.record()
        began = now()
        async with stopping(rig):
            await asyncio.sleep(1.0)
            if how == "second stop":
                rig.balancer.stop(Stop("SIGTERM"))
            reply = await asking.rest()
        asking.close()
        assert now() - began < (2.0 if how == "second stop" else 4.0)
        assert reply.ended == "clean"
        *good, last = records(reply)
        assert "the balancer is stopping" in json.dumps(last["error"])
        assert not any(each.get("done") for each in good)
        assert b"[DONE]" not in reply.body
        assert rig.forwarded()[0].ending == "client-gone"
        (told,) = rig.calls()
        assert (told.status, told.outcome) == (200, "shed")
        assert verdicts(rig) == [("a", "stopped")]
        (ended,) = rig.events.of(Stopped)
        assert ended.cut == 1


@pytest.mark.parametrize("route", ["chat", "v1 chat", "embed"])
@virtual
async def test_who_has_nothing_yet_is_refused_when_it_is_cut(route: str) -> None:
    """Calls that run without a byte so far get 503 in their dialect; no other host is tried."""
    path, body = ROUTES[route]
    async with running(2, models=models(0.0, **SLOW)) as rig:
        for host in "ab":
            await rig.warm(host, body["model"])
            rig.fleet[host].faults.hang_inference()
        asking = await Asking.of(rig, path, body)
        await asyncio.sleep(1.0)
        began = now()
        async with stopping(rig):
            await asyncio.sleep(0.5)
            rig.balancer.stop(Stop("SIGTERM"))
            refused = await asking.head()
            assert (refused.status, refused.get("connection")) == (503, "close")
            assert "stopping" in error_of(await asking.rest())
            asking.close()
        assert now() - began < 2.0
        assert len(rig.forwarded()) == 1


@virtual
async def test_who_waits_is_refused_when_the_time_is_up() -> None:
    """Queued calls are told at the end of the drain, not dropped."""
    more: dict[str, Any] = {"backend": {"slots": 1}, "server.drain_timeout": "2s"}
    async with running(1, models=models(0.0, **SLOW), **more) as rig:
        await rig.warm("a", "m")
        first = await Asking.of(rig, "/api/chat", CHAT)
        await first.head()
        queued = await Asking.of(rig, "/api/chat", CHAT)
        await asyncio.sleep(1.0)
        async with stopping(rig):
            refused = await queued.head()
            assert refused.status == 503
            assert "stopping" in error_of(await queued.rest())
            await first.rest()
        first.close()
        queued.close()


@virtual
async def test_a_load_does_not_hold_up_a_stop() -> None:
    """A detached load that nobody waits for ends with us."""
    async with running(1, models=models(100.0)) as rig:
        asking = await Asking.of(rig, "/api/chat", CHAT)
        await asyncio.sleep(1.0)
        asking.hang_up()
        began = now()
        async with stopping(rig):
            pass
        assert now() - began < 1.0
        await asyncio.sleep(0.5)
        assert rig.inference()[0].ending == "client-gone"


@virtual
async def test_stopping_twice_over_is_harmless() -> None:
    """Close after a finished drain does nothing more."""
    async with running(1, models=models()) as rig:
        async with stopping(rig):
            pass
        await rig.balancer.close()
        assert len(rig.events.of(Stopped)) == 1
