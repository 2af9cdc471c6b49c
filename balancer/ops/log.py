"""
Events -> log lines; the one place that knows structlog.

One line per request, when it has been answered, and one per change of state. Nothing a client
or a backend sends can start a line of its own: whatever does not print is escaped before it is
written. Prompts and keys are not in events, and so not in lines.
"""

from __future__ import annotations

import json
import logging
import math
import os
from datetime import UTC, datetime
from functools import lru_cache
from ipaddress import ip_address, ip_network
from json.encoder import encode_basestring_ascii
from logging import DEBUG, ERROR, INFO, WARNING
from math import modf
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TextIO

import structlog
from aiohttp.http_exceptions import HttpProcessingError

from balancer.core import names
from balancer.core.domain import BreakerState, Kind, PlacementKey, Switch
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
    Planned,
    Planning,
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
    Weighed,
)
from balancer.core.routes import TABLE, without_key
from balancer.ops.lines import Lines

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from types import TracebackType

    from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

    from balancer.ops.lines import Later

    class Log(FilteringBoundLogger, Protocol):
        """The logger that everything is written to."""

        lines: Lines
        stamp: Stamp | None  # None: lines are no JSON, so that `quick_request` is not for them

    Level = Literal["debug", "info", "warning", "error"]
    Format = Literal["auto", "console", "json", "logfmt"]
    ClientAddress = Literal["full", "truncated", "none"]
    Line = tuple[int, str, dict[str, Any]]

FIELD_CHARS: Final = 256
LONGEST: Final = FIELD_CHARS + 1  # of a text, by which all that is shown of it is known
READS: Final = frozenset(r.operation for r in TABLE if r.kind in (Kind.LOCAL, Kind.MERGE))

# Never told above DEBUG.
DETAILS: Final = frozenset(
    {
        *(AttemptEnded, AttemptFailed),
        *(CallQueued, LeaseGranted, RetryGranted),
        *(CatalogChanged, CheckEnded, TrialEnded),
        *(Planned, SlotsBelieved),
    }
)
_NAMES: Final = {DEBUG: "debug", INFO: "info", WARNING: "warning", ERROR: "error"}
_PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
SWITCHED: Final = {
    Switch.SERVING: "backend_resumed",
    Switch.DRAINING: "backend_draining",
    Switch.DISABLED: "backend_disabled",
}


# -- text -----------------------------------------------------------------------------------


def escape(text: str) -> str:
    """One printable line of at most `FIELD_CHARS`: what does not print becomes an escape."""
    if len(text) <= FIELD_CHARS and text.isprintable():
        return text
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:FIELD_CHARS]
    )
    if len(text) <= FIELD_CHARS and len(shown) <= FIELD_CHARS:
        return shown
    return shown[: FIELD_CHARS - 1] + "…"


def shown_address(address: str, how: ClientAddress) -> str:
    """A client's address as the operator wants it told: whole, its network only, or not at all."""
    if how == "full" or not address:
        return address
    if how == "none":
        return ""
    try:
        ip = ip_address(address)
    except ValueError:
        return ""
    prefix = 24 if ip.version == 4 else 48
    return str(ip_network(f"{address}/{prefix}", strict=False).network_address)


def shown_path(path: str) -> str:
    """A path without what may be secret in it: the query, and a key sent as ``/k/KEY``."""
    return without_key(path.partition("?")[0])


# -- the chain ------------------------------------------------------------------------------


