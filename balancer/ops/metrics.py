"""
Events and snapshots -> Prometheus text; the one place that knows the client library.

Counters and histograms are fed from events, gauges are read from a snapshot when somebody asks.
Every metric is a row of `METRICS`; the registry and the documentation are made of the same rows.
"""

from __future__ import annotations

import platform
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from balancer.core.domain import BreakerState, Switch, Verdict
from balancer.core.events import (
    AttemptEnded,
    BreakerMoved,
    CallEnded,
    CatalogChanged,
    CheckEnded,
    ConfigApplied,
    ConfigRejected,
    LeaseGranted,
    LoadEnded,
    Mishap,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from prometheus_client.metrics_core import Metric as Family

    from balancer.core.events import Event

PREFIX: Final = "ollama_balancer_"
OTHER: Final = "other"
INTERACTIVE: Final = "interactive"
SEVERAL: Final = "several"  # instead of every set of names there can be
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Kind = Literal["counter", "gauge", "histogram", "info"]


# -- the table ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Metric:
    """
    One row of the table.

    Args:
        name: Without the prefix; an info's ends in ``_info``, a counter's in ``_total``.
        buckets: Upper bounds of a histogram.
        scraped: Read from the snapshot when asked for, not fed from events.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()
    scraped: bool = False


def _counter(name: str, *labels: str, help: str) -> Metric:  # noqa: A002  Prometheus' own word
    return Metric(name, "counter", labels, help)


def _scraped(kind: Kind, name: str, *labels: str, help: str) -> Metric:  # noqa: A002  as above
    return Metric(name, kind, labels, help, scraped=True)


_LONG: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 300, 600, 1200, 1800)
_SHORT: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

METRICS: Final = (
    _scraped("info", "build_info", "version", "python", help="The running release."),
    _scraped("gauge", "start_time_seconds", help="When the balancer started, Unix time."),
    _counter(
        "requests_total",
        *("endpoint", "model", "backend", "code", "outcome"),
        help="Requests answered or given up. outcome: ok, client_abort, upstream_error, timeout,"
        " shed, rejected. backend: several, where it went to more than one.",
    ),
    Metric(
        "request_duration_seconds",
        "histogram",
        ("endpoint", "model", "backend"),
        "From arrival to the last byte of the answer.",
        _LONG,
    ),
    Metric(
        "time_to_first_token_seconds",
        "histogram",
        ("model", "backend", "warm"),
        "From arrival to the first byte of a streamed answer. warm: whether the model was in"
        " memory (true, false, unknown).",
        (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 300),
    ),
    Metric(
        "queue_duration_seconds",
        "histogram",
        ("model", "priority"),
        "Waiting for a slot of a backend; inference calls only.",
        (*_SHORT, 5, 10, 20, 40, 80, 160, 300),
    ),
    _scraped("gauge", "queue_depth", "model", "priority", help="Calls waiting now."),
    _scraped(
        "gauge", "queue_oldest_seconds", "model", "priority", help="Age of the oldest waiting call."
    ),
    _scraped("gauge", "requests_in_flight", "backend", "model", help="Calls running now."),
    _counter(
        "tokens_total",
        *("model", "backend", "type"),
        help="Tokens as backends told them, never estimated. type: input, output.",
    ),
    Metric(
        "model_load_duration_seconds",
        "histogram",
        ("model", "backend"),
        "Loads of a model that succeeded.",
        _LONG,
    ),
    _scraped("gauge", "backend_up", "backend", help="1: health checks succeed."),
    _scraped("info", "backend_info", "backend", "version", help="The Ollama version there."),
    _scraped(
        "gauge", "backend_slots", "backend", help="Calls it is believed to take at once per model."
    ),
    _scraped(
        "gauge",
        *("backend_switch", "backend", "state"),
        help="1 for what the operator allows: serving, draining, disabled.",
    ),
    _scraped("gauge", "backend_vram_bytes", "backend", help="Memory that loaded models take."),
    _scraped("gauge", "backend_models_loaded", "backend", help="Models in memory."),
    _scraped("gauge", "model_loaded", "model", "backend", help="1: in memory there."),
    _scraped("gauge", "model_available", "model", "backend", help="1: on disk there."),
    _scraped(
        "gauge",
        *("breaker_state", "backend", "model", "state"),
        help="1 for the state it is in: closed, open, half_open. No model: the backend's own.",
    ),
    _counter("breaker_transitions_total", "backend", "to", help="Changes of state of breakers."),
    _scraped(
        "counter",
        *("breaker_stale_settlements_total", "backend"),
        help="Outcomes dropped because they belonged to an earlier state of the breaker.",
    ),
    _counter(
        "attempts_total",
        "reason",
        help="Attempts begun. reason: only, warm, cold, failover, short-context, other-weights.",
    ),
    _counter(
        "failovers_total",
        "reason",
        help="Attempts at another backend. reason: the verdict on the attempt before.",
    ),
    _scraped(
        "counter",
        *("retry_budget_exhausted_total", "reason"),
        help="Failovers the budget forbade. reason: the verdict on the attempt.",
    ),
    _counter(
        "short_context_total",
        *("model", "backend"),
        help="Calls served where the context is known to be too short for them.",
    ),
    _counter(
        "unfinished_total", "backend", help="Answers that ended cleanly without their last record."
    ),
    _counter(
        "client_disconnects_total",
        "phase",
        help="Clients that hung up. phase: queued, before_first_token, streaming.",
    ),
    _counter(
        "upstream_errors_total",
        *("backend", "verdict"),
        help="Attempts that failed on the backend's side.",
    ),
    _counter(
        "auth_failures_total",
        "reason",
        help="Requests refused by us. reason: unauthorized (401), forbidden (403).",
    ),
    Metric(
        "config_last_reload_successful",
        "gauge",
        (),
        "1: the last configuration read was taken over.",
    ),
    Metric(
        "config_last_reload_success_timestamp_seconds",
        "gauge",
        (),
        "When a configuration was last taken over, Unix time.",
    ),
    Metric("check_duration_seconds", "histogram", ("backend",), "Health checks.", _SHORT),
    Metric(
        "event_loop_lag_seconds",
        "histogram",
        (),
        "How late timers fire; what blocks the loop delays every stream.",
        _SHORT,
    ),
    _counter("mishaps_total", help="Surprises caught where they stood; each is a bug to report."),
)

# None of these says anything against the backend.
_BLAMELESS: Final = frozenset(
    {Verdict.OK, Verdict.CALLER, Verdict.GONE, Verdict.STOPPED, Verdict.UNFINISHED}
)
_REFUSALS: Final = {401: "unauthorized", 403: "forbidden"}
_CALLS: Final = 10_000
_LOADED_S: Final = 1.0  # a warm runner is told as a few milliseconds of loading


def document() -> str:
    """The page ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "Served at `/metrics` in the Prometheus text format, or as OpenMetrics to who asks for it.",
        "Made from the table in `balancer/ops/metrics.py`; do not edit by hand.",
        "",
        "`model` is a name in the catalogue, at most `metrics.model_label_limit` of them;",
        f"every other name counts as `{OTHER}`.",
        "The process adds the usual `process_*` and `python_gc_*`.",
        "",
        "| Metric | Type | Labels | Meaning |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{PREFIX}{m.name}` | {m.kind} | {', '.join(m.labels) or '–'} | {m.help} |"
        for m in METRICS
    ]
    return "\n".join(lines) + "\n"


