"""Commands for what is installed where, and what is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from balancer.cli.completing import backend_names
from balancer.cli.exits import CommandError, ExitCode
from balancer.cli.inspect import AdminUrl, ConfigFile

if TYPE_CHECKING:
    from balancer.cli.client import Admin
    from balancer.cli.shelf import Shelved

PANEL: Final = "Operate"
LONG_S: Final = 3600.0  # silence while files are fetched, or a model is loaded
Say = Callable[[Mapping[str, Any]], None]

Model = Annotated[str, typer.Argument(help="The model, as a client names it.")]
OneOrAll = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="The model, as a client names it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For scripts.")]


def add_to(app: typer.Typer) -> None:
    """Declare the commands."""
    models = typer.Typer(
        help="What is installed where: list, pull, warm, unload, sync.", rich_markup_mode=None
    )
    for command in (listed, pull, warm, unload, sync):
        models.command("list" if command is listed else None)(command)
    app.add_typer(models, name="models", rich_help_panel=PANEL)


def listed(
    where: Annotated[bool, typer.Option("--where", help="A column for each backend.")] = False,
    admin: AdminUrl = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Models, their size, where they are, where they are in memory."""
    from balancer.cli import client, shelf

    doc = client.find(admin, config).status()
    models = shelf.shelves(doc)
    backends = [b["name"] for b in doc["backends"] if not b["provider"]]
    if as_json:
        _print_json({"models": [model.told() for model in models]})
    elif not models:
        print("No models. Install one: ollama-balancer models pull llama3.2")
    elif where:
        print(*shelf.matrix(models, backends), sep="\n")
    else:
        print(*shelf.listing(models, len(backends)), sep="\n")
    return ExitCode.OK


def pull(
    model: Model,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            metavar="NAME",
            help="Only to these backends; repeatable, or with commas. Else to all whose rules "
            "allow it.",
            autocompletion=backend_names,
        ),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Also where it is: its newest version.")
    ] = False,
    admin: AdminUrl = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Install a model on the backends; exit code 1 if one of them failed."""
    balancer, _ = _there(admin, config)
    names = [name for text in to or () for name in text.replace(",", " ").split()]
    chosen = [] if "all" in names else names
    with _teller(as_json=as_json) as say:
        _pull(balancer, model, chosen, say, update=update)
    return ExitCode.OK


def warm(
    model: Model,
    on: Annotated[
        list[str] | None,
        typer.Option(
            "--on",
            metavar="NAME",
            help="On this backend; repeatable. Else where the next call would go.",
            autocompletion=backend_names,
        ),
    ] = None,
    admin: AdminUrl = None,
    config: ConfigFile = None,
) -> int:
    """Have a model in memory before somebody asks for it."""
    balancer, _ = _there(admin, config)
    for name in on or ():
        _warm_on(balancer, model, name)
    if not on:
        _warm_anywhere(balancer, model)
    return ExitCode.OK


def unload(
    model: OneOrAll = None,
    everything: Annotated[bool, typer.Option("--all", help="All that is in memory.")] = False,
    admin: AdminUrl = None,
    config: ConfigFile = None,
) -> int:
    """Take a model out of memory, on all backends; it stays installed."""
    if everything == (model is not None):
        raise CommandError("Name a model, or say --all.", code=ExitCode.USAGE)
    balancer, models = _there(admin, config)
    loaded = [shelved.name for shelved in models if shelved.loaded]
    if model is None and not loaded:
        print("Nothing is in memory.")
    for name in loaded if model is None else [model]:
        _good(balancer, "/api/generate", {"model": name, "keep_alive": 0})
        print(f"{_plain(name)}: not in memory any more")
    return ExitCode.OK


def sync(
    model: OneOrAll = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be pulled where.")
    ] = False,
    admin: AdminUrl = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Pull every model to every backend that may have it and lacks it."""
    balancer, models = _there(admin, config)
    wanted = models if model is None else [_find(models, model)]
    lacking = [shelved for shelved in wanted if shelved.lacking]
    if dry_run and as_json:
        _print_json({"pulls": {shelved.name: list(shelved.lacking) for shelved in lacking}})
        return ExitCode.OK
    if not lacking and not as_json:
        print("Every backend has what it may have.")
    failed: list[str] = []
    for shelved in lacking:
        if not as_json:
            print(f"{_plain(shelved.name)} to {_plain(', '.join(shelved.lacking))}")
        if not dry_run:
            failed += _synced(balancer, shelved, as_json=as_json)
    if failed:
        raise CommandError(*failed, code=ExitCode.FAILURE)
    return ExitCode.OK


# -- asking ------------------------------------------------------------------------------------


