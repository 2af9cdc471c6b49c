"""The simulated transcription; its refusals are held against recordings in test_golden."""

from __future__ import annotations

import json

import pytest

from balancer.sim.audio import read_form
from balancer.sim.host import SimModel
from balancer.sim.loop import run
from balancer.sim.ollama import SimOllama
from balancer.sim.reading import RefusedError

from .wire import Reply, ask

TYPE = "multipart/form-data; boundary=b"
HEAD = b"--b\r\nContent-Disposition: form-data; name="
FILE = HEAD + b'"file"; filename="a.wav"\r\n\r\nRIFF\xff\r\n'
PATH = "/v1/audio/transcriptions"


def form(*fields: tuple[str, str]) -> bytes:
    """A form with a file behind the fields."""
    texts = [b'%b"%b"\r\n\r\n%b\r\n' % (HEAD, k.encode(), v.encode()) for k, v in fields]
    return b"".join(texts) + FILE + b"--b--\r\n"


async def answer(body: bytes, *, crashes: bool = False) -> Reply:
    """What a host says to a form."""
    hears = SimModel("ear", capabilities=("completion", "audio"), words=(" hear", " hear"))
    async with SimOllama([hears]) as sim:
        if crashes:
            sim.faults.error_line(1)
        return await ask(sim.port, "POST", PATH, body, Content_Type=TYPE)


def test_a_form_is_read() -> None:
    """Texts as texts, files as bytes, of two fields of a name the first."""
    fields = read_form(form(("model", "m"), ("model", "n"), ("prompt", "é")), TYPE)
    assert fields == {"model": "m", "prompt": "é", "file": b"RIFF\xff"}


def test_what_is_no_form_is_refused() -> None:
    """With Go's text."""
    with pytest.raises(RefusedError, match="isn't multipart/form-data"):
        read_form(b"{}", "application/json")


def test_the_text_is_json_or_bare() -> None:
    """As the form asks; without the blanks around it."""
    reply = run(answer(form(("model", "ear"))))
    assert (reply.status, json.loads(reply.body)) == (200, {"text": "hear hear"})
    bare = run(answer(form(("model", "ear"), ("response_format", "text"))))
    assert (bare.get("content-type"), bare.body) == ("text/plain", b"hear hear")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (form(), "model is required"),
        (form(("model", "ear")).replace(FILE, b""), "file is required"),
    ],
)
def test_what_lacks_is_told(body: bytes, text: str) -> None:
    """400 in OpenAI's shape."""
    reply = run(answer(body))
    assert (reply.status, json.loads(reply.body)["error"]["message"]) == (400, text)


def test_a_crash_leaves_nothing() -> None:
    """A 200 without a byte."""
    reply = run(answer(form(("model", "ear")), crashes=True))
    assert (reply.status, reply.body) == (200, b"")
