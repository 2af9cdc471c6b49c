"""Cloud models and the account behind them: who is asked, what is told, and who is not blamed."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from balancer.core.domain import CheckResult
from balancer.core.events import LoadStarted, TrialEnded
from balancer.core.names import parse
from balancer.sim.cloud import SIGNIN_URL, WORDS, Cloud
from balancer.sim.delivery import Seen
from balancer.sim.host import SimModel
from balancer.sim.ollama import SimOllama
from tests.e2e.stage import (
    CHAT,
    ROUTES,
    Asking,
    error_of,
    models,
    moves,
    now,
    verdicts,
    virtual,
)
from tests.rig import Rig, running

pytestmark = pytest.mark.usefixtures("quiet")

FAR = "gpt-oss:120b-cloud"
FAR_CHAT: dict[str, Any] = CHAT | {"model": FAR}
TEXTS = {name: at for name, at in ROUTES.items() if "embed" not in name}
KEY = {"type": "bearer", "token": "secret-of-ollama-com"}
PULLS = ("/api/pull", "/api/delete", "/api/copy")
LIMIT = '{"error":"you have reached your usage limit"}'
PAGE = "<html>502 Bad Gateway</html>"


@asynccontextmanager
async def marked(
    *names: str, hosts: int = 2, config: Mapping[str, object] = MappingProxyType({})
) -> AsyncIterator[Rig]:
    """A fleet in which each host has an account, of which those *names* are marked."""
    async with running(hosts, models=models(0.0), config=config) as rig:
        for host in rig.fleet:
            host.cloud = Cloud()
        rig.config["backends"] = [
            {"name": host.name, "url": host.url, "cloud": host.name in names} for host in rig.fleet
        ]
        rig.balancer.reload_now()
        yield rig


def asked(host: SimOllama, path: str = "/api/chat") -> list[Seen]:
    """What a host was asked on that path."""
    return [seen for seen in host.requests if seen.path == path]


def stub(rig: Rig, *names: str) -> None:
    """These backends list a stub of the cloud model."""
    for name in names:
        row = {"name": FAR, "model": FAR, "digest": "ab" * 32, "remote_model": "gpt-oss:120b"}
        rig.balancer.pool.note_tags(name, [row], now())


# -- who is asked ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_a_cloud_model_goes_where_the_account_is(name: str) -> None:
    """On every route, only to the marked backend, whatever it lists, byte by byte."""

    @virtual
    async def scenario() -> None:
        path, body = TEXTS[name]
        async with marked("b") as rig:
            for _ in range(3):
                reply = await rig.ask("POST", path, body | {"model": FAR})
                assert reply.status == 200, reply
                assert b" far" in reply.body
            assert len(asked(rig.fleet["b"], path)) == 3
            assert json.loads(asked(rig.fleet["b"], path)[0].body)["model"] == FAR
            assert not asked(rig.fleet["a"], path)
            assert not rig.events.of(LoadStarted)

    scenario()


@virtual
async def test_two_accounts_share_the_calls() -> None:
    """Where both are marked both may serve, and one that cannot be reached is replaced."""
    async with marked("a", "b", config={"routing.strategy": "least-loaded"}) as rig:
        for _ in range(4):
            assert (await rig.ask("POST", "/api/chat", FAR_CHAT)).status == 200
        assert [len(asked(host)) for host in rig.fleet] == [2, 2]
        rig.fleet["a"].faults.refuse()
        for _ in range(4):
            assert (await rig.ask("POST", "/api/chat", FAR_CHAT)).status == 200


@virtual
async def test_without_a_mark_the_first_that_lists_it() -> None:
    """Always the same one, and no other account when it is away; else unknown."""
    async with marked() as rig:
        reply = await rig.ask("POST", "/api/chat", FAR_CHAT)
        assert reply.status == 404
        assert "not found" in error_of(reply)
        assert "cloud: true" in error_of(reply)
        stub(rig, "a", "b")
        for _ in range(3):
            assert (await rig.ask("POST", "/api/chat", FAR_CHAT)).status == 200
        assert [len(asked(host)) for host in rig.fleet] == [3, 0]
        for _ in range(5):
            rig.balancer.pool.observe("a", CheckResult(ok=False, latency_s=0.0, error="timeout"))
        assert not rig.balancer.pool.members["a"].health.up
        assert (await rig.ask("POST", "/api/chat", FAR_CHAT, X_Request_Timeout="1")).status in (
            503,
            504,
        )
        assert not asked(rig.fleet["b"])


@virtual
async def test_no_gpu_is_reserved() -> None:
    """Any number at once, on a backend whose only slot is taken, and none of them counts there."""
    async with marked("a", hosts=1) as rig:
        rig.config["backends"] = [_backends(rig)[0] | {"slots": 1, "cloud": True}]
        rig.balancer.reload_now()
        await rig.warm("a", "m")
        local = await Asking.of(rig, "/api/chat", CHAT)
        await local.head()
        far = [await Asking.of(rig, "/api/chat", FAR_CHAT) for _ in range(5)]
        for asking in far:
            assert (await asking.head()).status == 200
            await asking.rest()
            asking.close()
        assert (await local.rest()).ended == "clean"
        local.close()


@virtual
async def test_a_silent_one_is_asked_no_canary_and_ends_some_day() -> None:
    """Silence of the cloud makes nobody suspect; after `timeouts.idle` the call is given up."""
    async with marked("a", hosts=1, config={"timeouts.idle": "2m"}) as rig:
        rig.fleet["a"].script("/api/chat", segments=[(600.0, b"{}")], times=1)
        began = now()
        reply = await rig.ask("POST", "/api/chat", FAR_CHAT | {"stream": False})
        assert reply.status == 503
        assert 119 < now() - began < 130
        assert verdicts(rig) == [("a", "slow")]
        assert not rig.events.of(TrialEnded)
        assert moves(rig) == []
        assert (await rig.ask("POST", "/api/chat", CHAT)).status == 200


# -- what is told, and who is blamed --------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("status", [401, 402, 403, 404, 429, 500, 502, 503])
def test_a_storm_of_refusals_opens_no_breaker(name: str, status: int) -> None:
    """Relayed as they came, one attempt each, and calls on the GPU go on next to them."""

    @virtual
    async def scenario() -> None:
        path, body = TEXTS[name]
        async with marked("a", hosts=1) as rig:
            cloud = rig.fleet["a"].cloud
            assert cloud is not None
            cloud.refusal = (status, LIMIT if status != 502 else PAGE)
            for _ in range(12):
                reply = await rig.ask("POST", path, body | {"model": FAR})
                assert (reply.status, reply.body.decode()) == cloud.refusal
            assert len(asked(rig.fleet["a"], path)) == 12
            assert (await rig.ask("POST", path, body)).status == 200
            assert moves(rig) == []

    scenario()


@virtual
async def test_not_signed_in() -> None:
    """401 with the address to sign in at, as Ollama's command line wants it."""
    async with marked("a") as rig:
        rig.fleet["a"].cloud = Cloud(signed_in=False)
        reply = await rig.ask("POST", "/api/chat", FAR_CHAT)
        assert reply.status == 401
        assert json.loads(reply.body) == {"error": "unauthorized", "signin_url": SIGNIN_URL}
        assert verdicts(rig) == [("a", "account")]


