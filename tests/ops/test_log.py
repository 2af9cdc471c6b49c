"""Lines: what is told, at which level, in which form, and that none can be forged."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.test_utils import unused_port
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from balancer.core import events
from balancer.core.decisions import told
from balancer.core.domain import Attempt, BreakerState, Outcome, Switch, Usage, Verdict
from balancer.core.events import (
    AttemptEnded,
    AttemptFailed,
    BackendDrained,
    BreakerMoved,
    BreakersReset,
    CallEnded,
    CallQueued,
    CatalogChanged,
    CheckEnded,
    ConfigApplied,
    ConfigRejected,
    DrainEnded,
    DrainRequested,
    Event,
    HealthFlipped,
    HostPassedOver,
    LearnedLost,
    LeaseGranted,
    LoadEnded,
    LoadStarted,
    MemberJoined,
    MemberLeft,
    Mishap,
    OrderEnded,
    RetryGranted,
    SampleDiscarded,
    Serving,
    SlotsBelieved,
    Stopped,
    Stopping,
    Straggling,
    Suspected,
    SwitchesLost,
    SwitchMoved,
    TrialEnded,
)
from balancer.ops import log as subject
from balancer.ops.log import (
    DETAILS,
    Bridge,
    LogWriter,
    Stamp,
    configure,
    escape,
    shown_address,
    shown_path,
)
from tests.core.deciding import choice, decision

if TYPE_CHECKING:
    from pathlib import Path

    from balancer.ops.log import ClientAddress, Format, Level, Log

DECISION = decision(choice("gpu0", cached=100.0), choice("gpu1", prompt_rate=500.0))
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
CALL = CallEnded(
    at=12.0,
    request_id="r1",
    method="POST",
    path="/api/chat",
    endpoint="chat",
    status=200,
    outcome="ok",
    duration_s=1.5,
    client="192.168.7.42",
    user_agent="ollama-python/0.6",
    key="lab",
    model="llama3.2",
    backend="gpu0",
    attempts=2,
    why="failover",
    queue_s=0.0125,
    first_byte_s=0.25,
    bytes_in=120,
    bytes_out=4096,
    usage=Usage(tokens_in=7, tokens_out=42),
    inference=True,
    streaming=True,
)
CLOSED, OPEN, HALF = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


def opened(old: BreakerState = CLOSED, new: BreakerState = OPEN) -> BreakerMoved:
    return BreakerMoved(1.0, "gpu0", None, old, new, "3 in a row", 2.0)


# Every kind of event, with the level and name of its line.
TOLD: list[tuple[Event, str, str]] = [
    (CALL, "info", "request"),
    (CallQueued(1.0, "r1", "m", 3), "debug", "queued"),
    (LeaseGranted(1.0, "r1", "m", "gpu0", 1, 0.5, "warm"), "debug", "lease_granted"),
    (
        AttemptEnded(1.0, "r1", "chat", "m", "gpu0", 1, Outcome(Verdict.FAULT, 1.0, 2.0)),
        "debug",
        "attempt_ended",
    ),
    (
        AttemptFailed(1.0, "r1", "chat", "m", "gpu0", 1, Outcome(Verdict.FAULT, 1.0, 2.0)),
        "debug",
        "attempt_ended",
    ),
    (
        RetryGranted(
            *(1.0, "r1", "m", "gpu1", 2, 0.5, "failover"),
            Attempt(1, "gpu0", Outcome(Verdict.FAULT, 1.0, 2.0)),
        ),
        "debug",
        "lease_granted",
    ),
    (CheckEnded(1.0, "gpu0", True, 0.01), "debug", "check"),
    (HealthFlipped(1.0, "gpu0", True, "Ollama 0.33.0"), "info", "backend_up"),
    (HealthFlipped(1.0, "gpu0", False, "refused"), "warning", "backend_down"),
    (opened(), "warning", "breaker_opened"),
    (opened(HALF, OPEN), "info", "breaker_reopened"),
    (opened(OPEN, HALF), "debug", "breaker_half_open"),
    (opened(HALF, CLOSED), "info", "breaker_closed"),
    (TrialEnded(1.0, "gpu0", None, "version", False, "refused"), "debug", "trial_ended"),
    (Suspected(1.0, "gpu0", "m", 31.0), "warning", "backend_suspected"),
    (LoadStarted(1.0, "gpu0", "m", "wanted"), "info", "load_started"),
    (LoadEnded(1.0, "gpu0", "m", True, 12.0, ""), "info", "load_ended"),
    (LoadEnded(1.0, "gpu0", "m", False, 12.0, "out of memory"), "warning", "load_failed"),
    (CatalogChanged(1.0, "gpu0", 3, ("m",)), "debug", "catalog_changed"),
    (MemberJoined(1.0, "gpu0", "http://gpu0:11434"), "info", "backend_added"),
    (MemberLeft(1.0, "gpu0"), "info", "backend_removed"),
    (HostPassedOver(1.0, "twice"), "warning", "host_passed_over"),
    (SwitchMoved(1.0, "gpu0", Switch.DRAINING), "info", "backend_draining"),
    (SwitchMoved(1.0, "gpu0", Switch.DISABLED), "info", "backend_disabled"),
    (SwitchMoved(1.0, "gpu0", Switch.SERVING), "info", "backend_resumed"),
    (BackendDrained(1.0, "gpu0"), "info", "backend_drained"),
    (BreakersReset(1.0, "gpu0", "ops"), "info", "breaker_reset"),
    (OrderEnded(1.0, "pull", "m", "ops", ("a",), (), finished=True), "info", "order_ended"),
    (OrderEnded(1.0, "pull", "m", "ops", (), ("a: x",), finished=True), "warning", "order_ended"),
    (OrderEnded(1.0, "pull", "m", "", (), (), finished=False), "warning", "order_broken_off"),
    (LearnedLost(1.0, "/var/lib/b/state.learned.json", "old"), "warning", "learned_lost"),
    (SwitchesLost(1.0, "/var/lib/b/state.json", "not JSON"), "warning", "switches_lost"),
    (told(DECISION), "debug", "planned"),
    (DrainRequested(1.0, "gpu0", "m", "n", 4.0, 12.0), "info", "model_drain_requested"),
    (DrainEnded(1.0, "gpu0", "m", "n", "late", 60.0), "info", "model_drain_ended"),
    (SlotsBelieved(1.0, "gpu0", "m", 2, 3, "seen"), "debug", "slots_believed"),
    (Straggling(1.0, "gpu0", 0.4, "slow"), "warning", "backend_speed"),
    (Straggling(1.0, "gpu0", 1.0, "recovered"), "info", "backend_speed"),
    (SampleDiscarded(1.0, "gpu0", "prompt_rate", 1e9), "info", "sample_discarded"),
    (ConfigApplied(1.0, ("health.fall",), ()), "info", "config_reloaded"),
    (ConfigApplied(1.0, (), ("server.listen",)), "warning", "config_reloaded"),
    (ConfigRejected(1.0, ("config.yaml:3:1 backends: unknown",)), "error", "config_rejected"),
    (Serving(1.0, ("127.0.0.1:11435",), 2, 7), "info", "serving"),
    (Stopping(1.0, "SIGTERM", 1, 0), "info", "shutdown_drain"),
    (Stopped(1.0, 0), "info", "stopped"),
    (Stopped(1.0, 2), "warning", "stopped"),
    (Mishap(1.0, "prober", "ZeroDivisionError"), "error", "mishap"),
]


def test_details_are_never_told_above_debug() -> None:
    """They are left out without a look at what they would say."""
    writer = LogWriter(make()[0])
    levels = {kind: {writer.line(e)[0] for e, _, _ in TOLD if type(e) is kind} for kind in DETAILS}
    assert levels == {kind: {logging.DEBUG} for kind in DETAILS}


def make(
    form: Format = "json",
    level: Level = "debug",
    *,
    is_tty: bool = False,
    env: dict[str, str] | None = None,
    color: bool | None = None,
) -> tuple[Log, io.StringIO]:
    stream = io.StringIO()
    log = configure(
        level,
        form,
        stream=stream,
        is_tty=is_tty,
        env=env or {},
        wall=lambda: 86400.5,
        color=color,
    )
    return log, stream


def lines(*told: Event, level: Level = "debug", **rest: Any) -> list[dict[str, Any]]:
    log, stream = make(level=level)
    writer = LogWriter(log, **rest)
    for event in told:
        writer(event)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_that_is_no_number_is_json_all_the_same(value: float) -> None:
    """What a file of old held may be anything; the line stays one that can be read."""
    log, stream = make()
    LogWriter(log)(SampleDiscarded(1.0, "gpu0", "pair", value))
    line = json.loads(stream.getvalue(), parse_constant=pytest.fail)
    assert line["value"] == str(value)


def test_the_canonical_line() -> None:
    """A call is told in one line, under flat field names, time and level first."""
    (line,) = lines(CALL)
    assert list(line.items()) == [
        ("timestamp", "1970-01-02T00:00:00.500Z"),
        ("level", "info"),
        ("event", "request"),
        ("request_id", "r1"),
        ("http.request.method", "POST"),
        ("url.path", "/api/chat"),
        ("http.response.status_code", 200),
        ("client.address", "192.168.7.42"),
        ("user_agent.original", "ollama-python/0.6"),
        ("key.name", "lab"),
        ("gen_ai.request.model", "llama3.2"),
        ("backend.name", "gpu0"),
        ("attempt.count", 2),
        ("route.reason", "failover"),
        ("queue_ms", 12.5),
        ("ttft_ms", 250.0),
        ("duration_ms", 1500.0),
        ("bytes_in", 120),
        ("bytes_out", 4096),
        ("gen_ai.usage.input_tokens", 7),
        ("gen_ai.usage.output_tokens", 42),
        ("outcome", "ok"),
    ]


TEXTS = st.one_of(st.just(""), st.sampled_from(["x" * 256, "x" * 257, "é\n" * 200]), st.text())
AMOUNTS = st.integers(0, 2**40)
SECONDS = st.floats(0, 1e6)
CALLS = st.builds(
    CallEnded,
    at=st.just(1.0),
    request_id=TEXTS,
    method=TEXTS,
    path=st.one_of(TEXTS, st.just("/k/secret/api/chat?q"), st.just("/metrics")),
    endpoint=st.sampled_from(["chat", "tags", "malformed"]),
    status=st.integers(100, 599),
    outcome=st.sampled_from(["ok", "rejected", "upstream_error"]),
    duration_s=SECONDS,
    client=st.sampled_from(["", "10.1.2.3", "2001:db8::1", "?"]),
    user_agent=TEXTS,
    key=TEXTS,
    model=TEXTS,
    backend=TEXTS,
    attempts=AMOUNTS,
    why=TEXTS,
    queue_s=SECONDS,
    first_byte_s=st.none() | SECONDS,
    bytes_in=AMOUNTS,
    bytes_out=AMOUNTS,
    usage=st.builds(Usage, tokens_in=st.none() | AMOUNTS, tokens_out=st.none() | AMOUNTS),
    phase=TEXTS,
    error=TEXTS,
    inference=st.booleans(),
    alias=TEXTS,
    num_ctx=st.none() | AMOUNTS,
    num_ctx_asked=st.none() | AMOUNTS,
    planned=st.none() | st.just(DECISION),
)


@UNTIMED
@given(
    CALLS,
    st.floats(0, 4e9),
    st.sampled_from(["full", "truncated", "none"]),
    st.sampled_from(["debug", "info", "warning"]),
    st.booleans(),
)
def test_the_quick_way_to_a_request_writes_the_same(
    call: CallEnded, at: float, how: ClientAddress, level: Level, access: bool
) -> None:
    """To the byte what the chain of structlog makes of its fields, or nothing where that does."""
    told = []
    for quick in (True, False):
        stream = io.StringIO()
        log = configure(level, "json", stream=stream, is_tty=False, env={}, wall=lambda: at)
        if not quick:
            log.stamp = None
        LogWriter(log, access=access, slow_s=60.0, client_address=how)(call)
        told.append(stream.getvalue())
    assert told[0] == told[1]


@pytest.mark.parametrize(
    "at", [0.0, 0.9999996, 1.0, 1.9995, 1763755212.123456, 1763755212.9999999, 253402300799.0]
)
def test_the_quick_way_to_a_time_is_the_same(at: float) -> None:
    """Also where a second is rounded up, and from one second to the next."""
    stamp = Stamp(float)
    for each in (5.5, at, at, 5.6):
        shown = datetime.fromtimestamp(each, UTC).isoformat(timespec="milliseconds")
        assert stamp("info", each) == f'{{"timestamp":"{shown[:-6]}Z","level":"info"'


def test_a_rewritten_context_is_told_beside_the_one_asked_for() -> None:
    """Where a client's call was changed the log says so; who asked for none, asked for none."""
    (line,) = lines(replace(CALL, num_ctx=8192, num_ctx_asked=3000))
    assert (line["num_ctx"], line["num_ctx_asked"]) == (8192, 3000)
    assert "num_ctx_asked" not in lines(replace(CALL, num_ctx=8192))[0]
    assert "num_ctx" not in lines(CALL)[0]


