"""Commands that look: status, explain, version."""

from __future__ import annotations

import json
import platform
import time
from importlib import metadata
from typing import Annotated, Any, Final

import typer

from balancer import __version__
from balancer.cli.exits import CommandError, ExitCode

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
    app.command(rich_help_panel=PANEL)(explain)
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
        pause(EVERY_S)


def pause(seconds: float) -> None:
    """Let a person, or a backend that drains, have some time."""
    time.sleep(seconds)  # noqa: TID251 - the commands' one clock


def explain(
    model: Annotated[str, typer.Argument(help="The model, as a client names it.")],
    num_ctx: Annotated[
        int | None, typer.Option("--num-ctx", min=1, help="The context a call asks for.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", min=0, help="The length of its prompt.")
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", metavar="NAME", help="The key of the caller, by name.")
    ] = None,
    session: Annotated[
        str | None, typer.Option("--session", metavar="ID", help="The session a call names.")
    ] = None,
    call: Annotated[
        str | None,
        typer.Option("--call", metavar="ID", help="One that waits or went, by its request id."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="BACKEND", help="As if that had failed it; repeatable."),
    ] = None,
    admin: AdminUrl = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole document.")] = False,
) -> int:
    """Where a call for a model would go now, and why not elsewhere; code 1 if it is refused."""
    from urllib.parse import urlencode

    from balancer.cli import client, screen

    asked = {"model": model, "num_ctx": num_ctx, "prompt_tokens": prompt_tokens}
    asked |= {"key": key, "session": session, "call": call}
    query = [(name, str(value)) for name, value in asked.items() if value is not None]
    query += [("exclude", name) for name in exclude or ()]
    balancer = client.find(admin, config)
    path = f"/_balancer/explain?{urlencode(query)}"
    status, doc = balancer.ask("GET", path, good="explain_version")
    if status != 200:
        raise CommandError(client.refusal(balancer.url, status, doc), code=ExitCode.FAILURE)
    told = json.dumps(doc, indent=2, ensure_ascii=False) if as_json else None
    print(told or "\n".join(screen.explained(doc)))
    return ExitCode.FAILURE if doc["outcome"]["kind"] == "refused" else ExitCode.OK


def version(
    as_json: Annotated[bool, typer.Option("--json", help="With what it runs on.")] = False,
) -> int:
    """The version."""
    if not as_json:
        print(f"ollama-balancer {__version__}")
        return ExitCode.OK
    print(json.dumps(about(), indent=2))
    return ExitCode.OK


def about() -> dict[str, Any]:
    """The version, and what it runs on."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _installed(name) for name in ("aiohttp", "pybreaker", "uvloop")},
    }


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
