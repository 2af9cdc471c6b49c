"""The start screen: who we are, which backends there are, where to call, what to try."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from balancer import __version__
from balancer.app import Balancer
from balancer.cli import contact, screen
from balancer.config import EVERYWHERE, Config, Listen, port_ranges
from balancer.core.pool import BackendView

FIRST_CHECKS_S: Final = 1.0
NO_BACKENDS: Final = (
    "No backends: calls are answered 503. Name your Ollama hosts: ollama-balancer -b gpu1, "
    "BALANCER_BACKENDS=gpu1, or backends: [gpu1] in the file. To look around: ollama-balancer demo"
)


async def first_checks(balancer: Balancer, limit_s: float = FIRST_CHECKS_S) -> None:
    """Wait until every backend has told its models or failed; no longer than the limit."""
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while not all(_is_known(balancer, view) for view in balancer.pool.snapshot()):
                await asyncio.sleep(0.02)


def _is_known(balancer: Balancer, view: BackendView) -> bool:
    return not view.enabled or view.up is False or balancer.catalog.was_read(view.name)


def subject(config: Config, file: str | None) -> str:
    """Where the backends come from."""
    if config.demo.enabled:
        return "DEMO: the hosts are simulated, their answers made up"
    told = file or "no configuration file"
    if not config.discovery.sources:
        return told
    if file or not config.backends:
        return f"{told}, using discovery"
    return f"{told}, using discovery (save it: ollama-balancer init --from-discovery)"


def nobody_found(config: Config) -> list[str]:
    """Why there is a demo that nobody asked for."""
    return [
        f"No Ollama found {' or '.join(_looked_at(config))}.",
        "Starting a DEMO with three simulated hosts, to look around: its answers are made up.",
        "Use real hosts:  ollama-balancer -b gpu-box   (no demo: ollama-balancer --no-demo)",
        "",
    ]


def no_backends(config: Config) -> str:
    """What it means, and the ways out."""
    if not config.discovery.sources:
        return NO_BACKENDS
    every = f"every {config.discovery.refresh_s:g} s"
    return f"{NO_BACKENDS}. Until then we look {every} {' and '.join(_looked_at(config))}."


def _looked_at(config: Config) -> list[str]:
    """Where discovery looks."""
    words = {
        "local": f"on this machine ({', '.join(map(str, port_ranges(config.discovery.ports)))})",
        "env": "at OLLAMA_HOST",
    }
    return [text for source, text in words.items() if source in config.discovery.sources]


def lines(balancer: Balancer, subject: str) -> list[str]:
    """The whole screen; *subject* is what the first line says beside the version."""
    config, doc = balancer.config, balancer.admin.state()
    told = [f"ollama-balancer {__version__} — {subject}"]
    if doc["backends"]:
        told += screen.backends(doc)
    else:
        told.append(no_backends(config))
    for address, listen in zip(balancer.addresses, config.server.listen, strict=False):
        told.append(f"Listening  {address:<29} {_reach(config, listen)}".rstrip())
    told += dashboard(balancer)
    told.append(f"Status     ollama-balancer status{_admin(balancer)}")
    told += try_it(balancer)
    reached = callable_address(balancer)
    if reached is not None:
        told.append(f"Clients    ollama-balancer connect open-webui{_base_url(reached)}")
    told += [f"! {hint}" for backend in doc["backends"] for hint in _hints(backend)]
    told += screen.skew(doc, balancer.catalog.version(config.models.version))
    return told + [f"! {warning}" for warning in config.warnings]


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


def dashboard(balancer: Balancer) -> list[str]:
    """Where the status page is, for a browser on this machine."""
    url = page(balancer)
    return [] if url is None else [f"Dashboard  {url}"]


def page(balancer: Balancer) -> str | None:
    """The URL of that page, if there is one."""
    address = callable_address(balancer)
    if address is None or not balancer.config.dashboard.enabled:
        return None
    return f"http://{address}/_balancer/"


def _base_url(address: str) -> str:
    return "" if address == "127.0.0.1:11435" else f" --base-url http://{address}"


def _hints(backend: screen.Document) -> Iterator[str]:
    """What to do about one that cannot be reached."""
    hint = "" if backend["up"] else contact.hint_for(backend["url"], backend["error"])
    if hint:
        yield f"{screen.plain(backend['name'])}: {hint}"


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
        return "(this machine only; to share: --listen 0.0.0.0:11435 and ollama-balancer key new)"
    if config.auth.anonymous == EVERYWHERE:
        return "(open to everybody who can reach it: nobody is asked for a key)"
    return "(callers from elsewhere need a key)" if config.auth.keys else ""


def _admin(balancer: Balancer) -> str:
    address = callable_address(balancer)
    return "" if address in (None, "127.0.0.1:11435") else f" --admin {address}"