def test_what_was_foreseen_is_told_beside_what_came() -> None:
    """Where it went and why, and what the runner-up was; nothing where nobody foresees."""
    (line,) = lines(replace(CALL, planned=DECISION))
    assert {name: value for name, value in line.items() if name.startswith("route.")} == {
        "route.reason": "failover",
        "route.kind": "go",
        "route.backend": "gpu0",
        "route.runner_up": "gpu1",
        "route.cost_s": 0.872,
        "route.wait_s": 0.0,
        "route.predicted_ttft_s": 0.432,
        "route.cached_tokens": 100,
    }
    assert [name for name in lines(CALL)[0] if name.startswith("route.")] == ["route.reason"]


def test_a_decision_can_be_made_again_from_its_line() -> None:
    """The line is JSON proper, with all that the prices were made from."""
    (line,) = lines(told(DECISION))
    assert (line["request_id"], line["route.kind"], line["knobs"]) == ("r1", "go", DECISION.knobs)
    best, other = line["found"]
    assert (best["backend"], other["backend"]) == ("gpu0", "gpu1")
    assert best["terms"]["total"] == pytest.approx(0.872)
    assert best["inputs"]["prompt_rate"] == 1000.0
    assert best["inputs"]["load_s"] == "inf"


def test_a_load_tells_its_price() -> None:
    """What goes for it, how long it should take, and what that will cost others."""
    (line,) = lines(LoadStarted(1.0, "gpu0", "m", "call", ("n", "o"), 3.5, 1.25))
    told_ = {name: line[name] for name in ("reason", "victims", "expected_ms", "evict_s")}
    assert told_ == {
        "reason": "call",
        "victims": ["n", "o"],
        "expected_ms": 3500.0,
        "evict_s": 1.25,
    }
    assert "evict_s" not in lines(LoadStarted(1.0, "gpu0", "m", "asked for"))[0]


