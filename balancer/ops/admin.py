"""
The admin API under ``/_balancer/``: what is going on, and reloading.

`status` is a documented shape of version 1: fields may be added, none changes its meaning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from aiohttp import web

from balancer.core.dialect import compact
from balancer.core.dispatch import Dispatcher
from balancer.core.domain import Switch
from balancer.core.pool import BackendView, BreakerView, Pool
from balancer.ops.metrics import Metrics
from balancer.ops.reload import Reload

JSON: Final = "application/json; charset=utf-8"
OPEN_PAGES: Final = frozenset({"/_balancer/live", "/_balancer/ready"})


class Asked(Protocol):
    """What these handlers need of a request on its way through."""

    @property
    def request(self) -> web.BaseRequest:
        """The request."""

    def headers(self) -> dict[str, str]:
        """The headers that every answer carries."""


Page = Callable[[Any], Awaitable[web.StreamResponse]]


class Admin:
    """
    The handlers.

    Args:
        is_draining: Whether the balancer is stopping.
        started_at: Unix seconds, for people.
    """

    def __init__(
        self,
        pool: Pool,
        dispatcher: Dispatcher,
        reload: Reload,
        metrics: Metrics | None,
        clock: Callable[[], float],
        is_draining: Callable[[], bool],
        version: str,
        started_at: float,
        config_file: str | None,
    ) -> None:
        self._pool = pool
        self._dispatcher = dispatcher
        self._reload = reload
        self._metrics = metrics
        self._clock = clock
        self._is_draining = is_draining
        self._version = version
        self._started_at = started_at
        self._config_file = config_file

    def pages(self) -> Mapping[tuple[str, str], Page]:
        """By method and path."""
        pages: dict[tuple[str, str], Page] = {
            ("GET", "/_balancer/live"): self.live,
            ("GET", "/_balancer/ready"): self.ready,
            ("GET", "/_balancer/status"): self.status,
            ("POST", "/_balancer/reload"): self.reload,
        }
        if self._metrics is not None:
            pages["GET", "/metrics"] = self.metrics
        return pages

    async def live(self, asked: Asked) -> web.StreamResponse:
        """The process is there."""
        return _json(asked, {"live": True})

    async def ready(self, asked: Asked) -> web.StreamResponse:
        """Whether a call could be served now; not while draining."""
        ready = self.is_ready()
        why = "draining" if self._is_draining() else "no backend can serve a call"
        told = {"ready": True} if ready else {"ready": False, "reason": why}
        return _json(asked, told, 200 if ready else 503)

    def is_ready(self) -> bool:
        """At least one backend can serve, and we are not stopping."""
        return self._pool.is_ready() and not self._is_draining()

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
            return _json(asked, {"reloaded": False, "problems": list(done.problems)}, 422)
        told = {
            "reloaded": True,
            "changed": list(done.changed),
            "needs_restart": list(done.needs_restart),
        }
        return _json(asked, told)

    async def metrics(self, asked: Asked) -> web.StreamResponse:
        """Prometheus text."""
        if self._metrics is None:
            raise web.HTTPNotFound
        body, kind = self._metrics.render(asked.request.headers.get("Accept", ""))
        return web.Response(body=body, headers=asked.headers() | {"Content-Type": kind})

    def state(self) -> dict[str, Any]:
        """The status document."""
        now = self._clock()
        waiting = self._dispatcher.waiting()
        return {
            "status_version": 1,
            "version": self._version,
            "started_at": round(self._started_at),
            "config": {
                "file": self._config_file,
                "loaded_s_ago": round(now - self._reload.loaded_at),
                "rejected": list(self._reload.rejected),
            },
            "ready": self.is_ready(),
            "draining": self._is_draining(),
            "running": self._pool.running,
            "queue": {
                "depth": len(waiting),
                "oldest_s": round(max((now - t.queued_at for t in waiting), default=0.0), 1),
                "per_model": _counted([t.call.model for t in waiting]),
            },
            "backends": [self._backend(view) for view in self._pool.snapshot()],
        }

    def _backend(self, view: BackendView) -> dict[str, Any]:
        catalog = self._pool.catalog
        own = next(b for b in view.breakers if b.model is None)
        of_models = {b.model: b for b in view.breakers if b.model is not None}
        models = []
        for canonical in catalog.listed(view.name):
            shown = catalog.shown(canonical)
            entry: dict[str, Any] = {
                "name": shown,
                "digest": catalog.digest(view.name, canonical),
                "state": "loaded" if shown in view.loaded else "on disk",
                "in_flight": view.in_flight.get(shown, 0),
                "context": catalog.context(view.name, canonical),
            }
            if view.loading == shown:
                entry["state"] = "loading"
            if shown in of_models:
                entry["breaker"] = _breaker(of_models[shown])
            models.append(entry)
        return {
            "name": view.name,
            "url": view.url,
            "version": view.version,
            "up": view.up,
            "error": view.error,
            "switch": view.switch.value if view.enabled else Switch.DISABLED.value,
            "state": word(view),
            "breaker": _breaker(own),
            "slots": view.slots,
            "in_flight": sum(view.in_flight.values()),
            "loading": view.loading,
            "cooling_s": round(view.cooling_s, 1),
            "first_byte_s": round(view.first_byte_s, 3),
            "vram_bytes": view.vram_bytes,
            "trouble": view.trouble,
            "models": models,
        }


def word(view: BackendView) -> str:
    """One word for how a backend is; health, breaker and switch stay apart in the fields."""
    if not view.enabled or view.switch is Switch.DISABLED:
        return "disabled"
    if view.up is None:
        return "unknown"
    if not view.up:
        return "down"
    own = next(b for b in view.breakers if b.model is None)
    if own.state.value != "closed":
        return "broken"
    return "draining" if view.switch is Switch.DRAINING else "up"


def _breaker(view: BreakerView) -> dict[str, Any]:
    return {
        "state": view.state.value,
        "reason": view.reason,
        "retry_in_s": round(view.retry_in_s, 1),
        "trips": view.trips,
    }


def _counted(models: Sequence[str]) -> dict[str, int]:
    return {model: models.count(model) for model in sorted(set(models))}


def _json(asked: Asked, value: Mapping[str, Any], status: int = 200) -> web.StreamResponse:
    headers = asked.headers() | {"Content-Type": JSON, "Cache-Control": "no-store"}
    return web.Response(status=status, body=compact(value), headers=headers)
