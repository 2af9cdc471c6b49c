"""
The scheduler's bench in the virtual world: ``python bench/routing.py``.

Every workload is run with every policy and seed. Figures are medians over seeds. What is not
answered counts as taking until the end of the run. Policies are strategies of the product, or
baselines that bind a call as it arrives, without a queue or slot limit of ours (``push-…``), or a
central queue that waits up to 10 s for a warm host (``central-warm``). A policy may be followed by
knobs: ``plan:horizon_s=300:eviction_weight=0``.
"""

import argparse
import itertools
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Final

import machine
from routing_tables import ratios_table, targets_table, workload_table
from routing_targets import BASELINES

from balancer.core.admission import QueueLimits
from balancer.core.knobs import Knobs
from balancer.sim.figures import figures, medians, prediction_ratios
from balancer.sim.traces import Traces
from balancer.sim.workloads import AFTER_S, Workload, workloads
from balancer.sim.world import World

TRACES: Final = Path(__file__).resolve().parents[2] / "shared" / "traces"
FOREVER_S: Final = 1e9
SEEDS: Final = (1, 2, 3, 4, 5)
POLICIES: Final = ("plan", *BASELINES, "central-warm")
USUAL: Final = tuple(name for name in workloads(Traces()) if not name.startswith("big-"))


