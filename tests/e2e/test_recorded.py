"""What the balancer answers by itself, held against recorded exchanges with Ollama 0.33.0-rc2."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import pytest_asyncio

from balancer.sim.host import SimModel
from tests.rig import Rig, running
from tests.sim.wire import Recording, recorded

# What is compared, or known to differ; the others are about hosts and streams.
COMPARED = re.compile(
    r"404-api|405-.*|head-ps|root-.*|version-.*|cors-.*|options-.*|host-.*|no-host|expect-100"
    r"|slash-.*|gzip-request|show-missing|show-malformed|show-dup-case|v1-model"
    r"|v1-model-missing|v1-chat-no-messages|v1-chat-empty|v1-chat-unknown|generate-no-model"
    r"|generate-unknown|generate-options-bad|generate-keep-alive-string-number|generate-unload.*"
    r"|chat-unload|embed-unknown|embed-empty|http10-chat"
)
ABSENT = "NO RECORDINGS: the recorded exchanges are absent, our answers are NOT held to them"
NAMES = [name for name in recorded() if COMPARED.fullmatch(name)]


@dataclass(frozen=True, slots=True)
class Difference:
    """Where the balancer deliberately answers otherwise: what it says instead, and why."""

    why: str
    status: int | None = None
    body: str | None = None
    headers: dict[str, str | None] = field(default_factory=dict)  # None: it has none


NATIVE = "application/json; charset=utf-8"
ONE_SHAPE = "errors of ours have one content type and no final newline, whoever asks"
LOOKED = "says where was looked, and what to do"
BOTH = "both spellings of a path are served, without a redirect"
NO_STAR = "no setting admits every page of the web"
DIFFERENCES = {
    "version-get": Difference(
        "the lowest release of the pool, without a suffix", body='{"version":"0.33.0"}'
    ),
    "cors-get-localhost": Difference("as version-get", body='{"version":"0.33.0"}'),
    "generate-unknown": Difference(
        LOOKED,
        body='{"error":"model \'none\' not found on any of 3 backends, try pulling it first"}',
    ),
    "embed-unknown": Difference(
        LOOKED,
        body='{"error":"model \\"none\\" not found on any of 3 backends, try pulling it first"}',
    ),
    "v1-chat-unknown": Difference(
        f"{LOOKED}; {ONE_SHAPE}",
        body='{"error":{"message":"model \'none\' not found on any of 3 backends, try pulling it '
        'first","type":"not_found_error","param":null,"code":null}}',
        headers={"Content-Type": NATIVE},
    ),
    "v1-model-missing": Difference(
        ONE_SHAPE,
        body='{"error":{"message":"model \'none:latest\' not found","type":"not_found_error",'
        '"param":null,"code":null}}',
        headers={"Content-Type": NATIVE},
    ),
    "generate-options-bad": Difference(
        "every 5xx tells the request id",
        body='{"error":"option \\"num_ctx\\" must be of type integer [req ~]"}',
    ),
    "gzip-request": Difference(
        "says what is wrong, with the status for it",
        status=415,
        body='{"error":"Content-Encoding \'gzip\' is not supported here."}',
    ),
    "no-host": Difference("what cannot be parsed gets a fixed text", body="400 Bad Request"),
    "slash-show": Difference(BOTH, status=200, headers={"Location": None, "Content-Type": NATIVE}),
    "slash-tags": Difference(BOTH, status=200, headers={"Location": None, "Content-Type": NATIVE}),
    "show-dup-case": Difference(
        "a body that two readers could read in two ways is refused",
        status=400,
        body='{"error":"field \\"model\\" is given in two spellings"}',
    ),
    "options-localhost": Difference(
        "OPTIONS that no browser sends is a wrong method like another",
        status=405,
        body="405 method not allowed",
        headers={"Content-Type": "text/plain"},
    ),
    "cors-any-get": Difference(
        NO_STAR,
        status=403,
        body="",
        headers={"Access-Control-Allow-Origin": None, "Content-Type": None},
    ),
    "cors-any-preflight": Difference(
        NO_STAR,
        status=403,
        body="",
        headers=dict.fromkeys(
            (
                "Access-Control-Allow-Headers",
                "Access-Control-Allow-Methods",
                "Access-Control-Allow-Origin",
                "Access-Control-Max-Age",
                "Allow",
            )
        ),
    ),
}
UNCOMPARED_BODIES = {"slash-show", "slash-tags"}  # answers instead of redirects: see test_reads
OURS = re.compile(r"X-Request-Id|X-Balancer-.*|X-Accel-Buffering|Retry-After|retry-after-ms"
                  r"|x-should-retry")  # fmt: skip
FRAMING = {"Date", "Content-Length", "Transfer-Encoding", "Connection"}
VARYING = [
    (re.compile(r'"(created_at)":"[^"]*"'), r'"\1":~'),
    (re.compile(r'"(\w+_duration|created|\w*eval_count)":\d+'), r'"\1":~'),
    (re.compile(r"\[req [0-9a-f]{32}\]"), "[req ~]"),
]


def same(text: str) -> str:
    """The text without what varies from run to run."""
    for pattern, instead in VARYING:
        text = pattern.sub(instead, text)
    return text


def pairs(headers: Any) -> list[tuple[str, str]]:
    """Headers that are said about the answer, in order of name."""
    return sorted((k, v) for k, v in headers if k not in FRAMING and not OURS.fullmatch(k))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Rig]:
    """Three hosts like the recorded one, for all exchanges."""
    model = partial(SimModel, prompt_tps=1e6, decode_tps=1e5)
    words = (" once", " upon", " a", " time")
    models = [model("llama3.2:1b", words=words), model("wire-embed", capabilities=("embedding",))]
    async with running(models=models, version="0.33.0-rc2") as rig:
        yield rig


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", NAMES or ["absent"])
async def test_answers_as_recorded(shared: Rig, quiet: None, name: str) -> None:
    """Status, headers and body are the recorded ones, but for what DIFFERENCES says."""
    if not NAMES:
        pytest.skip(ABSENT)
    recording = Recording.load(name)
    reply, _ = await recording.send(shared.port)
    differs = DIFFERENCES.get(name, Difference(""))
    theirs = recording.response
    assert reply.status == (differs.status or theirs["status"])
    wanted = dict(theirs["headers"]) | differs.headers
    several = [(k, v) for k, v in theirs["headers"] if k == "Vary" and differs.status is None]
    expected = [(k, v) for k, v in wanted.items() if v is not None and k != "Vary"] + several
    assert pairs(reply.headers) == pairs(expected)
    if name not in UNCOMPARED_BODIES:
        body = "".join(recording.texts) if differs.body is None else differs.body
        assert same(reply.body.decode()) == same(body)


def test_every_difference_is_one() -> None:
    """No excuse is left over for an exchange that is not recorded."""
    if not NAMES:
        pytest.skip(ABSENT)
    assert not DIFFERENCES.keys() - set(NAMES)
    assert all(one.status or one.body is not None or one.headers for one in DIFFERENCES.values())
