"""What must not be held against a backend: odd options, odd names, long answers, late resets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from balancer.core.events import BreakerMoved
from tests.e2e.stage import CHAT, Asking, is_whole, models, virtual
from tests.rig import Rig, running

pytestmark = pytest.mark.usefixtures("quiet")

MODEL: str = str(CHAT["model"])
NDJSON = (("Content-Type", "application/x-ndjson"),)
DONE = b'{"model":"m","created_at":"x","message":{"role":"assistant","content":""},"done":true}\n'


def with_options(**options: Any) -> dict[str, Any]:
    """The usual call, with options."""
    return {**CHAT, "options": options}


def blames(rig: Rig) -> list[BreakerMoved]:
    """Breakers that moved."""
    return rig.events.of(BreakerMoved)


@virtual
async def test_options_of_a_callers_choosing() -> None:
    """A context that fits nowhere fails that call; the model stays in use for the others."""
    async with running(2, models=models(0.0)) as rig:
        for host in rig.fleet:
            host.faults.fail(MODEL, "model requires more system memory (9 TiB) than is available")
        for _ in range(2):
            reply = await rig.ask("POST", "/api/chat", with_options(num_ctx=10_000_000))
            assert reply.status == 500
        assert blames(rig) == []
        for host in rig.fleet:
            host.faults.heal()
        assert is_whole(await rig.ask("POST", "/api/chat", CHAT), "/api/chat")


@virtual
async def test_a_spelling_that_not_every_ollama_knows() -> None:
    """``m:local`` missing on an old host says nothing of ``m``."""
    async with running(2, models=models(0.0)) as rig:
        await rig.warm("a", MODEL)
        await rig.warm("b", MODEL)
        missing = b'{"error":"model not found"}'
        for _ in range(3):
            for host in rig.fleet:
                host.script("/api/chat", status=404, segments=[missing])
            odd = await rig.ask("POST", "/api/chat", {**CHAT, "model": f"{MODEL}:local"})
            assert odd.status == 404
            right = await rig.ask("POST", "/api/chat", CHAT)
            assert is_whole(right, "/api/chat")
        assert blames(rig) == []


@virtual
async def test_a_reset_after_the_last_record() -> None:
    """An answer that is complete is complete, however the connection ends."""
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", MODEL)
        for _ in range(4):
            rig.fleet["a"].script(
                "/api/chat", headers=NDJSON, segments=[DONE], framing="chunked", ending="reset"
            )
            reply = await rig.ask("POST", "/api/chat", CHAT)
            assert reply.body == DONE
        assert blames(rig) == []


@virtual
async def test_a_long_answer_in_one_piece() -> None:
    """Ten minutes of silence are no hang where the whole answer is one silence."""
    slow = models(0.0, speed=0.01)
    async with running(1, models=slow) as rig:
        await rig.warm("a", MODEL)
        body = {**CHAT, "stream": False}
        loop = asyncio.get_running_loop()
        began = loop.time()
        reply = await rig.ask("POST", "/api/chat", body)
        assert reply.status == 200
        assert loop.time() - began > 30
        assert blames(rig) == []


@virtual
async def test_no_waiting_at_all() -> None:
    """``queue.max_wait: 0`` refuses who would have to wait, not who need not."""
    async with running(1, models=models(0.0), config={"queue.max_wait": "0"}) as rig:
        await rig.warm("a", MODEL)
        assert is_whole(await rig.ask("POST", "/api/chat", CHAT), "/api/chat")


@virtual
async def test_a_backend_that_leaves_while_it_hangs() -> None:
    """Nobody watches over what was removed: a call without a byte goes elsewhere."""
    async with running(2, models=models(0.0)) as rig:
        await rig.warm("a", MODEL)
        await rig.warm("b", MODEL)
        rig.fleet["a"].faults.hang_inference()
        rig.config.update({"backends": [{"name": "a", "url": rig.fleet["a"].url}]})
        headers = {"Content_Type": "application/json"}
        assert (await rig.ask("POST", "/_balancer/reload", {}, **headers)).status == 200
        waiting = await Asking.of(rig, "/api/chat", CHAT)
        await asyncio.sleep(2)
        both = [{"name": name, "url": rig.fleet[name].url} for name in "ab"]
        rig.config.update({"backends": both})
        assert (await rig.ask("POST", "/_balancer/reload", {}, **headers)).status == 200
        await asyncio.sleep(3)
        rig.config.update({"backends": both[1:]})
        assert (await rig.ask("POST", "/_balancer/reload", {}, **headers)).status == 200
        async with asyncio.timeout(10):
            head = await waiting.head()
        assert head.status == 200
        await waiting.rest()
        waiting.close()
