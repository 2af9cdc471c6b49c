import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from balancer.config import KeepAlive, NumCtx, load, to_yaml
from balancer.config.settings import ModelOverride

Faults = Callable[..., list[str]]

REFUSING = (
    "Refusing to listen on {} without an API key: anyone on the network could use your models. "
    "Set BALANCER_API_KEY, or open it to your network: auth.anonymous: [192.168.1.0/24] — "
    "or accept the risk: --insecure-no-auth (= auth.anonymous: always)."
)


@pytest.mark.parametrize("listen", ["0.0.0.0:11435", ":11435", "[::]:11435", "192.168.1.5:11435"])
def test_an_open_listener_needs_a_key(faults: Faults, listen: str) -> None:
    """Nobody shares his models with the network by accident."""
    assert faults("", overrides={"server.listen": [listen]}) == [
        f"command line server.listen: {REFUSING.format(listen)}"
    ]


def test_each_open_listener_is_told(faults: Faults) -> None:
    """The place is where it is written."""
    assert len(faults("server: {listen: ['127.0.0.1:1', ':2', ':3']}")) == 2


@pytest.mark.parametrize("word", ["never", "loopback", "127.0.0.0/8"])
def test_naming_only_this_machine_opens_nothing(faults: Faults, word: str) -> None:
    """Such a listener would serve nobody beyond; it cannot be meant."""
    (told,) = faults("server: {listen: ':1'}", {"BALANCER_AUTH__ANONYMOUS": word})
    assert "Refusing to listen on :1" in told


@pytest.mark.parametrize(
    ("env", "flags"),
    [
        ({"BALANCER_API_KEY": "k" * 32}, {}),
        ({"BALANCER_AUTH__ANONYMOUS": "192.168.1.0/24"}, {}),
        ({}, {"auth.anonymous": "always"}),
        ({}, {"auth.keys_file": "/k"}),
        ({}, {"server.listen": "unix:/run/b.sock"}),
        ({}, {"server.listen": ["127.0.0.1:1", "localhost:2", "[::1]:3"]}),
    ],
)
def test_a_key_or_a_word_opens_the_listener(
    faults: Faults, env: dict[str, str], flags: dict[str, Any]
) -> None:
    """A key, named networks, the accepted risk; and what is local needs none of them."""
    assert faults("", env, overrides={"server.listen": ":1"} | flags, read_file=lambda _: "") == []


@pytest.mark.parametrize(
    ("file", "listen", "warned"),
    [
        ("# none yet\n", ":1", True),
        ("# none yet\n", "127.0.0.1:1", False),
        (f"web user {'k' * 32}", ":1", False),
    ],
)
def test_an_empty_keys_file_lets_nobody_in(file: str, listen: str, *, warned: bool) -> None:
    """That is safe, and yet hardly meant by who listens for others."""
    text = f"server: {{listen: '{listen}'}}\nauth: {{keys_file: /k}}"
    config = load(text, {}, read_file=lambda _: file)
    told = [w for w in config.warnings if "auth.keys_file: holds no key yet" in w]
    assert bool(told) is warned


def test_a_bad_key_does_not_count_as_none(faults: Faults) -> None:
    """One fault is told once: with the key mended there is a key."""
    text = "server: {listen: ':1'}\nauth: {keys: [{name: a, kee: x}]}\n"
    told = faults(text)
    assert all("auth.keys[0]" in fault for fault in told)


@pytest.mark.parametrize(
    ("anonymous", "role", "warned"),
    [
        ("192.168.1.0/24", "user", True),
        ("never", "user", True),
        ("never", "admin", False),
        ("192.168.1.0/24, 127.0.0.1", "user", False),
        ("always", "user", False),
    ],
)
def test_a_balancer_nobody_may_steer_is_warned_of(
    anonymous: str, role: str, *, warned: bool
) -> None:
    """A list of networks leaves out this machine unless it says so."""
    text = f"auth: {{keys: [{{name: a, key: {'k' * 32}, role: {role}}}]}}"
    config = load(text, {"BALANCER_AUTH__ANONYMOUS": anonymous})
    assert any("nobody has the role admin" in warning for warning in config.warnings) is warned


