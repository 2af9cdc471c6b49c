"""
Many hosts doing the same work, told to one client as if it were one.

Laws:
- A record is one that Ollama itself could have sent, with `backends` added, which clients ignore.
- A layer's `total` is its size once; `completed` is `total` times the mean share over the hosts
  still at work, never falls, and equals `total` only when all of them have the layer. Ollama's
  command line draws a bar from exactly that.
- ``success`` is said only if every host that was asked succeeded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

EVERY_S: Final = 0.25  # between two records of one layer
PHASES: Final = ("verifying sha256 digest", "writing manifest", "removing unused layers")
SUCCESS: Final = "success"

Record = dict[str, Any]


@dataclass(slots=True)
class _Host:
    """How far one host is."""

    status: str = "waiting"
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)  # digest: completed, total
    said: set[str] = field(default_factory=set)
    done: bool = False
    error: str | None = None

    def share(self, digest: str) -> float:
        if self.done:
            return 1.0
        completed, total = self.layers.get(digest, (0, 0))
        return completed / total if total else 0.0

    def told(self) -> Record:
        if self.error is not None:
            return {"error": self.error}
        return {"status": SUCCESS if self.done else self.status}


class Merger:
    """
    The progress of several hosts as one stream of records.

    Args:
        hosts: Names of those that are asked.
        clock: Monotonic seconds.
        skipped: Those that are not, with the reason; told, never an error.
        names: Whether the client is told which hosts there are.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        clock: Callable[[], float],
        skipped: Mapping[str, str] | None = None,
        *,
        names: bool = True,
    ) -> None:
        self._names = names
        self._hosts = {name: _Host() for name in hosts}
        self._skipped = dict(skipped or {})
        self._clock = clock
        self._told: dict[str, tuple[float, int]] = {}  # digest: when, how much
        self._sizes: dict[str, int] = {}
        self._labels: dict[str, str] = {}
        self._said: dict[str, None] = {}

    # -- what hosts tell -----------------------------------------------------------------------

    def feed(self, name: str, record: Mapping[str, Any]) -> list[Record]:
        """One host's record; what to tell the client now."""
        host = self._hosts[name]
        error, status, digest = record.get("error"), record.get("status"), record.get("digest")
        if isinstance(error, str):
            return self.fail(name, error)
        if not isinstance(status, str):
            return []
        if status == SUCCESS:
            return self.finish(name)
        host.status = status
        if isinstance(digest, str):
            return self._layer(host, digest, status, record)
        host.said.add(status)
        if status not in PHASES:
            return self._say(status)
        host.layers = {known: (total, total) for known, (_, total) in host.layers.items()}
        return self._moved()

    def finish(self, name: str) -> list[Record]:
        """A host has succeeded."""
        self._hosts[name].done = True
        return self._moved()

    def fail(self, name: str, error: str) -> list[Record]:
        """A host has failed; the others go on."""
        host = self._hosts[name]
        if host.error is None and not host.done:
            host.error = error
        return self._moved()

    # -- how it stands -------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether every host has succeeded or failed."""
        return all(host.done or host.error is not None for host in self._hosts.values())

    @property
    def succeeded(self) -> list[str]:
        """The hosts that have succeeded."""
        return [name for name, host in self._hosts.items() if host.done]

    @property
    def failed(self) -> dict[str, str]:
        """The hosts that have failed, with their texts."""
        return {name: host.error for name, host in self._hosts.items() if host.error is not None}

    def so_far(self) -> list[Record]:
        """What somebody who comes late has missed."""
        told = [self.record({"status": status}) for status in self._said]
        at = float("-inf")
        self._told = {digest: (at, before - 1) for digest, (_, before) in self._told.items()}
        return told + self._tell(list(self._told))

    def last(self) -> list[Record]:
        """The end of the stream: who was left out, then success, or an error with who failed."""
        failed = self.failed
        if failed:
            text = failure(failed, self.succeeded, names=self._names)
            return [self.record({"error": text})]
        left = self._skipped.items() if self._names else ()
        told = [self.record({"status": f"left out {name}: {why}"}) for name, why in left]
        return [*told, self.record({"status": SUCCESS})]

    def record(self, told: Record) -> Record:
        """With every host and how far it is, if the client may know."""
        if not self._names:
            return told
        hosts: Record = {name: host.told() for name, host in self._hosts.items()}
        hosts |= {name: {"skipped": why} for name, why in self._skipped.items()}
        return told | {"backends": hosts}

    # -- records -------------------------------------------------------------------------------

    def _working(self) -> list[_Host]:
        return [host for host in self._hosts.values() if host.error is None]

    def _layer(
        self, host: _Host, digest: str, status: str, record: Mapping[str, Any]
    ) -> list[Record]:
        completed, total = _count(record.get("completed")), _count(record.get("total"))
        before = host.layers.get(digest, (0, 0))[0]
        host.layers[digest] = (min(max(completed, before), total), total)
        self._sizes[digest] = max(total, self._sizes.get(digest, 0))
        self._labels[digest] = status
        return self._tell([digest])

    def _moved(self) -> list[Record]:
        """Somebody has come to an end: what the others were waited for may be told now."""
        return [*self._tell(list(self._sizes)), *self._phases()]

    def _tell(self, digests: Sequence[str]) -> list[Record]:
        now, told = self._clock(), []
        for digest in digests:
            total, completed = self._sizes[digest], self._completed(digest)
            at, before = self._told.get(digest, (float("-inf"), -1))
            is_due = now - at >= EVERY_S or completed == total
            if completed > before and is_due:
                self._told[digest] = (now, completed)
                record: Record = {"status": self._labels[digest], "digest": digest}
                record |= {"total": total} if total else {}
                record |= {"completed": completed} if completed else {}
                told.append(self.record(record))
        return told

    def _completed(self, digest: str) -> int:
        working, total = self._working(), self._sizes[digest]
        before = max(0, self._told.get(digest, (0.0, 0))[1])
        if not working:
            return before
        shares = [host.share(digest) for host in working]
        if all(share >= 1.0 for share in shares):
            return total
        return max(before, min(int(total * sum(shares) / len(shares)), max(total - 1, 0)))

    def _phases(self) -> list[Record]:
        """Those that every host still at work has reached."""
        working = self._working()
        reached = [
            phase
            for phase in PHASES
            if any(phase in host.said for host in working)
            and all(phase in host.said or host.done for host in working)
        ]
        return [record for phase in reached for record in self._say(phase)]

    def _say(self, status: str) -> list[Record]:
        if status in self._said:
            return []
        self._said[status] = None
        return [self.record({"status": status})]


def failure(failed: Mapping[str, str], succeeded: Sequence[str], *, names: bool = True) -> str:
    """One line for what failed; if all failed alike, their text as it is."""
    texts = set(failed.values())
    if not succeeded and len(texts) == 1:
        return texts.pop()
    if not names:
        return f"failed on {len(failed)} of {len(failed) + len(succeeded)} hosts"
    told = "; ".join(f"{name}: {text}" for name, text in failed.items())
    done = f" (done on {', '.join(succeeded)})" if succeeded else ""
    return f"failed on {len(failed)} of {len(failed) + len(succeeded)} hosts: {told}{done}"


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 and not isinstance(value, bool) else 0
