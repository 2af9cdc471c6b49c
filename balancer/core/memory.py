"""
One budget for the request bodies that are in memory, all calls together.

Laws:
- Small bodies are counted and never wait: what is cheap need not queue behind what is not.
- Large ones wait in the order in which they came; those of which a part is there go first, since
  they alone can give something back.
- No deadlock: where no large body could go on, the oldest one does, whatever its size.
- What one owner has taken for bodies that are still coming is at most half of it all, unless it
  is one body: who declares much and sends it slowly does not keep the others out.
- What was taken is given back exactly once, however often that is asked for.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from itertools import chain, count
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
        self._coming: dict[str, list[Hold]] = {}  # large ones, by owner, the oldest first

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

    def hold(self, size: int = 0, owner: str = "") -> Hold:
        """
        The share of one body of which *size* bytes are in memory already.

        Args:
            owner: Who sends it; empty: somebody whom we do not count.
        """
        hold = Hold(self, owner)
        self._change(hold, size)
        return hold

    def _change(self, hold: Hold, size: int) -> None:
        self.held += size - hold.size
        self._large += (size > SMALL) - (hold.size > SMALL)
        hold.size = size

    def _enter(self, hold: Hold) -> None:
        if not hold.age:
            hold.age = next(self._ages)
            if hold.owner:
                self._coming.setdefault(hold.owner, []).append(hold)
        insort(self._begun if hold.size > SMALL else self._new, hold, key=attrgetter("age"))

    def _leave(self, hold: Hold) -> None:
        for queue in (self._begun, self._new):
            if hold in queue:
                queue.remove(hold)

    def _arrived(self, hold: Hold) -> None:
        coming = self._coming.get(hold.owner, [])
        if hold in coming:
            coming.remove(hold)
            if not coming:
                del self._coming[hold.owner]

    def _may_grow(self, hold: Hold) -> bool:
        """Whether its owner has not taken too much for others that are still coming."""
        coming = self._coming.get(hold.owner)
        if coming is None or coming[0] is hold:
            return True
        taken = sum(other.size for other in coming)
        return taken - hold.size + hold.wanted <= self._limit // 2

    def _admit(self) -> None:
        while True:
            waiting = chain(self._begun, self._new)
            hold = next(filter(self._may_grow, waiting), None)
            if hold is None:
                return
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
        owner: Who sends it.
        size: Bytes taken.
        wanted: Bytes it waits for, all in all.
        ready: Called when it has them.
    """

    __slots__ = ("_memory", "age", "owner", "ready", "size", "wanted")

    def __init__(self, memory: Memory, owner: str = "") -> None:
        self._memory = memory
        self.owner = owner
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

    def arrived(self, size: int) -> None:
        """All of it has come: it is *size* bytes."""
        self._memory._arrived(self)  # noqa: SLF001
        self.settle(size)

    def give_back(self) -> None:
        """It is not in memory any more, nor waits to be; may be told again."""
        self._memory._leave(self)  # noqa: SLF001
        self.arrived(0)
