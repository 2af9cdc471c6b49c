"""One measurement of the data plane benchmark: the generator runs, its report becomes figures."""

import http.client
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import machine
import peers
from figures import quantile
from rig import Died, Rig, Running, ask
from scenarios import Group, Scenario, Unit

GRACE_S = 30.0  # beyond its window
SETTLE_S = 0.2
BESIDE_S = 2.0
SEEN_S = 2.0  # for the origin to see the last aborts
CALLS_BEFORE_MEMORY = ("--mode", "closed", "--what", "first", "--conns", "8")
_SEED = "20240607"


@dataclass(frozen=True, slots=True)
class Sample:
    """What one proxy did in one round of one scenario."""

    scenario: str
    peer: str
    round: int
    realtime: bool
    figures: dict[str, float] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


class Load:
    """A generator that runs."""

    def __init__(
        self,
        rig: Rig,
        target: Running,
        options: Sequence[str],
        seconds: float,
        *,
        warm_up_s: float = 0.5,
        realtime: bool = False,
    ) -> None:
        self._most_s = warm_up_s + seconds + GRACE_S
        argv = [str(peers.BUILD / "load"), *options, "--port", str(target.port)]
        argv += ["--seconds", f"{seconds:g}", "--warmup", f"{warm_up_s:g}", "--auth", rig.token]
        argv += ["--pid", str(target.pid), "--seed", _SEED]
        if realtime:
            argv = ["chrt", "--fifo", str(machine.PRIORITY), *argv]
        pipe = subprocess.PIPE
        command = machine.pinned(rig.cores.load, argv)
        self._process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)

    def wait(self, seconds: float) -> None:
        """Let it run for so long."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return

    def result(self) -> dict[str, Any]:
        """Wait for its end; what it reports, or ``{"errors": …}``."""
        try:
            said, complaint = self._process.communicate(timeout=self._most_s)
            found: dict[str, Any] = json.loads(said)
        except subprocess.TimeoutExpired:
            return {"errors": {"generator did not end": 1}}
        except ValueError:
            return {"errors": {f"generator: {complaint.strip()[-200:] or 'said nothing'}": 1}}
        return found

    def stop(self) -> None:
        """End it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


class Meter:
    """Measures proxies of a rig, one at a time."""

    def __init__(self, rig: Rig, seconds: float, *, realtime: Mapping[str, bool]) -> None:
        self._rig = rig
        self._seconds = seconds
        self._realtime = realtime

    def measure(self, scenario: Scenario, name: str, turn: int) -> Sample:
        """Measure a proxy once; what goes wrong with it is an error of the sample."""
        realtime = self._realtime[scenario.name]
        try:
            target = self._rig.proxy(name, fresh=bool(scenario.conns))
            with self._priority(target, realtime=realtime):
                raw, figures = self._run(scenario, target, realtime=realtime)
        except Died as error:
            return Sample(scenario.name, name, turn, realtime, errors={str(error): 1})
        errors = dict(raw.get("errors", {}))
        if not target.process.alive:
            errors[f"died: {target.process.complaint()}"] = 1
        if figures.get("unseen") and name.startswith("ours"):
            errors["abort never reached the origin"] = int(figures["unseen"])
        target.process.trim()
        target.process.pause(SETTLE_S)
        raw.pop("aborts", None)
        return Sample(scenario.name, name, turn, realtime, figures, errors, raw)

    @contextmanager
    def _priority(self, target: Running, *, realtime: bool) -> Iterator[None]:
        pids = [target.pid, self._rig.origin.pid] if realtime else []
        try:
            machine.set_priority(pids, realtime=True)
            yield
        finally:
            machine.set_priority(pids, realtime=False)

    def _run(
        self, scenario: Scenario, target: Running, *, realtime: bool
    ) -> tuple[dict[str, Any], dict[str, float]]:
        seconds = max(self._seconds, scenario.least_s)
        before = self._memory_before(target) if scenario.conns else 0
        if scenario.group is Group.ABORTS:
            self._aborts()  # of whoever was measured before
        figures = {}
        with ExitStack() as stack:

            def start(options: Sequence[str], seconds: float, warm_up_s: float) -> Load:
                given = (self._rig, target, options, seconds)
                load = Load(*given, warm_up_s=warm_up_s, realtime=realtime)
                stack.callback(load.stop)
                return load

            beside = start(scenario.beside, seconds + 1.0, BESIDE_S) if scenario.beside else None
            if beside:
                beside.wait(BESIDE_S)  # until its streams stand
            load = start(scenario.options, seconds, scenario.warm_up_s)
            if scenario.conns:
                load.wait(scenario.warm_up_s + 0.9 * seconds)
                kib = machine.pss_kib(target.pid) - before
                figures["stream_kib"] = kib / scenario.conns
            raw = load.result()
            if scenario.group is Group.ABORTS:
                figures |= self._join(raw.get("aborts", {}), target)
            if beside:
                _add_errors(raw, beside.result())
        return raw, figures | read(raw, scenario.unit)

    def _memory_before(self, target: Running) -> int:
        """Memory of a proxy that has done everything once."""
        load = Load(self._rig, target, CALLS_BEFORE_MEMORY, 1.0)
        try:
            load.result()
        finally:
            load.stop()
        target.process.pause(SETTLE_S)
        return machine.pss_kib(target.pid)

    def _aborts(self) -> dict[str, int]:
        try:
            found: dict[str, int] = json.loads(ask(self._rig.origin.port, "/bench/aborts"))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Died(f"the origin does not tell its aborts: {error!r}") from None
        return found

    def _join(self, closed: Mapping[str, int], target: Running) -> dict[str, float]:
        """Time from each client's close to the origin seeing it, ms."""
        seen = self._aborts()
        for _ in range(int(SEEN_S / SETTLE_S)):
            if closed.keys() <= seen.keys():
                break
            target.process.pause(SETTLE_S)
            seen |= self._aborts()
        waits = [(seen[name] - at) / 1e6 for name, at in closed.items() if name in seen]
        return {
            "aborts": len(closed),
            "unseen": len(closed) - len(waits),
            "abort_p50_ms": quantile(waits, 0.5),
            "abort_p99_ms": quantile(waits, 0.99),
        }


def read(raw: Mapping[str, Any], unit: Unit) -> dict[str, float]:
    """Figures of a generator's report."""
    done = {
        Unit.CALL: raw.get("calls", 0),
        Unit.CHUNK: raw.get("chunks", 0),
        Unit.MEGABYTE: raw.get("sent_bytes", 0) / 1e6,
    }[unit]
    cpu_s = sum(raw.get("cpu_s", {}).values())
    figures = {"done": float(done)}
    if raw.get("seconds"):
        figures["per_s"] = done / raw["seconds"]
        figures["cores"] = cpu_s / raw["seconds"]
    if done and cpu_s:
        figures |= {"per_core_s": done / cpu_s, "cpu_us": 1e6 * cpu_s / done}
    if raw.get("reads"):
        figures["chunks_per_read"] = raw["chunks"] / raw["reads"]
    for name in ("ttfb", "delay", "total"):
        for rank, value in raw.get(f"{name}_us", {}).items():
            figures[f"{name}_{rank}_us"] = value
    return figures


def _add_errors(raw: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Errors of the generator beside count, too."""
    errors = raw.setdefault("errors", {})
    for kind, count in other.get("errors", {}).items():
        errors[kind] = errors.get(kind, 0) + count
