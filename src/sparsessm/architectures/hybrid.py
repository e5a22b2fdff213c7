"""The hybrid families of transformers: layers of Mamba, attention, MLPs and experts in many combinations.

`hybrid_block.py` runs a layer; here is the model around the layers, and a class for each family with what
differs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sparsessm.architectures import mamba1, mamba2
from sparsessm.architectures.attention import IMPLEMENTATIONS
from sparsessm.architectures.base import Architecture, Block, Tail, renumbered
from sparsessm.architectures.embedding import embedded
from sparsessm.architectures.hybrid_block import HybridBlock, Setting, Zamba2Block, inside

ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
EXPANDED = {
    "state": "mamba_d_state",
    "head": "mamba_n_heads",
    "channel": "mamba_d_head",
    "expand": "mamba_expand",
}


class Hybrid(Architecture):
    """What the hybrids have in common.

    Attributes:
        kind, order: as in `Setting`. block: how a layer is run.
        embedding, norm: names of the embedding and the final norm.
        words: what the stock configuration calls the numbers of states, heads and channels of a head, and the
            channels of all heads: `inner`, or `expand` as a multiple of the model's width.
        lists: fields with an entry for each layer.
    """

    kind: ModuleType = mamba2
    order: tuple[str, ...]
    block: type[HybridBlock] = HybridBlock
    embedding = "embed_tokens"
    norm = "final_layernorm"
    words: Mapping[str, str]
    lists: tuple[str, ...] = ()
    structure = ("state", "head", "channel", "block")

    def __init__(self, model: nn.Module, stored: Mapping[str, torch.dtype]) -> None:
        self.model, self.stored = model, stored
        self._backbone: Any = model.model
        self._lm_head: Any = model.lm_head
        self._config: Any = model.config
        self._embedding: Any = getattr(self._backbone, self.embedding)
        self._normed = self._reading(getattr(self._backbone, self.norm))
        if self._config._attn_implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"attention is {self._config._attn_implementation!r}; supported: {', '.join(IMPLEMENTATIONS)}"
            )
        self.states = int(getattr(self._config, self.words["state"]))
        self.tied = self._lm_head.weight is self._embedding.weight
        self._refresh()
        for mixer in self._mixers():
            if mixer.activation not in ("silu", "swish"):
                raise ValueError(f"hidden_act is {mixer.activation!r}; supported: 'silu'")

    def _refresh(self) -> None:
        """Blocks and tail for the model as it is now."""
        layers = self._backbone.layers
        self.blocks = tuple(self._block(i) for i in range(len(layers)))
        tied_name = f"model.{self.embedding}.weight"  # a tied weight is one target, named as it is stored
        name = tied_name if self.tied and "lm_head.weight" not in self.stored else "lm_head.weight"
        self.tail = Tail(self._normed, self._lm_head, name, len(layers), self.stored)

    def _block(self, index: int) -> HybridBlock:
        rotary = getattr(self._backbone, "rotary_emb", None)
        setting = Setting(self.kind, self.order, rotary, self.stored)
        return self.block(setting, self._backbone.layers[index], index, self._shared(index))

    def _shared(self, index: int) -> dict[str, tuple[int, ...]]:
        """Paths of a layer's linear layers whose weight other layers have too -> all that have it."""
        found = {}
        layers = list(self._backbone.layers)
        for path in self.order:
            weights = [getattr(inside(layer, path), "weight", None) for layer in layers]
            uses = tuple(i for i, w in enumerate(weights) if w is not None and w is weights[index])
            if len(uses) > 1:
                found[path] = uses
        return found

    def _mixers(self) -> list[Any]:
        found = (inside(b.layer, b.mixer) for b in self.blocks if isinstance(b, HybridBlock) and b.mixer)
        return list(found)

    def embed(self, tokens: Tensor) -> Tensor:
        return embedded(self._embedding, tokens) * getattr(self._backbone, "embedding_multiplier", 1.0)

    def _reading(self, norm: Any) -> Callable[[Tensor], Tensor]:
        """What makes of the stream what the head reads; does not hold on to this object."""
        return norm

    def head(self, hidden: Tensor) -> Tensor:
        return self._lm_head(self._normed(hidden))

    def fields(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        words, config = self.words, self._config
        found = {words["state"]: sizes["state"]} if "state" in sizes else {}
        if "head" not in sizes and "channel" not in sizes:
            return found
        heads, channels = getattr(config, words["head"]), getattr(config, words["channel"])
        if "head" in sizes:  # of each group
            heads = sizes["head"] * self._mixers()[0].n_groups
        channels = sizes.get("channel", channels)  # of each head
        found |= {words["head"]: heads, words["channel"]: channels}
        if "inner" in words:
            found[words["inner"]] = heads * channels
        if "expand" in words:
            found[words["expand"]] = self._expand(heads * channels)
        return found

    def _expand(self, inner: int) -> int:
        width = self._config.hidden_size
        if inner % width:
            raise ValueError(
                f"stock {self._config.model_type} cannot have {inner} channels; allowed: multiples of "
                f"hidden_size {width}"
            )
        return inner // width

    def resize(self, block: Block, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Block:
        assert isinstance(block, HybridBlock) and block.mixer is not None, "no mixer, no axes"
        layer = self._backbone.layers[block.index]
        config = copy.deepcopy(self._config)
        for name, value in fields.items():
            setattr(config, name, value)
        old, prefix = inside(layer, block.mixer), f"{block.mixer}."
        new = self._new_mixer(type(old), config, block.index)
        mixed = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        new.load_state_dict(mixed, assign=True)
        new.requires_grad_(next(old.parameters()).requires_grad).eval()
        parent, _, own = block.mixer.rpartition(".")
        setattr(layer.get_submodule(parent), own, new)
        # The rest keeps its place, which other layers may share: axes lie in the mixer alone.
        made = self._block(block.index)
        self.blocks = (*self.blocks[: block.index], made, *self.blocks[block.index + 1 :])
        return made

    def _new_mixer(self, of: type[nn.Module], config: Any, index: int) -> nn.Module:
        with torch.random.fork_rng([]):  # the start values, which are all replaced, are drawn from it
            return of(config, layer_idx=index)  # type: ignore[call-arg]

    def may_go(self, gone: Collection[int]) -> list[int]:
        """As `Architecture.may_go`: stock caches want a layer of attention, and the rest a mixer."""
        left = [b for b in self.blocks if isinstance(b, HybridBlock) and b.index not in gone]
        kinds = [{"mixer": block.mixer is not None, "attention": block.attends} for block in left]
        last = [kind for kind in ("mixer", "attention") if sum(has[kind] for has in kinds) == 1]
        return [
            block.index for block, has in zip(left, kinds, strict=True) if not any(has[kind] for kind in last)
        ]

    def drop(self, index: int) -> None:
        """As `Architecture.drop`.

        Raises:
            ValueError: the stock configuration has no words for the layers that would be left.
        """
        shorter = self._without(index)
        del self._backbone.layers[index]
        self.stored = renumbered(self.stored, "model.layers.", index)
        for name, value in shorter.items():
            setattr(self._config, name, value)
        for i, layer in enumerate(self._backbone.layers):
            for module in layer.modules():
                if getattr(module, "layer_idx", -1) >= 0:  # shared modules say -1
                    module.layer_idx = i
        self._refresh()

    def _without(self, index: int) -> dict[str, Any]:
        """The configuration's fields when a layer is gone."""
        config = copy.deepcopy(self._config)
        kept = [kind for i, kind in enumerate(self._layout(config)) if i != index]
        found = self._shorter(index)
        for name, value in found.items():
            setattr(config, name, value)
        if self._layout(config) != kept:
            raise ValueError(
                f"layer {index} cannot be removed: stock {config.model_type} derives the kind of a layer "
                "from its number"
            )
        return found

    def _shorter(self, index: int) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: [kind for i, kind in enumerate(getattr(self._config, name)) if i != index]
            for name in self.lists
        }
        return found | {"num_hidden_layers": len(self.blocks) - 1}

    def _layout(self, config: Any) -> list[Any]:
        """What each layer is, according to a configuration."""
        return list(config.layers_block_type)


class Jamba(Hybrid):
    """Mamba-1 with norms, attention without positions, MLPs or experts (`JambaForCausalLM`)."""

    kind = mamba1
    order = (
        "mamba",
        *ATTENTION,
        *(f"feed_forward.{name}_proj" for name in ("gate", "up", "down")),
        "feed_forward.experts",
    )
    words = {"state": "mamba_d_state", "expand": "mamba_expand"}
    structure = ("state", "channel")  # what a layer is follows from its number, so none can be left out

    def fields(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        found = super().fields({axis: size for axis, size in sizes.items() if axis != "channel"})
        if "channel" in sizes:
            found[self.words["expand"]] = self._expand(sizes["channel"])
        return found

    def _layout(self, config: Any) -> list[Any]:
        return list(zip(config.layers_block_type, config.layers_num_experts, strict=True))


class Bamba(Hybrid):
    """Mamba-2 or attention, then an MLP (`BambaForCausalLM`)."""

    order = ("mamba", *ATTENTION, *(f"feed_forward.{name}_proj" for name in ("gate", "up", "down")))
    words = EXPANDED

    def _shorter(self, index: int) -> dict[str, Any]:
        attention = [i for i in self._config.attn_layer_indices or [] if i != index]
        moved = [i - (i > index) for i in attention]
        return super()._shorter(index) | {"attn_layer_indices": moved}


class FalconH1(Hybrid):
    """Mamba-2 and attention side by side, then an MLP; multipliers everywhere (`FalconH1ForCausalLM`)."""

    order = ("mamba", *ATTENTION, *(f"feed_forward.{name}_proj" for name in ("up", "gate", "down")))
    words = {
        "state": "mamba_d_state",
        "head": "mamba_n_heads",
        "channel": "mamba_d_head",
        "inner": "mamba_d_ssm",
    }

    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden) * self._backbone.lm_head_multiplier

    def _new_mixer(self, of: type[nn.Module], config: Any, index: int) -> nn.Module:
        from transformers.models.falcon_h1.modeling_falcon_h1 import compute_mup_vector

        mixer = super()._new_mixer(of, config, index)
        mixer.register_buffer("mup_vector", compute_mup_vector(config), persistent=False)  # the model does it
        return mixer


class NemotronH(Hybrid):
    """Each layer is one of Mamba-2, attention without positions, MLP or experts (`NemotronHForCausalLM`)."""

    order = (
        "mixer",
        *(f"mixer.{name}_proj" for name in "qkvo"),
        "mixer.fc1_latent_proj",
        "mixer.experts",
        "mixer.fc2_latent_proj",
        *(f"mixer.shared_experts.{name}_proj" for name in ("up", "down")),
        *(f"mixer.{name}_proj" for name in ("up", "down")),
    )
    embedding, norm = "embeddings", "norm_f"
    words = {"state": "ssm_state_size", "head": "mamba_num_heads", "channel": "mamba_head_dim"}
    lists = ("layers_block_type",)


class GraniteMoeHybrid(Hybrid):
    """Mamba-2 or attention, then an MLP and maybe experts beside it (`GraniteMoeHybridForCausalLM`)."""

    order = (
        "mamba",
        *ATTENTION,
        "block_sparse_moe.experts",
        "shared_mlp.input_linear",
        "shared_mlp.output_linear",
    )
    norm = "norm"
    words = EXPANDED
    lists = ("layer_types",)

    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden) / self._config.logits_scaling


