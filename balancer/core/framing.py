"""
Streams as records: where a record ends, when an answer commits, how it ended.

One `feed` per network read. On the way bytes are only searched for the ends of records; what
records say is read from the first ones (`Opening`) and from the last few (`Splitter.ending`).
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from balancer.core.domain import Dialect, Framing, Route, Usage

TAIL_MAX: Final = 1 << 20  # bytes of an unfinished record that are held back
LONG: Final = 64 << 10  # bytes; longer texts are searched, not parsed
_HEAD: Final = 4 << 10  # of a long record its head and its last LONG bytes are kept
_KEPT: Final = 4  # records: a terminator, the usage before it, an error before that, one to spare
_NO_USAGE: Final = Usage()

_decode = msgspec.json.Decoder().decode
_EMPTY_LINES = re.compile(rb"\n\r?\n[\r\n]*")
_EVENT = re.compile(rb"event: ?([\w.]+)")
_DONE = re.compile(rb'"done"\s*:\s*true')
_NUMBER = re.compile(rb'"(\w+)"\s*:\s*(\d{1,18})\b')
_NO_MARK: Final = bytes(set(range(256)) - set(b'"{}[]'))

_LAST_EVENTS: Final = frozenset(
    {b"message_stop", b"response.completed", b"response.incomplete", b"response.failed"}
)
_FIRST_EVENTS: Final[dict[Dialect, frozenset[bytes]]] = {
    Dialect.OLLAMA: frozenset(),
    Dialect.OPENAI: frozenset(),
    Dialect.RESPONSES: frozenset({b"response.created", b"response.in_progress"}),
    Dialect.ANTHROPIC: frozenset({b"message_start", b"ping"}),
}
_TELL_DONE: Final = frozenset({"generate", "chat"})


@dataclass(frozen=True, slots=True)
class Ending:
    """
    What the end of an answer told.

    Args:
        complete: The terminal record came; of one document: it is whole and not ``done:false``.
        whole: False: a document cut short. Always True of a stream.
        error_record: The error that the backend told in the answer, without the record's end.
        error_text: Its text, for classifying.
        blank_model: A chunk with an empty model came: so Ollama's ``/v1`` streams tell an error,
            whose text is lost.
    """

    complete: bool
    whole: bool = True
    error_record: bytes | None = field(default=None, repr=False)
    error_text: str = ""
    blank_model: bool = False
    usage: Usage = _NO_USAGE


@dataclass(frozen=True, slots=True)
class Opened:
    """
    How an answer begins.

    Args:
        kind: ``commit``: may be passed on. ``error``: the backend tells an error instead.
            ``empty``: it ended with nothing to pass on.
        held: All that came so far; goes into the relay's splitter on commit.
        blank_model: As in `Ending`; with ``empty``: an error whose text is lost. Where an answer
            is announced first, such an error is an announcement with nothing behind it.
    """

    kind: Literal["commit", "error", "empty"]
    held: bytes = field(repr=False)
    error_text: str = ""
    blank_model: bool = False


class Splitter(ABC):
    """
    Passes on whole records and holds the unfinished one, up to a limit.

    What `feed` and `flush` return, put together, is what was fed. Empty lines and SSE comments
    pass too but are no records.

    Attributes:
        records: Whole records so far.
        mid_record: Part of an unfinished record was passed on, so no record of ours may follow.
    """

    __slots__ = ("_held", "_recent", "_tail_max", "mid_record", "records")

    def __init__(self, tail_max: int) -> None:
        self.records = 0
        self.mid_record = False
        self._tail_max = tail_max
        # The unfinished record, also what was passed on of it; b"", which all share, mostly.
        self._held: bytes | bytearray = b""
        self._recent: deque[bytes] = deque(maxlen=_KEPT)

    @abstractmethod
    def feed(self, data: bytes) -> bytes:
        """What may be passed on now; empty: nothing yet."""

    @abstractmethod
    def passes(self, lines: list[bytes]) -> bool:
        """
        Whether lines, which all have ended, are one whole record; then they may be passed on.

        Args:
            lines: Without their ends, and with what frames them: one before, two behind them.
        """

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether the last record passed on is a terminal one: the client has all."""

    @staticmethod
    @abstractmethod
    def split(whole: bytes) -> list[bytes]:
        """The records in bytes that begin where a record begins."""

    @staticmethod
    @abstractmethod
    def read(record: bytes) -> Ending:
        """What one record tells."""

    @abstractmethod
    def _cut(self, data: bytes) -> int:
        """The offset in data behind the last end of a record, 0: none ends there."""

    def flush(self) -> bytes:
        """What is still held; after the last `feed` of a stream that ended cleanly."""
        tail = bytes(self._held)
        passed, self.mid_record = self.mid_record, bool(tail)
        self._held = b""
        self._keep(self.split(tail))
        return b"" if passed else tail

    def ending(self) -> Ending:
        """What the last records told; before `flush` an unended one is left out."""
        told = [self.read(record) for record in self._recent]
        wrong = next((each for each in told if each.error_record is not None), Ending(False))
        return Ending(
            complete=any(each.complete for each in told),
            error_record=wrong.error_record,
            error_text=wrong.error_text,
            blank_model=any(each.blank_model for each in told),
            usage=next((each.usage for each in told[::-1] if each.usage != _NO_USAGE), _NO_USAGE),
        )

    def _feed(self, data: bytes) -> bytes:
        cut = self._cut(data)
        if not cut:
            return self._hold(data)
        ended = data[:cut]
        whole = bytes(self._held) + ended
        out = ended if self.mid_record else whole
        self._held = b""
        self.mid_record = False
        records = self.split(whole)
        self.records += len(records)
        self._keep(records)
        return out + self._hold(data[cut:]) if cut < len(data) else out

    def _hold(self, tail: bytes) -> bytes:
        held = self._held if isinstance(self._held, bytearray) else bytearray()
        held += tail
        self._held = held
        if self.mid_record:
            out = tail
        elif len(held) > self._tail_max:
            self.mid_record = True
            out = bytes(held)
        else:
            return b""
        if len(held) > 8 * LONG:
            del held[_HEAD : -2 * LONG]
        return out

    def _keep(self, records: list[bytes]) -> None:
        for record in records[-_KEPT:]:
            long = len(record) > _HEAD + LONG
            self._recent.append(record[:_HEAD] + record[-LONG:] if long else record)


