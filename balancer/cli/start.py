"""The start screen: who we are, which backends there are, where to call, what to try."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

from balancer import __version__
from balancer.app import Balancer
from balancer.cli import screen
from balancer.config import EVERYWHERE, Config, Listen

FIRST_CHECKS_S: Final = 1.0
NO_BACKENDS: Final = (
    "No backends: calls are answered 503. Name your Ollama hosts: ollama-balancer -b gpu1, "
    "BALANCER_BACKENDS=gpu1, or backends: [gpu1] in the file. To look around: ollama-balancer demo"
)


async def first_checks(balancer: Balancer, limit_s: float = FIRST_CHECKS_S) -> None:
    """Wait until every backend has told its models or failed; no longer than the limit."""
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while not all(_is_known(view) for view in balancer.admin.state()["backends"]):
                await asyncio.sleep(0.02)


def _is_known(view: screen.Document) -> bool:
    return view["switch"] == "disabled" or view["up"] is False or bool(view["models"])


def lines(balancer: Balancer, subject: str) -> list[str]:
    """The whole screen; *subject* is what the first line says beside the version."""
    config, doc = balancer.config, balancer.admin.state()
    told = [f"ollama-balancer {__version__} — {subject}"]
    if doc["backends"]:
        told += screen.backends(doc, sources(config))
    else:
        told.append(NO_BACKENDS)
    for address, listen in zip(balancer.addresses, config.server.listen, strict=False):
        told.append(f"Listening  {address:<29} {_reach(config, listen)}".rstrip())
    told.append(f"Status     ollama-balancer status{_admin(balancer)}")
    told += try_it(balancer)
    told += screen.skew(doc, balancer.catalog.version(config.models.version))
    return told + [f"! {warning}" for warning in config.warnings]


def sources(config: Config) -> dict[str, str]:
    """Where each backend was written, by name."""
    if config.demo.enabled:
        return {spec.name: "simulated" for spec in config.backends}
    told = {}
    for index, spec in enumerate(config.backends):
        origin = config.origins.get(f"backends[{index}].url", "")
        where, _, what = origin.partition(":")
        told[spec.name] = {"file": f"line {what}", "env": what, "flag": "--backend"}.get(where, "")
    return told


def try_it(balancer: Balancer) -> list[str]:
    """Something to paste, with a model that is there."""
    address = callable_address(balancer)
    if address is None:
        return []
    model = some_model(balancer)
    if model is None:
        return [f"Try it     curl http://{address}/api/tags"]
    call = f'curl http://{address}/api/generate -d \'{{"model":"{model}","prompt":"Hi"}}\''
    return [f"Try it     OLLAMA_HOST={address} ollama run {model}", f"           {call}"]


def callable_address(balancer: Balancer) -> str | None:
    """Host and port for clients on this machine; None if there is only a unix socket."""
    for url in balancer.addresses:
        if url.startswith("http://"):
            host, _, port = url.removeprefix("http://").rpartition(":")
            return f"{'127.0.0.1' if host in ('0.0.0.0', '[::]') else host}:{port}"
    return None


def some_model(balancer: Balancer) -> str | None:
    """A model that can chat, by its usual name; rather one that is in memory."""
    catalog = balancer.catalog
    chatty = [
        (catalog.resident(name, model) is None, catalog.size(model), catalog.shown(model))
        for name, member in balancer.pool.members.items()
        for model in catalog.listed(name)
        if member.health.up and not catalog.is_embedding_only(model)
    ]
    return screen.plain(min(chatty)[2]).removesuffix(":latest") if chatty else None


def _reach(config: Config, listen: Listen) -> str:
    if config.demo.enabled:
        return "(this machine only)"
    if listen.is_local:
        return "(this machine only; share with --listen 0.0.0.0:11435 and BALANCER_API_KEY)"
    if config.auth.anonymous == EVERYWHERE:
        return "(open to everybody who can reach it: nobody is asked for a key)"
    return "(callers from elsewhere need a key)" if config.auth.keys else ""


def _admin(balancer: Balancer) -> str:
    address = callable_address(balancer)
    return "" if address in (None, "127.0.0.1:11435") else f" --admin {address}"
