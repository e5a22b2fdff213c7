"""The walk over the blocks of a model: every loop that looks at blocks, runs or changes them is this one.

A walk opens a block, hands it out as a `Stop`, takes what it carries through the block as the caller left it,
and closes it. It carries hidden states: windows that observers look at, beside them what the dense model
makes of the same windows, and groups of windows that nobody looks into.

All windows advance through a block together, one slab of time after the other, a few windows at once
(slabs.py), each carrying its state. That is what makes sums over the batch exact at every time step (the
paper's S_t needs all windows at once), and it bounds the memory of calibration by the residual stream of the
windows plus one slab of one block, however many layers there are. A group goes through in one piece.

Where several processes work on a model, each carries some of the windows; what observers saw is added up when
their results are asked for (`Stop.result`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsessm.architectures import Architecture, Block, Tap, Target
from sparsessm.calibration import slabs
from sparsessm.calibration.journal import Forgetful, Stage, Stream, Streams
from sparsessm.calibration.passing import Frontier, Pass
from sparsessm.calibration.progress import Steps
from sparsessm.methods.observers import InputGram, Moments, Observer
from sparsessm.methods.step_observers import StepObserver


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
        # what was looked at last: kind, in both models, for whom, and what was seen
        self._last: tuple[str, bool, int | None, Moments | None] | None = None
        self._windows_are_through = self._dense_is_through = self._advanced = self._closed = False
        self._frontier: Frontier | None = None

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

    def look(self, target: Target, observer: Any, owner: int | None = None) -> Any:
        """Run the windows up to `target` with `observer` watching; they stay before the block.

        Moments that follow from those looked at just before take no pass. A matrix that blocks share is
        looked at in all of them, in the model as it is now: those not reached yet are dense. That is not
        counted.

        Args:
            owner: the process that needs the result; None: all.

        Returns:
            The observer's result; None where it is another process's.
        """
        if target.uses:
            self._run_to_last_use(target, observer)
            return self._result_of(target, observer, owner)
        if isinstance(observer, InputGram) and target.fed_by and self._last:
            (kind, rows), (last, paired, whose, moments) = target.fed_by, self._last
            if kind == last and whose == owner and (paired or not observer.paired):
                for _ in range(slabs.slab_count(*self.hidden.shape[:2])):
                    self._count()  # a pass saved is a pass done
                return moments and self._fed(moments, kind, rows)
        self.run({target.kind: observer}, until=target.kind)
        result = self._result_of(target, observer, owner)
        feeds = any(other.fed_by and other.fed_by[0] == target.kind for other in self._block.targets)
        known = feeds and isinstance(observer, InputGram)
        self._last = (target.kind, observer.paired, owner, result) if known else None
        return result

    def result(self, observer: Any) -> Any:
        """What an observer saw, in all processes together."""
        return self.results({"": observer})[""]

    def results(
        self, observers: Mapping[str, Any], owners: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """What several observers saw.

        Args:
            observers: by the name of what they watch. owners: who needs which result; None: all need all.

        Returns:
            By name; None where the result is another process's.

        Raises:
            ValueError: what was seen is not finite, by name.
        """
        ranks = self._streams.ranks
        ours = {name: one for name, one in observers.items() if isinstance(one, Observer)}
        if ranks.count > 1:
            with torch.inference_mode():  # in which their sums were made
                ranks.total({name: one.sums() for name, one in ours.items()}, owners)
        return {
            name: _named(name, one.result) if owners is None or owners[name] == ranks.number else None
            for name, one in observers.items()
        }

    def run(self, taps: Mapping[str, Tap], *, until: str | None = None, rows: int | None = None) -> None:
        """One pass of the windows, watched by `taps` (target kind -> observer), counted slab by slab.

        Args:
            until: go no further than this target and leave the windows as they are; None: through the block,
                whose output replaces them, once.
            rows: steps that go through at once at most; None: as many as are fast.

        Raises:
            ValueError: an output that is not finite; names the block, the first window and position.
        """
        self._refuse_closed()
        if self._windows_are_through:
            raise RuntimeError(f"{self._block.name}: windows go through a block once")
        by_time = [tap for tap in taps.values() if isinstance(tap, StepObserver)]
        windows, length = self.hidden.shape[:2]
        some, width = slabs.lanes(windows, length), slabs.slab_width(length)
        if rows is not None:
            some, width = [slice(window, window + 1) for window in range(windows)], min(length, rows)
        if by_time:
            width = min(width, slabs.STEPS)
        streams, frontier = self._streams, self._frontier if rows is None and not by_time else None
        how = streams, taps, until, frontier, self._dense_is_through
        going = Pass(self._block, self._dense, *how)
        with torch.inference_mode(), self._computing():
            for number, start in enumerate(range(0, length, width)):
                slab = slice(start, start + width)
                for lane, part in enumerate(some):
                    out = going.run(lane, part, number, slab)
                    if out is not None and streams.hidden is not None:
                        first = streams.hidden.first + part.start
                        _refuse_non_finite(out, self._block.name, first, start)
                        streams.hidden.behind[part, slab].copy_(out)
                    self._count()
                    streams.release()
                if by_time:
                    streams.ranks.total({str(i): tap.slab() for i, tap in enumerate(by_time)})
                for tap in by_time:
                    tap.end_slab()
        if going.dense_is_through and streams.dense is not None:
            self._dense_is_through = True
            streams.dense.passed()
        if until is None and streams.hidden is not None:
            self._windows_are_through = True
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
        self._block, self._last = block, None
        if self._frontier:
            self._frontier.replace()

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
        return _over(self._ahead, self._streams.alike(groups=list(groups)))

    def _result_of(self, target: Target, observer: Any, owner: int | None) -> Any:
        owners = None if owner is None else {target.name: owner}
        return self.results({target.name: observer}, owners)[target.name]

    def _run_to_last_use(self, target: Target, observer: Any) -> None:
        residence = self._streams.residence
        copied = residence.room(self.hidden, *self.hidden.shape).copy_(self.hidden)
        streams = self._streams.alike(Stream("ahead", [copied]))
        here = Stop(self._block, None, streams, (), None)  # this block is open already
        here.run({target.kind: observer})
        last = target.uses[-1]
        for stop in _over([block for block in self._ahead if block.index <= last], streams):
            if stop.block.index in target.uses:
                stop.run({target.kind: observer}, until=target.kind if stop.block.index == last else None)

    def _fed(self, moments: Moments, kind: str, rows: int) -> Moments:
        """Of the first rows of this target's outputs, whose inputs' moments are these: no pass is needed."""
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
    how = architecture.ranks, architecture.compute.used, keeping
    streams = Streams(architecture.residence, hidden, dense, carried, *how)
    blocks = (*architecture.blocks, architecture.tail) if tail else architecture.blocks
    blocks = tuple(block for block in blocks if block.index not in stage.left)
    return _over(blocks, streams, without, steps, lambda block: stage.leave(block, note(), streams.which))


def backwards(architecture: Architecture, steps: Steps | None = None) -> Iterator[Stop]:
    """Stop at each block from the tail to the first; nothing is carried. `steps` is told where."""
    blocks = (architecture.tail, *reversed(architecture.blocks))
    return _over(blocks, Streams(architecture.residence, ranks=architecture.ranks), steps=steps)


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
            with opened(block, streams.alike(streams.dense), (), None) as stop:
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
        residence.expect(ahead[0] if ahead else None)
        if streams.dense is not None:
            stop._dense = block.copy()
        if streams.keeping:
            stop._frontier = Frontier(residence.spare())
        yield stop
    except BaseException:
        residence.expect(None)
        raise
    finally:
        stop._closed, stop._dense, stop._frontier = True, None, None
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
        out, _ = block.forward(hidden.to(block.device))
    assert out is not None
    return out


def final(architecture: Architecture, *groups: Tensor) -> list[Tensor]:
    """(W, L, d_model) of each group of windows (W, L), behind the last block and before the final norm."""
    found: list[Tensor] = []
    for stop in walk(architecture, None, *groups):
        stop.advance()
        found = stop.groups
    return found


def _named(name: str, result: Callable[[], Any]) -> Any:
    try:
        return result()
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if name else str(error)) from error


def _refuse_non_finite(out: Tensor, block: str, first: int, start: int) -> None:
    """first: number of the first window. start: of the first token."""
    if torch.isfinite(out.sum()):
        return
    bad = ~torch.isfinite(out).all(-1)  # (W, T)
    if bad.any():
        window, position = (int(i) for i in bad.nonzero()[0])
        place = f"window {first + window} at token {start + position}"
        raise ValueError(f"{block}: output is not finite in calibration {place}")
