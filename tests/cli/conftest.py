"""What the tests of the commands share: a clean place to run them in, and real processes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import pytest
from typer.testing import CliRunner, Result

from balancer.cli import app

LIMIT_S = 60.0


class Command(Protocol):
    """Runs a command line in this process."""

    def __call__(self, *args: str) -> Result:
        """What it printed, and its exit code."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, home and environment."""
    for name in list(os.environ):
        if name.startswith("BALANCER_") or name == "XDG_CONFIG_HOME":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(place: Path) -> Command:
    """Runs command lines."""
    return lambda *args: CliRunner().invoke(app, list(args), prog_name="ollama-balancer")


class Process:
    """A command in a process of its own; stderr is read as lines of JSON."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []

    async def told(self, event: str) -> dict[str, Any]:
        """The next log line of that name."""
        assert self.process.stderr is not None
        async with asyncio.timeout(LIMIT_S):
            async for line in self.process.stderr:
                self.lines.append(json.loads(line))
                if self.lines[-1]["event"] == event:
                    return self.lines[-1]
        raise AssertionError(f"{event} was never told: {self.lines}")

    async def port(self) -> int:
        """Where it serves, once it does."""
        return int((await self.told("serving"))["addresses"][0].rpartition(":")[2])

    async def ended(self) -> tuple[int, str, str]:
        """Exit code, stdout, and what of stderr was not read yet."""
        async with asyncio.timeout(LIMIT_S):
            out, err = await self.process.communicate()
        return self.process.returncode or 0, (out or b"").decode(), (err or b"").decode()


class Spawn(Protocol):
    """Starts a command in a process of its own."""

    def __call__(self, *args: str, **more: Any) -> Awaitable[Process]:
        """Takes what `asyncio.create_subprocess_exec` takes, and `env` beside ours."""


@pytest.fixture
async def spawn(place: Path) -> AsyncIterator[Spawn]:
    """Starts processes that end with the test."""
    started: list[asyncio.subprocess.Process] = []

    async def start(*args: str, env: Mapping[str, str] | None = None, **more: Any) -> Process:
        streams = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "balancer",
            *args,
            cwd=place,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            **(streams | more),
        )
        started.append(process)
        return Process(process)

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
