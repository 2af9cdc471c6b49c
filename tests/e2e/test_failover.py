"""A host dies, refuses or lies: another answers, or the client is told; never both, never 502."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from balancer.core.events import AttemptEnded, BreakerMoved
from balancer.sim.host import SimModel
from tests.e2e.stage import (
    CHAT,
    ROUTES,
    STREAMS,
    Asking,
    error_of,
    is_whole,
    models,
    moves,
    now,
    records,
    said,
    verdicts,
    virtual,
)
from tests.rig import Rig, running

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("route", ROUTES)
@virtual
async def test_a_dead_first_host_is_not_noticed(route: str) -> None:
    """A backend that was never there costs no call an attempt."""
    path, body = ROUTES[route]
    async with running(1, models=models(), dead=["gone"]) as rig:
        reply = await rig.ask("POST", path, body)
        assert is_whole(reply, path)
        assert (reply.get("x-balancer-backend"), reply.get("x-balancer-attempts")) == ("a", "1")


@pytest.mark.parametrize("route", ROUTES)
@virtual
async def test_a_host_that_dies_between_calls(route: str) -> None:
    """The call that finds it dead is served elsewhere; the client sees one good answer."""
    path, body = ROUTES[route]
    async with running(2, models=models()) as rig:
        await rig.warm("a", body["model"])
        assert (await rig.ask("POST", path, body)).get("x-balancer-backend") == "a"
        rig.fleet["a"].faults.refuse()
        reply = await rig.ask("POST", path, body)
        assert is_whole(reply, path)
        told = [reply.get(f"x-balancer-{name}") for name in ("backend", "attempts", "route")]
        assert told == ["b", "2", "failover"]
        assert verdicts(rig) == [("a", "ok"), ("a", "fault"), ("b", "ok")]
        assert [call.outcome for call in rig.calls()] == ["ok", "ok"]


# -- before the first record --------------------------------------------------------------------

NO_GPU = "llama-server process has terminated: exit status 2"
CRASHED = "model runner has unexpectedly stopped, this may be due to resource limitations"
DEATHS: dict[str, tuple[tuple[Any, ...], str]] = {
    "refuses": (("refuse",), "fault"),
    "resets": (("reset_head",), "fault"),
    "sends garbage": (("garbage",), "fault"),
    "resets behind the head": (("reset", 0), "fault"),
    "cuts behind the head": (("cut", 0), "fault"),
    "has nothing to say": (("no_done", 0), "fault"),
    "begins with an error": (("error_line", 0), "unfit"),
    "crashes": (("fail", "m", CRASHED, 500, "run"), "unfit"),
    "is full": (("queue_full",), "busy"),
    "is gone": (("restart", 1000.0), "fault"),
    "wants a password": (("script", 401), "misconfigured"),
    "is somewhere else": (("script", 302), "misconfigured"),
    "is a web server": (("script", 502), "fault"),
}


def strike(rig: Rig, host: str, fault: tuple[Any, ...], path: str) -> None:
    """Put a fault into a host; `script` and a status: every answer on the path is that."""
    name, *args = fault
    if name == "script":
        rig.fleet[host].script(path, status=args[0], segments=[b"<html>no</html>"], times=None)
    else:
        rig.fleet[host].faults.apply(name, *args)


@pytest.mark.parametrize("route", ["chat, streamed", "v1 chat, streamed"])
@pytest.mark.parametrize("death", DEATHS)
@virtual
async def test_trouble_before_the_first_record_is_not_noticed(route: str, death: str) -> None:
    """Whatever a host says or does instead of a first record, another one's answer is whole."""
    path, body = ROUTES[route]
    fault, verdict = DEATHS[death]
    async with running(2, models=models()) as rig:
        await rig.warm("a", "m")
        strike(rig, "a", fault, path)
        reply = await rig.ask("POST", path, body)
        assert is_whole(reply, path)
        assert verdicts(rig) == [("a", verdict), ("b", "ok")]


# -- in the stream ------------------------------------------------------------------------------


@pytest.mark.parametrize("route", STREAMS)
@pytest.mark.parametrize("fault", [("cut", 3), ("reset", 3), ("restart", 1000.0)])
@virtual
async def test_a_host_that_dies_in_a_stream(route: str, fault: tuple[Any, ...]) -> None:
    """What came stands, an error record ends it, nothing looks finished, nobody else is asked."""
    path, body = ROUTES[route]
    async with running(2, models=models()) as rig:
        await rig.warm("a", "m")
        asking = await Asking.of(rig, path, body)
        if fault[0] != "restart":
            rig.fleet["a"].faults.apply(*fault)
        await asking.head()
        for _ in range(3):
            await asking.record()
        rig.fleet["a"].faults.apply(*fault)
        reply = await asking.rest()
        asking.close()
        assert (reply.status, reply.ended) == (200, "clean")
        assert reply.body.startswith(bytes(rig.forwarded()[0].written))
        *good, last = records(reply)
        assert "backend a closed the connection" in json.dumps(last["error"])
        assert len(good) >= 3
        assert not any("error" in each or each.get("done") for each in good)
        assert b"[DONE]" not in reply.body
        assert verdicts(rig) == [("a", "broken")]
        assert [len(host.requests) for host in rig.fleet if host.name == "b" and rig.forwarded()]
        (told,) = await rig.ended()
        assert (told.outcome, told.status, told.attempts) == ("upstream_error", 200, 1)


@pytest.mark.parametrize("route", STREAMS)
@virtual
async def test_three_cut_streams_close_a_host_off(route: str) -> None:
    """The fourth call goes elsewhere, and two long canaries bring the host back."""
    path, body = ROUTES[route]
    async with running(2, models=models()) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].faults.cut(3, times=3)
        for _ in range(3):
            assert (await rig.ask("POST", path, body)).get("x-balancer-backend") == "a"
        assert moves(rig) == [("a", None, "open")]
        assert (await rig.ask("POST", path, body)).get("x-balancer-backend") == "b"
        await rig.events.until(lambda: moves(rig)[-1] == ("a", None, "closed"))
        canaries = [json.loads(s.body) for s in rig.inference() if s not in rig.forwarded()]
        assert [c["options"]["num_predict"] for c in canaries if c.get("prompt")] == [32, 32]
