"""Stage 1: walk the blocks once, feed the observers.

All windows advance through a block together, one slab of time after the other, each carrying its state. That
is what makes sums over the batch exact at every time step with one slab in memory (the paper's S_t needs all
windows at once), and it bounds the memory of calibration by the residual stream of the windows plus one slab
of one block, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsessm.architectures import Architecture, Block, Tap, Target
from sparsessm.architectures.experts import abreast
from sparsessm.methods.observers import InputGram, Moments

Progress = Callable[[str, int, int], None]

# Rows (windows x tokens) of a slab: enough for full-speed matrix products, few enough to stay near the cache.
ROWS = 2048
# Most tokens a slab, where windows are few: bounds the (T, D, N) sums of the methods that look at every step.
LONGEST = 128
# Bytes of Hessians that one pass over experts may sum up: those of 64 matrices with 2048 inputs (of 32 if
# paired); a matrix with 14336 inputs takes a pass of its own.
HELD = 2 << 30


@dataclass
class Stop:
    """The walk stands before `block`; `hidden` (W, L, d_model) comes from the pruned blocks before it.

    With a second stream, `dense` is the block with its weights of before and `dense_hidden` what the dense
    blocks before it produce: observers that are `paired` see the inputs in both models. The pass that looks
    at the block's last target in both models takes the dense windows through the whole block, so that target
    can be looked at once.
    """

    block: Block
    hidden: Tensor
    _tick: Callable[[], None]
    dense: Block | None = None
    dense_hidden: Tensor | None = None
    _last: tuple[str, Moments] | None = None  # what was seen last
    _dense_is_through: bool = False

    def seen(self, target: Target, observer: Any) -> Any:
        """Run all windows up to `target` with `observer` watching; returns the observer's result."""
        if isinstance(observer, InputGram) and (fed := self._fed(target, observer)):
            for _ in range(slab_count(*self.hidden.shape[:2])):
                self._tick()  # a pass saved is a pass done
            return fed
        self.run({target.kind: observer}, until=target.kind)
        result = observer.result()
        feeds = any(other.fed_by and other.fed_by[0] == target.kind for other in self.block.targets)
        self._last = (target.kind, result) if feeds and isinstance(result, Moments) else None
        return result

    def _fed(self, target: Target, observer: InputGram) -> Moments | None:
        """Moments that follow from those of the target whose outputs these inputs are: no pass is needed."""
        if target.fed_by is None or self._last is None or self._last[0] != target.fed_by[0]:
            return None
        (kind, rows), moments = target.fed_by, self._last[1]
        if moments.diagonal or (observer.paired and moments.cross is None):
            return None
        return moments.through(
            *(_matrix(block, kind)[:rows] for block in (self.block, self.dense or self.block))
        )

    def advance(self) -> None:
        """Replace the windows by the block's output, with the block as it is now."""
        self.run({})

    def run(self, taps: Mapping[str, Tap], *, until: str | None = None) -> None:
        """One pass of all windows, watched by `taps` (target kind -> observer).

        Args:
            until: go no further than this target and leave the windows as they are; None: through the block,
                whose output replaces them.
        """
        windows, length, _ = self.hidden.shape
        width = slab_width(windows, length)
        pairs = {kind: Pair(tap) for kind, tap in taps.items() if tap.paired}
        recorders = {kind: pair.dense for kind, pair in pairs.items()}
        dense_until = None if until in pairs and until == self.block.targets[-1].kind else until
        both = (pairs or until is None) and not self._dense_is_through
        state = dense_state = None
        with torch.inference_mode():
            for start in range(0, length, width):
                slab = slice(start, start + width)
                for recorder in recorders.values():
                    recorder.take()  # an expert may get no token of this slab
                if both and self.dense is not None and self.dense_hidden is not None:
                    dense_slab = self.dense_hidden[:, slab]
                    out, dense_state = self.dense.forward(dense_slab, dense_state, recorders, dense_until)
                    if out is not None:
                        dense_slab.copy_(out)
                out, state = self.block.forward(self.hidden[:, slab], state, {**taps, **pairs}, until)
                if out is not None:
                    _refuse_non_finite(out, self.block.name, start)
                    self.hidden[:, slab].copy_(out)
                self._tick()
        self._dense_is_through |= bool(both) and dense_until is None


