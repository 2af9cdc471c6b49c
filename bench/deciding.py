"""
How long deciding takes: CPU time of the thread inside the core's door.

Hosts, models and so many calls that wait all the time: whenever one is bound to a host, another
comes. Hosts hold calls for as long as they like; nothing else is simulated. A decision is all that
is spent from one commit to the next, re-plans included; a turn is one step of the event loop. What
the garbage collector takes is told apart: ``python bench/deciding.py``.
"""

import argparse
import gc
import heapq
import math
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import machine
from lists import row
from tables import heading, table

from balancer.core import names, routes, strategy
from balancer.core.admission import Admission, QueueLimits
from balancer.core.catalog import Catalog
from balancer.core.dispatch import Dispatcher
from balancer.core.domain import (
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
from balancer.core.events import Event
from balancer.core.pool import Lease, Pool, PoolSettings
from balancer.core.scheduler import Load, Unload

SLOTS: Final = 4
RESIDENTS: Final = 3
LOAD_S: Final = 6.0
HOLD_S: Final = 4.0  # on a host of middling speed
TELLS: Final = 4  # times that an answer under way is seen to move
ZIPF: Final = 0.9
FOREVER_S: Final = 1e9
GROWTH: Final = ((10, 100), (50, 100), (50, 500), (50, 2000), (200, 2000), (1000, 10000))
ROUTE: Final = routes.find("POST", "/api/chat")
USER: Final = Principal("anonymous", Role.USER)


@dataclass(slots=True)
class Spent:
    """CPU time, in nanoseconds: of each decision, of each turn, of each collection."""

    decisions: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    collections: list[int] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)


class Watch:
    """Adds up what is spent behind the door, without what the garbage collector takes."""

    def __init__(self) -> None:
        self.spent = Spent()
        self._since = 0
        self._sum = 0
        self._began = 0
        self._collecting = 0
        self._inside = False
        self._gc_from = 0

    def __enter__(self) -> Self:
        gc.callbacks.append(self._collects)
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._collects)

    def door(self, enter: Callable[..., Any], *told: Any) -> None:
        """One turn."""
        self._inside = True
        self._since = self._began = time.thread_time_ns()
        collected = self._collecting
        enter(*told)
        now = time.thread_time_ns()
        self._inside = False
        self._sum += now - self._since
        self.spent.turns.append(now - self._began - (self._collecting - collected))

    def committed(self) -> None:
        """A call was bound to a host in this turn."""
        now = time.thread_time_ns()
        self.spent.decisions.append(self._sum + now - self._since)
        self._sum, self._since = 0, now

    def forget(self) -> None:
        """What was until now is not counted."""
        self.spent = Spent()

    def _collects(self, phase: str, _: dict[str, int]) -> None:
        now = time.thread_time_ns()
        if phase == "start":
            self._gc_from = now
            return
        took = now - self._gc_from
        self.spent.collections.append(took)
        if self._inside:
            self._collecting += took
            self._since += took  # not a part of the decision


class Host:
    """What a backend has in memory, and how fast it is."""

    def __init__(self, name: str, speed: float) -> None:
        self.name = name
        self.speed = speed
        self.residents: list[PlacementKey] = []
        self.running: Counter[PlacementKey] = Counter()


