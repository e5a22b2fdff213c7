"""The methods for linear layers in whole models, against float64 transcriptions fed by hooks on the stock
forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transcription_linear as paper
from pico import pico_mamba
from planned import prune
from stock import stock_inputs
from torch import Tensor

from sparsessm.architectures import Target, adapt
from sparsessm.calibration.visit import survey
from sparsessm.calibration.walk import walk
from sparsessm.methods import Rule, entry_methods
from sparsessm.methods.hessian import factorise
from sparsessm.methods.observers import InputGram
from sparsessm.methods.patterns import Unstructured
from sparsessm.methods.repair import refit, sweep
from sparsessm.pruning import entries
from sparsessm.recipe.recipe import Recipe
from sparsessm.report.record import Report

METHODS = entry_methods()


def windows(count: int, length: int = 48, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(seed))


ORDER = ["in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "out_proj"]
A_LOG = {"targets": ["A_log"], "method": "exact", "allocation": "uniform", "sparsity": 0.5}


def follow(model: Any, tokens: Tensor, *rules: dict[str, Any], **fields: Any) -> Report:
    """Prune by a recipe of rules, A_log always among them."""
    if rules:
        fields["rules"] = [A_LOG, *rules]
    return prune(
        adapt(model), Recipe(**fields).resolved(model="pico", trained_length=tokens.shape[1]), tokens
    )


def uneven_mamba(**overrides: Any) -> Any:
    """float64, several ranks; 24 inputs in in_proj and 48 in out_proj."""
    fields = {
        "hidden_size": 24,
        "time_step_rank": 6,
        "tie_word_embeddings": False,
        "conv_kernel": 4,
    } | overrides
    return pico_mamba(**fields).double()


def as_seen_by(target: Target, pruned: Any, **overrides: Any) -> Any:
    """The model in which everything before a target is pruned, and nothing after it."""
    mixed = uneven_mamba(**overrides)
    before = [f"layers.{i}." for i in range(target.layer)]
    if target.family != "head":
        before += [f"layers.{target.layer}.mixer.{kind}" for kind in ORDER[: ORDER.index(target.kind)]]
        before += [f"layers.{target.layer}.mixer.D"] if target.kind == "out_proj" else []
    own = {n: v for n, v in pruned.state_dict().items() if any(part in n for part in before)}
    mixed.load_state_dict(mixed.state_dict() | own)
    return mixed


def towards_the_dense(W: np.ndarray, X: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """argmin ||V X~ - W X||^2 / tokens + added ||V - W||^2, row by row."""
    added = 0.01 * (seen**2).sum() / seen.size
    system = np.vstack([seen.T / seen.shape[1] ** 0.5, added**0.5 * np.eye(len(seen))])
    aim = np.vstack([X.T @ W.T / seen.shape[1] ** 0.5, added**0.5 * W.T])
    return np.linalg.lstsq(system, aim, rcond=None)[0].T


def expected(
    method: str, repair: str, W: np.ndarray, X: np.ndarray, seen: np.ndarray, nm: bool
) -> np.ndarray:
    """One linear layer; X, seen: its inputs (in, tokens) in the dense model and in the one pruned so far."""
    if method == "magnitude":
        return W * (paper.magnitude_nm(W, 2, 4) if nm else paper.magnitude_mask(W, 0.5))
    if method == "wanda":
        return W * (paper.wanda_nm(W, seen, 2, 4) if nm else paper.wanda_mask(W, seen, 0.5))
    H = 2 * seen @ seen.T
    start = towards_the_dense(W, X, seen) if repair == "dense-target" else W
    if method == "sparsegpt":
        return paper.sparsegpt_nm(start, H, 2, 4)[0] if nm else paper.sparsegpt(start, H, 0.5)[0]
    keep = paper.sparsegpt_nm(start, H, 2, 4)[1] if nm else paper.sparsegpt(start, H, 0.5, blocksize=32)[1]
    damped = paper.damped(H)[0]
    rows = [
        paper.obs_brute(row, damped, np.flatnonzero(~kept))[0] for row, kept in zip(start, keep, strict=True)
    ]
    return np.array(rows)


def expected_conv1d(W: np.ndarray, seen: np.ndarray, nm: bool) -> np.ndarray:
    """seen (channels, taps, tokens): one mask over all channels, each repaired by itself."""
    H = 2 * seen @ seen.swapaxes(1, 2) / seen.shape[2]
    if nm:
        rows = [paper.sparsegpt_nm(row[None], h, 2, 4)[0][0] for row, h in zip(W, H, strict=True)]
        return np.array(rows)
    pivots = np.stack([np.diag(paper.factor(h)) for h in H])
    keep = paper.magnitude_mask(W / pivots, 0.5)
    return np.array(
        [paper.sparsegpt_fixed(w[None], h, k[None])[0] for w, h, k in zip(W, H, keep, strict=True)]
    )


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize(
    "method,repair",
    [("magnitude", "none"), ("wanda", "none"), ("sparsegpt", "self"), ("sparsegpt", "dense-target"),
     ("absorb", "self"), ("absorb", "dense-target")],
)  # fmt: skip
def test_a_whole_model_equals_the_papers(
    method: str, repair: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every linear layer of the pruned model is what the paper makes of the dense one, from the inputs that
    the stock forward feeds it once all before it is pruned; with dense-target, of what comes nearest to its
    dense output. So a wrong order, or inputs of another model, would show."""
    monkeypatch.setattr(entries, "refit", lambda *args: refit(*args, steps=400))  # until nothing moves
    nm = {"ignore": ["dt_proj"]} if pattern == "2:4" else {}  # its rows have 6 entries
    how: dict[str, Any] = {"method": method, "pattern": pattern} | nm
    how |= {} if repair == "none" else {"repair": repair}
    how |= {"price": "none"} if method in ("sparsegpt", "absorb") else {}
    how |= {} if nm else {"allocation": "uniform"}
    rules = [{"targets": ["projections"]} | how, {"targets": ["lm_head"]} | how]
    if repair == "self":
        rules.append({"targets": ["conv1d"]} | how)
    for rule in rules[1:]:
        rule.pop("ignore", None)
    tokens, model, dense = windows(4, 30), uneven_mamba(), uneven_mamba()
    report = follow(model, tokens, *rules)
    pruned = {row.target for row in report.rows}
    inputs, weights = stock_inputs(dense, tokens), dict(model.named_parameters())
    checked = 0
    for target in adapt(dense).targets:
        if target.family == "ssm" or target.name not in pruned:
            same = torch.equal(weights[target.name], target.parameter)
            assert same == (target.family != "ssm"), target.name
            continue
        key = (-1 if target.family == "head" else target.layer, target.kind)
        X = inputs[key].flatten(0, 1).movedim(0, -1).numpy()
        seen = stock_inputs(as_seen_by(target, model), tokens)[key].flatten(0, 1).movedim(0, -1).numpy()
        W, got = target.matrix.numpy(), weights[target.name].detach().flatten(1).numpy()
        conv = target.kind == "conv1d"
        want = expected_conv1d(W, seen, bool(nm)) if conv else expected(method, repair, W, X, seen, bool(nm))
        if not (conv and method == "absorb"):  # its survivors are refitted towards each other as well
            assert np.abs(got - want).max() < 1e-5 * np.abs(want).max(), target.name
        assert np.array_equal(got == 0, want == 0), target.name
        checked += 1
    assert checked == len(rules) - 1 + 2 * (3 if nm else 4) + (repair == "self")


