"""
Bodies of requests, beside what Python's own json reads in them.

A body that is read says what json says; one that is refused as malformed is so to json, too; large
and small ones are read alike, and so is a body with another model's name put into it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from balancer.core import body as subject
from balancer.core.body import Body, read, renamed
from balancer.core.domain import Dialect, Kind, Purpose, Route
from balancer.core.errors import BalancerError
from balancer.core.routes import TABLE
from bench.fuzzing import chance, corpus

ROUTES: dict[str, Route] = {
    route.operation: route
    for route in TABLE
    if route.operation == "show"
    or (route.kind is Kind.ONE and route.operation != "v1_transcriptions")
}
NEW = "hf.co/x/Real:Q4"
RUN = "".join(map(chr, [*range(65, 91), *range(97, 123), *range(48, 58), 43, 47])) * 8
KEYS = (
    *("model", "Model", "MODEL", "mod\\u0065l", "\\u004dodel", "name", "stream", "\u017ftream"),
    *("options", "keep_alive", "\u212aeep_alive", "prompt", "messages", "input", "tools", "system"),
    *("stream_options", "max_tokens", "max_completion_tokens", "num_ctx", "num_predict", "images"),
    *("x", "", "\\ud800", "\\ufffd", 'a\\"b', "é", "\\\\", "model ", "verbose", "shift", RUN),
)  # fmt: skip
SCALARS = (
    *('"m"', '"m:1b"', '" M"', '""', '"x"', '"f\\u0061st"', '"\\ud83d\\ude00"', '"\\ud83d"'),
    *('"\\ude00x"', '"\\uD800\\uD800\\uDC00"', '"é"', '"\\/\\b\\f\\n\\r\\t"', '"m-cloud"', '"5m"'),
    *("0", "-0", "1", "-1", "4096", "4096.7", "1e3", "1E+2", "0.5e-3", "1e400", "9" * 25, "01"),
    *("1.", "-", ".5", "+1", "NaN", "-Infinity", "true", "false", "null", "nul", "True", '"'),
    *(f'"{RUN}"', f'"data:image/png;base64,{RUN}"', '"\\q"', '"\\u12g4"', '"\x01"', '"0"', '"-1"'),
)
WORDS = (
    *(b'"', b"\\", b"{", b"}", b"[", b"]", b":", b",", b" ", b"\n", b"\\u", b"\\ud800", b"\xff"),
    *(b"\xc3", b"\xc3\xa9", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\0", b"null", b"1e5", b"-", b"."),
    *(b'"model":"n",', b'"Model":"n",', b'"model":[],', b',"x":{}', b'"name":"p",', b'\\"', b"/*"),
    *(b'"options":{"num_ctx":1,"num_ctx":7.5},', b'"stream":null,', RUN.encode(), b"[" * 600),
    *(b" " * 70_000, b'"a":1,' * 1100, b'"' + b"k" * 1200 + b'":1,', b"{" * 20, b'{"x":' * 30),
)
MALFORMED = ("invalid character", "unexpected EOF", "malformed JSON", "EOF", "missing request body")
LIMITS = ("exceeded max depth", "too many fields", "stream_options is too long")
BASE64 = re.compile(rb"[A-Za-z0-9+/]{64}")
BLANKS = re.compile(rb"[ \t\r\n]{60000}")
CONTROL = re.compile(rb"[\x00-\x1f]")


# -- inputs ------------------------------------------------------------------------------------


def make(rng: random.Random) -> bytes:
    """A body, mostly JSON."""
    if rng.random() < 0.5:
        data = rng.choice(corpus.bodies())
        if rng.random() < 0.5:
            data = data[:-1].rstrip(b"}") + b"," + _members(rng, 2).encode() + b"}"
    else:
        data = f"{_gap(rng)}{{{_members(rng, 3)}}}{_gap(rng)}".encode()
    if rng.random() < 0.02:  # as long as one with an image
        at = data.find(b'"', rng.randint(0, len(data))) + 1
        data = data[:at] + RUN.encode() * rng.choice((140, 600, 1200)) + data[at:]
    return chance.mutated(rng, data, WORDS, rng.choice((0, 1, 1, 3)))


def _gap(rng: random.Random) -> str:
    return rng.choice(("", "", "", "", " ", "\n", "\t \r\n"))


def _members(rng: random.Random, depth: int) -> str:
    told = []
    for _ in range(rng.choice((0, 1, 2, 3, 5))):
        key, space, more = rng.choice(KEYS), _gap(rng), _gap(rng)
        told.append(f'{space}"{key}"{more}:{space}{_value(rng, depth)}{more}')
    if rng.random() < 0.7:
        told.insert(rng.randint(0, len(told)), '"model":"m"')
    return ",".join(told)


def _value(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.6:
        return rng.choice(SCALARS)
    if rng.random() < 0.5:
        return f"{{{_members(rng, depth - 1)}}}"
    gap = _gap(rng)
    items = [_value(rng, depth - 1) for _ in range(rng.choice((0, 1, 2, 4)))]
    return f"[{gap}{f',{gap}'.join(items)}{gap}]"


# -- what json reads ---------------------------------------------------------------------------


class Number(str):
    """A number as it was written."""

    __slots__ = ()


class Pairs(list[tuple[str, Any]]):
    """The members of an object, repeated ones and all."""


class _WrongError(ValueError):
    pass


def _refuse(text: str) -> None:
    raise _WrongError(text)


READERS = {
    strict: json.JSONDecoder(
        object_pairs_hook=Pairs,
        parse_int=Number,
        parse_float=Number,
        parse_constant=_refuse,
        strict=strict,
    )
    for strict in (True, False)
}
_HALF = re.compile("[\ud800-\udfff]")


def document(data: bytes, *, strict: bool) -> Any:
    """The first value; raises ValueError if there is none, RecursionError if it is too deep."""
    text = data.decode("utf-8", "surrogateescape")
    start = len(text) - len(text.lstrip(" \t\r\n"))
    value, end = READERS[strict].raw_decode(text, start)
    text[:end].encode()
    return value


def _clean(text: str) -> str:
    """Go has U+FFFD for half a pair."""
    return _HALF.sub("\ufffd", text)


def _fold(key: str) -> str:
    ascii_only = key.replace("\u212a", "k").replace("\u017f", "s")
    return "".join(char.lower() if char.isascii() else char for char in ascii_only)


@dataclass(frozen=True, slots=True)
class Seen:
    """
    An object as Ollama would read it.

    Args:
        fields: By folded key, of those that the route reads; without nulls.
        unclear: It could be read in two ways.
    """

    fields: dict[str, Any]
    unclear: bool


def seen(pairs: Pairs, known: frozenset[str]) -> Seen:
    """The object's fields."""
    groups: dict[str, list[Any]] = {}
    for key, value in pairs:
        groups.setdefault(_clean(key), []).append(value)
    repeats = [values for values in groups.values() if len(values) > 1]
    unclear = any(value is None or isinstance(value, list) for each in repeats for value in each)
    spelt = [_fold(key) for key in groups if _fold(key) in known]
    unclear |= len(set(spelt)) < len(spelt)
    fields = {_fold(key): values[-1] for key, values in groups.items() if _fold(key) in known}
    return Seen({key: value for key, value in fields.items() if value is not None}, unclear)


