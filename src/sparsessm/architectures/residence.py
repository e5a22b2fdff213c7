"""Where the weights of a model's blocks and its hidden states are while nobody computes with them.

A walk opens a block before it stands there and closes it behind (calibration/walk.py, `opened`): the one
place where weights come and go. `InMemory` is a model as transformers loads it, which is always open;
`checkpoint/streamed.py` reads a block's weights when it is opened and keeps only the open ones.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from sparsessm.kernels.free import free as free_memory

KEEPING = 4  # what is kept of a block may take a fourth of the memory
SHARE = 16  # one tensor of hidden states may have a sixteenth of it


class Layer(Protocol):
    """What a residence needs to know of a block (`base.Block`)."""

    index: int
    name: str
    layer: nn.Module


class Residence(ABC):
    """Of one model.

    Attributes:
        device: where open blocks compute.
    """

    device: torch.device = torch.device("cpu")

    @abstractmethod
    def open(self, block: Layer) -> None:
        """The weights of a block are in memory until it is closed as often as it was opened.

        Raises:
            ValueError: they cannot be read any more.
        """

    @abstractmethod
    def close(self, block: Layer) -> None:
        """Nobody needs the block's weights any more; what was changed of them is kept.

        Raises:
            OSError: there is no room to keep it.
        """

    @abstractmethod
    def expect(self, block: Layer | None) -> bool:
        """This block will be opened next, while another one computes; None: no other will, and what was
        prepared is dropped. It is no promise. What is wrong with the block is said when it is opened.

        Returns:
            Whether its weights are in memory already.
        """

    @abstractmethod
    def value(self, parameter: Tensor) -> Tensor:
        """What a tensor of the model holds, whether it is in memory or not; not to be changed."""

    @abstractmethod
    def room(self, like: Tensor, *shape: int) -> Tensor:
        """A tensor for hidden states of the kind and on the device of others, of arbitrary values."""

    @abstractmethod
    def release(self, states: Tensor) -> None:
        """States of `room` that are not used for a while need not stay in memory; they keep their values."""

    @abstractmethod
    def at_once(self, nbytes: int, most: int, *, free: int) -> int:
        """How many groups of hidden states of so many bytes should go through the model together: `free`
        where opening a block costs nothing, else as many as memory allows, up to `most`."""

    @abstractmethod
    def spare(self) -> int:
        """Bytes that results inside a block may take while a walk stands there, see `kept.py`: a
        `KEEPING`-th of what the process may use."""

    @abstractmethod
    def stays(self, nbytes: int) -> bool:
        """Whether hidden states of so many bytes are in memory while a run with this memory carries them."""

    @abstractmethod
    def copied(self, model: nn.Module) -> tuple[nn.Module, Residence]:
        """A copy of the model, which can be changed without changing it, and its residence."""

    @final
    @contextmanager
    def holding(self, block: Layer) -> Iterator[None]:
        """The block is open inside."""
        self.open(block)
        try:
            yield
        finally:
            self.close(block)


@final
class InMemory(Residence):
    """All of it, always."""

    def __init__(self, memory: int | None = None) -> None:
        """memory: bytes that the process may use; None: half of what is free when it is asked."""
        self._memory = memory

    def open(self, block: Layer) -> None:
        pass

    def close(self, block: Layer) -> None:
        pass

    def expect(self, block: Layer | None) -> bool:
        return True

    def value(self, parameter: Tensor) -> Tensor:
        return parameter.detach()

    def room(self, like: Tensor, *shape: int) -> Tensor:
        return like.new_empty(shape)

    def release(self, states: Tensor) -> None:
        pass

    def at_once(self, nbytes: int, most: int, *, free: int) -> int:
        return free

    def spare(self) -> int:
        return (free_memory() // 2 if self._memory is None else self._memory) // KEEPING

    def stays(self, nbytes: int) -> bool:
        return self._memory is None or nbytes <= self._memory // SHARE

    def copied(self, model: nn.Module) -> tuple[Any, Residence]:
        return copy.deepcopy(model), self
