"""Commands that steer single backends of a running balancer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from balancer.cli.completing import backend_names
from balancer.cli.exits import CommandError, ExitCode
from balancer.cli.inspect import AdminUrl, ConfigFile, pause

if TYPE_CHECKING:
    from balancer.cli.client import Admin

PANEL: Final = "Operate"
POLL_S: Final = 0.5

Names = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME", help="Backends, as `list` names them.", autocompletion=backend_names
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="For scripts.")]


def add_to(app: typer.Typer) -> None:
    """Declare the commands."""
    backends = typer.Typer(
        help="The backends: list, drain, resume, disable, reset, check.",
        rich_markup_mode=None,
    )
    for command in (listed, drain, resume, disable, reset, check):
        backends.command("list" if command is listed else None)(command)
    app.add_typer(backends, name="backends", rich_help_panel=PANEL)


def listed(admin: AdminUrl = None, config: ConfigFile = None, as_json: AsJson = False) -> int:
    """State, switch and breaker of each; exit code 5 if none is healthy."""
    from balancer.cli import client, screen

    doc = client.find(admin, config).status()
    if as_json:
        _print_json({"backends": doc["backends"]})
    else:
        print(*screen.listing(doc), sep="\n")
    return ExitCode.OK if screen.is_healthy(doc) else ExitCode.NO_BACKEND


def drain(
    names: Names,
    wait: Annotated[
        bool, typer.Option("--wait", help="Come back when nothing runs there any more.")
    ] = False,
    timeout: Annotated[
        str | None, typer.Option(help="With --wait: at most so long, e.g. 90s or 10m.")
    ] = None,
    admin: AdminUrl = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Send nothing new, and let what runs end."""
    limit_s = _seconds(timeout)
    if timeout is not None and not wait:
        raise CommandError("--timeout is for --wait.", code=ExitCode.USAGE)
    from balancer.cli import client

    balancer = client.find(admin, config)
    answers = [_ask(balancer, name, "drain") for name in names]
    if not wait:
        _tell(answers, as_json=as_json)
        return ExitCode.OK
    if not as_json:
        _tell(answers, as_json=False)
    left = _wait(balancer, names, limit_s)
    if as_json:
        told = [answer | {"drained": answer["backend"]["name"] not in left} for answer in answers]
        _tell(told, as_json=True)
    if left:
        running = ", ".join(f"{name}: {count} still running" for name, count in left.items())
        text = f"Not drained after {timeout}: {running}. They go on draining."
        raise CommandError(text, code=ExitCode.FAILURE)
    if not as_json:
        print("Nothing runs there any more.")
    return ExitCode.OK


def resume(
    names: Names, admin: AdminUrl = None, config: ConfigFile = None, as_json: AsJson = False
) -> int:
    """Use it again."""
    return _do(names, "resume", admin, config, as_json=as_json)


def disable(
    names: Names, admin: AdminUrl = None, config: ConfigFile = None, as_json: AsJson = False
) -> int:
    """Send nothing new, not even trials."""
    return _do(names, "disable", admin, config, as_json=as_json)


def reset(
    names: Names, admin: AdminUrl = None, config: ConfigFile = None, as_json: AsJson = False
) -> int:
    """Close its breaker and its models'."""
    return _do(names, "reset", admin, config, as_json=as_json)


def check(
    names: Names, admin: AdminUrl = None, config: ConfigFile = None, as_json: AsJson = False
) -> int:
    """Make a health check now."""
    from balancer.cli import client

    balancer = client.find(admin, config)
    answers = [_ask(balancer, name, "check") for name in names]
    _tell(answers, as_json=as_json)
    good = [answer["check"]["ok"] for answer in answers]
    if not any(good):
        return ExitCode.NO_BACKEND
    return ExitCode.OK if all(good) else ExitCode.FAILURE


def _do(
    names: Sequence[str], action: str, admin: str | None, config: str | None, *, as_json: bool
) -> int:
    from balancer.cli import client

    balancer = client.find(admin, config)
    _tell([_ask(balancer, name, action) for name in names], as_json=as_json)
    return ExitCode.OK


def _ask(balancer: Admin, name: str, action: str) -> dict[str, Any]:
    """The answer for one backend; whatever was done to those before it stays done."""
    from urllib.parse import quote

    from balancer.cli import client
    from balancer.cli.screen import plain

    path = f"/_balancer/backends/{quote(name, safe='')}/{action}"
    status, told = balancer.ask("POST", path, good="backend")
    if status == 404 and "backends" in told:
        text = plain(told["error"])
        raise CommandError(text[:1].upper() + text[1:], code=ExitCode.FAILURE)
    if status != 200:
        raise CommandError(client.refusal(balancer.url, status, told), code=ExitCode.FAILURE)
    return dict(told)


def _wait(balancer: Admin, names: Sequence[str], limit_s: float | None) -> dict[str, int]:
    """Until nothing runs on any of them; what is left when the limit is over, by name."""
    waited_s = 0.0
    while True:
        left = _busy(balancer.status(), names)
        if not left or (limit_s is not None and waited_s >= limit_s):
            return left
        pause(POLL_S)
        waited_s += POLL_S


def _busy(doc: Mapping[str, Any], names: Sequence[str]) -> dict[str, int]:
    """Calls and loads there; who has left the balancer meanwhile is not busy."""
    running = {b["name"]: b["in_flight"] + bool(b["loading"]) for b in doc["backends"]}
    return {name: running[name] for name in names if running.get(name)}


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    from balancer.config.units import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise CommandError(f"--timeout {text}: {error}", code=ExitCode.USAGE) from None


def _tell(answers: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    if as_json:
        _print_json({"answers": list(answers)})
        return
    for answer in answers:
        print(_line(answer))


def _line(answer: Mapping[str, Any]) -> str:
    """One backend, and what became of it."""
    from balancer.cli.screen import plain

    backend = answer["backend"]
    head = f"{plain(backend['name'])}: {backend['state']}"
    if "check" in answer:
        seen = answer["check"]
        if not seen["ok"]:
            return f"{head}; the check failed: {plain(seen['error'])}"
        return f"{head}; Ollama {plain(seen['version'])} answered in {seen['latency_s']:.3f} s"
    told = f"{head}, {backend['in_flight']} running"
    note = "" if answer["changed"] else "nothing has changed"
    note = plain(answer.get("note", note))
    return f"{told} ({note})" if note else told


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
