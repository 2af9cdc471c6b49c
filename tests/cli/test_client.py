"""The admin API from outside: addresses, the key, and everybody who is no balancer."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from aiohttp.test_utils import unused_port

from balancer.cli import client
from balancer.cli.exits import CommandError, ExitCode

from .conftest import Command
from .stub import serving

GOOD: dict[str, tuple[int, object]] = {"/_balancer/status": (200, {"status_version": 1})}


def refused(admin: client.Admin) -> CommandError:
    """How a status is refused."""
    with pytest.raises(CommandError) as caught:
        admin.status()
    return caught.value


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("gpu1", "http://gpu1:11435"),
        ("gpu1:80", "http://gpu1:80"),
        ("http://gpu1", "http://gpu1"),
        ("https://ai.example.org/olb", "https://ai.example.org/olb"),
        ("unix:/run/olb.sock", "unix:/run/olb.sock"),
    ],
)
def test_addresses_as_people_write_them(place: Path, given: str, url: str) -> None:
    """What is left out is filled in, the rest stays."""
    assert client.find(given, None).url == url


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        (None, "http://127.0.0.1:11435"),
        ("0.0.0.0:4000", "http://127.0.0.1:4000"),
        (":4000", "http://127.0.0.1:4000"),
        ("[::1]:4000", "http://[::1]:4000"),
        ("10.0.0.5:4000", "http://10.0.0.5:4000"),
        ("unix:/run/olb.sock", "unix:/run/olb.sock"),
    ],
)
def test_the_balancer_of_this_machine_is_found_where_it_listens(
    place: Path, monkeypatch: pytest.MonkeyPatch, listen: str | None, url: str
) -> None:
    """The address of its listener, as one can call it."""
    monkeypatch.setenv("BALANCER_API_KEY", "0123456789abcdef0123456789abcdef")
    if listen is not None:
        monkeypatch.setenv("BALANCER_LISTEN", listen)
    assert client.find(None, None).url == url


@pytest.mark.parametrize("text", ["nonsense: 1\n", "server: {listen: [nowhere:port]}\n", "a: ["])
def test_a_faulty_file_is_told_rather_than_another_balancer_asked(place: Path, text: str) -> None:
    """Exit code 3, every fault, and the way around it; whoever must go on is told the default."""
    (place / "ollama-balancer.yaml").write_text(text)
    with pytest.raises(CommandError, match=r"ollama-balancer\.yaml:1") as caught:
        client.find(None, None)
    assert caught.value.code == ExitCode.CONFIG
    assert "--admin HOST:PORT" in caught.value.lines[-1]
    assert client.find(None, None, guess=True).url == "http://127.0.0.1:11435"


def test_who_must_go_on_takes_what_can_be_read(place: Path) -> None:
    """The address, where only the rest is faulty; the default, where there is no file."""
    (place / "ollama-balancer.yaml").write_text("server: {listen: ':4000'}\nnonsense: 1\n")
    assert client.find(None, None, guess=True).url == "http://127.0.0.1:4000"
    assert client.find(None, "/nowhere.yaml", guess=True).url == "http://127.0.0.1:11435"


def test_a_file_that_is_not_there_is_told(place: Path) -> None:
    """Nobody named it for nothing."""
    with pytest.raises(CommandError, match="Cannot read the configuration /nowhere") as caught:
        client.find(None, "/nowhere.yaml")
    assert caught.value.code == ExitCode.CONFIG


@pytest.mark.parametrize("name", ["BALANCER_LISTEN", "BALANCER_SERVER__LISTEN"])
def test_a_faulty_file_is_none_of_our_business_where_the_environment_has_the_address(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It wins over the file anyway."""
    (place / "ollama-balancer.yaml").write_text("nonsense: 1\n")
    monkeypatch.setenv(name, "127.0.0.1:4000")
    assert client.find(None, None).url == "http://127.0.0.1:4000"
    assert client.find("gpu1:80", None).url == "http://gpu1:80"


@pytest.mark.parametrize(
    "more",
    [
        "auth: {keys: [{name: a, key: '${NOT_SET_HERE}'}]}",
        "auth: {keys_file: /run/credentials/of/the/service}",
        "backends: [{url: gpu1, auth: {type: bearer, token_file: /only/root}}]",
        "",
    ],
)
def test_what_only_the_balancer_can_read_is_no_fault(place: Path, more: str) -> None:
    """Its keys, files and variables need not be ours, and who may call is not asked of us."""
    (place / "ollama-balancer.yaml").write_text(f"server: {{listen: ':4000'}}\n{more}\n")
    assert client.find(None, None).url == "http://127.0.0.1:4000"


@pytest.mark.parametrize(
    "words",
    [
        *(["status"], ["reload"], ["explain", "m"], ["backends", "list"], ["models", "list"]),
        *(["bench"], ["connect", "codex"]),
    ],
)
def test_every_command_tells_it(command: Command, place: Path, words: list[str]) -> None:
    """On stderr, with the option that it has for the address."""
    (place / "ollama-balancer.yaml").write_text("nonsense: 1\n")
    told = command(*words)
    assert told.exit_code == ExitCode.CONFIG
    assert "ollama-balancer.yaml:1:1" in told.stderr
    option = "--base-url" if words[0] == "connect" else "--admin"
    assert f"{option} " in told.stderr
    assert option in command(*words, "--help").stdout


