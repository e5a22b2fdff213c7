"""Results inside a mixer that will not change any more, kept while a walk stands before its block.

A look at a matrix runs the windows through all that is before it (calibration/walk.py). What the look before
computed up to the last matrix that has its final weights is the same again: a `Kept` holds that, slab by
slab, and the mixers go on from there (`mamba1.py`, `mamba2.py`). Only the frontier is held: once the output
of the scan is final, nothing before it is. What does not fit is computed anew, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor


@dataclass
class Room:
    """`left`: bytes that results may still take, of all that share it."""

    left: int


@final
class Kept:
    """Of one block and one stream of windows. A pass says first what is final (`begin`), then where it is
    (`at`); a mixer asks for the results of its stages (`once`)."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._held: dict[str, dict[int, Any]] = {}  # stage -> slab -> result
        self._end: dict[str, int] = {}  # stage -> the first slab that was never kept
        self._carried: dict[str, Any] = {}  # stage -> what it hands on to that slab
        self._final: frozenset[str] = frozenset()
        self._last = False
        self._slab = 0
        self._nested: list[tuple[str, list[str]]] = []  # stages in work, with all that they asked for

    def begin(self, final: Collection[str], last: bool) -> None:
        """A pass begins.

        Args:
            final: kinds of targets before all that this pass looks at, whose weights, and all weights before
                them, will not change any more; what others gave is forgotten.
            last: nobody will ask again; what is taken is forgotten, and nothing more is kept.
        """
        self._final, self._last = frozenset(final), last
        for stage in [stage for stage in self._held if not self._is_final(stage)]:
            for slab in list(self._held[stage]):
                self._forget(stage, slab)
            del self._held[stage], self._end[stage], self._carried[stage]

    def at(self, slab: int) -> None:
        """The pass has come to this slab of time, counted from 0; every pass has the same slabs."""
        self._slab = slab

    def once(self, stage: str, make: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """What a stage gives in this slab.

        Stages that `make` asks for are not kept beside this one if this one is final: it stands for them.

        Args:
            stage: the kind of the last target in it; behind a dot, which part of its output.
            make: computes the result, tensors in tuples, and what the stage hands on to the next slab, for
                itself and the stages that it asked for.

        Returns:
            The same; of a result that was kept, what is handed on is None unless the next slab was not.
        """
        for _, asked in self._nested:
            asked.append(stage)
        if self._has(stage):
            result = self._held[stage][self._slab]
            if self._last:
                self._forget(stage, self._slab)
            return result, self._carried[stage] if self._slab + 1 == self._end[stage] else None
        covered = any(self._is_final(outer) for outer, _ in self._nested)
        self._nested.append((stage, []))
        try:
            result, carried = make()
        finally:
            _, inner = self._nested.pop()
        if self._is_final(stage) and not covered and not self._last:
            self._keep(stage, inner, result, carried)
        return result, carried

    def _keep(self, stage: str, inner: Collection[str], result: Any, carried: Any) -> None:
        """If there is room, and no gap before this slab; what is `inner` is not needed any more."""
        if self._slab != self._end.get(stage, 0):
            return
        gone = [name for name in inner if self._has(name)]
        if _size(result) > self._room.left + sum(_size(self._held[name][self._slab]) for name in gone):
            return
        for name in gone:
            self._forget(name, self._slab)
        self._room.left -= _size(result)
        self._held.setdefault(stage, {})[self._slab] = result
        self._end[stage], self._carried[stage] = self._slab + 1, carried

    def _is_final(self, stage: str) -> bool:
        return stage.partition(".")[0] in self._final

    def _has(self, stage: str) -> bool:
        return self._slab in self._held.get(stage, {})

    def _forget(self, stage: str, slab: int) -> None:
        self._room.left += _size(self._held[stage].pop(slab))


def asking(kept: Kept | None) -> Callable[[str, Callable[[], tuple[Any, Any]]], tuple[Any, Any]]:
    """`Kept.once`; where nothing is kept, what computes anew."""
    return kept.once if kept is not None else lambda stage, make: make()


def _size(result: Any) -> int:
    """Bytes that a result keeps in memory: of a view, all that it is a view of."""
    storages = {part.untyped_storage()._cdata: part.untyped_storage() for part in _tensors(result)}
    return sum(storage.nbytes() for storage in storages.values())


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif result is not None:
        for part in result:
            yield from _tensors(part)
