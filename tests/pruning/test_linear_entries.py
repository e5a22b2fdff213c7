"""Entries of linear layers, of conv1d and of the head: in which order, from which inputs, what repair and
allocations do."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import transcription_linear as papers
from pico import pico_mamba
from runs import KINDS, LAYER, LINEAR, METHODS, changed, inputs_of_layers, run, tensors, uneven

from sparsessm.methods import allocation


def test_one_threshold_over_all_projections_and_none_over_families() -> None:
    model = pico_mamba()
    before = tensors(model)
    report = run(model, method="magnitude", allocation="loss:1", sparsity=0.4)
    linear = [row for row in report.rows if row.family == "projections"]
    gone = {row.target: model.state_dict()[row.target] == 0 for row in linear}
    removed = torch.cat([before[name][mask].abs() for name, mask in gone.items()])
    kept = torch.cat([before[name][~mask].abs() for name, mask in gone.items()])
    assert removed.max() <= kept.min()
    assert len(removed) == round(0.4 * 4224)
    assert len({round(row.sparsity, 2) for row in linear}) > 2
    assert sum(row.pruned for row in report.rows if row.family == "ssm") == round(0.4 * 512)


def test_owl_looks_at_the_dense_model_block_by_block() -> None:
    model = uneven()
    seen, dense = inputs_of_layers(model), tensors(model)
    scores = []
    for layer in range(2):
        names = [LAYER.format(layer, f"{kind}.weight") for kind in KINDS]
        parts = [papers.wanda_score(dense[name].numpy(), seen[name].numpy()).flatten() for name in names]
        scores.append(torch.cat([torch.from_numpy(part) for part in parts]).numpy())
    expected = papers.owl_ratios(scores, allocation.OUTLIER, 0.08, 0.5)
    assert expected[0] != expected[1]
    for row in run(model, target="projections", method="random", allocation="owl").rows:
        assert row.pruned == round(expected[row.layer] * row.total), row.target


def test_hessian_trace_ranks_in_proj_and_out_proj_each_for_itself() -> None:
    model = pico_mamba(num_hidden_layers=3)
    seen = inputs_of_layers(model)
    rows = run(
        model, target="projections", method="random", allocation="hessian-trace:0.1", sparsity=0.4
    ).rows
    for kind in KINDS:
        part = [row for row in rows if f".{kind}." in row.target]
        diagonals = [2 * seen[row.target].square().sum(1).numpy() for row in part]
        expected = papers.hessian_trace_ratios(diagonals, [len(d) for d in diagonals], 0.4, 0.1)
        if kind in ("x_proj", "dt_proj"):
            expected = [0.4] * 3
        assert [row.pruned for row in part] == [
            round(share * row.total) for share, row in zip(expected, part, strict=True)
        ]


STEPS = ("in_proj", "x_proj", "dt_proj", "A_log", "out_proj")  # the order of the data


def test_one_run_is_what_pruning_matrix_after_matrix_gives() -> None:
    """Each sees the pruned ones before it, in its layer and in the layers before: bit for bit."""
    fields: dict[str, Any] = {"method": "sparsegpt", "allocation": "uniform"}
    whole, parts, wrong = pico_mamba(), pico_mamba(), pico_mamba()
    run(whole, **fields)
    for order, model in ((STEPS, parts), (STEPS[::-1], wrong)):
        for layer, kind in product(range(2), order):
            method = {} if kind == "A_log" else {"method": "sparsegpt"}
            rule = {"targets": [LAYER.format(layer, kind)], "allocation": "uniform", **method}
            run(model, rules=[rule])
    assert changed(tensors(whole), parts) == set()
    assert LAYER.format(0, "out_proj.weight") in changed(tensors(whole), wrong)
    dense = pico_mamba()  # inputs of the dense model would give something else
    run(dense, rules=[{"targets": [LAYER.format(1, "in_proj")], **fields}])
    assert LAYER.format(1, "in_proj.weight") in changed(tensors(whole), dense)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_pruned_on_request_once(tied: bool) -> None:
    model = pico_mamba(tie_word_embeddings=tied)
    before = tensors(model)
    (row,) = run(model, target="head", sparsity=0.4).rows
    head, embeddings = model.lm_head.weight, model.backbone.embeddings.weight
    assert row.target == ("backbone.embeddings.weight" if tied else "lm_head.weight")
    assert (row.family, row.method, row.price) == ("head", "absorb", "fisher")
    assert row.pruned == int((head == 0).sum()) == round(0.4 * 64 * 16)
    assert (head is embeddings) == tied
    assert torch.equal(embeddings, before["backbone.embeddings.weight"]) == (not tied)
    assert changed(before, model) == {"lm_head.weight", *(["backbone.embeddings.weight"] if tied else [])}


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_beside_the_layers_comes_where_the_data_meets_it_first(tied: bool) -> None:
    """A tied head is the embedding: the layers see its pruned rows. Another sees the pruned layers."""
    fields: dict[str, Any] = {"method": "sparsegpt", "allocation": "uniform"}
    linear, head = ({"targets": [name], **fields} for name in ("projections", "head"))
    both, parts = (pico_mamba(tie_word_embeddings=tied) for _ in range(2))
    report = run(both, rules=[linear, head])
    assert [row.family for row in report.rows] == ["projections"] * 8 + ["head"]  # in the order of the model
    for rule in (head, linear) if tied else (linear, head):
        run(parts, rules=[rule])
    assert changed(tensors(both), parts) == set()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "absorb"])
def test_the_head_by_another_method_than_the_layers(tied: bool, method: str) -> None:
    model = pico_mamba(tie_word_embeddings=tied)
    rules = [{"targets": ["projections"]}, {"targets": ["head"], "method": method}]
    report = run(model, rules=rules)
    assert [row.method for row in report.rows] == ["absorb"] * 8 + [method]
    assert report.totals["head"]["sparsity"] == 0.5
    rules = [{"targets": ["projections"], "method": method}, {"targets": ["head"], "method": "absorb"}]
    assert run(pico_mamba(tie_word_embeddings=tied), rules=rules).totals["head"]["sparsity"] == 0.5


def test_conv1d_is_pruned_on_request_with_a_hessian_for_each_channel() -> None:
    model = pico_mamba()
    before, seen = tensors(model), inputs_of_layers(model)
    name = LAYER.format(0, "conv1d.weight")
    report = run(model, target="conv1d", method="sparsegpt", pattern="2:4")
    assert [row.target for row in report.rows] == [LAYER.format(n, "conv1d.weight") for n in range(2)]
    assert changed(before, model) == {row.target for row in report.rows}
    hessians = sum(papers.conv1d_hessians(u.numpy(), 4) for u in seen[name])
    want, keep = papers.conv1d(before[name].numpy(), hessians, 0.5)
    got = model.state_dict()[name]
    assert torch.equal(got != 0, torch.from_numpy(keep))
    torch.testing.assert_close(got.double(), torch.from_numpy(want), rtol=1e-4, atol=1e-6)
    assert [row.price for row in run(pico_mamba(), target="conv1d").rows] == ["none"] * 2  # it has no Fisher
    norms = run(pico_mamba(), target="conv1d", price="norms")
    assert [row.price for row in norms.rows] == ["norms"] * 2


def test_conv1d_between_the_others_comes_where_the_data_meets_it() -> None:
    rules = [{"targets": [name], "method": "sparsegpt"} for name in ("in_proj", "conv1d", "x_proj")]
    whole, parts = pico_mamba(), pico_mamba()
    report = run(whole, rules=rules)
    assert [row.target.split(".")[-2] for row in report.rows] == ["in_proj", "conv1d", "x_proj"] * 2
    for layer, kind in product(range(2), ("in_proj", "conv1d", "x_proj")):
        run(parts, rules=[{"targets": [LAYER.format(layer, kind)], "method": "sparsegpt"}])
    assert changed(tensors(whole), parts) == set()


@pytest.mark.parametrize("method", ["sparsegpt", "absorb"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_dense_target_of_no_strength_is_the_layers_own_output(method: str, pattern: str) -> None:
    one, other, full = pico_mamba(), pico_mamba(), pico_mamba()
    fields: dict[str, Any] = {"method": method, "pattern": pattern, "ignore": ["dt_proj"]}
    run(one, **fields, repair="dense-target:0")
    run(other, **fields, repair="self")
    run(full, **fields, repair="dense-target")
    assert changed(tensors(one), other) == set()
    assert LAYER.format(0, "out_proj.weight") in changed(tensors(one), full)


def test_where_nothing_was_pruned_before_the_dense_target_is_the_own_output() -> None:
    one, other = pico_mamba(), pico_mamba()
    rule = {"targets": [LAYER.format(0, "in_proj")], "method": "sparsegpt"}
    run(one, rules=[{**rule, "repair": "dense-target"}])
    run(other, rules=[{**rule, "repair": "self"}])
    name = LAYER.format(0, "in_proj.weight")
    torch.testing.assert_close(one.state_dict()[name], other.state_dict()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["sparsegpt", "absorb", "wanda", "magnitude", "random"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_without_repair_survivors_are_what_they_were(method: str, pattern: str) -> None:
    model = pico_mamba()
    before = tensors(model)
    repair = {"repair": "none"} if "repair" in METHODS[method].defaults else {}
    fields: dict[str, Any] = {"target": "projections", "pattern": pattern, "ignore": ["dt_proj"], **repair}
    for row in run(model, method=method, **fields).rows:
        now = model.state_dict()[row.target]
        assert torch.equal(now[now != 0], before[row.target][now != 0])
        assert row.repair == "none"
        if pattern == "2:4":
            assert ((now != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_repair_lowers_the_error_of_each_layer_and_a_joint_one_more() -> None:
    def error(**fields: Any) -> float:
        rules = [{"targets": [LAYER.format(0, "in_proj")], "allocation": "uniform", **fields}]
        return run(pico_mamba(), rules=rules).rows[0].error or 0.0

    none = error(method="sparsegpt", repair="none")
    swept = error(method="sparsegpt", repair="self")
    joint = error(method="absorb", repair="self", price="none")
    assert joint < swept < none


def test_values_are_rounded_to_the_stored_dtype() -> None:
    model = pico_mamba().bfloat16().float()  # as a checkpoint in bf16 is loaded
    before = tensors(model)
    report = run(model, stored={name: torch.bfloat16 for name in before})
    assert {row.target for row in report.rows} <= changed(before, model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensor.bfloat16().float()), name
    for row in report.rows:
        removed = 38.0 if row.family == "ssm" else 0.0
        assert int((model.state_dict()[row.target] == removed).sum()) >= row.pruned


def test_report_says_what_happened_to_linear_layers() -> None:
    rows = {row.target: row for row in run(pico_mamba()).rows}
    assert list(rows)[:5] == [LAYER.format(0, k if k == "A_log" else f"{k}.weight") for k in STEPS]
    row = rows[LAYER.format(0, "x_proj.weight")]
    assert (row.family, row.method, row.pattern, row.removed) == (
        "projections",
        "absorb",
        "unstructured",
        "zero",
    )
    assert (row.repair, row.price, row.allocation) == ("dense-target:1", "fisher", "loss:0.1")
    assert (row.total, row.repaired, row.damping) == (17 * 32, (), 0.01)
    assert row.error is not None and row.signal is not None and 0 < row.error < row.signal


@pytest.mark.parametrize("share", ["uniform", "loss"])
def test_a_hessian_that_is_not_finite_is_refused_by_the_name_of_its_matrix(share: str) -> None:
    model = pico_mamba()
    with torch.no_grad():
        model.backbone.layers[1].norm.weight.fill_(1e20)  # its squares are infinite
        model.backbone.layers[1].mixer.in_proj.weight.mul_(1e-20)
    with pytest.raises(
        ValueError, match="^backbone.layers.1.mixer.in_proj.weight: its Hessian is not finite"
    ):
        run(model, target="projections", method="sparsegpt", allocation=share, ignore=["layer:0"])


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("share", ["uniform", "loss", "owl"])
def test_zeros_from_before_stay_and_count(method: str, share: str) -> None:
    model = pico_mamba()
    run(model, target="projections", method="random", sparsity=0.3, allocation="uniform")
    first = tensors(model)
    report = run(model, target="projections", method=method, sparsity=0.5, allocation=share)
    for row in report.rows:
        now = model.state_dict()[row.target]
        assert (now[first[row.target] == 0] == 0).all()
        assert row.pruned == int((now == 0).sum())
    if not METHODS[method].by_row and "grid" not in METHODS[method].defaults:  # which has a zero
        assert abs(sum(row.pruned for row in report.rows) - 2112) <= 8


def test_less_than_was_removed_before_is_no_gift() -> None:
    model = pico_mamba()
    run(model, target="projections", method="random", sparsity=0.6)
    before = tensors(model)
    report = run(model, target="projections", method="sparsegpt", sparsity=0.3)
    assert [row.pruned for row in report.rows] == [
        int((before[row.target] == 0).sum()) for row in report.rows
    ]
