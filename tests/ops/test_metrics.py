"""Metrics: what an event counts as, what a scrape shows, and that labels stay bounded."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from balancer.core.decisions import Decisions
from balancer.core.domain import Attempt, BreakerState, Outcome, Switch, Usage, Verdict
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
from balancer.ops.metrics import (
    METRICS,
    PREFIX,
    Fed,
    Metric,
    Metrics,
    QueueRow,
    Snapshot,
    document,
)
from tests.core.deciding import choice, decision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from balancer.core.events import Event

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
CALL = CallEnded(
    at=12.0,
    request_id="r1",
    method="POST",
    path="/api/chat",
    endpoint="chat",
    status=200,
    outcome="ok",
    duration_s=3.0,
    model="llama3.2",
    backend="gpu0",
    attempts=1,
    why="warm",
    queue_s=0.2,
    first_byte_s=0.4,
    usage=Usage(tokens_in=7, tokens_out=42),
    inference=True,
    streaming=True,
)


@dataclass(frozen=True)
class Breaker:
    model: str | None
    state: BreakerState
    stale: int = 0


@dataclass(frozen=True)
class Row:
    name: str = "gpu0"
    up: bool | None = True
    version: str | None = "0.33.0"
    switch: Switch = Switch.SERVING
    slots: int | None = 2
    in_flight: Mapping[str, int] = field(default_factory=dict)
    vram_bytes: int = 0
    loaded: tuple[str, ...] = ()
    available: tuple[str, ...] = ()
    breakers: tuple[Breaker, ...] = ()


class Bench:
    """Metrics over a catalogue and a snapshot that a test may change."""

    def __init__(self, *known: str, limit: int = 100) -> None:
        self.known = list(known)
        self.shown = Snapshot()
        self.wall = 1000.0
        self.metrics = Metrics(
            snapshot=lambda: self.shown,
            known_models=lambda: self.known,
            wall=lambda: self.wall,
            version="1.2.3",
            model_label_limit=limit,
            process=False,
        )

    def tell(self, *events: Event) -> Bench:
        for event in events:
            self.metrics(event)
        return self

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(PREFIX + name, labels)

    def labels(self, name: str, label: str) -> set[str]:
        samples = [s for family in self.metrics.registry.collect() for s in family.samples]
        return {s.labels[label] for s in samples if s.name == PREFIX + name}


def again(backend: str, verdict: Verdict) -> RetryGranted:
    after = Attempt(1, "gpu0", Outcome(verdict, 1.0, 2.0))
    return RetryGranted(1.0, "r1", "llama3.2", backend, 2, 0.0, "failover", after)


def failed(verdict: Verdict) -> AttemptFailed:
    return AttemptFailed(1.0, "r1", "chat", "llama3.2", "gpu0", 1, Outcome(verdict, 1.0, 2.0))


# -- the table ------------------------------------------------------------------------------


def test_the_table_is_sound() -> None:
    """Names are unique and in base units, labels come from one short list."""
    allowed = {
        "backend",
        "model",
        "endpoint",
        "code",
        "outcome",
        "verdict",
        "reason",
        "phase",
        "priority",
        "state",
        "to",
        "type",
        "warm",
        "version",
        "python",
        "generation",
        "kind",
        "result",
    }
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert set(metric.labels) <= allowed
        assert (metric.kind == "counter") is metric.name.endswith("_total")
        is_fed = metric.kind == "histogram" and not metric.scraped
        assert is_fed is bool(metric.buckets)
        assert not re.search(r"_(ms|milliseconds|percent|avg)\b", metric.name)


def test_the_page_in_docs_is_the_table() -> None:
    """The documentation is printed from the table; print it again after changing it."""
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text() == document()


def test_only_the_table_is_shown() -> None:
    """Nothing is exposed under our prefix that the table, and so the page, does not name."""
    bench = Bench("llama3.2:latest").tell(CALL)
    families = {family.name for family in bench.metrics.registry.collect()}
    told = {PREFIX + re.sub(r"_(total|info)$", "", metric.name) for metric in METRICS}
    assert families == told


# -- events ---------------------------------------------------------------------------------


def test_a_call() -> None:
    """A good call counts once in each of its metrics, under the catalogue's spelling."""
    bench = Bench("llama3.2:latest").tell(CALL)
    place = {"model": "llama3.2:latest", "backend": "gpu0"}
    assert bench.value("requests_total", endpoint="chat", code="200", outcome="ok", **place) == 1
    assert bench.value("request_duration_seconds_sum", endpoint="chat", **place) == 3.0
    assert bench.value("time_to_first_token_seconds_sum", warm="true", **place) == 0.4
    queued = {"model": "llama3.2:latest", "priority": "interactive"}
    assert bench.value("queue_duration_seconds_sum", **queued) == 0.2
    assert bench.value("tokens_total", type="input", **place) == 7
    assert bench.value("tokens_total", type="output", **place) == 42


