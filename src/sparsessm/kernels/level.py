"""Which of the kernels run: the fastest that this CPU has, or those that SPARSESSM_KERNELS names.

Holding them at a lower level shows on one machine whether a result depends on the instruction set. The
variable is read here and not by the command line: tests, scripts and commands alike must be held before a
kernel runs. It says nothing of tensors on other devices (gpu/).
"""

from __future__ import annotations

import os
from collections.abc import Sequence


def asked(levels: Sequence[str]) -> str:
    """The level to run.

    Args:
        levels: what this CPU and this build have, slowest first.

    Raises:
        ValueError: SPARSESSM_KERNELS names another one.
    """
    name = os.environ.get("SPARSESSM_KERNELS") or levels[-1]
    if name not in levels:
        raise ValueError(f"SPARSESSM_KERNELS is {name!r}; allowed here: {', '.join(levels)}")
    return name
