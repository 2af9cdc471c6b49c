"""The demo holds what it shows: a host dies and comes back, and no call fails."""

from __future__ import annotations

import socket

import pytest

from balancer.sim.demo import FLAKY, FULL_S, LAST_CALLS_S, REASONS, Demo, Tally
from balancer.sim.loop import run
from tests.sim.wire import Reply, ask


def bound() -> socket.socket:
    """A free port of loopback."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


@pytest.mark.parametrize("seed", range(3))
def test_a_host_dies_and_comes_back_and_no_call_fails(seed: int) -> None:
    """In the half minute of `make demo`; its breaker opens, is tried, and closes."""
    lines: list[str] = []

    async def show() -> Tally:
        async with Demo(sock=bound(), seed=seed, tell=lines.append) as demo:
            await demo.run(30.0)
            assert demo.elapsed_s >= FULL_S
            return demo.tally

    tally = run(show())
    assert tally.complaints(full=True) == []
    assert tally.calls > 100
    assert tally.failed == 0
    assert tally.failovers >= 1
    assert (tally.opened, tally.closed) == (1, 1)
    assert {"fast", "slow", FLAKY} == set(tally.done)
    story = [
        f"{FLAKY} dies",
        "goes on to",
        f"the breaker of {FLAKY} lets a trial through",
        f"{FLAKY} is back",
        f"the breaker of {FLAKY} closes",
    ]
    places = [next(i for i, line in enumerate(lines) if part in line) for part in story]
    assert places[0] < min(places[1:])
    assert places[3] < places[4]


def test_failed_calls_are_counted_and_complained_of() -> None:
    """With all hosts gone, calls fail, and the demo does not call that a success."""

    async def show() -> Tally:
        async with Demo(sock=bound()) as demo:
            for host in demo._fleet:
                host.faults.refuse()
            await demo.run(5.0)
            return demo.tally

    tally = run(show())
    assert tally.failed > 0
    assert any(
        complaint.startswith("a call failed: ") for complaint in tally.complaints(full=False)
    )


def test_of_many_failed_calls_few_are_told() -> None:
    """The rest is a number, whatever the demo went through."""
    tally = change(failed=4000)
    tally.reasons.extend(map(str, range(4000)))
    assert len(tally.complaints(full=False)) == REASONS + 1
    assert tally.complaints(full=False)[-1] == f"and {4000 - REASONS} more calls failed"


def test_it_ends_when_it_is_told_to() -> None:
    """Calls that take longer are given up, and do not count as failed."""

    async def show() -> tuple[float, Tally]:
        async with Demo(sock=bound()) as demo:
            await demo.run(2.0)
            return demo.elapsed_s, demo.tally

    elapsed_s, tally = run(show())
    assert elapsed_s < 2.0 + LAST_CALLS_S + 0.5
    assert tally.calls > 0
    assert tally.complaints(full=False) == []


def test_the_summary_counts_as_people_do() -> None:
    """Once is not 1 times."""
    assert Tally(opened=1, closed=2).summary().endswith("opened once and closed 2 times")


def test_every_answer_is_marked() -> None:
    """Good ones, refusals, streams and our own pages alike."""

    async def show() -> list[Reply]:
        sock = bound()
        port = sock.getsockname()[1]
        async with Demo(sock=sock) as demo:
            del demo
            return [
                await ask(port, "GET", "/api/tags"),
                await ask(port, "GET", "/nowhere"),
                await ask(port, "GET", "/_balancer/status"),
                await ask(port, "POST", "/api/chat", b"{"),
                await ask(port, "POST", "/api/generate", {"model": "demo/haiku", "prompt": "a"}),
            ]

    replies = run(show())
    assert [reply.status for reply in replies] == [200, 404, 200, 400, 200]
    assert [reply.get("x-balancer-demo") for reply in replies] == ["1"] * 5


def change(**fields: object) -> Tally:
    """A good demo's tally, but for *fields*."""
    tally = Tally(calls=9, has_died=True, is_back=True, has_served_again=True)
    for name, value in fields.items():
        setattr(tally, name, value)
    return tally


@pytest.mark.parametrize(
    ("tally", "full", "complaint"),
    [
        (change(), True, None),
        (change(has_died=False, has_served_again=False), False, None),
        (change(calls=0), False, "no call was made"),
        (change(reasons=["502"]), False, "a call failed: 502"),
        (change(mishaps=1), False, "mishaps in the balancer: 1"),
        (change(has_died=False), True, "never died"),
        (change(has_served_again=False), True, "never came back"),
    ],
)
def test_what_is_complained_of(tally: Tally, full: bool, complaint: str | None) -> None:
    """Each thing that would make the demo a lie; nothing else."""
    found = tally.complaints(full=full)
    assert (complaint is None) == (found == [])
    assert complaint is None or complaint in found[0]
