"""The file's shape: every key, its kind and its default."""

import warnings
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Self, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from balancer.core.domain import INTERACTIVE
from balancer.core.sharing import BATCH, BATCH_BELOW

from . import kinds
from .addresses import LOOPBACK, parse_listen
from .problems import Path, shown
from .units import parse_duration, parse_size

_AUTH_TAKES = {
    "none": (),
    "bearer": ("token",),
    "basic": ("username", "password"),
    "header": ("name", "value"),
}
_EVERY_PAGE = ("*", "http://*", "https://*")
_NULL_IS_EMPTY = BeforeValidator(lambda items: () if items is None else items)
_BY_GLOB = BeforeValidator(kinds.by_glob)


class Block(BaseModel):
    """
    Some keys under one name; written without any, it is all defaults.

    *stands_whole* says that its keys are checked against one another.
    """

    stands_whole: ClassVar[bool] = False
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, data: object) -> object:
        return {} if data is None else data


class ServerBlock(Block):
    """The listener that clients talk to."""

    listen: kinds.ListenAt = (parse_listen("127.0.0.1:11435"),)
    trusted_proxies: kinds.Networks = ()
    max_body: kinds.Size = parse_size("256MiB")
    replay_memory: kinds.Size = parse_size("512MiB")
    max_header: kinds.Size = parse_size("64KiB")
    head_timeout: kinds.Duration = parse_duration("10s")
    allowed_hosts: kinds.HostNames = ()
    keepalive_timeout: kinds.Duration = parse_duration("75s")
    drain_timeout: kinds.Wait = parse_duration("5m")
    headers: kinds.OneHeaderDetail = "full"


class AdminBlock(Block):
    """Who reaches /_balancer/ and /metrics."""

    listen: kinds.Nothing = None
    allowed_hosts: kinds.HostNames = ("localhost",)
    allowed_cidrs: kinds.Networks = LOOPBACK


class KeyBlock(Block):
    """An API key."""

    stands_whole = True
    name: kinds.Name
    hash: kinds.Hash = None
    key: kinds.SecretOrNull = None
    key_file: kinds.TextOrNull = None
    role: kinds.OneRole = "user"
    models: kinds.Globs = ("*",)
    expires: kinds.Expiry = None
    priority: kinds.PriorityOrNull = None
    rpm: kinds.KeyLimit = None
    tokens_per_minute: kinds.KeyLimit = None
    slots: kinds.KeyLimit = None
    max_num_predict: kinds.KeyLimit = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if [self.hash, self.key, self.key_file].count(None) != 2:
            raise ValueError("needs exactly one of hash, key, key_file.")
        return self


class AuthBlock(Block):
    """Who may call."""

    keys: Annotated[tuple[KeyBlock, ...], _NULL_IS_EMPTY] = ()
    keys_file: kinds.TextOrNull = None
    accept: kinds.KeyPlaces = ("bearer", "x-api-key")
    anonymous: kinds.Anonymous = LOOPBACK
    user_header: kinds.HeaderNameOrNull = None


class CorsBlock(Block):
    """Which pages of other origins may call."""

    stands_whole = True
    enabled: kinds.Flag = True
    allow_origins: kinds.Origins = ()
    allow_credentials: kinds.Flag = False
    max_age: kinds.Wait = parse_duration("10m")

    @model_validator(mode="after")
    def _trusts_no_stranger(self) -> Self:
        everybody = [origin for origin in self.allow_origins if origin in _EVERY_PAGE]
        if self.allow_credentials and everybody:
            raise ValueError(
                f"allow_credentials does not go with {everybody[0]!r}: every page in the world "
                "could act as its visitors. Name the origins."
            )
        return self


class BackendModelsBlock(Block):
    """Which models a backend may serve, as globs."""

    allow: kinds.Words = ("*",)
    deny: kinds.Words = ()


class BackendAuthBlock(Block):
    """How we authenticate at a backend."""

    stands_whole = True
    type: kinds.OneAuthType = "none"
    token: kinds.SecretOrNull = None
    token_file: kinds.TextOrNull = None
    username: kinds.TextOrNull = None
    password: kinds.SecretOrNull = None
    password_file: kinds.TextOrNull = None
    name: kinds.HeaderNameOrNull = None
    value: kinds.SecretOrNull = None
    value_file: kinds.TextOrNull = None

    @model_validator(mode="after")
    def _fits_type(self) -> Self:
        given = {key for key, value in self if value is not None} - {"type"}
        for key in _AUTH_TAKES[self.type]:
            sources = {key, f"{key}_file"} & set(type(self).model_fields)
            if len(given & sources) != 1:
                raise ValueError(f"type {self.type} needs one of: {', '.join(sorted(sources))}.")
            given -= sources
        if given:
            raise ValueError(f"{min(given)} does not belong to type {self.type}.")
        return self


