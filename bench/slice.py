"""
A slice of the scheduler's bench over HTTP: ``python bench/slice.py``.

The same calls go to the running product, over loopback sockets and in virtual time, and to the
virtual world, both before hosts of the same physics, which are looked at at the same instants. What
differs is all that stands between a socket and the core. Compared is the time from a client's
request to the first token that it gets; a figure of the product's is met if it is at most 1.25
times the virtual world's, or 50 ms more. How many calls went to the same host in both is told
beside it: where that is all of them, nothing was left to chance.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import machine

from balancer.sim.figures import figures
from balancer.sim.jobs import Report
from balancer.sim.loop import run
from balancer.sim.traces import Traces
from balancer.sim.wired import Wired
from balancer.sim.workloads import AFTER_S, workloads
from balancer.sim.world import World

TRACES: Final = Path(__file__).resolve().parents[2] / "shared" / "traces"
SHARES: Final = {"many-models": 0.12, "six-unlike": 0.105, "chat": 0.1}  # 2,000 calls or more
WITHIN: Final = 1.25
WITHIN_S: Final = 0.05
TOLD: Final = ("ttft_p50", "ttft_p99")


@dataclass(frozen=True, slots=True)
class Task:
    """Two runs: the calls of one seed, and of another what chance does meanwhile."""

    workload: str
    share: float
    seed: int
    chance: int
    traces: str


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of it. `alike`: calls that went to the same host in both. `took_s`: real time."""

    task: Task
    virtual: dict[str, float]
    wired: dict[str, float]
    alike: int
    took_s: float


def measure(task: Task) -> Ran:
    """Run it in both."""
    began = time.monotonic()
    of = workloads(Traces(Path(task.traces)), task.share)[task.workload]
    jobs = of.jobs(task.seed)
    until = max(job.at for job in jobs) + AFTER_S
    world = World(of.machines, of.models, seed=task.chance, warm=of.warm)
    virtual = world.run(jobs, until)
    wired = run(Wired(of.machines, of.models, seed=task.chance, warm=of.warm).run(jobs, until))
    return Ran(
        task,
        figures(jobs, virtual, of.skip_s),
        figures(jobs, wired, of.skip_s),
        _alike(virtual, wired),
        time.monotonic() - began,
    )


def _alike(virtual: Report, wired: Report) -> int:
    pairs = zip(virtual.records, wired.records, strict=True)
    return sum(ours.backend == theirs.backend for ours, theirs in pairs)


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
    parser.add_argument("--runs", type=int, default=3, help="of each, with other chance")
    parser.add_argument(
        "--calls", metavar="SHARE", type=float, help="of each workload; default: 2,000 and more"
    )
    parser.add_argument("--traces", metavar="DIR", default=str(TRACES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every run there")
    return parser.parse_args(argv)


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """All runs."""
    for name in options.workloads.split(","):
        share = options.calls or SHARES.get(name, 0.1)
        for seed in map(int, options.seeds.split(",")):
            for chance in range(seed, seed + options.runs):
                yield Task(name, share, seed, chance, options.traces)


def report(done: Sequence[Ran]) -> Iterator[str]:
    """Lines of the table."""
    yield (
        "| workload | seed, chance | calls | to the same host | loads, virtual and HTTP | lost "
        "| figure | virtual, s | HTTP, s | ratio | within |"
    )
    yield "| --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- |"
    for ran in done:
        task, virtual, wired = ran.task, ran.virtual, ran.wired
        beside = (
            f"{task.workload} | {task.seed}, {task.chance} | {virtual['calls']:.0f} | {ran.alike} "
            f"| {virtual['loads']:.1f}, {wired['loads']:.1f} | {wired['lost']:.0f}"
        )
        for figure in TOLD:
            theirs, ours = virtual[figure], wired[figure]
            yield (
                f"| {beside} | {figure.replace('_', ' ')} | {theirs:.3f} | {ours:.3f} "
                f"| {ours / theirs:.2f} | {'met' if is_met(ours, theirs) else 'missed'} |"
            )
            beside = " | | | | |"


def main() -> int:
    """Run the benchmark."""
    options = parse(sys.argv[1:])
    todo = list(tasks(options))
    done = list[Ran]()
    with ProcessPoolExecutor(options.processes) as pool:
        for ran in pool.map(measure, todo):
            done.append(ran)
            task = ran.task
            ratios = ", ".join(f"{ran.wired[name] / ran.virtual[name]:.2f}" for name in TOLD)
            print(
                f"{len(done)}/{len(todo)} {task.workload} {task.seed}/{task.chance}: {ratios} "
                f"({ran.took_s:.0f} s)",
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
