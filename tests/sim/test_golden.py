"""The simulated host's answers, held against recorded exchanges with Ollama 0.33.0-rc2."""

import asyncio
import json
import re
from dataclasses import replace
from typing import Any

import pytest

from balancer.sim.catalogue import parse_timestamp
from balancer.sim.host import Job, Settings, SimModel
from balancer.sim.loop import run
from balancer.sim.ollama import SimOllama

from .wire import Recording, Reply, ask, recorded

NOT_SIMULATED = {
    "abort-": "the client hangs up: there is no answer to compare (see test_ollama)",
    "file-": "damaged model files are not simulated; `faults.fail` gives such answers",
    "server-terminated-load": "no answer to compare",
}
OTHER_VALUES = {"show", "show-embed", "show-empty-model", "tags-get", "v1-models"}
"""Exchanges whose values are those of other models: keys and their order are compared."""

_VARYING = [
    (re.compile(rf'"({names})":{value}'), r'"\1":~')
    for names, value in [
        ("created_at|modified_at|expires_at", r'"[^"]*"'),
        (r"\w+_duration|created|created_at|completed_at|size|size_vram", r"\d+"),
        ("prompt_eval_count|prompt_tokens|input_tokens|total_tokens", r"\d+"),
        ("digest", '"[0-9a-f]{64}"'),
        ("id|call_id|item_id|request_id", r'"(?:[a-z]+[-_])?[0-9A-Za-z_]+"'),
        ("context", r"\[[\d,]*\]"),
        ("total|completed", r"\d+"),
        ("digest", '"sha256:[0-9a-f]{64}"'),
    ]
]
_LAYER = re.compile(r"(layer sha256:|pulling |pushing )[0-9a-f]{12,64}")


def same(text: str, name: str) -> str:
    """The text without what varies from run to run."""
    for pattern, instead in _VARYING:
        text = pattern.sub(instead, text)
    if name.startswith(("create", "pull", "push")):
        text = _LAYER.sub(r"\1~", text)
    if name == "generate-too-long":
        text = re.sub(r"\d{3,}", "~", text)
    if any(part in name for part in ("think", "tool")):
        text = re.sub(r'"(eval_count|completion_tokens|output_tokens)":\d+', r'"\1":~', text)
    return text


def shape(value: Any) -> Any:
    """The keys of a JSON value, in order, all the way down; of a list its first element's."""
    if isinstance(value, dict):
        return [(key, shape(inner)) for key, inner in value.items()]
    return [shape(inner) for inner in value[:1]] if isinstance(value, list) else ""


# -- the models of the recordings ---------------------------------------------------------------


def said(name: str, key: str = "content") -> tuple[str, ...]:
    """The words of a recorded stream."""
    lines = [json.loads(text) for text in Recording.load(name).texts]
    words = [(line.get("message") or line).get(key) for line in lines if not line.get("error")]
    return tuple(word for word in words if word)


def models() -> list[SimModel]:
    """What was installed on the recorded host."""
    special: dict[str, dict[str, Any]] = {
        "llama3.2:1b": {
            "words": said("chat-stream"),
            "template": "{{ if .System }}{{ .System }} {{ end }}{{ .Prompt }} ",
            "parameters": (("num_ctx", "4096"), ("stop", '"x"'), ("temperature", "0")),
            "license": "test licence",
        },
        "loop:latest": {"words": said("kill-generate", "response"), "endless": True},
        "chain:latest": {"words": said("chat-jinja-stream")},
        "wire-embed:latest": {
            "capabilities": ("embedding",),
            "vector": (0.0, 1.0, 0.0, 0.0),
        },
        "wire-think:latest": {
            "words": said("chat-think"),
            "thinking": said("chat-think", "thinking"),
        },
        "wire-tool:latest": {"tool_words": (" ",), "always_calls": True},
        "wire-jinja:latest": {"words": said("chat-jinja-stream"), "jinja": True},
        "wire-jtool:latest": {
            "capabilities": ("completion", "tools"),
            "jinja": True,
            "always_calls": True,
        },
        "wire-same:latest": {"words": (" echo",), "endless": True},
    }
    return [_model(entry, special) for entry in Recording.load("tags-get").json["models"]]


