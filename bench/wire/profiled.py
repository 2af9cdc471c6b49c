"""
The command line of the balancer under a profiler: ``profiled.py FILE serve …``.

It counts from SIGUSR2 on, so that the start does not count; the file is written at the end.
"""

import cProfile
import signal
import sys

from balancer.cli import main


def run() -> None:
    """Run it; what was counted is in the file when it has ended."""
    path = sys.argv.pop(1)
    profiler = cProfile.Profile()
    signal.signal(signal.SIGUSR2, lambda *_: profiler.enable())
    try:
        main()
    finally:
        profiler.disable()
        profiler.dump_stats(path)


run()
