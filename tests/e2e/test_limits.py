"""Who is who, what each may use, and what is seen of it: keys, users, sessions, classes, limits."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from balancer.core.domain import Call
from balancer.sim.host import SimModel
from tests.e2e.stage import CHAT, HELLO, ROUTES, Asking, error_of, in_each_lane, models, virtual
from tests.rig import Rig, running

pytestmark = pytest.mark.usefixtures("quiet")

WEB, JOBS = (f"key-of-{name}-{'0' * 16}" for name in ("web", "jobs"))
BOTH = [
    {"name": "web", "key": WEB, "rpm": -1},
    {"name": "jobs", "key": JOBS, "priority": "batch"},
]
ONE = {"slots": 1}
QUIET: dict[str, Any] = CHAT | {"stream": False}


def by(key: str, **more: str) -> dict[str, str]:
    """Headers of a call with that key."""
    return {"Authorization": f"Bearer {key}"} | more


def watched(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every call that is submitted from now on."""
    calls: list[Call] = []
    submit = rig.balancer.dispatcher.submit

    def see(call: Call, *args: Any, **more: Any) -> Any:
        calls.append(call)
        return submit(call, *args, **more)

    monkeypatch.setattr(rig.balancer.dispatcher, "submit", see)
    return calls


async def status(rig: Rig) -> Any:
    """The status document."""
    return json.loads((await rig.ask("GET", "/_balancer/status")).body)


# -- who is who -----------------------------------------------------------------------------------


