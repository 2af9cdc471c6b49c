"""What the catalogue answers: at once, whatever the hosts do; and whom it asks when it must."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from balancer.core import names
from balancer.core.events import HealthFlipped
from balancer.sim.host import SimModel
from tests.conftest import Start
from tests.e2e.stage import error_of, now, virtual
from tests.rig import Rig, running
from tests.sim.wire import ask

pytestmark = pytest.mark.usefixtures("quiet")
READS = [
    ("GET", "/"),
    ("HEAD", "/"),
    ("GET", "/api/version"),
    ("HEAD", "/api/version"),
    ("GET", "/api/tags"),
    ("HEAD", "/api/tags"),
    ("GET", "/api/ps"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/llama3.2"),
]
CHAT = {"model": "only-a", "messages": [{"role": "user", "content": "x"}], "stream": False}


def asked(rig: Rig, path: str) -> list[tuple[str, dict[str, str], Any]]:
    """Requests for a path that hosts saw: host, headers, body."""
    return [
        (host.name, dict(seen.headers), json.loads(seen.body or b"null"))
        for host in rig.fleet
        for seen in host.requests
        if seen.path == path
    ]


async def with_one_more(rig: Rig, host: str, model: SimModel) -> None:
    """Give one host a model, and have the balancer know it."""
    rig.fleet[host].faults.gain(model)
    catalog, canonical = rig.balancer.catalog, names.parse(model.name).canonical
    rig.balancer.prober.refresh(host)
    await rig.events.until(lambda: catalog.lists(host, canonical))
    await rig.watching()


# -- at once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["hang", "freeze", "refuse", "slow_ps"])
@virtual
async def test_reads_do_not_wait_for_a_host(trouble: str) -> None:
    """Whatever befalls the hosts, what is known is told without asking them."""
    async with running(2) as rig:
        for host in rig.fleet:
            host.faults.apply(trouble, *([60.0] if trouble == "slow_ps" else []))
        await asyncio.sleep(30)  # by now they are known to be down
        began, seen = now(), [len(host.requests) for host in rig.fleet]
        for method, path in READS:
            reply = await rig.ask(method, path)
            assert reply.status == 200, path
            assert (reply.body != b"") == (method == "GET"), path
        reply = await rig.ask("POST", "/api/show", {"model": "llama3.2"})
        assert reply.status == 200
        assert now() == began
        assert [len(host.requests) for host in rig.fleet] == seen
        for host in rig.fleet:
            host.faults.heal()


async def test_a_head_has_the_headers_of_its_get(start: Start) -> None:
    """Type and length, and no body."""
    rig = await start(1)
    for path in ("/", "/api/version", "/api/tags"):
        get, head = await rig.ask("GET", path), await rig.ask("HEAD", path)
        for name in ("content-type", "content-length"):
            assert head.get(name) == get.get(name)


@virtual
async def test_before_anybody_has_answered_nothing_is_claimed() -> None:
    """A version or a 404 would be made up: 503, soon to be asked again. Lists are empty."""
    async with running(1) as rig:
        balancer = rig.balancer
        balancer.catalog.drop("a")
        balancer.catalog.join("a")
        balancer.catalog._versions = None
        for method, path, body in (
            ("GET", "/api/version", None),
            ("POST", "/api/show", {"model": "llama3.2"}),
        ):
            reply = await rig.ask(method, path, body)
            assert reply.status == 503, path
            assert reply.get("retry-after") in {"1", "2", "3"}
        assert (await rig.ask("GET", "/api/tags")).body == b'{"models":[]}'
        assert (await rig.ask("GET", "/")).status == 200


# -- unions ---------------------------------------------------------------------------------------


async def test_lists_are_unions(start: Start) -> None:
    """Each name once, each copy in memory once, all fields as the host told them."""
    rig = await start(2)
    await with_one_more(rig, "b", SimModel("hf.co/Org/Repo:Q4_K_M"))
    await rig.warm("a", "llama3.2")
    await rig.warm("b", "llama3.2")
    models = json.loads((await rig.ask("GET", "/api/tags")).body)["models"]
    shown = [model["name"] for model in models]
    assert sorted(shown) == sorted(set(shown))
    assert "hf.co/Org/Repo:Q4_K_M" in shown
    told = json.loads((await ask(rig.fleet["b"].port, "GET", "/api/tags")).body)["models"]
    assert {model["name"]: list(model.items()) for model in models} == {
        model["name"]: list(model.items()) for model in told
    }
    loaded = json.loads((await rig.ask("GET", "/api/ps")).body)["models"]
    assert [model["name"] for model in loaded] == ["llama3.2:latest"] * 2
    listed = json.loads((await rig.ask("GET", "/v1/models")).body)["data"]
    assert sorted(model["id"] for model in listed) == sorted(shown)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("llama3.2", "llama3.2"),
        ("llama3.2:latest", "llama3.2:latest"),
        ("LLAMA3.2", "LLAMA3.2"),
        ("library/llama3.2", "library/llama3.2"),
        ("llama3.2%3Alatest", "llama3.2:latest"),
        ("hf.co/Org/Repo:Q4", "hf.co/Org/Repo:Q4"),
        ("hf.co%2FOrg%2FRepo:Q4", "hf.co/Org/Repo:Q4"),
        ("llama3.2:1b", None),
        ("nope", None),
        ("%20", None),
        ("..x", None),
    ],
)
async def test_one_model_is_found_as_ollama_finds_it(
    start: Start, path: str, found: str | None
) -> None:
    """By any spelling of its name, which is echoed; slashes may be escaped or not."""
    rig = await start(1, models=[SimModel("llama3.2"), SimModel("hf.co/Org/Repo:Q4")])
    reply = await rig.ask("GET", f"/v1/models/{path}")
    assert reply.status == (404 if found is None else 200)
    if found is not None:
        assert json.loads(reply.body)["id"] == found
        assert reply.body.endswith(b"}\n")
    else:
        assert "not found" in error_of(reply)


@pytest.mark.parametrize(
    ("policy", "told"), [("min", "0.12.5"), ("max", "0.33.0"), ("0.99.1", "0.99.1")]
)
async def test_the_version_is_the_lowest_unless_told_otherwise(
    start: Start, policy: str, told: str
) -> None:
    """Clients switch features on by it."""
    rig = await start(2, config={"models.version": policy, "health.interval": "0.05s"})
    rig.fleet["b"].faults.version("0.12.5")
    catalog = rig.balancer.catalog
    await rig.events.until(lambda: catalog.version_of("b") == "0.12.5")
    assert json.loads((await rig.ask("GET", "/api/version")).body) == {"version": told}


# -- a host that is away is not a host without the model ------------------------------------------


@virtual
async def test_a_model_only_on_a_host_that_is_away_stays() -> None:
    """It is listed and shown; calls get a 503 that names the host, never a 404."""
    async with running(2) as rig:
        await with_one_more(rig, "a", SimModel("only-a"))
        rig.fleet["a"].faults.refuse()
        await rig.events.until(
            lambda: any(not each.up for each in rig.events.of(HealthFlipped)), limit_s=60.0
        )
        assert b'"only-a:latest"' in (await rig.ask("GET", "/api/tags")).body
        assert (await rig.ask("GET", "/v1/models/only-a")).status == 200
        assert (await rig.ask("POST", "/api/show", {"model": "only-a"})).status == 200
        for path, body in (
            ("/api/chat", CHAT),
            ("/v1/chat/completions", CHAT),
            ("/api/show", {"model": "only-a", "verbose": True}),
        ):
            reply = await rig.ask("POST", path, body, X_Request_Timeout="1000")
            assert reply.status == 503, path
            assert "not found" not in error_of(reply)
            assert "only-a" in error_of(reply)
            assert "a" in error_of(reply)
            assert int(reply.get("retry-after") or 0) >= 1


# -- show -----------------------------------------------------------------------------------------


async def test_a_plain_show_is_kept(start: Start) -> None:
    """It was asked once per model in the whole fleet, and not again for clients."""
    rig = await start(3)
    before = asked(rig, "/api/show")
    assert len(before) == len(rig.fleet["a"].host.models)
    for name in ("llama3.2", "LLAMA3.2:latest"):
        for field in ("model", "name"):
            assert (await rig.ask("POST", "/api/show", {field: name})).status == 200
    told = await ask(rig.fleet["a"].port, "POST", "/api/show", {"model": "llama3.2"})
    ours = await rig.ask("POST", "/api/show", {"model": "llama3.2"})
    assert (ours.body, ours.get("content-type")) == (told.body, told.get("content-type"))
    assert len(asked(rig, "/api/show")) == len(before) + 1, "the one of this test"


SPECIAL: list[tuple[dict[str, Any], str]] = [
    ({"verbose": True}, "test/1"),
    ({"system": "be brief"}, "test/1"),
    ({"options": {"num_ctx": 8}}, "test/1"),
    ({}, "GitHubCopilotChat/0.35"),
]


@pytest.mark.parametrize(("more", "agent"), SPECIAL)
async def test_a_special_show_is_asked_of_a_host(
    start: Start, more: dict[str, Any], agent: str
) -> None:
    """What would be answered otherwise than the plain one goes up as it is."""
    rig = await start(2)
    before = len(asked(rig, "/api/show"))
    body = {"model": "llama3.2"} | more
    reply = await rig.ask("POST", "/api/show", body, User_Agent=agent)
    assert (reply.status, reply.get("x-balancer-backend")) == (200, "a")
    (up,) = asked(rig, "/api/show")[before:]
    assert (up[1]["User-Agent"], up[2]) == (agent, body)


@pytest.mark.parametrize("trouble", ["refused", "reset", "500", "404", "html"])
async def test_a_show_that_fails_is_asked_of_the_next_host(start: Start, trouble: str) -> None:
    """A host that cannot tell is no reason to refuse."""
    rig = await start(2)
    first = rig.fleet["a"]
    text, json_ = ("Content-Type", "text/html"), ("Content-Type", "application/json")
    match trouble:
        case "refused":
            first.faults.refuse()
        case "reset":
            first.script("/api/show", ending="reset", length=9)
        case "500":
            first.script("/api/show", status=500, headers=[json_], segments=[b'{"error":"x"}'])
        case "404":
            first.script("/api/show", status=404, headers=[json_], segments=[b'{"error":"x"}'])
        case _:
            first.script("/api/show", status=502, headers=[text], segments=[b"<html>"])
    reply = await rig.ask("POST", "/api/show", {"model": "llama3.2", "verbose": True})
    assert (reply.status, reply.get("x-balancer-backend")) == (200, "b")
    assert [told.attempts for told in rig.calls()] == [2]


async def test_a_refusal_of_all_hosts_is_relayed(start: Start) -> None:
    """With status and text of the last."""
    rig = await start(2)
    for host in rig.fleet:
        text = f'{{"error":"{host.name} is unwell"}}'.encode()
        host.script("/api/show", status=500, segments=[text])
    reply = await rig.ask("POST", "/api/show", {"model": "llama3.2", "verbose": True})
    assert (reply.status, reply.body) == (500, b'{"error":"b is unwell"}')


async def test_a_404_of_a_host_has_its_list_read_again(start: Start) -> None:
    """It has lost the model, and the catalogue hears of it at once."""
    rig = await start(1)
    rig.fleet["a"].faults.lose("llama3.2")
    reply = await rig.ask("POST", "/api/show", {"model": "llama3.2", "verbose": True})
    assert (reply.status, error_of(reply)) == (404, "model 'llama3.2:latest' not found")
    lost = names.parse("llama3.2").canonical
    await rig.events.until(lambda: not rig.balancer.catalog.knows(lost))
