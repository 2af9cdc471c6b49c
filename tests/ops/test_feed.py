"""The stream of status documents, as a page reads it."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from balancer.app import Stop
from balancer.core.events import Stopped
from balancer.ops import feed
from balancer.ops.feed import EVERY_S, FRESH_S, LISTENERS, PING_S, SEND_S
from tests.e2e.stage import CHAT, Asking, is_whole, models, now, virtual
from tests.rig import Rig, running
from tests.sim.wire import Reply, Wire

pytestmark = pytest.mark.usefixtures("quiet")


@dataclass(slots=True)
class Listener:
    """One page that listens: each event it was told, and when."""

    wire: Wire
    head: Reply
    told: list[tuple[float, str, Any]] = field(default_factory=list)
    pings: int = 0
    ended_at: float | None = None

    @classmethod
    async def of(cls, rig: Rig) -> Listener:
        """Begin to listen; nothing is read yet but the head."""
        asking = Asking(await rig.connect())
        lines = ["GET /_balancer/events HTTP/1.1", f"Host: 127.0.0.1:{rig.port}", "", ""]
        asking.wire.writer.write("\r\n".join(lines).encode())
        return cls(asking.wire, await asking.head())

    async def read(self) -> None:
        """Read to the end."""
        asking = Asking(self.wire)
        while record := await asking.record():
            self._note(record.decode())
        self.ended_at = now()

    async def until(self, seconds: float) -> list[tuple[float, str, Any]]:
        """Read for so long; what has come in all."""
        try:
            async with asyncio.timeout(seconds):
                await self.read()
        except TimeoutError:
            pass
        return self.told

    def _note(self, record: str) -> None:
        if record.startswith(":"):
            self.pings += 1
            return
        event, data = record.strip().split("\r\n")
        self.told.append(
            (now(), event.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        )

    def close(self) -> None:
        """Leave."""
        self.wire.close()


async def gone(rig: Rig) -> None:
    """Until nobody listens."""
    async with asyncio.timeout(5.0):
        while rig.balancer.feed.listeners:
            await asyncio.sleep(0.01)


@virtual
async def test_the_state_comes_at_once_and_then_what_changes() -> None:
    """The whole document; silence while nothing but time goes on; a death within a second."""
    async with running(2, models=models(0.0)) as rig:
        await asyncio.sleep(60.0)
        page = await Listener.of(rig)
        assert (page.head.status, page.head.get("cache-control")) == (200, "no-store")
        assert page.head.get("content-type") == "text/event-stream"
        began = now()
        ((at, event, document),) = await page.until(FRESH_S - 1.0)
        assert (at - began < 0.1, event) == (True, "status")
        # rig.ask would be an event itself: the page's own document is compared
        assert document["backends"] == rig.balancer.admin.state()["backends"]
        rig.fleet["b"].faults.refuse()
        await rig.events.until(lambda: not rig.balancer.pool.members["b"].health.up)
        died = now()
        told = await page.until(2.0)
        downs = [at for at, _, each in told if each["backends"][1]["state"] == "down"]
        assert downs[0] - died <= 2 * EVERY_S
        page.close()
        await gone(rig)


@virtual
async def test_calm_is_told_from_a_lost_connection() -> None:
    """An unchanged document is repeated, and comments keep proxies from closing."""
    async with running(1, models=models(0.0)) as rig:
        await asyncio.sleep(60.0)
        page = await Listener.of(rig)
        told = await page.until(10 * FRESH_S)
        gaps = [b[0] - a[0] for a, b in pairwise(told)]
        assert len(told) in (10, 11)
        assert max(gaps) <= FRESH_S + EVERY_S
        assert page.pings == int(10 * FRESH_S // PING_S)
        page.close()
        await gone(rig)


@virtual
async def test_a_storm_of_changes_is_told_twice_a_second() -> None:
    """Never more often, and the last state is not lost."""
    async with running(1, models=models(0.0)) as rig:
        page = await Listener.of(rig)
        reading = asyncio.get_running_loop().create_task(page.read())
        for _ in range(20):
            assert is_whole(await rig.ask("POST", "/api/chat", CHAT), "/api/chat")
        await asyncio.sleep(2 * EVERY_S)
        times = [at for at, _, _ in page.told]
        assert min(b - a for a, b in pairwise(times[1:])) >= EVERY_S * 0.99
        assert page.told[-1][2]["running"] == 0
        page.close()
        reading.cancel()
        await gone(rig)


@virtual
async def test_it_is_made_once_for_all_and_for_nobody_never() -> None:
    """Thirty pages cost what one does; none costs nothing."""
    async with running(1, models=models(0.0)) as rig:
        made = 0
        state = rig.balancer.admin.state

        def counted() -> dict[str, Any]:
            nonlocal made
            made += 1
            return state()

        rig.balancer.feed._state = counted
        await asyncio.sleep(60.0)
        assert made == 0
        pages = [await Listener.of(rig) for _ in range(30)]
        began = now()
        await asyncio.gather(*(page.until(20.0) for page in pages))
        assert all(page.told for page in pages)
        assert made <= (now() - began) / EVERY_S + 2
        for page in pages:
            page.close()
        await gone(rig)
        made = 0
        await asyncio.sleep(60.0)
        assert made == 0


@virtual
async def test_there_is_room_for_so_many_only() -> None:
    """One more is refused, and let in when another has left."""
    async with running(1, models=models(0.0)) as rig:
        pages = [await Listener.of(rig) for _ in range(LISTENERS)]
        assert {page.head.status for page in pages} == {200}
        refused = await rig.ask("GET", "/_balancer/events")
        assert (refused.status, refused.get("retry-after")) == (503, "10")
        pages.pop().close()
        async with asyncio.timeout(5.0):
            while rig.balancer.feed.listeners == LISTENERS:
                await asyncio.sleep(0.01)
        again = await Listener.of(rig)
        assert again.head.status == 200
        for page in (*pages, again):
            page.close()
        await gone(rig)


@virtual
async def test_a_page_that_leaves_is_no_trouble() -> None:
    """Its request ends as a good one, whether it says goodbye or not."""
    async with running(1, models=models(0.0)) as rig:
        for leave in (Wire.close, lambda wire: wire.writer.transport.abort()):
            page = await Listener.of(rig)
            await page.until(1.0)
            leave(page.wire)
            await gone(rig)
        told = [call for call in rig.calls() if call.path == "/_balancer/events"]
        assert [(call.status, call.outcome) for call in told] == [(200, "ok")] * 2


@virtual
async def test_who_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it holds more than one document back; the others go on."""
    async with running(1, models=models(0.0)) as rig:
        count = 0
        big = "x" * 1_000_000

        def growing() -> dict[str, Any]:
            nonlocal count
            count += 1
            return {"count": count, "big": big}

        rig.balancer.feed._state = growing
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", rig.port))
            sock.sendall(
                f"GET /_balancer/events HTTP/1.1\r\nHost: 127.0.0.1:{rig.port}\r\n\r\n".encode()
            )
            async with asyncio.timeout(5.0):
                while not rig.balancer.feed.listeners:
                    await asyncio.sleep(0.01)
            (stalled,) = rig.balancer.front.running
            transport = stalled.request.transport
            assert transport is not None
            reader = await Listener.of(rig)
            reading = asyncio.get_running_loop().create_task(reader.read())
            held = 0
            async with asyncio.timeout(20 * SEND_S):
                while rig.balancer.feed.listeners > 1:
                    held = max(held, transport.get_write_buffer_size())
                    await asyncio.sleep(0.1)
        assert 0 < held < 2.2 * len(big)
        seen = len(reader.told)
        await asyncio.sleep(2.0)
        assert len(reader.told) > seen
        reader.close()
        reading.cancel()
        await gone(rig)


