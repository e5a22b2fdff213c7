"""The native engine: a token of decoding is one call, a prompt goes through products of whole slabs.

Place in the flow: an `Engine` (base.py), made from a packed or stock checkpoint's tensors. What is the same
for all models is here, the kinds of layers are `mamba1.py` and `mamba2.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.checkpoint.packed_tensor import PackedTensor
from sparsessm.checkpoint.shelf import Unread, give_back, shapes_of
from sparsessm.kernels.matrix import Decoder, Matrix
from sparsessm.runtime.base import joined, model_type, trace
from sparsessm.runtime.mamba1 import Mamba1
from sparsessm.runtime.mamba2 import Mamba2
from sparsessm.runtime.mixer import Weights, matrix

SLAB = 512  # tokens of a prompt that are in memory together
FEW = 8  # tokens that cost less one by one than as a slab, measured on one thread (docs/runtime.md)
Kind = type[Mamba1] | type[Mamba2]
MIXERS: Mapping[str, Kind] = {"mamba": Mamba1, "falcon_mamba": Mamba1, "mamba2": Mamba2}


class Traced(Unread):
    """Tensors that leave their part of the engine's fingerprint when they are asked for."""

    def __init__(self, tensors: Mapping[str, PackedTensor]) -> None:
        self._tensors, self._traces = tensors, dict[str, dict[str, str]]()
        self._shapes = shapes_of(tensors)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As `Unread.shapes`."""
        return self._shapes

    def __getitem__(self, name: str) -> PackedTensor:
        found = self._tensors[name]
        if name not in self._traces:
            self._traces[name] = {part: trace(part, array) for part, array in found.parts.items()}
        return found

    def traces(self) -> dict[str, str]:
        """Of all arrays of all tensors."""
        for name in self._tensors:
            if name not in self._traces:
                self[name]
        return {part: told for parts in self._traces.values() for part, told in parts.items()}


class NativeEngine:
    """A model in native code; weights in the precision they are stored in, everything else in float32."""

    def __init__(self, config: Any, tensors: Mapping[str, PackedTensor], threads: int | None = None) -> None:
        """Lay out the weights.

        Args:
            config: a configuration of transformers of a type of `MIXERS`, or an object with its attributes.
            tensors: of a packed or stock checkpoint, checked, by their stock names. Each is asked for once,
                if all are used, and not kept: they may be read from a file just then.
            threads: of decoding; torch's number if None.
        """
        self._threads, self._epsilon = threads, float(config.layer_norm_epsilon)
        tensors = Traced(tensors)
        # The largest first: while one is laid out it is in memory twice.
        self._embedding = matrix(tensors["backbone.embeddings.weight"])
        own = "lm_head.weight" in tensors
        self._head = matrix(tensors["lm_head.weight"]) if own else self._embedding
        mixer, layers = MIXERS[model_type(config)], range(int(config.num_hidden_layers))
        self._layers = []
        for i in layers:
            give_back()  # else small things that stay keep the pages of large ones that went
            self._layers.append(mixer(config, Weights(tensors, f"backbone.layers.{i}.")))
        self._norm = tensors["backbone.norm_f.weight"].decode(torch.float32)
        sizes = {
            "width": int(config.hidden_size),
            "states": int(config.state_size),
            "taps": int(config.conv_kernel),
            "vocabulary": int(config.vocab_size),
            "epsilon": self._epsilon,
            **mixer.sizes(config),
        }
        rest = {"norm": self._norm, "embedding": self._embedding, "head": self._head}
        self._decoder = Decoder(sizes, [layer.native() for layer in self._layers], rest)
        self.vocabulary, self.state_size = self._decoder.vocabulary, self._decoder.state_size
        assert self.state_size == sum(layer.state_size for layer in self._layers)
        self.layout = joined(config, tensors.traces(), mixer.ORDER)

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one decoding step reads."""
        return self._head.nbytes + sum(layer.nbytes for layer in self._layers)

    @property
    def resident(self) -> int:
        """As `Engine.resident`; vectors are held twice, for prompts and for decoding."""
        parts = [self._embedding, self._norm, self._norm]
        parts += [] if self._head is self._embedding else [self._head]
        parts += [part for layer in self._layers for part in layer.held()]
        return sum(part.nbytes for part in parts if isinstance(part, (Matrix, Tensor)))

    @property
    def sections(self) -> list[tuple[int, int]]:
        """As `Engine.sections`."""
        sizes = [
            (layer.conv.shape[0] * (layer.conv.shape[1] - 1), layer.state_size) for layer in self._layers
        ]
        return [(inputs, both - inputs) for inputs, both in sizes]

    def new_state(self, batch: int) -> Tensor:
        """As `Engine.new_state`."""
        return torch.zeros(batch, self.state_size)

    def step(self, tokens: Tensor, state: Tensor) -> Tensor:
        """As `Engine.step`."""
        return self._decoder.step(tokens, state, self._threads or torch.get_num_threads())

    @torch.no_grad()
    def prompt(self, tokens: Tensor, state: Tensor, every: bool = False) -> Tensor:
        """As `Engine.prompt`."""
        logits, slabs = [], tokens.split(SLAB)
        for slab in slabs:
            if len(slab) <= FEW:
                logits += [self.step(token, state[None]) for token in slab.split(1)]
                continue
            hidden = self._read(slab, state)
            if every or slab is slabs[-1]:
                logits.append(self._logits(hidden if every else hidden[-1:]))
        return torch.cat(logits) if every else logits[-1][0]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._head.linear(self._normed(hidden, self._norm))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self._epsilon)

    def _read(self, tokens: Tensor, state: Tensor) -> Tensor:
        """(L,) tokens -> (L, d_model) after the last layer; the state (state_size,) is advanced."""
        hidden = torch.stack([self._embedding.row(token) for token in tokens.tolist()])
        parts = state.split([layer.state_size for layer in self._layers])
        for layer, own in zip(self._layers, parts, strict=True):
            hidden += layer.read(self._normed(hidden, layer.norm), own)
        return hidden
