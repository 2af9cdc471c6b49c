from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core import names
from balancer.core.aliases import Aliases
from balancer.core.catalog import Catalog, PsChange, Runner, instant_ns
from balancer.core.domain import PlacementKey, Residency

LOADED, ON_DISK = Residency.LOADED, Residency.ON_DISK
ABSENT, UNKNOWN = Residency.ABSENT, Residency.UNKNOWN

A, B, C = "a" * 64, "b" * 64, "c" * 64


class Clock:
    """Monotonic seconds that move only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def c(name: str) -> str:
    return names.parse(name).canonical


def key(name: str, **options: Any) -> PlacementKey:
    return PlacementKey(c(name), tuple(sorted(options.items())))


def tag(name: str, digest: Any = A, modified: Any = "2026-11-21T12:00:00Z", **more: Any) -> Any:
    return {
        "name": name,
        "model": name,
        "modified_at": modified,
        "size": 4_000_000_000,
        "digest": digest,
        "details": {"format": "gguf", "families": ["llama"], "context_length": 32768},
        "capabilities": ["completion"],
        **more,
    }


def run(name: str, digest: Any = A, context: Any = 4096, expires: Any = None, **more: Any) -> Any:
    return {
        "name": name,
        "model": name,
        "size": 5_000_000_000,
        "digest": digest,
        "details": {"format": "gguf"},
        "expires_at": expires or "2026-11-21T12:05:00Z",
        "size_vram": 5_000_000_000,
        "context_length": context,
        **more,
    }


def shown(answer: dict[str, Any]) -> list[str]:
    return [row["name"] for row in answer["models"]]


def where(catalog: Catalog, name: str, **options: Any) -> Residency:
    return catalog.residency("one", key(name, **options))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def catalog(clock: Clock) -> Catalog:
    """Two backends that have joined and said nothing yet."""
    catalog = Catalog(clock, remember_s=100, believe_s=30)
    catalog.join("one")
    catalog.join("two")
    return catalog


@pytest.fixture
def warm(catalog: Catalog) -> Catalog:
    """Backend one lists m, its twin t and n; somebody loaded m with 4096 tokens."""
    catalog.note_tags("one", [tag("m"), tag("t"), tag("n", B)])
    catalog.note_ps("one", [run("m:latest")])
    return catalog


# Tags, merged


def test_rows_keep_fields_and_order(catalog: Catalog) -> None:
    """A row is listed byte for byte as Ollama wrote it, unknown fields included."""
    text = (
        '{"models":[{"name":"llama3.2:1b","model":"llama3.2:1b",'
        '"modified_at":"2026-11-21T11:59:20.432861079Z","size":4637940,'
        f'"digest":"{A}","details":{{"parent_model":"","format":"gguf","family":"llama",'
        '"families":["llama"],"parameter_size":"1.16M","quantization_level":"unknown",'
        '"context_length":32768,"embedding_length":512},"capabilities":["completion"],"new":[1]}]}'
    )
    assert catalog.note_tags("one", json.loads(text)["models"])
    assert catalog.tags_json() == text.encode()
    assert catalog.tags() == json.loads(text)


def test_union_is_by_canonical_name(catalog: Catalog) -> None:
    """Spellings of one name are one model; every backend's models are there."""
    catalog.note_tags("one", [tag("Llama3.2:latest"), tag("x", B)])
    catalog.note_tags("two", [tag("library/llama3.2"), tag("y", C)])
    assert shown(catalog.tags()) == ["Llama3.2:latest", "x", "y"]
    assert catalog.holders(c("llama3.2")) == ("one", "two")
    assert catalog.names() == ("Llama3.2:latest", "x:latest", "y:latest")


def test_sorted_by_whole_seconds_then_name(catalog: Catalog) -> None:
    """Fractions of a second do not order the list, names do, whatever the zone."""
    catalog.note_tags(
        "one",
        [
            tag("b", modified="2026-11-21T12:00:00.9Z"),
            tag("a", modified="2026-11-21T14:00:00.1+02:00"),
            tag("old", modified="2026-11-21T12:00:00-00:01"),
            tag("older", modified="2025-11-21T12:00:00Z"),
        ],
    )
    assert shown(catalog.tags()) == ["old", "a", "b", "older"]


def test_aliases_are_listed_as_what_they_stand_for(catalog: Catalog) -> None:
    """A copy of the row of the first model that is there, field by field, under the alias."""
    catalog.note_tags("one", [tag("m:1", A), tag("n", B)])
    catalog.aliases = Aliases([("Fast", ["gone", "m:1"]), ("lost", ["gone"])])
    assert shown(catalog.tags()) == ["Fast", "m:1", "n"]
    fast, real, _ = catalog.tags()["models"]
    assert list(fast) == list(real)
    assert fast == real | {"name": "Fast", "model": "Fast"}
    assert json.loads(catalog.tags_json()) == catalog.tags()
    assert [row["id"] for row in catalog.models()["data"]] == ["Fast", "m:1", "n:latest"]
    assert catalog.model("fast:latest") is not None
    assert catalog.model("lost") is None
    assert (catalog.meant(c("FAST")), catalog.meant(c("n"))) == (c("m:1"), c("n"))
    assert catalog.meant(c("lost")) is None
    assert catalog.names() == ("m:1", "n:latest"), "models alone have numbers of their own"


def test_an_alias_is_there_instead_of_a_model_of_its_name(catalog: Catalog) -> None:
    """Calls go by the alias; the listing must not promise the other."""
    catalog.note_tags("one", [tag("m", A), tag("n", B)])
    catalog.aliases = Aliases([("n", ["m"])])
    assert [(row["name"], row["digest"]) for row in catalog.tags()["models"]] == [
        ("m", A),
        ("n", A),
    ]
    catalog.aliases = Aliases([("n", ["gone"])])
    assert shown(catalog.tags()) == ["m"]
    catalog.aliases = Aliases()
    assert shown(catalog.tags()) == ["m", "n"]


