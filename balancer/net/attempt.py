"""
One try's answer, held until it can be judged, then handed on as it comes.

An attempt is the sink of one transaction. Until it is judged it collects: a stream up to its first
record that commits, a whole answer up to its end. Then whoever relays takes what is there, and
becomes the sink itself; if that is late, the backend is paused at 64 KiB.
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
_JSON, _NDJSON, _SSE = Framing.JSON, Framing.NDJSON, Framing.SSE  # each lookup of one is dear


class Attempt:
    """
    The sink of one transaction.

    Attributes:
        status, headers, content_type: Of the backend's head; status 0 before it.
        framing: How the body is framed, by its content type.
        opened: How a stream began, once known.
        failure: The transport's failure, if it failed.
        revoked: Why the pool took the backend away, if it did.
        received: Bytes of body so far.
        complete: The body ended cleanly.
        sent_at, head_at, first_byte_at: Monotonic seconds.
    """

    status = 0
    headers: Sequence[tuple[str, str]] = ()
    content_type = ""
    framing = Framing.JSON
    opened: Opened | None = None
    failure: Failure | None = None
    revoked: Judgement | None = None
    received = 0
    complete = False
    handle: Handle | None = None
    head_at: float | None = None
    first_byte_at: float | None = None
    _decided = False
    _on_decided: Callable[[], None] | None = None
    _held = 0
    _opening: Opening | None = None
    _paused = False

    def __init__(self, call: Call, lease: Lease, clock: Callable[[], float]) -> None:
        self._call = call
        self._lease = lease
        self._clock = clock
        self._parts: list[bytes] = []
        self.sent_at = clock()
        lease.on_revoke = self._revoke

    # -- the sink ------------------------------------------------------------------------------

    def head(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        """The answer's head."""
        self.status, self.headers = status, headers
        self.head_at = self._clock()
        for name, value in headers:
            if name.lower() == "content-type":
                self.content_type = value
                break
        framing = self.framing = framing_of(self.content_type)
        if status == 200 and framing is not _JSON:
            self._opening = Opening(framing, self._call.route.dialect)

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

    def abort(self) -> None:
        """Nobody waits for it any more; its connection is closed, if it has one."""
        self._lease.on_revoke = self._on_decided = None
        if self.handle is not None:
            self.handle.abort()

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
            self._lease.on_revoke = None  # there is nothing left to give up
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
        return _NDJSON
    return _SSE if content_type.startswith("text/event-stream") else _JSON
