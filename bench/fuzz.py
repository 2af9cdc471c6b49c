"""
Random inputs for whatever parses bytes, for so many seconds each.

    python -m bench.fuzz [--seconds 60] [--seed 1] [--only TARGET ...]
    python -m bench.fuzz --only TARGET --case CASE --input FILE    the one that failed, again

The same seed gives the same inputs in the same order, however many there is time for. On a finding
its case and the input, made as small as may be, are printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import itertools
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.fuzzing import answers, body, chance, corpus, framing, heads, multipart, requests

LONGEST_S = 20.0  # of processor time for one input: more would be a hang
TRACED = 50  # of so many inputs one has its memory measured,
MOST_MEMORY = 8 << 20  # bytes for any input,
MOST_PER_BYTE = 300  # and for each byte of it: all of a check's runs together
SHOWN = 600  # bytes of an input that are printed


class Target(Protocol):
    """What is tried."""

    def make(self, rng: random.Random) -> bytes:
        """An input."""

    def check(self, data: bytes, rng: random.Random) -> None:
        """Raise if what it promises does not hold; *rng* is the same for the same case."""


TARGETS: dict[str, Target] = {
    "body": body,
    "framing": framing,
    "multipart": multipart,
    "heads": heads,
    "answers": answers,
    "requests": requests,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """
    An input that failed.

    Args:
        case: Which it was; seeds all that was random in the check.
        data: It, made small.
        size: As large it was made.
        told: The traceback.
    """

    case: str
    data: bytes
    size: int
    told: str


class TooLongError(Exception):
    """One input took more time than any should."""


class TooMuchError(Exception):
    """One input took more memory than it may."""


def _check(target: Target, case: str, data: bytes, *, traced: bool = False) -> None:
    with _limited():
        if traced:
            tracemalloc.start()
        try:
            target.check(data, random.Random(f"{case} check"))
            if traced and tracemalloc.get_traced_memory()[1] > _most(len(data)):
                raise TooMuchError(f"{tracemalloc.get_traced_memory()[1]:,} bytes")
        finally:
            tracemalloc.stop()


def _most(size: int) -> int:
    return MOST_MEMORY + MOST_PER_BYTE * size


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLongError(f"more than {LONGEST_S:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


def failure(target: Target, case: str, data: bytes, *, traced: bool = False) -> Exception | None:
    """What the target does not keep of its promises with this input."""
    try:
        _check(target, case, data, traced=traced)
    except Exception as error:  # noqa: BLE001 - whatever escapes is a finding
        return error
    return None


def find(
    name: str, target: Target, seed: str, more: Callable[[int], bool]
) -> tuple[int, Finding | None]:
    """Try inputs as long as there should be *more*; how many, and the first that failed."""
    for n in itertools.count():
        if not more(n):
            return n, None
        case = f"{seed}/{name}/{n}"
        data = target.make(random.Random(case))
        traced = n % TRACED == TRACED - 1
        error = failure(target, case, data, traced=traced)
        if error is not None:
            return n + 1, _found(target, case, data, error, traced=traced)
    raise AssertionError


def _found(target: Target, case: str, data: bytes, error: Exception, *, traced: bool) -> Finding:
    kind, tries = type(error), 10 if isinstance(error, TooLongError) else 3000

    def fails(shorter: bytes) -> bool:
        return isinstance(failure(target, case, shorter, traced=traced), kind)

    small = chance.smaller(data, fails, tries)
    error = failure(target, case, small, traced=traced) or error
    return Finding(case, small, len(data), "".join(traceback.format_exception(error)))


def _tell(name: str, finding: Finding) -> None:
    with tempfile.NamedTemporaryFile(prefix=f"fuzz-{name}-", delete=False) as file:
        file.write(finding.data)
    print(finding.told)
    print(f"{name}: {len(finding.data)} bytes, made small from {finding.size}:")
    print(f"  {finding.data[:SHOWN]!r}{'...' if len(finding.data) > SHOWN else ''}")
    again = f"--only {name} --case {finding.case} --input {file.name}"
    print(f"again: python -m bench.fuzz {again}", flush=True)


def _run(name: str, seed: str, seconds: float) -> bool:
    """Whether nothing was found."""
    began = time.monotonic()
    count, finding = find(name, TARGETS[name], seed, lambda _: time.monotonic() < began + seconds)
    passed_s = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{name:10}{count:10,} inputs {passed_s:6.0f} s {count / passed_s:8,.0f}/s {peak:6} MiB")
    sys.stdout.flush()
    if finding is not None:
        _tell(name, finding)
    return finding is None


def main() -> int:
    """Run what was asked for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--case", help="of a finding")
    parser.add_argument("--input", type=Path, help="the file with a finding's input")
    asked = parser.parse_args()
    if not corpus.recordings():
        print(corpus.ABSENT)
    if asked.input is not None:
        error = failure(TARGETS[asked.only[0]], asked.case or "", asked.input.read_bytes())
        print("nothing found" if error is None else "".join(traceback.format_exception(error)))
        return error is not None
    good = [_run(name, asked.seed, asked.seconds) for name in asked.only]
    return not all(good)


if __name__ == "__main__":
    sys.exit(main())
