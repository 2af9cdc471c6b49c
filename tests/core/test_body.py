"""Request bodies, read as Ollama reads them; expected texts are those of Ollama 0.33."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.core import body as subject
from balancer.core.body import Body, duration_ns, read, renamed, tuned
from balancer.core.domain import Kind, PlacementKey, Purpose
from balancer.core.errors import BadRequest, BalancerError, OptionError, UnknownModel, UnknownRoute
from balancer.core.routes import TABLE, other

ROUTES = {
    route.operation: route for route in TABLE if route.kind is Kind.ONE or route.operation == "show"
}
COUNT_TOKENS, TRANSCRIPTIONS = ROUTES.pop("v1_count_tokens"), ROUTES.pop("v1_transcriptions")
NATIVE = ("generate", "chat", "embed", "embeddings")
RUNNABLE: dict[str, dict[str, Any]] = {
    "generate": {"model": "m", "prompt": "x"},
    "chat": {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    "embed": {"model": "m", "input": "x"},
    "embeddings": {"model": "m", "prompt": "x"},
    "show": {"model": "m"},
    "v1_chat": {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    "v1_completions": {"model": "m", "prompt": "x"},
    "v1_embeddings": {"model": "m", "input": "x"},
    "v1_responses": {"model": "m", "input": "x"},
    "v1_messages": {
        "model": "m",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "x"}],
    },
}
M = "registry.ollama.ai/library/m:latest"

operations = pytest.mark.parametrize("operation", list(ROUTES))


def parsed(operation: str, body: object) -> Body:
    """Read bytes, a text as it stands, or anything else as compact JSON."""
    if isinstance(body, str):
        body = body.encode()
    if not isinstance(body, bytes):
        body = json.dumps(body, separators=(",", ":")).encode()
    return read(ROUTES[operation], body)


def given_with(operation: str, **fields: object) -> Body:
    """Read a runnable body with some fields beside or in place of its own."""
    return parsed(operation, RUNNABLE[operation] | fields)


def refusal(operation: str, body: object) -> BalancerError:
    """The error that a body earns."""
    with pytest.raises(BalancerError) as refused:
        parsed(operation, body)
    return refused.value


@operations
def test_every_operation_has_a_runnable_body(operation: str) -> None:
    """Each route that a body is read for accepts its plainest body."""
    body = parsed(operation, RUNNABLE[operation])
    assert (body.model, body.name.canonical, body.purpose) == ("m", M, Purpose.RUN)
    assert body.key == PlacementKey(M)
    limit = RUNNABLE[operation].get("max_tokens")
    assert (body.options, body.num_ctx, body.keep_alive) == ({}, None, None)
    assert body.output_tokens == limit


@operations
@pytest.mark.parametrize("blank", [b"", b" \r\n\t"])
def test_an_empty_body(operation: str, blank: bytes) -> None:
    """No JSON at all has a text of its own, one per dialect."""
    error = refusal(operation, blank)
    expected = "EOF" if operation.startswith("v1") else "missing request body"
    assert (type(error), error.text) == (BadRequest, expected)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"{oops", "invalid character 'o' looking for beginning of object key string"),
        (b"\x1f\x8b\x08", r"invalid character '\x1f' looking for beginning of value"),
        (b"\xef\xbb\xbf{}", "invalid character 'ï' looking for beginning of value"),
        (b"'a'", r"invalid character '\'' looking for beginning of value"),
        ('{"a":1}'.encode("utf-16"), "invalid character 'ÿ' looking for beginning of value"),
        (b'{"model":"m"', "unexpected EOF"),
        (b'{"model":"m', "unexpected EOF"),
        (b'{"model":', "unexpected EOF"),
        (b'{"model":-', "unexpected EOF"),
        (b'{"model":"m",}', "invalid character '}' looking for beginning of object key string"),
        (b'{"model" "m"}', "invalid character '\"' after object key"),
        (b'{"model":"m" "a":1}', "invalid character '\"' after object key:value pair"),
        (b'{"a":[1 2]}', "invalid character '2' after array element"),
        (b'{"a":[1,]}', "invalid character ']' looking for beginning of value"),
        (b'{"a":NaN}', "invalid character 'N' looking for beginning of value"),
        (b'{"a":"x\ny"}', r"invalid character '\n' in string literal"),
        (b'{"a":"\\x"}', "invalid character 'x' in string escape code"),
        (b" " * 100_000, "unexpected EOF"),
        (b" " * 100_000 + b'{"model":"m"}', "malformed JSON"),
    ],
)
def test_malformed_json_gets_gos_text(body: bytes, text: str) -> None:
    """What Go's decoder says, on a route of each dialect."""
    for operation in ("show", "v1_chat"):
        error = refusal(operation, body)
        assert (type(error), error.text) == (BadRequest, text)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"\xff"}',
        b'{"model":"m","x":"\xed\xa0\x80"}',
        b'{"\xc3":1,"model":"m"}',
        '{"model":"m","prompt":"é"'.encode("latin-1") + b"}",
        b'{"model":"m","prompt":"' + b"a" * 2_000_000 + b'\xe2\x82"}',
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"m","keep_alive":' + b"1" * 1_000_000 + b"}",
        b'{"model":"m","options":{"num_ctx":' + b"1" * 1_000_000 + b"}}",
        b'{"model":"m","options":{"num_ctx":1e30}}',
        b'{"model":"m","options":{"num_ctx":1e999}}',
        b'{"' + b"\\n" * 5000 + b'":1,"model":"m"}',
        b" " * 2_000_000 + b'{"model":"m","prompt":"x"}',
        b'{"model"' + b" " * 2_000_000 + b':"m","prompt":"x"}',
        b"{" + b",".join(b'"%d":1' % number for number in range(100_000)) + b"}",
    ],
)
def test_hostile_bodies_are_bad_requests(body: bytes) -> None:
    """Bad UTF-8, depth, huge numbers and floods of keys end in a 400, nothing else."""
    assert refusal("generate", body).status == 400


@operations
@pytest.mark.parametrize("body", ["{}", "null", "nullx", '{"model":null}', '{"model":""}'])
def test_no_model_is_answered_route_by_route(operation: str, body: str) -> None:
    """``null`` acts like an empty object; some routes answer 404 to a nameless model."""
    error = refusal(operation, body)
    if operation == "v1_chat":
        assert error.text == "[] is too short - 'messages'"
    elif operation == "v1_embeddings":
        assert error.text == "invalid input"
    elif operation in {"generate", "embed", "v1_completions"}:
        assert (type(error), error.text) == (UnknownModel, "model '' not found")
    else:
        assert (type(error), error.text) == (BadRequest, "model is required")


@pytest.mark.parametrize(
    ("operation", "status", "text"),
    [
        ("v1_chat", 400, "model is required"),
        ("v1_embeddings", 404, "model '' not found"),
        ("v1_completions", 404, "model '' not found"),
        ("v1_responses", 400, "model is required"),
        ("v1_messages", 400, "model is required"),
    ],
)
def test_no_model_behind_the_v1_checks(operation: str, status: int, text: str) -> None:
    """With a good input a missing model is what remains to complain of."""
    error = refusal(operation, RUNNABLE[operation] | {"model": ""})
    assert (error.status, error.text) == (status, text)


def test_a_blank_model_is_named_in_the_text() -> None:
    """White space is no model, but the text repeats it as it came."""
    assert refusal("generate", {"model": " "}).text == "model ' ' not found"


