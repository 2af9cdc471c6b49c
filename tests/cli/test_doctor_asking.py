"""Asking hosts and this machine, as `doctor` does: simulated hosts, and ports where nobody is."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from aiohttp.test_utils import unused_port

from balancer.cli import client, doctor_asking
from balancer.cli.doctor_asking import Door, _unit, ask, ask_all, machine
from balancer.cli.doctor_facts import Host, Trouble
from balancer.config import Listen
from balancer.sim.fleet import Fleet
from balancer.sim.host import Settings
from tests.sim.wire import ask as post

from .stub import serving

LIMIT_S = 10.0
WALL = time.time  # noqa: TID251 - hosts tell the real time


def asked(url: str, limit_s: float = LIMIT_S, **more: str) -> Host:
    """What one host says."""
    door = Door("a", url, headers=tuple(more.items()))
    return ask(door, limit_s, time.monotonic, WALL)


async def test_a_host_that_is_well() -> None:
    """Version, models and what is loaded, in which context and for how long."""
    async with Fleet.test(1, settings=Settings(vram_bytes=0)) as fleet:
        body = {"model": "llama3.2", "prompt": "", "keep_alive": -1}
        loaded = await post(fleet["a"].port, "POST", "/api/generate", body)
        assert loaded.status == 200
        host = await asyncio.to_thread(asked, fleet.urls[0])
    assert (host.up, host.version, len(host.models)) == (True, "0.33.0", 5)
    assert all(model.digest and model.modified_at for model in host.models)
    (model,) = host.loaded
    assert (model.name, model.context, model.vram_bytes) == ("llama3.2:latest", 4096, 0)
    assert model.size_bytes > 0
    assert model.left_s is not None
    assert model.left_s > 1e9
    assert host.ahead_s is not None
    assert host.is_here
    assert not host.is_balancer


async def test_hosts_are_asked_at_once_and_told_in_order() -> None:
    """One that hangs does not hold the others up, and is not waited for without end."""
    async with Fleet.test(3) as fleet:
        fleet["b"].faults.hang()
        doors = [Door(host.name, host.url) for host in fleet]
        hosts = await asyncio.to_thread(ask_all, doors, 0.3, time.monotonic, WALL)
    assert [(host.name, host.trouble) for host in hosts] == [
        ("a", None),
        ("b", Trouble.SILENT),
        ("c", None),
    ]
    assert "0.3 s" in hosts[1].told


def test_a_host_that_dribbles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit for each reading is none for the whole; there is one for that, too."""
    times = iter([0.0, 1e6, 1e6])
    monkeypatch.setattr(doctor_asking, "ask", lambda *_: asyncio.run(asyncio.sleep(0)))
    (host,) = ask_all([Door("a", "http://a:1")], 1.0, lambda: next(times), WALL)
    assert host.trouble is Trouble.SILENT


def test_a_port_where_nobody_is() -> None:
    """Refused, by this machine."""
    host = asked(f"http://127.0.0.1:{unused_port()}")
    assert (host.trouble, host.told) == (Trouble.REFUSED, "cannot connect: connection refused")
    assert host.is_here
    assert not host.on_loopback


