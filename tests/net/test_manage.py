"""Management over several hosts: what the client sees, and what is where afterwards."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import pytest

from balancer.app import Stop
from balancer.core.domain import Switch
from balancer.core.events import OrderEnded
from balancer.core.names import parse
from balancer.sim.host import SimModel
from balancer.sim.management import Registry, Store
from balancer.sim.ollama import SimOllama
from tests.e2e.stage import Asking, virtual
from tests.rig import Rig, running
from tests.sim.wire import Reply, Wire

pytestmark = pytest.mark.usefixtures("quiet")

OLD = SimModel("old", size_bytes=1_000)
BIG = SimModel("big", size_bytes=1_000_000)
CLI = {"User_Agent": "ollama/0.33.0 (amd64 linux) Go/go1.26"}


@asynccontextmanager
async def shelf(
    hosts: int = 3, *, stores: Sequence[str] = (), **more: Any
) -> AsyncIterator[tuple[Rig, Registry]]:
    """
    Hosts that have `old` and may pull `big`, which takes a second.

    Args:
        stores: Names of the hosts' stores; none: each its own.
    """
    registry = Registry([BIG], bytes_per_s=1e6)
    async with running(hosts, models=[OLD], **more) as rig:
        for host in rig.fleet:
            host.management.registry = registry
        for name, member in rig.balancer.pool.members.items():
            separate(
                rig, name, stores[list(rig.balancer.pool.members).index(name)] if stores else name
            )
            assert member.health.up
        yield rig, registry


def separate(rig: Rig, name: str, store: str) -> None:
    """Say where a host keeps its models, as the configuration would."""
    member = rig.balancer.pool.members[name]
    object.__setattr__(member.backend, "store", store)


def lines(reply: Reply) -> list[dict[str, Any]]:
    """The records of a stream."""
    return [json.loads(line) for line in reply.body.splitlines()]


def having(rig: Rig, model: str) -> list[str]:
    """The hosts that have a model."""
    return [host.name for host in rig.fleet if host.host.find(model) is not None]


def requests(rig: Rig, path: str) -> dict[str, int]:
    """How many requests for a path each host saw."""
    return {host.name: sum(seen.path == path for seen in host.requests) for host in rig.fleet}


# -- pull ---------------------------------------------------------------------------------------


@virtual
async def test_a_pull_goes_to_all_and_looks_like_one() -> None:
    """One bar that rises from nothing to full, and one success."""
    async with shelf() as (rig, _):
        reply = await rig.ask("POST", "/api/pull", {"model": "big"})
        records = lines(reply)
        assert reply.get("content-type") == "application/x-ndjson"
        assert having(rig, "big") == ["a", "b", "c"]
        assert records[0]["status"] == "pulling manifest"
        assert records[-1]["status"] == "success"
        bar = [r.get("completed", 0) for r in records if r.get("total") == BIG.size_bytes]
        assert bar == sorted(bar)
        assert bar[-1] == BIG.size_bytes
        assert {name: told["status"] for name, told in records[-1]["backends"].items()} == {
            "a": "success",
            "b": "success",
            "c": "success",
        }


@virtual
async def test_the_next_call_finds_what_was_pulled() -> None:
    """`ollama run` shows, pulls and shows again, without a pause."""
    async with shelf(2) as (rig, _):
        assert (await rig.ask("POST", "/api/show", {"model": "big"})).status == 404
        await rig.ask("POST", "/api/pull", {"model": "big"})
        assert (await rig.ask("POST", "/api/show", {"model": "big"})).status == 200
        assert b'"big:latest"' in (await rig.ask("GET", "/api/tags")).body


@virtual
async def test_what_is_there_already_is_not_pulled() -> None:
    """Coding agents pull at every start: an answer at once, from nobody."""
    async with shelf(2) as (rig, _):
        reply = await rig.ask("POST", "/api/pull", {"model": "old"})
        assert [r["status"] for r in lines(reply)] == ["pulling manifest", "success"]
        plain = await rig.ask("POST", "/api/pull", {"model": "old", "stream": False})
        assert json.loads(plain.body) == {"status": "success"}
        assert requests(rig, "/api/pull") == {"a": 0, "b": 0}


@virtual
async def test_the_command_line_pulls_what_is_new() -> None:
    """A person who pulls what is there wants its newest version."""
    async with shelf(2) as (rig, registry):
        registry.add(SimModel("old", size_bytes=2_000, content="newer"))
        reply = await rig.ask("POST", "/api/pull", {"model": "old"}, **CLI)
        assert lines(reply)[-1]["status"] == "success"
        assert requests(rig, "/api/pull") == {"a": 1, "b": 1}
        digests = {host.host.find("old").digest for host in rig.fleet}  # type: ignore[union-attr]
        assert digests == {SimModel("x", content="newer").digest}


@virtual
async def test_hosts_that_share_a_store_pull_once() -> None:
    """The first fetches; the others are looked at, and have it."""
    async with shelf(3, stores=["box", "box", "c"]) as (rig, _):
        store = Store()
        a, b = (rig.fleet[name] for name in "ab")
        a.management.store = b.management.store = store
        b.host._disk = a.host._disk
        reply = await rig.ask("POST", "/api/pull", {"model": "big"})
        assert lines(reply)[-1]["status"] == "success"
        assert requests(rig, "/api/pull") == {"a": 1, "b": 0, "c": 1}
        assert having(rig, "big") == ["a", "b", "c"]


@virtual
async def test_a_wrong_guess_about_a_store_is_mended() -> None:
    """Hosts of one machine with one list may yet keep their models apart."""
    async with shelf(2, stores=["", ""]) as (rig, _):
        reply = await rig.ask("POST", "/api/pull", {"model": "big"})
        assert lines(reply)[-1]["status"] == "success"
        assert having(rig, "big") == ["a", "b"]


@virtual
async def test_one_that_fails_hides_nothing() -> None:
    """The others finish, and the last record names who did not, and why."""
    async with shelf() as (rig, _):
        rig.fleet["b"].management.store.breaks = "no space left on device"
        reply = await rig.ask("POST", "/api/pull", {"model": "big"})
        last = lines(reply)[-1]
        assert last["error"] == "failed on 1 of 3 hosts: b: no space left on device (done on a, c)"
        assert having(rig, "big") == ["a", "c"]
        (order,) = rig.events.of(OrderEnded)
        assert (order.done, order.failed) == (("a", "c"), ("b: no space left on device",))


@virtual
async def test_one_that_is_down_is_left_out_and_told() -> None:
    """A sleeping computer is no failure."""
    async with shelf(3) as (rig, _):
        rig.fleet["c"].faults.refuse()
        await rig.events.until(lambda: not rig.balancer.pool.members["c"].health.up, 60)
        *_, told, last = lines(await rig.ask("POST", "/api/pull", {"model": "big"}))
        assert (told["status"], last["status"]) == ("left out c: is down", "success")
        assert last["backends"]["c"] == {"skipped": "is down"}
        assert having(rig, "big") == ["a", "b"]


@virtual
async def test_one_killed_in_the_middle_fails_alone() -> None:
    """Its connection ends; the other's download goes on to the end."""
    async with shelf(2) as (rig, _):
        pulling = asyncio.get_running_loop().create_task(
            rig.ask("POST", "/api/pull", {"model": "big"})
        )
        await asyncio.sleep(0.5)
        rig.fleet["a"].faults.restart()
        last = lines(await pulling)[-1]
        assert "a: closed the connection in the middle" in last["error"]
        assert having(rig, "big") == ["b"]


