"""The one loop: 1 calibrate, 2 score, 3 mask, 4 compensate. Saving is the caller's last line.

Before it, what the rules need to know of the dense model: what an error costs the loss (one backward pass),
and who can spare how much (one survey, shares.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsessm.architectures import Architecture, Target
from sparsessm.architectures.ranks import Ranks
from sparsessm.calibration import prices
from sparsessm.calibration.journal import Journal
from sparsessm.calibration.progress import Progress
from sparsessm.calibration.visit import Look, Watch, visit
from sparsessm.methods import Rule, on_grid
from sparsessm.methods.base import scorer
from sparsessm.methods.grids import Dial, Rounding
from sparsessm.methods.hessian import Factor, by_power, factorise
from sparsessm.methods.levels import CodedLevels, Levels
from sparsessm.methods.observers import Moments, joined
from sparsessm.methods.patterns import Unstructured
from sparsessm.methods.repair import dense_target, output_error, refit, sweep
from sparsessm.pruning import preview
from sparsessm.pruning.naming import naming
from sparsessm.pruning.plan import Outcome, Plan, Preview, Rows
from sparsessm.pruning.shares import stepped, surveyed
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.rules import Assignment, words
from sparsessm.report.row import Row

Rules = Mapping[str, Rule]


class EntryPlan(Plan):
    """Single entries are removed.

    Attributes:
        assignment: which rule prunes which matrix.
    """

    def __init__(self, recipe: Recipe, assignment: Assignment) -> None:
        super().__init__(recipe)
        self._assignment = assignment

    @property
    def methods(self) -> list[str]:
        return self._assignment.methods

    @property
    def asks(self) -> str:
        hungry = dict.fromkeys(
            f"method {rule.method.name!r}" if rule.method.watch else f"allocation {rule.allocation[0].name!r}"
            for rule in self._assignment.rules.values()
            if rule.method.watch or rule.allocation[0].looks
        )
        return " and ".join(hungry)

    @property
    def assignment(self) -> Assignment:
        return self._assignment

    def preview(self, architecture: Architecture) -> Preview:
        tensors = architecture.model.state_dict()
        record = preview.entries(self._assignment, tensors, architecture.stored)
        return Preview(record, preview.entries_tables(str(self.recipe.model), record))

    def share_left(self, architecture: Architecture) -> float:
        return 1.0  # zeros are stored

    def working(self, architecture: Architecture) -> int:
        return preview.working(architecture, self._assignment.rules)

    def _carry_out(
        self, architecture: Architecture, tokens: Tensor | None, progress: Progress | None, journal: Journal
    ) -> Outcome:
        rules = priced(architecture, self._assignment.rules, tokens, progress, journal)
        rules = surveyed(architecture, replace(self._assignment, rules=rules), tokens, progress, journal)
        stage = journal.stage("prune")
        rows = Rows(stage)
        for block in (*architecture.blocks, architecture.tail):
            if block.index in stage.left:
                stage.restore(block)
        how = {"paired": any(rule.paired for rule in rules.values()), "stage": stage, "note": rows.new}
        for part, look in visit(architecture, rules, _watching(rules), tokens, progress, **how):
            asked = {target.name: stepped(self._assignment, rules, target.name, rows.all) for target in part}
            for done in _shared(architecture.ranks, part, asked, look):
                rows.add(*done)
        order = list(rules)
        # a tied head was first, experts took turns
        return Outcome(sorted(rows.all, key=lambda row: order.index(row.target)), levels=rows.levels)


def _shared(
    ranks: Ranks, part: Sequence[Target], rules: Rules, look: Look
) -> Iterator[tuple[Row, CodedLevels | None]]:
    """Look at targets and prune them, each in the process that owns it; all processes have the result."""
    sizes = [target.matrix.numel() for target in part]
    owners = {target.name: owner for target, owner in zip(part, ranks.owners(sizes), strict=True)}
    seen = look(owners)
    done = {}
    for target in part:
        if owners[target.name] == ranks.number:
            rule = rules[target.name].on(target.matrix.device)
            with naming(target.name):  # what was seen is handed over, not kept: a float64 Hessian is large
                done[target.name] = _prune(target, rule, seen.pop(target.name, None))
    for target in part:
        owner = owners[target.name]
        row, levels = ranks.given(done.get(target.name), owner)
        ranks.spread([target.matrix, *(parameter for parameter, _ in target.companions.values())], owner)
        yield row, levels


def _prune(target: Target, rule: Rule, seen: Any) -> tuple[Row, CodedLevels | None]:
    """Prune one target: the four stages; and what it is on a grid.

    Args:
        seen: 1 calibrate: what its observer saw, None where it has none.
    """
    few: dict[str, Any] = {}
    if target.routed and isinstance(seen, Moments):
        few = {"tokens": seen.tokens, "inputs": target.matrix.shape[1], "borrowed": seen.borrowed}
    done = solve(target, rule, seen)
    companions = write(target, rule, done)
    error = rule.method.error(done.seen, done.keep, rule) if rule.method.error else None
    if done.factor is not None:
        gram, start, unit = done.seen.gram, done.start, done.unit
        error = unit * output_error(target.matrix - start, gram), unit * output_error(start, gram)
    row = replace(_row(target, rule, done.keep, done.factor, companions, error), **few)
    if done.levels is None:
        return row, None
    coded = done.levels.coded()
    counts = {"bits": coded.bits, "entropy": done.levels.entropy}
    return replace(row, **counts, step=rule.grid.step if isinstance(rule.grid, Dial) else None), coded


class Solution(NamedTuple):
    """What a target becomes.

    Attributes:
        weight: (out, in) repaired, 0 where removed. keep: (out, in) bool. start: what the repair aims at.
        seen: a Hessian is in the weight's dtype, divided by `unit`. factor: of that, where there is one.
        levels: codes and scales, whose values `weight` are; None without a grid.
    """

    weight: Tensor
    keep: Tensor
    start: Tensor
    seen: Any
    factor: Factor | None
    unit: float
    levels: Levels | None = None

    def back_from(self, order: Tensor) -> Solution:
        """The same with the columns where they belong; their places in it are those of `order`. The factor
        stays as it is."""
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        assert self.levels is not None
        return self._replace(
            weight=self.weight[:, back],
            keep=self.keep[:, back],
            start=self.start[:, back],
            seen=self.seen.reordered(back),
            levels=self.levels.reordered(back),
        )


def solve(target: Target, rule: Rule, seen: Any) -> Solution:
    """Stages 2 to 4 for one target, which is not changed; refuses what is not finite."""
    method, weight = rule.method, target.matrix
    gone = weight == target.removed[rule.removed]  # removed before: stays removed, and is counted
    start, factor, unit, order = weight, None, 1.0, None
    if method.hessian:
        seen, unit = joined(seen, rule.also, weight.shape[1]).scaled(weight.dtype)
        if rule.grid is not None and rule.grid.ordered and isinstance(rule.pattern, Unstructured):
            order = by_power(seen.gram)
            weight, gone, seen = weight[:, order], gone[:, order], seen.reordered(order)
        factor = factorise(seen.gram)
        start = weight.clone() if order is None else weight  # a view of what will be replaced is copied
        if rule.paired:
            start = dense_target(weight, seen, factor, rule.strength)
    repairing = factor if rule.repair != "none" else None
    score = scorer(rule, seen if factor is None else factor, repairs=repairing is not None)
    rounding = rounded(rule, start, factor, unit, masked=rule.sparsity > 0 or bool(gone.any()))
    how = {"by_row": method.by_row, "gone": gone, "rounding": rounding}
    pruned, keep = sweep(  # 2 score  3 mask  4 round and compensate
        start, score, rule.pattern, rule.sparsity, repairing, method.width, **how
    )
    levels = None
    if rounding is not None:
        levels = rounding.levels()
        if repairing is not None and method.refit:
            levels = on_grid.refit(levels, start, seen.gram, repairing, keep, rounding)
        pruned, keep = levels.values().to(weight.dtype), levels.keep & keep
    elif repairing is not None and method.refit:
        pruned = refit(pruned, start, seen.gram, repairing, keep)
    if not torch.isfinite(pruned).all():
        raise ValueError("the repaired weights are not finite")
    done = Solution(pruned, keep, start, seen, factor, unit, levels)
    return done if order is None else done.back_from(order)


def rounded(rule: Rule, start: Tensor, factor: Factor | None, unit: float, masked: bool) -> Rounding | None:
    """What the rule's grid does to a matrix; None without one.

    Args:
        start: (out, in), where the sweep starts. factor: of the Hessian divided by `unit`, None without one.
        masked: a mask says what is zero.
    """
    if rule.grid is None:
        return None
    prices = None if rule.prices is None else rule.prices * unit
    return rule.grid.rounding(start, factor and factor.pivots, masked, prices, rule.method.largest)


def write(target: Target, rule: Rule, done: Solution) -> tuple[str, ...]:
    """Put a solution into the model: the matrix, and what is changed beside it; returns the names of that."""
    if done.levels is None:
        target.replace(done.weight.masked_fill(~done.keep, target.removed[rule.removed]))
    else:
        target.replace_exactly(done.weight)
    changes = rule.method.companions(done.seen, done.keep, rule) if rule.method.companions else {}
    for companion, change in changes.items():
        target.shift(companion, change)
    return tuple(changes)


def _watching(rules: Rules) -> Watch:
    """What watches a target: the observer of its rule's method."""

    def watch(target: Target) -> Any | None:
        rule = rules.get(target.name)
        if rule is None or rule.method.watch is None:
            return None
        return rule.method.watch(target.matrix, rule.on(target.matrix.device))

    return watch


