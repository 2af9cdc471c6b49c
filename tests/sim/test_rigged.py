"""Hosts of the virtual world behind a socket: lists, loads, streams, refusals, their timeline."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from balancer.sim.bodies import Bodies
from balancer.sim.jobs import Job
from balancer.sim.loop import run
from balancer.sim.machine import HOST_TYPES, MAX_QUEUE, Host, Machine, Model, Told, Work
from balancer.sim.rigged import LoopTimeline, RiggedOllama
from balancer.sim.world import Stranger
from tests.sim.wire import Reply, ask

pytestmark = pytest.mark.usefixtures("quiet")

M, N, E = Model("m"), Model("n"), Model("e", 0.3, 0.14, 0.0, embedding=True)
JOBS = [Job(0.0, "m", 386, 50), Job(0.0, "e", 100, 0)]


@asynccontextmanager
async def rigged(*warm: str) -> AsyncIterator[tuple[RiggedOllama, list[Told]]]:
    """One host of a 3090, and what it told of the jobs that it answered."""
    timeline = LoopTimeline(asyncio.get_running_loop())
    host = Host(Machine("h", HOST_TYPES["rtx3090"]), [M, N, E], timeline)
    for name in warm:
        host.load_now(name)
    told: list[Told] = []
    bodies = Bodies(JOBS, [M, N, E])
    over = lambda _, what: told.append(what)  # noqa: E731 - one line says it
    async with RiggedOllama(host, timeline, bodies, over) as site:
        yield site, told
    timeline.close()


async def post(site: RiggedOllama, path: str, **body: Any) -> Reply:
    """One request."""
    return await ask(site.port, "POST", path, body)


def test_lists_tell_what_the_host_has() -> None:
    """Version, models and memory, in the shapes of Ollama."""

    async def scenario() -> None:
        async with rigged("m") as (site, _):
            tags, ps, show = (
                await ask(site.port, "GET", "/api/tags"),
                await ask(site.port, "GET", "/api/ps"),
                await post(site, "/api/show", model="e"),
            )
            assert [row["name"] for row in json.loads(tags.body)["models"]] == [
                "m:latest",
                "n:latest",
                "e:latest",
            ]
            assert [row["name"] for row in json.loads(ps.body)["models"]] == ["m:latest"]
            assert json.loads(show.body)["capabilities"] == ["embedding"]
            strange = await ask(site.port, "GET", "/api/strange")
            assert (strange.status, strange.body) == (404, b"404 page not found")
            assert (await ask(site.port, "GET", "/api/chat")).status == 405

    run(scenario())


def test_a_stream_takes_its_time_and_has_a_record_for_each_token() -> None:
    """As long as the physics says, and its figures are in the last record."""

    async def scenario() -> None:
        async with rigged("m") as (site, told):
            path, body = site.bodies.of(0)
            began = site.loop.time()
            reply = await ask(site.port, "POST", path, body)
            records = [json.loads(line) for line in reply.body.splitlines()]
            assert len(records) == 51
            last = records[-1]
            assert (last["prompt_eval_count"], last["eval_count"]) == (386, 50)
            took_s = site.loop.time() - began
            assert took_s == pytest.approx(0.1219 + 49 / 112, abs=0.002)
            assert last["total_duration"] / 1e9 == pytest.approx(took_s, abs=0.001)
            assert [each.output_tokens for each in told] == [50]

    run(scenario())


def test_empty_calls_load_and_unload() -> None:
    """A load takes as long as the file is large; a keep-alive of 0 takes it out again."""

    async def scenario() -> None:
        async with rigged() as (site, _):
            began = site.loop.time()
            loaded = await post(site, "/api/generate", model="m", prompt="", stream=False)
            assert json.loads(loaded.body)["done_reason"] == "load"
            assert site.loop.time() - began == pytest.approx(4.9 / 1.5 + 1.0, abs=0.01)
            await post(site, "/api/embed", model="e", input=[], keep_alive="10m")
            assert site.host.runners["e"].keep_alive_s == 600.0
            await post(site, "/api/generate", model="m", prompt="", keep_alive=0)
            assert list(site.host.runners) == ["e"]

    run(scenario())


def test_embeddings_and_strangers_are_answered() -> None:
    """A vector for a job; a canary is as long as it asks to be."""

    async def scenario() -> None:
        async with rigged("m", "e") as (site, told):
            path, body = site.bodies.of(1)
            vectors = await ask(site.port, "POST", path, body)
            assert json.loads(vectors.body)["embeddings"] == [[0.6, 0.8]]
            canary = await post(
                site, "/api/generate", model="m", prompt=".", options={"num_predict": 8}
            )
            assert json.loads(canary.body.splitlines()[-1])["eval_count"] == 8
            assert len(told) == 1

    run(scenario())


def test_a_full_queue_for_loads_is_refused() -> None:
    """And so is a model that is not there."""

    async def scenario() -> None:
        async with rigged() as (site, _):
            for _number in range(MAX_QUEUE + 1):  # one of them loads
                site.host.submit(Work("m", Stranger(), 10, 5))
            full = await post(site, "/api/generate", model="m", prompt="")
            assert (full.status, "busy" in full.body.decode()) == (503, True)
            assert (await post(site, "/api/generate", model="x", prompt="")).status == 404

    run(scenario())


def test_who_hangs_up_is_dropped() -> None:
    """Nothing of the call is left on the host."""

    async def scenario() -> None:
        async with rigged("m") as (site, _):
            path, body = site.bodies.of(0)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ask(site.port, "POST", path, body), 0.3)
            await asyncio.sleep(0.01)
            assert (list(site.host.works()), site.streams) == ([], {})

    run(scenario())


def test_a_loop_drives_a_timeline() -> None:
    """In order, not before its time, and what was cancelled does not happen."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        timeline = LoopTimeline(loop)
        seen: list[tuple[str, float]] = []

        def note(name: str) -> None:
            seen.append((name, loop.time()))

        def begin() -> None:
            timeline.after(1.0, note, "b")

        timeline.at(3.0, note, "c")
        timeline.at(1.0, begin)
        timeline.cancel(timeline.at(0.5, note, "never"))
        await asyncio.sleep(10.0)
        assert [name for name, _ in seen] == ["b", "c"]
        assert [at for _, at in seen] == pytest.approx([2.0, 3.0])
        timeline.catch_up()
        assert timeline.now == pytest.approx(10.0)
        timeline.at(11.0, note, "closed")
        timeline.close()
        await asyncio.sleep(5.0)
        assert len(seen) == 2

    run(scenario())
