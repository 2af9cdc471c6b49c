"""What would become of a call, asked beforehand: the same as then happens, and without a trace."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from balancer.core.events import BreakerMoved, LoadStarted
from tests.e2e.stage import CHAT, Asking, error_of, is_whole, models, virtual
from tests.rig import Rig, running

pytestmark = pytest.mark.usefixtures("quiet")

NO_GPU = "llama-server process has terminated: exit status 2"


async def explain(rig: Rig, **query: Any) -> Any:
    """The document; the model is m unless said otherwise."""
    asked = "&".join(f"{key}={value}" for key, value in ({"model": "m"} | query).items())
    reply = await rig.ask("GET", f"/_balancer/explain?{asked}")
    assert reply.status == 200, reply
    return json.loads(reply.body)


def rows(told: Any) -> dict[str, Any]:
    """By backend, in the order told."""
    return {row["name"]: row for row in told["backends"]}


@virtual
async def test_it_goes_where_it_was_said_to_go() -> None:
    """A free copy first; then the reason of each; and the call follows."""
    greedy = {"routing.strategy": "least-loaded"}
    async with running(3, models=models(0.0), config=greedy) as rig:
        await rig.warm("b", "m")
        told = await explain(rig)
        assert (told["explain_version"], told["model"]) == (1, "m:latest")
        assert told["strategy"] == "least-loaded"
        assert told["outcome"] == {
            "kind": "now",
            "status": 200,
            "backend": "b",
            "wait_s": 0.0,
            "text": "goes to b now",
        }
        assert list(rows(told)) == ["b", "a", "c"]
        best, other = rows(told)["b"], rows(told)["a"]
        assert (best["order"], best["residency"], best["slots"]) == (1, "loaded", 2)
        assert best["state"] == "in memory, a slot is free"
        assert best["reason"] == "could begin sooner than a"
        assert (other["order"], other["state"]) == (2, "not in memory")
        assert other["reason"] == "could begin later than b"
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert (reply.get("x-balancer-backend"), is_whole(reply, "/api/chat")) == ("b", True)


@virtual
async def test_a_cold_model_and_one_that_is_loading() -> None:
    """Where it would be loaded, and how long that may take; then that it is under way."""
    async with running(2, models=models(20.0)) as rig:
        told = await explain(rig)
        assert (told["outcome"]["kind"], told["outcome"]["backend"]) == ("load", "a")
        assert told["outcome"]["wait_s"] > 0
        assert rig.events.of(LoadStarted) == [], "nothing is loaded for an answer"
        asking = await Asking.of(rig, "/api/chat", CHAT)
        await asyncio.sleep(1.0)
        told = await explain(rig)
        assert told["outcome"]["text"] == "waits for the load on a"
        assert (told["queued"], rows(told)["a"]["state"]) == (1, "being loaded")
        await asking.head()
        assert is_whole(await asking.rest(), "/api/chat")
        asking.close()


@virtual
async def test_other_options_are_another_runner() -> None:
    """A larger context than that in memory is a load; a prompt that does not fit is told."""
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        assert (await explain(rig))["outcome"]["kind"] == "now"
        told = await explain(rig, num_ctx=32768)
        assert (told["options"], told["outcome"]["kind"]) == ({"num_ctx": 32768}, "load")
        state = rows(told)["a"]["state"]
        assert state == "not in memory as asked for: it is with other options"
        told = await explain(rig, prompt_tokens=10**8)
        assert "is too short" in rows(told)["a"]["state"]


@virtual
async def test_why_a_backend_may_not() -> None:
    """Each with its code, the reason and when it may be back; the rest go in order."""
    async with running(4, models=models(0.0), dead=["gone"]) as rig:
        await rig.warm("d", "m")
        pool = rig.balancer.pool
        await asyncio.sleep(20.0)
        pool.members["a"].gate.trip("3 in a row")
        pool.turn("b", pool.members["b"].switch.DRAINING)
        pool.members["c"].load.note_busy(None, 30.0)
        before = len(rig.events.events)
        told = await explain(rig)
        codes = {name: (row["may_serve"], row["code"]) for name, row in rows(told).items()}
        assert codes == {
            "d": (True, ""),
            "gone": (False, "unread"),
            "a": (False, "breaker"),
            "b": (False, "draining"),
            "c": (False, "cooling"),
        }
        a, b, c, gone = (rows(told)[name] for name in ("a", "b", "c", "gone"))
        assert a["reason"].startswith("breaker open (3 in a row), next trial in")
        assert a["returns_in_s"] == pytest.approx(pool.members["a"].gate.retry_in(), abs=0.2)
        assert (b["reason"], b["returns_in_s"]) == ("draining", None)
        assert c["returns_in_s"] == pytest.approx(30.0, abs=1.0)
        assert "connection refused" in gone["reason"]
        assert told["outcome"]["backend"] == "d"
        told = await explain(rig, exclude="d")
        assert rows(told)["d"]["code"] == "excluded"
        assert told["outcome"]["kind"] == "away"
        ours = [e for e in rig.events.events[before:] if isinstance(e, BreakerMoved | LoadStarted)]
        assert ours == []


@virtual
async def test_asking_makes_no_trial_load_a_model() -> None:
    """A broken model that nobody calls for stays alone, however often somebody asks why."""
    async with running(1, models=models(0.0)) as rig:
        rig.fleet["a"].faults.fail("other", NO_GPU)
        await rig.ask("POST", "/api/chat", CHAT | {"model": "other"})
        rig.balancer.pool.members["a"].asked.clear()
        loads = len(rig.events.of(LoadStarted))
        for _ in range(30):
            told = await explain(rig, model="other")
            assert rows(told)["a"]["code"] == "model breaker"
            await asyncio.sleep(2.0)
        assert len(rig.events.of(LoadStarted)) == loads


@virtual
async def test_refusals_are_those_of_the_call() -> None:
    """404 with the closest name, word for word."""
    async with running(2, models=models(0.0)) as rig:
        told = await explain(rig, model="othre")
        assert (told["outcome"]["kind"], told["outcome"]["status"]) == ("refused", 404)
        refused = await rig.ask("POST", "/api/chat", CHAT | {"model": "othre"})
        assert (refused.status, error_of(refused)) == (404, told["outcome"]["text"])
        assert {row["code"] for row in told["backends"]} == {"not listed"}


@pytest.mark.parametrize(
    "query", ["", "?model=", "?model=a%20b", "?model=m&num_ctx=x", "?model=m&num_ctx=-1"]
)
@virtual
async def test_a_bad_question(query: str) -> None:
    """400, and what is wrong."""
    async with running(1, models=models(0.0)) as rig:
        reply = await rig.ask("GET", f"/_balancer/explain{query}")
        assert reply.status == 400
        assert error_of(reply)


@virtual
async def test_models_that_differ_between_backends_are_told() -> None:
    """The same name, another digest: which answer one gets depends on the way."""
    async with running(2, models=models(0.0)) as rig:
        assert (await explain(rig))["conflicts"] == {}
        catalog = rig.balancer.catalog
        (row,) = (r for r in catalog.tags()["models"] if r["name"] == "m:latest")
        other = row | {"digest": "f" * 64}
        catalog.note_tags("b", [other], rig.balancer._clock())
        told = await explain(rig)
        assert told["conflicts"] == {row["digest"]: ["a"], "f" * 64: ["b"]}
        doc = rig.balancer.admin.state()
        assert doc["conflicts"] == {"m:latest": told["conflicts"]}
        assert [backend["conflicts"] for backend in doc["backends"]] == [["m:latest"]] * 2


@virtual
async def test_a_model_that_embeds() -> None:
    """It is asked about as it would be called."""
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "e")
        assert (await explain(rig, model="e"))["outcome"]["kind"] == "now"


@virtual
async def test_a_lower_tier_comes_last() -> None:
    """Whatever speaks for it; and it is told which tier each is of."""
    async with running(2, models=models(0.0)) as rig:
        rig.config["backends"][0]["priority"] = 50  # type: ignore[index]
        rig.config["routing.strategy"] = "least-loaded"
        assert rig.balancer.reload_now().problems == ()
        await rig.warm("a", "m")
        told = await explain(rig)
        assert (told["outcome"]["kind"], told["outcome"]["backend"]) == ("load", "b")
        assert [(row["name"], row["priority"], row["reason"]) for row in told["backends"]] == [
            ("b", 100, "has a higher priority than a"),
            ("a", 50, "has a lower priority than b"),
        ]
        for goes_to in ("b", "a"):
            reply = await rig.ask("POST", "/api/chat", CHAT)
            assert (reply.status, reply.get("x-balancer-backend")) == (200, goes_to)
            rig.fleet["b"].faults.refuse()


@virtual
async def test_the_plan_tells_what_a_price_is_made_of() -> None:
    """Term by term; and what was decided on the calls before."""
    async with running(2, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        assert (await explain(rig))["decisions"] == []
        await rig.ask("POST", "/api/chat", CHAT, X_Request_Id="mine")
        told = await explain(rig, prompt_tokens=1000)
        best, other = rows(told)["a"], rows(told)["b"]
        assert (best["kind"], other["kind"]) == ("go", "load")
        for row in (best, other):
            seconds = {k: v for k, v in row["terms"].items() if k.endswith("_s")}
            assert seconds.pop("total_s") == pytest.approx(sum(seconds.values()), abs=1e-3)
        assert other["terms"]["wait_s"] > best["terms"]["wait_s"] == 0.0
        assert told["turn"]["ahead"] == 0
        (past,) = told["decisions"]
        assert (past["call"], past["kind"], past["backend"]) == ("mine", "go", "a")
        assert [each["backend"] for each in past["options"]] == ["a", "b"]
        assert (await explain(rig, call="mine"))["call"] == {
            "id": "mine",
            "waits": False,
            "waited_s": None,
        }


@virtual
async def test_without_a_length_the_mean_prompt_counts() -> None:
    """Of the calls for that model so far."""
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        long = CHAT | {"messages": [{"role": "user", "content": "word " * 800}]}
        await rig.ask("POST", "/api/chat", long)
        assert (await explain(rig))["prompt_tokens"] == pytest.approx(1000, abs=50)
        assert (await explain(rig, prompt_tokens=10))["prompt_tokens"] == 10


@virtual
async def test_a_call_that_waits_can_be_asked_about() -> None:
    """By its id: for what it holds, since when, and how many are before it."""
    async with running(1, models=models(0.0), backend={"slots": 1}) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].faults.slow(50.0)
        first = await Asking.of(rig, "/api/chat", CHAT)
        await asyncio.sleep(0.1)
        others = []
        for number in range(2):
            rig_call = {"X-Request-Id": f"w{number}"}
            others.append(await Asking.of(rig, "/api/chat", CHAT, **rig_call))
            await asyncio.sleep(0.1)
        told = await explain(rig, call="w1")
        assert (told["call"]["id"], told["call"]["waits"]) == ("w1", True)
        assert (told["outcome"]["kind"], told["outcome"]["backend"]) == ("queue", "a")
        assert told["turn"]["ahead"] == 1
        assert rows(told)["a"]["kind"] == "hold"
        for asking in (first, *others):
            asking.close()


@virtual
async def test_whose_call_it_would_be() -> None:
    """A key's own models, share and class count, and a session's name for that key alone."""
    keys: list[dict[str, Any]] = [
        {"name": "few", "role": "user", "key": "key-of-few-0000000000", "models": ["m"]}
    ]
    keys.append({"name": "slow", "role": "user", "key": "key-of-slow-000000000", "priority": 10})
    async with running(2, models=models(0.0), config={"auth.keys": keys}) as rig:
        await rig.warm("a", "m")
        await rig.warm("b", "m")
        assert (await explain(rig, key="few"))["outcome"]["kind"] == "now"
        refused = (await explain(rig, model="other", key="few"))["outcome"]
        assert (refused["kind"], refused["status"], refused["backend"]) == ("refused", 403, None)
        assert refused["text"] == "The key 'few' may use: m."
        assert (await explain(rig, model="other"))["outcome"]["kind"] == "load"
        mine = {"Authorization": "Bearer key-of-few-0000000000", "X_Session_Id": "s1"}
        reply = await rig.ask("POST", "/api/chat", CHAT, **mine)
        went = reply.get("x-balancer-backend") or ""

        async def cached(**asked: Any) -> float:
            told = await explain(rig, prompt_tokens=1000, **asked)
            terms: dict[str, float] = rows(told)[went]["terms"]
            return terms["cached_tokens"]

        assert await cached(key="few", session="s1") > 0
        assert await cached(key="few", session="s2") == 0
        assert await cached(key="slow", session="s1") == 0
        assert await cached(session="s1") == 0


@pytest.mark.parametrize(
    "query", ["?call=nobody", "?model=m&key=nobody", "?model=m&exclude=a&exclude=nobody"]
)
@virtual
async def test_who_is_not_there_cannot_be_explained(query: str) -> None:
    """400, and who was asked about."""
    async with running(1, models=models(0.0)) as rig:
        reply = await rig.ask("GET", f"/_balancer/explain{query}")
        assert reply.status == 400
        assert "nobody" in error_of(reply)


@virtual
async def test_a_pin_that_a_reload_brings_replaces_the_variant_that_is_there() -> None:
    """What others use is left; then it is the pinned one, and explain says so at each step."""
    async with running(2, models=models(2.0)) as rig:
        for host in "ab":
            await rig.warm(host, "m")
        asking = await Asking.of(rig, "/api/chat", CHAT)
        await asking.head()
        busy = next(name for name, row in rows(await explain(rig)).items() if row["in_flight"])
        rig.config["models.pin"] = [{"model": "m", "backends": [busy], "num_ctx": 8192}]
        rig.balancer.reload_now()
        told = rows(await explain(rig, num_ctx=8192))[busy]
        assert (told["state"], told["reason"]) == (
            "with other options",
            "in memory with other options (context 4096): in use",
        )
        assert is_whole(await asking.rest(), "/api/chat")
        asking.close()
        told = rows(await explain(rig, num_ctx=8192))[busy]
        assert told["kind"] == "load"
        assert [victim["model"] for victim in told["victims"]] == ["m:latest"]
        await asyncio.sleep(30.0)
        assert [(load.backend, load.why) for load in rig.events.of(LoadStarted)] == [(busy, "pin")]
        told = await explain(rig, num_ctx=8192)
        assert (told["outcome"]["kind"], told["outcome"]["backend"]) == ("now", busy)


@virtual
async def test_a_key_that_has_used_its_minute_up_is_told_so() -> None:
    """As its next call would be, with when to come back; to ask about it uses nothing up."""
    keys = [{"name": "jobs", "role": "user", "key": "key-of-jobs-000000000"}]
    config = {"auth.keys": keys, "limits.rpm": 2}
    by_jobs = {"Authorization": "Bearer key-of-jobs-000000000"}
    async with running(1, models=models(0.0), config=config) as rig:
        await rig.warm("a", "m")
        for status in (200, 200, 429):
            for _ in range(3):
                outcome = (await explain(rig, key="jobs"))["outcome"]
                assert (outcome["kind"], outcome["status"]) == (
                    ("now", 200) if status == 200 else ("refused", 429)
                )
            reply = await rig.ask("POST", "/api/chat", CHAT, **by_jobs)
            assert reply.status == status
        assert outcome["text"] in error_of(reply)
        assert "Retry after " in outcome["text"]
        assert (await explain(rig))["outcome"]["kind"] == "now"
        await asyncio.sleep(31.0)
        assert (await explain(rig, key="jobs"))["outcome"]["kind"] == "now"
        assert (await rig.ask("POST", "/api/chat", CHAT, **by_jobs)).status == 200
