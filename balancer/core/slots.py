"""
How many calls at once each model of one backend is believed to take.

Ollama tells it nowhere, and queues what is too much out of our sight. So we try one more now and
then, and believe what we see: streams that decode side by side, not heads of answers, which may
come early.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

DEFAULT: Final = 2
MOST: Final = 64
MOST_MODELS: Final = 1000

FIRST_PROBE_S: Final = 5.0
AFTER_SUCCESS_S: Final = 5.0
BACKOFF_S: Final = 20.0
LONGEST_BACKOFF_S: Final = 1800.0
PATIENCE_S: Final = 1.5
PATIENCE_BACKLOG: Final = 4.0


@dataclass(slots=True)
class _Trying:
    """When the next probe of a model is due, and how long after it one more if it fails."""

    due: float
    backoff_s: float = BACKOFF_S


class SlotBelief:
    """
    Slots of one backend's models, as believed.

    Args:
        configured: What the operator says; nothing above is believed or tried.

    Attributes:
        edition: Grows whenever a belief may have changed.
    """

    def __init__(self, configured: int | None = None) -> None:
        self.edition = 0
        self._configured = configured
        self._believed: dict[str, int] = {}
        self._default = DEFAULT
        self._trying: dict[str, _Trying] = {}
        self._probe: tuple[str, int] | None = None  # of which model, and what was believed then

    @property
    def configured(self) -> int | None:
        """What the operator says, None: nothing."""
        return self._configured

    @configured.setter
    def configured(self, slots: int | None) -> None:
        self._configured = slots
        self.edition += 1

    @property
    def probe(self) -> str | None:
        """The model that is being probed."""
        return None if self._probe is None else self._probe[0]

    def believed(self, model: str) -> int:
        """Calls at once; of a model never seen, as many as the backend's others."""
        if self._configured is None:
            return self._believed.get(model, self._default)
        return min(self._believed.get(model, self._configured), self._configured)

    @property
    def counts(self) -> set[int]:
        """All that is believed, of whatever model."""
        return {self.believed(model) for model in ("", *self._believed)}

    # -- upwards -------------------------------------------------------------------------------

    def may_probe(self, model: str, now: float) -> bool:
        """Whether a first attempt of a generating call may go one above. One at a time."""
        trying = self._trying.get(model)
        if trying is None or self._probe is not None or now < trying.due:
            return False
        return self.believed(model) < (MOST if self._configured is None else self._configured)

    def probing(self, model: str, now: float) -> None:  # noqa: ARG002 - a probe has no time limit
        """That call goes out. It ends with its first byte, or as `undecided`."""
        self._probe = (model, self.believed(model))

    def undecided(self, model: str, now: float) -> None:
        """The probe ended before its first byte: it says nothing."""
        if self.probe == model:
            self._probe = None
            trying = self._trying.setdefault(model, _Trying(now))
            trying.due = now + trying.backoff_s

    def first_byte(self, model: str, decoding: int, now: float, was_probe: bool) -> bool:  # noqa: FBT001 - as all of it
        """
        A stream has begun to answer. True: more is believed now.

        Args:
            decoding: Our streams that have begun and not ended, this one among them. A call that
                does not stream is none: nobody sees whether it waits.
        """
        trying = self._trying.get(model)
        if trying is None:
            trying = self._try(model, now + FIRST_PROBE_S)
        if was_probe and self._probe is not None and self._probe[0] == model:
            before, self._probe = self._probe[1], None
            if decoding <= before:
                trying.due = now + trying.backoff_s
                trying.backoff_s = min(2 * trying.backoff_s, LONGEST_BACKOFF_S)
        if not self._believe_more(model, decoding):
            return False
        trying.due, trying.backoff_s = now + AFTER_SUCCESS_S, BACKOFF_S
        return True

    def _believe_more(self, model: str, decoding: int) -> bool:
        most = MOST if self._configured is None else self._configured
        if min(decoding, most) <= self.believed(model):
            return False
        self._believe(model, min(decoding, most))
        return True

    # -- downwards -----------------------------------------------------------------------------

    def starved(
        self,
        model: str,
        waiting_for_first_byte: int,
        decoding: int,
        since_s: float,
        backlog_s: float,
        now: float,
    ) -> bool:
        """
        Look whether calls wait in vain behind fewer streams than believed. True: less is believed.

        A call that waits alone waits for something else.

        Args:
            decoding: Streams that have begun and not ended; none that is only thought to.
            since_s: Since the oldest of them went, or the last first byte came, if that is later.
            backlog_s: What all their prompts should take, that being read in full length.
        """
        if waiting_for_first_byte < 1 or waiting_for_first_byte + decoding < 2:
            return False
        if since_s <= PATIENCE_S + PATIENCE_BACKLOG * backlog_s:
            return False
        observed = max(1, decoding)
        if observed >= self.believed(model):
            return False
        self._believe(model, observed)
        trying = self._trying.get(model) or self._try(model, now)
        trying.due = max(trying.due, now + trying.backoff_s)
        return True

    # -- what is kept --------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """What is believed, as plain JSON."""
        return {"believed": dict(self._believed)}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take up what `dump` gave, but for what cannot be."""
        believed = kept.get("believed")
        for model, slots in believed.items() if isinstance(believed, dict) else ():
            if isinstance(slots, int) and not isinstance(slots, bool) and 1 <= slots <= MOST:
                self._believe(model, slots)

    def _believe(self, model: str, slots: int) -> None:
        self._believed.pop(model, None)
        self._believed[model] = slots
        if len(self._believed) > MOST_MODELS:
            del self._believed[next(iter(self._believed))]
        self._default = max(self._believed.values())
        self.edition += 1

    def _try(self, model: str, due: float) -> _Trying:
        if len(self._trying) >= MOST_MODELS:
            del self._trying[next(iter(self._trying))]
        self._trying[model] = _Trying(due)
        return self._trying[model]
