"""The rig finds what it is there to find."""

from __future__ import annotations

import asyncio

import pytest

from balancer.core.events import Mishap
from balancer.core.pool import Lease
from tests.e2e.stage import models, virtual
from tests.net.parts import a_call
from tests.rig import Rig, running


async def _lease(rig: Rig) -> Lease:
    await rig.warm("a", "m")
    lease = rig.balancer.pool.lease(a_call(), "a", 1, "only")
    assert lease is not None
    return lease


@virtual
async def test_a_lease_that_nobody_gives_back_fails_the_test() -> None:
    """It would take a slot for ever."""
    with pytest.raises(AssertionError, match="left over: \\(0, 1, 0\\)"):
        async with running(1, models=models(0.0)) as rig:
            lease = await _lease(rig)
    lease.release()


@virtual
async def test_a_lease_that_is_dropped_warns() -> None:
    """Also one of a backend that has left, which nobody counts any more."""
    async with running(1, models=models(0.0)) as rig:
        lease = await _lease(rig)
        rig.balancer.pool.reshape([])
        with pytest.warns(ResourceWarning, match="a lease on a leaked"):
            lease.__del__()
        lease.release()


@virtual
async def test_a_mishap_fails_the_test() -> None:
    """Whoever saw it."""
    with pytest.raises(AssertionError, match="oops"):
        async with running(1) as rig:
            rig.balancer.bus(Mishap(0.0, "here", "oops"))


@virtual
async def test_a_request_that_never_ends_fails_the_test() -> None:
    """And so does a call that waits for ever."""
    wires = []

    async def scenario() -> None:
        async with running(1) as rig:
            rig.fleet["a"].faults.hang_inference()
            wires.append(await rig.connect())
            wires[0].writer.write(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n")
            wires[0].writer.write(b'Content-Length: 20\r\n\r\n{"model":"llama3.2"}')
            await asyncio.sleep(1)

    with pytest.raises(AssertionError, match="left over: \\(1, "):
        await scenario()
    wires[0].close()
