"""
Trouble under traffic: a fault is put into one host of three and healed again, while callers call.

`weather` names the faults. `ride` runs one of them against a whole balancer over real sockets in
the present loop (virtual time under `sim.loop.run`) and tells what the callers and the balancer
saw. The tests ride it in virtual time; `make faults` rides the same weather on real processes.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import aiohttp

from balancer.app import Balancer
from balancer.config import load
from balancer.core.events import AttemptEnded, Event, LoadEnded, Mishap
from balancer.sim.fleet import Fleet
from balancer.sim.host import Settings, SimModel
from balancer.sim.ollama import SimOllama
from balancer.sim.traffic import Tally, Traffic

Steps = Sequence[tuple[Any, ...]]

RUNNER_STOPPED: Final = (
    "model runner has unexpectedly stopped, this may be due to resource limitations or an "
    "internal error, check ollama server logs for details"
)
weather: Final[Mapping[str, Steps]] = {
    "killed": (("restart", 1000.0),),
    "refused": (("refuse",),),
    "frozen": (("freeze",),),
    "hanging": (("hang",),),
    "inference hanging": (("hang_inference",),),
    "reset before the head": (("reset_head",),),
    "reset in the stream": (("reset", 3),),
    "cut stream": (("cut", 3),),
    "error in the stream": (("error_line", 3),),
    "error as first record": (("error_line", 0),),
    "500 for one model, loading": (("fail", "warm-a"), ("kill", "warm-a")),
    "500 for one model, running": (("fail", "warm-a", RUNNER_STOPPED, 500, "run"),),
    "restarted": (("restart", 3.0),),
    "slow load": (("slow_load", 10.0), ("restart",)),
    "queue full": (("queue_full",),),
    "garbage": (("garbage",),),
    "stalled stream": (("stall", 3),),
}


@dataclass(frozen=True, slots=True)
class Course:
    """
    How a storm goes.

    Args:
        seconds: At least so long, and until `hits` attempts have met the fault.
        on_s, off_s: The fault's length, and the calm after it.
        most: Cycles at the most.
    """

    seconds: float = 60.0
    rate: float = 20.0
    hits: int = 20
    on_s: float = 10.0
    off_s: float = 8.0
    most: int = 12
    seed: int = 1
    overrides: Mapping[str, Any] = field(default_factory=dict)


# What opens a breaker at once is met by few calls each time, so there must be more of them.
BUSY: Final = Course(rate=60.0, overrides={"queue.max_depth_per_model": 256})
# Silence takes long to tell from patience, so these last longer.
LONG: Final = Course(on_s=45.0, off_s=15.0, most=6)
courses: Final[Mapping[str, Course]] = {
    "frozen": LONG,
    "hanging": LONG,
    "inference hanging": replace(LONG, rate=60.0, overrides=BUSY.overrides),
    "stalled stream": replace(
        LONG, rate=60.0, overrides={**BUSY.overrides, "timeouts.idle": "20s"}
    ),
    "reset in the stream": BUSY,
    "cut stream": BUSY,
    "500 for one model, loading": BUSY,
    "slow load": BUSY,
}
MODELS: Final = ("warm-a", "warm-b", "cold")
HARMLESS: Final = frozenset({"ok", "gone", "caller"})


@dataclass(slots=True)
class Damage:
    """
    What a storm did.

    Args:
        verdicts: Of the attempts on the host in trouble.
        recovered_s: Per heal, seconds until an attempt sent after it went well there; None: none
            did before the next fault.
    """

    name: str
    tally: Tally
    verdicts: Counter[str]
    recovered_s: list[float | None]
    attempts: int
    calls: int
    mishaps: list[str]
    events: list[Event]
    left_running: int
    left_waiting: int

    @property
    def wasted(self) -> int:
        """Attempts on the host in trouble that came to nothing."""
        return sum(n for verdict, n in self.verdicts.items() if verdict not in HARMLESS)

    def row(self) -> str:
        """One line of the table."""
        return row(self.name, self.tally, self.verdicts, self.recovered_s)


HEADER: Final = (
    "| fault | calls | failed before the first record | cut without an error | cut, told "
    "| wasted attempts | recovered within, s | first record p50 / p99, s |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def row(
    name: str, tally: Tally, verdicts: Mapping[str, int], recovered_s: Sequence[float | None]
) -> str:
    """One line of the table under `HEADER`; arguments as of `Damage`."""
    fates = tally.fates()
    waits = [f"{s:.1f}" for s in recovered_s if s is not None]
    longest = max(waits, key=float) if waits else "–"
    wasted = {verdict: n for verdict, n in verdicts.items() if verdict not in HARMLESS}
    kinds = ", ".join(f"{verdict} {n}" for verdict, n in wasted.items())
    return (
        f"| {name} | {len(tally.seen)} | {fates['lost']} | {fates['silent']} | {fates['cut']} "
        f"| {sum(wasted.values())} ({kinds or 'none'}) | {longest} "
        f"| {tally.first_s(0.5):.2f} / {tally.first_s(0.99):.2f} |"
    )


def models() -> tuple[SimModel, ...]:
    """Two that are in memory everywhere, and one that must be loaded first."""
    model = partial(SimModel, prompt_tps=4000.0, decode_tps=100.0)
    return model("warm-a", load_s=1.0), model("warm-b", load_s=1.0), model("cold", load_s=3.0)


async def warm_up(urls: Sequence[str], names: Sequence[str]) -> None:
    """Load models on hosts, as they are after a while of use."""
    async with aiohttp.ClientSession() as session:
        for url in urls:
            for name in names:
                async with session.post(f"{url}/api/generate", json={"model": name}) as response:
                    await response.read()


async def ride(name: str, course: Course | None = None) -> Damage:
    """Run one storm; raises KeyError for an unknown one."""
    course = course or courses.get(name, Course())
    steps = weather[name]
    loop = asyncio.get_running_loop()
    events: list[Event] = []
    settings = Settings(num_parallel=4)
    async with Fleet.test(3, models=models(), settings=settings) as fleet:
        await warm_up(fleet.urls, MODELS[:2])
        overrides = {
            "server.listen": ["127.0.0.1:0"],
            "backends": fleet.urls,
            "server.drain_timeout": "5s",
            **course.overrides,
        }
        config = load("", {}, overrides=overrides)
        balancer = Balancer(config, subscribers=[events.append], seed=course.seed)
        await balancer.start()
        await asyncio.sleep(1.0)
        victim = config.backends[0].name
        traffic = Traffic(balancer.addresses[0], MODELS, rate=course.rate, seed=course.seed)
        began = loop.time()
        calls = loop.create_task(traffic.run(course.most * (course.on_s + course.off_s)))
        heals = await _blow(fleet["a"], steps, course, events, victim, began)
        traffic.stop()
        await calls
        await asyncio.sleep(1.0)
        running, waiting = balancer.pool.running, len(balancer.dispatcher.waiting())
        await balancer.close()
    attempts = [e for e in events if isinstance(e, AttemptEnded)]
    return Damage(
        name,
        traffic.tally,
        Counter(e.outcome.verdict.value for e in attempts if e.backend == victim)
        + Counter(
            "load failed"
            for e in events
            if isinstance(e, LoadEnded) and e.backend == victim and not e.ok
        ),
        [_recovery(attempts, victim, heal, end) for heal, end in heals],
        len(attempts),
        len(traffic.tally.seen),
        [f"{e.where}: {e.error}" for e in events if isinstance(e, Mishap)],
        events,
        running,
        waiting,
    )


async def _blow(
    host: SimOllama,
    steps: Steps,
    course: Course,
    events: Sequence[Event],
    victim: str,
    began: float,
) -> list[tuple[float, float]]:
    """Put the fault in and heal it; when each heal was, and when the calm after it ended."""
    loop = asyncio.get_running_loop()
    heals: list[tuple[float, float]] = []
    await asyncio.sleep(5.0)
    for _ in range(course.most - 1):
        for step in steps:
            host.faults.apply(*step)
        await asyncio.sleep(course.on_s)
        host.faults.heal()
        if host.faults.down:
            host.faults.restart()  # up again, with nothing in memory
        healed = loop.time()
        await asyncio.sleep(course.off_s)
        heals.append((healed, loop.time()))
        hits = sum(_is_hit(event, victim) for event in events)
        if hits >= course.hits and loop.time() - began >= course.seconds:
            break
    return heals


def _is_hit(event: Event, victim: str) -> bool:
    """Whether something of ours met the fault."""
    match event:
        case AttemptEnded():
            return event.backend == victim and event.outcome.verdict.value not in HARMLESS
        case LoadEnded():
            return event.backend == victim and not event.ok
        case _:
            return False


def _recovery(
    attempts: Sequence[AttemptEnded], victim: str, heal: float, end: float
) -> float | None:
    well = (
        e.at - heal
        for e in attempts
        if e.backend == victim
        and e.outcome.verdict.value == "ok"
        and heal < e.outcome.sent_at < end
    )
    return min(well, default=None)
