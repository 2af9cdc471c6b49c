"""What `doctor` looks at: hosts, this machine, the configuration, the running balancer."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from balancer.config import Config


class Trouble(StrEnum):
    """Why a host did not answer as Ollama does."""

    NAME = "name"
    REFUSED = "refused"
    TIMEOUT = "timeout"
    NO_ROUTE = "no route"
    TLS = "tls"
    SILENT = "silent"
    GARBLED = "garbled"
    CREDENTIAL = "credential"
    STRANGER = "stranger"


@dataclass(frozen=True, slots=True)
class Installed:
    """A model on disk, as a list of models tells it; *capabilities* None: not told."""

    name: str
    digest: str
    modified_at: str = ""
    capabilities: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory; *left_s* seconds until it is unloaded."""

    name: str
    size_bytes: int = 0
    vram_bytes: int = 0
    context: int | None = None
    left_s: float | None = None
    expires_at: str = ""


@dataclass(frozen=True, slots=True)
class Host:
    """
    What one host said, or why it did not.

    Args:
        told: The trouble in a few words.
        is_here: It is this machine.
        on_loopback: It is this machine, and an Ollama answers on loopback only.
        is_balancer: It is an ollama-balancer, ours or another.
        ahead_s: How far its clock is before ours; None: not told.
    """

    name: str
    url: str
    trouble: Trouble | None = None
    told: str = ""
    is_here: bool = False
    on_loopback: bool = False
    is_balancer: bool = False
    addresses: frozenset[str] = frozenset()
    version: str | None = None
    latency_s: float = 0.0
    ahead_s: float | None = None
    models: tuple[Installed, ...] = ()
    loaded: tuple[Loaded, ...] = ()

    @property
    def up(self) -> bool:
        """Whether it answered as Ollama does."""
        return self.trouble is None

    @property
    def hostname(self) -> str:
        """The host part of its URL."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """The port it is asked on."""
        parts = urlsplit(self.url)
        return parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def is_loopback(self) -> bool:
        """Whether its address is one that only this machine knows."""
        try:
            return ipaddress.ip_address(self.hostname).is_loopback
        except ValueError:
            return self.hostname == "localhost"


@dataclass(frozen=True, slots=True)
class Machine:
    """
    This machine.

    Args:
        open_files: The hard limit for one process; None: there is none.
        env: The environment.
        unit: The text of our systemd unit; None: it is not installed.
        occupants: Who has our addresses, where it is not the balancer we asked.
    """

    python: tuple[int, int] = (3, 11)
    open_files: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    unit: str | None = None
    occupants: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Facts:
    """
    Everything that is judged.

    Args:
        config: None: it is faulty, and *problems* says how.
        status: The status document; None: no balancer answers at *admin*.
        refusal: What the balancer, or its absence, said instead.
    """

    hosts: tuple[Host, ...] = ()
    machine: Machine = field(default_factory=Machine)
    config: Config | None = None
    file: str | None = None
    problems: tuple[str, ...] = ()
    admin: str = ""
    status: Mapping[str, Any] | None = None
    refusal: str = ""

    @property
    def answering(self) -> tuple[Host, ...]:
        """The hosts that are well enough to be compared."""
        return tuple(host for host in self.hosts if host.up)

    def backend(self, url: str) -> Mapping[str, Any]:
        """What the running balancer says of the backend there; empty: nothing."""
        backends = self.status["backends"] if self.status else []
        return next((backend for backend in backends if backend["url"] == url), {})