def test_hidden_names_are_not_listed_and_yet_there(catalog: Catalog) -> None:
    """Neither models nor aliases; ps shows them, and whoever knows one is answered."""
    catalog.note_tags("one", [tag("m", A), tag("n", B)])
    catalog.note_ps("one", [run("n")])
    catalog.aliases = Aliases([("x", ["n"]), ("y", ["n"])], hide=["n", "y"])
    assert shown(catalog.tags()) == ["m", "x"]
    assert [row["id"] for row in catalog.models()["data"]] == ["m:latest", "x"]
    assert catalog.offered() == ("m:latest", "x")
    assert shown(catalog.ps()) == ["n"]
    assert catalog.knows(c("n"))
    assert catalog.model("n") is not None


def test_stubs_of_cloud_models_are_in_no_conflict(catalog: Catalog) -> None:
    """Their digest is no weights'."""
    stub = {"remote_model": "m", "remote_host": "https://ollama.com:443"}
    catalog.note_tags("one", [tag("m:cloud", A) | stub])
    catalog.note_tags("two", [tag("m:cloud", B) | stub])
    assert catalog.conflicts() == {}


def test_newest_row_wins_and_conflict_is_told(catalog: Catalog) -> None:
    """Of two models with one name the later modified is listed, and the conflict recorded."""
    catalog.note_tags("one", [tag("m", A, "2026-11-21T12:00:00.000000002Z"), tag("same", C)])
    catalog.note_tags("two", [tag("m", B, "2026-11-21T12:00:00.000000001Z"), tag("same", C)])
    catalog.join("three")
    catalog.note_tags("three", [tag("m", B, "2020-01-01T00:00:00Z")])
    assert [row["digest"] for row in catalog.tags()["models"]] == [A, C]
    assert catalog.conflicts() == {c("m"): {A: ["one"], B: ["two", "three"]}}
    assert catalog.digest("two", c("m")) == B


@pytest.mark.parametrize(
    "broken",
    [
        tag("m", "abc"),
        tag("m", A.upper()),
        tag("m", None),
        tag("m", size=1.5),
        tag("m", size=2**63),
        tag("m", size=True),
        tag("m", model=3),
        tag("m", details=[]),
        tag("m", details={"families": [1]}),
        tag("m", capabilities="completion"),
        tag("m", modified="yesterday"),
        tag("m", modified=5),
    ],
)
def test_row_that_breaks_clients_is_known_but_not_listed(catalog: Catalog, broken: Any) -> None:
    """A row that Go clients cannot decode is not shown, but its model can be called."""
    catalog.note_tags("one", [broken, tag("good")])
    assert shown(catalog.tags()) == ["good"]
    assert catalog.knows(c("m"))
    assert catalog.conflicts() == {}


def test_listable_row_beats_newer_broken_one(catalog: Catalog) -> None:
    """A broken row does not hide another backend's good one."""
    catalog.note_tags("one", [tag("m", "short", "2030-01-01T00:00:00Z")])
    catalog.note_tags("two", [tag("m")])
    assert shown(catalog.tags()) == ["m"]


@pytest.mark.parametrize(
    "row",
    [
        None,
        5,
        [],
        {},
        {"name": ""},
        {"name": 5},
        {"name": "a b"},
        {"name": "m", "x": float("nan")},
        {"name": "m", "x": {1, 2}},
    ],
)
def test_malformed_row_is_skipped(catalog: Catalog, row: Any) -> None:
    """What names no model, or has no JSON form, costs nothing but itself."""
    assert catalog.note_tags("one", [row, tag("good")])
    assert shown(catalog.tags()) == ["good"]
    assert catalog.listed("one") == [c("good")]


def test_deeply_nested_row_is_skipped(catalog: Catalog) -> None:
    """Nesting beyond what JSON can be written of does not raise."""
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    catalog.note_tags("one", [tag("m", x=deep)])
    assert catalog.tags() == {"models": []}


def test_missing_fields_of_old_releases_are_fine(catalog: Catalog) -> None:
    """Absent and null fields are listed as they came; an old row may have only one name field."""
    rows = [
        {"name": "m:latest", "digest": A},
        {"model": "n:latest", "digest": B, "details": None, "modified_at": None},
        {"name": "", "model": "o:latest", "digest": C},
    ]
    catalog.note_tags("one", rows)
    assert catalog.tags() == {"models": rows}
    assert catalog.size(c("m")) == 0


def test_first_of_two_rows_with_one_name_counts(catalog: Catalog) -> None:
    """A backend that lists a name twice does not list it twice through us."""
    catalog.note_tags("one", [tag("m", A), tag("M:latest", B)])
    assert [row["digest"] for row in catalog.tags()["models"]] == [A]


def test_note_tags_tells_changes(catalog: Catalog) -> None:
    """Changed means another list, not another reading; null is an empty list, others are none."""
    assert catalog.note_tags("one", [tag("m")])
    assert not catalog.note_tags("one", [tag("m")])
    assert catalog.note_tags("one", [tag("m", modified="2026-11-21T12:00:01Z")])
    assert not catalog.note_tags("one", {"m": 1})
    assert catalog.knows(c("m"))
    assert catalog.note_tags("one", None)
    assert not catalog.knows(c("m"))


def test_facts_about_a_model(catalog: Catalog) -> None:
    """Size and holders come from tags; unknown models have neither."""
    catalog.note_tags("one", [tag("m", size=7)])
    assert catalog.size(c("m")) == 7
    assert catalog.size(c("x")) == 0
    assert catalog.holders(c("x")) == ()
    assert catalog.digest("one", c("x")) is None
    assert not catalog.knows(c("x"))


def test_names_are_shown_as_their_backend_spells_them(catalog: Catalog) -> None:
    """A known model keeps the spelling of the list, another has none but ours."""
    catalog.note_tags("one", [tag("Llama3.2")])
    assert catalog.shown(c("llama3.2")) == "Llama3.2:latest"
    assert catalog.shown(c("library/Other")) == "other:latest"


def test_cloud_stub_is_listed_beside_its_local_name(catalog: Catalog) -> None:
    """A stub passes with its remote fields, is another model, and needs no load."""
    stub = tag("gpt-oss:120b-cloud", B, remote_model="gpt-oss:120b", remote_host="https://x")
    alias = tag("mine:latest", C, remote_model="gpt-oss:120b")
    catalog.note_tags("one", [stub, alias])
    assert catalog.tags()["models"] == [stub, alias]
    assert where(catalog, "gpt-oss:120b-cloud") is LOADED
    assert where(catalog, "gpt-oss:120b") is ABSENT
    assert where(catalog, "mine") is LOADED
    catalog.note_loaded("one", key("mine"))
    assert catalog.loaded("one") == []
    assert catalog.digests_without_show() == []