@pytest.mark.parametrize(
    ("text", "section", "field", "value"),
    [
        ("server: {max_body: 1KiB}", "server", "max_body_bytes", 1024),
        ("server: {replay_memory: 1KB}", "server", "replay_memory_bytes", 1000),
        ("server: {max_header: 9}", "server", "max_header_bytes", 9),
        ("server: {head_timeout: 1m}", "server", "head_timeout_s", 60.0),
        ("server: {drain_timeout: 0}", "server", "drain_timeout_s", 0.0),
        ("server: {allowed_hosts: [A.b]}", "server", "allowed_hosts", ("a.b",)),
        ("admin: {allowed_hosts: []}", "admin", "allowed_hosts", ()),
        ("health: {fall: 9}", "health", "fall", 9),
        ("health: {loaded_interval: 1m}", "health", "loaded_interval_s", 60.0),
        ("retry: {budget: 50%}", "retry", "budget_ratio", 0.5),
        ("queue: {max_wait: 0}", "queue", "max_wait_s", 0.0),
        ("routing: {strategy: warm-first}", "routing", "strategy", "warm-first"),
        ("models: {remember: 1d}", "models", "remember_s", 86400.0),
        ("timeouts: {first_byte: -1}", "timeouts", "first_byte_s", None),
        ("streaming: {heartbeat: 5s}", "streaming", "heartbeat_s", 5.0),
        ("streaming: {heartbeat_after: -1}", "streaming", "heartbeat_after_s", None),
        ("streaming: {heartbeat_after: null}", "streaming", "heartbeat_after_s", None),
        ("logging: {slow: null}", "logging", "slow_s", None),
        ("logging: {client_ip: none}", "logging", "client_ip", "none"),
        ("metrics: {enabled: no}", "metrics", "enabled", False),
        ("systemd: {watchdog: never}", "systemd", "watchdog", "never"),
        ("dashboard: {enabled: no}", "dashboard", "enabled", False),
        ("demo: {enabled: yes}", "demo", "enabled", True),
    ],
)
def test_each_setting_arrives_in_its_unit(
    text: str, section: str, field: str, value: object
) -> None:
    """Seconds are floats, sizes are bytes, no limit is None, and nothing else changes."""
    config = load(text, {})
    assert getattr(getattr(config, section), field) == value
    defaults = load("", {})
    same = dataclasses.replace(
        getattr(config, section), **{field: getattr(getattr(defaults, section), field)}
    )
    assert same == getattr(defaults, section)


def test_breakers_have_limits_of_their_own() -> None:
    """Changing one leaves the other's defaults, which differ."""
    config = load("breaker: {model: {in_a_row: 7}}", {})
    assert (config.breaker.host.in_a_row, config.breaker.host.backoff_s) == (3, 1.0)
    assert (config.breaker.model.in_a_row, config.breaker.model.backoff_s) == (7, 10.0)
    assert config.breaker.model.backoff_max_s == 600.0


def test_a_backoff_cannot_exceed_its_ceiling(faults: Faults) -> None:
    """The two are compared with the defaults filled in."""
    assert faults("breaker: {host: {backoff: 2m}}") == [
        "config.yaml:1:17 breaker.host: backoff is longer than backoff_max."
    ]


@pytest.mark.parametrize("origin", ["*", "http://*", "https://*"])
def test_every_page_with_credentials_is_a_fault(faults: Faults, origin: str) -> None:
    """Any page could act as whoever visits it; named pages may."""
    (told,) = faults(f"cors: {{allow_credentials: true, allow_origins: ['{origin}']}}")
    assert f"cors: allow_credentials does not go with '{origin}'" in told
    named = load("cors: {allow_credentials: true, allow_origins: ['https://a.example']}", {})
    assert named.cors.allow_credentials


OVERRIDES = """
models:
  num_ctx: {policy: reuse, default: 8192}
  keep_alive: {policy: clamp, max: 30m}
  overrides:
    "qwen3*":
      num_ctx: {policy: pin, default: 32768}
    llama3.2:
      keep_alive:
        policy: passthrough
    m:
"""


def test_rules_about_contexts_arrive() -> None:
    """Those for all, and those for some in the order written; what is left out is None there."""
    models = load(OVERRIDES, {}).models
    assert models.num_ctx == NumCtx("reuse", 8192, None)
    assert models.keep_alive == KeepAlive("clamp", 1800.0)
    assert models.overrides == (
        ("qwen3*", ModelOverride(NumCtx("pin", 32768, None), None)),
        ("llama3.2", ModelOverride(None, KeepAlive("passthrough", None))),
        ("m", ModelOverride(None, None)),
    )


def test_rules_about_contexts_can_be_written_out_again() -> None:
    """What `config show` prints is the same configuration."""
    config = load(OVERRIDES, {})
    assert load(to_yaml(config), {}) == config
    assert config.origins["models.overrides.qwen3*.num_ctx.default"] == "file:7"


def test_rules_about_contexts_from_the_environment() -> None:
    """Each but for the overrides."""
    env = {"BALANCER_MODELS__NUM_CTX__POLICY": "pin", "BALANCER_MODELS__NUM_CTX__DEFAULT": "4096"}
    assert load("", env).models.num_ctx == NumCtx("pin", 4096, None)


@pytest.mark.parametrize(
    ("strategy", "warned"), [("plan", []), ("least-loaded", ["models.pin", "queue.fair_by"])]
)
def test_what_only_the_plan_heeds_is_told(strategy: str, warned: list[str]) -> None:
    """Whoever pins a model with another strategy would wait for it in vain."""
    text = f"routing: {{strategy: {strategy}}}\nmodels: {{pin: [m]}}\nqueue: {{fair_by: user}}"
    told = [w for w in load(text, {}).warnings if f"with routing.strategy: {strategy}" in w]
    assert len(told) == len(warned)
    assert all(path in line for path, line in zip(warned, told, strict=True))
    assert ["has no effect" in line for line in told] == [True, False][: len(told)]
    plain = load(f"routing: {{strategy: {strategy}}}", {}).warnings
    assert not any("with routing.strategy" in line for line in plain)