@pytest.mark.parametrize("name", [name for name in TEXTS if "streamed" in name])
@pytest.mark.parametrize("after", [0, 2])
def test_an_answer_that_is_cut_far_away(name: str, after: int) -> None:
    """The host that passed it on is not blamed; its GPU goes on."""

    @virtual
    async def scenario() -> None:
        path, body = TEXTS[name]
        async with marked("a", hosts=1) as rig:
            rig.fleet["a"].cloud = Cloud(cut_after=after)
            for _ in range(6):
                await rig.ask("POST", path, body | {"model": FAR})
            assert moves(rig) == []
            assert (await rig.ask("POST", path, body)).status == 200

    scenario()


@virtual
async def test_error_records_that_sound_like_a_dead_runner() -> None:
    """Whatever a far model says, no model here is blamed for it."""
    record = b'{"error":"an error was encountered while running the model: unexpected EOF"}\n'
    kind = (("Content-Type", "application/x-ndjson"),)
    async with marked("a", hosts=1) as rig:
        for number in range(8):
            rig.fleet["a"].script("/api/chat", headers=kind, segments=[record], framing="chunked")
            reply = await rig.ask("POST", "/api/chat", CHAT | {"model": f"x{number % 2}:cloud"})
            assert b"unexpected EOF" in reply.body
        assert moves(rig) == []
        assert verdicts(rig)[-1] == ("a", "account")


