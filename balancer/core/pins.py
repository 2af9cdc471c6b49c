"""
Models that an operator wants in memory: which copies are lacking, and which must not be taken away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from balancer.core.domain import PlacementKey

Resident = Mapping[str, Collection[PlacementKey]]  # what is in memory, or being loaded, by backend


@dataclass(frozen=True, slots=True)
class Pin:
    """
    One model that is kept in memory.

    Args:
        model: Its canonical name.
        backends: On each of these; empty: on any *copies* backends.
        key: What is loaded where it lacks.
        exact: No other variant will do. Without it, to load ours over one that callers asked for
            would only be undone by the next of them.
    """

    model: str
    backends: tuple[str, ...]
    copies: int
    key: PlacementKey
    exact: bool = False

    def is_met_by(self, keys: Collection[PlacementKey]) -> bool:
        """Whether one of these variants is the copy that is wanted."""
        return self.key in keys if self.exact else any(key.model == self.model for key in keys)


@dataclass(frozen=True, slots=True)
class Lack:
    """
    Copies of a pinned model that are to be loaded: on *count* of the backends *where*.

    With named backends that is each of them.
    """

    pin: Pin
    where: tuple[str, ...]
    count: int


def missing(pin: Pin, resident: Resident, usable: Collection[str]) -> Lack:
    """
    What *pin* lacks.

    Args:
        resident: What is in memory or being loaded, by backend; one that is absent has nothing.
        usable: The backends that may serve the model; a copy on another is none.
    """
    wanted = [name for name in pin.backends if name in usable] if pin.backends else list(usable)
    lacking = tuple(name for name in wanted if not pin.is_met_by(resident.get(name, ())))
    if pin.backends:
        return Lack(pin, lacking, len(lacking))
    count = pin.copies - (len(wanted) - len(lacking))
    return Lack(pin, lacking, min(len(lacking), max(0, count)))


class Pins:
    """All pins, those of one model together."""

    def __init__(self, pins: Iterable[Pin] = ()) -> None:
        self._by_model: dict[str, list[Pin]] = {}
        for pin in pins:
            self._by_model.setdefault(pin.model, []).append(pin)

    def __iter__(self) -> Iterator[Pin]:
        return (pin for pins in self._by_model.values() for pin in pins)

    def __bool__(self) -> bool:
        return bool(self._by_model)

    def protects(self, backend: str, model: str, holders: Collection[str] = ()) -> bool:
        """
        Whether *model* must stay in the memory of *backend*, whoever else wants the room.

        Not against another variant of the same model: a host runs one of them at a time.

        Args:
            model: Its canonical name.
            holders: The usable backends that have it in memory. Where any will do, a copy beyond
                those wanted may go; empty: none is known to be beyond.
        """
        pins = self._by_model.get(model)
        if pins is None:
            return False
        others = len(holders) - (backend in holders)
        return any(backend in pin.backends if pin.backends else others < pin.copies for pin in pins)
