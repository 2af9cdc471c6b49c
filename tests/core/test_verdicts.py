"""The verdict table, row by row, and what is read out of answers and failures."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core import routes
from balancer.core.domain import Mark, Route, Verdict
from balancer.core.verdicts import (
    LOAD_FAILURES,
    RUN_FAILURES,
    TABLE,
    Before,
    Facts,
    Failure,
    FailureKind,
    Judgement,
    document,
    error_text,
    is_cloud,
    line,
    marks,
    of_answer,
    of_failure,
    of_record,
)
from tests.core.bench import canon

V, K = Verdict, FailureKind
BLAME, CREDIT, NEITHER = Mark.BLAME, Mark.CREDIT, Mark.NEITHER
JSON = "application/json; charset=utf-8"

# What each verdict means, said a second time: backend's mark, model's mark, before commit.
MEANING = {
    V.OK: (CREDIT, CREDIT, Before.RELAY),
    V.CALLER: (NEITHER, NEITHER, Before.RELAY),
    V.MISSING: (NEITHER, NEITHER, Before.ANOTHER),
    V.NO_ROUTE: (NEITHER, NEITHER, Before.ANOTHER),
    V.BUSY: (NEITHER, NEITHER, Before.ANOTHER),
    V.UNFIT: (NEITHER, BLAME, Before.ANOTHER),
    V.OVERDUE: (NEITHER, BLAME, Before.ANOTHER),
    V.UNCLEAR: (NEITHER, NEITHER, Before.ONE_OTHER),
    V.ACCOUNT: (NEITHER, NEITHER, Before.RELAY),
    V.MISCONFIGURED: (NEITHER, NEITHER, Before.ANOTHER),
    V.FAULT: (BLAME, NEITHER, Before.ANOTHER),
    V.STALE: (NEITHER, NEITHER, Before.SAME_FRESH),
    V.SLOW: (BLAME, NEITHER, Before.ANOTHER),
    V.BROKEN: (BLAME, NEITHER, Before.NO),
    V.STALLED: (BLAME, BLAME, Before.NO),
    V.UNFINISHED: (NEITHER, NEITHER, Before.NO),
    V.GONE: (NEITHER, NEITHER, Before.NO),
    V.STOPPED: (NEITHER, NEITHER, Before.NO),
}


# -- the table ---------------------------------------------------------------------------------


def test_every_verdict_has_a_row() -> None:
    """Nothing can end without consequences being known."""
    assert set(TABLE) == set(MEANING) == set(Verdict)


@pytest.mark.parametrize("verdict", list(Verdict))
def test_a_verdict_means_what_it_says(verdict: Verdict) -> None:
    """The marks and the way on, each row held against its twin here."""
    row = TABLE[verdict]
    assert (row.host, row.model, row.before) == MEANING[verdict]
    assert marks(verdict, Facts()) == MEANING[verdict][:2]


def test_only_success_is_credited() -> None:
    """No failure, however innocent, counts for a backend."""
    assert [v for v, row in TABLE.items() if CREDIT in (row.host, row.model)] == [V.OK]


@pytest.mark.parametrize(
    ("verdict", "facts", "expected"),
    [
        (V.UNFIT, Facts(several_unfit=True), (BLAME, BLAME)),
        (V.MISSING, Facts(still_listed=True), (NEITHER, BLAME)),
        (V.SLOW, Facts(others_move=True), (NEITHER, BLAME)),
        (V.UNFINISHED, Facts(blank_model=True), (NEITHER, BLAME)),
        (V.SLOW, Facts(blameless=True), (NEITHER, NEITHER)),
    ],
)
def test_facts_from_outside_move_the_blame(
    verdict: Verdict, facts: Facts, expected: tuple[Mark, Mark]
) -> None:
    """The few conditions the table names."""
    assert marks(verdict, facts) == expected


@pytest.mark.parametrize("verdict", list(Verdict))
def test_facts_concern_their_own_row_only(verdict: Verdict) -> None:
    """A fact that belongs to one verdict changes nothing for another."""
    own = {
        V.UNFIT: "several_unfit",
        V.MISSING: "still_listed",
        V.SLOW: "others_move",
        V.UNFINISHED: "blank_model",
    }
    everything = {"several_unfit", "still_listed", "others_move", "blank_model"}
    facts = Facts(**dict.fromkeys(everything - {own.get(verdict, "")}, True))
    assert marks(verdict, facts) == MEANING[verdict][:2]


@pytest.mark.parametrize("verdict", [V.UNFIT, V.FAULT, V.BROKEN])
def test_a_query_of_death_blames_only_once(verdict: Verdict) -> None:
    """A call that crashes runners in turn cannot open one breaker after the other."""
    facts = Facts(repeated_crash=True, several_unfit=True)
    assert marks(verdict, facts) == (NEITHER, NEITHER)


def test_a_repeated_crash_excuses_nothing_else() -> None:
    """A stall or a refused connect is no crash, whatever happened before."""
    assert marks(V.STALLED, Facts(repeated_crash=True)) == (BLAME, BLAME)
    assert marks(V.SLOW, Facts(repeated_crash=True)) == (BLAME, NEITHER)


@pytest.mark.parametrize("verdict", Verdict)
def test_of_a_call_that_was_passed_on_only_the_reaching_counts(verdict: Verdict) -> None:
    """The backend is blamed if it could not be reached, credited for a whole answer; no model."""
    credit = CREDIT if verdict is V.OK else NEITHER
    assert marks(verdict, Facts(remote=True)) == (credit, NEITHER)
    assert marks(verdict, Facts(remote=True, unreached=True)) == (BLAME, NEITHER)


def test_the_documentation_is_printed_from_the_table() -> None:
    """One line per verdict, each with its marks, in a table of six columns."""
    lines = document().splitlines()
    assert len(lines) == 2 + len(Verdict)
    assert all(text.count("|") == 7 for text in lines)
    rows = {text.split("`")[1]: text for text in lines[2:]}
    assert set(rows) == {verdict.name for verdict in Verdict}
    assert "| **blame** | **blame** |" in rows["STALLED"]
    assert "| credit | credit |" in rows["OK"]
    assert "model: blame if its list" in rows["MISSING"]


# -- answers -----------------------------------------------------------------------------------


def judge(
    status: int,
    text: object = "no",
    *,
    path: str = "/api/chat",
    remote: bool = False,
) -> Judgement:
    """Judge ``{"error": text}``, or the text itself if it is bytes."""
    body = text if isinstance(text, bytes) else json.dumps({"error": text}).encode()
    return of_answer(routes.find("POST", path), status, body, remote=remote)


@pytest.mark.parametrize(
    ("status", "text", "verdict"),
    [
        (301, b"", V.MISCONFIGURED),
        (307, "moved", V.MISCONFIGURED),
        (400, "invalid options", V.CALLER),
        (401, "who are you", V.MISCONFIGURED),
        (403, b"", V.MISCONFIGURED),
        (402, "pay", V.CALLER),
        (404, "model 'm' not found", V.MISSING),
        (404, {"message": 'model "m" not found', "type": "api_error"}, V.MISSING),
        (404, "no such blob", V.CALLER),
        (404, b"404 page not found", V.NO_ROUTE),
        (405, b"405 method not allowed", V.CALLER),
        (413, "too large", V.CALLER),
        (422, b"", V.CALLER),
        (429, "slow down", V.BUSY),
        (503, "server busy, please try again.  maximum pending requests exceeded", V.BUSY),
        (503, "llama runner process has terminated", V.BUSY),
        (503, b"<html>", V.BUSY),
        (499, "canceled", V.UNCLEAR),
        (499, b"", V.UNCLEAR),
        (500, "llama runner process has terminated: exit status 2", V.UNFIT),
        (500, "invalid format: expected json", V.UNCLEAR),
        (500, b"Internal Server Error", V.FAULT),
        (501, "not implemented", V.CALLER),
        (502, b"<html>bad gateway</html>", V.FAULT),
        (504, b"", V.FAULT),
        (204, b"", V.FAULT),
    ],
)
def test_a_local_answer_is_judged_by_status_and_text(
    status: int, text: object, verdict: Verdict
) -> None:
    """Each row of the table that an answer can lead to."""
    assert judge(status, text).verdict is verdict


def test_only_ollamas_own_words_say_that_a_route_is_unknown() -> None:
    """A reverse proxy's 404, or one cut short, says nothing of the routes behind it."""
    judged = judge(404, b"404 page not found")
    assert judged.verdict is V.NO_ROUTE
    assert "/api/chat" in judged.text
    for body in (b"<html>404</html>", b'{"error":"model', b""):
        assert judge(404, body).verdict is V.UNCLEAR


