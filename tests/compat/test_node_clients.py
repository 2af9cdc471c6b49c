"""Three npm packages cannot tell the balancer from an Ollama host."""

from __future__ import annotations

import asyncio
import json
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from balancer.core.domain import Switch
from balancer.core.errors import Loop
from balancer.sim.host import SimModel
from balancer.sim.management import Registry
from tests import needs
from tests.compat import talk
from tests.compat.talk import LISTED, SAID, TEXT, TOOL_ARGUMENTS, TOOL_NAME, VECTOR, models
from tests.conftest import Start
from tests.rig import Rig

pytestmark = pytest.mark.compat

SCRIPTS = Path(__file__).parent / "node"
PACKAGES = {"ollama": "ollama", "openai": "openai", "anthropic": "@anthropic-ai/sdk"}
LIMIT_S = 60.0  # generous: the machine may be busy


class Raised(Exception):
    """What a library threw."""

    def __init__(self, told: dict[str, Any]) -> None:
        super().__init__(told["message"])
        self.kind: str = told["kind"]
        self.status: int | None = told["status"]
        self.headers: dict[str, str] = told["headers"]


@dataclass(slots=True)
class Script:
    """One library in a node process of its own, which starts when it is first asked."""

    library: str
    url: str
    parts: list[Any] = field(default_factory=list)
    process: Process | None = None

    async def tell(self, line: object) -> None:
        """Give it a line."""
        if self.process is None:
            self.process = await asyncio.create_subprocess_exec(
                needs.program("node"), "talk.mjs", self.library, self.url,
                cwd=SCRIPTS, stdin=PIPE, stdout=PIPE,
            )  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(line).encode() + b"\n")

    async def answer(self) -> Any:
        """What the operation answers; the parts of a stream go into `parts`."""
        assert self.process is not None
        assert self.process.stdout is not None
        async with asyncio.timeout(LIMIT_S):
            async for line in self.process.stdout:
                match json.loads(line):
                    case {"part": part}:
                        self.parts.append(part)
                    case {"answer": answer}:
                        return answer
                    case {"error": told}:
                        raise Raised(told)
        raise AssertionError("the script ended by itself")

    async def ask(self, do: str, model: str = "llama3.2") -> Any:
        """What an operation answers, with `parts` of its own."""
        self.parts.clear()
        await self.tell({"do": do, "model": model})
        return await self.answer()

    async def close(self) -> None:
        """End it."""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            await self.process.wait()


Made = Callable[[str], Callable[[Rig], Script]]


@pytest.fixture
async def script(start: Start) -> AsyncIterator[Made]:
    """Makes scripts of a library for a rig; *start* comes first, so they end before it does."""
    made: list[Script] = []

    def of(library: str) -> Callable[[Rig], Script]:
        needs.program("node")
        if not (SCRIPTS / "node_modules" / PACKAGES[library]).is_dir():
            needs.lacking(f"the npm package {PACKAGES[library]} (`make clients`)")

        def make(rig: Rig) -> Script:
            made.append(Script(library, rig.url))
            return made[-1]

        return make

    yield of
    for one in made:
        await one.close()


# -- what a user does ---------------------------------------------------------------------------

CALLED = [[TOOL_NAME, TOOL_ARGUMENTS]]
VECTORS = [list(VECTOR)] * 2
# What is asked of which model, and the answer; None: a stream, whose parts are the words.
WANTED: dict[str, dict[str, tuple[str, Any]]] = {
    "ollama": {
        "whole": ("llama3.2", TEXT),
        "stream": ("llama3.2", None),
        "generate": ("llama3.2", TEXT),
        "generate-stream": ("llama3.2", None),
        "tools": ("tooled", CALLED),
        "tools-stream": ("tooled", CALLED),
        "embed": ("embed", VECTORS),
        "list": ("", LISTED),
        "show": ("tooled", ["completion", "tools"]),
    },
    "openai": {
        "whole": ("llama3.2", TEXT),
        "stream": ("llama3.2", None),
        "tools": ("tooled", CALLED),
        "tools-stream": ("tooled", CALLED),
        "responses": ("llama3.2", TEXT),
        "responses-stream": ("llama3.2", None),
        "responses-tools": ("tooled", CALLED),
        "embed": ("embed", VECTORS),
        "list": ("", LISTED),
    },
    "anthropic": {
        "whole": ("llama3.2", TEXT),
        "stream": ("llama3.2", None),
        "tools": ("tooled", CALLED),
        "tools-stream": ("tooled", CALLED),
    },
}
BY_STREAM = [
    (library, do)
    for library, wanted in WANTED.items()
    for do, (_, answer) in wanted.items()
    if answer is None
]


