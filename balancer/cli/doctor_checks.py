"""
What is wrong, judged from facts alone: facts in, findings out.

Each check is a function of its own; adding one is writing it and naming it in `CHECKS`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import IntEnum
from itertools import combinations
from typing import Any, Final

from balancer.cli.doctor_facts import Facts, Host, Loaded, Trouble
from balancer.config import EVERYWHERE, parse_ollama_host
from balancer.core.aliases import Aliases
from balancer.core.names import InvalidName, matches, parse

OLDEST: Final = (0, 10, 0)  # since then a list of loaded models tells their contexts
# What clients need that came with a version.
GREW: Final = (
    ((0, 6, 4), "model capabilities (VS Code, agents)"),
    ((0, 13, 3), "/v1/responses (Codex)"),
    ((0, 14, 0), "/v1/messages (Claude Code)"),
)
AGENT_CONTEXT: Final = 32768
SKEW_S: Final = 30.0
SLOW_S: Final = 1.0
FOREVER_S: Final = 10 * 365 * 86400.0
FEW_FILES: Final = 4096
PYTHON: Final = (3, 11)
NAMED: Final = 4
PROXIES: Final = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


class Severity(IntEnum):
    """How serious; the most serious is the least number."""

    ERROR = 0
    WARNING = 1
    INFO = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """
    One thing that is wrong.

    Args:
        id: Stays the same from version to version.
        where: A host, model, setting or variable.
        what: In one sentence.
        why: Why that matters, or what it probably is.
        next: What to type, or to write where.
    """

    id: str
    severity: Severity
    where: str
    what: str
    why: str
    next: str

    def document(self) -> dict[str, Any]:
        """The same for scripts."""
        return asdict(self) | {"severity": self.severity.name.lower()}


Check = Callable[[Facts], Iterator[Finding]]


def judge(facts: Facts) -> list[Finding]:
    """Everything that is wrong, the most serious first."""
    found = [finding for check in CHECKS for finding in check(facts)]
    return sorted(found, key=lambda finding: finding.severity)


def _error(*words: str) -> Finding:
    return Finding(words[0], Severity.ERROR, *words[1:])


def _warning(*words: str) -> Finding:
    return Finding(words[0], Severity.WARNING, *words[1:])


def _info(*words: str) -> Finding:
    return Finding(words[0], Severity.INFO, *words[1:])


def _few(names: Iterable[str]) -> str:
    """The first names, and how many more."""
    listed = sorted(names)
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# -- configuration -----------------------------------------------------------------------------


def invalid(facts: Facts) -> Iterator[Finding]:
    """A configuration that cannot be used."""
    if facts.problems:
        where = facts.file or "configuration"
        told = f"The configuration has {_count(len(facts.problems), 'fault')}."
        command = f"ollama-balancer check {facts.file or ''}".rstrip()
        yield _error("config-invalid", where, told, "; ".join(facts.problems), command)


def no_hosts(facts: Facts) -> Iterator[Finding]:
    """Nobody to send calls to."""
    if facts.config is not None and not facts.hosts:
        why = "Every call is answered 503."
        command = "ollama-balancer init -b HOST"
        if facts.file:
            command = f"write backends: [HOST] into {facts.file}"
        yield _error("no-hosts", "backends", "No Ollama host is known.", why, command)


def exposed(facts: Facts) -> Iterator[Finding]:
    """An open door."""
    if facts.config is None:
        return
    public = [str(one) for one in facts.config.server.listen if not one.is_local]
    if public and set(EVERYWHERE) & set(facts.config.auth.anonymous):
        why = "Whoever reaches that address can use your models."
        told = "Callers from anywhere need no key."
        command = "set BALANCER_API_KEY, and auth.anonymous to your networks"
        yield _warning("exposed", _few(public), told, why, command)


def not_reloaded(facts: Facts) -> Iterator[Finding]:
    """What is configured is not what is running."""
    if facts.status is None or facts.config is None:
        return
    if facts.status["config"].get("file") != facts.file:
        return
    running = {backend["url"] for backend in facts.status["backends"]}
    lacking = [
        spec.name
        for index, spec in enumerate(facts.config.backends)
        if spec.url not in running
        and not facts.config.origins.get(f"backends[{index}].url", "").startswith("flag")
    ]
    if lacking:
        told = f"The running balancer does not know {_few(lacking)}."
        why = "The file has been changed since it was read."
        yield _warning(
            "not-reloaded", facts.file or "environment", told, why, "ollama-balancer reload"
        )


# -- hosts -------------------------------------------------------------------------------------


def unreachable(facts: Facts) -> Iterator[Finding]:
    """Hosts that do not answer, and the likely reason."""
    for host in facts.hosts:
        if host.trouble is None:
            continue
        where, told = f"{host.name} ({host.url})", host.told[:1].upper() + host.told[1:] + "."
        if facts.backend(host.url).get("up"):
            why = "The running balancer reaches it: the way from here is another."
            yield _info("host-elsewhere", where, told, why, "ollama-balancer status")
            continue
        id_, why, command = _reason(host, host.trouble)
        yield _error(id_, where, told, why, command)


def _reason(host: Host, trouble: Trouble) -> tuple[str, str, str]:
    """Id, likely reason, and what to do."""
    name, port = host.hostname, host.port
    beyond = "sudo systemctl edit ollama   # [Service] Environment=OLLAMA_HOST=0.0.0.0"
    match trouble:
        case Trouble.NAME:
            why = f"This machine cannot resolve {name}. Check the spelling, or write its IP."
            return "host-name", why, f"getent hosts {name}"
        case Trouble.REFUSED | Trouble.TIMEOUT | Trouble.STRANGER if port == 80:
            why = f'"http://{name}" means port 80, as in OLLAMA_HOST. Ollama listens on 11434.'
            return "host-port-80", why, f"write {name}:11434"
        case Trouble.REFUSED if host.on_loopback:
            return "host-loopback", "Ollama runs there, but listens on loopback only.", beyond
        case Trouble.REFUSED if host.is_here or host.is_loopback:
            return "host-refused", "Nobody listens there: Ollama is not running.", "ollama serve"
        case Trouble.REFUSED:
            why = "The machine is there. Ollama is not running, or listens on loopback only."
            return "host-refused", why, f"on {name}: {beyond}"
        case Trouble.TIMEOUT:
            why = "The machine is off or asleep, or a firewall drops what we send."
            return "host-timeout", why, f"ping -c 3 {name}"
        case Trouble.NO_ROUTE:
            return "host-no-route", "No way leads there from here.", f"ip route get {name}"
        case Trouble.TLS:
            why = 'Its certificate is not one we trust: see "tls" of the backend (ca_file, …).'
            return "host-tls", why, f"openssl s_client -connect {name}:{port}"
        case Trouble.SILENT:
            why = "It takes connections but says nothing: it hangs, or is just starting."
            return "host-silent", why, f"curl -m 30 {host.url}/api/version"
        case Trouble.CREDENTIAL:
            why = "A reverse proxy before it wants a credential."
            return "host-credential", why, 'write it into the backend\'s "auth" block'
        case Trouble.GARBLED | Trouble.STRANGER:
            why = "Something else listens there."
            return "host-stranger", why, f"curl -i {host.url}/api/version"


def loop(facts: Facts) -> Iterator[Finding]:
    """A balancer among the backends."""
    ports = {one.port for one in facts.config.server.listen} if facts.config else set()
    for host in facts.hosts:
        if host.is_balancer and (host.is_here or host.is_loopback) and host.port in ports:
            why = "Calls sent there come back and are refused."
            told = "This backend is the balancer itself."
            yield _error("loop", host.name, told, why, f"take {host.url} out of backends")
        elif host.is_balancer:
            why = "Each of the two queues and retries, and neither sees the other's load."
            told = "This backend is another ollama-balancer, no Ollama."
            yield _warning("chain", host.name, told, why, "name the hosts behind it instead")


def duplicates(facts: Facts) -> Iterator[Finding]:
    """One Ollama under two names."""
    for one, other in combinations(facts.answering, 2):
        pair = f"{one.name}, {other.name}"
        command = f"take {other.url} out of backends"
        why = "It would get twice its share of calls, and no failover where it looks like one."
        if one.port == other.port and one.addresses & other.addresses:
            told = "Two backends have the same address."
            yield _warning("duplicate-host", pair, told, why, command)
        elif one.hostname != other.hostname and _looks_same(one, other):
            told = "Two backends look like the same Ollama: same version, models and times."
            why = f"{why} (A shared model directory looks alike, too; then all is well.)"
            yield _info("duplicate-suspicion", pair, told, why, command)


def _looks_same(one: Host, other: Host) -> bool:
    """No two hosts pull all their models in the same instant, or unload at the same one."""
    if one.version != other.version or not one.models:
        return False
    same_models = {(m.digest, m.modified_at) for m in one.models} == {
        (m.digest, m.modified_at) for m in other.models
    }
    times = {m.modified_at for m in one.models}
    same_loaded = {m.expires_at for m in one.loaded} == {m.expires_at for m in other.loaded}
    return same_models and same_loaded and (len(times) > 1 or bool(one.loaded))


def old(facts: Facts) -> Iterator[Finding]:
    """Versions that lack what clients and we need."""
    for host in facts.answering:
        number = _number(host.version)
        lacks = [what for since, what in GREW if number and number < since]
        if not number or not lacks:
            continue
        told = f"Ollama {host.version} is old: it lacks {', '.join(lacks)}."
        command = f"on {host.hostname}: curl -fsSL https://ollama.com/install.sh | sh"
        make = _warning if number < OLDEST else _info
        why = "Calls that need it fail there or are sent elsewhere."
        yield make("version-old", host.name, told, why, command)


def skew(facts: Facts) -> Iterator[Finding]:
    """Versions that differ."""
    versions = defaultdict(list)
    for host in facts.answering:
        if number := _number(host.version):
            versions[number].append(host.name)
    if len(versions) > 1:
        each = "; ".join(
            f"{'.'.join(map(str, number))}: {_few(names)}"
            for number, names in sorted(versions.items())
        )
        why = (
            "Clients are told the lowest (models.version) and switch features by it; vectors of "
            "embedding models can differ between versions."
        )
        behind = [name for number in sorted(versions)[:-1] for name in versions[number]]
        command = f"update Ollama on {_few(behind)}"
        told = "The hosts run different versions of Ollama."
        yield _warning("version-skew", each, told, why, command)


def _number(version: str | None) -> tuple[int, ...]:
    """A version to compare; empty: none, or a build without one."""
    try:
        number = tuple(int(part) for part in (version or "").partition("-")[0].split("."))
    except ValueError:
        return ()
    return number if any(number) else ()


def clocks(facts: Facts) -> Iterator[Finding]:
    """Clocks that differ from ours."""
    for host in facts.answering:
        if host.ahead_s is not None and abs(host.ahead_s) > SKEW_S:
            way = "ahead" if host.ahead_s > 0 else "behind"
            told = f"Its clock is {abs(host.ahead_s):.0f} s {way} of this machine's."
            why = "Times of unloading are misread, and logs cannot be put side by side."
            yield _warning("clock-skew", host.name, told, why, "timedatectl   # on both machines")


def slow(facts: Facts) -> Iterator[Finding]:
    """Hosts that take long for a trifle."""
    for host in facts.answering:
        if host.latency_s > SLOW_S:
            told = f"It took {host.latency_s:.1f} s to tell its version."
            why = "Checks that take longer than health.timeout take a host out."
            yield _warning("host-slow", host.name, told, why, f"ping -c 3 {host.hostname}")


# -- models ------------------------------------------------------------------------------------


def empty(facts: Facts) -> Iterator[Finding]:
    """Hosts without models."""
    for host in facts.answering:
        if not host.models and not host.is_balancer:
            command = f"OLLAMA_HOST={host.url} ollama pull MODEL"
            told, why = "It has no models.", "No call will be sent there."
            yield _warning("host-empty", host.name, told, why, command)


def conflicts(facts: Facts) -> Iterator[Finding]:
    """One name, other weights."""
    for model, digests in _digests(facts).items():
        if len(digests) < 2:
            continue
        each = "; ".join(f"{d[:12]}: {_few(h.name for h in hosts)}" for d, hosts in digests.items())
        told = f"It is not the same model everywhere ({each})."
        why = (
            "Calls stay on the weights that most hosts have; the other hosts serve this model only "
            "when none of those can, and never its embeddings."
        )
        # The copy fewest have is the one to be replaced; on a tie, either.
        fewest = min(digests.values(), key=len)[0]
        command = f"OLLAMA_HOST={fewest.url} ollama pull {model}"
        yield _warning("digest-conflict", model, told, why, command)


def aliases(facts: Facts) -> Iterator[Finding]:
    """Names of ours that hide a model, or that stand for none."""
    hosts = [host for host in facts.answering if not host.is_balancer]
    if facts.config is None or not hosts:
        return
    where = _holders(hosts)
    command = "ollama-balancer config show --origin"
    for alias in Aliases(facts.config.models.aliases):
        if alias.canonical in where:
            told = f"It is a model too (on {_few(where[alias.canonical])})."
            why = "Calls by that name go to what the alias stands for, never to that model."
            yield _warning("alias-hides-model", alias.name, told, why, command)
        if not any(parse(model).canonical in where for model in alias.models):
            told = f"No host that answers has what it stands for ({_few(alias.models)})."
            why = "Calls for it are answered with 404."
            pull = f"OLLAMA_HOST={hosts[0].url} ollama pull {alias.models[0]}"
            yield _warning("alias-of-nothing", alias.name, told, why, pull)


def _holders(hosts: Iterable[Host]) -> dict[str, list[str]]:
    """Names of hosts by the canonical names of what they have."""
    found: dict[str, list[str]] = {}
    for host in hosts:
        for model in host.models:
            with suppress(InvalidName):
                found.setdefault(parse(model.name).canonical, []).append(host.name)
    return found


def unmet(facts: Facts) -> Iterator[Finding]:
    """Models that are to be kept in memory where they are not even on disk."""
    hosts = {host.name: host for host in facts.answering if not host.is_balancer}
    if facts.config is None or not hosts:
        return
    known, holders = {host.name for host in facts.hosts}, _holders(hosts.values())
    for pin in facts.config.models.pin:
        unknown = [name for name in pin.backends if name not in known]
        if unknown:
            told = f"It is pinned on {_few(unknown)}, and no backend is named so."
            why = "Nothing is kept there until one of that name is found."
            yield _warning("pin-unknown", pin.model, told, why, "ollama-balancer backends list")
        have = holders.get(parse(pin.model).canonical, [])
        lacking = [name for name in pin.backends or hosts if name in hosts and name not in have]
        if lacking and (pin.backends or len(have) < pin.copies):
            wanted = "each of these" if pin.backends else _count(pin.copies, "backend")
            told = f"It is pinned on {wanted}, but {_few(lacking)} cannot load it."
            command = f"OLLAMA_HOST={hosts[lacking[0]].url} ollama pull {pin.model}"
            yield _warning("pin-of-nothing", pin.model, told, "It is not on disk there.", command)


def single(facts: Facts) -> Iterator[Finding]:
    """Models without a second host."""
    hosts = [host for host in facts.answering if not host.is_balancer]
    if len(hosts) < 2:
        return
    alone = {
        model: next(iter(digests.values()))[0]
        for model, digests in _digests(facts).items()
        if sum(map(len, digests.values())) == 1
    }
    if alone:
        told = f"{_count(len(alone), 'model')} on one host only: {_few(alone)}."
        why = "If that host is away, calls for them wait and then fail."
        model, holder = min(alone.items())
        other = next(host for host in hosts if host is not holder)
        command = f"OLLAMA_HOST={other.url} ollama pull {model}"
        yield _info("no-failover", _few({h.name for h in alone.values()}), told, why, command)


def _digests(facts: Facts) -> dict[str, dict[str, list[Host]]]:
    """Who has which weights under which name."""
    found: dict[str, dict[str, list[Host]]] = {}
    for host in facts.answering:
        for model in host.models:
            found.setdefault(model.name, {}).setdefault(model.digest, []).append(host)
    return dict(sorted(found.items()))


def capabilities(facts: Facts) -> Iterator[Finding]:
    """The same weights, said to be able to do other things."""
    said: dict[tuple[str, str], dict[frozenset[str], list[str]]] = {}
    for host in facts.answering:
        for model in host.models:
            if model.capabilities is not None:
                by_set = said.setdefault((model.name, model.digest), {})
                by_set.setdefault(model.capabilities, []).append(host.name)
    for (name, _), by_set in sorted(said.items()):
        if len(by_set) > 1:
            each = "; ".join(f"{_few(hosts)}: {_few(can)}" for can, hosts in by_set.items())
            told = f"It is said to have different capabilities ({each})."
            why = "Other versions of Ollama read the same file differently; tools may fail on one."
            yield _info("capability-drift", name, told, why, "run one version of Ollama everywhere")


# -- what is loaded ----------------------------------------------------------------------------


def on_cpu(facts: Facts) -> Iterator[Finding]:
    """Models that do not fit the GPU."""
    for host, model in _loaded(facts):
        if model.size_bytes <= 0 or model.vram_bytes >= model.size_bytes:
            continue
        share = 100 * model.vram_bytes / model.size_bytes
        how = f"only {share:.0f} % on the GPU" if model.vram_bytes else "on the CPU alone"
        why = "That is 5 to 50 times slower, and Ollama does not say so."
        if not model.vram_bytes:
            why += " After a crash, orphaned runners may still hold the GPU's memory."
        command = f"on {host.hostname}: ollama ps; nvidia-smi   # smaller context, or fewer models"
        yield _warning(
            "cpu-fallback", f"{host.name}: {model.name}", f"It runs {how}.", why, command
        )


def contexts(facts: Facts) -> Iterator[Finding]:
    """Contexts that differ from host to host, or are short, unless the operator wants them so."""
    of_model: dict[str, dict[str, int]] = defaultdict(dict)
    for host, model in _loaded(facts):
        if model.context:
            of_model[model.name][host.name] = model.context
    embedding = _embedding(facts)
    for name, by_host in sorted(of_model.items()):
        wanted = {host: _wanted_by(facts, host, name, by_host[host]) for host in by_host}
        if all(wanted.values()):
            continue
        if len(set(by_host.values())) > 1:
            yield _drift(name, by_host, wanted)
        elif name not in embedding and min(by_host.values()) < AGENT_CONTEXT:
            told = f"It is loaded with a context of {min(by_host.values())} tokens."
            why = "Agents (Claude Code, Codex, Cline) need more, and over /v1 cannot ask for it."
            command = f"OLLAMA_CONTEXT_LENGTH={AGENT_CONTEXT} in Ollama's environment on every host"
            yield _info("context-short", f"{_few(by_host)}: {name}", told, why, command)


def _drift(name: str, by_host: Mapping[str, int], wanted: Mapping[str, str]) -> Finding:
    """Of one model, some of whose contexts the operator wants, or none."""
    each = ", ".join(f"{host}: {context}" for host, context in by_host.items())
    told = f"It is loaded with different contexts ({each})."
    own = "or the host's own default (OLLAMA_CONTEXT_LENGTH, else by its memory)."
    variable = "OLLAMA_CONTEXT_LENGTH in Ollama's environment on"
    settings = sorted(set(filter(None, wanted.values())))
    if settings:
        setting, others = " and ".join(settings), [host for host in by_host if not wanted[host]]
        here = _few(host for host in by_host if wanted[host])
        why = f"On {here} {setting} says so; elsewhere a call's num_ctx decided, {own}"
        command = f"num_ctx of {setting}, or {variable} {_few(others)}"
    else:
        why = f"A call's num_ctx decides, {own} Where it is small, long prompts are cut short."
        command = f"the same {variable} every host, or models.num_ctx in the configuration"
    return _warning("context-drift", name, told, why, command)


def _wanted_by(facts: Facts, host: str, model: str, context: int) -> str:
    """The setting by which *model* has just that context there; empty: none."""
    if facts.config is None:
        return ""
    try:
        name = parse(model)
    except InvalidName:
        return ""
    models = facts.config.models
    for pin in models.pin:
        is_here = not pin.backends or host in pin.backends
        if is_here and pin.num_ctx == context and parse(pin.model).canonical == name.canonical:
            return "models.pin"
    covering = (own.num_ctx for glob, own in models.overrides if matches(glob, name))
    rule = next(covering, None) or models.num_ctx
    return "models.num_ctx" if context in (rule.default, rule.max) else ""


def _embedding(facts: Facts) -> set[str]:
    """The models that embed; not every host tells, but their names mostly do."""
    return {
        model.name
        for host in facts.answering
        for model in host.models
        if "embed" in model.name or "embedding" in (model.capabilities or ())
    }


def pins(facts: Facts) -> Iterator[Finding]:
    """Models that are never unloaded."""
    for host, model in _loaded(facts):
        if model.left_s is not None and model.left_s > FOREVER_S and not _is_meant(facts, model):
            told = "It is never unloaded (keep_alive -1)."
            why = "It holds its memory on the host that happened to get that call."
            command = f"OLLAMA_HOST={host.url} ollama stop {model.name}"
            yield _info("pinned", f"{host.name}: {model.name}", told, why, command)


def _is_meant(facts: Facts, model: Loaded) -> bool:
    """Whether it is pinned by the configuration."""
    wanted = facts.config.models.pin if facts.config is not None else ()
    with suppress(InvalidName):
        canonical = parse(model.name).canonical
        return any(parse(pin.model).canonical == canonical for pin in wanted)
    return False


def _loaded(facts: Facts) -> Iterator[tuple[Host, Loaded]]:
    for host in facts.answering:
        for model in host.loaded:
            yield host, model


# -- the running balancer ----------------------------------------------------------------------


def running(facts: Facts) -> Iterator[Finding]:
    """What the balancer itself complains of."""
    if facts.status is None:
        return
    rejected = facts.status["config"].get("rejected")
    if rejected:
        told = "The last reload was rejected; the previous configuration is in force."
        command = f"ollama-balancer check {facts.file or ''}".rstrip()
        yield _error("reload-rejected", facts.file or "", told, "; ".join(rejected), command)
    for backend in facts.status["backends"]:
        yield from _of_backend(backend)


def _of_backend(backend: Any) -> Iterator[Finding]:
    name, breaker = backend["name"], backend["breaker"]
    if backend.get("switch") in ("draining", "disabled"):
        told = f"It is {backend['switch']}."
        yield _info("switched-off", name, told, "It gets no new calls.", "ollama-balancer status")
    if breaker["state"] != "closed" and backend.get("up"):
        why = breaker.get("reason") or "Calls failed although checks are good."
        told = f"Its breaker is {breaker['state'].replace('_', '-')}."
        yield _warning("breaker-open", name, told, why, "ollama-balancer status --watch")
    for model in backend["models"]:
        own = model.get("breaker")
        if own and own["state"] != "closed":
            told = f"The breaker of {model['name']} is {own['state'].replace('_', '-')}."
            why = own.get("reason") or "Calls for it failed there."
            command = f"OLLAMA_HOST={backend['url']} ollama run {model['name']}"
            yield _warning("breaker-open", f"{name}: {model['name']}", told, why, command)
    if backend.get("trouble"):
        why = "It stays in use: one answer proves little."
        yield _warning("host-trouble", name, backend["trouble"], why, "ollama-balancer status")


def slots(facts: Facts) -> Iterator[Finding]:
    """Calls wait, and nobody said how many a host takes at once."""
    if facts.status is None or facts.config is None or not facts.status["queue"]["depth"]:
        return
    unset = [spec.name for spec in facts.config.backends if spec.enabled and spec.slots is None]
    if unset:
        told = f"{_count(facts.status['queue']['depth'], 'call')} waiting, slots are not set."
        why = "How many calls per model Ollama takes at once it does not tell; two are sent."
        if facts.config.routing.strategy == "plan":
            why = "How many calls per model Ollama takes at once is learned; told, it need not be."
        command = "backends: [{name: …, url: …, slots: N}]   # N = OLLAMA_NUM_PARALLEL there"
        yield _info("slots-unset", _few(unset), told, why, command)


def tiers(facts: Facts) -> Iterator[Finding]:
    """The hosts that are preferred are all away."""
    if facts.config is None:
        return
    up = {host.name for host in facts.answering}
    of_tier: dict[int, list[str]] = defaultdict(list)
    for spec in facts.config.backends:
        if spec.enabled:
            of_tier[spec.priority].append(spec.name)
    first = of_tier[max(of_tier)] if of_tier else []
    if len(of_tier) > 1 and not up & set(first) and up:
        told = "No host of the highest priority answers: lower ones serve everything."
        why = "They are meant for what the others cannot take."
        yield _warning("tier-down", _few(first), told, why, "ollama-balancer status")


# -- this machine ------------------------------------------------------------------------------


def ports(facts: Facts) -> Iterator[Finding]:
    """Somebody else where we want to listen."""
    for address, who in facts.machine.occupants.items():
        told = f"Another program has our address: {who}."
        why = "The balancer cannot start there."
        command = f"ss -ltnp 'sport = :{address.rpartition(':')[2]}'"
        yield _error("port-taken", address, told, why, command)


def no_admin(facts: Facts) -> Iterator[Finding]:
    """A balancer that does not let us look."""
    if facts.refusal:
        why = "Only what the hosts say was judged."
        command = "BALANCER_API_KEY=… ollama-balancer doctor"
        yield _warning("no-admin", facts.admin, facts.refusal, why, command)


def files(facts: Facts) -> Iterator[Finding]:
    """A low limit for open files."""
    limit = facts.machine.open_files
    if limit is not None and limit < FEW_FILES:
        told = f"A process may open {limit} files."
        why = f"Every call takes two sockets: that is about {limit // 2} calls at once."
        command = "LimitNOFILE=65536 in the systemd unit, or ulimit -Hn 65536"
        yield _warning("file-limit", "this machine", told, why, command)


def proxies(facts: Facts) -> Iterator[Finding]:
    """Variables that send clients of this machine to an HTTP proxy."""
    env = facts.machine.env
    named = [name for name in PROXIES if env.get(name)]
    spared = (env.get("NO_PROXY") or env.get("no_proxy") or "").replace(" ", "").split(",")
    if named and not {"*", "127.0.0.1", "localhost", "127.0.0.0/8"} & set(spared):
        told = "Clients started here send calls to the balancer through a proxy."
        why = "NO_PROXY does not name this machine. (The balancer itself ignores these variables.)"
        command = "export NO_PROXY=localhost,127.0.0.1"
        yield _warning("proxy-variables", ", ".join(named), told, why, command)


def exported(facts: Facts) -> Iterator[Finding]:
    """OLLAMA_HOST that points at us, where Ollama itself might read it."""
    text = facts.machine.env.get("OLLAMA_HOST")
    if not text or facts.config is None:
        return
    try:
        url = parse_ollama_host(text)
    except ValueError:
        told = "It is no address."
        yield _warning(
            "ollama-host", "OLLAMA_HOST", told, "No client can use it.", "unset OLLAMA_HOST"
        )
        return
    if any(one.is_reached_by(url) for one in facts.config.server.listen):
        told = "It points at the balancer: right for clients, wrong for Ollama."
        why = "An `ollama serve` started from here would want to listen on our address."
        yield _info("ollama-host", "OLLAMA_HOST", told, why, "env -u OLLAMA_HOST ollama serve")


def watchdog(facts: Facts) -> Iterator[Finding]:
    """A service that hangs and is not started again."""
    unit = facts.machine.unit
    if unit is None:
        return
    settings = {line.partition("=")[0].strip() for line in unit.splitlines()}
    if "WatchdogSec" not in settings:
        told = "The systemd unit has no watchdog."
        why = "A balancer that hangs would not be started again."
        command = "sudo systemctl edit ollama-balancer   # Type=notify, WatchdogSec=30s"
        yield _info("systemd-watchdog", "ollama-balancer.service", told, why, command)


def python(facts: Facts) -> Iterator[Finding]:
    """A Python that is too old."""
    if facts.machine.python < PYTHON:
        version = ".".join(map(str, facts.machine.python))
        told = f"Python {version} is too old."
        why = f"It takes {'.'.join(map(str, PYTHON))} or newer."
        yield _error("python-old", "this machine", told, why, "python3 --version")


CHECKS: Final[tuple[Check, ...]] = (
    invalid,
    no_hosts,
    ports,
    loop,
    unreachable,
    running,
    python,
    exposed,
    no_admin,
    not_reloaded,
    conflicts,
    aliases,
    unmet,
    on_cpu,
    contexts,
    empty,
    tiers,
    duplicates,
    skew,
    old,
    clocks,
    slow,
    files,
    proxies,
    single,
    capabilities,
    pins,
    slots,
    exported,
    watchdog,
)