class Rig:
    """Pool, scheduler and dispatcher on a virtual clock; each host a few timers."""

    def __init__(self, policy: str, hosts: int, models: int, seed: int, watch: Watch) -> None:
        self.now = 0.0
        self._watch = watch
        self._chance = random.Random(seed)
        self._events: list[tuple[float, int, str, Callable[[], None]]] = []
        self._order = 0
        self._timer = 0
        self._granted: list[Lease] = []
        self._rows = [row(f"model{n}:8b") for n in range(models)]
        self._keys = [PlacementKey(names.parse(it["name"]).canonical) for it in self._rows]
        self._weights = [rank**-ZIPF for rank in range(1, models + 1)]
        self.waiting = 0
        catalog = Catalog(self.clock)
        self.pool = Pool(PoolSettings(), catalog, self.clock, self._chance, _ignore, _deaf)
        self.pool.reshape([Backend(f"gpu{n}", f"http://gpu{n}:11434", SLOTS) for n in range(hosts)])
        self.dispatcher = Dispatcher(
            self.pool,
            strategy.build(policy, self.pool),
            Admission(QueueLimits(10**6, 10**6, FOREVER_S), self.clock),
            self.clock,
            _ignore,
            self._wake_at,
            self._load,
            self._unload,
            _deaf,
        )
        self.pool.changed = self.dispatcher.kick
        self._hosts = {
            name: Host(name, self._chance.choice((0.4, 1.0, 1.5))) for name in self.pool.members
        }
        for host in self._hosts.values():
            self._begin(host)

    def clock(self) -> float:
        """Virtual seconds."""
        return self.now

    def _begin(self, host: Host) -> None:
        self.pool.observe(host.name, CheckResult(ok=True, latency_s=0.01, version="0.12.0"))
        self.pool.note_tags(host.name, self._rows, self.now)
        while len(host.residents) < min(RESIDENTS, len(self._keys)):
            key = self._draw()
            if key not in host.residents:
                host.residents.append(key)
        self._tell_memory(host)

    def _draw(self) -> PlacementKey:
        return self._chance.choices(self._keys, self._weights)[0]

    def _tell_memory(self, host: Host) -> None:
        rows = [self._rows[self._keys.index(key)] for key in host.residents]
        self.pool.note_ps(host.name, rows, self.now)

    # -- events --------------------------------------------------------------------------------

    def _at(self, at: float, kind: str, act: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._events, (at, self._order, kind, act))

    def _wake_at(self, at: float) -> None:
        self._timer += 1
        mine = self._timer
        if at < math.inf:
            self._at(max(at, self.now), "timer", lambda: self._kick(mine))

    def _kick(self, mine: int) -> None:
        if mine == self._timer:
            self._door(self.dispatcher.kick)

    def step(self) -> None:
        """The next event."""
        self.now, _, kind, act = heapq.heappop(self._events)
        self._watch.spent.events[kind] += 1
        act()

    def _door(self, enter: Callable[..., Any], *told: Any) -> None:
        self._watch.door(enter, *told)
        granted, self._granted = self._granted, []
        for lease in granted:
            self._start(lease)

    # -- calls ---------------------------------------------------------------------------------

    def arrive(self, in_s: float) -> None:
        """One more call comes within that time."""
        self._at(self.now + self._chance.uniform(0.0, in_s), "arrival", self._submit)

    def _submit(self) -> None:
        key, chance = self._draw(), self._chance
        self._order += 1
        call = Call(
            id=f"r{self._order}",
            route=ROUTE,
            model=names.display(key.model),
            key=key,
            streaming=True,
            purpose=Purpose.RUN,
            replayable=True,
            principal=USER,
            arrived_at=self.now,
            deadline=None,
            body=b"",
            prompt_tokens=max(1, min(3500, round(chance.lognormvariate(6.63, 0.99)))),
            fair_key=f"user-{chance.randrange(20)}",
        )
        self.waiting += 1
        self._door(self.dispatcher.submit, call, self._grant, self._refused)

    def _grant(self, lease: Lease) -> None:
        self._watch.committed()
        self._granted.append(lease)

    def _refused(self, error: BalancerError) -> None:
        raise AssertionError(f"nobody is to be refused: {error}")

    def _start(self, lease: Lease) -> None:
        self.waiting -= 1
        self.arrive(0.02)
        host, key = self._hosts[lease.backend.name], lease.call.key
        host.running[key] += 1
        prompt_s = lease.call.prompt_tokens / 4000.0 / host.speed
        hold_s = self._chance.expovariate(1.0 / HOLD_S) / host.speed
        first_at = self.now + prompt_s
        tokens = max(1, round(hold_s * 100.0))
        self._at(first_at, "first byte", lambda: self._door(lease.moved, 1))
        for part in range(1, TELLS + 1):
            at = first_at + hold_s * part / (TELLS + 1)
            self._at(at, "progress", lambda: self._door(lease.moved, tokens // (TELLS + 1)))
        usage = Usage(lease.call.prompt_tokens, tokens, 0.0, prompt_s, hold_s, prompt_s + hold_s)
        ends_at = first_at + hold_s
        outcome = Outcome(
            Verdict.OK,
            self.now,
            ends_at,
            status=200,
            first_byte_at=first_at,
            body_bytes=100 * tokens,
            usage=usage,
            committed=True,
        )
        self._at(ends_at, "end", lambda: self._end(host, lease, outcome))

    def _end(self, host: Host, lease: Lease, outcome: Outcome) -> None:
        host.running[lease.call.key] -= 1
        self._door(lease.settle, outcome)

    # -- loads ---------------------------------------------------------------------------------

    def _load(self, load: Load) -> None:
        began = self.now
        self._at(began + LOAD_S, "load", lambda: self._loaded(load, began))

    def _loaded(self, load: Load, began: float) -> None:
        host = self._hosts[load.backend]
        idle = [key for key in host.residents if not host.running[key]]
        while len(host.residents) >= RESIDENTS and idle:
            host.residents.remove(idle.pop(0))
        if load.key not in host.residents:
            host.residents.append(load.key)
        outcome = Outcome(Verdict.OK, began, self.now, status=200)
        self._door(self._tell_loaded, host, load, outcome)

    def _tell_loaded(self, host: Host, load: Load, outcome: Outcome) -> None:
        self.pool.end_load(load.backend, load.key, outcome)
        self._tell_memory(host)
        self.dispatcher.load_ended(load, None, None, LOAD_S)

    def _unload(self, unload: Unload) -> None:
        host = self._hosts[unload.backend]
        if unload.key in host.residents:
            host.residents.remove(unload.key)
        self.pool.catalog.note_unloaded(unload.backend, unload.key.model)


def _ignore(_: Event) -> None:
    pass


def _deaf(_: type[Event]) -> bool:
    return False


# -- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """What was measured at one size. `steady`: calls that waited at the end."""

    hosts: int
    waiting: int
    steady: int
    spent: Spent


def measure(
    policy: str, hosts: int, models: int, waiting: int, *, decisions: int, cpu_s: float, seed: int
) -> Cell:
    """Fill the queue, and then watch so many decisions, or as many as that CPU time allows."""
    with Watch() as watch:
        rig = Rig(policy, hosts, models, seed, watch)
        for _ in range(waiting):
            rig.arrive(20.0)
        ends = time.thread_time() + cpu_s
        while rig.now < 40.0 and time.thread_time() < ends:
            rig.step()
        watch.forget()
        gc.collect()
        ends = time.thread_time() + cpu_s
        while len(watch.spent.decisions) < decisions and time.thread_time() < ends:
            rig.step()
        rig.pool.changed = lambda: None
        for member in rig.pool.members.values():
            for lease in list(member.leases):
                lease.release()
        return Cell(hosts, waiting, rig.waiting, watch.spent)


def _ms(times: Sequence[int], share: float) -> str:
    if not times:
        return "–"
    ordered = sorted(times)
    return f"{ordered[max(0, math.ceil(share * len(ordered)) - 1)] / 1e6:.3f}"


HEADS: Final = (
    *("hosts", "waiting", "at the end", "decisions"),
    *("decision p50, ms", "p99", "p99.9", "turn p50, ms", "p99", "p99.9", "max"),
    *("collections", "longest, ms"),
)


def rows(cells: Sequence[Cell]) -> Iterator[list[str]]:
    """A line a size."""
    for cell in cells:
        spent = cell.spent
        yield [
            *(str(n) for n in (cell.hosts, cell.waiting, cell.steady, len(spent.decisions))),
            *(_ms(spent.decisions, share) for share in (0.5, 0.99, 0.999)),
            *(_ms(spent.turns, share) for share in (0.5, 0.99, 0.999, 1.0)),
            *(str(len(spent.collections)), _ms(spent.collections, 1.0)),
        ]


def _sizes(text: str) -> tuple[int, int]:
    hosts, waiting = text.split("x")
    return int(hosts), int(waiting)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench/deciding.py", description=__doc__)
    parser.add_argument("--policies", metavar="A,B", default="plan,least-loaded")
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument(
        "--sizes",
        metavar="HOSTSxWAITING",
        nargs="*",
        type=_sizes,
        default=[(50, 500)],
        help="default: 50x500",
    )
    parser.add_argument("--growth", action="store_true", help="instead: up to 1000x10000")
    parser.add_argument("--decisions", type=int, default=5000)
    parser.add_argument("--cpu", type=float, default=60.0, help="most seconds of CPU for a size")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--markdown", action="store_true")
    return parser.parse_args(argv)


def main() -> int:
    """Run the benchmark."""
    options = parse(sys.argv[1:])
    print(", ".join(f"{name} {text}" for name, text in machine.describe().items()))
    print(f"Python {platform.python_version()}, {options.models} models, {SLOTS} slots")
    for policy in options.policies.split(","):
        if policy not in strategy.STRATEGIES:
            print(f"!!! {policy} is unknown: {', '.join(strategy.STRATEGIES)}", file=sys.stderr)
            continue
        cells = []
        for hosts, waiting in GROWTH if options.growth else options.sizes:
            cells.append(
                measure(
                    *(policy, hosts, options.models, waiting),
                    decisions=options.decisions,
                    cpu_s=options.cpu,
                    seed=options.seed,
                )
            )
            events = ", ".join(f"{n} {kind}" for kind, n in cells[-1].spent.events.items())
            print(f"{policy} {hosts}x{waiting}: {events}", file=sys.stderr)
        print("\n".join(heading(f"Deciding: {policy}", markdown=options.markdown)))
        print("\n".join(table(HEADS, list(rows(cells)), markdown=options.markdown, texts=0)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
