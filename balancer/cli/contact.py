"""Asking the configured hosts once, as the balancer would reach them."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from balancer.app import targets
from balancer.cli.exits import CommandError, ExitCode
from balancer.config import Config, join
from balancer.core import names
from balancer.core.aliases import Aliases
from balancer.core.verdicts import FailureKind
from balancer.net.discovery import first_look
from balancer.net.tasks import Tasks
from balancer.net.upstream import ClientUpstream, Target, UpstreamError


@dataclass(frozen=True, slots=True)
class Answer:
    """What a host said. `told`: what is wrong; `hint`: what to do; `names`: of its models."""

    name: str
    url: str
    ok: bool
    version: str | None = None
    models: int = 0
    told: str = ""
    hint: str = ""
    names: tuple[str, ...] = ()


def joined(config: Config) -> Config:
    """With the hosts that the balancer would find at its start, and what it would say of others."""
    looked = asyncio.run(first_look(config))
    found = join(config, looked.found)
    return replace(found, warnings=(*found.warnings, *looked.notes))


def ask_all(config: Config) -> list[Answer]:
    """Ask every enabled backend for version and models, all at once."""
    try:
        reached = targets(config)
    except OSError as error:
        told = f"A certificate cannot be used: {error.strerror or error}"
        raise CommandError(told, code=ExitCode.CONFIG) from None
    names = [spec.name for spec in config.backends if spec.enabled]
    return asyncio.run(_ask_all({name: reached[name] for name in names}, config.health.timeout_s))


async def _ask_all(reached: dict[str, Target], limit_s: float) -> list[Answer]:
    tasks = Tasks(lambda _: None, asyncio.get_running_loop().time)
    upstream = ClientUpstream(reached, tasks)
    try:
        asked = (_ask(upstream, name, target, limit_s) for name, target in reached.items())
        return await asyncio.gather(*asked)
    finally:
        await upstream.close()


async def _ask(upstream: ClientUpstream, name: str, target: Target, limit_s: float) -> Answer:
    try:
        status, _, body = await upstream.ask(target, "GET", "/api/version", limit_s=limit_s)
        version = _field(body, "version")
        if status in (401, 403):
            hint = 'Its reverse proxy wants a credential: the backend\'s "auth" block.'
            return Answer(name, target.url, ok=False, told=f"refused: status {status}", hint=hint)
        if status != 200 or not isinstance(version, str):
            told = f"is no Ollama: status {status} for /api/version"
            return Answer(name, target.url, ok=False, told=told)
        _, _, body = await upstream.ask(target, "GET", "/api/tags", limit_s=limit_s)
    except UpstreamError as error:
        hint = hint_for(target.url, error.failure.text)
        return Answer(name, target.url, ok=False, told=error.failure.text, hint=hint)
    models = _field(body, "models")
    rows = models if isinstance(models, list) else []
    held = tuple(str(row.get("name")) for row in rows if isinstance(row, dict))
    return Answer(name, target.url, ok=True, version=version, models=len(rows), names=held)


def lost(config: Config, answers: list[Answer]) -> list[str]:
    """Of aliases for which no host that answers has a model, as warnings."""
    held = {name.canonical for a in answers for text in a.names if (name := _parsed(text))}
    return [
        f"models.aliases.{alias.name}: no host that answers has what it stands for "
        f"({', '.join(alias.models)}); calls for it are answered with 404."
        for alias in Aliases(config.models.aliases)
        if not any(names.parse(model).canonical in held for model in alias.models)
    ]


def _parsed(text: str) -> names.ModelName | None:
    with suppress(names.InvalidName):
        return names.parse(text)
    return None


def _field(body: bytes, name: str) -> object:
    try:
        told = json.loads(body)
    except ValueError:
        return None
    return told.get(name) if isinstance(told, dict) else None


def hint_for(url: str, error: str) -> str:
    """What to do about a host that cannot be reached for that reason; empty: nobody knows."""
    parts = urlsplit(url)
    if parts.scheme == "http" and parts.port in (80, None):
        return (
            f'"http://{parts.hostname}" means port 80, as in OLLAMA_HOST. Ollama listens on '
            f"11434: write {parts.hostname}:11434."
        )
    if any(word in error for word in ("not known", "resolution", "no address")):
        return f"This machine cannot resolve {parts.hostname}. Check the spelling, or write its IP."
    if error.startswith((FailureKind.CONNECT.value, FailureKind.CONNECT_TIMEOUT.value)):
        return (
            "Is Ollama running there, and does it listen beyond loopback? There: "
            "OLLAMA_HOST=0.0.0.0 (systemctl edit ollama), and a firewall that lets you in."
        )
    return ""
