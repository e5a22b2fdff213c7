"""What a stock attention module needs to run slab after slab: keys and values so far, positions, a mask; and
by what the runtime turns queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

IMPLEMENTATIONS = ("sdpa", "eager")  # of transformers; both take the mask that is made here

STATIC = ("linear", "llama3", "yarn")  # kinds of positions whose frequencies do not depend on the text


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


def frequencies(config: Any, width: int) -> tuple[Tensor, float]:
    """By what rotary attention turns: radians a token of each pair of channels (pairs,), and a factor of what
    is turned.

    Args:
        config: of a stock model whose attention is rotary. width: channels of a head.

    Raises:
        ValueError: a kind of positions whose frequencies depend on the text.
    """
    told = config.rope_parameters
    kind = told["rope_type"]
    if kind in STATIC:
        found, factor = ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"))
        return found.float(), float(factor)
    if kind != "default":
        raise ValueError(f"rope_type is {kind!r}; supported: default, {', '.join(STATIC)}")
    width = int(width * told.get("partial_rotary_factor", 1.0))
    return 1.0 / told["rope_theta"] ** (torch.arange(0, width, 2).float() / width), 1.0
