"""
What happened, past tense, frozen. Imports only the words.

Everything that happens is told once, through ``emit(event)``; only `ops` turns it into lines,
counters and pages. `at` is monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from balancer.core.domain import (
    Attempt,
    BreakerState,
    Outcome,
    PlacementKey,
    Switch,
    Usage,
    record,
)


@record
class Event:
    """Anything that happened."""

    at: float


@record
class CallQueued(Event):
    """A call waits for a slot. `depth`: calls waiting in all, this one included."""

    call_id: str
    model: str
    depth: int


@record
class LeaseGranted(Event):
    """A call got a slot. `why`: only, warm, cold, failover, short-context, other-weights."""

    call_id: str
    model: str
    backend: str
    attempt: int
    waited_s: float
    why: str


@record
class RetryGranted(LeaseGranted):
    """A call got a slot once more. `after`: what came of its last attempt."""

    after: Attempt


@record
class AttemptEnded(Event):
    """One try of a call ended and was settled."""

    call_id: str
    endpoint: str
    model: str
    backend: str
    attempt: int
    outcome: Outcome


@record
class AttemptFailed(AttemptEnded):
    """One that says something against the backend, or the way there."""


class Foreseen(NamedTuple):
    """
    What was foreseen of an attempt when its backend was chosen; times in seconds.

    `kind`: go, hold, load. `runner_up`: the next best backend; empty: there was none. `cost_s`: the
    price. `cached_tokens`: of the prompt, thought to be cached there.
    """

    kind: str
    backend: str
    runner_up: str
    cost_s: float
    wait_s: float
    first_token_s: float
    cached_tokens: int


class Planning(Protocol):
    """Whatever chose the backend of an attempt, and foresaw something of it."""

    def foreseen(self) -> Foreseen:
        """What it was; found only if somebody asks."""


@record
class CallEnded(Event):
    """
    A request was answered, or given up: exactly one per request, whatever it was.

    `outcome`: ok, client_abort, upstream_error, timeout, shed, rejected.
    `phase` (of a client_abort): queued, before_first_token, streaming.
    Times are seconds; `first_byte_s` and `duration_s` count from arrival.
    `alias`: the name under which the model was asked for, if it is not its own.
    `num_ctx`: the context that was written into it; `num_ctx_asked`: what had stood there.
    `planned`: what was foreseen of its last attempt, where the strategy foresees.
    """

    request_id: str
    method: str
    path: str
    endpoint: str
    status: int
    outcome: str
    duration_s: float
    client: str = ""
    user_agent: str = ""
    key: str = ""
    model: str = ""
    backend: str = ""
    attempts: int = 0
    why: str = ""
    queue_s: float = 0.0
    first_byte_s: float | None = None
    upstream_s: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    usage: Usage = Usage()
    phase: str = ""
    error: str = ""
    inference: bool = False
    streaming: bool = False
    alias: str = ""
    num_ctx: int | None = None
    num_ctx_asked: int | None = None
    planned: Planning | None = None


@record
class CheckEnded(Event):
    """A health check was answered, or not."""

    backend: str
    ok: bool
    latency_s: float


@record
class HealthFlipped(Event):
    """A backend went down, or came up. `reason` is for people."""

    backend: str
    up: bool
    reason: str


@record
class BreakerMoved(Event):
    """A breaker changed its state. `model` is None for the backend's own breaker."""

    backend: str
    model: str | None
    old: BreakerState
    new: BreakerState
    reason: str
    retry_in_s: float


@record
class TrialEnded(Event):
    """Our own trial of an open breaker ended. `kind`: version, canary, load."""

    backend: str
    model: str | None
    kind: str
    ok: bool
    text: str


@record
class Suspected(Event):
    """Nothing moved for too long on a resident model; a canary is sent."""

    backend: str
    model: str
    silent_s: float


@record
class LoadStarted(Event):
    """
    A detached load of ours began.

    `victims`: unloaded before, which will cost others `evict_s`, as far as can be told; it should
    take `expected_s`, 0: nobody foresaw that.
    """

    backend: str
    model: str
    why: str
    victims: tuple[str, ...] = ()
    expected_s: float = 0.0
    evict_s: float = 0.0


@record
class LoadEnded(Event):
    """
    A detached load of ours ended.

    `reloads`: the model had been in memory there not long ago, with another context (num_ctx) or
    with other options (options); empty: it had not.
    """

    backend: str
    model: str
    ok: bool
    load_s: float
    text: str
    reloads: str = ""


