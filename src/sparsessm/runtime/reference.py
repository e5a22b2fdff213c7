"""The definition of the runtime: a Mamba read token by token in plain PyTorch. Slow, and the truth of tests.

Place in the flow: an `Engine` (base.py). It is what runs where the native extension is missing, and what
tests compare the native engine with. The same computation as transformers' `MambaForCausalLM` in float32,
with the state in one tensor; letters as in `architectures/base.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsessm.kernels import reference as kernels
from sparsessm.runtime.base import fingerprint, refuse_unsupported

SLAB = 512  # tokens of a prompt that are in memory together
ORDER = "layer, [inputs of the convolution (K-1, D), oldest first; scan (D, N)]"


class ReferenceEngine:
    """A model in float32, one sequence at a time.

    The state of a sequence holds, layer after layer, the last K - 1 inputs of the convolution (K-1, D) and
    the state of the scan (D, N).
    """

    def __init__(self, config: Any, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a stock model.

        Args:
            config: a `transformers.MambaConfig`, or an object with its attributes.
            weights: tensors of any floating dtype under the names of `MambaForCausalLM.state_dict()`;
                `lm_head.weight` may be missing where it is tied to the embedding.

        Raises:
            ValueError: an activation other than SiLU, a tensor that is missing or of a wrong shape.
        """
        refuse_unsupported(config)
        shapes = expected_shapes(config)
        if missing := [name for name in shapes if name not in weights]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"the weights have no {missing[0]}{more}")
        for name, shape in shapes.items():
            if tuple(weights[name].shape) != shape:
                raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, expected {shape}")
        self._weights = {name: weights[name].detach().to("cpu", torch.float32) for name in shapes}
        self._head = self._weights.get("lm_head.weight", self._weights["backbone.embeddings.weight"])
        self._config, self._past = config, int(config.conv_kernel) - 1
        self._layers, self._channels = int(config.num_hidden_layers), int(config.intermediate_size)
        self._a = [-torch.exp(self._of(layer, "mixer.A_log")) for layer in range(self._layers)]
        self._sizes = (self._past * self._channels, self._channels * int(config.state_size))
        self.vocabulary = int(config.vocab_size)
        self.state_size = self._layers * sum(self._sizes)
        self.layout = fingerprint(config, self._weights, ORDER)

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
        for layer, carried in enumerate(state.view(self._layers, -1)):
            hidden = hidden + self._mixer(layer, self._norm(hidden, self._of(layer, "norm.weight")), carried)
        return hidden

    def _mixer(self, layer: int, x: Tensor, carried: Tensor) -> Tensor:
        """(L, d_model), normalised -> (L, d_model); `carried` is the layer's part of the state."""
        conv, scan = carried.split(self._sizes)
        conv, scan = conv.view(self._past, self._channels), scan.view(self._channels, -1)
        u, z = self._linear(layer, "in_proj", x).chunk(2, dim=-1)
        seen = torch.cat([conv, u])
        weight = self._of(layer, "mixer.conv1d.weight")[:, 0]
        bias = self._weights.get(f"backbone.layers.{layer}.mixer.conv1d.bias")
        u = kernels.causal_conv1d(u[None], weight, bias, conv[None], silu=True)
        conv.copy_(seen[len(seen) - self._past :])
        states = int(self._config.state_size)
        widths = [int(self._config.time_step_rank), states, states]
        step, b, c = self._linear(layer, "x_proj", u).split(widths, dim=-1)
        delta = F.softplus(self._linear(layer, "dt_proj", step))
        skip = self._of(layer, "mixer.D")
        y, last = kernels.selective_scan(u, delta, self._a[layer], b, c, skip, z[None], scan[None])
        scan.copy_(last[0])
        return self._linear(layer, "out_proj", y[0])

    def _linear(self, layer: int, name: str, x: Tensor) -> Tensor:
        prefix = f"backbone.layers.{layer}.mixer.{name}"
        return F.linear(x, self._weights[f"{prefix}.weight"], self._weights.get(f"{prefix}.bias"))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        power = x.pow(2).mean(-1, keepdim=True)
        return weight * (x * torch.rsqrt(power + self._config.layer_norm_epsilon))

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(self._norm(hidden, self._weights["backbone.norm_f.weight"]), self._head)


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Mamba of this configuration, by its stock name, and its shape.

    Args:
        config: a `transformers.MambaConfig`, or an object with its attributes.
    """
    model, inner, states = int(config.hidden_size), int(config.intermediate_size), int(config.state_size)
    rank, rows = int(config.time_step_rank), int(config.vocab_size)
    mixer: dict[str, tuple[int, ...]] = {
        "in_proj.weight": (2 * inner, model),
        "conv1d.weight": (inner, 1, int(config.conv_kernel)),
        "x_proj.weight": (rank + 2 * states, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "A_log": (inner, states),
        "D": (inner,),
        "out_proj.weight": (model, inner),
    }
    if config.use_conv_bias:
        mixer["conv1d.bias"] = (inner,)
    if config.use_bias:
        mixer |= {"in_proj.bias": (2 * inner,), "out_proj.bias": (model,)}
    shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (rows, model)}
    for layer in range(int(config.num_hidden_layers)):
        shapes[f"backbone.layers.{layer}.norm.weight"] = (model,)
        shapes |= {f"backbone.layers.{layer}.mixer.{name}": shape for name, shape in mixer.items()}
    shapes["backbone.norm_f.weight"] = (model,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (rows, model)
    return shapes
