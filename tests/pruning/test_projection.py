"""Mamba-2 with projected states: the projections, the model in memory, files, engines, and what is said."""

from __future__ import annotations

import copy
import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Make, both, held, native, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import TEXT, pico_falcon_mamba, pico_mamba, pico_mamba2, pico_tokenizer
from pico_hybrids import pico_hybrid
from planned import prune
from safetensors.torch import load_file, save_file
from test_checkpoint import names, write_original, write_stock
from test_units import TOKENS, difference, lively, ordered, stock
from torch import Tensor
from typer.testing import CliRunner

import sparsessm
from sparsessm import checkpoint, cli, kernels, runtime
from sparsessm.architectures import adapt, projected
from sparsessm.checkpoint import Checkpoint, Encoded, container, packed, writing
from sparsessm.checkpoint.encoding import encode
from sparsessm.evaluation import before_after
from sparsessm.methods.balanced import balanced_truncation, energies
from sparsessm.methods.observers import StateMoments, StateSums
from sparsessm.pruning import preview
from sparsessm.pruning.projection import allot
from sparsessm.recipe.recipe import Recipe
from sparsessm.runtime.engine import NativeEngine
from sparsessm.runtime.reference import SLAB, ReferenceEngine, expected_shapes
from sparsessm.runtime.state import State

