"""
A balancer to watch: a simulated fleet before it, real clients behind it, and a count of it all.

    async with Demo(sock=sock, tell=print) as demo:
        await demo.run(30.0)
    demo.tally.complaints(full=True)

The host `flaky` refuses new calls from second 8 to 16, and again each minute after; running ones
end in peace. So no call may fail: whoever comes meanwhile is served elsewhere.
"""

import asyncio
import random
import socket
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Self

from ollama import AsyncClient

from balancer.app import Balancer
from balancer.config import Config, load
from balancer.core.domain import BreakerState, Verdict
from balancer.core.events import (
    AttemptEnded,
    BreakerMoved,
    Event,
    HealthFlipped,
    LeaseGranted,
    LoadEnded,
    LoadStarted,
    Mishap,
)
from balancer.sim.fleet import PREFIX, Fleet

HEADERS: Final = {"X-Balancer-Demo": "1"}
FULL_S: Final = 25.0  # by then the flaky host has died, come back, and served again
CHAT: Final = "demo/haiku"
EMBED: Final = "demo/embed"
FLAKY: Final = "flaky"
PATIENCE_S: Final = 20.0
LAST_CALLS_S: Final = 1.0  # for calls that run when the demo's time is over; then they are cut
REASONS: Final = 5  # told at the end

_PROMPTS: Final = (
    "Write a haiku about the sea.",
    "A haiku about a dropped packet.",
    "Three lines on patience, please.",
    "What does the lighthouse say?",
)
_SETTINGS: Final = {
    "breaker.host.backoff_max": "3s",
    "server.drain_timeout": "10s",
    "demo.enabled": True,
}