# Other answers


def test_models_is_the_openai_list(catalog: Catalog) -> None:
    """The list has the order of tags, the recorded shape, and a final newline."""
    assert catalog.models_json() == b'{"object":"list","data":[]}\n'
    catalog.note_tags(
        "one",
        [tag("llama3.2:1b", modified="2026-11-21T11:59:20.432861079Z"), tag("hf.co/Org/r:Q4")],
    )
    assert catalog.models_json() == (
        b'{"object":"list","data":['
        b'{"id":"hf.co/Org/r:Q4","object":"model","created":1795262400,"owned_by":"Org"},'
        b'{"id":"llama3.2:1b","object":"model","created":1795262360,"owned_by":"library"}]}\n'
    )
    assert catalog.models() == json.loads(catalog.models_json())


def test_model_echoes_the_id_as_asked(catalog: Catalog) -> None:
    """One model is found by any spelling and shown by the one used."""
    catalog.note_tags("one", [tag("llama3.2", modified="2026-11-21T11:59:20.9Z")])
    assert catalog.model("Llama3.2") == {
        "id": "Llama3.2",
        "object": "model",
        "created": 1795262360,
        "owned_by": "library",
    }
    assert catalog.model("none") is None
    assert catalog.model("not a name") is None


def test_ps_is_sorted_by_expiry_and_keeps_duplicates(catalog: Catalog) -> None:
    """Zones and nanoseconds count; a model loaded on two backends is there twice."""
    catalog.note_ps(
        "one", [run("m", expires="2026-11-21T14:00:00.000000002+02:00"), run("bad", "x")]
    )
    catalog.note_ps(
        "two",
        [
            run("m", expires="2026-11-21T12:00:00.000000003Z"),
            run("early", B, expires="2026-11-21T12:00:00Z"),
            run("ever", C, expires="2318-08-11T11:47:50.854775807Z"),
        ],
    )
    assert shown(catalog.ps()) == ["ever", "m", "m", "early"]
    assert [row["expires_at"][-6:] for row in catalog.ps()["models"][1:3]] == ["00003Z", "+02:00"]
    assert json.loads(catalog.ps_json()) == catalog.ps()
    assert catalog.ps_json() is catalog.ps_json()


def test_ps_leaves_out_backends_that_are_away(warm: Catalog) -> None:
    """What is away has nothing in memory, even if a late answer says so."""
    assert shown(warm.ps()) == ["m:latest"]
    assert warm.vram("one") == 5_000_000_000
    warm.note_away("one")
    assert warm.ps_json() == b'{"models":[]}'
    assert warm.vram("one") == 0
    warm.note_ps("one", [run("m:latest")])
    assert warm.ps() == {"models": []}
    warm.note_back("one")
    assert shown(warm.ps()) == ["m:latest"]


def test_answers_are_cached_until_something_changes(catalog: Catalog) -> None:
    """The same object is returned while nothing changed, a new one afterwards."""
    catalog.note_tags("one", [tag("m")])
    first = (catalog.tags(), catalog.tags_json(), catalog.models_json())
    catalog.note_tags("one", [tag("m")])
    again = (catalog.tags(), catalog.tags_json(), catalog.models_json())
    assert all(x is y for x, y in zip(first, again, strict=True))
    catalog.note_tags("two", [tag("n", B)])
    assert shown(catalog.tags()) == ["m", "n"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T00:00:00.000000001Z", 1),
        ("1970-01-01T00:00:01.5Z", 1_500_000_000),
        ("1970-01-01T00:00:00.1234567891Z", 123_456_789),
        ("1970-01-01T01:00:00+01:00", 0),
        ("1969-12-31T22:30:00-01:30", 0),
        ("0001-01-01T00:00:00+01:00", -62135596800 * 10**9 - 3600 * 10**9),
        ("9999-12-31T23:59:59-01:00", (253402300799 + 3600) * 10**9),
        ("2026-02-30T00:00:00Z", None),
        ("2026-02-03T00:00:00", None),
        ("2026-02-03 00:00:00Z", None),
        ("", None),
        (5, None),
    ],
)
def test_instants(text: Any, expected: int | None) -> None:
    """RFC 3339 to the nanosecond, for every year Go can write."""
    assert instant_ns(text) == expected


# Away, dropped, unknown


def test_models_of_a_backend_that_is_away_are_remembered_a_while(
    catalog: Catalog, clock: Clock
) -> None:
    """They stay listed for remember_s, without any further news, and come back with it."""
    catalog.note_tags("one", [tag("m")])
    catalog.note_away("one")
    clock.now += 99
    catalog.note_away("one")
    assert shown(catalog.tags()) == ["m"]
    assert catalog.holders(c("m")) == ("one",)
    assert catalog.lists("one", c("m"))
    clock.now += 1
    assert catalog.tags_json() == b'{"models":[]}'
    assert not catalog.knows(c("m"))
    assert not catalog.lists("one", c("m"))
    catalog.note_back("one")
    assert catalog.knows(c("m"))
    assert catalog.lists("one", c("m"))
    assert not catalog.lists("two", c("m"))


def test_remembering_may_be_set_anew(catalog: Catalog, clock: Clock) -> None:
    """A reload of the configuration counts at once, for what is away already."""
    catalog.note_tags("one", [tag("m")])
    catalog.note_away("one")
    clock.now += 50
    assert catalog.knows(c("m"))
    catalog.remember_s = 50
    assert not catalog.knows(c("m"))
    catalog.remember_s = 51
    assert catalog.knows(c("m"))


def test_dropped_backend_is_forgotten(warm: Catalog) -> None:
    """What left the pool is nowhere, and its late answers change nothing."""
    assert warm.knows(c("m"))
    assert shown(warm.ps()) == ["m:latest"]
    warm.drop("one")
    warm.drop("one")
    assert warm.tags() == {"models": []}
    assert warm.ps() == {"models": []}
    assert warm.note_tags("one", [tag("m")])
    warm.note_ps("one", [run("m")])
    warm.note_version("one", "0.1.0")
    warm.note_missing("one", c("m"))
    warm.note_loaded("one", key("m"))
    assert warm.tags() == {"models": []}
    assert warm.ps() == {"models": []}
    assert warm.version() is None
    warm.join("one")
    assert warm.loaded("one") == []


