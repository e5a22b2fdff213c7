"""What a stock attention module needs to run slab after slab: keys and values so far, positions, a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IMPLEMENTATIONS = ("sdpa", "eager")  # of transformers; both take the mask that is made here


class Keys:
    """Stands in for transformers' `Cache`, of which an attention module calls `update` alone.

    What it was given is left as it is, so that a slab can be run again from the same state.
    """

    def __init__(self, past: tuple[Tensor, Tensor] | None) -> None:
        self.past = past  # keys and values, (W, heads, tokens so far, channels of a head) each

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values so far, those of the slab included."""
        if self.past is not None:
            keys, values = torch.cat([self.past[0], keys], -2), torch.cat([self.past[1], values], -2)
        self.past = keys, values
        return keys, values


def causal_mask(start: int, slab: Tensor) -> Tensor:
    """(1, 1, T, start + T), added to the scores: -inf where a step would see a later one.

    Args:
        start: tokens before the slab. slab: (W, T, ...), whose dtype and device the mask has.
    """
    steps = slab.shape[1]
    mask = torch.full((steps, start + steps), -torch.inf, dtype=slab.dtype, device=slab.device)
    return mask.triu(start + 1)[None, None]


def positions(start: int, slab: Tensor) -> Tensor:
    """(1, T) positions of a slab's tokens in their windows."""
    return torch.arange(start, start + slab.shape[1], device=slab.device)[None]
