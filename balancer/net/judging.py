"""
What an attempt came to: the verdict on it, what can be passed on of it, its outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from balancer.core import names, verdicts
from balancer.core.dialect import relayed
from balancer.core.dispatch import Answer
from balancer.core.domain import OTHER, Call, Dialect, Outcome, Route, Usage, Verdict
from balancer.core.domain import Attempt as Tried
from balancer.core.framing import json_terminal
from balancer.core.retry import repeats_crash
from balancer.core.routes import FREE_FORM
from balancer.core.verdicts import Judgement
from balancer.net.attempt import Attempt
from balancer.net.relay import FINE, STOPPING

_NOTHING: Final = Usage()  # told of what it took


def judge(
    call: Call, attempt: Attempt, *, remote: bool, stopping: bool
) -> tuple[Judgement, Answer | None, Usage]:
    """
    Judge an attempt that has not begun a stream.

    Args:
        remote: The backend only passes calls on, to where the model runs.
        stopping: A connection that ends now was ended by us.
    """
    if attempt.revoked is not None:
        return attempt.revoked, None, _NOTHING
    if attempt.failure is not None and (attempt.status in (0, 200)):
        if stopping:
            return STOPPING, None, _NOTHING
        received = attempt.received
        judged = verdicts.of_failure(attempt.failure, committed=False, received=received)
        return judged, None, _NOTHING
    if attempt.status != 200 and not attempt.complete:
        text = f"HTTP {attempt.status} with an endless error"
        return Judgement(Verdict.UNCLEAR, text=text), None, _NOTHING
    body = attempt.take()
    answer = Answer(attempt.status, attempt.content_type, body)
    if attempt.status != 200:
        judged = verdicts.of_answer(call.route, attempt.status, body, remote=remote)
        if judged.verdict is Verdict.FAULT:
            return judged, None, _NOTHING
        return judged, answer, _NOTHING
    is_json = "json" in attempt.content_type
    if call.route.operation in FREE_FORM and not (body and is_json):
        return _judge_freely(call.route, answer)
    if attempt.opened is not None:
        return _judge_opened(attempt, answer, remote=remote)
    ending = json_terminal(call.route, body)
    if not body or not ending.whole:
        return Judgement(Verdict.FAULT, text="sent an answer that is not whole"), None, _NOTHING
    return FINE, answer, ending.usage


def _judge_opened(
    attempt: Attempt, answer: Answer, *, remote: bool
) -> tuple[Judgement, Answer | None, Usage]:
    opened = attempt.opened
    if opened is not None and opened.kind == "error":
        return verdicts.of_record(opened.error_text, remote=remote), answer, _NOTHING
    if opened is not None and opened.blank_model:
        text = "lost its runner before the first token"
        return Judgement(Verdict.UNFIT, 1, crash=True, text=text), None, _NOTHING
    return Judgement(Verdict.FAULT, text="ended its answer without a record"), None, _NOTHING


def outcome_of(
    call: Call,
    attempt: Attempt,
    tried: Sequence[Tried],
    judgement: Judgement,
    usage: Usage,
    now: float,
) -> Outcome:
    """
    What a lease is settled with.

    Args:
        tried: The call's attempts before this one.
    """
    return Outcome(
        verdict=judgement.verdict,
        sent_at=attempt.sent_at,
        ended_at=now,
        status=attempt.status or None,
        first_byte_at=attempt.first_byte_at,
        body_bytes=attempt.received,
        usage=usage,
        weight=judgement.weight,
        text=judgement.text,
        crash=judgement.crash,
        blameless=judgement.blameless,
        odd_name=names.parse(call.model).local,
        unreached=judgement.unreached,
        repeated_crash=judgement.crash and repeats_crash(tried),
        retry_after_s=_retry_after(attempt.headers) if attempt.status in (429, 503) else None,
    )


def _judge_freely(route: Route, answer: Answer) -> tuple[Judgement, Answer | None, Usage]:
    """A whole answer of any type; a transcription of no bytes is how Ollama tells a crash."""
    if answer.body or route.operation == OTHER:
        return FINE, answer, _NOTHING
    text = "lost its runner: it answered nothing"
    return Judgement(Verdict.UNFIT, 1, crash=True, text=text), None, _NOTHING


def in_dialect(answer: Answer | None, dialect: Dialect) -> Answer | None:
    """A load's answer, which is Ollama's own, as the caller would have had it."""
    text = None if answer is None else verdicts.error_text(answer.body)
    if answer is None or text is None or dialect is Dialect.OLLAMA:
        return answer
    return replace(answer, body=relayed(answer.status, text, dialect))


def _retry_after(headers: Sequence[tuple[str, str]]) -> float | None:
    text = next((value for name, value in headers if name.lower() == "retry-after"), "")
    return float(text) if text.isascii() and text.isdecimal() else None
