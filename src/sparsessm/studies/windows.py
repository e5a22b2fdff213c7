"""How many calibration windows are enough: `samples: auto`.

The windows are doubled, 4, 8, 16, ..., until another doubling would change little: the masks that two
disjoint halves of them choose agree hardly better, and pruning by all of them has hardly less error on
windows held out.

Place in the flow: before pruning, with its scores, allocation and sweep, but on the dense model, where
sums over windows add up, so that a doubling looks at the new windows only. docs/calibration.md has curves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from sparsessm.architectures import Architecture, Target
from sparsessm.architectures.experts import reads_stream
from sparsessm.calibration.progress import Progress, Steps
from sparsessm.calibration.slabs import slab_count
from sparsessm.calibration.visit import survey
from sparsessm.methods import Rule
from sparsessm.methods.observers import ErrorSums, InputGram, InputNorm, Moments, StateError
from sparsessm.methods.repair import error_of, output_error
from sparsessm.pruning.entries import priced, solve
from sparsessm.pruning.naming import naming
from sparsessm.pruning.shares import allocated, reduced, unequal
from sparsessm.recipe.rules import Assignment, Group

FIRST = 4  # windows: two halves of two
MOST = 256
HELD_OUT = 16  # at most, and at most a third of the windows
# A doubling that gains less agreement, and takes a smaller share off the error, is not worth its time;
# docs/calibration.md says what that is in perplexity.
GAIN = 0.03
FALL = 0.01
LAYERS = 4  # looked at, evenly spaced: bounds the memory of three sets of sums and the time of the sweeps

Rules = Mapping[str, Rule]
Sums = dict[str, Any]  # target name -> observer's result


@dataclass(frozen=True)
class Step:
    """One point of the curve.

    Attributes:
        windows: calibration windows. agreement: of the masks of their two halves, see `agreement`.
        error: on the held-out windows: energy of what pruning changes in a layer's output over that of the
            output, mean over the matrices weighted by their entries.
        seconds: that this point took; the windows of those before it were not looked at again.
        experts: of the layers that are looked at. starved: how many of them saw fewer tokens than they have
            inputs.
    """

    windows: int
    agreement: float
    error: float
    seconds: float
    experts: int = 0
    starved: int = 0


def steps(
    architecture: Architecture, assignment: Assignment, tokens: Tensor, progress: Progress | None = None
) -> Iterator[Step]:
    """Measure the curve, as far as it is asked for; the model is not changed.

    Where the recipe weighs rows by the loss, the weights come from the first windows, once. Of experts only
    the tokens are counted: what they lack they borrow (methods/borrowing.py), and one that hardly any token
    reaches would ask for windows without end.

    Args:
        tokens: (W, L) int64, all different: the last are held out, the first are calibrated on.
        progress: called with ("N windows", steps done, steps in all, block).

    Raises:
        ValueError: an assignment whose methods look at no windows; too few of them; activations, scores or
            Hessians that are not finite, by name.
    """
    targets = watched(architecture, assignment)
    aside = min(HELD_OUT, len(tokens) // 3)
    count = len(tokens) - aside
    if count < FIRST:
        raise ValueError(
            f"samples 'auto' needs {FIRST + 1} different windows, the text has {len(tokens)} of "
            f"{tokens.shape[1]} tokens; use a shorter length, or give a number of samples"
        )
    began = time.perf_counter()
    rules = {name: assignment.rules[name] for name in targets}
    rules = priced(architecture, rules, tokens[:count], progress)
    # The dense model has no second stream, and its own output is what a repair aims at.
    rules = {
        name: replace(rule, repair="self" if rule.paired else rule.repair) for name, rule in rules.items()
    }
    chosen = replace(assignment, groups=_only(assignment, targets), rules=rules)
    walked = slab_count(aside, tokens.shape[1]) * len(architecture.blocks)
    bar = Steps(f"{aside} held-out windows", walked, progress)
    held: Sums = {}
    _look(architecture, tokens[count:], lambda target: _referee(target, rules), held, bar)
    halves: tuple[Sums, Sums] = {}, {}
    fed = _Fed(architecture, assignment, targets)
    size, done = FIRST, 0
    while size <= min(count, MOST):
        new = tokens[done:size].chunk(2)
        walked = 2 * slab_count(*new[0].shape) * len(architecture.blocks)
        bar = Steps(f"{size} windows", walked + 3 * len(targets), progress)
        for part, sums in zip(new, halves, strict=True):
            _look(architecture, part, lambda target: fed.watch(target) or _observer(target, rules), sums, bar)
            fed.take(sums)
        with ExitStack() as stack:  # at most `LAYERS` blocks
            for layer in sorted({target.layer for target in targets.values()}):
                stack.enter_context(architecture.holding(layer))
            same = _agreement(targets, chosen, halves, bar)
            error = _mean_error(targets, chosen, halves, held, bar)
        # whether to go on is decided once for all processes
        seconds = time.perf_counter() - began
        yield architecture.ranks.given(Step(size, same, error, seconds, *fed.told()))
        began, size, done = time.perf_counter(), 2 * size, size


class _Fed:
    """How many tokens reach the experts of the layers that are looked at."""

    def __init__(
        self, architecture: Architecture, assignment: Assignment, targets: Mapping[str, Target]
    ) -> None:
        layers = {target.layer for target in targets.values()}
        some = [t for t in architecture.targets if t.layer in layers and t.name in assignment.rules]
        self._inputs = {t.name: t.matrix.shape[1] for t in some if t.routed and reads_stream(t.kind)}
        self._tokens = dict.fromkeys(self._inputs, 0)

    def watch(self, target: Target) -> Any | None:
        """What counts the tokens of an expert."""
        return InputNorm() if target.name in self._inputs else None

    def take(self, sums: Sums) -> None:
        """Count what was seen, and take it out of the sums."""
        for name in self._inputs:
            self._tokens[name] += sums.pop(name).tokens

    def told(self) -> tuple[int, int]:
        """Experts, and those that saw fewer tokens than they have inputs."""
        return len(self._inputs), sum(self._tokens[name] < inputs for name, inputs in self._inputs.items())


def choose(
    architecture: Architecture, assignment: Assignment, tokens: Tensor, progress: Progress | None = None
) -> tuple[int, list[dict[str, Any]]]:
    """The number of windows that are enough, at most what there is, and the curve up to it as plain values.

    Args, Raises: as `steps`.
    """
    curve: list[Step] = []
    for step in steps(architecture, assignment, tokens, progress):
        curve.append(step)
        if found := knee(curve):
            return found, [asdict(step) for step in curve]
    return curve[-1].windows, [asdict(step) for step in curve]


def knee(curve: Sequence[Step]) -> int | None:
    """The fewest windows after which doubling them brought little; None if the curve shows no such place."""
    for before, after in zip(curve, curve[1:], strict=False):
        if after.agreement - before.agreement < GAIN and after.error > (1 - FALL) * before.error:
            return before.windows
    return None


def agreement(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Cohen's kappa of masks: 1 for the same ones, 0 for what chance would give masks of these sparsities.

    Args:
        pairs: two bool masks of the same shape for each matrix; matrices count by their entries, and by how
            much chance leaves open. One of which all or nothing is removed says nothing.

    Returns:
        1.0 where chance leaves nothing open.
    """
    more = open_ = 0.0
    for first, second in pairs:
        entries = first.numel()
        same, a, b = (float(part.sum()) for part in (first == second, first, second))
        chance = (a * b + (entries - a) * (entries - b)) / max(entries, 1)
        more, open_ = more + same - chance, open_ + entries - chance
    return more / open_ if open_ > 0 else 1.0


