"""
The books: what the plan knows of backends, models and calls, and how it learns it.

Laws:
- Facts go in, and what was seen at each tick; nothing is decided here.
- Whatever a price rests on moves its ledger's edition; what room rests on, its shape as well.
- The tables are changed, never exchanged: others hold on to them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median_high
from typing import Any, Final, NamedTuple

from balancer.core import names
from balancer.core.catalog import InMemory
from balancer.core.cost import Need
from balancer.core.decisions import Choice, Decisions
from balancer.core.demand import Demand
from balancer.core.domain import Backend, Call, Outcome, PlacementKey, Purpose, Residency, Verdict
from balancer.core.events import SampleDiscarded, SlotsBelieved, Straggling
from balancer.core.keeping import Keeping
from balancer.core.knobs import Knobs
from balancer.core.ledger import Ledger, Track
from balancer.core.lengths import Lengths
from balancer.core.prefix import Prefixes
from balancer.core.room import DEFAULT_CONTEXT, KV_BYTES, Room
from balancer.core.running import Run
from balancer.core.scheduler import Ended, LoadAnswered
from balancer.core.sight import Sight
from balancer.core.slots import SlotBelief
from balancer.core.speeds import Size, Speed, work

CACHE_BYTES: Final = 8 << 30  # of prompts that a runner keeps in the host's memory
FAILED_LOAD_S: Final = 10.0  # a load for nobody that failed is not repeated before
BACKGROUND_TICKS: Final = 4
ASKED_TICKS: Final = 8
RATIO_GAIN: Final = 0.05
PROMPT_GAIN: Final = 0.05
FEW_PROMPTS: Final = 8  # of which there is no telling what is usual
MOST_PROMPT: Final = 4.0  # times the usual one: what is longer says no more of it
LEAST_CUT: Final = 2048  # tokens; shorter ones are read whole, or nearly
FOREIGN_S: Final = 60.0
LEAST_MOVED_NS: Final = 10_000_000  # what is less is how a host counts the time, and no use
LEAST_CACHED: Final = 64  # tokens thought to be cached, from which on it shows whether they were
RATIOS: Final = (1 / 8, 8.0)
MOST_MODELS: Final = 1000


class Model(NamedTuple):
    """A model by the catalogue. `until`: the tick at which to ask again."""

    file_bytes: int
    size: Size
    embeds: bool
    until: int


class Books:
    """
    The books.

    Args:
        view: What may be seen of the pool.
        decisions: Told of what is learned of slots and speeds.

    Attributes:
        ledgers: What runs on each backend, and how fast it is.
        backends: Those that are configured, by name.
        tracks: What runs anywhere, by identity of the call.
        in_flight: How many of these, by model and key of fairness.
        keeping: What operators want to stay in memory.
        has_tiers: Whether they differ in priority.
        ticks: How many there were.
        ticked_at: When the last one was.
    """

    def __init__(self, view: Sight, knobs: Knobs, decisions: Decisions) -> None:
        self.ledgers: dict[str, Ledger] = {}
        self.backends: dict[str, Backend] = {}
        self.tracks: dict[int, tuple[Ledger, Track]] = {}
        self.in_flight: dict[tuple[str, str], int] = {}
        self.lengths = Lengths()
        self.demand = Demand(knobs.demand_fast_s, knobs.demand_slow_s)
        self.prefixes = Prefixes()
        self.keeping = Keeping(view)
        self.has_tiers = False
        self.ticks = 0
        self.ticked_at = 0.0
        self._view = view
        self._knobs = knobs
        self._decisions = decisions
        self._rooms: dict[str, Room] = {}
        self._models: dict[str, Model] = {}
        self._memory: dict[str, tuple[InMemory, ...]] = {}
        self.asked: set[PlacementKey] = set()  # as calls had it, policies for contexts applied
        self._copies: dict[PlacementKey, int] | None = None
        self._contexts: dict[tuple[str, str], tuple[int, int]] = {}  # changes, tokens
        self._foreign: dict[tuple[str, str], float] = {}
        self._ratios: dict[str, float] = {}  # tokens to estimated tokens, by model
        # Tokens as estimated, on average, and of how many, by model.
        self._prompts: dict[str, tuple[float, int]] = {}
        self._learned: Mapping[str, Any] = {}
        self._recalled_at = 0.0
        self._refresh()

    # -- calls ---------------------------------------------------------------------------------

    def arrived(self, call: Call, now: float) -> None:
        """A call has come."""
        key = call.key
        self._learn_prompt(call)
        if len(self.asked) > MOST_MODELS:
            self.asked.clear()
        if not call.is_guest:  # which takes what is there, and is no reason to have more of it
            self.demand.arrived(key, now)
            self.asked.add(key)
        if key.options:  # what an eviction costs, all variants of the model have to bear
            self.demand.arrived(PlacementKey(key.model), now)

    def _learn_prompt(self, call: Call) -> None:
        """One that is far longer than usual counts as a long one."""
        model, tokens = call.key.model, self._within(call, call.prompt_tokens)
        usual, count = self._prompts.get(model, (0.0, 0))
        if count >= FEW_PROMPTS:
            tokens = min(tokens, MOST_PROMPT * max(1.0, usual))
        if count or len(self._prompts) < MOST_MODELS:
            gain = max(PROMPT_GAIN, 1.0 / (count + 1))
            self._prompts[model] = usual + gain * (tokens - usual), count + 1

    def usual_prompt(self, model: str) -> float:
        """Tokens, as estimated, on average; 0: not known."""
        return self._prompts.get(model, (0.0, 0))[0]

    def _within(self, call: Call, tokens: float) -> float:
        """As many of so many tokens as any backend reads; all, where one has not told."""
        if tokens <= LEAST_CUT * call.inputs:
            return tokens
        copies = [self._view.copy(name, call.key) for name in self.backends]
        reads = [copy.reads for copy in copies if copy.known is not Residency.ABSENT]
        known = [most for most in reads if most is not None]
        cut = bool(known) and len(known) == len(reads)
        return min(tokens, float(call.inputs * max(known))) if cut else tokens

    def need(self, call: Call) -> Need:
        """What a call asks for, as far as can be told."""
        model = call.key.model
        prompt = self._within(call, call.prompt_tokens * self._ratios.get(model, 1.0))
        if call.embedding or call.purpose is not Purpose.RUN:
            return Need(prompt, 0.0, 0.0 if call.embedding else prompt, call.inputs)
        answer, limit = self.lengths.mean(model, call.fair_key), call.output_tokens
        if limit is not None and limit > 0:
            answer = min(answer, float(limit))
        return Need(prompt, answer, call.prompt_tokens + (limit or 0))

    def enter(
        self, call: Call, backend: str, now: float, need: Need, choice: Choice | None
    ) -> Track:
        """Count a call as begun on a backend; without a *choice* somebody else sent it there."""
        ledger, model = self.ledgers.get(backend) or self.ledger(backend), call.key.model
        size = self.model(model).size
        if choice is not None:
            quote, terms = choice.quote, choice.terms
            cached, first_s, prefill_s = terms.cached, terms.first_token_s, terms.prefill
            share, prompt = quote.share, need.read(quote.reads)
            is_clean = quote.resident and not ledger.is_reading
        else:
            cached, is_clean = 0.0, False
            prompt = need.read(self._view.copy(backend, call.key).reads)
            share = float(ledger.look(model, now)[2])
            prefill_s = work(prompt, 0.0) / ledger.speed.prompt(model, size) + 0.02
            first_s = prefill_s * share
        track = Track(
            call, now, size, prompt, cached, prefill_s, first_s, need.answer, share, is_clean
        )
        track.charged = need.prompt
        ledger.enter(track, now)
        self.tracks[id(call)] = (ledger, track)
        self._count(call, 1)
        if call.chain or call.session:
            capacity = self._cache_tokens(ledger, model)
            self.prefixes.insert(
                backend, call.key, call.chain, capacity, call.session, now, call.shared
            )
        return track

    def _count(self, call: Call, by: int) -> None:
        whose = (call.key.model, call.fair_key)
        count = self.in_flight.get(whose, 0) + by
        if count > 0:
            self.in_flight[whose] = count
        else:
            self.in_flight.pop(whose, None)

    def _cache_tokens(self, ledger: Ledger, model: str) -> int:
        """Tokens of prompts that its runner there keeps."""
        backend = ledger.name
        known = self._contexts.get((backend, model))
        if known is None or known[0] != ledger.changes:
            if len(self._contexts) > MOST_MODELS:
                self._contexts.clear()
            told = (it.context for it in self.in_memory(backend) if it.model == model)
            context = next(filter(None, told), DEFAULT_CONTEXT)
            known = self._contexts[backend, model] = (ledger.changes, context)
        return self._view.slots(backend, model) * known[1] + CACHE_BYTES // KV_BYTES

    def began(self, run: Run) -> None:
        """An attempt was granted."""
        call = run.call
        known = self.tracks.get(id(call))
        if known is not None and known[0].name == run.backend and known[1].run is None:
            known[1].run = run
            return
        if known is not None:  # it runs elsewhere since
            self._strike(*known, run.at)
        track = self.enter(call, run.backend, run.at, self.need(call), None)
        track.run, track.probing = run, run.probe

    def is_promised(self, call: Call) -> bool:
        """Whether it was committed, and has not begun."""
        known = self.tracks.get(id(call))
        return known is not None and known[1].run is None

    def take_back(self, call: Call) -> None:
        """Nothing came of its commit."""
        known = self.tracks.pop(id(call), None)
        if known is not None:
            self._strike(*known, known[0].at)

    def first_byte(self, run: Run, at: float) -> None:
        """An attempt's first byte came."""
        known = self.tracks.get(id(run.call))
        if known is None or known[1].run is not run:
            return
        ledger, track = known
        model = run.call.key.model
        ledger.first_byte(track, at)
        if not run.call.streaming or run.remote:
            return
        belief = self._belief(ledger)
        if belief is None:
            return
        self._decisions.foretold(run.backend, track.first_token_s, at - track.at)
        track.probing = False
        before = belief.believed(model)
        if belief.first_byte(model, ledger.shown(model), at, run.probe):
            self._tell_slots(run.backend, model, before, "seen", at)

    def ended(self, ended: Ended) -> Track | None:
        """An attempt ended; None: nobody knew of it."""
        run, outcome, now = ended.run, ended.outcome, ended.at
        known = self.tracks.get(id(run.call))
        if known is None or known[1].run is not run:
            return None
        del self.tracks[id(run.call)]
        ledger, track = known
        if not run.remote:
            ledger.learn(track, outcome, now)
        self._strike(ledger, track, now)
        if outcome.verdict is Verdict.OK and run.call.purpose is Purpose.RUN:
            self._learn_call(ledger, track, outcome)
        return track

    def _strike(self, ledger: Ledger, track: Track, now: float) -> None:
        """A call is not there any more, whatever came of it."""
        if track.probing:
            belief = self._belief(ledger)
            if belief is not None:
                belief.undecided(track.model, now)
        ledger.strike(track, now)
        self._count(track.call, -1)

    def _learn_call(self, ledger: Ledger, track: Track, outcome: Outcome) -> None:
        """Lengths, tokens per byte, and what the cache was worth."""
        call, model, usage = track.call, track.model, outcome.usage
        tokens_in, written = usage.tokens_in, track.written(usage)
        if tokens_in and call.prompt_tokens and not self._is_cut(ledger.name, call, tokens_in):
            ratio = min(RATIOS[1], max(RATIOS[0], tokens_in / call.prompt_tokens))
            known = self._ratios.get(model, 1.0)
            if model in self._ratios or len(self._ratios) < MOST_MODELS:
                self._ratios[model] = known + RATIO_GAIN * (ratio - known)
        if call.embedding:
            return
        if written:
            self.lengths.learn(model, call.fair_key, written)
            if call.chain:
                self.prefixes.finished(ledger.name, call.key, call.chain, written)
        if track.cached >= LEAST_CACHED and tokens_in and usage.prompt_s is not None:
            read = usage.prompt_s * ledger.speed.prompt(model, track.size)
            counts = self._decisions.prefix_tokens
            counts["expected"] += track.cached
            counts["seen"] += min(track.cached, max(0.0, tokens_in - read))
            ratio = (tokens_in - read) / track.cached * self.prefixes.reuse(model)
            self.prefixes.learn_reuse(model, min(1.0, max(0.0, ratio)))

    def _is_cut(self, backend: str, call: Call, tokens_in: int) -> bool:
        """Whether the prompt may not have been read whole there."""
        most = self._view.copy(backend, call.key).reads
        sent = call.prompt_tokens * self._ratios.get(call.key.model, 1.0)
        return most is not None and max(sent, tokens_in) >= most * call.inputs

    def _belief(self, ledger: Ledger) -> SlotBelief | None:
        """What is believed of slots there; None: it has left, and another may have its name."""
        is_there = self.ledgers.get(ledger.name) is ledger
        return self._view.belief(ledger.name) if is_there else None

    def _tell_slots(self, backend: str, model: str, before: int, why: str, now: float) -> None:
        belief = self._view.belief(backend)
        if belief is not None:
            told = (backend, names.display(model), before, belief.believed(model), why)
            self._decisions.emit(SlotsBelieved(now, *told))

    # -- backends ------------------------------------------------------------------------------

    def load_answered(self, fact: LoadAnswered) -> None:
        """A detached load ended."""
        if fact.backend not in self.backends:  # it has left meanwhile
            return
        ledger = self.ledger(fact.backend)
        ledger.asked_load, ledger.going = None, frozenset()
        if fact.ok:
            if fact.load_s > 0.0:
                ledger.speed.learn_load(self.model(fact.key.model).size, fact.load_s)
            ledger.failed.pop(fact.key, None)
            ledger.loaded_at[fact.key.model] = self.ticked_at
        else:
            ledger.expected = None
            now = self.ticked_at  # keys are made of options of clients' choosing: none is kept long
            ledger.failed = {key: at for key, at in ledger.failed.items() if at > now}
            ledger.failed[fact.key] = now + FAILED_LOAD_S
        self.changed(fact.backend, self.ticked_at)

    def load_refused(self, backend: str) -> None:
        """A load that was asked for did not begin, or was stopped: that says nothing."""
        ledger = self.ledgers.get(backend)
        if ledger is not None:
            ledger.asked_load, ledger.going, ledger.expected = None, frozenset(), None
            ledger.moved()

    def changed(self, backend: str, now: float, *, dead: bool = False) -> None:
        """Look again at a backend."""
        if backend not in self.backends:
            return
        ledger = self.ledger(backend)
        ledger.moved()
        self._copies = None
        if dead:
            self.prefixes.drop(backend)
            ledger.drain, ledger.going = None, frozenset()
        before = self._memory.pop(backend, ())
        after = self.in_memory(backend)
        gone = {it.model for it in before} - {it.model for it in after}
        for model in gone:
            self.prefixes.drop(backend, model)
        self._see_strangers(ledger, before, after, now)
        self.room(backend).observe(after)
        self._learn_room(ledger, after)
        for it in after:
            if it.size_bytes:
                ledger.speed.offloaded(it.model, 0 < it.vram_bytes < it.size_bytes)
                if not it.vram_bytes:
                    ledger.speed.set_cpu()

    def _see_strangers(
        self, ledger: Ledger, before: Sequence[InMemory], after: Sequence[InMemory], now: float
    ) -> None:
        """
        Whose time to expire moved without a call or load of ours is used by somebody else.

        While it is being loaded that time is a new one each time it is asked for.
        """
        loading = self._view.loading_on(ledger.name)
        coming = None if loading is None or loading.key is None else loading.key.model
        known = {it.model: it.expires_ns for it in before if it.model != coming}
        for it in after:
            was = known.get(it.model)
            moved = was is not None and was > 0 and it.expires_ns > was + LEAST_MOVED_NS
            ours = (ledger.last_used, ledger.loaded_at)
            quiet_s = now - max(at.get(it.model, -math.inf) for at in ours)
            if moved and not ledger.is_busy(it.model) and quiet_s > FOREIGN_S:
                if len(self._foreign) > 1000:
                    self._foreign.clear()
                self._foreign[ledger.name, it.model] = now

    def _learn_room(self, ledger: Ledger, after: Sequence[InMemory]) -> None:
        """What is missing after a load that should have had room was pushed out by it."""
        expected = ledger.expected
        if expected is None or self._view.loading_on(ledger.name) is not None:
            return
        model, stay = expected
        here = {it.model: it for it in after}
        if model not in here or not here[model].size_bytes:
            return
        ledger.expected = None
        if all(it.model in here for it in stay):
            return
        room = self.room(ledger.name)
        sizes = [room.size(it, 0) for it in stay]
        if all(sizes):
            room.pushed_out(here[model].size_bytes + sum(sizes), len(stay) + 1)

    def all_changed(self) -> None:
        """Look again at all of them, and who they are."""
        self._refresh()
        self._memory.clear()
        for ledger in self.ledgers.values():
            ledger.moved()

    def _refresh(self) -> None:
        before = {name: backend.url for name, backend in self.backends.items()}
        self.backends.clear()
        self.backends.update((backend.name, backend) for backend in self._view.backends())
        for name, backend in self.backends.items():
            if name not in before:
                self._recall_slots(name)
            elif before[name] != backend.url:  # another backend, which nothing is known of
                self._forget(name)
            elif name in self.ledgers:
                self.ledgers[name].speed.weigh(backend.weight)
        self.has_tiers = len({backend.priority for backend in self.backends.values()}) > 1
        for name in [name for name in self.ledgers if name not in self.backends]:
            self._forget(name)
        self._contexts.clear()
        for name, backend in self.backends.items():
            self.room(name).configured = backend.vram_bytes

    def _forget(self, backend: str) -> None:
        """What runs there yet is counted where it began, and ends there."""
        self.ledgers.pop(backend, None)
        self._rooms.pop(backend, None)
        self._decisions.forget(backend)
        self.prefixes.drop(backend)
        for part in ("speeds", "rooms", "slots"):
            told = self._learned.get(part)
            if isinstance(told, dict):
                told.pop(backend, None)

    def _recall_slots(self, backend: str) -> None:
        slots, belief = self._learned.get("slots"), self._view.belief(backend)
        told = slots.get(backend) if isinstance(slots, dict) else None
        if belief is not None and isinstance(told, dict):
            belief.restore(told)

    # -- what is known -------------------------------------------------------------------------

    def ledger(self, backend: str) -> Ledger:
        """What runs there, made if need be."""
        ledger = self.ledgers.get(backend)
        if ledger is None:
            known = self.backends.get(backend)
            discarded = partial(self._discarded, backend)
            weight = known.weight if known is not None else 1.0
            speed = Speed(weight=weight, discarded=discarded)
            ledger = self.ledgers[backend] = Ledger(backend, speed)
            told = self._learned.get("speeds")
            if isinstance(told, dict) and isinstance(told.get(backend), dict):
                speed.restore(told[backend])
        return ledger

    def _discarded(self, backend: str, kind: str, value: float) -> None:
        """A measurement there was beyond belief."""
        ledger = self.ledgers.get(backend)  # None: it has left, and this was still under way there
        began_at = 0.0 if ledger is None else ledger.at
        at = max(began_at, self.ticked_at, self._recalled_at)
        self._decisions.emit(SampleDiscarded(at, backend, kind, value))

    def room(self, backend: str) -> Room:
        """What fits there, made if need be."""
        room = self._rooms.get(backend)
        if room is None:
            known = self.backends.get(backend)
            room = self._rooms[backend] = Room(None if known is None else known.vram_bytes)
            told = self._learned.get("rooms")
            if isinstance(told, dict):
                room.restore(told.get(backend))
        return room

    def in_memory(self, backend: str) -> tuple[InMemory, ...]:
        """What it has in memory."""
        known = self._memory.get(backend)
        if known is None:
            known = self._memory[backend] = tuple(self._view.memory(backend))
        return known

    def model(self, model: str) -> Model:
        """What the catalogue tells of a model; asked again every few ticks."""
        known = self._models.get(model)
        if known is None or self.ticks >= known.until:
            view = self._view
            file_bytes = view.size(model)
            size = Size.of(file_bytes, view.parameters_b(model))
            if known is not None and known.size == size:
                size = known.size  # the same object: predictions are kept by it
            if len(self._models) > 4096:
                self._models.clear()
            embeds, until = view.is_embedding_only(model), self.ticks + ASKED_TICKS
            known = self._models[model] = Model(file_bytes, size, embeds, until)
        return known

    def copies(self, key: PlacementKey) -> int:
        """Backends that have it in memory with these options, or load it; one where none has."""
        if self._copies is None:
            counts: Counter[PlacementKey] = Counter()
            for name in self.backends:
                keys = {loaded_as(it) for it in self.in_memory(name)}
                loading = self._view.loading_on(name)
                if loading is not None and loading.key is not None:
                    keys.add(loading.key)
                counts.update(keys)
            self._copies = counts
        return self._copies.get(key, 1)

    def is_strangers(self, backend: str, model: str, now: float) -> bool:
        """Whether somebody who does not come through us used it there of late."""
        return now - self._foreign.get((backend, model), -math.inf) <= FOREIGN_S

    # -- time ----------------------------------------------------------------------------------

    def open_pass(self) -> None:
        """What the last one asked for was carried out, or refused."""
        self._copies = None
        for ledger in self.ledgers.values():
            ledger.asked_load = None

    def tick(self, now: float) -> None:
        """Look how everything goes."""
        window_s = now - self.ticked_at
        self.ticks += 1
        self.ticked_at = now
        for ledger in self.ledgers.values():
            if window_s > 2.0 * self._knobs.tick_s:
                ledger.rest(now)
            elif not ledger.is_idle or ledger.speed.slow_factor < 1.0:
                self._watch(ledger, window_s, now)
                self._mind_slots(ledger, now)
        if self.ticks % BACKGROUND_TICKS == 0:
            self._guess_speeds()

    def _watch(self, ledger: Ledger, window_s: float, now: float) -> None:
        """Tell when it became slow, or is no more; how slow it is meanwhile is only kept."""
        name, speed = ledger.name, ledger.speed
        before, rate = speed.slow_factor, speed.decode_rate
        ledger.watch(now, window_s, loading=self._view.loading_on(name) is not None)
        factor = speed.slow_factor
        if factor == before:
            return
        if factor < 1.0:
            self._decisions.slow[name] = factor
        else:
            self._decisions.slow.pop(name, None)
        if factor < 1.0 and before < 1.0:
            return
        why = "slow" if factor < 1.0 else "learned" if speed.decode_rate != rate else "recovered"
        self._decisions.emit(Straggling(now, name, factor, why))

    def _mind_slots(self, ledger: Ledger, now: float) -> None:
        """Calls that wait behind fewer streams than slots are believed in: believe those."""
        belief = self._view.belief(ledger.name)
        if belief is None:
            return
        for model, tracks in ledger.models.items():
            waiting = [t for t in tracks.values() if not t.decoding and t.call.streaming]
            if not waiting or self.model(model).embeds:
                continue
            since = max(waiting[0].at, ledger.first_byte_at.get(model, -math.inf))
            before = belief.believed(model)
            belief.starved(
                model,
                len(waiting),
                ledger.shown(model),
                now - since,
                sum(t.prefill_s for t in ledger.tracks() if t.reads),
                now,
            )
            if belief.believed(model) != before:
                ledger.moved()
                self._tell_slots(ledger.name, model, before, "starved", now)

    def _guess_speeds(self) -> None:
        """Whoever was never measured is taken to be as quick as those that were, in the middle."""
        measured = [x.speed for x in self.ledgers.values() if x.speed.is_measured]
        if not measured or len(measured) == len(self.backends):
            return
        prompt = median_high(speed.prompt_rate for speed in measured)
        decode = median_high(speed.decode_rate for speed in measured)
        load = median_high(speed.load_rate for speed in measured)
        for name in self.backends:
            ledger = self.ledger(name)
            before = ledger.speed.edition
            ledger.speed.assume(prompt, decode, load)
            if ledger.speed.edition != before:
                ledger.moved()

    # -- over a restart, and from one to another -----------------------------------------------

    def learned(self, now: float) -> dict[str, Any]:
        """What would be a pity to forget, as plain data."""
        beliefs = {name: self._view.belief(name) for name in self.backends}
        return {
            "speeds": {name: ledger.speed.dump() for name, ledger in self.ledgers.items()},
            "rooms": {name: room.dump() for name, room in self._rooms.items()},
            "slots": {name: belief.dump() for name, belief in beliefs.items() if belief},
            "lengths": self.lengths.dump(),
            "demand": self.demand.dump(now),
            "ratios": dict(self._ratios),
            "reuse": self.prefixes.dump(),
        }

    def recall(
        self, learned: Mapping[str, Any], now: float, age_s: float, share: float = 1.0
    ) -> None:
        """
        Take over what another has learned; what cannot be believed is left out.

        Args:
            share: Of the calls that the other had, those that will come here.
        """
        self._learned, self._recalled_at = learned, now
        for part, take in (("lengths", self.lengths.restore), ("reuse", self.prefixes.restore)):
            told = learned.get(part)
            if isinstance(told, dict):
                take(told)
        demand, ratios = learned.get("demand"), learned.get("ratios")
        if isinstance(demand, dict):
            self.demand.restore(demand, now, age_s, share)
        for model, ratio in ratios.items() if isinstance(ratios, dict) else ():
            if isinstance(ratio, int | float) and RATIOS[0] <= ratio <= RATIOS[1]:
                self._ratios[model] = float(ratio)
        for name in [name for name, ledger in self.ledgers.items() if ledger.is_idle]:
            del self.ledgers[name]
        self._rooms.clear()
        self.backends.clear()
        self._refresh()


def loaded_as(it: InMemory) -> PlacementKey:
    """The key of a runner; of one that somebody else loaded, that without options."""
    return it.key or PlacementKey(it.model)
