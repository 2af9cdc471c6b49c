"""`connect`: the list, settings with a real address and model, and wrong names."""

from __future__ import annotations

import json

import pytest
from aiohttp.test_utils import unused_port

from balancer.cli.connect import base_of, from_container
from balancer.cli.exits import ExitCode
from balancer.cli.recipes import RECIPES

from .conftest import Command
from .stub import serving

TAGS = {
    "models": [
        {"name": "embed:latest", "capabilities": ["embedding"]},
        {"name": "$(reboot)", "capabilities": ["completion"]},
        {"name": "qwen3:8b", "capabilities": ["completion", "tools"]},
    ]
}


def test_the_list(command: Command) -> None:
    """Of all clients, for people and for scripts."""
    told, scripts = command("connect"), json.loads(command("connect", "--json").stdout)
    assert told.exit_code == ExitCode.OK
    for recipe in RECIPES:
        assert recipe.name in told.stdout
    assert [client["name"] for client in scripts["clients"]] == [r.name for r in RECIPES]


def test_a_model_that_is_there_is_filled_in(command: Command) -> None:
    """One that can chat, and whose name is nothing but a name."""
    with serving({"/api/tags": (200, TAGS)}) as stub:
        told = command("connect", "claude", "--base-url", f"127.0.0.1:{stub.port}", "--key", "abc")
    assert told.exit_code == ExitCode.OK
    assert f"ANTHROPIC_BASE_URL=http://127.0.0.1:{stub.port}\n" in told.stdout
    assert "ANTHROPIC_AUTH_TOKEN=abc" in told.stdout
    assert "claude --model qwen3:8b" in told.stdout
    assert "is an example" not in told.stdout


def test_without_a_balancer_the_model_is_an_example(command: Command) -> None:
    """And that is said."""
    told = command("connect", "zed", "--base-url", f"127.0.0.1:{unused_port()}")
    assert told.exit_code == ExitCode.OK
    assert "llama3.2 is an example" in told.stdout


@pytest.mark.parametrize("answer", [(200, {"models": []}), (401, {"error": "key"}), (200, "?")])
def test_a_balancer_that_tells_no_models(command: Command, answer: tuple[int, object]) -> None:
    """Is as good as none."""
    with serving({"/api/tags": answer}) as stub:
        told = command("connect", "curl", "--base-url", f"127.0.0.1:{stub.port}")
    assert "is an example" in told.stdout


def test_for_scripts(command: Command) -> None:
    """Blocks with their language, and where they go."""
    told = command("connect", "opencode", "--json", "--base-url", "http://gpu-box.invalid:1/v1/")
    doc = json.loads(told.stdout)
    assert (doc["client"], doc["base_url"]) == ("opencode", "http://gpu-box.invalid:1")
    (block,) = doc["blocks"]
    assert json.loads(block["text"])["provider"]["balancer"]["options"] == {
        "baseURL": "http://gpu-box.invalid:1/v1"
    }


def test_in_a_container(command: Command) -> None:
    """Loopback has another name there, and the balancer has to listen for it."""
    port = unused_port()
    told = command("connect", "langchain", "--docker", "--base-url", f"127.0.0.1:{port}").stdout
    assert f'base_url="http://host.docker.internal:{port}"' in told
    assert f"--listen 172.17.0.1:{port}" in told
    assert "172.17" not in command("connect", "langchain", "--base-url", f"127.0.0.1:{port}").stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [("olama", ["Did you mean ollama"]), ("qwertz", ["Known: open-webui, claude-code"])],
)
def test_an_unknown_client(command: Command, name: str, words: list[str]) -> None:
    """The closest, and the list."""
    told = command("connect", name)
    assert told.exit_code == ExitCode.USAGE
    assert told.stdout == ""
    for word in words:
        assert word in told.stderr


def test_a_base_url_that_is_none(command: Command) -> None:
    """One line."""
    told = command("connect", "curl", "--base-url", "ftp://x")
    assert told.exit_code == ExitCode.USAGE
    assert told.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:1/", "http://h:1"),
        ("http://h:1/v1", "http://h:1"),
        ("http://h:1/api/", "http://h:1"),
        ("https://h/ollama", "https://h/ollama"),
        ("unix:/run/b.sock", "http://127.0.0.1:11435"),
    ],
)
def test_the_base_is_without_what_clients_add(url: str, base: str) -> None:
    """However people write it."""
    assert base_of(url) == base


@pytest.mark.parametrize(
    ("base", "inside"),
    [
        ("http://127.0.0.1:1", "http://host.docker.internal:1"),
        ("http://[::1]:1", "http://host.docker.internal:1"),
        ("http://localhost", "http://host.docker.internal"),
        ("https://ai.example.org", "https://ai.example.org"),
    ],
)
def test_only_loopback_has_another_name_in_containers(base: str, inside: str) -> None:
    """Everything else is reached as it is."""
    assert from_container(base) == inside
