"""The methods for A_log against float64 transcriptions of their papers, on traces of a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_mamba
from planned import prune
from torch import Tensor
from transcription import Trace, errors, normalise, remove_smallest, trace, vote_mask, weighted_score

from sparsessm import kernels
from sparsessm.architectures import adapt
from sparsessm.methods import DEFAULTS, entry_methods, sparsessm
from sparsessm.methods.exact import elimination_scores
from sparsessm.methods.observers import ErrorSums
from sparsessm.methods.repair import SKIP_DAMPING, error_of, refit_skip
from sparsessm.recipe.recipe import Recipe

METHODS = entry_methods()

REMOVED = {"memoryless": 38.0, "unit": 0.0}


def windows(count: int, length: int = 48, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(seed))


def masks(model: Any, tokens: Tensor, **fields: Any) -> list[np.ndarray]:
    """Keep-masks that a run chose, by comparing A_log before and after."""
    before = [layer.mixer.A_log.detach().clone() for layer in model.backbone.layers]
    fields = {"target": "ssm"} | fields
    if "pattern" not in fields:
        fields = {"allocation": "uniform"} | fields  # the papers' rule
    recipe = Recipe(**fields).resolved(model="pico", trained_length=tokens.shape[1])
    prune(adapt(model), recipe, tokens)
    after = [layer.mixer.A_log.detach() for layer in model.backbone.layers]
    return [(a == b).numpy() for a, b in zip(after, before, strict=True)]


def traces(model: Any, tokens: Tensor, layer: int) -> list[Trace]:
    """What the layer computes on each window, given the blocks before it as they are in `model`."""
    out = []
    for window in tokens:
        hidden = model.backbone.embeddings.weight.detach().double().numpy()[window.numpy()]
        for block in list(model.backbone.layers)[:layer]:
            hidden = hidden + trace(block.mixer, normalise(block.norm, hidden)).out
        block = model.backbone.layers[layer]
        out.append(trace(block.mixer, normalise(block.norm, hidden)))
    return out


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_vote_equals_the_paper(count: int, sparsity: float) -> None:
    tokens, model = windows(count), pico_mamba()
    dense = pico_mamba()
    got = masks(model, tokens, method="sparsessm-vote", sparsity=sparsity)
    for layer in range(2):
        a_log = dense.backbone.layers[layer].mixer.A_log.detach().double().numpy()
        want = vote_mask(a_log, _dense_layer(model, dense, tokens, layer), round(sparsity * a_log.size))
        assert np.array_equal(got[layer], want)


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("count", [1, 4])
def test_vote_in_groups_equals_the_paper_inside_each_group(count: int) -> None:
    tokens, model, dense = windows(count), pico_mamba(), pico_mamba()
    got = masks(model, tokens, method="sparsessm-vote", pattern="1:4")
    for layer in range(2):
        a_log = dense.backbone.layers[layer].mixer.A_log.detach().double().numpy()
        seen = _dense_layer(model, dense, tokens, layer)
        votes = np.zeros(a_log.shape)
        for t in range(48):
            score = a_log**2 * sum(one.before[t] ** 2 for one in seen)
            votes += ~keep_in_groups(score, 1, 4)
        assert np.array_equal(got[layer], keep_in_groups(-votes, 1, 4))


def keep_in_groups(score: np.ndarray, n: int, m: int) -> np.ndarray:
    groups = score.reshape(-1, m)
    return np.stack([remove_smallest(group, m - n) for group in groups]).reshape(score.shape)


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_time_weighted_equals_the_paper(count: int, power: float) -> None:
    tokens, model, dense = windows(count), pico_mamba(), pico_mamba()
    got = masks(model, tokens, method="sparsessm", time_weights=f"power:{power}")
    for layer in range(2):
        score = weighted_score(_dense_layer(model, dense, tokens, layer), power)
        assert np.array_equal(got[layer], remove_smallest(score, score.size // 2))


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("removed", ["memoryless", "unit"])
def test_exact_diagonal_equals_the_formula(removed: str) -> None:
    tokens, model, dense = windows(3), pico_mamba(), pico_mamba()
    got = masks(model, tokens, diagonal=True, removed=removed)
    for layer in range(2):
        mixer = dense.backbone.layers[layer].mixer
        seen = _dense_layer(model, dense, tokens, layer)
        score = sum((errors(mixer, one, removed) ** 2).sum(0) for one in seen)
        assert np.array_equal(got[layer], remove_smallest(score, score.size // 2))


def _dense_layer(model: Any, dense: Any, tokens: Tensor, layer: int) -> list[Trace]:
    """The dense layer on the inputs that the pruned layers before it produce."""
    mixed = pico_mamba()
    state = model.state_dict()
    own = {name: value for name, value in dense.state_dict().items() if f"layers.{layer}." in name}
    mixed.load_state_dict(state | own)
    return traces(mixed, tokens, layer)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    removed=st.sampled_from(["memoryless", "unit"]),
    share=st.floats(0, 1),
    refit=st.booleans(),
)
def test_quadratic_form_is_the_measured_error(seed: int, removed: str, share: float, refit: bool) -> None:
    """1'G1 is the output error of ANY mask, measured by running the layer again with the mask (float64, 1e-6
    relative)."""
    g = torch.Generator().manual_seed(seed)
    batch, length, channels, states = 2, 23, 5, 4
    u, z = (torch.randn(batch, length, channels, generator=g, dtype=torch.float64) for _ in range(2))
    delta = torch.rand(batch, length, channels, generator=g, dtype=torch.float64) * 2 + 1e-3
    A_log = torch.randn(channels, states, generator=g, dtype=torch.float64)
    B, C = (torch.randn(batch, length, states, generator=g, dtype=torch.float64) for _ in range(2))
    D = torch.randn(channels, generator=g, dtype=torch.float64)
    omega = torch.rand(channels, generator=g, dtype=torch.float64) + 0.1
    keep = torch.rand(channels, states, generator=g) >= share

    y, _, stats = kernels.selective_scan_stats(
        u, delta, -A_log.exp(), B, C, D, z, removed=removed, gram="full"
    )
    sums = ErrorSums(
        stats.gram * omega[:, None, None], stats.cross * omega[:, None], stats.power * omega, 0.0
    )
    change = refit_skip(sums, keep) if refit else None
    skip = D if change is None else D + change
    pruned = A_log.masked_fill(~keep, REMOVED[removed])
    other, _ = kernels.selective_scan(u, delta, -pruned.exp(), B, C, skip, z)
    measured = float(((y - other).square().sum((0, 1)) * omega).sum())
    assert error_of(sums, keep, change) == pytest.approx(
        measured, rel=1e-6, abs=1e-12 * float(y.square().sum())
    )


def test_reported_error_is_the_error_of_the_chosen_mask() -> None:
    """End to end in float32: the first layer's reported error against the transcription of the pruned
    layer."""
    tokens, model, dense = windows(3), pico_mamba(), pico_mamba()
    recipe = Recipe(target="ssm", sparsity=0.6, allocation="uniform")
    recipe = recipe.resolved(model="pico", trained_length=48)
    report = prune(adapt(model), recipe, tokens)
    mixer = dense.backbone.layers[0].mixer
    omega = (mixer.out_proj.weight.detach().double().numpy() ** 2).sum(0)
    pairs = list(zip(traces(dense, tokens, 0), traces(model, tokens, 0), strict=True))
    measured = sum(((a.y - b.y) ** 2 @ omega).sum() for a, b in pairs)
    assert report.rows[0].error == pytest.approx(measured, rel=1e-4)
    assert report.rows[0].signal == pytest.approx(sum((a.y**2 @ omega).sum() for a, _ in pairs), rel=1e-5)


def naive_elimination(gram: np.ndarray, count: int, group: int, removable: int) -> np.ndarray:
    """Greedy over channels: every channel lines up its own greedy sequence; always take the cheapest head."""
    channels, states, _ = gram.shape
    removed = [[] for _ in range(channels)]

    def head(d: int) -> tuple[float, int]:
        options = [
            (gram[d, j, j] + 2 * sum(gram[d, j, m] for m in removed[d]), j)
            for j in range(states)
            if j not in removed[d] and sum(m // group == j // group for m in removed[d]) < removable
        ]
        return min(options, default=(np.inf, -1))

    keep = np.ones((channels, states), dtype=bool)
    for _ in range(count):
        d = min(range(channels), key=lambda d: head(d)[0])
        j = head(d)[1]
        removed[d].append(j)
        keep[d, j] = False
    return keep


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), share=st.floats(0, 0.95))
def test_elimination_is_greedy(seed: int, share: float) -> None:
    factors = np.random.default_rng(seed).standard_normal((4, 6, 5))
    gram = factors @ factors.transpose(0, 2, 1)
    count = round(share * 24)
    scores = elimination_scores(torch.from_numpy(gram), 6, 6).numpy()
    assert np.array_equal(remove_smallest(scores, count), naive_elimination(gram, count, 6, 6))


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("removed", ["memoryless", "unit"])
def test_exact_is_greedy_on_the_error_after_the_refit(removed: str) -> None:
    """The default's mask against naive elimination on G - r r'/q, all from the transcription."""
    tokens, model, dense = windows(3), pico_mamba(), pico_mamba()
    got = masks(model, tokens, removed=removed, sparsity=0.4)
    for layer in range(2):
        mixer = dense.backbone.layers[layer].mixer
        omega = (mixer.out_proj.weight.detach().double().numpy() ** 2).sum(0)
        gram, cross, power = np.zeros((32, 8, 8)), np.zeros((32, 8)), np.zeros(32)
        for one in _dense_layer(model, dense, tokens, layer):
            e, through = errors(mixer, one, removed), np.sqrt(omega) * one.gate * one.u
            gram += np.einsum("tdn,tdm->dnm", e, e)
            cross += np.einsum("tdn,td->dn", e, through)
            power += (through**2).sum(0)
        power += SKIP_DAMPING * power.mean()
        refitted = gram - cross[:, :, None] * cross[:, None, :] / power[:, None, None]
        assert np.array_equal(got[layer], naive_elimination(refitted, round(0.4 * 256), 8, 8))


def test_elimination_respects_groups() -> None:
    factors = np.random.default_rng(0).standard_normal((3, 8, 8))
    gram = factors @ factors.transpose(0, 2, 1)
    scores = elimination_scores(torch.from_numpy(gram), 4, 2)
    assert (scores.isfinite().unflatten(1, (2, 4)).sum(-1) == 2).all()
    want = naive_elimination(gram, 12, 4, 2)
    assert np.array_equal(scores.isinf().numpy(), want)


def test_full_gram_with_refit_beats_the_diagonal_on_the_layer() -> None:
    """On the first layer both see the same input; the default's measured error must be the smaller one."""
    tokens, dense = windows(4), pico_mamba()
    omega = (dense.backbone.layers[0].mixer.out_proj.weight.detach().double().numpy() ** 2).sum(0)

    def measured(**fields: Any) -> float:
        model = pico_mamba()
        masks(model, tokens, sparsity=0.5, **fields)
        pairs = zip(traces(dense, tokens, 0), traces(model, tokens, 0), strict=True)
        return sum(((a.y - b.y) ** 2 @ omega).sum() for a, b in pairs)

    full, diagonal, random = measured(), measured(diagonal=True), measured(method="random")
    assert full < diagonal < random


