"""What people read: the start screen and the status, both from the status document."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

LATELY: Final = 5
TROUBLES: Final = frozenset(
    {
        *("backend_down", "backend_suspected", "breaker_opened", "breaker_reopened"),
        *("failover", "load_failed", "config_rejected", "switches_lost"),
    }
)

Document = Mapping[str, Any]


def table(rows: Sequence[Sequence[str]], indent: str = "  ", most: int = sys.maxsize) -> list[str]:
    """Columns as wide as need be, but for cells above *most*; the first row is the head."""
    widths = [
        max((len(cell) for cell in column if len(cell) <= most), default=0)
        for column in zip(*rows, strict=True)
    ]
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


def moment(at: float) -> str:
    """Unix seconds as people on this machine tell the time."""
    return f"{datetime.fromtimestamp(at, UTC).astimezone():%b %d %H:%M:%S}"


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
    notes += [f"! {_conflict(model, held)}" for model, held in doc["conflicts"].items()]
    return [*lines, *([""] if notes else []), *notes, *_lately(doc)]


def _lately(doc: Document) -> list[str]:
    """The last troubles, newest first."""
    rows = [row for row in doc.get("recent", ()) if row["event"] in TROUBLES][:LATELY]
    head = ("LATELY", "BACKEND", "WHAT", "MODEL", "WHY")
    return ["", *table([head, *map(_trouble, rows)])] if rows else []


def _trouble(row: Document) -> tuple[str, ...]:
    times = f" ({row['count']} times)" if row["count"] > 1 else ""
    return (
        moment(row["at"]),
        plain(row["backend"]),
        row["event"].replace("_", " "),
        plain(row["model"]),
        plain(row["text"]) + times,
    )


def _conflict(model: str, held: Mapping[str, Sequence[str]]) -> str:
    each = "; ".join(f"{plain(digest)[:12]} on {_names(names)}" for digest, names in held.items())
    return f"{plain(model)}: not the same model everywhere ({each})"


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
        return f"open, {plain(told.get('trial') or 'trial in ' + span(told['retry_in_s']))}"
    return str(told["state"]).replace("_", "-")


def listing(doc: Document) -> list[str]:
    """The backends alone: what each is, and what keeps it from serving."""
    if not doc["backends"]:
        return ["No backends."]
    # An older balancer tells of no tiers, and where all are of one there is nothing to tell.
    tiered = len({backend.get("priority") for backend in doc["backends"]}) > 1
    tier = ("PRIORITY",) if tiered else ()
    head = ("BACKEND", "ADDRESS", "STATE", "SWITCH", "BREAKER", "RUNNING", *tier, "SOURCE")
    rows = [
        (
            plain(backend["name"]),
            place(backend["url"]),
            backend["state"],
            backend["switch"],
            breaker(backend["breaker"]),
            str(backend["in_flight"]),
            *((str(backend["priority"]),) if tiered else ()),
            plain(backend["source"]),
        )
        for backend in doc["backends"]
    ]
    notes = [f"! {note}" for backend in doc["backends"] for note in _notes(backend)]
    return [*table([head, *rows], indent=""), *notes]


# -- explain -----------------------------------------------------------------------------------


def explained(doc: Document) -> list[str]:
    """Where a call would go, and why not elsewhere."""
    outcome, wait_s = doc["outcome"], doc["outcome"]["wait_s"]
    is_told = (wait_s or 0.0) >= LEAST_WAIT_S and outcome["kind"] != "away"
    wait = f" (about {span(wait_s)})" if is_told else ""
    refused = f"{outcome['status']}: " if outcome["kind"] == "refused" else ""
    asked = ", ".join(f"{plain(k)}={plain(v)}" for k, v in doc["options"].items())
    name = f"{plain(doc['model'])}{f' ({asked})' if asked else ''}"
    if doc.get("alias"):  # an older balancer knows of none
        name = f"{plain(doc['alias']['name'])}, an alias, now of {name}"
    lines = [f"{name}: {refused}{plain(outcome['text'])}{wait}"]
    lines += _context_told(doc.get("num_ctx") or {})
    if doc["queued"]:
        lines.append(f"{doc['queued']} waiting for it already")
    lines += _turn_told(doc)
    if doc["backends"]:
        names = _columns(doc["backends"])
        head = ("", "BACKEND", "MODEL THERE", "RUNNING", *map(_TERMS.__getitem__, names), "WHY")
        rows = [_explained_row(row, names) for row in doc["backends"]]
        lines += ["", *table([head, *rows], indent="")]
    for digest, held in doc["conflicts"].items():
        lines.append(f"! another model by the same name: {plain(digest)[:12]} on {_names(held)}")
    return lines


def _context_told(told: Document) -> Iterable[str]:
    """What the policy makes of the context, where there is one."""
    policy = plain(told.get("policy", "passthrough"))
    if policy != "passthrough" and told["rewritten"] is None:
        gets = "none" if told["gets"] is None else told["gets"]
        yield f"num_ctx: {gets} in it (policy {policy}); what it asked for is not kept"
    elif policy != "passthrough":
        asked = f"{told['asked']} asked for" if told["asked"] is not None else "none asked for"
        written = f"{told['gets']} written into the call" if told["rewritten"] else "left as it is"
        most = told.get("max")  # an older balancer does not tell
        if most is not None and told["rewritten"] and told["gets"] > most:
            written = f"{written}, beyond max {most}: a runner with so much is there already"
        yield f"num_ctx: {asked}, {written} (policy {policy})"
        for name, default in told["defaults"].items():
            yield f"! {plain(name)} gives {default} to calls that cannot ask, such as those of /v1"


# Of what a price is made, in the order in which it adds up.
_TERMS: Final = {
    "wait_s": "WAIT",
    "backlog_s": "BACKLOG",
    "prefill_s": "PROMPT",
    "decode_s": "ANSWER",
    "disturb_s": "DISTURBS",
    "evict_s": "EVICTS",
    "prefer_s": "PREFERS",
    "total_s": "TOTAL",
}
LEAST_WAIT_S: Final = 0.5  # of which a headline tells
LEAST_S: Final = 0.005  # what is less is shown as nothing


def _columns(rows: Sequence[Document]) -> list[str]:
    """The terms that are something for any backend; an older balancer tells none."""
    told = [row.get("terms") or {} for row in rows]
    return [
        name for name in _TERMS if any(abs(terms.get(name) or 0.0) >= LEAST_S for terms in told)
    ]


def _explained_row(row: Document, names: Sequence[str]) -> tuple[str, ...]:
    may, terms = row["may_serve"], row.get("terms") or {}
    running = f"{row['in_flight']} of {row['slots']}" if may or row["in_flight"] else "–"
    if terms.get("promised"):
        running += f", {terms['promised']:.0f} promised"
    return (
        f"{row['order']}." if may and row["order"] else "–",
        plain(row["name"]),
        plain(row["state"] or row["residency"] if may else row["residency"]),
        running,
        *(_seconds(terms.get(name)) for name in names),
        "; ".join(_notes_on(row, terms)) if terms else plain(row["reason"]),
    )


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if abs(value) >= LEAST_S else "0"


def _notes_on(row: Document, terms: Document) -> Iterable[str]:
    """What the terms alone do not tell."""
    yield {"go": "can start", "hold": "must wait", "load": "must load"}.get(row["kind"], "")
    if terms["cached_tokens"] >= 1:
        known = terms["cached_tokens"] + terms["new_tokens"]
        yield f"{terms['cached_tokens']:.0f} of {known:.0f} tokens cached"
    if terms["share"] > 1:
        yield f"shared with {terms['share'] - 1:.0f} more"
    for victim in row.get("victims") or ():
        yield f"unloads {plain(victim['model'])} ({victim['evict_s']:.2f})"
    if terms["slow_factor"] < 1:
        yield f"slow today ({terms['slow_factor']:.0%} of its speed)"


def _turn_told(doc: Document) -> Iterable[str]:
    """A call's place in the queue, where there is an order to tell of."""
    turn, call = doc.get("turn"), doc.get("call")
    if call and call["waits"]:
        yield f"call {plain(call['id'])} has waited for {span(call['waited_s'])}"
    elif call:
        yield f"call {plain(call['id'])} does not wait any more: the rest is of one like it"
    if turn and doc["queued"]:
        yield (
            f"{turn['ahead']} of them ahead of it, by fair shares: tag {turn['tag']:.2f}, and the "
            f"queue is at {turn['virtual_time']:.2f}"
        )
    for past in doc["decisions"] if call else ():
        others = ", ".join(f"{each['backend']} {each['total_s']:.2f} s" for each in past["options"])
        yield (
            f"attempt {past['attempt']}, {span(past['s_ago'])} ago: {past['kind']} "
            f"{plain(past['backend'])} ({plain(others)})"
        )


def _names(held: Sequence[str]) -> str:
    return ", ".join(map(plain, held))


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


def backends(doc: Document) -> list[str]:
    """The backends at the start, and where each comes from."""
    rows = [("BACKEND", "ADDRESS", "VERSION", "MODELS", "LOADED", "SOURCE")]
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
                plain(backend["source"]),
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
