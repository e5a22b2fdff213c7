"""The one loop: 1 calibrate, 2 score, 3 mask, 4 compensate. Saving is the caller's last line.

Before it, what the rules need to know of the dense model: what an error costs the loss (one backward pass),
and who can spare how much (one survey).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsessm.architectures import Architecture, SharedTarget, Target, seen_by_all_uses
from sparsessm.calibration import prices
from sparsessm.calibration.walk import Progress, Stop, slab_width, survey, together, walk
from sparsessm.data.edition import edition
from sparsessm.data.texts import fingerprint
from sparsessm.methods import METHODS, Rule, allocation
from sparsessm.methods.hessian import Factor, factorise
from sparsessm.methods.observers import InputNorm, Moments
from sparsessm.methods.repair import dense_target, output_error, refit, sweep
from sparsessm.pruning import structured
from sparsessm.recipe import plan as plans
from sparsessm.recipe.plan import Plan
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.units import Order, is_structured
from sparsessm.report.record import Report, Row

# Looks at a target of the walk: what the observer of its method saw.
Look = Callable[[Target], Any]
Rules = Mapping[str, Rule]

COST_TOKENS = 16_384  # of the calibration windows that the backward pass looks at
SURVEY_TOKENS = 32_768  # and the survey: shares need less than masks (docs/methods.md)


def prune(
    architecture: Architecture, recipe: Recipe, tokens: Tensor | None, progress: Progress | None = None
) -> Report:
    """Prune the model in place, block after block, each seeing what the pruned blocks before it produce.

    Args:
        architecture: from `adapt(model)`.
        recipe: resolved, see `Recipe.resolved`.
        tokens: (W, L) int64 calibration windows; may be None where no data is needed (`needs_data`).
        progress: called as (stage, done, total).

    Raises:
        ValueError: rules that do not fit the model, or a target whose scores, Hessian or activations are not
            finite, by name.
    """
    began = time.perf_counter()
    if is_structured(recipe):
        return structured.run(architecture, recipe, tokens, progress)
    plan = plans.make(recipe, architecture.targets)
    if tokens is None and (hungry := [rule for rule in plan.rules.values() if _looks(rule)]):
        words = dict.fromkeys(
            f"method {rule.method.name!r}" if rule.method.watch else f"allocation {rule.allocation[0]!r}"
            for rule in hungry
        )
        raise ValueError(f"{' and '.join(words)} needs calibration windows, none were given")
    rules = priced(architecture, plan.rules, tokens, progress)
    rules = _surveyed_and_allocated(architecture, replace(plan, rules=rules), tokens, progress)
    rows: list[Row] = []
    for target, look in _visit(architecture, rules, tokens, progress):
        with _naming(target):
            rows.append(_prune(target, rules[target.name], look))
    order = list(rules)
    rows.sort(key=lambda row: order.index(row.target))  # a tied head was first, experts took turns
    sha256 = fingerprint(tokens) if tokens is not None and needs_data(plan) else ""
    text = edition(recipe.data, "calibration") if sha256 else {}
    return Report(recipe.model_dump(), rows, sha256, time.perf_counter() - began, text=text)


def needs_data(plan: Plan | Order) -> bool:
    """Whether any rule looks at calibration windows."""
    if isinstance(plan, Order):
        return plan.looks
    return any(_looks(rule) for rule in plan.rules.values())


def _looks(rule: Rule) -> bool:
    return rule.method.watch is not None or rule.allocation[0] in ("hessian-trace", "owl")


@contextmanager
def _naming(target: Target) -> Iterator[None]:
    """What is wrong is said of this target."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{target.name}: {error}") from None


