"""The grid of ggml's Q4_0, against the package gguf: rounding alone is llama.cpp's, a search never worse."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import METHODS, SEEDS, problem
from torch import Tensor

from sparsessm.methods import on_grid
from sparsessm.methods.grids import Q4_0
from sparsessm.methods.hessian import factorise
from sparsessm.methods.levels import Levels
from sparsessm.methods.patterns import Unstructured
from sparsessm.methods.repair import sweep

FORM = gguf.GGMLQuantizationType.Q4_0


def rounded(weight: Tensor, largest: bool, share: float = 0.0) -> tuple[Levels, Tensor]:
    """Without a Hessian; and what the mask keeps."""
    rounding = Q4_0.rounding(weight, None, share > 0, None, largest)
    values, keep = sweep(
        weight, lambda now, part: now.abs(), Unstructured(), share, None, rounding=rounding, by_row=True
    )
    levels = rounding.levels()
    assert torch.equal(levels.values(), values)
    return levels, keep


def ggml(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Its scales (out, blocks), and its values."""
    held = gguf.quants.quantize(weight.numpy(), FORM)
    scales = held.reshape(len(weight), -1, 18)[..., :2].copy().view(np.float16)[..., 0]
    return torch.from_numpy(scales), torch.from_numpy(gguf.quants.dequantize(held, FORM))


def matrix(seed: int, hostile: str = "") -> Tensor:
    """(7, 96), blocks of every size."""
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(seed))
    weight *= 10.0 ** torch.linspace(-2, 3, 7)[:, None]
    if hostile == "zeros":
        weight[1], weight[2, 32:64], weight[3, ::2] = 0, 0, 0
    if hostile == "equal":
        weight[1], weight[2, :32], weight[3] = 3.0, -0.7, weight[3].sign()
    if hostile == "one":
        weight[1:4] *= torch.nn.functional.one_hot(torch.arange(3) * 32 + 5, 96)
    return weight


HOSTILE = ["", "zeros", "equal", "one"]


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("seed", range(4))
def test_rounding_to_the_nearest_is_llama_cpp_s(seed: int, hostile: str) -> None:
    """The scales to the bit; codes are the nearest to the scale as it is stored, not as it was before."""
    weight = matrix(seed, hostile)
    levels, _ = rounded(weight, largest=True)
    scales, values = ggml(weight)
    there = weight.view(7, 3, 32).any(-1)  # of a block of zeros any scale will do
    assert torch.equal(levels.rows[there], scales[there]) and not levels.values().view(7, 3, 32)[~there].any()
    ours, theirs = (weight - levels.values()).abs(), (weight - values).abs()
    assert (ours <= theirs).all() and (ours == theirs).double().mean() > 0.97


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("seed", range(4))
def test_the_search_is_never_worse_than_llama_cpp_s_choice(seed: int, hostile: str) -> None:
    weight = matrix(seed, hostile)
    levels, _ = rounded(weight, largest=False)
    ours, theirs = ((weight - x).square().view(7, 3, 32).sum(-1) for x in (levels.values(), ggml(weight)[1]))
    assert (ours <= theirs * (1 + 1e-5)).all()
    if not hostile:
        assert ours.sum(1).div(theirs.sum(1)).mean() < 0.9
        assert {True, False} == set((levels.rows > 0).flatten().tolist())


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, share=st.sampled_from([0.0, 0.3, 0.9]), refit=st.booleans())
def test_what_is_left_is_a_matrix_of_blocks(seed: int, share: float, refit: bool) -> None:
    """After the sweep and after the repair: codes and scales that a block has, and the mask as asked."""
    W, X = problem(seed, 6, 64)
    goal, gram = torch.from_numpy(W).float(), torch.from_numpy(X @ X.T / X.shape[1]).float()
    factor = factorise(gram)
    rounding = Q4_0.rounding(goal, factor.pivots, share > 0, None, False)
    values, keep = sweep(
        goal, lambda now, part: now.abs(), Unstructured(), share, factor, by_row=True, rounding=rounding
    )
    levels = rounding.levels()
    assert torch.equal(levels.values(), values)
    if refit:
        levels = on_grid.refit(levels, goal, gram, factor, keep, rounding)
    assert levels.codes.min() >= -8 and levels.codes.max() <= 7 and (levels.width, levels.group) == (4, 32)
    assert levels.rows.shape == (6, 2) and levels.rows.dtype == torch.float16
    assert torch.isfinite(levels.rows).all() and (levels.rows != 0).all()
    if share:
        assert torch.equal(levels.codes != 0, keep)
    assert not torch.signbit(levels.values()[levels.codes == 0]).any() or not share
    packed = blocks(levels)
    assert np.array_equal(gguf.quants.dequantize(packed, FORM), levels.values().numpy())
    stored = Q4_0.stored(6, 64)
    assert stored == 8 * packed.nbytes
    assert share or levels.coded().bits == stored


def blocks(levels: Levels) -> Any:
    """As ggml describes it: a scale, then bytes of a code of the first half and one of the other."""
    codes = (levels.codes + 8).numpy().astype(np.uint8).reshape(-1, 32)
    scales = levels.rows.numpy().reshape(-1, 1).view(np.uint8)
    return np.concatenate([scales, codes[:, :16] + 16 * codes[:, 16:]], 1).reshape(len(levels.codes), -1)


def test_every_method_that_takes_grids_takes_this_one() -> None:
    assert {name for name, row in METHODS.items() if "grid" in row.options or "grid" in row.defaults} == {
        *("magnitude", "wanda", "rtn", "gptq", "sparsegpt", "absorb")
    }
