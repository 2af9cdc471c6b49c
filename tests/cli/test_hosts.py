"""`backends …`: what it asks, what it says of each answer, and with which exit code."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from balancer.cli import hosts
from balancer.cli.exits import ExitCode
from tests.conftest import Start

from .conftest import Command, Spawn
from .stub import serving
from .test_inspect import document


def backend(**more: Any) -> dict[str, Any]:
    """One backend of a status document, as the answers have it."""
    told: dict[str, Any] = {"switch": "serving", "source": "line 3", **more}
    return dict(document(**told)["backends"][0])


def answer(action: str, **more: Any) -> tuple[int, object]:
    """A good answer."""
    fields = {name: more.pop(name) for name in ("changed", "check", "note") if name in more}
    told: dict[str, Any] = {"action": action, "changed": True, "backend": backend(**more)}
    return 200, told | fields


@pytest.mark.parametrize(
    ("action", "more", "words"),
    [
        ("drain", {"state": "draining", "in_flight": 2}, "gpu1: draining, 2 running\n"),
        ("resume", {"in_flight": 0}, "gpu1: up, 0 running\n"),
        ("disable", {"state": "disabled"}, "gpu1: disabled, 1 running\n"),
        (
            "resume",
            {"state": "disabled", "note": "the configuration has it off"},
            "gpu1: disabled, 1 running (the configuration has it off)\n",
        ),
        ("reset", {"changed": False}, "gpu1: up, 1 running (nothing has changed)\n"),
    ],
)
def test_what_it_says(command: Command, action: str, more: dict[str, Any], words: str) -> None:
    """One line for each backend, with the state it is in now."""
    path = f"/_balancer/backends/gpu1/{action}"
    with serving({path: answer(action, **more)}) as stub:
        told = command("backends", action, "gpu1", "--admin", f"127.0.0.1:{stub.port}")
        alias = command("hosts", action, "gpu1", "--admin", f"127.0.0.1:{stub.port}")
    assert (told.exit_code, told.stdout) == (ExitCode.OK, words)
    assert alias.stdout == told.stdout
    assert [(method, asked) for method, asked, _ in stub.asked] == [("POST", path)] * 2


GOOD = {"ok": True, "latency_s": 0.012, "version": "0.33.0", "error": ""}
BAD = {"ok": False, "latency_s": 2.0, "version": None, "error": "no answer in time"}


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (GOOD, GOOD, ExitCode.OK),
        (GOOD, BAD, ExitCode.FAILURE),
        (BAD, BAD, ExitCode.NO_BACKEND),
    ],
)
def test_checks(command: Command, first: Any, second: Any, code: ExitCode) -> None:
    """What each check saw; the code says whether some or all failed."""
    answers = {
        "/_balancer/backends/a/check": answer("check", check=first, name="a"),
        "/_balancer/backends/b/check": answer("check", check=second, name="b"),
    }
    with serving(answers) as stub:
        told = command("backends", "check", "a", "b", "--admin", f"127.0.0.1:{stub.port}")
    assert told.exit_code == code
    lines = {True: "Ollama 0.33.0 answered in 0.012 s", False: "check failed: no answer in time"}
    for line, seen in zip(told.stdout.splitlines(), (first, second), strict=True):
        assert lines[seen["ok"]] in line


def test_an_unknown_name_is_one_line(command: Command) -> None:
    """With the names there are; what was done before it stays done and is not undone."""
    error = 'no backend "gpu2". There are: gpu1. Did you mean "gpu1"?'
    answers = {
        "/_balancer/backends/gpu1/drain": answer("drain"),
        "/_balancer/backends/gpu2/drain": (404, {"error": error, "backends": ["gpu1"]}),
    }
    with serving(answers) as stub:
        told = command("backends", "drain", "gpu1", "gpu2", "--admin", f"127.0.0.1:{stub.port}")
    assert (told.exit_code, told.stdout) == (ExitCode.FAILURE, "")
    assert told.stderr == f"N{error[1:]}\n"


def test_a_refusal_names_the_key(command: Command) -> None:
    """As of every command."""
    path = "/_balancer/backends/gpu1/drain"
    with serving({path: (403, {"error": "needs the role admin"})}) as stub:
        told = command("backends", "drain", "gpu1", "--admin", f"127.0.0.1:{stub.port}")
    assert told.exit_code == ExitCode.FAILURE
    assert "BALANCER_API_KEY" in told.stderr
    assert command("backends", "list", "--admin", "127.0.0.1:1").exit_code == ExitCode.NO_ADMIN


def test_for_scripts(command: Command) -> None:
    """The answers as they came."""
    path = "/_balancer/backends/gpu1/resume"
    with serving({path: answer("resume")}) as stub:
        there = ("--json", "--admin", f"127.0.0.1:{stub.port}")
        told = command("backends", "resume", "gpu1", *there)
    assert json.loads(told.stdout) == {"answers": [answer("resume")[1]]}


@pytest.mark.parametrize(
    ("busy", "limit", "code"),
    [(3, (), ExitCode.OK), (3, ("--timeout", "10s"), ExitCode.OK), (99, ("--timeout", "2s"), 1)],
)
def test_a_drain_that_waits(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    busy: int,
    limit: tuple[str, ...],
    code: int,
) -> None:
    """It asks until nothing runs there, or the time is up; then it says what still does."""
    asked: list[float] = []
    doc = document(switch="draining", source="", state="draining", loading="big")
    monkeypatch.setattr(hosts, "pause", asked.append)
    with serving(
        {
            "/_balancer/backends/gpu1/drain": answer("drain", state="draining"),
            "/_balancer/status": (200, doc),
        }
    ) as stub:

        def pause(seconds: float) -> None:
            asked.append(seconds)
            if len(asked) == busy:
                doc["backends"][0] |= {"in_flight": 0, "loading": None}

        monkeypatch.setattr(hosts, "pause", pause)
        there = ("--admin", f"127.0.0.1:{stub.port}")
        told = command("backends", "drain", "gpu1", "--wait", *limit, *there)
    assert told.exit_code == code
    assert told.stdout.startswith("gpu1: draining, 1 running\n")
    if code:
        assert len(asked) == 4
        assert told.stderr == (
            "Not drained after 2s: gpu1: 2 still running. They go on draining.\n"
        )
    else:
        assert len(asked) == busy
        assert told.stdout.endswith("Nothing runs there any more.\n")


def test_waiting_for_scripts(command: Command) -> None:
    """Whether it is drained stands in the answer; who has left the balancer is."""
    answers = {
        "/_balancer/backends/gpu1/drain": answer("drain", state="draining"),
        "/_balancer/status": (200, document() | {"backends": []}),
    }
    with serving(answers) as stub:
        there = ("--json", "--admin", f"127.0.0.1:{stub.port}")
        told = command("backends", "drain", "gpu1", "--wait", *there)
    assert json.loads(told.stdout)["answers"][0]["drained"] is True


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ({}, ExitCode.OK, ["gpu1", "line 3", "serving", "closed"]),
        ({"switch": "draining", "state": "draining"}, ExitCode.OK, ["draining"]),
        ({"up": False, "state": "down", "error": "refused"}, ExitCode.NO_BACKEND, ["! gpu1: ref"]),
    ],
)
def test_the_list(command: Command, more: dict[str, Any], code: ExitCode, words: list[str]) -> None:
    """State, switch and breaker; below, what is wrong."""
    doc = document(**{"switch": "serving", "source": "line 3", **more})
    with serving({"/_balancer/status": (200, doc)}) as stub:
        there = ("--admin", f"127.0.0.1:{stub.port}")
        told = command("backends", "list", *there)
        scripts = command("backends", "list", "--json", *there)
    assert (told.exit_code, scripts.exit_code) == (code, code)
    for word in words:
        assert word in told.stdout
    assert json.loads(scripts.stdout) == {"backends": doc["backends"]}


async def test_against_a_real_balancer(start: Start, spawn: Spawn) -> None:
    """Commands in processes of their own steer it, and explain what they have done."""
    rig = await start(2)
    await rig.warm("a", "llama3.2")
    there = ("--admin", rig.url)

    async def run(*args: str) -> tuple[int, str, str]:
        return await (await spawn(*args, *there)).ended()

    code, told, _ = await run("explain", "llama3.2")
    assert (code, told.splitlines()[0]) == (0, "llama3.2:latest: goes to a now")
    code, told, _ = await run("backends", "drain", "a", "--wait", "--timeout", "1m")
    assert (code, told) == (0, "a: draining, 0 running\nNothing runs there any more.\n")
    code, told, _ = await run("explain", "llama3.2")
    assert (code, "is loaded on b first" in told, "draining" in told) == (0, True, True)
    (_, checked, _), (_, _, wrong) = await asyncio.gather(
        run("backends", "check", "a", "b"), run("backends", "resume", "aa")
    )
    assert "a: draining; Ollama" in checked
    assert wrong == 'No backend "aa". There are: a, b. Did you mean "a"?\n'
