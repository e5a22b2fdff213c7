"""How many threads may be asked for. Importing it is light: the command line asks before torch comes in.

More threads than processors never make anything faster; but thousands of them end the process inside the
OpenMP runtime, where no error can be caught.
"""

from __future__ import annotations

import os

# Four for each processor, as containers and affinity masks may hide some; 64 where there are few, so that a
# script written on a large machine runs on a small one.
MOST_THREADS = max(64, 4 * (os.cpu_count() or 1))


def checked_threads(threads: object) -> int | None:
    """`threads` if it is a number of threads that this machine can have, or None.

    Raises:
        ValueError: it is something else.
    """
    if threads is None:
        return None
    if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
        raise ValueError(
            f"threads is {threads!r}; allowed: a whole number from 1 to {MOST_THREADS} (this machine has "
            f"{os.cpu_count()} processors), or none"
        )
    return threads


def refuse_torch_threads() -> None:
    """Refuse a number of threads that torch was told, in Python: kernels take it over.

    Raises:
        ValueError: it is above what this machine can have.
    """
    import torch

    if (told := torch.get_num_threads()) > MOST_THREADS:
        raise ValueError(
            f"torch was told to use {told} threads; allowed: up to {MOST_THREADS} (this machine has "
            f"{os.cpu_count()} processors)"
        )
