"""What `doctor` says of which facts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from balancer.cli.doctor_checks import CHECKS, Finding, Severity, judge, tiers
from balancer.cli.doctor_facts import Facts, Host, Installed, Loaded, Machine, Trouble
from balancer.config import Config, load

GIB = 1 << 30
CAN = frozenset({"completion"})
CLOSED = {"state": "closed", "reason": "", "retry_in_s": 0.0, "trips": 0}
OPEN = {"state": "open", "reason": "3 failures in a row", "retry_in_s": 12.0, "trips": 1}


PINNED = "{{backends: [gpu1, gpu2], models: {{pin: [{}]}}}}"
ALIASED = "{{backends: [gpu1, gpu2], models: {{aliases: {{{}}}}}}}"


def config(text: str = "backends: [gpu1, gpu2]", **env: str) -> Config:
    """A configuration."""
    return load(text, env)


def host(number: int, **changed: Any) -> Host:
    """A host that is well, with one model that both have and that is loaded."""
    well = Host(
        name=f"gpu{number}",
        url=f"http://gpu{number}:11434",
        addresses=frozenset({f"10.0.0.{number}"}),
        version="0.34.2",
        latency_s=0.01,
        ahead_s=0.4,
        models=(Installed("m:latest", "aa", f"2026-11-0{number}", CAN),),
        loaded=(Loaded("m:latest", 4 * GIB, 4 * GIB, 65536, 200.0, f"at {number}"),),
    )
    return replace(well, **changed)


def status(**backend: Any) -> dict[str, Any]:
    """A status document with both hosts; *backend* changes the first."""
    both: list[dict[str, Any]] = [
        {
            "name": f"gpu{number}",
            "url": f"http://gpu{number}:11434",
            "up": True,
            "switch": "active",
            "breaker": CLOSED,
            "trouble": "",
            "models": [{"name": "m:latest", "breaker": CLOSED}],
        }
        for number in (1, 2)
    ]
    both[0].update(backend)
    queue = {"depth": 0, "oldest_s": 0.0, "per_model": {}}
    return {"config": {"file": None, "rejected": []}, "queue": queue, "backends": both}


@dataclass(frozen=True, slots=True)
class Case(Facts):
    """Facts of which the configuration may be written behind them."""

    def __or__(self, text: str) -> Case:
        """With these lines in the configuration."""
        return replace(self, config=config(f"backends: [gpu1, gpu2]\n{text}"))


def healthy(**changed: Any) -> Case:
    """Nothing is wrong; then *changed*."""
    well = Case(hosts=(host(1), host(2)), config=config(), status=status())
    return replace(well, **changed)


def with_host(**changed: Any) -> Case:
    """Nothing is wrong but with the first host."""
    return healthy(hosts=(host(1, **changed), host(2)), status=None)


SHORT = healthy(
    hosts=(host(1, loaded=(Loaded("m:latest", context=4096),)), host(2, loaded=())), status=None
)


def only(facts: Facts) -> Finding:
    """The one finding there is."""
    (finding,) = judge(facts)
    assert finding.where
    assert finding.why
    assert finding.next
    assert finding.what.endswith((".", ")"))
    return finding


def test_a_healthy_fleet_has_no_findings() -> None:
    """With a running balancer and without one."""
    assert judge(healthy()) == judge(healthy(status=None)) == []


def test_checks_have_purposes_and_come_once() -> None:
    """Each in its docstring."""
    assert len(set(CHECKS)) == len(CHECKS)
    assert all(check.__doc__ for check in CHECKS)


def test_the_most_serious_comes_first() -> None:
    """Whatever order the checks are in."""
    sick = host(1, version="0.9.0", loaded=(Loaded("m:latest", context=65536, left_s=1e12),))
    facts = healthy(hosts=(sick, host(2), host(3, trouble=Trouble.SILENT)), status=None)
    severities = [finding.severity for finding in judge(facts)]
    assert severities == sorted(severities)
    assert set(severities) == set(Severity)


def test_a_finding_for_scripts_has_its_severity_as_a_word() -> None:
    """Numbers would say nothing."""
    told = only(with_host(latency_s=3.0)).document()
    assert set(told) == {"id", "severity", "where", "what", "why", "next"}
    assert (told["id"], told["severity"]) == ("host-slow", "warning")


@pytest.mark.parametrize(
    ("trouble", "changed", "id_", "words"),
    [
        (Trouble.NAME, {}, "host-name", "getent hosts gpu1"),
        (Trouble.REFUSED, {"url": "http://gpu1:80"}, "host-port-80", "gpu1:11434"),
        (Trouble.STRANGER, {"url": "http://gpu1"}, "host-port-80", "gpu1:11434"),
        (Trouble.REFUSED, {"is_here": True, "on_loopback": True}, "host-loopback", "OLLAMA_HOST=0"),
        (Trouble.REFUSED, {"url": "http://127.0.0.1:11434"}, "host-refused", "ollama serve"),
        (Trouble.REFUSED, {}, "host-refused", "on gpu1: sudo systemctl edit ollama"),
        (Trouble.TIMEOUT, {}, "host-timeout", "ping"),
        (Trouble.NO_ROUTE, {}, "host-no-route", "ip route get gpu1"),
        (Trouble.TLS, {}, "host-tls", "openssl s_client -connect gpu1:11434"),
        (Trouble.SILENT, {}, "host-silent", "curl"),
        (Trouble.CREDENTIAL, {}, "host-credential", '"auth"'),
        (Trouble.GARBLED, {}, "host-stranger", "curl -i http://gpu1:11434/api/version"),
        (Trouble.STRANGER, {}, "host-stranger", "curl -i"),
    ],
)
def test_a_host_that_does_not_answer(
    trouble: Trouble, changed: dict[str, Any], id_: str, words: str
) -> None:
    """An error, with the likely reason and what to try."""
    finding = only(with_host(trouble=trouble, told="so it said", **changed))
    assert (finding.id, finding.severity, finding.what) == (id_, Severity.ERROR, "So it said.")
    assert words in finding.next


def test_every_trouble_has_a_reason() -> None:
    """None ends in a traceback."""
    for trouble in Trouble:
        assert only(with_host(trouble=trouble, told="x")).severity is Severity.ERROR


def test_a_host_that_only_the_balancer_reaches_is_no_error() -> None:
    """`doctor` may run elsewhere."""
    facts = healthy(hosts=(host(1, trouble=Trouble.TIMEOUT, told="x"), host(2)))
    assert (only(facts).id, only(facts).severity) == ("host-elsewhere", Severity.INFO)


@pytest.mark.parametrize(
    ("facts", "id_", "severity", "words"),
    [
        # configuration
        (
            Facts(problems=("a.yaml:1:1 backnds: unknown key.",), file="a.yaml"),
            "config-invalid",
            Severity.ERROR,
            "ollama-balancer check a.yaml",
        ),
        (Facts(config=config("")), "no-hosts", Severity.ERROR, "init -b HOST"),
        (
            healthy(
                config=config(
                    "{server: {listen: ['0.0.0.0:11435']}, auth: {anonymous: always}, "
                    "backends: [gpu1, gpu2]}"
                )
            ),
            "exposed",
            Severity.WARNING,
            "BALANCER_API_KEY",
        ),
        (
            healthy(config=config("backends: [gpu1, gpu2, gpu9]")),
            "not-reloaded",
            Severity.WARNING,
            "ollama-balancer reload",
        ),
        # hosts
        (
            with_host(is_balancer=True, models=(), url="http://127.0.0.1:11435"),
            "loop",
            Severity.ERROR,
            "http://127.0.0.1:11435",
        ),
        (with_host(is_balancer=True, models=()), "chain", Severity.WARNING, "behind it"),
        (
            with_host(addresses=frozenset({"10.0.0.2"})),
            "duplicate-host",
            Severity.WARNING,
            "http://gpu2:11434",
        ),
        (
            with_host(models=host(2).models, loaded=host(2).loaded),
            "duplicate-suspicion",
            Severity.INFO,
            "take",
        ),
        (
            healthy(hosts=(host(1, version="0.9.6"), host(2, version="0.9.6"))),
            "version-old",
            Severity.WARNING,
            "install.sh",
        ),
        (
            healthy(hosts=(host(1, version="0.13.5"), host(2, version="0.0.0"))),
            "version-old",
            Severity.INFO,
            "install.sh",
        ),
        (with_host(version="0.33.0"), "version-skew", Severity.WARNING, "update Ollama on gpu1"),
        (with_host(ahead_s=-95.0), "clock-skew", Severity.WARNING, "timedatectl"),
        (with_host(latency_s=2.0), "host-slow", Severity.WARNING, "ping"),
        # models
        (
            healthy(hosts=(host(1), host(2), host(3, models=(), loaded=()))),
            "host-empty",
            Severity.WARNING,
            "OLLAMA_HOST=http://gpu3:11434 ollama pull",
        ),
        (
            healthy(
                hosts=(host(1), host(2), host(3, models=(Installed("m:latest", "bb", "x", CAN),)))
            ),
            "digest-conflict",
            Severity.WARNING,
            "OLLAMA_HOST=http://gpu3:11434 ollama pull m:latest",
        ),
        (
            healthy(
                config=config(ALIASED.format("M: 'n:1'")),
                hosts=tuple(
                    host(k, models=(*host(k).models, Installed("n:1", "cc"))) for k in (1, 2)
                ),
            ),
            "alias-hides-model",
            Severity.WARNING,
            "config show --origin",
        ),
        (
            healthy(config=config(ALIASED.format("fast: [x, y:1]"))),
            "alias-of-nothing",
            Severity.WARNING,
            "OLLAMA_HOST=http://gpu1:11434 ollama pull x",
        ),
        (
            with_host(models=(*host(1).models, Installed("rare:latest", "cc"))),
            "no-failover",
            Severity.INFO,
            "OLLAMA_HOST=http://gpu2:11434 ollama pull rare:latest",
        ),
        (
            with_host(models=(Installed("m:latest", "aa", "x", frozenset({"tools"})),)),
            "capability-drift",
            Severity.INFO,
            "one version",
        ),
        # loaded
        (
            with_host(loaded=(Loaded("m:latest", 4 * GIB, 0, 65536),)),
            "cpu-fallback",
            Severity.WARNING,
            "ollama ps",
        ),
        (
            with_host(loaded=(Loaded("m:latest", 4 * GIB, GIB, 65536),)),
            "cpu-fallback",
            Severity.WARNING,
            "on gpu1",
        ),
        (
            with_host(loaded=(Loaded("m:latest", context=4096),)),
            "context-drift",
            Severity.WARNING,
            "OLLAMA_CONTEXT_LENGTH",
        ),
        (
            healthy(
                hosts=(host(1, loaded=(Loaded("m:latest", context=4096),)), host(2, loaded=()))
            ),
            "context-short",
            Severity.INFO,
            "OLLAMA_CONTEXT_LENGTH",
        ),
        (
            healthy(config=config(PINNED.format("{model: m, backends: [gpu1, gpu9]}"))),
            "pin-unknown",
            Severity.WARNING,
            "backends list",
        ),
        (
            healthy(config=config(PINNED.format("{model: n, backends: [gpu2]}"))),
            "pin-of-nothing",
            Severity.WARNING,
            "OLLAMA_HOST=http://gpu2:11434 ollama pull n",
        ),
        (
            healthy(config=config(PINNED.format("n"))),
            "pin-of-nothing",
            Severity.WARNING,
            "OLLAMA_HOST=http://gpu1:11434 ollama pull n",
        ),
        (
            with_host(loaded=(Loaded("m:latest", context=65536, left_s=9e9),)),
            "pinned",
            Severity.INFO,
            "ollama stop m:latest",
        ),
        # the running balancer
        (
            healthy(status=status() | {"config": {"file": "x", "rejected": ["line 1"]}}),
            "reload-rejected",
            Severity.ERROR,
            "ollama-balancer check",
        ),
        (healthy(status=status(switch="draining")), "switched-off", Severity.INFO, "status"),
        (healthy(status=status(breaker=OPEN)), "breaker-open", Severity.WARNING, "status"),
        (
            healthy(status=status(models=[{"name": "m:latest", "breaker": OPEN}])),
            "breaker-open",
            Severity.WARNING,
            "ollama run m:latest",
        ),
        (
            healthy(status=status(trouble="answers 401.")),
            "host-trouble",
            Severity.WARNING,
            "status",
        ),
        (
            healthy(status=status() | {"queue": {"depth": 3}}),
            "slots-unset",
            Severity.INFO,
            "slots: N",
        ),
        # this machine
        (
            healthy(
                status=None, machine=Machine(occupants={"127.0.0.1:11435": "an Ollama server"})
            ),
            "port-taken",
            Severity.ERROR,
            "sport = :11435",
        ),
        (
            healthy(status=None, admin="http://x:1", refusal="It refused (401)."),
            "no-admin",
            Severity.WARNING,
            "BALANCER_API_KEY",
        ),
        (healthy(machine=Machine(open_files=1024)), "file-limit", Severity.WARNING, "LimitNOFILE"),
        (
            healthy(machine=Machine(env={"HTTP_PROXY": "http://p:1", "NO_PROXY": "corp"})),
            "proxy-variables",
            Severity.WARNING,
            "NO_PROXY",
        ),
        (
            healthy(machine=Machine(env={"OLLAMA_HOST": "localhost:11435"})),
            "ollama-host",
            Severity.INFO,
            "env -u OLLAMA_HOST",
        ),
        (
            healthy(machine=Machine(env={"OLLAMA_HOST": "ftp://x"})),
            "ollama-host",
            Severity.WARNING,
            "unset",
        ),
        (
            healthy(machine=Machine(unit="[Service]\nType=exec\n")),
            "systemd-watchdog",
            Severity.INFO,
            "WatchdogSec",
        ),
        (healthy(machine=Machine(python=(3, 10))), "python-old", Severity.ERROR, "python3"),
    ],
)
def test_what_is_found(facts: Facts, id_: str, severity: Severity, words: str) -> None:
    """One fault, one finding, and what to do about it."""
    found = {finding.id: finding for finding in judge(facts)}
    assert set(found) == {id_}
    assert found[id_].severity is severity
    assert words in found[id_].next
    assert not found[id_].what.startswith(found[id_].where or "?"), "said twice"


@pytest.mark.parametrize(
    "facts",
    [
        pytest.param(
            healthy(config=load("", {}, overrides={"backends": ["gpu1", "gpu9"]})),
            id="a host of the command line is no matter of the running balancer",
        ),
        pytest.param(with_host(ahead_s=None), id="no clock told"),
        pytest.param(with_host(ahead_s=-20.0), id="clocks differ a little"),
        pytest.param(with_host(version="0.34.2-rc1"), id="a release candidate"),
        pytest.param(
            healthy(machine=Machine(env={"HTTPS_PROXY": "http://p:1"})), id="calls are not https"
        ),
        pytest.param(
            healthy(machine=Machine(env={"http_proxy": "http://p:1", "no_proxy": "a, 127.0.0.1"})),
            id="loopback is spared",
        ),
        pytest.param(
            healthy(machine=Machine(env={"OLLAMA_HOST": "gpu1"})), id="OLLAMA_HOST is elsewhere"
        ),
        pytest.param(
            healthy(machine=Machine(unit="[Service]\nWatchdogSec=30s\n")), id="watchdog is set"
        ),
        pytest.param(healthy(machine=Machine(open_files=65536)), id="files enough"),
        pytest.param(
            with_host(loaded=(Loaded("m:latest", 0, 0, 65536),)), id="a host that tells no sizes"
        ),
        pytest.param(
            healthy(
                hosts=(
                    host(1, url="http://box:11440", addresses=frozenset({"10.0.0.1"})),
                    host(
                        2,
                        url="http://box:11441",
                        addresses=frozenset({"10.0.0.1"}),
                        models=host(1).models,
                        loaded=(),
                    ),
                ),
                status=None,
            ),
            id="two of one machine share their models",
        ),
        pytest.param(
            healthy(
                hosts=(host(1, loaded=()), host(2, models=host(1).models, loaded=())), status=None
            ),
            id="one model of one time proves nothing",
        ),
        pytest.param(
            healthy(
                hosts=(host(1, loaded=(Loaded("m", context=65536, left_s=9e9),)), host(2)),
                config=config(PINNED.format("{model: M:latest, copies: 2}")),
            ),
            id="what is pinned is there, and stays",
        ),
        pytest.param(
            healthy(
                hosts=(
                    host(
                        1,
                        models=(Installed("m:latest", "aa", "x", frozenset({"embedding"})),),
                        loaded=(Loaded("m:latest", context=2048),),
                    ),
                ),
                status=None,
            ),
            id="no agent talks to a model that embeds",
        ),
        pytest.param(
            healthy(
                hosts=(
                    host(
                        1,
                        models=(Installed("nomic-embed-text:latest", "aa", "x", None),),
                        loaded=(Loaded("nomic-embed-text:latest", context=2048),),
                    ),
                ),
                status=None,
            ),
            id="an old host does not tell that it embeds",
        ),
        pytest.param(SHORT | "models: {pin: [{model: M, num_ctx: 4096}]}", id="pinned so"),
        pytest.param(
            SHORT | "models: {num_ctx: {policy: pin, default: 4096}}", id="a context for all"
        ),
        pytest.param(
            SHORT | 'models: {overrides: {"m*": {num_ctx: {policy: clamp, max: 4096}}}}',
            id="as much as it may have",
        ),
        pytest.param(Facts(problems=()), id="nothing is known"),
    ],
)
def test_what_is_not_held_against_anybody(facts: Facts) -> None:
    """Near misses."""
    assert judge(facts) == []


@pytest.mark.parametrize(
    ("models", "why", "command"),
    [
        ("{}", "A call's num_ctx decides", "on every host, or models.num_ctx in the configuration"),
        (
            "{pin: [{model: m, backends: [gpu1], num_ctx: 4096}]}",
            "On gpu1 models.pin says so; elsewhere a call's num_ctx decided",
            "num_ctx of models.pin, or OLLAMA_CONTEXT_LENGTH in Ollama's environment on gpu2",
        ),
        (
            "{num_ctx: {policy: pin, default: 65536}}",
            "On gpu2 models.num_ctx says so",
            "num_ctx of models.num_ctx, or OLLAMA_CONTEXT_LENGTH",
        ),
    ],
)
def test_what_contexts_come_from(models: str, why: str, command: str) -> None:
    """The operator's own setting before anything that is only guessed."""
    found = only(with_host(loaded=(Loaded("m:latest", context=4096),)) | f"models: {models}")
    assert found.id == "context-drift"
    assert (why in found.why, command in found.next) == (True, True), found


def test_slots_are_learned_by_the_plan() -> None:
    """The other strategies have to be told."""
    waiting = healthy(status=status() | {"queue": {"depth": 3}})
    assert "learned" in only(waiting).why
    assert "two" in only(waiting | "routing: {strategy: warm-first}").why


def test_the_hosts_that_are_preferred_are_away() -> None:
    """Where there are tiers at all, and somebody is there to serve."""
    specs = [
        SimpleNamespace(name=f"gpu{number}", enabled=True, priority=100 * (4 - number))
        for number in (1, 2, 3)
    ]
    tiered = cast("Config", SimpleNamespace(backends=specs))
    away = host(1, trouble=Trouble.TIMEOUT)
    (finding,) = tiers(Facts(config=tiered, hosts=(away, host(2), host(3))))
    assert (finding.id, finding.where) == ("tier-down", "gpu1")
    assert list(tiers(Facts(config=tiered, hosts=(host(1), host(2))))) == []
    assert list(tiers(Facts(config=tiered, hosts=(away,)))) == []
    assert list(tiers(Facts(config=config(), hosts=(away, host(2))))) == []
