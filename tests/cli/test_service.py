"""`install` and `healthcheck`: what is written where, what is left alone, who is well."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from aiohttp.test_utils import unused_port

from balancer.cli import service
from balancer.cli.exits import CommandError, ExitCode
from balancer.config import load

from .conftest import Command

ROOT = Path(__file__).resolve().parents[2]
UNIT = "etc/systemd/system/ollama-balancer.service"


# -- install -------------------------------------------------------------------------------


def test_a_service_of_the_system(command: Command, place: Path) -> None:
    """Unit, socket, environment and configuration; started by this very installation."""
    told = command("install", "--system", "--root", str(place))
    assert told.exit_code == ExitCode.OK
    unit = (place / UNIT).read_text()
    program = Path(sys.executable).parent / "ollama-balancer"
    assert f"\nExecStart={program} serve --config /etc/ollama-balancer/config.yaml\n" in unit
    assert service.PROGRAM not in unit
    assert (place / UNIT).with_suffix(".socket").exists()
    assert (place / "etc/default/ollama-balancer").stat().st_mode & 0o777 == 0o600
    assert load((place / "etc/ollama-balancer/config.yaml").read_text(), {}) == load("", {})
    assert told.stdout.count("written ") == 4
    assert "systemctl enable --now ollama-balancer" in told.stdout


def test_installing_again_keeps_what_is_yours(command: Command, place: Path) -> None:
    """Environment and configuration stay; a changed unit is replaced, drop-ins are for changes."""
    args = ("install", "--system", "--root", str(place))
    command(*args)
    own = place / "etc/ollama-balancer/config.yaml"
    own.write_text("backends: [gpu1]\n")
    (place / UNIT).write_text("[Service]\n")
    told = command(*args).stdout
    assert [line.split()[0] for line in told.splitlines()[:4]] == [
        "replaced",
        "unchanged",
        "unchanged",
        "kept",
    ]
    assert own.read_text() == "backends: [gpu1]\n"
    assert not list(place.rglob("*.new"))


def test_a_service_of_ones_own(command: Command, place: Path) -> None:
    """Below the home, where systemd --user looks."""
    assert command("install", "--user").exit_code == ExitCode.OK
    unit = (place / ".config/systemd/user/ollama-balancer.service").read_text()
    assert "DynamicUser" not in unit
    assert str(Path(sys.executable).parent) in unit
    config = place / ".config/ollama-balancer/config.yaml"
    assert config.stat().st_mode & 0o777 == 0o600


def test_what_is_there_need_not_be_a_text(command: Command, place: Path) -> None:
    """It is kept."""
    (place / "Dockerfile").write_bytes(b"\xff\xfe")
    assert "kept " in command("install", "--docker").stdout
    assert (place / "Dockerfile").read_bytes() == b"\xff\xfe"


@pytest.mark.parametrize(
    ("flag", "names"),
    [
        ("--docker", ["Dockerfile"]),
        ("--compose", ["alerts.yaml", "compose.yaml", "dashboard.json"]),
    ],
)
def test_files_for_containers(command: Command, place: Path, flag: str, names: list[str]) -> None:
    """Written here, the same as in deploy/; a file that is there already is kept."""
    assert command("install", flag).exit_code == ExitCode.OK
    assert sorted(path.name for path in place.iterdir()) == names
    for name in names:
        assert (place / name).read_text() == (ROOT / "deploy" / name).read_text()
        (place / name).write_text("mine\n")
    assert command("install", flag).stdout.count("kept ") == len(names)
    assert (place / names[0]).read_text() == "mine\n"


def test_one_ollama_per_gpu(command: Command, place: Path) -> None:
    """A template unit."""
    assert command("install", "--ollama", "--root", str(place)).exit_code == ExitCode.OK
    unit = (place / "etc/systemd/system/ollama@.service").read_text()
    assert "OLLAMA_HOST=127.0.0.1:1144%i" in unit


@pytest.mark.parametrize("args", [("--takeover",), ("--system", "--print"), ("--print",)])
def test_looking_writes_nothing(command: Command, place: Path, args: tuple[str, ...]) -> None:
    """Each file with its place; --print alone means the service of the system."""
    told = command("install", *args, "--root", str(place))
    assert told.exit_code == ExitCode.OK
    assert list(place.iterdir()) == []
    assert "# -- /etc/systemd/system/ollama" in told.stdout


def test_the_takeover_tells_both_edits(command: Command) -> None:
    """Ollama's new port, the balancer's old one, and that nothing was done."""
    told = command("install", "--takeover").stdout
    for word in (
        "OLLAMA_HOST=127.0.0.1:11440",
        "BALANCER_LISTEN=127.0.0.1:11434",
        "Nothing was changed",
        "systemctl restart ollama",
    ):
        assert word in told


@pytest.mark.parametrize("args", [(), ("--system", "--user")])
def test_one_has_to_be_chosen(command: Command, args: tuple[str, ...]) -> None:
    """Nothing is written by guessing."""
    told = command("install", *args)
    assert told.exit_code == ExitCode.USAGE
    assert "--system" in told.stderr


def test_a_program_in_a_home_cannot_be_a_service(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its unit could not see it: ProtectHome=yes."""
    monkeypatch.setattr(sys, "executable", "/home/me/venv/bin/python")
    told = command("install", "--system", "--print")
    assert told.exit_code == ExitCode.FAILURE
    assert "homes" in told.stderr
    assert "/home/me/venv/bin/python -m balancer" in command("install", "--user", "--print").stdout


