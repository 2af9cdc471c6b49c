"""
The settings as the rest of the program sees them: frozen and plain.

Spans are float seconds (``_s``), amounts are bytes (``_bytes``); None stands
for no limit. Defaults live in the schema, not here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .addresses import Listen, Network

Role = Literal["user", "admin"]
KeyPlace = Literal["bearer", "x-api-key", "path"]
HeaderDetail = Literal["full", "minimal"]
# Those of `strategy.STRATEGIES`, which every command would have to import with all that they need.
Strategy = Literal["plan", "least-loaded", "warm-first", "round-robin"]
AuthType = Literal["none", "bearer", "basic", "header"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json", "logfmt"]
Allow = Literal["never", "admin", "user"]
ContextPolicy = Literal["passthrough", "reuse", "pin", "clamp"]
KeepAlivePolicy = Literal["passthrough", "clamp"]
ClientIp = Literal["full", "truncated", "none"]
IfAsked = Literal["auto", "never"]
FairBy = Literal["key", "user", "client_ip", "session", "none"]
DiscoverySource = Literal["env", "local"]


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """A text that shows only when asked."""

    _text: str

    def reveal(self) -> str:
        """Return the text itself."""
        return self._text

    def __repr__(self) -> str:
        return "***"


@dataclass(frozen=True, slots=True)
class Server:
    """The listener clients talk to."""

    listen: tuple[Listen, ...]
    trusted_proxies: tuple[Network, ...]
    max_body_bytes: int
    replay_memory_bytes: int
    max_header_bytes: int
    head_timeout_s: float
    allowed_hosts: tuple[str, ...]
    keepalive_timeout_s: float
    drain_timeout_s: float
    headers: HeaderDetail


@dataclass(frozen=True, slots=True)
class Admin:
    """Who reaches ``/_balancer/`` and ``/metrics``."""

    allowed_hosts: tuple[str, ...]
    allowed_cidrs: tuple[Network, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """
    How much a key may use; None is no limit.

    Of a key None is what holds for every key, and -1 no limit.
    """

    rpm: int | None = None
    tokens_per_minute: int | None = None
    slots: int | None = None
    max_num_predict: int | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """
    An API key: only its SHA-256 is kept.

    *models* are globs over the models it is for; from *expires_at* on (Unix time) it is none.
    *priority* is the most its calls may have, None: that of anybody.
    """

    name: str
    sha256: bytes = field(repr=False)
    role: Role
    models: tuple[str, ...] = ("*",)
    expires_at: float | None = None
    priority: int | None = None
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class Auth:
    """
    Who may call.

    *accept* says where a key may stand. *anonymous* lists the networks whose
    callers need no key: none for ``never``, both loopback networks for
    ``loopback``, all for ``always``. In *user_header* trusted proxies name
    their users.
    """

    keys: tuple[Key, ...]
    keys_file: str | None
    accept: tuple[KeyPlace, ...]
    anonymous: tuple[Network, ...]
    user_header: str | None


@dataclass(frozen=True, slots=True)
class Cors:
    """Which pages of other origins may call; what is allowed beyond local pages."""

    enabled: bool
    allow_origins: tuple[str, ...]
    allow_credentials: bool
    max_age_s: float


@dataclass(frozen=True, slots=True)
class Tls:
    """How to speak TLS to a backend; files are PEM."""

    verify: bool
    ca_file: str | None
    server_name: str | None
    client_cert_file: str | None
    client_key_file: str | None


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds a backend may take; None is no limit."""

    connect_s: float | None
    first_byte_s: float | None
    load_s: float | None
    idle_s: float | None
    total_s: float | None
    pull_idle_s: float | None


