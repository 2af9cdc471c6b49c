import pytest
from pydantic import SecretStr

from balancer.config.blocks import BackendAuthBlock
from balancer.config.layers import Layers, lay
from balancer.config.problems import Path
from balancer.config.sources import Sources

PATH: Path = ("backends", 0, "auth")
TEXT = "backends:\n- url: gpu1\n  auth: {type: bearer, token_file: /t}\n"


def sources(
    content: str | Exception = "", refused: set[Path] | None = None
) -> tuple[Sources, Layers]:
    """Return sources over one file, and the layers that hear complaints."""

    def read_file(path: str) -> str:
        assert path == "/t"
        if isinstance(content, Exception):
            raise content
        return content

    layers = lay(TEXT, {}, "c.yaml", {})
    return Sources(layers, refused or set(), read_file), layers


def bearer(**more: object) -> BackendAuthBlock:
    """Return a block with a token in place or in a file."""
    return BackendAuthBlock.model_validate({"type": "bearer"} | more)


def test_a_secret_in_place_needs_no_file() -> None:
    """What is written is taken as it is."""
    block = bearer(token="abc")
    assert isinstance(block.token, SecretStr)
    assert sources(OSError())[0].secret(PATH, "token", block) == "abc"


def test_a_secret_from_a_file_loses_its_line_break() -> None:
    """Editors and echo put one at the end."""
    assert sources("abc\n")[0].secret(PATH, "token", bearer(token_file="/t")) == "abc"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            FileNotFoundError(2, "No such file or directory"),
            'cannot read "/t": No such file or directory.',
        ),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), 'cannot read "/t": not a text file.'),
        ("\n", '"/t" does not hold one line of text.'),
        ("abc\ndef", '"/t" does not hold one line of text.'),
    ],
)
def test_a_bad_file_is_a_complaint_at_its_key(content: str | Exception, message: str) -> None:
    """Named are the key, the file and the reason, not the content."""
    source, layers = sources(content)
    assert source.secret(PATH, "token", bearer(token_file="/t")) is None
    assert [str(p) for p in layers.problems] == [
        f"c.yaml:3:36 backends[0].auth.token_file: {message}"
    ]


def test_items_leave_out_what_was_refused() -> None:
    """The valid blocks keep the numbers they have in the file."""
    source, _ = sources(refused={("backends", 1), ("backends", 2, "slots")})
    items = source.items("backends")
    assert [next(items) for _ in range(3)] == [("backends", n) for n in (0, 2, 3)]


def test_a_refused_part_marks_what_encloses_it() -> None:
    """A check that depends on the whole can hold back."""
    source, _ = sources(refused={("auth", "keys", 0)})
    assert source.was_refused("auth")
    assert not source.was_refused("auth", "anonymous")


def test_warnings_can_have_a_place() -> None:
    """They read like problems where they concern one value."""
    source, layers = sources()
    source.warn("of all.")
    source.warn("of this.", PATH)
    assert layers.warnings == ["of all.", "c.yaml:3:9 backends[0].auth: of this."]