@in_each_lane
@virtual
async def test_calls_know_whose_they_are(
    headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Key or address, class, session; whatever way a call takes."""
    async with running(1, models=models(0.0), config={"auth.keys": BOTH}) as rig:
        await rig.warm("a", "m")
        calls = watched(rig, monkeypatch)
        for more in (
            {},
            by(WEB),
            by(JOBS, X_Balancer_Priority="interactive"),
            by(WEB, X_Balancer_Priority="batch"),
            by(WEB, X_Balancer_Priority="-7e99"),
            by(WEB, X_Session_Id="s" * 4000),
            by(JOBS, X_Session_Id="s" * 4000),
        ):
            assert (await rig.ask("POST", "/api/chat", QUIET, **headers, **more)).status == 200
        assert [(call.fair_key, call.batch) for call in calls] == [
            ("ip:127.0.0.1", False),
            ("key:web", False),
            ("key:jobs", True),
            ("key:web", True),
            ("key:web", False),
            ("key:web", False),
            ("key:jobs", True),
        ]
        sessions = [call.session for call in calls]
        assert sessions[:5] == [""] * 5
        assert sessions[5] != sessions[6]
        assert all(0 < len(session) < 200 for session in sessions[5:])
        assert not any("x-balancer-priority" in str(seen).lower() for seen in rig.forwarded())


@virtual
async def test_a_body_names_a_session_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the headers that stand before it, before those that stand behind."""
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        calls = watched(rig, monkeypatch)
        named = {"model": "m", "messages": HELLO, "prompt_cache_key": "p"}
        for body, more in (
            (named, {}),
            (QUIET, {"X_Session_Id": "p"}),
            (named, {"X_OpenWebUI_Chat_Id": "q"}),
            (QUIET, {"X_OpenWebUI_Chat_Id": "q"}),
            (named | {"prompt_cache_key": ["absurd"]}, {}),
        ):
            reply = await rig.ask("POST", "/v1/chat/completions", body, **more)
            assert reply.status == 200
        first, same, third, other, none = [call.session for call in calls]
        assert first == same == third
        assert other not in ("", first)
        assert none == ""


@virtual
async def test_many_texts_to_embed_are_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for that many."""
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "e")
        calls = watched(rig, monkeypatch)
        for count in (1, 16, 17):
            body = {"model": "e", "input": ["x"] * count}
            assert (await rig.ask("POST", "/api/embed", body)).status == 200
        assert [(call.inputs, call.batch) for call in calls] == [
            (1, False),
            (16, False),
            (17, True),
        ]


@pytest.mark.parametrize(
    ("trusted", "more", "whose"),
    [
        (["127.0.0.0/8"], {"X_Forwarded_For": "192.0.2.9"}, "user:ann@example.org"),
        (["10.0.0.0/8"], {}, "key:web"),
        ([], {}, "key:web"),
    ],
)
@virtual
async def test_only_our_proxies_name_users(
    trusted: list[str], more: dict[str, str], whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody else could name himself as he likes, as often as he likes."""
    config = {
        "auth.keys": BOTH,
        "auth.user_header": "X-OpenWebUI-User-Email",
        "queue.fair_by": "user",
        "server.trusted_proxies": trusted,
    }
    async with running(1, models=models(0.0), config=config) as rig:
        await rig.warm("a", "m")
        calls = watched(rig, monkeypatch)
        headers = by(WEB, X_OpenWebUI_User_Email="ann@example.org", **more)
        assert (await rig.ask("POST", "/api/chat", QUIET, **headers)).status == 200
        assert [(call.fair_key, call.owner) for call in calls] == [(whose, "key:web")]


@virtual
async def test_a_reload_changes_who_is_who_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a connection whose client is known already."""
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        calls = watched(rig, monkeypatch)
        asking = Asking(await rig.connect())
        for fair_by in ("key", "none"):
            rig.config["queue.fair_by"] = fair_by
            assert rig.balancer.reload_now().problems == ()
            asking.send(rig, "/api/chat", QUIET)
            assert (await asking.wire.reply()).status == 200
        asking.close()
        assert [call.fair_key for call in calls] == ["ip:127.0.0.1", ""]


# -- what each may use ----------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["chat", "v1 chat", "v1 responses", "v1 messages", "embed"])
@virtual
async def test_beyond_its_minute_a_key_hears_429(route: str) -> None:
    """In its own dialect, with when to come back; other keys are not concerned."""
    path, body = ROUTES[route]
    config = {"auth.keys": BOTH, "limits.rpm": 2}
    async with running(1, models=models(0.0), config=config) as rig:
        await rig.warm("a", body["model"])
        replies = [await rig.ask("POST", path, body, **by(JOBS)) for _ in range(3)]
        assert [reply.status for reply in replies] == [200, 200, 429]
        assert 25 <= int(replies[2].get("retry-after") or "") <= 38
        assert "The key 'jobs' may use 2 requests a minute" in error_of(replies[2])
        for _ in range(3):
            assert (await rig.ask("POST", path, body, **by(WEB))).status == 200
        assert (await rig.ask("GET", "/api/tags", **by(JOBS))).status == 200
        metrics = (await rig.ask("GET", "/metrics")).body.decode()
        assert 'ollama_balancer_limited_total{reason="rpm"} 1.0' in metrics
        await asyncio.sleep(31.0)
        assert (await rig.ask("POST", path, body, **by(JOBS))).status == 200


@in_each_lane
@virtual
async def test_tokens_are_settled_as_the_backend_tells_them(headers: dict[str, str]) -> None:
    """Streamed or not; a call that never came up costs none."""
    async with running(1, models=models(0.0), config={"limits.tokens_per_minute": 1000}) as rig:
        await rig.warm("a", "m")
        limits, used = rig.balancer.limits, 0
        for body in (CHAT, QUIET):
            reply = await rig.ask("POST", "/api/chat", body, **headers)
            last = json.loads(reply.body.splitlines()[-1])
            used += last["prompt_eval_count"] + last["eval_count"]
            left, most = limits.standing("ip:127.0.0.1")["tokens_per_minute"]
            assert most == 1000
            assert 0 <= left - (1000 - used) < 60
        rig.fleet["a"].script("/api/chat", status=400, segments=[b'{"error":"yours"}'])
        before = limits.standing("ip:127.0.0.1")["tokens_per_minute"][0]
        assert (await rig.ask("POST", "/api/chat", QUIET, **headers)).status == 400
        assert limits.standing("ip:127.0.0.1")["tokens_per_minute"][0] >= before


@in_each_lane
@virtual
async def test_who_hangs_up_while_a_host_is_at_it_pays(headers: dict[str, str]) -> None:
    """Also where nothing has come yet; who leaves the queue was never served, and pays nothing."""
    async with running(
        1, models=models(0.0), backend=ONE, config={"limits.tokens_per_minute": 1000}
    ) as rig:
        await rig.warm("a", "m")
        limits = rig.balancer.limits
        at_it = await Asking.of(rig, "/api/chat", QUIET, **headers)
        await asyncio.sleep(0.5)
        queued = await Asking.of(rig, "/api/chat", QUIET, **headers)
        await rig.events.until(lambda: len(rig.balancer.dispatcher.waiting()) == 1)
        charged = limits.standing("ip:127.0.0.1")["tokens_per_minute"][0]
        queued.hang_up()
        await rig.events.until(lambda: not rig.balancer.dispatcher.waiting())
        at_it.hang_up()
        await rig.events.until(lambda: not rig.balancer.pool.running)
        await asyncio.sleep(0.1)
        left = limits.standing("ip:127.0.0.1")["tokens_per_minute"][0]
        assert charged < 1000 - 2 * 256 + 60
        assert charged + 256 <= left < 1000 - 256 + 60


@virtual
async def test_too_long_an_answer_is_refused() -> None:
    """In the words of each dialect's own limit; who asks for less is served."""
    async with running(1, models=models(0.0), config={"limits.max_num_predict": 8}) as rig:
        await rig.warm("a", "m")
        for path, more in (
            ("/api/chat", {"options": {"num_predict": 9}}),
            ("/v1/chat/completions", {"max_tokens": 9}),
            ("/v1/messages", {"max_tokens": 9}),
        ):
            reply = await rig.ask("POST", path, QUIET | more)
            assert reply.status == 400
            assert "at most 8 tokens (limits.max_num_predict), not 9" in error_of(reply)
        fewer = QUIET | {"options": {"num_predict": 8}}
        assert (await rig.ask("POST", "/api/chat", fewer)).status == 200
        assert (await rig.ask("POST", "/api/chat", QUIET)).status == 200


@virtual
async def test_what_waits_is_seen_in_the_status() -> None:
    """Who, in which class, at which place; and what each key has running."""
    slow = (SimModel("m", 4 << 30, load_s=0.0),)
    keys = [*BOTH, {"name": "few", "key": f"few{WEB}", "slots": 1}]
    config = {"auth.keys": keys}
    async with running(1, models=slow, backend={"slots": 2}, config=config) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].faults.slow(30.0)
        asking = []
        for number, headers in enumerate((by(f"few{WEB}"), by(f"few{WEB}"), by(WEB), by(JOBS))):
            more = {**headers, "X_Request_Id": f"r{number}"}
            asking.append(await Asking.of(rig, "/api/chat", CHAT, **more))
            await asyncio.sleep(0.5)
        told = await status(rig)
        waiting = [
            (row["id"], row["model"], row["position"], row["who"], row["class"])
            for row in told["queue"]["calls"]
        ]
        assert sorted(waiting) == [
            ("r1", "m", 2, "key:few", "interactive"),  # a first call goes before a second one
            ("r3", "m", 1, "key:jobs", "batch"),
        ]
        assert all(row["waited_s"] >= 0.5 for row in told["queue"]["calls"])
        assert told["queue"]["per_class"] == {"interactive": 1, "batch": 1}
        rows = {row["who"]: row for row in told["keys"]}
        assert rows["key:few"] == {
            "who": "key:few",
            "in_flight": 1,
            "waiting": 1,
            "limits": {"slots": {"left": 0, "of": 1}},
        }
        assert (rows["key:web"]["in_flight"], rows["key:jobs"]["waiting"]) == (1, 1)
        metrics = (await rig.ask("GET", "/metrics")).body.decode()
        assert 'ollama_balancer_queue_depth{model="m:latest",priority="batch"} 1.0' in metrics
        for each in asking:
            each.hang_up()
        await rig.idle()
        assert (await status(rig))["keys"] == []


