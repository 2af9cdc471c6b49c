"""
Models that an operator wants in memory: which copies are lacking, and which must not be taken away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from balancer.core.catalog import Copy
from balancer.core.domain import PlacementKey


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

    def is_met_by(self, copy: Copy) -> bool:
        """Whether what is in memory there is what is wanted; *copy* is of this pin's key."""
        return copy.fits if self.exact else copy.resident is not None

    def is_met_once(self, loaded: PlacementKey) -> bool:
        """Whether it will be, when *loaded* is in memory."""
        return loaded == self.key if self.exact else loaded.model == self.model

    def keeps(self, backend: str, holders: Iterable[str]) -> bool:
        """
        Whether the copy on *backend* is one of those wanted.

        Args:
            holders: The usable backends where the pin is met. Where any will do, a copy beyond
                those wanted may go. No more of them are asked for than need be.
        """
        if self.backends:
            return backend in self.backends
        others = (name for name in holders if name != backend)
        return sum(1 for _ in islice(others, self.copies)) < self.copies


@dataclass(frozen=True, slots=True)
class Lack:
    """
    Copies of a pinned model that are to be loaded: on *count* of the backends *where*.

    With named backends that is each of them.
    """

    pin: Pin
    where: tuple[str, ...]
    count: int


def missing(pin: Pin, holders: Collection[str], usable: Collection[str]) -> Lack:
    """
    What *pin* lacks.

    Args:
        holders: The backends where it is met, or will be by a load under way.
        usable: The backends that may serve the model; a copy on another is none.
    """
    wanted = [name for name in pin.backends if name in usable] if pin.backends else list(usable)
    lacking = tuple(name for name in wanted if name not in holders)
    if pin.backends:
        return Lack(pin, lacking, len(lacking))
    count = pin.copies - (len(wanted) - len(lacking))
    return Lack(pin, lacking, min(len(lacking), max(0, count)))


class Pins:
    """All pins."""

    def __init__(self, pins: Iterable[Pin] = ()) -> None:
        self._pins = tuple(pins)

    def __iter__(self) -> Iterator[Pin]:
        return iter(self._pins)

    def __bool__(self) -> bool:
        return bool(self._pins)
