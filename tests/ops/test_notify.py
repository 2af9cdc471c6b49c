"""What systemd hears, and what never hurts us: against a socket as systemd's own."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from balancer.core.events import (
    ConfigApplied,
    ConfigRejected,
    Event,
    Mishap,
    Serving,
    Stopped,
    Stopping,
)
from balancer.ops.notify import Notify, Wanted, handed_over, wanted
from balancer.sim.loop import run

PID = 7
SERVING = Serving(1.0, ("http://127.0.0.1:1",), 1, 1)
STOPPING = Stopping(1.0, "SIGTERM", 0, 0)
EXTENSION = "EXTEND_TIMEOUT_USEC=30000000"


class Ear:
    """A notify socket: what arrived, each datagram as its lines."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.setblocking(False)

    def heard(self) -> list[list[str]]:
        """All since the last time."""
        found = []
        while True:
            try:
                found.append(self.socket.recv(4096).decode().split("\n"))
            except BlockingIOError:
                return found


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where the socket is."""
    return str(tmp_path / "n")


@pytest.fixture
def ear(path: str) -> Iterator[Ear]:
    """A listener there."""
    ear = Ear(path)
    yield ear
    ear.socket.close()


class Teller:
    """A `Notify` and what it emitted."""

    def __init__(self, address: str | None, watchdog_s: float | None = None) -> None:
        self.notify = Notify(Wanted(address, watchdog_s), lambda: 12.3456789)
        self.mishaps: list[Event] = []
        self.status = "all well"

    def beat(self, status: str | None = None) -> None:
        """Beat once, with that status from now on."""
        self.status = status or self.status
        self.notify.beat(lambda: self.status, self.mishaps.append)


@pytest.fixture
def teller(path: str) -> Iterator[Teller]:
    """Tells the listener, and answers a watchdog of thirty seconds."""
    teller = Teller(path, 30.0)
    yield teller
    teller.notify.close()


# -- what is wanted ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Wanted()),
        ({"WATCHDOG_USEC": "30000000"}, Wanted()),
        ({"NOTIFY_SOCKET": "vsock:2:1234"}, Wanted()),
        ({"NOTIFY_SOCKET": "/run/n"}, Wanted("/run/n")),
        ({"NOTIFY_SOCKET": "@n"}, Wanted("\0n")),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "500000"}, Wanted("/n", 0.5)),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "5", "WATCHDOG_PID": "7"}, Wanted("/n", 5e-6)),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "5", "WATCHDOG_PID": "8"}, Wanted("/n")),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "0"}, Wanted("/n")),
        ({"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "soon"}, Wanted("/n")),
    ],
)
def test_the_environment_says_what_systemd_wants(env: dict[str, str], expected: Wanted) -> None:
    """Another process's watchdog, and what makes no sense, is not ours."""
    assert wanted(env, PID) == expected


@pytest.mark.parametrize(("watchdog_s", "beat_s"), [(None, 3.0), (30.0, 3.0), (1.0, 0.5)])
def test_it_beats_at_least_twice_per_watchdog(watchdog_s: float | None, beat_s: float) -> None:
    """And often enough for a status that is worth reading."""
    assert Notify(Wanted(None, watchdog_s), lambda: 0.0).beat_s == beat_s


# -- stages --------------------------------------------------------------------------------


def test_a_life_in_messages(ear: Ear, teller: Teller) -> None:
    """Ready, reload taken over, reload refused, stopping; other events are nobody's business."""
    tell = teller.notify
    tell(Mishap(1.0, "x", "y"))
    tell(SERVING)
    tell.reloading()
    tell(ConfigApplied(1.0, (), ()))
    tell.reloading()
    tell(ConfigRejected(1.0, ("bad",)))
    tell(STOPPING)
    tell(Stopped(1.0, 0))
    reload = ["RELOADING=1", "MONOTONIC_USEC=12345678"]
    assert ear.heard() == [
        ["READY=1"],
        *(reload, ["READY=1"]) * 2,
        ["STOPPING=1", EXTENSION],
    ]


def test_a_reload_before_or_after_its_time_is_not_told(ear: Ear, teller: Teller) -> None:
    """RELOADING during a stop, or READY before the start has ended, would be lies."""
    teller.notify.reloading()
    teller.notify(ConfigApplied(1.0, (), ()))
    assert ear.heard() == []
    teller.notify(STOPPING)
    teller.notify.reloading()
    assert ear.heard() == [["STOPPING=1", EXTENSION]]


def test_a_reload_that_died_is_over_with_the_next_beat(ear: Ear, teller: Teller) -> None:
    """Else systemd would wait for its end until it kills us."""
    teller.notify(SERVING)
    teller.notify.reloading()
    ear.heard()
    teller.beat()
    assert ear.heard() == [["READY=1"], ["WATCHDOG=1", "STATUS=all well"]]


def test_an_abstract_socket(ear: Ear) -> None:
    """The form with @."""
    name = f"\0olb-test-{os.getpid()}"
    other = Ear(name)
    teller = Teller(name)
    teller.notify(SERVING)
    assert other.heard() == [["READY=1"]]
    assert ear.heard() == []
    teller.notify.close()
    other.socket.close()


# -- beats ---------------------------------------------------------------------------------


def test_the_status_is_told_when_it_changes(ear: Ear, teller: Teller) -> None:
    """Always on one line: a second one would be a message of its own."""
    teller.notify(SERVING)
    ear.heard()
    for status in ("1/1 up", "1/1 up", "0/1 up\nREADY=1"):
        teller.beat(status)
    assert ear.heard() == [
        ["WATCHDOG=1", "STATUS=1/1 up"],
        ["WATCHDOG=1"],
        ["WATCHDOG=1", "STATUS=0/1 up READY=1"],
    ]


