import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.config.yamltext import read_yaml


def told(text: str, **env: str) -> list[str]:
    """Return the problems in *text*."""
    return [str(problem) for problem in read_yaml(text, env, "c.yaml").problems]


def test_values_keys_and_items_know_their_places() -> None:
    """Lines and columns count from 1, as editors do."""
    result = read_yaml("a:\n  - b: 1\n    c: [x, y]\n", {}, "c.yaml")
    assert result.tree == {"a": [{"b": 1, "c": ["x", "y"]}]}
    value, key, item = result.values["a", 0, "b"], result.keys["a", 0, "c"], result.values["a", 0]
    assert (value.line, value.column, value.plain) == (2, 8, "1")
    assert (key.line, key.column) == (3, 5)
    assert (item.line, item.column) == (2, 5)


def test_an_empty_text_says_nothing() -> None:
    """A file of comments is a file of defaults."""
    result = read_yaml("# nothing\n", {}, "c.yaml")
    assert (result.tree, result.problems) == (None, [])


def test_a_duplicate_key_names_the_first() -> None:
    """PyYAML alone would silently keep the last."""
    assert told("a:\n  b: 1\n  b: 2\n") == ["c.yaml:3:3 a.b: duplicate key (first at line 2)."]


@pytest.mark.parametrize(
    ("text", "place"),
    [("a: b: c", "c.yaml:1:5"), ("a: 1\n\tb: 2", "c.yaml:2:1"), ("a: \x01", "c.yaml:1:4")],
)
def test_broken_yaml_is_a_problem_with_a_place(text: str, place: str) -> None:
    """Syntax faults read like all others."""
    (problem,) = told(text)
    assert problem.startswith(f"{place} not valid YAML: ")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 500,
        "a: &a [*a]",
        "a: &a {<<: *a}",
        "a: &a [1,1,1,1,1,1,1,1,1]\n"
        + "\n".join(
            f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]"
            for p, n in zip("abcdef", "bcdefg", strict=True)
        ),
    ],
)
def test_bottomless_yaml_is_a_problem(text: str) -> None:
    """Neither depth nor aliases of aliases can eat the memory."""
    (problem,) = told(text)
    assert "nested too deeply" in problem


@pytest.mark.parametrize("text", ["a: !!python/name:os.system", "a: 2024-99-99", "a: !!int ''"])
def test_values_yaml_cannot_read_are_problems(text: str) -> None:
    """No object is built and nothing is raised."""
    assert told(text) == ["c.yaml:1:4 a: not a value YAML can read. Put it in quotes."]


def test_keys_are_taken_as_written() -> None:
    """YAML 1.1 reads the key "on" as true."""
    assert read_yaml("on: 1\n2: x\n", {}, "c.yaml").tree == {"on": 1, "2": "x"}


def test_a_key_that_is_a_list_is_a_problem() -> None:
    """Such keys have no name."""
    assert told("? [a]\n: 1\n") == ["c.yaml:1:3 a key must be one word."]


def test_merged_keys_give_way_to_own_ones() -> None:
    """A shared block with exceptions is the use of "<<"."""
    text = "a: &a {x: 1, y: 1}\nb: {y: 2, <<: *a}\nc:\n  <<: [{x: 3}, *a]\n"
    tree = read_yaml(text, {}, "c.yaml").tree
    assert tree == {"a": {"x": 1, "y": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 3, "y": 1}}


def test_merging_no_block_is_a_problem() -> None:
    """There is nothing to take keys from."""
    assert told("a: {<<: 5}") == ['c.yaml:1:9 a: "<<" takes a block of keys.']


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${NAME}", "x"),
        ("'a-${NAME}-${NAME}'", "a-x-x"),
        ("${NONE:-d}", "d"),
        ("${EMPTY:-d}", "d"),
        ("${EMPTY}", ""),
        ("${NONE:-}", ""),
        ("$${NAME}", "${NAME}"),
        ("a$b", "a$b"),
        ("$$$$", "$$"),
    ],
)
def test_variables_are_put_into_texts(text: str, value: str) -> None:
    """The shell's forms work; two dollar signs are one."""
    env = {"NAME": "x", "EMPTY": ""}
    assert read_yaml(f"a: {text}", env, "c.yaml").tree == {"a": value}


def test_variables_stay_out_of_keys_and_comments() -> None:
    """Only values are replaced."""
    result = read_yaml("${NAME}: 1 # ${OTHER}\n", {}, "c.yaml")
    assert (result.tree, result.problems) == ({"${NAME}": 1}, [])


def test_what_a_variable_holds_is_not_replaced_again() -> None:
    """A password with a dollar sign stays one."""
    assert read_yaml("a: ${P}", {"P": "${Q}$$"}, "c.yaml").tree == {"a": "${Q}$$"}


def test_an_unset_variable_is_a_problem_naming_its_line() -> None:
    """The message says both ways out."""
    assert told("a:\n  b: ${TOKEN}\n") == [
        "c.yaml:2:6 a.b: ${TOKEN} is not set. Set TOKEN, or write ${TOKEN:-default}."
    ]


@pytest.mark.parametrize("text", ["${", "${A-B}", "${1}", "${}"])
def test_a_malformed_variable_is_a_problem(text: str) -> None:
    """It is told, not passed on as text."""
    (problem,) = told(f"a: '{text}'")
    assert "write ${NAME} or ${NAME:-default}" in problem


@pytest.mark.parametrize(
    ("text", "read"), [("1:30", "90"), ("017", "15"), ("1:30.5", "90.5"), ("12:30:45", "45045")]
)
def test_numbers_yaml_reads_strangely_are_warned_of(text: str, read: str) -> None:
    """YAML 1.1 knows base 60 and octal; users rarely do."""
    (warning,) = read_yaml(f"a: {text}", {}, "c.yaml").warnings
    assert str(warning).startswith(f"c.yaml:1:4 a: YAML reads {text} as {read}.")


@pytest.mark.parametrize("text", ["130", "0", "'1:30'", "0x10", "1.5", "10.0.0.1", "0.5"])
def test_plain_numbers_are_not_warned_of(text: str) -> None:
    """A warning for everything is a warning for nothing."""
    assert read_yaml(f"a: {text}", {}, "c.yaml").warnings == []


@pytest.mark.parametrize("text", ['a: "\\ud800"', '"\\ud800": 1'])
def test_halves_of_characters_are_problems(text: str) -> None:
    """Nothing could print or hash them later."""
    (problem,) = told(text)
    assert "not text" in problem


@settings(deadline=None)
@given(st.text() | st.text(alphabet="ab:-[]{}&*!<>|'\"#,?$ \n\t0"))
def test_any_text_is_read_or_complained_of(text: str) -> None:
    """No text raises."""
    for problem in read_yaml(text, {}, "c.yaml").problems:
        assert problem.line
        assert problem.column
