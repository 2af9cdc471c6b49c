from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.config import ConfigError, find_file, listening, load
from balancer.config.blocks import BackendBlock, leaf_paths

Faults = Callable[..., list[str]]

FAULTY = """\
version: 1
timeouts:
  load: "15 secs"
  load: 3m
backends:
- name: gpu0
  url: http://127.0.0.1:11440
  slotz: 4
- name: gpu0
  url: localhost:11440
- name: on
  url: http://user:hunter2@gpu1
- url: ${GPU}
- slots: 4
logging: {level: inf}
auth:
  keys:
  - {name: a, key: 12345}
server: 5
nope: 1
"""


def test_all_problems_come_in_one_run(faults: Faults) -> None:
    """Syntax of values, unknown and missing keys, duplicates, across file, variables and flags."""
    told = faults(FAULTY, {"BALANCER_RETRY__BUDGET": "20"}, overrides={"queue.max_depth": "x"})
    assert told == [
        (
            'config.yaml:3:9 timeouts.load: "15 secs" is not a duration. '
            "Write 15s, 2m, 1h30m, or a number of seconds."
        ),
        "config.yaml:4:3 timeouts.load: duplicate key (first at line 3).",
        'config.yaml:8:3 backends[0].slotz: unknown key. Did you mean "slots"?',
        "config.yaml:9:3 backends: duplicate url http://localhost:11440 (first at line 6).",
        'config.yaml:9:3 backends: duplicate name "gpu0" (first at line 6).',
        (
            "config.yaml:11:9 backends[2].name: needs text. Put the value in quotes. "
            "YAML reads on as true."
        ),
        (
            "config.yaml:12:8 backends[2].url: an address must not contain a user name or "
            'password. Write them into the backend\'s "auth" block instead.'
        ),
        "config.yaml:13:8 backends[3].url: ${GPU} is not set. Set GPU, or write ${GPU:-default}.",
        "config.yaml:14:3 backends[4].url: is needed.",
        (
            'config.yaml:15:18 logging.level: "inf" is not one of debug, info, warning, error. '
            'Did you mean "info"?'
        ),
        "config.yaml:18:20 auth.keys[0].key: needs text. Put the value in quotes.",
        "config.yaml:19:9 server: needs a block of keys.",
        (
            "config.yaml:20:1 nope: unknown key. Known here: version, server, admin, auth, "
            "cors, backends, discovery, health, breaker, retry, queue, routing, models, manage, "
            "timeouts, "
            "streaming, limits, logging, metrics, systemd, state, dashboard, demo."
        ),
        'BALANCER_RETRY__BUDGET retry.budget: "20" is not a share. Write 20% or 0.2.',
        'command line queue.max_depth: "x" is not a whole number of at least 0.',
    ]


def test_the_source_is_named_as_told(faults: Faults) -> None:
    """Messages use the name the user gave."""
    (told,) = faults("nope: 1", source="/etc/x.yaml")
    assert told.startswith("/etc/x.yaml:1:1 nope")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("backends: 5", "backends: needs a list."),
        ("backends: [[]]", "backends[0]: needs a block of keys."),
        ("backends: {url: x}", "backends: needs a list."),
        ("health: [a]", "health: needs a block of keys."),
        ("auth: {keys: x}", "auth.keys: needs a list."),
        ("version: 2", "version: 2 is not a version this release reads. Write 1."),
        ("version: yes", "version: true is not a version this release reads. Write 1."),
        ("admin: {listen: ':1'}", "admin.listen: only null"),
        ("timeouts: {load: null}", "timeouts.load: null is not a duration."),
        ("server: {listen: []}", "server.listen: needs at least one address."),
    ],
)
def test_wrong_shapes_are_told_in_plain_words(faults: Faults, text: str, message: str) -> None:
    """No term of the validating library reaches the user."""
    (told,) = faults(text)
    assert message in told


def test_a_key_of_a_later_feature_is_unknown(faults: Faults) -> None:
    """It is refused, not ignored."""
    assert len(faults("tracing: {}\nserver: {tls: {}}\nbackends: [{url: a, labels: {}}]")) == 3


