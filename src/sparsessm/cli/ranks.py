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

SHARED = ("prune", "eval", "analyze")
"""Commands whose work several processes share."""
PATIENCE = timedelta(days=7)
"""While one process solves the others wait; if one has gone its socket tells."""
MEETING = timedelta(minutes=10)
"""In which all must have come."""


def number() -> int:
    """Of this process; 0 where there is one."""
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0


def count() -> int:
    """Of the processes that were started together."""
    told = os.environ.get("WORLD_SIZE", "1")
    return int(told) if told.isdecimal() else 1


@contextmanager
def together() -> Iterator[None]:
    """The processes find each other, where there are several.

    Raises:
        ValueError: the command cannot be shared, or they do not find each other.
    """
    if count() == 1:
        yield
        return
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if command not in SHARED:
        told = f"{count()} were started; start it alone (processes share {', '.join(SHARED)})"
        raise ValueError(f"{command} runs in one process, and {told}")
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(rendezvous("env://", timeout=MEETING))
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
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
