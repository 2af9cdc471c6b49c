"""Events to those who want to hear of them."""

from __future__ import annotations

from collections.abc import Callable, Collection

from balancer.core.events import Event, Mishap

Subscriber = Callable[[Event], None]


class Bus:
    """Events to subscribers: synchronous, in order, never raising."""

    def __init__(self) -> None:
        self._subscribers: list[tuple[Subscriber, frozenset[type[Event]]]] = []
        self._hearing: dict[type[Event], tuple[Subscriber, ...]] = {}

    def subscribe(self, subscriber: Subscriber, kinds: Collection[type[Event]] = ()) -> None:
        """Hear every event from now on, or only those of the *kinds* that are named."""
        self._subscribers.append((subscriber, frozenset(kinds)))
        self._hearing.clear()

    def __call__(self, event: Event) -> None:
        """Tell everybody."""
        kind = type(event)
        hearing = self._hearing.get(kind)
        if hearing is None:
            found = (each for each, kinds in self._subscribers if not kinds or kind in kinds)
            hearing = self._hearing[kind] = tuple(found)
        for subscriber in hearing:
            try:
                subscriber(event)
            except Exception as error:  # noqa: BLE001 - one deaf subscriber must not stop a call
                if kind is not Mishap:
                    where = f"event {kind.__name__}"
                    self(Mishap(event.at, where, f"{type(error).__name__}: {error}"))