def test_a_load_once_more_says_why() -> None:
    """Whoever looks for what pushes models out finds it here."""
    (line,) = lines(LoadEnded(1.0, "gpu0", "m", True, 12.0, "", "num_ctx"))
    assert line["reloads"] == "num_ctx"
    assert "reloads" not in lines(LoadEnded(1.0, "gpu0", "m", True, 12.0, ""))[0]


def test_an_alias_is_told_beside_the_model() -> None:
    """The model is what served; an operator looks for what the client asked."""
    (line,) = lines(replace(CALL, alias="fast"))
    assert (line["gen_ai.request.model"], line["model.alias"]) == ("llama3.2", "fast")
    assert "model.alias" not in lines(CALL)[0]


@pytest.mark.parametrize(("event", "level", "name"), TOLD)
def test_level_and_name(event: Event, level: str, name: str) -> None:
    """Each event has its level and its name."""
    (line,) = lines(event)
    assert (line["level"], line["event"]) == (level, name)


def test_no_event_is_forgotten() -> None:
    """Every event there is has a line of its own."""
    known = vars(events).values()
    ours = {kind for kind in known if isinstance(kind, type) and issubclass(kind, Event)}
    assert {type(event) for event, _, _ in TOLD} == ours - {Event}


def test_an_unknown_event_is_told_by_its_class() -> None:
    """A subscriber never stumbles over news it does not know."""

    class News(Event):
        pass

    (line,) = lines(News(1.0))
    assert line["event"] == "News"


