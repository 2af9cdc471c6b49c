"""
What pins mean for the backends as they are now.

Laws:
- A pin protects what meets it, and nothing else. Against another variant of its own model nothing
  is protected: a backend runs one of them at a time, and whoever asks for it must be served.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Final

from balancer.core import names
from balancer.core.domain import Call, PlacementKey, Principal, Purpose, Role
from balancer.core.pins import Pin
from balancer.core.routes import find
from balancer.core.sight import Place, Sight

NOBODY: Final = Principal("placement", Role.USER)
MOST_STAND_INS: Final = 1000


class Keeping:
    """What is kept where."""

    def __init__(self, view: Sight) -> None:
        self._view = view
        self._stand_ins: dict[PlacementKey, Call] = {}
        self._places: dict[PlacementKey, tuple[Sequence[Place], Mapping[str, Place]]] = {}

    def places(self, key: PlacementKey) -> Mapping[str, Place]:
        """Where *key* may be served now, by name."""
        places = self._view.places(self.stand_in(key), frozenset(), exists=False)
        known = self._places.get(key)
        if known is None or known[0] is not places:  # the same ones are the same list
            if len(self._places) > MOST_STAND_INS:
                self._places.clear()
            known = self._places[key] = (places, {place.name: place for place in places})
        return known[1]

    def holders(self, pin: Pin) -> Iterator[str]:
        """The backends where *pin* is met, of those that may serve it now."""
        places = self.places(pin.key).items()
        return (name for name, place in places if pin.is_met_by(place.copy))

    def is_pinned(self, backend: str, model: str, wanted: PlacementKey | None = None) -> bool:
        """
        Whether an operator wants the runner of *model* to stay there.

        Args:
            wanted: What would be loaded in its stead; None: whatever that is.
        """
        besides = () if wanted is None else (wanted.model,)
        return any(True for _ in self._kept_by(backend, model, besides))

    def comes_back(self, backend: str, model: str) -> bool:
        """Whether the runner of *model* there would be loaded again, whatever takes its place."""
        return any(pin.exact for pin in self._kept_by(backend, model, ()))

    def _kept_by(self, backend: str, model: str, besides: Container[str]) -> Iterator[Pin]:
        """The pins that want it to stay there, but for those of models *besides*."""
        for pin in self._view.pins:
            if pin.model in besides or (pin.backends and backend not in pin.backends):
                continue
            copy = self._view.copy(backend, pin.key)
            if copy.resident is None or copy.resident.canonical != model:
                continue
            if not pin.is_met_by(copy):
                continue
            if pin.keeps(backend, () if pin.backends else self.holders(pin)):
                yield pin

    def stand_in(self, key: PlacementKey) -> Call:
        """A call that does not exist, for *key*."""
        known = self._stand_ins.get(key)
        if known is None:
            if len(self._stand_ins) > MOST_STAND_INS:
                self._stand_ins.clear()
            embeds = self._view.is_embedding_only(key.model)
            known = self._stand_ins[key] = Call(
                id="",
                route=find("POST", "/api/embed" if embeds else "/api/generate"),
                model=names.display(key.model),
                key=key,
                streaming=True,
                purpose=Purpose.LOAD,
                replayable=False,
                principal=NOBODY,
                arrived_at=0.0,
                deadline=None,
                body=b"",
                embedding=embeds,
            )
        return known
