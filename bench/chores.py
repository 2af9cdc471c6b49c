"""
What one ordinary call costs beside moving its bytes: ``python bench/chores.py``.

The real core, doorkeeper and subscribers without a socket: a key is checked, a slot is granted,
a first byte is noted, the lease is settled and everything told, to a log that is a file. Prints
microseconds per call: of each part the median, of it all the CPU time of the quickest round. What
is worked off later, many calls together (lines, counters), is in that alone.
"""

import argparse
import asyncio
import cProfile
import math
import pstats
import random
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, TextIO

from lists import row
from multidict import CIMultiDict, CIMultiDictProxy

from balancer.core import names, routes, strategy
from balancer.core.admission import Admission, QueueLimits
from balancer.core.bus import Bus
from balancer.core.catalog import Catalog
from balancer.core.dispatch import Dispatcher
from balancer.core.domain import (
    INTERACTIVE,
    Allowance,
    Backend,
    Call,
    CheckResult,
    Outcome,
    PlacementKey,
    Principal,
    Purpose,
    Role,
    Usage,
    Verdict,
)
from balancer.core.errors import BalancerError
from balancer.core.events import CallEnded, Event
from balancer.core.pool import Lease, Pool, PoolSettings
from balancer.ops.auth import Access
from balancer.ops.cors import Cors
from balancer.ops.door import Door
from balancer.ops.garbage import Garbage
from balancer.ops.log import LogWriter, configure
from balancer.ops.metrics import Metrics, Snapshot
from balancer.ops.notify import Notify, Wanted
from balancer.ops.recent import Recent
from balancer.ops.switches import Switches

clock = time.monotonic
HEADERS = CIMultiDictProxy(
    CIMultiDict(
        {
            "Host": "balancer.lan:11435",
            "User-Agent": "ollama-python/0.6.1 (x86_64 linux) Python/3.11.7",
            "Accept": "application/json",
            "Accept-Encoding": "gzip, deflate",
            "Authorization": "Bearer ob_0123456789abcdef0123456789abcdef",
            "Content-Type": "application/json",
            "Content-Length": "2048",
        }
    )
)
Spent = dict[str, list[float]]
PARTS = ("cors", "admit", "submit", "first byte", "settle", "tell")


@dataclass
class Key:
    """The caller's."""

    name: str = "lab"
    sha256: bytes = sha256(b"ob_0123456789abcdef0123456789abcdef").digest()
    role: Role = Role.USER
    models: tuple[str, ...] = ("*",)
    expires_at: float | None = 4e9
    priority: int = INTERACTIVE
    allowance: Allowance = field(default_factory=Allowance)


class Transport:
    """Of a client on the network."""

    def get_extra_info(self, name: str) -> Any:
        """No unix socket."""
        del name


class Request:
    """What the door reads of one."""

    method = "POST"
    remote = "192.168.7.42"
    headers = HEADERS
    transport = Transport()


Subscribers = dict[str, tuple[Callable[[Event], None], Collection[type[Event]]]]