def operation(library: str, do: str) -> Callable[[Script], Awaitable[None]]:
    """Asks, and asserts what is answered."""
    model, wanted = WANTED[library][do]

    async def run(script: Script) -> None:
        answer = await script.ask(do, model)
        if wanted is None:
            assert (answer, script.parts) == (None, list(SAID)), do
        else:
            assert answer == wanted, do

    return run


@pytest.mark.parametrize("library", WANTED)
async def test_answers_like_a_host(start: Start, script: Made, library: str) -> None:
    """Each call of the package gives what a single host would give."""
    everything = [operation(library, do) for do in WANTED[library]]
    await talk.answers(start, script(library), everything)


@pytest.mark.parametrize("library", WANTED)
async def test_a_dead_first_backend_is_not_noticed(
    start: Start, script: Made, library: str
) -> None:
    """With a backend first in the list that refuses connections, nothing changes."""
    everything = [operation(library, do) for do in WANTED[library]]
    await talk.first_is_dead(start, script(library), everything)


@pytest.mark.parametrize(("library", "do"), BY_STREAM)
async def test_a_host_that_dies_between_calls_is_not_noticed(
    start: Start, script: Made, library: str, do: str
) -> None:
    """The host that served the last call refuses the next one; another answers it."""
    await talk.dies_between(start, script(library), "llama3.2", operation(library, do))


@pytest.mark.parametrize(("library", "do"), BY_STREAM)
async def test_a_host_that_dies_before_the_first_word_is_not_noticed(
    start: Start, script: Made, library: str, do: str
) -> None:
    """A stream without a record yet is taken up by another host."""
    await talk.dies_before_a_word(start, script(library), operation(library, do))


async def test_the_ollama_package_installs_on_all_hosts(start: Start, script: Made) -> None:
    """Pull, create, copy, delete and push, each with the progress that the package waits for."""
    rig = await start(3, models=models())
    registry = Registry([SimModel("new", size_bytes=5_000_000)])
    for host in rig.fleet:
        host.management.registry = registry
    caller = script("ollama")(rig)
    assert await caller.ask("install", "new") == "success"
    assert (caller.parts[0], caller.parts[-1]) == ("pulling manifest", "success")
    for host in rig.fleet:
        there = {name for name in ("new", "mine", "twin") if host.host.find(name) is not None}
        assert there == {"new", "twin"}
    with pytest.raises(Raised, match="file does not exist"):
        await caller.ask("install", "nonsense")


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut", "reset"])
@pytest.mark.parametrize(("library", "do"), BY_STREAM)
async def test_a_host_that_dies_in_a_stream_is_told(
    start: Start, script: Made, library: str, do: str, fault: str
) -> None:
    """What came before stays, and the end is an error with our text, never a silent stop."""
    rig = await talk.dying(start, fault)
    caller = script(library)(rig)
    with pytest.raises(Raised, match=r"backend . .* in the middle of the answer"):
        await caller.ask(do)
    assert caller.parts == list(SAID[:2])
    assert len(rig.forwarded()) == 1, "a call that has begun is never repeated"


