"""The physics of a simulated host, against what a hand can compute."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from balancer.sim.machine import (
    HOST_TYPES,
    MAX_QUEUE,
    Host,
    HostType,
    Loss,
    Machine,
    Model,
    Told,
    Work,
    work_of,
)
from balancer.sim.timeline import Timeline

# A thousand tokens of a prompt and a hundred of an answer in a second, a gigabyte loaded in one.
ROUND = HostType("round", 1000.0, 100.0, 20.0, 1.0, 0.5)
PROMPT_S = 0.1205  # a hundred tokens: 100 * (1 + 0.0001 * 50) and 20 ms


@dataclass(eq=False)
class Ear:
    """Whoever asks, and when what was heard."""

    timeline: Timeline
    first_at: float | None = None
    ended_at: float | None = None
    told: Told | None = None
    loss: Loss | None = None

    def first(self, _: Work) -> None:
        """The first token."""
        self.first_at = self.timeline.now

    def ended(self, _: Work, told: Told) -> None:
        """The end."""
        self.ended_at, self.told = self.timeline.now, told

    def failed(self, _: Work, loss: Loss) -> None:
        """Nothing."""
        self.ended_at, self.loss = self.timeline.now, loss


@dataclass
class Stage:
    """One host and its time."""

    slots: int = 2
    max_models: int = 3
    models: tuple[Model, ...] = (Model("a"), Model("b"), Model("c"))
    timeline: Timeline = field(default_factory=Timeline)

    def __post_init__(self) -> None:
        machine = Machine("h", ROUND, self.slots, 1024, self.max_models)
        self.host = Host(machine, self.models, self.timeline)

    def warm(self, *models: str) -> Stage:
        """With these in memory."""
        for model in models:
            self.host.load_now(model)
        return self

    def ask(
        self,
        model: str = "a",
        prompt: int = 100,
        output: int = 11,
        chain: tuple[tuple[int, int], ...] = (),
        conversation: str = "",
    ) -> tuple[Work, Ear]:
        """One call, now."""
        ear = Ear(self.timeline)
        work = Work(model, ear, prompt, output, chain=chain, conversation=conversation)
        self.host.submit(work)
        return work, ear

    def load(self, model: str, keep_alive_s: float | None = None) -> tuple[Work, Ear]:
        """An empty prompt, now."""
        ear = Ear(self.timeline)
        work = Work(model, ear, keep_alive_s=keep_alive_s, is_load=True)
        self.host.submit(work)
        return work, ear

    def until(self, at: float) -> None:
        """Let time pass."""
        self.timeline.run(at)

    @property
    def listed(self) -> list[str]:
        """What `/api/ps` shows."""
        return [row["name"] for row in self.host.ps()]


# -- prompts and streams -----------------------------------------------------------------------


def test_one_stream_alone() -> None:
    """The prompt at its rate, then a token less than the answer has at its own."""
    stage = Stage().warm("a")
    _, ear = stage.ask()
    stage.until(10)
    assert ear.first_at == pytest.approx(PROMPT_S)
    assert ear.ended_at == pytest.approx(PROMPT_S + 0.1)
    assert ear.told is not None
    assert (ear.told.prompt_tokens, ear.told.output_tokens) == (100, 11)
    assert ear.told.prompt_s == pytest.approx(PROMPT_S)
    assert ear.told.decode_s == pytest.approx(0.1)
    assert ear.told.total_s == pytest.approx(PROMPT_S + 0.1)


def test_tokens_are_told_as_they_come() -> None:
    """One with the first byte, the rest at the stream's speed, never more than there are."""
    stage = Stage().warm("a")
    work, _ = stage.ask()
    stage.until(0.1)
    assert stage.host.tokens(work) == 0
    stage.until(PROMPT_S + 0.055)
    assert stage.host.tokens(work) == 6


def test_a_prompt_stalls_the_other_streams() -> None:
    """The first answers a token per batch while the second is read, then both share."""
    stage = Stage().warm("a")
    _, one = stage.ask()
    _, two = stage.ask()
    stage.until(10)
    assert one.first_at == pytest.approx(PROMPT_S)
    assert two.first_at == pytest.approx(2 * PROMPT_S)
    meanwhile = PROMPT_S * 1000 / 512
    first_ends = 2 * PROMPT_S + (10 - meanwhile) / (100 / 1.5)
    assert one.ended_at == pytest.approx(first_ends)
    assert two.ended_at == pytest.approx(first_ends + meanwhile / 100)


def test_beyond_the_slots_calls_wait_in_order() -> None:
    """The runner's own queue: a slot is held from admission to the end."""
    stage = Stage(slots=1).warm("a")
    ears = [stage.ask()[1] for _ in range(3)]
    stage.until(10)
    each = PROMPT_S + 0.1
    assert [ear.ended_at for ear in ears] == [pytest.approx(each * n) for n in (1, 2, 3)]
    assert ears[2].told is not None
    assert ears[2].told.load_s == 0.0
    assert ears[2].told.total_s == pytest.approx(3 * each)


