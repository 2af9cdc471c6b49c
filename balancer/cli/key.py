"""
API keys: make, list and revoke those of `auth.keys_file`, and hash one.

Laws:
- Only the keys file is written: replaced in one go, so that a reload never reads half of it.
- A key is shown once, where it is made. Kept, listed and told is at most its hash, or nothing.
"""

from __future__ import annotations

import getpass
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from balancer.cli.exits import CommandError, ExitCode
from balancer.cli.inspect import AdminUrl, ConfigFile

if TYPE_CHECKING:
    from balancer.config.blocks import KeyBlock

PANEL: Final = "Operate"
PREFIX: Final = "olb-"  # by which people, and scanners for secrets, know a key of ours
KEY_BYTES: Final = 24
MODE: Final = 0o600
NOBODY: Final = "anonymous"

File = Annotated[
    str | None,
    typer.Option("--file", metavar="FILE", help="The keys file; default: auth.keys_file."),
]
Reload = Annotated[
    bool, typer.Option("--reload", help="Let the running balancer take it over at once.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For scripts.")]


def add_to(app: typer.Typer) -> None:
    """Declare the commands."""
    keys = typer.Typer(help="API keys: new, list, revoke, hash.", rich_markup_mode=None)
    for command in (new, listed, revoke, hashed):
        names: dict[Any, str] = {listed: "list", hashed: "hash"}
        keys.command(names.get(command))(command)
    app.add_typer(keys, name="key", rich_help_panel=PANEL)


# -- commands ----------------------------------------------------------------------------------


def new(
    name: Annotated[str, typer.Argument(help="Whose it is; logs and metrics call it so.")],
    role: Annotated[str, typer.Option(help="user, or admin: may also pull and steer.")] = "user",
    models: Annotated[
        list[str] | None,
        typer.Option("--models", metavar="GLOB", help="Only these models; repeatable."),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="DATE", help="Its last day, or an instant.")
    ] = None,
    priority: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="interactive, batch or a number (below 50: batch): the most it may claim.",
        ),
    ] = None,
    rpm: Annotated[
        str | None, typer.Option(metavar="N", help="Calls a minute; -1: no limit.")
    ] = None,
    tokens_per_minute: Annotated[
        str | None, typer.Option(metavar="N", help="Of prompts and answers.")
    ] = None,
    slots: Annotated[
        str | None, typer.Option(metavar="N", help="Calls at once; more wait.")
    ] = None,
    max_num_predict: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens of one answer.")
    ] = None,
    file: File = None,
    reload: Reload = False,
    admin: AdminUrl = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Make a key, write its hash into the keys file, and show it this once."""
    from balancer.config.keys import digest

    place = _place(file, config)
    text = PREFIX + os.urandom(KEY_BYTES).hex()
    globs = ",".join(part.strip() for each in models or () for part in each.split(","))
    more = {
        "models": globs or None,
        "expires": expires,
        "priority": priority,
        "rpm": rpm,
        "tokens_per_minute": tokens_per_minute,
        "slots": slots,
        "max_num_predict": max_num_predict,
    }
    given = {word: told for word, told in more.items() if told}
    block = _check_new(name, role, given)
    line = " ".join([name, role, f"sha256:{digest(text).hex()}", *map("=".join, given.items())])
    with _locked(place.path):
        lines = _read(place.path, missing=[])
        if name in (known := _named(lines, place.path)) or name in place.elsewhere:
            where = place.path if name in known else "the configuration (auth.keys)"
            raise _failure(f"There is a key {name!r} already, in {where}. Take another name.")
        _write(place.path, [*lines, line])
    if as_json:
        print(json.dumps(_row(block) | {"key": text, "file": str(place.path)}, indent=2))
    else:
        print(text, flush=True)
        _note(f"Key {name!r} ({role}) is in {place.path}. This is the only time that it is shown.")
    _take_over(place, admin, config, reload=reload)
    return ExitCode.OK


def listed(file: File = None, config: ConfigFile = None, as_json: AsJson = False) -> int:
    """The keys of the keys file: name, role, models, expiry, limits; never the keys."""
    from balancer.cli.screen import table

    place = _place(file, config)
    blocks = _named(_read(place.path), place.path).values()
    rows = [_row(block) for block in blocks]
    if as_json:
        print(json.dumps({"file": str(place.path), "keys": rows}, indent=2, ensure_ascii=False))
        return ExitCode.OK
    told = [("NAME", "ROLE", "MODELS", "EXPIRES", "PRIORITY", "LIMITS")]
    for row in rows:
        end = (row["expires"] or "never") + (" (expired)" if row["expired"] else "")
        limits = " ".join(f"{limit}={most}" for limit, most in row["limits"].items())
        priority = "" if row["priority"] is None else str(row["priority"])
        told.append((row["name"], row["role"], ",".join(row["models"]), end, priority, limits))
    print(*table(told, indent=""), sep="\n")
    return ExitCode.OK


def revoke(
    name: Annotated[str, typer.Argument(help="As `list` shows it.")],
    file: File = None,
    reload: Reload = False,
    admin: AdminUrl = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Take a key out of the keys file."""
    from balancer.config.keys import read_line

    place = _place(file, config)
    with _locked(place.path):
        lines = _read(place.path)
        known = _named(lines, place.path)
        if name not in known:
            raise _failure(_not_there(name, list(known), place))

        def stays(line: str) -> bool:
            block = read_line(line)
            return block is None or block.name != name

        _write(place.path, list(filter(stays, lines)))
    if as_json:
        print(json.dumps({"revoked": name, "file": str(place.path)}))
    else:
        _note(f"Key {name!r} is no longer in {place.path}.")
    _take_over(place, admin, config, reload=reload)
    return ExitCode.OK


