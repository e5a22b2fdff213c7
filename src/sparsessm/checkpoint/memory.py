"""How much memory there is, and how a user says how much of it may be used."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from ..kernels.free import free

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LEAST = 1 << 28


def size_of(memory: str | int) -> int:
    """The bytes of "6GB", "512 MiB" or a number of bytes.

    Raises:
        ValueError: anything else, or less than a process like this one needs.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(i?)B?", str(memory).strip(), re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise ValueError(f"memory is {memory!r}; allowed: a size such as 6GB or 512MiB")
    unit = match[2].upper()
    found = int(float(match[1]) * (_BINARY if match[3] else _UNITS)[unit])
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
