"""The budget for request bodies: who waits, in what order, and that nobody waits for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from balancer.core.memory import SMALL, Hold, Memory

MB = 1 << 20


class Bodies:
    """A budget, and who has been told to go on."""

    def __init__(self, limit: int) -> None:
        self.memory = Memory(limit)
        self.ready: list[str] = []

    def take(self, name: str, size: int, hold: Hold | None = None) -> Hold:
        """A body of that size comes, or grows to it."""
        hold = hold or self.memory.hold()
        at_once = hold.take(size, lambda: self.ready.append(name))
        assert at_once is (hold.size == size)
        return hold


def test_there_is_room_until_there_is_none() -> None:
    """Up to the limit at once, to the byte; then one waits until another gives back."""
    bodies = Bodies(3 * MB)
    first = bodies.take("first", MB)
    bodies.take("second", 2 * MB)
    third = bodies.take("third", MB)
    assert (bodies.ready, bodies.memory.waiting) == (["first", "second"], 1)
    first.give_back()
    assert bodies.ready == ["first", "second", "third"]
    assert (third.size, bodies.memory.held, bodies.memory.waiting) == (MB, 3 * MB, 0)


def test_who_comes_first_goes_first() -> None:
    """One that would fit does not pass one that does not: that would wait for ever."""
    bodies = Bodies(4 * MB)
    first, second = bodies.take("first", 2 * MB), bodies.take("second", 2 * MB)
    bodies.take("large", 3 * MB)
    bodies.take("fits", MB)
    first.give_back()
    assert bodies.ready == ["first", "second"]
    second.give_back()
    assert bodies.ready == ["first", "second", "large", "fits"]


def test_what_is_given_back_twice_is_given_back_once() -> None:
    """At the commit and at the end of a call, each without knowing of the other."""
    bodies = Bodies(MB)
    first, other = bodies.take("first", MB), bodies.memory.hold(100)
    first.give_back()
    first.give_back()
    assert (first.size, bodies.memory.held) == (0, 100)
    other.give_back()
    assert bodies.memory.held == 0


def test_who_waits_no_longer_is_not_admitted() -> None:
    """Its client has left; whoever stood behind it moves up at once."""
    bodies = Bodies(2 * MB)
    bodies.take("first", MB)
    gone = bodies.take("gone", 2 * MB)
    bodies.take("behind", MB)
    gone.give_back()
    assert bodies.ready == ["first", "behind"]
    assert bodies.memory.held == 2 * MB


def test_small_bodies_never_wait() -> None:
    """They are counted all the same, so that it shows when nothing should be kept any more."""
    bodies = Bodies(MB)
    bodies.take("first", MB)
    assert not bodies.memory.is_over
    small, counted = bodies.take("small", SMALL), bodies.memory.hold(2000)
    assert bodies.ready == ["first", "small"]
    assert (bodies.memory.held, bodies.memory.is_over) == (MB + SMALL + 2000, True)
    counted.give_back()
    small.give_back()
    assert not bodies.memory.is_over


def test_one_byte_more_than_small_waits() -> None:
    """The limit of what is small is meant to the byte."""
    bodies = Bodies(MB)
    bodies.take("first", MB)
    bodies.take("large", SMALL + 1)
    assert bodies.ready == ["first"]


def test_a_body_larger_than_the_budget_goes_alone() -> None:
    """When no other large one is there, and whatever small ones are; the next waits for it."""
    bodies = Bodies(MB)
    bodies.memory.hold(SMALL)
    first = bodies.take("first", MB // 2)
    giant = bodies.take("giant", 5 * MB)
    bodies.take("third", SMALL + 1)
    assert bodies.ready == ["first"]
    first.give_back()
    assert bodies.ready == ["first", "giant"]
    assert bodies.memory.is_over
    giant.give_back()
    assert bodies.ready == ["first", "giant", "third"]


def test_what_turns_out_smaller_makes_room() -> None:
    """A body of unknown length took a step more than it was."""
    bodies = Bodies(2 * MB)
    first = bodies.take("first", 2 * MB)
    bodies.take("second", MB)
    first.settle(MB)
    assert bodies.ready == ["first", "second"]


def test_a_part_that_is_there_goes_before_what_is_not() -> None:
    """Nothing of a new body is in memory: it can wait without costing anything."""
    bodies = Bodies(3 * MB)
    growing, other = bodies.take("growing", MB), bodies.take("other", 2 * MB)
    bodies.take("new", MB)
    bodies.take("grown", 2 * MB, growing)
    other.give_back()
    assert bodies.ready == ["growing", "other", "grown", "new"]


def test_of_bodies_that_wait_for_each_other_the_oldest_goes_on() -> None:
    """And goes on until it ends: in turns, each would take more than there is."""
    bodies = Bodies(2 * MB)
    first, second = bodies.take("first", MB), bodies.take("second", MB)
    bodies.take("second", 2 * MB, second)
    assert bodies.ready == ["first", "second"]
    for size in (2, 3, 4):
        bodies.take("first", size * MB, first)
    assert bodies.ready == ["first", "second", "first", "first", "first"]
    assert bodies.memory.held == 5 * MB
    first.give_back()
    assert bodies.ready[5:] == ["second"]


def test_taking_less_than_one_has_changes_nothing() -> None:
    """Such a step has been paid for."""
    bodies = Bodies(2 * MB)
    hold = bodies.take("first", MB)
    assert hold.take(100, lambda: None)
    assert hold.size == MB


def test_a_larger_budget_holds_at_once() -> None:
    """Whoever waits when the configuration is read again need not wait for the others."""
    bodies = Bodies(MB)
    bodies.take("first", MB)
    bodies.take("second", MB)
    bodies.memory.limit = 2 * MB
    assert (bodies.ready, bodies.memory.limit) == (["first", "second"], 2 * MB)


@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "grow", "back", "settle"]), st.integers(0, 40)),
        max_size=60,
    )
)
def test_nothing_is_lost_and_nobody_is_forgotten(steps: list[tuple[str, int]]) -> None:
    """Whatever happens in whatever order: the sum is right, the limit kept, all get their turn."""
    memory, limit = Memory(16 * SMALL), 16 * SMALL
    holds: list[Hold] = []
    waits: set[Hold] = set()
    for what, number in steps:
        size = number * SMALL // 2
        idle = [hold for hold in holds if hold not in waits]
        if what == "take":
            holds.append(memory.hold())
            idle = [holds[-1]]
        if not idle:
            continue
        hold = idle[number % len(idle)]
        if what in ("take", "grow"):
            waits.add(hold)
            hold.take(hold.size + size, lambda hold=hold: waits.remove(hold))  # type: ignore[misc]
        elif what == "settle":
            hold.settle(min(hold.size, size))
        else:
            hold.give_back()
        assert memory.held == sum(each.size for each in holds)
        assert memory.waiting == len(waits)
        large = sorted(each.size for each in holds if each.size > SMALL)
        assert sum(large[:-1]) <= limit  # but for one that goes on alone
        assert not waits or any(each.size > SMALL for each in holds if each not in waits)
    for hold in holds * 2:
        if hold not in waits:
            hold.give_back()
    for hold in holds:
        assert hold not in waits
        hold.give_back()
    assert (memory.held, memory.waiting) == (0, 0)


def test_one_owner_leaves_room_for_others() -> None:
    """Bodies that are declared and do not come take half of it; another's large one gets in."""
    bodies = Bodies(8 * MB)
    slow = [bodies.memory.hold(owner="slow") for _ in range(4)]
    for number, hold in enumerate(slow):
        bodies.take(f"slow{number}", 2 * MB, hold)
    assert bodies.ready == ["slow0", "slow1"]
    other = bodies.take("other", 4 * MB, bodies.memory.hold(owner="other"))
    assert bodies.ready == ["slow0", "slow1", "other"]
    other.arrived(4 * MB)
    slow[0].arrived(2 * MB)  # what has come counts no more, but there is no room
    assert bodies.memory.waiting == 2
    other.give_back()
    assert bodies.ready == ["slow0", "slow1", "other", "slow2"]
    for hold in slow:
        hold.give_back()
    assert (bodies.memory.held, bodies.memory.waiting, bodies.memory._coming) == (0, 0, {})