def test_the_refit_of_a_shut_channel_stays_small() -> None:
    """A channel whose gate never opens has no power: D must not be fitted to nothing."""
    gram = torch.eye(4, dtype=torch.float64).expand(3, 4, 4).clone()
    cross = torch.full((3, 4), 1e-12, dtype=torch.float64)
    power = torch.tensor([1.0, 1e-25, 0.0], dtype=torch.float64)
    sums = ErrorSums(gram, cross, power, 0.0)
    change = refit_skip(sums, torch.zeros(3, 4, dtype=torch.bool))
    assert change.isfinite().all() and change.abs().max() < 1e-4
    nothing = ErrorSums(gram * 0, cross * 0, power * 0, 0.0)
    assert (refit_skip(nothing, torch.zeros(3, 4, dtype=torch.bool)) == 0).all()


def test_magnitude_and_random() -> None:
    tokens = windows(1)
    model = pico_mamba()
    a_log = model.backbone.layers[0].mixer.A_log.detach().double().numpy()
    assert np.array_equal(
        masks(model, tokens, method="magnitude")[0], remove_smallest(np.abs(a_log), a_log.size // 2)
    )
    first = masks(pico_mamba(), tokens, method="random", seed=3)
    again = masks(pico_mamba(), tokens, method="random", seed=3)
    other = masks(pico_mamba(), tokens, method="random", seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[0], first[1])


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if "ssm" in row.families])
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "6:8"])
def test_every_method_prunes_n_of_m(method: str, pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    for keep in masks(pico_mamba(), windows(2, 20), method=method, pattern=pattern):
        assert (keep.reshape(-1, m).sum(1) == n).all()


@pytest.mark.parametrize(
    "text,weights",
    [
        ("uniform", [1, 1, 1, 1]),
        ("linear", [4, 3, 2, 1]),
        ("power:1", [1, 1 / 2, 1 / 3, 1 / 4]),
        ("power:0", [1, 1, 1, 1]),
        ("power:2", [1, 1 / 4, 1 / 9, 1 / 16]),
        ("discount:0.5", [1, 1 / 2, 1 / 4, 1 / 8]),
        ("window:0.3", [1, 1, 0, 0]),
        ("window:1", [1, 1, 1, 1]),
    ],
)
def test_time_weights(text: str, weights: list[float]) -> None:
    torch.testing.assert_close(
        sparsessm.time_weights(text, 4), torch.tensor(weights, dtype=torch.float64) / sum(weights)
    )


@pytest.mark.parametrize(
    "text", ["power:x", "power:-1", "power:nan", "discount:0", "discount:2", "window:0", "uniform:1", "sine"]
)
def test_time_weights_refuse(text: str) -> None:
    with pytest.raises(ValueError, match="time_weights is .*allowed: uniform, linear, power:P"):
        sparsessm.time_weights(text, 20)


def test_rows_are_complete() -> None:
    for name, method in METHODS.items():
        assert name == method.name and method.summary and method.paper and method.families
        assert set(method.options) <= set(Recipe.model_fields)
        assert {"allocation"} <= set(method.defaults) <= {"repair", "price", "allocation", "grid"}
        assert ("repair" in method.defaults) == method.hessian
    assert set(DEFAULTS) == {family for method in METHODS.values() for family in method.families}
    assert all(family in METHODS[name].families for family, name in DEFAULTS.items())