def test_joining_again_keeps_what_is_known(warm: Catalog) -> None:
    """A reload that lists the same backend loses nothing."""
    warm.join("one")
    assert where(warm, "m") is LOADED


def test_settled_when_every_backend_answered_or_failed(catalog: Catalog) -> None:
    """Until then no model is unknown."""
    assert not catalog.settled()
    catalog.note_tags("one", [])
    assert not catalog.settled()
    catalog.note_failed("two")
    assert catalog.settled()
    catalog.join("three")
    assert not catalog.settled()
    catalog.note_away("three")
    assert catalog.settled()


# Missing models


def test_missing_model_is_forgotten_until_listed_again(catalog: Catalog) -> None:
    """After a 404 the model is not there until tags, read again, list it; then it is damaged."""
    catalog.note_tags("one", [tag("m"), tag("n", B)])
    assert catalog.knows(c("m"))
    catalog.note_missing("one", c("m"))
    assert where(catalog, "m") is ABSENT
    assert not catalog.knows(c("m"))
    assert not catalog.listed_again_after_missing("one", c("m"))
    assert catalog.note_tags("one", [tag("m"), tag("n", B)])
    assert catalog.knows(c("m"))
    assert catalog.listed_again_after_missing("one", c("m"))
    assert not catalog.listed_again_after_missing("one", c("n"))
    assert not catalog.listed_again_after_missing("two", c("m"))


def test_answer_asked_for_before_the_404_does_not_count(catalog: Catalog, clock: Clock) -> None:
    """Tags that were on their way when the model was found missing cannot bring it back."""
    catalog.note_tags("one", [tag("m")])
    clock.now += 5
    catalog.note_missing("one", c("m"))
    assert not catalog.note_tags("one", [tag("m")], asked_at=clock.now - 1)
    assert not catalog.knows(c("m"))
    catalog.note_tags("one", [tag("m")], asked_at=clock.now + 1)
    assert catalog.listed_again_after_missing("one", c("m"))
    clock.now += 5
    catalog.note_missing("one", c("m"))
    catalog.note_tags("one", [tag("m")], asked_at=clock.now - 1)
    assert catalog.listed_again_after_missing("one", c("m"))


def test_deleted_or_replaced_model_is_not_damaged(catalog: Catalog) -> None:
    """Gone from the tags, or there with another digest: the 404 was true."""
    for after in ([], [tag("m", B)]):
        catalog.note_tags("one", [tag("m", A)])
        catalog.note_missing("one", c("m"))
        catalog.note_tags("one", after)
        assert not catalog.listed_again_after_missing("one", c("m"))


@pytest.mark.parametrize("after", ["load", "gone", "other"])
def test_damage_is_forgotten(catalog: Catalog, after: str) -> None:
    """A call that completes, or another list, ends the suspicion."""
    catalog.note_tags("one", [tag("m")])
    catalog.note_missing("one", c("m"))
    catalog.note_missing("one", c("m"))
    catalog.note_tags("one", [tag("m")])
    assert catalog.listed_again_after_missing("one", c("m"))
    if after == "load":
        catalog.note_loaded("one", key("m"))
    else:
        catalog.note_tags("one", [] if after == "gone" else [tag("m", B)])
    assert not catalog.listed_again_after_missing("one", c("m"))


def test_missing_before_tags_were_read(catalog: Catalog) -> None:
    """A 404 counts even if we never saw the list."""
    assert where(catalog, "m") is UNKNOWN
    catalog.note_missing("one", c("m"))
    assert where(catalog, "m") is ABSENT
    catalog.note_tags("one", [tag("m")])
    assert catalog.listed_again_after_missing("one", c("m"))


# Routes and versions


def test_routes_are_unlearned_with_another_version(catalog: Catalog) -> None:
    """A route a backend did not know is not asked of it until its version changes."""
    catalog.note_version("one", "0.33.0-rc2")
    assert catalog.supports("one", "chat")
    catalog.note_no_route("one", "chat")
    catalog.note_version("one", "0.33.0-rc2")
    assert not catalog.supports("one", "chat")
    assert catalog.supports("two", "chat")
    catalog.note_version("one", "0.33.0")
    assert catalog.supports("one", "chat")


def test_routes_that_clients_make_up_are_not_all_remembered(catalog: Catalog) -> None:
    """Some hundred paths are; then no more, so that they cannot fill the memory."""
    for number in range(10_000):
        catalog.note_no_route("one", f"/api/{number}")
    forgotten = [n for n in range(10_000) if catalog.supports("one", f"/api/{n}")]
    assert 9_000 < len(forgotten) < 10_000


@pytest.mark.parametrize(
    ("version", "operation", "supported"),
    [
        ("0.1.37", "ps", False),
        ("0.1.38", "ps", True),
        ("0.1.48", "models", False),
        ("0.2.0", "model", True),
        ("0.13.2", "v1_responses", False),
        ("0.14.0", "v1_messages", True),
        ("0.19.9", "v1_transcriptions", False),
        ("0.2.5", "embed", False),
        ("0.2.5", "v1_embeddings", False),
        ("0.2.6-rc1", "embed", True),
        ("0.1.0", "chat", True),
        ("0.0.0", "embed", True),
        ("main-abc", "embed", True),
        (None, "embed", True),
    ],
)
def test_routes_by_version(
    catalog: Catalog, version: Any, operation: str, *, supported: bool
) -> None:
    """An old release lacks what came later; a version that says nothing excludes nothing."""
    catalog.note_version("one", version)
    assert catalog.supports("one", operation) is supported


