"""The host's rules, in a time that the test moves."""

import math
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.sim.host import GIB, QUEUE_FULL, Call, Host, Job, Phase, Settings, SimModel

PACE: dict[str, Any] = {"prompt_tps": 100.0, "decode_tps": 10.0}
INSTANT = Settings(overhead_s=0.0)


class World:
    """A host and the clock it lives by."""

    def __init__(self, *models: SimModel, settings: Settings = INSTANT) -> None:
        self.now = 0.0
        self.host = Host(models, clock=lambda: self.now, rng=Random(1), settings=settings)

    def run(self, name: str, *, tokens: int = 10, **more: Any) -> Call:
        """A call that takes 1 s for its prompt and 0.1 s for each token."""
        job = Job(name, prompt_tokens=more.pop("prompt_tokens", 100), output_tokens=tokens, **more)
        return self.host.submit(job)

    def until(self, at: float) -> None:
        """Lets everything happen that is due by then, each at its time."""
        while (due := self.host.next_at()) is not None and due <= at:
            self.now = max(self.now, due)
            self.host.advance()
        self.now = at
        self.host.advance()

    def settle(self) -> None:
        """Lets everything happen but the end of keep-alive."""
        while self.host.running and (due := self.host.next_at()) is not None:
            self.until(due)

    def loaded(self) -> list[str]:
        """Names of the loaded models as `ps` lists them."""
        return [runner.model.name for runner in self.host.loaded()]


def model(name: str, **more: Any) -> SimModel:
    """A model with a round pace."""
    return SimModel(name, **(PACE | more))


def test_times_add_up() -> None:
    """Total is load, wait, prompt and eval together, each as the model's pace has it."""
    world = World(model("m", load_s=2.0))
    first, second = world.run("m"), world.run("m")
    world.settle()
    assert (first.load_s, first.wait_s, first.prompt_s, first.eval_s) == (2.0, 0.0, 1.0, 1.0)
    assert (second.load_s, second.wait_s) == (2.0, 2.0)
    for call in (first, second):
        assert call.ending == "done"
        assert call.total_s == call.load_s + call.wait_s + call.prompt_s + call.eval_s


def test_tokens_come_one_by_one() -> None:
    """Between changes of phase the call itself says what is out and when the next one is due."""
    world = World(model("m"))
    call = world.run("m")
    world.until(1.35)
    assert call.phase is Phase.DECODE
    assert call.produced(world.now) == 3
    assert call.due_at(4) == pytest.approx(1.4)
    assert call.due_at(11) == math.inf


def test_one_load_at_a_time_while_loaded_models_answer() -> None:
    """A load holds up other loads but no call to a model that is there."""
    world = World(model("a"), model("b", load_s=10.0), model("c", load_s=10.0))
    world.run("a")
    world.settle()
    slow, slower, quick = world.run("b"), world.run("c"), world.run("a")
    world.until(world.now + 2.0)
    assert quick.ended
    assert (slow.phase, slower.phase) == (Phase.LOADING, Phase.QUEUED)
    assert world.host.loading == "b"
    world.settle()
    assert slower.load_s == pytest.approx(20.0)


def test_queue_full_counts_only_those_waiting_for_a_load() -> None:
    """One load in hand and `max_queue` waiting; the next is refused, a loaded model never is."""
    world = World(
        model("a"), model("b", load_s=9.0), settings=Settings(overhead_s=0.0, max_queue=2)
    )
    world.run("a")
    world.settle()
    waiting = [world.run("b") for _ in range(3)]
    refused = world.run("b")
    served = [world.run("a") for _ in range(20)]
    world.until(world.now + 0.5)
    assert refused.refusal is not None
    assert (refused.refusal.status, refused.refusal.text) == (503, QUEUE_FULL)
    assert not any(call.ended for call in waiting)
    world.settle()
    assert {call.ending for call in waiting + served} == {"done"}


def test_slots_are_filled_in_order() -> None:
    """NUM_PARALLEL calls run, the others follow first come first served."""
    world = World(model("m"), settings=Settings(overhead_s=0.0, num_parallel=2))
    calls = [world.run("m") for _ in range(5)]
    world.settle()
    assert [call.slot_at for call in calls] == [0.0, 0.0, 2.0, 2.0, 4.0]


def test_an_embedding_model_has_one_slot() -> None:
    """Whatever NUM_PARALLEL says."""
    embedder = model("e", capabilities=("embedding",))
    world = World(embedder, settings=Settings(overhead_s=0.0, num_parallel=4))
    calls = [world.run("e", kind="embed") for _ in range(2)]
    world.settle()
    assert [call.ended_at for call in calls] == [1.0, 2.0]


