"""
Forms: refused, or read as two other readers read them.

One of these is Python's own parser of mail, the other looks for delimiters as leniently as any
reader might.
"""

from __future__ import annotations

import random
import re
from email.parser import BytesParser
from email.policy import HTTP

from balancer.core.errors import BadRequest
from balancer.core.multipart import field, replaced
from bench.fuzzing import chance

DISPOSITION = b"Content-Disposition: form-data; name="
HEADS = (
    DISPOSITION + b'"model"',
    DISPOSITION + b"model",
    DISPOSITION + b'"file"; filename="a.wav"\r\nContent-Type: audio/wav',
    DISPOSITION + rb'"f"; filename="a\"b\\.wav"',
    DISPOSITION + b'"model"; filename=x',
    DISPOSITION + b'"prompt"\r\nX-Y: z',
    b"content-disposition:FORM-DATA;Name=model",
    DISPOSITION + b"\"f\"; filename*=UTF-8''%e2%98%83.wav",
    DISPOSITION + b"\"f\"; name*=UTF-8''model",
    b"",
)
VALUES = (b"m:1", b"", b"RIFF\0\xff", b"\r\n--bx", b"--b", b"\r\n--b", b"\r\n--b-", b"x" * 5000)
WORDS = (
    *(b"--b", b"\r\n", b"--b\r\n", b"\r\n--b\r\n", b"\r\n--b--\r\n", b"--", b"\n", b'"', b";"),
    *(b"; name=model", b'; name="model"', b": ", b"\r\n\r\n", b"\\", b"\0", b" ", b"\t", b"\r"),
    *(b"; filename=x", b"\r\n ", b"\xff", b"Content-Transfer-Encoding: base64\r\n", b"--b \r\n"),
    *(b"Content-Disposition: form-data; name=model\r\n\r\n", b"name*=x", b"name*0=mo; name*1=del"),
)
MODEL = re.compile(
    rb"(?i:^content-disposition:[ \t]*form-data[ \t]*;(.*;)?[ \t]*name=)"
    rb'("model"|model(?=[;\s]|$))',
    re.MULTILINE,
)
LONE = re.compile(rb"\r(?!\n)|(?<!\r)\n")  # a line end to readers of mail alone
CLOSED = re.compile(rb"\A(?:(?!\r\n--b--).)*\r\n--b--(\r\n|\Z)", re.DOTALL)
KINDS = (
    "multipart/form-data; boundary=b",
    'multipart/form-data; boundary="b"',
    "Multipart/Form-Data;charset=utf-8; BOUNDARY=b",
)


def make(rng: random.Random) -> bytes:
    """A form, behind a line with its content type."""
    parts = [
        b"--b\r\n%b\r\n\r\n%b\r\n" % (rng.choice(HEADS), rng.choice(VALUES))
        for _ in range(rng.choice((0, 1, 2, 3)))
    ]
    data = b"".join(parts) + b"--b--\r\n"
    kind = rng.choice(KINDS).encode()
    if rng.random() < 0.1:
        kind = chance.mutated(rng, kind, WORDS, 2).replace(b"\n", b"")
    return kind + b"\n" + chance.mutated(rng, data, WORDS)


def check(data: bytes, rng: random.Random) -> None:
    """Hold the field against what others find."""
    kind, _, body = data.partition(b"\n")
    del rng  # nothing here is left to chance
    content_type = kind.decode("latin-1")
    try:
        found = field(body, content_type, "model")
    except BadRequest:
        return
    assert field(bytearray(body), content_type, "model") == found
    if re.search(rb"boundary=\"?b\"?\s*(;|$)", kind, re.IGNORECASE) is None:
        return  # the others look for this one
    assert _lenient(body) == found.encode(), "a lenient reader finds another model"
    if found and LONE.search(body) is None and CLOSED.search(body):
        assert _mail(body) == found, "a reader of mail finds another model"
        new = replaced(body, content_type, "model", "new:1")
        assert field(new, content_type, "model") == "new:1"
        assert len(new) - len(body) == len(b"new:1") - len(found.encode())


def _lenient(body: bytes) -> bytes:
    """The first model between two delimiters, blanks behind them forgiven."""
    marks = re.split(rb"(?:\A|\r\n)--b(?:(--)|[ \t]*(?=\r\n|\Z))", body)
    for mark, part in zip(marks[1::2], marks[2::2], strict=True):
        if mark is not None:
            break
        head, _, value = part.partition(b"\r\n\r\n")
        if MODEL.search(head):
            return value
    return b""


def _mail(body: bytes) -> str | None:
    head = b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    message = BytesParser(policy=HTTP).parsebytes(head + body)
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition")
        if (part.get_content_disposition(), name) == ("form-data", "model"):
            content = part.get_payload(decode=True)
            return content.decode() if isinstance(content, bytes) else None
    return None
