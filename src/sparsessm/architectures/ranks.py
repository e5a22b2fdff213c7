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
    """The processes of torch's default group. What is on a GPU is sent through the CPU's memory, but where
    each process has it on a GPU of its own.

    Raises (all methods):
        ValueError: another process has gone.
    """

    def __init__(self, why: Callable[[], str], own: torch.device | None) -> None:
        """
        Args:
            why: asked when another process seems to have gone; which one, and why, "" if that is not known.
            own: a device that no other process uses, and that the group can send from; None: the CPU alone.
                All have one, or none has.
        """
        self._why, self._own = why, own
        self.number, self.count = distributed.get_rank(), distributed.get_world_size()
        self.local = distributed.get_node_local_rank(self.number)  # pyright: ignore[reportPrivateImportUsage]

    def total(self, sums: Sums, owners: Mapping[str, int] | None = None) -> None:
        forms: dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype]] = {}
        elsewhere: set[tuple[str, str]] = set()  # not on each one's own device
        here = [((who, name), x) for who, own in sums.items() for name, x in own.items()]
        mine = {key: (tuple(x.shape), x.dtype) for key, x in here}
        for others, not_there in self.gathered((mine, {key for key, x in here if x.device != self._own})):
            forms |= others
            elsewhere |= not_there
        for (who, name), (shape, dtype) in sorted(forms.items()):
            part = sums[who].get(name)
            place = self._place((who, name) not in elsewhere)
            sent = torch.zeros(shape, dtype=dtype, device=place)
            if part is not None:
                sent = part.to(place).contiguous()
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
        direct = self._own is not None and all(
            self.gathered(all(tensor.device == self._own for tensor in tensors))
        )
        for tensor in tensors:
            held = tensor.detach().to(self._place(direct)).contiguous()
            with self._reporting():
                distributed.broadcast(held, owner)
            if owner != self.number:
                with torch.no_grad():
                    tensor.copy_(held)

    def wait(self) -> None:
        with self._reporting():
            distributed.barrier()

    def _place(self, direct: bool) -> torch.device:
        return self._own if direct and self._own is not None else torch.device("cpu")

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            told = self._why() or f"another process of this run has gone ({line[:200]})"
            raise ValueError(told) from error


_joined: list[Ranks] = []


def join(why: Callable[[], str] = str, own: torch.device | None = None) -> None:
    """From now on the processes of torch's default group work on every model together; it uses gloo for what
    is on the CPU.

    Args:
        why, own: as of `Together`.
    """
    _joined[:] = [Together(why, own)]


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
