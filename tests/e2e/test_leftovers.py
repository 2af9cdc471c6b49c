"""
What a call leaves behind for the collector: nothing.

It looks so rarely that whatever is held in a circle, a body among it, stays for hundreds of calls,
and no budget knows of it.
"""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any, cast

import pytest

from tests.e2e.stage import CHAT, Asking, warm
from tests.net.peer import both, until
from tests.rig import Rig

pytestmark = pytest.mark.usefixtures("quiet")
NDJSON = [("Content-Type", "application/x-ndjson")]
LINE = b'{"model":"m","message":{"role":"assistant","content":"x"},"done":false}\n'
DONE = b'{"model":"m","message":{"role":"assistant","content":""},"done":true,"eval_count":1}\n'
WHOLE = CHAT | {"stream": False}
LARGE = [{"role": "user", "content": "x" * 100_000}]
TASK = {"X_Request_Timeout": "600"}
CALLS: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, Any]]] = {
    "whole": (WHOLE, {}, {"segments": [DONE]}),
    "whole, in a task": (WHOLE, TASK, {"segments": [DONE]}),
    "whole, large": (WHOLE | {"messages": LARGE}, {}, {"segments": [DONE]}),
    "stream": (CHAT, {}, {"headers": NDJSON, "segments": [LINE, DONE], "framing": "chunked"}),
    "stream, in a task": (CHAT, TASK, {"headers": NDJSON, "segments": [LINE, DONE]}),
    "cut": (CHAT, {}, {"headers": NDJSON, "segments": [LINE], "length": 999, "ending": "cut"}),
    "failed over": (WHOLE, {}, {"status": 500, "segments": [b'{"error":"CUDA error"}']}),
    "unknown": (CHAT | {"model": "nobody"}, {}, {}),
    "unknown, in a task": (CHAT | {"model": "nobody"}, TASK, {}),
    "bad": ({"messages": []}, {}, {}),
    "foreign": (CHAT, {"Origin": "http://evil.example"}, {}),
}


def left() -> Counter[str]:
    """What of ours only the collector finds."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    found = [type(each) for each in gc.garbage]
    gc.garbage.clear()
    mine = [kind for kind in found if kind.__module__.startswith(("balancer.core", "balancer.net"))]
    return Counter(kind.__name__ for kind in mine)


async def asked(rig: Rig, asking: Asking, kind: str) -> None:
    """Make a call; its answer has been read."""
    body, headers, answer = CALLS[kind]
    if answer:
        rig.fleet["a"].script("/api/chat", **answer)
    asking.send(rig, "/api/chat", body, **headers)
    await asking.head()
    await asking.rest()


@pytest.mark.parametrize("kind", CALLS)
@both
async def test_a_call_leaves_nothing_in_circles(kind: str) -> None:
    """However it was answered."""
    async with warm(2 if kind == "failed over" else 1, speed=1000.0) as (rig, _):
        if kind == "failed over":
            await rig.warm("b", "m")
        asking = await Asking.of(rig, "/api/chat", WHOLE)
        await asking.head()
        await asking.rest()
        await asked(rig, asking, kind)
        if asking.reply.ended != "clean":
            asking = Asking(await rig.connect())
        gc.collect()
        gc.disable()
        try:
            count = len(rig.calls())
            await asked(rig, asking, kind)
            await rig.ended(count + 1)
            assert left() == {}
        finally:
            gc.enable()
            asking.close()


@pytest.mark.parametrize("begun", [False, True])
@both
async def test_a_client_that_leaves_takes_only_its_connection_along(*, begun: bool) -> None:
    """Of which nothing is large."""
    async with warm() as (rig, _):
        if begun:
            rig.fleet["a"].script(
                "/api/chat", headers=NDJSON, segments=[LINE], framing="chunked", ending="stall"
            )
        else:
            rig.fleet["a"].faults.hang_inference()
        gc.collect()
        gc.disable()
        try:
            asking = await Asking.of(rig, "/api/chat", CHAT)
            await until(lambda: bool(rig.forwarded()))
            if begun:
                await asking.head()
            asking.hang_up()
            await rig.ended()
            ended = {"Exchange", "Transaction", "Request", "Call", "Lease", "Attempt", "Relay"}
            assert not ended & {*left()}
        finally:
            gc.enable()


@pytest.mark.parametrize("size", [10, 60_000])
@both
async def test_a_connection_at_rest_holds_no_large_head(size: int) -> None:
    """Who is known by a small one need not be looked at again."""
    async with warm() as (rig, _):
        wire = await rig.connect()
        request = b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nX: %b\r\n\r\n" % (b"a" * size)
        for _ in range(2):
            wire.writer.write(request)
            assert (await wire.reply()).status == 200
        (resting,) = cast("Any", rig.balancer)._server.connections
        assert (resting.visitor is not None) is (size == 10)
        wire.close()
