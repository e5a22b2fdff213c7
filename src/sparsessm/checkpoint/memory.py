"""How much memory there is, and how a user says how much of it may be used."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..data.foreign import bytes_of
from ..kernels.free import free

_LEAST = 1 << 28


def size_of(memory: str | int) -> int:
    """The bytes of "6GB", "512 MiB" or a number of bytes.

    Raises:
        ValueError: anything else, or less than a process like this one needs.
    """
    found = bytes_of(str(memory), "memory")
    if found < _LEAST:
        raise ValueError(f"memory is {memory!r}; allowed: at least {_LEAST >> 20}MiB")
    return found


def resident() -> int:
    """Bytes that this process has in memory; 0 where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def peak() -> int:
    """The most bytes that this process had in memory so far; where the system does not say, those of now."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/self/status").read_text().splitlines()
        for line in lines:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10
    return resident()


def allowed(memory: str | int | None) -> int:
    """What was said; half of what is free, where nothing was."""
    return max(free() // 2, _LEAST) if memory is None else size_of(memory)
