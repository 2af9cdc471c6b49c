"""
What tests of the whole share: virtual time, models that take their time, and a caller who watches.

    @virtual
    async def test_something() -> None:
        async with running(2, models=models()) as rig:
            asking = await Asking.of(rig, "/api/chat", CHAT)
            await asking.head()
            await asking.record()
            asking.hang_up()
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar, cast

import pytest

from balancer.core.events import AttemptEnded, BreakerMoved, CallEnded
from balancer.sim.host import SimModel
from balancer.sim.loop import run
from tests.rig import Rig, running
from tests.sim.wire import Reply, Wire

P = ParamSpec("P")
R = TypeVar("R")
HELLO = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": "m", "messages": HELLO}
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/api/chat", CHAT | {"stream": False}),
    "chat, streamed": ("/api/chat", CHAT),
    "generate": ("/api/generate", {"model": "m", "prompt": "hi", "stream": False}),
    "generate, streamed": ("/api/generate", {"model": "m", "prompt": "hi"}),
    "v1 chat": ("/v1/chat/completions", CHAT),
    "v1 chat, streamed": ("/v1/chat/completions", CHAT | {"stream": True}),
    "v1 completions": ("/v1/completions", {"model": "m", "prompt": "hi"}),
    "v1 completions, streamed": ("/v1/completions", {"model": "m", "prompt": "hi", "stream": True}),
    "v1 responses": ("/v1/responses", {"model": "m", "input": "hi"}),
    "v1 responses, streamed": ("/v1/responses", {"model": "m", "input": "hi", "stream": True}),
    "v1 messages": ("/v1/messages", CHAT | {"max_tokens": 100}),
    "v1 messages, streamed": ("/v1/messages", CHAT | {"max_tokens": 100, "stream": True}),
    "embed": ("/api/embed", {"model": "e", "input": "hi"}),
    "v1 embeddings": ("/v1/embeddings", {"model": "e", "input": "hi"}),
}
LATE_HEAD: dict[str, Any] = {"streaming.heartbeat_after": -1}  # it waits for the answer
STREAMS = tuple(name for name in ROUTES if "streamed" in name)
LAST_EVENTS = ("response.completed", "message_stop")
SLOW = {"X_Request_Timeout": "600"}  # a call with a limit needs a task to keep it
LANES: dict[str, dict[str, str]] = {"direct": {}, "a task": SLOW}
WORDS = tuple(f" w{n}" for n in range(20))


def virtual(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Make an async test run in a loop whose time jumps: minutes cost nothing, order is exact."""

    @wraps(test)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        run(test(*args, **kwargs))

    return wrapped


def in_each_lane(test: Callable[P, R]) -> Callable[P, R]:
    """Run a test with calls that are answered without a task, if they may, and with others."""
    each = pytest.mark.parametrize("headers", LANES.values(), ids=LANES.keys())
    marked: Callable[P, R] = each(test)
    return marked


def models(load_s: float = 2.0, *, speed: float = 1.0) -> tuple[SimModel, ...]:
    """`m` and `other` say twenty words, ten a second; `e` embeds. Each takes *load_s* to load."""
    model = partial(SimModel, load_s=load_s, decode_tps=10.0 * speed)
    return (
        model("m", words=WORDS),
        model("other", words=WORDS),
        model("e", capabilities=("embedding",)),
    )


def now() -> float:
    """The loop's time."""
    return asyncio.get_running_loop().time()


@dataclass(slots=True)
class Asking:
    """One call on a connection of its own, whose answer is read as it comes."""

    wire: Wire
    reply: Reply = field(default_factory=Reply)

    @classmethod
    async def of(cls, rig: Rig, path: str, body: object, **headers: str) -> Asking:
        """Send a call; nothing is read yet."""
        asking = cls(await rig.connect())
        asking.send(rig, path, body, **headers)
        return asking

    def send(self, rig: Rig, path: str, body: object, **headers: str) -> None:
        """Send another call on the same connection."""
        payload = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{rig.port}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        lines += [f"Content-Length: {len(payload)}", "", ""]
        self.wire.writer.write("\r\n".join(lines).encode() + payload)

    async def head(self) -> Reply:
        """Status and headers."""
        self.reply = Reply()
        await self.wire._head(self.reply)
        return self.reply

    async def record(self) -> bytes:
        """The next chunk of a stream; empty: it has ended."""
        size = int(await self.wire.reader.readuntil(b"\r\n"), 16)
        data = await self.wire.reader.readexactly(size + 2)
        self.reply.segments.append(data[:-2])
        return data[:-2]

    async def rest(self) -> Reply:
        """All that is left of the answer whose head was read; the whole reply."""
        try:
            await self.wire._body(self.reply, "POST")
        except asyncio.IncompleteReadError:
            self.reply.ended = "cut"
        except ConnectionResetError:
            self.reply.ended = "reset"
        return self.reply

    def hang_up(self) -> None:
        """Leave, as a killed client does."""
        self.wire.writer.transport.abort()

    def close(self) -> None:
        """Leave in peace."""
        self.wire.close()


