"""The simulated host's disk: what recordings cannot show."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

from balancer.sim.host import SimModel
from balancer.sim.loop import run
from balancer.sim.management import Registry, Store
from balancer.sim.ollama import SimOllama

from .wire import Reply, Wire, ask

SIZE = 1_000_000
MODEL = SimModel("big", size_bytes=SIZE)


def host(body: Callable[[SimOllama], Awaitable[None]], **more: Any) -> None:
    """Runs *body* with a host whose registry offers `big` at a megabyte a second."""

    async def main() -> None:
        async with SimOllama([], registry=Registry([MODEL], bytes_per_s=1e6), **more) as sim:
            await body(sim)

    run(main())


async def pull(sim: SimOllama, model: str = "big", **more: object) -> list[dict[str, Any]]:
    """The records of a pull."""
    reply = await ask(sim.port, "POST", "/api/pull", {"model": model} | more)
    return [json.loads(line) for line in reply.body.splitlines()]


def test_a_pull_installs_the_model_after_its_time() -> None:
    """Progress comes as it is made, and the model is there at the end."""

    async def body(sim: SimOllama) -> None:
        began = sim.now()
        records = await pull(sim)
        assert 1.0 <= sim.now() - began < 1.2
        assert records[-1] == {"status": "success"}
        done = [r["completed"] for r in records if "completed" in r]
        assert done == sorted(done)
        assert sim.host.find("big") is not None

    host(body)


def test_a_pull_stops_with_its_last_watcher_and_goes_on_later() -> None:
    """What was fetched before the client left is not fetched again."""

    async def body(sim: SimOllama) -> None:
        wire = await Wire.connect(sim.port)
        text = json.dumps({"model": "big"}).encode()
        head = f"POST /api/pull HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text)}\r\n\r\n"
        wire.writer.write(head.encode() + text)
        await asyncio.sleep(0.5)
        wire.close()
        await asyncio.sleep(5)
        assert sim.host.find("big") is None
        (left,) = sim.management.store.partial.values()
        assert 400_000 < left < 600_000
        began = sim.now()
        assert (await pull(sim))[-1] == {"status": "success"}
        assert sim.now() - began < 0.7

    host(body)


def test_two_pulls_share_a_download() -> None:
    """Neither is slower, and both end well."""

    async def body(sim: SimOllama) -> None:
        began = sim.now()
        one, other = await asyncio.gather(pull(sim), pull(sim))
        assert one[-1] == other[-1] == {"status": "success"}
        assert sim.now() - began < 1.2

    host(body)


def test_hosts_that_share_a_store_fetch_once() -> None:
    """The second host of a machine finds the files there."""
    store = Store()

    async def body(sim: SimOllama) -> None:
        await pull(sim)
        registry = sim.management.registry
        async with SimOllama([], registry=registry, store=store) as other:
            began = other.now()
            assert (await pull(other))[-1] == {"status": "success"}
            assert other.now() - began < 0.1

    host(body, store=store)


def test_a_download_can_break() -> None:
    """A full disk ends it with an error record, once."""

    async def body(sim: SimOllama) -> None:
        sim.management.store.breaks = "no space left on device"
        assert (await pull(sim))[-1] == {"error": "no space left on device"}
        assert (await pull(sim))[-1] == {"status": "success"}

    host(body)


def test_a_copy_is_the_same_weights_and_a_changed_one_is_not() -> None:
    """Digests tell twins from strangers."""

    async def body(sim: SimOllama) -> None:
        await pull(sim)
        await ask(sim.port, "POST", "/api/copy", {"source": "big", "destination": "twin"})
        made = {"model": "other", "from": "big", "system": "Be brief."}
        await ask(sim.port, "POST", "/api/create", made)
        digests = {model.parsed.shortest: model.digest for model in sim.host.models}
        assert digests["twin:latest"] == digests["big:latest"] != digests["other:latest"]

    host(body)


async def upload(sim: SimOllama, digest: str, pieces: list[bytes], *, chunked: bool) -> Reply:
    """Sends a blob piece by piece."""
    wire = await Wire.connect(sim.port)
    size = sum(map(len, pieces))
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    wire.writer.write(
        f"POST /api/blobs/{digest} HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n".encode()
    )
    for piece in pieces:
        wire.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        await asyncio.sleep(0.001)
    wire.writer.write(b"0\r\n\r\n" if chunked else b"")
    try:
        return await wire.reply("POST")
    finally:
        wire.close()


def test_blobs_are_taken_as_they_come() -> None:
    """With a length and in chunks, cut anywhere; the digest decides."""

    async def body(sim: SimOllama) -> None:
        pieces = [bytes([n]) * 70_001 for n in range(9)]
        digest = f"sha256:{hashlib.sha256(b''.join(pieces)).hexdigest()}"
        wrong = "sha256:" + "0" * 64
        assert (await upload(sim, wrong, pieces, chunked=True)).status == 400
        assert not sim.management.store.blobs
        assert (await upload(sim, digest, pieces, chunked=True)).status == 201
        assert sim.management.store.blobs == {digest: 9 * 70_001}
        assert (await ask(sim.port, "HEAD", f"/api/blobs/{digest}")).status == 200
        sim.management.store.blobs.clear()
        assert (await upload(sim, digest, pieces, chunked=False)).status == 201

    host(body)


def test_a_blob_that_is_there_is_answered_before_it_is_read() -> None:
    """The sender may still be sending: it can read the 200 all the same."""

    async def body(sim: SimOllama) -> None:
        digest = "sha256:" + "1" * 64
        sim.management.store.blobs[digest] = 5
        reply = await upload(sim, digest, [b"x" * 1000] * 5, chunked=True)
        assert (reply.status, reply.get("connection")) == (200, "close")

    host(body)
