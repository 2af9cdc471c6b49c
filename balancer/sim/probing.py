"""
Our own questions to simulated hosts, in virtual time: checks, lists, trials, canaries, loads.

It does before them what the product's prober does on the wire, and tells the real core.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from balancer.core import routes, verdicts
from balancer.core.body import duration_ns
from balancer.core.dispatch import Answer, Dispatcher
from balancer.core.domain import (
    Attempt,
    CheckResult,
    Mark,
    Outcome,
    PlacementKey,
    Residency,
    Verdict,
)
from balancer.core.pool import Pool, Trial
from balancer.core.retry import repeats_crash
from balancer.core.scheduler import Load, Unload
from balancer.core.verdicts import Failure, FailureKind, Judgement
from balancer.core.watchdog import Suspect
from balancer.sim.machine import Host, Loss, Told, Work
from balancer.sim.timeline import Entry, Timeline

VERSION: Final = "0.30.1"
TIMEOUT_S: Final = 2.0
LIST_TIMEOUT_S: Final = 4 * TIMEOUT_S
TAGS_S: Final = 30.0
CANARY_S: Final = 10.0
CANARY_TOKENS: Final = 8
CANARY_TOKENS_MIDSTREAM: Final = 32
UNDECIDED_S: Final = 5.0
OK: Final = Judgement(Verdict.OK)
STOPPED: Final = Judgement(Verdict.STOPPED, text="was stopped")
OVERDUE: Final = Failure(FailureKind.OVERDUE)
AGAINST_BACKEND: Final = frozenset({Verdict.FAULT, Verdict.SLOW, Verdict.OVERDUE})
AGAINST_MODEL: Final = AGAINST_BACKEND | {Verdict.UNFIT}
ANSWERED: Final = frozenset({Verdict.CALLER, Verdict.MISSING, Verdict.UNCLEAR, Verdict.BUSY})
GENERATE: Final = routes.find("POST", "/api/generate")
ANSWERS: Final[Mapping[Loss, Answer]] = {
    Loss.BUSY: Answer(
        503,
        "application/json",
        b'{"error":"server busy, please try again.  maximum pending requests exceeded"}',
    ),
    Loss.MISSING: Answer(404, "application/json", b'{"error":"model \'m\' not found"}'),
}

Judged = Callable[[Judgement, Answer | None], None]
Rows = list[dict[str, Any]]


def judge(loss: Loss, *, committed: bool = False) -> tuple[Judgement, Answer | None]:
    """What it means that a request came to nothing, and what the host said, if it did."""
    answer = ANSWERS.get(loss)
    if answer is not None:
        return verdicts.of_answer(GENERATE, answer.status, answer.body), answer
    kind = {
        Loss.REFUSED: FailureKind.CONNECT,
        Loss.UNREACHABLE: FailureKind.CONNECT_TIMEOUT,
    }.get(loss, FailureKind.CUT if committed else FailureKind.RESET)
    failure = Failure(kind, accepted=loss is Loss.CUT)
    return verdicts.of_failure(failure, committed=committed, received=int(committed)), None


class Question:
    """One request of ours to a host, and what is to be done with its answer."""

    __slots__ = ("_host", "_limit", "_then", "_timeline", "_work")

    def __init__(
        self, host: Host, timeline: Timeline, work: Work, limit_s: float, then: Judged
    ) -> None:
        self._host = host
        self._timeline = timeline
        self._then = then
        self._work = work
        work.sink = self
        self._limit: Entry = timeline.after(limit_s, self._overdue)
        host.submit(work)

    def first(self, work: Work) -> None:
        """Its first token came: what counts is the end."""

    def ended(self, work: Work, told: Told) -> None:  # noqa: ARG002 - a sink
        """It was answered."""
        self._timeline.cancel(self._limit)
        self._then(OK, None)

    def failed(self, work: Work, loss: Loss) -> None:  # noqa: ARG002 - a sink
        """It came to nothing."""
        self._timeline.cancel(self._limit)
        self._then(*judge(loss))

    def drop(self) -> None:
        """Nobody wants to know any more."""
        self._timeline.cancel(self._limit)
        self._host.cancel(self._work)

    def _overdue(self) -> None:
        self._host.cancel(self._work)
        self._then(verdicts.of_failure(OVERDUE, committed=False, received=0), None)


class _Nobody:
    """The sink of a request that has none yet."""

    def first(self, work: Work) -> None:
        """Nothing."""

    def ended(self, work: Work, told: Told) -> None:
        """Nothing."""

    def failed(self, work: Work, loss: Loss) -> None:
        """Nothing."""


NOBODY: Final = _Nobody()


class Keeper:
    """
    Keeps what is known of one host fresh: one question at a time, each when it is due.

    Lists are read so long after they were read last, whether that was due or asked for.
    """

    def __init__(self, by: Prober, name: str, ps_interval_s: float) -> None:
        self._by = by
        self._name = name
        self._host = by.hosts[name]
        self._health = by.pool.members[name].health
        self._ps_interval_s = ps_interval_s
        self._check_at = self._ps_at = self._tags_at = math.inf
        self._is_asking = False
        self._alarm: Entry | None = None

    def begin(self, since_s: float) -> None:
        """All was read so long ago."""
        now = self._by.timeline.now
        self._check_at = now + max(0.0, self._health.due_in() - since_s)
        self._ps_at = now + self._ps_interval_s - since_s
        self._tags_at = now + TAGS_S - since_s
        self._next()

    def refresh(self) -> None:
        """Read the lists again, now, or as soon as what is being asked was answered."""
        self._ps_at = self._tags_at = self._by.timeline.now
        if not self._is_asking:
            self._next()

    def _next(self) -> None:
        """Wait for what is due next; never from within."""
        self._is_asking = False
        timeline = self._by.timeline
        if self._alarm is not None:
            timeline.cancel(self._alarm)
        at = min(self._check_at, self._ps_at, self._tags_at)
        self._alarm = timeline.at(at, self._due)

    def _due(self) -> None:
        self._alarm, self._is_asking = None, True
        if self._check_at <= self._by.timeline.now:
            self._by.check(self._name, self._checked)
        else:
            self._read()

    def _checked(self, result: CheckResult) -> None:
        self._by.pool.observe(self._name, result)
        self._check_at = self._by.timeline.now + self._health.due_in()
        self._read()

    def _read(self) -> None:
        """Read what is due, of a host that is well."""
        now = self._by.timeline.now
        if not self._health.up or self._health.last_error:
            self._ps_at = self._tags_at = now + self._ps_interval_s
            self._next()
        elif self._ps_at <= now:
            self._ps_at = now + self._ps_interval_s
            self._ask(self._host.ps, self._told_ps)
        else:
            self._read_tags()

    def _read_tags(self) -> None:
        now = self._by.timeline.now
        if self._tags_at <= now:
            self._tags_at = now + TAGS_S
            self._ask(self._host.tags, self._told_tags)
        else:
            self._next()

    def _ask(self, read: Callable[[], Rows], then: Callable[[Rows, float], None]) -> None:
        timeline, host = self._by.timeline, self._host
        if host.is_alive:
            timeline.after(host.answer_s, then, read(), timeline.now)
        else:
            timeline.after(host.answer_s if host.is_refusing else LIST_TIMEOUT_S, self._untold)

    def _told_ps(self, rows: Rows, asked_at: float) -> None:
        self._by.pool.note_ps(self._name, rows, asked_at)
        self._read_tags()

    def _told_tags(self, rows: Rows, asked_at: float) -> None:
        self._by.pool.note_tags(self._name, rows, asked_at)
        self._next()

    def _untold(self) -> None:
        """A check is to look after it."""
        self._check_at = self._by.timeline.now
        self._next()


class Prober:
    """
    Keeps what the pool knows of the hosts fresh.

    Args:
        models: The hosts' names of models, by canonical name.
        ps_interval_s: Between two readings of what is in memory.

    Attributes:
        trials: Under way, by backend and model.
        loads: Detached loads under way, by backend.
    """

    def __init__(
        self,
        hosts: Mapping[str, Host],
        pool: Pool,
        timeline: Timeline,
        rng: random.Random,
        models: Mapping[str, str],
        ps_interval_s: float,
    ) -> None:
        self.hosts = hosts
        self.pool = pool
        self._catalog = pool.catalog
        self.timeline = timeline
        self._rng = rng
        self.models = models
        self._ps_interval_s = ps_interval_s
        self._keepers: dict[str, Keeper] = {}
        self._turns: dict[str, int] = {}
        self.trials: set[tuple[str, str | None]] = set()
        self.loads: dict[str, Loading] = {}
        self.dispatcher: Dispatcher | None = None
        self.load_limit_s = pool.settings.load_s
        pool.refresh = self.refresh
        pool.abandon = self.abandon

    def start(self) -> None:
        """
        All hosts have been looked at, as at the start of the product.

        That was within one interval ago, which chance decides, and of all at the same instant:
        from then on each is read in its own time.
        """
        since_s = self._rng.uniform(0.0, self._ps_interval_s)
        for name, host in self.hosts.items():
            self.pool.observe(name, CheckResult(True, host.answer_s, version=VERSION))
            self.pool.note_tags(name, host.tags(), 0.0)
            self.pool.note_ps(name, host.ps(), 0.0)
            keeper = self._keepers[name] = Keeper(self, name, self._ps_interval_s)
            keeper.begin(since_s)

    # -- checks and lists ----------------------------------------------------------------------

    def check(self, name: str, then: Callable[[CheckResult], None]) -> None:
        """Ask for the version."""
        host = self.hosts[name]
        if host.is_alive:
            result = CheckResult(True, host.answer_s, version=VERSION)
        elif host.is_refusing:
            result = CheckResult(False, host.answer_s, error="cannot connect", connected=False)
        else:
            result = CheckResult(
                False, TIMEOUT_S, error="no answer in time", connected=host.listens
            )
        self.timeline.after(result.latency_s, then, result)

    def refresh(self, name: str) -> None:
        """Read a backend's lists again, now."""
        keeper = self._keepers.get(name)
        if keeper is not None:
            keeper.refresh()

    # -- trials and suspicion ------------------------------------------------------------------

    def look_around(self) -> None:
        """Trials that are due, and silences that nobody has explained."""
        for trial in self.pool.due_trials():
            self.trials.add((trial.backend, trial.model))
            self.check(trial.backend, partial(self._tried, trial))
        for suspect in self.pool.suspects():
            self._question(suspect)

    def _tried(self, trial: Trial, check: CheckResult) -> None:
        if not check.ok:
            self._decide(trial, Judgement(Verdict.FAULT, text=check.error), None)
            return
        resident, wanted = self._canary_model(trial), self._wanted(trial)
        decide = partial(self._decide, trial)
        if resident is not None:
            tokens = CANARY_TOKENS_MIDSTREAM if trial.midstream else CANARY_TOKENS
            self._canary(trial.backend, resident, tokens, decide)
        elif wanted is not None:
            if self.pool.take_token(trial.backend, wanted, "trial of a breaker", trial=True):
                self._begin(Loading(self, trial.backend, wanted, then=decide))
            else:
                self._decide(trial, STOPPED, None)
        elif trial.model is None and trial.backend not in self.loads:
            self._decide(trial, OK, None)
        else:
            self._decide(trial, STOPPED, None)

    def _decide(self, trial: Trial, judgement: Judgement, _: Answer | None) -> None:
        mark = _mark(trial, judgement)
        delay_s = UNDECIDED_S if mark is Mark.NEITHER else 0.0
        self.timeline.after(delay_s, self._settle, trial, mark, judgement.text)

    def _settle(self, trial: Trial, mark: Mark, text: str) -> None:
        self.trials.discard((trial.backend, trial.model))
        trial.permit.settle(mark, 1, text)
        self._kick()

    def _canary_model(self, trial: Trial) -> PlacementKey | None:
        backend = trial.backend
        asked = self.pool.members[backend].asked
        loaded = [trial.model] if trial.model is not None else self._catalog.loaded(backend)
        turn = self._turns[backend] = self._turns.get(backend, -1) + 1
        keys = (self._catalog.resident_options(backend, m) or asked.get(m) for m in loaded)
        fit = [
            key
            for key in keys
            if key is not None and self._catalog.residency(backend, key) is Residency.LOADED
        ]
        return fit[turn % len(fit)] if fit else None

    def _wanted(self, trial: Trial) -> PlacementKey | None:
        member = self.pool.members[trial.backend]
        if member.loading is not None:
            return None
        if trial.model is not None:
            return member.asked.get(trial.model)
        return next(reversed(member.asked.values()), None)

    def _canary(self, backend: str, key: PlacementKey, tokens: int, then: Judged) -> None:
        output = 0 if self._catalog.is_embedding_only(key.model) else tokens
        work = Work(self.models[key.model], NOBODY, 1, output)
        Question(self.hosts[backend], self.timeline, work, CANARY_S, then)

    def _question(self, suspect: Suspect) -> None:
        """Is a load under way, is it slow, or is it stuck?"""
        host = self.hosts[suspect.backend]
        if host.is_alive:
            now = self.timeline.now
            self.timeline.after(host.answer_s, self._told_ps, suspect, host.ps(), now)
        else:
            self.check(suspect.backend, partial(self._untold, suspect))

    def _untold(self, suspect: Suspect, check: CheckResult) -> None:
        silent = f"silent for {suspect.silent_s:.0f} s"
        if not check.ok:
            self.pool.convict(suspect, f"{silent}, {check.error}")
        else:
            self._question(suspect)

    def _told_ps(self, suspect: Suspect, rows: list[object], asked_at: float) -> None:
        backend, model = suspect.backend, suspect.model
        self.pool.note_ps(backend, rows, asked_at)
        if self._catalog.resident(backend, model) is None:
            self.pool.acquit(suspect, answered=False)
            return
        key = self._catalog.resident_options(backend, model) or PlacementKey(model)
        self._canary(backend, key, CANARY_TOKENS, partial(self._canary_told, suspect))

    def _canary_told(self, suspect: Suspect, judgement: Judgement, _: Answer | None) -> None:
        if judgement.verdict in ANSWERED | {Verdict.OK}:
            self.pool.acquit(suspect, answered=judgement.verdict is Verdict.OK)
        elif suspect.excused:
            self.pool.acquit(suspect, answered=True)
        else:
            text = f"silent for {suspect.silent_s:.0f} s, and a canary was not answered"
            self.pool.convict(suspect, text)

    # -- loads ---------------------------------------------------------------------------------

    def load(self, load: Load) -> None:
        """Carry out a detached load whose token was taken."""
        self._begin(Loading(self, load.backend, load.key, load=load))

    def _begin(self, loading: Loading) -> None:
        if loading.backend in self.loads:
            raise AssertionError(f"{loading} beside {self.loads[loading.backend]}")
        self.loads[loading.backend] = loading

    def abandon(self, name: str) -> None:
        """The backend is dead: its load ends, and whoever waited for it waits on."""
        loading = self.loads.get(name)
        if loading is not None:
            loading.stop()

    def load_over(self, loading: Loading, judgement: Judgement, answer: Answer | None) -> None:
        """Give its token back, and tell whoever asked for it."""
        now, backend, load = self.timeline.now, loading.backend, loading.load
        del self.loads[backend]
        attempts = () if load is None or load.ticket is None else load.ticket.attempts
        outcome = Outcome(
            judgement.verdict,
            loading.began_at,
            now,
            status=None if answer is None else answer.status,
            weight=judgement.weight,
            text=judgement.text,
            crash=judgement.crash,
            caused_load=not judgement.unreached,
            unreached=judgement.unreached,
            repeated_crash=judgement.crash and repeats_crash(attempts),
        )
        self.pool.end_load(backend, loading.key, outcome)
        if loading.then is not None:
            loading.then(judgement, answer)
        elif load is not None and self.dispatcher is not None:
            if judgement.verdict is Verdict.STOPPED:
                self.dispatcher.load_stopped(load)
                return
            is_fine = judgement.verdict is Verdict.OK
            attempt = None if is_fine else Attempt(len(attempts) + 1, backend, outcome)
            self.dispatcher.load_ended(load, attempt, answer, now - loading.began_at)

    def unload(self, unload: Unload) -> None:
        """Make room."""
        self.unload_now(unload.backend, unload.key)

    def unload_now(self, backend: str, key: PlacementKey) -> None:
        """Unload a model; nobody minds if that fails."""
        host = self.hosts[backend]
        if host.is_alive:
            self.timeline.after(0.0, host.unload, self.models[key.model])
            self.timeline.after(host.answer_s, self._unloaded, backend, key)

    def _unloaded(self, backend: str, key: PlacementKey) -> None:
        self._catalog.note_unloaded(backend, key.model)
        self.refresh(backend)

    def _kick(self) -> None:
        if self.dispatcher is not None:
            self.dispatcher.kick()


