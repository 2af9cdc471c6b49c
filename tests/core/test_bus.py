"""The bus: who hears what, in which order, whatever the others do."""

from __future__ import annotations

from balancer.core.bus import Bus
from balancer.core.events import CheckEnded, Event, MemberLeft, Mishap


class Named:
    """Writes down under its name what it hears."""

    def __init__(self, name: str, heard: list[tuple[str, Event]]) -> None:
        self.name = name
        self.heard = heard

    def __call__(self, event: Event) -> None:
        self.heard.append((self.name, event))


LEFT, CHECKED = MemberLeft(1.0, "a"), CheckEnded(2.0, "a", True, 0.01)


def test_everybody_hears_everything_in_order() -> None:
    """As it was told, those who came first first."""
    bus = Bus()
    heard: list[tuple[str, Event]] = []
    bus.subscribe(lambda event: heard.append(("first", event)))
    bus.subscribe(lambda event: heard.append(("second", event)))
    bus(LEFT)
    bus(CHECKED)
    assert heard == [("first", LEFT), ("second", LEFT), ("first", CHECKED), ("second", CHECKED)]


def test_who_names_kinds_hears_of_those_only() -> None:
    """Also who comes later, when events of that kind were told already."""
    bus = Bus()
    early: list[Event] = []
    late: list[Event] = []
    bus.subscribe(early.append, [MemberLeft, Mishap])
    bus(LEFT)
    bus(CHECKED)
    bus.subscribe(late.append, {CheckEnded})
    bus(LEFT)
    bus(CHECKED)
    assert (early, late) == ([LEFT, LEFT], [CHECKED])


def test_what_somebody_does_not_want_it_is_not_told() -> None:
    """All but what it names; who subscribes again has changed its mind, and keeps its place."""
    bus = Bus()
    heard: list[tuple[str, Event]] = []
    first = Named("first", heard)
    bus.subscribe(first, but=[CheckEnded])
    bus.subscribe(Named("second", heard))
    bus(CHECKED)
    bus(LEFT)
    assert heard == [("second", CHECKED), ("first", LEFT), ("second", LEFT)]
    heard.clear()
    bus.subscribe(first)
    bus(CHECKED)
    assert heard == [("first", CHECKED), ("second", CHECKED)]


def test_what_nobody_hears_is_known() -> None:
    """Whatever was told before, and whoever comes later."""
    bus = Bus()
    assert not bus.hears(MemberLeft)
    everything: list[Event] = []
    bus.subscribe(everything.append, [CheckEnded])
    bus(LEFT)
    assert (bus.hears(MemberLeft), bus.hears(CheckEnded)) == (False, True)
    bus.subscribe(Named("all but one", []), but=[CheckEnded, Mishap])
    assert (bus.hears(MemberLeft), bus.hears(Mishap)) == (True, False)


def test_one_that_fails_stops_nobody_and_is_told() -> None:
    """The others hear the event, and of the mishap; of its own failure nobody hears twice."""
    bus = Bus()
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise KeyError(event.at)

    bus.subscribe(broken)
    bus.subscribe(heard.append)
    bus(LEFT)
    assert heard == [Mishap(1.0, "event MemberLeft", "KeyError: 1.0"), LEFT]
