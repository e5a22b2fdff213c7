"""What a method and an allocation are: rows of tables. They see weights and sums, never a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparsessm.methods.grids import Grid
from sparsessm.methods.patterns import Pattern


@dataclass(frozen=True)
class Member:
    """One of the matrices that share a budget, as an allocation sees it.

    Attributes:
        layer, kind: where it is, and its name inside the layer. entries: of the matrix. seen: what
            `Allocation.reduce` kept of it; None where the allocation has no `reduce`.
    """

    layer: int
    kind: str
    entries: int
    seen: Any


@dataclass(frozen=True, eq=False)
class Allocation:
    """One way to share out a budget: one overall sparsity -> a sparsity for each matrix.

    Attributes:
        name: what users type. paper: where it comes from. summary: one line for the tables.
        share: (members, overall sparsity, number) -> the sparsity of each; None: all get the overall one.
        watch: (weight, rule) -> the observer that a survey of the dense model feeds; None, or one that gives
            None: nothing is looked at.
        reduce: (weight, what was seen, rule, entries that are gone already) -> what `share` compares.
        looks: it needs calibration windows whatever the method.
        letter: what its number is called; empty: it takes none. default: that number where none is given.
        defaults: family -> another default.
        families: target families that it means something for; empty: all.
        by_layer: of whole units, it lets layers keep different numbers (pruning/widths.py).
    """

    name: str
    paper: str
    summary: str
    share: Callable[[Sequence[Member], float, float], Sequence[float]] | None
    watch: Callable[[Tensor, Rule], Any | None] | None = None
    reduce: Callable[[Tensor, Any, Rule, Tensor], Any] | None = None
    looks: bool = False
    letter: str = ""
    default: float = 0.0
    defaults: Mapping[str, float] = field(default_factory=dict)
    families: tuple[str, ...] = ()
    by_layer: bool = False


UNIFORM = Allocation("uniform", "baseline", "every matrix loses the same share", share=None)


@dataclass(frozen=True)
class Rule:
    """How one target is pruned: the recipe's options, with names turned into objects.

    Attributes:
        repair: "none"; "self": survivors restore the layer's own output (plain OBS); "dense-target": they
            restore its output in the dense model, errors of the layers before it included.
        strength: of dense-target, 0 to 1.
        price: "none"; "fisher" or "norms": an error in an output row costs what the loss says
            (calibration/prices.py).
        prices: (out,) float64, that of each row; None where all rows have the same.
        also: (in, in) float64, what its Hessian gets added for another use of the matrix; None: it has none.
        allocation: who is pruned how much, with its number.
        grid: the values that weights may take; None: any.
        bits: stored bits a weight over the matrices of the budget; the grid is then found as the run goes.
        curve: of the matrix, what a survey foretold (`dial.Curve`); None without `bits`.
        length: tokens a calibration window. seed: of this target.
    """

    method: EntryMethod
    pattern: Pattern
    sparsity: float
    removed: str
    repair: str = "none"
    strength: float = 1.0
    price: str = "none"
    prices: Tensor | None = None
    also: Tensor | None = None
    allocation: tuple[Allocation, float] = (UNIFORM, 0.0)
    grid: Grid | None = None
    bits: float | None = None
    curve: Any = None
    diagonal: bool = False
    time_weights: str = "power:1"
    length: int = 0
    seed: int = 0

    def on(self, device: torch.device) -> Rule:
        """The same with its tensors there."""
        prices, also = (part if part is None else part.to(device) for part in (self.prices, self.also))
        return replace(self, prices=prices, also=also)

    @property
    def paired(self) -> bool:
        """Whether the repair aims at the dense model: then inputs of both models are looked at."""
        return self.repair == "dense-target"

    @property
    def rounds(self) -> bool:
        """Whether its matrices come onto a grid."""
        return self.grid is not None or self.bits is not None


@dataclass(frozen=True)
class EntryMethod:
    """One way to decide which entries of a matrix matter.

    Attributes:
        name: what users type. paper: where it comes from. summary: one line for the tables.
        families: target families it applies to.
        watch: (weight, rule) -> the observer that calibration feeds; None: no calibration needed.
        score: (weight [out, columns], what was seen, rule, columns) -> scores [out, columns]; the smallest
            are removed. What was seen is the observer's result, or the `Factor` of its Hessian with
            `hessian`.
        hessian: the observer's result is a Gram; the sweep repairs with the factor of its inverse.
        width: columns that the sweep masks together, seeing what was removed on their left.
        refit: after the sweep all survivors are repaired together, in both directions.
        largest: on a grid, scales are those of the largest weight, as published, instead of the best.
        by_row: the same share of every row is removed.
        total: like `score` for the whole matrix, where matrices are compared with each other; None: `score`.
        companions: (observer's result, keep, rule) -> companion parameter -> change; None: there are none.
        error: (observer's result, keep, rule) -> (output error of the mask, energy of the dense output),
            where the method knows it.
        defaults: values of the recipe fields `repair`, `price`, `allocation` and `grid`, as far as it reads
            them and has its own.
        options: other recipe fields that only some methods read and this one does.
    """

    name: str
    paper: str
    summary: str
    families: tuple[str, ...]
    watch: Callable[[Tensor, Rule], Any] | None
    score: Callable[[Tensor, Any, Rule, slice], Tensor]
    hessian: bool = False
    width: int = 128
    refit: bool = False
    largest: bool = False
    by_row: bool = False
    total: Callable[[Tensor, Any, Rule], Tensor] | None = None
    companions: Callable[[Any, Tensor, Rule], Mapping[str, Tensor]] | None = None
    error: Callable[[Any, Tensor, Rule], tuple[float, float] | None] | None = None
    defaults: Mapping[str, str] = field(default_factory=lambda: {"allocation": "uniform"})
    options: tuple[str, ...] = ()


def scorer(rule: Rule, seen: Any, *, repairs: bool = False) -> Callable[[Tensor, slice], Tensor]:
    """The score of a rule's method as a function of (weight, columns).

    Args:
        seen: what the observer saw, or the `Factor` of its Hessian where the method has one.
        repairs: a repair goes on between columns; else matrices may be compared (`EntryMethod.total`).

    Raises:
        ValueError (of the function): a score that is not a number.
    """

    def score(weight: Tensor, columns: slice) -> Tensor:
        if not repairs and rule.method.total:
            value = rule.method.total(weight, seen, rule)
        else:
            value = rule.method.score(weight, seen, rule, columns)
        if value.isnan().any():
            raise ValueError(f"method {rule.method.name!r} gave a score that is not a number")
        return value

    return score


def seed_of(seed: int, name: str) -> int:
    """A seed of its own for everything that has a name."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:6], "big")