# -- what the snapshot holds ----------------------------------------------------------------


class BreakerRow(Protocol):
    """A breaker at the moment of the scrape."""

    @property
    def model(self) -> str | None:
        """None: the backend's own."""

    @property
    def state(self) -> BreakerState:
        """Now."""

    @property
    def stale(self) -> int:
        """Settlements it has dropped since it was made."""


class BackendRow(Protocol):
    """A backend at the moment of the scrape."""

    @property
    def name(self) -> str:
        """As configured."""

    @property
    def up(self) -> bool | None:
        """None: not checked yet."""

    @property
    def version(self) -> str | None:
        """Ollama's, None: unknown."""

    @property
    def switch(self) -> Switch:
        """The operator's."""

    @property
    def slots(self) -> int | None:
        """Per loaded model, None: unknown."""

    @property
    def in_flight(self) -> Mapping[str, int]:
        """Calls by model."""

    @property
    def vram_bytes(self) -> int:
        """Of all loaded models."""

    @property
    def loaded(self) -> Sequence[str]:
        """Models in memory."""

    @property
    def available(self) -> Sequence[str]:
        """Models on disk."""

    @property
    def breakers(self) -> Sequence[BreakerRow]:
        """The backend's own and its models'."""


@dataclass(frozen=True, slots=True)
class QueueRow:
    """Calls that wait for one model."""

    model: str
    depth: int
    oldest_s: float
    priority: str = INTERACTIVE


