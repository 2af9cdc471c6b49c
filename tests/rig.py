"""
A simulated fleet with a real balancer before it, in one loop, over real sockets.

    async with running(hosts=2, config={"queue.max_wait": "1s"}) as rig:
        reply = await rig.ask("POST", "/api/chat", {...})
        rig.fleet["a"].faults.refuse()

Works in any loop: in virtual time (`balancer.sim.loop.run`) as in real time.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from aiohttp.test_utils import unused_port

from balancer.app import Balancer
from balancer.config import load
from balancer.core import names
from balancer.core.events import CallEnded, Event, Mishap
from balancer.sim.delivery import Seen
from balancer.sim.fleet import Fleet
from balancer.sim.host import Settings, SimModel
from balancer.sim.inference import ROUTES
from balancer.sim.ollama import VERSION
from tests.sim.wire import Reply, Wire, ask

E = TypeVar("E", bound=Event)
FAST = 100.0
LIMIT_S = 10.0


class Recorder:
    """Every event, in order; wakes who waits for what they tell."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._news = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._news.set()

    def of(self, kind: type[E]) -> list[E]:
        """All events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        """Wait for something that comes with an event; fails after *limit_s*."""
        async with asyncio.timeout(limit_s):
            while not condition():
                self._news.clear()
                await self._news.wait()


@dataclass(slots=True)
class Rig:
    """What a test holds in its hands. The next reload reads `config`, by dotted key."""

    fleet: Fleet
    balancer: Balancer
    events: Recorder
    config: dict[str, object]

    @property
    def url(self) -> str:
        """Where clients reach the balancer."""
        return self.balancer.addresses[0]

    @property
    def port(self) -> int:
        """The same, on loopback."""
        return int(self.url.rpartition(":")[2])

    async def ask(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        """One request to the balancer on a connection of its own; the answer as it came."""
        return await ask(self.port, method, path, body, **headers)

    async def connect(self) -> Wire:
        """A bare connection to the balancer."""
        return await Wire.connect(self.port)

    async def raw(self, *pieces: bytes, method: str = "GET") -> Reply:
        """Bytes as they are, and the answer to them."""
        wire = await self.connect()
        wire.writer.writelines(pieces)
        try:
            return await wire.reply(method)
        finally:
            wire.close()

    def calls(self) -> list[CallEnded]:
        """What became of each request so far."""
        return self.events.of(CallEnded)

    async def ended(self, count: int = 1, limit_s: float = LIMIT_S) -> list[CallEnded]:
        """The same, once so many have ended."""
        await self.events.until(lambda: len(self.calls()) >= count, limit_s)
        return self.calls()

    def inference(self) -> list[Seen]:
        """Inference that hosts saw, in order, loads and canaries of ours included."""
        seen = [one for host in self.fleet for one in host.requests if one.path in ROUTES]
        return sorted(seen, key=lambda one: one.started_at)

    def forwarded(self) -> list[Seen]:
        """Inference of clients that hosts saw."""
        return [one for one in self.inference() if "Via" in dict(one.headers)]

    async def idle(self) -> None:
        """Wait until nothing runs and nothing waits; fails if that does not come."""
        front, pool, waits = self.balancer.front, self.balancer.pool, self.balancer.dispatcher
        try:
            await self.events.until(lambda: not (front.running or pool.running or waits.waiting()))
        except TimeoutError:
            left = (len(front.running), pool.running, len(waits.waiting()))
            raise AssertionError(f"requests, leases, waiting calls left over: {left}") from None

    async def watching(self) -> None:
        """Wait until every host has answered, or failed, and what it lists is known."""
        pool, catalog = self.balancer.pool, self.balancer.catalog

        def known() -> bool:
            up = [name for name, member in pool.members.items() if member.health.up]
            return catalog.settled() and all(catalog.listed(name) for name in up)

        await self.events.until(known)
        async with asyncio.timeout(LIMIT_S):
            while catalog.digests_without_show():  # no event tells of these
                await asyncio.sleep(0.001)

    async def warm(self, host: str, model: str) -> None:
        """Have a model in one host's memory, and the balancer know it."""
        catalog, canonical = self.balancer.catalog, names.parse(model).canonical
        embeds = catalog.is_embedding_only(canonical)
        path, what = ("/api/embed", "input") if embeds else ("/api/generate", "prompt")
        loaded = await ask(self.fleet[host].port, "POST", path, {"model": model, what: ""})
        assert loaded.status == 200, loaded
        self.balancer.prober.refresh(host)
        await self.events.until(lambda: catalog.resident(host, canonical) is not None)

    def loaded(self) -> dict[str, list[str]]:
        """What is in memory, by host."""
        return {
            host.name: [runner.model.name for runner in host.host.loaded()] for host in self.fleet
        }


@asynccontextmanager
async def running(
    hosts: int = 3,
    *,
    dead: Sequence[str] = (),
    models: Iterable[SimModel] | None = None,
    settings: Settings | None = None,
    speed: float = FAST,
    version: str = VERSION,
    backend: Mapping[str, object] = MappingProxyType({}),
    config: Mapping[str, object] = MappingProxyType({}),
    **overrides: object,
) -> AsyncIterator[Rig]:
    """
    Hosts `a`, `b`, `c` … and a balancer that has heard from each of them.

    Fails at the end if something that must not happen was told, or a lease or a waiting call is
    left over.

    Args:
        dead: Names of backends before those, at addresses where nobody listens.
        speed: How many times faster than life the models are.
        backend: Further settings of every backend.
        config: Settings by dotted key; *overrides* are more of them.
    """
    events = Recorder()
    fleet = Fleet.test(
        hosts, models=models, settings=settings, speed=speed, version=version, keeps_bodies=True
    )
    async with fleet:
        places = [(name, dead_url()) for name in dead] + [(host.name, host.url) for host in fleet]
        told = {
            "server.listen": ["127.0.0.1:0"],
            "discovery.sources": "none",  # a test without backends means it
            "backends": [{"name": name, "url": url, **backend} for name, url in places],
        }
        wanted = {**told, **config, **overrides}
        loaded = load("", {}, overrides=wanted)
        balancer = Balancer(
            loaded, read=lambda: load("", {}, overrides=wanted), seed=1, subscribers=[events]
        )
        rig = Rig(fleet, balancer, events, wanted)
        await rig.balancer.start()
        try:
            await rig.watching()
            yield rig
            await rig.idle()
        finally:
            await rig.balancer.close()
            gc.collect()  # what leaked must warn in the test that leaked it
            gc.unfreeze()
    mishaps = events.of(Mishap)
    assert not mishaps, mishaps


def dead_url() -> str:
    """An address where nobody listens."""
    return f"http://127.0.0.1:{unused_port()}"