def configure(
    level: Level = "info",
    format: Format = "auto",  # noqa: A002  the key's name in the configuration
    *,
    stream: TextIO,
    is_tty: bool,
    env: Mapping[str, str],
    wall: Callable[[], float],
    color: bool | None = None,
    later: Later | None = None,
) -> Log:
    """
    Make the logger that everything is written to.

    Args:
        level: The lowest that is written.
        format: ``auto`` is console on a terminal and JSON elsewhere.
        stream: Where lines go. If it is systemd's journal, each begins with its priority, and
            the time is left to the journal.
        is_tty: Whether *stream* is a terminal.
        env: For NO_COLOR, FORCE_COLOR and JOURNAL_STREAM.
        wall: Unix time.
        color: None: on a terminal, unless the environment says otherwise.
        later: As `Lines` has it; people on a terminal get each line at once.
    """
    if color is None:
        color = not env.get("NO_COLOR") and (is_tty or bool(env.get("FORCE_COLOR")))
    if format == "auto":
        format = "console" if is_tty else "json"  # noqa: A001  see above
    journal = not is_tty and _is_journal(stream, env)
    processors: list[Processor] = [
        _Head(None if journal else wall),
        *([_brief] if format == "console" else ()),
        _renderer(format, color=color),
        *([_prioritise] if journal else ()),
    ]
    lines = Lines(stream, None if format == "console" else later)
    log: Log = structlog.wrap_logger(
        lines,
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        cache_logger_on_first_use=True,
    ).bind()
    log.lines = lines
    log.stamp = Stamp(None if journal else wall) if format == "json" else None
    return log


class _Head:
    """First processor: time, level and event lead the line; every value is made safe."""

    def __init__(self, wall: Callable[[], float] | None) -> None:
        self._wall = wall

    def __call__(self, _: WrappedLogger, level: str, fields: EventDict) -> EventDict:
        line = {"level": level, "event": fields.pop("event")}
        if self._wall is not None:
            at = datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="milliseconds")
            line = {"timestamp": f"{at[:-6]}Z"} | line
        for name, value in fields.items():
            line[name] = _safe(value)
        return line


def _safe(value: Any) -> Any:
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, tuple):
        return [escape(str(one)) for one in value]
    return value


# What people see of a request on a terminal, and under which name; the rest is in the other forms.
_BRIEF: Final = {
    "gen_ai.request.model": "model",
    "backend.name": "backend",
    "attempt.count": "attempts",
    "key.name": "key",
    "outcome": "outcome",
    "error.message": "error",
    "request_id": "request_id",
}
_USUAL: Final = {"attempts": (1,), "key": ("anonymous",), "outcome": ("ok",)}


def _brief(_: WrappedLogger, __: str, fields: EventDict) -> EventDict:
    """A terminal is narrow, and watched now: the time of day, and of a request what is unusual."""
    if "timestamp" in fields:
        fields["timestamp"] = fields["timestamp"][11:19]
    if "http.request.method" not in fields:
        return fields
    told = {name: fields[name] for name in ("timestamp", "level") if name in fields}
    told["event"] = " ".join(
        str(fields.get(name, ""))
        for name in ("http.response.status_code", "http.request.method", "url.path")
    )
    is_fine = fields.get("outcome") == "ok"
    for name, short in _BRIEF.items():
        value = fields.get(name)
        if value not in (None, "", *_USUAL.get(short, ())) and not (
            is_fine and short == "request_id"
        ):
            told[short] = value
    told["took"] = f"{fields.get('duration_ms', 0.0) / 1000:.2f}s"
    return told


_encode = json.JSONEncoder(separators=(",", ":"), default=repr).encode  # made once: it is costly


def _renderer(format: Format, *, color: bool) -> Processor:  # noqa: A002  as in `configure`
    match format:
        case "console":
            return structlog.dev.ConsoleRenderer(colors=color, sort_keys=False)
        case "logfmt":
            return structlog.processors.LogfmtRenderer(bool_as_flag=False)
    return structlog.processors.JSONRenderer(lambda fields, **_: _encode(fields))


def _is_journal(stream: TextIO, env: Mapping[str, str]) -> bool:
    """Whether *stream* is the journal itself; the variable alone is inherited by pipelines too."""
    try:
        stat = os.fstat(stream.fileno())
    except (OSError, ValueError):  # not a file at all
        return False
    return env.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


