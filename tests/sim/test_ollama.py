"""A simulated host over real sockets, in virtual time."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from balancer.sim.host import GIB, Settings, SimModel
from balancer.sim.loop import run
from balancer.sim.ollama import SimOllama

from .wire import Reply, Wire, ask

MODELS = (
    SimModel("llama3.2", load_s=2.0),
    SimModel("fixed", words=("One", " two", " three", " four")),
    SimModel("nomic", capabilities=("embedding",)),
    SimModel("tooled", capabilities=("completion", "tools")),
    SimModel("jinja", words=("a", " b", " c"), jinja=True),
    SimModel("thinker", words=("So",), thinking=("Hm",), capabilities=("completion", "thinking")),
)
HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}

Scenario = Callable[[SimOllama], Awaitable[None]]


@asynccontextmanager
async def hosting(**more: Any) -> AsyncIterator[SimOllama]:
    """A host with the models above."""
    async with SimOllama(MODELS, **more) as sim:
        yield sim


def play(scenario: Scenario, **more: Any) -> None:
    """Runs a scenario against a host in virtual time."""

    async def inside() -> None:
        async with hosting(**more) as sim:
            await scenario(sim)

    run(inside())


async def chat(sim: SimOllama, model: str = "fixed", **more: Any) -> Reply:
    """A native chat."""
    return await ask(sim.port, "POST", "/api/chat", {"model": model, "messages": HELLO} | more)


async def v1_chat(sim: SimOllama, model: str = "fixed", **more: Any) -> Reply:
    """An OpenAI chat."""
    body = {"model": model, "messages": HELLO} | more
    return await ask(sim.port, "POST", "/v1/chat/completions", body)


async def hanging_chat(sim: SimOllama, model: str = "fixed", **more: Any) -> Wire:
    """A native chat whose answer nobody has read yet."""
    wire = await Wire.connect(sim.port)
    body = json.dumps({"model": model, "messages": HELLO} | more)
    head = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    wire.writer.write((head + body).encode())
    return wire


def lines(reply: Reply) -> list[dict[str, Any]]:
    """The records of an NDJSON stream."""
    return [json.loads(line) for line in reply.body.splitlines()]


def said(reply: Reply) -> str:
    """The text of a native chat stream."""
    return "".join(line["message"]["content"] for line in lines(reply))


# -- answers ------------------------------------------------------------------------------------


def test_a_stream_takes_the_time_of_its_model() -> None:
    """Load, prompt and tokens at the model's pace, and the last line says so."""

    async def scenario(sim: SimOllama) -> None:
        started = sim.now()
        reply = await chat(sim, "llama3.2", options={"num_predict": 10})
        final = lines(reply)[-1]
        assert 2.2 < sim.now() - started < 2.3
        assert final["done_reason"] == "length"
        assert final["eval_duration"] == 200_000_000
        parts = ("load_duration", "prompt_eval_duration", "eval_duration")
        assert sum(final[part] for part in parts) == final["total_duration"]

    play(scenario)


def test_each_token_is_sent_when_it_is_due() -> None:
    """The first line is there after one token's time, not at the end."""

    async def scenario(sim: SimOllama) -> None:
        wire = await hanging_chat(sim)
        await wire.reader.readuntil(b'"One"')
        first_at = sim.now()
        await wire.reader.readuntil(b'" four"')
        assert sim.now() - first_at == pytest.approx(0.06, abs=1e-3)
        wire.close()

    play(scenario)


def test_the_same_question_has_the_same_answer() -> None:
    """On any host; another seed or another question has another."""

    async def scenario(sim: SimOllama) -> None:
        async with hosting(seed=9) as other:
            mine, twin = await chat(sim, "llama3.2"), await chat(other, "llama3.2")
            seeded = await chat(other, "llama3.2", options={"seed": 7})
        assert said(mine) == said(twin)
        assert said(mine) != said(seeded)

    play(scenario)


