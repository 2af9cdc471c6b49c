"""Inference calls: what goes up, what comes back, and who gives what back when somebody leaves."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any, cast

import pytest

from balancer.core.domain import Outcome, Verdict
from balancer.core.pool import Lease
from tests.conftest import Start
from tests.e2e.stage import CHAT, Asking, error_of, models, now, verdicts, virtual, warm
from tests.net.peer import until
from tests.rig import running

pytestmark = pytest.mark.usefixtures("quiet")
DONE = b'{"model":"m","message":{"role":"assistant","content":""},"done":true,"eval_count":1}\n'
GENERATE = {"model": "m", "prompt": "hi", "stream": False}
ONE = {"slots": 1}


# -- headers --------------------------------------------------------------------------------------


async def test_only_what_may_goes_up(start: Start) -> None:
    """Neither a client's credentials nor what concerns its connection; the backend's own do."""
    auth = {"type": "bearer", "token": "for-the-backend-only"}
    rig = await start(
        1,
        models=models(0.0),
        backend={"auth": auth, "headers": {"X-Team": "blue"}},
        config={"auth.anonymous": "always"},  # who comes through a proxy is not known
    )
    reply = await rig.ask(
        "POST",
        "/api/generate",
        GENERATE | {"options": {"num_predict": 1}},
        Authorization="Bearer the-client's-own",
        X_Api_Key="the-client's-own",
        Cookie="session=1",
        Origin="http://localhost:3000",
        Access_Control_Request_Method="POST",
        Connection="keep-alive, X-Hop\r\nConnection: x-HOP-2",
        Keep_Alive="timeout=5",
        X_Hop="1",
        X_Hop_2="1",
        X_Team="the client's own",
        TE="trailers",
        Trailer="X-Sum",
        Proxy_Authorization="Basic eA==",
        Proxy_Connection="keep-alive",
        Accept_Encoding="gzip",
        Forwarded="for=203.0.113.9",
        X_Forwarded_Host="evil",
        X_Forwarded_Prefix="/evil",
        X_Real_IP="203.0.113.9",
        Referer="http://here/k/KEY/page",
        X_Original_URI="/k/KEY/api/generate",
        X_Original_URL="http://here/k/KEY/api/generate",
        X_Rewrite_URL="/k/KEY/api/generate",
        X_Envoy_Original_Path="/k/KEY/api/generate",
        X_Request_Timeout="60",
        User_Agent="test/1",
        Accept="application/json",
        Content_Type="application/json",
        traceparent="00-1-2-01",
        X_Stainless_Lang="python",
    )
    assert reply.status == 200
    (seen,) = rig.forwarded()
    up = dict(seen.headers)
    via = up.pop("Via")
    assert up == {
        "Host": rig.fleet["a"].url.removeprefix("http://"),
        "User-Agent": "test/1",
        "Accept": "application/json",
        "Content-Type": "application/json",
        "traceparent": "00-1-2-01",
        "X-Stainless-Lang": "python",
        "Accept-Encoding": "identity",
        "X-Forwarded-For": "127.0.0.1",
        "X-Request-Id": reply.get("x-request-id"),
        "Content-Length": str(len(seen.body)),
        "X-Team": "blue",
        "Authorization": "Bearer for-the-backend-only",
    }
    assert via.startswith("1.1 ollama-balancer-")


async def test_our_questions_carry_the_backends_credentials_too(start: Start) -> None:
    """Checks, lists and loads would be refused without them."""
    rig = await start(1, backend={"auth": {"type": "header", "name": "X-Key", "value": "up"}})
    await rig.ask("POST", "/api/chat", {"model": "llama3.2", "messages": []})
    assert {dict(seen.headers).get("X-Key") for seen in rig.fleet["a"].requests} == {"up"}


@pytest.mark.parametrize(
    ("trusted", "client"), [([], "127.0.0.1"), (["127.0.0.0/8"], "203.0.113.9")]
)
async def test_where_a_client_is_is_believed_only_of_our_proxies(
    start: Start, trusted: list[str], client: str
) -> None:
    """X-Forwarded-For is written anew, from what a trusted proxy said or from the connection."""
    config = {"server.trusted_proxies": trusted, "auth.anonymous": "always"}
    rig = await start(1, config=config)
    body = {"model": "llama3.2", "prompt": "x", "stream": False}
    reply = await rig.ask("POST", "/api/generate", body, X_Forwarded_For="6.6.6.6, 203.0.113.9")
    assert reply.status == 200
    (seen,) = rig.forwarded()
    assert [v for k, v in seen.headers if k == "X-Forwarded-For"] == [client]
    assert rig.calls()[-1].client == client


async def test_a_trace_of_the_way_is_kept(start: Start) -> None:
    """Two balancers in a circle must each find their own mark, so that of others stays."""
    rig = await start(1)
    body = {"model": "llama3.2", "prompt": "x", "stream": False}
    await rig.ask("POST", "/api/generate", body, Via="1.0 first, 1.1 ollama-balancer-other")
    via = dict(rig.forwarded()[-1].headers)["Via"]
    assert via.startswith("1.0 first, 1.1 ollama-balancer-other, 1.1 ollama-balancer-")
    for lines in ({"Via": via}, {"VIA": "1.1 x\r\nVia: " + via}):
        assert (await rig.ask("POST", "/api/generate", body, **lines)).status == 508


@pytest.mark.parametrize("stream", [False, True])
async def test_only_what_may_comes_back(start: Start, stream: bool) -> None:
    """The type of the answer and how to cache it; the rest of a backend's headers stays there."""
    rig = await start(1, models=models(0.0))
    await rig.warm("a", "m")
    headers = [
        ("Content-Type", "application/x-ndjson" if stream else "application/json"),
        ("Cache-Control", "no-cache"),
        ("Server", "Evil/1.0"),
        ("Set-Cookie", "a=b"),
        ("X-Powered-By", "x"),
        ("Access-Control-Allow-Origin", "*"),
        ("Connection", "keep-alive"),
        ("Strict-Transport-Security", "max-age=1"),
        ("X-Request-Id", "theirs"),
    ]
    framing: Any = "chunked" if stream else "length"
    rig.fleet["a"].script("/api/chat", headers=headers, segments=[DONE], framing=framing)
    reply = await rig.ask("POST", "/api/chat", CHAT | {"stream": stream}, X_Request_Id="ours")
    kept = {name for name, _ in reply.headers}
    framed = {"Transfer-Encoding", "X-Accel-Buffering"} if stream else {"Content-Length"}
    cached = {"Cache-Control"} if stream else set()
    assert kept == framed | cached | {
        "Content-Type",
        "X-Request-Id",
        "X-Balancer-Backend",
        "X-Balancer-Attempts",
        "X-Balancer-Route",
        "X-Balancer-Queue-Ms",
        "Date",
    }
    assert (reply.get("x-request-id"), reply.get("x-balancer-backend")) == ("ours", "a")


