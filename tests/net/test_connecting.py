"""Getting to a backend: names, addresses, TLS, and what is told when it cannot be had."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from typing import Any

import pytest

from balancer.core.verdicts import Failure, FailureKind
from balancer.net import connecting
from balancer.net.connecting import REMEMBERED_S, Resolver, Target, Way, failure_of, told
from tests.e2e.stage import virtual
from tests.net.peer import Line, Peer, both
from tests.rig import dead_url

INFO = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))


class Names:
    """A resolver of the system's that does as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.answer: Any = [INFO]
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", self._find)

    async def _find(self, host: str, port: int, **_: object) -> Any:
        self.asked.append(host)
        if self.answer is None:
            await asyncio.get_running_loop().create_future()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@virtual
async def test_a_name_is_asked_for_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in a while, however often it is used."""
    names, resolver = Names(monkeypatch), Resolver(asyncio.get_running_loop())
    for _ in range(5):
        assert await resolver.find("gpu", 1) == [INFO]
    assert names.asked == ["gpu"]
    await asyncio.sleep(REMEMBERED_S)
    await resolver.find("gpu", 1)
    await resolver.find("other", 1)
    assert names.asked == ["gpu", "gpu", "other"]


@virtual
@pytest.mark.parametrize("trouble", ["fails", "hangs"])
async def test_the_last_good_answer_is_kept(monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    """A resolver that fails takes no backend away that was found before."""
    names, resolver = Names(monkeypatch), Resolver(asyncio.get_running_loop())
    await resolver.find("gpu", 1)
    await asyncio.sleep(REMEMBERED_S)
    names.answer = None if trouble == "hangs" else socket.gaierror(-3, "Temporary failure")
    for _ in range(3):
        assert await resolver.find("gpu", 1) == [INFO]
    assert names.asked == ["gpu", "gpu"]  # nor is each call held up by it
    with pytest.raises(OSError):
        await resolver.find("never seen", 1)


@virtual
async def test_names_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest makes room."""
    monkeypatch.setattr(connecting, "MAX_NAMES", 3)
    names, resolver = Names(monkeypatch), Resolver(asyncio.get_running_loop())
    for name in ("a", "b", "c", "d", "d", "c", "b", "a"):
        await resolver.find(name, 1)
    assert names.asked == ["a", "b", "c", "d", "a"]


@both
async def test_a_connection_to_an_address_or_a_name() -> None:
    """A literal address is asked nobody for; a name may have several."""

    async def serve(line: Line) -> None:
        await line.closed()

    class Plain(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

    async with Peer(serve) as peer:
        resolver = Resolver(asyncio.get_running_loop())
        for host in ("127.0.0.1", "localhost"):
            target = Target(peer.url.replace("127.0.0.1", host))
            made = await Way(target, resolver).connect(Plain)
            sock = made.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            made.transport.abort()
        assert peer.accepted == 2
        assert list(resolver._known) == [("localhost", int(peer.url.rpartition(":")[2]))]


@both
async def test_a_refused_connection_is_told_in_a_few_words() -> None:
    """Without the address."""
    way = Way(Target(dead_url()), Resolver(asyncio.get_running_loop()))
    with pytest.raises(OSError) as error:
        await way.connect(asyncio.Protocol)
    assert failure_of(error.value) == Failure(FailureKind.CONNECT, "connection refused")


@both
async def test_a_peer_that_does_not_speak_tls_is_told() -> None:
    """What OpenSSL calls it, and what it most likely means."""

    async def serve(line: Line) -> None:
        await line.reader.read(1)
        line.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await line.closed()

    async with Peer(serve) as peer:
        target = Target(peer.url.replace("http", "https"))
        with pytest.raises(OSError) as error:
            await Way(target, Resolver(asyncio.get_running_loop())).connect(asyncio.Protocol)
        assert failure_of(error.value).detail.endswith("; does it speak TLS?")


@virtual
async def test_a_tls_handshake_is_bounded() -> None:
    """A peer that accepts and then says nothing costs a few seconds."""

    async def serve(line: Line) -> None:
        await line.closed()

    async with Peer(serve) as peer:
        began = asyncio.get_running_loop().time()
        target = Target(peer.url.replace("http", "https"))
        with pytest.raises(TimeoutError) as error:
            await Way(target, Resolver(asyncio.get_running_loop())).connect(asyncio.Protocol)
        assert failure_of(error.value) == Failure(FailureKind.CONNECT_TIMEOUT)
        assert asyncio.get_running_loop().time() - began <= 6.0


def test_texts() -> None:
    """The system's words for a number, OpenSSL's for TLS, those of DNS as they are."""
    assert told(ConnectionResetError(errno.ECONNRESET, "asyncio's own text")) == (
        "connection reset by peer"
    )
    assert told(socket.gaierror(-2, "Name or service not known")) == "name or service not known"
    assert told(OSError("Multiple exceptions: a, b")) == "multiple exceptions: a, b"
    assert told(ConnectionResetError()) == "connectionreseterror"
    assert told(UnicodeError("label empty\nor too long")) == "label empty"
    error = ssl.SSLCertVerificationError(1, "x")
    error.verify_message = "self-signed certificate."
    assert told(error) == "its certificate is not trusted: self-signed certificate (see tls)"


@pytest.mark.parametrize("url", ["gpu:1", "/x", "http://"])
async def test_a_url_without_a_host_is_none(url: str) -> None:
    """Found when the way is made, not when it is gone."""
    with pytest.raises(ValueError, match=r"host|[Uu]rl|URL"):
        Way(Target(url), Resolver(asyncio.get_running_loop()))


def test_contexts_are_made_once() -> None:
    """Loading the system's certificates takes longer than a call; one's own context is used."""
    own = ssl.create_default_context()
    assert connecting._context(own) is own
    assert connecting._context(True) is connecting._context(True)
    assert connecting._context(False).verify_mode is ssl.CERT_NONE
    assert connecting._context(True).verify_mode is ssl.CERT_REQUIRED
