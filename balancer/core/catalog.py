"""
Which models are where, which are in memory, and the listings merged from that.

Laws:
- A row of a backend is never rebuilt: it is listed with its fields, and their order, as it came.
- One bad row costs that row, never the listing: Go clients refuse a whole list for one wrong type,
  and Ollama's own command line panics on a digest shorter than twelve digits.
- Late news of a backend that has left changes nothing and raises nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections import deque
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from balancer.core import names
from balancer.core.aliases import Aliases
from balancer.core.dialect import compact
from balancer.core.domain import PlacementKey, Residency

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from balancer.core.aliases import Alias

_SECOND: Final = 1_000_000_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_INSTANT: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:Z|([+-])(\d\d):(\d\d))", re.ASCII
)
_PARAMETERS: Final = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)\s*([KMBT])", re.ASCII | re.IGNORECASE)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_VERSION: Final = re.compile(
    r"\s*v?(\d{1,9})(?:\.(\d{1,9}))?(?:\.(\d{1,9}))?(?:\.\d+)*(?:[-+].*)?\s*", re.ASCII
)

# What Go's clients decode these fields into; absent or null is fine.
_SHAPES: Final[dict[str, Any]] = {
    "name": str,
    "model": str,
    "remote_model": str,
    "remote_host": str,
    "size": int,
    "size_vram": int,
    "context_length": int,
    "capabilities": [str],
    "details": {
        "parent_model": str,
        "format": str,
        "family": str,
        "families": [str],
        "parameter_size": str,
        "quantization_level": str,
        "context_length": int,
        "embedding_length": int,
    },
}

# The first release of Ollama that has the operation; those not named are older than we care for.
_SINCE: Final = {
    "ps": (0, 1, 38),
    "models": (0, 2, 0),
    "model": (0, 2, 0),
    "embed": (0, 2, 6),
    "v1_embeddings": (0, 2, 6),
    "v1_responses": (0, 13, 3),
    "v1_messages": (0, 14, 0),
    "v1_transcriptions": (0, 20, 0),
}
_USUAL_DEFAULT: Final = 4096  # tokens: the least context that Ollama gives by itself
_MOST_COPIES: Final = 1024  # of each backend; options are clients' choice
_JOURNAL: Final = 256
_RELOAD_S: Final = 600.0  # so long a runner that was there counts as pushed out by the next
_MOST_UNSUPPORTED: Final = 256  # routes remembered per backend; their paths are clients' text
_FROM_SOURCE: Final = (0, 0, 0)  # what a build without a release number says of itself

_Version = tuple[int, int, int]


def instant_ns(text: Any) -> int | None:
    """
    Nanoseconds since 1970 of an RFC 3339 time, None if it is none.

    Not by `datetime`, which has microseconds only and cannot move the year 1 (Go's zero time) or
    9999 into another zone.
    """
    match = _INSTANT.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return None
    try:
        year, month, day, hour, minute, second = map(int, match.group(1, 2, 3, 4, 5, 6))
        since = datetime(year, month, day, hour, minute, second, tzinfo=UTC) - _EPOCH
    except ValueError:
        return None
    fraction, sign, hours, minutes = match.group(7, 8, 9, 10)
    east = int(f"{sign}1") * (int(hours) * 3600 + int(minutes) * 60) if sign else 0
    seconds = since.days * 86400 + since.seconds - east
    return seconds * _SECOND + int((fraction or "")[:9].ljust(9, "0"))


def _version(text: Any) -> _Version | None:
    match = _VERSION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return None
    major, minor, patch = (int(part or 0) for part in match.groups())
    return major, minor, patch


@dataclass(frozen=True, slots=True)
class PsChange:
    """
    What a reading of a backend's memory changed; canonical names.

    Args:
        changed: A model came, went, or has another context.
        appeared: Now in memory, as far as we know not before.
        vanished: No longer in memory.
    """

    changed: bool = False
    appeared: tuple[str, ...] = ()
    vanished: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Row:
    """
    One model of a ``models`` list.

    Args:
        data: As the backend sent it.
        text: The same as Go would write it.
        digest: None if it is no whole SHA-256.
        at_ns: When modified, or when it expires; 0 if not told.
        fit: Whether every client can read it.
    """

    data: dict[str, Any]
    text: bytes
    canonical: str
    display: str
    owner: str
    digest: str | None
    at_ns: int
    fit: bool
    cloud: bool

    @property
    def identity(self) -> str:
        """What it is remembered by: twin names of one model share their digest."""
        return self.digest or self.canonical

    @property
    def size(self) -> int:
        return _number(self.data.get("size")) or 0

    @property
    def context(self) -> int | None:
        return _number(self.data.get("context_length"))

    @property
    def trained(self) -> int | None:
        """Tokens of context the model was trained for; releases before 0.30 do not tell."""
        details = self.data.get("details")
        return _number(details.get("context_length")) if isinstance(details, dict) else None


def _number(value: Any) -> int | None:
    """A number as Ollama counts; one with hundreds of digits could not be reckoned with."""
    return value if type(value) is int and 0 < value < 1 << 63 else None


def _shaped(value: Any, shape: Any) -> bool:
    if value is None:
        return True
    if isinstance(shape, dict):
        fields = shape.items()
        return isinstance(value, dict) and all(_shaped(value.get(key), s) for key, s in fields)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_shaped(item, shape[0]) for item in value)
    return type(value) is shape and (shape is str or -(2**63) <= value < 2**63)


def _row(data: Any, time_field: str) -> _Row | None:
    """The row, None if it names no model or has no JSON form."""
    if not isinstance(data, dict):
        return None
    texts = (data.get("name"), data.get("model"))
    try:
        name = names.parse(next(text for text in texts if isinstance(text, str) and text))
        text = compact(data, strict=True)
    except (StopIteration, ValueError, TypeError, RecursionError):
        return None
    digest = data.get("digest")
    whole = isinstance(digest, str) and _DIGEST.fullmatch(digest) is not None
    at = data.get(time_field)
    at_ns = 0 if at is None else instant_ns(at)
    return _Row(
        data=data,
        text=text,
        canonical=name.canonical,
        display=name.display,
        owner=name.namespace,
        digest=digest if whole else None,
        at_ns=at_ns or 0,
        fit=whole and at_ns is not None and _shaped(data, _SHAPES),
        cloud=name.cloud or bool(data.get("remote_model") or data.get("remote_host")),
    )


def _rows(rows: Any, time_field: str) -> list[_Row]:
    parsed = (_row(data, time_field) for data in rows or ())
    return [row for row in parsed if row is not None]


def _capabilities(model: dict[str, Any]) -> frozenset[str]:
    told = model.get("capabilities")
    return frozenset(filter(_is_text, told)) if isinstance(told, list) else frozenset()


def _parameters_b(told: Any) -> float | None:
    """Of a text such as ``8.0B`` or ``137M``."""
    match = _PARAMETERS.fullmatch(told) if isinstance(told, str) else None
    if match is None:
        return None
    count = float(match[1]) * {"K": 1e-6, "M": 1e-3, "B": 1.0, "T": 1e3}[match[2].upper()]
    return count if count > 0.0 else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


@dataclass(slots=True)
class _Resident:
    """
    A model in a backend's memory. Only its two times move on; another content is another one.

    Args:
        key: The options it was loaded with, None: by somebody else, with options unknown.
        context: Tokens, None: not seen since it was loaded.
        seen_at: When this was last known to be so.
        noted_at: When a call or load of ours proved it, -inf: never.
    """

    canonical: str
    digest: str | None
    key: PlacementKey | None
    context: int | None
    seen_at: float
    noted_at: float = -math.inf

    @property
    def identity(self) -> str:
        return self.digest or self.canonical


def _same(one: _Row | _Resident, other: _Row | _Resident) -> bool:
    if one.digest and other.digest:
        return one.digest == other.digest
    return one.canonical == other.canonical


def _fits(resident: _Resident, key: PlacementKey, default: int | None, trained: int | None) -> bool:
    """
    Whether Ollama would serve the key with the runner as it is, without a reload.

    It compares what is in effect: an asked context equal to the one in effect fits, however that
    came about, and no context asked fits a runner that was asked for none, or one that has the
    default. What somebody else loaded counts as that context with no other option; as long as the
    default of the place is unknown it passes for the default, as does the usual default however it
    came about. A missing ``num_gpu`` fits any.
    """
    asked = dict(key.options)
    wanted = asked.pop("num_ctx", None)
    has = dict(resident.key.options) if resident.key else {}
    held = has.pop("num_ctx", None)
    if "num_gpu" not in asked:
        has.pop("num_gpu", None)
    if asked != has:
        return False
    context = held if resident.context is None else resident.context
    if wanted is not None:
        return bool(wanted == held or min(wanted, trained or wanted) == context)
    if resident.key is not None and held is None:
        return True
    if default is None or context is None:
        return resident.key is None or context == _USUAL_DEFAULT
    return bool(context == default)


@dataclass(frozen=True, slots=True)
class Runner:
    """
    How a model is in memory on one backend.

    Args:
        context: Tokens, None: not known yet.
        default: Tokens that a call gets there that asks for none, None: not known.
        trained: Tokens that the model was made for, None: not known.
    """

    context: int | None
    default: int | None
    trained: int | None


@dataclass(slots=True)
class _Shelf:
    """What one backend has. Times are monotonic seconds."""

    settled: bool = False
    away_since: float | None = None
    version_text: Any = None
    version: _Version | None = None
    unsupported: set[str] = field(default_factory=set)
    supported: set[str] = field(default_factory=set)  # of the routes that not every Ollama has
    read: bool = False  # its tags, at least once
    rows: dict[str, _Row] = field(default_factory=dict)
    missing: dict[str, tuple[float, str | None]] = field(default_factory=dict)
    relisted: dict[str, str | None] = field(default_factory=dict)
    ps_at: float = -math.inf
    ps_rows: list[_Row] = field(default_factory=list)
    residents: list[_Resident] = field(default_factory=list)
    contexts: dict[str, int] = field(default_factory=dict)  # by identity: last seen
    defaults: dict[str, int] = field(default_factory=dict)  # by identity: without num_ctx
    latest: dict[str, _Resident] = field(default_factory=dict)  # by identity: of late in memory

    def identity(self, canonical: str) -> str:
        row = self.rows.get(canonical)
        return canonical if row is None else row.identity

    def resident(self, canonical: str) -> _Resident | None:
        """The runner a name would use: by digest, else by name."""
        identity = self.identity(canonical)
        by_name = None
        for resident in self.residents:
            if resident.digest == identity:
                return resident
            if resident.canonical == canonical:
                by_name = resident
        return by_name

    @property
    def has_twins(self) -> bool:
        """Whether one name may mean two of the residents: then their order counts."""
        residents, digests = self.residents, [r.digest for r in self.residents if r.digest]
        called = {resident.canonical for resident in residents}
        return len(called) < len(residents) or len(set(digests)) < len(digests)

    def serves(self, resident: _Resident, key: PlacementKey) -> bool:
        row = self.rows.get(key.model)
        default = self.defaults.get(self.identity(key.model))
        return _fits(resident, key, default, None if row is None else row.trained)

    def lapsed(self, now: float, remember_s: float) -> bool:
        return self.away_since is not None and now >= self.away_since + remember_s


@dataclass(frozen=True, slots=True)
class Copy:
    """
    A model on one backend as one placement key sees it; out of date when the edition is another.

    Args:
        context: Tokens a call with this key would have, None: unknown.
        trained: Tokens of context the model was trained for, None: not told.
        stub: It runs at ollama.com.
        known: Where it is whatever the time, None: `residency` tells.
        here: What it is as long as the reading is believed.
        fits: Whether the runner there serves the key as it is.
        shelf: Tells when the backend's memory was last read.
        models_loaded: In memory there, whatever model.
    """

    context: int | None
    trained: int | None
    models_loaded: int
    stub: bool
    known: Residency | None
    here: Residency
    fits: bool
    believe_s: float
    resident: _Resident | None
    shelf: _Shelf

    @property
    def reads(self) -> int | None:
        """Tokens of a prompt that it reads at most, the rest being cut off; None: not known."""
        context = self.context
        return context if context is not None and context > 0 else self.trained

    def residency(self, now: float) -> Residency:
        """As `Catalog.residency`."""
        if self.known is not None:
            return self.known
        seen_at = self.shelf.ps_at if self.resident is None else self.resident.seen_at
        if now - seen_at > self.believe_s:
            return Residency.UNKNOWN
        return self.here


@dataclass(frozen=True, slots=True)
class InMemory:
    """
    A runner on one backend.

    Args:
        key: The options it was loaded with; None: by somebody else, with options unknown.
        size_bytes: It takes in all, 0: not told yet.
        vram_bytes: Of these on GPUs.
        expires_ns: When it will go unless it is used, as the backend told; 0: not told.
    """

    model: str
    key: PlacementKey | None
    context: int | None
    size_bytes: int
    vram_bytes: int
    expires_ns: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """One model over all backends. `best`: the row that is listed."""

    holders: tuple[tuple[str, _Row], ...]
    best: _Row


class _Listing:
    """Tags merged over all backends; good until something changes, or `until`."""

    def __init__(
        self, shelves: dict[str, _Shelf], now: float, remember_s: float, aliases: Aliases
    ) -> None:
        self.remember_s = remember_s
        self.aliases = aliases
        kept = [
            (name, shelf) for name, shelf in shelves.items() if not shelf.lapsed(now, remember_s)
        ]
        self.until = min(
            (shelf.away_since + remember_s for _, shelf in kept if shelf.away_since is not None),
            default=math.inf,
        )
        found: dict[str, list[tuple[str, _Row]]] = {}
        for name, shelf in kept:
            for row in shelf.rows.values():
                found.setdefault(row.canonical, []).append((name, row))
        self.entries = {
            canonical: _Entry(tuple(held), max((row for _, row in held), key=_newest))
            for canonical, held in found.items()
        }

    @cached_property
    def rows(self) -> list[_Row]:
        found = {canonical: entry.best for canonical, entry in self.entries.items()}
        for alias in self.aliases:  # one that is called like a model hides it, as calls go by it
            found.pop(alias.canonical, None)
            meant = self.meant(alias)
            if meant is not None:
                found[alias.canonical] = _called(alias.name, self.entries[meant].best)
        shown = [r for name, r in found.items() if r.fit and not self.aliases.hides(name)]
        return sorted(shown, key=lambda row: (-(row.at_ns // _SECOND), row.display))

    def meant(self, alias: Alias) -> str | None:
        """The first of an alias's models that any backend lists."""
        models = (names.parse(model).canonical for model in alias.models)
        return next((model for model in models if model in self.entries), None)

    @cached_property
    def tags(self) -> dict[str, Any]:
        return {"models": [row.data for row in self.rows]}

    @cached_property
    def tags_json(self) -> bytes:
        return _joined(self.rows)

    @cached_property
    def models(self) -> dict[str, Any]:
        return {
            "object": "list",
            "data": [_openai(row.display, row.owner, row) for row in self.rows],
        }

    @cached_property
    def models_json(self) -> bytes:
        return compact(self.models) + b"\n"

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(entry.best.display for entry in self.entries.values()))

    @cached_property
    def conflicts(self) -> dict[str, dict[str, list[str]]]:
        found: dict[str, dict[str, list[str]]] = {}
        for canonical, entry in self.entries.items():
            held: dict[str, list[str]] = {}
            for backend, row in entry.holders:
                if row.digest and not row.cloud:
                    held.setdefault(row.digest, []).append(backend)
            if len(held) > 1:
                found[canonical] = held
        return found

    @cached_property
    def digests(self) -> frozenset[str]:
        held = (row.digest for entry in self.entries.values() for _, row in entry.holders)
        return frozenset(digest for digest in held if digest)


