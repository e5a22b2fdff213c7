"""A mixer in the native engine: what both kinds have in common. `mamba1.py` and `mamba2.py` are the kinds.

Place in the flow: a `Part` (part.py) of a layer, above the kernels. A prompt goes through `read`, in torch's
terms; for decoding the mixer hands matrices and vectors to the native side (`native`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsessm import kernels
from sparsessm.kernels.matrix import Matrix
from sparsessm.runtime.part import Part, Place, scaled
from sparsessm.runtime.weights import Weights, matrix


class Mixer(Part):
    """in_proj in parts, convolution, what the kind has behind it, out_proj.

    Attributes:
        ORDER: names the order of the values in a mixer's part of the state, inputs of the convolution first.
    """

    ORDER: ClassVar[str]
    in_x: Matrix
    in_z: Matrix
    in_bias: Tensor | None  # of in_x, then of in_z
    in_scale = gate_scale = 1.0  # of what in_x and in_z give, before the bias

    def __init__(self, weights: Weights, place: Place) -> None:
        super().__init__(place)
        self.skip = weights.vector("D")
        self.conv = weights.vector("conv1d.weight")[:, 0]
        self.conv_bias = weights.optional("conv1d.bias")
        self.inputs = self.conv.shape[0] * (self.conv.shape[1] - 1)
        self.out_bias = weights.optional("out_proj.bias")
        self.out_proj = matrix(weights.stored("out_proj.weight"))

    @staticmethod
    @abstractmethod
    def sizes(config: Any) -> dict[str, Any]:
        """What the decoder asks for beside the sizes that all kinds have (native_runtime.cpp)."""

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
        """As `Part.native`."""
        return {
            **self.place.native(),
            "conv": self.conv.T.contiguous().flatten(),
            "in_scale": self.in_scale,
            "gate_scale": self.gate_scale,
            "conv_bias": self.conv_bias,
            "in_bias": self.in_bias,
            "out_bias": self.out_bias,
            **self.matrices(),
            **self.of_kind(),
        }

    @property
    def nbytes(self) -> int:
        """As `Part.nbytes`."""
        of_all = (self.skip, self.place.norm, self.conv, self.conv_bias, self.in_bias, self.out_bias)
        parts = (*of_all, *self.matrices().values(), *self.vectors())
        return sum(part.nbytes for part in parts if part is not None)

    @abstractmethod
    def beside(self) -> Sequence[Tensor]:
        """Tensors that it holds in objects of its own."""

    def held(self) -> Iterator[Any]:
        """As `Part.held`; vectors are held twice, for prompts and for decoding."""
        yield from (*vars(self).values(), self.place.norm, *self.beside())
        yield from (part for part in self.native().values() if isinstance(part, Tensor))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(L, d_model) -> what goes into the convolution (L, M), and the gate (L, D)."""
        of_x = of_z = None
        if self.in_bias is not None:
            of_x, of_z = self.in_bias.split([self.in_x.rows, self.in_z.rows])
        return scaled(self.in_x, x, of_x, self.in_scale), scaled(self.in_z, x, of_z, self.gate_scale)

    def convolve(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As `convolved`."""
        return convolved(self.conv, self.conv_bias, x, state)


def convolved(conv: Tensor, bias: Tensor | None, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """x (L, M) after convolution and SiLU, and what follows the last inputs in a mixer's state.

    Args:
        conv: (M, K). state: (n,), begins with the K - 1 inputs before x, which are replaced by the last ones.
    """
    channels, taps = conv.shape
    past = taps - 1
    last, rest = state.split([past * channels, len(state) - past * channels])
    before = last.view(past, channels)
    next_before = torch.cat([before, x[-past:] if past else x[:0]])[-past:][:past]
    x = kernels.causal_conv1d(x[None], conv, bias, before[None], silu=True)[0]
    last.copy_(next_before.flatten())
    return x, rest