@virtual
async def test_a_stub_of_another_name_is_no_model_of_ours_either() -> None:
    """`ollama create` may give a cloud model any name; its refusals count as little."""
    async with marked("a", hosts=1) as rig:
        row = {"name": "mine:latest", "model": "mine:latest", "digest": "ab" * 32}
        rig.balancer.pool.note_tags("a", [row | {"remote_host": "https://ollama.com:443"}], now())
        for _ in range(5):
            rig.fleet["a"].script("/api/chat", status=401, segments=[LIMIT.encode()])
            reply = await rig.ask("POST", "/api/chat", CHAT | {"model": "mine"})
            assert (reply.status, reply.body.decode()) == (401, LIMIT)
        assert moves(rig) == []
        assert not rig.balancer.pool.view("a").cooling_s


# -- reads ----------------------------------------------------------------------------------------


@virtual
async def test_show_of_what_nobody_lists() -> None:
    """Asked of the account's backend; its refusal is the answer."""
    async with marked("b") as rig:
        reply = await rig.ask("POST", "/api/show", {"model": FAR})
        assert reply.status == 200
        reply = await rig.ask("GET", f"/v1/models/{FAR}")
        assert reply.status == 200
        assert not asked(rig.fleet["a"], "/api/show") or all(
            FAR.encode() not in seen.body for seen in asked(rig.fleet["a"], "/api/show")
        )
        rig.fleet["b"].cloud = None
        reply = await rig.ask("POST", "/api/show", {"model": FAR})
        assert reply.status == 403
        assert "cloud is disabled" in error_of(reply)


@virtual
async def test_an_unload_of_a_cloud_model_asks_nobody() -> None:
    """`ollama stop` of what no GPU holds is done at once."""
    async with marked("a") as rig:
        reply = await rig.ask("POST", "/api/generate", {"model": FAR, "keep_alive": 0})
        assert reply.status == 200
        assert json.loads(reply.body)["done_reason"] == "unload"
        assert not asked(rig.fleet["a"], "/api/generate")


# -- the account ----------------------------------------------------------------------------------

ACCOUNT = [
    ("POST", "/api/me"),
    ("POST", "/api/signout"),
    ("DELETE", "/api/user/keys/c3No"),
    ("POST", "/api/experimental/web_search"),
    ("POST", "/api/experimental/web_fetch"),
]


@pytest.mark.parametrize(("method", "path"), ACCOUNT)
def test_one_backend_speaks_for_the_account(method: str, path: str) -> None:
    """The first that is marked, each time; its words are relayed."""

    @virtual
    async def scenario() -> None:
        async with marked("b", "c", hosts=3) as rig:
            for _ in range(2):
                reply = await rig.ask(method, path, {"query": "x"} if "web" in path else None)
                assert reply.status in (200, 401)
                assert reply.get("x-balancer-backend") == "b"
            assert [len(asked(host, path)) for host in rig.fleet] == [0, 2, 0]

    scenario()


@virtual
async def test_signing_in_and_out() -> None:
    """The command line's own steps: me until it says who, then signout, which answers null."""
    async with marked("b") as rig:
        rig.fleet["b"].cloud = cloud = Cloud(signed_in=False)
        reply = await rig.ask("POST", "/api/me")
        assert (reply.status, json.loads(reply.body)["signin_url"]) == (401, SIGNIN_URL)
        cloud.signed_in = True
        assert json.loads((await rig.ask("POST", "/api/me")).body)["name"] == "a"
        assert (await rig.ask("POST", "/api/signout")).body == b"null"
        assert (await rig.ask("POST", "/api/me")).status == 401