def by_hand(model: Any, tokens: Tensor, order: list[str], dense_inputs: bool = False) -> dict[str, Tensor]:
    """SparseGPT on a float32 model with the project's own parts, in any order."""
    architecture = adapt(model)
    method, pattern = METHODS["sparsegpt"], Unstructured()
    rule = Rule(method, pattern, 0.5, "zero")
    dense = dict(
        (target.name, seen)
        for target, seen in survey(adapt(pico_mamba(time_step_rank=6)), tokens, lambda target: InputGram()
                                   if target.family == "projections" else None)
    )  # fmt: skip
    for stop in walk(architecture, tokens):
        targets = {target.kind: target for target in stop.block.targets}
        for kind in order:
            target = targets[kind]
            if kind == "A_log":
                target.replace(target.matrix.masked_fill(~pattern.keep(target.matrix.abs(), 0.5), 38.0))
                continue
            seen = dense[target.name] if dense_inputs else stop.look(target, InputGram())
            factor = factorise(seen.gram.float())
            new, _ = sweep(
                target.matrix, lambda w, c, f=factor: method.score(w, f, rule, c), pattern, 0.5, factor
            )
            target.replace(new)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_the_order_and_the_inputs_matter() -> None:
    """In the order of the data and with inputs of the pruned model: a whole run, bit for bit. In another
    order, or with inputs of the dense model, other weights."""
    tokens = windows(3)
    order = [kind for kind in ORDER if kind != "conv1d"]
    model = pico_mamba(time_step_rank=6)
    a_log = {"targets": ["A_log"], "method": "magnitude", "sparsity": 0.5, "allocation": "uniform"}
    recipe = Recipe(rules=[a_log, {"targets": ["projections"], "method": "sparsegpt"}])
    prune(adapt(model), recipe.resolved(model="pico", trained_length=48), tokens)
    want = {name: parameter.detach() for name, parameter in model.named_parameters()}
    got = by_hand(pico_mamba(time_step_rank=6), tokens, order)
    assert all(torch.equal(got[name], want[name]) for name in want)
    backwards = by_hand(pico_mamba(time_step_rank=6), tokens, order[::-1])
    dense = by_hand(pico_mamba(time_step_rank=6), tokens, order, dense_inputs=True)
    late = by_hand(
        pico_mamba(time_step_rank=6), tokens, ["in_proj", "x_proj", "dt_proj", "out_proj", "A_log"]
    )
    first = "backbone.layers.0.mixer."
    assert torch.equal(backwards[f"{first}in_proj.weight"], want[f"{first}in_proj.weight"]), (
        "sees the embedding"
    )
    second = "backbone.layers.1.mixer.in_proj.weight"
    own = [f"{first}{kind}.weight" for kind in ("x_proj", "dt_proj", "out_proj")]
    changed = {
        "backwards": (backwards, [*own, second]),
        "dense inputs": (dense, [*own, second]),
        "A_log last": (late, own[-1:]),  # an untrained model's states do little
    }
    for name, (other, targets) in changed.items():
        for target in targets:
            assert (other[target] - want[target]).abs().max() > 1e-3 * want[target].abs().max(), (
                name,
                target,
            )


