"""One Ollama host as a state machine: no sockets, no loop, time only from the clock it is given.

Who drives it: hand in work with `Host.submit`, take it back with `Host.cancel`, call
`Host.advance` whenever `Host.next_at` has come. A `Call` tells its owner about each change of
phase through `on_change`; between changes, `Call.produced` and `Call.due_at` say how many output
tokens are out and when the next one is, so that nobody pays for an event a token.

    host = Host([SimModel("llama3.2", load_s=2.0)], clock=clock, rng=Random(1))
    call = host.submit(Job("llama3.2", prompt_tokens=100, output_tokens=50))
    while (at := host.next_at()) is not None:
        now = at
        host.advance()
    assert call.ending == "done"

The rules (queues, eviction, reload, keep-alive) are those of Ollama 0.33, `server/sched.go`.
"""

import hashlib
import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from itertools import count
from random import Random
from typing import Literal

from balancer.sim import names
from balancer.sim.faults import RUNNER_DIED, Failure, Faults, StreamFault

GIB = 1 << 30
QUEUE_FULL = "server busy, please try again.  maximum pending requests exceeded"
_REMEMBERED_PROMPTS = 64
_ROUNDING = 1e-6  # a token counts as out this share of a token early: floats


@lru_cache(maxsize=4096)
def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class SimModel:
    """A model on disk, what it says, and how fast this host runs it."""

    name: str
    size_bytes: int = 2 * GIB
    parameter_size: str = "3.2B"
    family: str = "llama"
    quantization: str = "Q4_K_M"
    context_length: int = 32768
    embedding_length: int = 8
    capabilities: tuple[str, ...] = ("completion",)
    load_s: float = 0.0
    prompt_tps: float = 2000.0
    decode_tps: float = 50.0
    kv_bytes_per_token: int = 0
    modified_s: float = 1_790_000_000.0
    """Seconds since 1970 of the last change, as lists print it."""
    words: tuple[str, ...] | None = None
    """The one answer it gives; None makes up sentences from the prompt and the seed."""
    answer_words: tuple[int, int] = (20, 60)
    """Shortest and longest made-up answer."""
    endless: bool = False
    """Says `words` over and over until a limit or the client stops it."""
    thinking: tuple[str, ...] = ()
    tool_words: tuple[str, ...] = ()
    """What is said before a tool call."""
    always_calls: bool = False
    """Calls the first tool offered, asked for or not."""
    jinja: bool = False
    """Rendered by the engine: tool calls in the last record, a prefill is echoed."""
    reopens: bool = True
    """Goes on with a trailing assistant message; False starts a new turn after it."""
    vector: tuple[float, ...] | None = None
    """The one embedding it gives."""
    context_ints: int | None = None
    """How many numbers the `context` of generate holds; None counts the tokens."""
    template: str = "{{ .Prompt }}"
    parameters: tuple[tuple[str, str], ...] = ()
    license: str = ""
    chunks: tuple[bytes, ...] | None = None
    """Written as they are, one per token time, instead of any encoded answer."""
    content: str = ""
    """What the digest follows from; empty: the name. Copies share it, other weights differ."""
    blob: str = ""
    """Digest of the file of weights (`sha256:…`); empty: it follows from `origin`."""

    @property
    def parsed(self) -> names.ModelName:
        """The name in parts."""
        return names.parse(self.name)

    @property
    def origin(self) -> str:
        """What its digests follow from."""
        return self.content or self.parsed.key

    @property
    def digest(self) -> str:
        """64 hex digits that depend on nothing but `origin`."""
        return _digest(self.origin)

    @property
    def weights(self) -> str:
        """The digest of its largest file."""
        return self.blob or f"sha256:{_digest(f'weights {self.origin}')}"