@pytest.mark.parametrize(
    ("library", "kind"),
    [("ollama", "ResponseError"), ("openai", "NotFoundError"), ("anthropic", "NotFoundError")],
)
async def test_an_unknown_model_is_told(
    start: Start, script: Made, library: str, kind: str
) -> None:
    """As the package's own kind of "not found", with Ollama's text; nothing was asked of a host."""
    rig = await start(2, models=models())
    caller = script(library)(rig)
    for do in ("whole", "stream"):
        with pytest.raises(Raised, match="model 'nope' not found") as told:
            await caller.ask(do, "nope")
        assert (told.value.kind, told.value.status) == (kind, 404)
    assert not rig.inference()


@pytest.mark.parametrize("library", WANTED)
async def test_no_host_left_is_told(start: Start, script: Made, library: str) -> None:
    """When every host that has the model is gone: a 503 that names model and hosts."""
    rig = await talk.all_gone(start)
    with pytest.raises(Raised, match=r"'llama3.2'.*a: ") as told:
        await script(library)(rig).ask("whole")
    assert told.value.status == 503


async def test_tokens_are_not_counted(start: Start, script: Made) -> None:
    """Ollama has no such route, and says so with a 404; so do we."""
    rig = await start(1, models=models())
    with pytest.raises(Raised) as told:
        await script("anthropic")(rig).ask("count")
    assert (told.value.kind, told.value.status) == ("NotFoundError", 404)


# -- leaving ------------------------------------------------------------------------------------


async def left(rig: Rig) -> None:
    """Wait until the host has seen its client go; the script still lives."""
    (call,) = await talk.inference(rig, 1)
    assert call.outcome == "client_abort"
    await rig.idle()
    (seen,) = rig.forwarded()
    async with asyncio.timeout(LIMIT_S):
        while not seen.ending:  # of what a simulated host sees no event tells
            await asyncio.sleep(0.001)
    assert seen.ending == "client-gone"


@pytest.mark.parametrize("library", WANTED)
async def test_an_abort_reaches_the_host(start: Start, script: Made, library: str) -> None:
    """In a stream: the library's own abort ends the work of the host."""
    rig = await start(1, models=models())
    caller = script(library)(rig)
    try:
        await caller.ask("abort", "endless")
    except Raised as told:
        assert "abort" in str(told).lower()  # noqa: PT017 - some raise, some just end
    assert caller.parts == list(SAID[:2])
    await left(rig)


@pytest.mark.parametrize(
    ("library", "do"),
    [(library, "abort-whole") for library in WANTED] + [("openai", "responses-abort-whole")],
)
async def test_an_abort_before_the_answer_reaches_the_host(
    start: Start, script: Made, library: str, do: str
) -> None:
    """While nothing came yet: an `AbortController` ends the work of the host."""
    rig = await start(1, models=models())
    caller = script(library)(rig)
    await caller.tell({"do": do, "model": "endless"})
    async with asyncio.timeout(LIMIT_S):
        while not rig.forwarded():
            await asyncio.sleep(0.001)
    await caller.tell("now")
    with pytest.raises(Raised, match="abort"):
        await caller.answer()
    await left(rig)


# -- trying again -------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["openai", "anthropic"])
async def test_it_waits_as_long_as_it_is_told(start: Start, script: Made, library: str) -> None:
    """Ten seconds and up to a quarter more, where by itself it would wait eight at most."""
    rig = await start(1, models=models())
    rig.balancer.pool.turn("a", Switch.DRAINING)
    told = await script(library)(rig).ask("again")
    assert told["status"] == 503
    assert len(told["waited"]) == 2
    assert all(9_900 <= wait <= 12_600 for wait in told["waited"]), told
    assert [call.status for call in await rig.ended(3)] == [503] * 3


@pytest.mark.parametrize("library", ["openai", "anthropic"])
async def test_it_does_not_repeat_what_cannot_help(
    start: Start, script: Made, library: str
) -> None:
    """A loop is asked once, although a 5xx is otherwise tried again."""
    rig = await start(1, models=models())

    def loop(*_: Any) -> None:
        raise Loop("it has been here")

    rig.balancer.front._enter = loop  # type: ignore[assignment, method-assign]
    told = await script(library)(rig).ask("again")
    assert told == {"status": 508, "waited": []}
    assert len(rig.calls()) == 1
