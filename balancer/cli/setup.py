"""Commands around the configuration: check, config."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from balancer.cli.exits import CommandError, ExitCode

if TYPE_CHECKING:
    from balancer.cli.contact import Answer
    from balancer.cli.source import Source
    from balancer.config import Config

PANEL: Final = "Set up"
WIDEST: Final = 40  # a longer list or name of a model moves its own line only

ConfigFile = Annotated[
    str | None, typer.Option("--config", "-c", metavar="FILE", help="Configuration file.")
]


def add_to(app: typer.Typer) -> None:
    """Declare the commands."""
    app.command(rich_help_panel=PANEL)(check)
    config = typer.Typer(
        help="The configuration: what is in force, and the schema for editors.",
        rich_markup_mode=None,
    )
    config.command("show")(show)
    config.command("schema")(schema)
    app.add_typer(config, name="config", rich_help_panel=PANEL)


# -- check -------------------------------------------------------------------------------------


def check(
    file: Annotated[
        str | None, typer.Argument(help="Configuration file; default: the one serve would read.")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", metavar="FILE", help="The same.")
    ] = None,
    contact: Annotated[bool, typer.Option("--contact", help="Ask the hosts, too.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Warnings, and hosts that do not answer, fail.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> int:
    """Check a configuration: every fault at once, with line, column and reason."""
    from balancer.cli import source
    from balancer.config import ConfigError

    found = source.find(file or config)
    try:
        read = found.read()
    except ConfigError as error:
        if not as_json:
            raise CommandError(*map(str, error.problems), code=ExitCode.CONFIG) from None
        problems = [asdict(problem) for problem in error.problems]
        _print_json({"ok": False, "file": found.told, "problems": problems})
        return ExitCode.CONFIG
    except OSError as error:
        raise CommandError(source.unreadable(found, error), code=ExitCode.CONFIG) from None
    answers: list[Answer] | None = None
    if contact:
        read, answers = _contact(read)
    code = _verdict(read, answers, strict=strict)
    if as_json:
        _print_json(
            {
                "ok": code == ExitCode.OK,
                "file": found.told,
                "problems": [],
                "warnings": list(read.warnings),
                "backends": [asdict(answer) for answer in answers or ()],
            }
        )
    else:
        _tell(found, read, answers)
    return code


def _contact(config: Config) -> tuple[Config, list[Answer]]:
    """With the hosts that are found, and what all of them say."""
    from balancer.cli import contact

    config = contact.joined(config)
    answers = contact.ask_all(config)
    lost = contact.lost(config, answers) if any(answer.ok for answer in answers) else []
    return replace(config, warnings=(*config.warnings, *lost)), answers


def _verdict(config: Config, answers: list[Answer] | None, *, strict: bool) -> int:
    """*answers* None: nobody was asked."""
    if answers is not None and not any(answer.ok for answer in answers):
        return ExitCode.NO_BACKEND
    if strict and (config.warnings or not all(answer.ok for answer in answers or ())):
        return ExitCode.FAILURE
    return ExitCode.OK


def _tell(found: Source, config: Config, answers: list[Answer] | None) -> None:
    from balancer.cli.screen import plain, table

    count = len(config.backends)
    backends = f"{count} backend{'' if count == 1 else 's'}"
    looking = ", using discovery" if config.discovery.sources else ""
    print(f"{found.told or 'no file, defaults'}: good, {backends}{looking}")
    for warning in config.warnings:
        print(f"! {warning}")
    if answers is None:
        return
    if not answers:
        print("! There is no backend to ask.")
        return
    rows = [("BACKEND", "URL", "VERSION", "MODELS", "")]
    rows += [
        (plain(a.name), a.url, plain(a.version or "–"), str(a.models) if a.ok else "–", a.told)
        for a in answers
    ]
    print(*table(rows), sep="\n")
    for answer in answers:
        if answer.hint:
            print(f"! {answer.name}: {answer.hint}")


# -- config ------------------------------------------------------------------------------------


def show(
    config: ConfigFile = None,
    origin: Annotated[bool, typer.Option("--origin", help="Where each value comes from.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Everything in force: file, environment and defaults; secrets masked."""
    from balancer.cli import source
    from balancer.cli.screen import table
    from balancer.config import effective, to_yaml

    read = source.read_or_refuse(source.find(config))
    if as_json:
        settings = [setting._asdict() for setting in effective(read)]
        _print_json({"settings": settings} if origin else dict(read.written))
    elif origin:
        rows = [("SETTING", "VALUE", "FROM"), *effective(read)]
        print(*table(rows, indent="", most=WIDEST), sep="\n")
    else:
        print(to_yaml(read), end="")


def schema() -> None:
    """The JSON Schema of the file, for editors."""
    from balancer.config import schema as made

    _print_json(made())


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
