"""A model that is not in memory: one load of ours, that nobody's impatience cancels."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from balancer.core.events import LoadEnded, LoadStarted, Suspected
from balancer.sim.delivery import Seen
from balancer.sim.host import Settings
from tests.e2e.stage import (
    CHAT,
    LATE_HEAD,
    ROUTES,
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
from tests.sim.wire import Reply, ask

pytestmark = pytest.mark.usefixtures("quiet")

EMBED = {"model": "e", "input": "hi"}
ROOMY: dict[str, Any] = {"settings": Settings(num_parallel=16), "backend": {"slots": 16}}


def ours(rig: Rig) -> list[Seen]:
    """Loads and canaries: inference that no client sent."""
    return [seen for seen in rig.inference() if "Via" not in dict(seen.headers)]


def loads(rig: Rig) -> dict[str, int]:
    """Loads begun, by host."""
    return {host.name: host.host.counts["loads_started"] for host in rig.fleet}


async def together(rig: Rig, count: int, path: str = "/api/chat", **more: Any) -> list[Reply]:
    """So many calls at once, and their answers."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(rig.ask("POST", path, CHAT | more)) for _ in range(count)]
    return [task.result() for task in tasks]


@virtual
async def test_many_callers_make_one_load() -> None:
    """Ten calls for a cold model on three hosts: one load in all, and ten answers."""
    async with running(3, models=models(20.0), **ROOMY, **LATE_HEAD) as rig:
        replies = await together(rig, 10)
        assert all(is_whole(reply, "/api/chat") for reply in replies)
        assert {reply.get("x-balancer-route") for reply in replies} == {"cold", "warm"}
        assert sum(loads(rig).values()) == 1
        (load,) = ours(rig)
        sent = {"model": "m:latest", "prompt": "", "stream": False}
        assert json.loads(load.body) == sent


@virtual
async def test_a_client_that_leaves_does_not_end_the_load() -> None:
    """Its own call is gone at once; the load ends well, and the next call finds the model."""
    async with running(2, models=models(20.0)) as rig:
        asking = await Asking.of(rig, "/api/chat", CHAT)
        await rig.events.until(lambda: bool(rig.events.of(LoadStarted)))
        await asyncio.sleep(5.0)
        left_at = now()
        asking.hang_up()
        (told,) = await rig.ended()
        assert now() - left_at < 1.0
        assert (told.outcome, told.phase, told.status) == ("client_abort", "queued", 499)
        assert rig.balancer.dispatcher.waiting() == []
        await asyncio.sleep(20.0)
        assert [load.ending for load in ours(rig)] == ["ok"]
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert (is_whole(reply, "/api/chat"), reply.get("x-balancer-queue-ms")) == (True, "0")
        assert sum(loads(rig).values()) == 1
        assert moves(rig) == []


@virtual
async def test_the_caller_a_load_was_made_for_leaves() -> None:
    """Those who wait for the same load are served by it all the same."""
    async with running(2, models=models(20.0)) as rig:
        first = await Asking.of(rig, "/api/chat", CHAT)
        await rig.events.until(lambda: bool(rig.events.of(LoadStarted)))
        second = await Asking.of(rig, "/api/chat", CHAT)
        await asyncio.sleep(1.0)
        first.hang_up()
        await second.head()
        assert is_whole(await second.rest(), "/api/chat")
        second.close()
        assert sum(loads(rig).values()) == 1


@virtual
async def test_one_load_at_a_time_on_a_host() -> None:
    """Three cold models are loaded one after the other; every caller is served."""
    async with running(1, models=models(10.0)) as rig:
        async with asyncio.TaskGroup() as group:
            calls = [
                group.create_task(rig.ask("POST", "/api/chat", CHAT)),
                group.create_task(rig.ask("POST", "/api/chat", CHAT | {"model": "other"})),
                group.create_task(rig.ask("POST", "/api/embed", EMBED)),
            ]
        assert [call.result().status for call in calls] == [200, 200, 200]
        told = [e for e in rig.events.events if isinstance(e, (LoadStarted, LoadEnded))]
        assert [type(e) for e in told] == [LoadStarted, LoadEnded] * 3
        assert rig.fleet["a"].host.counts["loads_aborted"] == 0


@pytest.mark.parametrize("route", ["embed", "v1 embeddings"])
@virtual
async def test_a_model_that_embeds_is_loaded_by_embedding(route: str) -> None:
    """Generate would refuse it: its load goes through /api/embed, with nothing to embed."""
    path, body = ROUTES[route]
    async with running(1, models=models()) as rig:
        assert is_whole(await rig.ask("POST", path, body), path)
        (load,) = ours(rig)
        assert (load.path, json.loads(load.body)) == (
            "/api/embed",
            {"model": "e:latest", "input": []},
        )


