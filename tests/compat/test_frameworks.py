"""LangChain and LlamaIndex cannot tell the balancer from an Ollama host."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import Any

import ollama
import pytest

from tests import needs
from tests.compat import talk
from tests.compat.talk import ASKED, CALLS_TOOL, SAID, TEXT, TOOL, TOOL_ARGUMENTS, TOOL_NAME, VECTOR
from tests.conftest import Start
from tests.rig import LIMIT_S, Rig

pytestmark = pytest.mark.compat

LONGEST = 32768  # tokens of context that the simulated models have
CALLED = [(TOOL_NAME, TOOL_ARGUMENTS)]


class Framework(ABC):
    """What a user does with one; of each method it calls the blocking one or its twin ``a…``."""

    module: str

    def __init__(self, rig: Rig, *, blocks: bool) -> None:
        self.library: Any = importlib.import_module(self.module)
        self.blocks = blocks
        self.given = {"base_url": rig.url, "client_kwargs": {"trust_env": False}}
        clients: dict[str, Any] = {"host": rig.url, "trust_env": False, "timeout": LIMIT_S}
        self.clients = (ollama.Client(**clients), ollama.AsyncClient(**clients))

    async def ask(self, made: Any, name: str, *given: Any, **more: Any) -> Any:
        """What a method answers."""
        if self.blocks:
            return await asyncio.to_thread(getattr(made, name), *given, **more)
        return await getattr(made, f"a{name}")(*given, **more)

    async def read(self, parts: list[Any], made: Any, name: str, *given: Any, **more: Any) -> None:
        """The parts of a stream go into *parts* as they come."""
        if self.blocks:
            method = getattr(made, name)
            await asyncio.to_thread(lambda: parts.extend(method(*given, **more)))
            return
        stream = getattr(made, f"a{name}")(*given, **more)
        async for part in await stream if inspect.isawaitable(stream) else stream:
            parts.append(part)  # noqa: PERF401 - what came before an error must be kept

    async def close(self) -> None:
        """Close its connections."""
        blocking, other = self.clients
        blocking.close()  # type: ignore[no-untyped-call]
        await other.close()  # type: ignore[no-untyped-call]

    @abstractmethod
    async def whole(self, model: str = "llama3.2") -> str:
        """The text of an answer."""

    @abstractmethod
    async def stream(self, words: list[str], model: str = "llama3.2") -> None:
        """The words of a streamed answer."""

    @abstractmethod
    async def tools(self) -> list[tuple[str, Any]]:
        """The tools called, with their arguments."""

    @abstractmethod
    async def tools_stream(self) -> list[tuple[str, Any]]:
        """The same in a stream."""


class LangChain(Framework):
    """`langchain-ollama`."""

    module = "langchain_ollama"

    def chat(self, model: str) -> Any:
        """A chat model, which asks whether the model is there."""
        made = self.library.ChatOllama(model=model, **self.given)
        made._client, made._async_client = self.clients
        return made

    async def whole(self, model: str = "llama3.2") -> str:
        return str((await self.ask(self.chat(model), "invoke", ASKED)).content)

    async def stream(self, words: list[str], model: str = "llama3.2") -> None:
        parts: list[Any] = []
        try:
            await self.read(parts, self.chat(model), "stream", ASKED)
        finally:
            words += [part.content for part in parts if part.content]

    async def tools(self) -> list[tuple[str, Any]]:
        answer = await self.ask(self.chat("tooled").bind_tools([TOOL]), "invoke", CALLS_TOOL)
        return [(call["name"], call["args"]) for call in answer.tool_calls]

    async def tools_stream(self) -> list[tuple[str, Any]]:
        parts: list[Any] = []
        await self.read(parts, self.chat("tooled").bind_tools([TOOL]), "stream", CALLS_TOOL)
        return [(call["name"], call["args"]) for part in parts for call in part.tool_calls]

    async def embed(self) -> list[list[float]]:
        """A vector for each text."""
        made = self.library.OllamaEmbeddings(model="embed", **self.given)
        made._client, made._async_client = self.clients
        vectors: list[list[float]] = await self.ask(made, "embed_documents", ["a", "b"])
        return vectors


class LlamaIndex(Framework):
    """`llama-index-llms-ollama`."""

    module = "llama_index.llms.ollama"

    def made(self, model: str, **more: Any) -> Any:
        """A model."""
        blocking, other = self.clients
        given = {"context_window": 4096} | more
        return self.library.Ollama(model=model, client=blocking, async_client=other, **given)

    def messages(self) -> list[Any]:
        """The question."""
        kind: Any = importlib.import_module("llama_index.core.llms").ChatMessage
        return [kind(**each) for each in ASKED]

    async def whole(self, model: str = "llama3.2") -> str:
        return str((await self.ask(self.made(model), "chat", self.messages())).message.content)

    async def complete(self) -> str:
        """The text of an answer to a prompt."""
        return str((await self.ask(self.made("llama3.2"), "complete", "who?")).text)

    async def stream(self, words: list[str], model: str = "llama3.2") -> None:
        parts: list[Any] = []
        try:
            await self.read(parts, self.made(model), "stream_chat", self.messages())
        finally:
            words += [part.delta for part in parts if part.delta]

    def asked_with_tools(self) -> dict[str, Any]:
        """The question, and the tool as a function."""

        def get_weather(city: str) -> str:
            """The weather."""
            return city

        tool: Any = importlib.import_module("llama_index.core.tools").FunctionTool
        tools = [tool.from_defaults(fn=get_weather)]
        return {"tools": tools, "user_msg": CALLS_TOOL[0]["content"]}

    def called(self, answer: Any) -> list[tuple[str, Any]]:
        """What an answer calls."""
        calls = self.made("tooled").get_tool_calls_from_response(answer)
        return [(call.tool_name, call.tool_kwargs) for call in calls]

    async def tools(self) -> list[tuple[str, Any]]:
        made = self.made("tooled")
        return self.called(await self.ask(made, "chat_with_tools", **self.asked_with_tools()))

    async def tools_stream(self) -> list[tuple[str, Any]]:
        parts: list[Any] = []
        made = self.made("tooled")
        await self.read(parts, made, "stream_chat_with_tools", **self.asked_with_tools())
        return self.called(parts[-1])


Call = Callable[[Rig], Framework]
FRAMEWORKS = (LangChain, LlamaIndex)


@pytest.fixture(params=["sync", "async"])
async def make(
    request: pytest.FixtureRequest,
) -> AsyncIterator[Callable[[type[Framework]], Call]]:
    """Makes clients of a framework, blocking or not, for a rig."""
    made: list[Framework] = []

    def of(kind: type[Framework]) -> Call:
        needs.package(kind.module.partition(".")[0])

        def call(rig: Rig) -> Framework:
            made.append(kind(rig, blocks=request.param == "sync"))
            return made[-1]

        return call

    yield of
    for one in made:
        await one.close()


@pytest.fixture(params=FRAMEWORKS)
def call(request: pytest.FixtureRequest, make: Callable[[type[Framework]], Call]) -> Call:
    """The same of each framework."""
    return make(request.param)


# -- what a user does ---------------------------------------------------------------------------


async def whole(caller: Framework) -> None:
    """The whole text."""
    assert await caller.whole() == TEXT


async def stream(caller: Framework) -> None:
    """The words in order."""
    words: list[str] = []
    await caller.stream(words)
    assert words == list(SAID)


async def tools(caller: Framework) -> None:
    """The tool is called with arguments."""
    assert await caller.tools() == CALLED


async def tools_stream(caller: Framework) -> None:
    """The same in a stream."""
    assert await caller.tools_stream() == CALLED


async def extras(caller: Framework) -> None:
    """What only one of them has."""
    if isinstance(caller, LangChain):
        assert await caller.embed() == [list(VECTOR)] * 2
    if isinstance(caller, LlamaIndex):
        assert await caller.complete() == TEXT


EVERYTHING = (whole, stream, tools, tools_stream, extras)


async def test_answers_like_a_host(start: Start, call: Call) -> None:
    """Each call of the library gives what a single host would give."""
    await talk.answers(start, call, EVERYTHING)


async def test_a_dead_first_backend_is_not_noticed(start: Start, call: Call) -> None:
    """With a backend first in the list that refuses connections, nothing changes."""
    await talk.first_is_dead(start, call, EVERYTHING)


@pytest.mark.parametrize("operation", [whole, stream])
async def test_a_host_that_dies_between_calls_is_not_noticed(
    start: Start, call: Call, operation: Callable[[Framework], Any]
) -> None:
    """The host that served the last call refuses the next one; another answers it."""
    await talk.dies_between(start, call, "llama3.2", operation)


async def test_a_host_that_dies_before_the_first_word_is_not_noticed(
    start: Start, call: Call
) -> None:
    """A stream without a record yet is taken up by another host."""
    await talk.dies_before_a_word(start, call, stream)


async def test_the_longest_context_is_asked_for(
    start: Start, make: Callable[[type[Framework]], Call]
) -> None:
    """LlamaIndex, not told how long, asks what the model can, and then for all of that."""
    rig = await start(2, models=talk.models())
    caller = make(LlamaIndex)(rig)
    assert isinstance(caller, LlamaIndex)
    made = caller.made("llama3.2", context_window=-1)
    # That it asks with the blocking client whichever is used is why this is a thread's work.
    answer = await asyncio.to_thread(made.chat, caller.messages())
    assert answer.message.content == TEXT
    (seen,) = rig.forwarded()
    assert json.loads(seen.body)["options"]["num_ctx"] == LONGEST
    assert [one.path for one in await rig.ended(2)] == ["/api/show", "/api/chat"]


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut", "reset"])
async def test_a_host_that_dies_in_a_stream_is_told(start: Start, call: Call, fault: str) -> None:
    """What came before stays, and the end is an error, never a silent stop."""
    rig = await talk.dying(start, fault)
    words: list[str] = []
    with pytest.raises(ollama.ResponseError, match="in the middle of the answer"):
        await call(rig).stream(words)
    assert words == list(SAID[:2])
    assert len(rig.forwarded()) == 1, "a call that has begun is never repeated"


async def test_an_unknown_model_is_told(start: Start, call: Call) -> None:
    """The error of Ollama's own package, with Ollama's text; nothing was asked of a host."""
    rig = await start(2, models=talk.models())
    caller = call(rig)
    with pytest.raises(ollama.ResponseError, match="model 'nope' not found") as told:
        await caller.whole("nope")
    assert told.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="model 'nope' not found"):
        await caller.stream([], "nope")
    assert not rig.inference()


async def test_no_host_left_is_told(start: Start, call: Call) -> None:
    """When every host that has the model is gone: a 503 that names model and hosts."""
    rig = await talk.all_gone(start)
    with pytest.raises(ollama.ResponseError, match=r"'llama3.2'.*a: ") as told:
        await call(rig).whole()
    assert told.value.status_code == 503
