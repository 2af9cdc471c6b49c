"""API keys: hashed as soon as they are read."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from .blocks import AuthBlock, KeyBlock
from .layers import API_KEY, API_KEY_FILE, lay
from .problems import Path, Problem
from .settings import Key, Limits, Priorities
from .sources import Sources

LINE = (
    "NAME ROLE KEY or NAME ROLE sha256:HEX, where ROLE is user or admin, "
    "then models=GLOB,GLOB, expires=DATE, priority=N and limits such as rpm=N if wanted"
)
LIMITS = ("rpm", "tokens_per_minute", "slots", "max_num_predict")
_MORE = {"models", "expires", "priority", *LIMITS}
_GUESSABLE_CHARS = 16
_KEY = re.compile("[!-~]+")


def build_keys(auth: AuthBlock, sources: Sources, priorities: Priorities) -> tuple[Key, ...]:
    """
    Build the keys of ``auth.keys`` and of ``auth.keys_file``; all names and keys differ.

    That of the environment may be there again: it is also what our own commands send.
    """
    found = list(_listed(auth.keys, sources, priorities))
    if auth.keys_file:
        found += _in_file(auth.keys_file, sources, priorities)
    found = [pair for pair in found if not _is_repeated(pair, found)]
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


def read_line(line: str) -> KeyBlock | None:
    """
    Read a line of a keys file; None: it holds no key (empty, or a comment).

    Raises:
        ValueError: It is no line of `LINE`. Says nothing of its words: any of them may be the key.
    """
    words = line.split()
    if not words or words[0].startswith("#"):
        return None
    more = [word.partition("=") for word in words[3:]]
    given: dict[str, Any] = {name: text for name, _, text in more}
    if len(words) < 3 or len(given) < len(more) or not given.keys() <= _MORE:
        raise ValueError(LINE)
    given |= {"name": words[0], "role": words[1]}
    given["hash" if words[2].startswith("sha256:") else "key"] = words[2]
    if not _KEY.fullmatch(words[2]):
        raise ValueError(LINE)
    try:
        return KeyBlock.model_validate(given)
    except ValidationError:
        raise ValueError(LINE) from None


def describe(name: str, role: str, **more: str | None) -> KeyBlock:
    """
    Return what a key to be would be, its hash aside; *more* as in a line of the keys file.

    Raises:
        ValueError: ``KEY: what is wrong with it``.
    """
    given = {"name": name, "role": role, "hash": "0" * 64}
    try:
        return KeyBlock.model_validate(given | {key: text for key, text in more.items() if text})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise ValueError(f"{fault['loc'][0]}: {fault['ctx']['error']}") from None


def key_places(text: str, env: Mapping[str, str], source: str) -> tuple[str | None, list[str]]:
    """
    Return ``auth.keys_file``, and the names of keys that stand elsewhere.

    Also of a configuration that is no good yet: its keys file may be missing.
    """
    auth = lay(text, env, source, {}).tree.get("auth")
    auth = auth if isinstance(auth, dict) else {}
    file, keys = auth.get("keys_file"), auth.get("keys")
    items = keys if isinstance(keys, list) else []
    named = [key.get("name") for key in items if isinstance(key, dict)]
    return file if isinstance(file, str) and file else None, [str(name) for name in named]


def digest(text: str) -> bytes:
    """
    Return what is kept of a key.

    Raises:
        ValueError: It could not be sent.
    """
    if not _KEY.fullmatch(text):
        raise ValueError("a key is printable ASCII without spaces.")
    return hashlib.sha256(text.encode()).digest()


def weakness(text: str) -> str:
    """Say why a key can be guessed; empty: it cannot."""
    if len(text) >= _GUESSABLE_CHARS:
        return ""
    return (
        f"has only {len(text)} characters and can be guessed. "
        "Make a better one: openssl rand -hex 32"
    )


def _is_repeated(pair: tuple[Key, Problem], found: Sequence[tuple[Key, Problem]]) -> bool:
    key, place = pair
    if place.source not in (API_KEY, API_KEY_FILE):
        return False
    others = [other for other, _ in found if other is not key]
    return any((other.sha256, other.role) == (key.sha256, key.role) for other in others)


def _listed(
    blocks: Sequence[KeyBlock], sources: Sources, priorities: Priorities
) -> Iterator[tuple[Key, Problem]]:
    for path, block in zip(sources.items("auth", "keys"), blocks, strict=False):
        key = _key(path, block, sources, priorities)
        if key:
            yield key, sources.place(path)


def _in_file(file: str, sources: Sources, priorities: Priorities) -> Iterator[tuple[Key, Problem]]:
    text = sources.read(("auth", "keys_file"), file) or ""
    for number, line in enumerate(text.splitlines(), 1):
        place = Problem(file, number, 1, "", "")
        try:
            block = read_line(line)
            key = block and _key(("auth", "keys_file"), block, sources, priorities)
        except ValueError as error:
            sources.complain(replace(place, message=f"needs {error}."))
            continue
        if key:
            yield key, place


def _key(path: Path, block: KeyBlock, sources: Sources, priorities: Priorities) -> Key | None:
    limits = Limits(*(getattr(block, limit) for limit in LIMITS))
    told = block.priority
    priority = getattr(priorities, told) if isinstance(told, str) else told
    about = (block.role, block.models, block.expires, priority, limits)
    if block.hash:
        return Key(block.name, block.hash, *about)
    text = sources.secret(path, "key", block)
    if text is None:
        return None
    try:
        sha256 = digest(text)
    except ValueError as error:
        sources.complain_at(path, str(error))
        return None
    weak = weakness(text)
    if weak:
        sources.warn(f'API key "{block.name}" {weak}')
    return Key(block.name, sha256, *about)