def test_the_key_is_sent(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the variable or from the file that the variable names."""
    (place / "key").write_text("secret-in-a-file\n")
    with serving(GOOD) as stub:
        url = f"http://127.0.0.1:{stub.port}"
        client.find(url, None).status()
        monkeypatch.setenv("BALANCER_API_KEY_FILE", str(place / "key"))
        client.find(url, None).status()
        monkeypatch.setenv("BALANCER_API_KEY", "secret")
        client.find(url, None).status()
    keys = [key for _, _, key in stub.asked]
    assert keys == [None, "Bearer secret-in-a-file", "Bearer secret"]


def test_a_key_file_that_cannot_be_read_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than asking without a key."""
    monkeypatch.setenv("BALANCER_API_KEY_FILE", "/nowhere/key")
    with pytest.raises(CommandError, match="/nowhere/key: No such file"):
        client.find("http://127.0.0.1:1", None)


@pytest.mark.parametrize("key", ["two\nlines", "with space", "schlüssel", "€uro"])
def test_a_key_that_cannot_be_sent_is_refused_unseen(
    place: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Whatever is wrong with it, most of it may be a key."""
    monkeypatch.setenv("BALANCER_API_KEY", key)
    with pytest.raises(CommandError, match="printable ASCII") as caught:
        client.find("http://127.0.0.1:1", None)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "given", ["http://", "http://[::1", "foo:bar", "http://a b", "http://h/ä", "http://h/\x01"]
)
def test_what_is_no_address(place: Path, given: str) -> None:
    """Wrong usage, in a line."""
    with pytest.raises(CommandError, match="is no address of a balancer") as caught:
        client.find(given, None)
    assert caught.value.code == ExitCode.USAGE


def test_a_password_in_an_address_is_not_repeated(place: Path) -> None:
    """The message says where a key goes instead."""
    with pytest.raises(CommandError, match="BALANCER_API_KEY") as caught:
        client.find("http://me:geheim@gpu1:11435", None)
    assert caught.value.code == ExitCode.USAGE
    assert "geheim" not in str(caught.value)


def test_a_name_that_can_be_nobodys() -> None:
    """Nobody answers there."""
    assert refused(client.Admin("http://..:1")).code == ExitCode.NO_ADMIN


def test_nobody_there() -> None:
    """Exit code 6, and what to do."""
    error = refused(client.Admin(f"http://127.0.0.1:{unused_port()}"))
    assert error.code == ExitCode.NO_ADMIN
    assert "Connection refused" in error.lines[0]
    assert "--admin" in error.lines[0]


@pytest.mark.parametrize("answer", [(404, "404 page not found"), (200, {"other": 1}), (200, [1])])
def test_somebody_else_there(answer: tuple[int, object]) -> None:
    """Exit code 6, too: this is no balancer."""
    with serving({"/_balancer/status": answer}) as stub:
        error = refused(client.Admin(f"http://127.0.0.1:{stub.port}"))
    assert error.code == ExitCode.NO_ADMIN
    assert "no ollama-balancer" in error.lines[0]


@pytest.mark.parametrize(
    "line",
    [
        ("status",),
        ("explain", "m"),
        ("reload",),
        ("backends", "drain", "a"),
        ("healthcheck",),
        ("healthcheck", "--ready"),
    ],
)
def test_a_stranger_that_takes_everything(command: Command, line: tuple[str, ...]) -> None:
    """Its 200 is no yes of a balancer."""
    paths = ["status", "explain?model=m", "reload", "backends/a/drain", "live", "ready"]
    with serving({f"/_balancer/{path}": (200, {}) for path in paths}) as stub:
        told = command(*line, "--admin", f"127.0.0.1:{stub.port}")
    assert (told.exit_code, told.stdout) == (ExitCode.NO_ADMIN, "")
    assert "no ollama-balancer" in told.stderr


@pytest.mark.parametrize("error", ["no key", {"message": "no key"}])
def test_a_refusal_is_passed_on_with_a_hint(error: object) -> None:
    """Exit code 1; the hint names the variable."""
    with serving({"/_balancer/status": (401, {"error": error})}) as stub:
        told = refused(client.Admin(f"http://127.0.0.1:{stub.port}"))
    assert told.code == ExitCode.FAILURE
    assert "(401): no key" in told.lines[0]
    assert "BALANCER_API_KEY" in told.lines[0]


@pytest.mark.parametrize(
    ("answers", "who"),
    [
        ({"/_balancer/live": (200, {"live": True})}, "another ollama-balancer"),
        (
            {"/": (200, "Ollama is running"), "/api/version": (200, {"version": "0.34.2"})},
            "an Ollama server (0.34.2)",
        ),
        ({"/": (200, "Ollama is running")}, "an Ollama server"),
        ({"/": (200, "It works!")}, "another program"),
    ],
)
def test_who_has_the_port(answers: dict[str, tuple[int, object]], who: str) -> None:
    """Found out by asking what each of them answers."""
    with serving(answers) as stub:
        assert client.occupant("127.0.0.1", stub.port) == who


def test_a_port_that_speaks_no_http_belongs_to_another_program() -> None:
    """And asking does not fail."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]

        def hang_up() -> None:
            deaf.accept()[0].close()

        threading.Thread(target=hang_up).start()
        assert client.occupant("127.0.0.1", port) == "another program"
