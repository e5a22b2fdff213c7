"""WHO is pruned how much: one overall sparsity -> a sparsity for each matrix. Pure arithmetic on what a
survey of the dense model saw (pruning/entries.py); formulas in docs/methods.md.

`uniform`: all the same. `hessian-trace`: SparseSSM's rule (arXiv 2506.09613) for its linear layers. `owl`:
outlier ratios (Yin et al., arXiv 2310.05175). `loss` (ours): one threshold over the scores of all matrices,
so that the last weight removed costs the same everywhere, each sparsity kept near the overall one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Parameter of each, where none is given: ramp (alpha), width (lambda), distance from the overall sparsity.
ALLOCATIONS: Mapping[str, float] = {"uniform": 0.0, "hessian-trace": 0.04, "owl": 0.08, "loss": 0.1}
OUTLIER = 5.0  # OWL's M: an outlier is a score above M times the mean of its block
SAMPLE = 1 << 16  # scores of a matrix that are kept for `loss`


def parse(text: str, family: str = "projections") -> tuple[str, float]:
    """Name and parameter of "uniform", "hessian-trace[:ALPHA]", "owl[:LAMBDA]" or "loss[:CLIP]".

    Layers differ far more in what their A_log can spare than in what their projections can: `loss` is not
    clipped for the family "ssm" unless a clip is given.

    Raises:
        ValueError: anything else, with what is allowed.
    """
    name, _, number = text.partition(":")
    if name in ALLOCATIONS and not (number and name == "uniform"):
        value = 1.0 if name == "loss" and family == "ssm" else ALLOCATIONS[name]
        try:
            value = float(number) if number else value
        except ValueError:
            value = -1.0
        if 0 <= value <= 1:
            return name, value
    raise ValueError(
        f"allocation is {text!r}; allowed: uniform, hessian-trace[:ALPHA], owl[:LAMBDA], loss[:CLIP], with a "
        "number from 0 to 1"
    )


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
            ordered = ordered[torch.arange(SAMPLE) * total // SAMPLE]
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
        weights.append(torch.full((high - low,), profile.total / size, dtype=torch.float64))
        owners.append(torch.full((high - low,), number))
    order = torch.cat(open_).sort(stable=True).indices
    weight, owner = torch.cat(weights)[order], torch.cat(owners)[order]
    wanted = sparsity * sum(profile.total for profile in profiles) - sum(lowest)
    chosen = weight.cumsum(0) - weight / 2 < wanted  # to the nearest
    removed = torch.zeros(len(profiles), dtype=torch.float64).index_add_(0, owner[chosen], weight[chosen])
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
    ramp = alpha * (1 - 2 * rank / last) if len(powers) > 1 else torch.zeros(1)
    return _shifted(ramp, torch.ones(len(powers), dtype=torch.float64), sparsity)


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