@pytest.mark.parametrize(
    ("status", "text", "verdict"),
    [
        (201, b"", V.OK),
        (204, b"", V.OK),
        (404, b"404 page not found", V.NO_ROUTE),
        (404, "model 'm' not found", V.CALLER),
        (404, "no such voice: not found", V.CALLER),
        (500, "llama runner process has terminated", V.UNFIT),
    ],
)
def test_a_route_to_come_may_answer_as_it_likes(
    status: int, text: object, verdict: Verdict
) -> None:
    """Any success is one, and what it does not find need not be the model."""
    route = routes.other("POST", "/v1/later")
    assert route is not None
    body = text if isinstance(text, bytes) else json.dumps({"error": text}).encode()
    assert of_answer(route, status, body).verdict is verdict


def test_what_a_model_said_proves_nothing() -> None:
    """An error may quote the model's own words, and those any text."""
    text = "error parsing tool call: raw='CUDA error: out of memory', err=invalid character"
    assert judge(500, text).verdict is V.UNCLEAR


@pytest.mark.parametrize("status", [401, 402, 403, 429, 500, 502, 503, 504, 529])
def test_a_cloud_models_refusal_is_the_accounts(status: int) -> None:
    """What the provider behind says, and be it a page, is no fault of the backend's."""
    assert judge(status, "quota", remote=True).verdict is V.ACCOUNT
    assert judge(status, b"<html>", remote=True).verdict is V.ACCOUNT
    assert judge(status, "llama runner process has terminated", remote=True).verdict is V.ACCOUNT


