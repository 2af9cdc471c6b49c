"""Every error of the catalogue happens, and is told in the caller's dialect."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from balancer.core.domain import Dialect
from balancer.core.errors import BalancerError, CutStream, catalogue
from balancer.sim.host import Settings
from tests.e2e.stage import Asking, models, virtual
from tests.rig import Rig, dead_url, running
from tests.sim.wire import Reply

pytestmark = pytest.mark.usefixtures("quiet")
HELLO = [{"role": "user", "content": "hi"}]
PLACES: dict[Dialect, tuple[str, dict[str, Any]]] = {
    Dialect.OLLAMA: ("/api/chat", {"model": "m", "messages": HELLO}),
    Dialect.OPENAI: ("/v1/chat/completions", {"model": "m", "messages": HELLO}),
    Dialect.RESPONSES: ("/v1/responses", {"model": "m", "input": "hi"}),
    Dialect.ANTHROPIC: ("/v1/messages", {"model": "m", "max_tokens": 99, "messages": HELLO}),
}
ONE_SLOT = Settings(num_parallel=1)
KEYS = {
    "auth.anonymous": "never",
    "auth.keys": [{"name": "someone", "key": "0123456789abcdef0123456789abcdef"}],
}


async def call(rig: Rig, dialect: Dialect, **more: Any) -> Reply:
    """One good call in that dialect; *more* are headers, or fields of the body."""
    path, body = PLACES[dialect]
    headers = {name: value for name, value in more.items() if name[0].isupper()}
    fields = {name: value for name, value in more.items() if name not in headers}
    return await rig.ask("POST", path, body | fields, **headers)


async def bug(dialect: Dialect) -> Reply:
    """Something of ours raises."""
    async with running(1, models=models(0.0)) as rig:

        def fail(*_: Any) -> bool:
            raise ZeroDivisionError

        rig.balancer.dispatcher.submit = fail  # type: ignore[assignment, method-assign]
        reply = await call(rig, dialect)
        rig.events.events.clear()  # the mishap was meant
        return reply


async def bad_request(dialect: Dialect) -> Reply:
    """A field of the wrong type."""
    async with running(1, models=models(0.0)) as rig:
        return await call(rig, dialect, model=5)


async def bad_option(dialect: Dialect) -> Reply:
    """An option of the wrong type."""
    async with running(1, models=models(0.0)) as rig:
        return await call(rig, dialect, options={"num_ctx": "x"})


async def no_key(dialect: Dialect) -> Reply:
    """None was sent."""
    async with running(1, models=models(0.0), config=KEYS) as rig:
        return await call(rig, dialect)


async def forbidden(dialect: Dialect) -> Reply:
    """The rules of the only backend rule the model out."""
    async with running(1, models=models(0.0), backend={"models": {"deny": ["m*"]}}) as rig:
        return await call(rig, dialect)


async def unknown_model(dialect: Dialect) -> Reply:
    """Nobody has it."""
    async with running(2, models=models(0.0)) as rig:
        return await call(rig, dialect, model="mm")


async def silent_client(dialect: Dialect) -> Reply:
    """A body that does not come."""
    async with running(1, models=models(0.0)) as rig:
        head = f"POST {PLACES[dialect][0]} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
        return await rig.raw(head.encode())


async def large(dialect: Dialect) -> Reply:
    """A body above the limit."""
    async with running(1, models=models(0.0), config={"server.max_body": 100}) as rig:
        return await call(rig, dialect, more="x" * 200)


async def encoded(dialect: Dialect) -> Reply:
    """A body in an encoding nobody reads."""
    async with running(1, models=models(0.0)) as rig:
        return await call(rig, dialect, Content_Encoding="br")


async def unserved(dialect: Dialect) -> Reply:
    """Signing out of ollama.com itself, which a key in the configuration is signed in to."""
    assert dialect is Dialect.OLLAMA
    key = {"type": "bearer", "token": "x"}
    async with running(0) as rig:
        rig.config["backends"] = [{"name": "far", "url": "https://ollama.com", "auth": key}]
        rig.balancer.reload_now()
        reached = rig.balancer.upstream.targets
        reached["far"] = replace(reached["far"], url=dead_url())
        return await rig.ask("POST", "/api/signout")


async def no_version(dialect: Dialect) -> Reply:
    """Asked before any backend has told its version."""
    assert dialect is Dialect.OLLAMA
    async with running(1, models=models(0.0)) as rig:
        rig.balancer.catalog._versions = None
        return await rig.ask("GET", "/api/version")


async def crowded(dialect: Dialect, config: dict[str, object], ahead: int) -> Reply:
    """So many calls came before, for a backend with one slot."""
    backend = {"slots": 1}
    async with running(
        1, models=models(0.0, speed=0.01), settings=ONE_SLOT, backend=backend, config=config
    ) as rig:
        path, body = PLACES[Dialect.OLLAMA]
        others = [await Asking.of(rig, path, body) for _ in range(ahead)]
        await rig.events.until(lambda: len(rig.balancer.dispatcher.waiting()) == ahead - 1)
        reply = await call(rig, dialect)
        for other in others:
            other.hang_up()
        return reply


async def queue_full(dialect: Dialect) -> Reply:
    """One runs and one waits, where one may."""
    return await crowded(dialect, {"queue.max_depth_per_model": 1}, 2)


async def queue_timeout(dialect: Dialect) -> Reply:
    """One runs, longer than another may wait."""
    return await crowded(dialect, {"queue.max_wait": "2s"}, 1)


async def in_vain(dialect: Dialect) -> Reply:
    """One runs, as long as the one before it; the next has not so much time."""
    config = {"routing.strategy": "least-loaded"}
    async with running(
        1, models=models(0.0), settings=ONE_SLOT, backend={"slots": 1}, config=config
    ) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].faults.slow(3.0)
        assert (await call(rig, Dialect.OLLAMA)).status == 200
        path, body = PLACES[Dialect.OLLAMA]
        other = await Asking.of(rig, path, body)
        await rig.events.until(lambda: rig.balancer.pool.running == 1)
        reply = await call(rig, dialect, X_Request_Timeout="0.5")
        other.hang_up()
        return reply


async def used_up(dialect: Dialect) -> Reply:
    """One call a minute, and this is the second."""
    async with running(1, models=models(0.0), config={"limits.rpm": 1}) as rig:
        assert (await call(rig, Dialect.OLLAMA)).status == 200
        return await call(rig, dialect)


async def memory_full(dialect: Dialect) -> Reply:
    """A large request is kept for as long as nobody answers it; another finds no room."""
    async with running(1, models=models(0.0), config={"server.replay_memory": "1MiB"}) as rig:
        rig.fleet["a"].faults.hang()
        path, body = PLACES[Dialect.OLLAMA]
        other = await Asking.of(rig, path, body | {"more": "x" * 1_000_000})
        await rig.events.until(lambda: rig.balancer.proxy.memory.held > 1_000_000)
        reply = await call(rig, dialect, more="x" * 100_000)
        other.hang_up()
        return reply


async def no_backend(dialect: Dialect) -> Reply:
    """The only one is closed by the operator."""
    async with running(1, models=models(0.0)) as rig:
        path = "/_balancer/backends/a/drain"
        assert (await rig.ask("POST", path, {}, Content_Type="application/json")).status == 200
        return await call(rig, dialect)


async def all_failed(dialect: Dialect) -> Reply:
    """Both close the connection instead of answering."""
    async with running(2, models=models(0.0)) as rig:
        for host in rig.fleet:
            await rig.warm(host.name, "m")
            host.faults.reset_head()
        return await call(rig, dialect)


async def draining(dialect: Dialect) -> Reply:
    """The balancer is about to stop."""
    async with running(1, models=models(0.0)) as rig:
        rig.balancer._refusing = True
        return await call(rig, dialect)


async def late(dialect: Dialect) -> Reply:
    """The client's own limit passes."""
    async with running(1, models=models(0.0)) as rig:
        rig.fleet["a"].faults.hang()
        return await call(rig, dialect, X_Request_Timeout="0.5")


