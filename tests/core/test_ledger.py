"""The ledger: what runs on one backend, and what it teaches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from balancer.core.cost import FIXED_PREFILL_S
from balancer.core.domain import Call, Outcome, Usage, Verdict
from balancer.core.ledger import Ledger, Track
from balancer.core.running import Run
from balancer.core.speeds import Size, Speed, work
from tests.core.bench import call

SIZE = Size(4.9, 8.0)


@pytest.fixture
def ledger() -> Ledger:
    """A backend of which nothing is known."""
    return Ledger("a", Speed())


def track(ledger: Ledger, asked: Call, at: float = 0.0, prompt: float = 1000.0) -> Track:
    """A call that began, and was granted at once, with nothing beside it."""
    clean = ledger.is_idle
    found = Track(asked, at, SIZE, prompt, 0.0, 0.5, 0.5, 200.0, 1.0, clean, Run(asked, "a", at))
    ledger.enter(found, at)
    return found


def stream(ledger: Ledger, path: str = "/v1/chat/completions", **more: Any) -> Track:
    """One that was read in two seconds, and brought 101 records in the next four."""
    found = track(ledger, call(path=path, **more))
    run = found.run
    assert run is not None
    run.first_at = 2.0 + FIXED_PREFILL_S
    ledger.first_byte(found, run.first_at)
    run.records = 101
    return found


def end(ledger: Ledger, found: Track, at: float, **usage: Any) -> None:
    """It ended well, and told this."""
    ledger.learn(found, Outcome(Verdict.OK, 0.0, at, usage=Usage(**usage)), at)
    ledger.strike(found, at)


# -- what streams teach that do not tell their figures -----------------------------------------


def test_a_stream_without_figures_teaches_by_its_own_times(ledger: Ledger) -> None:
    """The prompt by the first byte's time and the estimate, the answer by its records."""
    found = stream(ledger)
    end(ledger, found, 6.0 + FIXED_PREFILL_S)
    assert ledger.speed.prompt(found.model, SIZE) == pytest.approx(work(1000, 0) / 2.0)
    assert ledger.speed.decode(found.model, SIZE) == pytest.approx(99 / 4.0)


def test_what_is_told_counts_more_than_what_is_estimated(ledger: Ledger) -> None:
    """Tokens as the answer has them; the durations stay our own where it has none."""
    found = stream(ledger)
    end(ledger, found, 6.0 + FIXED_PREFILL_S, tokens_in=2000, tokens_out=41)
    assert ledger.speed.prompt(found.model, SIZE) == pytest.approx(work(2000, 0) / 2.0)
    assert ledger.speed.decode(found.model, SIZE) == pytest.approx(40 / 4.0)


def test_a_duration_that_is_told_is_taken(ledger: Ledger) -> None:
    """Ollama's own routes tell it, and it has neither queue nor network in it."""
    found = stream(ledger, "/api/chat")
    end(ledger, found, 6.0 + FIXED_PREFILL_S, tokens_in=1000, tokens_out=101, prompt_s=1.0)
    assert ledger.speed.prompt(found.model, SIZE) == pytest.approx(work(1000, 0))


def test_a_first_byte_that_comes_at_once_teaches_nothing(ledger: Ledger) -> None:
    """What is so short is mostly the network; and where others were read, it is their time."""
    found = stream(ledger)
    assert found.run is not None
    found.run.first_at = 0.1
    end(ledger, found, 6.0)
    beside = track(ledger, call(), 6.0)
    late = stream(ledger)
    end(ledger, late, 8.0)
    ledger.strike(beside, 8.0)
    assert ledger.speed.prompt(found.model, SIZE) == 1500


def test_calls_that_do_not_stream_tell_only_what_is_written_in_them(ledger: Ledger) -> None:
    """Their one byte comes last, and their reads are no records."""
    found = stream(ledger, streaming=False)
    assert found.written(Usage()) is None
    assert found.written(Usage(tokens_out=7)) == 7
    assert found.read_s(Usage()) is None
    assert found.read_s(Usage(prompt_s=0.5)) == 0.5


def test_of_records_one_is_the_last(ledger: Ledger) -> None:
    """Each of the others is about a token."""
    found = stream(ledger)
    assert found.written(Usage()) == 100
    assert found.written(Usage(tokens_out=7)) == 7
    assert found.run is not None
    found.run.records = 0
    assert found.written(Usage()) == 0


# -- what is there ------------------------------------------------------------------------------