def _called(name: str, row: _Row) -> _Row:
    """A model's row under another name."""
    data = row.data | {field: name for field in ("name", "model") if field in row.data}
    parsed = names.parse(name)
    return replace(
        row,
        data=data,
        text=compact(data),
        canonical=parsed.canonical,
        display=name,
        owner=parsed.namespace,
    )


def _newest(row: _Row) -> tuple[bool, int]:
    return row.fit, row.at_ns


def _joined(rows: Iterable[_Row]) -> bytes:
    return b'{"models":[' + b",".join(row.text for row in rows) + b"]}"


def _openai(shown: str, owner: str, row: _Row) -> dict[str, Any]:
    created = row.at_ns // _SECOND
    return {"id": shown, "object": "model", "created": created, "owned_by": owner}


@dataclass(frozen=True, slots=True)
class _Show:
    body: bytes
    capabilities: frozenset[str]


class Catalog:
    """
    What the backends have, by what they said last. Mutable, synchronous.

    Backends are named by their configured name, models by their canonical name unless said
    otherwise. What the listings return is shared and cached: read it, never change it.

    Args:
        clock: Monotonic seconds.
        remember_s: How long the rows of a backend that is away stay listed; may be set later.
        believe_s: How long a reading of a backend's memory is believed.
        shows: How many answers to show are kept, one per digest.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        remember_s: float = 86400,
        believe_s: float = 30,
        shows: int = 512,
    ) -> None:
        self._clock = clock
        self.remember_s = remember_s
        self._believe_s = believe_s
        self._show_limit = shows
        self._shelves: dict[str, _Shelf] = {}
        self._copies: dict[str, dict[PlacementKey, Copy]] = {}
        self._edition = 0
        self._remade = 0  # the last edition that may differ in anything from the one before
        self._journal: deque[str] = deque(maxlen=_JOURNAL)  # of each edition since: whose memory
        self._shows: dict[str, _Show] = {}
        self._aliases = Aliases()
        self._versions: tuple[_Version, _Version] | None = None
        self._listing: _Listing | None = None
        self._ps: tuple[dict[str, Any], bytes] | None = None

    @property
    def aliases(self) -> Aliases:
        """Names that stand for models: in what is listed, and nowhere else here."""
        return self._aliases

    @aliases.setter
    def aliases(self, aliases: Aliases) -> None:
        self._aliases = aliases
        self._listing = None

    @property
    def edition(self) -> int:
        """
        Grows with what was learned, and with what lapsed: what was made of an older one is out of
        date. That something known was seen again is nothing learned.
        """
        listing = self._listing
        if listing is None or listing.until < math.inf or listing.remember_s != self.remember_s:
            self._view()
        return self._edition

    @property
    def lists_edition(self) -> int:
        """As `edition`, but for what moves in memory only."""
        return min(self.edition, self._remade)

    def moved_since(self, edition: int) -> set[str] | None:
        """The backends of which no more than the memory changed since; None: more may have."""
        count = self._edition - edition
        if edition < self._remade or count > len(self._journal):
            return None
        return {self._journal[-at] for at in range(1, count + 1)}

    # What happened

    def join(self, backend: str) -> None:
        """A backend joined the pool; it counts as up. One that is there keeps what is known."""
        self._shelves.setdefault(backend, _Shelf())

    def drop(self, backend: str) -> None:
        """A backend left the pool: what it had is forgotten."""
        self._shelves.pop(backend, None)
        self._changed()

    def note_tags(self, backend: str, rows: Any, asked_at: float | None = None) -> bool:
        """
        Its list of models was read.

        Args:
            backend: Its configured name.
            rows: The value of ``models``; anything may be in it. None, as Go writes an empty list,
                is empty; what is no list at all says nothing.
            asked_at: When the question went out: the answer says nothing of what was found missing
                later. None: now.

        Returns:
            Whether the list is another than before.
        """
        shelf = self._shelf(backend)
        self._settle(shelf)
        if not (rows is None or isinstance(rows, list)):
            return False
        found: dict[str, _Row] = {}
        for row in _rows(rows, "modified_at"):
            found.setdefault(row.canonical, row)
        if not shelf.read:  # also an empty list is an answer
            self._remake()
        _settle_missing(shelf, found, self._clock() if asked_at is None else asked_at)
        changed = found.keys() != shelf.rows.keys() or any(
            row.text != shelf.rows[canonical].text for canonical, row in found.items()
        )
        shelf.read = True
        if changed:
            shelf.rows = found
            known = {row.identity for row in found.values()}
            shelf.contexts = {k: v for k, v in shelf.contexts.items() if k in known}
            shelf.defaults = {k: v for k, v in shelf.defaults.items() if k in known}
            self._changed()
        return changed

    def note_ps(self, backend: str, rows: Any, asked_at: float | None = None) -> PsChange:
        """
        Its list of models in memory was read.

        Args:
            backend: Its configured name.
            rows: As for `note_tags`.
            asked_at: When the question went out: what a call of ours proved since then is newer
                than the answer. None: now.
        """
        shelf = self._shelf(backend)
        if not (rows is None or isinstance(rows, list)):
            return PsChange()
        now, before = self._clock(), shelf.residents
        shelf.ps_at, shelf.ps_rows, self._ps = now, _rows(rows, "expires_at"), None
        newer = [it for it in before if it.noted_at > (now if asked_at is None else asked_at)]
        after = newer + [
            _seen(row, before, now)
            for row in shelf.ps_rows
            if not any(_same(it, row) for it in newer)
        ]
        if list(map(_content, before)) == list(map(_content, after)):
            for old, new in zip(before, after, strict=True):  # what was made of them holds
                old.seen_at = new.seen_at
        else:
            shelf.residents = after
            self._learned(backend)
        _learn_contexts(shelf)
        recent = {k: old for k, old in shelf.latest.items() if now - old.seen_at <= _RELOAD_S}
        shelf.latest = recent | {each.identity: each for each in shelf.residents}
        return _ps_change(before, shelf.residents)

    def note_version(self, backend: str, version: Any) -> None:
        """It told its version. Another one than before may have other routes."""
        shelf = self._shelf(backend)
        if version != shelf.version_text:
            shelf.version_text, shelf.version = version, _version(version)
            shelf.unsupported.clear()
            shelf.supported.clear()
            self._remake()
            self._compare_versions()

    def note_failed(self, backend: str) -> None:
        """Its first check, or the first reading of its models, failed."""
        self._settle(self._shelf(backend))

    def note_away(self, backend: str) -> None:
        """It went down: what it had in memory is forgotten, what it lists is remembered a while."""
        shelf = self._shelf(backend)
        shelf.settled = True
        if shelf.away_since is None:
            shelf.away_since = self._clock()
        shelf.ps_at, shelf.ps_rows, shelf.residents = -math.inf, [], []
        shelf.latest.clear()
        self._changed()

    def note_back(self, backend: str) -> None:
        """It came up."""
        self._shelf(backend).away_since = None
        self._changed()

    def note_missing(self, backend: str, canonical: str) -> None:
        """It said it does not have the model: so it is until its tags, read again, list it."""
        shelf = self._shelf(backend)
        row = shelf.rows.pop(canonical, None)
        known = shelf.missing.get(canonical, (0.0, None))[1]
        shelf.missing[canonical] = (self._clock(), row.digest if row else known)
        self._changed()

    def note_no_route(self, backend: str, feature: str) -> None:
        """It does not know the route."""
        unsupported = self._shelf(backend).unsupported
        if len(unsupported) < _MOST_UNSUPPORTED:
            unsupported.add(feature)
            self._remake()

    def note_route(self, backend: str, feature: str) -> None:
        """It knows a route that not every Ollama has."""
        supported = self._shelf(backend).supported
        if len(supported) < _MOST_UNSUPPORTED:
            supported.add(feature)

    def note_loaded(self, backend: str, key: PlacementKey) -> None:
        """A load or a call of ours completed there: a runner with these options is in memory."""
        shelf, now, copy = self._shelf(backend), self._clock(), self.copy(backend, key)
        shelf.relisted.pop(key.model, None)
        if copy.stub:
            return
        old = copy.resident
        if old is None:
            row = shelf.rows.get(key.model)
            new = _Resident(key.model, row.digest if row else None, key, None, now, now)
        elif not copy.fits:
            new = replace(old, key=key, context=None, seen_at=now, noted_at=now)
        elif old.key is None:
            new = replace(old, key=key, seen_at=now, noted_at=now)
        else:  # no reload: as it was, options a key may leave out included
            new = old
            old.seen_at = old.noted_at = now
            if shelf.residents[-1] is old:
                return
        shelf.residents = [*(other for other in shelf.residents if other is not old), new]
        shelf.latest[new.identity] = new
        if new is not old or shelf.has_twins:
            self._learned(backend)

    def note_unloaded(self, backend: str, canonical: str) -> None:
        """It took the model out of memory on our request."""
        shelf = self._shelf(backend)
        gone = shelf.resident(canonical)
        if gone is not None:
            shelf.residents = [other for other in shelf.residents if other is not gone]
            shelf.ps_rows = [row for row in shelf.ps_rows if not _same(row, gone)]
            self._ps = None
            self._learned(backend)

    def note_show(self, digest: str, body: bytes) -> None:
        """
        Keep a model's answer to a plain show; what is no JSON object is not kept.

        When full, answers for digests that are listed nowhere make room; else it is not kept.
        """
        try:
            told = json.loads(body)
        except (ValueError, RecursionError):
            return
        if not isinstance(told, dict):
            return
        if digest not in self._shows and len(self._shows) >= self._show_limit:
            listed = self._view().digests
            self._shows = {known: show for known, show in self._shows.items() if known in listed}
        if digest in self._shows or len(self._shows) < self._show_limit:
            self._shows[digest] = _Show(body, _capabilities(told))

    # Where a model is

    def shown(self, canonical: str) -> str:
        """A model's name as Ollama lists it, in the spelling of the backend's list if known."""
        entry = self._view().entries.get(canonical)
        return names.display(canonical) if entry is None else entry.best.display

    def meant(self, canonical: str) -> str | None:
        """The model a name stands for in the listings: itself, or the first of an alias's; None."""
        alias = self._aliases.find(canonical)
        return canonical if alias is None else self._view().meant(alias)

    def was_read(self, backend: str) -> bool:
        """Whether its list of models was ever read."""
        return self._shelf(backend).read

    def settled(self) -> bool:
        """Whether every backend has answered or failed once; before, no model is unknown."""
        return all(shelf.settled for shelf in self._shelves.values())

    def knows(self, canonical: str) -> bool:
        """Whether any known backend lists it."""
        return canonical in self._view().entries

    def holders(self, canonical: str) -> tuple[str, ...]:
        """The backends that list it, those that are away included, in the order they joined."""
        entry = self._view().entries.get(canonical)
        return tuple(backend for backend, _ in entry.holders) if entry else ()

    def lists(self, backend: str, canonical: str) -> bool:
        """Whether the backend lists it, or did before it went away."""
        shelf = self._shelf(backend)
        return canonical in shelf.rows and not shelf.lapsed(self._clock(), self.remember_s)

    def is_stub(self, backend: str, canonical: str) -> bool:
        """Whether what it lists under that name is a model that runs at ollama.com."""
        row = self._shelf(backend).rows.get(canonical)
        return row is not None and row.cloud

    def listed(self, backend: str) -> list[str]:
        """The models it listed last."""
        return list(self._shelf(backend).rows)

    def names(self) -> tuple[str, ...]:
        """The display names of all known models, sorted."""
        return self._view().names

    def offered(self) -> tuple[str, ...]:
        """The names to hint at: those listed to clients."""
        return tuple(row.display for row in self._view().rows)

    def listed_again_after_missing(self, backend: str, canonical: str) -> bool:
        """
        Whether its tags, read after it said 404, still list the same model: its file is damaged.

        Holds until a call of ours completes there, or the tags list it no more or with another
        digest.
        """
        return canonical in self._shelf(backend).relisted

    def supports(self, backend: str, feature: str) -> bool:
        """Whether it has the route, by its version and by what it said. When in doubt, yes."""
        shelf = self._shelf(backend)
        told = shelf.version or _FROM_SOURCE
        too_old = _FROM_SOURCE < told < _SINCE.get(feature, _FROM_SOURCE)
        return not too_old and feature not in shelf.unsupported

    def is_route_known(self, backend: str, feature: str) -> bool:
        """Whether it was asked for such a route before."""
        shelf = self._shelf(backend)
        return feature in shelf.unsupported or feature in shelf.supported

    def digest(self, backend: str, canonical: str) -> str | None:
        """The digest of the model there, 64 hex digits."""
        row = self._shelf(backend).rows.get(canonical)
        return None if row is None else row.digest

    def size_on(self, backend: str, canonical: str) -> int:
        """Bytes of its files there, 0 if unknown."""
        row = self._shelf(backend).rows.get(canonical)
        return 0 if row is None else row.size

    def size(self, canonical: str) -> int:
        """Bytes of its files, 0 if unknown."""
        entry = self._view().entries.get(canonical)
        return 0 if entry is None else entry.best.size

    def is_embedding_only(self, canonical: str) -> bool:
        """
        Whether it can embed and not generate.

        Show decides where its answer is known: tags may say ``completion`` of a model that only
        embeds, and before 0.30 say nothing.
        """
        entry = self._view().entries.get(canonical)
        if entry is None:
            return False
        show = self._show(entry)
        able = show.capabilities if show else _capabilities(entry.best.data)
        return "embedding" in able and "completion" not in able

    def conflicts(self) -> dict[str, dict[str, list[str]]]:
        """Models of which backends hold different ones: canonical name, digest, backends."""
        return self._view().conflicts

    def usual_digest(self, canonical: str, among: Collection[str]) -> str | None:
        """The digest most of those backends list; of as many the newest, then the greatest."""
        entry = self._view().entries.get(canonical)
        held: dict[str, list[int]] = {}
        for backend, row in entry.holders if entry else ():
            if row.digest and not row.cloud and backend in among:
                held.setdefault(row.digest, []).append(row.at_ns)
        ranks = {digest: (len(times), max(times), digest) for digest, times in held.items()}
        return max(held, key=ranks.__getitem__, default=None)

    # What is in memory

    def residency(self, backend: str, key: PlacementKey) -> Residency:
        """
        Where the model is, seen from this key: a runner with other options is as good as none.

        A stub of a cloud model needs no load, so it counts as loaded. LOADING is not ours to say.
        """
        return self.copy(backend, key).residency(self._clock())

    def copy(self, backend: str, key: PlacementKey) -> Copy:
        """What there is to know of the model there, for one key; kept for this edition."""
        here = self._copies.get(backend)
        if here is None:
            here = self._copies[backend] = {}
        found = here.get(key)
        if found is None:
            if len(here) >= _MOST_COPIES:
                here.clear()
            found = here[key] = self._copy(backend, key)
        return found

    def _copy(self, backend: str, key: PlacementKey) -> Copy:
        shelf = self._shelf(backend)
        row, resident = shelf.rows.get(key.model), shelf.resident(key.model)
        known = None
        if row is None and (shelf.read or key.model in shelf.missing):
            known = Residency.ABSENT
        elif row is not None and row.cloud:
            known = Residency.LOADED
        elif row is None and resident is None:
            known = Residency.UNKNOWN
        fits = resident is not None and shelf.serves(resident, key)
        return Copy(
            context=self.known_context(backend, key),
            trained=None if row is None else row.trained,
            models_loaded=len(self.loaded(backend)),
            stub=row is not None and row.cloud,
            known=known,
            here=Residency.LOADED if fits else Residency.ON_DISK,
            fits=fits,
            believe_s=self._believe_s,
            resident=resident,
            shelf=shelf,
        )

    def loaded(self, backend: str) -> list[str]:
        """The models last known to be in its memory, by the name that loaded them."""
        return list(
            dict.fromkeys(resident.canonical for resident in self._shelf(backend).residents)
        )

    def memory(self, backend: str) -> tuple[InMemory, ...]:
        """The runners last known to be in its memory."""
        shelf = self._shelf(backend)
        found = []
        for it in shelf.residents:
            row = next((row for row in shelf.ps_rows if _same(it, row)), None)
            size = vram = expires_ns = 0
            if row is not None:
                size, expires_ns = row.size, row.at_ns
                vram = _number(row.data.get("size_vram")) or 0
            found.append(InMemory(it.canonical, it.key, it.context, size, vram, expires_ns))
        return tuple(found)

    def parameters_b(self, canonical: str) -> float | None:
        """Its parameters in thousands of millions, None: not told."""
        entry = self._view().entries.get(canonical)
        details = None if entry is None else entry.best.data.get("details")
        told = details.get("parameter_size") if isinstance(details, dict) else None
        return _parameters_b(told)

    def resident(self, backend: str, canonical: str) -> str | None:
        """The name it is in memory by there (a twin may have loaded it), None: it is not."""
        resident = self._shelf(backend).resident(canonical)
        return None if resident is None else resident.canonical

    def vram(self, backend: str) -> int:
        """Bytes of GPU memory its models take, by the last reading."""
        rows = self._shelf(backend).ps_rows
        return sum(_number(row.data.get("size_vram")) or 0 for row in rows)

    def resident_options(self, backend: str, canonical: str) -> PlacementKey | None:
        """The options its runner there was loaded with, None: no runner, or options unknown."""
        resident = self._shelf(backend).resident(canonical)
        if resident is None or resident.key is None:
            return None
        return PlacementKey(canonical, resident.key.options)

    def runner(self, backend: str, canonical: str) -> Runner | None:
        """How the model is in memory there; None: it is not."""
        shelf = self._shelf(backend)
        resident, row = shelf.resident(canonical), shelf.rows.get(canonical)
        if resident is None:
            return None
        default = shelf.defaults.get(shelf.identity(canonical))
        held = dict(resident.key.options).get("num_ctx", default) if resident.key else default
        return Runner(
            held if resident.context is None else resident.context,
            default,
            None if row is None else row.trained,
        )

    def reloads(self, backend: str, key: PlacementKey) -> str:
        """
        Why a load of *key* there is a load once more: ``num_ctx``, or ``options``.

        Empty: the model was not in memory there in the last ten minutes, or as it is to be now.
        """
        shelf = self._shelf(backend)
        old = shelf.latest.get(shelf.identity(key.model))
        if old is None or self._clock() - old.seen_at > _RELOAD_S or shelf.serves(old, key):
            return ""
        others = {name: value for name, value in key.options if name != "num_ctx"}
        held = dict(old.key.options).get("num_ctx") if old.key else None
        context = held if old.context is None else old.context
        alike = others if context is None else others | {"num_ctx": context}
        is_alike = shelf.serves(old, PlacementKey(key.model, tuple(sorted(alike.items()))))
        return "num_ctx" if is_alike else "options"

    def context(self, backend: str, canonical: str) -> int | None:
        """Tokens of context of its runner there, else those last seen there."""
        shelf = self._shelf(backend)
        resident = shelf.resident(canonical)
        now = None if resident is None else resident.context
        return shelf.contexts.get(shelf.identity(canonical)) if now is None else now

    def known_context(self, backend: str, key: PlacementKey) -> int | None:
        """Tokens of context a call with this key would have there: asked, default, last seen."""
        shelf = self._shelf(backend)
        wanted = dict(key.options).get("num_ctx")
        if wanted is None:
            default = shelf.defaults.get(shelf.identity(key.model))
            return self.context(backend, key.model) if default is None else default
        row = shelf.rows.get(key.model)
        return min(int(wanted), (row.trained if row else None) or int(wanted))

    # Merged answers

    def tags(self) -> dict[str, Any]:
        """
        The answer to ``/api/tags``: one row per name, most recently modified first.

        Of rows with one name the newest is listed. As in Ollama whole seconds count; within one
        the name decides, so that the order stays.
        """
        return self._view().tags

    def tags_json(self) -> bytes:
        """`tags` as it goes out."""
        return self._view().tags_json

    def models(self) -> dict[str, Any]:
        """The answer to ``/v1/models``, in the order of `tags`."""
        return self._view().models

    def models_json(self) -> bytes:
        """`models` as it goes out, with Ollama's final newline."""
        return self._view().models_json

    def model(self, text: str) -> dict[str, Any] | None:
        """The answer to ``/v1/models/{text}``, the name echoed as asked; None: not known."""
        try:
            name = names.parse(text)
        except names.InvalidName:
            return None
        entry = self._view().entries.get(self.meant(name.canonical) or "")
        return None if entry is None else _openai(text, name.namespace, entry.best)

    def ps(self) -> dict[str, Any]:
        """
        The answer to ``/api/ps``: all rows of the backends that are up, latest to expire first.

        A model loaded on two backends has two rows, as it is in memory twice: the command line
        prints one line each, and clients that look for one model take the first.
        """
        return self._ps_view()[0]

    def ps_json(self) -> bytes:
        """`ps` as it goes out."""
        return self._ps_view()[1]

    def show(self, canonical: str) -> bytes | None:
        """A kept answer to ``/api/show``, of the listed digest if it is there, else of another."""
        entry = self._view().entries.get(canonical)
        show = self._show(entry) if entry else None
        return show.body if show else None

    def digests_without_show(self) -> list[tuple[str, str, str]]:
        """
        What to ask show for next: backend that is up, display name, digest. No cloud stubs.

        No more than there is room for, or they would push each other out for ever.
        """
        listed = self._view().digests
        room = self._show_limit - sum(digest in listed for digest in self._shows)
        wanted: dict[str, tuple[str, str, str]] = {}
        for backend, shelf in self._shelves.items():
            for row in shelf.rows.values() if shelf.away_since is None else ():
                if row.digest and row.digest not in self._shows and not row.cloud:
                    wanted.setdefault(row.digest, (backend, row.display, row.digest))
        return list(wanted.values())[:room]

    def version(self, policy: str = "min") -> str | None:
        """
        The version we answer with.

        Args:
            policy: ``min`` or ``max`` over the backends that are up, with none up as it was last;
                any other text is the answer itself.

        Returns:
            ``major.minor.patch``; None before any backend told one. A build from source calls
            itself 0.0.0 and counts only if there is nothing else.
        """
        if policy not in ("min", "max"):
            return policy
        if self._versions is None:
            return None
        return ".".join(map(str, self._versions[policy == "max"]))

    def version_of(self, backend: str) -> str | None:
        """The version the backend told, as it told it."""
        told = self._shelf(backend).version_text
        return told if isinstance(told, str) else None

    # Inside

    def _shelf(self, backend: str) -> _Shelf:
        """Its shelf; of a backend that is not in the pool an empty one that nobody keeps."""
        return self._shelves.get(backend) or _Shelf()

    def _settle(self, shelf: _Shelf) -> None:
        """It has answered or failed once: models may be unknown from now on."""
        if not shelf.settled:
            shelf.settled = True
            self._remake()

    def _learned(self, backend: str) -> None:
        """What was made of this edition is out of date, in what is of one backend's memory."""
        self._edition += 1
        self._journal.append(backend)
        self._copies.pop(backend, None)

    def _remake(self) -> None:
        """What was made of this edition is out of date."""
        self._edition += 1
        self._remade = self._edition
        self._journal.clear()
        self._copies.clear()

    def _changed(self) -> None:
        self._remake()
        self._listing = self._ps = None
        self._compare_versions()

    def _compare_versions(self) -> None:
        up = [s.version for s in self._shelves.values() if s.version and s.away_since is None]
        released = [version for version in up if version != _FROM_SOURCE] or up
        if released:
            self._versions = (min(released), max(released))

    def _view(self) -> _Listing:
        now, listing = self._clock(), self._listing
        if listing is None or now >= listing.until or listing.remember_s != self.remember_s:
            listing = _Listing(self._shelves, now, self.remember_s, self._aliases)
            self._listing = listing
            self._remake()
        return listing

    def _ps_view(self) -> tuple[dict[str, Any], bytes]:
        if self._ps is None:
            up = [shelf for shelf in self._shelves.values() if shelf.away_since is None]
            fit = (row for shelf in up for row in shelf.ps_rows if row.fit)
            rows = sorted(fit, key=lambda row: (-row.at_ns, row.display))
            self._ps = {"models": [row.data for row in rows]}, _joined(rows)
        return self._ps

    def _show(self, entry: _Entry) -> _Show | None:
        digests = (entry.best.digest, *(row.digest for _, row in entry.holders))
        kept = (self._shows.get(digest) for digest in digests if digest)
        return next((show for show in kept if show), None)