@operations
@pytest.mark.parametrize("model", ["a@b", "m:", "a/b/c/d", "\ufffd", "é", "m" * 100_000])
def test_a_bad_name_is_a_bad_request(operation: str, model: str) -> None:
    """Every route gives the same text."""
    error = refusal(operation, RUNNABLE[operation] | {"model": model})
    assert (type(error), error.text) == (BadRequest, "invalid model name")


def test_two_sources_are_a_bad_request() -> None:
    """The text names the model."""
    error = refusal("generate", {"model": "a:cloud:local"})
    assert error.text == 'use either :local or :cloud, not both: "a:cloud:local"'


def test_only_show_falls_back_to_name() -> None:
    """Go clients send an empty model beside the name; inference routes know no name."""
    assert parsed("show", {"model": "", "name": "x"}).model == "x"
    assert parsed("show", {"model": "y", "name": "x"}).model == "y"
    assert refusal("chat", {"model": "", "name": "x"}).text == "model is required"


def test_the_model_is_kept_as_written() -> None:
    """Answers echo the client's spelling, while placement uses the canonical one."""
    body = parsed("show", r'{"model":" Library/\u004d:LATEST "}')
    assert (body.model, body.key.model) == (" Library/M:LATEST ", M)


@pytest.mark.parametrize(
    ("operation", "body", "value", "struct"),
    [
        ("generate", "[]", "array", "api.GenerateRequest"),
        ("embed", '"x"', "string", "api.EmbedRequest"),
        ("embeddings", "-1", "number", "api.EmbeddingRequest"),
        ("show", "5 ", "number", "api.ShowRequest"),
        ("v1_chat", "true", "bool", "openai.ChatCompletionRequest"),
        ("v1_embeddings", " []", "array", "openai.EmbedRequest"),
    ],
)
def test_a_body_must_be_an_object(operation: str, body: str, value: str, struct: str) -> None:
    """Go tells what it found and what it wanted."""
    error = refusal(operation, body)
    text = f"json: cannot unmarshal {value} into Go value of type {struct}"
    assert (type(error), error.text) == (BadRequest, text)


@pytest.mark.parametrize(
    ("operation", "body", "value", "field", "wanted"),
    [
        ("chat", '{"model":1}', "number", "ChatRequest.model", "string"),
        ("chat", '{"stream":"x"}', "string", "ChatRequest.stream", "bool"),
        ("chat", '{"Messages":{}}', "object", "ChatRequest.messages", "[]api.Message"),
        ("chat", '{"tools":1}', "number", "ChatRequest.tools", "api.Tools"),
        ("generate", '{"prompt":[]}', "array", "GenerateRequest.prompt", "string"),
        ("embed", '{"options":[]}', "array", "EmbedRequest.options", "map[string]interface {}"),
        ("show", '{"options":1}', "number", "ShowRequest.options", "map[string]interface {}"),
        ("v1_completions", '{"prompt":["x"]}', "array", "CompletionRequest.prompt", "string"),
        ("v1_completions", '{"max_tokens":true}', "bool", "CompletionRequest.max_tokens", "int"),
        (
            "generate",
            '{"keep_alive":1e999}',
            *("number 1e999", "GenerateRequest.keep_alive", "float64"),
        ),
        (
            "v1_chat",
            '{"max_tokens":1.5}',
            *("number 1.5", "ChatCompletionRequest.max_tokens", "int"),
        ),
        (
            "v1_chat",
            '{"stream_options":{"include_usage":1}}',
            *("number", "StreamOptions.stream_options.include_usage", "bool"),
        ),
    ],
)
def test_fields_must_have_their_type(
    operation: str, body: str, value: str, field: str, wanted: str
) -> None:
    """What we read must have the type that Ollama gives it; Go's text names the place."""
    error = refusal(operation, body)
    text = f"json: cannot unmarshal {value} into Go struct field {field} of type {wanted}"
    assert (type(error), error.text) == (BadRequest, text)


def test_types_that_a_route_does_not_read_are_the_backends_matter() -> None:
    """The same key may be anything where Ollama ignores it."""
    assert given_with("embed", stream="x", shift=1, prompt=[]).model == "m"
    assert given_with("v1_chat", keep_alive=True, options=5, max_completion_tokens="x").model == "m"
    assert given_with("chat", format=5, think="x").model == "m"


# --- one key, one meaning ----------------------------------------------------------------------


@pytest.mark.parametrize("key", ["Model", "MODEL", "mod\\u0065l", "\\u004dodel"])
def test_a_case_variant_alone_counts_as_the_key(key: str) -> None:
    """Go takes a field's name in any case and any escape."""
    assert parsed("show", f'{{"{key}":"x"}}').model == "x"


def test_go_folds_two_letters_from_beyond_ascii() -> None:
    """The long s and the Kelvin sign count as s and k."""
    body = parsed("generate", '{"model":"m","\u017fhift":false,"\u212aeep_alive":5}')
    assert (body.options, body.keep_alive) == ({"shift": False}, 5)


@pytest.mark.parametrize(
    "fields",
    [
        '"model":"a","Model":"b"',
        '"Model":"a","MODEL":"b"',
        '"model":"a","Model":null',
        '"model":"a", "\\u004dodel":"b"',
        '"model":"m","shift":true,"\u017fhift":true',
        '"model":"m","prompt":"x","Prompt":""',
    ],
)
def test_two_spellings_of_a_key_are_refused(fields: str) -> None:
    """Readers that mind case would see another value than those that do not."""
    assert "two spellings" in refusal("generate", f"{{{fields}}}").text


def test_case_variants_of_other_keys_are_no_matter() -> None:
    """What we do not read may come twice in different spellings."""
    assert given_with("generate", Top_P=1, top_p=2).model == "m"


@pytest.mark.parametrize("space", ["", " ", "\n  "])
def test_the_last_of_equal_scalar_keys_wins(space: str) -> None:
    """As in Go, however the text is laid out."""
    text = '{"model":"a",S"prompt":"x",S"stream":true,S"model":"bb",S"stream":false}'
    body = parsed("generate", text.replace("S", space))
    assert (body.model, body.streaming) == ("bb", False)


@pytest.mark.parametrize(
    "fields",
    [
        '"options":{"num_ctx":1},"options":{"num_gpu":1}',
        '"options":null,"options":{"num_gpu":1}',
        '"options":{"num_gpu":1},"options":null',
        '"tools":[],"tools":[]',
        '"unheard":{},"unheard":1',
        '"opt\\u0069ons":{},"options":{}',
        '"stream":false,"stream":null',
    ],
)
def test_repeated_objects_arrays_and_nulls_are_refused(fields: str) -> None:
    """Go merges objects and lets null reset some fields only, so the last does not win."""
    for layout in (f'{{"model":"m",{fields}}}', f'{{ "model" : "m" , {fields} }}'):
        assert "more than once" in refusal("chat", layout).text


@pytest.mark.parametrize(
    "text",
    [
        # Skipping as many bytes as the last value has, from the first one on, lands on a
        # separator inside the last value: a walk by lengths would find nothing wrong.
        '{"a":{},"b":12,"model":"m","a":{"x":1               ,"b":10,"model":"m"}}',
        '{"a":0,"b":12,"a":{"x":1          ,"b":1}}',
        '{"model":"m","a":1,"b":2,"c":3,"d":4,"e":5,"f":[],"f":[]}',
        '{"a": 0,"b":12,"c":12,"d":12,"a":{"x":1, "b": 10, "c": 10, "d": 1}}',
    ],
)
def test_a_repeat_cannot_hide_behind_lengths(text: str) -> None:
    """A value crafted to look like the following fields does not cover its own repetition."""
    assert "more than once" in refusal("generate", text).text


