"""The door to backends: what is sent, what is pushed, and how each failure is told."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from balancer.core.events import Event
from balancer.core.verdicts import Failure, FailureKind
from balancer.net.tasks import Tasks
from balancer.net.upstream import ClientUpstream, Handle, Target, UpstreamError, session, tuned
from balancer.sim.host import SimModel
from balancer.sim.ollama import SimOllama
from tests.e2e.stage import virtual
from tests.net.parts import FakeLease, Tape, a_call
from tests.rig import dead_url

pytestmark = pytest.mark.usefixtures("quiet")
NDJSON = [("Content-Type", "application/x-ndjson")]


@dataclass
class Stage:
    """A host, and the door to it."""

    host: SimOllama
    upstream: ClientUpstream
    tasks: Tasks
    events: list[Event] = field(default_factory=list)

    def open(self, tape: Tape, target: Target | None = None, **call: Any) -> Handle:
        """Send a call, pushed onto *tape*."""
        self.upstream.targets["a"] = target or Target(self.host.url)
        lease = FakeLease(self.host.url)
        return self.upstream.open(lease.as_lease, a_call(**call), tape)

    async def told(self, target: Target | None = None, **call: Any) -> Tape:
        """Send a call and wait for its end."""
        tape = Tape()
        self.open(tape, target, **call)
        await tape.over()
        return tape


@asynccontextmanager
async def staged(**model: Any) -> AsyncIterator[Stage]:
    """One host with one model, and a door that has nothing open at the end."""
    events: list[Event] = []
    tasks = Tasks(events.append, asyncio.get_running_loop().time)
    models = [SimModel("m", **({"words": (" a", " b", " c")} | model))]
    async with SimOllama(models, keeps_bodies=True) as host:
        stage = Stage(host, ClientUpstream({}, tasks), tasks, events)
        try:
            yield stage
        finally:
            await tasks.close()
            await stage.upstream.close()
    assert events == []


CHAT = b'{"model":"m","messages":[{"role":"user","content":"x"}]}'


# -- what is pushed -------------------------------------------------------------------------------


async def test_head_data_end_in_this_order() -> None:
    """The tape checks the order; the bytes are the host's."""
    async with staged(decode_tps=1e5) as stage:
        tape = await stage.told(body=CHAT)
        assert (tape.status, tape.ends) == (200, [None])
        assert ("Content-Type", "application/x-ndjson") in tape.headers
        assert tape.body == bytes(stage.host.requests[-1].written)


async def test_a_connection_is_used_again() -> None:
    """One after the other, calls share one connection; at once, each has its own."""
    async with staged(decode_tps=1e5) as stage:
        for _ in range(3):
            await stage.told(body=CHAT)
        assert stage.host.accepted == 1
        assert stage.upstream.idle() == {"a": 1}
        tapes = [Tape() for _ in range(3)]
        for tape in tapes:
            stage.open(tape, body=CHAT)
        for tape in tapes:
            await tape.over()
        assert stage.host.accepted == 3
        assert stage.upstream.idle() == {"a": 3}
        await stage.upstream.close()
        await until(lambda: not stage.host.connections)


async def test_without_reuse_each_call_has_a_connection_of_its_own() -> None:
    """It is closed behind the answer, and the host was told that it would be."""
    async with staged(decode_tps=1e5) as stage:
        target = Target(stage.host.url, reuse=False)
        for count in (1, 2, 3):
            await stage.told(target, body=CHAT)
            assert stage.host.accepted == count
            assert dict(stage.host.requests[-1].headers)["Connection"] == "close"
        assert stage.upstream.idle() == {"a": 0}
        await until(lambda: not stage.host.connections)


async def test_what_must_not_be_sent_twice_meets_no_used_connection() -> None:
    """Its own is fresh; others may use that afterwards."""
    async with staged(decode_tps=1e5) as stage:
        for count in (1, 2):
            await stage.told(body=CHAT, replayable=False)
            assert stage.host.accepted == count
        await stage.told(body=CHAT)
        assert stage.host.accepted == 2