@dataclass(frozen=True, slots=True)
class Snapshot:
    """
    The state that gauges show.

    Args:
        retry_refused: Failovers the budget has forbidden since the start, by verdict.
    """

    backends: Sequence[BackendRow] = ()
    queues: Sequence[QueueRow] = ()
    retry_refused: Mapping[str, int] = field(default_factory=dict)


# -- the label of a model -------------------------------------------------------------------


class ModelLabels:
    """
    Keeps what clients send from becoming labels.

    Only names in the catalogue get a label, in the catalogue's spelling, and only the first
    *limit* of them.

    Args:
        known: The names in the catalogue, as listed.
    """

    def __init__(self, known: Callable[[], Collection[str]], limit: int) -> None:
        self._known = known
        self._limit = limit
        self._names: dict[str, str] | None = None
        self._granted: set[str] = set()
        self._seen: dict[str, str] = {}  # spellings met, so that the hot path is one look-up

    def forget(self) -> None:
        """The catalogue changed: read it again when next needed."""
        self._names = None

    def __call__(self, name: str) -> str:
        """The label for a name; empty stays empty."""
        return self._seen.get(name) or self._resolve(name)

    def _resolve(self, name: str) -> str:
        if not name:
            return ""
        if self._names is None:
            self._names = {_canonical(known): known for known in self._known()}
        label = self._names.get(_canonical(name))
        if label is None:
            return OTHER
        if label not in self._granted:
            if len(self._granted) >= self._limit:
                return OTHER
            self._granted.add(label)
        if len(self._seen) < 10 * self._limit:  # a client can vary the case without end
            self._seen[name] = label
        return label


def _canonical(name: str) -> str:
    """One spelling for all that Ollama takes for the same name."""
    name = name.strip().lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


# -- the registry ---------------------------------------------------------------------------


