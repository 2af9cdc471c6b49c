"""Hosts that nobody wrote down: what to ask for them, and how they join those that are written."""

import ipaddress
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from .addresses import BackendUrl, Listen, parse_ollama_host
from .backends import plain_backend, written_backend
from .blocks import DiscoveryBlock
from .settings import Candidate, Config, Discovery, DiscoverySource

DEFAULT_SOURCES: Final[tuple[DiscoverySource, ...]] = ("env", "local")
LOCAL_PORT: Final = "local port"

_OLLAMA_PORT = 11434
_GPU_PORTS = range(11440, 11450)  # one Ollama per GPU, the first at 11440


def build_discovery(
    block: DiscoveryBlock,
    env: Mapping[str, str],
    listen: Sequence[Listen],
    warn: Callable[[str], None],
    *,
    wanted: bool,
) -> Discovery:
    """
    Build the settings, candidates included.

    Args:
        env: Of it ``OLLAMA_HOST`` and ``OLLAMA_BASE_URLS``.
        listen: Our own addresses, which are no candidates.
        warn: Hears of variables that name nothing we can use.
        wanted: Whether ``auto`` means to look.
    """
    sources = block.sources
    if sources is None:
        sources = DEFAULT_SOURCES if wanted else ()
    found: dict[str, Candidate] = {}
    for source in sources:
        named = _in_env(env, warn) if source == "env" else _on_ports(block.local.ports)
        for url, name in named:
            if not any(address.is_reached_by(url) for address in listen):
                found.setdefault(str(url), Candidate(str(url), name))
            elif source == "env":
                warn(f"{name}: {url} is our own address, right for clients; it is no backend.")
    return Discovery(sources, block.refresh, block.local.ports, tuple(found.values()))


def _in_env(
    env: Mapping[str, str], warn: Callable[[str], None]
) -> Iterator[tuple[BackendUrl, str]]:
    named = [("OLLAMA_HOST", env.get("OLLAMA_HOST", ""))]
    named += [("OLLAMA_BASE_URLS", text) for text in env.get("OLLAMA_BASE_URLS", "").split(";")]
    for name, text in named:
        if not text.strip().strip("\"'"):
            continue
        try:
            url = parse_ollama_host(text)
        except ValueError as error:
            warn(f"{name} is no host to look at: {error}")
            continue
        if url.warning:
            warn(f"{name}: {url.warning}.")
        if url.port:
            yield url, name


def _on_ports(ports: Sequence[int]) -> Iterator[tuple[BackendUrl, str]]:
    """IPv4 before IPv6, for one Ollama mostly answers at both."""
    for port in ports:
        for host in ("127.0.0.1", "::1"):
            yield BackendUrl("http", host, port), LOCAL_PORT


def join(config: Config, found: Sequence[Candidate]) -> Config:
    """
    Put hosts that were found behind the backends that are written.

    Left out are those that are no candidates (any more), and those that are written: what the
    user says of a host counts. The same *found* gives the same names.
    """
    specs = list(config.backends)
    written = list(config.written["backends"])
    origins = dict(config.origins)
    places = {parse_ollama_host(spec.url).same_place() for spec in specs}
    names = {spec.name for spec in specs}
    for one in found:
        url = parse_ollama_host(one.url)
        if one not in config.discovery.candidates or url.same_place() in places:
            continue
        spec, block = plain_backend(_name(url, names), one.url)
        origins[f"backends[{len(specs)}].url"] = f"found:{one.source}"
        specs.append(spec)
        written.append(written_backend(block, spec))
        names.add(spec.name)
        places.add(url.same_place())
    return replace(
        config,
        backends=tuple(specs),
        written={**config.written, "backends": written},
        origins=origins,
    )


def _name(url: BackendUrl, taken: Container[str]) -> str:
    """A name that says most: gpu0 for the first port of one per GPU, local, or the host."""
    wished = [url.host, url.authority]
    if _is_here(url):
        usual = {_OLLAMA_PORT: "local"} | {p: f"gpu{p - _GPU_PORTS[0]}" for p in _GPU_PORTS}
        wished = [usual.get(url.port, f"local:{url.port}"), f"local:{url.port}", url.authority]
    free = (name for name in wished if name not in taken)
    number = 2
    while (name := next(free, f"{url.authority}-{number}")) in taken:
        number += 1
    return name


def _is_here(url: BackendUrl) -> bool:
    if url.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return False
