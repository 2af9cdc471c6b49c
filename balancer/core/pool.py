"""
Members: configured identity and remembered state, side by side.

Laws:
- Health, breaker and operator's switch are three separate facts; readiness is computed.
- A check never closes a breaker; a request never marks a backend down.
- Whatever is granted (slot, permits, load token) is settled exactly once, synchronously.
- What may serve a call is correctness and is decided here; who among them does is the scheduler's.
- What only the catalogue, the shape of the pool and the operator's switches can change is found
  once for all calls alike (`_places`), and which of these are open as long as nothing moves that
  could hinder one (`_moves`); how busy they are is looked at for each call.
"""

from __future__ import annotations

import math
import random
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from balancer.core import names
from balancer.core.breaker import Gate, Permit, Rule
from balancer.core.catalog import Catalog, Copy, InMemory
from balancer.core.domain import (
    ALL,
    OTHER,
    Backend,
    BreakerState,
    Call,
    Candidate,
    CheckResult,
    Mark,
    Outcome,
    PlacementKey,
    Residency,
    Route,
    Switch,
    Verdict,
)
from balancer.core.events import (
    AttemptEnded,
    AttemptFailed,
    BackendDrained,
    BreakerMoved,
    BreakersReset,
    CatalogChanged,
    CheckEnded,
    Emit,
    HealthFlipped,
    Hears,
    LoadEnded,
    LoadStarted,
    MemberJoined,
    MemberLeft,
    Suspected,
    SwitchMoved,
)
from balancer.core.health import Health
from balancer.core.load import Load as Load_
from balancer.core.pins import Pins
from balancer.core.running import Run
from balancer.core.scheduler import Began, Changed, Ended, Fact, FirstByte, LoadingNow
from balancer.core.slots import SlotBelief
from balancer.core.tiers import highest, tiers
from balancer.core.verdicts import HARMLESS, Facts, Judgement, is_cloud, marks
from balancer.core.watchdog import Suspect, Watchdog

# To look a member up in its enum takes longer than most of what is done with it here.
CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
SERVING, DRAINING, DISABLED = Switch.SERVING, Switch.DRAINING, Switch.DISABLED
LOADED, LOADING = Residency.LOADED, Residency.LOADING
OK, UNFIT, MISSING = Verdict.OK, Verdict.UNFIT, Verdict.MISSING
WELL: Final = marks(OK, Facts())
CUT: Final = frozenset({Verdict.BROKEN, Verdict.STALLED})
UNFIT_WINDOW_S: Final = 60.0
ANSWERS_IN_S: Final = 60.0  # so long after it joined, a silent backend may yet have any model
BROKEN: Final = frozenset({"breaker", "model breaker"})  # of the codes of a `Bar`
LASTING: Final = frozenset(
    {"unread", "not listed", "cloud", "rule", "route", "weights", "excluded"}
)
MOST_KNOWN: Final = 512  # kinds of calls; names and options are clients' choice
PASSED_ON: Final = 1000  # calls at once on a model that no GPU of ours runs
PROVIDER_INTERVAL_S: Final = 60.0  # the least between checks of what is not ours


@dataclass(frozen=True, slots=True)
class GateSettings:
    """Trip rules and backoff of one kind of breaker."""

    in_a_row: int
    backoff_s: float
    backoff_max_s: float
    window_s: float
    minimum: int
    ratio: float = 0.5
    half_open_max_s: float = 60.0


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What of the configuration the pool needs."""

    host: GateSettings = GateSettings(3, 1.0, 60.0, 30.0, 10)
    model: GateSettings = GateSettings(2, 10.0, 600.0, 120.0, 6, half_open_max_s=660.0)
    interval_s: float = 5.0
    fall: int = 3
    rise: int = 2
    first_byte_s: float = 30.0
    load_s: float = 600.0


class ProspectKind(Enum):
    """What waiting may bring a call."""

    OPEN = "a backend can serve it"
    AWAY = "backends have the model, none can serve it now"
    EXHAUSTED = "every backend that could was tried"
    FORBIDDEN = "the rules allow it nowhere"
    UNKNOWN = "no backend has the model"
    NO_ROUTE = "no backend that has the model has the route, as Ollama may not have it"


@dataclass(frozen=True, slots=True)
class Prospect:
    """
    What waiting may bring a call.

    Args:
        retry_in_s: When the first backend may be back; inf: nobody knows it to come back.
        text: For people.
    """

    kind: ProspectKind
    retry_in_s: float = 0.0
    text: str = ""


@dataclass(frozen=True, slots=True)
class Bar:
    """Why a backend may not serve a call now: *code* for programs, *text* for people."""

    code: str
    text: str


_OPEN: Final = Prospect(ProspectKind.OPEN)
STRANGE: Final = Bar("weights", "has other weights of this model")


@dataclass(slots=True, eq=False)
class _Place:
    """
    A backend for the calls of one placement key and route, whatever goes on there.

    Args:
        copy: Of the catalogue's edition that its `_Places` are of.
        remote: It only passes them on.
        strange: It has other weights of the model than those its calls stay on.
    """

    name: str
    member: Member
    copy: Copy
    remote: bool
    strange: bool


@dataclass(slots=True)
class _Places:
    """
    All that hold what the calls need: model, route, right. In the order of the pool.

    Args:
        edition: The catalogue's, that they are of.
        open: Those where nothing hinders a call, as of *moves*.
    """

    all: tuple[_Place, ...]
    by_name: Mapping[str, _Place]
    any_strange: bool
    size_bytes: int
    edition: int
    open: list[_Place] = field(default_factory=list)
    moves: int = -1


@dataclass(frozen=True, slots=True)
class Standing:
    """
    How one backend stands to a call.

    Args:
        bar: None: it may serve it now.
        returns_in_s: When it may again; 0: now; inf: nobody knows.
        candidate: As a scheduler sees it, or would.
    """

    backend: str
    bar: Bar | None
    returns_in_s: float
    candidate: Candidate


@dataclass(slots=True, eq=False)
class Lease:
    """
    The right to use one slot of one backend.

    `settle` is synchronous and idempotent, and must be called; a lease that is dropped without
    it warns. `on_revoke` is the holder's: called when the backend is confirmed dead or hung and
    this call has not had a byte.

    Args:
        run: What has come of it, for the scheduler.
    """

    backend: Backend
    call: Call
    number: int
    why: str
    granted_at: float
    cold: bool
    _pool: Pool = field(repr=False)
    _permits: tuple[Permit, ...] = field(repr=False)
    run: Run = field(repr=False)
    on_revoke: Callable[[Judgement], None] | None = None
    others_move: bool = False  # revoked for its model's silence; other models there make progress
    alone: bool = False  # nothing else ran there when it was granted
    settled: bool = False

    @property
    def remote(self) -> bool:
        """The backend only passes the call on, to where the model runs."""
        return self.run.remote

    @property
    def began(self) -> bool:
        """Whether a byte has come."""
        return self.run.first_at is not None

    def moved(self, records: int = 1) -> None:
        """Bytes came from the backend, with that many records, more or less."""
        self.run.records += records
        self._pool._moved(self)  # noqa: SLF001 - two halves of one thing

    def settle(self, outcome: Outcome) -> None:
        """Give slot and permits back, with what is to be learned from it."""
        if not self.settled:
            self.settled = True
            self._pool._settle(self, outcome, self._permits)  # noqa: SLF001

    def release(self) -> None:
        """Give everything back; nothing was sent."""
        now = self._pool.now()
        self.settle(Outcome(Verdict.STOPPED, now, now, text="never sent"))

    def revoke(self, judgement: Judgement) -> None:
        """Tell the holder to give up here and go elsewhere, if no byte has come."""
        if self.on_revoke is not None and not self.began and not self.settled:
            self.on_revoke(judgement)

    def __del__(self) -> None:
        if not self.settled:
            warnings.warn(f"a lease on {self.backend.name} leaked", ResourceWarning, stacklevel=1)


@dataclass(slots=True)
class Loading:
    """The load token of a member, taken: the detached load under way there."""

    key: PlacementKey
    since: float
    why: str
    permits: tuple[Permit, ...] | None
    reloads: str = ""  # as `Catalog.reloads` says


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial of an open breaker, to be carried out now. `model` None: the backend's own."""

    backend: str
    model: str | None
    permit: Permit
    midstream: bool


