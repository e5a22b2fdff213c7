"""SparseSSM (Tuo & Wang, arXiv 2506.09613): both published ways to aggregate the score of A_log over time.

Version 1 (Theorem 1, Algorithm 1): at each step t the entries with the smallest A_log^2 S_t get a vote; most
votes are removed. Version 2 (the authors' public code, October 2025): sum_t w_t (mean_b a_t)^2 S_t with
weights that fall with t. S_t = sum_b h_{t-1}^2 is the energy of the state before the update. Faults of the
public code that are not reproduced are listed in docs/methods.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsessm.methods.base import EntryMethod, Rule
from sparsessm.methods.step_observers import StateEnergy, StateVote


def time_weights(text: str, length: int) -> Tensor:
    """Weights (L,) float64, summing to 1, of the token positions 0..L-1.

    Args:
        text: "uniform"; "linear" (L - t); "power:P" (1/(t+1)^P); "discount:G" (G^t); "window:S" (the first
            share S of positions).

    Raises:
        ValueError: anything else, with what is allowed.
    """
    kind, _, number = text.partition(":")
    t = torch.arange(length, dtype=torch.float64)
    try:
        value = float(number) if number else {"power": 1.0, "discount": 0.9, "window": 0.25}.get(kind, 0.0)
    except ValueError:
        value = math.nan
    if kind == "uniform" and not number:
        weights = torch.ones_like(t)
    elif kind == "linear" and not number:
        weights = length - t
    elif kind == "power" and 0 <= value < math.inf:
        weights = (t + 1) ** -value
    elif kind == "discount" and 0 < value <= 1:
        weights = value**t
    elif kind == "window" and 0 < value <= 1:
        weights = (t < max(1, math.ceil(value * length))).double()
    else:
        raise ValueError(
            f"time_weights is {text!r}; allowed: uniform, linear, power:P (P >= 0), discount:G (0 < G <= 1), "
            "window:S (0 < S <= 1)"
        )
    return weights / weights.sum()


def _vote(weight: Tensor, seen: Tensor, rule: Rule, columns: slice) -> Tensor:
    return -seen.double()  # most votes: removed first


def _sum(weight: Tensor, seen: Tensor, rule: Rule, columns: slice) -> Tensor:
    return seen


def _watch_vote(weight: Tensor, rule: Rule) -> Any:
    return StateVote(weight, rule.pattern, rule.sparsity)


def _watch_energy(weight: Tensor, rule: Rule) -> Any:
    return StateEnergy(time_weights(rule.time_weights, rule.length).to(weight.device))


vote = EntryMethod(
    name="sparsessm-vote",
    paper="SparseSSM v1, arXiv 2506.09613, Algorithm 1",
    summary="vote per time step on A_log^2 S_t",
    families=("ssm",),
    watch=_watch_vote,
    score=_vote,
)

weighted = EntryMethod(
    name="sparsessm",
    paper="SparseSSM v2, arXiv 2506.09613 and its code of October 2025",
    summary="time-weighted sum of decay^2 x state energy",
    families=("ssm",),
    watch=_watch_energy,
    score=_sum,
    options=("time_weights",),
)
