"""Durations, instants, sizes, shares: text outside; float seconds, int bytes, ratios inside."""

import datetime as dt
import math
import re

import durationpy

from .problems import shown

DURATION_PATTERN = r"^([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h|d))+$"
INSTANT_PATTERN = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ].+)?$"
SIZE_PATTERN = r"^[0-9]+(\.[0-9]+)? ?(([KkMmGgTt][Ii]?)?[Bb])?$"

_DAY = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
_LONGEST_S = 366 * 86_400.0
_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]+)?")
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?(?:([kmgt]i?)?b)?", re.IGNORECASE)
_FACTORS = {
    f"{p}{i}": (1024 if i else 1000) ** n for n, p in enumerate("kmgt", 1) for i in ("", "i")
}


def parse_wait(value: object) -> float:
    """
    Read a duration, zero included: Go style (``1h30m``) or a number of seconds.

    Raises:
        ValueError: Not a duration, negative, or longer than a year.
    """
    seconds = _seconds(value)
    if not 0 <= seconds <= _LONGEST_S:
        raise ValueError(f"{shown(value)} is out of range. Durations go from 0 to one year.")
    return seconds


def parse_duration(value: object) -> float:
    """Read a duration as `parse_wait` does, but refuse zero."""
    seconds = parse_wait(value)
    if seconds == 0:
        raise ValueError("must be more than 0.")
    return seconds


def parse_limit(value: object) -> float | None:
    """Read a duration; -1 is None, that is no limit."""
    seconds = _seconds(value)
    if seconds == -1:
        return None
    if seconds <= 0:
        raise ValueError("must be more than 0, or -1 for no limit.")
    return parse_wait(value)


def format_duration(seconds: float) -> str:
    """Write seconds the way `parse_wait` reads them: ``1h30m``."""
    text = str(durationpy.to_str(dt.timedelta(seconds=seconds)))
    return "0s" if text == "0" else text


def format_limit(seconds: float | None) -> str | int:
    """Write a limit; None is -1."""
    return -1 if seconds is None else format_duration(seconds)


def parse_expiry(value: object) -> float:
    """
    Read the Unix time at which something ends: a day, which is its last one (UTC), or an instant.

    Raises:
        ValueError: Neither.
    """
    moment: object = value
    if isinstance(value, str):
        text = value.strip()
        read = dt.date.fromisoformat if re.fullmatch(_DAY, text) else dt.datetime.fromisoformat
        try:
            moment = read(text)
        except ValueError:
            moment = None
    try:
        if isinstance(moment, dt.datetime):
            at = moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
            return at.timestamp()
        if isinstance(moment, dt.date):
            midnight = dt.datetime(moment.year, moment.month, moment.day, tzinfo=dt.UTC)
            return (midnight + dt.timedelta(days=1)).timestamp()
    except (OverflowError, ValueError):
        pass  # beyond the calendar
    raise ValueError(
        f"{shown(value)} is neither a day such as 2027-12-31 nor an instant such as "
        "2027-12-31T18:00:00Z."
    )


def format_instant(at: float) -> str:
    """Write Unix time as `parse_expiry` reads it."""
    return dt.datetime.fromtimestamp(at, dt.UTC).isoformat().replace("+00:00", "Z")


def parse_size(value: object) -> int:
    """
    Read a number of bytes: ``64KiB``, ``100MB`` or an integer, more than 0.

    Raises:
        ValueError: Not a size.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        number, prefix = match.groups(default="")
        size = int(float(number) * _FACTORS.get(prefix.lower(), 1))
    else:
        hint = "Write 64KiB, 100MB, or a number of bytes."
        raise ValueError(f"{shown(value)} is not a size. {hint}")
    if not 0 < size < 2**63:
        raise ValueError(f"{shown(value)} is out of range for a size.")
    return size


def format_size(size: int) -> str | int:
    """Write bytes in the largest binary unit that divides them, else as a number."""
    for exponent, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size % (1 << exponent) == 0:
            return f"{size >> exponent}{unit}"
    return size


def parse_ratio(value: object) -> float:
    """
    Read a share of a whole: ``20%`` or 0.2.

    Raises:
        ValueError: Not a number between 0 and 1 (or 0% and 100%).
    """
    percent = isinstance(value, str) and value.strip().endswith("%")
    ratio = _number(value.strip().removesuffix("%").strip() if isinstance(value, str) else value)
    if ratio is not None and percent:
        ratio /= 100
    if ratio is None or not 0 <= ratio <= 1:
        raise ValueError(f"{shown(value)} is not a share. Write 20% or 0.2.")
    return ratio


def parse_weight(value: object) -> float:
    """
    Read how much something counts beside others, whose weight is mostly 1.

    Raises:
        ValueError: Not a number between 0.01 and 100.
    """
    weight = _number(value)
    if weight is None or not 0.01 <= weight <= 100:
        raise ValueError(f"{shown(value)} is not a weight. Write a number from 0.01 to 100.")
    return weight


def format_weight(weight: float) -> int | float:
    """Write a weight as people do."""
    return int(weight) if weight.is_integer() else weight


def parse_memory(value: object) -> int:
    """
    Read the memory of a host's accelerators in bytes.

    Raises:
        ValueError: Not a size, or one no host has: mostly a unit is missing.
    """
    size = parse_size(value)
    if not 256 << 20 <= size <= 64 << 40:
        raise ValueError(f"{shown(value)} is not the memory of a host. Write 24GiB, 80GB.")
    return size


def format_ratio(ratio: float) -> str:
    """Write a ratio as a percentage."""
    return f"{ratio * 100:g}%"


def _seconds(value: object) -> float:
    number = _number(value)
    if number is not None:
        return number
    text = value.strip() if isinstance(value, str) else ""
    # durationpy alone would skip words between two parts and read "5mm" as five months.
    if re.match(DURATION_PATTERN, text):
        try:
            return float(durationpy.from_str(text).total_seconds())
        except durationpy.DurationError:
            return math.inf
    raise ValueError(
        f"{shown(value)} is not a duration. Write 15s, 2m, 1h30m, or a number of seconds."
    )


def _number(value: object) -> float | None:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return None if math.isnan(value) else float(value)
        except OverflowError:
            return math.inf
    return None
