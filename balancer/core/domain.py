"""The words everything else is written in. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """
    A frozen dataclass of a kind of which several are made for each call.

    Here only the type checker keeps it frozen: what guards each field at run time as well makes it
    cost four times as much to make one.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)


OTHER = "other"  # the operation of a route that is in no table, and its label
ALL = ("*",)  # globs that cover every name


class Dialect(Enum):
    """Whose error shapes and stream shapes a route speaks."""

    OLLAMA = "ollama"
    OPENAI = "openai"
    RESPONSES = "responses"  # OpenAI's newer one: the same errors, other streams
    ANTHROPIC = "anthropic"


class Framing(Enum):
    """How the body of an answer is divided into records."""

    JSON = "json"  # one document, no records
    NDJSON = "ndjson"  # a record is a line
    SSE = "sse"  # a record is an event, ended by a blank line


class Kind(Enum):
    """Who answers a route."""

    ONE = "one"  # one backend, chosen by the scheduler
    MANY = "many"  # every backend that it concerns: what changes what is installed
    MERGE = "merge"  # our own catalogue, a union over backends
    LOCAL = "local"  # we ourselves
    ACCOUNT = "account"  # the one backend that speaks for the account at ollama.com


class Role(Enum):
    """What a caller may do."""

    USER = "user"
    ADMIN = "admin"


class Purpose(Enum):
    """What an inference call is for; an empty prompt makes it one of the latter two."""

    RUN = "run"
    LOAD = "load"
    UNLOAD = "unload"


@dataclass(frozen=True, slots=True)
class Route:
    """
    One row of the route table (`routes.py`).

    Args:
        method: Upper case. HEAD rows stand of their own where Ollama has them.
        path: As it goes to a backend; a last segment ``{name}`` takes the rest of the path.
        operation: Short name, used as the metric label ``endpoint`` and in texts.
        stream_framing: How a streamed answer is framed; None: the route never streams.
        streams_by_default: Whether a body without ``stream`` asks for a stream.
        replayable: Whether a call that was sent may be sent again elsewhere before commit.
        optional: Not every Ollama of today has it; where no backend has it, it is no route at all.
    """

    method: str
    path: str
    dialect: Dialect
    operation: str
    kind: Kind
    stream_framing: Framing | None = None
    streams_by_default: bool = False
    replayable: bool = False
    role: Role = Role.USER
    optional: bool = False

    @property
    def feature(self) -> str:
        """What a backend has, or has not: routes that are in no table are told apart by path."""
        return self.path if self.operation == OTHER else self.operation


@dataclass(frozen=True, slots=True)
class Backend:
    """
    One Ollama host as configured. Identity is the name; another url makes it another backend.

    Args:
        url: Normalised ``scheme://host:port[/prefix]`` without a final slash.
        slots: Parallel calls per loaded model (Ollama's NUM_PARALLEL); None: not known.
        allow: Globs over model names; a model must match one.
        deny: Globs over model names; a match rules the model out here.
        enabled: False: listed, never used.
        source: Where it was written or found, for people.
        store: Where it keeps its models, by a name of the operator's; empty: not said.
        cloud: Cloud models go there, and what concerns the account.
        provider: It is ollama.com itself: no host of ours, and nothing to load.
        weight: How fast it is beside others, as the operator sees it, until that was measured.
        priority: Its tier: it serves only what backends of a higher one cannot, or not soon enough.
        prefer: Globs over model names that it is a little better for than others.
        vram_bytes: What models may take up there; None: not said.
    """

    name: str
    url: str
    slots: int | None = None
    allow: tuple[str, ...] = ("*",)
    deny: tuple[str, ...] = ()
    enabled: bool = True
    source: str = ""
    store: str = ""
    cloud: bool = False
    provider: bool = False
    weight: float = 1.0
    priority: int = 100
    prefer: tuple[str, ...] = ()
    vram_bytes: int | None = None


class Switch(Enum):
    """What the operator allows; outranks health and breakers."""

    SERVING = "serving"
    DRAINING = "draining"  # what runs may end, nothing new
    DISABLED = "disabled"  # nothing new, breaker ignored


class Residency(Enum):
    """Where a model is on one backend, as far as we know."""

    LOADED = "loaded"
    LOADING = "loading"  # a detached load of ours is under way
    ON_DISK = "on disk"
    ABSENT = "absent"
    UNKNOWN = "unknown"  # never heard, or too old to believe