class _Lines(Splitter):
    """NDJSON."""

    __slots__ = ()

    def feed(self, data: bytes) -> bytes:
        n = len(data)
        if 2 < n <= LONG and not self._held and data.find(b"\n") == n - 1:
            self.records += 1
            self._recent.append(data)
            return data
        return self._feed(data)

    def passes(self, lines: list[bytes]) -> bool:
        if len(lines) != 4 or self._held or len(lines[1]) < 2:
            return False
        self.records += 1
        self._recent.append(lines[1])
        return True

    @property
    def finished(self) -> bool:
        last = self._recent[-1] if self._recent else b""
        if last.endswith((b'"done":false}\n', b'"done":false}')) or b"true" not in last:
            return False
        return self.read(last).complete

    @staticmethod
    def split(whole: bytes) -> list[bytes]:
        return [line for line in whole.split(b"\n") if line not in (b"", b"\r")]

    @staticmethod
    def read(record: bytes) -> Ending:
        doc = _document(record)
        return _told(record, doc, complete=doc.get("done") is True)

    def _cut(self, data: bytes) -> int:
        return data.rfind(b"\n") + 1


class _Events(Splitter):
    """SSE. An event ends at an empty line; kinds of line ends may be mixed."""

    __slots__ = ()

    def feed(self, data: bytes) -> bytes:
        n = len(data)
        if (
            2 < n <= LONG
            and not self._held
            and data[-1] == 10
            and data[0] > 58  # neither a line end nor a comment's colon
            and 13 not in data
            and (data.find(b"\n") == n - 2 or data.find(b"\n\n") == n - 2)
        ):
            self.records += 1
            self._recent.append(data)
            return data
        return self._feed(data)

    def passes(self, lines: list[bytes]) -> bool:
        n = len(lines)
        if n == 5:
            event = lines[1]
        elif n == 6 and lines[2]:
            event = lines[1] + b"\n" + lines[2]
        else:
            return False
        if self._held or lines[-3] or not event or event[0] <= 58 or 13 in event:
            return False  # as in feed
        self.records += 1
        self._recent.append(event)
        return True

    @property
    def finished(self) -> bool:
        return bool(self._recent) and _is_last_event(self._recent[-1])

    @staticmethod
    def split(whole: bytes) -> list[bytes]:
        events = _EMPTY_LINES.split(whole.lstrip(b"\r\n"))
        return [event for event in events if event and not (event[0] == 58 and _is_comment(event))]

    @staticmethod
    def read(record: bytes) -> Ending:
        lines = [line.partition(b":") for line in record.splitlines()]
        data = b"\n".join(value.removeprefix(b" ") for name, _, value in lines if name == b"data")
        doc = _document(data)
        if _event_name(record) == b"error" and doc.get("error") is None:
            doc["error"] = data[:_HEAD].decode(errors="replace")
        return _told(record, doc, complete=_is_last_event(record))

    def _cut(self, data: bytes) -> int:
        # What is held begins a line: an end of line goes before it. The two bytes of context shift
        # what is found so that it is the offset in data behind a match.
        text = (b"x\n" + self._held[-2:])[-2:] + data
        return max(text.rfind(b"\n\n"), text.rfind(b"\n\r\n") + 1)