def test_an_ollama_on_loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused under another address of this machine, while loopback answers."""
    with serving(
        {"/": (200, "Ollama is running"), "/api/version": (200, {"version": "1"})}
    ) as stub:
        port = unused_port()
        monkeypatch.setattr(doctor_asking, "_resolve", lambda _: frozenset({"127.0.0.1"}))
        monkeypatch.setattr(
            client,
            "occupant",
            lambda host, asked: f"an Ollama server at {host}:{asked}" if stub.port else "",
        )
        # 127.0.0.2 is loopback, too; under a name it is not known to be.
        monkeypatch.setattr(Host, "is_loopback", property(lambda _: False))
        host = asked(f"http://127.0.0.2:{port}")
    assert host.trouble is Trouble.REFUSED
    assert host.on_loopback


def test_a_name_that_nobody_knows() -> None:
    """It has no address."""
    host = asked("http://gpu1.invalid:11434")
    assert host.trouble is Trouble.NAME
    assert host.told.startswith("no address: ")


def test_a_host_without_tls_where_tls_is_asked_for() -> None:
    """Its certificate is not good, for it has none."""
    with serving({}) as stub:
        host = asked(f"https://127.0.0.1:{stub.port}")
    assert host.trouble in (Trouble.TLS, Trouble.GARBLED, Trouble.REFUSED)


@pytest.mark.parametrize(
    ("answer", "trouble"),
    [
        ((401, {}), Trouble.CREDENTIAL),
        ((403, {}), Trouble.CREDENTIAL),
        ((404, "nothing here"), Trouble.STRANGER),
        ((200, {"hello": 1}), Trouble.STRANGER),
        ((200, [1]), Trouble.STRANGER),
    ],
)
def test_a_host_that_is_no_ollama(answer: tuple[int, object], trouble: Trouble) -> None:
    """By what it says to the first question."""
    with serving({"/api/version": answer}) as stub:
        host = asked(f"http://127.0.0.1:{stub.port}")
    assert host.trouble is trouble
    assert len(stub.asked) == 1


def test_a_server_that_speaks_no_http() -> None:
    """Is told so; nothing is raised."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def talk() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail.example.org ESMTP\r\n")

        thread = threading.Thread(target=talk)
        thread.start()
        host = asked(f"http://127.0.0.1:{port}")
        thread.join()
    assert host.trouble is Trouble.GARBLED


def test_headers_and_prefix_of_the_backend_are_used() -> None:
    """It is asked as the balancer would ask it."""
    answers = {f"/ollama/api/{path}": (200, {"version": "1"}) for path in ("version", "tags", "ps")}
    with serving({**answers}) as stub:
        host = asked(f"http://127.0.0.1:{stub.port}/ollama", Authorization="Bearer t")
    assert host.up
    assert {authorization for *_, authorization in stub.asked} == {"Bearer t"}


def test_malformed_rows_are_left_out() -> None:
    """A host may say what it likes."""
    rows = {"models": [{"name": "m", "size": "big", "expires_at": "soon"}, {"name": 1}, 7]}
    answers: dict[str, tuple[int, object]] = {
        "/api/version": (200, {"version": "1"}),
        "/api/tags": (200, {"models": None}),
        "/api/ps": (200, rows),
    }
    with serving(answers) as stub:
        host = asked(f"http://127.0.0.1:{stub.port}")
    assert host.models == ()
    (loaded,) = host.loaded
    assert (loaded.size_bytes, loaded.left_s, loaded.context) == (0, None, None)


def test_who_has_our_port() -> None:
    """Only if it is not the balancer; ports of unix sockets and of nobody are left out."""
    with serving({"/": (200, "hello")}) as stub:
        ours = Listen("127.0.0.1", stub.port)
        listen = [ours, Listen("", 0, "/run/x.sock"), Listen("127.0.0.1", unused_port())]
        there = machine({}, listen, served=False)
        assert there.occupants == {str(ours): "another program"}
        assert machine({}, listen, served=True).occupants == {}
    assert there.python >= (3, 11)
    assert there.open_files is None or there.open_files > 0


def test_the_unit_and_what_was_added_to_it(tmp_path: Path) -> None:
    """Read from wherever it is; none is None."""
    assert _unit([str(tmp_path)]) is None
    (tmp_path / "ollama-balancer.service").write_text("[Service]\nType=exec\n")
    (tmp_path / "ollama-balancer.service.d").mkdir()
    (tmp_path / "ollama-balancer.service.d" / "override.conf").write_text("WatchdogSec=30s\n")
    told = _unit([os.fspath(tmp_path)])
    assert told is not None
    assert "Type=exec" in told
    assert "WatchdogSec=30s" in told
