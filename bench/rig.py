"""The origin and the proxies before it as processes: on their cores, and ended by pid."""

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import machine
from peers import BUILD, PEERS, Peer, Place

START_S = 30.0
STOP_S = 5.0
CHAT = {"model": "bench:latest", "messages": [{"role": "user", "content": "hi"}], "stream": False}


class Died(RuntimeError):
    """A process that ended by itself or never answered, with the end of its log."""


class Process:
    """A program on a core of its own; its output goes into a file."""

    def __init__(self, argv: Sequence[str], core: int, directory: Path) -> None:
        self.log = directory / "output.log"
        self._directory = directory
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                machine.pinned(core, argv),
                cwd=directory,
                env=_environment(),
                stdin=subprocess.PIPE,  # the origin ends when it closes
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt is for us, and we end the others
            )
        self.pid = self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def pause(self, seconds: float) -> None:
        """Wait so long, or until it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def trim(self) -> None:
        """Empty its logs, which grow by hundreds of megabytes."""
        for path in self._directory.glob("*.log"):
            os.truncate(path, 0)

    def complaint(self) -> str:
        """The end of what it wrote."""
        return self.log.read_text(errors="replace")[-2000:]

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def stop(self) -> None:
        """End it, by force if need be; an interrupt spares us our lag for load balancers."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            if self.alive:
                self.send(number)
                self.pause(STOP_S)
        if self._process.stdin is not None:
            self._process.stdin.close()


class Running:
    """A proxy, or the origin itself where there is none between."""

    def __init__(self, name: str, port: int, process: Process) -> None:
        self.name = name
        self.port = port
        self.process = process

    @property
    def pid(self) -> int:
        """Of the process whose time counts, with its descendants."""
        return self.process.pid


class Rig:
    """The origin, and proxies before it that are started as they are asked for."""

    def __init__(self, directory: Path, token: str) -> None:
        self.cores = machine.Cores.of_machine()
        self.token = token
        self._directory = directory
        self._proxies: dict[str, Running] = {}
        self._count = 0
        port = _free_port()
        origin = Process([str(BUILD / "origin"), str(port)], self.cores.origin, self._new("origin"))
        self.origin = Running("direct", port, origin)
        try:
            self._until_ready(self.origin)
        except Died:
            origin.stop()
            raise

    def proxy(self, name: str, *, fresh: bool = False) -> Running:
        """
        Return a proxy that runs; "direct" is the origin.

        Args:
            name: A key of `PEERS`, or "direct".
            fresh: Not one that has run before.

        Raises:
            Died: It did not come up.
        """
        if name == "direct":
            return self.origin
        running = self._proxies.get(name)
        if running is not None and (fresh or not running.process.alive):
            running.process.stop()
            running = None
        if running is None:
            running = self._proxies[name] = self._start(PEERS[name])
            self._until_ready(running)
        return running

    def start(self, peer: Peer) -> Running:
        """
        Start a proxy of one's own making.

        Raises:
            Died: It did not come up.
        """
        running = self._proxies[peer.name] = self._start(peer)
        self._until_ready(running)
        return running

    def stop(self) -> None:
        """End everything."""
        for running in [*self._proxies.values(), self.origin]:
            running.process.stop()

    def _start(self, peer: Peer) -> Running:
        place = Place(_free_port(), self.origin.port, self._new(peer.name), self.token)
        process = Process(peer.command(place), self.cores.proxy, place.directory)
        return Running(peer.name, place.port, process)

    def _new(self, name: str) -> Path:
        self._count += 1
        directory = self._directory / f"{name}-{self._count}"
        directory.mkdir()
        return directory

    def _until_ready(self, running: Running) -> None:
        """Wait until list and chat come through."""
        until = time.monotonic() + START_S
        while time.monotonic() < until and running.process.alive:
            if all(
                self.answers(running.port, *call) for call in (("/api/tags",), ("/api/chat", CHAT))
            ):
                return
            running.process.pause(0.1)
        running.process.stop()
        raise Died(f"{running.name} did not come up: {running.process.complaint()}")

    def answers(self, port: int, path: str, body: object = None) -> bool:
        """Whether a call comes back with 200."""
        headers = {"Authorization": f"Bearer {self.token}"}
        try:
            return bool(ask(port, path, body, headers))
        except (OSError, http.client.HTTPException):
            return False


def ask(
    port: int, path: str, body: object = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """
    Call, with a body as JSON; the answer's body, empty unless its status is 200.

    Raises:
        OSError, http.client.HTTPException: Nothing came back.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        data = None if body is None else json.dumps(body)
        connection.request("GET" if data is None else "POST", path, data, dict(headers or {}))
        answer = connection.getresponse()
        text = answer.read()
        return text if answer.status == 200 else b""
    finally:
        connection.close()


def _environment() -> dict[str, str]:
    """Return ours, without settings for a balancer."""
    return {name: text for name, text in os.environ.items() if not name.startswith("BALANCER_")}


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port
