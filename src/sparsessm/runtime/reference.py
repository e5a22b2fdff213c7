"""The definition of the runtime: models read token by token in plain PyTorch. Slow, and the truth of tests.

Place in the flow: an `Engine` (base.py). It is what runs where the native extension is missing, and what
tests compare the native engine with. The same computation as transformers' models in float32, with the state
in one tensor; letters as in `architectures/base.py`. Mixers are here, what hybrids have beside them is in
`reference_parts.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.architectures import projected
from sparsessm.checkpoint.known_fields import optional
from sparsessm.kernels import reference as kernels
from sparsessm.runtime import reference_parts as parts
from sparsessm.runtime.base import (
    PURE,
    channels_of,
    fingerprint,
    heads,
    limits,
    mixer_epsilon,
    model_type,
    refuse_unsupported,
    scan_shapes,
)
from sparsessm.runtime.families import plan_of
from sparsessm.runtime.keys import BLOCK, Keys, checked_form
from sparsessm.runtime.plan import Attention, Delta, Experts, Latent, Mamba, Mlp

SLAB = 512  # tokens of a prompt that are in memory together
ORDER = "layer, [inputs of the convolution (K-1, D), oldest first; scan (D, N)]"
ORDER2 = "layer, [inputs of the convolution (K-1, D + 2GN), oldest first; scan (H, P, N)]"
ORDER_OF_DELTA = "layer, [inputs of the convolution (K-1, 2GK + HP), oldest first; states (H, K, P)]"
ORDER_OF_KEYS = "tokens; blocks of 64: token, layer, [keys (heads, width); values (heads, width)] or row"


class ReferenceEngine:
    """A model in float32, one sequence at a time.

    The state of a sequence holds, mixer after mixer, the last K - 1 inputs of the convolution (K-1, D) and
    the state of the scan (D, N), where each layer may have a D of its own; of Mamba-2 (K-1, D + 2GN) and
    (H, P, N), or (H, P, r) where B and C are projected (architectures/projected.py). With attention the
    number of tokens follows, and of each token all layers' keys and values (layer, 2, heads, width).
    """

    def __init__(self, config: Any, weights: Mapping[str, Tensor], keys: str = "float32") -> None:
        """Take the weights of a stock model.

        Args:
            config: a configuration of transformers of a type of `base.FIELDS`, or alike.
            weights: tensors of any floating dtype under the names of the stock model's `state_dict()`;
                `lm_head.weight` may be missing where it is tied to the embedding.
            keys: a form of `keys.FORMS`; "int8" is rounded as in native code, but held in float32.

        Raises:
            ValueError: as `refuse_unsupported`; a tensor that is missing or of a wrong shape.
        """
        refuse_unsupported(config)
        int8 = checked_form(keys) == "int8"
        self._held = parts.rounded if int8 else _same
        self._plan = told = plan_of(config)
        shapes = _checked(config, weights)
        self._weights = {name: weights[name].detach().to("cpu", torch.float32) for name in shapes}
        self._head = self._weights.get("lm_head.weight", self._weights[told.embedding])
        self._a = {mixer.name: -torch.exp(self._of(mixer, "A_log")) for mixer in told.mixers}
        self._sizes: list[int] = []
        for part in told.parts:
            if isinstance(mixer := part.what, Delta):
                mixed = 2 * mixer.groups * mixer.keys + mixer.heads * mixer.channels
                self._sizes += [(mixer.taps - 1) * mixed, mixer.heads * mixer.keys * mixer.channels]
            elif isinstance(mixer, Mamba):
                taps = self._of(mixer, "conv1d.weight")
                inner = heads(mixer.config).inner if mixer.dual else len(taps)
                self._sizes += [(taps.shape[-1] - 1) * len(taps), inner * self._states(mixer)]
        self._per_token = [size for part in told.parts if (size := _kept(part.what))]
        per_token = sum(self._per_token)
        self.vocabulary = int(config.vocab_size)
        self.state_size = sum(self._sizes) + bool(per_token)
        self.keys = Keys(self.state_size, per_token * BLOCK)
        orders = dict.fromkeys(ORDER2 if mixer.dual else ORDER for mixer in told.mixers)
        if any(isinstance(part.what, Delta) for part in told.parts):
            orders |= {ORDER_OF_DELTA: None}
        orders |= {ORDER_OF_KEYS: None} if per_token else {}
        orders |= {"int8": None} if per_token and int8 else {}
        self.layout = fingerprint(config, self._weights, "; ".join(orders))

    def _of(self, mixer: Mamba, name: str) -> Tensor:
        return self._weights[f"{mixer.name}.{name}"]

    def _maybe(self, mixer: Mamba, name: str) -> Tensor | None:
        return self._weights.get(f"{mixer.name}.{name}")

    def _states(self, mixer: Mamba) -> int:
        """Of a channel: N, or the r directions of a projection."""
        projection = self._maybe(mixer, "B_projection")
        return int(mixer.config.state_size) if projection is None else projection.shape[1]

    @property
    def nbytes(self) -> int:
        """As `Engine.nbytes`; of experts as many as a token goes through."""
        embedding = self._weights[self._plan.embedding]
        total = sum(weight.nbytes for weight in self._weights.values())
        total -= 0 if self._head is embedding else embedding.nbytes
        for part in self._plan.parts:
            if isinstance(what := part.what, Experts):
                stacks = [self._weights[name] for name in (what.wide, what.down)]
                total -= sum(stack.nbytes - stack.nbytes // len(stack) * what.chosen for stack in stacks)
        return total

    @property
    def resident(self) -> int:
        """As `Engine.resident`."""
        return sum(weight.nbytes for weight in (*self._weights.values(), *self._a.values()))

    @property
    def sections(self) -> list[tuple[int, int]]:
        """As `Engine.sections`."""
        return list(zip(self._sizes[::2], self._sizes[1::2], strict=True))

    def new_state(self, batch: int) -> Tensor:
        """As `Engine.new_state`."""
        return torch.zeros(batch, self.state_size)

    @torch.no_grad()
    def prompt(self, tokens: Tensor, state: Tensor, every: bool = False) -> Tensor:
        """As `Engine.prompt`."""
        logits, hidden = [], torch.empty(0)
        for slab in tokens.split(SLAB):
            hidden = self._read(slab, state)
            if every:
                logits.append(self._logits(hidden))
        return torch.cat(logits) if every else self._logits(hidden[-1:])[0]

    @torch.no_grad()
    def step(self, tokens: Tensor, states: Tensor | list[Tensor]) -> Tensor:
        """As `Engine.step`."""
        # One by one: a matrix product of several rows rounds otherwise than one of each alone.
        rows = [self._logits(self._read(tokens[i : i + 1], states[i])) for i in range(len(tokens))]
        return torch.cat(rows) if rows else torch.empty(0, self.vocabulary)

    def _read(self, tokens: Tensor, state: Tensor) -> Tensor:
        """(L,) tokens -> (L, d_model) after the last layer; the state is advanced."""
        told, start = self._plan, self.keys.tokens(state)
        self.keys.refuse_full(state, len(tokens))
        embedded = F.embedding(tokens, self._weights[told.embedding]) * told.embedding_scale
        hidden, beside, x = embedded, embedded, embedded
        mixing = iter(state[: sum(self._sizes)].split(self._sizes))
        behind, each = state[self.keys.fixed :], self._per_token  # nothing, where there is no attention
        kept = iter(behind.view(-1, sum(each)).split(each, -1) if each else ())
        for part in told.parts:
            sources = {"stream": hidden, "side": beside, "sum": hidden + beside, "before": x}
            x = torch.cat([hidden, embedded], -1) if part.reads == "both" else sources[part.reads]
            if part.norm is not None:
                x = self._named(x, part.norm)
            if isinstance(what := part.what, Mamba):
                taps = self._of(what, "conv1d.weight")
                mixer = self._mamba2 if what.dual else self._mamba1
                out = mixer(what, x, next(mixing).view(-1, len(taps)), next(mixing))
            elif isinstance(what, Attention):
                own = next(kept).unflatten(-1, (2, what.shared, what.width))
                turning = told.angles, told.turned
                out = parts.attention(self._weights, what, *turning, x, own, start, self._named, self._held)
            elif isinstance(what, Latent):
                out = parts.latent(self._weights, what, x, next(kept), start, self._held)
            elif isinstance(what, Delta):
                out = parts.delta(self._weights, what, x, next(mixing), next(mixing))
            elif isinstance(what, Mlp):
                out = parts.mlp(self._weights, what, x)
            elif isinstance(what, Experts):
                out = parts.experts(self._weights, what, x)
            else:
                out = parts.linear(self._weights, what.product, x)
            if part.after is not None:
                out = self._named(out, part.after)
            out = out * part.scale
            hidden, beside = (hidden, out) if part.beside else (hidden + out, beside)
        if self.keys.block:
            state[self.keys.fixed - 1] += len(tokens)
        return hidden

    def _mamba1(self, mixer: Mamba, x: Tensor, conv: Tensor, scan: Tensor) -> Tensor:
        """(L, d_model), normalised -> (L, d_model); `conv` and `scan` are the mixer's parts of the state."""
        u, z = self._linear(mixer, "in_proj", x).chunk(2, dim=-1)
        u = self._convolve(mixer, u, conv)
        states = int(mixer.config.state_size)
        widths = [int(mixer.config.time_step_rank), states, states]
        step, b, c = self._linear(mixer, "x_proj", u).split(widths, dim=-1)
        if (epsilon := mixer_epsilon(mixer.config)) is not None:  # FalconMamba, Jamba
            step, b, c = (_normalised(part, epsilon) for part in (step, b, c))
            names = [f"{name}_layernorm.weight" for name in ("dt", "b", "c")]
            step, b, c = (
                part if (weight := self._maybe(mixer, name)) is None else part * weight
                for part, name in zip((step, b, c), names, strict=True)
            )
        delta = F.softplus(self._linear(mixer, "dt_proj", step))
        skip, a = self._of(mixer, "D"), self._a[mixer.name]
        start = scan.view(a.shape)[None]
        y, last = kernels.selective_scan(u[None], delta[None], a, b[None], c[None], skip, z[None], start)
        scan.copy_(last.flatten())
        return self._linear(mixer, "out_proj", y[0])

    def _mamba2(self, mixer: Mamba, x: Tensor, conv: Tensor, scan: Tensor) -> Tensor:
        """As `_mamba1`; the recurrence of Dao & Gu, arXiv 2405.21060, with one decay a head."""
        size, a, skip = heads(mixer.config), self._a[mixer.name], self._of(mixer, "D")
        widths = [size.inner, size.groups * size.states, size.groups * size.states]
        whole, *zones = optional(mixer.config, "multipliers") or [1.0] * 6  # FalconH1's
        factors = torch.tensor(zones).repeat_interleave(torch.tensor([size.inner, *widths, size.heads]))
        projected_x = self._linear(mixer, "in_proj", x * whole) * factors
        z, mixed, step = projected_x.split([size.inner, size.mixed, size.heads], dim=-1)
        u, b, c = self._convolve(mixer, mixed, conv).split(widths, dim=-1)
        u = u.unflatten(-1, (size.heads, size.channels))  # (L, H, P)
        shared = size.heads // size.groups
        b, c = (t.unflatten(-1, (size.groups, -1)).repeat_interleave(shared, 1) for t in (b, c))  # (L, H, N)
        if self._maybe(mixer, "B_projection") is not None:
            maps = (self._of(mixer, name) for name in projected.MATRICES)  # (G, r, N) each
            maps = (each.repeat_interleave(shared, 0) for each in maps)
            b, c = ((each @ part[..., None])[..., 0] for each, part in zip(maps, (b, c), strict=True))
        delta = F.softplus(step + self._of(mixer, "dt_bias")).clamp(*limits(mixer.config))  # (L, H)
        h, rows = scan.view(size.heads, size.channels, -1), []
        for t in range(len(x)):
            decay = torch.exp(delta[t] * a)[:, None, None]
            h.copy_(decay * h + (delta[t, :, None] * u[t])[:, :, None] * b[t, :, None])
            rows.append((h * c[t, :, None]).sum(-1) + skip[:, None] * u[t])
        return self._linear(mixer, "out_proj", self._gated(mixer, torch.stack(rows).flatten(1), F.silu(z)))

    def _gated(self, mixer: Mamba, y: Tensor, gate: Tensor) -> Tensor:
        """(L, D), what the scan of a Mamba-2 gives, gated and normalised."""
        if (weight := self._maybe(mixer, "norm.weight")) is None:
            return y * gate
        first = bool(optional(mixer.config, "norm_before_gate", False))
        y = y if first else y * gate
        groups = y.unflatten(-1, (heads(mixer.config).groups, -1))
        y = _normalised(groups, mixer.config.layer_norm_epsilon).flatten(1) * weight
        return y * gate if first else y

    def _convolve(self, mixer: Mamba, x: Tensor, before: Tensor) -> Tensor:
        """(L, M) after convolution and SiLU; `before` (K-1, M) is advanced."""
        seen = torch.cat([before, x])
        weight, bias = self._of(mixer, "conv1d.weight")[:, 0], self._maybe(mixer, "conv1d.bias")
        x = kernels.causal_conv1d(x[None], weight, bias, before[None], silu=True)[0]
        before.copy_(seen[len(seen) - len(before) :])
        return x

    def _linear(self, mixer: Mamba, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._of(mixer, f"{name}.weight"), self._maybe(mixer, f"{name}.bias"))

    def _named(self, x: Tensor, norm: str) -> Tensor:
        """x normalised, by a weight's name."""
        return self._plan.norm_of(self._weights[norm]) * _normalised(x, self._plan.epsilon)

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(self._named(hidden, self._plan.norm), self._head) * self._plan.logit_scale


