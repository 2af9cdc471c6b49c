"""
What the scheduler has learned in a small file, so that it survives a restart.

It stands beside that of the operator's switches and may be lost without harm: it is learned anew.
What was learned of a backend belongs to its name and url: another url is another backend.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

from balancer.core.events import Emit, LearnedLost
from balancer.ops.files import reason, replace

VERSION: Final = 1
LIMIT_BYTES: Final = 16 * 1024 * 1024
EVERY_S: Final = 60.0
OLDEST_S: Final = 7 * 86400.0

Urls = Callable[[], Mapping[str, str]]


class Learner(Protocol):
    """Who learns."""

    def learned(self) -> dict[str, Any]:
        """What it has learned, as plain JSON that nothing changes any more."""

    def recall(self, learned: Mapping[str, Any], age_s: float) -> None:
        """Take it over."""


def beside(path: str) -> Path:
    """Where it is kept, by the path of the switches: ``state.json``, ``state.learned.json``."""
    switches = Path(path)
    return switches.with_name(f"{switches.stem}.learned{switches.suffix}")


class Learned:
    """
    Writes the file from time to time, if there is anything new, and gives back what was in it.

    A file that cannot be used is told and counts as none; one that cannot be written is told once,
    until it can be again.

    Args:
        path: Its directory must exist.
        urls: Of the backends there are, by name.
        wall: Unix seconds, for the age of what was learned.
    """

    def __init__(
        self,
        path: Path,
        learner: Learner,
        urls: Urls,
        clock: Callable[[], float],
        wall: Callable[[], float],
        emit: Emit,
    ) -> None:
        self._path = path
        self._learner = learner
        self._urls = urls
        self._clock = clock
        self._wall = wall
        self._emit = emit
        self._kept: dict[str, Any] = {}  # in the file
        self._writing: asyncio.Future[str] | None = None
        self._fault = ""

    def read(self) -> None:
        """Give the learner what the file holds; a missing one is no fault."""
        try:
            with self._path.open("rb") as file:
                kept, urls, age_s = _parse(file.read(LIMIT_BYTES), self._wall())
        except FileNotFoundError:
            return
        except (OSError, ArithmeticError, ValueError, RecursionError) as error:
            self._lost(reason(error))
            return
        now = self._urls()
        others = {name for name, url in urls.items() if now.get(name, url) != url}
        try:
            self._learner.recall(_without(kept, others), age_s)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            self._lost(f"holds what cannot be: {reason(error)}")
        else:
            self._kept = kept

    async def run(self) -> None:
        """Write it now and then, until cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            await self.save()

    async def save(self) -> None:
        """Write what is new, in a thread: a disk may take its time."""
        if self._writing is not None and not self._writing.done():  # of a save that was cancelled
            await asyncio.wait([self._writing])
        learned = self._learner.learned()
        if not learned or learned == self._kept:
            return
        urls, at = dict(self._urls()), self._wall()
        loop = asyncio.get_running_loop()
        self._writing = loop.run_in_executor(None, _write, self._path, learned, urls, at)
        fault = await asyncio.shield(self._writing)
        if not fault:
            self._kept = learned
        elif fault != self._fault:
            self._lost(fault)
        self._fault = fault

    def _lost(self, fault: str) -> None:
        self._emit(LearnedLost(self._clock(), str(self._path), fault))


def _write(path: Path, learned: dict[str, Any], urls: dict[str, str], at: float) -> str:
    """What went wrong; empty: nothing."""
    document = {"version": VERSION, "at": round(at), "backends": urls, "learned": learned}
    try:
        replace(path, (json.dumps(document, allow_nan=False) + "\n").encode())
    except (OSError, TypeError, ValueError) as error:
        return reason(error)
    return ""


def _parse(text: bytes, now: float) -> tuple[dict[str, Any], dict[str, str], float]:
    """
    What was learned, of which urls, and how long ago.

    Raises:
        ValueError: It is not what we write, of another version, or too old to be true still.
    """
    document = json.loads(text, parse_constant=_refuse)
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise ValueError(f"not a file of version {VERSION}")
    learned, urls, at = (document.get(key) for key in ("learned", "backends", "at"))
    if not (isinstance(learned, dict) and isinstance(urls, dict) and isinstance(at, int)):
        raise ValueError("something is missing")  # noqa: TRY004 - one kind of fault for all
    age_s = max(0.0, now - at)  # a clock that was set back tells nothing
    if age_s > OLDEST_S:
        raise ValueError(f"is {age_s / 86400:.0f} days old: what it says may not be true any more")
    return learned, urls, age_s


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _without(learned: Mapping[str, Any], backends: set[str]) -> dict[str, Any]:
    """The same without what stands under the names of some backends, in whatever part."""
    return {
        part: {name: value for name, value in told.items() if name not in backends}
        if isinstance(told, dict)
        else told
        for part, told in learned.items()
    }
