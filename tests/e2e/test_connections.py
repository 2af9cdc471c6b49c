"""Connections to backends that are kept: between calls, until trouble, and no longer than us."""

from __future__ import annotations

import asyncio

import pytest

from balancer.core.events import BreakerMoved, HealthFlipped
from tests.e2e.stage import CHAT, Asking, is_whole, models, virtual
from tests.rig import Rig, running

pytestmark = pytest.mark.usefixtures("quiet")
WHOLE = CHAT | {"stream": False}


async def served(rig: Rig) -> None:
    """One call, answered."""
    assert is_whole(await rig.ask("POST", "/api/chat", WHOLE), "/api/chat")


def closing(rig: Rig) -> list[bool]:
    """Of each call that hosts saw, whether its connection was to be closed behind it."""
    return ["Connection" in dict(one.headers) for one in rig.forwarded()]


async def metric(rig: Rig, name: str) -> list[float]:
    """The values of a metric of connections."""
    told = (await rig.ask("GET", "/metrics")).body.decode().splitlines()
    return [
        float(line.split()[-1]) for line in told if line.startswith(f"ollama_balancer_{name}{{")
    ]


@virtual
async def test_calls_share_connections_unless_the_configuration_forbids_it() -> None:
    """A reload switches it, and closes what is at rest."""
    async with running(1, models=models()) as rig:
        for _ in range(3):
            await served(rig)
        assert await metric(rig, "backend_idle_connections") == [1]
        (rig.config["backends"][0])["reuse_connections"] = False  # type: ignore[index]
        rig.balancer.reload_now()
        for _ in range(2):
            await served(rig)
        assert closing(rig) == [False] * 3 + [True] * 2
        assert await metric(rig, "backend_idle_connections") == [0]


@virtual
async def test_a_host_that_was_started_anew_is_no_failure() -> None:
    """The call that meets the old connection is sent once more, if need be, unseen."""
    async with running(1, models=models()) as rig:
        await served(rig)
        rig.fleet["a"].faults.restart()
        await served(rig)
        assert [call.attempts for call in rig.calls() if call.backend] == [1, 1]
        assert not rig.events.of(BreakerMoved)


@virtual
async def test_what_stands_with_a_host_that_goes_down_is_closed() -> None:
    """Nothing is left at rest there for the calls to come."""
    async with running(2, models=models()) as rig:
        for _ in range(4):
            await asyncio.gather(*(served(rig) for _ in range(8)))
        assert sorted(rig.balancer.upstream.idle()) == ["a", "b"]
        assert all(rig.balancer.upstream.idle().values())
        rig.fleet["a"].faults.freeze()
        await rig.events.until(lambda: any(not one.up for one in rig.events.of(HealthFlipped)), 60)
        assert rig.balancer.upstream.idle()["a"] == 0
        assert rig.balancer.upstream.idle()["b"] > 0
        rig.fleet["a"].faults.heal()


@virtual
async def test_a_stop_ends_what_runs_and_keeps_nothing() -> None:
    """The client of a cut stream is told; no connection to a host outlives us."""
    slow = models(0.0, speed=0.01)
    async with running(1, models=slow, config={"server.drain_timeout": "1s"}) as rig:
        await rig.warm("a", "m")
        await served(rig)
        asking = await Asking.of(rig, "/api/chat", CHAT)
        await asking.head()
        await asking.record()
        await rig.balancer.close()
        reply = await asking.rest()
        asking.close()
        assert b"stopping" in reply.body
        assert reply.ended == "clean"
        async with asyncio.timeout(10):
            while rig.fleet["a"].connections:
                await asyncio.sleep(0.01)