def test_version_is_the_minimum_of_what_is_up(catalog: Catalog) -> None:
    """Plain semver; with none up the last minimum stays; other policies."""
    assert catalog.version() is None
    catalog.note_version("one", "0.33.0-rc2+build")
    catalog.note_version("two", "v0.9.6")
    assert catalog.version() == "0.9.6"
    assert catalog.version("max") == "0.33.0"
    assert catalog.version("0.12.3") == "0.12.3"
    assert catalog.version_of("one") == "0.33.0-rc2+build"
    catalog.note_away("two")
    assert catalog.version() == "0.33.0"
    catalog.note_away("one")
    assert catalog.version() == "0.33.0"
    catalog.note_back("two")
    assert catalog.version() == "0.9.6"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("0.10", "0.10.0"),
        ("1", "1.0.0"),
        (" 0.5.7-0-ga420a45-dirty ", "0.5.7"),
        ("0.5.7.1", "0.5.7"),
        ("0.0.0", "0.0.0"),
        ("0.6abc", None),
        ("main", None),
        ("", None),
        (5, None),
        ("9" * 5000, None),
    ],
)
def test_versions_are_read_robustly(catalog: Catalog, text: Any, plain: str | None) -> None:
    """Whatever a backend calls its version, it is read or ignored."""
    catalog.note_version("one", text)
    assert catalog.version() == plain
    assert catalog.version_of("one") == (text if isinstance(text, str) else None)


def test_build_from_source_is_not_the_minimum(catalog: Catalog) -> None:
    """0.0.0 means no release number, not a very old one."""
    catalog.note_version("one", "0.0.0")
    catalog.note_version("two", "0.30.1")
    assert catalog.version() == "0.30.1"


# Residency


def test_residency_needs_a_fresh_reading(catalog: Catalog, clock: Clock) -> None:
    """Unknown until ps was read and when it is old; absent if tags do not list the model."""
    assert where(catalog, "m") is UNKNOWN
    catalog.note_tags("one", [tag("m")])
    assert where(catalog, "m") is UNKNOWN
    assert where(catalog, "x") is ABSENT
    catalog.note_ps("one", [])
    assert where(catalog, "m") is ON_DISK
    catalog.note_ps("one", [run("m")])
    clock.now += 30
    assert where(catalog, "m") is LOADED
    clock.now += 1
    assert where(catalog, "m") is UNKNOWN
    assert catalog.loaded("one") == [c("m")]
    assert catalog.residency("nowhere", key("m")) is UNKNOWN


def test_residency_before_tags_were_read(catalog: Catalog) -> None:
    """What is in memory is there, even if the list was not read yet."""
    catalog.note_ps("one", [run("m")])
    assert where(catalog, "m") is LOADED
    assert where(catalog, "n") is UNKNOWN


def test_deleted_model_in_memory_is_absent(catalog: Catalog) -> None:
    """Ollama answers 404 to a deleted name, loaded or not; its twin goes on."""
    catalog.note_tags("one", [tag("t")])
    catalog.note_ps("one", [run("m")])
    assert where(catalog, "m") is ABSENT
    assert where(catalog, "t") is LOADED


def test_twins_share_a_runner(warm: Catalog) -> None:
    """Residency goes by digest: a copy of a loaded model is loaded."""
    assert where(warm, "m") is LOADED
    assert where(warm, "t") is LOADED
    assert where(warm, "n") is ON_DISK
    assert warm.context("one", c("t")) == 4096
    assert warm.resident("one", c("t")) == c("m")
    assert warm.resident("one", c("n")) is None
    warm.note_loaded("one", key("t", num_ctx=8192))
    assert warm.loaded("one") == [c("m")]
    assert warm.resident_options("one", c("m")) == key("m", num_ctx=8192)
    assert shown(warm.ps()) == ["m:latest"]
    warm.note_unloaded("one", c("t"))
    assert warm.loaded("one") == []
    assert warm.ps() == {"models": []}


def test_recreated_model_shares_its_runner_by_name(catalog: Catalog) -> None:
    """A name that was made anew from the same file keeps its runner, which shows the old digest."""
    catalog.note_tags("one", [tag("m", B)])
    catalog.note_ps("one", [run("other", C), run("m", A)])
    assert where(catalog, "m") is LOADED
    catalog.note_loaded("one", key("m", num_thread=4))
    catalog.note_ps("one", [run("m", A)])
    assert catalog.resident_options("one", c("m")) == key("m", num_thread=4)


def test_rows_without_digest_go_by_name(catalog: Catalog) -> None:
    """Without whole digests on both sides names decide."""
    catalog.note_tags("one", [tag("m", None), tag("n", None)])
    catalog.note_ps("one", [run("m", None)])
    catalog.note_loaded("one", key("m", num_ctx=4096))
    catalog.note_ps("one", [run("n", None), run("m", None)])
    assert catalog.resident_options("one", c("m")) == key("m", num_ctx=4096)
    assert catalog.resident_options("one", c("n")) is None
    catalog.note_ps("one", [run("m", A)])
    assert catalog.resident_options("one", c("m")) == key("m", num_ctx=4096)


def test_stranger_counts_as_its_context_and_nothing_else(warm: Catalog) -> None:
    """What somebody else loaded fits no options, or its own context, but no other option."""
    assert where(warm, "m") is LOADED
    assert where(warm, "m", num_ctx=4096) is LOADED
    assert where(warm, "m", num_ctx=8192) is ON_DISK
    assert where(warm, "m", num_thread=4) is ON_DISK
    assert where(warm, "m", num_ctx=4096, num_gpu=1) is ON_DISK
    assert warm.resident_options("one", c("m")) is None


def test_stranger_of_an_old_release_tells_no_context(catalog: Catalog) -> None:
    """Without a context only a key without one fits."""
    catalog.note_tags("one", [tag("m")])
    row = run("m")
    del row["context_length"]
    catalog.note_ps("one", [row])
    assert where(catalog, "m") is LOADED
    assert where(catalog, "m", num_ctx=4096) is ON_DISK
    assert catalog.context("one", c("m")) is None


def test_our_own_load_counts_with_its_options(warm: Catalog) -> None:
    """A runner we loaded with options fits exactly these, without waiting for ps."""
    warm.note_loaded("one", key("m", num_ctx=8192, num_thread=4))
    assert where(warm, "m", num_ctx=8192, num_thread=4) is LOADED
    assert where(warm, "m", num_ctx=8192) is ON_DISK
    assert where(warm, "m", num_ctx=4096, num_thread=4) is ON_DISK
    assert where(warm, "m", num_thread=4) is ON_DISK
    assert where(warm, "m") is ON_DISK
    assert warm.resident_options("one", c("m")) == key("m", num_ctx=8192, num_thread=4)


