"""The official `ollama` package cannot tell the balancer from an Ollama host."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import ollama
import pytest

from tests.compat import talk
from tests.compat.talk import (
    ASKED,
    CALLS_TOOL,
    LISTED,
    SAID,
    TEXT,
    TOOL,
    TOOL_ARGUMENTS,
    TOOL_NAME,
    VECTOR,
    Call,
    Caller,
    Operation,
    models,
)
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


# -- what a user does ---------------------------------------------------------------------------


async def chat(caller: Caller) -> None:
    """The whole text, and the name as it was asked."""
    answer = await caller.ask("chat", model="llama3.2", messages=ASKED)
    assert (answer.message.content, answer.model, answer.done) == (TEXT, "llama3.2", True)
    assert (answer.done_reason, answer.message.role) == ("stop", "assistant")


async def chat_stream(caller: Caller) -> None:
    """One part for each word, the last one done."""
    parts = await caller.ask("chat", model="llama3.2", messages=ASKED, stream=True)
    assert [part.message.content for part in parts] == [*SAID, ""]
    assert [part.done for part in parts] == [False] * len(SAID) + [True]


async def generate(caller: Caller) -> None:
    """The whole text."""
    answer = await caller.ask("generate", model="llama3.2:latest", prompt="who?")
    assert (answer.response, answer.model, answer.done) == (TEXT, "llama3.2:latest", True)


async def generate_stream(caller: Caller) -> None:
    """The words in order, and the context at the end."""
    parts = await caller.ask("generate", model="llama3.2", prompt="who?", stream=True)
    assert "".join(part.response for part in parts) == TEXT
    assert parts[-1].done
    assert parts[-1].context


async def embed(caller: Caller) -> None:
    """A vector for each text."""
    answer = await caller.ask("embed", model="embed", input=["a", "b"])
    assert answer.embeddings == [list(VECTOR)] * 2


async def embeddings(caller: Caller) -> None:
    """One vector."""
    assert (await caller.ask("embeddings", model="embed", prompt="a")).embedding == list(VECTOR)


async def tools(caller: Caller) -> None:
    """The tool is called with arguments."""
    answer = await caller.ask("chat", model="tooled", messages=CALLS_TOOL, tools=[TOOL])
    (called,) = answer.message.tool_calls
    assert (called.function.name, called.function.arguments) == (TOOL_NAME, TOOL_ARGUMENTS)


async def tools_stream(caller: Caller) -> None:
    """The same in a stream."""
    parts = await caller.ask("chat", model="tooled", messages=CALLS_TOOL, tools=[TOOL], stream=True)
    called = [one for part in parts for one in part.message.tool_calls or ()]
    assert [one.function.name for one in called] == [TOOL_NAME]


async def listed(caller: Caller) -> None:
    """Every model once, with a whole digest."""
    found = (await caller.ask("list")).models
    assert sorted(each.model for each in found) == LISTED
    assert {len(each.digest) for each in found} == {64}


async def shown(caller: Caller) -> None:
    """The details and what it can do."""
    answer = await caller.ask("show", model="tooled")
    assert answer.capabilities == ["completion", "tools"]
    assert answer.details.family == "llama"
    assert answer.modelinfo


RUNS: dict[str, tuple[str, Operation]] = {
    "chat": ("llama3.2", chat),
    "chat-stream": ("llama3.2", chat_stream),
    "generate": ("llama3.2", generate),
    "generate-stream": ("llama3.2", generate_stream),
    "embed": ("embed", embed),
    "embeddings": ("embed", embeddings),
    "tools": ("tooled", tools),
    "tools-stream": ("tooled", tools_stream),
}
READS = (listed, shown)
EVERYTHING = (*(operation for _, operation in RUNS.values()), *READS)


async def test_answers_like_a_host(start: Start, call: Call) -> None:
    """Each call of the package gives what a single host would give."""
    await talk.answers(start, call, EVERYTHING)


async def test_a_dead_first_backend_is_not_noticed(start: Start, call: Call) -> None:
    """With a backend first in the list that refuses connections, nothing changes."""
    await talk.first_is_dead(start, call, EVERYTHING)


@pytest.mark.parametrize("name", [name for name in RUNS if name not in {"generate", "tools"}])
async def test_a_host_that_dies_between_calls_is_not_noticed(
    start: Start, call: Call, name: str
) -> None:
    """The host that served the last call refuses the next one; another answers it."""
    await talk.dies_between(start, call, *RUNS[name])


async def test_reads_outlive_a_host(start: Start, call: Call) -> None:
    """What is listed stays listed when the host that has it refuses connections."""
    rig = await start(1, models=models())
    rig.fleet["a"].faults.refuse()
    for read in READS:
        await read(call(rig))


# -- memory -------------------------------------------------------------------------------------


async def test_ps_tells_the_memory_of_all_hosts(start: Start, call: Call) -> None:
    """A model in memory on one host and another on the next are both listed."""
    rig = await start(2, models=models())
    await rig.warm("a", "llama3.2")
    await rig.warm("b", "tooled")
    found = (await call(rig).ask("ps")).models
    assert sorted(each.model for each in found) == ["llama3.2:latest", "tooled:latest"]
    assert all(each.expires_at is not None and each.context_length == 4096 for each in found)


async def test_unloading_reaches_every_host(start: Start, call: Call) -> None:
    """`keep_alive=0` with no prompt empties the memory of all hosts, as `ollama stop` does."""
    rig = await start(3, models=models())
    await rig.warm("a", "llama3.2")
    await rig.warm("c", "llama3.2")
    answer = await call(rig).ask("generate", model="llama3.2", keep_alive=0)
    assert (answer.done, answer.done_reason) == (True, "unload")
    assert rig.loaded() == {"a": [], "b": [], "c": []}


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("chat", {"messages": ASKED}),
        ("chat", {"messages": ASKED, "stream": True}),
        ("generate", {"prompt": "who?"}),
        ("embed", {"input": "a"}),
        ("show", {}),
    ],
)
async def test_an_unknown_model_is_told(
    start: Start, call: Call, name: str, given: dict[str, Any]
) -> None:
    """`ResponseError` has the status 404 and a text that names the model."""
    rig = await start(2, models=models())
    with pytest.raises(ollama.ResponseError) as told:
        await call(rig).ask(name, model="nope", **given)
    assert told.value.status_code == 404
    assert "nope" in told.value.error
    assert "not found" in told.value.error
    assert "{" not in told.value.error
    assert not rig.inference()


async def test_no_host_left_is_told(start: Start, call: Call) -> None:
    """When every host that has the model is gone, the error is a 503 that names them."""
    rig = await talk.all_gone(start)
    with pytest.raises(ollama.ResponseError) as told:
        await call(rig).ask("chat", model="llama3.2", messages=ASKED)
    assert told.value.status_code == 503
    assert "not found" not in told.value.error
    assert "llama3.2" in told.value.error
    assert "a: " in told.value.error


@pytest.mark.parametrize("fault", ["cut", "reset"])
@pytest.mark.parametrize(
    ("name", "given"), [("chat", {"messages": ASKED}), ("generate", {"prompt": "who?"})]
)
async def test_a_host_that_dies_in_a_stream_is_told(
    start: Start, call: Call, name: str, given: dict[str, Any], fault: str
) -> None:
    """What came before stays, and the end is an error, never a silent stop."""
    rig = await talk.dying(start, fault)
    parts: list[Any] = []
    with pytest.raises(ollama.ResponseError) as told:
        await call(rig).into(parts, name, model="llama3.2", stream=True, **given)
    words = [part.message.content if name == "chat" else part.response for part in parts]
    assert words == list(SAID[:2])
    assert not any(part.done for part in parts)
    assert "in the middle of the answer" in told.value.error
    assert len(rig.forwarded()) == 1, "a call that has begun is never repeated"


@pytest.mark.parametrize("fault", ["cut", "reset"])
async def test_a_host_that_dies_before_the_first_word_is_not_noticed(
    start: Start, call: Call, fault: str
) -> None:
    """A stream without a record yet is taken up by another host."""
    await talk.dies_before_a_word(start, call, chat_stream, fault)


async def test_a_host_that_dies_in_a_whole_answer_is_not_noticed(start: Start, call: Call) -> None:
    """An answer that is no stream is repeated elsewhere however far it had come."""
    await talk.dies_before_a_word(start, call, chat, after=3)


# -- names of ours ------------------------------------------------------------------------------


async def test_an_alias_is_a_model_like_any(start: Start, call: Call) -> None:
    """Listed, shown, pulled and called; the answer names the model that gave it."""
    config = {"models.aliases": {"gpt-4o-mini": "llama3.2"}, "models.hide": ["llama*"]}
    rig = await start(1, models=models(), config=config)
    caller = call(rig)
    listed = {model.model for model in (await caller.ask("list")).models}
    assert "gpt-4o-mini" in listed
    assert not any(name.startswith("llama") for name in listed)
    shown = await caller.ask("show", "gpt-4o-mini")
    assert shown.details.format == "gguf"
    assert (await caller.ask("pull", "gpt-4o-mini")).status == "success"
    answer = await caller.ask("chat", model="gpt-4o-mini", messages=ASKED)
    assert (answer.message.content, answer.model) == (TEXT, "llama3.2")
    parts = await caller.ask("generate", model="gpt-4o-mini", prompt="who?", stream=True)
    assert "".join(part.response for part in parts) == TEXT
