"""recipe/rules.py: what every form of selector hits, who comes first, and what is refused in which words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from pico import pico_mamba
from transformers import MambaConfig, MambaForCausalLM

from sparsessm.architectures import Architecture, adapt
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.rules import Assignment, assign, words

PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
KINDS = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "out_proj")


@pytest.fixture(scope="module")
def model() -> Architecture:
    """Three layers; the head is not the embedding."""
    return adapt(pico_mamba(num_hidden_layers=3, tie_word_embeddings=False))


def plan(model: Architecture, **fields: Any) -> Assignment:
    return assign(Recipe(**fields).resolved(model="pico", trained_length=40), model.targets)


def name(layer: int, kind: str) -> str:
    return f"backbone.layers.{layer}.mixer.{kind}" + ("" if kind == "A_log" else ".weight")


def names(kinds: Iterable[str], layers: Iterable[int] = range(3)) -> list[str]:
    """In the order of the data."""
    kinds = set(kinds)
    return [name(layer, kind) for layer in layers for kind in KINDS if kind in kinds]


HEAD, EMBEDDING = ["lm_head.weight"], ["backbone.embeddings.weight"]
HITS = {
    "in_proj": names(["in_proj"]),
    "A_log": names(["A_log"]),
    "conv1d": names(["conv1d"]),
    "lm_head": HEAD,
    "projections": names(PROJECTIONS),
    "ssm": names(["A_log"]),
    "head": HEAD,
    "embedding": EMBEDDING,
    "embeddings": EMBEDDING,
    "Linear": names(PROJECTIONS),
    "Conv1d": names(["conv1d"]),
    "MambaMixer": names(["A_log"]),
    "layer:0": names([*PROJECTIONS, "A_log"], [0]),
    "layer:2": names([*PROJECTIONS, "A_log"], [2]),
    "layer:-1": names([*PROJECTIONS, "A_log"], [2]),
    "layer:-3": names([*PROJECTIONS, "A_log"], [0]),
    "backbone.layers.1": names([*PROJECTIONS, "A_log"], [1]),
    "backbone.layers.1.mixer": names([*PROJECTIONS, "A_log"], [1]),
    "backbone": names([*PROJECTIONS, "A_log"]),
    "backbone.layers.1.mixer.in_proj": [name(1, "in_proj")],
    "backbone.layers.1.mixer.in_proj.weight": [name(1, "in_proj")],
    "backbone.layers.1.mixer.A_log": [name(1, "A_log")],
    "backbone.layers.1.mixer.conv1d": [name(1, "conv1d")],
    "lm_head.weight": HEAD,
    r"re:.*layers\.[01]\..*_proj": names(PROJECTIONS, [0, 1]),
    r"re:.*\.x_proj$": names(["x_proj"]),
    "re:lm_": HEAD,
    r"re:backbone\.layers\.2": names(KINDS, [2]),  # whoever writes a regular expression asks for all it hits
}


@pytest.mark.parametrize("selector", HITS)
def test_what_a_selector_hits(model: Architecture, selector: str) -> None:
    made = plan(model, rules=[{"targets": [selector]}])
    assert list(made.rules) == HITS[selector]
    assert [target.name for target in made.groups[0].targets] == HITS[selector]


@pytest.mark.parametrize(
    ("selector", "left"),
    [
        ("layer:0", names(KINDS, [1, 2]) + HEAD),
        ("layer:-1", names(KINDS, [0, 1]) + HEAD),
        ("Linear", names(["conv1d", "A_log"])),
        ("backbone", HEAD),
        ("conv1d", names([*PROJECTIONS, "A_log"]) + HEAD),
        ("re:.*head", names(KINDS)),
    ],
)
def test_ignoring_knows_no_exceptions(model: Architecture, selector: str, left: list[str]) -> None:
    """Also what is pruned only on request: layer:0 dense means all of it."""
    everything = ["backbone", "conv1d", "lm_head"]
    assert list(plan(model, rules=[{"targets": everything}], ignore=[selector]).rules) == left
    assert list(plan(model, rules=[{"targets": everything, "ignore": [selector]}]).rules) == left


@pytest.mark.parametrize(
    ("target", "hit"),
    [
        (None, names([*PROJECTIONS, "A_log"])),
        ("all", names([*PROJECTIONS, "A_log"])),
        ("projections", names(PROJECTIONS)),
        ("ssm", names(["A_log"])),
        ("conv1d", names(["conv1d"])),
        ("head", HEAD),
        ("embedding", EMBEDDING),
        ("matrices", names(PROJECTIONS) + HEAD + EMBEDDING),
    ],
)
def test_targets_are_families_and_head_and_conv1d_must_be_asked_for(
    model: Architecture, target: str | None, hit: list[str]
) -> None:
    assert list(plan(model, target=target).rules) == hit


def test_a_tied_head_is_one_target_under_the_name_it_is_stored_by() -> None:
    tied = adapt(pico_mamba())
    embeddings = ["backbone.embeddings.weight"]
    for selector in ("head", "lm_head", "backbone.embeddings", "backbone.embeddings.weight", "re:.*embed"):
        assert list(plan(tied, rules=[{"targets": [selector]}]).rules) == embeddings
    for selector in ("Linear", "backbone", "layer:-1"):
        assert embeddings[0] not in plan(tied, rules=[{"targets": [selector]}]).rules


def test_the_first_rule_that_matches_applies(model: Architecture) -> None:
    made = plan(
        model,
        ignore=["layer:0"],
        rules=[
            {"targets": ["backbone.layers.1.mixer.in_proj"], "sparsity": 0.1},
            {"targets": ["in_proj", "A_log"], "ignore": ["backbone.layers.2.mixer.A_log"], "sparsity": 0.2},
            {"targets": ["re:.*"], "ignore": ["Conv1d", "lm_head", "Embedding", "dt_proj"], "sparsity": 0.3},
        ],
    )
    first, second = [name(1, "in_proj")], [name(1, "A_log"), name(2, "in_proj")]
    third = [name(1, "x_proj"), name(1, "out_proj"), name(2, "x_proj"), name(2, "A_log"), name(2, "out_proj")]
    for group, hit, sparsity in zip(made.groups, (first, second, third), (0.1, 0.2, 0.3), strict=True):
        assert [target.name for target in group.targets] == hit
        assert {made.rules[target].sparsity for target in hit} == {sparsity}
    assert [group.title for group in made.groups] == [
        "rule 1 (backbone.layers.1.mixer.in_proj)",
        "rule 2 (in_proj, A_log)",
        "rule 3 (re:.*)",
    ]
    every = [target.name for target in model.targets]
    assert list(made.rules) == sorted(made.rules, key=every.index)  # in the order of the data


def test_a_budget_is_shared_by_a_family_of_a_rule(model: Architecture) -> None:
    made = plan(model, rules=[{"targets": ["in_proj", "A_log", "out_proj"]}, {"targets": ["x_proj"]}])
    budgets = [[target.name for target in budget] for budget in made.budgets]
    assert budgets == [names(["in_proj", "out_proj"]), names(["A_log"]), names(["x_proj"])]


DEFAULT_WORDS = {
    "projections": ("absorb", "unstructured", "zero", "dense-target:1", "fisher", "loss:0.1", "none"),
    "ssm": ("exact", "unstructured", "memoryless", "none", "none", "loss:1", "none"),
    "head": ("absorb", "unstructured", "zero", "dense-target:1", "fisher", "loss:0.1", "none"),
    "embedding": ("absorb", "unstructured", "zero", "self", "fisher", "loss:0.1", "none"),
    "conv1d": (
        "absorb",
        "unstructured",
        "zero",
        "dense-target:1",
        "none",
        "loss:0.1",
        "none",
    ),  # it has no Fisher
}


@pytest.mark.parametrize("family", DEFAULT_WORDS)
def test_the_defaults_of_a_family_are_its_methods_own(model: Architecture, family: str) -> None:
    for rule in plan(model, target=family).rules.values():
        assert tuple(words(rule).values()) == DEFAULT_WORDS[family]
        assert (rule.sparsity, rule.length, rule.prices) == (0.5, 40, None)


@pytest.mark.parametrize(
    ("fields", "family", "changed"),
    [
        ({"method": "sparsegpt"}, "projections", ("sparsegpt", "self", "none", "uniform")),
        ({"method": "sparsegpt"}, "ssm", ("exact", "none", "none", "loss:1")),  # it does not know A_log
        ({"method": "sparsegpt", "repair": "dense-target:0.25"}, "projections", None),
        ({"method": "sparsessm"}, "ssm", ("sparsessm", "none", "none", "uniform")),
        ({"method": "sparsessm"}, "projections", ("absorb", "dense-target:1", "fisher", "loss:0.1")),
        ({"method": "wanda"}, "projections", ("wanda", "none", "none", "uniform")),
        ({"repair": "self", "price": "norms"}, "projections", ("absorb", "self", "norms", "loss:0.1")),
        ({"repair": "self", "price": "norms"}, "ssm", ("exact", "none", "norms", "loss:1")),
        ({"allocation": "loss:0.2"}, "projections", ("absorb", "dense-target:1", "fisher", "loss:0.2")),
        ({"allocation": "loss:0.2"}, "ssm", ("exact", "none", "none", "loss:0.2")),
        ({"allocation": "owl"}, "projections", ("absorb", "dense-target:1", "fisher", "owl:0.08")),
        ({"allocation": "owl"}, "ssm", ("exact", "none", "none", "loss:1")),  # a rule for linear layers
        ({"allocation": "hessian-trace:0.1"}, "projections", None),
    ],
)
def test_what_is_said_replaces_the_defaults_where_it_is_read(
    model: Architecture, fields: dict[str, Any], family: str, changed: tuple[str, ...] | None
) -> None:
    made = plan(model, **fields)
    part = [made.rules[target.name] for target in model.targets if target.family == family]
    for rule in part:
        told = words(rule)
        if changed is None:
            assert fields.items() <= told.items()
        else:
            assert tuple(told[word] for word in ("method", "repair", "price", "allocation")) == changed


def test_rules_inherit_from_the_recipe_and_a_pattern_brings_its_sparsity(model: Architecture) -> None:
    made = plan(
        model,
        method="sparsegpt",
        sparsity=0.7,
        repair="none",
        allocation="loss",
        removed="unit",
        rules=[
            {"targets": ["in_proj"], "pattern": "1:4"},
            {"targets": ["x_proj"]},
            {"targets": ["out_proj"], "method": "wanda", "sparsity": 0.2, "allocation": "owl"},
            {"targets": ["dt_proj"], "repair": "self", "price": "norms"},
            {"targets": ["A_log"], "diagonal": True},
        ],
    )
    kinds = (*PROJECTIONS, "A_log")
    told = {kind: (made.rules[name(0, kind)], words(made.rules[name(0, kind)])) for kind in kinds}
    expected = {
        "in_proj": (0.75, "sparsegpt", "1:4", "zero", "none", "none", "uniform", "none"),
        "x_proj": (0.7, "sparsegpt", "unstructured", "zero", "none", "none", "loss:0.1", "none"),
        "out_proj": (0.2, "wanda", "unstructured", "zero", "none", "none", "owl:0.08", "none"),
        "dt_proj": (0.7, "sparsegpt", "unstructured", "zero", "self", "norms", "loss:0.1", "none"),
        "A_log": (0.7, "exact", "unstructured", "unit", "none", "none", "loss:1", "none"),
    }
    for kind, values in expected.items():
        rule, said = told[kind]
        assert (rule.sparsity, *said.values()) == values, kind
    assert [told[kind][0].diagonal for kind in ("A_log", "x_proj")] == [True, False]


def test_a_sparsity_in_a_rule_replaces_the_pattern_of_the_recipe(model: Architecture) -> None:
    rules = [{"targets": ["in_proj"]}, {"targets": ["out_proj"], "sparsity": 0.6}]
    made = plan(model, pattern="2:4", rules=rules)
    assert [str(made.rules[name(0, kind)].pattern) for kind in ("in_proj", "out_proj")] == [
        "2:4",
        "unstructured",
    ]
    assert [made.rules[name(0, kind)].sparsity for kind in ("in_proj", "out_proj")] == [0.5, 0.6]


def test_a_pattern_for_all_says_of_a_log_only_how_much(model: Architecture) -> None:
    made = plan(model, pattern="1:4", ignore=["dt_proj"])
    assert str(made.rules[name(0, "x_proj")].pattern) == "1:4"
    beside = made.rules[name(0, "A_log")]
    assert (str(beside.pattern), beside.sparsity, beside.allocation[0].name) == ("unstructured", 0.75, "loss")
    alone = plan(model, pattern="1:4", target="ssm").rules[name(0, "A_log")]
    assert (str(alone.pattern), alone.sparsity, alone.allocation[0].name) == ("1:4", 0.75, "uniform")


def test_every_target_draws_with_a_seed_of_its_own(model: Architecture) -> None:
    seeds = [rule.seed for seed in range(3) for rule in plan(model, seed=seed).rules.values()]
    assert len(set(seeds)) == len(seeds)
    assert [rule.seed for rule in plan(model, target="ssm").rules.values()] == [
        rule.seed for target, rule in plan(model).rules.items() if target.endswith("A_log")
    ]


KNOWN = (
    "known: in_proj, projections, Linear, conv1d, Conv1d, x_proj, dt_proj, A_log, ssm, MambaMixer, out_proj, "
    "lm_head, head, embeddings, embedding, Embedding, layer:0 to layer:2, names as in the checkpoint, "
    "re:REGEX"
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rules": [{"targets": ["A_log"]}, {"targets": ["inproj"]}]},
            f"rule 2 (inproj): selector 'inproj' selects nothing; {KNOWN}; did you mean 'in_proj'?",
        ),
        (
            {"rules": [{"targets": ["A_log", "q_proj"]}]},
            f"rule 1 (A_log, q_proj): selector 'q_proj' selects nothing; {KNOWN}; did you mean 'x_proj'?",
        ),
        ({"ignore": ["layer:3"]}, f"ignore: selector 'layer:3' selects nothing; {KNOWN}"),
        ({"ignore": ["layer:-4"]}, f"ignore: selector 'layer:-4' selects nothing; {KNOWN}"),
        ({"ignore": ["re:layers"]}, f"ignore: selector 're:layers' selects nothing; {KNOWN}"),
        (
            {"ignore": ["backbone.layers.1.mixer.in_pro"]},
            "did you mean 'backbone.layers.1.mixer.in_proj'?",
        ),
        (
            {"rules": [{"targets": ["A_log"], "ignore": ["x"]}]},
            f"rule 1 (A_log): ignore: selector 'x' selects nothing; {KNOWN}",
        ),
        (
            {"rules": [{"targets": ["re:(*"]}]},
            "rule 1 (re:(*): selector 're:(*' is not a regular expression: nothing to repeat at position 1",
        ),
        ({"target": "ssm", "ignore": ["A_log"]}, "target 'ssm': ignore leaves nothing to prune"),
        (
            {"rules": [{"targets": ["Linear"]}, {"targets": ["in_proj", "x_proj"]}]},
            "rule 2 (in_proj, x_proj) prunes nothing: earlier rules took all that it hits",
        ),
        (
            {"rules": [{"targets": ["A_log"]}], "ignore": ["ssm"]},
            "rule 1 (A_log) prunes nothing: all that it hits is ignored",
        ),
        (
            {"rules": [{"targets": ["A_log"], "ignore": ["backbone"]}]},
            "rule 1 (A_log) prunes nothing: all that it hits is ignored",
        ),
        (
            {"target": "ssm", "pattern": "2:3"},
            "pattern '2:3': groups of 3 do not divide the 8 entries of a row of backbone.layers.0.mixer.A_log"
            "; allowed M: 2, 4, 8; or leave it dense: ignore A_log",
        ),
        (
            {"target": "conv1d", "pattern": "1:8"},
            "pattern '1:8': groups of 8 do not divide the 4 entries of a row of "
            "backbone.layers.0.mixer.conv1d.weight; allowed M: 2, 4; or leave it dense: ignore conv1d",
        ),
        (
            {"rules": [{"targets": ["Linear"], "pattern": "2:4"}]},  # the rank of dt_proj is 1
            "rule 1 (Linear): pattern '2:4': groups of 4 do not divide the 1 entries of a row of "
            "backbone.layers.0.mixer.dt_proj.weight; allowed M: none; or leave it dense: ignore dt_proj",
        ),
        (
            {"rules": [{"targets": ["in_proj"], "method": "exact"}]},
            "rule 1 (in_proj): method 'exact' does not prune target 'projections'; it prunes: ssm",
        ),
        (
            {"method": "wanda", "rules": [{"targets": ["in_proj"], "repair": "self"}]},
            "rule 1 (in_proj): repair has no effect with method 'wanda'; it belongs to: gptq, sparsegpt, "
            "absorb",
        ),
        (
            {"rules": [{"targets": ["in_proj"], "removed": "unit"}]},
            "rule 1 (in_proj): removed is 'unit'; it has an effect on target 'ssm' only",
        ),
        (
            {"rules": [{"targets": ["A_log"], "allocation": "owl"}]},
            "rule 1 (A_log): allocation 'owl' has no effect on target 'ssm'; it belongs to: projections, "
            "conv1d, head",
        ),
        (
            {"pattern": "2:4", "rules": [{"targets": ["in_proj"], "allocation": "owl"}]},
            "rule 1 (in_proj): allocation 'owl' has no effect with pattern '2:4', which fixes the number "
            "kept in every group",
        ),
        (
            {"method": "exact", "rules": [{"targets": ["in_proj"]}]},
            "method 'exact' does not support any of the selected matrices; methods used: absorb",
        ),
        (
            {"method": "wanda", "ignore": ["Linear"]},
            "method 'wanda' does not support any of the selected matrices; methods used: exact",
        ),
        (
            {"repair": "self", "ignore": ["projections"]},
            "repair has no effect: exact does not read it",
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_what_is_refused(model: Architecture, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        plan(model, **fields)
    said = str(caught.value)
    assert said == message or (message.startswith("did you mean") and said.endswith(message))


def test_a_removed_value_that_nobody_chose_is_no_fault(model: Architecture) -> None:
    """`resolved` writes it for target all; leaving A_log dense must still be possible."""
    made = plan(model, ignore=["A_log"])
    assert {rule.removed for rule in made.rules.values()} == {"zero"}


def test_an_unresolved_recipe_is_refused(model: Architecture) -> None:
    with pytest.raises(ValueError, match="call Recipe.resolved first"):
        assign(Recipe(), model.targets)


def test_a_plan_looks_at_no_values() -> None:
    with torch.device("meta"):
        deep = MambaForCausalLM(MambaConfig(hidden_size=64, num_hidden_layers=64, vocab_size=64))
    made = plan(adapt(deep), rules=[{"targets": ["re:.*_proj"]}, {"targets": ["A_log"]}], ignore=["layer:-1"])
    assert len(made.rules) == 63 * 5