@virtual
async def test_a_load_beyond_its_budget() -> None:
    """It is given up when the budget is spent, and another host loads; one opens no breaker."""
    async with running(2, models=models(5.0), config={"timeouts.load": "30s"}, **LATE_HEAD) as rig:
        rig.fleet["a"].faults.slow_load(20.0)
        began = now()
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert is_whole(reply, "/api/chat")
        assert [reply.get(f"x-balancer-{n}") for n in ("backend", "attempts")] == ["b", "2"]
        assert 35.0 <= now() - began < 40.0
        first, second = rig.events.of(LoadEnded)
        assert (first.backend, first.ok, round(first.load_s)) == ("a", False, 30)
        assert "time budget" in first.text
        assert second.ok
        assert ours(rig)[0].ending == "client-gone"
        assert rig.fleet["a"].host.counts["loads_aborted"] == 1
        assert moves(rig) == []


@virtual
async def test_a_load_beyond_its_budget_everywhere() -> None:
    """Two loads are tried, then 503 says what was; a third host is left alone."""
    async with running(
        3, models=models(100.0), config={"timeouts.load": "30s"}, **LATE_HEAD
    ) as rig:
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert reply.status == 503
        assert error_of(reply).count("did not finish in its time budget") == 2
        assert sum(loads(rig).values()) == 2


@virtual
async def test_the_calls_options_go_into_the_load() -> None:
    """What would reload the model is in the load, what would not is not: one load in all."""
    options = {"num_ctx": 8192, "num_gpu": 5, "temperature": 0.5, "num_predict": 3}
    async with running(1, models=models()) as rig:
        body = CHAT | {"options": options, "keep_alive": "7m"}
        reply = await rig.ask("POST", "/api/chat", body)
        assert records(reply)[-1]["done_reason"] == "length"
        (load,) = ours(rig)
        sent = json.loads(load.body)
        assert sent["options"] == {"num_ctx": 8192, "num_gpu": 5}
        assert sent["keep_alive"] == "7m"
        assert loads(rig) == {"a": 1}
        (row,) = json.loads((await rig.ask("GET", "/api/ps")).body)["models"]
        assert row["context_length"] == 8192


@virtual
async def test_other_options_are_another_copy() -> None:
    """A runner with another context is no copy for this call; in the end each has its own host."""
    async with running(2, models=models()) as rig:

        async def in_turn(rounds: int) -> None:
            for context in (4096, 16384) * rounds:
                body = CHAT | {"options": {"num_ctx": context}}
                assert is_whole(await rig.ask("POST", "/api/chat", body), "/api/chat")

        await in_turn(2)
        before = loads(rig)
        assert min(before.values()) == 1
        assert sum(before.values()) <= 3
        await in_turn(4)
        assert loads(rig) == before


@pytest.mark.parametrize("keep_alive", [0, "0", "0s", "0m", 0.0, "0h0m0s"])
@virtual
async def test_a_call_that_unloads_behind_itself(keep_alive: Any) -> None:
    """The load does not have it, which would end it at once; the call itself does."""
    async with running(1, models=models()) as rig:
        reply = await rig.ask("POST", "/api/chat", CHAT | {"keep_alive": keep_alive})
        assert is_whole(reply, "/api/chat")
        (load,) = ours(rig)
        assert "keep_alive" not in json.loads(load.body)
        assert loads(rig) == {"a": 1}
        assert rig.loaded() == {"a": []}


@virtual
async def test_a_load_that_fails_by_its_callers_mistake() -> None:
    """That call alone hears of it, after a second opinion; who waits for the same is served."""
    text = b'{"error":"option \\"num_ctx\\" is odd"}'
    async with running(2, models=models(5.0)) as rig:
        rig.fleet["a"].script("/api/generate", status=500, segments=[(2.0, text)])
        rig.fleet["b"].script("/api/chat", status=500, segments=[text])
        first, second = await together(rig, 2)
        assert (first.status, first.body) == (500, text)
        assert first.get("x-balancer-attempts") == "2"
        assert is_whole(second, "/api/chat")
        assert moves(rig) == []


@pytest.mark.parametrize("stream", [True, False])
@virtual
async def test_a_slow_load_is_never_cut(stream: bool) -> None:
    """Longer than any patience and than the queue's limit: nobody is suspected, all are served."""
    async with running(2, models=models(200.0), config={"queue.max_wait": "40s"}) as rig:
        first = await Asking.of(rig, "/api/chat", CHAT | {"stream": stream})
        await asyncio.sleep(190.0)
        second = await Asking.of(rig, "/api/chat", CHAT | {"stream": stream})
        for asking in (first, second):
            await asking.head()
            assert is_whole(await asking.rest(), "/api/chat")
            asking.close()
        assert rig.events.of(Suspected) == []
        assert rig.fleet["a"].host.counts["loads_aborted"] == 0
        assert rig.calls()[0].queue_s == pytest.approx(200.0, abs=0.1)
        assert verdicts(rig) == [("a", "ok")] * 2


