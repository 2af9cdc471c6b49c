"""
What the balancer must know of a request body, read as Ollama's Go decoder would read it.

Only the top level is parsed; prompts, messages and images are measured, never decoded. Where one
body could mean two things to two readers it is refused, so that what we route by is what the
backend runs. What is wrong deeper down is left to the backend, whose answer is the right one.
"""

from __future__ import annotations

import codecs
import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl

import msgspec
from msgspec import Raw, Struct

from balancer.core import multipart, names
from balancer.core.domain import Dialect, PlacementKey, Purpose, Route
from balancer.core.errors import BadRequest, OptionError, UnknownModel, UnknownRoute
from balancer.core.names import ModelName
from balancer.core.routes import EMBEDDING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Body(Struct, frozen=True, gc=False):
    """
    A request body, read. A Struct: as a frozen dataclass it would cost 2 us more, per call.

    Args:
        model: As the client wrote it; answers and error texts repeat it so.
        streaming: The answer comes as records. A native load or unload answers with one
            document even when a stream was asked for.
        keep_alive: Seconds (int or float) or a Go duration; None: none given, or not read here.
        num_ctx: Tokens of context asked for, None: the model's or host's default.
        options: Runner options a warm-up call must send to get the same runner; ``shift`` among
            them belongs beside the options.
        prompt_tokens: Estimate: a quarter of the bytes that carry prompt, images not counted.
        output_tokens: The client's limit on the answer, None: none.
        include_usage: A `/v1` stream was asked to end with its usage.
        verbose: Of `show`.
        system: Of `show`: a system prompt is given.
        options_given: Any options are given.
        inputs: Texts to embed, as near as may be.
        session: What the first of the fields that were asked for names; empty: none of them does.
    """

    model: str
    name: ModelName
    streaming: bool
    purpose: Purpose
    keep_alive: float | str | None
    key: PlacementKey
    num_ctx: int | None
    options: Mapping[str, int | bool]
    prompt_tokens: int
    output_tokens: int | None
    include_usage: bool
    verbose: bool
    system: bool
    options_given: bool
    inputs: int = 1
    session: str = ""


# --- what each operation reads -----------------------------------------------------------------

# Types as Go's decoder names them in its errors. Those not listed with a first byte take an array.
_STRING, _BOOL, _INT, _ANY = "string", "bool", "int", "interface {}"
_OBJECT, _STREAM_OPTIONS = "map[string]interface {}", "openai.StreamOptions"
_STARTS: Final = {
    _STRING: b'"',
    _BOOL: b"tf",
    _INT: b"-0123456789",
    _ANY: b'"{[tf-0123456789',
    _OBJECT: b"{",
    _STREAM_OPTIONS: b"{",
}


@dataclass(frozen=True, slots=True)
class _Shape:
    """
    How one operation reads its body.

    Args:
        struct: The Go type it is decoded into.
        fields: What we read of it, by name, with its type.
        loads: The field whose emptiness makes the call a load.
        prompt: The fields that carry prompt.
        image: What stands before and behind the images in them.
        absent_is_404: How it answers when no model is named.
    """

    struct: str
    fields: Mapping[str, str]
    loads: str = ""
    prompt: tuple[str, ...] = ()
    image: tuple[bytes, bytes] | None = None
    absent_is_404: bool = False


_RUNNER = {"model": _STRING, "options": _OBJECT, "keep_alive": _ANY}
_NATIVE = _RUNNER | {"stream": _BOOL, "shift": _BOOL}
_V1 = {
    "model": _STRING,
    "stream": _BOOL,
    "stream_options": _STREAM_OPTIONS,
    "max_tokens": _INT,
    "max_completion_tokens": _ANY,  # not read by Ollama, so it may be anything
}
_BASE64_URL = (b";base64,", b'"')
_TEXTS = dict.fromkeys(("prompt", "suffix", "system"), _STRING)

