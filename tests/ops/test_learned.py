"""The file that keeps what was learned: written when there is news, read with suspicion."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from balancer.core.events import Event, LearnedLost
from balancer.ops import learned as module
from balancer.ops.learned import EVERY_S, OLDEST_S, Learned, beside
from tests.core.clocks import ManualClock
from tests.e2e.stage import virtual

NOW = 1_800_000_000.0
TOLD: dict[str, Any] = {
    "speeds": {"a": {"prompt_rate": 900.0}, "b": {"prompt_rate": 90.0}},
    "ratios": {"registry.ollama.ai/library/m:1": 1.5},
    "note": "x",
}


class Learner:
    """Learns what the test says."""

    def __init__(self, known: dict[str, Any] | None = None) -> None:
        self.known = known or {}
        self.recalled: list[tuple[Mapping[str, Any], float]] = []
        self.refuses: Exception | None = None

    def learned(self) -> dict[str, Any]:
        return self.known

    def recall(self, learned: Mapping[str, Any], age_s: float) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.recalled.append((learned, age_s))


class Bench:
    """A balancer with a learner and backends a and b."""

    def __init__(self, file: Path, known: dict[str, Any] | None = None, at: float = NOW) -> None:
        self.file = file
        self.learner = Learner(known)
        self.urls = {"a": "http://a:1", "b": "http://b:1"}
        self.events: list[Event] = []
        self.at = at
        self.learned = Learned(
            file, self.learner, lambda: self.urls, ManualClock(), self.wall, self.events.append
        )

    def wall(self) -> float:
        return self.at

    @property
    def faults(self) -> list[str]:
        """What was told of the file."""
        assert all(isinstance(event, LearnedLost) for event in self.events)
        return [event.error for event in self.events if isinstance(event, LearnedLost)]


def written(file: Path) -> Any:
    """What it holds of what was learned; None: there is no file."""
    return json.loads(file.read_text(encoding="utf-8"))["learned"] if file.exists() else None


def remove(file: Path) -> None:
    file.unlink()


def make(directory: Path) -> None:
    directory.mkdir()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where it is kept."""
    return tmp_path / "state.learned.json"


@pytest.mark.parametrize(
    ("path", "name"), [("/s/state.json", "state.learned.json"), ("/s/state", "state.learned")]
)
def test_it_stands_beside_the_switches(path: str, name: str) -> None:
    """In the same directory, under a name of its own."""
    assert beside(path) == Path("/s") / name


async def test_what_was_learned_survives_a_restart(file: Path) -> None:
    """With its age."""
    first = Bench(file, TOLD)
    await first.learned.save()
    second = Bench(file, at=NOW + 3600)
    second.learned.read()
    assert second.learner.recalled == [(TOLD, 3600.0)]
    assert first.faults == second.faults == []


async def test_another_url_is_another_backend(file: Path) -> None:
    """What stands under its name is left out in each part; a backend not found yet keeps it."""
    first = Bench(file, TOLD)
    await first.learned.save()
    second = Bench(file)
    second.urls = {"a": "http://elsewhere:1"}
    second.learned.read()
    ((kept, _),) = second.learner.recalled
    assert kept == TOLD | {"speeds": {"b": {"prompt_rate": 90.0}}}


async def test_it_is_written_only_when_there_is_news(file: Path) -> None:
    """Not without anything to tell, not twice the same, not what was just read."""
    bench = Bench(file)
    await bench.learned.save()
    assert written(file) is None
    bench.learner.known = TOLD
    await bench.learned.save()
    remove(file)
    await bench.learned.save()
    assert written(file) is None
    bench.learner.known = TOLD | {"note": "y"}
    await bench.learned.save()
    second = Bench(file, TOLD | {"note": "y"})
    second.learned.read()
    remove(file)
    await second.learned.save()
    assert written(file) is None


