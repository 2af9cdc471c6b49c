"""
Seeded callers: arrivals, prompts, and what became of each call as its client saw it.

A call is *lost* if it failed before its first record, *cut* if it failed after that; a cut is
*silent* if nothing told the client so. The callers speak plain HTTP and judge as a careful client
would; they know nothing of what stands between them and the hosts.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import aiohttp

PATHS = ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True, slots=True)
class Plan:
    """What one caller asks.

    `abort_after` records it hangs up, None: never; 0: before the first.
    """

    path: str
    model: str
    stream: bool
    prompt: str
    tokens: int
    abort_after: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The request's body."""
        limits: dict[str, Any] = (
            {"max_tokens": self.tokens}
            if self.path.startswith("/v1/")
            else {"options": {"num_predict": self.tokens}}
        )
        asked: dict[str, Any] = {"prompt": self.prompt}
        if "chat" in self.path:
            asked = {"messages": [{"role": "user", "content": self.prompt}]}
        return {"model": self.model, "stream": self.stream, **asked, **limits}


@dataclass(slots=True)
class Seen:
    """What became of one call.

    `fate`: ok, lost, cut (told inside the answer), silent (cut and not told), gone (it hung up).
    Instants are the loop's.
    """

    plan: Plan
    began_at: float
    fate: str = "lost"
    status: int = 0
    first_at: float | None = None
    ended_at: float = 0.0
    records: int = 0
    backend: str = ""
    attempts: int = 0
    text: str = ""


@dataclass(slots=True)
class Tally:
    """All calls of one run."""

    seen: list[Seen] = field(default_factory=list)

    def fates(self) -> Counter[str]:
        """How many met which end."""
        return Counter(each.fate for each in self.seen)

    def first_s(self, share: float) -> float:
        """That quantile of the time to the first record, seconds."""
        waits = sorted(s.first_at - s.began_at for s in self.seen if s.first_at is not None)
        return waits[min(len(waits) - 1, int(share * len(waits)))] if waits else 0.0


class Traffic:
    """
    Poisson arrivals at `rate` calls a second on `url`, over `paths` and `models` in turn by chance.

    Args:
        limit_s: A call that takes longer counts as lost or cut.
        tell: Hears of each call as it ends.
    """

    def __init__(
        self,
        url: str,
        models: Sequence[str],
        *,
        rate: float,
        seed: int = 0,
        paths: Sequence[str] = PATHS,
        tokens: int = 12,
        limit_s: float = 120.0,
        abort_share: float = 0.0,
        tell: Callable[[Seen], None] = lambda _: None,
    ) -> None:
        self._url = url
        self._models = models
        self._paths = paths
        self._rate = rate
        self._rng = Random(seed)
        self._tokens = tokens
        self._limit_s = limit_s
        self._abort_share = abort_share
        self._tell = tell
        self._stopped = False
        self.tally = Tally()

    def stop(self) -> None:
        """No more arrivals."""
        self._stopped = True

    def plan(self) -> Plan:
        """What the next caller asks."""
        rng = self._rng
        abort = rng.randrange(4) if rng.random() < self._abort_share else None
        return Plan(
            rng.choice(list(self._paths)),
            rng.choice(list(self._models)),
            rng.random() < 0.5,
            f"question {rng.randrange(10_000)}: what is a breaker?",
            self._tokens,
            abort,
        )

    async def run(self, seconds: float) -> Tally:
        """Calls for so long; returns when all have ended."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + seconds
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            asyncio.TaskGroup() as group,
        ):
            while loop.time() < ends_at and not self._stopped:
                group.create_task(self._call(session, self.plan()))
                await asyncio.sleep(self._rng.expovariate(self._rate))
        return self.tally

    async def _call(self, session: aiohttp.ClientSession, plan: Plan) -> None:
        loop = asyncio.get_running_loop()
        seen = Seen(plan, loop.time())
        try:
            async with asyncio.timeout(self._limit_s):
                await self._ask(session, plan, seen)
        except TimeoutError:
            seen.fate = "silent" if seen.records else "lost"
            seen.text = "no end in time"
        except (aiohttp.ClientError, OSError) as error:
            # A broken body is something a client sees: its library raises.
            seen.fate = "cut" if seen.records else "lost"
            seen.text = f"{type(error).__name__}: {error}"
        seen.ended_at = loop.time()
        self.tally.seen.append(seen)
        self._tell(seen)

    async def _ask(self, session: aiohttp.ClientSession, plan: Plan, seen: Seen) -> None:
        async with session.post(self._url + plan.path, json=plan.body) as response:
            seen.status = response.status
            seen.backend = response.headers.get("X-Balancer-Backend", "")
            seen.attempts = int(response.headers.get("X-Balancer-Attempts", "0"))
            if plan.abort_after == 0:
                seen.fate = "gone"
                return
            if response.status != 200:
                seen.text = (await response.text())[:300]
                return
            if not plan.stream:
                self._whole(seen, await response.read())
            else:
                await self._stream(plan, seen, response)

    def _whole(self, seen: Seen, body: bytes) -> None:
        seen.first_at = asyncio.get_running_loop().time()
        told = json.loads(body)
        seen.records = 1
        whole = told.get("done") is True or "choices" in told
        seen.fate = "ok" if whole else "silent"

    async def _stream(self, plan: Plan, seen: Seen, response: aiohttp.ClientResponse) -> None:
        kept, last, error = b"", b"", ""
        async for data in response.content.iter_any():
            *lines, kept = (kept + data).split(b"\n")
            for line in filter(None, lines):
                told = line.removeprefix(b"data: ")
                if b'"error"' in told[:12]:
                    error = told.decode(errors="replace")
                    continue
                if seen.first_at is None:
                    seen.first_at = asyncio.get_running_loop().time()
                seen.records += 1
                last = told
                if plan.abort_after is not None and seen.records >= plan.abort_after:
                    seen.fate = "gone"
                    return
        seen.text = error[:300]
        if last == b"[DONE]" or b'"done":true' in last:
            seen.fate = "ok"
        elif error:
            seen.fate = "cut" if seen.records else "lost"
        else:
            seen.fate = "silent" if seen.records else "lost"