def test_two_models_share_the_accelerator() -> None:
    """Half of it each, as long as both have work."""
    stage = Stage().warm("a", "b")
    _, one = stage.ask("a", output=1)
    _, two = stage.ask("b", output=1)
    stage.until(10)
    assert one.first_at == two.first_at == pytest.approx(2 * PROMPT_S)


def test_a_straggler_is_slower_from_then_on() -> None:
    """What was done before stays done."""
    stage = Stage().warm("a")
    _, ear = stage.ask(output=1)
    stage.until(PROMPT_S / 2)
    stage.host.slow(0.2)
    stage.until(10)
    assert ear.first_at == pytest.approx(PROMPT_S / 2 + 5 * PROMPT_S / 2)


def test_size_sets_the_speed() -> None:
    """A prompt by parameters, a stream by the size of the file, both within bounds."""
    machine = Machine("h", HOST_TYPES["rtx3090"])
    assert Model("m", 9.8, 16.0).prompt_rate(machine) == 1930.0
    assert Model("m", 9.8, 16.0).decode_rate(machine) == pytest.approx(112 * 0.5**0.95)
    tiny = Model("m", 0.1, 0.1)
    assert tiny.prompt_rate(machine) == 12 * 3860.0
    assert tiny.decode_rate(machine) == 6 * 112.0


def test_an_embedding_ends_with_its_first_byte() -> None:
    """And takes one slot, whatever the host is set to."""
    stage = Stage(slots=4, models=(Model("e", 0.3, 8.0, embedding=True),)).warm("e")
    _, one = stage.ask("e", output=0)
    _, two = stage.ask("e", output=0)
    assert stage.host.runners["e"].used == 1
    stage.until(10)
    assert one.first_at == one.ended_at == pytest.approx(PROMPT_S)
    assert two.ended_at == pytest.approx(2 * PROMPT_S)


# -- hanging up --------------------------------------------------------------------------------


def test_a_stream_that_is_dropped_frees_its_slot() -> None:
    """At once, and its caller hears nothing more."""
    stage = Stage(slots=1).warm("a")
    work, ear = stage.ask(output=1000)
    _, next_ = stage.ask(output=1)
    stage.until(1.0)
    stage.host.cancel(work)
    stage.until(10)
    assert next_.first_at == pytest.approx(1.0 + PROMPT_S)
    assert ear.ended_at is None


def test_a_prompt_that_is_dropped_goes_on_to_the_end_of_its_batch() -> None:
    """512 tokens of effort more."""
    stage = Stage(slots=1).warm("a")
    work, ear = stage.ask(prompt=4000)
    _, next_ = stage.ask(output=1)
    stage.until(1.0)
    stage.host.cancel(work)
    stage.until(10)
    assert next_.first_at == pytest.approx(1.0 + 0.512 + PROMPT_S)
    assert ear.first_at is None


def test_who_waits_and_leaves_is_forgotten() -> None:
    """A place in the runner's queue costs nobody anything."""
    stage = Stage(slots=1).warm("a")
    stage.ask()
    waiting, _ = stage.ask(output=1000)
    _, last = stage.ask(output=1)
    stage.host.cancel(waiting)
    stage.until(10)
    assert last.first_at == pytest.approx(2 * PROMPT_S + 0.1)


# -- loads -------------------------------------------------------------------------------------


def test_a_load_takes_its_time_and_the_call_follows() -> None:
    """A second and the file's size; then the prompt; while it loads nothing is listed."""
    stage = Stage()
    _, ear = stage.ask(output=1)
    stage.until(5.0)
    assert stage.listed == []
    assert stage.host.has_or_loads("a")
    stage.until(10)
    assert ear.first_at == pytest.approx(5.9 + PROMPT_S)
    assert ear.told is not None
    assert ear.told.load_s == pytest.approx(5.9)
    assert stage.listed == ["a:latest"]


def test_loads_are_one_at_a_time_and_the_head_blocks() -> None:
    """A queued call for what has just come waits behind the next load; residents do not."""
    stage = Stage()
    _, one = stage.ask("a", output=1)
    _, two = stage.ask("b", output=1)
    _, three = stage.ask("a", output=1)
    stage.until(7.0)
    _, resident = stage.ask("a", output=1)
    stage.until(30)
    assert one.first_at == pytest.approx(5.9 + PROMPT_S)
    assert two.first_at == pytest.approx(11.8 + 2 * PROMPT_S)  # `three` is read at the same time
    assert three.first_at == pytest.approx(11.8 + 2 * PROMPT_S)
    assert resident.first_at == pytest.approx(7.0 + PROMPT_S)