def test_without_a_watchdog_only_news_are_told(ear: Ear, path: str) -> None:
    """No unit asked for more; and nobody answers one that is switched off."""
    off = Notify(Wanted(path, 30.0), lambda: 0.0, watchdog=False)
    for notify in (Teller(path).notify, off):
        for _ in range(2):
            notify.beat(lambda: "1/1 up", lambda _: None)
        assert ear.heard() == [["STATUS=1/1 up"]]
        notify.close()


def test_who_is_not_well_misses_the_watchdog(ear: Ear, teller: Teller) -> None:
    """The reason is shown and logged; when all is well again, so are the signs of life."""

    def stuck() -> str:
        raise RuntimeError("the queue stands still")

    teller.notify.beat(stuck, teller.mishaps.append)
    assert ear.heard() == [["STATUS=self-check failed: the queue stands still"]]
    assert [str(mishap) for mishap in teller.mishaps if "RuntimeError" in str(mishap)]
    teller.beat()
    assert ear.heard() == [["WATCHDOG=1", "STATUS=all well"]]


def test_a_drain_asks_for_more_time_with_each_beat(ear: Ear, teller: Teller) -> None:
    """As long as it lives: TimeoutStopSec need not know server.drain_timeout."""
    teller.notify(STOPPING)
    teller.beat()
    teller.beat()
    assert [EXTENSION in lines for lines in ear.heard()] == [True] * 3


def test_a_loop_that_stands_still_is_missed(ear: Ear, path: str) -> None:
    """Signs of life come from the event loop and from nowhere else."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        teller = Teller(path, 2.0)
        watching = loop.create_task(teller.notify.watch(lambda: "well", teller.mishaps.append))
        await asyncio.sleep(10.5)
        assert len(ear.heard()) == 11

        def wedge() -> None:
            before = loop.time()
            loop._selector.now += 60.0  # type: ignore[attr-defined]  # the virtual clock goes on
            assert loop.time() == before + 60.0
            assert ear.heard() == []

        loop.call_soon(wedge)
        await asyncio.sleep(5.0)
        assert 1 <= len(ear.heard()) <= 6
        watching.cancel()
        await asyncio.wait([watching])
        teller.notify.close()

    run(scenario())


# -- nothing of it hurts -------------------------------------------------------------------


def test_nobody_listens(path: str) -> None:
    """Without a socket nothing is opened; with one that is gone nothing fails."""
    silent = Teller(None)
    assert not silent.notify.is_heard
    gone = Teller(path, 1.0)
    assert gone.notify.is_heard
    for teller in (silent, gone):
        teller.notify(SERVING)
        teller.notify.reloading()
        teller.beat()
        teller.notify.close()
        teller.beat()
        assert teller.mishaps == []


def test_what_was_lost_is_told_again(path: str) -> None:
    """Ready and status reach a systemd that listens later, as after its own restart."""
    teller = Teller(path)
    teller.notify(SERVING)
    teller.beat()
    ear = Ear(path)
    teller.beat()
    assert ear.heard() == [["READY=1"], ["STATUS=all well"]]
    ear.socket.close()
    teller.notify.close()


def test_a_full_socket_delays_nobody(ear: Ear, teller: Teller) -> None:
    """A message more than it takes is dropped, not waited for."""
    for number in range(5000):
        teller.beat(str(number))
    assert 0 < len(ear.heard()) < 5000
    teller.beat()
    assert ear.heard() == [["WATCHDOG=1", "STATUS=4999"]]


# -- sockets that are handed over ----------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"LISTEN_PID": "8"},
        {"LISTEN_PID": ""},
        {"LISTEN_FDS": "x"},
        {"LISTEN_FDS": "0"},
        {"LISTEN_FDNAMES": "other:admin"},
    ],
)
def test_what_is_not_ours_is_left_alone(change: dict[str, str]) -> None:
    """Meant for another process, or not there at all."""
    env = {"LISTEN_PID": str(PID), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "api:admin"}
    assert handed_over("api", env | change, PID) == []


def test_sockets_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of one name, as copies: systemd's stay open, and a second look finds them again."""
    ours = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    placed = _side_by_side(ours)
    monkeypatch.setattr("balancer.ops.notify.FIRST_FD", placed[0])
    env = {"LISTEN_PID": str(PID), "LISTEN_FDS": "3", "LISTEN_FDNAMES": "api:admin:api"}
    for _ in range(2):
        found = handed_over("api", env, PID)
        assert [one.getsockname() for one in found] == [ours[at].getsockname() for at in (0, 2)]
        assert not any(os.get_inheritable(one.fileno()) for one in found)
        for one in found:
            one.close()
    without = {name: value for name, value in env.items() if name != "LISTEN_FDNAMES"}
    unnamed = handed_over("unknown", without, PID)
    assert len(unnamed) == 3
    for one in (*unnamed, *ours):
        one.close()
    for fd in placed:
        os.close(fd)


def _side_by_side(sockets: list[socket.socket]) -> list[int]:
    """Descriptors of these sockets that follow one another, where nobody else's are."""
    first = 200
    for at, one in enumerate(sockets):
        os.dup2(one.fileno(), first + at)
    return [first + at for at in range(len(sockets))]


def test_what_is_no_socket_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As OSError, like any address that cannot be had; the descriptor stays as it was."""
    reading, writing = os.pipe()
    monkeypatch.setattr("balancer.ops.notify.FIRST_FD", reading)
    env = {"LISTEN_PID": str(PID), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "api"}
    with pytest.raises(OSError):
        handed_over("api", env, PID)
    os.write(writing, b"x")
    assert os.read(reading, 1) == b"x"
    os.close(reading)
    os.close(writing)
