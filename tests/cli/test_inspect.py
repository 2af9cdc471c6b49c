"""`status` and `version`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from balancer.cli import inspect
from balancer.cli.exits import ExitCode

from .conftest import Command
from .stub import serving

CLOSED = {"state": "closed", "reason": "", "retry_in_s": 0.0, "trips": 0}
OPEN = {"state": "open", "reason": "3 failures in a row", "retry_in_s": 12.0, "trips": 1}


def document(**backend: Any) -> dict[str, Any]:
    """A status document with one backend."""
    model = {"name": "m:latest", "state": "loaded", "in_flight": 1, "breaker": CLOSED}
    return {
        "status_version": 1,
        "version": "0.1.0",
        "config": {"file": None, "loaded_s_ago": 3, "rejected": []},
        "ready": True,
        "draining": False,
        "running": 1,
        "queue": {"depth": 2, "oldest_s": 4.0, "per_model": {"m:latest": 2}},
        "backends": [
            {
                "name": "gpu1",
                "url": "http://gpu1:11434",
                "version": "0.34.2",
                "up": True,
                "error": "",
                "state": "up",
                "breaker": CLOSED,
                "in_flight": 1,
                "loading": None,
                "trouble": "",
                "models": [model],
                **backend,
            }
        ],
    }


@pytest.mark.parametrize(
    ("backend", "code", "words"),
    [
        ({}, ExitCode.OK, ["gpu1:11434", "m:latest: 2; the oldest for 4 s"]),
        ({"loading": "big"}, ExitCode.OK, ["1 +load big"]),
        ({"trouble": "answers 401"}, ExitCode.OK, ["! gpu1: answers 401"]),
        (
            {"up": False, "state": "down", "error": "cannot connect"},
            ExitCode.NO_BACKEND,
            ["! gpu1: cannot connect"],
        ),
        (
            {"breaker": OPEN, "state": "broken"},
            ExitCode.NO_BACKEND,
            ["open, trial in 12 s", "3 failures in a row"],
        ),
    ],
)
def test_status(
    command: Command, backend: dict[str, Any], code: ExitCode, words: list[str]
) -> None:
    """What a person should know of a backend is told; code 5 if none can be used."""
    with serving({"/_balancer/status": (200, document(**backend))}) as stub:
        told = command("status", "--admin", f"127.0.0.1:{stub.port}")
    assert told.exit_code == code
    for word in words:
        assert word in told.stdout


def test_status_for_scripts_is_the_document(command: Command) -> None:
    """Unchanged."""
    with serving({"/_balancer/status": (200, document())}) as stub:
        told = command("status", "--json", "--admin", f"127.0.0.1:{stub.port}")
    assert json.loads(told.stdout) == document()


def test_watch_goes_on_until_the_balancer_is_gone(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks again and again; here the third answer is none."""
    monkeypatch.setattr(inspect, "EVERY_S", 0.0)
    with serving({"/_balancer/status": (200, document())}) as stub:
        stub.limit = 2
        told = command("status", "--watch", "--admin", f"127.0.0.1:{stub.port}")
    assert told.exit_code == ExitCode.NO_ADMIN
    assert told.stdout.count(inspect.CLEAR) == 2
    assert told.stdout.count("gpu1:11434") == 2


def test_version_for_scripts(command: Command) -> None:
    """With what it runs on."""
    doc = json.loads(command("version", "--json").stdout)
    assert set(doc) == {"version", "python", "platform", "libraries"}
    assert doc["libraries"]["aiohttp"]