def test_default_context_is_learned_from_a_load_without_one(warm: Catalog, clock: Clock) -> None:
    """A load of ours without num_ctx shows the default; a stranger's context does not."""
    warm.note_loaded("one", key("m"))
    warm.note_ps("one", [run("m", context=4096)])
    assert where(warm, "m") is LOADED
    warm.note_ps("one", [run("m", context=16384)])
    assert where(warm, "m") is ON_DISK
    assert where(warm, "m", num_ctx=16384) is LOADED
    assert warm.context("one", c("m")) == 16384
    assert warm.known_context("one", key("m")) == 4096
    warm.note_loaded("one", key("m", num_ctx=4096))
    warm.note_ps("one", [run("m", context=4096)])
    assert where(warm, "m") is LOADED


def test_how_a_model_is_in_memory(catalog: Catalog) -> None:
    """Context, what the host gives by itself, what it was made for; None where not known."""
    catalog.note_tags("one", [tag("m"), tag("plain", B, details=None)])
    assert catalog.runner("one", c("m")) is None
    catalog.note_loaded("one", key("m"))
    assert catalog.runner("one", c("m")) == Runner(None, None, 32768)
    catalog.note_ps("one", [run("m", context=8192)])
    assert catalog.runner("one", c("m")) == Runner(8192, 8192, 32768)
    catalog.note_loaded("one", key("m", num_ctx=16384))
    assert catalog.runner("one", c("m")) == Runner(16384, 8192, 32768)
    catalog.note_ps("one", [run("plain", B, context=4096)])
    assert catalog.runner("one", c("plain")) == Runner(4096, None, None)


def test_why_a_load_is_a_load_once_more(warm: Catalog, clock: Clock) -> None:
    """It was there with another context, or with other options; not if it was not, or long ago."""
    assert warm.reloads("one", key("m")) == ""
    assert warm.reloads("one", key("n", num_ctx=8)) == ""
    assert warm.reloads("one", key("m", num_ctx=8192)) == "num_ctx"
    assert warm.reloads("one", key("t", num_ctx=8192)) == "num_ctx"  # the same file
    assert warm.reloads("one", key("m", num_thread=4)) == "options"
    assert warm.reloads("one", key("m", num_ctx=8192, num_thread=4)) == "options"
    warm.note_loaded("one", key("m", num_ctx=8192, num_thread=4))
    assert warm.reloads("one", key("m", num_ctx=4096, num_thread=4)) == "num_ctx"
    assert warm.reloads("one", key("m")) == "options"
    clock.now += 600.0
    warm.note_ps("one", [run("n", B)])
    assert warm.reloads("one", key("m", num_thread=4)) == "num_ctx"  # it was pushed out
    assert warm.reloads("one", key("m", num_ctx=8192, num_thread=4)) == ""
    clock.now += 1.0
    assert warm.reloads("one", key("m", num_thread=4)) == ""


def test_a_load_after_a_restart_is_none_once_more(warm: Catalog) -> None:
    """Whatever a host had in memory, it went by itself."""
    warm.note_away("one")
    warm.note_back("one")
    assert warm.reloads("one", key("m", num_ctx=8192)) == ""


def test_automatic_runner_fits_no_context_whatever_it_has(catalog: Catalog) -> None:
    """Loaded without num_ctx and called without: no reload, though the default is not known."""
    catalog.note_tags("one", [tag("m")])
    catalog.note_loaded("one", key("m"))
    assert where(catalog, "m") is LOADED
    assert where(catalog, "m", num_ctx=4096) is ON_DISK


def test_asked_context_is_cut_to_the_trained_one(catalog: Catalog) -> None:
    """More context than the model was trained for is as good as that."""
    catalog.note_tags("one", [tag("m"), tag("plain", B, details=None)])
    catalog.note_ps("one", [run("m", context=32768), run("plain", B, context=32768)])
    assert where(catalog, "m", num_ctx=100_000) is LOADED
    assert where(catalog, "plain", num_ctx=100_000) is ON_DISK
    assert catalog.known_context("one", key("m", num_ctx=100_000)) == 32768
    assert catalog.known_context("one", key("plain", num_ctx=100_000)) == 100_000
    assert catalog.known_context("one", key("x", num_ctx=7)) == 7


def test_missing_num_gpu_fits_any(warm: Catalog) -> None:
    """Ollama leaves the layers where they are unless told otherwise."""
    warm.note_loaded("one", key("m", num_gpu=10))
    warm.note_loaded("one", key("m"))
    assert where(warm, "m") is LOADED
    assert where(warm, "m", num_gpu=10) is LOADED
    assert where(warm, "m", num_gpu=11) is ON_DISK


def test_fitting_call_keeps_the_runner_as_known(warm: Catalog, clock: Clock) -> None:
    """A call that needed no reload only renews what is known of the runner."""
    warm.note_loaded("one", key("m", num_ctx=4096))
    warm.note_ps("one", [run("m")])
    clock.now += 40
    assert where(warm, "m", num_ctx=4096) is UNKNOWN
    warm.note_loaded("one", key("m", num_ctx=4096))
    assert where(warm, "m", num_ctx=4096) is LOADED
    assert where(warm, "n") is UNKNOWN
    assert warm.context("one", c("m")) == 4096


def test_call_that_fits_a_stranger_keeps_its_context(warm: Catalog) -> None:
    """A call served without a reload makes the runner ours, with the context it has."""
    warm.note_loaded("one", key("m"))
    assert warm.resident_options("one", c("m")) == key("m")
    assert where(warm, "m", num_ctx=4096) is LOADED
    warm.note_loaded("one", key("m", num_ctx=8192))
    assert where(warm, "m", num_ctx=4096) is ON_DISK


def test_options_are_forgotten_when_the_context_changes(warm: Catalog) -> None:
    """Another context in ps: somebody reloaded the model, with options we do not know."""
    warm.note_loaded("one", key("m", num_thread=4))
    warm.note_ps("one", [run("m", context=4096)])
    assert warm.resident_options("one", c("m")) == key("m", num_thread=4)
    warm.note_ps("one", [run("m", context=0)])
    assert warm.resident_options("one", c("m")) == key("m", num_thread=4)
    warm.note_ps("one", [run("m", context=4096)])
    warm.note_ps("one", [run("m", context=2048)])
    assert warm.resident_options("one", c("m")) is None


