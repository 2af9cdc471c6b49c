"""Clients that ask for different contexts: whether they push each other out is the operator's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from balancer.core.events import LoadEnded
from tests.e2e.stage import CHAT, HELLO, is_whole, models, virtual
from tests.rig import Rig, running
from tests.sim.wire import Reply

pytestmark = pytest.mark.usefixtures("quiet")

SMALL, LARGE = 3000, 8000
JSON = {"Content_Type": "application/json"}


async def ask(rig: Rig, num_ctx: int | None = None, path: str = "/api/chat", **more: Any) -> Reply:
    """A call that asks for a context, or for none; served whole."""
    options = {} if num_ctx is None else {"options": {"num_ctx": num_ctx, "temperature": 0.5}}
    reply = await rig.ask("POST", path, CHAT | options | more)
    assert is_whole(reply, path), reply
    return reply


async def alternate(rig: Rig, *contexts: int | None) -> list[int]:
    """Calls one after the other, five times; how many loads there were by the end of each round."""
    loads = []
    for _ in range(5):
        for num_ctx in contexts:
            await ask(rig, num_ctx)
        loads.append(rig.fleet["a"].host.counts["loads_started"])
    return loads


def sent(rig: Rig) -> list[Any]:
    """The contexts that hosts were asked for, by clients' calls."""
    bodies = [json.loads(seen.body) for seen in rig.forwarded()]
    return [body.get("options", {}).get("num_ctx") for body in bodies]


def reloads(rig: Rig) -> list[str]:
    """Why each load so far was one once more, or empty."""
    return [event.reloads for event in rig.events.of(LoadEnded)]


def metric(page: str, line: str) -> float:
    """The value of a series; 0: it is not there."""
    found = [row.rpartition(" ")[2] for row in page.splitlines() if row.startswith(f"{line} ")]
    return float(found[0]) if found else 0.0


@virtual
async def test_as_asked_two_clients_push_each_other_out() -> None:
    """Two contexts on one host: each call is a load, and told to be one too many."""
    async with running(1, models=models(1.0)) as rig:
        assert await alternate(rig, LARGE, SMALL) == [2, 4, 6, 8, 10]
        assert reloads(rig) == [""] + ["num_ctx"] * 9
        page = (await rig.ask("GET", "/metrics")).body.decode()
        assert metric(page, 'ollama_balancer_model_reloads_total{reason="num_ctx"}') == 9


@pytest.mark.parametrize(
    ("num_ctx", "contexts", "seen"),
    [
        ({"policy": "reuse"}, (LARGE, SMALL), [8192, 8192]),
        ({"policy": "reuse"}, (LARGE, None), [8192, 8192]),
        ({"policy": "pin", "default": 6000}, (LARGE, SMALL), [6000, 6000]),
        ({"policy": "pin", "default": 6000}, (None, LARGE), [6000, 6000]),
        ({"policy": "clamp", "max": 4000}, (LARGE, SMALL), [4000, 4000]),
        ({"policy": "reuse", "default": 8000}, (None, SMALL), [8192, 8192]),
    ],
    ids=str,
)
@virtual
async def test_brought_together_they_share_one_runner(
    num_ctx: dict[str, Any], contexts: tuple[int | None, ...], seen: list[int]
) -> None:
    """Reuse, pin and clamp: after the first load there is no other, whoever asks for what."""
    config = {"models.num_ctx": num_ctx}
    async with running(1, models=models(1.0), config=config) as rig:
        assert await alternate(rig, *contexts) == [1] * 5
        assert (sent(rig), reloads(rig)) == (seen * 5, [""])
        page = (await rig.ask("GET", "/metrics")).body.decode()
        assert "model_reloads_total{" not in page


@virtual
async def test_a_larger_context_is_one_more_load_and_then_serves_both() -> None:
    """Nobody gets less than was asked for: what is too small is replaced, once."""
    config = {"models.num_ctx": {"policy": "reuse"}}
    async with running(1, models=models(1.0), config=config) as rig:
        assert await alternate(rig, SMALL, LARGE) == [2] * 5
        assert sent(rig) == [4096, *[8192] * 9]
        assert reloads(rig) == ["", "num_ctx"]


