"""Attention, MLPs and experts under the names that most families give them.

Place in the flow: what `families.py` and `families_delta.py` have in common.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparsessm.checkpoint.known_fields import optional
from sparsessm.runtime.plan import Attention, Experts, Mlp, Product


def attention(
    config: Any,
    name: str,
    *,
    rotary: bool = False,
    scale: float | None = None,
    inputs: float = 1.0,
    keys: float = 1.0,
) -> Attention:
    """Attention under the usual names; `inputs` multiplies what it reads, `keys` the keys."""
    heads, size = int(config.num_attention_heads), width(config)
    q, v = (Product(f"{name}.{kind}_proj", inputs=inputs) for kind in "qv")
    k, o = Product(f"{name}.k_proj", keys, inputs), Product(f"{name}.o_proj")
    by = size**-0.5 if scale is None else scale
    return Attention(q, k, v, o, heads, int(config.num_key_value_heads), size, by, rotary)


def width(config: Any) -> int:
    """Channels of a head of attention."""
    return int(optional(config, "head_dim") or config.hidden_size // config.num_attention_heads)


def mlp(name: str, config: Any, gate: float = 1.0) -> Mlp:
    """An MLP under the usual names; `gate` multiplies what its activation reads."""
    up, down = Product(f"{name}.up_proj"), Product(f"{name}.down_proj")
    return Mlp(Product(f"{name}.gate_proj", gate), up, down, curve(config.hidden_act))


def narrow(name: str, curve_: str) -> Mlp:
    """An MLP without a gate; `curve_` as of `Mlp`."""
    return Mlp(None, Product(f"{name}.up_proj"), Product(f"{name}.down_proj"), curve_)


def experts(name: str, router: str, config: Any, choice: str) -> Experts:
    """Experts under the usual names; `choice` as of `Experts`."""
    wide, down = f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj"
    chosen = int(config.num_experts_per_tok)
    return Experts(Product(f"{name}.{router}"), wide, down, True, curve(config.hidden_act), chosen, choice)


def sigmoid_experts(plain: Experts, config: Any) -> Experts:
    """`plain` with the router of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) under its usual names."""
    return replace(
        plain,
        choice="sigmoid",
        favour=f"{plain.router.name}.e_score_correction_bias",
        groups=int(config.n_group),
        chosen_groups=int(config.topk_group),
        normalised=bool(config.norm_topk_prob),
        factor=float(config.routed_scaling_factor),
    )


def curve(activation: str) -> str:
    """An activation of transformers by our name for it.

    Raises:
        ValueError: it is another one.
    """
    known = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu2": "relu2"}
    if activation not in known:
        raise ValueError(f"the activation of an MLP is {activation!r}; supported: {', '.join(known)}")
    return known[activation]
