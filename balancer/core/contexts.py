"""
The operator's rules about what calls ask of a runner: how much context, and to be kept how long.

Calls for one model that ask for different contexts need different runners, and on one host these
push each other out: each call is a load. The rules bring such calls together on one runner.

Laws:
- The context is chosen when a call is identified, by what is in memory or being loaded at that
  instant where the call may go: of the runners that suffice one with a free slot, then one that is
  there already, then one that needs nothing rewritten, then the smallest.
- Only what a call would get were nothing in memory is ever loaded for it. Should the runner whose
  context it was given be gone, or be left to run dry, the call chooses anew, while it waits and
  when it goes elsewhere: else runners would take turns, each brought back by who had met it once.
- What a call gets is its placement key, and is written into its body when it goes up: on the wire
  the two never differ.
- Whoever asks for less than there is gets what is there, never less than was asked for, unless
  the rule says so. Nothing is ever kept in memory for a client that did not ask for it.
- Routes without options, ``/v1`` among them, are out of reach; so are unloads and cloud models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

from balancer.core import names
from balancer.core.body import duration_ns, tuned
from balancer.core.domain import Call, Candidate, Origin, PlacementKey, Purpose, Residency
from balancer.core.pool import Pool
from balancer.core.verdicts import is_cloud

MOST_ROUNDED: Final = 1 << 30  # tokens; beyond, no model has so many, and Ollama's numbers end soon
LEAST_DEFAULT: Final = 4096  # tokens: the smallest context that Ollama gives by itself
OPTIONED: Final = frozenset({"generate", "chat", "embed", "embeddings"})  # operations
_THERE: Final = frozenset({Residency.LOADED, Residency.ON_DISK})  # as read not long ago


class Policy(Enum):
    """What becomes of the context that a call asks for."""

    PASSTHROUGH = "passthrough"  # as asked
    REUSE = "reuse"  # a runner that suffices, else as asked, rounded up to a power of two
    PIN = "pin"  # always the default of the rule
    CLAMP = "clamp"  # at most the most of the rule, then as REUSE


@dataclass(frozen=True, slots=True)
class Rule:
    """
    What holds for the calls for a model.

    Args:
        default: Tokens. With PIN what every call gets; else what a call counts as asking for that
            asks for none, None: then it asks for what its host gives by itself.
        most: Tokens, with CLAMP.
        keep_s: The longest that a call may have its model kept; None: as it asks.
    """

    policy: Policy = Policy.PASSTHROUGH
    default: int | None = None
    most: int | None = None
    keep_s: float | None = None


class Rules:
    """
    The rule for each model.

    Args:
        usual: For those that none of the others covers.
        others: Globs over names, each with its rule; the first that covers a model counts.
    """

    def __init__(self, usual: Rule | None = None, others: Sequence[tuple[str, Rule]] = ()) -> None:
        self._usual = usual or Rule()
        self._others = tuple(others)
        self.any = any(rule != Rule() for rule in (self._usual, *(rule for _, rule in others)))

    def of(self, canonical: str) -> Rule:
        """The rule for the model of that canonical name."""
        name = names.parse(canonical)
        covering = (rule for glob, rule in self._others if names.matches(glob, name))
        return next(covering, self._usual)


@dataclass(frozen=True, slots=True)
class Variant:
    """
    A runner of a call's model where the call may go, its other options being those of the call.

    Args:
        context: Tokens.
        default: Tokens a call gets there that asks for none, None: not known.
        trained: Tokens the model was made for, which no runner exceeds; None: not known.
        fits: It serves the call as it was sent.
        ready: In memory; False: being loaded.
        free: It has a slot for one more call.
    """

    context: int
    default: int | None = None
    trained: int | None = None
    fits: bool = False
    ready: bool = True
    free: bool = True

    def suffices(self, wanted: int | None, need: int) -> bool:
        """Whether it has the context *wanted*; None: what a call that *need*s so much would get."""
        if wanted is None:
            wanted = max(need, self.default or LEAST_DEFAULT)
        return self.context >= min(wanted, self.trained or wanted)


def choose(rule: Rule, asked: int | None, need: int, variants: Iterable[Variant]) -> int | None:
    """
    The context to be written into a call's options; None: they stay as they are.

    Args:
        asked: What the call asks for, None: nothing.
        need: Estimated tokens of its prompt and answer.
    """
    if rule.policy is Policy.PASSTHROUGH:
        return None
    wanted = rule.default if asked is None or rule.policy is Policy.PIN else asked
    if rule.policy is not Policy.PIN:
        if wanted is not None and rule.most is not None:
            wanted = min(wanted, rule.most)
        wanted = _shared(rule, asked, wanted, need, variants)
    return None if wanted == asked else wanted


def _shared(
    rule: Rule, asked: int | None, wanted: int | None, need: int, variants: Iterable[Variant]
) -> int | None:
    """The context of the best variant that suffices; without one a size that others will share."""
    found = []
    for variant in variants:
        as_sent = variant.fits and wanted == asked
        if as_sent or variant.suffices(wanted, need):
            rank = not variant.free, not variant.ready, not as_sent, variant.context
            found.append((rank, asked if as_sent else variant.context))
    if found:
        return min(found)[1]
    if wanted is None or wanted > MOST_ROUNDED:
        return wanted
    rounded = 1 << (wanted - 1).bit_length()
    return rounded if rule.most is None else min(rounded, rule.most)


def kept(rule: Rule, keep_alive: float | str | None) -> float | None:
    """The keep_alive, seconds, to be written in place of the one asked for; None: it stays."""
    if rule.keep_s is None or keep_alive is None:
        return None
    seconds = duration_ns(keep_alive) / 1e9 if isinstance(keep_alive, str) else keep_alive
    return rule.keep_s if seconds < 0 or seconds > rule.keep_s else None


@dataclass(frozen=True, slots=True)
class Placed:
    """
    What the rules make of a call.

    Args:
        asked: The context that it asks for, None: none.
        num_ctx: The context to be written into its options, None: they stay.
        keep_s: The keep_alive to be written, None: it stays.
        own: The key were nothing in memory, None: the same whatever is.
        anew: As for `Origin`.
    """

    key: PlacementKey
    asked: int | None
    num_ctx: int | None
    keep_s: float | None
    own: PlacementKey | None = field(default=None, compare=False)
    anew: Callable[[Call], PlacementKey] | None = field(default=None, compare=False, repr=False)


class Contexts:
    """
    The rules, applied to what is in memory now.

    Attributes:
        rules: May be exchanged.
    """

    def __init__(self, rules: Rules, pool: Pool) -> None:
        self.rules = rules
        self._pool = pool

    def place(self, call: Call, candidates: Sequence[Candidate] | None = None) -> Placed:
        """
        What *call*, as it was sent, gets.

        Args:
            candidates: Where it may go, None: to be looked up. One that does not exist, and must
                leave no trace, brings them along.
        """
        key, asked = call.key, context_of(call.key)
        if (
            call.purpose is Purpose.UNLOAD
            or call.route.operation not in OPTIONED
            or is_cloud(key.model)
        ):
            return Placed(key, asked, None, None)
        rule = self.rules.of(key.model)
        keep_s = kept(rule, call.keep_alive)
        if rule.policy in (Policy.PASSTHROUGH, Policy.PIN):
            num_ctx = choose(rule, asked, 0, ())
        else:
            if candidates is None:
                candidates = self._pool.candidates(call, frozenset())
            if any(self._pool.is_remote(c.backend, key.model) for c in candidates):
                return Placed(key, asked, None, keep_s)  # a stub has no runner
            need = call.prompt_tokens + (call.output_tokens or 0)
            num_ctx = choose(rule, asked, need, self._variants(call, candidates))
            own = _with(key, choose(rule, asked, need, ()))
            return Placed(_with(key, num_ctx), asked, num_ctx, keep_s, own, self._anew)
        return Placed(_with(key, num_ctx), asked, num_ctx, keep_s)

    def _anew(self, call: Call) -> PlacementKey:
        """The key that a call would have, came it now."""
        if call.origin is None:
            return call.key
        return self.place(replace(call, key=call.origin.sent, origin=None)).key

    def usual(self, model: str) -> PlacementKey:
        """The key, whatever is in memory, of calls for *model* (canonical) that ask for nothing."""
        num_ctx = choose(self.rules.of(model), None, 0, ())
        key = PlacementKey(model)
        return key if num_ctx is None or is_cloud(model) else sized(key, num_ctx)

    def _variants(self, call: Call, candidates: Iterable[Candidate]) -> Iterator[Variant]:
        for c in candidates:
            free = c.in_flight < c.slots
            loading = self._pool.members[c.backend].loading
            if loading is not None and loading.key.model == call.key.model:
                yield from self._coming(c.backend, call.key, loading.key, free=free)
            elif c.residency in _THERE:
                yield from self._there(c.backend, call.key, free=free)

    def _coming(
        self, backend: str, key: PlacementKey, loading: PlacementKey, *, free: bool
    ) -> Iterator[Variant]:
        """What is being loaded; what is still in memory there makes room for it."""
        context = self._pool.catalog.known_context(backend, loading)
        if loading == key:
            yield Variant(context or 0, fits=True, ready=False, free=free)
        elif context is not None and sized(loading, 0) == sized(key, 0):
            yield Variant(context, ready=False, free=free)

    def _there(self, backend: str, key: PlacementKey, *, free: bool) -> Iterator[Variant]:
        catalog = self._pool.catalog
        runner = catalog.runner(backend, key.model)
        if runner is None or runner.context is None:
            return
        fits = catalog.copy(backend, key).fits
        if fits and runner.default is None and context_of(key) is None:
            loaded = catalog.resident_options(backend, key.model)
            fits = loaded is None or context_of(loaded) is None  # else to have it written is safer
        if fits or catalog.copy(backend, sized(key, runner.context)).fits:
            yield Variant(runner.context, runner.default, runner.trained, fits=fits, free=free)


def context_of(key: PlacementKey) -> int | None:
    """The context that a key asks for, None: none."""
    return dict(key.options).get("num_ctx")


def sized(key: PlacementKey, num_ctx: int) -> PlacementKey:
    """The key with another context."""
    return PlacementKey(
        key.model, tuple(sorted((dict(key.options) | {"num_ctx": num_ctx}).items()))
    )


def _with(key: PlacementKey, num_ctx: int | None) -> PlacementKey:
    return key if num_ctx is None else sized(key, num_ctx)


def applied(call: Call, placed: Placed) -> Call:
    """The call as the rules have it, its body included but for a context that may yet change."""
    num_ctx, body, origin = placed.num_ctx, call.body, None
    if placed.own is not None and placed.anew is not None:
        if placed.keep_s is not None:
            body = tuned(body, None, placed.keep_s)
        origin = Origin(call.key, placed.own, body, placed.anew)
    elif num_ctx is None and placed.keep_s is None:
        return call
    else:
        body = tuned(body, num_ctx, placed.keep_s)
    keep_alive = call.keep_alive if placed.keep_s is None else placed.keep_s
    return replace(call, key=placed.key, keep_alive=keep_alive, body=body, origin=origin)


def written(call: Call) -> int | None:
    """Have the body of a call that goes up say what its key does: which context; None: as sent."""
    origin = call.origin
    if origin is None or call.key == origin.sent:
        if origin is not None:
            call.carry(origin.body)
        return None
    num_ctx = context_of(call.key)
    call.carry(tuned(origin.body, num_ctx, None))
    return num_ctx
