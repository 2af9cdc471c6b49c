"""The scenarios of the data plane benchmark: what the generator does in each."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Unit(StrEnum):
    """What a scenario's CPU is divided by."""

    CALL = "call"
    CHUNK = "chunk"
    MEGABYTE = "MB"


class Group(StrEnum):
    """Scenarios told in one table."""

    CALLS = "Calls"
    STREAMS = "Streams"
    TTFB = "First token"
    DELAY = "Delay under real-time priority"
    ABORTS = "Aborts"
    MEMORY = "Memory"


@dataclass(frozen=True, slots=True)
class Scenario:
    """A load; options are those of the generator."""

    name: str
    about: str
    group: Group
    options: tuple[str, ...]
    unit: Unit = Unit.CALL
    realtime: bool = False
    rounds: int = 99  # at most
    least_s: float = 0.0
    warm_up_s: float = 0.5  # held streams are opened in it
    conns: int = 0  # streams that share the memory measured
    beside: tuple[str, ...] = ()  # another generator that runs meanwhile


def _options(mode: str, **given: float | str) -> tuple[str, ...]:
    found = ["--mode", mode]
    for name, value in given.items():
        found += [f"--{name.replace('_', '-')}", str(value)]
    return tuple(found)


def _calls(name: str, about: str, options: tuple[str, ...], rounds: int = 99) -> Scenario:
    return Scenario(name, about, Group.CALLS, options, rounds=rounds)


def _arrivals(name: str, about: str, what: str) -> Scenario:
    """
    Calls at a rate that every proxy can keep up with, so that all do the same work.

    One that is full is woken once for many clients, and looks cheaper than at any lesser load.
    """
    return Scenario(name, about, Group.CALLS, _options("rate", rate=1000, what=what))


def _streams(
    name: str, count: int, per_s: int, least_s: float = 0.0, warm_up_s: float = 1.0
) -> Scenario:
    options = _options("streams", conns=count, interval_us=1_000_000 // per_s)
    about = f"{count:,} streams of {per_s} chunks/s"
    return Scenario(
        name, about, Group.STREAMS, options, Unit.CHUNK, least_s=least_s, warm_up_s=warm_up_s
    )


_FULL = _options("streams", conns=400, interval_us=20_000)

SCENARIOS: Mapping[str, Scenario] = {
    each.name: each
    for each in (
        _calls("tags", "GET /api/tags, 16 clients", _options("closed", what="tags", conns=16)),
        _calls("chat", "2 kB chat, 32 clients", _options("closed", what="chat", conns=32)),
        _calls("chat8", "the same, 8 clients", _options("closed", what="chat", conns=8)),
        _calls("chat1", "the same, 1 client", _options("closed", what="chat", conns=1)),
        _arrivals("tags1000", "GET /api/tags, 1,000 arrivals/s", "tags"),
        _arrivals("chat1000", "2 kB chat, 1,000 arrivals/s", "chat"),
        _calls("chat50k", "50 kB chat, 32 clients", _options("closed", what="chat50k", conns=32)),
        _calls(
            "churn",
            "GET /api/tags, a connection each",
            _options("churn", what="tags", conns=16),
            rounds=3,
        ),
        Scenario(
            "upload",
            "20 MB image in a generate call, 2 clients",
            Group.CALLS,
            _options("upload", conns=2),
            Unit.MEGABYTE,
            rounds=3,
        ),
        _streams("streams100", 100, 50),
        _streams("streams400", 400, 50, warm_up_s=2.0),
        _streams("many2000", 2000, 10, warm_up_s=4.0),
        _streams("many5000", 5000, 1, least_s=4.0, warm_up_s=10.0),
        Scenario(
            "short",
            "64 clients, answers of 20 chunks 5 ms apart",
            Group.STREAMS,
            _options("short", conns=64),
            Unit.CHUNK,
        ),
        Scenario(
            "burst",
            "16 streams without pause",
            Group.STREAMS,
            _options("burst", conns=16),
            Unit.CHUNK,
        ),
        Scenario(
            "mix",
            "100 streams of 50/s, while 20 MB and 1 MB bodies go up",
            Group.STREAMS,
            _options("mix", conns=100, interval_us=20_000),
            Unit.CHUNK,
        ),
        Scenario(
            "ttfb",
            "streaming chats, 100 arrivals/s",
            Group.TTFB,
            _options("rate", rate=100, what="first"),
        ),
        Scenario(
            "delay",
            "400 streams of 50 chunks/s",
            Group.DELAY,
            _FULL,
            Unit.CHUNK,
            realtime=True,
            warm_up_s=2.0,
        ),
        Scenario(
            "abort",
            "50 streams/s left in the middle",
            Group.ABORTS,
            _options("abort", rate=50, after_us=100_000),
        ),
        Scenario(
            "abort-idle",
            "50 calls/s left while the origin is silent",
            Group.ABORTS,
            _options("abort-idle", rate=50, after_us=100_000),
        ),
        Scenario(
            "abort-load",
            "as abort, beside 400 streams of 50 chunks/s",
            Group.ABORTS,
            _options("abort", rate=50, after_us=100_000),
            beside=_FULL,
        ),
        Scenario(
            "idle",
            "1,000 silent streams",
            Group.MEMORY,
            _options("idle", conns=1000),
            rounds=3,
            least_s=2.0,
            warm_up_s=2.0,
            conns=1000,
        ),
        Scenario(
            "slow",
            "40 streams whose reader has stopped",
            Group.MEMORY,
            _options("slow", conns=40),
            rounds=3,
            least_s=5.0,
            conns=40,
        ),
    )
}
