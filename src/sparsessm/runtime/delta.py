"""A mixer of the gated delta rule in the native engine (arXiv 2412.06464).

Place in the flow: a `Part` (part.py). A prompt goes through kernels/delta.py, decoding token by token
through kernels/delta_impl.h. A head whose decay is zero answers with beta (q.k) v at once and has no place in
the state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.architectures import removed_a_log
from sparsessm.kernels.delta import gated_delta, unit
from sparsessm.kernels.matrix import Matrix
from sparsessm.runtime import plan
from sparsessm.runtime.keys import Reading
from sparsessm.runtime.mixer import convolved
from sparsessm.runtime.part import Part, Place, Products
from sparsessm.runtime.weights import Weights, matrices
from sparsessm.runtime.weights import matrix as matrix_of


@final
class Delta(Part):
    """Of all families."""

    ORDER = "layer, [inputs of the convolution (K-1, 2GK + HP); states of heads with memory (K, P)]"

    def __init__(self, told: plan.Delta, products: Products, weights: Weights, place: Place) -> None:
        """weights: by full names."""
        super().__init__(place)
        self._told = told
        stored = weights.stored(f"{told.decay}.A_log")
        a_log, forgets = stored.decode(torch.float32).flatten(), removed_a_log(stored.dtype)["memoryless"]
        self._keeps, self._a = a_log < forgets, -torch.exp(a_log)
        self._dt_bias = weights.vector(f"{told.decay}.dt_bias").flatten()
        self._norm = weights.vector(told.norm)
        self._conv = weights.vector(f"{told.name}.conv1d.weight")[:, 0]
        made = _rows(weights, [*told.mixed, told.beta, told.gate, told.step])
        *self._mixed, self._beta, gate, step = made
        self._gate, self._step = (
            _Narrowed(matrix, weights, rows.narrow)
            for matrix, rows in zip((gate, step), (told.gate, told.step), strict=True)
        )
        self._out = products.one(told.out)
        self.inputs = (told.taps - 1) * len(self._conv)
        self._kept = (int(self._keeps.sum()), told.keys, told.channels)
        self.state_size = self.inputs + self._kept[0] * told.keys * told.channels

    def read(self, x: Tensor, state: Tensor, kept: Reading | None = None) -> Tensor:
        """As `Part.read`."""
        told = self._told
        entering = torch.cat([matrix.linear(x) for matrix in self._mixed], -1)
        mixed, rule = convolved(self._conv, None, entering, state)
        rule = rule.view(self._kept)
        share = told.groups * told.keys
        q, k, v = mixed[None].split([share, share, told.heads * told.channels], -1)
        q, k = (unit(part.unflatten(-1, (told.groups, told.keys))) for part in (q, k))
        v = v.unflatten(-1, (told.heads, told.channels))
        step = F.softplus(self._step(x) + self._dt_bias)
        g = self._a * step if not told.by_channel else self._a[:, None] * step.unflatten(-1, (told.heads, -1))
        beta = told.most * torch.sigmoid(self._beta.linear(x))
        start = torch.zeros(1, told.heads, told.keys, told.channels)
        start[0, self._keeps] = rule
        y, last = gated_delta(q * told.keys**-0.5, k, v, g[None], beta[None], start)
        rule.copy_(last[0, self._keeps])
        gate = self._gate(x).unflatten(-1, (told.heads, told.channels))
        gate = torch.sigmoid(gate) if told.curve == "sigmoid" else F.silu(gate)
        y = F.rms_norm(y[0], (told.channels,), self._norm, told.epsilon) * gate
        return self._out(y.flatten(1))

    def native(self) -> dict[str, Any]:
        """As `Part.native`."""
        told = self._told
        return self.place.native() | {
            "kind": "delta",
            "mixed": list(self._mixed),
            "gate": self._gate.matrix,
            "gate_narrow": self._gate.narrow,
            "step": self._step.matrix,
            "step_narrow": self._step.narrow,
            "by_channel": told.by_channel,
            "sigmoid": told.curve == "sigmoid",
            "beta": self._beta,
            "out": self._out.native(),
            "conv": self._conv.T.contiguous().flatten(),
            "taps": told.taps,
            "A": self._a,
            "dt_bias": self._dt_bias,
            "head_norm": self._norm,
            "head_epsilon": told.epsilon,
            "groups": told.groups,
            "keys": told.keys,
            "heads": told.heads,
            "head_width": told.channels,
            "most": told.most,
            "keeps": self._keeps.to(torch.uint8),
        }

    def _matrices(self) -> list[Matrix]:
        return [*self._mixed, *self._gate.matrices(), *self._step.matrices(), self._beta]

    def _vectors(self) -> list[Tensor | None]:
        return [self.place.norm, self._conv, self._a, self._dt_bias, self._norm]

    @property
    def nbytes(self) -> int:
        """As `Part.nbytes`."""
        parts = (*self._matrices(), *self._vectors())
        return self._out.nbytes + sum(part.nbytes for part in parts if part is not None)

    def held(self) -> Iterator[Any]:
        """As `Part.held`; vectors are held twice, for prompts and for decoding."""
        yield from (*self._matrices(), *self._vectors(), *self._vectors())
        yield from self._out.held()


@final
class _Narrowed:
    """A matrix that reads what a narrow one makes of the stream, or without that the stream."""

    def __init__(self, matrix: Matrix, weights: Weights, narrow: str) -> None:
        self.matrix = matrix
        self.narrow = matrix_of(weights.stored(f"{narrow}.weight")) if narrow else None

    def __call__(self, x: Tensor) -> Tensor:
        return self.matrix.linear(x if self.narrow is None else self.narrow.linear(x))

    def matrices(self) -> list[Matrix]:
        """What it has."""
        return [self.matrix, *([] if self.narrow is None else [self.narrow])]


def _rows(weights: Weights, wanted: list[plan.Rows]) -> list[Matrix]:
    """A matrix for each, of tensors that are asked for once."""
    found: dict[int, Matrix] = {}
    for name in dict.fromkeys(each.name for each in wanted):
        places = [i for i, each in enumerate(wanted) if each.name == name]
        made = matrices(weights.stored(f"{name}.weight"), [wanted[i].rows for i in places])
        found |= dict(zip(places, made, strict=True))
    return [found[i] for i in range(len(wanted))]
