"""Units of a layer that can be taken out whole, and the cut through every tensor they have a place in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Where the units of an axis lie in one tensor: unit i is start + i * width and the `width - 1` after it.

    Attributes:
        tensor: name inside the layer, e.g. "mixer.in_proj.weight". dim: the dimension they lie along.
    """

    tensor: str
    dim: int
    start: int = 0
    width: int = 1


@dataclass(frozen=True)
class Axis:
    """Units of a layer that can be taken out whole, in every tensor that has a place for them.

    A layer may have several axes of one name (the heads of each group, the states of each group): they choose
    their units apart and lose the same number.

    Attributes:
        name: "state", "channel" or "head". size: number of units. parts: all tensors that share the axis.
        write, read: rows that make what states take in, and what reads them, linearly: those of the kept ones
            may be replaced by any mixture of all. None where something that is not linear comes behind them
            (a norm, a SiLU).
    """

    name: str
    size: int
    parts: tuple[Part, ...]
    write: Part | None = None
    read: Part | None = None


def cut(tensors: Mapping[str, Tensor], axes: Sequence[Axis], keeps: Sequence[Tensor]) -> dict[str, Tensor]:
    """A layer's tensors without the units that are not kept: every tensor that shares an axis gets smaller.

    Args:
        tensors: by name inside the layer. keeps: for each axis (units,) bool, True = kept.
    """
    kept: dict[tuple[str, int], Tensor] = {}
    for axis, keep in zip(axes, keeps, strict=True):
        for part in axis.parts:
            tensor = tensors[part.tensor]
            everything = tensor.new_ones(tensor.shape[part.dim], dtype=torch.bool)
            mask = kept.setdefault((part.tensor, part.dim), everything)
            mask[part.start : part.start + axis.size * part.width] &= keep.repeat_interleave(part.width)
    smaller = dict(tensors)
    for (name, dim), mask in kept.items():
        smaller[name] = smaller[name].index_select(dim, mask.nonzero()[:, 0])
    return smaller
