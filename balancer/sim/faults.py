"""Trouble for a simulated host."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from balancer.sim import names

if TYPE_CHECKING:
    from collections.abc import Callable

    from balancer.sim.host import Host, SimModel

RUNNER_DIED = "an error was encountered while running the model: unexpected EOF"

StreamEnd = Literal["reset", "cut", "error", "no_done", "stall"]


@dataclass(frozen=True, slots=True)
class StreamFault:
    """How a stream ends early: after `after` records, with `text` if it is an error."""

    end: StreamEnd
    after: int
    text: str = RUNNER_DIED


@dataclass(frozen=True, slots=True)
class Failure:
    """A model that fails: while loading or once it runs, `after_s` seconds into it."""

    text: str
    status: int
    at: Literal["load", "run"]
    after_s: float


class Faults:
    """Trouble, switched on by one method each and off by `heal`.

    `host.faults.cut(3)` breaks every stream after three records until `host.faults.heal()`;
    with `times` the trouble wears off by itself. `apply` does the same from data.
    """

    def __init__(self, host: "Host") -> None:
        self._host = host
        self.on_change: Callable[[str], None] | None = None
        self.refusing = False
        self.down = False
        self._clear()

    def _clear(self) -> None:
        self.hanging = False
        self.inference_hanging = False
        self.head: bytes | None = None
        """What is sent instead of a head before the connection is reset (b"") or closed."""
        self.head_times: int | None = 0
        self.stream: StreamFault | None = None
        self.stream_times: int | None = 0
        self.failures: dict[str, Failure] = {}
        self.queue_is_full = False
        self.load_factor = 1.0
        self.token_factor = 1.0
        self.version_text: str | None = None
        self.missing_paths: frozenset[str] = frozenset()
        self.ps_delay_s = 0.0

    def apply(self, fault: str, *args: object) -> None:
        """Calls the method of that name: trouble written down as data."""
        getattr(self, fault)(*args)

    def heal(self) -> None:
        """Ends all trouble except an outage begun by `restart`."""
        thaws = self._host.frozen
        self.refusing = False
        self._clear()
        if thaws:
            self._host.thaw()
        self._host.respeed()
        self._tell("heal")

    def refuse(self) -> None:
        """Closes the listener and idle connections; running calls end in peace."""
        self.refusing = True
        self._tell("refuse")

    def hang(self) -> None:
        """Connections are accepted and read, and never answered."""
        self.hanging = True
        self._tell("hang")

    def freeze(self) -> None:
        """As SIGSTOP: everything stands still, and goes on when healed."""
        self._host.freeze()
        self._tell("freeze")

    def hang_inference(self) -> None:
        """Inference is never answered; lists and the version are."""
        self.inference_hanging = True

    def reset_head(self, times: int | None = None) -> None:
        """Resets the connection instead of answering."""
        self.head, self.head_times = b"", times

    def garbage(self, data: bytes = b"\x00\x17garbage\r\n\r\n", times: int | None = None) -> None:
        """Answers with bytes that are no HTTP, then closes."""
        self.head, self.head_times = data, times

    def reset(self, after: int, times: int | None = None) -> None:
        """Resets the connection after so many records."""
        self._end_streams("reset", after, times)

    def cut(self, after: int, times: int | None = None) -> None:
        """Closes the connection after so many records, without the last chunk."""
        self._end_streams("cut", after, times)

    def error_line(self, after: int, times: int | None = None, text: str = RUNNER_DIED) -> None:
        """The model fails after so many records: an error line, or what `/v1` makes of it."""
        self.stream, self.stream_times = StreamFault("error", after, text), times

    def no_done(self, after: int, times: int | None = None) -> None:
        """The stream ends cleanly after so many records, with no last one."""
        self._end_streams("no_done", after, times)

    def stall(self, after: int, times: int | None = None) -> None:
        """Nothing comes after so many records, until the client hangs up."""
        self._end_streams("stall", after, times)

    def fail(
        self,
        model: str,
        text: str = "llama-server process has terminated: exit status 2",
        status: int = 500,
        at: Literal["load", "run"] = "load",
        after_s: float = 0.0,
    ) -> None:
        """Every load (or run) of the model fails, `after_s` seconds after its beginning."""
        self.failures[names.parse(model).key] = Failure(text, status, at, after_s)

    def queue_full(self) -> None:
        """Every request for inference is answered 503."""
        self.queue_is_full = True

    def slow_load(self, factor: float) -> None:
        """Loads take so many times longer."""
        self.load_factor = factor

    def slow(self, factor: float) -> None:
        """Tokens take so many times longer, also in calls that are running."""
        self.token_factor = factor
        self._host.respeed()

    def slow_ps(self, delay_s: float) -> None:
        """`/api/ps` takes so long."""
        self.ps_delay_s = delay_s

    def version(self, text: str) -> None:
        """Claims to be another version."""
        self.version_text = text

    def missing(self, *paths: str) -> None:
        """Answers 404 on these paths, as an old version would."""
        self.missing_paths = frozenset(paths)

    def kill(self, model: str) -> None:
        """Kills the child that runs the model: its calls fail, the next request reloads."""
        self._host.kill(model)

    def lose(self, model: str) -> None:
        """Deletes a model from the disk; loaded it stays."""
        self._host.remove(model)

    def gain(self, model: "SimModel") -> None:
        """Puts a model on the disk."""
        self._host.add(model)

    def restart(self, down_s: float = 0.0) -> None:
        """Forgets what is loaded and drops all connections; down for `down_s` seconds."""
        self._host.restart()
        self.down = down_s > 0
        self._tell("restart")
        if self.down:
            self._host.after(down_s, self._come_back)

    def _come_back(self) -> None:
        self.down = False
        self._tell("up")

    def _end_streams(self, end: StreamEnd, after: int, times: int | None) -> None:
        self.stream, self.stream_times = StreamFault(end, after), times

    def _tell(self, what: str) -> None:
        if self.on_change is not None:
            self.on_change(what)

    def take_head(self) -> bytes | None:
        """The head fault for one more request, None if it is spared."""
        if self.head is None or self.head_times == 0:
            return None
        if self.head_times is not None:
            self.head_times -= 1
        return self.head

    def take_stream(self) -> StreamFault | None:
        """The stream fault for one more stream, None if it is spared."""
        if self.stream is None or self.stream_times == 0:
            return None
        if self.stream_times is not None:
            self.stream_times -= 1
        return self.stream
