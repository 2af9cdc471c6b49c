"""`doctor` from the command line: healthy and sick fleets, with and without a balancer."""

from __future__ import annotations

import asyncio
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import unused_port

from balancer.cli.exits import ExitCode
from balancer.sim.fleet import Fleet

from .conftest import Command
from .stub import serving
from .test_inspect import document


@pytest.fixture(autouse=True)
def plain_machine(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine the tests run on is not what is tested."""
    monkeypatch.setenv("BALANCER_DISCOVER", "none")
    monkeypatch.setattr("balancer.cli.doctor_asking._unit", lambda: None)
    monkeypatch.setattr("balancer.cli.doctor_checks.FEW_FILES", 0)
    for name in list(os.environ):
        if name.upper().endswith("_PROXY") or name == "OLLAMA_HOST":
            monkeypatch.delenv(name)


async def test_a_healthy_fleet_is_one_line(command: Command, place: Path) -> None:
    """Without a balancer, from the configuration alone."""
    async with Fleet.test(2) as fleet:
        write(place, backends=fleet.urls)
        told = await asyncio.to_thread(command, "doctor")
    (line,) = told.stdout.splitlines()
    assert line.startswith("No fault found: 2 of 2 hosts up, 5 models. No balancer answers at")
    assert line.endswith("; start one: ollama-balancer")
    assert told.exit_code == ExitCode.OK


async def test_a_sick_fleet(command: Command, place: Path) -> None:
    """What is wrong, why, and what to do; exit code 1."""
    async with Fleet.test(1) as fleet:
        write(place, backends=[*fleet.urls, f"127.0.0.1:{unused_port()}"])
        told = await asyncio.to_thread(command, "doctor")
        scripts = await asyncio.to_thread(command, "doctor", "--json")
    assert told.exit_code == scripts.exit_code == ExitCode.FAILURE
    head, *_, last = told.stdout.splitlines()
    assert head.startswith("ERROR    127.0.0.1:")
    assert "→ ollama serve" in told.stdout
    assert last.startswith("1 error: 1 of 2 hosts up")
    doc = json.loads(scripts.stdout)
    assert (doc["doctor_version"], doc["ok"], doc["balancer"]) == (1, False, None)
    assert [(host["up"], host["models"]) for host in doc["hosts"]] == [(True, 5), (False, 0)]
    (finding,) = doc["findings"]
    assert (finding["id"], finding["severity"]) == ("host-refused", "error")


def test_nobody_answers(command: Command, place: Path) -> None:
    """Exit code 5, as from `status`."""
    write(place, backends=[f"127.0.0.1:{unused_port()}"])
    assert command("doctor").exit_code == ExitCode.NO_BACKEND


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a balancer nor an Ollama of this machine is seen."""
    monkeypatch.setenv("BALANCER_LISTEN", f"127.0.0.1:{unused_port()}")
    monkeypatch.setenv("BALANCER_DISCOVER", "none")


@pytest.mark.usefixtures("alone")
def test_hosts_may_be_named(command: Command) -> None:
    """Where there is no file yet."""
    told = command("doctor", "-b", f"127.0.0.1:{unused_port()}")
    assert told.exit_code == ExitCode.NO_BACKEND
    assert "Nobody listens there" in told.stdout


def test_a_host_that_is_none(command: Command) -> None:
    """Is wrong usage, as everywhere."""
    told = command("doctor", "-b", "ftp://gpu1")
    assert (told.exit_code, told.stdout) == (ExitCode.USAGE, "")


@pytest.mark.usefixtures("alone")
def test_without_anything(command: Command) -> None:
    """It says how to begin."""
    told = command("doctor")
    assert told.exit_code == ExitCode.NO_BACKEND
    assert "ollama-balancer init" in told.stdout


async def test_hosts_that_are_found(
    command: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the balancer would find them at its start."""
    async with Fleet.test(1) as fleet:
        monkeypatch.setenv("BALANCER_DISCOVER", "env")
        monkeypatch.setenv("OLLAMA_HOST", fleet.urls[0])
        write(place)
        told = await asyncio.to_thread(command, "doctor")
    assert "No fault found: 1 of 1 hosts up" in told.stdout


def test_a_faulty_configuration(command: Command, place: Path) -> None:
    """Is the first finding, with exit code 3; a running balancer is looked at all the same."""
    (place / "ollama-balancer.yaml").write_text("backnds: [gpu1]\n")
    told = command("doctor")
    assert told.exit_code == ExitCode.CONFIG
    assert "ollama-balancer check ollama-balancer.yaml" in told.stdout
    assert command("doctor", "-c", "nowhere.yaml").exit_code == ExitCode.CONFIG


async def test_with_a_running_balancer(command: Command, place: Path) -> None:
    """Its hosts are asked, those that only it knows, too; its complaints are told."""
    async with Fleet.test(1) as fleet:
        breaker = {"state": "open", "reason": "3 failures", "retry_in_s": 1.0, "trips": 1}
        doc = document(url=fleet.urls[0], breaker=breaker, switch="active")
        with serving({"/_balancer/status": (200, doc)}) as stub:
            args = ("doctor", "--admin", f"127.0.0.1:{stub.port}", "--json")
            told = await asyncio.to_thread(command, *args)
    found = json.loads(told.stdout)
    assert [host["name"] for host in found["hosts"]] == ["gpu1"]
    assert found["balancer"] == f"http://127.0.0.1:{stub.port}"
    assert [finding["id"] for finding in found["findings"]] == ["breaker-open"]
    assert told.exit_code == ExitCode.OK


def test_a_balancer_that_was_named_and_is_not_there(command: Command) -> None:
    """Exit code 6; the hosts are asked all the same."""
    told = command("doctor", "--admin", f"127.0.0.1:{unused_port()}", "-b", "127.0.0.1:1")
    assert told.exit_code == ExitCode.NO_ADMIN
    assert "127.0.0.1:1" in told.stdout


async def test_a_balancer_that_wants_a_key(command: Command, place: Path) -> None:
    """Is told so, and the hosts are judged without it."""
    async with Fleet.test(1) as fleet:
        write(place, backends=fleet.urls)
        with serving({"/_balancer/status": (401, {"error": "a key is needed"})}) as stub:
            args = ("doctor", "--admin", f"127.0.0.1:{stub.port}")
            told = await asyncio.to_thread(command, *args)
    assert "a key is needed" in told.stdout
    assert told.stdout.startswith("WARNING")
    assert told.exit_code == ExitCode.OK


async def test_a_balancer_among_the_hosts(command: Command, place: Path) -> None:
    """Two in a row hinder each other."""
    with serving({"/api/version": (200, {"version": "1"})}) as stub:
        stub.answers["/_balancer/live"] = (200, {"live": True})
        stub.headers = {"X-Request-Id": "1"}
        write(place, backends=[f"127.0.0.1:{stub.port}"])
        told = await asyncio.to_thread(command, "doctor", "--json")
    assert "chain" in [finding["id"] for finding in json.loads(told.stdout)["findings"]]


async def test_a_bundle(command: Command, place: Path) -> None:
    """Holds what was told; a file that is there stays as it is."""
    async with Fleet.test(1) as fleet:
        write(
            place, backends=fleet.urls, auth={"keys": [{"name": "a", "role": "user", "key": KEY}]}
        )
        told = await asyncio.to_thread(command, "doctor", "--bundle", "b.zip")
        again = await asyncio.to_thread(command, "doctor", "--bundle", "b.zip")
        nowhere = await asyncio.to_thread(command, "doctor", "--bundle", "no/b.zip")
    assert "Written to b.zip" in told.stdout
    with zipfile.ZipFile(place / "b.zip") as opened:
        texts = {name: opened.read(name).decode() for name in opened.namelist()}
    assert json.loads(texts["doctor.json"])["ok"]
    assert KEY not in "".join(texts.values())
    for refused in (again, nowhere):
        assert refused.exit_code == ExitCode.FAILURE
        assert refused.stderr.count("\n") == 1


KEY = "0123456789abcdef0123"


def write(place: Path, **settings: Any) -> None:
    """A configuration that listens where nobody is."""
    wanted = {"server": {"listen": [f"127.0.0.1:{unused_port()}"]}, **settings}
    (place / "ollama-balancer.yaml").write_text(json.dumps(wanted))