class BackendTlsBlock(Block):
    """How we speak TLS to a backend."""

    stands_whole = True
    verify: kinds.Flag = True
    ca_file: kinds.TextOrNull = None
    server_name: kinds.TextOrNull = None
    client_cert_file: kinds.TextOrNull = None
    client_key_file: kinds.TextOrNull = None

    @model_validator(mode="after")
    def _key_has_cert(self) -> Self:
        if self.client_key_file and not self.client_cert_file:
            raise ValueError("client_key_file needs client_cert_file.")
        return self


class TimeoutsBlock(Block):
    """How long a backend may take; -1 is no limit."""

    connect: kinds.Limit = parse_duration("2s")
    first_byte: kinds.Limit = parse_duration("30s")
    load: kinds.Limit = parse_duration("10m")
    idle: kinds.Limit = parse_duration("5m")
    total: kinds.Limit = None
    pull_idle: kinds.Limit = parse_duration("10m")


class StreamingBlock(Block):
    """Signs of life in streamed answers; -1 or null is never."""

    heartbeat_after: kinds.LimitOrNull = parse_duration("20s")
    heartbeat: kinds.LimitOrNull = parse_duration("15s")


class BackendBlock(Block):
    """An Ollama host; a text alone is its url."""

    name: kinds.NameOrNull = None
    url: kinds.Url
    slots: kinds.Slots = None
    models: BackendModelsBlock = BackendModelsBlock()
    cloud: kinds.Flag = False
    enabled: kinds.Flag = True
    headers: kinds.Headers = ()
    auth: BackendAuthBlock = BackendAuthBlock()
    tls: BackendTlsBlock = BackendTlsBlock()
    timeouts: TimeoutsBlock = TimeoutsBlock()
    store: kinds.TextOrNull = None
    reuse_connections: kinds.Flag = True
    weight: kinds.Weight = 1.0
    priority: kinds.Whole = 100
    prefer: kinds.Words = ()
    vram: kinds.MemoryOrNull = None

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(core_schema)]}


class LocalDiscoveryBlock(Block):
    """Which ports of this machine are tried."""

    ports: kinds.Ports = (11434, *range(11440, 11450))


class DiscoveryBlock(Block):
    """Where hosts are looked for that nobody wrote down; sources None is ``auto``."""

    sources: kinds.DiscoverySources = None
    refresh: kinds.Duration = parse_duration("30s")
    local: LocalDiscoveryBlock = LocalDiscoveryBlock()


class HealthBlock(Block):
    """When backends are checked."""

    interval: kinds.Duration = parse_duration("5s")
    timeout: kinds.Duration = parse_duration("2s")
    fall: kinds.Count = 3
    rise: kinds.Count = 2
    models_interval: kinds.Duration = parse_duration("30s")
    loaded_interval: kinds.Duration = parse_duration("5s")


class BreakerLimitsBlock(Block):
    """When a breaker opens, and for how long."""

    stands_whole = True
    in_a_row: kinds.Count = 3
    backoff: kinds.Duration = parse_duration("1s")
    backoff_max: kinds.Duration = parse_duration("60s")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.backoff > self.backoff_max:
            raise ValueError("backoff is longer than backoff_max.")
        return self


class ModelBreakerLimitsBlock(BreakerLimitsBlock):
    """When the breaker of one model on one backend opens."""

    in_a_row: kinds.Count = 2
    backoff: kinds.Duration = parse_duration("10s")
    backoff_max: kinds.Duration = parse_duration("600s")


class BreakerBlock(Block):
    """The circuit breakers."""

    host: BreakerLimitsBlock = BreakerLimitsBlock()
    model: ModelBreakerLimitsBlock = ModelBreakerLimitsBlock()


class RetryBlock(Block):
    """How many calls may be repeated."""

    budget: kinds.Ratio = 0.2


