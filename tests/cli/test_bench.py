"""`bench`: against a real balancer before simulated hosts, and what it refuses to do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp.test_utils import unused_port
from typer.testing import Result

from balancer.cli import bench
from balancer.cli.exits import ExitCode
from balancer.sim.host import SimModel
from tests.conftest import Start
from tests.rig import Rig

from .conftest import LIMIT_S, Command
from .stub import serving

MODELS = [SimModel("m", decode_tps=5000.0, prompt_tps=1e5)]
Ask = Callable[..., Any]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer of the small calls."""
    monkeypatch.setattr(bench, "SMALL_PAIRS", 2)


async def stage(start: Start, command: Command, warm: str = "", **more: Any) -> tuple[Rig, Ask]:
    """Two hosts with the model, in the memory of some; and the command line."""
    rig = await start(2, models=MODELS, **more)
    for host in warm:
        await rig.warm(host, "m")

    async def ask(*args: str) -> Result:
        return await asyncio.to_thread(command, "bench", *args, "--admin", rig.url)

    return rig, ask


async def test_a_benchmark(start: Start, command: Command) -> None:
    """Both ways to the same backend, then each other backend that has the model in memory."""
    rig, ask = await stage(start, command, "ab")
    before = len(rig.inference())
    told = await ask("-n", "3")
    assert told.exit_code == ExitCode.OK, told.output
    lines = told.stdout.splitlines()
    assert lines[0].startswith("m:latest, 32 tokens a call, context 4096: 3 of 3 rounds in ")
    assert [line.split("  ")[0] for line in lines[3:6]] == [
        "through the balancer",
        "a, directly",
        "b, directly",
    ]
    assert "too few pairs to tell (3)" in told.stdout
    assert "!" not in told.stdout
    seen = rig.inference()[before:]
    forwarded = [one for one in rig.forwarded() if one in seen]
    assert len(forwarded) == (1 + 2) + (1 + 3)
    assert len(seen) > 2 * len(forwarded)
    assert rig.loaded() == {"a": ["m"], "b": ["m"]}


async def test_the_document(start: Start, command: Command) -> None:
    """The same for scripts, with callers at once beside it."""
    _, ask = await stage(start, command, "a")
    told = await ask("m", "-n", "2", "--concurrency", "2", "--json")
    doc = json.loads(told.stdout)
    assert (told.exit_code, doc["ok"], doc["failed"]) == (ExitCode.OK, True, {})
    assert (doc["model"], doc["context"], doc["rounds"]) == ("m:latest", 4096, 2)
    assert [(way["name"], way["calls"]) for way in doc["ways"]] == [("balancer", 2), ("a", 2)]
    assert doc["added"]["first_s"]["count"] == 2
    assert doc["added"]["empty_call_s"]["count"] == doc["added"]["version_s"]["count"] == 2
    assert (doc["pool"]["callers"], doc["pool"]["calls"]) == (2, 4)


async def test_nothing_is_loaded_without_being_asked_for(start: Start, command: Command) -> None:
    """The model has to be named, and the load allowed; then it is loaded once."""
    rig, ask = await stage(start, command)
    for args, told in [
        ((), "No model that makes text is in memory"),
        (("m",), "m:latest is in memory nowhere"),
        (("none", "--load"), "No backend has none."),
    ]:
        result = await ask(*args)
        assert (result.exit_code, result.stdout) == (ExitCode.FAILURE, "")
        assert result.stderr.startswith(told)
        assert result.stderr.count("\n") == 1
    assert rig.loaded() == {"a": [], "b": []}
    result = await ask("m", "--load", "-n", "1")
    assert result.exit_code == ExitCode.OK, result.output
    assert sum(map(len, rig.loaded().values())) == 1
    assert (await ask("--load")).exit_code == ExitCode.USAGE


async def test_a_load_that_fails(start: Start, command: Command) -> None:
    """In the balancer's words; nothing is measured."""
    rig, ask = await stage(start, command)
    for host in rig.fleet:
        host.faults.fail("m")
    told = await ask("m", "--load")
    assert (told.exit_code, told.stdout) == (ExitCode.FAILURE, "")
    assert told.stderr.startswith(f"The balancer at {rig.url} refused (")


