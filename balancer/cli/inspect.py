"""Commands that look: status, version."""

from __future__ import annotations

import json
import platform
import time
from importlib import metadata
from typing import Annotated, Final

import typer

from balancer import __version__
from balancer.cli.exits import ExitCode

PANEL: Final = "Inspect"
EVERY_S: Final = 2.0
CLEAR: Final = "\x1b[H\x1b[2J"

AdminUrl = Annotated[
    str | None,
    typer.Option(
        "--admin",
        metavar="URL",
        help="The running balancer; default: where the "
        "configuration says it listens, else http://127.0.0.1:11435.",
    ),
]
ConfigFile = Annotated[
    str | None, typer.Option("--config", "-c", metavar="FILE", help="Configuration file.")
]


def add_to(app: typer.Typer) -> None:
    """Declare the commands."""
    app.command(rich_help_panel=PANEL)(status)
    app.command(rich_help_panel=PANEL)(version)


def status(
    admin: AdminUrl = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole document.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until Ctrl+C.")] = False,
) -> int:
    """Backends, breakers, queue and loaded models; exit code 5 if no backend is healthy."""
    from balancer.cli import client, screen

    balancer = client.find(admin, config)
    while True:
        doc = balancer.status()
        told = json.dumps(doc, indent=2, ensure_ascii=False) if as_json else None
        print(CLEAR if watch and told is None else "", end="")
        print(told or "\n".join(screen.status(doc)), flush=True)
        if not watch:
            return ExitCode.OK if screen.is_healthy(doc) else ExitCode.NO_BACKEND
        time.sleep(EVERY_S)  # noqa: TID251 - for a person's eyes


def version(
    as_json: Annotated[bool, typer.Option("--json", help="With what it runs on.")] = False,
) -> int:
    """The version."""
    if not as_json:
        print(f"ollama-balancer {__version__}")
        return ExitCode.OK
    libraries = {name: _installed(name) for name in ("aiohttp", "pybreaker", "uvloop")}
    told = {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": libraries,
    }
    print(json.dumps(told, indent=2))
    return ExitCode.OK


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