@pytest.mark.parametrize(
    ("why", "load_s", "warm"),
    [
        ("warm", None, "true"),
        ("cold", 0.001, "false"),
        ("only", 0.002, "true"),
        ("failover", 12.0, "false"),
        ("only", None, "unknown"),
    ],
)
def test_warmth(why: str, load_s: float | None, warm: str) -> None:
    """Warm is what the placement says, else what the backend's load time says, else unknown."""
    bench = Bench("llama3.2:latest").tell(replace(CALL, why=why, usage=Usage(load_s=load_s)))
    assert bench.labels("time_to_first_token_seconds_sum", "warm") == {warm}


def test_what_goes_to_several_backends_has_one_label() -> None:
    """Not one for each set of them."""
    calls = [replace(CALL, backend=names, inference=False) for names in ("a,b", "a,c")]
    bench = Bench().tell(*calls)
    assert bench.labels("requests_total", "backend") == {"several"}
    assert bench.labels("request_duration_seconds_count", "backend") == {"several"}


def test_no_first_token_without_a_stream() -> None:
    """The first byte of a whole answer is its last one, and a read has no tokens at all."""
    bench = Bench("llama3.2:latest").tell(
        replace(CALL, streaming=False), replace(CALL, inference=False), replace(CALL, model="")
    )
    assert bench.labels("time_to_first_token_seconds_sum", "model") == {""}
    assert bench.labels("queue_duration_seconds_sum", "model") == {"llama3.2:latest", ""}


@pytest.mark.parametrize(
    ("event", "name", "labels"),
    [
        (
            replace(CALL, status=499, outcome="client_abort", phase="queued"),
            "client_disconnects_total",
            {"phase": "queued"},
        ),
        (
            replace(CALL, status=401, outcome="rejected"),
            "auth_failures_total",
            {"reason": "unauthorized"},
        ),
        (
            replace(CALL, status=403, outcome="rejected"),
            "auth_failures_total",
            {"reason": "forbidden"},
        ),
        (
            replace(CALL, why="short-context"),
            "short_context_total",
            {"model": "llama3.2:latest", "backend": "gpu0"},
        ),
        (failed(Verdict.FAULT), "upstream_errors_total", {"backend": "gpu0", "verdict": "fault"}),
        (failed(Verdict.UNFINISHED), "unfinished_total", {"backend": "gpu0"}),
        (again("gpu1", Verdict.FAULT), "failovers_total", {"reason": "fault"}),
        (
            BreakerMoved(1.0, "gpu0", "m", BreakerState.CLOSED, BreakerState.OPEN, "", 1.0),
            "breaker_transitions_total",
            {"backend": "gpu0", "to": "open"},
        ),
        (
            LoadEnded(1.0, "gpu0", "llama3.2", True, 7.0, ""),
            "model_load_duration_seconds_count",
            {"backend": "gpu0", "model": "llama3.2:latest"},
        ),
        (
            LoadEnded(1.0, "gpu0", "llama3.2", True, 7.0, "", "num_ctx"),
            "model_reloads_total",
            {"reason": "num_ctx"},
        ),
        (CheckEnded(1.0, "gpu0", True, 0.1), "check_duration_seconds_count", {"backend": "gpu0"}),
        (Mishap(1.0, "bus", "KeyError"), "mishaps_total", {}),
    ],
)
def test_what_an_event_counts_as(event: Event, name: str, labels: dict[str, str]) -> None:
    """Each kind of news raises its counter by one."""
    bench = Bench("llama3.2:latest")
    assert not bench.value(name, **labels)
    assert bench.tell(event).value(name, **labels) == 1


def test_a_backends_own_401_is_no_failure_to_authenticate() -> None:
    """Only our own refusals count; an answer that we relay does not."""
    bench = Bench("llama3.2:latest").tell(replace(CALL, status=401, outcome="ok"))
    assert bench.labels("auth_failures_total", "reason") == set()


def test_an_unfinished_answer_is_no_error() -> None:
    """It has a counter of its own."""
    bench = Bench().tell(failed(Verdict.UNFINISHED))
    assert bench.labels("upstream_errors_total", "verdict") == set()