def _prioritise(_: WrappedLogger, level: str, line: Any) -> str:
    return f"<{_PRIORITIES[level]}>{line}"


# -- requests -------------------------------------------------------------------------------

# Most lines are of requests. What follows writes one as the chain above would, to the byte, in a
# quarter of its time.


class Stamp:
    """How a line of JSON begins: priority, time, level. *wall* None: for the journal."""

    def __init__(self, wall: Callable[[], float] | None) -> None:
        self.now = wall or (lambda: math.nan)
        self._second = math.nan
        self._until_second = ""

    def __call__(self, level: str, at: float) -> str:
        """Of what happened *at* that instant of `now`; ends with the level and its quote."""
        if at != at:  # noqa: PLR0124 - NaN, without a call: it is the journal's
            return f'<{_PRIORITIES[level]}>{{"level":"{level}"'
        part, second = modf(at)
        micros = round(part * 1e6)
        if micros >= 1_000_000 or part < 0:
            second, micros = second + micros // 1_000_000, micros % 1_000_000
        if second != self._second:
            self._second = second
            self._until_second = datetime.fromtimestamp(second, UTC).isoformat()[:19]
        stamp = f"{self._until_second}.{micros // 1000:03}Z"
        return f'{{"timestamp":"{stamp}","level":"{level}"'


@lru_cache(maxsize=1024)
def _text(text: str) -> str:
    return encode_basestring_ascii(escape(text))


@lru_cache(maxsize=1024)
def _path(path: str) -> str:
    return encode_basestring_ascii(escape(shown_path(path)))


def _quoted(name: str, text: str) -> str:
    # Longer ones differ in nothing that is shown, and must not be kept.
    return f',"{name}":{_text(text[:LONGEST])}' if text else ""


def quick_request(start: str, e: CallEnded, client: str, *, slow: bool) -> str:
    """
    The line of a request; *start* is the `Stamp`, *client* the address as it is to be told.

    Its fields and their order are those of `LogWriter.line`.
    """
    usage = e.usage
    method, path = _text(e.method[:LONGEST]), e.path
    shown = (
        _path(path) if len(path) < LONGEST else encode_basestring_ascii(escape(shown_path(path)))
    )
    return "".join(
        (
            start,
            ',"event":"request"',
            f',"request_id":{encode_basestring_ascii(escape(e.request_id))}' * bool(e.request_id),
            f',"http.request.method":{method}' * bool(e.method),
            f',"url.path":{shown}' if shown != '""' else "",
            f',"http.response.status_code":{e.status}',
            _quoted("client.address", client),
            _quoted("user_agent.original", e.user_agent),
            _quoted("key.name", e.key),
            _quoted("gen_ai.request.model", e.model),
            _quoted("model.alias", e.alias),
            _quoted("backend.name", e.backend),
            f',"attempt.count":{e.attempts}' if e.attempts else "",
            _quoted("route.reason", e.why),
            "" if e.planned is None else _quick_route(e.planned),
            "" if e.num_ctx is None else f',"num_ctx":{e.num_ctx}',
            "" if e.num_ctx_asked is None else f',"num_ctx_asked":{e.num_ctx_asked}',
            f',"queue_ms":{_ms(e.queue_s)}' if e.inference else "",
            "" if e.first_byte_s is None else f',"ttft_ms":{_ms(e.first_byte_s)}',
            f',"duration_ms":{_ms(e.duration_s)},"bytes_in":{e.bytes_in},"bytes_out":{e.bytes_out}',
            "" if usage.tokens_in is None else f',"gen_ai.usage.input_tokens":{usage.tokens_in}',
            "" if usage.tokens_out is None else f',"gen_ai.usage.output_tokens":{usage.tokens_out}',
            _quoted("outcome", e.outcome),
            _quoted("phase", e.phase),
            ',"slow":true' if slow else "",
            _quoted("error.message", e.error),
            "}",
        )
    )


def _s(seconds: float) -> float:
    return round(seconds * 1000) / 1000  # several times as quick as three digits asked for


