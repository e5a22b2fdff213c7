"""Grids and bits in a recipe: what they exclude, and what they leave to others."""

from __future__ import annotations

import pytest
from lively import mamba

from sparsessm.architectures import adapt
from sparsessm.methods.grids import Q4_0, Uniform
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.rules import assign, words


def resolved(**fields: object) -> Recipe:
    return Recipe(**fields).resolved(model="m", trained_length=21)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"grid": "int1"}, "grid is 'int1'; allowed: int2 to int8"),
        ({"grid": "fp4"}, "grid is 'fp4'; allowed: int2 to int8"),
        ({"bits": 1.2}, r"bits is 1.2; allowed: 1.5 to 9 \(a weight\)"),
        ({"bits": 9.5}, "bits is 9.5; allowed"),
        ({"bits": float("nan")}, "bits is nan; allowed"),
        ({"bits": 3, "grid": "int4"}, "bits is 3, but grid 'int4' already says how many"),
        ({"bits": 3, "sparsity": 0.5}, "sparsity is 0.5, but with bits 3 zeros are found"),
        ({"bits": 3, "allocation": "loss"}, "allocation 'loss' has no effect with bits"),
        ({"bits": 3, "method": "wanda"}, "bits has no effect with method 'wanda'; it belongs to: absorb"),
        ({"grid": "int4", "target": "ssm"}, "grid has no effect with method 'exact'"),
        (
            {"grid": "int4", "target": "conv1d"},
            "grid 'int4' has no effect on target 'conv1d'; it belongs to: proj",
        ),
        (
            {"grid": "int4", "pattern": "structured:state"},
            "grid has no effect with pattern 'structured:state'",
        ),
        ({"bits": 3, "pattern": "structured:state"}, "bits has no effect with pattern 'structured:state'"),
    ],
)
def test_what_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe(**fields)


def test_a_grid_prunes_only_when_asked_to() -> None:
    for fields in ({"grid": "int4"}, {"method": "gptq"}, {"method": "rtn", "grid": "int8:32"}):
        recipe = resolved(**fields)
        assert recipe.sparsity == 0 and recipe.target == "projections"
        assert {rule.sparsity for rule in assign(recipe, adapt(mamba()).targets).rules.values()} == {0}
    assert resolved(grid="int4", sparsity=0.5).sparsity == 0.5
    assert resolved(grid="int4", pattern="2:4").sparsity == 0.5
    assert resolved().sparsity == 0.5 and resolved().target == "all"


def test_a_grid_is_for_matrices() -> None:
    rules = assign(resolved(grid="int4", target="all"), adapt(mamba()).targets).rules
    assert {name.endswith("A_log"): rule.grid for name, rule in rules.items()} == {
        True: None,
        False: Uniform(4),
    }
    assert resolved(grid="int4:64").grid == "int4"


def test_blocks_are_for_all_matrices_of_whole_blocks() -> None:
    recipe = resolved(grid="q4_0", ignore=["dt_proj"])
    assert recipe.target == "matrices" and recipe.grid == "q4_0" and recipe.sparsity == 0
    targets = list(adapt(mamba(hidden_size=32, intermediate_size=64)).targets)
    rules = assign(recipe, targets).rules
    kinds = {name.split(".")[-2] for name in rules}
    assert kinds == {"in_proj", "x_proj", "out_proj", "embeddings"}
    assert {(rule.grid, words(rule)["grid"]) for rule in rules.values()} == {(Q4_0, "q4_0")}
    assert resolved(grid="q4_0", target="projections").target == "projections"
    broken = r"grid 'q4_0': blocks of 32 do not divide the 3 entries of a row of .*0.mixer.dt_proj.weight, "
    for how in ({}, {"method": "rtn"}, {"rules": [{"targets": ["dt_proj"]}]}):
        with pytest.raises(ValueError, match=f"{broken}which llama.cpp holds in f16; .* ignore dt_proj"):
            assign(resolved(grid="q4_0", **how), targets)


def test_what_is_asked_for_now_takes_the_place_of_what_was() -> None:
    was = Recipe(grid="int4", sparsity=0.5)
    assert was.updated(bits=3).model_dump(exclude_unset=True)["bits"] == 3
    assert was.updated(bits=3).grid is None and was.updated(bits=3).sparsity is None
    assert Recipe(bits=3).updated(grid="int3").bits is None
    assert Recipe(bits=3).updated(sparsity=0.3).bits is None


def test_rules_of_a_recipe_may_ask_for_different_bits() -> None:
    recipe = resolved(
        bits=3,
        rules=[
            {"targets": ["in_proj"]},
            {"targets": ["out_proj"], "grid": "int4"},
            {"targets": ["x_proj"], "sparsity": 0.5},
        ],
    )
    rules = assign(recipe, adapt(mamba()).targets).rules
    found = {name.split(".")[-2]: (rule.bits, rule.grid, rule.sparsity) for name, rule in rules.items()}
    assert found == {"in_proj": (3, None, 0), "out_proj": (None, Uniform(4), 0), "x_proj": (None, None, 0.5)}