@dataclass(slots=True, eq=False)
class Member:
    """A backend and what we remember of it. Outlives a reload."""

    backend: Backend
    health: Health
    gate: Gate
    load: Load_
    switch: Switch = Switch.SERVING
    models: dict[str, Gate] = field(default_factory=dict)
    leases: dict[Lease, None] = field(default_factory=dict)  # in the order they were granted
    loading: Loading | None = None
    asked: dict[str, PlacementKey] = field(default_factory=dict)
    unfit: dict[str, float] = field(default_factory=dict)
    suspects: set[str] = field(default_factory=set)
    trouble: str = ""  # why it refuses us, if it does
    joined_at: float = 0.0

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.backend.name


@dataclass(frozen=True, slots=True)
class BreakerView:
    """A breaker as people and metrics see it. `model` None: the backend's own."""

    model: str | None
    state: BreakerState
    reason: str
    retry_in_s: float
    trips: int
    stale: int
    trial: str = ""  # when the next is, for people; empty while closed


@dataclass(frozen=True, slots=True)
class BackendView:
    """A member as people and metrics see it."""

    name: str
    url: str
    up: bool | None
    error: str
    since_s: float
    version: str | None
    switch: Switch
    enabled: bool
    slots: int | None
    in_flight: dict[str, int]
    breakers: tuple[BreakerView, ...]
    loading: str | None
    loading_s: float
    cooling_s: float
    first_byte_s: float
    available: tuple[str, ...]
    loaded: tuple[str, ...]
    vram_bytes: int
    trouble: str
    source: str = ""
    cloud: bool = False


