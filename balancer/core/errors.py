"""
What we refuse or fail ourselves: one small tree. Imports nothing of ours.

`dialect.render` turns any of these into the bytes the caller's client understands.
"""

from __future__ import annotations


class BalancerError(Exception):
    """
    A refusal or failure of ours, meant for the client.

    Args:
        text: For people: what, why, what to do. Shown as it is.
        retry_after_s: When trying again may help, seconds; None: no such header.
    """

    status = 500
    code = "internal_error"
    retryable = True

    def __init__(self, text: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.retry_after_s = retry_after_s


class BadRequest(BalancerError):
    """The request itself is wrong; no backend was asked."""

    status = 400
    code = "invalid_request"
    retryable = False


class OptionError(BalancerError):
    """An option of the wrong type, which Ollama reports as 500."""

    status = 500
    code = "invalid_option"
    retryable = False


class Unauthorized(BalancerError):
    """No key, or an unknown one."""

    status = 401
    code = "unauthorized"
    retryable = False


class Forbidden(BalancerError):
    """The caller may not do this."""

    status = 403
    code = "forbidden"
    retryable = False


class UnknownModel(BalancerError):
    """No known backend has the model."""

    status = 404
    code = "model_not_found"
    retryable = False


class UnknownRoute(BalancerError):
    """No such path here."""

    status = 404
    code = "route_not_found"
    retryable = False


class RequestTimeout(BalancerError):
    """The client stopped sending its request."""

    status = 408
    code = "request_timeout"


class BodyTooLarge(BalancerError):
    """The body is larger than `server.max_body`."""

    status = 413
    code = "body_too_large"
    retryable = False


class UnsupportedEncoding(BalancerError):
    """A content encoding that Ollama does not read here."""

    status = 415
    code = "unsupported_encoding"
    retryable = False


class NotServed(BalancerError):
    """A route of Ollama's that this balancer does not serve yet."""

    status = 501
    code = "not_served"
    retryable = False


class Unavailable(BalancerError):
    """Nobody can serve this now; later somebody may."""

    status = 503
    code = "unavailable"


class QueueFull(Unavailable):
    """Too many calls wait already."""

    code = "queue_full"


class QueueTimeout(Unavailable):
    """The call waited as long as it may."""

    code = "queue_timeout"


class NoBackend(Unavailable):
    """Every backend that has the model is away, broken or closed by the operator."""

    code = "no_backend"


class AttemptsExhausted(Unavailable):
    """Every backend that could be asked has failed this call."""

    code = "attempts_exhausted"


class Draining(Unavailable):
    """The balancer itself is stopping."""

    code = "draining"


class DeadlineExceeded(BalancerError):
    """The caller's own deadline, or the operator's total limit, has passed."""

    status = 504
    code = "deadline_exceeded"


class Loop(BalancerError):
    """The request has been here before."""

    status = 508
    code = "loop_detected"
    retryable = False


class CutStream(BalancerError):
    """A backend went away in the middle of an answer; told inside the stream."""

    status = 502
    code = "stream_cut"
