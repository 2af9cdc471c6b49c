"""API keys: hashed as soon as they are read."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pydantic import ValidationError

from .blocks import AuthBlock, KeyBlock
from .problems import Path, Problem
from .settings import Key
from .sources import Sources

_GUESSABLE_CHARS = 16


def build_keys(auth: AuthBlock, sources: Sources) -> tuple[Key, ...]:
    """Build the keys of ``auth.keys`` and of ``auth.keys_file``; all names and keys differ."""
    found = list(_listed(auth.keys, sources))
    if auth.keys_file:
        found += _in_file(auth.keys_file, sources)
    names: dict[str, Problem] = {}
    digests: dict[bytes, str] = {}
    for key, place in found:
        if key.name in names:
            first = names[key.name]
            where = f"at line {first.line}" if first.line else f"from {first.source}"
            message = f'duplicate name "{key.name}" (first {where}).'
            sources.complain(replace(place, message=message))
        elif key.sha256 in digests:
            message = f'the same key as "{digests[key.sha256]}".'
            sources.complain(replace(place, message=message))
        names.setdefault(key.name, place)
        digests.setdefault(key.sha256, key.name)
    return tuple(key for key, _ in found)


def _listed(blocks: Sequence[KeyBlock], sources: Sources) -> Iterator[tuple[Key, Problem]]:
    for path, block in zip(sources.items("auth", "keys"), blocks, strict=False):
        key = _key(path, block, sources)
        if key:
            yield key, sources.place(path)


def _in_file(file: str, sources: Sources) -> Iterator[tuple[Key, Problem]]:
    text = sources.read(("auth", "keys_file"), file) or ""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        place = Problem(file, number, 1, "", "")
        block = _block(line.split())
        key = _key(("auth", "keys_file"), block, sources) if block else None
        if key:
            yield key, place
        else:
            # Says nothing of the words: one of them is a key, wherever it stands.
            message = "needs NAME ROLE KEY or NAME ROLE sha256:HEX, where ROLE is user or admin."
            sources.complain(replace(place, message=message))


def _block(words: list[str]) -> KeyBlock | None:
    if len(words) != 3:
        return None
    name, role, key = words
    kind = "hash" if key.startswith("sha256:") else "key"
    try:
        return KeyBlock.model_validate({"name": name, "role": role, kind: key})
    except ValidationError:
        return None


def _key(path: Path, block: KeyBlock, sources: Sources) -> Key | None:
    if block.hash:
        return Key(block.name, block.hash, block.role)
    text = sources.secret(path, "key", block)
    if text is None:
        return None
    if not re.fullmatch("[!-~]+", text):
        sources.complain_at(path, "a key is printable ASCII without spaces.")
        return None
    if len(text) < _GUESSABLE_CHARS:
        sources.warn(
            f'API key "{block.name}" has only {len(text)} characters and can be guessed. '
            "Make a better one: openssl rand -hex 32"
        )
    return Key(block.name, hashlib.sha256(text.encode()).digest(), block.role)