_SHAPES: Final[Mapping[str, _Shape]] = MappingProxyType(
    {
        "generate": _Shape(
            "api.GenerateRequest",
            _NATIVE | _TEXTS | {"context": "[]int"},
            loads="prompt",
            prompt=("prompt", "suffix", "system", "context"),
            absent_is_404=True,
        ),
        "chat": _Shape(
            "api.ChatRequest",
            _NATIVE | {"messages": "[]api.Message", "tools": "api.Tools"},
            loads="messages",
            prompt=("messages", "tools"),
            image=(b'"images"', b"]"),
        ),
        "embed": _Shape(
            "api.EmbedRequest",
            _RUNNER | {"input": _ANY},
            loads="input",
            prompt=("input",),
            absent_is_404=True,
        ),
        "embeddings": _Shape(
            "api.EmbeddingRequest",
            _RUNNER | {"prompt": _STRING},
            loads="prompt",
            prompt=("prompt",),
        ),
        "show": _Shape(
            "api.ShowRequest",
            dict.fromkeys(("model", "name", "system"), _STRING)
            | {"verbose": _BOOL, "options": _OBJECT},
        ),
        "v1_chat": _Shape(
            "openai.ChatCompletionRequest",
            _V1 | {"messages": "[]openai.Message", "tools": "[]api.Tool"},
            prompt=("messages", "tools"),
            image=_BASE64_URL,
        ),
        "v1_completions": _Shape(
            "openai.CompletionRequest",
            _V1 | {"prompt": _STRING, "suffix": _STRING},
            loads="prompt",
            prompt=("prompt", "suffix"),
            absent_is_404=True,
        ),
        "v1_embeddings": _Shape(
            "openai.EmbedRequest",
            {"model": _STRING, "input": _ANY},
            prompt=("input",),
            absent_is_404=True,
        ),
        "v1_responses": _Shape(
            "openai.ResponsesRequest",
            {
                "model": _STRING,
                "stream": _BOOL,
                "instructions": _STRING,
                "input": _ANY,
                "tools": "[]openai.ResponsesTool",
                "max_output_tokens": _INT,
            },
            prompt=("instructions", "input", "tools"),
            image=_BASE64_URL,
        ),
        "v1_messages": _Shape(
            "anthropic.MessagesRequest",
            {
                "model": _STRING,
                "stream": _BOOL,
                "system": _ANY,
                "messages": "[]anthropic.MessageParam",
                "tools": "[]anthropic.Tool",
                "max_tokens": _INT,
            },
            prompt=("system", "messages", "tools"),
            image=(b'"data"', b"}"),
        ),
    }
)


# All that is read of a body whose route nobody knows, and of no particular type.
_LOOSE: Final = _Shape("", dict.fromkeys(("model", "name"), _STRING) | {"stream": _ANY})


def read(
    route: Route,
    body: bytes | bytearray,
    content_type: str = "",
    query: str = "",
    session_in: Sequence[str] = (),
) -> Body:
    """
    Read the body of an inference or show call.

    Args:
        body: Not to be changed meanwhile.
        content_type, query: Of the request; only a form needs them.
        session_in: Fields that may name a session, the most important first.

    Raises:
        UnknownRoute: The route is optional and there is no model to route by.
        BadRequest, OptionError, UnknownModel: With Ollama's status and, as near as may be, its
            text.
    """
    if route.optional:
        return _read_loosely(route, body)
    if route.operation == "v1_transcriptions":
        if any(name == "model" for name, _ in parse_qsl(query, keep_blank_values=True)):
            raise BadRequest("the model must be named in the form, not in the query")
        return _named(multipart.field(body, content_type, "model"), streaming=False)
    try:
        return _read(route, _SHAPES[route.operation], body, session_in)
    except UnicodeDecodeError:
        raise BadRequest("invalid UTF-8 in request body") from None
    except RecursionError:
        raise BadRequest("exceeded max depth") from None
    except msgspec.MsgspecError:  # of what was hopped over, and is wanted after all
        raise BadRequest(_complaint(body)) from None


def renamed(route: Route, body: bytes | bytearray, content_type: str, model: str) -> bytes:
    """
    A body that could be read, with another model named; every other byte as it was.

    It costs one copy.

    Args:
        content_type: Of the request; only a form needs it.
        model: A valid name; it needs no escapes.
    """
    if route.operation == "v1_transcriptions":
        return multipart.replaced(body, content_type, "model", model)
    spans = _known_spans(body, _outline(body))
    places = {_fold(key): (start, end) for key, start, end in spans}  # the last counts
    for field in ("model", "name"):
        start, end = places.get(field, (0, 0))
        value = bytes(body[start:end]).rstrip(b" \t\r\n")
        if value[:1] == b'"' and value != b'""':
            view = memoryview(body)
            return b"".join((view[:start], b'"%b"' % model.encode(), view[start + len(value) :]))
    return bytes(body)


def tuned(body: bytes | bytearray, num_ctx: int | None, keep_s: float | None) -> bytes:
    """
    A body that could be read, with other values in it; every other byte as it was.

    It costs one copy.

    Args:
        num_ctx: Of its options, which are put in where there are none; None: they stay.
        keep_s: In place of its ``keep_alive``, if it has one; None: that stays.
    """
    edits: list[_Edit] = []
    for key, start, end in _known_spans(body, _outline(body)):
        field = _fold(key)
        if field == "keep_alive" and keep_s is not None:
            edits.append(_edit(body, start, end, _seconds(keep_s)))
        elif field == "options" and num_ctx is not None:
            edits += _with_context(body, start, end, num_ctx)
            num_ctx = None
    if num_ctx is not None:
        at = body.index(b"{") + 1
        edits.insert(0, (at, at, b'"options":{"num_ctx":%d},' % num_ctx))
    view, pieces, behind = memoryview(body), list[bytes | memoryview](), 0
    for start, end, value in edits:
        pieces += (view[behind:start], value)
        behind = end
    return b"".join((*pieces, view[behind:]))


