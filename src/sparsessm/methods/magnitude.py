"""The methods that look at no data: the smallest absolute values (Han et al., arXiv 1506.02626), plain
rounding, and the floor, a random choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsessm.methods.base import EntryMethod, Rule


def _magnitude(weight: Tensor, seen: Any, rule: Rule, columns: slice) -> Tensor:
    return weight.abs()


def _random(weight: Tensor, seen: Any, rule: Rule, columns: slice) -> Tensor:
    generator = torch.Generator().manual_seed(rule.seed)
    # Drawn on the CPU: the same choice on every device.
    return torch.rand(weight.shape, generator=generator).to(weight.device)


magnitude = EntryMethod(
    name="magnitude",
    paper="Han et al. 2015, arXiv 1506.02626",
    summary="smallest |weight|; needs no data",
    families=("ssm", "projections", "conv1d", "head", "embedding"),
    watch=None,
    score=_magnitude,
    options=("grid",),
)

rtn = EntryMethod(
    name="rtn",
    paper="-",
    summary="every weight to the nearest value of a grid; needs no data, prunes nothing unless asked to",
    families=("projections", "head", "embedding"),
    watch=None,
    score=_magnitude,
    largest=True,
    defaults={"allocation": "uniform", "grid": "int4"},
)

random = EntryMethod(
    name="random",
    paper="-",
    summary="a seeded random choice: the floor for every other method",
    families=("ssm", "projections", "conv1d", "head", "embedding"),
    watch=None,
    score=_random,
)