class Pool:
    """
    All members, by name.

    Args:
        priorities: The tier of each backend; empty: all are of one.
        pins: What is to be kept in memory.
        changed: Told after anything that may let a waiting call start; the dispatcher's kick.
        refresh: Told the name of a backend whose lists should be read again soon.
        abandon: Told the name of a backend that is dead: a load under way there ends.
        usual: The key of calls for a model that ask for nothing.
        note: Told the scheduler's facts about leases.
        hears: Whether attempts that did not fail are to be told.
    """

    def __init__(
        self,
        settings: PoolSettings,
        catalog: Catalog,
        clock: Callable[[], float],
        rng: random.Random,
        emit: Emit,
        hears: Hears = lambda _: True,
    ) -> None:
        self.settings = settings
        self.catalog = catalog
        self.now = clock
        self._rng = rng
        self._emit = emit
        self._hears = hears
        self.changed: Callable[[], None] = lambda: None
        self.refresh: Callable[[str], None] = lambda _: None
        self.usual: Callable[[str], PlacementKey] = PlacementKey
        self.abandon: Callable[[str], None] = lambda _: None
        self.note: Callable[[Fact], None] = lambda _: None
        self.version = 0
        self.members: dict[str, Member] = {}
        self.priorities: Mapping[str, int] = {}
        self.pins = Pins()
        self._known: dict[tuple[PlacementKey, str], _Places] = {}
        self._latest: tuple[PlacementKey | None, Route | None, _Places | None] = (None, None, None)
        self._choices: dict[str, bool] = {}
        self._edition = -1  # of the catalogue, by which choices are known
        self._unsteady: dict[str, Member] = {}  # where time alone may change something
        self._moves = 0  # of whatever could hinder a backend: health, breakers, switches, suspicion
        self.watchdog = Watchdog(clock, settings.first_byte_s)

    def configure(self, settings: PoolSettings) -> None:
        """Take new settings over, also for the breakers that exist; `reshape` follows."""
        self.settings = settings
        self.watchdog.first_byte_s = settings.first_byte_s
        for member in self.members.values():
            _set_rules(member.gate, settings.host)
            for gate in member.models.values():
                _set_rules(gate, settings.model)

    # -- shape ---------------------------------------------------------------------------------

    def reshape(self, backends: Sequence[Backend]) -> tuple[list[str], list[str]]:
        """
        Take over a new list of backends; returns the names that joined and those that leave.

        The same name with the same url keeps its memory; a removed member ends what it runs.
        """
        wanted = {backend.name: backend for backend in backends}
        joined, left = [], []
        for name, member in list(self.members.items()):
            new = wanted.get(name)
            if new is None or new.url != member.backend.url:
                left.append(name)
                self._dismiss(member)
            else:
                member.backend = new
                member.load.configured = new.slots
                interval_s = self._interval_s(new)
                member.health.configure(interval_s, self.settings.fall, self.settings.rise)
        for name, backend in wanted.items():
            if name not in self.members:
                joined.append(name)
                self.members[name] = self._member(backend)
                self.catalog.join(name)
                self._emit(MemberJoined(self.now(), name, backend.url))
        for name in wanted:  # who comes first is who speaks for the account
            self.members[name] = self.members.pop(name)
        self.priorities = tiers(backends)
        self._forget_places()
        self._moves += 1
        self.note(Changed(at=self.now()))
        self._touch()
        return joined, left

    def _member(self, backend: Backend) -> Member:
        s = self.settings
        health = Health(self.now, self._rng, self._interval_s(backend), s.fall, s.rise)
        gate = self._gate(backend.name, None, s.host)
        load = Load_(self.now, backend.slots)
        return Member(backend, health, gate, load, joined_at=self.now())

    def _interval_s(self, backend: Backend) -> float:
        interval_s = self.settings.interval_s
        return max(interval_s, PROVIDER_INTERVAL_S) if backend.provider else interval_s

    def _gate(self, name: str, model: str | None, settings: GateSettings) -> Gate:
        def moved(old: BreakerState, new: BreakerState, reason: str, retry_in_s: float) -> None:
            shown = None if model is None else names.display(model)
            self._emit(BreakerMoved(self.now(), name, shown, old, new, reason, retry_in_s))
            self._moved_gate(name, model, new)

        return Gate(
            name if model is None else f"{name}/{model}",
            self.now,
            self._rng,
            _rule(settings),
            backoff_s=settings.backoff_s,
            backoff_max_s=settings.backoff_max_s,
            half_open_max_s=settings.half_open_max_s,
            on_move=moved,
            may_open_softly=lambda: self._has_other(name, model),
        )

    def _moved_gate(self, name: str, model: str | None, new: BreakerState) -> None:
        self._stir(name)
        member = self.members.get(name)
        if member is None:
            return
        if model is None and new is OPEN:
            # When most backends open at once, suspect ourselves and do not let waits grow.
            gates = [other.gate for other in self.members.values()]
            many = sum(g.state is not CLOSED for g in gates) * 2 > len(gates) > 1
            for gate in gates:
                gate.grow = not many
        if model is None and new is CLOSED:
            member.load.start_ramp()
            self._unsteady[member.name] = member
        if new is OPEN:  # what counts is who asks from now on
            member.asked.pop(model, None) if model is not None else member.asked.clear()
        self._touch()

    def _has_other(self, name: str, model: str | None) -> bool:
        """Whether another backend could take over: the last one is never opened for a ratio."""
        return any(
            other.name != name
            and other.backend.enabled
            and not other.backend.provider
            and other.health.up
            and other.gate.state is CLOSED
            and other.switch is SERVING
            and (model is None or self._may_take_over(other, model))
            for other in self.members.values()
        )

    def _may_take_over(self, other: Member, model: str) -> bool:
        gate = other.models.get(model)
        is_closed = gate is None or gate.state is CLOSED
        lists = self.catalog.lists(other.name, model)
        return is_closed and lists and self.allows(other.backend, model)

    def _dismiss(self, member: Member) -> None:
        """
        A member that left: forgotten at once.

        Its running calls keep their own reference. Nobody watches over them any more, so those
        that have had no byte go elsewhere, if they can be served there.
        """
        del self.members[member.name]
        self._unsteady.pop(member.name, None)
        self.catalog.drop(member.name)
        self._emit(MemberLeft(self.now(), member.name))
        left = Judgement(Verdict.SLOW, blameless=True, text="has left the pool")
        for lease in list(member.leases):
            call = lease.call
            if call.replayable and self.prospect(call, frozenset()).kind is ProspectKind.OPEN:
                lease.revoke(left)

    def _stir(self, name: str) -> None:
        """Something that may hinder a backend moved."""
        self._moves += 1
        self.note(Changed(name, at=self.now()))

    def _touch(self) -> None:
        self.version += 1
        self.changed()

    # -- what may serve ------------------------------------------------------------------------

    def candidates(self, call: Call, excluded: frozenset[str]) -> list[Candidate]:
        """Backends that may serve *call* now."""
        key, places, now = call.key, self._places(call), self.now()
        size_bytes, candidate = places.size_bytes, self._candidate
        return [
            candidate(place, key, size_bytes, now) for place in self._open(places, call, excluded)
        ]

    def peculiarity(self, call: Call, excluded: frozenset[str], backend: str) -> str:
        """What sets *backend*, which may serve *call* now, apart: other-weights, only, or empty."""
        places = self._places(call)
        if places.any_strange:
            place = places.by_name.get(backend)
            if place is not None and place.strange:
                return "other-weights"
        return "only" if len(self._open(places, call, excluded)) == 1 else ""

    def _places(self, call: Call) -> _Places:
        """Who holds what calls like this one need."""
        edition = self.catalog.edition
        key, route, known = self._latest  # a call is asked about several times on its way
        if key is call.key and route is call.route and known is not None:
            if known.edition == edition:
                return known
        else:
            known = self._known.get((call.key, call.route.feature))
        if known is None or not self._renew(known, call.key, edition):
            if len(self._known) > MOST_KNOWN:
                self._forget_places()
            known = self._known[call.key, call.route.feature] = self._find_places(call)
        self._latest = call.key, call.route, known
        return known

    def _renew(self, known: _Places, key: PlacementKey, edition: int) -> bool:
        """Look again at what has changed in memory since; False: more has changed."""
        if known.edition == edition:
            return True
        moved = self.catalog.moved_since(known.edition)
        if moved is None:
            return False
        for name in moved:
            place = known.by_name.get(name)
            if place is not None:
                place.copy = self.catalog.copy(name, key)
        known.edition = edition
        return True

    def is_choice(self, model: str) -> bool:
        """Whether calls for *model* may go to more than one backend."""
        edition = self.catalog.lists_edition
        if edition != self._edition or len(self._choices) > MOST_KNOWN:
            self._edition = edition
            self._choices.clear()
        found = self._choices.get(model)
        if found is None:
            found = self._choices[model] = len(self.holders(model)) > 1
        return found

    def _forget_places(self) -> None:
        self._known.clear()
        self._choices.clear()
        self._latest = None, None, None

    def _find_places(self, call: Call) -> _Places:
        holders = [member for member in self.members.values() if self._holds(member, call)]
        strange = self.strangers(call)
        places = [self._place(m, call.key, strange=m.name in strange) for m in holders]
        by_name = {place.name: place for place in places}
        size = self.catalog.size(call.key.model)
        return _Places(tuple(places), by_name, bool(strange), size, self.catalog.edition)

    def _place(self, member: Member, key: PlacementKey, *, strange: bool) -> _Place:
        copy, remote = self.catalog.copy(member.name, key), self.is_remote(member.name, key.model)
        return _Place(member.name, member, copy, remote, strange)

    def _open(
        self, places: _Places, call: Call, excluded: frozenset[str], *, exists: bool = True
    ) -> list[_Place]:
        """
        The places where *call* may be served now.

        Vectors of different weights do not compare, so embeddings never leave theirs; other calls
        do when nobody else can serve them now.
        """
        key, found = call.key, []
        if places.moves == self._moves and not excluded:
            return places.open
        is_lasting = not places.any_strange and not excluded
        for place in places.all:
            if place.name not in excluded:
                hindrance = _hindrance(place.member, key.model)
                if not hindrance:
                    found.append(place)
                elif hindrance in BROKEN:
                    is_lasting = False  # each call leaves its trace
                    if exists and not place.remote:
                        _note_asked(place.member, key)
            if place.member.load.is_resting:
                is_lasting = False  # a cool-off ends by the clock
        if is_lasting:
            places.open, places.moves = found, self._moves
        if places.any_strange:
            usual = [place for place in found if not place.strange]
            if call.embedding or usual:
                return usual
        return found

    def _bars(self, call: Call, excluded: frozenset[str]) -> list[tuple[Member, Bar | None]]:
        """Every member, and why it may not serve *call* now; weights as for `_open`."""
        bars = [(m, self.bar(m, call, excluded)) for m in self.members.values()]
        strange = self.strangers(call)
        any_usual = any(bar is None and m.name not in strange for m, bar in bars)
        if strange and (call.embedding or any_usual):
            return [
                (m, STRANGE if m.name in strange and (b is None or call.embedding) else b)
                for m, b in bars
            ]
        return bars

    def strangers(self, call: Call) -> frozenset[str]:
        """
        Backends with other weights of the model than those its calls stay on.

        They stay on what most backends have that could serve the call; one that is merely away
        counts, so that an outage moves nothing, one that is disabled does not.
        """
        model = call.key.model
        if model not in self.catalog.conflicts():
            return frozenset()
        holders = [m for m in self.members.values() if self._holds(m, call)]
        counted = [m.name for m in holders if m.backend.enabled and m.switch is not DISABLED]
        usual = self.catalog.usual_digest(model, counted or [m.name for m in holders])
        return frozenset(m.name for m in holders if self.catalog.digest(m.name, model) != usual)

    def _candidate(
        self, place: _Place, key: PlacementKey, size_bytes: int, now: float
    ) -> Candidate:
        member, copy, remote = place.member, place.copy, place.remote
        in_flight, total, slots, first_byte_s = member.load.look(key.model, now)
        is_idle = member.loading is None
        return Candidate(
            place.name,
            copy.residency(now) if is_idle and not remote else self._residency(place, key, now),
            in_flight,
            _slots(place, slots),
            # As long as all run this model there is nothing to look up.
            self._at_work(member) if total > in_flight or remote else total,
            is_idle,
            first_byte_s,
            copy.context,
            size_bytes,
            copy.models_loaded,
        )

    @staticmethod
    def _residency(place: _Place, key: PlacementKey, now: float) -> Residency:
        loading = place.member.loading
        if loading is not None and loading.key == key:
            return LOADING
        return LOADED if place.remote else place.copy.residency(now)

    def residency(self, member: Member, key: PlacementKey) -> Residency:
        """Where *key* is on that member, our own loads included."""
        return self._residency(self._place(member, key, strange=False), key, self.now())

    def _at_work(self, member: Member) -> int:
        """Calls there that it does not merely pass on."""
        counts = member.load.counts()
        return sum(n for model, n in counts.items() if not self.is_remote(member.name, model))

    def is_remote(self, backend: str, model: str) -> bool:
        """Whether the backend only passes calls for *model* on, to ollama.com."""
        return is_cloud(model) or self.catalog.is_stub(backend, model)

    def serves(self, member: Member, model: str) -> bool:
        """
        Whether calls for *model* go there.

        Cloud models go to the backends that are marked for them, whatever those list. Where none
        is, to the first that lists a stub and to no other: the next one's account is another. One
        that is alone needs neither.
        """
        if not is_cloud(model):
            return self.catalog.lists(member.name, model)
        marked = self._marked()
        if marked:
            return member in marked
        listing = (m for m in self.members.values() if self.catalog.lists(m.name, model))
        return member is next(listing, None)

    def _marked(self) -> list[Member]:
        """The backends for cloud models and the account; with one alone there is no doubt."""
        members = list(self.members.values())
        return [m for m in members if m.backend.cloud] or (members if len(members) == 1 else [])

    def holders(self, model: str) -> list[Member]:
        """The backends that calls for *model* go to, those that are away included."""
        return [member for member in self.members.values() if self.serves(member, model)]

    def account(self) -> Member | None:
        """Who speaks for the account: the first that is marked for it, of those that are up."""
        marked = self._marked()
        usable = [m for m in marked if m.backend.enabled and m.switch is not DISABLED]
        up = [m for m in usable if m.health.up]
        return next(iter(up or usable), None)

    def _holds(self, member: Member, call: Call) -> bool:
        """Whether it has the model, the route and the right: what waiting cannot change."""
        model = call.key.model
        return (
            self.serves(member, model)
            and self.allows(member.backend, model)
            and self.catalog.supports(member.name, call.route.feature)
            # A path that nobody knows could do anything there with the operator's own key.
            and not (member.backend.provider and call.route.operation == OTHER)
        )

    @staticmethod
    def allows(backend: Backend, model: str) -> bool:
        """Whether the backend's own rules let it serve *model* (a canonical name)."""
        name = names.parse(model)
        return any(names.matches(glob, name) for glob in backend.allow) and not any(
            names.matches(glob, name) for glob in backend.deny
        )

    def bar(self, member: Member, call: Call, excluded: frozenset[str]) -> Bar | None:
        """Why *member* may not serve *call* now; None: it may."""
        if not self._holds(member, call):
            return self._lack(member, call)
        return Bar("excluded", "was tried") if member.name in excluded else _away(member, call)

    def _lack(self, member: Member, call: Call) -> Bar:
        """What *member* lacks to ever serve *call*."""
        model = call.key.model
        if is_cloud(model) and not self.serves(member, model):
            return Bar("cloud", "is not where this cloud model goes (cloud: true)")
        if not is_cloud(model) and not self.catalog.was_read(member.name):
            error = member.health.last_error
            return Bar("unread", f"its models are not known yet{f': {error}' if error else ''}")
        if not self.serves(member, model):
            return Bar("not listed", "does not have this model")
        if not self.allows(member.backend, model):
            return Bar("rule", "its allow and deny rules rule this model out")
        return Bar("route", f"its Ollama does not know {call.route.path}")

    def standings(self, call: Call, excluded: frozenset[str]) -> list[Standing]:
        """How every backend stands to *call*, which need not exist: nothing remembers it."""
        found = []
        size_bytes = self.catalog.size(call.key.model)
        for member, bar in self._bars(call, excluded):
            returns_in_s = 0.0
            if bar is not None:
                returns_in_s = math.inf if bar.code in LASTING else self._returns_in(member, call)
            place = self._place(member, call.key, strange=False)
            candidate = self._candidate(place, call.key, size_bytes, self.now())
            found.append(Standing(member.name, bar, returns_in_s, candidate))
        return found

    def _returns_in(self, member: Member, call: Call) -> float:
        """Seconds until *member* may serve *call* again; inf: only an operator can tell."""
        if not member.backend.enabled or member.switch is not SERVING:
            return math.inf
        if not member.health.up:
            return member.health.due_in()
        gate = member.models.get(call.key.model)
        waits = [_trial_in(member.gate), member.load.cooling_s(call.key.model)]
        return max([*waits, _trial_in(gate)] if gate is not None else waits)

    def prospect(self, call: Call, excluded: frozenset[str], *, exists: bool = True) -> Prospect:
        """What waiting may bring *call*; one that does not *exist* leaves no trace."""
        places = self._places(call)
        if self._open(places, call, excluded, exists=exists):
            return _OPEN
        holders = [p.member for p in places.all if not (p.strange and call.embedding)]
        left = [m for m in holders if m.name not in excluded]
        if left:
            bars = ((m, _away(m, call)) for m in left)
            why = "; ".join(f"{m.name}: {discreet(bar.text if bar else '')}" for m, bar in bars)
            retry_in_s = min(self._returns_in(m, call) for m in left)
            hint = "" if math.isinf(retry_in_s) else f" Retry after {max(1, round(retry_in_s))} s."
            text = f"No backend can serve {call.model!r} now ({why}).{hint}"
            return Prospect(ProspectKind.AWAY, retry_in_s, text)
        if holders:
            return Prospect(ProspectKind.EXHAUSTED, text="every backend was tried")
        return self._nowhere(call)

    def _nowhere(self, call: Call) -> Prospect:
        unasked = self._unasked()
        if unasked is not None:
            return unasked
        model = call.key.model
        listing = [m for m in self.members.values() if self.serves(m, model)]
        if any(self.allows(m.backend, model) for m in listing):
            text = f"No backend with {call.model!r} serves {call.route.path}; "
            if call.route.optional:
                return Prospect(ProspectKind.NO_ROUTE, math.inf, f"{text}their Ollama has it not.")
            return Prospect(ProspectKind.AWAY, math.inf, f"{text}update Ollama there.")
        if listing:
            text = f"No backend may serve {call.model!r}: the allow and deny rules rule it out."
            return Prospect(ProspectKind.FORBIDDEN, text=text)
        quote = '"' if call.route.operation in ("embed", "embeddings") else "'"
        return self.absent(call.model, model, quote, call.principal.models)

    def absent(
        self, shown: str, canonical: str, quote: str = "'", globs: Sequence[str] = ALL
    ) -> Prospect:
        """
        What becomes of a call for a model that no backend is known to have.

        "Not found" only if all were asked: a backend that never answered may have it.

        Args:
            shown: The name as the text is to have it.
            quote: Around it, as Ollama has it on that route.
            globs: Over the models that the caller may hear of.
        """
        unasked = self._unasked()
        if unasked is not None:
            return unasked
        near = names.closest(shown, names.visible(globs, self.catalog.offered()))
        hint = f" Closest: {near}" if near else ""
        silent = [m for m in self.members.values() if self._may_have(m, canonical)]
        if silent:
            told = "; ".join(
                f"{m.name}: {discreet(m.health.last_error or 'its models are not read yet')}"
                for m in silent
            )
            text = f"Nobody has {shown!r}, but not all backends have answered yet ({told}).{hint}"
            return Prospect(ProspectKind.AWAY, math.inf, text)
        count = len(self.members)
        where = "" if count == 1 else f" on any of {count} backends"
        advice = self._how_to_pull(shown, canonical)
        if is_cloud(canonical):
            advice += ", or mark a backend that is signed in to ollama.com with cloud: true"
        text = f"model {quote}{shown}{quote} not found{where}, {advice}"
        return Prospect(ProspectKind.UNKNOWN, text=f"{text}.{hint}" if hint else text)

    def _how_to_pull(self, shown: str, canonical: str) -> str:
        """Begins with Ollama's own advice, which clients show, and says where a pull goes."""
        hosts = [m.backend for m in self.members.values() if not m.backend.provider]
        goes = sum(host.enabled and self.allows(host, canonical) for host in hosts)
        many = "all" if goes == len(hosts) else f"{goes} of"
        reach = f" goes to {many} {len(hosts)}" if len(hosts) > 1 else ""
        return f"try pulling it first (ollama pull {shown}{reach})"

    def _unasked(self) -> Prospect | None:
        if not self.members:
            return Prospect(ProspectKind.AWAY, math.inf, "There is no backend yet.")
        if not self.catalog.settled():
            return Prospect(ProspectKind.AWAY, 0.5, "The backends have not been asked yet.")
        return None

    def _may_have(self, member: Member, model: str) -> bool:
        """Whether it never told what it lists, and might be used for *model* if it has it."""
        if member.backend.provider:  # what it has goes there, whatever it lists
            return False
        is_closed = not member.backend.enabled or member.switch is DISABLED
        unread = not is_closed and not self.catalog.was_read(member.name)
        if unread and not member.health.up and self.now() - member.joined_at > ANSWERS_IN_S:
            return False  # a computer that is switched off must not make a 503 of every typo
        return unread and self.allows(member.backend, model)

    def has_room(self, call: Call) -> bool:
        """Whether a copy in memory has a free slot; of those of the highest tier."""
        if self.priorities:
            found = highest(self.candidates(call, frozenset()), self.priorities)
            return any(c.residency is LOADED and c.in_flight < c.slots for c in found)
        key, now = call.key, self.now()
        for place in self._open(self._places(call), call, frozenset()):
            load = place.member.load
            slots = _slots(place, load.slots(key.model))
            if load.in_flight(key.model) < slots and self._residency(place, key, now) is LOADED:
                return True
        return False

    def residencies(self, call: Call, excluded: frozenset[str]) -> set[Residency]:
        """How *call* finds its model, on the backends that may serve it now."""
        now = self.now()
        places = self._open(self._places(call), call, excluded)
        return {self._residency(place, call.key, now) for place in places}

    def backends(self) -> list[Backend]:
        """All there are, those that are away included."""
        return [member.backend for member in self.members.values()]

    def places(
        self, call: Call, excluded: frozenset[str], *, exists: bool = True
    ) -> Sequence[_Place]:
        """Where *call* may be served now; one that does not *exist* leaves no trace."""
        return self._open(self._places(call), call, excluded, exists=exists)

    def slots(self, backend: str, model: str) -> int:
        """Calls at once that the loaded model may take there now."""
        member = self.members.get(backend)
        if member is None:
            return 1
        return 1 if member.gate.one_at_a_time else member.load.slots(model)

    def belief(self, backend: str) -> SlotBelief | None:
        """What is believed of slots there; None: it has left."""
        member = self.members.get(backend)
        return None if member is None else member.load.belief

    def loading_on(self, backend: str) -> LoadingNow | None:
        """The detached load under way there."""
        member = self.members.get(backend)
        if member is None or member.loading is None:
            return None
        return LoadingNow(backend, member.loading.since, member.loading.key)

    def copy(self, backend: str, key: PlacementKey) -> Copy:
        """What there is to know of the model there, for one key."""
        return self.catalog.copy(backend, key)

    def memory(self, backend: str) -> Sequence[InMemory]:
        """What it has in memory."""
        return self.catalog.memory(backend)

    def usual_s(self, backend: str, model: str) -> float:
        """Time to first byte of late; 0: not known."""
        member = self.members.get(backend)
        return 0.0 if member is None else member.load.first_byte_s(model)

    def size(self, model: str) -> int:
        """Bytes of its files, 0: not known."""
        return self.catalog.size(model)

    def parameters_b(self, model: str) -> float | None:
        """Its parameters in thousands of millions, None: not told."""
        return self.catalog.parameters_b(model)

    def is_embedding_only(self, model: str) -> bool:
        """Whether it cannot generate."""
        return self.catalog.is_embedding_only(model)

    def loading(self, key: PlacementKey) -> list[LoadingNow]:
        """Detached loads of *key* under way."""
        return [
            LoadingNow(m.name, m.loading.since, key)
            for m in self.members.values()
            if m.loading is not None and m.loading.key == key
        ]

    def next_change(self, now: float) -> float:
        """When a wait by the clock ends that no event will tell of; inf: none does."""
        wait_s = math.inf
        for name, member in list(self._unsteady.items()):
            is_held, is_changing = member.gate.one_at_a_time, member.load.is_changing
            if is_held:
                rule = member.gate.rule
                wait_s = min(wait_s, rule.window_s / rule.buckets)
            if is_changing:
                wait_s = min(wait_s, member.load.next_change_s())
            if not is_changing and not member.gate.is_blamed:
                del self._unsteady[name]
        return now + wait_s

    def tell_time(self, now: float) -> None:
        """Time has come for what `next_change` told: no event says so of those that it is of."""
        for name in self._unsteady:
            self.note(Changed(name, at=now))

    # -- grants --------------------------------------------------------------------------------

    def lease(
        self,
        call: Call,
        backend: str,
        number: int,
        why: str,
        *,
        probe: bool = False,
        slots: int | None = None,
    ) -> Lease | None:
        """
        Take slot and permits in one step; None: one of them was not to be had.

        Args:
            probe: It may take one slot more than is believed in.
            slots: So many are believed in for this call; None: what is believed of the model.
        """
        places = self._places(call)
        place = places.by_name.get(backend)
        if place is None or (call.embedding and place.strange):
            return None
        member, model, remote = place.member, call.key.model, place.remote
        load = member.load
        is_open = places.moves == self._moves and place in places.open
        if not is_open and _hindrance(member, model):
            return None
        if slots is None:
            slots = load.slots(model)
        is_full = load.in_flight(model) >= _slots(place, slots) + probe
        permits = None if is_full else self._permits(member, None if remote else model)
        if permits is None:
            return None
        now = self.now()
        cold = why == "cold"
        alone = not load.in_flight()
        run = Run(call, member.name, now, cold, remote, probe)
        lease = Lease(member.backend, call, number, why, now, cold, self, permits, run, alone=alone)
        load.enter(model)
        member.leases[lease] = None
        self.note(Began(run))
        if remote:  # its silence says nothing of what runs here
            return lease
        answer_tokens = 0 if call.embedding else call.output_tokens
        self.watchdog.began(
            id(lease), backend, model, call.prompt_tokens, call.streaming, answer_tokens
        )
        return lease

    def _permits(self, member: Member, model: str | None) -> tuple[Permit, ...] | None:
        """Of the backend's breaker and the model's; *model* None: it has none here."""
        host = member.gate.acquire()
        if host is None:
            return None
        if model is None:
            return (host,)
        gate = member.models.get(model) or self._model_gate(member, model)
        own = gate.acquire()
        if own is None:
            host.settle(Mark.NEITHER)
            return None
        return host, own

    def _model_gate(self, member: Member, model: str) -> Gate:
        gate = member.models.get(model)
        if gate is None:
            gate = member.models[model] = self._gate(member.name, model, self.settings.model)
        return gate

    def _moved(self, lease: Lease) -> None:
        self.watchdog.moved(id(lease))
        if not lease.began:
            now = lease.run.first_at = self.now()
            member = self._member_of(lease)
            if member is not None and lease.call.streaming and not lease.remote:
                wait_s = now - lease.granted_at
                member.load.note_first_byte(lease.call.key.model, wait_s, alone=lease.alone)
            self.note(FirstByte(lease.run, now))
            _end_probe(member, lease, now)

    def _member_of(self, lease: Lease) -> Member | None:
        """The member it was granted on; None: that has left the pool."""
        member = self.members.get(lease.backend.name)
        return member if member is not None and lease in member.leases else None

    def _settle(self, lease: Lease, outcome: Outcome, permits: tuple[Permit, ...]) -> None:
        call = lease.call
        now = self.now()
        self.watchdog.ended(id(lease))
        name, verdict = lease.backend.name, outcome.verdict
        member = self._member_of(lease)
        if member is not None:
            del member.leases[lease]
            member.load.leave(call.key.model)
            spared = lease.others_move
            if lease.remote:
                self._conclude_remote(member, call.route.feature, outcome, permits[0])
            else:
                self._conclude(member, call.key, call.route.feature, outcome, permits, spared)
            self._tell_drained(member)
        else:  # the backend left the pool while the call ran
            for permit in permits:
                permit.settle(Mark.NEITHER)
        self.note(Ended(lease.run, outcome, now))
        if not lease.began:
            _end_probe(member, lease, now)
        kind = AttemptEnded if verdict in HARMLESS else AttemptFailed
        if kind is AttemptFailed or self._hears(kind):
            operation = call.route.operation
            self._emit(kind(now, call.id, operation, call.model, name, lease.number, outcome))
        self._touch()

    def _conclude_remote(
        self, member: Member, feature: str, outcome: Outcome, permit: Permit
    ) -> None:
        """
        What follows for a backend that only passed a call on.

        Whatever goes wrong, in whatever words, may be the provider's, the account's or the way's:
        no GPU here had a part in it.
        """
        verdict = outcome.verdict
        self._unsteady[member.name] = member
        mark, _ = marks(verdict, Facts(remote=True, unreached=outcome.unreached))
        if verdict is Verdict.NO_ROUTE and feature:
            self.catalog.note_no_route(member.name, feature)
        if member.backend.provider and verdict is OK:
            member.trouble = ""
        if member.backend.provider and outcome.status in (401, 403):
            member.trouble = f"refuses us: {outcome.text}"
        permit.settle(mark, 1, outcome.text)

    def _conclude(
        self,
        member: Member,
        key: PlacementKey,
        feature: str,
        outcome: Outcome,
        permits: tuple[Permit, ...] | None,
        others_move: bool = False,  # noqa: FBT001, FBT002 - a fact among others
    ) -> None:
        """Everything that follows from an outcome on this member."""
        model, verdict = key.model, outcome.verdict
        # A load that fails with options of a caller's choosing says nothing of the model.
        chosen = outcome.caused_load and bool(key.options)
        own_options = chosen and key != self.usual(model)
        if verdict is OK and not outcome.blameless and not own_options:
            self._went_well(member, key, permits)
            return
        self._unsteady[member.name] = member
        facts = Facts(
            several_unfit=verdict is UNFIT and not own_options and self._note_unfit(member, model),
            still_listed=verdict is MISSING
            and not outcome.odd_name
            and self.catalog.listed_again_after_missing(member.name, model),
            others_move=others_move,
            blank_model=outcome.blank_model,
            blameless=outcome.blameless or own_options,
            repeated_crash=outcome.repeated_crash,
        )
        host_mark, model_mark = marks(verdict, facts)
        match verdict:
            case Verdict.OK:
                member.load.note_ok(model)
                member.trouble = ""
                self.catalog.note_loaded(member.name, key)
            case Verdict.BUSY:
                member.load.note_busy(model, outcome.retry_after_s)
                self._stir(member.name)
            case Verdict.MISSING if not outcome.odd_name:
                member.asked.pop(model, None)
                self.catalog.note_missing(member.name, model)
                self.refresh(member.name)
            case Verdict.NO_ROUTE if feature:
                self.catalog.note_no_route(member.name, feature)
            case Verdict.UNFIT:
                self.catalog.note_unloaded(member.name, model)
                self.refresh(member.name)
            case Verdict.MISCONFIGURED:
                member.trouble = outcome.text
                member.load.note_busy(None)
                self._stir(member.name)
            case _:
                pass
        if permits is not None:
            # Where streams were cut, two trials must pass, and run long enough to be cut.
            successes = 2 if verdict in CUT else 1
            permits[0].settle(host_mark, 1, outcome.text, successes)
            permits[1].settle(model_mark, outcome.weight, outcome.text, successes)

    def _went_well(
        self, member: Member, key: PlacementKey, permits: tuple[Permit, ...] | None
    ) -> None:
        """`_conclude` for nearly all calls, whose marks need no thought."""
        member.load.note_ok(key.model)
        member.trouble = ""
        self.catalog.note_loaded(member.name, key)
        if permits is not None:
            host_mark, model_mark = WELL
            permits[0].settle(host_mark)
            permits[1].settle(model_mark)

    def _note_unfit(self, member: Member, model: str) -> bool:
        now = self.now()
        member.unfit[model] = now
        recent = [m for m, at in member.unfit.items() if at > now - UNFIT_WINDOW_S]
        member.unfit = {m: member.unfit[m] for m in recent}
        return len(recent) > 1

    # -- loads ---------------------------------------------------------------------------------

    def take_token(
        self,
        backend: str,
        key: PlacementKey,
        why: str,
        *,
        trial: bool = False,
        victims: Sequence[PlacementKey] = (),
        expected_s: float = 0.0,
        evict_s: float = 0.0,
    ) -> bool:
        """
        Take the member's single load token; False: it is taken, or a breaker says no.

        Args:
            trial: The load is the trial of an open breaker, whose permit the caller holds.
            victims, expected_s, evict_s: As of `Load`, to be told.
        """
        member = self.members.get(backend)
        if member is None or member.loading is not None:
            return False
        permits = None if trial else self._permits(member, key.model)
        if permits is None and not trial:
            return False
        now = self.now()
        member.loading = Loading(key, now, why, permits, self.catalog.reloads(backend, key))
        gone = tuple(names.display(victim.model) for victim in victims)
        shown = names.display(key.model)
        self._emit(LoadStarted(now, backend, shown, why, gone, expected_s, evict_s))
        return True

    def end_load(self, backend: str, key: PlacementKey, outcome: Outcome) -> None:
        """
        The detached load was answered: the token comes back, the permits hear.

        `changed` is told for a trial's load only. Of others the dispatcher hears next, by its
        `load_ended`: a call must hear that its load failed before another is planned for it.
        """
        member = self.members.get(backend)
        if member is None or member.loading is None or member.loading.key != key:
            return
        loading, member.loading = member.loading, None
        ok = outcome.verdict is OK
        changed, self.changed = self.changed, lambda: None
        try:
            self._conclude(member, key, "", outcome, loading.permits)
        finally:
            self.changed = changed
        load_s = self.now() - loading.since
        told = (backend, names.display(key.model), ok, load_s, outcome.text, loading.reloads)
        self._emit(LoadEnded(self.now(), *told))
        self._tell_drained(member)
        self.refresh(backend)
        self.version += 1
        if loading.permits is None:
            self.changed()

    # -- checks, trials, suspicion -------------------------------------------------------------

    def observe(self, name: str, result: CheckResult) -> None:
        """Fold one check in; a flip is told and acted upon."""
        member = self.members.get(name)
        if member is None:
            return
        now = self.now()
        self._emit(CheckEnded(now, name, result.ok, result.latency_s))
        known = member.health.state != "unknown"
        flip = member.health.observe(result)
        if flip is not None:
            self._stir(name)
        if result.ok and result.version:
            self.catalog.note_version(name, result.version)
        if result.ok and member.gate.state is OPEN:
            member.gate.bring_forward()
        if not result.ok and not known:
            self.catalog.note_failed(name)
        if flip is not None:
            self._flipped(member, up=flip, known=known, result=result)
        if member.health.hard_down:
            self.note(Changed(name, dead=True, at=self.now()))
            dead = Judgement(Verdict.FAULT, text=f"is down: {member.health.last_error}")
            for lease in list(member.leases):
                lease.revoke(dead)
            self.abandon(name)
        if flip is not None:
            self._touch()

    def _flipped(self, member: Member, *, up: bool, known: bool, result: CheckResult) -> None:
        now, name = self.now(), member.name
        if up:
            self.catalog.note_back(name)
            if known:
                member.load.start_ramp()
                self._unsteady[member.name] = member
                for gate in member.models.values():
                    gate.forget_growth()
            self.refresh(name)
        else:
            self.catalog.note_away(name)
        self._emit(HealthFlipped(now, name, up, result.error or f"Ollama {result.version}"))

    def note_tags(self, name: str, rows: list[Any], asked_at: float) -> None:
        """The backend's list of models was read; the question went out at *asked_at*."""
        if name not in self.members:
            return
        settled = self.catalog.settled()
        if self.catalog.note_tags(name, rows, asked_at):
            self._told_catalog(name)
        elif settled != self.catalog.settled():
            self._touch()

    def note_failed(self, name: str) -> None:
        """The backend's list of models could not be read the first time."""
        if name in self.members:
            self.catalog.note_failed(name)
            self._touch()

    def note_ps(self, name: str, rows: list[Any], asked_at: float) -> None:
        """The backend's list of loaded models was read; the question went out at *asked_at*."""
        member = self.members.get(name)
        if member is None:
            return
        change = self.catalog.note_ps(name, rows, asked_at)
        if change.changed:
            for model, gate in member.models.items():
                # That it came or went itself is how a model fails, and no reason for new hope.
                if {*change.appeared, *change.vanished} - {model}:
                    gate.forget_growth()
            self._told_catalog(name)
        else:
            self.note(Changed(name, at=self.now()))
            self.changed()  # what was too old to believe may be believed again

    def _told_catalog(self, name: str) -> None:
        loaded = tuple(names.display(model) for model in self.catalog.loaded(name))
        models = len(self.catalog.listed(name))
        self._emit(CatalogChanged(self.now(), name, models, loaded))
        self.note(Changed(name, at=self.now()))
        self._touch()

    def due_trials(self) -> Iterable[Trial]:
        """Open breakers whose trial is due, each with its permit; to be carried out now."""
        for member in list(self.members.values()):
            is_disabled = not member.backend.enabled or member.switch is DISABLED
            if not member.health.up or is_disabled:
                continue
            if member.gate.state is not CLOSED:
                permit = member.gate.acquire_trial()
                if permit is not None:
                    yield Trial(member.name, None, permit, member.gate.tripped_midstream)
                continue
            for model, gate in list(member.models.items()):
                if gate.state is CLOSED or not self._worth_a_trial(member, model):
                    continue
                permit = gate.acquire_trial()
                if permit is not None:
                    yield Trial(member.name, model, permit, gate.tripped_midstream)

    def _worth_a_trial(self, member: Member, model: str) -> bool:
        """A model in memory is tried by a canary; one that is not only if calls asked for it."""
        if self.catalog.resident(member.name, model) is not None:
            return True
        return model in member.asked and member.loading is None

    def suspects(self) -> list[Suspect]:
        """Models on which nothing has moved for too long; each is set aside until told more."""
        down = {m.name for m in self.members.values() if not m.health.up}
        found = []
        for suspect in self.watchdog.suspects(self.now(), down):
            member = self.members.get(suspect.backend)
            if member is None or suspect.model in member.suspects:
                continue
            member.suspects.add(suspect.model)
            self._stir(member.name)
            shown = names.display(suspect.model)
            self._emit(Suspected(self.now(), suspect.backend, shown, suspect.silent_s))
            found.append(suspect)
        return found

    def acquit(self, suspect: Suspect, *, answered: bool) -> None:
        """
        The silence has an excuse; what is lost there all the same goes elsewhere, unblamed.

        Args:
            answered: A canary was, by the very model, or a long call excuses that it was not;
                False: a load explains the silence, which may last as long as a load may.
        """
        now = self.now()
        member = self.members.get(suspect.backend)
        if member is not None:
            member.suspects.discard(suspect.model)
            self._stir(member.name)
        lost = self.watchdog.lost(suspect.backend, suspect.model) if answered else []
        self.watchdog.cleared(suspect.backend, suspect.model)
        forgotten = Judgement(
            Verdict.SLOW, blameless=True, text="answers others, but not this call"
        )
        for lease in list(member.leases) if member is not None else ():
            if id(lease) in lost:
                lease.revoke(forgotten)
            elif (
                not answered
                and lease.call.key.model == suspect.model
                and now - lease.granted_at > self.settings.load_s
            ):
                lease.revoke(Judgement(Verdict.OVERDUE, text="was loading for too long"))
        self._touch()

    def convict(self, suspect: Suspect, text: str) -> None:
        """The canary is stuck too: open the breaker, and send elsewhere what had no byte yet."""
        member = self.members.get(suspect.backend)
        if member is None:
            return
        gate = member.gate
        if suspect.others_move:
            gate = self._model_gate(member, suspect.model)
        gate.trip(text)
        judgement = Judgement(Verdict.SLOW, text=text)
        for lease in list(member.leases):
            key = lease.call.key
            if not lease.remote and (not suspect.others_move or key.model == suspect.model):
                member.asked[key.model] = key  # what a trial may ask for
                lease.others_move = suspect.others_move
                lease.revoke(judgement)
        member.suspects.discard(suspect.model)
        self._stir(member.name)
        self.watchdog.cleared(suspect.backend, suspect.model)
        self._touch()

    # -- the operator --------------------------------------------------------------------------

    def turn(self, name: str, switch: Switch, by: str = "") -> bool:
        """
        Turn a backend's switch; False: it stood there already.

        Args:
            by: Who does it, for the log.

        Raises:
            KeyError: For an unknown name.
        """
        member = self.members[name]
        moved = member.switch is not switch
        if moved:
            member.switch = switch
            self._forget_places()
            self._stir(name)
            self._emit(SwitchMoved(self.now(), name, switch, by))
            self._tell_drained(member)
        self._touch()
        return moved

    def _tell_drained(self, member: Member) -> None:
        if member.switch is DRAINING and not member.leases and member.loading is None:
            self._emit(BackendDrained(self.now(), member.name))

    def reset(self, name: str, by: str = "") -> bool:
        """
        Close a backend's breakers by hand, and its models'; False: none was open.

        Args:
            by: Who does it, for the log.

        Raises:
            KeyError: For an unknown name.
        """
        member = self.members[name]
        gates = (member.gate, *member.models.values())
        any_open = any(gate.state is not CLOSED for gate in gates)
        self._emit(BreakersReset(self.now(), name, by))
        for gate in gates:
            gate.reset()
        self._touch()
        return any_open

    # -- seeing --------------------------------------------------------------------------------

    @property
    def outlook(self) -> tuple[int, int]:
        """Another one whenever waiting may have become vain; what ends or loads makes room."""
        return self._moves, self.catalog.lists_edition

    def runs(self) -> list[Run]:
        """All that runs."""
        return [lease.run for member in self.members.values() for lease in member.leases]

    @property
    def running(self) -> int:
        """Leases that are out."""
        return sum(len(member.leases) for member in self.members.values())

    def is_ready(self) -> bool:
        """Whether at least one backend could take a call now."""
        return any(
            m.health.up and m.gate.state is CLOSED and m.switch is SERVING and m.backend.enabled
            for m in self.members.values()
        )

    def snapshot(self) -> list[BackendView]:
        """Every member as it is now."""
        return [self._view(member) for member in self.members.values()]

    def view(self, name: str) -> BackendView:
        """One of them. Raises KeyError for an unknown name."""
        return self._view(self.members[name])

    def _trial_told(self, member: Member, model: str | None, gate: Gate) -> str:
        """When the next trial is; a backend that is down or disabled has none, and waits."""
        if gate.state is CLOSED:
            return ""
        if not member.backend.enabled or member.switch is DISABLED:
            return "no trial while it is disabled"
        if not member.health.up:
            return "a trial when it is up again"
        if model is not None and member.gate.state is not CLOSED:
            return "a trial once the backend's own breaker is closed"
        if model is not None and not gate.retry_in() and not self._worth_a_trial(member, model):
            return "a trial when a call asks for it"
        return _next_trial(gate)

    def _view(self, member: Member) -> BackendView:
        gates: list[tuple[str | None, Gate]] = [(None, member.gate), *member.models.items()]
        loading = member.loading
        now = self.now()
        return BackendView(
            name=member.name,
            url=member.backend.url,
            up={"up": True, "down": False}.get(member.health.state),
            error=member.health.last_error,
            since_s=now - member.health.since,
            version=self.catalog.version_of(member.name),
            switch=member.switch,
            enabled=member.backend.enabled,
            slots=member.backend.slots,
            in_flight={names.display(m): n for m, n in member.load.counts().items()},
            breakers=tuple(
                BreakerView(
                    None if model is None else names.display(model),
                    g.state,
                    g.reason,
                    g.retry_in(),
                    g.trips,
                    g.stale,
                    self._trial_told(member, model, g),
                )
                for model, g in gates
            ),
            loading=None if loading is None else names.display(loading.key.model),
            loading_s=0.0 if loading is None else now - loading.since,
            cooling_s=member.load.cooling_s(None),
            first_byte_s=member.load.first_byte_s(None),
            available=tuple(names.display(m) for m in self.catalog.listed(member.name)),
            loaded=tuple(names.display(m) for m in self.catalog.loaded(member.name)),
            vram_bytes=self.catalog.vram(member.name),
            trouble=member.trouble,
            source=member.backend.source,
            cloud=member.backend.cloud,
        )


