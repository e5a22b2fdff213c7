"""Stage 3, score -> keep-mask. The only place that chooses elements; a smaller score is removed first, ties
by lower index.

A pattern works on the last two axes [out, in] of a score tensor; leading axes are independent problems.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unstructured:
    """The smallest scores of the whole matrix are removed, wherever they lie.

    How many: `round(sparsity * out * in)`.
    """

    def __str__(self) -> str:
        return "unstructured"

    def keep(self, score: Tensor, sparsity: float) -> Tensor:
        """Bool mask of score's shape, True = kept."""
        flat = score.flatten(-2)
        return _keep_largest(flat, flat.shape[-1] - round(sparsity * flat.shape[-1])).view(score.shape)

    def groups(self, states: int) -> tuple[int, int]:
        """(entries that choose among each other in a row, how many of them may be removed)."""
        return states, states


@dataclass(frozen=True)
class NofM:
    """N are kept of every M consecutive entries of a row (for A_log: states of a channel).

    Hardware's meaning of N:M; Wanda's `prune_n` counts the removed ones.
    """

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def keep(self, score: Tensor, sparsity: float | None = None) -> Tensor:
        """Bool mask of score's shape; the sparsity is the pattern's own.

        Raises:
            ValueError: M does not divide the row length.
        """
        if score.shape[-1] % self.m:
            raise ValueError(f"pattern {self}: {self.m} does not divide the row length {score.shape[-1]}")
        groups = score.unflatten(-1, (-1, self.m))
        return _keep_largest(groups, self.n).view(score.shape)

    def groups(self, states: int) -> tuple[int, int]:
        return self.m, self.m - self.n


AXES = ("state", "channel", "head", "block")


@dataclass(frozen=True)
class Structured:
    """Whole units of an axis are removed, from every tensor that shares it: matrices get smaller.

    Every layer loses the same number, so that transformers can express what is left.

    Attributes:
        shares: axis -> share of its units that is removed, None: the recipe's sparsity. Without any axis the
            sparsity is a share of all parameters, and which axes give how much is found by measuring.
    """

    shares: tuple[tuple[str, float | None], ...] = ()

    def __str__(self) -> str:
        parts = (axis if share is None else f"{axis}={share:.6g}" for axis, share in self.shares)
        return f"structured:{','.join(parts)}".removesuffix(":")

    @property
    def mixed(self) -> bool:
        """Whether it says itself how much."""
        return any(share is not None for _, share in self.shares)

    def keep(self, score: Tensor, removed: int) -> Tensor:
        """Bool mask of score's shape (..., units), True = kept; exactly `removed` of every row are not."""
        return _keep_largest(score, score.shape[-1] - removed)


Pattern = Unstructured | NofM  # of single entries


def parse(text: str) -> Pattern | Structured:
    """The pattern that "unstructured", "N:M" or "structured[:AXIS]" names.

    Raises:
        ValueError: anything else, with what is allowed.
    """
    if text == "unstructured":
        return Unstructured()
    if text.partition(":")[0] == "structured":
        return _structured(text)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match and 0 < int(match[1]) < int(match[2]):
        return NofM(int(match[1]), int(match[2]))
    raise ValueError(
        f"unknown pattern {text!r}; known: 'unstructured', or 'N:M' with 0 < N < M (N kept of every M), "
        f"e.g. '2:4', or 'structured:AXIS' ({', '.join(AXES)})"
    )


def _structured(text: str) -> Structured:
    shares: dict[str, float | None] = {}
    _, colon, rest = text.partition(":")
    for part in rest.split(",") if colon else ():
        axis, equals, number = part.partition("=")
        try:
            share = float(number) if equals else None
        except ValueError:
            share = math.nan
        if axis not in AXES or axis in shares or (share is not None and not 0 < share < 1):
            raise ValueError(
                f"pattern {text!r}: {part!r} is not an axis; known: {', '.join(AXES)}, each once, as in "
                "'structured:state', or with shares between 0 and 1, as in 'structured:state=0.5,block=0.1'"
            )
        shares[axis] = share
    if len(shares) > 1 and None in shares.values():
        raise ValueError(f"pattern {text!r}: give each of several axes a share, as in 'state=0.5,block=0.1'")
    return Structured(tuple(shares.items()))


def _keep_largest(score: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest along the last axis; exactly `count`, ties lose the lower index first."""
    removed = score.shape[-1] - count
    if removed == 0:
        return torch.ones_like(score, dtype=torch.bool)
    edge = torch.kthvalue(score, removed, dim=-1, keepdim=True).values  # the largest removed score
    below, equal = score < edge, score == edge
    room = removed - below.sum(-1, keepdim=True)
    return ~(below | (equal & (equal.cumsum(-1) <= room)))
