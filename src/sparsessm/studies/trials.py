"""A matrix pruned alone, and what that does to the predictions: the cells of an analysis.

Pruned is a copy of its block; the model itself is never changed. Held-out windows run through the copy and
the dense blocks behind it, and their logits are compared with the dense model's, some rows at a time.

Place in the flow: `analysis` asks for cells; the stages are those of `pipeline`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.architectures import Architecture, Block, Target
from sparsessm.calibration.loss import ROWS
from sparsessm.calibration.walk import Progress, slab_count, survey
from sparsessm.evaluation.perplexity import BATCH
from sparsessm.methods import Rule
from sparsessm.methods.repair import output_error
from sparsessm.pruning.entries import solve

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
    targets = [target for target in architecture.targets if target.name in rules]
    missing = {
        target.name: [sparsity for sparsity in sparsities if (target.name, sparsity) not in done]
        for target in targets
    }
    targets = [target for target in targets if missing[target.name]]
    dense = _Dense(architecture, held_out)
    total = slab_count(*calibration.shape) * (1 + max((target.layer for target in targets), default=-1))
    total += sum(dense.steps(target.layer, len(missing[target.name])) for target in targets)
    tick = _counter(total, progress)
    watched = {target.name for target in targets}

    def watch(target: Target) -> Any | None:
        rule = rules[target.name] if target.name in watched else None
        return rule.method.watch(target.matrix, rule) if rule and rule.method.watch else None

    for target, seen in survey(architecture, calibration, watch, lambda *_: tick(1)):
        began = time.perf_counter()
        block, rule = dense.block(target.layer), rules[target.name]
        try:
            trials = [
                _pruned(block, target, replace(rule, sparsity=sparsity), seen)
                for sparsity in missing[target.name]
            ]
            kls = dense.divergences([trial for trial, _ in trials], tick)
        except ValueError as error:
            raise ValueError(f"{target.name}: {error}") from None
        seconds = (time.perf_counter() - began) / len(trials)
        yield [replace(cell, kl=kl, seconds=seconds) for kl, (_, cell) in zip(kls, trials, strict=True)]
        if target is targets[-1]:
            return  # nobody needs the layers behind it


class _Dense:
    """The dense model on the held-out windows: what enters one of its blocks, and what leaves the last."""

    def __init__(self, architecture: Architecture, tokens: Tensor) -> None:
        self._architecture, self._tokens, self._layer = architecture, tokens.numel(), 0
        groups = tokens.split(max(1, BATCH // tokens.shape[1]))
        self._final = [architecture.final(group) for group in groups]  # (W, L, d_model) each
        with torch.inference_mode():
            self._entering = [architecture.embed(group) for group in groups]
        entries = [sum(target.matrix.numel() for target in block.targets) for block in architecture.blocks]
        head = sum(target.matrix.numel() for target in architecture.tail.targets)
        self._head = max(1, round(head * len(entries) / sum(entries)))  # in block forwards

    def steps(self, layer: int, trials: int) -> int:
        """What `divergences` ticks."""
        behind = len(self._architecture.blocks) - layer
        return len(self._final) * (trials * (behind + self._head) + self._head)

    def block(self, layer: int) -> Block:
        """Go on to a block."""
        while self._layer < layer:
            here = self._architecture.blocks[self._layer]
            self._entering = [_run([here], hidden) for hidden in self._entering]
            self._layer += 1
        return self._architecture.blocks[layer]

    def divergences(self, trials: Sequence[Block], tick: Callable[[int], None]) -> list[float]:
        """Mean KL of the model with each of `trials` in place of the block, nats a token.

        Raises:
            ValueError: logits that are not finite.
        """
        behind = self._architecture.blocks[self._layer + 1 :]
        sums = [0.0] * len(trials)
        for hidden, final in zip(self._entering, self._final, strict=True):
            pruned = [_run([trial, *behind], hidden) for trial in trials]
            parts = divergences(self._architecture, final, pruned)
            sums = [total + part for total, part in zip(sums, parts, strict=True)]
            tick(self.steps(self._layer, len(trials)) // len(self._final))
        if not all(map(math.isfinite, sums)):
            raise ValueError("the logits of the pruned model are not finite")
        return [max(total / self._tokens, 0.0) for total in sums]  # rounding can leave it below 0


@torch.inference_mode()
def divergences(architecture: Architecture, dense: Tensor, pruned: Sequence[Tensor]) -> list[float]:
    """Sum over tokens of KL(dense || pruned), nats, for each of `pruned`: states (W, T, d_model) behind the
    last block."""

    def log_probabilities(rows: Tensor) -> Tensor:
        return F.log_softmax(architecture.head(rows[None])[0].double(), -1)  # (rows, vocabulary)

    sums = [0.0] * len(pruned)
    for rows, *others in zip(*(s.flatten(0, 1).split(LOGITS) for s in (dense, *pruned)), strict=True):
        expected = log_probabilities(rows)
        for number, other in enumerate(others):
            parts = F.kl_div(log_probabilities(other), expected, reduction="sum", log_target=True)
            sums[number] += float(parts)
    return sums


@torch.inference_mode()
def _run(blocks: Iterable[Block], hidden: Tensor) -> Tensor:
    for block in blocks:
        out, _ = block.forward(hidden)
        assert out is not None
        hidden = out
    return hidden


def _pruned(block: Block, target: Target, rule: Rule, seen: Any) -> tuple[Block, Cell]:
    """A copy of the block with one matrix pruned, and its cell but for what must be measured."""
    method, solution = rule.method, solve(target, rule, seen)
    trial = block.copy()
    own = trial.target(target.kind)
    own.replace(solution.weight.masked_fill(~solution.keep, own.removed[rule.removed]))
    changes = method.companions(solution.seen, solution.keep, rule) if method.companions else {}
    for companion, change in changes.items():
        own.shift(companion, change)
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
    return trial, Cell(*what, *counts, kl=math.nan, error=error, signal=signal, cost=cost, seconds=0.0)


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def tick(steps: int) -> None:
        nonlocal done
        done += steps
        if progress:
            progress("analyze", min(done, total), total)

    return tick
