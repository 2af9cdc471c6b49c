"""
The account behind a host, and the models that run elsewhere.

    sim.cloud = Cloud()                  # signed in; answers any model of any name
    sim.cloud.signed_in = False          # 401 with a signin_url
    sim.cloud.refusal = (429, "…")       # what every call gets: a limit, an outage
    sim.cloud.cut_after = 3              # an answer ends after so many tokens, without a last word

An answer comes at once and whole: no GPU here works on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from balancer.sim import gojson
from balancer.sim.host import SimModel

WORDS = ("From", " far", " away", ".")
SIGNIN_URL = "https://ollama.com/connect?name=sim&key=c3NoLWVkMjU1MTkgQUFBQQ"
ME: Mapping[str, Any] = {"id": "1", "email": "a@example.org", "name": "a", "plan": "free"}
FOUND = {"results": [{"title": "t", "url": "https://x.example", "content": "c"}]}
RECOMMENDED = {"recommendations": [{"model": "kimi-k3:cloud", "description": "Far away"}]}


@dataclass(slots=True)
class Cloud:
    """What ollama.com makes of one host's key, and of calls it passes on."""

    signed_in: bool = True
    refusal: tuple[int, str] | None = None
    """Status and body of every answer to a call on a model or to a search."""
    cut_after: int | None = None
    model: SimModel = field(default_factory=lambda: SimModel("far", load_s=0.0, words=WORDS))
    """What any of them says and can."""

    @property
    def against(self) -> tuple[int, str] | None:
        """Status and body of a refusal, if there is one."""
        if self.signed_in:
            return self.refusal
        return 401, gojson.encode({"error": "unauthorized", "signin_url": SIGNIN_URL})
