"""Mamba-2 with projected states in memory: what it computes, in slabs and as a copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forward import logits_of
from lively import TOKENS, lively, stock
from pico import pico_mamba, pico_mamba2
from projections import B1, C1, by_hand, cases, made
from stock import difference

from sparsessm.architectures import adapt, projected

pytestmark = pytest.mark.usefixtures("here")


@cases
def test_the_model_is_the_recurrence_behind_the_projections(case: str) -> None:
    model = made(case)
    want = by_hand(model, TOKENS[:2]).float()
    assert difference(stock(model, TOKENS[:2]), want) <= 2e-5
    assert difference(logits_of(adapt(model), TOKENS[:2]), want) <= 2e-5
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
    assert difference(logits_of(architecture, TOKENS), want) <= 1e-5


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