@virtual
async def test_a_hopeless_wait_is_refused_on_arrival() -> None:
    """With how long it would be, in text and header, and never while a slot is free."""
    slow = (SimModel("m", 4 << 30, load_s=0.0),)
    config = {"queue.max_wait": "20s", "routing.strategy": "least-loaded"}
    async with running(1, models=slow, backend=ONE, config=config) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].faults.slow(3.0)
        assert (await rig.ask("POST", "/api/chat", QUIET)).status == 200
        asking = [await Asking.of(rig, "/api/chat", CHAT)]
        await asking[0].head()
        refused = None
        while refused is None and len(asking) < 40:
            each = await Asking.of(rig, "/api/chat", CHAT)
            asking.append(each)
            await asyncio.sleep(0.01)
            if rig.calls()[-1].status == 503:
                await each.head()
                refused = await each.rest()
        assert refused is not None
        assert 1 <= int(refused.get("retry-after") or "") <= 60
        assert int(refused.get("x-balancer-queue-wait") or "") > 20
        assert "A slot would come free in about" in error_of(refused)
        metrics = (await rig.ask("GET", "/metrics")).body.decode()
        assert 'ollama_balancer_queue_refused_total{reason="wait"} 1.0' in metrics
        for each in asking:
            each.hang_up()
        await rig.idle()


@virtual
async def test_made_up_sessions_leave_nothing() -> None:
    """Whoever makes up a new one for each call fills no table of ours."""
    async with running(1, models=models(0.0), config={"limits.rpm": 10**8}) as rig:
        await rig.warm("a", "e")
        asking = Asking(await rig.connect())
        for number in range(200):
            more = {"X_Session_Id": f"s{number}", "X_Balancer_Priority": str(number)}
            asking.send(rig, "/api/embed", {"model": "e", "input": "x"}, **more)
            assert (await asking.wire.reply()).status == 200
        asking.close()
        assert len(rig.balancer.limits._buckets) == 1
        assert rig.balancer.limits.all_running() == {}


@in_each_lane
@virtual
async def test_one_key_cannot_fill_the_queue_for_others(headers: dict[str, str]) -> None:
    """Its newest call is refused in favour of a key that has none waiting, and is told so."""
    config = {"auth.keys": BOTH, "queue.max_depth": 3, "queue.adaptive": False}
    async with running(1, models=models(0.0), backend=ONE, config=config) as rig:
        await rig.warm("a", "m")
        jobs = [await Asking.of(rig, "/api/chat", CHAT, **by(JOBS), **headers) for _ in range(4)]
        await asyncio.sleep(0.1)
        full = await rig.ask("POST", "/api/chat", QUIET, **by(JOBS), **headers)
        assert (full.status, "queue.max_depth" in error_of(full)) == (503, True)
        web = await rig.ask("POST", "/api/chat", QUIET, **by(WEB), **headers)
        assert web.status == 200
        gave_way = await jobs[-1].head()
        assert (gave_way.status, gave_way.get("retry-after") is not None) == (503, True)
        assert "other callers have fewer" in error_of(await jobs[-1].rest())
        jobs[-1].close()
        for each in jobs[:-1]:
            assert (await each.head()).status == 200
            each.hang_up()
