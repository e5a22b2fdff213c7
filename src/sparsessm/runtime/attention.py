"""Attention in the native engine: groups of queries for each head of keys, turned by their position or not.

Place in the flow: a `Part` (part.py); the keys and values of earlier tokens are in the state (keys.py). A
prompt goes through torch's `scaled_dot_product_attention`, decoding through kernels/attention_impl.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.runtime import plan
from sparsessm.runtime.keys import Reading, floats_of
from sparsessm.runtime.part import Linear, Part, Place, Products, native_of


@final
class Attention(Part):
    """Of all families.

    Attributes:
        at: floats of a block of keys and values that are other parts'.
    """

    ORDER = "tokens; blocks of 64: layer, [keys (heads, channels, 64); values alike]"

    def __init__(
        self,
        told: plan.Attention,
        products: Products,
        place: Place,
        at: int,
        whole: plan.Plan,
        int8: bool = False,
    ) -> None:
        """whole: the plan that it is a part of. int8: as of `Keys`."""
        super().__init__(place)
        self._told, self.at, self._epsilon = told, at, whole.epsilon
        self._gate: Linear | None = None
        if told.gated:
            both = torch.arange(2 * told.heads * told.width).view(told.heads, 2, told.width)
            self._q, self._gate = products.rows(told.q, [both[:, 0].flatten(), both[:, 1].flatten()])
        else:
            self._q = products.one(told.q)
        self._k, self._v, self._o = map(products.one, (told.k, told.v, told.o))
        self._q_norm, self._k_norm = (
            whole.norm_of(products.vector(name)) if name else None for name in (told.q_norm, told.k_norm)
        )
        self.block = 2 * told.shared * floats_of(told.width, int8)

    def read(self, x: Tensor, state: Tensor, kept: Reading | None = None) -> Tensor:
        """As `Part.read`."""
        assert kept is not None, "keys and values are in the state"
        width = self._told.width
        q, k, v = (made(x).unflatten(-1, (-1, width)) for made in (self._q, self._k, self._v))
        if self._q_norm is not None and self._k_norm is not None:
            q, k = (
                F.rms_norm(
                    part.reshape(len(x), *norm.shape) if self._told.norm_whole else part,
                    norm.shape,
                    norm,
                    self._epsilon,
                )
                for part, norm in ((q, self._q_norm), (k, self._k_norm))
            )
            q, k = (part.view(len(x), -1, width) for part in (q, k))
        if self._told.rotary:
            q, k = kept.turned(q), kept.turned(k)
        keys, values = kept.keep(self.at, k, v)
        met = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=kept.mask,
            scale=self._told.scale,
            enable_gqa=self._told.heads != self._told.shared,
        )
        met = met[0].transpose(0, 1).flatten(1)
        return self._o(met if self._gate is None else met * torch.sigmoid(self._gate(x)))

    def _products(self) -> dict[str, Linear | None]:
        return {"q": self._q, "k": self._k, "v": self._v, "o": self._o, "gate": self._gate}

    def native(self) -> dict[str, Any]:
        """As `Part.native`."""
        told = self._told
        sizes = {"heads": told.heads, "shared": told.shared, "head_width": told.width}
        how = {"kind": "attention", "score_scale": told.scale, "rotary": told.rotary}
        norms = {"q_norm": self._q_norm, "k_norm": self._k_norm, "norm_whole": told.norm_whole}
        return self.place.native() | how | sizes | norms | native_of(self._products())

    @property
    def nbytes(self) -> int:
        """As `Part.nbytes`."""
        parts = (*self._norms(), *self._products().values())
        return sum(part.nbytes for part in parts if part is not None)

    def _norms(self) -> list[Tensor | None]:
        return [self.place.norm, self._q_norm, self._k_norm]

    def held(self) -> Iterator[Any]:
        """As `Part.held`."""
        yield from (*self._norms(), *self._norms())
        for part in self._products().values():
            if part is not None:
                yield from part.held()