@pytest.mark.parametrize("status", [400, 404, 422, 499])
def test_a_cloud_models_caller_is_told_so(status: int) -> None:
    """Nobody else has another model of that name; only a route may be missing here."""
    assert judge(status, "model 'm' not found", remote=True).verdict is V.CALLER
    assert judge(404, b"404 page not found", remote=True).verdict is V.NO_ROUTE


def test_an_error_record_of_a_cloud_model_names_no_runner_of_ours() -> None:
    """Even if it uses the words of a dead one."""
    judged = of_record("an error was encountered while running the model: EOF", remote=True)
    assert judged.verdict is V.ACCOUNT
    assert not judged.crash


@pytest.mark.parametrize(
    ("name", "cloud"),
    [("m:cloud", True), ("m:70b-cloud", True), ("m:cloudy", False), ("cloud", False)],
)
def test_a_cloud_model_is_known_by_its_tag(name: str, cloud: bool) -> None:
    """By the tag's end alone."""
    assert is_cloud(canon(name)) is cloud


@pytest.mark.parametrize("path", ["/api/embed", "/v1/embeddings"])
@pytest.mark.parametrize(
    "text",
    [
        "do embedding request: EOF",
        "error reading embed response: EOF",
        "unexpected server status: 1",
        'Post "http://127.0.0.1:40001/embedding": EOF',
    ],
)
def test_a_dead_runner_hides_in_a_400_of_the_embedding_routes(path: str, text: str) -> None:
    """There Ollama reports a crash as the caller's mistake; elsewhere a 400 is what it says."""
    judged = judge(400, text, path=path)
    assert judged == Judgement(V.UNFIT, 1, crash=True, text=text)
    assert judge(400, text).verdict is V.CALLER


def test_other_400s_of_the_embedding_routes_are_the_callers() -> None:
    """Only the texts of a crash are a crash."""
    assert judge(400, "input length exceeds", path="/api/embed").verdict is V.CALLER
    assert judge(400, b"bad", path="/api/embed").verdict is V.CALLER


@pytest.mark.parametrize("text", LOAD_FAILURES)
def test_a_load_failure_weighs_double(text: str) -> None:
    """One is enough to open the model's breaker; it is no crash of a runner that served."""
    judged = judge(500, f"{text}: detail")
    assert (judged.verdict, judged.weight) == (V.UNFIT, 2)
    assert judged.crash is ("memory" in text)


@pytest.mark.parametrize(
    "text",
    [
        'tensor "blk.0" offset+size (9) exceeds file size (8)',
        "unknown architecture; this model may be incompatible with your version of Ollama",
    ],
)
def test_a_load_failure_is_known_by_its_middle_too(text: str) -> None:
    """Texts that begin with something that varies."""
    judged = of_record(text)
    assert (judged.verdict, judged.weight, judged.crash) == (V.UNFIT, 2, False)


@pytest.mark.parametrize(
    "text", [*RUN_FAILURES, "llama-server chat stream event exceeded 8 MB limit"]
)
def test_a_runner_that_died_is_a_crash(text: str) -> None:
    """The call itself may have been deadly."""
    judged = of_record(text.upper())
    assert (judged.verdict, judged.weight, judged.crash) == (V.UNFIT, 1, True)


@pytest.mark.parametrize(
    "text",
    [
        "an error was encountered while running the model: CUDA error: out of memory",
        "cudaMalloc failed",
        "ggml: failed to allocate buffer",
        "hip: ErrorOutOfMemory",
    ],
)
def test_out_of_memory_is_both(text: str) -> None:
    """Heavy, since more calls will meet it; a crash, since this call may be why."""
    judged = of_record(text)
    assert (judged.verdict, judged.weight, judged.crash) == (V.UNFIT, 2, True)


