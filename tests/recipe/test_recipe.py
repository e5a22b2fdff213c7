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
from sparsessm.methods import DEFAULTS, entry_methods
from sparsessm.recipe.recipe import Recipe, RuleFields, window_length

METHODS = entry_methods()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sparsity": 1.0}, "sparsity is 1; allowed: 0 <= sparsity < 1"),
        ({"sparsity": -0.1}, "sparsity is -0.1; allowed: 0 <= sparsity < 1"),
        ({"sparsity": float("nan")}, "sparsity is nan; allowed: 0 <= sparsity < 1"),
        ({"sparsity": "half"}, "sparsity is 'half'; input should be a valid number"),
        ({"method": "exat"}, "unknown method 'exat'; known: random, magnitude, .*; did you mean 'exact'"),
        (
            {"target": "smm"},
            "unknown target 'smm'; known: all, matrices, projections, .*, embedding; did you mean 'ssm'",
        ),
        ({"data": "stdlb"}, "unknown data set 'stdlb'; known: stdlib, .*; did you mean 'stdlib'"),
        (
            {"data": "notes.pdf"},
            r"unknown data set 'notes.pdf'; known: .*a file \(.txt, .*\), or a directory",
        ),
        ({"pattern": "unstructurd"}, "unknown pattern 'unstructurd'; .*; did you mean 'unstructured'"),
        ({"pattern": "4:2"}, "unknown pattern '4:2'; known: .*0 < N < M"),
        ({"removed": "zero"}, "unknown removed 'zero'; known: memoryless, unit"),
        (
            {"allocation": "los"},
            "unknown allocation 'los'; known: uniform, hessian-trace, owl, loss; did you mean 'loss'",
        ),
        ({"allocation": "owl:2"}, r"allocation is 'owl:2'; allowed: .*owl\[:LAMBDA\].*from 0 to 1"),
        ({"allocation": "uniform:0.1"}, "allocation is 'uniform:0.1'; allowed"),
        ({"repair": "slef"}, "unknown repair 'slef'; known: none, self, dense-target; did you mean 'self'"),
        ({"repair": "dense-target:1.5"}, r"repair is 'dense-target:1.5'; allowed: none, self, .* 0 to 1"),
        ({"repair": "self:0.5"}, "repair is 'self:0.5'; allowed: none, self, dense-target"),
        (
            {"price": "fischer"},
            "unknown price 'fischer'; known: none, fisher, norms; did you mean 'fisher'",
        ),
        ({"budget": "layer"}, "unknown recipe field 'budget'; known: .*allocation"),
        ({"sparsty": 0.5}, "unknown recipe field 'sparsty'; known: .*model, .*; did you mean 'sparsity'"),
        ({"samples": 0}, "samples is 0; allowed: a number from 1 to 100000, or auto"),
        ({"samples": "many"}, "samples is 'many'; allowed: a number from 1 to 100000, or auto$"),
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
        ({"pattern": "2:4", "allocation": "loss"}, "allocation 'loss' has no effect with pattern '2:4'"),
        (
            {"method": "wanda", "repair": "self"},
            "repair has no effect with .*'wanda'; .*: gptq, sparsegpt, absorb",
        ),
        ({"method": "magnitude", "price": "fisher"}, "price has no effect with method 'magnitude'; it"),
        ({"target": "ssm", "repair": "self"}, "repair has no effect with method 'exact'; it belongs to"),
        (
            {"target": "projections", "method": "exact"},
            "method 'exact' does not prune target 'projections'; it prunes: ssm",
        ),
        (
            {"target": "ssm", "method": "wanda"},
            "method 'wanda' does not prune target 'ssm'; it prunes: projections, head",
        ),
        (
            {"target": "ssm", "allocation": "owl"},
            "allocation 'owl' has no effect on target 'ssm'; it belongs to: projections",
        ),
        (
            {"target": "head", "allocation": "hessian-trace"},
            "allocation 'hessian-trace' has no effect on target 'head'; it belongs to: projections",
        ),
        (
            {"target": "conv1d", "price": "fisher"},
            "price 'fisher' has no effect on target 'conv1d'; it belongs to: ssm, projections, head",
        ),
        (
            {"target": "projections", "removed": "unit"},
            "removed is 'unit'; it has an effect on target 'ssm' only",
        ),
        (
            {"target": "ssm", "rules": [{"targets": ["A_log"]}]},
            "target is 'ssm', but the rules say what is pruned; give only one",
        ),
        ({"rules": [{"pattern": "2:4"}]}, "rule 1: targets is missing"),
        ({"rules": [{"targets": []}]}, "rule 1: targets is .*; tuple should have at least 1 item"),
        (
            {"rules": [{"targets": ["A_log"]}, {"targets": ["in_proj"], "sparsty": 1}]},
            "rule 2: unknown recipe field 'sparsty'; known: .*targets, ignore; did you mean 'sparsity'",
        ),
        ({"rules": [{"targets": ["A_log"], "model": "m"}]}, "rule 1: unknown recipe field 'model'"),
        ({"rules": ["A_log"]}, "rule 1: it is 'A_log'; input should be"),
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
    recipe = Recipe(pattern="1:4", sparsity=0.75).resolved(model="m", trained_length=None)
    assert (recipe.pattern, recipe.sparsity) == ("1:4", 0.75)


