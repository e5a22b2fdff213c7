"""A part of a layer in the native engine: what it reads, what it is, and where what it gives goes.

Place in the flow: what `engine.py` has a list of. The kinds are `mamba1.py` and `mamba2.py` (over
`mixer.py`), `delta.py`, `attention.py`, `latent.py` and `mlp.py`; each has a counterpart in the decoder
(kernels/runtime.h).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from sparsessm.kernels.matrix import Matrix
from sparsessm.runtime.keys import Reading
from sparsessm.runtime.plan import Product
from sparsessm.runtime.weights import Weights, matrices


@dataclass(frozen=True, eq=False)
class Place:
    """Where a part stands: `Planned` (plan.py), with the norms' weights (width,) in place of their names."""

    norm: Tensor | None
    reads: str = "stream"
    beside: bool = False
    scale: float = 1.0
    after: Tensor | None = None

    def native(self) -> dict[str, Any]:
        """As the decoder takes it."""
        return vars(self)


class Part(ABC):
    """One of the things that a layer consists of.

    Attributes:
        state_size: floats of a sequence's state that are this part's.
        block: floats of a block of keys and values that are this part's.
        inputs: floats at the beginning of its state that are inputs of a convolution.
    """

    inputs = 0
    state_size = 0
    block = 0

    def __init__(self, place: Place) -> None:
        self.place = place

    @abstractmethod
    def read(self, x: Tensor, state: Tensor, kept: Reading | None = None) -> Tensor:
        """Read several tokens of one sequence.

        Args:
            x: (L, what the part reads), normalised. state: (state_size,), advanced in place.
            kept: keys and values of the sequence; None where no part has any.

        Returns:
            (L, d_model).
        """

    @abstractmethod
    def native(self) -> dict[str, Any]:
        """The part as the decoder takes it (native_network.cpp)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of weights that one decoding step reads."""

    @abstractmethod
    def held(self) -> Iterator[Any]:
        """What it has in memory, as often as it is there; other things may be among it."""


@final
class Linear:
    """A product, and what is done to what comes out: multiplied, an adapter's added, then the bias."""

    def __init__(
        self,
        matrix: Matrix,
        bias: Tensor | None = None,
        scale: float = 1.0,
        adapter: tuple[Matrix, Matrix] | None = None,
    ) -> None:
        """bias: (rows,) float32. adapter: wide and narrow, of which wide (narrow x) is added."""
        self.matrix, self.bias, self.scale, self.adapter = matrix, bias, scale, adapter

    def __call__(self, x: Tensor) -> Tensor:
        """(L, cols) -> (L, rows)."""
        if self.adapter is None:
            return scaled(self.matrix, x, self.bias, self.scale)
        wide, narrow = self.adapter
        out = scaled(self.matrix, x, None, self.scale).add_(wide.linear(narrow.linear(x)))
        return out if self.bias is None else out.add_(self.bias)

    def native(self) -> dict[str, Any]:
        """As the decoder takes it."""
        wide, narrow = self.adapter or (None, None)
        more = {} if self.adapter is None else {"wide": wide, "narrow": narrow}
        return {"matrix": self.matrix, "bias": self.bias, "scale": self.scale, **more}

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a product reads."""
        return sum(
            part.nbytes for part in (self.matrix, *(self.adapter or ()), self.bias) if part is not None
        )

    def held(self) -> Iterator[Any]:
        """As `Part.held`; biases are held twice, for prompts and for decoding."""
        yield from (self.matrix, *(self.adapter or ()), self.bias, self.bias)


def scaled(matrix: Matrix, x: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """x (L, cols) -> (matrix x) scale + bias, (L, rows).

    What a matrix of integers reads is not multiplied before it is rounded, as in decoding.
    """
    if scale == 1:
        return matrix.linear(x, bias)
    out = matrix.linear(x).mul_(scale)
    return out if bias is None else out.add_(bias)


@final
class Products:
    """Makes products of a model's tensors, those that several layers share once."""

    def __init__(self, weights: Weights) -> None:
        """weights: by full names."""
        self._weights = weights
        self._made: dict[tuple[str, int], list[Matrix]] = {}

    def one(self, told: Product) -> Linear:
        """A product of all rows of a tensor."""
        return self._linears([told])[0]

    def pair(self, gate: Product | None, up: Product) -> tuple[Linear | None, Linear]:
        """Gate and up of an MLP; where both are in one tensor the gate is its upper half."""
        if gate is None or gate.name != up.name:
            return (None if gate is None else self.one(gate)), self.one(up)
        first, second = self._linears([gate, up])
        return first, second

    def rows(self, told: Product, parts: list[Tensor]) -> list[Linear]:
        """Products of some rows of a tensor, without adapter."""
        made = matrices(self._weights.stored(f"{told.name}.weight"), list(parts))
        bias, scale = self._weights.optional(f"{told.name}.bias"), told.scale * told.inputs
        biases = [None if bias is None else bias[rows] * told.scale for rows in parts]
        return [Linear(matrix, own, scale) for matrix, own in zip(made, biases, strict=True)]

    def vector(self, name: str) -> Tensor:
        """A tensor in float32."""
        return self._weights.vector(name)

    def _linears(self, told: list[Product]) -> list[Linear]:
        """Of the same tensor, cut into as many equal pieces."""
        names, count = told[0], len(told)
        found, biases = self._matrices(f"{names.name}.weight", count), [None] * count
        if (bias := self._weights.optional(f"{names.name}.bias")) is not None:
            biases = [part.contiguous() for part in bias.chunk(count)]
        adapters: list[tuple[Matrix, Matrix] | None] = [None] * count
        if names.adapter:
            (narrow,) = self._matrices(f"{names.adapter}.0.weight", 1)
            adapters = [(wide, narrow) for wide in self._matrices(f"{names.adapter}.1.weight", count)]
        made = []
        for each, matrix, own, adapter in zip(told, found, biases, adapters, strict=True):
            bias = own if own is None or each.scale == 1 else own * each.scale
            made.append(Linear(matrix, bias, each.scale * each.inputs, adapter))
        return made

    def _matrices(self, name: str, count: int) -> list[Matrix]:
        if (name, count) not in self._made:
            stored = self._weights.stored(name)
            rows = torch.arange(stored.shape[0]).chunk(count)
            self._made[name, count] = matrices(stored, [None] if count == 1 else list(rows))
        return self._made[name, count]


def native_of(products: Mapping[str, Linear | None]) -> dict[str, Any]:
    """Products as the decoder takes them, by its names."""
    return {name: None if part is None else part.native() for name, part in products.items()}
