"""What people read, made from the status document of a real balancer."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.cli import screen
from tests.conftest import Start
from tests.rig import Rig


def document(rig: Rig) -> dict[str, Any]:
    """Its status document."""
    return rig.balancer.admin.state()


def test_columns_are_as_wide_as_need_be() -> None:
    """And nothing trails."""
    assert screen.table([("A", "B"), ("long", "x")]) == ["  A     B", "  long  x"]
    assert screen.table([("A", "B"), ("long", "x")], "", most=3) == ["A  B", "long  x"]


def test_backends_cannot_steer_the_terminal() -> None:
    """An escape sequence in an error text is shown, not obeyed."""
    assert screen.plain("a\x1b[2Jb\nc") == "a?[2Jb?c"


@pytest.mark.parametrize(("seconds", "told"), [(7.2, "7 s"), (90, "2 min"), (9000, "2.5 h")])
def test_spans_are_rounded(seconds: float, told: str) -> None:
    """Nobody reads milliseconds here."""
    assert screen.span(seconds) == told


async def test_status_of_a_fleet(start: Start) -> None:
    """State, breaker, models and what is loaded are each told; it is healthy."""
    rig = await start(2)
    await rig.warm("a", "llama3.2")
    doc = document(rig)
    lines = screen.status(doc)
    assert ": ready, 0 running, 0 queued" in lines[0]
    row = next(line.split() for line in lines if line.strip().startswith("a "))
    assert row[2:5] == ["up", "closed", "0.33.0"]
    assert row[-1] == "llama3.2:latest"
    assert screen.is_healthy(doc)


async def test_the_backends_list_tells_of_tiers(start: Start) -> None:
    """Where there are any; an older balancer knows of none."""
    rig = await start(2)
    doc = document(rig)
    assert "PRIORITY" not in screen.listing(doc)[0]
    doc["backends"][1]["priority"] = 50
    head, *rows = (line.split() for line in screen.listing(doc))
    assert [row[head.index("PRIORITY")] for row in rows] == ["100", "50"]
    for backend in doc["backends"]:
        del backend["priority"]
    assert "PRIORITY" not in screen.listing(doc)[0]


async def test_status_tells_of_models_that_differ(start: Start) -> None:
    """The name, each digest, and who has it; below everything else."""
    rig = await start(2)
    doc = document(rig) | {"conflicts": {"m:latest": {"a" * 64: ["x"], "b" * 64: ["y", "z"]}}}
    told = "! m:latest: not the same model everywhere (aaaaaaaaaaaa on x; bbbbbbbbbbbb on y, z)"
    assert screen.status(doc)[-2:] == ["", told]


async def test_status_tells_what_is_wrong_with_a_backend(start: Start) -> None:
    """A backend that is down is named with its error below the table."""
    rig = await start(1, dead=["gone"])
    lines = screen.status(document(rig))
    assert any(line.startswith("! gone: cannot connect") for line in lines)
    assert screen.is_healthy(document(rig))


async def test_nobody_healthy(start: Start) -> None:
    """One dead backend is no healthy fleet."""
    rig = await start(0, dead=["gone"])
    assert not screen.is_healthy(document(rig))
    assert "not ready" in screen.status(document(rig))[0]


def happened(event: str, **more: object) -> dict[str, object]:
    """A row of what happened lately."""
    row = {"at": 0.0, "event": event, "backend": "a", "model": "", "text": "refused", "count": 1}
    return row | more


async def test_status_ends_with_the_last_troubles(start: Start) -> None:
    """A few of them, newest first; what is no trouble is not among them."""
    rig = await start(1)
    assert not any("LATELY" in line for line in screen.status(document(rig)))
    rows = [happened("backend_up"), happened("failover", count=3, model="m", text="after\x1b[0m")]
    rows += [happened("backend_down")] * 9
    lines = screen.status(document(rig) | {"recent": rows})
    at = next(i for i, line in enumerate(lines) if "LATELY" in line)
    assert len(lines) == at + 1 + screen.LATELY
    assert lines[at + 1].split()[3:] == ["a", "failover", "m", "after?[0m", "(3", "times)"]
    assert lines[at + 2].split()[3:] == ["a", "backend", "down", "refused"]


async def test_a_rejected_reload_and_an_empty_fleet_are_told(start: Start) -> None:
    """Both are what an operator looks for."""
    rig = await start(0)
    rig.balancer.reload.rejected = ("config.yaml:3:1 backnds: unknown key.",)
    lines = screen.status(document(rig))
    assert "! reload rejected: config.yaml:3:1 backnds: unknown key." in lines
    assert "No backends." in lines[-1]


def test_versions_that_differ_are_told() -> None:
    """Clients switch features by the version, so the operator should know."""
    doc = {"backends": [{"name": "a", "version": "0.33.0"}, {"name": "b", "version": "0.34.2"}]}
    (line,) = screen.skew(doc, "0.33.0")
    assert "a runs 0.33.0, b runs 0.34.2: clients are told 0.33.0" in line
    assert screen.skew({"backends": doc["backends"][:1]}, "0.33.0") == []