def _same(x: Tensor) -> Tensor:
    return x


def _kept(what: Any) -> int:
    """Numbers that a token leaves in a part."""
    if isinstance(what, Attention):
        return 2 * what.shared * what.width
    return what.kept if isinstance(what, Latent) else 0


def _checked(config: Any, weights: Mapping[str, Tensor]) -> Iterable[str]:
    """The names of the tensors that a model of this configuration has.

    Raises:
        ValueError: one is missing, or of a wrong shape.
    """
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if model_type(config) not in PURE:
        _refuse_missing(list(parts.needed(plan_of(config))), weights)
        return given
    dual, layers = model_type(config) == "mamba2", int(config.num_hidden_layers)
    widths: dict[int, int] = {}
    for layer in () if dual else range(layers):
        prefix = f"backbone.layers.{layer}.mixer."
        widths[layer] = channels_of(config, lambda name, prefix=prefix: given.get(prefix + name))
    shapes = expected_shapes(config, projected.directions_in(given, config), widths)
    if misfits := [name for name in projected.named_in(given) if name not in shapes]:
        raise ValueError(f"{misfits[0]} of shape {given[misfits[0]]} does not fit the model")
    _refuse_missing(list(shapes), weights)
    for name, shape in shapes.items():
        if given[name] != shape:
            raise ValueError(f"{name} has shape {given[name]}, expected {shape}")
    return shapes


