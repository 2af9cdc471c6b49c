"""What an attempt came to, and what of it may be passed on."""

from __future__ import annotations

from typing import Any

import pytest

from balancer.core import routes
from balancer.core.dispatch import Answer
from balancer.core.domain import Attempt as Tried
from balancer.core.domain import Dialect, Outcome, Usage, Verdict
from balancer.core.verdicts import Failure, FailureKind, Judgement
from balancer.net.attempt import HOLD_ERROR, Attempt
from balancer.net.judging import in_dialect, judge, outcome_of
from tests.core.clocks import ManualClock
from tests.net.parts import FakeLease, a_call

JSON, NDJSON, SSE = "application/json", "application/x-ndjson", "text/event-stream"
V1, EMBED, AUDIO = "/v1/chat/completions", "/api/embed", "/v1/audio/transcriptions"
DONE = b'{"model":"m","done":true,"prompt_eval_count":3,"eval_count":5}'
CUT = Failure(FailureKind.CUT, accepted=True)


def attempt(
    path: str = "/api/chat",
    status: int = 200,
    kind: str = JSON,
    *parts: bytes,
    failure: Failure | None = None,
    ends: bool = True,
    **headers: str,
) -> Attempt:
    """One that has got so far."""
    made = Attempt(a_call(path), FakeLease().as_lease, ManualClock())
    if status:
        told = [(name.replace("_", "-"), value) for name, value in headers.items()]
        made.head(status, [("Content-Type", kind), *told])
    for part in parts:
        made.data(part)
    if failure is not None:
        made.fail(failure)
    elif ends:
        made.end()
    return made


def judged(
    path: str, it: Attempt, *, remote: bool = False, stopping: bool = False
) -> tuple[Verdict, Answer | None, Usage]:
    """The verdict, what may be passed on, and what it cost."""
    judgement, answer, usage = judge(a_call(path), it, remote=remote, stopping=stopping)
    return judgement.verdict, answer, usage


@pytest.mark.parametrize(
    ("path", "status", "kind", "body", "verdict", "relayed"),
    [
        ("/api/chat", 200, JSON, DONE, Verdict.OK, True),
        ("/api/chat", 200, JSON, DONE[:-9], Verdict.FAULT, False),
        ("/api/chat", 200, JSON, b"", Verdict.FAULT, False),
        (EMBED, 200, JSON, b'{"embeddings":[[1]]}', Verdict.OK, True),
        (EMBED, 200, JSON, b'{"embeddings":[[1', Verdict.FAULT, False),
        (EMBED, 200, "text/html", b"<html>", Verdict.FAULT, False),
        ("/api/chat", 404, JSON, b'{"error":"model \'m\' not found"}', Verdict.MISSING, True),
        ("/api/chat", 400, JSON, b'{"error":"bad"}', Verdict.CALLER, True),
        ("/api/chat", 500, JSON, b'{"error":"what?"}', Verdict.UNCLEAR, True),
        ("/api/chat", 502, "text/html", b"<html>", Verdict.FAULT, False),
        ("/api/chat", 503, JSON, b'{"error":"busy"}', Verdict.BUSY, True),
        ("/api/chat", 307, JSON, b"", Verdict.MISCONFIGURED, True),
        ("/api/chat", 200, NDJSON, b"", Verdict.FAULT, False),
        ("/api/chat", 200, NDJSON, b"\n\n", Verdict.FAULT, False),
        ("/api/chat", 200, NDJSON, b'{"error":"what?"}\n', Verdict.UNCLEAR, True),
        (V1, 200, SSE, b'data: {"error":{"message":"what?"}}\n\n', Verdict.UNCLEAR, True),
        (V1, 200, SSE, b'data: {"model":"","choices":[]}\n\n', Verdict.UNFIT, False),
        (V1, 200, SSE, b": only a comment\n\n", Verdict.FAULT, False),
        (AUDIO, 200, "text/plain", b"words", Verdict.OK, True),
        (AUDIO, 200, "text/plain", b"", Verdict.UNFIT, False),
        (AUDIO, 200, JSON, b'{"text":"words"}', Verdict.OK, True),
        (AUDIO, 200, JSON, b'{"text":', Verdict.FAULT, False),
    ],
)
def test_a_whole_answer(
    path: str, status: int, kind: str, body: bytes, verdict: Verdict, *, relayed: bool
) -> None:
    """What fails is never passed on as if it were an answer; what may be the last word is kept."""
    it = attempt(path, status, kind, *([body] if body else []))
    told, answer, _ = judged(path, it)
    assert told is verdict
    assert (answer is not None) is relayed
    if answer is not None:
        assert (answer.status, answer.content_type, answer.body) == (status, kind, body)


def test_what_an_answer_cost_is_read_from_it() -> None:
    """For the log and the metrics; of a failure nothing is."""
    _, _, usage = judged("/api/chat", attempt("/api/chat", 200, JSON, DONE))
    assert (usage.tokens_in, usage.tokens_out) == (3, 5)
    _, _, usage = judged("/api/chat", attempt("/api/chat", 500, JSON, DONE))
    assert usage == Usage()


