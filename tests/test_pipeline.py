"""pipeline.py: budgets, determinism, what is written where, and what the loop refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pico import pico_mamba
from torch import Tensor

from sparsessm.architectures import adapt
from sparsessm.data import fingerprint
from sparsessm.methods import METHODS
from sparsessm.pipeline import needs_data, prune
from sparsessm.recipe import Recipe
from sparsessm.report import Report

TOKENS = torch.randint(0, 64, (4, 40), generator=torch.Generator().manual_seed(0))


def run(
    model: Any, tokens: Tensor | None = TOKENS, stored: dict[str, torch.dtype] | None = None, **fields: Any
) -> Report:
    fields = {"budget": "layer"} | fields
    recipe = Recipe(**fields).resolved(model="pico", states=8, trained_length=40)
    return prune(adapt(model, stored), recipe, tokens)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["layer", "model"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_the_requested_share_is_removed(method: str, budget: str, sparsity: float) -> None:
    model = pico_mamba(num_hidden_layers=3)
    before = [layer.mixer.A_log.detach().clone() for layer in model.backbone.layers]
    report = run(model, method=method, budget=budget, sparsity=sparsity)
    changed = [
        int((layer.mixer.A_log != dense).sum())
        for layer, dense in zip(model.backbone.layers, before, strict=True)
    ]
    assert [row.pruned for row in report.rows] == changed
    assert abs(sum(changed) - sparsity * 3 * 256) <= 1.5
    if budget == "layer":
        assert len(set(changed)) == 1


def test_one_budget_over_all_layers_is_one_threshold() -> None:
    """For magnitude the scores do not depend on the data: the model's smallest |A_log| must be exactly those
    removed."""
    model = pico_mamba()
    dense = torch.stack([layer.mixer.A_log.detach().clone() for layer in model.backbone.layers])
    run(model, method="magnitude", budget="model", sparsity=0.4)
    after = torch.stack([layer.mixer.A_log.detach() for layer in model.backbone.layers])
    removed = after != dense
    assert dense.abs()[removed].max() <= dense.abs()[~removed].min()
    assert removed[0].sum() != removed[1].sum()


def test_one_budget_lowers_the_total_error() -> None:
    """`exact` scores are in the same unit in every layer, so moving the budget between layers must pay."""
    layer, model = (sum(row.error or 0 for row in run(_uneven(), budget=b).rows) for b in ("layer", "model"))
    assert model < layer


def _uneven() -> Any:
    model = pico_mamba()
    with torch.no_grad():
        model.backbone.layers[1].mixer.out_proj.weight.mul_(20)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_the_same_recipe_gives_the_same_bits(method: str) -> None:
    one, other = pico_mamba(), pico_mamba()
    run(one, method=method), run(other, method=method)
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("removed,value", [("memoryless", 38.0), ("unit", 0.0)])
def test_only_a_log_and_d_change(removed: str, value: float) -> None:
    model, dense = pico_mamba(), pico_mamba()
    run(model, removed=removed)
    for (name, a), (_, b) in zip(model.state_dict().items(), dense.state_dict().items(), strict=True):
        if name.endswith(".A_log"):
            assert (a[a != b] == value).all() and (a != b).sum() == 128
        elif name.endswith(".D"):
            assert not torch.equal(a, b)
        else:
            assert torch.equal(a, b), name
    diagonal = pico_mamba()
    run(diagonal, removed=removed, diagonal=True)
    assert torch.equal(diagonal.backbone.layers[0].mixer.D, dense.backbone.layers[0].mixer.D)


def test_values_are_rounded_to_the_stored_dtype() -> None:
    model = pico_mamba()
    run(model, stored={f"backbone.layers.{i}.mixer.D": torch.bfloat16 for i in range(2)})
    skip = model.backbone.layers[0].mixer.D.detach()
    assert torch.equal(skip, skip.bfloat16().float())


def test_methods_without_data_need_none() -> None:
    assert [name for name in METHODS if not needs_data(Recipe(method=name))] == ["random", "magnitude"]
    report = run(pico_mamba(), None, method="magnitude")
    assert report.fingerprint == ""
    with pytest.raises(ValueError, match="method 'exact' needs calibration windows"):
        run(pico_mamba(), None)


def test_report_says_what_happened() -> None:
    report = run(pico_mamba())
    assert report.fingerprint == fingerprint(TOKENS)
    row = report.rows[1]
    assert (row.target, row.layer, row.family) == ("backbone.layers.1.mixer.A_log", 1, "ssm")
    assert (row.total, row.pruned) == (256, 128)
    assert row.repaired == ("backbone.layers.1.mixer.D",)
    assert run(pico_mamba(), diagonal=True).rows[0].repaired == ()
    assert row.score["min"] <= row.score["median"] <= row.score["max"]
    assert report.recipe["sparsity"] == 0.5 and report.recipe["length"] == 40


def test_not_a_number_is_refused_by_name() -> None:
    model = pico_mamba()
    with torch.no_grad():
        model.backbone.layers[1].mixer.A_log[3, 2] = torch.nan
    with pytest.raises(ValueError, match="backbone.layers.1"):
        run(model, method="magnitude")
    with pytest.raises(ValueError, match="backbone.layers.1"):
        run(model)


def test_unresolved_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="call Recipe.resolved first"):
        prune(adapt(pico_mamba()), Recipe(), TOKENS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("removed", ["memoryless", "unit"])
def test_what_was_removed_before_is_removed_first(method: str, removed: str) -> None:
    """Pruning twice: the second mask contains the first, and the report counts what is there."""
    model = pico_mamba()
    run(model, method="random", removed=removed, sparsity=0.3)
    first = [layer.mixer.A_log.detach().clone() for layer in model.backbone.layers]
    report = run(model, method=method, removed=removed, sparsity=0.5, budget="layer")
    value = {"memoryless": 38.0, "unit": 0.0}[removed]
    for row, before, layer in zip(report.rows, first, model.backbone.layers, strict=True):
        after = layer.mixer.A_log.detach()
        assert (after[before == value] == value).all()
        assert row.pruned == int((after == value).sum()) == 128


def test_seeds_of_layers_do_not_repeat() -> None:
    """Layer 1 of seed 0 must not draw what layer 0 of seed 1 draws."""
    one, other = pico_mamba(), pico_mamba()
    run(one, method="random", seed=0), run(other, method="random", seed=1)
    masks = [layer.mixer.A_log == 38 for model in (one, other) for layer in model.backbone.layers]
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_a_diagonal_gram_reports_no_error() -> None:
    """Its sum is not the error of the mask, so none is claimed."""
    assert run(pico_mamba(), diagonal=True).rows[0].error is None
