import textwrap
from pathlib import Path
from typing import Any

import yaml

from balancer.config import blocks, load

EXAMPLE = (Path(__file__).parents[2] / "config.example.yaml").read_text(encoding="utf-8")


def commented(after: str, before: str) -> str:
    """Return what the example shows in comments between two keys, as YAML."""
    section = EXAMPLE.partition(after)[2].partition(before)[0]
    lines = textwrap.dedent(section.partition("\n")[2]).splitlines()
    items = "\n".join(line.removeprefix("# ") for line in lines)
    return items[items.index("- name") :]


def test_the_example_holds_exactly_the_defaults() -> None:
    """Who copies it unchanged changes nothing, and hears no warning."""
    example = load(EXAMPLE, {})
    assert example == load("", {})
    assert example.warnings == ()


def test_the_example_shows_every_setting() -> None:
    """It is the reference: a key that is not in it does not exist for users."""
    tree = yaml.safe_load(EXAMPLE)
    for path in blocks.leaf_paths():
        inner: Any = tree
        for step in path:
            assert step in inner, f"{'.'.join(path)} is missing from config.example.yaml"
            inner = inner[step]


def test_the_examples_backend_shows_every_key_and_default() -> None:
    """The commented item is as true as the rest."""
    text = commented("backends: []", "discovery:")
    (item,) = yaml.safe_load(text)
    assert set(item) == set(blocks.BackendBlock.model_fields)
    assert set(item["models"]) == set(blocks.BackendModelsBlock.model_fields)
    assert set(item["tls"]) == set(blocks.BackendTlsBlock.model_fields)
    plain = {"name": item["name"], "url": item["url"]}
    assert load(f"backends:\n{text}", {}) == load(yaml.safe_dump({"backends": [plain]}), {})


def test_the_example_names_every_way_to_authenticate() -> None:
    """Keys that exclude one another cannot stand in one item, but each is mentioned."""
    for block in (blocks.BackendAuthBlock, blocks.KeyBlock):
        for key in block.model_fields:
            assert f"{key}" in EXAMPLE
    for kind in ("none", "bearer", "basic", "header"):
        assert f"type: {kind}" in EXAMPLE


def test_the_examples_keys_are_good() -> None:
    """The commented keys can be used as they stand."""
    text = textwrap.indent(commented("keys: []", "keys_file:"), "  ")
    config = load(f"auth:\n  keys:\n{text}", {"WEBUI_KEY": "0123456789abcdef"})
    assert [(key.name, key.role) for key in config.auth.keys] == [
        ("webui", "user"),
        ("ops", "admin"),
    ]
    assert config.warnings == ()


def test_a_block_without_keys_is_all_defaults() -> None:
    """A section whose keys are all commented out is null in YAML."""
    text = "server:\nauth:\n  keys:\nbackends:\nbreaker:\n  host:\n"
    assert load(text, {}) == load("", {})


def test_blocks_are_found_by_path() -> None:
    """Suggestions come from the block a key stands in."""
    assert blocks.block_at(()) is blocks.File
    assert blocks.block_at(("backends", 3, "auth")) is blocks.BackendAuthBlock
    assert blocks.block_at(("auth", "keys", 0)) is blocks.KeyBlock
    assert blocks.block_at(("server", "listen")) is None
    assert blocks.block_at(("nothing", "here")) is None
    assert blocks.block_at(("models", "overrides")) is None
    assert blocks.block_at(("models", "overrides", "num_ctx")) is blocks.ModelOverrideBlock
    assert blocks.block_at(("models", "overrides", "m", "num_ctx")) is blocks.NumCtxBlock


def test_leaf_paths_stop_at_lists_of_blocks() -> None:
    """Each leaf is one setting with one place in the environment."""
    leaves = set(blocks.leaf_paths())
    assert {("backends",), ("auth", "keys"), ("breaker", "host", "backoff")} <= leaves
    assert {("models", "overrides"), ("models", "num_ctx", "policy")} <= leaves
    assert ("breaker", "host") not in leaves


def test_keys_of_later_features_do_not_exist() -> None:
    """A key that does nothing would promise something."""
    assert {"tls", "workers"}.isdisjoint(blocks.ServerBlock.model_fields)
    assert {"labels", "proxy", "wake"}.isdisjoint(blocks.BackendBlock.model_fields)
    assert {"tracing"}.isdisjoint(blocks.File.model_fields)


def test_the_json_schema_speaks_as_the_file_does() -> None:
    """Editors show defaults in the users' words, and accept both forms of a value."""
    schema = blocks.schema()
    timeouts = schema["$defs"]["TimeoutsBlock"]
    assert timeouts["additionalProperties"] is False
    assert timeouts["properties"]["load"]["default"] == "10m"
    assert timeouts["properties"]["total"]["default"] == -1
    kinds = {kind["type"] for kind in timeouts["properties"]["load"]["anyOf"]}
    assert kinds == {"string", "number"}
    assert schema["$defs"]["AuthBlock"]["properties"]["anonymous"]["default"] == "loopback"
    assert schema["$defs"]["BackendBlock"]["anyOf"][0] == {"type": "string"}
    assert schema["properties"]["version"]["const"] == 1