def test_a_prefix_is_said_first() -> None:
    """So that nobody takes a made-up answer for a real one."""

    async def scenario(sim: SimOllama) -> None:
        reply = await chat(sim, "llama3.2")
        assert said(reply).startswith("[simulated] ")

    play(scenario, prefix="[simulated]")


def test_an_open_answer_is_continued() -> None:
    """A trailing assistant message is gone on from, on the Jinja path with an echo."""

    async def scenario(sim: SimOllama) -> None:
        whole = said(await chat(sim, "llama3.2"))
        begun = [*HELLO, {"role": "assistant", "content": whole[:25]}]
        rest = said(await chat(sim, "llama3.2", messages=begun))
        assert whole[:25] + rest == whole
        begun = [*HELLO, {"role": "assistant", "content": "a b"}]
        assert said(await chat(sim, "jinja", messages=begun)) == "a ba b c"

    play(scenario)


def test_a_raw_prompt_with_an_open_turn_is_continued_too() -> None:
    """Rendered prompt plus partial answer goes on to the same whole."""

    async def scenario(sim: SimOllama) -> None:
        whole = said(await chat(sim, "llama3.2"))
        probe = await chat(sim, "llama3.2", _debug_render_only=True)
        rendered = json.loads(probe.body)["_debug_info"]["rendered_template"]
        body = {"model": "llama3.2", "raw": True, "prompt": rendered + whole[:25], "stream": False}
        reply = await ask(sim.port, "POST", "/api/generate", body)
        assert whole[:25] + json.loads(reply.body)["response"] == whole

    play(scenario)


def test_a_tool_is_called_when_its_name_is_said() -> None:
    """Natively with an object, for OpenAI with a string; otherwise text comes."""

    async def scenario(sim: SimOllama) -> None:
        asked = [{"role": "user", "content": "please get_weather"}]
        native = lines(await chat(sim, "tooled", messages=asked, tools=[WEATHER]))
        called = native[0]["message"]["tool_calls"][0]["function"]
        assert called == {"index": 0, "name": "get_weather", "arguments": {"city": "Paris"}}
        reply = await v1_chat(sim, "tooled", messages=asked, tools=[WEATHER])
        choice = json.loads(reply.body)["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city":"Paris"}'
        assert said(await chat(sim, "tooled", tools=[WEATHER]))

    play(scenario)


def test_a_schema_is_answered_with_json() -> None:
    """`format` and OpenAI's `response_format` give an object that fits."""

    async def scenario(sim: SimOllama) -> None:
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
        assert json.loads(said(await chat(sim, format=schema))) == {"n": 1}
        wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
        reply = await v1_chat(sim, response_format=wanted)
        assert json.loads(json.loads(reply.body)["choices"][0]["message"]["content"]) == {"n": 1}

    play(scenario)


def test_thinking_can_be_switched_off() -> None:
    """On by default, gone with `think:false`, refused for a model that cannot."""

    async def scenario(sim: SimOllama) -> None:
        thought = lines(await chat(sim, "thinker"))[0]["message"]
        assert thought == {"role": "assistant", "content": "", "thinking": "Hm"}
        assert "thinking" not in (await chat(sim, "thinker", think=False)).body.decode()
        assert (await chat(sim, think=True)).status == 400

    play(scenario)


def test_vectors_follow_from_the_text() -> None:
    """One per input, equal for equal texts, as many numbers as asked for."""

    async def scenario(sim: SimOllama) -> None:
        body = {"model": "nomic", "input": ["x", "y", "x"], "dimensions": 3}
        first, second, third = json.loads((await ask(sim.port, "POST", "/api/embed", body)).body)[
            "embeddings"
        ]
        assert first == third != second
        assert len(first) == 3

    play(scenario)


def test_given_chunks_are_written_as_they_are() -> None:
    """Bytes of any kind, one chunk for each."""
    chunks = (b"\xe2\x98", b"\x83\n", b"x" * 5_000_000)

    async def scenario(sim: SimOllama) -> None:
        sim.faults.gain(SimModel("bytes", chunks=chunks))
        reply = await chat(sim, "bytes")
        assert tuple(reply.segments) == chunks
        assert (await chat(sim, "bytes", stream=False)).body == b"".join(chunks)

    play(scenario)


