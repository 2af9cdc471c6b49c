"""The command line as a whole: help, the default command, refusals in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from balancer import __version__
from balancer.cli.exits import MEANING, ExitCode

from .conftest import Command, Spawn

COMMANDS = (
    *("serve", "demo", "sim", "status", "version", "reload", "check", "config"),
    *("install", "healthcheck", "explain", "backends"),
)


def test_help_tells_examples_commands_environment_and_exit_codes(command: Command) -> None:
    """Whoever knows nothing finds everything on one screen."""
    told = command("--help")
    assert told.exit_code == 0
    order = [told.stdout.index(word) for word in ("Examples:", "Run:", "Environment", "Exit codes")]
    assert order == sorted(order)
    for word in (*COMMANDS, "BALANCER_API_KEY", *(text for text in MEANING.values())):
        assert word in told.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(command: Command, name: str) -> None:
    """Its options are told, and -h is the same as --help."""
    told = command(name, "--help")
    assert told.exit_code == 0
    assert "Options:" in told.stdout
    assert command(name, "-h").stdout == told.stdout


@pytest.mark.parametrize("args", [("--version",), ("version",)])
def test_version(command: Command, args: tuple[str, ...]) -> None:
    """Both spellings print the one version."""
    told = command(*args)
    assert (told.exit_code, told.stdout) == (0, f"ollama-balancer {__version__}\n")


def test_options_without_a_command_are_those_of_serve(command: Command) -> None:
    """`ollama-balancer -b URL` serves; here it gets as far as refusing the URL."""
    short = command("-b", "ftp://gpu1")
    long = command("serve", "--backend", "ftp://gpu1")
    assert (short.exit_code, short.stderr) == (long.exit_code, long.stderr)
    assert short.exit_code == ExitCode.USAGE
    assert "backends[0].url" in short.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--wrong",), ("--wrong", "serve --help")),
        (("stats",), ("stats", "status")),
        (("serve", "gpu1"), ("gpu1", "serve --help")),
        (("serve", "--log-level", "loud"), ("loud", "debug")),
        (("config",), ("Missing command", "config --help")),
        (("explain",), ("model", "explain --help")),
        (("explain", "m", "--num-ctx", "0"), ("--num-ctx", "explain --help")),
        (("backends", "drain"), ("NAME", "backends drain --help")),
        (("backends", "drian", "gpu1"), ("drian", "drain")),
        (("backends", "drain", "gpu1", "--timeout", "1m"), ("--timeout", "--wait")),
        (("backends", "drain", "gpu1", "--wait", "--timeout", "soon"), ("soon", "duration")),
        (("demo", "--hosts", "2"), ("--hosts", "3")),
        (("sim", "--scenario", "flood"), ("flood", "calm")),
        (("sim", "--listen", "nonsense"), ("nonsense", "host:port")),
        (("sim", "--listen", "127.0.0.1:70000"), ("65535", "sim --help")),
        (("status", "--admin", "ftp://x"), ("ftp://x", "http://host:port")),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    command: Command, args: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """What is wrong and what to do, never a traceback."""
    told = command(*args)
    assert told.exit_code == ExitCode.USAGE
    assert told.stderr.count("\n") == 1
    assert told.stdout == ""
    for word in words:
        assert word in told.stderr


@pytest.mark.parametrize("buffered", ["", "1"])
async def test_a_reader_that_has_seen_enough_is_not_complained_to(
    spawn: Spawn, buffered: str
) -> None:
    """`config show | head -1`: no traceback, neither at once nor when the rest is flushed."""
    reader, writer = os.pipe()
    os.close(reader)
    env = {"PYTHONUNBUFFERED": buffered}
    process = await spawn("config", "show", stdout=writer, env=env)
    os.close(writer)
    code, _, err = await process.ended()
    assert (code, err) == (ExitCode.FAILURE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
async def test_a_full_disk_is_told_in_a_line(spawn: Spawn) -> None:
    """And it is a failure: what was to be written is not there."""
    full = os.open("/dev/full", os.O_WRONLY)
    process = await spawn("config", "show", stdout=full)
    os.close(full)
    code, _, err = await process.ended()
    assert (code, err) == (1, "Cannot write the output: No space left on device\n")


def test_light_commands_do_not_import_heavy_libraries(place: Path) -> None:
    """People and shells wait for these commands; they need none of these."""
    code = """
import sys
from balancer.cli import app
for args in (
    ["--help"],
    ["version"],
    ["status", "--admin", "127.0.0.1:1"],
    ["explain", "m", "--admin", "127.0.0.1:1"],
    ["backends", "drain", "gpu1", "--wait", "--timeout", "1m", "--admin", "127.0.0.1:1"],
    ["connect", "codex", "--base-url", "127.0.0.1:1"],
    ["bench", "--admin", "127.0.0.1:1"],
    ["completion", "bash"],
):
    app(args, standalone_mode=False)
print(sorted({"aiohttp", "ollama", "pybreaker", "textual"} & set(sys.modules)))
"""
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=place
    )
    assert told.stdout.splitlines()[-1] == "[]"
