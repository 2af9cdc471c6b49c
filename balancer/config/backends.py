"""The backends: their names, credentials and TLS, and that no two are one."""

import base64
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from .addresses import Listen
from .blocks import BackendAuthBlock, BackendBlock, BackendTlsBlock
from .problems import Path, dotted
from .settings import BackendSpec, Secret, Timeouts, Tls
from .sources import Sources

_TLS_FILES = ("ca_file", "client_cert_file", "client_key_file")


def build_backends(
    blocks: Sequence[BackendBlock],
    timeouts: Timeouts,
    listen: Sequence[Listen],
    sources: Sources,
) -> tuple[BackendSpec, ...]:
    """
    Build the backends and compare them with one another and with our own addresses.

    Args:
        blocks: As written.
        timeouts: What holds where a backend says nothing.
        listen: Our own addresses; a backend there would be ourselves.
        sources: Hears complaints.
    """
    names = _names(blocks)
    items = list(zip(sources.items("backends"), names, blocks, strict=False))
    _check_places(items, listen, sources)
    return tuple(_build(path, name, block, timeouts, sources) for path, name, block in items)


def plain_backend(name: str, url: str) -> tuple[BackendSpec, BackendBlock]:
    """Build a backend of which no more than its address is known; it reads no file."""
    block = BackendBlock.model_validate({"name": name, "url": url})
    tls = Tls(**dict(block.tls)) if block.url.scheme == "https" else None
    spec = BackendSpec(
        name=name,
        url=str(block.url),
        slots=block.slots,
        allow=block.models.allow,
        deny=block.models.deny,
        enabled=block.enabled,
        headers=block.headers,
        auth_headers=(),
        tls=tls,
        timeouts=None,
        store=block.store,
        cloud=block.cloud or block.url.is_provider,
        provider=block.url.is_provider,
        reuse_connections=block.reuse_connections,
        weight=block.weight,
        priority=block.priority,
        prefer=block.prefer,
        vram_bytes=block.vram,
    )
    return spec, block


def written_backend(block: BackendBlock, spec: BackendSpec) -> dict[str, Any]:
    """Return the file's words for it, its name filled in and without what says nothing."""
    item = block.model_dump(mode="json")
    item["name"] = spec.name
    item["auth"] = without_nulls(item["auth"])
    changed = block.timeouts.model_fields_set
    item["timeouts"] = {k: v for k, v in item["timeouts"].items() if k in changed}
    return item


def without_nulls(block: dict[str, Any]) -> dict[str, Any]:
    """Leave out what was not given."""
    return {key: value for key, value in block.items() if value is not None}


def _names(blocks: Sequence[BackendBlock]) -> list[str]:
    """Name the nameless after their host, with the port where the host alone is taken."""
    hosts = Counter(block.url.host for block in blocks if not block.name)
    hosts.update(block.name for block in blocks if block.name)
    return [
        block.name or (block.url.host if hosts[block.url.host] == 1 else block.url.authority)
        for block in blocks
    ]


def _check_places(
    items: Iterable[tuple[Path, str, BackendBlock]],
    listen: Sequence[Listen],
    sources: Sources,
) -> None:
    seen: dict[object, Path] = {}  # places and names; one is a tuple, the other a text
    for path, name, block in items:
        url = block.url
        if any(address.is_reached_by(url) for address in listen):
            sources.complain_at((*path, "url"), f"{url} is our own address (server.listen).")
        sames: list[tuple[object, str]] = [(url.same_place(), f"url {url}")]
        if block.name or url.same_place() not in seen:
            sames.append((name, f'name "{name}"'))
        for same, what in sames:
            if same in seen:
                first = sources.place(seen[same])
                where = f"at line {first.line}" if first.line else dotted(seen[same])
                message = f"duplicate {what} (first {where})."
                sources.complain(replace(sources.place(path), path="backends", message=message))
            seen.setdefault(same, path)


def _build(
    path: Path, name: str, block: BackendBlock, timeouts: Timeouts, sources: Sources
) -> BackendSpec:
    own = {f"{key}_s": getattr(block.timeouts, key) for key in block.timeouts.model_fields_set}
    _check_provider(path, block, sources)
    return BackendSpec(
        name=name,
        url=str(block.url),
        slots=block.slots,
        allow=block.models.allow,
        deny=block.models.deny,
        enabled=block.enabled,
        headers=block.headers,
        auth_headers=_auth_headers((*path, "auth"), block.auth, sources),
        tls=_tls((*path, "tls"), block, sources),
        timeouts=replace(timeouts, **own) if own else None,
        store=block.store,
        cloud=block.cloud or block.url.is_provider,
        provider=block.url.is_provider,
        reuse_connections=block.reuse_connections,
        weight=block.weight,
        priority=block.priority,
        prefer=block.prefer,
        vram_bytes=block.vram,
    )


def _check_provider(path: Path, block: BackendBlock, sources: Sources) -> None:
    if block.url.is_provider and block.url.scheme != "https":
        sources.complain_at(
            (*path, "url"), "would send its key unencrypted. Write https://ollama.com."
        )
    elif block.url.is_provider and block.auth.type == "none":
        sources.warn(
            "has no key: ollama.com tells what it has, but refuses every call. "
            "Give auth: {type: bearer, token_file: …} a key of https://ollama.com/settings/keys.",
            path,
        )


def _auth_headers(
    path: Path, block: BackendAuthBlock, sources: Sources
) -> tuple[tuple[str, Secret], ...]:
    match block.type:
        case "bearer":
            return (("Authorization", Secret(f"Bearer {sources.secret(path, 'token', block)}")),)
        case "basic":
            pair = f"{block.username}:{sources.secret(path, 'password', block)}"
            encoded = base64.b64encode(pair.encode()).decode()
            return (("Authorization", Secret(f"Basic {encoded}")),)
        case "header":
            return ((str(block.name), Secret(str(sources.secret(path, "value", block)))),)
        case _:
            return ()


def _tls(path: Path, block: BackendBlock, sources: Sources) -> Tls | None:
    tls = block.tls
    for key in _TLS_FILES:
        file = getattr(tls, key)
        if file:
            sources.read((*path, key), file)  # so that a wrong path is found before it is used
    if block.url.scheme == "https":
        return Tls(**dict(tls))
    if tls != BackendTlsBlock():
        sources.warn(f"has no effect: {block.url} is not https.", path)
    return None
