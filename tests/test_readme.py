"""
The README keeps its word: each of its blocks is run as it stands, by real processes on loopback.

Simulated hosts stand for `gpu1`, `gpu2` and 10.0.0.7, a free port for 11435, a client that calls as
`ollama run` does for `ollama`, a folder for what `sudo` would write to. What `make` would run is
read out of the Makefile: setting up .venv, and all tests within a test, would take too long.
"""

from __future__ import annotations

import http.client
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from balancer.cli.exits import ExitCode
from balancer.cli.recipes import RECIPES
from tests import needs
from tests.test_deploy import PYTHON

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = {
    text.partition("\n")[0]: text
    for text in re.findall(r"^```(?:sh|yaml)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
}
LIMIT_S = 60.0
SERVES = re.compile(r"^Listening +http://(\S+)(?s:.*?)Press Ctrl\+C", re.MULTILINE)

# Makes the calls of `ollama run MODEL`.
OLLAMA = """\
#!{python}
import os, sys, httpx, ollama
assert sys.argv[1] == "run"
httpx.head("http://" + os.environ["OLLAMA_HOST"]).raise_for_status()
assert "completion" in ollama.show(sys.argv[2]).capabilities
for part in ollama.generate(sys.argv[2], "Hi", stream=True):
    print(part.response, end="")
"""
SUDO = '#!/bin/sh\nexec "$@"\n'

run_by_a_test: list[str] = []


def runs(first: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark the test that runs the block whose first line this is."""
    run_by_a_test.append(first)
    return pytest.mark.parametrize("block", [BLOCKS.get(first, "")], ids=[first])


def test_every_block_is_run() -> None:
    """By exactly one test, and no test runs a block that is gone."""
    assert sorted(run_by_a_test) == sorted(BLOCKS)
    assert README.count("\n```") == 2 * (len(BLOCKS) + README.count("\n```text"))


# -- the stage -----------------------------------------------------------------------------


class Process:
    """A script in a shell; its output goes to a terminal, the log to a file."""

    def __init__(self, script: str, env: Mapping[str, str], cwd: Path) -> None:
        self._master, slave = pty.openpty()
        with (cwd / "log").open("ab") as log:
            self._shell = subprocess.Popen(
                ["sh", "-ec", script],
                stdin=subprocess.DEVNULL,
                stdout=slave,
                stderr=log,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
        os.close(slave)
        self.told = ""

    def until(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Read until it has said that."""
        deadline = time.monotonic() + LIMIT_S
        while (found := pattern.search(self.told)) is None:
            left_s = deadline - time.monotonic()
            assert select.select([self._master], [], [], max(left_s, 0.0))[0], self.told
            self.told += os.read(self._master, 65536).decode().replace("\r\n", "\n")
        return found

    def end(self) -> None:
        """As Ctrl+C does; at once if that does not help."""
        try:
            os.killpg(self._shell.pid, signal.SIGINT)
            self._shell.wait(LIMIT_S)
        finally:
            if self._shell.poll() is None:
                os.killpg(self._shell.pid, signal.SIGKILL)
                self._shell.wait()
            os.close(self._master)


@dataclass(frozen=True)
class Stage:
    """A home without anything in it, and two simulated hosts."""

    home: Path
    env: Mapping[str, str]
    hosts: tuple[str, str]

    def cast(self, text: str, port: str = "") -> str:
        """The text with the addresses that there are."""
        gpu1, gpu2 = self.hosts
        played = {"gpu2:11434": gpu2, "10.0.0.7:11434": gpu2, "gpu1": gpu1}
        played |= {"127.0.0.1:11435": port, "0.0.0.0:11435": "127.0.0.1:0"}
        return re.sub("|".join(map(re.escape, played)), lambda found: played[found[0]], text)

    def run(self, script: str, cwd: Path | None = None, **env: str) -> str:
        """What a script says that succeeds."""
        done = self.tried(script, cwd, **env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def tried(
        self, script: str, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """How a script ends."""
        return subprocess.run(
            ["sh", "-ec", script],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**self.env, **env},
            cwd=cwd or self.home,
            timeout=LIMIT_S,
        )

    @contextmanager
    def serving(
        self, script: str, cwd: Path | None = None, **env: str
    ) -> Iterator[tuple[str, str]]:
        """A balancer while it runs: its address and its start screen."""
        process = Process(
            script, {**self.env, "BALANCER_LISTEN": "127.0.0.1:0", **env}, cwd or self.home
        )
        try:
            yield process.until(SERVES)[1], process.told
        finally:
            process.end()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Two hosts that have llama3.2, as simulated."""
    home = tmp_path_factory.mktemp("home")
    programs = tmp_path_factory.mktemp("bin")
    for name, text in {"ollama": OLLAMA.format(python=sys.executable), "sudo": SUDO}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = os.pathsep.join(map(str, (programs, BIN, os.environ["PATH"])))
    env = {"PATH": path, "HOME": str(home), "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    fleet = Process("ollama-balancer sim --hosts 2 --listen 127.0.0.1:0", env, home)
    try:
        found = fleet.until(re.compile(r"fast http://(\S+)\nslow http://(\S+)\n"))
        for host in found.groups():
            alias = {"source": "demo/haiku", "destination": "llama3.2"}
            assert answer(host, "POST", "/api/copy", alias)[0] == 200
        yield Stage(home, env, (found[1], found[2]))
    finally:
        fleet.end()


@pytest.fixture(scope="module")
def balancer(stage: Stage) -> Iterator[tuple[str, str]]:
    """The balancer that the README starts, before `gpu1` and `gpu2`: address and start screen."""
    with stage.serving(stage.cast(made(BLOCKS['make run ARGS="-b gpu1 -b gpu2:11434"']))) as told:
        yield told


def answer(
    host: str, method: str, path: str, body: object = None, **headers: str
) -> tuple[int, str]:
    """Status and body."""
    connection = http.client.HTTPConnection(host, timeout=LIMIT_S)
    try:
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        connection.request(method, path, None if body is None else json.dumps(body), named)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def made(block: str) -> str:
    """The command line that make would run, with this environment's programs."""
    command = [needs.program("make"), *shlex.split(block)[1:], "-n", "-o", ".venv/ready"]
    env = {"PATH": os.environ["PATH"]}
    told = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=env)
    (line,) = told.stdout.splitlines()
    return line.replace(".venv/bin/", f"{shlex.quote(str(BIN))}/")


# -- the blocks ----------------------------------------------------------------------------


@runs("make demo")
def test_the_demo(stage: Stage, block: str) -> None:
    """No call fails; how a breaker opens and closes takes longer, and is told in test_demo."""
    told = stage.run(f"{made(block)} --seconds 2")
    assert "simulated" in told
    assert re.search(r"^[1-9]\d* calls, 0 failed", told, re.MULTILINE)


@runs("make test")
def test_the_tests(stage: Stage, block: str) -> None:
    """Every test without arguments; here those of one file."""
    assert re.fullmatch(r"\S+/pytest ?", made(block))
    told = stage.run(f"{made(block)} -q -p no:cacheprovider tests/core/test_names.py", ROOT)
    assert re.search(r"^\d+ passed in", told, re.MULTILINE)


@runs("make run")
def test_a_start_without_hosts_named(stage: Stage, block: str) -> None:
    """Those of this machine are found; a line to try and the page are told and there."""
    ports = ",".join(host.rpartition(":")[2] for host in stage.hosts)
    with stage.serving(made(block), BALANCER_DISCOVERY__LOCAL__PORTS=ports) as (address, screen):
        assert all(host in screen for host in stage.hosts), screen
        assert f"OLLAMA_HOST={address} ollama run " in screen
        assert f"http://{address}/_balancer/\n" in screen
        assert answer(address, "GET", "/_balancer/", Accept="text/html")[0] == 200


@runs('make run ARGS="-b gpu1 -b gpu2:11434"')
def test_a_start_with_hosts_named(stage: Stage, balancer: tuple[str, str], block: str) -> None:
    """They are asked, and only they."""
    rows = balancer[1].partition("BACKEND")[2].partition("Listening")[0].splitlines()[1:]
    assert [row.split()[0] for row in rows] == list(stage.hosts)


@runs("OLLAMA_HOST=127.0.0.1:11435 ollama run llama3.2")
def test_the_first_call(stage: Stage, balancer: tuple[str, str], block: str) -> None:
    """It is answered."""
    assert stage.run(stage.cast(block, balancer[0])).startswith("[simulated]")


@runs("ollama-balancer key new laptop --file keys")
def test_sharing(stage: Stage, block: str, tmp_path: Path) -> None:
    """A key that was shown once lets callers in; without any it does not listen for others."""
    with stage.serving(stage.cast(block), tmp_path, BALANCER_AUTH__ANONYMOUS="never") as (
        address,
        screen,
    ):
        key = screen.split()[0]
        given: list[dict[str, str]] = [{}, {"Authorization": f"Bearer {key}"}, {"x_api_key": key}]
        codes = [answer(address, "GET", "/api/tags", **headers)[0] for headers in given]
    assert codes == [401, 200, 200]
    keys, there = "BALANCER_AUTH__KEYS_FILE=keys", "--listen 0.0.0.0:11435"
    assert keys in block
    assert there in block
    checked = "BALANCER_LISTEN=0.0.0.0:11435 ollama-balancer check"
    stage.run(f"{keys} {checked}", tmp_path)
    assert stage.tried(checked, tmp_path).returncode == ExitCode.CONFIG


@runs("ollama-balancer connect open-webui")
def test_settings_of_a_client(stage: Stage, balancer: tuple[str, str], block: str) -> None:
    """With the address of the balancer; the clients that are named are known."""
    told = stage.run(block, BALANCER_LISTEN=balancer[0])
    assert f"OLLAMA_BASE_URL=http://{balancer[0]}" in told
    named = re.search(r"the clients it knows\s\(([^)]+), the SDKs and more\)", README)
    assert named
    for client in re.split(r",\s+", named[1]):
        assert any(re.sub(r"\s+", " ", client) in recipe.title for recipe in RECIPES), client


@runs("ollama-balancer init --from-discovery")
def test_a_first_configuration(stage: Stage, block: str, tmp_path: Path) -> None:
    """It has the host that was found, and is good."""
    stage.run(block, tmp_path, OLLAMA_HOST=stage.hosts[0])
    assert stage.hosts[0] in (tmp_path / "ollama-balancer.yaml").read_text()
    stage.run("ollama-balancer check", tmp_path)


@runs("backends:")
def test_the_configuration(stage: Stage, block: str, tmp_path: Path) -> None:
    """Its hosts answer; there is no fault and no warning."""
    (tmp_path / "ollama-balancer.yaml").write_text(stage.cast(block))
    key = {"WEBUI_KEY": "0123456789abcdef"}
    told = stage.run("ollama-balancer check --contact --strict", tmp_path, **key)
    assert "good, 2 backends" in told


@runs("ollama-balancer check --contact")
def test_a_change_of_the_configuration(stage: Stage, block: str, tmp_path: Path) -> None:
    """A host more is asked, told, and taken over."""
    file = tmp_path / "ollama-balancer.yaml"
    file.write_text(stage.cast("backends: [gpu1]\n"))
    with stage.serving("ollama-balancer", tmp_path) as (address, _):
        file.write_text(stage.cast("backends: [gpu1, 'gpu2:11434']\n"))
        told = stage.run(block, tmp_path, BALANCER_LISTEN=address)
        backends = json.loads(answer(address, "GET", "/_balancer/status")[1])["backends"]
    assert "good, 2 backends" in told
    assert stage.hosts[1] in told.partition("Reloaded")[2]
    assert len(backends) == 2


@runs("sudo deploy/install.sh")
def test_installing(stage: Stage, block: str, tmp_path: Path) -> None:
    """The unit is there, and what to do next is told."""
    python, root = tmp_path / "python", tmp_path / "root"
    python.write_text(PYTHON.format(log=tmp_path / "pip.log", real=sys.executable))
    python.chmod(0o755)
    told = stage.run(block, ROOT, DESTDIR=str(root), PYTHON=str(python))
    assert (root / "etc/systemd/system/ollama-balancer.service").exists()
    assert (root / "opt/ollama-balancer").is_dir()
    assert "systemctl" in told


@runs("ollama-balancer status")
def test_seeing_and_steering(stage: Stage, balancer: tuple[str, str], block: str) -> None:
    """Each command succeeds and speaks of what it was asked about."""
    lines = stage.cast(block).splitlines()
    told = [stage.run(line, BALANCER_LISTEN=balancer[0]) for line in lines]
    status, explained, doctor, drained, resumed = told
    assert all(host in status for host in stage.hosts)
    assert "llama3.2:latest: goes to " in explained
    assert "2 of 2 hosts up" in doctor
    assert drained.startswith(f"{stage.hosts[0]}: drain")
    assert resumed.startswith(f"{stage.hosts[0]}: up")