def advice_table(curve: Sequence[Mapping[str, Any]], chosen: int) -> tuple[list[str], list[list[str]]]:
    """Columns and text cells: a line for each size of a recorded curve."""
    mixture = any(step.get("experts") for step in curve)
    cells = [
        [
            str(step["windows"]) + (" (chosen)" if step["windows"] == chosen else ""),
            f"{step['agreement']:.4f}",
            f"{step['error']:.3e}",
            f"{step['seconds']:.1f}",
            *([f"{step['starved']} of {step['experts']}"] if mixture else []),
        ]
        for step in curve
    ]
    starved = ["experts with fewer tokens than inputs"] if mixture else []
    return ["windows", "agreement of halves", "held-out error", "seconds", *starved], cells


def watched(architecture: Architecture, assignment: Assignment) -> dict[str, Target]:
    """The targets whose masks depend on windows, of `LAYERS` of the layers that have any.

    Raises:
        ValueError: there are none.
    """
    rules = assignment.rules
    every = [t for t in architecture.targets if t.name in rules and rules[t.name].method.watch and t.plain]
    if not every:
        raise ValueError(
            f"samples 'auto' has nothing to compare: {' and '.join(assignment.methods)} scores without "
            "calibration windows; give a number of samples, or leave it out"
        )
    layers = sorted({target.layer for target in every})
    count = min(LAYERS, len(layers))
    looked = {layers[round(i * (len(layers) - 1) / max(count - 1, 1))] for i in range(count)}
    return {target.name: target for target in every if target.layer in looked}


