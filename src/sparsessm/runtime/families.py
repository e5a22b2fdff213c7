"""The plan of a stock model, family by family.

Place in the flow: from a configuration of transformers to `plan.py`, which both engines are made of. What a
family's stock code does between the parts of a layer is said here and nowhere else in `runtime/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from sparsessm.architectures.attention import frequencies
from sparsessm.runtime import usual
from sparsessm.runtime.base import model_type, refuse_windows
from sparsessm.runtime.families_delta import kimi, olmo, qwen
from sparsessm.runtime.plan import Attention, Experts, Mamba, Mlp, Plain, Plan, Planned, Product


def plan_of(config: Any) -> Plan:
    """What a model of this configuration consists of.

    Args:
        config: of a model type of `base.FIELDS`, checked by `base.refuse_unsupported`.

    Raises:
        ValueError: positions of a kind that does not run here, attention that sees a window of the text.
    """
    refuse_windows(config)
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
    mixer, (angles, turned), parts = _dual(config), frequencies(config, usual.width(config)), []
    for layer, kind in enumerate(config.layers_block_type):
        name = f"model.layers.{layer}"
        if kind == "full_attention":
            first = usual.attention(config, f"{name}.self_attn", rotary=True)
        else:
            first = Mamba(f"{name}.mamba", True, mixer)
        parts.append(Planned(first, f"{name}.input_layernorm.weight"))
        parts.append(Planned(usual.mlp(f"{name}.feed_forward", config), f"{name}.pre_ff_layernorm.weight"))
    names = "model.embed_tokens.weight", "model.final_layernorm.weight"
    return Plan(*names, float(config.rms_norm_eps), parts, angles=angles, turned=turned)


def _granite(config: Any) -> Plan:
    mixer, parts, rotary = _dual(config), [], config.position_embedding_type == "rope"
    scale = float(config.residual_multiplier)
    for layer, kind in enumerate(config.layers_block_type):
        name = f"model.layers.{layer}"
        if kind == "full_attention":
            score = float(config.attention_multiplier)
            first = usual.attention(config, f"{name}.self_attn", rotary=rotary, scale=score)
        else:
            first = Mamba(f"{name}.mamba", True, mixer)
        parts.append(Planned(first, f"{name}.input_layernorm.weight", scale=scale))
        norm, reads = f"{name}.post_attention_layernorm.weight", "stream"
        if config.num_local_experts > 0:
            inner = f"{name}.block_sparse_moe"
            experts = usual.experts(inner, "router", config, choice="softmax_of_chosen")
            parts.append(Planned(experts, norm, scale=scale))
            norm, reads = None, "before"
        wide = Product(f"{name}.shared_mlp.input_linear")
        shared = Mlp(wide, wide, Product(f"{name}.shared_mlp.output_linear"), usual.curve(config.hidden_act))
        parts.append(Planned(shared, norm, reads, scale=scale))
    angles, turned = frequencies(config, usual.width(config)) if rotary else (None, 1.0)
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
        attention = usual.attention(config, f"{name}.self_attn", rotary=True, inputs=within, keys=keys)
        scale = float(config.attention_out_multiplier)
        parts.append(Planned(attention, None, "before", scale=scale))
        mlp = usual.mlp(f"{name}.feed_forward", config, gate=gate)
        parts.append(Planned(mlp, f"{name}.pre_ff_layernorm.weight", scale=down))
    angles, turned = frequencies(config, usual.width(config))
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
    curve, parts = usual.curve(config.mlp_hidden_act), []
    for layer, kind in enumerate(config.layers_block_type):
        norm, name = f"model.layers.{layer}.norm.weight", f"model.layers.{layer}.mixer"
        if kind == "linear_attention":
            parts.append(Planned(Mamba(name, True, mixer), norm))
        elif kind == "full_attention":
            parts.append(Planned(usual.attention(config, name), norm))
        elif kind == "mlp":
            parts.append(Planned(usual.narrow(name, curve), norm))
        else:
            parts.append(Planned(_nemotron_experts(name, config, curve), norm))
            parts.append(Planned(usual.narrow(f"{name}.shared_experts", curve), None, "before"))
    names = "model.embeddings.weight", "model.norm_f.weight"
    return Plan(*names, float(config.layer_norm_epsilon), parts)


def _nemotron_experts(name: str, config: Any, curve: str) -> Experts:
    latent = config.moe_latent_size is not None
    plain = Experts(
        Product(f"{name}.gate"),
        f"{name}.experts.up_proj",
        f"{name}.experts.down_proj",
        gated=False,
        curve=curve,
        chosen=int(config.num_experts_per_tok),
        choice="sigmoid",
        before=Product(f"{name}.fc1_latent_proj") if latent else None,
        behind=Product(f"{name}.fc2_latent_proj") if latent else None,
    )
    return usual.sigmoid_experts(plain, config)


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
            first = usual.attention(config, f"{name}.self_attn")
        else:
            first = Mamba(f"{name}.mamba", False, mixer)
        parts.append(Planned(first, f"{name}.input_layernorm.weight"))
        inner = f"{name}.feed_forward"
        second = usual.mlp(inner, config)
        if experts > 1:
            second = usual.experts(inner, "router", config, choice="softmax")
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
    mlp = Mlp(wide, wide, Product(f"{inner}.down_proj"), usual.curve(config.hidden_act))
    yield Planned(mlp, f"{name}.pre_ff_layernorm.weight", "side", beside=True)


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


FAMILIES: Mapping[str, Callable[[Any], Plan]] = {
    "mamba": _pure,
    "falcon_mamba": _pure,
    "mamba2": _pure,
    "bamba": _bamba,
    "falcon_h1": _falcon_h1,
    "granitemoehybrid": _granite,
    "jamba": _jamba,
    "nemotron_h": _nemotron_h,
    "kimi_linear": kimi,
    "olmo_hybrid": olmo,
    "qwen3_5_text": qwen,
    "qwen3_5_moe_text": qwen,
    "qwen3_next": qwen,
    "zamba2": _zamba2,
}
"""By model type. `base.FIELDS` has the same rows."""
