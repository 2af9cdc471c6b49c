"""
The direct way: a call that needs no waiting, answered without a task of its own.

Laws:
- It is taken only by a request whose body is there, for which nothing has to be asked or loaded
  first; its first attempt is sent in the turn in which the request came.
- No queue, no second attempt: whatever is not simply answered goes to `Proxy.go_on`, with all
  that has happened so far. Nothing is decided here that is not decided there in the same words.
- Nothing is raised into the connection of a backend: a bug of ours is told, and ends the call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from balancer.core.domain import Purpose
from balancer.core.errors import BalancerError, QueueFull
from balancer.core.pool import Lease
from balancer.net.attempt import Attempt
from balancer.net.bodies import too_large
from balancer.net.proxy import Course, Proxy
from balancer.net.server import Exchange, Handed

_RUN: Final = Purpose.RUN
Done = Callable[[Exchange], None]
Pass = Callable[[Handed], None]


class Direct:
    """The way in."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    def take(self, exchange: Exchange, body: bytes, done: Done, hand_over: Pass) -> None:
        """
        Answer a call, or begin to.

        Args:
            done: Told when it has been answered, perhaps at once.
            hand_over: Lets a task go on with it instead.

        Raises:
            BalancerError: It is refused.
        """
        proxy = self._proxy
        if len(body) > proxy.settings.max_body:
            raise too_large(proxy.settings.max_body)
        exchange.hold = proxy.memory.hold(len(body))
        call = proxy.identify(exchange, body)
        if (
            call.purpose is not _RUN
            or call.deadline is not None
            or call.route.optional
            or proxy.stopping
            or proxy.settings.aliases.find(call.key.model) is not None
        ):
            hand_over(Handed(exchange, partial(proxy.answer, exchange, body)))
            return
        exchange.charge = proxy.limits.charge(call)
        course = proxy.course(exchange, proxy.placed(exchange, call))
        proxy.budget.note_call()
        try:
            grant = proxy.submit(course)
        except QueueFull as error:  # nothing follows; asked again it would count twice
            course.error = error
            hand_over(Handed(exchange, partial(proxy.go_on, exchange, course)))
            return
        except BalancerError:  # what follows from it, if anything, is found out there
            go_on = partial(proxy.go_on, exchange, course)
            hand_over(Handed(exchange, go_on))
            return
        if grant.lease is None:
            leave = partial(proxy.withdraw, exchange, course)
            go_on = partial(proxy.go_on, exchange, course)
            hand_over(Handed(exchange, go_on, leave))
            return
        course.waiting = None
        _Running(proxy, exchange, course, grant.lease, done, hand_over).send()


class _Running:
    """A call whose first attempt is under way."""

    __slots__ = ("_attempt", "_course", "_done", "_exchange", "_hand_over", "_lease", "_proxy")

    def __init__(
        self,
        proxy: Proxy,
        exchange: Exchange,
        course: Course,
        lease: Lease,
        done: Done,
        hand_over: Pass,
    ) -> None:
        self._proxy = proxy
        self._exchange = exchange
        self._course = course
        self._lease = lease
        self._done: Done | None = done
        self._hand_over = hand_over
        self._attempt: Attempt = proxy.begin(exchange, course, lease)

    def send(self) -> None:
        """Send it."""
        exchange, attempt = self._exchange, self._attempt
        exchange.request.connection.live = self
        try:
            self._proxy.send(exchange, self._course, self._lease, attempt)
        except Exception as error:  # noqa: BLE001 - a bug of ours; the lease must go back
            self._broken(error)
        else:
            attempt.then(self._decided)

    def gone(self) -> None:
        """The client has left."""
        if self._done is None:
            return
        self._proxy.gone(self._course, self._lease, self._attempt)
        self._exchange.outcome = self._exchange.outcome or "client_abort"
        self._finish()

    def held_up(self) -> None:
        """The client is behind with an answer that is written."""

    def caught_up(self) -> None:
        """It has taken nearly all of it."""
        self._finish()

    def lost(self) -> None:
        """It has left; `gone` follows."""

    def _decided(self) -> None:
        proxy, exchange, course = self._proxy, self._exchange, self._course
        if self._done is None:
            return
        try:
            relay = proxy.decided(exchange, course, self._lease, self._attempt, self._over)
        except Exception as error:  # noqa: BLE001 - told to the client, and in the log
            self._broken(error)
            return
        if relay is not None:
            return
        if course.has_failed:
            self._leave()
        else:
            self._over()

    def _broken(self, error: Exception) -> None:
        self._proxy.gone(self._course, self._lease, self._attempt)
        self._course.error = error
        self._leave()

    def _leave(self) -> None:
        if self._done is not None:
            self._done = None
            go_on = partial(self._proxy.go_on, self._exchange, self._course)
            self._hand_over(Handed(self._exchange, go_on))

    def _over(self) -> None:
        """All is written; the call is over once its client has taken it."""
        outlet = self._exchange.outlet
        if outlet.is_held_up:
            outlet.read_by(self)
        else:
            self._finish()

    def _finish(self) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(self._exchange)
