"""What runs a model: the `Engine` every implementation is, and the name of a model's state.

Place in the flow: the lowest file of `runtime/`, which also reads configurations. `reference.py` is the slow
definition, `engine.py` the fast one; `generation.py` uses either and cannot tell which.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsessm.architectures.mamba2 import Sizes
from sparsessm.checkpoint.known_fields import optional
from sparsessm.runtime.keys import Keys

_MAMBA = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "state_size",
    "conv_kernel",
    "time_step_rank",
    "num_hidden_layers",
    "layer_norm_epsilon",
    "use_bias",
    "use_conv_bias",
)
_MAMBA2 = (
    "vocab_size",
    "hidden_size",
    "num_heads",
    "head_dim",
    "n_groups",
    "state_size",
    "conv_kernel",
    "num_hidden_layers",
    "layer_norm_epsilon",
    "time_step_limit",
    "use_bias",
    "use_conv_bias",
)
_HYBRID = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_DUAL = (
    *("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv"),
    *("time_step_limit", "rms_norm_eps"),
)
_DELTA = (
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_conv_kernel_dim", "layer_types", "hidden_act", "rms_norm_eps", "rope_parameters"),
)
# By model type what runs, and of its configuration what decides, with the weights, what a model computes.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "mamba": _MAMBA,
    "falcon_mamba": (*_MAMBA, "mixer_rms_eps"),
    "mamba2": _MAMBA2,
    "bamba": (*_HYBRID, *_DUAL, "hidden_act", "rope_parameters", "layers_block_type"),
    "falcon_h1": (
        *(*_HYBRID, *_DUAL, "hidden_act", "rope_parameters", "embedding_multiplier", "lm_head_multiplier"),
        *("mlp_multipliers", "ssm_multipliers", "ssm_in_multiplier", "ssm_out_multiplier", "key_multiplier"),
        *("attention_in_multiplier", "attention_out_multiplier", "mamba_rms_norm", "mamba_norm_before_gate"),
    ),
    "granitemoehybrid": (
        *(*_HYBRID, *_DUAL, "hidden_act", "rope_parameters", "layers_block_type", "position_embedding_type"),
        *("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"),
        *("num_local_experts", "num_experts_per_tok"),
    ),
    "jamba": (
        *(*_HYBRID, "hidden_act", "mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank"),
        *("mamba_proj_bias", "mamba_conv_bias", "layers_block_type", "layers_num_experts"),
        *("num_experts_per_tok", "rms_norm_eps"),
    ),
    "nemotron_h": (
        *(*_HYBRID, "mlp_hidden_act", "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size"),
        *("conv_kernel", "time_step_min", "layer_norm_epsilon", "layers_block_type", "moe_latent_size"),
        *("num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"),
    ),
    "kimi_linear": (
        *(*_HYBRID, "layer_types", "mlp_layer_types", "hidden_act", "rms_norm_eps", "linear_head_dim"),
        *("linear_num_heads", "linear_conv_kernel_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"),
        *("qk_rope_head_dim", "v_head_dim", "num_experts_per_tok", "n_group", "topk_group"),
        *("norm_topk_prob", "routed_scaling_factor"),
    ),
    "olmo_hybrid": (*_HYBRID, *_DELTA, "linear_allow_neg_eigval"),
    "qwen3_5_text": (*_HYBRID, *_DELTA, "head_dim"),
    "qwen3_5_moe_text": (*_HYBRID, *_DELTA, "head_dim", "num_experts_per_tok"),
    "qwen3_next": (*_HYBRID, *_DELTA, "head_dim", "num_experts", "num_experts_per_tok", "norm_topk_prob"),
    "zamba2": (
        *(*_HYBRID, "hidden_act", "n_mamba_heads", "mamba_headdim", "mamba_ngroups", "mamba_d_state"),
        *("mamba_d_conv", "time_step_min", "rms_norm_eps", "layers_block_type", "num_mem_blocks"),
        *("use_mem_rope", "rope_parameters", "use_shared_attention_adapter"),
    ),
}
_KINDS = {"attention", "full_attention", "hybrid", "linear_attention", "mamba", "mlp", "moe"}
PURE = ("mamba", "falcon_mamba", "mamba2")  # which consist of mixers alone
_SAMPLES = 64  # values of a tensor that go into a fingerprint as they are
_PART = 1 << 20  # values that are added up at once
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Engine(Protocol):
    """A model that reads tokens and carries a state from one to the next.

    A state is a row of floats. A model without attention has rows of `state_size`; with attention rows grow:
    whoever holds one gives it room (`keys.room`) before tokens are read.

    What a sequence gets must not depend on the others in the batch: row i of `step` is bit for bit what
    `step` gives for that row alone. Tokens and shapes are the caller's responsibility (`generation.py`).
    """

    @property
    def vocabulary(self) -> int:
        """V, the number of logits; tokens are 0 to V - 1."""
        ...

    @property
    def state_size(self) -> int:
        """float32 values that a sequence carries at its beginning."""
        ...

    @property
    def keys(self) -> Keys:
        """How a state grows."""
        ...

    @property
    def sections(self) -> Sequence[tuple[int, int]]:
        """Of each mixer, in the order of the state: values that are inputs of its convolution, and others."""
        ...

    @property
    def layout(self) -> str:
        """A short hash of the model and of the order of the values in its state."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one decoding step reads."""
        ...

    @property
    def resident(self) -> int:
        """Bytes of weights in memory, those included that a step does not read, such as an embedding that is
        only looked up; small tables and the rounding to pages are not in it."""
        ...

    def new_state(self, batch: int) -> Tensor:
        """The beginning of `batch` sequences: float32 zeros (batch, state_size), without room to grow."""
        ...

    def prompt(self, tokens: Tensor, state: Tensor, every: bool = False) -> Tensor:
        """Read several tokens of one sequence.

        Args:
            tokens: int64 (L,), L >= 1.
            state: float32 (state_size,) or longer, contiguous; advanced in place.
            every: logits after every token, not only after the last.

        Returns:
            float32 (V,), or (L, V) with `every`.
        """
        ...

    def step(self, tokens: Tensor, states: Tensor | list[Tensor]) -> Tensor:
        """Read one token of each sequence.

        Args:
            tokens: int64 (B,).
            states: float32 (B, state_size) or wider, contiguous, or B rows of any length; advanced in place.

        Returns:
            float32 (B, V), logits after the token.
        """
        ...


