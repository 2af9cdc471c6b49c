"""`check` and `config`: what is said of good and bad configurations, to people and to scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from aiohttp.test_utils import unused_port

from balancer import config as configuration
from balancer.cli.exits import ExitCode

from .conftest import Command
from .stub import serving

BAD = "backnds: [gpu1]\ntimeouts: {load: 15 secs}\n"


def test_a_good_file_is_called_good(command: Command, place: Path) -> None:
    """By name, with the number of backends; exit code 0."""
    (place / "good.yaml").write_text("backends: [gpu1, gpu2]\n")
    told = command("check", "good.yaml")
    assert (told.exit_code, told.stdout) == (0, "good.yaml: good, 2 backends\n")


def test_without_a_name_the_file_that_serve_reads_is_checked(command: Command, place: Path) -> None:
    """And without any file the defaults are."""
    assert "no file, defaults: good, 0 backends" in command("check").stdout
    (place / "ollama-balancer.yaml").write_text("backends: [gpu1]\n")
    assert "ollama-balancer.yaml: good, 1 backend\n" in command("check").stdout


def test_every_fault_is_a_line(command: Command, place: Path) -> None:
    """On stderr, with exit code 3."""
    (place / "bad.yaml").write_text(BAD)
    told = command("check", "bad.yaml")
    assert told.exit_code == ExitCode.CONFIG
    assert [line.split(" ")[0] for line in told.stderr.splitlines()] == [
        "bad.yaml:1:1",
        "bad.yaml:2:18",
    ]


def test_faults_for_scripts(command: Command, place: Path) -> None:
    """The same as JSON on stdout."""
    (place / "bad.yaml").write_text(BAD)
    told = command("check", "bad.yaml", "--json")
    assert told.exit_code == ExitCode.CONFIG
    doc = json.loads(told.stdout)
    assert doc["ok"] is False
    assert [(p["line"], p["column"], p["path"]) for p in doc["problems"]] == [
        (1, 1, "backnds"),
        (2, 18, "timeouts.load"),
    ]


def test_a_file_that_is_not_there(command: Command) -> None:
    """One line, exit code 3."""
    told = command("check", "nowhere.yaml")
    assert told.exit_code == ExitCode.CONFIG
    assert told.stderr.startswith("Cannot read the configuration nowhere.yaml: No such file")


def test_warnings_fail_only_when_strict(command: Command, place: Path) -> None:
    """They are told in both cases."""
    (place / "warned.yaml").write_text("auth: {anonymous: never}\n")
    lax, strict = command("check", "warned.yaml"), command("check", "warned.yaml", "--strict")
    assert (lax.exit_code, strict.exit_code) == (0, ExitCode.FAILURE)
    assert "! " in lax.stdout
    assert lax.stdout == strict.stdout


def test_contact_with_nobody_there_is_code_5(command: Command, place: Path) -> None:
    """With the reason and a hint for each host."""
    (place / "away.yaml").write_text(f"backends: ['127.0.0.1:{unused_port()}']\n")
    told = command("check", "away.yaml", "--contact")
    assert told.exit_code == ExitCode.NO_BACKEND
    assert "cannot connect: connection refused" in told.stdout
    assert "! 127.0.0.1: Is Ollama running there" in told.stdout


def test_contact_without_a_file_asks_who_is_found(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `serve` would: who answers is told, with nobody there it is code 5."""
    monkeypatch.setenv("BALANCER_DISCOVER", "env")
    answers = {"/api/version": (200, {"version": "0.33.0"}), "/api/tags": (200, {"models": []})}
    with serving(answers) as stub:
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{stub.port}")
        told = command("check", "--contact")
    assert told.exit_code == ExitCode.OK
    assert "no file, defaults: good, 1 backend, using discovery\n" in told.stdout
    assert "0.33.0" in told.stdout
    told = command("check", "--contact")
    assert told.exit_code == ExitCode.NO_BACKEND
    assert "(OLLAMA_HOST) is left out until it answers" in told.stdout
    assert "! There is no backend to ask.\n" in told.stdout


