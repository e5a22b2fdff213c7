"""Which matrix loses how much: a survey of the dense model, and what each budget's allocation makes of it.

Place in the flow: before the loop of entries.py. The arithmetic is in methods/allocation.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sparsessm.architectures import Architecture, Target
from sparsessm.calibration.journal import Journal
from sparsessm.calibration.progress import Progress, Steps
from sparsessm.calibration.slabs import first_tokens, slab_count
from sparsessm.calibration.visit import survey
from sparsessm.methods import Rule
from sparsessm.methods.allocation import Profile
from sparsessm.methods.base import Member
from sparsessm.methods.dial import Curve, step
from sparsessm.methods.grids import Dial
from sparsessm.pruning.naming import naming
from sparsessm.recipe.rules import Assignment
from sparsessm.report.row import Row

SURVEY_TOKENS = 32_768  # of the calibration windows: shares need less than masks (docs/methods.md)


def surveyed(
    architecture: Architecture,
    assignment: Assignment,
    tokens: Tensor | None,
    progress: Progress | None,
    journal: Journal,
) -> dict[str, Rule]:
    """The rules, each with the sparsity that it gets, or what is foretold of its bits, after one pass over
    the dense model.

    Args:
        tokens: (W, L) int64; may be None where no allocation looks at anything.
        journal: keeps what is seen of each block, and the sparsities.
    """
    found = journal.once("shares", lambda: _shares(architecture, assignment, tokens, progress, journal))
    return {
        name: replace(rule, sparsity=found["shares"][name], curve=_restored(found["curves"].get(name)))
        for name, rule in assignment.rules.items()
    }


def stepped(assignment: Assignment, rules: Mapping[str, Rule], name: str, rows: Sequence[Row]) -> Rule:
    """The rule of a target that comes next; where bits are asked for, with the step at which its budget is
    met.

    The step of all targets to come, from the bits of those that are done and the curves of the others, which
    were taken of the dense model: by as much as they missed so far they miss on.

    Args:
        rows: what was done so far.
    """
    rule = rules[name]
    if rule.bits is None:
        return rule
    (budget,) = (part for part in assignment.budgets if any(target.name == name for target in part))
    done = {row.target: (row.bits, row.step) for row in rows if row.bits is not None and row.step is not None}
    asked = rule.bits * sum(target.matrix.numel() for target in budget)
    spent = foretold = 0.0
    left = []
    for target in budget:
        curve = rules[target.name].curve
        if target.name in done:
            bits, before = done[target.name]
            spent, foretold = spent + bits, foretold + curve.at(before)
        else:
            left.append(curve)
    asked -= spent
    return replace(rule, grid=Dial(step(left, asked * foretold / spent if spent else asked)))


def _shares(
    architecture: Architecture,
    assignment: Assignment,
    tokens: Tensor | None,
    progress: Progress | None,
    journal: Journal,
) -> dict[str, Any]:
    rules = unequal(assignment)

    def watch(target: Target) -> Any | None:
        rule = None if target.looked_up else rules.get(target.name)
        look = rule and rule.allocation[0].watch
        # the dense model needs no second stream
        if rule is None or look is None:
            return None
        return look(target.matrix, replace(rule, repair="none").on(target.matrix.device))

    targets = {target.name: target for target in architecture.targets if target.name in rules}
    seen: dict[str, Any] = {}
    if any(watch(target) is not None for target in targets.values()):
        assert tokens is not None
        few = first_tokens(tokens, SURVEY_TOKENS)
        blocks = len(architecture.blocks)
        steps = Steps("survey", slab_count(*few.shape) * blocks, progress, blocks)
        # sums over what blocks share would be lost between them
        stage = None if any(target.uses for target in targets.values()) else journal.stage("survey")
        for past in stage.left.values() if stage else ():
            seen |= {name: _restored(what) for name, what in past.items()}
        told = set(seen)

        def note() -> dict[str, Any]:
            nonlocal told
            new, told = seen.keys() - told, set(seen)
            return {name: _plain(seen[name]) for name in sorted(new)}

        for target, what in survey(architecture, few, watch, steps, stage=stage, note=note):
            seen[target.name] = reduced(target, rules[target.name], what)
    for name in sorted(targets.keys() - seen.keys()):
        with architecture.holding(targets[name].layer):
            seen[name] = reduced(targets[name], rules[name], None)
    return {
        "shares": {name: rule.sparsity for name, rule in allocated(assignment, seen).items()},
        "curves": {name: _plain(what) for name, what in seen.items() if isinstance(what, Curve)},
    }


def _on_cpu(what: Any) -> Any:
    """As a journal gives it back."""
    if isinstance(what, Profile | Curve):
        moved = {name: part.cpu() for name, part in vars(what).items() if isinstance(part, Tensor)}
        return replace(what, **moved)
    return what.cpu() if isinstance(what, Tensor) else what


def _plain(what: Any) -> Any:
    """As a journal takes it."""
    return vars(what) if isinstance(what, Profile | Curve) else what


def _restored(what: Any) -> Any:
    """The reverse of `_plain`."""
    if not isinstance(what, dict):
        return what
    return Curve(**what) if "steps" in what else Profile(**what)


def unequal(assignment: Assignment) -> dict[str, Rule]:
    """The rules whose targets do not all get the overall sparsity."""
    return {name: rule for name, rule in assignment.rules.items() if rule.allocation[0].share}


def reduced(target: Target, rule: Rule, seen: Any) -> Any:
    """What a target's allocation keeps of what was seen of it."""
    keep = rule.allocation[0].reduce
    with naming(target.name):
        gone = target.matrix == target.removed[rule.removed]
        return keep and _on_cpu(keep(target.matrix, seen, rule.on(gone.device), gone))


def allocated(assignment: Assignment, seen: Mapping[str, Any]) -> dict[str, Rule]:
    """The rules, each with the sparsity that its budget's allocation gives to its target.

    Args:
        seen: what is `reduced` of every target whose allocation is not even.
    """
    rules = dict(assignment.rules)
    for targets in assignment.budgets:
        for part in _alike([target for target in targets if target.name in seen], rules):
            members = [
                Member(target.layer, target.kind, target.matrix.numel(), seen[target.name]) for target in part
            ]
            rule = rules[part[0].name]
            row, number = rule.allocation
            assert row.share is not None, "an even allocation has nothing to compare"
            for target, share in zip(part, row.share(members, rule.sparsity, number), strict=True):
                rules[target.name] = replace(rules[target.name], sparsity=share)
    return rules


def _alike(targets: Sequence[Target], rules: Mapping[str, Rule]) -> list[list[Target]]:
    """Targets of one budget whose scores compare: those of one method and allocation."""
    parts: dict[Any, list[Target]] = {}
    for target in targets:
        rule = rules[target.name]
        parts.setdefault((rule.method.name, rule.allocation, rule.sparsity), []).append(target)
    return list(parts.values())
