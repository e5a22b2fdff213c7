"""Standard streams that cannot end the work: closed, full, broken or ASCII, they take what they can.

Place in the flow: the first thing that the program does (ending.py), before a library keeps a stream. What
is said beside the work (stderr) is lost without a word where nobody can hear it; what is printed on stdout
raises OSError, because it may be all that a command was asked for.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import IO, Any, TextIO

from ..data.inert import visible

LAYOUT = "\n\t\r"  # controls that stay in text of libraries, whose bars return to the line's beginning


class Stream(io.TextIOWrapper):
    """A standard stream whose text is inert, whoever writes it; what it cannot encode is written out.

    Attributes:
        styled: the same stream for text that is inert already and has the terminal's colours in it.
    """

    def __init__(self, file: IO[bytes], encoding: str, lenient: bool) -> None:
        super().__init__(file, encoding, errors="backslashreplace", line_buffering=True, write_through=True)
        self._lenient = lenient
        self.styled = Styled(self)

    def write(self, text: str, /) -> int:
        """Write text without its control characters."""
        self.put(visible(text, LAYOUT))
        return len(text)

    def put(self, text: str) -> None:
        """Write text as it is.

        Raises:
            OSError: it cannot be written, and this stream is not lenient.
        """
        try:
            super().write(text)
            super().flush()
        except OSError as error:
            if not self._lenient:
                raise OSError(error.errno, f"stdout cannot be written to: {error.strerror}") from None

    def flush(self) -> None:
        """Write what waits."""
        try:
            super().flush()
        except OSError:
            if not self._lenient:
                raise


class Styled:
    """What `rich` prints to: a `Stream` that sends escapes, where they are ours."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self.encoding = stream, stream.encoding

    def write(self, text: str) -> int:
        """Write text as it is."""
        self._stream.put(text)
        return len(text)

    def flush(self) -> None:
        """Write what waits."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Whether a person watches."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The descriptor."""
        return self._stream.fileno()


def prepare() -> None:
    """Replace the standard streams; closed descriptors are filled, so that no file gets their numbers."""
    closed = set()
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            closed.add(number)
            filled = os.open(os.devnull, os.O_RDONLY)  # on which every write fails, as on what is closed
            if filled != number:
                os.dup2(filled, number)
                os.close(filled)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = _stream(sys.stdout, 1, lenient=False)
    sys.stderr = _stream(sys.stderr, 2, lenient=True)


def _stream(given: TextIO | Any, number: int, lenient: bool) -> Stream:
    """A `Stream` in the place of what Python made, which is None for a closed descriptor."""
    encoding = "utf-8"
    if given is not None:
        encoding = given.encoding or encoding
        with suppress(OSError):
            given.flush()
    raw = io.FileIO(number, "w", closefd=False)
    return Stream(io.BufferedWriter(raw), encoding, lenient)
