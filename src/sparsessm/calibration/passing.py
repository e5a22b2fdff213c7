"""One pass of windows through a block, watched or not: what a `Stop` of the walk makes (walk.py)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import takewhile
from typing import Any, final

from torch import Tensor

from sparsessm.architectures import Block, Tap
from sparsessm.architectures.kept import Kept, Room
from sparsessm.calibration.journal import Streams
from sparsessm.calibration.paired import Pair, Twice


@final
class Frontier:
    """What passes before keep of a block for those that come: of each lane, in both models (kept.py)."""

    def __init__(self, room: int) -> None:
        """room: bytes that it may take."""
        self._room, self._kept = Room(room), dict[tuple[int, bool], Kept]()
        self._replaced = False

    def of(self, lane: int, dense: bool) -> Kept | None:
        """Of a lane."""
        if self._replaced and not dense:
            return None
        if (lane, dense) not in self._kept:
            self._kept[lane, dense] = Kept(self._room)
        return self._kept[lane, dense]

    def replace(self) -> None:
        """Another block stands there now, of which nothing is kept; of the dense one it is."""
        self._replaced = True
        self._kept = {(lane, dense): kept for (lane, dense), kept in self._kept.items() if dense}


@final
class Pass:
    """Lanes of windows go through a block up to a target, slab by slab.

    Attributes:
        dense_is_through: the dense windows have gone through the whole block.
    """

    def __init__(
        self,
        block: Block,
        dense: Block | None,
        streams: Streams,
        taps: Mapping[str, Tap],
        until: str | None,
        frontier: Frontier | None,
        passed: bool,
    ) -> None:
        """
        Args:
            dense: the block of before, None without dense windows. passed: they are through.
            taps: target kind -> observer. until: go no further than this target; None: through the block.
            frontier: None where this pass has slabs of its own.
        """
        self._block, self._streams, self._until, self._frontier = block, streams, until, frontier
        paired = {kind: tap for kind, tap in taps.items() if tap.paired}
        compares = dense is not None and streams.dense is not None
        pairs = {kind: Pair(tap) for kind, tap in paired.items()} if compares else {}
        twice = {} if compares else {kind: Twice(tap) for kind, tap in paired.items()}
        self._taps, self._recorders = {**taps, **pairs, **twice}, {k: pair.dense for k, pair in pairs.items()}
        self._dense = dense if compares and (pairs or until is None) and not passed else None
        last = until in pairs and until == block.targets[-1].kind
        self._dense_until = None if last else until
        self._settled = _final_before(block, {*taps, until})
        self._states: dict[int, Any] = {}
        self._dense_states: dict[int, Any] = {}

    @property
    def dense_is_through(self) -> bool:
        return self._dense is not None and self._dense_until is None

    def run(self, lane: int, windows: slice, number: int, slab: slice) -> Tensor | None:
        """One lane in one slab.

        Args:
            lane: its number. windows: in it. number: of the slab. slab: its tokens.

        Returns:
            (windows, T, d_model), the block's output; None up to a target.
        """
        kept = self._keeper(lane, number, dense=False)
        for recorder in self._recorders.values():
            recorder.take()  # an expert may get no token of this slab
        if self._dense is not None and (dense := self._streams.dense) is not None:
            out, self._dense_states[lane] = self._dense.forward(
                dense.now[windows, slab].to(self._dense.device),
                self._dense_states.get(lane),
                self._recorders,
                self._dense_until,
                self._keeper(lane, number, dense=True),
            )
            if out is not None:
                dense.behind[windows, slab].copy_(out)
        assert self._streams.hidden is not None
        out, self._states[lane] = self._block.forward(
            self._streams.hidden.now[windows, slab].to(self._block.device),
            self._states.get(lane),
            self._taps,
            self._until,
            kept,
        )
        return out

    def _keeper(self, lane: int, number: int, dense: bool) -> Kept | None:
        if self._frontier is None:
            return None
        kept = self._frontier.of(lane, dense)
        if kept is None:
            return None
        if number == 0:
            kept.begin(self._settled, (self._dense_until if dense else self._until) is None)
        kept.at(number)
        return kept


def _final_before(block: Block, watched: Collection[str | None]) -> list[str]:
    """Kinds of the targets before the first of these: nobody changes them or looks at them any more."""
    kinds = [target.kind for target in block.targets]
    return list(takewhile(lambda kind: kind not in watched, kinds))
