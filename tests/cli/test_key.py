"""`key`: keys are made, listed and revoked in one file, and shown once."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from balancer.cli import app, key
from balancer.cli.exits import CommandError, ExitCode
from balancer.config import Key, Limits, load
from tests.cli.stub import serving

from .conftest import Command

OTHERS = "# who may call\nops admin sha256:" + "ab" * 32 + "   # not to be touched\n"
KEPT = "# who may call\n\nops admin sha256:" + "ab" * 32 + "\n"


@pytest.fixture
def file(place: Path) -> Path:
    """A keys file to be, named by the configuration."""
    (place / "ollama-balancer.yaml").write_text("auth: {keys_file: keys.txt}\n")
    return place / "keys.txt"


def keys_of(file: Path) -> dict[str, Key]:
    """What the balancer reads there, by name."""
    config = load(f"auth: {{keys_file: {file}}}", {})
    return {key.name: key for key in config.auth.keys}


def files_beside(file: Path) -> list[str]:
    """What is left in the directory."""
    return sorted(each.name for each in file.parent.iterdir())


def test_a_key_is_shown_once_and_kept_as_its_hash(command: Command, file: Path) -> None:
    """Stdout is the key alone, for scripts; the file has its hash, and is its owner's alone."""
    told = command("key", "new", "webui")
    assert told.exit_code == 0, told.output
    text = told.stdout.strip()
    assert text.startswith("olb-")
    assert len(bytes.fromhex(text.removeprefix("olb-"))) >= 16
    assert keys_of(file) == {"webui": Key("webui", hashlib.sha256(text.encode()).digest(), "user")}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert text not in file.read_text() + told.stderr
    assert "ollama-balancer reload" in told.stderr
    assert files_beside(file) == ["keys.txt", "ollama-balancer.yaml"]


def test_no_two_keys_are_alike(command: Command, file: Path) -> None:
    """They are made by chance."""
    texts = {command("key", "new", f"k{number}").stdout for number in range(5)}
    assert len(texts) == 5
    assert len(keys_of(file)) == 5


def test_what_a_key_may_is_written_too(command: Command, file: Path) -> None:
    """Role, models and expiry mean the same to the balancer."""
    told = command(
        "key", "new", "guest", "--role", "admin", "--models", "llama3.2*, e", "--models", "m",
        "--expires", "2099-12-31", "--json",
    )  # fmt: skip
    made = json.loads(told.stdout)
    assert made == {
        "name": "guest",
        "role": "admin",
        "models": ["llama3.2*", "e", "m"],
        "expires": "2100-01-01T00:00:00Z",
        "expired": False,
        "priority": None,
        "limits": {},
        "key": made["key"],
        "file": str(file),
    }
    (key,) = keys_of(file).values()
    assert (key.role, key.models, key.expires_at) == ("admin", ("llama3.2*", "e", "m"), 4102444800)


def test_the_rest_of_the_file_stays(command: Command, file: Path) -> None:
    """Comments, other keys, mode; and a link stays one."""
    target = file.with_name("target.txt")
    target.write_text(KEPT)
    target.chmod(0o640)
    file.symlink_to(target)
    assert command("key", "new", "webui").exit_code == 0
    assert target.read_text().startswith(KEPT)
    assert command("key", "revoke", "webui").exit_code == 0
    assert target.read_text() == KEPT
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert file.is_symlink()


@pytest.mark.parametrize(
    ("args", "told", "code"),
    [
        (["webui", "--role", "boss"], "--role", ExitCode.USAGE),
        (["web ui"], "NAME", ExitCode.USAGE),
        (["wéb"], "NAME", ExitCode.USAGE),
        (["#web"], "NAME", ExitCode.USAGE),
        (["anonymous"], "NAME", ExitCode.USAGE),
        (["web\nops"], "NAME", ExitCode.USAGE),
        (["web", "--expires", "soon"], "--expires", ExitCode.USAGE),
        (["web", "--expires", "2020-01-01"], "has passed already", ExitCode.USAGE),
        (["web", "--models", "a b"], "--models", ExitCode.USAGE),
        (["ops"], "already", ExitCode.FAILURE),
        (["inline"], "already", ExitCode.FAILURE),
        (["web", "--file", "/nowhere/keys.txt"], "/nowhere", ExitCode.FAILURE),
    ],
)
def test_a_bad_key_is_not_made(
    command: Command, file: Path, args: list[str], told: str, code: ExitCode
) -> None:
    """One line says why; the file stays as it was, and no key is shown."""
    file.write_text(KEPT)
    config = f"auth: {{keys_file: keys.txt, keys: [{{name: inline, hash: {'cd' * 32}}}]}}\n"
    (file.parent / "ollama-balancer.yaml").write_text(config)
    result = command("key", "new", *args)
    assert (result.exit_code, result.stdout) == (code, "")
    assert told in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert file.read_text() == KEPT


@pytest.mark.parametrize("args", [["new", "web"], ["list"], ["revoke", "ops"]])
def test_a_faulty_file_is_left_alone(command: Command, file: Path, args: list[str]) -> None:
    """The line is named, not shown: it may hold a key."""
    file.write_text(OTHERS)
    result = command("key", *args)
    assert result.exit_code == ExitCode.CONFIG
    assert f"{file}:2: needs NAME ROLE" in result.stderr
    assert "abab" not in result.output
    assert file.read_text() == OTHERS


