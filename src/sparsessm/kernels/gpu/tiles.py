"""What the launches share: how a kernel's state is cut into tiles, and what of a tensor is handed over.

A tile has the states first and the channels last, so that channels are the lanes of a warp, as they are the
lanes of a vector on the CPU: a warp reads 32 channels of a token in one piece, and the sum over the states,
which every step needs, stays inside a thread as long as a tile has one warp.

Sizes depend on shapes alone, never on the device or on a clock: the same inputs give the same bits on the
same kind of GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

CHANNELS, WARPS = 32, 8  # of a tile, at most
WARP = 32  # threads


class Tile(NamedTuple):
    """States and channels of a tile, and the warps that share it."""

    states: int
    channels: int
    warps: int


def tile(states: int, each: int = 16) -> Tile:
    """For so many states, in a power of two; a thread has at most `each` numbers, as far as 8 warps and 8
    channels allow it. What a thread has several times over must be few, or its registers do not hold it."""
    held = power_of_two(states)
    channels = min(CHANNELS, max(8, WARPS * WARP * each // held))
    return Tile(held, channels, max(1, min(WARPS, held * channels // (WARP * each))))


def power_of_two(count: int) -> int:
    """The smallest that is at least so large."""
    return 1 << (count - 1).bit_length()


def blocks(count: int, size: int) -> int:
    """How many of a size hold so many."""
    return -(-count // size)


def rows(x: Tensor) -> Tensor:
    """With a contiguous last dimension, in its own dtype: kernels widen what they read."""
    x = x.detach()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def packed(x: Tensor | None) -> Tensor | None:
    """Contiguous, in its own dtype."""
    return None if x is None else x.detach().contiguous()


def steps(*tensors: Tensor | None) -> list[int]:
    """The strides of all dimensions but the last, of one after another; those of what is not given are 0."""
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:-1])]


def on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; meanwhile that is the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
