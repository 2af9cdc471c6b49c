"""
The kinds of values a file holds.

Each kind is a reader that refuses with advice, a writer that gives back the
users' words, and a JSON Schema. Readers of anything that may be secret never
echo it.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_args

from pydantic import PlainSerializer, PlainValidator, SecretStr, WithJsonSchema

from balancer.core.aliases import Aliases
from balancer.core.names import InvalidName, parse

from . import addresses, units
from .problems import shown, suggestion
from .settings import (
    Allow,
    AuthType,
    ClientIp,
    ContextPolicy,
    DiscoverySource,
    FairBy,
    HeaderDetail,
    IfAsked,
    KeepAlivePolicy,
    KeyPlace,
    LogFormat,
    LogLevel,
    Role,
    Strategy,
)

T = TypeVar("T")

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,63}")
_FIELD = re.compile(r"[A-Za-z0-9_-]{1,64}")
_VERSION = re.compile(r"[0-9]+(\.[0-9A-Za-z-]+)*")
_MOST_PORTS = 256  # all are asked at once
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_OUR_HEADERS = frozenset(
    {"connection", "content-encoding", "content-length", "expect", "host", "keep-alive"}
    | {"proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)


def read_words(value: object) -> list[str]:
    """
    Read a list of texts; one text is split at commas, semicolons and spaces.

    Raises:
        ValueError: Something else, or an item that is not text.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [word for word in re.split(r"[\s,;]+", value) if word]
    if not isinstance(value, list | tuple):
        raise ValueError("needs a list, such as [a, b].")  # noqa: TRY004 - pydantic collects ValueError only
    for item in value:
        _text(item)
    return list(value)


def _each(parse: Callable[[str], T]) -> Callable[[object], tuple[T, ...]]:
    return lambda value: tuple(parse(word) for word in read_words(value))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("needs text. Put the value in quotes.")  # noqa: TRY004 - pydantic collects ValueError only
    if not value.strip():
        raise ValueError("is empty.")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError("holds characters that are not text.")
    return value


def _optional(read: Callable[[object], T]) -> Callable[[object], T | None]:
    return lambda value: None if value is None else read(value)


def _secret(value: object) -> SecretStr:
    if _CONTROL.search(_text(value)):
        raise ValueError("contains a line break or another control character.")
    return SecretStr(_text(value))


def _flag(value: object) -> bool:
    word = value.strip().lower() if isinstance(value, str) else value
    if word in (True, "true", "yes", "on", "1"):
        return True
    if word in (False, "false", "no", "off", "0"):
        return False
    raise ValueError(f"{shown(value)} is not true or false.")


def _whole(least: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}", value.strip()):
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and least <= value < 10**9:
            return value
        raise ValueError(f"{shown(value)} is not a whole number of at least {least}.")

    return read


def _choice(kind: Any) -> Callable[[object], str]:
    known = get_args(kind)

    def read(value: object) -> str:
        word = value.strip().lower() if isinstance(value, str) else ""
        if word in known:
            return word
        hint = suggestion(word, known)
        raise ValueError(f"{shown(value)} is not one of {', '.join(known)}.{hint}")

    return read


def _key_limit(value: object) -> int:
    """A number, or -1."""
    try:
        return -1 if value in (-1, "-1") else _whole(1)(value)
    except ValueError as error:
        raise ValueError(f"{str(error)[:-1]}, nor -1 for no limit.") from None


def _priority(value: object) -> int | str:
    word = value.strip().lower() if isinstance(value, str) else value
    if word in ("interactive", "batch"):
        return str(word)
    try:
        return _whole(0)(value)
    except ValueError:
        raise ValueError(
            f"{shown(value)} is neither interactive, batch, nor a number of at least 0."
        ) from None


def _session_place(word: str) -> str:
    where, _, name = word.partition(":")
    if word == "prefix" or (where == "body" and _FIELD.fullmatch(name)):
        return word
    if where == "header" and _TOKEN.fullmatch(name):
        return word
    hint = suggestion(word, ("prefix", "header:X-Session-Id", "body:prompt_cache_key"))
    raise ValueError(f"{shown(word)} is not prefix, header:NAME or body:FIELD.{hint}")