def test_a_long_body_is_walked_the_same_way() -> None:
    """Beyond a quarter of a megabyte another path reads the text, with the same result."""
    long = "x" * 300_000
    text = f'{{"model":"a","prompt":"{long}","raw":true,"stream":false,"model":"b"}}'
    body = parsed("generate", text)
    assert (body.model, body.streaming, body.prompt_tokens) == ("b", False, 300_002 // 4)
    assert "two spellings" in refusal("generate", text.replace('"raw"', '"Stream"')).text
    assert "more than once" in refusal("generate", text.replace('"raw":true', '"model":{}')).text


@pytest.mark.parametrize("behind", ["x", "}", '{"model":"other"}', "\n\n[", " null", "\x00"])
def test_what_follows_the_first_value_is_ignored(behind: str) -> None:
    """Ollama decodes one value and looks no further."""
    assert parsed("show", '{"model":"m"}' + behind).model == "m"


def test_half_a_surrogate_pair_is_no_reason_to_refuse() -> None:
    """Clients that cut text by UTF-16 units send such; Go reads U+FFFD."""
    text = (
        r'{"model":"m","prompt":"a\ud83d","system":"\ude00\ud83d\ude00\\ud83d","suffix":"\uD800x"}'
    )
    assert parsed("generate", text).model == "m"
    assert refusal("generate", r'{"model":"m\ud83d"}').text == "invalid model name"
    assert refusal("generate", r'{"model":"m","prompt":"\ud83d').text == "unexpected EOF"


# --- what a call is for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "fields"),
    [
        ("generate", {"prompt": ""}),
        ("generate", {"prompt": None}),
        ("chat", {"messages": []}),
        ("chat", {"messages": None}),
        ("embed", {"input": ""}),
        ("embed", {"input": []}),
        ("embed", {"input": None}),
        ("embeddings", {"prompt": ""}),
        ("embeddings", {"prompt": None}),
    ],
)
def test_an_empty_prompt_loads(operation: str, fields: dict[str, object]) -> None:
    """The answer is one document, though a stream is the default and may even be asked for."""
    body = given_with(operation, stream=True, **fields)
    assert (body.purpose, body.streaming) == (Purpose.LOAD, False)


def test_an_absent_prompt_loads() -> None:
    """The field may be missing altogether, or its array may hold white space."""
    for text in ('{"model":"m"}', '{"model":"m","messages":[ \n ]}'):
        assert parsed("chat", text).purpose is Purpose.LOAD
    assert parsed("chat", '{"model":"m","messages":[null]}').purpose is Purpose.RUN


def test_images_do_not_make_a_prompt() -> None:
    """Ollama looks at the prompt alone."""
    assert given_with("generate", prompt="", images=["aGk="]).purpose is Purpose.LOAD


ZEROES = [0, -0.0, 0.0, 1e-10, "0", "0s", "-0", "+0", "0h0m0.0s", "0.1ns", "-0.1ns"]


@pytest.mark.parametrize("keep_alive", ZEROES)
@pytest.mark.parametrize("operation", ["generate", "chat"])
def test_an_empty_prompt_with_no_keep_alive_unloads(operation: str, keep_alive: object) -> None:
    """Every spelling of zero does; options do not matter then, not even wrong ones."""
    empty = {"prompt": "", "messages": []}
    body = given_with(operation, **empty, keep_alive=keep_alive, options={"num_ctx": "x"})
    assert (body.purpose, body.streaming) == (Purpose.UNLOAD, False)
    assert (body.keep_alive, body.key) == (keep_alive, PlacementKey(M))


@pytest.mark.parametrize("keep_alive", [1, -1, 0.5, -1e-10, "1ns", "-1ns", "5m", "-1m", None])
def test_other_keep_alives_load(keep_alive: object) -> None:
    """A negative one means for ever, however small."""
    assert given_with("generate", prompt="", keep_alive=keep_alive).purpose is Purpose.LOAD


def test_a_prompt_with_no_keep_alive_runs() -> None:
    """Only the call's end unloads then."""
    assert given_with("generate", keep_alive=0).purpose is Purpose.RUN


@pytest.mark.parametrize("operation", ["embed", "embeddings"])
def test_embeddings_cannot_unload(operation: str) -> None:
    """Ollama loads for them, and lets the model go after."""
    body = given_with(operation, input=None, prompt=None, keep_alive=0)
    assert body.purpose is Purpose.LOAD


def test_purposes_on_v1() -> None:
    """An empty prompt loads and may still stream; embeddings of an empty text run."""
    body = given_with("v1_completions", prompt="", stream=True, keep_alive=0)
    assert (body.purpose, body.streaming, body.keep_alive) == (Purpose.LOAD, True, None)
    assert given_with("v1_embeddings", input="").purpose is Purpose.RUN


@pytest.mark.parametrize("messages", ["null", "[]", "[ ]"])
def test_v1_chat_wants_messages(messages: str) -> None:
    """Before the model is looked at."""
    error = refusal("v1_chat", f'{{"messages":{messages}}}')
    assert (error.status, error.text) == (400, "[] is too short - 'messages'")


@pytest.mark.parametrize(
    ("operation", "given_input", "text"),
    [
        ("v1_embeddings", "null", "invalid input"),
        ("v1_embeddings", "[ ]", "invalid input"),
        ("v1_embeddings", "5", "invalid input type"),
        ("embed", "{}", "invalid input type"),
        ("embed", "true", "invalid input type"),
    ],
)
def test_inputs_that_cannot_be_embedded(operation: str, given_input: str, text: str) -> None:
    """A text or a list of them will do; the list's items are the backend's matter."""
    assert refusal(operation, f'{{"model":"m","input":{given_input}}}').text == text


@pytest.mark.parametrize("operation", list(ROUTES))
@pytest.mark.parametrize("stream", [None, True, False])
def test_streaming(operation: str, stream: bool | None) -> None:
    """Natively the default is to stream, on `/v1` it is not; embeddings and show never do."""
    body = given_with(operation, stream=stream)
    route = ROUTES[operation]
    expected = operation in {"generate", "chat"} if stream is None else stream
    assert body.streaming is (expected and route.stream_framing is not None)


# --- options, placement, keep_alive ------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sent", "placed"),
    [
        (None, {}, ()),
        ({}, {}, ()),
        ({"temperature": 0, "seed": "x"}, {}, ()),
        ({"num_ctx": None}, {}, ()),
        ({"num_ctx": 8192}, {"num_ctx": 8192}, (("num_ctx", 8192),)),
        ({"num_ctx": 8192.9}, {"num_ctx": 8192}, (("num_ctx", 8192),)),
        ({"num_ctx": 0}, {"num_ctx": 4}, (("num_ctx", 4),)),
        ({"num_ctx": -7}, {"num_ctx": 4}, (("num_ctx", 4),)),
        ({"num_gpu": -1}, {"num_gpu": -1}, ()),
        ({"num_gpu": 0}, {"num_gpu": 0}, (("num_gpu", 0),)),
        (
            {"use_mmap": False, "main_gpu": 0},
            {"main_gpu": 0, "use_mmap": False},
            (("main_gpu", 0), ("use_mmap", False)),
        ),
        (
            {"num_thread": 4, "num_batch": 64, "draft_num_predict": 2},
            {"num_thread": 4, "num_batch": 64, "draft_num_predict": 2},
            (("draft_num_predict", 2), ("num_batch", 64), ("num_thread", 4)),
        ),
        ({"Num_Ctx": 9}, {}, ()),
    ],
)
@pytest.mark.parametrize("operation", NATIVE)
def test_options_that_place_a_call(
    operation: str,
    options: dict[str, object] | None,
    sent: dict[str, object],
    placed: tuple[tuple[str, object], ...],
) -> None:
    """Only what makes another runner counts, as Ollama cuts and clamps it; its names mind case."""
    body = given_with(operation, options=options)
    assert (body.options, body.key) == (sent, PlacementKey(M, placed))
    assert body.num_ctx == sent.get("num_ctx")