class Zamba2(Hybrid):
    """Mamba-2 layers, some behind a transformer block that they share (`Zamba2ForCausalLM`).

    The shared block reads the embedding beside the stream, so `embed` gives both, one behind the other, and
    blocks pass the second on. Its matrices are targets of the first layer that uses it (`SharedTarget`); the
    adapters that each use adds to them are no targets.
    """

    block = Zamba2Block
    structure = ("state", "head", "channel")  # `drop` takes plain Mamba layers only
    order = (
        *(f"shared_transformer.{name}" for name in ATTENTION),
        *(f"shared_transformer.feed_forward.{name}_proj" for name in ("gate_up", "down")),
        "linear",
        "mamba_decoder.mamba",
        "mamba",
    )
    words = {
        "state": "mamba_d_state",
        "head": "n_mamba_heads",
        "channel": "mamba_headdim",
        "expand": "mamba_expand",
    }
    lists = ("layers_block_type",)

    def embed(self, tokens: Tensor) -> Tensor:
        hidden = super().embed(tokens)
        return torch.cat([hidden, hidden], -1)

    def _reading(self, norm: Any) -> Callable[[Tensor], Tensor]:
        width = self._config.hidden_size
        return lambda hidden: norm(hidden[..., :width])

    def _shorter(self, index: int) -> dict[str, Any]:
        kinds = self._config.layers_block_type
        if kinds[index] == "hybrid":
            raise ValueError(f"layer {index} cannot be removed: other layers share its transformer block")
        found = super()._shorter(index)
        left = [i for i, kind in enumerate(found["layers_block_type"]) if kind == "hybrid"]
        return found | {"hybrid_layer_ids": left}

    def may_go(self, gone: Collection[int]) -> list[int]:
        """As `Architecture.may_go`: stock caches want a layer of attention, and the rest a mixer."""
        left = [b for b in self.blocks if isinstance(b, HybridBlock) and b.index not in gone]
        kinds = [{"mixer": block.mixer is not None, "attention": block.attends} for block in left]
        last = [kind for kind in ("mixer", "attention") if sum(has[kind] for has in kinds) == 1]
        return [
            block.index for block, has in zip(left, kinds, strict=True) if not any(has[kind] for kind in last)
        ]

    def drop(self, index: int) -> None:
        super().drop(index)
        slots = {layer: slot for slot, layer in enumerate(self._config.hybrid_layer_ids)}
        for module in self._backbone.modules():  # which adapter belongs to which layer
            if hasattr(module, "layer_dic"):
                module.layer_dic = slots
        for module in (self._backbone, self.model):  # which weights are one
            for name in ("_tied_weights_keys", "all_tied_weights_keys"):
                setattr(module, name, _renumbered(getattr(module, name), index))


def _renumbered(ties: Mapping[str, str], gone: int) -> dict[str, str]:
    """Names of layers behind the one that is gone move up."""

    def moved(name: str) -> str:
        return re.sub(r"(layers\.)(\d+)", lambda m: f"{m[1]}{int(m[2]) - (int(m[2]) > gone)}", name)

    return {moved(copy): moved(source) for copy, source in ties.items()}
