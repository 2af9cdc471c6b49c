"""`init`: files that are good, that say which hosts, and that destroy nothing."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
import yaml

from balancer import config as configuration
from balancer.cli.exits import ExitCode
from balancer.sim.fleet import Fleet

from .conftest import Command

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("how", [["--minimal"], ["--full"], []])
@pytest.mark.parametrize("hosts", [[], ["-b", "gpu1", "-b", "https://ai.example.org/ollama"]])
def test_what_is_written_is_good(
    command: Command, place: Path, how: list[str], hosts: list[str]
) -> None:
    """Without a warning, and with the hosts; the next command is told, and is right."""
    told = command("init", *how, *hosts)
    assert told.exit_code == ExitCode.OK
    text = (place / "ollama-balancer.yaml").read_text()
    config = configuration.load(text, {})
    assert config.warnings == ()
    assert [spec.url for spec in config.backends] == (
        ["http://gpu1:11434", "https://ai.example.org:443/ollama"] if hosts else []
    )
    assert "Next: ollama-balancer check ollama-balancer.yaml --contact" in told.stdout
    assert command("check", "ollama-balancer.yaml", "--strict").exit_code == ExitCode.OK


def test_hosts_may_be_separated_by_commas(command: Command) -> None:
    """As for `serve`."""
    text = command("init", "-b", "gpu1,gpu2", "-o", "-").stdout
    assert [spec.name for spec in configuration.load(text, {}).backends] == ["gpu1", "gpu2"]


def test_full_is_the_example(command: Command) -> None:
    """One source: what stands in the repository."""
    assert command("init", "--full", "-o", "-").stdout == (ROOT / "config.example.yaml").read_text()


def test_full_with_hosts_is_the_example_with_hosts(command: Command) -> None:
    """No other line is touched."""
    example = (ROOT / "config.example.yaml").read_text().splitlines()
    told = command("init", "--full", "-b", "gpu1", "-o", "-").stdout.splitlines()
    gone = [line for line in example if line not in told]
    assert len(gone) == 1
    assert gone[0].startswith("backends: []")


def test_minimal_differs_from_the_defaults_in_nothing_but_hosts(command: Command) -> None:
    """Whoever writes it changes nothing by that."""
    text = command("init", "-b", "gpu1", "-o", "-").stdout
    changed = configuration.diff(configuration.load("", {}), configuration.load(text, {})).changed
    assert {path.partition("[")[0] for path in changed} == {"backends"}


def test_what_is_commented_out_in_it_is_good(command: Command) -> None:
    """Taking away the signs gives settings, not faults."""
    text = command("init", "-o", "-").stdout.replace("backends: []", "", 1)
    tail = text[text.index("# - name: gpu1") :]
    settings = "backends:\n" + re.sub(r"^# ?", "", tail, flags=re.MULTILINE)
    config = configuration.load(settings, {"WEBUI_KEY": "0123456789abcdef0123"})
    assert config.backends[0].slots == 2
    assert [key.name for key in config.auth.keys] == ["webui"]
    assert config.routing.strategy == "warm-first"


def test_nothing_is_overwritten(command: Command, place: Path) -> None:
    """Not a file, and not what a dangling link points at; what to do is told."""
    (place / "ollama-balancer.yaml").write_text("mine")
    (place / "link.yaml").symlink_to("elsewhere.yaml")
    for args in ([], ["-o", "link.yaml"]):
        told = command("init", *args)
        assert told.exit_code == ExitCode.FAILURE
        assert told.stderr.count("\n") == 1
        assert "-o FILE" in told.stderr
    assert (place / "ollama-balancer.yaml").read_text() == "mine"
    assert not (place / "elsewhere.yaml").exists()


def test_a_place_where_one_cannot_write(command: Command) -> None:
    """One line."""
    told = command("init", "-o", "nowhere/x.yaml")
    assert told.exit_code == ExitCode.FAILURE
    assert told.stderr.startswith("Cannot write nowhere/x.yaml: No such file")


def test_another_file_is_named_in_what_comes_next(command: Command, place: Path) -> None:
    """For `serve` would not find it."""
    told = command("init", "-o", "other.yaml").stdout
    assert "ollama-balancer --config other.yaml" in told
    assert yaml.safe_load((place / "other.yaml").read_text())["version"] == 1


def test_a_host_that_is_none(command: Command, place: Path) -> None:
    """Is refused before anything is written."""
    assert command("init", "-b", "ftp://gpu1").exit_code == ExitCode.USAGE
    assert list(place.iterdir()) == []


async def test_hosts_that_are_found(
    command: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside those that are named; each once."""
    async with Fleet.test(2) as fleet:
        monkeypatch.setenv("OLLAMA_BASE_URLS", ";".join(fleet.urls))
        args = ("init", "--from-discovery", "-b", fleet.urls[0], "-o", "-")
        told = await asyncio.to_thread(command, *args)
    assert told.exit_code == ExitCode.OK
    urls = [spec.url for spec in configuration.load(told.stdout, {}).backends]
    assert urls[:2] == fleet.urls
    assert len(set(urls)) == len(urls)


def test_the_environment_is_not_written_down(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody expects a key in a file because it was set in a shell."""
    monkeypatch.setenv("BALANCER_API_KEY", "0123456789abcdef0123")
    monkeypatch.setenv("BALANCER_BACKENDS", "from-env")
    told = command("init", "-b", "gpu1", "-o", "-").stdout
    assert "0123456789abcdef" not in told
    assert "from-env" not in told