def test_load_of_ours_is_not_taken_back_by_an_older_answer(warm: Catalog, clock: Clock) -> None:
    """Ps that was on its way when a load ended does not undo it; a later one does."""
    clock.now += 5
    warm.note_loaded("one", key("n"))
    change = warm.note_ps("one", [run("m")], asked_at=clock.now - 1)
    assert not change.changed
    assert where(warm, "n") is LOADED
    assert warm.note_ps("one", [run("m")], asked_at=clock.now).vanished == (c("n"),)
    assert where(warm, "n") is ON_DISK
    warm.note_loaded("one", key("m", num_ctx=8192))
    warm.note_ps("one", [run("m", context=4096)], asked_at=clock.now - 1)
    assert warm.loaded("one") == [c("m")]
    assert where(warm, "m", num_ctx=8192) is LOADED
    assert where(warm, "m", num_ctx=4096) is ON_DISK


def test_ps_change(catalog: Catalog) -> None:
    """Who came, who went, and whether anything is different, expiry aside."""
    appeared = catalog.note_ps("one", [run("m"), run("n", B)])
    assert appeared == PsChange(changed=True, appeared=(c("m"), c("n")))
    assert catalog.note_ps("one", [run("n", B, expires="2030-01-01T00:00:00Z"), run("m")]) == (
        PsChange()
    )
    assert catalog.note_ps("one", [run("m", context=1), run("n", B)]) == PsChange(changed=True)
    assert catalog.note_ps("one", "what?") == PsChange()
    assert catalog.note_ps("one", None).vanished == (c("m"), c("n"))


def test_unload_and_absence(warm: Catalog, clock: Clock) -> None:
    """An unloaded model is on disk; one that was not loaded stays so; away forgets memory."""
    warm.note_unloaded("one", c("n"))
    assert where(warm, "m") is LOADED
    warm.note_unloaded("one", c("m"))
    assert where(warm, "m") is ON_DISK
    assert warm.context("one", c("m")) == 4096
    assert warm.known_context("one", key("m")) == 4096
    warm.note_ps("one", [run("m")])
    warm.note_away("one")
    assert where(warm, "m") is UNKNOWN
    assert warm.loaded("one") == []


def test_contexts_of_models_no_longer_listed_are_forgotten(warm: Catalog) -> None:
    """A model that was replaced starts without a known context."""
    warm.note_loaded("one", key("m"))
    warm.note_ps("one", [run("m")])
    warm.note_ps("one", [])
    warm.note_tags("one", [tag("m")])
    assert warm.context("one", c("m")) == 4096
    warm.note_ps("one", [run("m", context=8192)])
    warm.note_ps("one", [])
    assert warm.context("one", c("m")) == 8192
    assert warm.known_context("one", key("m")) == 4096
    warm.note_tags("one", [tag("m", C)])
    assert warm.context("one", c("m")) is None
    warm.note_tags("one", [tag("m", A)])
    assert warm.context("one", c("m")) is None
    assert warm.known_context("one", key("m")) is None


# Show


def test_show_is_kept_by_digest(catalog: Catalog) -> None:
    """Any holder's digest will do, the listed one first; twins share the answer."""
    catalog.note_tags("one", [tag("m", A), tag("t", A)])
    catalog.note_tags("two", [tag("m", B, "2030-01-01T00:00:00Z"), tag("bad", "short")])
    assert catalog.digests_without_show() == [("one", "m:latest", A), ("two", "m:latest", B)]
    assert catalog.show(c("m")) is None
    catalog.note_show(A, b'{"model_info":{}}')
    assert catalog.show(c("m")) == b'{"model_info":{}}'
    assert catalog.show(c("t")) == b'{"model_info":{}}'
    assert catalog.digests_without_show() == [("two", "m:latest", B)]
    catalog.note_away("two")
    assert catalog.digests_without_show() == []
    catalog.note_show(B, b'{"b":1}')
    assert catalog.show(c("m")) == b'{"b":1}'
    assert catalog.show(c("bad")) is None
    assert catalog.show(c("x")) is None


def test_show_may_come_before_the_list(catalog: Catalog) -> None:
    """An answer is kept for a digest that is not listed yet, as long as there is room."""
    catalog.note_show(A, b"{}")
    catalog.note_show(B, b"{}")
    catalog.note_tags("one", [tag("m", A)])
    assert catalog.show(c("m")) == b"{}"


@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_show_that_is_no_object_is_not_kept(catalog: Catalog, body: bytes) -> None:
    """Rubbish is asked for again."""
    catalog.note_tags("one", [tag("m")])
    catalog.note_show(A, body)
    assert catalog.show(c("m")) is None
    assert catalog.digests_without_show() == [("one", "m:latest", A)]


def test_shows_are_bounded(clock: Clock) -> None:
    """When full, what is listed nowhere makes room; no more is asked for than fits."""
    catalog = Catalog(clock, shows=2)
    catalog.join("one")
    catalog.note_tags("one", [tag("a", A), tag("b", B), tag("c", C)])
    assert [digest for _, _, digest in catalog.digests_without_show()] == [A, B]
    catalog.note_show("9" * 64, b"{}")
    catalog.note_show(A, b"{}")
    catalog.note_show(B, b"{}")
    assert catalog.show(c("b")) == b"{}"
    catalog.note_show(C, b"{}")
    assert catalog.show(c("c")) is None
    catalog.note_show(A, b'{"new":1}')
    assert catalog.show(c("a")) == b'{"new":1}'
    assert catalog.digests_without_show() == []


def test_embedding_only_is_told_by_show_before_tags(catalog: Catalog) -> None:
    """Tags may call an embedding model able to complete; show knows better."""
    catalog.note_tags(
        "one",
        [
            tag("m", A),
            tag("e", B, capabilities=["embedding", 5]),
            tag("both", C, capabilities=["embedding", "completion"]),
            tag("old", "d" * 64, capabilities=None),
        ],
    )
    assert [catalog.is_embedding_only(c(n)) for n in ("m", "e", "both", "old", "x")] == [
        False,
        True,
        False,
        False,
        False,
    ]
    catalog.note_show(A, b'{"capabilities":["embedding"]}')
    assert catalog.is_embedding_only(c("m"))


