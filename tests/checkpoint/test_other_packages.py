"""Our kernels, mixers and models against what others wrote: mambapy (Mamba-1) and niverel-mamba (Mamba-2).

Both compute in plain torch on a CPU, have no code in common with ours or with each other's, and are
dependencies of the tests alone. (mambapy's Mamba-2 needs mamba_ssm and Triton, and is left out.)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forward import logits_of
from hypothesis import given, settings
from hypothesis import strategies as st
from mambapy.mamba import Mamba, MambaBlock, MambaConfig
from niverel_mamba.config import Mamba2Config
from niverel_mamba.torch_ops import Mamba2, causal_conv1d, ssd_chunked, ssd_sequential
from pico import pico_mamba, pico_mamba2
from torch import Tensor

from sparsessm import kernels
from sparsessm.architectures import adapt
from sparsessm.kernels import chunked
from sparsessm.kernels.ssd import ssd_scan

SEEDS = st.integers(0, 2**31)
LENGTHS = st.integers(1, 70)
# Random inputs leave no bit to compare: a sum of 70 steps in float32, of values around 1.
TOLERANCE = 2e-5


def close(got: Tensor, want: Tensor) -> bool:
    assert got.shape == want.shape
    return bool((got - want).abs().max() <= TOLERANCE * want.abs().max().clamp(min=1))


class Draw:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def steps(self, *shape: int) -> Tensor:
        return torch.nn.functional.softplus(self(*shape) - 1)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 3), LENGTHS, st.integers(1, 40), st.integers(1, 20))
def test_selective_scan(seed: int, batch: int, length: int, channels: int, states: int) -> None:
    draw = Draw(seed)
    u, delta = draw(batch, length, channels), draw.steps(batch, length, channels)
    A, D = -torch.exp(draw(channels, states)), draw(channels)
    B, C = draw(batch, length, states), draw(batch, length, states)
    y, last = kernels.selective_scan(u, delta, A, B, C, D)
    assert close(y, MambaBlock.selective_scan(None, u, delta, A, B, C, D))
    half = length // 2
    _, state = kernels.selective_scan(u[:, :half], delta[:, :half], A, B[:, :half], C[:, :half], D)
    rest, again = kernels.selective_scan(
        u[:, half:], delta[:, half:], A, B[:, half:], C[:, half:], D, None, state
    )
    assert close(rest, y[:, half:]) and close(again, last)


@pytest.mark.parametrize(
    "shapes",
    [{}, {"state_size": 5, "time_step_rank": 3}, {"conv_kernel": 3, "expand": 3}, {"use_bias": True},
     {"use_conv_bias": False}],
    ids=str,
)  # fmt: skip
def test_a_whole_mamba(shapes: dict[str, Any]) -> None:
    model = pico_mamba(**shapes)
    config = model.config
    theirs = Mamba(
        MambaConfig(
            d_model=config.hidden_size,
            n_layers=config.num_hidden_layers,
            dt_rank=int(config.time_step_rank),
            d_state=config.state_size,
            expand_factor=config.expand,
            d_conv=config.conv_kernel,
            rms_norm_eps=config.layer_norm_epsilon,
            bias=config.use_bias,
            conv_bias=config.use_conv_bias,
        )
    )
    theirs.load_state_dict(model.backbone.layers.state_dict(prefix="layers."))
    tokens = torch.randint(0, 64, (3, 37), generator=torch.Generator().manual_seed(0))
    architecture = adapt(model)
    with torch.inference_mode():
        hidden = theirs(model.backbone.embeddings(tokens))
        assert close(logits_of(architecture, tokens), architecture.head(hidden))


HEADS = st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (6, 2)])


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 3), LENGTHS, HEADS, st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_ssd(
    seed: int, batch: int, length: int, heads: tuple[int, int], channels: int, states: int, start: bool
) -> None:
    draw, (count, groups) = Draw(seed), heads
    u, delta = draw(batch, length, count, channels), draw.steps(batch, length, count)
    A, D = -torch.exp(draw(count)), draw(count)
    B, C = draw(batch, length, groups, states), draw(batch, length, groups, states)
    state = draw(batch, count, channels, states) if start else None
    how = {"D": D, "dt_softplus": False, "initial_states": state}
    want = [
        ssd_sequential(u, delta, A, B, C, **how, work_dtype=torch.float64),
        ssd_chunked(u, delta, A, B, C, **how, chunk_size=16),
    ]
    for scan in (ssd_scan, chunked.ssd_chunked):
        y, last = scan(u, delta, A, B, C, D, state)
        for other, end in want:
            assert close(y, other) and close(last, end.float())


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 3), LENGTHS, st.integers(1, 40), st.integers(1, 5), st.booleans(), st.booleans())
def test_convolution(
    seed: int, batch: int, length: int, channels: int, width: int, biased: bool, silu: bool
) -> None:
    draw = Draw(seed)
    x, weight, bias = draw(batch, length, channels), draw(channels, width), draw(channels) if biased else None
    got = kernels.causal_conv1d(x, weight, bias, silu=silu)
    activation = "silu" if silu else None
    want = causal_conv1d(x.transpose(1, 2), weight[:, None], bias, activation=activation)
    assert close(got, want.transpose(1, 2))


@pytest.mark.parametrize("shapes", [{}, {"n_groups": 1, "state_size": 5}, {"n_groups": 4, "conv_kernel": 2}])
def test_a_mixer_of_mamba2(shapes: dict[str, Any]) -> None:
    model = pico_mamba2(**shapes)
    config = model.config
    theirs = Mamba2(
        Mamba2Config(
            d_model=config.hidden_size,
            d_state=config.state_size,
            d_conv=config.conv_kernel,
            expand=config.expand,
            headdim=config.head_dim,
            ngroups=config.n_groups,
            norm_epsilon=config.layer_norm_epsilon,
            bias=config.use_bias,
            conv_bias=config.use_conv_bias,
            chunk_size=8,
        )
    )
    tokens = torch.randint(0, 64, (3, 37), generator=torch.Generator().manual_seed(0))
    architecture = adapt(model)
    with torch.inference_mode():
        hidden = architecture.embed(tokens)
        for layer in model.backbone.layers:
            theirs.load_state_dict(layer.mixer.state_dict())
            hidden = hidden + theirs(layer.norm(hidden))
        assert close(logits_of(architecture, tokens), architecture.head(hidden))
