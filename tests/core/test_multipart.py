"""One field of a form: found where any reader finds it, refused where readers could differ."""

from __future__ import annotations

from email.parser import BytesParser
from email.policy import HTTP

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.errors import BadRequest
from balancer.core.multipart import (
    MOST_HEAD_BYTES,
    MOST_LOOKALIKES,
    MOST_PARTS,
    MOST_VALUE_BYTES,
    field,
    replaced,
)

FORM = "multipart/form-data; boundary=b"
DISPOSITION = b"Content-Disposition: form-data; name="
MODEL = DISPOSITION + b'"model"'
FILE = DISPOSITION + b'"file"; filename="a.wav"\r\nContent-Type: audio/wav'


def form(*parts: tuple[bytes, bytes], boundary: bytes = b"b") -> bytes:
    """A form of heads and values."""
    pieces = [b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary, head, value) for head, value in parts]
    return b"".join(pieces) + b"--%b--\r\n" % boundary


def model(*parts: tuple[bytes, bytes], kind: str = FORM) -> str:
    """The model that a form names."""
    return field(form(*parts), kind, "model")


# -- what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        [(MODEL, b"m:1")],
        [(FILE, b"RIFF"), (MODEL, b"m:1")],
        [(MODEL, b"m:1"), (FILE, b"RIFF")],
        [(DISPOSITION + b"file; filename=a", b""), (MODEL, b"m:1")],
        [(b"X: y", b"-- b--b"), (MODEL, b"m:1")],
        [(FILE, b"\r\n--bb\r\n--b" + b"x" * 9 + b"\r\n\r\n"), (MODEL, b"m:1")],
        [(FILE, b"\r\n--bx" * (MOST_LOOKALIKES - 1)), (MODEL, b"m:1")],
        [(MODEL + b"\r\nContent-Type: text/plain; charset=utf-8", b"m:1")],
        [(b"content-disposition:FORM-DATA;Name=model", b"m:1")],
        [(DISPOSITION + rb'"file"; filename="a\"b\\.wav"', b""), (MODEL, b"m:1")],
        [(DISPOSITION + b"\"f\"; filename*=UTF-8''%e2%98%83.wav", b""), (MODEL, b"m:1")],
        [(DISPOSITION + '"f"; filename="é.wav"'.encode(), b""), (MODEL, b"m:1")],
        [(MODEL, b"m:1"), (MODEL, b"other")],
    ],
)
def test_the_first_model_is_found(parts: list[tuple[bytes, bytes]]) -> None:
    """Wherever it stands, however its head is spelled, whatever files hold."""
    assert model(*parts) == "m:1"


def test_an_empty_head_and_an_empty_value() -> None:
    """Both end in the line end that is before them."""
    assert field(b"--b\r\n\r\nx\r\n--b\r\n" + MODEL + b"\r\n\r\nm\r\n--b--", FORM, "model") == "m"
    assert field(b"--b\r\n" + MODEL + b"\r\n\r\n--b--\r\n", FORM, "model") == ""
    assert model((FILE, b"")) == ""


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data; boundary=b",
        'Multipart/Form-Data;boundary="b"',
        "multipart/form-data; charset=utf-8; BOUNDARY=b",
    ],
)
def test_the_boundary_is_found(kind: str) -> None:
    """Quoted or not, with other parameters."""
    assert model((MODEL, b"m"), kind=kind) == "m"


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "multipart/mixed; boundary=b",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=b; boundary=c",
        "multipart/form-data; boundary*=utf-8''b",
        r'multipart/form-data; boundary="\b"',
        "multipart/form-data; boundary=" + "b" * 71,
        "multipart/form-data; boundary=b junk",
        'multipart/form-data; boundary="b ',
    ],
)
def test_a_type_that_is_no_clear_form(kind: str) -> None:
    """Another type, no boundary, two of them, or one that is encoded."""
    with pytest.raises(BadRequest, match="multipart"):
        model((MODEL, b"m"), kind=kind)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b",
        b"--b\r\n",
        b"\r\n" + form((MODEL, b"m")),
        b"preamble\r\n" + form((MODEL, b"m")),
        form((MODEL, b"m")).replace(b"\r\n", b"\n"),
        form((MODEL, b"m")).replace(b"--b\r\n", b"--b \r\n", 1),
        form((FILE, b"x")).replace(b"--b--", b"--b -"),
        form((FILE, b"x")).removesuffix(b"\r\n--b--\r\n"),
        form((FILE, b"x")).removesuffix(b"--\r\n"),
        form((FILE, b"x\r\n--b\rx")),
        form((b"Content-Disposition : form-data", b"")),
        form((b" folded: x", b"")),
        form((MODEL + b"\r\n folded", b"")),
        form((MODEL + b"\nX: y", b"")),
        form((MODEL + b"\r\nX: \0", b"")),
        form((MODEL + b"\r\n" + MODEL, b"m")),
        form((MODEL + b'; name="x"', b"m")),
        form((MODEL + b"; filename=x", b"m")),
        form((MODEL + b"; filename*=utf-8''x", b"m")),
        form((DISPOSITION[:-1] + b"*=utf-8''model", b"m")),
        form((DISPOSITION[:-1] + b"*0=mod; name*1=el", b"m")),
        form((DISPOSITION + rb'"mod\el"', b"m")),
        form((DISPOSITION + b'"model', b"m")),
        form((DISPOSITION + b'"model" x', b"m")),
        form((MODEL + b"\r\nContent-Transfer-Encoding: quoted-printable", b"=6d")),
        form((MODEL, b"\xff")),
        form((MODEL, b"m" * (MOST_VALUE_BYTES + 1))),
        form((MODEL + b"\r\nX: " + b"y" * MOST_HEAD_BYTES, b"m")),
        form(*[(FILE, b"")] * (MOST_PARTS + 1)),
        form((FILE, b"\r\n--bx" * MOST_LOOKALIKES), (MODEL, b"m")),
    ],
)
def test_what_could_be_read_in_two_ways(body: bytes) -> None:
    """A 400, and nothing else."""
    with pytest.raises(BadRequest, match="failed to parse multipart form"):
        field(body, FORM, "model")