@virtual
async def test_a_load_under_way_is_waited_for() -> None:
    """Of two that come together for a cold model, the second takes what is loaded for the first."""
    config = {"models.num_ctx": {"policy": "reuse"}}
    async with running(2, models=models(5.0), config=config) as rig:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(ask(rig, LARGE))
            await asyncio.sleep(1.0)
            second = group.create_task(ask(rig, SMALL))
        assert [t.result().get("x-balancer-backend") for t in (first, second)] == ["a", "a"]
        assert sent(rig) == [8192, 8192]
        assert sum(host.host.counts["loads_started"] for host in rig.fleet) == 1


@virtual
async def test_the_client_and_the_log_hear_of_it() -> None:
    """A header and two fields where the context was rewritten, and only there."""
    config = {"models.num_ctx": {"policy": "reuse"}}
    async with running(1, models=models(1.0), config=config) as rig:
        assert (await ask(rig, SMALL)).get("x-balancer-num-ctx") == "4096"
        assert (await ask(rig, 4096)).get("x-balancer-num-ctx") is None
        assert (await ask(rig)).get("x-balancer-num-ctx") == "4096"
        told = [(call.num_ctx_asked, call.num_ctx) for call in rig.calls()]
        assert told == [(3000, 4096), (None, None), (None, 4096)]


@virtual
async def test_v1_is_out_of_reach() -> None:
    """There is no context to be asked for: such a call gets the host's default, and loads it."""
    config = {"models.num_ctx": {"policy": "pin", "default": 6000}}
    async with running(1, models=models(1.0), config=config) as rig:
        await ask(rig, LARGE)
        await ask(rig, path="/v1/chat/completions")
        assert sent(rig) == [6000, None]
        assert rig.fleet["a"].host.counts["loads_started"] == 2


@virtual
async def test_an_alias_goes_by_the_rule_of_its_model() -> None:
    """Name and context are both rewritten; an override is of the model, not of the alias."""
    config = {
        "models.aliases": {"fast": "m"},
        "models.overrides": {"m*": {"num_ctx": {"policy": "pin", "default": 5000}}},
    }
    async with running(1, models=models(1.0), config=config) as rig:
        reply = await ask(rig, SMALL, model="fast")
        assert reply.get("x-balancer-num-ctx") == "5000"
        (seen,) = rig.forwarded()
        assert json.loads(seen.body) == {
            "model": "m",
            "messages": HELLO,
            "options": {"num_ctx": 5000, "temperature": 0.5},
        }


@pytest.mark.parametrize(
    ("keep_alive", "wanted"),
    [(-1, 600), ("-1s", 600), ("24h", 600), (601, 600), ("5m", "5m"), (0, 0), (600, 600)],
)
@virtual
async def test_nobody_keeps_a_model_for_longer_than_allowed(keep_alive: Any, wanted: Any) -> None:
    """For ever and too long become the most allowed, in the load too; less stays as it was."""
    config = {"models.keep_alive": {"policy": "clamp", "max": "10m"}}
    async with running(1, models=models(1.0), config=config) as rig:
        await ask(rig, keep_alive=keep_alive)
        (seen,) = rig.forwarded()
        assert json.loads(seen.body)["keep_alive"] == wanted
        given = [json.loads(each.body).get("keep_alive") for each in rig.inference()]
        assert keep_alive == wanted or keep_alive not in given


@virtual
async def test_no_keep_alive_is_added() -> None:
    """To a call that has none, nothing is; its body stays as it was, byte for byte."""
    config = {"models.keep_alive": {"policy": "clamp", "max": "10m"}}
    async with running(1, models=models(0.0), config=config) as rig:
        await ask(rig, SMALL)
        (seen,) = rig.forwarded()
        options = {"options": {"num_ctx": SMALL, "temperature": 0.5}}
        assert seen.body == json.dumps(CHAT | options).encode()


@virtual
async def test_what_an_operator_warms_is_what_calls_find() -> None:
    """With a pinned context the warm-up has it, and the first call is no load."""
    config = {"models.num_ctx": {"policy": "pin", "default": 6000}}
    async with running(1, models=models(1.0), config=config) as rig:
        warmed = await rig.ask("POST", "/_balancer/backends/a/warm?model=m", {}, **JSON)
        assert warmed.status == 200, warmed
        await ask(rig, SMALL)
        assert rig.fleet["a"].host.counts["loads_started"] == 1