@pytest.mark.parametrize(
    ("change", "level"),
    [
        ({"endpoint": "tags", "path": "/api/tags"}, "debug"),
        ({"endpoint": "root", "path": "/"}, "debug"),
        ({"endpoint": "metrics", "path": "/metrics", "method": "GET"}, "debug"),
        ({"endpoint": "admin", "path": "/_balancer/status", "method": "GET"}, "debug"),
        ({"endpoint": "admin", "path": "/_balancer/reload", "method": "POST"}, "info"),
        ({"endpoint": "tags", "path": "/api/tags", "status": 403}, "info"),
        ({"endpoint": "tags", "path": "/api/tags", "status": 503}, "warning"),
        ({"endpoint": "tags", "path": "/api/tags", "duration_s": 61.0}, "info"),
        ({"status": 499, "outcome": "client_abort"}, "info"),
        ({"status": 404, "outcome": "rejected"}, "info"),
        ({"status": 200, "outcome": "upstream_error"}, "warning"),
        ({"status": 503, "outcome": "shed"}, "warning"),
    ],
)
def test_level_of_a_call(change: dict[str, Any], level: str) -> None:
    """Reads that went well are quiet, changes by an admin are not, failures of ours are loud."""
    (line,) = lines(replace(CALL, **change))
    assert line["level"] == level