class PrioritiesBlock(Block):
    """The priorities that go by a name; below 50 calls give way to others."""

    stands_whole = True
    interactive: kinds.Whole = INTERACTIVE
    batch: kinds.Whole = BATCH

    @model_validator(mode="after")
    def _on_either_side(self) -> Self:
        if not self.batch < BATCH_BELOW <= self.interactive:
            raise ValueError(
                f"batch needs a number below {BATCH_BELOW}, interactive one of at least that."
            )
        return self


class QueueBlock(Block):
    """How many calls may wait, how long, and who goes first."""

    max_wait: kinds.Wait = parse_duration("2m")
    max_depth: kinds.Whole = 512
    max_depth_per_model: kinds.Whole = 64
    fair_by: kinds.OneFairBy = "key"
    priorities: PrioritiesBlock = PrioritiesBlock()
    adaptive: kinds.Flag = True


class AffinityBlock(Block):
    """What makes calls one conversation."""

    enabled: kinds.Flag = True
    ttl: kinds.Duration = parse_duration("10m")
    keys: kinds.SessionPlaces = (
        "header:X-Session-Id",
        "header:X-Claude-Code-Session-Id",
        "header:session-id",
        "body:prompt_cache_key",
        "header:X-OpenWebUI-Chat-Id",
        "prefix",
    )


class RoutingBlock(Block):
    """How a backend is chosen."""

    strategy: kinds.OneStrategy = "plan"
    affinity: AffinityBlock = AffinityBlock()


class NumCtxBlock(Block):
    """What becomes of the context that calls ask for."""

    stands_whole = True
    policy: kinds.OneContextPolicy = "passthrough"
    default: kinds.ContextOrNull = None
    max: kinds.ContextOrNull = None

    @model_validator(mode="after")
    def _fits_policy(self) -> Self:
        policy, default, most = self.policy, self.default, self.max
        if policy == "pin" and default is None:
            raise ValueError("policy pin needs default: the context that every call gets.")
        if policy == "passthrough" and default is not None:
            raise ValueError("default does not belong to policy passthrough, but to the others.")
        if policy == "clamp" and most is None:
            raise ValueError("policy clamp needs max: the most that a call may ask for.")
        if policy != "clamp" and most is not None:
            raise ValueError(f"max does not belong to policy {policy}, but to clamp.")
        if most is not None and default is not None and default > most:
            raise ValueError("default is more than max.")
        return self


class KeepAliveBlock(Block):
    """What becomes of how long calls want their model kept in memory."""

    stands_whole = True
    policy: kinds.OneKeepAlivePolicy = "passthrough"
    max: kinds.DurationOrNull = None

    @model_validator(mode="after")
    def _fits_policy(self) -> Self:
        if self.policy == "clamp" and self.max is None:
            raise ValueError("policy clamp needs max: the longest that a call may ask for.")
        if self.policy != "clamp" and self.max is not None:
            raise ValueError("max does not belong to policy passthrough, but to clamp.")
        return self


class ModelOverrideBlock(Block):
    """What differs for some models; what is left out is as for all."""

    num_ctx: NumCtxBlock | None = None
    keep_alive: KeepAliveBlock | None = None


class PinBlock(Block):
    """A model that is kept in memory; a text alone is its name."""

    stands_whole = True
    model: kinds.ModelName
    backends: kinds.Words = ()
    copies: kinds.CountOrNull = None
    num_ctx: kinds.ContextOrNull = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.copies is not None and self.backends:
            raise ValueError("takes backends (on each of these) or copies (on any), not both.")
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(core_schema)]}


class ModelsBlock(Block):
    """What clients are told about models, and what of their calls is changed."""

    version: kinds.ModelVersion = "min"
    remember: kinds.Wait = parse_duration("24h")
    aliases: kinds.ModelAliases = ()
    hide: kinds.Words = ()
    num_ctx: NumCtxBlock = NumCtxBlock()
    keep_alive: KeepAliveBlock = KeepAliveBlock()
    overrides: Annotated[dict[str, ModelOverrideBlock], _BY_GLOB] = {}
    pin: Annotated[tuple[PinBlock, ...], BeforeValidator(kinds.spelt_pins)] = ()


class RightBlock(Block):
    """Who may change what is installed."""

    allow: kinds.OneAllow = "admin"


