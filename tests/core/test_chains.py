"""Chains: two prompts share links as far as they begin alike, whoever wrote them."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from balancer.core import chains, routes
from balancer.core.chains import BLOCK, LARGEST, MOST_LINKS, chain
from balancer.core.domain import Route

ROUTES: dict[str, Route] = {route.operation: route for route in routes.TABLE}
SYSTEM = {"role": "system", "content": "You are terse."}
TALK = [
    {"role": "user", "content": "What is a heap?"},
    {"role": "assistant", "content": "A tree of sorts."},
    {"role": "user", "content": "And what is it for?"},
]
IMAGE = base64.b64encode(bytes(range(256)) * 40).decode()


def links(operation: str, fields: dict[str, Any], model: str = "m") -> tuple[list[int], int]:
    """The hashes, and how many are shared."""
    found, shared = chain(json.dumps({"model": "m", **fields}).encode(), ROUTES[operation], model)
    return [link for link, _ in found], shared


def tokens(operation: str, fields: dict[str, Any]) -> list[int]:
    """Prompt tokens up to the end of each link."""
    body = json.dumps({"model": "m", **fields}).encode()
    return [count for _, count in chain(body, ROUTES[operation])[0]]


def alike(one: list[int], other: list[int]) -> int:
    """How many leading links two chains share."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), -1)


@pytest.mark.parametrize("operation", ["chat", "v1_chat", "v1_messages"])
def test_a_next_turn_has_the_links_of_the_one_before(operation: str) -> None:
    """Then its own; what stands in other fields does not matter."""
    before, _ = links(operation, {"messages": TALK[:1], "stream": True})
    after, shared = links(operation, {"messages": TALK, "options": {"temperature": 1}})
    assert after[:1] == before
    assert (len(after), len(set(after)), shared) == (3, 3, 0)


def test_another_word_is_another_chain_from_there_on() -> None:
    """Though later messages are the same."""
    edited = [TALK[0], {"role": "assistant", "content": "A tree."}, TALK[2]]
    assert alike(links("chat", {"messages": TALK})[0], links("chat", {"messages": edited})[0]) == 1


def test_models_share_nothing() -> None:
    """Their tokens and caches are their own."""
    one, other = (links("chat", {"messages": TALK}, model)[0] for model in ("m", "n"))
    assert not set(one) & set(other)


def test_roles_count() -> None:
    """The same words said by another are another prompt."""
    swapped = [{**TALK[0], "role": "assistant"}]
    assert links("chat", {"messages": swapped})[0] != links("chat", {"messages": TALK[:1]})[0]


TOOLS = [{"type": "function", "function": {"name": "look"}}]


@pytest.mark.parametrize(
    ("operation", "ahead"),
    [
        ("chat", {"messages": [SYSTEM]}),
        ("chat", {"messages": [SYSTEM, SYSTEM], "tools": TOOLS}),
        ("v1_chat", {"messages": [{"role": "developer", "content": "Be terse."}]}),
        ("v1_chat", {"messages": [], "tools": TOOLS}),
        ("v1_messages", {"messages": [], "system": "You are terse."}),
        ("v1_messages", {"messages": [], "system": [{"type": "text", "text": "Terse."}]}),
        ("v1_responses", {"input": [], "instructions": "You are terse."}),
        ("v1_responses", {"input": [SYSTEM]}),
    ],
)
def test_tools_and_system_prompt_are_one_shared_link(operation: str, ahead: dict[str, Any]) -> None:
    """All conversations under them have it in common; under none there is none."""
    field = "input" if operation == "v1_responses" else "messages"
    one, shared = links(operation, {**ahead, field: [*ahead[field], *TALK]})
    other, _ = links(operation, {**ahead, field: [*ahead[field], *TALK[1:]]})
    bare, none = links(operation, {field: TALK})
    assert (shared, none) == (1, 0)
    assert alike(one, other) == 1
    assert (len(one), len(bare)) == (4, 3)
    assert not set(one) & set(bare)


def test_a_system_message_amid_the_talk_is_a_message() -> None:
    """Only what stands ahead of all is told to everybody."""
    found, shared = links("chat", {"messages": [SYSTEM, *TALK, SYSTEM]})
    assert (len(found), shared) == (5, 1)


@pytest.mark.parametrize(
    ("operation", "field"),
    [("generate", "prompt"), ("v1_completions", "prompt"), ("v1_responses", "input")],
)
def test_a_text_is_cut_into_blocks(operation: str, field: str) -> None:
    """A longer text has the whole blocks of a shorter one."""
    one, _ = links(operation, {field: "x" * 5 * BLOCK + "tail"})
    other, _ = links(operation, {field: "x" * 3 * BLOCK + "another" * BLOCK})
    assert len(one) == 6
    assert alike(one, other) == 3


def test_what_a_text_goes_on_from_stands_ahead_of_it() -> None:
    """The system prompt is shared; a context of tokens is not."""
    one, shared = links("generate", {"system": "Terse.", "context": [1, 2, 3], "prompt": "hi"})
    other, _ = links("generate", {"system": "Terse.", "context": [1, 2, 4], "prompt": "hi"})
    assert (len(one), shared) == (3, 1)
    assert alike(one, other) == 1


