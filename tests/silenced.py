"""The reference for whole units: the full model, some of its units without any influence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsessm.architectures import Architecture
from sparsessm.architectures.axes import cut

Keeps = list[list[Tensor]]  # of each layer, of each of its axes of one name


class KeptNorm(nn.Module):
    """RMS norm without weights that counts the kept entries only."""

    def __init__(self, keep: Tensor, eps: float) -> None:
        super().__init__()
        self.keep, self.eps = keep, eps

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.keep
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / self.keep.sum() + self.eps)


class KeptGatedNorm(nn.Module):
    """Mamba-2's gated norm, which divides each group by the root mean square of its kept channels."""

    def __init__(self, norm: Any, keep: Tensor) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.group_size = (
            norm.weight,
            norm.variance_epsilon,
            norm.group_size,
        )
        self.keep = keep.unflatten(0, (-1, norm.group_size))  # (G, D / G)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = (x * F.silu(gate)).unflatten(-1, tuple(self.keep.shape)) * self.keep
        power = x.square().sum(-1, keepdim=True) / self.keep.sum(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(power + self.variance_epsilon)).flatten(-2)


def silence(mixer: Any, axis: str, keeps: Sequence[Tensor]) -> None:
    """Take all influence from the units that are not kept; the shapes stay."""
    with torch.no_grad():
        if not hasattr(mixer, "num_heads"):
            _silence_mamba1(mixer, axis, keeps[0])
        else:
            _silence_mamba2(mixer, axis, keeps)


def _silence_mamba1(mixer: Any, axis: str, keep: Tensor) -> None:
    if axis == "channel":
        mixer.x_proj.weight[:, ~keep] = 0.0
        mixer.out_proj.weight[:, ~keep] = 0.0
        return
    readout = mixer.x_proj.weight[-mixer.ssm_state_size :]
    readout[~keep] = 0.0
    if hasattr(mixer, "c_layernorm"):
        mixer.b_layernorm, mixer.c_layernorm = KeptNorm(keep, mixer.rms_eps), KeptNorm(keep, mixer.rms_eps)


def _silence_mamba2(mixer: Any, axis: str, keeps: Sequence[Tensor]) -> None:
    groups, heads, states = mixer.n_groups, mixer.num_heads, mixer.ssm_state_size
    inner = mixer.intermediate_size
    if axis == "state":
        readouts = inner + groups * states + (~torch.cat(list(keeps))).nonzero()[:, 0]  # among conv's rows
        mixer.in_proj.weight[inner + readouts] = 0.0
        mixer.conv1d.weight[readouts] = 0.0
        for rows, linear in ((inner + readouts, mixer.in_proj), (readouts, mixer.conv1d)):
            if linear.bias is not None:
                linear.bias[rows] = 0.0
        return
    keep = torch.cat(list(keeps))
    if axis == "head":
        keep = keep.repeat_interleave(inner // heads)
    old = getattr(mixer.norm, "keep", None)
    keep = keep if old is None else keep & old.flatten()
    mixer.out_proj.weight[:, ~keep] = 0.0
    mixer.norm = KeptGatedNorm(mixer.norm, keep)


def drawn(architecture: Architecture, axis: str, size: int, seed: int = 0) -> Keeps:
    """Keep-masks of every layer's axes, each its own."""
    random = torch.Generator().manual_seed(seed)
    keeps: Keeps = []
    for block in architecture.blocks:
        keeps.append([])
        for one in block.axes:
            if one.name == axis:
                keep = torch.zeros(one.size, dtype=torch.bool)
                keep[torch.randperm(one.size, generator=random)[:size]] = True
                keeps[-1].append(keep)
    return keeps


def take_out(architecture: Architecture, axis: str, size: int, keeps: Keeps) -> None:
    fields = architecture.fields({axis: size})
    for block, masks in zip(architecture.blocks, keeps, strict=True):
        axes = [one for one in block.axes if one.name == axis]
        made = architecture.resize(block, fields, cut(block.layer.state_dict(), axes, masks))
        assert architecture.blocks[block.index] is made
        assert all(one.size == size for one in made.axes if one.name == axis)
    architecture.settle(fields)
