"""
The fault table on real processes in real time: ``python bench/faults.py [--cycles N] [FAULT…]``.

Per fault: three simulated hosts and a balancer, each a process; traffic for a minute at least, the
fault put into the first host and healed again until twenty attempts have met it, or N times.
``killed`` is SIGKILL and a new process on the same port, ``frozen`` SIGSTOP and SIGCONT.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace

from processes import Rig, SimHost

from balancer.sim.storm import HEADER, MODELS, Course, Steps, courses, row, warm_up, weather
from balancer.sim.traffic import Traffic

WANTED: Sequence[str] = (
    "killed",
    "frozen",
    "hanging",
    "inference hanging",
    "reset before the head",
    "reset in the stream",
    "500 for one model, loading",
    "500 for one model, running",
    "restarted",
    "slow load",
    "stalled stream",
)


async def put_in(host: SimHost, name: str, steps: Steps) -> None:
    """Begin the fault."""
    if name == "killed":
        await host.kill()
    elif name == "frozen":
        host.send(signal.SIGSTOP)
    else:
        for step in steps:
            host.tell(*step)


async def heal(host: SimHost, name: str) -> None:
    """End it."""
    if name == "killed":
        await host.start()
    elif name == "frozen":
        host.send(signal.SIGCONT)
    else:
        host.tell("heal")


async def storm(name: str, cycles: int) -> bool:
    """Run one row of the table; False: a call was lost, a cut not told, or a traceback logged."""
    course = courses.get(name, Course())
    course = replace(course, most=min(course.most, cycles))
    loop = asyncio.get_running_loop()
    # At sixty calls a second a load of three seconds keeps as many waiting as the default allows.
    overrides = {"queue.max_depth_per_model": 256, **course.overrides}
    env = {f"BALANCER_{key.replace('.', '__').upper()}": str(of) for key, of in overrides.items()}
    if name.startswith("500"):  # or the fault is met but once in ten seconds, and then less
        env["BALANCER_BREAKER__MODEL__BACKOFF"] = "1s"
        env["BALANCER_BREAKER__MODEL__BACKOFF_MAX"] = "2s"
    async with Rig(env) as rig:
        victim = rig.hosts[0]
        backend = victim.url.removeprefix("http://")
        traffic = Traffic(rig.url, MODELS, rate=course.rate, seed=course.seed)
        calls = loop.create_task(traffic.run(course.most * (course.on_s + course.off_s) + 30))
        began, heals = loop.time(), []
        await asyncio.sleep(5)
        for _ in range(course.most):
            await put_in(victim, name, weather[name])
            await asyncio.sleep(course.on_s)
            await heal(victim, name)
            healed = loop.time()
            await asyncio.sleep(course.off_s / 2)
            await warm_up([victim.url], MODELS[:2])  # as somebody's use would, sooner or later
            await asyncio.sleep(course.off_s / 2)
            heals.append((healed, loop.time()))
            hits = sum((await rig.failures(backend)).values())
            if hits >= course.hits and loop.time() - began >= course.seconds:
                break
        traffic.stop()
        await calls
        verdicts = await rig.failures(backend)
        state = await rig.status()
        bad_lines = [line for line in rig.log.splitlines() if "Traceback" in line]
    tally = traffic.tally
    fates = tally.fates()
    waits = [
        min(
            (
                s.ended_at - h
                for s in tally.seen
                if s.backend == backend and s.fate == "ok" and h < s.began_at < end
            ),
            default=None,
        )
        for h, end in heals
    ]
    print(row(name, tally, verdicts, waits), flush=True)
    for seen in tally.seen:
        if seen.fate in ("lost", "silent"):
            print("   ", seen.fate, seen.plan.path, seen.plan.model, seen.status, seen.text)
    if state["running"] or state["queue"]["depth"] or bad_lines:
        print("   left behind:", state["running"], state["queue"], bad_lines[:3])
    return not (fates["lost"] or fates["silent"] or bad_lines)


def main() -> int:
    """Run the rows named, or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="FAULT")
    parser.add_argument("--cycles", type=int, default=100, help="at the most")
    options = parser.parse_args()
    print(HEADER)
    results = [asyncio.run(storm(name, options.cycles)) for name in options.names or WANTED]
    return 0 if all(results) else 1


sys.exit(main())
