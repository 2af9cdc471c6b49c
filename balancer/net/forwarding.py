"""
Which of a client's headers go up to a backend, and what is added.
"""

from __future__ import annotations

from typing import Final

from balancer.net.server import Exchange

# Hop-by-hop, ours to set, or credentials: none of these goes up.
WITHHELD: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
        "content-encoding",
        "expect",
        "host",
        "origin",
        "access-control-request-method",
        "access-control-request-headers",
        "cookie",
        "authorization",
        "x-api-key",
        "api-key",
        "x-goog-api-key",
        "x-auth-token",
        # The address as it was asked for may hold a key in its path.
        "referer",
        "x-original-uri",
        "x-original-url",
        "x-rewrite-url",
        "x-envoy-original-path",
        "forwarded",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-proto",
        "x-forwarded-prefix",
        "x-real-ip",
        "accept-encoding",
        "via",
        "x-request-id",
        "x-balancer-priority",  # what it may claim is settled here
        "x-request-timeout",
        "request-timeout",
    }
)
# Web servers in front put identities and tokens into these.
_FOREIGN: Final = ("x-forwarded-", "x-auth-request-")
_USUAL: Final = frozenset({"", "keep-alive", "close"})


class Forwarding:
    """
    Headers for backends.

    Args:
        token: Ours in ``Via``.
    """

    def __init__(self, token: str) -> None:
        self._via = f"1.1 {token}"

    def __call__(self, exchange: Exchange) -> tuple[tuple[str, str], ...]:
        """The client's headers that go up, and ours."""
        return (*self.kept(exchange), ("X-Request-Id", exchange.id))

    def kept(self, exchange: Exchange) -> tuple[tuple[str, str], ...]:
        """The same but for what differs from one request to the next."""
        headers = exchange.request.headers
        lines = ",".join(headers.getall("Connection", ())).lower()
        named = () if lines in _USUAL else {name.strip() for name in lines.split(",")}
        kept = [
            (name, value)
            for name, value in headers.items()
            if not _is_withheld(low := name.lower()) and low not in named
        ]
        # Behind the others: two balancers in a circle must each see that they were there.
        via = ", ".join([*headers.getall("Via", []), self._via])
        kept += (
            ("Accept-Encoding", "identity"),
            ("X-Forwarded-For", exchange.client),
            ("Via", via),
        )
        return tuple(kept)


def _is_withheld(name: str) -> bool:
    """Whether a header, by its name in small letters, stays here."""
    return name in WITHHELD or name.startswith(_FOREIGN)
