"""
The physics of one host that runs Ollama, fluid and exact in virtual time.

An accelerator is shared evenly among the runners that have work. A runner evaluates one prompt at a
time, in order of admission, and meanwhile its streams advance by a token for each batch of the
prompt; else they share the runner, a little slower with each further one. Calls beyond a runner's
slots wait in its queue, which is unbounded; calls whose model is not in memory wait in the host's,
which is not. Whoever is at its head loads, one at a time, and holds up everybody behind it.

Whoever asks hears later, never from within a call of his own.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import lru_cache
from typing import Any, Final, Protocol

from balancer.sim.timeline import Entry, Timeline

BATCH: Final = 512  # prompt tokens evaluated in one go
FIXED_S: Final = 0.02  # of every prompt
REUSE_PER_S: Final = 60_000.0  # cached tokens taken over in a second
HOST_CACHE_MB: Final = 8192.0  # of prompts, in the host's own memory, for each runner
MAX_QUEUE: Final = 512  # calls that wait for a load; one more is in hand
KEEP_ALIVE_S: Final = 300.0
LOAD_EXTRA_S: Final = 1.0
SETTLE_S: Final = 0.5  # before memory that was given back may be used again
REFUSED_S: Final = 0.005
ANSWER_S: Final = 0.005  # to a question that needs no model
APART_S: Final = 1e-6  # between answers of two hosts to what both are asked at one instant
CONNECT_TIMEOUT_S: Final = 2.0
CLOSE: Final = 1e-4  # tokens; what is so near its end has come to it
TRAINED: Final = 131_072
_EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class HostType:
    """
    A kind of hardware.

    Args:
        prompt_rate: Tokens per second of a prompt, 8B parameters.
        decode_rate: Tokens per second of one stream, 4.9 GB.
        memory_gb: For models.
        load_gb_s: Speed of a load.
        penalty: What each further stream costs all, as a share.
    """

    name: str
    prompt_rate: float
    decode_rate: float
    memory_gb: float
    load_gb_s: float
    penalty: float


HOST_TYPES: Final[Mapping[str, HostType]] = {
    kind.name: kind
    for kind in (
        HostType("cpu", 75.0, 9.0, 40.0, 1.2, 0.50),
        HostType("m1max", 355.0, 34.0, 40.0, 1.5, 0.25),
        HostType("rtx3060", 1450.0, 57.0, 11.0, 0.6, 0.13),
        HostType("rtx3090", 3860.0, 112.0, 23.0, 1.5, 0.13),
        HostType("rtx4090", 6900.0, 128.0, 23.0, 2.0, 0.12),
        HostType("a100", 5800.0, 138.0, 78.0, 2.0, 0.11),
    )
}


@dataclass(frozen=True, slots=True)
class Machine:
    """One simulated host: its hardware, and how its Ollama is set up."""

    name: str
    type: HostType
    slots: int = 4
    context: int = 4096
    max_models: int = 3


@dataclass(frozen=True, slots=True)
class Model:
    """A model: size of its file, parameters (billions), memory for each token of context."""

    name: str
    file_gb: float = 4.9
    params_b: float = 8.0
    kv_mb: float = 0.125
    embedding: bool = False

    @property
    def shown(self) -> str:
        """Its name as Ollama lists it."""
        return self.name if ":" in self.name else f"{self.name}:latest"

    def slots(self, machine: Machine) -> int:
        """Calls at once; a model that only embeds takes one, whatever the host is set to."""
        return 1 if self.embedding else machine.slots

    def memory_gb(self, machine: Machine) -> float:
        """What its runner takes there."""
        if self.embedding:
            return 1.1 * self.file_gb + 0.3
        return 1.05 * self.file_gb + machine.slots * machine.context * self.kv_mb / 1024 + 0.4

    def fits(self, machine: Machine) -> bool:
        """Whether it can be loaded there at all."""
        return self.memory_gb(machine) <= machine.type.memory_gb

    def prompt_rate(self, machine: Machine) -> float:
        """Tokens per second of a prompt there."""
        return machine.type.prompt_rate * min(8.0 / self.params_b, 12.0)

    def decode_rate(self, machine: Machine) -> float:
        """Tokens per second of a stream alone there."""
        return machine.type.decode_rate * min(math.pow(4.9 / self.file_gb, 0.95), 6.0)


class Loss(Enum):
    """Why a request came to nothing."""

    REFUSED = "refused: nobody listens"
    UNREACHABLE = "no connection came about in time"
    BUSY = "503: the queue for loads is full"
    MISSING = "404: not on this host"
    CUT = "the connection broke"


@dataclass(frozen=True, slots=True)
class Told:
    """What a final record tells: tokens, and seconds."""

    prompt_tokens: int
    output_tokens: int
    cached: int
    load_s: float
    prompt_s: float
    decode_s: float
    total_s: float


class Sink(Protocol):
    """Who made a request."""

    def first(self, work: Work) -> None:
        """Its first token came."""

    def ended(self, work: Work, told: Told) -> None:
        """It was answered in full."""

    def failed(self, work: Work, loss: Loss) -> None:
        """It came to nothing."""


class Work:
    """
    One request to a host: a prompt to answer, or nothing but a load.

    Args:
        chain: Links of the prompt: hash, tokens up to its end.
        conversation: Whose next turn will begin with this prompt and its answer.
        keep_alive_s: What the request asks for, None: nothing.
        is_load: An empty prompt.

    Attributes:
        cached: Prompt tokens that need not be evaluated.
        left: Of the prompt, weighted with what went before.
    """

    __slots__ = (
        "admitted_at",
        "began_at",
        "cached",
        "chain",
        "conversation",
        "end",
        "first_at",
        "gone",
        "is_load",
        "keep_alive_s",
        "left",
        "model",
        "output_tokens",
        "prompt_tokens",
        "runner",
        "sent_at",
        "served_at",
        "sink",
        "start",
    )

    def __init__(
        self,
        model: str,
        sink: Sink,
        prompt_tokens: int = 0,
        output_tokens: int = 0,
        *,
        chain: Sequence[tuple[int, int]] = (),
        conversation: str = "",
        keep_alive_s: float | None = None,
        is_load: bool = False,
    ) -> None:
        self.model = model
        self.sink = sink
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.chain = chain
        self.conversation = conversation
        self.keep_alive_s = keep_alive_s
        self.is_load = is_load
        self.cached = 0
        self.left = 0.0
        self.start = self.end = 0.0  # of its stream, in tokens of the runner's streams
        self.sent_at = self.served_at = self.admitted_at = self.began_at = 0.0
        self.first_at: float | None = None
        self.runner: Runner | None = None
        self.gone = False  # nobody waits for it any more

    def __str__(self) -> str:
        kind = "load" if self.is_load else f"{self.prompt_tokens}+{self.output_tokens}"
        return f"{self.model} {kind} since {self.sent_at:.3f}"


def work_of(new: int, cached: int) -> float:
    """Tokens of effort for so many new ones behind so many cached: attention grows."""
    return new * (1 + 1e-4 * (cached + 0.5 * new))


class PrefixCache:
    """Prompts a runner has evaluated, as links of chains; the least lately used go first."""

    __slots__ = ("_answers", "_capacity", "_links", "_tokens")

    def __init__(self, capacity: float) -> None:
        self._capacity = capacity
        self._links: OrderedDict[int, int] = OrderedDict()  # each link's own tokens
        self._answers: dict[int, tuple[str, int]] = {}  # behind a prompt: whose, tokens
        self._tokens = 0

    def match(self, work: Work) -> int:
        """Tokens of its prompt that are known; one is always evaluated again."""
        links, most = self._links, max(work.prompt_tokens - 1, 0)
        last = len(work.chain) - 1
        for index in range(last, -1, -1):
            link, tokens = work.chain[index]
            if link in links:
                whose, answer = self._answers.get(link, ("", 0))
                if index < last and whose and whose == work.conversation:
                    tokens += answer
                return min(tokens, most)
        return 0

    def insert(self, work: Work) -> None:
        """Its prompt was evaluated."""
        links, before = self._links, 0
        for link, tokens in work.chain:
            if link not in links:
                links[link] = tokens - before
                self._tokens += tokens - before
            before = tokens
        for link, _ in reversed(work.chain):  # what others may share goes last
            links.move_to_end(link)
        while self._tokens > self._capacity and links:
            gone, tokens = links.popitem(last=False)
            self._tokens -= tokens
            self._tokens -= self._answers.pop(gone, ("", 0))[1]

    def answered(self, work: Work) -> None:
        """Its answer stands behind its prompt: the next turn has both."""
        if work.conversation and work.chain and work.chain[-1][0] in self._links:
            link = work.chain[-1][0]
            self._tokens += work.output_tokens - self._answers.get(link, ("", 0))[1]
            self._answers[link] = (work.conversation, work.output_tokens)


class Runner:
    """
    A model in memory.

    Attributes:
        waiting: Calls that have no slot yet.
        prompts: Calls with a slot whose prompt is not evaluated; the first one is at it.
        streams: Where each ends, in tokens since the runner's beginning; the next one first.
        progress: Tokens that a stream would have had that had run from the beginning.
        used: Slots taken.
    """

    __slots__ = (
        "cache",
        "decode_rate",
        "expires_at",
        "is_watched",
        "keep_alive_s",
        "memory_gb",
        "model",
        "penalty",
        "progress",
        "prompt_rate",
        "prompt_speed",
        "prompts",
        "slots",
        "stream_speed",
        "streams",
        "used",
        "waiting",
    )

    def __init__(self, model: Model, machine: Machine) -> None:
        self.model = model
        self.slots = model.slots(machine)
        self.memory_gb = model.memory_gb(machine)
        self.prompt_rate = model.prompt_rate(machine)
        self.decode_rate = model.decode_rate(machine)
        self.penalty = machine.type.penalty
        self.keep_alive_s = KEEP_ALIVE_S
        room = HOST_CACHE_MB / model.kv_mb if model.kv_mb else 0.0
        self.cache = PrefixCache(self.slots * machine.context + room)
        self.waiting: deque[Work] = deque()
        self.prompts: deque[Work] = deque()
        self.streams: list[tuple[float, int, Work]] = []
        self.progress = 0.0
        self.prompt_speed = self.stream_speed = 0.0
        self.used = 0
        self.expires_at: float | None = None  # None: has never been idle
        self.is_watched = False  # an event will look whether its time has come

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits on it."""
        return not self.used and not self.waiting

    def respeed(self, share: float) -> None:
        """Take this share of the accelerator."""
        if self.prompts:
            self.prompt_speed = self.prompt_rate * share
            self.stream_speed = self.prompt_speed / BATCH
        else:
            crowd = 1.0 + self.penalty * (len(self.streams) - 1)
            self.stream_speed = self.decode_rate / crowd * share

    def due_in(self) -> float:
        """Seconds until a prompt is evaluated or a stream ends, at the speed it has."""
        soon = math.inf
        if self.prompts and self.prompt_speed:
            soon = self.prompts[0].left / self.prompt_speed
        if self.streams and self.stream_speed:
            soon = min(soon, (self.streams[0][0] - self.progress) / self.stream_speed)
        return max(soon, 0.0)


