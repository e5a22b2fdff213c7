"""The stock forward of a model: its logits, and what each of its modules is fed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS = torch.randint(0, 64, (3, 37), generator=torch.Generator().manual_seed(0))
Inputs = dict[tuple[int, str], Tensor]


@torch.inference_mode()
def stock_logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    """Of windows (W, L), without a cache: (W, L, vocabulary)."""
    return model(tokens, use_cache=False).logits


def assert_same(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def difference(got: Tensor, want: Tensor) -> float:
    """The largest, relative to the largest number wanted."""
    return float((got - want).abs().max() / want.abs().max())


def stock_inputs(model: Any, tokens: Tensor) -> Inputs:
    """(layer, kind) -> float64 inputs (W, L, in), conv1d (W, L, D, K), by hooks on transformers' modules.

    The stock forward calls neither dt_proj nor conv1d as a module: their inputs are rows of what x_proj and
    in_proj put out. (layer, "block") is what enters a block, the head is in layer -1."""
    seen: Inputs = {}
    hooks = []

    def watch(module: nn.Module, key: tuple[int, str], output: bool = False) -> None:
        def keep(_: Any, given: Any, made: Any) -> None:
            seen[key] = (made if output else given[0]).double()

        hooks.append(module.register_forward_hook(keep))

    for i, layer in enumerate(model.backbone.layers):
        watch(layer, (i, "block"))
        for kind in ("in_proj", "x_proj", "out_proj"):
            watch(getattr(layer.mixer, kind), (i, kind))
        watch(layer.mixer.in_proj, (i, "conv1d"), output=True)
        watch(layer.mixer.x_proj, (i, "dt_proj"), output=True)
    watch(model.lm_head, (-1, "lm_head"))
    with torch.inference_mode():
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    for i, layer in enumerate(model.backbone.layers):
        channels, width = layer.mixer.intermediate_size, layer.mixer.conv_kernel_size
        padded = F.pad(seen[i, "conv1d"][..., :channels], (0, 0, width - 1, 0))
        seen[i, "conv1d"] = torch.stack([padded[:, k : k + tokens.shape[1]] for k in range(width)], -1)
        seen[i, "dt_proj"] = seen[i, "dt_proj"][..., : layer.mixer.time_step_rank]
    return seen