def test_a_failed_load_is_not_timed() -> None:
    """The time of a load that failed says nothing about loads."""
    bench = Bench("m:latest").tell(LoadEnded(1.0, "gpu0", "m", False, 7.0, "no memory", "options"))
    assert bench.labels("model_load_duration_seconds_count", "model") == set()
    assert bench.labels("model_reloads_total", "reason") == set()


def test_the_same_backend_again_is_no_failover() -> None:
    """A kept connection that was closed is no reason to go elsewhere."""
    bench = Bench().tell(again("gpu0", Verdict.STALE))
    assert bench.labels("failovers_total", "reason") == set()


def test_calls_are_counted_together_and_none_is_forgotten() -> None:
    """Whoever looks sees all that ended before; what nobody looks at is bounded."""
    bench = Bench("llama3.2:latest")
    labels = {
        "model": "llama3.2:latest",
        "backend": "gpu0",
        "endpoint": "chat",
        "code": "200",
        "outcome": "ok",
    }
    for number in range(1, 4):
        bench.tell(CALL)
        assert bench.value("requests_total", **labels) == number
    most = 0
    for _ in range(1000):
        bench.tell(CALL)
        most = max(most, len(bench.metrics._pending))
    assert 1 < most < 256
    assert bench.value("requests_total", **labels) == 1003
    assert bench.metrics._pending == []


def test_calls_count_under_the_names_of_their_time() -> None:
    """What ended before its model left the catalogue still has the model's label."""
    bench = Bench("llama3.2:latest").tell(CALL)
    assert bench.labels("requests_total", "model") == {"llama3.2:latest"}
    bench.tell(replace(CALL, backend="gpu1"))
    bench.known = []
    bench.tell(CatalogChanged(1.0, "gpu1", 0, ()), replace(CALL, backend="gpu2", model="new"))
    samples = [s for f in bench.metrics.registry.collect() for s in f.samples]
    told = {
        s.labels["backend"]: s.labels["model"]
        for s in samples
        if s.name == PREFIX + "requests_total"
    }
    assert told == {"gpu0": "llama3.2:latest", "gpu1": "llama3.2:latest", "gpu2": "other"}


def test_reloads() -> None:
    """A refused configuration shows at once; the instant is that of the last good one."""
    bench = Bench()
    assert bench.value("config_last_reload_successful") == 1
    bench.wall = 2000.0
    bench.tell(ConfigRejected(1.0, ("x",)))
    assert bench.value("config_last_reload_successful") == 0
    assert bench.value("config_last_reload_success_timestamp_seconds") == 1000.0
    bench.tell(ConfigApplied(1.0, (), ()))
    assert bench.value("config_last_reload_successful") == 1
    assert bench.value("config_last_reload_success_timestamp_seconds") == 2000.0


def test_loop_lag() -> None:
    """Late timers are counted by how late."""
    bench = Bench()
    bench.metrics.loop_lag(0.3)
    assert bench.value("event_loop_lag_seconds_bucket", le="0.25") == 0
    assert bench.value("event_loop_lag_seconds_bucket", le="0.5") == 1


# -- the label of a model -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "llama3.2",
        "LLAMA3.2:Latest",
        "library/llama3.2",
        "registry.ollama.ai/library/llama3.2:latest",
    ],
)
def test_one_model_has_one_label(name: str) -> None:
    """All spellings that Ollama takes for one model count as one."""
    bench = Bench("llama3.2:latest").tell(replace(CALL, model=name), replace(CALL, model=name))
    assert bench.labels("requests_total", "model") == {"llama3.2:latest"}


def test_the_catalogues_spelling_wins() -> None:
    """A label is written as the lists write it, whatever the case of the call."""
    bench = Bench("hf.co/Org/Repo:Q4_K_M").tell(replace(CALL, model="hf.co/org/repo:q4_k_m"))
    assert bench.labels("requests_total", "model") == {"hf.co/Org/Repo:Q4_K_M"}


@UNTIMED
@given(st.lists(st.text(max_size=20) | st.sampled_from(["a", "A:latest", "b", "c", "d"])))
def test_labels_are_bounded(names: list[str]) -> None:
    """Whatever clients call their models, no more than the limit and `other` appear."""
    bench = Bench("a:latest", "b:latest", "c:latest", limit=2)
    for name in names:
        bench.tell(replace(CALL, model=name))
    labels = bench.labels("requests_total", "model")
    assert labels <= {"", "other", "a:latest", "b:latest", "c:latest"}
    assert len(labels - {"", "other"}) <= 2