def test_a_generate_context_can_be_huge() -> None:
    """The last line is as long as the model says."""

    async def scenario(sim: SimOllama) -> None:
        sim.faults.gain(SimModel("long", words=("x",), context_ints=500_000))
        reply = await ask(sim.port, "POST", "/api/generate", {"model": "long", "prompt": "x"})
        assert len(reply.segments[-1]) > 2_000_000
        assert len(lines(reply)[-1]["context"]) == 500_000

    play(scenario)


# -- refusals the recordings do not hold --------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/api/chat", b"", 400, "missing request body"),
        ("/api/chat", b"{", 400, "unexpected EOF"),
        ("/api/chat", b"[1]", 400, "cannot unmarshal array"),
        ("/api/chat", b'\xef\xbb\xbf{"model":"fixed"}', 400, "invalid character 'ï'"),
        ("/api/chat", {"messages": HELLO}, 400, "model is required"),
        ("/api/chat", {"model": "a@b"}, 400, "invalid model name"),
        ("/api/chat", {"model": 7}, 400, "cannot unmarshal number"),
        ("/api/chat", {"model": "none"}, 404, "model 'none' not found"),
        ("/api/chat", {"model": "fixed", "keep_alive": "5"}, 400, "missing unit"),
        ("/api/chat", {"model": "fixed", "keep_alive": True}, 400, "Unsupported type: 'bool'"),
        ("/api/chat", {"model": "fixed", "options": {"stop": "x"}}, 500, "of type array"),
        ("/api/chat", {"model": "fixed", "messages": HELLO, "think": "x"}, 400, "invalid think"),
        ("/api/chat", {"model": "nomic", "messages": HELLO}, 400, "does not support chat"),
        ("/api/generate", {"prompt": "x"}, 404, "model '' not found"),
        ("/api/generate", {"model": "fixed", "suffix": "x"}, 400, "does not support insert"),
        ("/api/embeddings", {"model": "nomic", "prompt": 5}, 400, "invalid input type"),
        ("/api/embed", {"input": "x"}, 404, "model '' not found"),
        ("/api/show", {}, 400, "model is required"),
        ("/v1/embeddings", {"model": "nomic"}, 400, "invalid input"),
        ("/v1/completions", {"prompt": "x"}, 404, "model '' not found"),
        ("/v1/chat/completions", {"messages": HELLO}, 400, "model is required"),
        ("/v1/messages", {"max_tokens": 5, "messages": HELLO}, 400, "model is required"),
        ("/v1/messages", {"model": "fixed", "max_tokens": 5}, 400, "messages is required"),
    ],
)
def test_refusals(path: str, body: object, status: int, text: str) -> None:
    """Each mistake has its status and its words."""

    async def scenario(sim: SimOllama) -> None:
        reply = await ask(sim.port, "POST", path, body)
        assert reply.status == status
        assert text in reply.body.decode()

    play(scenario)


def test_trailing_bytes_and_odd_keys_are_forgiven() -> None:
    """Only the first JSON value counts, and field names match in any case."""

    async def scenario(sim: SimOllama) -> None:
        body = b'{"Model":"fixed","MESSAGES":[{"Role":"user","content":"x"}]} trailing'
        reply = await ask(sim.port, "POST", "/api/chat", body)
        assert said(reply) == "One two three four"

    play(scenario)


# -- loading and lists --------------------------------------------------------------------------


def test_load_unload_and_ps() -> None:
    """An empty prompt loads, keep_alive 0 unloads, `ps` shows what is loaded."""

    async def scenario(sim: SimOllama) -> None:
        async def loaded() -> list[str]:
            listed = json.loads((await ask(sim.port, "GET", "/api/ps")).body)["models"]
            return [entry["name"] for entry in listed]

        assert lines(await chat(sim, messages=[]))[0]["done_reason"] == "load"
        assert await loaded() == ["fixed:latest"]
        gone = await ask(sim.port, "POST", "/api/generate", {"model": "fixed", "keep_alive": 0})
        assert json.loads(gone.body)["done_reason"] == "unload"
        assert await loaded() == []
        await chat(sim, keep_alive="2m")
        await asyncio.sleep(119)
        assert await loaded() == ["fixed:latest"]
        await asyncio.sleep(2)
        assert await loaded() == []

    play(scenario)


