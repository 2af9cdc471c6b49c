"""A server with fixed answers, for what asks over HTTP without an event loop."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


@dataclass
class Stub:
    """A server with fixed answers by path, at most `limit`; remembers what was asked."""

    answers: dict[str, tuple[int, object]]
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    port: int = 0
    limit: int = 1000
    headers: dict[str, str] = field(default_factory=dict)


@contextmanager
def serving(answers: dict[str, tuple[int, object]]) -> Iterator[Stub]:
    """Serve *answers* on loopback; texts go as they are, the rest as JSON."""
    stub = Stub(answers)

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            stub.asked.append((self.command, self.path, self.headers.get("Authorization")))
            known = stub.answers if len(stub.asked) <= stub.limit else {}
            status, told = known.get(self.path, (404, "404 page not found"))
            body = (told if isinstance(told, str) else json.dumps(told)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in stub.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer  # noqa: N815 - the names http.server looks for

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    stub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