def test_another_context_reloads() -> None:
    """The model is loaded again when a runner option differs, sampling aside."""
    world = World(model("m", load_s=1.0))
    world.run("m")
    world.settle()
    world.run("m", num_ctx=8192)
    world.settle()
    world.run("m", num_ctx=8192, options=(("num_gpu", 3),))
    world.settle()
    assert world.host.counts["loads_finished"] == 3
    assert len(world.loaded()) == 1


def test_keep_alive_starts_when_the_last_call_ends() -> None:
    """The default is five minutes; a call's own value sticks to the model."""
    world = World(model("m"))
    world.run("m")
    world.settle()
    ended = world.now
    world.until(ended + 299.0)
    assert world.loaded() == ["m"]
    world.run("m", keep_alive_s=10.0)
    world.settle()
    world.run("m")
    world.settle()
    world.until(world.now + 9.0)
    assert world.loaded() == ["m"]
    world.until(world.now + 2.0)
    assert world.loaded() == []


def test_keep_alive_zero_and_for_ever() -> None:
    """0 unloads with the last call, a negative value never."""
    world = World(model("a"), model("b"))
    world.run("a", keep_alive_s=0.0)
    world.run("b", keep_alive_s=-1.0)
    world.settle()
    assert world.loaded() == ["b"]
    world.until(1e7)
    assert world.loaded() == ["b"]


def test_expiry_shown_stands_still_while_busy() -> None:
    """At first it reads now + keep-alive, later the end of the last idle spell stays."""
    world = World(model("m"))
    world.run("m", tokens=1000)
    world.until(5.0)
    runner = world.host.loaded()[0]
    assert world.host.expires_at(runner) == 305.0
    world.settle()
    idle_since = world.now
    world.run("m", tokens=1000)
    world.until(world.now + 50.0)
    assert world.host.expires_at(runner) == idle_since + 300.0


def test_unload_waits_for_the_busy_and_needs_no_loaded_model() -> None:
    """An unload request is never an error and never ends a call."""
    world = World(model("m"))
    world.host.unload("m")
    call = world.run("m")
    world.until(0.5)
    world.host.unload("m")
    assert world.loaded() == ["m"]
    world.settle()
    assert call.ending == "done"
    assert world.loaded() == []


def test_a_model_being_loaded_is_not_listed() -> None:
    """`ps` shows nothing of a load in progress."""
    world = World(model("m", load_s=5.0))
    world.run("m")
    world.until(4.0)
    assert world.loaded() == []
    world.until(5.5)
    assert world.loaded() == ["m"]


def test_idle_models_are_evicted_by_keep_alive() -> None:
    """Among the idle the one with the shortest keep-alive goes first."""
    world = World(*map(model, "abc"), settings=Settings(overhead_s=0.0, max_loaded=2))
    world.run("a", keep_alive_s=100.0)
    world.run("b", keep_alive_s=50.0)
    world.settle()
    world.run("c")
    world.settle()
    assert sorted(world.loaded()) == ["a", "c"]


def test_the_idle_go_before_the_busy() -> None:
    """However short the keep-alive of the busy one is."""
    world = World(*map(model, "abc"), settings=Settings(overhead_s=0.0, max_loaded=2))
    world.run("a", keep_alive_s=100.0)
    world.settle()
    busy = world.run("b", keep_alive_s=1.0)
    wanted = world.run("c")
    world.settle()
    assert busy.ending == "done"
    assert wanted.runner_at == 2.0


def test_a_busy_victim_is_waited_for_and_goes_on_being_used() -> None:
    """Calls to the victim keep taking the fast path, and starve the load."""
    world = World(*map(model, "ab"), settings=Settings(overhead_s=0.0, max_loaded=1))
    world.run("a")
    world.until(0.5)
    starved = world.run("b")
    more = world.run("a")
    world.until(3.9)
    assert not more.ended
    assert starved.runner_at is None
    world.until(4.1)
    assert more.ended
    assert world.loaded() == ["b"]


def test_a_keep_alive_given_to_the_victim_holds_up_the_load() -> None:
    """It arms the timer again, and the load waits for that to run out."""
    world = World(*map(model, "ab"), settings=Settings(overhead_s=0.0, max_loaded=1))
    world.run("a")
    world.until(0.5)
    starved = world.run("b")
    world.run("a", keep_alive_s=60.0)
    world.settle()
    assert starved.runner_at == pytest.approx(64.0)


def test_vram_decides_how_many_fit() -> None:
    """A load evicts unless it needs at most 80 % of what is free."""
    fits = Settings(overhead_s=0.0, vram_bytes=10 * GIB)
    world = World(
        model("a", size_bytes=4 * GIB),
        model("b", size_bytes=4 * GIB),
        model("c", size_bytes=2 * GIB),
        settings=fits,
    )
    for name in "abc":
        world.run(name)
        world.settle()
    assert len(world.loaded()) == 2
    assert "c" in world.loaded()