_Edit = tuple[int, int, bytes]  # from where to where, and what stands there instead


def _edit(body: bytes | bytearray, start: int, end: int, value: bytes) -> _Edit:
    """A value instead of the one in that span, the white space behind it left where it is."""
    return start, start + len(bytes(body[start:end]).rstrip(b" \t\r\n")), value


def _with_context(body: bytes | bytearray, start: int, end: int, num_ctx: int) -> Iterator[_Edit]:
    """What makes the options in that span ask for so much context."""
    options = bytes(body[start:end])
    if options[0] == _NULL:
        yield _edit(body, start, end, b'{"num_ctx":%d}' % num_ctx)
        return
    spans = [at for key, *at in _known_spans(options, None) if key == "num_ctx"]
    for first, last in spans:  # whichever counts
        yield _edit(body, start + first, start + last, b"%d" % num_ctx)
    if not spans:
        comma = b"" if _EMPTY.fullmatch(options) else b","
        yield start + 1, start + 1, b'"num_ctx":%d%b' % (num_ctx, comma)


def _seconds(seconds: float) -> bytes:
    return repr(int(seconds) if seconds == int(seconds) else seconds).encode()


def _read_loosely(route: Route, body: bytes | bytearray) -> Body:
    try:
        fields = _known(_LOOSE, _members(_LOOSE, body, _outline(body)))
        model = _text(fields.get("model")) or _text(fields.get("name"))
        return _named(model, streaming=_flag(fields.get("stream")))
    except (BadRequest, UnicodeDecodeError, RecursionError, msgspec.MsgspecError):
        raise UnknownRoute(f"no model is named in the body for {route.path}") from None


def _named(model: str, *, streaming: bool) -> Body:
    """A body of which only the model is known."""
    name, key = _name(_LOOSE, model)
    return Body(
        model=model,
        name=name,
        streaming=streaming,
        purpose=Purpose.RUN,
        keep_alive=None,
        key=key,
        num_ctx=None,
        options={},
        prompt_tokens=0,
        output_tokens=None,
        include_usage=False,
        verbose=False,
        system=False,
        options_given=False,
    )


def _read(route: Route, shape: _Shape, body: bytes | bytearray, session_in: Sequence[str]) -> Body:
    if body[:1] != b"{" and _BLANK.fullmatch(body):
        raise BadRequest("missing request body" if route.dialect is Dialect.OLLAMA else "EOF")
    outline = _outline(body)
    members = _members(shape, body, outline)
    fields = _known(shape, members)
    keep_alive, at_once = _keep_alive(shape, fields.get("keep_alive"))
    include_usage = _include_usage(fields.get("stream_options"))
    _check_v1(route, fields)
    model = _text(fields.get("model")) or _text(fields.get("name"))
    name, key = _name(shape, model)
    is_embedding = route.operation in EMBEDDING
    if is_embedding:
        _check_input(fields.get("input"))
    purpose = _purpose(route, shape, fields, at_once=at_once)
    options, num_predict = _options(shape, fields, name, purpose)
    return Body(
        model=model,
        name=name,
        streaming=_streaming(route, fields, purpose),
        purpose=purpose,
        keep_alive=keep_alive,
        key=_key(key, options) if options else key,
        num_ctx=options.get("num_ctx"),
        options=options,
        prompt_tokens=_prompt_bytes(shape, fields, body, outline) // 4,
        output_tokens=_limit(fields, num_predict),
        include_usage=include_usage,
        verbose=_flag(fields.get("verbose")),
        system=not _is_empty(fields.get("system")),
        options_given=not _is_empty(fields.get("options")),
        inputs=_inputs(fields["input"]) if "input" in fields and is_embedding else 1,
        session=_session(members, session_in) if session_in else "",
    )


# --- the top level -----------------------------------------------------------------------------

_DICT = msgspec.json.Decoder(dict[str, Raw])
_RAW = msgspec.json.Decoder(Raw)
_STR = msgspec.json.Decoder(str)

_LARGE = 1 << 18  # above it a hostile body could ask for too many dict entries
_MOST_FIELDS = 1000
_NULL, _TRUE = b"nt"

_SPACE = rb"[ \t\r\n]{0,65536}+"  # nobody means more, and every byte of it costs
_BLANK = re.compile(_SPACE)
_EMPTY = re.compile(rb'(?:""|\[%b\]|\{%b\})%b' % (_SPACE, _SPACE, _SPACE))
_OPEN = re.compile(rb"%b\{%b(\})?" % (_SPACE, _SPACE))
_KEY = rb'("(?:[^"\\]++|\\.){0,1000}+")'
_FIELD = re.compile(rb"%b%b%b:%b" % (_SPACE, _KEY, _SPACE, _SPACE), re.DOTALL)
_AFTER = re.compile(rb"%b([,}])" % _SPACE)
_TRAILING = re.compile(r"trailing characters \(byte (\d+)\)")