def _quick_route(planned: Planning) -> str:
    """As `_route`, of JSON."""
    kind, backend, runner_up, cost_s, wait_s, first_s, cached = planned.foreseen()
    other = f',"route.runner_up":{_text(runner_up)}' if runner_up else ""
    return (
        f',"route.kind":"{kind}","route.backend":{_text(backend)}{other},"route.cost_s":{_s(cost_s)}'
        f',"route.wait_s":{_s(wait_s)},"route.predicted_ttft_s":{_s(first_s)}'
        f',"route.cached_tokens":{cached}'
    )


def _route(planned: Planning | None) -> dict[str, Any]:
    """What was foreseen of a call."""
    if planned is None:
        return {}
    foreseen = planned.foreseen()
    return {
        "route.kind": foreseen.kind,
        "route.backend": foreseen.backend,
        "route.runner_up": foreseen.runner_up,
        "route.cost_s": _s(foreseen.cost_s),
        "route.wait_s": _s(foreseen.wait_s),
        "route.predicted_ttft_s": _s(foreseen.first_token_s),
        "route.cached_tokens": foreseen.cached_tokens,
    }


# -- events ---------------------------------------------------------------------------------


class LogWriter:
    """
    A subscriber that writes.

    Args:
        access: Whether requests that went well are written.
        slow_s: A request that took longer is marked.
        client_address: How much of a client's address is told.
    """

    def __init__(
        self,
        log: Log,
        *,
        access: bool = True,
        slow_s: float = 60.0,
        client_address: ClientAddress = "full",
    ) -> None:
        self._log = log
        self._access = access
        self._slow_s = slow_s
        self._client_address = client_address
        self._stamp = log.stamp
        self._lowest = min(level for level in _NAMES if log.is_enabled_for(level))
        # Of requests.
        self._told_from = self._lowest if access else max(self._lowest, WARNING)

    @property
    def unheard(self) -> Collection[type[Event]]:
        """The events that are never written."""
        return DETAILS if self._lowest > DEBUG else ()

    def __call__(self, event: Event) -> None:
        """Write one event, if it is worth its level."""
        if isinstance(event, CallEnded) and self._stamp is not None:
            self._tell_request(event, self._stamp)
            return
        if type(event) in self.unheard:
            return
        level, name, fields = self.line(event)
        if level >= WARNING or self._access or not isinstance(event, CallEnded):
            told = {key: value for key, value in fields.items() if value not in (None, "", ())}
            self._log.log(level, name, **told)

    def _tell_request(self, e: CallEnded, stamp: Stamp) -> None:
        slow = e.duration_s > self._slow_s
        level = _request_level(e, slow=slow)
        if level >= self._told_from:
            at_once = level >= WARNING
            self._log.lines.hold((self._request, _NAMES[level], e, stamp.now()), at_once=at_once)

    def _request(self, level: str, e: CallEnded, at: float) -> str:
        """The line of what is held."""
        assert self._stamp is not None  # noqa: S101 - else nothing is held
        client = shown_address(e.client, self._client_address)
        return quick_request(self._stamp(level, at), e, client, slow=e.duration_s > self._slow_s)

    def line(self, event: Event) -> Line:
        """Level, name and fields of an event."""
        match event:
            case CallEnded():
                return self._call_ended(event)
            case AttemptEnded():
                return DEBUG, "attempt_ended", _attempt(event)
            case LeaseGranted(call_id=call, model=model, backend=backend, why=why):
                fields = {"request_id": call, **_place(backend, model), "route.reason": why}
                return DEBUG, "lease_granted", fields | {"queue_ms": _ms(event.waited_s)}
            case CallQueued(call_id=call, model=model, depth=depth):
                return DEBUG, "queued", {"request_id": call, **_place("", model), "depth": depth}
            case CheckEnded(backend=backend, ok=ok, latency_s=latency_s):
                return DEBUG, "check", {**_place(backend), "ok": ok, "duration_ms": _ms(latency_s)}
            case HealthFlipped(backend=backend, up=True, reason=reason):
                return INFO, "backend_up", {**_place(backend), "reason": reason}
            case HealthFlipped(backend=backend, reason=reason):
                return WARNING, "backend_down", {**_place(backend), "reason": reason}
            case BreakerMoved():
                return _breaker_level(event), breaker_name(event), _breaker(event)
            case TrialEnded(backend=backend, model=model, kind=kind, ok=ok, text=text):
                fields = {**_place(backend, model), "kind": kind, "ok": ok, "error.message": text}
                return DEBUG, "trial_ended", fields
            case Suspected(backend=backend, model=model, silent_s=silent_s):
                fields = {**_place(backend, model), "silent_ms": _ms(silent_s)}
                return WARNING, "backend_suspected", fields
            case LoadStarted(backend=backend, model=model, why=why):
                fields = {**_place(backend, model), "reason": why, "victims": event.victims}
                if event.expected_s:
                    fields["expected_ms"] = _ms(event.expected_s)
                if event.victims:
                    fields["evict_s"] = round(event.evict_s, 3)
                return INFO, "load_started", fields
            case Planned():
                return DEBUG, "planned", _planned(event)
            case DrainRequested(backend=backend, victim=victim, wanted=wanted, last_s=last_s):
                fields = {**_place(backend, victim), "wanted": wanted, "last_ms": _ms(last_s)}
                return INFO, "model_drain_requested", fields | {"cost_s": round(event.cost_s, 3)}
            case DrainEnded(backend=backend, victim=victim, wanted=wanted, reason=reason):
                fields = {**_place(backend, victim), "wanted": wanted, "reason": reason}
                return INFO, "model_drain_ended", fields | {"duration_ms": _ms(event.drained_s)}
            case SlotsBelieved(backend=backend, model=model, before=before, after=after):
                fields = {**_place(backend, model), "before": before, "after": after}
                return DEBUG, "slots_believed", fields | {"reason": event.reason}
            case Straggling(backend=backend, factor=factor, reason=reason):
                fields = {**_place(backend), "factor": round(factor, 3), "reason": reason}
                return WARNING if reason == "slow" else INFO, "backend_speed", fields
            case SampleDiscarded(backend=backend, kind=kind, value=value):
                fields = {**_place(backend), "kind": kind, "value": _plain(value)}
                return INFO, "sample_discarded", fields
            case LoadEnded(backend=backend, model=model, ok=ok, load_s=load_s, text=text):
                fields = {**_place(backend, model), "duration_ms": _ms(load_s)}
                fields["reloads"] = event.reloads
                if ok:
                    return INFO, "load_ended", fields
                return WARNING, "load_failed", fields | {"error.message": text}
            case CatalogChanged(backend=backend, models=models, loaded=loaded):
                fields = {**_place(backend), "models": models, "loaded": loaded}
                return DEBUG, "catalog_changed", fields
            case MemberJoined(backend=backend, url=url):
                return INFO, "backend_added", {**_place(backend), "url": url}
            case HostPassedOver(note=note):
                return WARNING, "host_passed_over", {"message": note}
            case MemberLeft(backend=backend):
                return INFO, "backend_removed", _place(backend)
            case SwitchMoved(backend=backend, switch=switch, by=by):
                return INFO, SWITCHED[switch], {**_place(backend), "key.name": by}
            case BackendDrained(backend=backend):
                return INFO, "backend_drained", _place(backend)
            case BreakersReset(backend=backend, by=by):
                return INFO, "breaker_reset", {**_place(backend), "key.name": by}
            case OrderEnded():
                return _order(event)
            case LearnedLost(path=path, error=error):
                return WARNING, "learned_lost", {"path": path, "error.message": error}
            case SwitchesLost(path=path, error=error):
                return WARNING, "switches_lost", {"path": path, "error.message": error}
            case ConfigApplied(changed=changed, needs_restart=restart):
                fields = {"changed": changed, "needs_restart": restart}
                return WARNING if restart else INFO, "config_reloaded", fields
            case ConfigRejected(problems=problems):
                return ERROR, "config_rejected", {"problems": problems}
            case Serving(addresses=addresses, backends=backends, seed=seed):
                fields = {"addresses": addresses, "backends": backends, "seed": seed}
                return INFO, "serving", fields
            case Stopping(reason=reason, running=running, queued=queued):
                fields = {"reason": reason, "running": running, "queued": queued}
                return INFO, "shutdown_drain", fields
            case Stopped(cut=cut):
                return WARNING if cut else INFO, "stopped", {"cut": cut}
            case Mishap(where=where, error=error):
                return ERROR, "mishap", {"where": where, "error.message": error}
        return DEBUG, type(event).__name__, {}

    def _call_ended(self, e: CallEnded) -> Line:
        slow = e.duration_s > self._slow_s
        fields = {
            "request_id": e.request_id,
            "http.request.method": e.method,
            "url.path": shown_path(e.path),
            "http.response.status_code": e.status,
            "client.address": shown_address(e.client, self._client_address),
            "user_agent.original": e.user_agent,
            "key.name": e.key,
            "gen_ai.request.model": e.model,
            "model.alias": e.alias,
            "backend.name": e.backend,
            "attempt.count": e.attempts or None,
            "route.reason": e.why,
            **_route(e.planned),
            "num_ctx": e.num_ctx,
            "num_ctx_asked": e.num_ctx_asked,
            "queue_ms": _ms(e.queue_s) if e.inference else None,
            "ttft_ms": None if e.first_byte_s is None else _ms(e.first_byte_s),
            "duration_ms": _ms(e.duration_s),
            "bytes_in": e.bytes_in,
            "bytes_out": e.bytes_out,
            "gen_ai.usage.input_tokens": e.usage.tokens_in,
            "gen_ai.usage.output_tokens": e.usage.tokens_out,
            "outcome": e.outcome,
            "phase": e.phase,
            "slow": slow or None,
            "error.message": e.error,
        }
        return _request_level(e, slow=slow), "request", fields


