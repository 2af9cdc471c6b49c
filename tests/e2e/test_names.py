"""Models under other names: aliases and their chains, hidden names, one name for two models."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from balancer.core.domain import BreakerState
from balancer.sim.host import SimModel
from tests.e2e.stage import (
    CHAT,
    ROUTES,
    Asking,
    error_of,
    is_whole,
    models,
    now,
    records,
    verdicts,
    virtual,
)
from tests.rig import Rig, running

pytestmark = pytest.mark.usefixtures("quiet")

FAST: dict[str, Any] = {"models.aliases": {"fast": ["m", "other"]}}
ASK = CHAT | {"model": "fast", "stream": False}
NO_GPU = "llama-server process has terminated: exit status 2"


async def told(rig: Rig, method: str, path: str, body: object = None) -> Any:
    """A good answer's JSON."""
    reply = await rig.ask(method, path, body)
    assert reply.status == 200, reply
    return json.loads(reply.body)


def served_as(rig: Rig) -> list[str]:
    """The models that clients' calls named when they reached a host."""
    return [json.loads(seen.body)["model"] for seen in rig.forwarded()]


# -- an alias ----------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@virtual
async def test_every_route_knows_aliases(route: str) -> None:
    """The host is asked for the real model, in the client's own bytes; so the answer names it."""
    path, body = ROUTES[route]
    names = {"x-m": "m", "x-e": "e:latest"}
    async with running(1, models=models(0.0), config={"models.aliases": names}) as rig:
        reply = await rig.ask("POST", path, body | {"model": f"x-{body['model']}"})
        assert is_whole(reply, path)
        real = names[f"x-{body['model']}"]
        assert reply.get("x-balancer-model") == real
        (seen,) = rig.forwarded()
        assert seen.body == json.dumps(body | {"model": real}).encode()
        last = (await rig.ended())[-1]
        assert (last.model, last.alias) == (real, f"x-{body['model']}")
        plain = await rig.ask("POST", path, body)
        assert plain.get("x-balancer-model") is None
        assert (await rig.ended(2))[-1].alias == ""


@virtual
async def test_a_transcription_knows_aliases() -> None:
    """In its form, too."""
    config = {"models.aliases": {"whisper-1": "ear"}}
    ear = SimModel("ear", capabilities=("completion", "audio"), load_s=0.0)
    head = 'Content-Disposition: form-data; name="'
    form = (
        f'--b\r\n{head}model"\r\n\r\nwhisper-1\r\n'
        f'--b\r\n{head}file"; filename="a.wav"\r\n\r\nRIFF....WAVE\r\n--b--\r\n'
    ).encode()
    async with running(1, models=[ear], config=config) as rig:
        lines = [
            "POST /v1/audio/transcriptions HTTP/1.1",
            f"Host: 127.0.0.1:{rig.port}",
            "Content-Type: multipart/form-data; boundary=b",
            f"Content-Length: {len(form)}",
        ]
        reply = await rig.raw("\r\n".join([*lines, "", ""]).encode() + form)
        assert reply.get("x-balancer-model") == "ear"
        (seen,) = rig.forwarded()
        assert seen.body == form.replace(b"whisper-1", b"ear")


@virtual
async def test_aliases_are_listed_shown_and_pulled_for_nothing() -> None:
    """Lists have a copy of the model's row; show tells of the model; a pull has nothing to do."""
    config = {"models.aliases": {"GPT-4o-mini": "m", "lost": "gone"}}
    async with running(1, models=models(0.0), config=config) as rig:
        rows = {row["name"]: row for row in (await told(rig, "GET", "/api/tags"))["models"]}
        assert set(rows) == {"GPT-4o-mini", "m:latest", "other:latest", "e:latest"}
        assert rows["GPT-4o-mini"]["digest"] == rows["m:latest"]["digest"]
        listed = (await told(rig, "GET", "/v1/models"))["data"]
        assert {row["id"] for row in listed} == set(rows)
        one = await told(rig, "GET", "/v1/models/gpt-4o-mini")
        assert one["id"] == "gpt-4o-mini"
        for more in ({}, {"verbose": True}):
            asked = {"model": "gpt-4o-mini"} | more
            real = await told(rig, "POST", "/api/show", {"model": "m"} | more)
            assert await told(rig, "POST", "/api/show", asked) == real
        pulled = await rig.ask("POST", "/api/pull", {"model": "gpt-4o-mini", "stream": False})
        assert (pulled.status, json.loads(pulled.body)) == (200, {"status": "success"})
        assert (await rig.ask("POST", "/api/pull", {"model": "lost"})).status == 400
        assert (await rig.ask("GET", "/v1/models/lost")).status == 404
        assert (await rig.ask("POST", "/api/show", {"model": "lost"})).status == 404
        reply = await rig.ask("POST", "/api/chat", CHAT | {"model": "lost"})
        assert reply.status == 404
        assert "'gone' not found" in error_of(reply)


