"""
Asking hosts and this machine for what `doctor` judges.

Over the standard library, one thread a host: what is wrong with our own client or event loop
should not hide what is wrong with a host. Nothing takes longer than it may: a thread that hangs
in a name server is left behind.
"""

from __future__ import annotations

import http.client
import json
import resource
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from balancer.cli import client
from balancer.cli.doctor_facts import Host, Installed, Loaded, Machine, Trouble
from balancer.config import Listen

QUESTIONS: Final = 4
NAME_S: Final = 5.0
MOST_BYTES: Final = 64 * 1024 * 1024
UNITS: Final = ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system")
UNIT: Final = "ollama-balancer.service"


@dataclass(frozen=True, slots=True)
class Door:
    """
    How a host is reached.

    Args:
        url: Scheme, authority and perhaps a path prefix.
        headers: Sent along; credentials among them.
        tls: For https; None: the default context.
        server_name: The name its certificate should have, if not the host's.
    """

    name: str
    url: str
    headers: tuple[tuple[str, str], ...] = ()
    tls: ssl.SSLContext | None = None
    server_name: str | None = None


class Refused(Exception):
    """A question that was not answered."""

    def __init__(self, trouble: Trouble, told: str) -> None:
        super().__init__(told)
        self.trouble = trouble
        self.told = told


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def field(self, name: str) -> Any:
        try:
            told = json.loads(self.body)
        except ValueError:
            return None
        return told.get(name) if isinstance(told, dict) else None

    def rows(self) -> list[Mapping[str, Any]]:
        """The rows of a list of models; what is malformed is left out."""
        rows = self.field("models")
        listed = rows if isinstance(rows, list) else []
        return [row for row in listed if isinstance(row, dict) and isinstance(row.get("name"), str)]


# -- hosts -------------------------------------------------------------------------------------


def ask_all(
    doors: Sequence[Door],
    limit_s: float,
    clock: Callable[[], float],
    wall: Callable[[], float],
) -> list[Host]:
    """
    Ask every host, all at once.

    Args:
        limit_s: For one question.
        clock: Monotonic seconds.
        wall: Seconds since 1970.
    """
    answers: dict[str, Host] = {}

    def work(door: Door) -> None:
        answers[door.url] = ask(door, limit_s, clock, wall)

    threads = [threading.Thread(target=work, args=(door,), daemon=True) for door in doors]
    for thread in threads:
        thread.start()
    ends_at = clock() + NAME_S + QUESTIONS * limit_s
    for thread in threads:
        thread.join(max(0.0, ends_at - clock()))
    late = "did not answer in time"
    return [
        answers.get(door.url) or Host(door.name, door.url, Trouble.SILENT, late) for door in doors
    ]


def ask(door: Door, limit_s: float, clock: Callable[[], float], wall: Callable[[], float]) -> Host:
    """What one host says; never raises for what a host does."""
    host = Host(door.name, door.url)
    try:
        addresses = _resolve(host)
        host = replace(host, addresses=addresses, is_here=any(map(_is_ours, addresses)))
        began = clock()
        reply = _get(door, "/api/version", limit_s)
        latency_s = clock() - began
        host = replace(host, latency_s=latency_s, ahead_s=_ahead(reply, wall()))
        if _is_balancer(door, reply, limit_s):
            return replace(host, is_balancer=True, version=reply.field("version"))
        host = replace(host, version=_version(reply))
        now = wall() + (host.ahead_s or 0.0)
        models = tuple(map(_installed, _get(door, "/api/tags", limit_s).rows()))
        loaded = tuple(_loaded(row, now) for row in _get(door, "/api/ps", limit_s).rows())
        return replace(host, models=models, loaded=loaded)
    except Refused as refused:
        host = replace(host, trouble=refused.trouble, told=refused.told)
        return replace(host, on_loopback=_is_on_loopback(host))