def test_a_model_too_big_for_the_gpu_is_slow_and_no_error() -> None:
    """Half on the CPU: `size_vram` is half the size, and tokens take 5.5 times as long."""
    world = World(
        model("m", size_bytes=8 * GIB), settings=Settings(overhead_s=0.0, vram_bytes=4 * GIB)
    )
    call = world.run("m")
    world.settle()
    runner = world.host.loaded()[0]
    assert (runner.size_bytes, runner.vram_bytes) == (8 * GIB, 4 * GIB)
    assert call.eval_s == pytest.approx(5.5)


def test_hanging_up_aborts_the_load() -> None:
    """The load is thrown away, the next in the queue starts from zero."""
    world = World(model("m", load_s=10.0))
    first, second = world.run("m"), world.run("m")
    world.until(9.0)
    world.host.cancel(first)
    world.until(18.9)
    assert second.phase is Phase.LOADING
    world.settle()
    assert (first.ending, second.ending) == ("gone", "done")
    assert world.host.counts["loads_aborted"] == 1


def test_hanging_up_frees_the_slot() -> None:
    """The next call starts at once, whether the other was running or waiting."""
    world = World(model("m"))
    first, waiting, last = world.run("m", tokens=1000), world.run("m"), world.run("m")
    world.until(5.0)
    world.host.cancel(waiting)
    world.host.cancel(first)
    world.settle()
    assert last.slot_at == 5.0
    assert first.produced(world.now) == 40


def test_a_known_prefix_is_not_read_again() -> None:
    """Only what follows the longest known prefix costs time; under a tenth nothing is reused."""
    world = World(model("m"))
    turn = tuple(range(50))
    world.run("m", blocks=turn)
    world.settle()
    again = world.run("m", blocks=turn + tuple(range(100, 150)))
    other = world.run("m", blocks=(0, 1, *range(200, 248)))
    same = world.run("m", blocks=turn)
    world.settle()
    assert again.cached_tokens == 50
    assert again.prompt_s == pytest.approx(0.5)
    assert other.cached_tokens == 0
    assert same.cached_tokens == 99


def test_names_meet_in_any_case_and_with_defaults() -> None:
    """`library/M:LATEST` is the model `m`."""
    world = World(model("m"))
    assert world.host.find("library/M:LATEST") is world.host.models[0]
    with pytest.raises(KeyError):
        world.run("n")


def test_decoding_together_slows_each() -> None:
    """With the square root, four streams together are twice as fast as one."""
    world = World(model("m"), settings=Settings(overhead_s=0.0, num_parallel=4, batch_slowdown=0.5))
    calls = [world.run("m") for _ in range(4)]
    world.settle()
    assert [call.eval_s for call in calls] == [pytest.approx(2.0)] * 4


def test_slowing_down_changes_running_calls() -> None:
    """What is out stays out, the rest takes longer."""
    world = World(model("m"))
    call = world.run("m")
    world.until(1.5)
    world.host.faults.slow(4.0)
    assert call.produced(world.now) == 5
    world.settle()
    assert call.ended_at == pytest.approx(3.5)


def test_freeze_stops_work_but_not_keep_alive() -> None:
    """A frozen host's work goes on where it stood; the idle timeout passed meanwhile."""
    world = World(model("idle"), model("m", load_s=5.0))
    world.run("idle", keep_alive_s=10.0)
    world.settle()
    call = world.run("m")
    started = world.now
    world.until(started + 3.0)
    world.host.faults.freeze()
    world.until(started + 103.0)
    assert world.host.next_at() is None
    assert call.phase is Phase.LOADING
    assert "idle" in world.loaded()
    world.host.faults.heal()
    assert "idle" not in world.loaded()
    world.settle()
    assert call.ended_at == pytest.approx(started + 107.0)


def test_freeze_holds_back_tokens() -> None:
    """No token comes out of a frozen stream."""
    world = World(model("m"))
    call = world.run("m")
    world.until(1.45)
    world.host.faults.freeze()
    world.until(60.0)
    assert call.produced(world.now) == 4
    assert call.due_at(5) == math.inf
    world.host.faults.heal()
    assert call.due_at(5) == pytest.approx(60.05)


