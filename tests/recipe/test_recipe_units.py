"""Recipes for whole units: what means nothing for them, YAML and back, what makes room for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsessm.methods import unit_methods
from sparsessm.recipe.recipe import Recipe

UNITS = unit_methods()


def result(**fields: Any) -> Recipe:
    """The recipe as a result carries it: every field is said."""
    recipe = Recipe(**fields).resolved(model="m", trained_length=None)
    return Recipe(**recipe.model_dump())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target": "ssm"},
         "target has no effect with pattern 'structured:state', which removes units of every layer"),
        ({"rules": [{"targets": "A_log"}]}, "rules has no effect with pattern 'structured:state'"),
        ({"ignore": "layer:0"}, "ignore has no effect with pattern 'structured:state'"),
        ({"allocation": "loss"}, "allocation 'loss' supports only pattern 'structured:channel'"),
        ({"allocation": "owl"}, "allocation is 'owl'; with pattern 'structured:state': uniform, loss"),
        ({"allocation": "loss:0.5"},
         "allocation is 'loss:0.5'; with pattern 'structured:state': uniform, loss"),
        ({"pattern": "structured:channel", "allocation": "loss", "method": "magnitude"},
         "allocation 'loss' with pattern 'structured:channel' needs method 'exact', got 'magnitude'"),
        ({"removed": "unit"}, "removed has no effect with pattern 'structured:state'"),
        ({"diagonal": True}, "diagonal has no effect with pattern 'structured:state'"),
        ({"time_weights": "linear"}, "time_weights has no effect with pattern 'structured:state'"),
        ({"sparsity": 0},
         "sparsity is 0; pattern 'structured:state' removes at least one unit; give a sparsity above 0"),
        ({"method": "wanda"},
         "method 'wanda' scores single entries; methods for pattern 'structured:state': random, "),
        ({"method": "sparsessm"}, "method 'sparsessm' scores single entries"),
        ({"repair": "self"},
         r"repair is 'self'; with pattern 'structured:state': none, dense-target\[:STRENGTH\]"),
        ({"price": "norms"}, "price is 'norms'; with pattern 'structured:state': none, fisher"),
        ({"method": "balanced", "repair": "dense-target"}, "repair has no effect with method 'balanced'"),
        ({"pattern": "structured:state=0.5", "sparsity": 0.5},
         "sparsity is 0.5, but pattern 'structured:state=0.5' already gives a share for each axis"),
        ({"pattern": "structured:layer"}, "pattern 'structured:layer': 'layer' is not an axis; known: "),
        ({"pattern": "structurd"}, "unknown pattern 'structurd'; .*; did you mean 'structured'"),
        ({"pattern": "unstructured", "method": "ghost"},
         r"method 'ghost' chooses whole units; it needs a pattern structured:AXIS \(state\)"),
        ({"pattern": "2:4", "method": "cosine"},
         r"method 'cosine' chooses whole units; .* structured:AXIS \(block\)"),
        ({"pattern": None, "method": "ghost"}, "method 'ghost' chooses whole units"),
        ({"pattern": None, "rules": [{"targets": "A_log", "pattern": "structured:state"}]},
         "pattern 'structured:state' is for the whole model, not for a rule"),
    ],
)  # fmt: skip
def test_what_means_nothing_for_whole_units_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}") as caught:
        Recipe(**{"pattern": "structured:state"} | fields)
    assert "\n" not in str(caught.value)


STRUCTURED = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(sorted(name for name, row in UNITS.items() if not row.projects)),
        "repair": st.sampled_from(["none", "dense-target", "dense-target:0.25"]),
        "price": st.sampled_from(["none", "fisher"]),
        "samples": st.integers(1, 100),
        "length": st.integers(2, 4096),
        "seed": st.integers(0, 2**63 - 1),
    },
)


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.sampled_from(
        ["structured", "structured:state", "structured:channel=0.5", "structured:block=0.1,state=0.25"]
    ),
    sparsity=st.none() | st.floats(1e-3, 0.999),
    fields=STRUCTURED,
)
def test_a_structured_recipe_comes_back_from_yaml_and_from_a_record(
    tmp_path_factory: pytest.TempPathFactory, pattern: str, sparsity: float | None, fields: dict[str, Any]
) -> None:
    if "=" not in pattern and sparsity is not None:
        fields = fields | {"sparsity": sparsity}
    recipe = Recipe(pattern=pattern, **fields)
    resolved = recipe.resolved(model="m", trained_length=128)
    assert resolved.pattern == pattern and resolved.target is None and resolved.removed is None
    assert resolved.sparsity == (None if "=" in pattern else fields.get("sparsity", 0.5))
    assert (resolved.model, resolved.length) == ("m", fields.get("length", 128))
    assert resolved.resolved(model="m", trained_length=9) == resolved
    folder = tmp_path_factory.mktemp("recipe")
    for one in (recipe, resolved):
        assert Recipe(**one.model_dump()) == one
        (folder / "recipe.yaml").write_text(yaml.safe_dump(one.model_dump()), encoding="utf-8")
        assert Recipe.load(folder / "recipe.yaml") == one
        (folder / "pruning.json").write_text(json.dumps({"format": 1, "recipe": one.model_dump()}))
        assert Recipe.load(folder) == one


@pytest.mark.parametrize("pattern", ["structured", "structured:state", "structured:state=0.5"])
@pytest.mark.parametrize(
    "old",
    [
        {},
        {"target": "ssm", "removed": "unit", "diagonal": True},
        {"target": "projections", "ignore": "layer:0", "allocation": "owl"},
        {"target": "ssm", "method": "exact", "price": "fisher", "sparsity": 0.25},
        {"rules": [{"targets": "A_log", "method": "sparsessm", "time_weights": "linear"}]},
        {"pattern": "2:4", "target": "ssm"},
        {"pattern": "structured:block", "method": "exact", "sparsity": 0.1},
    ],
)
def test_a_structured_pattern_makes_room_for_itself(old: dict[str, Any], pattern: str) -> None:
    """What stays is what has an effect on it; sparsity is of another kind."""
    new = result(**old).updated(pattern=pattern)
    assert new.pattern == pattern
    for name in ("target", "removed", "diagonal", "allocation", "time_weights", "sparsity"):
        assert getattr(new, name) is None
    assert new.rules == () and new.ignore == ()
    assert new.price == old.get("price") and new.method == old.get("method")
    assert Recipe(**new.model_dump()) == new


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "sparsessm"])
def test_a_method_for_single_entries_makes_room_for_whole_units(method: str) -> None:
    old = result(method=method)
    assert old.updated(pattern="structured:state", method="ghost").method == "ghost"
    assert old.updated(pattern="structured:state").method is None
    old = result(method="absorb", repair="self", price="norms")
    new = old.updated(pattern="structured:state")
    assert (new.method, new.repair, new.price) == (None, None, None)


def test_from_whole_units_to_single_entries() -> None:
    old = result(pattern="structured:state", sparsity=0.75, method="exact")
    new = old.updated(pattern="unstructured", target="ssm")
    assert (new.pattern, new.target, new.sparsity, new.method) == ("unstructured", "ssm", None, "exact")
    ghost = result(pattern="structured:state", method="ghost", repair="dense-target:0.5")
    new = ghost.updated(pattern="unstructured")
    assert (new.method, new.repair) == (None, None)
    with pytest.raises(ValueError, match="target has no effect with pattern 'structured:state'"):
        ghost.updated(target="ssm")
    assert (
        result(pattern="structured:state", method="ghost").updated(pattern="2:4", method="exact").pattern
        == "2:4"
    )
    with pytest.raises(ValueError, match="target has no effect with pattern 'structured:state'"):
        old.updated(target="ssm")
    with pytest.raises(ValueError, match="target has no effect with pattern 'structured:state'"):
        result().updated(pattern="structured:state", target="ssm")


def test_shares_and_a_sparsity_replace_each_other() -> None:
    old = result(pattern="structured:state", sparsity=0.25)
    assert old.updated(pattern="structured:state=0.5").sparsity is None
    assert old.updated(sparsity=0.5).sparsity == 0.5
    with pytest.raises(ValueError, match="already gives a share for each axis"):
        old.updated(pattern="structured:state=0.5", sparsity=0.5)
    back = result(pattern="structured:state=0.5").updated(pattern="structured:channel", sparsity=0.1)
    assert (back.pattern, back.sparsity) == ("structured:channel", 0.1)


@pytest.mark.parametrize("text", ["structured", "structured:state", "structured:state=0.5,block=0.1"])
def test_a_structured_pattern_in_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"pattern: {text}\nrepair: none\nprice: fisher\n")
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe == Recipe(pattern=text, repair="none", price="fisher")