async def test_work_without_a_lease_keeps_to_itself() -> None:
    """A pull takes no connection of the calls, and leaves none behind."""
    async with staged(decode_tps=1e5) as stage:
        await stage.told(body=CHAT)
        tape = Tape()
        stage.upstream.send(Target(stage.host.url), a_call(body=CHAT), tape)
        await tape.over()
        assert tape.ends == [None]
        assert stage.host.accepted == 2
        assert dict(stage.host.requests[-1].headers)["Connection"] == "close"
        assert stage.upstream.idle() == {"a": 1}


async def test_a_changed_target_is_reached_anew() -> None:
    """What stands with the old one is closed, at once if all are replaced; the same one stays."""
    async with staged(decode_tps=1e5) as stage:
        old = Target(stage.host.url)
        await stage.told(old, body=CHAT)
        stage.upstream.targets = {"a": Target(stage.host.url)}
        assert stage.upstream.idle() == {"a": 1}
        stage.upstream.targets = {"a": Target(stage.host.url, headers=(("X-Key", "new"),))}
        assert stage.upstream.idle() == {}
        await until(lambda: not stage.host.connections)
        await stage.told(old, body=CHAT)
        await stage.told(Target(stage.host.url, idle_s=9.0), body=CHAT)
        assert stage.host.accepted == 3
        await until(lambda: stage.host.connections == 1)


async def test_a_flush_closes_what_is_at_rest_and_what_comes_back() -> None:
    """What runs goes on; of a backend without connections there is nothing to flush."""
    async with staged(decode_tps=1e5, words=tuple(" w" for _ in range(50))) as stage:
        tape = Tape()
        await stage.told(body=CHAT)
        stage.upstream.flush("a")
        stage.upstream.flush("b")
        await until(lambda: not stage.host.connections)
        stage.open(tape, body=CHAT)
        stage.upstream.flush("a")
        await tape.over()
        assert tape.ends == [None]
        await stage.told(body=CHAT)
        assert stage.host.accepted == 2  # that one was made after the flush
        handle = stage.open(first := Tape(), body=CHAT)
        stage.upstream.flush("a")
        await first.over()
        handle.abort()
        assert stage.upstream.idle() == {"a": 0}


async def test_a_connection_that_the_host_has_closed_costs_nobody_anything() -> None:
    """The request goes out once more over a fresh one, and that is counted."""
    async with staged(decode_tps=1e5) as stage:
        await stage.told(body=CHAT)
        stage.host.faults.restart()  # its end is in the kernel, and not read yet
        tape = await stage.told(body=CHAT)
        assert (tape.status, tape.ends) == (200, [None])
        assert stage.upstream.stale == {"a": 1}


@virtual
async def test_a_stream_may_take_hours() -> None:
    """There is no limit on the whole, only on silence."""
    async with staged(words=tuple(" w" for _ in range(40)), decode_tps=1 / 250) as stage:
        loop = asyncio.get_running_loop()
        began = loop.time()
        tape = await stage.told(body=CHAT)
        assert tape.ends == [None]
        assert loop.time() - began > 7200


@virtual
async def test_silence_before_the_head_has_no_limit() -> None:
    """A model may take as long as it likes to load."""
    async with staged(load_s=5000.0) as stage:
        tape = await stage.told(body=CHAT)
        assert (tape.status, tape.ends) == (200, [None])


@virtual
async def test_silence_in_an_answer_is_a_failure() -> None:
    """After the limit between two pieces the call is given up, and the host hears of it."""
    async with staged() as stage:
        stage.host.faults.stall(1)
        loop = asyncio.get_running_loop()
        began = loop.time()
        tape = await stage.told(Target(stage.host.url, idle_s=20.0), body=CHAT)
        assert tape.failure.kind is FailureKind.IDLE
        assert 20.0 <= loop.time() - began < 22.0
        await until(lambda: stage.host.requests[-1].ending == "client-gone")


