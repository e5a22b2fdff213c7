"""Every baseline against its authors' formulas, in float64, on a layer of the built-in trained models.

On random models: test_methods.py, test_allocation.py and test_units.py. A trained layer has what those
have not: scores over many orders of magnitude, near-ties, states that hardly do anything.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transcription
import transcription_linear as paper
from lively import loss, norms, without
from planned import prune
from torch import Tensor
from transcription import (
    Trace,
    block_influence,
    column_votes,
    ghost_saliency,
    normalise,
    remove_smallest,
    steps_of_mamba1,
    steps_of_mamba2,
    trace,
    vote_mask,
    weighted_score,
)

import sparsessm
from sparsessm.architectures import adapt
from sparsessm.calibration.walk import walk
from sparsessm.methods import unit_methods
from sparsessm.methods.structured import Units
from sparsessm.pruning import blocks
from sparsessm.pruning import units as loops
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.sizes import order
from sparsessm.report.record import Report

UNITS = unit_methods()

LENGTH = 64
KINDS = ("in_proj", "x_proj", "dt_proj", "out_proj")
MODELS = {"mamba": "builtin:pycode", "mamba2": "builtin:pycode2"}


@pytest.fixture(scope="module")
def trained() -> dict[str, tuple[Any, Tensor]]:
    """Models and two windows of Python, whose text does not depend on the Python that runs."""
    found = {}
    for name, model in MODELS.items():
        checkpoint = sparsessm.load(model)
        ids = checkpoint.tokenizer(Path(transcription.__file__).read_text(encoding="utf-8"))["input_ids"]
        found[name] = checkpoint.model, torch.tensor(ids[: 2 * LENGTH]).view(2, LENGTH)
    return found


@pytest.fixture(scope="module")
def layers(trained: dict[str, tuple[Any, Tensor]]) -> list[list[tuple[np.ndarray, np.ndarray, Trace]]]:
    """Of each layer of the dense Mamba-1 and each window: the stream, the mixer's input, the rest."""
    model, tokens = trained["mamba"]
    streams = [array(model.backbone.embeddings.weight)[window] for window in tokens]
    found = []
    for layer in model.backbone.layers:
        read = [normalise(layer.norm, stream) for stream in streams]
        seen = [trace(layer.mixer, x) for x in read]
        found.append(list(zip(streams, read, seen, strict=True)))
        streams = [stream + one.out for stream, one in zip(streams, seen, strict=True)]
    return found


def pruned(model: Any, tokens: Tensor, **fields: Any) -> tuple[Any, Report]:
    model = copy.deepcopy(model)
    recipe = Recipe(**fields).resolved(model="trained", trained_length=LENGTH)
    return model, prune(adapt(model), recipe, tokens)


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def inputs(model: Any, layers: list[list[Any]], number: int, kind: str) -> np.ndarray:
    """(in, tokens) of a matrix of the dense model."""
    mixer = model.backbone.layers[number].mixer
    step = array(mixer.x_proj.weight)[: mixer.time_step_rank]
    rows = {
        "in_proj": [x for _, x, _ in layers[number]],
        "x_proj": [one.u for _, _, one in layers[number]],
        "dt_proj": [one.u @ step.T for _, _, one in layers[number]],
        "out_proj": [one.y for _, _, one in layers[number]],
    }
    return np.concatenate(rows[kind]).T


# entries


