"""
The status document as server-sent events, for pages that stay open.

The document is made once for all listeners, and only while somebody listens. Nothing is queued:
who was slow is told the newest state and never hears of those between.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

from aiohttp import web
from aiohttp_sse import EventSourceResponse

from balancer.core.dialect import compact

LISTENERS: Final = 32
EVERY_S: Final = 0.5
FRESH_S: Final = (
    10.0  # an unchanged document is told again, so that silence means a lost connection
)
PING_S: Final = 15.0
BUSY: Final = {"Retry-After": "10", "Cache-Control": "no-store"}
SEND_S: Final = 10.0  # a reader that takes longer for one document is dropped
# What changes by itself as time goes by: a page counts on from what it was told.
TICKING: Final = frozenset({"loaded_s_ago", "oldest_s", "retry_in_s", "trial", "cooling_s"})


class Watching(Protocol):
    """What a stream needs of a request on its way through."""

    watching: bool
    outcome: str
    status: int

    @property
    def request(self) -> web.BaseRequest:
        """The request."""

    def headers(self) -> dict[str, str]:
        """The headers that every answer carries."""


@dataclass(frozen=True, slots=True)
class _Told:
    """A document as it goes out; `mark` is the same as long as nothing but time has changed."""

    text: str
    mark: bytes


class Feed:
    """
    Tells whoever listens.

    Args:
        state: Makes the status document.
    """

    def __init__(self, state: Callable[[], dict[str, Any]], clock: Callable[[], float]) -> None:
        self._state = state
        self._clock = clock
        self._closed = asyncio.Event()
        self._turn = -1
        self._told = _Told("", b"")
        self.listeners = 0

    def close(self) -> None:
        """End every stream, and begin none."""
        self._closed.set()

    async def events(self, asked: Watching) -> web.StreamResponse:
        """A stream of ``status`` events: one at once, then one whenever something has changed."""
        if self.listeners >= LISTENERS or self._closed.is_set():
            text = "too many pages watch already, or the balancer is stopping\n"
            return web.Response(status=503, text=text, headers=asked.headers() | BUSY)
        response = EventSourceResponse(
            headers=asked.headers(), send_timeout=SEND_S, ping_interval=PING_S
        )
        response.headers["Cache-Control"] = "no-store"
        del response.headers["Connection"]
        asked.watching = True
        asked.outcome, asked.status = "ok", 200  # leaving is how such a stream ends
        self.listeners += 1
        # Who has gone or was dropped needs no answer.
        with suppress(ConnectionResetError, TimeoutError):
            try:
                await response.prepare(asked.request)
                async with response:
                    await self._tell(response)
            finally:
                self.listeners -= 1
        return response

    async def _tell(self, response: EventSourceResponse) -> None:
        mark, due_at = b"", 0.0
        while not self._closed.is_set():
            told = self._current()
            now = self._clock()
            if told.mark != mark or now >= due_at:
                await response.send(told.text, event="status")
                mark, due_at = told.mark, now + FRESH_S
            await self._next_turn()

    async def _next_turn(self) -> None:
        """All wait for the same moments, so that one document serves them all."""
        now = self._clock()
        with suppress(TimeoutError):
            async with asyncio.timeout((now // EVERY_S + 1) * EVERY_S - now):
                await self._closed.wait()

    def _current(self) -> _Told:
        turn = int(self._clock() // EVERY_S)
        if turn != self._turn:
            state = self._state()
            mark = hashlib.sha256(compact(_steady(state))).digest()
            self._told, self._turn = _Told(compact(state).decode(), mark), turn
        return self._told


def _steady(value: Any) -> Any:
    """The same without what ticks."""
    if isinstance(value, dict):
        return {key: _steady(each) for key, each in value.items() if key not in TICKING}
    return [_steady(each) for each in value] if isinstance(value, list) else value