class PlacementKey(NamedTuple):
    """
    What must be equal for two calls to share a loaded runner; a tuple, as it is looked up often.

    Args:
        model: Canonical name, ``host/namespace/model:tag`` in lower case.
        options: The runner options that force a reload, as Ollama compares them, sorted by name;
            an option that was absent or null is not in it.
    """

    model: str
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Allowance:
    """
    How much a key may ask for; None: as much as it likes.

    Args:
        rpm: Inference calls a minute.
        tokens_per_minute: Of prompts and answers together.
        slots: Calls at once; what is beyond waits.
        max_num_predict: Tokens of one answer that it may ask for.
    """

    rpm: int | None = None
    tokens_per_minute: int | None = None
    slots: int | None = None
    max_num_predict: int | None = None


INTERACTIVE = 100  # the priority of whoever has no other


@dataclass(frozen=True, slots=True)
class Principal:
    """
    Who is asking.

    Args:
        name: A key's name or ``anonymous``; never key material.
        models: Globs over the models it may use.
        priority: The most it may claim; below 50 its calls give way to others.
    """

    name: str
    role: Role
    models: tuple[str, ...] = ALL
    priority: int = INTERACTIVE
    allowance: Allowance = Allowance()


@record
class Admitted:
    """
    Who may go on, and the address it comes from.

    Args:
        discreet: This caller is not told which backends there are.
        user: Whom a proxy of ours says that it asks for; empty: nobody in particular.
    """

    principal: Principal
    client: str
    discreet: bool = False
    user: str = ""


@dataclass(slots=True, eq=False)
class Origin:
    """
    What a call whose context we choose was like before; it may choose anew while it waits.

    Args:
        sent: Its placement key as it came.
        own: The one that it has where no runner suffices: only for this is anything loaded.
        body: As it came, but for its name; empty once it will not be sent again.
        anew: The key that it would have, came it now.
        is_settled: It could have shared a runner, and had better not: it keeps its own.
    """

    sent: PlacementKey
    own: PlacementKey
    body: bytes | bytearray
    anew: Callable[[Call], PlacementKey]
    is_settled: bool = False

    def instead(self, call: Call) -> PlacementKey:
        """
        The key that *call* is to have, as nothing in memory serves the one it has.

        Asked again and again while nothing changes, it comes to rest at the call's own.
        """
        found = self.own if self.is_settled else self.anew(call)
        if found != self.own and found == call.key:
            self.is_settled = True
            return self.own
        return found