def test_slow_calls_are_marked() -> None:
    """Only what took longer than the limit is called slow."""
    fast, slow = lines(replace(CALL, duration_s=5.0), replace(CALL, duration_s=5.1), slow_s=5.0)
    assert "slow" not in fast
    assert slow["slow"] is True


def test_without_access_log_only_failures_are_told() -> None:
    """`access: false` keeps warnings and everything that is no call."""
    told = lines(CALL, replace(CALL, status=503), MemberLeft(1.0, "gpu0"), access=False)
    assert [line["event"] for line in told] == ["request", "backend_removed"]
    assert told[0]["level"] == "warning"


def test_what_is_not_known_is_not_told() -> None:
    """Empty fields are left out; zeros are facts and stay."""
    (line,) = lines(CallEnded(1.0, "r1", "GET", "/nope", "none", 404, "rejected", 0.0))
    assert "backend.name" not in line
    assert "queue_ms" not in line
    assert line["bytes_out"] == 0


def test_the_level_filters() -> None:
    """Below the configured level nothing is written."""
    told = lines(*(event for event, _, _ in TOLD), level="warning")
    assert {line["level"] for line in told} == {"warning", "error"}


@pytest.mark.parametrize(
    ("address", "how", "shown"),
    [
        ("192.168.7.42", "full", "192.168.7.42"),
        ("192.168.7.42", "truncated", "192.168.7.0"),
        ("2001:db8:1:2:3::4", "truncated", "2001:db8:1::"),
        ("192.168.7.42", "none", ""),
        ("not an address", "truncated", ""),
        ("", "truncated", ""),
    ],
)
def test_client_address(address: str, how: ClientAddress, shown: str) -> None:
    """The operator decides how much of a client's address is kept."""
    assert shown_address(address, how) == shown


