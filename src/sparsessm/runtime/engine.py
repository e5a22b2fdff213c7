"""The native engine: a token of decoding is one call, a prompt goes through products of whole slabs.

Place in the flow: an `Engine` (base.py), made from a packed or stock checkpoint's tensors. Only states that
remember are carried: an entry of A_log that keeps no memory (exp(Δ·A) = 0) answers with C_n·B_n·Δu at once,
so channels are sorted by how many states they keep, sixteen share a group with room for the most any of them
keeps, and half of the entries removed make half of the state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm import kernels
from sparsessm.architectures.base import REMOVED_A_LOG
from sparsessm.checkpoint.encoding import Encoded
from sparsessm.kernels.matrix import Decoder, Matrix
from sparsessm.runtime.base import fingerprint

SLAB = 512  # tokens of a prompt that are in memory together
LANES = 16  # channels of a group (runtime.h)
ORDER = "layer, [inputs of the convolution (K-1, D); kept states by group (slots, 16)]"


@dataclass(frozen=True)
class Slots:
    """Where the states of one layer live.

    Attributes:
        order: (D,) channel at each sorted place.
        slots: states that each group of 16 places has room for.
        entry: (size,) for each float of the state the entry channel * N + n of A_log; -1 where there is none.
    """

    order: Tensor
    slots: list[int]
    entry: Tensor

    @staticmethod
    def of(a_log: Tensor) -> Slots:
        """Sort the channels of A_log (D, N)."""
        channels, states = a_log.shape
        keeps = a_log < REMOVED_A_LOG["memoryless"]
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
        return Slots(order, slots, torch.cat(entries))

    @property
    def channel(self) -> Tensor:
        """int32 (padded channels,), -1 behind the last."""
        return F.pad(self.order, (0, -len(self.order) % LANES), value=-1).to(torch.int32)

    def sorted(self, vector: Tensor) -> Tensor:
        """A value per channel (D,) -> float32 (padded channels,) in the sorted order."""
        return F.pad(vector.float()[self.order], (0, -len(self.order) % LANES))

    def pack(self, scan: Tensor) -> Tensor:
        """States (D, N) -> (size,)."""
        return torch.where(self.entry < 0, 0.0, scan.flatten()[self.entry.clamp(min=0)])

    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """The reverse; states that are not kept are 0, which nothing ever reads."""
        scan, held = torch.zeros(math.prod(shape)), self.entry >= 0
        scan[self.entry[held]] = packed[held]
        return scan.view(shape)


class _Layer:
    """One layer's weights, for prompts in torch's terms and for the decoder in native ones."""

    def __init__(self, config: Any, tensors: Mapping[str, Encoded], prefix: str) -> None:
        def vector(name: str) -> Tensor | None:
            found = tensors.get(prefix + name)
            return None if found is None else found.decode(torch.float32)

        def needed(name: str) -> Tensor:
            found = vector(name)
            assert found is not None, name
            return found

        inner = int(config.intermediate_size)
        a_log = needed("mixer.A_log")
        self.slots = Slots.of(a_log)
        self.a, self.skip, self.norm = -torch.exp(a_log), needed("mixer.D"), needed("norm.weight")
        self.conv, self.conv_bias = needed("mixer.conv1d.weight")[:, 0], vector("mixer.conv1d.bias")
        self.in_bias, self.out_bias = vector("mixer.in_proj.bias"), vector("mixer.out_proj.bias")
        self.dt_bias = needed("mixer.dt_proj.bias")
        every = torch.arange(2 * inner)
        projection = tensors[prefix + "mixer.in_proj.weight"]
        self.in_x, self.in_z = matrix(projection, every[:inner]), matrix(projection, every[inner:])
        self.x_proj = matrix(tensors[prefix + "mixer.x_proj.weight"])
        step = tensors[prefix + "mixer.dt_proj.weight"]
        # twice, as it is small: in the order of the slots for decoding, as it came for prompts
        self.dt_proj, self.dt_rows = matrix(step, self.slots.order), matrix(step)
        self.out_proj = matrix(tensors[prefix + "mixer.out_proj.weight"])

    def native(self) -> dict[str, Any]:
        entry = self.slots.entry
        states, known = self.a.shape[1], entry.clamp(min=0)
        return {
            **{
                name: getattr(self, name)
                for name in ("in_x", "in_z", "x_proj", "dt_proj", "out_proj", "norm")
            },
            "conv": self.conv.T.contiguous().flatten(),
            "conv_bias": self.conv_bias,
            "in_bias": self.in_bias,
            "out_bias": self.out_bias,
            "dt_bias": self.slots.sorted(self.dt_bias),
            "skip": self.slots.sorted(self.skip),
            "channel": self.slots.channel,
            "slots": self.slots.slots,
            "A": torch.where(entry < 0, 0.0, self.a.flatten()[known] / math.log(2)),
            "index": (known % states).to(torch.uint8),
        }


class NativeEngine:
    """A Mamba-1 in native code; weights in the precision they are stored in, everything else in float32."""

    def __init__(self, config: Any, tensors: Mapping[str, Encoded], threads: int | None = None) -> None:
        """Lay out the weights.

        Args:
            config: a `transformers.MambaConfig`, or an object with its attributes.
            tensors: of a packed or stock checkpoint, checked, by their stock names.
            threads: of decoding; torch's number if None.
        """
        self._config, self._threads = config, threads
        self._layers = [
            _Layer(config, tensors, f"backbone.layers.{i}.") for i in range(int(config.num_hidden_layers))
        ]
        self._norm = tensors["backbone.norm_f.weight"].decode(torch.float32)
        self._embedding = matrix(tensors["backbone.embeddings.weight"])
        own = tensors.get("lm_head.weight")
        self._head = self._embedding if own is None else matrix(own)
        sizes = {
            "width": int(config.hidden_size),
            "channels": int(config.intermediate_size),
            "states": int(config.state_size),
            "rank": int(config.time_step_rank),
            "taps": int(config.conv_kernel),
            "vocabulary": int(config.vocab_size),
            "epsilon": float(config.layer_norm_epsilon),
        }
        rest = {"norm": self._norm, "embedding": self._embedding, "head": self._head}
        self._decoder = Decoder(sizes, [layer.native() for layer in self._layers], rest)
        self._past = (int(config.conv_kernel) - 1) * int(config.intermediate_size)
        self.vocabulary, self.state_size = self._decoder.vocabulary, self._decoder.state_size
        parts = {name: part for tensor in tensors.values() for name, part in tensor.parts.items()}
        self.layout = fingerprint(config, parts, ORDER)

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one decoding step reads."""
        small = ("a", "skip", "norm", "conv", "conv_bias", "in_bias", "out_bias", "dt_bias")
        large = ("in_x", "in_z", "x_proj", "dt_proj", "out_proj")
        vectors = (getattr(layer, name) for layer in self._layers for name in small)
        matrices = (getattr(layer, name) for layer in self._layers for name in large)
        return self._head.nbytes + sum(part.nbytes for part in (*vectors, *matrices) if part is not None)

    @property
    def resident(self) -> int:
        """As `Engine.resident`; vectors are held twice, for prompts and for decoding."""
        parts = [self._embedding, self._norm, self._norm]
        parts += [] if self._head is self._embedding else [self._head]
        for layer in self._layers:
            copied = [part for part in layer.native().values() if isinstance(part, Tensor)]
            parts += [*vars(layer).values(), *copied, layer.slots.order, layer.slots.entry]
        return sum(part.nbytes for part in parts if isinstance(part, (Matrix, Tensor)))

    def new_state(self, batch: int) -> Tensor:
        """As `Engine.new_state`."""
        return torch.zeros(batch, self.state_size)

    def step(self, tokens: Tensor, state: Tensor) -> Tensor:
        """As `Engine.step`."""
        return self._decoder.step(tokens, state, self._threads or torch.get_num_threads())

    @torch.no_grad()
    def prompt(self, tokens: Tensor, state: Tensor, every: bool = False) -> Tensor:
        """As `Engine.prompt`."""
        logits, hidden = [], torch.empty(0)
        for slab in tokens.split(SLAB):
            hidden = self._read(slab, state)
            if every:
                logits.append(self._logits(hidden))
        if every:
            return torch.cat(logits)
        return self._logits(hidden[-1:])[0]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._head.linear(self._normed(hidden, self._norm))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self._config.layer_norm_epsilon)

    def _read(self, tokens: Tensor, state: Tensor) -> Tensor:
        """(L,) tokens -> (L, d_model) after the last layer; the state (state_size,) is advanced."""
        hidden = torch.stack([self._embedding.row(token) for token in tokens.tolist()])
        at = 0
        for layer in self._layers:
            size = self._past + len(layer.slots.entry)
            x = self._normed(hidden, layer.norm)
            hidden += self._mixer(layer, x, state[at : at + self._past], state[at + self._past : at + size])
            at += size
        return hidden

    def _mixer(self, layer: _Layer, x: Tensor, conv: Tensor, scan: Tensor) -> Tensor:
        """(L, d_model), normalised -> (L, d_model); `conv` and `scan` are the layer's parts of the state."""
        (channels, states), taps = layer.a.shape, int(self._config.conv_kernel)
        rank = int(self._config.time_step_rank)
        biases = (None, None) if layer.in_bias is None else layer.in_bias.split(channels)
        u, z = layer.in_x.linear(x, biases[0]), layer.in_z.linear(x, biases[1])  # (L, D)
        before = conv.view(taps - 1, channels)
        next_before = torch.cat([before, u[-(taps - 1) :] if taps > 1 else u[:0]])[-(taps - 1) :]
        u = kernels.causal_conv1d(u[None], layer.conv, layer.conv_bias, before[None], silu=True)[0]
        conv.copy_(next_before[: taps - 1].flatten())
        raw, b, c = layer.x_proj.linear(u).split([rank, states, states], dim=-1)
        delta = layer.dt_rows.linear(raw, layer.dt_bias, softplus=True)
        start = layer.slots.unpack(scan, (channels, states))
        y, last = kernels.selective_scan(
            u[None], delta[None], layer.a, b[None], c[None], layer.skip, z[None], start[None]
        )
        scan.copy_(layer.slots.pack(last[0]))
        return layer.out_proj.linear(y[0], layer.out_bias)


def matrix(tensor: Encoded, rows: Tensor | None = None) -> Matrix:
    """The rows of a checked tensor, all if not given, in the form the kernels read."""
    tensor = tensor.bitmask()
    # float16 is read as float32, and so is a fill other than zero written out
    if tensor.values.dtype == torch.float16 or tensor.fill:
        values, scale = tensor.decode(torch.float32), None
    elif tensor.kind == "dense":
        values, scale = tensor.values, tensor.scale
    else:
        assert tensor.mask is not None
        return Matrix.packed(tensor.mask, tensor.shape[1], tensor.values, tensor.scale, rows)
    if rows is None:
        return Matrix.dense(values, scale)
    return Matrix.dense(values[rows], None if scale is None else scale[rows])
