"""WHO is pruned how much: one overall sparsity -> a sparsity for each matrix. ALLOCATIONS is the table.

A row says what a survey of the dense model looks at, what it keeps of each matrix, and how the matrices of
one budget share it (pruning/shares.py asks); formulas in docs/methods.md. A new allocation is a row; nothing
else names it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsessm.methods.base import UNIFORM, Allocation, Member, Rule, scorer
from sparsessm.methods.dial import Curve, foretell
from sparsessm.methods.hessian import by_power, factorise
from sparsessm.methods.observers import InputNorm, joined

OUTLIER = 5.0  # OWL's M: an outlier is a score above M times the mean of its block
SAMPLE = 1 << 16  # scores of a matrix that are kept for `loss`


def parse(text: str, family: str = "projections") -> tuple[Allocation, float]:
    """The row and its number of "uniform", "hessian-trace[:ALPHA]", "owl[:LAMBDA]" or "loss[:CLIP]".

    Args:
        family: of the targets; a row may have another default there.

    Raises:
        ValueError: anything else, with what is allowed.
    """
    name, _, number = text.partition(":")
    row = ALLOCATIONS.get(name)
    if row and (row.letter or not number):
        try:
            value = float(number) if number else row.defaults.get(family, row.default)
        except ValueError:
            value = math.nan
        if 0 <= value <= 1:
            return row, value
    raise ValueError(f"allocation is {text!r}; allowed: {listed()}, with a number from 0 to 1")


def listed() -> str:
    """What can be typed."""
    return ", ".join(f"{row.name}[:{row.letter}]" if row.letter else row.name for row in ALLOCATIONS.values())


@dataclass(frozen=True)
class Profile:
    """The scores of a matrix in order, thinned out evenly.

    Attributes:
        scores: (S,) ascending. total: entries of the matrix.
    """

    scores: Tensor
    total: int

    @classmethod
    def of(cls, score: Tensor, unit: float = 1.0) -> Profile:
        """score: any shape. unit: what a score of 1 is worth."""
        ordered = score.flatten().sort().values
        if (total := ordered.numel()) > SAMPLE:
            ordered = ordered[torch.arange(SAMPLE, device=score.device) * total // SAMPLE]
        return cls(ordered.double() * unit, total)  # in float64: the units of matrices may lie far apart


def by_threshold(profiles: Sequence[Profile], sparsity: float, clip: float) -> list[float]:
    """One threshold over all matrices: each loses what lies below it, but sparsity - clip at least and
    sparsity + clip at most.

    Args:
        profiles: one for each matrix.

    Returns:
        A sparsity for each, whose mean over all entries is `sparsity` up to the thinning of the profiles.
    """
    lowest, open_, weights, owners = [], [], [], []
    for number, profile in enumerate(profiles):
        size = len(profile.scores)
        low, high = round(max(sparsity - clip, 0) * size), round(min(sparsity + clip, 1) * size)
        lowest.append(low * profile.total / size)
        open_.append(profile.scores[low:high])
        weights.append(profile.scores.new_full((high - low,), profile.total / size, dtype=torch.float64))
        owners.append(profile.scores.new_full((high - low,), number, dtype=torch.int64))
    order = torch.cat(open_).sort(stable=True).indices
    weight, owner = torch.cat(weights)[order], torch.cat(owners)[order]
    wanted = sparsity * sum(profile.total for profile in profiles) - sum(lowest)
    chosen = weight.cumsum(0) - weight / 2 < wanted  # to the nearest
    removed = weight.new_zeros(len(profiles)).index_add_(0, owner[chosen], weight[chosen])
    return [
        min((low + float(more)) / profile.total, 1.0)
        for low, more, profile in zip(lowest, removed, profiles, strict=True)
    ]


def hessian_trace(powers: Sequence[Tensor], sparsity: float, alpha: float) -> list[float]:
    """SparseSSM's rule for matrices of one kind: the larger sum_j H_jj^2 / columns, the less sparse.

    Sparsities fall linearly by rank from sparsity + alpha to sparsity - alpha; their mean stays.

    Args:
        powers: (in,) diagonal of each matrix's Hessian.
    """
    sensitivity = torch.stack([power.double().square().mean() for power in powers])
    rank = sensitivity.argsort(stable=True).argsort().double()  # 0: the least sensitive
    last = max(len(powers) - 1, 1)
    ramp = alpha * (1 - 2 * rank / last) if len(powers) > 1 else torch.zeros_like(rank)
    return _shifted(ramp, torch.ones_like(ramp), sparsity)


def owl(ratios: Sequence[float], entries: Sequence[int], sparsity: float, width: float) -> list[float]:
    """OWL: the larger the share of outliers in a block, the less sparse it is.

    Ratios are scaled to a range of 2 x width and shifted until the mean over all entries is `sparsity`, as in
    the authors' code.

    Args:
        ratios: of each block, `outlier_ratio`. entries: of each block.
    """
    outliers = torch.tensor(ratios, dtype=torch.float64)
    spread = outliers.max() - outliers.min()
    change = -2 * width * (outliers - outliers.min()) / spread if spread > 0 else torch.zeros_like(outliers)
    return _shifted(change, torch.tensor(entries, dtype=torch.float64), sparsity)


def outlier_ratio(scores: Sequence[Tensor]) -> float:
    """Share of a block's scores above `OUTLIER` times their mean; one tensor for each of its matrices."""
    total = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / total
    return sum(int((score > OUTLIER * mean).sum()) for score in scores) / total