@dataclass(frozen=True, slots=True)
class Streaming:
    """Silence before the first heartbeat of an answer, and each further one; None is never."""

    heartbeat_after_s: float | None
    heartbeat_s: float | None


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """
    One backend as configured.

    *url* is ``scheme://host:port[/path]``. *slots* None is learned. *tls* is
    None for http, *timeouts* is None where nothing differs from the common ones. A *provider* is
    ollama.com itself, and always *cloud*.
    """

    name: str
    url: str
    slots: int | None
    allow: tuple[str, ...]
    deny: tuple[str, ...]
    enabled: bool
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    auth_headers: tuple[tuple[str, Secret], ...]
    tls: Tls | None
    timeouts: Timeouts | None
    store: str | None = None
    cloud: bool = False
    provider: bool = False
    reuse_connections: bool = True
    weight: float = 1.0
    priority: int = 100
    prefer: tuple[str, ...] = ()
    vram_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A host that may be there: its *url*, and which variable or port it came from."""

    url: str
    source: str


@dataclass(frozen=True, slots=True)
class Discovery:
    """
    Where hosts are looked for that nobody wrote down.

    *sources* are those in effect; *candidates* are what they name, in the order they are tried.
    """

    sources: tuple[DiscoverySource, ...]
    refresh_s: float
    ports: tuple[int, ...]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Health:
    """When checks run and what they need to say."""

    interval_s: float
    timeout_s: float
    fall: int
    rise: int
    models_interval_s: float
    loaded_interval_s: float


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """When one kind of breaker opens, and for how long."""

    in_a_row: int
    backoff_s: float
    backoff_max_s: float


@dataclass(frozen=True, slots=True)
class Breaker:
    """The breaker of a backend, and that of one model on it."""

    host: BreakerLimits
    model: BreakerLimits


@dataclass(frozen=True, slots=True)
class Retry:
    """How many calls may be repeated, as a share of recent ones."""

    budget_ratio: float


@dataclass(frozen=True, slots=True)
class Priorities:
    """The priorities that go by a name."""

    interactive: int
    batch: int


@dataclass(frozen=True, slots=True)
class Queue:
    """
    How long and how many calls may wait, and who has a share of his own.

    *adaptive*: who would wait in vain is told at once.
    """

    max_wait_s: float
    max_depth: int
    max_depth_per_model: int
    fair_by: FairBy
    priorities: Priorities
    adaptive: bool


@dataclass(frozen=True, slots=True)
class Affinity:
    """
    What makes calls one conversation, and how long it is remembered.

    *keys*: ``header:NAME``, ``body:FIELD`` or ``prefix``; the first that is there counts.
    """

    enabled: bool
    ttl_s: float
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Routing:
    """How a backend is chosen."""

    strategy: Strategy
    affinity: Affinity


@dataclass(frozen=True, slots=True)
class NumCtx:
    """What becomes of the context that calls ask for; tokens."""

    policy: ContextPolicy
    default: int | None
    max: int | None


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """What becomes of how long calls want their model kept; *max_s* is given with ``clamp``."""

    policy: KeepAlivePolicy
    max_s: float | None


@dataclass(frozen=True, slots=True)
class ModelOverride:
    """What differs for the models that a glob covers; None: nothing."""

    num_ctx: NumCtx | None
    keep_alive: KeepAlive | None


@dataclass(frozen=True, slots=True)
class PinSpec:
    """
    A model, as written, that is kept in memory: on each of *backends*, or if none is named on
    any *copies* of them; with *num_ctx* tokens of context, None: what comes.
    """

    model: str
    backends: tuple[str, ...]
    copies: int
    num_ctx: int | None


@dataclass(frozen=True, slots=True)
class Models:
    """
    What clients are told, and what of their calls is changed.

    *version* is ``min``, ``max`` or a version. *aliases* are pairs of a name and the models it
    stands for, *hide* globs of what is not listed. Of *overrides*, each with its glob, the first
    that covers a model counts.
    """

    version: str
    remember_s: float
    aliases: tuple[tuple[str, tuple[str, ...]], ...]
    hide: tuple[str, ...]
    num_ctx: NumCtx
    keep_alive: KeepAlive
    overrides: tuple[tuple[str, ModelOverride], ...]
    pin: tuple[PinSpec, ...]


@dataclass(frozen=True, slots=True)
class Right:
    """Who may change what is installed."""

    allow: Allow


@dataclass(frozen=True, slots=True)
class SpreadRight:
    """The same, and on which backends: names, or ``all``."""

    allow: Allow
    target: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manage:
    """Changes of what is installed; *parallel* stores work at once."""

    pull: SpreadRight
    create: SpreadRight
    push: Right
    copy: Right
    delete: Right
    parallel: int
    auto_pull: bool
    spool: str | None
    spool_max_bytes: int


@dataclass(frozen=True, slots=True)
class Logging:
    """What is logged; a call is slow from *slow_s* on (None: never)."""

    level: LogLevel
    format: LogFormat
    access: bool
    slow_s: float | None
    client_ip: ClientIp


@dataclass(frozen=True, slots=True)
class Metrics:
    """What is measured."""

    enabled: bool
    model_label_limit: int


@dataclass(frozen=True, slots=True)
class Systemd:
    """What systemd is told; ``auto``: what it asks for."""

    notify: IfAsked
    watchdog: IfAsked


@dataclass(frozen=True, slots=True)
class State:
    """What survives a restart, and the file it is in; None: nothing does."""

    path: str | None


@dataclass(frozen=True, slots=True)
class Dashboard:
    """The status page."""

    enabled: bool


@dataclass(frozen=True, slots=True)
class Demo:
    """The simulated fleet."""

    enabled: bool


@dataclass(frozen=True, slots=True)
class Config:
    """
    Everything configured; equal when every setting is.

    *warnings* are for the operator. *written* is the same in the words of the
    file, secrets masked, and *origins* says by dotted path where a value came
    from (``file:LINE``, ``env:NAME``, ``flag``, ``found:SOURCE``); what is absent is a default.
    """

    server: Server
    admin: Admin
    auth: Auth
    cors: Cors
    backends: tuple[BackendSpec, ...]
    discovery: Discovery
    health: Health
    breaker: Breaker
    retry: Retry
    queue: Queue
    routing: Routing
    models: Models
    manage: Manage
    timeouts: Timeouts
    streaming: Streaming
    limits: Limits
    logging: Logging
    metrics: Metrics
    systemd: Systemd
    state: State
    dashboard: Dashboard
    demo: Demo
    warnings: tuple[str, ...] = field(default=(), compare=False)
    written: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
