"""
A reload: read, compare, one swap. A bad configuration changes nothing and says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from balancer.config import Config, ConfigError, diff
from balancer.core.events import ConfigApplied, ConfigRejected, Emit


@dataclass(frozen=True, slots=True)
class Reloaded:
    """
    How a reload went.

    Args:
        problems: Why it was refused; empty: it was taken over.
        changed: Dotted keys that changed.
        needs_restart: Those of them that only a restart takes over.
    """

    problems: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()


class Reload:
    """
    Args:
        read: Loads the configuration anew; raises ConfigError or OSError.
        apply: Takes it over in one turn of the loop.
    """

    def __init__(
        self,
        current: Config,
        read: Callable[[], Config],
        apply: Callable[[Config], None],
        clock: Callable[[], float],
        emit: Emit,
    ) -> None:
        self.current = current
        self._started = current
        self.loaded_at = clock()
        self.rejected: tuple[str, ...] = ()
        self._read = read
        self._apply = apply
        self._clock = clock
        self._emit = emit

    def age_s(self) -> int:
        """How long ago the configuration in force was read."""
        return round(self._clock() - self.loaded_at)

    def __call__(self) -> Reloaded:
        """Reload now."""
        try:
            new = self._read()
        except ConfigError as error:
            return self._reject(tuple(str(problem) for problem in error.problems))
        except OSError as error:
            return self._reject((f"{error.filename}: {error.strerror}",))
        difference = diff(self.current, new)
        try:
            self._apply(new)
        except ValueError as error:  # what only the whole shows to be wrong
            return self._reject((str(error),))
        except OSError as error:  # a certificate that is a file and yet no certificate
            return self._reject((f"a backend's certificate cannot be used: {error.strerror}",))
        self.current = new
        self.loaded_at = self._clock()
        self.rejected = ()
        waiting = diff(self._started, new).needs_restart
        self._emit(ConfigApplied(self._clock(), difference.changed, waiting))
        return Reloaded(changed=difference.changed, needs_restart=waiting)

    def _reject(self, problems: tuple[str, ...]) -> Reloaded:
        self.rejected = problems
        self._emit(ConfigRejected(self._clock(), problems))
        return Reloaded(problems=problems)