def test_what_depends_on_the_model_is_filled_in() -> None:
    facts: dict[str, Any] = {"model": "m"}
    recipe = Recipe().resolved(trained_length=512, **facts)
    assert (recipe.model, recipe.sparsity, recipe.length) == ("m", 0.5, 512)
    assert (recipe.target, recipe.pattern, recipe.removed) == ("all", "unstructured", "memoryless")
    assert (recipe.method, recipe.repair, recipe.price, recipe.allocation) == (None,) * 4  # the method's own
    linear = Recipe(target="projections").resolved(trained_length=None, **facts)
    assert (linear.target, linear.removed) == ("projections", None)
    ruled = Recipe(rules=[{"targets": "A_log"}]).resolved(trained_length=None, **facts)
    assert (ruled.target, ruled.removed) == (None, "memoryless")
    assert Recipe(pattern="3:4").resolved(trained_length=None, **facts).sparsity == 0.25
    assert Recipe(length=100, sparsity=0.0).resolved(trained_length=50, **facts).length == 100
    assert recipe.resolved(trained_length=9, **facts) == recipe  # what is said stays
    assert [window_length(n) for n in (None, 512, 4096)] == [2048, 512, 2048]


@settings(max_examples=50, deadline=None)
@given(
    method=st.sampled_from(sorted(METHODS)),
    pattern=st.sampled_from(["unstructured", "2:4", "15:16", "1:59"]),
    sparsity=st.floats(0, 0.999),
    removed=st.sampled_from(["memoryless", "unit"]),
    data=st.sampled_from(["stdlib", "wikitext2", "Übung: 1.txt", "null.txt", "1e3.jsonl"]),
    length=st.none() | st.integers(2, 4096),
    samples=st.integers(1, 100_000) | st.just("auto"),
    allocation=st.sampled_from([None, "uniform"]),
    ignore=st.lists(
        st.sampled_from(["layer:0", "layer:-1", r"re:.*layers\.[0-3]\..*", "Übung: 1"]), max_size=2
    ),
    rules=st.lists(
        st.fixed_dictionaries(
            {"targets": st.sampled_from(["in_proj", ["A_log", "re:.*"]])},
            optional={
                "pattern": st.just("2:4"),
                "method": st.sampled_from([None, "magnitude"]),
                "ignore": st.just(["layer:0"]),
                "diagonal": st.booleans(),
            },
        ),
        max_size=2,
    ),
    seed=st.integers(0, 2**63 - 1),
)
def test_yaml_there_and_back(tmp_path_factory: pytest.TempPathFactory, **fields: Any) -> None:
    if fields["pattern"] != "unstructured":
        del fields["sparsity"]
    if fields["method"] in ("rtn", "gptq"):  # which leave A_log alone, and `auto` compares masks
        fields |= {"samples": 8, "removed": None}
    recipe = Recipe(**fields)
    assert Recipe(**recipe.model_dump()) == recipe
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
        ("samples: many\n", "samples is 'many'; allowed: a number from 1 to 100000, or auto"),
        ("rules:\n- targets: A_log\n- metod: exact\n", "rule 2: .*unknown recipe field 'metod'"),
        ("rules: 3\n", "rules is '3'; input should be a valid tuple"),
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


