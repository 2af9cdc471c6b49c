"""Exit codes, and the way a command refuses."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What scripts can rely on."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    CONFIG = 3
    BIND = 4
    NO_BACKEND = 5
    NO_ADMIN = 6
    INTERRUPTED = 130


MEANING = {
    ExitCode.OK: "ok",
    ExitCode.FAILURE: "failure",
    ExitCode.USAGE: "wrong usage",
    ExitCode.CONFIG: "configuration invalid",
    ExitCode.BIND: "cannot bind",
    ExitCode.NO_BACKEND: "no healthy backend",
    ExitCode.NO_ADMIN: "admin API unreachable",
    ExitCode.INTERRUPTED: "interrupted",
}


class CommandError(Exception):
    """A command cannot do what it was asked; each line says what, where and what to do."""

    def __init__(self, *lines: str, code: ExitCode) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
        self.code = code
