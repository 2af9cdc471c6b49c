"""Real processes for benchmarks: simulated hosts and a balancer, on loopback, ended by pid."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import aiohttp

from balancer.sim.storm import MODELS, warm_up

HERE = Path(__file__).parent


class SimHost:
    """A simulated host in a process of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.url = ""
        self.port = 0
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it, on the port it had before if it had one."""
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(HERE / "sim_host.py"),
            "--name",
            self.name,
            "--port",
            str(self.port),
            stdin=pipe,
            stdout=pipe,
        )
        assert self._process.stdout is not None
        self.url = (await self._process.stdout.readline()).decode().strip()
        self.port = int(self.url.rpartition(":")[2])

    def tell(self, *words: Any) -> None:
        """Call a method of its faults, with arguments."""
        assert self._process is not None
        assert self._process.stdin is not None
        line = "\t".join([str(words[0]), *(json.dumps(word) for word in words[1:])])
        self._process.stdin.write(line.encode() + b"\n")

    async def stats(self) -> dict[str, Any]:
        """What it counted."""
        assert self._process is not None
        assert self._process.stdout is not None
        self.tell("stats")
        found: dict[str, Any] = json.loads(await self._process.stdout.readline())
        return found

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        """End it without a word."""
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def stop(self) -> None:
        """End it if it still runs."""
        if self._process is not None and self._process.returncode is None:
            self.send(signal.SIGCONT)
            await self.kill()


class Rig:
    """Three hosts and a balancer."""

    def __init__(self, settings: Mapping[str, str] | None = None, hosts: int = 3) -> None:
        self.hosts = [SimHost(name) for name in "abcdefgh"[:hosts]]
        self.url = ""
        self._settings = dict(settings or {})
        self._process: asyncio.subprocess.Process | None = None
        self._log = tempfile.NamedTemporaryFile(  # noqa: SIM115 - lives as long as the rig
            "w+", suffix=".log", delete=False
        )

    async def __aenter__(self) -> Self:
        for host in self.hosts:
            await host.start()
        await warm_up([host.url for host in self.hosts], MODELS[:2])
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        names = " ".join(host.url for host in self.hosts)
        env = {**os.environ, "BALANCER_BACKENDS": names, **self._settings}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "balancer",
            "serve",
            "--listen",
            f"127.0.0.1:{port}",
            env=env,
            stdout=self._log,
            stderr=self._log,
        )
        await self._until_ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGINT)
            self._process.send_signal(signal.SIGINT)
            try:
                async with asyncio.timeout(10):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
        for host in self.hosts:
            await host.stop()

    @property
    def log(self) -> str:
        """What the balancer wrote."""
        return Path(self._log.name).read_text()

    async def _until_ready(self) -> None:
        async with aiohttp.ClientSession() as session:
            for _ in range(100):
                try:
                    async with session.get(f"{self.url}/_balancer/ready") as response:
                        if response.status == 200:
                            await asyncio.sleep(1.0)
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.1)
        raise RuntimeError(f"the balancer did not come up: {self.log}")

    async def status(self) -> dict[str, Any]:
        """Its status document."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.url}/_balancer/status") as response,
        ):
            found: dict[str, Any] = await response.json()
            return found

    async def failures(self, backend: str) -> dict[str, int]:
        """Attempts on a backend that came to nothing, by verdict."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.url}/metrics") as response,
        ):
            text = await response.text()
        found: dict[str, int] = {}
        for line in text.splitlines():
            if line.startswith("ollama_balancer_upstream_errors_total{") and backend in line:
                verdict = re.search('verdict="([^"]+)"', line)
                if verdict is not None:
                    found[verdict[1]] = int(float(line.rpartition(" ")[2]))
        return found


def quantile(values: Sequence[float], share: float) -> float:
    """That quantile, nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
