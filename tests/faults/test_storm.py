"""Trouble under traffic: no call lost, no stream cut in silence, nothing left behind."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from balancer.app import Balancer
from balancer.config import load
from balancer.core.events import CallEnded, Mishap
from balancer.sim.fleet import Fleet
from balancer.sim.host import Settings
from balancer.sim.loop import run
from balancer.sim.storm import (
    MODELS,
    RUNNER_STOPPED,
    Course,
    Damage,
    courses,
    models,
    ride,
    weather,
)
from balancer.sim.traffic import Traffic
from tests.rig import Recorder

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quiet")]

QUICK = (
    "killed",
    "reset in the stream",
    "error as first record",
    "500 for one model, loading",
    "restarted",
    "slow load",
)
LONG = ("hanging", "frozen")


def ridden(kind: str, seed: int, rate: float) -> Damage:
    """A short storm in virtual time, and what it did."""
    course = courses.get(kind, Course())
    return run(ride(kind, replace(course, seconds=20.0, hits=5, most=3, rate=rate, seed=seed)))


def assert_unharmed(damage: Damage) -> None:
    """What must hold whatever the weather."""
    fates = damage.tally.fates()
    told = [each for each in damage.tally.seen if each.fate in ("lost", "silent")]
    assert told == [], damage.row()
    assert fates["ok"] + fates["cut"] == damage.calls > 100
    assert damage.mishaps == []
    assert (damage.left_running, damage.left_waiting) == (0, 0)


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("kind", QUICK)
def test_a_storm(kind: str, seed: int) -> None:
    """A fault put in and healed under ten calls a second, in both dialects, one model cold."""
    damage = ridden(kind, seed, 10.0)
    assert_unharmed(damage)
    assert damage.wasted or kind == "slow load"
    if kind not in ("killed", "restarted", "reset in the stream", "slow load"):
        assert damage.tally.fates()["cut"] == 0


@pytest.mark.parametrize("kind", LONG)
def test_a_storm_of_silence(kind: str) -> None:
    """Hosts that say nothing cost time, and no call."""
    damage = ridden(kind, 2, 4.0)
    assert_unharmed(damage)
    assert 0 < damage.wasted < 20
    assert damage.tally.first_s(1.0) < 40.0


def test_every_weather_has_a_name_of_its_own() -> None:
    """The list the fault table is made from holds what these tests pick from it."""
    assert set(QUICK) | set(LONG) <= set(weather)
    assert set(courses) <= set(weather)


# -- all at once ----------------------------------------------------------------------------------

TROUBLES: tuple[tuple[Any, ...], ...] = (
    ("restart", 4.0),
    ("restart",),
    ("refuse",),
    ("freeze",),
    ("hang",),
    ("hang_inference",),
    ("reset_head", 3),
    ("garbage", b"\x00garbage\r\n\r\n", 3),
    ("cut", 2),
    ("reset", 1),
    ("error_line", 0),
    ("error_line", 3),
    ("stall", 2),
    ("fail", "warm-a"),
    ("fail", "cold", "a broken template"),
    ("fail", "warm-b", RUNNER_STOPPED, 500, "run"),
    ("queue_full",),
    ("slow_load", 20.0),
    ("slow", 30.0),
    ("slow_ps", 9.0),
    ("version", "0.1.0"),
    ("missing", "/api/chat"),
    ("kill", "warm-a"),
)


async def trouble(fleet: Fleet, rng: Random, blows: int) -> None:
    """Something befalls some host every few seconds, or it is healed; in the end all are."""
    for _ in range(blows):
        await asyncio.sleep(rng.expovariate(0.2))
        host = fleet[rng.choice("abc")]
        if rng.random() < 0.4:
            host.faults.heal()
        else:
            host.faults.apply(*rng.choice(TROUBLES))
    for host in fleet:
        host.faults.heal()
        if host.faults.down:
            host.faults.restart()


async def season(seed: int) -> None:
    """A minute and a half of everything, with clients that hang up; then calm, and nothing left."""
    rng, events = Random(seed), Recorder()
    settings = Settings(num_parallel=rng.choice((1, 2, 4)))
    async with Fleet.test(3, models=models(), settings=settings) as fleet:
        wanted = {
            "server.listen": ["127.0.0.1:0"],
            "backends": fleet.urls,
            "timeouts.load": "60s",
            "timeouts.idle": "30s",
            "queue.max_wait": "60s",
            "routing.strategy": rng.choice(("least-loaded", "warm-first", "round-robin")),
        }
        balancer = Balancer(load("", {}, overrides=wanted), subscribers=[events], seed=seed)
        await balancer.start()
        url = balancer.addresses[0]
        stormy = Traffic(url, MODELS, rate=4.0, seed=seed, abort_share=0.2, limit_s=400.0)
        async with asyncio.TaskGroup() as group:
            group.create_task(stormy.run(90.0))
            group.create_task(trouble(fleet, rng, 15))
        await asyncio.sleep(150.0)
        calm = Traffic(url, MODELS, rate=2.0, seed=seed)
        await calm.run(20.0)
        await asyncio.sleep(1.0)
        left = balancer.pool.running, len(balancer.dispatcher.waiting()), len(balancer.exchanges)
        held = [(m.load.in_flight(), m.loading) for m in balancer.pool.members.values()]
        running = [host.host.running for host in fleet]
        await balancer.close()
    assert calm.tally.fates().keys() == {"ok"}
    assert stormy.tally.fates()["silent"] == 0
    assert (left, held, running) == ((0, 0, 0), [(0, None)] * 3, [0] * 3)
    assert events.of(Mishap) == []
    ended = Counter(call.request_id for call in events.of(CallEnded))
    assert set(ended.values()) == {1}
    assert len(ended) == len(stormy.tally.seen) + len(calm.tally.seen)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_season_of_everything(seed: int) -> None:
    """Whatever comes together: one end per call, none silent, all recovered, nothing left over."""
    run(season(seed))
