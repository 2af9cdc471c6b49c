"""What a benchmark asks of Linux: cores, priorities, process trees, memory, versions."""

import os
import platform
import resource
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PRIORITY = 10
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Cores:
    """The core of each party; on two cores origin and generator share one."""

    proxy: int
    origin: int
    load: int

    @classmethod
    def of_machine(cls) -> "Cores":
        """Those we may use, the proxy's first."""
        usable = sorted(os.sched_getaffinity(0))
        return cls(usable[0], usable[1 % len(usable)], usable[2 if len(usable) > 2 else -1])


def pinned(core: int, argv: Sequence[str]) -> list[str]:
    """Wrap a command: on that core alone, and ended if we are."""
    return ["taskset", "-c", str(core), "setpriv", "--pdeathsig", "TERM", *argv]


def lift_file_limit() -> int:
    """Let us, and so all parties, open as many files as permitted; how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        for path in (PROC / str(parent) / "task").glob("*/children"):
            found += [int(word) for word in _read(path).split()]
    return found


def pss_kib(pid: int) -> int:
    """Memory of a process and its descendants, shared pages counted once."""
    total = 0
    for each in family(pid):
        for line in _read(PROC / str(each) / "smaps_rollup").splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total


def set_priority(pids: Iterable[int], *, realtime: bool) -> None:
    """
    Put processes, with descendants and threads, under SCHED_FIFO or back under SCHED_OTHER.

    Raises:
        PermissionError: We may not.
    """
    policy = os.SCHED_FIFO if realtime else os.SCHED_OTHER
    for pid in pids:
        for each in family(pid):
            for thread in (PROC / str(each) / "task").glob("*"):
                try:
                    param = os.sched_param(PRIORITY if realtime else 0)
                    os.sched_setscheduler(int(thread.name), policy, param)
                except ProcessLookupError:
                    continue  # a thread that has just ended


def may_realtime() -> bool:
    """Whether we may run programs under real-time priority."""
    command = ["chrt", "--fifo", str(PRIORITY), "true"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def describe() -> dict[str, str]:
    """Processor, cores, memory, kernel, and how busy it is with other things."""
    models = [
        line.partition(":")[2].strip()
        for line in _read(PROC / "cpuinfo").splitlines()
        if line.startswith("model name")
    ]
    memory_kib = int(_read(PROC / "meminfo").split()[1])
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory_kib / 1024**2:.0f} GiB",
        "kernel": platform.release(),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def version(*argv: str) -> str:
    """First line of what a program says of itself, or "" where it is missing."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=20)
    except FileNotFoundError:
        return ""
    said = (done.stdout + done.stderr).strip().splitlines()
    return said[0] if said else ""


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ProcessLookupError):
        return ""  # it has just ended