def test_rules_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "sparsity: 0.6\nignore: [layer:0, layer:-1]\nrules:\n"
        "- targets: in_proj\n  pattern: 2:4\n  sparsity: null\n"
        "- targets:\n  - A_log\n  - 're:.*x_proj'\n  ignore: layer:1\n  diagonal: no\n"
    )
    first = {"targets": ("in_proj",), "pattern": "2:4"}
    second = {"targets": ("A_log", "re:.*x_proj"), "ignore": ("layer:1",), "diagonal": False}
    recipe = Recipe.load(path)
    assert recipe == Recipe(sparsity=0.6, ignore=["layer:0", "layer:-1"], rules=[first, second])
    assert [rule.model_dump() for rule in recipe.rules] == [first, second]  # what is not said is not written


def test_what_is_not_said_is_not_written() -> None:
    assert Recipe().model_dump() == {"data": "stdlib", "samples": 64, "compute": "auto", "seed": 0}
    values = {"diagonal": True, "time_weights": "linear", "repair": "self", "price": "norms"}
    values |= {"allocation": "owl", "grid": "int3", "bits": 3.5}
    for name, method in METHODS.items():
        target = method.families[0]
        for option in {*method.options, *method.defaults}:
            value = "loss" if option == "allocation" and target == "ssm" else values[option]
            where = "projections" if option in ("grid", "bits") else target
            written = Recipe(method=name, target=where, **{option: value}).model_dump()
            assert written[option] == value
            assert Recipe(**written) == Recipe(method=name, target=where, **{option: value})


def test_no_default_is_idle() -> None:
    """What each method says by default it reads, and every family has a method that knows it."""
    for method in METHODS.values():
        assert set(method.defaults) <= {"repair", "price", "allocation", "grid"}
        for option, value in method.defaults.items():
            assert Recipe(method=method.name, target=method.families[0], **{option: value})
    for family, name in DEFAULTS.items():
        assert family in METHODS[name].families
        assert Recipe(target=family).methods([family]) == {family: METHODS[name]}


def test_the_method_named_counts_where_it_applies() -> None:
    methods = Recipe(method="wanda").methods(["ssm", "projections", "conv1d"])
    assert {family: method.name for family, method in methods.items()} == {
        "ssm": "exact",
        "projections": "wanda",
        "conv1d": "absorb",
    }


def test_the_allocation_is_not_written_with_a_pattern_that_fixes_it() -> None:
    assert "allocation" not in result(pattern="2:4").model_dump()
    assert result(allocation="loss").model_dump()["allocation"] == "loss"


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
    recipe = Recipe(**fields).resolved(model="m", trained_length=None)
    return Recipe(**recipe.model_dump())


@pytest.mark.parametrize("old", sorted(METHODS))
@pytest.mark.parametrize("new", sorted(METHODS))
def test_another_method_replaces_that_of_a_result(old: str, new: str) -> None:
    again = result(method=old).updated(method=new).resolved(model="m", trained_length=None)
    assert again == result(method=new)


def test_what_the_new_method_does_not_read_is_dropped_only_if_it_was_not_given_now() -> None:
    full = result(target="ssm", method="exact", diagonal=True)
    assert full.updated(seed=1).diagonal
    assert full.updated(method="exact").diagonal
    with pytest.raises(ValueError, match="diagonal has no effect with method 'magnitude'"):
        full.updated(method="magnitude", diagonal=True)
    with pytest.raises(ValueError, match="diagonal has no effect with method 'magnitude'"):
        result(method="magnitude").updated(diagonal=True)
    chosen = result(repair="self", price="none", allocation="owl")
    assert chosen.updated(seed=1) == result(repair="self", price="none", allocation="owl", seed=1)
    assert chosen.updated(method="sparsegpt") == result(method="sparsegpt")
    with pytest.raises(ValueError, match="unknown method 'magnitud'"):
        full.updated(method="magnitud")