async def test_a_redirect_is_a_fault_of_the_backend(start: Start) -> None:
    """It is not followed, nobody sees it, and another backend answers."""
    rig = await start(2, models=models(0.0))
    await rig.warm("a", "m")
    where = [("Location", "http://evil.example/")]
    rig.fleet["a"].script("/api/chat", status=307, headers=where)
    reply = await rig.ask("POST", "/api/chat", CHAT | {"options": {"num_predict": 1}})
    assert (reply.status, reply.get("location")) == (200, None)
    assert verdicts(rig) == [("a", "misconfigured"), ("b", "ok")]


# -- what is told of a call -----------------------------------------------------------------------


@virtual
async def test_a_call_is_told_with_its_times_and_counts() -> None:
    """When the first byte went out, what it cost, which backend, and why that one."""
    async with running(2, models=models()) as rig:
        body = CHAT | {"options": {"num_predict": 5}}
        reply = await rig.ask("POST", "/api/chat", body)
        (told,) = rig.calls()
        assert (told.model, told.backend, told.why) == ("m", "a", "cold")
        assert (told.status, told.outcome, told.phase) == (200, "ok", "")
        assert (told.streaming, told.inference, told.attempts) == (True, True, 1)
        assert told.usage.tokens_out == 5
        assert told.bytes_out == len(reply.body)
        assert told.bytes_in == len(json.dumps(body))
        assert told.queue_s == pytest.approx(2.0, abs=0.2)
        assert told.first_byte_s is not None
        assert told.queue_s < told.first_byte_s < told.duration_s
        assert reply.get("x-balancer-queue-ms") == str(round(told.queue_s * 1000))


# -- leaving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves_first", [False, True])
@virtual
async def test_a_grant_that_comes_as_its_client_leaves_is_given_back(leaves_first: bool) -> None:
    """In whichever order the two happen within one turn of the loop, no slot stays taken."""
    async with running(1, models=models(), backend=ONE) as rig:
        await rig.warm("a", "m")
        first = await Asking.of(rig, "/api/chat", CHAT)
        await first.head()
        second = await Asking.of(rig, "/api/chat", CHAT)
        await rig.events.until(lambda: bool(rig.balancer.dispatcher.waiting()))
        (lease,) = rig.balancer.pool.members["a"].leases
        waiting = next(each for each in rig.balancer.front.running if not each.status)
        while waiting.request.task is None:  # until a task has taken it over
            await asyncio.sleep(0)
        if leaves_first:
            waiting.request.task.cancel()
            lease.settle(gone())
        else:
            lease.settle(gone())
            assert rig.balancer.pool.running == 1, "granted in the same turn"
            waiting.request.task.cancel()
        await rig.ended()
        assert rig.balancer.pool.running == 0
        assert [told.phase for told in rig.calls()] == ["queued"]
        assert len(rig.forwarded()) == 1, "the second call never went up"
        for one in (first, second):
            one.hang_up()


