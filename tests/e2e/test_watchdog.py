"""Hangs that no status code shows are found; patience that is needed is had."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from balancer.core.events import Suspected, TrialEnded
from balancer.sim.delivery import Seen
from balancer.sim.host import Settings
from tests.e2e.stage import (
    CHAT,
    LATE_HEAD,
    ROUTES,
    Asking,
    is_whole,
    models,
    moves,
    now,
    verdicts,
    virtual,
)
from tests.rig import Rig, running

pytestmark = pytest.mark.usefixtures("quiet")

FOUND_S = 35.0
SHORT = {"options": {"num_predict": 20}}


def ours(rig: Rig, host: str) -> list[Seen]:
    """Loads and canaries on a host."""
    return [
        s for s in rig.fleet[host].requests if s in rig.inference() and s not in rig.forwarded()
    ]


async def known(rig: Rig) -> None:
    """Have `m` in memory on a, loaded by a call of ours, so that its options are known."""
    reply = await rig.ask("POST", "/api/chat", CHAT)
    assert reply.get("x-balancer-backend") == "a"
    await asyncio.sleep(10.0)


async def until_suspected(rig: Rig) -> None:
    """Wait for the watchdog's first suspicion, half a minute at most."""
    async with asyncio.timeout(30.0):
        while not rig.events.of(Suspected):
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("fault", ["hang", "freeze", "hang_inference"])
@pytest.mark.parametrize("route", ["chat, streamed", "v1 chat, streamed", "generate", "embed"])
@virtual
async def test_a_hang_is_found_and_the_call_served_elsewhere(route: str, fault: str) -> None:
    """Silence on a loaded model costs a call at most 35 s; its host is closed off, once blamed."""
    path, body = ROUTES[route]
    body = body if "input" in body else body | SHORT
    async with running(2, models=models(0.0), **LATE_HEAD) as rig:
        for host in "ab":
            await rig.warm(host, body["model"])
        await asyncio.sleep(1.0)
        rig.fleet["a"].faults.apply(fault)
        began = now()
        reply = await rig.ask("POST", path, body)
        assert is_whole(reply, path)
        assert (reply.get("x-balancer-backend"), reply.get("x-balancer-attempts")) == ("b", "2")
        assert (rig.calls()[0].first_byte_s or 99.0) <= FOUND_S + 2.0 * (route == "generate")
        assert verdicts(rig) == [("a", "slow"), ("b", "ok")]
        assert moves(rig)[0] == ("a", None, "open")
        began = now()
        assert is_whole(await rig.ask("POST", path, body), path)
        assert now() - began < 3.0


@virtual
async def test_all_that_waits_there_goes_elsewhere() -> None:
    """One canary settles it for every call without a byte; a stream that had some is left alone."""
    async with running(
        2, models=models(0.0, speed=0.05), settings=Settings(num_parallel=8), **LATE_HEAD
    ) as rig:
        for host in "ab":
            await rig.warm(host, "m")
        stream = await Asking.of(rig, "/api/chat", CHAT)
        await stream.head()
        rig.fleet["a"].faults.hang_inference()
        waiting = [await Asking.of(rig, "/api/chat", CHAT) for _ in range(3)]
        heads = [await each.head() for each in waiting]
        assert {head.get("x-balancer-backend") for head in heads} == {"b"}
        assert now() < 80.0
        assert is_whole(await stream.rest(), "/api/chat")
        for each in (stream, *waiting):
            if each is not stream:
                await each.rest()
            each.close()
        assert len(rig.events.of(Suspected)) <= 2


@virtual
async def test_a_green_check_does_not_close_the_breaker() -> None:
    """While inference hangs, checks are good and canaries are not; only a canary brings it back."""
    async with running(2, models=models(0.0), settings=Settings(keep_alive_s=1e6)) as rig:
        await known(rig)
        rig.fleet["a"].faults.hang_inference()
        while not moves(rig):
            assert is_whole(await rig.ask("POST", "/api/chat", CHAT), "/api/chat")
        for _ in range(30):
            await asyncio.sleep(10.0)
            assert rig.balancer.pool.members["a"].health.up
            assert rig.balancer.pool.members["a"].gate.state.value != "closed"
        trials = rig.events.of(TrialEnded)
        assert len(trials) < 15
        assert {(trial.kind, trial.ok) for trial in trials} == {("canary", False)}
        rig.fleet["a"].faults.heal()
        await asyncio.sleep(100.0)
        assert moves(rig)[-1] == ("a", None, "closed")
        assert (rig.events.of(TrialEnded)[-1].kind, rig.events.of(TrialEnded)[-1].ok) == (
            "canary",
            True,
        )


