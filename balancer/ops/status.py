"""
The status document: one mapping, ready to be JSON, that pages, commands and scripts read.

Its shape has version 1: fields may be added, none changes its meaning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from balancer.core.catalog import Catalog
from balancer.core.dispatch import Dispatcher
from balancer.core.domain import Switch
from balancer.core.pool import BackendView, BreakerView, Pool
from balancer.ops.recent import Recent
from balancer.ops.reload import Reload


class Status:
    """
    Writes the document.

    Args:
        is_draining: Whether the balancer is stopping.
        started_at: Unix seconds, for people.
        config_file: As its reader wrote it, None: there is none.
    """

    def __init__(
        self,
        pool: Pool,
        dispatcher: Dispatcher,
        reload: Reload,
        recent: Recent,
        clock: Callable[[], float],
        is_draining: Callable[[], bool],
        version: str,
        started_at: float,
        config_file: str | None,
    ) -> None:
        self._pool = pool
        self._dispatcher = dispatcher
        self._reload = reload
        self._recent = recent
        self._clock = clock
        self._is_draining = is_draining
        self._version = version
        self._started_at = started_at
        self._config_file = config_file

    def is_ready(self) -> bool:
        """At least one backend can serve, and we are not stopping."""
        return self._pool.is_ready() and not self._is_draining()

    def document(self) -> dict[str, Any]:
        """Everything an operator wants to know."""
        now = self._clock()
        waiting = self._dispatcher.waiting()
        conflicts = shown_conflicts(self._pool.catalog)
        return {
            "status_version": 1,
            "version": self._version,
            "started_at": round(self._started_at),
            "config": {
                "file": self._config_file,
                "loaded_s_ago": self._reload.age_s(),
                "rejected": list(self._reload.rejected),
            },
            "ready": self.is_ready(),
            "draining": self._is_draining(),
            "running": self._pool.running,
            "queue": {
                "depth": len(waiting),
                "oldest_s": round(max((now - t.queued_at for t in waiting), default=0.0), 1),
                "per_model": dict(sorted(Counter(t.call.model for t in waiting).items())),
            },
            "backends": [self._backend(view, conflicts) for view in self._pool.snapshot()],
            "conflicts": conflicts,
            "recent": [asdict(row) for row in self._recent.rows()],
        }

    def backend(self, name: str) -> dict[str, Any]:
        """What the document says of one backend. Raises KeyError for an unknown name."""
        view = self._pool.view(name)
        return self._backend(view, shown_conflicts(self._pool.catalog))

    def _backend(
        self, view: BackendView, conflicts: Mapping[str, Mapping[str, list[str]]]
    ) -> dict[str, Any]:
        own = next(b for b in view.breakers if b.model is None)
        backend = self._pool.members[view.name].backend
        return {
            "name": view.name,
            "url": view.url,
            "source": view.source,
            "cloud": view.cloud,
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
            "rules": {"allow": list(backend.allow), "deny": list(backend.deny)},
            "provider": backend.provider,
            "trouble": view.trouble,
            "conflicts": [
                model
                for model, held in conflicts.items()
                if any(view.name in names for names in held.values())
            ],
            "failures": [asdict(failure) for failure in self._recent.failures(view.name)],
            "models": self._models(view),
        }

    def _models(self, view: BackendView) -> list[dict[str, Any]]:
        catalog = self._pool.catalog
        breakers = {b.model: b for b in view.breakers if b.model is not None}
        models = []
        for canonical in catalog.listed(view.name):
            shown = catalog.shown(canonical)
            entry: dict[str, Any] = {
                "name": shown,
                "digest": catalog.digest(view.name, canonical),
                "size_bytes": catalog.size_on(view.name, canonical),
                "cloud": catalog.is_stub(view.name, canonical),
                "state": "loaded" if shown in view.loaded else "on disk",
                "in_flight": view.in_flight.get(shown, 0),
                "context": catalog.context(view.name, canonical),
            }
            if view.loading == shown:
                entry["state"] = "loading"
            if shown in breakers:
                entry["breaker"] = _breaker(breakers[shown])
            models.append(entry)
        return models


def shown_conflicts(catalog: Catalog) -> dict[str, dict[str, list[str]]]:
    """Models of which backends hold different ones: name as listed, digest, backends."""
    return {catalog.shown(model): held for model, held in catalog.conflicts().items()}


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
    """`trial` says for people what `retry_in_s` cannot: a backend that is down has no trial."""
    return {
        "state": view.state.value,
        "reason": view.reason,
        "retry_in_s": round(view.retry_in_s, 1),
        "trial": view.trial,
        "trips": view.trips,
    }
