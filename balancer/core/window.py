"""A part of the pool, as a planner of its own sees it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from balancer.core.domain import Backend, Call, Candidate, PlacementKey
from balancer.core.pins import Pins
from balancer.core.scheduler import LoadingNow
from balancer.core.sight import Place, Sight

Found = Callable[[Call, frozenset[str], bool], Sequence[Place]]


class Window:
    """
    What one cell may see of the pool: its own backends.

    Args:
        names: Of these backends; may change.
        found: Those places among them where a call may be served now.
        pins: Those that are this cell's to keep.
    """

    def __init__(
        self, view: Sight, names: Collection[str], found: Found, pins: Callable[[], Pins]
    ) -> None:
        self._view = view
        self._names = names
        self._found = found
        self._pins = pins
        self.slots = view.slots
        self.belief = view.belief
        self.loading_on = view.loading_on
        self.copy = view.copy
        self.memory = view.memory
        self.usual_s = view.usual_s
        self.size = view.size
        self.parameters_b = view.parameters_b
        self.is_embedding_only = view.is_embedding_only

    @property
    def priorities(self) -> Mapping[str, int]:
        """The tier of each backend; empty: all are of one."""
        return self._view.priorities

    @property
    def pins(self) -> Pins:
        """What is to be kept in memory here."""
        return self._pins()

    def backends(self) -> list[Backend]:
        """All there are, those that are away included."""
        return [backend for backend in self._view.backends() if backend.name in self._names]

    def places(
        self, call: Call, excluded: frozenset[str], *, exists: bool = True
    ) -> Sequence[Place]:
        """Where *call* may be served now; one that does not *exist* leaves no trace."""
        return self._found(call, excluded, exists)

    def candidates(self, call: Call, excluded: frozenset[str]) -> list[Candidate]:
        """Backends that may serve *call* now."""
        found = self._view.candidates(call, excluded)
        return [candidate for candidate in found if candidate.backend in self._names]

    def loading(self, key: PlacementKey) -> list[LoadingNow]:
        """Detached loads of *key* under way here."""
        return [load for load in self._view.loading(key) if load.backend in self._names]