class SpreadRightBlock(RightBlock):
    """The same, and where."""

    target: kinds.Words = ("all",)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # pydantic has a `copy` of its own, long unused

    class ManageBlock(Block):
        """Changes of what is installed."""

        pull: SpreadRightBlock = SpreadRightBlock()
        create: SpreadRightBlock = SpreadRightBlock()
        push: RightBlock = RightBlock()
        copy: RightBlock = RightBlock()  # type: ignore[assignment]
        delete: RightBlock = RightBlock()
        parallel: kinds.Count = 3
        auto_pull: kinds.Flag = False
        spool: kinds.TextOrNull = None
        spool_max: kinds.Size = parse_size("32GiB")


class LimitsBlock(Block):
    """How much each key may use, and each caller without one."""

    rpm: kinds.CountOrNull = None
    tokens_per_minute: kinds.CountOrNull = None
    slots: kinds.CountOrNull = None
    max_num_predict: kinds.CountOrNull = None


class LoggingBlock(Block):
    """What is logged."""

    level: kinds.OneLogLevel = "info"
    format: kinds.OneLogFormat = "auto"
    access: kinds.Flag = True
    slow: kinds.WaitOrNull = parse_duration("60s")
    client_ip: kinds.OneClientIp = "full"


class MetricsBlock(Block):
    """What is measured."""

    enabled: kinds.Flag = True
    model_label_limit: kinds.Whole = 100


class SystemdBlock(Block):
    """What systemd is told."""

    notify: kinds.OneIfAsked = "auto"
    watchdog: kinds.OneIfAsked = "auto"


class StateBlock(Block):
    """What survives a restart."""

    path: kinds.TextOrNull = None


class DashboardBlock(Block):
    """The status page."""

    enabled: kinds.Flag = True


class DemoBlock(Block):
    """The simulated fleet."""

    enabled: kinds.Flag = False


def _version(value: object) -> int:
    if value not in (1, "1") or value is True:
        raise ValueError(f"{shown(value)} is not a version this release reads. Write 1.")
    return 1


class File(Block):
    """The whole file."""

    version: Annotated[int, kinds.PlainValidator(_version), kinds.WithJsonSchema({"const": 1})] = 1
    server: ServerBlock = ServerBlock()
    admin: AdminBlock = AdminBlock()
    auth: AuthBlock = AuthBlock()
    cors: CorsBlock = CorsBlock()
    backends: Annotated[tuple[BackendBlock, ...], _NULL_IS_EMPTY] = ()
    discovery: DiscoveryBlock = DiscoveryBlock()
    health: HealthBlock = HealthBlock()
    breaker: BreakerBlock = BreakerBlock()
    retry: RetryBlock = RetryBlock()
    queue: QueueBlock = QueueBlock()
    routing: RoutingBlock = RoutingBlock()
    models: ModelsBlock = ModelsBlock()
    manage: ManageBlock = ManageBlock()
    timeouts: TimeoutsBlock = TimeoutsBlock()
    streaming: StreamingBlock = StreamingBlock()
    limits: LimitsBlock = LimitsBlock()
    logging: LoggingBlock = LoggingBlock()
    metrics: MetricsBlock = MetricsBlock()
    systemd: SystemdBlock = SystemdBlock()
    state: StateBlock = StateBlock()
    dashboard: DashboardBlock = DashboardBlock()
    demo: DemoBlock = DemoBlock()


def block_at(path: Path) -> type[Block] | None:
    """Return the block that stands at *path*, or None where there is a plain value."""
    block: type[Block] | None = File
    is_named = False  # the next step is a name that somebody gave it
    for step in path:
        if isinstance(step, str) and not is_named:
            info = block.model_fields.get(step) if block else None
            block = _block_in(info.annotation) if info else None
            is_named = info is not None and get_origin(info.annotation) is dict
        else:
            is_named = False
    return None if is_named else block


def leaf_paths(block: type[Block] = File) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key that holds a value; lists of blocks count as one value."""
    for name, info in block.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Block):
            yield from ((name, *rest) for rest in leaf_paths(info.annotation))
        else:
            yield (name,)


def schema() -> dict[str, Any]:
    """Return the JSON Schema of the file, for editors."""
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return (
        draft
        | File.model_json_schema(mode="serialization")
        | {"title": "ollama-balancer configuration"}
    )


def _block_in(annotation: Any) -> type[Block] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Block):
            return kind
    return None
