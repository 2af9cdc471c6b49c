"""
The scheduler's door: what goes in, what comes out, what may be seen through it.

Laws:
- Facts and waiting tickets go in; what can start *now* comes out; everything else goes on waiting.
- A call is bound to a backend as late as possible: nothing is chosen until a slot is free.
- Nothing is ever committed to a backend on which the model is not in memory. A cold model gets a
  `Load`, which is a call of ours that no client can cancel; the ticket waits for it, and goes
  elsewhere if something better turns up first.
- A pass counts what it has committed at once; what could not be carried out is noted back.
- `begin` says of a call that comes when nobody waits what `plan` would, or leaves it to `plan`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from balancer.core.domain import (
    Attempt,
    Call,
    Candidate,
    Outcome,
    PlacementKey,
    record,
)
from balancer.core.errors import BalancerError
from balancer.core.events import Planning
from balancer.core.running import Run


class TicketState(Enum):
    """A ticket leaves WAITING exactly once."""

    WAITING = "waiting"
    GRANTED = "granted"
    REFUSED = "refused"
    WITHDRAWN = "withdrawn"


@dataclass(slots=True, eq=False)
class Ticket:
    """
    A place in the queue.

    Args:
        seq: Order of arrival; a call that is tried again keeps its own.
        excluded: Backends this call may not use (any more).
        attempts: What was tried before.
        queued_at: When it began to wait this time.
        limit_at: When waiting ends in a refusal.
    """

    call: Call
    seq: int
    excluded: frozenset[str]
    attempts: tuple[Attempt, ...]
    queued_at: float
    limit_at: float
    state: TicketState = TicketState.WAITING
    cold: bool = False  # a load was made for it
    load_on: str | None = None
    loaded_on: str = ""  # where that load succeeded
    estimate_s: float = math.inf  # of its wait, as it was told when it came; inf: it was not


@record
class Commit:
    """
    Send this call there now.

    Args:
        why: ``warm``, ``cold``, or ``short-context``: too small a context, and no better one is
            there.
        probe: It may take one slot more than is believed in.
        slots: Believed in for this call; None: what the pool believes.
        planned: What was foreseen, where the strategy foresees.
    """

    ticket: Ticket
    backend: str
    why: str
    probe: bool = False
    slots: int | None = None
    planned: Planning | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """
    Load this model there, by a detached call.

    Args:
        ticket: Who waits for it; a failure counts as an attempt of that call. None: nobody yet.
        victims: Unloaded before, in this order.
        keep_alive: For the load, where its ticket has none of its own; None: the host's default.
        expected_s: How long it should take; 0: nobody foresaw that.
        evict_s: What the victims' users will pay.
    """

    ticket: Ticket | None
    backend: str
    key: PlacementKey
    why: str
    victims: tuple[PlacementKey, ...] = ()
    keep_alive: str | None = None
    expected_s: float = 0.0
    evict_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Unload:
    """Make room."""

    backend: str
    key: PlacementKey


@dataclass(frozen=True, slots=True)
class Refuse:
    """Waiting longer cannot help this ticket."""

    ticket: Ticket
    error: BalancerError


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Plan again then, even if nothing happens."""

    at: float


Effect = Commit | Load | Unload | Refuse | WakeAt


@dataclass(frozen=True, slots=True)
class CommitRefused:
    """The slot or the permit was not to be had after all."""

    ticket: Ticket
    backend: str


@record
class Began:
    """An attempt was granted."""

    run: Run


@record
class FirstByte:
    """An attempt's first byte came."""

    run: Run
    at: float


@record
class Ended:
    """An attempt ended."""

    run: Run
    outcome: Outcome
    at: float


@dataclass(frozen=True, slots=True)
class LoadAnswered:
    """
    A detached load ended.

    Args:
        load_s: How long it took; 0: not known.
    """

    backend: str
    key: PlacementKey
    ok: bool
    load_s: float


@dataclass(frozen=True, slots=True)
class LoadRefused:
    """The load's token or a permit was not to be had, its ticket had gone, or it was stopped."""

    backend: str
    key: PlacementKey


@dataclass(frozen=True, slots=True)
class Changed:
    """
    Look again: health, breaker, switch, lists or memory of a backend moved.

    Args:
        backend: Empty: all of them.
        dead: What ran and was loaded there is gone.
    """

    backend: str = ""
    dead: bool = False
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Unwanted:
    """Somebody unloads this model on purpose: only who asks for it from now on counts."""

    model: str


