"""The command that writes a first configuration: init."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from balancer.cli.exits import CommandError, ExitCode
from balancer.cli.run import Backends, split_hosts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from balancer.config import BackendSpec

PANEL: Final = "Set up"
FILE: Final = Path("ollama-balancer.yaml")
EXAMPLE: Final = "config.example.yaml"
MINIMAL: Final = """\
# ollama-balancer: what people change most; everything else has a default.
# All settings:      ollama-balancer init --full -o -
# Check this file:   ollama-balancer check FILE --contact
# Apply a change:    ollama-balancer reload
version: 1

server:
  # Where clients call. Beyond 127.0.0.1 it needs a key, or auth.anonymous.
  listen: ["127.0.0.1:11435"]

{backends}

# auth:
#   # Who may call from other machines; callers on this one need no key.
#   keys:
#     - {{name: webui, role: user, key: "${{WEBUI_KEY}}"}}   # openssl rand -hex 32
#   # Or without keys, from your networks alone:
#   # anonymous: [127.0.0.0/8, "::1/128", 192.168.1.0/24]

# routing: {{strategy: warm-first}}   # one copy of each model, however many calls wait
# timeouts: {{load: 20m}}             # for huge models on slow disks
"""
HOSTS: Final = "# Your Ollama hosts. slots: calls at once per model (OLLAMA_NUM_PARALLEL there)."
NOBODY: Final = """\
# Your Ollama hosts. A name is enough (port 11434): [gpu1, gpu2]
backends: []
# - name: gpu1
#   url: gpu1:11434
#   slots: 2                        # OLLAMA_NUM_PARALLEL there
"""
NO_HOSTS: Final = "Write your hosts into it (backends); until then it looks for them on its own."
_BACKENDS: Final = re.compile(r"^backends: \[\].*$", re.MULTILINE)


def add_to(app: typer.Typer) -> None:
    """Declare the command."""
    app.command(rich_help_panel=PANEL)(init)


def init(
    backend: Backends = None,
    from_discovery: Annotated[
        bool, typer.Option("--from-discovery", help="Write the Ollama hosts found from here.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full/--minimal", help="Every setting, or what people change most.")
    ] = False,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Where to; - prints it.")
    ] = str(FILE),
) -> int:
    """Write a commented configuration; a file that is there is never overwritten."""
    if output != "-" and os.path.lexists(output):
        raise _there(output)
    specs = _hosts(split_hosts(backend or []), from_discovery=from_discovery)
    text = _written(specs, full=full)
    if output == "-":
        print(text, end="")
        return ExitCode.OK
    _write(Path(output), text)
    hosts = f"{len(specs)} host{'' if len(specs) == 1 else 's'}"
    print(f"Written: {output}, {hosts}." if specs else f"Written: {output}. {NO_HOSTS}")
    print(f"Next: ollama-balancer check {output} --contact")
    there = "" if Path(output) == FILE else f" --config {output}"
    print(f"Then: ollama-balancer{there}")
    return ExitCode.OK


# -- hosts -------------------------------------------------------------------------------------


def _hosts(named: list[str] | None, *, from_discovery: bool) -> Sequence[BackendSpec]:
    """Those that are named, and those that are found."""
    from balancer.config import ConfigError, load

    # What the environment says else is not for the file: only where to look.
    env = {
        name: os.environ[name] for name in ("OLLAMA_HOST", "OLLAMA_BASE_URLS") if name in os.environ
    }
    overrides = {
        "backends": named,
        "discovery.sources": ["env", "local"] if from_discovery else "none",
    }
    try:
        config = load("", env, overrides=overrides)
    except ConfigError as error:
        raise CommandError(*map(str, error.problems), code=ExitCode.USAGE) from None
    if not from_discovery:
        return config.backends
    import asyncio

    from balancer.config.discovery import join
    from balancer.net.discovery import first_look

    looked = asyncio.run(first_look(config))
    for note in looked.notes:
        print(f"! {note}", file=sys.stderr)
    if not looked.found:
        print("! No Ollama was found: name your hosts with -b.", file=sys.stderr)
    return join(config, looked.found).backends


# -- the text ----------------------------------------------------------------------------------


def _written(specs: Sequence[BackendSpec], *, full: bool) -> str:
    """
    The file; it is held against the schema before anybody gets it.

    Raises:
        CommandError: This installation came without the example.
        ConfigError: We have made a mistake.
    """
    from balancer.config import load

    if full:
        from balancer.cli.service import packaged

        text = packaged(EXAMPLE)
        if specs:
            text = _BACKENDS.sub(lambda _: _listed(specs), text, count=1)
    else:
        text = MINIMAL.format(backends=_listed(specs) if specs else NOBODY.rstrip())
    load(text, {})
    return text


def _listed(specs: Sequence[BackendSpec]) -> str:
    """The hosts as YAML; quoting is JSON's, which YAML understands."""
    hosts = [
        f"  - {{name: {json.dumps(spec.name)}, url: {json.dumps(spec.url)}}}" for spec in specs
    ]
    return "\n".join([HOSTS, "backends:", *hosts])


def _write(file: Path, text: str) -> None:
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise _there(str(file)) from None
    except OSError as error:
        told = f"Cannot write {file}: {error.strerror or error}. Elsewhere: -o FILE; print: -o -"
        raise CommandError(told, code=ExitCode.FAILURE) from None


def _there(file: str) -> CommandError:
    told = (
        f"{file} is there already and stays as it is. Another name: -o FILE; to look: -o -; "
        f"or remove it first."
    )
    return CommandError(told, code=ExitCode.FAILURE)
