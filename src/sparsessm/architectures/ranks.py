"""The processes that work on one model together, each on windows of its own: `Alone`, or `Together` under
`torchrun`.

Everything that is decided is decided once: one process makes it, and all have it. What adds up over windows
adds up in float64. So the result does not depend on how many processes there are, but for the order in which
float64 adds.

Place in the flow: `Architecture.ranks`. A walk gives each process its windows (calibration/walk.py), the
loops say who solves what (pruning/entries.py), and the first process alone writes (checkpoint/journal.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, distributed

Sums = Mapping[str, dict[str, Tensor]]  # who sums -> what, by name


class Ranks(ABC):
    """Of one run.

    Attributes:
        number: of this process, from 0. count: of processes. local: number on this machine.
    """

    number: int
    count: int
    local: int

    @property
    @final
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.number == 0

    @final
    def mine(self, parts: int) -> range:
        """The parts that are this process's, of so many in a row."""
        return range(parts * self.number // self.count, parts * (self.number + 1) // self.count)

    @final
    def owners(self, sizes: Sequence[int]) -> list[int]:
        """Who solves what: the largest first, each to who has least to do."""
        load, found = [0] * self.count, [0] * len(sizes)
        for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            found[index] = min(range(self.count), key=load.__getitem__)
            load[found[index]] += sizes[index]
        return found

    @abstractmethod
    def total(self, sums: Sums, owners: Mapping[str, int] | None = None) -> None:
        """Put in place of each sum what all processes have of it; one may have none of it yet.

        Args:
            owners: who alone needs it; those of the others are emptied. None: all do.
        """

    @abstractmethod
    def given(self, value: Any, owner: int = 0) -> Any:
        """What the owner has: plain values and tensors, in lists and dictionaries."""

    @abstractmethod
    def gathered(self, value: Any) -> list[Any]:
        """What each has, by rank."""

    @abstractmethod
    def spread(self, tensors: Sequence[Tensor], owner: int = 0) -> None:
        """Write into tensors what those of the owner hold."""

    @abstractmethod
    def wait(self) -> None:
        """Until all are here."""


@final
class Alone(Ranks):
    """One process."""

    number, count, local = 0, 1, 0

    def total(self, sums: Sums, owners: Mapping[str, int] | None = None) -> None:
        pass

    def given(self, value: Any, owner: int = 0) -> Any:
        return value

    def gathered(self, value: Any) -> list[Any]:
        return [value]

    def spread(self, tensors: Sequence[Tensor], owner: int = 0) -> None:
        pass

    def wait(self) -> None:
        pass


@final
class Together(Ranks):
    """The processes of torch's default group, which send what is on a GPU through the CPU's memory.

    Raises (all methods):
        ValueError: another process has gone.
    """

    def __init__(self, why: Callable[[], str]) -> None:
        """why: asked when another process seems to have gone; which one, and why, "" if that is not known."""
        self._why = why
        self.number, self.count = distributed.get_rank(), distributed.get_world_size()
        self.local = distributed.get_node_local_rank(self.number)  # pyright: ignore[reportPrivateImportUsage]

    def total(self, sums: Sums, owners: Mapping[str, int] | None = None) -> None:
        known: dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype]] = {}
        mine = {
            (who, name): (tuple(x.shape), x.dtype) for who, own in sums.items() for name, x in own.items()
        }
        for other in self.gathered(mine):
            known |= other
        for (who, name), (shape, dtype) in sorted(known.items()):
            part = sums[who].get(name)
            sent = torch.zeros(shape, dtype=dtype) if part is None else part.cpu().contiguous()
            owner = None if owners is None else owners[who]
            with self._reporting():
                if owner is None:
                    distributed.all_reduce(sent)
                else:
                    distributed.reduce(sent, owner)
            if owner in (None, self.number):
                sums[who][name] = sent if part is None else sent.to(part.device)
            else:
                sums[who].pop(name, None)

    def given(self, value: Any, owner: int = 0) -> Any:
        held = [_on_cpu(value) if owner == self.number else None]
        with self._reporting():
            distributed.broadcast_object_list(held, owner)
        return value if owner == self.number else held[0]

    def gathered(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.count
        with self._reporting():
            distributed.all_gather_object(found, _on_cpu(value))
        return found

    def spread(self, tensors: Sequence[Tensor], owner: int = 0) -> None:
        for tensor in tensors:
            held = tensor.detach().cpu().contiguous()
            with self._reporting():
                distributed.broadcast(held, owner)
            if owner != self.number:
                with torch.no_grad():
                    tensor.copy_(held)

    def wait(self) -> None:
        with self._reporting():
            distributed.barrier()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            told = self._why() or f"another process of this run has gone ({line[:200]})"
            raise ValueError(told) from error


_joined: list[Ranks] = []


def join(why: Callable[[], str] = str) -> None:
    """From now on the processes of torch's default group work on every model together; it uses gloo.

    Args:
        why: as of `Together`.
    """
    _joined[:] = [Together(why)]


def here() -> Ranks:
    """Those of this process: `Alone` until `join`, whatever else torch.distributed is used for."""
    return _joined[0] if _joined else Alone()


def _on_cpu(value: Any) -> Any:
    """Plain values with their tensors on the CPU: one on a GPU would come to the same GPU elsewhere."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: _on_cpu(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on_cpu(part) for part in value)
    return value
