"""
Hosts whose physics is that of the virtual world, behind Ollama's HTTP on a loopback socket.

They know from a prompt which job it is, and take as long for it as `machine` says. Tokens are a
record each, and some of them are written at once. Images, tools and all that is not inference or a
list are left out: `ollama` has these.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import math
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, Final, Self

from balancer.sim import dialects, gojson
from balancer.sim.bodies import TOKEN_BYTES, Bodies
from balancer.sim.dialects import Echo, Outcome
from balancer.sim.http import Exchange, Server
from balancer.sim.machine import Host, Loss, Told, Work
from balancer.sim.text import Piece
from balancer.sim.timeline import Entry, Timeline

VERSION: Final = "0.30.1"
WRITE_S: Final = 0.05  # between writes of a stream; of longer ones a host looks slow for a while
EPOCH_NS: Final = 1_767_225_600_000_000_000  # where virtual time begins
STRANGE_TOKENS: Final = 128  # of an answer to nobody's job, unless it says how long
_ROUTES: Final = {"/api/chat": "messages", "/api/generate": "prompt", "/api/embed": "input"}
_TOKEN: Final = Piece(" so")
_FAILURES: Final[Mapping[Loss, tuple[int, str]]] = {
    Loss.BUSY: (503, "server busy, please try again.  maximum pending requests exceeded"),
    Loss.MISSING: (404, "model not found"),
}

Over = Callable[[int, Told], None]


class LoopTimeline(Timeline):
    """
    A timeline that a loop drives: what is to happen does when the loop's time has come.

    Whoever asks a host from without says `catch_up` before.

    Attributes:
        origin: From where on instants at which hosts write are counted.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.now = self.origin = loop.time()
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf
        self._is_running = False

    def at(self, when: float, what: Callable[..., None], *args: Any) -> Entry:
        """Let *what* happen then, not before now; what comes back is for `cancel`."""
        entry = super().at(when, what, *args)
        if not self._is_running:
            self._arm()
        return entry

    def catch_up(self) -> None:
        """Let everything happen that is due."""
        self._run_to(self._loop.time())

    def close(self) -> None:
        """Nothing happens any more."""
        self._heap.clear()
        self._arm()

    def _fire(self) -> None:
        # A loop may be early by less than it can tell.
        self._run_to(max(self._loop.time(), self._due))

    def _run_to(self, now: float) -> None:
        self._is_running = True
        try:
            self.run(now)
        finally:
            self._is_running = False
            self._arm()

    def _arm(self) -> None:
        """Keep the one timer of the loop's at what comes next."""
        heap = self._heap
        while heap and heap[0][2] is None:  # cancelled
            heapq.heappop(heap)
        due = heap[0][0] if heap else math.inf
        if due == self._due and self._timer is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due, self._timer = due, None
        if due < math.inf:
            self._timer = self._loop.call_at(due, self._fire)