def test_client_address_none_in_the_line() -> None:
    """With `none` the field is not there at all."""
    (line,) = lines(CALL, client_address="none")
    assert "client.address" not in line


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/api/chat?ts=1&key=sk-1", "/api/chat"),
        ("/k/sk-1/api/chat", "/k/***/api/chat"),
        ("/k/sk-1", "/k/***"),
        ("/k/sk-1/", "/k/***/"),
        ("/K/sk-1/v1", "/k/***/v1"),
        ("//k//sk-1/v1", "//k/***/v1"),
        ("/%6b/sk-1/v1", "/k/***/v1"),
        ("/k%2Fsk-1%2Fv1", "/k/***"),
        ("/v1/k/sk-1/models", "/v1/k/***/models"),
        ("http://gpu/k/sk-1/v1", "http://gpu/k/***/v1"),
        ("/kitchen", "/kitchen"),
    ],
)
def test_paths_are_redacted(path: str, shown: str) -> None:
    """Queries and keys in paths are not written."""
    assert shown_path(path) == shown


HOSTILE = st.text(max_size=600) | st.text(
    alphabet='\n\r\x00\x1b\x7f\x85\u2028\u202e\ud800\\" =<>{}[],:', max_size=400
)


@UNTIMED
@given(HOSTILE)
def test_escaped_text_is_one_short_printable_line(text: str) -> None:
    """Whatever comes in, what goes out prints, and on one line."""
    shown = escape(text)
    assert shown.isprintable()
    assert len(shown) <= 256
    assert shown == text or not text.isprintable() or len(text) > 256


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x" * 256, "x" * 256),
        ("x" * 257, "x" * 255 + "…"),
        ("\n" * 200, "\\n" * 127 + "\\…"),
        ("a\x1b[31mb\u202ec", "a\\x1b[31mb\\u202ec"),
    ],
)
def test_fields_are_cut(text: str, shown: str) -> None:
    """Long fields end in an ellipsis, those of a list too."""
    assert escape(text) == shown
    (line,) = lines(ConfigRejected(1.0, (text,)))
    assert line["problems"] == [shown]


@UNTIMED
@given(HOSTILE, st.sampled_from(["json", "logfmt", "console"]))
def test_no_line_can_be_forged(text: str, form: Format) -> None:
    """Nothing a client sends starts a line of its own or reaches the terminal's control codes."""
    log, stream = make(form, color=False)
    LogWriter(log)(replace(CALL, model=text, user_agent=text, path=text, error=text, key=text))
    LogWriter(log)(Mishap(1.0, text, text))
    LogWriter(log)(ConfigRejected(1.0, (text, text)))
    told = stream.getvalue()
    assert told.endswith("\n")
    assert len(told.splitlines()) == 3
    assert all(line.isprintable() for line in told.splitlines())


@UNTIMED
@given(HOSTILE)
def test_json_fields_stay_in_their_place(text: str) -> None:
    """A hostile model name is a value of its field and nothing else."""
    (line,) = lines(replace(CALL, model=f"m{text}"))
    assert line["gen_ai.request.model"] == escape(f"m{text}")
    assert (line["level"], line["outcome"]) == ("info", "ok")


def test_a_quoted_value_stays_one_logfmt_pair() -> None:
    """Logfmt quotes what would else read as further pairs."""
    log, stream = make("logfmt")
    LogWriter(log)(replace(CALL, model='x" level=error'))
    assert r'gen_ai.request.model="x\" level=error"' in stream.getvalue()