# Half a surrogate pair, which Go reads as U+FFFD and msgspec refuses. The first alternative runs
# over everything else, so each half is one match and nothing is looked at twice. Its bound stands
# instead of a possessive repeat, which with a group in it goes wrong in Python 3.11.2.
_HALF = re.compile(
    rb"((?:[^\\]++|\\[^u]|\\u(?![dD][89a-fA-F])"
    rb"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}){1,1000})"
    rb"|\\u[dD][89a-fA-F][0-9a-fA-F]{2}",
    re.DOTALL,
)
_MOST_HALVES = 10_000
_MENDABLE = 1 << 24  # bytes; looking for halves costs some 10 ns each

# What msgspec says of malformed JSON, and Go at the same byte.
_VALUE = "looking for beginning of value"
_BYTE = re.compile(r"\(byte (\d+)\)")
_COMPLAINTS = {
    "expected '\"'": "looking for beginning of object key string",
    "comma in object": "looking for beginning of object key string",
    "comma in array": _VALUE,
    "expected ':'": "after object key",
    "or '}'": "after object key:value pair",
    "or ']'": "after array element",
    "escaped character": "in string escape code",
    "unicode escape": r"in \u hexadecimal character escape",
    "invalid number": "in numeric literal",
    "invalid character": _VALUE,
}
_MALFORMED = "malformed JSON"

_CHUNK = 1 << 20


def _members(shape: _Shape, body: bytes | bytearray, outline: _Outline | None) -> dict[str, Raw]:
    """The members of the first JSON value, no key twice."""
    if len(body) <= _LARGE:
        try:
            members = _DICT.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            pass  # the walk tells why, and whether Ollama would mind
        else:
            if len(body) == _least_length(members) or body == _respaced(members):
                _check_utf8(body, len(body))
                return members
    return _walk_mended(shape, body, outline)


def _least_length(members: dict[str, Raw]) -> int:
    """
    The length of the shortest text with these members.

    A text of that length has no room for a repeated key, an escaped key or white space.
    """
    length = 1 + max(len(members), 1)
    for key, value in members.items():
        length += 3 + len(value) + (len(key) if key.isascii() else len(key.encode()))
    return length


def _respaced(members: dict[str, Raw]) -> bytes:
    """
    The members written as Python's json writes them.

    A text equal to it repeats no key either, having no other tokens than these.
    """
    if any('"' in key or "\\" in key for key in members):
        return b""  # such a key would need its escapes back
    pairs = [b'"%b": %b' % (key.encode(), value) for key, value in members.items()]
    return b"{%b}" % b", ".join(pairs)


def _walk_mended(
    shape: _Shape, body: bytes | bytearray, outline: _Outline | None
) -> dict[str, Raw]:
    try:
        return _walk(shape, body, outline)
    except msgspec.MsgspecError:
        if len(body) > _MENDABLE:
            raise BadRequest(_complaint(body)) from None
        mended = _mended(body)
    try:
        return _walk(shape, mended, None)
    except msgspec.MsgspecError:
        raise BadRequest(_complaint(mended)) from None


def _mended(body: bytes | bytearray) -> bytes | bytearray:
    """With U+FFFD for halves of pairs, which takes as many bytes."""
    if body.find(rb"\ud") < 0 and body.find(rb"\uD") < 0:
        return body
    return _HALF.sub(lambda match: match[1] or rb"\ufffd", body, 2 * _MOST_HALVES)


def _complaint(text: bytes | bytearray) -> str:
    """What Go says of malformed JSON, or nearly so."""
    try:
        _RAW.decode(text)
    except msgspec.MsgspecError as error:
        said = str(error)
    else:
        return _MALFORMED
    place = _BYTE.search(said)
    position = int(place[1]) if place else 0
    if "truncated" in said or position >= len(text):
        return "unexpected EOF"
    where = next((_COMPLAINTS[each] for each in _COMPLAINTS if each in said), None)
    if where is None:
        return _MALFORMED
    char = chr(text[position])
    if where == _VALUE and char < " " and position:
        where = "in string literal"
    shown = char if char == '"' else names.quoted(char)[1:-1].replace("'", r"\'")
    return f"invalid character '{shown}' {where}"


def _walk(shape: _Shape, text: bytes | bytearray, outline: _Outline | None) -> dict[str, Raw]:
    """Go over the top level member by member; exact about repeated keys and the value's end."""
    if _OPEN.match(text) is None:
        return _no_object(shape, text)
    view = memoryview(text)
    members: dict[str, Raw] = {}
    for key, start, end in _spans(text, outline):
        value = Raw(view[start:end])
        if key in members and not (_is_plain(value) and _is_plain(members[key])):
            raise BadRequest(f"field {names.quoted(key[:80])} is given more than once")
        members[key] = value
    return members


