"""What building settings needs beside the values: where they stand, the files they name."""

from collections.abc import Callable, Iterator
from itertools import count

from .blocks import Block
from .layers import Layers
from .problems import Path, Problem, shown


class Sources:
    """
    The layers, the files they name, and a place for complaints.

    Args:
        layers: What was written; problems and warnings are added to it.
        refused: Paths the schema refused, and that are missing from the valid blocks.
        read_file: Returns a file's text or raises OSError.
    """

    def __init__(self, layers: Layers, refused: set[Path], read_file: Callable[[str], str]) -> None:
        self._layers = layers
        self._refused = refused
        self._read_file = read_file

    def items(self, *path: str) -> Iterator[Path]:
        """Yield without end the paths of the list's items that were not refused."""
        places: Iterator[Path] = ((*path, index) for index in count())
        return (place for place in places if place not in self._refused)

    def was_refused(self, *path: str) -> bool:
        """Whether something at or under *path* was refused, or could not be read."""
        return not self._layers.is_read or any(
            refused[: len(path)] == path for refused in self._refused
        )

    def place(self, path: Path) -> Problem:
        """Return a problem without a message: where one would stand."""
        return self._layers.problem(path, "")

    def complain(self, problem: Problem) -> None:
        """Add a problem."""
        self._layers.problems.append(problem)

    def complain_at(self, path: Path, message: str) -> None:
        """Say that something is wrong at *path*."""
        self.complain(self._layers.problem(path, message))

    def warn(self, message: str, path: Path | None = None) -> None:
        """Tell the operator of something that is allowed and probably not meant."""
        self._layers.warnings.append(str(self._layers.problem(path, message)) if path else message)

    def read(self, where: Path, file: str) -> str | None:
        """Return a file's text; None after a complaint at *where*."""
        try:
            return self._read_file(file)
        except (OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or "not a text file"
            if not self._layers.is_spoiled(where):
                self.complain_at(where, f"cannot read {shown(file)}: {reason}.")
            return None

    def secret(self, path: Path, key: str, block: Block) -> str | None:
        """Return what the block gives as *key* or by ``key_file``; None after a complaint."""
        inline = getattr(block, key)
        if inline is not None:
            return str(inline.get_secret_value())
        where, file = (*path, f"{key}_file"), str(getattr(block, f"{key}_file"))
        text = self.read(where, file)
        if text is None:
            return None
        text = text.strip()  # most tools end a file with a line break
        if text and text.isprintable():
            return text
        self.complain_at(where, f"{shown(file)} does not hold one line of text.")
        return None
