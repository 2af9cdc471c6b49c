"""Which model is where, worked out from the status document, and shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from balancer.cli.screen import plain, table
from balancer.core import names

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Shelved:
    """
    A model.

    Args:
        on: What the status document says of it, by backend.
        lacking: Backends that may have it by their rules, and do not.
        versions: How many different ones there are by that name.
    """

    name: str
    on: Mapping[str, Document]
    lacking: Sequence[str]
    versions: int

    @property
    def size_bytes(self) -> int:
        """Of the largest."""
        return max(int(there["size_bytes"]) for there in self.on.values())

    @property
    def loaded(self) -> list[str]:
        """The backends that have it in memory."""
        return [backend for backend, there in self.on.items() if there["state"] == "loaded"]

    def told(self) -> dict[str, Any]:
        """For scripts."""
        fields = ("digest", "size_bytes", "state")
        return {
            "name": self.name,
            "versions": self.versions,
            "backends": {b: {key: there[key] for key in fields} for b, there in self.on.items()},
            "lacking": list(self.lacking),
        }


def shelves(doc: Document) -> list[Shelved]:
    """All models, by name."""
    backends = {b["name"]: b for b in doc["backends"] if not b["provider"]}
    found: dict[str, dict[str, Document]] = {}
    for backend in backends.values():
        for model in backend["models"]:
            if not model["cloud"]:
                found.setdefault(model["name"], {})[backend["name"]] = model
    return [
        Shelved(
            name,
            on,
            [other for other, b in backends.items() if other not in on and _may_have(b, name)],
            len({there["digest"] for there in on.values()}),
        )
        for name, on in sorted(found.items())
    ]


def _may_have(backend: Document, model: str) -> bool:
    name, rules = names.parse(model), backend["rules"]
    allowed = any(names.matches(glob, name) for glob in rules["allow"])
    return allowed and not any(names.matches(glob, name) for glob in rules["deny"])


def listing(models: Sequence[Shelved], count: int) -> list[str]:
    """One line for each: how large, on which of *count* backends, loaded where."""
    head = ("MODEL", "SIZE", "ON", "LOADED")
    rows = [
        (
            plain(model.name),
            size(model.size_bytes),
            f"all {count}" if len(model.on) == count > 1 else _joined(model.on),
            _joined(model.loaded) or "–",
        )
        for model in models
    ]
    return [*table([head, *rows], indent=""), *notes(models)]


def matrix(models: Sequence[Shelved], backends: Sequence[str]) -> list[str]:
    """A column for each backend: what it has in memory, on disk, or not."""
    head = ("MODEL", "SIZE", *map(plain, backends))
    rows = [
        (plain(m.name), size(m.size_bytes), *(_cell(m, backend) for backend in backends))
        for m in models
    ]
    return [*table([head, *rows], indent=""), *notes(models)]


def _cell(model: Shelved, backend: str) -> str:
    there = model.on.get(backend)
    if there is None:
        return "–" if backend in model.lacking else "not allowed"
    digest = f" {str(there['digest'])[:12]}" if model.versions > 1 else ""
    return f"{there['state']}{digest}"


def notes(models: Sequence[Shelved]) -> Iterator[str]:
    """What is wrong."""
    for model in models:
        if model.versions > 1:
            name = plain(model.name)
            yield (
                f"! {name}: {model.versions} different models by this name. To make them one: "
                f"ollama-balancer models pull {name} --update"
            )


def _joined(backends: Any) -> str:
    return ", ".join(map(plain, backends))


def size(count: float) -> str:
    """Bytes as Ollama's command line shows them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB", "MB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