@pytest.fixture
def measured() -> Ledger:
    """A backend that was found to be as fast as was guessed."""
    found = Ledger("a", Speed())
    rates = {"prompt_rate": 1500.0, "decode_rate": 60.0, "load_rate": 1.0}
    found.speed.restore({**rates, "samples": {"prompt": 9, "decode": 9, "load": 9}})
    return found


class Heard(Speed):
    """Keeps what it is taught."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[float] = []
        self.streams: list[tuple[float, float]] = []

    def learn_prompt(self, model: str, size: Size, tokens_per_s: float) -> None:
        """Work done per second."""
        self.prompts.append(tokens_per_s)

    def learn_decode(
        self,
        model: str,
        size: Size,
        tokens_per_s: float,
        streams: float,
    ) -> None:
        """Tokens per second of one of so many."""
        self.streams.append((tokens_per_s, streams))


@pytest.fixture
def heard() -> Heard:
    """What the ledger of the same test teaches."""
    return Heard()


@pytest.fixture
def taught(heard: Heard) -> Ledger:
    """A ledger that teaches `heard`."""
    return Ledger("a", heard)


def test_what_waits_is_summed_anew(ledger: Ledger) -> None:
    """Whatever came and went, nothing is left of it when nobody waits."""
    tracks = [track(ledger, call(id=f"r{n}"), 0.1 * n) for n in range(50)]
    for number, each in enumerate(tracks):
        each.prefill_s = 0.1 + 1e-9 * number
    for each in tracks:
        ledger.strike(each, 10.0)
    assert ledger.look("m", 10.0) == (0.0, 0, 1)
    assert ledger.is_idle
    assert not ledger.is_busy(tracks[0].model)


def test_backlog_streams_and_share(ledger: Ledger) -> None:
    """Prompts of all models count, streams of all, and of other models those that stream."""
    mine, other = call(), call("n:1")
    for asked in (mine, replace(mine), other, replace(other)):
        track(ledger, asked)
    assert ledger.look(mine.key.model, 0.0) == (2.0, 0, 1)
    for found in [*ledger.on(other.key.model), next(iter(ledger.on(mine.key.model)))]:
        ledger.first_byte(found, 0.0)
    assert ledger.look(mine.key.model, 0.0) == (0.5, 3, 2)
    assert ledger.look(other.key.model, 0.0) == (0.5, 3, 2)
    assert ledger.look("o:1", 0.0) == (0.5, 3, 3)
    assert (ledger.streams(mine.key.model), ledger.in_flight(mine.key.model)) == (1, 2)


def test_what_was_read_of_the_first_prompt_does_not_wait(ledger: Ledger) -> None:
    """But a tenth of it is taken to be left until its first byte comes."""
    track(ledger, call(), 1.0)
    track(ledger, call(), 1.2)
    assert ledger.look("m", 1.0)[0] == 1.0
    assert ledger.look("m", 1.3)[0] == pytest.approx(0.7)
    assert ledger.look("m", 9.0)[0] == pytest.approx(0.55)


def test_who_is_not_there_can_be_struck_out(ledger: Ledger) -> None:
    """It changes nothing; who was there leaves the time it went."""
    found = track(ledger, call())
    ledger.strike(found, 3.0)
    edition = ledger.edition
    ledger.strike(found, 4.0)
    assert (ledger.last_used, ledger.edition) == ({found.model: 3.0}, edition)


def test_every_change_makes_prices_out_of_date(ledger: Ledger) -> None:
    """Who comes, who begins to answer, who goes."""
    editions = [ledger.edition]
    found = track(ledger, call())
    editions.append(ledger.edition)
    ledger.first_byte(found, 1.0)
    editions.append(ledger.edition)
    ledger.strike(found, 2.0)
    editions.append(ledger.edition)
    assert editions == sorted(set(editions))


# -- samples ------------------------------------------------------------------------------------


def test_streams_are_averaged_over_time(taught: Ledger, heard: Heard) -> None:
    """Alone for five seconds, with two more for the other five: two in the mean."""
    found = stream(taught)
    began = found.first_at
    others = [track(taught, call(id=f"o{n}"), began + 5) for n in range(2)]
    for other in others:
        taught.first_byte(other, began + 5)
    end(taught, found, began + 10, tokens_out=101)
    (sample,) = heard.streams
    assert sample == pytest.approx((10.0, 2.0))


def test_while_prompts_are_read_streams_stand_still(taught: Ledger, heard: Heard) -> None:
    """The four seconds in which another prompt was read are none of the stream's."""
    found = stream(taught)
    began = found.first_at
    other = track(taught, call(), began + 3)
    taught.strike(other, began + 7)
    end(taught, found, began + 10, tokens_out=61)
    (sample,) = heard.streams
    assert sample == pytest.approx((10.0, 1.0))


