"""The route table: what holds for every row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core import routes
from balancer.core.domain import OTHER, Dialect, Framing, Kind, Role
from balancer.core.routes import (
    EMBEDDING,
    FREE_FORM,
    TABLE,
    ZSTD,
    dialect_of,
    find,
    other,
    split_key,
    without_key,
)


def test_every_row_can_be_found_by_its_name() -> None:
    """No two rows share method and path, and each is found by them."""
    assert len({(row.method, row.path) for row in TABLE}) == len(TABLE)
    assert all(find(row.method, row.path) is row for row in TABLE)


def test_what_is_not_in_the_table_is_not_found() -> None:
    """Neither another method nor another path is guessed at."""
    for method, path in (("PUT", "/api/chat"), ("POST", "/api/chat/"), ("POST", "/api/nothing")):
        with pytest.raises(KeyError):
            find(method, path)


def test_a_row_speaks_the_dialect_of_its_path() -> None:
    """Errors before and after a route is known have the same shape."""
    assert [row for row in TABLE if row.dialect is not dialect_of(row.path)] == []


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/api/unknown", Dialect.OLLAMA),
        ("/", Dialect.OLLAMA),
        ("/v1/unknown", Dialect.OPENAI),
        ("/v1/responses", Dialect.RESPONSES),
        ("/v1/messages", Dialect.ANTHROPIC),
        ("/v1/messages/count_tokens", Dialect.ANTHROPIC),
    ],
)
def test_unknown_paths_have_a_dialect_too(path: str, dialect: Dialect) -> None:
    """The 404 of a path that is in no table has the shape its clients expect."""
    assert dialect_of(path) is dialect


def test_streams_are_framed_as_their_dialect_frames_them() -> None:
    """Ollama's streams are lines, those of /v1 are events; only Ollama streams unasked."""
    for row in TABLE:
        if row.stream_framing is not None:
            native = row.dialect is Dialect.OLLAMA
            assert row.stream_framing is (Framing.NDJSON if native else Framing.SSE)
            assert row.streams_by_default is native


def test_only_what_does_no_lasting_harm_may_be_sent_twice() -> None:
    """Inference and reads may be repeated; what changes a host never."""
    for row in TABLE:
        assert row.replayable is (row.kind in (Kind.ONE, Kind.MERGE))


def test_a_user_may_do_what_one_host_answers_and_reads() -> None:
    """Routes that change hosts or speak for an account need the admin role."""
    for row in TABLE:
        account = row.kind is Kind.ACCOUNT
        assert row.role is (Role.ADMIN if account else Role.USER)


def test_operations_of_one_kind_of_route_are_told_apart() -> None:
    """The operation is a metric label and a fact of the catalogue: one per inference route."""
    ones = [row.operation for row in TABLE if row.kind is Kind.ONE]
    assert len(set(ones)) == len(ones)
    assert set(ones) >= EMBEDDING | ZSTD | (FREE_FORM - {OTHER})
    assert OTHER not in ones


@pytest.mark.parametrize(
    ("path", "dialect"),
    [("/api/later", Dialect.OLLAMA), ("/v1/a-b_c/d.e~1", Dialect.OPENAI)],
)
def test_what_is_in_no_row_may_be_a_route_to_come(path: str, dialect: Dialect) -> None:
    """Sent once to whoever has the model; told apart by path, but not in metrics."""
    route = other("POST", path)
    assert route is not None
    assert (route.path, route.dialect, route.kind) == (path, dialect, Kind.ONE)
    assert (route.operation, route.feature) == (OTHER, path)
    assert (route.replayable, route.optional, route.role) == (False, True, Role.USER)
    assert find("POST", "/api/chat").feature == "chat"


@pytest.mark.parametrize(
    "path",
    ["/", "/api", "/api/", "/v2/x", "/api/x/", "/api//x", "/api/a b", "/api/a%62", "/api/é",
     "/apix/y", "/api/x?y", "/api/x;y", "/api/" + "x" * 65, "/api" + "/x" * 9, "/api/x\n",
     "/api/experimental/x", "/api/..", "/v1/./x", "/v1/../x"],
)  # fmt: skip
def test_a_path_of_a_clients_goes_up_only_if_it_is_plain(path: str) -> None:
    """Words of plain letters, not too many; and nothing of what acts on hosts and accounts."""
    assert other("POST", path) is None
    assert other("GET", "/api/later") is None


def test_the_surface_of_ollama_is_whole() -> None:
    """Every inference and catalogue route of Ollama's has its row."""
    wanted = {
        ("POST", "/api/generate"),
        ("POST", "/api/chat"),
        ("POST", "/api/embed"),
        ("POST", "/api/embeddings"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/messages"),
        ("POST", "/v1/messages/count_tokens"),
        ("POST", "/v1/audio/transcriptions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{model}"),
        ("GET", "/"),
        ("HEAD", "/"),
        ("GET", "/api/version"),
        ("HEAD", "/api/version"),
        ("GET", "/api/tags"),
        ("HEAD", "/api/tags"),
        ("GET", "/api/ps"),
        ("POST", "/api/show"),
    }
    apart = (Kind.ACCOUNT, Kind.MANY)
    served = {(row.method, row.path) for row in TABLE if row.kind not in apart}
    assert served == wanted
    assert ("POST", "/api/pull") in routes._BY_NAME


@pytest.mark.parametrize(
    ("path", "key", "rest"),
    [
        ("/k/s3cret/v1/models", "s3cret", "/v1/models"),
        ("/k/s3cret/", "s3cret", "/"),
        ("/k/s3cret", "s3cret", "/"),
        ("/k/s3cret/k/other/x", "s3cret", "/k/other/x"),
        ("/k/", "", "/k/"),
        ("/k", "", "/k"),
        ("/kk/s3cret/x", "", "/kk/s3cret/x"),
        ("/v1/k/s3cret", "", "/v1/k/s3cret"),
        ("", "", ""),
    ],
)
def test_a_key_in_front_of_a_path(path: str, key: str, rest: str) -> None:
    """It is cut off, and what is left is a path; elsewhere it is none."""
    assert split_key(path) == (key, rest)


@given(st.text(), st.text(alphabet=st.characters(exclude_characters="/%?"), min_size=1))
def test_no_key_can_be_read_in_a_shown_path(rest: str, key: str) -> None:
    """Whatever stands behind it, and however the letter before it is spelled."""
    key = f"<{key}>"
    ways = ("/k/", "/K/", "/%6b/", "//k/", "/v1/k/", "http://host/k/", "/k%2F")
    for spelled in (*ways, "/k/./", "/k/%2e./", "/k\\", "\\k%5C", "/k//.//"):
        shown = without_key(f"{spelled}{key}/{rest.replace(key, '')}")
        assert key not in shown
        assert "/k/***" in shown


def test_a_long_path_is_read_in_one_go() -> None:
    """Before anybody is known. Looked at anew from each slash, these would take hours."""
    many = 10**6
    assert without_key("/" * many) == "/" * many
    assert without_key("/k" + "/" * many) == "/k" + "/" * many
    assert without_key("/k" + "/." * many + "/x") == "/k/***"
    assert without_key("/k/x" * many) == "/k/***" * many