@pytest.mark.parametrize("options", [{"num_ctx": 8192, "num_gpu": 7}, {"num_gpu": 7}, {}])
@virtual
async def test_a_canary_neither_reloads_nor_pins(options: dict[str, int]) -> None:
    """Its context is the one in memory, its other options those of the load; no keep_alive."""
    body = CHAT | {"options": options, "keep_alive": "20s"}
    async with running(1, models=models(2.0)) as rig:
        assert is_whole(await rig.ask("POST", "/api/chat", body), "/api/chat")
        await asyncio.sleep(6.0)
        (row,) = json.loads((await rig.ask("GET", "/api/ps")).body)["models"]
        rig.balancer.pool.members["a"].gate.trip("for the test")
        await rig.events.until(lambda: bool(rig.events.of(TrialEnded)))
        _, canary = ours(rig, "a")
        assert json.loads(canary.body) == {
            "model": "m:latest",
            "prompt": "1",
            "stream": False,
            "options": options | {"num_ctx": row["context_length"], "num_predict": 8},
        }
        assert row["context_length"] == options.get("num_ctx", 4096)
        assert rig.fleet["a"].host.counts["loads_started"] == 1
        assert moves(rig)[-1] == ("a", None, "closed")
        await asyncio.sleep(30.0)
        assert rig.loaded() == {"a": []}


@virtual
async def test_no_canary_where_the_options_are_unknown() -> None:
    """A model that somebody else loaded could be reloaded by one: its host gets none."""
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        await asyncio.sleep(6.0)
        rig.balancer.pool.members["a"].gate.trip("for the test")
        await rig.events.until(lambda: bool(rig.events.of(TrialEnded)))
        assert [(trial.kind, trial.ok) for trial in rig.events.of(TrialEnded)] == [
            ("version", True)
        ]
        assert len(ours(rig, "a")) == 1  # the one that loaded it


@virtual
async def test_slow_but_moving_is_no_hang() -> None:
    """Seven seconds a word, one at a time: those behind wait minutes, and nobody is suspected."""
    more: dict[str, Any] = {"backend": {"slots": 3}, "settings": Settings(num_parallel=1)}
    async with running(2, models=models(0.0), **more) as rig:
        await rig.warm("a", "m")
        rig.fleet["b"].faults.lose("m")
        await asyncio.sleep(31.0)
        rig.fleet["a"].faults.slow(70.0)
        calls = [await Asking.of(rig, "/api/chat", CHAT) for _ in range(3)]
        for each in calls:
            await each.head()
            assert is_whole(await each.rest(), "/api/chat")
            each.close()
        assert max(call.first_byte_s or 0.0 for call in rig.calls()) > 250.0
        assert rig.events.of(Suspected) == []
        assert moves(rig) == []
        assert verdicts(rig) == [("a", "ok")] * 3


@pytest.mark.parametrize("stream", [True, False])
@virtual
async def test_a_long_prompt_on_a_slow_host(stream: bool) -> None:
    """A CPU that reads 30 tokens a second may be silent for minutes over five thousand."""
    slow = tuple(replace(model, prompt_tps=30.0) for model in models(0.0))
    words = " ".join(f"word{n}" for n in range(3000))
    body = CHAT | {"messages": [{"role": "user", "content": words}], "stream": stream}
    async with running(2, models=slow, **LATE_HEAD) as rig:
        for host in "ab":
            await rig.warm(host, "m")
        reply = await rig.ask("POST", "/api/chat", body)
        assert is_whole(reply, "/api/chat")
        assert (rig.calls()[0].first_byte_s or 0.0) > 60.0
        assert rig.events.of(Suspected) == []
        assert reply.get("x-balancer-attempts") == "1"