def model_type(config: Any) -> str:
    """Of a configuration of transformers; an object that does not say it is a Mamba's."""
    return optional(config, "model_type", "mamba")


def refuse_unsupported(config: Any) -> None:
    """Check that a model of this configuration is what the engines compute.

    Raises:
        ValueError: a model type that is not among `FIELDS`, an activation other than SiLU.
    """
    refuse_type(kind := model_type(config))
    if kind not in PURE:
        return  # a hybrid's plan refuses what it does not know (families.py)
    if (activation := optional(config, "hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {activation!r}; supported: 'silu'")


def refuse_type(kind: str) -> None:
    """Check that a model of this type, as transformers calls it, is what the engines compute.

    Raises:
        ValueError: it is not among `FIELDS`.
    """
    if kind not in FIELDS:
        known = ", ".join(sorted(FIELDS))
        raise ValueError(f"the runtime does not run model type {kind!r}; supported: {known}")


def refuse_window(window: Any, used: Any = None) -> None:
    """Check that attention sees the whole text: the engines know no window.

    transformers computes none for the families here either, though NemotronH's configuration has the field.

    Args:
        window, used: what a configuration says as `sliding_window` and `use_sliding_window`.

    Raises:
        ValueError: there is a window.
    """
    if window is not None and used is not False:
        raise ValueError(
            f"sliding_window is {window!r}; allowed: null, as the runtime attends to the whole text"
        )


def refuse_windows(config: Any) -> None:
    """The same of a configuration of transformers, and of the kinds of its layers.

    Raises:
        ValueError: a window, or a layer of a kind that is not known.
    """
    refuse_window(optional(config, "sliding_window"), optional(config, "use_sliding_window"))
    for name in ("layer_types", "layers_block_type"):
        for kind in optional(config, name) or ():
            if kind not in _KINDS:
                raise ValueError(f"{name} has {kind!r}; supported: {', '.join(sorted(_KINDS))}")


def described(config: Any) -> dict[str, Any]:
    """The fields of a configuration that `FIELDS` names, fit for JSON: an infinite bound is None."""
    fields = {name: getattr(config, name) for name in FIELDS[model_type(config)]}
    if "time_step_limit" in fields:  # a list or a tuple, of whole numbers or not
        bounds = [float(bound) for bound in fields["time_step_limit"]]
        fields["time_step_limit"] = [bound if math.isfinite(bound) else None for bound in bounds]
    return fields


def heads(config: Any) -> Sizes:
    """The sizes of a Mamba-2, told by a `transformers.Mamba2Config` or an object with its attributes."""
    return Sizes(*map(int, (config.n_groups, config.num_heads, config.head_dim, config.state_size)))


def limits(config: Any) -> tuple[float, float]:
    """Bounds of a step size of a Mamba-2."""
    least, most = config.time_step_limit
    return float(least), float(most)


def mixer_epsilon(config: Any) -> float | None:
    """Of FalconMamba's and Jamba's norms inside the mixer; None where there are none."""
    return float(config.mixer_rms_eps) if model_type(config) in ("falcon_mamba", "jamba") else None


def channels_of(config: Any, shape: Callable[[str], tuple[int, ...] | None]) -> int:
    """How many channels a layer of Mamba-1 has: as many as its D has values, which layers may differ in.

    The configuration's number stands where in_proj has it or D is no vector: what does not fit it is then
    refused by its own name.

    Args:
        config: of the model. shape: name in the mixer -> the tensor's shape, None if there is none.
    """
    number, skip = int(config.intermediate_size), shape("D") or ()
    stock = (shape("in_proj.weight") or ())[:1] == (2 * number,)
    return number if stock or len(skip) != 1 or not skip[0] else skip[0]


def scan_shapes(config: Any, channels: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a mixer of Mamba-1 with so many channels, by their names in it."""
    model, states, rank = int(config.hidden_size), int(config.state_size), int(config.time_step_rank)
    shapes: dict[str, tuple[int, ...]] = {
        "in_proj.weight": (2 * channels, model),
        "conv1d.weight": (channels, 1, int(config.conv_kernel)),
        "x_proj.weight": (rank + 2 * states, channels),
        "dt_proj.weight": (channels, rank),
        "dt_proj.bias": (channels,),
        "A_log": (channels, states),
        "D": (channels,),
        "out_proj.weight": (model, channels),
    }
    if config.use_conv_bias:
        shapes["conv1d.bias"] = (channels,)
    if config.use_bias:
        shapes |= {"in_proj.bias": (2 * channels,), "out_proj.bias": (model,)}
    return shapes


def fingerprint(config: Any, weights: Mapping[str, Tensor], order: str) -> str:
    """A short hash of a model and of the order of its state: equal for equal weights, in every process.

    Made of the configuration, every tensor's name, shape and dtype, the exact sum of its bits and some of its
    values: a model that was pruned, packed with loss or trained further has another one.

    Args:
        config: has the attributes that `FIELDS` names.
        weights: parameter name -> tensor.
        order: names the order of the values in the state, different for engines that order them differently.

    Returns:
        16 hexadecimal digits.
    """
    return joined(config, {name: trace(name, tensor) for name, tensor in weights.items()}, order)


def joined(config: Any, traces: Mapping[str, str], order: str) -> str:
    """`fingerprint` of weights whose traces were taken one by one."""
    told = hashlib.sha256(repr([order, *described(config).values()]).encode())
    for name in sorted(traces):
        told.update(traces[name].encode())
    return told.hexdigest()[:16]


def trace(name: str, tensor: Tensor) -> str:
    """What of one tensor goes into a fingerprint."""
    values = tensor.detach().contiguous().flatten()
    bits = values.view(_BITS[values.element_size()])
    some = bits[:: max(1, len(bits) // _SAMPLES)].tolist()
    # A sum of integers is the same for every number of threads. In parts: torch widens what it adds up.
    total = sum(int(part.sum()) for part in bits.split(_PART))
    return repr((name, tuple(tensor.shape), str(values.dtype), total, some))
