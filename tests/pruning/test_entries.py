"""pruning/entries.py: shares, determinism, order, what is written where, and what the loop refuses."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from pico import pico_mamba
from planned import prune
from runs import FEW, KINDS, LAYER, LINEAR, METHODS, SSM, TOKENS, changed, run, run_ssm, tensors, uneven

from sparsessm.architectures import adapt
from sparsessm.data.texts import fingerprint
from sparsessm.pruning import make_plan
from sparsessm.recipe.recipe import Recipe


@pytest.mark.parametrize("method", SSM)
@pytest.mark.parametrize("allocation", ["uniform", "loss"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_the_requested_share_is_removed(method: str, allocation: str, sparsity: float) -> None:
    model = pico_mamba(num_hidden_layers=3)
    before = [layer.mixer.A_log.detach().clone() for layer in model.backbone.layers]
    report = run_ssm(model, method=method, allocation=allocation, sparsity=sparsity)
    changed = [
        int((layer.mixer.A_log != dense).sum())
        for layer, dense in zip(model.backbone.layers, before, strict=True)
    ]
    assert [row.pruned for row in report.rows] == changed
    assert abs(sum(changed) - sparsity * 3 * 256) <= 1.5
    if allocation == "uniform":
        assert len(set(changed)) == 1


def combinations() -> list[dict[str, str]]:
    """Every method with every repair, weight and allocation that it reads."""
    found = []
    values = {
        "repair": ("none", "self", "dense-target:0.5"),
        "price": ("none", "fisher", "norms"),
        "allocation": ("uniform", "hessian-trace", "owl", "loss:0.2"),
    }
    for name, method in METHODS.items():
        if "grid" in method.defaults:  # what is rounded may become zero: test_bits.py
            continue
        options = [option for option in values if option in method.defaults]
        for chosen in product(*(values[option] for option in options)):
            fields = {"method": name, **dict(zip(options, chosen, strict=True))}
            found.append(fields)
    return found


@pytest.mark.parametrize("fields", combinations(), ids=lambda fields: "-".join(fields.values()))
def test_every_combination_removes_what_was_asked_for(fields: dict[str, str]) -> None:
    model = pico_mamba()
    before = tensors(model)
    report = run(model, FEW, **fields, sparsity=0.4)
    for row in report.rows:
        now = model.state_dict()[row.target]
        assert row.pruned == int((now == (38.0 if row.family == "ssm" else 0.0)).sum()), row.target
    for family, total in report.totals.items():
        rows = [row for row in report.rows if row.family == family]
        rounding = 0.5 * len(rows) + 1
        if METHODS[rows[0].method].by_row:
            rounding = sum(before[row.target].shape[0] / 2 for row in rows)
        assert abs(total["pruned"] - 0.4 * total["entries"]) <= max(1e-3 * total["entries"], rounding)
    assert {row.target for row in report.rows} == {
        LAYER.format(layer, kind) for layer in range(2) for kind in [f"{k}.weight" for k in KINDS] + ["A_log"]
    }
    skips = {name for row in report.rows for name in row.repaired}
    assert changed(before, model) <= {row.target for row in report.rows} | skips
    linear = [row for row in report.rows if row.method == fields["method"] and row.family == "projections"]
    for row in linear:
        told = {"repair": row.repair, "price": row.price, "allocation": row.allocation}
        defaults = {"hessian-trace": "hessian-trace:0.04", "owl": "owl:0.08"}
        for option in told.keys() & fields.keys():
            assert told[option] == defaults.get(fields[option], fields[option])


def test_one_threshold_over_all_layers() -> None:
    """For magnitude the scores do not depend on the data: the model's smallest |A_log| must be exactly those
    removed."""
    model = pico_mamba()
    dense = torch.stack([layer.mixer.A_log.detach().clone() for layer in model.backbone.layers])
    run_ssm(model, method="magnitude", allocation="loss", sparsity=0.4)
    after = torch.stack([layer.mixer.A_log.detach() for layer in model.backbone.layers])
    removed = after != dense
    assert dense.abs()[removed].max() <= dense.abs()[~removed].min()
    assert removed[0].sum() != removed[1].sum()


def test_one_threshold_lowers_the_total_error() -> None:
    """`exact` scores are in the same unit in every layer, so moving the budget between layers must pay."""
    layer, model = (
        sum(row.error or 0 for row in run_ssm(uneven(), allocation=name).rows) for name in ("uniform", "loss")
    )
    assert model < layer


def test_a_clip_keeps_the_shares_near() -> None:
    for clip in (0.05, 0.2):
        rows = run(uneven(), target="projections", method="magnitude", allocation=f"loss:{clip}").rows
        shares = [row.sparsity for row in rows]
        assert 0.5 - clip - 0.02 <= min(shares) < max(shares) <= 0.5 + clip + 0.02
        assert max(shares) - min(shares) > clip


@pytest.mark.parametrize("method", METHODS)
def test_the_same_recipe_gives_the_same_bits(method: str) -> None:
    one, other = pico_mamba(), pico_mamba()
    run(one, method=method), run(other, method=method)
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("removed,value", [("memoryless", 38.0), ("unit", 0.0)])
def test_only_a_log_and_d_change(removed: str, value: float) -> None:
    model, dense = pico_mamba(), pico_mamba()
    run_ssm(model, removed=removed)
    for (name, a), (_, b) in zip(model.state_dict().items(), dense.state_dict().items(), strict=True):
        if name.endswith(".A_log"):
            assert (a[a != b] == value).all() and (a != b).sum() == 128
        elif name.endswith(".D"):
            assert not torch.equal(a, b)
        else:
            assert torch.equal(a, b), name
    diagonal = pico_mamba()
    run_ssm(diagonal, removed=removed, diagonal=True)
    assert torch.equal(diagonal.backbone.layers[0].mixer.D, dense.backbone.layers[0].mixer.D)


def test_methods_without_data_need_none() -> None:
    def needed(**fields: Any) -> bool:
        recipe = Recipe(**fields).resolved(model="m", trained_length=None)
        return make_plan(recipe, adapt(pico_mamba())).looks

    assert [name for name in SSM if not needed(target="ssm", method=name)] == ["random", "magnitude"]
    assert [name for name in LINEAR if not needed(target="projections", method=name)] == [
        "random",
        "magnitude",
        "rtn",
    ]
    assert not needed(method="magnitude", allocation="loss")
    assert needed(method="magnitude", allocation="owl") and needed(
        method="magnitude", allocation="hessian-trace"
    )
    report = run(pico_mamba(), None, method="magnitude")
    assert report.fingerprint == ""
    for fields, words in (
        ({"target": "ssm"}, "method 'exact' needs calibration windows, but none were given"),
        ({}, "method 'absorb' and method 'exact' needs calibration windows"),
        ({"method": "wanda", "ignore": ["A_log"]}, "method 'wanda' needs calibration windows"),
        (
            {"method": "magnitude", "allocation": "owl"},
            "^allocation 'owl' needs calibration windows, but none were given",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            run(pico_mamba(), None, **fields)


def test_report_says_what_happened() -> None:
    report = run_ssm(pico_mamba())
    assert report.fingerprint == fingerprint(TOKENS)
    row = report.rows[1]
    assert (row.target, row.layer, row.family) == ("backbone.layers.1.mixer.A_log", 1, "ssm")
    assert (row.total, row.pruned) == (256, 128)
    assert row.repaired == ("backbone.layers.1.mixer.D",)
    assert (row.repair, row.price, row.allocation, row.damping) == ("none", "none", "uniform", None)
    assert run_ssm(pico_mamba(), diagonal=True).rows[0].repaired == ()
    assert report.recipe["sparsity"] == 0.5 and report.recipe["length"] == 40


def test_more_damping_is_reported() -> None:
    """Twice the same input: the Hessian is singular, and with no damping at all cannot be factored."""
    model = pico_mamba()
    with torch.no_grad():
        model.backbone.embeddings.weight[:, 8:] = 0
    report = run(model, target="projections", method="sparsegpt")  # half of the inputs of in_proj are dead
    first = report.rows[0]
    assert first.damping == 0.01 and first.pruned >= 512  # dead inputs need no more damping
    assert (model.state_dict()[first.target][:, 8:] == 0).all()


def test_what_is_not_a_number_is_refused_by_name() -> None:
    model = pico_mamba()
    with torch.no_grad():
        model.backbone.layers[1].mixer.A_log[3, 2] = torch.nan
    for fields in ({"method": "magnitude"}, {}, {"method": "magnitude", "allocation": "loss"}):
        with pytest.raises(ValueError, match="backbone.layers.1"):
            run_ssm(model, **fields)
    for name in ("in_proj", "out_proj"):
        for method, share in product(
            ("magnitude", "wanda", "sparsegpt", "absorb"), ("uniform", "loss", "owl")
        ):
            model = pico_mamba()
            with torch.no_grad():
                getattr(model.backbone.layers[1].mixer, name).weight[3, 2] = torch.nan
            with pytest.raises(ValueError, match="backbone.layers.1"):
                run(model, target="projections", method=method, allocation=share, price=None)


def test_unresolved_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match="call Recipe.resolved first"):
        prune(adapt(pico_mamba()), Recipe(), TOKENS)


@pytest.mark.parametrize("method", SSM)
@pytest.mark.parametrize("removed", ["memoryless", "unit"])
def test_what_was_removed_before_is_removed_first(method: str, removed: str) -> None:
    """Pruning twice: the second mask contains the first, and the report counts what is there."""
    model = pico_mamba()
    run_ssm(model, method="random", removed=removed, sparsity=0.3)
    first = [layer.mixer.A_log.detach().clone() for layer in model.backbone.layers]
    report = run_ssm(model, method=method, removed=removed, sparsity=0.5)
    value = {"memoryless": 38.0, "unit": 0.0}[removed]
    for row, before, layer in zip(report.rows, first, model.backbone.layers, strict=True):
        after = layer.mixer.A_log.detach()
        assert (after[before == value] == value).all()
        assert row.pruned == int((after == value).sum()) == 128


def test_seeds_of_layers_do_not_repeat() -> None:
    """Layer 1 of seed 0 must not draw what layer 0 of seed 1 draws."""
    one, other = pico_mamba(), pico_mamba()
    run_ssm(one, method="random", seed=0), run_ssm(other, method="random", seed=1)
    masks = [layer.mixer.A_log == 38 for model in (one, other) for layer in model.backbone.layers]
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_a_diagonal_gram_reports_no_error() -> None:
    """Its sum is not the error of the mask, so none is claimed."""
    assert run_ssm(pico_mamba(), diagonal=True).rows[0].error is None


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ignore": ["layer:0"]},
        {"ignore": ["layer:-1"]},
        {"target": "head"},
        {"rules": [{"targets": ["head"]}, {"targets": [LAYER.format(1, "in_proj")]}]},
        {
            "rules": [
                {"targets": ["head"], "method": "magnitude"},
                {"targets": ["ssm"], "method": "sparsessm"},
            ]
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_progress_ends_at_its_total_once(fields: dict[str, Any], tied: bool) -> None:
    told: list[tuple[str, int, int]] = []

    def tell(stage: str, done: int, total: int, block: str) -> None:
        if (stage, done, total) not in told[-1:]:  # once for every place where the work is
            told.append((stage, done, total))

    recipe = Recipe(**fields).resolved(model="pico", trained_length=40)
    prune(adapt(pico_mamba(tie_word_embeddings=tied)), recipe, TOKENS, tell)
    ends = [(stage, done) for stage, done, total in told if done == total]
    assert told[-1][1] == told[-1][2]
    starts = [(stage, done) for stage, done, _ in told if done == 1]
    assert [stage for stage, _ in ends] == [stage for stage, _ in starts]
