"""
Every recorded exchange with Ollama 0.33.0-rc2 again, through the balancer.

Behind it stands a host that answers as recorded, byte by byte and piece by piece. What comes out
is the same, but for what docs/differences.toml says.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

from tests.e2e.replay import MANAGED, PAUSE_S, Replay
from tests.e2e.stage import now, virtual
from tests.rig import running
from tests.sim.wire import Recording, Reply, recorded

ROOT: Final = Path(__file__).resolve().parents[2]
ABSENT = "NO RECORDINGS: the recorded exchanges are absent, our answers are NOT held to them"
LISTED = tomllib.loads((ROOT / "docs/differences.toml").read_text(encoding="utf-8"))["difference"]
INSTEAD: Final[dict[str, dict[str, Any]]] = {
    name: told for each in LISTED for name, told in each.get("instead", {}).items()
}
# Not compared, and why.
EXCUSED: Final = {
    "abort-": "the client hangs up: see test_cancel",
    "audio-": "not an exchange of JSON: see test_bad_input for what is not served",
    "lan-": "a host that listens on the network; ours is on loopback: see test_access",
    "server-terminated-load": "there is no answer to compare: see test_cold",
    "404-count-tokens": "a route of newer releases, not served yet",
    "queue-full-ps": "what is in memory cannot be prepared",
}
NAMES = [name for name in recorded() if not name.startswith(tuple(EXCUSED))]
GONE = frozenset({"none", "wire-copy"})  # not on the recorded host at that moment
OURS = re.compile(
    r"X-Request-Id|X-Balancer-.*|X-Accel-Buffering|Retry-After|retry-after-ms|x-should-retry"
    r"|Access-Control-Expose-Headers"
)
FRAMING = {"Date", "Content-Length", "Transfer-Encoding", "Connection"}
VARYING = [
    (re.compile(r'"created_at":"[^"]*"'), '"created_at":~'),
    (re.compile(r"\[req [0-9a-f]{32}\]"), "[req ~]"),
    (re.compile(r'"req_[0-9a-f]{24,32}"'), '"req_~"'),
]


def same(text: str) -> str:
    """An answer of ours without what varies from run to run."""
    for pattern, instead in VARYING:
        text = pattern.sub(instead, text)
    return text


def pairs(headers: Any) -> list[tuple[str, str]]:
    """Headers that are said about the answer, in order of name."""
    return sorted((k, v) for k, v in headers if k not in FRAMING and not OURS.fullmatch(k))


@pytest.mark.parametrize("name", NAMES or ["absent"])
def test_answers_as_recorded(quiet: None, name: str) -> None:
    """Status, headers, body and end are the recorded ones; of a stream also the pieces."""
    if not NAMES:
        pytest.skip(ABSENT)
    recording, told = Recording.load(name), INSTEAD.get(name, {})
    reply, forwarded, cuts = played(recording)
    theirs = recording.response
    assert reply.status == told.get("status", theirs["status"])
    assert pairs(reply.headers) == pairs(expected_headers(recording, told, forwarded=forwarded))
    assert reply.ended == told.get("ended", theirs["ended"])
    compare_body(reply, recording, told, forwarded=forwarded)
    if recording.request["path"] in MANAGED:
        return
    if theirs["framing"] == "chunked" and reply.framing == "chunked" and "adds" not in told:
        whole = ends(text.encode() for text in recording.texts)
        assert cuts == [at for at in whole if at >= cuts[0]], "records come when they come"
        assert whole.index(cuts[0]) <= OPENING.get(recording.request["path"], 0)


# How many pieces of a stream are held at most until it is clear that there will be an answer.
OPENING: Final = {"/v1/messages": 2, "/v1/responses": 4}


def ends(pieces: Any) -> list[int]:
    """Where each piece ends."""
    at, found = 0, []
    for piece in pieces:
        at += len(piece)
        found.append(at)
    return found


def expected_headers(
    recording: Recording, told: dict[str, Any], *, forwarded: bool
) -> list[tuple[str, str]]:
    """As recorded, but for what is listed; errors of ours have one content type."""
    pairs_told = [
        (k, v) for k, v in recording.response["headers"] if k not in told.get("headers", {})
    ]
    if (
        not forwarded
        and recording.response["status"] >= 400
        and "application/json" in str(pairs_told)
    ):
        pairs_told = [(k, NATIVE if k == "Content-Type" else v) for k, v in pairs_told]
    if told.get("status", 0) == 403:
        pairs_told = [(k, v) for k, v in pairs_told if k != "Vary"]
    return pairs_told + [(k, v) for k, v in told.get("headers", {}).items() if v]


NATIVE = "application/json; charset=utf-8"


def compare_body(
    reply: Reply, recording: Recording, told: dict[str, Any], *, forwarded: bool
) -> None:
    """What a backend said is passed on byte by byte; our own words may have another time and id."""
    theirs = "".join(recording.texts)
    ours = reply.body.decode()
    if told.get("free"):
        return
    if recording.request["path"] in MANAGED and ours and "body" not in told:
        assert progress(ours) == progress(theirs)
        return
    if told.get("shuffled"):
        assert sorted(ours) == sorted(theirs)
        assert sorted_rows(json.loads(ours)) == sorted_rows(json.loads(theirs))
    elif "adds" in told:
        assert ours.startswith(theirs)
        assert same(ours.removeprefix(theirs)) == told["adds"]
    elif forwarded and "body" not in told:
        assert ours == theirs
    else:
        assert same(ours) == same(told.get("body", theirs))


def progress(text: str) -> list[Any]:
    """Records without what is added, and of each layer only the last, full as it is in the end."""
    told: dict[str, Any] = {}
    for line in text.splitlines():
        record = json.loads(line)
        record.pop("backends", None)
        if "digest" in record:
            record["completed"] = record["total"]
        told[str(record.get("digest") or record)] = record
    return list(told.values())


def sorted_rows(answer: dict[str, Any]) -> list[str]:
    """The rows of a list in an order of their own."""
    return sorted(map(json.dumps, answer.get("models") or answer["data"]))


def gone(recording: Recording) -> frozenset[str]:
    """What the recorded host did not have: never what it deleted."""
    return frozenset() if recording.name in ("delete", "delete-loaded") else GONE


def played(recording: Recording) -> tuple[Reply, bool, list[int]]:
    """The answer to the recorded request, whether the host gave it, and where its pieces end."""
    found: list[tuple[Reply, bool, list[int]]] = []

    @virtual
    async def play() -> None:
        async with Replay(recording, gone(recording)) as host:
            backends = [{"name": "a", "url": host.url}]
            origins = ["*"] if recording.data.get("setup") == "OLLAMA_ORIGINS=*" else []
            config = {"backends": backends, "cors.allow_origins": origins}
            async with running(0, config=config) as rig:
                began = now()
                reply, _ = await recording.send(rig.port)
                assert now() - began <= PAUSE_S * (len(recording.texts) + 1), "nothing is held up"
                asked = bool(host.forwarded or host.shown)
                found.append((reply, asked, ends(reply.segments)))

    play()
    return found[0]


def test_every_difference_is_one() -> None:
    """No excuse is left over for an exchange that is not recorded, or not compared."""
    if not NAMES:
        pytest.skip(ABSENT)
    assert not INSTEAD.keys() - set(NAMES)
    assert all(INSTEAD.values())
    for prefix in EXCUSED:
        assert any(name.startswith(prefix) for name in recorded()), prefix
