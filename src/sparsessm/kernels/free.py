"""How much memory this machine has left for this process."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def free() -> int:
    """Bytes that this process could have now: of the machine, and of the control group that it is in."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        line = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        found = int(line[1]) * 1024 if line else found
    for most, used, cached in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        with suppress(OSError, ValueError):
            limit = int((_GROUP / most).read_text())  # "max" is no number
            stat = (_GROUP / cached).read_text()
            files = re.search(r"^(?:total_)?inactive_file (\d+)", stat, re.MULTILINE)
            taken = int((_GROUP / used).read_text()) - (int(files[1]) if files else 0)
            found = min(found, max(limit - taken, 0))
    return found
