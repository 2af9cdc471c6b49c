"""The admin API from outside, over the standard library alone."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from balancer.cli.exits import CommandError, ExitCode

DEFAULT_PORT: Final = 11435
TIMEOUT_S: Final = 10.0
_URL: Final = re.compile(r"https?://[^\s/?#\x00-\x1f\x7f]+(/[!-~]*)?", re.IGNORECASE)
_KEY: Final = re.compile("[!-~]+")


@dataclass(frozen=True, slots=True)
class Admin:
    """
    The admin API of a running balancer.

    Args:
        url: ``http://host:port``, https, or ``unix:/path``.
        key: Sent as a bearer token.
        limit_s: Patience with each reading.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    limit_s: float = TIMEOUT_S

    def status(self) -> Mapping[str, Any]:
        """The status document."""
        status, told = self.ask("GET", "/_balancer/status", good="status_version")
        if status != 200:
            raise CommandError(refusal(self.url, status, told), code=ExitCode.FAILURE)
        return told

    def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, good: str = ""
    ) -> tuple[int, Mapping[str, Any]]:
        """
        Status and document.

        Args:
            good: A field that each answer of status 200 has, if it comes from a balancer.

        Raises:
            CommandError: Nobody answers, or somebody who is no balancer.
        """
        with self._sent(method, path, body, {}) as response:
            text = response.read()
        told = record(text)
        if told is None or (response.status == 200 and good and good not in told):
            raise CommandError(_stranger(self.url, response.status), code=ExitCode.NO_ADMIN)
        return response.status, told

    def records(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> Iterator[Mapping[str, Any]]:
        """
        The lines of an answer that comes bit by bit, as they come; of a refusal its one.

        Raises:
            CommandError: Nobody answers, or what comes is no balancer's.
        """
        with self._sent("POST", path, body, headers) as response:
            for line in response:
                told = record(line)
                if told is None:
                    raise CommandError(_stranger(self.url, response.status), code=ExitCode.NO_ADMIN)
                yield told

    @contextmanager
    def _sent(
        self, method: str, path: str, body: Mapping[str, Any] | None, headers: Mapping[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        sent = {"Content-Type": "application/json"} if method == "POST" else {}
        if self.key:
            sent["Authorization"] = f"Bearer {self.key}"
        text = None if body is None else json.dumps(body)
        connection = connection_to(self.url, self.limit_s)
        try:
            connection.request(method, prefix(self.url) + path, text, {**sent, **headers})
            yield connection.getresponse()
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # the last: of a name
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise CommandError(
                f"No balancer answers at {self.url}: {reason}. Start one: ollama-balancer; "
                "or, if it was started with another address: --admin HOST:PORT",
                code=ExitCode.NO_ADMIN,
            ) from None
        finally:
            connection.close()


def record(text: bytes) -> dict[str, Any] | None:
    """A JSON object; None: it is none."""
    try:
        told = json.loads(text)
    except ValueError:
        return None
    return told if isinstance(told, dict) else None


def find(
    admin: str | None, config: str | None, *, option: str = "--admin", guess: bool = False
) -> Admin:
    """
    The balancer that flag, environment or configuration name, else the one of this machine.

    Args:
        option: By which a person may say where it is.
        guess: Where the configuration is faulty, what can be read of it counts, or the default.

    Raises:
        CommandError: The configuration is faulty, and nothing else says where.
    """
    return Admin(_url(admin) if admin else _configured(config, option, guess=guess), _key())


def _url(text: str) -> str:
    """A URL as people abbreviate it."""
    if text.startswith("unix:/"):
        return text
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and _URL.fullmatch(url)
        port, has_password = parts.port, parts.username is not None
    except ValueError:
        known, port, has_password = None, None, False
    if has_password:
        told = "The address of a balancer takes no user and password. A key: BALANCER_API_KEY."
        raise CommandError(told, code=ExitCode.USAGE)
    if not known:
        told = f"{text!r} is no address of a balancer. Write http://host:port or unix:/path."
        raise CommandError(told, code=ExitCode.USAGE)
    return url if port or "://" in text else f"{url}:{DEFAULT_PORT}"


def _configured(config: str | None, option: str, *, guess: bool) -> str:
    from balancer.cli import source

    here = f"http://127.0.0.1:{DEFAULT_PORT}"
    found = source.find(config)
    try:
        listen = source.or_refuse(found, lambda: found.listening(guess=guess))
    except CommandError as error:
        if guess:
            return here
        told = f"Mend it, or say where the balancer is: {option} HOST:PORT"
        raise CommandError(*error.lines, told, code=error.code) from None
    for address in listen:
        if address.path is not None:
            return f"unix:{address.path}"
        if address.port:
            anywhere = address.host in ("", "0.0.0.0", "::")
            host = "127.0.0.1" if anywhere else address.host
            return (
                f"http://[{host}]:{address.port}"
                if ":" in host
                else f"http://{host}:{address.port}"
            )
    return here


def _key() -> str | None:
    key, file = os.environ.get("BALANCER_API_KEY"), os.environ.get("BALANCER_API_KEY_FILE")
    try:
        if file and not key:
            key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        told = (
            f"Cannot read BALANCER_API_KEY_FILE {file}: {getattr(error, 'strerror', None) or error}"
        )
        raise CommandError(told, code=ExitCode.FAILURE) from None
    if key and not _KEY.fullmatch(key):  # not shown: it may be most of one
        told = "BALANCER_API_KEY: a key is printable ASCII without spaces."
        raise CommandError(told, code=ExitCode.FAILURE)
    return key or None


def _stranger(url: str, status: int) -> str:
    return f"{url} answers ({status}), but is no ollama-balancer. Say where it is: --admin URL"


def refusal(url: str, status: int, told: Mapping[str, Any]) -> str:
    """What a refusal says, and what to do."""
    error = told.get("error")
    text = error.get("message") if isinstance(error, dict) else error
    hint = ""
    if status in (401, 403):
        hint = " Set BALANCER_API_KEY to a key with the role admin."
    return f"The balancer at {url} refused ({status}): {text or 'no reason given'}{hint}"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def prefix(url: str) -> str:
    """What stands before every path there."""
    return "" if url.startswith("unix:") else urlsplit(url).path.rstrip("/")


def connection_to(url: str, timeout_s: float) -> http.client.HTTPConnection:
    """A connection that is not made yet."""
    if url.startswith("unix:"):
        return _UnixConnection(url.removeprefix("unix:"), timeout_s)
    parts = urlsplit(url)
    if parts.scheme == "https":
        return http.client.HTTPSConnection(parts.netloc, timeout=timeout_s)
    return http.client.HTTPConnection(parts.netloc, timeout=timeout_s)


def occupant(host: str, port: int) -> str:
    """Who has a port: asked politely, told for a sentence."""
    if _says(host, port, "/_balancer/live", "live"):
        return "another ollama-balancer"
    if _text(host, port, "/") == "Ollama is running":
        version = _says(host, port, "/api/version", "version")
        return f"an Ollama server ({version})" if version else "an Ollama server"
    return "another program"


def _says(host: str, port: int, path: str, field: str) -> Any:
    try:
        told = json.loads(_text(host, port, path))
    except ValueError:
        return None
    return told.get(field) if isinstance(told, dict) else None


def _text(host: str, port: int, path: str) -> str:
    connection = http.client.HTTPConnection(host, port, timeout=1.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().read(4096).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()
