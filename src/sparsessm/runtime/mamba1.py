"""A layer of Mamba-1 in the native engine: each channel of its scan has N states and a decay for each.

Place in the flow: a `Mixer` (mixer.py). Only states that remember are carried: an entry of A_log that keeps
no memory (exp(Δ·A) = 0) answers with C_n·B_n·Δu at once, so channels are sorted by how many states they keep,
sixteen share a group with room for the most any of them keeps, and half of the entries removed make half of
the state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm import kernels
from sparsessm.architectures import REMOVED_A_LOG, removed_a_log
from sparsessm.kernels.matrix import Matrix
from sparsessm.runtime.base import channels_of, mixer_epsilon, scan_shapes
from sparsessm.runtime.keys import Reading
from sparsessm.runtime.mixer import Mixer
from sparsessm.runtime.part import Place
from sparsessm.runtime.weights import LANES, Weights, matrices, matrix, padded


@dataclass(frozen=True)
class Slots:
    """Where the states of one layer live.

    Attributes:
        order: (D,) channel at each sorted place.
        slots: states that each group of 16 places has room for.
        entry: (size,) for each float of the state the entry channel * N + n of A_log; -1 where there is none.
        place: (D N,) for each entry the float of the state; that behind the last where there is none.
    """

    order: Tensor
    slots: list[int]
    entry: Tensor
    place: Tensor

    @staticmethod
    def of(a_log: Tensor, forgets: float = REMOVED_A_LOG["memoryless"]) -> Slots:
        """Sort the channels of A_log (D, N); entries of at least `forgets` keep no memory."""
        channels, states = a_log.shape
        keeps = a_log < forgets
        counts = keeps.sum(1)
        order = torch.argsort(counts, stable=True)
        # kept states first; those behind them fill up the room that a channel of the group does not need
        first = torch.argsort((~keeps).to(torch.int8), dim=1, stable=True)
        slots, entries = [], []
        for place in range(0, channels, LANES):
            group = order[place : place + LANES]
            room = int(counts[group].max())
            chosen = torch.arange(states).expand(len(group), -1) if room == states else first[group, :room]
            entry = torch.full((room, LANES), -1)
            entry[:, : len(group)] = (group[:, None] * states + chosen).T
            slots.append(room)
            entries.append(entry.flatten())
        entry = torch.cat(entries).to(torch.int32)
        place = torch.full((a_log.numel(),), len(entry), dtype=torch.int32)
        held = (entry >= 0).nonzero()[:, 0]
        place[entry[held]] = held.to(torch.int32)
        return Slots(order, slots, entry, place)

    @property
    def channel(self) -> Tensor:
        """int32 (padded channels,), -1 behind the last."""
        return F.pad(self.order, (0, -len(self.order) % LANES), value=-1).to(torch.int32)

    def sorted(self, vector: Tensor) -> Tensor:
        """A value per channel (D,) -> float32 (padded channels,) in the sorted order."""
        return padded(vector[self.order])

    def pack(self, scan: Tensor) -> Tensor:
        """States (D, N) -> (size,)."""
        packed = scan.flatten().index_select(0, self.entry.clamp(min=0))
        return packed.masked_fill_(self.entry < 0, 0.0)

    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """The reverse; states that are not kept are 0, which nothing ever reads."""
        return F.pad(packed, (0, 1)).index_select(0, self.place).view(shape)


class Mamba1(Mixer):
    """Of Mamba; of FalconMamba and Jamba, which normalise the inputs of dt_proj, B and C."""

    ORDER = "layer, [inputs of the convolution (K-1, D); kept states by group (slots, 16)]"

    def __init__(self, config: Any, weights: Weights, place: Place) -> None:
        inner = channels_of(config, weights.shape)
        weights.check(scan_shapes(config, inner))
        super().__init__(weights, place)
        stored = weights.stored("A_log")
        a_log, forgets = stored.decode(torch.float32), removed_a_log(stored.dtype)["memoryless"]
        self.slots, self.a = Slots.of(a_log, forgets), -torch.exp(a_log)
        self.in_bias = weights.optional("in_proj.bias")
        self.dt_bias = weights.vector("dt_proj.bias")
        every, projection = torch.arange(2 * inner), weights.stored("in_proj.weight")
        self.in_x, self.in_z = matrices(projection, [every[:inner], every[inner:]])
        self.x_proj = matrix(weights.stored("x_proj.weight"))
        step = weights.stored("dt_proj.weight")
        # twice, as it is small: in the order of the slots for decoding, as it came for prompts
        self.dt_proj, self.dt_rows = matrices(step, [self.slots.order, None])
        self.state_size = (int(config.conv_kernel) - 1) * inner + len(self.slots.entry)
        self._epsilon = mixer_epsilon(config)
        names = [f"{name}_layernorm.weight" for name in ("dt", "b", "c")]
        self._readings = [weights.vector(name) for name in names] if weights.shape(names[0]) else None

    @staticmethod
    def sizes(config: Any) -> dict[str, Any]:
        """As `Mixer.sizes`."""
        epsilon = mixer_epsilon(config)
        norms = {} if epsilon is None else {"mixer_epsilon": epsilon}
        return {"rank": int(config.time_step_rank)} | norms

    def matrices(self) -> dict[str, Matrix]:
        """As `Mixer.matrices`."""
        inner = {"in_x": self.in_x, "in_z": self.in_z, "x_proj": self.x_proj}
        return inner | {"dt_proj": self.dt_proj, "out_proj": self.out_proj}

    def vectors(self) -> list[Tensor | None]:
        """As `Mixer.vectors`."""
        return [self.a, self.dt_bias, *(self._readings or [])]

    def of_kind(self) -> dict[str, Any]:
        """As `Mixer.of_kind`."""
        entry = self.slots.entry
        states, known = self.a.shape[1], entry.clamp(min=0)
        return {
            "dt_bias": self.slots.sorted(self.dt_bias),
            "skip": self.slots.sorted(self.skip),
            "readings": None if self._readings is None else torch.cat(self._readings),
            "channel": self.slots.channel,
            "slots": self.slots.slots,
            "A": torch.where(entry < 0, 0.0, self.a.flatten()[known] / math.log(2)),
            "index": (known % states).to(torch.uint8),
        }

    def beside(self) -> Sequence[Tensor]:
        """As `Mixer.beside`."""
        return self.slots.order, self.slots.entry, self.slots.place, *(self._readings or [])

    def read(self, x: Tensor, state: Tensor, kept: Reading | None = None) -> Tensor:
        """As `Part.read`."""
        channels, states = self.a.shape
        u, z = self.project(x)  # (L, D)
        u, scan = self.convolve(u, state)
        parts = self.x_proj.linear(u).split([self.dt_rows.cols, states, states], dim=-1)
        if self._epsilon is not None:
            norms = self._readings or [None] * 3
            parts = tuple(
                F.rms_norm(part, part.shape[-1:], norm, self._epsilon)
                for part, norm in zip(parts, norms, strict=True)
            )
        raw, b, c = parts
        delta = self.dt_rows.linear(raw, self.dt_bias, softplus=True)
        start = self.slots.unpack(scan, (channels, states))
        y, last = kernels.selective_scan(
            u[None], delta[None], self.a, b[None], c[None], self.skip, z[None], start[None]
        )
        scan.copy_(self.slots.pack(last[0]))
        return self.out_proj.linear(y[0], self.out_bias)
