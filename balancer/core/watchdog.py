"""temporary"""
from __future__ import annotations
from collections.abc import Callable, Container
from dataclasses import dataclass

@dataclass(frozen=True, slots=True)
class Suspect:
    backend: str
    model: str
    silent_s: float
    others_move: bool

class Watchdog:
    def __init__(self, clock: Callable[[], float], first_byte_s: float = 30.0) -> None:
        self.first_byte_s = first_byte_s
    def began(self, lease_id: int, backend: str, model: str, prompt_tokens: int, streaming: bool, output_tokens: int | None) -> None: ...
    def moved(self, lease_id: int) -> None: ...
    def ended(self, lease_id: int) -> None: ...
    def suspects(self, now: float, down: Container[str]) -> list[Suspect]:
        return []
    def cleared(self, backend: str, model: str) -> None: ...