@virtual
async def test_no_limit_on_silence_if_none_is_configured() -> None:
    """`idle: -1` waits as long as it takes."""
    async with staged() as stage:
        stage.host.script(
            "/api/chat", headers=NDJSON, segments=[b"{}\n", (5e4, b"{}\n")], framing="chunked"
        )
        tape = await stage.told(Target(stage.host.url, idle_s=None), body=CHAT)
        assert tape.ends == [None]


@virtual
async def test_a_pause_holds_the_host_back_and_is_no_silence() -> None:
    """While the client is slow nothing is read, and the clock of silence stands still."""
    async with staged() as stage:
        megabyte = b"x" * 999_999 + b"\n"
        stage.host.script("/api/chat", headers=NDJSON, segments=[megabyte] * 40, framing="chunked")
        tape = Tape()
        handle = stage.open(tape, Target(stage.host.url, idle_s=20.0), body=CHAT)
        await tape.begun()
        handle.pause()
        await asyncio.sleep(1)
        held = len(tape.body)
        await asyncio.sleep(600)
        assert len(tape.body) == held < 20_000_000
        handle.resume()
        await tape.over()
        assert tape.ends == [None]
        assert len(tape.body) == 40_000_000


# -- what is sent ---------------------------------------------------------------------------------


async def test_what_goes_up() -> None:
    """The route's path, the query, the call's headers, the backend's own, and nothing else."""
    async with staged(decode_tps=1e5) as stage:
        target = Target(stage.host.url, headers=(("Authorization", "Bearer secret"), ("X-T", "1")))
        headers = (("Accept-Encoding", "identity"), ("X-Mine", "ü"))
        await stage.told(target, body=CHAT, headers=headers, query="a=%2f&b")
        (seen,) = stage.host.requests
        assert (seen.method, seen.body) == ("POST", CHAT)
        assert dict(seen.headers) == {
            "Host": stage.host.url.removeprefix("http://"),
            "Accept-Encoding": "identity",
            "X-Mine": "ü".encode().decode("latin-1"),
            "Content-Length": str(len(CHAT)),
            "Authorization": "Bearer secret",
            "X-T": "1",
            "X-Request-Id": "r1",
        }


async def test_the_backends_own_headers_replace_a_callers() -> None:
    """Whoever reads only the first of two must read the configured one."""
    async with staged(decode_tps=1e5) as stage:
        target = Target(stage.host.url, headers=(("X-Key", "ours"), ("User-Agent", "us")))
        theirs = (("x-key", "theirs"), ("User-Agent", "them"), ("X-Other", "kept"))
        await stage.told(target, body=CHAT, headers=theirs)
        await stage.upstream.ask(target, "GET", "/api/tags", limit_s=5.0, headers=theirs)
        for seen in stage.host.requests:
            got = [(name, value) for name, value in seen.headers if name.lower() != "host"]
            assert [value for name, value in got if name.lower() == "x-key"] == ["ours"]
            assert [value for name, value in got if name == "User-Agent"] == ["us"]
            assert ("X-Other", "kept") in got


async def test_a_path_prefix_of_the_backend_is_kept() -> None:
    """A backend may sit below a path of a web server."""
    async with staged() as stage:
        stage.host.script("/deep/api/chat", segments=[b"{}"])
        tape = await stage.told(Target(f"{stage.host.url}/deep"), body=CHAT)
        assert (tape.status, tape.body) == (200, b"{}")


async def test_cookies_are_not_kept() -> None:
    """What one answer sets is not sent with the next call, which may be another user's."""
    async with staged(decode_tps=1e5) as stage:
        stage.host.script("/api/chat", headers=[("Set-Cookie", "who=me")], segments=[b"{}"])
        await stage.told(body=CHAT)
        await stage.told(body=CHAT)
        assert "Cookie" not in dict(stage.host.requests[-1].headers)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_never_followed(status: int) -> None:
    """It is told as it is; the place it names is not asked, by calls or by questions of ours."""
    async with staged() as stage, SimOllama() as other:
        where = [("Location", f"{other.url}/api/chat"), ("Content-Type", "text/plain")]
        stage.host.script("/api/chat", status=status, headers=where, times=2)
        tape = await stage.told(body=CHAT)
        answer = await stage.upstream.ask(
            Target(stage.host.url), "POST", "/api/chat", b"{}", limit_s=5.0
        )
        assert (tape.status, answer[0]) == (status, status)
        assert not other.requests
        assert not other.accepted


