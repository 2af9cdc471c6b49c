"""What the models of these tests say, whoever asks."""

from __future__ import annotations

from functools import partial

from balancer.sim.host import SimModel

SAID = (" The", " light", " ☃", " keeper", " sleeps.")
TEXT = "".join(SAID)
VECTOR = (0.0, 1.0, 0.0, 0.0)
TOOL_NAME = "get_weather"
TOOL = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def models() -> tuple[SimModel, ...]:
    """One of each kind, in no hurry to load and quick to answer."""
    model = partial(SimModel, prompt_tps=1e6, decode_tps=5000.0)
    return (
        model("llama3.2", words=SAID),
        model("tooled", capabilities=("completion", "tools")),
        model("embed", capabilities=("embedding",), vector=VECTOR),
    )
