"""What an expert borrows of its layer: against brute force in float64 on fresh tokens, and at both ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsessm.methods.borrowing import drawn, of_layer, settled
from sparsessm.methods.hessian import factorise
from sparsessm.methods.observers import InputGram, InputNorm, Moments
from sparsessm.methods.patterns import Unstructured
from sparsessm.methods.repair import sweep

WIDTH, ROWS = 48, 40


def inputs(count: int, seed: int, own: float = 0.3) -> Tensor:
    """(count, WIDTH) of a layer with some strong directions, which an expert stretches in its own way."""
    draw = torch.Generator().manual_seed(99)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64)).Q
    sizes = torch.linspace(2, -2, WIDTH, dtype=torch.float64).exp()
    stretched = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed % 7), dtype=torch.float64)
    fresh = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return fresh * sizes * (own * stretched).exp() @ basis.T


def moments(x: Tensor, dense: Tensor | None = None, diagonal: bool = False) -> Moments:
    gram = x.T @ x / max(len(x), 1)
    cross = None if dense is None else dense.T @ x / max(len(x), 1)
    if not len(x):
        return Moments(torch.empty(0) if diagonal else torch.empty(0, 0), None, diagonal, 0)
    return Moments(gram.diagonal() if diagonal else gram, None if diagonal else cross, diagonal, len(x))


LAYER = torch.cat([inputs(4000, seed) for seed in range(7)])


def lost(seen: Moments, weight: Tensor, fresh: Tensor) -> float:
    """Share of the energy of fresh outputs that half of the weights take along, repaired by what was seen."""
    factor = factorise(seen.gram)
    sweeping = {"by_row": False, "gone": torch.zeros_like(weight, dtype=torch.bool), "rounding": None}
    pruned, _ = sweep(weight, lambda w, _: w.square(), Unstructured(), 0.5, factor, **sweeping)
    return float((fresh @ (pruned - weight).T).square().sum() / (fresh @ weight.T).square().sum())


@pytest.mark.parametrize(("tokens", "share"), [(0, 0.9), (1, 0.9), (5, 0.9), (20, 0.9), (40, 1.0)])
def test_a_starved_expert_loses_less_on_fresh_tokens(tokens: int, share: float) -> None:
    """Than with what it saw alone, and than without looking: the two ways there were."""
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    better = 0
    for seed in range(7):
        own, fresh = moments(inputs(tokens, seed + 70)), inputs(3000, seed + 700)
        found = lost(drawn(own, moments(LAYER), WIDTH, True), weight, fresh)
        blind = Moments(torch.eye(WIDTH, dtype=torch.float64))
        others = [lost(blind, weight, fresh)] + ([lost(own, weight, fresh)] if tokens else [])
        better += found < share * min(others)
    assert better >= 6


@pytest.mark.parametrize("tokens", [1, 20, 60])
def test_a_layer_that_saw_little_does_not_mislead_its_experts(tokens: int) -> None:
    """Where no direction is stronger than another there is nothing to learn: not looking at all is best."""
    draw = torch.Generator().manual_seed(tokens)
    weight, few, fresh = (
        torch.randn(n, WIDTH, generator=draw, dtype=torch.float64) for n in (ROWS, tokens, 3000)
    )
    nothing, blind = moments(few[:0]), Moments(torch.eye(WIDTH, dtype=torch.float64))
    found = lost(drawn(nothing, settled(moments(few), True), WIDTH, True), weight, fresh)
    assert found < 1.03 * lost(blind, weight, fresh)
    unsettled = lost(drawn(nothing, moments(few), WIDTH, True), weight, fresh)
    assert unsettled > 1.1 * found
    assert torch.equal(settled(moments(few), False).gram, moments(few).gram)


@pytest.mark.parametrize("shared", [True, False])
def test_it_is_nearer_to_the_truth_than_both_of_its_parts(shared: bool) -> None:
    """In the Frobenius norm, by brute force over 20,000 fresh tokens; on average, and from few to many."""
    for tokens in (4, 30, 200):
        errors = torch.zeros(3, dtype=torch.float64)
        for seed in range(7):
            own, truth = moments(inputs(tokens, seed + 70)), moments(inputs(20_000, seed + 7000)).gram
            layer = moments(LAYER) if shared else moments(LAYER, diagonal=True)
            found = drawn(own, layer, WIDTH, shared)
            goal = layer.gram if shared else layer.power.mean() * torch.eye(WIDTH, dtype=torch.float64)
            three = (found.gram, own.gram, goal)
            errors += torch.stack([torch.linalg.matrix_norm(one - truth) for one in three])
        assert errors[0] < errors[1] and errors[0] < errors[2], tokens


def test_who_is_well_fed_borrows_next_to_nothing() -> None:
    shares = [
        drawn(moments(inputs(n, 3, 1.0)), moments(LAYER), WIDTH, True).borrowed
        for n in (50, 500, 5000, 50_000)
    ]
    assert all(later < 0.2 * before for before, later in zip(shares, shares[1:], strict=False))
    assert shares[-1] < 0.005
    own = moments(inputs(50_000, 3, 1.0))
    found = drawn(own, moments(LAYER), WIDTH, True)
    assert torch.allclose(found.gram, own.gram + found.borrowed * (moments(LAYER).gram - own.gram))
    assert found.tokens == 50_000


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("diagonal", [True, False])
def test_without_tokens_it_borrows_all_and_without_a_layer_all_inputs_are_alike(
    diagonal: bool, shared: bool
) -> None:
    nothing, layer = moments(LAYER[:0], diagonal=diagonal), moments(LAYER, LAYER, diagonal or not shared)
    found = drawn(nothing, layer, WIDTH, shared)
    size = layer.power.mean().expand(WIDTH)
    want = layer.power if shared else size
    assert torch.allclose(found.power, want) and found.diagonal == diagonal
    assert (found.borrowed, found.tokens) == (1.0, 0)
    if not diagonal and shared:
        assert found.cross is not None and torch.equal(found.cross, layer.gram)
    alone = drawn(nothing, moments(LAYER[:0], diagonal=diagonal), WIDTH, shared)
    assert torch.equal(alone.power, torch.ones(WIDTH, dtype=torch.float64))


def test_the_dense_model_s_moments_are_drawn_by_the_same_share() -> None:
    few, noise = inputs(10, 71), 0.1 * inputs(10, 72)
    own, layer = moments(few, few + noise), moments(LAYER, 1.1 * LAYER)
    found = drawn(own, layer, WIDTH, True)
    assert own.cross is not None and layer.cross is not None and found.cross is not None
    assert 0 < found.borrowed < 1
    assert torch.allclose(found.cross, own.cross + found.borrowed * (layer.cross - own.cross))
    assert torch.allclose(found.gram, own.gram + found.borrowed * (layer.gram - own.gram))


def test_what_watches_the_layer_is_of_the_kind_of_the_experts() -> None:
    gram, paired, norm = InputGram(), InputGram(paired=True), InputNorm()
    assert isinstance(of_layer([gram, norm], True), InputGram)
    found = of_layer([gram, paired], True)
    assert isinstance(found, InputGram) and found.paired
    assert isinstance(of_layer([gram, paired], False), InputNorm) and isinstance(
        of_layer([norm], True), InputNorm
    )
    assert of_layer([], True) is None and of_layer([object()], False) is None
