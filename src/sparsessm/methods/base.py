"""What a method is: a row of the table METHODS. It sees weights and sums, never a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsessm.patterns import Pattern


@dataclass(frozen=True)
class Rule:
    """How one target is pruned: the recipe's options, with names turned into objects."""

    pattern: Pattern
    sparsity: float
    removed: str
    diagonal: bool
    time_weights: str
    length: int  # tokens a calibration window
    seed: int  # of this target


@dataclass(frozen=True)
class Method:
    """One way to decide what matters.

    Attributes:
        name: what users type. paper: where it comes from. summary: one line for the tables.
        families: target families it applies to.
        watch: (weight, rule) -> the observer that calibration feeds; None: no calibration needed.
        score: (weight [out, in], observer's result, rule) -> scores [out, in]; the smallest are removed.
        repair: (observer's result, keep, rule) -> companion parameter -> change; None: survivors stay as they
            are.
        error: (observer's result, keep, rule) -> (output error of the mask, energy of the dense output),
            where the method knows it.
        options: recipe fields that only some methods read and this one does.
    """

    name: str
    paper: str
    summary: str
    families: tuple[str, ...]
    watch: Callable[[Tensor, Rule], Any] | None
    score: Callable[[Tensor, Any, Rule], Tensor]
    repair: Callable[[Any, Tensor, Rule], Mapping[str, Tensor]] | None = None
    error: Callable[[Any, Tensor, Rule], tuple[float, float] | None] | None = None
    options: tuple[str, ...] = ()
