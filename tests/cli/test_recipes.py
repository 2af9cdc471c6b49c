"""Recipes: what is filled in; formats are right, and the Python ones run as they stand."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from balancer.cli.recipes import RECIPES, Block, Place, Recipe, close, find
from balancer.sim.ollama import VERSION
from tests import needs
from tests.conftest import Start

LIMIT_S = 120.0
MODEL = "llama3.2"
OPEN = Place("http://127.0.0.1:11435", "http://host.docker.internal:11435", MODEL)
KEYED = Place("https://ai.example.org/ollama", "https://ai.example.org/ollama", MODEL, "secret-key")
BLOCKS = [
    pytest.param(place, block, id=f"{recipe.name}-{block.language}-{place.key}")
    for recipe in RECIPES
    for block in recipe.blocks
    for place in (OPEN, KEYED)
]
TEXTS = [
    pytest.param(recipe, place, id=f"{recipe.name}-{place.key}")
    for recipe in RECIPES
    for place in (OPEN, KEYED)
]


def of(language: str) -> list[object]:
    """Blocks in one language."""
    return [each for each in BLOCKS if each.values[1].language == language]  # type: ignore[union-attr]


def test_every_client_has_one_name() -> None:
    """And no two share one, however it is written."""
    names = [recipe.name for recipe in RECIPES]
    assert len(set(names)) == len(names)
    spelled = [
        "".join(filter(str.isalnum, name.lower()))
        for recipe in RECIPES
        for name in {recipe.name, *recipe.aliases}
    ]
    assert len(set(spelled)) == len(spelled)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        *((recipe.name, recipe.name) for recipe in RECIPES),
        *((recipe.title, recipe.name) for recipe in RECIPES),
        ("openwebui", "open-webui"),
        ("Open_WebUI", "open-webui"),
        ("claude", "claude-code"),
        ("roo", "roo-code"),
        ("OpenAI", "openai-python"),
        ("llamaindex", "llama-index"),
        ("hass", "home-assistant"),
        ("lang", "langchain"),
    ],
)
def test_names_are_forgiving(written: str, name: str) -> None:
    """Case, dashes and what people call it."""
    found = find(written)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    ("written", "near"),
    [("c", ["claude-code", "cline"]), ("oppen-webui", ["open-webui"]), ("", []), ("qwertz", [])],
)
def test_what_is_not_known_has_neighbours(written: str, near: list[str]) -> None:
    """Those that begin so, and those that sound so."""
    assert find(written) is None
    assert set(near) <= set(close(written))
    assert bool(near) == bool(close(written))


@pytest.mark.parametrize(("recipe", "place"), TEXTS)
def test_everything_is_filled_in(recipe: Recipe, place: Place) -> None:
    """No placeholder is left, and a key stands there only if there is one."""
    texts = [place.fill(block.text) for block in recipe.blocks]
    texts += [place.fill(note) for note in recipe.notes]
    whole = "\n".join(texts)
    assert not re.search(r"<[A-Z0-9]+>|^[+-]key", whole, re.MULTILINE)
    assert ("secret-key" in whole) <= (place is KEYED)
    assert place.base in whole or place.docker in whole or place.fill("<HOST>") in whole


def test_a_key_is_put_somewhere_in_every_recipe() -> None:
    """Where a client cannot send one, that is said."""
    for recipe in RECIPES:
        told = [KEYED.fill(text) for text in (*(b.text for b in recipe.blocks), *recipe.notes)]
        assert any("key" in text for text in told), recipe.name


@pytest.mark.parametrize(("place", "block"), of("json"))
def test_json(place: Place, block: Block) -> None:
    """Can be read."""
    assert isinstance(json.loads(place.fill(block.text)), dict)


@pytest.mark.parametrize(("place", "block"), of("yaml"))
def test_yaml(place: Place, block: Block) -> None:
    """Can be read."""
    assert isinstance(yaml.safe_load(place.fill(block.text)), dict)


@pytest.mark.parametrize(("place", "block"), of("toml"))
def test_toml(place: Place, block: Block) -> None:
    """Can be read."""
    assert tomllib.loads(place.fill(block.text))["model"] == MODEL


@pytest.mark.parametrize(("place", "block"), of("sh"))
async def test_shell(place: Place, block: Block) -> None:
    """Its syntax is right."""
    process = await asyncio.create_subprocess_exec(
        needs.program("bash"), "-n", "-c", place.fill(block.text)
    )
    assert await process.wait() == 0


@pytest.mark.parametrize(("place", "block"), of("js"))
async def test_javascript(place: Place, block: Block, tmp_path: Path) -> None:
    """Its syntax is right."""
    script = tmp_path / "snippet.mjs"
    script.write_text(place.fill(block.text))
    process = await asyncio.create_subprocess_exec(needs.program("node"), "--check", str(script))
    assert await process.wait() == 0


@pytest.mark.compat
@pytest.mark.parametrize("key", [None, "0123456789abcdef0123"], ids=["open", "with a key"])
@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.blocks[0].language == "python"])
async def test_python_runs_as_it_stands(start: Start, recipe: Recipe, key: str | None) -> None:
    """Against simulated hosts, through a balancer, keyless and with a key where one is needed."""
    (block,) = recipe.blocks
    needs.package(re.findall(r"(?:^import|^from) (\w+)", block.text, re.MULTILINE)[0])
    config: dict[str, object] = {}
    if key is not None:
        keys = [{"name": "a", "role": "user", "key": key}]
        config = {"auth.anonymous": "never", "auth.keys": keys}
    rig = await start(2, config=config, version=VERSION)
    place = Place(rig.url, rig.url, MODEL, key)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        place.fill(block.text),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(LIMIT_S):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert len(out.strip()) > 10
    assert rig.forwarded()
