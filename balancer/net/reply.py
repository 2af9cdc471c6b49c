"""
The client's side of an answer: its head, its records, heartbeats between them, its end.

Laws:
- A streaming call that has nothing to tell for a while is answered 200 and a heartbeat, a record
  that says nothing; proxies and clients hang up on silence. It commits nothing: attempts go on.
- Once the head is out, whatever brought it out, every end is told inside the stream.
- A heartbeat stands between records: never inside one, never behind the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from balancer.core.dialect import heartbeat, retold, trailer
from balancer.core.dispatch import Answer
from balancer.core.domain import Call, Framing
from balancer.core.errors import BalancerError, CutStream
from balancer.net.attempt import framing_of
from balancer.net.listener import Reader
from balancer.net.server import Exchange, outcome_of

CONTENT_TYPES: Final = {
    Framing.NDJSON: "application/x-ndjson",
    Framing.SSE: "text/event-stream",
}
EARLY_S: Final = 0.25  # half of the time between two ticks
ENDS: Final = {Framing.NDJSON: b"\n", Framing.SSE: b"\n\n"}


class Writer(Reader, Protocol):
    """Whoever passes an answer on, past its `Reply`."""

    def may_beat(self) -> bool:
        """Whether a record of ours may stand here."""

    def moved_at(self) -> float:
        """When it last wrote."""


class Reply:
    """
    The answer to one call, as far as it has got.

    Args:
        after_s: Silence before the first heartbeat, which brings the head out; None: it waits for
            the answer.
        every_s: Silence before each further one; None: there is none.
        stamp: The wall time as Ollama writes it.

    Attributes:
        begun: The head is out.
        ended: Nothing more will be written.
    """

    __slots__ = (
        "_after_s",
        "_call",
        "_clock",
        "_every_s",
        "_exchange",
        "_framing",
        "_outlet",
        "_quiet_since",
        "_stamp",
        "_writer",
        "begun",
        "ended",
    )

    def __init__(
        self,
        exchange: Exchange,
        call: Call,
        clock: Callable[[], float],
        stamp: Callable[[], str],
        *,
        after_s: float | None,
        every_s: float | None,
    ) -> None:
        self._exchange = exchange
        self._call = call
        self._clock = clock
        self._stamp = stamp
        self._after_s = math.inf if after_s is None else after_s
        self._every_s = math.inf if every_s is None else every_s
        self._quiet_since = exchange.started_at
        self._outlet = exchange.outlet
        self._framing = Framing.JSON  # of the stream
        self.begun = False
        self.ended = False
        self._writer: Writer | None = None

    # -- silence -------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Write a heartbeat if one is due; to be called about twice a second."""
        writer = self._writer
        if writer is not None:
            self._quiet_since = max(self._quiet_since, writer.moved_at())
        if (
            now >= self._quiet_since + self._after_s - EARLY_S
            and not self.ended
            and not self._outlet.is_held_up
            and (writer is None or writer.may_beat())
        ):
            record = heartbeat(self._call, self._stamp())
            if record is None:
                self._after_s = math.inf
                return
            kind = CONTENT_TYPES[self._call.framing]
            self.begin(self._exchange.headers() | {"Content-Type": kind})
            self.write(record)

    def take_over(self, writer: Writer) -> None:
        """From now on *writer* writes, all but heartbeats and ends."""
        self._writer = writer
        self._outlet.read_by(writer)

    def give_over(self) -> None:
        """Who took over has ended, or its client has left."""
        self._writer = None
        self.ended = True

    # -- writing -------------------------------------------------------------------------------

    def begin(self, headers: Mapping[str, str]) -> None:
        """Bring the head of a stream out, with all its headers, unless a heartbeat has done so."""
        if self.begun:
            return
        self.begun = True
        exchange = self._exchange
        exchange.status = 200
        self._framing = framing_of(headers.get("Content-Type", ""))
        fits = self._framing is self._call.framing  # else a heartbeat would be none
        self._after_s = self._every_s if fits else math.inf
        if self._framing is not Framing.JSON:
            headers = {**headers, "X-Accel-Buffering": "no"}
        self._outlet.begin(200, headers, None)

    def write(self, data: bytes) -> None:
        """Write whole records, or what need not be whole."""
        self._quiet_since = self._clock()
        self._outlet.write(data)

    # -- ends ----------------------------------------------------------------------------------

    def end(self, last: bytes = b"") -> None:
        """End the stream with *last*."""
        self.ended = True
        self._outlet.end(last)

    def abort(self) -> None:
        """Break the body off: the one way to say that it failed where no record fits."""
        self.ended = True
        self._outlet.abort()

    def refuse(self, error: BalancerError, number: int = 0) -> None:
        """Tell an error of ours where its status line would come too late."""
        exchange = self._exchange
        exchange.outcome = exchange.outcome or outcome_of(error)
        exchange.error = exchange.error or error.text
        told = exchange.told(error)
        record = trailer(told, exchange.dialect, self._framing, exchange.id, number)
        if record is None:
            self.abort()
        else:
            self.end(record)

    def answer(self, answer: Answer, headers: Mapping[str, str]) -> None:
        """
        Tell an answer that was collected whole: as it is, or inside a stream that has begun.

        Raises:
            CutStream: It does not fit there.
        """
        if not self.begun:
            self.begun = True
            self._exchange.status = answer.status
            self._outlet.begin(answer.status, headers, len(answer.body))
            self.end(answer.body)
            return
        kind, framing = framing_of(answer.content_type), self._framing
        if answer.status != 200:
            self.end(retold(answer.status, answer.body, self._exchange.dialect, framing))
            return
        body = answer.body.strip()
        if kind is Framing.JSON and framing is Framing.NDJSON:
            body = body.replace(b"\n", b" ")  # one document is one record; Ollama ends so at once
        else:
            self.check(kind)
        self.end(body + ENDS[framing])

    def check(self, framing: Framing) -> None:
        """
        Whether an answer so framed can still be told.

        Raises:
            CutStream: The head that is out has promised another kind.
        """
        if self.begun and framing is not self._framing:
            who = f"backend {self._exchange.backend}"
            raise CutStream(f"{who} sent one document where a stream was asked for")
