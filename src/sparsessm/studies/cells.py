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
from sparsessm.architectures.experts import abreast, common
from sparsessm.calibration.loss import ROWS, in_rows
from sparsessm.calibration.progress import Progress, Steps
from sparsessm.calibration.slabs import grouped, share, slab_count
from sparsessm.calibration.visit import lent, watching_layers, with_layer
from sparsessm.calibration.walk import Stop, final, through, walk
from sparsessm.evaluation.perplexity import BATCH
from sparsessm.methods import Rule
from sparsessm.methods.repair import output_error
from sparsessm.pruning.entries import Solution, solve, write
from sparsessm.pruning.naming import naming

LOGITS = ROWS // 4  # rows of logits alive at a time: here they are float64, and those of two models


@dataclass(frozen=True)
class Cell:
    """One matrix pruned alone, or the matrices of one kind of all experts of a layer.

    Attributes:
        target: full parameter name. layer, kind, family: of the target.
        sparsity: that was asked for. entries: of the matrix. pruned: entries removed.
        kl: KL(dense || pruned) of the next-token distributions, nats, mean over the held-out tokens.
        error: energy that pruning and repair change in the matrix's output (of A_log: in the block's), on the
            calibration windows. signal: energy of that output.
        cost: the error with its rows weighed by what the loss says; the error itself where nothing weighs.
        seconds: of work; what the cells of one matrix share is split evenly.
        tokens: calibration tokens that each expert saw. inputs: of each one's matrix. None elsewhere.
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
    tokens: Sequence[int] | None = None
    inputs: int | None = None


def parts_of(architecture: Architecture, rules: Mapping[str, Rule]) -> dict[str, list[Target]]:
    """The targets that have rules, those together that are pruned together: of experts all of a kind.

    Returns:
        By name, in the order of the model; of experts that of the tensor that holds them.
    """
    found = {}
    for block in (*architecture.blocks, architecture.tail):
        for part in abreast([target for target in block.targets if target.name in rules]):
            name = part[0].name
            found[name.rpartition(".")[0] if part[0].routed else name] = part
    return found


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
    parts = parts_of(architecture, rules)
    missing = {name: left for name in parts if (left := [s for s in sparsities if (name, s) not in done])}
    if not missing:
        return
    groups = grouped(held_out, BATCH)
    groups = [groups[number] for number in architecture.ranks.mine(len(groups))]
    held = _HeldOut(architecture, groups)
    mine, last = share(architecture.ranks, *calibration.shape), list(missing)[-1]
    total = slab_count(mine.stop - mine.start, calibration.shape[1]) * (1 + parts[last][0].layer)
    total += sum(held.steps(parts[name][0].layer, len(left)) for name, left in missing.items())
    steps = Steps("analyze", total, progress)
    for stop in walk(architecture, calibration, *groups, tail=True, steps=steps):
        here = {name: parts[name] for name in missing if parts[name][0].layer == stop.block.index}
        watched = {
            target.name: _observer(target, rules[target.name]) for part in here.values() for target in part
        }
        kinds = {target.name: target for part in here.values() for target in part}
        seen = {
            name: stop.look(target, watched.pop(name)) for name, target in kinds.items() if target.uses
        }  # in all its uses; the others in one pass
        layer = watching_layers(list(kinds.values()), watched)
        stop.run({kinds[name].kind: observer for name, observer in watched.items()} | layer)
        of_layer = lent(stop, layer)
        for name, part in here.items():
            began = time.perf_counter()
            with naming(name):
                for target in part:
                    if target.name in watched:
                        found = stop.result(watched.pop(target.name))
                        seen[target.name] = with_layer(target, found, of_layer)
                own = {target.name: seen.pop(target.name) for target in part}
                pruned = [_pruned(stop.block, name, part, rules, s, own) for s in missing[name]]
                kls = held.divergences(stop, [variant for variant, _ in pruned], steps, part[0])
            seconds = (time.perf_counter() - began) / len(pruned)
            cells = [replace(cell, kl=kl, seconds=seconds) for kl, (_, cell) in zip(kls, pruned, strict=True)]
            yield architecture.ranks.given(cells)
            if name == last:
                return  # nobody needs the layers behind it


def _observer(target: Target, rule: Rule) -> Any:
    assert rule.method.watch is not None
    return rule.method.watch(target.matrix, rule.on(target.matrix.device))


class _HeldOut:
    """What the dense model makes of the held-out windows, and how far models with a variant are from it."""

    def __init__(self, architecture: Architecture, groups: Sequence[Tensor]) -> None:
        self._architecture, self._final = architecture, final(architecture, *groups)
        self._tokens = sum(architecture.ranks.gathered(sum(group.numel() for group in groups)))
        entries = [sum(target.matrix.numel() for target in block.targets) for block in architecture.blocks]
        head = sum(target.matrix.numel() for target in architecture.tail.targets)
        self._head = max(1, round(head * len(entries) / sum(entries)))  # in block forwards

    def steps(self, layer: int, variants: int) -> int:
        """What `divergences` counts."""
        behind = len(self._architecture.blocks) - layer
        return len(self._final) * (variants * (behind + self._head) + self._head)

    def divergences(self, stop: Stop, variants: Sequence[Block], steps: Steps, target: Target) -> list[float]:
        """Mean KL of the model with each variant in place of the block, nats a token.

        Args:
            stop: before the block, with the held-out windows as groups.
            target: of what was changed the first; the blocks behind that use it too have the same.

        Raises:
            ValueError: logits that are not finite.
        """
        if target.uses and len(variants) > 1:  # the blocks behind are others for each
            return [kl for one in variants for kl in self.divergences(stop, [one], steps, target)]
        groups, found = len(stop.groups), []
        pruned = (state for variant in variants for state in self._through(variant, stop.groups))
        for later in stop.behind(*pruned):
            steps(groups * len(variants))  # of the block before
            if later.block.index in target.uses:
                later.replace(_with(later.block, target, variants[0].target(target.kind).matrix))
            if later.block is self._architecture.tail:
                for number, dense in enumerate(self._final):
                    found.append(divergences(self._architecture, dense, later.groups[number::groups]))
                    steps((len(variants) + 1) * self._head)
        every = [parts for others in self._architecture.ranks.gathered(found) for parts in others]
        sums = [sum(parts) for parts in zip(*every, strict=True)]
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


def _with(block: Block, target: Target, matrix: Tensor) -> Block:
    """A copy of a block with another matrix in place of one that it shares with an earlier block."""
    variant = block.copy()
    weight: Any = variant.linear()[target.name].weight
    with torch.no_grad():
        weight.copy_(matrix.view_as(weight))
    return variant


def _pruned(
    block: Block,
    name: str,
    part: Sequence[Target],
    rules: Mapping[str, Rule],
    sparsity: float,
    seen: Mapping[str, Any],
) -> tuple[Block, Cell]:
    """A copy of the block with some targets pruned, and their cell but for what must be measured."""
    variant, sums, entries, pruned = block.copy(), [0.0, 0.0, 0.0], 0, 0
    tokens = [seen[target.name].tokens for target in part] if part[0].routed else None
    for number, target in enumerate(part):
        rule = replace(rules[target.name].on(target.matrix.device), sparsity=sparsity)
        solution = solve(target, rule, seen[target.name])
        own = variant.target(target.kind)
        write(own, rule, solution)
        # means over the tokens that each saw
        weight = 1.0 if tokens is None else tokens[number] / max(sum(tokens), 1)
        for place, energy in enumerate(_energies(target, own, rule, solution)):
            sums[place] += weight * energy
        entries, pruned = entries + solution.keep.numel(), pruned + int((~solution.keep).sum())
    kind, inputs = part[0].kind, None
    if tokens is not None:
        kind, inputs = common(kind), part[0].matrix.shape[1]
    what = name, part[0].layer, kind, part[0].family, sparsity, entries, pruned
    error, signal, cost = sums
    costs = {"kl": math.nan, "error": error, "signal": signal, "cost": cost, "seconds": 0.0}
    return variant, Cell(*what, **costs, tokens=tokens, inputs=inputs)


def _energies(target: Target, own: Target, rule: Rule, solution: Solution) -> tuple[float, float, float]:
    """Of a target and what became of it: error, signal and cost, as of `Cell`."""
    if solution.factor is not None:
        change, gram = own.matrix - target.matrix, solution.seen.gram
        error, signal = (solution.unit * output_error(part, gram) for part in (change, target.matrix))
        weighed = change if rule.prices is None else change * rule.prices.sqrt()[:, None].to(change.dtype)
        return error, signal, solution.unit * output_error(weighed, gram)
    method = rule.method
    measured = method.error(solution.seen, solution.keep, rule) if method.error else None
    assert measured is not None, f"{method.name} knows no error"
    error, signal = measured
    return error, signal, error
