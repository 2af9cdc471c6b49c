"""
A world of sockets: the running product before simulated hosts, asked by clients over HTTP.

It takes the same machines, models and jobs as `World`, and its report can be held against that
one's. Under `balancer.sim.loop.run` its time is virtual: it stands still while anything can run and
no socket is empty, and so the product's own work takes none of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from random import Random
from types import MappingProxyType
from typing import Any, Final

from balancer.app import Balancer
from balancer.config import load
from balancer.core.events import Event, LoadStarted, Mishap
from balancer.sim.bodies import Bodies
from balancer.sim.jobs import Job, Record, Report, with_chains
from balancer.sim.machine import ANSWER_S, Host, Machine, Model, Told
from balancer.sim.rigged import LoopTimeline, RiggedOllama
from balancer.sim.timeline import Timeline

# A queue as wide as that of the virtual world.
WIDE: Final = MappingProxyType(
    {"queue.max_depth": 10**6, "queue.max_depth_per_model": 10**6, "queue.max_wait": "1000h"}
)
_SAID: Final = re.compile(rb'"content":"[^"]|"embeddings":\[\[')
SETTLED_S: Final = 10.0  # to get to know all hosts, at the most


@dataclass(slots=True)
class Wired:
    """
    Machines, models and settings of the product, to be run once.

    Args:
        seed: Of the product's chance, and of when between two looks at the hosts the jobs begin.
        warm: Models in memory from the start, by machine.
        slots_known: Whether the product is told how many calls each machine takes at once.
        memory_known: Whether it is told how much memory each has for models.
        config: Further settings of the product, by dotted key.
    """

    machines: Sequence[Machine]
    models: Sequence[Model]
    seed: int = 1
    warm: Mapping[str, Sequence[str]] = field(default_factory=dict)
    slots_known: bool = False
    memory_known: bool = True
    ps_interval_s: float = 2.5
    config: Mapping[str, object] = field(default_factory=dict)

    async def run(self, jobs: Sequence[Job], until: float = math.inf) -> Report:
        """
        Let the jobs come in, and wait until all are answered or *until* has come.

        Raises:
            RuntimeError: The product had a mishap.
        """
        loop = asyncio.get_running_loop()
        timeline, bodies = LoopTimeline(loop), Bodies(with_chains(jobs), self.models)
        hosts = [
            Host(machine, self.models, timeline, place)
            for place, machine in enumerate(self.machines)
        ]
        for host in hosts:
            for model in self.warm.get(host.name, ()):
                host.load_now(model)
        events: list[Event] = []
        crowd = Crowd(bodies, timeline)
        async with AsyncExitStack() as stack:
            stack.callback(timeline.close)
            rigged = [
                await stack.enter_async_context(
                    RiggedOllama(host, timeline, bodies, partial(crowd.told, host.name))
                )
                for host in hosts
            ]
            balancer = Balancer(
                load("", {}, overrides=self._settings(rigged, jobs)),
                seed=self.seed,
                subscribers=[lambda event: _keep(events, event)],
            )
            read_at = loop.time() + ANSWER_S  # all hosts: their first checks are answered
            await balancer.start()
            stack.push_async_callback(balancer.close)
            await _settled(balancer)
            begin_at = read_at + Random(self.seed).uniform(0.0, self.ps_interval_s)
            await asyncio.sleep(begin_at - loop.time())
            timeline.origin = loop.time()
            await crowd.run(balancer.addresses[0], until)
        mishaps = [event for event in events if isinstance(event, Mishap)]
        if mishaps:
            raise RuntimeError(f"{len(mishaps)} mishaps, such as {mishaps[0]}")
        return Report(
            tuple(crowd.records),
            sum(host.loads for host in hosts),
            dict(sorted(Counter(e.why for e in events if isinstance(e, LoadStarted)).items())),
            sum(host.evictions for host in hosts),
            crowd.ended_at,
            {"seed": self.seed, "ps_interval_s": self.ps_interval_s, **self.config},
            timeline.happened,
        )

    def _settings(self, rigged: Sequence[RiggedOllama], jobs: Sequence[Job]) -> dict[str, object]:
        return {
            "server.listen": ["127.0.0.1:0"],
            "discovery.sources": "none",
            "health.loaded_interval": self.ps_interval_s,
            "auth.keys": [
                {"name": who, "role": "user", "key": _key(who)}
                for who in sorted({job.who for job in jobs if job.who})
            ],
            "backends": [self._backend(each) for each in rigged],
            **WIDE,
            **self.config,
        }

    def _backend(self, rigged: RiggedOllama) -> dict[str, object]:
        machine = rigged.host.machine
        told: dict[str, object] = {"name": machine.name, "url": rigged.url}
        if self.slots_known:
            told["slots"] = machine.slots
        if self.memory_known:
            told["vram"] = round(machine.type.memory_gb * 1e9)
        return told


class Crowd:
    """
    The clients of all jobs, each on a connection of its own.

    Those that come at one instant come in the order of the list.
    """

    def __init__(self, bodies: Bodies, timeline: Timeline) -> None:
        self.bodies = bodies
        self.timeline = timeline
        self.records = [Record(place, math.inf) for place in range(len(bodies.jobs))]
        self.ended_at = 0.0
        self._followers: dict[int, list[int]] = {}
        self._open = len(self.records)
        self._loop = asyncio.get_running_loop()
        self._over = self._loop.create_future()
        self._began_at = 0.0
        self._place = ("", 0)
        self._asking: set[asyncio.Task[Any]] = set()

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return self._loop.time() - self._began_at

    async def run(self, url: str, until: float) -> None:
        """Have everything asked, from now on."""
        self._began_at = self._loop.time()
        host, _, port = url.removeprefix("http://").rpartition(":")
        self._place = (host, int(port))
        for place, job in enumerate(self.bodies.jobs):
            if job.after is None:
                self.timeline.at(self._began_at + job.at, self._arrive, place)
            else:
                self._followers.setdefault(job.after[0], []).append(place)
        if self._open:
            await asyncio.wait({self._over}, timeout=None if math.isinf(until) else until)
        self.ended_at = self.now
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)

    def told(self, backend: str, place: int, told: Told) -> None:
        """What a host says of a job that it answered."""
        self.records[place].backend, self.records[place].cached = backend, told.cached

    def _arrive(self, place: int) -> None:
        record = self.records[place]
        record.arrived_at, record.status = self.now, "unfinished"
        task = self._loop.create_task(self._ask(place))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _ask(self, place: int) -> None:
        job, record = self.bodies.jobs[place], self.records[place]
        client = Client(self, record)
        transport, _ = await self._loop.create_connection(lambda: client, *self._place)
        path, body = self.bodies.of(place)
        transport.write(_head(path, job, len(body)) + body)
        try:
            async with asyncio.timeout(job.leaves_after):
                await client.over
        except TimeoutError:
            record.status = "left"
        finally:
            transport.abort()
        self._ended(place)

    def _ended(self, place: int) -> None:
        self.records[place].ended_at = self.now
        for follower in self._followers.pop(place, ()):
            after = self.bodies.jobs[follower].after
            assert after is not None  # noqa: S101 - that is how it came to follow
            self.timeline.at(self._loop.time() + after[1], self._arrive, follower)
        self._open -= 1
        if not self._open:
            self._over.set_result(None)


class Client(asyncio.Protocol):
    """One call: notes when its first token comes, and how it ends."""

    def __init__(self, crowd: Crowd, record: Record) -> None:
        self.over = asyncio.get_running_loop().create_future()
        self._crowd = crowd
        self._record = record
        self._head = b""
        self._tail = b""

    def data_received(self, data: bytes) -> None:
        """More of the answer."""
        if b"\r\n\r\n" not in self._head:
            self._head += data
            if b"\r\n\r\n" not in self._head:
                return
            self._note_head()
            data = self._head
        self._tail = self._tail[-1000:] + data
        if self._record.first_at is None and _has_token(self._tail):
            self._record.first_at = self._crowd.now

    def _note_head(self) -> None:
        head = self._head.partition(b"\r\n\r\n")[0].decode("latin-1").lower()
        named = dict(line.split(": ", 1) for line in head.split("\r\n")[1:])
        self._record.backend = named.get("x-balancer-backend", "")
        self._record.attempts = int(named.get("x-balancer-attempts", "0"))

    def connection_lost(self, error: Exception | None) -> None:
        """The answer has ended, well or not."""
        if self.over.done():
            return
        record = self._record
        if b'"done":true' in self._tail or b'"embeddings":[[' in self._tail:
            record.status = "done"
        else:
            record.status = "lost" if record.first_at is None else "cut"
            record.error = str(error or self._tail[-200:])
        self.over.set_result(None)


def _has_token(data: bytes) -> bool:
    """Whether it says anything: a heartbeat does not."""
    return _SAID.search(data) is not None


def _head(path: str, job: Job, size: int) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        "Connection: close",
        f"Content-Length: {size}",
    ]
    if job.who:
        lines.append(f"Authorization: Bearer {_key(job.who)}")
    if job.batch:
        lines.append("X-Balancer-Priority: batch")
    return "\r\n".join([*lines, "", ""]).encode()


def _key(who: str) -> str:
    """The key of one of them."""
    return hashlib.sha256(who.encode()).hexdigest()


def _keep(events: list[Event], event: Event) -> None:
    if isinstance(event, (LoadStarted, Mishap)):
        events.append(event)


async def _settled(balancer: Balancer) -> None:
    """Wait until every host has told what it has."""
    pool, catalog = balancer.pool, balancer.catalog
    async with asyncio.timeout(SETTLED_S):
        while not (
            catalog.settled()
            and all(m.health.up and catalog.listed(name) for name, m in pool.members.items())
            and not catalog.digests_without_show()
        ):
            await asyncio.sleep(0.01)