def test_another_target_keeps_what_has_an_effect_on_it() -> None:
    full = result(removed="unit", diagonal=True, price="fisher", repair="self")
    assert full.updated(target="projections") == result(target="projections", price="fisher", repair="self")
    assert full.updated(target="ssm") == result(target="ssm", removed="unit", diagonal=True, price="fisher")
    assert full.updated(target="conv1d") == result(target="conv1d", repair="self")
    with pytest.raises(ValueError, match="removed is 'unit'; it has an effect on target 'ssm' only"):
        full.updated(target="projections", removed="unit")
    with pytest.raises(ValueError, match="method 'exact' does not prune target 'head'"):
        result(method="exact").updated(target="head")
    with pytest.raises(ValueError, match="unknown target 'sm'"):
        full.updated(target="sm")


def test_rules_and_a_target_replace_each_other() -> None:
    rules = [{"targets": ["A_log"]}]
    assert result(target="ssm").updated(rules=rules).target is None
    assert result(rules=rules).updated(target="ssm") == result(target="ssm")
    assert result(rules=rules).updated(seed=1).rules == result(rules=rules).rules


def test_another_pattern_brings_its_own_sparsity_and_allocation() -> None:
    for allocation in (None, "uniform", "loss"):
        full = result(allocation=allocation, sparsity=0.3)
        changed = full.updated(pattern="1:4").resolved(model="m", trained_length=None)
        assert (changed.pattern, changed.sparsity, changed.allocation) == ("1:4", 0.75, None)
        assert full.updated(pattern="unstructured") == full
        with pytest.raises(ValueError, match="sparsity is 0.3, but pattern '1:4'"):
            full.updated(pattern="1:4", sparsity=0.3)
    full = result(pattern="1:4")
    assert full.updated(pattern="3:4").resolved(model="m", trained_length=None).sparsity == 0.25
    assert full.updated(pattern="unstructured", sparsity=0.1, allocation="loss").sparsity == 0.1
    assert full.updated(pattern="unstructured").sparsity is None
    with pytest.raises(ValueError, match="sparsity is 0.9, but pattern '1:4'"):
        full.updated(sparsity=0.9)
    with pytest.raises(ValueError, match="allocation 'loss' has no effect with pattern '1:4'"):
        full.updated(allocation="loss")
    with pytest.raises(ValueError, match="allocation 'loss' has no effect with pattern '2:4'"):
        full.updated(pattern="2:4", allocation="loss")


def test_removed_values_are_those_of_the_architectures() -> None:
    assert set(get_args(get_args(Recipe.model_fields["removed"].annotation)[0])) == set(REMOVED_A_LOG)


PAGE = (Path(__file__).parents[2] / "docs/recipe.md").read_text(encoding="utf-8")


def test_the_page_about_recipes_lists_every_field() -> None:
    for fields in (Recipe.model_fields, RuleFields.model_fields):
        for name, field in fields.items():
            default = "" if field.default in (None, ()) or field.is_required() else f"`{field.default}`"
            assert f"| `{name}` | {default} | {field.description} |" in PAGE
    assert len(Recipe.model_fields) + len({"targets", "ignore"}) == len(
        [line for line in PAGE.splitlines() if line.startswith("| `") and line.count(" | ") == 2]
    )


def test_the_examples_of_the_page_load(tmp_path: Path) -> None:
    first, second = (text.split("```")[0] for text in PAGE.split("```yaml\n")[1:])
    for text in (first, second):
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        recipe = Recipe.load(tmp_path / "recipe.yaml")
        assert (recipe.model, bool(recipe.rules)) == ("builtin:pycode", text is second)