def test_keys_are_listed_without_their_hashes(command: Command, file: Path) -> None:
    """With what they may, and whether their time is over."""
    file.write_text(
        f"{KEPT}old user sha256:{'cd' * 32} expires=2020-01-01\n"
        f"guest user {'k' * 32} models=a,b* expires=2099-12-31T12:00:00Z\n"
    )
    told = command("key", "list")
    assert [line.split() for line in told.stdout.splitlines()] == [
        ["NAME", "ROLE", "MODELS", "EXPIRES", "PRIORITY", "LIMITS"],
        ["ops", "admin", "*", "never"],
        ["old", "user", "*", "2020-01-02T00:00:00Z", "(expired)"],
        ["guest", "user", "a,b*", "2099-12-31T12:00:00Z"],
    ]
    rows = json.loads(command("key", "list", "--json").stdout)["keys"]
    assert [(row["name"], row["expired"]) for row in rows] == [
        ("ops", False),
        ("old", True),
        ("guest", False),
    ]
    assert "abab" not in json.dumps(rows)
    assert "kkk" not in json.dumps(rows)


def test_only_a_key_that_is_there_can_be_revoked(command: Command, file: Path) -> None:
    """The nearest name is told, and where a key stands that is not in this file."""
    config = f"auth: {{keys_file: keys.txt, keys: [{{name: inline, hash: {'cd' * 32}}}]}}\n"
    (file.parent / "ollama-balancer.yaml").write_text(config)
    assert "no keys file" in command("key", "revoke", "ops").stderr
    file.write_text(KEPT)
    assert 'Did you mean "ops"?' in command("key", "revoke", "opps").stderr
    assert "auth.keys" in command("key", "revoke", "inline").stderr
    assert file.read_text() == KEPT


def test_without_a_file_it_says_where_to_name_one(command: Command, place: Path) -> None:
    """None is made up; with --file it is told what the configuration lacks."""
    told = command("key", "new", "webui")
    assert (told.exit_code, told.stdout) == (ExitCode.USAGE, "")
    assert "auth.keys_file" in told.stderr
    told = command("key", "new", "webui", "--file", "mine.txt")
    assert told.exit_code == 0
    assert f"keys_file: {place / 'mine.txt'}" in told.stderr
    assert "webui" in keys_of(place / "mine.txt")


def test_a_write_that_fails_leaves_the_old_file(
    command: Command, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing beside it."""
    file.write_text(KEPT)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    told = command("key", "new", "webui")
    assert (told.exit_code, told.stdout) == (ExitCode.FAILURE, "")
    assert "No space left" in told.stderr
    assert file.read_text() == KEPT
    assert files_beside(file) == ["keys.txt", "ollama-balancer.yaml"]


@pytest.mark.parametrize("args", [["new", "webui"], ["revoke", "ops"]])
def test_the_running_balancer_can_be_told_at_once(
    command: Command, file: Path, args: list[str]
) -> None:
    """With --reload; what that says goes to stderr, so that stdout stays the key."""
    file.write_text(KEPT)
    answer = {"reloaded": True, "changed": ["auth.keys"]}
    with serving({"/_balancer/reload": (200, answer)}) as stub:
        told = command("key", *args, "--reload", "--admin", f"127.0.0.1:{stub.port}")
    assert told.exit_code == 0, told.output
    assert [asked[:2] for asked in stub.asked] == [("POST", "/_balancer/reload")]
    assert "Changed: auth.keys" in told.stderr
    assert len(told.stdout.split()) == (args[0] == "new")


def test_a_key_is_shown_even_if_nobody_takes_it_over(command: Command, file: Path) -> None:
    """It is made: who never saw it would have to make another."""
    told = command("key", "new", "webui", "--reload", "--admin", "http://127.0.0.1:9")
    assert told.exit_code == ExitCode.NO_ADMIN
    assert told.stdout.startswith("olb-")
    assert "webui" in keys_of(file)


def test_no_key_typed_is_no_key(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl+D at the question ends in a line, as an empty stdin does."""

    def gone(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("getpass.getpass", gone)
    with pytest.raises(CommandError, match="No key on stdin") as caught:
        key.hashed()
    assert caught.value.code == ExitCode.USAGE


def test_a_key_of_ones_own_can_be_hashed(place: Path) -> None:
    """From stdin, never from the command line, where others could read it."""
    run = CliRunner()
    text = "k" * 32
    told = run.invoke(app, ["key", "hash"], input=f"{text}\n")
    assert told.stdout == f"sha256:{hashlib.sha256(text.encode()).hexdigest()}\n"
    assert told.stderr == ""
    assert "can be guessed" in run.invoke(app, ["key", "hash"], input="hunter2\n").stderr
    for bad in ("", "\n", "two words\n", "schlüssel-schlüssel\n"):
        refused = run.invoke(app, ["key", "hash"], input=bad)
        assert (refused.exit_code, refused.stdout) == (ExitCode.USAGE, "")


def test_a_key_may_have_limits(command: Command, file: Path) -> None:
    """Written as the balancer reads them, and listed."""
    told = command(
        "key", "new", "jobs", "--priority", "batch", "--rpm", "60", "--slots", "2",
        "--tokens-per-minute", "-1", "--max-num-predict", "512",
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    (key,) = keys_of(file).values()
    assert key.priority == 10
    assert key.limits == Limits(60, -1, 2, 512)
    listed = command("key", "list").stdout.splitlines()[1].split()
    assert listed[4:] == [
        "batch",
        "rpm=60",
        "tokens_per_minute=-1",
        "slots=2",
        "max_num_predict=512",
    ]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--rpm", "0"), ("--slots", "x"), ("--priority", "urgent"), ("--tokens-per-minute", "1 2")],
)
def test_a_bad_limit_is_told_by_its_option(
    command: Command, file: Path, option: str, value: str
) -> None:
    """And no key is made."""
    told = command("key", "new", "jobs", option, value)
    assert told.exit_code == ExitCode.USAGE
    assert f"{option}: " in told.output
    assert not file.exists()
