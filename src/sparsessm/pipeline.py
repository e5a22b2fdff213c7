"""The one loop: 1 calibrate, 2 score, 3 mask, 4 compensate. Saving is the caller's last line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from sparsessm import patterns
from sparsessm.architectures import Architecture, Target
from sparsessm.calibrate import Progress, walk
from sparsessm.data import fingerprint
from sparsessm.methods import METHODS, Method, Rule
from sparsessm.recipe import Recipe
from sparsessm.report import Report, Row

# Looks at a target of the walk: observer in, what it saw out; None stands for "no data needed".
Look = Callable[[Any], Any]


def prune(
    architecture: Architecture, recipe: Recipe, tokens: Tensor | None, progress: Progress | None = None
) -> Report:
    """Prune the model in place, block after block, each seeing what the pruned blocks before it produce.

    Args:
        architecture: from `adapt(model)`.
        recipe: resolved, see `Recipe.resolved`.
        tokens: (W, L) int64 calibration windows; may be None for a method that needs no data (`needs_data`).
        progress: called as (stage, done, total).

    Raises:
        ValueError: a target whose scores or activations are not finite, by name.
    """
    began = time.perf_counter()
    method = METHODS[recipe.method]
    shares = _share_budget(architecture, recipe, tokens, progress) if recipe.budget == "model" else {}
    rows: list[Row] = []
    for target, look in _visit(architecture, recipe, tokens, progress):
        rule = _rule(recipe, target, tokens, shares.get(target.name))
        seen = look(method.watch(target.matrix, rule)) if method.watch else None  # 1 calibrate
        score = _score(method, target, seen, rule)  # 2 score
        keep = rule.pattern.keep(score, rule.sparsity)  # 3 mask
        target.replace(target.matrix.masked_fill(~keep, target.removed[rule.removed]))
        repairs = method.repair(seen, keep, rule) if method.repair else {}  # 4 compensate
        for companion, change in repairs.items():
            target.shift(companion, change)
        repaired = tuple(target.name.removesuffix(target.kind) + companion for companion in repairs)
        rows.append(_row(method, target, seen, score, keep, rule, repaired))
    seconds = time.perf_counter() - began
    return Report(recipe.model_dump(), rows, fingerprint(tokens) if tokens is not None else "", seconds)


def needs_data(recipe: Recipe) -> bool:
    """Whether the recipe's method looks at calibration windows."""
    return METHODS[recipe.method].watch is not None


def _visit(
    architecture: Architecture, recipe: Recipe, tokens: Tensor | None, progress: Progress | None
) -> Iterator[tuple[Target, Look]]:
    """The targets of the recipe in the order of the data, each with a way to look at it."""
    if not needs_data(recipe):
        for target in architecture.targets:
            if target.family == recipe.target:
                yield target, lambda observer: None
        return
    if tokens is None:
        raise ValueError(f"method {recipe.method!r} needs calibration windows, none were given")
    for stop in walk(architecture, tokens, passes=2, progress=progress):
        for target in stop.block.targets:
            if target.family == recipe.target:
                yield target, lambda observer, stop=stop, target=target: stop.seen(target, observer)


def _share_budget(
    architecture: Architecture, recipe: Recipe, tokens: Tensor | None, progress: Progress | None
) -> dict[str, float]:
    """Each target's sparsity under one threshold over all of them, from the scores of the dense model."""
    method, names, scores = METHODS[recipe.method], [], []
    for target, look in _visit(architecture, recipe, tokens, progress):
        rule = _rule(recipe, target, tokens, None)
        seen = look(method.watch(target.matrix, rule)) if method.watch else None
        names.append(target.name)
        scores.append(_score(method, target, seen, rule).double())
    removed = patterns.share(scores, _sparsity(recipe))
    return {name: count / score.numel() for name, count, score in zip(names, removed, scores, strict=True)}


def _sparsity(recipe: Recipe) -> float:
    if recipe.sparsity is None:
        raise ValueError("sparsity is not resolved; call Recipe.resolved first")
    return recipe.sparsity


def _rule(recipe: Recipe, target: Target, tokens: Tensor | None, sparsity: float | None) -> Rule:
    return Rule(
        pattern=patterns.parse(recipe.pattern),
        sparsity=_sparsity(recipe) if sparsity is None else sparsity,
        removed=recipe.removed,
        diagonal=recipe.diagonal,
        time_weights=recipe.time_weights,
        length=0 if tokens is None else tokens.shape[1],
        seed=recipe.seed + target.layer,
    )


def _score(method: Method, target: Target, seen: Any, rule: Rule) -> Tensor:
    score = method.score(target.matrix, seen, rule)
    if score.isnan().any():
        raise ValueError(f"{target.name}: method {method.name!r} gave a score that is not a number")
    return score


def _row(
    method: Method,
    target: Target,
    seen: Any,
    score: Tensor,
    keep: Tensor,
    rule: Rule,
    repaired: tuple[str, ...],
) -> Row:
    error, signal = method.error(seen, keep, rule) if method.error else (None, None)
    finite = score[score.isfinite()].double()
    summary = {"min": finite.min(), "median": finite.median(), "max": finite.max()} if finite.numel() else {}
    return Row(
        target=target.name,
        layer=target.layer,
        family=target.family,
        method=method.name,
        pattern=str(rule.pattern),
        removed=rule.removed,
        total=keep.numel(),
        pruned=int((~keep).sum()),
        error=error,
        signal=signal,
        score={name: float(value) for name, value in summary.items()},
        repaired=repaired,
    )