def _spans(text: bytes | bytearray, outline: _Outline | None) -> Iterable[tuple[str, int, int]]:
    """Each key of an object, and where its value begins and ends, white space behind included."""
    if outline is not None:
        try:
            return list(_spans_by(outline))
        except (msgspec.MsgspecError, BadRequest, UnicodeDecodeError, RecursionError):
            pass  # only of the whole text can be told what is wrong
    return _spans_of(text)


def _known_spans(text: bytes | bytearray, outline: _Outline | None) -> list[tuple[str, int, int]]:
    """The same, of an object that could be read before."""
    try:
        return list(_spans(text, outline))
    except msgspec.MsgspecError:
        return list(_spans(_mended(text), None))  # as long, byte for byte


def _spans_by(outline: _Outline) -> Iterator[tuple[str, int, int]]:
    """What `_spans_of` the body would find."""
    behind = 0
    for key, start, end in _spans_of(outline.text):
        spans = outline.place(start), outline.place(end)
        if spans[0] - outline.place(behind) != start - behind:
            raise msgspec.DecodeError  # a run inside the key
        yield key, *spans
        behind = end


def _spans_of(text: bytes | bytearray) -> Iterator[tuple[str, int, int]]:
    opened = _expect(_OPEN, text, 0)
    view, position, done = memoryview(text), opened.end(), bool(opened[1])
    for _ in range(_MOST_FIELDS):
        if done:
            _check_utf8(text, position)
            return
        field = _expect(_FIELD, text, position)
        key = _STR.decode(field[1])
        end = field.end() + _value_length(view[field.end() :])
        yield key, field.end(), end
        after = _expect(_AFTER, text, end)
        position, done = after.end(), after[1] == b"}"
    raise BadRequest("too many fields")


def _no_object(shape: _Shape, text: bytes | bytearray) -> dict[str, Raw]:
    """``null`` acts like ``{}``, any other value is of the wrong type."""
    start = _expect(_BLANK, text, 0).end()
    if _value_length(memoryview(text)[start:]) and text[start] in b" \t\r\n":
        raise msgspec.DecodeError
    if text[start] == _NULL:
        return {}
    kind = _kind(text[start])
    raise BadRequest(f"json: cannot unmarshal {kind} into Go value of type {shape.struct}")


def _expect(pattern: re.Pattern[bytes], text: bytes | bytearray, position: int) -> re.Match[bytes]:
    match = pattern.match(text, position)
    if match is None:
        raise msgspec.DecodeError
    return match


def _value_length(view: memoryview) -> int:
    """How far the first value goes, white space behind it included."""
    try:
        _RAW.decode(view)
    except msgspec.DecodeError as error:
        trailing = _TRAILING.search(str(error))
        if trailing is None:
            raise
        return int(trailing[1]) - 1  # it counts the byte that it stumbled over
    return len(view)


def _is_plain(value: Raw) -> bool:
    """The last of such values wins. Go merges objects, and ``null`` resets only some fields."""
    return _start(value) not in b"{[n"


def _check_utf8(text: bytes | bytearray, end: int) -> None:
    """Go would read U+FFFD instead; two readers might differ about the rest."""
    if text.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, end, _CHUNK):  # in pieces: a str may take four times the bytes
        decoder.decode(text[start : min(start + _CHUNK, end)])
    decoder.decode(b"", final=True)


# --- long runs of base64 -----------------------------------------------------------------------

_BASE64 = re.compile(rb"[A-Za-z0-9+/]{64}")
_FILLER = b"@"  # allowed in a string, but not in an escape, and nowhere else
_LEAST_RUN = 1 << 12
_LOOK = 1 << 14  # bytes from one look for a run to the next; none is looked for within _NEXT
_NEXT = 1 << 8
_PIECE = 1 << 16  # bytes that stay in the processor's cache


@dataclass(frozen=True, slots=True)
class _Outline:
    """
    A body without its long runs of base64; it can be read in a fraction of the time.

    Within a run there is neither a quote nor a backslash nor anything beyond ASCII, so it lies in
    one string, or else the outline is malformed and the body is read as a whole. Whether there is
    a control character in a run is left to the backend to find out.

    Args:
        text: The body with `_FILLER` in place of each run.
        fillers: Where these are in the text.
        shifts: How much further on in the body that lies which follows so many fillers.
    """

    text: bytes
    fillers: list[int]
    shifts: list[int]

    def place(self, position: int) -> int:
        """Where in the body that is which is there in the text."""
        return position + self.shifts[bisect_left(self.fillers, position)]


def _outline(body: bytes | bytearray) -> _Outline | None:
    """None: it would not be much shorter."""
    if len(body) <= _LARGE:
        return None
    view = memoryview(body)
    pieces, fillers, shifts = list[memoryview](), list[int](), [0]
    behind, at = 0, _LOOK
    while at < len(body):
        end = _run_end(body, at) if _BASE64.match(body, at) else 0
        if end - at < _LEAST_RUN:
            at += _LOOK
            continue
        pieces.append(view[behind:at])
        fillers.append(at - shifts[-1])
        shifts.append(shifts[-1] + end - at - len(_FILLER))
        behind, at = end, end + _NEXT
    if shifts[-1] < len(body) // 2:
        return None
    return _Outline(_FILLER.join([*pieces, view[behind:]]), fillers, shifts)