def test_an_error_record_of_a_cloud_model_is_the_accounts() -> None:
    """No GPU here had a part in it."""
    it = attempt("/api/chat", 200, NDJSON, b'{"error":"no slots available after 5"}\n')
    assert judged("/api/chat", it, remote=True)[0] is Verdict.ACCOUNT
    again = attempt("/api/chat", 200, NDJSON, b'{"error":"no slots available after 5"}\n')
    assert judged("/api/chat", again)[0] is Verdict.UNFIT


@pytest.mark.parametrize("status", [0, 200])
def test_a_connection_that_we_ended_is_nobodys_fault(status: int) -> None:
    """While we stop; else it is the backend's."""
    for stopping, verdict in ((True, Verdict.STOPPED), (False, Verdict.FAULT)):
        it = attempt("/api/chat", status, JSON, failure=CUT)
        assert judged("/api/chat", it, stopping=stopping)[:2] == (verdict, None)


def test_an_error_that_never_ends_is_not_waited_for() -> None:
    """Of a megabyte of error page the rest says nothing more; nor does one that was cut."""
    endless = attempt("/api/chat", 500, JSON, b"x" * (HOLD_ERROR + 1), ends=False)
    assert judged("/api/chat", endless)[:2] == (Verdict.UNCLEAR, None)
    cut = attempt("/api/chat", 500, JSON, b'{"error":"wh', failure=CUT)
    assert judged("/api/chat", cut)[:2] == (Verdict.UNCLEAR, None)


def test_why_a_backend_was_taken_away_counts_before_all_else() -> None:
    """Whatever else had come by then."""
    it = attempt("/api/chat", 500, JSON, ends=False)
    it.revoked = Judgement(Verdict.SLOW, text="silent")
    assert judged("/api/chat", it, stopping=True)[:2] == (Verdict.SLOW, None)


# -- the outcome ----------------------------------------------------------------------------------


def outcome(it: Attempt, judgement: Judgement, tried: Any = ()) -> Outcome:
    """What the lease is settled with."""
    return outcome_of(a_call(model="M"), it, tried, judgement, Usage(tokens_out=5), 1010.0)


def test_an_outcome_tells_all_that_is_known() -> None:
    """Times, bytes, status, and what the judgement said."""
    it = attempt("/api/chat", 500, JSON, b"12345")
    told = outcome(it, Judgement(Verdict.UNFIT, 2, crash=True, text="why", blameless=True))
    assert (told.verdict, told.weight, told.text, told.status) == (Verdict.UNFIT, 2, "why", 500)
    assert (told.crash, told.blameless, told.unreached) == (True, True, False)
    assert (told.sent_at, told.first_byte_at, told.ended_at) == (1000.0, 1000.0, 1010.0)
    assert (told.body_bytes, told.usage.tokens_out) == (5, 5)
    assert not told.repeated_crash
    assert outcome(attempt("/api/chat", 0, failure=CUT), Judgement(Verdict.FAULT)).status is None


def test_a_call_that_crashes_runners_in_turn_is_known() -> None:
    """The second backend is not blamed for it."""
    crashed = outcome(attempt(), Judgement(Verdict.UNFIT, crash=True))
    tried = (Tried(1, "a", crashed),)
    assert outcome(attempt(), Judgement(Verdict.UNFIT, crash=True), tried).repeated_crash
    assert not outcome(attempt(), Judgement(Verdict.UNFIT), tried).repeated_crash


@pytest.mark.parametrize(
    ("status", "value", "seconds"),
    [
        (429, "7", 7.0),
        (503, "7", 7.0),
        (500, "7", None),
        (503, "soon", None),
        (503, "-1", None),
        (503, "1.5", None),
        (503, "٣", None),
        (503, "", None),
    ],
)
def test_when_to_come_back_is_believed_of_whole_seconds(
    status: int, value: str, seconds: float | None
) -> None:
    """And only where it means that the backend is busy."""
    it = attempt("/api/chat", status, JSON, retry_after=value)
    assert outcome(it, Judgement(Verdict.BUSY)).retry_after_s == seconds


@pytest.mark.parametrize(
    ("answer", "dialect", "body"),
    [
        (None, Dialect.OPENAI, None),
        (Answer(500, JSON, b'{"error":"x"}'), Dialect.OLLAMA, b'{"error":"x"}'),
        (Answer(500, JSON, b"no json"), Dialect.OPENAI, b"no json"),
    ],
)
def test_an_answer_that_needs_no_translation(
    answer: Answer | None, dialect: Dialect, body: bytes | None
) -> None:
    """It is what it was."""
    told = in_dialect(answer, dialect)
    assert (None if told is None else told.body) == body


@pytest.mark.parametrize("dialect", [Dialect.OPENAI, Dialect.ANTHROPIC])
def test_the_error_of_a_load_is_told_as_the_caller_would_have_had_it(dialect: Dialect) -> None:
    """Loads speak Ollama's own language; its status stays."""
    told = in_dialect(Answer(500, JSON, b'{"error":"no memory"}'), dialect)
    assert told is not None
    assert (told.status, told.content_type) == (500, JSON)
    assert b'"message":"no memory"' in told.body


def test_routes_of_free_form_are_those_we_think() -> None:
    """Of the cases above: an answer of theirs need not be JSON."""
    assert routes.find("POST", AUDIO).operation in routes.FREE_FORM
