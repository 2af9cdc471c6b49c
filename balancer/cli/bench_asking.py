"""
The calls that `bench` makes, over the standard library, and when what of an answer arrived.

A connection is there before the clock starts, and is kept for the next call, as clients do it.
"""

from __future__ import annotations

import http.client
import json
import select
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from balancer.cli import client
from balancer.cli.bench_choice import Choice, Copy
from balancer.cli.bench_rounds import Sample
from balancer.cli.screen import plain

LOOK_S: Final = 3.0
LEAST_S: Final = 0.1
MOST_BYTES: Final = 16 * 1024 * 1024
TELLING: Final = "X-Balancer-Backend"


Read = Callable[[http.client.HTTPResponse, float, str], Sample]  # when it began, who answers


class Cut(Exception):
    """An answer that is no good: refused, broken off, or with an error in it."""


@dataclass(frozen=True, slots=True)
class Terms:
    """
    What is the same for all calls.

    Args:
        tokens: Asked for, by ``num_predict``.
        run: Goes into every prompt, so that no earlier run is remembered.
        ends_at: When the time is over, by *clock*.
    """

    choice: Choice
    tokens: int
    run: str
    clock: Callable[[], float]
    ends_at: float


class Caller:
    """
    Calls one model, directly and through the balancer. For one thread.

    Args:
        name: Goes into its prompts, which differ from call to call: nobody answers from memory.
    """

    def __init__(self, balancer: client.Admin, terms: Terms, name: str = "") -> None:
        self._balancer = balancer
        self._terms = terms
        self._name = name
        self._calls = 0
        self._urls = {copy.backend: copy.url for copy in terms.choice.copies}
        self._connections: dict[str | None, http.client.HTTPConnection] = {}

    def close(self) -> None:
        """Hang up."""
        for connection in self._connections.values():
            connection.close()

    # -- calls ---------------------------------------------------------------------------------

    def stream(self, backend: str | None) -> Sample:
        """A call that makes tokens."""
        self._calls += 1
        text = f"{self._terms.run}{self._name}-{self._calls:03d}: count from one upwards, in words."
        return self._sample(backend, "POST", "/api/generate", self._body(text), self._streamed)

    def empty(self, backend: str | None) -> Sample:
        """A call without a prompt: Ollama answers at once if the model is in memory."""
        return self._sample(backend, "POST", "/api/generate", self._body(""), self._whole)

    def version(self, backend: str | None) -> Sample:
        """The smallest question; the balancer answers it itself."""
        return self._sample(backend, "GET", "/api/version", None, self._whole)

    def _body(self, prompt: str) -> dict[str, Any]:
        options: dict[str, Any] = {
            "num_predict": self._terms.tokens,
            "temperature": 0,
            "num_ctx": self._terms.choice.context,
        }
        told = {key: value for key, value in options.items() if value is not None}
        return {"model": self._terms.choice.model, "prompt": prompt, "options": told}

    def _sample(
        self,
        backend: str | None,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        read: Read,
    ) -> Sample:
        try:
            return self._exchanged(backend, method, path, body, read)
        except TimeoutError:
            late, told = True, "no end in time"
        except Cut as cut:
            late, told = False, str(cut)
        except (OSError, http.client.HTTPException) as error:
            late, told = False, _reason(error)
        self._drop(backend)
        where = f"{plain(backend)}, directly" if backend else "through the balancer"
        return Sample(backend or "", wrong=f"{where}: {told}", late=late)

    def _exchanged(
        self,
        backend: str | None,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        read: Read,
    ) -> Sample:
        connection = self._connected(backend)
        began = self._terms.clock()
        self._send(connection, backend, method, path, body)
        response = connection.getresponse()
        if response.status != 200:
            raise Cut(f"{response.status}: {_error(response.read(MOST_BYTES))}")
        return read(response, began, backend or response.getheader(TELLING) or "")

    # -- answers -------------------------------------------------------------------------------

    def _whole(self, response: http.client.HTTPResponse, began: float, name: str) -> Sample:
        text = response.read(MOST_BYTES)
        took_s = self._terms.clock() - began
        told = client.record(text)
        if told is None or "error" in told:
            raise Cut(_error(text))
        return Sample(name, took_s, load_s=_seconds(told.get("load_duration")))

    def _streamed(self, response: http.client.HTTPResponse, began: float, name: str) -> Sample:
        at: list[float] = []
        for line in response:
            now = self._terms.clock()
            told = client.record(line)
            if told is None or "error" in told:
                raise Cut(_error(line))
            if told.get("response") or told.get("thinking"):
                at.append(now)
            if told.get("done"):
                response.read(MOST_BYTES)
                return _measured(name, began, at, told)
            if now > self._terms.ends_at:
                raise TimeoutError
        raise Cut("the answer ended in the middle")

    # -- connections ---------------------------------------------------------------------------

    def _connected(self, backend: str | None) -> http.client.HTTPConnection:
        left_s = max(self._terms.ends_at - self._terms.clock(), LEAST_S)
        connection = self._connections.get(backend)
        if connection is None:
            connection = client.connection_to(self._url(backend), left_s)
            self._connections[backend] = connection
        connection.timeout = left_s
        if connection.sock is not None and select.select([connection.sock], [], [], 0)[0]:
            connection.close()  # who says something unasked has hung up
        if connection.sock is None:
            connection.connect()
        connection.sock.settimeout(left_s)
        return connection

    def _drop(self, backend: str | None) -> None:
        connection = self._connections.pop(backend, None)
        if connection is not None:
            connection.close()

    def _url(self, backend: str | None) -> str:
        return self._balancer.url if backend is None else self._urls[backend]

    def _send(
        self,
        connection: http.client.HTTPConnection,
        backend: str | None,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
    ) -> None:
        headers = {} if body is None else {"Content-Type": "application/json"}
        if backend is None and self._balancer.key:
            headers["Authorization"] = f"Bearer {self._balancer.key}"
        text = None if body is None else json.dumps(body).encode()
        connection.request(method, client.prefix(self._url(backend)) + path, text, headers)