def _request_level(e: CallEnded, *, slow: bool) -> int:
    if e.status >= 500 or e.outcome == "upstream_error":
        return WARNING
    return DEBUG if _is_quiet(e) and not slow else INFO


def _is_quiet(e: CallEnded) -> bool:
    """
    Pages, lists and scrapes that went well: they come every few seconds and tell nothing.

    Nor may a scanner fill the log: of what was no HTTP `Bridge` tells the number.
    """
    if e.endpoint == "malformed":
        return True
    if e.status >= 400:
        return False
    ours = e.path == "/metrics" or e.path.startswith("/_balancer")
    return e.endpoint in READS or (ours and e.method in ("GET", "HEAD"))


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def _order(event: OrderEnded) -> Line:
    """Who changed what is installed, and where."""
    fields = {
        "operation": event.operation,
        **_place("", event.model),
        "key.name": event.by,
        "done": event.done,
        "failed": event.failed,
    }
    if not event.finished:
        return WARNING, "order_broken_off", fields
    return WARNING if event.failed else INFO, "order_ended", fields


def _planned(event: Planned) -> dict[str, Any]:
    """All of a decision, so that it can be made again from the line."""
    return {
        "request_id": event.call_id,
        **_place(event.backend, names.display(event.key.model)),
        "options": tuple(f"{name}={value}" for name, value in event.key.options),
        "pass": event.number,
        "attempt": event.attempt,
        "route.kind": event.kind,
        "need": dict(event.need),
        "found": [_weighed(each) for each in event.options],
        "tag": event.tag,
        "virtual_time": event.virtual,
        "knobs": event.knobs,
    }