def _refuse_missing(names: list[str], weights: Mapping[str, Tensor]) -> None:
    if missing := [name for name in names if name not in weights]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"the weights have no {missing[0]}{more}")


def expected_shapes(
    config: Any, directions: Mapping[int, int] | None = None, widths: Mapping[int, int] | None = None
) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model of this configuration, by its stock name, and its shape.

    Args:
        config: as `ReferenceEngine` takes it.
        directions: layer -> r, where B and C are projected.
        widths: layer -> channels of a Mamba-1, where they are not the configuration's.
    """
    model, rows, widths = int(config.hidden_size), int(config.vocab_size), widths or {}
    dual = model_type(config) == "mamba2"
    shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (rows, model)}
    for layer in range(int(config.num_hidden_layers)):
        shapes[f"backbone.layers.{layer}.norm.weight"] = (model,)
        inner, _ = _channels(config, widths.get(layer))
        mixer = _heads(config) if dual else scan_shapes(config, inner)
        shapes |= {f"backbone.layers.{layer}.mixer.{name}": shape for name, shape in mixer.items()}
    for layer, count in (directions or {}).items():
        maps = int(config.n_groups), count, int(config.state_size)
        shapes |= {f"backbone.layers.{layer}.mixer.{name}": maps for name in projected.MATRICES}
    shapes["backbone.norm_f.weight"] = (model,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (rows, model)
    return shapes


def _channels(config: Any, own: int | None = None) -> tuple[int, int]:
    """Those of the scan, and of the convolution; `own` are a layer's of Mamba-1, else the configuration's."""
    if model_type(config) == "mamba2":
        size = heads(config)
        return size.inner, size.mixed
    inner = own or int(config.intermediate_size)
    return inner, inner


def _heads(config: Any) -> dict[str, tuple[int, ...]]:
    """The tensors of a mixer of Mamba-2, by their names in it."""
    size, model = heads(config), int(config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {name: (size.heads,) for name in ("A_log", "D", "dt_bias")}
    shapes |= {
        "in_proj.weight": (size.inner + size.mixed + size.heads, model),
        "conv1d.weight": (size.mixed, 1, int(config.conv_kernel)),
        "norm.weight": (size.inner,),
        "out_proj.weight": (model, size.inner),
    }
    if config.use_conv_bias:
        shapes["conv1d.bias"] = (size.mixed,)
    if config.use_bias:
        shapes |= {"in_proj.bias": shapes["in_proj.weight"][:1], "out_proj.bias": (model,)}
    return shapes


def _normalised(x: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
