"""The Mamba-1 mixer: its targets and axes, and its forward around our scan kernel.

The same computation as transformers' `MambaMixer.forward`, channel-last and without its Python loop over
time; the tests compare the two. FalconMamba and Jamba add norms on Δ, B and C. Who has such mixers, and what
is around them, say `stack.py` and `hybrid.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm import kernels
from sparsessm.architectures.axes import Axis, Part
from sparsessm.architectures.base import Tap
from sparsessm.architectures.kept import Kept, asking
from sparsessm.architectures.mixer import MixerKind, convolve, feeding, holds, matrices, precise, windows
from sparsessm.architectures.target import Target
from sparsessm.kernels import products


class MixerState(NamedTuple):
    """What a mixer carries from one slab of time to the next."""

    conv: Tensor  # (W, K-1, D) last inputs of the convolution
    scan: Tensor | None  # (W, D, N); None where the slab stopped before the scan
    removed: Tensor | None  # (W, D, N): the state of the recurrence with A = -1, while it is being observed


KINDS = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "out_proj")  # in the order of the data


@dataclass(frozen=True)
class Mamba1Kind(MixerKind):
    """Mamba-1 mixers.

    Attributes:
        norms: what follows x_proj, on Δ, B and C each: "none", "weightless" (FalconMamba) or "weighted"
            (Jamba).
    """

    norms: str = "none"

    def owns(self, module: Any) -> bool:
        """As `MixerKind.owns`."""
        return holds(module, "A_log")

    def targets(
        self, mixer: Any, prefix: str, layer: int, stored: Mapping[str, torch.dtype]
    ) -> tuple[Target, ...]:
        plain = mixer.x_proj.bias is None and self.norms == "none"
        fed_by = {"dt_proj": ("x_proj", mixer.time_step_rank)} if plain else {}
        return matrices(mixer, prefix, layer, stored, KINDS, fed_by)

    def axes(self, mixer: Any, prefix: str) -> tuple[Axis, ...]:
        """As `MixerKind.axes`: its states and channels."""
        channels, states = mixer.A_log.shape
        rank = mixer.time_step_rank
        state = [Part("x_proj.weight", 0, rank), Part("x_proj.weight", 0, rank + states), Part("A_log", 1)]
        channel = [
            Part("in_proj.weight", 0),
            Part("in_proj.weight", 0, channels),
            Part("conv1d.weight", 0),
            Part("x_proj.weight", 1),
            Part("dt_proj.weight", 0),
            Part("dt_proj.bias", 0),
            Part("A_log", 0),
            Part("D", 0),
            Part("out_proj.weight", 1),
        ]
        if mixer.in_proj.bias is not None:
            channel += [Part("in_proj.bias", 0), Part("in_proj.bias", 0, channels)]
        if mixer.conv1d.bias is not None:
            channel.append(Part("conv1d.bias", 0))
        if self.norms == "weighted":
            state += [Part(f"{norm}.weight", 0) for norm in ("b_layernorm", "c_layernorm")]
        linear = self.norms == "none" and mixer.x_proj.bias is None

        def prefixed(parts: list[Part]) -> tuple[Part, ...]:
            return tuple(Part(prefix + p.tensor, p.dim, p.start, p.width) for p in parts)

        own = prefixed(state)
        return (
            Axis("state", states, own, *(own[:2] if linear else ())),
            Axis("channel", channels, prefixed(channel)),
        )

    def forward(
        self,
        mixer: Any,
        x: Tensor,
        state: MixerState | None,
        taps: Mapping[str, Tap],
        until: str | None = None,
        kept: Kept | None = None,
    ) -> tuple[Tensor | None, MixerState | None]:
        fed, once = feeding(taps, until), asking(kept)
        before, scan_before, removed_before = (None, None, None) if state is None else state
        if fed("in_proj", x):
            return None, None
        # Some looks need no gate, and what is kept has one half of in_proj only.
        halves = kept is not None or until in ("conv1d", "x_proj", "dt_proj")
        whole = None if halves else mixer.in_proj(x).chunk(2, dim=-1)  # views, (W, T, D) each

        def entering(half: int) -> tuple[Tensor, None]:
            return _half(mixer, x, half) if whole is None else whole[half], None

        def convolved() -> tuple[Tensor, Tensor]:
            conv_input, _ = once("in_proj", lambda: entering(0))
            if tap := taps.get("conv1d"):
                tap.add(windows(mixer, conv_input, before))
            return convolve(mixer, conv_input, before)

        def scanned() -> tuple[Tensor | None, MixerState]:
            u, conv = once("conv1d", convolved)
            if until == "conv1d" or fed("x_proj", u):
                return None, MixerState(conv, None, None)
            (step, B, C), _ = once("x_proj", lambda: (self._readings(mixer, u), None))
            if fed("dt_proj", step):
                return None, MixerState(conv, None, None)
            delta, _ = once("dt_proj", lambda: (F.softplus(mixer.dt_proj(step)), None))  # (W, T, D)
            z, _ = once("in_proj.gate", lambda: entering(1))
            A = -torch.exp(precise(mixer.A_log))  # (D, N)
            inputs = u, delta, A, B, C, precise(mixer.D), z
            removed_state = None
            if tap := taps.get("states"):
                y, scan_state = _sampled(tap, mixer, inputs, scan_before)
            elif tap := taps.get("A_log"):
                y, scan_state, stats = kernels.selective_scan_stats(
                    *inputs, scan_before, removed_state=removed_before, **tap.options
                )
                removed_state = stats.removed_state
                tap.add(stats, mixer.out_proj.weight.detach(), y)
            else:
                y, scan_state = kernels.selective_scan(*inputs, scan_before)
            return y, MixerState(conv, scan_state, removed_state)

        def put_out() -> tuple[Tensor | None, MixerState]:
            y, after = once("A_log", scanned)
            if y is None or until in ("A_log", "states") or fed("out_proj", y):
                return None, after
            return mixer.out_proj(y), after

        return once("out_proj", put_out)

    def _readings(self, mixer: Any, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u (W, T, D) -> inputs of dt_proj (W, T, rank), B and C (W, T, N), after norms if there are."""
        step, B, C = mixer.x_proj(u).split(
            [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size], dim=-1
        )
        if self.norms == "weighted":
            return mixer.dt_layernorm(step), mixer.b_layernorm(B), mixer.c_layernorm(C)
        if self.norms == "weightless":  # modules, in transformers 4.57 a function
            step, B, C = (_normed(part, mixer.rms_eps) for part in (step, B, C))
        return step, B, C