class RiggedOllama:
    """
    One such host. Start it with `async with`.

    Args:
        timeline: The host's own.
        over: Told of each job that was answered, by its place in the list.
    """

    def __init__(self, host: Host, timeline: LoopTimeline, bodies: Bodies, over: Over) -> None:
        self.host = host
        self.timeline = timeline
        self.bodies = bodies
        self.over = over
        self.streams: dict[Answer, None] = {}
        self.loop = asyncio.get_running_loop()
        self.port = 0
        self._names = {name: m.name for m in host.models.values() for name in (m.name, m.shown)}
        self._server = Server(
            self._serve,
            date=lambda: gojson.http_date(self.now_ns()),
            loop=self.loop,
            streams=lambda _: False,
        )
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        self.port = self._server.listen("127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        if self._timer is not None:
            self._timer.cancel()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def now_ns(self) -> int:
        """The time of day there."""
        return EPOCH_NS + round(self.loop.time() * 1e9)

    # -- requests ------------------------------------------------------------------------------

    def _serve(self, exchange: Exchange) -> None:
        self.timeline.catch_up()
        method, path = exchange.request.method, exchange.request.path
        lists: Mapping[str, Callable[[], object]] = {
            "/api/version": lambda: {"version": VERSION},
            "/api/tags": lambda: {"models": self.host.tags()},
            "/api/ps": lambda: {"models": self.host.ps()},
        }
        if method == "GET" and path in lists:
            self._later(exchange, lists[path]())
        elif path not in _ROUTES and path != "/api/show":
            exchange.reply(404, [("Content-Type", "text/plain")], b"404 page not found")
        elif method != "POST":
            exchange.reply(405, [("Content-Type", "text/plain")], b"405 method not allowed")
        else:
            self._take(exchange, path, json.loads(exchange.request.body))

    def _later(self, exchange: Exchange, value: object) -> None:
        """An answer that needs no model."""
        self.loop.call_later(self.host.answer_s, _reply, exchange, 200, value)

    def _take(self, exchange: Exchange, path: str, body: Mapping[str, Any]) -> None:
        name = self._names.get(body["model"])
        if name is None:
            _reply(exchange, *_failure(Loss.MISSING))
        elif path == "/api/show":
            self._later(exchange, self._shown(name))
        elif body.get(_ROUTES[path]):
            self._infer(exchange, path, body, name)
        elif body.get("keep_alive") == 0:
            self.host.unload(name)
            self._later(exchange, {"model": body["model"], "done": True, "done_reason": "unload"})
        else:
            Answer(self, exchange, path, body, _asked(body, name, is_load=True), None).send()

    def _shown(self, name: str) -> dict[str, Any]:
        shown = self.host.models[name].shown
        row = next(row for row in self.host.tags() if row["name"] == shown)
        length = row["details"]["context_length"]
        return {
            "template": "{{ .Prompt }}",
            "model_info": {"general.architecture": "llama", "llama.context_length": length},
            **{key: row[key] for key in ("details", "capabilities", "modified_at")},
        }

    def _infer(self, exchange: Exchange, path: str, body: Mapping[str, Any], name: str) -> None:
        place = self.bodies.place(body)
        work = _asked(body, name)
        if place is not None:
            job = self.bodies.jobs[place]
            work.prompt_tokens, work.output_tokens = job.prompt_tokens, job.output_tokens
            work.chain, work.conversation = job.chain, job.conversation
        else:
            work.prompt_tokens = max(1, len(exchange.request.body) // TOKEN_BYTES)
            if path != "/api/embed":
                told = body.get("options", {}).get("num_predict", STRANGE_TOKENS)
                work.output_tokens = max(1, told)
        Answer(self, exchange, path, body, work, place).send()

    # -- streams -------------------------------------------------------------------------------

    def streaming(self, answer: Answer) -> None:
        """A stream has begun: from now on its tokens are written in time."""
        self.streams[answer] = None
        if self._timer is None:
            # All hosts write at the same instants, which spares a jumping loop jumps.
            since, origin = self.loop.time() - self.timeline.origin, self.timeline.origin
            at = origin + (math.floor(since / WRITE_S) + 1) * WRITE_S
            self._timer = self.loop.call_at(at, self._write)

    def _write(self) -> None:
        self._timer = None
        self.timeline.catch_up()
        for answer in list(self.streams):
            answer.look()
        if self.streams:
            self._timer = self.loop.call_later(WRITE_S, self._write)


class Answer:
    """The sink of a request: writes what comes of it."""

    def __init__(
        self,
        at: RiggedOllama,
        exchange: Exchange,
        path: str,
        body: Mapping[str, Any],
        work: Work,
        place: int | None,
    ) -> None:
        self._at = at
        self._exchange = exchange
        self._embeds = path == "/api/embed"
        self._is_whole = self._embeds or body.get("stream") is False
        kind = dialects.Chat if path == "/api/chat" else dialects.Generate
        self._dialect = kind(Echo(body["model"], at.now_ns, Random(0), body))
        self._work = work
        self._place = place
        self._written = 0
        work.sink = self

    def send(self) -> None:
        """Have the host begin."""
        self._exchange.on_gone = self._gone
        self._at.host.submit(self._work)

    def _gone(self) -> None:
        self._at.streams.pop(self, None)
        self._at.timeline.catch_up()
        self._at.host.cancel(self._work)

    def first(self, work: Work) -> None:  # noqa: ARG002 - a sink
        """Its first token came."""
        if self._is_whole:
            return
        self._exchange.start(200, dialects.NDJSON, "chunked")
        self._write_to(1)
        self._at.streaming(self)

    def look(self) -> None:
        """Write what has come since the last time."""
        self._write_to(self._at.host.tokens(self._work))

    def _write_to(self, tokens: int) -> None:
        if tokens > self._written:
            (line,) = self._dialect.piece(_TOKEN)
            self._exchange.write(line * (tokens - self._written))
            self._written = tokens

    def ended(self, work: Work, told: Told) -> None:
        """It was answered in full."""
        self._at.streams.pop(self, None)
        if self._place is not None:
            self._at.over(self._place, told)
        if self._embeds:
            _reply(self._exchange, 200, self._vectors(work, told))
            return
        reason = "load" if work.is_load else "stop"
        outcome = Outcome((), reason, told.prompt_tokens, _metrics(told))
        if self._is_whole or not self._exchange.started:
            self._exchange.reply(200, dialects.JSON, self._dialect.whole(outcome))
            return
        self._write_to(told.output_tokens)
        self._exchange.write(b"".join(self._dialect.closing(outcome)))
        self._exchange.finish()

    def _vectors(self, work: Work, told: Told) -> dict[str, Any]:
        vectors: list[list[float]] = [] if work.is_load else [[0.6, 0.8]]
        return {"model": self._dialect.echo.model, "embeddings": vectors, **_metrics(told)}

    def failed(self, work: Work, loss: Loss) -> None:  # noqa: ARG002 - a sink
        """It came to nothing."""
        self._at.streams.pop(self, None)
        if loss in _FAILURES and not self._exchange.started:
            _reply(self._exchange, *_failure(loss))
        else:
            self._exchange.cut()


class _Nobody:
    """The sink of a request that has none yet."""

    def first(self, work: Work) -> None:
        """Nothing."""

    def ended(self, work: Work, told: Told) -> None:
        """Nothing."""

    def failed(self, work: Work, loss: Loss) -> None:
        """Nothing."""


_NOBODY: Final = _Nobody()


def _asked(body: Mapping[str, Any], name: str, *, is_load: bool = False) -> Work:
    told = body.get("keep_alive")
    seconds = gojson.duration_s(told) if isinstance(told, str) else told
    if seconds is not None and seconds < 0:
        seconds = math.inf
    return Work(name, _NOBODY, keep_alive_s=seconds, is_load=is_load)


def _metrics(told: Told) -> dict[str, int]:
    return {
        "total_duration": round(told.total_s * 1e9),
        "load_duration": round(told.load_s * 1e9),
        "prompt_eval_count": told.prompt_tokens,
        "prompt_eval_duration": round(told.prompt_s * 1e9),
        "eval_count": told.output_tokens,
        "eval_duration": round(told.decode_s * 1e9),
    }


def _failure(loss: Loss) -> tuple[int, dict[str, str]]:
    status, text = _FAILURES[loss]
    return status, {"error": text}


def _reply(exchange: Exchange, status: int, value: object) -> None:
    if not exchange.ended:
        exchange.reply(status, dialects.JSON, gojson.encode(value).encode())
