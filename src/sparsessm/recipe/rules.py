"""From a recipe to one `Rule` for each target: which the selectors hit, and what the options mean there.

Selectors are those of llm-compressor's recipes (names, class names, `re:`), and three of our own (families,
kinds, `layer:N`):

    in_proj · A_log                         a kind: the parameter's own name inside its layer
    backbone.layers.0.mixer.in_proj         a module or parameter, or all that is inside one
    Linear · Conv1d · MambaMixer            the class of the module that owns the parameter
    projections · ssm · conv1d · head · ... a family
    layer:0 · layer:-1                      a layer; negative numbers count from the last
    re:.*layers\\.[0-3]\\..*_proj             a regular expression, from the start of the module's name

The head (and a tied embedding with it), the embedding and conv1d are hit only by their own name, kind, family
or a regular expression, conv1d also by its class. What is ignored is ignored by every form.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sparsessm.architectures import Target
from sparsessm.methods import allocation, grids, patterns
from sparsessm.methods.base import UNIFORM, Rule, seed_of
from sparsessm.recipe.fields import OPTIONS, Choice, applies, reads
from sparsessm.recipe.fits import parse_repair
from sparsessm.recipe.recipe import DEFAULT_SPARSITY, Recipe

ON_REQUEST = ("conv1d", "head", "embedding")
OUTER = ("head", "embedding")  # in no layer


@dataclass(frozen=True)
class Group:
    """The targets that one rule of the recipe hits, in the order of the data; a budget for each family."""

    title: str
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Assignment:
    """Which rule prunes which matrix.

    Attributes:
        groups: one for each rule of the recipe, or one in all. rules: target name -> how it is pruned.
    """

    groups: tuple[Group, ...]
    rules: Mapping[str, Rule]

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order of the data."""
        return list(dict.fromkeys(rule.method.name for rule in self.rules.values()))

    @property
    def budgets(self) -> list[list[Target]]:
        """Targets that share one budget: of one group and one family, where bits are asked for of all."""
        parts: dict[tuple[int, str], list[Target]] = {}
        for number, group in enumerate(self.groups):
            for target in group.targets:
                family = target.family if self.rules[target.name].bits is None else "bits"
                parts.setdefault((number, family), []).append(target)
        return list(parts.values())


def assign(recipe: Recipe, targets: Iterable[Target]) -> Assignment:
    """Apply the recipe's selectors and fill in each rule.

    Args:
        recipe: resolved. targets: of the model, in the order of the data.

    Raises:
        ValueError: a recipe that is not resolved; a selector or rule that selects nothing; a rule, or a
            recipe, with options that none of its targets reads; an N:M pattern whose M does not divide a
            row of a target. Each names what it is about.
    """
    if recipe.length is None:
        raise ValueError("the recipe has no length; call Recipe.resolved first")
    every = list(targets)
    ignored = {target.name for target in _chosen(recipe.ignore, every, "ignore", asked=False)}
    if recipe.rules:
        groups, rules = _by_rules(recipe, every, ignored)
    else:
        hit = tuple(t for t in every if t.family in recipe.families and t.name not in ignored)
        if not hit:
            raise ValueError(f"target {recipe.target!r}: ignore leaves nothing to prune")
        groups = [Group(recipe.target or "all", hit)]
        rules = {target.name: _rule(recipe, recipe, target, hit) for target in hit}
    _refuse_idle(recipe, rules.values())
    return Assignment(
        tuple(groups), {target.name: rules[target.name] for target in every if target.name in rules}
    )


