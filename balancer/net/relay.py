"""
A committed answer on its way to the client, from its first record to its end.

Laws:
- Bytes pass verbatim. Whole records are written as they come; an unfinished one is held, so that
  an error record of ours never follows half a record of the backend's.
- What a backend's socket brings is in the client's before the turn of the loop is over: no task
  and no future stand between. A client that is behind holds its backend back, and no other.
- No failure ends in silence: it is told in a record, or the body is broken off where none fits.
- The lease is settled once, by what was passed on: a client that leaves behind the last record
  has had all it wanted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from balancer.core import verdicts
from balancer.core.domain import OTHER, Dialect, Framing, Outcome, Usage, Verdict
from balancer.core.errors import CutStream
from balancer.core.framing import Ending, Splitter, splitter
from balancer.core.pool import Lease
from balancer.core.verdicts import Failure, Judgement
from balancer.net.attempt import Attempt
from balancer.net.reply import Reply
from balancer.net.server import Exchange

FINE: Final = Judgement(Verdict.OK)
STOPPED: Final = Judgement(Verdict.STOPPED, text="was stopped: the call's time limit has passed")
STOPPING: Final = Judgement(Verdict.STOPPED, text="was stopped: the balancer is stopping")


class Relay:
    """
    One committed answer.

    Args:
        outcome: Of the attempt, by a verdict and what the answer told of its usage.
        is_stopping: Whether a backend's connection that ends was ended by us.
        on_over: Called once, when all has been written that will be, or the client has left.
    """

    __slots__ = (
        "_attempt",
        "_chunks",
        "_exchange",
        "_is_stopping",
        "_lease",
        "_moved_at",
        "_on_over",
        "_outcome",
        "_outlet",
        "_passed_bytes",
        "_reply",
        "_run",
        "_split",
        "is_over",
    )

    def __init__(
        self,
        exchange: Exchange,
        reply: Reply,
        lease: Lease,
        attempt: Attempt,
        outcome: Callable[[Judgement, Usage], Outcome],
        is_stopping: Callable[[], bool],
        on_over: Callable[[], None],
    ) -> None:
        self._exchange = exchange
        self._reply = reply
        self._lease = lease
        self._attempt = attempt
        self._outcome = outcome
        self._is_stopping = is_stopping
        self._on_over = on_over
        framing = attempt.framing
        self._split: Splitter | None = None if framing is Framing.JSON else splitter(framing)
        self._outlet = exchange.outlet
        self._run = lease.run
        self._moved_at = 0.0
        self._chunks: asyncio.Transport | None = None
        self._passed_bytes = 0
        self.is_over = False

    def start(self, headers: Mapping[str, str]) -> None:
        """Commit: pass on what came so far, and from now on what comes."""
        reply, attempt = self._reply, self._attempt
        held = attempt.turn(self)  # which lets a backend go on that the next may hold back
        reply.take_over(self)
        reply.begin(headers)
        if self._split is not None and attempt.handle is not None:
            attempt.handle.pass_chunks(self)
        if held:
            attempt.received -= len(held)
            self.data(held)
        if attempt.is_over:
            self._over()

    # -- from the backend ----------------------------------------------------------------------

    def head(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        """It has come long ago."""

    def data(self, data: bytes) -> None:
        """Bytes of the answer: all that is done for each read."""
        self._attempt.received += len(data)
        split = self._split
        if split is not None:
            data = split.feed(data)
            self._run.records = split.records  # a read may bring many, or none
        if data and not self.is_over:
            self._outlet.write(data)
            self._chunks = self._outlet.chunks

    def chunk(self, data: bytes, lines: list[bytes]) -> None:
        """One chunk, framed as we would frame it: so it goes out, if it is one whole record."""
        split, transport = self._split, self._chunks
        if split is not None and transport is not None and split.passes(lines):
            self._run.records = split.records
            self._passed_bytes += len(data) - len(lines[0]) - 3
            if not transport.is_closing():
                transport.write(data)
        else:
            self.data(data[len(lines[0]) + 1 : -2])

    def end(self) -> None:
        """It is complete."""
        self._attempt.complete = True
        self._over()

    def fail(self, failure: Failure) -> None:
        """It is not, and will not be."""
        self._attempt.failure = failure
        self._over()

    def moved_at(self) -> float:
        """When the backend last sent anything; asked now and then, it tells the lease."""
        handle = self._attempt.handle
        at = 0.0 if handle is None else handle.moved_at()
        if at > self._moved_at:
            self._moved_at = at
            self._lease.moved(0)
        return self._moved_at

    def _over(self) -> None:
        """Nothing more will come: settle, and tell the client how it ended."""
        if self.is_over:
            return
        half = self._split is not None and self._split.mid_record
        judgement, ending, last = self._judge()
        self._settle(judgement, ending)
        self._finish(judgement, last, half=half)

    # -- from the client -----------------------------------------------------------------------

    def held_up(self) -> None:
        """It is behind: its backend has to wait."""
        if self._attempt.handle is not None:
            self._attempt.handle.pause()

    def caught_up(self) -> None:
        """It has taken nearly all."""
        if self._attempt.handle is not None:
            self._attempt.handle.resume()

    def lost(self) -> None:
        """It has left, or takes nothing, and was given up."""
        if self.is_over:
            return
        is_whole = self._break_off()
        exchange = self._exchange
        if is_whole:
            exchange.outcome, exchange.phase = "ok", ""
        else:
            exchange.outcome = "client_abort"
        self._end()

    def stop(self) -> None:
        """The call's time is up."""
        if self.is_over:
            return
        if self._break_off():
            self._exchange.outcome, self._exchange.phase = "ok", ""
            self._reply.end()
            self._end()
        else:
            half = self._split is None or self._split.mid_record
            self._finish(STOPPED, b"", half=half)

    def _break_off(self) -> bool:
        """Let the backend go. Whether the client has had all it wanted."""
        split = self._split
        is_whole = split is not None and split.finished
        if self._attempt.handle is not None:
            self._attempt.handle.abort()
        self._settle(
            Judgement(Verdict.OK if is_whole else Verdict.GONE),
            split.ending() if split is not None and is_whole else None,
        )
        return is_whole

    # -- ends ----------------------------------------------------------------------------------

    def may_beat(self) -> bool:
        """Whether the client has only whole records, and not the last of them."""
        split = self._split
        return split is not None and not split.mid_record and not split.finished

    def _judge(self) -> tuple[Judgement, Ending | None, bytes]:
        """Of the end: the verdict, what it told, and the bytes still held."""
        attempt, split = self._attempt, self._split
        is_whole = split is not None and split.finished
        if attempt.failure is not None and not is_whole:
            if self._is_stopping():
                return STOPPING, None, b""
            received = attempt.received
            judged = verdicts.of_failure(attempt.failure, committed=True, received=received)
            return judged, None, b""
        if split is None:
            return FINE, None, b""
        last = split.flush()
        ending = split.ending()
        if ending.error_record is not None:
            judged = verdicts.of_record(ending.error_text, remote=self._lease.remote)
            return judged, ending, last
        if not ending.complete and self._lease.call.route.operation != OTHER:
            text = "ended its answer without the terminal record"
            return Judgement(Verdict.UNFINISHED, text=text), ending, last
        return FINE, ending, last

    def _settle(self, judgement: Judgement, ending: Ending | None) -> None:
        usage = ending.usage if ending is not None else Usage()
        self._exchange.usage = usage
        blank = ending is not None and ending.blank_model
        self._attempt.received += self._passed_bytes
        self._outlet.passed_bytes = self._passed_bytes
        outcome = self._outcome(judgement, usage)
        self._lease.settle(replace(outcome, committed=True, blank_model=blank))

    def _finish(self, judgement: Judgement, last: bytes, *, half: bool) -> None:
        """
        Write what is left, and an error record where the end would look like success.

        Args:
            last: What is still held.
            half: Part of an unfinished record was passed on.
        """
        exchange, split, verdict = self._exchange, self._split, judgement.verdict
        cut = verdict in (Verdict.BROKEN, Verdict.STALLED, Verdict.STOPPED)
        silent = verdict is Verdict.UNFINISHED and exchange.dialect is not Dialect.OLLAMA
        stopped = "shed" if self._is_stopping() else "timeout"
        if verdict is not Verdict.OK:
            exchange.outcome = stopped if verdict is Verdict.STOPPED else "upstream_error"
            exchange.error = judgement.text
        if not cut and not silent:
            self._reply.end(last)
        elif split is None or half:
            self._reply.abort()  # no record fits behind half a one
        else:
            who = "the answer" if verdict is Verdict.STOPPED else f"backend {exchange.backend}"
            self._reply.refuse(CutStream(f"{who} {judgement.text}"), split.records)
        self._end()

    def _end(self) -> None:
        self.is_over = True
        self._chunks = self._outlet.chunks = None
        self._reply.give_over()
        self._on_over()


def resolving(future: asyncio.Future[None]) -> Callable[[], None]:
    """For whoever waits for the end in a task."""
    return lambda: None if future.done() else future.set_result(None)
