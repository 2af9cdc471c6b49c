"""
Model names, parsed, compared and printed as Ollama does.

A name is ``[[scheme://]host/][namespace/]model[:tag]`` with an optional source at its end:
``:cloud`` or ``-cloud`` (served by ollama.com), ``:local`` (never a cloud stub).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

HOST: Final = "registry.ollama.ai"
NAMESPACE: Final = "library"
TAG: Final = "latest"

REQUIRED: Final = "model is required"
INVALID: Final = "invalid model name"

_LONGEST = 1024  # of a name as written; no valid one comes near, and what is parsed is cached
_MISSING = "!"  # stands for a part that a separator promised; never valid

# What Go calls white space. Python's strip() alone would also take U+001C to U+001F.
_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)

_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")

_ESCAPES = {
    "\a": r"\a",
    "\b": r"\b",
    "\f": r"\f",
    "\n": r"\n",
    "\r": r"\r",
    "\t": r"\t",
    "\v": r"\v",
    "\\": r"\\",
    '"': r"\"",
}


class InvalidName(ValueError):
    """Not a model name; the text is Ollama's."""


@dataclass(frozen=True, slots=True)
class ModelName:
    """
    One model name, defaults filled in, spelled as its writer spelled it.

    Two names are one model when their `canonical` forms are equal. A source is not part of `tag`.

    Args:
        cloud: Asks for the model of that name at ollama.com: another model than the local one.
        local: Refuses cloud stubs; the same model as without it.
    """

    host: str
    namespace: str
    model: str
    tag: str
    cloud: bool = False
    local: bool = False

    @property
    def canonical(self) -> str:
        """``host/namespace/model:tag`` in lower case; the tag of a cloud name tells so."""
        return f"{self.host}/{self.namespace}/{self.model}:{self._full_tag}".lower()

    @property
    def display(self) -> str:
        """As Ollama lists it: default host and namespace dropped, the tag always shown."""
        named = f"{self.model}:{self._full_tag}"
        if self.host.lower() != HOST:
            return f"{self.host}/{self.namespace}/{named}"
        if self.namespace.lower() != NAMESPACE:
            return f"{self.namespace}/{named}"
        return named

    @property
    def _full_tag(self) -> str:
        """The tag as Ollama spells it for a cloud stub: ``cloud`` or ``120b-cloud``."""
        if not self.cloud:
            return self.tag
        return "cloud" if self.tag.lower() == TAG else f"{self.tag}-cloud"


def parse(text: str) -> ModelName:
    """
    Read a name as a client wrote it.

    Raises:
        InvalidName: It is empty, breaks the grammar, or names two sources.
    """
    if len(text) > _LONGEST:
        raise InvalidName(INVALID)
    return _parse(text.strip(_SPACE))


@lru_cache(maxsize=4096)
def _parse(text: str) -> ModelName:
    if not text:
        raise InvalidName(REQUIRED)
    base, source = _split_source(text)
    if source and _split_source(base)[1]:
        raise InvalidName(f"use either :local or :cloud, not both: {quoted(text)}")
    host, namespace, model, tag = _split_parts(base)
    name = ModelName(
        host or HOST,
        namespace or NAMESPACE,
        model,
        tag or TAG,
        source == "cloud",
        source == "local",
    )
    if (
        _HOST.fullmatch(name.host)
        and _NAMESPACE.fullmatch(name.namespace)
        and _PART.fullmatch(name.model)
        and _PART.fullmatch(name.tag)
    ):
        return name
    raise InvalidName(INVALID)


def display(canonical: str) -> str:
    """How Ollama lists the model of that canonical name."""
    return _parse(canonical).display


def without_source(text: str) -> str:
    """A name as it was written, but for ``:cloud``, ``-cloud`` or ``:local`` at its end."""
    return _split_source(text.strip(_SPACE))[0]


def _split_source(text: str) -> tuple[str, str]:
    """The name without its source, and the source; empty: none was given."""
    base, colon, suffix = text.rpartition(":")
    suffix = suffix.strip(_SPACE)
    source = suffix.lower()
    if not colon:
        return text, ""
    if source in {"cloud", "local"}:
        return base, source
    if source.endswith("-cloud") and "/" not in suffix:
        return f"{base}:{suffix[:-6]}", "cloud"
    return text, ""


def _split_parts(base: str) -> tuple[str, str, str, str]:
    """Host, namespace, model, tag; empty: absent, so the default holds."""
    tag = ""
    if base.rfind(":") > base.rfind("/"):
        base, tag = _cut(base, ":")
    if "/" not in base:
        return "", "", base, tag
    base, model = _cut(base, "/")
    if "/" not in base:
        return "", base, model, tag
    base, namespace = _cut(base, "/")
    scheme, found, host = base.partition("://")
    return host if found else scheme, namespace, model, tag


def _cut(text: str, separator: str) -> tuple[str, str]:
    before, _, after = text.rpartition(separator)
    return before or _MISSING, after or _MISSING


@lru_cache(maxsize=8192)  # asked per backend and call
def matches(glob: str, name: ModelName) -> bool:
    """
    Whether a glob of an allow or deny rule covers a name; case does not count.

    ``*``, ``?`` and ``[…]`` run across ``/`` and ``:``. As with Ollama, what names no tag means
    ``latest``: ``llama3.2`` is `llama3.2:latest` alone, ``llama3.2*`` every tag of it. The glob
    may leave out the default host and namespace, or not.
    """
    pattern = glob.strip().lower()
    patterns = [pattern]
    if ":" not in pattern.rpartition("/")[2]:
        patterns.append(f"{pattern}:{TAG}")
    return any(fnmatchcase(form, each) for form in _forms(name) for each in patterns)


def covered(globs: Iterable[str], canonical: str) -> bool:
    """Whether any of the globs covers the model of that canonical name."""
    name = _parse(canonical)
    return any(matches(glob, name) for glob in globs)


def visible(globs: Sequence[str], shown: Iterable[str]) -> list[str]:
    """Of these names those that any of the globs covers."""
    return [name for name in shown if covered(globs, _parse(name).canonical)]


def _forms(name: ModelName) -> set[str]:
    canonical = name.canonical
    return {canonical, canonical.removeprefix(f"{HOST}/"), name.display.lower()}


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name a caller most likely meant, None: nothing comes near."""
    wanted = name.strip(_SPACE).lower()[:_LONGEST]
    stem = _stem(wanted)
    if stem == wanted:
        wanted = f"{wanted}:{TAG}"
    stems: dict[str, list[str]] = {}
    for each in known:
        stems.setdefault(_stem(each.lower()), []).append(each)
    near = difflib.get_close_matches(stem, stems, n=1, cutoff=0.7)
    if not near:
        return None
    return max(
        stems[near[0]], key=lambda each: difflib.SequenceMatcher(None, wanted, each.lower()).ratio()
    )


def _stem(name: str) -> str:
    """The name without its tag: whoever errs about a model mostly errs about the tag."""
    return name.rpartition(":")[0] if name.rfind(":") > name.rfind("/") else name


def quoted(text: str) -> str:
    """A string as Go prints it with ``%q``."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char.isprintable():
        return char
    code = ord(char)
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