@dataclass(frozen=True, slots=True)
class Settings:
    """Ollama's knobs and the hardware; the defaults are Ollama's own."""

    num_parallel: int = 1
    max_queue: int = 512
    max_loaded: int = 3
    keep_alive_s: float = 300.0
    context_length: int = 4096
    vram_bytes: int | None = None
    """None: everything fits; 0: no GPU at all."""
    vram_fit: float = 0.8
    """A load evicts unless it needs at most this share of the free VRAM."""
    cpu_slowdown: float = 10.0
    """How many times slower a model runs that is not on the GPU."""
    batch_slowdown: float = 0.0
    """With n calls decoding, each runs at n ** -batch_slowdown of its speed."""
    overhead_s: float = 0.001
    """From arrival to the scheduler."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is an error; `in_stream` marks those made by a started stream job."""

    status: int
    text: str
    in_stream: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """Work for a host."""

    model: str
    prompt_tokens: int = 1
    output_tokens: int = 0
    kind: Literal["run", "load", "embed"] = "run"
    keep_alive_s: float | None = None
    """None: not given; negative or infinite: for ever."""
    options: tuple[tuple[str, object], ...] = ()
    """The runner options; another set reloads the model."""
    num_ctx: int = 4096
    blocks: tuple[Hashable, ...] = ()
    """The prompt in pieces, to find out how much of it the cache knows."""
    refusal: Refusal | None = None
    """Given instead of an answer once the model is loaded."""


class Phase(Enum):
    """Where a call is."""

    QUEUED = "queued"
    LOADING = "loading"
    WAITING = "waiting"
    PROMPT = "prompt"
    DECODE = "decode"
    ENDED = "ended"


Ending = Literal["", "done", "refused", "reset", "cut", "error", "no_done", "gone", "down"]