@virtual
async def test_a_reload_of_the_configuration_changes_the_rule() -> None:
    """For the calls that come; those before went by the old one."""
    async with running(1, models=models(0.0)) as rig:
        await ask(rig, SMALL)
        rig.config["models.num_ctx"] = {"policy": "pin", "default": 6000}
        assert (await rig.ask("POST", "/_balancer/reload", {}, **JSON)).status == 200
        await ask(rig, SMALL)
        assert sent(rig) == [SMALL, 6000]


@virtual
async def test_explain_shows_what_becomes_of_the_context() -> None:
    """Policy, what is asked for and what it gets; and where others get something else."""
    config = {"models.num_ctx": {"policy": "reuse"}}
    async with running(1, models=models(1.0), config=config) as rig:
        reply = await rig.ask("GET", f"/_balancer/explain?model=m&num_ctx={SMALL}")
        told = json.loads(reply.body)
        assert told["options"] == {"num_ctx": 4096}
        assert told["num_ctx"] == {
            "policy": "reuse",
            "max": None,
            "asked": SMALL,
            "gets": 4096,
            "rewritten": True,
            "defaults": {},
        }
        await ask(rig)
        told = json.loads((await rig.ask("GET", "/_balancer/explain?model=m&num_ctx=8192")).body)
        assert (told["num_ctx"]["gets"], told["num_ctx"]["rewritten"]) == (8192, False)
        assert told["outcome"]["kind"] == "load"
        assert told["num_ctx"]["defaults"] == {"a": 4096}


@virtual
async def test_explain_does_not_make_up_what_a_call_asked_for() -> None:
    """Of one that went only the context it went with is kept; it is not placed anew either."""
    usual = {"policy": "reuse", "default": 8192}
    async with running(1, models=models(1.0), config={"models.num_ctx": usual}) as rig:
        await rig.ask("POST", "/api/chat", CHAT, X_Request_Id="mine")
        told = json.loads((await rig.ask("GET", "/_balancer/explain?call=mine")).body)
        assert told["options"] == {"num_ctx": 8192}
        context = told["num_ctx"]
        assert (context["asked"], context["gets"], context["rewritten"]) == (None, 8192, None)


async def rounds(rig: Rig, until: float, *, path: str = "/api/chat") -> None:
    """One who asks for no context, over and over."""
    loop = asyncio.get_running_loop()
    while loop.time() < until:
        await ask(rig, path=path)
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("strategy", ["plan", "least-loaded", "round-robin"])
@pytest.mark.parametrize(
    "policy", [{"policy": "reuse"}, {"policy": "clamp", "max": 16384}], ids=str
)
@virtual
async def test_one_larger_call_among_many_is_one_load_and_one_back(
    policy: dict[str, Any], strategy: str
) -> None:
    """Who asked for nothing does not bring its context back, once /v1 has brought back its own."""
    config = {"models.num_ctx": policy, "routing.strategy": strategy}
    async with running(1, models=models(1.0), config=config) as rig:
        started = rig.fleet["a"].host.counts
        until = asyncio.get_running_loop().time() + 60.0
        async with asyncio.TaskGroup() as group:
            for path in ("/api/chat",) * 3 + ("/v1/chat/completions",):
                group.create_task(rounds(rig, until, path=path))
            await asyncio.sleep(10.0)
            assert started["loads_started"] == 1
            assert (await ask(rig, 16384)).status == 200
            await asyncio.sleep(25.0)
            loads = started["loads_started"]
        assert loads <= (3 if strategy == "plan" else 5)  # the others load behind running calls
        assert started["loads_started"] == loads


@virtual
async def test_a_default_that_is_the_hosts_own_is_no_other_context() -> None:
    """Then a call that cannot ask shares the runner with one that had it written."""
    config = {"models.num_ctx": {"policy": "reuse", "default": 4096}}
    async with running(1, models=models(1.0), config=config) as rig:
        await ask(rig)
        await ask(rig, path="/v1/chat/completions")
        assert reloads(rig) == [""]