@pytest.mark.parametrize(
    ("num_ctx", "text"),
    [
        ("policy: pin", "policy pin needs default: the context that every call gets."),
        ("policy: clamp", "policy clamp needs max: the most that a call may ask for."),
        ("default: 4096", "default does not belong to policy passthrough, but to the others."),
        ("policy: reuse, max: 900", "max does not belong to policy reuse, but to clamp."),
        ("policy: pin, default: 900, max: 900", "max does not belong to policy pin, but to clamp."),
        ("policy: clamp, default: 900, max: 800", "default is more than max."),
    ],
)
@pytest.mark.parametrize("under", ["", "overrides: {m: {"])
def test_a_context_rule_that_makes_no_sense(
    faults: Faults, num_ctx: str, text: str, under: str
) -> None:
    """Told when the file is read, where it stands, for all models as for some."""
    path = "models.overrides.m.num_ctx" if under else "models.num_ctx"
    (fault,) = faults(f"models: {{{under}num_ctx: {{{num_ctx}}}{'}}' if under else ''}}}")
    assert fault.endswith(f"{path}: {text}")


@pytest.mark.parametrize(
    ("models", "text"),
    [
        ("num_ctx: {policy: pine}", 'models.num_ctx.policy: "pine" is not one of passthrough'),
        ("num_ctx: {policy: pin, default: 0}", "is not a whole number of at least 256."),
        ("num_ctx: {policy: pin, default: 32}", "32 is not a context: it counts tokens. 32k is"),
        ("num_ctx: {policy: clamp, max: 128}", "128 is not a context: it counts tokens."),
        ("num_ctx: 4096", "models.num_ctx: needs a block of keys."),
        ("keep_alive: {policy: clamp}", "policy clamp needs max: the longest"),
        ("keep_alive: {max: 5m}", "max does not belong to policy passthrough, but to clamp."),
        ("keep_alive: {policy: clamp, max: 0}", "must be more than 0."),
        ("keep_alive: {policy: clamp, max: -1}", "out of range"),
        ("overrides: [m]", "models.overrides: needs a block of names"),
        ('overrides: {"": {}}', "models.overrides: is empty."),
        ("overrides: {m: 5}", "models.overrides.m: needs a block of keys."),
        ("overrides: {m: {numctx: {}}}", 'unknown key. Did you mean "num_ctx"?'),
        ("overrides: {m: {num_ctx: {x: 1}}}", "unknown key. Known here: policy, default, max."),
    ],
)
def test_what_is_no_rule_about_contexts(faults: Faults, models: str, text: str) -> None:
    """One fault, where it stands, with advice."""
    (fault,) = faults(f"models: {{{models}}}")
    assert text in fault


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("queue: {fair_by: keys}", '"keys" is not one of key, user, client_ip, session, none.'),
        ("queue: {priorities: {batch: 50}}", "batch needs a number below 50, interactive one"),
        ("queue: {priorities: {interactive: 49}}", "batch needs a number below 50, interactive"),
        ("queue: {priorities: {batch: -1}}", "is not a whole number of at least 0"),
        ("queue: {adaptive: maybe}", '"maybe" is not true or false.'),
        ("limits: {rpm: 0}", "0 is not a whole number of at least 1."),
        ("limits: {slots: -1}", "-1 is not a whole number of at least 1."),
        ("routing: {affinity: {ttl: 0}}", "must be more than 0"),
        ("routing: {affinity: {keys: [header]}}", '"header" is not prefix, header:NAME or body'),
        ("routing: {affinity: {keys: ['header:a b']}}", "is not prefix, header:NAME or body:FIEL"),
        ("routing: {affinity: {keys: ['body:a.b']}}", "is not prefix, header:NAME or body:FIELD"),
        ("auth: {user_header: 'a b'}", "is not a header name."),
    ],
)
def test_what_is_no_rule_about_callers(faults: Faults, text: str, wrong: str) -> None:
    """One fault, where it stands, with advice."""
    (told,) = faults(text)
    assert wrong in told


def test_limits_and_shares_are_built() -> None:
    """As they are written, in our units."""
    config = load(
        "limits: {rpm: 9, slots: 2}\n"
        "queue: {fair_by: session, priorities: {batch: 1}, adaptive: no}\n"
        "routing: {affinity: {ttl: 1m, keys: 'body:thread, prefix'}}\n"
        "auth: {user_header: X-User}",
        {},
    )
    assert (config.limits.rpm, config.limits.slots, config.limits.tokens_per_minute) == (9, 2, None)
    assert (config.queue.fair_by, config.queue.adaptive) == ("session", False)
    assert (config.queue.priorities.interactive, config.queue.priorities.batch) == (100, 1)
    assert config.routing.affinity.keys == ("body:thread", "prefix")
    assert config.routing.affinity.ttl_s == 60.0
    assert config.auth.user_header == "X-User"