@virtual
async def test_stopping_an_alias_unloads_its_model() -> None:
    """As `ollama stop` does it."""
    async with running(2, models=models(0.0), config=FAST) as rig:
        for host in "ab":
            await rig.warm(host, "m")
        reply = await rig.ask("POST", "/api/generate", {"model": "fast", "keep_alive": 0})
        assert json.loads(reply.body)["model"] == "m"
        assert rig.loaded() == {"a": [], "b": []}


@virtual
async def test_a_model_of_an_aliass_name_is_not_reached() -> None:
    """The operator's word wins."""
    async with running(1, models=models(0.0), config={"models.aliases": {"other": "m"}}) as rig:
        await rig.ask("POST", "/api/chat", CHAT | {"model": "other:latest"})
        assert served_as(rig) == ["m"]


@virtual
async def test_aliases_change_on_reload() -> None:
    """What runs ends as it began; the next call, and the next list, know the new ones."""
    async with running(1, models=models(0.0), config=FAST) as rig:
        asking = await Asking.of(rig, "/api/chat", CHAT | {"model": "fast"})
        await asking.head()
        rig.config["models.aliases"] = {"slow": "other"}
        rig.config["models.hide"] = ["m"]
        as_json = {"Content_Type": "application/json"}
        assert (await rig.ask("POST", "/_balancer/reload", {}, **as_json)).status == 200
        assert is_whole(await asking.rest(), "/api/chat")
        asking.close()
        listed = (await told(rig, "GET", "/api/tags"))["models"]
        assert sorted(row["name"] for row in listed) == ["e:latest", "other:latest", "slow"]
        assert (await rig.ask("POST", "/api/chat", ASK)).status == 404
        await told(rig, "POST", "/api/chat", ASK | {"model": "slow"})
        assert served_as(rig) == ["m", "other"]


@virtual
async def test_hidden_models_can_be_called_all_the_same() -> None:
    """Not listed; shown, called, and in ps."""
    async with running(1, models=models(0.0), config={"models.hide": ["m", "o*"]}) as rig:
        assert [r["name"] for r in (await told(rig, "GET", "/api/tags"))["models"]] == ["e:latest"]
        assert [r["id"] for r in (await told(rig, "GET", "/v1/models"))["data"]] == ["e:latest"]
        await told(rig, "POST", "/api/show", {"model": "m"})
        await told(rig, "POST", "/api/chat", CHAT | {"stream": False})
        rig.balancer.prober.refresh("a")
        await rig.events.until(lambda: rig.balancer.catalog.ps()["models"] != [])
        assert [r["name"] for r in (await told(rig, "GET", "/api/ps"))["models"]] == ["m:latest"]


@virtual
async def test_a_key_is_for_the_name_asked_for() -> None:
    """One that is for an alias needs none for the model, and one for the model none for it."""
    secret = "k" * 32
    keys = [{"name": "app", "key": secret, "models": ["fast"]}]
    async with running(1, models=models(0.0), config=FAST | {"auth.keys": keys}) as rig:
        bearer = f"Bearer {secret}"
        listed = await rig.ask("GET", "/api/tags", Authorization=bearer)
        assert [row["name"] for row in json.loads(listed.body)["models"]] == ["fast"]
        reply = await rig.ask("POST", "/api/chat", ASK, Authorization=bearer)
        assert is_whole(reply, "/api/chat")
        reply = await rig.ask("POST", "/api/chat", ASK | {"model": "m"}, Authorization=bearer)
        assert reply.status == 403


# -- a chain -----------------------------------------------------------------------------------


@virtual
async def test_the_first_that_can_be_served_now() -> None:
    """A breaker that is open, a host that is down: the next; the first again once it can."""
    async with running(2, models=models(0.0), config=FAST) as rig:
        await without(rig, a="m")
        gate = rig.balancer.pool._model_gate(rig.balancer.pool.members["b"], M)
        gate.trip("2 in a row")
        await told(rig, "POST", "/api/chat", ASK)
        gate.reset()
        await told(rig, "POST", "/api/chat", ASK)
        assert served_as(rig) == ["other", "m"]
        assert [call.model for call in await rig.ended(2)] == ["other", "m"]


@virtual
async def test_with_none_now_it_waits_for_the_first_that_is_known() -> None:
    """Not for a model that nobody has."""
    config = {"models.aliases": {"fast": ["nowhere", "m", "other"]}}
    async with running(1, models=models(0.0), config=config) as rig:
        rig.balancer.pool.members["a"].gate.trip("3 in a row")
        reply = await rig.ask("POST", "/api/chat", ASK)
        assert is_whole(reply, "/api/chat")
        assert rig.balancer.pool.members["a"].gate.state is BreakerState.CLOSED
        assert served_as(rig) == ["m"]


