"""JSON, durations and times as Go has them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.sim import gojson
from balancer.sim.gojson import DecodeError


@given(st.text())
def test_what_is_written_can_be_read(text: str) -> None:
    """Escapes change the spelling only, and no separator of lines is left bare."""
    written = gojson.encode({"x": text})
    assert json.loads(written) == {"x": text}
    assert not set("<>&\u2028\u2029\n") & set(written)


def test_escapes_are_gos() -> None:
    """Six signs in lower-case hex, other letters as they are."""
    assert gojson.encode("<☀&>\u2028") == '"\\u003c☀\\u0026\\u003e\\u2028"'


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "EOF"),
        (b"  ", "EOF"),
        (b"{", "unexpected EOF"),
        (b'{"a', "unexpected EOF"),
        (b"{oops", "invalid character 'o' looking for beginning of object key string"),
        (b"\x1f\x8b", "invalid character '\\x1f' looking for beginning of value"),
        (b"'", "invalid character '\\'' looking for beginning of value"),
        (b"{'a':1}", "invalid character '\\'' looking for beginning of object key string"),
        (b'{"a" 1}', "invalid character '1' after object key"),
        (b'{"a":1 2}', "invalid character '2' after object key:value pair"),
        (b'"x"', "json: cannot unmarshal string into Go value of type api.Request"),
    ],
)
def test_complaints_are_gos(body: bytes, complaint: str) -> None:
    """The words clients get to see."""
    with pytest.raises(DecodeError) as caught:
        gojson.decode(body)
    assert str(caught.value) == complaint


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"null", {}),
        (b'{"Model":"a","MODEL":"b"} x', {"model": "b"}),
        (b'{"m":"\xff"}', {"m": "\ufffd"}),
    ],
)
def test_what_go_forgives(body: bytes, value: object) -> None:
    """null, trailing bytes, any case, broken UTF-8."""
    assert gojson.decode(body) == value


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0.0), ("1h30m", 5400.0), ("-1m", -60.0), ("1.5s", 1.5), (".5s", 0.5), ("5µs", 5e-6)],
)
def test_durations(text: str, seconds: float) -> None:
    """Numbers with units, signs and fractions."""
    assert gojson.duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("300", "missing unit in duration"), ("-1", "missing unit"), ("", "invalid duration")],
)
def test_what_is_no_duration(text: str, complaint: str) -> None:
    """Bare numbers lack a unit, the rest is nonsense."""
    with pytest.raises(DecodeError, match=complaint):
        gojson.duration_s(text)


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_795_263_848_114_619_970, "2026-11-21T12:24:08.11461997Z"),
        (1_795_263_848_100_000_000, "2026-11-21T12:24:08.1Z"),
    ],
)
def test_timestamps_drop_trailing_zeros(ns: int, text: str) -> None:
    """Nine decimals at most, none if there are none."""
    assert gojson.timestamp(ns) == text


def test_http_date() -> None:
    """English names whatever the locale."""
    assert gojson.http_date(1_795_263_840 * 10**9) == "Sat, 21 Nov 2026 12:24:00 GMT"