Fact = CommitRefused | Began | FirstByte | Ended | LoadAnswered | LoadRefused | Changed | Unwanted


@dataclass(frozen=True, slots=True)
class Option:
    """
    One candidate of a rehearsal.

    Args:
        state: What a call would find there, for people.
        why: What puts it before the next, or behind the best, for people.
        kind: What it can do for the call now: go, hold or load; empty: the strategy has no kinds.
        terms: Of what its price is made, by name: seconds where the name says so.
        victims: What would be unloaded for the call, and what the users of each will pay.
    """

    backend: str
    state: str
    why: str
    kind: str = ""
    terms: Mapping[str, float] = field(default_factory=dict)
    victims: tuple[tuple[PlacementKey, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """
    A call's place in the fair queue.

    Args:
        ahead: Calls that wait for the same and are before it.
        tag: It goes by this.
        virtual: The queue's time: the tag of the last call that went.
    """

    ahead: int
    tag: float
    virtual: float


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """
    What a pass would do for one more ticket.

    Args:
        options: Every candidate, best first.
        effect: None: it would wait.
        wait_s: An estimate of how long; inf: nobody can tell.
        holds: The backend it would wait for; empty: none in particular.
        text: Why it would wait, for people; empty: the strategy does not tell.
        barred: Why others that may serve it are no options, for people, by backend.
        turn: Its place in the queue, where that is a fair one.
        prompt_tokens: What it was planned with; None: as it is.
    """

    options: tuple[Option, ...]
    effect: Commit | Load | None
    wait_s: float
    holds: str = ""
    text: str = ""
    barred: Mapping[str, str] = field(default_factory=dict)
    turn: Turn | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class LoadingNow:
    """A detached load under way. `key` None: it is the one asked about."""

    backend: str
    since: float
    key: PlacementKey | None = None


class View(Protocol):
    """What any scheduler may see of the pool."""

    @property
    def priorities(self) -> Mapping[str, int]:
        """The tier of each backend; empty: all are of one."""

    def candidates(self, call: Call, excluded: frozenset[str]) -> Sequence[Candidate]:
        """Backends that may serve *call* now."""

    def loading(self, key: PlacementKey) -> Sequence[LoadingNow]:
        """Detached loads of *key* under way, on any backend."""


class Scheduler(Protocol):
    """The choice. Every method is synchronous and quick."""

    def enqueue(self, ticket: Ticket) -> None:
        """Take a waiting ticket in."""

    def withdraw(self, ticket: Ticket) -> None:
        """Forget a ticket."""

    def note(self, fact: Fact) -> None:
        """Learn what happened."""

    def plan(self, now: float) -> list[Effect]:
        """Decide what can start now; asked while somebody waits, and at a `WakeAt`."""

    def wake_at(self) -> float:
        """When to plan though nothing happens; inf: never."""

    def begin(self, ticket: Ticket, now: float) -> Commit | None:
        """
        Decide for a new ticket that waits nowhere yet, while no other does.

        None: it does not simply start, and nothing has changed; it is to be enqueued.
        """

    def rehearse(self, ticket: Ticket, view: View, now: float) -> Rehearsal:
        """What would be decided for *ticket*, which waits nowhere; nothing comes of asking."""

    def waiting(self) -> Sequence[Ticket]:
        """All tickets that wait, in order."""

    def learned(self, now: float) -> dict[str, Any]:
        """
        What would be a pity to forget, as plain JSON that nothing changes any more.

        What belongs to one backend stands, in any part of it, under that backend's name.
        """

    def recall(self, learned: Mapping[str, Any], now: float, age_s: float) -> None:
        """
        Take over what a scheduler had *learned* so long ago; what cannot be is left out.

        Backends it tells of may be unknown as yet.
        """


def split_by_context(
    call: Call, candidates: Sequence[Candidate]
) -> tuple[list[Candidate], list[Candidate]]:
    """Those whose context takes the estimated prompt and answer, and those too short."""
    need = call.prompt_tokens + (call.output_tokens or 0)
    fits: list[Candidate] = []
    short: list[Candidate] = []
    for c in candidates:
        (fits if c.context is None or c.context >= need else short).append(c)
    return fits, short