async def without(rig: Rig, **models: str) -> None:
    """Take a model from each of these hosts, and have the balancer know it."""
    for host, model in models.items():
        rig.fleet[host].faults.lose(model)
        rig.balancer.prober.refresh(host)
    catalog = rig.balancer.catalog
    await rig.events.until(lambda: all(len(catalog.listed(host)) == 2 for host in models))


@virtual
async def test_a_host_that_is_found_dead_is_not_waited_for() -> None:
    """Alone it would be: there is another model, and somebody has it."""
    async with running(2, models=models(0.0), config=FAST) as rig:
        await without(rig, a="other", b="m")
        rig.fleet["a"].faults.refuse()
        began = now()
        reply = await rig.ask("POST", "/api/generate", {"model": "fast", "prompt": ""})
        assert (reply.status, reply.get("x-balancer-backend")) == (200, "b")
        assert now() - began < 0.5
        assert verdicts(rig) == [("b", "ok")]


@virtual
async def test_a_host_that_failed_with_one_model_may_serve_the_next() -> None:
    """Here nobody else has it."""
    async with running(3, models=models(1.0), config=FAST) as rig:
        await without(rig, c="other")
        for host in rig.fleet:
            host.faults.fail("m", NO_GPU)
        reply = await rig.ask("POST", "/api/chat", ASK)
        assert (reply.status, reply.get("x-balancer-attempts")) == (200, "3")
        assert served_as(rig) == ["other"]


@virtual
async def test_who_waited_in_vain_for_the_first_gets_the_next() -> None:
    """Its host stays away for as long as a call may wait; another has come back meanwhile."""
    async with running(2, models=models(0.0), config=FAST | {"queue.max_wait": "20s"}) as rig:
        await without(rig, a="other", b="m")
        rig.fleet["a"].faults.refuse()
        await asyncio.sleep(30.0)
        rig.balancer.pool.members["b"].gate.trip("3 in a row")
        began = now()
        reply = await rig.ask("POST", "/api/chat", ASK)
        assert is_whole(reply, "/api/chat")
        assert (served_as(rig), reply.get("x-balancer-backend")) == (["other"], "b")
        assert now() - began >= 20.0


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
@pytest.mark.parametrize("hosts", [1, 2, 3])
@virtual
async def test_what_can_be_loaded_nowhere_gives_way(hosts: int, path: str) -> None:
    """At most two loads are tried, as ever; then the next model answers, and the client sees it."""
    async with running(hosts, models=models(1.0), config=FAST) as rig:
        for host in rig.fleet:
            host.faults.fail("m", NO_GPU)
        reply = await rig.ask("POST", path, ASK)
        assert is_whole(reply, path)
        assert json.loads(reply.body)["model"] == "other"
        assert reply.get("x-balancer-model") == "other"
        assert reply.get("x-balancer-attempts") == str(min(hosts, 2) + 1)
        assert served_as(rig) == ["other"]
        (call,) = await rig.ended()
        assert (call.model, call.alias, call.outcome) == ("other", "fast", "ok")


@virtual
async def test_a_model_that_has_gone_gives_way() -> None:
    """The hosts say 404 before their lists are read again."""
    async with running(2, models=models(0.0), config=FAST) as rig:
        for host in rig.fleet:
            await rig.warm(host.name, "m")
        await rig.watching()
        await asyncio.sleep(1.0)
        for host in rig.fleet:
            host.faults.kill("m")
            host.faults.lose("m")
        reply = await rig.ask("POST", "/api/chat", ASK)
        assert is_whole(reply, "/api/chat")
        assert json.loads(reply.body)["model"] == "other"
        assert [verdict for _, verdict in verdicts(rig)] == ["missing", "missing", "ok"]


@virtual
async def test_with_no_other_left_the_first_answer_is_told() -> None:
    """What the host said of the model, with its status."""
    async with running(1, models=models(0.0), config={"models.aliases": {"fast": "m"}}) as rig:
        rig.fleet["a"].faults.fail("m", NO_GPU)
        reply = await rig.ask("POST", "/api/chat", ASK)
        assert reply.status == 500
        assert NO_GPU in error_of(reply)


@virtual
async def test_a_callers_mistake_does_not_go_down_the_chain() -> None:
    """A 400 is a 400 of every model."""
    async with running(1, models=models(0.0), config=FAST) as rig:
        text = b'{"error":"\\"m\\" does not support thinking"}'
        rig.fleet["a"].script("/api/chat", status=400, segments=[text])
        reply = await rig.ask("POST", "/api/chat", ASK)
        assert (reply.status, reply.body) == (400, text)
        assert served_as(rig) == ["m"]