def _resolve(host: Host) -> frozenset[str]:
    try:
        found = socket.getaddrinfo(host.hostname, host.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        told = getattr(error, "strerror", None) or str(error)
        raise Refused(Trouble.NAME, f"no address: {told.lower()}") from None
    return frozenset(str(address[0]) for *_, address in found)


def _is_ours(address: str) -> bool:
    """Only an address of this machine can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock, suppress(OSError):
        sock.bind((address, 0))
        return True
    return False


def _is_on_loopback(host: Host) -> bool:
    """Whether an Ollama of this machine answers on loopback, and only there."""
    if host.trouble is not Trouble.REFUSED or not host.is_here or host.is_loopback:
        return False
    return client.occupant("127.0.0.1", host.port).startswith("an Ollama")


def _is_balancer(door: Door, reply: _Reply, limit_s: float) -> bool:
    """Balancers say what Ollama says, but number their answers."""
    if "x-request-id" not in reply.headers:
        return False
    with suppress(Refused):
        return _get(door, "/_balancer/live", limit_s).field("live") is True
    return False


def _version(reply: _Reply) -> str:
    if reply.status in (401, 403):
        raise Refused(Trouble.CREDENTIAL, f"refused: status {reply.status}")
    version = reply.field("version")
    if reply.status != 200 or not isinstance(version, str):
        raise Refused(Trouble.STRANGER, f"is no Ollama: status {reply.status} for /api/version")
    return version


def _ahead(reply: _Reply, now: float) -> float | None:
    """By the Date header; it tells whole seconds."""
    try:
        return parsedate_to_datetime(reply.headers.get("date", "")).timestamp() - now
    except (ValueError, TypeError, OverflowError):
        return None


def _installed(row: Mapping[str, Any]) -> Installed:
    can = row.get("capabilities")
    return Installed(
        name=row["name"],
        digest=str(row.get("digest") or ""),
        modified_at=str(row.get("modified_at") or ""),
        capabilities=frozenset(map(str, can)) if isinstance(can, list) else None,
    )


def _loaded(row: Mapping[str, Any], now: float) -> Loaded:
    expires_at = str(row.get("expires_at") or "")
    left_s = None
    with suppress(ValueError, OverflowError):
        moment = datetime.fromisoformat(expires_at)
        left_s = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now
    return Loaded(
        name=row["name"],
        size_bytes=_whole(row.get("size")),
        vram_bytes=_whole(row.get("size_vram")),
        context=_whole(row.get("context_length")) or None,
        left_s=left_s,
        expires_at=expires_at,
    )


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


# -- one question ------------------------------------------------------------------------------


class _Connection(http.client.HTTPSConnection):
    """HTTPS with a certificate of another name than the host's."""

    def __init__(self, door: Door, netloc: str, limit_s: float) -> None:
        self._context_of_door = door.tls or ssl.create_default_context()
        super().__init__(netloc, timeout=limit_s, context=self._context_of_door)
        self._server_name = door.server_name

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        name = self._server_name or self.host
        self.sock = self._context_of_door.wrap_socket(self.sock, server_hostname=name)


def _get(door: Door, path: str, limit_s: float) -> _Reply:
    parts = urlsplit(door.url)
    connection = (
        _Connection(door, parts.netloc, limit_s)
        if parts.scheme == "https"
        else http.client.HTTPConnection(parts.netloc, timeout=limit_s)
    )
    try:
        _connect(connection)
        connection.request("GET", parts.path.rstrip("/") + path, headers=dict(door.headers))
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return _Reply(response.status, headers, response.read(MOST_BYTES))
    except TimeoutError:
        raise Refused(Trouble.SILENT, f"no answer within {limit_s:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        told = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Refused(Trouble.GARBLED, f"no HTTP: {told.lower()}") from None
    finally:
        connection.close()


def _connect(connection: http.client.HTTPConnection) -> None:
    try:
        connection.connect()
    except TimeoutError:
        raise Refused(Trouble.TIMEOUT, f"no connection within {connection.timeout:g} s") from None
    except ssl.SSLError as error:
        told = getattr(error, "verify_message", "") or error.reason or str(error)
        raise Refused(Trouble.TLS, f"TLS: {told.lower()}") from None
    except OSError as error:
        refused = isinstance(error, ConnectionError)
        told = (error.strerror or str(error)).lower()
        trouble = Trouble.REFUSED if refused else Trouble.NO_ROUTE
        raise Refused(trouble, f"cannot connect: {told}") from None


# -- this machine ------------------------------------------------------------------------------


def machine(env: Mapping[str, str], listen: Iterable[Listen], *, served: bool) -> Machine:
    """
    This machine.

    Args:
        listen: Where we want to be.
        served: The balancer is there already.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return Machine(
        python=sys.version_info[:2],
        open_files=None if hard == resource.RLIM_INFINITY else hard,
        env=env,
        unit=_unit(),
        occupants={} if served else _occupants(listen),
    )


def _occupants(listen: Iterable[Listen]) -> dict[str, str]:
    found = {}
    for one in listen:
        host = "127.0.0.1" if one.host in ("", "0.0.0.0", "::") else one.host
        if one.path is None and one.port and _is_taken(host, one.port):
            found[str(one)] = client.occupant(host, one.port)
    return found


def _is_taken(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _unit(places: Iterable[str] = UNITS) -> str | None:
    """The unit, and what was added to it."""
    texts = []
    for place in map(Path, places):
        for file in (place / UNIT, *sorted((place / f"{UNIT}.d").glob("*.conf"))):
            with suppress(OSError, ValueError):
                texts.append(file.read_text(encoding="utf-8"))
    return "\n".join(texts) or None
