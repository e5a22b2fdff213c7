"""Recipe: what it refuses and how it says so, the way to YAML and back, what depends on the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsessm.architectures import REMOVED_A_LOG
from sparsessm.methods import METHODS
from sparsessm.recipe import Recipe, window_length


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sparsity": 1.0}, "sparsity is 1; allowed: 0 <= sparsity < 1"),
        ({"sparsity": -0.1}, "sparsity is -0.1; allowed: 0 <= sparsity < 1"),
        ({"sparsity": float("nan")}, "sparsity is nan; allowed: 0 <= sparsity < 1"),
        ({"sparsity": "half"}, "sparsity is 'half'; input should be a valid number"),
        ({"method": "exat"}, "unknown method 'exat'; known: random, magnitude, .*; did you mean 'exact'"),
        ({"target": "smm"}, "unknown target 'smm'; known: ssm; did you mean 'ssm'"),
        ({"data": "stdlb"}, "unknown data set 'stdlb'; known: stdlib, .*; did you mean 'stdlib'"),
        ({"data": "notes.pdf"}, r"unknown data set 'notes.pdf'; known: .*a file \(.txt, .jsonl, .parquet\)"),
        ({"pattern": "unstructurd"}, "unknown pattern 'unstructurd'; .*; did you mean 'unstructured'"),
        ({"pattern": "4:2"}, "unknown pattern '4:2'; known: .*0 < N < M"),
        ({"removed": "zero"}, "unknown removed 'zero'; known: memoryless, unit"),
        ({"budget": "modl"}, "unknown budget 'modl'; known: layer, model; did you mean 'model'"),
        ({"sparsty": 0.5}, "unknown recipe field 'sparsty'; known: model, .*; did you mean 'sparsity'"),
        ({"samples": 0}, "samples is 0; input should be greater than or equal to 1"),
        ({"length": 1}, "length is 1; input should be greater than or equal to 2"),
        ({"seed": -1}, "seed is -1; input should be greater than or equal to 0"),
        ({"method": "sparsessm", "time_weights": "pow:1"}, "time_weights is 'pow:1'; allowed: uniform"),
        ({"method": "magnitude", "time_weights": "linear"}, "time_weights has no effect with .*: sparsessm"),
        (
            {"method": "sparsessm", "diagonal": True},
            "diagonal has no effect with method 'sparsessm'.*: exact",
        ),
        ({"pattern": "2:4", "sparsity": 0.25}, "sparsity is 0.25, but pattern '2:4' .* is sparsity 0.5"),
        (
            {"pattern": "1:4", "sparsity": 0.25},
            "sparsity is 0.25, but .* keeps 1 of 4, which is sparsity 0.75",
        ),
        ({"pattern": "2:4", "budget": "model"}, "budget 'model' has no effect with pattern '2:4'"),
    ],
)
def test_a_bad_field_is_refused_in_one_line(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}") as caught:
        Recipe(**fields)
    assert "\n" not in str(caught.value)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ValueError, match="^samples is 0; .*; seed is -1; "):
        Recipe(samples=0, seed=-1)


def test_n_of_m_counts_the_kept() -> None:
    recipe = Recipe(pattern="1:4", sparsity=0.75).resolved(model="m", states=8, trained_length=None)
    assert (recipe.pattern, recipe.sparsity) == ("1:4", 0.75)


def test_what_depends_on_the_model_is_filled_in() -> None:
    facts: dict[str, Any] = {"model": "m", "states": 16}
    recipe = Recipe().resolved(trained_length=512, **facts)
    assert (recipe.model, recipe.sparsity, recipe.length) == ("m", 0.5, 512)
    assert Recipe(pattern="3:4").resolved(trained_length=None, **facts).sparsity == 0.25
    assert Recipe(length=100, sparsity=0.0).resolved(trained_length=50, **facts).length == 100
    assert recipe.resolved(trained_length=9, **facts) == recipe  # what is said stays
    assert [window_length(n) for n in (None, 512, 4096)] == [2048, 512, 2048]


def test_a_group_must_divide_the_states() -> None:
    with pytest.raises(
        ValueError, match="pattern '2:5': groups of 5 .* d_state of 16; allowed M: 2, 4, 8, 16$"
    ):
        Recipe(pattern="2:5").resolved(model="m", states=16, trained_length=None)


@settings(max_examples=50, deadline=None)
@given(
    method=st.sampled_from(sorted(METHODS)),
    pattern=st.sampled_from(["unstructured", "2:4", "15:16", "1:59"]),
    sparsity=st.floats(0, 0.999),
    removed=st.sampled_from(["memoryless", "unit"]),
    data=st.sampled_from(["stdlib", "wikitext2", "Übung: 1.txt", "null.txt", "1e3.jsonl"]),
    length=st.none() | st.integers(2, 4096),
    seed=st.integers(0, 2**63 - 1),
)
def test_yaml_there_and_back(tmp_path_factory: pytest.TempPathFactory, **fields: Any) -> None:
    if fields["pattern"] != "unstructured":
        del fields["sparsity"]
    recipe = Recipe(**fields)
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    text = yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
    assert Recipe.load(path) == recipe


def test_a_pattern_in_yaml_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "pattern: 2:4\nmodel: null\nsamples: 8\ndiagonal: yes\n"
    )  # YAML 1.1 would read 2:4 as 124
    assert Recipe.load(path) == Recipe(pattern="2:4", samples=8, diagonal=True)


def test_the_record_of_a_result_is_a_recipe(tmp_path: Path) -> None:
    recipe = Recipe(method="sparsessm", time_weights="discount:0.5", model="m", sparsity=0.25)
    (tmp_path / "pruning.json").write_text(
        json.dumps({"format": 1, "recipe": recipe.model_dump(), "targets": []})
    )
    assert Recipe.load(tmp_path / "pruning.json") == recipe == Recipe.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "expected lines of the form 'field: value'"),
        ("", "expected lines of the form 'field: value'"),
        ("method: [exact\n", "while parsing"),
        ("sparsity: 2\n", "sparsity is 2; allowed"),
        ("metod: exact\n", "unknown recipe field 'metod'; .*did you mean 'method'"),
        ("samples: many\n", "samples is 'many'; input should be a valid integer"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"recipe .*recipe.yaml: .*{words}") as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_dense_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent.yaml: no such file"):
        Recipe.load(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="pruning.json: no such file"):
        Recipe.load(tmp_path)


def test_idle_options_are_not_written() -> None:
    for name, method in METHODS.items():
        written = Recipe(method=name).model_dump()
        assert {field for field in ("diagonal", "time_weights") if field in written} == set(method.options)
        assert Recipe(**written) == Recipe(method=name)


def test_the_budget_is_not_written_with_a_pattern_that_fixes_it() -> None:
    assert "budget" not in result(pattern="2:4").model_dump()
    assert result(pattern="2:4").resolved(model="m", states=8, trained_length=None).budget == "layer"
    assert result(budget="model").model_dump()["budget"] == "model"


def test_updated_replaces_and_checks_as_a_whole() -> None:
    recipe = Recipe(pattern="2:4", samples=3)
    assert recipe.updated(samples=5) == Recipe(pattern="2:4", samples=5)
    assert (
        recipe.updated(method="magnitude").method == "magnitude"
    )  # defaults never given do not stand in the way
    with pytest.raises(ValueError, match="sparsity is 0.9, but pattern '2:4'"):
        recipe.updated(sparsity=0.9)
    with pytest.raises(ValueError, match="frozen"):
        recipe.samples = 4  # pyright: ignore[reportAttributeAccessIssue]


def result(**fields: Any) -> Recipe:
    """The recipe as a result carries it: every field is said."""
    recipe = Recipe(**fields).resolved(model="m", states=8, trained_length=None)
    return Recipe(**recipe.model_dump())


@pytest.mark.parametrize("old", sorted(METHODS))
@pytest.mark.parametrize("new", sorted(METHODS))
def test_another_method_replaces_that_of_a_result(old: str, new: str) -> None:
    assert result(method=old).updated(method=new) == result(method=new)


def test_what_the_new_method_does_not_read_is_dropped_only_if_it_was_not_given_now() -> None:
    full = result(method="exact", diagonal=True)
    assert full.updated(seed=1).diagonal
    assert full.updated(method="exact").diagonal
    with pytest.raises(ValueError, match="diagonal has no effect with method 'magnitude'"):
        full.updated(method="magnitude", diagonal=True)
    with pytest.raises(ValueError, match="diagonal has no effect with method 'magnitude'"):
        result(method="magnitude").updated(diagonal=True)
    with pytest.raises(ValueError, match="unknown method 'magnitud'"):
        full.updated(method="magnitud")


def test_another_pattern_brings_its_own_sparsity_and_budget() -> None:
    for budget in ("layer", "model"):
        full = result(budget=budget, sparsity=0.3)
        changed = full.updated(pattern="1:4").resolved(model="m", states=8, trained_length=None)
        assert (changed.pattern, changed.sparsity, changed.budget) == ("1:4", 0.75, "layer")
        assert full.updated(pattern="unstructured") == full
        with pytest.raises(ValueError, match="sparsity is 0.3, but pattern '1:4'"):
            full.updated(pattern="1:4", sparsity=0.3)
    full = result(pattern="1:4")
    assert full.updated(pattern="3:4").resolved(model="m", states=8, trained_length=None).sparsity == 0.25
    assert full.updated(pattern="unstructured", sparsity=0.1, budget="model").sparsity == 0.1
    assert full.updated(pattern="unstructured").sparsity is None
    with pytest.raises(ValueError, match="sparsity is 0.9, but pattern '1:4'"):
        full.updated(sparsity=0.9)
    with pytest.raises(ValueError, match="budget 'model' has no effect with pattern '1:4'"):
        full.updated(budget="model")
    with pytest.raises(ValueError, match="budget 'model' has no effect with pattern '2:4'"):
        full.updated(pattern="2:4", budget="model")


def test_removed_values_are_those_of_the_architectures() -> None:
    assert set(get_args(Recipe.model_fields["removed"].annotation)) == set(REMOVED_A_LOG)


def test_the_page_about_recipes_lists_every_field_and_its_example_loads(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs/recipe.md").read_text(encoding="utf-8")
    for name, field in Recipe.model_fields.items():
        default = "" if field.default is None else f"`{str(field.default).lower()}`"
        assert f"| `{name}` | {default} | {field.description} |" in page
    (tmp_path / "recipe.yaml").write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    assert Recipe.load(tmp_path / "recipe.yaml").pattern == "2:4"
