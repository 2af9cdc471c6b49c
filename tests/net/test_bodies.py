"""Request bodies: what is there at once, what comes in parts, and what has to wait for room."""

from __future__ import annotations

import asyncio
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp.http_exceptions import PayloadEncodingError
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from multidict import CIMultiDict

from balancer.core.domain import Route
from balancer.core.errors import (
    BadRequest,
    BalancerError,
    BodyTooLarge,
    MemoryFull,
    RequestTimeout,
    UnsupportedEncoding,
)
from balancer.core.memory import SMALL, Memory
from balancer.core.routes import TABLE
from balancer.net import bodies as subject
from balancer.net.bodies import MAX_UNPACKED, ROOM_WAIT_S, STEP, body_at_hand, read_body
from tests.e2e.stage import virtual

if sys.version_info >= (3, 14):
    from compression.zstd import compress
else:
    from backports.zstd import compress

MB = 1 << 20
ENOUGH = 100 * MB


class Upload:
    """A request whose body comes as the test says."""

    def __init__(self, *parts: bytes, length: int | None = None, **headers: str) -> None:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        protocol: Any = SimpleNamespace(
            connected=True, pause_reading=int, resume_reading=lambda **_: None
        )
        self.content = StreamReader(protocol, 2**18, loop=asyncio.get_running_loop())
        self.written: list[bytes] = []
        self.request: Any = SimpleNamespace(
            content=self.content,
            headers=CIMultiDict(names),
            content_length=length,
            version=(1, 1),
            transport=SimpleNamespace(write=self.written.append),
        )
        self.route: Route | None = next(route for route in TABLE if route.operation == "v1_chat")
        self.bytes_in = 0
        for part in parts:
            self.content.feed_data(part)

    def whole(self) -> Upload:
        """Nothing more comes."""
        self.content.feed_eof()
        return self

    async def read(self, memory: Memory | None = None, most: int = ENOUGH) -> bytes | bytearray:
        """The body, its share of the memory given back if there was any error."""
        hold = None if memory is None else memory.hold()
        try:
            return await read_body(self, most, asyncio.get_running_loop().time, hold)
        except BaseException:
            if hold is not None:
                hold.give_back()
            raise


@asynccontextmanager
async def reading(
    upload: Upload, memory: Memory | None = None, most: int = ENOUGH
) -> AsyncIterator[asyncio.Task[bytes | bytearray]]:
    """The body is being read, as far as it has come."""
    task = asyncio.get_running_loop().create_task(upload.read(memory, most))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def at_once(upload: Upload) -> object:
    """What reading gives without ever waiting; fails if it waits."""
    work = upload.read()
    try:
        work.send(None)
    except StopIteration as over:
        return over.value
    finally:
        work.close()
    raise AssertionError


async def refusal(upload: Upload, memory: Memory | None = None, most: int = ENOUGH) -> str:
    """How reading fails."""
    with pytest.raises(BalancerError) as refused:
        await upload.read(memory, most)
    return type(refused.value).__name__


# -- at hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [(), (b"{}",), (b"{", b"}"), (b"x" * SMALL,)])
async def test_a_small_body_that_is_there_needs_no_coroutine(parts: tuple[bytes, ...]) -> None:
    """It is taken as it is, and the stream is at its end then."""
    upload = Upload(*parts).whole()
    assert body_at_hand(upload.request, ENOUGH) == b"".join(parts)
    assert upload.content.at_eof()


async def test_a_request_without_a_body_has_an_empty_one() -> None:
    """What aiohttp hands out where no body was announced."""
    upload = Upload()
    upload.request.content = EMPTY_PAYLOAD
    assert body_at_hand(upload.request, ENOUGH) == b""
    assert await upload.read() == b""


@pytest.mark.parametrize(
    ("upload", "most"),
    [
        (lambda: Upload(b"{}"), ENOUGH),
        (lambda: Upload(b"{}").whole(), 1),
        (lambda: Upload(b"x" * (SMALL + 1)).whole(), ENOUGH),
        (lambda: Upload(b"{}", Content_Encoding="zstd").whole(), ENOUGH),
        (lambda: Upload(b"{}", Expect="100-continue").whole(), ENOUGH),
    ],
)
async def test_what_is_special_is_not_at_hand(upload: Callable[[], Upload], most: int) -> None:
    """Not there yet, too large, large, compressed, asked for: left untouched for the other way."""
    given = upload()
    assert body_at_hand(given.request, most) is None
    assert given.content.total_bytes == len(given.content.read_nowait())