def hashed(as_json: AsJson = False) -> int:
    """Read a key from stdin and print its hash, as `auth.keys` and the keys file take it."""
    from balancer.config.keys import digest, weakness

    text = ""
    with suppress(EOFError, UnicodeDecodeError):  # Ctrl+D; bytes that are no text are no key
        tty = sys.stdin.isatty()
        text = (getpass.getpass("Key: ") if tty else sys.stdin.readline()).strip()
    if not text:
        raise CommandError("No key on stdin: one line is read.", code=ExitCode.USAGE)
    try:
        told = f"sha256:{digest(text).hex()}"
    except ValueError as error:
        raise CommandError(f"That cannot be a key: {error}", code=ExitCode.USAGE) from None
    print(json.dumps({"hash": told}) if as_json else told)
    weak = weakness(text)
    if weak:
        _note(f"! This key {weak}")
    return ExitCode.OK


# -- the keys file -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """
    Where keys are written.

    Args:
        is_configured: The configuration names that file.
        elsewhere: Names of keys that stand in the configuration itself.
    """

    path: Path
    is_configured: bool
    elsewhere: Sequence[str]


def _place(file: str | None, config: str | None) -> _Place:
    from balancer.cli import source
    from balancer.config.keys import key_places

    found = source.find(config)
    try:
        text = found.file.read_text(encoding="utf-8") if found.file is not None else ""
    except OSError as error:
        raise CommandError(source.unreadable(found, error), code=ExitCode.CONFIG) from None
    except UnicodeDecodeError:
        told = f"{found.told} is not a text in UTF-8."
        raise CommandError(told, code=ExitCode.CONFIG) from None
    named, elsewhere = key_places(text, found.env, found.told or "")
    if not file and not named:
        where = found.told or "a configuration (ollama-balancer init writes one)"
        told = f"There is no keys file: name one, auth.keys_file in {where}, or say --file FILE."
        raise _usage(told)
    configured = Path(named).resolve() if named else None
    path = Path(file).resolve() if file else configured  # not a link, but what it leads to
    assert path is not None  # noqa: S101 - one of them is named
    return _Place(path, path == configured, elsewhere)


def _check_new(name: str, role: str, more: Mapping[str, str]) -> KeyBlock:
    """What the key will be, without the key itself."""
    from balancer.config.keys import describe

    told = {"NAME": name, "--role": role} | {_option(key): text for key, text in more.items()}
    for option, text in told.items():
        if " " in text or not text.isprintable():
            raise _usage(f"{option}: {text!r} has a space in it.")
    if name == NOBODY:
        raise _usage(f"NAME: no key may be named {name!r}.")
    try:
        block = describe(name, role, **more)
    except ValueError as error:
        key, _, wrong = str(error).partition(": ")
        raise _usage(f"{'NAME' if key == 'name' else _option(key)}: {wrong}") from None
    if _row(block)["expired"]:
        raise _usage(f"--expires: {more['expires']} has passed already.")
    return block


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _named(lines: Sequence[str], path: Path) -> dict[str, KeyBlock]:
    """The keys of a file by name; what is no key and no comment is refused."""
    from balancer.config.keys import read_line

    found: dict[str, KeyBlock] = {}
    for number, line in enumerate(lines, 1):
        try:
            block = read_line(line)
        except ValueError as error:
            told = f"{path}:{number}: needs {error}. Nothing was changed."
            raise CommandError(told, code=ExitCode.CONFIG) from None
        if block is not None:
            found[block.name] = block
    return found


def _read(path: Path, missing: list[str] | None = None) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        if missing is not None:
            return missing
        told = f"There is no keys file {path} yet. Make a key: ollama-balancer key new NAME"
        raise _failure(told) from None
    except UnicodeDecodeError:
        raise _failure(f"{path} is not a text in UTF-8.") from None
    except OSError as error:
        raise _failure(f"Cannot read {path}: {error.strerror or error}.") from None


def _write(path: Path, lines: Sequence[str]) -> None:
    """Replace the file in one go; its mode and owner stay, a new one is its owner's alone."""
    text = "".join(f"{line}\n" for line in lines)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        old = path.stat() if path.exists() else None
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            if old is not None:
                if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(handle, old.st_uid, old.st_gid)
                os.fchmod(handle, old.st_mode & 0o7777)
            stream.write(text)
            stream.flush()
            os.fsync(handle)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _failure(f"Cannot write {path}: {error.strerror or error}.") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One command at a time changes files of that directory: the later sees the earlier's key."""
    import fcntl

    try:
        handle = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise _failure(f"Cannot open {path.parent}: {error.strerror or error}.") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# -- what is told ------------------------------------------------------------------------------


