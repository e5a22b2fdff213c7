"""The Mamba-2 mixer: its targets and axes, and its forward around our scan kernel.

The same computation as transformers' `Mamba2Mixer.forward`, without chunks; the tests compare the two. The
mixers of Bamba, FalconH1, GraniteMoeHybrid, NemotronH and Zamba2 are the same but for FalconH1's multipliers
(muP) and optional norm. Who has such mixers, and what is around them, say `stack.py` and `hybrid.py`.
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
from sparsessm.kernels.ssd import ssd_scan

KINDS = ("in_proj", "conv1d", "A_log", "out_proj")  # in the order of the data


class MixerState(NamedTuple):
    """What a mixer carries from one slab of time to the next."""

    conv: Tensor  # (W, K-1, D + 2GN) last inputs of the convolution
    scan: Tensor | None  # (W, H, P, N); None where the slab stopped before the scan
    removed: (
        Tensor | None
    )  # (W, H, P, N): the state of the recurrence with A = -1, while it is being observed


class Sizes(NamedTuple):
    """The sizes of a mixer: G groups, H heads of P channels, N states."""

    groups: int
    heads: int
    channels: int
    states: int

    @classmethod
    def of(cls, mixer: Any) -> Sizes:
        return cls(mixer.n_groups, mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)

    @property
    def inner(self) -> int:
        """D: channels of all heads."""
        return self.heads * self.channels

    @property
    def mixed(self) -> int:
        """Channels of the convolution: D of the scan's input, then B and C of every group."""
        return self.inner + 2 * self.groups * self.states


