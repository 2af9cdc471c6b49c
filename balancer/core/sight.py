"""What the planner may see of the pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from balancer.core.catalog import Copy, InMemory
from balancer.core.domain import Backend, Call, PlacementKey
from balancer.core.pins import Pins
from balancer.core.scheduler import LoadingNow, View
from balancer.core.slots import SlotBelief


class Place(Protocol):
    """A backend that may serve a call."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def copy(self) -> Copy:
        """The model there."""

    @property
    def remote(self) -> bool:
        """It only passes calls on."""


class Sight(View, Protocol):
    """What the plan may see of the pool."""

    @property
    def pins(self) -> Pins:
        """What is to be kept in memory."""

    def backends(self) -> Sequence[Backend]:
        """All there are, those that are away included."""

    def places(
        self, call: Call, excluded: frozenset[str], *, exists: bool = True
    ) -> Sequence[Place]:
        """Where *call* may be served now; one that does not *exist* leaves no trace."""

    def slots(self, backend: str, model: str) -> int:
        """Calls at once that the loaded model may take there now."""

    def belief(self, backend: str) -> SlotBelief | None:
        """What is believed of slots there; None: it has left."""

    def loading_on(self, backend: str) -> LoadingNow | None:
        """The detached load under way there."""

    def copy(self, backend: str, key: PlacementKey) -> Copy:
        """What there is to know of the model there, for one key."""

    def memory(self, backend: str) -> Sequence[InMemory]:
        """What it has in memory."""

    def usual_s(self, backend: str, model: str) -> float:
        """Time to first byte of late; 0: not known."""

    def size(self, model: str) -> int:
        """Bytes of its files, 0: not known."""

    def parameters_b(self, model: str) -> float | None:
        """Its parameters in thousands of millions, None: not told."""

    def is_embedding_only(self, model: str) -> bool:
        """Whether it cannot generate."""
