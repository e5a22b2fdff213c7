"""Wanda (Sun et al., arXiv 2306.11695): |weight| times the norm of its input, compared within each output
row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsessm.methods.base import EntryMethod, Rule
from sparsessm.methods.observers import InputNorm, Moments


def _watch(weight: Tensor, rule: Rule) -> Any:
    return InputNorm()


def _score(weight: Tensor, seen: Moments, rule: Rule, columns: slice) -> Tensor:
    return weight.double().abs() * seen.power[..., columns].sqrt()


wanda = EntryMethod(
    name="wanda",
    paper="Wanda, arXiv 2306.11695",
    summary="|weight| x input norm, per output row; no repair",
    families=("projections", "head"),
    watch=_watch,
    score=_score,
    by_row=True,
    options=("grid",),
)