@pytest.mark.parametrize("how", ["drain", "at once"])
@virtual
async def test_a_stop_does_not_wait_for_a_page(how: str) -> None:
    """It sees the drain to its end, and then its stream ends cleanly; it is not counted as cut."""
    async with running(1, models=models(0.0, speed=0.1)) as rig:
        page = await Listener.of(rig)
        await page.until(1.0)
        asking = None
        if how == "drain":
            asking = await Asking.of(rig, "/api/chat", CHAT)
            await asking.head()
        waiting = asyncio.get_running_loop().create_task(rig.balancer.wait())
        began = now()
        rig.balancer.stop(Stop("SIGTERM"))
        await page.read()
        assert page.ended_at is not None
        if asking is not None:
            assert page.told[-1][2]["draining"] is True
            assert page.ended_at - began > 10.0
            assert is_whole(await asking.rest(), "/api/chat")
            asking.close()
        await waiting
        assert now() - page.ended_at < 1.0
        assert rig.events.of(Stopped)[0].cut == 0
        page.close()


@virtual
async def test_a_page_that_does_not_read_does_not_hold_up_a_stop() -> None:
    """Though its stream cannot be ended in peace."""
    async with running(1, models=models(0.0)) as rig:
        big = "x" * 8_000_000
        rig.balancer.feed._state = lambda: {"big": big}
        with socket.socket() as sock:
            sock.connect(("127.0.0.1", rig.port))
            sock.sendall(
                f"GET /_balancer/events HTTP/1.1\r\nHost: 127.0.0.1:{rig.port}\r\n\r\n".encode()
            )
            await asyncio.sleep(1.0)
            began = now()
            rig.balancer.stop(Stop("SIGTERM"))
            await rig.balancer.wait()
            assert now() - began < 2.0


def test_what_ticks_is_no_change() -> None:
    """At any depth."""
    told = {"a": 1, "config": {"loaded_s_ago": 3, "file": None}, "all": [{"retry_in_s": 2.0}]}
    assert feed._steady(told) == {"a": 1, "config": {"file": None}, "all": [{}]}
