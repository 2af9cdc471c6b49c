"""
One simulated host as a process of its own, steered by lines on its standard input.

``restart 3`` calls ``faults.restart(3)``; ``stats`` prints one line of JSON; the end of the input
ends the process.
"""

import argparse
import asyncio
import json
import sys

from balancer.sim.host import Settings
from balancer.sim.ollama import SimOllama
from balancer.sim.storm import models


async def main() -> None:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="a")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    settings = Settings(num_parallel=4)
    async with SimOllama(models(), name=options.name, port=options.port, settings=settings) as sim:
        print(sim.url, flush=True)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := (await reader.readline()).decode().strip():
            word, *rest = line.split("\t")
            if word == "stats":
                gone = [[s.ended_at, s.path] for s in sim.requests if s.ending == "client-gone"]
                told = {"running": sim.host.running, "counts": sim.host.counts, "gone": gone}
                print(json.dumps(told), flush=True)
            else:
                sim.faults.apply(word, *(json.loads(item) for item in rest))


asyncio.run(main())
