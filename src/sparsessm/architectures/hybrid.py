"""The hybrid families of transformers: layers of Mamba, attention, MLPs and experts in many combinations.

`hybrid_block.py` runs a layer; here is the model around the layers, and a class for each family with what
differs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsessm.architectures.attention import IMPLEMENTATIONS
from sparsessm.architectures.base import Architecture, Block, Tail, renumbered
from sparsessm.architectures.embedding import embedded
from sparsessm.architectures.hybrid_block import HybridBlock, Setting, inside
from sparsessm.architectures.mamba1 import Mamba1Kind
from sparsessm.architectures.mamba2 import Mamba2Kind
from sparsessm.architectures.mixer import MixerKind

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
        kind, order, carries_embedding: as in `Setting`.
        embedding, norm: names of the embedding and the final norm.
        embedding_multiplier, logits_multiplier, logits_divisor: fields of the stock configuration by which
            the embedding and the logits are scaled, "" if they are not.
        words: what the stock configuration calls the numbers of states, heads and channels of a head, and the
            channels of all heads: `inner`, or `expand` as a multiple of the model's width.
        lists: fields with an entry for each layer. numbers: fields that list layers by number.
        periods: fields by which every so manyth layer is of a kind; unless they are 1, none can be left out.
        numbered: paths inside a layer of what knows the layer's number, "" is the layer.
    """

    kind: MixerKind = Mamba2Kind()
    order: tuple[str, ...]
    carries_embedding = False
    embedding = "embed_tokens"
    norm = "final_layernorm"
    embedding_multiplier = logits_multiplier = logits_divisor = ""
    words: Mapping[str, str]
    lists: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    periods: tuple[str, ...] = ()
    numbered: tuple[str, ...] = ("mamba", "self_attn")
    structure = ("state", "head", "channel", "block")

    def __init__(self, model: nn.Module, stored: Mapping[str, torch.dtype]) -> None:
        self.model, self.stored = model, stored
        self._backbone: Any = model.model
        self._lm_head: Any = model.lm_head
        self._config: Any = model.config
        self._embedding: Any = self._backbone.get_submodule(self.embedding)
        self._norm, width = self._backbone.get_submodule(self.norm), self._config.hidden_size
        self._normed = lambda hidden: self._norm(hidden[..., :width])  # what the head reads of the stream
        if self._config._attn_implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"attention is {self._config._attn_implementation!r}; supported: {', '.join(IMPLEMENTATIONS)}"
            )
        if any(self._said(period) != 1 for period in self.periods):
            self.structure = tuple(axis for axis in self.structure if axis != "block")
        self.states = int(self._said(self.words["state"]))
        self.tied = self._lm_head.weight is self._embedding.weight
        self._refresh()
        for mixer in self._mixers():
            if mixer.activation not in ("silu", "swish"):
                raise ValueError(f"hidden_act is {mixer.activation!r}; supported: 'silu'")

    def _said(self, field: str) -> Any:
        """What the stock configuration says; what its fields are called differs between the families."""
        return getattr(self._config, field)

    def _refresh(self) -> None:
        """Blocks and tail for the model as it is now."""
        layers = self._backbone.layers
        self.blocks = tuple(self._block(i) for i in range(len(layers)))
        tied_name = f"model.{self.embedding}.weight"  # a tied weight is one target, named as it is stored
        name = tied_name if self.tied and "lm_head.weight" not in self.stored else "lm_head.weight"
        table = tied_name, self._embedding
        norms = self._normed, self._norm
        self.tail = Tail(norms, self._lm_head, name, len(layers), self.stored, table)

    def _block(self, index: int) -> HybridBlock:
        rotary = inside(self._backbone, "rotary_emb")
        setting = Setting(self.kind, self.order, rotary, self.stored, self.carries_embedding)
        return HybridBlock(setting, self._backbone.layers[index], index, self._shared(index))

    def _shared(self, index: int) -> dict[str, tuple[int, ...]]:
        """Paths of a layer's linear layers whose weight other layers have too -> all that have it."""
        found = {}
        layers = list(self._backbone.layers)
        for path in self.order:
            modules = [inside(layer, path) for layer in layers]
            weights = [module.weight if isinstance(module, nn.Linear) else None for module in modules]
            uses = tuple(i for i, w in enumerate(weights) if w is not None and w is weights[index])
            if len(uses) > 1:
                found[path] = uses
        return found

    def _mixers(self) -> list[Any]:
        return [block.layer.get_submodule(block.mixer) for block in self.blocks if block.mixer is not None]

    def embed(self, tokens: Tensor) -> Tensor:
        hidden = embedded(self._embedding, tokens)
        if self.embedding_multiplier:
            hidden = hidden * self._said(self.embedding_multiplier)
        return torch.cat([hidden, hidden], -1) if self.carries_embedding else hidden

    def looked_up(self, grad: Tensor) -> Tensor:
        if self.carries_embedding:
            first, second = grad.chunk(2, -1)
            grad = first + second
        return grad * self._said(self.embedding_multiplier) if self.embedding_multiplier else grad

    @property
    def logit_scale(self) -> float:
        scale = float(self._said(self.logits_multiplier)) if self.logits_multiplier else 1.0
        return scale / float(self._said(self.logits_divisor)) if self.logits_divisor else scale

    def head(self, hidden: Tensor) -> Tensor:
        logits = self._lm_head(self._normed(hidden))
        if self.logits_multiplier:
            logits = logits * self._said(self.logits_multiplier)
        return logits / self._said(self.logits_divisor) if self.logits_divisor else logits

    def fields(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        words = self.words
        found = {words["state"]: sizes["state"]} if "state" in sizes else {}
        if "head" not in sizes and "channel" not in sizes:
            return found
        if "head" in words:
            heads, channels = self._said(words["head"]), self._said(words["channel"])
            if "head" in sizes:  # of each group
                heads = sizes["head"] * self._mixers()[0].n_groups
            channels = sizes.get("channel", channels)  # of each head
            found |= {words["head"]: heads, words["channel"]: channels}
            inner = heads * channels
        else:
            inner = sizes["channel"]
        if "inner" in words:
            found[words["inner"]] = inner
        if "expand" in words:
            found[words["expand"]] = self._expand(inner)
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
        assert block.mixer is not None, "no mixer, no axes"
        layer = self._backbone.layers[block.index]
        config = copy.deepcopy(self._config)
        for name, value in fields.items():
            setattr(config, name, value)
        old, prefix = layer.get_submodule(block.mixer), f"{block.mixer}."
        with torch.device(next(old.parameters()).device):
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
            mixer = of(config, layer_idx=index)  # type: ignore[call-arg]
        if self.kind.multiplied:  # the model gives it to its mixers
            from transformers.models.falcon_h1.modeling_falcon_h1 import compute_mup_vector

            mixer.register_buffer("mup_vector", compute_mup_vector(config), persistent=False)
        return mixer

    def project(self, block: Block, B: Tensor, C: Tensor) -> Block:
        raise ValueError(f"the states of a {type(self).__name__} model cannot be projected")

    def drop(self, index: int) -> None:
        if "block" not in self.structure:
            raise ValueError(f"no layer of a {type(self).__name__} model can be left out")
        shorter = self._shorter(index)
        del self._backbone.layers[index]
        self.stored = renumbered(self.stored, "model.layers.", index)
        for name, value in shorter.items():
            setattr(self._config, name, value)
        for i, layer in enumerate(self._backbone.layers):
            for path in self.numbered:
                if (module := inside(layer, path)) is not None:
                    module.layer_idx = i  # type: ignore[assignment]
        self._refresh()

    def _shorter(self, index: int) -> dict[str, Any]:
        """The configuration's fields when a layer is gone."""
        found: dict[str, Any] = {}
        for name in self.lists:
            found[name] = [kind for i, kind in enumerate(self._said(name)) if i != index]
        for name in self.numbers:
            found[name] = [i - (i > index) for i in self._said(name) or [] if i != index]
        return found | {"num_hidden_layers": len(self.blocks) - 1}


class Jamba(Hybrid):
    """Mamba-1 with norms, attention without positions, MLPs or experts (`JambaForCausalLM`)."""

    kind = Mamba1Kind(norms="weighted")
    order = (
        "mamba",
        *ATTENTION,
        *(f"feed_forward.{name}_proj" for name in ("gate", "up", "down")),
        "feed_forward.experts",
    )
    words = {"state": "mamba_d_state", "expand": "mamba_expand"}
    structure = ("state", "channel")  # what a layer is follows from its number, so none can be left out


class Bamba(Hybrid):
    """Mamba-2 or attention, then an MLP (`BambaForCausalLM`)."""

    order = ("mamba", *ATTENTION, *(f"feed_forward.{name}_proj" for name in ("gate", "up", "down")))
    words = EXPANDED
    numbers = ("attn_layer_indices",)


class FalconH1(Hybrid):
    """Mamba-2 and attention side by side, then an MLP; multipliers everywhere (`FalconH1ForCausalLM`)."""

    kind = Mamba2Kind(multiplied=True, norm_by_config=True)
    order = ("mamba", *ATTENTION, *(f"feed_forward.{name}_proj" for name in ("up", "gate", "down")))
    words = {
        "state": "mamba_d_state",
        "head": "mamba_n_heads",
        "channel": "mamba_d_head",
        "inner": "mamba_d_ssm",
    }
    embedding_multiplier, logits_multiplier = "embedding_multiplier", "lm_head_multiplier"


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
    numbered = ("", "mixer")


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
    embedding_multiplier, logits_divisor = "embedding_multiplier", "logits_scaling"


class Zamba2(Hybrid):
    """Mamba-2 layers, some behind a transformer block that they share (`Zamba2ForCausalLM`).

    The shared block reads the embedding beside the stream, so `embed` gives both, one behind the other, and
    blocks pass the second on. Its matrices are targets of the first layer that uses it (`Target.uses`); the
    adapters that each use adds to them are no targets.
    """

    carries_embedding = True
    structure = ("state", "head", "channel")  # layers share their transformer block, so none can be left out
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
