"""Stage 1: walk the blocks once, feed the observers.

All windows advance through a block together, one slab of time after the other, each carrying its state. That
is what makes sums over the batch exact at every time step with one slab in memory (the paper's S_t needs all
windows at once), and it bounds the memory of calibration by the residual stream of the windows plus one slab
of one block, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsessm.architectures import Architecture, Block, Tap, Target

Progress = Callable[[str, int, int], None]

# Rows (windows x tokens) of a slab: enough for full-speed matrix products, few enough to stay near the cache.
ROWS = 2048
# Most tokens a slab, where windows are few: bounds the (T, D, N) sums of the methods that look at every step.
LONGEST = 128


@dataclass
class Stop:
    """The walk stands before `block`; `hidden` (W, L, d_model) comes from the pruned blocks before it."""

    block: Block
    hidden: Tensor
    _tick: Callable[[], None]

    def seen(self, target: Target, observer: Any) -> Any:
        """Run the block over all windows with `observer` watching `target`; returns the observer's result."""
        self.run({target.kind: observer}, in_place=False)
        return observer.result()

    def advance(self) -> None:
        """Replace the windows by the block's output, with the block as it is now."""
        self.run({}, in_place=True)

    def run(self, taps: Mapping[str, Tap], *, in_place: bool) -> None:
        """One pass of all windows through the block, watched by `taps` (target kind -> observer)."""
        windows, length, _ = self.hidden.shape
        width = slab_width(windows, length)
        state = None
        with torch.inference_mode():
            for start in range(0, length, width):
                slab = self.hidden[:, start : start + width]
                out, state = self.block.forward(slab, state, taps)
                _refuse_non_finite(out, self.block.name, start)
                if in_place:
                    slab.copy_(out)
                self._tick()


def slab_width(windows: int, length: int) -> int:
    """Tokens a slab."""
    return max(1, min(length, LONGEST, ROWS // windows))


def survey(
    architecture: Architecture,
    tokens: Tensor,
    watch: Callable[[Target], Any | None],
    progress: Progress | None = None,
) -> Iterator[tuple[Target, Any]]:
    """Look at the model as it is, every target in one pass through each block.

    Args:
        tokens: (W, L) int64 calibration windows.
        watch: target -> its observer, or None to leave it out.
        progress: called with ("survey", slabs done, slabs in all).

    Yields:
        (target, the observer's result) in the order of the model.

    Raises:
        ValueError: as `walk`.
    """
    with torch.inference_mode():
        hidden = architecture.embed(tokens)
    tick = _counter("survey", slab_count(tokens) * len(architecture.blocks), progress)
    for block in architecture.blocks:
        watched = [(target, observer) for target in block.targets if (observer := watch(target)) is not None]
        Stop(block, hidden, tick).run({target.kind: observer for target, observer in watched}, in_place=True)
        for target, observer in watched:
            yield target, observer.result()


def walk(
    architecture: Architecture, tokens: Tensor, passes: int, progress: Progress | None = None
) -> Iterator[Stop]:
    """Stop before each block in turn; afterwards the windows go through the block as the caller left it.

    The last block is not run again: nobody needs its output.

    Args:
        tokens: (W, L) int64 calibration windows.
        passes: runs through each block that the caller will make, the advancing one included; for the
            progress bar.
        progress: called with ("calibrate", slabs done, slabs in all).

    Raises:
        ValueError: an activation that is not finite; names the block, the first window and position.
    """
    with torch.inference_mode():
        hidden = architecture.embed(tokens)
    tick = _counter("calibrate", slab_count(tokens) * (passes * len(architecture.blocks) - 1), progress)
    for block in architecture.blocks:
        stop = Stop(block, hidden, tick)
        yield stop
        if block is not architecture.blocks[-1]:
            stop.advance()


def slab_count(tokens: Tensor) -> int:
    """Slabs that one pass takes."""
    return -(-tokens.shape[1] // slab_width(*tokens.shape))


def _counter(stage: str, total: int, progress: Progress | None) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(stage, min(done, total), total)

    return tick


def _refuse_non_finite(out: Tensor, block: str, start: int) -> None:
    if torch.isfinite(out.sum()):
        return
    bad = ~torch.isfinite(out).all(-1)  # (W, T)
    if bad.any():
        window, position = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{block}: output is not finite in calibration window {window} at token {start + position}"
        )
