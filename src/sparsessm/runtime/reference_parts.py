"""Attention, MLPs and experts of the definition (reference.py), in plain PyTorch, token by token.

Place in the flow: below `reference.py`. Independent of the native engine: what both have is the plan of the
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.checkpoint.known_fields import optional
from sparsessm.kernels import reference as kernels
from sparsessm.runtime.plan import (
    Attention,
    Delta,
    Experts,
    Latent,
    Mamba,
    Mlp,
    Plan,
    Planned,
    Product,
    Rows,
)

Tensors = Mapping[str, Tensor]
CURVES = {"silu": F.silu, "gelu": F.gelu, "relu2": lambda x: F.relu(x) ** 2}


def linear(tensors: Tensors, told: Product, x: Tensor) -> Tensor:
    """(L, in) -> (L, out)."""
    out = F.linear(x * told.inputs, tensors[f"{told.name}.weight"], tensors.get(f"{told.name}.bias"))
    if told.adapter:
        narrow, wide = (tensors[f"{told.adapter}.{i}.weight"] for i in (0, 1))
        out = out + F.linear(F.linear(x, narrow), wide)
    return out


def attention(
    tensors: Tensors,
    told: Attention,
    angles: Tensor | None,
    factor: float,
    x: Tensor,
    kept: Tensor,
    start: int,
    norm: Callable[[Tensor, str], Tensor],
    held: Callable[[Tensor], Tensor],
) -> Tensor:
    """Causal attention of tokens that come after `start` others.

    Args:
        angles: radians a token of each pair of channels. factor: of what they turn.
        norm: of vectors, by the name of its weight.
        kept: (tokens, 2, shared, width) keys and values of all tokens, filled in from `start` on.
        held: what is left of vectors where they are kept.
    """
    q, gate = linear(tensors, told.q, x).unflatten(-1, (told.heads, -1)) * told.q.scale, None
    if told.gated:
        q, gate = q.chunk(2, -1)
    k, v = (linear(tensors, part, x).unflatten(-1, (told.shared, told.width)) for part in (told.k, told.v))
    k, rows = k * told.k.scale, []
    if told.norm_whole:
        q, k = (
            norm(part.flatten(1), name).view_as(part) for part, name in ((q, told.q_norm), (k, told.k_norm))
        )
    elif told.q_norm:
        q, k = norm(q, told.q_norm), norm(k, told.k_norm)
    for t in range(len(x)):
        now = q[t]
        if told.rotary:
            assert angles is not None
            now, k[t] = (turned(head, (start + t) * angles, factor) for head in (now, k[t]))
        kept[start + t, 0], kept[start + t, 1] = held(k[t]), held(v[t])
        keys, values = (
            kept[: start + t + 1, i].repeat_interleave(told.heads // told.shared, 1) for i in (0, 1)
        )
        weights = torch.softmax(torch.einsum("hc,thc->ht", now, keys) * told.scale, -1)
        rows.append(torch.einsum("ht,thc->hc", weights, values).flatten())
    met = torch.stack(rows)
    return linear(tensors, told.o, met if gate is None else met * torch.sigmoid(gate).flatten(1))


def delta(tensors: Tensors, told: Delta, x: Tensor, conv: Tensor, rule: Tensor) -> Tensor:
    """(L, in) -> (L, in) by the gated delta rule; `conv` and `rule` are the mixer's parts of the state."""

    def some(rows: Rows) -> Tensor:
        weight, narrow = tensors[f"{rows.name}.weight"], rows.narrow
        if narrow:
            return F.linear(F.linear(x, tensors[f"{narrow}.weight"]), weight)
        return F.linear(x, weight if rows.rows is None else weight[rows.rows])

    entering, before = torch.cat([some(rows) for rows in told.mixed], -1), conv.view(told.taps - 1, -1)
    seen = torch.cat([before, entering])
    weight = tensors[f"{told.name}.conv1d.weight"][:, 0]
    mixed = torch.stack([(seen[t : t + told.taps] * weight.T).sum(0) for t in range(len(x))])
    before.copy_(seen[len(seen) - len(before) :])
    share = told.groups * told.keys
    q, k, v = F.silu(mixed).split([share, share, told.heads * told.channels], -1)
    q, k = (part.unflatten(-1, (told.groups, told.keys)) for part in (q, k))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    v = v.unflatten(-1, (told.heads, told.channels))
    a = torch.exp(tensors[f"{told.decay}.A_log"].flatten())
    step = F.softplus(some(told.step) + tensors[f"{told.decay}.dt_bias"].flatten())
    g = -a[:, None] * step.unflatten(-1, (told.heads, told.keys)) if told.by_channel else -a * step
    beta = told.most * torch.sigmoid(some(told.beta))
    state = rule.view(1, told.heads, told.keys, told.channels)
    q, k, v, g, beta = (part[None] for part in (q / told.keys**0.5, k, v, g, beta))
    y, last = kernels.gated_delta(q, k, v, g, beta, state)
    rule.copy_(last.flatten())
    gate = some(told.gate).unflatten(-1, (told.heads, told.channels))
    y = y[0] * torch.rsqrt(y[0].square().mean(-1, keepdim=True) + told.epsilon) * tensors[told.norm]
    gate = torch.sigmoid(gate) if told.curve == "sigmoid" else F.silu(gate)
    return linear(tensors, told.out, (y * gate).flatten(1))


