"""A host dies, refuses or lies: another answers, or the client is told; never both, never 502."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from balancer.core.events import AttemptEnded
from balancer.sim.host import SimModel
from tests.e2e.stage import (
    CHAT,
    ROUTES,
    STREAMS,
    Asking,
    error_of,
    in_each_lane,
    is_whole,
    models,
    moves,
    now,
    records,
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


@in_each_lane
@pytest.mark.parametrize("route", ["chat, streamed", "v1 chat, streamed"])
@pytest.mark.parametrize("death", DEATHS)
@virtual
async def test_trouble_before_the_first_record_is_not_noticed(
    route: str, death: str, headers: dict[str, str]
) -> None:
    """Whatever a host says or does instead of a first record, another one's answer is whole."""
    path, body = ROUTES[route]
    fault, verdict = DEATHS[death]
    async with running(2, models=models()) as rig:
        await rig.warm("a", "m")
        strike(rig, "a", fault, path)
        reply = await rig.ask("POST", path, body, **headers)
        assert is_whole(reply, path)
        assert verdicts(rig) == [("a", verdict), ("b", "ok")]


@pytest.mark.parametrize("is_warm", [True, False])
@virtual
async def test_the_only_host_restarts(is_warm: bool) -> None:
    """Calls outlast half a minute without any host, be the model in memory or still to load."""
    async with running(1, models=models()) as rig:
        if is_warm:
            await rig.warm("a", "m")
        rig.fleet["a"].faults.refuse()
        asyncio.get_running_loop().call_later(30.0, rig.fleet["a"].faults.heal)
        assert is_whole(await rig.ask("POST", "/api/chat", CHAT), "/api/chat")
        assert rig.calls()[0].duration_s < 50.0


@virtual
async def test_what_cannot_be_repeated_is_not() -> None:
    """Without memory to keep a request, it is sent once; what was never sent may go elsewhere."""
    async with running(2, models=models(), config={"server.replay_memory": 1}) as rig:
        rig.fleet["a"].faults.fail("m", NO_GPU)
        cold = await rig.ask("POST", "/api/chat", CHAT)
        assert (is_whole(cold, "/api/chat"), cold.get("x-balancer-backend")) == (True, "b")
        rig.fleet["b"].faults.reset_head(times=1)
        assert (await rig.ask("POST", "/api/chat", CHAT)).status == 503
        assert verdicts(rig) == [("b", "ok"), ("b", "fault")]


# -- in the stream ------------------------------------------------------------------------------


@in_each_lane
@pytest.mark.parametrize("route", STREAMS)
@pytest.mark.parametrize("fault", [("cut", 3), ("reset", 3), ("restart", 1000.0)])
@virtual
async def test_a_host_that_dies_in_a_stream(
    route: str, fault: tuple[Any, ...], headers: dict[str, str]
) -> None:
    """What came stands, an error record ends it, nothing looks finished, nobody else is asked."""
    path, body = ROUTES[route]
    async with running(2, models=models()) as rig:
        await rig.warm("a", "m")
        asking = await Asking.of(rig, path, body, **headers)
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
        assert len(rig.forwarded()) == 1
        (told,) = await rig.ended()
        assert (told.outcome, told.status, told.attempts) == ("upstream_error", 200, 1)


@pytest.mark.parametrize("route", STREAMS)
@virtual
async def test_three_cut_streams_close_a_host_off(route: str) -> None:
    """The fourth call goes elsewhere, and two long canaries bring the host back."""
    path, body = ROUTES[route]
    async with running(2, models=models()) as rig:
        await rig.warm("a", "m")
        assert is_whole(await rig.ask("POST", path, body), path)  # its runner's options are known
        rig.fleet["a"].faults.cut(3, times=3)
        for _ in range(3):
            assert (await rig.ask("POST", path, body)).get("x-balancer-backend") == "a"
        assert moves(rig) == [("a", None, "open")]
        assert (await rig.ask("POST", path, body)).get("x-balancer-backend") == "b"
        await rig.events.until(lambda: moves(rig)[-1] == ("a", None, "closed"))
        canaries = [json.loads(s.body) for s in rig.inference() if s not in rig.forwarded()]
        assert [c["options"]["num_predict"] for c in canaries if c.get("prompt")] == [32, 32]