class Metrics:
    """
    A subscriber that counts, and the text that shows it.

    Args:
        snapshot: The state now; asked at every scrape.
        known_models: The names in the catalogue, as listed.
        wall: Unix time, for the two metrics that are instants.
        version: Of this release.
        model_label_limit: Models with a label of their own.
        process: Whether to show ``process_*`` and ``python_gc_*`` too.
    """

    def __init__(
        self,
        *,
        snapshot: Callable[[], Snapshot],
        known_models: Callable[[], Collection[str]],
        wall: Callable[[], float],
        version: str,
        model_label_limit: int = 100,
        process: bool = True,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every child, of no use to rates
        self.registry = CollectorRegistry()
        self._families = {m.name: _family(m, self.registry) for m in METRICS if not m.scraped}
        self._children: dict[tuple[str, ...], Any] = {}
        self._model = ModelLabels(known_models, model_label_limit)
        self._wall = wall
        self._failed: dict[str, tuple[str, str]] = {}  # call -> backend, verdict of its last try
        constant = [
            ("build_info", (version, platform.python_version()), 1.0),
            ("start_time_seconds", (), wall()),
        ]
        gauges = _Gauges(snapshot, lambda: ModelLabels(known_models, model_label_limit), constant)
        self.registry.register(gauges)
        if process:
            ProcessCollector(registry=self.registry)
            GCCollector(registry=self.registry)
        self._reloaded()

    def __call__(self, event: Event) -> None:
        """Count one event."""
        match event:
            case CallEnded():
                self._call_ended(event)
            case AttemptEnded():
                self._attempt_ended(event)
            case LeaseGranted():
                self._lease_granted(event)
            case CheckEnded():
                self._observe(event.latency_s, "check_duration_seconds", event.backend)
            case BreakerMoved():
                self._count(1, "breaker_transitions_total", event.backend, event.new.value)
            case LoadEnded(ok=True):
                labels = self._model(event.model), event.backend
                self._observe(event.load_s, "model_load_duration_seconds", *labels)
            case CatalogChanged():
                self._model.forget()
            case ConfigApplied():
                self._reloaded()
            case ConfigRejected():
                self._child("config_last_reload_successful").set(0)
            case Mishap():
                self._count(1, "mishaps_total")

    def loop_lag(self, lag_s: float) -> None:
        """A timer of the event loop fired *lag_s* seconds late."""
        self._observe(lag_s, "event_loop_lag_seconds")

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The page and its content type: OpenMetrics if *accept* names it, else plain text."""
        if "application/openmetrics-text" in accept:
            text: bytes = openmetrics.generate_latest(self.registry)  # type: ignore[no-untyped-call]
            return text, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self.registry), CONTENT_TYPE

    def _call_ended(self, e: CallEnded) -> None:
        model = self._model(e.model)
        backend, code = SEVERAL if "," in e.backend else e.backend, str(e.status)
        self._count(1, "requests_total", e.endpoint, model, backend, code, e.outcome)
        self._observe(e.duration_s, "request_duration_seconds", e.endpoint, model, backend)
        self._failed.pop(e.request_id, None)
        if e.outcome == "client_abort":
            self._count(1, "client_disconnects_total", e.phase)
        elif e.outcome == "rejected" and e.status in _REFUSALS:
            self._count(1, "auth_failures_total", _REFUSALS[e.status])
        if e.inference:
            self._inference_ended(e, model)

    def _inference_ended(self, e: CallEnded, model: str) -> None:
        self._observe(e.queue_s, "queue_duration_seconds", model, INTERACTIVE)
        if e.streaming and e.first_byte_s is not None:
            labels = model, e.backend, _warmth(e)
            self._observe(e.first_byte_s, "time_to_first_token_seconds", *labels)
        if e.usage.tokens_in:
            self._count(e.usage.tokens_in, "tokens_total", model, e.backend, "input")
        if e.usage.tokens_out:
            self._count(e.usage.tokens_out, "tokens_total", model, e.backend, "output")
        if e.why == "short-context":
            self._count(1, "short_context_total", model, e.backend)

    def _attempt_ended(self, e: AttemptEnded) -> None:
        verdict = e.outcome.verdict
        if verdict is Verdict.UNFINISHED:
            self._count(1, "unfinished_total", e.backend)
        elif verdict not in _BLAMELESS:
            self._count(1, "upstream_errors_total", e.backend, verdict.value)
            self._failed[e.call_id] = (e.backend, verdict.value)
            if len(self._failed) > _CALLS:  # some calls may have ended before their last attempt
                del self._failed[next(iter(self._failed))]

    def _lease_granted(self, e: LeaseGranted) -> None:
        self._count(1, "attempts_total", e.why)
        backend, verdict = self._failed.get(e.call_id, (e.backend, ""))
        if backend != e.backend:
            self._count(1, "failovers_total", verdict)

    def _reloaded(self) -> None:
        self._child("config_last_reload_successful").set(1)
        self._child("config_last_reload_success_timestamp_seconds").set(self._wall())

    def _count(self, amount: float, *key: str) -> None:
        self._child(*key).inc(amount)

    def _observe(self, value: float, *key: str) -> None:
        self._child(*key).observe(value)

    def _child(self, *key: str) -> Any:
        """The series of a metric's name and label values; resolved once."""
        child = self._children.get(key)
        if child is None:
            name, *values = key
            family = self._families[name]
            child = self._children[key] = family.labels(*values) if values else family
        return child


def _family(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    name = PREFIX + metric.name
    if metric.kind == "histogram":
        return Histogram(
            name, metric.help, metric.labels, registry=registry, buckets=metric.buckets
        )
    kind = Counter if metric.kind == "counter" else Gauge
    return kind(name, metric.help, metric.labels, registry=registry)


def _warmth(e: CallEnded) -> str:
    """Whether the model was in memory when the call came to the backend."""
    if e.why in ("warm", "cold"):
        return str(e.why == "warm").lower()
    load_s = e.usage.load_s
    return "unknown" if load_s is None else str(load_s < _LOADED_S).lower()


# -- the scrape -----------------------------------------------------------------------------

Sample = tuple[str, tuple[str, ...], float]


class _Gauges:
    """Reads the snapshot for the registry."""

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        labels: Callable[[], ModelLabels],
        constant: Iterable[Sample],
    ) -> None:
        self._snapshot = snapshot
        self._labels = labels
        self._model = labels()
        self._constant = tuple(constant)
        self._queued: set[tuple[str, str]] = set()

    def collect(self) -> Iterator[Family]:
        self._model = self._labels()  # at each scrape anew: what is gone makes room
        values: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
        for name, labels, value in self._samples(self._snapshot()):
            row = values[name]
            if name == "queue_oldest_seconds":
                row[labels] = max(value, row.get(labels, 0.0))
            else:  # models without a label of their own add up in one series
                row[labels] = value + row.get(labels, 0.0)
        for metric in METRICS:
            if metric.scraped:
                yield _filled(metric, values[metric.name])

    def _samples(self, snapshot: Snapshot) -> Iterator[Sample]:
        yield from self._constant
        for verdict, count in snapshot.retry_refused.items():
            yield "retry_budget_exhausted_total", (verdict,), count
        yield from self._queue_samples(snapshot.queues)
        for backend in snapshot.backends:  # what runs gets its labels before what merely exists
            yield from self._busy_samples(backend)
        for backend in snapshot.backends:
            yield from self._backend_samples(backend)
            for breaker in backend.breakers:
                yield from self._breaker_samples(backend.name, breaker)

    def _queue_samples(self, queues: Sequence[QueueRow]) -> Iterator[Sample]:
        for key in self._queued:  # a queue that has emptied says so instead of vanishing
            yield "queue_depth", key, 0
            yield "queue_oldest_seconds", key, 0
        for queue in queues:
            key = self._model(queue.model), queue.priority
            self._queued.add(key)
            yield "queue_depth", key, queue.depth
            yield "queue_oldest_seconds", key, queue.oldest_s

    def _busy_samples(self, b: BackendRow) -> Iterator[Sample]:
        for model, count in b.in_flight.items():
            yield "requests_in_flight", (b.name, self._model(model)), count
        for model in b.loaded:  # idle shows as zero, not as nothing
            yield "requests_in_flight", (b.name, self._model(model)), 0
            yield "model_loaded", (self._model(model), b.name), 1

    def _backend_samples(self, b: BackendRow) -> Iterator[Sample]:
        yield "backend_up", (b.name,), bool(b.up)
        if b.version:
            yield "backend_info", (b.name, b.version), 1
        if b.slots is not None:
            yield "backend_slots", (b.name,), b.slots
        for switch in Switch:
            yield "backend_switch", (b.name, switch.value), switch is b.switch
        yield "backend_vram_bytes", (b.name,), b.vram_bytes
        yield "backend_models_loaded", (b.name,), len(b.loaded)
        for model in b.available:
            yield "model_available", (self._model(model), b.name), 1

    def _breaker_samples(self, backend: str, breaker: BreakerRow) -> Iterator[Sample]:
        model = self._model(breaker.model or "")
        for state in BreakerState:
            yield "breaker_state", (backend, model, state.value), state is breaker.state
        yield "breaker_stale_settlements_total", (backend,), breaker.stale


def _filled(metric: Metric, rows: Mapping[tuple[str, ...], float]) -> Family:
    name = PREFIX + metric.name
    if metric.kind == "info":
        info = InfoMetricFamily(name.removesuffix("_info"), metric.help, labels=metric.labels)
        for labels in rows:
            info.add_metric(labels, {})
        return info
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(name, metric.help, labels=metric.labels)
    for labels, value in rows.items():
        family.add_metric(labels, value)
    return family
