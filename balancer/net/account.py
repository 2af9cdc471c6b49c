"""
What concerns the account at ollama.com: who is signed in, signing out, web search.

Laws:
- One backend speaks for the account: the first that is marked for it and up, the same one each time
  while that lasts, for signing in concerns the key of one host.
- Answers are relayed as they are, refusals and their ``signin_url`` included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import quote

from aiohttp import web

from balancer.core import cloud
from balancer.core.dialect import compact
from balancer.core.domain import Kind
from balancer.core.errors import BadRequest, Forbidden, NoBackend, NotServed
from balancer.core.pool import Member, Pool
from balancer.core.verdicts import line
from balancer.net.bodies import read_body
from balancer.net.server import Exchange, Handler
from balancer.net.upstream import ClientUpstream, UpstreamError

NATIVE: Final = "application/json; charset=utf-8"
ASK_S: Final = 60.0  # a page of the web may be slow to come
MAX_BODY: Final = 1024 * 1024
PASSED: Final = frozenset({"user-agent", "accept", "via", "x-request-id"})
NOBODY: Final = {"cloud": {"disabled": True, "source": "config"}}
PROVIDER: Final = {"cloud": {"disabled": False, "source": "none"}}


class Account:
    """
    The handlers of the account's routes.

    Args:
        forwarded: The headers that may go up with a request, ours among them.
    """

    def __init__(
        self,
        pool: Pool,
        upstream: ClientUpstream,
        clock: Callable[[], float],
        forwarded: Callable[[Exchange], tuple[tuple[str, str], ...]],
    ) -> None:
        self._pool = pool
        self._upstream = upstream
        self._clock = clock
        self._forwarded = forwarded

    def handlers(self) -> Mapping[str | Kind, Handler]:
        """By operation; all others of the kind are relayed alike."""
        return {
            Kind.ACCOUNT: self.relay,
            "cloud_status": self.status,
            "recommendations": self.recommendations,
            "signout": self.sign_out,
        }

    async def relay(self, exchange: Exchange) -> web.StreamResponse:
        """Ask the one backend, and pass on what it says."""
        return await self._ask(exchange, self._speaker())

    async def status(self, exchange: Exchange) -> web.StreamResponse:
        """
        Whether cloud models can be used.

        With nobody to speak for an account they are as good as switched off: told so, Ollama's
        command line neither offers them nor asks to sign in.
        """
        member = self._pool.account()
        if member is None:
            return _answer(exchange, 200, NATIVE, compact(NOBODY))
        if member.backend.provider:
            return _answer(exchange, 200, NATIVE, compact(PROVIDER))
        return await self._ask(exchange, member)

    async def recommendations(self, exchange: Exchange) -> web.StreamResponse:
        """The same list for everybody, so that any backend will do."""
        up = (m for m in self._pool.members.values() if m.backend.enabled and m.health.up)
        member = self._pool.account() or next(up, None)
        return await self._ask(exchange, self._speaker() if member is None else member)

    async def sign_out(self, exchange: Exchange) -> web.StreamResponse:
        """Of a host; ollama.com itself is reached by a key that stands in the configuration."""
        member = self._speaker()
        if member.backend.provider:
            raise NotServed(
                f"{member.name} is ollama.com itself, reached with an API key. To sign out, take "
                "the key out of the balancer's configuration."
            )
        return await self._ask(exchange, member)

    def _speaker(self) -> Member:
        member = self._pool.account()
        if member is not None:
            return member
        if not self._pool.members:
            raise NoBackend("There is no backend yet.", retry_after_s=5.0)
        raise Forbidden(
            "ollama cloud is disabled: none of the balancer's backends is marked for it. Set "
            "cloud: true on the one whose Ollama is signed in to ollama.com, or is to be."
        )

    async def _ask(self, exchange: Exchange, member: Member) -> web.StreamResponse:
        route = exchange.route
        target = self._upstream.targets.get(member.name)
        if route is None:
            raise BadRequest("no route")
        if target is None or not member.health.up:
            told = member.health.last_error or "not checked yet"
            raise NoBackend(
                f"{member.name}, which speaks for the account, is down: {told}", retry_after_s=5.0
            )
        body = bytes(await read_body(exchange, MAX_BODY, self._clock))
        path = route.path.replace("{key}", quote(exchange.argument, safe=""))
        if member.backend.provider:
            path = cloud.PATHS.get(path, path)
        exchange.backend, exchange.attempts = member.name, 1
        headers = [pair for pair in self._forwarded(exchange) if pair[0].lower() in PASSED]
        try:
            status, kind, told_ = await self._upstream.ask(
                target, route.method, path, body or None, limit_s=ASK_S, headers=headers
            )
        except UpstreamError as error:
            raise NoBackend(
                f"{member.name}, which speaks for the account: {line(error.failure.text)}",
                retry_after_s=5.0,
            ) from error
        if status >= 400:
            exchange.outcome = "rejected" if status < 500 else "upstream_error"
        return _answer(exchange, status, kind, told_)


def _answer(exchange: Exchange, status: int, kind: str, body: bytes) -> web.Response:
    headers = exchange.headers() | ({"Content-Type": kind} if kind else {})
    if exchange.backend:
        headers["X-Balancer-Backend"] = exchange.backend
    return web.Response(status=status, body=body, headers=headers)