@in_each_lane
@virtual
async def test_an_error_in_the_stream_passes_as_it_is(headers: dict[str, str]) -> None:
    """A host that tells the end itself is not told over: one error record, its own."""
    async with running(2, models=models()) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].faults.error_line(3, times=1)
        reply = await rig.ask("POST", "/api/chat", CHAT, **headers)
        assert reply.body == bytes(rig.forwarded()[0].written)
        assert ["error" in each for each in records(reply)] == [False, False, False, True]
        assert verdicts(rig) == [("a", "unfit")]


@in_each_lane
@virtual
async def test_half_a_record_is_never_followed_by_ours(headers: dict[str, str]) -> None:
    """What was held back of an unfinished record is dropped; behind it comes the error record."""
    whole, half = b'{"message":{"content":"a"},"done":false}\n', b'{"message":{"conte'
    kind = [("Content-Type", "application/x-ndjson")]
    async with running(1, models=models()) as rig:
        rig.fleet["a"].script(
            "/api/chat", headers=kind, segments=[whole, half], framing="chunked", ending="cut"
        )
        reply = await rig.ask("POST", "/api/chat", CHAT, **headers)
        assert reply.ended == "clean"
        assert reply.body.startswith(whole + b'{"error":')


@in_each_lane
@virtual
async def test_a_record_too_long_to_hold_breaks_the_body(headers: dict[str, str]) -> None:
    """Where half a record had to be passed on, a broken body tells the client, not a record."""
    kind = [("Content-Type", "application/x-ndjson")]
    half = b'{"message":{"content":"' + 2_000_000 * b"x"
    async with running(1, models=models()) as rig:
        first = b'{"done":false}\n'
        rig.fleet["a"].script(
            "/api/chat", headers=kind, segments=[first, half], framing="chunked", ending="cut"
        )
        reply = await rig.ask("POST", "/api/chat", CHAT, **headers)
        assert reply.ended in ("cut", "reset")
        assert b'"error"' not in reply.body
        assert [call.outcome for call in await rig.ended()] == ["upstream_error"]


@in_each_lane
@pytest.mark.parametrize("route", STREAMS)
@virtual
async def test_a_stream_without_its_last_record(route: str, headers: dict[str, str]) -> None:
    """Native streams may end so and pass as they are; on /v1 an error record says so."""
    path, body = ROUTES[route]
    async with running(1, models=models()) as rig:
        rig.fleet["a"].faults.no_done(3)
        reply = await rig.ask("POST", path, body, **headers)
        written = bytes(rig.forwarded()[0].written)
        assert reply.ended == "clean"
        if path.startswith("/v1/"):
            assert reply.body.startswith(written)
            assert "without the terminal record" in json.dumps(records(reply)[-1]["error"])
        else:
            assert reply.body == written
        assert moves(rig) == []


# -- nobody can ---------------------------------------------------------------------------------


@in_each_lane
@pytest.mark.parametrize("route", ROUTES)
@virtual
async def test_when_all_are_dead_the_text_names_them(route: str, headers: dict[str, str]) -> None:
    """503 with Retry-After, each host and what it did; never 502."""
    path, body = ROUTES[route]
    async with running(3, models=models(), config={"queue.max_wait": "3s"}) as rig:
        for host in rig.fleet:
            await rig.warm(host.name, body["model"])
        for host in rig.fleet:
            host.faults.refuse()
        reply = await rig.ask("POST", path, body, **headers)
        assert reply.status == 503
        assert int(reply.get("retry-after") or 0) >= 1
        for name in "abc":
            assert f"{name}: cannot connect: connection refused" in error_of(reply)
        assert set(verdicts(rig)) == {(name, "fault") for name in "abc"}


@pytest.mark.parametrize("route", ROUTES)
@virtual
async def test_when_all_fail_the_last_answer_is_relayed(route: str) -> None:
    """Status, type and bytes of the last host that said something."""
    path, body = ROUTES[route]
    async with running(2, models=models()) as rig:
        for host in rig.fleet:
            host.faults.fail(body["model"], NO_GPU)
        reply = await rig.ask("POST", path, body)
        assert (reply.status, error_of(reply)) == (500, NO_GPU)
        is_object = isinstance(json.loads(reply.body)["error"], dict)
        assert is_object == path.startswith("/v1/")


@virtual
async def test_an_answer_outlives_a_dead_second_host() -> None:
    """A host's own words are better than ours: they are relayed though the next one was dead."""
    async with running(2, models=models()) as rig:
        for host in "ab":
            await rig.warm(host, "m")
        text = b'{"error":"some template is broken"}'
        rig.fleet["a"].script("/api/chat", status=500, segments=[text])
        rig.fleet["b"].faults.refuse()
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert (reply.status, reply.body) == (500, text)
        assert reply.get("x-balancer-attempts") == "2"


