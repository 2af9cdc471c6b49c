"""What is in deploy/: that it fits the program, and that those who will read it can."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from balancer.config import load
from balancer.core.routes import TABLE
from balancer.ops.metrics import METRICS, PREFIX, Metric
from tests import needs

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
UNITS = ("ollama-balancer.service", "ollama-balancer.socket", "ollama@.service")
USER_UNIT = "ollama-balancer-user.service"
PROGRAM = "/opt/ollama-balancer/bin/ollama-balancer"


def read(name: str) -> str:
    """A file of deploy/."""
    return (DEPLOY / name).read_text(encoding="utf-8")


# -- expressions ---------------------------------------------------------------------------

# Labels that Prometheus and the alerts add, and series that are not the balancer's.
GIVEN_LABELS = {"instance", "job", "le"}
OTHERS = {"process_resident_memory_bytes"}
RECORDED = re.compile(r"[a-z_]+(?::[a-z_0-9]+)+")
WORD = re.compile(r"[A-Za-z_:][A-Za-z0-9_:]*")
MATCHER = re.compile(r'([a-z_]+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")
LISTED = {"outcome", "type", "phase", "state", "warm", "priority"}  # values told in the help
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count")}


def series() -> dict[str, Metric]:
    """Every name of a series of ours, and its metric."""
    return {
        f"{PREFIX}{metric.name}{suffix}": metric
        for metric in METRICS
        for suffix in SUFFIXES.get(metric.kind, ("",))
    }


def faults(expression: str, recorded: frozenset[str] = frozenset()) -> Iterator[str]:
    """What in a PromQL expression is not as the metrics are."""
    known, here = series(), set(GIVEN_LABELS)
    bare = re.sub(r'"[^"]*"', '""', expression)
    named = [word for word in WORD.findall(bare) if word.startswith(PREFIX.rstrip("_"))]
    if not named:
        yield "names no metric of ours"
    for word in named:
        if word in known:
            here |= set(known[word].labels)
        elif word not in recorded:
            yield f"{word} is no series of ours"
    for name, _, matchers in re.findall(r"([a-z_:0-9]+)(\{([^}]*)\})", expression):
        if name in known:
            yield from _matched(known[name], matchers)
    for group in GROUPING.findall(bare):
        for label in filter(None, (each.strip() for each in group.split(","))):
            if label not in here:
                yield f"no series here has the label {label}"


def _matched(metric: Metric, matchers: str) -> Iterator[str]:
    for label, how, value in MATCHER.findall(matchers):
        if label not in (*metric.labels, *GIVEN_LABELS):
            yield f"{metric.name} has no label {label}"
        elif label in LISTED:
            for each in value.split("|"):
                if each not in re.findall(r"\w+", metric.help):
                    yield f"{metric.name} has never {label}{how}{each}"
        elif label == "endpoint":
            unknown = set(value.split("|")) - {route.operation for route in TABLE}
            if unknown:
                yield f"no route is called {sorted(unknown)}"


@cache
def rules() -> tuple[dict[str, Any], ...]:
    """Of the alerts file, the recording ones too."""
    groups = yaml.safe_load(read("alerts.yaml"))["groups"]
    return tuple(rule for group in groups for rule in group["rules"])


RECORDINGS = frozenset(rule["record"] for rule in rules() if "record" in rule)


@dataclass(frozen=True)
class Target:
    """A query of the dashboard."""

    where: str
    expr: str
    legend: str


def targets() -> list[Target]:
    """All queries of the dashboard, variables and annotations too."""
    board = json.loads(read("dashboard.json"))
    found = [
        Target(f"{panel['title']} {each['refId']}", each["expr"], each["legendFormat"])
        for panel in board["panels"]
        for each in panel.get("targets", ())
    ]
    found += [Target(each["name"], each["expr"], "") for each in board["annotations"]["list"]]
    for each in board["templating"]["list"]:
        if each["type"] == "query":
            metric, label = re.fullmatch(
                r"label_values\((\w+), (\w+)\)", each["query"]["query"]
            ).groups()  # type: ignore[union-attr]  # a fault of the dashboard
            found.append(Target(each["name"], f"sum by ({label}) ({metric})", ""))
    return found


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_rules_ask_for_what_there_is(rule: dict[str, Any]) -> None:
    """Names, labels and the values of labels; and the texts use labels that the alert has."""
    assert list(faults(rule["expr"], RECORDINGS)) == []
    for label in re.findall(r"\$labels\.(\w+)", str(rule.get("annotations", ""))):
        assert re.search(rf"\b{label}\b", rule["expr"]), label


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.where)
def test_the_dashboard_asks_for_what_there_is(target: Target) -> None:
    """Names, labels, values; and legends show labels that the grouping keeps."""
    assert list(faults(target.expr)) == []
    kept = {each.strip() for group in GROUPING.findall(target.expr) for each in group.split(",")}
    assert set(re.findall(r"\{\{(\w+)\}\}", target.legend)) <= kept


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("requests_total{", "request_total{"),
        ("outcome=", "result="),
        ("upstream_error", "upstream_fault"),
        ("by (model)", "by (modell)"),
        ("by (model)", "by (backend, verdict)"),
        ("v1_chat", "openai_chat"),
    ],
)
def test_the_eye_for_expressions_sees_mistakes(right: str, wrong: str) -> None:
    """Else the two tests before this one would mean nothing."""
    good = (
        'sum by (model) (rate(ollama_balancer_requests_total{outcome="upstream_error",'
        'endpoint=~"chat|v1_chat"}[5m]))'
    )
    assert list(faults(good)) == []
    assert right in good
    assert list(faults(good.replace(right, wrong)))


def test_every_alert_says_what_to_do() -> None:
    """And how urgent it is; names are known by their prefix."""
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) > 10
    for rule in alerts:
        assert rule["alert"].startswith("Ollama")
        assert rule["labels"]["severity"] in ("page", "ticket", "info")
        assert set(rule["annotations"]) == {"summary", "action"}


def test_every_alert_is_tested() -> None:
    """By name, in the file for promtool."""
    tested = read("alerts.test.yaml")
    assert [rule["alert"] for rule in rules() if rule.get("alert", "") not in tested] == []


def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    """Its own tool checks the rules, runs their tests, and parses what the dashboard asks."""
    promtool = needs.program("promtool")
    asked = {"groups": [{"name": "dashboard", "rules": []}]}
    for number, target in enumerate(targets()):
        expr = target.expr.replace("$__rate_interval", "5m").replace("$", "")
        asked["groups"][0]["rules"].append({"record": f"q{number}", "expr": expr})  # type: ignore[attr-defined]
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(asked))
    for args in (
        ("check", "rules", "alerts.yaml"),
        ("test", "rules", "alerts.test.yaml"),
        ("check", "rules", str(tmp_path / "asked.yaml")),
    ):
        done = subprocess.run(
            [promtool, *args], check=False, cwd=DEPLOY, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_well_formed() -> None:
    """A fixed uid, its variables, panels that neither share ids nor overlap."""
    board = json.loads(read("dashboard.json"))
    assert board["uid"] == "ollama-balancer"
    assert [each["name"] for each in board["templating"]["list"]] == [
        "datasource",
        "backend",
        "model",
    ]
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for target in targets():
        used = set(re.findall(r"\$(\w+)", target.expr)) - {"__rate_interval"}
        assert used <= {"backend", "model"}, target.where


# -- units ---------------------------------------------------------------------------------


def unit_settings(name: str) -> dict[str, str]:
    """The last value of each key."""
    lines = [line for line in read(name).splitlines() if not line.startswith(("#", "["))]
    return dict(line.split("=", 1) for line in lines if line)


def placed(tmp_path: Path, *names: str) -> list[str]:
    """Units as systemd would find them, all that is commented out in force, the program there."""
    found = []
    for name in names:
        text = re.sub(r"^#(?=[A-Z]\w+=)", "", read(name), flags=re.MULTILINE)
        path = tmp_path / name.replace("@.", "@0.")
        path.write_text(text.replace(PROGRAM, "/bin/true"))
        found.append(str(path))
    return found


def analyze(tmp_path: Path, *args: str) -> None:
    """Run systemd-analyze; fails if it does, or complains."""
    program = needs.program("systemd-analyze")
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "SYSTEMD_LOG_LEVEL": "warning"}
    done = subprocess.run([program, *args], check=False, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    """With everything that is offered in comments switched on."""
    analyze(tmp_path, "verify", *placed(tmp_path, *UNITS))
    analyze(tmp_path, "--user", "verify", *placed(tmp_path, USER_UNIT))


def test_the_service_is_shut_in(tmp_path: Path) -> None:
    """What systemd counts as exposed is at most 1.2 of 10."""
    (unit,) = placed(tmp_path, "ollama-balancer.service")
    analyze(tmp_path, "security", "--offline=true", "--threshold=12", unit)


@pytest.mark.parametrize("name", ["ollama-balancer.service", USER_UNIT])
def test_the_service_speaks_with_systemd(name: str) -> None:
    """It notifies, is watched, reloads by HUP, and has the time that a drain takes."""
    unit = unit_settings(name)
    assert (unit["Type"], unit["NotifyAccess"], unit["WatchdogSec"]) == ("notify", "main", "30s")
    assert unit["ExecReload"] == "/bin/kill -HUP $MAINPID"
    drain_s = load("", {}).server.drain_timeout_s
    assert float(unit["TimeoutStopSec"].removesuffix("s")) > drain_s + 5.0


def test_what_the_units_set_is_a_setting() -> None:
    """Variables of the balancer in units, environment file and containers have the right names."""
    texts = [read(name) for name in (*UNITS, USER_UNIT, "ollama-balancer.default", "Dockerfile")]
    texts.append(json.dumps(yaml.safe_load(read("compose.yaml"))["services"]["balancer"]))
    names = set(re.findall(r"\bBALANCER_[A-Z_]+(?=[=\"])", "\n".join(texts)))
    names -= {"BALANCER_IMAGE", "BALANCER_SOURCE"}
    assert len(names) > 8
    warned = load("", dict.fromkeys(names, "")).warnings
    assert [warning for warning in warned if "not a setting" in warning] == []


# -- containers ----------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile: name and rest of each instruction."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", read("Dockerfile"), flags=re.MULTILINE))
    pairs = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(name, rest) for name, rest in pairs]


def test_the_image_is_careful() -> None:
    """Two stages of one slim base, no root, our own health check, a stop that drains."""
    told = instructions()
    names = [name for name, _ in told]
    bases = [rest.split()[0] for name, rest in told if name == "FROM"]
    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.\d+-slim", bases[0])
    final = dict(told[len(names) - names[::-1].index("FROM") - 1 :])
    assert final["USER"] == "65532:65532"
    assert names.index("USER") > max(at for at, name in enumerate(names) if name in ("RUN", "COPY"))
    assert final["STOPSIGNAL"] == "SIGTERM"
    health = final["HEALTHCHECK"].partition("CMD ")[2]
    assert ast.literal_eval(health) == ["ollama-balancer", "healthcheck", "--live"]
    assert (final["ENTRYPOINT"], final["CMD"]) == ('["ollama-balancer"]', '["serve"]')
    assert "org.opencontainers.image.licenses" in final["LABEL"]
    assert "latest" not in read("Dockerfile")


def test_the_image_holds_what_it_copies() -> None:
    """And what the wheel is made of; the list of what is sent lets all of it pass."""
    copied = [
        word
        for name, rest in instructions()
        if name == "COPY" and not rest.startswith("--from")
        for word in rest.split()[:-1]
    ]
    assert all((ROOT / word).exists() for word in copied)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert set(wheel["targets"]["wheel"]["force-include"]) <= set(copied)
    ignored = read("Dockerfile.dockerignore").splitlines()
    assert {f"!{word}" for word in copied} <= set(ignored)


def test_a_container_without_a_key_does_not_start() -> None:
    """It listens beyond itself; with a key or an anonymous network it does."""
    env = dict(
        re.findall(r"(BALANCER_\w+)=(\S+)", "".join(r for n, r in instructions() if n == "ENV"))
    )
    assert env["BALANCER_LISTEN"] == "0.0.0.0:11434"
    code = "import sys; from balancer.cli import app; app()"
    command = [sys.executable, "-c", code, "config", "show"]

    def shown(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            check=False,
            env={**os.environ, **env, **more},
            capture_output=True,
            text=True,
            cwd=DEPLOY,
        )

    refused = shown()
    assert refused.returncode == 3
    assert "Refusing to listen on 0.0.0.0:11434 without an API key" in refused.stderr
    assert shown(BALANCER_API_KEY="0123456789abcdef").returncode == 0
    assert shown(BALANCER_AUTH__ANONYMOUS="192.168.1.0/24").returncode == 0


def test_compose_hangs_together() -> None:
    """What services use is declared; the balancer's environment is a good configuration."""
    file = yaml.safe_load(read("compose.yaml"))
    services = file["services"]
    for name, service in services.items():
        for volume in service.get("volumes", ()):
            assert volume.partition(":")[0] in file["volumes"], name
        for config in service.get("configs", ()):
            assert config["source"] in file["configs"], name
        assert set(service["networks"]) <= set(file["networks"]), name
        assert not ({"depends_on", "container_name", "privileged"} & set(service)), name
    for config in file["configs"].values():
        if "file" in config:
            assert (DEPLOY / config["file"]).exists()
        else:
            yaml.safe_load(config["content"])
    gpus = [
        device["device_ids"]
        for service in services.values()
        for device in service.get("deploy", {"resources": {"reservations": {"devices": []}}})[
            "resources"
        ]["reservations"]["devices"]
    ]
    assert gpus == [["0"], ["1"]]
    balancer = services["balancer"]
    env = balancer["environment"] | {
        "BALANCER_API_KEY": "0123456789abcdef",
        "BALANCER_LISTEN": "0.0.0.0:11434",
    }
    loaded = load("", env)
    assert loaded.warnings == ()
    assert {spec.name for spec in loaded.backends} <= set(services)
    inside = {
        service["networks"]["inside"]["ipv4_address"]
        for service in services.values()
        if isinstance(service["networks"], dict)
    }
    let_in = {
        str(net.network_address) for net in (*loaded.admin.allowed_cidrs, *loaded.auth.anonymous)
    }
    assert inside == let_in - {"127.0.0.0"}
    grace = re.fullmatch(r"(\d+)m(\d+)s", balancer["stop_grace_period"])
    assert grace
    assert int(grace[1]) * 60 + int(grace[2]) > loaded.server.drain_timeout_s + 5.0


