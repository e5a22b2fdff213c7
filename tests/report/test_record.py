"""Report: totals against hand counts, a record that JSON can hold, tables that stay readable."""

from __future__ import annotations

import json
import math

import pytest
import torch
from records import DENSE, PRUNED, matrix, report, row

from sparsessm.recipe.recipe import Recipe
from sparsessm.report.card import card
from sparsessm.report.contents import contents
from sparsessm.report.record import (
    checked,
    finite,
    kind_of,
    number,
    percent,
    perplexity_table,
    recipe_table,
    removed_table,
    targets_table,
)


def test_totals_count_entries_and_average_relative_errors() -> None:
    rows = (row(0, error=1.0, signal=4.0), row(1, total=300, pruned=0), row(2, error=3.0, signal=4.0))
    totals = report(*rows).totals["ssm"]
    assert totals == {
        "tensors": 3,
        "entries": 500,
        "pruned": 80,
        "sparsity": 0.16,
        "error": 0.5,
        "bits": None,
    }
    assert report(row()).totals["ssm"]["error"] is None  # not known is not zero
    assert report().totals == {}


def test_totals_keep_families_apart() -> None:
    totals = report(row(), row(family="projections", total=10, pruned=1)).totals
    assert {family: total["sparsity"] for family, total in totals.items()} == {"ssm": 0.4, "projections": 0.1}


def test_the_record_is_strict_json_even_for_a_ruined_model() -> None:
    ruined = {"dense": DENSE, "pruned": {**PRUNED, "perplexity": math.inf, "window_nll": (math.nan, 1.0)}}
    made = report(row(error=math.inf, signal=math.nan), perplexity=ruined, sizes={"A_log": 8})
    record = json.loads(json.dumps(made.record(), allow_nan=False))
    assert record["perplexity"]["pruned"]["perplexity"] is None
    assert record["perplexity"]["pruned"]["window_nll"] == [None, 1.0]
    assert (record["targets"][0]["error"], record["targets"][0]["signal"]) == (None, None)
    assert record["targets"][0]["sparsity"] == 0.4
    assert record["recipe"] == made.recipe
    assert record["calibration"] == {"sha256": "ab" * 32}
    assert record["versions"]["torch"] == torch.__version__
    assert record["bytes"] == {"A_log": 8}


@pytest.mark.parametrize(
    ("data", "measured", "fingerprint", "said"),
    [
        ("my.txt", "my.txt", "ab", True),
        ("my.txt", "other.txt", "ab", False),
        ("my.txt", "my.txt", "", False),  # a method that looks at no text
        ("stdlib", "stdlib", "ab", False),
        ("my.txt", None, "ab", False),
    ],
)
def test_a_file_that_was_calibrated_and_measured_on_is_named(
    data: str, measured: str | None, fingerprint: str, said: bool
) -> None:
    where = {"data": measured, "windows": 16}
    figures = {"dense": DENSE | where, "pruned": PRUNED | where}
    made = report(row(), fingerprint=fingerprint, recipe={"data": data})
    made.perplexity = figures if measured else {}
    assert bool(made.caveat()) == said
    assert ("my.txt has no held-out part" in card(made, "m")) == said


def test_the_sentence_about_bytes_names_the_kinds() -> None:
    sizes = {"in_proj": 600, "out_proj": 300, "A_log": 50, "embeddings": 50}
    assert report(row(), sizes=sizes).honesty().startswith("`A_log` is 5 % of the bytes of this model. ")
    rows = [row(), matrix("in_proj"), matrix("out_proj"), matrix("in_proj", 1)]
    words = report(*rows, sizes=sizes).honesty()
    assert words.startswith("`A_log`, `in_proj` and `out_proj` are 95 % of the bytes of this model. ")
    tied = matrix("", family="head", target="backbone.embeddings.weight")
    assert report(tied, sizes=sizes).honesty().startswith("`embeddings` is 5 % of")
    assert report(tied, sizes={"embeddings": 500, "norm": 1}).honesty().startswith("`embeddings` is 100 % of")
    assert report(*rows).honesty().startswith("Removed entries are stored as ordinary values")


