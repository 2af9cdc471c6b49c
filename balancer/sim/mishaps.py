"""What goes wrong in a simulated world, and when; and the schedules it is measured by."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from balancer.sim.jobs import Job

SLOW: Final = 0.2
DEAD_S: Final = 90.0


@dataclass(frozen=True, slots=True)
class _Spell:
    """Something is wrong with a machine for a while."""

    machine: str
    at: float
    for_s: float


@dataclass(frozen=True, slots=True)
class Crash(_Spell):
    """Streams break, connections are refused; back it comes with empty memory."""


@dataclass(frozen=True, slots=True)
class Hang(_Spell):
    """Silence; back it comes with empty memory. *connects*: connections still come about."""

    connects: bool = True


@dataclass(frozen=True, slots=True)
class Straggle(_Spell):
    """It runs at a share of its speed."""

    factor: float = SLOW


@dataclass(frozen=True, slots=True)
class Bypass:
    """A call of somebody's that goes straight to a machine, past the balancer."""

    machine: str
    at: float
    model: str
    prompt_tokens: int
    output_tokens: int


Mishap = Crash | Hang | Straggle | Bypass


def flapping(
    machine: str, begin: float, until: float, up_s: float = 20.0, down_s: float = 10.0
) -> list[Mishap]:
    """Up and down in turn, beginning with a crash."""
    found: list[Mishap] = []
    at = begin
    while at < until:
        found.append(Crash(machine, at, down_s))
        at += up_s + down_s
    return found


def stragglers(machines: Sequence[str], until: float, seed: int) -> list[Mishap]:
    """Each is five times slower now and then: every 600 s or so, for 20 s and a minute more."""
    rng = random.Random(seed)
    found: list[Mishap] = []
    for machine in machines:
        at = rng.expovariate(1 / 600)
        while at < until:
            for_s = 20.0 + rng.expovariate(1 / 60)
            found.append(Straggle(machine, at, for_s))
            at += for_s + rng.expovariate(1 / 600)
    return found


def deaths(machines: Sequence[str], until: float, seed: int) -> list[Mishap]:
    """Two crashes and two hangs of a minute and a half, and one host that flaps to the end."""
    rng = random.Random(seed)
    chosen = rng.sample(list(machines), len(machines))
    flaps, others = chosen[0], chosen[1:] or chosen
    times = sorted(rng.uniform(0.1, 0.85) * until for _ in range(4))
    kinds = [Crash, Crash, Hang, Hang]
    rng.shuffle(kinds)
    found: list[Mishap] = [
        kind(others[turn % len(others)], at, DEAD_S)
        for turn, (kind, at) in enumerate(zip(kinds, times, strict=True))
    ]
    begin = rng.uniform(0.05, 0.2) * until
    return found + flapping(flaps, begin, until)


def bypassing(
    jobs: Sequence[Job],
    machines: Sequence[str],
    seed: int,
    share: float = 0.25,
    favourite: float = 0.4,
) -> tuple[list[Job], list[Mishap]]:
    """
    Let a share of the jobs go straight to the machines, a good part of it to one.

    Raises:
        ValueError: Some jobs follow others, whose places would change.
    """
    if any(job.after is not None for job in jobs):
        raise ValueError("jobs that follow others cannot be taken out")
    rng = random.Random(seed)
    liked = rng.choice(list(machines))
    kept: list[Job] = []
    strangers: list[Mishap] = []
    for job in jobs:
        if rng.random() >= share:
            kept.append(job)
            continue
        machine = liked if rng.random() < favourite else rng.choice(list(machines))
        strangers.append(Bypass(machine, job.at, job.model, job.prompt_tokens, job.output_tokens))
    return kept, strangers