# -- install.sh ----------------------------------------------------------------------------

# Stands for the python of a machine: makes environments that hold this very installation.
PYTHON = """\
#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") shift 2; echo "pip $*" >>"{log}" ;;
  *) exec "{real}" "$@" ;;
esac
"""


@pytest.fixture
def installed(tmp_path: Path) -> Any:
    """Runs install.sh below a folder, without root; what it said, and pip's commands."""
    log, python = tmp_path / "pip.log", tmp_path / "python"
    python.write_text(PYTHON.format(log=log, real=sys.executable))
    python.chmod(0o755)
    root = tmp_path / "root"

    def run(**env: str) -> subprocess.CompletedProcess[str]:
        given = {"PATH": os.environ["PATH"], "PYTHON": str(python), "DESTDIR": str(root), **env}
        return subprocess.run(
            [str(DEPLOY / "install.sh")],
            check=False,
            env=given,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    run.root, run.log = root, log  # type: ignore[attr-defined]  # what tests look at
    return run


def test_install_sh_installs_and_upgrades(installed: Any) -> None:
    """Twice over it changes nothing, and what is the user's stays."""
    first = installed()
    assert first.returncode == 0, first.stderr
    root: Path = installed.root
    assert "creating " in first.stdout
    unit = (root / "etc/systemd/system/ollama-balancer.service").read_text()
    assert "Type=notify" in unit
    assert (root / "etc/default/ollama-balancer").stat().st_mode & 0o777 == 0o600
    config = root / "etc/ollama-balancer/config.yaml"
    config.write_text("backends: [gpu1]\n")
    again = installed()
    assert again.returncode == 0, again.stderr
    assert "upgrading" in again.stdout
    assert "unchanged" in again.stdout
    assert "kept" in again.stdout
    assert config.read_text() == "backends: [gpu1]\n"
    pips = installed.log.read_text().splitlines()
    assert len(pips) == 2
    assert f"-c {ROOT}/constraints.txt {ROOT}" in pips[0]


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"PREFIX": "/home/me/olb"}, "look into homes"),
        ({"PREFIX": "olb"}, "absolute"),
        ({"PYTHON": "/bin/false"}, "3.11"),
    ],
)
def test_install_sh_refuses_before_it_writes(
    installed: Any, env: dict[str, str], told: str
) -> None:
    """With a reason."""
    done = installed(**env)
    assert done.returncode == 1
    assert told in done.stderr
    assert not installed.root.exists()


# -- docs/service.md -----------------------------------------------------------------------


def test_the_configurations_of_the_page_are_good() -> None:
    """Whoever copies one gets no fault and no warning but for what it leaves to him."""
    page = (ROOT / "docs/service.md").read_text(encoding="utf-8")
    blocks = re.findall("```yaml\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for text in blocks:
        keys = "ops admin 0123456789abcdef\n"
        assert load(text, {}, read_file=lambda _, keys=keys: keys).warnings == ()  # type: ignore[misc]


def test_the_page_tells_what_stays_open(tmp_path: Path) -> None:
    """The score it names is the one that systemd-analyze gives."""
    program = needs.program("systemd-analyze")
    (unit,) = placed(tmp_path, "ollama-balancer.service")
    args = [program, "security", "--offline=true", "--no-pager", unit]
    told = subprocess.run(args, check=False, capture_output=True, text=True).stdout
    score = re.search(r"Overall exposure level for \S+: (\S+)", told)
    assert score
    assert f"counts {score[1]} of 10" in (ROOT / "docs/service.md").read_text(encoding="utf-8")