def test_openai_streams_a_load_as_a_stream() -> None:
    """An empty prompt there has a finish reason of its own, and the terminator."""

    async def scenario(sim: SimOllama) -> None:
        body = {"model": "fixed", "prompt": "", "stream": True}
        reply = await ask(sim.port, "POST", "/v1/completions", body)
        assert b'"finish_reason":"load"' in reply.body
        assert reply.body.endswith(b"data: [DONE]\n\n")

    play(scenario)


def test_forever_is_three_centuries() -> None:
    """A model kept for ever expires in a far but writable year."""

    async def scenario(sim: SimOllama) -> None:
        await chat(sim, keep_alive=-1)
        entry = json.loads((await ask(sim.port, "GET", "/api/ps")).body)["models"][0]
        assert entry["expires_at"].startswith("23")

    play(scenario)


def test_no_models_is_null_for_openai() -> None:
    """`/v1/models` prints an empty list as null, `/api/tags` as a list."""

    async def scenario() -> None:
        async with SimOllama() as sim:
            assert json.loads((await ask(sim.port, "GET", "/v1/models")).body)["data"] is None
            assert json.loads((await ask(sim.port, "GET", "/api/tags")).body) == {"models": []}

    run(scenario())


# -- what can be watched and bent ---------------------------------------------------------------


def test_requests_are_logged() -> None:
    """Method, path, model, body and how it ended, hang-ups included."""

    async def scenario(sim: SimOllama) -> None:
        await chat(sim)
        wire = await hanging_chat(sim, "llama3.2")
        await asyncio.sleep(1.0)
        wire.close()
        await asyncio.sleep(0.01)
        ok, gone = sim.requests
        assert (ok.method, ok.path, ok.model, ok.status) == ("POST", "/api/chat", "fixed", 200)
        assert json.loads(ok.body)["messages"] == HELLO
        assert (ok.ending, gone.ending) == ("ok", "client-gone")
        assert gone.ended_at is not None
        assert gone.ended_at - gone.started_at == pytest.approx(1.0)
        assert sim.host.counts["loads_aborted"] == 1
        assert sim.host.running == 0

    play(scenario)


def test_hanging_up_in_mid_stream_frees_the_slot() -> None:
    """The next call has it at once."""

    async def scenario(sim: SimOllama) -> None:
        sim.faults.gain(SimModel("loop", words=("on ", "and "), endless=True))
        wire = await hanging_chat(sim, "loop")
        await wire.reader.readuntil(b"and ")
        other = asyncio.ensure_future(chat(sim, "loop", options={"num_predict": 2}))  # noqa: TID251 - awaited below
        await asyncio.sleep(5.0)
        assert not other.done()
        wire.close()
        assert (await other).status == 200

    play(scenario)


def test_the_tap_sees_every_byte() -> None:
    """What was written is what the client read."""
    tapped: list[bytes] = []

    async def scenario(sim: SimOllama) -> None:
        sim.tap = lambda _, chunk: tapped.append(chunk)
        reply = await chat(sim, "llama3.2")
        assert b"".join(tapped) == reply.body == bytes(sim.requests[0].written)

    play(scenario, keeps_bodies=True)


def test_answers_can_be_cut_to_segments() -> None:
    """One byte a chunk, through the middle of characters, with the same sum."""

    def bytewise(chunk: bytes) -> Iterable[bytes]:
        return (chunk[at : at + 1] for at in range(len(chunk)))

    async def scenario(sim: SimOllama) -> None:
        plain = await chat(sim)
        sim.segmenter = bytewise
        cut = await chat(sim)
        assert {len(segment) for segment in cut.segments} == {1}
        assert said(cut) == said(plain)
        whole = await chat(sim, stream=False)
        assert whole.framing == "length"
        assert json.loads(whole.body)["message"]["content"] == said(plain)

    play(scenario)