def _by_rules(
    recipe: Recipe, every: Sequence[Target], ignored: set[str]
) -> tuple[list[Group], dict[str, Rule]]:
    """What the recipe's rules hit, the first that matches."""
    groups: list[Group] = []
    rules: dict[str, Rule] = {}
    for number, fields in enumerate(recipe.rules, 1):
        title = f"rule {number} ({', '.join(fields.targets)})"
        but = {target.name for target in _chosen(fields.ignore, every, f"{title}: ignore", asked=False)}
        named = [t for t in _chosen(fields.targets, every, title) if t.name not in but | ignored]
        hit = tuple(target for target in named if target.name not in rules)
        if not hit:
            why = "earlier rules took all that it hits" if named else "all that it hits is ignored"
            raise ValueError(f"{title} prunes nothing: {why}")
        for sentence in fields.idle(dict.fromkeys(target.family for target in hit), recipe.method).values():
            raise ValueError(f"{title}: {sentence}")
        try:
            own = Choice(**_joined(recipe, fields))
            rules |= {target.name: _rule(recipe, own, target, hit) for target in hit}
        except ValueError as error:
            raise ValueError(f"{title}: {error}") from None
        groups.append(Group(title, hit))
    return groups, rules


def _refuse_idle(recipe: Recipe, rules: Iterable[Rule]) -> None:
    """What the recipe says for all, and nothing that is pruned reads."""
    methods = {rule.method.name: rule.method for rule in rules}
    if recipe.method and recipe.method not in methods:
        raise ValueError(
            f"method {recipe.method!r} does not support any of the selected matrices; "
            f"methods used: {', '.join(methods)}"
        )
    for option in OPTIONS:
        if option in recipe.chosen and not any(reads(method, option) for method in methods.values()):
            raise ValueError(f"{option} has no effect: {', '.join(methods)} does not read it")


def _joined(recipe: Recipe, fields: Choice) -> dict[str, object]:
    """What the rule says, and the recipe where it says nothing; a pattern brings its own sparsity."""
    base = recipe.chosen
    if isinstance(patterns.parse(fields.pattern or "unstructured"), patterns.NofM):
        for name in ("sparsity", "allocation"):
            base.pop(name, None)
    elif fields.sparsity is not None:
        base.pop("pattern", None)
    for one, others in (
        ("bits", ("grid", "sparsity", "allocation")),
        ("grid", ("bits",)),
        ("sparsity", ("bits",)),
    ):
        if one in fields.chosen:
            for name in others:
                base.pop(name, None)
    return base | fields.chosen


def _rule(recipe: Recipe, choice: Choice, target: Target, hit: Sequence[Target]) -> Rule:
    method = choice.methods([target.family])[target.family]
    pattern = patterns.parse(choice.pattern or "unstructured")
    assert not isinstance(pattern, patterns.Structured), "whole units are sizes.py's part"
    grid = (choice.grid or method.defaults.get("grid")) if applies("grid", "", target.family) else None
    bits = choice.bits if reads(method, "bits") and applies("bits", "", target.family) else None
    values = grids.parse(grid) if grid and reads(method, "grid") else None
    if values is not None and values.blocks:
        _refuse_broken(values, target)
    usual = 0.0 if grid or bits else DEFAULT_SPARSITY
    sparsity = usual if choice.sparsity is None else choice.sparsity
    name = choice.allocation or method.defaults["allocation"]
    if not applies("allocation", name, target.family):
        name = method.defaults["allocation"]
    if isinstance(pattern, patterns.NofM) and target.family == "ssm" and any(t.family != "ssm" for t in hit):
        # N:M serves matrix products, which A_log is in none of: beside linear layers it only says how much.
        pattern, sparsity = patterns.Unstructured(), pattern.sparsity
    if isinstance(pattern, patterns.NofM):
        _refuse_indivisible(pattern, target)
        sparsity, name = pattern.sparsity, UNIFORM.name
    if grid and not sparsity:  # there is nothing to share out
        name = UNIFORM.name
    repair, strength = "none", 1.0
    if "repair" in method.defaults:
        repair, strength = parse_repair(choice.repair or method.defaults["repair"])
        if target.looked_up and repair == "dense-target":
            repair, strength = "self", 1.0  # a row is the same in both models
    price = (choice.price or method.defaults["price"]) if "price" in method.defaults else "none"
    price = price if applies("price", price, target.family) else "none"
    return Rule(
        method=method,
        pattern=pattern,
        sparsity=sparsity,
        removed=(choice.removed or "memoryless") if target.family == "ssm" else "zero",
        repair=repair,
        strength=strength,
        price=price,
        allocation=(allocation.ONE_STEP, 0.0) if bits else allocation.parse(name, target.family),
        grid=values,
        bits=bits,
        diagonal=bool(choice.diagonal),
        time_weights=choice.time_weights or "power:1",
        length=recipe.length or 0,
        seed=seed_of(recipe.seed, target.name),
    )