@virtual
async def test_after_the_first_record_nothing_gives_way() -> None:
    """A stream that breaks off is told, never continued by another model."""
    async with running(1, models=models(0.0), config=FAST) as rig:
        rig.fleet["a"].faults.error_line(3)
        reply = await rig.ask("POST", "/api/chat", ASK | {"stream": True})
        assert "error" in records(reply)[-1]
        assert served_as(rig) == ["m"]


@virtual
async def test_crashes_are_not_spread_over_the_chain() -> None:
    """A prompt that kills two runners is not tried on a third."""
    config = {"models.aliases": {"fast": ["m", "other", "e"]}}
    async with running(1, models=models(0.0), config=config) as rig:
        crashed = "model runner has unexpectedly stopped, this may be due to resource limitations"
        for model in ("m", "other", "e"):
            rig.fleet["a"].faults.fail(model, crashed, 500, "run")
        reply = await rig.ask("POST", "/api/generate", {"model": "fast", "prompt": "x"})
        assert reply.status >= 500
        assert served_as(rig) == ["m", "other"]


@virtual
async def test_explain_says_what_an_alias_is_now() -> None:
    """The model that a call would go to, and the whole chain; nothing comes of asking."""
    async with running(1, models=models(0.0), config=FAST) as rig:
        await rig.warm("a", "other")
        doc = await told(rig, "GET", "/_balancer/explain?model=fast")
        assert (doc["model"], doc["alias"]) == (
            "m:latest",
            {"name": "fast", "models": ["m", "other"]},
        )
        member = rig.balancer.pool.members["a"]
        rig.balancer.pool._model_gate(member, M).trip("2 in a row")
        doc = await told(rig, "GET", "/_balancer/explain?model=Fast")
        assert (doc["model"], doc["outcome"]["kind"]) == ("other:latest", "now")
        assert M not in member.asked
        doc = await told(rig, "GET", "/_balancer/explain?model=m")
        assert doc["alias"] is None


# -- one name, two models ----------------------------------------------------------------------

M = "registry.ollama.ai/library/m:latest"
AB = ("a", "b")


async def differ(rig: Rig, host: str) -> None:
    """Put other weights of everything on a host, and have the balancer know it."""
    for model in rig.fleet[host].host.models:
        rig.fleet[host].faults.gain(replace(model, content=f"another {model.name}"))
    rig.balancer.prober.refresh(host)
    await rig.events.until(lambda: len(rig.balancer.catalog.conflicts()) == len(models()))


@virtual
async def test_embeddings_stay_on_one_set_of_weights() -> None:
    """However long it takes for a host that has them to come back."""
    async with running(3, models=models(0.0)) as rig:
        await differ(rig, "c")
        ask = {"model": "e", "input": "x"}
        for _ in range(6):
            assert (await rig.ask("POST", "/api/embed", ask)).get("x-balancer-backend") in AB
        doc = await told(rig, "GET", "/_balancer/explain?model=e")
        reasons = {row["name"]: (row["code"], row["reason"]) for row in doc["backends"]}
        assert reasons["c"] == ("weights", "has other weights of this model")
        for host in "ab":
            rig.balancer.pool.members[host].gate.trip("3 in a row")
        began = now()
        reply = await rig.ask("POST", "/v1/embeddings", ask)
        assert (reply.status, reply.get("x-balancer-backend") in AB) == (200, True)
        assert now() > began, "it waited for their breakers"


@virtual
async def test_a_conversation_leaves_its_weights_only_for_want_of_others() -> None:
    """And the log says so."""
    async with running(3, models=models(0.0)) as rig:
        await differ(rig, "c")
        await rig.warm("c", "m")
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert reply.get("x-balancer-backend") in AB, "though it is in memory on c"
        for host in "ab":
            rig.fleet[host].faults.refuse()
        await asyncio.sleep(30.0)
        doc = await told(rig, "GET", "/_balancer/explain?model=m")
        (row,) = (row for row in doc["backends"] if row["name"] == "c")
        assert "of other weights" in row["state"]
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert (reply.get("x-balancer-backend"), reply.get("x-balancer-route")) == (
            "c",
            "other-weights",
        )
        assert (await rig.ended(2))[-1].why == "other-weights"


@virtual
async def test_of_an_alias_nobody_has_all_models_are_told() -> None:
    """By its name, to the client and to whoever has it explained."""
    aliases = {"models.aliases": {"ghost": ["gone", "lost"]}}
    async with running(2, models=models(0.0), config=aliases) as rig:
        reply = await rig.ask("POST", "/api/chat", CHAT | {"model": "Ghost"})
        assert reply.status == 404
        text = error_of(reply)
        assert text.startswith("'ghost' stands for gone, lost: model 'gone' not found")
        outcome = (await told(rig, "GET", "/_balancer/explain?model=ghost"))["outcome"]
        assert (outcome["kind"], outcome["status"], outcome["text"]) == ("refused", 404, text)