def test_a_script_answers_word_for_word() -> None:
    """Status, headers, segments with delays and the ending are those given, once."""

    async def scenario(sim: SimOllama) -> None:
        sim.script(
            "/api/chat",
            status=418,
            headers=[("X-Tea", "green")],
            segments=[b"one", (3.0, b"two")],
            framing="chunked",
            ending="cut",
        )
        started = sim.now()
        reply = await chat(sim)
        assert (reply.status, reply.get("x-tea")) == (418, "green")
        assert (reply.segments, reply.ended) == ([b"one", b"two"], "cut")
        assert sim.now() - started == pytest.approx(3.0)
        assert (await chat(sim)).status == 200

    play(scenario)


def test_a_script_can_lie_about_its_length() -> None:
    """Fewer bytes than Content-Length promised."""

    async def scenario(sim: SimOllama) -> None:
        sim.script("/api/version", segments=[b"{}"], length=10, ending="cut", method="GET")
        assert (await ask(sim.port, "GET", "/api/version")).ended == "cut"

    play(scenario)


# -- faults -------------------------------------------------------------------------------------


def test_refusing_lets_running_calls_end() -> None:
    """New connections are refused, idle ones closed, the stream ends, healing takes the port."""

    async def scenario(sim: SimOllama) -> None:
        await chat(sim)
        running = await hanging_chat(sim, "llama3.2")
        idle = await Wire.connect(sim.port)
        await asyncio.sleep(0.5)
        port = sim.port
        sim.faults.refuse()
        with pytest.raises(ConnectionRefusedError):
            await Wire.connect(port)
        assert await idle.reader.read() == b""
        assert (await running.reply()).ended == "clean"
        assert await running.reader.read() == b""
        sim.faults.heal()
        assert sim.port == port
        assert (await chat(sim)).status == 200
        for wire in (idle, running):
            wire.close()

    play(scenario)


def test_hanging_reads_and_never_answers() -> None:
    """Any route, and healing does not help those already hanging."""

    async def scenario(sim: SimOllama) -> None:
        sim.faults.hang()
        hung = asyncio.ensure_future(ask(sim.port, "GET", "/"))  # noqa: TID251 - cancelled below
        await asyncio.sleep(1000)
        sim.faults.heal()
        await asyncio.sleep(1000)
        assert not hung.done()
        assert (await ask(sim.port, "GET", "/")).status == 200
        hung.cancel()
        await asyncio.gather(hung, return_exceptions=True)
        await asyncio.sleep(0.01)
        assert sim.requests[0].ending == "client-gone"

    play(scenario)


def test_hung_inference_leaves_the_lists_alone() -> None:
    """Version and `ps` answer while no chat does."""

    async def scenario(sim: SimOllama) -> None:
        sim.faults.hang_inference()
        wire = await hanging_chat(sim)
        await asyncio.sleep(600)
        assert (await ask(sim.port, "GET", "/api/version")).status == 200
        assert (await ask(sim.port, "GET", "/api/ps")).status == 200
        assert sim.requests[0].ending == ""
        wire.close()

    play(scenario)


def test_freezing_stops_streams_and_lists_until_healed() -> None:
    """Connects succeed, nothing is answered, then everything goes on."""

    async def scenario(sim: SimOllama) -> None:
        wire = await hanging_chat(sim)
        await wire.reader.readuntil(b"One")
        sim.faults.freeze()
        late = asyncio.ensure_future(ask(sim.port, "GET", "/"))  # noqa: TID251 - awaited below
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(300):
                await wire.reader.readuntil(b"two")
        assert not late.done()
        sim.faults.heal()
        assert (await late).status == 200
        await wire.reader.readuntil(b"two")
        await wire.reader.readuntil(b"0\r\n\r\n")
        wire.close()

    play(scenario)


