"""What people read: the start screen and the status, both from the status document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Document = Mapping[str, Any]


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Columns as wide as need be; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        (
            indent + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def plain(text: object) -> str:
    """A backend's words cannot steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def place(url: str) -> str:
    """A URL as short as it is clear."""
    return plain(url.removeprefix("http://"))


def loaded(backend: Document) -> list[str]:
    """The models in memory there."""
    return [plain(m["name"]) for m in backend["models"] if m["state"] == "loaded"]


def span(seconds: float) -> str:
    """About how long."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


# -- status ------------------------------------------------------------------------------------


def status(doc: Document) -> list[str]:
    """The whole status."""
    config = doc["config"]
    file = plain(config["file"]) if config["file"] else "no configuration file"
    lines = [
        f"ollama-balancer {plain(doc['version'])}: {_state(doc)}",
        f"{file}, read {span(config['loaded_s_ago'])} ago",
    ]
    lines += [f"! reload rejected: {plain(problem)}" for problem in config["rejected"]]
    if not doc["backends"]:
        return [*lines, "", "No backends. Add one: ollama-balancer -b gpu1, or in the file."]
    head = ("BACKEND", "ADDRESS", "STATE", "BREAKER", "VERSION", "RUNNING", "MODELS", "LOADED")
    lines += ["", *table([head, *map(_row, doc["backends"])])]
    notes = [f"! {note}" for backend in doc["backends"] for note in _notes(backend)]
    return [*lines, *([""] if notes else []), *notes]


def is_healthy(doc: Document) -> bool:
    """Whether any backend could be used."""
    return any(b["up"] and b["breaker"]["state"] == "closed" for b in doc["backends"])


def _state(doc: Document) -> str:
    word = "draining" if doc["draining"] else "ready" if doc["ready"] else "not ready"
    told = f"{word}, {doc['running']} running, {doc['queue']['depth']} queued"
    if doc["queue"]["depth"]:
        per_model = ", ".join(f"{plain(m)}: {n}" for m, n in doc["queue"]["per_model"].items())
        told += f" ({per_model}; the oldest for {span(doc['queue']['oldest_s'])})"
    return told


def _row(backend: Document) -> tuple[str, ...]:
    running = str(backend["in_flight"])
    if backend["loading"]:
        running += f" +load {plain(backend['loading'])}"
    return (
        plain(backend["name"]),
        place(backend["url"]),
        backend["state"],
        breaker(backend["breaker"]),
        plain(backend["version"] or "–"),
        running,
        str(len(backend["models"])),
        ", ".join(loaded(backend)) or "–",
    )


def breaker(told: Document) -> str:
    """A breaker's state, and when it is tried next."""
    if told["state"] == "open":
        return f"open, trial in {span(told['retry_in_s'])}"
    return str(told["state"]).replace("_", "-")


def _notes(backend: Document) -> Iterable[str]:
    name = plain(backend["name"])
    if backend["error"] and not backend["up"]:
        yield f"{name}: {plain(backend['error'])}"
    if backend["breaker"]["state"] != "closed":
        yield f"{name}: breaker {breaker(backend['breaker'])}: {_reason(backend['breaker'])}"
    if backend["trouble"]:
        yield f"{name}: {plain(backend['trouble'])}"
    for model in backend["models"]:
        of_model = model.get("breaker")
        if of_model and of_model["state"] != "closed":
            told = f"{breaker(of_model)}: {_reason(of_model)}"
            yield f"{name}: {plain(model['name'])}: breaker {told}"


def _reason(told: Document) -> str:
    return plain(told["reason"]) or "no reason told"


# -- start -------------------------------------------------------------------------------------


def backends(doc: Document, sources: Mapping[str, str]) -> list[str]:
    """The backends at the start; *sources* by name."""
    rows = [("BACKEND", "ADDRESS", "VERSION", "MODELS", "LOADED", "FROM")]
    for backend in doc["backends"]:
        told = ", ".join(loaded(backend)) or "–"
        if not backend["up"]:
            told = plain(backend["error"] or "no answer yet")
        rows.append(
            (
                plain(backend["name"]),
                place(backend["url"]),
                plain(backend["version"] or "–"),
                str(len(backend["models"])) if backend["up"] else "–",
                told,
                sources.get(backend["name"], ""),
            )
        )
    return table(rows)


def skew(doc: Document, told: str | None) -> list[str]:
    """Which versions differ, and what clients hear."""
    versions = {b["name"]: b["version"] for b in doc["backends"] if b["version"]}
    if len(set(versions.values())) < 2 or told is None:
        return []
    each = ", ".join(f"{plain(name)} runs {plain(version)}" for name, version in versions.items())
    return [f"! {each}: clients are told {plain(told)} (models.version)"]