def test_the_idle_model_of_least_keep_alive_makes_room() -> None:
    """By name where that is equal; memory is free half a second later."""
    stage = Stage(max_models=2).warm("a", "b")
    stage.load("a", keep_alive_s=1000.0)
    _, ear = stage.ask("c", output=1)
    stage.until(30)
    assert sorted(stage.listed) == ["a:latest", "c:latest"]
    assert stage.host.evictions == 1
    assert ear.first_at == pytest.approx(5.9 + 0.5 + PROMPT_S)


def test_memory_makes_room_too() -> None:
    """Three of 6 GB fit into 20, a fourth does not, though a hundred models may be loaded."""
    models = tuple(Model(name) for name in "abcd")
    stage = Stage(max_models=100, models=models).warm("a", "b", "c")
    stage.ask("d")
    stage.until(30)
    assert sorted(stage.listed) == ["b:latest", "c:latest", "d:latest"]


def test_a_model_that_fits_nowhere_is_not_there() -> None:
    """It is not listed, and a call for it is told so."""
    stage = Stage(models=(Model("huge", 30.0),))
    _, ear = stage.ask("huge")
    stage.until(1)
    assert stage.host.tags() == []
    assert ear.loss is Loss.MISSING


def test_a_busy_victim_drains_and_takes_calls_meanwhile() -> None:
    """Which keeps the load waiting, until nothing runs there."""
    stage = Stage(max_models=1).warm("a")
    stage.ask("a", output=101)
    _, cold = stage.ask("b", output=1)
    stage.until(1.0)
    _, late = stage.ask("a", output=101)
    stage.until(30)
    assert late.ended_at is not None
    assert cold.first_at == pytest.approx(late.ended_at + 0.5 + 5.9 + PROMPT_S)
    assert stage.listed == ["b:latest"]


def test_a_load_whose_caller_leaves_is_lost() -> None:
    """The next one in the queue begins from nothing."""
    stage = Stage()
    work, _ = stage.ask("a")
    _, next_ = stage.ask("a", output=1)
    stage.until(5.0)
    stage.host.cancel(work)
    stage.until(20)
    assert next_.first_at == pytest.approx(5.0 + 5.9 + PROMPT_S)
    assert stage.host.loads == 2


def test_a_full_queue_for_loads_answers_503() -> None:
    """The one in hand and 512 more; residents are served all the same."""
    stage = Stage().warm("a")
    waiting = [stage.ask("b")[1] for _ in range(MAX_QUEUE + 1)]
    _, refused = stage.ask("b")
    _, resident = stage.ask("a", output=1)
    stage.until(1.0)
    assert refused.loss is Loss.BUSY
    assert resident.first_at == pytest.approx(PROMPT_S)
    assert not [ear for ear in waiting if ear.loss]


def test_an_empty_prompt_loads_and_nothing_else() -> None:
    """It is answered when the model is there, at once if it is; its keep-alive sticks."""
    stage = Stage()
    _, cold = stage.load("a", keep_alive_s=1000.0)
    stage.until(10)
    _, warm = stage.load("a")
    stage.until(900)
    assert cold.ended_at == pytest.approx(5.9)
    assert warm.ended_at == 10
    assert stage.listed == ["a:latest"]
    stage.until(1010.1)
    assert stage.listed == []


def test_unloading_waits_for_what_runs() -> None:
    """Idle it goes at once, busy when it is done."""
    stage = Stage().warm("a", "b")
    _, ear = stage.ask("a", output=101)
    stage.host.unload("a")
    stage.host.unload("b")
    assert stage.listed == ["a:latest"]
    stage.until(10)
    assert ear.ended_at == pytest.approx(PROMPT_S + 1.0)
    assert stage.listed == []


def test_keep_alive_counts_from_the_last_end() -> None:
    """Five minutes; and `/api/ps` shows the time of the last idle start while it is busy."""
    stage = Stage().warm("a")
    stage.until(200)
    stage.ask(output=1)
    assert stage.host.ps()[0]["expires_at"].startswith("2026-01-01T00:05:00")
    stage.until(499)
    assert stage.listed == ["a:latest"]
    stage.until(501)
    assert stage.listed == []


# -- what is cached ----------------------------------------------------------------------------


def test_a_known_prefix_is_not_evaluated_again() -> None:
    """Only the rest, behind what is known, which is copied."""
    stage = Stage().warm("a")
    stage.ask(prompt=200, output=1, chain=((1, 100), (2, 200)))
    stage.until(10)
    _, ear = stage.ask(prompt=300, output=1, chain=((1, 100), (2, 200), (3, 300)))
    stage.until(20)
    assert ear.told is not None
    assert ear.told.cached == 200
    effort = work_of(100, 200) + 200 * 1000 / 60_000 + 20
    assert ear.first_at == pytest.approx(10 + effort / 1000)