@pytest.mark.parametrize(
    ("fault", "ended"),
    [("reset_head", "reset"), ("garbage", "garbage")],
)
def test_no_head(fault: str, ended: str) -> None:
    """A reset or garbage instead of an answer, as often as asked for."""

    async def scenario(sim: SimOllama) -> None:
        sim.faults.apply(fault, *([b"\x00\r\n\r\n", 1] if fault == "garbage" else [1]))
        if fault == "garbage":
            wire = await hanging_chat(sim)
            assert await wire.reader.read() == b"\x00\r\n\r\n"
            wire.close()
        else:
            assert (await chat(sim)).ended == "reset"
        assert sim.requests[0].ending == ended
        assert (await chat(sim)).status == 200

    play(scenario)


@pytest.mark.parametrize(
    ("fault", "ended"), [("reset", "reset"), ("cut", "cut"), ("no_done", "clean")]
)
def test_streams_break_off(fault: str, ended: str) -> None:
    """After so many records, in the way named, and no last record comes."""

    async def scenario(sim: SimOllama) -> None:
        sim.faults.apply(fault, 2)
        native, openai = await chat(sim), await v1_chat(sim, stream=True)
        assert (native.ended, openai.ended) == (ended, ended)
        if fault != "reset":
            assert said(native) == "One two"
            assert len(openai.segments) == 2
        assert b"done_reason" not in native.body
        assert b"[DONE]" not in openai.body

    play(scenario)


def test_breaking_off_a_whole_answer() -> None:
    """Nothing has been sent yet: the connection closes, an error is a 500, no_done says so."""

    async def scenario(sim: SimOllama) -> None:
        sim.faults.cut(2)
        assert (await chat(sim, stream=False)).ended == "no response"
        sim.faults.error_line(2)
        failed = await chat(sim, stream=False)
        assert (failed.status, b"unexpected EOF" in failed.body) == (500, True)
        sim.faults.no_done(2)
        partial = json.loads((await chat(sim, stream=False)).body)
        assert (partial["done"], partial["message"]["content"]) == (False, "One two")

    play(scenario)


def test_a_stall_lasts_until_the_client_hangs_up() -> None:
    """The records before it come, then nothing, and the slot is taken meanwhile."""

    async def scenario(sim: SimOllama) -> None:
        sim.faults.stall(2, times=1)
        wire = await hanging_chat(sim)
        await wire.reader.readuntil(b"two")
        await asyncio.sleep(900)
        assert sim.host.running == 1
        wire.close()
        assert (await chat(sim)).status == 200

    play(scenario)


def test_a_model_that_fails() -> None:
    """At load after a while, at run at once; other models answer."""

    async def scenario(sim: SimOllama) -> None:
        sim.faults.fail("llama3.2", "out of memory", after_s=4.0)
        started = sim.now()
        reply = await chat(sim, "llama3.2")
        assert (reply.status, json.loads(reply.body)) == (500, {"error": "out of memory"})
        assert sim.now() - started == pytest.approx(4.0, abs=0.01)
        assert (await chat(sim)).status == 200
        sim.faults.fail("fixed", "oops", at="run")
        assert (await v1_chat(sim)).status == 500

    play(scenario)


def test_a_full_queue_refuses_at_once() -> None:
    """503 in no time, loaded or not."""

    async def scenario(sim: SimOllama) -> None:
        await chat(sim)
        sim.faults.queue_full()
        started = sim.now()
        assert (await chat(sim)).status == 503
        assert (await v1_chat(sim)).status == 503
        assert sim.now() - started < 0.01

    play(scenario)


def test_slow_loads_and_slow_tokens() -> None:
    """The factors stretch the model's own times."""

    async def scenario(sim: SimOllama) -> None:
        sim.faults.slow_load(10.0)
        sim.faults.slow(2.0)
        final = lines(await chat(sim, "llama3.2", options={"num_predict": 10}))[-1]
        assert final["load_duration"] == pytest.approx(20e9, rel=0.01)
        assert final["eval_duration"] == pytest.approx(0.4e9)

    play(scenario)