def words(rule: Rule) -> dict[str, str]:
    """The names of what a rule does: method, pattern, removed, repair, price, allocation, grid."""
    row, number = rule.allocation
    return {
        "method": rule.method.name,
        "pattern": str(rule.pattern),
        "removed": rule.removed,
        "repair": f"{rule.repair}:{rule.strength:g}" if rule.paired else rule.repair,
        "price": rule.price,
        "allocation": f"{row.name}:{number:g}" if row.letter else row.name,
        "grid": f"{rule.bits:g} bits" if rule.bits else str(rule.grid or "none"),
    }


def _refuse_broken(grid: grids.Uniform, target: Target) -> None:
    """Refuse a matrix whose rows are no whole blocks, which llama.cpp keeps in another type."""
    if (row := target.matrix.shape[1]) % grid.group:
        raise ValueError(
            f"grid '{grid}': blocks of {grid.group} do not divide the {row} entries of a row of "
            f"{target.name}, which llama.cpp holds in f16; leave it as it is: ignore {target.kind}"
        )


def _refuse_indivisible(pattern: patterns.NofM, target: Target) -> None:
    if (row := target.matrix.shape[1]) % pattern.m:
        divisors = ", ".join(str(m) for m in range(2, min(row, 64) + 1) if row % m == 0) or "none"
        raise ValueError(
            f"pattern '{pattern}': groups of {pattern.m} do not divide the {row} entries of a row of "
            f"{target.name}; allowed M: {divisors}; or leave it dense: ignore {target.kind}"
        )


def _chosen(
    selectors: Sequence[str], targets: Sequence[Target], where: str, *, asked: bool = True
) -> list[Target]:
    """The targets that any of the selectors hits.

    Args:
        where: the beginning of an error message.
        asked: what is pruned only on request must be asked for.

    Raises:
        ValueError: a selector that hits nothing.
    """
    layers = 1 + max(target.layer for target in targets if target.family not in OUTER)
    chosen: set[str] = set()
    for selector in selectors:
        try:
            hit = {target.name for target in targets if _matches(selector, target, layers, asked)}
        except re.error as error:
            raise ValueError(f"{where}: selector {selector!r} is not a regular expression: {error}") from None
        if not hit:
            raise ValueError(
                f"{where}: selector {selector!r} selects nothing; {_known(selector, targets, layers)}"
            )
        chosen |= hit
    return [target for target in targets if target.name in chosen]


def _matches(selector: str, target: Target, layers: int, asked: bool) -> bool:
    if selector.startswith("re:"):
        return re.match(selector[3:], target.module) is not None
    if selector in (target.kind, target.family, target.module, target.name):
        return True
    if asked and target.family in ON_REQUEST:
        return selector == target.module_class and target.family == "conv1d"
    if layer := re.fullmatch(r"layer:(-?\d+)", selector):
        number = int(layer[1])
        return target.family not in OUTER and target.layer == (number + layers if number < 0 else number)
    return selector == target.module_class or target.module.startswith(f"{selector}.")


def _known(selector: str, targets: Sequence[Target], layers: int) -> str:
    words = list(dict.fromkeys(word for t in targets for word in (t.kind, t.family, t.module_class)))
    near = difflib.get_close_matches(selector, [*words, *(target.module for target in targets)], n=1)
    return (
        f"known: {', '.join(words)}, layer:0 to layer:{layers - 1}, names as in the checkpoint, re:REGEX"
        + (f"; did you mean {near[0]!r}?" if near else "")
    )