def _prune(target: Target, rule: Rule, look: Look) -> Row:
    """Prune one target: the four stages."""
    # 1 calibrate; what was seen is handed over, not kept: a float64 Hessian is large
    seen = look(target) if rule.method.watch else None
    tokens = seen.tokens if target.routed and isinstance(seen, Moments) else None
    if starved(target, seen):
        rule, seen = replace(rule, method=METHODS["magnitude"], repair="none", price="none", prices=None), None
    method = rule.method
    done = solve(target, rule, seen)
    target.replace(done.weight.masked_fill(~done.keep, target.removed[rule.removed]))
    changes = method.companions(done.seen, done.keep, rule) if method.companions else {}
    for companion, change in changes.items():
        target.shift(companion, change)
    error = method.error(done.seen, done.keep, rule) if method.error else None
    if done.factor is not None:
        gram, start, unit = done.seen.gram, done.start, done.unit
        error = unit * output_error(target.matrix - start, gram), unit * output_error(start, gram)
    return replace(_row(target, rule, done.keep, done.factor, tuple(changes), error), tokens=tokens)


def starved(target: Target, seen: Any) -> bool:
    """Whether an expert saw fewer tokens than it has inputs: too few to say what its weights are good for."""
    few = target.matrix.shape[1]
    return target.routed and isinstance(seen, Moments) and seen.tokens is not None and seen.tokens < few


class Solution(NamedTuple):
    """What a target becomes.

    Attributes:
        weight: (out, in) repaired, 0 where removed. keep: (out, in) bool. start: what the repair aims at.
        seen: a Hessian is in the weight's dtype, divided by `unit`. factor: of that, where there is one.
    """

    weight: Tensor
    keep: Tensor
    start: Tensor
    seen: Any
    factor: Factor | None
    unit: float


def solve(target: Target, rule: Rule, seen: Any) -> Solution:
    """Stages 2 to 4 for one target, which is not changed; refuses what is not finite."""
    method, weight = rule.method, target.matrix
    gone = weight == target.removed[rule.removed]  # removed before: stays removed, and is counted
    start, factor, unit = weight, None, 1.0
    if method.hessian:
        seen, unit = seen.scaled(weight.dtype)
        factor = factorise(seen.gram)
        start = weight.clone()  # the target's matrix is a view of what will be replaced
        if rule.repair == "dense-target":
            start = dense_target(weight, seen, factor, rule.strength)
    repairing = factor if rule.repair != "none" else None
    score = _score(rule, seen if factor is None else factor, repairing)
    pruned, keep = sweep(  # 2 score  3 mask  4 compensate
        start, score, rule.pattern, rule.sparsity, repairing, method.width, by_row=method.by_row, gone=gone
    )
    if repairing is not None and method.refit:
        pruned = refit(pruned, start, seen.gram, repairing, keep)
    if not torch.isfinite(pruned).all():
        raise ValueError("the repaired weights are not finite")
    return Solution(pruned, keep, start, seen, factor, unit)


def _score(rule: Rule, seen: Any, factor: Factor | None) -> Callable[[Tensor, slice], Tensor]:
    """The method's score, refusing what is not a number; of the whole matrix if nothing is repaired."""

    def score(weight: Tensor, columns: slice) -> Tensor:
        if factor is None and rule.method.total:
            value = rule.method.total(weight, seen, rule)
        else:
            value = rule.method.score(weight, seen, rule, columns)
        if value.isnan().any():
            raise ValueError(f"method {rule.method.name!r} gave a score that is not a number")
        return value

    return score


def _visit(
    architecture: Architecture, rules: Rules, tokens: Tensor | None, progress: Progress | None
) -> Iterator[tuple[Target, Look]]:
    """The targets in the order of the data, each with a way to look at it."""

    def watch(target: Target) -> Any | None:
        rule = rules.get(target.name)
        return rule.method.watch(target.matrix, rule) if rule and rule.method.watch else None

    watched = {name for name, rule in rules.items() if rule.method.watch}
    if not watched or tokens is None:
        for target in architecture.targets:
            if target.name in rules:
                yield target, lambda target: None
        return
    head = [target for target in architecture.tail.targets if target.name in rules]
    behind = not architecture.tied and any(target.name in watched for target in head)
    with torch.inference_mode():
        hidden = architecture.embed(tokens)
    if architecture.tied and head:
        # The head is the embedding too: pruned before anything sees its rows, on the dense model's states.
        yield head[0], lambda head: _behind_the_layers(architecture, head, watch(head), tokens, progress)
    dense = any(rule.repair == "dense-target" for rule in rules.values())
    parts = (part for block in architecture.blocks for part in together(block.targets, watch))
    # looks at what blocks share are not counted by `Stop`
    looks = sum(any(t.name in watched and not isinstance(t, SharedTarget) for t in part) for part in parts)
    passes = 1 + looks / len(architecture.blocks)
    for stop in walk(architecture, tokens, passes, progress, dense=hidden if dense else None, tail=behind):
        for part in together(stop.block.targets, watch):
            look = _looking(architecture, stop, part, watch)
            yield from ((target, look) for target in part if target.name in rules)
    if not architecture.tied and not behind:
        yield from ((target, lambda target: None) for target in head)


