"""A raw client that sees what libraries hide, and the recorded exchanges of a real Ollama."""

import asyncio
import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECORDINGS = Path(__file__).resolve().parents[3] / "shared" / "wire"


@dataclass
class Reply:
    """A reply as it came, in the words of the recordings."""

    status: int = 0
    reason: str = ""
    version: str = ""
    interim: list[str] = field(default_factory=list)
    headers: list[tuple[str, str]] = field(default_factory=list)
    framing: str = "none"
    segments: list[bytes] = field(default_factory=list)
    ended: str = "no response"

    @property
    def body(self) -> bytes:
        """All segments."""
        return b"".join(self.segments)

    def get(self, name: str) -> str | None:
        """The first header of that name."""
        return next((value for key, value in self.headers if key.lower() == name), None)


class Wire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int) -> "Wire":
        """Connects to a simulated host."""
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 26))

    def close(self) -> None:
        """Hangs up."""
        self.writer.close()

    async def reply(self, method: str = "GET") -> Reply:
        """Reads one reply."""
        reply = Reply()
        try:
            await self._head(reply)
            await self._body(reply, method)
        except asyncio.IncompleteReadError:
            reply.ended = "cut" if reply.status else "no response"
        except ConnectionResetError:
            reply.ended = "reset"
        return reply

    async def _head(self, reply: Reply) -> None:
        while True:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
            if first != "HTTP/1.1 100 Continue":
                break
            reply.interim.append(first)
        reply.version, status, reply.reason = first.split(" ", 2)
        reply.status = int(status)
        reply.headers = [(k, v.strip()) for k, _, v in (line.partition(":") for line in lines)]

    async def _body(self, reply: Reply, method: str) -> None:
        length = reply.get("content-length")
        if method == "HEAD" or reply.status == 204:
            reply.framing = "none"
        elif reply.get("transfer-encoding") == "chunked":
            reply.framing = "chunked"
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                reply.segments.append((await self.reader.readexactly(size + 2))[:-2])
            await self.reader.readexactly(2)
        elif length is not None:
            reply.framing = "length"
            if int(length):
                reply.segments.append(await self.reader.readexactly(int(length)))
        else:
            reply.framing = "close"
            reply.segments.append(await self.reader.read())
            reply.ended = "closed"
            return
        reply.ended = "clean"


async def ask(port: int, method: str, path: str, body: object = None, **headers: str) -> Reply:
    """One request on a connection of its own; a body that is no bytes goes as JSON."""
    wire = await Wire.connect(port)
    payload = (
        body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    )
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{port}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if payload or method == "POST":
        lines.append(f"Content-Length: {len(payload)}")
    wire.writer.write("\r\n".join([*lines, "", ""]).encode() + payload)
    try:
        return await wire.reply(method)
    finally:
        wire.close()


@dataclass
class Recording:
    """One recorded exchange."""

    name: str
    data: dict[str, Any]

    @classmethod
    def load(cls, name: str) -> "Recording":
        """Reads it from the folder of recordings."""
        return cls(name, json.loads((RECORDINGS / f"{name}.json").read_text()))

    @property
    def request(self) -> dict[str, Any]:
        """The request sent."""
        found: dict[str, Any] = self.data["request"]
        return found

    @property
    def response(self) -> dict[str, Any]:
        """The response recorded."""
        found: dict[str, Any] = self.data["response"]
        return found

    @property
    def texts(self) -> list[str]:
        """Its segments."""
        return [text for _, text in self.response["segments"]]

    @property
    def json(self) -> Any:
        """Its body as JSON."""
        return json.loads("".join(self.texts))

    def payload(self) -> bytes:
        """The request body."""
        if "body_base64" in self.request:
            return base64.b64decode(self.request["body_base64"])
        return str(self.request.get("body") or "").encode()

    async def send(self, port: int) -> tuple[Reply, bool]:
        """The same request to a simulated host; the reply, and whether the connection is open."""
        wire = await Wire.connect(port)
        request = self.request
        host = f"127.0.0.1:{port}"
        lines = [f"{request['method']} {request['path']} {request.get('version', 'HTTP/1.1')}"]
        lines += [f"{name}: {value.replace('{HOST}', host)}" for name, value in request["headers"]]
        wire.writer.write("\r\n".join([*lines, "", ""]).encode())
        if request.get("hold_body"):
            interim = await wire.reader.readuntil(b"\r\n\r\n")
            wire.reader.feed_data(interim)
        wire.writer.write(self.payload())
        reply = await wire.reply(request["method"])
        await asyncio.sleep(0.001)  # for the end of the connection to be seen
        is_open = not wire.reader.at_eof()
        wire.close()
        return reply, is_open


def recorded() -> list[str]:
    """The names of all recordings, none where the folder is absent."""
    return sorted(path.stem for path in RECORDINGS.glob("*.json"))
