"""Answers given word for word."""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from balancer.sim.delivery import Delivery, Seen
from balancer.sim.http import Framing


@dataclass(slots=True)
class Script:
    """An answer: its head, its segments with their delays, and how it ends."""

    status: int
    headers: Sequence[tuple[str, str]]
    segments: Sequence[bytes | tuple[float, bytes]]
    framing: Framing
    ending: Literal["clean", "cut", "reset", "stall"]
    length: int | None
    method: str | None
    times: int | None

    def play(self, loop: asyncio.AbstractEventLoop, delivery: Delivery) -> None:
        """Gives the answer."""
        chunks = [item if isinstance(item, bytes) else item[1] for item in self.segments]
        length = sum(map(len, chunks)) if self.length is None else self.length
        delivery.start(self.status, list(self.headers), self.framing, length)
        self._go_on(loop, delivery, 0)

    def _go_on(self, loop: asyncio.AbstractEventLoop, delivery: Delivery, position: int) -> None:
        while position < len(self.segments):
            segment = self.segments[position]
            position += 1
            if not isinstance(segment, bytes):
                delay_s, chunk = segment
                loop.call_later(delay_s, self._late, loop, delivery, position, chunk)
                return
            delivery.write(segment)
        self._end(delivery)

    def _late(
        self, loop: asyncio.AbstractEventLoop, delivery: Delivery, position: int, chunk: bytes
    ) -> None:
        if not delivery.exchange.ended:
            delivery.write(chunk)
            self._go_on(loop, delivery, position)

    def _end(self, delivery: Delivery) -> None:
        match self.ending:
            case "clean":
                delivery.finish()
            case "cut":
                delivery.cut()
            case "reset":
                delivery.reset()
            case "stall":
                pass


class Scripts:
    """The answers waiting for their requests, by path."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Script]] = defaultdict(list)
        self.paths: set[str] = set()
        """All that there ever was an answer for."""

    def add(self, path: str, script: Script) -> None:
        """Puts an answer behind those already waiting on the path."""
        self._waiting[path].append(script)
        self.paths.add(path)

    def take(self, seen: Seen) -> Script | None:
        """The answer for this request, if one is waiting."""
        waiting = self._waiting.get(seen.path, [])
        script = next((one for one in waiting if one.method in {None, seen.method}), None)
        if script is not None and script.times is not None:
            script.times -= 1
            if script.times <= 0:
                waiting.remove(script)
        return script