def _measured(name: str, began: float, at: list[float], last: Mapping[str, Any]) -> Sample:
    if not at:
        raise Cut("the answer has no tokens in it")
    counted = last.get("eval_count")
    return Sample(
        name,
        at[0] - began,
        tuple(later - earlier for earlier, later in pairwise(at)),
        counted if isinstance(counted, int) and counted >= len(at) else len(at),
        _seconds(last.get("load_duration")),
    )


def _seconds(nanoseconds: object) -> float:
    return nanoseconds / 1e9 if isinstance(nanoseconds, int) else 0.0


def _reason(error: Exception) -> str:
    told = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return plain(told.lower())


def _error(text: bytes) -> str:
    told = client.record(text) or {}
    return plain(told.get("error") or text[:200].decode("utf-8", "replace").strip())


def unreached(copy: Copy, choice: Choice, limit_s: float = LOOK_S) -> str:
    """
    Why a backend cannot be called directly from here; empty: it can.

    It has to show the very model in memory: an address may mean another host here than it means
    to the balancer, 127.0.0.1 above all.
    """
    connection = client.connection_to(copy.url, limit_s)
    try:
        connection.request("GET", client.prefix(copy.url) + "/api/ps")
        response = connection.getresponse()
        text = response.read(MOST_BYTES)
    except (OSError, http.client.HTTPException) as error:
        return f"cannot be reached from here: {_reason(error)}"
    finally:
        connection.close()
    if response.status in (401, 403):
        return f"wants a credential, which only the balancer has (status {response.status})"
    rows = (client.record(text) or {}).get("models")
    shown = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if response.status != 200 or rows is None:
        return f"does not answer like Ollama from here (status {response.status} for /api/ps)"
    if any(row.get("digest") == copy.digest for row in shown):
        return ""
    return (
        f"does not have {plain(choice.model)} in memory as seen from here; "
        f"its address may mean another host here than for the balancer"
    )


def generates(balancer: client.Admin, model: str) -> bool:
    """Whether a model makes text, as far as is told."""
    _, told = balancer.ask("POST", "/api/show", {"model": model})
    can = told.get("capabilities")
    return "completion" in can if isinstance(can, list) else True