@pytest.mark.parametrize("repair", ["self", "dense-target"])
def test_a_tied_head_is_pruned_once_and_first(repair: str) -> None:
    """Its inputs are the dense model's; all else then sees the embeddings that it left, and with dense-target
    aims at the model that had them all."""
    tokens, overrides = windows(3), {"tie_word_embeddings": True}
    model, dense = uneven_mamba(**overrides), uneven_mamba(**overrides)
    how = {"method": "sparsegpt", "repair": repair}
    report = follow(model, tokens, {"targets": ["head"]} | how, {"targets": ["projections"]} | how)
    assert [row.target for row in report.rows if row.family == "head"] == ["backbone.embeddings.weight"]
    assert model.lm_head.weight is model.backbone.embeddings.weight

    def rows(key: tuple[int, str]) -> np.ndarray:
        return stock_inputs(dense, tokens)[key].flatten(0, 1).T.numpy()

    def assert_made_of(got: Tensor, W: Tensor, X: np.ndarray, seen: np.ndarray) -> np.ndarray:
        want = expected("sparsegpt", repair, W.detach().numpy(), X, seen, nm=False)
        np.testing.assert_allclose(got.detach(), want, atol=1e-5 * np.abs(want).max())
        return want

    X = rows((-1, "lm_head"))
    embeddings = assert_made_of(model.lm_head.weight, dense.lm_head.weight, X, X)
    X = rows((0, "in_proj"))
    dense.load_state_dict(dense.state_dict() | {"backbone.embeddings.weight": torch.from_numpy(embeddings)})
    seen = rows((0, "in_proj"))
    assert np.abs(X - seen).max() > 0.1
    before = dense.backbone.layers[0].mixer.in_proj.weight
    assert_made_of(model.backbone.layers[0].mixer.in_proj.weight, before, X, seen)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if "projections" in row.families])
def test_a_second_pruning_keeps_what_the_first_removed(method: str) -> None:
    tokens, model = windows(2), uneven_mamba()
    first = {"targets": ["projections", "conv1d", "head"], "method": "random", "allocation": "uniform"}
    follow(model, tokens, first | {"sparsity": 0.3})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    families = [name for name in ("projections", "conv1d", "head") if name in METHODS[method].families]
    how = {"targets": families, "method": method, "sparsity": 0.5, "allocation": "uniform"}
    report = follow(model, tokens, how)
    for row in report.rows:
        if row.family != "ssm":
            after = model.state_dict()[row.target]
            assert not after[before[row.target] == 0].any(), row.target
            assert row.pruned == int((after == 0).sum()) and abs(row.pruned / row.total - 0.5) < 0.02