def test_shift_places_only_when_off() -> None:
    """It is on by default, but a warm-up repeats what was said; embeddings know no shift."""
    for operation in ("generate", "chat"):
        off, on = given_with(operation, shift=False), given_with(operation, shift=True)
        assert (off.options, off.key.options) == ({"shift": False}, (("shift", False),))
        assert (on.options, on.key.options) == ({"shift": True}, ())
    assert given_with("embed", shift=False).options == {}


@pytest.mark.parametrize("option", ["num_ctx", "num_gpu", "main_gpu", "num_predict"])
@pytest.mark.parametrize("value", ["x", True, [], {}])
def test_an_option_of_the_wrong_type_is_a_500(option: str, value: object) -> None:
    """So it is with Ollama."""
    error = refusal("generate", RUNNABLE["generate"] | {"options": {option: value}})
    assert isinstance(error, OptionError)
    assert (error.status, error.text) == (500, f'option "{option}" must be of type integer')


def test_a_boolean_option_of_the_wrong_type() -> None:
    """The text tells the type."""
    error = refusal("embed", RUNNABLE["embed"] | {"options": {"use_mmap": 1}})
    assert (error.status, error.text) == (500, 'option "use_mmap" must be of type boolean')


def test_a_cloud_model_has_no_runner() -> None:
    """Its options go to the cloud unread, and its placement is not that of the local model."""
    body = given_with("generate", model="m:cloud", options={"num_ctx": "x"}, shift=False)
    assert body.options == {}
    assert body.key == PlacementKey("registry.ollama.ai/library/m:cloud")


def test_v1_places_by_the_model_alone() -> None:
    """There is no way to give options or a keep_alive there."""
    body = given_with("v1_chat", options={"num_ctx": 8}, keep_alive=0, shift=False)
    assert (body.key, body.keep_alive) == (PlacementKey(M), None)


@pytest.mark.parametrize(
    ("keep_alive", "text"),
    [
        ("300", 'time: missing unit in duration "300"'),
        ("-1", 'time: missing unit in duration "-1"'),
        ("1h5", 'time: missing unit in duration "1h5"'),
        ("", 'time: invalid duration ""'),
        ("-", 'time: invalid duration "-"'),
        ("m", 'time: invalid duration "m"'),
        (".s", 'time: invalid duration ".s"'),
        ("1s ", 'time: unknown unit "s " in duration "1s "'),
        ("5x", 'time: unknown unit "x" in duration "5x"'),
        ('"', r'time: invalid duration "\""'),
        ("9223372036854775808ns", 'time: invalid duration "9223372036854775808ns"'),
        ("2562048h", 'time: invalid duration "2562048h"'),
        (True, "Unsupported type: 'bool'"),
        ([], "Unsupported type: '[]interface {}'"),
        ({}, "Unsupported type: 'map[string]interface {}'"),
    ],
)
def test_keep_alives_that_go_refuses(keep_alive: object, text: str) -> None:
    """With its own texts, a missing unit being the usual mistake."""
    error = refusal("generate", {"model": "m", "keep_alive": keep_alive})
    assert (type(error), error.text) == (BadRequest, text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1h30m", 5_400 * 10**9),
        ("1.5s", 1_500_000_000),
        (".5ms", 500_000),
        ("1.µs", 1_000),
        ("2us3μs4ns", 5_004),
        ("-1m", -60 * 10**9),
        ("-9223372036854775808ns", -(2**63)),
        ("+0", 0),
    ],
)
def test_durations(text: str, expected: int) -> None:
    """Go's grammar: signs, fractions, several units, two letters for micro."""
    assert duration_ns(text) == expected


def test_keep_alive_is_handed_on_as_given() -> None:
    """Numbers stay numbers, durations stay texts, null is nothing."""
    given = [300, -1, 1.5, "5m", None]
    assert [given_with("embed", keep_alive=each).keep_alive for each in given] == given


# --- estimates and flags -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "fields", "expected"),
    [
        ("chat", {"options": {"num_predict": 7}}, 7),
        ("generate", {"options": {"num_predict": 7.9}}, 7),
        ("generate", {"options": {"num_predict": 0}}, None),
        ("generate", {"options": {"num_predict": -1}}, None),
        ("generate", {"max_tokens": 5}, None),
        ("v1_chat", {"max_tokens": 5, "max_completion_tokens": 9}, 5),
        ("v1_chat", {"max_completion_tokens": 9}, 9),
        ("v1_chat", {"max_completion_tokens": "9"}, None),
        ("v1_completions", {"max_tokens": 0}, None),
        ("v1_completions", {"max_tokens": None}, None),
        ("v1_chat", {"options": {"num_predict": 7}}, None),
        ("v1_responses", {"max_output_tokens": 5}, 5),
        ("v1_responses", {"max_tokens": 5}, None),
        ("v1_messages", {"max_tokens": 5}, 5),
    ],
)
def test_the_limit_on_the_answer(
    operation: str, fields: dict[str, object], expected: int | None
) -> None:
    """Each dialect's own field; what is not positive is no limit."""
    assert given_with(operation, **fields).output_tokens == expected


def test_the_prompt_is_estimated_from_what_carries_it() -> None:
    """A quarter of the bytes of prompt, system and context; images and schemas do not count."""
    prompt, image = "p" * 4000, "A" * 400_000
    assert given_with("generate", prompt=prompt, images=[image]).prompt_tokens == 1000
    assert given_with("generate", prompt=prompt, system=prompt, format={}).prompt_tokens == 2001
    assert given_with("embed", input=[prompt, prompt]).prompt_tokens == 2001


def test_images_in_messages_are_no_prompt() -> None:
    """Natively they stand in a list of their own, on `/v1` in data URLs."""
    image, words = "A" * 400_000, "word " * 800
    message = {"role": "user", "content": words, "images": [image, image]}
    assert 1000 <= given_with("chat", messages=[message, message]).prompt_tokens - 1000 < 1100
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
    content = [{"type": "text", "text": words}, part, part]
    messages = [{"role": "user", "content": content}]
    assert 1000 <= given_with("v1_chat", messages=messages).prompt_tokens < 1100
    part = {"type": "input_image", "image_url": f"data:image/png;base64,{image}"}
    given = [{"role": "user", "content": [{"type": "input_text", "text": words}, part]}]
    assert 1000 <= given_with("v1_responses", input=given).prompt_tokens < 1100
    source = {"type": "base64", "media_type": "image/png", "data": image}
    blocks = [{"type": "image", "source": source}, {"type": "text", "text": words}]
    messages = [{"role": "user", "content": blocks}]
    assert 1000 <= given_with("v1_messages", messages=messages).prompt_tokens < 1100


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "model is required"),
        ({"model": "m"}, "max_tokens is required and must be positive"),
        ({"model": "m", "max_tokens": 0}, "max_tokens is required and must be positive"),
        ({"model": "m", "max_tokens": 1}, "messages is required"),
        ({"model": "m", "max_tokens": 1, "messages": []}, "messages is required"),
    ],
)
def test_what_anthropics_api_asks_for(body: object, text: str) -> None:
    """Ollama's three checks, in its order."""
    error = refusal("v1_messages", body)
    assert (type(error), error.text) == (BadRequest, text)


