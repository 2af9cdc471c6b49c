"""
What runs on one backend, as the plan counts it, and what it teaches about speed.

Laws:
- Every run is entered once and struck out once; what is waited for is summed anew from what is
  there, so that nothing drifts.
- Only clean samples teach: of a resident model, with no other prompt beside it, while the backend
  is not slow. What streams told is compared with how many streams there were, averaged over time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from balancer.core.catalog import InMemory
from balancer.core.cost import FIXED_PREFILL_S
from balancer.core.domain import Call, Outcome, PlacementKey, Usage, Verdict
from balancer.core.running import Run
from balancer.core.speeds import Size, Speed, work

LEAST_PROMPT: Final = 64
LEAST_ANSWER: Final = 8
LEAST_PROMPT_S: Final = 0.02
LEAST_DECODE_S: Final = 0.05
LEAST_WAIT_S: Final = 0.1  # of one that came sooner, too much is the network's
CLEAN: Final = 0.7  # a backend slower than that against itself teaches nothing
OVERDUE: Final = 3.0
LEAST_EXPECTED: Final = 8.0  # tokens
KEPT_PACE: Final = 0.8  # of what was counted, from one look to the next


@dataclass(slots=True, eq=False)
class Track:
    """
    A call that runs, with what was predicted of it.

    Args:
        at: When it was committed.
        prompt: Tokens to be read, as estimated; what is too long for the context is cut off.
        cached: Of these in the cache, as far as we know.
        prefill_s: Predicted reading.
        first_token_s: Predicted time to the first token.
        answer: Tokens expected.
        share: Of the accelerator, at commit.
        clean: Nothing else was being read when it came, and the model was in memory.
        run: What the pool tells of it, as soon as it was granted.
        charged: Tokens of its prompt that its owner was charged, before anybody knew where it goes.
    """

    call: Call
    at: float
    size: Size
    prompt: float
    cached: float
    prefill_s: float
    first_token_s: float
    answer: float
    share: float
    clean: bool
    run: Run | None = None
    probing: bool = False
    decoding: bool = False
    first_at: float = math.inf
    virtual: float = 0.0  # tokens so far, of one that does not stream
    seen: int = 0  # records at the last look
    stream_s: float = 0.0  # of the ledger's sums, when it began to decode
    share_s: float = 0.0
    reading_s: float = 0.0
    charged: float = 0.0

    @property
    def model(self) -> str:
        """What it runs."""
        return self.call.key.model

    @property
    def reads(self) -> bool:
        """Whether its prompt is still being read, or waits for that."""
        return not self.decoding

    @property
    def records(self) -> int:
        """That came so far."""
        return 0 if self.run is None else self.run.records

    def written(self, usage: Usage) -> int | None:
        """Tokens of its answer, now that it has ended well; None: nobody can tell."""
        if usage.tokens_out is None and self.call.streaming and self.decoding:
            return max(0, self.records - 1)  # one for each token, and one that says it was the last
        return usage.tokens_out

    def read_s(self, usage: Usage) -> float | None:
        """How long its prompt was read; None: nobody can tell."""
        if usage.prompt_s is not None:
            return usage.prompt_s
        if self.run is None or self.run.first_at is None or not self.call.streaming:
            return None
        read_s = self.run.first_at - self.run.at - FIXED_PREFILL_S
        return read_s if read_s >= LEAST_WAIT_S else None


@dataclass(slots=True)
class _Sums:
    """Over time: streams, share of the accelerator; of one model."""

    stream_s: float = 0.0
    share_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Drain:
    """No calls of *victim* are planned here until *wanted* is loaded in its place."""

    victim: str
    wanted: PlacementKey
    since: float
    until: float


@dataclass(slots=True, eq=False)
class Ledger:
    """One backend's. Calls are known by their identity: each runs at one place at a time."""

    name: str
    speed: Speed
    edition: int = 0
    shape: int = 0  # another one whenever what is idle, in memory or to be loaded is another
    changes: int = 0  # another one whenever it is, but for calls that come and go
    models: dict[str, dict[int, Track]] = field(default_factory=dict)
    drain: Drain | None = None
    asked_load: PlacementKey | None = None  # a load was asked for and is not seen yet
    going: frozenset[str] = frozenset()  # models that are unloaded for it: nothing goes there
    expected: tuple[str, tuple[InMemory, ...]] | None = None  # a load's model, and what stays
    failed: dict[PlacementKey, float] = field(default_factory=dict)  # not to be loaded until then
    rests_until: float = -math.inf  # no drain before, as the last one came to nothing
    loaded_at: dict[str, float] = field(default_factory=dict)
    last_used: dict[str, float] = field(default_factory=dict)
    first_byte_at: dict[str, float] = field(default_factory=dict)
    at: float = 0.0
    reading_s: float = 0.0  # time in which any prompt was being read
    _reading_seen: float = 0.0
    _paces: dict[str, tuple[float, float]] = field(default_factory=dict)
    _sums: dict[str, _Sums] = field(default_factory=dict)

    def moved(self) -> None:
        """Prices here are out of date, and what there is room for."""
        self.edition += 1
        self.shape += 1
        self.changes += 1

    # -- what is there -------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether nothing of ours runs here."""
        return not self.models

    @property
    def is_reading(self) -> bool:
        """Whether a prompt of ours is being read here, or waits for that."""
        for tracks in self.models.values():
            for track in tracks.values():
                if not track.decoding:
                    return True
        return False

    def tracks(self) -> Iterator[Track]:
        """All calls here."""
        for tracks in self.models.values():
            yield from tracks.values()

    def in_flight(self, model: str) -> int:
        """Our calls on the model."""
        tracks = self.models.get(model)
        return 0 if tracks is None else len(tracks)

    def on(self, model: str) -> Iterable[Track]:
        """They themselves, in the order they came."""
        return self.models.get(model, {}).values()

    def is_busy(self, model: str) -> bool:
        """Whether any call of ours is on it."""
        return model in self.models

    def has_failed(self, key: PlacementKey, now: float) -> bool:
        """Whether a load of it failed here lately: for nobody it is not repeated yet."""
        return self.failed.get(key, -math.inf) > now

    def streams(self, model: str) -> int:
        """Our streams of one model."""
        return sum(track.decoding for track in self.on(model))

    def shown(self, model: str) -> int:
        """Of these, those whose first byte was seen."""
        return sum(track.decoding and track.call.streaming for track in self.on(model))

    def look(self, model: str, now: float) -> tuple[float, int, int]:
        """
        Backlog in seconds, streams of all models, and the share, seen from one model.

        The backlog is the reading that is still to be done, of calls that have no first byte. The
        share is 1, and one more for each other model that streams.
        """
        backlog_s, oldest, first_s = 0.0, math.inf, 0.0
        decoding, share = 0, 1
        for other, tracks in self.models.items():
            streams = 0
            for track in tracks.values():
                if track.decoding:
                    streams += 1
                else:
                    backlog_s += track.prefill_s
                    if track.at < oldest:
                        oldest, first_s = track.at, track.prefill_s
            decoding += streams
            if streams and other != model:
                share += 1
        if backlog_s and now > oldest:  # the first of them has been read in part
            backlog_s -= min(now - oldest, 0.9 * first_s)
        return backlog_s, decoding, share

    # -- what happens --------------------------------------------------------------------------

    def enter(self, track: Track, now: float) -> None:
        """A call begins."""
        self._advance(now)
        tracks = self.models.get(track.model)
        if tracks is None:
            tracks = self.models[track.model] = {}
            self.shape += 1
        tracks[id(track.call)] = track
        self.edition += 1

    def first_byte(self, track: Track, now: float) -> None:
        """It decodes from now on."""
        self.first_byte_at[track.model] = now
        if not track.decoding:
            self._advance(now)
            self._decode(track, now)

    def _decode(self, track: Track, at: float) -> None:
        sums = self._sums.setdefault(track.model, _Sums())
        track.stream_s, track.share_s = sums.stream_s, sums.share_s
        track.reading_s, track.first_at = self.reading_s, at
        track.decoding = True
        track.seen = track.records
        self.edition += 1

    def strike(self, track: Track, now: float) -> None:
        """It ended; one that is not here is no mistake."""
        self._advance(now)
        tracks = self.models.get(track.model)
        if tracks is None or tracks.pop(id(track.call), None) is None:
            return
        self.last_used[track.model] = now
        if not tracks:
            del self.models[track.model]
            self._paces.pop(track.model, None)
            self.shape += 1
            for known in (self.last_used, self.first_byte_at, self.loaded_at):
                if len(known) > 256:
                    known.clear()
        self.edition += 1

    def _advance(self, now: float) -> None:
        """Carry the sums on to *now*."""
        passed_s = now - self.at
        self.at = now
        if passed_s <= 0.0 or not self.models:
            return
        reading = False
        streaming: list[tuple[str, int]] = []
        for model, tracks in self.models.items():
            streams = 0
            for track in tracks.values():
                if track.decoding:
                    streams += 1
            if streams:
                streaming.append((model, streams))
            if streams < len(tracks):
                reading = True
        if reading:
            self.reading_s += passed_s
        for model, streams in streaming:
            sums = self._sums.get(model)
            if sums is None:
                sums = self._sums[model] = _Sums()
            sums.stream_s += passed_s * streams
            sums.share_s += passed_s * len(streaming)

    # -- what it teaches -----------------------------------------------------------------------

    def learn(self, track: Track, outcome: Outcome, now: float) -> None:
        """Fold the figures of a call that ended, and is not yet struck out, in."""
        if outcome.verdict is not Verdict.OK or self.speed.slow_factor < CLEAN:
            return
        self._advance(now)
        usage = outcome.usage
        tokens, read_s = usage.tokens_in or track.prompt, track.read_s(usage)
        if (
            track.clean
            and read_s is not None
            and tokens >= LEAST_PROMPT
            and read_s > LEAST_PROMPT_S
            and track.cached < 0.1 * max(1.0, track.prompt)
        ):
            self.speed.learn_prompt(track.model, track.size, work(tokens, 0) / read_s * track.share)
        written = track.written(usage)
        if written is not None and written > LEAST_ANSWER and track.decoding:
            self._learn_decode(track, written, usage.decode_s, now)

    def _learn_decode(self, track: Track, written: int, decode_s: float | None, now: float) -> None:
        span_s = now - track.first_at
        whole_s = span_s
        if not track.call.streaming:
            if decode_s is None:
                return
            whole_s = decode_s
        sums = self._sums.get(track.model)
        if sums is None or span_s <= 0.0 or whole_s <= 0.0:
            return
        beside_s = (self.reading_s - track.reading_s) * whole_s / span_s
        free_s = whole_s - beside_s
        if free_s <= max(0.3 * whole_s, LEAST_DECODE_S):
            return
        streams = max(1.0, (sums.stream_s - track.stream_s) / span_s)
        share = max(1.0, (sums.share_s - track.share_s) / span_s)
        self.speed.learn_decode(track.model, track.size, (written - 1) / free_s * share, streams)

    def rest(self, now: float) -> None:
        """Nobody looked for a while: what was seen last says nothing of now."""
        self._advance(now)
        self._reading_seen = self.reading_s
        self._paces.clear()
        for track in self.tracks():
            track.seen = track.records

    def watch(self, now: float, window_s: float, *, loading: bool) -> None:
        """Look how quick it is today against what is known of it; once a tick."""
        self._advance(now)
        reading_s = min(window_s, self.reading_s - self._reading_seen)
        self._reading_seen = self.reading_s
        self._carry_on(now)
        seen = [
            self._quickness(model, tracks.values(), now, window_s, reading_s)
            for model, tracks in self.models.items()
        ]
        if not self.speed.is_measured:  # there is nothing yet that it could be slower than
            self._suppose(now, loading=loading)
            return
        if not loading:
            seen += [_lateness(track, now) for track in self.tracks() if not track.decoding]
        told = [ratio for ratio in seen if ratio is not None]
        if not told and self.models:
            return  # nothing to go by is not the same as idle
        before = self.speed.edition
        self.speed.observe(min(told, default=None), now)
        if self.speed.edition != before:
            self.edition += 1

    def _suppose(self, now: float, *, loading: bool) -> None:
        """A first prompt that takes long shows that it was guessed wrong, before it has ended."""
        before = self.speed.edition
        for track in self.tracks():
            if track.decoding or loading or not track.clean:
                continue
            if _lateness(track, now) is not None:
                rate = work(track.prompt, 0) / (now - track.at) * track.share
                self.speed.suppose_prompt(track.model, track.size, rate)
        if self.speed.edition != before:
            self.edition += 1

    def _carry_on(self, now: float) -> None:
        """Calls that do not stream show nothing: assume that they go as predicted."""
        for track in self.tracks():
            if track.call.streaming or track.call.embedding:
                continue
            due = track.at + track.first_token_s
            if track.decoding:
                per_token_s = self.speed.tpot(track.model, track.size, self.streams(track.model))
                track.virtual = (now - track.first_at) / per_token_s
            elif now >= due:
                self._decode(track, now)

    def _quickness(
        self,
        model: str,
        tracks: Iterable[Track],
        now: float,
        window_s: float,
        reading_s: float,
    ) -> float | None:
        """Tokens that came against those expected, at most 1; None: too little to tell."""
        streams = [t for t in tracks if t.decoding]
        progress, streamed_s = 0, 0.0
        for track in streams:
            records = track.records
            # A stream that has just begun owes a burst that is still under way.
            if track.call.streaming and now - track.first_at >= window_s:
                progress += records - track.seen
                streamed_s += window_s
            track.seen = records
        if not streams or reading_s > 0.6 * window_s:
            return None
        size, speed = streams[0].size, self.speed
        usual_s = speed.tpot(model, size, len(streams)) * speed.slow_factor
        share = self.look(model, now)[2]
        expected = streamed_s * (1.0 - reading_s / window_s) / (usual_s * share)
        # Tokens come in bursts: what one window lacks the next one brings.
        before = self._paces.get(model, (0.0, 0.0))
        pace = (KEPT_PACE * before[0] + progress, KEPT_PACE * before[1] + expected)
        self._paces[model] = pace
        return min(1.0, pace[0] / pace[1]) if pace[1] >= LEAST_EXPECTED else None


def _lateness(track: Track, now: float) -> float | None:
    """How much later than predicted a first token is, as a quickness; None: it is not."""
    elapsed_s = now - track.at
    if track.decoding or not track.call.streaming:
        return None
    is_late = elapsed_s > OVERDUE * (track.first_token_s + 0.5)
    return track.first_token_s / elapsed_s if is_late else None