@virtual
async def test_one_that_hangs_fails_alone() -> None:
    """It takes the order and says nothing, not even a head, for all of `timeouts.pull_idle`."""
    async with shelf(2, config={"timeouts.pull_idle": "20s"}) as (rig, _):
        began = asyncio.get_running_loop().time()
        pulling = asyncio.get_running_loop().create_task(
            rig.ask("POST", "/api/pull", {"model": "big"})
        )
        await asyncio.sleep(0)
        rig.fleet["a"].faults.hang()
        async with asyncio.timeout(100):
            last = lines(await pulling)[-1]
        assert last["error"].startswith("failed on 1 of 2 hosts: a: stopped in the middle")
        assert asyncio.get_running_loop().time() - began < 25
        assert having(rig, "big") == ["b"]


@virtual
async def test_a_nonsense_name_fails_in_ollamas_words() -> None:
    """All fail alike: one clear line, in the stream or as a 500."""
    text = "pull model manifest: file does not exist"
    async with shelf() as (rig, _):
        reply = await rig.ask("POST", "/api/pull", {"model": "nonsense"})
        assert lines(reply)[-1]["error"] == text
        plain = await rig.ask("POST", "/api/pull", {"model": "nonsense", "stream": False})
        assert (plain.status, json.loads(plain.body)["error"]) == (500, text)
        bad = await rig.ask("POST", "/api/pull", {"model": "a b"})
        assert (bad.status, json.loads(bad.body)["error"]) == (400, "invalid model name")