def test_a_stream_that_mostly_stood_still_teaches_nothing(taught: Ledger, heard: Heard) -> None:
    """With less than a third of its time left, one cannot tell."""
    found = stream(taught)
    began = found.first_at
    track(taught, call(), began + 2)
    end(taught, found, began + 10, tokens_out=61)
    assert heard.streams == []


def test_the_accelerator_was_shared(taught: Ledger, heard: Heard) -> None:
    """Half the time with a stream of another model: alone it would have been half as fast again."""
    found = stream(taught)
    began = found.first_at
    taught.first_byte(track(taught, call("n:1"), began), began)
    for other in list(taught.on(call("n:1").key.model)):
        taught.strike(other, began + 5)
    end(taught, found, began + 10, tokens_out=101)
    (sample,) = heard.streams
    assert sample == pytest.approx((15.0, 1.0))


TOLD: dict[str, Any] = {"tokens_in": 1000, "tokens_out": 101, "prompt_s": 1.0}


def test_prompts_teach_what_they_would_alone_on_the_accelerator(
    taught: Ledger, heard: Heard
) -> None:
    """Of two models that streamed, each had half of it."""
    found = stream(taught)
    found.share = 2.0
    end(taught, found, 6.0, **TOLD)
    assert heard.prompts == [pytest.approx(2 * work(1000, 0))]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"clean": False}, {}),
        ({"cached": 100.0}, {}),
        ({}, {"tokens_in": 63}),
        ({}, {"prompt_s": 0.02}),
    ],
    ids=["beside another", "cached", "short", "at once"],
)
def test_prompts_that_teach_nothing(
    taught: Ledger, heard: Heard, change: dict[str, Any], told: dict[str, Any]
) -> None:
    """A cache, a neighbour or too little time would be taken for speed."""
    found = stream(taught)
    for name, value in change.items():
        setattr(found, name, value)
    end(taught, found, 6.0, **{**TOLD, **told})
    assert heard.prompts == []
    assert len(heard.streams) == 1


def test_answers_that_teach_nothing(taught: Ledger, heard: Heard) -> None:
    """Those that failed, those of few tokens, and all on a slow day."""
    end(taught, stream(taught), 6.0, tokens_out=8)
    found = stream(taught)
    taught.learn(found, Outcome(Verdict.BROKEN, 0.0, 6.0, usage=Usage(**TOLD)), 6.0)
    taught.strike(found, 6.0)
    heard.prompts.clear()
    heard.slow_factor = 0.5
    end(taught, stream(taught), 6.0, **TOLD)
    assert (heard.prompts, heard.streams) == ([], [])


def test_an_answer_in_one_piece_teaches_by_what_it_tells(taught: Ledger, heard: Heard) -> None:
    """From when it was thought to begin; without a duration of its own, nothing."""
    found = track(taught, call(streaming=False))
    taught.watch(0.5, 0.5, loading=False)
    assert found.decoding
    end(taught, found, 4.5, tokens_out=101, decode_s=5.0)
    (sample,) = heard.streams
    assert sample == pytest.approx((20.0, 1.0))
    found = track(taught, call(streaming=False), 10.0)
    taught.watch(10.5, 0.5, loading=False)
    end(taught, found, 14.0, tokens_out=101)
    assert len(heard.streams) == 1


def test_an_answer_in_one_piece_is_taken_to_go_as_predicted(ledger: Ledger) -> None:
    """It begins when its prompt should be read, and comes at the usual pace."""
    found = track(ledger, call(streaming=False), 1.0)
    ledger.watch(1.4, 0.5, loading=False)
    assert not found.decoding
    ledger.watch(1.5, 0.5, loading=False)
    ledger.watch(3.5, 0.5, loading=False)
    assert found.virtual == pytest.approx(2.0 * 60)
    assert (ledger.streams(found.model), ledger.shown(found.model)) == (1, 0)


# -- the watch ----------------------------------------------------------------------------------


def ticks(ledger: Ledger, found: Track, share: float, since: float, count: int) -> float:
    """So many ticks in which a stream alone brings that share of the usual 60 tokens a second."""
    run, now = found.run, since
    assert run is not None
    for _ in range(count):
        now += 0.5
        run.records += round(30 * share)
        ledger.watch(now, 0.5, loading=False)
    return now


