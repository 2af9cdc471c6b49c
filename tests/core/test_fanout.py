"""Many hosts' progress as one stream."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from balancer.core.fanout import Merger, failure
from tests.core.clocks import ManualClock

LAYER = "sha256:" + "a" * 64


def layer(completed: int, total: int = 1000) -> dict[str, Any]:
    return {"status": "pulling aaaa", "digest": LAYER, "total": total, "completed": completed}


def merger(*hosts: str, **skipped: str) -> tuple[Merger, ManualClock]:
    clock = ManualClock()
    return Merger(hosts, clock, skipped), clock


def test_one_bar_is_the_mean_over_the_hosts() -> None:
    """A layer's size stands once, its progress is the mean over all that fetch it."""
    merged, clock = merger("a", "b")
    assert merged.feed("a", layer(0))[0]["total"] == 1000
    clock.now += 1
    assert merged.feed("a", layer(1000))[0]["completed"] == 500
    clock.now += 1
    assert merged.feed("b", layer(500))[0]["completed"] == 750


def test_full_only_when_all_are_done() -> None:
    """However near, a bar is not full before the last host has the layer."""
    merged, clock = merger("a", "b")
    merged.feed("a", layer(1000))
    clock.now += 1
    (record,) = merged.feed("b", layer(999))
    assert record["completed"] == 999
    (record,) = merged.feed("b", layer(1000))
    assert record["completed"] == 1000


def test_records_are_spaced_but_the_full_bar_is_told_at_once() -> None:
    """No more than four records a second for a layer."""
    merged, clock = merger("a")
    assert merged.feed("a", layer(1))
    assert not merged.feed("a", layer(500))
    clock.now += 0.25
    assert merged.feed("a", layer(600))
    assert merged.feed("a", layer(1000))


def test_a_failing_host_makes_no_bar_fall() -> None:
    """What was told stays told when the fastest host drops out."""
    merged, clock = merger("a", "b")
    merged.feed("a", layer(1000))
    clock.now += 1
    merged.feed("b", layer(100))
    merged.fail("a", "disk full")
    clock.now += 1
    told = [record["completed"] for n in (200, 600, 1000) for record in merged.feed("b", layer(n))]
    assert told == sorted(told)
    assert told[-1] == 1000


def test_a_phase_is_told_once_all_have_reached_it() -> None:
    """Nobody reads "verifying" while another host still downloads."""
    merged, _ = merger("a", "b", "c")
    assert not merged.feed("a", {"status": "verifying sha256 digest"})
    assert not merged.feed("b", {"status": "verifying sha256 digest"})
    (record,) = merged.fail("c", "gone")
    assert record["status"] == "verifying sha256 digest"
    assert not merged.feed("b", {"status": "verifying sha256 digest"})


def test_other_statuses_are_told_once() -> None:
    """The first host to say it says it for all."""
    merged, _ = merger("a", "b")
    assert [r["status"] for r in merged.feed("a", {"status": "pulling manifest"})] == [
        "pulling manifest"
    ]
    assert not merged.feed("b", {"status": "pulling manifest"})


def test_success_needs_every_host() -> None:
    """The last record is a success, or names who failed and who did not."""
    merged, _ = merger("a", "b", c="down")
    merged.feed("a", {"status": "success"})
    assert not merged.is_over
    merged.feed("b", {"error": "disk full"})
    assert merged.is_over
    *_, last = merged.last()
    assert last["error"] == "failed on 1 of 2 hosts: b: disk full (done on a)"
    assert last["backends"] == {
        "a": {"status": "success"},
        "b": {"error": "disk full"},
        "c": {"skipped": "down"},
    }


def test_all_succeeded() -> None:
    """JavaScript's client waits for exactly this word."""
    merged, _ = merger("a", "b")
    merged.finish("a")
    merged.finish("b")
    assert merged.last()[-1]["status"] == "success"


def test_the_same_failure_everywhere_is_told_in_ollamas_words() -> None:
    """Clients look for Ollama's text."""
    text = "pull model manifest: file does not exist"
    assert failure({"a": text, "b": text}, []) == text
    assert failure({"a": text}, ["b"]) != text


def test_a_success_is_not_taken_back() -> None:
    """A host that cuts the connection after its success has succeeded."""
    merged, _ = merger("a")
    merged.finish("a")
    merged.fail("a", "cut")
    assert merged.failed == {}


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.one_of(st.integers(0, 1000), st.just("fail"), st.just("done")),
            st.floats(0, 1),
        ),
        max_size=60,
    )
)
def test_a_bar_never_falls_and_is_full_only_at_the_end(
    steps: list[tuple[str, Any, float]],
) -> None:
    """Whatever the hosts do."""
    merged, clock = merger("a", "b", "c")
    last = 0
    for name, step, dt in steps:
        clock.now += dt
        if step == "fail":
            told = merged.fail(name, "x")
        elif step == "done":
            told = merged.finish(name)
        else:
            told = merged.feed(name, layer(step))
        for record in told:
            if record.get("digest") != LAYER:
                continue
            completed = record.get("completed", 0)
            assert completed >= last
            last = completed
            working = [h for h in merged._hosts.values() if h.error is None]
            if completed == record["total"]:
                assert all(h.share(LAYER) >= 1.0 for h in working)


def test_who_was_left_out_is_told_to_people_too() -> None:
    """As a line of its own before the success, which every client shows."""
    merged, _ = merger("a", b="is down")
    merged.finish("a")
    assert [record["status"] for record in merged.last()] == ["left out b: is down", "success"]


def test_a_client_need_not_be_told_which_hosts_there_are() -> None:
    """Neither of those that do it nor of those that fail or are left out."""
    merged = Merger(("a", "b"), ManualClock(), {"c": "is down"}, names=False)
    assert merged.feed("a", {"status": "pulling manifest"}) == [{"status": "pulling manifest"}]
    merged.finish("a")
    merged.fail("b", "no space left")
    assert merged.last() == [{"error": "failed on 1 of 2 hosts"}]
    merged = Merger(("a",), ManualClock(), {"c": "is down"}, names=False)
    merged.finish("a")
    assert merged.last() == [{"status": "success"}]