@pytest.mark.parametrize("status", [500, 502])
@virtual
async def test_an_unclear_failure_gets_one_second_opinion(status: int) -> None:
    """The same on one other host is the caller's own mistake: relayed, and nobody is blamed."""
    async with running(3, models=models()) as rig:
        for host in rig.fleet:
            await rig.warm(host.name, "m")
            text = b'{"error":"option \\"top_k\\" must be of type integer"}'
            host.script("/api/chat", status=status, segments=[text], times=None)
        for _ in range(12):
            reply = await rig.ask("POST", "/api/chat", CHAT)
            assert (reply.status, reply.body) == (status, text)
            assert reply.get("x-balancer-attempts") == "2"
        assert len(verdicts(rig)) == 24
        assert {verdict for _, verdict in verdicts(rig)} == {"unclear"}
        assert moves(rig) == []


@virtual
async def test_an_unclear_failure_may_be_one_hosts() -> None:
    """Where the second opinion is an answer, that is the answer."""
    async with running(2, models=models()) as rig:
        for host in "ab":
            await rig.warm(host, "m")
        rig.fleet["a"].script("/api/chat", status=500, segments=[b'{"error":"odd"}'])
        assert is_whole(await rig.ask("POST", "/api/chat", CHAT), "/api/chat")
        assert verdicts(rig) == [("a", "unclear"), ("b", "ok")]


@in_each_lane
@pytest.mark.parametrize("status", [400, 413, 422, 501])
@virtual
async def test_a_callers_mistake_touches_nothing(status: int, headers: dict[str, str]) -> None:
    """Relayed from the first host; no second one is asked, no breaker hears of it."""
    async with running(2, models=models()) as rig:
        await rig.warm("a", "m")
        body = b'{"error":"this is your mistake"}'
        rig.fleet["a"].script("/api/chat", status=status, segments=[body], times=None)
        for _ in range(12):
            reply = await rig.ask("POST", "/api/chat", CHAT, **headers)
            assert (reply.status, reply.body) == (status, body)
        assert verdicts(rig) == [("a", "caller")] * 12
        assert moves(rig) == []
        assert {call.outcome for call in rig.calls()} == {"rejected"}


@pytest.mark.parametrize("kind", ["crash", "reset"])
@virtual
async def test_a_query_of_death_stops_after_two(kind: str) -> None:
    """Two runners die of it, the last answer is relayed, and only the first host is blamed."""
    limits = {"breaker.model.in_a_row": 1, "breaker.host.in_a_row": 1}
    async with running(4, models=models(), config=limits) as rig:
        for host in rig.fleet:
            await rig.warm(host.name, "m")
            host.faults.apply(
                *(("fail", "m", CRASHED, 500, "run"), ("reset_head",))[kind == "reset"]
            )
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert len(rig.forwarded()) == 2
        if kind == "crash":
            assert (reply.status, error_of(reply)) == (500, CRASHED)
            assert moves(rig) == [("a", "m:latest", "open")]
        else:
            assert reply.status == 503
            assert moves(rig) == [("a", None, "open")]
        assert [attempt.outcome.repeated_crash for attempt in rig.events.of(AttemptEnded)] == [
            False,
            True,
        ]


# -- saturation ---------------------------------------------------------------------------------


@virtual
async def test_a_full_host_cools_off() -> None:
    """Nobody notices; being quick to refuse does not make it the idlest; its breaker stays shut."""
    async with running(2, models=models(speed=10.0), backend={"slots": 8}) as rig:
        for host in "ab":
            await rig.warm(host, "m")
        rig.fleet["a"].faults.queue_full()
        for _ in range(300):
            reply = await rig.ask("POST", "/api/chat", CHAT)
            assert is_whole(reply, "/api/chat")
        busy = [host for host, verdict in verdicts(rig) if verdict == "busy"]
        assert set(busy) == {"a"}
        assert len(busy) < 0.1 * len(verdicts(rig))
        assert moves(rig) == []


@virtual
async def test_all_full_for_a_moment_is_waited_out() -> None:
    """Every host refuses for two seconds: the next calls wait and are served."""
    async with running(2, models=models(), backend={"slots": 8}) as rig:
        for host in rig.fleet:
            await rig.warm(host.name, "m")
            host.faults.queue_full()
        first = await rig.ask("POST", "/api/chat", CHAT)
        assert (first.status, "maximum pending" in error_of(first)) == (503, True)
        for host in rig.fleet:
            host.faults.heal()
        assert is_whole(await rig.ask("POST", "/api/chat", CHAT), "/api/chat")
        assert rig.calls()[-1].queue_s > 0.5


