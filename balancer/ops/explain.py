"""
What would become of a call for a model, and why: a dry run that leaves no trace.

The document's shape has version 1: fields may be added, none changes its meaning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from balancer.core import names, routes
from balancer.core.body import read
from balancer.core.contexts import Contexts, Placed, context_of
from balancer.core.decisions import Decision, Decisions, listed
from balancer.core.dispatch import Dispatcher, Forecast
from balancer.core.domain import Call, Principal, Purpose, Residency, Role
from balancer.core.errors import BadRequest, Forbidden, UnknownModel
from balancer.core.pool import Pool, Standing
from balancer.core.scheduler import Option
from balancer.core.sharing import ANONYMOUS, Share, Sharing

NOBODY = Principal("explain", Role.USER)
MOST: Final = 20  # decisions on one call
SOME: Final = 5  # on one model


class Query(Protocol):
    """What follows the question mark of a request."""

    def get(self, key: str, default: str, /) -> str:
        """The first value of that name."""

    def getall(self, key: str, default: list[str], /) -> list[str]:
        """All values of that name."""


class Explain:
    """
    Writes the document.

    Args:
        strategy: The name of the policy in force.
        decisions: What was decided of late.
        principal: The owner of a key by its name.
        sharing: Whose share calls use up.
    """

    def __init__(
        self,
        pool: Pool,
        dispatcher: Dispatcher,
        clock: Callable[[], float],
        strategy: Callable[[], str],
        contexts: Contexts,
        decisions: Decisions,
        principal: Callable[[str], Principal | None],
        sharing: Callable[[], Sharing],
    ) -> None:
        self._decisions = decisions
        self._principal = principal
        self._sharing = sharing
        self._contexts = contexts
        self._pool = pool
        self._dispatcher = dispatcher
        self._clock = clock
        self._strategy = strategy

    def __call__(self, query: Query) -> dict[str, Any]:
        """
        Explain ``model``, perhaps with ``num_ctx``, ``prompt_tokens``, ``key``, ``session``, and
        some ``exclude``; or ``call``, by its request id, if it waits or was decided on of late.

        Raises:
            BadRequest: No model, or not the name of one, or a number that is none; no such key,
                call or backend.
        """
        now, asked = self._clock(), query.get("call", "")
        excluded = frozenset(query.getall("exclude", []))
        for name in sorted(excluded - self._pool.members.keys()):
            raise BadRequest(f"There is no backend {name[:64]!r}.")
        waiting = self._dispatcher.waiting()
        own = next((ticket for ticket in waiting if asked and ticket.call.id == asked), None)
        past = self._decisions.of(lambda each: each.call == asked, MOST) if asked else []
        if own is not None:
            told = self._dispatcher.forecast(own.call, own.excluded, own)
            return self._document(own.call, told, own.excluded, past) | {
                "call": {"id": asked, "waits": True, "waited_s": round(now - own.queued_at, 1)}
            }
        if asked and not past:
            raise BadRequest(f"No call {asked[:64]!r} waits, nor was one decided on of late.")
        call = self._call(query, past[0].key.model if past else query.get("model", ""))
        principal, forbidden = call.principal, ""
        if not names.covered(principal.models, call.key.model):
            forbidden = f"The key {principal.name!r} may use: {', '.join(principal.models)}."
        alias = self._pool.catalog.aliases.find(call.key.model)
        if alias is not None:
            calls = [self._call(query, model) for model in alias.models]
            call = calls[self._dispatcher.choose(calls, exists=False)]
        if past:
            call, placed = replace(call, key=past[0].key), None
        else:
            standings = self._pool.standings(call, frozenset())
            placed = self._contexts.place(call, [s.candidate for s in standings if s.bar is None])
            call = replace(call, key=placed.key)
        told = self._dispatcher.forecast(call, excluded)
        if told.status == UnknownModel.status and alias is not None:
            told = replace(told, text=alias.absent(told.text))
        if forbidden:
            told = replace(
                told,
                kind="refused",
                status=Forbidden.status,
                backend="",
                wait_s=math.inf,
                text=forbidden,
            )
        if not asked:
            model = call.key.model
            past = self._decisions.of(lambda each: each.key.model == model, SOME)
        doc = self._document(call, told, excluded, past, placed)
        if alias is not None:
            doc["alias"] = {"name": alias.name, "models": alias.models}
        return doc | {"call": {"id": asked, "waits": False, "waited_s": None} if asked else None}

    def _document(
        self,
        call: Call,
        told: Forecast,
        excluded: frozenset[str],
        past: Sequence[Decision],
        placed: Placed | None = None,
    ) -> dict[str, Any]:
        standings = {each.backend: each for each in self._pool.standings(call, excluded)}
        rows = [
            self._row(standings.pop(option.backend), call, order, option)
            for order, option in enumerate(told.options, 1)
        ]
        rows += [
            self._row(standing, call, None, None, told.barred.get(standing.backend, ""))
            for standing in standings.values()
        ]
        catalog = self._pool.catalog
        waiting = [t for t in self._dispatcher.waiting() if t.call.key.model == call.key.model]
        return {
            "explain_version": 1,
            "model": catalog.shown(call.key.model),
            "alias": None,
            "options": dict(call.key.options),
            "num_ctx": self._context(call, placed),
            "prompt_tokens": told.prompt_tokens or call.prompt_tokens,
            "strategy": self._strategy(),
            "outcome": {
                "kind": told.kind,
                "status": told.status,
                "backend": told.backend or None,
                "wait_s": _finite(told.wait_s),
                "text": told.text,
            },
            "queued": len(waiting),
            "turn": None
            if told.turn is None
            else {
                "ahead": told.turn.ahead,
                "tag": round(told.turn.tag, 4),
                "virtual_time": round(told.turn.virtual, 4),
            },
            "decisions": [self._decided(each) for each in past],
            "backends": rows,
            "conflicts": catalog.conflicts().get(call.key.model, {}),
        }

    def _call(self, query: Query, model: str) -> Call:
        context, session = _number(query, "num_ctx"), query.get("session", "")
        share, principal = self._share(query.get("key", ""), named=bool(session))
        if not model:
            raise BadRequest("Say which model: ?model=NAME")
        path = "/api/embed" if self._embeds(model) else "/api/chat"
        route = routes.find("POST", path)
        if route is None:  # pragma: no cover - both are in the table
            raise BadRequest("no route")
        asked: dict[str, Any] = {"model": model}
        if context is not None:
            asked["options"] = {"num_ctx": context}
        body = json.dumps(asked).encode()
        told = read(route, body)
        return Call(
            id="explain",
            route=route,
            model=told.model,
            key=told.key,
            streaming=told.streaming,
            purpose=Purpose.RUN,
            replayable=True,
            principal=principal,
            arrived_at=self._clock(),
            deadline=None,
            body=body,
            prompt_tokens=_number(query, "prompt_tokens") or 0,
            embedding=route.operation in routes.EMBEDDING,
            fair_key=share.key_for(share.session_for(session)),
            batch=share.batch,
            session=share.session_for(session),
            owner=share.owner,
        )

    def _share(self, key: str, *, named: bool) -> tuple[Share, Principal]:
        """Whose call it would be. A session's name counts for its key, or for this machine."""
        if not key and not named:
            return Share("", "", batch=False), NOBODY
        principal = self._principal(key) if key else Principal(ANONYMOUS, Role.USER)
        if principal is None:
            raise BadRequest(f"There is no key {key[:64]!r}.")
        return self._sharing().share(principal, "127.0.0.1", "", lambda _: None), principal

    def _decided(self, decision: Decision) -> dict[str, Any]:
        """One that was made."""
        need = decision.need
        return {
            "call": decision.call,
            "attempt": decision.attempt,
            "s_ago": round(self._clock() - decision.at, 3),
            "kind": decision.kind,
            "backend": decision.backend,
            "prompt_tokens": round(need.prompt),
            "answer_tokens": round(need.answer),
            "tag": round(decision.tag, 4),
            "virtual_time": round(decision.virtual, 4),
            "knobs": decision.knobs,
            "options": [
                {"backend": each.backend, "kind": each.terms.kind.value}
                | rounded(listed(each, need))
                for each in decision.options
            ],
        }

    def _context(self, call: Call, placed: Placed | None) -> dict[str, Any]:
        """
        What the rules make of the context, and where calls that cannot ask get another one.

        Of a call that was *placed* before, it is not known what it asked for.
        """
        gets, model = context_of(call.key), call.key.model
        runners = {name: self._pool.catalog.runner(name, model) for name in self._pool.members}
        rule = self._contexts.rules.of(model)
        return {
            "policy": rule.policy.value,
            "max": rule.most,
            "asked": None if placed is None else placed.asked,
            "gets": gets,
            "rewritten": None if placed is None else placed.num_ctx is not None,
            "defaults": {
                name: runner.default
                for name, runner in runners.items()
                if gets is not None and runner is not None and runner.default not in (None, gets)
            },
        }

    def _embeds(self, model: str) -> bool:
        try:
            return self._pool.catalog.is_embedding_only(names.parse(model).canonical)
        except names.InvalidName:  # told by `read`, in Ollama's words
            return False

    def _row(
        self,
        standing: Standing,
        call: Call,
        order: int | None,
        option: Option | None,
        barred: str = "",
    ) -> dict[str, Any]:
        bar, c = standing.bar, standing.candidate
        return {
            "name": standing.backend,
            "may_serve": bar is None,
            "order": order,
            "state": self._state(standing, call, option),
            "code": "" if bar is None else bar.code,
            "reason": bar.text if bar is not None else barred if option is None else option.why,
            "kind": "" if option is None else option.kind,
            "terms": {} if option is None else rounded(option.terms),
            "victims": [
                {"model": names.display(victim.model), "evict_s": round(cost_s, 4)}
                for victim, cost_s in (() if option is None else option.victims)
            ],
            "returns_in_s": _finite(standing.returns_in_s),
            "residency": c.residency.value,
            "priority": self._pool.members[standing.backend].backend.priority,
            "in_flight": c.in_flight,
            "slots": c.slots,
            "in_flight_all": c.host_in_flight,
            "context": c.context,
            "first_byte_s": round(c.first_byte_s, 3),
        }

    def _state(self, standing: Standing, call: Call, option: Option | None) -> str:
        """What the call would find there; empty: as the residency tells."""
        if option is not None:
            return option.state + self._note(standing, call)
        is_other = standing.bar is None and self._is_other(standing, call)
        return "with other options" if is_other else ""

    def _is_other(self, standing: Standing, call: Call) -> bool:
        """Whether another variant of the model is in memory there."""
        resident = self._pool.catalog.resident(standing.backend, call.key.model) is not None
        return resident and standing.candidate.residency is Residency.ON_DISK

    def _note(self, standing: Standing, call: Call) -> str:
        """A copy that is there, and yet of no use to this call, or of less."""
        if standing.backend in self._pool.strangers(call):
            return ", of other weights: nobody with the usual ones can serve it now"
        is_other = self._is_other(standing, call)
        return " as asked for: it is with other options" if is_other else ""


def rounded(terms: Mapping[str, float]) -> dict[str, float | None]:
    """For people and JSON."""
    return {
        name: round(value, 4) if math.isfinite(value) else None for name, value in terms.items()
    }


def _finite(seconds: float) -> float | None:
    return None if math.isinf(seconds) else round(seconds, 1)


def _number(query: Query, name: str) -> int | None:
    text = query.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise BadRequest(f"{name} is a whole number of tokens, not {text[:32]!r}.")
    return int(text)
