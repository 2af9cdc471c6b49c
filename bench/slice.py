"""
A slice of the scheduler's bench over HTTP: ``python bench/slice.py``.

The same calls go to the running product, over loopback sockets and in virtual time, and to the
virtual world, both before hosts of the same physics. What differs is all that stands between a
socket and the core. A figure of the product's is met if it is at most 1.25 times the virtual
world's, or 50 ms more.

How models come to lie on hosts hangs on small things, such as when a host was last looked at, so
that figures of many models differ between runs of the virtual world itself, with the same calls.
How much is told beside them: the band of so many runs with other chance.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import machine

from balancer.sim.figures import figures
from balancer.sim.loop import run
from balancer.sim.traces import Traces
from balancer.sim.wired import Wired
from balancer.sim.workloads import AFTER_S, Workload, workloads
from balancer.sim.world import World

TRACES: Final = Path(__file__).resolve().parents[2] / "shared" / "traces"
SHARES: Final = {"many-models": 0.12, "six-unlike": 0.105, "chat": 0.1}  # 2,000 calls or more
WITHIN: Final = 1.25
WITHIN_S: Final = 0.05
TOLD: Final = ("ttft_p50", "ttft_p99")
WIRED, VIRTUAL = "HTTP", "virtual"


@dataclass(frozen=True, slots=True)
class Task:
    """One run: the calls of one seed, and of another what chance does meanwhile."""

    workload: str
    share: float
    seed: int
    chance: int
    kind: str
    traces: str


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of it. `took_s`: real time."""

    task: Task
    figures: dict[str, float]
    took_s: float


def measure(task: Task) -> Ran:
    """Run it."""
    began = time.monotonic()
    of: Workload = workloads(Traces(Path(task.traces)), task.share)[task.workload]
    jobs = of.jobs(task.seed)
    until = max(job.at for job in jobs) + AFTER_S
    if task.kind == WIRED:
        wired = Wired(of.machines, of.models, seed=task.chance, warm=of.warm)
        report = run(wired.run(jobs, until))
    else:
        world = World(of.machines, of.models, seed=task.chance, warm=of.warm)
        report = world.run(jobs, until)
    return Ran(task, figures(jobs, report, of.skip_s), time.monotonic() - began)


def is_met(wired_s: float, virtual_s: float) -> bool:
    """Whether a figure of the product's is near enough to the virtual world's."""
    return wired_s <= max(WITHIN * virtual_s, virtual_s + WITHIN_S)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench/slice.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workloads", metavar="A,B", default=",".join(SHARES))
    parser.add_argument("--seeds", metavar="1,2", default="1", help="of the calls")
    parser.add_argument("--runs", type=int, default=3, help="over HTTP with other chance")
    parser.add_argument("--band", type=int, default=9, help="runs of the virtual world")
    parser.add_argument(
        "--calls", metavar="SHARE", type=float, help="of each workload; default: 2,000 and more"
    )
    parser.add_argument("--traces", metavar="DIR", default=str(TRACES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every run there")
    return parser.parse_args(argv)


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """All runs, the long ones first."""
    for kind, runs in ((WIRED, options.runs), (VIRTUAL, options.band)):
        for name in options.workloads.split(","):
            share = options.calls or SHARES.get(name, 0.1)
            for seed in map(int, options.seeds.split(",")):
                for chance in range(seed, seed + runs):
                    yield Task(name, share, seed, chance, kind, options.traces)


def report(done: Sequence[Ran]) -> Iterator[str]:
    """Lines of the table."""
    yield (
        "| workload, seed | calls | figure | virtual | its band | HTTP | its band | ratio | "
        "of medians | within |"
    )
    yield "| --- | ---: | --- | ---: | --- | ---: | --- | ---: | ---: | --- |"
    for name, seed in dict.fromkeys((ran.task.workload, ran.task.seed) for ran in done):
        runs = [ran for ran in done if (ran.task.workload, ran.task.seed) == (name, seed)]
        for figure in TOLD:
            virtual = [ran.figures[figure] for ran in runs if ran.task.kind == VIRTUAL]
            wired = [ran.figures[figure] for ran in runs if ran.task.kind == WIRED]
            first, medians = wired[0] / virtual[0], _ratio_of_medians(wired, virtual)
            calls = runs[0].figures["calls"]
            yield (
                f"| {name}, {seed} | {calls:.0f} | {figure.replace('_', ' ')} | {virtual[0]:.3f} "
                f"| {_band(virtual)} | {wired[0]:.3f} | {_band(wired)} | {first:.2f} "
                f"| {medians:.2f} | {'met' if is_met(wired[0], virtual[0]) else 'missed'} |"
            )
        yield (
            f"| {name}, {seed} | | loads, lost, cached | {_rest(runs, VIRTUAL)} | "
            f"| {_rest(runs, WIRED)} | | | | |"
        )


def _ratio_of_medians(wired: Sequence[float], virtual: Sequence[float]) -> float:
    return statistics.median(wired) / statistics.median(virtual)


def _band(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f} ({len(values)})"


def _rest(runs: Sequence[Ran], kind: str) -> str:
    found = [ran.figures for ran in runs if ran.task.kind == kind]
    loads, cached = (
        statistics.median(each[name] for each in found) for name in ("loads", "cached")
    )
    return f"{loads:.1f}, {math.fsum(each['lost'] for each in found):.0f}, {cached:.0%}"


def main() -> int:
    """Run the benchmark."""
    options = parse(sys.argv[1:])
    todo = list(tasks(options))
    done = list[Ran]()
    with ProcessPoolExecutor(options.processes) as pool:
        for ran in pool.map(measure, todo):
            done.append(ran)
            at, task = ran.figures, ran.task
            print(
                f"{len(done)}/{len(todo)} {task.workload} {task.kind} {task.seed}/{task.chance}: "
                f"p50 {at['ttft_p50']:.3f} p99 {at['ttft_p99']:.3f} ({ran.took_s:.0f} s)",
                file=sys.stderr,
            )
    if options.json is not None:
        told = {"machine": machine.describe(), "runs": [asdict(ran) for ran in done]}
        options.json.write_text(json.dumps(told, indent=1))
    print(f"{machine.describe()['processor']}, Python {platform.python_version()}")
    print("\n".join(report(done)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
