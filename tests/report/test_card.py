"""The model card: what a hub can read, and what a reader must be told."""

from __future__ import annotations

from typing import Any

import yaml
from records import DENSE, PRUNED, matrix, report, row

from sparsessm.recipe.recipe import Recipe
from sparsessm.report.card import card


def front_matter(page: str) -> dict[str, Any]:
    return yaml.safe_load(page.split("---\n")[1])


def test_what_cannot_be_repeated_is_said() -> None:
    assert report(row()).record()["pruned_before"] is False
    assert "the same recipe gives the same masks" in card(report(row()), "m")
    again = report(row(), pruned_before=True)
    assert again.record()["pruned_before"] is True
    assert "had been pruned before" in card(again, "m")
    assert "the same masks" not in card(again, "m")


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
    page = card(made, "org/mamba", base_model="org/mamba")
    front = front_matter(page)
    assert front["base_model"] == "org/mamba"
    assert front["library_name"] == "transformers"
    assert set(front["tags"]) >= {"mamba", "pruning", "sparse"}
    assert "# mamba, pruned" in page
    assert "| A_log | exact, 2:4 | 1 | 40 | 100 | 40.00 % | 40.00 % | - |" in page
    assert "Also changed in these layers, to repair the error: `D`." in page
    assert "| dense | 10.00 (9.00 to 11.00) | 1.5000 |  |" in page
    assert "| pruned | 10.50 (9.50 to 11.50) | 1.5000 | +5.00 (+4.00 to +0.00) |" in page
    assert "AutoModelForCausalLM.from_pretrained" in page
    assert "`A_log` is 5 % of the bytes of this model." in page
    assert "neither the file smaller nor the model faster" in page
    assert (
        "tokenizer" not in page.split("## What it cost")[0].split("## How it was made")[1]
    )  # None says nothing
    assert "Hessians" not in page


def test_the_card_of_a_local_model_says_what_is_not_known() -> None:
    page = card(report(row(removed="unit"), fingerprint=""), "dir/mine/", format="state-spaces")
    assert {"base_model", "library_name"} & front_matter(page).keys() == set()
    assert "# mine, pruned" in page
    assert "Perplexity was not measured." in page
    assert "`none were needed`" in page
    assert "stored as `A_log` = 0" in page
    assert "MambaLMHeadModel" in page
    assert "% of the bytes" not in page


def test_the_card_of_a_whole_model_is_short_and_tells_families_apart() -> None:
    rows = [part for n in range(24) for part in (matrix("in_proj", n), matrix("x_proj", n), row(n))]
    rows[1] = matrix("x_proj", 0, damping=0.1)
    recipe = Recipe(rules=[{"targets": ["in_proj"], "pattern": "2:4"}, {"targets": ["A_log", "x_proj"]}])
    page = card(report(*rows, recipe=recipe.model_dump()), "m")
    removed = page.split("## What was removed")[1].split("## How it was made")[0]
    assert removed.count("\n| ") == 2 + 4  # head and ruler; in_proj, x_proj, all projections, A_log
    assert "| all projections |  | 48 | 1920 | 4800 | 40.00 % |  | - |" in removed
    assert "A removed entry of `in_proj`, `x_proj` becomes `zero`: the connection is gone" in removed
    assert "A removed entry of `A_log` becomes `memoryless`" in removed
    assert "1 of 1 Hessians were singular" in removed
    assert "| rule 2 | `targets: A_log, x_proj` |" in page
