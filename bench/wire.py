"""
The data plane benchmark: what we cost and add, beside other proxies: ``python bench/wire.py``.

Per core-second is per second of CPU time of the proxy and its descendants, so that a busy machine
spoils it little; what is *added* is minus the same without a proxy, in the same round. Rounds are
interleaved, and proxies shuffled in each. Any error makes the exit code 1.
"""

import argparse
import json
import os
import platform
import random
import secrets
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import machine
import peers
import profiling
from figures import Results
from measuring import Meter, Sample
from peers import PEERS, USUAL, Missing
from rig import Died, Rig
from scenarios import SCENARIOS, Group, Scenario
from tables import group_table, number, short_table
from targets import targets_table

SECONDS = 3.0
ROUNDS = 5


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    known = "\n".join(f"  {s.name:<12} {s.about}" for s in SCENARIOS.values())
    others = "\n".join(f"  {p.name:<14} {p.about}" for p in PEERS.values())
    parser = argparse.ArgumentParser(
        prog="bench/wire.py",
        description=__doc__,
        epilog=f"scenarios:\n{known}\n\nproxies:\n  {'direct':<14} none\n{others}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    scenarios = _listed("scenario", SCENARIOS)
    parser.add_argument("--only", metavar="A,B", type=scenarios, default=list(SCENARIOS))
    proxies = _listed("proxy", ("direct", *PEERS))
    parser.add_argument("--proxies", metavar="A,B", type=proxies, default=list(USUAL))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"of a measurement; default: {SECONDS:g}"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the order of the proxies")
    parser.add_argument(
        "--realtime",
        action="store_true",
        help="all scenarios under SCHED_FIFO, not delay alone: less noise, other figures",
    )
    parser.add_argument(
        "--before",
        metavar="DIR",
        type=Path,
        help="measure the balancer of that source tree, too: git archive COMMIT | tar xC DIR",
    )
    parser.add_argument("--markdown", action="store_true", help="tables for a document")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every sample there")
    parser.add_argument(
        "--profile",
        metavar="SCENARIO",
        choices=SCENARIOS,
        help="instead: run ours under cProfile, and tell where its time goes",
    )
    return parser.parse_args(argv)


def _listed(kind: str, known: Collection[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {kind} {name!r}: {', '.join(known)}")
        return names

    return read


def available(names: Sequence[str]) -> list[str]:
    """
    Those proxies that can take part; the others are told.

    Raises:
        Missing: nginx, and CI=true.
    """
    found = []
    for name in names:
        lacks = PEERS[name].lacks() if name in PEERS else ""
        if not lacks:
            found.append(name)
            continue
        if name == "nginx" and os.environ.get("CI") == "true":
            raise Missing(f"nginx is needed with CI=true: {lacks}")
        print(f"!!! {name} is left out: {lacks}", file=sys.stderr)
    return found


def facts(names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Date, machine, versions and command."""
    said = {name: PEERS[name].version() for name in names if name in PEERS}
    versions = {name: text for name, text in said.items() if text}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "command": shlex.join(["python", "bench/wire.py", *sys.argv[1:]]),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "machine": machine.describe(),
        "versions": {"python": f"Python {platform.python_version()}", **versions},
    }


def schedule(options: argparse.Namespace, names: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Rounds, scenarios and proxies in the order of measuring."""
    chance = random.Random(options.seed)
    for turn in range(1, options.rounds + 1):
        for scenario in options.only:
            if turn <= SCENARIOS[scenario].rounds:
                order = [n for n in names if n != "direct" or not SCENARIOS[scenario].conns]
                chance.shuffle(order)
                for name in order:
                    yield turn, scenario, name


def measure(rig: Rig, options: argparse.Namespace, names: Sequence[str]) -> list[Sample]:
    """Measure all; an interrupt ends it early, and what was measured counts."""
    wanted = {s.name: options.realtime or s.realtime for s in SCENARIOS.values()}
    if any(wanted[name] for name in options.only) and not machine.may_realtime():
        print("!!! real-time priority is not permitted: normal priority", file=sys.stderr)
        wanted = dict.fromkeys(wanted, False)
    meter = Meter(rig, options.seconds, realtime=wanted)
    samples: list[Sample] = []
    plan = list(schedule(options, names))
    try:
        for turn, scenario, name in plan:
            samples.append(meter.measure(SCENARIOS[scenario], name, turn))
            _tell(samples[-1], len(samples), len(plan))
    except KeyboardInterrupt:
        print("!!! interrupted: these are not all rounds", file=sys.stderr)
    return samples


_TOLD: Mapping[Group, Mapping[str, str]] = {
    Group.CALLS: {"per_core_s": "/core-s"},
    Group.STREAMS: {"per_core_s": "chunks/core-s", "delay_p99_us": "µs delay p99"},
    Group.TTFB: {"ttfb_p50_us": "µs TTFB p50", "ttfb_p99_us": "p99"},
    Group.DELAY: {"delay_p50_us": "µs delay p50", "delay_p99_us": "p99"},
    Group.ABORTS: {"abort_p50_ms": "ms to the origin p50", "abort_p99_ms": "p99"},
    Group.MEMORY: {"stream_kib": "KiB per stream"},
}


def _tell(sample: Sample, count: int, of: int) -> None:
    told = [
        f"{number(sample.figures[figure])} {unit}"
        for figure, unit in _TOLD[SCENARIOS[sample.scenario].group].items()
        if figure in sample.figures
    ]
    place = f"{count}/{of} round {sample.round} {sample.scenario} {sample.peer}"
    print(f"{place}: {', '.join(told)}", file=sys.stderr)
    for kind, times in sample.errors.items():
        print(f"!!! {place}: {times} × {kind}", file=sys.stderr)


def report(
    samples: Sequence[Sample], told: dict[str, Any], names: Sequence[str], *, markdown: bool
) -> Iterator[str]:
    """Lines of the whole report."""
    results = Results(samples)
    yield f"{told['date']}: {told['command']}"
    yield ", ".join(f"{name} {text}" for name, text in told["machine"].items())
    yield "; ".join(told["versions"].values())
    yield f"{told['rounds']} rounds of {told['seconds']:g} s; medians."
    if not all(s.realtime for s in samples if SCENARIOS[s.scenario].realtime):
        yield "Real-time priority was not permitted: delays are the machine's more than a proxy's."
    yield from short_table(results, names, markdown=markdown)
    for group in Group:
        yield from group_table(group, results, names, markdown=markdown)
    yield from targets_table(results, markdown=markdown)
    errors = [(s, kind, count) for s in samples for kind, count in s.errors.items()]
    if errors:
        yield from ("", f"!!! ERRORS in {len(errors)} measurements:")
        for s, kind, count in errors:
            yield f"  round {s.round}, {s.scenario}, {s.peer}: {count} × {kind}"


def run(options: argparse.Namespace, directory: Path) -> int:
    """Build, measure and report; an exit code."""
    if options.before is not None:
        peers.know_before(options.before)
        options.proxies.append("before")
    names = available(options.proxies)
    peers.build(names)
    told = facts(names, options)
    rig = Rig(directory, secrets.token_hex(16))
    try:
        if options.profile:
            scenario: Scenario = SCENARIOS[options.profile]
            print(profiling.profile(rig, scenario, options.seconds))
            return 0
        samples = measure(rig, options, names)
    finally:
        rig.stop()
    if options.json is not None:
        document = {**told, "samples": [sample.as_json() for sample in samples]}
        options.json.write_text(json.dumps(document, indent=1))
    print("\n".join(report(samples, told, names, markdown=options.markdown)))
    return 1 if any(sample.errors for sample in samples) else 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the benchmark."""
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, _interrupt)  # processes of ours end with us
    machine.lift_file_limit()
    with tempfile.TemporaryDirectory(prefix="bench-wire-") as directory:
        try:
            return run(options, Path(directory))
        except (Missing, Died) as error:
            print(f"!!! {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
