"""
The admin API under ``/_balancer/``: what is going on, why, and what an operator can do about it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

from aiohttp import web

from balancer.core.dialect import compact
from balancer.core.domain import Principal
from balancer.ops.explain import Explain
from balancer.ops.metrics import Metrics
from balancer.ops.reload import Reload
from balancer.ops.status import Status
from balancer.ops.steering import Steering

JSON: Final = "application/json; charset=utf-8"
OPEN_PAGES: Final = frozenset({"/_balancer/live", "/_balancer/ready"})


class Asked(Protocol):
    """What these handlers need of a request on its way through."""

    @property
    def request(self) -> web.BaseRequest:
        """The request."""

    @property
    def principal(self) -> Principal:
        """Who asks."""

    @property
    def argument(self) -> str:
        """What stood in the page's ``{rest}``."""

    @property
    def started_at(self) -> float:
        """When it began; seconds of the loop's clock."""

    def headers(self) -> dict[str, str]:
        """The headers that every answer carries."""


Page = Callable[[Any], Awaitable[web.StreamResponse]]


class Admin:
    """
    The handlers.

    Args:
        is_draining: Whether the balancer is stopping.

    Attributes:
        asked_at: When somebody last asked whether we are ready.
    """

    def __init__(
        self,
        status: Status,
        steering: Steering,
        explain: Explain,
        reload: Reload,
        metrics: Metrics | None,
        is_draining: Callable[[], bool],
    ) -> None:
        self._status = status
        self._steering = steering
        self._explain = explain
        self._reload = reload
        self._metrics = metrics
        self._is_draining = is_draining
        self.asked_at = -math.inf

    def pages(self) -> Mapping[tuple[str, str], Page]:
        """By method and path."""
        pages: dict[tuple[str, str], Page] = {
            ("GET", "/_balancer/live"): self.live,
            ("GET", "/_balancer/ready"): self.ready,
            ("GET", "/_balancer/status"): self.status,
            ("GET", "/_balancer/explain"): self.explain,
            ("POST", "/_balancer/reload"): self.reload,
            ("POST", "/_balancer/backends/{rest}"): self.steer,
        }
        if self._metrics is not None:
            pages["GET", "/metrics"] = self.metrics
        return pages

    async def live(self, asked: Asked) -> web.StreamResponse:
        """The process is there."""
        return _json(asked, {"live": True})

    async def ready(self, asked: Asked) -> web.StreamResponse:
        """Whether a call could be served now; not while draining."""
        self.asked_at = asked.started_at
        ready = self.is_ready()
        why = "draining" if self._is_draining() else "no backend can serve a call"
        told = {"ready": True} if ready else {"ready": False, "reason": why}
        return _json(asked, told, 200 if ready else 503)

    def is_ready(self) -> bool:
        """At least one backend can serve, and we are not stopping."""
        return self._status.is_ready()

    async def status(self, asked: Asked) -> web.StreamResponse:
        """Everything an operator wants to know."""
        body = compact(self.state())
        tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        if asked.request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers=asked.headers() | {"ETag": tag})
        headers = asked.headers() | {"ETag": tag, "Content-Type": JSON}
        return web.Response(body=body, headers=headers)

    async def reload(self, asked: Asked) -> web.StreamResponse:
        """Read the configuration again."""
        done = self._reload()
        if done.problems:
            age_s, problems = self._reload.age_s(), list(done.problems)
            refused = {"reloaded": False, "problems": problems, "loaded_s_ago": age_s}
            return _json(asked, refused, 422)
        told = {
            "reloaded": True,
            "changed": list(done.changed),
            "needs_restart": list(done.needs_restart),
        }
        return _json(asked, told)

    async def steer(self, asked: Asked) -> web.StreamResponse:
        """Do something to a backend: ``NAME/drain`` and its like."""
        name, _, action = asked.argument.rpartition("/")
        model = asked.request.rel_url.query.get("model", "")
        status, told = await self._steering(name, action, asked.principal.name, model)
        return _json(asked, told, status)

    async def explain(self, asked: Asked) -> web.StreamResponse:
        """What would become of a call for ``?model=``, and why."""
        return _json(asked, self._explain(asked.request.rel_url.query))

    async def metrics(self, asked: Asked) -> web.StreamResponse:
        """Prometheus text."""
        if self._metrics is None:
            raise web.HTTPNotFound
        body, kind = self._metrics.render(asked.request.headers.get("Accept", ""))
        return web.Response(body=body, headers=asked.headers() | {"Content-Type": kind})

    def state(self) -> dict[str, Any]:
        """The status document."""
        return self._status.document()


def _json(asked: Asked, value: Mapping[str, Any], status: int = 200) -> web.StreamResponse:
    headers = asked.headers() | {"Content-Type": JSON, "Cache-Control": "no-store"}
    return web.Response(status=status, body=compact(value), headers=headers)
