"""What a long run has done, kept so that it can go on from there after it was killed.

`checkpoint/journal.py` keeps it on a disk, beside the result; `Forgetful` keeps nothing. Results are asked
for by name (`once`), and a walk tells its `Stage` each block that it leaves, so that at most one is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, final

import torch
from torch import Tensor

from sparsessm.architectures import Architecture, Block, Residence
from sparsessm.architectures.ranks import Alone, Ranks
from sparsessm.calibration.slabs import share


class Stage(Protocol):
    """One walk of a run."""

    @property
    def left(self) -> Mapping[int, Any]:
        """Index of each block that the walk left in the run before -> what was noted then."""
        ...

    def places(
        self, name: str, like: Tensor, shape: Sequence[int], mine: slice
    ) -> tuple[list[Tensor], int | None]:
        """Room for hidden states of the kind of others: one tensor, or two that take turns, as what was must
        last until a block is done; and which holds the states before the first block not `left`, if any does.

        Args:
            shape: of all windows. mine: those of this process, whose room is given.
        """
        ...

    def placed(self, name: str, which: int) -> None:
        """The states of this name, before the first block, are in one of their places."""
        ...

    def leave(self, block: Block, note: Any, which: Mapping[str, int]) -> None:
        """The walk has left a block, what was changed in it is kept, and the states are behind it.

        Args:
            note: plain values and tensors, in lists and dictionaries. which: place of the states, by name.
        """
        ...

    def tensors(self, block: Block) -> Mapping[str, Tensor]:
        """What the run before made of a block that it left, by the names inside its layer.

        Raises:
            ValueError: that is damaged.
        """
        ...

    def restore(self, block: Block) -> None:
        """Put into a block what the run before made of it; it has these shapes already.

        Raises:
            ValueError: that is damaged.
        """
        ...


class Journal(Protocol):
    """Of one run."""

    def begin(self, what: Mapping[str, Any]) -> None:
        """Say what the run is, before anything else.

        Raises:
            ValueError: the run before was another one; names in what.
        """
        ...

    @property
    def seconds(self) -> float:
        """Of work, that of the runs before included."""
        ...

    def start(self) -> None:
        """The work that is counted begins."""
        ...

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives or gave in the run before: plain values and tensors, in lists and dictionaries
        with names as keys. All processes make it, and have what the first one made."""
        ...

    def held(self, name: str) -> bool:
        """Whether `once` would not make it."""
        ...

    def stage(self, name: str) -> Stage:
        """The walk of this name, where the run before stopped."""
        ...


@final
class Forgetful:
    """A journal that keeps nothing, and a stage of it."""

    left: Mapping[int, Any] = {}

    def __init__(self, architecture: Architecture) -> None:
        self._residence, self._ranks = architecture.residence, architecture.ranks
        self._began = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def start(self) -> None:
        self._began = time.perf_counter()

    def begin(self, what: Mapping[str, Any]) -> None:
        pass

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        return self._ranks.given(make())

    def held(self, name: str) -> bool:
        return False

    def stage(self, name: str) -> Stage:
        return self

    def places(
        self, name: str, like: Tensor, shape: Sequence[int], mine: slice
    ) -> tuple[list[Tensor], int | None]:
        return [self._residence.room(like, mine.stop - mine.start, *shape[1:])], None

    def placed(self, name: str, which: int) -> None:
        pass

    def leave(self, block: Block, note: Any, which: Mapping[str, int]) -> None:
        pass

    def tensors(self, block: Block) -> Mapping[str, Tensor]:
        raise RuntimeError(f"{block.name}: nothing was kept")

    def restore(self, block: Block) -> None:
        self.tensors(block)


def each(ranks: Ranks, journal: Journal, name: str, count: int, make: Callable[[int], Any]) -> Iterator[Any]:
    """What `make` gives for each number, kept as `name` and the number; processes take turns in making it."""
    for first in range(0, count, ranks.count):
        some = range(first, min(first + ranks.count, count))
        missing = [number for number in some if not journal.held(f"{name} {number}")]
        mine = {number: make(number) for number in missing[ranks.number : ranks.number + 1]}
        made = {number: value for part in ranks.gathered(mine) for number, value in part.items()}
        for number in some:
            yield journal.once(f"{name} {number}", partial(made.get, number))


class Stream:
    """Hidden states (W, L, d_model) of the same windows, which a walk carries.

    Attributes:
        name: in the stage. which: of the places, where the states are.
        first: number of the first window, where others are in other processes.
    """

    def __init__(self, name: str, places: Sequence[Tensor], which: int = 0, first: int = 0) -> None:
        self.name, self.which, self.first, self._places = name, which, first, places

    @property
    def now(self) -> Tensor:
        """Before the block at which the walk stands."""
        return self._places[self.which]

    @property
    def behind(self) -> Tensor:
        """Where the block's output goes; the same place where there is one."""
        return self._places[(self.which + 1) % len(self._places)]

    def passed(self) -> None:
        """All are through the block."""
        self.which = (self.which + 1) % len(self._places)

    @classmethod
    def of(cls, architecture: Architecture, tokens: Tensor, stage: Stage, name: str) -> Stream:
        """Where the run before left windows (W, L), or as the model embeds them; those of this process."""
        mine = share(architecture.ranks, *tokens.shape)
        with torch.inference_mode():
            first = architecture.embed(tokens[:1])
            places, which = stage.places(name, first, (len(tokens), *first.shape[1:]), mine)
            if which is None:
                for window, row in enumerate(tokens[mine]):
                    places[0][window] = architecture.embed(row[None])[0]
                    architecture.residence.release(places[0])
        if which is None:
            stage.placed(name, which := 0)
        return cls(name, places, which, mine.start)


@dataclass
class Streams:
    """What a walk carries: hidden states (W, L, d_model) before the block at which it stands.

    Attributes:
        residence: of the model; gives the states their place.
        hidden: of the windows that are looked at, None where nobody looks.
        dense: of the same windows in the dense model, None where nobody compares.
        groups: of windows that only go through; replaced by new tensors.
        ranks: the processes that share the windows that are looked at.
        compute: the precision of products on the way (`Architecture.compute`).
        keeping: as of `walk`.
    """

    residence: Residence
    hidden: Stream | None = None
    dense: Stream | None = None
    groups: list[Tensor] = field(default_factory=list)
    ranks: Ranks = Alone()  # noqa: RUF009 - it has no state
    compute: str = "float32"
    keeping: bool = False

    def alike(self, hidden: Stream | None = None, groups: Sequence[Tensor] = ()) -> Streams:
        """Others, of the same walk."""
        return Streams(self.residence, hidden, None, list(groups), self.ranks, self.compute)

    def release(self) -> None:
        """What was used of the states need not stay in memory."""
        for stream in (self.hidden, self.dense):
            for states in () if stream is None else (stream.now, stream.behind):
                self.residence.release(states)

    @property
    def which(self) -> dict[str, int]:
        """Place of the states, by name."""
        return {stream.name: stream.which for stream in (self.hidden, self.dense) if stream is not None}
