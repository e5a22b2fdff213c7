"""A matrix pruned alone, and what that does to the predictions: the cells of an analysis.

Pruned is a copy of its block, a variant; the model itself is never changed. Held-out windows run through the
variants and the dense blocks behind them, and their logits are compared with the dense model's, some rows at
a time.

Place in the flow: `tolerance.py` asks for cells; the stages are those of `pruning/entries.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.architectures import Architecture, Block, Target
from sparsessm.calibration.loss import ROWS, in_rows
from sparsessm.calibration.progress import Progress, Steps
from sparsessm.calibration.slabs import grouped, slab_count
from sparsessm.calibration.walk import Stop, final, through, walk
from sparsessm.evaluation.perplexity import BATCH
from sparsessm.methods import Rule
from sparsessm.methods.repair import output_error
from sparsessm.pruning.entries import solve, write
from sparsessm.pruning.naming import naming

LOGITS = ROWS // 4  # rows of logits alive at a time: here they are float64, and those of two models


@dataclass(frozen=True)
class Cell:
    """One matrix pruned alone.

    Attributes:
        target: full parameter name. layer, kind, family: of the target.
        sparsity: that was asked for. entries: of the matrix. pruned: entries removed.
        kl: KL(dense || pruned) of the next-token distributions, nats, mean over the held-out tokens.
        error: energy that pruning and repair change in the matrix's output (of A_log: in the block's), on the
            calibration windows. signal: energy of that output.
        cost: the error with its rows weighed by what the loss says; the error itself where nothing weighs.
        seconds: of work; what the cells of one matrix share is split evenly.
    """

    target: str
    layer: int
    kind: str
    family: str
    sparsity: float
    entries: int
    pruned: int
    kl: float
    error: float
    signal: float
    cost: float
    seconds: float


def measure(
    architecture: Architecture,
    rules: Mapping[str, Rule],
    sparsities: Sequence[float],
    calibration: Tensor,
    held_out: Tensor,
    done: Collection[tuple[str, float]] = (),
    progress: Progress | None = None,
) -> Iterator[list[Cell]]:
    """The cells of one matrix after the other, in the order of the model.

    Args:
        rules: target name -> how it is pruned, but for the sparsity; all its methods look at windows.
        calibration, held_out: (W, L) int64.
        done: (target name, sparsity) of cells to leave out.
    """
    missing = {
        target.name: left
        for target in architecture.targets
        if target.name in rules and (left := [s for s in sparsities if (target.name, s) not in done])
    }
    targets = [target for target in architecture.targets if target.name in missing]
    if not targets:
        return
    groups = grouped(held_out, BATCH)
    held = _HeldOut(architecture, groups)
    total = slab_count(*calibration.shape) * (1 + targets[-1].layer)
    total += sum(held.steps(target.layer, len(missing[target.name])) for target in targets)
    steps = Steps("analyze", total, progress)
    for stop in walk(architecture, calibration, *groups, tail=True, steps=steps):
        here = [target for target in stop.block.targets if target.name in missing]
        observers = {target.kind: _observer(target, rules[target.name]) for target in here}
        stop.run(observers)
        for target in here:
            began = time.perf_counter()
            wanted = [replace(rules[target.name], sparsity=sparsity) for sparsity in missing[target.name]]
            with naming(target.name):
                seen = observers.pop(target.kind).result()
                pruned = [_pruned(stop.block, target, rule, seen) for rule in wanted]
                kls = held.divergences(stop, [variant for variant, _ in pruned], steps)
            seconds = (time.perf_counter() - began) / len(pruned)
            yield [replace(cell, kl=kl, seconds=seconds) for kl, (_, cell) in zip(kls, pruned, strict=True)]
            if target is targets[-1]:
                return  # nobody needs the layers behind it


def _observer(target: Target, rule: Rule) -> Any:
    assert rule.method.watch is not None
    return rule.method.watch(target.matrix, rule)


class _HeldOut:
    """What the dense model makes of the held-out windows, and how far models with a variant are from it."""

    def __init__(self, architecture: Architecture, groups: Sequence[Tensor]) -> None:
        self._architecture, self._final = architecture, final(architecture, *groups)
        self._tokens = sum(group.numel() for group in groups)
        entries = [sum(target.matrix.numel() for target in block.targets) for block in architecture.blocks]
        head = sum(target.matrix.numel() for target in architecture.tail.targets)
        self._head = max(1, round(head * len(entries) / sum(entries)))  # in block forwards

    def steps(self, layer: int, variants: int) -> int:
        """What `divergences` counts."""
        behind = len(self._architecture.blocks) - layer
        return len(self._final) * (variants * (behind + self._head) + self._head)

    def divergences(self, stop: Stop, variants: Sequence[Block], steps: Steps) -> list[float]:
        """Mean KL of the model with each variant in place of the block, nats a token.

        Args:
            stop: before the block, with the held-out windows as groups.

        Raises:
            ValueError: logits that are not finite.
        """
        groups, sums = len(stop.groups), [0.0] * len(variants)
        pruned = (state for variant in variants for state in self._through(variant, stop.groups))
        for later in stop.behind(*pruned):
            steps(groups * len(variants))  # of the block before
            if later.block is self._architecture.tail:
                for number, dense in enumerate(self._final):
                    parts = divergences(self._architecture, dense, later.groups[number::groups])
                    sums = [total + part for total, part in zip(sums, parts, strict=True)]
                    steps((len(variants) + 1) * self._head)
        if not all(map(math.isfinite, sums)):
            raise ValueError("the logits of the pruned model are not finite")
        return [max(total / self._tokens, 0.0) for total in sums]  # rounding can leave it below 0

    def _through(self, variant: Block, groups: Sequence[Tensor]) -> list[Tensor]:
        with variant.computing(self._architecture.compute.used):
            return [through(variant, group) for group in groups]


@torch.inference_mode()
def divergences(architecture: Architecture, dense: Tensor, pruned: Sequence[Tensor]) -> list[float]:
    """Sum over tokens of KL(dense || pruned), nats, for each of `pruned`: states (W, T, d_model) behind the
    last block."""

    def log_probabilities(rows: Tensor) -> Tensor:
        return F.log_softmax(architecture.head(rows[None])[0].double(), -1)  # (rows, vocabulary)

    sums = [0.0] * len(pruned)
    with architecture.tail.computing(architecture.compute.used):
        for rows, *others in in_rows(dense, *pruned, rows=LOGITS):
            expected = log_probabilities(rows)
            for number, other in enumerate(others):
                parts = F.kl_div(log_probabilities(other), expected, reduction="sum", log_target=True)
                sums[number] += float(parts)
    return sums


def _pruned(block: Block, target: Target, rule: Rule, seen: Any) -> tuple[Block, Cell]:
    """A copy of the block with one matrix pruned, and its cell but for what must be measured."""
    method, solution = rule.method, solve(target, rule, seen)
    variant = block.copy()
    own = variant.target(target.kind)
    write(own, rule, solution)
    if solution.factor is not None:
        change, gram = own.matrix - target.matrix, solution.seen.gram
        error, signal = (solution.unit * output_error(part, gram) for part in (change, target.matrix))
        weighed = change if rule.prices is None else change * rule.prices.sqrt()[:, None].to(change.dtype)
        cost = solution.unit * output_error(weighed, gram)
    else:
        measured = method.error(solution.seen, solution.keep, rule) if method.error else None
        assert measured is not None, f"{method.name} knows no error"
        error, signal = measured
        cost = error
    what = target.name, target.layer, target.kind, target.family, rule.sparsity
    counts = solution.keep.numel(), int((~solution.keep).sum())
    return variant, Cell(*what, *counts, kl=math.nan, error=error, signal=signal, cost=cost, seconds=0.0)