def test_restart_drops_connections_and_forgets_models() -> None:
    """Streams are cut, the port is closed for a while, nothing is loaded afterwards."""

    async def scenario(sim: SimOllama) -> None:
        await chat(sim)
        wire = await hanging_chat(sim)
        await wire.reader.readuntil(b"One")
        sim.faults.restart(5.0)
        assert (await wire.reader.read()).endswith(b"\r\n")
        with pytest.raises(ConnectionRefusedError):
            await Wire.connect(sim.port)
        await asyncio.sleep(5.1)
        assert json.loads((await ask(sim.port, "GET", "/api/ps")).body) == {"models": []}
        assert sim.requests[1].ending == "down"
        wire.close()

    play(scenario)


def test_models_come_and_go_behind_ones_back() -> None:
    """A deleted model is unknown to requests though it stays loaded."""

    async def scenario(sim: SimOllama) -> None:
        await chat(sim)
        sim.faults.lose("fixed")
        assert (await chat(sim)).status == 404
        assert b"fixed" in (await ask(sim.port, "GET", "/api/ps")).body
        assert b"fixed" not in (await ask(sim.port, "GET", "/api/tags")).body
        sim.faults.gain(SimModel("fresh"))
        assert (await chat(sim, "fresh")).status == 200

    play(scenario)


def test_an_old_host() -> None:
    """Another version, and routes that it does not know yet."""

    async def scenario(sim: SimOllama) -> None:
        sim.faults.version("0.1.30")
        sim.faults.missing("/v1/responses", "/api/ps")
        assert json.loads((await ask(sim.port, "GET", "/api/version")).body)["version"] == "0.1.30"
        reply = await ask(sim.port, "GET", "/api/ps")
        assert (reply.status, reply.get("content-type")) == (404, "text/plain")

    play(scenario)


def test_slow_ps() -> None:
    """`ps` takes its time, the version does not."""

    async def scenario(sim: SimOllama) -> None:
        sim.faults.slow_ps(7.0)
        started = sim.now()
        await ask(sim.port, "GET", "/api/version")
        assert sim.now() == started
        await ask(sim.port, "GET", "/api/ps")
        assert sim.now() - started == pytest.approx(7.0)

    play(scenario)


# -- the wire -----------------------------------------------------------------------------------


def test_connections_are_kept_and_pipelining_works() -> None:
    """Three requests in one write are answered in order on one connection."""

    async def scenario(sim: SimOllama) -> None:
        wire = await Wire.connect(sim.port)
        get = "GET {} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        wire.writer.write("".join(map(get.format, ("/", "/api/ps", "/api/version"))).encode())
        bodies = [(await wire.reply()).body for _ in range(3)]
        assert bodies[0] == b"Ollama is running"
        assert bodies[1] == b'{"models":[]}'
        assert bodies[2].startswith(b'{"version"')
        assert sim.accepted == 1
        wire.close()

    play(scenario)


def test_a_client_that_does_not_read_holds_the_stream_back() -> None:
    """What the kernel does not take stays with the model, not in memory."""
    chunks = tuple(b"x" * 100_000 for _ in range(300))

    async def scenario(sim: SimOllama) -> None:
        written = 0

        def tap(_: object, chunk: bytes) -> None:
            nonlocal written
            written += len(chunk)

        sim.tap = tap
        sim.faults.gain(SimModel("bytes", chunks=chunks, decode_tps=1e9))
        wire = await hanging_chat(sim, "bytes")
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(60.0)
        assert written < 20_000_000
        wire.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert len((await wire.reply()).body) == 30_000_000
        wire.close()

    play(scenario)


def test_vram_shows_in_ps() -> None:
    """A model that does not fit the GPU is listed with less VRAM than it is big."""

    async def scenario(sim: SimOllama) -> None:
        await chat(sim, options={"num_predict": 1})
        entry = json.loads((await ask(sim.port, "GET", "/api/ps")).body)["models"][0]
        assert (entry["size"], entry["size_vram"]) == (2 * GIB, GIB)

    play(scenario, settings=Settings(vram_bytes=GIB))
