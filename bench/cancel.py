"""
How soon a backend sees that a client has gone: ``python bench/cancel.py [ABORTS]``.

A third of the clients leaves before the first record of a stream, a third in its middle, a third
while a whole answer is being made. Clocks are the machine's monotonic one in every process.
"""

import asyncio
import sys

import aiohttp
from processes import Rig, quantile


async def abort(session: aiohttp.ClientSession, url: str, kind: int) -> float:
    """Call and leave; the instant of leaving. Kinds: 0 early, 1 in the stream, 2 a whole answer."""
    loop = asyncio.get_running_loop()
    body = {"model": "warm-a", "prompt": "go on for ever", "stream": kind != 2}
    body["options"] = {"num_predict": 100_000}
    context = session.post(f"{url}/api/generate", json=body)
    if kind == 1:
        async with context as response:
            await response.content.readany()
            left = loop.time()
            response.close()
            return left
    task = loop.create_task(context.__aenter__())
    await asyncio.sleep(0.002 if kind == 0 else 0.2)
    left = loop.time()
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result().close()
    return left


async def main() -> int:
    """Abort so many calls, and compare with what the hosts saw."""
    aborts = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    async with Rig() as rig:
        left: list[float] = []
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            for number in range(aborts):
                left.append(await abort(session, rig.url, number % 3))
                await asyncio.sleep(0.05)
        await asyncio.sleep(1.5)
        stats = [await host.stats() for host in rig.hosts]
        seen = sorted(at for each in stats for at, _ in each["gone"])
        running = sum(each["running"] for each in stats)
        state = await rig.status()
    waits = []
    for at in left:  # each abort is followed by a pause, so the next one seen is its own
        after = [s - at for s in seen if s > at]
        if after and after[0] < 1.0:
            waits.append(after[0])
    print(
        f"{aborts} aborts, {len(seen)} seen by a backend, {running} still running there, "
        f"{state['running']} leases left; client's close to backend: "
        f"p50 {quantile(waits, 0.5) * 1e3:.1f} ms, p99 {quantile(waits, 0.99) * 1e3:.1f} ms, "
        f"max {max(waits) * 1e3:.1f} ms"
    )
    blamed = [b["name"] for b in state["backends"] if b["breaker"]["trips"]]
    print("breakers tripped:", blamed or "none")
    return 1 if running or state["running"] or blamed else 0


sys.exit(asyncio.run(main()))
