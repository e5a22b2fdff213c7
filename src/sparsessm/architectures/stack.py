"""Models that are nothing but mixers: Mamba, FalconMamba and Mamba-2 of transformers.

Each layer is hidden + mixer(norm(hidden)); what is inside the mixer say `mamba1.py` and `mamba2.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsessm.architectures import projected
from sparsessm.architectures.base import Architecture, Block, Tail, Tap, renumbered
from sparsessm.architectures.embedding import embedded
from sparsessm.architectures.kept import Kept
from sparsessm.architectures.mamba1 import Mamba1Kind
from sparsessm.architectures.mamba2 import Mamba2Kind
from sparsessm.architectures.mixer import MixerKind
from sparsessm.architectures.outputs import kept_outputs
from sparsessm.architectures.own import Own, level


class StackBlock(Block):
    """One layer: hidden + mixer(norm(hidden))."""

    mixer = "mixer"

    def __init__(self, kind: MixerKind, layer: Any, index: int, stored: Mapping[str, torch.dtype]) -> None:
        self.index, self.name = index, f"backbone.layers.{index}"
        self.layer, self._kind, self._stored = layer, kind, stored
        self.targets = kind.targets(layer.mixer, f"{self.name}.mixer.", index, stored)
        self.axes = kind.axes(layer.mixer, "mixer.")

    def forward(
        self,
        hidden: Tensor,
        state: Any = None,
        taps: Mapping[str, Tap] | None = None,
        until: str | None = None,
        kept: Kept | None = None,
    ) -> tuple[Tensor | None, Any]:
        layer: Any = self.layer
        out, state = self._kind.forward(layer.mixer, layer.norm(hidden), state, taps or {}, until, kept)
        return out if out is None else hidden + out, state

    def linear(self) -> dict[str, nn.Module]:
        linear = [target for target in self.targets if target.module_class == "Linear"]
        mixer: Any = self.layer.mixer
        return {target.name: mixer.get_submodule(target.kind) for target in linear}

    def outputs(self) -> AbstractContextManager[dict[str, Tensor]]:
        return kept_outputs(self.linear())

    def copy(self) -> StackBlock:
        return StackBlock(self._kind, copy.deepcopy(self.layer), self.index, self._stored)


class Stack(Architecture):
    """What these models have in common. `kind`: of their mixers."""

    kind: MixerKind

    def __init__(self, model: nn.Module, stored: Mapping[str, torch.dtype]) -> None:
        self.model, self.stored = model, stored
        self._backbone: Any = model.backbone
        self._lm_head: Any = model.lm_head
        config = self._backbone.config
        if Own.of(model):  # a stock layer of another shape has no place for what it has
            self.structure, self.projects, self.widens = ("block",), False, False
        if config.hidden_act not in ("silu", "swish"):
            raise ValueError(f"hidden_act is {config.hidden_act!r}; supported: 'silu'")
        self.states = int(config.state_size)
        self.blocks = tuple(self._block(i, layer) for i, layer in enumerate(self._backbone.layers))
        self.tied = self._lm_head.weight is self._backbone.embeddings.weight
        # A tied weight is one target, under the name it is stored by.
        tied_name = "backbone.embeddings.weight"
        name = tied_name if self.tied and "lm_head.weight" not in stored else "lm_head.weight"
        table = tied_name, self._backbone.embeddings
        norms = self._backbone.norm_f, self._backbone.norm_f
        self.tail = Tail(norms, self._lm_head, name, len(self.blocks), stored, table)

    def _block(self, index: int, layer: Any) -> StackBlock:
        own = isinstance(layer.mixer, projected.ProjectedMixer)
        return StackBlock(projected.KIND if own else self.kind, layer, index, self.stored)

    def embed(self, tokens: Tensor) -> Tensor:
        return embedded(self._backbone.embeddings, tokens)

    @property
    def logit_scale(self) -> float:
        return 1.0

    def looked_up(self, grad: Tensor) -> Tensor:
        return grad

    def head(self, hidden: Tensor) -> Tensor:
        return self._lm_head(self._backbone.norm_f(hidden))

    def resize(self, block: Block, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Block:
        layer = self._backbone.layers[block.index]
        config = copy.deepcopy(self._backbone.config)
        for name, value in fields.items():
            setattr(config, name, value)
        # the start values, which are all replaced, are drawn from it; buffers stay
        with torch.random.fork_rng([]), torch.device(next(layer.parameters()).device):
            new = type(layer)(config, layer_idx=block.index)
        new.load_state_dict(dict(tensors), assign=True)
        new.requires_grad_(next(layer.parameters()).requires_grad).eval()
        self._backbone.layers[block.index] = new
        return self._replaced(self._block(block.index, new))

    def _replaced(self, block: Block) -> Block:
        self.blocks = (*self.blocks[: block.index], block, *self.blocks[block.index + 1 :])
        return block

    def drop(self, index: int) -> None:
        layers = self._backbone.layers
        del layers[index]
        self.stored = renumbered(self.stored, "backbone.layers.", index)
        for i, layer in enumerate(layers):
            for part in (layer, layer.mixer):
                part.layer_idx = i
        config: Any = self.model.config
        config.num_hidden_layers = len(layers)
        self.blocks = tuple(self._block(i, layer) for i, layer in enumerate(layers))
        self.tail.index = len(layers)
        self.tail.targets = tuple(replace(target, layer=len(layers)) for target in self.tail.targets)
        level(self.model)

    def project(self, block: Block, B: Tensor, C: Tensor) -> Block:
        if not self.projects:
            raise ValueError(f"the states of a {type(self).__name__} model cannot be projected")
        projected.attach(self.model, {block.index: B.shape[1]})
        layer: Any = block.layer
        with torch.no_grad():
            for name, matrix in zip(projected.MATRICES, (B, C), strict=True):
                parameter = layer.mixer.get_parameter(name)
                parameter.copy_(matrix)
                self.stored = {**self.stored, f"{block.name}.mixer.{name}": parameter.dtype}
        return self._replaced(self._block(block.index, block.layer))


class Mamba1Stack(Stack):
    """Of Mamba-1 layers."""

    structure = ("state", "channel", "block")
    widens = True

    def fields(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        # Newer releases want a whole `expand`, but take the product of it if it stands in the file.
        words = {"state": "state_size", "channel": "intermediate_size"}
        return {words[axis]: size for axis, size in sizes.items() if axis in words}


class Mamba(Mamba1Stack):
    """Mamba, Mamba-1 layers (`MambaForCausalLM`)."""

    kind = Mamba1Kind()


class FalconMamba(Mamba1Stack):
    """FalconMamba, Mamba-1 layers with norms on B, C and step size (`FalconMambaForCausalLM`)."""

    kind = Mamba1Kind(norms="weightless")


class Mamba2(Stack):
    """Mamba-2, heads with one decay each (`Mamba2ForCausalLM`)."""

    kind = Mamba2Kind()
    structure = ("state", "head", "channel", "block")
    projects = True

    def fields(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        config: Any = self.model.config
        found = {"state_size": sizes["state"]} if "state" in sizes else {}
        if "head" in sizes or "channel" in sizes:
            heads = sizes["head"] * config.n_groups if "head" in sizes else config.num_heads  # of each group
            inner = heads * sizes.get("channel", config.head_dim)  # channels of each head
            if inner % config.hidden_size:
                raise ValueError(
                    f"stock Mamba-2 cannot have {inner} channels in all heads; allowed: multiples of "
                    f"hidden_size {config.hidden_size}"
                )
            found |= {"num_heads": heads, "head_dim": inner // heads, "expand": inner // config.hidden_size}
        return found
