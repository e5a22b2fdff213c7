"""What will be read soon: the system is asked to have it in its cache of files by then.

That takes neither a thread nor memory of the process, and the system may drop it again. It is advice: what
cannot be read is said by who reads it. Used by a walk over a model on the disk (`streamed.py`): while one
block computes, the next one is read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

STEP = 1 << 17
"""Bytes that are asked for at once: of a longer piece Linux reads no more than the disk takes in one turn."""


def of_file(file: Path, spans: Iterable[tuple[int, int]] | None = None) -> None:
    """Parts of a file: (first byte, bytes) of each; None: all of it."""
    if sys.platform != "linux":
        return
    with suppress(OSError):
        content = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start, count in [(0, os.fstat(content).st_size)] if spans is None else spans:
                for at in range(start, start + count, STEP):
                    size = min(STEP, start + count - at)
                    os.posix_fadvise(content, at, size, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(content)


def of_mapped(tensor: Tensor) -> None:
    """The part of a file that a tensor is mapped from; nothing of it is looked at."""
    advise = _madvise()
    if advise is None:
        return
    end = tensor.data_ptr() + tensor.nbytes
    for at in range(tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, end, STEP):
        advise(at, min(STEP, end - at), mmap.MADV_WILLNEED)


@cache
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found
