"""
Whose turn it is: start-time fair queueing.

Each call is tagged with the virtual time at which its owner's share of the pool would have got to
it; who waits with the smallest tag is first. Virtual time is that of the last call which went out.

Source:
    Goyal, Vin and Cheng, "Start-time Fair Queuing", SIGCOMM 1996.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

MOST_KEYS: Final = 10_000  # client addresses may be such keys


@dataclass(slots=True)
class _Line:
    """
    Where a key's line ends, in virtual time.

    Args:
        end: Where its next call begins, if nothing else is later.
        newest: Where the newest waiting call's cost ended when it was tagged.
    """

    end: float
    newest: float


class FairQueue:
    """Tags by which the calls of many keys are merged; costs are in seconds of a middling GPU."""

    def __init__(self) -> None:
        self.virtual_time = 0.0
        self._lines: dict[str, _Line] = {}
        self._until_sweep = MOST_KEYS // 10

    def __len__(self) -> int:
        return len(self._lines)

    def tag(self, who: str, cost: float, weight: float, now: float) -> float:  # noqa: ARG002 - virtual time is what counts
        """
        The tag of a new call of *who*.

        Raises:
            ValueError: The cost is negative, the weight not positive, or one of them not finite.
        """
        length = _length(cost, weight)
        start = self.virtual_time
        line = self._lines.pop(who, None)  # the order is that of the last call
        if line is None:
            line = _Line(start, start)
        elif line.end > start:
            start = line.end
        line.end = line.newest = start + length
        self._lines[who] = line
        self._until_sweep -= 1
        if self._until_sweep <= 0:
            self._sweep()
        return start

    def next_tag(self, who: str) -> float:
        """What `tag` would give to a call of *who* that came now."""
        line = self._lines.get(who)
        return self.virtual_time if line is None else max(self.virtual_time, line.end)

    def advance(self, tag: float) -> None:
        """A call with that tag goes out."""
        self.virtual_time = max(self.virtual_time, tag)

    def settle(self, who: str, difference: float, weight: float) -> None:
        """
        A call has cost so much more than was charged, or less if negative.

        Raises:
            ValueError: As `tag`.
        """
        length = _length(difference, weight) if difference >= 0.0 else -_length(-difference, weight)
        line = self._lines.get(who)
        if line is not None:
            line.end += length
        elif length > 0.0:
            self._lines[who] = _Line(self.virtual_time + length, -math.inf)

    def give_back(self, who: str, cost: float, weight: float, tag: float) -> None:
        """
        A call with that tag left unserved; what it was charged is given back if it was the newest.

        What an older one was charged stays: those behind it were tagged with that.

        Raises:
            ValueError: As `tag`.
        """
        length = _length(cost, weight)
        line = self._lines.get(who)
        if line is not None and tag + length == line.newest:
            line.end -= length
            line.newest = tag

    def _sweep(self) -> None:
        """Forget keys that are as good as new, and too many."""
        for who in [who for who, line in self._lines.items() if line.end <= self.virtual_time]:
            del self._lines[who]
        for who in list(self._lines)[: max(0, len(self._lines) - MOST_KEYS)]:
            del self._lines[who]
        self._until_sweep = max(MOST_KEYS // 10, len(self._lines) // 2)


def _length(cost: float, weight: float) -> float:
    """A cost in virtual time."""
    if not (0.0 <= cost < math.inf and 0.0 < weight < math.inf):
        raise ValueError(f"a cost of {cost} at weight {weight}: neither may be negative or endless")
    return cost / weight
