"""The pretended account: cloud models answer, or it is told why they do not."""

from __future__ import annotations

import json

import pytest

from balancer.sim.cloud import SIGNIN_URL, WORDS, Cloud
from balancer.sim.host import SimModel
from balancer.sim.loop import run
from balancer.sim.ollama import SimOllama
from tests.sim.wire import Reply, ask

CHAT = {"model": "kimi-k3:cloud", "messages": [{"role": "user", "content": "hi"}]}


def asked(cloud: Cloud | None, method: str, path: str, body: object = None) -> Reply:
    """One request to a host with that account."""

    async def scenario() -> Reply:
        async with SimOllama([SimModel("m", load_s=0.0)], cloud=cloud) as sim:
            reply = await ask(sim.port, method, path, body)
            assert not sim.host.loaded()
            return reply

    return run(scenario())


def test_a_far_model_answers_without_a_gpu() -> None:
    """Streamed and whole; nothing is loaded."""
    streamed = [
        json.loads(line) for line in asked(Cloud(), "POST", "/api/chat", CHAT).body.splitlines()
    ]
    assert "".join(line["message"]["content"] for line in streamed) == "".join(WORDS)
    assert streamed[-1]["done"] is True
    whole = json.loads(asked(Cloud(), "POST", "/api/chat", CHAT | {"stream": False}).body)
    assert whole["message"]["content"] == "".join(WORDS)


def test_a_cut_far_away_is_a_clean_end() -> None:
    """As Ollama passes it on: the chunked body ends, without a last record."""
    reply = asked(Cloud(cut_after=2), "POST", "/api/chat", CHAT)
    lines = [json.loads(line) for line in reply.body.splitlines()]
    assert (reply.ended, len(lines), lines[-1]["done"]) == ("clean", 2, False)


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_refusals(path: str) -> None:
    """Without an account 401 with an address, in Ollama's shape; limits as they are set."""
    reply = asked(Cloud(signed_in=False), "POST", path, CHAT)
    assert (reply.status, json.loads(reply.body)["signin_url"]) == (401, SIGNIN_URL)
    reply = asked(Cloud(refusal=(429, "{}")), "POST", path, CHAT)
    assert (reply.status, reply.body) == (429, b"{}")
    assert asked(None, "POST", path, CHAT).status == 403


def test_the_account() -> None:
    """Who it is, and that signing out answers null."""
    assert json.loads(asked(Cloud(), "POST", "/api/me").body)["name"] == "a"
    assert asked(Cloud(), "POST", "/api/signout").body == b"null"
    assert asked(Cloud(), "DELETE", "/api/user/keys/x").body == b"null"
    told = json.loads(asked(Cloud(), "GET", "/api/status").body)
    assert told == {"cloud": {"disabled": False, "source": "none"}}
    assert "results" in json.loads(asked(Cloud(), "POST", "/api/experimental/web_search").body)