@virtual
async def test_without_a_mark_nobody_speaks_for_the_account() -> None:
    """Several hosts, none marked: the way out is told, and the command line sees cloud as off."""
    async with marked() as rig:
        for method, path in ACCOUNT:
            reply = await rig.ask(method, path)
            assert reply.status == 403
            assert error_of(reply).startswith("ollama cloud is disabled")
            assert "cloud: true" in error_of(reply)
        reply = await rig.ask("GET", "/api/status")
        assert json.loads(reply.body) == {"cloud": {"disabled": True, "source": "config"}}
        reply = await rig.ask("GET", "/api/experimental/model-recommendations")
        assert reply.status == 200


@virtual
async def test_a_single_host_needs_no_mark() -> None:
    """There is no doubt whose account it is."""
    async with marked(hosts=1) as rig:
        assert (await rig.ask("POST", "/api/me")).status == 200
        reply = await rig.ask("GET", "/api/status")
        assert json.loads(reply.body) == {"cloud": {"disabled": False, "source": "none"}}


@virtual
async def test_the_account_is_for_admins() -> None:
    """A user's key may run cloud models, but not sign out."""
    key = "0123456789abcdef0123456789abcdef"
    keys = [{"name": "u", "key": key, "role": "user"}]
    async with marked("a", config={"auth.anonymous": "never", "auth.keys": keys}) as rig:
        bearer = {"Authorization": f"Bearer {key}"}
        assert (await rig.ask("POST", "/api/chat", FAR_CHAT, **bearer)).status == 200
        for method, path in ACCOUNT:
            assert (await rig.ask(method, path, **bearer)).status == 403
        seen = asked(rig.fleet["a"])[0]
        assert not {"authorization"} & {name.lower() for name, _ in seen.headers}


# -- ollama.com itself ----------------------------------------------------------------------------

THERE = [SimModel("gpt-oss:120b", load_s=0.0, words=WORDS), SimModel("kimi-k3", load_s=0.0)]


@asynccontextmanager
async def provided(**more: Any) -> AsyncIterator[tuple[Rig, SimOllama]]:
    """A host of ours, and ollama.com with a key; in its place stands a simulated one."""
    sim = SimOllama(THERE, name="far", version="0.0.0", keeps_bodies=True)
    sim.faults.missing("/api/ps", "/api/status", "/api/experimental/web_search")
    async with sim, running(1, models=models(0.0)) as rig:
        place = {"name": "far", "url": "https://ollama.com", "auth": KEY}
        rig.config["backends"] = [*_backends(rig), place | more]
        rig.balancer.reload_now()
        reached = rig.balancer.upstream.targets
        reached["far"] = replace(reached["far"], url=sim.url)
        await rig.events.until(lambda: bool(rig.balancer.catalog.listed("far")))
        yield rig, sim


def _backends(rig: Rig) -> list[dict[str, Any]]:
    return [{"name": host.name, "url": host.url} for host in rig.fleet]


@virtual
async def test_ollama_com_lists_its_models_as_stubs() -> None:
    """Under the names that Ollama's hosts give them, with digests that every client reads."""
    async with provided() as (rig, _):
        rows = json.loads((await rig.ask("GET", "/api/tags")).body)["models"]
        far = {row["name"]: row for row in rows if "cloud" in row["name"]}
        assert set(far) == {"gpt-oss:120b-cloud", "kimi-k3:cloud"}
        row = far["gpt-oss:120b-cloud"]
        assert (row["remote_model"], len(row["digest"])) == ("gpt-oss:120b", 64)
        assert not rig.balancer.catalog.lists("far", parse("gpt-oss:120b").canonical)
        assert (await rig.ask("POST", "/api/chat", CHAT | {"model": "gpt-oss:120b"})).status == 404


@pytest.mark.parametrize("name", TEXTS)
def test_a_call_goes_to_ollama_com_as_it_expects_it(name: str) -> None:
    """The name it has there, our key, no address of a client; the rest as it was."""

    @virtual
    async def scenario() -> None:
        path, body = TEXTS[name]
        async with provided() as (rig, sim):
            for model, there in ((FAR, "gpt-oss:120b"), ("kimi-k3:cloud", "kimi-k3")):
                sent = body | {"model": model}
                reply = await rig.ask("POST", path, sent, Authorization="Bearer of-a-client")
                assert reply.status == 200, reply
                seen = asked(sim, path)[-1]
                assert json.loads(seen.body) == sent | {"model": there}
                headers = {name.lower(): value for name, value in seen.headers}
                assert headers["authorization"] == "Bearer secret-of-ollama-com"
                assert "x-forwarded-for" not in headers
            assert not rig.events.of(LoadStarted)

    scenario()