def _weighed(each: Weighed) -> dict[str, Any]:
    return {
        "backend": each.backend,
        "promised": each.promised,
        "terms": dict(each.terms),
        "inputs": {
            name: _plain(value) for name, value in each.inputs.items() if value not in (None, ())
        },
    }


def _plain(value: Any) -> Any:
    """What a quote is made of, for JSON, which knows no infinity."""
    match value:
        case PlacementKey():
            return names.display(value.model)
        case float():
            return value if math.isfinite(value) else str(value)
        case list() | tuple():
            return [_plain(each) for each in value]
    return value


def _place(backend: str, model: str | None = None) -> dict[str, Any]:
    return {"backend.name": backend, "gen_ai.request.model": model}


def _attempt(e: AttemptEnded) -> dict[str, Any]:
    outcome = e.outcome
    return {
        "request_id": e.call_id,
        **_place(e.backend, e.model),
        "attempt": e.attempt,
        "verdict": outcome.verdict.value,
        "http.response.status_code": outcome.status,
        "duration_ms": _ms(outcome.ended_at - outcome.sent_at),
        "error.message": outcome.text,
    }


def breaker_name(e: BreakerMoved) -> str:
    """What a move of a breaker is called; open again after a trial is not what opening is."""
    if e.new is not BreakerState.OPEN:
        return f"breaker_{e.new.value}"
    return "breaker_opened" if e.old is BreakerState.CLOSED else "breaker_reopened"