def whole(**changed: Any) -> str:
    """A good file, but for that."""
    document = {"version": 1, "at": NOW, "backends": {}, "learned": {}} | changed
    return json.dumps({key: value for key, value in document.items() if value is not None})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "Expecting value"),
        ("{", "Expecting"),
        ("[]", "not a file of version 1"),
        (whole(version=2, at=1), "not a file of version 1"),
        (whole(at=None), "something is missing"),
        (whole(at="now"), "something is missing"),
        (whole(learned=[1]), "something is missing"),
        (whole(backends=None), "something is missing"),
        (whole(learned={"x": float("nan")}, at=int(NOW)), "NaN is no number"),
        (whole(at=int(NOW - OLDEST_S - 43_000)), "is 7 days old: what it says may not be true"),
        (whole(at=int(NOW - 9 * 86400)), "is 9 days old"),
        (whole(at=10**400), "too large"),
        (whole(at=-(10**400)), "too large"),
        ("[" * 100_000, ""),
        ("\udcff", ""),
    ],
)
def test_a_file_that_cannot_be_used_is_told_once(file: Path, text: str, told: str) -> None:
    """And counts as none; the balancer goes on."""
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    bench = Bench(file)
    bench.learned.read()
    (fault,) = bench.faults
    assert told in fault
    assert bench.learner.recalled == []


def test_a_missing_file_is_no_fault(file: Path) -> None:
    """So it is at the first start."""
    bench = Bench(file)
    bench.learned.read()
    assert bench.faults == []


def test_a_clock_that_was_set_back_makes_nothing_older(file: Path) -> None:
    """As after a start without a clock of its own: then its age is not known."""
    file.write_text(whole(at=int(NOW)), encoding="utf-8")
    bench = Bench(file, at=0.0)
    bench.learned.read()
    assert bench.learner.recalled == [({}, 0.0)]


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("no"), ValueError("no"), OverflowError()]
)
async def test_what_the_learner_cannot_bear_is_told(file: Path, error: Exception) -> None:
    """No file keeps a balancer from starting; the next save mends it."""
    await Bench(file, TOLD).learned.save()
    bench = Bench(file, TOLD)
    bench.learner.refuses = error
    bench.learned.read()
    (fault,) = bench.faults
    assert fault.startswith("holds what cannot be: ")
    remove(file)
    await bench.learned.save()
    assert written(file) == TOLD


@pytest.mark.parametrize("bad", [float("inf"), {1, 2}])
async def test_a_file_that_cannot_be_written_is_told_once(tmp_path: Path, bad: Any) -> None:
    """Until it can be again; then anew. What is no JSON is not written either."""
    home = tmp_path / "home"
    bench = Bench(home / "state.json", {"n": 1})
    for _ in range(2):
        await bench.learned.save()
    assert bench.faults == ["No such file or directory"]
    make(home)
    await bench.learned.save()
    assert len(bench.faults) == 1
    bench.learner.known = {"n": bad}
    await bench.learned.save()
    assert len(bench.faults) == 2
    assert written(bench.file) == {"n": 1}


async def test_a_save_that_is_given_up_is_waited_for(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the stop the last one must not write into the middle of it."""
    bench = Bench(file, {"n": 1})
    going, go_on, order = threading.Event(), threading.Event(), []
    write = module._write

    def slowly(path: Path, learned: dict[str, Any], *rest: Any) -> str:
        if learned == {"n": 1}:
            going.set()
            go_on.wait(10)
        order.append(learned["n"])
        return write(path, learned, *rest)

    monkeypatch.setattr(module, "_write", slowly)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(bench.learned.save())
        await asyncio.to_thread(going.wait, 10)
        first.cancel()
        await asyncio.wait([first])
        bench.learner.known = {"n": 2}
        last = group.create_task(bench.learned.save())
        await asyncio.sleep(0)
        go_on.set()
        await last
    assert order == [1, 2]
    assert written(file) == {"n": 2}


@virtual
async def test_it_is_written_now_and_then(tmp_path: Path) -> None:
    """Every minute, in the background."""
    bench = Bench(tmp_path / "state.json", {"n": 1})
    async with asyncio.TaskGroup() as group:
        running = group.create_task(bench.learned.run())
        await asyncio.sleep(EVERY_S - 1.0)
        assert written(bench.file) is None
        await asyncio.sleep(2.0)
        assert written(bench.file) == {"n": 1}
        running.cancel()
