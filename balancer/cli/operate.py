"""Commands that steer a running balancer: reload."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

import typer

from balancer.cli.exits import CommandError, ExitCode
from balancer.cli.inspect import AdminUrl, ConfigFile

PANEL: Final = "Operate"


def add_to(app: typer.Typer) -> None:
    """Declare the commands."""
    app.command(rich_help_panel=PANEL)(reload)


def reload(admin: AdminUrl = None, config: ConfigFile = None) -> int:
    """Let the running balancer read its configuration again; a faulty one changes nothing."""
    from balancer.cli import client

    balancer = client.find(admin, config)
    status, told = balancer.ask("POST", "/_balancer/reload", good="reloaded")
    problems = told.get("problems")
    if status == 422 and isinstance(problems, list):
        head = f"Reload rejected, {_previous(told)}. Nothing was changed."
        raise CommandError(head, *map(str, problems), code=ExitCode.CONFIG)
    if status != 200:
        raise CommandError(client.refusal(balancer.url, status, told), code=ExitCode.FAILURE)
    changed, restart = told.get("changed") or [], told.get("needs_restart") or []
    print("Reloaded.", f"Changed: {', '.join(changed)}" if changed else "Nothing has changed.")
    if restart:
        print(f"! Only a restart takes over: {', '.join(restart)}")
    return ExitCode.OK


def _previous(told: Mapping[str, Any]) -> str:
    """What is in force instead, and since when; an older balancer does not say."""
    from balancer.cli.screen import moment

    running, age_s = "still running the previous configuration", told.get("loaded_s_ago")
    if not isinstance(age_s, int):
        return running
    return f"{running} (loaded {moment(time.time() - age_s)})"  # noqa: TID251 - a person asks now