def _run_end(body: bytes | bytearray, start: int) -> int:
    """Where the first quote, backslash, or piece with a byte beyond ASCII is."""
    for at in range(start, len(body), _PIECE):
        end = at + _PIECE
        for stop in (b'"', b"\\"):
            found = body.find(stop, at, end)
            end = end if found < 0 else found
        piece = body[at:end]
        if not piece.isascii():
            return at
        if len(piece) < _PIECE:
            return at + len(piece)
    return len(body)


# --- the fields --------------------------------------------------------------------------------

_STRIDE = 1 << 12
_MOST_IMAGES = 1000
_LONGEST_STREAM_OPTIONS = 1 << 10
_LONGEST_SESSION = 1 << 10
_MOST_INPUTS = 1 << 16
_BETWEEN = re.compile(rb'"[ \t\r\n]*+,[ \t\r\n]*+"')
_LONGEST_CACHED = 400  # bytes of options, characters of a name; who sends more may wait

_INTEGER = re.compile(rb"-?[0-9]{1,19}")
_KINDS = {b'"': "string", b"{": "object", b"[": "array", b"t": "bool", b"f": "bool"}


def _known(shape: _Shape, members: dict[str, Raw]) -> dict[str, Raw]:
    """What we read of the members, by the field's own name; ``null`` is as good as absent."""
    found: dict[str, Raw] = {}
    nulls = []
    for key, value in members.items():
        field, kind = key, shape.fields.get(key)
        if kind is None:
            field = _fold(key)
            kind = shape.fields.get(field)
            if kind is None:
                continue
        if field in found:
            raise BadRequest(f'field "{field}" is given in two spellings')
        found[field] = value
        start = memoryview(value)[0]
        if start == _NULL:
            nulls.append(field)
        elif start not in _STARTS.get(kind, b"["):
            raise _mistyped(shape.struct, field, _kind(start), kind)
        elif kind == _INT and _integer(value) is None:
            number = bytes(value)[:80].decode().strip()
            raise _mistyped(shape.struct, field, f"number {number}", kind)
    for field in nulls:
        del found[field]
    return found


def _fold(key: str) -> str:
    """A key as Go compares it. Beyond ASCII only U+212A, a k, and U+017F, an s, have a field's."""
    return key.lower().replace("\u017f", "s")


def _mistyped(struct: str, field: str, value: str, kind: str) -> BadRequest:
    struct = struct.rpartition(".")[2]
    return BadRequest(
        f"json: cannot unmarshal {value} into Go struct field {struct}.{field} of type {kind}"
    )


def _kind(start: int) -> str:
    return _KINDS.get(bytes((start,)), "number")


def _start(value: Raw) -> int:
    return memoryview(value)[0]


def _is_empty(value: Raw | None) -> bool:
    return value is None or _EMPTY.fullmatch(value) is not None


def _flag(value: Raw | None) -> bool:
    return value is not None and _start(value) == _TRUE


def _text(value: Raw | None) -> str:
    return "" if value is None else str(_STR.decode(value))


def _integer(value: Raw) -> int | None:
    text = bytes(value).strip()
    number = int(text) if _INTEGER.fullmatch(text) else 2**63
    return number if -(2**63) <= number < 2**63 else None


def _real(struct: str, field: str, value: Raw) -> float:
    """A JSON number as Go holds it where no type is said."""
    number = float(bytes(value))
    if math.isinf(number):
        digits = bytes(value)[:80].decode().strip()
        raise _mistyped(struct, field, f"number {digits}", "float64")
    return number


def _check_v1(route: Route, fields: dict[str, Raw]) -> None:
    """What the `/v1` layer refuses before the model is looked at."""
    if route.operation == "v1_chat" and _is_empty(fields.get("messages")):
        raise BadRequest("[] is too short - 'messages'")
    if route.operation == "v1_embeddings":
        given = fields.get("input")
        if given is None or (_start(given) == ord("[") and _is_empty(given)):
            raise BadRequest("invalid input")
    if route.operation == "v1_messages":
        _check_messages(fields)


def _check_messages(fields: dict[str, Raw]) -> None:
    """What Anthropic's API asks for. Ollama checks it in this order."""
    if _is_empty(fields.get("model")):
        raise BadRequest(names.REQUIRED)
    limit = _integer(fields["max_tokens"]) if "max_tokens" in fields else None
    if limit is None or limit <= 0:
        raise BadRequest("max_tokens is required and must be positive")
    if _is_empty(fields.get("messages")):
        raise BadRequest("messages is required")