def test_prompts_of_the_newer_routes() -> None:
    """Instructions, system text and tools carry prompt too; the input may be anything."""
    words = "p" * 4000
    told = given_with("v1_responses", instructions=words, input=[words], tools=[words])
    assert 3000 <= told.prompt_tokens < 3010
    told = given_with("v1_messages", system=[{"type": "text", "text": words}], tools=[words])
    assert 2000 <= told.prompt_tokens < 2030
    assert given_with("v1_responses", input=5).model == "m"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("null", False),
        ("{}", False),
        ('{"include_usage":false}', False),
        ('{"include_usage":true}', True),
        ('{"Include_Usage":true}', True),
        ('{"include_usage":null}', False),
    ],
)
def test_include_usage(options: str, expected: bool) -> None:
    """Asked for below stream_options, in any case."""
    text = f'{{"model":"m","prompt":"x","stream_options":{options}}}'
    assert parsed("v1_completions", text).include_usage is expected


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({}, (False, False, False)),
        ({"verbose": True}, (True, False, False)),
        ({"verbose": False, "system": "", "options": {}}, (False, False, False)),
        ({"system": "x"}, (False, True, False)),
        ({"options": {"num_ctx": "anything"}}, (False, False, True)),
    ],
)
def test_what_show_is_asked_for(fields: dict[str, object], flags: tuple[bool, bool, bool]) -> None:
    """Each of these makes another answer."""
    body = given_with("show", **fields)
    assert (body.verbose, body.system, body.options_given) == flags


# --- properties --------------------------------------------------------------------------------

KEYS = st.sampled_from(
    [
        *("model", "Model", "name", "stream", "options", "keep_alive", "messages", "prompt"),
        *("input", "shift", "stream_options", "max_tokens", "num_ctx", "other"),
        *('q"x', "back\\slash", "é"),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("m"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(KEYS, JSON, max_size=6)
LAYOUTS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t: ")])
OPERATIONS = st.sampled_from(sorted(ROUTES))


def outcome(operation: str, body: bytes) -> object:
    """The body read, or the refusal; anything else fails the test."""
    try:
        return read(ROUTES[operation], body)
    except BalancerError as error:
        return type(error), error.status, error.text


@given(OPERATIONS, st.binary(max_size=60))
def test_no_bytes_raise_anything_but_our_errors(operation: str, body: bytes) -> None:
    """Any bytes are read or refused."""
    outcome(operation, body)
    outcome(operation, b'{"model":"m",' + body)


@given(OPERATIONS, OBJECTS, LAYOUTS, st.data())
@settings(max_examples=400)
def test_no_damage_raises_anything_but_our_errors(
    operation: str, fields: dict[str, Any], layout: tuple[str, str], data: st.DataObject
) -> None:
    """JSON with bytes put in, taken out or cut off is read or refused."""
    body = bytearray(json.dumps(fields, separators=layout).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(body)))
        body[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=3))
    outcome(operation, bytes(body))


@given(OPERATIONS, OBJECTS, st.sampled_from([b"", b" ", b"x", b"}"]))
@settings(max_examples=400)
def test_the_layout_does_not_matter(operation: str, fields: dict[str, Any], behind: bytes) -> None:
    """The same object is read, or refused, alike in every layout, escaped or not."""
    texts = [
        json.dumps(fields, separators=layout, ensure_ascii=ascii_only, allow_nan=True)
        for layout in [(",", ":"), (", ", ": "), (" ,\n", "\t: ")]
        for ascii_only in (True, False)
    ]
    bodies = [text.encode(errors="replace") for text in texts]
    first = outcome(operation, bodies[0])
    if isinstance(first, Body):
        fields_read = (first.model, first.key, first.streaming, first.purpose, first.keep_alive)
        for body in bodies:
            other = outcome(operation, body + behind)
            assert isinstance(other, Body)
            assert fields_read == (
                *(other.model, other.key, other.streaming, other.purpose, other.keep_alive),
            )
    else:
        assert [isinstance(outcome(operation, body), Body) for body in bodies] == [False] * 6


@given(
    st.text(max_size=20),
    st.none() | st.booleans(),
    st.dictionaries(st.text(max_size=8), JSON, max_size=4),
    LAYOUTS,
    st.booleans(),
)
@settings(max_examples=400)
def test_model_and_stream_agree_with_json(
    model: str,
    stream: bool | None,
    rest: dict[str, Any],
    layout: tuple[str, str],
    ascii_only: bool,
) -> None:
    """Whatever else the object holds, its model and stream are those that json sees."""
    fields = rest | {"messages": ["x"], "model": f"m/{model}", "stream": stream}
    text = json.dumps(fields, separators=layout, ensure_ascii=ascii_only)
    body = text.encode(errors="surrogatepass")
    result = outcome("chat", body)
    if isinstance(result, Body):
        seen = json.loads(text)
        assert (result.model, result.streaming) == (seen["model"], seen["stream"] is not False)


@given(st.lists(st.tuples(KEYS, JSON), min_size=1, max_size=6), LAYOUTS)
@settings(max_examples=400)
def test_repeated_keys(pairs: list[tuple[str, Any]], layout: tuple[str, str]) -> None:
    """A repeated object, array or null is refused; of other repeats the last wins."""
    members = [json.dumps(key) + layout[1] + json.dumps(value) for key, value in pairs]
    result = outcome("show", ("{" + layout[0].join(members) + "}").encode())
    values: dict[str, list[Any]] = {}
    for key, value in pairs:
        values.setdefault(key, []).append(value)
    if (
        any(
            len(each) > 1 and any(value is None or isinstance(value, dict | list) for value in each)
            for each in values.values()
        )
        or {"model", "Model"} <= values.keys()
    ):
        assert isinstance(result, tuple)
    elif isinstance(result, Body):
        model = values.get("model") or values.get("Model") or [""]
        assert result.model == (model[-1] or values.get("name", [""])[-1])


# --- bodies of which only the model is read ----------------------------------------------------


@pytest.mark.parametrize("route", [COUNT_TOKENS, other("POST", "/api/later")])
def test_a_route_that_may_not_be_there_needs_a_model(route: Any) -> None:
    """``model`` or ``name``, in any JSON object; whatever else it holds is not looked at."""
    told = read(route, b'{"model":"","name":"x","stream":true,"messages":5,"options":7,"tools":{}}')
    assert (told.model, told.streaming, told.purpose) == ("x", True, Purpose.RUN)
    assert read(route, b'{"Model":" M:LATEST","stream":"x"}').key.model == M
    assert not read(route, b'{"model":"m","stream":"x"}').streaming


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b" ", b"{}", b"null", b"[]", b'"m"', b"{", b"model=m", b"\xff", b"[" * 100_000),
        *(b'{"model":5}', b'{"model":null}', b'{"model":"a@b"}', b'{"model":""}'),
        *(b'{"model":"m","Model":"n"}', b'{"model":"\xff"}'),
    ],
)
def test_without_a_model_it_is_no_route(body: bytes) -> None:
    """No object, no model in it, or two: nothing to route by."""
    for route in (COUNT_TOKENS, other("POST", "/v1/later")):
        assert route is not None
        with pytest.raises(UnknownRoute):
            read(route, body)


FORM = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--b--\r\n'
FORM_TYPE = "multipart/form-data; boundary=b"


def test_a_transcription_names_its_model_in_a_form() -> None:
    """As it was written; nothing else of the form is read."""
    told = read(TRANSCRIPTIONS, FORM % b"Library/M", FORM_TYPE, "x=model&modelx=y")
    assert (told.model, told.key.model, told.streaming) == ("Library/M", M, False)


