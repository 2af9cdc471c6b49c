"""What a management request asks for."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.errors import BadRequest
from balancer.core.orders import digest_of, read

HEX = "ab" * 32


def order(operation: str, **fields: object) -> object:
    return read(operation, json.dumps(fields).encode())


def test_the_model_may_be_called_name() -> None:
    """Go's clients send both, one of them empty."""
    read_one = read("pull", b'{"model":"","name":"llama3.2","stream":false}')
    assert read_one.model == "llama3.2"
    assert read_one.name.display == "llama3.2:latest"
    assert not read_one.streaming


def test_field_names_know_no_case_and_bytes_behind_the_value_are_nothing() -> None:
    """As Go reads it."""
    assert read("delete", b'{"MODEL":"m"} trailing').model == "m"


def test_the_order_that_goes_on_asks_for_records() -> None:
    """Whatever the client wants itself, and with all else it said."""
    told = json.loads(read("pull", b'{"model":"m","insecure":true,"stream":false}').body())
    assert told == {"model": "m", "insecure": True, "stream": True}


def test_a_create_names_what_it_needs() -> None:
    """The model it starts from, and its blobs, each once, in one spelling."""
    files = {"a.gguf": f"sha256:{HEX}", "b.gguf": f"sha256-{HEX}"}
    made = read("create", json.dumps({"model": "n", "from": "b", "files": files}).encode())
    assert made.source is not None
    assert made.source.display == "b:latest"
    assert made.digests == (f"sha256:{HEX}",)


@pytest.mark.parametrize(
    ("operation", "fields", "text"),
    [
        ("pull", {}, "invalid model name"),
        ("pull", {"model": "a b"}, "invalid model name"),
        ("push", {}, "model is required"),
        ("delete", {}, "model is required"),
        ("delete", {"model": "a b"}, 'name "a b" is invalid'),
        ("create", {"from": "x"}, "invalid model name"),
        ("create", {"model": "m"}, "neither 'from' or 'files' was specified"),
        ("copy", {}, 'source "" is invalid'),
        ("copy", {"source": "a"}, 'destination "" is invalid'),
    ],
)
def test_what_is_wrong_is_told_in_ollamas_words(
    operation: str, fields: dict[str, object], text: str
) -> None:
    """Clients show these texts to people."""
    with pytest.raises(BadRequest, match=f"^{text}$"):
        order(operation, **fields)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"\xff", b'{"model":1}', b'{"model":"m","x":NaN}', b"[" * 100_000]
)
def test_what_cannot_be_read_is_refused(body: bytes) -> None:
    """Never a crash."""
    with pytest.raises(BadRequest):
        read("pull", body)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    """Whatever comes."""
    for operation in ("pull", "create", "copy", "delete"):
        with contextlib.suppress(BadRequest):
            assert read(operation, body).model


def test_digests() -> None:
    """Both spellings of a path; nothing else."""
    assert digest_of(f"sha256-{HEX}") == digest_of(f"sha256:{HEX.upper()}") == f"sha256:{HEX}"
    assert digest_of("sha256:abc") is None