def _slots(value: object) -> int | None:
    if value is None or value == "auto":
        return None
    try:
        return _whole(1)(value)
    except ValueError:
        raise ValueError(f"{shown(value)} is neither auto nor a number of slots.") from None


def _model_version(value: object) -> str:
    word = value.strip() if isinstance(value, str) else ""
    if word in ("min", "max") or _VERSION.fullmatch(word):
        return word
    hint = suggestion(word, ("min", "max"))
    raise ValueError(f'{shown(value)} is not min, max or a version such as "0.33.0".{hint}')


def _log_level(value: object) -> str:
    shortened = isinstance(value, str) and value.strip().lower() == "warn"
    return _choice(LogLevel)("warning" if shortened else value)


def _backend_url(value: object) -> addresses.BackendUrl:
    url = addresses.parse_ollama_host(_text(value))
    # Ollama falls back to a default port and warns; in a list of backends that is a fault.
    if url.warning or not url.port:
        raise ValueError((url.warning or "port 0 cannot be called").partition(";")[0] + ".")
    return url


def _discovery_sources(value: object) -> tuple[str, ...] | None:
    words = read_words(value)
    if words in (["auto"], ["none"]):
        return None if words == ["auto"] else ()
    return tuple(dict.fromkeys(map(_choice(DiscoverySource), words)))


def _ports(value: object) -> tuple[int, ...]:
    items = re.split(r"[\s,;]+", value.strip()) if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        items = [items]
    found: dict[int, None] = {}
    for item in items:
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", str(item).strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 0 < first <= last <= 65535:
            raise ValueError(f'{shown(item)} is neither a port nor a range such as "11440-11449".')
        found |= dict.fromkeys(range(first, last + 1))
        if len(found) > _MOST_PORTS:
            raise ValueError(f"names more than {_MOST_PORTS} ports.")
    return tuple(found)


def port_ranges(ports: tuple[int, ...]) -> list[int | str]:
    """Write neighbours as ranges again."""
    runs: list[tuple[int, int]] = []
    for port in ports:
        if runs and runs[-1][1] == port - 1:
            runs[-1] = (runs[-1][0], port)
        else:
            runs.append((port, port))
    return [first if first == last else f"{first}-{last}" for first, last in runs]


def _name(value: object) -> str:
    if not _NAME.fullmatch(_text(value)):
        raise ValueError(f"{shown(value)} is not a name. Use letters, digits and . _ : @ + -")
    return _text(value)


def _listen(value: object) -> tuple[addresses.Listen, ...]:
    listen = _each(addresses.parse_listen)(value)
    if not listen:
        raise ValueError("needs at least one address.")
    return listen


def _anonymous(value: object) -> tuple[addresses.Network, ...]:
    word = value.strip().lower() if isinstance(value, str) else ""
    named = {"never": (), "loopback": addresses.LOOPBACK, "always": addresses.EVERYWHERE}
    if word in named:
        return named[word]
    try:
        return _each(addresses.parse_network)(value)
    except ValueError as error:
        advice = "Or write never, loopback or always."
        raise ValueError(f"{error} {advice}{suggestion(word, named)}") from None


def _write_anonymous(networks: tuple[addresses.Network, ...]) -> str | list[str]:
    named = {(): "never", addresses.LOOPBACK: "loopback", addresses.EVERYWHERE: "always"}
    return named.get(networks) or _write_each(networks)


def _write_each(values: tuple[object, ...]) -> list[str]:
    return [str(value) for value in values]


