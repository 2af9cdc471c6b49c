"""The official `ollama` package installs models through the balancer, on three hosts at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ollama
import pytest

from balancer.sim.host import SimModel
from balancer.sim.management import Registry
from tests.compat import talk
from tests.compat.talk import Call, models
from tests.conftest import Start
from tests.rig import LIMIT_S, Rig

pytestmark = pytest.mark.compat


@pytest.fixture(params=["sync", "async"])
async def call(request: pytest.FixtureRequest) -> AsyncIterator[Call]:
    """Makes a client of either kind for a rig."""
    blocks = request.param == "sync"
    kind = ollama.Client if blocks else ollama.AsyncClient

    def make(rig: Rig) -> Any:
        return kind(rig.url, trust_env=False, timeout=LIMIT_S)

    async with talk.calling(make, blocks=blocks) as call:
        yield call


async def stage(start: Start) -> Rig:
    """Three hosts that may pull `new`."""
    rig = await start(3, models=models())
    registry = Registry([SimModel("new", size_bytes=5_000_000)], bytes_per_s=50e6)
    for host in rig.fleet:
        host.management.registry = registry
    return rig


def having(rig: Rig, model: str) -> str:
    """The hosts that have a model."""
    return "".join(host.name for host in rig.fleet if host.host.find(model) is not None)


async def test_pull(start: Start, call: Call) -> None:
    """Parts that the package can read, with a bar that never falls; or one answer."""
    rig = await stage(start)
    caller = call(rig)
    parts = await caller.ask("pull", "new", stream=True)
    assert (parts[0].status, parts[-1].status) == ("pulling manifest", "success")
    bar = [part.completed or 0 for part in parts if part.total == 5_000_000]
    assert (bar, bar[-1]) == (sorted(bar), 5_000_000)
    assert (await caller.ask("pull", "new")).status == "success"
    assert having(rig, "new") == "abc"
    assert "new:latest" in [each.model for each in (await caller.ask("list")).models]


async def test_pull_of_nonsense(start: Start, call: Call) -> None:
    """The package's own error, with Ollama's text."""
    caller = call(await stage(start))
    for stream in (True, False):
        with pytest.raises(ollama.ResponseError, match="file does not exist"):
            await caller.ask("pull", "nonsense", stream=stream)


async def test_create_from_a_file(start: Start, call: Call, tmp_path: Path) -> None:
    """Upload, create, copy, show, push, delete: on all hosts, then on none."""
    rig = await stage(start)
    caller = call(rig)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + bytes(1_000_000))
    for _ in range(2):  # the second time all have it
        digest = await caller.ask("create_blob", file)
    parts = await caller.ask("create", "mine", files={"m.gguf": digest}, stream=True)
    assert parts[-1].status == "success"
    assert (await caller.ask("copy", "mine", "me/mine")).status == "success"
    assert (await caller.ask("show", "me/mine")).details.format == "gguf"
    assert (await caller.ask("push", "me/mine", stream=True))[-1].status == "success"
    assert having(rig, "mine") == having(rig, "me/mine") == "abc"
    for name in ("mine", "me/mine"):
        assert (await caller.ask("delete", name)).status == "success"
    with pytest.raises(ollama.ResponseError, match="model 'mine' not found"):
        await caller.ask("delete", "mine")
    assert having(rig, "mine") == ""


async def test_ps_and_unload(start: Start, call: Call) -> None:
    """A model in memory on two hosts is listed twice, and gone from both when it is unloaded."""
    rig = await stage(start)
    caller = call(rig)
    for host in "ab":
        await rig.warm(host, "llama3.2")
    assert [each.model for each in (await caller.ask("ps")).models] == ["llama3.2:latest"] * 2
    await caller.ask("generate", model="llama3.2", keep_alive=0)
    assert (await caller.ask("ps")).models == []
