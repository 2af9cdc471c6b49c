"""
Answers from our own catalogue: what every client asks first, in milliseconds, while a host hangs.

Only `show` may have to ask a backend, when its answer is not kept; it then asks one that lists
the model, up ones first, and the next if that fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final
from urllib.parse import quote

from aiohttp import web

from balancer.core import cloud, names, verdicts
from balancer.core.body import Body, read, renamed
from balancer.core.dialect import compact
from balancer.core.dispatch import Answer, refusal
from balancer.core.domain import ALL, Call, Kind
from balancer.core.errors import BadRequest, BalancerError, NoBackend, Unavailable, UnknownModel
from balancer.core.pool import Member, Pool
from balancer.core.scheduler import Unwanted
from balancer.net.bodies import read_body
from balancer.net.prober import Prober
from balancer.net.server import Exchange, Handler, Known
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
            **{operation: partial(_tell, known) for operation, known in self.known().items()},
            "model": self.model,
            "show": self.show,
        }

    def known(self) -> Mapping[str, Known]:
        """By operation: what is told without asking anybody."""
        return {
            "root": self.root,
            "version": self.version,
            "tags": self.tags,
            "ps": self.ps,
            "models": self.models,
        }

    def root(self, _: Exchange) -> tuple[bytes, str]:
        """What clients look for to see that Ollama is there."""
        return b"Ollama is running", "text/plain; charset=utf-8"

    def version(self, _: Exchange) -> tuple[bytes, str]:
        """The lowest version of the pool, unless configured otherwise."""
        version = self._catalog.version(self.version_policy)
        if version is None:
            raise Unavailable("No backend has told its version yet.", retry_after_s=2.0)
        return compact({"version": version}), NATIVE

    def tags(self, exchange: Exchange) -> tuple[bytes, str]:
        """The union of what the backends list."""
        body = _visible(exchange, self._catalog.tags, "models")
        return self._catalog.tags_json() if body is None else body, NATIVE

    def ps(self, exchange: Exchange) -> tuple[bytes, str]:
        """What is in memory, on all of them."""
        body = _visible(exchange, self._catalog.ps, "models")
        return self._catalog.ps_json() if body is None else body, NATIVE

    def models(self, exchange: Exchange) -> tuple[bytes, str]:
        """The union, as OpenAI lists it."""
        body = _visible(exchange, self._catalog.models, "data")
        return self._catalog.models_json() if body is None else body + b"\n", OPENAI

    async def model(self, exchange: Exchange) -> web.StreamResponse:
        """One of them."""
        found = self._catalog.model(exchange.argument)
        exchange.model = exchange.argument
        with suppress(names.InvalidName):
            exchange.use(exchange.argument, names.parse(exchange.argument).canonical)
        if found is not None:
            return _answer(exchange, compact(found) + b"\n", OPENAI)
        model = self._canonical(exchange.argument)
        if not verdicts.is_cloud(model) or not self._pool.holders(model):
            raise self._absent(exchange.argument, exchange.principal.models)

        def path(member: Member) -> str:
            here = cloud.there(model) if member.backend.provider else exchange.argument
            return f"/v1/models/{quote(here, safe=':/')}"

        return await self._ask(exchange, model, "GET", path, lambda _: None)

    @staticmethod
    def _canonical(text: str) -> str:
        try:
            return names.parse(text).canonical
        except names.InvalidName:
            return ""

    async def show(self, exchange: Exchange) -> web.StreamResponse:
        """A model's details, kept per digest."""
        if exchange.route is None:
            raise BadRequest("no route")
        text = bytes(await read_body(exchange, MAX_BODY, self._clock))
        body = read(exchange.route, text)
        model = body.name.canonical
        exchange.use(body.model, model)
        alias = self._catalog.aliases.find(model)
        if alias is not None:
            model = self._catalog.meant(model) or names.parse(alias.models[0]).canonical
            exchange.alias, exchange.model = body.model, self._catalog.shown(model)
            text = renamed(exchange.route, text, "", exchange.model)
        kept = None if self._is_special(exchange, body) else self._catalog.show(model)
        if kept is not None and self._is_twins(kept, model):
            kept = None
        if kept is not None:
            return _answer(exchange, kept, NATIVE)
        route = exchange.route

        def sent(member: Member) -> bytes:
            if not member.backend.provider:
                return text
            return renamed(route, text, "", cloud.there(model))

        return await self._ask(exchange, model, "POST", lambda _: "/api/show", sent)

    def _is_twins(self, kept: bytes, model: str) -> bool:
        """Whether the modelfile in it names another model, which has the same files."""
        own = f"# FROM {self._catalog.shown(model)}\\n"
        return b"# FROM " in kept and own.encode() not in kept

    @staticmethod
    def _is_special(exchange: Exchange, body: Body) -> bool:
        """Whether the answer would differ from the plain one that is kept."""
        agent = exchange.request.headers.get("User-Agent", "")
        return body.verbose or body.system or body.options_given or agent.startswith(COPILOT)

    async def _ask(
        self,
        exchange: Exchange,
        model: str,
        method: str,
        path: Callable[[Member], str],
        body: Callable[[Member], bytes | None],
    ) -> web.StreamResponse:
        """Ask one that has the model, the next if that fails; an account's refusal is final."""
        members = self._pool.holders(model)
        if not members:
            raise self._absent(exchange.model, exchange.principal.models)
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
                    method,
                    path(member),
                    body(member),
                    limit_s=SHOW_S,
                    headers=(("User-Agent", agent),),
                )
            except UpstreamError:
                continue
            if status == 200:
                return _answer(exchange, told, kind)
            answer = Answer(status, kind, told)
            if self._pool.is_remote(member.name, model):
                break
            if status == 404:
                self._prober.refresh(member.name)
        if answer is not None and verdicts.error_text(answer.body) is not None:
            return _answer(exchange, answer.body, answer.content_type, answer.status)
        away = ", ".join(member.name for member in members)
        raise NoBackend(
            f"The backends with {exchange.model!r} cannot be reached now ({away}).",
            retry_after_s=5.0,
        )

    def _absent(self, text: str, globs: Sequence[str]) -> BalancerError:
        """For a model nobody has, under the name that Ollama would print."""
        try:
            name = names.parse(text)
        except names.InvalidName:
            return UnknownModel(f"model '{text}' not found")
        prospect = self._pool.absent(name.display, name.canonical, globs=globs)
        return refusal(name.display, prospect)

    async def unload(self, exchange: Exchange, call: Call) -> web.StreamResponse:
        """
        An empty call with ``keep_alive: 0``: to every backend that has the model in memory.

        It stays away until somebody asks for it again, unless it is pinned.
        The others are asked whether somebody else has loaded it there a moment ago. Where none has
        it, Ollama answers 200 all the same, if the model exists.
        """
        model = call.key.model
        if not self._pool.holders(model):
            absent = self._pool.absent(call.model, model, globs=call.principal.models)
            raise refusal(call.model, absent)
        self._pool.note(Unwanted(model))
        members = self._pool.members
        up = [m.name for m in members.values() if m.health.up and not m.backend.provider]
        loaded = [name for name in up if self._catalog.resident(name, model) is not None]
        others = [name for name in up if name not in loaded]
        failed, _ = await asyncio.gather(
            self._prober.unload_all(loaded, model),
            asyncio.gather(*map(self._prober.reload_ps, others)),
        )
        found = [name for name in others if self._catalog.resident(name, model) is not None]
        failed += await self._prober.unload_all(found, model)
        exchange.backend = ",".join([*loaded, *found])
        if failed:
            raise NoBackend(
                f"{call.model!r} could not be unloaded from {', '.join(failed)}.",
                retry_after_s=5.0,
            )
        return _answer(exchange, _unloaded(call, self._prober.stamp()), NATIVE)


