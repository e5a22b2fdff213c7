"""What a method is: a row of the table METHODS. It sees weights and sums, never a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparsessm.methods.patterns import Pattern


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
        allocation: name and parameter, see allocation.py.
        length: tokens a calibration window. seed: of this target.
    """

    method: Method
    pattern: Pattern
    sparsity: float
    removed: str
    repair: str = "none"
    strength: float = 1.0
    price: str = "none"
    prices: Tensor | None = None
    allocation: tuple[str, float] = ("uniform", 0.0)
    diagonal: bool = False
    time_weights: str = "power:1"
    length: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Method:
    """One way to decide what matters.

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
        by_row: the same share of every row is removed.
        total: like `score` for the whole matrix, where matrices are compared with each other; None: `score`.
        companions: (observer's result, keep, rule) -> companion parameter -> change; None: there are none.
        error: (observer's result, keep, rule) -> (output error of the mask, energy of the dense output),
            where the method knows it.
        defaults: values of the recipe fields `repair`, `price` and `allocation`, as far as it reads them.
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
    by_row: bool = False
    total: Callable[[Tensor, Any, Rule], Tensor] | None = None
    companions: Callable[[Any, Tensor, Rule], Mapping[str, Tensor]] | None = None
    error: Callable[[Any, Tensor, Rule], tuple[float, float] | None] | None = None
    defaults: Mapping[str, str] = field(default_factory=lambda: {"allocation": "uniform"})
    options: tuple[str, ...] = ()


def seed_of(seed: int, name: str) -> int:
    """A seed of its own for everything that has a name."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:6], "big")