@virtual
async def test_an_overdue_load_lets_another_host_try() -> None:
    """A load far slower than its size suggests no longer holds its callers up; nothing is cut."""
    async with running(2, models=models(5.0), **LATE_HEAD) as rig:
        rig.fleet["a"].faults.slow_load(60.0)
        began = now()
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert (is_whole(reply, "/api/chat"), reply.get("x-balancer-backend")) == (True, "b")
        assert now() - began < 60.0
        await asyncio.sleep(300.0)
        assert [load.ending for load in ours(rig)] == ["ok", "ok"]


@virtual
async def test_the_queues_limit_counts_from_the_end_of_the_load() -> None:
    """A slot that does not come free afterwards is waited for as long as the queue allows."""
    more: dict[str, Any] = {"backend": {"slots": 1}, "queue.max_wait": "30s"}
    async with running(1, models=models(50.0, speed=0.05), **more, **LATE_HEAD) as rig:
        first = await Asking.of(rig, "/api/chat", CHAT)
        second = await Asking.of(rig, "/api/chat", CHAT)
        refused = await second.head()
        assert refused.status == 503
        assert "No slot came free for 'm' in 30 s" in error_of(await second.rest())
        assert rig.calls()[0].duration_s == pytest.approx(80.0, abs=0.2)
        second.close()
        first.hang_up()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"model": "m", "messages": [], "keep_alive": 0}),
        ("/api/generate", {"model": "m", "keep_alive": "0s"}),
        ("/api/generate", {"model": "m", "prompt": "", "keep_alive": 0, "stream": False}),
    ],
)
@virtual
async def test_an_unload_reaches_every_copy(path: str, body: dict[str, Any]) -> None:
    """Every backend that has the model in memory is told, no other; the answer is Ollama's."""
    async with running(3, models=models()) as rig:
        for host in "ac":
            await rig.warm(host, "m")
        await rig.warm("b", "other")
        reply = await rig.ask("POST", path, body)
        told = json.loads(reply.body)
        assert (reply.status, told["done"], told["done_reason"]) == (200, True, "unload")
        assert reply.get("x-balancer-backend") == "a,c"
        assert rig.loaded() == {"a": [], "b": ["other"], "c": []}
        assert (
            json.loads((await rig.ask("GET", "/api/ps")).body)["models"][0]["name"]
            == "other:latest"
        )


@virtual
async def test_what_is_unloaded_stays_away_until_somebody_asks() -> None:
    """However often it was asked for a moment ago, and though the planner has other work."""
    async with running(2, models=models()) as rig:
        for _ in range(20):
            await rig.ask("POST", "/api/chat", CHAT)
        assert (
            await rig.ask("POST", "/api/generate", {"model": "m", "keep_alive": 0})
        ).status == 200
        for _ in range(30):
            await rig.ask("POST", "/api/chat", CHAT | {"model": "other"})
            await asyncio.sleep(0.6)
        assert "m" not in {name for loaded in rig.loaded().values() for name in loaded}
        assert (await rig.ask("POST", "/api/chat", CHAT)).status == 200


@virtual
async def test_an_unload_of_what_is_not_loaded() -> None:
    """Of a model on disk it is done already, of an unknown one 404; no host is troubled."""
    async with running(2, models=models()) as rig:
        known = await rig.ask("POST", "/api/generate", {"model": "m", "keep_alive": 0})
        unknown = await rig.ask("POST", "/api/generate", {"model": "x", "keep_alive": 0})
        assert (known.status, unknown.status) == (200, 404)
        assert rig.inference() == []


@virtual
async def test_an_unload_reaches_what_somebody_else_has_loaded() -> None:
    """Past the balancer, a moment ago: `ollama stop` means all of it."""
    async with running(2, models=models()) as rig:
        await rig.warm("a", "m")
        there = rig.fleet["b"].port
        assert (await ask(there, "POST", "/api/generate", {"model": "m"})).status == 200
        reply = await rig.ask("POST", "/api/generate", {"model": "m", "keep_alive": 0})
        assert reply.get("x-balancer-backend") == "a,b"
        assert rig.loaded() == {"a": [], "b": []}


@virtual
async def test_an_unload_that_a_host_does_not_answer() -> None:
    """The client is told who did not, after half a minute at most."""
    async with running(2, models=models()) as rig:
        for host in "ab":
            await rig.warm(host, "m")
        rig.fleet["b"].faults.hang()
        began = now()
        reply = await rig.ask("POST", "/api/generate", {"model": "m", "keep_alive": 0})
        assert (reply.status, "unloaded from b" in error_of(reply)) == (503, True)
        assert now() - began <= 31.0
