"""Mamba-1 (`MambaForCausalLM`): its targets, and its mixer's forward around our scan kernel.

The same computation as transformers' `MambaMixer.forward`, channel-last and without its Python loop over
time; the tests compare the two.
"""

from __future__ import annotations

import copy
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
    scan: Tensor | None  # (W, D, N); None where the slab stopped before the scan
    removed: Tensor | None  # (W, D, N): the state of the recurrence with A = -1, while it is being observed


class Mamba1Block(Block):
    """One `MambaBlock`: hidden + mixer(norm(hidden))."""

    def __init__(self, block: Any, index: int, stored: Mapping[str, torch.dtype]) -> None:
        self.index, self.name = index, f"backbone.layers.{index}"
        self._block, self._stored = block, stored
        mixer, prefix = block.mixer, f"{self.name}.mixer."

        def of(kind: str, parameter: nn.Parameter, family: str = "projections", **what: Any) -> Target:
            name = prefix + kind + ("" if family == "ssm" else ".weight")
            dtype = stored.get(name, parameter.dtype)
            return Target(name, family, kind, index, parameter, dtype, **what)

        skip = (mixer.D, stored.get(f"{prefix}D", mixer.D.dtype))
        fed = ("x_proj", mixer.time_step_rank) if mixer.x_proj.bias is None else None
        self.targets = (
            of("in_proj", mixer.in_proj.weight),
            of("conv1d", mixer.conv1d.weight, "conv1d", module_class="Conv1d", depthwise=True),
            of("x_proj", mixer.x_proj.weight),
            of("dt_proj", mixer.dt_proj.weight, fed_by=fed),
            of(
                "A_log",
                mixer.A_log,
                "ssm",
                removed=REMOVED_A_LOG,
                module_class="MambaMixer",
                companions={"D": skip},
            ),
            of("out_proj", mixer.out_proj.weight),
        )

    def forward(
        self,
        hidden: Tensor,
        state: MixerState | None = None,
        taps: Mapping[str, Tap] | None = None,
        until: str | None = None,
    ) -> tuple[Tensor | None, MixerState | None]:
        out, state = mixer_forward(self._block.mixer, self._block.norm(hidden), state, taps or {}, until)
        return out if out is None else hidden + out, state

    def copy(self) -> Mamba1Block:
        return Mamba1Block(copy.deepcopy(self._block), self.index, self._stored)


class Tail(Block):
    """What follows the layers: the final norm and the head."""

    def __init__(
        self, norm: Any, head: Any, name: str, index: int, stored: Mapping[str, torch.dtype]
    ) -> None:
        self.index, self.name = index, name.removesuffix(".weight")
        self._norm = norm
        dtype = stored.get(name, head.weight.dtype)
        self.targets = (Target(name, "head", "lm_head", index, head.weight, dtype),)

    def forward(
        self,
        hidden: Tensor,
        state: Any = None,
        taps: Mapping[str, Tap] | None = None,
        until: str | None = None,
    ) -> tuple[Tensor | None, Any]:
        if tap := (taps or {}).get("lm_head"):
            tap.add(self._norm(hidden))
        return hidden, None

    def copy(self) -> Tail:
        return self  # the norm is never pruned


def mixer_forward(
    mixer: Any, x: Tensor, state: MixerState | None, taps: Mapping[str, Tap], until: str | None = None
) -> tuple[Tensor | None, MixerState | None]:
    """The mixer over one slab: x (W, T, d_model), normalised -> (W, T, d_model) and the state after it."""

    def fed(kind: str, what: Tensor) -> bool:
        if tap := taps.get(kind):
            tap.add(what)
        return kind == until

    channels = mixer.A_log.shape[0]
    before, scan_state, removed_state = (None, None, None) if state is None else state
    if fed("in_proj", x):
        return None, None
    if until in ("conv1d", "x_proj", "dt_proj"):  # they need no gate: half of in_proj
        bias = mixer.in_proj.bias
        conv_input = F.linear(x, mixer.in_proj.weight[:channels], None if bias is None else bias[:channels])
        z = None
    else:
        conv_input, z = mixer.in_proj(x).chunk(2, dim=-1)  # views, (W, T, D) each
    if tap := taps.get("conv1d"):
        tap.add(windows(mixer, conv_input, before))
    u, before = convolve(mixer, conv_input, before)
    if until == "conv1d" or fed("x_proj", u):
        return None, MixerState(before, None, None)
    step, B, C = mixer.x_proj(u).split(
        [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size], dim=-1
    )
    if fed("dt_proj", step):
        return None, MixerState(before, None, None)
    delta = F.softplus(mixer.dt_proj(step))  # (W, T, D)
    A = -torch.exp(_precise(mixer.A_log))  # (D, N)
    skip = _precise(mixer.D)
    if tap := taps.get("A_log"):
        y, scan_state, stats = kernels.selective_scan_stats(
            u, delta, A, B, C, skip, z, scan_state, removed_state=removed_state, **tap.options
        )
        removed_state = stats.removed_state
        tap.add(stats, mixer.out_proj.weight.detach(), y)
    else:
        y, scan_state = kernels.selective_scan(u, delta, A, B, C, skip, z, scan_state)
        removed_state = None
    state = MixerState(before, scan_state, removed_state)
    if until == "A_log" or fed("out_proj", y):
        return None, state
    return mixer.out_proj(y), state


def windows(mixer: Any, x: Tensor, before: Tensor | None) -> Tensor:
    """What each step's convolution sees: x (W, T, D) -> (W, T, D, K), the last tap first in time last."""
    past = mixer.conv_kernel_size - 1
    if before is None:
        before = x.new_zeros(x.shape[0], past, x.shape[2])
    return torch.cat([before, x], 1).unfold(1, past + 1, 1)


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
        embeddings = "backbone.embeddings.weight"
        self.tied = self._lm_head.weight is self._backbone.embeddings.weight
        # A tied weight is one target, under the name it is stored by.
        name = embeddings if self.tied and "lm_head.weight" not in stored else "lm_head.weight"
        self.tail = Tail(self._backbone.norm_f, self._lm_head, name, len(self.blocks), stored)

    def embed(self, tokens: Tensor) -> Tensor:
        return self._backbone.embeddings(tokens)

    def head(self, hidden: Tensor) -> Tensor:
        return self._lm_head(self._backbone.norm_f(hidden))