def test_flags_are_paths_of_settings(faults: Faults) -> None:
    """A wrong one is found like a wrong key."""
    assert faults("", overrides={"timeouts.laod": 1}) == [
        'command line timeouts.laod: unknown key. Did you mean "load"?'
    ]


def test_traps_of_yaml_are_warned_of() -> None:
    """The value is used; that it is an odd one is said."""
    config = load("timeouts: {load: 1:30}", {})
    assert config.timeouts.load_s == 90
    assert config.warnings == (
        "config.yaml:1:18 timeouts.load: YAML reads 1:30 as 90. Write the number, or use quotes.",
    )


def test_words_for_booleans_are_no_trap_where_one_is_wanted() -> None:
    """`yes` means yes."""
    config = load("demo: {enabled: yes}", {})
    assert (config.demo.enabled, config.warnings) == (True, ())


def test_variables_in_the_text_come_from_the_environment_given() -> None:
    """Nothing else is asked."""
    config = load("backends: ['${HOST}:${PORT:-1}']", {"HOST": "gpu1"})
    assert config.backends[0].url == "http://gpu1:1"


def test_loading_twice_gives_the_same() -> None:
    """A reload without a change is none."""
    text = "backends: [a, {url: b, auth: {type: bearer, token: x}}]"
    assert load(text, {}) == load(text, {})


def test_files_are_read_from_disk_by_default(tmp_path: Path) -> None:
    """The one impure part can be replaced, and need not be."""
    token = tmp_path / "token"
    token.write_text("abc\n", encoding="utf-8")
    text = f"backends: [{{url: a, auth: {{type: bearer, token_file: '{token}'}}}}]"
    assert load(text, {}).backends[0].auth_headers[0][1].reveal() == "Bearer abc"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


BACKEND_PATHS = set(leaf_paths(BackendBlock))


def nested(path: tuple[str, ...], value: object) -> object:
    """Return a tree with *value* at *path*."""
    for step in reversed(path):
        value = {step: value}
    return value


@settings(deadline=None)
@given(st.sampled_from(sorted(leaf_paths())), VALUES)
def test_any_value_of_any_key_loads_or_is_complained_of(
    path: tuple[str, ...], value: object
) -> None:
    """No file can crash the balancer at a reload."""
    text = yaml.safe_dump(nested(path, value))
    try:
        load(text, {})
    except ConfigError as refused:
        assert all(problem.message for problem in refused.problems)  # noqa: PT017 - one of two good ends


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(BACKEND_PATHS)), VALUES, max_size=4))
def test_any_backend_loads_or_is_complained_of(values: dict[tuple[str, ...], object]) -> None:
    """Several faults in one item, too, are found together."""
    item: dict[str, object] = {}
    for path, value in values.items():
        if len(path) == 1:
            item.setdefault(path[0], value)
        else:
            inner = item.setdefault(path[0], {})
            if isinstance(inner, dict):
                inner[path[1]] = value
    try:
        load(yaml.safe_dump({"backends": [item, "gpu1", item]}), {})
    except ConfigError as refused:
        assert refused.problems  # noqa: PT017 - one of two good ends


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("{url: a, auth: {type: baerer, token: x}}", "backends[0].auth.type"),
        ("{url: a, tls: {client_cert_file: 5, client_key_file: /k}}", "client_cert_file"),
        ("{url: a, slots: 0}", "backends[0].slots"),
    ],
)
def test_one_fault_makes_no_second(faults: Faults, text: str, first: str) -> None:
    """What was refused is neither missed elsewhere nor does it hide the next item's fault."""
    told = faults(f"backends:\n- {text}\n- {{name: b, url: a}}\n")
    assert len(told) == 2
    assert first in told[0]
    assert "duplicate url" in told[1]


@pytest.mark.parametrize("text", ["auth: {keys: [", "- auth", "0", "''"])
def test_an_unreadable_file_is_the_only_fault(faults: Faults, text: str) -> None:
    """The key that an open listener needs may stand in it; variables are still checked."""
    env = {"BALANCER_LISTEN": ":1", "BALANCER_DEMO": "perhaps"}
    file, variable = faults(text, env)
    assert file.startswith("config.yaml:1:")
    assert variable.startswith("BALANCER_DEMO demo.enabled")


