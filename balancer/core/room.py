"""
Memory for models on one backend: what fits beside what, and what would have to go.

What is not configured is learned: what was seen to lie there whole, fits; what made others go, or
ended partly on the CPU, did not. In between, and before anything is known, it is worth a try.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from balancer.core.catalog import InMemory

GB: Final = 1_000_000_000
MOST_MODELS: Final = 3  # Ollama's own default, for each GPU
DEFAULT_CONTEXT: Final = 4096
KV_BYTES: Final = 131_072  # per token of context and slot, of a model of middling size
AMPLE: Final = 0.8  # of its memory, up to which Ollama finds room without doubt
OVERHEAD_BYTES: Final = 400_000_000
EMBED_OVERHEAD_BYTES: Final = 300_000_000


def estimate(file_bytes: int, slots: int, context: int | None, *, embeds: bool) -> int:
    """Bytes that a model takes in memory, before it was ever seen there."""
    if embeds:
        return round(1.1 * file_bytes) + EMBED_OVERHEAD_BYTES
    kv_bytes = slots * (context or DEFAULT_CONTEXT) * KV_BYTES
    return round(1.05 * file_bytes) + kv_bytes + OVERHEAD_BYTES


@dataclass(slots=True)
class Room:
    """
    One backend's.

    Attributes:
        configured: Bytes for models, None: not said.
        whole: The most that was seen there whole.
        too_much: The least that did not fit; None: not met yet.
        most_models: That are loaded at once.
    """

    configured: int | None = None
    whole: int = 0
    too_much: int | None = None
    most_models: int = MOST_MODELS
    _seen: dict[tuple[str, int | None], int] = field(default_factory=dict)

    def size(self, it: InMemory, guess: int) -> int:
        """Bytes that a runner takes: as told, else as seen before, else *guess*."""
        return it.size_bytes or self._seen.get((it.model, it.context), guess)

    def expected(self, model: str, context: int | None, guess: int) -> int:
        """Bytes that the model will take."""
        known = self._seen.get((model, context))
        if known is None and context is None:
            known = next((size for (m, _), size in self._seen.items() if m == model), None)
        return guess if known is None else known

    def fits(self, total: int, count: int) -> bool:
        """Whether so many models of so many bytes in all lie there whole, as far as is known."""
        if count > self.most_models:
            return False
        if self.configured is not None:
            return total <= self.configured
        return total <= self.whole or self.too_much is None or total < self.too_much

    def observe(self, memory: Sequence[InMemory]) -> None:
        """What lies there now."""
        for it in memory:
            if it.size_bytes:
                if len(self._seen) > 256:
                    self._seen.clear()
                self._seen[it.model, it.context] = it.size_bytes
        told = [it for it in memory if it.size_bytes]
        if not told or len(told) < len(memory):
            return
        total = sum(it.size_bytes for it in told)
        if all(it.vram_bytes >= it.size_bytes for it in told):
            self.whole = max(self.whole, total)
            if self.too_much is not None and total >= self.too_much:
                self.too_much = None  # it did fit
            self.most_models = max(self.most_models, len(told))
        elif any(it.vram_bytes for it in told):
            self.overfull(total)

    def overfull(self, total: int) -> None:
        """So many bytes did not lie there whole."""
        if total > self.whole and (self.too_much is None or total < self.too_much):
            self.too_much = total

    def pushed_out(self, total: int, count: int) -> None:
        """A load made others go that were thought to fit: so many bytes in so many models."""
        if self.configured is None:
            self.overfull(total)
        elif total <= AMPLE * self.configured and count > 1:
            self.most_models = min(self.most_models, count - 1)

    def victims(
        self,
        memory: Sequence[InMemory],
        must_go: Callable[[InMemory], bool],
        may_go: Callable[[InMemory], bool],
        cost: Callable[[InMemory], float],
        need_bytes: int,
        guess: Callable[[InMemory], int],
    ) -> list[InMemory] | None:
        """
        Who has to go for a model of *need_bytes*, the cheapest; None: there is no way.

        What fits nowhere, even alone, counts as fitting alone: Ollama leaves a part to the CPU.
        """
        sizes = {id(it): self.size(it, guess(it)) for it in memory}
        gone = [it for it in memory if must_go(it)]
        if not all(map(may_go, gone)):
            return None
        stay = [it for it in memory if it not in gone]
        spare = sorted((it for it in stay if may_go(it)), key=lambda it: (cost(it), it.model))

        def is_enough(left: Sequence[InMemory]) -> bool:
            total = sum(sizes[id(it)] for it in left) + need_bytes
            return not left or self.fits(total, len(left) + 1)

        while not is_enough(stay):
            if not spare:
                return None
            out = spare.pop(0)
            stay.remove(out)
            gone.append(out)
        for it in sorted(gone, key=lambda it: -cost(it)):
            if not must_go(it) and is_enough([*stay, it]):
                stay.append(it)
                gone.remove(it)
        return gone

    def dump(self) -> dict[str, Any]:
        """What was learned, as plain data."""
        return {"whole": self.whole, "too_much": self.too_much, "most_models": self.most_models}

    def restore(self, learned: Any) -> None:
        """Take over what was learned; what cannot be is left out."""
        if not isinstance(learned, dict):
            return
        whole, too_much = learned.get("whole"), learned.get("too_much")
        count = learned.get("most_models")
        if isinstance(whole, int) and 0 <= whole < 10**14:
            self.whole = whole
        if isinstance(too_much, int) and self.whole < too_much < 10**14:
            self.too_much = too_much
        if isinstance(count, int) and 1 <= count <= 1000:
            self.most_models = count
