"""
The commands. Each module declares a group; what is heavy is imported when a command runs.

Laws:
- Wrong input ends in one line per fault on stderr and an exit code of `ExitCode`, no traceback.
- ``--help``, ``version``, ``status``, ``explain``, ``bench``, ``backends``, ``models``,
  ``connect`` and ``completion`` import neither aiohttp nor ollama nor pybreaker.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from io import TextIOWrapper
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from balancer import __version__
from balancer.cli import (
    bench,
    completing,
    connect,
    doctor,
    helping,
    hosts,
    init,
    inspect,
    key,
    models,
    operate,
    run,
    service,
    setup,
)
from balancer.cli.exits import MEANING, CommandError, ExitCode

EXAMPLES: Final = """\
Examples:
  ollama-balancer                            serve what is found on this machine
  ollama-balancer -b gpu1 -b gpu2            serve two Ollama hosts on 127.0.0.1:11435
  OLLAMA_HOST=127.0.0.1:11435 ollama run llama3.2
                                             any Ollama client, through the balancer
  ollama-balancer demo                       look around: simulated hosts, made-up answers
  ollama-balancer doctor                     what is wrong, and what to do
  ollama-balancer connect open-webui         settings of a client, to copy
  ollama-balancer init                       a configuration to begin with
  ollama-balancer status --watch             what is going on
  ollama-balancer explain llama3.2           where a call would go, and why
  ollama-balancer models pull llama3.2       to all hosts that may have it
  ollama-balancer backends drain gpu1 --wait
                                             before a restart of gpu1
"""
ENVIRONMENT: Final = """\
Environment (over the file; flags are over both):
  BALANCER_CONFIG        configuration file
  BALANCER_LISTEN        where to listen (127.0.0.1:11435)
  BALANCER_BACKENDS      Ollama hosts, separated by commas
  BALANCER_API_KEY       one API key with the role admin; the commands send it, too
  BALANCER_API_KEY_FILE  the same, in a file
  BALANCER_LOG_LEVEL     debug, info, warning, error
  BALANCER_LOG_FORMAT    auto, console, json, logfmt
  BALANCER_DISCOVER      where to look for hosts: env,local or none
  BALANCER_DEMO          1: simulated hosts
  BALANCER_<SECTION>__<KEY>
                         any other setting, e.g. BALANCER_TIMEOUTS__LOAD=20m
  NO_COLOR, FORCE_COLOR  colours off, on
  OLLAMA_HOST, OLLAMA_BASE_URLS
                         hosts to use where no backend is named; never where we listen
  OLLAMA_ORIGINS         web pages that may call, where cors.allow_origins names none
"""
_OF_GROUP: Final = frozenset({"-h", "--help", "--version"})
_ALIASES: Final = {"hosts": "backends"}


class Commands(TyperGroup):
    """The command line; without a command it is `serve`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `serve` where no command is named, and none is about to be."""
        completes = ctx.resilient_parsing and not args
        if not completes and (not args or (args[0].startswith("-") and args[0] not in _OF_GROUP)):
            args = ["serve", *args]
        return super().parse_args(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, with what its help has to say."""
        cmd_name = _ALIASES.get(cmd_name, cmd_name)
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            helping.attach(command, cmd_name)
        return command

    def main(self, *args: Any, **more: Any) -> Any:
        """Run, and turn refusals into lines on stderr and a code."""
        completing.prepare()
        exits = more.get("standalone_mode", True)
        more["standalone_mode"] = False
        try:
            code = super().main(*args, **more) or ExitCode.OK
        except CommandError as error:
            code = error.code
            print(*error.lines, sep="\n", file=sys.stderr)
        except typer.TyperException as error:
            code = error.exit_code
            print(_usage(error), file=sys.stderr)
        if exits:
            sys.exit(code)
        return code

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Examples, commands in groups, environment, exit codes."""
        formatter.write(f"Usage: {ctx.command_path} [COMMAND] [OPTIONS]\n\n")
        formatter.write("One OLLAMA_HOST in front of many Ollama hosts.\n\n")
        formatter.write(f"{EXAMPLES}")
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            told = command.get_short_help_str(200)
            panels.setdefault(command.rich_help_panel, []).append((name, told))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)
        formatter.write(f"\n{ENVIRONMENT}\n")
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(int(code)), text) for code, text in MEANING.items()])
        formatter.write("\nOptions of a command: ollama-balancer COMMAND --help\n")


def _usage(error: typer.TyperException) -> str:
    """One line: what is wrong, and where to read on."""
    told = " ".join(error.format_message().replace("Value error, ", "").split())
    ctx = getattr(error, "ctx", None)
    command = ctx.command_path if ctx is not None else "ollama-balancer"
    host = re.fullmatch("No such command '([^']*[.:][^']*)'.*", told)
    if host:
        told += f" To serve it as a host: {command} -b {host[1]}."
    return f"{told}{'' if told.endswith(('.', '?')) else '.'} Try: {command} --help"


app: Final = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (
    *(run, inspect, doctor, bench, operate, hosts, models),
    *(key, init, setup, connect, service, completing),
):
    group.add_to(app)


def _version(asked: bool) -> None:
    if asked:
        print(f"ollama-balancer {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    """One OLLAMA_HOST in front of many Ollama hosts."""


def main() -> None:
    """``ollama-balancer``, ``olb`` and ``python -m balancer``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may know no dashes
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        if error.errno == errno.ENOSPC:  # a reader that has seen enough, as `head`, knows
            print(f"Cannot write the output: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still held
        sys.exit(ExitCode.FAILURE)
