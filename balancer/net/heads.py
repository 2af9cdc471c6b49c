"""
The head of a request to a backend, as bytes.

Laws:
- What frames a message and what concerns one connection alone is ours: a caller's header of that
  name is left out. Exactly one Content-Length, of the bytes that are sent; never another framing.
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
    }
)
_CONTROLS: Final = bytes([*range(9), *range(10, 32), 127])  # a tab is none


class Heads:
    """Makes the heads of one target's requests."""

    def __init__(self, target: Target) -> None:
        url = URL(target.url, encoded=True)
        self._prefix = url.raw_path.rstrip("/")
        self._withheld = OURS | {name.lower() for name, _ in target.headers}
        own = [("Host", url.host_port_subcomponent or ""), *target.headers]
        self._own = [f"{name}: {value}" for name, value in own]

    def of(self, call: Call, *, keep: bool) -> bytes:
        """
        The head of *call*.

        Args:
            keep: The connection is not to be closed behind the answer.

        Raises:
            ValueError: It holds a character that it must not.
        """
        route, withheld = call.route, self._withheld
        query = f"?{call.query}" if call.query else ""
        first = f"{route.method} {self._prefix}{route.path}{query} HTTP/1.1"
        lines = [first, *self._own]
        for name, value in call.headers:
            if name.lower() not in withheld:
                lines.append(f"{name}: {value}")
        if not keep:
            lines.append("Connection: close")
        lines.append(f"Content-Length: {len(call.body)}\r\n\r\n")
        head = "\r\n".join(lines).encode("utf-8", "surrogateescape")
        # Counting the control characters finds any that is not one of our line ends.
        clean = head.translate(None, _CONTROLS)
        if len(head) - len(clean) != 2 * len(lines) + 2 or first.count(" ") != 2:
            raise ValueError("a control character in the head of a request")
        return head
