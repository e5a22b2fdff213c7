"""A layer of Mamba-2 in the native engine: heads of P channels with one decay each, N states a channel.

Place in the flow: a `Mixer` (mixer.py). Where B and C are projected (architectures/projected.py), the states
are fewer than N. A head whose decay is zero (exp(Δ·A) = 0) answers with C·B Δu at once and has no place in
the state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.architectures import removed_a_log
from sparsessm.checkpoint.known_fields import optional
from sparsessm.kernels.matrix import Matrix
from sparsessm.kernels.ssd import ssd_scan
from sparsessm.runtime.base import heads, limits
from sparsessm.runtime.keys import Reading
from sparsessm.runtime.mixer import Mixer
from sparsessm.runtime.part import Place, scaled
from sparsessm.runtime.weights import LANES, Weights, matrices, padded


class Mamba2(Mixer):
    """Of Mamba-2 and hybrids; FalconH1 has multipliers, and its norm may be missing or before the gate."""

    ORDER = "layer, [inputs of the convolution (K-1, D + 2GN); states of heads with memory (N, P)]"

    def __init__(self, config: Any, weights: Weights, place: Place) -> None:
        super().__init__(weights, place)
        self.size, self._epsilon = heads(config), float(config.layer_norm_epsilon)
        self._limit = limits(config)
        stored = weights.stored("A_log")
        a_log, forgets = stored.decode(torch.float32), removed_a_log(stored.dtype)["memoryless"]
        self.keeps, self.a = a_log < forgets, -torch.exp(a_log)
        normed = optional(config, "gated_norm", True)
        self.gated_norm, self.dt_bias = (
            weights.vector("norm.weight") if normed else None,
            weights.vector("dt_bias"),
        )
        self._norm_first = bool(optional(config, "norm_before_gate", False))
        widths, self.in_bias = [self.size.inner, self.size.mixed, self.size.heads], None
        gates, steps = self._multiplied(optional(config, "multipliers"))
        if (bias := weights.optional("in_proj.bias")) is not None:
            of_gate, of_conv, of_step = bias.split(widths)
            self.in_bias = torch.cat([of_conv, of_gate * gates])
            self.dt_bias = self.dt_bias + of_step * steps
        projection = weights.stored("in_proj.weight")
        self.in_z, self.in_x, self.in_dt = matrices(projection, torch.arange(sum(widths)).split(widths))
        self.B_projection, self.C_projection = map(weights.optional, ("B_projection", "C_projection"))
        directions = self.size.states if self.B_projection is None else self.B_projection.shape[1]
        self._kept = (int(self.keeps.sum()), directions, self.size.channels)
        self.state_size = (int(config.conv_kernel) - 1) * self.size.mixed + math.prod(self._kept)

    def _multiplied(self, factors: Sequence[float] | None) -> tuple[float, float]:
        """Take FalconH1's multipliers: of the input, of the gate, of x, B and C, of the step size.

        Those of x, B and C go into the convolution, whose weights are float32, the others stay factors of
        products: packed weights are what they were.

        Returns:
            those of the gate and of the step size, which their biases get too.
        """
        self._step_scale = 1.0
        if factors is None:
            return 1.0, 1.0
        whole, gates, *mixed, steps = map(float, factors)
        widths = torch.tensor([self.size.inner, *[self.size.groups * self.size.states] * 2])
        self.conv = self.conv * torch.tensor(mixed).repeat_interleave(widths)[:, None]
        self.in_scale, self.gate_scale, self._step_scale = whole, whole * gates, whole * steps
        return gates, steps

    @staticmethod
    def sizes(config: Any) -> dict[str, Any]:
        """As `Mixer.sizes`."""
        size, (least, most) = heads(config), limits(config)
        return {
            "channels": size.inner,
            "heads": size.heads,
            "groups": size.groups,
            "least": least,
            "most": most,
        }

    def matrices(self) -> dict[str, Matrix]:
        """As `Mixer.matrices`."""
        return {"in_x": self.in_x, "in_z": self.in_z, "in_dt": self.in_dt, "out_proj": self.out_proj}

    def vectors(self) -> list[Tensor | None]:
        """As `Mixer.vectors`."""
        return [self.a, self.dt_bias, self.gated_norm, self.B_projection, self.C_projection]

    def of_kind(self) -> dict[str, Any]:
        """As `Mixer.of_kind`."""
        projections = {}
        if self.B_projection is not None and self.C_projection is not None:
            projections = {
                "directions": self._kept[1],
                "B_projection": _by_state(self.B_projection),
                "C_projection": _by_state(self.C_projection),
            }
        return projections | {
            "dt_bias": padded(self.dt_bias),
            "skip": padded(self.skip),
            "A": padded(self.a / math.log(2)),
            "gated_norm": self.gated_norm,
            "gated_epsilon": self._epsilon,
            "norm_first": self._norm_first,
            "step_scale": self._step_scale,
            "keeps": self.keeps.to(torch.uint8),
        }

    def beside(self) -> Sequence[Tensor]:
        """As `Mixer.beside`."""
        return ()

    def read(self, x: Tensor, state: Tensor, kept: Reading | None = None) -> Tensor:
        """As `Part.read`."""
        size = self.size
        mixed, z = self.project(x)
        if self._step_scale == 1:
            delta = self.in_dt.linear(x, self.dt_bias, softplus=True)
        else:
            delta = F.softplus(scaled(self.in_dt, x, self.dt_bias, self._step_scale))
        delta = delta.clamp(*self._limit)  # (L, H)
        mixed, scan = self.convolve(mixed, state)
        widths = [size.inner, size.groups * size.states, size.groups * size.states]
        u, b, c = (part[None] for part in mixed.split(widths, dim=-1))
        u = u.unflatten(-1, (size.heads, size.channels))
        b, c = (part.unflatten(-1, (size.groups, size.states)) for part in (b, c))
        if self.B_projection is not None and self.C_projection is not None:
            b = torch.einsum("wtgn,grn->wtgr", b, self.B_projection)
            c = torch.einsum("wtgn,grn->wtgr", c, self.C_projection)
        own = scan.view(self._kept)
        start = torch.zeros(1, size.heads, size.channels, self._kept[1])
        start[0, self.keeps] = own.mT
        y, last = ssd_scan(u, delta[None], self.a, b, c, self.skip, start)
        own.copy_(last[0, self.keeps].mT)
        return self.out_proj.linear(self._gated(y[0].flatten(-2), z), self.out_bias)

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """(L, D), what the scan gives, and the gate -> (L, D), gated and normalised."""
        if self.gated_norm is None:
            return y * F.silu(z)
        if not self._norm_first:
            y = y * F.silu(z)
        y = y.unflatten(-1, (self.size.groups, -1))
        y = F.rms_norm(y, y.shape[-1:], None, self._epsilon).flatten(-2) * self.gated_norm
        return y * F.silu(z) if self._norm_first else y


def _by_state(projection: Tensor) -> Tensor:
    """(G, r, N) -> (G N padded r) values, those of a state side by side, as the decoder reads them."""
    return F.pad(projection.mT, (0, -projection.shape[1] % LANES)).flatten()
