"""The walk over the blocks of a model: every loop that looks at blocks, runs or changes them is this one.

A walk opens a block, hands it out as a `Stop`, takes what it carries through the block as the caller left it,
and closes it. It carries hidden states: windows that observers look at, beside them what the dense model
makes of the same windows, and groups of windows that nobody looks into.

All windows advance through a block together, one slab of time after the other, each carrying its state. That
is what makes sums over the batch exact at every time step with one slab in memory (the paper's S_t needs all
windows at once), and it bounds the memory of calibration by the residual stream of the windows plus one slab
of one block, however many layers there are. A group goes through in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from sparsessm.architectures import Architecture, Block, Tap, Target
from sparsessm.architectures.kept import Kept, Room
from sparsessm.calibration.journal import Forgetful, Stage, Stream, Streams
from sparsessm.calibration.paired import Pair, Twice
from sparsessm.calibration.progress import Steps
from sparsessm.methods.observers import InputGram, Moments

# Rows (windows x tokens) of a slab: enough for full-speed matrix products, few enough to stay near the cache.
ROWS = 2048
# Most tokens a slab, where windows are few: bounds the (T, D, N) sums of the methods that look at every step.
LONGEST = 128
ALL = slice(None)


class Stop:
    """The walk stands before `block`, which is open; what can be done there. Made by `walk` alone.

    With dense windows `dense` is the block with its weights of before: observers that are `paired` see the
    inputs in both models; without, they see the same inputs as those of both. The pass that looks at the
    block's last target in both models takes the dense windows through the whole block, so that target can be
    looked at once.

    All methods raise RuntimeError once the walk has gone on: the block is closed, the windows are elsewhere.
    """

    def __init__(
        self, block: Block, dense: Block | None, streams: Streams, ahead: Sequence[Block], steps: Steps | None
    ) -> None:
        self._block, self._dense, self._streams = block, dense, streams
        self._ahead, self._steps = ahead, steps
        self._last: tuple[str, Moments] | None = None  # what was looked at last
        self._windows_are_through = self._dense_is_through = self._advanced = self._closed = False
        self._kept: Kept | None = None  # of the windows in this block
        self._dense_kept: Kept | None = None

    @property
    def block(self) -> Block:
        """The block; after `replace` the new one."""
        return self._block

    @property
    def dense(self) -> Block | None:
        """The block as it was when the walk came, None without dense windows."""
        return self._dense

    @property
    def hidden(self) -> Tensor:
        """(W, L, d_model), the windows that are looked at.

        Raises:
            ValueError: the walk carries none.
        """
        if self._streams.hidden is None:
            raise ValueError(f"{self._block.name}: the walk carries no windows to look at")
        return self._streams.hidden.now

    @property
    def dense_hidden(self) -> Tensor | None:
        """(W, L, d_model), the same windows as the dense blocks before this one made them."""
        return self._streams.dense and self._streams.dense.now

    @property
    def groups(self) -> list[Tensor]:
        """(W, L, d_model) of each group; what is appended goes on from here as a group more."""
        return self._streams.groups

    def look(self, target: Target, observer: Any) -> Any:
        """Run the windows up to `target` with `observer` watching; they stay before the block.

        Moments that follow from those looked at just before take no pass. A matrix that blocks share is
        looked at in all of them, in the model as it is now: those not reached yet are dense. That is not
        counted.

        Returns:
            The observer's result.
        """
        if target.uses:
            self._run_to_last_use(target, observer)
            return observer.result()
        if isinstance(observer, InputGram) and (fed := self._fed(target, observer)):
            for _ in range(slab_count(*self.hidden.shape[:2])):
                self._count()  # a pass saved is a pass done
            return fed
        self.run({target.kind: observer}, until=target.kind)
        result = observer.result()
        feeds = any(other.fed_by and other.fed_by[0] == target.kind for other in self._block.targets)
        self._last = (target.kind, result) if feeds and isinstance(result, Moments) else None
        return result

    def run(self, taps: Mapping[str, Tap], *, until: str | None = None, windows: slice = ALL) -> None:
        """One pass of the windows, watched by `taps` (target kind -> observer), counted slab by slab.

        Args:
            until: go no further than this target and leave the windows as they are; None: through the block,
                whose output replaces them, once.
            windows: which of them; all, if they go through.

        Raises:
            ValueError: an output that is not finite; names the block, the first window and position.
        """
        self._refuse_closed()
        if self._windows_are_through or (until is None and windows != ALL):
            raise RuntimeError(f"{self._block.name}: windows go through a block once, and all together")
        streams = self._streams
        hidden, dense = self.hidden[windows], self.dense_hidden
        width = slab_width(*hidden.shape[:2])
        paired = {kind: tap for kind, tap in taps.items() if tap.paired}
        if self._dense is None or dense is None:
            pairs: dict[str, Pair] = {}
            taps = {**taps, **{kind: Twice(tap) for kind, tap in paired.items()}}
        else:
            dense = dense[windows]
            pairs = {kind: Pair(tap) for kind, tap in paired.items()}
        recorders = {kind: pair.dense for kind, pair in pairs.items()}
        dense_until = None if until in pairs and until == self._block.targets[-1].kind else until
        both = (pairs or until is None) and not self._dense_is_through
        kept, dense_kept = self._kept, self._dense_kept if both else None
        if windows != ALL:
            kept = dense_kept = None
        keepers = [keeper for keeper in (kept, dense_kept) if keeper is not None]
        settled = self._final_before({*taps, until})
        for keeper, last in zip(keepers, (until is None, dense_until is None), strict=False):
            keeper.begin(settled, last)
        state = dense_state = None
        with torch.inference_mode(), self._computing():
            for number, start in enumerate(range(0, hidden.shape[1], width)):
                slab = slice(start, start + width)
                for keeper in keepers:
                    keeper.at(number)
                for recorder in recorders.values():
                    recorder.take()  # an expert may get no token of this slab
                if both and self._dense is not None and dense is not None:
                    out, dense_state = self._dense.forward(
                        dense[:, slab], dense_state, recorders, dense_until, dense_kept
                    )
                    if out is not None and streams.dense is not None:
                        streams.dense.behind[:, slab].copy_(out)
                out, state = self._block.forward(hidden[:, slab], state, {**taps, **pairs}, until, kept)
                if out is not None and streams.hidden is not None:
                    _refuse_non_finite(out, self._block.name, start)
                    streams.hidden.behind[:, slab].copy_(out)
                self._count()
                streams.release()
        if both and dense_until is None:
            self._dense_is_through = True
            if streams.dense is not None:
                streams.dense.passed()
        if until is None:
            self._windows_are_through = True
            if streams.hidden is not None:
                streams.hidden.passed()

    def advance(self) -> None:
        """Take all that the walk carries through the block as it is now, what is not through yet; the walk
        does so when it goes on, but not at its last block, where nobody may need it."""
        self._refuse_closed()
        if self._advanced:
            return
        if self._streams.hidden is not None and not self._windows_are_through:
            self.run({})
        with self._computing():
            self._streams.groups[:] = [through(self._block, group) for group in self._streams.groups]
        self._advanced = True

    def replace(self, block: Block) -> None:
        """Another block stands here from now on: the windows go through it, and it is closed in the end."""
        self._refuse_closed()
        self._block, self._last, self._kept = block, None, None

    def drop_windows(self) -> None:
        """No block behind this one is to see any window: it is opened all the same."""
        self._refuse_closed()
        self._streams.hidden = self._streams.dense = None
        self._streams.groups.clear()

    def behind(self, *groups: Tensor) -> Iterator[Stop]:
        """A walk of its own over the blocks behind this one, the tail too if this walk goes there.

        Args:
            groups: (W, L, d_model) hidden states that have left this block.
        """
        self._refuse_closed()
        streams = Streams(self._streams.residence, groups=list(groups), compute=self._streams.compute)
        return _over(self._ahead, streams)

    def _run_to_last_use(self, target: Target, observer: Any) -> None:
        residence = self._streams.residence
        copied = residence.room(self.hidden, *self.hidden.shape).copy_(self.hidden)
        streams = Streams(residence, Stream("ahead", [copied]), compute=self._streams.compute)
        here = Stop(self._block, None, streams, (), None)  # this block is open already
        here.run({target.kind: observer})
        last = target.uses[-1]
        for stop in _over([block for block in self._ahead if block.index <= last], streams):
            if stop.block.index in target.uses:
                stop.run({target.kind: observer}, until=target.kind if stop.block.index == last else None)

    def _fed(self, target: Target, observer: InputGram) -> Moments | None:
        """Moments that follow from those of the target whose outputs these inputs are: no pass is needed."""
        if target.fed_by is None or self._last is None or self._last[0] != target.fed_by[0]:
            return None
        (kind, rows), moments = target.fed_by, self._last[1]
        if moments.diagonal or (observer.paired and moments.cross is None):
            return None
        return moments.through(
            *(block.target(kind).matrix[:rows] for block in (self._block, self._dense or self._block))
        )

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """The blocks here multiply as the walk says; their weights stay as they are."""
        with self._block.computing(self._streams.compute):
            if self._dense is None:
                yield
                return
            with self._dense.computing(self._streams.compute):
                yield

    def _final_before(self, watched: Collection[str | None]) -> list[str]:
        """Kinds of the targets before the first of these: nobody changes them or looks at them any more."""
        kinds = [target.kind for target in self._block.targets]
        return list(takewhile(lambda kind: kind not in watched, kinds))

    def _count(self) -> None:
        if self._steps:
            self._steps()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise RuntimeError(f"{self._block.name}: the walk has gone on, the block is closed")


def walk(
    architecture: Architecture,
    tokens: Tensor | None,
    *groups: Tensor,
    dense: Stream | None = None,
    without: Collection[int] = (),
    tail: bool = False,
    keeping: bool = False,
    steps: Steps | None = None,
    stage: Stage | None = None,
    note: Callable[[], Any] = lambda: None,
) -> Iterator[Stop]:
    """Stop before each block in turn; afterwards what is carried goes through it as the caller left it.

    Where nobody needs its output, the last block is not run.

    Args:
        tokens: (W, L) int64 windows to look at, None for none.
        groups: (W, L) int64 each, windows that go along in one piece; bound their tokens, see `grouped`.
        dense: `tokens` as the dense model embeds them, to be carried beside them; of the same stage.
        without: indices of blocks that the windows pass by as if they were not there, the dense ones apart.
        tail: stop before the head as well.
        keeping: looks go on from what looks before them computed and nothing changes any more. The caller
            changes targets in their order only, and none before one that it has looked at.
        steps: is told where the walk stands, and counts the slabs of `tokens` in each pass.
        stage: keeps what each block was left with; the walk does not stop at those that an earlier one left.
        note: what is to be kept with a block, asked when it is left.

    Raises:
        ValueError: an activation of `tokens` that is not finite; names the block, the first window and
            position.
    """
    stage = stage or Forgetful(architecture)
    hidden = None if tokens is None else Stream.of(architecture, tokens, stage, "hidden")
    carried = [embedded(architecture, group) for group in groups]
    streams = Streams(architecture.residence, hidden, dense, carried, architecture.compute.used, keeping)
    blocks = (*architecture.blocks, architecture.tail) if tail else architecture.blocks
    blocks = tuple(block for block in blocks if block.index not in stage.left)
    return _over(blocks, streams, without, steps, lambda block: stage.leave(block, note(), streams.which))


def backwards(architecture: Architecture, steps: Steps | None = None) -> Iterator[Stop]:
    """Stop at each block from the tail to the first; nothing is carried. `steps` is told where."""
    blocks = (architecture.tail, *reversed(architecture.blocks))
    return _over(blocks, Streams(architecture.residence), steps=steps)


def _over(
    blocks: Sequence[Block],
    streams: Streams,
    without: Collection[int] = (),
    steps: Steps | None = None,
    leave: Callable[[Block], None] = lambda block: None,
) -> Iterator[Stop]:
    """The one loop; `leave` is called when a block is closed and all that is carried is behind it."""
    for place, block in enumerate(blocks):
        ahead = [later for later in blocks[place + 1 :] if later.index not in without]
        if block.index not in without:
            with opened(block, streams, ahead, steps) as stop:
                yield stop
                if ahead:
                    stop.advance()
            leave(stop.block)
        elif ahead and streams.dense is not None:
            alone = Streams(streams.residence, streams.dense, compute=streams.compute)
            with opened(block, alone, (), None) as stop:
                stop.advance()
            leave(block)


@contextmanager
def opened(block: Block, streams: Streams, ahead: Sequence[Block], steps: Steps | None) -> Iterator[Stop]:
    """A block while a walk stands there: the only place where one is opened and closed, whoever walks."""
    residence = streams.residence
    residence.open(block)
    stop = Stop(block, None, streams, ahead, steps)
    if steps:
        steps.at(block.index)
    try:
        if streams.dense is not None:
            stop._dense = block.copy()
        if streams.keeping:
            room = Room(residence.spare())
            stop._kept, stop._dense_kept = Kept(room), Kept(room)
        yield stop
    finally:
        stop._closed, stop._dense, stop._kept, stop._dense_kept = True, None, None, None
        residence.close(stop.block)


def embedded(architecture: Architecture, tokens: Tensor) -> Tensor:
    """(W, L) token ids -> (W, L, d_model), a new tensor."""
    with torch.inference_mode():
        first = architecture.embed(tokens[:1])
        states = architecture.residence.room(first, len(tokens), *first.shape[1:])
        for window, row in enumerate(tokens):
            states[window] = architecture.embed(row[None])[0]
    return states


def through(block: Block, hidden: Tensor) -> Tensor:
    """What an open block puts out (W, L, d_model), a new tensor."""
    with torch.inference_mode():
        out, _ = block.forward(hidden)
    assert out is not None
    return out


def final(architecture: Architecture, *groups: Tensor) -> list[Tensor]:
    """(W, L, d_model) of each group of windows (W, L), behind the last block and before the final norm."""
    found: list[Tensor] = []
    for stop in walk(architecture, None, *groups):
        stop.advance()
        found = stop.groups
    return found


def first_tokens(windows: Tensor, most: int, least: int = 1) -> Tensor:
    """The first windows (W, L) that have so many tokens together; `least` of them, however long."""
    return windows[: max(least, most // windows.shape[1])]


def grouped(windows: Tensor, most: int) -> tuple[Tensor, ...]:
    """Windows (W, L) in groups of so many tokens; of one window where that is longer."""
    return windows.split(max(1, most // windows.shape[1]))


def slab_width(windows: int, length: int) -> int:
    """Tokens a slab."""
    return max(1, min(length, LONGEST, ROWS // windows))


def slab_count(windows: int, length: int) -> int:
    """Slabs that one pass takes."""
    return -(-length // slab_width(windows, length))


def _refuse_non_finite(out: Tensor, block: str, start: int) -> None:
    if torch.isfinite(out.sum()):
        return
    bad = ~torch.isfinite(out).all(-1)  # (W, T)
    if bad.any():
        window, position = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{block}: output is not finite in calibration window {window} at token {start + position}"
        )
