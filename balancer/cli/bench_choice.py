"""What `bench` measures: which model, on which backends, and whether it may; from the status."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from balancer.cli import shelf
from balancer.cli.exits import CommandError, ExitCode
from balancer.cli.screen import plain
from balancer.cli.shelf import Shelved
from balancer.core import names

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Copy:
    """A model in a backend's memory."""

    backend: str
    url: str
    digest: str


@dataclass(frozen=True, slots=True)
class Choice:
    """
    A model, and where it is in memory.

    Args:
        context: Tokens; calls ask for it, since Ollama would load the model again for another.
            None: not known.
        notes: What was left out, and why.
    """

    model: str
    context: int | None
    copies: tuple[Copy, ...]
    notes: tuple[str, ...] = ()


def busy(doc: Document) -> str:
    """What runs or waits, for people; empty: nothing."""
    loading = [plain(b["loading"]) for b in doc["backends"] if b["loading"]]
    parts = [
        f"{doc['running']} running" if doc["running"] else "",
        f"{doc['queue']['depth']} queued" if doc["queue"]["depth"] else "",
        f"{', '.join(loading)} being loaded" if loading else "",
    ]
    return ", ".join(filter(None, parts))


def needs_load(doc: Document, wanted: str) -> bool:
    """Whether a model would have to be loaded first. Raises CommandError if nobody has it."""
    return not _on(doc, _find(doc, wanted))


def choose(doc: Document, wanted: str | None, generates: Callable[[str], bool]) -> Choice:
    """
    The model that is asked for, else the one in memory in most places, and there the smallest.

    Args:
        generates: Whether a model makes text; some only embed.

    Raises:
        CommandError: Nothing suits; what would is said.
    """
    shelved = _suitable(doc, generates) if wanted is None else _find(doc, wanted)
    there = _on(doc, shelved)
    if not there:
        told = (
            f"{plain(shelved.name)} is in memory nowhere. To let the benchmark load it: "
            f"ollama-balancer bench {plain(shelved.name)} --load"
        )
        raise CommandError(told, code=ExitCode.FAILURE)
    if wanted is not None and not generates(shelved.name):
        told = f"{plain(shelved.name)} makes no text, so there are no tokens to count."
        raise CommandError(told, code=ExitCode.FAILURE)
    counts = Counter(model["context"] for model in there.values())
    context = max(counts, key=lambda each: (counts[each], each or 0))
    urls = {b["name"]: b["url"] for b in doc["backends"]}
    return Choice(
        shelved.name,
        context,
        tuple(
            Copy(name, urls[name], str(model["digest"]))
            for name, model in there.items()
            if model["context"] == context
        ),
        tuple(
            f"{plain(name)} is left out: it has the model with another context "
            f"({model['context']}, not {context})"
            for name, model in there.items()
            if model["context"] != context
        ),
    )


def _find(doc: Document, name: str) -> Shelved:
    try:
        wanted = names.parse(name).canonical
    except names.InvalidName as error:
        raise CommandError(f"{plain(name)}: {error}", code=ExitCode.USAGE) from None
    for shelved in shelf.shelves(doc):
        if names.parse(shelved.name).canonical == wanted:
            return shelved
    told = f"No backend has {plain(name)}. What there is: ollama-balancer models list"
    raise CommandError(told, code=ExitCode.FAILURE)


def _suitable(doc: Document, generates: Callable[[str], bool]) -> Shelved:
    loaded = [shelved for shelved in shelf.shelves(doc) if _on(doc, shelved)]
    loaded.sort(key=lambda shelved: (-len(_on(doc, shelved)), shelved.size_bytes))
    for shelved in loaded:
        if generates(shelved.name):
            return shelved
    told = (
        "No model that makes text is in memory, and none is loaded without being asked for. "
        "Name one, and allow it: ollama-balancer bench MODEL --load"
    )
    raise CommandError(told, code=ExitCode.FAILURE)


def _on(doc: Document, shelved: Shelved) -> dict[str, Document]:
    """Where it is in memory, on backends that are well."""
    up = {b["name"] for b in doc["backends"] if b["state"] == "up"}
    return {name: shelved.on[name] for name in shelved.loaded if name in up}


def loaded_meanwhile(before: Document, after: Document) -> list[str]:
    """Models that came into a memory between two looks, as ``model on backend``."""
    had, has = _in_memory(before), _in_memory(after)
    return [f"{plain(model)} on {plain(backend)}" for backend, model in sorted(has - had)]


def _in_memory(doc: Document) -> set[tuple[str, str]]:
    return {
        (backend["name"], model["name"])
        for backend in doc["backends"]
        for model in backend["models"]
        if model["state"] == "loaded"
    }
