"""The command that measures: what the balancer costs, and what the backends give."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from balancer.cli.exits import CommandError, ExitCode
from balancer.cli.inspect import AdminUrl, ConfigFile, pause

if TYPE_CHECKING:
    from balancer.cli.bench_asking import Terms
    from balancer.cli.bench_choice import Choice
    from balancer.cli.bench_figures import Report
    from balancer.cli.bench_rounds import Call, Crowd, Sample, Turns
    from balancer.cli.client import Admin

PANEL: Final = "Inspect"
TOKENS: Final = 32
SMALL_PAIRS: Final = 50
SMALL_SHARE: Final = 0.1  # of the time, for each kind of call without tokens
TALK_SHARE: Final = 0.6  # of the time, if there are calls at once afterwards
LOAD_S: Final = 3600.0  # silence while a model is loaded
SEEN_S: Final = 10.0  # until the balancer has seen what was loaded
POLL_S: Final = 0.2


def add_to(app: typer.Typer) -> None:
    """Declare the command."""
    app.command(rich_help_panel=PANEL)(bench)


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Default: the one in memory in most places, the smallest."
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option("--rounds", "-n", min=1, help="Each with one call both ways."),
    ] = 10,
    concurrency: Annotated[
        int,
        typer.Option(
            "--concurrency",
            min=1,
            max=256,
            help="Afterwards so many callers at once, through the balancer; it may load the model "
            "in more places for them.",
        ),
    ] = 1,
    seconds: Annotated[
        float, typer.Option(min=1, help="At most so long, a load not counted.")
    ] = 60,
    load: Annotated[
        bool, typer.Option("--load", help="MODEL may be loaded if it is in memory nowhere.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also while other calls run or wait.")
    ] = False,
    admin: AdminUrl = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> int:
    """What the balancer costs in latency and tokens/s, and what each backend gives."""
    from balancer.cli import bench_figures, client

    if load and model is None:
        told = "--load needs the name of a model: ollama-balancer bench MODEL --load"
        raise CommandError(told, code=ExitCode.USAGE)
    balancer = client.find(admin, config)
    doc = balancer.status()
    _may_be_disturbed(balancer, doc, force=force)
    if model is not None and load:
        doc = _loaded(balancer, doc, model)
    wishes = _Wishes(rounds, concurrency, seconds, force=force)
    report = _measured(balancer, doc, model, wishes)
    if as_json:
        print(json.dumps(bench_figures.document(report), indent=2, ensure_ascii=False))
    else:
        print(*bench_figures.lines(report), sep="\n")
    return ExitCode.OK if report.ok else ExitCode.FAILURE


@dataclass(frozen=True, slots=True)
class _Wishes:
    """What was asked for."""

    rounds: int
    callers: int
    seconds: float
    force: bool


# -- before ------------------------------------------------------------------------------------


def _may_be_disturbed(balancer: Admin, doc: Mapping[str, Any], *, force: bool) -> None:
    from balancer.cli import bench_choice, screen

    if not screen.is_healthy(doc):
        told = f"The balancer at {balancer.url} has no healthy backend. Why: ollama-balancer doctor"
        raise CommandError(told, code=ExitCode.NO_BACKEND)
    busy = bench_choice.busy(doc)
    if busy and not force:
        told = (
            f"The fleet is busy ({busy}): figures would be wrong, and other calls slowed down. "
            "Wait, or measure nevertheless: --force"
        )
        raise CommandError(told, code=ExitCode.FAILURE)


def _loaded(balancer: Admin, doc: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    """The status once the model is in memory."""
    from balancer.cli import bench_choice, client

    if not bench_choice.needs_load(doc, model):
        return doc
    asked = {"model": model, "prompt": "", "stream": False}
    patient = replace(balancer, limit_s=LOAD_S)
    status, told = patient.ask("POST", "/api/generate", asked)
    if status != 200:
        raise CommandError(client.refusal(balancer.url, status, told), code=ExitCode.FAILURE)
    waited_s = 0.0
    while bench_choice.needs_load(doc := balancer.status(), model) and waited_s < SEEN_S:
        pause(POLL_S)
        waited_s += POLL_S
    return doc


def _goes_where_it_is_loaded(balancer: Admin, choice: Choice) -> None:
    """A call has to go to a backend that has the model in memory, now."""
    from urllib.parse import urlencode

    from balancer.cli import client
    from balancer.cli.screen import plain

    query: dict[str, Any] = {"model": choice.model}
    if choice.context is not None:
        query["num_ctx"] = choice.context
    path = f"/_balancer/explain?{urlencode(query)}"
    status, told = balancer.ask("GET", path, good="explain_version")
    if status != 200:
        raise CommandError(client.refusal(balancer.url, status, told), code=ExitCode.FAILURE)
    if told["outcome"]["kind"] in ("load", "refused"):
        text = f"{plain(choice.model)} cannot be measured now: {plain(told['outcome']['text'])}"
        raise CommandError(text, code=ExitCode.FAILURE)


# -- measuring ---------------------------------------------------------------------------------


def _measured(
    balancer: Admin, doc: Mapping[str, Any], model: str | None, wishes: _Wishes
) -> Report:
    from balancer.cli import bench_asking, bench_choice
    from balancer.cli.bench_asking import Terms
    from balancer.cli.screen import plain

    choice = bench_choice.choose(doc, model, lambda name: bench_asking.generates(balancer, name))
    _goes_where_it_is_loaded(balancer, choice)
    began = time.monotonic()
    found = {copy.backend: bench_asking.unreached(copy, choice) for copy in choice.copies}
    reachable = [name for name, why in found.items() if not why]
    notes = [*choice.notes]
    notes += [
        f"{plain(name)} is not called directly: it {why}" for name, why in found.items() if why
    ]
    run = f"{int(began * 1000) % 1_000_000:06d}"
    terms = Terms(choice, TOKENS, run, time.monotonic, began + wishes.seconds)
    report = _Session(balancer, terms, reachable, wishes, began, notes).measure()
    new = bench_choice.loaded_meanwhile(doc, balancer.status())
    told = f"loaded meanwhile, perhaps for these calls: {', '.join(new)}"
    return replace(report, notes=(*report.notes, told)) if new else report


@dataclass(slots=True)
class _Session:
    """
    One measurement: small calls, then those with tokens, then many at once.

    Args:
        notes: Grows when something is cut short.
    """

    balancer: Admin
    terms: Terms
    reachable: Sequence[str]
    wishes: _Wishes
    began: float
    notes: list[str] = field(default_factory=list)

    def measure(self) -> Report:
        """Everything, until the time is over."""
        from balancer.cli.bench_asking import Caller
        from balancer.cli.bench_figures import Report

        caller = Caller(self.balancer, self.terms)
        try:
            empties = self._small(caller.empty, SMALL_SHARE)
            partner = next((s.backend for s in empties.direct if not s.wrong), "")
            versions = self._small(_as_if_from(partner, caller.version), 2 * SMALL_SHARE)
            talks = self._talks(caller.stream)
        finally:
            caller.close()
        crowd = self._crowd() if self.wishes.callers > 1 else None
        return Report(
            balancer=self.balancer.url,
            model=self.terms.choice.model,
            context=self.terms.choice.context,
            tokens=self.terms.tokens,
            rounds=self.wishes.rounds,
            took_s=self.terms.clock() - self.began,
            talks=talks,
            empties=empties,
            versions=versions,
            crowd=crowd,
            notes=tuple(self.notes),
        )

    def _small(self, call: Call, share: float) -> Turns:
        from balancer.cli.bench_rounds import by_turns

        return by_turns(call, self.reachable, SMALL_PAIRS, lambda: self._has_time(share))

    def _talks(self, call: Call) -> Turns:
        from balancer.cli.bench_rounds import by_turns, the_others

        share = TALK_SHARE if self.wishes.callers > 1 else 1.0
        talks = by_turns(call, self.reachable, self.wishes.rounds, lambda: self._may_go_on(share))
        the_others(call, talks, self.reachable, lambda: self._may_go_on(share))
        return talks

    def _crowd(self) -> Crowd:
        from balancer.cli.bench_asking import Caller
        from balancer.cli.bench_rounds import at_once

        callers = [
            Caller(self.balancer, self.terms, f"-{number}") for number in range(self.wishes.callers)
        ]
        try:
            return at_once(
                [caller.stream for caller in callers],
                self.wishes.rounds,
                lambda: self._has_time(1.0),
                self.terms.clock,
            )
        finally:
            for caller in callers:
                caller.close()

    def _has_time(self, share: float) -> bool:
        return self.terms.clock() < self.began + share * self.wishes.seconds

    def _may_go_on(self, share: float) -> bool:
        """There is time, and nobody waits because of us."""
        if not self._has_time(share):
            self._note(f"cut short: {self.wishes.seconds:g} s are over; more: --seconds")
            return False
        waiting = 0 if self.wishes.force else self.balancer.status()["queue"]["depth"]
        if waiting:
            self._note("cut short: calls of others wait in the queue; nevertheless: --force")
        return not waiting

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _as_if_from(backend: str, call: Call) -> Call:
    """What the balancer answers itself is held against one backend."""

    def named(asked: str | None) -> Sample:
        sample = call(asked)
        return replace(sample, backend=backend) if asked is None else sample

    return named