@virtual
async def test_hanging_up_stops_the_downloads() -> None:
    """Of all hosts, at once; what was fetched is kept for the next time."""
    async with shelf(2) as (rig, _):
        wire = await begun(rig, "big")
        await asyncio.sleep(0.5)
        wire.close()
        await asyncio.sleep(0.1)
        for host in rig.fleet:
            assert not host.management.store.downloads
            (left,) = host.management.store.partial.values()
            assert 300_000 < left < 700_000
        (order,) = rig.events.of(OrderEnded)
        assert not order.finished


@virtual
async def test_a_second_pull_joins_the_first() -> None:
    """One download, two watchers; the one who leaves takes nothing from the other."""
    async with shelf(2) as (rig, _):
        wire = await begun(rig, "big")
        await asyncio.sleep(0.4)
        second = asyncio.get_running_loop().create_task(
            rig.ask("POST", "/api/pull", {"model": "big"})
        )
        await asyncio.sleep(0.2)
        wire.close()
        records = lines(await second)
        assert records[0]["status"] == "pulling manifest"
        assert records[-1]["status"] == "success"
        assert requests(rig, "/api/pull") == {"a": 1, "b": 1}


async def begun(rig: Rig, model: str) -> Wire:
    """A pull whose client does not read on."""
    wire = await rig.connect()
    body = json.dumps({"model": model}).encode()
    head = f"POST /api/pull HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    wire.writer.write(head.encode() + body)
    return wire


@virtual
async def test_no_more_downloads_at_once_than_allowed() -> None:
    """The uplink is shared with others."""
    async with shelf(3, config={"manage.parallel": 1}) as (rig, _):
        began = asyncio.get_running_loop().time()
        await rig.ask("POST", "/api/pull", {"model": "big"})
        assert asyncio.get_running_loop().time() - began > 3.0
        assert having(rig, "big") == ["a", "b", "c"]


@virtual
async def test_rules_and_targets_decide_where_a_pull_goes() -> None:
    """Not where the model may not be, nor where the operator does not want pulls."""
    async with shelf(3, config={"manage.pull.target": ["a", "b"]}) as (rig, _):
        object.__setattr__(rig.balancer.pool.members["a"].backend, "deny", ("big*",))
        await rig.ask("POST", "/api/pull", {"model": "big"})
        assert having(rig, "big") == ["b"]


@virtual
async def test_a_wrong_guess_is_mended_for_a_newer_version_too() -> None:
    """The other host lists the model as well, but the older one."""
    async with shelf(2, stores=["", ""]) as (rig, registry):
        registry.add(SimModel("old", size_bytes=2_000, content="newer"))
        reply = await rig.ask("POST", "/api/pull", {"model": "old"}, **CLI)
        assert lines(reply)[-1]["status"] == "success"
        digests = {host.host.find("old").digest for host in rig.fleet}  # type: ignore[union-attr]
        assert digests == {SimModel("x", content="newer").digest}


@virtual
async def test_a_pull_may_be_limited_to_some() -> None:
    """What `models pull --to` sends; a name that is none is refused with those there are."""
    async with shelf(3) as (rig, _):
        await rig.ask("POST", "/api/pull", {"model": "big"}, X_Balancer_To="a, c")
        assert having(rig, "big") == ["a", "c"]
        again = await rig.ask("POST", "/api/pull", {"model": "big"}, X_Balancer_To="b")
        assert lines(again)[-1]["backends"] == {"b": {"status": "success"}}
        wrong = await rig.ask("POST", "/api/pull", {"model": "big"}, X_Balancer_To="d")
        told = 'no backend "d". There are: a, b, c.'
        assert (wrong.status, json.loads(wrong.body)["error"]) == (400, told)


@virtual
async def test_a_pull_to_one_that_is_down_is_no_success() -> None:
    """Although the others have the model."""
    async with shelf(2) as (rig, _):
        rig.fleet["b"].faults.refuse()
        await rig.events.until(lambda: not rig.balancer.pool.members["b"].health.up, 60)
        reply = await rig.ask("POST", "/api/pull", {"model": "old"}, X_Balancer_To="b")
        assert reply.status == 503
        assert "b is down" in json.loads(reply.body)["error"]


@virtual
async def test_one_that_the_operator_has_switched_off_is_left_out() -> None:
    """It is about to be restarted, or is not to be touched."""
    async with shelf(3) as (rig, _):
        rig.balancer.pool.turn("a", Switch.DRAINING)
        rig.balancer.pool.turn("b", Switch.DISABLED)
        last = lines(await rig.ask("POST", "/api/pull", {"model": "big"}))[-1]
        assert last["status"] == "success"
        assert last["backends"]["a"] == {"skipped": "is draining"}
        assert last["backends"]["b"] == {"skipped": "is disabled"}
        assert having(rig, "big") == ["c"]


