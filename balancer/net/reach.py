"""
Who may change what is installed, and which backends a change concerns.

The law: a backend that is away, closed by the operator or ruled out is left out and told, with the
reason; what it concerns is carried out once per store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from aiohttp import web

from balancer.core.dialect import compact
from balancer.core.domain import Role, Switch
from balancer.core.errors import BadRequest, BalancerError, Forbidden, NoBackend
from balancer.core.names import quoted
from balancer.core.pool import Pool
from balancer.core.stores import Keeper, groups
from balancer.net.server import Exchange
from balancer.net.upstream import ClientUpstream, Target

JSON: Final = "application/json"
NATIVE: Final = "application/json; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Right:
    """Who may do something, and where: ``never``, ``admin`` or ``user``; ``all`` or names."""

    allow: str = "admin"
    target: tuple[str, ...] = ("all",)


@dataclass(frozen=True, slots=True)
class ManageSettings:
    """
    Rights by operation, and limits.

    Args:
        parallel: Downloads at once.
        idle_s: Longest silence of a backend; None: any.
        max_body: Bytes of an order.
        auto_pull: A call for a model that nobody has pulls it.
    """

    rights: Mapping[str, Right]
    parallel: int = 3
    idle_s: float | None = 600.0
    max_body: int = 256 * 1024 * 1024
    auto_pull: bool = False


@dataclass(frozen=True, slots=True)
class Scope:
    """Where an order goes, and which backends it leaves out, with the reason."""

    groups: list[list[str]]
    skipped: dict[str, str]

    @property
    def names(self) -> list[str]:
        """Every backend it goes to."""
        return [name for group in self.groups for name in group]


class Reach:
    """
    Rights and places.

    Attributes:
        settings: Replaced on a reload.
    """

    def __init__(self, settings: ManageSettings, pool: Pool, upstream: ClientUpstream) -> None:
        self.settings = settings
        self._pool = pool
        self._catalog = pool.catalog
        self._upstream = upstream

    def named(self, exchange: Exchange) -> frozenset[str]:
        """The backends that our own command line limits a pull to; empty: it does not."""
        names = exchange.request.headers.get("X-Balancer-To", "").replace(",", " ").split()
        for name in names:
            if name not in self._pool.members:
                known = f" There are: {', '.join(self._pool.members)}."
                known = "" if exchange.discreet else known
                raise BadRequest(f"no backend {quoted(name[:64])}.{known}")
        return frozenset(names)

    def scope(
        self, operation: str, model: str | None, among: frozenset[str] = frozenset()
    ) -> Scope:
        """Every backend that may have the model, by store; those that are away are left out."""
        target = self.settings.rights[operation].target
        chosen, skipped = [], {}
        for name, member in self._pool.members.items():
            backend = member.backend
            if not backend.enabled or backend.provider or not {"all", name} & set(target):
                continue
            if among and name not in among:
                continue
            if model is not None and not self._pool.allows(backend, model):
                continue
            if member.switch is not Switch.SERVING:
                skipped[name] = f"is {member.switch.value}"
            elif member.health.up:
                chosen.append(name)
            else:
                known = member.health.state == "down"
                skipped[name] = "is down" if known else "has not answered yet"
        return Scope(self._grouped(chosen), skipped)

    def holders(self, operation: str, model: str, made: str | None = None) -> Scope:
        """Those that have a model, and may have what is made of it."""
        return self.only(self.scope(operation, made), model)

    def only(self, scope: Scope, model: str) -> Scope:
        """Of a scope, those that have a model."""
        found = [[n for n in group if self._catalog.lists(n, model)] for group in scope.groups]
        away = set(self._catalog.holders(model))
        skipped = {name: why for name, why in scope.skipped.items() if name in away}
        return Scope([group for group in found if group], skipped)

    def _grouped(self, names: Sequence[str]) -> list[list[str]]:
        return groups(
            Keeper(
                name,
                self._pool.members[name].backend.store,
                (urlsplit(self._pool.members[name].backend.url).hostname or "").lower(),
                frozenset((m, self._catalog.digest(name, m)) for m in self._catalog.listed(name)),
            )
            for name in names
        )

    def target(self, name: str) -> Target:
        """How a backend is reached."""
        known = self._upstream.targets.get(name)
        return known if known is not None else Target(self._pool.members[name].backend.url)

    def nobody(self, model: str, scope: Scope) -> BalancerError:
        """Why an order goes nowhere."""
        if not scope.skipped:
            return NoBackend(f"No backend may take {model!r}.", retry_after_s=30.0)
        told = "; ".join(f"{name} {why}" for name, why in scope.skipped.items())
        return NoBackend(f"No backend can take {model!r} now: {told}.", retry_after_s=5.0)

    def once(self, names: Sequence[str]) -> list[str]:
        """One of each store that the operator named: what is not kept cannot be sent once more."""
        stores = {name: self._pool.members[name].backend.store or (name,) for name in names}
        return list({store: name for name, store in reversed(stores.items())}.values())[::-1]

    def may(self, operation: str, exchange: Exchange) -> bool:
        """Whether the caller has the right."""
        allow = self.settings.rights[operation].allow
        return allow == "user" or (allow == "admin" and exchange.principal.role is Role.ADMIN)

    def require(self, operation: str, exchange: Exchange) -> None:
        """Raises Forbidden, with the reason, if not."""
        if self.may(operation, exchange):
            return
        if self.settings.rights[operation].allow == "never":
            raise Forbidden(
                f"This balancer does not {operation} models (manage.{operation}.allow)."
            )
        raise Forbidden(
            f"To {operation} models here takes a key with the role admin "
            f"(manage.{operation}.allow)."
        )

    def skipped(self, scope: Scope) -> dict[str, str]:
        """The header that names those left out."""
        return {"X-Balancer-Skipped": ", ".join(scope.skipped)} if scope.skipped else {}


def document(
    exchange: Exchange,
    status: int,
    value: Mapping[str, Any],
    kind: str,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    """A whole answer of ours to an order."""
    exchange.status = status
    merged = exchange.headers() | {"Content-Type": kind, **(headers or {})}
    return web.Response(status=status, body=compact(value), headers=merged)
