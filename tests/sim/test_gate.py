"""Host, CORS and redirects, as a server bound to a loopback address checks them."""

import pytest

from balancer.sim.loop import run
from balancer.sim.ollama import SimOllama

from .wire import Reply, Wire


def asked(method: str, path: str, checks_origin: bool = True, **headers: str) -> Reply:
    """A request with exactly these headers."""

    async def scenario() -> Reply:
        async with SimOllama(checks_origin=checks_origin, origins=("https://mine.example",)) as sim:
            wire = await Wire.connect(sim.port)
            lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
            wire.writer.write("\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode())
            reply = await wire.reply(method)
            wire.close()
            return reply

    return run(scenario())


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "[::1]:80", "10.9.8.7:11434", "0.0.0.0", "localhost", "x.local", "y.internal"],
)
def test_hosts_that_may_be_asked_for(host: str) -> None:
    """Loopback, private and unspecified addresses, and local names."""
    assert asked("GET", "/", Host=host).status == 200


@pytest.mark.parametrize("host", ["example.com", "8.8.8.8", "localhost.example.com"])
def test_foreign_hosts(host: str) -> None:
    """An empty 403, on unknown paths too; not with the check switched off."""
    reply = asked("GET", "/nowhere", Host=host)
    assert (reply.status, reply.body, reply.get("content-type")) == (403, b"", None)
    assert asked("GET", "/", False, Host=host).status == 200


@pytest.mark.parametrize(
    "origin",
    ["http://localhost:3000", "https://127.0.0.1", "app://x", "https://mine.example"],
)
def test_origins_that_may_ask(origin: str) -> None:
    """They are named in the reply."""
    reply = asked("GET", "/api/version", Host="localhost", Origin=origin)
    assert (reply.status, reply.get("access-control-allow-origin")) == (200, origin)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "chrome-extension://abc"])
def test_origins_that_may_not(origin: str) -> None:
    """An empty 403, for plain requests as for preflights."""
    for method in ("GET", "POST", "OPTIONS"):
        assert asked(method, "/api/chat", Host="localhost", Origin=origin).status == 403


def test_the_same_origin_is_no_cross_origin() -> None:
    """Whatever its name: no header is added."""
    reply = asked("GET", "/", Host="x.local:1", Origin="http://x.local:1")
    assert (reply.status, reply.get("access-control-allow-origin")) == (200, None)


@pytest.mark.parametrize(
    ("method", "path", "status", "location"),
    [
        ("GET", "/api/tags/?x=1", 301, "/api/tags?x=1"),
        ("POST", "/api/chat/", 307, "/api/chat"),
        ("GET", "//api/tags", 307, "/api/tags"),
        ("GET", "/nowhere/", 404, None),
    ],
)
def test_redirects(method: str, path: str, status: int, location: str | None) -> None:
    """A slash too many is redirected if that leads anywhere."""
    reply = asked(method, path, Host="localhost")
    assert (reply.status, reply.get("location")) == (status, location)