def _only(assignment: Assignment, targets: Mapping[str, Target]) -> tuple[Group, ...]:
    """The groups of an assignment, with these targets alone."""
    return tuple(
        replace(group, targets=tuple(target for target in group.targets if target.name in targets))
        for group in assignment.groups
    )


def _observer(target: Target, rules: Rules) -> Any | None:
    """What calibration watches the target with."""
    rule = rules.get(target.name)
    if rule is None or rule.method.watch is None:
        return None
    return rule.method.watch(target.matrix, rule.on(target.matrix.device))


def _referee(target: Target, rules: Rules) -> Any | None:
    """What tells the output error of any pruning of the target, whatever its method."""
    if target.name not in rules:
        return None
    if target.family != "ssm":
        return InputGram()
    return StateError(rules[target.name].removed, diagonal=False, rows=len(target.matrix))


def _look(
    architecture: Architecture,
    tokens: Tensor,
    watch: Callable[[Target], Any | None],
    sums: Sums,
    bar: Steps,
) -> None:
    """Add what is seen on these windows to the sums over as many others."""
    for target, seen in survey(architecture, tokens, watch, bar):
        name = target.name
        sums[name] = _joined(sums[name], seen) if name in sums else seen


def _joined(first: Any, second: Any) -> Any:
    """What would have been seen on two sets of windows of the same size together.

    Exact for Grams, norms and error sums. The published SparseSSM scores are not additive: the product of the
    mean decay with the energy, and votes, are taken set by set.
    """
    if isinstance(first, Moments):
        return replace(first, gram=(first.gram + second.gram) / 2)
    if isinstance(first, ErrorSums):
        return ErrorSums(
            first.gram + second.gram,
            None if first.cross is None else first.cross + second.cross,
            None if first.power is None else first.power + second.power,
            first.signal + second.signal,
        )
    return first + second


def _agreement(
    targets: Mapping[str, Target], assignment: Assignment, halves: Sequence[Sums], bar: Steps
) -> float:
    """Of the masks by the sums of two halves, where no entry was removed before."""
    # the refit changes no mask
    hasty = {
        name: replace(rule, method=replace(rule.method, refit=False))
        for name, rule in assignment.rules.items()
    }
    assignment = replace(assignment, rules=hasty)
    first, second = (
        {name: keep for name, _, keep in _pruned(targets, assignment, sums.__getitem__, bar)}
        for sums in halves
    )
    pairs = []
    for name, target in targets.items():
        living = target.matrix != target.removed[assignment.rules[name].removed]
        pairs.append((first[name][living], second[name][living]))
    return agreement(pairs)


def _mean_error(
    targets: Mapping[str, Target], assignment: Assignment, halves: Sequence[Sums], held: Sums, bar: Steps
) -> float:
    """Relative error on held-out windows after pruning by the sums of both halves."""

    def seen(name: str) -> Any:  # made anew each time: a third set of sums would take as much memory again
        return _joined(*(sums[name] for sums in halves))

    total = entries = 0.0
    for name, weight, keep in _pruned(targets, assignment, seen, bar):
        rule = assignment.rules[name]
        total += keep.numel() * _error(targets[name], rule, weight, keep, seen(name), held[name])
        entries += keep.numel()
    return total / entries


def _pruned(
    targets: Mapping[str, Target], assignment: Assignment, seen: Callable[[str], Any], bar: Steps
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Prune every target for itself by what was seen: (name, weight, keep)."""
    rules = allocated(
        assignment,
        {name: reduced(targets[name], rule, seen(name)) for name, rule in unequal(assignment).items()},
    )
    for name, target in targets.items():
        with naming(name):
            solution = solve(target, rules[name].on(target.matrix.device), seen(name))
        bar()
        yield name, solution.weight, solution.keep


def _error(target: Target, rule: Rule, weight: Tensor, keep: Tensor, seen: Any, held: Any) -> float:
    """Relative output error on the held-out windows of a target pruned by what was seen on others."""
    if isinstance(held, ErrorSums):
        changes = rule.method.companions(seen, keep, rule) if rule.method.companions else {}
        error, signal = error_of(held, keep, changes.get("D")), held.signal
    else:
        gram = held.gram.to(weight.dtype)
        error, signal = output_error(weight - target.matrix, gram), output_error(target.matrix, gram)
    return error / signal if signal > 0 else 0.0