# -- one model on one host ----------------------------------------------------------------------


@virtual
async def test_a_model_that_cannot_load_on_one_host() -> None:
    """B serves it, A's other models stay in use, and one load of ours tries A again, in vain."""
    async with running(2, models=models()) as rig:
        await rig.warm("a", "other")
        rig.fleet["a"].faults.fail("m", NO_GPU)
        first = await rig.ask("POST", "/api/chat", CHAT)
        assert is_whole(first, "/api/chat")
        assert (first.get("x-balancer-backend"), first.get("x-balancer-attempts")) == ("b", "2")
        assert moves(rig) == [("a", "m:latest", "open")]
        other = await rig.ask("POST", "/api/chat", CHAT | {"model": "other"})
        assert other.get("x-balancer-backend") == "a"
        began = now()
        while now() < began + 60.0:
            assert (await rig.ask("POST", "/api/chat", CHAT)).get("x-balancer-backend") == "b"
        # 10 s to 15 s, then 20 s to 30 s, then 40 s to 60 s
        assert rig.fleet["a"].host.counts["loads_failed"] in (3, 4)
        rig.fleet["a"].faults.heal()
        await rig.ask("POST", "/api/chat", CHAT)
        for _ in range(12):
            await asyncio.sleep(10.0)
        assert moves(rig)[-1] == ("a", "m:latest", "closed")
        assert "m" in rig.loaded()["a"]
        assert all(backend != "a" for backend, model, _ in moves(rig) if model is None)


@virtual
async def test_nobody_asks_so_nobody_tries() -> None:
    """A model that failed and that no call asked for since is not loaded again to find out."""
    async with running(2, models=models()) as rig:
        rig.fleet["a"].faults.fail("m", NO_GPU)
        await rig.ask("POST", "/api/chat", CHAT)
        await asyncio.sleep(300.0)
        assert rig.fleet["a"].host.counts["loads_started"] == 1
        assert moves(rig) == [("a", "m:latest", "open")]


# -- what is where ------------------------------------------------------------------------------


async def gained(rig: Rig, host: str, model: str) -> None:
    """A model comes to one host alone, and the balancer reads of it."""
    rig.fleet[host].faults.gain(SimModel(model))
    rig.balancer.prober.refresh(host)
    await rig.events.until(
        lambda: rig.balancer.catalog.knows(f"registry.ollama.ai/library/{model}")
    )


@pytest.mark.parametrize("route", ROUTES)
@virtual
async def test_an_unknown_model_is_404_at_once(route: str) -> None:
    """Nobody has it: 404 in the caller's dialect, without a word to any host."""
    path, body = ROUTES[route]
    async with running(2, models=models()) as rig:
        began = now()
        reply = await rig.ask("POST", path, body | {"model": "nobody/has-it"})
        assert reply.status == 404
        assert "nobody/has-it" in error_of(reply)
        assert "not found" in error_of(reply)
        assert now() == began
        assert rig.inference() == []


@pytest.mark.parametrize("away", [("hang",), ("refuse",), ("freeze",), ("restart", 1000.0)])
@virtual
async def test_a_model_on_a_host_that_is_away(away: tuple[Any, ...]) -> None:
    """It stays listed, at once while its host hangs; calls get 503 that never says "not found"."""
    async with running(2, models=models(), config={"queue.max_wait": "3s"}) as rig:
        await gained(rig, "b", "rare:latest")
        await rig.watching()
        rig.fleet["b"].faults.apply(*away)
        for wait_s in (0.0, 1.0, 30.0):
            await asyncio.sleep(wait_s)
            began = now()
            for path, key in [("/api/tags", "models"), ("/v1/models", "data")]:
                rows = json.loads((await rig.ask("GET", path)).body)[key]
                assert "rare:latest" in [row.get("name") or row.get("id") for row in rows]
            for path in ("/api/ps", "/api/version", "/", "/v1/models/rare"):
                assert (await rig.ask("GET", path)).status == 200
            show = await rig.ask("POST", "/api/show", {"model": "rare"})
            assert show.status == 200
            assert now() == pytest.approx(began, abs=0.005)
        reply = await rig.ask("POST", "/api/chat", CHAT | {"model": "rare"})
        assert reply.status == 503
        assert int(reply.get("retry-after") or 0) >= 1
        assert "b: down" in error_of(reply)
        assert "not found" not in error_of(reply).lower()
        assert is_whole(await rig.ask("POST", "/api/chat", CHAT), "/api/chat")


