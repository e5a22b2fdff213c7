"""The plan of a stock model, family by family.

Place in the flow: from a configuration of transformers to `plan.py`, which both engines are made of. What a
family's stock code does between the parts of a layer is said here and nowhere else in `runtime/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from sparsessm.architectures.attention import frequencies
from sparsessm.checkpoint.known_fields import optional
from sparsessm.runtime.base import model_type
from sparsessm.runtime.plan import Attention, Delta, Experts, Mamba, Mlp, Plain, Plan, Planned, Product, Rows


def plan_of(config: Any) -> Plan:
    """What a model of this configuration consists of.

    Args:
        config: of a model type of `base.FIELDS`, checked by `base.refuse_unsupported`.

    Raises:
        ValueError: positions of a kind that does not run here.
    """
    return FAMILIES[model_type(config)](config)


def _pure(config: Any) -> Plan:
    """Mamba, FalconMamba, Mamba-2."""
    dual, parts = model_type(config) == "mamba2", []
    for layer in range(int(config.num_hidden_layers)):
        name = f"backbone.layers.{layer}"
        parts.append(Planned(Mamba(f"{name}.mixer", dual, config), f"{name}.norm.weight"))
    epsilon = float(config.layer_norm_epsilon)
    return Plan("backbone.embeddings.weight", "backbone.norm_f.weight", epsilon, parts)


def _bamba(config: Any) -> Plan:
    mixer, (angles, turned), parts = _dual(config), frequencies(config, _width(config)), []
    for layer, kind in enumerate(config.layers_block_type):
        name = f"model.layers.{layer}"
        if kind == "full_attention":
            first = _attention(config, f"{name}.self_attn", rotary=True)
        else:
            first = Mamba(f"{name}.mamba", True, mixer)
        parts.append(Planned(first, f"{name}.input_layernorm.weight"))
        parts.append(Planned(_mlp(f"{name}.feed_forward", config), f"{name}.pre_ff_layernorm.weight"))
    names = "model.embed_tokens.weight", "model.final_layernorm.weight"
    return Plan(*names, float(config.rms_norm_eps), parts, angles=angles, turned=turned)


def _granite(config: Any) -> Plan:
    mixer, parts, rotary = _dual(config), [], config.position_embedding_type == "rope"
    scale = float(config.residual_multiplier)
    for layer, kind in enumerate(config.layers_block_type):
        name = f"model.layers.{layer}"
        if kind == "full_attention":
            score = float(config.attention_multiplier)
            first = _attention(config, f"{name}.self_attn", rotary=rotary, scale=score)
        else:
            first = Mamba(f"{name}.mamba", True, mixer)
        parts.append(Planned(first, f"{name}.input_layernorm.weight", scale=scale))
        norm, reads = f"{name}.post_attention_layernorm.weight", "stream"
        if config.num_local_experts > 0:
            inner = f"{name}.block_sparse_moe"
            experts = _experts(inner, "router", config, choice="softmax_of_chosen")
            parts.append(Planned(experts, norm, scale=scale))
            norm, reads = None, "before"
        wide = Product(f"{name}.shared_mlp.input_linear")
        shared = Mlp(wide, wide, Product(f"{name}.shared_mlp.output_linear"), _curve(config.hidden_act))
        parts.append(Planned(shared, norm, reads, scale=scale))
    angles, turned = frequencies(config, _width(config)) if rotary else (None, 1.0)
    names = "model.embed_tokens.weight", "model.norm.weight"
    scales = float(config.embedding_multiplier), 1.0 / float(config.logits_scaling)
    return Plan(*names, float(config.rms_norm_eps), parts, *scales, angles, turned)


def _falcon_h1(config: Any) -> Plan:
    factors = (config.ssm_in_multiplier, *config.ssm_multipliers)
    norm = {"gated_norm": config.mamba_rms_norm, "norm_before_gate": config.mamba_norm_before_gate}
    mixer = _dual(config, multipliers=factors, **norm)
    gate, down = map(float, config.mlp_multipliers)
    within, keys = float(config.attention_in_multiplier), float(config.key_multiplier)
    parts = []
    for layer in range(int(config.num_hidden_layers)):
        name = f"model.layers.{layer}"
        norm, scale = f"{name}.input_layernorm.weight", float(config.ssm_out_multiplier)
        parts.append(Planned(Mamba(f"{name}.mamba", True, mixer), norm, scale=scale))
        attention = _attention(config, f"{name}.self_attn", rotary=True, inputs=within, keys=keys)
        scale = float(config.attention_out_multiplier)
        parts.append(Planned(attention, None, "before", scale=scale))
        mlp = _mlp(f"{name}.feed_forward", config, gate=gate)
        parts.append(Planned(mlp, f"{name}.pre_ff_layernorm.weight", scale=down))
    angles, turned = frequencies(config, _width(config))
    names = "model.embed_tokens.weight", "model.final_layernorm.weight"
    scales = float(config.embedding_multiplier), float(config.lm_head_multiplier)
    return Plan(*names, float(config.rms_norm_eps), parts, *scales, angles, turned)


def _nemotron_h(config: Any) -> Plan:
    mixer = SimpleNamespace(
        model_type="mamba2",
        hidden_size=config.hidden_size,
        num_heads=config.mamba_num_heads,
        head_dim=config.mamba_head_dim,
        n_groups=config.n_groups,
        state_size=config.ssm_state_size,
        conv_kernel=config.conv_kernel,
        time_step_limit=(config.time_step_min, float("inf")),
        layer_norm_epsilon=config.layer_norm_epsilon,
    )
    curve, parts = _curve(config.mlp_hidden_act), []
    for layer, kind in enumerate(config.layers_block_type):
        norm, name = f"model.layers.{layer}.norm.weight", f"model.layers.{layer}.mixer"
        if kind == "linear_attention":
            parts.append(Planned(Mamba(name, True, mixer), norm))
        elif kind == "full_attention":
            parts.append(Planned(_attention(config, name), norm))
        elif kind == "mlp":
            parts.append(Planned(_narrow(name, curve), norm))
        else:
            parts.append(Planned(_nemotron_experts(name, config, curve), norm))
            parts.append(Planned(_narrow(f"{name}.shared_experts", curve), None, "before"))
    names = "model.embeddings.weight", "model.norm_f.weight"
    return Plan(*names, float(config.layer_norm_epsilon), parts)


def _nemotron_experts(name: str, config: Any, curve: str) -> Experts:
    latent = config.moe_latent_size is not None
    return Experts(
        Product(f"{name}.gate"),
        f"{name}.experts.up_proj",
        f"{name}.experts.down_proj",
        gated=False,
        curve=curve,
        chosen=int(config.num_experts_per_tok),
        choice="sigmoid",
        before=Product(f"{name}.fc1_latent_proj") if latent else None,
        behind=Product(f"{name}.fc2_latent_proj") if latent else None,
        favour=f"{name}.gate.e_score_correction_bias",
        groups=int(config.n_group),
        chosen_groups=int(config.topk_group),
        normalised=bool(config.norm_topk_prob),
        factor=float(config.routed_scaling_factor),
    )


def _jamba(config: Any) -> Plan:
    mixer = SimpleNamespace(
        model_type="jamba",
        hidden_size=config.hidden_size,
        intermediate_size=int(config.mamba_expand * config.hidden_size),
        state_size=config.mamba_d_state,
        conv_kernel=config.mamba_d_conv,
        time_step_rank=config.mamba_dt_rank,
        use_bias=config.mamba_proj_bias,
        use_conv_bias=config.mamba_conv_bias,
        mixer_rms_eps=config.rms_norm_eps,
    )
    parts = []
    kinds = zip(config.layers_block_type, config.layers_num_experts, strict=True)
    for layer, (kind, experts) in enumerate(kinds):
        name = f"model.layers.{layer}"
        if kind == "attention":
            first = _attention(config, f"{name}.self_attn")
        else:
            first = Mamba(f"{name}.mamba", False, mixer)
        parts.append(Planned(first, f"{name}.input_layernorm.weight"))
        inner = f"{name}.feed_forward"
        second = _mlp(inner, config)
        if experts > 1:
            second = _experts(inner, "router", config, choice="softmax")
        parts.append(Planned(second, f"{name}.pre_ff_layernorm.weight"))
    names = "model.embed_tokens.weight", "model.final_layernorm.weight"
    return Plan(*names, float(config.rms_norm_eps), parts)


def _zamba2(config: Any) -> Plan:
    heads = int(config.n_mamba_heads)
    mixer = SimpleNamespace(
        model_type="mamba2",
        hidden_size=config.hidden_size,
        num_heads=heads,
        head_dim=config.mamba_headdim,
        n_groups=config.mamba_ngroups,
        state_size=config.mamba_d_state,
        conv_kernel=config.mamba_d_conv,
        time_step_limit=(config.time_step_min, float("inf")),
        layer_norm_epsilon=1e-5,  # in the stock code
    )
    # The transformer blocks, each in its first layer; where nothing is tied every layer has its own.
    parts, shared = [], list[str]()
    blocks = int(config.num_mem_blocks)
    hybrids = [i for i, kind in enumerate(config.layers_block_type) if kind == "hybrid"]
    for layer in range(len(config.layers_block_type)):
        name = f"model.layers.{layer}"
        if layer not in hybrids:
            parts.append(Planned(Mamba(f"{name}.mamba", True, mixer), f"{name}.input_layernorm.weight"))
            continue
        use = hybrids.index(layer)
        shared.append(f"{name}.shared_transformer")
        parts += _zamba2_block(config, shared[use % blocks if config.tie_word_embeddings else use], use)
        parts.append(Planned(Plain(Product(f"{name}.linear")), None, "side", beside=True))
        inner = f"{name}.mamba_decoder"
        parts.append(Planned(Mamba(f"{inner}.mamba", True, mixer), f"{inner}.input_layernorm.weight", "sum"))
    angles, turned = (None, 1.0)
    if config.use_mem_rope:
        angles, turned = frequencies(config, int(config.attention_head_dim))
    names = "model.embed_tokens.weight", "model.final_layernorm.weight"
    return Plan(*names, float(config.rms_norm_eps), parts, angles=angles, turned=turned)


def _zamba2_block(config: Any, name: str, use: int) -> Iterator[Planned]:
    """The shared block, in its use number `use`, of which each has adapters of its own."""
    width = int(config.attention_head_dim)

    def product(kind: str) -> Product:
        adapter = f"{name}.self_attn.linear_{kind}_adapter_list.{use}"
        adapted = config.use_shared_attention_adapter and kind != "o"
        return Product(f"{name}.self_attn.{kind}_proj", adapter=adapter if adapted else "")

    sizes = int(config.num_attention_heads), int(config.num_key_value_heads), width
    rotary = bool(config.use_mem_rope)
    q, k, v, o = map(product, "qkvo")
    attention = Attention(q, k, v, o, *sizes, (width / 2) ** -0.5, rotary)
    yield Planned(attention, f"{name}.input_layernorm.weight", "both", beside=True)
    inner = f"{name}.feed_forward"
    wide = Product(f"{inner}.gate_up_proj", adapter=f"{inner}.gate_up_proj_adapter_list.{use}")
    mlp = Mlp(wide, wide, Product(f"{inner}.down_proj"), _curve(config.hidden_act))
    yield Planned(mlp, f"{name}.pre_ff_layernorm.weight", "side", beside=True)


def _qwen(config: Any) -> Plan:
    """Qwen3.5 and Qwen3-Next, with experts or without."""
    parts, (angles, turned) = [], frequencies(config)
    for layer, kind in enumerate(config.layer_types):
        name = f"model.layers.{layer}"
        if kind == "full_attention":
            inner = f"{name}.self_attn"
            norms = {"q_norm": f"{inner}.q_norm.weight", "k_norm": f"{inner}.k_norm.weight"}
            first: Any = replace(_attention(config, inner, rotary=True), gated=True, **norms)
        else:
            first = _delta(config, f"{name}.linear_attn")
        parts.append(Planned(first, f"{name}.input_layernorm.weight"))
        inner, norm = f"{name}.mlp", f"{name}.post_attention_layernorm.weight"
        if not _mixture(config, layer):
            parts.append(Planned(_mlp(inner, config), norm))
            continue
        choice = "softmax_of_chosen" if optional(config, "norm_topk_prob", True) else "softmax"
        parts.append(Planned(_experts(inner, "gate", config, choice), norm))
        shared = replace(_mlp(f"{inner}.shared_expert", config), share=Product(f"{inner}.shared_expert_gate"))
        parts.append(Planned(shared, None, "before"))
    names = "model.embed_tokens.weight", "model.norm.weight"
    how: dict[str, Any] = {"angles": angles, "turned": turned, "centred": True}
    return Plan(*names, float(config.rms_norm_eps), parts, **how)


def _olmo(config: Any) -> Plan:
    rotary = config.rope_parameters is not None
    parts, (angles, turned) = [], frequencies(config) if rotary else (None, 1.0)
    for layer, kind in enumerate(config.layer_types):
        name = f"model.layers.{layer}"
        mlp, middle = _mlp(f"{name}.mlp", config), f"{name}.post_attention_layernorm.weight"
        if kind == "linear_attention":
            parts.append(
                Planned(_olmo_delta(config, f"{name}.linear_attn"), f"{name}.input_layernorm.weight")
            )
            parts.append(Planned(mlp, middle))
            continue
        inner = f"{name}.self_attn"
        norms = {"q_norm": f"{inner}.q_norm.weight", "k_norm": f"{inner}.k_norm.weight"}
        attention = replace(_attention(config, inner, rotary=rotary), norm_whole=True, **norms)
        parts.append(Planned(attention, None, after=middle))
        parts.append(Planned(mlp, None, after=f"{name}.post_feedforward_layernorm.weight"))
    names = "model.embed_tokens.weight", "model.norm.weight"
    return Plan(*names, float(config.rms_norm_eps), parts, angles=angles, turned=turned)


def _olmo_delta(config: Any, name: str) -> Delta:
    q, k, v, gate, step, beta = (Rows(f"{name}.{kind}_proj") for kind in "qkvgab")
    sizes = (
        *(int(config.linear_num_key_heads), int(config.linear_key_head_dim)),
        *(int(config.linear_num_value_heads), int(config.linear_value_head_dim)),
        int(config.linear_conv_kernel_dim),
    )
    most = 2.0 if config.linear_allow_neg_eigval else 1.0
    ends = Product(f"{name}.o_proj"), f"{name}.o_norm.weight", 1e-5  # in the stock code
    return Delta(name, [q, k, v], gate, step, beta, *ends, *sizes, most)


def _mixture(config: Any, layer: int) -> bool:
    """Whether a layer of Qwen's has experts."""
    if model_type(config) == "qwen3_next":
        some = config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0
        return some and layer not in config.mlp_only_layers
    return model_type(config) == "qwen3_5_moe_text"