def latent(
    tensors: Tensors,
    told: Latent,
    x: Tensor,
    kept: Tensor,
    start: int,
    held: Callable[[Tensor], Tensor],
) -> Tensor:
    """(L, in) -> (L, in) by latent attention of tokens that come after `start` others.

    Args:
        kept: (tokens, rank + common) rows of all tokens, filled in from `start` on. The keys and values of
            all heads are made of them for each token anew.
        held: as of `attention`.
    """

    def normed(row: Tensor, name: str) -> Tensor:
        return tensors[name] * row * torch.rsqrt(row.square().mean(-1, keepdim=True) + told.epsilon)

    narrow = x if told.narrow is None else normed(linear(tensors, told.narrow, x), told.q_norm)
    q, rows = linear(tensors, told.q, narrow).unflatten(-1, (told.heads, -1)), []
    numbers, common = linear(tensors, told.row, x).split([told.rank, told.common], -1)
    kept[start : start + len(x)] = torch.cat([held(normed(numbers, told.norm)), held(common)], -1)
    for t in range(len(x)):
        numbers, common = kept[: start + t + 1].split([told.rank, told.common], -1)
        both = linear(tensors, told.wide, numbers).unflatten(-1, (told.heads, -1))
        own, values = both.split([told.own, told.width], -1)
        keys = torch.cat([own, common[:, None].expand(-1, told.heads, -1)], -1)
        weights = torch.softmax(torch.einsum("hc,thc->ht", q[t], keys) * told.scale, -1)
        rows.append(torch.einsum("ht,thc->hc", weights, values).flatten())
    return linear(tensors, told.o, torch.stack(rows))


def rounded(x: Tensor) -> Tensor:
    """(..., width) to 255 values, the largest magnitude of each vector the last of them."""
    unit = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(unit > 1e-30 / 127, (x / unit).round() * unit, 0 * x)


def turned(x: Tensor, angles: Tensor, factor: float) -> Tensor:
    """(heads, width) with channels c and c + pairs of each head turned by angles (pairs,), times a factor."""
    pairs = len(angles)
    first, second, rest = x[:, :pairs], x[:, pairs : 2 * pairs], x[:, 2 * pairs :]
    turning = torch.polar(torch.full((pairs,), factor), angles) * torch.complex(first, second)
    return torch.cat([turning.real, turning.imag, rest], -1)