def test_spellings_are_not_kept_without_end() -> None:
    """A client that varies the case of a name fills nothing."""
    bench = Bench("abcdefgh:latest", limit=1)
    for number in range(256):
        letters = (c.upper() if number >> bit & 1 else c for bit, c in enumerate("abcdefgh"))
        bench.tell(replace(CALL, model="".join(letters)))
    assert bench.labels("requests_total", "model") == {"abcdefgh:latest"}
    assert len(bench.metrics._model._seen) == 10


def test_a_model_gets_its_label_when_it_appears() -> None:
    """After the catalogue changed a name that was `other` counts by itself."""
    bench = Bench("a:latest").tell(replace(CALL, model="b"))
    assert bench.labels("requests_total", "model") == {"other"}
    bench.known.append("b:latest")
    bench.tell(CatalogChanged(1.0, "gpu0", 2, ()), replace(CALL, model="b"))
    assert bench.labels("requests_total", "model") == {"other", "b:latest"}


# -- gauges ---------------------------------------------------------------------------------


def test_pauses_of_the_collector() -> None:
    """By generation; all of them are there from the start, as one may come at any moment."""
    bench = Bench()
    count = "gc_pause_seconds_count"
    assert [bench.value(count, generation=each) for each in "012"] == [0, 0, 0]
    bench.metrics.gc_paused(2, 0.02)
    assert [bench.value(count, generation=each) for each in "012"] == [0, 0, 1]
    assert bench.value("gc_pause_seconds_sum", generation="2") == 0.02
    assert bench.value("gc_pause_seconds_bucket", generation="2", le="0.025") == 1


def test_series_are_those_of_the_library() -> None:
    """What is counted here without its locks shows, in both formats, as its own classes show it."""
    theirs = CollectorRegistry()
    disable_created_metrics()  # type: ignore[no-untyped-call]
    bounds = (0.1, 1.0, 2.5)
    labels = ("model", "backend")
    counter = Counter("tokens_total", "Of all.", labels, registry=theirs)
    spread = Histogram("wait_seconds", "Waiting.", labels, registry=theirs, buckets=bounds)
    bare = Histogram("lag_seconds", "Lag.", registry=theirs, buckets=bounds)
    metrics = (
        Metric("tokens_total", "counter", labels, "Of all."),
        Metric("wait_seconds", "histogram", labels, "Waiting.", bounds),
        Metric("lag_seconds", "histogram", (), "Lag.", bounds),
        Metric("idle_seconds", "histogram", (), "Idle.", bounds),
    )
    Histogram("idle_seconds", "Idle.", registry=theirs, buckets=bounds)
    fed = Fed(metrics, prefix="")
    ours = CollectorRegistry()
    ours.register(fed)
    rng = random.Random(1)
    for _ in range(500):
        where = rng.choice("mn"), rng.choice(["a", 'q"\\\n'])
        amount = rng.choice([0.0, 0.1, 1, 2.5, 1e9, rng.expovariate(1.0)])
        counter.labels(*where).inc(amount)
        fed.number(("tokens_total", *where)).inc(amount)
        spread.labels(*where).observe(amount)
        fed.spread(("wait_seconds", *where)).observe(amount)
        bare.observe(amount)
        fed.spread(("lag_seconds",)).observe(amount)
    assert generate_latest(ours) == generate_latest(theirs)
    assert openmetrics.generate_latest(ours) == openmetrics.generate_latest(theirs)  # type: ignore[no-untyped-call]


def test_a_counter_only_grows() -> None:
    """A backend that tells of fewer than no tokens changes nothing."""
    bench = Bench().tell(replace(CALL, usage=Usage(tokens_in=-1, tokens_out=-1)))
    assert bench.labels("tokens_total", "type") == set()
    with pytest.raises(ValueError, match="only grows"):
        Fed(METRICS).number(("mishaps_total",)).inc(-1)


def test_who_hears_names_what_counts() -> None:
    """Of no other event is anything counted."""
    assert set(Bench().metrics.kinds) >= {CallEnded, AttemptFailed, RetryGranted, Mishap}