@virtual
async def test_ollama_com_is_not_hammered() -> None:
    """In ten minutes a check a minute and two lists, nothing of memory, no details of models."""
    async with provided() as (rig, sim):
        sim.requests.clear()
        await asyncio.sleep(600.0)
        counts = Counter(seen.path for seen in sim.requests)
        assert counts.keys() == {"/api/version", "/api/tags"}
        assert 8 <= counts["/api/version"] <= 13
        assert counts["/api/tags"] <= 3
        assert rig.balancer.pool.members["far"].health.up


@virtual
async def test_a_route_that_ollama_com_lacks_takes_nothing_down() -> None:
    """It is up as long as it answers, whatever it thinks of our checks."""
    async with provided() as (rig, sim):
        sim.faults.missing("/api/version", "/api/tags", "/api/ps")
        await asyncio.sleep(900.0)
        assert rig.balancer.pool.members["far"].health.up
        assert (await rig.ask("POST", "/api/chat", FAR_CHAT)).status == 200


@virtual
async def test_a_bad_key_is_told() -> None:
    """The caller gets the refusal, the operator sees it with the backend; no breaker opens."""
    async with provided() as (rig, sim):
        refusal = b'{"error":"unauthorized"}'
        sim.script("/api/chat", status=401, segments=[refusal], times=5)
        for _ in range(5):
            assert (await rig.ask("POST", "/api/chat", FAR_CHAT)).body == refusal
        assert "unauthorized" in rig.balancer.pool.view("far").trouble
        assert moves(rig) == []
        assert (await rig.ask("POST", "/api/chat", FAR_CHAT)).status == 200
        assert not rig.balancer.pool.view("far").trouble


@virtual
async def test_what_ollama_com_has_under_other_names() -> None:
    """Search has its own path there, status is ours to tell, and nobody signs a key out."""
    async with provided() as (rig, sim):
        sim.script("/api/web_search", segments=[b'{"results":[]}'])
        reply = await rig.ask("POST", "/api/experimental/web_search", {"query": "x"})
        assert (reply.status, reply.body) == (200, b'{"results":[]}')
        assert json.loads(asked(sim, "/api/web_search")[0].body) == {"query": "x"}
        reply = await rig.ask("GET", "/api/status")
        assert json.loads(reply.body) == {"cloud": {"disabled": False, "source": "none"}}
        for method, path in ACCOUNT[1:3]:
            assert (await rig.ask(method, path)).status == 501
        assert not asked(sim, "/api/signout")
        assert (await rig.ask("POST", "/api/show", {"model": FAR})).status == 200
        assert json.loads(asked(sim, "/api/show")[-1].body)["model"] == "gpt-oss:120b"


@pytest.mark.parametrize("path", ["/api/web_search", "/api/user/keys", "/v1/later"])
@virtual
async def test_an_unknown_path_does_not_reach_ollama_com(path: str) -> None:
    """Whoever may chat could else do there whatever the operator's key may do."""
    async with provided() as (rig, sim):
        sim.script(path, segments=[b"{}"])
        reply = await rig.ask("POST", path, {"model": FAR, "query": "x"})
        assert (reply.status, reply.body) == (404, b"404 page not found")
        assert not asked(sim, path)


@virtual
async def test_nothing_is_installed_at_ollama_com() -> None:
    """What changes hosts leaves it out."""
    async with provided() as (rig, sim):
        await rig.ask("POST", "/api/pull", {"model": "nowhere", "stream": False})
        await rig.ask("DELETE", "/api/delete", {"model": FAR})
        await rig.ask("POST", "/api/copy", {"source": FAR, "destination": "x"})
        assert not [seen for seen in sim.requests if seen.path in PULLS]