def _row(block: KeyBlock) -> dict[str, Any]:
    from balancer.config.keys import LIMITS
    from balancer.config.units import format_instant

    ends = block.expires
    return {
        "name": block.name,
        "role": block.role,
        "models": list(block.models),
        "expires": None if ends is None else format_instant(ends),
        "expired": ends is not None and time.time() >= ends,  # noqa: TID251 - a person asks now
        "priority": block.priority,
        "limits": {limit: most for limit in LIMITS if (most := getattr(block, limit)) is not None},
    }


def _not_there(name: str, known: list[str], place: _Place) -> str:
    from balancer.config.problems import suggestion

    if name in place.elsewhere:
        return f"The key {name!r} stands in the configuration (auth.keys): take it out there."
    return f"There is no key {name!r} in {place.path}.{suggestion(name, known)}"


def _take_over(place: _Place, admin: str | None, config: str | None, *, reload: bool) -> None:
    """The running balancer hears of it, or the user hears how."""
    if not place.is_configured:
        _note(f"The configuration does not read it yet: auth: {{keys_file: {place.path}}}")
    if not reload:
        _note("A running balancer takes it over with: ollama-balancer reload")
        return
    from balancer.cli import operate

    with redirect_stdout(sys.stderr):
        operate.reload(admin, config)


def _note(text: str) -> None:
    """To people; stdout is for what scripts want."""
    print(text, file=sys.stderr)


def _usage(text: str) -> CommandError:
    return CommandError(text, code=ExitCode.USAGE)


def _failure(text: str) -> CommandError:
    return CommandError(text, code=ExitCode.FAILURE)
