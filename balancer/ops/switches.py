"""
The operator's switches in a small file, so that they survive a restart.

What is kept belongs to a backend's identity, its name and url: another url is another backend.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from balancer.core.domain import Switch
from balancer.core.events import Emit, Event, MemberJoined, SwitchesLost, SwitchMoved
from balancer.core.pool import Pool
from balancer.ops.files import reason, replace

VERSION: Final = 1
LIMIT_BYTES: Final = 1024 * 1024
BY: Final = "state.path"  # who turned a switch that was read from the file

Identity = tuple[str, str]


class Switches:
    """
    A subscriber that writes the file when a switch is turned, and turns them as it was written.

    A file that cannot be read is told once and counts as empty; one that cannot be written is told
    each time. Backends that are not configured at present keep what is written of them.

    Args:
        path: Its directory must exist.
    """

    KINDS: Final = (MemberJoined, SwitchMoved)

    def __init__(self, path: str, pool: Pool, clock: Callable[[], float], emit: Emit) -> None:
        self._path = Path(path)
        self._pool = pool
        self._clock = clock
        self._emit = emit
        self._kept: dict[Identity, Switch] = {}

    def read(self) -> None:
        """Read the file; a missing one is no fault."""
        try:
            with self._path.open("rb") as file:
                self._kept = _parse(file.read(LIMIT_BYTES))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError) as error:
            self._lost(error)

    def __call__(self, event: Event) -> None:
        """Keep what the operator does; hand it to a backend that joins."""
        match event:
            case MemberJoined(backend=name, url=url):
                kept = self._kept.get((name, url))
                if kept is not None:
                    self._pool.turn(name, kept, BY)
            case SwitchMoved(backend=name, switch=switch, by=by) if by != BY:
                self._keep((name, self._pool.members[name].backend.url), switch)
            case _:
                pass

    def _keep(self, identity: Identity, switch: Switch) -> None:
        if switch is Switch.SERVING:
            self._kept.pop(identity, None)
        else:
            self._kept[identity] = switch
        try:
            replace(self._path, _text(self._kept))
        except OSError as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        self._emit(SwitchesLost(self._clock(), str(self._path), reason(error)))


def _text(kept: Mapping[Identity, Switch]) -> bytes:
    rows = [
        {"name": name, "url": url, "switch": switch.value}
        for (name, url), switch in sorted(kept.items())
    ]
    return (json.dumps({"version": VERSION, "switches": rows}, indent=1) + "\n").encode()


def _parse(text: bytes) -> dict[Identity, Switch]:
    """Raises ValueError: it is not what we write, or of a later version."""
    told = json.loads(text)
    if not isinstance(told, dict) or told.get("version") != VERSION:
        raise ValueError(f"not a file of version {VERSION}")
    rows = told.get("switches")
    if not isinstance(rows, list):
        raise ValueError("switches are missing")  # noqa: TRY004 - one kind of fault for all
    return dict(map(_row, rows))


def _row(row: Any) -> tuple[Identity, Switch]:
    if not isinstance(row, dict):
        raise ValueError("a switch is not an object")  # noqa: TRY004 - as above
    name, url = row.get("name"), row.get("url")
    if not isinstance(name, str) or not isinstance(url, str):
        raise ValueError("a switch has no name or url")  # noqa: TRY004 - as above
    return (name, url), Switch(row.get("switch"))