async def test_a_fleet_that_is_busy_is_left_alone(start: Start, command: Command) -> None:
    """Unless it is to be measured nevertheless."""
    rig, ask = await stage(start, command, "ab")
    rig.fleet["a"].faults.hang_inference()
    rig.fleet["b"].faults.hang_inference()
    async with asyncio.TaskGroup() as group:
        other = group.create_task(rig.ask("POST", "/api/generate", {"model": "m", "prompt": "x"}))
        async with asyncio.timeout(LIMIT_S):
            while not rig.balancer.pool.running:
                await asyncio.sleep(0.001)
        told = await ask()
        assert (told.exit_code, told.stdout) == (ExitCode.FAILURE, "")
        assert told.stderr.startswith("The fleet is busy (1 running): ")
        for host in rig.fleet:
            host.faults.heal()
        told = await ask("--force", "-n", "1")
        assert told.exit_code == ExitCode.OK, told.output
        other.cancel()


async def test_calls_that_fail_are_told(start: Start, command: Command) -> None:
    """With how often and on which way; the exit code says it, too."""
    rig, ask = await stage(start, command, "a")
    rig.fleet["a"].faults.error_line(3, text="boom", times=None)
    told = await ask("-n", "9")
    assert told.exit_code == ExitCode.FAILURE
    assert "3 of 9 rounds" in told.stdout
    notes = [line for line in told.stdout.splitlines() if line.startswith("! ")]
    assert any(note.endswith("calls failed: a, directly: boom") for note in notes), notes
    assert any("calls failed: through the balancer: boom" in note for note in notes), notes


async def test_a_backend_that_wants_a_credential(start: Start, command: Command) -> None:
    """Only the balancer has it: no direct calls, and no cost to tell; the rest is measured."""
    rig, ask = await stage(start, command, "a")
    with serving({"/api/ps": (401, {"error": "unauthorized"})}) as gate:
        member = rig.balancer.pool.members["a"]
        url = f"http://127.0.0.1:{gate.port}"
        object.__setattr__(member.backend, "url", url)
        told = await ask("-n", "1")
        assert [path for _, path, _ in gate.asked] == ["/api/ps"]
    assert told.exit_code == ExitCode.OK, told.output
    assert "cannot be told: no call went both ways" in told.stdout
    why = "it wants a credential, which only the balancer has (status 401)"
    assert f"! a is not called directly: {why}" in told.stdout


async def test_a_fleet_without_a_healthy_backend(start: Start, command: Command) -> None:
    """Has its exit code."""
    rig = await start(0, dead=["x"])
    told = await asyncio.to_thread(command, "bench", "--admin", rig.url)
    assert told.exit_code == ExitCode.NO_BACKEND
    assert told.stderr.endswith("Why: ollama-balancer doctor\n")


def test_no_balancer(command: Command) -> None:
    """As for every command."""
    told = command("bench", "--admin", f"127.0.0.1:{unused_port()}")
    assert (told.exit_code, told.stdout) == (ExitCode.NO_ADMIN, "")
    assert "No balancer answers at" in told.stderr


# -- who may go on -----------------------------------------------------------------------------


def session(depth: int, *, now: float, force: bool = False) -> tuple[bench._Session, Any]:
    """A measurement of ten seconds from zero on, while so many calls of others wait."""

    class Balancer:
        def status(self) -> Any:
            return {"queue": {"depth": depth}}

    class Terms:
        def clock(self) -> float:
            return now

    wishes = bench._Wishes(10, 1, 10.0, force=force)
    made: Any = bench._Session(Balancer(), Terms(), [], wishes, 0.0)  # type: ignore[arg-type]
    return made, made.notes


def test_it_stops_when_others_wait() -> None:
    """They came later and matter more; that is said once."""
    made, notes = session(1, now=1.0)
    assert [made._may_go_on(1.0), made._may_go_on(1.0)] == [False, False]
    assert notes == ["cut short: calls of others wait in the queue; nevertheless: --force"]
    made, notes = session(1, now=1.0, force=True)
    assert (made._may_go_on(1.0), notes) == (True, [])


def test_it_stops_when_the_time_is_over() -> None:
    """Each part has its share."""
    made, notes = session(0, now=6.0)
    assert (made._may_go_on(1.0), notes) == (True, [])
    assert not made._may_go_on(0.6)
    assert notes == ["cut short: 10 s are over; more: --seconds"]