# -- failures -------------------------------------------------------------------------------------

RAW: dict[str, tuple[bytes, FailureKind]] = {
    "no HTTP": (b"\x00\x17garbage\r\n\r\n", FailureKind.MALFORMED),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-", FailureKind.RESET),
    "status 700": (b"HTTP/1.1 700 A\r\nContent-Length: 0\r\n\r\n", FailureKind.MALFORMED),
    "two lengths": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        FailureKind.MALFORMED,
    ),
    "a bad chunk": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n0\r\n\r\n",
        FailureKind.MALFORMED,
    ),
    "a chunk cut short": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nab",
        FailureKind.CUT,
    ),
    "chunks without a last one": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
        FailureKind.CUT,
    ),
    "less than declared": (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab", FailureKind.CUT),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
async def test_a_broken_answer_is_told_by_its_kind(name: str) -> None:
    """What is wrong with the bytes is another failure than bytes that do not come."""
    data, kind = RAW[name]
    async with staged() as stage:
        stage.host.faults.garbage(data)
        tape = await stage.told(body=CHAT)
        assert (tape.failure.kind, tape.failure.accepted) == (kind, True)
        assert tape.body in (b"", b"ab")


async def test_a_refused_connection_is_told() -> None:
    """In a few words for people, and the request was never sent."""
    async with staged() as stage:
        tape = await stage.told(Target(dead_url()), body=CHAT)
        assert tape.failure == Failure(FailureKind.CONNECT, "connection refused")
        assert tape.failure.text == "cannot connect: connection refused"


async def test_a_name_that_does_not_resolve_is_told() -> None:
    """As a connection that cannot be had."""
    async with staged() as stage:
        tape = await stage.told(Target("http://no-such-host.invalid:1"), body=CHAT)
        assert tape.failure.kind is FailureKind.CONNECT
        assert tape.failure.detail


@pytest.mark.parametrize("how", ["reset", "closed"])
async def test_a_connection_lost_before_the_head_is_told(how: str) -> None:
    """The host had the request: repeating it elsewhere may repeat what killed it."""
    async with staged() as stage:
        tape = Tape()
        if how == "reset":
            stage.host.faults.reset_head()
        else:
            stage.host.faults.hang()
        stage.open(tape, body=CHAT)
        if how == "closed":
            await until(lambda: bool(stage.host.requests))
            stage.host.faults.restart()
        await tape.over()
        assert (tape.failure.kind, tape.failure.accepted) == (FailureKind.RESET, True)


@pytest.mark.parametrize("fault", ["cut", "reset"])
async def test_a_connection_lost_in_an_answer_is_told(fault: str) -> None:
    """What came is pushed first."""
    async with staged(decode_tps=1e4) as stage:
        stage.host.faults.apply(fault, 2)
        tape = await stage.told(body=CHAT)
        assert tape.failure.kind is FailureKind.CUT
        assert tape.body == bytes(stage.host.requests[-1].written)


@virtual
async def test_a_host_that_takes_no_connections_is_given_up_soon() -> None:
    """A full backlog, as of a machine that hangs, costs `connect` and no more."""
    async with staged() as stage:
        with full_listener() as url:
            loop = asyncio.get_running_loop()
            began = loop.time()
            tape = await stage.told(Target(url, connect_s=2.0), body=CHAT)
            assert tape.failure.kind is FailureKind.CONNECT_TIMEOUT
            assert 2.0 <= loop.time() - began < 2.5
            with pytest.raises(UpstreamError) as error:
                await stage.upstream.ask(Target(url, connect_s=2.0), "GET", "/", limit_s=60.0)
            assert error.value.failure.kind is FailureKind.CONNECT_TIMEOUT


@virtual
async def test_a_name_that_nobody_resolves_is_given_up_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A resolver that hangs must not hold a call for longer than a host that does."""

    async def hang(*_: object, **__: object) -> None:
        await asyncio.get_running_loop().create_future()

    async with staged() as stage:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", hang)
        began = asyncio.get_running_loop().time()
        tape = await stage.told(Target("http://gpu0.lan:1", connect_s=2.0), body=CHAT)
        assert tape.failure.kind is FailureKind.CONNECT_TIMEOUT
        assert asyncio.get_running_loop().time() - began <= 6.0


@virtual
async def test_a_host_that_stops_reading_the_request_is_given_up() -> None:
    """A large prompt that a frozen host does not take is not sent for ever."""
    async with staged() as stage:
        with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts in the kernel, reads nothing
            url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
            loop = asyncio.get_running_loop()
            began = loop.time()
            tape = await stage.told(Target(url), body=b"x" * 20_000_000)
            assert tape.failure.kind is FailureKind.SEND_STALL
            assert not tape.failure.accepted
            assert 30.0 <= loop.time() - began <= 60.0


class full_listener:  # noqa: N801 - used as a function
    """An address that accepts no connection any more, because nobody takes those that wait."""

    def __enter__(self) -> str:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        where = self._listener.getsockname()
        self._waiting = []
        for _ in range(4):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(where)
            self._waiting.append(sock)
        return f"http://127.0.0.1:{where[1]}"

    def __exit__(self, *_: object) -> None:
        for sock in (*self._waiting, self._listener):
            sock.close()


# -- giving up ------------------------------------------------------------------------------------


@virtual
async def test_an_abort_closes_the_connection_and_silences_the_sink() -> None:
    """Before the head as after it; a second time does nothing."""
    async with staged(words=tuple(" w" for _ in range(99)), load_s=5.0) as stage:
        for after_head in (False, True):
            tape = Tape()
            handle = stage.open(tape, body=CHAT)
            if after_head:
                await tape.begun()
            else:
                await until(lambda: bool(stage.host.requests))
            came = len(tape.pieces)
            handle.abort()
            handle.abort()
            await until(lambda: stage.host.requests[-1].ending == "client-gone")
            assert len(tape.pieces) == came
            assert tape.ends == []
            assert len(stage.tasks) == 0
            if not after_head:
                stage.host.requests.clear()
                await stage.told(body=CHAT)  # the model is loaded now


async def test_a_bug_of_ours_is_told_like_any_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """And as a mishap besides: no call waits for ever."""

    async def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    async with staged() as stage:
        monkeypatch.setattr("balancer.net.connecting.Way.connect", broken)
        tape = await stage.told(body=CHAT)
        assert tape.failure.text.endswith("the balancer failed")
        await until(lambda: len(stage.tasks) == 0)
        (mishap,) = stage.events
        assert "a bug" in str(mishap)
        stage.events.clear()


@pytest.mark.parametrize("ended", ["tasks", "upstream"])
async def test_the_end_of_the_balancer_is_a_failure_of_its_own(ended: str) -> None:
    """Told to every sink, whether it waits for a connection or an answer: none waits for ever."""
    async with staged() as stage:
        stage.host.faults.hang()
        waiting, connecting, late = Tape(), Tape(), Tape()
        stage.open(waiting, body=CHAT)
        await until(lambda: bool(stage.host.requests))
        stage.open(connecting, body=CHAT)
        if ended == "tasks":
            await stage.tasks.close()
            assert (waiting.ends, len(connecting.ends)) == ([], 1)
        stage.upstream.stop()
        stage.open(late, body=CHAT)
        assert late.ends == []  # nothing is told before the handle is there
        await asyncio.sleep(0)
        for tape in (waiting, connecting, late):
            assert tape.failure == Failure(FailureKind.CUT, "the balancer stopped")
        await until(lambda: not stage.host.connections)
        assert len(stage.host.requests) == 1


# -- small questions ------------------------------------------------------------------------------


async def test_ask_gives_status_type_and_body() -> None:
    """Of a good and of a bad answer alike; a body is sent as JSON."""
    async with staged() as stage:
        target = Target(stage.host.url, headers=(("X-Team", "blue"),))
        version = await stage.upstream.ask(target, "GET", "/api/version", limit_s=5.0)
        assert version == (200, "application/json; charset=utf-8", b'{"version":"0.33.0"}')
        status, _, body = await stage.upstream.ask(
            target, "POST", "/api/show", b'{"model":"nope"}', limit_s=5.0
        )
        assert (status, body) == (404, b'{"error":"model \'nope:latest\' not found"}')
        asked = dict(stage.host.requests[-1].headers)
        assert (asked["Content-Type"], asked["X-Team"]) == ("application/json", "blue")
        assert "User-Agent" not in asked


@virtual
async def test_ask_waits_as_long_as_it_may() -> None:
    """Overdue after the limit; the host sees that nobody waits any more."""
    async with staged() as stage:
        stage.host.faults.hang()
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(UpstreamError) as error:
            await stage.upstream.ask(Target(stage.host.url), "GET", "/api/version", limit_s=3.0)
        assert error.value.failure.kind is FailureKind.OVERDUE
        assert loop.time() - began == pytest.approx(3.0, abs=0.1)
        await until(lambda: stage.host.requests[-1].ending == "client-gone")


async def test_ask_does_not_take_an_endless_answer() -> None:
    """A backend cannot fill our memory."""
    async with staged() as stage:
        stage.host.script("/api/tags", segments=[b"x" * 5000] * 10)
        with pytest.raises(UpstreamError, match="endless"):
            await stage.upstream.ask(
                Target(stage.host.url), "GET", "/api/tags", limit_s=5.0, max_bytes=20_000
            )


@pytest.mark.parametrize("name", [name for name in RAW if name != "status 700"])
async def test_ask_tells_a_broken_answer(name: str) -> None:
    """As an error of ours, never as one of aiohttp's."""
    data, kind = RAW[name]
    async with staged() as stage:
        stage.host.faults.garbage(data)
        with pytest.raises(UpstreamError) as error:
            await stage.upstream.ask(Target(stage.host.url), "GET", "/api/tags", limit_s=5.0)
        assert error.value.failure.kind is kind


# -- what we rely on ------------------------------------------------------------------------------


async def test_secrets_are_not_shown() -> None:
    """A target in a log or a traceback does not tell its credentials."""
    assert "secret" not in repr(Target("http://x", headers=(("Authorization", "secret"),)))


def test_sockets_notice_a_peer_that_vanished() -> None:
    """Keep-alive 30/10/3 and a user timeout of 30 s, where the system has them."""
    with socket.socket() as sock:
        tuned(sock)
        told = [
            sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            if hasattr(socket, name)
        ]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert told == [30, 10, 3, 30_000][: len(told)]


@pytest.mark.parametrize("ours", [False, True])
async def test_aiohttp_repeats_by_itself_unless_told_otherwise(ours: bool) -> None:
    """
    A kept connection that is dropped makes aiohttp send a GET again, once `_retry_connection`.

    If this fails the name has changed, and one layer more than ours repeats requests.
    """
    seen = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline() not in (b"\r\n", b""):
            pass
        seen.append("answered")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        if await reader.readline():
            seen.append("dropped")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    connector = aiohttp.TCPConnector()
    client = session(connector) if ours else aiohttp.ClientSession(connector=connector)
    async with client:
        await (await client.get(url)).read()
        if ours:
            with pytest.raises(aiohttp.ServerDisconnectedError):
                await client.get(url)
        else:
            await (await client.get(url)).read()
    server.close()
    await server.wait_closed()
    assert seen == ["answered", "dropped"] if ours else ["answered", "dropped", "answered"]


async def test_the_session_has_none_of_the_conveniences() -> None:
    """Each switch that a proxy must have off is off."""
    async with session(aiohttp.TCPConnector()) as client:
        assert client._retry_connection is False
        assert client.timeout.total is None
        assert client.trust_env is False
        assert client.auto_decompress is False
        assert isinstance(client.cookie_jar, aiohttp.DummyCookieJar)
        assert {str(name) for name in client.skip_auto_headers} >= {"User-Agent", "Accept"}


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what no event tells."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)
