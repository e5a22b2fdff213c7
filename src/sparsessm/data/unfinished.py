"""What this process has begun to write and not finished.

A program that is told to end (Ctrl-C, SIGTERM) cannot rely on exceptions: one that a signal raises may come
in a destructor or a callback of a library, which swallow it. So whoever writes says here, before the first
byte, how it is undone; `cli/ending.py` calls `clear` and ends the process. Importing it is light.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_undone_by: list[Callable[[], None]] = []


@contextmanager
def undoing(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` when the block ends, however it ends, or when the process is told to end inside of it.

    Args:
        undo: takes back what is not finished and leaves what is; may be called twice, and at any line.
    """
    _undone_by.append(undo)
    try:
        yield
    finally:
        try:
            undo()
        finally:
            _undone_by.remove(undo)


def clear() -> None:
    """Undo all that is not finished, the latest first. The process must end without going on with it."""
    for undo in reversed(_undone_by):
        with suppress(Exception):  # the next one is undone all the same
            undo()
