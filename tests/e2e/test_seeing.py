"""What can be seen from outside: events, log lines, headers, pages and metrics agree."""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from balancer.core.domain import Outcome, Verdict
from balancer.core.events import (
    AttemptEnded,
    BreakerMoved,
    CallEnded,
    CheckEnded,
    Event,
    LeaseGranted,
    LoadEnded,
)
from balancer.ops.log import LogWriter, configure
from tests.e2e.stage import CHAT, Asking, is_whole, models, virtual
from tests.rig import Rig, running
from tests.sim.wire import Reply

pytestmark = pytest.mark.usefixtures("quiet")

NO_GPU = "llama-server process has terminated: exit status 2"


async def everything(rig: Rig) -> dict[str, tuple[int, str]]:
    """A request for every way to end, named by its id, with the status and outcome to expect."""
    a, b = rig.fleet["a"], rig.fleet["b"]
    expected: dict[str, tuple[int, str]] = {}

    async def ask(
        name: str, status: int, outcome: str, method: str, path: str, body: Any = None, **more: str
    ) -> None:
        expected[name] = (status, outcome)
        reply = await rig.ask(method, path, body, X_Request_Id=name, **more)
        assert reply.status == status, (name, reply)
        assert reply.get("x-request-id") == name

    async def leave(name: str, status: int, records: int, body: dict[str, Any]) -> None:
        expected[name] = (status, "client_abort")
        asking = await Asking.of(rig, "/api/chat", body, X_Request_Id=name)
        if records:
            await asking.head()
        for _ in range(records):
            await asking.record()
        await asyncio.sleep(0.02)
        asking.hang_up()
        await asyncio.sleep(0.5)

    chat = ("POST", "/api/chat")
    await ask("stream", 200, "ok", *chat, CHAT)
    await ask("whole", 200, "ok", *chat, CHAT | {"stream": False})
    await ask("v1", 200, "ok", "POST", "/v1/chat/completions", CHAT | {"stream": True})
    await ask("embedding", 200, "ok", "POST", "/api/embed", {"model": "e", "input": "x"})
    await ask("list", 200, "ok", "GET", "/api/tags")
    await ask("root", 200, "ok", "HEAD", "/")
    await ask("show", 200, "ok", "POST", "/api/show", {"model": "m"})
    await ask("page", 200, "ok", "GET", "/_balancer/ready")
    await ask("unknown-path", 404, "rejected", "GET", "/nowhere")
    await ask("wrong-method", 405, "rejected", "PUT", "/api/chat")
    await ask("preflight", 204, "ok", "OPTIONS", "/api/chat", Origin="http://localhost:3000")
    await ask("foreign-page", 403, "rejected", *chat, CHAT, Origin="https://evil.example")
    await ask("not-json", 400, "rejected", *chat, b"{")
    await ask("no-model", 404, "rejected", *chat, CHAT | {"model": "nobody"})
    await ask("no-account", 403, "rejected", "POST", "/api/me")
    await ask("unload", 200, "ok", "POST", "/api/generate", {"model": "e", "keep_alive": 0})
    await leave("left-early", 499, 0, CHAT)
    await leave("left-midway", 200, 3, CHAT)
    for host in (a, b):
        host.script("/v1/completions", status=400, segments=[b'{"error":"yours"}'], times=None)
    await ask("callers", 400, "rejected", "POST", "/v1/completions", {"model": "m", "prompt": "x"})
    for host in (a, b):
        host.faults.cut(3, times=1)
    await ask("cut", 200, "upstream_error", *chat, CHAT)
    for host in (a, b):
        host.faults.heal()
        host.faults.fail("other", NO_GPU)
    await ask("failing", 500, "upstream_error", *chat, CHAT | {"model": "other"})
    await ask("broken", 503, "shed", *chat, CHAT | {"model": "other"}, X_Request_Timeout="1")
    for host in (a, b):
        host.faults.slow(1000.0)
    await ask("deadline", 504, "timeout", *chat, CHAT, X_Request_Timeout="3")
    return expected


@virtual
async def test_one_event_and_one_line_per_request() -> None:
    """Whatever becomes of it: exactly one, with the outcome and the status the client saw."""
    out = io.StringIO()
    async with running(2, models=models()) as rig:
        log = configure("debug", "auto", stream=out, is_tty=False, env={}, wall=lambda: 1e9)
        rig.balancer.bus.subscribe(LogWriter(log))
        await rig.warm("a", "m")
        expected = await everything(rig)
        await rig.ended(len(expected))
    assert {call.request_id: (call.status, call.outcome) for call in rig.calls()} == expected
    assert Counter(call.request_id for call in rig.calls()) == dict.fromkeys(expected, 1)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    told = [line for line in lines if line["event"] == "request"]
    assert [line["request_id"] for line in told] == [call.request_id for call in rig.calls()]
    assert {
        line["request_id"]: (line["http.response.status_code"], line["outcome"]) for line in told
    } == expected


