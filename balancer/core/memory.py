"""
One budget for the request bodies that are in memory, all calls together.

Laws:
- Small bodies are counted and never wait: what is cheap need not queue behind what is not.
- Large ones wait in the order in which they came; those of which a part is there go first, since
  they alone can give something back.
- No deadlock: where no large body could go on, the oldest one does, whatever its size.
- What was taken is given back exactly once, however often that is asked for.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from itertools import count
from operator import attrgetter
from typing import Final

SMALL: Final = 64 * 1024  # bytes


class Memory:
    """
    The budget.

    Args:
        limit: Bytes. Small bodies may exceed it, and one large one that would not fit otherwise.

    Attributes:
        held: Bytes taken now.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0
        self._large = 0  # holds that are
        self._begun: list[Hold] = []  # large ones that wait for more, the oldest first
        self._new: list[Hold] = []
        self._ages = count(1)

    @property
    def limit(self) -> int:
        """Bytes; set anew it holds at once."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = limit
        self._admit()

    @property
    def is_over(self) -> bool:
        """More is held than should be: nothing should be kept to be repeated."""
        return self.held > self._limit

    @property
    def waiting(self) -> int:
        """How many bodies wait."""
        return len(self._begun) + len(self._new)

    def hold(self, size: int = 0) -> Hold:
        """The share of one body of which *size* bytes are in memory already."""
        hold = Hold(self)
        self._change(hold, size)
        return hold

    def _change(self, hold: Hold, size: int) -> None:
        self.held += size - hold.size
        self._large += (size > SMALL) - (hold.size > SMALL)
        hold.size = size

    def _enter(self, hold: Hold) -> None:
        hold.age = hold.age or next(self._ages)
        insort(self._begun if hold.size > SMALL else self._new, hold, key=attrgetter("age"))

    def _leave(self, hold: Hold) -> None:
        for queue in (self._begun, self._new):
            if hold in queue:
                queue.remove(hold)

    def _admit(self) -> None:
        while self._begun or self._new:
            hold = (self._begun or self._new)[0]
            fits = self.held - hold.size + hold.wanted <= self._limit
            if not fits and self._large > len(self._begun):
                return  # somebody is about to finish
            self._leave(hold)
            self._change(hold, hold.wanted)
            hold.ready()


class Hold:
    """
    What one body has taken of the budget.

    Attributes:
        age: Smaller if it was large earlier; 0: it never was.
        size: Bytes taken.
        wanted: Bytes it waits for, all in all.
        ready: Called when it has them.
    """

    __slots__ = ("_memory", "age", "ready", "size", "wanted")

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.age = self.size = self.wanted = 0
        self.ready: Callable[[], object] = int

    def take(self, size: int, ready: Callable[[], object]) -> bool:
        """
        Take *size* bytes, all in all, before they are in memory.

        Args:
            ready: Called when they are taken, now or later.

        Returns:
            False: It waits, until it is ready or gives back what it has.
        """
        if size <= max(SMALL, self.size):
            self.settle(max(size, self.size))
            ready()
            return True
        self.wanted, self.ready = size, ready
        self._memory._enter(self)  # noqa: SLF001 - the two are one
        self._memory._admit()  # noqa: SLF001
        return self.size == size

    def settle(self, size: int) -> None:
        """It is *size* bytes, after all, and they are in memory."""
        self._memory._change(self, size)  # noqa: SLF001
        self._memory._admit()  # noqa: SLF001

    def give_back(self) -> None:
        """It is not in memory any more, nor waits to be; may be told again."""
        self._memory._leave(self)  # noqa: SLF001
        self.settle(0)
