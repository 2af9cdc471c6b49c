"""
One try's answer, held until it can be judged, then handed on as it comes.

An attempt is the sink of one exchange. Until it is judged it collects: a stream up to its first
record that commits, a whole answer up to its end. After that whoever relays takes what is there
and waits for more; past 64 KiB not yet taken, the backend is paused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from balancer.core.domain import Call, Framing
from balancer.core.framing import Opened, Opening
from balancer.core.pool import Lease
from balancer.core.verdicts import Failure, Judgement
from balancer.net.upstream import Handle, Sink

HOLD_WHOLE: Final = 8 * 1024 * 1024  # larger answers commit and stream on
HOLD_ERROR: Final = 1024 * 1024
HIGH_WATER: Final = 64 * 1024


class Attempt:
    """
    The sink of one exchange.

    Attributes:
        status, headers, content_type: Of the backend's head; status 0 before it.
        framing: How the body is framed, by its content type.
        opened: How a stream began, once known.
        failure: The transport's failure, if it failed.
        revoked: Why the pool took the backend away, if it did.
        received: Bytes of body so far.
        complete: The body ended cleanly.
    """

    __slots__ = (
        "_call",
        "_clock",
        "_decided",
        "_held",
        "_lease",
        "_on_decided",
        "_opening",
        "_parts",
        "_paused",
        "complete",
        "content_type",
        "failure",
        "first_byte_at",
        "framing",
        "handle",
        "head_at",
        "headers",
        "opened",
        "received",
        "revoked",
        "sent_at",
        "status",
    )

    def __init__(self, call: Call, lease: Lease, clock: Callable[[], float]) -> None:
        self._call = call
        self._lease = lease
        self._clock = clock
        self._decided = False
        self._on_decided: Callable[[], None] | None = None
        self._parts: list[bytes] = []
        self._held = 0
        self._opening: Opening | None = None
        self._paused = False
        self.handle: Handle | None = None
        self.status = 0
        self.headers: Sequence[tuple[str, str]] = ()
        self.content_type = ""
        self.framing = Framing.JSON
        self.opened: Opened | None = None
        self.failure: Failure | None = None
        self.revoked: Judgement | None = None
        self.received = 0
        self.complete = False
        self.sent_at = clock()
        self.head_at: float | None = None
        self.first_byte_at: float | None = None
        lease.on_revoke = self._revoke

    # -- the sink ------------------------------------------------------------------------------

    def head(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        """The answer's head."""
        self.status, self.headers = status, headers
        self.head_at = self._clock()
        self.content_type = next((v for k, v in headers if k.lower() == "content-type"), "")
        self.framing = framing_of(self.content_type)
        if status == 200 and self.framing is not Framing.JSON:
            self._opening = Opening(self.framing, self._call.route.dialect)

    def data(self, data: bytes) -> None:
        """Bytes of the body."""
        self.received += len(data)
        self._lease.moved()
        if self.first_byte_at is None:
            self.first_byte_at = self._clock()
        self._parts.append(data)
        self._held += len(data)
        if self._decided:
            if self._held > HIGH_WATER and not self._paused and self.handle is not None:
                self._paused = True
                self.handle.pause()
        elif self._opening is not None:
            self._open(self._opening.feed(data))
        elif self._held > (HOLD_WHOLE if self.status == 200 else HOLD_ERROR):
            self._decide()

    def end(self) -> None:
        """The body is complete."""
        self.complete = True
        if self._opening is not None and self.opened is None:
            self._open(self._opening.end())
        self._decide()

    def fail(self, failure: Failure) -> None:
        """The transport failed."""
        self.failure = failure
        self._decide()

    # -- the holder ----------------------------------------------------------------------------

    def then(self, on_decided: Callable[[], None]) -> None:
        """Call once the answer can be judged; from then on the attributes tell what it is."""
        if self._decided:
            on_decided()
        else:
            self._on_decided = on_decided

    async def first(self) -> None:
        """Wait for that."""
        if not self._decided:
            decided = asyncio.get_running_loop().create_future()
            self._on_decided = partial(_resolve, decided)
            await decided

    def turn(self, sink: Sink) -> bytes:
        """Let all that comes from now on go to *sink*; what came so far."""
        if self.handle is not None:
            self.handle.turn(sink)
        if self._paused and self.handle is not None:
            self._paused = False
            self.handle.resume()
        return self.take()

    def take(self) -> bytes:
        """What came and was not taken yet; empty: nothing."""
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._held = 0
        return data

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.complete or self.failure is not None or self.revoked is not None

    @property
    def begun(self) -> bool:
        """Whether this is an answer to pass on as it comes."""
        if self.status != 200 or self.revoked is not None:
            return False
        if self._opening is not None:
            return self.opened is not None and self.opened.kind == "commit"
        return not self.is_over

    def _open(self, opened: Opened | None) -> None:
        if opened is not None:
            self.opened = opened
            self._decide()

    def _decide(self) -> None:
        if not self._decided:
            self._decided = True
            on_decided, self._on_decided = self._on_decided, None
            if on_decided is not None:
                on_decided()

    def _revoke(self, judgement: Judgement) -> None:
        """The pool gave up on this backend before a byte came."""
        self.revoked = judgement
        if self.handle is not None:
            self.handle.abort()
        self._decide()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def framing_of(content_type: str) -> Framing:
    """How a body of that content type is framed."""
    if content_type.startswith("application/x-ndjson"):
        return Framing.NDJSON
    return Framing.SSE if content_type.startswith("text/event-stream") else Framing.JSON