def _check_input(value: Raw | None) -> None:
    if value is not None and _start(value) not in b'"[':
        raise BadRequest("invalid input type")


def _inputs(value: Raw) -> int:
    """Looked for between strings: to take millions of them apart would cost more than they do."""
    if _start(value) != ord("["):
        return 1
    return 1 + sum(1 for _ in islice(_BETWEEN.finditer(value), _MOST_INPUTS))


def _session(members: dict[str, Raw], fields: Sequence[str]) -> str:
    """A text that is no name of ours is none, however it is spelled; the backend may mind."""
    for field in fields:
        value = members.get(field)
        if value is not None and _start(value) == ord('"') and len(value) <= _LONGEST_SESSION:
            with suppress(msgspec.MsgspecError, UnicodeDecodeError):
                if told := _text(value).strip():
                    return told
    return ""


def _name(shape: _Shape, model: str) -> tuple[ModelName, PlacementKey]:
    """The name, and the key of the runner it has without options."""
    try:
        if len(model) > _LONGEST_CACHED:
            name = names.parse(model)
            return name, PlacementKey(name.canonical)
        return _parsed(model)
    except names.InvalidName as error:
        if shape.absent_is_404 and str(error) == names.REQUIRED:
            raise UnknownModel(f"model '{model}' not found") from None
        raise BadRequest(str(error)) from None


@lru_cache(maxsize=1024)
def _parsed(model: str) -> tuple[ModelName, PlacementKey]:
    name = names.parse(model)
    return name, PlacementKey(name.canonical)


def _purpose(route: Route, shape: _Shape, fields: dict[str, Raw], *, at_once: bool) -> Purpose:
    if not shape.loads or not _is_empty(fields.get(shape.loads)):
        return Purpose.RUN
    unloads = at_once and route.operation in {"generate", "chat"}
    return Purpose.UNLOAD if unloads else Purpose.LOAD


def _streaming(route: Route, fields: dict[str, Raw], purpose: Purpose) -> bool:
    if route.stream_framing is None:
        return False
    if route.dialect is Dialect.OLLAMA and purpose is not Purpose.RUN:
        return False
    return _flag(fields["stream"]) if "stream" in fields else route.streams_by_default


def _include_usage(value: Raw | None) -> bool:
    if value is None:
        return False
    if len(value) > _LONGEST_STREAM_OPTIONS:
        raise BadRequest("stream_options is too long")
    asked = False
    for key, given in _DICT.decode(value).items():
        if _fold(key) == "include_usage" and _start(given) != _NULL:
            if _start(given) not in _STARTS[_BOOL]:
                field = "stream_options.include_usage"
                raise _mistyped("StreamOptions", field, _kind(_start(given)), _BOOL)
            asked = _flag(given)
    return asked


def _prompt_bytes(
    shape: _Shape, fields: dict[str, Raw], body: bytes | bytearray, outline: _Outline | None
) -> int:
    total = 0
    for field in shape.prompt:
        if field in fields:
            total += len(fields[field])
    if shape.image is None or not _shows_base64(body):
        return total
    return max(total - _image_bytes(body, outline, *shape.image), 0)


def _shows_base64(body: bytes | bytearray) -> bool:
    """Look here and there: to search long texts for images costs as much as to parse them."""
    if len(body) <= _STRIDE:
        return False
    return any(_BASE64.match(body, at) for at in range(_STRIDE, len(body), _STRIDE))


def _image_bytes(
    body: bytes | bytearray, outline: _Outline | None, mark: bytes, close: bytes
) -> int:
    """Bytes of images in the text; base64 holds neither mark nor closing byte."""
    text = body if outline is None else outline.text
    total = position = 0
    for _ in range(_MOST_IMAGES):
        start = text.find(mark, position)
        position = text.find(close, start + len(mark))
        if start < 0 or position < 0:
            break
        if outline is None:
            total += position - start
        else:
            total += outline.place(position) - outline.place(start)
    return total


def _limit(fields: dict[str, Raw], num_predict: int | None) -> int | None:
    """The first of the limits that is given; to Ollama nought and less are none."""
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if field in fields:
            num_predict = _integer(fields[field])
            break
    return num_predict if num_predict is not None and num_predict > 0 else None


# --- options and placement ---------------------------------------------------------------------

_ABSENT = Raw(b"null")
_SMALLEST_CONTEXT = 4


class _Options(Struct):
    """The options we read. A class, so that others cost no memory; Ollama knows no case here."""

    num_ctx: Raw = _ABSENT
    num_batch: Raw = _ABSENT
    num_gpu: Raw = _ABSENT
    main_gpu: Raw = _ABSENT
    use_mmap: Raw = _ABSENT
    num_thread: Raw = _ABSENT
    draft_num_predict: Raw = _ABSENT
    num_predict: Raw = _ABSENT


_OPTIONS = msgspec.json.Decoder(_Options)


