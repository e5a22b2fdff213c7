"""The families of the gated delta rule: layers of it (delta.py) and of attention, with MLPs or experts
behind.

Each layer is run by its own stock code around our kernel (hybrid_block.py). What can be taken out whole are
layers. Single states cannot: a balanced truncation, as for Mamba-2, wants a recurrence that is linear in its
state with a decay that commutes with every change of coordinates, and the delta rule multiplies the state by
1 - beta k k', which does not.
"""

from __future__ import annotations

from sparsessm.architectures.delta import KimiDelta, OlmoDelta, Qwen3NextDelta, Qwen35Delta
from sparsessm.architectures.hybrid import ATTENTION, Hybrid

MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
MIXTURE = (*(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")), "mlp.experts")


class _Delta(Hybrid):
    """What the families of the delta rule have in common."""

    norm = "norm"
    words = {"state": "linear_key_head_dim"}
    lists = ("layer_types",)
    numbered = ("linear_attn", "self_attn")
    structure = ("block",)


class Qwen35(_Delta):
    """Gated DeltaNet or attention, then an MLP: the text model of Qwen3.5 and 3.6 (`Qwen3_5ForCausalLM`)."""

    kind = Qwen35Delta()
    order = ("linear_attn", *ATTENTION, *MLP)


class Qwen35Moe(_Delta):
    """Gated DeltaNet or attention, then experts and one that is always asked (`Qwen3_5MoeForCausalLM`)."""

    kind = Qwen35Delta()
    order = ("linear_attn", *ATTENTION, *MIXTURE)


class Qwen3Next(_Delta):
    """Gated DeltaNet or attention, then experts or an MLP (`Qwen3NextForCausalLM`)."""

    kind = Qwen3NextDelta()
    order = ("linear_attn", *ATTENTION, *MIXTURE, *MLP)
    numbers = ("mlp_only_layers",)
    periods = ("decoder_sparse_step",)


class OlmoHybrid(_Delta):
    """Gated DeltaNet or attention, then an MLP (`OlmoHybridForCausalLM`)."""

    kind = OlmoDelta()
    order = ("linear_attn", *ATTENTION, *MLP)


class KimiLinear(_Delta):
    """Kimi Delta Attention or latent attention, then experts or an MLP (`KimiLinearForCausalLM`)."""

    kind = KimiDelta()
    order = (
        "self_attn",
        *(f"self_attn.{name}" for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")),
        *("self_attn.kv_b_proj", "self_attn.o_proj", "mlp.experts"),
        *(f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")),
        *MLP,
    )
    words = {"state": "linear_head_dim"}
    lists = ("layer_types", "mlp_layer_types")
    numbered = ("self_attn",)
