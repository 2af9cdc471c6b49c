"""What a host's lists tell of a model, where a benchmark hands them to the pool itself."""

import random
from typing import Any


def row(name: str) -> dict[str, Any]:
    """Of a model of eight billion parameters, in the list of models or in that of loaded ones."""
    return {
        "name": name,
        "model": name,
        "modified_at": "2026-11-21T12:00:00Z",
        "expires_at": "2026-11-21T12:05:00Z",
        "size": 4_900_000_000,
        "size_vram": 4_900_000_000,
        "digest": random.Random(name).randbytes(32).hex(),
        "details": {"format": "gguf", "context_length": 32768, "parameter_size": "8.0B"},
        "context_length": 4096,
    }
