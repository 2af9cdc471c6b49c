"""The command that finds out what is wrong, with everything at once: doctor."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from balancer import __version__
from balancer.cli.exits import CommandError, ExitCode
from balancer.cli.inspect import AdminUrl, ConfigFile, about
from balancer.cli.run import Backends, split_hosts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from balancer.cli.doctor_asking import Door
    from balancer.cli.doctor_checks import Finding
    from balancer.cli.doctor_facts import Facts
    from balancer.cli.source import Source
    from balancer.config import Config

PANEL: Final = "Inspect"
DOCTOR_VERSION: Final = 1
LIMIT_S: Final = 5.0


def add_to(app: typer.Typer) -> None:
    """Declare the command."""
    app.command(rich_help_panel=PANEL)(doctor)


def doctor(
    admin: AdminUrl = None,
    config: ConfigFile = None,
    backend: Backends = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
    bundle: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write what was found, configuration and status, to a zip file."
        ),
    ] = None,
) -> int:
    """What is wrong with hosts, models and this machine, and what to do; nothing is changed."""
    from balancer.cli import source
    from balancer.cli.doctor_checks import judge

    if bundle is not None and bundle.exists():
        told = f"{bundle} is there already. Name another file."
        raise CommandError(told, code=ExitCode.FAILURE)
    found = source.find(config, {"backends": split_hosts(backend or [])})
    facts, read = _facts(found, admin)
    findings = judge(facts)
    code = _code(facts, findings, asked=admin is not None)
    doc = _document(facts, findings, ok=code == ExitCode.OK)
    if as_json:
        print(json.dumps(doc, indent=2, ensure_ascii=False))
    else:
        _tell(facts, findings)
    if bundle is not None:
        _write(bundle, facts, read, doc)
        if not as_json:
            print(f"\nWritten to {bundle}. Read it before you send it.")
    return code


# -- facts -------------------------------------------------------------------------------------


def _facts(found: Source, admin: str | None) -> tuple[Facts, Config | None]:
    """Everything that can be known from here."""
    from balancer.cli import client, doctor_asking
    from balancer.cli.doctor_facts import Facts

    read, problems = _read(found)
    balancer = client.find(admin, found.told, guess=True)
    status, refusal = _status(balancer)
    if read is not None and status is None:
        read = _joined(read)
    limit_s = LIMIT_S if read is None else max(read.health.timeout_s, LIMIT_S)
    hosts = doctor_asking.ask_all(
        _doors(read, status),
        limit_s,
        time.monotonic,
        time.time,  # noqa: TID251 - clocks of hosts are compared with ours
    )
    listen = read.server.listen if read else ()
    facts = Facts(
        hosts=tuple(hosts),
        machine=doctor_asking.machine(
            os.environ, listen, served=status is not None or bool(refusal)
        ),
        config=read,
        file=found.told,
        problems=problems,
        admin=balancer.url,
        status=status,
        refusal=refusal,
    )
    return facts, read


def _read(found: Source) -> tuple[Config | None, tuple[str, ...]]:
    """The configuration, or its faults; those of flags alone are wrong usage."""
    from balancer.cli.source import FLAGS, unreadable
    from balancer.config import ConfigError

    try:
        return found.read(), ()
    except ConfigError as error:
        told = tuple(map(str, error.problems))
        if all(problem.source == FLAGS for problem in error.problems):
            raise CommandError(*told, code=ExitCode.USAGE) from None
        return None, told
    except OSError as error:
        return None, (unreadable(found, error),)


def _joined(read: Config) -> Config:
    """With the hosts that the balancer would find at its start."""
    if not read.discovery.candidates:
        return read
    import asyncio

    from balancer.config.discovery import join
    from balancer.net.discovery import first_look

    return join(read, asyncio.run(first_look(read)).found)


def _status(balancer: Any) -> tuple[Mapping[str, Any] | None, str]:
    """The status document, or why a balancer that is there does not show it."""
    try:
        return balancer.status(), ""
    except CommandError as error:
        return None, "" if error.code == ExitCode.NO_ADMIN else error.lines[0]


def _doors(read: Config | None, status: Mapping[str, Any] | None) -> list[Door]:
    """The hosts of the configuration, and those that only the running balancer knows."""
    from balancer.app import targets
    from balancer.cli.doctor_asking import Door

    doors = {}
    if read is not None:
        try:
            reached = targets(read)
        except OSError as error:
            told = f"A certificate cannot be used: {error.strerror or error}"
            raise CommandError(told, code=ExitCode.CONFIG) from None
        for spec in read.backends:
            target = reached[spec.name]
            tls = None if isinstance(target.tls, bool) else target.tls
            if spec.enabled:
                doors[spec.url] = Door(
                    spec.name, target.url, target.headers, tls, target.server_name
                )
    for backend in status["backends"] if status else ():
        doors.setdefault(backend["url"], Door(backend["name"], backend["url"]))
    return list(doors.values())


# -- telling -----------------------------------------------------------------------------------


def _code(facts: Facts, findings: Sequence[Finding], *, asked: bool) -> ExitCode:
    from balancer.cli.doctor_checks import Severity

    if facts.problems:
        return ExitCode.CONFIG
    if asked and facts.status is None and not facts.refusal:
        return ExitCode.NO_ADMIN
    if not facts.answering:
        return ExitCode.NO_BACKEND
    errors = any(finding.severity is Severity.ERROR for finding in findings)
    return ExitCode.FAILURE if errors else ExitCode.OK


def _document(facts: Facts, findings: Sequence[Finding], *, ok: bool) -> dict[str, Any]:
    return {
        "doctor_version": DOCTOR_VERSION,
        "version": __version__,
        "ok": ok,
        "file": facts.file,
        "balancer": facts.admin if facts.status is not None else None,
        "hosts": [
            {
                "name": host.name,
                "url": host.url,
                "up": host.up,
                "version": host.version,
                "latency_ms": round(1000 * host.latency_s),
                "models": len(host.models),
                "loaded": len(host.loaded),
            }
            for host in facts.hosts
        ],
        "findings": [finding.document() for finding in findings],
    }


def _tell(facts: Facts, findings: Sequence[Finding]) -> None:
    from balancer.cli.screen import plain

    for finding in findings:
        print(f"{finding.severity.name:<8} {plain(finding.where)}: {plain(finding.what)}")
        print(f"{'':<8} {plain(finding.why)}")
        print(f"{'':<8} → {plain(finding.next)}")
    print(_summary(facts, findings))


def _summary(facts: Facts, findings: Sequence[Finding]) -> str:
    """One line: how it is on the whole."""
    from balancer.cli.doctor_checks import Severity

    counts = [
        (sum(finding.severity is severity for finding in findings), severity.name.lower())
        for severity in Severity
    ]
    worse = [f"{n} {word}{'s' if n > 1 and word != 'info' else ''}" for n, word in counts if n]
    models = {model.name for host in facts.answering for model in host.models}
    state = f"{len(facts.answering)} of {len(facts.hosts)} hosts up, {len(models)} models"
    if facts.status is None and not facts.refusal:
        told = f"{', '.join(worse) or 'No fault found'}: {state}."
        return f"{told} No balancer answers at {facts.admin}; start one: ollama-balancer"
    balancer = "does not let us look" if facts.status is None else "serves"
    told = f"{', '.join(worse) or 'Nothing is wrong'}: {state}"
    return f"{told}; the balancer at {facts.admin} {balancer}."


def _write(file: Path, facts: Facts, read: Config | None, doc: Mapping[str, Any]) -> None:
    from balancer.cli import doctor_bundle

    members = doctor_bundle.members(read, facts.status, doc, about())
    try:
        doctor_bundle.write(file, members, doctor_bundle.secrets(read, os.environ))
    except OSError as error:
        told = f"Cannot write {file}: {error.strerror or error}"
        raise CommandError(told, code=ExitCode.FAILURE) from None