@virtual
async def test_a_stop_is_told_to_who_watches_a_pull() -> None:
    """Ollama's command line takes a stream that just ends for a success."""
    async with shelf(2, config={"server.drain_timeout": "0.2s"}) as (rig, _):
        pulling = asyncio.get_running_loop().create_task(
            rig.ask("POST", "/api/pull", {"model": "big"})
        )
        await asyncio.sleep(0.3)
        rig.balancer.stop(Stop("test"))
        await rig.balancer.wait()
        reply = await pulling
        assert reply.ended == "clean"
        assert "error" in lines(reply)[-1], lines(reply)


@virtual
async def test_who_hangs_up_may_begin_again_at_once() -> None:
    """And goes on where it was broken off."""
    async with shelf(1) as (rig, _):
        wire = await begun(rig, "big")
        await asyncio.sleep(0.5)
        wire.close()
        began = asyncio.get_running_loop().time()
        reply = await rig.ask("POST", "/api/pull", {"model": "big"})
        assert lines(reply)[-1]["status"] == "success"
        assert asyncio.get_running_loop().time() - began < 0.9


# -- pulled for a call --------------------------------------------------------------------------

AUTO = {"manage.auto_pull": True}
ASKS = {"model": "big", "prompt": "hi"}


@virtual
async def test_a_call_may_pull_what_nobody_has() -> None:
    """It waits for the download, with signs of life, and is answered."""
    async with shelf(2, config={**AUTO, "streaming.heartbeat_after": "0.5s"}) as (rig, _):
        reply = await rig.ask("POST", "/api/generate", ASKS)
        assert (reply.status, lines(reply)[-1]["done"]) == (200, True)
        assert lines(reply)[0]["response"] == ""
        assert having(rig, "big") == ["a", "b"]


@virtual
async def test_a_pull_for_a_call_that_fails_is_a_404_with_the_reason() -> None:
    """Once, not again and again."""
    async with shelf(2, config=AUTO) as (rig, _):
        reply = await rig.ask("POST", "/api/generate", {**ASKS, "model": "nonsense"})
        assert reply.status == 404
        assert "pull model manifest: file does not exist" in json.loads(reply.body)["error"]
        assert requests(rig, "/api/pull") == {"a": 1, "b": 1}


@virtual
async def test_calls_pull_only_where_it_is_wanted_and_allowed() -> None:
    """Off by default; and it takes the right to pull."""
    async with shelf(1) as (rig, _):
        assert (await rig.ask("POST", "/api/generate", ASKS)).status == 404
    async with shelf(1, config={**KEYS, **AUTO}) as (rig, _):
        assert (await rig.ask("POST", "/api/generate", ASKS, **USER)).status == 404
        assert (await rig.ask("POST", "/api/generate", ASKS, **ADMIN)).status == 200


@virtual
async def test_a_client_that_leaves_ends_the_pull_it_caused() -> None:
    """Unless somebody else waits for it."""
    async with shelf(1, config=AUTO) as (rig, _):
        wire = await rig.connect()
        body = json.dumps(ASKS).encode()
        head = f"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        wire.writer.write(head.encode() + b"\r\n\r\n" + body)
        await asyncio.sleep(0.5)
        assert rig.fleet["a"].management.store.downloads
        wire.close()
        await asyncio.sleep(0.1)
        assert not rig.fleet["a"].management.store.downloads
        await rig.idle()


@pytest.mark.parametrize("stream", [True, False])
@virtual
async def test_a_stop_is_told_to_calls_that_wait_for_a_pull(stream: bool) -> None:
    """Inside the stream where it has begun, and as what it is."""
    more = {"streaming.heartbeat_after": "0.5s", "server.drain_timeout": "5s"}
    async with shelf(1, config=AUTO | more) as (rig, registry):
        registry.bytes_per_s = 1.0
        asking = await Asking.of(rig, "/api/generate", ASKS | {"stream": stream})
        await asyncio.sleep(3.0)
        rig.balancer.stop(Stop("test"))
        head, _ = await asyncio.gather(asking.head(), rig.balancer.wait())
        assert head.status == (200 if stream else 503)
        reply = await asking.rest()
        assert "The balancer is stopping" in lines(reply)[-1]["error"]
        assert [told.outcome for told in await rig.ended()] == ["shed"]
        asking.close()