class Host:
    """
    One machine, alive.

    Args:
        place: Among the hosts; no two are equally near, lest chance decide who answers first.

    Attributes:
        answer_s: That it takes for a question that needs no model.
        loads: Loads begun so far.
        evictions: Models taken out of memory for another, or because somebody asked for it.
        cached_tokens, prompt_tokens: Of prompts evaluated so far.
    """

    def __init__(
        self, machine: Machine, models: Sequence[Model], timeline: Timeline, place: int = 0
    ) -> None:
        self.machine = machine
        self.answer_s = ANSWER_S + place * APART_S
        self.name = machine.name
        self.models = {model.name: model for model in models if model.fits(machine)}
        self.runners: dict[str, Runner] = {}
        self.loads = 0
        self.evictions = 0
        self.cached_tokens = self.prompt_tokens = 0
        self._timeline = timeline
        self._at = 0.0  # up to when everything has advanced
        self._factor = 1.0
        self._timer: Entry | None = None
        self._order = 0
        self._queue: deque[Work] = deque()
        self._head: Work | None = None  # of the queue: it loads, or waits for room
        self._loading: Entry | None = None
        self._free_at = -math.inf  # when memory given back may be used again
        self._victim: Runner | None = None  # the head waits until it is out
        self._silent: list[Work] = []  # came while it hung
        self._crashes = self._hangs = 0
        self._connects = True

    # -- seen from outside ---------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        return not self._crashes and not self._hangs

    @property
    def listens(self) -> bool:
        """Whether a connection comes about."""
        return not self._crashes and (self._connects or not self._hangs)

    @property
    def is_refusing(self) -> bool:
        """Whether connections are refused at once."""
        return self._crashes > 0

    def has_or_loads(self, model: str) -> bool:
        """Whether it has the model in memory, or was asked to load it."""
        if model in self.runners or (self._head is not None and self._head.model == model):
            return True
        return any(work.model == model and not work.gone for work in self._queue)

    def works(self) -> Iterator[Work]:
        """Everything that is under way and somebody waits for."""
        for runner in self.runners.values():
            yield from runner.waiting
            yield from (work for work in runner.prompts if not work.gone)
            yield from (work for _, _, work in runner.streams if not work.gone)
        if self._head is not None:
            yield self._head
        yield from (work for work in self._queue if not work.gone)
        yield from self._silent

    def tokens(self, work: Work) -> int:
        """Tokens of its answer that came so far."""
        runner = work.runner
        if work.first_at is None or runner is None:
            return 0
        ahead = (self._timeline.now - self._at) * runner.stream_speed
        grown = runner.progress + ahead - work.start + CLOSE
        return max(1, min(work.output_tokens, 1 + math.floor(grown)))

    def tags(self) -> list[dict[str, Any]]:
        """What `/api/tags` lists."""
        return [_tags_row(model) for model in self.models.values()]

    def ps(self) -> list[dict[str, Any]]:
        """What `/api/ps` lists: not what is loading; the last to expire first."""
        now = self._timeline.now
        rows = []
        for runner in self.runners.values():
            expires_at = runner.expires_at
            if expires_at is None:
                expires_at = now + runner.keep_alive_s
            rows.append((-expires_at, runner.model.name, runner))
        rows.sort(key=lambda row: row[:2])
        return [_ps_row(runner, self.machine, -at) for at, _, runner in rows]

    # -- requests ------------------------------------------------------------------------------

    def submit(self, work: Work) -> None:
        """Take a request in; its sink hears later what comes of it."""
        work.sent_at = self._timeline.now
        if self._crashes:
            self._fail(work, Loss.REFUSED, REFUSED_S)
        elif self._hangs and not self._connects:
            self._fail(work, Loss.UNREACHABLE, CONNECT_TIMEOUT_S)
        elif self._hangs:
            self._silent.append(work)
        elif work.model not in self.models:
            self._fail(work, Loss.MISSING, REFUSED_S)
        else:
            self._take(work)

    def _take(self, work: Work) -> None:
        runner = self.runners.get(work.model)
        if runner is not None:
            self._advance()
            self._serve(work, runner)
            self._respeed()
        elif len(self._queue) >= MAX_QUEUE:
            self._fail(work, Loss.BUSY, REFUSED_S)
        else:
            self._queue.append(work)
            self._next_load()

    def cancel(self, work: Work) -> None:
        """Whoever asked has left. A prompt goes on to the end of its batch, a load is lost."""
        if work.gone:
            return
        work.gone = True
        if work in self._silent:
            self._silent.remove(work)
        elif work is self._head:
            self._abort_load()
        elif work.runner is not None:
            self._advance()
            self._drop(work, work.runner)
            self._respeed()

    def unload(self, model: str) -> None:
        """An empty prompt with a keep-alive of 0: out of memory as soon as nothing runs on it."""
        runner = self.runners.get(model)
        if runner is None or not self.is_alive:
            return
        runner.keep_alive_s = 0.0
        if runner.is_idle:
            self._evict(runner)
        if runner is not self._victim:
            self.evictions += 1

    def load_now(self, model: str) -> None:
        """Have it in memory from the start."""
        runner = self.runners[model] = Runner(self.models[model], self.machine)
        self._idle(runner)

    # -- mishaps -------------------------------------------------------------------------------

    def slow(self, factor: float) -> None:
        """Run at this share of its speed from now on."""
        self._advance()
        self._factor = factor
        self._respeed()

    def crash(self) -> None:
        """Die: everything under way breaks, connections are refused."""
        self._crashes += 1
        self._break_all()

    def hang(self, *, connects: bool = True) -> None:
        """Fall silent; *connects*: connections still come about."""
        self._advance()
        self._hangs += 1
        self._connects = connects
        self._respeed()
        if self._loading is not None:
            self._timeline.cancel(self._loading)
            self._loading = None

    def recover(self, *, crashed: bool) -> None:
        """A crash, or a hang, is over; back it comes with empty memory."""
        self._break_all()
        self._crashes -= crashed
        self._hangs -= not crashed

    def _break_all(self) -> None:
        broken = list(self.works())
        self.runners.clear()
        self._queue.clear()
        self._silent.clear()
        if self._loading is not None:
            self._timeline.cancel(self._loading)
        self._head = self._loading = self._victim = None
        self._at = self._timeline.now
        self._respeed()
        for work in broken:
            work.runner = None
            self._fail(work, Loss.CUT, 0.0)

    def _fail(self, work: Work, loss: Loss, delay_s: float) -> None:
        self._timeline.after(delay_s, self._tell_failure, work, loss)

    @staticmethod
    def _tell_failure(work: Work, loss: Loss) -> None:
        if not work.gone:
            work.gone = True
            work.sink.failed(work, loss)

    # -- runners -------------------------------------------------------------------------------

    def _serve(self, work: Work, runner: Runner) -> None:
        """It has the runner; advance before, respeed after."""
        now = self._timeline.now
        work.served_at = now
        if work.keep_alive_s is not None:
            runner.keep_alive_s = work.keep_alive_s
        if work.is_load:
            self._timeline.at(now, self._loaded, work)
            if runner.is_idle:
                self._idle(runner)
            return
        work.runner = runner
        if runner.used < runner.slots:
            self._admit(work, runner)
        else:
            runner.waiting.append(work)

    @staticmethod
    def _loaded(work: Work) -> None:
        if not work.gone:
            work.gone = True
            took_s = work.served_at - work.sent_at
            work.sink.ended(work, Told(0, 0, 0, took_s, 0.0, 0.0, took_s))

    def _admit(self, work: Work, runner: Runner) -> None:
        runner.used += 1
        work.admitted_at = work.began_at = self._timeline.now
        work.cached = cached = runner.cache.match(work) if work.chain else 0
        rate = runner.prompt_rate
        work.left = (
            work_of(work.prompt_tokens - cached, cached)
            + cached * rate / REUSE_PER_S
            + FIXED_S * rate
        )
        self.prompt_tokens += work.prompt_tokens
        self.cached_tokens += cached
        runner.prompts.append(work)

    def _drop(self, work: Work, runner: Runner) -> None:
        """Out of the runner, whatever it was at."""
        if work.first_at is not None:
            runner.streams = [each for each in runner.streams if each[2] is not work]
            heapq.heapify(runner.streams)
            self._release(runner)
        elif work in runner.prompts:
            if runner.prompts[0] is work:
                work.left = min(work.left, float(BATCH))
            else:
                runner.prompts.remove(work)
                self._release(runner)
        else:
            runner.waiting.remove(work)

    def _release(self, runner: Runner) -> None:
        runner.used -= 1
        if runner.waiting:
            self._admit(runner.waiting.popleft(), runner)
        elif not runner.used:
            self._idle(runner)

    def _idle(self, runner: Runner) -> None:
        """Nothing runs on it: from now on its keep-alive counts."""
        if runner.keep_alive_s == 0.0:
            self._evict(runner)
            return
        runner.expires_at = self._timeline.now + runner.keep_alive_s
        if not runner.is_watched and runner.keep_alive_s < math.inf:
            runner.is_watched = True
            self._timeline.at(runner.expires_at, self._expire, runner)

    def _expire(self, runner: Runner) -> None:
        runner.is_watched = False
        if self.runners.get(runner.model.name) is not runner or not runner.is_idle:
            return
        expires_at = runner.expires_at
        if self._hangs or expires_at is None or expires_at == math.inf:
            return
        if expires_at <= self._timeline.now:
            self._evict(runner)
        else:
            runner.is_watched = True
            self._timeline.at(expires_at, self._expire, runner)

    def _evict(self, runner: Runner) -> None:
        """Out of memory; a load that waited for that goes on."""
        self._advance()
        del self.runners[runner.model.name]
        self._free_at = self._timeline.now + SETTLE_S
        self._respeed()
        if runner is self._victim:
            self.evictions += 1
        if self._head is not None and self._loading is None:
            self._victim = None
            # Not from within: whoever ends a call there is not done yet.
            self._timeline.at(self._timeline.now, self._make_room)

    # -- loads ---------------------------------------------------------------------------------

    def _next_load(self) -> None:
        """Whoever is next in the queue: served if its model has come meanwhile, else it loads."""
        while self._head is None and self._queue:
            work = self._queue.popleft()
            if work.gone:
                continue
            runner = self.runners.get(work.model)
            if runner is not None:
                self._advance()
                self._serve(work, runner)
                self._respeed()
                continue
            self._head = work
            self._make_room()

    def _make_room(self) -> None:
        """Take idle models out until the head's fits; where none is idle, wait for a busy one."""
        head = self._head
        if head is None or self._hangs or self._loading is not None or self._victim is not None:
            return
        model, machine = self.models[head.model], self.machine
        while self.runners:
            taken = sum(runner.memory_gb for runner in self.runners.values())
            is_roomy = len(self.runners) < machine.max_models
            if is_roomy and taken + model.memory_gb(machine) <= machine.type.memory_gb:
                break
            victim = min(
                self.runners.values(),
                key=lambda r: (not r.is_idle, r.keep_alive_s, r.model.name),
            )
            if not victim.is_idle:
                victim.keep_alive_s = 0.0
                self._victim = victim
                return
            self.evictions += 1
            del self.runners[victim.model.name]
            self._free_at = self._timeline.now + SETTLE_S
        settle_s = max(0.0, self._free_at - self._timeline.now)
        load_s = model.file_gb / machine.type.load_gb_s + LOAD_EXTRA_S + settle_s
        self.loads += 1
        self._loading = self._timeline.after(load_s, self._load_done)

    def _load_done(self) -> None:
        head, self._head, self._loading = self._head, None, None
        assert head is not None  # noqa: S101 - whoever loads is at the head
        runner = self.runners[head.model] = Runner(self.models[head.model], self.machine)
        self._advance()
        self._serve(head, runner)
        self._respeed()
        self._next_load()

    def _abort_load(self) -> None:
        """Whoever it was for has left: what was loaded so far is lost."""
        if self._loading is not None:
            self._timeline.cancel(self._loading)
        self._head = self._loading = None
        victim, self._victim = self._victim, None
        if victim is not None and victim.is_idle:
            self._evict(victim)
        self._next_load()

    # -- time ----------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Let everything run up to now, at the speeds it has."""
        now = self._timeline.now
        passed_s = now - self._at
        self._at = now
        if passed_s <= 0.0:
            return
        for runner in self.runners.values():
            if runner.prompts:
                runner.prompts[0].left -= passed_s * runner.prompt_speed
            if runner.streams:
                runner.progress += passed_s * runner.stream_speed

    def _respeed(self) -> None:
        """Share the accelerator anew, and come back when the next thing is done."""
        timer = self._timer
        if timer is not None:
            timer[2] = None
            self._timer = None
        busy = [runner for runner in self.runners.values() if runner.used]
        if not busy:
            return
        share = 0.0 if self._hangs else self._factor / len(busy)
        soon = math.inf
        for runner in busy:
            runner.respeed(share)
            soon = min(soon, runner.due_in())
        if soon < math.inf:
            self._timer = self._timeline.at(self._timeline.now + soon, self._tick)

    def _tick(self) -> None:
        """Something is done: a prompt or a stream."""
        self._timer = None
        self._advance()
        firsts: list[Work] = []
        ends: list[Work] = []
        for runner in list(self.runners.values()):
            self._settle(runner, firsts, ends)
        self._respeed()
        for work in firsts:
            if not work.gone:
                work.sink.first(work)
        for work in ends:
            if not work.gone:
                self._tell_end(work)

    def _settle(self, runner: Runner, firsts: list[Work], ends: list[Work]) -> None:
        """Move on what is done there."""
        now = self._timeline.now
        while runner.streams and runner.streams[0][0] - runner.progress <= CLOSE:
            work = heapq.heappop(runner.streams)[2]
            runner.cache.answered(work)
            work.runner = None
            ends.append(work)
            self._release(runner)
        if runner.prompts and runner.prompts[0].left <= CLOSE:
            work = runner.prompts.popleft()
            if runner.prompts:
                runner.prompts[0].began_at = now
            if work.gone:
                self._release(runner)
                return
            runner.cache.insert(work)
            work.first_at = now
            firsts.append(work)
            if work.output_tokens <= 1:
                work.runner = None
                ends.append(work)
                self._release(runner)
                return
            work.start = runner.progress
            work.end = runner.progress + work.output_tokens - 1
            self._order += 1
            heapq.heappush(runner.streams, (work.end, self._order, work))

    def _tell_end(self, work: Work) -> None:
        work.gone = True
        now, first_at = self._timeline.now, work.first_at
        assert first_at is not None  # noqa: S101 - whatever ended had begun
        told = Told(
            work.prompt_tokens,
            work.output_tokens,
            work.cached,
            work.served_at - work.sent_at,
            first_at - work.began_at,
            now - first_at,
            now - work.sent_at,
        )
        work.sink.ended(work, told)