class Loading:
    """
    A detached load under way: unload the victims, then an empty prompt.

    Args:
        load: What the dispatcher asked for, None: a trial, which *then* hears of.
    """

    def __init__(
        self,
        by: Prober,
        backend: str,
        key: PlacementKey,
        *,
        load: Load | None = None,
        then: Judged | None = None,
    ) -> None:
        self.backend = backend
        self.key = key
        self.load = load
        self.then = then
        self.began_at = by.timeline.now
        self._by = by
        self._question: Question | None = None
        self._stopped = False
        victims = () if load is None else load.victims
        delay_s = 0.0
        for victim in victims:
            by.timeline.after(delay_s, by.unload_now, backend, victim)
            delay_s += by.hosts[backend].answer_s
        by.timeline.after(delay_s, self._send)

    def __str__(self) -> str:
        return f"load of {self.key.model} on {self.backend}"

    def stop(self) -> None:
        """Its backend is dead."""
        if self._stopped:
            return
        self._stopped = True
        if self._question is not None:
            self._question.drop()
        self._by.timeline.after(0.0, self._by.load_over, self, STOPPED, None)

    def _send(self) -> None:
        if self._stopped:
            return
        self.began_at = self._by.timeline.now
        asked = None if self.load is None else self.load.keep_alive
        told_ns = None if asked is None else duration_ns(asked)
        work = Work(
            self._by.models[self.key.model],
            NOBODY,
            keep_alive_s=_seconds(told_ns),
            is_load=True,
        )
        host = self._by.hosts[self.backend]
        limit_s = self._by.load_limit_s
        self._question = Question(host, self._by.timeline, work, limit_s, self._told)

    def _told(self, judgement: Judgement, answer: Answer | None) -> None:
        if not self._stopped:
            self._stopped = True
            self._by.load_over(self, judgement, answer)


def _seconds(nanoseconds: int | None) -> float | None:
    """A keep-alive as hosts take it: below zero is for ever."""
    if nanoseconds is None:
        return None
    return math.inf if nanoseconds < 0 else nanoseconds / 1e9


def _mark(trial: Trial, judgement: Judgement) -> Mark:
    """What a trial's end tells its breaker."""
    verdict = judgement.verdict
    if verdict is Verdict.OK or (trial.model is None and verdict in ANSWERED):
        return Mark.CREDIT
    against = AGAINST_BACKEND if trial.model is None else AGAINST_MODEL
    return Mark.BLAME if verdict in against else Mark.NEITHER
