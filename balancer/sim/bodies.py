"""
Jobs as the requests of clients, and back.

A prompt has as many bytes as its tokens by the usual four, is divided into messages as its chain
is into links, and says the same again in every turn. In its last message stands which job it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from balancer.sim.jobs import Job
from balancer.sim.machine import Model

TOKEN_BYTES: Final = 4
_FRAME: Final = len('{"role":"user","content":""},')


class Bodies:
    """
    The requests of some jobs.

    Raises:
        ValueError: Two jobs end in the same link, so that one cannot tell them apart.
    """

    def __init__(self, jobs: Sequence[Job], models: Iterable[Model]) -> None:
        self.jobs = jobs
        self._embeds = frozenset(model.name for model in models if model.embedding)
        self._places = {_mark(place, job): place for place, job in enumerate(jobs)}
        if len(self._places) < len(jobs):
            raise ValueError("two jobs have the same chain")

    def of(self, place: int) -> tuple[str, bytes]:
        """The path and the body of the job at that place of the list."""
        job = self.jobs[place]
        return request(place, job, embeds=job.model in self._embeds)

    def place(self, body: Mapping[str, Any]) -> int | None:
        """Which job a request is; None: somebody else's."""
        messages = body.get("messages")
        text = messages[-1]["content"] if messages else body.get("input") or body.get("prompt")
        return self._places.get(text.partition(" ")[0] + " ") if isinstance(text, str) else None


def request(place: int, job: Job, *, embeds: bool) -> tuple[str, bytes]:
    """The path and the body of the job at that place of a list."""
    mark = _mark(place, job)
    body: dict[str, Any] = {"model": job.model}
    if embeds:
        path = "/api/embed"
        body["input"] = mark.ljust(TOKEN_BYTES * job.prompt_tokens - 2, "x")
    else:
        path = "/api/chat"
        body["messages"] = list(_messages(job, mark))
    return path, json.dumps(body, separators=(",", ":")).encode()


def _mark(place: int, job: Job) -> str:
    """What its last message begins with."""
    return _opening(job.chain[-1][0]) if job.chain else f"#{place} "


def _opening(link: int) -> str:
    return f"{link:x} "


def _messages(job: Job, mark: str) -> Iterator[dict[str, str]]:
    """One for each link: what many share is the system's, the rest alternates."""
    links = [(_opening(link), tokens) for link, tokens in job.chain] or [(mark, job.prompt_tokens)]
    written = 0
    for place, (opening, tokens) in enumerate(links):
        role = "system"
        if place >= job.shared:
            role = "assistant" if (place - job.shared) % 2 else "user"
        frame = _FRAME + len(role) - len("user")
        content = opening.ljust(TOKEN_BYTES * tokens - written - frame, "x")
        written += frame + len(content)
        yield {"role": role, "content": content}