def test_the_next_turn_knows_the_answer_too() -> None:
    """Of its own conversation; another one that begins alike does not."""
    stage = Stage().warm("a")
    stage.ask(prompt=200, output=50, chain=((1, 200),), conversation="mine")
    stage.until(10)
    _, mine = stage.ask(prompt=300, chain=((1, 200), (2, 300)), conversation="mine")
    _, other = stage.ask(prompt=300, chain=((1, 200), (3, 300)), conversation="other")
    stage.until(20)
    assert mine.told is not None
    assert other.told is not None
    assert (mine.told.cached, other.told.cached) == (250, 200)


def test_one_token_is_always_evaluated() -> None:
    """The same prompt again."""
    stage = Stage().warm("a")
    for at in (10, 20):
        _, ear = stage.ask(prompt=200, output=1, chain=((1, 200),))
        stage.until(at)
    assert ear.told is not None
    assert ear.told.cached == 199


def test_the_cache_forgets_the_least_lately_used_and_all_with_the_model() -> None:
    """It holds so many tokens as it has room for."""
    stage = Stage(models=(Model("a", kv_mb=8192.0),)).warm()
    model = Model("a", kv_mb=0.0)
    stage.host.models["a"] = model  # room for its context alone: 2048 tokens
    stage.host.load_now("a")
    for link in (1, 2, 3):
        stage.ask(prompt=1000, output=1, chain=((link, 1000),))
        stage.until(stage.timeline.now + 10)
    cache = stage.host.runners["a"].cache
    known = [
        cache.match(Work("a", Ear(stage.timeline), 1001, 1, chain=((link, 1000),)))
        for link in (1, 2, 3)
    ]
    assert known == [0, 1000, 1000]
    stage.host.unload("a")
    stage.host.load_now("a")
    _, ear = stage.ask(prompt=1001, output=1, chain=((3, 1000), (4, 1001)))
    stage.until(stage.timeline.now + 10)
    assert ear.told is not None
    assert ear.told.cached == 0


# -- mishaps -----------------------------------------------------------------------------------


def test_a_crash_breaks_everything_and_refuses() -> None:
    """Streams, waiting calls and loads; back it comes empty."""
    stage = Stage(slots=1).warm("a")
    ears = [stage.ask(output=1000)[1], stage.ask()[1], stage.ask("b")[1]]
    stage.until(1.0)
    stage.host.crash()
    _, refused = stage.ask()
    stage.until(2.0)
    assert [ear.loss for ear in ears] == [Loss.CUT] * 3
    assert refused.loss is Loss.REFUSED
    assert refused.ended_at == pytest.approx(1.005)
    stage.host.recover(crashed=True)
    assert stage.host.is_alive
    assert stage.listed == []
    _, again = stage.ask(output=1)
    stage.until(20)
    assert again.first_at == pytest.approx(2.0 + 5.9 + PROMPT_S)


def test_a_hang_is_silence() -> None:
    """Nothing moves and nothing is answered, until its connections break as it comes back."""
    stage = Stage().warm("a")
    work, running = stage.ask(output=1000)
    _, loading = stage.ask("b")
    stage.until(1.0)
    stage.host.hang()
    before = stage.host.tokens(work)
    _, silent = stage.ask()
    stage.until(50.0)
    assert stage.host.tokens(work) == before
    assert not stage.host.is_alive
    assert stage.host.listens
    assert running.ended_at is loading.ended_at is silent.ended_at is None
    stage.host.recover(crashed=False)
    stage.until(51.0)
    assert [ear.loss for ear in (running, loading, silent)] == [Loss.CUT] * 3
    assert stage.listed == []


def test_a_hang_may_swallow_connections_too() -> None:
    """Then whoever tries to connect gives up after two seconds."""
    stage = Stage().warm("a")
    stage.host.hang(connects=False)
    _, ear = stage.ask()
    stage.until(10)
    assert not stage.host.listens
    assert (ear.loss, ear.ended_at) == (Loss.UNREACHABLE, 2.0)


def test_two_mishaps_at_once_are_over_when_both_are() -> None:
    """A crash within a hang, say."""
    stage = Stage()
    stage.host.hang()
    stage.host.crash()
    stage.host.recover(crashed=False)
    assert stage.host.is_refusing
    stage.host.recover(crashed=True)
    assert stage.host.is_alive


def test_a_connection_that_broke_as_its_caller_left_is_told_once() -> None:
    """And takes nothing down with it."""
    stage = Stage().warm("a")
    work, ear = stage.ask(output=1000)
    stage.until(1.0)
    stage.host.crash()
    stage.host.cancel(work)
    stage.until(2.0)
    assert ear.loss is None
