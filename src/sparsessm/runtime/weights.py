"""The tensors of a model as the native engine takes them: by stock names, in the forms of its kernels.

Place in the flow: below the parts of a layer (part.py), above the kernels. Each tensor is asked for once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.checkpoint.coded import Coded, plain
from sparsessm.checkpoint.encoding import Encoded
from sparsessm.checkpoint.packed_tensor import PackedTensor
from sparsessm.checkpoint.shelf import Unread
from sparsessm.kernels.matrix import MOST_COLUMNS, PIECE, Matrix

LANES = 16  # channels of a group of Mamba-1; vectors of heads are padded to it too (runtime.h)


class Weights:
    """The tensors of a module, by their names in it."""

    def __init__(self, tensors: Unread, prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a module in which a tensor is missing or has another shape.

        Raises:
            ValueError: naming the first such tensor.
        """
        for name, shape in shapes.items():
            if (found := self.shape(name)) is None:
                raise ValueError(f"the weights have no {self._prefix}{name}")
            if found != shape:
                raise ValueError(f"{self._prefix}{name} has shape {found}, expected {shape}")

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor, None where the model has no such tensor."""
        shape = self._tensors.shapes.get(self._prefix + name)
        return None if shape is None else tuple(shape)

    def stored(self, name: str) -> PackedTensor:
        """A tensor as it is stored."""
        return self._tensors[self._prefix + name]

    def vector(self, name: str) -> Tensor:
        """A tensor in float32."""
        return self.stored(name).decode(torch.float32)

    def optional(self, name: str) -> Tensor | None:
        """The same, None where the model has no such tensor."""
        return self.vector(name) if self._prefix + name in self._tensors else None


def matrix(tensor: PackedTensor) -> Matrix:
    """A checked tensor in the form the kernels read."""
    return matrices(tensor, [None])[0]


def matrices(tensor: PackedTensor, parts: Sequence[Tensor | None]) -> list[Matrix]:
    """The same for some of its rows, and for others; None: all. What is coded is decoded once."""
    if isinstance(tensor, Coded) and (found := _coded(tensor, parts)):
        return found
    held = plain(tensor).bitmask()
    return [_matrix(held, rows) for rows in parts]


def _coded(tensor: Coded, parts: Sequence[Tensor | None]) -> list[Matrix]:
    """As codes; none where they would take no less than the stock dtype, or scales lie otherwise."""
    columns, group, factors = tensor.shape[1], tensor.group, None
    if columns > MOST_COLUMNS:
        return []
    if not tensor.width:
        scale, factors = tensor.factors("rows"), tensor.factors("columns")
    elif group >= columns:
        scale, group = tensor.arrays["scales"][:, 0].float(), 0
    elif group % PIECE == 0:
        scale = tensor.arrays["scales"].float()
    else:
        return []
    codes = torch.from_numpy(tensor.codes())
    found = [Matrix.codes(codes, scale, factors, rows, group=group) for rows in parts]
    stock = sum(made.rows * made.cols for made in found) * tensor.dtype.itemsize
    return found if sum(made.nbytes for made in found) < stock else []


def _matrix(tensor: Encoded, rows: Tensor | None) -> Matrix:
    # float16 is read as float32, and so is a removed value other than zero written out
    if tensor.values.dtype == torch.float16 or tensor.removed:
        values, scale = tensor.decode(torch.float32), None
    elif tensor.kind == "dense":
        values, scale = tensor.values, tensor.scale
    else:
        assert tensor.mask is not None
        return Matrix.packed(tensor.mask, tensor.shape[1], tensor.values, tensor.scale, rows)
    if rows is None:
        return Matrix.dense(values, scale)
    return Matrix.dense(values[rows], None if scale is None else scale[rows])


def padded(vector: Tensor) -> Tensor:
    """(count,) -> float32 with zeros behind it, for whole vectors of the kernels."""
    return F.pad(vector.float(), (0, -len(vector) % LANES))
