"""Optimal brain surgery for linear layers: SparseGPT (Frantar & Alistarh, arXiv 2301.00774) and its rounding
twin GPTQ (Frantar et al., arXiv 2210.17323) as published, and `absorb` (ours), the same sweep with another
aim and another price.

`absorb` differs in four ways (docs/methods.md). Three are recipe fields of their own: its repair aims at the
layer's output in the dense model, so that it absorbs what pruning did to the layers before it; an error in
an output row costs what the loss says it costs; matrices compete for the budget by that cost. And after the
sweep all survivors are repaired once more, together.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsessm.methods.base import EntryMethod, Rule
from sparsessm.methods.hessian import Factor, near
from sparsessm.methods.observers import InputGram


def _watch(weight: Tensor, rule: Rule) -> Any:
    return InputGram(paired=rule.paired)


def _score(weight: Tensor, seen: Factor, rule: Rule, columns: slice) -> Tensor:
    # A dead input's weights cost nothing (SparseGPT's code sets them to 0).
    score = (weight / seen.pivots[..., columns]).square().masked_fill(seen.dead[..., columns], 0.0)
    if rule.prices is None or not (rule.prices > 0).any():  # of rows that all cost nothing none comes first
        return score
    # Only the order counts: costs are brought near 1, so that none is lost in the dtype of the weights.
    return score * (rule.prices / near(rule.prices.max()))[:, None].to(score.dtype)


def _total(weight: Tensor, seen: Factor, rule: Rule) -> Tensor:
    score = (weight.square() / seen.inverse_diagonal).masked_fill(seen.dead, 0.0)
    return score if rule.prices is None else score.double() * rule.prices[:, None]


sparsegpt = EntryMethod(
    name="sparsegpt",
    paper="SparseGPT, arXiv 2301.00774",
    summary="optimal brain surgery column by column, restoring each layer's own output",
    families=("projections", "conv1d", "head"),
    watch=_watch,
    score=_score,
    hessian=True,
    total=_total,
    largest=True,
    defaults={"repair": "self", "price": "none", "allocation": "uniform"},
    options=("grid",),
)

gptq = EntryMethod(
    name="gptq",
    paper="GPTQ, arXiv 2210.17323",
    summary="the same sweep, which rounds to a grid; prunes nothing unless asked to",
    families=("projections", "head"),
    watch=_watch,
    score=_score,
    hessian=True,
    total=_total,
    largest=True,
    defaults={"repair": "self", "price": "none", "allocation": "uniform", "grid": "int4"},
)

absorb = EntryMethod(
    name="absorb",
    paper="ours; docs/methods.md",
    summary="the same towards the dense model's output, rows and matrices weighed by the loss",
    families=("projections", "conv1d", "head", "embedding"),
    watch=_watch,
    score=_score,
    hessian=True,
    width=32,
    refit=True,
    total=_total,
    defaults={"repair": "dense-target", "price": "fisher", "allocation": "loss"},
    options=("grid", "bits"),
)