@virtual
async def test_the_fields_of_a_line() -> None:
    """Who, what, where, how long and how many, as the client and the host would tell it."""
    out = io.StringIO()
    async with running(2, models=models()) as rig:
        log = configure("info", "auto", stream=out, is_tty=False, env={}, wall=lambda: 1e9)
        rig.balancer.bus.subscribe(LogWriter(log))
        await rig.warm("a", "m")
        await asyncio.sleep(1.0)  # its lists have been read
        rig.fleet["a"].faults.garbage(times=1)
        reply = await rig.ask(
            "POST", "/api/chat?x=secret", CHAT, X_Request_Id="r-1", User_Agent="me/1"
        )
        await rig.ended()
    last = json.loads(reply.body.splitlines()[-1])
    (line,) = [x for x in map(json.loads, out.getvalue().splitlines()) if x["event"] == "request"]
    took = line.pop("duration_ms"), line.pop("ttft_ms"), line.pop("queue_ms")
    foreseen = line.pop("route.cost_s"), line.pop("route.predicted_ttft_s")
    assert foreseen[0] > foreseen[1] > 0.0
    assert line == {
        "timestamp": "2001-09-09T01:46:40.000Z",
        "level": "info",
        "event": "request",
        "request_id": "r-1",
        "http.request.method": "POST",
        "url.path": "/api/chat",
        "http.response.status_code": 200,
        "client.address": "127.0.0.1",
        "user_agent.original": "me/1",
        "key.name": "anonymous",
        "gen_ai.request.model": "m",
        "backend.name": "b",
        "attempt.count": 2,
        "route.reason": "failover",
        "route.kind": "go",
        "route.backend": "b",
        "route.wait_s": 0.0,
        "route.cached_tokens": 0,
        "bytes_in": len(json.dumps(CHAT)),
        "bytes_out": len(reply.body),
        "gen_ai.usage.input_tokens": last["prompt_eval_count"],
        "gen_ai.usage.output_tokens": last["eval_count"],
        "outcome": "ok",
    }
    assert took == (
        pytest.approx(4000, abs=10),
        pytest.approx(2100, abs=10),
        pytest.approx(2000, abs=5),
    )


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("my-id_1.2:3", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("two words", False),
        ('"}', False),
        ("", False),
    ],
)
@virtual
async def test_the_request_id(sent: str, kept: bool) -> None:
    """A plain one is echoed and goes up; any other, or none, is replaced by one of ours."""
    async with running(1, models=models(0.0)) as rig:
        reply = await rig.ask("POST", "/api/chat", CHAT, X_Request_Id=sent)
        answered = reply.get("x-request-id")
        assert answered is not None
        assert (answered == sent) == kept
        assert kept or (len(answered) == 32 and int(answered, 16))
        assert dict(rig.forwarded()[0].headers)["X-Request-Id"] == answered
        assert rig.calls()[0].request_id == answered


def route(reply: Reply) -> tuple[str | None, ...]:
    """Backend, attempts, reason."""
    return tuple(reply.get(f"x-balancer-{name}") for name in ("backend", "attempts", "route"))


@virtual
async def test_the_headers_tell_the_way() -> None:
    """Backend, attempts, why there, and how long it waited."""
    async with running(2, models=models()) as rig:
        cold = await rig.ask("POST", "/api/chat", CHAT)
        assert (route(cold), cold.get("x-balancer-queue-ms")) == (("a", "1", "cold"), "2001")
        warm = await rig.ask("POST", "/v1/chat/completions", CHAT)
        assert (route(warm), warm.get("x-balancer-queue-ms")) == (("a", "1", "warm"), "0")
        long = CHAT | {"messages": [{"role": "user", "content": "word " * 5000}]}
        await rig.warm("b", "m")
        assert route(await rig.ask("POST", "/api/chat", long))[2] == "short-context"
        rig.fleet["a"].faults.refuse()
        replies = [await rig.ask("POST", "/api/chat", CHAT) for _ in range(2)]
        assert ("b", "2", "failover") in [route(reply) for reply in replies]
        await rig.events.until(lambda: not rig.balancer.pool.members["a"].health.up)
        assert route(await rig.ask("POST", "/api/chat", CHAT)) == ("b", "1", "only")