@pytest.mark.parametrize(
    ("model", "kind", "query", "text"),
    [
        (b"", FORM_TYPE, "", "model is required"),
        (b"a@b", FORM_TYPE, "", "invalid model name"),
        (b"m", "application/json", "", "failed to parse multipart form"),
        *((b"m", FORM_TYPE, query, "in the query") for query in ("model=x", "a&mode%6c", "model=")),
    ],
)
def test_a_form_that_names_no_model(model: bytes, kind: str, query: str, text: str) -> None:
    """Go's forms are read from the query too, where it would win."""
    with pytest.raises(BadRequest, match=text):
        read(TRANSCRIPTIONS, FORM % model, kind, query)


# --- another model's name ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "body", "wanted"),
    [
        ("chat", b'{"model":"fast","messages":[]}', b'{"model":"real:1","messages":[]}'),
        ("chat", b' { "MODEL" :\t"f\\u0061st" , "x":1}\n!', b' { "MODEL" :\t"real:1" , "x":1}\n!'),
        ("chat", b'{"mod\\u0065l":"fast"}', b'{"mod\\u0065l":"real:1"}'),
        ("chat", b'{"model":"a","model":"fast"}', b'{"model":"a","model":"real:1"}'),
        ("chat", b'{"name":"me","model":"fast"}', b'{"name":"me","model":"real:1"}'),
        ("chat", b'{"x":{"model":"a"},"model":"fast"}', b'{"x":{"model":"a"},"model":"real:1"}'),
        ("chat", b'{"x":"\\ud800","model":"fast"}', b'{"x":"\\ud800","model":"real:1"}'),
        ("chat", b'{"x":"\\uD800","model":"fast"}', b'{"x":"\\uD800","model":"real:1"}'),
        ("show", b'{"name":"fast"}', b'{"name":"real:1"}'),
        ("show", b'{"model":"","name":"fast"}', b'{"model":"","name":"real:1"}'),
        ("show", b'{"model":null,"name":"fast"}', b'{"model":null,"name":"real:1"}'),
        ("show", b'{"model":"fast","name":"n"}', b'{"model":"real:1","name":"n"}'),
    ],
)
def test_only_the_models_name_is_rewritten(operation: str, body: bytes, wanted: bytes) -> None:
    """The value that counts, at the top level; every other byte stays, what is odd included."""
    assert renamed(ROUTES[operation], body, "", "real:1") == wanted


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b'{"model":"m"}', b'{"options":{"num_ctx":4096},"model":"m"}'),
        (b' {\n "model" : "m" }!', b' {"options":{"num_ctx":4096},\n "model" : "m" }!'),
        (b'{"options":null,"model":"m"}', b'{"options":{"num_ctx":4096},"model":"m"}'),
        (b'{"options":null ,"model":"m"}', b'{"options":{"num_ctx":4096} ,"model":"m"}'),
        (b'{"model":"m","options":{}}', b'{"model":"m","options":{"num_ctx":4096}}'),
        (b'{"model":"m","options":{ } }', b'{"model":"m","options":{"num_ctx":4096 } }'),
        (
            b'{"model":"m","options":{ "top_p":1e-1}}',
            b'{"model":"m","options":{"num_ctx":4096, "top_p":1e-1}}',
        ),
        (
            b'{"OPTIONS":{"x":1.50,"num_ctx" : 3e3\t,"num_Ctx":5},"model":"m"}',
            b'{"OPTIONS":{"x":1.50,"num_ctx" : 4096\t,"num_Ctx":5},"model":"m"}',
        ),
        (
            b'{"options":{"num\\u005fctx":null},"model":"m"}',
            b'{"options":{"num\\u005fctx":4096},"model":"m"}',
        ),
        (
            b'{"options":{"num_ctx":1,"num_ctx":2},"model":"m"}',
            b'{"options":{"num_ctx":4096,"num_ctx":4096},"model":"m"}',
        ),
        (
            b'{"options":{"stop":["\\ud800"],"num_ctx":1},"model":"m"}',
            b'{"options":{"stop":["\\ud800"],"num_ctx":4096},"model":"m"}',
        ),
        (
            b'{"format":{"options":{"num_ctx":1}},"model":"m"}',
            b'{"options":{"num_ctx":4096},"format":{"options":{"num_ctx":1}},"model":"m"}',
        ),
    ],
)
def test_only_the_context_is_rewritten(body: bytes, wanted: bytes) -> None:
    """In place, or put in where there is none; numbers, gaps and unknown fields stay as written."""
    assert tuned(body, 4096, None) == wanted
    assert parsed("chat", wanted.rstrip(b"!")).num_ctx == 4096


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b'{"keep_alive":-1,"model":"m"}', b'{"keep_alive":300,"model":"m"}'),
        (b'{"model":"m","keep_alive" : "24h" }', b'{"model":"m","keep_alive" : 300 }'),
        (b'{"Keep_Alive":1e9,"model":"m"}', b'{"Keep_Alive":300,"model":"m"}'),
        (b'{"model":"m"}', b'{"model":"m"}'),
    ],
)
def test_only_the_time_in_memory_is_rewritten(body: bytes, wanted: bytes) -> None:
    """In place, whatever it was written as; never added."""
    assert tuned(body, None, 300.0) == wanted


def test_both_are_rewritten_at_once() -> None:
    """In whichever order they stand; parts of a second are kept."""
    body = b'{"keep_alive":-1,"model":"m","options":{"num_ctx":1}}'
    assert tuned(body, 8, 1.5) == b'{"keep_alive":1.5,"model":"m","options":{"num_ctx":8}}'
    body = b'{"options":{"num_ctx":1},"model":"m","keep_alive":-1}'
    assert tuned(body, 8, 60.0) == b'{"options":{"num_ctx":8},"model":"m","keep_alive":60}'
    assert tuned(body, None, None) == body


def test_a_forms_model_is_rewritten() -> None:
    """The field's value, nothing else; the delimiters stay where they are."""
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nfast\r\n'
    wanted = renamed(TRANSCRIPTIONS, body + FORM % b"fast", FORM_TYPE, "real:1")
    assert wanted == body + FORM % b"real:1"


ODD_KEYS = st.sampled_from(["x", "Models", "nam", "\u00e9", 'a"b', "\\", "messages", "names"])
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
GAPS = st.text(" \t\r\n", max_size=3)


@given(
    st.dictionaries(ODD_KEYS, VALUES, max_size=4),
    st.sampled_from(["model", "Model", "MODEL", "mod\\u0065l"]),
    st.sampled_from(["fast", " fast:latest", "f\\u0061st", "Library\\/Fast", "FAST"]),
    st.lists(GAPS, min_size=6, max_size=6),
    st.integers(0, 4),
    st.booleans(),
)
def test_renaming_is_a_cut_and_a_paste(
    others: dict[str, Any], key: str, value: str, gaps: list[str], at: int, ascii_only: bool
) -> None:
    """However it is written: the bytes before and behind stay, and it reads as the other model."""
    members = [
        f"{gaps[0]}{json.dumps(k, ensure_ascii=ascii_only)}{gaps[1]}:"
        f"{gaps[2]}{json.dumps(v, ensure_ascii=ascii_only)}{gaps[3]}"
        for k, v in others.items()
    ]
    members.insert(at, f'{gaps[0]}"{key}"{gaps[1]}:{gaps[2]}\0{gaps[3]}')
    text = f"{gaps[4]}{{{','.join(members)}}}{gaps[5]}"
    before, after = text.encode("utf-8", "replace").split(b"\0")
    body = before + f'"{value}"'.encode() + after
    route = ROUTES["chat"]
    new = renamed(route, body, "", "hf.co/x/Real:Q4_K_M")
    assert new == before + b'"hf.co/x/Real:Q4_K_M"' + after
    try:
        told = read(route, body)
    except BalancerError:
        return
    other_told = read(route, new)
    assert told.key.model.endswith("library/fast:latest")
    assert other_told.model == "hf.co/x/Real:Q4_K_M"
    assert other_told.key.options == told.key.options