def _end_probe(member: Member | None, lease: Lease, now: float) -> None:
    """A call that tried a slot too many is known by now: one whose end nobody told says nothing."""
    if lease.run.probe and member is not None:
        member.load.belief.undecided(lease.call.key.model, now)


def _slots(place: _Place, believed: int) -> int:
    """Slots to use; one where only being the last one standing keeps the breaker closed."""
    if place.remote:
        return PASSED_ON
    return 1 if place.member.gate.one_at_a_time else believed


def _hindrance(member: Member, model: str) -> str:
    """What keeps *member* from serving its *model* now, as the code of a `Bar`; empty: nothing."""
    switch = member.switch
    if switch is DISABLED or not member.backend.enabled:
        return "disabled"
    if switch is DRAINING:
        return "draining"
    if member.health.state != "up":
        return "down"
    if member.gate.state is not CLOSED:
        return "breaker"
    gate = member.models.get(model)
    if gate is not None and gate.state is not CLOSED:
        return "model breaker"
    if model in member.suspects:
        return "suspect"
    return "cooling" if member.load.cooling_s(model) > 0 else ""


def _away(member: Member, call: Call) -> Bar | None:
    """Why *member*, which has the model, cannot serve it at this moment."""
    code, text = _hindrance(member, call.key.model), ""
    match code:
        case "":
            return None
        case "disabled" | "draining":
            text = code
        case "down":
            check_s = math.ceil(member.health.due_in())
            soon = f", next check in {check_s} s" if check_s else ""
            text = f"down, {member.health.last_error or 'not checked yet'}{soon}"
        case "breaker":
            text = f"breaker open ({member.gate.reason}), {_next_trial(member.gate)}"
        case "model breaker":
            gate = member.models[call.key.model]
            text = f"breaker of this model open ({gate.reason}), {_next_trial(gate)}"
        case "suspect":
            text = "silent, a canary is under way"
        case "cooling":
            cooling_s = member.load.cooling_s(call.key.model)
            text = f"busy, cooling off for {math.ceil(cooling_s)} s"
    return Bar(code, text)