@pytest.mark.parametrize("route", ROUTES)
@virtual
async def test_a_model_deleted_behind_our_back(route: str) -> None:
    """One call finds it missing and is served elsewhere; then it is known; then it is back."""
    path, body = ROUTES[route]
    async with running(2, models=models()) as rig:
        await rig.warm("a", body["model"])
        await asyncio.sleep(1.0)  # its lists have been read
        (lost,) = [m for m in rig.fleet["a"].host.models if m.name == body["model"]]
        rig.fleet["a"].faults.lose(body["model"])
        reply = await rig.ask("POST", path, body)
        assert is_whole(reply, path)
        assert (reply.get("x-balancer-backend"), reply.get("x-balancer-attempts")) == ("b", "2")
        assert verdicts(rig) == [("a", "missing"), ("b", "ok")]
        assert (await rig.ask("POST", path, body)).get("x-balancer-attempts") == "1"
        canonical = f"registry.ollama.ai/library/{body['model']}:latest"
        assert not rig.balancer.catalog.lists("a", canonical)
        rig.fleet["a"].faults.gain(lost)
        await asyncio.sleep(60.0)
        assert rig.balancer.catalog.lists("a", canonical)
        assert moves(rig) == []


@virtual
async def test_a_model_deleted_everywhere_is_404_and_gone() -> None:
    """The host's own 404 is relayed; after that the model is unknown."""
    async with running(2, models=models()) as rig:
        for host in rig.fleet:
            host.faults.lose("m")
        first, second = [await rig.ask("POST", "/api/chat", CHAT) for _ in range(2)]
        assert (first.status, error_of(first)) == (404, "model 'm:latest' not found")
        assert second.status == 404
        assert len(rig.inference()) == 2


@pytest.mark.parametrize("load_s", [2.0, 50.0])
@virtual
async def test_a_host_that_restarted_and_forgot(load_s: float) -> None:
    """The call that finds nothing loaded waits for the load, however long; nobody is blamed."""
    async with running(1, models=models(load_s)) as rig:
        assert is_whole(await rig.ask("POST", "/api/chat", CHAT), "/api/chat")
        rig.fleet["a"].faults.restart()
        reply = await rig.ask("POST", "/api/chat", CHAT)
        assert is_whole(reply, "/api/chat")
        assert rig.fleet["a"].host.counts["loads_started"] == 2
        assert rig.fleet["a"].host.counts["loads_aborted"] == 0
        assert moves(rig) == []
        assert verdicts(rig) == [("a", "ok"), ("a", "ok")]


@pytest.mark.parametrize("route", ["v1 chat", "embed", "chat, streamed"])
@virtual
async def test_an_old_host_without_a_route(route: str) -> None:
    """One call finds out; later ones keep away; other routes go on; a new version is tried anew."""
    path, body = ROUTES[route]
    async with running(2, models=models()) as rig:
        await rig.warm("a", body["model"])
        rig.fleet["a"].faults.missing(path)
        reply = await rig.ask("POST", path, body)
        assert is_whole(reply, path)
        assert verdicts(rig) == [("a", "no_route"), ("b", "ok")]
        assert (await rig.ask("POST", path, body)).get("x-balancer-attempts") == "1"
        generate = {"model": "other", "prompt": "hi", "stream": False}
        rig.fleet["b"].faults.refuse()
        still = await rig.ask("POST", "/api/generate", generate)
        assert (still.status, still.get("x-balancer-backend")) == (200, "a")
        rig.fleet["a"].faults.heal()
        rig.fleet["a"].faults.version("0.99.0")
        await asyncio.sleep(20.0)
        again = await rig.ask("POST", path, body)
        assert (is_whole(again, path), again.get("x-balancer-backend")) == (True, "a")
        assert all(backend == "b" for backend, _, _ in moves(rig))


@virtual
async def test_a_route_nobody_has() -> None:
    """The last host's 404 is relayed, and no host is asked again in vain."""
    async with running(2, models=models()) as rig:
        for host in rig.fleet:
            host.faults.missing("/v1/completions")
        body = {"model": "m", "prompt": "hi"}
        first, second = [await rig.ask("POST", "/v1/completions", body) for _ in range(2)]
        assert (first.status, first.body) == (404, b"404 page not found")
        assert second.status == 503
        assert "serves /v1/completions; update Ollama there" in error_of(second)
        assert len(rig.forwarded()) == 2
