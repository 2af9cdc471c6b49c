"""An operator at work: drain, resume, disable, reset, check; over the API, with calls under way."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest

from balancer.app import Balancer
from balancer.config import load
from balancer.core.domain import Switch
from balancer.core.events import BackendDrained, CheckEnded, SwitchesLost, SwitchMoved
from balancer.ops.log import LogWriter, configure
from tests.e2e.stage import CHAT, Asking, error_of, is_whole, models, virtual
from tests.e2e.test_access import ADMIN, JSON, LOCKED, USER, bearer
from tests.rig import Rig, running

pytestmark = pytest.mark.usefixtures("quiet")

NO_GPU = "llama-server process has terminated: exit status 2"


async def steer(rig: Rig, name: str, action: str, **headers: str) -> tuple[int, Any]:
    """Status and document of one action."""
    sent = JSON | headers
    reply = await rig.ask("POST", f"/_balancer/backends/{name}/{action}", {}, **sent)
    return reply.status, json.loads(reply.body)


async def served_by(rig: Rig, count: int = 4) -> set[str | None]:
    """Who answers so many calls."""
    replies = [await rig.ask("POST", "/api/chat", CHAT) for _ in range(count)]
    assert all(is_whole(reply, "/api/chat") for reply in replies)
    return {reply.get("x-balancer-backend") for reply in replies}


@virtual
async def test_a_drain_lets_calls_end() -> None:
    """The stream under way ends well, nothing new goes there, and the end of it is told."""
    out = io.StringIO()
    async with running(
        2, models=models(0.0), config=LOCKED | {"auth.anonymous": "loopback"}
    ) as rig:
        log = configure("info", "json", stream=out, is_tty=False, env={}, wall=lambda: 1e9)
        rig.balancer.bus.subscribe(LogWriter(log))
        await rig.warm("a", "m")
        stream = await Asking.of(rig, "/api/chat", CHAT)
        assert (await stream.head()).get("x-balancer-backend") == "a"
        status, told = await steer(rig, "a", "drain", **bearer(ADMIN))
        assert (status, told["action"], told["changed"]) == (200, "drain", True)
        assert (told["backend"]["state"], told["backend"]["in_flight"]) == ("draining", 1)
        assert rig.events.of(BackendDrained) == []
        assert await served_by(rig) == {"b"}
        assert is_whole(await stream.rest(), "/api/chat")
        stream.close()
        await rig.events.until(lambda: bool(rig.events.of(BackendDrained)))
        _, told = await steer(rig, "a", "resume", **bearer(ADMIN))
        assert told["backend"]["state"] == "up"
        assert "a" in await served_by(rig)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    told = [(x["event"], x.get("key.name")) for x in lines if x.get("backend.name") == "a"]
    wanted = [("backend_draining", "ops"), ("backend_drained", None), ("backend_resumed", "ops")]
    assert [each for each in told if each[0].startswith("backend_")] == wanted


@virtual
async def test_everything_may_be_repeated() -> None:
    """The second time is answered alike, changes nothing and is told to nobody."""
    async with running(1, models=models(0.0)) as rig:
        for action, switch in (
            ("drain", "draining"),
            ("disable", "disabled"),
            ("resume", "serving"),
        ):
            first, again = await steer(rig, "a", action), await steer(rig, "a", action)
            assert (first[0], first[1]["changed"]) == (200, True)
            assert (again[0], again[1]["changed"]) == (200, False)
            assert again[1]["backend"]["switch"] == switch
        assert (await steer(rig, "a", "reset"))[1]["changed"] is False
        turned = [event.switch for event in rig.events.of(SwitchMoved)]
        assert turned == [Switch.DRAINING, Switch.DISABLED, Switch.SERVING]


@virtual
async def test_a_resume_does_not_outrank_the_configuration() -> None:
    """Who is switched off there stays off, and the answer says where to look."""
    async with running(1, models=models(0.0), backend={"enabled": False}) as rig:
        status, told = await steer(rig, "a", "resume")
        assert (status, told["backend"]["switch"]) == (200, "disabled")
        assert "enabled: false" in told["note"]


@virtual
async def test_a_reset_closes_breakers() -> None:
    """Both kinds, at once: the next call goes there again."""
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].faults.fail("other", NO_GPU)
        await rig.ask("POST", "/api/chat", CHAT | {"model": "other"})
        member = rig.balancer.pool.members["a"]
        member.gate.trip("by hand")
        assert rig.balancer.admin.state()["backends"][0]["state"] == "broken"
        rig.fleet["a"].faults.heal()
        status, told = await steer(rig, "a", "reset")
        assert (status, told["changed"], told["backend"]["state"]) == (200, True, "up")
        breakers = [model.get("breaker", {}).get("state") for model in told["backend"]["models"]]
        assert "open" not in breakers
        assert is_whole(await rig.ask("POST", "/api/chat", CHAT), "/api/chat")
        recent = rig.balancer.admin.state()["recent"]
        assert ("breaker_reset", "by anonymous") in [(row["event"], row["text"]) for row in recent]


@virtual
async def test_a_check_tells_what_it_saw() -> None:
    """Good or bad, it is made now and counts as any other."""
    async with running(1, models=models(0.0), config={"health.interval": "1h"}) as rig:
        before = len(rig.events.of(CheckEnded))
        status, told = await steer(rig, "a", "check")
        assert status == 200
        assert told["check"] == {
            "ok": True,
            "latency_s": pytest.approx(0.0, abs=0.1),
            "version": told["backend"]["version"],
            "error": "",
        }
        assert len(rig.events.of(CheckEnded)) == before + 1
        rig.fleet["a"].faults.refuse()
        for _ in range(3):
            status, told = await steer(rig, "a", "check")
            assert (status, told["check"]["ok"]) == (200, False)
        assert told["backend"]["state"] == "down"
        assert told["check"]["error"] == "cannot connect: connection refused"
        rig.fleet["a"].faults.heal()
        for _ in range(2):
            await steer(rig, "a", "check")
        assert is_whole(await rig.ask("POST", "/api/chat", CHAT), "/api/chat")


@virtual
async def test_a_wrong_name_or_action() -> None:
    """404 with the names there are, and the closest."""
    async with running(2, models=models(0.0)) as rig:
        status, told = await steer(rig, "aa", "drain")
        assert status == 404
        assert told["error"] == 'no backend "aa". There are: a, b. Did you mean "a"?'
        assert told["backends"] == ["a", "b"]
        status, told = await steer(rig, "a", "explode")
        assert (status, "drain, resume, disable, reset, check" in told["error"]) == (404, True)
        assert (await rig.ask("GET", "/_balancer/backends/a/drain")).status == 404
        assert (await rig.ask("POST", "/_balancer/backends/", {}, **JSON)).status == 404
        assert rig.events.of(SwitchMoved) == []


@virtual
async def test_only_an_admin_steers() -> None:
    """And never a page from elsewhere, whatever a browser can be made to send."""
    async with running(1, models=models(0.0), config=LOCKED) as rig:
        assert (await steer(rig, "a", "drain"))[0] == 401
        status, told = await steer(rig, "a", "drain", **bearer(USER))
        assert (status, "role admin" in told["error"]) == (403, True)
        assert rig.events.of(SwitchMoved) == []
    async with running(1, models=models(0.0)) as rig:  # this machine is the admin, browser and all
        here = f"http://127.0.0.1:{rig.port}"

        async def crossed(**headers: str) -> int:
            path = "/_balancer/backends/a/drain"
            return (await rig.ask("POST", path, b"{}", **headers)).status

        assert await crossed(Content_Type="text/plain") == 400, "a form"
        assert await crossed(Content_Type="application/x-www-form-urlencoded") == 400
        assert await crossed() == 400, "a beacon without a type"
        assert await crossed(Origin="https://evil.example", **JSON) == 403
        assert await crossed(Origin="http://localhost:3000", **JSON) == 403, "another local page"
        assert await crossed(Origin="null", **JSON) == 403, "a sandboxed frame"
        assert await crossed(Sec_Fetch_Site="cross-site", **JSON) == 403
        assert await crossed(Sec_Fetch_Site="same-site", **JSON) == 403
        asks = {"Origin": "https://evil.example", "Access_Control_Request_Method": "POST"}
        preflight = await rig.ask("OPTIONS", "/_balancer/backends/a/drain", None, **asks)
        assert preflight.status == 403
        assert rig.events.of(SwitchMoved) == []
        assert await crossed(Origin=here, Sec_Fetch_Site="same-origin", **JSON) == 200
        assert await crossed(**JSON) == 200, "a command has no Origin"


@virtual
async def test_a_rebound_name_cannot_steer() -> None:
    """The Host of a foreign page that was pointed at us is not ours."""
    async with running(1, models=models(0.0)) as rig:
        head = "POST /_balancer/backends/a/drain HTTP/1.1\r\nHost: evil.example\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        assert (await rig.raw(head.encode(), method="POST")).status == 403
        assert rig.events.of(SwitchMoved) == []


@virtual
async def test_switches_survive_a_restart(tmp_path: Path) -> None:
    """What was drained stays drained in the next process, and is answered so."""
    file = tmp_path / "switches.json"
    config = {"state.path": str(file)}
    async with running(2, models=models(0.0), config=config) as rig:
        assert (await steer(rig, "a", "disable"))[0] == 200
        urls = {host.name: host.url for host in rig.fleet}
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert kept["switches"] == [{"name": "a", "url": urls["a"], "switch": "disabled"}]
    async with running(2, models=models(0.0)) as rig:  # other ports: other backends
        places = [{"name": host.name, "url": host.url} for host in rig.fleet]
        kept["switches"][0]["url"] = rig.fleet["a"].url
        file.write_text(json.dumps(kept), encoding="utf-8")
        rig.config.update(config, backends=places)
        second = await _second(rig)
        assert [b["switch"] for b in second.admin.state()["backends"]] == ["disabled", "serving"]
        await second.close()


async def _second(rig: Rig) -> Balancer:
    """Another balancer over the same hosts, as after a restart."""
    balancer = Balancer(load("", {}, overrides=rig.config), seed=1)
    await balancer.start()
    await asyncio.sleep(1.0)
    return balancer


@virtual
async def test_a_broken_state_file_is_told_and_nothing_else(tmp_path: Path) -> None:
    """The balancer starts, and everybody serves."""
    file = tmp_path / "switches.json"
    file.write_text("{", encoding="utf-8")
    async with running(1, models=models(0.0), config={"state.path": str(file)}) as rig:
        assert len(rig.events.of(SwitchesLost)) == 1
        assert await served_by(rig) == {"a"}


@virtual
async def test_what_was_learned_survives_restarts_and_reloads(tmp_path: Path) -> None:
    """Kept beside the switches; a strategy that has no use for it keeps it for one that has."""
    config = {"state.path": str(tmp_path / "state.json"), "routing.strategy": "round-robin"}
    told = {"speeds": {"a": {"prompt_rate": 900.0}}}
    async with running(1, models=models(0.0), config=config) as rig:
        rig.balancer.dispatcher.recall(told, 0.0)
        rig.config["routing.strategy"] = "least-loaded"
        assert rig.balancer.reload_now().changed == ("routing.strategy",)
        assert rig.balancer.dispatcher.learned() == told
        url = rig.fleet["a"].url
        await rig.balancer.close()
        file = tmp_path / "state.learned.json"
        kept = json.loads(file.read_text(encoding="utf-8"))
        assert (kept["backends"], kept["learned"]) == ({"a": url}, told)
        second = await _second(rig)
        assert second.dispatcher.learned() == told
        await second.close()


@virtual
async def test_a_backend_that_leaves_while_it_is_checked() -> None:
    """A reload in between: it is unknown by then."""
    async with running(2, models=models(0.0)) as rig:
        rig.fleet["a"].faults.hang()
        looking = await Asking.of(rig, "/_balancer/backends/a/check", {}, **JSON)
        await asyncio.sleep(0.5)
        rig.config["backends"] = [{"name": "b", "url": rig.fleet["b"].url}]
        assert (await rig.ask("POST", "/_balancer/reload", {}, **JSON)).status == 200
        assert (await looking.head()).status == 404
        assert "There are: b." in error_of(await looking.rest())
        looking.close()


@virtual
async def test_a_model_is_warmed_where_the_operator_wants_it() -> None:
    """Once; who stops waiting does not stop it, and a call that comes meanwhile is served by it."""
    async with running(2, models=models(3.0)) as rig:
        asking = await Asking.of(rig, "/_balancer/backends/b/warm?model=m", {}, **JSON)
        await asyncio.sleep(1.0)
        asking.hang_up()
        status, told = await steer(rig, "b", "warm?model=m")
        assert (status, told["error"].startswith("another load")) == (200, True)
        call = await rig.ask("POST", "/api/chat", CHAT)
        assert (is_whole(call, "/api/chat"), rig.loaded()["b"]) == (True, ["m"])
        status, told = await steer(rig, "b", "warm?model=m:latest")
        states = {model["name"]: model["state"] for model in told["backend"]["models"]}
        assert (status, told["error"], states["m:latest"]) == (200, "", "loaded")
        loads = [seen for seen in rig.fleet["b"].requests if seen.path == "/api/generate"]
        assert len(loads) == 1


@virtual
async def test_what_cannot_be_warmed() -> None:
    """A model that is not there, or does not load."""
    async with running(1, models=models(1.0)) as rig:
        for name in ("none", "a b", ""):
            status, told = await steer(rig, "a", f"warm?model={name.replace(' ', '%20')}")
            assert (status, told["error"]) == (404, f'a does not have the model "{name}".')
        rig.fleet["a"].faults.fail("m", text=NO_GPU)
        assert (await steer(rig, "a", "warm?model=m"))[1]["error"] == NO_GPU
