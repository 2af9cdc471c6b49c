"""Requests as a host saw them, and the way of an answer out."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

from balancer.sim.cloud import Cloud
from balancer.sim.dialects import Headers
from balancer.sim.host import Host
from balancer.sim.http import Exchange, Framing

Segmenter = Callable[[bytes], Iterable[bytes]]


@dataclass(slots=True)
class Seen:
    """One request as the host saw it, and what became of it. Times are the loop's."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    started_at: float
    model: str = ""
    """As the client sent it."""
    status: int | None = None
    ending: str = ""
    """"" while it runs, "ok", "client-gone", or what broke it off."""
    ended_at: float | None = None
    written: bytearray = field(default_factory=bytearray)
    """The answer's body, if the host keeps it (`SimOllama.keeps_bodies`)."""


class Site:
    """What an answer must know of the host it comes from."""

    def __init__(self, host: Host, rng: Random, *, prefix: str, keeps_bodies: bool) -> None:
        self.host = host
        self.rng = rng
        self.prefix = prefix
        """Said before every made-up answer."""
        self.keeps_bodies = keeps_bodies
        self.segmenter: Segmenter | None = None
        """Cuts each chunk of every answer into smaller ones."""
        self.tap: Callable[[Seen, bytes], None] | None = None
        """Sees the bytes of every body as they are written."""
        self.cloud: Cloud | None = None
        """None: cloud models are disabled."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that drives it."""
        raise NotImplementedError

    def now(self) -> float:
        """The loop's time."""
        raise NotImplementedError

    def wall_ns(self) -> int:
        """The time of day."""
        raise NotImplementedError


class Delivery:
    """The way of an answer out: tapped, cut to segments, with the CORS headers it needs."""

    def __init__(self, site: Site, exchange: Exchange, seen: Seen) -> None:
        self.exchange = exchange
        self.seen = seen
        self.cors: Headers = []
        self.on_gone: Callable[[], None] | None = None
        self._site = site
        exchange.on_gone = self._gone

    def reply(self, status: int, headers: Headers, body: bytes = b"") -> None:
        """A whole answer."""
        self.seen.status = status
        merged = self._merged(headers)
        if self._site.segmenter is None or not body:
            self._keep(body)
            self._end("ok")
            self.exchange.reply(status, merged, body)
            return
        self.exchange.start(status, merged, "length", len(body))
        self.write(body)
        self.finish()

    def start(
        self, status: int, headers: Headers, framing: Framing = "chunked", length: int = 0
    ) -> None:
        """The head of an answer that comes in pieces."""
        self.seen.status = status
        self.exchange.start(status, self._merged(headers), framing, length)

    def write(self, chunk: bytes) -> None:
        """One chunk of a stream."""
        self._keep(chunk)
        if self._site.segmenter is None:
            self.exchange.write(chunk)
            return
        for segment in self._site.segmenter(chunk):
            self.exchange.write(segment)

    def finish(self) -> None:
        """The proper end."""
        self._end("ok")
        self.exchange.finish()

    def cut(self, why: str = "cut") -> None:
        """The connection is closed where it stands."""
        self._end(why)
        self.exchange.cut()

    def reset(self, why: str = "reset") -> None:
        """The connection is reset."""
        self._end(why)
        self.exchange.reset()

    def _merged(self, headers: Headers) -> Headers:
        return sorted([*headers, *self.cors]) if self.cors else headers

    def _keep(self, chunk: bytes) -> None:
        if self._site.keeps_bodies:
            self.seen.written += chunk
        if self._site.tap is not None and chunk:
            self._site.tap(self.seen, chunk)

    def _end(self, how: str) -> None:
        if not self.seen.ending:
            self.seen.ending, self.seen.ended_at = how, self._site.now()

    def _gone(self) -> None:
        self._end("client-gone")
        if self.on_gone is not None:
            self.on_gone()
