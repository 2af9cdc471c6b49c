"""Virtual time: one heap of what is to happen, in order; ties by who asked first."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any, Final

KEPT: Final = 50  # of the events told when something is wrong

# When, order among equals, what, with what. What is None once it is cancelled.
Entry = list[Any]


class Timeline:
    """
    The one clock and the one order of events of a simulated world.

    Attributes:
        now: Seconds since the beginning.
        happened: Events so far.
        after_each: Called after every event, if set.
        recent: The last events, for people; only kept where somebody looks after each.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.happened = 0
        self.after_each: Callable[[], None] | None = None
        self.recent: deque[str] = deque(maxlen=KEPT)
        self._heap: list[Entry] = []
        self._order = 0
        self._stopped = False

    def clock(self) -> float:
        """The time; what is handed to those that take a clock."""
        return self.now

    def at(self, when: float, what: Callable[..., None], *args: Any) -> Entry:
        """Let *what* happen then, not before now; what comes back is for `cancel`."""
        self._order += 1
        entry: Entry = [max(when, self.now), self._order, what, args]
        heapq.heappush(self._heap, entry)
        return entry

    def after(self, delay_s: float, what: Callable[..., None], *args: Any) -> Entry:
        """Let *what* happen so much later."""
        return self.at(self.now + delay_s, what, *args)

    @staticmethod
    def cancel(entry: Entry) -> None:
        """It is not to happen; if it has, that changes nothing."""
        entry[2] = None

    def stop(self) -> None:
        """The event under way is the last."""
        self._stopped = True

    def run(self, until: float) -> None:
        """Let everything up to *until* happen, or up to `stop`."""
        heap, pop = self._heap, heapq.heappop
        self._stopped = False
        while heap and heap[0][0] <= until:
            when, _, what, args = pop(heap)
            if what is None:
                continue
            self.now = when
            self.happened += 1
            if self.after_each is not None:
                self._keep(when, f"{_called(what)} {_told(args)}")
                what(*args)
                self.after_each()
            else:
                what(*args)
            if self._stopped:
                return
        self.now = max(self.now, until)

    def _keep(self, when: float, told: str) -> None:
        """Of the same thing again and again, the last time."""
        if self.recent and self.recent[-1].endswith(f" {told}"):
            self.recent.pop()
        self.recent.append(f"{when:.6f} {told}")


def _told(args: tuple[Any, ...]) -> str:
    return ", ".join(str(arg)[:120] for arg in args)


def _called(what: Callable[..., None]) -> str:
    return str(getattr(what, "__qualname__", what))[:120]