# -- against others ----------------------------------------------------------------------------

NAMES = st.sampled_from([b"model", b"file", b"Model", b"models", b"x"])
VALUES = st.one_of(
    st.binary(max_size=40),
    st.lists(st.sampled_from([b"\r\n", b"--b", b"--", b"\r", b"\n", b"b", b"m"])).map(b"".join),
)


def is_clean(value: bytes) -> bool:
    """Whether a value may stand in a form whose boundary is ``b``."""
    return b"\r\n--b" not in b"\r\n" + value


@given(st.lists(st.tuples(NAMES, VALUES.filter(is_clean)), min_size=1, max_size=6))
def test_a_written_form_is_read_back(parts: list[tuple[bytes, bytes]]) -> None:
    """The first field of that name, as it was written."""
    body = form(*((DISPOSITION + b'"%b"' % name, value) for name, value in parts))
    first = next((value for name, value in parts if name == b"model"), b"")
    try:
        wanted = first.decode()
    except UnicodeDecodeError:
        with pytest.raises(BadRequest):
            field(body, FORM, "model")
    else:
        assert field(body, FORM, "model") == wanted


def test_a_value_is_replaced_and_nothing_else() -> None:
    """Only the first field of that name counts, so only that one is."""
    parts = ((DISPOSITION + b"x", b"old"), (MODEL, b"old"), (MODEL, b"old"))
    body = form(*parts)
    new = replaced(body, FORM, "model", "hf.co/x/new:1")
    assert new == form(parts[0], (MODEL, b"hf.co/x/new:1"), parts[2])
    assert field(new, FORM, "model") == "hf.co/x/new:1"


def reference(body: bytes) -> str | None:
    """The first field ``model`` as Python's own parser of mail reads it."""
    head = f"Content-Type: {FORM}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + body)
    for part in message.iter_parts():
        if part.get_param("name", header="content-disposition") == "model":
            content = part.get_payload(decode=True)
            return content.decode() if isinstance(content, bytes) else None
    return None


PIECES = st.sampled_from(
    [
        *(b"--b", b"\r\n", b"--b\r\n", b"\r\n--b\r\n", b"\r\n--b--\r\n", b"--", b"\n", b'"', b";"),
        *(b"Content-Disposition: ", b"form-data", b"; name=model", b'; name="model"', b": ", b"m"),
        *(MODEL + b"\r\n\r\n", FILE + b"\r\n\r\n", b"\r\n\r\n", b"; filename=x", b"\\", b"\0"),
    ]
)


@given(st.lists(PIECES, max_size=25).map(b"".join))
def test_what_is_taken_is_read_alike(body: bytes) -> None:
    """Of hostile bodies: either a 400, or the model that another reader finds too."""
    try:
        found = field(b"--b\r\n" + body, FORM, "model")
    except BadRequest:
        return
    # A reader of mail takes a bare line feed before a boundary; no model has one in its name.
    if found and "\n" not in found:
        assert found == reference(b"--b\r\n" + body)