def test_a_snapshot() -> None:
    """A scrape shows the state of that moment."""
    bench = Bench("a:latest", "b:latest")
    bench.shown = Snapshot(
        backends=(
            Row(
                in_flight={"a": 3},
                vram_bytes=2**30,
                loaded=("a:latest", "b:latest"),
                available=("a:latest", "b:latest"),
                switch=Switch.DRAINING,
                breakers=(
                    Breaker(None, BreakerState.CLOSED, stale=2),
                    Breaker("b:latest", BreakerState.OPEN, stale=3),
                ),
            ),
            Row("gpu1", up=None, version=None, slots=None),
        ),
        queues=(QueueRow("a", 4, 1.5), QueueRow("a", 9, 70.0, "batch")),
        retry_refused={"fault": 6},
        limited={"rpm": 3},
        queue_refused={"wait": 5},
        idle_connections={"gpu0": 7},
        stale_connections={"gpu0": 8},
    )
    value = bench.value
    assert value("backend_up", backend="gpu0") == 1
    assert value("backend_up", backend="gpu1") == 0
    assert value("backend_info", backend="gpu0", version="0.33.0") == 1
    assert bench.labels("backend_info", "backend") == {"gpu0"}
    assert value("backend_slots", backend="gpu0") == 2
    assert bench.labels("backend_slots", "backend") == {"gpu0"}
    assert value("backend_switch", backend="gpu0", state="draining") == 1
    assert value("backend_idle_connections", backend="gpu0") == 7
    assert value("backend_stale_connections_total", backend="gpu0") == 8
    assert value("backend_switch", backend="gpu0", state="serving") == 0
    assert value("backend_vram_bytes", backend="gpu0") == 2**30
    assert value("backend_models_loaded", backend="gpu0") == 2
    assert value("requests_in_flight", backend="gpu0", model="a:latest") == 3
    assert value("model_loaded", backend="gpu0", model="a:latest") == 1
    assert value("requests_in_flight", backend="gpu0", model="b:latest") == 0
    assert bench.labels("model_loaded", "model") == {"a:latest", "b:latest"}
    assert bench.labels("model_available", "model") == {"a:latest", "b:latest"}
    assert value("breaker_state", backend="gpu0", model="", state="closed") == 1
    assert value("breaker_state", backend="gpu0", model="b:latest", state="open") == 1
    assert value("breaker_state", backend="gpu0", model="b:latest", state="closed") == 0
    assert value("breaker_stale_settlements_total", backend="gpu0") == 5
    assert value("queue_depth", model="a:latest", priority="interactive") == 4
    assert value("queue_oldest_seconds", model="a:latest", priority="interactive") == 1.5
    assert value("queue_depth", model="a:latest", priority="batch") == 9
    assert value("retry_budget_exhausted_total", reason="fault") == 6
    assert value("limited_total", reason="rpm") == 3
    assert value("queue_refused_total", reason="wait") == 5


def test_what_runs_has_labels_before_what_merely_exists() -> None:
    """With more models than labels the rest adds up in one series."""
    names = [f"m{number}:latest" for number in range(5)]
    bench = Bench(*names, limit=2)
    bench.shown = Snapshot(
        backends=(Row(available=tuple(names), loaded=("m4:latest",), in_flight={"m3": 1}),),
        queues=(QueueRow("m0", 1, 2.0), QueueRow("m1", 1, 9.0), QueueRow("m2", 3, 5.0)),
    )
    assert bench.labels("queue_depth", "model") == {"m0:latest", "m1:latest", "other"}
    bench.shown = replace(bench.shown, queues=())
    assert bench.value("model_loaded", backend="gpu0", model="m4:latest") == 1
    assert bench.value("model_available", backend="gpu0", model="other") == 3


def test_what_the_plan_did() -> None:
    """Its counts and spreads are shown as they stand; who is not slow is at full speed."""
    decisions, passes, late = Decisions(), Spread((0.001, 0.1)), Spread((1.0,))
    for _ in range(5):
        decisions.add(decision(choice("gpu0")))
    decisions.evaluations, decisions.declined = 7, 2
    decisions.prefix_tokens["expected"], decisions.prefix_tokens["seen"] = 300.0, 200.0
    decisions.foretold("gpu0", 0.5, 1.0)
    decisions.gated.observe(3.0)
    decisions.slow["gpu1"] = 0.4
    passes.observe(0.01)
    late.observe(4.0)
    bench = Bench("a:latest")
    bench.shown = Snapshot(
        backends=(Row(), Row("gpu1")),
        decisions=decisions,
        pass_s=passes,
        late={"longer": late},
        believed={("gpu0", "a:latest"): 3},
    )
    value = bench.value
    assert value("plan_decisions_total", kind="go") == 5
    assert value("plan_decisions_total", kind="load") == 0
    assert value("plan_evaluations_total") == 7
    assert value("declined_free_slot_total") == 2
    assert value("prefix_tokens_total", kind="expected") == 300
    assert value("prefix_tokens_total", kind="seen") == 200
    assert value("ttft_prediction_ratio_sum", backend="gpu0") == 2.0
    assert value("ttft_prediction_ratio_bucket", backend="gpu0", le="1.5") == 0
    assert value("ttft_prediction_ratio_bucket", backend="gpu0", le="2.0") == 1
    assert value("batch_gated_seconds_count") == 1
    assert value("plan_duration_seconds_bucket", le="0.001") == 0
    assert value("plan_duration_seconds_bucket", le="0.1") == 1
    assert value("queue_wait_estimate_error_seconds_sum", result="longer") == 4.0
    assert value("backend_slots_believed", backend="gpu0", model="a:latest") == 3
    assert value("backend_slow_factor", backend="gpu0") == 1.0
    assert value("backend_slow_factor", backend="gpu1") == 0.4


