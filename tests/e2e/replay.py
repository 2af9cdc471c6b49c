"""A host that answers with recorded bytes, in recorded pieces."""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Any, Self

from tests.sim.wire import Recording

CLIENT = "wire/1"  # the recorded client's User-Agent
PAUSE_S = 0.01  # between two pieces, so that nobody can put them together again
INFERENCE = (
    "/api/generate", "/api/chat", "/api/embed", "/api/embeddings", "/v1/chat/completions",
    "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages",
)  # fmt: skip
MANAGED = ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete")
ACCOUNT = ("/api/me", "/api/signout", "/api/status", "/api/experimental/", "/v1/models/")
LOADED = b'{"model":"m","response":"","done":true,"done_reason":"load"}'


class Replay:
    """
    The recorded host at the moment of one exchange: has its models, all of them in memory.

    Args:
        recording: What it answers a forwarded call with, or a question about what it has.
        missing: Models it does not list although the exchange names them.
    """

    def __init__(self, recording: Recording, missing: frozenset[str] = frozenset()) -> None:
        self.recording = recording
        self.forwarded: list[bytes] = []
        self.shown = 0
        self._missing = missing
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where it listens."""
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the balancer hung up, or the test is over
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False: the connection is over."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        method, path, _ = first.split(" ")
        pairs = [line.partition(":") for line in lines]
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        request = self.recording.request
        mine = (method, path) == (request["method"], request["path"])
        if mine and path.startswith(ACCOUNT):
            self.forwarded.append(body)
            return await _answer(writer, self.recording)
        if path in MANAGED or (method, path) == self._blob():
            self.forwarded.append(body)
            return await _answer(writer, self.recording)
        if path.startswith("/api/blobs/"):
            return await _whole(writer, b"", 404 if self._lacks_blob() else 200)
        if path in INFERENCE and "via" in headers:
            self.forwarded.append(body)
            return await _answer(writer, self.recording)
        if (method, path) == ("POST", "/api/show"):
            return await self._show(writer, passed_on=headers.get("user-agent") == CLIENT)
        told = {"/api/tags": self._tags, "/api/ps": self._ps}.get(path)
        if told is not None:
            return await _whole(writer, told())
        if path == "/api/version":
            return await _answer(writer, Recording.load("version-get"))
        return await _whole(writer, LOADED)

    def _blob(self) -> tuple[str, str]:
        """The exchange's own request, if it is about a blob."""
        request = self.recording.request
        return request["method"], request["path"] if "/blobs/" in request["path"] else ""

    def _lacks_blob(self) -> bool:
        """Whether the recorded host did not have the blob that the exchange is about."""
        name, status = self.recording.name, self.recording.response["status"]
        return "missing-blob" in name or (name.startswith("blob-post") and status != 200)

    async def _show(self, writer: asyncio.StreamWriter, *, passed_on: bool) -> bool:
        """The exchange's own answer to its client; to the balancer itself only a good one."""
        self.shown += passed_on
        fits = self.recording.request["path"].startswith("/api/show")
        good = self.recording.response["status"] == 200
        mine = fits and (passed_on or good)
        return await _answer(writer, self.recording if mine else Recording.load("show"))

    def _tags(self) -> bytes:
        return json.dumps({"models": self._rows()}, separators=(",", ":")).encode()

    def _rows(self) -> list[dict[str, Any]]:
        """The recorded list, and what the exchange names besides."""
        rows: list[dict[str, Any]] = Recording.load("tags-get").json["models"]
        named = self._named()
        if named and named not in {row["name"] for row in rows}:
            own = {"digest": "f" * 64, "modified_at": "2026-01-01T00:00:00Z"}
            rows.append(rows[-1] | {"name": named, "model": named} | own)
        return rows

    def _named(self) -> str:
        if self.recording.request["path"] == "/api/pull" and self.recording.name != "pull-again":
            return ""  # it is about to be fetched
        try:
            text = str(json.loads(self.recording.payload()).get("model") or "").strip().lower()
        except (ValueError, AttributeError):
            return ""
        if not text or text in self._missing:
            return ""
        return text if ":" in text else f"{text}:latest"

    def _ps(self) -> bytes:
        if self.recording.request["path"] == "/api/ps" and self.recording.texts:
            return "".join(self.recording.texts).encode()
        more = {"expires_at": "2099-01-01T00:00:00Z", "size_vram": 1, "context_length": 4096}
        return json.dumps({"models": [row | more for row in self._rows()]}).encode()


async def _whole(writer: asyncio.StreamWriter, body: bytes, status: int = 200) -> bool:
    head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    return True


async def _answer(writer: asyncio.StreamWriter, recording: Recording) -> bool:
    """The recorded answer, piece by piece; False: it ends by closing the connection."""
    response = recording.response
    chunked = response["framing"] == "chunked"
    texts = [text.encode() for text in recording.texts]
    lines = [f"{response['version']} {response['status']} {response['reason']}"]
    for name, value in response["headers"]:
        length = name == "Content-Length" and recording.request["method"] != "HEAD"
        lines.append(f"{name}: {sum(map(len, texts)) if length else value}")
    writer.write("\r\n".join([*lines, "", ""]).encode())
    for text in texts:
        writer.write(b"%x\r\n%s\r\n" % (len(text), text) if chunked else text)
        await writer.drain()
        await asyncio.sleep(PAUSE_S)
    if response["ended"] == "clean" and chunked:
        writer.write(b"0\r\n\r\n")
        await writer.drain()
    return bool(response["ended"] == "clean")
