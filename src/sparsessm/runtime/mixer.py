"""A layer in the native engine: what all kinds have in common. `mamba1.py` and `mamba2.py` are the kinds.

Place in the flow: below `engine.py`, above the kernels. A prompt goes through `read`, in torch's terms; for
decoding the layer hands matrices and vectors to the native side (`native`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm import kernels
from sparsessm.checkpoint.coded import Coded, plain
from sparsessm.checkpoint.encoding import Encoded
from sparsessm.checkpoint.packed_tensor import PackedTensor
from sparsessm.checkpoint.shelf import Unread
from sparsessm.kernels.matrix import MOST_COLUMNS, PIECE, Matrix

LANES = 16  # channels of a group of Mamba-1; vectors of heads are padded to it too (runtime.h)


class Weights:
    """The tensors of one layer, by their names in it."""

    def __init__(self, tensors: Unread, prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a layer in which a tensor is missing or has another shape.

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


class Mixer(ABC):
    """A layer: norm, in_proj in parts, convolution, what the kind has behind it, out_proj.

    Attributes:
        ORDER: names the order of the values in a layer's part of the state.
        state_size: floats of a sequence's state that are this layer's; inputs of the convolution come first.
    """

    ORDER: ClassVar[str]
    in_x: Matrix
    in_z: Matrix
    in_bias: Tensor | None  # of in_x, then of in_z
    state_size: int

    def __init__(self, weights: Weights) -> None:
        self.norm, self.skip = weights.vector("norm.weight"), weights.vector("mixer.D")
        self.conv = weights.vector("mixer.conv1d.weight")[:, 0]
        self.conv_bias = weights.optional("mixer.conv1d.bias")
        self.out_bias = weights.optional("mixer.out_proj.bias")
        self.out_proj = matrix(weights.stored("mixer.out_proj.weight"))

    @staticmethod
    @abstractmethod
    def sizes(config: Any) -> dict[str, Any]:
        """What the decoder asks for beside the sizes that all kinds have (native_runtime.cpp)."""

    @abstractmethod
    def read(self, x: Tensor, state: Tensor) -> Tensor:
        """(L, d_model), normalised -> (L, d_model); `state` (state_size,) is advanced."""

    @abstractmethod
    def matrices(self) -> dict[str, Matrix]:
        """Those that a decoding step reads, by the decoder's names."""

    @abstractmethod
    def vectors(self) -> list[Tensor | None]:
        """What a decoding step reads of this kind of layer beside the matrices; None: the model has none."""

    @abstractmethod
    def of_kind(self) -> dict[str, Any]:
        """What the decoder takes of this kind of layer beside the matrices and what all kinds have."""

    def native(self) -> dict[str, Any]:
        """The layer as the decoder takes it."""
        return {
            "conv": self.conv.T.contiguous().flatten(),
            "norm": self.norm,
            "conv_bias": self.conv_bias,
            "in_bias": self.in_bias,
            "out_bias": self.out_bias,
            **self.matrices(),
            **self.of_kind(),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one decoding step reads."""
        of_all = (self.skip, self.norm, self.conv, self.conv_bias, self.in_bias, self.out_bias)
        parts = (*of_all, *self.matrices().values(), *self.vectors())
        return sum(part.nbytes for part in parts if part is not None)

    @abstractmethod
    def beside(self) -> Sequence[Tensor]:
        """Tensors that it holds in objects of its own."""

    def held(self) -> Iterator[Any]:
        """Everything in memory; vectors are held twice, for prompts and for decoding."""
        yield from (*vars(self).values(), *self.beside())
        yield from (part for part in self.native().values() if isinstance(part, Tensor))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(L, d_model) -> what goes into the convolution (L, M), and the gate (L, D)."""
        of_x = of_z = None
        if self.in_bias is not None:
            of_x, of_z = self.in_bias.split([self.in_x.rows, self.in_z.rows])
        return self.in_x.linear(x, of_x), self.in_z.linear(x, of_z)

    def convolve(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(L, M) -> (L, M) after convolution and SiLU, and what follows its inputs in the layer's state."""
        channels, taps = self.conv.shape
        past = taps - 1
        conv, rest = state.split([past * channels, len(state) - past * channels])
        before = conv.view(past, channels)
        next_before = torch.cat([before, x[-past:] if past else x[:0]])[-past:][:past]
        x = kernels.causal_conv1d(x[None], self.conv, self.conv_bias, before[None], silu=True)[0]
        conv.copy_(next_before.flatten())
        return x, rest


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
