"""
A committed answer on its way to the client, from its first record to its end.

Laws:
- Bytes pass verbatim. Whole records are written as they come; an unfinished one is held, so that
  an error record of ours never follows half a record of the backend's.
- No failure ends in silence: it is told in a record, or the body is broken off where none fits.
- The lease is settled once, by what was passed on: a client that leaves behind the last record
  has had all it wanted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from aiohttp import web

from balancer.core import verdicts
from balancer.core.domain import OTHER, Dialect, Framing, Outcome, Usage, Verdict
from balancer.core.errors import CutStream
from balancer.core.framing import Ending, Splitter, splitter
from balancer.core.pool import Lease
from balancer.core.verdicts import Judgement
from balancer.net.attempt import Attempt
from balancer.net.reply import Reply
from balancer.net.server import Exchange

STOPPED: Final = Judgement(Verdict.STOPPED, text="was stopped: the call's time limit has passed")
STOPPING: Final = Judgement(Verdict.STOPPED, text="was stopped: the balancer is stopping")


class Relay:
    """
    One committed answer.

    Args:
        limit: The call's time limit.
        outcome: Of the attempt, by a verdict and what the answer told of its usage.
        is_stopping: Whether a backend's connection that ends was ended by us.
    """

    def __init__(
        self,
        exchange: Exchange,
        reply: Reply,
        lease: Lease,
        attempt: Attempt,
        limit: asyncio.Timeout,
        outcome: Callable[[Judgement, Usage], Outcome],
        is_stopping: Callable[[], bool],
    ) -> None:
        self._exchange = exchange
        self._reply = reply
        self._lease = lease
        self._attempt = attempt
        self._limit = limit
        self._outcome = outcome
        self._is_stopping = is_stopping
        framing = attempt.framing
        self._split: Splitter | None = None if framing is Framing.JSON else splitter(framing)
        self._settled = False

    async def run(self, headers: Mapping[str, str]) -> web.StreamResponse:
        """Pass it on until it ends, its client leaves, or its time is up."""
        try:
            await self._reply.begin(headers)
            await self._pass_on()
            half = self._split is not None and self._split.mid_record
            judgement, ending, last = self._judge()
            self._settle(judgement, ending)
            return await self._finish(judgement, last, half=half)
        except (asyncio.CancelledError, ConnectionError) as error:
            return await self._break_off(error)

    async def _pass_on(self) -> None:
        attempt, split = self._attempt, self._split
        if split is not None:
            self._reply.rousing(attempt.rouse)
        while True:
            data = attempt.take()
            if data:
                out = data if split is None else split.feed(data)
                if out:
                    await self._reply.write(out)
            elif attempt.is_over:
                return
            else:
                if split is not None and not split.mid_record and not split.finished:
                    await self._reply.beat()
                await attempt.more()

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
            return Judgement(Verdict.OK), None, b""
        last = split.flush()
        ending = split.ending()
        if ending.error_record is not None:
            judged = verdicts.of_record(ending.error_text, remote=self._lease.remote)
            return judged, ending, last
        if not ending.complete and self._lease.call.route.operation != OTHER:
            text = "ended its answer without the terminal record"
            return Judgement(Verdict.UNFINISHED, text=text), ending, last
        return Judgement(Verdict.OK), ending, last

    def _settle(self, judgement: Judgement, ending: Ending | None) -> None:
        if self._settled:
            return
        self._settled = True
        usage = ending.usage if ending is not None else Usage()
        self._exchange.usage = usage
        blank = ending is not None and ending.blank_model
        outcome = self._outcome(judgement, usage)
        self._lease.settle(replace(outcome, committed=True, blank_model=blank))

    async def _break_off(self, error: BaseException) -> web.StreamResponse:
        """The client has left or takes nothing, or the time is up: *error* tells which."""
        exchange, split = self._exchange, self._split
        is_whole = split is not None and split.finished
        if self._attempt.handle is not None:
            self._attempt.handle.abort()
        self._settle(
            Judgement(Verdict.OK if is_whole else Verdict.GONE),
            split.ending() if split is not None and is_whole else None,
        )
        if is_whole:
            exchange.outcome, exchange.phase = "ok", ""
        elif isinstance(error, asyncio.CancelledError):
            if self._limit.expired():
                half = split is None or split.mid_record
                return await self._finish(STOPPED, b"", half=half)
            raise error
        else:
            exchange.outcome = "client_abort"
        return await self._reply.end()

    async def _finish(self, judgement: Judgement, last: bytes, *, half: bool) -> web.StreamResponse:
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
            return await self._reply.end(last)
        if split is None or half:
            return self._reply.abort()  # no record fits behind half a one
        who = "the answer" if verdict is Verdict.STOPPED else f"backend {exchange.backend}"
        return await self._reply.refuse(CutStream(f"{who} {judgement.text}"), split.records)