def _model(entry: dict[str, Any], special: dict[str, dict[str, Any]]) -> SimModel:
    details = entry["details"]
    values = {
        "size_bytes": entry["size"],
        "parameter_size": details["parameter_size"],
        "family": details["family"],
        "quantization": details["quantization_level"],
        "context_length": details["context_length"],
        "capabilities": tuple(entry["capabilities"]),
        "modified_s": parse_timestamp(entry["modified_at"]),
        "prompt_tps": 10_000.0,
        "decode_tps": 3_000.0,
    }
    return SimModel(entry["name"], **(values | special.get(entry["name"], {})))


# -- the state each exchange was recorded in ----------------------------------------------------


async def prepare(sim: SimOllama, recording: Recording) -> None:
    """Loads and breaks what was loaded and broken when the exchange was recorded."""
    name = recording.name
    if name == "ps-one":
        await load(sim, "llama3.2:1b")
    elif name == "ps-two":
        await load(sim, "llama3.2:1b", keep_alive="3m")
        await load(sim, "chain", keep_alive="9m")
    elif name.startswith("queue-full-"):
        await fill_queue(sim)
    elif name == "kill-idle-chat":
        await load(sim, "llama3.2:1b")
        sim.faults.kill("llama3.2:1b")
    elif name.startswith(("pull", "push", "create", "copy", "delete", "unload-deleted", "blob-")):
        manage(sim, recording)
    elif name.startswith("kill-"):
        sim.faults.error_line(after=tokens_before_error(recording))
    elif name.startswith("server-"):
        sim.faults.cut(after=records(recording))


def manage(sim: SimOllama, recording: Recording) -> None:
    """Puts on the disk what was there when the exchange was recorded."""
    llama = next(model for model in models() if model.name == "llama3.2:1b")
    registry, disk = sim.management.registry, sim.management.store
    place = "http://127.0.0.1:11690"
    wire = SimModel(f"{place}/pull/wire", size_bytes=4_621_152)
    registry.add(wire)
    registry.bytes_per_s = 25e6
    registry.is_reachable = recording.name != "pull-refused"
    if recording.name == "pull-again":
        disk.keep(wire)
    sim.host.add(replace(llama, name=f"{place}/push/wire"))
    if recording.name.startswith("delete"):
        sim.host.add(replace(llama, name="wire-copy"))
    disk.blobs[_BLOB] = 4_621_216
    disk.blobs[_BLOB_AGAIN] = 10


_BLOB = "sha256:7db2b77e76833f888642a451566d102b3e867b6c0511453cc158a8504475c463"
_BLOB_AGAIN = "sha256:72d63d099a88d858cff5488ae89b32684bb80ca6d8962f65a0eb5a7f685c9dd3"


def tokens_before_error(recording: Recording) -> int:
    """How many tokens came before what tells of the error, if anything does."""
    lead = {"kill-v1-messages": 2, "kill-v1-responses": 4}
    return records(recording) - lead.get(recording.name, 1)


def records(recording: Recording) -> int:
    """How many there were, those left out of the file among them."""
    omitted: dict[str, int] = recording.response.get("omitted") or {}
    return len(recording.texts) + omitted.get("count", 0)


async def load(sim: SimOllama, model: str, **more: str) -> None:
    """Loads a model."""
    reply = await ask(sim.port, "POST", "/api/generate", {"model": model} | more)
    assert reply.status == 200


