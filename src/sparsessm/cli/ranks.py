"""Commands that several processes do together: `torchrun --nproc-per-node 2 -m sparsessm prune ...`.

torchrun says in the environment who is who. The first process writes and prints; of the others only errors
are heard, with their number.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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


def here() -> int:
    """How many of them are on this machine."""
    told = os.environ.get("LOCAL_WORLD_SIZE", str(count()))
    return int(told) if told.isdecimal() and count() > 1 else 1


def refuse_unshared() -> None:
    """Refuse a command that several processes were started for and that they cannot share.

    Raises:
        ValueError: it is such a one.
    """
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if count() > 1 and command and command not in SHARED:
        told = f"{count()} were started; start it alone (processes share {', '.join(SHARED)})"
        raise ValueError(f"{command} runs in one process, and {told}")


def own_gpu() -> torch.device | None:
    """The GPU that no other process of this machine uses, unless a user names one; nccl demands that.

    None: there is none, or this PyTorch has no nccl.
    """
    import torch
    from torch import distributed

    if not (distributed.is_nccl_available() and torch.cuda.is_available()):
        return None
    local = os.environ.get("LOCAL_RANK", "")
    if not local.isdecimal() or here() > torch.cuda.device_count():
        return None
    return torch.device("cuda", int(local))


@contextmanager
def together(end: Callable[[BaseException], None]) -> Iterator[None]:
    """The processes find each other, where there are several.

    Args:
        end: ends this process where another one has gone; called from another thread.

    Raises:
        ValueError: they do not find each other.
    """
    if count() == 1:
        yield
        return
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    from ..architectures.ranks import join
    from .ring import Ring

    # Python's handlers do not run while native code waits: a signal ends the process then. The others have
    # nothing to clear up; when they have gone, the first one's wait ends too.
    handlers = {each: signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        store, rank, size = next(rendezvous("env://", timeout=MEETING))
        own = own_gpu()
        store.set(f"gpu/{rank}", "none" if own is None else "own")
        if any(store.get(f"gpu/{one}") != b"own" for one in range(size)):
            own = None
        how = "gloo" if own is None else "cpu:gloo,cuda:nccl"
        distributed.init_process_group(how, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        ring = Ring(store, rank, size, end)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the {count()} processes do not find each other ({error})") from None
    join(ring.why, own)
    if number() == 0:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    else:
        sys.stdout.flush()
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.close(silent)
    try:
        yield
    except BaseException as error:
        ring.leave(error)
        raise
    else:
        ring.leave(None)
    finally:
        distributed.destroy_process_group()