@dataclass(frozen=True)
class Mamba2Kind(MixerKind):
    """Mamba-2 mixers.

    Attributes:
        norm_by_config: the norm behind the scan may be missing or come before the gate (FalconH1).
        projected: B and C are projected to fewer directions behind the convolution (projected.py).
    """

    norm_by_config: bool = False
    projected: bool = False

    def owns(self, module: Any) -> bool:
        """As `MixerKind.owns`."""
        return holds(module, "A_log")

    def targets(
        self, mixer: Any, prefix: str, layer: int, stored: Mapping[str, torch.dtype]
    ) -> tuple[Target, ...]:
        return matrices(mixer, prefix, layer, stored, KINDS, {})

    def axes(self, mixer: Any, prefix: str) -> tuple[Axis, ...]:
        """As `MixerKind.axes`: states of each group, heads of each group, channels of each head."""
        size = Sizes.of(mixer)
        biased = [name for name in ("in_proj", "conv1d") if mixer.get_submodule(name).bias is not None]
        normed = self._normed(mixer)

        def part(tensor: str, dim: int, start: int, width: int = 1) -> Part:
            return Part(prefix + tensor, dim, start, width)

        def mixed(start: int, width: int = 1) -> list[Part]:
            """Channels of the convolution: rows of in_proj behind the gate, and of conv1d."""
            shifted = size.inner + start
            parts = [part("in_proj.weight", 0, shifted, width), part("conv1d.weight", 0, start, width)]
            shifts = {"in_proj": shifted, "conv1d": start}
            return parts + [part(f"{name}.bias", 0, shifts[name], width) for name in biased]

        def inner(start: int, width: int) -> list[Part]:
            """Channels of the scan: the gate's rows, the convolution's, the norm's and out_proj's."""
            parts = [part("in_proj.weight", 0, start, width), *mixed(start, width)]
            parts += [part("in_proj.bias", 0, start, width)] if "in_proj" in biased else []
            parts += [part("norm.weight", 0, start, width)] if normed else []
            return [*parts, part("out_proj.weight", 1, start, width)]

        found = []
        for group in range(size.groups):
            b = size.inner + group * size.states
            found.append(Axis("state", size.states, tuple(mixed(b) + mixed(b + size.groups * size.states))))
        of_group = size.heads // size.groups
        for group in range(size.groups):
            first = group * of_group
            step = size.inner + size.mixed + first
            parts = [part("in_proj.weight", 0, step), *inner(first * size.channels, size.channels)]
            parts += [part("in_proj.bias", 0, step)] if "in_proj" in biased else []
            parts += [part(name, 0, first) for name in ("A_log", "D", "dt_bias")]
            found.append(Axis("head", of_group, tuple(parts)))
        for head in range(size.heads):
            found.append(Axis("channel", size.channels, tuple(inner(head * size.channels, 1))))
        return tuple(found)

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
        size = Sizes.of(mixer)
        before, scan_before, removed_before = (None, None, None) if state is None else state
        if self.multiplied:
            x = x * mixer.ssm_in_multiplier
        if fed("in_proj", x):
            return None, None

        def entering() -> tuple[tuple[Tensor, ...], None]:
            projected = mixer.in_proj(x)
            if self.multiplied:
                projected = projected * mixer.mup_vector
            return projected.split([size.inner, size.mixed, size.heads], dim=-1), None

        def convolved() -> tuple[tuple[Tensor, ...], Tensor]:
            (z, mixed, step), _ = once("in_proj", entering)
            if tap := taps.get("conv1d"):
                tap.add(windows(mixer, mixed, before))
            mixed, after = convolve(mixer, mixed, before)
            return (z, mixed, step), after

        def scanned() -> tuple[Tensor | None, MixerState]:
            (z, mixed, step), conv = once("conv1d", convolved)
            if until == "conv1d":
                return None, MixerState(conv, None, None)
            inputs = self._inputs(mixer, mixed, step)
            removed_state = removed_before
            if tap := taps.get("states"):
                every = tap.options["every"]
                y, scan_next, states = ssd_scan(*inputs, scan_before, every=every)
                y = y.flatten(-2)  # (W, T, D)
                last = slice(every - 1, None, every)
                gain = self.output_gain(mixer, y, z)[:, last]
                tap.add(states.flatten(2, 3), inputs[4][:, last], gain, mixer.out_proj.weight.detach())
            else:
                y, scan_next = ssd_scan(*inputs, scan_before)
                y = y.flatten(-2)
            if tap := taps.get("A_log"):
                gain = self.output_gain(mixer, y, z)
                stats, removed_state = statistics(tap.options, inputs, y, gain, scan_before, removed_before)
                tap.add(stats, mixer.out_proj.weight.detach(), y * gain)
            after = MixerState(conv, scan_next, removed_state)
            return None if until in ("A_log", "states") else self._gated(mixer, y, z), after

        def put_out() -> tuple[Tensor | None, MixerState]:
            y, after = once("A_log", scanned)
            if y is None or fed("out_proj", y):
                return None, after
            return mixer.out_proj(y), after

        return once("out_proj", put_out)

    def _inputs(
        self, mixer: Any, mixed: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of the scan: u (W, T, H, P), Δ (W, T, H), A (H,), B and C (W, T, G, N), D (H,)."""
        size = Sizes.of(mixer)
        u, B, C = mixed.split([size.inner, size.groups * size.states, size.groups * size.states], dim=-1)
        u = u.unflatten(-1, (size.heads, size.channels))
        B, C = (part.unflatten(-1, (size.groups, size.states)) for part in (B, C))
        if self.projected:  # B and C (W, T, G, r)
            B = torch.einsum("wtgn,grn->wtgr", B, mixer.B_projection)
            C = torch.einsum("wtgn,grn->wtgr", C, mixer.C_projection)
        low, high = mixer.time_step_limit
        delta = F.softplus(step + mixer.dt_bias).clamp(low, high)
        return u, delta, -torch.exp(precise(mixer.A_log)), B, C, precise(mixer.D)

    def _normed(self, mixer: Any) -> bool:
        return not self.norm_by_config or mixer.mamba_rms_norm

    def _gated(self, mixer: Any, y: Tensor, z: Tensor) -> Tensor:
        """Gate and norm of the scan's output y (W, T, D), in the model's order."""
        if self._normed(mixer):
            return mixer.norm(y, z)
        return y * F.silu(z)

    def output_gain(self, mixer: Any, y: Tensor, z: Tensor) -> Tensor:
        """(W, T, D): by how much out_proj's input changes with the scan's output y, the norm's scale fixed.

        The norm divides a group's channels by their root mean square, which a small error hardly moves; what
        it does move is left out (docs/methods.md).
        """
        gate = F.silu(z)
        if not self._normed(mixer):
            return gate
        norm, groups = mixer.norm, mixer.n_groups
        before_gate = self.norm_by_config and norm.norm_before_gate
        seen = (y if before_gate else y * gate).unflatten(-1, (groups, -1))
        scale = torch.rsqrt(seen.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        return (scale * gate.unflatten(-1, (groups, -1))).flatten(-2) * norm.weight


def statistics(
    options: Mapping[str, Any],
    inputs: tuple[Tensor, ...],
    y: Tensor,
    gain: Tensor,
    state: Tensor | None,
    removed_state: Tensor | None,
) -> tuple[kernels.ScanStats, Tensor | None]:
    """What the methods for A_log look at: `ScanStats` of one column, its rows the D channels or the H heads.

    A head's decay is one number, so what its removal changes is a difference of two outputs: no sum over
    pairs of states is needed.

    Args:
        options: of `kernels.selective_scan_stats`. inputs: of the scan. y: (W, T, D) its output.
        gain: (W, T, D), see `output_gain`.

    Returns:
        gram, cross and power (float64) by channel; energy and decay (T, H, 1) by head.
    """
    u, delta, A, B, C, _ = inputs
    energy = decay = gram = cross = power = None
    if options.get("energy"):
        energy, decay = _energy(inputs, state)
    if options.get("gram"):
        skipped = (u * inputs[-1][:, None]).flatten(-2)
        if options.get("removed", "memoryless") == "memoryless":
            heads = u.shape[2] // B.shape[2]
            meeting = (B * C).sum(-1).repeat_interleave(heads, -1)  # (W, T, H)
            other = (u * (delta * meeting)[..., None]).flatten(-2)
        else:
            y_removed, removed_state = ssd_scan(u, delta, -torch.ones_like(A), B, C, None, removed_state)
            other = y_removed.flatten(-2)
        error = (y - skipped - other) * gain
        passed = u.flatten(-2) * gain
        gram = error.square().sum((0, 1)).double()[:, None, None]
        cross = (error * passed).sum((0, 1)).double()[:, None]
        power = passed.square().sum((0, 1)).double()
        if options["gram"] == "diagonal":
            gram = gram[..., 0]
    return kernels.ScanStats(energy, decay, gram, cross, power, removed_state), removed_state


def _energy(inputs: tuple[Tensor, ...], state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(T, H, 1): energy of a head's states before the update, and decay, both summed over the windows."""
    u, delta, A, B, C, _ = inputs
    windows_, length, heads, channels = u.shape
    if state is None:
        state = u.new_zeros(windows_, heads, channels, B.shape[-1], dtype=torch.float32)
    energy = u.new_zeros(length, heads)
    energy[0] = state.square().sum((0, 2, 3))
    for window in range(windows_ if length > 1 else 0):  # all states of one window at a time
        one = slice(window, window + 1)
        _, _, states = ssd_scan(
            u[one, :-1], delta[one, :-1], A, B[one, :-1], C[one, :-1], None, state[one], every=1
        )
        energy[1:] += states[0].square().sum((2, 3))
    return energy[..., None], torch.exp(delta * A).sum(0)[..., None]