@pytest.mark.parametrize(("has", "code"), [("gone:7b", ExitCode.OK), ("other", ExitCode.FAILURE)])
def test_an_alias_of_nothing_is_a_warning(
    command: Command, place: Path, has: str, code: ExitCode
) -> None:
    """Of its models no host that was asked has any; nobody who is not asked can tell."""
    tags = {"models": [{"name": "m:latest"}, {"name": has}, {"name": "a b"}, 7]}
    with serving({"/api/version": (200, {"version": "0.33.0"}), "/api/tags": (200, tags)}) as stub:
        text = f"backends: ['127.0.0.1:{stub.port}']\n"
        text += "models: {aliases: {fast: m, ghost: [lost, 'gone:7b']}}\n"
        (place / "aliases.yaml").write_text(text)
        told = command("check", "aliases.yaml", "--contact", "--strict")
        lax = command("check", "aliases.yaml", "--contact")
        unasked = command("check", "aliases.yaml", "--strict")
    assert (told.exit_code, lax.exit_code, unasked.exit_code) == (code, 0, 0)
    warning = (
        "! models.aliases.ghost: no host that answers has what it stands for (lost, gone:7b); "
        "calls for it are answered with 404."
    )
    warned = [line for line in told.stdout.splitlines() if line.startswith("! ")]
    assert warned == ([warning] if code is ExitCode.FAILURE else [])


def test_config_show_is_a_file_that_means_the_same(command: Command, place: Path) -> None:
    """What is printed can be loaded again and differs in nothing."""
    (place / "ollama-balancer.yaml").write_text("backends: [gpu1]\nhealth: {interval: 9s}\n")
    told = command("config", "show")
    shown = configuration.load(told.stdout, {})
    assert shown.health.interval_s == 9.0
    assert (
        configuration.diff(
            shown, configuration.load("backends: [gpu1]\nhealth: {interval: 9s}\n", {})
        ).changed
        == ()
    )
    assert yaml.safe_load(told.stdout) == json.loads(command("config", "show", "--json").stdout)


def test_config_show_tells_origins(command: Command, place: Path) -> None:
    """By line of the file; what nobody wrote is a default."""
    (place / "ollama-balancer.yaml").write_text("backends: [gpu1]\nhealth: {interval: 9s}\n")
    rows = [line.split() for line in command("config", "show", "--origin").stdout.splitlines()]
    assert ["health.interval", "9s", "file:2"] in rows
    assert ["health.fall", "3", "default"] in rows
    doc = json.loads(command("config", "show", "--origin", "--json").stdout)
    assert {"path": "health.interval", "value": "9s", "origin": "file:2"} in doc["settings"]


def test_config_show_keeps_its_columns_where_something_is_long(
    command: Command, place: Path
) -> None:
    """A list that is longer than a terminal is wide moves its own line only."""
    name = "a-model-with-a-name-of-its-own-and-one-of-its-maker"
    text = f"models: {{aliases: {{{name}: m, b: [{', '.join(f'model{n}' for n in range(20))}]}}}}\n"
    (place / "ollama-balancer.yaml").write_text(text)
    head, *lines = command("config", "show", "--origin").stdout.splitlines()
    assert head.index("FROM") < 80
    usual = [line for line in lines if len(line) < 90]
    assert len(usual) > len(lines) - 5
    assert all(line[head.index("FROM") :].startswith(("default", "file:")) for line in usual)
    (alias,) = [line for line in lines if name in line]
    assert alias.split() == [f"models.aliases.{name}", "m", "file:1"]


def test_config_show_of_a_bad_file(command: Command, place: Path) -> None:
    """Is refused as everywhere."""
    (place / "bad.yaml").write_text(BAD)
    told = command("config", "show", "-c", "bad.yaml")
    assert (told.exit_code, told.stdout) == (ExitCode.CONFIG, "")


def test_config_schema_is_the_schema(command: Command) -> None:
    """As JSON, for editors."""
    assert json.loads(command("config", "schema").stdout) == configuration.schema()
