"""The one loop: 1 calibrate, 2 score, 3 mask, 4 compensate. Saving is the caller's last line."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparsessm import patterns
from sparsessm.architectures import Architecture, Target
from sparsessm.calibrate import Progress, survey, walk
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
        keep &= target.matrix != target.removed[rule.removed]  # removed before: stays removed, and is counted
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
    for stop in walk(architecture, _needed(recipe, tokens), passes=2, progress=progress):
        for target in stop.block.targets:
            if target.family == recipe.target:
                yield target, lambda observer, stop=stop, target=target: stop.seen(target, observer)


def _share_budget(
    architecture: Architecture, recipe: Recipe, tokens: Tensor | None, progress: Progress | None
) -> dict[str, float]:
    """Each target's sparsity under one threshold over all of them, from the scores of the dense model."""
    method = METHODS[recipe.method]
    rules = {
        target.name: _rule(recipe, target, tokens, None)
        for target in architecture.targets
        if target.family == recipe.target
    }

    def watch(target: Target) -> Any | None:
        if method.watch is None or target.name not in rules:
            return None
        return method.watch(target.matrix, rules[target.name])

    if method.watch is None:
        seen = ((target, None) for target in architecture.targets if target.name in rules)
    else:
        seen = survey(architecture, _needed(recipe, tokens), watch, progress)
    scores = [_score(method, target, what, rules[target.name]) for target, what in seen]
    removed = patterns.share(scores, _sparsity(recipe))
    return {name: count / score.numel() for name, count, score in zip(rules, removed, scores, strict=True)}


def _needed(recipe: Recipe, tokens: Tensor | None) -> Tensor:
    if tokens is None:
        raise ValueError(f"method {recipe.method!r} needs calibration windows, none were given")
    return tokens


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
        seed=_seed(recipe.seed, target.name),
    )


def _seed(seed: int, name: str) -> int:
    """A seed of its own for every target."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:6], "big")


def _score(method: Method, target: Target, seen: Any, rule: Rule) -> Tensor:
    """Scores (float64) of a target; the smallest will be removed."""
    weight = target.matrix
    score = method.score(weight, seen, rule).double()
    if score.isnan().any():
        raise ValueError(f"{target.name}: method {method.name!r} gave a score that is not a number")
    # Removing what was removed before costs nothing, whatever a method makes of the value stored for it.
    return score.masked_fill(weight == target.removed[rule.removed], -torch.inf)


def _row(
    method: Method,
    target: Target,
    seen: Any,
    score: Tensor,
    keep: Tensor,
    rule: Rule,
    repaired: tuple[str, ...],
) -> Row:
    error, signal = (method.error(seen, keep, rule) if method.error else None) or (None, None)
    finite = score[score.isfinite()]
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