@pytest.mark.parametrize("path", ["/api/tags", "/api/ps", "/v1/models", "/nowhere", "/"])
@virtual
async def test_every_answer_carries_the_id_alone(path: str) -> None:
    """What no backend was asked for tells no backend."""
    async with running(1, models=models(0.0)) as rig:
        reply = await rig.ask("GET", path, X_Request_Id="r")
        assert reply.get("x-request-id") == "r"
        assert route(reply) == (None, None, None)
        assert reply.get("server") is None


# -- pages --------------------------------------------------------------------------------------


@virtual
async def test_live_and_ready() -> None:
    """Live as long as it answers; ready while one backend could serve, and then again."""
    async with running(2, models=models(0.0)) as rig:

        async def pages() -> tuple[int, int]:
            replies = [await rig.ask("GET", f"/_balancer/{page}") for page in ("live", "ready")]
            assert {reply.get("cache-control") for reply in replies} == {"no-store"}
            return replies[0].status, replies[1].status

        assert await pages() == (200, 200)
        rig.fleet["a"].faults.refuse()
        await asyncio.sleep(20.0)
        assert await pages() == (200, 200)
        rig.fleet["b"].faults.hang()
        await asyncio.sleep(30.0)
        assert await pages() == (200, 503)
        reply = await rig.ask("GET", "/_balancer/ready")
        assert json.loads(reply.body) == {"ready": False, "reason": "no backend can serve a call"}
        rig.fleet["b"].faults.heal()
        await asyncio.sleep(20.0)
        assert await pages() == (200, 200)


async def status(rig: Rig, tag: str = "") -> tuple[Reply, Any]:
    """The status page, and what it says."""
    more = {"If_None_Match": tag} if tag else {}
    reply = await rig.ask("GET", "/_balancer/status", None, **more)
    return reply, json.loads(reply.body) if reply.body else None


@virtual
async def test_status_tells_what_is_going_on() -> None:
    """A load, a queue, a broken model and a dead backend, each where an operator looks."""
    async with running(3, models=models(50.0), config={"queue.max_wait": "3m"}) as rig:
        rig.fleet["b"].faults.fail("other", NO_GPU)
        rig.fleet["c"].faults.refuse()
        await asyncio.sleep(20.0)
        asking = await Asking.of(rig, "/api/chat", CHAT)
        await asyncio.sleep(1.0)
        other = await Asking.of(rig, "/api/chat", CHAT | {"model": "other"})
        await asyncio.sleep(9.0)
        _, told = await status(rig)
        assert (told["ready"], told["draining"], told["running"]) == (True, False, 0)
        waiting = told["queue"].pop("calls")
        assert told["queue"] == {
            "depth": 2,
            "oldest_s": 10.0,
            "per_model": {"m": 1, "other": 1},
            "per_class": {"interactive": 2},
        }
        assert {(row["model"], row["position"], row["waited_s"]) for row in waiting} == {
            ("m", 1, 10.0),
            ("other", 1, 9.0),
        }
        a, b, c = told["backends"]
        assert [each["state"] for each in (a, b, c)] == ["up", "up", "down"]
        assert (c["up"], c["error"]) == (False, "cannot connect: connection refused")
        assert (a["loading"], a["breaker"]["state"]) == ("m:latest", "closed")
        of_m = next(model for model in a["models"] if model["name"] == "m:latest")
        assert (of_m["state"], of_m["in_flight"]) == ("loading", 0)
        of_other = next(model for model in b["models"] if model["name"] == "other:latest")
        assert of_other["breaker"]["state"] == "open"
        assert of_other["breaker"]["reason"] == NO_GPU
        assert told["config"] == {"file": None, "loaded_s_ago": 30, "rejected": []}
        for each in (asking, other):
            await each.head()
            assert is_whole(await each.rest(), "/api/chat")
            each.close()


@virtual
async def test_status_remembers_what_happened() -> None:
    """Newest first: a fault, where the call went on, the breaker; and of each backend its last."""
    async with running(2, models=models(0.0)) as rig:
        for host in "ab":
            await rig.warm(host, "m")
        rig.fleet["a"].faults.garbage(times=3)
        for _ in range(6):
            assert is_whole(await rig.ask("POST", "/api/chat", CHAT), "/api/chat")
        _, told = await status(rig)
        happened = [(row["event"], row["backend"]) for row in told["recent"]]
        assert ("failover", "b") in happened
        assert ("breaker_opened", "a") in happened
        assert happened[-1] == ("backend_added", "a"), "the oldest is last"
        failover = next(row for row in told["recent"] if row["event"] == "failover")
        assert set(failover) == {"at", "event", "backend", "model", "text", "count"}
        assert failover["text"].startswith("after a: ")
        a, b = told["backends"]
        assert [each["verdict"] for each in a["failures"]] == ["fault"] * 3
        assert (b["failures"], a["source"]) == ([], "--backend")


