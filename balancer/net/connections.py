"""
The connections to one target: those at rest, those being made.

Laws:
- The warmest is taken first, so that a surplus grows old and is closed.
- Nobody waits behind somebody's answer: who finds none at rest gets a new one, no more than so many
  being made at once.
- What must not be sent twice never meets a connection that was used before.
- A request that met a closed connection is sent once more, over a new one; nobody is blamed, the
  others at rest are closed, too.
- What comes back from before a flush is closed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from balancer.core.domain import Call
from balancer.net.connecting import Resolver, Target, Way, failure_of
from balancer.net.connection import FAILED, STOPPED, BackendConnection, Sink, Transaction
from balancer.net.heads import Heads
from balancer.net.tasks import Tasks
from balancer.net.wheel import Wheel

IDLE_S: Final = 30.0
LIFETIME_S: Final = 600.0
MAX_IDLE: Final = 64
MAX_CONNECTING: Final = 16


@dataclass(slots=True)
class Ground:
    """
    What the connections of all targets have in common.

    Args:
        tasks: Owns those being made.
        stale: Requests that met a closed connection, by backend.
    """

    loop: asyncio.AbstractEventLoop
    tasks: Tasks
    wheel: Wheel
    resolver: Resolver
    stale: Counter[str] = field(default_factory=Counter)


class Connections:
    """
    The connections to one target.

    Raises:
        ValueError: The target's url is none.
    """

    def __init__(self, name: str, target: Target, ground: Ground) -> None:
        self.name = name
        self.target = target
        self._ground = ground
        self._clock: Callable[[], float] = ground.loop.time
        self._heads = Heads(target)
        self._way = Way(target, ground.resolver)
        self._room = asyncio.Semaphore(MAX_CONNECTING)
        self._idle: list[BackendConnection] = []  # the warmest last
        self._epoch = 0
        self._sweeper: asyncio.TimerHandle | None = None
        self._is_open = target.reuse

    @property
    def idle(self) -> int:
        """How many are at rest."""
        return len(self._idle)

    def send(self, call: Call, sink: Sink, *, patient: bool) -> Transaction:
        """
        Begin a transaction.

        Raises:
            ValueError: What is to be sent would not be what it seems.
        """
        transaction = Transaction(
            sink,
            self._heads.of(call, keep=self._is_open),
            call.body,
            self._ground.wheel,
            bare=call.route.method == "HEAD",
            patient=patient,
            idle_s=self.target.idle_s,
        )
        warm = self._warm() if call.replayable else None
        if warm is not None:
            warm.begin(transaction)
        else:
            self._connect(transaction)
        return transaction

    def flush(self) -> None:
        """Close what is at rest, and what carries something as soon as it does not."""
        self._epoch += 1
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.drop()

    def close(self) -> None:
        """The same, for good."""
        self._is_open = False
        self.flush()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    # -- at rest -------------------------------------------------------------------------------

    def _warm(self) -> BackendConnection | None:
        """The last that came to rest; None: there is none that is still good."""
        now = self._clock()
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closing and self._lasts(connection, now):
                return connection
            connection.drop()
        return None

    @staticmethod
    def _lasts(connection: BackendConnection, now: float) -> bool:
        return now < min(connection.idle_since + IDLE_S, connection.born_at + LIFETIME_S)

    def back(self, connection: BackendConnection) -> None:
        """It is free, and may be used again."""
        current = self._is_open and connection.epoch == self._epoch
        if not current or not self._lasts(connection, self._clock()):
            connection.drop()
            return
        if len(self._idle) >= MAX_IDLE:
            self._idle.pop(0).drop()
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = self._ground.loop.call_later(IDLE_S, self._sweep)

    def lost(self, connection: BackendConnection) -> None:
        """The backend has closed it, or we have."""
        if connection in self._idle:
            self._idle.remove(connection)

    def _sweep(self) -> None:
        """Close the surplus."""
        self._sweeper = None
        now = self._clock()
        while self._idle and not self._lasts(self._idle[0], now):
            self._idle.pop(0).drop()
        if self._idle:
            at = self._idle[0].idle_since + IDLE_S
            self._sweeper = self._ground.loop.call_at(at, self._sweep)

    def stale(self, transaction: Transaction) -> None:
        """Its connection was closed already: once more, over a new one."""
        self._ground.stale[self.name] += 1
        self.flush()
        if transaction.sink is not None:
            self._connect(transaction)

    # -- being made ----------------------------------------------------------------------------

    def _connect(self, transaction: Transaction) -> None:
        task = self._ground.tasks.spawn(self._connected(transaction), f"connection to {self.name}")
        transaction.connecting = task
        task.add_done_callback(lambda task: _ended(transaction, task))

    async def _connected(self, transaction: Transaction) -> None:
        try:
            async with self._room:
                connection = await self._way.connect(self._make)
        except (OSError, ValueError) as error:
            transaction.connecting = None
            transaction.fail(failure_of(error))
            return
        transaction.connecting = None
        connection.begin(transaction)

    def _make(self) -> BackendConnection:
        return BackendConnection(self, self._clock, self._epoch)


def _ended(transaction: Transaction, task: asyncio.Task[Any]) -> None:
    """No transaction waits for a connection that nobody makes any more."""
    if task.cancelled():
        transaction.fail(STOPPED)
    elif task.exception() is not None:
        transaction.fail(FAILED)
