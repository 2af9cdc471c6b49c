"""Completion of words in a shell: the script that is sourced, and the words themselves."""

from __future__ import annotations

import os
from typing import Annotated, Final, Literal

import typer

from balancer.cli.exits import CommandError, ExitCode

PANEL: Final = "Set up"
PROGRAMS: Final = ("ollama-balancer", "olb")
VARIABLES: Final = {
    program: f"_{program.replace('-', '_').upper()}_COMPLETE" for program in PROGRAMS
}
PATIENCE_S: Final = 1.0


def add_to(app: typer.Typer) -> None:
    """Declare the command."""
    app.command(rich_help_panel=PANEL)(completion)


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="Your shell.")],
) -> int:
    """The script that lets your shell complete commands, options, backends and clients."""
    from typer._completion_shared import get_completion_script

    for program in PROGRAMS:
        variable = VARIABLES[program]
        print(get_completion_script(prog_name=program, complete_var=variable, shell=shell))
    return ExitCode.OK


def prepare() -> None:
    """Make the shells known, if one of them is asking."""
    if any(variable in os.environ for variable in VARIABLES.values()):
        from typer._completion_classes import completion_init

        completion_init()


# -- words -------------------------------------------------------------------------------------


def client_names(incomplete: str) -> list[tuple[str, str]]:
    """Clients that `connect` knows."""
    from balancer.cli.recipes import RECIPES

    return [(r.name, r.title) for r in RECIPES if r.name.startswith(incomplete.lower())]


def backend_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Backends of the running balancer; none if it does not answer at once."""
    from balancer.cli.client import Admin, find

    try:
        named = find(ctx.params.get("admin"), ctx.params.get("config"))
        doc = Admin(named.url, named.key, limit_s=PATIENCE_S).status()
    except CommandError:
        return []
    names = [str(backend["name"]) for backend in doc["backends"]]
    return [name for name in names if name.startswith(incomplete)]
