"""Commands that run something: serve, demo, sim."""

from __future__ import annotations

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
        help="An Ollama host, e.g. gpu1 or gpu2:11434; repeatable.",
    ),
]
ConfigFile = Annotated[
    str | None,
    typer.Option("--config", "-c", metavar="FILE", help="Configuration file."),
]
ListenAt = Annotated[
    list[str] | None,
    typer.Option(
        "--listen", "-l", metavar="ADDR", help="host:port, :port or unix:/path; repeatable."
    ),
]


def add_to(app: typer.Typer) -> None:
    """Declare the commands."""
    epilog = "Without --backend the hosts come from BALANCER_BACKENDS or the configuration file."
    app.command(rich_help_panel=PANEL, epilog=epilog)(serve)
    app.command(rich_help_panel=PANEL)(demo)
    app.command(rich_help_panel=PANEL)(sim)


def serve(
    backend: Backends = None,
    config: ConfigFile = None,
    listen: ListenAt = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Simulated hosts with made-up answers.")
    ] = False,
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
) -> int:
    """Serve: one address in front of your Ollama hosts (the default command)."""
    from balancer.cli import serving, source

    overrides = {
        "backends": backend or None,
        "server.listen": listen or None,
        "demo.enabled": demo or None,
        "auth.anonymous": "always" if insecure_no_auth else None,
        "logging.level": log_level,
        "logging.format": log_format,
    }
    return serving.serve(source.find(config, overrides))


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