def _there(admin: str | None, config: str | None) -> tuple[Admin, list[Shelved]]:
    """The balancer, known to be one, and what is where."""
    from balancer.cli import client, shelf

    balancer = client.find(admin, config)
    models = shelf.shelves(balancer.status())
    return replace(balancer, limit_s=LONG_S), models


def _find(models: Sequence[Shelved], name: str) -> Shelved:
    from balancer.core import names

    try:
        wanted = names.parse(name).canonical
    except names.InvalidName as error:
        raise CommandError(f"{_plain(name)}: {error}", code=ExitCode.USAGE) from None
    for shelved in models:
        if names.parse(shelved.name).canonical == wanted:
            return shelved
    told = f"No backend has {_plain(name)}. Install it: ollama-balancer models pull {_plain(name)}"
    raise CommandError(told, code=ExitCode.FAILURE)


def _pull(
    balancer: Admin, model: str, to: Sequence[str], say: Say, *, update: bool = False
) -> None:
    headers = {"X-Balancer-To": ", ".join(to)} if to else {}
    headers |= {"X-Balancer-Update": "1"} if update else {}
    record: Mapping[str, Any] = {}
    for record in balancer.records("/api/pull", {"model": model}, headers):
        say(record)
        if "error" in record:
            raise CommandError(_plain(record["error"]), code=ExitCode.FAILURE)
    if record.get("status") != "success":
        text = "The balancer ended without saying that it succeeded; try again."
        raise CommandError(text, code=ExitCode.FAILURE)


def _synced(balancer: Admin, shelved: Shelved, *, as_json: bool) -> list[str]:
    """What went wrong."""
    try:
        with _teller(as_json=as_json) as say:
            _pull(balancer, shelved.name, shelved.lacking, say)
    except CommandError as error:
        if error.code is not ExitCode.FAILURE:
            raise
        hint = ""
        if "manifest: file does not exist" in str(error):
            hint = ". No registry has it: push it to one, or create it on each of them"
        return [f"{_plain(shelved.name)}: {error}{hint}"]
    return []


def _warm_on(balancer: Admin, model: str, name: str) -> None:
    from urllib.parse import quote

    from balancer.cli import client

    path = f"/_balancer/backends/{quote(name, safe='')}/warm?model={quote(model, safe='')}"
    status, told = balancer.ask("POST", path)
    wrong = told.get("error")
    if status not in (200, 404):
        raise CommandError(client.refusal(balancer.url, status, told), code=ExitCode.FAILURE)
    if wrong:
        text = wrong if status == 404 else f"{name}: {wrong}"
        raise CommandError(_plain(text), code=ExitCode.FAILURE)
    print(f"{_plain(model)} is in memory on {_plain(name)}")


def _warm_anywhere(balancer: Admin, model: str) -> None:
    """An empty call, which loads; a model that only embeds refuses all but its own route."""
    body = {"model": model, "prompt": "", "stream": False}
    status, told = balancer.ask("POST", "/api/generate", body)
    if status == 400 and "does not support" in str(told.get("error")):
        _good(balancer, "/api/embed", {"model": model, "input": []})
    elif status != 200:
        raise _refused(balancer, status, told)
    print(f"{_plain(model)} is in memory")


def _good(balancer: Admin, path: str, body: Mapping[str, Any]) -> None:
    status, told = balancer.ask("POST", path, body)
    if status != 200:
        raise _refused(balancer, status, told)


def _refused(balancer: Admin, status: int, told: Mapping[str, Any]) -> CommandError:
    from balancer.cli import client

    return CommandError(client.refusal(balancer.url, status, told), code=ExitCode.FAILURE)


# -- telling -----------------------------------------------------------------------------------


@contextmanager
def _teller(*, as_json: bool) -> Iterator[Say]:
    """Tells the progress of pulls: bars to people, lines to others."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if as_json:
        yield lambda record: print(json.dumps(record, ensure_ascii=False), flush=True)
    elif console.is_terminal:
        with _bars(console) as say:
            yield say
    else:
        yield _lines()


def _lines() -> Say:
    """Each status once."""
    said = {""}

    def say(record: Mapping[str, Any]) -> None:
        status = _plain(record.get("status", ""))
        if status not in said:
            print(status, flush=True)
        said.add(status)

    return say


@contextmanager
def _bars(console: Any) -> Iterator[Say]:
    """A bar for each layer."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    bars: dict[str, Any] = {}
    lines = _lines()
    with Progress(*columns, console=console) as progress:

        def say(record: Mapping[str, Any]) -> None:
            digest, total = record.get("digest"), record.get("total")
            if digest is None:
                lines(record)
                return
            if digest not in bars:
                bars[digest] = progress.add_task(_plain(record.get("status", "")), total=total)
            progress.update(bars[digest], completed=record.get("completed", 0), total=total)

        yield say


def _plain(text: object) -> str:
    from balancer.cli.screen import plain

    return plain(text)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