async def test_a_damaged_body_is_not_at_hand() -> None:
    """It would be told in another's words."""
    upload = Upload(b"{}").whole()
    upload.content.set_exception(PayloadEncodingError("bad chunks"))
    assert body_at_hand(upload.request, ENOUGH) is None
    assert await refusal(upload) == BadRequest.__name__


# -- read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(0,), (2000,), (1000, 1000), (MB,)])
async def test_what_is_there_costs_no_timer(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it waited for: reading ends in the step in which it began."""
    monkeypatch.setattr(asyncio, "timeout", None)
    upload = Upload(*(bytes(size) for size in sizes)).whole()
    body = at_once(upload)
    assert (type(body), body) == (bytes, bytes(sum(sizes)))
    assert upload.bytes_in == sum(sizes)


@virtual
async def test_parts_are_put_behind_one_another() -> None:
    """Whatever their sizes, in the order in which they came."""
    parts = [b"a", b"b" * 100_000, b"c" * MB, b"d"]
    upload = Upload()
    async with reading(upload) as task:
        for part in parts:
            upload.content.feed_data(part)
            await asyncio.sleep(1)
        upload.content.feed_eof()
        assert await task == b"".join(parts)
    assert upload.bytes_in == sum(map(len, parts))


async def test_a_body_is_in_memory_once() -> None:
    """Not as parts and whole at the same time."""
    upload = Upload(length=16 * MB)
    tracemalloc.start()
    try:
        async with reading(upload) as task:
            for _ in range(64):
                upload.content.feed_data(bytes(MB // 4))
                await asyncio.sleep(0)
            upload.content.feed_eof()
            assert len(await task) == 16 * MB
        assert tracemalloc.get_traced_memory()[1] < 19 * MB
    finally:
        tracemalloc.stop()


@virtual
async def test_who_waits_is_told_to_go_on_when_there_is_room() -> None:
    """Not before: what is not sent takes no memory anywhere."""
    memory = Memory(MB)
    other = memory.hold(MB)
    upload = Upload(length=MB, Expect="100-continue")
    async with reading(upload, memory):
        assert upload.written == []
        other.give_back()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert upload.written == [b"HTTP/1.1 100 Continue\r\n\r\n"]


@pytest.mark.parametrize(
    ("upload", "most", "error"),
    [
        (lambda: Upload(length=101), 100, BodyTooLarge),
        (lambda: Upload(b"x" * 101).whole(), 100, BodyTooLarge),
        (lambda: Upload(b"x" * 60, b"x" * 60), 100, BodyTooLarge),
        (lambda: Upload(b"{}", Content_Encoding="br").whole(), 100, UnsupportedEncoding),
        (lambda: Upload(b"{}", Content_Encoding="zstd").whole(), 100, BadRequest),
        (lambda: Upload(b"{"), 100, RequestTimeout),
    ],
)
def test_what_is_refused(
    upload: Callable[[], Upload], most: int, error: type[BalancerError]
) -> None:
    """Too large, told or counted; compressed by a stranger; damaged; broken off."""

    @virtual
    async def refuse() -> None:
        assert await refusal(upload(), most=most) == error.__name__

    refuse()


def feed(upload: Upload, sizes: Iterable[int], every_s: float) -> asyncio.Task[None]:
    """Parts of these sizes, so many seconds apart."""

    async def send() -> None:
        for size in sizes:
            await asyncio.sleep(every_s)
            upload.content.feed_data(bytes(size))
        upload.content.feed_eof()

    return asyncio.get_running_loop().create_task(send())


@virtual
async def test_a_body_that_trickles_is_refused() -> None:
    """Below 1 KiB/s after 10 s, and below 100 KiB/s after five minutes."""
    for sizes, is_slow in (
        ([100] * 20, True),
        ([1100] * 20, False),
        ([50 * 1024] * 310, True),
        ([101 * 1024] * 310, False),
    ):
        upload = Upload()
        sending = feed(upload, sizes, 1.0)
        if is_slow:
            assert await refusal(upload) == RequestTimeout.__name__
        else:
            assert len(await upload.read()) == sum(sizes)
        sending.cancel()


# -- room -----------------------------------------------------------------------------------------


@virtual
async def test_a_large_body_is_not_read_before_there_is_room() -> None:
    """Nothing is taken from the stream, so that it fills up and the client has to wait."""
    memory = Memory(2 * MB)
    other = memory.hold(3 * MB // 2)
    upload = Upload(b"x" * MB, length=MB).whole()
    async with reading(upload, memory) as task:
        await asyncio.sleep(ROOM_WAIT_S / 2)
        assert not upload.content.at_eof()
        other.give_back()
        assert len(await task) == memory.held == MB


@virtual
async def test_what_finds_no_room_is_refused() -> None:
    """With a 503 that says when to come again; nothing is kept of it."""
    memory = Memory(MB)
    memory.hold(MB)
    began = asyncio.get_running_loop().time()
    with pytest.raises(MemoryFull, match=r"server\.replay_memory") as refused:
        await Upload(b"x" * MB, length=MB).whole().read(memory)
    assert asyncio.get_running_loop().time() - began == ROOM_WAIT_S
    assert refused.value.retry_after_s
    assert (memory.held, memory.waiting) == (MB, 0)


@pytest.mark.parametrize("length", [SMALL, None])
async def test_a_small_body_does_not_wait_for_room(length: int | None) -> None:
    """Of known length or not; it is counted when it is there."""
    memory = Memory(MB)
    memory.hold(MB)
    assert len(await Upload(b"x" * SMALL, length=length).whole().read(memory)) == SMALL
    assert memory.held == MB + SMALL


@virtual
async def test_a_body_of_unknown_length_takes_memory_in_steps() -> None:
    """Ahead of what comes, and at the end no more than it is."""
    memory = Memory(ENOUGH)
    upload = Upload(b"x" * MB)
    async with reading(upload, memory) as task:
        assert memory.held == MB + STEP
        upload.content.feed_data(b"x" * (MB + 1))
        await asyncio.sleep(1)
        assert memory.held == 2 * MB + 1 + STEP
        upload.content.feed_eof()
        assert len(await task) == memory.held == 2 * MB + 1


@virtual
async def test_waiting_for_room_is_not_held_against_the_client() -> None:
    """It was fast enough while anybody read: just so, and then nobody did for some seconds."""
    memory = Memory(33 * MB)
    other = memory.hold(MB)
    upload, parts = Upload(), 330
    async with reading(upload, memory) as task:
        for _ in range(parts):
            await asyncio.sleep(1)
            upload.content.feed_data(bytes(101 * 1024))
            if memory.waiting:
                await asyncio.sleep(ROOM_WAIT_S - 2)
                other.give_back()
        upload.content.feed_eof()
        assert len(await task) == parts * 101 * 1024
    assert other.size == 0


@virtual
async def test_bodies_of_unknown_length_do_not_block_each_other_for_ever() -> None:
    """Together they are larger than the budget, yet both are read, the older one first."""
    memory = Memory(4 * MB)
    uploads = [Upload(b"x" * MB), Upload(b"x" * MB)]
    async with reading(uploads[0], memory) as first, reading(uploads[1], memory) as second:
        for upload in uploads:
            feed(upload, [MB // 2] * 8, 0.1)
        assert len(await first) == 5 * MB
        assert not second.done()
        memory.limit = 12 * MB
        assert len(await second) == 5 * MB


@virtual
async def test_a_client_that_leaves_gives_up_its_place() -> None:
    """The next one is admitted as if it had never been."""
    memory = Memory(MB)
    other = memory.hold(MB)
    async with reading(Upload(length=ENOUGH), memory) as gone:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert memory.waiting == 0
    other.give_back()
    assert memory.held == 0


async def test_what_a_compressed_body_may_become_is_taken_before() -> None:
    """And what it has become is what stays taken."""
    memory, most = Memory(ENOUGH), list[int]()
    plain = bytes(MB)

    async def unzstd(data: bytes, max_bytes: int) -> bytes:
        most.append(memory.held)
        assert max_bytes == MAX_UNPACKED
        return plain

    packed = compress(plain)
    upload = Upload(packed, Content_Encoding="zstd").whole()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "unzstd", unzstd)
        assert await upload.read(memory) == plain
    assert most == [len(packed) + MAX_UNPACKED]
    assert (memory.held, upload.bytes_in) == (MB, len(packed))


async def test_a_body_that_unpacks_to_too_much() -> None:
    """Above the operator's limit or Ollama's own; the text names which."""
    for most, text in ((MB - 1, r"max_body"), (ENOUGH, "Unpacked")):
        upload = Upload(compress(bytes(MAX_UNPACKED + 1)), Content_Encoding="zstd").whole()
        with pytest.raises(BodyTooLarge, match=text):
            await upload.read(most=most)