def _options(
    shape: _Shape, fields: dict[str, Raw], name: ModelName, purpose: Purpose
) -> tuple[dict[str, int | bool], int | None]:
    """The options that make a runner, and ``num_predict``."""
    # An unload asks for no runner, a cloud model has none: there options are not looked at.
    if name.cloud or purpose is Purpose.UNLOAD or "keep_alive" not in shape.fields:
        return {}, None
    options = _given_options(shape, fields["options"]) if "options" in fields else {}
    num_predict = options.pop("num_predict", None)
    if "shift" in fields:
        options["shift"] = _flag(fields["shift"])
    return options, num_predict


def _given_options(shape: _Shape, value: Raw) -> dict[str, int | bool]:
    """As `_typed_options`; a client mostly sends the same as before."""
    if len(value) > _LONGEST_CACHED:
        return _typed_options(shape.struct, value)
    return _known_options(shape.struct, bytes(value)).copy()


@lru_cache(maxsize=1024)
def _known_options(struct: str, value: bytes) -> dict[str, int | bool]:
    return _typed_options(struct, value)


def _typed_options(struct: str, value: Raw | bytes) -> dict[str, int | bool]:
    """Numbers cut to integers as Ollama cuts them; only a number or a bool will do."""
    given = _OPTIONS.decode(value)
    options: dict[str, int | bool] = {}
    for option in _Options.__struct_fields__:
        raw = getattr(given, option)
        if raw is _ABSENT or (start := _start(raw)) == _NULL:
            continue
        wanted, kind = (_BOOL, "boolean") if option == "use_mmap" else (_INT, "integer")
        if start not in _STARTS[wanted]:
            raise OptionError(f'option "{option}" must be of type {kind}')
        options[option] = start == _TRUE if wanted == _BOOL else _cut(struct, option, raw)
    if "num_ctx" in options:
        options["num_ctx"] = max(options["num_ctx"], _SMALLEST_CONTEXT)
    return options


def _cut(struct: str, option: str, value: Raw) -> int:
    number = int(_real(struct, "options", value))
    if -(2**63) <= number < 2**63:
        return number
    raise BadRequest(f'option "{option}" is out of range')


def _key(bare: PlacementKey, options: dict[str, int | bool]) -> PlacementKey:
    """A negative ``num_gpu`` fits any runner and ``shift`` is on unless it is turned off."""
    placing = [
        (option, value)
        for option, value in options.items()
        if not (value is True if option == "shift" else option == "num_gpu" and value < 0)
    ]
    return PlacementKey(bare.model, tuple(sorted(placing)))


# --- keep_alive --------------------------------------------------------------------------------

_LONGEST_DURATION = 200
_DURATION = re.compile(r"([0-9]*)(\.[0-9]*)?([^0-9.]*)")
_UNITS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,  # U+00B5, the micro sign
    "μs": 10**3,  # U+03BC, the Greek letter
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_GO_TYPES = {"bool": "bool", "object": "map[string]interface {}", "array": "[]interface {}"}


def _keep_alive(shape: _Shape, value: Raw | None) -> tuple[float | str | None, bool]:
    """What was given, and whether it comes to nothing: whoever gives that wants it gone."""
    if value is None:
        return None, False
    kind = _kind(_start(value))
    if kind == "string":
        text = _text(value)
        return text, duration_ns(text) == 0
    if kind != "number":
        raise BadRequest(f"Unsupported type: '{_GO_TYPES[kind]}'")
    seconds = _real(shape.struct, "keep_alive", value)
    whole = _integer(value)
    return seconds if whole is None else whole, 0 <= seconds * 1e9 < 1


@lru_cache(maxsize=256)
def duration_ns(text: str) -> int:
    """
    A duration as Go's `time.ParseDuration` reads it, in nanoseconds.

    Raises:
        BadRequest: With Go's text.
    """
    quoted = names.quoted(text[:_LONGEST_DURATION])
    invalid = BadRequest(f"time: invalid duration {quoted}")
    rest = text[1:] if text.startswith(("+", "-")) else text
    if rest == "0":
        return 0
    if not rest or len(text) > _LONGEST_DURATION:
        raise invalid
    total = position = 0
    while position < len(rest):
        piece = _DURATION.match(rest, position)
        if piece is None or (not piece[1] and piece[2] in {None, "."}):
            raise invalid
        whole, fraction, unit = int(piece[1] or 0), piece[2] or ".", piece[3]
        if whole > 2**63:
            raise invalid
        if not unit:
            raise BadRequest(f"time: missing unit in duration {quoted}")
        if unit not in _UNITS:
            raise BadRequest(f"time: unknown unit {names.quoted(unit)} in duration {quoted}")
        total += whole * _UNITS[unit] + int(float(f"0{fraction}0") * _UNITS[unit])
        position = piece.end()
    if total > 2**63 - (not text.startswith("-")):
        raise invalid
    return -total if text.startswith("-") else total
