"""pruning/entries.py: shares, determinism, order, what is written where, and what the loop refuses."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import transcription_linear as papers
from pico import pico_mamba
from planned import prune
from torch import Tensor

from sparsessm.architectures import adapt
from sparsessm.data.texts import fingerprint
from sparsessm.methods import allocation, entry_methods
from sparsessm.pruning import make_plan
from sparsessm.recipe.recipe import Recipe
from sparsessm.report.record import Report

METHODS = entry_methods()

TOKENS = torch.randint(0, 64, (4, 40), generator=torch.Generator().manual_seed(0))
FEW = TOKENS[:2, :24]
SSM = [name for name, method in METHODS.items() if "ssm" in method.families]
LINEAR = [name for name, method in METHODS.items() if "projections" in method.families]
KINDS = ("in_proj", "x_proj", "dt_proj", "out_proj")
LAYER = "backbone.layers.{}.mixer.{}"


def run(
    model: Any, tokens: Tensor | None = TOKENS, stored: dict[str, torch.dtype] | None = None, **fields: Any
) -> Report:
    recipe = Recipe(**fields).resolved(model="pico", trained_length=40)
    return prune(adapt(model, stored), recipe, tokens)


def run_ssm(model: Any, tokens: Tensor | None = TOKENS, **fields: Any) -> Report:
    """As the papers do it: A_log, the same share of every layer."""
    return run(model, tokens, **{"target": "ssm", "allocation": "uniform", **fields})


def tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: Any) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


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


def test_one_threshold_lowers_the_total_error() -> None:
    """`exact` scores are in the same unit in every layer, so moving the budget between layers must pay."""
    layer, model = (
        sum(row.error or 0 for row in run_ssm(_uneven(), allocation=name).rows)
        for name in ("uniform", "loss")
    )
    assert model < layer


def _uneven() -> Any:
    model = pico_mamba()
    with torch.no_grad():
        model.backbone.layers[1].mixer.out_proj.weight.mul_(20)
    return model


def test_a_clip_keeps_the_shares_near() -> None:
    for clip in (0.05, 0.2):
        rows = run(_uneven(), target="projections", method="magnitude", allocation=f"loss:{clip}").rows
        shares = [row.sparsity for row in rows]
        assert 0.5 - clip - 0.02 <= min(shares) < max(shares) <= 0.5 + clip + 0.02
        assert max(shares) - min(shares) > clip


def inputs_of_layers(model: Any) -> dict[str, Tensor]:
    """Parameter name -> inputs (in, tokens) in the stock forward, of conv1d (windows, channels, tokens).

    What the stock mixer does not call as a module (dt_proj, conv1d) follows from what it does call.
    """
    found: dict[str, Tensor] = {}
    hooks = []
    for layer, block in enumerate(model.backbone.layers):
        for kind in ("in_proj", "x_proj", "out_proj"):

            def keep(_: Any, args: Any, name: str = LAYER.format(layer, kind)) -> None:
                found[name] = args[0].double()  # (W, T, in)

            hooks.append(getattr(block.mixer, kind).register_forward_pre_hook(keep))
    with torch.inference_mode():
        model(TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer, block in enumerate(model.backbone.layers):
        mixer = block.mixer
        step = found[LAYER.format(layer, "x_proj")] @ mixer.x_proj.weight.detach().double().T
        found[LAYER.format(layer, "dt_proj")] = step[..., : mixer.time_step_rank]
    flat = {f"{name}.weight": x.flatten(0, 1).T for name, x in found.items()}
    for layer, block in enumerate(model.backbone.layers):
        x = found[LAYER.format(layer, "in_proj")] @ block.mixer.in_proj.weight.detach().double().T
        flat[LAYER.format(layer, "conv1d.weight")] = x.chunk(2, -1)[0].transpose(1, 2)
    return flat


def test_owl_looks_at_the_dense_model_block_by_block() -> None:
    model = _uneven()
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


def test_methods_without_data_need_none() -> None:
    def needed(**fields: Any) -> bool:
        recipe = Recipe(**fields).resolved(model="m", trained_length=None)
        return make_plan(recipe, adapt(pico_mamba())).looks

    assert [name for name in SSM if not needed(target="ssm", method=name)] == ["random", "magnitude"]
    assert [name for name in LINEAR if not needed(target="projections", method=name)] == [
        "random",
        "magnitude",
    ]
    assert not needed(method="magnitude", allocation="loss")
    assert needed(method="magnitude", allocation="owl") and needed(
        method="magnitude", allocation="hessian-trace"
    )
    report = run(pico_mamba(), None, method="magnitude")
    assert report.fingerprint == ""
    for fields, words in (
        ({"target": "ssm"}, "method 'exact' needs calibration windows, none were given"),
        ({}, "method 'absorb' and method 'exact' needs calibration windows"),
        ({"method": "wanda", "ignore": ["A_log"]}, "method 'wanda' needs calibration windows"),
        (
            {"method": "magnitude", "allocation": "owl"},
            "^allocation 'owl' needs calibration windows, none were given",
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
    if not METHODS[method].by_row:
        assert abs(sum(row.pruned for row in report.rows) - 2112) <= 8


def test_less_than_was_removed_before_is_no_gift() -> None:
    model = pico_mamba()
    run(model, target="projections", method="random", sparsity=0.6)
    before = tensors(model)
    report = run(model, target="projections", method="sparsegpt", sparsity=0.3)
    assert [row.pruned for row in report.rows] == [
        int((before[row.target] == 0).sum()) for row in report.rows
    ]


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
    recipe = Recipe(**fields).resolved(model="pico", trained_length=40)
    prune(adapt(pico_mamba(tie_word_embeddings=tied)), recipe, TOKENS, lambda *step: told.append(step))
    ends = [(stage, done) for stage, done, total in told if done == total]
    assert told[-1][1] == told[-1][2]
    starts = [(stage, done) for stage, done, _ in told if done == 1]
    assert [stage for stage, _ in ends] == [stage for stage, _ in starts]
