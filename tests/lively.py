"""Models of every family whose mixers are heard, and what tests of whole units ask of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2
from stock import stock_logits
from torch import Tensor, nn
from torch.nn import functional as F

from sparsessm.architectures import Architecture
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.sizes import order

TOKENS = torch.randint(0, 64, (4, 21), generator=torch.Generator().manual_seed(0))


def lively(model: Any) -> Any:
    """Weights of size one: pico models hardly hear their mixers, and a mask would hardly show."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.backbone.layers.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if "proj.weight" in name:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif "conv1d" in name:
                parameter.copy_(0.5 * noise)
            elif "A_log" not in name:
                parameter.add_(0.3 * noise)
    return model


def mamba(**how: Any) -> Any:
    return lively(pico_mamba(time_step_rank=3, **how))


def falcon(**how: Any) -> Any:
    return lively(pico_falcon_mamba(time_step_rank=3, **how))


def mamba2(**how: Any) -> Any:
    """8 heads of 8 channels: 4 x 16 channels, of which halves and quarters may stay."""
    shapes = {"num_heads": 8, "head_dim": 8, "expand": 4, "n_groups": 1}
    return lively(pico_mamba2(**{**shapes, **how}))


def stock(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    return stock_logits(model, tokens)


ODD = {"hidden_size": 12, "expand": 3, "state_size": 7}
TWO = {"n_groups": 2}
FOUR = {"n_groups": 4, "state_size": 5}


def name_of(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{name}={one}" for name, one in value.items()) or "plain"
    return getattr(value, "__name__", str(value))


def ordered(architecture: Architecture, **recipe: Any) -> Any:
    return order(Recipe(**recipe), architecture)


def norms(mixer: Any, axis: str) -> list[Tensor]:
    """Squared norm of each unit's rows and columns in all matrices, of each axis."""
    w = {name: value.detach().double() for name, value in mixer.named_parameters()}
    conv = w["conv1d.weight"][:, 0].square().sum(1)
    if not hasattr(mixer, "num_heads"):
        channels, states = w["A_log"].shape
        if axis == "state":
            B, C = w["x_proj.weight"][-2 * states : -states], w["x_proj.weight"][-states:]
            return [B.square().sum(1) + C.square().sum(1) + w["A_log"].square().sum(0)]
        x, z = w["in_proj.weight"].square().sum(1).split(channels)
        matrices = w["dt_proj.weight"].square().sum(1) + w["A_log"].square().sum(1)
        columns = w["x_proj.weight"].square().sum(0) + w["out_proj.weight"].square().sum(0)
        return [x + z + conv + matrices + columns]
    D, GN, H = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size, mixer.num_heads
    z, x, B, C, dt = w["in_proj.weight"].square().sum(1).split([D, D, GN, GN, H])
    conv_x, conv_B, conv_C = conv.split([D, GN, GN])
    if axis == "state":
        return list((B + C + conv_B + conv_C).split(mixer.ssm_state_size))
    channel = z + x + conv_x + w["out_proj.weight"].square().sum(0)
    if axis == "channel":
        return list(channel.split(D // H))
    return list((channel.unflatten(0, (H, -1)).sum(1) + dt).split(H // mixer.n_groups))


def heard(model: Any, layer: int, module: str = "out_proj", tokens: Tensor = TOKENS) -> Tensor:
    """(tokens, in) float64: what the stock forward feeds a linear layer."""
    inputs: list[Tensor] = []
    linear = model.backbone.layers[layer].mixer.get_submodule(module)
    hook = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    stock(model, tokens)
    hook.remove()
    return inputs[0].flatten(0, 1).double()


def loss(model: Any, tokens: Tensor) -> float:
    rows = stock(model, tokens)[:, :-1].flatten(0, 1)
    return float(F.cross_entropy(rows.double(), tokens[:, 1:].flatten()))


def without(model: Any, gone: Sequence[int]) -> Any:
    left = copy.deepcopy(model)
    left.backbone.layers = nn.ModuleList(
        layer for index, layer in enumerate(left.backbone.layers) if index not in gone
    )
    return left
