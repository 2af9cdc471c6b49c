"""
What we refuse or fail ourselves: one small tree. Imports nothing of ours.

`dialect.render` turns any of these into the bytes the caller's client understands. The tree is
also the catalogue of errors: a class's first line says when it happens, `remedy` what to do; the
documentation is printed from both (`dialect.document`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar


class BalancerError(Exception):
    """
    The balancer itself has a bug.

    Args:
        text: For people: what, why, what to do. Shown as it is.
        retry_after_s: When trying again may help, seconds; None: no such header.

    Attributes:
        code: Stands for the class, for programs; never changes its meaning.
        retryable: Whether the same request may succeed later.
        remedy: What whoever meets it should do.
        shown: Clients may meet it; False: another error is told instead.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = True
    remedy: ClassVar[str] = (
        "Report it with the line `mishap` that the log has for the request id, please."
    )
    shown: ClassVar[bool] = True

    def __init__(self, text: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.retry_after_s = retry_after_s


class BadRequest(BalancerError):
    """The request is not HTTP, not JSON, or not what the route takes; no backend was asked."""

    status = 400
    code = "invalid_request"
    retryable = False
    remedy = (
        "Correct the request; the text names what is wrong, in Ollama's words where it has any."
    )


class OptionError(BalancerError):
    """An option has the wrong type, which Ollama too reports as a 500."""

    status = 500
    code = "invalid_option"
    retryable = False
    remedy = "Correct the option that the text names."


class Unauthorized(BalancerError):
    """A key is needed and there is none, it is unknown or expired, or too many wrong ones came."""

    status = 401
    code = "unauthorized"
    retryable = False
    remedy = (
        "Send a key as the text says; new ones come from `ollama-balancer key new NAME`. After ten "
        "wrong ones wait a minute."
    )


class Forbidden(BalancerError):
    """The caller may not: role, models of its key, address, Host, Origin, rules of the backends."""

    status = 403
    code = "forbidden"
    retryable = False
    remedy = (
        "Use a key with the role admin, or ask the operator; the text names the setting. "
        "Without any text: the page (Origin) or name (Host) is a foreign one, as Ollama would "
        "say."
    )


class UnknownModel(BalancerError):
    """No backend has the model, and every one of them was asked."""

    status = 404
    code = "model_not_found"
    retryable = False
    remedy = "Check the name (the text has the closest that is there), or pull the model."


class UnknownRoute(BalancerError):
    """No backend has the route; told as Ollama tells it, in plain text."""

    status = 404
    code = "route_not_found"
    retryable = False
    shown = False
    remedy = "Correct the path, or update Ollama on the hosts."


class RequestTimeout(BalancerError):
    """The client stopped sending its request."""

    status = 408
    code = "request_timeout"
    remedy = "Send the whole body; it may pause for 30 s and must come faster than 1 KiB/s."


class BodyTooLarge(BalancerError):
    """The body is larger than `server.max_body`, or, unpacked, than Ollama's 20 MiB."""

    status = 413
    code = "body_too_large"
    retryable = False
    remedy = "Send less, or not compressed, or ask the operator to raise `server.max_body`."


class UnsupportedEncoding(BalancerError):
    """The request's body is compressed in a way that Ollama does not read here."""

    status = 415
    code = "unsupported_encoding"
    retryable = False
    remedy = "Send the body uncompressed."


class RateLimited(BalancerError):
    """The key has used up its requests, or its tokens, of this minute."""

    status = 429
    code = "rate_limit_exceeded"
    remedy = (
        "Try again as `Retry-After` says, or ask the operator to raise the limit that the text "
        "names."
    )


class NotServed(BalancerError):
    """The route is Ollama's, but has no meaning for what would answer it."""

    status = 501
    code = "not_served"
    retryable = False
    remedy = "Ask a backend directly."


class Unavailable(BalancerError):
    """What would answer is not known yet: the balancer has only just begun to ask."""

    status = 503
    code = "unavailable"
    remedy = "Try again as `Retry-After` says."


class QueueFull(Unavailable):
    """
    Too many calls wait already.

    Attributes:
        wait_s: How long the call would wait, by all that is known; None: nobody can tell.
    """

    code = "queue_full"
    remedy = (
        "Try again as `Retry-After` says, or ask the operator to raise the setting that the "
        "text names."
    )
    wait_s: float | None = None


class WaitTooLong(QueueFull):
    """The call would hardly get a slot within `queue.max_wait`, or before its own deadline."""

    code = "wait_too_long"
    remedy = (
        "Try again as `Retry-After` says; add backends or slots, raise `queue.max_wait`, or let "
        "calls wait all the same: `queue.adaptive: false`."
    )


class QueueTimeout(Unavailable):
    """The call waited `queue.max_wait` for a slot."""

    code = "queue_timeout"
    remedy = "Try again as `Retry-After` says; add backends or slots, or raise `queue.max_wait`."


class MemoryFull(Unavailable):
    """Other large requests take all of `server.replay_memory`, and none of them ended in time."""

    code = "memory_full"
    remedy = "Try again as `Retry-After` says, or ask the operator to raise `server.replay_memory`."


class NoBackend(Unavailable):
    """Every backend that has, or may have, the model is away, broken or closed by the operator."""

    code = "no_backend"
    remedy = "Try again as `Retry-After` says; the text has the reason of each backend."


class AttemptsExhausted(Unavailable):
    """Every backend that could be asked has failed this call."""

    code = "attempts_exhausted"
    remedy = "Try again as `Retry-After` says; the text has what each of them said."


class Draining(Unavailable):
    """The balancer itself is stopping."""

    code = "draining"
    remedy = "Try again as `Retry-After` says: the next instance may be there."


class DeadlineExceeded(BalancerError):
    """The caller's own deadline, or the operator's total limit, has passed."""

    status = 504
    code = "deadline_exceeded"
    remedy = (
        "Raise the client's `X-Request-Timeout`, or the operator's `timeouts.total`; a model "
        "that was being loaded may be there now."
    )


class Loop(BalancerError):
    """The request has been here before: one of the backends is the balancer itself."""

    status = 508
    code = "loop_detected"
    retryable = False
    remedy = (
        "Take the balancer's own address out of the backends; look for `OLLAMA_HOST` in its "
        "environment."
    )


class CutStream(BalancerError):
    """An answer broke off in the middle: its backend went away, or its time was up."""

    status = 502
    code = "stream_cut"
    remedy = "Ask anew if the part that came will not do: it cannot be continued."


def catalogue(kind: type[BalancerError] = BalancerError) -> Iterator[type[BalancerError]]:
    """Every error a client may meet, the general before the special."""
    if kind.shown:
        yield kind
    for special in kind.__subclasses__():
        yield from catalogue(special)
