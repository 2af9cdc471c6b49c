"""Fleets start, suffer and stop together."""

import asyncio
import json

import pytest

from balancer.sim import fleet as fleets
from balancer.sim.fleet import SCENARIOS, Fleet, Trouble
from balancer.sim.host import SimModel
from balancer.sim.loop import run
from balancer.sim.ollama import SimOllama

from .wire import Wire, ask


def test_the_test_fleet_has_equal_hosts() -> None:
    """Every host has the same models under the same digests, and a port of its own."""

    async def scenario() -> None:
        async with Fleet.test(3) as fleet:
            lists = [
                json.loads((await ask(host.port, "GET", "/api/tags")).body)["models"]
                for host in fleet
            ]
            digests = [{entry["name"]: entry["digest"] for entry in found} for found in lists]
            assert digests[0] == digests[1] == digests[2]
            assert set(digests[0]) == {
                "llama3.2:latest",
                "qwen3:0.6b",
                "tooled:latest",
                "nomic-embed-text:latest",
                "big:latest",
            }
            assert len(set(fleet.urls)) == 3
            assert fleet["b"].url == fleet.urls[1]

    run(scenario())


def test_speed_makes_everything_faster() -> None:
    """At a thousand times the speed the big model loads in 20 ms."""

    async def scenario() -> None:
        async with Fleet.test(1, speed=1000.0) as fleet:
            host = fleet["a"]
            started = host.now()
            await ask(host.port, "POST", "/api/generate", {"model": "big"})
            assert host.now() - started == pytest.approx(0.021, abs=1e-3)

    run(scenario())


def test_trouble_follows_the_script() -> None:
    """Struck at its second, again after its period, told in a line each; stopping ends it."""
    told: list[str] = []

    async def scenario() -> None:
        hosts = [SimOllama([SimModel("m")], name="x")]
        script = [
            Trouble(8.0, "x", "refuse", every_s=60.0),
            Trouble(16.0, "x", "heal", every_s=60.0),
            Trouble(20.0, "x", "version", ("0.1.0",)),
            Trouble(1.0, "absent", "refuse"),
        ]
        async with Fleet(hosts, script=script, emit=told.append) as fleet:
            host = fleet["x"]
            for at_s, is_refusing in [(7.9, False), (8.1, True), (16.1, False), (68.1, True)]:
                await asyncio.sleep(at_s - host.now())
                assert host.faults.refusing is is_refusing
        await asyncio.sleep(1000.0)

    run(scenario())
    assert told == ["x refuse", "x heal", "x version 0.1.0", "x refuse"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_can_be_played(name: str) -> None:
    """Ten minutes of each: every host and fault it names exists, and all is well in between."""

    async def scenario() -> None:
        demo = Fleet.demo()
        async with Fleet(demo, script=SCENARIOS[name]):
            await asyncio.sleep(600.0)
        assert {trouble.host for trouble in SCENARIOS[name]} <= {host.name for host in demo}

    run(scenario())


def test_the_flaky_host_lets_running_calls_end() -> None:
    """From second 8 nobody connects, yet the call that began before is answered to its end."""

    async def scenario() -> None:
        async with Fleet.demo() as fleet:
            flaky = fleet["flaky"]
            await asyncio.sleep(7.0)
            body = json.dumps({"model": "demo/haiku", "prompt": "x"})
            wire = await Wire.connect(flaky.port)
            wire.writer.write(
                f"POST /api/generate HTTP/1.1\r\nHost: localhost\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            await asyncio.sleep(1.5)
            with pytest.raises(ConnectionRefusedError):
                await Wire.connect(flaky.port)
            reply = await wire.reply()
            assert json.loads(reply.body.splitlines()[0])["response"] == "[simulated]"
            assert json.loads(reply.body.splitlines()[-1])["done"] is True
            assert 9.0 < flaky.now() < 16.0
            await asyncio.sleep(16.1 - flaky.now())
            assert (await ask(flaky.port, "GET", "/")).status == 200
            wire.close()

    run(scenario())


def test_run_announces_its_hosts_and_serves_until_cancelled() -> None:
    """One line per host; four hosts are three characters and one of them again."""
    told: list[str] = []

    async def scenario() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(7.0):
                await fleets.run(4, "calm", "127.0.0.1:0", told.append)

    run(scenario())
    assert [line.split(" ")[0] for line in told] == ["fast", "slow", "flaky", "fast2"]


def test_the_hosts_of_a_demo_can_pull_more() -> None:
    """All from one place, so that what one has pushed the others can pull."""
    hosts = list(Fleet.demo())
    assert all(host.host.find("llama3.2") is None for host in hosts)
    assert {host.management.registry for host in hosts} == {hosts[0].management.registry}
    assert hosts[0].management.registry.find("llama3.2") is not None


@pytest.mark.parametrize(
    ("scenario", "listen"), [("none", "127.0.0.1:0"), ("calm", "localhost"), ("calm", "x:y")]
)
def test_run_refuses_nonsense(scenario: str, listen: str) -> None:
    """An unknown scenario or no address is a ValueError."""
    with pytest.raises(ValueError, match=r"unknown scenario|not host:port"):
        run(fleets.run(1, scenario, listen, lambda _: None))


def test_a_taken_port_stops_the_whole_fleet() -> None:
    """The error comes through, and the hosts already started are stopped."""

    async def scenario() -> None:
        async with SimOllama(name="first") as first:
            hosts = [SimOllama(name="free"), SimOllama(name="taken", port=first.port)]
            with pytest.raises(OSError, match="in use"):
                async with Fleet(hosts):
                    pass
            assert (await ask(first.port, "GET", "/")).status == 200
            with pytest.raises(ConnectionRefusedError):
                await Wire.connect(hosts[0].port)

    run(scenario())