async def loop(dialect: Dialect) -> Reply:
    """It has been here."""
    async with running(1, models=models(0.0)) as rig:
        return await call(rig, dialect, Via=f"1.1 {rig.balancer.front._token}")


async def cut(dialect: Dialect) -> Reply:
    """The backend dies in the middle of a stream."""
    async with running(1, models=models(0.0)) as rig:
        await rig.warm("a", "m")
        rig.fleet["a"].faults.cut(after=8)
        return await call(rig, dialect, stream=True)


NOT_ASKED = frozenset({Dialect.OPENAI, Dialect.RESPONSES, Dialect.ANTHROPIC})
HOW: dict[str, tuple[Callable[[Dialect], Awaitable[Reply]], frozenset[Dialect]]] = {
    "internal_error": (bug, frozenset()),
    "invalid_request": (bad_request, frozenset()),
    "invalid_option": (bad_option, NOT_ASKED),  # only Ollama's own routes have options
    "unauthorized": (no_key, frozenset()),
    "forbidden": (forbidden, frozenset()),
    "model_not_found": (unknown_model, frozenset()),
    "request_timeout": (silent_client, frozenset()),
    "body_too_large": (large, frozenset()),
    "unsupported_encoding": (encoded, frozenset()),
    "not_served": (unserved, NOT_ASKED),
    "unavailable": (no_version, NOT_ASKED),
    "queue_full": (queue_full, frozenset()),
    "wait_too_long": (in_vain, frozenset()),
    "rate_limit_exceeded": (used_up, frozenset()),
    "queue_timeout": (queue_timeout, frozenset()),
    "memory_full": (memory_full, frozenset()),
    "no_backend": (no_backend, frozenset()),
    "attempts_exhausted": (all_failed, frozenset()),
    "draining": (draining, frozenset()),
    "deadline_exceeded": (late, frozenset()),
    "loop_detected": (loop, frozenset()),
    "stream_cut": (cut, frozenset()),
}
KINDS = {kind.code: kind for kind in catalogue()}
CASES = [(code, d) for code, (_, without) in HOW.items() for d in Dialect if d not in without]