_SPLITTERS: Final = {Framing.NDJSON: _Lines, Framing.SSE: _Events}


def splitter(framing: Framing, *, tail_max: int = TAIL_MAX) -> Splitter:
    """A splitter for one stream; KeyError for JSON, which has no records."""
    return _SPLITTERS[framing](tail_max)


def first_record(buffer: bytes, framing: Framing) -> bytes | None:
    """The first whole record without its end, or None."""
    it = splitter(framing, tail_max=len(buffer))
    return next(iter(it.split(it.feed(buffer))), None)


class Opening:
    """
    Holds the beginning of a stream until it is known what it is.

    Errors do not commit, nor do comments, the chunk with an empty model, or events that only
    announce an answer. More than hold_max bytes without a decision commit. Once told, it stays:
    what is fed then is not looked at.
    """

    def __init__(self, framing: Framing, dialect: Dialect, *, hold_max: int = TAIL_MAX) -> None:
        self._splitter = splitter(framing, tail_max=hold_max)
        self._first_events = _FIRST_EVENTS[dialect]
        self._hold_max = hold_max
        self._pieces: list[bytes] = []
        self._bytes = 0
        self._blank_model = self._announced = False
        self._opened: Opened | None = None

    def feed(self, data: bytes) -> Opened | None:
        """How the answer begins; None: not known yet."""
        if self._opened is None:
            self._pieces.append(data)
            self._bytes += len(data)
            self._look(self._splitter.feed(data))
        if self._opened is None and self._bytes > self._hold_max:
            self._tell("commit")
        return self._opened

    def end(self) -> Opened:
        """How it began, now that the stream has ended."""
        if self._opened is None:
            self._look(self._splitter.flush())
        self._blank_model |= self._announced
        return self._opened or self._tell("empty")

    def _look(self, whole: bytes) -> None:
        for record in self._splitter.split(whole):
            told = self._splitter.read(record)
            if told.error_record is not None:
                self._tell("error", told.error_text)
                return
            if told.blank_model:
                self._blank_model = True
            elif _event_name(record) in self._first_events:
                self._announced = True
            else:
                self._tell("commit")
                return

    def _tell(self, kind: Literal["commit", "error", "empty"], error_text: str = "") -> Opened:
        held = b"".join(self._pieces)
        self._opened = Opened(kind, held, error_text, self._blank_model)
        return self._opened


