"""Where our time goes: the balancer under cProfile while a scenario runs."""

import io
import pstats
import signal
import sys
from pathlib import Path

import measuring
import peers
from peers import Peer, Place
from rig import STOP_S, Died, Rig
from scenarios import Scenario

TOP = 40


def profile(rig: Rig, scenario: Scenario, seconds: float) -> str:
    """
    Top functions by own time; a profiler counts Python calls dearer than they are.

    Raises:
        Died: The balancer did not come up, or left no profile.
    """
    written: list[Path] = []

    def command(place: Place) -> list[str]:
        written.append(place.directory / "profile")
        config = peers.configure_ours(place)
        script = str(peers.WIRE / "profiled.py")
        return [sys.executable, script, str(written[0]), "serve", "--config", str(config)]

    running = rig.start(Peer("ours-profiled", "under cProfile", command))
    running.process.send(signal.SIGUSR2)
    load = measuring.Load(rig, running, scenario.options, seconds, warm_up_s=scenario.warm_up_s)
    try:
        raw = load.result()
    finally:
        load.stop()
    running.process.send(signal.SIGINT)
    running.process.pause(STOP_S)
    if not written[0].exists():
        raise Died(f"no profile was written: {running.process.complaint()}")
    text = io.StringIO()
    stats = pstats.Stats(str(written[0]), stream=text)
    stats.strip_dirs().sort_stats("tottime").print_stats(TOP)
    told = {name: raw.get(name, 0) for name in ("calls", "chunks", "errors")}
    return f"{scenario.name}: {scenario.about}; in the window: {told}\n{text.getvalue()}"