def gone() -> Outcome:
    """The end of an attempt whose client has left."""
    return Outcome(Verdict.GONE, now(), now())


@pytest.mark.parametrize("phase", ["queued", "before_first_token", "streaming"])
@virtual
async def test_leaving_costs_a_backend_nothing_but_the_call(phase: str) -> None:
    """The slot is free at once, the host hears of it, and nobody is blamed."""
    async with running(1, models=models(), backend=ONE) as rig:
        await rig.warm("a", "m")
        others = [await Asking.of(rig, "/api/chat", CHAT)] if phase == "queued" else []
        for other in others:
            await other.head()
        if phase == "before_first_token":
            rig.fleet["a"].faults.hang_inference()
        leaving = await Asking.of(rig, "/api/chat", CHAT)
        if phase == "queued":
            await rig.events.until(lambda: bool(rig.balancer.dispatcher.waiting()))
        elif phase == "before_first_token":
            await asyncio.sleep(5)
        else:
            await leaving.head()
            await leaving.record()
        leaving.hang_up()
        await rig.ended()
        (told,) = rig.calls()
        assert (told.outcome, told.phase) == ("client_abort", phase)
        assert rig.balancer.pool.running == len(others)
        assert not rig.balancer.dispatcher.waiting()
        assert {b.state.value for v in rig.balancer.pool.snapshot() for b in v.breakers} == {
            "closed"
        }
        if phase != "queued":
            await asyncio.sleep(0.5)
            assert rig.forwarded()[-1].ending == "client-gone"
        for other in others:
            other.hang_up()


@virtual
async def test_a_client_that_does_not_take_a_whole_answer_is_given_up() -> None:
    """After a minute too; by then the backend has long been free."""
    answer = b'{"embeddings":[[' + b"0.125," * 1_390_000 + b"0]]}"  # just below what is held whole
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "e")
        rig.fleet["a"].script("/api/embed", segments=[answer])
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop, began = asyncio.get_running_loop(), now()
            await loop.sock_connect(sock, ("127.0.0.1", rig.port))
            body = b'{"model":"e","input":"x"}'
            head = f"POST /api/embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
            await loop.sock_sendall(sock, head.encode() + b"\r\n\r\n" + body)
            await rig.events.until(lambda: bool(verdicts(rig)))
            assert verdicts(rig) == [("a", "ok")]
            assert rig.balancer.pool.running == 0
            (told,) = await rig.ended(limit_s=120.0)
        assert now() - began == pytest.approx(60.0, abs=5.0)
        assert (told.outcome, told.status) == ("client_abort", 200)


# -- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["X-Request-Timeout", "Request-Timeout", "timeouts.total"])
@virtual
async def test_a_time_limit_before_the_first_record_is_a_504(how: str) -> None:
    """Of the client or of the operator; nobody is blamed for it."""
    config = {how: "7s"} if how == "timeouts.total" else {}
    async with running(1, models=models(0.0), config=config) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].faults.hang_inference()
        began = now()
        headers = {} if config else {how: "7"}
        reply = await rig.ask("POST", "/api/chat", CHAT, **headers)
        assert now() - began == pytest.approx(7.0, abs=0.1)
        assert (reply.status, "time limit" in error_of(reply)) == (504, True)
        assert [told.outcome for told in rig.calls()] == ["timeout"]
        assert verdicts(rig) == [("a", "gone")]


@virtual
async def test_a_time_limit_counts_the_wait_for_a_slot() -> None:
    """A call whose time has passed in the queue never goes up."""
    async with running(1, models=models(0.0), backend=ONE) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].faults.slow(10.0)
        first = await Asking.of(rig, "/api/chat", CHAT)
        await first.head()
        began = now()
        reply = await rig.ask("POST", "/api/chat", CHAT, X_Request_Timeout="3")
        assert (reply.status, round(now() - began)) == (504, 3)
        assert len(rig.forwarded()) == 1
        first.hang_up()


@pytest.mark.parametrize("text", ["soon", "-1", "0", "nan", "", "1e999"])
async def test_a_time_limit_that_is_none_is_ignored(start: Start, text: str) -> None:
    """Nonsense in a header is no reason to refuse a call."""
    rig = await start(1)
    body = {"model": "llama3.2", "prompt": "x", "stream": False}
    assert (await rig.ask("POST", "/api/generate", body, X_Request_Timeout=text)).status == 200


