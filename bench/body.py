"""
What it costs to read request bodies: ``python bench/body.py [ROUNDS]``.

The best of many rounds, CPU time of this process; and what reading takes of memory at its peak.
"""

import json
import random
import sys
import time
import tracemalloc
from collections.abc import Callable

from balancer.core.body import read, renamed
from balancer.core.errors import BalancerError
from balancer.core.routes import TABLE

ROUTES = {route.operation: route for route in TABLE}
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
MEGABYTE = 1_000_000


def text(rng: random.Random, size: int, separator: str = " ") -> str:
    """Prose of about so many characters."""
    return separator.join(rng.choices(WORDS, k=size // 4))[:size]


def messages(rng: random.Random, count: int, size: int, separator: str = " ") -> list[object]:
    """So many messages of so many characters."""
    roles = ("user", "assistant")
    return [{"role": roles[at % 2], "content": text(rng, size, separator)} for at in range(count)]


def base64(rng: random.Random, size: int) -> str:
    """What an image looks like."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return "".join(rng.choices(alphabet, k=64 * 1024)) * (size >> 16)


def bodies() -> dict[str, tuple[str, bytes]]:
    """By what it is: the operation and the body."""
    rng = random.Random(1)
    image = base64(rng, 20 * MEGABYTE)
    shown = [{"role": "user", "content": "what is this?", "images": [image]}]
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
    url_message = [{"role": "user", "content": [{"type": "text", "text": "what?"}, url]}]
    numbers = [rng.randrange(100_000, 128_000) for _ in range(5 * MEGABYTE // 7)]
    plain = {"model": "llama3.2:3b"}
    options = plain | {"stream": True, "keep_alive": "5m", "options": {"num_ctx": 8192}}
    made: dict[str, tuple[str, object]] = {
        "2 kB chat": ("chat", plain | {"messages": messages(rng, 4, 450), "stream": True}),
        "2 kB chat, with options": ("chat", options | {"messages": messages(rng, 4, 450)}),
        "2 kB v1 chat": ("v1_chat", plain | {"messages": messages(rng, 4, 450), "stream": True}),
        "50 kB, 40 messages": ("chat", plain | {"messages": messages(rng, 40, 1200)}),
        "200 kB, not ASCII": ("chat", plain | {"messages": messages(rng, 40, 5000, " ü ")}),
        "1 MB with escapes": ("chat", plain | {"messages": messages(rng, 400, 2500, '\n"')}),
        "20 MB image, model first": ("chat", plain | {"messages": shown}),
        "20 MB image, model last": ("chat", {"messages": shown} | plain),
        "20 MB image, v1": ("v1_chat", plain | {"messages": url_message}),
        "20 MB prose": ("generate", plain | {"prompt": text(rng, 20 * MEGABYTE)}),
        "5 MB of numbers": ("generate", plain | {"prompt": "x", "context": numbers}),
    }
    written: dict[str, tuple[str, bytes]] = {}
    for name, (operation, document) in made.items():
        ascii_only = "ASCII" not in name
        compact = json.dumps(document, separators=(",", ":"), ensure_ascii=ascii_only)
        written[name] = operation, compact.encode()
    chat = {"messages": messages(rng, 4, 450), "stream": True}
    written["2 kB chat, as Python writes it"] = "chat", json.dumps(plain | chat).encode()
    return written | hostile(image)


def hostile(image: str) -> dict[str, tuple[str, bytes]]:
    """What somebody would send to hold us up."""
    opening = b'{"model":"m","prompt":"'
    return {
        "16 MB of quotes, escaped": ("generate", opening + b'\\"' * 8 * MEGABYTE + b'"}'),
        "16 MB of pairs, then half a one": (
            "generate",
            opening + b"\\ud83d\\ude00" * (16 * MEGABYTE // 12) + b'\\ud83d"}',
        ),
        "16 MB of text, then half a pair": (
            "generate",
            opening + b"\\n" * 7 * MEGABYTE + b'\\ud83d"}',
        ),
        "20 MB of brackets": ("generate", b'{"model":"m","context":' + b"[" * 20 * MEGABYTE),
        "20 MB of strings": ("generate", b'{"model":"m","context":[' + b'"",' * 6 * MEGABYTE),
        "20 MB of fields": ("generate", b'{"model":"m"' + b',"a":1' * 3 * MEGABYTE + b"}"),
        "20 MB image, cut short": ("generate", opening + image.encode()),
        "20 MB of long runs": (
            "generate",
            opening + (b"A" * 16_000 + b"\\n") * 1250 + b'"}',
        ),
    }


def best(call: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest round."""
    call()
    started = time.process_time()
    call()
    times = max(1, int(0.02 / max(time.process_time() - started, 1e-7)))
    fastest = float("inf")
    for _ in range(rounds):
        started = time.process_time()
        for _ in range(times):
            call()
        fastest = min(fastest, (time.process_time() - started) / times)
    return fastest


def peak(call: Callable[[], object]) -> int:
    """Bytes taken on the way."""
    tracemalloc.start()
    call()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def main(rounds: int = 7) -> None:
    """Print a table."""
    print(f"{'':34}{'read, us':>12}{'peak, MB':>10}{'renamed, us':>13}{'peak, MB':>10}")
    for name, (operation, body) in bodies().items():
        route = ROUTES[operation]

        def reading(body: bytes = body, route: object = route) -> object:
            try:
                return read(route, body)  # type: ignore[arg-type]
            except BalancerError as error:
                return error

        row = f"{name:34}{best(reading, rounds) * 1e6:12,.1f}{peak(reading) / 1e6:10.1f}"
        if not isinstance(reading(), BalancerError):

            def renaming(body: bytes = body, route: object = route) -> object:
                return renamed(route, body, "", "qwen3:8b")  # type: ignore[arg-type]

            row += f"{best(renaming, rounds) * 1e6:13,.1f}{peak(renaming) / 1e6:10.1f}"
        print(row)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
