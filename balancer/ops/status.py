"""
The status document: one mapping, ready to be JSON, that pages, commands and scripts read.

Its shape has version 1: fields may be added, none changes its meaning.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from balancer.core.catalog import Catalog
from balancer.core.dispatch import Dispatcher
from balancer.core.domain import Switch
from balancer.core.limits import Limits
from balancer.core.pool import BackendView, BreakerView, Pool
from balancer.core.scheduler import Ticket
from balancer.ops.recent import Recent
from balancer.ops.reload import Reload

MOST_CALLS: Final = 100  # that wait are told one by one


class Status:
    """
    Writes the document.

    Args:
        is_draining: Whether the balancer is stopping.
        started_at: Unix seconds, for people.
        config_file: As its reader wrote it, None: there is none.
        limits: What each key uses.
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
        limits: Limits | None = None,
    ) -> None:
        self._limits = limits or Limits(clock)
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
                "per_class": dict(Counter(t.call.priority_class for t in waiting)),
                "calls": self._calls(waiting, now),
            },
            "keys": self._keys(waiting),
            "backends": [self._backend(view, conflicts) for view in self._pool.snapshot()],
            "conflicts": conflicts,
            "recent": [asdict(row) for row in self._recent.rows()],
        }

    def _calls(self, waiting: Sequence[Ticket], now: float) -> list[dict[str, Any]]:
        """Those that are next, each with its place among the calls for its model."""
        places: Counter[str] = Counter()
        rows = []
        for ticket in waiting[:MOST_CALLS]:
            call = ticket.call
            places[call.key.model] += 1
            wait_s = self._dispatcher.estimate_s(ticket)
            rows.append(
                {
                    "id": call.id,
                    "model": call.model,
                    "position": places[call.key.model],
                    "who": call.fair_key or call.owner,
                    "class": call.priority_class,
                    "waited_s": round(now - ticket.queued_at, 1),
                    "estimate_s": None if math.isinf(wait_s) else round(wait_s, 1),
                }
            )
        return rows

    def _keys(self, waiting: Sequence[Ticket]) -> list[dict[str, Any]]:
        """Who has calls running or waiting, the busiest first, and what is left of its limits."""
        running = self._limits.all_running()
        queued = Counter(ticket.call.owner for ticket in waiting if ticket.call.owner)
        busy = sorted(running.keys() | queued.keys(), key=lambda o: (-running.get(o, 0), o))
        return [
            {
                "who": owner,
                "in_flight": running.get(owner, 0),
                "waiting": queued[owner],
                "limits": {
                    limit: {"left": left, "of": most}
                    for limit, (left, most) in self._limits.standing(owner).items()
                },
            }
            for owner in busy[:MOST_CALLS]
        ]

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
            "priority": backend.priority,
            "weight": backend.weight,
            "prefer": list(backend.prefer),
            "vram_limit_bytes": backend.vram_bytes,
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
