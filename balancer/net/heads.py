"""
The head of a request to a backend, as bytes.

Laws:
- What frames a message and what concerns one connection alone is ours: a caller's header of that
  name is left out. Exactly one Content-Length, of the bytes that are sent; never another framing.
- A caller's headers that are the very ones of the last time are not looked at again.
- The backend's own headers stand instead of a caller's of the same name.
- No control character gets out but the line ends that we write.
"""

from __future__ import annotations

from typing import Final

from yarl import URL

from balancer.core.domain import Call
from balancer.net.connecting import Target

OURS: Final = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-request-id",
    }
)
_CONTROLS: Final = bytes([*range(9), *range(10, 32), 127])  # a tab is none


_NOT_PLAIN: Final = "a space or a control character in the head of a request"
REMEMBERED: Final = 64  # clients' headers,
REMEMBERED_BYTES: Final = 8 * 1024  # of no more bytes each
Pairs = tuple[tuple[str, str], ...]


class Heads:
    """Makes the heads of one target's requests."""

    def __init__(self, target: Target) -> None:
        url = URL(target.url, encoded=True)
        self._prefix = url.raw_path.rstrip("/")
        self._withheld = OURS | {name.lower() for name, _ in target.headers}
        own = [("Host", url.host_port_subcomponent or ""), *target.headers]
        self._own = [f"{name}: {value}" for name, value in own]
        self._names_calls = "x-request-id" not in (name.lower() for name, _ in target.headers)
        # By identity, which is what a client keeps that sends the same head again.
        self._known: dict[int, tuple[Pairs, bytes]] = {}

    def of(self, call: Call, *, keep: bool) -> bytes:
        """
        The head of *call*.

        Args:
            keep: The connection is not to be closed behind the answer.

        Raises:
            ValueError: It holds a character that it must not.
        """
        route = call.route
        query = f"?{call.query}" if call.query else ""
        first = f"{route.method} {self._prefix}{route.path}{query} HTTP/1.1"
        if first.count(" ") != 2:
            raise ValueError(_NOT_PLAIN)
        last = f"Content-Length: {len(call.body)}\r\n\r\n"
        line_ends = 2
        if self._names_calls:
            last, line_ends = f"X-Request-Id: {call.id}\r\n{last}", 3
        if not keep:
            last, line_ends = f"Connection: close\r\n{last}", line_ends + 1
        middle = self._middle(call.headers)
        return b"%b\r\n%b%b" % (_clean(first, 0), middle, _clean(last, line_ends))

    def _middle(self, headers: Pairs) -> bytes:
        """What does not differ from one request of a client to the next."""
        known = self._known.get(id(headers))
        if known is not None and known[0] is headers:
            return known[1]
        lines = list(self._own)
        for name, value in headers:
            if name.lower() not in self._withheld:
                lines.append(f"{name}: {value}")
        middle = _clean("\r\n".join([*lines, ""]), len(lines))
        if len(middle) <= REMEMBERED_BYTES:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[id(headers)] = headers, middle
        return middle


def _clean(text: str, line_ends: int) -> bytes:
    """
    As bytes.

    Raises:
        ValueError: It holds a control character beside so many line ends.
    """
    written = text.encode("utf-8", "surrogateescape")
    if len(written) - len(written.translate(None, _CONTROLS)) != 2 * line_ends:
        raise ValueError(_NOT_PLAIN)
    return written