class Recorder:
    """A tap that keeps what it was fed last, of an expert with the tokens that it is of."""

    options: Mapping[str, Any] = {}
    paired, routed = False, True

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor | None] | None = None

    def add(self, x: Tensor, rows: Tensor | None = None) -> None:
        self._last = x, rows

    def take(self) -> tuple[Tensor, Tensor | None] | None:
        """What was kept, once: an expert may get no token of a slab."""
        last, self._last = self._last, None
        return last


class Pair:
    """A tap that hands an observer the inputs in both models; `dense` must be fed first.

    Experts: the tokens that the routers of both models sent there.
    """

    options: Mapping[str, Any] = {}
    paired, routed = False, True

    def __init__(self, observer: Any) -> None:
        self._observer, self.dense = observer, Recorder()

    def add(self, x: Tensor, rows: Tensor | None = None) -> None:
        last = self.dense.take()
        if last is None:
            return
        dense, dense_rows = last
        if rows is not None and dense_rows is not None:
            x, dense = x[:, torch.isin(rows, dense_rows)], dense[:, torch.isin(dense_rows, rows)]
            if not x.shape[1]:
                return
        self._observer.add(x, dense)


def _matrix(block: Block, kind: str) -> Tensor:
    return next(target.matrix for target in block.targets if target.kind == kind)


def slab_width(windows: int, length: int) -> int:
    """Tokens a slab."""
    return max(1, min(length, LONGEST, ROWS // windows))


def together(targets: Sequence[Target], watch: Callable[[Target], Any | None]) -> Iterator[list[Target]]:
    """The targets of a block in the order of the data, in parts that one pass can look at.

    That is many only of experts, whose Hessians are then held together, up to `HELD` bytes of them.

    Args:
        watch: target -> its observer, or None to leave it out.
    """
    for part in abreast(targets):
        some, held = [part[0]], _size(part[0], watch)
        for target in part[1:]:
            size = _size(target, watch)
            if held + size > HELD:
                yield some
                some, held = [], 0
            some, held = [*some, target], held + size
        yield some


def _size(target: Target, watch: Callable[[Target], Any | None]) -> int:
    """Bytes of the Hessians that an expert's observer will hold; what others keep is next to nothing."""
    observer = watch(target) if target.routed else None
    return 8 * target.matrix.shape[1] ** 2 * (1 + observer.paired) if isinstance(observer, InputGram) else 0


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
    blocks = (*architecture.blocks, architecture.tail)
    shared: list[tuple[Target, Any]] = []  # whose later uses are still to come
    tick = _counter("survey", slab_count(*tokens.shape) * len(architecture.blocks), progress)
    for block in blocks:
        watched = [(target, observer) for target in block.targets if (observer := watch(target)) is not None]
        again = [(target, observer) for target, observer in shared if block.index in target.uses]
        taps = {target.kind: observer for target, observer in (*watched, *again)}
        if block is not architecture.tail:
            Stop(block, hidden, tick).run(taps)
        elif watched:  # next to no work, and not counted
            Stop(block, hidden, lambda: None).run(taps)
        shared += [(target, observer) for target, observer in watched if target.uses]
        for target, observer in (*watched, *again):
            if not target.uses or target.uses[-1] == block.index:
                yield target, observer.result()


def walk(
    architecture: Architecture,
    tokens: Tensor,
    passes: float,
    progress: Progress | None = None,
    *,
    dense: Tensor | None = None,
    tail: bool = False,
) -> Iterator[Stop]:
    """Stop before each block in turn; afterwards the windows go through the block as the caller left it.

    Where nobody needs its output, the last block is not run again.

    Args:
        tokens: (W, L) int64 calibration windows.
        passes: runs through a block that the caller will make on average, the advancing one included; for the
            progress bar.
        progress: called with ("calibrate", slabs done, slabs in all).
        dense: (W, L, d_model) windows as the dense model embeds them, to be carried beside the pruned ones.
        tail: stop before the head as well.

    Raises:
        ValueError: an activation that is not finite; names the block, the first window and position.
    """
    with torch.inference_mode():
        hidden = architecture.embed(tokens)
    stops = (*architecture.blocks, *((architecture.tail,) if tail else ()))
    runs = round(passes * len(architecture.blocks)) + (1 if tail else -1)
    tick = _counter("calibrate", slab_count(*tokens.shape) * runs, progress)
    for block in stops:
        stop = Stop(block, hidden, tick, None if dense is None else block.copy(), dense)
        yield stop
        if block is not stops[-1]:
            stop.advance()


def slab_count(windows: int, length: int) -> int:
    """Slabs that one pass takes."""
    return -(-length // slab_width(windows, length))


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
