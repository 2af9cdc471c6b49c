"""
What an operator can do to one backend: drain, resume, disable, reset, check, warm.

Everything may be repeated: what is so already stays so, and is answered alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable
from typing import Any, Final

from balancer.core import names
from balancer.core.domain import CheckResult, Switch
from balancer.core.pool import Pool
from balancer.ops.status import Status

TURNS: Final = {
    "drain": Switch.DRAINING,
    "resume": Switch.SERVING,
    "disable": Switch.DISABLED,
}
ACTIONS: Final = (*TURNS, "reset", "check", "warm")

Told = tuple[int, dict[str, Any]]


class Steering:
    """
    Carries out, and tells status and document of the answer.

    Args:
        look: Makes a health check now and has the pool learn of it.
        warm: Loads a model (canonical name) on a backend; what went wrong, empty: nothing.
    """

    def __init__(
        self,
        pool: Pool,
        status: Status,
        look: Callable[[str], Awaitable[CheckResult]],
        warm: Callable[[str, str], Awaitable[str]],
    ) -> None:
        self._pool = pool
        self._status = status
        self._look = look
        self._warm = warm

    async def __call__(self, name: str, action: str, by: str, model: str = "") -> Told:
        """
        Do *action* to the backend *name*, on behalf of the key named *by*.

        Args:
            model: What to warm, as people write it.
        """
        if name not in self._pool.members:
            return self._unknown(name)
        more: dict[str, Any] = {}
        if action in TURNS:
            more["changed"] = self._pool.turn(name, TURNS[action], by)
            if action == "resume" and not self._pool.members[name].backend.enabled:
                more["note"] = "the configuration has it switched off (enabled: false)"
        elif action == "reset":
            more["changed"] = self._pool.reset(name, by)
        elif action == "check":
            more["check"] = _seen(await self._look(name))
        elif action == "warm":
            canonical = self._listed(name, model)
            if canonical is None:
                return 404, {"error": f'{name} does not have the model "{model[:128]}".'}
            more["error"] = await self._warm(name, canonical)
        else:
            return 404, {"error": f"{action!r} cannot be done to a backend: {', '.join(ACTIONS)}."}
        if name not in self._pool.members:  # it left while it was looked at
            return self._unknown(name)
        return 200, {"action": action, **more, "backend": self._status.backend(name)}

    def _listed(self, name: str, model: str) -> str | None:
        """The model's canonical name, None: it is not there."""
        try:
            canonical = self._pool.catalog.meant(names.parse(model).canonical)
        except names.InvalidName:
            return None
        return canonical if canonical and self._pool.catalog.lists(name, canonical) else None

    def _unknown(self, name: str) -> Told:
        known = sorted(self._pool.members)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        there = f"There are: {', '.join(known)}." if known else "There are none."
        return 404, {"error": f'no backend "{name[:64]}". {there}{hint}', "backends": known}


def _seen(check: CheckResult) -> dict[str, Any]:
    return {
        "ok": check.ok,
        "latency_s": round(check.latency_s, 4),
        "version": check.version,
        "error": check.error,
    }
