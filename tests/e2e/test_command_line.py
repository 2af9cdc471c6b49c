"""
What Ollama's command line sends, verb by verb, to one host alone and to the balancer before three.

The answers are the same but for what docs/differences.toml says, and so is what is installed
afterwards, on every host.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Final

import pytest

from balancer.sim.host import SimModel
from balancer.sim.management import Registry
from balancer.sim.ollama import SimOllama
from tests.e2e.stage import WORDS, virtual
from tests.rig import running
from tests.sim.wire import Reply, ask

pytestmark = pytest.mark.usefixtures("quiet")

AGENT: Final = {"User_Agent": "ollama/0.33.0 (amd64 linux) Go/go1.26.8"}
MODELS: Final = (
    SimModel("m", words=WORDS, decode_tps=1e4),
    SimModel("e", capabilities=("embedding",)),
)
SHELF: Final = (SimModel("big", size_bytes=10**9), SimModel("m", words=WORDS, content="newer"))
FILE: Final = b"GGUF" + bytes(1000)
DIGEST: Final = f"sha256:{hashlib.sha256(FILE).hexdigest()}"

Step = tuple[str, str, Any]
ROOT: Final[Step] = ("HEAD", "/", None)


def post(path: str, **body: Any) -> Step:
    """A request with a JSON body."""
    return "POST", path, body


def unload(model: str) -> Step:
    """What `stop` sends, and `rm` before it deletes."""
    return post("/api/generate", model=model, prompt="", keep_alive="0s")


VERBS: Final[dict[str, list[Step]]] = {
    "-v": [("GET", "/api/version", None)],
    "list": [ROOT, ("GET", "/api/tags", None)],
    "ps": [ROOT, ("GET", "/api/ps", None)],
    "show": [ROOT, post("/api/show", model="", name="m", verbose=False)],
    "show, unknown": [ROOT, post("/api/show", name="none")],
    "run": [
        ROOT,
        post("/api/show", name="m"),
        post("/api/generate", model="m", prompt="hi", options={}),
        ("GET", "/api/ps", None),
    ],
    "run, interactive": [
        ROOT,
        post("/api/show", name="m"),
        post("/api/show", name="m"),
        post("/api/generate", model="m", prompt="", options={}),
        post("/api/chat", model="m", messages=[{"role": "user", "content": "hi"}], options={}),
        post("/api/create", model="kept", **{"from": "m"}, parameters={"num_ctx": 8192}),
    ],
    "run, embedding": [
        ROOT,
        post("/api/show", name="e"),
        post("/api/embed", model="e", input="hi"),
    ],
    "run, pulled": [
        ROOT,
        post("/api/show", name="big"),
        post("/api/pull", model="", name="big"),
        post("/api/show", name="big"),
        post("/api/generate", model="big", prompt="", options={}),
    ],
    "stop": [
        ROOT,
        post("/api/generate", model="m", prompt=""),
        post("/api/show", name="m"),
        unload("m"),
        ("GET", "/api/ps", None),
    ],
    "stop, not loaded": [ROOT, post("/api/show", name="m"), unload("m")],
    "stop, embedding": [
        post("/api/embed", model="e", input="hi"),
        post("/api/show", name="e"),
        unload("e"),
        ("GET", "/api/ps", None),
    ],
    "pull": [ROOT, post("/api/pull", model="", name="big"), ("GET", "/api/tags", None)],
    "pull, newer": [ROOT, post("/api/pull", name="m"), ("GET", "/api/tags", None)],
    "pull, unknown": [ROOT, post("/api/pull", name="none")],
    "pull, bad name": [ROOT, post("/api/pull", name="a b")],
    "push": [ROOT, post("/api/push", model="", name="m", insecure=True)],
    "cp": [
        ROOT,
        post("/api/copy", source="m", destination="twin"),
        post("/api/show", name="twin"),
        ("GET", "/api/tags", None),
    ],
    "cp, unknown": [ROOT, post("/api/copy", source="none", destination="twin")],
    "cp, bad name": [ROOT, post("/api/copy", source="m", destination="a b")],
    "rm": [
        post("/api/generate", model="m", prompt=""),
        ROOT,
        post("/api/show", name="m"),
        unload("m"),
        ("DELETE", "/api/delete", {"model": "", "name": "m"}),
        ("GET", "/api/ps", None),
        ("GET", "/api/tags", None),
        ("DELETE", "/api/delete", {"name": "m"}),
    ],
    "create, from a model": [
        ROOT,
        post("/api/create", model="new", **{"from": "m"}, system="Be brief."),
        post("/api/show", name="new"),
        post("/api/generate", model="new", prompt="hi"),
    ],
    "create, from a model to be pulled": [
        post("/api/create", model="new", **{"from": "big"}),
        post("/api/generate", model="new", prompt=""),
    ],
    "create, from a file": [
        ROOT,
        ("POST", f"/api/blobs/{DIGEST}", FILE),
        post("/api/create", model="new", files={"m.gguf": DIGEST}),
        post("/api/show", name="new"),
        ("HEAD", f"/api/blobs/{DIGEST}", None),
    ],
    "create, of nothing": [ROOT, post("/api/create", model="new")],
    "create, without its file": [post("/api/create", model="new", files={"m.gguf": DIGEST})],
}
VARYING: Final = [
    (re.compile(r'"(created_at|modified_at|expires_at)":"[^"]*"'), r'"\1":"~"'),
    (re.compile(r'"(\w+_duration)":\d+'), r'"\1":0'),
    (re.compile(r"(not found)( on any of 3 backends)?, try pulling it first[^\"\\]*"), r"\1"),
    (re.compile(r",\"backends\":\{(?:[^{}]|\{[^{}]*\})*\}"), ""),
]


def same(reply: Reply) -> tuple[int, str | None, list[Any]]:
    """
    Status, content type and records: each once, of a download only its layers, full in the end.

    Of lists the order is not compared, nor how errors name their encoding.
    """
    text = reply.body.decode()
    for pattern, instead in VARYING:
        text = pattern.sub(instead, text)
    found: dict[str, Any] = {}
    for line in text.splitlines():
        record, key = json.loads(line) if line.startswith("{") else line, line
        if isinstance(record, dict) and "total" in record:
            key, record["completed"] = record["digest"], record["total"]
        if isinstance(record, dict) and "models" in record:
            record["models"].sort(key=str)
        found.setdefault(key, record)
    kind = (reply.get("content-type") or "").partition(";" if reply.status >= 400 else "\n")[0]
    return reply.status, kind, list(found.values())


@pytest.mark.parametrize("verb", VERBS)
@virtual
async def test_a_verb(verb: str) -> None:
    """The same answers as of one host, and then the same on each of three."""
    alone = SimOllama(MODELS, registry=Registry(SHELF))
    async with alone, running(3, models=MODELS) as rig:
        for number, host in enumerate(rig.fleet):
            host.management.registry = Registry(SHELF)
            object.__setattr__(rig.balancer.pool.members[host.name].backend, "store", str(number))
        for method, path, body in VERBS[verb]:
            theirs = await ask(alone.port, method, path, body, **AGENT)
            ours = await rig.ask(method, path, body, **AGENT)
            assert same(ours) == same(theirs), path
        for host in rig.fleet:
            assert installed(host) == installed(alone)


def installed(host: SimOllama) -> dict[str, str]:
    """Names and digests."""
    return {model.name: model.digest for model in host.host.models}


def test_the_comparison_is_none_of_nothing() -> None:
    """What differs in a status, a word or a layer is seen."""
    good = Reply(200, segments=[b'{"status":"success"}\n'])
    layer = b'{"status":"pulling a","digest":"sha256:a","total":%d}\n'
    assert same(good) != same(Reply(200, segments=[b'{"status":"succes"}\n']))
    assert same(good) != same(Reply(201, segments=good.segments))
    assert same(Reply(200, segments=[layer % 5])) != same(Reply(200, segments=[layer % 6]))
    more = Reply(200, segments=[b'{"status":"success","backends":{"a":{"status":"success"}}}\n'])
    assert same(more) == same(good)
