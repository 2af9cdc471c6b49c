"""The file that keeps the operator's switches: written whole, read with patience."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from balancer.core.domain import Backend, Switch
from balancer.core.events import SwitchesLost, SwitchMoved
from balancer.ops.switches import BY, Switches
from tests.core.bench import PoolBench


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where it is kept."""
    return tmp_path / "switches.json"


def begin(file: Path, *backends: Backend | str) -> PoolBench:
    """A balancer starts: reads the file, then learns of its backends."""
    bench = PoolBench()
    switches = Switches(str(file), bench.pool, bench.clock, bench.events.append)

    def emit(event: object) -> None:
        bench.events.append(event)  # type: ignore[arg-type]
        switches(event)  # type: ignore[arg-type]

    bench.pool._emit = emit
    switches.read()
    bench.shape(*(backends or ("a", "b")))
    return bench


def standing(bench: PoolBench) -> dict[str, Switch]:
    return {name: member.switch for name, member in bench.pool.members.items()}


def test_switches_survive_a_restart(file: Path) -> None:
    """Each as it was left; the restart is told as who turned it, and does not write again."""
    first = begin(file)
    first.pool.turn("a", Switch.DRAINING, "ops")
    first.pool.turn("b", Switch.DISABLED, "ops")
    written = file.stat().st_mtime_ns
    second = begin(file)
    assert standing(second) == {"a": Switch.DRAINING, "b": Switch.DISABLED}
    assert [event.by for event in second.of(SwitchMoved)] == [BY, BY]
    assert file.stat().st_mtime_ns == written
    second.pool.turn("a", Switch.SERVING, "ops")
    assert standing(begin(file)) == {"a": Switch.SERVING, "b": Switch.DISABLED}


def test_a_backend_that_comes_back_is_as_it_was_left(file: Path) -> None:
    """Taken out of the configuration and put in again; with another url it is another backend."""
    bench = begin(file)
    bench.pool.turn("a", Switch.DISABLED, "ops")
    bench.shape("b")
    bench.pool.turn("b", Switch.DRAINING, "ops")
    bench.shape("a", "b")
    assert standing(bench) == {"a": Switch.DISABLED, "b": Switch.DRAINING}
    moved = begin(file, Backend("a", "http://elsewhere:11434"), "b")
    assert standing(moved) == {"a": Switch.SERVING, "b": Switch.DRAINING}


def test_the_file_is_for_people_too(file: Path) -> None:
    """Name, url and switch; those that serve are not in it."""
    bench = begin(file)
    bench.pool.turn("a", Switch.DRAINING, "ops")
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "version": 1,
        "switches": [{"name": "a", "url": "http://a:11434", "switch": "draining"}],
    }
    bench.pool.turn("a", Switch.SERVING, "ops")
    assert json.loads(file.read_text(encoding="utf-8"))["switches"] == []
    assert [path.name for path in file.parent.iterdir()] == [file.name], "nothing is left over"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 2, "switches": []}',
        '{"version": 1}',
        '{"version": 1, "switches": [1]}',
        '{"version": 1, "switches": [{"name": "a", "url": 3, "switch": "draining"}]}',
        '{"version": 1, "switches": [{"name": "a", "url": "http://a:11434", "switch": "x"}]}',
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_broken_file_is_told_once_and_ignored(file: Path, text: str) -> None:
    """Everybody serves; the next turn of a switch mends the file."""
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    bench = begin(file)
    (lost,) = bench.of(SwitchesLost)
    assert lost.path == str(file)
    assert lost.error
    assert set(standing(bench).values()) == {Switch.SERVING}
    bench.pool.turn("b", Switch.DRAINING, "ops")
    assert standing(begin(file)) == {"a": Switch.SERVING, "b": Switch.DRAINING}


def test_a_missing_file_is_no_fault(file: Path) -> None:
    """So it is at the first start."""
    assert begin(file).of(SwitchesLost) == []


def test_a_file_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    """The switch is turned all the same, and the operator told."""
    bench = begin(tmp_path / "nowhere" / "switches.json")
    assert bench.pool.turn("a", Switch.DRAINING, "ops")
    (lost,) = bench.of(SwitchesLost)
    assert lost.error == "No such file or directory"
    assert standing(bench)["a"] is Switch.DRAINING


def test_a_crash_while_writing_leaves_the_old_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it or nothing."""
    bench = begin(file)
    bench.pool.turn("a", Switch.DRAINING, "ops")
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    bench.pool.turn("b", Switch.DISABLED, "ops")
    assert file.read_bytes() == before
    assert [event.error for event in bench.of(SwitchesLost)] == ["No space left on device"]
    assert [path.name for path in file.parent.iterdir()] == [file.name]