def _delta(config: Any, name: str) -> Delta:
    """The mixer of Qwen3.5, or of Qwen3-Next, whose matrices have all of a group of heads side by side."""
    groups, heads = int(config.linear_num_key_heads), int(config.linear_num_value_heads)
    keys, channels = int(config.linear_key_head_dim), int(config.linear_value_head_dim)
    if model_type(config) == "qwen3_next":
        many = heads // groups
        wide = torch.arange(groups * 2 * (keys + many * channels)).view(groups, -1)
        q, k, v, z = (x.flatten() for x in wide.split([keys, keys, many * channels, many * channels], 1))
        b, a = (x.flatten() for x in torch.arange(2 * heads).view(groups, -1).chunk(2, 1))
        whole, both = f"{name}.in_proj_qkvz", f"{name}.in_proj_ba"
        mixed, gate = [Rows(whole, torch.cat([q, k, v]))], Rows(whole, z)
        step, beta = Rows(both, a), Rows(both, b)
    else:
        mixed, gate = [Rows(f"{name}.in_proj_qkv")], Rows(f"{name}.in_proj_z")
        step, beta = Rows(f"{name}.in_proj_a"), Rows(f"{name}.in_proj_b")
    sizes = groups, keys, heads, channels, int(config.linear_conv_kernel_dim)
    out, norm = Product(f"{name}.out_proj"), f"{name}.norm.weight"
    return Delta(name, mixed, gate, step, beta, out, norm, float(config.rms_norm_eps), *sizes)


