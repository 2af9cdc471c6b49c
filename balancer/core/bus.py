"""Events to those who want to hear of them."""

from __future__ import annotations

from collections.abc import Callable, Collection

from balancer.core.events import Event, Mishap

Subscriber = Callable[[Event], None]


class Bus:
    """Events to subscribers: synchronous, in order, never raising."""

    def __init__(self) -> None:
        self._subscribers: list[tuple[Subscriber, frozenset[type[Event]], bool]] = []
        self._hearing: dict[type[Event], tuple[Subscriber, ...]] = {}

    def subscribe(
        self,
        subscriber: Subscriber,
        kinds: Collection[type[Event]] = (),
        *,
        but: Collection[type[Event]] = (),
    ) -> None:
        """
        Hear every event from now on, or only those of the *kinds* that are named.

        Args:
            but: Kinds not to hear, where no *kinds* are named.

        Who subscribes again keeps its place, and hears what it asks for now.
        """
        mine = (subscriber, frozenset(kinds or but), bool(kinds))
        known = [each for each, _, _ in self._subscribers]
        if subscriber in known:
            self._subscribers[known.index(subscriber)] = mine
        else:
            self._subscribers.append(mine)
        self._hearing.clear()

    def hears(self, kind: type[Event]) -> bool:
        """Whether anybody hears events of that kind: what nobody hears need not be made."""
        hearing = self._hearing.get(kind)
        return bool(self._who_hears(kind) if hearing is None else hearing)

    def _who_hears(self, kind: type[Event]) -> tuple[Subscriber, ...]:
        found = (each for each, kinds, named in self._subscribers if (kind in kinds) is named)
        hearing = self._hearing[kind] = tuple(found)
        return hearing

    def __call__(self, event: Event) -> None:
        """Tell everybody."""
        kind = type(event)
        hearing = self._hearing.get(kind)
        if hearing is None:
            hearing = self._who_hears(kind)
        for subscriber in hearing:
            try:
                subscriber(event)
            except Exception as error:  # noqa: BLE001 - one deaf subscriber must not stop a call
                if kind is not Mishap:
                    where = f"event {kind.__name__}"
                    self(Mishap(event.at, where, f"{type(error).__name__}: {error}"))