RENAMED_BITS = st.sampled_from(
    [
        *(b'"model"', b'"Model"', b'"name"', b'"fast"', b'""', b"null", b":", b",", b"}", b"{"),
        *(b'"model":"fast"', b'"name":"fast",', b'"x":{"model":"a"},', b'"y":"\\ud800",', b" "),
        *(b"5", b'"model":"a",', b'"messages":[],', b'"stream":true,', b"[", b"]", b"\n", b"tail"),
    ]
)


@given(st.lists(RENAMED_BITS, max_size=12).map(b"".join))
def test_what_was_read_can_be_renamed(body: bytes) -> None:
    """Any body that names a model, hostile ones included, then names the other, and no less."""
    for operation in ("chat", "show"):
        try:
            told = read(ROUTES[operation], b"{" + body)
        except BalancerError:
            continue
        other_told = read(ROUTES[operation], renamed(ROUTES[operation], b"{" + body, "", "real:1"))
        assert other_told.model == "real:1"
        assert (other_told.streaming, other_told.purpose) == (told.streaming, told.purpose)


TUNED_BITS = st.sampled_from(
    [
        *(b'"model":"m",', b'"options":{"num_ctx":1},', b'"options":null,', b'"options":{ },'),
        *(b'"keep_alive":-1,', b'"Keep_alive":"5m" ,', b'"y":"\\ud800",', b'"x":{"options":{}},'),
        *(b'"Options":{"num_ctx":1,"a":[1.0],"num_ctx":2},', b"\n", b'"z":[]}', b"}", b'{"', b"5"),
    ]
)


@given(st.lists(TUNED_BITS, max_size=8).map(b"".join))
def test_what_was_read_can_be_tuned(body: bytes) -> None:
    """Any body that can be read, then asks for that context, and is otherwise what it was."""
    body = b"{" + body + b'"stream":false}'
    try:
        told = read(ROUTES["chat"], body)
    except BalancerError:
        return
    for variant in (body, bytearray(body)):
        other_told = read(ROUTES["chat"], tuned(variant, 777, 60.0))
        assert other_told.num_ctx == 777
        assert other_told.keep_alive == (None if told.keep_alive is None else 60)
        assert (other_told.model, other_told.streaming) == (told.model, told.streaming)


# --- large bodies ------------------------------------------------------------------------------

RUN = "".join(map(chr, [*range(65, 91), *range(97, 123), *range(48, 58), 43, 47])) * 8


@contextmanager
def small() -> Iterator[None]:
    """What else begins at some hundred kilobytes now begins at once."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("_LARGE", -1),
            ("_LEAST_RUN", 16),
            ("_LOOK", 8),
            ("_NEXT", 1),
            ("_PIECE", 100),
        ):
            patch.setattr(subject, name, value)
        yield


def all_told(operation: str, body: bytes | bytearray) -> object:
    """All that reading and renaming give."""
    try:
        told = read(ROUTES[operation], body)
    except BalancerError as error:
        return type(error), error.text
    other = tuned(body, 8, 60.0) if operation in NATIVE and told.purpose is Purpose.RUN else b""
    return told, renamed(ROUTES[operation], body, "", "real:1"), other


def compare(operation: str, body: bytes) -> None:
    """As a small body, as a large one, and each as a bytearray."""
    expected = all_told(operation, body)
    assert all_told(operation, bytearray(body)) == expected
    with small():
        assert all_told(operation, body) == expected
        assert all_told(operation, bytearray(body)) == expected


LARGE_BITS = st.sampled_from(
    [
        *("{", "}", "[", "]", ":", ",", '"', "\\", " ", "\n", "é", "\ufffd", "\x01", "1", "null"),
        *('"model":"m",', '"Model":"n",', '"mod\\u0065l":"o",', '"model":5,', '"name":"p",'),
        *('"options":{"num_ctx":5,"model":"q"},', '"options":{},', '"stream":true,', '"x":'),
        *('"messages":[{"role":"user","content":"', '","images":["', '"]}]', '"prompt":"'),
        *('"messages":[],', '"prompt":"x",', '"tools":[{"model":"', '"stream_options":{"x":"'),
        *('"data:image/png;base64,', '","include_usage":true},', '"context":[1,2],', "}trail"),
        *(RUN, RUN[:100], RUN[:64], f'"{RUN}":', f'"{RUN}",', f'"x":"{RUN}",', "8" * 300),
        *(f"{RUN}\\n{RUN}", f"\\u{RUN}", f"\\{RUN}", f"{RUN}é{RUN}", f'"model":"{RUN}",'),
        *('"\\ud83d', "\\ude00", "[" * 40, '"x":' + '[{"y":' * 600, "e", "-"),
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["chat", "generate", "v1_chat", "show"]),
    st.lists(LARGE_BITS, max_size=14).map("".join),
    st.integers(0, 400),
    st.sampled_from([b"", b"\xff", b"\xc3", b"\xed\xa0\x80"]),
)
def test_a_large_body_reads_like_a_small_one(
    operation: str, text: str, at: int, wrong: bytes
) -> None:
    """Whatever it holds, well formed or not: the same is read, or refused in the same words."""
    for opening in ("{", '{"model":"m",'):
        body = (opening + text).encode()
        if not re.search(rb"[A-Za-z0-9+/]{64}[^\"]*\x01", body):  # this is left to the backend
            compare(operation, body)
        compare(operation, (body[:at] + wrong + body[at:]).replace(b"\x01", b""))


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        ODD_KEYS | st.sampled_from([RUN, RUN[:90], "model", "Model", "prompt", "options"]),
        st.recursive(
            st.sampled_from(
                [RUN, RUN * 2, RUN + "\n", "ü" + RUN, "x", 5, True, None, int("9" * 80)]
            ),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
            ),
            max_leaves=5,
        ),
        max_size=5,
    ),
    st.sampled_from(["chat", "generate", "v1_chat", "show"]),
    st.booleans(),
    st.integers(0, 2000),
)
def test_a_large_document_reads_like_a_small_one(
    fields: dict[str, Any], operation: str, ascii_only: bool, cut: int
) -> None:
    """Well-formed JSON with images anywhere, whole and cut short."""
    document = RUNNABLE[operation] | fields
    for separators in ((",", ":"), (", ", ": ")):
        body = json.dumps(document, separators=separators, ensure_ascii=ascii_only).encode()
        compare(operation, body)
        compare(operation, body + b" tail")
        compare(operation, body[:-cut])


MANY = '"b":1,' * 1000


@pytest.mark.parametrize(
    "body",
    [
        f'{{"model":"m","prompt":"{RUN}\\"}}',  # a quote that does not end the string
        f'{{"model":"m","prompt":"\\\\{RUN}\\\\"}}',
        f'{{"model":"m","prompt":"\\uabcd{RUN}\\q"}}',
        f'{{"model":"m","x":{"8" * 200}{RUN}}}',  # a run outside of strings
        f'{{"model":"m","x":{"8" * 2000}}}',
        f'{{"model":"m",{RUN}"x":5}}',
        f'{{"model":"m","{RUN}a{RUN}":[],"{RUN}b{RUN}":[]}}',  # keys are read, too
        f'{{"model":"m","x":"{RUN * 20}","a":[],"a":[],{MANY}"c":1}}',  # twice, too many
        f'{{"x":"{RUN * 20}",{MANY}"model":"m"}}',
        f'{{"model":"m","messages":[],"messages":["{RUN}"]}}',
        f'{{"model":"m","prompt":"{RUN}","x":"\\uD83d"}}',
        f'{{"model":"{RUN}"}}',
        f'{{"model":"m","keep_alive":"{RUN}"}}',
        f'{{"model":"m","stream_options":{{"x":"{RUN * 3}","include_usage":true}}}}',
        f'"{RUN}"',
        f"{RUN}",
        f'[{{"model":"{RUN}"}}]',
        f'{{"model":"m","prompt":"{RUN}"',
        f'{{"model":"m","prompt":"{RUN}"}}{RUN}',
    ],
)
@pytest.mark.parametrize("operation", ["generate", "v1_chat"])
def test_where_a_run_can_stand(operation: str, body: str) -> None:
    """In any place, well formed or not; and with bytes in it or behind it that are not UTF-8."""
    compare(operation, body.encode())
    compare(operation, body.replace(RUN, f"{RUN}ü{RUN}").encode())
    compare(operation, body.replace(RUN, f"{RUN}ü{RUN}").encode("latin-1"))
    compare(operation, body.encode() + b"\xff")


IMAGE = base64.b64encode(bytes(range(256)) * 3000).decode()


@pytest.mark.parametrize("operation", ["chat", "v1_chat", "v1_messages", "generate"])
@pytest.mark.parametrize("is_last", [False, True])
def test_an_image_is_hopped_over(operation: str, is_last: bool) -> None:
    """What is parsed is a fraction of the body; what it says is the same, the prompt's size too."""
    shown = {
        "chat": [{"role": "user", "content": "what?", "images": [IMAGE, IMAGE]}],
        "v1_chat": [{"content": [{"image_url": {"url": f"data:image/png;base64,{IMAGE}"}}]}],
        "v1_messages": [{"content": [{"source": {"type": "base64", "data": IMAGE}}]}],
        "generate": IMAGE,
    }[operation]
    field = "prompt" if operation == "generate" else "messages"
    given = {key: value for key, value in RUNNABLE[operation].items() if key != field}
    document = {field: shown} | given if is_last else given | {field: shown}
    body = json.dumps(document).encode()
    outline = subject._outline(body)
    assert outline is not None
    assert len(outline.text) < 80_000 < len(body) // 10
    told = parsed(operation, body)
    assert (told.model, told.key.model) == ("m", M)
    size = told.prompt_tokens * 4
    assert size < 200 if operation != "generate" else size > len(IMAGE) - 4
    wanted = body.replace(b'"model": "m"', b'"model": "real:1"')
    assert renamed(ROUTES[operation], body, "", "real:1") == wanted
    assert tuned(body, 8, None) == body.replace(b"{", b'{"options":{"num_ctx":8},', 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "_outline", lambda _: None)
        assert parsed(operation, body) == told