def _breaker_level(e: BreakerMoved) -> int:
    """Opening is news once; each trial that fails afterwards is not."""
    if e.new is BreakerState.OPEN:
        return WARNING if e.old is BreakerState.CLOSED else INFO
    return DEBUG if e.new is BreakerState.HALF_OPEN else INFO


def _breaker(e: BreakerMoved) -> dict[str, Any]:
    retry_ms = _ms(e.retry_in_s) if e.new is BreakerState.OPEN else None
    return {**_place(e.backend, e.model), "reason": e.reason, "retry_in_ms": retry_ms}


# -- other people's records -----------------------------------------------------------------


class Bridge(logging.Handler):
    """
    Takes what libraries say through the standard library's `logging`; one line each.

    Put on the root logger. Only warnings and worse pass.

    A malformed request makes aiohttp write a traceback, so that any scanner could flood the log:
    of those there is at most one line per second, with their number.

    Args:
        clock: Monotonic seconds.
        client_address: How much of a client's address is told.
    """

    def __init__(
        self, log: Log, clock: Callable[[], float], client_address: ClientAddress = "full"
    ) -> None:
        super().__init__(WARNING)
        self._log = log
        self._clock = clock
        self._client_address = client_address
        self._malformed = 0
        self._told_at = float("-inf")

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError) and record.name == "aiohttp.server":
            self._tell_malformed(record, error)
            return
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):  # the caller's format and arguments disagree
            text = str(record.msg)
        fields: dict[str, Any] = {"logger": record.name, "message": text}
        if error is not None:
            fields |= {"error.type": type(error).__name__, "error.message": str(error)}
            fields["error.stack"] = _frames(error.__traceback__)
        self._log.log(max(WARNING, min(record.levelno // 10 * 10, ERROR)), "library", **fields)

    def _tell_malformed(self, record: logging.LogRecord, error: HttpProcessingError) -> None:
        self._malformed += 1
        if self._clock() - self._told_at < 1.0:
            return
        peer = record.args[0] if isinstance(record.args, tuple) and record.args else None
        address = shown_address(peer, self._client_address) if isinstance(peer, str) else ""
        fields = {"count": self._malformed, "error.type": type(error).__name__}
        self._log.info(
            "malformed_request", **fields, **({"client.address": address} if address else {})
        )
        self._malformed = 0
        self._told_at = self._clock()


def _frames(traceback: TracebackType | None) -> str:
    """Where it happened, innermost first; the whole traceback would be many lines."""
    frames = []
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "?")
        frames.append(f"{module}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return " < ".join(reversed(frames[-6:]))