@pytest.mark.parametrize(
    ("is_tty", "env", "coloured"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": "1"}, False),
        (False, {}, False),
        (False, {"FORCE_COLOR": "1"}, True),
        (True, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
    ],
)
def test_colours(*, is_tty: bool, env: dict[str, str], coloured: bool) -> None:
    """Colours on a terminal, and as the two customary variables say."""
    log, stream = make("console", is_tty=is_tty, env=env)
    LogWriter(log)(CALL)
    assert ("\x1b[" in stream.getvalue()) is coloured


def test_auto_is_json_when_piped_and_console_on_a_terminal() -> None:
    """The form follows the reader."""
    piped, stream = make("auto")
    LogWriter(piped)(CALL)
    assert json.loads(stream.getvalue())
    seen, screen = make("auto", is_tty=True, color=False)
    LogWriter(seen)(CALL)
    assert screen.getvalue().startswith("00:00:00 [info     ] 200 POST /api/chat")


def test_a_request_is_a_short_line_on_a_terminal() -> None:
    """Where it went and how long it took; who watches sees what is unusual, and nothing else."""
    log, screen = make("console", color=False)
    LogWriter(log)(replace(CALL, attempts=1, key="anonymous"))
    LogWriter(log)(replace(CALL, attempts=2, outcome="upstream_error", error="gone", status=503))
    fine, failed = screen.getvalue().splitlines()
    assert "backend=" in fine
    assert "took=" in fine
    assert not any(word in fine for word in ("attempts", "outcome", "request_id", "user_agent"))
    assert all(word in failed for word in ("attempts=2", "error=gone", "request_id="))


def test_a_request_is_written_when_lines_go_out_with_the_time_it_ended() -> None:
    """In the order of what happened, with warnings and what other events wrote between them."""
    stream, now = io.StringIO(), [0.0]
    later: list[Callable[[], None]] = []
    log = configure(
        *("info", "json"),
        stream=stream,
        is_tty=False,
        env={},
        wall=lambda: now[0],
        later=later.append,
    )
    write = LogWriter(log)
    paths = [f"/{number}" for number in range(6)]
    for path in paths[:3]:
        now[0] += 1.0
        write(replace(CALL, path=path))
    assert len(stream.getvalue().splitlines()) == 1
    write(MemberLeft(1.0, "gpu0"))
    now[0] += 1.0
    write(replace(CALL, path=paths[3], status=500))
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line.get("url.path") for line in told] == [*paths[:3], None, paths[3]]
    assert [line["timestamp"][17:19] for line in told] == ["01", "02", "03", "03", "04"]
    for path in paths[4:]:
        write(replace(CALL, path=path))
    log.lines.close()
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["url.path"] for line in told if "url.path" in line] == paths


@pytest.mark.parametrize("level", ["debug", "info"])
def test_what_is_not_heard_is_not_written(level: Level) -> None:
    """So that nobody need make it."""
    log, stream = make("json", level)
    writer = LogWriter(log)
    for event, _, _ in TOLD:
        if type(event) in writer.unheard:
            writer(event)
    assert stream.getvalue() == ""
    assert bool(writer.unheard) == (level == "info")


def written_to_a_file(tmp_path: Path, variable: str, *, is_tty: bool = False) -> list[str]:
    with (tmp_path / "journal").open("w+") as stream:
        stat = os.fstat(stream.fileno())
        env = {"JOURNAL_STREAM": variable or f"{stat.st_dev}:{stat.st_ino}"}
        log = configure("info", "json", stream=stream, is_tty=is_tty, env=env, wall=lambda: 0.0)
        for event in (CALL, replace(CALL, status=500), Mishap(1.0, "x", "y")):
            LogWriter(log)(event)
        log.stamp = None
        LogWriter(log)(CALL)
        stream.seek(0)
        first, *others, slow_way = stream.readlines()
        assert first == slow_way
        return [line[:6] for line in (first, *others)]


def test_the_journal_gets_priorities(tmp_path: Path) -> None:
    """Lines to systemd's journal begin with their priority; the time is the journal's own."""
    assert written_to_a_file(tmp_path, "") == ['<6>{"l', '<4>{"l', '<3>{"l']