@pytest.mark.parametrize("method", ["magnitude", "sparsessm-vote", "sparsessm"])
@pytest.mark.parametrize("sparsity", [0.25, 0.6])
def test_entries_of_a_log(method: str, sparsity: float, trained: Any, layers: Any) -> None:
    model, tokens = trained["mamba"]
    how = {"target": "ssm", "method": method, "sparsity": sparsity, "allocation": "uniform"}
    after, _ = pruned(model, tokens, **how)
    a_log = array(model.backbone.layers[0].mixer.A_log)
    got = array(after.backbone.layers[0].mixer.A_log) == a_log
    count, traces = round(sparsity * a_log.size), [one for _, _, one in layers[0]]
    if method == "sparsessm-vote":
        want = vote_mask(a_log, traces, count)
    else:
        want = remove_smallest(np.abs(a_log) if method == "magnitude" else weighted_score(traces), count)
    assert (~got).sum() == count
    # of two that are nearly alike the float32 states may give up the other one
    assert (got != want).sum() <= (0 if method == "magnitude" else 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_weights_of_linear_layers(method: str, kind: str, trained: Any, layers: Any) -> None:
    model, tokens = trained["mamba"]
    after, _ = pruned(model, tokens, rules=[{"targets": [kind], "method": method}])
    W, X = array(getattr(model.backbone.layers[0].mixer, kind).weight), inputs(model, layers, 0, kind)
    got = array(getattr(after.backbone.layers[0].mixer, kind).weight)
    want = paper.magnitude_mask(W, 0.5) if method == "magnitude" else paper.wanda_mask(W, X, 0.5)
    assert ((got != 0) != want).sum() <= W.size * 1e-4
    assert np.array_equal(got[got != 0], W[got != 0])


@pytest.mark.parametrize("kind", ["x_proj", "dt_proj"])
def test_sparsegpt(kind: str, trained: Any, layers: Any) -> None:
    model, tokens = trained["mamba"]
    after, _ = pruned(model, tokens, rules=[{"targets": [kind], "method": "sparsegpt"}])
    W, X = array(getattr(model.backbone.layers[0].mixer, kind).weight), inputs(model, layers, 0, kind)
    want, keep = paper.sparsegpt(W, 2 * X @ X.T, 0.5)
    got = array(getattr(after.backbone.layers[0].mixer, kind).weight)
    alike = ((got != 0) == keep).all(1)  # one other choice changes all that is right of it
    assert alike.mean() > 0.95
    assert np.abs(got - want)[alike].max() < 1e-3 * np.abs(W).max()


# who loses how much


@pytest.mark.parametrize("name", ["owl", "hessian-trace"])
def test_allocations(name: str, trained: Any, layers: Any) -> None:
    model, tokens = trained["mamba"]
    _, report = pruned(model, tokens, target="projections", method="sparsegpt", allocation=f"{name}:0.06")
    want = {}
    count = len(model.backbone.layers)
    if name == "owl":
        scores = []
        for number, layer in enumerate(model.backbone.layers):
            norms_ = {kind: np.sqrt((inputs(model, layers, number, kind) ** 2).sum(1)) for kind in KINDS}
            parts = [np.abs(array(getattr(layer.mixer, kind).weight)) * norms_[kind] for kind in KINDS]
            scores.append(np.concatenate([part.ravel() for part in parts]))
        ratios = paper.owl_ratios(scores, 5.0, 0.06, 0.5)
        want = {(number, kind): ratios[number] for number in range(count) for kind in KINDS}
    else:
        want = dict.fromkeys(((number, kind) for number in range(count) for kind in KINDS), 0.5)
        for kind in ("in_proj", "out_proj"):
            diagonals = [(inputs(model, layers, number, kind) ** 2).mean(1) for number in range(count)]
            ratios = paper.hessian_trace_ratios(diagonals, [len(d) for d in diagonals], 0.5, 0.06)
            want |= {(number, kind): ratios[number] for number in range(count)}
    assert len(report.rows) == len(want) and len(set(np.round(list(want.values()), 3))) > 3
    for row in report.rows:
        share = want[row.layer, row.target.split(".")[-2]]
        assert row.sparsity == pytest.approx(share, abs=2e-3), row.target


# whole units


@pytest.mark.parametrize("share", [0.1875, 0.375, 0.6875])
def test_columns_of_a_log_compete_at_every_step(share: float, trained: Any, layers: Any) -> None:
    model, tokens = trained["mamba"]
    how = {"pattern": "structured:state", "sparsity": share, "method": "sparsessm-vote", "repair": "none"}
    after, _ = pruned(model, tokens, **how)
    full, left = (one.backbone.layers[0].mixer.A_log.detach() for one in (model, after))
    kept = [any(torch.equal(full[:, n], column) for column in left.T) for n in range(full.shape[1])]
    energies = np.array(sum(one.before**2 for _, _, one in layers[0]))
    count = full.shape[1] - left.shape[1]
    assert kept == remove_smallest(-column_votes(array(full), energies, count), count).tolist()


@pytest.mark.parametrize("kind", MODELS)
def test_ghost(kind: str, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of all windows counts, in however many parts they are looked at."""
    model, tokens = trained[kind]
    monkeypatch.setattr(loops, "HELD", 1)
    layer = model.backbone.layers[0]
    units = looked(model, tokens, "state", "ghost")
    steps = {"mamba": steps_of_mamba1, "mamba2": steps_of_mamba2}[kind]
    want = ghost_saliency(steps(layer.mixer, model.backbone.embeddings(tokens).detach().double(), layer.norm))
    assert UNITS["ghost"].score is not None
    got = torch.stack(list(UNITS["ghost"].score(units))).numpy()
    np.testing.assert_allclose(got / got.mean(), want / want.mean(), rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "axis"), [("mamba", "state"), ("mamba", "channel"), ("mamba2", "channel"), ("mamba2", "head")]
)
def test_magnitude_of_units(kind: str, axis: str, trained: Any) -> None:
    model, tokens = trained[kind]
    units = looked(model, tokens, axis, "magnitude")
    assert UNITS["magnitude"].score is not None
    scores = UNITS["magnitude"].score(units)
    for got, want in zip(scores, norms(model.backbone.layers[0].mixer, axis), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9)


def looked(model: Any, tokens: Tensor, axis: str, method: str) -> Units:
    """What a selection is told of the first layer."""
    architecture = adapt(model)
    how = {"pattern": f"structured:{axis}", "sparsity": 0.5, "method": method, "repair": "none"}
    wanted = order(Recipe(**how), architecture)
    stops = walk(architecture, tokens)
    stop = next(stops)
    axes = [part for part in stop.block.axes if part.name == axis]
    return loops.look(stop, axis, axes, axes[0].size // 2, wanted, {})


def test_blocks_by_cosine(trained: Any, layers: Any) -> None:
    """ShortGPT: the blocks of least influence in the dense model, asked once."""
    influence = [
        block_influence(
            np.concatenate([stream for stream, _, _ in layer]),
            np.concatenate([stream + one.out for stream, _, one in layer]),
        )
        for layer in layers
    ]
    assert chosen(trained["mamba"], "cosine", 3) == np.argsort(influence)[:3].tolist()


def test_blocks_by_perplexity(trained: Any) -> None:
    """Mamba-Shedder (arXiv 2501.17088): greedily, the block without which the perplexity is lowest, every one
    asked in every turn; `exact` asks fewer and finds the same here."""
    model, tokens = trained["mamba"]
    gone: list[int] = []
    for _ in range(2):
        costs = {
            number: float(np.exp(loss(without(model, [*gone, number]), tokens)))
            for number in range(len(model.backbone.layers))
            if number not in gone
        }
        gone.append(min(costs, key=lambda number: costs[number]))
    assert chosen(trained["mamba"], "exact", 2) == gone


def chosen(trained: tuple[Any, Tensor], method: str, count: int) -> list[int]:
    architecture = adapt(trained[0])
    share = count / len(architecture.blocks)
    how = {"pattern": "structured:block", "sparsity": share, "method": method, "repair": "none"}
    return list(blocks.chosen_blocks(architecture, order(Recipe(**how), architecture), trained[1], None))
