"""
Looking for Ollama hosts that nobody wrote down, at the start and again and again.

Laws:
- A candidate counts once it answers as Ollama does. From then on it stays: whether it is up is
  for its checks to say.
- A balancer, ourselves or another, is never found; who wants it as a backend writes it down.
- One owner: `Discovery` alone knows what was found. What the configuration makes of it is decided
  anew at each change, by `config.discovery.join`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from balancer.config import LOCAL_PORT, Candidate, Config, parse_ollama_host
from balancer.core.events import Emit, HostPassedOver
from balancer.net.tasks import Tasks
from balancer.net.upstream import ClientUpstream, Target, UpstreamError

LIMIT_S: Final = 1.5  # for a whole look, names and questions together; a refusal takes no time

Place = tuple[str, int, str]
"""An IP address (one for all of this machine), a port, a path."""
HERE: Final = "here"


@dataclass(frozen=True, slots=True)
class Look:
    """What one look found, in the order of the candidates; *notes* are for people."""

    found: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()


async def look(upstream: ClientUpstream, config: Config, known: Sequence[Candidate] = ()) -> Look:
    """
    Ask every candidate at once.

    Args:
        known: Found before; they count unasked as long as they are candidates.
    """
    asked = [one for one in config.discovery.candidates if one not in known]
    if not config.discovery.candidates:
        return Look(tuple(known))
    loop = asyncio.get_running_loop()
    until = loop.time() + LIMIT_S
    told = await asyncio.gather(*(_complaint(upstream, one, until) for one in asked))
    answers = list(zip(asked, told, strict=True))
    found = [*known, *(one for one, complaint in answers if complaint is None)]
    notes = [f"{one.url} ({one.source}) {complaint}" for one, complaint in answers if complaint]
    return await _distinct(found, [spec.url for spec in config.backends], notes, until)


async def _complaint(upstream: ClientUpstream, one: Candidate, until: float) -> str | None:
    """Why it is no host for us; empty: not worth a word; None: it is Ollama."""
    try:
        async with asyncio.timeout_at(until):
            if isinstance(await _field(upstream, one.url, "/api/version", "version"), str):
                if await _field(upstream, one.url, "/_balancer/live", "live") is None:
                    return None
                return (
                    "is an ollama-balancer and is left out. If it is meant, name it as a backend."
                )
        why = "not what Ollama says"
    except TimeoutError:
        why = "no answer in time"
    except UpstreamError as error:
        why = error.failure.text
    if one.source == LOCAL_PORT:
        return ""
    parts = urlsplit(one.url)
    usual = f" Ollama listens on 11434: {parts.hostname}:11434." if parts.port == 80 else ""
    return f"is left out until it answers as Ollama does: {why}.{usual}"


async def _field(upstream: ClientUpstream, url: str, path: str, name: str) -> object:
    status, _, body = await upstream.ask(
        Target(url), "GET", path, limit_s=LIMIT_S, max_bytes=64 * 1024
    )
    try:
        told = json.loads(body) if status == 200 else None
    except ValueError:
        return None
    return told.get(name) if isinstance(told, dict) else None


async def _distinct(
    found: Sequence[Candidate], written: Sequence[str], notes: list[str], until: float
) -> Look:
    """Each host once, however it is called."""
    if not found:
        return Look((), tuple(notes))
    ours = await _addresses(socket.gethostname(), until)
    urls = [*written, *(one.url for one in found)]
    led = await asyncio.gather(*(_places(url, ours, until) for url in urls))
    seen = {place: url for url, places in zip(written, led, strict=False) for place in places}
    kept = []
    for one, places in zip(found, led[len(written) :], strict=True):
        twin = next((seen[place] for place in places if place in seen), None)
        if twin is None:
            kept.append(one)
        elif parse_ollama_host(twin).same_place() != parse_ollama_host(one.url).same_place():
            notes.append(f"{one.url} ({one.source}) is the same host as {twin}: used once.")
        for place in places:
            seen.setdefault(place, one.url)
    return Look(tuple(kept), tuple(notes))


async def _places(url: str, ours: frozenset[str], until: float) -> set[Place]:
    """Where a URL leads; a name that cannot be resolved leads to itself."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 0
    addresses = await _addresses(host, until) or {host}
    is_name = host not in addresses
    return {
        (HERE if _is_here(address, ours, is_name=is_name) else address, port, parts.path)
        for address in addresses
    }


def _is_here(address: str, ours: frozenset[str], *, is_name: bool) -> bool:
    """Names of this machine may stand for any loopback address."""
    if address in ("127.0.0.1", "::1") or address in ours:
        return True
    return is_name and address.startswith("127.")


async def _addresses(host: str, until: float) -> frozenset[str]:
    with suppress(ValueError):
        return frozenset({str(ipaddress.ip_address(host))})
    loop = asyncio.get_running_loop()
    with suppress(OSError, UnicodeError):  # a timeout is an OSError
        async with asyncio.timeout_at(max(until, loop.time() + 0.1)):
            rows = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            return frozenset(str(row[4][0]) for row in rows)
    return frozenset()


async def first_look(config: Config) -> Look:
    """Look once, before there is a balancer."""
    if not config.discovery.candidates:
        return Look()
    tasks = Tasks(lambda _: None, asyncio.get_running_loop().time)
    upstream = ClientUpstream({}, tasks)
    try:
        return await look(upstream, config)
    finally:
        await upstream.close()


class Discovery:
    """
    Looks again and again, and remembers.

    Args:
        config: As written, without what was found.
        looked: What the look at the start found; None: there was none.
        changed: Told when something new was found.
    """

    def __init__(
        self,
        config: Config,
        looked: Look | None,
        upstream: ClientUpstream,
        changed: Callable[[], None],
        clock: Callable[[], float],
        emit: Emit,
    ) -> None:
        self.found = () if looked is None else looked.found
        self._config = config
        self._upstream = upstream
        self._changed = changed
        self._clock = clock
        self._emit = emit
        self._told = set() if looked is None else set(looked.notes)
        self._again = asyncio.Event()
        if looked is None:
            self._again.set()

    def follow(self, config: Config) -> None:
        """A new configuration counts; there may be others to ask."""
        if config.discovery != self._config.discovery or config.backends != self._config.backends:
            self._again.set()
        self._config = config

    async def run(self) -> None:
        """Look whenever it is time to, for ever."""
        while True:
            await self._until_due()
            looked = await look(self._upstream, self._config, self.found)
            for note in looked.notes:
                if note not in self._told:
                    self._told.add(note)
                    self._emit(HostPassedOver(self._clock(), note))
            if looked.found != self.found:
                self.found = looked.found
                self._changed()

    async def _until_due(self) -> None:
        with suppress(TimeoutError):
            discovery = self._config.discovery
            async with asyncio.timeout(discovery.refresh_s if discovery.candidates else None):
                await self._again.wait()
        self._again.clear()
