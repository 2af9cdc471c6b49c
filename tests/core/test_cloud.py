"""Names, bodies and lists of models that run at ollama.com."""

from __future__ import annotations

import json

import pytest

from balancer.core import cloud, names
from balancer.core.catalog import Catalog
from balancer.core.names import without_source
from tests.core.bench import call, canon
from tests.core.clocks import ManualClock


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("gpt-oss:120b-cloud", "gpt-oss:120b"),
        ("kimi-k3:cloud", "kimi-k3"),
        ("KIMI-K3:Cloud", "kimi-k3"),
        ("library/kimi-k3:cloud", "kimi-k3"),
        ("ns/kimi:7b-cloud", "ns/kimi:7b"),
    ],
)
def test_a_model_is_called_there_without_its_source(here: str, there: str) -> None:
    """Whatever spelling a client has for it."""
    sent = call(here, body=json.dumps({"model": here, "x": 1}).encode())
    assert cloud.there(canon(here)) == there
    assert json.loads(cloud.at_provider(sent).body) == {"model": there, "x": 1}


def test_a_source_is_taken_off_as_it_was_written() -> None:
    """The rest of the name keeps its spelling; a name without one stays."""
    assert without_source(" A/b:7B-cloud ") == "A/b:7B"
    assert without_source("m:local") == "m"
    assert without_source("m:7b") == "m:7b"


def test_who_asked_is_not_told() -> None:
    """Addresses stay here, and what a web server in front adds; what the call means goes."""
    private = (
        ("X-Forwarded-For", "10.0.0.7"),
        ("CF-Connecting-IP", "10.0.0.7"),
        ("Cf-Access-Jwt-Assertion", "eyJ"),
        ("X-Goog-IAP-JWT-Assertion", "eyJ"),
        ("Remote-User", "ann"),
    )
    passed = (
        ("Accept", "*/*"),
        ("Content-Type", "multipart/form-data; boundary=x"),
        ("Anthropic-Beta", "x"),
        ("OpenAI-Beta", "x"),
        ("X-Stainless-Lang", "python"),
    )
    sent = call("m:cloud", body=b'{"model":"m:cloud"}', headers=(*private, *passed))
    assert cloud.at_provider(sent).headers == passed


def test_a_list_of_theirs_is_a_list_of_stubs() -> None:
    """One that every client can read: full digests, remote names; what has no name is left out."""
    told = {"name": "kimi-k3", "model": "kimi-k3", "digest": "8c95dad96c75", "size": 7}
    odd = [3, {}, {"name": "!"}, {"name": "a:1", "digest": 5}]
    rows = cloud.stubs([told, *odd])
    assert [row["name"] for row in rows] == ["kimi-k3:cloud", "a:1-cloud"]
    assert (rows[0]["remote_model"], rows[0]["remote_host"]) == ("kimi-k3", cloud.REMOTE_HOST)
    assert rows[0]["digest"].startswith("8c95dad96c75")
    assert {len(row["digest"]) for row in rows} == {64}
    catalog = Catalog(ManualClock())
    catalog.join("far")
    catalog.note_tags("far", rows)
    assert {row["name"] for row in catalog.tags()["models"]} == {"kimi-k3:cloud", "a:1-cloud"}
    assert catalog.is_stub("far", names.parse("kimi-k3:cloud").canonical)
    assert not catalog.digests_without_show()