def records(reply: Reply) -> list[Any]:
    """The records of a streamed answer, as JSON; ``[DONE]`` as text."""
    silent = (b"event: ", b":")
    lines = [line for line in reply.body.splitlines() if line and not line.startswith(silent)]
    told = [line.removeprefix(b"data: ") for line in lines]
    return [line.decode() if line == b"[DONE]" else json.loads(line) for line in told]


def said(reply: Reply) -> str:
    """The text of a whole answer or of all records of a stream, whatever the dialect."""
    told = records(reply) if reply.framing == "chunked" else [json.loads(reply.body)]
    return "".join(_text(each) for each in told if isinstance(each, dict))


def _text(told: dict[str, Any]) -> str:
    for choice in told.get("choices", ()):
        message = choice.get("delta") or choice.get("message") or {}
        return str(choice.get("text") or message.get("content") or "")
    if told.get("type") in ("response.output_text.delta", "content_block_delta"):
        delta = told["delta"]
        return str(delta["text"] if isinstance(delta, dict) else delta)
    for block in told.get("content") or told.get("output") or ():
        return str(block["text"] if "text" in block else block["content"][0]["text"])
    return str(told.get("response") or (told.get("message") or {}).get("content") or "")


def is_whole(reply: Reply, path: str) -> bool:
    """Whether a good answer came to its end."""
    if reply.status != 200 or reply.ended != "clean":
        return False
    if "embed" in path:
        return b'"embedding' in reply.body
    if reply.framing == "chunked":
        last = records(reply)[-1]
        return last == "[DONE]" or last.get("done") is True or last.get("type") in LAST_EVENTS
    return said(reply) == "".join(WORDS)


def error_of(reply: Reply) -> str:
    """The text of a refusal in either dialect."""
    told = json.loads(reply.body)["error"]
    return str(told["message"] if isinstance(told, dict) else told)


def verdicts(rig: Rig) -> list[tuple[str, str]]:
    """Backend and verdict of each attempt so far, in the order they ended."""
    return [(each.backend, each.outcome.verdict.value) for each in rig.events.of(AttemptEnded)]


def moves(rig: Rig) -> list[tuple[str, str | None, str]]:
    """Every move of a breaker so far: backend, model or None, the new state."""
    return [(each.backend, each.model, each.new.value) for each in rig.events.of(BreakerMoved)]


@asynccontextmanager
async def warm(
    hosts: int = 1, speed: float = 1.0, **more: Any
) -> AsyncIterator[tuple[Rig, list[str]]]:
    """A fleet whose first host has the models, and who went through a task."""
    async with running(hosts, models=models(0.0, speed=speed), **more) as rig:
        for model in ("m", "e"):
            await rig.warm("a", model)
        tasks, proxy = list[str](), cast("Any", rig.balancer.proxy)
        go_on = proxy.go_on

        def noting(exchange: Any, course: Any) -> Any:
            tasks.append(exchange.id)
            return go_on(exchange, course)

        proxy.go_on = noting
        yield rig, tasks


def settled(rig: Rig, outcome: str, verdict: str | None, *, phase: str = "") -> CallEnded:
    """Told once, with its outcome; the lease is back, and nothing runs any more."""
    (told,) = rig.calls()
    assert (told.outcome, told.phase) == (outcome, phase)
    assert [v for _, v in verdicts(rig)] == ([] if verdict is None else [verdict])
    assert rig.balancer.pool.running == 0
    assert not rig.balancer.dispatcher.waiting()
    assert not rig.balancer.front.running
    return told
