"""
Many streams for a long time: whether memory grows, and what was the longest pause.

    python bench/soak.py [--minutes 10] [--streams 1000]

Prints the balancer's memory each half minute, and the slope of its second half; the exit code is 1
if a stream was lost.
"""

import argparse
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import machine
import peers
from measuring import Load
from rig import Rig, ask

SAMPLE_S = 30.0
TOKEN = secrets.token_hex(16)
TOLD = ("ollama_balancer_gc_", "ollama_balancer_event_loop_lag", "process_resident_memory_bytes")


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The rise of the line that fits best."""
    x = sum(at for at, _ in points) / len(points)
    y = sum(value for _, value in points) / len(points)
    spread = sum((at - x) ** 2 for at, _ in points)
    return sum((at - x) * (value - y) for at, value in points) / spread if spread else 0.0


def soak(minutes: float, streams: int, directory: Path) -> int:
    """Run it; the number of errors."""
    rig = Rig(directory, TOKEN)
    try:
        running = rig.proxy("ours")
        options = ("--mode", "streams", "--conns", str(streams), "--interval-us", "100000")
        seconds = minutes * 60.0
        load = Load(rig, running, options, seconds, warm_up_s=5.0)
        load.wait(15.0)
        began = time.monotonic()
        points: list[tuple[float, float]] = []
        while (passed_s := time.monotonic() - began) < seconds - 20.0:
            points.append((passed_s / 60.0, machine.pss_kib(running.pid)))
            print(f"{points[-1][0]:6.1f} min  {points[-1][1] / 1024:8.1f} MiB", flush=True)
            load.wait(SAMPLE_S)
        told = ask(running.port, "/metrics").decode()
        found = load.result()
        late = points[len(points) // 2 :]
        print(f"slope of the second half: {slope(late):+.1f} KiB/min")
        print(f"chunks {found.get('chunks', 0):,}, of {found.get('expected_chunks', 0):,} expected")
        print(f"delay {found.get('delay_us')}")
        print(f"errors {found['errors'] or 'none'}")
        for line in told.splitlines():
            if line.startswith(TOLD):
                print(line)
        return sum(found["errors"].values())
    finally:
        rig.stop()


def main() -> int:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=1000)
    asked = parser.parse_args()
    peers.build(["ours"])
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        return 1 if soak(asked.minutes, asked.streams, Path(directory)) else 0


if __name__ == "__main__":
    sys.exit(main())