def _dual(config: Any, **more: Any) -> Any:
    """The mixers of Bamba, GraniteMoeHybrid and FalconH1 in the words of `Mamba2Config`."""
    return SimpleNamespace(
        model_type="mamba2",
        hidden_size=config.hidden_size,
        num_heads=config.mamba_n_heads,
        head_dim=config.mamba_d_head,
        n_groups=config.mamba_n_groups,
        state_size=config.mamba_d_state,
        conv_kernel=config.mamba_d_conv,
        time_step_limit=config.time_step_limit,
        layer_norm_epsilon=config.rms_norm_eps,
        **more,
    )


def _attention(
    config: Any,
    name: str,
    *,
    rotary: bool = False,
    scale: float | None = None,
    inputs: float = 1.0,
    keys: float = 1.0,
) -> Attention:
    """Attention under the usual names; `inputs` multiplies what it reads, `keys` the keys."""
    heads, width = int(config.num_attention_heads), _width(config)
    q, v = (Product(f"{name}.{kind}_proj", inputs=inputs) for kind in "qv")
    k, o = Product(f"{name}.k_proj", keys, inputs), Product(f"{name}.o_proj")
    by = width**-0.5 if scale is None else scale
    return Attention(q, k, v, o, heads, int(config.num_key_value_heads), width, by, rotary)