class World:
    """Everything that has a chore, on so many backends."""

    def __init__(self, backends: int, models: int, loop: asyncio.AbstractEventLoop) -> None:
        rng = random.Random(1)
        self.told: list[Event] = []
        self.flushes: list[Callable[[], None]] = []
        self.catalog = Catalog(clock)
        self.pool = Pool(PoolSettings(), self.catalog, clock, rng, self.emit, self.hears)
        self.timer: asyncio.TimerHandle | None = None
        self.loop = loop
        self.dispatcher = Dispatcher(
            self.pool,
            strategy.build("least-loaded", self.pool),
            Admission(QueueLimits(), clock),
            clock,
            self.emit,
            self.wake_at,
            lambda _: None,
            lambda _: None,
            self.hears,
        )
        self.pool.changed = self.dispatcher.kick
        self.bus: Bus | None = None
        access = Access(wall=time.time, keys=[Key()], listener_loopback=False)  # noqa: TID251
        self.door = Door(access, Cors())
        self.pool.reshape([Backend(f"gpu{n}", f"http://gpu{n}:11434", 4) for n in range(backends)])
        self.models = [f"model{n}:8b" for n in range(models)]
        for name in list(self.pool.members):
            self.pool.observe(name, CheckResult(ok=True, latency_s=0.01, version="0.12.0"))
            self.pool.note_tags(name, [row(m) for m in self.models], clock())
            self.read_memory(name)

    def wake_at(self, at: float) -> None:
        """As the shell's timer does."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if not math.isinf(at):
            self.timer = self.loop.call_at(at, self.dispatcher.kick)

    def read_memory(self, name: str) -> None:
        """Two models are warm on each backend, the first everywhere."""
        number = list(self.pool.members).index(name)
        warm = {self.models[0], self.models[1 + number % (len(self.models) - 1)]}
        self.pool.note_ps(name, [row(m) for m in sorted(warm)], clock())

    def hears(self, kind: type[Event]) -> bool:
        """As the bus says; nobody, as long as there is none."""
        return self.bus is not None and self.bus.hears(kind)

    def emit(self, event: Event) -> None:
        """Keep it for later, or tell it."""
        if self.bus is None:
            self.told.append(event)
        else:
            self.bus(event)

    def subscribers(self, file: TextIO, directory: str) -> Subscribers:
        """Those of the product."""
        log = configure(
            *("info", "json"),
            stream=file,
            is_tty=False,
            env={},
            wall=time.time,  # noqa: TID251
            later=self.flushes.append,
        )
        metrics = Metrics(
            snapshot=Snapshot, known_models=self.catalog.names, wall=clock, version="1"
        )
        switches = Switches(f"{directory}/state.json", self.pool, clock, self.emit)
        return {
            "recent": (Recent(clock), Recent.KINDS),
            "switches": (switches, Switches.KINDS),
            "metrics": (metrics, metrics.kinds),
            "log": (LogWriter(log), (CallEnded,)),  # of the few that come with each call
            "notify": (Notify(Wanted(), clock, watchdog=False), Notify.KINDS),
        }


def calls(world: World, count: int, spent: Spent, stamp: Callable[[], float]) -> None:
    """So many calls, one after the other; *spent* gets seconds by part, one for each call."""
    route = routes.find("POST", "/api/chat")
    assert route is not None
    key = PlacementKey(names.parse(world.models[0]).canonical)
    granted: list[Lease] = []
    failed: list[BalancerError] = []
    request: Any = Request()
    door, dispatcher = world.door, world.dispatcher
    cors, admit, submit, first, settle, tell = (spent[name].append for name in PARTS)
    for number in range(count):
        if number % 1000 == 0:
            for name in list(world.pool.members):
                world.read_memory(name)
            if world.flushes:
                world.flushes.pop()()
        began = stamp()
        door.cors(request)
        cors(stamp() - began)
        began = stamp()
        now = clock()
        admitted = door.admit(request, now, "/api/chat", "")
        admit(stamp() - began)
        call = _call(f"{number:032x}", route, world.models[0], key, admitted.principal, now)
        began = stamp()
        dispatcher.submit(call, granted.append, failed.append)
        submit(stamp() - began)
        began = stamp()
        lease = granted.pop()
        lease.moved()
        first(stamp() - began)
        done = clock()
        outcome = Outcome(Verdict.OK, now, done, 200, done, 4096, USAGE, committed=True)
        began = stamp()
        lease.settle(outcome)
        settle(stamp() - began)
        began = stamp()
        world.emit(_ended(call, lease, now, done, admitted.client))
        tell(stamp() - began)


USAGE = Usage(tokens_in=26, tokens_out=298, load_s=0.02, prompt_s=0.1, decode_s=3.0, total_s=3.1)


def _call(id_: str, route: Any, model: str, key: Any, principal: Principal, now: float) -> Call:
    return Call(
        id=id_,
        route=route,
        model=model,
        key=key,
        streaming=True,
        purpose=Purpose.RUN,
        replayable=True,
        principal=principal,
        arrived_at=now,
        deadline=None,
        body=b"{}",
        prompt_tokens=500,
    )


def _ended(call: Call, lease: Lease, began: float, now: float, client: str) -> CallEnded:
    return CallEnded(
        at=now,
        request_id=call.id,
        method="POST",
        path="/api/chat",
        endpoint="chat",
        status=200,
        outcome="ok",
        duration_s=now - began,
        client=client,
        user_agent=HEADERS["User-Agent"],
        key="lab",
        model=call.model,
        alias="",
        backend=lease.backend.name,
        attempts=1,
        why=lease.why,
        queue_s=0.0,
        first_byte_s=now - began,
        upstream_s=0.001,
        bytes_in=2048,
        bytes_out=4096,
        usage=USAGE,
        phase="",
        error="",
        inference=True,
        streaming=True,
    )


@contextmanager
def world_of(backends: int, models: int) -> Iterator[tuple[World, Subscribers]]:
    """A world and its subscribers."""
    loop = asyncio.new_event_loop()
    world = World(backends, models, loop)
    with (
        tempfile.TemporaryDirectory() as directory,
        open(f"{directory}/log", "w", encoding="utf-8") as file,  # noqa: PTH123
    ):
        yield world, world.subscribers(file, directory)
    world.wake_at(math.inf)
    loop.close()


def by_part(backends: int, models: int, count: int, rounds: int) -> dict[str, float]:
    """Microseconds per call, by part."""
    found: dict[str, float] = {}
    with world_of(backends, models) as (world, subscribers):
        bus = Bus()
        for subscriber, kinds in subscribers.values():
            bus.subscribe(subscriber, kinds)
        spent = no_time()
        calls(world, count // 2, spent, time.perf_counter)
        for name, seconds in spent.items():
            found[name] = 1e6 * statistics.median(seconds)
        told: list[Event] = [e for e in world.told if isinstance(e, CallEnded)]
        found["events"] = _told(bus, told)
        for name, (subscriber, heard) in subscribers.items():
            found[f"  {name}"] = _told(
                subscriber, [e for e in told if not heard or type(e) in heard]
            )
        world.bus = bus
        all_of_it = []
        for _ in range(rounds):
            began = time.process_time()
            calls(world, count // 2 // rounds, no_time(), float)
            all_of_it.append(1e6 * (time.process_time() - began) / (count // 2 // rounds))
    return found | {"all of it": min(all_of_it)}


def no_time() -> Spent:
    """Nothing yet."""
    return {name: [] for name in PARTS}


def _told(subscriber: Callable[[Event], None], events: list[Event]) -> float:
    """Microseconds per call."""
    spent: dict[type[Event], list[float]] = {}
    for event in events:
        began = time.perf_counter()
        subscriber(event)
        spent.setdefault(type(event), []).append(time.perf_counter() - began)
    return sum(1e6 * statistics.median(seconds) for seconds in spent.values())


def profile(backends: int, models: int, count: int, lines: int) -> None:
    """Where the time goes, by function."""
    with world_of(backends, models) as (world, subscribers):
        world.bus = bus = Bus()
        for subscriber, kinds in subscribers.values():
            bus.subscribe(subscriber, kinds)
        calls(world, count // 10, no_time(), float)
        profiler = cProfile.Profile()
        profiler.runcall(calls, world, count, no_time(), float)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(lines)


def yardstick() -> float:
    """Microseconds that a piece of plain Python takes here and now: machines differ, and hours."""

    def piece() -> int:
        found: dict[str, int] = {}
        for number in range(50):
            found[str(number)] = number
        return len(found)

    return 1e6 * min(timeit.repeat(piece, number=1000, repeat=9)) / 1000


def main() -> None:
    """Print a column for each size of pool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", type=int, nargs="+", default=[3, 50])
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", type=int, default=0, metavar="LINES")
    options = parser.parse_args()
    if options.profile:
        profile(options.backends[0], options.models, options.calls, options.profile)
        return
    Garbage(clock, lambda *_: None).begin()
    columns = [
        by_part(backends, options.models, options.calls, options.rounds)
        for backends in options.backends
    ]
    print(f"yardstick {yardstick():.2f} us")
    print(f"{'us per call':14}" + "".join(f"{f'{n} backends':>14}" for n in options.backends))
    for name in columns[0]:
        print(f"{name:14}" + "".join(f"{column[name]:14.2f}" for column in columns))


if __name__ == "__main__":
    main()