# -- push, create, copy, delete -----------------------------------------------------------------


@virtual
async def test_a_push_comes_from_one_that_has_it() -> None:
    """And only from one."""
    async with shelf(3) as (rig, registry):
        rig.fleet["a"].host.remove("old")
        await rig.balancer.prober.relist("a")
        reply = await rig.ask("POST", "/api/push", {"model": "old"})
        assert lines(reply)[0]["status"] == "retrieving manifest"
        assert lines(reply)[-1]["status"] == "success"
        assert requests(rig, "/api/push") == {"a": 0, "b": 1, "c": 0}
        assert registry.find("old") is not None


@virtual
async def test_a_push_of_what_nobody_has() -> None:
    """404 before anything is begun; of what only a host that is away has: that it is away."""
    async with shelf(2) as (rig, _):
        reply = await rig.ask("POST", "/api/push", {"model": "none"})
        assert (reply.status, reply.body) == (404, b'{"error":"model \'none\' not found"}')
        rig.fleet["a"].host.remove("old")
        await rig.balancer.prober.relist("a")
        rig.fleet["b"].faults.refuse()
        await rig.events.until(lambda: not rig.balancer.pool.members["b"].health.up, 60)
        reply = await rig.ask("POST", "/api/push", {"model": "old"})
        assert (reply.status, "b is down" in json.loads(reply.body)["error"]) == (503, True)


@virtual
async def test_a_host_killed_in_a_create_fails_alone() -> None:
    """The others have the model, and the last record says who has not."""
    async with shelf(3) as (rig, registry):
        registry.bytes_per_s = 1e6
        body = {"model": "mine", "from": "big"}  # which each of them must fetch first
        creating = asyncio.get_running_loop().create_task(rig.ask("POST", "/api/create", body))
        await asyncio.sleep(0.5)
        rig.fleet["b"].faults.restart()
        last = lines(await creating)[-1]
        assert last["error"].startswith("failed on 1 of 3 hosts: b: ")
        assert having(rig, "mine") == ["a", "c"]
        assert (await rig.ask("POST", "/api/show", {"model": "mine"})).status == 200


@virtual
async def test_a_copy_goes_only_where_its_name_may_be() -> None:
    """A rule holds for what is made here, too; where none allows it, that is said."""
    async with shelf(2) as (rig, _):
        for name, deny in (("a", ("twin*",)), ("b", ("other*",))):
            object.__setattr__(rig.balancer.pool.members[name].backend, "deny", deny)
        await rig.ask("POST", "/api/copy", {"source": "old", "destination": "twin"})
        assert having(rig, "twin") == ["b"]
        object.__setattr__(rig.balancer.pool.members["b"].backend, "deny", ("*",))
        refused = await rig.ask("POST", "/api/copy", {"source": "old", "destination": "twin"})
        assert (refused.status, b"may take 'twin'" in refused.body) == (503, True)


@virtual
async def test_a_copy_over_an_older_one_reaches_a_wrongly_guessed_store() -> None:
    """A name that is there already says nothing; what it stands for does."""
    async with shelf(2, stores=["", ""]) as (rig, _):
        for host in rig.fleet:
            host.host.add(SimModel("twin", content="older"))
            await rig.balancer.prober.relist(host.name)
        await rig.ask("POST", "/api/copy", {"source": "old", "destination": "twin"})
        digests = {host.host.find("twin").digest for host in rig.fleet}  # type: ignore[union-attr]
        assert digests == {OLD.digest}


@virtual
async def test_a_create_goes_where_its_source_is() -> None:
    """Elsewhere it would have to be fetched first."""
    async with shelf(3) as (rig, _):
        rig.fleet["a"].host.remove("old")
        await rig.balancer.prober.relist("a")
        reply = await rig.ask("POST", "/api/create", {"model": "new", "from": "old"})
        assert lines(reply)[-1]["status"] == "success"
        assert having(rig, "new") == ["b", "c"]
        assert (await rig.ask("POST", "/api/show", {"model": "new"})).status == 200


@virtual
async def test_a_copy_and_a_delete_reach_all_who_have_it() -> None:
    """One that has it no more has done it already."""
    async with shelf(3) as (rig, _):
        reply = await rig.ask("POST", "/api/copy", {"source": "old", "destination": "twin"})
        assert (reply.status, reply.body) == (200, b"")
        assert having(rig, "twin") == ["a", "b", "c"]
        rig.fleet["b"].host.remove("twin")
        reply = await rig.ask("DELETE", "/api/delete", {"model": "twin"})
        assert (reply.status, reply.body) == (200, b"")
        assert having(rig, "twin") == []
        again = await rig.ask("DELETE", "/api/delete", {"model": "twin"})
        assert (again.status, again.body) == (404, b'{"error":"model \'twin\' not found"}')
        gone = await rig.ask("POST", "/api/copy", {"source": "none", "destination": "x"})
        assert (gone.status, gone.body) == (404, b'{"error":"model \\"none\\" not found"}')