def test_tokens_are_a_quarter_of_the_bytes() -> None:
    """Up to the end of each link; of texts without their quotes."""
    assert tokens("generate", {"prompt": "x" * 1500}) == [256, 375]
    first, second, third = tokens("chat", {"messages": TALK})
    assert first == len(json.dumps(TALK[0])) // 4
    assert first < second < third


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        ("chat", {"role": "user", "content": "Which?", "images": [IMAGE, IMAGE]}),
        (
            "v1_chat",
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IMAGE}"}}
                ]
                * 2,
            },
        ),
        (
            "v1_messages",
            {
                "role": "user",
                "content": [{"type": "image", "source": {"type": "base64", "data": IMAGE}}] * 2,
            },
        ),
    ],
)
def test_an_image_is_seven_hundred_tokens(operation: str, message: dict[str, Any]) -> None:
    """However many bytes it takes to write; another image is another chain."""
    (count,) = tokens(operation, {"messages": [message]})
    assert 1400 < count < 1500
    other = json.loads(json.dumps(message).replace("AAEC", "AAED"))
    assert links(operation, {"messages": [other]}) != links(operation, {"messages": [message]})


def test_images_beside_a_text_count_too() -> None:
    """As `/api/generate` takes them."""
    assert tokens("generate", {"prompt": "Which?", "images": [IMAGE]}) == [701]
    assert links("generate", {"prompt": "Which?", "images": [IMAGE]}) != links(
        "generate", {"prompt": "Which?"}
    )


def test_what_only_begins_like_an_image_is_text() -> None:
    """It ends nowhere; the backend tells what it thinks of it."""
    message = {"role": "user", "content": "x" * 2000, "images": IMAGE}
    assert tokens("chat", {"messages": [message]}) == [len(json.dumps(message)) // 4]


def test_words_about_images_are_words() -> None:
    """They are written with escapes, and end nowhere."""
    text = '"images"' * 300
    (count,) = tokens("chat", {"messages": [{"role": "user", "content": text}]})
    assert count > len(text) // 4


MARK = {"cache_control": {"type": "ephemeral", "ttl": "5m"}}


def test_a_mark_that_moves_on_does_not_break_the_chain() -> None:
    """Anthropic's clients mark the last message; a text becomes a list of one part for it."""
    marked = [{"role": "user", "content": [{"type": "text", "text": "What is a heap?", **MARK}]}]
    system = [{"type": "text", "text": "Terse."}]
    before, _ = links("v1_messages", {"system": [{**system[0], **MARK}], "messages": marked})
    after, _ = links("v1_messages", {"system": system, "messages": TALK})
    assert (len(before), after[:2]) == (2, before)


def test_words_about_a_mark_are_words() -> None:
    """What is said is hashed as it is said."""
    one, other = (
        links("v1_messages", {"messages": [{"role": "user", "content": json.dumps(said)}]})
        for said in ({"a": 1, **MARK}, {"a": 1})
    )
    assert one != other


def test_of_a_long_talk_the_last_messages_are_linked() -> None:
    """They are those that a next turn has in common; what is ahead counts in each."""
    talk = [{"role": "user", "content": str(turn)} for turn in range(MOST_LINKS + 50)]
    before, shared = links("chat", {"messages": [SYSTEM, *talk]})
    after, _ = links("chat", {"messages": [SYSTEM, *talk, *TALK[:2]]})
    assert (len(before), shared) == (MOST_LINKS + 1, 1)
    assert after[1:-2] == before[3:]
    counts = tokens("chat", {"messages": [SYSTEM, *talk]})
    assert counts[1] - counts[0] > 50 * 5


@pytest.mark.parametrize(
    ("operation", "body"),
    [
        ("chat", b""),
        ("chat", b"[]"),
        ("chat", b'{"messages": 3}'),
        ("chat", b'{"messages": [3]}'),
        ("chat", b'{"messages": [{"role": 3}]}'),
        ("chat", b'{"messages": null}'),
        ("chat", b'{"messages": []}'),
        ("chat", b'{"messages": ["\xff"]}'),
        ("chat", b'{"tools": null, "messages": []}'),
        ("chat", b'{"messages": [' + b"[" * 5000 + b"]" * 5000 + b"]}"),
        ("v1_responses", b'{"input": [{"role": "user"}, '),
        ("v1_responses", b'{"input": 3}'),
        ("generate", b'{"prompt": ""}'),
        ("generate", b'{"prompt": null, "context": []}'),
        ("embed", b'{"input": "a text"}'),
        ("v1_transcriptions", b"--form"),
    ],
)
def test_what_cannot_be_read_or_prompts_nothing_has_no_chain(operation: str, body: bytes) -> None:
    """Whatever is wrong with it is the backend's to tell."""
    assert chain(body, ROUTES[operation]) == ((), 0)


def test_what_takes_too_long_has_no_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """By bytes, and by messages."""
    body = json.dumps({"prompt": "x" * (LARGEST - 100)}).encode()
    assert chain(body, ROUTES["generate"])[0]
    assert chain(body + b" " * 200, ROUTES["generate"]) == ((), 0)
    monkeypatch.setattr(chains, "MOST_MESSAGES", 2)
    assert links("chat", {"messages": TALK}) == ([], 0)


def test_a_hash_is_of_64_bits_and_the_same_everywhere() -> None:
    """Also in a bytearray; no process has its own."""
    body = b'{"messages": [{"role": "user", "content": "hi"}]}'
    found = chain(bytearray(body), ROUTES["chat"], "m")
    assert found == chain(body, ROUTES["chat"], "m") == (((7484062674785388993, 8),), 0)
    assert all(0 <= link < 1 << 64 for link, _ in found[0])