def test_a_control_character_in_an_image_is_left_to_the_backend() -> None:
    """It makes no two readings of the body, and to look for it would cost as much as to parse."""
    for where, is_refused in ((5, True), (len(IMAGE) // 2, False)):
        image = f"{IMAGE[:where]}\n{IMAGE[where:]}".encode()
        body = b'{"model":"m","messages":[{"images":["%b"]}]}' % image
        if is_refused:
            assert "in string literal" in refusal("chat", body).text
        else:
            assert parsed("chat", body).model == "m"


@pytest.mark.parametrize(
    "fields", ['"model":"%s"', '"model":"m","keep_alive":"%s"', '"model":"m","options":{"x":"%s"}']
)
def test_a_control_character_in_what_is_wanted_is_refused(fields: str) -> None:
    """However large it is: what is hopped over at first is read in the end."""
    image = f"{IMAGE[: len(IMAGE) // 2]}\n{IMAGE[len(IMAGE) // 2 :]}"
    body = f'{{{fields % image},"prompt":""}}'
    assert "in string literal" in refusal("generate", body).text
    if '"m"' not in fields:
        with pytest.raises(UnknownRoute):
            read(COUNT_TOKENS, body.encode())


@pytest.mark.parametrize(
    "text",
    [
        IMAGE * 4,
        (IMAGE[:5000] + "\\n") * 400,
        (IMAGE[:100] + '","') * 20_000,
        "\\n" * 500_000,
        "12345678," * 200_000,
        (IMAGE[:300_000] + "é") * 10,
    ],
)
def test_the_search_for_images_ends_soon(text: str) -> None:
    """So many looks and pieces, however they are strewn, and every byte in few of them."""
    body = b'{"model":"m","messages":[{"images":["%b' % text.encode()
    looks, pieces = list[int](), list[int]()
    found, end_of = subject._BASE64, subject._run_end

    class Counting:
        def match(self, body: bytes, at: int) -> object:
            looks.append(at)
            return found.match(body, at)

    def run_end(body: bytes, start: int) -> int:
        end = end_of(body, start)
        pieces.append(end - start)
        return end

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "_BASE64", Counting())
        patch.setattr(subject, "_run_end", run_end)
        subject._outline(body)
    assert len(looks) <= len(body) // subject._LEAST_RUN
    assert sum(pieces) <= len(body)


# --- inputs and sessions ------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["embed", "v1_embeddings"])
@pytest.mark.parametrize(
    ("given", "count"),
    [
        ("x", 1),
        (["x"], 1),
        (["x", "y", "z"], 3),
        (["", '",', "\\", "a, b"], 4),
        (["x"] * 5000, 5000),
        ('["x", "y"]', 1),
    ],
)
@pytest.mark.parametrize("separators", [(",", ":"), (" ,\n\t", ": ")])
def test_texts_to_embed_are_counted(
    operation: str, given: Any, count: int, separators: tuple[str, str]
) -> None:
    """However the list is written."""
    text = json.dumps({"model": "m", "input": given}, separators=separators).encode()
    assert read(ROUTES[operation], text).inputs == count


def test_a_prompt_is_one_input() -> None:
    """Only what embeds has several."""
    given = {"model": "m", "input": ["x"] * 20}
    assert read(ROUTES["v1_responses"], json.dumps(given).encode()).inputs == 1


@pytest.mark.parametrize("operation", ["chat", "v1_chat", "v1_responses", "v1_messages"])
def test_a_field_may_name_the_session(operation: str) -> None:
    """The first of those asked for that is a text; nothing is looked for that nobody asks for."""
    given = RUNNABLE[operation] | {"prompt_cache_key": " a ", "thread": "b"}
    text = json.dumps(given).encode()
    assert read(ROUTES[operation], text).session == ""
    for fields, session in (
        (("prompt_cache_key", "thread"), "a"),
        (("thread", "prompt_cache_key"), "b"),
        (("gone", "thread"), "b"),
        (("gone",), ""),
    ):
        assert read(ROUTES[operation], text, session_in=fields).session == session


@pytest.mark.parametrize(
    "value", ["null", "7", "[]", '{"a":1}', "true", '""', '"  "', f'"{"x" * 5000}"', r'"\ud800"']
)
def test_what_is_no_session_is_no_fault(value: str) -> None:
    """Ollama does not read the field, so the call is as good as without."""
    text = f'{{"model":"m","messages":[{{}}],"prompt_cache_key":{value}}}'.encode()
    told = read(ROUTES["chat"], text, session_in=("prompt_cache_key",))
    assert told.model == "m"
    assert len(told.session) <= 1
