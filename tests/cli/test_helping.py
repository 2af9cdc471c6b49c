"""What stands under the options: every command has examples, and what is said holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from balancer.cli import app
from balancer.cli.exits import MEANING, ExitCode
from balancer.cli.helping import HELP, Help, attach

from .conftest import Command


def every(group: Any, path: str = "") -> Iterator[tuple[str, bool]]:
    """Every command by what is typed, and whether it is a group of them."""
    for name, command in group.commands.items():
        typed = f"{path} {name}".strip()
        yield typed, hasattr(command, "commands")
        if hasattr(command, "commands"):
            yield from every(command, typed)


EVERY = dict(every(get_command(app)))
LEAVES = sorted(typed for typed, is_group in EVERY.items() if not is_group)


@pytest.mark.parametrize("path", LEAVES)
def test_every_command_has_examples(command: Command, path: str) -> None:
    """In its own help; whoever adds a command adds a row to `HELP`."""
    told = command(*path.split(), "--help").stdout
    assert told.count("Examples:") == 1
    assert re.search(r"^  +ollama-balancer", told, re.MULTILINE)


def test_nothing_is_told_of_commands_that_are_not_there() -> None:
    """A renamed command takes its examples with it."""
    assert HELP.keys() <= EVERY.keys()


@pytest.mark.parametrize("path", sorted(HELP))
def test_examples_are_of_that_command(path: str) -> None:
    """But for `serve`, which needs no name."""
    for typed, _ in HELP[path].examples:
        assert typed.startswith(path) or path == "serve"


@pytest.mark.parametrize("path", sorted(HELP.keys() & set(LEAVES)))
def test_options_in_examples_exist(command: Command, path: str) -> None:
    """Whatever is typed there is told above."""
    told = command(*path.split(), "--help").stdout
    options = told[: told.index("Examples:")]
    for typed, _ in HELP[path].examples:
        for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", typed):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", options), option


def test_exit_codes_are_told_with_what_they_mean() -> None:
    """In their usual words, or in others; 0 is always there."""
    told = Help((("x", "y"),), exits=((ExitCode.BIND, ""), (ExitCode.FAILURE, "no"))).text()
    assert told.splitlines()[-4:] == [
        "Exit codes:",
        "  0  ok",
        f"  4  {MEANING[ExitCode.BIND]}",
        "  1  no",
    ]


def test_what_a_command_says_itself_stays_and_nothing_is_said_twice() -> None:
    """`serve` has a sentence of its own."""

    class Fake:
        epilog = "A sentence."

    fake = Fake()
    attach(fake, "serve")
    attach(fake, "serve")
    assert fake.epilog == f"{HELP['serve'].text()}\n\nA sentence."
