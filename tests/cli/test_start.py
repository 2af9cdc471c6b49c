"""The start screen of real balancers."""

from __future__ import annotations

import asyncio

import pytest

from balancer.app import Balancer
from balancer.cli import start as start_screen
from balancer.config import load, places
from balancer.sim.host import SimModel
from balancer.sim.ollama import SimOllama
from tests.conftest import Start
from tests.rig import LIMIT_S


async def test_the_screen_of_a_fleet(start: Start) -> None:
    """Backends, address, and a line to paste with a model that is there and chats."""
    rig = await start(2)
    await start_screen.first_checks(rig.balancer)
    lines = start_screen.lines(rig.balancer, "config.yaml")
    text = "\n".join(lines)
    assert lines[0].endswith("— config.yaml")
    assert [line.split()[0] for line in lines[1:4]] == ["BACKEND", "a", "b"]
    assert f"Listening  {rig.url} " in text
    assert f"Dashboard  http://127.0.0.1:{rig.port}/_balancer/" in lines
    assert f"Try it     OLLAMA_HOST=127.0.0.1:{rig.port} ollama run qwen3:0.6b" in text
    assert f"ollama-balancer status --admin 127.0.0.1:{rig.port}" in text


async def test_a_page_that_is_off_is_not_told(start: Start) -> None:
    """Nobody is sent to a 404."""
    rig = await start(1, config={"dashboard.enabled": False})
    assert "Dashboard" not in "\n".join(start_screen.lines(rig.balancer, ""))


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
    assert places(load(text, env, overrides=overrides)) == {"gpu1": told}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({}, "this machine only; to share"),
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


async def test_who_cannot_be_reached_has_a_hint(start: Start) -> None:
    """Below the table, by name: what to look at there."""
    rig = await start(1, dead=["gone"])
    hints = [line for line in start_screen.lines(rig.balancer, "") if line.startswith("! ")]
    assert len(hints) == 1
    assert hints[0].startswith("! gone: Is Ollama running there, and does it listen beyond")


@pytest.mark.usefixtures("quiet")
async def test_a_host_without_models_is_not_waited_for() -> None:
    """It has told all it knows: nothing."""
    async with SimOllama([]) as host:
        told = {"server.listen": "127.0.0.1:0", "backends": [host.url]}
        balancer = Balancer(load("", {}, overrides=told))
        await balancer.start()
        try:
            async with asyncio.timeout(LIMIT_S):
                await start_screen.first_checks(balancer, limit_s=2 * LIMIT_S)
            assert balancer.pool.is_ready()
        finally:
            await balancer.close()


@pytest.mark.parametrize(
    ("text", "file", "told"),
    [
        ("backends: [gpu1]", "c.yaml", "c.yaml"),
        ("backends: [gpu1]", None, "no configuration file"),
        ("", "c.yaml", "c.yaml, using discovery"),
        ("", None, "no configuration file, using discovery"),
        ("demo: {enabled: true}", "c.yaml", "DEMO: the hosts are simulated, their answers made up"),
    ],
)
def test_where_the_backends_come_from(text: str, file: str | None, told: str) -> None:
    """The first line says it; nothing was found here that could be kept."""
    assert start_screen.subject(load(text, {}), file) == told


@pytest.mark.parametrize(
    ("sources", "where"),
    [
        (["local"], "every 30 s on this machine (11434, 11440-11449)."),
        (["env"], "every 30 s at OLLAMA_HOST."),
    ],
)
def test_where_hosts_are_looked_for(sources: list[str], where: str) -> None:
    """Told while there are none; without discovery nothing is promised."""
    config = load("", {}, overrides={"discovery.sources": sources})
    assert start_screen.no_backends(config).endswith(where)
    off = load("discovery: {sources: none}", {})
    assert start_screen.no_backends(off) == start_screen.NO_BACKENDS
