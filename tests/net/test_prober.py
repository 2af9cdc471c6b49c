"""Our own questions: when they are asked, with which words, and what is made of the answers."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from aioresponses import CallbackResult, aioresponses
from yarl import URL

from balancer.config import load
from balancer.core import names
from balancer.core.catalog import Catalog
from balancer.core.dispatch import Dispatcher
from balancer.core.domain import (
    Backend,
    CheckResult,
    PlacementKey,
    Switch,
    Verdict,
)
from balancer.core.events import Event, LoadEnded, TrialEnded
from balancer.core.pool import Pool, PoolSettings
from balancer.core.scheduler import Load
from balancer.core.watchdog import Suspect
from balancer.net.prober import (
    CANARY_TOKENS,
    CANARY_TOKENS_MIDSTREAM,
    Prober,
    ProberSettings,
    _keep_alive,
)
from balancer.net.tasks import Tasks
from balancer.net.upstream import ClientUpstream, Target
from tests.e2e.stage import CHAT, LATE_HEAD, Asking, error_of, models, now, verdicts, virtual
from tests.net.parts import a_call
from tests.rig import Rig, running

pytestmark = pytest.mark.usefixtures("quiet")
AT = "http://gpu0:11434"
LLAMA = names.parse("llama3.2").canonical
NOMIC = names.parse("nomic-embed-text").canonical


# -- with answers made up -------------------------------------------------------------------------


@dataclass
class Stage:
    """A prober over a real pool of one backend whose answers are made up."""

    prober: Prober
    pool: Pool
    catalog: Catalog
    answers: aioresponses
    events: list[Event]

    def sent(self, path: str) -> list[Any]:
        """The bodies that went to a path."""
        calls = self.answers.requests.get(("POST", URL(AT + path)), [])
        return [json.loads(call.kwargs["data"]) for call in calls]

    def know(self, *names_: str, embeds: bool = False) -> None:
        """The backend lists these models."""
        able = ["embedding"] if embeds else ["completion"]
        rows = [_row(name) | {"capabilities": able} for name in names_]
        self.pool.note_tags("gpu0", rows, now())


def _row(name: str) -> dict[str, Any]:
    shown = names.parse(name).display
    return {"name": shown, "model": shown, "digest": "ab" * 32, "size": 5}


@pytest.fixture
async def stage(control_plane: aioresponses) -> AsyncIterator[Stage]:
    """A prober that has asked nothing yet."""
    clock, events = asyncio.get_running_loop().time, list[Event]()
    tasks = Tasks(events.append, clock)
    catalog = Catalog(clock)
    pool = Pool(PoolSettings(), catalog, clock, random.Random(1), events.append)
    upstream = ClientUpstream({"gpu0": Target(AT)}, tasks)
    prober = Prober(
        ProberSettings(), pool, upstream, tasks, clock, lambda: datetime(2026, 5, 4, tzinfo=UTC),
        events.append,
    )  # fmt: skip
    pool.reshape([Backend("gpu0", AT)])
    yield Stage(prober, pool, catalog, control_plane, events)
    await tasks.close()
    await upstream.close()


VERSION = f"{AT}/api/version"
REFUSED = aiohttp.ClientConnectorError(
    aiohttp.client_reqrep.ConnectionKey("gpu0", 11434, False, True, None, None, None),
    ConnectionRefusedError(111, "Connect call failed"),
)
CHECKS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "a page": ({"body": "<html>", "content_type": "text/html"}, "not Ollama's answer", True),
    "other JSON": ({"payload": {"status": "ok"}}, "HTTP 200, not Ollama's answer", True),
    "a version that is no text": ({"payload": {"version": 5}}, "not Ollama's answer", True),
    "an error": ({"status": 500, "payload": {"error": "I am\nunwell"}}, "I am unwell", True),
    "unauthorized": ({"status": 401, "body": ""}, "HTTP 401", True),
    "a redirect": ({"status": 302, "headers": {"Location": VERSION}}, "HTTP 302", True),
    "a deep document": ({"body": "[" * 100_000}, "not Ollama's answer", True),
    "refused": ({"exception": REFUSED}, "cannot connect: connection refused", False),
    "cut": ({"exception": aiohttp.ServerDisconnectedError()}, "closed the connection", True),
}  # fmt: skip


async def test_a_version_is_a_good_check(stage: Stage) -> None:
    """The host is alive, and it is Ollama."""
    stage.answers.get(VERSION, payload={"version": "0.33.0"})
    result = await stage.prober.check("gpu0")
    assert (result.ok, result.version, result.error) == (True, "0.33.0", "")
    assert result.latency_s >= 0


@pytest.mark.parametrize("name", CHECKS)
async def test_anything_else_is_a_bad_check(stage: Stage, name: str) -> None:
    """With a reason for people; only where no connection is to be had the host counts as dead."""
    answer, error, connected = CHECKS[name]
    stage.answers.get(VERSION, **answer)
    result = await stage.prober.check("gpu0")
    assert (result.ok, result.version, result.connected) == (False, None, connected)
    assert error in result.error
    assert "\n" not in result.error


async def test_a_backend_that_has_left_fails_its_check(stage: Stage) -> None:
    """A check that is late harms nobody."""
    result = await stage.prober.check("gone")
    assert (result.ok, result.connected) == (False, False)


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 500, "payload": {"models": []}},
        {"payload": {"models": {}}},
        {"payload": []},
        {"body": "{"},
        {"exception": REFUSED},
    ],
)
async def test_a_list_that_is_none_proves_nothing(stage: Stage, answer: dict[str, Any]) -> None:
    """What was known before stays."""
    stage.answers.get(f"{AT}/api/tags", **answer)
    assert await stage.prober._rows("gpu0", "/api/tags") is None


UNLOAD = {"model": "llama3.2:latest", "prompt": "", "keep_alive": 0}
UNLOAD_EMBED = {"model": "nomic-embed-text:latest", "input": [], "keep_alive": 0}


async def test_an_unload_is_the_empty_call_of_the_route(stage: Stage) -> None:
    """A model that only embeds is unloaded where it can be called; no stream is asked for."""
    stage.know("llama3.2")
    stage.answers.post(f"{AT}/api/generate", payload={"done": True})
    answer = await stage.prober.unload_now("gpu0", LLAMA)
    assert answer is not None
    assert answer.status == 200
    assert stage.sent("/api/generate") == [UNLOAD]
    stage.know("nomic-embed-text", embeds=True)
    stage.answers.post(f"{AT}/api/embed", payload={"embeddings": []})
    await stage.prober.unload_now("gpu0", NOMIC)
    assert stage.sent("/api/embed") == [UNLOAD_EMBED]


@pytest.mark.parametrize(
    ("answer", "failed"),
    [
        ({"payload": {}}, []),
        ({"status": 404, "payload": {"error": "not found"}}, []),
        ({"status": 500, "payload": {"error": "x"}}, ["gpu0"]),
        ({"exception": REFUSED}, ["gpu0"]),
    ],
)
async def test_unloading_everywhere_tells_where_it_failed(
    stage: Stage, answer: dict[str, Any], failed: list[str]
) -> None:
    """A host that does not have the model any more has let go of it."""
    stage.answers.post(f"{AT}/api/generate", **answer)
    assert await stage.prober.unload_all(["gpu0"], LLAMA) == failed


async def test_the_stamp_is_ollamas(stage: Stage) -> None:
    """UTC, with a Z."""
    assert stage.prober.stamp() == "2026-05-04T00:00:00Z"


@pytest.mark.parametrize("tokens", [CANARY_TOKENS, CANARY_TOKENS_MIDSTREAM])
async def test_a_canary_can_neither_reload_nor_pin(stage: Stage, tokens: int) -> None:
    """It has the context and the options that are there, and no keep_alive."""
    stage.know("llama3.2")
    row = _row("llama3.2") | {"context_length": 8192, "expires_at": "2026-05-04T00:00:00Z"}
    stage.pool.note_ps("gpu0", [row], now())
    stage.answers.post(f"{AT}/api/generate", payload={"done": True})
    key = PlacementKey(LLAMA, (("num_gpu", 3), ("shift", False)))
    judgement = await stage.prober._canary("gpu0", key, tokens)
    assert judgement.verdict is Verdict.OK
    (sent,) = stage.sent("/api/generate")
    assert sent.pop("stream") is (tokens == CANARY_TOKENS_MIDSTREAM)
    assert sent == {
        "model": "llama3.2:latest",
        "prompt": "1",
        "options": {"num_gpu": 3, "num_predict": tokens, "num_ctx": 8192},
        "shift": False,
    }


async def test_a_canary_on_a_model_that_embeds(stage: Stage) -> None:
    """Such a model cannot generate."""
    stage.know("nomic-embed-text", embeds=True)
    stage.answers.post(f"{AT}/api/embed", payload={"embeddings": [[1]]})
    await stage.prober._canary("gpu0", PlacementKey(NOMIC), CANARY_TOKENS)
    assert stage.sent("/api/embed") == [
        {"model": "nomic-embed-text:latest", "input": "1", "options": {}}
    ]


@pytest.mark.parametrize(
    ("embeds", "embed", "path", "sent"),
    [
        (False, False, "/api/generate", {"prompt": "", "stream": False}),
        (False, True, "/api/embed", {"input": []}),
        (True, False, "/api/embed", {"input": []}),
    ],
)
async def test_a_load_is_an_empty_call_with_the_options_of_the_one_that_waits(
    stage: Stage, embeds: bool, embed: bool, path: str, sent: dict[str, Any]
) -> None:
    """So that what is loaded is what that call needs; the token comes back."""
    stage.know("llama3.2", embeds=embeds)
    stage.pool.observe("gpu0", CheckResult(True, 0.0, "0.33.0"))
    key = PlacementKey(LLAMA, (("num_ctx", 99), ("shift", False)))
    assert stage.pool.take_token("gpu0", key, "test")
    stage.answers.post(AT + path, payload={"done": True})
    judgement, answer = await stage.prober._run_load("gpu0", key, "5m", embed=embed)
    assert (judgement.verdict, answer is not None) == (Verdict.OK, True)
    options = {"options": {"num_ctx": 99}, "shift": False, "keep_alive": "5m"}
    assert stage.sent(path) == [{"model": "llama3.2:latest", **sent, **options}]
    assert stage.pool.members["gpu0"].loading is None
    assert [event.ok for event in stage.events if isinstance(event, LoadEnded)] == [True]


@pytest.mark.parametrize("given", [0, "0", "0s", "0m0s", None])
async def test_a_load_does_not_hand_on_a_wish_to_unload(given: Any) -> None:
    """Else the model would be gone before the call that waits for it."""
    assert _keep_alive(a_call(keep_alive=given)) is None
    for kept in (5, "5m", -1, "0.5h"):
        assert _keep_alive(a_call(keep_alive=kept)) == kept


async def test_a_list_is_as_old_as_its_question(stage: Stage) -> None:
    """What a call proves while a suspect is looked into is newer than the list that is read."""
    stage.know("llama3.2")
    stage.pool.observe("gpu0", CheckResult(True, 0.0, "0.33.0"))

    def late(url: URL, **_: Any) -> CallbackResult:
        stage.catalog.note_loaded("gpu0", PlacementKey(LLAMA))
        return CallbackResult(payload={"models": []})

    stage.answers.get(f"{AT}/api/ps", callback=late)
    stage.answers.post(f"{AT}/api/generate", payload={"done": True})
    await stage.prober._look_into(Suspect("gpu0", LLAMA, 30.0, others_move=False))
    assert stage.catalog.resident("gpu0", LLAMA) == LLAMA


async def test_a_load_that_was_asked_for_ends_with_its_backend(stage: Stage) -> None:
    """A dead host must not hold its token for as long as a load may take."""
    stage.know("llama3.2")
    stage.pool.observe("gpu0", CheckResult(True, 0.0, "0.33.0"))
    begun = asyncio.Event()

    async def never(url: URL, **_: Any) -> CallbackResult:
        begun.set()
        await asyncio.Event().wait()
        return CallbackResult()

    stage.answers.post(f"{AT}/api/generate", callback=never)

    async def die() -> None:
        await begun.wait()
        stage.prober.abandon("gpu0")

    told, _ = await asyncio.gather(stage.prober.warm("gpu0", LLAMA), die())
    assert told == "was stopped"
    assert stage.pool.members["gpu0"].loading is None
    assert stage.prober._loads == {}


class Told(Dispatcher):
    """A dispatcher that only hears how loads end."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def load_stopped(self, load: Load) -> None:
        self.heard.append("stopped")

    def load_ended(self, load: Load, *_: Any) -> None:
        self.heard.append("ended")

    def kick(self, now: float | None = None) -> None:
        pass