def test_what_cannot_be_written_is_told(command: Command, place: Path) -> None:
    """Which file, why, and the way to look only."""
    (place / "etc").write_text("a file where a folder should be")
    told = command("install", "--system", "--root", str(place))
    assert told.exit_code == ExitCode.FAILURE
    assert told.stderr.count("\n") == 1
    assert UNIT in told.stderr
    assert "--print" in told.stderr


def test_an_installation_without_its_files_says_so() -> None:
    """Instead of a traceback."""
    with pytest.raises(CommandError, match=r"lacks nothing\.service"):
        service.packaged("nothing.service")


# -- healthcheck ---------------------------------------------------------------------------


class _Balancer(http.server.BaseHTTPRequestHandler):
    """Alive, but not ready."""

    def do_GET(self) -> None:
        live = self.path == "/_balancer/live"
        told = {"live": True} if live else {"ready": False, "reason": "draining"}
        body = json.dumps(told).encode()
        self.send_response(200 if live else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base's name
        """Silence."""


@pytest.fixture
def port() -> Iterator[int]:
    """Where a balancer answers that is alive, but not ready."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Balancer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("args", [(), ("--live",)])
def test_who_is_there_is_live(command: Command, port: int, args: tuple[str, ...]) -> None:
    """The default: readiness is the hosts' affair, and restarting us would not mend them."""
    told = command("healthcheck", *args, "--admin", f"127.0.0.1:{port}")
    assert (told.exit_code, told.stdout) == (ExitCode.OK, "live\n")


def test_who_drains_is_not_ready(command: Command, port: int) -> None:
    """With the reason on stderr."""
    told = command("healthcheck", "--ready", "--admin", f"127.0.0.1:{port}")
    assert told.exit_code == ExitCode.FAILURE
    assert "draining" in told.stderr


def test_nobody_there(command: Command) -> None:
    """Another code than for somebody who is not well."""
    told = command("healthcheck", "--admin", f"127.0.0.1:{unused_port()}")
    assert told.exit_code == ExitCode.NO_ADMIN


def test_both_questions_at_once_are_none(command: Command) -> None:
    """They exclude each other."""
    assert command("healthcheck", "--ready", "--live").exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("listen", "where"),
    [
        ("0.0.0.0:11434", "127.0.0.1:11434"),
        (":1", "127.0.0.1:1"),
        ("[::]:1", "127.0.0.1:1"),
        ("*:1", "127.0.0.1:1"),
        ("10.0.0.1:1,127.0.0.1:2", "10.0.0.1:1"),
        ("myhost", "myhost"),
        ("unix:/run/b.sock, :1", "unix:/run/b.sock"),
        ("fd:api", None),
        ("", None),
    ],
)
def test_the_environment_tells_where_it_listens(listen: str, where: str | None) -> None:
    """As in a container; else the configuration is asked."""
    assert service._listening({"BALANCER_LISTEN": listen}) == where


def test_a_healthcheck_is_light(place: Path, port: int) -> None:
    """It runs every few seconds: neither the server nor the configuration is loaded for it."""
    code = """
import sys
from balancer.cli import app
app(["healthcheck"], standalone_mode=False)
heavy = {"aiohttp", "ollama", "pybreaker", "yaml", "structlog"}
print(sorted(heavy & set(sys.modules)))
"""
    env = {"BALANCER_LISTEN": f"0.0.0.0:{port}"}
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=place, env=env
    )
    assert told.stdout.splitlines() == ["live", "[]"]


def test_the_configuration_tells_where_it_listens(command: Command, place: Path, port: int) -> None:
    """For who has neither flag nor variable."""
    text = yaml.safe_dump({"server": {"listen": [f"127.0.0.1:{port}"]}})
    (place / "ollama-balancer.yaml").write_text(text)
    assert command("healthcheck").exit_code == ExitCode.OK
