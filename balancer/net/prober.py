"""
Our own questions to the backends: checks, lists, trials and canaries, detached loads.

Laws:
- A trial of an open breaker is always a call of ours, never a user's.
- A canary can neither reload nor pin a model: it carries the runner options that are there, and
  no keep_alive; where they are not known, there is no canary.
- A detached load belongs to nobody: no client can cancel it. Only its budget ends it, or the
  backend's death.
- Silence while a model may be loading is no failure: before a canary is sent, what is in memory
  is read again.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from balancer.core import cloud, names, routes, verdicts
from balancer.core.body import duration_ns
from balancer.core.catalog import Catalog
from balancer.core.dialect import compact
from balancer.core.dispatch import Answer, Dispatcher
from balancer.core.domain import (
    Attempt,
    Call,
    CheckResult,
    Mark,
    Outcome,
    PlacementKey,
    Purpose,
    Residency,
    Route,
    Verdict,
)
from balancer.core.events import Emit, Mishap, TrialEnded
from balancer.core.pool import Loading, Pool, Trial
from balancer.core.retry import repeats_crash
from balancer.core.scheduler import Load, Unload
from balancer.core.verdicts import Failure, FailureKind, Judgement
from balancer.core.watchdog import Suspect
from balancer.net.tasks import Tasks
from balancer.net.upstream import ClientUpstream, Target, UpstreamError

TICK_S: Final = 0.5
CANARY_S: Final = 10.0
CANARY_TOKENS: Final = 8
CANARY_TOKENS_MIDSTREAM: Final = 32
UNDECIDED_S: Final = 5.0
UNLOAD_S: Final = 30.0
FAR_S: Final = 10.0  # for a check or a list over the internet
PROVIDER_LIST_S: Final = 300.0  # the least between two readings of what is not ours
# What a trial may end in that speaks against what is tried. A backend that answers, if only with
# a refusal, is well as a backend; a model's own failure says nothing of the backend.
AGAINST_BACKEND: Final = frozenset({Verdict.FAULT, Verdict.SLOW, Verdict.OVERDUE})
AGAINST_MODEL: Final = AGAINST_BACKEND | {Verdict.UNFIT}
ANSWERED: Final = frozenset({Verdict.CALLER, Verdict.MISSING, Verdict.UNCLEAR, Verdict.BUSY})
LISTS_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ProberSettings:
    """Seconds between and for our questions; None: no limit."""

    timeout_s: float = 2.0
    models_interval_s: float = 30.0
    loaded_interval_s: float = 5.0


@dataclass(slots=True)
class _Due:
    """When a backend's lists are to be read next."""

    models_at: float
    loaded_at: float
    wake: asyncio.Event