def json_terminal(route: Route, body: bytes) -> Ending:
    """
    What an answer of one document tells.

    A long one is not parsed. Its marks are counted to see that it is whole, which is exact for
    any valid document cut short, and it is searched for what is wanted.
    """
    if len(body) <= LONG:
        parsed = _parse(body)
        doc, whole = _mapping(parsed), parsed is not None
    else:
        doc, whole = _search(body), _is_closed(body)
    done = route.operation not in _TELL_DONE or doc.get("done") is True
    return _told(body, doc, complete=whole and done, whole=whole)


def _event_name(record: bytes) -> bytes:
    found = _EVENT.match(record)
    return found[1] if found else b""


def _is_last_event(record: bytes) -> bool:
    return record.startswith((b"data: [DONE]", b"data:[DONE]")) or (
        _event_name(record) in _LAST_EVENTS
    )


def _is_comment(event: bytes) -> bool:
    return all(line.startswith(b":") for line in event.splitlines())


def _told(text: bytes, doc: dict[str, Any], *, complete: bool, whole: bool = True) -> Ending:
    error = doc.get("error")  # a text, or an object with a message
    said = _mapping(error).get("message", error)
    return Ending(
        complete,
        whole,
        error_record=None if error is None else text.rstrip(b"\r\n"),
        error_text=_written(said),
        blank_model=doc.get("model") == "",
        usage=_usage(doc),
    )


def _written(said: Any) -> str:
    if isinstance(said, str):
        return said
    try:
        return "" if said is None else json.dumps(said)
    except RecursionError:  # it could be read so deep, and no deeper
        return ""


def _parse(text: bytes) -> Any:
    """The document, None if it is no JSON."""
    try:
        return _decode(text)
    except (ValueError, RecursionError):  # or what only the lenient reader takes
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _document(text: bytes) -> dict[str, Any]:
    return _mapping(_parse(text)) if len(text) <= LONG else _search(text)


def _search(text: bytes) -> dict[str, Any]:
    """
    What is wanted of an object too long to parse, whose middle may be missing.

    A quoted key never stands inside a JSON string, where quotes are escaped. It may be nested in
    the arguments of a tool call: those come first, so the last one counts. Counters follow
    ``done`` and ``context``, which makes a last record megabytes long.
    """
    if not text.rstrip().endswith(b"}"):
        return {}
    done = text.rfind(b'"done"')
    counters = max(text.rfind(b'"total_duration"'), text.rfind(b'"usage"'))
    window = text[counters : counters + 512] if counters > done else b""
    numbers = {key.decode(): int(value) for key, value in _NUMBER.findall(window)}
    return {**numbers, "usage": numbers, "done": _DONE.match(text, max(done, 0)) is not None}


def _is_closed(body: bytes) -> bool:
    """Whether all that was opened is closed; fast, for only quotes and brackets are looked at."""
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Without two quotes side by side each bracket is inside or outside a string as before.
    marks = bare.translate(None, _NO_MARK).replace(b'""', b"")
    outside = b"".join(marks.split(b'"')[::2])
    closed = outside.count(b"}") + outside.count(b"]")
    return 0 < outside.count(b"{") + outside.count(b"[") == closed


def _usage(doc: dict[str, Any]) -> Usage:
    told = doc.get("usage")
    if told is None:
        told = _mapping(doc.get("response")).get("usage")
    if type(told) is dict:
        tokens_in = _count(told.get("prompt_tokens", told.get("input_tokens")))
        tokens_out = _count(told.get("completion_tokens", told.get("output_tokens")))
        if tokens_in or tokens_out:  # completions put a usage of zeros on every chunk
            return Usage(tokens_in, tokens_out)
    if "total_duration" not in doc and "eval_count" not in doc and "prompt_eval_count" not in doc:
        return _NO_USAGE
    return Usage(
        _count(doc.get("prompt_eval_count")),
        _count(doc.get("eval_count")),
        _seconds(doc.get("load_duration")),
        _seconds(doc.get("prompt_eval_duration")),
        _seconds(doc.get("eval_duration")),
        _seconds(doc.get("total_duration")),
    )


def _count(value: Any) -> int | None:
    """A number as Ollama counts; one with hundreds of digits could not be reckoned with."""
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _seconds(value: Any) -> float | None:
    """Of nanoseconds."""
    count = _count(value)
    return None if count is None else count / 1e9
