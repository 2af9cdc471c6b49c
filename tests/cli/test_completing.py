"""Completion: the scripts, and the words a shell is given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import typer

from balancer.cli.completing import backend_names
from balancer.cli.exits import ExitCode
from tests import needs

from .conftest import Command
from .stub import serving
from .test_inspect import document


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_both_names(command: Command, shell: str) -> None:
    """And nothing else on stdout, for it is evaluated."""
    told = command("completion", shell)
    assert told.exit_code == ExitCode.OK
    for variable in ("_OLLAMA_BALANCER_COMPLETE", "_OLB_COMPLETE"):
        assert f"{variable}=complete_{shell}" in told.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_understands_it(command: Command, place: Path, shell: str) -> None:
    """Its syntax is right."""
    program = needs.program(shell)
    (place / "script").write_text(command("completion", shell).stdout)
    subprocess.run([program, "-n", "script"], check=True, cwd=place)


def test_a_shell_nobody_knows(command: Command) -> None:
    """One line, with those that are known."""
    told = command("completion", "tcsh")
    assert told.exit_code == ExitCode.USAGE
    assert "bash" in told.stderr


def completed(place: Path, typed: str, **more: str) -> list[str]:
    """What bash would offer at the end of that line."""
    words = typed.split(" ")
    code = "import sys; sys.argv = ['ollama-balancer']; from balancer.cli import main; main()"
    env = {
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
        "_OLLAMA_BALANCER_COMPLETE": "complete_bash",
        "HOME": str(place),
        **more,
    }
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=place, check=True
    )
    return told.stdout.split()


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ollama-balancer con", ["connect", "config"]),
        ("ollama-balancer connect cl", ["claude-code", "cline"]),
        ("ollama-balancer completion z", ["zsh"]),
        ("ollama-balancer check --con", ["--config", "--contact"]),
        ("ollama-balancer -b gpu1 --lis", ["--listen"]),
    ],
)
def test_what_bash_is_offered(place: Path, typed: str, offered: list[str]) -> None:
    """Commands, options and words of arguments; after options of `serve`, more of them."""
    assert completed(place, typed) == offered


def test_without_anything_the_commands_are_offered(place: Path) -> None:
    """Not the options of the command that would run without a name."""
    offered = completed(place, "ollama-balancer ")
    assert {"serve", "doctor", "connect"} <= set(offered)
    assert not [word for word in offered if word.startswith("-")]


def named(incomplete: str, **params: Any) -> list[str]:
    """Backends that are offered."""
    return backend_names(cast("typer.Context", SimpleNamespace(params=params)), incomplete)


def test_backends_of_the_running_balancer(place: Path) -> None:
    """Those that begin so; none if nobody answers."""
    with serving({"/_balancer/status": (200, document())}) as stub:
        admin = f"127.0.0.1:{stub.port}"
        assert named("gp", admin=admin) == named("", admin=admin) == ["gpu1"]
        assert named("x", admin=admin) == []
    assert named("gp", admin=admin) == []


def test_bash_is_offered_backends(place: Path) -> None:
    """Where a command wants one."""
    with serving({"/_balancer/status": (200, document())}) as stub:
        listen = f"127.0.0.1:{stub.port}"
        typed = "ollama-balancer backends drain g"
        assert completed(place, typed, BALANCER_LISTEN=listen) == ["gpu1"]
