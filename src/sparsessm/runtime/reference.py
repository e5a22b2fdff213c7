"""The definition of the runtime: models read token by token in plain PyTorch. Slow, and the truth of tests.

Place in the flow: an `Engine` (base.py). It is what runs where the native extension is missing, and what
tests compare the native engine with. The same computation as transformers' `MambaForCausalLM`,
`FalconMambaForCausalLM` and `Mamba2ForCausalLM` in float32, with the state in one tensor; letters as in
`architectures/base.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.architectures import projected
from sparsessm.kernels import reference as kernels
from sparsessm.runtime.base import (
    channels_of,
    fingerprint,
    heads,
    limits,
    mixer_epsilon,
    model_type,
    refuse_unsupported,
    scan_shapes,
)

SLAB = 512  # tokens of a prompt that are in memory together
ORDER = "layer, [inputs of the convolution (K-1, D), oldest first; scan (D, N)]"
ORDER2 = "layer, [inputs of the convolution (K-1, D + 2GN), oldest first; scan (H, P, N)]"


class ReferenceEngine:
    """A model in float32, one sequence at a time.

    The state of a sequence holds, layer after layer, the last K - 1 inputs of the convolution (K-1, D) and
    the state of the scan (D, N), where each layer may have a D of its own; of Mamba-2 (K-1, D + 2GN) and
    (H, P, N), or (H, P, r) where B and C are projected (architectures/projected.py).
    """

    def __init__(self, config: Any, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a stock model.

        Args:
            config: a configuration of transformers of a type of `base.FIELDS`, or alike.
            weights: tensors of any floating dtype under the names of the stock model's `state_dict()`;
                `lm_head.weight` may be missing where it is tied to the embedding.

        Raises:
            ValueError: as `refuse_unsupported`; a tensor that is missing or of a wrong shape.
        """
        refuse_unsupported(config)
        given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        self._layers, self._dual = int(config.num_hidden_layers), model_type(config) == "mamba2"
        widths: dict[int, int] = {}
        for layer in () if self._dual else range(self._layers):
            prefix = f"backbone.layers.{layer}."
            widths[layer] = channels_of(config, lambda name, prefix=prefix: given.get(prefix + name))
        directions = projected.directions_in(given, config)
        shapes = expected_shapes(config, directions, widths)
        if misfits := [name for name in projected.named_in(given) if name not in shapes]:
            raise ValueError(f"{misfits[0]} of shape {given[misfits[0]]} does not fit the model")
        if missing := [name for name in shapes if name not in weights]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"the weights have no {missing[0]}{more}")
        for name, shape in shapes.items():
            if tuple(weights[name].shape) != shape:
                raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, expected {shape}")
        self._weights = {name: weights[name].detach().to("cpu", torch.float32) for name in shapes}
        self._head = self._weights.get("lm_head.weight", self._weights["backbone.embeddings.weight"])
        self._config, self._past = config, int(config.conv_kernel) - 1
        self._a = [-torch.exp(self._of(layer, "mixer.A_log")) for layer in range(self._layers)]
        self._sizes: list[int] = []
        for layer in range(self._layers):
            inner, mixed = _channels(config, widths.get(layer))
            states = directions.get(layer, int(config.state_size))
            self._sizes += [self._past * mixed, inner * states]
        self.vocabulary = int(config.vocab_size)
        self.state_size = sum(self._sizes)
        self.layout = fingerprint(config, self._weights, ORDER2 if self._dual else ORDER)

    def _of(self, layer: int, name: str) -> Tensor:
        return self._weights[f"backbone.layers.{layer}.{name}"]

    @property
    def nbytes(self) -> int:
        """As `Engine.nbytes`."""
        embedding = self._weights["backbone.embeddings.weight"]
        looked_up = 0 if self._head is embedding else embedding.nbytes
        return sum(weight.nbytes for weight in self._weights.values()) - looked_up

    @property
    def resident(self) -> int:
        """As `Engine.resident`."""
        return sum(weight.nbytes for weight in (*self._weights.values(), *self._a))

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
    def step(self, tokens: Tensor, state: Tensor) -> Tensor:
        """As `Engine.step`."""
        # One by one: a matrix product of several rows rounds otherwise than one of each alone.
        rows = [self._logits(self._read(tokens[i : i + 1], state[i])) for i in range(len(tokens))]
        return torch.cat(rows) if rows else torch.empty(0, self.vocabulary)

    def _read(self, tokens: Tensor, state: Tensor) -> Tensor:
        """(L,) tokens -> (L, d_model) after the last layer; the state (state_size,) is advanced."""
        hidden = F.embedding(tokens, self._weights["backbone.embeddings.weight"])
        mixer = self._mamba2 if self._dual else self._mamba1
        parts = state.split(self._sizes)
        for layer, (conv, scan) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
            x = self._norm(hidden, self._of(layer, "norm.weight"))
            channels = len(self._of(layer, "mixer.conv1d.weight"))
            hidden = hidden + mixer(layer, x, conv.view(self._past, channels), scan)
        return hidden

    def _mamba1(self, layer: int, x: Tensor, conv: Tensor, scan: Tensor) -> Tensor:
        """(L, d_model), normalised -> (L, d_model); `conv` and `scan` are the layer's parts of the state."""
        u, z = self._linear(layer, "in_proj", x).chunk(2, dim=-1)
        u = self._convolve(layer, u, conv)
        states = int(self._config.state_size)
        widths = [int(self._config.time_step_rank), states, states]
        step, b, c = self._linear(layer, "x_proj", u).split(widths, dim=-1)
        if (epsilon := mixer_epsilon(self._config)) is not None:  # FalconMamba
            step, b, c = (_normalised(part, epsilon) for part in (step, b, c))
        delta = F.softplus(self._linear(layer, "dt_proj", step))
        skip, a = self._of(layer, "mixer.D"), self._a[layer]
        start = scan.view(a.shape)[None]
        y, last = kernels.selective_scan(u[None], delta[None], a, b[None], c[None], skip, z[None], start)
        scan.copy_(last.flatten())
        return self._linear(layer, "out_proj", y[0])

    def _mamba2(self, layer: int, x: Tensor, conv: Tensor, scan: Tensor) -> Tensor:
        """As `_mamba1`; the recurrence of Dao & Gu, arXiv 2405.21060, with one decay a head."""
        size, a, skip = heads(self._config), self._a[layer], self._of(layer, "mixer.D")
        z, mixed, step = self._linear(layer, "in_proj", x).split([size.inner, size.mixed, size.heads], dim=-1)
        widths = [size.inner, size.groups * size.states, size.groups * size.states]
        u, b, c = self._convolve(layer, mixed, conv).split(widths, dim=-1)
        u = u.unflatten(-1, (size.heads, size.channels))  # (L, H, P)
        shared = size.heads // size.groups
        b, c = (t.unflatten(-1, (size.groups, -1)).repeat_interleave(shared, 1) for t in (b, c))  # (L, H, N)
        if f"backbone.layers.{layer}.mixer.B_projection" in self._weights:
            maps = (self._of(layer, f"mixer.{name}") for name in projected.MATRICES)  # (G, r, N) each
            maps = (each.repeat_interleave(shared, 0) for each in maps)
            b, c = ((each @ part[..., None])[..., 0] for each, part in zip(maps, (b, c), strict=True))
        delta = F.softplus(step + self._of(layer, "mixer.dt_bias")).clamp(*limits(self._config))  # (L, H)
        h, rows = scan.view(size.heads, size.channels, -1), []
        for t in range(len(x)):
            decay = torch.exp(delta[t] * a)[:, None, None]
            h.copy_(decay * h + (delta[t, :, None] * u[t])[:, :, None] * b[t, :, None])
            rows.append((h * c[t, :, None]).sum(-1) + skip[:, None] * u[t])
        y = torch.stack(rows).flatten(1) * F.silu(z)
        y = _normalised(y.unflatten(-1, (size.groups, -1)), self._config.layer_norm_epsilon).flatten(1)
        return self._linear(layer, "out_proj", y * self._of(layer, "mixer.norm.weight"))

    def _convolve(self, layer: int, x: Tensor, before: Tensor) -> Tensor:
        """(L, M) after convolution and SiLU; `before` (K-1, M) is advanced."""
        seen = torch.cat([before, x])
        weight = self._of(layer, "mixer.conv1d.weight")[:, 0]
        bias = self._weights.get(f"backbone.layers.{layer}.mixer.conv1d.bias")
        x = kernels.causal_conv1d(x[None], weight, bias, before[None], silu=True)[0]
        before.copy_(seen[len(seen) - self._past :])
        return x

    def _linear(self, layer: int, name: str, x: Tensor) -> Tensor:
        prefix = f"backbone.layers.{layer}.mixer.{name}"
        return F.linear(x, self._weights[f"{prefix}.weight"], self._weights.get(f"{prefix}.bias"))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight * _normalised(x, self._config.layer_norm_epsilon)

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(self._norm(hidden, self._weights["backbone.norm_f.weight"]), self._head)


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