def test_a_pipeline_under_systemd_gets_none(tmp_path: Path) -> None:
    """The variable is inherited by whoever pipes our output elsewhere; that is not the journal."""
    timed = ['{"time'] * 3
    assert written_to_a_file(tmp_path, "1:2") == timed
    assert written_to_a_file(tmp_path, "", is_tty=True) == timed


# -- records of libraries -------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


Bridged = tuple[logging.Logger, Callable[[], list[dict[str, Any]]], Clock]


@pytest.fixture
def bridged() -> Iterator[Bridged]:
    """A logger named as aiohttp's, its records bridged; what was told; the clock."""
    log, stream = make()
    clock = Clock()
    handler = Bridge(log, clock)
    logger = logging.getLogger("aiohttp.server")
    logger.addHandler(handler)
    logger.propagate = False
    yield logger, lambda: [json.loads(line) for line in stream.getvalue().splitlines()], clock
    logger.removeHandler(handler)
    logger.propagate = True


def test_malformed_requests_are_told_once_a_second(bridged: Bridged) -> None:
    """A scanner gets one line per second, with how many there were, and no traceback."""
    logger, told, clock = bridged
    for _ in range(50):
        logger.error("Error handling request from %s", "10.0.0.9", exc_info=BadHttpMessage("x\ny"))
    clock.now += 1.0
    logger.error("Error handling request from %s", "10.0.0.9", exc_info=BadHttpMessage("x"))
    assert [(line["event"], line["count"]) for line in told()] == [
        ("malformed_request", 1),
        ("malformed_request", 50),
    ]
    assert told()[0]["client.address"] == "10.0.0.9"
    assert "x\\ny" not in str(told())


def test_other_records_are_one_line_each(bridged: Bridged) -> None:
    """A library's warning passes, with where its exception came from; information does not."""
    logger, told, _ = bridged
    logger.setLevel(logging.INFO)
    logger.info("nothing")
    logger.warning("slow\nthing %d", 3)
    try:
        {}["who"]  # type: ignore[index]
    except KeyError:
        logger.exception("Unhandled exception")
    logger.setLevel(logging.NOTSET)
    first, second = told()
    assert first["message"] == "slow\\nthing 3"
    assert (first["level"], first["logger"]) == ("warning", "aiohttp.server")
    assert (second["level"], second["error.type"]) == ("error", "KeyError")
    assert "test_log:" in second["error.stack"]


def test_only_the_servers_parser_is_throttled() -> None:
    """A bad answer of a backend is no malformed request."""
    log, stream = make()
    error = BadHttpMessage("x")
    record = logging.LogRecord(
        "aiohttp.client", logging.ERROR, "", 1, "bad", (), (type(error), error, None)
    )
    Bridge(log, Clock()).handle(record)
    assert json.loads(stream.getvalue())["event"] == "library"


def test_a_record_that_cannot_be_formatted_is_told_raw() -> None:
    """A bug in a library's log call is not ours to die of."""
    log, stream = make()
    record = logging.LogRecord("lib", logging.WARNING, "", 1, "%d things", ("many",), None)
    Bridge(log, Clock()).handle(record)
    assert json.loads(stream.getvalue())["message"] == "%d things"


async def test_aiohttp_speaks_as_the_bridge_expects(bridged: Bridged) -> None:
    """Real garbage on a real server becomes the one line, so the filter still fits aiohttp."""
    logger, told, _ = bridged
    assert logger.name == "aiohttp.server"
    runner = web.AppRunner(web.Application(), access_log=None)
    await runner.setup()
    port = unused_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: zwei\r\n\r\n")
    await reader.read()
    writer.close()
    await runner.cleanup()
    assert [line["event"] for line in told()] == ["malformed_request"]


def test_reads_come_from_the_route_table() -> None:
    """The quiet routes are those that we answer ourselves or from our catalogue."""
    assert {"version", "tags", "ps", "show", "root", "models", "model"} == subject.READS
