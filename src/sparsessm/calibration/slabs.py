"""How windows are divided while they go through a block: lanes of a few windows, slabs of time, groups.

What goes through a block at once is one lane in one slab. Windows are in the same lane whatever the number of
processes that share them (architectures/ranks.py), so every product has the same rows in it, and sums differ
only in the order in which float64 adds them up.
"""

from __future__ import annotations

from torch import Tensor

from sparsessm.architectures.ranks import Ranks

# Rows (windows x tokens) that go through a block at once: enough for full-speed matrix products, few enough
# to stay near the cache.
ROWS = 2048
# Windows of a lane at least; processes that share windows share lanes.
FEWEST = 4
# Tokens of a slab at most: with `FEWEST` windows `ROWS` of them.
LONGEST = 512
# And where an observer holds (T, D, N) sums of all windows at every step.
STEPS = 128


def lanes(windows: int, length: int) -> list[slice]:
    """The windows of each lane."""
    width = _lane(length)
    return [slice(start, min(start + width, windows)) for start in range(0, windows, width)]


def share(ranks: Ranks, windows: int, length: int) -> slice:
    """The windows of this process; there may be none."""
    every = lanes(windows, length)
    mine = ranks.mine(len(every))
    return slice(every[mine.start].start, every[mine.stop - 1].stop) if mine else slice(0, 0)


def slab_width(length: int) -> int:
    """Tokens of a slab; the same in every lane."""
    return max(1, min(length, LONGEST, ROWS // _lane(length)))


def slab_count(windows: int, length: int) -> int:
    """Slabs that one pass of so many windows takes, of all lanes."""
    return len(lanes(windows, length)) * -(-length // slab_width(length))


def first_tokens(windows: Tensor, most: int, least: int = 1) -> Tensor:
    """The first windows (W, L) that have so many tokens together; `least` of them, however long."""
    return windows[: max(least, most // windows.shape[1])]


def grouped(windows: Tensor, most: int) -> tuple[Tensor, ...]:
    """Windows (W, L) in groups of so many tokens; of one window where that is longer."""
    return windows.split(max(1, most // windows.shape[1]))


def _lane(length: int) -> int:
    return max(FEWEST, ROWS // length)