class Prober:
    """
    One task per backend keeps what we know of it fresh; one more runs trials and the watchdog.

    Args:
        targets: How each backend is reached; the upstream's, shared.
    """

    def __init__(
        self,
        settings: ProberSettings,
        pool: Pool,
        upstream: ClientUpstream,
        tasks: Tasks,
        clock: Callable[[], float],
        wall: Callable[[], datetime],
        emit: Emit,
    ) -> None:
        self.settings = settings
        self._wall = wall
        self._pool = pool
        self._catalog: Catalog = pool.catalog
        self._upstream = upstream
        self._tasks = tasks
        self._clock = clock
        self._emit = emit
        self._due: dict[str, _Due] = {}
        self._keepers: dict[str, asyncio.Task[Any]] = {}
        self._urls: dict[str, str] = {}
        self._turns: dict[str, int] = {}  # which model in memory the next canary takes
        self._loads: dict[str, asyncio.Task[Any]] = {}
        self.dispatcher: Dispatcher | None = None
        pool.refresh = self.refresh
        pool.abandon = self.abandon

    def start(self) -> None:
        """Begin to watch; `follow` tells whom."""
        self._tasks.spawn(self._tick(), "trials and watchdog")

    def follow(self) -> None:
        """Take over the pool's present members."""
        members = self._pool.members
        for name, url in list(self._urls.items()):
            if name not in members or members[name].backend.url != url:
                self._keepers.pop(name).cancel()
                self._due.pop(name)
                del self._urls[name]
                self.abandon(name)
        now = self._clock()
        for name in members:
            if name not in self._keepers:
                self._urls[name] = members[name].backend.url
                self._due[name] = _Due(now, now, asyncio.Event())
                self._keepers[name] = self._tasks.spawn(self._keep(name), f"checks of {name}")

    def refresh(self, name: str) -> None:
        """Read a backend's lists again, now."""
        due = self._due.get(name)
        if due is not None:
            due.models_at = due.loaded_at = self._clock()
            due.wake.set()

    # -- checks and lists ----------------------------------------------------------------------

    def _is_provider(self, name: str) -> bool:
        member = self._pool.members.get(name)
        return member is not None and member.backend.provider

    async def _keep(self, name: str) -> None:
        due = self._due[name]
        check_at = self._clock()
        while True:
            now = self._clock()
            next_at = min(check_at, due.loaded_at, due.models_at)
            if next_at > now:
                due.wake.clear()
                try:
                    async with asyncio.timeout(next_at - now):
                        await due.wake.wait()
                except TimeoutError:
                    pass
                continue
            member = self._pool.members.get(name)
            if member is None:
                return
            if check_at <= now:
                result = await self.check(name)
                self._pool.observe(name, result)
                check_at = self._clock() + member.health.due_in()
            if member.health.up and not member.health.last_error:
                if not await self._read_lists(name, due):
                    check_at = self._clock()
            else:
                later = self._clock() + self.settings.loaded_interval_s
                due.models_at = due.loaded_at = later

    async def look(self, name: str) -> CheckResult:
        """Make a check now, because somebody asks for it; it counts as any other."""
        result = await self.check(name)
        self._pool.observe(name, result)
        if result.ok:
            self.refresh(name)
        return result

    async def check(self, name: str) -> CheckResult:
        """Ask for the version: is it alive, and is it Ollama?"""
        began = self._clock()
        far = self._is_provider(name)
        limit_s = self.settings.timeout_s
        try:
            status, _, body = await self._ask(
                name, "GET", "/api/version", limit_s=max(limit_s, FAR_S) if far else limit_s
            )
        except UpstreamError as error:
            kind = error.failure.kind
            connected = kind not in (FailureKind.CONNECT, FailureKind.CONNECT_TIMEOUT)
            text = "no answer in time" if kind is FailureKind.OVERDUE else error.failure.text
            return CheckResult(False, self._clock() - began, error=text, connected=connected)
        latency_s = self._clock() - began
        version = _field(body, "version")
        if far and status < 500:  # it answers; of which version it is, or that we ask, is no matter
            version = version if isinstance(version, str) else cloud.VERSION
            return CheckResult(True, latency_s, version=version)
        if status != 200 or not isinstance(version, str):
            told = verdicts.error_text(body) or f"HTTP {status}, not Ollama's answer"
            return CheckResult(False, latency_s, error=verdicts.line(told))
        return CheckResult(True, latency_s, version=version)

    async def _read_lists(self, name: str, due: _Due) -> bool:
        """Read what is due; False: it was not told, so that a check should look after it."""
        now = self._clock()
        if self._is_provider(name):
            return await self._read_provider(name, due)
        if due.loaded_at <= now:
            due.loaded_at = now + self.settings.loaded_interval_s
            rows = await self._rows(name, "/api/ps")
            if rows is None:
                return self._untold(name)
            self._pool.note_ps(name, rows, now)
        if due.models_at <= now:
            due.models_at = now + self.settings.models_interval_s
            rows = await self._rows(name, "/api/tags")
            if rows is None:
                return self._untold(name)
            self._pool.note_tags(name, rows, now)
            await self._read_shows(name)
        return True

    async def _read_provider(self, name: str, due: _Due) -> bool:
        """What ollama.com lists, now and then; it has no memory of ours to tell of."""
        now = self._clock()
        due.loaded_at = math.inf
        if due.models_at <= now:
            due.models_at = now + max(self.settings.models_interval_s, PROVIDER_LIST_S)
            rows = await self._rows(name, "/api/tags", FAR_S)
            if rows is None:
                self._untold(name)  # a list that fails is no reason to check it sooner
            else:
                self._pool.note_tags(name, cloud.stubs(rows), now)
        return True

    async def explore(self, call: Call) -> None:
        """
        Ask those who have the call's model whether they have its route, where that is not known.

        A backend looks at the route before the model: but we load the model before we send the
        call. A GET of a route that takes only POST is a 405, of none a 404. Never at ollama.com,
        where whatever path a client names would be asked for with the operator's key.
        """
        feature = call.route.feature
        holders = [name for name in self._catalog.holders(call.key.model) if self._is_ours(name)]
        unknown = [name for name in holders if not self._catalog.is_route_known(name, feature)]
        await asyncio.gather(*(self._explore(name, call.route) for name in unknown))

    def _is_ours(self, name: str) -> bool:
        """Whether it is a host of ours that is up."""
        member = self._pool.members.get(name)
        return member is not None and member.health.up and not member.backend.provider

    async def _explore(self, name: str, route: Route) -> None:
        try:
            status, _, body = await self._ask(
                name, "GET", route.path, limit_s=self.settings.timeout_s
            )
        except UpstreamError:
            return
        if status == 404 and body.strip() == verdicts.UNKNOWN_ROUTE:
            self._catalog.note_no_route(name, route.feature)
        else:
            self._catalog.note_route(name, route.feature)

    async def relist(self, name: str) -> None:
        """Read what a backend has now, because something has just been changed there."""
        now = self._clock()
        rows = await self._rows(name, "/api/tags")
        if rows is not None:
            self._pool.note_tags(name, rows, now)

    async def reload_ps(self, name: str) -> None:
        """Read what a backend has in memory now, because somebody is about to change it."""
        now = self._clock()
        rows = await self._rows(name, "/api/ps", self.settings.timeout_s)
        if rows is not None:
            self._pool.note_ps(name, rows, now)

    def _untold(self, name: str) -> bool:
        if not self._catalog.settled():
            self._pool.note_failed(name)
        return False

    async def _rows(self, name: str, path: str, limit_s: float | None = None) -> list[Any] | None:
        """The rows of a list; None: it was not answered, which proves nothing."""
        try:
            status, _, body = await self._ask(
                name, "GET", path, limit_s=limit_s or 4 * self.settings.timeout_s
            )
        except UpstreamError:
            return None
        rows = _field(body, "models") if status == 200 else None
        return rows if isinstance(rows, list) else None

    async def _read_shows(self, name: str) -> None:
        """Ask once for each digest that is new here, one at a time."""
        for backend, model, digest in self._catalog.digests_without_show():
            if backend != name:
                continue
            try:
                status, _, body = await self._ask(
                    name, "POST", "/api/show", {"model": model}, limit_s=10.0
                )
            except UpstreamError:
                return
            if status == 200:
                self._catalog.note_show(digest, body)

    # -- trials and suspicion ------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self._look_around()
            except Exception as error:  # noqa: BLE001 - trials must go on, or nobody comes back
                told = f"{type(error).__name__}: {error}"
                self._emit(Mishap(self._clock(), "trials and watchdog", told))

    def _look_around(self) -> None:
        for trial in self._pool.due_trials():
            self._tasks.spawn(self._try(trial), f"trial of {trial.backend}")
        for suspect in self._pool.suspects():
            self._tasks.spawn(self._question(suspect), f"canary for {suspect.backend}")

    async def _try(self, trial: Trial) -> None:
        """Carry one trial out and settle its permit, whatever happens."""
        kind, judgement = "version", Judgement(Verdict.STOPPED)
        try:
            check = await self.check(trial.backend)
            if not check.ok:
                judgement = Judgement(Verdict.FAULT, text=check.error)
                return
            resident = self._canary_model(trial)
            wanted = self._wanted(trial)
            if resident is not None:
                kind = "canary"
                tokens = CANARY_TOKENS_MIDSTREAM if trial.midstream else CANARY_TOKENS
                judgement = await self._canary(trial.backend, resident, tokens)
                if judgement.verdict is Verdict.UNFIT:  # the next trial takes another model
                    self._catalog.note_unloaded(trial.backend, resident.model)
            elif wanted is not None:
                kind = "load"
                judgement = await self._trial_load(trial, wanted)
            elif trial.model is None and not self._is_loading(trial.backend):
                # No canary is possible and nobody asks for anything: being alive must do.
                judgement = Judgement(Verdict.OK)
            if _mark(trial, judgement) is Mark.NEITHER:
                await asyncio.sleep(UNDECIDED_S)  # the permit is kept: no second trial meanwhile
        finally:
            mark = _mark(trial, judgement)
            ok = mark is Mark.CREDIT
            trial.permit.settle(mark, 1, judgement.text)
            model = None if trial.model is None else names.display(trial.model)
            now = self._clock()
            self._emit(TrialEnded(now, trial.backend, model, kind, ok, judgement.text))
            self._kick()

    def _canary_model(self, trial: Trial) -> PlacementKey | None:
        """
        A model in memory whose options are known; the tried one, or any for the backend.

        Where somebody else has loaded it, those of calls count that would be served as it is.
        """
        member = self._pool.members.get(trial.backend)
        asked = member.asked if member is not None else {}
        loaded = [trial.model] if trial.model is not None else self._catalog.loaded(trial.backend)
        turn = self._turns.get(trial.backend, 0)
        self._turns[trial.backend] = turn + 1
        fit = []
        for model in loaded:
            key = self._catalog.resident_options(trial.backend, model) or asked.get(model)
            if key is not None and self._catalog.residency(trial.backend, key) is Residency.LOADED:
                fit.append(key)
        return fit[turn % len(fit)] if fit else None  # in turn: one that is stuck is not the host

    def _wanted(self, trial: Trial) -> PlacementKey | None:
        """What calls asked for since the trip, not in memory: to be tried by a detached load."""
        member = self._pool.members.get(trial.backend)
        if member is None or member.loading is not None:
            return None
        if trial.model is not None:
            return member.asked.get(trial.model)
        return next(reversed(member.asked.values()), None)

    def _is_loading(self, backend: str) -> bool:
        member = self._pool.members.get(backend)
        return member is not None and member.loading is not None

    async def _trial_load(self, trial: Trial, key: PlacementKey) -> Judgement:
        why = "trial of a breaker"
        if not self._pool.take_token(trial.backend, key, why, trial=True):
            return Judgement(Verdict.STOPPED, text="another load is under way")
        judgement, _ = await self._run_load(trial.backend, key, None, embed=False)
        return judgement

    async def _canary(self, backend: str, key: PlacementKey, tokens: int) -> Judgement:
        """The shortest generation on a model in memory."""
        model = names.display(key.model)
        options = dict(key.options)
        shift = options.pop("shift", None)
        context = self._catalog.context(backend, key.model)
        if context is not None:
            options["num_ctx"] = context
        body: dict[str, Any] = {"model": model}
        if self._catalog.is_embedding_only(key.model):
            path, body["input"] = "/api/embed", "1"
        else:
            path = "/api/generate"
            options["num_predict"] = tokens
            body |= {"prompt": "1", "stream": tokens > CANARY_TOKENS}
        body["options"] = options
        if shift is not None:
            body["shift"] = shift
        judgement, _ = await self._judged(backend, path, body, CANARY_S)
        return judgement

    async def _question(self, suspect: Suspect) -> None:
        """Nothing moves there: find out why, and never leave the model set aside."""
        try:
            await self._look_into(suspect)
        except BaseException:
            self._pool.acquit(suspect, answered=False)
            raise

    async def _look_into(self, suspect: Suspect) -> None:
        """Is a load under way, is it slow, or is it stuck?"""
        silent = f"silent for {suspect.silent_s:.0f} s"
        asked_at = self._clock()
        rows = await self._rows(suspect.backend, "/api/ps", self.settings.timeout_s)
        if rows is None:
            check = await self.check(suspect.backend)
            if not check.ok:
                self._pool.convict(suspect, f"{silent}, {check.error}")
                return
            asked_at = self._clock()
            rows = await self._rows(suspect.backend, "/api/ps")  # alive; it may be busy loading
        if rows is not None:
            self._pool.note_ps(suspect.backend, rows, asked_at)
            if self._catalog.resident(suspect.backend, suspect.model) is None:
                # It is being loaded, which the load budget bounds.
                self._pool.acquit(suspect, answered=False)
                return
        key = self._catalog.resident_options(suspect.backend, suspect.model)
        if key is None:
            key = self._options_in_use(suspect)
        judgement = Judgement(Verdict.SLOW)
        if key is not None:
            judgement = await self._canary(suspect.backend, key, CANARY_TOKENS)
        if judgement.verdict in (Verdict.OK, Verdict.BUSY, Verdict.CALLER, Verdict.UNCLEAR):
            self._pool.acquit(suspect, answered=judgement.verdict is Verdict.OK)
        elif suspect.excused:
            self._pool.acquit(suspect, answered=True)
        else:
            self._pool.convict(suspect, f"{silent}, and a canary was not answered")

    def _options_in_use(self, suspect: Suspect) -> PlacementKey | None:
        """The options of a call of ours that waits there: those the runner has or will have."""
        member = self._pool.members.get(suspect.backend)
        leases = member.leases if member is not None else ()
        keys = (lease.call.key for lease in leases if lease.call.key.model == suspect.model)
        return next(keys, None)

    # -- loads ---------------------------------------------------------------------------------

    def load(self, load: Load) -> None:
        """Carry out a detached load whose token was taken."""
        task = self._tasks.spawn(self._load(load), f"load of {load.key.model} on {load.backend}")
        self._loads[load.backend] = task
        token = self._token(load.backend)
        task.add_done_callback(lambda ended: self._load_over(load, token, ended))

    def _token(self, backend: str) -> Loading | None:
        member = self._pool.members.get(backend)
        return None if member is None else member.loading

    def _load_over(self, load: Load, token: Loading | None, task: asyncio.Task[Any]) -> None:
        """A load that was cancelled, perhaps before its first step, or broke by a bug of ours."""
        if not task.cancelled() and task.exception() is None:
            return
        if token is not None and self._token(load.backend) is token:  # it has not come back
            stopped = Judgement(Verdict.STOPPED, text="was stopped")
            outcome = self._outcome(stopped, self._clock(), None)
            self._pool.end_load(load.backend, load.key, outcome)
        if self._loads.get(load.backend) is task:
            del self._loads[load.backend]
        if self.dispatcher is not None:
            self.dispatcher.load_stopped(load)

    def abandon(self, name: str) -> None:
        """The backend is dead or has left: its load ends, and whoever waited for it waits on."""
        load = self._loads.pop(name, None)
        if load is not None:
            load.cancel()

    async def _load(self, load: Load) -> None:
        for victim in load.victims:  # if one stays, Ollama makes room for itself
            await self.unload_now(load.backend, victim.model)
        began = self._clock()
        ticket = load.ticket
        attempts = () if ticket is None else ticket.attempts
        asked = None if ticket is None else _keep_alive(ticket.call)
        judgement, answer = await self._run_load(
            load.backend,
            load.key,
            load.keep_alive if asked is None else asked,
            embed=ticket is not None and ticket.call.embedding,
            repeats=repeats_crash(attempts),
        )
        load_s = self._clock() - began
        attempt = None
        if judgement.verdict in (Verdict.FAULT, Verdict.MISCONFIGURED):
            answer = None  # not Ollama's own words, so not to be relayed
        if judgement.verdict is not Verdict.OK:
            outcome = self._outcome(judgement, began, answer)
            attempt = Attempt(len(attempts) + 1, load.backend, outcome)
        if self.dispatcher is not None:
            self.dispatcher.load_ended(load, attempt, answer, load_s)

    async def warm(self, name: str, model: str) -> str:
        """
        Load a model (canonical name) there because somebody asks for it.

        Who stops waiting does not stop it. What went wrong, empty: nothing.
        """
        key = self._pool.usual(model)
        if self._catalog.residency(name, key) is Residency.LOADED:
            return ""
        if not self._pool.take_token(name, key, "asked for"):
            return "another load is under way there, or a breaker is open"
        loading = self._tasks.spawn(self._warm(name, key), f"load of {model} on {name}")
        await asyncio.wait({loading})
        return str(loading.result()) if not loading.cancelled() else "was stopped"

    async def _warm(self, name: str, key: PlacementKey) -> str:
        try:
            judgement, _ = await self._run_load(name, key, None, embed=False)
        finally:
            self._kick()
        return "" if judgement.verdict is Verdict.OK else judgement.text or judgement.verdict.value

    async def _run_load(
        self,
        backend: str,
        key: PlacementKey,
        keep_alive: Any,
        *,
        embed: bool,
        repeats: bool = False,
    ) -> tuple[Judgement, Answer | None]:
        """An empty call, which loads; the token comes back whatever happens."""
        began, task = self._clock(), asyncio.current_task()
        if task is not None:
            self._loads[backend] = task
        judgement, answer = Judgement(Verdict.STOPPED, text="was stopped"), None
        options = dict(key.options)
        shift = options.pop("shift", None)
        body: dict[str, Any] = {"model": names.display(key.model)}
        if self._catalog.is_embedding_only(key.model) or embed:
            path, body["input"] = "/api/embed", []
        else:
            path, body["prompt"] = "/api/generate", ""
            body["stream"] = False
        if options:
            body["options"] = options
        if shift is not None:
            body["shift"] = shift
        if keep_alive is not None:
            body["keep_alive"] = keep_alive
        try:
            target = self._upstream.targets.get(backend)
            limit_s = None if target is None else target.load_s
            judgement, answer = await self._judged(backend, path, body, limit_s)
        finally:
            if self._loads.get(backend) is task:
                del self._loads[backend]
            outcome = self._outcome(judgement, began, answer)
            outcome = replace(outcome, repeated_crash=judgement.crash and repeats)
            self._pool.end_load(backend, key, outcome)
        return judgement, answer

    def _outcome(self, judgement: Judgement, began: float, answer: Answer | None) -> Outcome:
        return Outcome(
            verdict=judgement.verdict,
            sent_at=began,
            ended_at=self._clock(),
            status=None if answer is None else answer.status,
            weight=judgement.weight,
            text=judgement.text,
            crash=judgement.crash,
            caused_load=not judgement.unreached,
            unreached=judgement.unreached,
        )

    def unload(self, unload: Unload) -> None:
        """Make room."""
        name = f"unload of {unload.key.model} on {unload.backend}"
        self._tasks.spawn(self.unload_now(unload.backend, unload.key.model), name)

    async def unload_all(self, backends: Sequence[str], model: str) -> list[str]:
        """Unload a model (canonical name) everywhere; the names of those that failed."""
        answers = await asyncio.gather(*(self.unload_now(name, model) for name in backends))
        return [
            name
            for name, answer in zip(backends, answers, strict=True)
            if answer is None or answer.status not in (200, 404)
        ]

    def stamp(self) -> str:
        """The wall time as Ollama writes it."""
        return self._wall().isoformat().replace("+00:00", "Z")

    async def unload_now(self, backend: str, model: str) -> Answer | None:
        """Unload a model (canonical name) from one backend; its answer, None if there was none."""
        body: dict[str, Any] = {"model": names.display(model), "keep_alive": 0}
        if self._catalog.is_embedding_only(model):
            path, body["input"] = "/api/embed", []
        else:
            path, body["prompt"] = "/api/generate", ""
        try:
            status, kind, text = await self._ask(backend, "POST", path, body, limit_s=UNLOAD_S)
        except UpstreamError:
            return None
        if status == 200:
            self._catalog.note_unloaded(backend, model)
        self.refresh(backend)
        return Answer(status, kind, text)

    # -- asking --------------------------------------------------------------------------------

    async def _judged(
        self, backend: str, path: str, body: Mapping[str, Any], limit_s: float | None
    ) -> tuple[Judgement, Answer | None]:
        """Ask, and judge the answer as a call's."""
        try:
            status, kind, text = await self._ask(backend, "POST", path, body, limit_s=limit_s)
        except UpstreamError as error:
            return verdicts.of_failure(error.failure, committed=False, received=0), None
        answer = Answer(status, kind, text)
        if status == 200:
            return Judgement(Verdict.OK), answer
        route = routes.find("POST", path)
        return verdicts.of_answer(route, status, text), answer

    async def _ask(
        self,
        name: str,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        limit_s: float | None,
    ) -> tuple[int, str, bytes]:
        target: Target | None = self._upstream.targets.get(name)
        if target is None:
            raise UpstreamError(Failure(FailureKind.CONNECT, "it has left the pool"))
        if limit_s is not None and (target.connect_s is None or target.connect_s >= limit_s):
            # So that it shows whether not even a connection came about.
            target = replace(target, connect_s=0.75 * limit_s)
        data = None if body is None else compact(body)
        return await self._upstream.ask(
            target, method, path, data, limit_s=limit_s, max_bytes=LISTS_BYTES
        )

    def _kick(self) -> None:
        if self.dispatcher is not None:
            self.dispatcher.kick()


def _mark(trial: Trial, judgement: Judgement) -> Mark:
    """What a trial's end tells the breaker it was the trial of."""
    verdict = judgement.verdict
    if verdict is Verdict.OK or (trial.model is None and verdict in ANSWERED):
        return Mark.CREDIT
    against = AGAINST_BACKEND if trial.model is None else AGAINST_MODEL
    return Mark.BLAME if verdict in against else Mark.NEITHER


def _field(body: bytes, name: str) -> Any:
    """A field of a JSON object; None if it is none."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value.get(name) if isinstance(value, dict) else None


def _keep_alive(call: Call) -> Any:
    """The waiting call's, unless it would unload; the host's own default otherwise."""
    if call.keep_alive is None or call.purpose is Purpose.UNLOAD:
        return None
    if isinstance(call.keep_alive, str):
        return call.keep_alive if duration_ns(call.keep_alive) else None
    return call.keep_alive or None