class Call:
    """One job on its way through the host. Times are the host's clock; None: not yet."""

    __slots__ = (
        "_host",
        "arrived_at",
        "base_at",
        "base_tokens",
        "cached_tokens",
        "decode_at",
        "ended_at",
        "ending",
        "fault",
        "job",
        "limit",
        "model",
        "on_change",
        "phase",
        "rate",
        "refusal",
        "runner",
        "runner_at",
        "slot_at",
        "timer",
    )

    def __init__(
        self, host: "Host", job: Job, model: SimModel, on_change: Callable[["Call"], None] | None
    ) -> None:
        self.job = job
        self.model = model
        self.on_change = on_change
        self.phase = Phase.QUEUED
        self.ending: Ending = ""
        self.refusal: Refusal | None = None
        self.fault: StreamFault | None = None
        self.limit = job.output_tokens
        self.runner: Runner | None = None
        self.cached_tokens = 0
        self.arrived_at = host.now
        self.runner_at: float | None = None
        self.slot_at: float | None = None
        self.decode_at: float | None = None
        self.ended_at: float | None = None
        self._host = host
        # The pace, kept by the host: base_tokens were out at base_at, rate more a second since.
        self.base_at = 0.0
        self.base_tokens = 0.0
        self.rate = 0.0
        self.timer: Timer | None = None

    def __repr__(self) -> str:
        return f"<Call {self.model.name} {self.phase.value} {self.ending}>"

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it."""
        return self.phase is Phase.ENDED

    def produced(self, now: float) -> int:
        """Output tokens out at `now`."""
        if self.decode_at is None:
            return 0
        if self.phase is Phase.ENDED:
            return int(self.base_tokens + _ROUNDING)
        return min(self.limit, int(self.tokens_at(self._host.work_time(now)) + _ROUNDING))

    def due_at(self, tokens: int) -> float:
        """When so many tokens are out at the present speed; infinite if never."""
        if tokens > self.limit or self._host.frozen or self.phase is not Phase.DECODE:
            return math.inf
        return self.base_at + max(0.0, tokens - self.base_tokens) / self.rate

    def tokens_at(self, now: float) -> float:
        """Output tokens, whole and part, at a time of its work."""
        if math.isinf(self.rate):
            return float(self.limit)
        return min(float(self.limit), self.base_tokens + (now - self.base_at) * self.rate)

    @property
    def load_s(self) -> float:
        """From arrival to a loaded model."""
        return (self.runner_at or self._end) - self.arrived_at

    @property
    def wait_s(self) -> float:
        """In the queue for a slot."""
        if self.runner_at is None:
            return 0.0
        return (self.slot_at or self._end) - self.runner_at

    @property
    def prompt_s(self) -> float:
        """Reading the prompt."""
        if self.slot_at is None:
            return 0.0
        return (self.decode_at or self._end) - self.slot_at

    @property
    def eval_s(self) -> float:
        """Writing the answer."""
        return 0.0 if self.decode_at is None else self._end - self.decode_at

    @property
    def total_s(self) -> float:
        """Load, wait, prompt and eval together."""
        return self._end - self.arrived_at

    @property
    def _end(self) -> float:
        return self._host.now if self.ended_at is None else self.ended_at


class Timer:
    """Something to do at a time; `is_work` ones stand still while the host is frozen."""

    __slots__ = ("action", "at", "is_work")

    def __init__(self, at: float, action: Callable[[], None], *, is_work: bool) -> None:
        self.at = at
        self.action: Callable[[], None] | None = action
        self.is_work = is_work

    def cancel(self) -> None:
        """Forgets the action."""
        self.action = None


@dataclass(slots=True, eq=False)
class Runner:
    """A loaded model."""

    model: SimModel
    options: tuple[tuple[str, object], ...]
    num_ctx: int
    slots: int
    size_bytes: int
    vram_bytes: int
    keep_alive_s: float
    shown_expiry: float | None = None
    """None during the first busy spell: lists then print now + keep-alive."""
    refs: int = 0
    running: int = 0
    dead: bool = False
    waiting: deque[Call] = field(default_factory=deque)
    calls: dict[Call, None] = field(default_factory=dict)
    timer: Timer | None = None
    prompts: deque[tuple[Hashable, ...]] = field(
        default_factory=lambda: deque(maxlen=_REMEMBERED_PROMPTS)
    )

    def accepts(self, job: Job) -> bool:
        """Whether the job can run without a reload."""
        return not self.dead and self.options == job.options and self.num_ctx == job.num_ctx

    def cached_share(self, blocks: tuple[Hashable, ...]) -> float:
        """The longest known prefix as a share of the prompt, 0 below a tenth."""
        if not blocks:
            return 0.0
        best = max((_common(blocks, known) for known in self.prompts), default=0)
        share = best / len(blocks)
        return share if share > 0.1 else 0.0


def _common(one: tuple[Hashable, ...], other: tuple[Hashable, ...]) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


class Host:
    """The scheduler, the runners and the disk of one host."""

    def __init__(
        self,
        models: Iterable[SimModel] = (),
        *,
        clock: Callable[[], float],
        rng: Random,
        settings: Settings | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.rng = rng
        self.counts: Counter[str] = Counter()
        """calls, done, gone, refused, loads_started, loads_finished, loads_aborted, unloads, …"""
        self.faults = Faults(self)
        self.on_schedule: Callable[[], None] | None = None
        """Called when `next_at` may have come nearer."""
        self._clock = clock
        self.now = clock()
        """The host's time: that of the event being handled."""
        self._disk: dict[str, SimModel] = {}
        for model in models:
            self.add(model)
        self._runners: dict[str, Runner] = {}
        self._pending: deque[Call] = deque()
        self._hand: Call | None = None
        self._awaited: Runner | None = None
        self._load_timer: Timer | None = None
        self._decoding: dict[Call, None] = {}
        self._calls: dict[Call, None] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._ids = count()
        self._frozen_at: float | None = None
        self._advancing = False

    # -- time -----------------------------------------------------------------------------------

    @property
    def frozen(self) -> bool:
        """Whether time stands still for its work."""
        return self._frozen_at is not None

    def work_time(self, now: float) -> float:
        """The time that running work has come to."""
        return now if self._frozen_at is None else self._frozen_at

    def next_at(self) -> float | None:
        """When something happens by itself, None if nothing ever will."""
        while self._timers and self._timers[0][2].action is None:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers and not self.frozen else None

    def advance(self) -> None:
        """Does all that is due."""
        if self._advancing:
            return
        self._advancing = True
        try:
            self._advance_to(self._clock())
        finally:
            self._advancing = False

    def _advance_to(self, now: float) -> None:
        while (at := self.next_at()) is not None and at <= now:
            action = heapq.heappop(self._timers)[2].action
            self.now = max(self.now, at)
            if action is not None:
                action()
        self.now = max(self.now, now)

    def after(self, delay_s: float, action: Callable[[], None], *, is_work: bool = False) -> Timer:
        """Does something later."""
        now = self.work_time(self.now) if is_work else self.now
        timer = Timer(now + delay_s, action, is_work=is_work)
        heapq.heappush(self._timers, (timer.at, next(self._ids), timer))
        if self.on_schedule is not None:
            self.on_schedule()
        return timer

    def freeze(self) -> None:
        """Stops the time of all work."""
        self.advance()
        if self._frozen_at is None:
            self._frozen_at = self.now

    def thaw(self) -> None:
        """Lets work go on where it stood; keep-alive went on meanwhile."""
        if self._frozen_at is None:
            return
        lost_s = max(0.0, self._clock() - self._frozen_at)
        self._frozen_at = None
        for _, _, timer in self._timers:
            if timer.is_work:
                timer.at += lost_s
        self._timers = [(timer.at, number, timer) for _, number, timer in self._timers]
        heapq.heapify(self._timers)
        for call in self._decoding:
            call.base_at += lost_s
            self._tell(call)
        if self.on_schedule is not None:
            self.on_schedule()
        self.advance()

    # -- the disk -------------------------------------------------------------------------------

    @property
    def models(self) -> list[SimModel]:
        """What is installed."""
        return list(self._disk.values())

    def add(self, model: SimModel) -> None:
        """Installs a model."""
        self._disk[model.parsed.key] = model

    def remove(self, name: str) -> None:
        """Deletes a model; KeyError if there is none."""
        del self._disk[names.parse(name).key]

    def find(self, name: str) -> SimModel | None:
        """The installed model of that name; BadNameError if it is no name."""
        return self._disk.get(names.parse(name).key)

    # -- what can be seen -----------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Calls that have not ended."""
        return len(self._calls)

    @property
    def queued(self) -> int:
        """Calls in the load queue, the one being loaded for not counted."""
        return len(self._pending)

    @property
    def loading(self) -> str | None:
        """The model being loaded."""
        return self._hand.model.name if self._load_timer is not None and self._hand else None

    def loaded(self) -> list[Runner]:
        """Loaded models, the one expiring last first."""
        return sorted(self._runners.values(), key=self.expires_at, reverse=True)

    def expires_at(self, runner: Runner) -> float:
        """When the runner is unloaded, as lists print it."""
        if runner.shown_expiry is None:
            return self.now + runner.keep_alive_s
        return runner.shown_expiry

    # -- work in and out ------------------------------------------------------------------------

    def submit(self, job: Job, on_change: Callable[[Call], None] | None = None) -> Call:
        """Takes work. `on_change` runs at each change of phase, never before this returns.

        Raises:
            KeyError: the model is not installed.
        """
        self.advance()
        model = self.find(job.model)
        if model is None:
            raise KeyError(job.model)
        call = Call(self, job, model, on_change)
        self.counts["calls"] += 1
        self._calls[call] = None
        if not self.faults.inference_hanging:
            self.after(self.settings.overhead_s, lambda: self._schedule(call), is_work=True)
        return call

    def cancel(self, call: Call) -> None:
        """The client has gone: a load is aborted, a slot is freed."""
        self.advance()
        if not call.ended:
            self._end(call, "gone")

    def unload(self, name: str) -> None:
        """Unloads a model as soon as it is idle; nothing to do if it is not loaded."""
        self.advance()
        model = self.find(name)
        runner = self._runners.get(model.digest) if model else None
        if runner is not None:
            runner.keep_alive_s = 0.0
            if not runner.refs:
                self._unload(runner)

    def kill(self, name: str) -> None:
        """Ends the child of a loaded model: running calls fail, it stays listed."""
        self.advance()
        model = self.find(name)
        runner = self._runners.get(model.digest) if model else None
        if runner is None:
            return
        runner.dead = True
        for call in list(runner.calls):
            call.fault = StreamFault("error", 0)
            self._end(call, "error" if call.phase is Phase.DECODE else "refused")

    def restart(self) -> None:
        """Forgets all calls and all loaded models."""
        self.advance()
        for call in list(self._calls):
            self._end(call, "down")
        for runner in list(self._runners.values()):
            self._unload(runner)
        self._pending.clear()

    # -- scheduler ------------------------------------------------------------------------------

    def _schedule(self, call: Call) -> None:
        if call.ended:
            return
        runner = self._runners.get(call.model.digest)
        if self.faults.queue_is_full:
            self._refuse(call, Refusal(503, QUEUE_FULL))
        elif runner is not None and runner.accepts(call.job):
            self._admit(call, runner)
        elif len(self._pending) >= self.settings.max_queue:
            self._refuse(call, Refusal(503, QUEUE_FULL))
        else:
            self._pending.append(call)
            self._serve()

    def _serve(self) -> None:
        """The one scheduling thread: first the load in hand, then the next in the queue."""
        while self._load_timer is None and self._awaited is None:
            if self._hand is None:
                if not self._pending:
                    return
                self._hand = self._pending.popleft()
            call = self._hand
            runner = self._runners.get(call.model.digest)
            if call.ended:
                self._hand = None
            elif runner is not None and runner.accepts(call.job):
                self._hand = None
                self._admit(call, runner)
            elif (victim := runner or self._victim(call)) is None:
                self._load(call)
            else:
                self._evict(victim)

    def _victim(self, call: Call) -> Runner | None:
        """Who must go before the call's model can be loaded."""
        if not self._runners or self._has_room(call):
            return None
        return min(
            self._runners.values(),
            key=lambda runner: (runner.refs > 0, runner.keep_alive_s, runner.model.digest),
        )

    def _has_room(self, call: Call) -> bool:
        if self.settings.max_loaded and len(self._runners) >= self.settings.max_loaded:
            return False
        vram = self.settings.vram_bytes
        return not vram or self._needed_bytes(call) <= self.settings.vram_fit * self._free_bytes()

    def _evict(self, victim: Runner) -> None:
        victim.keep_alive_s = 0.0
        if victim.refs:
            self._awaited = victim
        else:
            self._unload(victim)

    def _needed_bytes(self, call: Call) -> int:
        cache_bytes = call.model.kv_bytes_per_token * call.job.num_ctx * self._slots(call.model)
        return call.model.size_bytes + cache_bytes

    def _free_bytes(self) -> int:
        used = sum(runner.vram_bytes for runner in self._runners.values())
        return max(0, (self.settings.vram_bytes or 0) - used)

    def _slots(self, model: SimModel) -> int:
        return 1 if "completion" not in model.capabilities else self.settings.num_parallel

    def _load(self, call: Call) -> None:
        self.counts["loads_started"] += 1
        failure = self._failure(call.model, "load")
        load_s = call.model.load_s * self.faults.load_factor
        if failure is None:
            self._load_timer = self.after(load_s, self._loaded, is_work=True)
        else:
            self._load_timer = self.after(
                failure.after_s, lambda: self._load_failed(failure), is_work=True
            )
        self._enter(call, Phase.LOADING)

    def _loaded(self) -> None:
        call, self._hand, self._load_timer = self._hand, None, None
        if call is None:
            return
        self.counts["loads_finished"] += 1
        needed = self._needed_bytes(call)
        fits = needed if self.settings.vram_bytes is None else min(needed, self._free_bytes())
        runner = Runner(
            call.model,
            call.job.options,
            call.job.num_ctx,
            self._slots(call.model),
            needed,
            fits,
            self.settings.keep_alive_s,
        )
        self._runners[call.model.digest] = runner
        self._admit(call, runner)
        self._serve()

    def _load_failed(self, failure: Failure) -> None:
        call, self._hand, self._load_timer = self._hand, None, None
        self.counts["loads_failed"] += 1
        if call is not None:
            self._refuse(call, Refusal(failure.status, failure.text))
        self._serve()

    def _failure(self, model: SimModel, at: Literal["load", "run"]) -> Failure | None:
        failure = self.faults.failures.get(model.parsed.key)
        return failure if failure is not None and failure.at == at else None

    def _unload(self, runner: Runner) -> None:
        self.counts["unloads"] += 1
        if runner.timer is not None:
            runner.timer.cancel()
        if self._runners.get(runner.model.digest) is runner:
            del self._runners[runner.model.digest]
        if self._awaited is runner:
            self._awaited = None
            self._serve()

    # -- runner ---------------------------------------------------------------------------------

    def _admit(self, call: Call, runner: Runner) -> None:
        """The call has its model; a slot is the next thing to wait for."""
        call.runner, call.runner_at = runner, self.now
        runner.refs += 1
        runner.calls[call] = None
        if runner.timer is not None:
            runner.timer.cancel()
            runner.timer = None
        if call.job.keep_alive_s is not None:
            forever = call.job.keep_alive_s < 0
            runner.keep_alive_s = math.inf if forever else call.job.keep_alive_s
        if call.job.kind == "load":
            self._end(call, "done")
        elif call.job.refusal is not None:
            self._refuse(call, call.job.refusal)
        else:
            self._enter(call, Phase.WAITING)
            runner.waiting.append(call)
            self._fill_slots(runner)

    def _fill_slots(self, runner: Runner) -> None:
        while runner.running < runner.slots and runner.waiting:
            self._start(runner.waiting.popleft(), runner)

    def _start(self, call: Call, runner: Runner) -> None:
        runner.running += 1
        call.slot_at = self.now
        failure = self._failure(call.model, "run")
        if failure is not None:
            refusal = Refusal(failure.status, failure.text)
            call.timer = self.after(
                failure.after_s, lambda: self._refuse(call, refusal), is_work=True
            )
            return
        call.cached_tokens = self._cached_tokens(call, runner)
        fresh = call.job.prompt_tokens - call.cached_tokens
        prompt_s = fresh / call.model.prompt_tps * self._slowness(runner)
        self._enter(call, Phase.PROMPT)
        call.timer = self.after(prompt_s, lambda: self._prompt_read(call), is_work=True)

    def _cached_tokens(self, call: Call, runner: Runner) -> int:
        known = int(call.job.prompt_tokens * runner.cached_share(call.job.blocks))
        return max(0, min(known, call.job.prompt_tokens - 1))

    def _slowness(self, runner: Runner) -> float:
        on_cpu = 1.0 - runner.vram_bytes / runner.size_bytes if runner.size_bytes else 0.0
        return self.faults.token_factor * (1.0 + on_cpu * (self.settings.cpu_slowdown - 1.0))

    def _prompt_read(self, call: Call) -> None:
        call.decode_at = call.base_at = self.now
        if call.runner is not None and call.job.blocks not in call.runner.prompts:
            call.runner.prompts.append(call.job.blocks)
        if call.job.kind == "embed":
            self._end(call, "done")
            return
        call.fault = self.faults.take_stream()
        if call.fault is not None:
            call.limit = min(call.limit, call.fault.after)
        self._decoding[call] = None
        call.phase = Phase.DECODE
        if self.settings.batch_slowdown:
            self.respeed()
        else:
            self._set_rate(call, 1.0)

    def respeed(self) -> None:
        """Gives every decoding call the speed it has from now on."""
        share = max(1, len(self._decoding)) ** -self.settings.batch_slowdown
        for call in list(self._decoding):
            self._set_rate(call, share)

    def _set_rate(self, call: Call, share: float) -> None:
        now = self.work_time(self.now)
        if call.runner is None or call.timer is None:
            return
        rate = call.model.decode_tps * share / self._slowness(call.runner)
        if rate == call.rate:
            return
        call.base_tokens, call.base_at, call.rate = call.tokens_at(now), now, rate
        call.timer.cancel()
        if call.fault is None or call.fault.end != "stall":
            left_s = (call.limit - call.base_tokens) / rate
            call.timer = self.after(left_s, lambda: self._written(call), is_work=True)
        self._tell(call)

    def _written(self, call: Call) -> None:
        if call.fault is None:
            self._end(call, "done")
        elif call.fault.end != "stall":
            self._end(call, call.fault.end)

    # -- ends -----------------------------------------------------------------------------------

    def _refuse(self, call: Call, refusal: Refusal) -> None:
        call.refusal = refusal
        self._end(call, "refused")

    def _end(self, call: Call, ending: Ending) -> None:
        if call.ended:
            return
        if call.phase is Phase.DECODE:
            call.base_tokens = call.produced(self.now)
        if ending == "refused" and call.refusal is None:
            call.refusal = Refusal(500, RUNNER_DIED)
        call.ending, call.ended_at = ending, self.now
        del self._calls[call]
        self.counts[ending] += 1
        if call.timer is not None:
            call.timer.cancel()
        call.phase = Phase.ENDED
        if call in self._decoding:
            del self._decoding[call]
            if self.settings.batch_slowdown:
                self.respeed()
        if call.runner is not None:
            self._release(call, call.runner)
        elif self._hand is call:
            self._abort_load()
        self._tell(call)

    def _abort_load(self) -> None:
        """The one waited for has gone; the next in the queue starts from zero."""
        self._hand = None
        if self._load_timer is not None:
            self._load_timer.cancel()
            self._load_timer = None
            self.counts["loads_aborted"] += 1
        self._serve()

    def _release(self, call: Call, runner: Runner) -> None:
        runner.refs -= 1
        del runner.calls[call]
        if call.slot_at is not None:
            runner.running -= 1
        elif call in runner.waiting:
            runner.waiting.remove(call)
        self._fill_slots(runner)
        if runner.refs:
            return
        if runner.keep_alive_s <= 0:
            self._unload(runner)
            return
        runner.shown_expiry = self.now + runner.keep_alive_s
        if not math.isinf(runner.keep_alive_s):
            runner.timer = self.after(runner.keep_alive_s, lambda: self._unload(runner))

    def _enter(self, call: Call, phase: Phase) -> None:
        call.phase = phase
        self._tell(call)

    @staticmethod
    def _tell(call: Call) -> None:
        if call.on_change is not None:
            call.on_change(call)
