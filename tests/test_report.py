"""Report: totals against hand counts, a record that JSON can hold, a card that a hub can read."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import yaml

from sparsessm.report import (
    Report,
    Row,
    checked,
    contents,
    finite,
    kind_of,
    number,
    percent,
    perplexity_table,
    removed_table,
)

MEASURED = {"data": "stdlib", "windows": 4, "length": 8, "bits_per_byte": 1.5, "nll": 2.0}
DENSE = {**MEASURED, "perplexity": 10.0, "low": 9.0, "high": 11.0}
PRUNED = {**MEASURED, "perplexity": 10.5, "low": 9.5, "high": 11.5}


def row(layer: int = 0, **fields: Any) -> Row:
    name = f"backbone.layers.{layer}.mixer.A_log"
    facts: dict[str, Any] = {"family": "ssm", "method": "exact", "pattern": "2:4", "removed": "memoryless"}
    return Row(**{"target": name, "layer": layer, "total": 100, "pruned": 40, **facts, **fields})


def report(*rows: Row, **fields: Any) -> Report:
    recipe = {"model": "m", "method": "exact", "sparsity": 0.4, "tokenizer": None}
    return Report(
        **{"recipe": recipe, "rows": list(rows), "fingerprint": "ab" * 32, "seconds": 1.23456, **fields}
    )


def test_totals_count_entries_and_average_relative_errors() -> None:
    rows = (row(0, error=1.0, signal=4.0), row(1, total=300, pruned=0), row(2, error=3.0, signal=4.0))
    totals = report(*rows).totals["ssm"]
    assert totals == {"tensors": 3, "entries": 500, "pruned": 80, "sparsity": 0.16, "error": 0.5}
    assert report(row()).totals["ssm"]["error"] is None  # not known is not zero
    assert report().totals == {}


def test_totals_keep_families_apart() -> None:
    totals = report(row(), row(family="projections", total=10, pruned=1)).totals
    assert {family: total["sparsity"] for family, total in totals.items()} == {"ssm": 0.4, "projections": 0.1}


def test_the_record_is_strict_json_even_for_a_ruined_model() -> None:
    ruined = {"dense": DENSE, "pruned": {**PRUNED, "perplexity": math.inf, "window_nll": (math.nan, 1.0)}}
    made = report(row(score={"min": -math.inf, "max": 1.0}), perplexity=ruined, sizes={"A_log": 8})
    record = json.loads(json.dumps(made.record(), allow_nan=False))
    assert record["perplexity"]["pruned"]["perplexity"] is None
    assert record["perplexity"]["pruned"]["window_nll"] == [None, 1.0]
    assert record["targets"][0]["score"] == {"min": None, "max": 1.0}
    assert record["targets"][0]["sparsity"] == 0.4
    assert record["recipe"] == made.recipe
    assert record["calibration"] == {"sha256": "ab" * 32}
    assert record["versions"]["torch"] == torch.__version__
    assert record["bytes"] == {"A_log": 8}


def test_what_cannot_be_repeated_is_said() -> None:
    assert report(row()).record()["pruned_before"] is False
    assert "The same recipe gives the same masks" in report(row()).card("m")
    again = report(row(), pruned_before=True)
    assert again.record()["pruned_before"] is True
    assert "had been pruned before" in again.card("m")
    assert "the same masks" not in again.card("m")


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
    figures = {"dense": {**DENSE, "data": measured}, "pruned": {**PRUNED, "data": measured}}
    made = report(row(), fingerprint=fingerprint, recipe={"data": data})
    made.perplexity = figures if measured else {}
    assert bool(made.caveat()) == said
    assert ("my.txt is one file without a held-out part" in made.card("m")) == said


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_of_a_hub_model() -> None:
    made = report(
        row(repaired=("backbone.layers.0.mixer.D",)),
        sizes={"in_proj": 950, "A_log": 50},
        perplexity={
            "dense": DENSE,
            "pruned": PRUNED,
            "difference": {"mean": 0.05, "low": 0.04, "high": -1e-9},
        },
    )
    card = made.card("org/mamba", base_model="org/mamba")
    front = front_matter(card)
    assert front["base_model"] == "org/mamba"
    assert front["library_name"] == "transformers"
    assert set(front["tags"]) >= {"mamba", "pruning", "sparse"}
    assert "# mamba, pruned" in card
    assert "| ssm | 1 | 100 | 40 | 40.00 % | - |" in card
    assert "Changed to make up for it, in the layers of the targets: `D`." in card
    assert "| dense | 10.00 (9.00 to 11.00) | 1.5000 |  |" in card
    assert "| pruned | 10.50 (9.50 to 11.50) | 1.5000 | +5.00 (+4.00 to +0.00) |" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "`A_log` is 5 % of the bytes of this model." in card
    assert "neither the file smaller nor the model faster" in card
    assert (
        "tokenizer" not in card.split("## What it cost")[0].split("## How it was made")[1]
    )  # None says nothing


def test_the_card_of_a_local_model_says_what_is_not_known() -> None:
    card = report(row(removed="unit"), fingerprint="").card("dir/mine/", format="state-spaces")
    assert {"base_model", "library_name"} & front_matter(card).keys() == set()
    assert "# mine, pruned" in card
    assert "The perplexity was not measured." in card
    assert "`none were needed`" in card
    assert "stored as `A_log` = 0" in card
    assert "MambaLMHeadModel" in card
    assert "% of the bytes" not in card


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.mixer.A_log", "A_log"),
        ("a.in_proj.weight", "in_proj"),
        ("a.conv1d.bias", "conv1d"),
        ("weight", "weight"),
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
    columns, cells = removed_table(record["targets"], record["totals"])
    assert {len(line) for line in cells} == {len(columns)}
    assert [line[-1] for line in cells] == ["1.25e-01", "-", "1.25e-01"]
    single = {**DENSE, "low": None, "high": None}  # a single window has no interval
    columns, cells = perplexity_table(
        {"a": single, "b": PRUNED}, {"b": {"mean": 0.05, "low": None, "high": None}}
    )
    assert {len(line) for line in cells} == {len(columns)}
    assert cells[0] == ["a", "10.00 (- to -)", "1.5000", ""]
    assert cells[1][-1] == "+5.00 (- to -)"


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
        {"format": 1, "targets": [], "totals": None, "recipe": {}},
        {"format": 1, "targets": [], "totals": {}, "recipe": None},
    ],
)
def test_what_is_no_record_is_refused_by_path(record: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^dir/pruning.json: (record format|not a record)"):
        checked(record, "dir/pruning.json")
    assert checked(None, "dir/pruning.json") is None