# Whatever a backend may say

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from([A, B, "m", "M:latest", "gpt:cloud", "2026-11-21T12:00:00.1+02:00"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
FIELDS = (
    *("name", "model", "digest", "size", "size_vram", "details", "capabilities", "context_length"),
    *("modified_at", "expires_at", "remote_model", "<&>\u2028"),
)
SOUND = st.sampled_from([tag("m"), tag("n", B), tag("m", C), run("m"), run("n", B, context=8192)])
ROW = st.one_of(JSON, SOUND, st.dictionaries(st.sampled_from(FIELDS), JSON))
ROWS = JSON | st.lists(ROW, max_size=6)


@given(st.lists(st.tuples(st.sampled_from(["one", "two"]), ROWS, ROWS), max_size=4))
def test_any_json_is_survived(readings: list[tuple[str, Any, Any]]) -> None:
    """No answer raises, and what is listed is always whole: strict JSON, full digests."""
    clock = Clock()
    catalog = Catalog(clock)
    catalog.join("one")
    catalog.join("two")
    for backend, tags, ps in readings:
        catalog.note_tags(backend, tags)
        catalog.note_ps(backend, ps)
        catalog.note_version(backend, ps)
    for answer, text in (
        (catalog.tags(), catalog.tags_json()),
        (catalog.ps(), catalog.ps_json()),
        (catalog.models(), catalog.models_json()),
    ):
        json.loads(text, parse_constant=pytest.fail)
        assert not set("<>&\u2028") & set(text.decode())
        assert list(json.loads(text)) == list(answer)
    for row in catalog.tags()["models"] + catalog.ps()["models"]:
        assert len(row["digest"]) == 64
        assert row.get("size") is None or type(row["size"]) is int
    canonicals = [c(row.get("name") or row["model"]) for row in catalog.tags()["models"]]
    assert len(set(canonicals)) == len(canonicals)
    for name in ("m", "n"):
        for asked in (key(name), key(name, num_ctx=8192)):
            assert catalog.residency("one", asked) in set(Residency)
            catalog.known_context("two", asked)
    catalog.conflicts()
    catalog.digests_without_show()
    catalog.vram("one")
    assert all(catalog.knows(c(name)) for name in catalog.names())


@given(st.lists(st.sampled_from("abcd"), unique=True), st.randoms())
def test_order_of_a_backend_does_not_matter(order: list[str], chance: Any) -> None:
    """Ollama shuffles models of one second at every call; our list does not."""
    catalog = Catalog(Clock())
    catalog.join("one")
    catalog.note_tags("one", [tag(name) for name in order])
    before = catalog.tags_json()
    chance.shuffle(order)
    assert not catalog.note_tags("one", [tag(name) for name in order])
    assert catalog.tags_json() == before


# -- editions ------------------------------------------------------------------------------------


def test_what_is_seen_again_is_no_new_edition(warm: Catalog, clock: Clock) -> None:
    """A call that ends well proves what was known: only for how long that is believed moves on."""
    warm.note_loaded("one", key("m"))
    edition, copy = warm.edition, warm.copy("one", key("m"))
    clock.now += 29.0
    warm.note_loaded("one", key("m"))
    clock.now += 29.0
    assert warm.edition == edition
    assert warm.copy("one", key("m")) is copy
    assert copy.residency(clock.now) is where(warm, "m") is Residency.LOADED
    clock.now += 2.0
    assert copy.residency(clock.now) is where(warm, "m") is Residency.UNKNOWN


@pytest.mark.parametrize(
    "news",
    [
        lambda it: it.note_tags("one", []),
        lambda it: it.note_ps("one", []),
        lambda it: it.note_version("one", "0.1.0"),
        lambda it: it.note_away("one"),
        lambda it: it.note_back("one"),
        lambda it: it.note_missing("one", c("m")),
        lambda it: it.note_no_route("one", "embed"),
        lambda it: it.note_loaded("one", key("m", num_ctx=77)),
        lambda it: it.note_unloaded("one", c("m")),
        lambda it: it.drop("one"),
    ],
)
def test_news_are_a_new_edition(warm: Catalog, news: Callable[[Catalog], object]) -> None:
    """Whoever made something of the last one makes it anew."""
    warm.note_loaded("one", key("m"))
    edition, copy = warm.edition, warm.copy("one", key("m"))
    news(warm)
    assert warm.edition > edition
    assert warm.copy("one", key("m")) is not copy


def test_what_lapses_is_a_new_edition(clock: Clock) -> None:
    """Nobody tells of it: it is noticed by who asks."""
    catalog = Catalog(clock, remember_s=60.0)
    catalog.join("one")
    catalog.note_tags("one", [tag("llama3.2")])
    catalog.note_away("one")
    edition = catalog.edition
    clock.now += 59.0
    assert catalog.edition == edition
    clock.now += 1.0
    assert catalog.edition > edition
    assert not catalog.lists("one", c("llama3.2"))


def test_an_empty_list_is_news_of_what_is_not_in_it(clock: Clock) -> None:
    """It is as long as before, but now it was read."""
    catalog = Catalog(clock)
    catalog.join("one")
    assert where(catalog, "llama3.2") is Residency.UNKNOWN
    catalog.note_tags("one", [])
    assert where(catalog, "llama3.2") is Residency.ABSENT


def test_which_of_two_twins_is_meant_is_news(clock: Clock) -> None:
    """Two names of one digest in memory with other contexts: a call on one puts it behind."""
    catalog = Catalog(clock)
    catalog.join("one")
    catalog.note_tags("one", [tag("m:a"), tag("m:b")])
    catalog.note_ps("one", [run("m:a", context=1000), run("m:b", context=2000)])
    for _ in range(4):
        first = catalog.context("one", c("m:a"))
        assert catalog.copy("one", key("m:a")).context == first
        catalog.note_loaded("one", key("m:a", num_ctx=first))
        assert catalog.copy("one", key("m:a")).context == catalog.known_context("one", key("m:a"))


@pytest.mark.parametrize(("context", "here"), [(4096, True), (16384, False)])
def test_the_usual_default_passes_for_the_default(
    clock: Clock, context: int, *, here: bool
) -> None:
    """Asked for by one call and not by the next: no reload, as long as no other is known."""
    catalog = Catalog(clock)
    catalog.join("one")
    catalog.note_tags("one", [tag("m:a")])
    catalog.note_loaded("one", key("m:a", num_ctx=context))
    assert catalog.copy("one", key("m:a")).fits is here
    catalog.note_ps("one", [run("m:a", context=context)])
    assert catalog.copy("one", key("m:a")).fits is here
