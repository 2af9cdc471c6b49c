"""Commands that run something: serve, demo, sim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal

import typer

from balancer.cli.exits import CommandError, ExitCode

PANEL: Final = "Run"

Backends = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        "-b",
        metavar="URL",
        help="An Ollama host, e.g. gpu1 or gpu2:11434; several: repeat it, or use commas.",
    ),
]
Discover = Annotated[
    list[str] | None,
    typer.Option(
        "--discover",
        metavar="SRC",
        help="Look for hosts, also beside named ones: env, local; or none; repeatable.",
    ),
]
ConfigFile = Annotated[
    str | None,
    typer.Option("--config", "-c", metavar="FILE", help="Configuration file."),
]
ListenAt = Annotated[
    list[str] | None,
    typer.Option(
        "--listen",
        "-l",
        metavar="ADDR",
        help="host:port, :port, unix:/path or fd:NAME; repeatable.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Declare the commands."""
    epilog = (
        "Without --backend the hosts come from BALANCER_BACKENDS or the configuration file; where "
        "none is named, those that answer on this machine or at OLLAMA_HOST are used."
    )
    app.command(rich_help_panel=PANEL, epilog=epilog)(serve)
    app.command(rich_help_panel=PANEL)(demo)
    app.command(rich_help_panel=PANEL)(sim)


def serve(
    backend: Backends = None,
    config: ConfigFile = None,
    listen: ListenAt = None,
    discover: Discover = None,
    demo: Annotated[
        bool | None,
        typer.Option(
            "--demo/--no-demo",
            help="Simulated hosts with made-up answers. Without a configuration file a terminal "
            "gets them where no Ollama is found; --no-demo: never.",
            show_default=False,
        ),
    ] = None,
    insecure_no_auth: Annotated[
        bool,
        typer.Option("--insecure-no-auth", help="Ask nobody for a key, wherever they call from."),
    ] = False,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None, typer.Option(help="What is logged.")
    ] = None,
    log_format: Annotated[
        Literal["auto", "console", "json", "logfmt"] | None,
        typer.Option(help="How; auto: console on a terminal, else json."),
    ] = None,
    open_page: Annotated[
        bool, typer.Option("--open", help="Show the dashboard in a browser.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Reload whenever the configuration file changes.")
    ] = False,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
) -> int:
    """Serve: one address in front of your Ollama hosts (the default command)."""
    from balancer.cli import serving, source

    overrides = {
        "backends": split_hosts(backend or [], more or []),
        "server.listen": listen or None,
        "discovery.sources": discover or None,
        "demo.enabled": demo,
        "auth.anonymous": "always" if insecure_no_auth else None,
        "logging.level": log_level,
        "logging.format": log_format,
    }
    found = source.find(config, overrides)
    if watch and found.file is None:
        raise CommandError("--watch needs a configuration file: -c FILE", code=ExitCode.USAGE)
    return serving.serve(found, open_page=open_page, watch=watch)


def split_hosts(named: list[str], more: Sequence[str] = ()) -> list[str] | None:
    """`-b gpu1,gpu2` and `-b gpu1 gpu2` mean what `-b gpu1 -b gpu2` does."""
    if more and not named:
        told = f"Got unexpected extra argument ({more[0]}). To serve it as a host: -b {more[0]}."
        raise CommandError(f"{told} Try: ollama-balancer serve --help", code=ExitCode.USAGE)
    return [word for text in (*named, *more) for word in text.replace(",", " ").split()] or None


def demo(
    hosts: Annotated[int, typer.Option(min=3, max=50, help="Simulated hosts.")] = 3,
    seconds: Annotated[
        float | None,
        typer.Option(min=1, help="How long; on a terminal until Ctrl+C, elsewhere 30."),
    ] = None,
) -> int:
    """A simulated fleet, a balancer and traffic, to watch; on this machine only."""
    from balancer.cli import demoing

    return demoing.demo(hosts, seconds)


def sim(
    hosts: Annotated[int, typer.Option(min=1, max=200, help="Simulated hosts.")] = 3,
    scenario: Annotated[
        str, typer.Option(help="What befalls them: calm, flaky or rough.")
    ] = "calm",
    listen: Annotated[
        str,
        typer.Option(
            "--listen", "-l", metavar="ADDR", help="host:port of the first; the others follow."
        ),
    ] = "127.0.0.1:11440",
) -> int:
    """Simulated Ollama hosts alone, to try clients and balancers on."""
    import asyncio

    from balancer.sim import fleet

    def tell(line: str) -> None:
        print(line, flush=True)

    try:
        asyncio.run(fleet.run(hosts, scenario, listen, tell))
    except KeyboardInterrupt:
        return ExitCode.OK
    except ValueError as error:
        told = f"{error}. Try: ollama-balancer sim --help"
        raise CommandError(told, code=ExitCode.USAGE) from None
    except OSError as error:
        told = f"Cannot start the simulated hosts at {listen}: {error.strerror or error}"
        raise CommandError(f"{told}. Other ports: --listen ADDR", code=ExitCode.BIND) from None
    return ExitCode.OK
