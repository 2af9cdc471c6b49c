"""Hosts that nobody wrote down, in a whole balancer: they serve, stay, and keep out of reloads."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from balancer.core.events import HealthFlipped, MemberJoined, MemberLeft
from tests.e2e.stage import CHAT, Asking, error_of, is_whole, models, virtual
from tests.rig import Rig, running
from tests.sim.wire import Reply

pytestmark = pytest.mark.usefixtures("quiet")


async def reload(rig: Rig, **wanted: Any) -> Reply:
    """Change the configuration and have it read; dots are written as two underscores."""
    rig.config.update({key.replace("__", "."): value for key, value in wanted.items()})
    return await rig.ask("POST", "/_balancer/reload", {}, Content_Type="application/json")


async def discover(rig: Rig, *hosts: str, **more: Any) -> Reply:
    """Name no backend, but the ports of these hosts to look at."""
    ports = [rig.fleet[host].port for host in hosts]
    where = {"discovery__sources": "local", "discovery__local__ports": ports}
    return await reload(rig, **{"backends": [], **where, **more})


def members(rig: Rig) -> dict[str, str]:
    """Which hosts are backends, and where from."""
    urls = {host.url: host.name for host in rig.fleet}
    return {urls[v.url]: v.source for v in rig.balancer.pool.snapshot()}


async def served_by(rig: Rig, count: int = 4) -> set[str]:
    """The hosts that answer so many calls at once."""
    seen = {host.name: len(host.requests) for host in rig.fleet}
    calls = [await Asking.of(rig, "/api/chat", CHAT) for _ in range(count)]
    for each in calls:
        await each.head()
        assert is_whole(await each.rest(), "/api/chat")
        each.close()
    return {
        host.name
        for host in rig.fleet
        if any(one.path == "/api/chat" for one in list(host.requests)[seen[host.name] :])
    }


@virtual
async def test_what_is_found_serves() -> None:
    """As a backend like any other, named after its port; the status says where it is from."""
    async with running(2, models=models(0.0)) as rig:
        await discover(rig, "a", "b")
        await rig.events.until(lambda: len(rig.balancer.pool.members) == 2)
        assert members(rig) == {"a": "local port", "b": "local port"}
        await rig.watching()
        assert await served_by(rig) == {"a", "b"}
        status = json.loads((await rig.ask("GET", "/_balancer/status")).body)
        told = {each["name"]: each["source"] for each in status["backends"]}
        assert told == {f"local:{host.port}": "local port" for host in rig.fleet}


@virtual
async def test_a_host_that_comes_later_is_added_and_one_that_goes_stays() -> None:
    """Nothing else is touched: who runs elsewhere goes on; who went is down, not gone."""
    async with running(2, models=models(0.0)) as rig:
        rig.fleet["b"].faults.refuse()
        await discover(rig, "a", "b")
        await asyncio.sleep(50)
        assert members(rig) == {"a": "local port"}
        stream = await Asking.of(rig, "/api/chat", CHAT)
        await stream.head()
        rig.fleet["b"].faults.heal()
        joined = len(rig.events.of(MemberJoined))
        await rig.events.until(lambda: len(rig.events.of(MemberJoined)) > joined, 31.0)
        assert set(members(rig)) == {"a", "b"}
        assert is_whole(await stream.rest(), "/api/chat")
        stream.close()
        await rig.watching()
        assert await served_by(rig) == {"a", "b"}
        rig.fleet["b"].faults.refuse()
        await rig.events.until(lambda: not rig.events.of(HealthFlipped)[-1].up, 60.0)
        left = len(rig.events.of(MemberLeft))
        await asyncio.sleep(100)
        assert set(members(rig)) == {"a", "b"}
        assert len(rig.events.of(MemberLeft)) == left
        assert await served_by(rig) == {"a"}


@virtual
async def test_a_reload_and_what_was_found_do_not_fight() -> None:
    """A reload keeps it, with its memory, and tells no change that is none; a bad one as well."""
    async with running(2, models=models(0.0)) as rig:
        await discover(rig, "a", "b")
        await rig.events.until(lambda: len(rig.balancer.pool.members) == 2)
        before = dict(rig.balancer.pool.members)
        told = await reload(rig, queue__max_depth=7)
        assert json.loads(told.body)["changed"] == ["queue.max_depth"]
        assert (await reload(rig, queue__max_depth="x")).status == 422
        del rig.config["queue.max_depth"]
        assert json.loads((await reload(rig)).body)["changed"] == ["queue.max_depth"]
        await asyncio.sleep(60)
        assert rig.balancer.pool.members == before


@virtual
async def test_who_is_found_and_then_written_is_one_backend() -> None:
    """The user's words count; written no more, it is found again; turned off, it leaves."""
    async with running(2, models=models(0.0)) as rig:
        await discover(rig, "a", "b")
        await rig.events.until(lambda: len(rig.balancer.pool.members) == 2)
        mine = [{"name": "mine", "url": f"localhost:{rig.fleet['a'].port}", "slots": 1}]
        await reload(rig, backends=mine)
        assert {v.name for v in rig.balancer.pool.snapshot()} == {
            "mine",
            f"local:{rig.fleet['b'].port}",
        }
        await asyncio.sleep(60)
        assert len(rig.balancer.pool.members) == 2
        await reload(rig, backends=[])
        await rig.events.until(lambda: set(members(rig)) == {"a", "b"})
        await reload(rig, discovery__sources="none")
        assert members(rig) == {}
        assert (await rig.ask("GET", "/_balancer/ready")).status == 503
        assert (await rig.ask("POST", "/api/chat", CHAT)).status == 503


@virtual
async def test_who_names_the_balancer_itself_is_told_which_backend_it_is() -> None:
    """A call that comes round ends in 508; the text names what leads here and where to mend it."""
    async with running(0, models=models(0.0)) as rig:
        await reload(rig, backends=[{"name": "round", "url": rig.url}])
        token = rig.balancer.front._token
        looped = await rig.ask("POST", "/api/chat", CHAT, Via=f"1.1 {token}")
        assert looped.status == 508
        assert error_of(looped).startswith(
            "This balancer forwarded the request to itself: its backend round "
            f"({rig.url}, --backend) leads back here. Take it out there."
        )
        head = f"GET /api/tags HTTP/1.1\r\nHost: localhost\r\nVia: 1.0 x, 1.1 {token}\r\n\r\n"
        named = await rig.raw(head.encode())
        assert "itself: one of its backends leads back here." in error_of(named)


@virtual
async def test_calls_that_come_round_are_served_elsewhere() -> None:
    """Beside a backend that is ourselves, one that is none serves every call."""
    async with running(1, models=models(0.0)) as rig:
        real = {"name": "a", "url": rig.fleet["a"].url}
        await reload(rig, backends=[real, {"name": "round", "url": rig.url}])
        await rig.watching()
        assert await served_by(rig, 8) == {"a"}
