"""
A headless Chromium, and what it looks at in a thread of its own so that the browser can be driven.

    with behind(lambda: running(2)) as stage, browsing() as browser:
        browser.get(stage.scene.url + "/_balancer/")
        stage.do(lambda rig: rig.fleet["a"].faults.refuse())
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

from tests import needs

S = TypeVar("S")
T = TypeVar("T")
LIMIT_S: Final = 60.0  # generous: the machine may be busy
FLAGS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


@dataclass(slots=True)
class Stage(Generic[S]):
    """Something in the loop of another thread."""

    scene: S
    loop: asyncio.AbstractEventLoop

    def wait(self, asked: Callable[[S], Coroutine[Any, Any, T]]) -> T:
        """Have the loop do it; what came of it."""
        return asyncio.run_coroutine_threadsafe(asked(self.scene), self.loop).result(LIMIT_S)

    def do(self, asked: Callable[[S], T]) -> T:
        """The same for what needs no waiting."""

        async def done(scene: S) -> T:
            return asked(scene)

        return self.wait(done)


@contextmanager
def behind(make: Callable[[], AbstractAsyncContextManager[S]]) -> Iterator[Stage[S]]:
    """What *make* makes, in real time; a failure at its end is raised here."""
    ready, over = threading.Event(), threading.Event()
    told: list[Stage[S]] = []
    failed: list[BaseException] = []

    async def play() -> None:
        async with make() as scene:
            told.append(Stage(scene, asyncio.get_running_loop()))
            ready.set()
            while not over.is_set():
                await asyncio.sleep(0.05)

    def run() -> None:
        try:
            asyncio.run(play())
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            failed.append(error)
        ready.set()

    thread = threading.Thread(target=run, name="backstage")
    thread.start()
    try:
        ready.wait(LIMIT_S)
        if failed:
            raise failed[0]
        yield told[0]
    finally:
        over.set()
        thread.join(LIMIT_S)
    if failed:
        raise failed[0]


@contextmanager
def browsing(*more: str) -> Iterator[webdriver.Chrome]:
    """A browser with a profile of its own, which is removed again."""
    options = Options()
    options.binary_location = needs.program("chromium", "chromium-browser", "google-chrome")
    service = Service(needs.program("chromedriver"))
    profile = tempfile.mkdtemp(prefix="browser-")
    for flag in (*FLAGS, f"--user-data-dir={profile}", *more):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        browser = webdriver.Chrome(options=options, service=service)
        try:
            yield browser
        finally:
            browser.quit()
    finally:
        shutil.rmtree(profile, ignore_errors=True)


def until(browser: webdriver.Chrome, script: str, *given: object) -> Any:
    """Wait until a JavaScript expression is true; its value."""
    patience = WebDriverWait(browser, LIMIT_S, poll_frequency=0.05)
    return patience.until(
        lambda b: b.execute_script(f"return {script}", *given), f"never came true: {script}"
    )


def sized(browser: webdriver.Chrome, width: int, height: int = 900, scale: float = 1.0) -> None:
    """Give the page so many CSS pixels."""
    size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def coloured(browser: webdriver.Chrome, scheme: str) -> None:
    """Prefer ``light`` or ``dark``."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