async def fill_queue(sim: SimOllama) -> None:
    """One model loaded and busy, one load waiting for it, one request queued."""
    await load(sim, "loop")
    for model in ("loop", "llama3.2", "llama3.2"):
        sim.host.submit(_endless(model))
    await asyncio.sleep(0.01)
    assert sim.host.queued == 1


def _endless(model: str) -> Job:
    return Job(model, output_tokens=10_000_000)


def simulated(recording: Recording) -> SimOllama:
    """A host with the settings of the recorded one."""
    is_full = recording.name.startswith("queue-full-")
    settings = Settings(
        num_parallel=1 if is_full else 2,
        max_queue=1 if is_full else 512,
        max_loaded=1 if is_full else 3,
        vram_bytes=0,
        cpu_slowdown=1.0,
    )
    return SimOllama(
        models(),
        settings=settings,
        version="0.33.0-rc2",
        checks_origin=not recording.name.startswith("lan-"),
        origins=("*",) if recording.name.startswith("cors-any-") else (),
    )


async def exchange(recording: Recording) -> tuple[Reply, bool]:
    """The recorded request to a simulated host."""
    async with simulated(recording) as sim:
        await prepare(sim, recording)
        return await recording.send(sim.port)


# -- comparison ---------------------------------------------------------------------------------


def why_not(name: str) -> str | None:
    """Why an exchange is not compared."""
    return next((why for prefix, why in NOT_SIMULATED.items() if name.startswith(prefix)), None)


@pytest.mark.parametrize("name", recorded() or ["absent"])
def test_answers_like_the_recorded_host(name: str) -> None:
    """Status, headers and their order, framing, records, key order and ending are the same."""
    if name == "absent":
        pytest.skip("NO RECORDINGS: ../shared/wire is absent, the simulator is NOT held to them")
    if why := why_not(name):
        pytest.skip(why)
    recording = Recording.load(name)
    reply, is_open = run(exchange(recording))
    compare_head(reply, recording)
    assert reply.ended == recording.response["ended"]
    assert is_open == (recording.response.get("connection") == "open")
    if name in OTHER_VALUES:
        assert shape(json.loads(reply.body)) == shape(recording.json)
    else:
        compare_records(reply, recording)


def compare_head(reply: Reply, recording: Recording) -> None:
    """Everything before the body."""
    response = recording.response
    assert (reply.status, reply.reason) == (response["status"], response["reason"])
    assert reply.interim == response.get("interim", [])
    assert reply.framing == response["framing"]
    varying = {"Date", "Content-Length"}
    ours = [(k, "" if k in varying else v) for k, v in reply.headers]
    theirs = [(k, "" if k in varying else v) for k, v in response["headers"]]
    assert ours == theirs


def compare_records(reply: Reply, recording: Recording) -> None:
    """The body, segment by segment."""
    ours = [same(segment.decode(), recording.name) for segment in reply.segments]
    theirs = [same(text, recording.name) for text in recording.texts]
    if reply.framing == "close":
        ours, theirs = ["".join(ours)], ["".join(theirs)]
    if omitted := recording.response.get("omitted"):
        after = omitted["after"]
        assert len(ours) == len(theirs) + omitted["count"]
        ours[after : after + omitted["count"]] = []
    if recording.name.startswith("pull"):
        ours, theirs = list(dict.fromkeys(ours)), list(dict.fromkeys(theirs))
    if recording.name.startswith(("kill-", "server-")):
        ours, theirs = ([without_words(text) for text in texts] for texts in (ours, theirs))
    assert ours == theirs


def without_words(text: str) -> str:
    """How the endless model went on after the recorded words is not known."""
    return re.sub(r'"(response|content|text)":"[^"]+"', r'"\1":"~"', text)


def test_every_excuse_is_needed() -> None:
    """None is left over for a recording that is no longer there."""
    if not recorded():
        pytest.skip("NO RECORDINGS: ../shared/wire is absent")
    for prefix in NOT_SIMULATED:
        assert any(name.startswith(prefix) for name in recorded()), prefix