@dataclass(frozen=True, slots=True)
class Task:
    """One run."""

    workload: str
    policy: str
    seed: int
    share: float
    traces: str
    knobs: tuple[tuple[str, float], ...]
    slots_known: bool
    queue: int | None


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of it. `ratios`: counts of actual over predicted TTFT. `took_s`: real time."""

    workload: str
    policy: str
    seed: int
    figures: dict[str, float]
    ratios: list[int]
    took_s: float


@cache
def _workloads(traces: str, share: float) -> tuple[Traces, Mapping[str, Workload]]:
    """Read once in each process."""
    found = Traces(Path(traces))
    return found, workloads(found, share)


def run(task: Task) -> Ran:
    """Run one workload with one policy and seed."""
    began = time.monotonic()
    workload = _workloads(task.traces, task.share)[1][task.workload]
    policy, *told = task.policy.split(":")
    knobs = {**dict(task.knobs), **dict(map(_knob, told))}
    jobs, mishaps = workload.cast(task.seed)
    span_s = max(job.at for job in jobs)
    world = World(
        workload.machines,
        workload.models,
        policy=policy,
        seed=task.seed,
        warm=workload.warm,
        slots_known=task.slots_known,
        queue=None if task.queue is None else QueueLimits(task.queue, task.queue, FOREVER_S),
        mishaps=mishaps,
        knobs=_knobs(knobs) if knobs and policy == "plan" else None,
    )
    report = world.run(jobs, until=span_s + AFTER_S)
    return Ran(
        task.workload,
        task.policy,
        task.seed,
        figures(jobs, report, workload.skip_s),
        prediction_ratios(report),
        time.monotonic() - began,
    )


def _knobs(told: Mapping[str, float]) -> Knobs:
    whole = {field.name for field in fields(Knobs) if isinstance(field.default, int)}
    return Knobs(**{name: round(v) if name in whole else v for name, v in told.items()})  # type: ignore[arg-type]


def _knob(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if not value:
        raise argparse.ArgumentTypeError(f"a knob is written name=value, not {text!r}")
    return name, float(value)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench/routing.py",
        description=__doc__,
        epilog=f"workloads: {', '.join(workloads(Traces()))}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workloads", metavar="A,B", default=",".join(USUAL))
    parser.add_argument("--policies", metavar="A,B", default=",".join(POLICIES))
    parser.add_argument("--seeds", metavar="1,2", default=",".join(map(str, SEEDS)))
    parser.add_argument(
        "--calls", metavar="SHARE", type=float, default=1.0, help="of each workload; default: 1"
    )
    parser.add_argument("--traces", metavar="DIR", default=str(TRACES))
    parser.add_argument("--knobs", metavar="NAME=VALUE", nargs="*", type=_knob, default=[])
    parser.add_argument("--slots-known", action="store_true", help="hosts' slots are configured")
    parser.add_argument(
        "--queue", metavar="DEPTH", type=int, help="calls that may wait; default: nearly any number"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--markdown", action="store_true", help="tables for a document")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every run there")
    options = parser.parse_args(argv)
    unknown = set(options.workloads.split(",")) - workloads(Traces()).keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return options


def measure(options: argparse.Namespace) -> list[Ran]:
    """All runs, in no order; an interrupt ends it early, and what was measured counts."""
    tasks = [
        Task(
            *(workload, policy, seed, options.calls, options.traces),
            knobs=tuple(options.knobs),
            slots_known=options.slots_known,
            queue=options.queue,
        )
        for seed, workload, policy in itertools.product(
            map(int, options.seeds.split(",")),
            options.workloads.split(","),
            options.policies.split(","),
        )
    ]
    options.runs = len(tasks)
    done: list[Ran] = []
    with ProcessPoolExecutor(options.processes) as pool:
        waiting = {pool.submit(run, task): task for task in tasks}
        try:
            for future in as_completed(waiting):
                error = future.exception()
                if error is not None:
                    print(f"!!! {waiting[future]}: {error!r}", file=sys.stderr)
                    continue
                done.append(future.result())
                _tell(done[-1], len(done), len(tasks))
        except KeyboardInterrupt:
            print("!!! interrupted: these are not all runs", file=sys.stderr)
            pool.shutdown(cancel_futures=True)
    return done


def _tell(ran: Ran, count: int, of: int) -> None:
    at = ran.figures
    print(
        f"{count}/{of} {ran.workload} {ran.policy} seed {ran.seed}: TTFT p50 {at['ttft_p50']:.3f} "
        f"p99 {at['ttft_p99']:.2f}, {at['loads']:.0f} loads, {at['lost']:.0f} lost "
        f"({ran.took_s:.0f} s)",
        file=sys.stderr,
    )


def gathered(
    done: Sequence[Ran], names: Sequence[str], policies: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Medians over seeds by workload and policy, in the order that was asked for."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, policy in itertools.product(names, policies):
        runs = [ran.figures for ran in done if (ran.workload, ran.policy) == (name, policy)]
        if runs:
            found.setdefault(name, {})[policy] = medians(runs)
    return found


def report(done: Sequence[Ran], options: argparse.Namespace) -> Iterator[str]:
    """Lines of the whole report."""
    known, table = _workloads(options.traces, options.calls)
    names, policies = options.workloads.split(","), options.policies.split(",")
    found = gathered(done, names, policies)
    markdown = options.markdown
    command = shlex.join(["python", "bench/routing.py", *sys.argv[1:]])
    yield f"{time.strftime('%Y-%m-%d')}: {command}"
    yield f"{machine.describe()['processor']}, Python {platform.python_version()}"
    yield f"Seeds {options.seeds}; medians. {options.calls:.0%} of each workload."
    for name in names:
        table[name].jobs(1)  # asks for the traces it is made of
    yield from (f"{name}: {told}" for name, told in known.sources.items())
    for name, by_policy in found.items():
        yield from workload_table(name, table[name].parameters(), by_policy, markdown=markdown)
    counts = {
        f"{name} {policy}": [sum(bins) for bins in zip(*of, strict=True)]
        for name, policy in itertools.product(names, policies)
        if (of := [r.ratios for r in done if (r.workload, r.policy) == (name, policy)])
    }
    yield from ratios_table(counts, markdown=markdown)
    for policy in policies:
        if policy.startswith("plan"):
            yield from targets_table(found, policy, markdown=markdown)


def main() -> int:
    """Run the benchmark."""
    options = parse(sys.argv[1:])
    done = measure(options)
    if options.json is not None:
        runs: list[dict[str, Any]] = [asdict(ran) for ran in done]
        options.json.write_text(json.dumps({"machine": machine.describe(), "runs": runs}, indent=1))
    print("\n".join(report(done, options)))
    return 0 if len(done) == options.runs else 1


if __name__ == "__main__":
    sys.exit(main())
