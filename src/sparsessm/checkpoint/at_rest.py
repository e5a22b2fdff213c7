"""A checkpoint whose values stay in its files: all that `load` tells of it, and its tensors one by one.

For who passes over the tensors once: to pack a directory, to unpack it, to count what was removed. However
large the model is, one of its tensors is in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures import InMemory
from .apart import one_by_one
from .assembly import Assembled
from .files import few
from .opened import Opened, quiet
from .reading import Checkpoint, described
from .shelf import Unread


@dataclass(frozen=True, eq=False)
class AtRest:
    """A checkpoint that was checked, and none of it read.

    Attributes:
        checkpoint: as `load` gives it, but that its model has no memory for its weights.
        tensors: by their names in `checkpoint.model.state_dict()`, tied ones once; each is read when it is
            asked for, and must be dropped before the files change.
        sizes: bytes of each as it is stored.
        extra: names of the tensors that stock code leaves out on purpose.
    """

    checkpoint: Checkpoint
    tensors: Unread
    sizes: Mapping[str, int]
    extra: tuple[str, ...]

    def stored(self, name: str) -> Tensor:
        """A tensor in the dtype that it is stored in; it may be mapped."""
        return self._value(name, None)

    def exact(self, name: str) -> Tensor:
        """The values that the model computes with: those of int8 in float32, others as they are stored."""
        return self._value(name, torch.float32)

    def _value(self, name: str, dtype: torch.dtype | None) -> Tensor:
        tensor = self.tensors[name]
        if (whole := tensor.itself) is not None:
            return whole
        return tensor.decode(dtype if tensor.scaled else None)


def at_rest(opened: Opened, tokenizer: str | os.PathLike[str] | None = None) -> AtRest:
    """Check a checkpoint as `load` does, and read its tokenizer.

    Args:
        tokenizer: as for `load`.

    Raises:
        ValueError: as `load`.
    """
    with quiet():
        found = one_by_one(opened)
        assembled = Assembled(found.model, found.stored, {}, found.prefix, found.digest)
        checkpoint = described(opened, assembled, InMemory(), tokenizer)
    return AtRest(checkpoint, found.tensors, found.sizes, tuple(sorted(found.extra)))


def left_out(extra: Iterable[str]) -> tuple[str, ...]:
    """What to say of tensors that stock code leaves out: a packed file and a GGUF file have
    the model's and no others."""
    if not (names := [ascii(name)[1:-1] for name in extra]):
        return ()
    return (f"not in the file, because transformers does not load them: {few(sorted(names))}",)