def discreet(text: str) -> str:
    """A backend's text inside one of ours that must not read as if the model did not exist."""
    return re.sub("not found", "missing", text, flags=re.IGNORECASE)


def _trial_in(gate: Gate) -> float:
    """Seconds until a trial may close it; 0 while one is under way: it may end any moment."""
    return 0.0 if gate.state is HALF_OPEN else gate.retry_in()


def _note_asked(member: Member, key: PlacementKey) -> None:
    """What a trial may load; never options of a caller's choosing where a plain key was asked."""
    known = member.asked.get(key.model)
    if known is None or not key.options:
        member.asked[key.model] = key


def _rule(settings: GateSettings) -> Rule:
    return Rule(
        settings.in_a_row, settings.window_s, minimum=settings.minimum, ratio=settings.ratio
    )


def _set_rules(gate: Gate, settings: GateSettings) -> None:
    """A wait that has begun stays as it is."""
    gate.rule = _rule(settings)
    gate.backoff_s, gate.backoff_max_s = settings.backoff_s, settings.backoff_max_s
    gate.half_open_max_s = settings.half_open_max_s


def _next_trial(gate: Gate) -> str:
    if gate.state is HALF_OPEN:
        return "a trial is under way"
    wait_s = gate.retry_in()
    return f"next trial in {math.ceil(wait_s)} s" if wait_s > 0 else "a trial is due"
