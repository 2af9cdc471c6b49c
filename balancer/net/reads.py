"""
Answers from our own catalogue: what every client asks first, in milliseconds, while a host hangs.

Only `show` may have to ask a backend, when its answer is not kept; it then asks one that lists
the model, up ones first, and the next if that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from aiohttp import web

from balancer.core import names, verdicts
from balancer.core.body import Body, read
from balancer.core.dialect import compact
from balancer.core.dispatch import Answer
from balancer.core.domain import Call, Kind
from balancer.core.errors import BadRequest, NoBackend, Unavailable, UnknownModel
from balancer.core.pool import Pool
from balancer.net.prober import Prober
from balancer.net.server import Exchange, Handler, read_body
from balancer.net.upstream import ClientUpstream, UpstreamError

NATIVE: Final = "application/json; charset=utf-8"
OPENAI: Final = "application/json"
SHOW_S: Final = 30.0
MAX_BODY: Final = 1024 * 1024
COPILOT: Final = "GitHubCopilotChat/"


class Reads:
    """
    The handlers of every route that the catalogue answers, and of calls that unload.

    Args:
        version: What ``/api/version`` says: min, max, or a version.
    """

    def __init__(
        self,
        pool: Pool,
        upstream: ClientUpstream,
        prober: Prober,
        clock: Callable[[], float],
        version: str,
    ) -> None:
        self.version_policy = version
        self._pool = pool
        self._catalog = pool.catalog
        self._upstream = upstream
        self._prober = prober
        self._clock = clock

    def handlers(self) -> Mapping[str | Kind, Handler]:
        """By operation."""
        return {
            "root": self.root,
            "version": self.version,
            "tags": self.tags,
            "ps": self.ps,
            "models": self.models,
            "model": self.model,
            "show": self.show,
        }

    async def root(self, exchange: Exchange) -> web.StreamResponse:
        """What clients look for to see that Ollama is there."""
        return _answer(exchange, b"Ollama is running", "text/plain; charset=utf-8")

    async def version(self, exchange: Exchange) -> web.StreamResponse:
        """The lowest version of the pool, unless configured otherwise."""
        version = self._catalog.version(self.version_policy)
        if version is None:
            raise Unavailable("No backend has told its version yet.", retry_after_s=2.0)
        return _answer(exchange, compact({"version": version}), NATIVE)

    async def tags(self, exchange: Exchange) -> web.StreamResponse:
        """The union of what the backends list."""
        return _answer(exchange, self._catalog.tags_json(), NATIVE)

    async def ps(self, exchange: Exchange) -> web.StreamResponse:
        """What is in memory, on all of them."""
        return _answer(exchange, self._catalog.ps_json(), NATIVE)

    async def models(self, exchange: Exchange) -> web.StreamResponse:
        """The union, as OpenAI lists it."""
        return _answer(exchange, self._catalog.models_json(), OPENAI)

    async def model(self, exchange: Exchange) -> web.StreamResponse:
        """One of them."""
        found = self._catalog.model(exchange.argument)
        exchange.model = exchange.argument
        if found is None:
            raise UnknownModel(f"model '{_normal(exchange.argument)}' not found")
        return _answer(exchange, compact(found) + b"\n", OPENAI)

    async def show(self, exchange: Exchange) -> web.StreamResponse:
        """A model's details, kept per digest."""
        if exchange.route is None:
            raise BadRequest("no route")
        text = await read_body(exchange, MAX_BODY, self._clock)
        body = read(exchange.route, text)
        exchange.model = body.model
        model = body.name.canonical
        kept = None if self._is_special(exchange, body) else self._catalog.show(model)
        if kept is not None:
            return _answer(exchange, kept, NATIVE)
        return await self._ask_show(exchange, model, text)

    @staticmethod
    def _is_special(exchange: Exchange, body: Body) -> bool:
        """Whether the answer would differ from the plain one that is kept."""
        agent = exchange.request.headers.get("User-Agent", "")
        return body.verbose or body.system or body.options_given or agent.startswith(COPILOT)

    async def _ask_show(self, exchange: Exchange, model: str, text: bytes) -> web.StreamResponse:
        holders = self._catalog.holders(model)
        if not holders:
            if not self._catalog.settled():
                raise Unavailable("The backends have not been asked yet.", retry_after_s=1.0)
            raise UnknownModel(f"model '{_normal(exchange.model)}' not found")
        members = [self._pool.members[name] for name in holders if name in self._pool.members]
        answer: Answer | None = None
        agent = exchange.request.headers.get("User-Agent", "")
        for member in sorted(members, key=lambda member: not member.health.up):
            target = self._upstream.targets.get(member.name)
            if target is None or not member.health.up:
                continue
            exchange.backend, exchange.attempts = member.name, exchange.attempts + 1
            try:
                status, kind, told = await self._upstream.ask(
                    target,
                    "POST",
                    "/api/show",
                    text,
                    limit_s=SHOW_S,
                    headers=(("User-Agent", agent),),
                )
            except UpstreamError:
                continue
            if status == 200:
                return _answer(exchange, told, kind)
            answer = Answer(status, kind, told)
            if status == 404:
                self._prober.refresh(member.name)
        if answer is not None and verdicts.error_text(answer.body) is not None:
            return _answer(exchange, answer.body, answer.content_type, answer.status)
        away = ", ".join(holders)
        raise NoBackend(
            f"The backends with {exchange.model!r} cannot be reached now ({away}).",
            retry_after_s=5.0,
        )

    async def unload(self, exchange: Exchange, call: Call) -> web.StreamResponse:
        """
        An empty call with ``keep_alive: 0``: to every backend that has the model in memory.

        Where none has, Ollama answers 200 all the same, if the model exists.
        """
        model = call.key.model
        holders = self._catalog.holders(model)
        if not holders:
            raise UnknownModel(f"model '{call.model}' not found")
        loaded = [
            member.name
            for member in self._pool.members.values()
            if member.health.up and self._catalog.resident(member.name, model) is not None
        ]
        exchange.backend = ",".join(loaded)
        failed = await self._prober.unload_all(loaded, model)
        if failed:
            raise NoBackend(
                f"{call.model!r} could not be unloaded from {', '.join(failed)}.",
                retry_after_s=5.0,
            )
        return _answer(exchange, _unloaded(call, self._prober.stamp()), NATIVE)


def _unloaded(call: Call, stamp: str) -> bytes:
    """What Ollama answers to an unload, which only these two routes know."""
    empty: dict[str, object] = {"response": ""}
    if call.route.operation == "chat":
        empty = {"message": {"role": "assistant", "content": ""}}
    told = {"model": call.model, "created_at": stamp, **empty}
    return compact(told | {"done": True, "done_reason": "unload"})


def _normal(text: str) -> str:
    """The name as Ollama prints it; as it is where it is none."""
    try:
        return names.parse(text).display
    except names.InvalidName:
        return text


def _answer(
    exchange: Exchange, body: bytes, content_type: str, status: int = 200
) -> web.StreamResponse:
    headers = exchange.headers() | {"Content-Type": content_type}
    if exchange.backend:
        headers["X-Balancer-Backend"] = exchange.backend
    return web.Response(status=status, body=body, headers=headers)
