"""How Ollama reads, compares and prints model names."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

_HOST = "registry.ollama.ai"
_NAMESPACE = "library"
_TAG = "latest"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_NAMESPACE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_HOST_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")


class BadNameError(ValueError):
    """The text is no model name."""


@dataclass(frozen=True, slots=True)
class ModelName:
    """A full name; `source` says where the model runs: "cloud", "local" or "" (not said)."""

    host: str
    namespace: str
    model: str
    tag: str
    source: Literal["", "cloud", "local"] = ""

    @property
    def key(self) -> str:
        """The name under which equal models meet: every part in lower case."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}".lower()

    @property
    def full(self) -> str:
        """The name with every part spelt out."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    @property
    def shortest(self) -> str:
        """The name as lists print it: defaults dropped, the tag always shown."""
        short = f"{self.model}:{self.tag}"
        if self.host.lower() != _HOST:
            return f"{self.host}/{self.namespace}/{short}"
        if self.namespace.lower() != _NAMESPACE:
            return f"{self.namespace}/{short}"
        return short


@lru_cache(maxsize=4096)
def parse(text: str) -> ModelName:
    """Reads `[[scheme://]host/][namespace/]model[:tag]`; raises BadNameError."""
    rest, source = _split_source(text.strip())
    _, scheme, tail = rest.rpartition("://")
    rest = tail if scheme else rest
    head, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        head, tag = rest, _TAG
    parts = head.rsplit("/", 2)
    model = parts.pop()
    namespace = parts.pop() if parts else _NAMESPACE
    host = parts.pop() if parts else _HOST
    name = ModelName(host, namespace, model, tag, source)
    if not _valid(name):
        raise BadNameError(text)
    return name


def is_cloud(text: str) -> bool:
    """Whether that names a model that runs elsewhere."""
    return _split_source(text.strip())[1] == "cloud"


def _split_source(text: str) -> tuple[str, Literal["", "cloud", "local"]]:
    head, colon, last = text.rpartition(":")
    lower = last.lower()
    if colon and lower == "cloud":
        return head, "cloud"
    if colon and lower == "local":
        return head, "local"
    if colon and "/" not in lower and lower.endswith("-cloud"):
        return text[: -len("-cloud")], "cloud"
    return text, ""


def _valid(name: ModelName) -> bool:
    return bool(
        _HOST_PART.fullmatch(name.host)
        and _NAMESPACE_PART.fullmatch(name.namespace)
        and _PART.fullmatch(name.model)
        and _PART.fullmatch(name.tag)
    )
