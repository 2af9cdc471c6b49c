"""
The progress watchdog: finds hangs that no status code shows.

A group is what runs on one model of one backend. It is suspect when calls there wait for their
first byte and none of its calls has moved for longer than any of the waiting ones may take. Before
anything is done about it, somebody must look whether a load explains the silence, and ask with a
canary.

After its first byte a call is bounded by the idle limit, not by this; it counts only as moving.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Container, Hashable
from dataclasses import dataclass, field
from typing import Final

CANARY_S: Final = 10.0
PROMPT_TOKENS_PER_S: Final = 25.0  # what a CPU reads
OUTPUT_TOKENS_PER_S: Final = 2.0  # what a CPU writes of a large model
PATIENT_S: Final = 1800.0  # of an answer that does not stream and has no limit
LEARNED_FACTOR: Final = 4.0
MIN_SAMPLES: Final = 8
MAX_SAMPLES: Final = 256


@dataclass(frozen=True, slots=True)
class Suspect:
    """
    A model on a backend where nothing moves.

    Args:
        others_move: Other models there do, so it is not the backend.
        excused: A call that may be silent for long runs there, and a canary may have to wait
            behind it: that it is not answered proves nothing.
    """

    backend: str
    model: str
    silent_s: float
    others_move: bool
    excused: bool = False


class Waits:
    """The times to first byte of one kind of call, of late."""

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=MAX_SAMPLES)
        self._p99_s: float | None = 0.0  # None: not known since the last sample

    def note(self, wait_s: float) -> None:
        """Fold one in."""
        self._samples.append(wait_s)
        self._p99_s = None

    @property
    def p99_s(self) -> float:
        """By nearest rank; 0 before the eighth. Sorted when asked for: samples come far oftener."""
        if self._p99_s is None:
            rank = math.ceil(0.99 * len(self._samples))
            few = len(self._samples) < MIN_SAMPLES
            self._p99_s = 0.0 if few else sorted(self._samples)[rank - 1]
        return self._p99_s


@dataclass(slots=True)
class _Running:
    """One call that runs."""

    place: tuple[str, str]  # backend, model
    kind: tuple[str, bool]  # model, streaming
    began_at: float
    slowest_s: float  # to the first byte, on a CPU
    patient: bool  # its whole answer is one silence, and nobody knows how long
    waits: bool = True


@dataclass(slots=True, eq=False)
class _Group:
    """The calls on one model of one backend. The instants are -inf for never."""

    calls: dict[Hashable, _Running] = field(default_factory=dict)
    moved_at: float = -math.inf
    cleared_at: float = -math.inf


class Watchdog:
    """
    Told of every call that begins, moves and ends; tells which groups are suspect.

    Args:
        first_byte_s: Silence and canary together, for short prompts; inf: suspects nobody.
    """

    def __init__(self, clock: Callable[[], float], first_byte_s: float = 30.0) -> None:
        self.first_byte_s = first_byte_s
        self._clock = clock
        self._calls: dict[Hashable, _Running] = {}
        self._groups: dict[tuple[str, str], _Group] = {}
        self._waits: dict[tuple[str, bool], Waits] = {}

    @property
    def silence_s(self) -> float:
        """The silence that makes suspect: leaves time for the canary, if there is any to leave."""
        return max(self.first_byte_s - CANARY_S, self.first_byte_s / 2)

    # -- what happens --------------------------------------------------------------------------

    def began(
        self,
        lease_id: Hashable,
        backend: str,
        model: str,
        prompt_tokens: int,
        streaming: bool,  # noqa: FBT001 - a fact of the call among others
        output_tokens: int | None,
    ) -> None:
        """
        A call was sent, to a model that is loaded.

        *output_tokens* is the most it may answer; None or negative: no limit; 0 where nothing is
        generated. It counts for a call that does not stream, which is silent for its whole answer.
        """
        place = (backend, model)
        group = self._groups.get(place)
        if group is None:
            group = self._groups[place] = _Group()
        slowest_s = prompt_tokens / PROMPT_TOKENS_PER_S
        patient = not streaming and (output_tokens is None or output_tokens < 0)
        if patient:
            slowest_s += PATIENT_S
        elif not streaming:
            slowest_s += (output_tokens or 0) / OUTPUT_TOKENS_PER_S
        kind = (model, streaming)
        call = _Running(place, kind, self._clock(), slowest_s, patient)
        self._calls[lease_id] = group.calls[lease_id] = call

    def moved(self, lease_id: Hashable) -> None:
        """Bytes came; what is not known, or has ended, is ignored."""
        call = self._calls.get(lease_id)
        if call is None:
            return
        now = self._clock()
        self._groups[call.place].moved_at = now
        if call.waits:
            call.waits = False
            waits = self._waits.get(call.kind)
            if waits is None:
                waits = self._waits[call.kind] = Waits()
            waits.note(now - call.began_at)

    def ended(self, lease_id: Hashable) -> None:
        """The call is over, however; a second time tells nothing."""
        call = self._calls.pop(lease_id, None)
        if call is None:
            return
        group = self._groups[call.place]
        del group.calls[lease_id]
        if not group.calls:
            del self._groups[call.place]

    def cleared(self, backend: str, model: str) -> None:
        """A canary was answered there, or a load was seen: its silence counts from now."""
        group = self._groups.get((backend, model))
        if group is not None:
            group.cleared_at = self._clock()

    def lost(self, backend: str, model: str) -> list[Hashable]:
        """
        The calls there that should have had a byte twice over.

        Asked after a canary was answered, or could not be because of a call that may be long:
        elsewhere they are served sooner, if they are served here at all.
        """
        now = self._clock()
        group = self._groups.get((backend, model))
        return [
            lease_id
            for lease_id, call in (group.calls.items() if group is not None else ())
            if call.waits and now - call.began_at >= 2 * self._allowance_s([call], down=False)
        ]

    # -- what follows --------------------------------------------------------------------------

    def suspects(self, now: float, down: Container[str] = ()) -> list[Suspect]:
        """
        The groups that are suspect now, each time anew until cleared, moved or ended.

        On backends in *down*, whose checks fail, silence has no other excuse than its shortness.
        """
        recent_s = self.silence_s / 2
        moving = {
            backend
            for (backend, _), group in self._groups.items()
            if now - group.moved_at <= recent_s
        }
        found = []
        for (backend, model), group in self._groups.items():
            all_waiting = [call for call in group.calls.values() if call.waits]
            patient = [call for call in all_waiting if call.patient]
            waiting = [call for call in all_waiting if not call.patient] or patient
            if not waiting:
                continue
            began_at = min(call.began_at for call in waiting)
            silent_s = now - max(began_at, group.moved_at, group.cleared_at)
            is_down = backend in down
            if silent_s >= self._allowance_s(waiting, down=is_down):
                excused = not is_down and any(self._longest_s(call) > silent_s for call in patient)
                found.append(Suspect(backend, model, silent_s, backend in moving, excused))
        return found

    def _allowance_s(self, waiting: list[_Running], *, down: bool) -> float:
        if down:
            return self.silence_s
        return max(self.silence_s, *(self._longest_s(call) for call in waiting))

    def _longest_s(self, call: _Running) -> float:
        """
        How long the call may take to its first byte.

        What was learned lengthens this and never shortens it: short answers and prompts say nothing
        of a long one, and on a backend with one slot the canary of a false alarm would wait behind
        the very call it asks about.
        """
        waits = self._waits.get(call.kind)
        learned_s = 0.0 if waits is None else LEARNED_FACTOR * waits.p99_s
        return max(call.slowest_s, learned_s)
