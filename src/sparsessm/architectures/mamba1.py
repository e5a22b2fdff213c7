"""Mamba-1 (`MambaForCausalLM`): its targets, and its mixer's forward around our scan kernel.

The same computation as transformers' `MambaMixer.forward`, channel-last and without its Python loop over
time; the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsessm import kernels
from sparsessm.architectures.base import REMOVED_A_LOG, Architecture, Block, Tap, Target


class MixerState(NamedTuple):
    """What a mixer carries from one slab of time to the next."""

    conv: Tensor  # (W, K-1, D) last inputs of the convolution
    scan: Tensor  # (W, D, N)
    removed: Tensor | None  # (W, D, N): the state of the recurrence with A = -1, while it is being observed


class Mamba1Block(Block):
    """One `MambaBlock`: hidden + mixer(norm(hidden))."""

    def __init__(self, block: Any, index: int, stored: Mapping[str, torch.dtype]) -> None:
        self.index, self.name = index, f"backbone.layers.{index}"
        self._norm, self._mixer = block.norm, block.mixer
        a_log, skip = f"{self.name}.mixer.A_log", f"{self.name}.mixer.D"
        mixer = block.mixer
        self.targets = (
            Target(
                name=a_log,
                family="ssm",
                kind="A_log",
                layer=index,
                parameter=mixer.A_log,
                stored=stored.get(a_log, mixer.A_log.dtype),
                removed=REMOVED_A_LOG,
                companions={"D": (mixer.D, stored.get(skip, mixer.D.dtype))},
            ),
        )

    def forward(
        self, hidden: Tensor, state: MixerState | None = None, taps: Mapping[str, Tap] | None = None
    ) -> tuple[Tensor, MixerState]:
        out, state = mixer_forward(self._mixer, self._norm(hidden), state, taps or {})
        return hidden + out, state


def mixer_forward(
    mixer: Any, x: Tensor, state: MixerState | None, taps: Mapping[str, Tap]
) -> tuple[Tensor, MixerState]:
    """The mixer over one slab: x (W, T, d_model), normalised -> (W, T, d_model) and the state after it."""
    xz = mixer.in_proj(x)  # (W, T, 2D)
    conv_input, z = xz.chunk(2, dim=-1)  # views, (W, T, D) each
    u, conv_state = convolve(mixer, conv_input, None if state is None else state.conv)
    step, B, C = mixer.x_proj(u).split(
        [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size], dim=-1
    )
    delta = F.softplus(mixer.dt_proj(step))  # (W, T, D)
    A = -torch.exp(_precise(mixer.A_log))  # (D, N)
    skip = _precise(mixer.D)
    scan_state, removed_state = (None, None) if state is None else (state.scan, state.removed)
    if tap := taps.get("A_log"):
        y, scan_state, stats = kernels.selective_scan_stats(
            u, delta, A, B, C, skip, z, scan_state, removed_state=removed_state, **tap.options
        )
        removed_state = stats.removed_state
        tap.add(stats, output_energy(mixer), y)
    else:
        y, scan_state = kernels.selective_scan(u, delta, A, B, C, skip, z, scan_state)
        removed_state = None
    return mixer.out_proj(y), MixerState(conv_state, scan_state, removed_state)


def convolve(mixer: Any, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Convolution and activation of x (W, T, D) after `before` (W, K-1, D) -> result and next `before`."""
    past = mixer.conv_kernel_size - 1
    u = kernels.causal_conv1d(x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, before, silu=True)
    if before is None:
        before = x.new_zeros(x.shape[0], past, x.shape[2])
    return u, torch.cat([before, x[:, -past:]], 1)[:, -past:] if past else before


def _precise(parameter: Tensor) -> Tensor:
    """float32 as in the stock forward, or float64 in a float64 model."""
    return parameter if parameter.dtype == torch.float64 else parameter.float()


def output_energy(mixer: Any) -> Tensor:
    """(D,) float64: squared norms of out_proj's columns, what an error in a channel costs the stream."""
    return mixer.out_proj.weight.detach().double().square().sum(0)


class Mamba1(Architecture):
    """`MambaForCausalLM` of transformers."""

    def __init__(self, model: nn.Module, stored: Mapping[str, torch.dtype]) -> None:
        self.model = model
        self._backbone: Any = model.backbone
        self._lm_head: Any = model.lm_head
        config = self._backbone.config
        if config.hidden_act not in ("silu", "swish"):
            raise ValueError(f"hidden_act is {config.hidden_act!r}; a Mamba with 'silu' is supported")
        self.states = int(config.state_size)
        self.blocks = tuple(Mamba1Block(layer, i, stored) for i, layer in enumerate(self._backbone.layers))

    def embed(self, tokens: Tensor) -> Tensor:
        return self._backbone.embeddings(tokens)

    def head(self, hidden: Tensor) -> Tensor:
        return self._lm_head(self._backbone.norm_f(hidden))
