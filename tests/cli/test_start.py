"""The start screen of real balancers."""

from __future__ import annotations

import pytest

from balancer.cli import start as start_screen
from balancer.config import load
from balancer.sim.host import SimModel
from tests.conftest import Start


async def test_the_screen_of_a_fleet(start: Start) -> None:
    """Backends, address, and a line to paste with a model that is there and chats."""
    rig = await start(2)
    await start_screen.first_checks(rig.balancer)
    lines = start_screen.lines(rig.balancer, "config.yaml")
    text = "\n".join(lines)
    assert lines[0].endswith("— config.yaml")
    assert [line.split()[0] for line in lines[1:4]] == ["BACKEND", "a", "b"]
    assert f"Listening  {rig.url} " in text
    assert f"Try it     OLLAMA_HOST=127.0.0.1:{rig.port} ollama run qwen3:0.6b" in text
    assert f"ollama-balancer status --admin 127.0.0.1:{rig.port}" in text


async def test_a_model_in_memory_is_tried_first(start: Start) -> None:
    """It answers at once."""
    rig = await start(2)
    await rig.warm("b", "llama3.2")
    assert start_screen.some_model(rig.balancer) == "llama3.2"


async def test_a_model_that_only_embeds_is_not_tried(start: Start) -> None:
    """`ollama run` could do nothing with it; then there is the list."""
    rig = await start(1, models=[SimModel("nomic-embed-text", capabilities=("embedding",))])
    assert start_screen.some_model(rig.balancer) is None
    assert start_screen.try_it(rig.balancer)[0].endswith("/api/tags")


async def test_a_dead_backend_shows_its_error(start: Start) -> None:
    """Where the loaded models would stand."""
    rig = await start(1, dead=["gone"])
    row = next(
        line for line in start_screen.lines(rig.balancer, "") if line.strip().startswith("gone")
    )
    assert "cannot connect" in row


async def test_without_backends_it_says_how_to_name_some(start: Start) -> None:
    """Instead of an empty table."""
    rig = await start(0)
    assert start_screen.NO_BACKENDS in start_screen.lines(rig.balancer, "")


async def test_versions_that_differ_are_told(start: Start) -> None:
    """Clients hear the lowest."""
    rig = await start(2)
    rig.balancer.catalog.note_version("b", "0.34.2")
    await start_screen.first_checks(rig.balancer)
    lines = start_screen.lines(rig.balancer, "")
    assert "! a runs 0.33.0, b runs 0.34.2: clients are told 0.33.0 (models.version)" in lines


@pytest.mark.parametrize(
    ("text", "env", "overrides", "told"),
    [
        ("version: 1\nbackends: [gpu1]", {}, {}, "line 2"),
        ("", {"BALANCER_BACKENDS": "gpu1"}, {}, "BALANCER_BACKENDS"),
        ("", {}, {"backends": ["gpu1"]}, "--backend"),
        ("", {}, {"backends": ["gpu1"], "demo.enabled": True}, "simulated"),
    ],
)
def test_where_a_backend_was_written(
    text: str, env: dict[str, str], overrides: dict[str, object], told: str
) -> None:
    """So that one knows where to change it."""
    assert start_screen.sources(load(text, env, overrides=overrides)) == {"gpu1": told}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({}, "this machine only; share"),
        ({"demo.enabled": True}, "(this machine only)"),
        ({"server.listen": ":0", "auth.anonymous": "always"}, "open to everybody"),
        (
            {"server.listen": ":0", "auth.keys": [{"name": "k", "key": "0123456789abcdef0123"}]},
            "need a key",
        ),
    ],
)
def test_who_can_reach_it(overrides: dict[str, object], told: str) -> None:
    """Told beside the address, loudly where nobody is asked for a key."""
    config = load("", {}, overrides=overrides)
    assert told in start_screen._reach(config, config.server.listen[0])