@virtual
async def test_a_long_answer_in_one_piece() -> None:
    """A call that does not stream is silent for its whole answer; that is no hang."""
    async with running(2, models=models(0.0, speed=0.2)) as rig:
        for host in "ab":
            await rig.warm(host, "m")
        began = now()
        for body in (
            CHAT | {"stream": False},
            CHAT | {"stream": False, "options": {"num_ctx": 4096}},
        ):
            assert is_whole(await rig.ask("POST", "/api/chat", body), "/api/chat")
        assert now() - began > 15.0
        assert moves(rig) == []


@virtual
async def test_one_model_hangs_and_the_others_move() -> None:
    """Its own breaker opens, the host's stays shut, and the other models stay in use there."""
    more: dict[str, Any] = {"settings": Settings(num_parallel=4), "breaker.host.in_a_row": 1}
    more["routing.strategy"] = "warm-first"  # others would leave a host so slow for a better one
    async with running(2, models=models(0.0), **more, **LATE_HEAD) as rig:
        await rig.warm("a", "m")
        await rig.warm("a", "other")
        rig.fleet["a"].faults.fail("m", "never told", 500, "run", 100_000.0)
        asking = await Asking.of(rig, "/api/chat", CHAT)
        began = now()
        while not moves(rig):
            reply = await rig.ask("POST", "/api/chat", CHAT | {"model": "other"})
            assert reply.get("x-balancer-backend") == "a"
        assert now() - began <= FOUND_S
        assert moves(rig) == [("a", "m:latest", "open")]
        head = await asking.head()
        assert head.get("x-balancer-backend") == "b"
        assert is_whole(await asking.rest(), "/api/chat")
        asking.close()
        assert {model for _, model, _ in moves(rig)} == {"m:latest"}


@virtual
async def test_a_call_that_got_lost_goes_elsewhere_unblamed() -> None:
    """The canary is answered, the call is not: after twice the wait another host serves it."""
    more: dict[str, Any] = {"routing.strategy": "warm-first"}  # the first is to be a
    async with running(2, models=models(0.0), **more, **LATE_HEAD) as rig:
        await known(rig)
        rig.fleet["a"].script("/api/chat", segments=[(10_000.0, b"x")], framing="chunked")
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert is_whole(reply, "/api/chat")
        assert (reply.get("x-balancer-backend"), reply.get("x-balancer-attempts")) == ("b", "2")
        assert 40.0 <= (rig.calls()[-1].first_byte_s or 0.0) < 2 * FOUND_S
        assert verdicts(rig)[1:] == [("a", "slow"), ("b", "ok")]
        assert moves(rig) == []


@virtual
async def test_nothing_new_is_sent_to_a_suspect() -> None:
    """While the canary is out, calls keep away from there, for all its free slots."""
    more: dict[str, Any] = {"backend": {"slots": 8}, "settings": Settings(num_parallel=8)}
    async with running(2, models=models(0.0), **more) as rig:
        await known(rig)
        rig.fleet["a"].faults.hang_inference()
        waiting = [await Asking.of(rig, "/api/chat", CHAT) for _ in range(2)]
        await until_suspected(rig)
        (suspected,) = rig.events.of(Suspected)
        assert (suspected.backend, suspected.model) == ("a", "m:latest")
        for _ in range(4):
            reply = await rig.ask("POST", "/api/chat", CHAT)
            assert (reply.get("x-balancer-backend"), reply.get("x-balancer-attempts")) == ("b", "1")
        for each in waiting:
            await each.head()
            assert is_whole(await each.rest(), "/api/chat")
            each.close()


@virtual
async def test_a_host_confirmed_dead() -> None:
    """No connection to be had three times over: what waits there goes elsewhere at once."""
    async with running(2, models=models(0.0)) as rig:
        for host in "ab":
            await rig.warm(host, "m")
        await asyncio.sleep(1.0)
        rig.fleet["a"].faults.hang_inference()
        asking = await Asking.of(rig, "/api/chat", CHAT | {"stream": False})
        await asyncio.sleep(0.1)
        rig.fleet["a"].faults.refuse()
        head = await asking.head()
        assert head.get("x-balancer-backend") == "b"
        assert is_whole(await asking.rest(), "/api/chat")
        asking.close()
        assert rig.calls()[0].duration_s < 20.0
        assert verdicts(rig) == [("a", "fault"), ("b", "ok")]
        assert rig.events.of(Suspected) == []