def _sampled(tap: Tap, mixer: Any, inputs: tuple[Any, ...], state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scan, a few steps at a time: after each the tap is fed the state, its readout and the gate.

    With "pairs" (decays, inputs) among its options the states are others: each with the decay of one state
    and the input of another; the output is then none of the layer's.
    """
    u, delta, A, B, C, skip, z = inputs
    every, parts, read = tap.options["every"], [], C
    if pairs := tap.options.get("pairs"):
        A, B, C = A[:, pairs[0]], B[..., pairs[1]], C[..., pairs[1]]
    for start in range(0, u.shape[1], every):
        now = slice(start, start + every)
        y, state = kernels.selective_scan(
            u[:, now], delta[:, now], A, B[:, now], C[:, now], skip, z[:, now], state
        )
        if y.shape[1] == every:
            last = slice(start + every - 1, start + every)
            h, gain = state[:, None], F.silu(z[:, last])  # (W, 1, D, N), (W, 1, D)
            tap.add(h, read[:, last, None], gain, mixer.out_proj.weight.detach())
        parts.append(y)
    assert state is not None
    return torch.cat(parts, 1), state


def _half(mixer: Any, x: Tensor, half: int) -> Tensor:
    """The first half of in_proj's outputs (W, T, D), which the convolution takes, or the second, the gate."""
    weight, bias = (
        None if whole is None else whole.chunk(2)[half]
        for whole in (mixer.in_proj.weight, mixer.in_proj.bias)
    )
    assert weight is not None
    return products.linear(x, weight, bias)


def _normed(part: Tensor, epsilon: float) -> Tensor:
    """RMSNorm without weights, as stock code computes it."""
    return part * torch.rsqrt(part.square().mean(-1, keepdim=True) + epsilon)