@virtual
async def test_a_backend_that_is_down_has_no_trial() -> None:
    """Its breaker waits until it is up; "in 0 s" would be a promise that nobody keeps."""
    async with running(1, models=models(0.0)) as rig:
        rig.balancer.pool.members["a"].gate.trip("test")
        rig.fleet["a"].faults.refuse()
        await asyncio.sleep(60.0)
        _, told = await status(rig)
        (a,) = told["backends"]
        assert a["breaker"]["trial"] == "a trial when it is up again"


@virtual
async def test_status_is_not_sent_twice() -> None:
    """The same state is 304 to who has seen it; another is sent whole, with another tag."""
    async with running(1, models=models(0.0)) as rig:
        first, _ = await status(rig)
        tag = first.get("etag") or ""
        again, nothing = await status(rig, tag)
        assert (again.status, again.get("etag"), nothing) == (304, tag, None)
        assert is_whole(await rig.ask("POST", "/api/chat", CHAT), "/api/chat")
        other, told = await status(rig, tag)
        assert (other.status, told["status_version"]) == (200, 1)
        assert other.get("etag") != tag


# -- metrics ------------------------------------------------------------------------------------


Key = tuple[str, tuple[tuple[str, str], ...]]


def key(name: str, **labels: str) -> Key:
    """A series."""
    return name, tuple(sorted(labels.items()))


def samples(text: str) -> Iterator[tuple[Key, float]]:
    """Every series of a scrape, without the prefix, and its value."""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield key(sample.name.removeprefix("ollama_balancer_"), **sample.labels), sample.value


def model_label(name: str) -> str:
    """What metrics call a model."""
    known = {"m": "m:latest", "e": "e:latest", "other": "other:latest", "": ""}
    return known.get(name.removesuffix(":latest"), "other")


def history(rig: Rig) -> Counter[Key]:
    """The counters as the events say they must be."""
    counters: Counter[Key] = Counter()
    for event in rig.events.events:
        counters.update(told_by(event))
    return counters


def told_by(event: Event) -> Iterator[Key]:
    """The series that one event adds one to."""
    match event:
        case CallEnded(endpoint=endpoint, backend=backend, outcome=outcome) as e:
            yield key(
                "requests_total",
                endpoint=endpoint,
                model=model_label(e.model),
                backend=backend,
                code=str(e.status),
                outcome=outcome,
            )
            if outcome == "client_abort":
                yield key("client_disconnects_total", phase=e.phase)
        case LeaseGranted(why=why):
            yield key("attempts_total", reason=why)
        case AttemptEnded(backend=backend, outcome=Outcome(verdict=verdict)):
            if verdict not in (Verdict.OK, Verdict.CALLER, Verdict.GONE, Verdict.STOPPED):
                yield key("upstream_errors_total", backend=backend, verdict=verdict.value)
        case BreakerMoved(backend=backend, new=new):
            yield key("breaker_transitions_total", backend=backend, to=new.value)
        case CheckEnded(backend=backend):
            yield key("check_duration_seconds_count", backend=backend)
        case LoadEnded(ok=True, backend=backend, model=model):
            labels = {"model": model_label(model), "backend": backend}
            yield key("model_load_duration_seconds_count", **labels)


@virtual
async def test_the_counters_are_the_history() -> None:
    """Every counter equals what the events of a long trouble add up to; none is left out."""
    async with running(2, models=models()) as rig:
        await rig.warm("a", "m")
        await rig.ended(len(await everything(rig)))
        expected = history(rig)
        reply = await rig.ask("GET", "/metrics")
        assert "version=0.0.4" in (reply.get("content-type") or "")
        told = dict(samples(reply.body.decode()))
        families = {name for name, _ in expected}
        assert {each: value for each, value in told.items() if each[0] in families} == expected
        assert told[key("mishaps_total")] == 0
        tokens = sum(call.usage.tokens_out or 0 for call in rig.calls())
        assert tokens == sum(
            value
            for (name, labels), value in told.items()
            if name == "tokens_total" and ("type", "output") in labels
        )
        in_flight = {value for (name, _), value in told.items() if name == "requests_in_flight"}
        assert in_flight <= {0.0}