@pytest.mark.parametrize("when", ["before its first step", "victims", "loading", "a bug of ours"])
async def test_a_load_that_is_stopped_gives_its_token_back_once(
    stage: Stage, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as stopped, not as made; a token that was taken anew meanwhile is another's."""
    stage.know("llama3.2")
    stage.pool.observe("gpu0", CheckResult(True, 0.0, "0.33.0"))
    dispatcher = stage.prober.dispatcher = Told()
    key, begun = PlacementKey(LLAMA), asyncio.Event()

    async def never(url: URL, **_: Any) -> CallbackResult:
        begun.set()
        if when == "a bug of ours":
            raise RuntimeError("no such thing")
        await asyncio.Event().wait()
        return CallbackResult()

    stage.answers.post(f"{AT}/api/generate", callback=never)
    victims = (key,) if when == "victims" else ()
    assert stage.pool.take_token("gpu0", key, "call")
    stage.prober.load(Load(None, "gpu0", key, "call", victims))
    (task,) = (t for t in asyncio.all_tasks() if t.get_name().startswith("load of"))
    if when != "before its first step":
        await begun.wait()
    if when != "a bug of ours":
        stage.prober.abandon("gpu0")
    await asyncio.wait({task})
    if when == "loading":  # in the turn before its end is told, somebody else begins the same
        assert stage.pool.take_token("gpu0", key, "call")
    await asyncio.sleep(0)
    ended = [event.ok for event in stage.events if isinstance(event, LoadEnded)]
    assert (dispatcher.heard, ended) == (["stopped"], [False])
    assert (stage.pool.members["gpu0"].loading is not None) == (when == "loading")
    assert stage.prober._loads == {}


# -- in time --------------------------------------------------------------------------------------


def paths(rig: Rig, host: str) -> Counter[str]:
    """What a host was asked, how often."""
    return Counter(seen.path for seen in rig.fleet[host].requests)


@virtual
async def test_what_is_known_is_kept_fresh() -> None:
    """A check and memory every five seconds, the list every thirty, each model's show once."""
    async with running(2) as rig:
        for host in rig.fleet:
            host.requests.clear()
        await asyncio.sleep(300)
        for host in rig.fleet:
            asked = paths(rig, host.name)
            assert 50 <= asked["/api/version"] <= 75
            assert 50 <= asked["/api/ps"] <= 65
            assert 9 <= asked["/api/tags"] <= 12
            assert set(asked) == {"/api/version", "/api/ps", "/api/tags"}


@virtual
async def test_a_host_that_is_down_is_only_checked() -> None:
    """Its lists would not come; when it is back they are read at once."""
    async with running(1) as rig:
        host, member = rig.fleet["a"], rig.balancer.pool.members["a"]
        host.script("/api/version", status=500, segments=[b"{}"], times=12)
        await asyncio.sleep(25)
        assert not member.health.up
        host.requests.clear()
        await asyncio.sleep(20)
        assert set(paths(rig, "a")) == {"/api/version"}
        await rig.events.until(lambda: bool(member.health.up), limit_s=60.0)
        await asyncio.sleep(0.5)
        assert {"/api/tags", "/api/ps"} <= set(paths(rig, "a"))


@virtual
async def test_a_host_that_hangs_costs_only_its_own_checks() -> None:
    """Each has its own task: the others are asked as often as ever."""
    async with running(2) as rig:
        rig.fleet["a"].faults.hang()
        await asyncio.sleep(60)
        rig.fleet["b"].requests.clear()
        await asyncio.sleep(60)
        assert paths(rig, "b")["/api/version"] >= 10
        member = rig.balancer.pool.members["a"]
        assert (member.health.up, member.health.last_error) == (False, "no answer in time")
        rig.fleet["a"].faults.heal()


@virtual
async def test_who_leaves_the_configuration_is_left_alone() -> None:
    """Its checks and its load end; who joins is asked at once."""
    async with running(2, models=models(100.0), **LATE_HEAD) as rig:
        asking = await Asking.of(rig, "/api/chat", CHAT)
        await asyncio.sleep(3)
        (busy,) = [name for name, m in rig.balancer.pool.members.items() if m.loading]
        (other,) = {"a", "b"} - {busy}
        config = load("", {}, overrides={
            "server.listen": ["127.0.0.1:0"],
            "backends": [{"name": other, "url": rig.fleet[other].url}],
        })  # fmt: skip
        rig.balancer.apply(config)
        await asyncio.sleep(1)
        assert rig.fleet[busy].requests[-1].ending == "client-gone", "the load was given up"
        rig.fleet[busy].requests.clear()
        await asyncio.sleep(60)
        assert not rig.fleet[busy].requests
        assert (await asking.head()).get("x-balancer-backend") == other
        asking.hang_up()
        names_ = [{"name": host.name, "url": host.url} for host in rig.fleet]
        rig.balancer.apply(
            load("", {}, overrides={"server.listen": ["127.0.0.1:0"], "backends": names_})
        )
        await asyncio.sleep(1)
        assert paths(rig, busy)["/api/version"] >= 1


# -- loads ----------------------------------------------------------------------------------------


@virtual
async def test_a_load_is_nobodys_to_cancel() -> None:
    """The client leaves, the load goes on, and the next call finds the model in memory."""
    async with running(1, models=models(30.0)) as rig:
        asking = await Asking.of(rig, "/api/chat", CHAT)
        await asyncio.sleep(5)
        asking.hang_up()
        await rig.ended()
        await rig.events.until(lambda: bool(rig.events.of(LoadEnded)), limit_s=60.0)
        assert rig.loaded() == {"a": ["m"]}
        began = now()
        second = await Asking.of(rig, "/api/chat", CHAT)
        assert (await second.head()).status == 200
        assert now() - began < 1.0
        assert rig.fleet["a"].host.counts["loads_started"] == 1
        second.hang_up()


@virtual
async def test_a_load_that_takes_too_long_is_given_up() -> None:
    """After `timeouts.load` the host is told so, and another one is tried."""
    config = {"timeouts.load": "60s"}
    async with running(2, models=models(30.0), config=config, **LATE_HEAD) as rig:
        rig.fleet["a"].faults.slow_load(10.0)
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert (reply.status, reply.get("x-balancer-backend")) == (200, "b")
        assert rig.fleet["a"].host.counts["loads_aborted"] == 1
        told = [(event.backend, event.ok) for event in rig.events.of(LoadEnded)]
        assert told == [("a", False), ("b", True)]
        assert rig.balancer.pool.members["a"].loading is None


@virtual
async def test_a_load_that_fails_is_an_attempt_of_the_call_that_wanted_it() -> None:
    """With one host its answer is relayed; it counts, and the token comes back."""
    async with running(1, models=models(3.0)) as rig:
        rig.fleet["a"].faults.fail("m", "llama-server process has terminated: exit status 2")
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert reply.status == 500
        assert error_of(reply) == "llama-server process has terminated: exit status 2"
        assert [told.attempts for told in rig.calls()] == [1]
        assert rig.balancer.pool.members["a"].loading is None


# -- trials ---------------------------------------------------------------------------------------


async def break_host(rig: Rig, host: str) -> None:
    """Open its breaker: three answers that only a broken host gives."""
    rig.fleet[host].script("/api/chat", status=502, segments=[b"<html>"], times=3)
    for _ in range(3):
        await rig.ask("POST", "/api/chat", CHAT, X_Request_Timeout="0.5")
    assert [verdict for name, verdict in verdicts(rig) if name == host][-3:] == ["fault"] * 3


def trials(rig: Rig) -> list[tuple[str, bool]]:
    """What trials there were, and whether they passed."""
    return [(event.kind, event.ok) for event in rig.events.of(TrialEnded)]


@virtual
async def test_an_open_breaker_is_tried_by_a_canary_of_ours() -> None:
    """On the model that is in memory with known options; users' calls wait meanwhile."""
    async with running(1, models=models(0.0)) as rig:
        await rig.ask("POST", "/api/chat", CHAT)  # our own load: its options are known
        await break_host(rig, "a")
        before = len(rig.forwarded())
        await rig.events.until(lambda: bool(trials(rig)), limit_s=30.0)
        assert trials(rig) == [("canary", True)]
        assert len(rig.forwarded()) == before
        (canary,) = [seen for seen in rig.inference() if b'"num_predict":8' in seen.body]
        assert json.loads(canary.body)["options"]["num_ctx"] == 4096
        assert (await rig.ask("POST", "/api/chat", CHAT)).status == 200


@virtual
async def test_a_trial_that_fails_leaves_it_open_for_longer() -> None:
    """The wait grows; the trial that passes closes it."""
    async with running(1, models=models(0.0)) as rig:
        await rig.ask("POST", "/api/chat", CHAT)
        rig.fleet["a"].script("/api/generate", status=502, segments=[b"<html>"], times=2)
        await break_host(rig, "a")
        began = now()
        await rig.events.until(lambda: ("canary", True) in trials(rig), limit_s=60.0)
        assert trials(rig) == [("canary", False)] * 2 + [("canary", True)]
        assert now() - began > 1 + 2 + 4


@virtual
async def test_with_nothing_in_memory_and_nobody_asking_being_alive_must_do() -> None:
    """A host that was restarted has nothing to try a canary on."""
    async with running(1, models=models(0.0)) as rig:
        await rig.ask("POST", "/api/chat", CHAT)
        await break_host(rig, "a")
        rig.balancer.pool.members["a"].asked.clear()
        rig.fleet["a"].faults.restart()
        rig.balancer.pool.note_ps("a", [], now())
        await rig.events.until(lambda: bool(trials(rig)), limit_s=30.0)
        assert trials(rig)[-1] == ("version", True)


@virtual
async def test_a_model_that_calls_ask_for_is_tried_by_a_load() -> None:
    """Not by a user's call, and only because somebody wants it."""
    async with running(2, models=models(3.0)) as rig:
        rig.fleet["a"].faults.fail("m")
        assert (await rig.ask("POST", "/api/chat", CHAT)).status == 200
        assert rig.calls()[-1].backend == "b"
        await asyncio.sleep(60)
        assert trials(rig) == [], "nobody has asked since"
        rig.fleet["a"].faults.heal()
        await rig.ask("POST", "/api/chat", CHAT)
        await rig.events.until(lambda: bool(trials(rig)), limit_s=60.0)
        assert trials(rig) == [("load", True)]
        assert "m" in rig.loaded()["a"]


@virtual
async def test_a_trial_gives_its_permit_back_whatever_happens() -> None:
    """Ended in the middle it has learned nothing, and the next one follows."""
    async with running(1, models=models(0.0)) as rig:
        await rig.ask("POST", "/api/chat", CHAT)
        await break_host(rig, "a")
        rig.fleet["a"].faults.hang_inference()
        gate = rig.balancer.pool.members["a"].gate
        await asyncio.sleep(gate.retry_in() + 2)
        assert gate.state.value == "half_open"
        trips = gate.trips
        (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "trial of a"]
        task.cancel()
        await asyncio.wait([task])
        assert (trials(rig), gate.trips) == ([("canary", False)], trips)
        rig.fleet["a"].faults.heal()
        await rig.events.until(lambda: ("canary", True) in trials(rig), limit_s=30.0)
        assert gate.state.value == "closed"


@virtual
async def test_a_disabled_host_is_not_tried() -> None:
    """The operator's word counts more than a breaker."""
    async with running(1, models=models(0.0)) as rig:
        await rig.ask("POST", "/api/chat", CHAT)
        await break_host(rig, "a")
        rig.balancer.pool.turn("a", Switch.DISABLED)
        await asyncio.sleep(120)
        assert trials(rig) == []