def test_absorption_brings_a_layer_nearer_to_its_dense_output() -> None:
    """out_proj after everything before it was pruned, measured on the stock model."""
    tokens, dense = windows(6), uneven_mamba()
    errors = []
    for repair in ("self", "dense-target"):
        model = uneven_mamba()
        follow(model, tokens, {"targets": ["projections"], "method": "sparsegpt", "repair": repair})
        total = 0.0
        for layer in range(2):
            x, seen = (stock_inputs(one, tokens)[layer, "out_proj"].flatten(0, 1) for one in (dense, model))
            mixers = [one.backbone.layers[layer].mixer for one in (dense, model)]
            before, after = (mixer.out_proj.weight.detach() for mixer in mixers)
            total += float((seen @ after.T - x @ before.T).square().sum())
        errors.append(total)
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("method", ["sparsegpt", "absorb"])
def test_strength_0_is_the_layer_itself(method: str) -> None:
    tokens, how = windows(2), {"targets": ["projections"], "method": method, "price": "none"}
    how |= {"allocation": "uniform"}
    models = [uneven_mamba() for _ in range(3)]
    for model, repair in zip(models, ["self", "dense-target:0", "dense-target:0.5"], strict=True):
        follow(model, tokens, how | {"repair": repair})
    states = [model.state_dict() for model in models]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    first = "backbone.layers.0.mixer."
    changes = {name: (states[2][name] - value).abs().max() for name, value in states[0].items()}
    assert changes[f"{first}out_proj.weight"] > 1e-3
    assert changes[f"{first}in_proj.weight"] < 1e-9, "both streams are the same there"


def test_without_repair_survivors_keep_their_values() -> None:
    """What is removed is then what costs least alone: w^2 / [H^-1]_jj, the whole matrix at once."""
    tokens, model, dense = windows(3), uneven_mamba(), uneven_mamba()
    follow(model, tokens, {"targets": ["in_proj"], "method": "sparsegpt", "repair": "none"})
    W = dense.backbone.layers[0].mixer.in_proj.weight.detach().numpy()
    X = stock_inputs(dense, tokens)[0, "in_proj"].flatten(0, 1).T.numpy()
    inverse = np.linalg.inv(paper.damped(2 * X @ X.T)[0])
    keep = paper.magnitude_mask(W / np.sqrt(np.diag(inverse)), 0.5)
    assert np.array_equal(model.backbone.layers[0].mixer.in_proj.weight.detach().numpy(), W * keep)


@pytest.mark.parametrize("method", ["sparsegpt", "absorb"])
@pytest.mark.parametrize("cost", [None, torch.tensor([1.0, 9.0, 0.25], dtype=torch.float64)])
def test_total_is_what_removing_a_weight_alone_costs(method: str, cost: Tensor | None) -> None:
    rng = np.random.default_rng(0)
    W, X = rng.standard_normal((3, 7)), rng.standard_normal((7, 7)) @ rng.standard_normal((7, 40))
    X[4] = 0
    gram = X @ X.T / 40
    row, rule = METHODS[method], Rule(METHODS[method], Unstructured(), 0.5, "zero", prices=cost)
    assert row.total is not None
    factor = factorise(torch.from_numpy(gram))
    got = row.total(torch.from_numpy(W), factor, rule)
    damped = gram + float(factor.added) * np.eye(7)
    for i in range(3):
        price = 1.0 if cost is None else float(cost[i])
        for j in range(7):
            error = paper.obs_brute(W[i], damped, [j])[1] * 2 if j != 4 else 0.0
            assert float(got[i, j]) == pytest.approx(price * error)


def test_outliers_of_a_depthwise_layer() -> None:
    """`owl` on conv1d compares |w| x norm of its own tap's input in every channel."""
    tokens, model, dense = windows(3), uneven_mamba(), uneven_mamba()
    for one in (model, dense):
        with torch.no_grad():
            one.backbone.layers[1].mixer.in_proj.weight[:3] *= 100
    recipe = Recipe(target="conv1d", method="sparsegpt", allocation="owl:0.2", sparsity=0.5)
    report = prune(adapt(model), recipe.resolved(model="pico", trained_length=48), tokens)
    scores = []
    for layer in range(2):
        seen = stock_inputs(dense, tokens)[layer, "conv1d"].square().mean((0, 1)).sqrt().numpy()
        scores.append(np.abs(dense.backbone.layers[layer].mixer.conv1d.weight[:, 0].detach().numpy()) * seen)
    shares = paper.owl_ratios(scores, 5.0, 0.2, 0.5)
    assert shares[0] > 0.6 > 0.4 > shares[1]
    assert [row.pruned for row in report.rows] == [round(share * 48 * 4) for share in shares]
