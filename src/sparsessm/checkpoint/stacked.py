"""A tensor of several matrices of one shape, those of the experts of a layer, each encoded by itself.

Beside `encoding.py` and `coded.py`, whose forms its matrices have; `docs/sparse-format.md` defines it. The
matrices of a tensor `X` are called `X.0`, `X.1`, ..., as in a recipe and in a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .encoding import Encoded, encode
from .packed_tensor import PackedTensor

LABEL = "stack"
AXES = 3


@final
@dataclass(frozen=True, eq=False)
class Stacked(PackedTensor):
    """The matrices of a tensor (matrices, rows, cols).

    Attributes:
        each: of the tensor's dtype, in order; their names are its own, a dot and their number.
    """

    each: tuple[PackedTensor, ...]

    @property
    def label(self) -> str:
        return LABEL

    @property
    def parts(self) -> dict[str, Tensor]:
        return {name: array for one in self.each for name, array in one.parts.items()}

    @property
    def held(self) -> str:
        return " and ".join(sorted({one.held for one in self.each}))

    @property
    def fill(self) -> float | None:
        return None

    @property
    def scaled(self) -> bool:
        return any(one.scaled for one in self.each)

    @property
    def itself(self) -> Tensor | None:
        return None

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        whole = torch.empty(self.shape, dtype=dtype or self.dtype)
        for place, one in enumerate(self.each):  # one by one: never all of them twice
            whole[place] = one.decode(dtype)
        return whole

    def check(self, contents: bool = True) -> None:
        for found in (*self.own_form(), *self._form()):
            raise ValueError(f"{self.name}: {found}")
        for one in self.each:
            one.check(contents)

    def _form(self) -> Iterator[str]:
        if len(self.shape) != AXES:
            yield f"kind {LABEL} needs {AXES} axes, its shape is {list(self.shape)}"
        if len(self.each) != self.shape[0]:
            yield f"it has {len(self.each)} matrices, its shape is {list(self.shape)}"
        for place, one in enumerate(self.each):
            if (one.name, one.shape, one.dtype) != (f"{self.name}.{place}", self.shape[1:], self.dtype):
                yield f"its matrix {place} is {one.name!r}, {one.dtype} {list(one.shape)}"


def stacked(name: str, whole: Tensor, one: Callable[[str, Tensor], PackedTensor]) -> PackedTensor:
    """A tensor of several matrices, each in its own form; dense as a whole where all of them are.

    Args:
        name: of the stock tensor. whole: (matrices, rows, cols) in its stock dtype.
        one: name and values of a matrix -> its form.
    """
    each = tuple(one(f"{name}.{place}", matrix) for place, matrix in enumerate(whole))
    if all(found.itself is not None for found in each):
        return encode(name, whole, kind="dense")
    return Stacked(name, tuple(whole.shape), whole.dtype, each)


def matrices_of(tensor: PackedTensor) -> Iterator[PackedTensor]:
    """The matrices of a tensor (matrices, rows, cols), whatever its form is."""
    if isinstance(tensor, Stacked):
        yield from tensor.each
        return
    assert isinstance(tensor, Encoded), "codes have two axes"
    for place, matrix in enumerate(tensor.values):
        yield encode(f"{tensor.name}.{place}", matrix, kind="dense")