NAME = "backbone.layers.{}.mixer.{}"
B1, C1 = (NAME.format(1, matrix) for matrix in projected.MATRICES)
WORDS = {"pattern": "structured:state", "method": "balanced", "sparsity": 0.5}
FAST: dict[str, Any] = {"samples": 3, "length": 16, "data": "text.txt"}
needs_native = pytest.mark.skipif(kernels.LEVEL == "reference", reason="no native kernels run")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fresh directory with a text in it; threads and level as they were."""
    threads, level = torch.get_num_threads(), kernels.LEVEL
    (tmp_path / "text.txt").write_text(" ".join(random.Random(0).choices(TEXT.split(), k=4_000)))
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)
    kernels.LEVEL = level


# ------------------------------------------------------------------------------- the projections

SEEDS = st.integers(0, 10_000)


def gram(draw: torch.Generator, groups: int, states: int, rank: int) -> Tensor:
    """(G, N, N) moments of correlated data of a rank, directions of very different size."""
    rows = torch.randn(groups, 5 * states, rank, generator=draw, dtype=torch.float64)
    rows *= 2.0 ** -torch.arange(rank).double().div(2)
    basis = torch.linalg.qr(torch.randn(groups, states, rank, generator=draw, dtype=torch.float64)).Q
    data = rows @ basis.mT
    return data.mT @ data


def sums_of(p: Tensor, q: Tensor) -> StateSums:
    return StateSums(torch.empty(0), torch.empty(0), p, q, None)


def lost(p: Tensor, q: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """(G,): energy of C.h - C'.h' over data of these moments."""
    rest = torch.eye(p.shape[-1], dtype=torch.float64) - C.mT @ B
    return torch.einsum("gij,gjk,gkl,gil->g", q, rest, p, rest)


@given(seed=SEEDS, groups=st.integers(1, 3), states=st.integers(2, 7), scale=st.sampled_from([1, 1e-20, 1e9]))
@settings(deadline=None, max_examples=40)
def test_all_directions_are_all_of_the_output(seed: int, groups: int, states: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    p, q = gram(draw, groups, states, states) * scale, gram(draw, groups, states, states) / scale
    B, C = balanced_truncation(sums_of(p, q), states)
    assert B.shape == C.shape == (groups, states, states) and B.dtype == C.dtype == torch.float64
    h, c = torch.randn(2, 50, groups, states, generator=draw, dtype=torch.float64)
    seen = torch.einsum("grn,sgn->sgr", C, c) * torch.einsum("grn,sgn->sgr", B, h)
    torch.testing.assert_close(seen.sum(-1), (c * h).sum(-1), rtol=1e-6, atol=1e-6)


@given(seed=SEEDS, groups=st.integers(1, 3), states=st.integers(2, 7), data=st.data())
@settings(deadline=None, max_examples=40)
def test_no_directions_of_that_number_lose_less(
    seed: int, groups: int, states: int, data: st.DataObject
) -> None:
    """What is lost is the tail of the spectrum of P Q (Eckart-Young), which no other pair gets below."""
    r, draw = data.draw(st.integers(1, states - 1)), torch.Generator().manual_seed(seed)
    p, q = gram(draw, groups, states, states), gram(draw, groups, states, states)
    B, C = balanced_truncation(sums_of(p, q), r)
    assert B.shape == C.shape == (groups, r, states)
    squares = torch.linalg.eigvals(p @ q).real.sort(descending=True).values
    found, whole = lost(p, q, B, C), squares.sum(-1)
    torch.testing.assert_close(found / whole, squares[:, r:].sum(-1) / whole, rtol=1e-5, atol=1e-9)
    for size in (1e-3, 0.1, 10.0):
        noises = size * torch.randn(2, groups, r, states, generator=draw, dtype=torch.float64)
        near = lost(p, q, B + noises[0] * B.abs().mean(), C + noises[1] * C.abs().mean())
        assert (near >= found * (1 - 1e-9) - 1e-12 * whole).all()
        left = torch.linalg.qr(noises[0].mT).Q.mT
        assert (lost(p, q, left, left) >= found * (1 - 1e-9)).all(), "an orthogonal projection"
    for kept in (list(range(r)), list(range(states - r, states))):  # states as they are
        some = torch.eye(states, dtype=torch.float64)[kept].expand(groups, -1, -1)
        assert (lost(p, q, some, some) >= found * (1 - 1e-9)).all()


@given(seed=SEEDS, states=st.integers(2, 7), data=st.data())
@settings(deadline=None, max_examples=40)
def test_the_directions_are_balanced(seed: int, states: int, data: st.DataObject) -> None:
    r, draw = data.draw(st.integers(1, states)), torch.Generator().manual_seed(seed)
    p, q = gram(draw, 2, states, states), gram(draw, 2, states, states)
    B, C = balanced_truncation(sums_of(p, q), r)
    values = torch.linalg.eigvals(p @ q).real.sort(descending=True).values[:, :r].sqrt()
    for found in (B @ p @ B.mT, C @ q @ C.mT):
        torch.testing.assert_close(
            found, torch.diag_embed(values), rtol=1e-5, atol=1e-6 * float(values.max())
        )


@given(seed=SEEDS, states=st.integers(2, 7), data=st.data())
@settings(deadline=None, max_examples=40)
def test_directions_that_are_not_there_cost_nothing(seed: int, states: int, data: st.DataObject) -> None:
    """P or Q of a rank below r, or zero."""
    r, draw = data.draw(st.integers(1, states)), torch.Generator().manual_seed(seed)
    ranks = data.draw(st.integers(0, states)), data.draw(st.integers(0, states))
    p, q = (gram(draw, 1, states, rank) for rank in ranks)
    B, C = balanced_truncation(sums_of(p, q), r)
    assert torch.isfinite(B).all() and torch.isfinite(C).all()
    squares = torch.linalg.eigvals(p @ q).real.sort(descending=True).values
    whole = float((p.diagonal(dim1=1, dim2=2).sum() * q.diagonal(dim1=1, dim2=2).sum()).clamp(min=1e-30))
    assert abs(float(lost(p, q, B, C) - squares[:, r:].sum())) <= 1e-7 * whole
    if min(ranks) <= r:
        assert float(lost(p, q, B, C)) <= 1e-7 * whole


def test_groups_are_apart() -> None:
    draw = torch.Generator().manual_seed(3)
    p, q = gram(draw, 4, 5, 5), gram(draw, 4, 5, 5)
    p[2] *= 1e12  # what is zero, one group says for itself
    B, C = balanced_truncation(sums_of(p, q), 3)
    for g in range(4):
        alone = balanced_truncation(sums_of(p[g : g + 1], q[g : g + 1]), 3)
        torch.testing.assert_close(C[g].mT @ B[g], (alone[1].mT @ alone[0])[0], rtol=1e-8, atol=1e-8)


# -------------------------------------------------------------------------- the model in memory

ODD = {"hidden_size": 15, "num_heads": 6, "head_dim": 5, "n_groups": 3, "state_size": 7}
WIDE = {"hidden_size": 72, "num_heads": 3, "head_dim": 48, "n_groups": 1, "state_size": 20}
MANY = {"n_groups": 1, "state_size": 40}
Case = tuple[dict[str, Any], dict[int, int]]
CASES: dict[str, Case] = {
    "two groups, 3 and 5 of 8": ({}, {0: 3, 1: 5}),
    "one direction": ({"n_groups": 1}, {0: 1, 1: 1}),
    "as many groups as heads, all but one": ({"n_groups": 4}, {0: 7, 1: 7}),
    "all directions": ({}, {0: 8, 1: 8}),
    "the second layer only": ({}, {1: 2}),
    "the first layer only": ({"tie_word_embeddings": True}, {0: 2}),
    "odd sizes, biases": ({**ODD, "use_bias": True}, {0: 6, 1: 1}),
    "heads of 48 channels, 17 and 16": (WIDE, {0: 17, 1: 16}),
    "33 and 15 of 40": (MANY, {0: 33, 1: 15}),
    "one of two states": ({"state_size": 2, "use_conv_bias": False}, {0: 1, 1: 2}),
    "one tap": ({"conv_kernel": 1}, {0: 3, 1: 3}),
    "bounded steps": ({"time_step_limit": (0.02, 0.1)}, {0: 3, 1: 4}),
    "heads of one channel": ({"num_heads": 32, "head_dim": 1}, {0: 4, 1: 3}),
}
FORGETS = "heads without memory"  # the same with A_log = 38 here and there
cases = pytest.mark.parametrize("case", [*CASES, FORGETS])


def with_projections(model: Any, directions: Mapping[int, int], seed: int = 0) -> Any:
    """Random ones, so that what is projected wrongly shows."""
    draw = torch.Generator().manual_seed(seed)
    projected.attach(model, directions)
    for index in directions:
        for name in projected.MATRICES:
            matrix = getattr(model.backbone.layers[index].mixer, name)
            matrix.data.copy_(torch.randn(matrix.shape, generator=draw) / matrix.shape[2] ** 0.5)
    return model.eval()


def made(case: str) -> Any:
    fields, directions = ({}, {0: 3, 1: 5}) if case == FORGETS else CASES[case]
    model = lively(pico_mamba2(**fields))
    if case == FORGETS:
        model.backbone.layers[0].mixer.A_log.data[1::2] = 38.0
        model.backbone.layers[1].mixer.A_log.data[:] = 38.0
    return with_projections(model, directions)


def by_hand(model: Any, tokens: Tensor) -> Tensor:
    """Token by token in float64, each head for itself."""
    c, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    heads, channels, groups, states = c.num_heads, c.head_dim, c.n_groups, c.state_size
    inner, eps, (low, high) = heads * channels, c.layer_norm_epsilon, c.time_step_limit

    def normed(x: Tensor, weight: Tensor, parts: int = 1) -> Tensor:
        x = x.unflatten(-1, (parts, -1))
        return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight

    def zero(size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64)

    found = []
    for row in tokens:
        stream = [w["backbone.embeddings.weight"][token] for token in row.tolist()]
        for layer in range(c.num_hidden_layers):
            m = {name.split(f"layers.{layer}.")[1]: t for name, t in w.items() if f".layers.{layer}." in name}
            taps = m["mixer.conv1d.weight"][:, 0]  # (M, K)
            window = [zero(len(taps))] * taps.shape[1]
            h: dict[int, Tensor] = {}
            for t, x in enumerate(stream):
                bias = m.get("mixer.in_proj.bias", 0.0)
                fed = m["mixer.in_proj.weight"] @ normed(x, m["norm.weight"]) + bias
                z, mixed, step = fed.split([inner, len(taps), heads])
                window = [*window[1:], mixed]
                mixed = torch.stack([each * taps[:, k] for k, each in enumerate(window)]).sum(0)
                mixed = mixed + m.get("mixer.conv1d.bias", 0.0)
                mixed = mixed / (1 + torch.exp(-mixed))
                y = []
                for head in range(heads):
                    g = head // (heads // groups)
                    b = mixed[inner + g * states : inner + (g + 1) * states]
                    at = inner + (groups + g) * states
                    readout = mixed[at : at + states]
                    if "mixer.B_projection" in m:
                        b = m["mixer.B_projection"][g] @ b
                        readout = m["mixer.C_projection"][g] @ readout
                    size = torch.log1p(torch.exp(step[head] + m["mixer.dt_bias"][head])).clamp(low, high)
                    u = mixed[head * channels : (head + 1) * channels]
                    decay = torch.exp(-size * torch.exp(m["mixer.A_log"][head]))
                    before = h.get(head, torch.zeros(channels, len(b), dtype=torch.float64))
                    h[head] = decay * before + size * torch.outer(u, b)
                    y.append(h[head] @ readout + m["mixer.D"][head] * u)
                gated = torch.cat(y) * z / (1 + torch.exp(-z))
                out = m["mixer.out_proj.weight"] @ normed(gated, m["mixer.norm.weight"], groups)
                stream[t] = x + out + m.get("mixer.out_proj.bias", 0.0)
        head = w.get("lm_head.weight", w["backbone.embeddings.weight"])
        found.append(torch.stack([head @ normed(x, w["backbone.norm_f.weight"]) for x in stream]))
    return torch.stack(found)


@cases
def test_the_model_is_the_recurrence_behind_the_projections(case: str) -> None:
    model = made(case)
    want = by_hand(model, TOKENS[:2]).float()
    assert difference(stock(model, TOKENS[:2]), want) <= 2e-5
    assert difference(adapt(model).logits(TOKENS[:2]), want) <= 2e-5
    for name, parameter in model.named_parameters():  # or nothing was proved about them
        if name.endswith(projected.MATRICES):
            before = parameter.detach().clone()
            parameter.data.zero_()
            assert difference(stock(model, TOKENS[:2]), want) > 1e-3, name
            parameter.data.copy_(before)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_change_of_basis_changes_nothing(orthogonal: bool, groups: int) -> None:
    """T for B and its inverse transposed for C; of an orthogonal matrix they are the same."""
    model = lively(pico_mamba2(n_groups=groups))
    want, architecture = stock(model), adapt(model)
    draw = torch.Generator().manual_seed(5)
    for block in architecture.blocks:
        basis = torch.randn(groups, 8, 8, generator=draw, dtype=torch.float64)
        left, _, right = torch.linalg.svd(basis)
        sizes = torch.ones(8) if orthogonal else torch.linspace(0.25, 4, 8)
        basis = (left * sizes) @ right
        made_ = architecture.project(block, basis, torch.linalg.inv(basis).mT)
        assert architecture.blocks[block.index] is made_
    assert projected.directions_of(model) == {0: 8, 1: 8}
    assert difference(stock(model), want) <= 1e-5
    assert difference(architecture.logits(TOKENS), want) <= 1e-5


def test_a_cache_and_padding_are_refused_by_name() -> None:
    model = made("two groups, 3 and 5 of 8")
    with pytest.raises(ValueError, match=r"cannot hold projected states; .*runtime.*use_cache=False"):
        model(TOKENS, use_cache=True)
    mask = torch.ones_like(TOKENS)
    want = stock(model)
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, want), "no cache unless it is asked for"
        assert torch.equal(model(TOKENS, attention_mask=mask, use_cache=False).logits, want)
        mask[1, :3] = 0
        with pytest.raises(ValueError, match="does not support padding"):
            model(TOKENS, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("width", [1, 5, 8, 20])
@pytest.mark.parametrize("case", ["two groups, 3 and 5 of 8", "odd sizes, biases", "one tap"])
def test_slabs_of_time_equal_one_pass(case: str, width: int) -> None:
    architecture = adapt(made(case))
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        for block in architecture.blocks:
            whole, _ = block.forward(hidden)
            assert whole is not None
            state, parts = None, []
            for slab in hidden.split(width, 1):
                part, state = block.forward(slab, state)
                assert part is not None
                parts.append(part)
            assert difference(torch.cat(parts, 1), whole) <= 1e-5
            hidden = whole


def test_a_copy_of_a_block_is_its_own() -> None:
    model = made("two groups, 3 and 5 of 8")
    block: Any = adapt(model).blocks[1]
    hidden = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before, _ = block.forward(hidden)
        copied = block.copy()
        assert before is not None and torch.equal(copied.forward(hidden)[0], before)
        copied.layer.mixer.B_projection.data.mul_(2)
        assert torch.equal(block.forward(hidden)[0], before)
        block.layer.mixer.C_projection.data.zero_()
        assert not torch.equal(block.forward(hidden)[0], before)
        assert copied.layer.mixer.C_projection.abs().min() > 0


def test_attaching_keeps_the_tensors_and_draws_nothing() -> None:
    model = lively(pico_mamba2())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    projected.attach(model, {1: 3})
    assert torch.equal(torch.get_rng_state(), random_state)
    after = model.state_dict()
    assert {B1, C1} == after.keys() - before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert projected.directions_of(model) == {1: 3} and not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    projected.attach(model, {})
    assert projected.directions_of(pico_mamba2()) == {} == projected.directions_of(pico_mamba())


# ------------------------------------------------------------------------- the method and the loop


def settled(model: Any, tokens: Tensor = TOKENS, **recipe: Any) -> tuple[Any, list[Any]]:
    """A copy of the model after a run, and its rows."""
    architecture = adapt(copy.deepcopy(model))
    asked = Recipe(**WORDS | recipe).resolved(model="m", trained_length=tokens.shape[1])
    return architecture.model, prune(architecture, asked, tokens).rows


@pytest.mark.parametrize("price", ["none", None])
@pytest.mark.parametrize("repair", ["none", None])
@pytest.mark.parametrize(
    ("groups", "sparsity", "left"), [(1, 0.5, 4), (2, 0.75, 2), (4, 0.875, 1), (2, 0.125, 7)]
)
def test_nothing_but_mixers_two_matrices_and_the_cache_change(
    groups: int, sparsity: float, left: int, repair: str | None, price: str | None
) -> None:
    model = lively(pico_mamba2(n_groups=groups, num_hidden_layers=3))
    how = {"sparsity": sparsity, "repair": repair, "price": price}
    small, rows = settled(model, **how)
    found = projected.directions_of(small)
    counts = {layer: found.get(layer, 8) for layer in range(3)}
    assert sum(counts.values()) == 3 * left and min(counts.values()) >= 1
    before, after = model.state_dict(), small.state_dict()
    added = {NAME.format(layer, matrix) for layer in found for matrix in projected.MATRICES}
    assert after.keys() - before.keys() == added
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for layer in found:
        for matrix in projected.MATRICES:
            tensor = after[NAME.format(layer, matrix)]
            assert tensor.shape == (groups, counts[layer], 8) and tensor.isfinite().all()
    config, told = model.config.to_dict(), small.config.to_dict()
    assert {name for name in config if config[name] != told[name]} == {"use_cache"}
    assert small.config.use_cache is False and model.config.use_cache is True
    for name, module in model.named_modules():
        is_new = name in {f"backbone.layers.{layer}.mixer" for layer in found}
        assert type(small.get_submodule(name)) is (projected.ProjectedMixer if is_new else type(module)), name
    for index, row in enumerate(rows):
        assert (row.target, row.layer, row.family) == (f"backbone.layers.{index}.state", index, "state")
        assert (row.removed, row.method, row.repair, row.repaired) == ("projected", "balanced", "none", ())
        assert (row.total, row.pruned) == (8 * groups, (8 - counts[index]) * groups)
        assert row.price == (price or "fisher")
    again, same = settled(model, **how)
    assert same == rows and all(torch.equal(t, again.state_dict()[name]) for name, t in after.items())


def test_a_layer_that_nobody_hears_gives_its_directions_to_the_other() -> None:
    model = lively(pico_mamba2())
    model.backbone.layers[0].mixer.out_proj.weight.data.mul_(1e-6)
    small, rows = settled(model, ids_of(8 * 64).view(8, 64), price="none")
    assert projected.directions_of(small) == {0: 1, 1: 7} and [row.pruned for row in rows] == [14, 2]


@pytest.mark.parametrize("layer", [0, 1])
def test_every_layer_is_seen_as_it_is_in_the_dense_model(layer: int) -> None:
    model, tokens = lively(pico_mamba2()), ids_of(8 * 64).view(8, 64)
    small, _ = settled(model, tokens, price="none")
    block, moments = adapt(model).blocks[layer], StateMoments(4)  # 16 looks for each of 8 states
    with torch.inference_mode():
        hidden = model.backbone.embeddings(tokens)
        for before in model.backbone.layers[:layer]:
            hidden = before(hidden)
        block.forward(hidden, taps={"states": moments}, until="states")
    r = projected.directions_of(small)[layer]
    B, C = balanced_truncation(moments.result(), r)
    mixer = small.backbone.layers[layer].mixer
    found = mixer.C_projection.detach().double().mT @ mixer.B_projection.detach().double()
    assert difference(found, C.mT @ B) <= 1e-3


@pytest.mark.parametrize("price", ["none", None])
@pytest.mark.parametrize("value", [torch.nan, 1e30])
def test_what_is_not_finite_names_the_block(value: float, price: str | None) -> None:
    model = lively(pico_mamba2())
    model.backbone.layers[1].mixer.in_proj.weight.data.fill_(value)
    with pytest.raises(ValueError, match=r"^backbone\.layers\.1: .* not finite"):
        settled(model, price=price)


@given(seed=SEEDS, groups=st.integers(1, 3), states=st.integers(2, 7))
@settings(deadline=None, max_examples=25)
def test_energies_are_the_spectrum_of_p_q_and_what_is_lost(seed: int, groups: int, states: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    sums = sums_of(gram(draw, groups, states, states), gram(draw, groups, states, states))
    found = energies(sums)
    values = torch.linalg.eigvals(sums.states @ sums.readouts).real.sort(descending=True).values.sum(0)
    torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-9 * float(values.max()))
    for r in range(1, states):
        gone = lost(sums.states, sums.readouts, *balanced_truncation(sums, r)).sum()
        torch.testing.assert_close(gone, found[r:].sum(), rtol=1e-4, atol=1e-9 * float(values.sum()))


@given(layers=st.integers(1, 4), states=st.integers(2, 5), data=st.data())
@settings(deadline=None, max_examples=60)
def test_directions_are_shared_out_so_that_the_most_energy_stays(
    layers: int, states: int, data: st.DataObject
) -> None:
    """Against all ways to share them out; many energies are equal, or zero."""
    mean = data.draw(st.integers(1, states))
    each = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5]), min_size=states, max_size=states)
    table = [torch.tensor(sorted(data.draw(each), reverse=True), dtype=torch.float64) for _ in range(layers)]
    before = [row.clone() for row in table]
    counts = allot(table, mean)
    assert (
        len(counts) == layers and sum(counts) == layers * mean and 1 <= min(counts) <= max(counts) <= states
    )
    assert all(torch.equal(row, was) for row, was in zip(table, before, strict=True))

    def kept(shares: Sequence[int]) -> float:
        return sum(float(row[:count].sum()) for row, count in zip(table, shares, strict=True))

    ways = itertools.product(range(1, states + 1), repeat=layers)
    assert kept(counts) == max(kept(way) for way in ways if sum(way) == layers * mean)


def doubled(model: Any, kind: str) -> Any:
    """Every second B (or C) is a copy of the one before it: half of the directions are enough."""
    for layer in model.backbone.layers:
        mixer = layer.mixer
        inner, states, groups = mixer.intermediate_size, mixer.ssm_state_size, mixer.n_groups
        start = inner + (groups * states if kind == "C" else 0)
        for at in range(start, start + groups * states, 2):
            mixer.in_proj.weight.data[inner + at + 1] = mixer.in_proj.weight.data[inner + at]
            for tensor in (mixer.conv1d.weight.data, mixer.conv1d.bias.data):
                tensor[at + 1] = tensor[at]
    return model


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["B", "C"])
def test_directions_that_are_enough_lose_nothing_where_states_do(kind: str, groups: int) -> None:
    model = doubled(lively(pico_mamba2(n_groups=groups)), kind)
    want = stock(model)
    many = ids_of(8 * 64).view(8, 64)  # one in 16 is looked at: more readouts than there are states
    errors = {method: difference(stock(settled(model, many, method=method)[0]), want)
              for method in ("balanced", "exact", "ghost")}  # fmt: skip
    assert errors["balanced"] <= 2e-4
    assert min(errors["exact"], errors["ghost"]) > 50 * errors["balanced"], errors
    less = difference(stock(settled(model, many, sparsity=0.625)[0]), want)
    assert less > 10 * errors["balanced"], "a direction less is too few"


def test_who_cannot_be_projected_is_told_so() -> None:
    for model, kind in (
        (pico_mamba(), "Mamba"),
        (pico_falcon_mamba(), "FalconMamba"),
        (pico_hybrid("bamba"), "Bamba"),
    ):
        architecture = adapt(model)
        words = f"method 'balanced' projects the states of Mamba-2 models; this is a {kind}"
        with pytest.raises(ValueError, match=words):
            ordered(architecture, **WORDS)
        matrices = torch.zeros(2, 1, 4, 8)
        with pytest.raises(ValueError, match="cannot be projected"):
            architecture.project(architecture.blocks[0], *matrices)
    with pytest.raises(ValueError, match="about 0.5 of 1; shares that it has: none"):
        ordered(adapt(pico_mamba2(state_size=1)), **WORDS)


@pytest.mark.parametrize("axis", ["state", "head", "channel"])
@pytest.mark.parametrize("method", ["balanced", "exact"])
def test_what_is_projected_loses_blocks_and_nothing_else(axis: str, method: str) -> None:
    architecture = adapt(made("two groups, 3 and 5 of 8"))
    assert architecture.structure == ("block",) and not architecture.projects
    words = f"pattern 'structured:{axis}': only blocks can leave a model with projected states"
    if method == "balanced":
        words = "projects the states of Mamba-2 models; those of this one are projected already"
        words = words if axis == "state" else "method 'balanced' needs the pattern structured:state"
    with pytest.raises(ValueError, match=words):
        ordered(architecture, pattern=f"structured:{axis}", method=method)


@pytest.mark.parametrize("repair", ["none", None])
def test_a_projected_model_loses_a_block(repair: str | None) -> None:
    model = with_projections(lively(pico_mamba2(num_hidden_layers=3)), {0: 3, 1: 5, 2: 1})
    small, rows = settled(model, pattern="structured:block", method="exact", sparsity=1 / 3, repair=repair)
    assert [(row.target, row.pruned, row.removed) for row in rows] == [("blocks", 1, "cut")]
    assert small.config.num_hidden_layers == 2 and torch.isfinite(stock(small)).all()
    left = list(projected.directions_of(small).values())
    gone = next(index for index in range(3) if left == [r for i, r in enumerate((3, 5, 1)) if i != index])
    by_list = copy.deepcopy(model)
    del by_list.backbone.layers[gone]
    by_list.config.num_hidden_layers = 2
    same = torch.equal(stock(small), stock(by_list))
    assert same if repair else not same
    assert difference(stock(small), by_hand(small, TOKENS).float()) <= 2e-5


# ------------------------------------------------------------------------------ what is refitted


def changed(model: Any, small: Any) -> set[str]:
    """Kinds of tensors that are neither the same nor have fewer of the same rows and columns."""
    before, after = model.state_dict(), small.state_dict()

    def part(old: Tensor, new: Tensor) -> bool:
        if old.ndim == 0 or new.ndim != old.ndim:
            return torch.equal(old, new)
        for dim in range(old.ndim):
            if old.shape[dim] != new.shape[dim]:
                there = {tuple(row.flatten().tolist()) for row in old.movedim(dim, 0)}
                return all(tuple(row.flatten().tolist()) in there for row in new.movedim(dim, 0))
        return torch.equal(old, new)

    wrong = [name for name in before if not part(before[name], after[name])]
    return {name.split("mixer.")[-1] for name in wrong}


MAKES: dict[str, Callable[..., Any]] = {
    "mamba": pico_mamba,
    "falcon": pico_falcon_mamba,
    "mamba2": pico_mamba2,
}


@pytest.mark.parametrize("method", ["exact", "ghost", "magnitude"])
@pytest.mark.parametrize(
    ("kind", "fields", "told", "kinds"),
    [
        ("mamba2", {}, None, []),
        ("mamba2", {"n_groups": 1}, None, []),
        ("mamba2", {}, "dense-target", ["in_proj", "out_proj"]),
        ("mamba2", {}, "none", []),
        ("mamba", {}, None, ["x_proj"]),
        ("mamba", {}, "dense-target", ["in_proj", "x_proj", "dt_proj", "out_proj"]),
        ("mamba", {"state_size": 33}, None, ["in_proj", "x_proj", "dt_proj", "out_proj"]),
        ("falcon", {}, None, ["in_proj", "x_proj", "dt_proj", "out_proj"]),
        ("falcon", {}, "none", []),
    ],
)
def test_states_alone_are_no_reason_to_refit(
    kind: str, fields: dict[str, Any], told: str | None, kinds: list[str], method: str
) -> None:
    model = lively(MAKES[kind](**fields, **({} if kind == "mamba2" else {"time_step_rank": 3})))
    small, rows = settled(model, method=method, repair=told, sparsity=0.5)
    found = changed(model, small)
    assert found <= {f"{name}.weight" for name in kinds}
    if kinds:  # in_proj of the first layer is fed what it was; that of the others is not
        assert found == {f"{name}.weight" for name in kinds}
    for index, row in enumerate(rows):
        said = {NAME.format(index, f"{name}.weight") for name in kinds}
        assert set(row.repaired) == said and row.repair == ("dense-target:1" if kinds else "none")


@pytest.mark.parametrize("method", ["balanced", "exact"])
def test_a_preview_promises_no_refit_that_is_not_done(method: str) -> None:
    architecture = adapt(pico_mamba2())
    assert (
        preview.units(ordered(architecture, **WORDS | {"method": method}), architecture)["repair"] == "none"
    )


def test_a_preview_does_not_guess_how_many_parameters_come() -> None:
    architecture = adapt(pico_mamba2())
    told = preview.units(ordered(architecture, **WORDS), architecture)["parameters"]
    assert told == {"now": sum(p.numel() for p in architecture.model.parameters()), "after": None}


@pytest.mark.parametrize(("share", "left"), [(0.01, 7), (0.99, 1), (0.4, 5)])
def test_any_share_is_possible_and_something_goes(share: float, left: int) -> None:
    assert ordered(adapt(pico_mamba2()), **WORDS | {"sparsity": share}).sizes == {"state": left}


# ------------------------------------------------------------------------------------------ files


def write_dense(folder: Path, layout: str = "transformers", dtype: torch.dtype = torch.bfloat16) -> None:
    if layout == "state-spaces":
        model = lively(pico_mamba2(n_groups=1))
        told = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "chunk_size": 8, "ngroups": 1}
        write_original(folder, model, dtype, ssm_cfg=told)
        pico_tokenizer(60).save_pretrained(folder)
        return
    lively(pico_mamba2()).to(dtype).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)


def write_projected(folder: Path, layout: str = "transformers") -> Checkpoint:
    """A dense checkpoint "dense" pruned by `balanced` into a directory; what is in memory."""
    write_dense(Path("dense"), layout)
    model = sparsessm.load("dense")
    report = sparsessm.prune(model, **WORDS, **FAST, measure=False)
    sparsessm.save(model, folder, report)
    return model


@pytest.fixture
def half() -> Checkpoint:
    """In memory, and in directory "half": 4 directions in place of 8 states in both layers."""
    write_dense(Path("dense"))
    model = sparsessm.load("dense")
    architecture = adapt(model.model, model.stored)
    draw = torch.Generator().manual_seed(7)
    for block in architecture.blocks:
        architecture.project(block, *torch.randn(2, 2, 4, 8, generator=draw) / 2)
    model.stored = dict(architecture.stored)
    sparsessm.save(model, "half")
    return model


def assert_same_tensors(left: Any, right: Any) -> None:
    one, other = left.state_dict(), right.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("layout", ["transformers", "state-spaces"])
def test_there_and_back_to_the_bit(layout: str) -> None:
    model = write_projected(Path("half"), layout)
    dense, came = sparsessm.load("dense"), sparsessm.load("half")
    assert came.format == model.format == layout
    assert came.stored == model.stored and not came.model.training
    directions = projected.directions_of(came.model)
    assert directions == projected.directions_of(model.model) and sum(directions.values()) == 8
    assert_same_tensors(came.model, model.model)
    assert torch.equal(stock(came.model), stock(model.model))
    assert difference(stock(came.model), stock(dense.model)) > 1e-3
    held_, weights = packed.read("half").tensors, came.model.state_dict()
    for name, tensor in held_.items():
        assert tensor.dtype == dense.stored.get(name, torch.float32), name
        assert torch.equal(tensor.decode(torch.float32), weights[name])
    assert {tensor.dtype for tensor in held_.values()} == {torch.float32, torch.bfloat16}
    assert came.model.config.state_size == 8 and came.model.config.use_cache is False
    assert not any(name.startswith(("model", "pytorch_model")) for name in names(Path("half")))
    sparsessm.save(came, "again")
    files = {name: Path("again", name).read_bytes() for name in names(Path("again"))}
    assert files[container.PACKED] == Path("half", container.PACKED).read_bytes()
    ready = runtime.load("half")
    ids = TOKENS[0]
    assert difference(ready.logits(ids), stock(model.model, ids[None])[0]) <= 2e-5


def test_the_record_and_the_card_say_what_it_is() -> None:
    model = write_projected(Path("half")).model
    text = Path("half/README.md").read_text()
    words = " ".join(text.split())
    assert "library_name" not in text and "AutoModelForCausalLM" not in text
    assert "only sparsessm can load" in words and "50.00 %" in words
    record = json.loads(Path("half/pruning.json").read_text())
    assert {row["removed"] for row in record["targets"]} == {"projected"}
    assert [row["pruned"] for row in record["targets"]] == [
        2 * (8 - projected.directions_of(model).get(layer, 8)) for layer in range(2)
    ]
    assert model.config.state_size == 8


def test_what_no_stock_checkpoint_can_hold(half: Checkpoint) -> None:
    before = names(Path())
    for attempt in (
        lambda: checkpoint.unpack("half", "out"),
        lambda: writing.save(half, "out"),
        lambda: writing.save(sparsessm.load("half"), "out"),
    ):
        with pytest.raises(ValueError, match=r"'(half|dense)' has projected states, which no stock"):
            attempt()
        assert names(Path()) == before


@pytest.mark.parametrize("dtype", [None, "bf16", "int8"])
def test_a_projected_directory_is_packed_again_in_another_dtype(half: Checkpoint, dtype: str | None) -> None:
    told = packed.pack("half", "small", dtype=dtype, head="int8" if dtype == "int8" else None)
    was, now = packed.read("half").tensors, packed.read("small").tensors
    assert was.keys() == now.keys() and told.after == Path("small", container.PACKED).stat().st_size
    for layer in range(2):
        for name in projected.MATRICES:
            old, new = was[NAME.format(layer, name)], now[NAME.format(layer, name)]
            assert new.values.dtype == new.dtype == torch.float32
            assert torch.equal(new.decode(), old.decode())
        kept = now[NAME.format(layer, "in_proj.weight")].values.dtype
        assert kept == (torch.int8 if dtype == "int8" else torch.bfloat16)
    model = runtime.load("small")
    weights = {name: tensor.decode(torch.float32) for name, tensor in now.items()}
    truth, ids = ReferenceEngine(model.config, weights), TOKENS[0]
    want = truth.prompt(ids, truth.new_state(1)[0], every=True)
    assert difference(model.logits(ids), want) <= (0.08 if dtype == "int8" else 2e-5)
    assert difference(stock(sparsessm.load("small").model, ids[None])[0], want) <= 2e-5
    assert names(Path("small")) == names(Path("half"))


def test_a_packed_directory_without_projections_is_not_packed_again() -> None:
    write_dense(Path("dense"))
    packed.pack("dense", "packed")
    with pytest.raises(ValueError, match="is already packed"):
        packed.pack("packed", "again", dtype="bf16")
    assert not Path("again").exists()


def as_it(name: str, values: Tensor) -> dict[str, Encoded]:
    return {name: encode(name, values, kind="dense")}


def without(name: str) -> Callable[[dict[str, Encoded]], dict[str, Encoded]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def both_of(*shape: int) -> Callable[[dict[str, Encoded]], dict[str, Encoded]]:
    return lambda tensors: tensors | as_it(B1, torch.ones(shape)) | as_it(C1, torch.ones(shape))


def one_of(name: str, *shape: int) -> Callable[[dict[str, Encoded]], dict[str, Encoded]]:
    return lambda tensors: tensors | as_it(name, torch.ones(shape))


def no_directions(tensors: dict[str, Encoded]) -> dict[str, Encoded]:
    """As only the container writes it."""
    none = {name: replace(tensors[name], shape=(2, 0, 8), values=torch.empty(2, 0, 8)) for name in (B1, C1)}
    return tensors | none


WRONG: list[tuple[Callable[[dict[str, Encoded]], dict[str, Encoded]], str]] = [
    (without(B1), f"missing tensors: {B1}"),
    (without(C1), f"missing tensors: {C1}"),
    (one_of(B1, 2, 5, 8), f"wrong shapes: {B1}"),
    (one_of(C1, 2, 5, 8), "wrong shapes: .*_projection"),
    (one_of(B1, 2, 4), f"wrong shapes: {B1}"),
    (one_of(C1, 2, 4, 8, 1), f"wrong shapes: {C1}"),
    (one_of(C1, 2, 4, 7), f"wrong shapes: {C1}"),
    (one_of(B1, 1, 4, 8), f"wrong shapes: {B1}"),
    (one_of(B1, 2, 9, 8), f"wrong shapes: {B1}"),
    (both_of(2, 9, 8), f"tensors the model does not have: .*{B1}"),
    (no_directions, f"tensors the model does not have: .*{B1}"),
    (both_of(2, 4, 9), f"wrong shapes: .*{B1}"),
    (one_of(NAME.format(2, "B_projection"), 2, 4, 8), r"does not have: backbone\.layers\.2\.mixer\.B_proj"),
    (one_of(NAME.format("01", "B_projection"), 2, 4, 8), r"does not have: backbone\.layers\.01\.mixer\.B_p"),
    (one_of(NAME.format(10**30, "B_projection"), 2, 4, 8), "does not have: .*0000.mixer.B_projection"),
    (one_of("B_projection", 2, 4, 8), "does not have: B_projection"),
    (one_of(NAME.format(0, "D_projection"), 2, 4, 8), "does not have: .*mixer.D_projection"),
]


@pytest.mark.parametrize(("spoil", "words"), WRONG)
def test_projections_that_do_not_fit_are_refused_by_name(
    half: Checkpoint, spoil: Callable[[dict[str, Encoded]], dict[str, Encoded]], words: str
) -> None:
    container.write(Path("half", container.PACKED), "transformers", spoil(dict(packed.read("half").tensors)))
    assert half.source == "dense"
    for attempt in (packed.read, sparsessm.load, runtime.load, lambda path: packed.pack(path, "out")):
        with pytest.raises(ValueError, match=words) as caught:
            attempt("half")
        assert "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_a_projection_that_is_not_a_number_is_refused(half: Checkpoint) -> None:
    tensors = dict(packed.read("half").tensors)
    broken = half.model.state_dict()[B1].clone()
    broken[0, 0, 0] = torch.inf
    container.write(
        Path("half", container.PACKED), "transformers", tensors | {B1: replace(tensors[B1], values=broken)}
    )
    with pytest.raises(ValueError, match=B1):
        sparsessm.load("half")


def test_a_mamba_1_has_no_projections() -> None:
    write_stock(Path("one"))
    packed.pack("one", "small")
    tensors = dict(packed.read("small").tensors)
    for shape in ((1, 4, 8), (2, 4, 8)):
        container.write(
            Path("small", container.PACKED), "transformers", tensors | as_it(B1, torch.ones(shape))
        )
        for attempt in (packed.read, sparsessm.load, runtime.load):
            with pytest.raises(ValueError, match=f"does not have: {B1}"):
                attempt("small")


def test_a_stock_file_has_no_projections(half: Checkpoint) -> None:
    file = Path("dense/model.safetensors")
    more = {name: half.model.state_dict()[name].clone() for name in (B1, C1)}
    save_file(load_file(file) | more, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"does not have: .*{B1}"):
        sparsessm.load("dense")


@pytest.mark.parametrize("recipe", [{"method": "magnitude"}, {}, {"target": "ssm"}, {"pattern": "2:4"}])
def test_single_entries_of_a_projected_model_go_as_of_any(half: Checkpoint, recipe: dict[str, Any]) -> None:
    assert half.source == "dense"
    model = sparsessm.load("half")
    report = sparsessm.prune(model, **recipe, **FAST, sparsity=0.5, measure=False)
    assert {row.removed for row in report.rows} <= {"zero", "memoryless"} and len(report.rows) > 1
    assert projected.directions_of(model.model) == {0: 4, 1: 4}
    assert difference(stock(model.model), by_hand(model.model, TOKENS).float()) <= 2e-5
    before = half.model.state_dict()
    for name in (B1, C1):
        assert torch.equal(model.model.state_dict()[name], before[name])
    sparsessm.save(model, "thin", report)
    came = sparsessm.load("thin")
    assert_same_tensors(came.model, model.model)
    assert torch.equal(stock(came.model), stock(model.model))
    assert difference(runtime.load("thin").logits(TOKENS[0]), stock(came.model, TOKENS[:1])[0]) <= 2e-5
    if "target" not in recipe:  # heads without memory make no file smaller
        assert Path("thin", container.PACKED).stat().st_size < Path("half", container.PACKED).stat().st_size


@pytest.mark.parametrize("recipe", [{"method": "magnitude"}, {"pattern": "structured:block"}])
def test_the_card_of_a_projected_model_pruned_further_names_what_loads_it(
    half: Checkpoint, recipe: dict[str, Any]
) -> None:
    assert half.source == "dense"
    model = sparsessm.load("half")
    report = sparsessm.prune(model, **recipe, **FAST, sparsity=0.5, measure=False)
    sparsessm.save(model, "thin", report)
    assert (Path("thin") / container.PACKED).is_file()
    text = Path("thin/README.md").read_text()
    assert "AutoModelForCausalLM" not in text and "library_name: transformers" not in text


@pytest.mark.parametrize("layout", ["transformers", "state-spaces"])
def test_a_projected_model_without_a_block_comes_back(layout: str) -> None:
    was = projected.directions_of(write_projected(Path("half"), layout).model)
    model = sparsessm.load("half")
    report = sparsessm.prune(model, pattern="structured:block", sparsity=0.5, **FAST, measure=False)
    sparsessm.save(model, "one", report)
    came = sparsessm.load("one")
    assert came.model.config.num_hidden_layers == 1 and len(was) == 2
    assert projected.directions_of(came.model) in ({0: was[0]}, {0: was[1]})
    assert_same_tensors(came.model, model.model)
    assert difference(runtime.load("one").logits(TOKENS[0]), stock(model.model, TOKENS[:1])[0]) <= 2e-5


# ---------------------------------------------------------------------------------------- engines


def stepped(engine: Any, ids: Tensor, state: Tensor) -> Tensor:
    return torch.cat([engine.step(token[None], state) for token in ids])


def ids_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (count,), generator=torch.Generator().manual_seed(seed))


@both
@cases
def test_engines_are_the_model_in_memory(make: Make, case: str) -> None:
    model, ids = made(case), ids_of(70)
    want, engine = stock(model, ids[None])[0], make(model)
    read, state = engine.new_state(1), engine.new_state(1)
    assert difference(engine.prompt(ids, read[0], every=True), want) <= 2e-5
    assert difference(stepped(engine, ids, state), want) <= 2e-5
    assert state.numel() == 0 or float((state - read).abs().max()) <= 2e-5 * float(read.abs().max())
    mixed, other = engine.new_state(1), ids_of(9, seed=1)
    engine.prompt(ids[:40], mixed[0])  # from prompts to steps and back
    assert difference(stepped(engine, ids[40:50], mixed), want[40:50]) <= 2e-5
    assert difference(engine.prompt(ids[50:], mixed[0]), want[-1]) <= 2e-5
    assert difference(engine.prompt(other, engine.new_state(1)[0]), stock(model, other[None])[0, -1]) <= 2e-5


@both
def test_a_prompt_longer_than_a_slab(make: Make) -> None:
    model, ids = made(FORGETS), ids_of(SLAB + 20)
    assert (
        difference(
            (engine := make(model)).prompt(ids, engine.new_state(1)[0]), stock(model, ids[None])[0, -1]
        )
        <= 2e-5
    )


@needs_native
@cases
def test_levels_agree_and_threads_change_no_bit(case: str) -> None:
    model, ids = made(case), ids_of(16)
    want = stock(model, ids[None])[0]
    tensors = packed.of(held(model)).tensors
    for level in kernels.LEVELS[1:]:
        kernels.LEVEL = level
        engine = NativeEngine(model.config, tensors, threads=1)
        state = engine.new_state(1)
        alone = stepped(engine, ids, state)
        assert difference(alone, want) <= 2e-5, level
        engine = NativeEngine(model.config, tensors, threads=2)
        other = engine.new_state(1)
        assert torch.equal(stepped(engine, ids, other), alone) and torch.equal(other, state), level


@both
@pytest.mark.parametrize("case", [FORGETS, "odd sizes, biases", "heads of 48 channels, 17 and 16"])
def test_a_sequence_is_bit_for_bit_what_it_is_alone(make: Make, case: str) -> None:
    engine = make(made(case))
    states = engine.new_state(5)
    for i in range(5):
        engine.prompt(ids_of(3 + 2 * i, seed=i), states[i])
    alone = states.clone()
    for turn in range(3):
        torch.set_num_threads(1 + turn % 2 * (make is native))  # a BLAS's sums may depend on them
        ids = ids_of(5, seed=turn)
        together = engine.step(ids, states)
        torch.set_num_threads(1)
        for i in range(5):
            assert torch.equal(engine.step(ids[i : i + 1], alone[i : i + 1])[0], together[i])
        assert torch.equal(alone, states)


@both
@cases
def test_a_state_is_smaller_by_the_directions_that_went(make: Make, case: str) -> None:
    model = made(case)
    c, expected = model.config, 0
    directions = projected.directions_of(model)
    for index, layer in enumerate(model.backbone.layers):
        # only the native engine leaves out heads without memory
        kept = c.num_heads if make is reference else int((layer.mixer.A_log < 38).sum())
        convolution = (c.conv_kernel - 1) * (c.num_heads * c.head_dim + 2 * c.n_groups * c.state_size)
        expected += convolution + kept * c.head_dim * directions.get(index, c.state_size)
    engine = make(model)
    assert engine.state_size == expected and engine.new_state(3).shape == (3, expected)


@both
def test_a_layout_is_of_one_projected_model(make: Make) -> None:
    fields, r = {"state_size": 6}, {0: 3, 1: 3}
    models = [
        pico_mamba2(**fields),
        with_projections(pico_mamba2(**fields), r),
        with_projections(pico_mamba2(**fields), r, seed=1),
        with_projections(pico_mamba2(**fields), {0: 3}),
        with_projections(pico_mamba2(**fields), {0: 3, 1: 2}),
    ]
    layouts = [make(model).layout for model in models]
    assert len(set(layouts)) == 5
    assert make(with_projections(pico_mamba2(**fields), r)).layout == layouts[1]
    first, other = (runtime.of(held(model)) for model in models[:2])
    part = other.generate([1, 2], 2, ignore_eos=True)
    with pytest.raises(ValueError, match="belongs to another model"):
        first.generate([1], 1, state=part.state)


@both
def test_weights_that_the_engine_holds_count_the_projections(make: Make) -> None:
    dense, model = pico_mamba2(), with_projections(pico_mamba2(), {0: 3, 1: 5})
    more = sum(getattr(layer.mixer, name).nbytes for layer in model.backbone.layers
               for name in projected.MATRICES)  # fmt: skip
    assert make(model).nbytes - make(dense).nbytes == more


@cases
def test_shapes_are_those_of_the_model(case: str) -> None:
    model = made(case)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert expected_shapes(model.config, projected.directions_of(model)) == shapes
    assert projected.directions_in(shapes, model.config) == projected.directions_of(model)
    assert sorted(projected.named_in(shapes)) == [n for n in sorted(shapes) if n.endswith("_projection")]


@pytest.mark.parametrize("name", [B1, C1])
def test_one_projection_without_the_other_is_refused_by_the_definition(name: str) -> None:
    model = made("two groups, 3 and 5 of 8")
    weights = {key: tensor for key, tensor in model.state_dict().items() if key != name}
    with pytest.raises(ValueError, match=f"have no {name}"):
        ReferenceEngine(model.config, weights)


@pytest.mark.parametrize("shape", [(2, 7, 8), (2, 3, 7), (1, 3, 8), (2, 3, 8, 1)])
def test_a_projection_of_another_shape_is_refused_by_the_definition(shape: tuple[int, ...]) -> None:
    model = made("two groups, 3 and 5 of 8")
    with pytest.raises(ValueError, match=rf"{B1} has shape"):
        ReferenceEngine(model.config, model.state_dict() | {B1: torch.ones(shape)})


@pytest.mark.parametrize("shape", [(2, 9, 8), (5, 8), (2, 0, 8)])
def test_a_pair_of_another_shape_is_refused_by_the_definition(shape: tuple[int, ...]) -> None:
    model = made("two groups, 3 and 5 of 8")
    pair = {name: torch.ones(shape) for name in (B1, C1)}
    with pytest.raises(ValueError, match="_projection"):
        ReferenceEngine(model.config, model.state_dict() | pair)


@needs_native
@pytest.mark.parametrize("directions", [0, 9, -1])
def test_directions_that_there_cannot_be_are_refused_by_the_decoder(directions: int) -> None:
    from sparsessm.kernels.matrix import Decoder

    model = made("two groups, 3 and 5 of 8")
    engine: Any = native(model)
    layers = [layer.native() for layer in engine._layers]
    sizes = {"width": 16, "states": 8, "taps": 4, "vocabulary": 64, "epsilon": 1e-5}
    sizes |= type(engine._layers[0]).sizes(model.config)
    rest = {"norm": engine._norm, "embedding": engine._embedding, "head": engine._head}
    Decoder(sizes, layers, rest)
    with pytest.raises(ValueError, match="directions must be between 1 and the number of states"):
        Decoder(sizes, [layers[0] | {"directions": directions}, layers[1]], rest)
    short = {"B_projection": layers[0]["B_projection"][:-1]}
    with pytest.raises(ValueError, match="B_projection"):
        Decoder(sizes, [layers[0] | short, layers[1]], rest)


def test_a_text_is_what_the_model_in_memory_goes_on_with() -> None:
    model = made("33 and 15 of 40")
    ids = fed = ids_of(9)
    for _ in range(12):
        fed = torch.cat([fed, stock(model, fed[None])[0, -1:].argmax(1)])
    ready = runtime.of(held(model))
    assert ready.generate(ids, 12, ignore_eos=True).ids == fed[9:].tolist()
    part = ready.generate(ids, 5, ignore_eos=True)
    part.state.save("state")
    fork = State.load("state")
    assert part.ids + ready.generate([], 7, state=fork, ignore_eos=True).ids == fed[9:].tolist()


# ------------------------------------------------------------------------------- the command line


def run(*arguments: str, code: int = 0) -> Any:
    outcome = CliRunner().invoke(cli.app, list(arguments))
    assert outcome.exit_code == code, (outcome.stdout, outcome.stderr, outcome.exception)
    return outcome


PRUNE = ["prune", "dense", "--pattern", "structured:state", "--method", "balanced", "--sparsity", "0.5"]
OPTIONS = ["--data", "text.txt", "--samples", "3", "--length", "16"]


def test_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before_after, "WINDOWS", 2)
    write_dense(Path("dense"))
    before = names(Path())
    told = json.loads(run(*PRUNE, *OPTIONS, "--dry-run", "--json").stdout)
    assert names(Path()) == before
    words = run(*PRUNE, *OPTIONS, "--dry-run").stdout
    assert "balanced" in words and "state" in words
    outcome = run(*PRUNE, *OPTIONS, "-o", "half")
    assert "only sparsessm can load" in " ".join(outcome.stdout.split())
    assert container.PACKED in names(Path("half"))
    model = sparsessm.load("half").model
    assert told["parameters"]["after"] is None and told["axes"]["state"]["after"] == 4

    facts = json.loads(run("inspect", "half", "--json").stdout)
    kinds = {name for name in facts["tensors"] if "projection" in name}
    assert len(kinds) == 2
    gone = [model.config.state_size - r for r in projected.directions_of(model).values()]
    groups = model.config.n_groups
    counted = {f"backbone.layers.{i}.state": count * groups for i, count in enumerate(gone)}
    assert facts["removed"] == counted, "counted in the tensors"
    assert "balanced" in run("inspect", "half").stdout

    found = json.loads(run("eval", "half", "--data", "text.txt", "--length", "16", "--json").stdout)
    expected = sparsessm.evaluate(sparsessm.load("half"), "text.txt", length=16)
    (row,) = found["models"]
    assert row["nll"] == pytest.approx(expected.nll, rel=1e-5) and row["windows"] == expected.windows

    text = run("generate", "half", "the state", "-n", "8", "--temperature", "0").stdout
    assert text.strip()
    refused = run("unpack", "half", "-o", "stock", "--quiet", code=1)
    assert refused.stderr.startswith("error: ") and "projected states" in refused.stderr
    assert not Path("stock").exists()
    run("pack", "half", "-o", "small", "--dtype", "bf16", "--quiet")
    again = run("prune", "half", "-o", "more", *PRUNE[2:], *OPTIONS, "--quiet", code=1)
    assert again.stderr.startswith("error: ") and "projected already" in again.stderr
    assert not Path("more").exists()


def test_a_record_that_says_more_than_the_tensors_is_refused() -> None:
    write_dense(Path("dense"))
    for name, share in (("half", 0.5), ("little", 0.2)):
        model = sparsessm.load("dense")
        report = sparsessm.prune(
            model, **FAST, pattern="structured:state", method="balanced", sparsity=share, measure=False
        )
        sparsessm.save(model, name, report)
    shutil.copy("little/packed.safetensors", "half/packed.safetensors")
    line = run("inspect", "half", code=1).stderr
    assert line.startswith("error: half/pruning.json does not fit the tensors") and ".state has" in line


def test_stock_code_does_not_save_what_it_cannot_say() -> None:
    write_dense(Path("dense"))
    config = Path("dense/config.json").read_bytes()
    model = sparsessm.load("dense")
    sparsessm.save(model, "half", sparsessm.prune(model, **FAST, **WORDS, measure=False))
    with pytest.raises(ValueError, match=r"save it with sparsessm\.save"):
        model.model.save_pretrained("stock")
    assert not Path("stock").exists() and Path("half/config.json").read_bytes() == config


def test_int8_is_not_undone_by_packing_again() -> None:
    write_dense(Path("dense"))
    model = sparsessm.load("dense")
    sparsessm.save(model, "half", sparsessm.prune(model, **FAST, **WORDS, measure=False))
    run("pack", "half", "-o", "small", "--dtype", "int8", "--quiet")
    assert "is already in int8" in run("pack", "small", "-o", "again", code=1).stderr


def test_the_command_line_refuses_other_models_before_any_work() -> None:
    write_stock(Path("dense"))
    line = run(*PRUNE, *OPTIONS, "-o", "out", "--quiet", code=1).stderr
    assert line.startswith("error: method 'balanced' projects the states of Mamba-2 models; this is")
    assert line.count("\n") == 1 and not Path("out").exists()