@record
class Call:
    """
    What a client wants of one backend, once identified.

    Args:
        id: The request id, ours or the client's.
        model: The model's name as the client wrote it.
        key: Its placement key.
        streaming: Whether the answer comes as records.
        replayable: May be sent again elsewhere as long as nothing was committed.
        keep_alive: As the client sent it (number, string or None).
        prompt_tokens: Estimate: prompt bytes / 4.
        output_tokens: The client's own limit on the answer, None: none given.
        arrived_at: Monotonic seconds.
        deadline: Monotonic seconds; None: none.
        body: Forwarded as it is; empty once it will not be sent again.
        headers: Request headers that go up, hop-by-hop and credentials already taken out.
        query: Without ``?``; may be empty.
        embedding: The operation embeds; its model may be one that cannot generate.
        fair_key: Whose share of the pool it uses up.
        batch: Gives way to interactive calls.
        inputs: Entries that an embedding call makes in the backend's queue.
        chain: Links of the prompt, outermost first: hash, and prompt tokens up to its end.
        shared: How many leading links tell tools and system prompt only.
        session: A session's name, if the client gave one.
        owner: Whose limits it counts against; empty: nobody's.
        origin: None: its context is not for us to choose.
    """

    id: str
    route: Route
    model: str
    key: PlacementKey
    streaming: bool
    purpose: Purpose
    replayable: bool
    principal: Principal
    arrived_at: float
    deadline: float | None
    body: bytes | bytearray = field(repr=False, hash=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    query: str = ""
    keep_alive: Any = None
    prompt_tokens: int = 0
    output_tokens: int | None = None
    embedding: bool = False
    fair_key: str = ""
    batch: bool = False
    inputs: int = 1
    chain: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    shared: int = 0
    session: str = ""
    owner: str = ""
    origin: Origin | None = field(default=None, repr=False, hash=False, compare=False)

    def let_go(self) -> None:
        """Forget the body: it will not be sent again."""
        self.carry(b"")
        if self.origin is not None:
            self.origin.body = b""

    def carry(self, body: bytes | bytearray) -> None:
        """Have another body from now on."""
        object.__setattr__(self, "body", body)

    def rekey(self, key: PlacementKey) -> None:
        """Have another key from now on; only while it stands in no queue and runs nowhere."""
        object.__setattr__(self, "key", key)

    @property
    def is_guest(self) -> bool:
        """Whether it shares a runner of which it would not have asked for the like."""
        return self.origin is not None and self.origin.own != self.key

    @property
    def priority_class(self) -> str:
        """``interactive``, or ``batch``, which gives way to it."""
        return "batch" if self.batch else "interactive"

    @property
    def framing(self) -> Framing:
        """How a good answer to this call is framed."""
        if self.streaming and self.route.stream_framing is not None:
            return self.route.stream_framing
        return Framing.JSON


class Mark(Enum):
    """What a settled permit tells its breaker."""

    CREDIT = "credit"
    BLAME = "blame"
    NEITHER = "neither"


class BreakerState(Enum):
    """The three states of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Verdict(Enum):
    """Why an attempt ended as it did. All consequences stand in one table: `verdicts.TABLE`."""

    OK = "ok"
    CALLER = "caller"
    MISSING = "missing"
    NO_ROUTE = "no_route"
    BUSY = "busy"
    UNFIT = "unfit"
    OVERDUE = "overdue"
    UNCLEAR = "unclear"
    ACCOUNT = "account"
    MISCONFIGURED = "misconfigured"
    FAULT = "fault"
    STALE = "stale"
    SLOW = "slow"
    BROKEN = "broken"
    STALLED = "stalled"
    UNFINISHED = "unfinished"
    GONE = "gone"
    STOPPED = "stopped"

    __hash__ = object.__hash__  # that of `Enum` is slow, and each call asks for it several times


@record
class Usage:
    """What a final record told. Counts of tokens; durations in seconds; None: not told."""

    tokens_in: int | None = None
    tokens_out: int | None = None
    load_s: float | None = None
    prompt_s: float | None = None
    decode_s: float | None = None
    total_s: float | None = None


@record
class Outcome:
    """
    How an attempt ended. Instants are monotonic seconds.

    Args:
        status: The backend's HTTP status, None if there was no head.
        sent_at: When the request went out.
        first_byte_at: First byte of the body, None if none came.
        committed: Whether a record was passed on to the client.
        weight: How heavily a blame counts (a load failure counts 2).
        text: The error's text, for people; cut to a line.
        crash: A runner died, or the connection did after it had taken the request.
        repeated_crash: As `crash`, and an earlier attempt of the same call had ended so too.
        caused_load: The attempt was, or waited for, a load of the model.
        blank_model: The empty error chunk of /v1 came before the end.
        retry_after_s: What a busy backend asked for.
        blameless: Whatever the verdict, the backend has shown since that it is well.
        odd_name: The call named its model with a source (``m:local``), which not every Ollama
            understands: that it is missing under that name says nothing of the model.
        unreached: Not even a connection came about.
    """

    verdict: Verdict
    sent_at: float
    ended_at: float
    status: int | None = None
    first_byte_at: float | None = None
    body_bytes: int = 0
    usage: Usage = Usage()
    committed: bool = False
    weight: int = 1
    text: str = ""
    crash: bool = False
    repeated_crash: bool = False
    caused_load: bool = False
    blank_model: bool = False
    retry_after_s: float | None = None
    blameless: bool = False
    odd_name: bool = False
    unreached: bool = False


@record
class Attempt:
    """One try of a call."""

    number: int
    backend: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a health check saw. `error` is empty when ok."""

    ok: bool
    latency_s: float
    version: str | None = None
    error: str = ""
    connected: bool = True  # False: not even a connection, so what hangs there is dead


@record
class Candidate:
    """
    A backend as it looks to the scheduler for one placement key, now.

    Only backends that *may* serve are candidates: listed, route supported, up, breakers closed,
    switch serving, rules allow, not excluded, not cooling off.

    Args:
        in_flight: Our calls on this model here.
        slots: Calls we believe the loaded model takes at once.
        host_in_flight: Our calls on all models here.
        load_token: Free: no detached load of ours is under way here.
        first_byte_s: Peak-EWMA of time to first byte; 0 before anything is known.
        context: Tokens of context known for the model here, None: unknown.
        size_bytes: Of the model's files, 0: unknown.
        models_loaded: Models in memory here, which a load might evict.
    """

    backend: str
    residency: Residency
    in_flight: int
    slots: int
    host_in_flight: int
    load_token: bool
    first_byte_s: float
    context: int | None
    size_bytes: int
    models_loaded: int = 0