async def _tell(known: Known, exchange: Exchange) -> web.StreamResponse:
    body, content_type = known(exchange)
    return _answer(exchange, body, content_type)


def _visible(exchange: Exchange, tell: Callable[[], dict[str, Any]], of: str) -> bytes | None:
    """The rows that the caller's key is for; None: all of them."""
    principal = exchange.principal
    if principal.models == ALL:
        return None
    called = ("id",) if of == "data" else ("name", "model")
    told, kept = tell(), []
    for row in told[of]:
        name = next(text for key in called if isinstance(text := row.get(key), str) and text)
        if names.covered(principal.models, names.parse(name).canonical):
            kept.append(row)
    return compact({**told, of: kept})


def _unloaded(call: Call, stamp: str) -> bytes:
    """What Ollama answers to an unload, which only these two routes know."""
    empty: dict[str, object] = {"response": ""}
    if call.route.operation == "chat":
        empty = {"message": {"role": "assistant", "content": ""}}
    told = {"model": call.model, "created_at": stamp, **empty}
    return compact(told | {"done": True, "done_reason": "unload"})


def _answer(
    exchange: Exchange, body: bytes, content_type: str, status: int = 200
) -> web.StreamResponse:
    headers = exchange.headers() | {"Content-Type": content_type}
    if exchange.backend:
        headers["X-Balancer-Backend"] = exchange.backend
    return web.Response(status=status, body=body, headers=headers)
