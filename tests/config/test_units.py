import datetime as dt
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.config import units

ANYTHING = st.one_of(
    st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.text())
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30.0),
        ("2m", 120.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("250ms", 0.25),
        ("7d", 604_800.0),
        (" 15s ", 15.0),
        (45, 45.0),
        (0.5, 0.5),
        ("600", 600.0),
    ],
)
def test_durations_are_go_style_or_seconds(text: object, seconds: float) -> None:
    """What users write in Ollama's own variables works here too."""
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["15 secs", "s", "", "1h 30m", "1h,30m", "5mm", "2y", "-5s", True, None, [], "1..5s", math.nan],
)
def test_what_is_no_duration_is_refused(text: object) -> None:
    """Nothing is guessed: "5mm" is not five months and true is not one second."""
    with pytest.raises(ValueError):
        units.parse_duration(text)


def test_the_advice_shows_how_to_write_a_duration() -> None:
    """The message quotes the value and gives forms that work."""
    with pytest.raises(ValueError) as refused:
        units.parse_duration("15 secs")
    assert str(refused.value) == (
        '"15 secs" is not a duration. Write 15s, 2m, 1h30m, or a number of seconds.'
    )


@pytest.mark.parametrize("endless", [math.inf, 1e300, 10**400, "9" * 500, "9999999999999h", "400d"])
def test_endless_durations_are_refused(endless: object) -> None:
    """No timer has to cope with infinity; no limit is written -1."""
    with pytest.raises(ValueError):
        units.parse_limit(endless)


def test_zero_is_a_wait_but_no_duration() -> None:
    """A queue may be left at once; a check every 0 s would never rest."""
    assert units.parse_wait("0s") == 0.0
    with pytest.raises(ValueError, match="more than 0"):
        units.parse_duration(0)


@pytest.mark.parametrize("text", [-1, "-1", -1.0])
def test_minus_one_is_no_limit(text: object) -> None:
    """-1 works as number and, from the environment, as text."""
    assert units.parse_limit(text) is None


@pytest.mark.parametrize("text", [0, -2, "-1s"])
def test_other_limits_must_be_positive(text: object) -> None:
    """0 could mean at once or never, so it is refused."""
    with pytest.raises(ValueError):
        units.parse_limit(text)


@settings(deadline=None)
@given(st.integers(1, 86_400_000))
def test_written_durations_read_back(milliseconds: int) -> None:
    """What `config show` prints can be pasted into a file."""
    seconds = milliseconds / 1000
    # The library writes six digits of the seconds below a minute.
    assert units.parse_duration(units.format_duration(seconds)) == pytest.approx(seconds, abs=1e-3)


def test_special_durations_are_written_readably() -> None:
    """Zero and no limit have their own forms."""
    assert units.format_duration(0) == "0s"
    assert units.format_limit(None) == -1
    assert units.format_limit(600) == "10m"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64KiB", 65_536),
        ("100MB", 100_000_000),
        ("1.5 gib", 1_610_612_736),
        ("17b", 17),
        ("4096", 4096),
        (4096, 4096),
    ],
)
def test_sizes_are_binary_or_decimal(text: object, size: int) -> None:
    """KiB counts in 1024, KB in 1000, numbers are bytes."""
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["64K", "64 kilo", "-1KiB", "MiB", "", True, None, 1.5, 0, "0B"])
def test_what_is_no_size_is_refused(text: object) -> None:
    """What could be read in two ways is not guessed; zero and less make no limit."""
    with pytest.raises(ValueError):
        units.parse_size(text)


@settings(deadline=None)
@given(st.integers(1, 2**50))
def test_written_sizes_read_back(size: int) -> None:
    """No byte is lost between number and text."""
    assert units.parse_size(units.format_size(size)) == size


@pytest.mark.parametrize(
    ("text", "ratio"), [("20%", 0.2), ("20 %", 0.2), (0.2, 0.2), ("0.2", 0.2), (0, 0), (1, 1)]
)
def test_shares_are_percent_or_fraction(text: object, ratio: float) -> None:
    """Both ways of writing a fifth are a fifth."""
    assert units.parse_ratio(text) == ratio


@pytest.mark.parametrize("text", [20, "20", "101%", -0.1, "%", True, None, "some"])
def test_what_is_no_share_is_refused(text: object) -> None:
    """A bare 20 may mean 20 % or 20 times; it must be said."""
    with pytest.raises(ValueError):
        units.parse_ratio(text)


def test_shares_are_written_as_percent() -> None:
    """`config show` speaks as the example file does."""
    assert units.format_ratio(0.2) == "20%"


@pytest.mark.parametrize(("text", "weight"), [(1, 1), ("0.5", 0.5), (100, 100), (0.01, 0.01)])
def test_a_weight_is_a_factor(text: object, weight: float) -> None:
    """And written as it was."""
    assert units.parse_weight(text) == weight
    assert str(units.format_weight(units.parse_weight(text))) == str(weight)


@pytest.mark.parametrize("text", [0, -1, "0", 0.001, 101, "10%", True, None, "fast", math.inf])
def test_what_is_no_weight_is_refused(text: object) -> None:
    """Nought would mean never, which is said otherwise."""
    with pytest.raises(ValueError, match="is not a weight"):
        units.parse_weight(text)


@pytest.mark.parametrize("text", [24, "24", "24KiB", "1PB", "100TiB", 0, "a lot"])
def test_what_no_host_has_as_memory_is_refused(text: object) -> None:
    """Mostly the unit is missing: nothing would fit 24 bytes, and nobody would see why."""
    with pytest.raises(ValueError):
        units.parse_memory(text)


def test_memory_is_a_size() -> None:
    """As others."""
    assert units.parse_memory("24GiB") == 24 << 30
    assert units.parse_memory("80 GB") == 80 * 10**9


@settings(deadline=None)
@given(ANYTHING)
def test_nothing_but_a_value_error_ever_comes_out(value: object) -> None:
    """Whatever a file says, reading it cannot crash."""
    for parse in (
        units.parse_wait,
        units.parse_limit,
        units.parse_size,
        units.parse_ratio,
        units.parse_weight,
        units.parse_memory,
        units.parse_expiry,
    ):
        try:
            result = parse(value)
        except ValueError:
            continue
        assert result is None or math.isfinite(result)


@pytest.mark.parametrize(
    ("value", "at"),
    [
        ("2027-12-31", 1830297600.0),
        (dt.date(2027, 12, 31), 1830297600.0),
        ("2027-12-31T18:00:00Z", 1830276000.0),
        ("2027-12-31 19:00:00+01:00", 1830276000.0),
        ("2027-12-31T18:00", 1830276000.0),
        (dt.datetime(2027, 12, 31, 18), 1830276000.0),  # noqa: DTZ001 - as YAML reads it
    ],
)
def test_a_day_is_the_last_one(value: object, at: float) -> None:
    """And an instant the first at which it is over; where no zone is given it is UTC."""
    assert units.parse_expiry(value) == at
    assert units.parse_expiry(units.format_instant(at)) == at


@pytest.mark.parametrize(
    "value", ["soon", "2027-13-01", "", "31.12.2027", 7, True, [], "9999-12-31"]
)
def test_what_is_no_day_is_refused(value: object) -> None:
    """With both forms in the advice."""
    with pytest.raises(ValueError, match="neither a day such as"):
        units.parse_expiry(value)
