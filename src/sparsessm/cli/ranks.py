"""Commands that several processes do together: `torchrun --nproc-per-node 2 -m sparsessm prune ...`.

torchrun says in the environment who is who. The first process writes and prints; of the others only errors
are heard, with their number.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

PATIENCE = timedelta(
    days=7
)  # while one process solves the others wait; of one that has gone its socket tells


def number() -> int:
    """Of this process; 0 where there is one."""
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0


def count() -> int:
    """Of the processes that were started together."""
    told = os.environ.get("WORLD_SIZE", "1")
    return int(told) if told.isdecimal() else 1


@contextmanager
def together(shares: bool) -> Iterator[None]:
    """The processes find each other, where there are several.

    Args:
        shares: whether the command can be shared.

    Raises:
        ValueError: it cannot, or they do not find each other.
    """
    if count() == 1:
        yield
        return
    if not shares:
        raise ValueError(f"this command runs in one process, and {count()} were started; start it alone")
    import torch
    from torch import distributed

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        distributed.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the {count()} processes do not find each other ({error})") from None
    if number():
        sys.stdout.flush()
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.close(silent)
    try:
        yield
    finally:
        distributed.destroy_process_group()