def _width(config: Any) -> int:
    """Channels of a head of attention."""
    return int(optional(config, "head_dim") or config.hidden_size // config.num_attention_heads)


def _mlp(name: str, config: Any, gate: float = 1.0) -> Mlp:
    """An MLP under the usual names; `gate` multiplies what its activation reads."""
    up, down = Product(f"{name}.up_proj"), Product(f"{name}.down_proj")
    return Mlp(Product(f"{name}.gate_proj", gate), up, down, _curve(config.hidden_act))


def _narrow(name: str, curve: str) -> Mlp:
    """An MLP without a gate."""
    return Mlp(None, Product(f"{name}.up_proj"), Product(f"{name}.down_proj"), curve)


def _experts(name: str, router: str, config: Any, choice: str) -> Experts:
    wide, down = f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj"
    chosen = int(config.num_experts_per_tok)
    return Experts(Product(f"{name}.{router}"), wide, down, True, _curve(config.hidden_act), chosen, choice)


def _curve(activation: str) -> str:
    """An activation of transformers by our name for it."""
    known = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu2": "relu2"}
    if activation not in known:
        raise ValueError(f"the activation of an MLP is {activation!r}; supported: {', '.join(known)}")
    return known[activation]


FAMILIES: Mapping[str, Callable[[Any], Plan]] = {
    "mamba": _pure,
    "falcon_mamba": _pure,
    "mamba2": _pure,
    "bamba": _bamba,
    "falcon_h1": _falcon_h1,
    "granitemoehybrid": _granite,
    "jamba": _jamba,
    "nemotron_h": _nemotron_h,
    "olmo_hybrid": _olmo,
    "qwen3_5_text": _qwen,
    "qwen3_5_moe_text": _qwen,
    "qwen3_next": _qwen,
    "zamba2": _zamba2,
}
"""By model type. `base.FIELDS` has the same rows."""
