"""
The verdict table: every way an attempt can end, and everything that follows from it.

Laws:
- Nothing else in the code decides a consequence. `TABLE` says which breaker hears what and what
  may happen before commit; `marks` adds the few conditions that need facts from outside.
- A text that separates one 500 from another is data here, not an ``if`` somewhere.
- The documentation's table is printed from this one (`document`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from balancer.core.domain import OTHER, Mark, Route, Verdict, record

BLAME, CREDIT, NEITHER = Mark.BLAME, Mark.CREDIT, Mark.NEITHER


class Before(Enum):
    """What may happen to the call, as long as nothing was committed."""

    RELAY = "relay the answer"
    ANOTHER = "another backend"
    ONE_OTHER = "one other backend; the same answer there is relayed"
    SAME_FRESH = "once more on the same backend, on a fresh connection"
    NO = "nothing: the call is over"


@dataclass(frozen=True, slots=True)
class Row:
    """
    The consequences of one verdict.

    Args:
        when: For the documentation: what was seen.
        host: The mark for the backend's breaker.
        model: The mark for the breaker of the model on that backend.
        before: What may happen to the call before commit.
        besides: For the documentation: what else follows.
        unless: For the documentation: the condition under which `marks` says otherwise.
    """

    when: str
    host: Mark
    model: Mark
    before: Before
    besides: str = ""
    unless: str = ""


TABLE: Final[Mapping[Verdict, Row]] = {
    Verdict.OK: Row(
        "complete: `done:true`, `[DONE]`, a whole JSON answer; also when the client hangs up "
        "after that",
        CREDIT,
        CREDIT,
        Before.RELAY,
        "time to first byte is learned; saturation relaxes",
    ),
    Verdict.CALLER: Row(
        "400, 413, 415, 422, 501 with a JSON error, and every 4xx not named below",
        NEITHER,
        NEITHER,
        Before.RELAY,
    ),
    Verdict.MISSING: Row(
        "404 with a JSON text that says the model is not found",
        NEITHER,
        NEITHER,
        Before.ANOTHER,
        "the catalogue forgets the model on that backend and is refreshed",
        "model: blame if its list, read again after an earlier 404, still names the model",
    ),
    Verdict.NO_ROUTE: Row(
        "404 with Ollama's plain text: a route that backend does not know",
        NEITHER,
        NEITHER,
        Before.ANOTHER,
        "remembered until its version changes; with no other backend the answer is relayed",
    ),
    Verdict.BUSY: Row(
        "503 or 429 from a local model",
        NEITHER,
        NEITHER,
        Before.ANOTHER,
        "the backend cools off 1, 2, 4, 8 s; a 429's Retry-After counts up to 60 s",
    ),
    Verdict.UNFIT: Row(
        "a text that means the model failed to load or its runner died, as a 500 or an error "
        "record; on the embedding routes also as a 400",
        NEITHER,
        BLAME,
        Before.ANOTHER,
        "a load failure or out-of-memory text weighs 2; what is loaded is read again",
        "backend: blame if two or more models failed so within 60 s",
    ),
    Verdict.OVERDUE: Row(
        "a cold load took longer than `timeouts.load`",
        NEITHER,
        BLAME,
        Before.ANOTHER,
        "the detached load is cancelled",
    ),
    Verdict.UNCLEAR: Row(
        "any other JSON 5xx, 499, or error record: wrong option type, bad format, template errors",
        NEITHER,
        NEITHER,
        Before.ONE_OTHER,
    ),
    Verdict.ACCOUNT: Row(
        "401, 402, 403, 429 or any 5xx, or an error record, on a model that runs at ollama.com",
        NEITHER,
        NEITHER,
        Before.RELAY,
        "whatever goes wrong with such a call, no breaker hears of it, unless the backend itself "
        "could not be reached: backend: blame",
    ),
    Verdict.MISCONFIGURED: Row(
        "401 or 403 on a local model, or any redirect",
        NEITHER,
        NEITHER,
        Before.ANOTHER,
        "the backend is marked, and cools off",
    ),
    Verdict.FAULT: Row(
        "refused, unreachable, DNS or TLS failure; reset before the head on a fresh connection; "
        "unparsable answer; 5xx without a JSON error; a 200 without a single record; a whole "
        "answer cut short",
        BLAME,
        NEITHER,
        Before.ANOTHER,
    ),
    Verdict.STALE: Row(
        "reset on a reused connection, nothing received", NEITHER, NEITHER, Before.SAME_FRESH
    ),
    Verdict.SLOW: Row(
        "connect timeout; or silence past the progress watchdog, confirmed by a canary",
        BLAME,
        NEITHER,
        Before.ANOTHER,
        "",
        "model instead of backend if other models there move; neither for a call that stays "
        "silent although the canary was answered",
    ),
    Verdict.BROKEN: Row(
        "after commit: transport cut, incomplete body, bad framing",
        BLAME,
        NEITHER,
        Before.NO,
        "an error record ends the stream",
    ),
    Verdict.STALLED: Row(
        "after commit: idle between chunks longer than `timeouts.idle`",
        BLAME,
        BLAME,
        Before.NO,
        "an error record ends the stream",
    ),
    Verdict.UNFINISHED: Row(
        "clean end, terminal record missing",
        NEITHER,
        NEITHER,
        Before.NO,
        "native streams pass as they are (Ollama's repeat guard ends so); on /v1 an error event "
        "is added",
        'model: blame on /v1 if the empty `"model":""` error chunk came before',
    ),
    Verdict.GONE: Row("the client hung up", NEITHER, NEITHER, Before.NO),
    Verdict.STOPPED: Row("our deadline, our shutdown, our own bug", NEITHER, NEITHER, Before.NO),
}


# Endings that say nothing against the backend, nor against the way there.
HARMLESS: Final = frozenset({Verdict.OK, Verdict.CALLER, Verdict.GONE, Verdict.STOPPED})


@record
class Facts:
    """What `marks` needs to know beyond the verdict."""

    several_unfit: bool = False  # two or more models failed on this backend within 60 s
    still_listed: bool = False  # the list, read again after a 404, still names the model
    others_move: bool = False  # other models on this backend make progress
    blank_model: bool = False  # the empty error chunk of /v1 came before the end
    blameless: bool = False  # a canary was answered while this call was not
    repeated_crash: bool = False  # an earlier attempt of this call crashed a runner already
    remote: bool = False  # the backend only passed the call on
    unreached: bool = False  # not even a connection came about


def marks(verdict: Verdict, facts: Facts) -> tuple[Mark, Mark]:
    """The marks for (backend, model). A call that crashes runners in turn blames only the first."""
    row = TABLE[verdict]
    if facts.remote:
        answered = row.host if verdict is Verdict.OK else NEITHER
        return (BLAME if facts.unreached else answered), NEITHER
    if facts.blameless:
        return NEITHER, NEITHER
    if facts.repeated_crash and verdict in (Verdict.UNFIT, Verdict.FAULT, Verdict.BROKEN):
        return NEITHER, NEITHER
    if facts.several_unfit and verdict is Verdict.UNFIT:
        return BLAME, row.model
    if facts.still_listed and verdict is Verdict.MISSING:
        return row.host, BLAME
    if facts.others_move and verdict is Verdict.SLOW:
        return NEITHER, BLAME
    if facts.blank_model and verdict is Verdict.UNFINISHED:
        return row.host, BLAME
    return row.host, row.model


@dataclass(frozen=True, slots=True)
class Judgement:
    """
    A verdict with what it rests on.

    Args:
        weight: How heavily a blame counts.
        crash: A runner died, or a load ran out of memory: the call itself may be deadly.
        text: One line for people.
        blameless: As in `Facts`.
        unreached: As in `Outcome`.
    """

    verdict: Verdict
    weight: int = 1
    crash: bool = False
    text: str = ""
    blameless: bool = False
    unreached: bool = False


LOAD_FAILURES: Final = (
    "llama-server process has terminated",
    "timed out waiting for llama-server to start",
    "llama-server reported out-of-memory during startup",
    "llama-server process no longer running",
    "error starting llama-server",
    "unable to load full model on GPU",
    "llama-server startup failed",
    "invalid file magic",
    "llama runner process has terminated",
    "timed out waiting for llama runner to start",
    "model requires more system memory",
    "unable to load model",
)
LOAD_FAILURE_PARTS: Final = (
    "exceeds file size",
    "this model may be incompatible with your version of Ollama",
)
RUN_FAILURES: Final = (
    "model runner has unexpectedly stopped",
    "an error was encountered while running the model:",
    "error reading llama-server",
    "unexpected server status: llm server",
    "no slots available after",
)
RUN_FAILURE_PARTS: Final = ("stream event exceeded",)
OUT_OF_MEMORY: Final = (
    "out of memory",
    "out-of-memory",
    "cudamalloc failed",
    "failed to allocate",
    "erroroutofmemory",
    "requires more system memory",
)
QUOTED: Final = "raw='"  # behind it a model's own words are quoted, which prove nothing
UNKNOWN_ROUTE: Final = b"404 page not found"
EMBED_FAILURES: Final = (
    "do embedding request",
    "error reading embed response",
    "unexpected server status",
    'post "http://127.0.0.1:',
)
_EMBED_400: Final = frozenset({"embed", "v1_embeddings"})
_ACCOUNT: Final = frozenset({401, 402, 403, 429})


def error_text(body: bytes) -> str | None:
    """
    The text of a JSON error in any of the three dialects; None: not a JSON error.

    Error texts that are JSON themselves (the engine's, relayed) are kept as they are.
    """
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) else None


def line(text: str, limit: int = 300) -> str:
    """One line of *text* for people."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def _of_text(text: str) -> Judgement:
    """UNFIT if *text* is one of those that mean so, else UNCLEAR."""
    lower = text.lower().partition(QUOTED)[0]
    memory = any(part in lower for part in OUT_OF_MEMORY)
    loading = any(lower.startswith(part.lower()) for part in LOAD_FAILURES) or any(
        part.lower() in lower for part in LOAD_FAILURE_PARTS
    )
    running = any(lower.startswith(part.lower()) for part in RUN_FAILURES) or any(
        part in lower for part in RUN_FAILURE_PARTS
    )
    if memory or loading:
        return Judgement(Verdict.UNFIT, 2, memory, line(text))
    if running:
        return Judgement(Verdict.UNFIT, 1, True, line(text))
    return Judgement(Verdict.UNCLEAR, text=line(text))


def of_record(record_text: str, *, remote: bool = False) -> Judgement:
    """Judge the text of an error record in a 200 stream; *remote* as for `of_answer`."""
    if remote:
        return Judgement(Verdict.ACCOUNT, text=line(record_text))
    return _of_text(record_text)


def of_answer(route: Route, status: int, body: bytes, *, remote: bool = False) -> Judgement:
    """
    Judge a whole answer that is not 200 (it may hold no more than a megabyte).

    Where two rows fit, the narrower counts: text and route before status.

    Args:
        remote: The model runs at ollama.com; the backend only passed the call on.
    """
    text = error_text(body)
    told = line(text) if text is not None else f"HTTP {status}"
    if status < 300 and route.operation == OTHER:
        return Judgement(Verdict.OK)
    if 300 <= status < 400:
        return Judgement(Verdict.MISCONFIGURED, text=f"answers with a redirect ({status})")
    if remote and (status in _ACCOUNT or status >= 500):
        return Judgement(Verdict.ACCOUNT, text=told)
    if remote and (status != 404 or text is not None):
        return Judgement(Verdict.CALLER, text=told)
    if status in (401, 403):
        return Judgement(Verdict.MISCONFIGURED, text=f"refuses us: {told}")
    if status in (429, 503):
        return Judgement(Verdict.BUSY, text=told)
    if status == 404 and text is None:
        if body.strip() == UNKNOWN_ROUTE:
            return Judgement(Verdict.NO_ROUTE, text=f"has no route {route.path}")
        return Judgement(Verdict.UNCLEAR, text="404, but not from Ollama")
    if status == 404:
        # What a route to come does not find need not be the model.
        if text is not None and "not found" in text and route.operation != OTHER:
            return Judgement(Verdict.MISSING, text=told)
        return Judgement(Verdict.CALLER, text=told)
    if status == 400 and route.operation in _EMBED_400 and text is not None:
        if text.lower().startswith(EMBED_FAILURES):
            return Judgement(Verdict.UNFIT, 1, True, told)
        return Judgement(Verdict.CALLER, text=told)
    if status == 501 and text is not None:  # what this model cannot do, no other copy of it can
        return Judgement(Verdict.CALLER, text=told)
    if status == 499:
        return Judgement(Verdict.UNCLEAR, text=told)
    if 400 <= status < 500:
        return Judgement(Verdict.CALLER, text=told)
    if text is None:
        return Judgement(Verdict.FAULT, text=f"HTTP {status} without an error text")
    return _of_text(text)


def is_cloud(model: str) -> bool:
    """Whether a model of that canonical name runs at ollama.com, by the name alone."""
    tag = model.rpartition(":")[2]
    return tag == "cloud" or tag.endswith("-cloud")


class FailureKind(Enum):
    """How the transport to a backend failed."""

    CONNECT = "cannot connect"
    CONNECT_TIMEOUT = "does not accept connections in time"
    RESET = "closed the connection before answering"
    CUT = "closed the connection in the middle of the answer"
    MALFORMED = "sent something that is not HTTP"
    SEND_STALL = "stopped reading the request"
    IDLE = "stopped in the middle of the answer"
    OVERDUE = "did not finish in its time budget"


@dataclass(frozen=True, slots=True)
class Failure:
    """
    What an upstream tells its sink when an exchange fails.

    Args:
        detail: For people; may be empty.
        reused: On a kept connection that had carried an earlier exchange.
        accepted: The request had been sent whole.
    """

    kind: FailureKind
    detail: str = ""
    reused: bool = False
    accepted: bool = False

    @property
    def text(self) -> str:
        """One line for people, to follow a backend's name."""
        return line(f"{self.kind.value}: {self.detail}" if self.detail else self.kind.value)


def of_failure(failure: Failure, *, committed: bool, received: int) -> Judgement:
    """Judge a transport failure after *received* bytes of payload."""
    kind = failure.kind
    crash = failure.accepted and kind in (FailureKind.RESET, FailureKind.CUT)
    if committed:
        verdict = Verdict.STALLED if kind is FailureKind.IDLE else Verdict.BROKEN
        return Judgement(verdict, crash=crash, text=failure.text)
    if kind is FailureKind.RESET and failure.reused and not received:
        return Judgement(Verdict.STALE, text=failure.text)
    unreached = kind in (FailureKind.CONNECT, FailureKind.CONNECT_TIMEOUT)
    if kind in (FailureKind.CONNECT_TIMEOUT, FailureKind.IDLE, FailureKind.SEND_STALL):
        return Judgement(Verdict.SLOW, text=failure.text, unreached=unreached)
    if kind is FailureKind.OVERDUE:
        return Judgement(Verdict.OVERDUE, text=failure.text)
    return Judgement(Verdict.FAULT, crash=crash, text=failure.text, unreached=unreached)


def document() -> str:
    """The table as Markdown, for the documentation."""
    head = "| verdict | when | backend's breaker | model's breaker | before commit | besides |\n"
    rows = [head, "| --- | --- | --- | --- | --- | --- |\n"]
    sign = {CREDIT: "credit", BLAME: "**blame**", NEITHER: "·"}
    for verdict, row in TABLE.items():
        besides = "; ".join(part for part in (row.besides, row.unless) if part)
        rows.append(
            f"| `{verdict.name}` | {row.when} | {sign[row.host]} | {sign[row.model]} "
            f"| {row.before.value} | {besides} |\n"
        )
    return "".join(rows)