def test_more_damping_than_usual_is_said() -> None:
    usual = [matrix("in_proj", layer, damping=0.01) for layer in range(3)]
    assert report(row(), *usual).damped() == ""
    more = [matrix("x_proj", 0, damping=0.1), matrix("x_proj", 1, damping=10.0)]
    words = report(row(), *usual, *more).damped()
    assert words == (
        "2 of 5 Hessians were singular on the calibration windows and needed more damping than 0.01 of their "
        "mean diagonal, at most 10 (backbone.layers.1.mixer.x_proj.weight)."
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.mixer.A_log", "A_log"),
        ("a.in_proj.weight", "in_proj"),
        ("a.conv1d.bias", "conv1d"),
        ("a.experts.down_proj.3", "down_proj"),
        ("a.shared.q_adapter_list.0.1.weight", "q_adapter_list"),
        ("price", "price"),
        ("7", "7"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_contents_count_what_is_stored_in_its_dtype() -> None:
    tensors = {
        "a.x.weight": torch.zeros(3, 5),
        "b.x.bias": torch.zeros(7),
        "A_log": torch.zeros(2),
        "tied": torch.zeros(9),
    }
    stored = {"A_log": torch.float32, "a.x.weight": torch.bfloat16, "b.x.bias": torch.float32}
    found = contents(tensors, stored)
    assert found == {"x": (3 * 5 * 2 + 7 * 4, {torch.bfloat16, torch.float32}), "A_log": (8, {torch.float32})}
    assert list(found) == ["x", "A_log"]


def test_tables_have_a_cell_for_every_column() -> None:
    record = report(row(error=1.0, signal=8.0), row(1)).record()
    columns, cells = targets_table(record["targets"], record["totals"])
    assert {len(line) for line in cells} == {len(columns)}
    assert [line[-1] for line in cells] == ["1.25e-01", "-", "1.25e-01"]
    single = {**DENSE, "low": None, "high": None}  # a single window has no interval
    columns, cells = perplexity_table(
        {"a": single, "b": PRUNED}, {"b": {"mean": 0.05, "low": None, "high": None}}
    )
    assert {len(line) for line in cells} == {len(columns)}
    assert cells[0] == ["a", "10.00 (- to -)", "1.5000", ""]
    assert cells[1][-1] == "+5.00 (- to -)"


def test_many_targets_are_one_line_a_kind() -> None:
    """24 layers of 5 matrices: 120 rows in the record, 7 lines on the terminal."""
    rows = []
    for layer in range(24):
        for n, kind in enumerate(("in_proj", "x_proj", "dt_proj")):
            rows.append(matrix(kind, layer, pruned=40 + layer, total=100, error=1.0 + n, signal=100.0))
        rows.append(row(layer, pruned=50, method="exact", pattern="unstructured"))
        by = {"method": "wanda", "pattern": "2:4"} if layer in (0, 23) else {}
        rows.append(matrix("out_proj", layer, pruned=50, total=100, **by))
    record = report(*rows).record()
    columns, cells = removed_table(record["targets"], record["totals"])
    assert {len(line) for line in cells} == {len(columns)}
    share = "51.50 %"
    ours = ["24", "1236", "2400", share, "40.00 to 63.00 %"]
    assert cells == [
        ["in_proj", "absorb, unstructured", *ours, "1.00e-02"],
        ["x_proj", "absorb, unstructured", *ours, "2.00e-02"],
        ["dt_proj", "absorb, unstructured", *ours, "3.00e-02"],
        ["out_proj", "wanda, 2:4; absorb, unstructured", "24", "1200", "2400", "50.00 %", "50.00 %", "-"],
        ["all projections", "", "96", "4908", "9600", "51.12 %", "", "2.00e-02"],
        ["A_log", "exact, unstructured", "24", "1200", "2400", "50.00 %", "50.00 %", "-"],
    ]
    assert len(targets_table(record["targets"], record["totals"])[1]) == 120 + 2


def test_an_empty_tensor_has_no_share() -> None:
    record = report(row(total=0, pruned=0)).record()
    assert removed_table(record["targets"], record["totals"])[1][0][4:] == ["0", "0.00 %", "-", "-"][0:4]


def test_a_recipe_is_a_line_a_field_and_a_line_a_rule() -> None:
    recipe = Recipe(
        sparsity=0.5, ignore=["layer:0", "head"], rules=[{"targets": ["in_proj"], "pattern": "2:4"}]
    )
    columns, cells = recipe_table(recipe.model_dump())
    assert columns == ["field", "value"]
    assert ["ignore", "layer:0, head"] in cells
    assert ["rule 1", "pattern: 2:4; targets: in_proj"] in cells
    assert ["sparsity", "0.5"] in cells
    as_read = json.loads(json.dumps(recipe.model_dump()))
    assert recipe_table({**as_read, "tokenizer": None}) == (columns, cells)


def test_numbers() -> None:
    assert [percent(0.5), percent(-1e-9, "+"), percent(math.nan)] == ["50.00 %", "+0.00 %", "-"]
    assert [number(1.25, ".1f"), number(None, ".1f"), number(math.inf, ".1f")] == ["1.2", "-", "-"]
    assert finite({"a": (1.0, math.nan), "b": True, "c": "nan"}) == {"a": [1.0, None], "b": True, "c": "nan"}


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"format": 2},
        {"format": 1},
        {"format": 1, "targets": 3, "totals": {}, "recipe": {}},
        {"format": 1, "targets": [{"target": "x", "removed": "gone"}], "totals": {}, "recipe": {}},
        {
            "format": 1,
            "targets": [{"target": "x", "removed": "zero", "pruned": 1}],
            "totals": {},
            "recipe": {},
        },
        {"format": 1, "targets": [report(row()).record()["targets"][0]], "totals": {}, "recipe": {}},
        {"format": 1, "targets": [], "totals": None, "recipe": {}},
        {"format": 1, "targets": [], "totals": {}, "recipe": None},
    ],
)
def test_what_is_no_record_is_refused_by_path(record: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^dir/pruning.json: (record format|not a pruning record)"):
        checked(record, "dir/pruning.json")
    assert checked(None, "dir/pruning.json") is None
