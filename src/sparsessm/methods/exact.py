"""`exact` (ours): the output error that removing entries of A_log causes, without a Taylor expansion.

Inside a layer states do not interact and the output is linear in them, so the error of any mask is the
quadratic form 1' G 1 per channel (docs/methods.md). The default uses the full G: greedy elimination, with the
part of the error that the skip weight D can absorb already subtracted (G - r r'/q is the error after the best
refit of D). `diagonal` uses G's diagonal alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsessm.methods.base import EntryMethod, Rule
from sparsessm.methods.observers import ErrorSums, StateError
from sparsessm.methods.repair import damped_power, error_of, refit_skip


def elimination_scores(gram: Tensor, group: int, removable: int) -> Tensor:
    """Greedy elimination in every channel at once, written as scores.

    Each step removes the entry with the smallest increase G_jj + 2 sum_{m removed} G_jm. The score of an
    entry is the largest increase met up to its removal: sorting all channels' entries by it reproduces the
    greedy order across channels, for every sparsity at once, because an entry can only go after those that
    its channel gave up before it.

    Args:
        gram: (D, N, N) symmetric.
        group: entries of an N:M group (N if there are no groups).
        removable: how many entries of a group may go.

    Returns:
        (D, N) float64; infinite where an entry may not be removed.
    """
    channels, states, _ = gram.shape
    device, rows = gram.device, torch.arange(channels, device=gram.device)
    increase = gram.diagonal(dim1=1, dim2=2).clone()
    scores = torch.full((channels, states), torch.inf, dtype=torch.float64, device=device)
    open_ = torch.ones(channels, states, dtype=torch.bool, device=device)
    left = torch.full((channels, states // group), removable, device=device)
    highest = torch.full((channels,), -torch.inf, dtype=torch.float64, device=device)
    for _ in range(states // group * removable):
        best = increase.masked_fill(~open_, torch.inf).argmin(1)  # (D,)
        highest = torch.maximum(highest, increase[rows, best])
        scores[rows, best] = highest
        # Entries of a channel must not tie, or its order would be lost: the next is one ulp higher at least.
        highest = torch.nextafter(highest, torch.full_like(highest, torch.inf))
        increase += 2 * gram[rows, best]
        open_[rows, best] = False
        left[rows, best // group] -= 1
        open_ &= (left > 0).repeat_interleave(group, 1)
    return scores


def _score(weight: Tensor, seen: ErrorSums, rule: Rule, columns: slice) -> Tensor:
    if rule.diagonal:
        return seen.gram
    groups = rule.pattern.groups(weight.shape[1])
    if seen.cross is None:
        return elimination_scores(seen.gram, *groups)
    share = seen.cross / damped_power(seen)[:, None]
    refitted = seen.gram - seen.cross[:, :, None] * share[:, None, :]
    return elimination_scores(refitted, *groups)


def _companions(seen: ErrorSums, keep: Tensor, rule: Rule) -> Mapping[str, Tensor]:
    return {} if rule.diagonal or seen.cross is None else {"D": refit_skip(seen, keep)}


def _error(seen: ErrorSums, keep: Tensor, rule: Rule) -> tuple[float, float] | None:
    if rule.diagonal:
        return None
    return error_of(seen, keep, None if seen.cross is None else refit_skip(seen, keep)), seen.signal


def _watch(weight: Tensor, rule: Rule) -> Any:
    return StateError(rule.removed, rule.diagonal, rule.prices, len(weight))


exact = EntryMethod(
    name="exact",
    paper="ours; docs/methods.md",
    summary="exact output error (full Gram, greedy) and refit of D",
    families=("ssm",),
    watch=_watch,
    score=_score,
    companions=_companions,
    error=_error,
    defaults={"price": "none", "allocation": "loss"},
    options=("diagonal",),
)