def test_one_body_may_be_as_large_as_it_is() -> None:
    """The share of its owner holds for what comes beside it."""
    bodies = Bodies(4 * MB)
    hold = bodies.take("large", 4 * MB, bodies.memory.hold(owner="o"))
    hold.give_back()
    bodies.take("huge", 9 * MB, bodies.memory.hold(owner="o"))
    assert bodies.ready == ["large", "huge"]


def test_bodies_of_one_owner_do_not_wait_for_each_other_for_ever() -> None:
    """Two that grow, each with a part there: the older goes on."""
    bodies = Bodies(4 * MB)
    first, second = (bodies.memory.hold(owner="o") for _ in range(2))
    bodies.take("first", MB, first)
    bodies.take("second", MB, second)
    bodies.take("second grown", 3 * MB, second)
    bodies.take("first grown", 4 * MB, first)
    assert bodies.ready == ["first", "second", "first grown"]
    first.arrived(4 * MB)
    first.give_back()
    assert bodies.ready[-1] == "second grown"


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 6), st.booleans()), min_size=1, max_size=12
    )
)
def test_everybody_gets_in_whoever_sends(sent: list[tuple[str, int, bool]]) -> None:
    """As long as those that are in come to an end, in whatever order they were sent."""
    bodies = Bodies(4 * MB)
    holds = {}
    for number, (owner, size, grows) in enumerate(sent):
        hold = bodies.memory.hold(owner=owner)
        holds[f"{number}"] = hold
        hold.take(size * MB, lambda name=f"{number}": bodies.ready.append(name))  # type: ignore[misc]
        if grows and hold.size:
            hold.take(2 * size * MB, lambda name=f"{number}": bodies.ready.append(name))  # type: ignore[misc]
    done: set[str] = set()
    while len(done) < len(sent):
        name = next(n for n in bodies.ready if n not in done and holds[n].size >= holds[n].wanted)
        done.add(name)
        holds[name].arrived(holds[name].size)
        holds[name].give_back()
    assert (bodies.memory.held, bodies.memory.waiting, bodies.memory._coming) == (0, 0, {})