def test_loads_and_what_went_for_them() -> None:
    """By reason, as long as it is one of the plan's; each model that went counts."""
    bench = Bench().tell(
        LoadStarted(1.0, "gpu0", "a", "call", ("b", "c")),
        LoadStarted(1.0, "gpu0", "a", "ahead"),
        LoadStarted(1.0, "gpu0", "a", "trial of a breaker"),
    )
    reasons = ("call", "ahead", "other")
    assert [bench.value("model_loads_total", reason=reason) for reason in reasons] == [1, 1, 1]
    assert bench.value("evictions_total") == 2


def test_the_oldest_of_the_rest() -> None:
    """Depths add up, ages do not."""
    bench = Bench(limit=0)
    bench.shown = Snapshot(queues=(QueueRow("a", 1, 9.0), QueueRow("b", 3, 5.0)))
    assert bench.value("queue_depth", model="other", priority="interactive") == 4
    assert bench.value("queue_oldest_seconds", model="other", priority="interactive") == 9.0


def test_an_emptied_queue_says_zero() -> None:
    """An autoscaler sees a queue fall to zero instead of vanish."""
    bench = Bench("a:latest")
    bench.shown = Snapshot(queues=(QueueRow("a", 4, 1.5),))
    bench.metrics.render()
    bench.shown = Snapshot()
    assert bench.value("queue_depth", model="a:latest", priority="interactive") == 0
    assert bench.value("queue_oldest_seconds", model="a:latest", priority="interactive") == 0


# -- the page -------------------------------------------------------------------------------


def full() -> Bench:
    bench = Bench("llama3.2:latest").tell(CALL, failed(Verdict.FAULT))
    row = Row(loaded=("llama3.2:latest",), breakers=(Breaker(None, BreakerState.OPEN, 1),))
    bench.shown = Snapshot((row,), (QueueRow("llama3.2", 1, 1.0),), {"warm": 1})
    return bench


def test_plain_text_by_default() -> None:
    """Without a wish the page is the classic text, and it parses."""
    body, content_type = full().metrics.render()
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name for family in parse_text(body.decode())}
    assert PREFIX + "requests" in families
    assert PREFIX + "build_info" in families
    assert "_created" not in body.decode()


def test_openmetrics_on_request() -> None:
    """Who names OpenMetrics gets it, and it parses strictly."""
    accept = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3"
    body, content_type = full().metrics.render(accept)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    families = parse_openmetrics(body.decode())  # type: ignore[no-untyped-call]
    assert PREFIX + "requests" in {family.name for family in families}
    assert body.endswith(b"# EOF\n")


@pytest.mark.parametrize(
    "accept", ["*/*", "", "text/plain;version=x", "application/openmetrics-text;version=9.x"]
)
def test_odd_wishes_are_answered(accept: str) -> None:
    """No Accept header is an error, and none is echoed."""
    body, content_type = full().metrics.render(accept)
    assert b"ollama_balancer_requests_total" in body
    assert "9.x" not in content_type


def test_the_process_is_shown_too() -> None:
    """Memory and garbage collection come with the library's own names."""
    metrics = Metrics(
        snapshot=Snapshot, known_models=tuple, wall=lambda: 1.0, version="1", process=True
    )
    body, _ = metrics.render()
    assert b"process_resident_memory_bytes" in body
    assert b"python_gc_collections_total" in body
    assert b'ollama_balancer_build_info{python="3.' in body
    assert b"ollama_balancer_start_time_seconds 1.0" in body
