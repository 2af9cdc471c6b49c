# ruff: noqa: INP001 - a script, no package
"""
Pictures of the status page, of a simulated fleet in trouble: ``python -m docs.pictures [FOLDER]``.

Needs Chromium and its driver (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import aiohttp

from balancer.app import Balancer
from balancer.config import load
from balancer.sim.fleet import Fleet
from balancer.sim.host import GIB, SimModel
from balancer.sim.ollama import SimOllama
from tests.browser import behind, browsing, coloured, sized, until

SHOTS: Final = (
    ("status-page.png", "light", 1280, 1060),
    ("status-page-dark.png", "dark", 1280, 1060),
)
MODELS: Final = (
    SimModel("llama3.2:3b", endless=True, words=(" and", " so", " on"), load_s=0.2),
    SimModel(
        "qwen3:8b", size_bytes=5 * GIB, endless=True, words=(" well", " then", " now"), load_s=0.2
    ),
    SimModel("nomic-embed-text", size_bytes=GIB // 4, capabilities=("embedding",)),
    SimModel("mistral-small:24b", size_bytes=14 * GIB, load_s=0.2),
)
HAVE: Final = {"attic": (0, 1, 2), "cellar": (0, 2), "studio": (0, 1, 3), "workshop": (0, 1)}


class Scene:
    """A fleet, a balancer before it, and calls that go on as long as anybody looks."""

    def __init__(self, fleet: Fleet, balancer: Balancer, session: aiohttp.ClientSession) -> None:
        self.fleet, self.balancer, self.session = fleet, balancer, session
        self.url = balancer.addresses[0]
        self._calls: list[asyncio.Task[bytes]] = []

    async def post(self, path: str, **body: object) -> bytes:
        """Ask, and read all of the answer."""
        async with self.session.post(f"{self.url}{path}", json=body) as answer:
            return await answer.read()

    async def begin(self, model: str) -> None:
        """A call that does not end by itself."""
        call = self.post("/api/generate", model=model, prompt="go on")
        self._calls.append(asyncio.get_running_loop().create_task(call))
        await until_true(lambda: self.balancer.pool.running >= len(self._calls))

    async def end(self) -> None:
        """End those calls."""
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)


async def until_true(told: Callable[[], bool]) -> None:
    """Wait for it; fails after half a minute."""
    async with asyncio.timeout(30.0):
        while not told():
            await asyncio.sleep(0.05)


async def trouble(scene: Scene) -> None:
    """A host at work, one that drains, one with a broken model, one that has died."""
    fleet, pool, state = scene.fleet, scene.balancer.pool, scene.balancer.admin.state
    await until_true(lambda: all(each["models"] for each in state()["backends"]))
    for model in ("llama3.2:3b", "qwen3:8b", "llama3.2:3b"):
        await scene.begin(model)
    await scene.post("/api/embed", model="nomic-embed-text", input="a few words")
    fleet["studio"].faults.fail("mistral-small:24b", "CUDA error: out of memory")
    await scene.post("/api/generate", model="mistral-small:24b", prompt="hello", stream=False)
    await scene.post("/_balancer/backends/cellar/drain")
    fleet["workshop"].faults.refuse()
    await until_true(lambda: not pool.members["workshop"].health.up)


@asynccontextmanager
async def scenery() -> AsyncIterator[Scene]:
    """The whole, in trouble."""
    hosts = [
        SimOllama([MODELS[n] for n in have], name=name, seed=n)
        for n, (name, have) in enumerate(HAVE.items())
    ]
    async with Fleet(hosts) as fleet, aiohttp.ClientSession() as session:
        told = {
            "server.listen": ["127.0.0.1:0"],
            "server.drain_timeout": 0,
            "health.interval": "1s",
            "breaker.model.in_a_row": 1,
            "backends": [{"name": host.name, "url": host.url, "slots": 2} for host in fleet],
        }
        balancer = Balancer(load("", {}, overrides=told), seed=1)
        await balancer.start()
        scene = Scene(fleet, balancer, session)
        try:
            await trouble(scene)
            yield scene
        finally:
            await scene.end()
            await balancer.close()


def main(folder: Path) -> None:
    """Take them all."""
    with behind(scenery) as stage, browsing("--force-color-profile=srgb") as browser:
        browser.get(f"{stage.scene.url}/_balancer/")
        until(browser, "document.querySelector('#link').dataset.link === 'live'")
        for name, scheme, width, height in SHOTS:
            coloured(browser, scheme)
            sized(browser, width, height)
            until(browser, "innerWidth === arguments[0]", width)
            browser.save_screenshot(str(folder / name))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