# -- the check ---------------------------------------------------------------------------------


def check(data: bytes, rng: random.Random) -> None:
    """Hold what is read against what json reads."""
    operation = rng.choice(sorted(ROUTES))
    route = ROUTES[operation]
    told = outcome(route, data)
    assert outcome(route, bytearray(data)) == told, "another reading of a bytearray"
    run = BASE64.search(data)
    if run is None or not CONTROL.search(data, run.end()):  # in one it is left to the backend
        with small():
            assert outcome(route, data) == told, "a large body is read otherwise"
    _compare(route, data, told)
    if isinstance(told, Body):
        _rename(route, data, told)
    if len(data) < 150 and rng.random() < 0.2:
        for end in range(len(data)):
            _compare(route, data[:end], outcome(route, data[:end]))


def outcome(route: Route, data: bytes | bytearray) -> Body | tuple[type[BalancerError], str]:
    """What is read, or the refusal; nothing else is caught."""
    try:
        return read(route, data)
    except BalancerError as error:
        return type(error), error.text


@contextmanager
def small() -> Iterator[None]:
    """What else begins at some hundred kilobytes now begins at once."""
    limits = {"_LARGE": -1, "_LEAST_RUN": 16, "_LOOK": 8, "_NEXT": 1, "_PIECE": 100}
    before = {name: getattr(subject, name) for name in limits}
    try:
        for name, value in limits.items():
            setattr(subject, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(subject, name, value)


def _compare(route: Route, data: bytes, told: Body | tuple[type[BalancerError], str]) -> None:
    # In the runs of a large body nobody looks for control characters.
    strict = len(data) <= subject._LARGE or not isinstance(told, Body)  # noqa: SLF001
    value: Any = ...
    with suppress(ValueError):
        try:
            value = document(data, strict=strict)
        except RecursionError:
            return
    if value is ...:
        assert not isinstance(told, Body), "read, though json refuses it"
        return
    if isinstance(told, Body):
        assert isinstance(value, Pairs), "read, though it is no object"
        _agrees(route, told, seen(value, _known(route)))
    elif value is None or isinstance(value, Pairs):
        _is_excused(data, told[1], value or Pairs())


def _known(route: Route) -> frozenset[str]:
    shape = subject._LOOSE if route.optional else subject._SHAPES[route.operation]  # noqa: SLF001
    return frozenset(shape.fields)


def _agrees(route: Route, told: Body, pairs: Seen) -> None:
    fields = pairs.fields
    assert not pairs.unclear, "read, though it could be read in two ways"
    model = _clean(fields.get("model", "")) or _clean(fields.get("name", ""))
    assert told.model == model
    if route.optional:
        assert told.streaming is (fields.get("stream") is True)
        return
    _agrees_on_stream(route, told, fields)
    limits = [fields.get(name) for name in ("max_tokens", "max_completion_tokens",
                                           "max_output_tokens") if name in fields]  # fmt: skip
    if limits and route.dialect is not Dialect.OLLAMA:
        written = limits[0] if isinstance(limits[0], Number) else ""
        wanted = int(written) if re.fullmatch("[0-9]{1,19}", written) else 0
        assert told.output_tokens == (wanted if 0 < wanted < 1 << 63 else None)
    if "keep_alive" in fields:
        given = fields["keep_alive"]
        same = float(given) if isinstance(given, Number) else _clean(given)
        assert told.keep_alive == same
    elif "keep_alive" in _known(route):
        assert told.keep_alive is None
    if told.options:
        _agrees_on_options(told, fields)


def _agrees_on_stream(route: Route, told: Body, fields: dict[str, Any]) -> None:
    shape = subject._SHAPES[route.operation]  # noqa: SLF001 - says which fields there are
    if shape.loads:
        is_empty = fields.get(shape.loads) in (None, "", [])
        assert (told.purpose is Purpose.RUN) is not is_empty
    if route.stream_framing is None or (
        route.dialect is Dialect.OLLAMA and told.purpose is not Purpose.RUN
    ):
        assert not told.streaming
    else:
        assert told.streaming is fields.get("stream", route.streams_by_default)


def _agrees_on_options(told: Body, fields: dict[str, Any]) -> None:
    given = dict(fields.get("options", ()))
    for name, value in told.options.items():
        if name == "shift":
            assert value is fields["shift"]
        elif name == "use_mmap":
            assert value is given[name]
        else:
            number = int(float(given[name]))
            assert value == (max(4, number) if name == "num_ctx" else number)


def _is_excused(data: bytes, text: str, pairs: Pairs) -> None:
    """Refused as malformed must be only what is, or what passes a limit."""
    if not text.startswith(MALFORMED):
        return
    longest = max((len(key) for key, _ in pairs), default=0)
    passes = (
        BLANKS.search(data) is not None
        or longest >= 150  # counted in escapes and runs
        or len(pairs) >= 1000
        or data.count(b"\\u") > 9000
        or len(data) > 1 << 24
    )
    assert passes, f"refused, though json reads it: {text}"


def _rename(route: Route, data: bytes, told: Body) -> None:
    new = renamed(route, data, "", NEW)
    other_told = read(route, new)
    assert other_told.model == NEW
    assert other_told.streaming == told.streaming or told.name.cloud
    before, after = (document(each, strict=False) for each in (data, new))
    changed = [(b, a) for b, a in zip(before, after, strict=True) if b != a]
    assert len(changed) <= 1, "more than the model has changed"
    for (old_key, old), (new_key, value) in changed:
        assert (old_key, value) == (new_key, NEW)
        assert isinstance(old, str)
    quoted = b'"%b"' % NEW.encode()
    places = [found.start() for found in re.finditer(re.escape(quoted), new)]
    assert any(
        data.startswith(new[:at]) and data.endswith(new[at + len(quoted) :]) for at in places
    ), "more bytes than the model's have changed"
