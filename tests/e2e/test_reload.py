"""A new configuration: one swap in the middle of traffic, or none and the reason why."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from balancer.core.events import ConfigApplied, ConfigRejected, MemberJoined, MemberLeft
from balancer.sim.host import Settings
from tests.e2e.stage import (
    CHAT,
    Asking,
    error_of,
    is_whole,
    models,
    moves,
    now,
    verdicts,
    virtual,
)
from tests.rig import Rig, running
from tests.sim.wire import Reply

pytestmark = pytest.mark.usefixtures("quiet")

ADMIN = {"Content_Type": "application/json"}


def places(rig: Rig, *hosts: str, **more: Any) -> list[dict[str, Any]]:
    """Backends as they are configured."""
    return [{"name": name, "url": rig.fleet[name].url, **more} for name in hosts]


async def reload(rig: Rig, **wanted: Any) -> Reply:
    """Change the configuration and have it read; dots are written as two underscores."""
    rig.config.update({key.replace("__", "."): value for key, value in wanted.items()})
    return await rig.ask("POST", "/_balancer/reload", {}, **ADMIN)


async def served_by(rig: Rig, count: int = 6) -> Counter[str | None]:
    """Who answers so many calls."""
    replies = [await rig.ask("POST", "/api/chat", CHAT) for _ in range(count)]
    assert all(is_whole(reply, "/api/chat") for reply in replies)
    return Counter(reply.get("x-balancer-backend") for reply in replies)


@virtual
async def test_a_backend_is_added() -> None:
    """It is checked, listed and used, without a ramp, while the others go on."""
    async with running(2, models=models(0.0), settings=Settings(num_parallel=4)) as rig:
        told = await reload(rig, backends=places(rig, "a"))
        assert told.status == 200
        for host in rig.fleet:
            await rig.fleet[host.name].stop() if host.name == "none" else None
        assert set(await served_by(rig)) == {"a"}
        running_stream = await Asking.of(rig, "/api/chat", CHAT)
        await running_stream.head()
        told = await reload(rig, backends=places(rig, "a", "b"))
        assert json.loads(told.body) == {
            "reloaded": True,
            "changed": ["backends"],
            "needs_restart": [],
        }
        await rig.watching()
        await rig.warm("b", "m")
        assert is_whole(await running_stream.rest(), "/api/chat")
        running_stream.close()
        assert set(await served_by(rig)) == {"a", "b"}
        assert rig.balancer.pool.members["b"].load.slots("m") == 2