def mlp(tensors: Tensors, told: Mlp, x: Tensor) -> Tensor:
    """(L, in) -> (L, out)."""
    curve, wide = CURVES[told.curve], linear(tensors, told.up, x)
    if told.share is not None:
        alone = mlp(tensors, replace(told, share=None), x)
        return alone * torch.sigmoid(linear(tensors, told.share, x))
    if told.gate is None:
        return linear(tensors, told.down, curve(wide))
    if told.gate.name == told.up.name:
        gate, up = wide.chunk(2, -1)
    else:
        gate, up = linear(tensors, told.gate, x) * told.gate.scale, wide
    return linear(tensors, told.down, curve(gate) * up)


def experts(tensors: Tensors, told: Experts, x: Tensor) -> Tensor:
    """(L, in) -> (L, in), each token through its own experts."""
    logits = linear(tensors, told.router, x)
    inner = x if told.before is None else linear(tensors, told.before, x)
    favour = None if told.favour is None else tensors[told.favour]
    rows = []
    for t in range(len(x)):
        total = torch.zeros(inner.shape[-1])
        for e, weight in routed(told, logits[t], favour):
            wide = tensors[told.wide][e] @ inner[t]
            curve = CURVES[told.curve]
            if told.gated:
                gate, up = wide.chunk(2)
                wide = curve(gate) * up
            else:
                wide = curve(wide)
            total = total + weight * (tensors[told.down][e] @ wide)
        rows.append(total)
    out = torch.stack(rows)
    return out if told.behind is None else linear(tensors, told.behind, out)


def routed(told: Experts, logits: Tensor, favour: Tensor | None) -> list[tuple[int, Tensor]]:
    """Of one token's logits (experts,) the experts it goes to, and what their outputs count."""

    def best(scores: Sequence[float], count: int) -> list[int]:
        return sorted(range(len(scores)), key=lambda e: -scores[e])[:count]

    if told.choice == "sigmoid":
        assert favour is not None
        scores = torch.sigmoid(logits)
        liked = (scores + favour).tolist()
        size = len(liked) // told.groups
        groups = [sum(sorted(liked[g * size : (g + 1) * size])[-2:]) for g in range(told.groups)]
        among = best(groups, told.chosen_groups)
        open_ = [like if e // size in among else float("-inf") for e, like in enumerate(liked)]
        chosen = best(open_, told.chosen)
        weights = scores[chosen]
        if told.normalised:
            weights = weights / (weights.sum() + 1e-20)
        return list(zip(chosen, weights * told.factor, strict=True))
    chosen = best(logits.tolist(), told.chosen)
    if told.choice == "softmax":
        return list(zip(chosen, torch.softmax(logits, 0)[chosen], strict=True))
    return list(zip(chosen, torch.softmax(logits[chosen], 0), strict=True))


def needed(told: Plan) -> Iterator[str]:
    """Names of the tensors that a model of this plan must have; biases it may have."""
    yield from (told.embedding, told.norm)
    for part in told.parts:
        yield from (name for name in (part.norm, part.after) if name is not None)
        yield from _of(part)


def _of(part: Planned) -> Iterator[str]:
    what = part.what
    if isinstance(what, Mamba):
        yield from (f"{what.name}.{name}" for name in ("A_log", "D", "in_proj.weight", "conv1d.weight"))
        yield f"{what.name}.out_proj.weight"
        if what.dual and optional(what.config, "gated_norm", True):
            yield f"{what.name}.norm.weight"
        return
    if isinstance(what, Delta):
        yield from (f"{what.decay}.A_log", f"{what.decay}.dt_bias", f"{what.name}.conv1d.weight", what.norm)
        for rows in (*what.mixed, what.gate, what.step, what.beta):
            yield from (f"{name}.weight" for name in (rows.name, rows.narrow) if name)
    if isinstance(what, Attention):
        yield from filter(None, (what.q_norm, what.k_norm))
    if isinstance(what, Latent):
        yield from filter(None, (what.q_norm, what.norm))
    products = [value for value in vars(what).values() if isinstance(value, Product)]
    for product in products:
        yield f"{product.name}.weight"
        if product.adapter:
            yield from (f"{product.adapter}.{i}.weight" for i in (0, 1))
    if isinstance(what, Experts):
        yield from (what.wide, what.down)
        if what.favour is not None:
            yield what.favour