@virtual
async def test_a_delete_that_is_broken_off_is_in_the_log() -> None:
    """With those that have done it: an operator will ask where the model went."""
    async with shelf(2) as (rig, _):
        wire = await rig.connect()
        body = b'{"model":"old"}'
        rig.fleet["b"].faults.hang()
        head = f"DELETE /api/delete HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        wire.writer.write(head.encode() + b"\r\n\r\n" + body)
        await asyncio.sleep(1)
        wire.close()
        await rig.events.until(lambda: bool(rig.events.of(OrderEnded)))
        (order,) = rig.events.of(OrderEnded)
        assert (order.operation, order.done, order.finished) == ("delete", ("a",), False)


# -- blobs --------------------------------------------------------------------------------------

PIECES = [bytes([n]) * 100_000 for n in range(30)]
DIGEST = f"sha256:{hashlib.sha256(b''.join(PIECES)).hexdigest()}"


async def upload(
    rig: Rig,
    digest: str,
    pieces: Sequence[bytes] = PIECES,
    *,
    after: int = 99,
    do: Any = None,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> Reply:
    """A blob in chunks, as Ollama's command line sends it; *do* is called after so many."""
    wire = await rig.connect()
    more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    wire.writer.write(
        f"POST /api/blobs/{digest} HTTP/1.1\r\nHost: localhost\r\n{more}"
        "Transfer-Encoding: chunked\r\n\r\n".encode()
    )
    for number, piece in enumerate(pieces):
        if number == after:
            do()
        wire.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        await wire.writer.drain()
        await asyncio.sleep(0.001)
    wire.writer.write(b"0\r\n\r\n")
    try:
        return await wire.reply("POST")
    finally:
        wire.close()


@virtual
async def test_a_blob_reaches_all_and_is_made_a_model_there() -> None:
    """What `ollama create` does with a file."""
    async with shelf(3) as (rig, _):
        head = await rig.ask("HEAD", f"/api/blobs/{DIGEST}")
        assert head.status == 404
        assert (await upload(rig, DIGEST)).status == 201
        assert (await rig.ask("HEAD", f"/api/blobs/{DIGEST}")).status == 200
        body = {"model": "mine", "files": {"m.gguf": DIGEST}}
        assert lines(await rig.ask("POST", "/api/create", body))[-1]["status"] == "success"
        assert having(rig, "mine") == ["a", "b", "c"]


@virtual
async def test_a_blob_that_all_have_is_answered_at_once() -> None:
    """And one that only some have goes to the others alone."""
    async with shelf(2) as (rig, _):
        rig.fleet["a"].management.store.blobs[DIGEST] = 1
        assert (await upload(rig, DIGEST)).status == 201
        assert requests(rig, f"/api/blobs/{DIGEST}") == {"a": 1, "b": 2}
        reply = await upload(rig, DIGEST)  # which is heard by who sends everything first, too
        assert (reply.status, reply.get("connection"), reply.ended) == (200, "close", "clean")
        wire = await rig.connect()
        head = f"POST /api/blobs/{DIGEST} HTTP/1.1\r\nHost: localhost\r\n"
        wire.writer.write(f"{head}Content-Length: 9000\r\n\r\n".encode())
        assert (await wire.reply("POST")).status == 200, "nothing of the body was sent yet"
        wire.close()
        assert [call.outcome for call in (await rig.ended(3))[-3:]] == ["ok"] * 3


@virtual
async def test_a_wrong_digest_leaves_nothing_behind() -> None:
    """400, in Ollama's words."""
    wrong = "sha256:" + "0" * 64
    async with shelf(2) as (rig, _):
        reply = await upload(rig, wrong)
        assert reply.status == 400
        assert json.loads(reply.body)["error"].startswith(f'digest mismatch, expected "{wrong}"')
        assert not any(wrong in host.management.store.blobs for host in rig.fleet)
        bad = await rig.ask("HEAD", "/api/blobs/sha256:abc")
        assert bad.status == 400


@virtual
async def test_a_host_killed_in_an_upload_is_left_out_of_the_create() -> None:
    """The upload goes on to the others; the create says who lacks the blob."""
    async with shelf(2) as (rig, _):
        kill = rig.fleet["a"].faults.restart
        reply = await upload(rig, DIGEST, after=10, do=kill)
        assert (reply.status, reply.get("x-balancer-skipped")) == (201, "a")
        body = {"model": "mine", "files": {"m.gguf": DIGEST}}
        last = lines(await rig.ask("POST", "/api/create", body))[-1]
        assert last["status"] == "success"
        assert "does not have the blob" in last["backends"]["a"]["skipped"]
        assert having(rig, "mine") == ["b"]


@virtual
async def test_what_a_host_missed_is_sent_to_it_before_the_create() -> None:
    """It was down during the upload; what was kept makes it whole."""
    with TemporaryDirectory() as directory:
        async with shelf(2, config={"manage.spool": directory}) as (rig, _):
            rig.fleet["a"].faults.refuse()
            await rig.events.until(lambda: not rig.balancer.pool.members["a"].health.up, 60)
            assert (await upload(rig, DIGEST)).status == 201
            assert DIGEST not in rig.fleet["a"].management.store.blobs
            rig.fleet["a"].faults.heal()
            await rig.events.until(lambda: bool(rig.balancer.pool.members["a"].health.up), 60)
            body = {"model": "mine", "files": {"m.gguf": DIGEST}}
            assert lines(await rig.ask("POST", "/api/create", body))[-1]["status"] == "success"
            assert having(rig, "mine") == ["a", "b"]
            assert rig.fleet["a"].management.store.blobs[DIGEST] == sum(map(len, PIECES))


@virtual
async def test_a_client_that_hangs_up_leaves_no_blob() -> None:
    """Nor anything running."""
    async with shelf(2) as (rig, _):
        wire = await rig.connect()
        wire.writer.write(
            f"POST /api/blobs/{DIGEST} HTTP/1.1\r\nHost: localhost\r\n"
            "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n".encode()
        )
        await asyncio.sleep(0.2)
        wire.close()
        await asyncio.sleep(0.2)
        assert not any(DIGEST in host.management.store.blobs for host in rig.fleet)
        assert all(host.connections <= 1 for host in rig.fleet)


@virtual
async def test_only_a_named_store_is_sent_a_blob_once() -> None:
    """What was sent is not kept, so that a wrong guess could not be mended."""
    for stores, asked in ((["", ""], {"a": 2, "b": 2}), (["box", "box"], {"a": 2, "b": 0})):
        async with shelf(2, stores=stores) as (rig, _):
            assert (await upload(rig, DIGEST)).status == 201
            assert requests(rig, f"/api/blobs/{DIGEST}") == asked


@virtual
async def test_an_upload_that_is_damaged() -> None:
    """400, and no host has it, nor a part of it."""
    async with shelf(2) as (rig, _):
        wire = await rig.connect()
        wire.writer.write(
            f"POST /api/blobs/{DIGEST} HTTP/1.1\r\nHost: localhost\r\n"
            "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n".encode()
        )
        await asyncio.sleep(0.2)
        wire.writer.write(b"what?\r\n")
        assert (await wire.reply("POST")).status == 400
        wire.close()
        await asyncio.sleep(0.2)
        assert all(host.connections <= 1 for host in rig.fleet)


@virtual
async def test_a_host_that_takes_a_blob_and_says_nothing() -> None:
    """Is not waited for for ever: the others have it."""
    async with shelf(2, config={"timeouts.pull_idle": "20s"}) as (rig, _):
        reply = await upload(rig, DIGEST, after=20, do=rig.fleet["a"].faults.freeze)
        assert (reply.status, reply.get("x-balancer-skipped")) == (201, "a")
        assert DIGEST in rig.fleet["b"].management.store.blobs
        rig.fleet["a"].faults.heal()


@virtual
async def test_a_client_that_waits_to_be_asked_for_a_body() -> None:
    """100 only if the body is wanted."""
    async with shelf(2) as (rig, _):
        body = b"".join(PIECES)
        head = (
            f"POST /api/blobs/{DIGEST} HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        wire = await rig.connect()
        wire.writer.write(head)
        interim = await wire.reader.readuntil(b"\r\n\r\n")
        assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
        wire.writer.write(body)
        assert (await wire.reply("POST")).status == 201
        wire.close()
        again = await rig.raw(head, method="POST")
        assert (again.status, again.interim, again.get("connection")) == (200, [], "close")


@virtual
async def test_nobody_has_the_blob() -> None:
    """Then the hosts' own answer is the best one."""
    async with shelf(2) as (rig, _):
        body = {"model": "mine", "files": {"m.gguf": DIGEST}}
        last = lines(await rig.ask("POST", "/api/create", body))[-1]
        assert "no such file or directory" in last["error"]


# -- rights -------------------------------------------------------------------------------------

KEYS = {
    "auth.keys": [
        {"name": "u", "role": "user", "key": "user-key-0123456789abcdef"},
        {"name": "o", "role": "admin", "key": "admin-key-0123456789abcdef"},
    ],
    "auth.anonymous": "never",
}
USER = {"Authorization": "Bearer user-key-0123456789abcdef"}
ADMIN = {"Authorization": "Bearer admin-key-0123456789abcdef"}


@virtual
async def test_a_user_may_pull_what_is_there_and_nothing_else() -> None:
    """403 with the reason, in one line."""
    async with shelf(2, config=KEYS) as (rig, _):
        there = await rig.ask("POST", "/api/pull", {"model": "old"}, **USER)
        assert lines(there)[-1]["status"] == "success"
        for method, path, body in [
            ("POST", "/api/pull", {"model": "big"}),
            ("POST", "/api/push", {"model": "old"}),
            ("POST", "/api/create", {"model": "n", "from": "old"}),
            ("POST", "/api/copy", {"source": "old", "destination": "n"}),
            ("POST", f"/api/blobs/{DIGEST}", {"x": 1}),
        ]:
            reply = await rig.ask(method, path, body, **USER)
            assert reply.status == 403, path
            assert "role admin" in json.loads(reply.body)["error"]
        refused = await upload(rig, DIGEST, PIECES[:10], headers=USER)
        assert (refused.status, refused.ended) == (403, "clean"), "who still sends hears it, too"
        curious = {"X_Balancer_To": "nobody", "X_Balancer_Update": "1", **USER}
        there = await rig.ask("POST", "/api/pull", {"model": "old"}, **curious)
        assert lines(there)[-1] == {"status": "success"}
        done = await rig.ask("POST", "/api/pull", {"model": "big"}, **ADMIN)
        assert lines(done)[-1]["status"] == "success"


@pytest.mark.parametrize("who", [USER, ADMIN])
@virtual
async def test_which_backends_there_are_may_be_for_admins_only(who: dict[str, str]) -> None:
    """Also where a name is wrong."""
    more = {"manage.pull.allow": "user", "server.headers": "minimal"}
    async with shelf(2, config=KEYS | more) as (rig, _):
        wrong = await rig.ask("POST", "/api/pull", {"model": "big"}, X_Balancer_To="d", **who)
        assert wrong.status == 400
        assert ("There are: a, b." in json.loads(wrong.body)["error"]) is (who is ADMIN)


@virtual
async def test_a_right_may_be_everybodys_or_nobodys() -> None:
    """As the operator says."""
    more = {"manage.pull.allow": "user", "manage.copy.allow": "never"}
    async with shelf(1, config=KEYS | more) as (rig, _):
        done = await rig.ask("POST", "/api/pull", {"model": "big"}, **USER)
        assert lines(done)[-1]["status"] == "success"
        body = {"source": "old", "destination": "n"}
        reply = await rig.ask("POST", "/api/copy", body, **ADMIN)
        assert reply.status == 403
        assert "manage.copy.allow" in json.loads(reply.body)["error"]


@virtual
async def test_a_user_need_not_be_told_which_hosts_there_are() -> None:
    """Where the headers are minimal; whoever may see them is told, also of the same pull."""
    more = {"manage.pull.allow": "user", "server.headers": "minimal"}
    async with shelf(2, config=KEYS | more) as (rig, _):
        user, admin = await asyncio.gather(
            rig.ask("POST", "/api/pull", {"model": "big"}, **USER),
            rig.ask("POST", "/api/pull", {"model": "big"}, **ADMIN),
        )
        assert not any("backends" in record for record in lines(user))
        assert all("backends" in record for record in lines(admin))
        assert lines(user)[-1]["status"] == lines(admin)[-1]["status"] == "success"


@virtual
async def test_no_breaker_hears_of_failed_orders() -> None:
    """Fetching files says nothing of how a host answers calls."""
    async with shelf(2) as (rig, _):
        for _ in range(10):
            await rig.ask("POST", "/api/pull", {"model": "nonsense"})
        states = {b.state.value for v in rig.balancer.pool.snapshot() for b in v.breakers}
        assert states <= {"closed"}


def test_a_simulated_host_knows_what_it_has() -> None:
    """The tests above would prove nothing if it did not."""
    sim = SimOllama([OLD])
    assert sim.host.find("old") is OLD
    assert parse("old").canonical