@dataclass(slots=True)
class Tally:
    """What happened so far; `done` and `running` by host."""

    calls: int = 0
    failed: int = 0
    failovers: int = 0
    opened: int = 0
    closed: int = 0
    mishaps: int = 0
    has_died: bool = False
    is_back: bool = False
    has_served_again: bool = False
    reasons: deque[str] = field(default_factory=lambda: deque(maxlen=REASONS))
    done: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line."""
        return (
            f"{self.calls} calls, {self.failed} failed, {self.failovers} failovers, "
            f"breakers opened {_times(self.opened)} and closed {_times(self.closed)}"
        )

    def complaints(self, *, full: bool) -> list[str]:
        """What went wrong; *full*: it ran long enough for a host to die and to come back."""
        found = [f"a call failed: {reason}" for reason in self.reasons]
        if self.failed > len(self.reasons):
            found.append(f"and {self.failed - len(self.reasons)} more calls failed")
        if not self.calls:
            found.append("no call was made")
        if self.mishaps:
            found.append(f"mishaps in the balancer: {self.mishaps}")
        if full and not self.has_died:
            found.append(f"{FLAKY} never died")
        if full and self.has_died and not self.has_served_again:
            found.append(f"{FLAKY} never came back into use")
        return found


class Demo:
    """
    Everything together. Enter it to start, `run` it, leave it to stop.

    Args:
        sock: Bound, on loopback: answers are made up, so nobody else may ask.
        tell: Gets one line for people per thing that happens.
    """

    def __init__(
        self,
        *,
        sock: socket.socket,
        hosts: int = 3,
        seed: int = 0,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.tally = Tally()
        self.news: deque[str] = deque(maxlen=8)
        self._sock = sock
        self._seed = seed
        self._rng = random.Random(seed)
        self._tell = tell
        self._fleet = Fleet.demo(hosts=hosts, emit=self._befell)
        self._stack = AsyncExitStack()
        self._leaving = asyncio.Event()
        self._began_at = 0.0
        self.balancer: Balancer

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._fleet)
        self._began_at = asyncio.get_running_loop().time()
        self.balancer = Balancer(
            self._config(),
            sockets=[self._sock],
            seed=self._seed,
            subscribers=[self._heard],
            extra_headers=HEADERS,
        )
        await self.balancer.start()
        self._stack.push_async_callback(self.balancer.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _config(self) -> Config:
        """Made from nothing but this: an environment for real hosts must not reach the demo."""
        host, port = self._sock.getsockname()[:2]
        hosts = [{"name": host.name, "url": host.url} for host in self._fleet]
        told = {"server.listen": [f"{host}:{port}"], "backends": hosts}
        return load("", {}, overrides=_SETTINGS | told)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return asyncio.get_running_loop().time() - self._began_at

    def stop(self) -> None:
        """Begin no more calls, and let those that run end soon."""
        self._leaving.set()

    async def run(self, seconds: float | None = None) -> None:
        """Make calls for so long, or until `stop`; who is then left waiting hangs up."""
        async with asyncio.TaskGroup() as group:
            callers = [group.create_task(caller) for caller in self._callers()]
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._leaving.wait()
            self._leaving.set()
            await asyncio.wait(callers, timeout=LAST_CALLS_S)
            for caller in callers:
                caller.cancel()

    # -- traffic -------------------------------------------------------------------------------

    def _callers(self) -> list[Coroutine[Any, Any, None]]:
        kinds = (self._chat_stream, self._chat, self._generate_stream, self._generate, self._embed)
        count = 4 * len(self._fleet)
        return [self._call_again_and_again(kinds[i % len(kinds)]) for i in range(count)]

    async def _call_again_and_again(self, call: Callable[[AsyncClient], Any]) -> None:
        host, port = self._sock.getsockname()[:2]
        async with AsyncClient(host=f"http://{host}:{port}", trust_env=False) as client:
            while not self._leaving.is_set():
                await self._count(call(client))
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._rng.uniform(0.05, 0.4)):
                        await self._leaving.wait()

    async def _count(self, call: Coroutine[Any, Any, bool]) -> None:
        self.tally.calls += 1
        try:
            async with asyncio.timeout(PATIENCE_S):
                reason = None if await call else "an answer without its end"
        except Exception as error:  # noqa: BLE001 - whatever a client may see is a failed call
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            self.tally.failed += 1
            self.tally.reasons.append(reason)
            self._say(f"a call failed: {reason}")

    def _asked(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self._rng.choice(_PROMPTS)}]

    async def _chat(self, client: AsyncClient) -> bool:
        told = await client.chat(model=CHAT, messages=self._asked())
        return bool(told.done) and (told.message.content or "").startswith(PREFIX)

    async def _chat_stream(self, client: AsyncClient) -> bool:
        parts = await client.chat(model=CHAT, messages=self._asked(), stream=True)
        return await _is_whole(part.done async for part in parts)

    async def _generate(self, client: AsyncClient) -> bool:
        told = await client.generate(model=CHAT, prompt=self._rng.choice(_PROMPTS))
        return bool(told.done) and (told.response or "").startswith(PREFIX)

    async def _generate_stream(self, client: AsyncClient) -> bool:
        prompt = self._rng.choice(_PROMPTS)
        parts = await client.generate(model=CHAT, prompt=prompt, stream=True)
        return await _is_whole(part.done async for part in parts)

    async def _embed(self, client: AsyncClient) -> bool:
        told = await client.embed(model=EMBED, input=self._rng.choice(_PROMPTS))
        return len(told.embeddings) == 1

    # -- what happens --------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        line = f"[{self.elapsed_s:5.1f} s] {text}"
        self.news.append(line)
        self._tell(line)

    def _befell(self, trouble: str) -> None:
        """One line of the fleet's script."""
        host, what = trouble.split(maxsplit=1)
        words = {"refuse": "dies: it refuses new calls", "heal": "is back"}
        self._say(f"{host} {words.get(what, what)}")
        if what == "heal":
            self.tally.is_back = True

    def _heard(self, event: Event) -> None:
        """One event of the balancer."""
        tally = self.tally
        match event:
            case AttemptEnded(backend=backend, outcome=outcome):
                if outcome.verdict is Verdict.OK:
                    tally.done[backend] += 1
                    tally.has_served_again |= tally.is_back and backend == FLAKY
                elif outcome.verdict not in (Verdict.GONE, Verdict.STOPPED):
                    self._say(f"an attempt on {backend} failed: {outcome.text}")
            case LeaseGranted(attempt=attempt, backend=backend) if attempt > 1:
                tally.failovers += 1
                self._say(f"the call goes on to {backend}")
            case BreakerMoved(model=None):
                self._breaker_moved(event)
            case HealthFlipped(backend=backend, up=up, reason=reason):
                tally.has_died |= not up and backend == FLAKY
                self._say(f"checks: {backend} is {'up' if up else 'down'} ({reason})")
            case LoadStarted(backend=backend, model=model):
                self._say(f"{backend} loads {model}")
            case LoadEnded(ok=False) if self._leaving.is_set():
                pass  # stopped by us
            case LoadEnded(backend=backend, model=model, ok=ok, load_s=load_s, text=text):
                ended = (
                    f"has loaded {model} in {load_s:.1f} s"
                    if ok
                    else f"cannot load {model}: {text}"
                )
                self._say(f"{backend} {ended}")
            case Mishap(where=where, error=error):
                tally.mishaps += 1
                self._say(f"mishap in {where}: {error}")

    def _breaker_moved(self, event: BreakerMoved) -> None:
        match event.new:
            case BreakerState.OPEN:
                self.tally.opened += event.old is BreakerState.CLOSED
                self.tally.has_died |= event.backend == FLAKY
                told = f"opens ({event.reason}), trial in {event.retry_in_s:.1f} s"
            case BreakerState.CLOSED:
                self.tally.closed += 1
                told = "closes"
            case _:
                told = "lets a trial through"
        self._say(f"the breaker of {event.backend} {told}")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


async def _is_whole(ends: AsyncIterator[bool | None]) -> bool:
    """Whether the last record came, and came last."""
    told = [end async for end in ends]
    return bool(told) and told[-1] is True