def test_a_text_must_begin_so() -> None:
    """A prompt's echo in an error must not open a breaker."""
    assert of_record('template: "invalid file magic"').verdict is V.UNCLEAR


def test_texts_for_people_are_one_short_line() -> None:
    """An engine's page of text does not fill the log."""
    judged = of_record("one\n  two\t" + "x" * 1000)
    assert judged.text.startswith("one two x")
    assert len(judged.text) == 300
    assert judged.text.endswith("…")
    assert line("short") == "short"


def test_an_answer_without_a_text_is_told_by_its_status() -> None:
    """There is always something to read."""
    assert judge(503, b"").text == "HTTP 503"
    assert judge(500, b"oops").text == "HTTP 500 without an error text"
    assert judge(302, b"").text == "answers with a redirect (302)"
    assert judge(401, "who").text == "refuses us: who"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error":"no"}', "no"),
        (b'{"error":{"message":"no","code":null}}', "no"),
        (b'{"type":"error","error":{"type":"x","message":"no"}}', "no"),
        (b'{"StatusCode":404,"Status":"404 Not Found","error":"no"}', "no"),
        (b'{"error":"{\\"error\\":{\\"code\\":500}}"}', '{"error":{"code":500}}'),
        (b'{"error":{"code":1}}', None),
        (b'{"error":7}', None),
        (b'{"done":true}', None),
        (b"[1]", None),
        (b"404 page not found", None),
        (b"", None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
    ],
)
def test_an_error_text_is_found_in_every_dialect(body: bytes, text: str | None) -> None:
    """Ollama's string, OpenAI's and Anthropic's object; anything else is no JSON error."""
    assert error_text(body) == text


@given(st.sampled_from(routes.TABLE), st.integers(100, 599), st.binary())
def test_any_answer_can_be_judged(route: Route, status: int, body: bytes) -> None:
    """Whatever a backend sends, there is a verdict, and it is none that only we can give."""
    judged = of_answer(route, status, body)
    ours = {V.OK, V.GONE, V.STOPPED, V.STALE, V.BROKEN, V.STALLED, V.UNFINISHED}
    assert judged.verdict not in ours
    assert "\n" not in judged.text


# -- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        (K.CONNECT, V.FAULT, V.BROKEN),
        (K.CONNECT_TIMEOUT, V.SLOW, V.BROKEN),
        (K.RESET, V.FAULT, V.BROKEN),
        (K.CUT, V.FAULT, V.BROKEN),
        (K.MALFORMED, V.FAULT, V.BROKEN),
        (K.SEND_STALL, V.SLOW, V.BROKEN),
        (K.IDLE, V.SLOW, V.STALLED),
        (K.OVERDUE, V.OVERDUE, V.BROKEN),
    ],
)
def test_a_failure_is_judged_by_its_kind_and_by_commit(
    kind: FailureKind, before: Verdict, after: Verdict
) -> None:
    """Before commit another backend may help; after it the stream is broken or stalled."""
    assert of_failure(Failure(kind), committed=False, received=0).verdict is before
    assert of_failure(Failure(kind), committed=True, received=9).verdict is after


def test_a_kept_connection_that_was_closed_is_nobodys_fault() -> None:
    """Only if it was reused and nothing had come."""
    stale = Failure(K.RESET, reused=True, accepted=True)
    assert of_failure(stale, committed=False, received=0).verdict is V.STALE
    assert not of_failure(stale, committed=False, received=0).crash
    assert of_failure(stale, committed=False, received=1).verdict is V.FAULT
    cut = Failure(K.CUT, reused=True)
    assert of_failure(cut, committed=False, received=0).verdict is V.FAULT


@pytest.mark.parametrize("committed", [False, True])
def test_a_connection_that_dies_with_the_request_may_be_a_crash(committed: bool) -> None:
    """It had taken the call whole: perhaps the call killed it. A refused connect proves nothing."""

    def crash(failure: Failure) -> bool:
        return of_failure(failure, committed=committed, received=1).crash

    assert crash(Failure(K.RESET, accepted=True))
    assert crash(Failure(K.CUT, accepted=True))
    assert not crash(Failure(K.RESET))
    assert not crash(Failure(K.MALFORMED, accepted=True))


def test_a_failure_can_be_read() -> None:
    """Its text follows a backend's name."""
    assert Failure(K.CONNECT, "Connection\nrefused").text == "cannot connect: Connection refused"
    assert Failure(K.IDLE).text == "stopped in the middle of the answer"
    judged = of_failure(Failure(K.CONNECT, "refused"), committed=False, received=0)
    assert judged.text == "cannot connect: refused"