def _headers(value: object) -> tuple[tuple[str, str], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise ValueError("needs a block of NAME: value.")  # noqa: TRY004 - pydantic collects ValueError only
    for name, text in value.items():
        _header_name(name)
        if not isinstance(text, str) or not text.isprintable():
            raise ValueError(f"{name} needs text on one line. Put the value in quotes.")
    if len({name.lower() for name in value}) < len(value):
        raise ValueError("names a header twice.")
    return tuple(value.items())


def _header_name(value: object) -> str:
    name = _text(value)
    if not _TOKEN.fullmatch(name):
        raise ValueError(f"{shown(name)} is not a header name.")
    if name.lower() in _OUR_HEADERS:
        raise ValueError(f"{name} is set by the balancer itself.")
    return name


def _context(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 256:
        raise ValueError(f"{value} is not a context: it counts tokens. 32k is 32768.")
    return _whole(256)(value)


def _model_name(value: object) -> str:
    try:
        name = parse(_text(value))
    except InvalidName as error:
        raise ValueError(f"{shown(value)} is not the name of a model: {error}.") from None
    if name.cloud:
        raise ValueError(f"{shown(value)} runs at ollama.com: no host of yours can keep it.")
    return _text(value)


def spelt_pins(value: object) -> object:
    """What may stand for a list of pins, as one: nothing, names in one text, names alone."""
    items = read_words(value) if value is None or isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return items
    return [{"model": item} if isinstance(item, str) else item for item in items]


def _nothing(value: object) -> None:
    if value is not None:
        raise ValueError("only null: the admin pages share server.listen.")


def _key_hash(value: object) -> bytes:
    digits = _text(value).strip().removeprefix("sha256:")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", digits):
        raise ValueError("is not a hash. Write sha256: and 64 hexadecimal digits.")
    return bytes.fromhex(digits)


def _globs(value: object) -> tuple[str, ...]:
    globs = _each(_text)(value)
    if not globs:
        raise ValueError('needs at least one name or glob; "*" is every model.')
    return globs


def _aliases(value: object) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if isinstance(value, str):  # from the environment
        pairs = [word.partition("=") for word in read_words(value)]
        value = {name: [m for n, _, m in pairs if n == name] for name, _, _ in pairs}
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise ValueError("needs a block of NAME: MODEL, or NAME: [MODEL, MODEL].")  # noqa: TRY004 - pydantic collects ValueError only
    written = tuple((_text(name), _each(_text)(models)) for name, models in value.items())
    Aliases(written)  # says what is wrong with them
    return written


def _write_aliases(aliases: tuple[tuple[str, tuple[str, ...]], ...]) -> dict[str, object]:
    return {name: models[0] if len(models) == 1 else list(models) for name, models in aliases}


def by_glob(value: object) -> object:
    """
    Read a block whose keys are globs over models' names.

    Raises:
        ValueError: It is none, or a key is not text.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError('needs a block of names, such as "qwen3*": {…}.')  # noqa: TRY004 - pydantic collects ValueError only
    for glob in value:
        _text(glob)
    return value


def _key_places(value: object) -> tuple[str, ...]:
    places = tuple(dict.fromkeys(map(_choice(KeyPlace), read_words(value))))
    if not places:
        raise ValueError(f"needs at least one of {', '.join(get_args(KeyPlace))}.")
    return places


def _schema(kind: str, *, null: bool = False, **more: Any) -> WithJsonSchema:
    plain = {"type": kind, **more}
    return WithJsonSchema({"anyOf": [plain, {"type": "null"}]} if null else plain)


def _one_of(kind: Any) -> WithJsonSchema:
    return _schema("string", enum=list(get_args(kind)))


def _or_number(pattern: str, least: int = 0) -> WithJsonSchema:
    text = {"type": "string", "pattern": pattern}
    return WithJsonSchema({"anyOf": [text, {"type": "number", "minimum": least}]})


_LIST = WithJsonSchema(
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
)
Flag = Annotated[bool, PlainValidator(_flag), _schema("boolean")]
Count = Annotated[int, PlainValidator(_whole(1)), _schema("integer", minimum=1)]
CountOrNull = Annotated[
    int | None, PlainValidator(_optional(_whole(1))), _schema("integer", null=True, minimum=1)
]
Whole = Annotated[int, PlainValidator(_whole(0)), _schema("integer", minimum=0)]
KeyLimit = Annotated[
    int | None,
    PlainValidator(_optional(_key_limit)),
    _schema("integer", null=True, minimum=-1),
]
PriorityOrNull = Annotated[
    int | str | None,
    PlainValidator(_optional(_priority)),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["interactive", "batch", None]},
                {"type": "integer", "minimum": 0},
            ]
        }
    ),
]
SessionPlaces = Annotated[
    tuple[str, ...],
    PlainValidator(_each(_session_place)),
    PlainSerializer(_write_each),
    _LIST,
]
Text = Annotated[str, PlainValidator(_text), _schema("string")]
TextOrNull = Annotated[str | None, PlainValidator(_optional(_text)), _schema("string", null=True)]
SecretOrNull = Annotated[
    SecretStr | None,
    PlainValidator(_optional(_secret)),
    PlainSerializer(lambda secret: secret and "***"),
    _schema("string", null=True),
]
Hash = Annotated[
    bytes | None,
    PlainValidator(_optional(_key_hash)),
    PlainSerializer(lambda digest: digest and "***"),
    _schema("string", null=True, pattern="^(sha256:)?[0-9a-fA-F]{64}$"),
]
Wait = Annotated[
    float,
    PlainValidator(units.parse_wait),
    PlainSerializer(units.format_duration),
    _or_number(units.DURATION_PATTERN),
]
Duration = Annotated[
    float,
    PlainValidator(units.parse_duration),
    PlainSerializer(units.format_duration),
    _or_number(units.DURATION_PATTERN),
]
DurationOrNull = Annotated[
    float | None,
    PlainValidator(_optional(units.parse_duration)),
    PlainSerializer(lambda span: None if span is None else units.format_duration(span)),
    WithJsonSchema({"type": ["string", "number", "null"]}),
]
WaitOrNull = Annotated[
    float | None,
    PlainValidator(_optional(units.parse_wait)),
    PlainSerializer(lambda span: None if span is None else units.format_duration(span)),
    WithJsonSchema({"type": ["string", "number", "null"]}),
]
Limit = Annotated[
    float | None,
    PlainValidator(units.parse_limit),
    PlainSerializer(units.format_limit),
    _or_number(units.DURATION_PATTERN, -1),
]
LimitOrNull = Annotated[
    float | None,
    PlainValidator(_optional(units.parse_limit)),
    PlainSerializer(units.format_limit),
    WithJsonSchema({"type": ["string", "number", "null"], "minimum": -1}),
]
Size = Annotated[
    int,
    PlainValidator(units.parse_size),
    PlainSerializer(units.format_size),
    _or_number(units.SIZE_PATTERN, 1),
]
Ratio = Annotated[
    float,
    PlainValidator(units.parse_ratio),
    PlainSerializer(units.format_ratio),
    _or_number(r"^[0-9.]+ ?%$"),
]
Weight = Annotated[
    float,
    PlainValidator(units.parse_weight),
    PlainSerializer(units.format_weight),
    _schema("number", exclusiveMinimum=0),
]
MemoryOrNull = Annotated[
    int | None,
    PlainValidator(_optional(units.parse_memory)),
    PlainSerializer(lambda size: None if size is None else units.format_size(size)),
    WithJsonSchema({"type": ["string", "integer", "null"]}),
]
ContextOrNull = Annotated[
    int | None, PlainValidator(_optional(_context)), _schema("integer", null=True, minimum=256)
]
ModelName = Annotated[str, PlainValidator(_model_name), _schema("string")]
Words = Annotated[
    tuple[str, ...], PlainValidator(_each(_text)), PlainSerializer(_write_each), _LIST
]
Globs = Annotated[tuple[str, ...], PlainValidator(_globs), PlainSerializer(_write_each), _LIST]
ModelAliases = Annotated[
    tuple[tuple[str, tuple[str, ...]], ...],
    PlainValidator(_aliases),
    PlainSerializer(_write_aliases),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {
                "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
            },
        }
    ),
]
Expiry = Annotated[
    float | None,
    PlainValidator(_optional(units.parse_expiry)),
    PlainSerializer(lambda at: None if at is None else units.format_instant(at)),
    _schema("string", null=True, pattern=units.INSTANT_PATTERN),
]
KeyPlaces = Annotated[
    tuple[KeyPlace, ...], PlainValidator(_key_places), PlainSerializer(_write_each), _LIST
]
Origins = Annotated[
    tuple[str, ...],
    PlainValidator(_each(addresses.parse_origin)),
    PlainSerializer(_write_each),
    _LIST,
]
HostNames = Annotated[
    tuple[str, ...],
    PlainValidator(_each(addresses.parse_host_name)),
    PlainSerializer(_write_each),
    _LIST,
]
Networks = Annotated[
    tuple[addresses.Network, ...],
    PlainValidator(_each(addresses.parse_network)),
    PlainSerializer(_write_each),
    _LIST,
]
Anonymous = Annotated[
    tuple[addresses.Network, ...],
    PlainValidator(_anonymous),
    PlainSerializer(_write_anonymous),
    _LIST,
]
ListenAt = Annotated[
    tuple[addresses.Listen, ...],
    PlainValidator(_listen),
    PlainSerializer(_write_each),
    _LIST,
]
Url = Annotated[
    addresses.BackendUrl, PlainValidator(_backend_url), PlainSerializer(str), _schema("string")
]
Name = Annotated[str, PlainValidator(_name), _schema("string", pattern=f"^{_NAME.pattern}$")]
NameOrNull = Annotated[
    str | None,
    PlainValidator(_optional(_name)),
    _schema("string", null=True, pattern=f"^{_NAME.pattern}$"),
]
Slots = Annotated[
    int | None,
    PlainValidator(_slots),
    PlainSerializer(lambda slots: slots or "auto"),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}]}),
]
Headers = Annotated[
    tuple[tuple[str, str], ...],
    PlainValidator(_headers),
    PlainSerializer(lambda headers: {name: "***" for name, _ in headers}),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}}),
]
HeaderNameOrNull = Annotated[
    str | None, PlainValidator(_optional(_header_name)), _schema("string", null=True)
]
Nothing = Annotated[None, PlainValidator(_nothing), _schema("null")]
ModelVersion = Annotated[str, PlainValidator(_model_version), _schema("string")]
OneRole = Annotated[Role, PlainValidator(_choice(Role)), _one_of(Role)]
OneHeaderDetail = Annotated[
    HeaderDetail, PlainValidator(_choice(HeaderDetail)), _one_of(HeaderDetail)
]
OneStrategy = Annotated[Strategy, PlainValidator(_choice(Strategy)), _one_of(Strategy)]
OneAuthType = Annotated[AuthType, PlainValidator(_choice(AuthType)), _one_of(AuthType)]
OneLogLevel = Annotated[LogLevel, PlainValidator(_log_level), _one_of(LogLevel)]
OneLogFormat = Annotated[LogFormat, PlainValidator(_choice(LogFormat)), _one_of(LogFormat)]
OneIfAsked = Annotated[IfAsked, PlainValidator(_choice(IfAsked)), _one_of(IfAsked)]
DiscoverySources = Annotated[
    tuple[DiscoverySource, ...] | None,
    PlainValidator(_discovery_sources),
    PlainSerializer(lambda sources: "auto" if sources is None else list(sources)),
    _LIST,
]
Ports = Annotated[
    tuple[int, ...],
    PlainValidator(_ports),
    PlainSerializer(port_ranges),
    WithJsonSchema({"type": "array", "items": {"type": ["integer", "string"]}}),
]
OneContextPolicy = Annotated[
    ContextPolicy, PlainValidator(_choice(ContextPolicy)), _one_of(ContextPolicy)
]
OneKeepAlivePolicy = Annotated[
    KeepAlivePolicy, PlainValidator(_choice(KeepAlivePolicy)), _one_of(KeepAlivePolicy)
]
OneAllow = Annotated[Allow, PlainValidator(_choice(Allow)), _one_of(Allow)]
OneFairBy = Annotated[FairBy, PlainValidator(_choice(FairBy)), _one_of(FairBy)]
OneClientIp = Annotated[ClientIp, PlainValidator(_choice(ClientIp)), _one_of(ClientIp)]