# -- lists -------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def digest(name: str) -> str:
    """The digest of a model of that name."""
    return hashlib.sha256(name.encode()).hexdigest()


@lru_cache(maxsize=4096)
def instant(at: float) -> str:
    """Virtual seconds as a wall time."""
    try:
        return (_EPOCH + timedelta(seconds=at)).isoformat().replace("+00:00", "Z")
    except OverflowError:  # as Ollama writes what never expires
        return "2318-01-01T00:00:00Z"


def _details(model: Model) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": f"{model.params_b:g}B",
        "quantization_level": "Q4_K_M",
    }


def _tags_row(model: Model) -> dict[str, Any]:
    return {
        "name": model.shown,
        "model": model.shown,
        "modified_at": instant(0.0),
        "size": round(model.file_gb * 1e9),
        "digest": digest(model.name),
        "details": {**_details(model), "context_length": TRAINED, "embedding_length": 4096},
        "capabilities": ["embedding" if model.embedding else "completion"],
    }


def _ps_row(runner: Runner, machine: Machine, expires_at: float) -> dict[str, Any]:
    model = runner.model
    size = round(runner.memory_gb * 1e9)
    return {
        "name": model.shown,
        "model": model.shown,
        "size": size,
        "digest": digest(model.name),
        "details": _details(model),
        "expires_at": instant(expires_at),
        "size_vram": 0 if machine.type is HOST_TYPES["cpu"] else size,
        "context_length": machine.context,
    }
