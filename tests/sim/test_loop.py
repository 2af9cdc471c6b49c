"""Virtual time on real sockets."""

import asyncio
import threading
import time

import pytest

from balancer.sim import loop as loops
from balancer.sim.loop import StuckError, run

pytestmark = pytest.mark.usefixtures("each_loop")  # ours on uvloop keeps the same promises


async def stopped(server: asyncio.Server) -> None:
    """Stops a server once its connections have seen the end of their clients."""
    await asyncio.sleep(1.0)
    server.close()
    await server.wait_closed()


def test_sleeping_costs_nothing() -> None:
    """A virtual hour is over at once, and the clock shows it."""

    async def scenario() -> float:
        await asyncio.sleep(3600.0)
        return asyncio.get_running_loop().time()

    before = time.monotonic()
    assert run(scenario(), start=100.0) == pytest.approx(3700.0)
    assert time.monotonic() - before < 60.0


def test_timers_fire_in_order_and_on_time() -> None:
    """Each at the very moment it asked for, whatever the others do."""

    async def scenario() -> list[tuple[str, float]]:
        loop = asyncio.get_running_loop()
        seen: list[tuple[str, float]] = []

        def note(name: str) -> None:
            seen.append((name, round(loop.time(), 9)))

        for delay, name in [(3.0, "c"), (1.0, "a"), (2.5, "b")]:
            loop.call_later(delay, note, name)
        await asyncio.sleep(4.0)
        return seen

    assert run(scenario()) == [("a", 1.0), ("b", 2.5), ("c", 3.0)]


def test_bytes_on_the_way_are_not_jumped_over() -> None:
    """A reply over loopback always comes before a time-out of 50 ms, however often asked."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.readline():
            writer.write(data)
        writer.close()

    async def scenario() -> float:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        for _ in range(500):
            writer.write(b"x" * 10_000 + b"\n")
            async with asyncio.timeout(0.05):
                await reader.readline()
        writer.close()
        took = asyncio.get_running_loop().time()
        await stopped(server)
        return took

    assert run(scenario()) == 0.0


def test_streams_repeat_exactly() -> None:
    """Two runs of forty sleeping streams show the same times to the last bit."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pace = float(await reader.readline())
        for _ in range(20):
            await asyncio.sleep(pace)
            writer.write(b"x\n")
        writer.close()

    async def follow(port: int, pace: float) -> list[float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"%f\n" % pace)
        times = []
        while await reader.readline():
            times.append(asyncio.get_running_loop().time())
        writer.close()
        return times

    async def scenario() -> list[list[float]]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        times = await asyncio.gather(*(follow(port, 0.01 + n / 1000) for n in range(40)))
        await stopped(server)
        return list(times)

    assert run(scenario()) == run(scenario())


def test_threads_are_waited_for() -> None:
    """Time stands still while a thread works, so its caller's time-out does not fire."""
    may_end = threading.Event()

    async def scenario() -> str:
        loop = asyncio.get_running_loop()
        loop.call_later(0.0, may_end.set)
        async with asyncio.timeout(0.001):
            await loop.run_in_executor(None, may_end.wait, 30.0)
        return f"{loop.time():.3f}"

    assert run(scenario()) == "0.000"


def test_a_result_and_an_error_come_through() -> None:
    """`run` returns and raises what the coroutine does."""

    async def good() -> int:
        return 7

    async def bad() -> None:
        raise KeyError("x")

    assert run(good()) == 7
    with pytest.raises(KeyError):
        run(bad())


def test_waiting_for_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no timer and no socket that could wake anybody the loop gives up, not the test run."""
    monkeypatch.setattr(loops, "STUCK_S", 0.01)

    async def scenario() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(StuckError):
        run(scenario())