@record
class Weighed:
    """
    One backend as it was weighed for a call: what its price was made from, and the price.

    `promised`: slots there that calls ahead hold for. `inputs`: of the backend as it was for the
    call's model then, with the speeds in tokens per second and what is learned of it. `terms`:
    seconds, but for `cached` (tokens), `share` and `kind`.
    """

    backend: str
    promised: int
    inputs: Mapping[str, Any]
    terms: Mapping[str, Any]


@record
class Planned(Event):
    """
    A decision: `kind` go (it is sent), hold (for a slot or a load there), load (one begins).

    `number`: of the planning pass. `need`: tokens of the prompt, of the answer expected, and of
    context. `options`: the chosen one, then the cheapest others. `tag`, `virtual`: of the call in
    the fair queue, and that queue's time. `knobs`: the version of the weights.
    """

    number: int
    call_id: str
    key: PlacementKey
    attempt: int
    kind: str
    backend: str
    need: Mapping[str, float]
    options: tuple[Weighed, ...]
    tag: float
    virtual: float
    knobs: str


@record
class DrainRequested(Event):
    """
    A busy model is to run dry, since another is wanted in its place.

    `last_s`: when its last call should end. `cost_s`: that, the load, and what its users will pay.
    """

    backend: str
    victim: str
    wanted: str
    last_s: float
    cost_s: float


@record
class DrainEnded(Event):
    """It was given up. `reason`: nobody waits, late, found elsewhere, no room."""

    backend: str
    victim: str
    wanted: str
    reason: str
    drained_s: float


@record
class SlotsBelieved(Event):
    """Another number of calls at once is believed of a model. `reason`: seen, or starved."""

    backend: str
    model: str
    before: int
    after: int
    reason: str


@record
class Straggling(Event):
    """
    A backend became slow against its own past, or is no more. `factor`: of its speed, 1: all.

    `reason`: slow, recovered, or learned: it was slow for so long that it counts as its speed.
    """

    backend: str
    factor: float
    reason: str


@record
class SampleDiscarded(Event):
    """A measurement was beyond belief; told once of each backend and kind."""

    backend: str
    kind: str
    value: float


@record
class CatalogChanged(Event):
    """What a backend lists or holds in memory changed."""

    backend: str
    models: int
    loaded: tuple[str, ...]


@record
class MemberJoined(Event):
    """A backend joined the pool."""

    backend: str
    url: str


@record
class MemberLeft(Event):
    """A backend left the pool; calls may still be ending there."""

    backend: str


@record
class HostPassedOver(Event):
    """Discovery found a host that is no further backend. `note`: which, and why."""

    note: str


@record
class SwitchMoved(Event):
    """The operator turned a backend's switch. `by`: the name of the key; may be empty."""

    backend: str
    switch: Switch
    by: str = ""


@record
class BackendDrained(Event):
    """The last that ran on a draining backend has ended."""

    backend: str


@record
class BreakersReset(Event):
    """The operator closed a backend's breakers, its models' included."""

    backend: str
    by: str = ""


@record
class SwitchesLost(Event):
    """The file that keeps the operator's switches could not be read, or not be written."""

    path: str
    error: str


@record
class LearnedLost(Event):
    """The file that keeps what was learned could not be used, or not be written."""

    path: str
    error: str


@record
class ConfigApplied(Event):
    """A configuration was taken over. `needs_restart`: what was changed but stays as it was."""

    changed: tuple[str, ...]
    needs_restart: tuple[str, ...]


@record
class ConfigRejected(Event):
    """A configuration was refused; the old one stays."""

    problems: tuple[str, ...]


@record
class Serving(Event):
    """The balancer listens."""

    addresses: tuple[str, ...]
    backends: int
    seed: int


@record
class Stopping(Event):
    """A drain began. `running`, `queued`: calls at that moment."""

    reason: str
    running: int
    queued: int


@record
class Stopped(Event):
    """The balancer ended. `cut`: calls that had to be ended early."""

    cut: int


@record
class Mishap(Event):
    """Something that must not happen: a bug of ours, or a surprise, caught where it stands."""

    where: str
    error: str


Emit = Callable[[Event], None]
# Whether anybody hears events of that kind: the everyday ones need not be made for nobody.
Hears = Callable[[type[Event]], bool]


@record
class OrderEnded(Event):
    """
    A change of what is installed was carried out, or broken off: what, and where.

    `operation`: pull, push, create, copy, delete, blob. `by`: the key's name. `done`: the backends
    that have done it; `failed`: those that have not, with their texts.
    """

    operation: str
    model: str
    by: str
    done: tuple[str, ...]
    failed: tuple[str, ...]
    finished: bool