@pytest.mark.parametrize("end", ["cut", "reset", "no_done"])
def test_streams_end_early(end: str) -> None:
    """The stream fault ends the call after so many tokens, as often as asked for."""
    world = World(model("m"))
    world.host.faults.apply(end, 3, 1)
    struck, spared = world.run("m"), world.run("m")
    world.settle()
    assert (struck.ending, struck.produced(world.now)) == (end, 3)
    assert (spared.ending, spared.produced(world.now)) == ("done", 10)


def test_a_stall_holds_the_slot_until_the_client_goes() -> None:
    """Nothing follows the last token, and the next call waits."""
    world = World(model("m"))
    world.host.faults.stall(3, times=1)
    stalled, behind = world.run("m"), world.run("m")
    world.until(1000.0)
    assert stalled.produced(world.now) == 3
    assert behind.slot_at is None
    world.host.cancel(stalled)
    world.settle()
    assert behind.ending == "done"


def test_failures_at_load_and_at_run() -> None:
    """A failed load leaves nothing loaded, a failed run leaves the model."""
    world = World(model("m", load_s=9.0))
    world.host.faults.fail("m", "no memory", after_s=2.0)
    call = world.run("m")
    world.settle()
    assert call.refusal is not None
    assert (call.refusal.text, call.ended_at) == ("no memory", 2.0)
    assert world.loaded() == []
    world.host.faults.heal()
    world.host.faults.fail("m", "oops", at="run")
    call = world.run("m")
    world.settle()
    assert call.ending == "refused"
    assert world.loaded() == ["m"]


def test_a_killed_child_stays_listed_until_the_next_call() -> None:
    """Its calls fail, `ps` still shows it, the next call loads anew."""
    world = World(model("m", load_s=1.0))
    reading, writing = world.run("m"), world.run("m")
    world.until(2.5)
    world.host.faults.kill("m")
    assert (reading.ending, writing.ending) == ("error", "refused")
    assert world.loaded() == ["m"]
    world.run("m")
    world.settle()
    assert world.host.counts["loads_finished"] == 2


def test_restart_forgets_everything() -> None:
    """Calls end as on a host that went down, and it comes back with nothing loaded."""
    world = World(model("m"), model("n", load_s=5.0))
    calls = [world.run("m"), world.run("m"), world.run("n")]
    world.until(0.5)
    world.host.faults.restart(3.0)
    assert {call.ending for call in calls} == {"down"}
    assert world.loaded() == []
    assert world.host.faults.down
    world.until(3.6)
    assert not world.host.faults.down
    call = world.run("m")
    world.settle()
    assert call.ending == "done"


def test_hanging_inference_never_answers() -> None:
    """Calls stay where they are until the client goes."""
    world = World(model("m"))
    world.host.faults.hang_inference()
    call = world.run("m")
    world.until(1e6)
    assert not call.ended
    world.host.cancel(call)
    assert world.host.running == 0


def test_changes_are_told_in_order() -> None:
    """The owner hears of each phase once it is entered, never before `submit` returns."""
    world = World(model("m", load_s=1.0))
    heard: list[str] = []
    world.host.submit(Job("m", output_tokens=1), lambda call: heard.append(call.phase.value))
    assert heard == []
    world.settle()
    assert heard == ["loading", "waiting", "prompt", "decode", "ended"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcd"),
            st.floats(0.0, 5.0),
            st.sampled_from([None, 0.0, 3.0, 30.0]),
            st.sampled_from([2048, 4096]),
            st.one_of(st.none(), st.floats(0.0, 8.0)),
        ),
        max_size=30,
    ),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_every_call_ends_once_and_nothing_leaks(
    calls: list[tuple[str, float, float | None, int, float | None]], parallel: int, loaded: int
) -> None:
    """Whatever arrives, waits and hangs up: slots hold, refs return to nought, all calls end."""
    world = World(
        *(model(name, load_s=index / 2) for index, name in enumerate("abcd")),
        settings=Settings(num_parallel=parallel, max_loaded=loaded, max_queue=5),
    )
    ends: list[Call] = []

    def heard(call: Call) -> None:
        if call.ended:
            ends.append(call)
        for runner in world.host.loaded():
            assert 0 <= runner.running <= runner.slots

    made = []
    for name, gap, keep_alive_s, num_ctx, patience in calls:
        world.until(world.now + gap)
        job = Job(name, 20, 5, keep_alive_s=keep_alive_s, num_ctx=num_ctx)
        call = world.host.submit(job, heard)
        made.append(call)
        if patience is not None:
            world.host.after(patience, lambda call=call: world.host.cancel(call))  # type: ignore[misc]
        assert len(world.loaded()) <= loaded
    world.until(world.now + 2000.0)
    assert len(ends) == len(made) == len(set(ends))
    assert world.host.running == world.host.queued == 0
    assert all(runner.refs == 0 and not runner.waiting for runner in world.host.loaded())