async def test_without_memory_to_repeat_a_call_it_is_not_repeated(start: Start) -> None:
    """Beyond `server.replay_memory` a call goes up once, and what that gives is the answer."""
    rig = await start(2, config={"server.replay_memory": "1KiB"})
    await rig.warm("a", "llama3.2")
    rig.fleet["a"].faults.reset_head()
    body = {"model": "llama3.2", "prompt": "x", "stream": False}
    assert (await rig.ask("POST", "/api/generate", body | {"prompt": "x" * 2000})).status == 503
    assert len(rig.forwarded()) == 1
    assert (await rig.ask("POST", "/api/generate", body)).status == 200


@virtual
async def test_a_full_queue_refuses_before_the_body_is_sent() -> None:
    """Who waits for `100 Continue` need not send megabytes to hear of it."""
    config = {"queue.max_depth": 1}
    async with running(1, models=models(0.0), backend=ONE, config=config) as rig:
        await rig.warm("a", "m")
        busy = [await Asking.of(rig, "/api/chat", CHAT)]
        await busy[0].head()
        busy.append(await Asking.of(rig, "/api/chat", CHAT))
        await rig.events.until(lambda: bool(rig.balancer.dispatcher.waiting()))
        reply = await rig.raw(
            b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        assert (reply.status, reply.interim) == (503, [])
        assert 1 <= int(reply.get("retry-after") or 0) <= 60
        assert "queue.max_depth" in error_of(reply)
        for one in busy:
            one.hang_up()


@pytest.mark.parametrize("name", ["content-type", "Content-type", "CONTENT-TYPE"])
@virtual
async def test_the_name_of_a_header_may_be_written_in_any_way(name: str) -> None:
    """A stream stays one: its break is told in a record."""
    async with warm() as (rig, _):
        lines = [b'{"model":"m","message":{"role":"assistant","content":"x"},"done":false}\n']
        rig.fleet["a"].script(
            "/api/chat",
            headers=[(name, "application/x-ndjson"), ("content-TYPE", "text/event-stream")],
            segments=lines,
            framing="chunked",
            ending="reset",
        )
        reply = await rig.ask("POST", "/api/chat", CHAT)
        told = [(k, v) for k, v in reply.headers if k.lower() == "content-type"]
        assert told == [("Content-Type", "application/x-ndjson")]
        assert (len(reply.body.splitlines()), reply.ended) == (2, "clean")
        assert "error" in json.loads(reply.body.splitlines()[-1])


@virtual
async def test_a_lease_that_comes_as_we_stop_is_not_lost() -> None:
    """It may have come before the task of its call had its first turn."""
    async with warm(backend=ONE) as (rig, _):
        proxy, leases = cast("Any", rig.balancer.proxy), list[Lease]()
        begin, go_on = proxy.begin, proxy.go_on

        def noting(exchange: Any, course: Any, lease: Lease) -> Any:
            leases.append(lease)
            return begin(exchange, course, lease)

        async def late(exchange: Any, course: Any) -> Any:
            leases[0].release()
            proxy.stopping = True
            return await go_on(exchange, course)

        proxy.begin, proxy.go_on = noting, late
        rig.fleet["a"].faults.hang_inference()
        first = await Asking.of(rig, "/api/chat", CHAT)
        await until(lambda: bool(rig.forwarded()))
        second = await Asking.of(rig, "/api/chat", CHAT)
        await until(lambda: len(leases) == 2)
        assert rig.balancer.pool.running == 1
        for one in (first, second):
            one.hang_up()
        await rig.ended(2)
        assert rig.balancer.pool.running == 0


async def test_a_user_may_not_unload(start: Start) -> None:
    """What empties the memory of all hosts needs the role admin; the call itself does not."""
    keys = [
        {"name": "u", "role": "user", "key": "0123456789abcdef-user"},
        {"name": "o", "role": "admin", "key": "0123456789abcdef-admin"},
    ]
    rig = await start(1, config={"auth.keys": keys, "auth.anonymous": "never"})
    await rig.warm("a", "llama3.2")
    unload = {"model": "llama3.2", "keep_alive": 0}
    user = {"Authorization": "Bearer 0123456789abcdef-user"}
    run = {"model": "llama3.2", "prompt": "x", "stream": False}
    assert (await rig.ask("POST", "/api/generate", run)).status == 401
    assert (await rig.ask("POST", "/api/generate", run, **user)).status == 200
    assert (await rig.ask("POST", "/api/generate", unload, **user)).status == 403
    assert rig.loaded() == {"a": ["llama3.2"]}
    admin = await rig.ask("POST", "/api/generate", unload, X_Api_Key="0123456789abcdef-admin")
    assert (admin.status, rig.loaded()) == (200, {"a": []})
