"""Asking the configured hosts, as `check --contact` does."""

from __future__ import annotations

from aiohttp.test_utils import unused_port

from balancer.cli.contact import Answer, _ask_all, hint_for, joined
from balancer.config import load
from balancer.net.upstream import Target
from balancer.sim.fleet import Fleet

from .stub import serving


async def asked(url: str, limit_s: float = 10.0) -> Answer:
    """What one host says."""
    (answer,) = await _ask_all({"gpu1": Target(url)}, limit_s)
    return answer


async def test_a_host_that_is_well() -> None:
    """Version and number of models."""
    async with Fleet.test(1) as fleet:
        answer = await asked(fleet.urls[0])
    assert (answer.ok, answer.version, answer.models) == (True, "0.33.0", 5)


async def test_a_host_that_is_not_there() -> None:
    """The reason in words, and where to look."""
    answer = await asked(f"http://127.0.0.1:{unused_port()}")
    assert not answer.ok
    assert answer.told == "cannot connect: connection refused"
    assert "OLLAMA_HOST=0.0.0.0" in answer.hint


async def test_a_name_that_nobody_knows() -> None:
    """The hint is about the name."""
    answer = await asked("http://gpu1.invalid:11434")
    assert not answer.ok
    assert "cannot resolve gpu1.invalid" in answer.hint


async def test_a_host_that_hangs() -> None:
    """Is given up after the limit of a health check."""
    async with Fleet.test(1) as fleet:
        fleet["a"].faults.hang()
        answer = await asked(fleet.urls[0], limit_s=0.05)
    assert not answer.ok
    assert "did not finish" in answer.told


async def test_a_host_that_is_no_ollama() -> None:
    """Its status is told."""
    async with Fleet.test(1) as fleet:
        fleet["a"].script("/api/version", status=404, segments=[b"nothing here"])
        answer = await asked(fleet.urls[0])
    assert answer.told == "is no Ollama: status 404 for /api/version"


async def test_a_proxy_before_it_that_wants_a_credential() -> None:
    """The hint names the block to write it into."""
    async with Fleet.test(1) as fleet:
        fleet["a"].script("/api/version", status=401, segments=[b"{}"])
        answer = await asked(fleet.urls[0])
    assert answer.told == "refused: status 401"
    assert '"auth"' in answer.hint


def test_who_is_found_joins_who_is_written() -> None:
    """A host that answers becomes a backend, one that does not a warning."""
    answers: dict[str, tuple[int, object]] = {"/api/version": (200, {"version": "0.33.0"})}
    with serving(answers) as stub:
        there, away = f"127.0.0.1:{stub.port}", f"127.0.0.1:{unused_port()}"
        env = {"OLLAMA_BASE_URLS": f"{there};{away}", "BALANCER_DISCOVER": "env"}
        found = joined(load("backends: [gpu1]", env))
    assert [spec.url for spec in found.backends] == ["http://gpu1:11434", f"http://{there}"]
    assert [warning.split()[0] for warning in found.warnings] == [f"http://{away}"]


def test_port_80_was_probably_not_meant() -> None:
    """`http://gpu1` is port 80, as in OLLAMA_HOST; who is refused there is told so."""
    hint = hint_for("http://gpu1:80", "cannot connect: connection refused")
    assert "means port 80" in hint
    assert "gpu1:11434" in hint