def _looking(architecture: Architecture, stop: Stop, part: Sequence[Target], watch: Look) -> Look:
    """How to look at the targets of one part of a block; at experts, one pass for all has looked already."""
    experts = {t.kind: observer for t in part if t.routed and (observer := watch(t)) is not None}
    if experts:
        stop.run(experts, until=list(experts)[-1])

    def look(target: Target) -> Any:
        if target.routed:
            return experts.pop(target.kind).result()  # handed over, not kept
        observer = watch(target)
        if isinstance(target, SharedTarget):
            width = slab_width(*stop.hidden.shape[:2])
            return seen_by_all_uses(architecture, target, observer, stop.hidden, width)
        return stop.seen(target, observer)

    return look


def _behind_the_layers(
    architecture: Architecture, target: Target, observer: Any, tokens: Tensor, progress: Progress | None
) -> Any:
    """What the model as it is feeds into its head; both streams are the same."""
    for stop in walk(architecture, tokens, 1, progress, tail=True):
        if stop.block is architecture.tail:
            return replace(stop, dense=stop.block, dense_hidden=stop.hidden).seen(target, observer)


def priced(
    architecture: Architecture, rules: Rules, tokens: Tensor | None, progress: Progress | None
) -> dict[str, Rule]:
    """The rules, with what an error in each output row costs where they ask for it."""
    priced = dict(rules)
    asked = {
        target.name: rules[target.name].price for target in architecture.targets if target.name in rules
    }
    costs: dict[str, Tensor] = {}
    if "norms" in asked.values():
        costs = prices.output_norms(architecture)
    if "fisher" in asked.values() and tokens is not None:
        head = any(asked.get(target.name) == "fisher" for target in architecture.tail.targets)
        few = tokens[: max(1, COST_TOKENS // tokens.shape[1])]
        fisher = prices.output_fisher(architecture, few, progress, head=head)
        costs |= {name: cost for name, cost in fisher.items() if asked.get(name) == "fisher"}
    for name, kind in asked.items():
        if kind != "none" and name in costs:
            priced[name] = replace(rules[name], prices=costs[name])
    return priced


def _surveyed_and_allocated(
    architecture: Architecture, plan: Plan, tokens: Tensor | None, progress: Progress | None
) -> dict[str, Rule]:
    """The rules, each with the sparsity that it gets after a look at the dense model."""
    unequal = {name: rule for name, rule in plan.rules.items() if rule.allocation[0] != "uniform"}
    return allocated(plan, _surveyed(architecture, unequal, tokens, progress) if unequal else {})


def allocated(plan: Plan, seen: Mapping[str, Any]) -> dict[str, Rule]:
    """The rules, each with the sparsity that its budget's allocation gives to its target.

    Args:
        seen: what is `compared` of every target whose allocation is not uniform.
    """
    rules = dict(plan.rules)
    for targets in plan.budgets:
        for part in _alike([target for target in targets if target.name in seen], rules):
            rule = rules[part[0].name]
            shares = _shares(part, [seen[target.name] for target in part], rule)
            rules |= {
                target.name: replace(rules[target.name], sparsity=share)
                for target, share in zip(part, shares, strict=True)
            }
    return rules


def _alike(targets: Sequence[Target], rules: Rules) -> list[list[Target]]:
    """Targets of one budget whose scores compare: those of one method and allocation."""
    parts: dict[Any, list[Target]] = {}
    for target in targets:
        rule = rules[target.name]
        parts.setdefault((rule.method.name, rule.allocation, rule.sparsity), []).append(target)
    return list(parts.values())


def _surveyed(
    architecture: Architecture, rules: Rules, tokens: Tensor | None, progress: Progress | None
) -> dict[str, Any]:
    """Of each target, what its allocation compares, seen in one pass over the dense model."""

    def watch(target: Target) -> Any | None:
        if target.name not in rules:
            return None
        rule = replace(rules[target.name], repair="none")  # the dense model needs no second stream
        if rule.allocation[0] != "loss":
            return InputNorm()
        return rule.method.watch(target.matrix, rule) if rule.method.watch else None

    def named(target: Target, what: Any) -> Any:
        with _naming(target):
            return compared(target, rules[target.name], what)

    targets = {target.name: target for target in architecture.targets if target.name in rules}
    if all(watch(target) is None for target in targets.values()):
        return {name: named(target, None) for name, target in targets.items()}
    assert tokens is not None
    few = tokens[: max(1, SURVEY_TOKENS // tokens.shape[1])]
    seen, left_out = {}, set()
    for target, what in survey(architecture, few, watch, progress):
        if starved(target, what):  # an expert of which nothing is known keeps the rule's own share
            left_out.add(target.name)
        else:
            seen[target.name] = named(target, what)
    rest = [name for name in targets if name not in seen and name not in left_out]
    return seen | {name: named(targets[name], None) for name in rest}


def compared(target: Target, rule: Rule, seen: Any) -> Any:
    """What a target's allocation compares, of what was seen of it."""
    weight = target.matrix
    if rule.allocation[0] == "hessian-trace":
        return seen.power
    if rule.allocation[0] == "owl":
        return weight.double().abs() * seen.power.sqrt()
    evidence, unit = seen, 1.0
    if rule.method.hessian:
        seen, unit = seen.scaled(weight.dtype)
        evidence = factorise(seen.gram)
    score = _score(rule, evidence, None)(weight, slice(None))
    gone = weight == target.removed[rule.removed]
    return allocation.Profile.of(score.masked_fill(gone, -torch.inf), unit)


def _shares(targets: Sequence[Target], seen: Sequence[Any], rule: Rule) -> list[float]:
    """The sparsity of each target of one budget."""
    name, parameter = rule.allocation
    sizes = [target.matrix.numel() for target in targets]
    if name == "loss":
        return allocation.by_threshold(seen, rule.sparsity, parameter)
    shares = [rule.sparsity] * len(targets)
    if name == "owl":
        layers = sorted({target.layer for target in targets})
        members = [[i for i, target in enumerate(targets) if target.layer == layer] for layer in layers]
        ratios = [allocation.outlier_ratio([seen[i] for i in part]) for part in members]
        entries = [sum(sizes[i] for i in part) for part in members]
        for part, share in zip(
            members, allocation.owl(ratios, entries, rule.sparsity, parameter), strict=True
        ):
            for i in part:
                shares[i] = share
        return shares
    for kind in ("in_proj", "out_proj"):  # the others get the overall sparsity, as in the paper
        part = [i for i, target in enumerate(targets) if target.kind == kind]
        if part:
            ramp = allocation.hessian_trace([seen[i] for i in part], rule.sparsity, parameter)
            for i, share in zip(part, ramp, strict=True):
                shares[i] = share
    return shares


def _row(
    target: Target,
    rule: Rule,
    keep: Tensor,
    factor: Factor | None,
    companions: tuple[str, ...],
    error: tuple[float, float] | None,
) -> Row:
    words = plans.words(rule)
    return Row(
        target=target.name,
        layer=target.layer,
        family=target.family,
        method=words["method"],
        pattern=words["pattern"],
        removed=words["removed"],
        total=keep.numel(),
        pruned=int((~keep).sum()),
        allocation=words["allocation"],
        repair=words["repair"],
        price=words["price"] if rule.prices is not None else "none",
        damping=None if factor is None else factor.damping,
        error=None if error is None else error[0],
        signal=None if error is None else error[1],
        repaired=tuple(target.name.removesuffix(target.kind) + companion for companion in companions),
    )
