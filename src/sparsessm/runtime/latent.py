"""Latent attention in the native engine: a token leaves one row, of which each head makes its key and value.

Place in the flow: a `Part` (part.py); the rows of earlier tokens are in the state (keys.py). Keys and values
are never made: a head's queries go through its matrix of keys, transposed, and meet the rows themselves; what
they gather goes through its matrix of values. Prompts do the same with whole slabs, so that a state is the
same either way; decoding is in kernels/attention_impl.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.kernels.matrix import Matrix
from sparsessm.runtime import plan
from sparsessm.runtime.keys import Reading, floats_of
from sparsessm.runtime.part import Linear, Part, Place, Products, native_of
from sparsessm.runtime.weights import Weights, matrices


@final
class Latent(Part):
    """Of Kimi Linear.

    Attributes:
        at: floats of a block that are other parts'.
    """

    ORDER = "tokens; blocks of 64: layer, numbers (channels, 64), common (channels, 64)"

    def __init__(
        self,
        told: plan.Latent,
        products: Products,
        weights: Weights,
        place: Place,
        at: int,
        int8: bool = False,
    ) -> None:
        """weights: by full names. int8: as of `Keys`; numbers and common channels then have a scale each."""
        super().__init__(place)
        self._told, self.at = told, at
        self._narrow = None if told.narrow is None else products.one(told.narrow)
        self._q, self._row, self._o = map(products.one, (told.q, told.row, told.o))
        self._q_norm = weights.vector(told.q_norm) if told.q_norm else None
        self._norm = weights.vector(told.norm)
        stored = weights.stored(f"{told.wide.name}.weight")
        rows = torch.arange(stored.shape[0]).view(told.heads, told.own + told.width)
        self._values = matrices(stored, list(rows[:, told.own :]))
        # Matrices are stored by rows; these are read by columns, so that each has a copy of its own.
        whole = _exact(stored.decode(torch.float32))
        self._keys = [Matrix.dense(whole[own[: told.own]].T.contiguous()) for own in rows]
        self._numbers = floats_of(told.rank, int8)
        self.block = self._numbers + floats_of(told.common, int8)

    def read(self, x: Tensor, state: Tensor, kept: Reading | None = None) -> Tensor:
        """As `Part.read`."""
        assert kept is not None, "rows are in the state"
        told = self._told
        if self._narrow is not None and self._q_norm is not None:
            q = self._q(_normed(self._narrow(x), self._q_norm, told.epsilon))
        else:
            q = self._q(x)
        numbers, common = self._row(x).split([told.rank, told.common], -1)
        (numbers,) = kept.add(self.at, _normed(numbers, self._norm, told.epsilon)[:, None])
        (common,) = kept.add(self.at + self._numbers, common[:, None])
        known = torch.cat([numbers, common], -1)  # (T, rank + common)
        own, common = q.unflatten(-1, (told.heads, -1)).split([told.own, told.common], -1)
        through = [matrix.linear(own[:, h].contiguous()) for h, matrix in enumerate(self._keys)]
        queries = torch.cat([torch.stack(through), common.transpose(0, 1)], -1)  # (heads, L, rank + common)
        # Keys are values as well: what is gathered of the common channels is left out.
        every = known.expand(told.heads, -1, -1)[None]
        met = F.scaled_dot_product_attention(queries[None], every, every, kept.mask, scale=told.scale)[0]
        met = met[..., : told.rank].contiguous()
        return self._o(torch.cat([matrix.linear(met[h]) for h, matrix in enumerate(self._values)], -1))

    def _products(self) -> dict[str, Linear | None]:
        return {"narrow": self._narrow, "q": self._q, "row": self._row, "o": self._o}

    def native(self) -> dict[str, Any]:
        """As `Part.native`."""
        told = self._told
        sizes = {"heads": told.heads, "rank": told.rank, "common": told.common, "own": told.own}
        how = {"kind": "latent", "head_width": told.width, "score_scale": told.scale}
        norms = {"q_norm": self._q_norm, "row_norm": self._norm, "row_epsilon": told.epsilon}
        each = {"keys": self._keys, "values": self._values}
        return self.place.native() | how | sizes | norms | each | native_of(self._products())

    @property
    def nbytes(self) -> int:
        """As `Part.nbytes`."""
        parts = (*self._norms(), *self._products().values(), *self._keys, *self._values)
        return sum(part.nbytes for part in parts if part is not None)

    def _norms(self) -> list[Tensor | None]:
        return [self.place.norm, self._q_norm, self._norm]

    def held(self) -> Iterator[Any]:
        """As `Part.held`."""
        yield from (*self._norms(), *self._norms(), *self._keys, *self._values)
        for part in self._products().values():
            if part is not None:
                yield from part.held()


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, epsilon)


def _exact(values: Tensor) -> Tensor:
    """In bfloat16 where that changes none of them."""
    short = values.bfloat16()
    return short if torch.equal(short.float(), values) else values