def _settle_missing(shelf: _Shelf, found: dict[str, _Row], asked_at: float) -> None:
    """Compare a new list with the models that were found missing; take those out it cannot know."""
    for canonical, (at, digest) in list(shelf.missing.items()):
        if at > asked_at:
            found.pop(canonical, None)
            continue
        del shelf.missing[canonical]
        if canonical in found and digest in (None, found[canonical].digest):
            shelf.relisted[canonical] = found[canonical].digest
    shelf.relisted = {
        canonical: digest
        for canonical, digest in shelf.relisted.items()
        if canonical in shelf.missing or (canonical in found and found[canonical].digest == digest)
    }


def _seen(row: _Row, before: list[_Resident], now: float) -> _Resident:
    """A row of ps as a resident; its options are kept unless its context became another."""
    old = next((resident for resident in before if _same(resident, row)), None)
    kept = old is not None and (old.context is None or row.context in (None, old.context))
    key = old.key if old is not None and kept else None
    return _Resident(row.canonical, row.digest, key, row.context, now)


def _learn_contexts(shelf: _Shelf) -> None:
    for resident in shelf.residents:
        if resident.context is None:
            continue
        shelf.contexts[resident.identity] = resident.context
        if resident.key is not None and "num_ctx" not in dict(resident.key.options):
            shelf.defaults[resident.identity] = resident.context


def _content(it: _Resident) -> tuple[str, str | None, PlacementKey | None, int | None]:
    """All that others can make something of."""
    return (it.canonical, it.digest, it.key, it.context)


def _ps_change(before: list[_Resident], after: list[_Resident]) -> PsChange:
    old = {resident.canonical: resident.context for resident in before}
    new = {resident.canonical: resident.context for resident in after}
    return PsChange(
        changed=old != new,
        appeared=tuple(canonical for canonical in new if canonical not in old),
        vanished=tuple(canonical for canonical in old if canonical not in new),
    )
