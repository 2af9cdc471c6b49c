"""The planner's knobs: what the bench varies; none of them is a configuration key."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

_MAY_BE_ZERO: Final = frozenset(
    {
        "decode_weight",
        "disturb_weight",
        "cache_weight",
        "eviction_weight",
        "batch_reserve",
        "prefer_s",
    }
)


@dataclass(frozen=True, slots=True)
class Knobs:
    """
    Weights and times of the plan. Seconds where the name says so.

    Args:
        decode_weight: A second of decoding against a second of waiting for the first token.
        disturb_weight: Of the delay that a call imposes on running streams.
        cache_weight: Of the tokens of a prompt that are thought to be cached.
        eviction_weight: Of what an eviction will cost those who want the model that went.
        demand_fast_s: Memory of arrivals, for copies and queueing.
        demand_slow_s: Memory of arrivals, for "is it still wanted".
        horizon_s: How far ahead an eviction is held against us.
        plan_depth: Calls looked at per placement key and pass.
        warm_keep_alive_s: Of our own loads, where the waiting call names none.
        batch_reserve: Share of a key's slots that batch may not take.
        batch_weight: Weight of batch in the fair queue.
        batch_patience_s: After this a batch call is planned like any other.
        batch_floor: Share of commits that batch gets in any case.
        triage_depth: Waiting calls per backend from which on the overload order holds.
        triage_after_s: The oldest must have waited so long for it.
        triage_patience_s: After this a call counts among the first again.
        hope_s, hope_per_token_s: Since arrival, within which a call still has hope.
        tick_s: Planning and watching without an event.
        evaluations: Full evaluations in one turn of the loop.
        decline_s: So long a call may at least hold beside a free slot.
        tier_patience_s: Cost in the higher tiers from which on a lower tier is looked at.
        prefer_s: What a preference is worth.
        embed_work_s: Predicted work in flight up to which embeddings are committed.
        drain_after_s: So long a call waits at least before a busy model is drained for it.
        copy_demand: Arrivals within `demand_fast_s` from which on copies are made ahead.
        copy_load: Share of the copies' capacity in use from which on another is made.
    """

    decode_weight: float = 0.2
    disturb_weight: float = 0.4
    cache_weight: float = 1.0
    eviction_weight: float = 1.0
    demand_fast_s: float = 120.0
    demand_slow_s: float = 1800.0
    horizon_s: float = 60.0
    plan_depth: int = 200
    warm_keep_alive_s: float = 1800.0
    batch_reserve: float = 0.10
    batch_weight: float = 0.25
    batch_patience_s: float = 60.0
    batch_floor: float = 0.10
    triage_depth: float = 3.0
    triage_after_s: float = 2.0
    triage_patience_s: float = 90.0
    hope_s: float = 1.6
    hope_per_token_s: float = 0.0007
    tick_s: float = 0.5
    evaluations: int = 24
    decline_s: float = 10.0
    tier_patience_s: float = 10.0
    prefer_s: float = 0.5
    embed_work_s: float = 1.0
    drain_after_s: float = 5.0
    copy_demand: float = 3.0
    copy_load: float = 0.6

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least_ok = value >= 0 if field.name in _MAY_BE_ZERO else value > 0
            if not least_ok:
                raise ValueError(f"{field.name} must be positive, not {value}")
