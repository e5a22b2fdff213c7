"""Runs of a recipe on a pico model, and what changed in it."""

from __future__ import annotations

from typing import Any

import torch
from pico import pico_mamba
from planned import prune
from torch import Tensor

from sparsessm.architectures import adapt
from sparsessm.methods import entry_methods
from sparsessm.recipe.recipe import Recipe
from sparsessm.report.record import Report

METHODS = entry_methods()
TOKENS = torch.randint(0, 64, (4, 40), generator=torch.Generator().manual_seed(0))
FEW = TOKENS[:2, :24]
SSM = [name for name, method in METHODS.items() if "ssm" in method.families]
LINEAR = [name for name, method in METHODS.items() if "projections" in method.families]
KINDS = ("in_proj", "x_proj", "dt_proj", "out_proj")
LAYER = "backbone.layers.{}.mixer.{}"


def run(
    model: Any, tokens: Tensor | None = TOKENS, stored: dict[str, torch.dtype] | None = None, **fields: Any
) -> Report:
    recipe = Recipe(**fields).resolved(model="pico", trained_length=40)
    return prune(adapt(model, stored), recipe, tokens)


def run_ssm(model: Any, tokens: Tensor | None = TOKENS, **fields: Any) -> Report:
    """As the papers do it: A_log, the same share of every layer."""
    return run(model, tokens, **{"target": "ssm", "allocation": "uniform", **fields})


def tensors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: Any) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def uneven() -> Any:
    model = pico_mamba()
    with torch.no_grad():
        model.backbone.layers[1].mixer.out_proj.weight.mul_(20)
    return model


def inputs_of_layers(model: Any) -> dict[str, Tensor]:
    """Parameter name -> inputs (in, tokens) in the stock forward, of conv1d (windows, channels, tokens).

    What the stock mixer does not call as a module (dt_proj, conv1d) follows from what it does call.
    """
    found: dict[str, Tensor] = {}
    hooks = []
    for layer, block in enumerate(model.backbone.layers):
        for kind in ("in_proj", "x_proj", "out_proj"):

            def keep(_: Any, args: Any, name: str = LAYER.format(layer, kind)) -> None:
                found[name] = args[0].double()  # (W, T, in)

            hooks.append(getattr(block.mixer, kind).register_forward_pre_hook(keep))
    with torch.inference_mode():
        model(TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer, block in enumerate(model.backbone.layers):
        mixer = block.mixer
        step = found[LAYER.format(layer, "x_proj")] @ mixer.x_proj.weight.detach().double().T
        found[LAYER.format(layer, "dt_proj")] = step[..., : mixer.time_step_rank]
    flat = {f"{name}.weight": x.flatten(0, 1).T for name, x in found.items()}
    for layer, block in enumerate(model.backbone.layers):
        x = found[LAYER.format(layer, "in_proj")] @ block.mixer.in_proj.weight.detach().double().T
        flat[LAYER.format(layer, "conv1d.weight")] = x.chunk(2, -1)[0].transpose(1, 2)
    return flat