def priced(
    architecture: Architecture,
    rules: Rules,
    tokens: Tensor | None,
    progress: Progress | None,
    journal: Journal | None = None,
) -> dict[str, Rule]:
    """The rules, with what an error in each output row costs where they ask for it."""
    asked = {target.name: rules[target.name].price for target in architecture.targets if target.name in rules}
    found = prices.priced(architecture, asked, tokens, progress, journal)
    return {
        name: replace(rule, prices=found[name], also=found.get(prices.ALSO + name)) if name in found else rule
        for name, rule in rules.items()
    }


def _row(
    target: Target,
    rule: Rule,
    keep: Tensor,
    factor: Factor | None,
    companions: tuple[str, ...],
    error: tuple[float, float] | None,
) -> Row:
    said = words(rule)
    return Row(
        target=target.name,
        layer=target.layer,
        family=target.family,
        method=said["method"],
        pattern=said["pattern"],
        removed=said["removed"],
        total=keep.numel(),
        pruned=int((~keep).sum()),
        allocation=said["allocation"],
        repair=said["repair"],
        price=said["price"] if rule.prices is not None else "none",
        grid=said["grid"],
        damping=None if factor is None else factor.damping,
        error=None if error is None else error[0],
        signal=None if error is None else error[1],
        repaired=tuple(target.name.removesuffix(target.kind) + companion for companion in companions),
    )
