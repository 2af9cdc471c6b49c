"""The demo as people see it: a live table on a terminal, elsewhere one line per event."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from typing import TYPE_CHECKING, Final

from balancer.cli import screen, start
from balancer.cli.exits import CommandError, ExitCode
from balancer.cli.serving import lift_file_limit, loop_factory
from balancer.sim.demo import FULL_S, Demo

if TYPE_CHECKING:
    from rich.table import Table

PORT: Final = 11435
PORTS: Final = 20
OFF_TERMINAL_S: Final = 30.0
FRAME_S: Final = 0.25
COUNT_EVERY_S: Final = 5.0
SUBJECT: Final = "demo: the hosts are simulated, their answers made up"


def demo(hosts: int, seconds: float | None) -> int:
    """Run it; an exit code."""
    lift_file_limit()
    on_terminal = sys.stdout.isatty()
    if seconds is None and not on_terminal:
        seconds = OFF_TERMINAL_S
    sock = free_socket()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_demo(sock, hosts, seconds, on_terminal=on_terminal))


def free_socket(first: int = PORT, ports: int = PORTS) -> socket.socket:
    """The usual port of this machine, or the next that is free."""
    for port in range(first, first + ports):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            sock.close()
            continue
        if port != first:
            print(f"Port {first} is taken, so this demo listens on {port}.")
        return sock
    told = f"No free port from {first} to {first + ports - 1} on 127.0.0.1."
    raise CommandError(told, code=ExitCode.BIND)


async def _demo(
    sock: socket.socket, hosts: int, seconds: float | None, *, on_terminal: bool
) -> int:
    def tell(line: str) -> None:
        if not on_terminal:
            print(line, flush=True)

    async with Demo(sock=sock, hosts=hosts, tell=tell) as running:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, running.stop)
        await start.first_checks(running.balancer)
        print(*start.lines(running.balancer, SUBJECT), sep="\n", flush=True)
        if on_terminal:
            print("Press Ctrl+C to stop\n", flush=True)
        show = _show_live if on_terminal else _show_counts
        watching = running.balancer.tasks.spawn(show(running), "the demo's screen")
        await running.run(seconds)
        full = running.elapsed_s >= FULL_S
        watching.cancel()
        await asyncio.wait([watching])
    print(f"\n{running.tally.summary()}")
    complaints = running.tally.complaints(full=full)
    for complaint in complaints:
        print(f"! {complaint}")
    return ExitCode.FAILURE if complaints else ExitCode.OK


async def _show_counts(demo: Demo) -> None:
    while True:
        await asyncio.sleep(COUNT_EVERY_S)
        print(f"[{demo.elapsed_s:5.1f} s] so far: {demo.tally.summary()}", flush=True)


async def _show_live(demo: Demo) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False) as live:
        while True:
            news = (Text(screen.plain(line)) for line in demo.news)
            counts = Text(f"{demo.elapsed_s:.0f} s: {demo.tally.summary()}", style="bold")
            live.update(Group(_table(demo), counts, *news), refresh=True)
            await asyncio.sleep(FRAME_S)


def _table(demo: Demo) -> Table:
    from rich.table import Table

    table = Table("host", "state", "breaker", "loaded", box=None, pad_edge=False)
    table.add_column("running", justify="right")
    table.add_column("done", justify="right")
    for view in demo.balancer.admin.state()["backends"]:
        good = view["state"] == "up"
        loaded = [model.removesuffix(":latest") for model in screen.loaded(view)]
        table.add_row(
            view["name"],
            f"[green]{view['state']}" if good else f"[bold red]{view['state']}",
            screen.breaker(view["breaker"]),
            ", ".join(loaded) or "–",
            str(view["in_flight"]),
            str(demo.tally.done[view["name"]]),
        )
    return table