def test_an_unset_file_name_is_one_fault(faults: Faults) -> None:
    """It is not looked for under the name of the variable as well."""
    (told,) = faults("auth: {keys_file: '${KEYS}'}")
    assert "${KEYS} is not set" in told


def test_a_bad_ceiling_is_not_compared(faults: Faults) -> None:
    """Only what can be read is held against the rest."""
    (told,) = faults("breaker: {host: {backoff: 2m, backoff_max: long}}")
    assert "breaker.host.backoff_max" in told


@settings(deadline=None)
@given(st.text(alphabet="backends:url- \n[]{}$&*'\"auth,kygpu1.", max_size=60))
def test_any_text_loads_or_is_complained_of(text: str) -> None:
    """Half-written files are read when they are watched."""
    try:
        load(text, {})
    except ConfigError as refused:
        assert refused.problems  # noqa: PT017 - one of two good ends


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["LISTEN", "BACKENDS", "API_KEY", "DEMO"]), st.text()))
def test_any_environment_loads_or_is_complained_of(values: dict[str, str]) -> None:
    """Variables are written by templates of others."""
    try:
        load("", {f"BALANCER_{name}": value for name, value in values.items()})
    except ConfigError as refused:
        assert refused.problems  # noqa: PT017 - one of two good ends


def exists_only(*names: str) -> Callable[[Path], bool]:
    """Pretend a disk."""
    return lambda path: str(path) in names


def test_a_named_file_is_taken_whether_it_exists_or_not() -> None:
    """Reading it then tells what is wrong; falling back would hide it."""
    assert find_file("x.yaml", {"BALANCER_CONFIG": "y.yaml"}, exists_only()) == Path("x.yaml")
    assert find_file(None, {"BALANCER_CONFIG": "y.yaml"}, exists_only()) == Path("y.yaml")


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, "ollama-balancer.yaml"),
        ({"XDG_CONFIG_HOME": "/x", "HOME": "/h"}, "/x/ollama-balancer/config.yaml"),
        ({"HOME": "/h"}, "/h/.config/ollama-balancer/config.yaml"),
        ({}, "/etc/ollama-balancer/config.yaml"),
    ],
)
def test_files_are_looked_for_in_the_usual_places(env: dict[str, str], place: str) -> None:
    """Here, the user's, the machine's."""
    assert find_file(None, env, exists_only(place)) == Path(place)


def test_the_nearest_file_wins() -> None:
    """A project can override the machine."""
    found = exists_only("ollama-balancer.yaml", "/etc/ollama-balancer/config.yaml")
    assert find_file(None, {}, found) == Path("ollama-balancer.yaml")
    assert find_file(None, {}, exists_only()) is None


def test_where_another_process_listens() -> None:
    """What only that process can read is no fault; what is written wrong is, each of it."""
    told = "server: {listen: ['127.0.0.1:4000', 'unix:/run/olb']}\n"
    away = "auth: {keys: [{name: a, key: '${NOT_OURS}'}], keys_file: /only/root}\n"
    assert list(map(str, listening(told + away, {}, source="f"))) == [
        "127.0.0.1:4000",
        "unix:/run/olb",
    ]
    with pytest.raises(ConfigError) as caught:
        listening(f"{told}{away}queue: {{max_wait: soon}}\nnonsense: 1\n", {}, source="f")
    assert [problem.path for problem in caught.value.problems] == ["queue.max_wait", "nonsense"]
    with pytest.raises(ConfigError):
        listening("server: {listen: '${NOT_OURS}'}", {}, source="f")
    env = {"BALANCER_LISTEN": ":4001"}
    assert [at.port for at in listening("server: {listen: 5}\nnonsense: 1", env, source="f")] == [
        4001
    ]
    with pytest.raises(ConfigError, match="BALANCER_LISTEN"):
        listening("", {"BALANCER_LISTEN": "nowhere:port"}, source="f")
