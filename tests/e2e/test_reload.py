"""A new configuration: one swap in the middle of traffic, or none and the reason why."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from balancer.core.events import ConfigApplied, ConfigRejected, MemberJoined, MemberLeft
from tests.e2e.stage import (
    CHAT,
    LATE_HEAD,
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
    """It is checked and used at once, with all its slots; what runs elsewhere goes on."""
    async with running(2, models=models(0.0)) as rig:
        await reload(rig, backends=places(rig, "a"))
        assert set(await served_by(rig)) == {"a"}
        stream = await Asking.of(rig, "/api/chat", CHAT)
        await stream.head()
        told = await reload(rig, backends=places(rig, "a", "b"))
        assert (told.status, json.loads(told.body)) == (
            200,
            {"reloaded": True, "changed": ["backends[b]"], "needs_restart": []},
        )
        await rig.watching()
        await rig.warm("b", "m")
        assert is_whole(await stream.rest(), "/api/chat")
        stream.close()
        assert rig.balancer.pool.members["b"].load.slots("m") == 2
        at_once = await asyncio.gather(*(served_by(rig, 1) for _ in range(4)))
        assert set(sum(at_once, Counter())) == {"a", "b"}
        assert [each.backend for each in rig.events.of(MemberJoined)] == ["a", "b", "b"]
        assert len(rig.events.of(ConfigApplied)) == 2


@virtual
async def test_the_memory_for_bodies_changes_at_once() -> None:
    """What is taken of it stays taken."""
    async with running(1, models=models(0.0), config={"server.replay_memory": 1000}) as rig:
        memory = rig.balancer.proxy.memory
        hold = memory.hold(2000)
        assert memory.is_over
        assert (await reload(rig, server__replay_memory=3000)).status == 200
        assert (memory.limit, memory.held, memory.is_over) == (3000, 2000, False)
        assert rig.balancer.proxy.memory is memory
        hold.give_back()


@virtual
async def test_a_backend_is_removed() -> None:
    """Its running stream ends well; it gets no new call, no check, and nobody blames it."""
    async with running(2, models=models(0.0)) as rig:
        for host in "ab":
            await rig.warm(host, "m")
        streams = [await Asking.of(rig, "/api/chat", CHAT) for _ in range(2)]
        heads = [await each.head() for each in streams]
        assert {head.get("x-balancer-backend") for head in heads} == {"a", "b"}
        await reload(rig, backends=places(rig, "a"))
        seen = len(rig.fleet["b"].requests)
        assert set(await served_by(rig)) == {"a"}
        for each in streams:
            assert is_whole(await each.rest(), "/api/chat")
            each.close()
        await asyncio.sleep(60.0)
        assert len(rig.fleet["b"].requests) == seen
        assert [each.backend for each in rig.events.of(MemberLeft)] == ["b"]
        assert {verdict for _, verdict in verdicts(rig)} == {"ok"}


@virtual
async def test_a_removed_backend_that_dies_is_told_to_its_client() -> None:
    """A stream that breaks on a backend no longer configured ends in an error record as any."""
    async with running(2, models=models(0.0)) as rig:
        await rig.warm("b", "m")
        stream = await Asking.of(rig, "/api/chat", CHAT)
        await stream.head()
        await stream.record()
        await reload(rig, backends=places(rig, "a"))
        rig.fleet["b"].faults.restart(1000.0)
        reply = await stream.rest()
        stream.close()
        assert reply.ended == "clean"
        assert b"backend b closed the connection" in reply.body.splitlines()[-1]
        assert moves(rig) == []


@virtual
async def test_a_backend_goes_while_it_loads() -> None:
    """The load ends with it, and who waited for it is served by another host."""
    async with running(2, models=models(20.0), **LATE_HEAD) as rig:
        asking = await Asking.of(rig, "/api/chat", CHAT)
        await asyncio.sleep(5.0)
        await reload(rig, backends=places(rig, "b"))
        head = await asking.head()
        assert head.get("x-balancer-backend") == "b"
        assert is_whole(await asking.rest(), "/api/chat")
        asking.close()
        assert rig.inference()[0].ending == "client-gone"
        assert rig.calls()[-1].duration_s == pytest.approx(27.0, abs=0.5)


@virtual
async def test_the_same_name_elsewhere_is_another_backend() -> None:
    """A new url means new checks and new memory under the old name."""
    async with running(3, models=models(0.0)) as rig:
        await reload(rig, backends=places(rig, "a", "b"))
        moved = {"name": "b", "url": rig.fleet["c"].url}
        await reload(rig, backends=[*places(rig, "a"), moved])
        await rig.watching()
        rig.fleet["a"].faults.refuse()
        assert set(await served_by(rig)) == {"b"}
        assert len(rig.fleet["c"].requests) > 6
        assert [seen for seen in rig.fleet["b"].requests if "Via" in dict(seen.headers)] == []


@virtual
async def test_breakers_outlive_a_reload() -> None:
    """What was learned of the others is kept: open stays open, with its wait and its count."""
    async with running(3, models=models(0.0)) as rig:
        await reload(rig, backends=places(rig, "a", "b"))
        rig.fleet["a"].faults.fail("m")
        await rig.ask("POST", "/api/chat", CHAT)
        for host in "ab":
            await rig.warm(host, "other")
        rig.fleet["b"].faults.garbage()
        while len(moves(rig)) < 2:
            await rig.ask("POST", "/api/chat", CHAT | {"model": "other"})
        assert moves(rig)[:2] == [("a", "m:latest", "open"), ("b", None, "open")]
        before = rig.balancer.pool.snapshot()
        await reload(rig, backends=places(rig, "a", "b", "c"))
        after = {view.name: view for view in rig.balancer.pool.snapshot()}
        assert [after[view.name].breakers for view in before] == [v.breakers for v in before]
        await rig.watching()
        assert set(await served_by(rig)) == {"c"}


@virtual
async def test_a_new_strategy() -> None:
    """Least-loaded stays with the copy in memory, round-robin goes round; who waits is kept."""
    async with running(2, models=models(0.0, speed=10.0), backend={"slots": 1}) as rig:
        await rig.warm("a", "m")
        assert await served_by(rig) == {"a": 6}
        calls = [await Asking.of(rig, "/api/chat", CHAT) for _ in range(4)]
        await asyncio.sleep(0.1)
        assert rig.balancer.dispatcher.waiting()
        told = await reload(rig, routing__strategy="round-robin")
        assert json.loads(told.body)["changed"] == ["routing.strategy"]
        for each in calls:
            await each.head()
            assert is_whole(await each.rest(), "/api/chat")
            each.close()
        assert await served_by(rig) == {"a": 3, "b": 3}


@virtual
async def test_new_limits_of_the_queue() -> None:
    """They bind who comes next; who waits already keeps what was promised."""
    config = {"queue.adaptive": False}  # else who comes last hears at once that it is in vain
    async with running(1, models=models(0.0), backend={"slots": 1}, config=config) as rig:
        await rig.warm("a", "m")
        calls = [await Asking.of(rig, "/api/chat", CHAT) for _ in range(4)]
        await asyncio.sleep(0.5)
        await reload(rig, queue__max_depth_per_model=2, queue__max_wait="1s")
        full = await rig.ask("POST", "/api/chat", CHAT)
        assert (full.status, "Queue full: 3 calls wait" in error_of(full)) == (503, True)
        for each in calls:
            await each.head()
            assert is_whole(await each.rest(), "/api/chat")
            each.close()
        first = await Asking.of(rig, "/api/chat", CHAT)
        await first.head()
        began = now()
        late = await rig.ask("POST", "/api/chat", CHAT)
        assert late.status == 503
        assert now() - began == pytest.approx(1.0, abs=0.01)
        first.hang_up()


@pytest.mark.parametrize("how", [{"enabled": False}, {"models": {"deny": ["m*"]}}])
@virtual
async def test_a_backend_is_closed_to_a_model(how: dict[str, Any]) -> None:
    """Switched off, or forbidden the model: no new call for it there."""
    async with running(2, models=models(0.0)) as rig:
        for host in "ab":
            await rig.warm(host, "m")
        assert set(await served_by(rig)) == {"a", "b"}
        await reload(rig, backends=[*places(rig, "a", **how), *places(rig, "b")])
        assert set(await served_by(rig)) == {"b"}


@virtual
async def test_keys_come_into_force() -> None:
    """The next request needs one; a stream that began without goes on."""
    async with running(1, models=models(0.0)) as rig:
        stream = await Asking.of(rig, "/api/chat", CHAT)
        await stream.head()
        key = {"name": "k", "role": "user", "key": "a-key-of-sixteen-and-more"}
        await reload(rig, auth__keys=[key], auth__anonymous="never")
        assert (await rig.ask("POST", "/api/chat", CHAT)).status == 401
        assert is_whole(await stream.rest(), "/api/chat")
        stream.close()


@virtual
async def test_a_bad_configuration_changes_nothing() -> None:
    """422 with every problem; the old one stays in force, is shown so, and a good one mends it."""
    async with running(2, models=models(0.0)) as rig:
        bad = await reload(rig, backends=[{"name": "x"}], queue__max_wait="soon")
        told = json.loads(bad.body)
        assert (bad.status, told["reloaded"]) == (422, False)
        assert len(told["problems"]) == 2
        assert "soon" in " ".join(told["problems"])
        assert set(rig.balancer.pool.members) == {"a", "b"}
        assert rig.balancer.dispatcher.admission.limits.max_wait_s == 120.0
        (rejected,) = rig.events.of(ConfigRejected)
        assert list(rejected.problems) == told["problems"]
        status = json.loads((await rig.ask("GET", "/_balancer/status")).body)
        assert status["config"]["rejected"] == told["problems"]
        assert status["config"]["loaded_s_ago"] == told["loaded_s_ago"]
        assert sum((await served_by(rig)).values()) == 6
        await reload(rig, backends=places(rig, "b"), queue__max_wait="9s")
        status = json.loads((await rig.ask("GET", "/_balancer/status")).body)
        assert status["config"]["rejected"] == []
        assert [each["name"] for each in status["backends"]] == ["b"]


@virtual
async def test_a_new_address_needs_a_restart() -> None:
    """It is told so, the rest is taken over, and the old address goes on answering."""
    async with running(1, models=models(0.0)) as rig:
        told = await reload(rig, server__listen=["127.0.0.1:1"], queue__max_depth=7)
        assert json.loads(told.body) == {
            "reloaded": True,
            "changed": ["queue.max_depth", "server.listen"],
            "needs_restart": ["server.listen"],
        }
        assert rig.balancer.dispatcher.admission.limits.max_depth == 7
        assert rig.events.of(ConfigApplied)[0].needs_restart == ("server.listen",)
        assert sum((await served_by(rig)).values()) == 6


@virtual
async def test_a_reload_under_traffic_costs_no_call() -> None:
    """Backends come and go every second among fifty calls: each is served whole."""
    async with running(3, models=models(0.0, speed=5.0)) as rig:
        calls = []
        shapes = ["ab", "bc", "ca", "b", "abc"]
        for number in range(50):
            calls.append(await Asking.of(rig, "/api/chat", CHAT))
            await asyncio.sleep(0.2)
            if number % 5 == 0:
                await reload(rig, backends=places(rig, *shapes[number // 5 % len(shapes)]))
        for each in calls:
            await each.head()
            assert is_whole(await each.rest(), "/api/chat")
            each.close()
        assert {call.outcome for call in rig.calls()} == {"ok"}


@virtual
async def test_what_is_known_of_routing_outlasts_what_does_not_concern_it() -> None:
    """Only another way of routing begins anew, with what the last one has learned."""
    async with running(2, models=models(0.0)) as rig:
        await served_by(rig)
        before = rig.balancer.dispatcher.learned()
        assert before["lengths"]
        scheduler = rig.balancer.dispatcher._scheduler
        await reload(rig, queue__max_wait="9s", backends=places(rig, "a"))
        assert rig.balancer.dispatcher._scheduler is scheduler
        await reload(rig, routing__affinity__ttl="5m")
        assert rig.balancer.dispatcher._scheduler is not scheduler
        assert rig.balancer.dispatcher.learned()["lengths"] == before["lengths"]
