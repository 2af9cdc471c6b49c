"""
Events and snapshots -> Prometheus text; the one place that knows the client library.

Counters and histograms are fed from events, gauges are read from a snapshot when somebody asks.
Every metric is a row of `METRICS`; the registry and the documentation are made of the same rows.
"""

from __future__ import annotations

import math
import platform
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.utils import floatToGoString

from balancer.core.decisions import Decisions
from balancer.core.domain import BreakerState, Switch, Verdict
from balancer.core.events import (
    AttemptFailed,
    BreakerMoved,
    CallEnded,
    CatalogChanged,
    CheckEnded,
    ConfigApplied,
    ConfigRejected,
    LoadEnded,
    LoadStarted,
    Mishap,
    RetryGranted,
)
from balancer.core.spread import Spread

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
        buckets: Upper bounds of a histogram; of a scraped one the snapshot has them.
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


def _scraped_spread(name: str, *labels: str, help: str) -> Metric:  # noqa: A002  as above
    return Metric(name, "histogram", labels, help, scraped=True)


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
    _scraped(
        "counter",
        *("queue_refused_total", "reason"),
        help="Calls refused on arrival, or later in favour of a caller with fewer. reason:"
        " max_depth, max_depth_per_model, or wait (it would be longer than queue.max_wait).",
    ),
    _scraped(
        "counter",
        *("limited_total", "reason"),
        help="Calls beyond what their keys may use. reason: rpm, tokens_per_minute,"
        " max_num_predict.",
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
    _counter(
        "model_loads_total",
        "reason",
        help="Loads begun. reason: call (one waits for it), copy (calls wait for the others), ahead"
        " (of the queue), drain (a busy model ran dry for it), pin,"
        " other (asked for by an operator, or the trial of a breaker).",
    ),
    _counter("evictions_total", help="Models unloaded to make room for another."),
    _scraped(
        "counter",
        *("plan_decisions_total", "kind"),
        help="Decisions of the plan. kind: go (sent), hold (for a slot or a load there), load (one"
        " begins). A call that holds is decided on again when something better turns up.",
    ),
    _scraped("counter", "plan_evaluations_total", help="Calls for which all backends were priced."),
    _scraped_spread(
        "plan_duration_seconds", help="One planning pass; while nobody waits there are few."
    ),
    _scraped(
        "counter",
        "declined_free_slot_total",
        help="Calls that held for a better backend beside a free slot.",
    ),
    _scraped_spread(
        "ttft_prediction_ratio",
        "backend",
        help="Time to first token of streamed answers over what was predicted; 1 is perfect.",
    ),
    _scraped_spread(
        "queue_wait_estimate_error_seconds",
        "result",
        help="By how much calls waited longer or shorter than was estimated when they came. result:"
        " longer, shorter.",
    ),
    _scraped_spread("batch_gated_seconds", help="For how long batch calls gave way."),
    _scraped(
        "counter",
        *("prefix_tokens_total", "kind"),
        help="Prompt tokens thought to be in a backend's cache. kind: expected (all of them), seen"
        " (those that were, as far as the time it took tells).",
    ),
    _scraped(
        "gauge",
        *("backend_slots_believed", "backend", "model"),
        help="Calls that a model in memory is believed to take at once.",
    ),
    _scraped(
        "gauge",
        *("backend_slow_factor", "backend"),
        help="Today's speed as a share of the backend's own past; 1: as ever.",
    ),
    _counter(
        "model_reloads_total",
        "reason",
        help="Loads of a model that was in memory there, other than it is now, in the ten minutes"
        " before. reason: num_ctx, options. See models.num_ctx.",
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
    _scraped(
        "gauge", "backend_idle_connections", "backend", help="Connections kept for the next calls."
    ),
    _scraped(
        "counter",
        *("backend_stale_connections_total", "backend"),
        help="Calls sent once more because the backend had closed the kept connection they met.",
    ),
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
    _scraped(
        "counter",
        *("attempts_total", "reason"),
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
    Metric(
        "gc_pause_seconds",
        "histogram",
        ("generation",),
        "Looks for garbage in cycles, during which everything stands still.",
        _SHORT,
    ),
    _counter("mishaps_total", help="Surprises caught where they stood; each is a bug to report."),
)

_REFUSALS: Final = {401: "unauthorized", 403: "forbidden"}
_LOADS: Final = frozenset({"call", "copy", "ahead", "drain", "pin"})
_MOST_PENDING: Final = 256
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
        attempts: Begun since the start, by reason.
        retry_refused: Failovers the budget has forbidden since the start, by verdict.
        limited: Calls beyond the limits of their keys since the start, by limit.
        queue_refused: Calls that could not wait since the start, by why.
        idle_connections: At rest, by backend.
        stale_connections: Requests that met a closed one since the start, by backend.
        decisions: The plan's, since the start.
        pass_s: How long passes took.
        late: Waits against their estimates, by ``longer`` and ``shorter``.
        believed: Slots, by backend and model.
    """

    backends: Sequence[BackendRow] = ()
    queues: Sequence[QueueRow] = ()
    attempts: Mapping[str, int] = field(default_factory=dict)
    retry_refused: Mapping[str, int] = field(default_factory=dict)
    limited: Mapping[str, int] = field(default_factory=dict)
    queue_refused: Mapping[str, int] = field(default_factory=dict)
    idle_connections: Mapping[str, int] = field(default_factory=dict)
    stale_connections: Mapping[str, int] = field(default_factory=dict)
    decisions: Decisions = field(default_factory=Decisions)
    pass_s: Spread | None = None
    late: Mapping[str, Spread] = field(default_factory=dict)
    believed: Mapping[tuple[str, str], int] = field(default_factory=dict)


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


# -- series ---------------------------------------------------------------------------------


class _Number:
    """One series of a counter or a gauge. The library's own take a lock for every step."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float) -> None:
        if amount < 0:
            raise ValueError(f"a counter only grows, not by {amount}")
        self.value += amount


_Key = tuple[str, ...]  # the values of labels; of a series, with its metric's name before them


class Fed:
    """What events feed, for the registry. What has no labels is there from the start."""

    def __init__(self, metrics: Iterable[Metric], prefix: str = PREFIX) -> None:
        self._metrics = {metric.name: metric for metric in metrics}
        self._prefix = prefix
        self.numbers: dict[_Key, _Number] = {}
        self.spreads: dict[_Key, Spread] = {}
        for metric in self._metrics.values():
            if not metric.labels and metric.kind == "histogram":
                self.spread((metric.name,))
            elif not metric.labels:
                self.number((metric.name,))

    def number(self, key: _Key) -> _Number:
        """A series of a counter or gauge; made when first asked for."""
        return self.numbers.setdefault(key, _Number())

    def spread(self, key: _Key) -> Spread:
        """A series of a histogram; made when first asked for."""
        return self.spreads.setdefault(key, Spread(self._metrics[key[0]].buckets))

    def collect(self) -> Iterator[Family]:
        """The families, in the order of the table."""
        numbers: dict[str, dict[_Key, float]] = defaultdict(dict)
        for (name, *labels), number in self.numbers.items():
            numbers[name][tuple(labels)] = number.value
        spreads: dict[str, dict[_Key, Spread]] = defaultdict(dict)
        for (name, *labels), spread in self.spreads.items():
            spreads[name][tuple(labels)] = spread
        for name, metric in self._metrics.items():
            if metric.kind == "histogram":
                yield _spread_out(metric, spreads[name], self._prefix)
            else:
                yield _filled(metric, numbers[name], self._prefix)


def _spread_out(metric: Metric, rows: Mapping[_Key, Spread], prefix: str) -> Family:
    family = HistogramMetricFamily(prefix + metric.name, metric.help, labels=metric.labels)
    for labels, spread in rows.items():
        bounds = [floatToGoString(bound) for bound in (*spread.bounds, math.inf)]  # type: ignore[no-untyped-call]
        upto = accumulate(spread.counts)
        family.add_metric(labels, list(zip(bounds, upto, strict=True)), spread.sum)
    return family


# -- the registry ---------------------------------------------------------------------------


class Metrics:
    """
    A subscriber that counts, and the text that shows it.

    Calls are counted many at a time: when somebody looks, and before there are too many. One
    after the other they take half as long as each by itself, between other work.

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
        self.registry = CollectorRegistry()
        self._fed = Fed(metric for metric in METRICS if not metric.scraped)
        self._numbers, self._spreads = self._fed.numbers, self._fed.spreads
        # All of them now: none may come in while somebody goes through the series.
        self._pauses = [self._fed.spread(("gc_pause_seconds", each)) for each in "012"]
        self.registry.register(self)
        self._model = ModelLabels(known_models, model_label_limit)
        self._wall = wall
        self._pending: list[CallEnded] = []
        constant = [
            ("build_info", (version, platform.python_version()), 1.0),
            ("start_time_seconds", (), wall()),
        ]
        gauges = _Gauges(snapshot, lambda: ModelLabels(known_models, model_label_limit), constant)
        self.registry.register(gauges)
        if process:
            ProcessCollector(registry=self.registry)
            GCCollector(registry=self.registry)
        self._by_kind: dict[type[Event], Callable[[Any], None]] = {
            CallEnded: self._pend,
            AttemptFailed: self._attempt_failed,
            RetryGranted: self._retry_granted,
            CheckEnded: self._check_ended,
            BreakerMoved: self._breaker_moved,
            LoadEnded: self._load_ended,
            LoadStarted: self._load_started,
            CatalogChanged: lambda _: self._catalog_changed(),
            ConfigApplied: lambda _: self._reloaded(),
            ConfigRejected: lambda _: self._set(0, "config_last_reload_successful"),
            Mishap: lambda _: self._count(1, "mishaps_total"),
        }
        self._reloaded()

    @property
    def kinds(self) -> Collection[type[Event]]:
        """The events that count."""
        return self._by_kind

    def __call__(self, event: Event) -> None:
        """Count one event."""
        count = self._by_kind.get(type(event))
        if count is not None:
            count(event)

    def collect(self) -> Iterator[Family]:
        """What was fed, for the registry; all that has happened is counted."""
        self._fold()
        return self._fed.collect()

    def _pend(self, e: CallEnded) -> None:
        self._pending.append(e)
        if len(self._pending) >= _MOST_PENDING:
            self._fold()

    def _fold(self) -> None:
        pending, self._pending = self._pending, []
        for event in pending:
            self._call_ended(event)

    def _catalog_changed(self) -> None:
        self._fold()  # under the names they had
        self._model.forget()

    def loop_lag(self, lag_s: float) -> None:
        """A timer of the event loop fired *lag_s* seconds late."""
        self._observe(lag_s, "event_loop_lag_seconds")

    def gc_paused(self, generation: int, pause_s: float) -> None:
        """Python looked for garbage; called from within any line, this one's caller included."""
        self._pauses[generation].observe(pause_s)

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
        if e.usage.tokens_in and e.usage.tokens_in > 0:
            self._count(e.usage.tokens_in, "tokens_total", model, e.backend, "input")
        if e.usage.tokens_out and e.usage.tokens_out > 0:
            self._count(e.usage.tokens_out, "tokens_total", model, e.backend, "output")
        if e.why == "short-context":
            self._count(1, "short_context_total", model, e.backend)

    def _attempt_failed(self, e: AttemptFailed) -> None:
        verdict = e.outcome.verdict
        if verdict is Verdict.UNFINISHED:
            self._count(1, "unfinished_total", e.backend)
        else:
            self._count(1, "upstream_errors_total", e.backend, verdict.value)

    def _retry_granted(self, e: RetryGranted) -> None:
        if e.after.backend != e.backend:
            self._count(1, "failovers_total", e.after.outcome.verdict.value)

    def _check_ended(self, e: CheckEnded) -> None:
        self._observe(e.latency_s, "check_duration_seconds", e.backend)

    def _breaker_moved(self, e: BreakerMoved) -> None:
        self._count(1, "breaker_transitions_total", e.backend, e.new.value)

    def _load_started(self, e: LoadStarted) -> None:
        self._count(1, "model_loads_total", e.why if e.why in _LOADS else OTHER)
        if e.victims:
            self._count(len(e.victims), "evictions_total")

    def _load_ended(self, e: LoadEnded) -> None:
        if e.ok:
            labels = self._model(e.model), e.backend
            self._observe(e.load_s, "model_load_duration_seconds", *labels)
            if e.reloads:
                self._count(1, "model_reloads_total", e.reloads)

    def _reloaded(self) -> None:
        self._set(1, "config_last_reload_successful")
        self._set(self._wall(), "config_last_reload_success_timestamp_seconds")

    def _count(self, amount: float, *key: str) -> None:
        (self._numbers.get(key) or self._fed.number(key)).inc(amount)

    def _set(self, value: float, *key: str) -> None:
        self._fed.number(key).value = value

    def _observe(self, value: float, *key: str) -> None:
        (self._spreads.get(key) or self._fed.spread(key)).observe(value)


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
        snapshot = self._snapshot()
        spreads = _spreads(snapshot)
        for name, labels, value in self._samples(snapshot):
            row = values[name]
            if name == "queue_oldest_seconds":
                row[labels] = max(value, row.get(labels, 0.0))
            else:  # models without a label of their own add up in one series
                row[labels] = value + row.get(labels, 0.0)
        for metric in METRICS:
            if metric.scraped and metric.kind == "histogram":
                yield _spread_out(metric, spreads[metric.name], PREFIX)
            elif metric.scraped:
                yield _filled(metric, values[metric.name])

    def _samples(self, snapshot: Snapshot) -> Iterator[Sample]:
        yield from self._constant
        for reason, count in snapshot.attempts.items():
            yield "attempts_total", (reason,), count
        for verdict, count in snapshot.retry_refused.items():
            yield "retry_budget_exhausted_total", (verdict,), count
        for limit, count in snapshot.limited.items():
            yield "limited_total", (limit,), count
        for why, count in snapshot.queue_refused.items():
            yield "queue_refused_total", (why,), count
        for name, count in snapshot.idle_connections.items():
            yield "backend_idle_connections", (name,), count
        for name, count in snapshot.stale_connections.items():
            yield "backend_stale_connections_total", (name,), count
        yield from self._plan_samples(snapshot)
        yield from self._queue_samples(snapshot.queues)
        for backend in snapshot.backends:  # what runs gets its labels before what merely exists
            yield from self._busy_samples(backend)
        for backend in snapshot.backends:
            yield from self._backend_samples(backend)
            for breaker in backend.breakers:
                yield from self._breaker_samples(backend.name, breaker)

    def _plan_samples(self, snapshot: Snapshot) -> Iterator[Sample]:
        decisions = snapshot.decisions
        for kind, count in decisions.kinds.items():
            yield "plan_decisions_total", (kind,), count
        for kind, tokens in decisions.prefix_tokens.items():
            yield "prefix_tokens_total", (kind,), tokens
        yield "plan_evaluations_total", (), decisions.evaluations
        yield "declined_free_slot_total", (), decisions.declined
        for (backend, model), slots in snapshot.believed.items():
            yield "backend_slots_believed", (backend, self._model(model)), slots
        for backend_row in snapshot.backends:
            name = backend_row.name
            yield "backend_slow_factor", (name,), decisions.slow.get(name, 1.0)

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


def _spreads(snapshot: Snapshot) -> dict[str, dict[_Key, Spread]]:
    """The histograms that others keep, by metric and labels."""
    decisions, late = snapshot.decisions, snapshot.late
    found: dict[str, dict[_Key, Spread]] = defaultdict(dict)
    found["ttft_prediction_ratio"] = {(name,): each for name, each in decisions.ratios.items()}
    found["queue_wait_estimate_error_seconds"] = {(way,): each for way, each in late.items()}
    found["batch_gated_seconds"] = {(): decisions.gated}
    if snapshot.pass_s is not None:
        found["plan_duration_seconds"] = {(): snapshot.pass_s}
    return found


def _filled(metric: Metric, rows: Mapping[_Key, float], prefix: str = PREFIX) -> Family:
    name = prefix + metric.name
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
