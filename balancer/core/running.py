"""A call under way, as the pool counts it and a scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass

from balancer.core.domain import Call, PlacementKey
from balancer.core.events import Planning


@dataclass(slots=True, eq=False)
class Run:
    """
    What one lease has come to so far. Instants are monotonic seconds.

    Args:
        at: When it was granted.
        cold: A load was made for it.
        remote: The backend only passes it on.
        probe: It went one above the slots believed in.
        first_at: When its first byte came, None: none has.
        records: That came so far, about one for each token.
        planned: What was foreseen of it; None: nothing was.
    """

    call: Call
    backend: str
    at: float
    cold: bool = False
    remote: bool = False
    probe: bool = False
    first_at: float | None = None
    records: int = 0
    planned: Planning | None = None

    @property
    def key(self) -> PlacementKey:
        """What it runs on."""
        return self.call.key