def test_every_error_is_provoked() -> None:
    """The catalogue has none that this file does not make happen."""
    assert HOW.keys() == KINDS.keys()
    assert {code for code, _ in CASES} == KINDS.keys()


@pytest.mark.parametrize(("code", "dialect"), CASES, ids=lambda each: getattr(each, "value", each))
def test_an_error_as_its_caller_sees_it(code: str, dialect: Dialect) -> None:
    """Status, shape, code, text, and what says whether to try again."""
    kind, replies = KINDS[code], list[Reply]()

    @virtual
    async def provoke() -> None:
        replies.append(await HOW[code][0](dialect))

    provoke()
    (reply,) = replies
    if kind is CutStream:
        told = last_record(reply)
        assert (reply.status, reply.ended) == (200, "clean")
    else:
        told = json.loads(reply.body)
        assert reply.status == kind.status
        assert reply.get("content-type") == "application/json; charset=utf-8"
        compare_retry(reply, kind)
    text = shaped(told, kind, dialect)
    assert text
    tail = f"[req {reply.get('x-request-id')}]"
    assert text.endswith(tail) is (kind.status >= 500)


def last_record(reply: Reply) -> Any:
    """What a stream ended with."""
    last = reply.body.strip().splitlines()[-1].removeprefix(b"data: ")
    assert b"[DONE]" not in reply.body
    assert b'"done":true' not in reply.body
    return json.loads(last)


def compare_retry(reply: Reply, kind: type[BalancerError]) -> None:
    """A 503 says when, what cannot help says so where SDKs would try again by themselves."""
    after = reply.get("retry-after")
    if kind.status in (429, 503):
        assert after is not None
        assert 1 <= int(after) <= 60
        assert 0 <= int(after) * 1000 - int(reply.get("retry-after-ms") or 0) < 1000
    else:
        assert after is None
    would_retry = kind.status >= 500 or kind.status in (404, 408, 409, 413, 429)
    hopeless = would_retry and not kind.retryable
    assert (reply.get("x-should-retry") == "false") is hopeless
    assert (reply.get("www-authenticate") == "Bearer") is (kind.status == 401)


def shaped(told: Any, kind: type[BalancerError], dialect: Dialect) -> str:
    """The text, from where the dialect has it."""
    if dialect is Dialect.OLLAMA:
        assert list(told) == ["error"]
        return str(told["error"])
    error = told["error"]
    if dialect is Dialect.ANTHROPIC:
        assert list(told) == ["type", "error", "request_id"]
        assert told["type"] == "error"
        assert told["request_id"].startswith("req_")
        return str(error["message"])
    assert list(error) == ["message", "type", "param", "code"]
    assert error["code"] in (kind.code, None)
    assert error["code"] or kind.code in ("invalid_request", "model_not_found")
    return str(error["message"])


@virtual
async def test_who_never_answered_is_no_reason_for_a_404() -> None:
    """A model that only such a backend could have: 503 that names it, on every route, at once."""
    async with running(1, dead=["gone"], models=models(0.0)) as rig:
        for path, body in (
            ("/api/chat", {"model": "mm", "messages": HELLO}),
            ("/api/show", {"model": "mm"}),
            ("/api/generate", {"model": "mm", "keep_alive": 0}),
            ("/v1/models/mm", None),
        ):
            reply = await rig.ask("GET" if body is None else "POST", path, body)
            assert reply.status == 503, path
            assert b"gone: " in reply.body
            assert b"not found" not in reply.body
            assert reply.get("retry-after")
        disable = "/_balancer/backends/gone/disable"
        told = await rig.ask("POST", disable, {}, Content_Type="application/json")
        assert told.status == 200
        assert (await rig.ask("POST", "/api/show", {"model": "mm"})).status == 404


@virtual
async def test_refused_clients_are_told_to_come_back_at_different_times() -> None:
    """Else all of them would be back at once."""
    async with running(1, models=models(0.0)) as rig:
        path = "/_balancer/backends/a/drain"
        await rig.ask("POST", path, {}, Content_Type="application/json")
        told = {(await call(rig, Dialect.OLLAMA)).get("retry-after-ms") for _ in range(8)}
        assert len(told) > 4
        assert all(10_000 <= int(each or 0) <= 12_500 for each in told)