def test_a_straggler_is_found_out_and_forgiven(measured: Ledger) -> None:
    """Within six seconds; soon after it is quick again, it is not avoided any more."""
    found = track(measured, call())
    measured.first_byte(found, 0.0)
    now = ticks(measured, found, 1.0, 0.0, 4)
    assert measured.speed.slow_factor == 1.0
    before = measured.edition
    now = ticks(measured, found, 0.2, now, 12)
    assert measured.speed.slow_factor < 0.35
    assert measured.edition > before
    ticks(measured, found, 1.0, now, 16)
    assert measured.speed.slow_factor == 1.0


def test_a_straggler_that_nobody_uses_is_forgiven_little_by_little(measured: Ledger) -> None:
    """Else nobody would ever find out that it is well."""
    found = track(measured, call())
    measured.first_byte(found, 0.0)
    now = ticks(measured, found, 0.1, 0.0, 11)
    measured.strike(found, now)
    for tick in range(30):
        measured.watch(now + 0.5 * tick, 0.5, loading=False)
    assert 0.3 < measured.speed.slow_factor < 0.6
    for tick in range(30, 70):
        measured.watch(now + 0.5 * tick, 0.5, loading=False)
    assert measured.speed.slow_factor == 1.0


def test_many_streams_and_other_models_are_no_slowness(measured: Ledger) -> None:
    """Each of two is slower, and each model has half of the accelerator."""
    tracks = [
        track(measured, call("m:1")),
        track(measured, call("m:1")),
        track(measured, call("n:1")),
    ]
    for each in tracks:
        measured.first_byte(each, 0.0)
    for tick in range(1, 21):
        for each in tracks:
            assert each.run is not None
            each.run.records = round(30 * tick / 2 / (1.15 if each is not tracks[2] else 1.0))
        measured.watch(0.5 * tick, 0.5, loading=False)
    assert measured.speed.slow_factor == 1.0


def test_a_window_full_of_reading_tells_nothing(measured: Ledger) -> None:
    """Streams stand still while a prompt is read."""
    found = track(measured, call())
    measured.first_byte(found, 0.0)
    ticks(measured, found, 1.0, 0.0, 2)
    beside = track(measured, call(), 1.0)
    beside.first_token_s = 60.0
    ticks(measured, found, 0.0, 1.0, 10)
    assert measured.speed.slow_factor == 1.0


def test_a_prompt_that_is_overdue_is_slowness(measured: Ledger) -> None:
    """Three times as late as predicted; but not while a model is loaded there."""
    track(measured, call())
    for now in (1.0, 2.0, 2.9):
        measured.watch(now, 0.5, loading=False)
    assert measured.speed.slow_factor == 1.0
    for now in (4.0, 4.5, 5.0):
        measured.watch(now, 0.5, loading=True)
    assert measured.speed.slow_factor == 1.0
    for now in (5.5, 6.0, 6.5):
        measured.watch(now, 0.5, loading=False)
    assert measured.speed.slow_factor < 0.3


def test_after_a_pause_the_watch_begins_anew(measured: Ledger) -> None:
    """What came while nobody looked is not the work of one tick, nor what was read."""
    found = track(measured, call())
    measured.first_byte(found, 0.0)
    run = found.run
    assert run is not None
    run.records = 6000
    track(measured, call(), 90.0)
    measured.rest(100.0)
    assert found.seen == 6000
    for each in list(measured.on(found.model))[1:]:
        measured.first_byte(each, 100.0)
        measured.strike(each, 100.0)
    ticks(measured, found, 0.1, 100.0, 3)
    assert measured.speed.slow_factor < 0.5


def test_a_guess_is_nothing_to_be_slower_than(ledger: Ledger) -> None:
    """Nothing was measured there yet; but a prompt that is overdue shows that it was wrong."""
    found = track(ledger, call())
    ledger.first_byte(found, 0.0)
    now = ticks(ledger, found, 0.1, 0.0, 10)
    ledger.strike(found, now)
    late = track(ledger, call(), now)
    ledger.watch(now + 10.0, 0.5, loading=True)
    assert ledger.speed.prompt(late.model, SIZE) == 1500
    ledger.watch(now + 10.5, 0.5, loading=False)
    assert ledger.speed.slow_factor == 1.0
    assert ledger.speed.prompt(late.model, SIZE) < 750