def _shifted(change: Tensor, entries: Tensor, sparsity: float) -> list[float]:
    """sparsity + change, shifted so that the mean over entries is the sparsity; within [0, 1]."""
    change = change - (change * entries).sum() / entries.sum()
    # Near 0 and 1 there is no room for the full change: it shrinks for all, and the mean stays exact.
    room = min(sparsity, 1 - sparsity)
    largest = float(change.abs().max())
    change = change * min(1.0, room / largest) if largest > 0 else change
    return [sparsity + float(part) for part in change]


def _norm(weight: Tensor, rule: Rule) -> InputNorm:
    return InputNorm()


def _power(weight: Tensor, seen: Any, rule: Rule, gone: Tensor) -> Tensor:
    return seen.power


def _outputs(weight: Tensor, seen: Any, rule: Rule, gone: Tensor) -> Tensor:
    return weight.double().abs() * seen.power.sqrt()


def _own(weight: Tensor, rule: Rule) -> Any | None:
    return rule.method.watch(weight, rule) if rule.method.watch else None


def _profile(weight: Tensor, seen: Any, rule: Rule, gone: Tensor) -> Profile:
    unit = 1.0
    if rule.method.hessian:
        moments, unit = joined(seen, rule.also, weight.shape[1]).scaled(weight.dtype)
        seen = factorise(moments.gram)
    score = scorer(rule, seen)(weight, slice(None))
    return Profile.of(score.masked_fill(gone, -torch.inf), unit)


def _share_by_trace(members: Sequence[Member], sparsity: float, alpha: float) -> list[float]:
    """in_proj and out_proj each for themselves; the others get the overall sparsity, as in the paper."""
    shares = [sparsity] * len(members)
    for kind in ("in_proj", "out_proj"):
        part = [i for i, member in enumerate(members) if member.kind == kind]
        ramp = hessian_trace([members[i].seen for i in part], sparsity, alpha) if part else []
        for i, share in zip(part, ramp, strict=True):
            shares[i] = share
    return shares


def _share_by_outliers(members: Sequence[Member], sparsity: float, width: float) -> list[float]:
    """All matrices of a layer get the same."""
    layers = sorted({member.layer for member in members})
    parts = [[member for member in members if member.layer == layer] for layer in layers]
    ratios = [outlier_ratio([member.seen for member in part]) for part in parts]
    entries = [sum(member.entries for member in part) for part in parts]
    shares = dict(zip(layers, owl(ratios, entries, sparsity, width), strict=True))
    return [shares[member.layer] for member in members]


def _share_by_threshold(members: Sequence[Member], sparsity: float, clip: float) -> list[float]:
    return by_threshold([member.seen for member in members], sparsity, clip)


def _curve(weight: Tensor, seen: Any, rule: Rule, gone: Tensor) -> Curve:
    moments, unit = joined(seen, rule.also, weight.shape[1]).scaled(weight.dtype)
    order = by_power(moments.gram)
    prices = None if rule.prices is None else rule.prices * unit
    return foretell(weight, factorise(moments.reordered(order).gram), order, prices, gone)


def _share_as_asked(members: Sequence[Member], sparsity: float, number: float) -> list[float]:
    return [sparsity] * len(members)


# Where bits are asked for: no recipe names it.
ONE_STEP = Allocation(
    "one-step",
    "ours; docs/methods.md",
    "one step for all matrices, met as the run goes",
    share=_share_as_asked,
    watch=_own,
    reduce=_curve,
)

ALLOCATIONS: dict[str, Allocation] = {
    row.name: row
    for row in (
        UNIFORM,
        Allocation(
            "hessian-trace",
            "SparseSSM, arXiv 2506.09613",
            "by the rank of the Hessian's squared diagonal, within ALPHA of the overall sparsity",
            share=_share_by_trace,
            watch=_norm,
            reduce=_power,
            looks=True,
            letter="ALPHA",
            default=0.04,
            families=("projections",),
        ),
        Allocation(
            "owl",
            "Yin et al., arXiv 2310.05175",
            "layers with more outliers lose less, within LAMBDA of the overall sparsity",
            share=_share_by_outliers,
            watch=_norm,
            reduce=_outputs,
            looks=True,
            letter="LAMBDA",
            default=0.08,
            families=("projections", "conv1d", "head"),
        ),
        # Layers differ far more in what their A_log can spare than their projections: no clip there.
        Allocation(
            "loss",
            "ours; docs/methods.md",
            "one threshold over the scores of all matrices, within CLIP of the overall sparsity",
            share=_share_by_threshold,
            watch=_own,
            reduce=_profile,
            letter="CLIP",
            default=0.1,
            defaults={"ssm": 1.0},
            by_layer=True,
        ),
    )
}
