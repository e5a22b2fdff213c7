"""The Fisher of layer outputs against plain autograd on the stock model in float64; what it leaves behind."""

from __future__ import annotations

import gc
from itertools import groupby
from typing import Any

import pytest
import torch
from forward import logits_of
from pico import pico_mamba
from torch import Tensor, nn
from torch.nn import functional as F

from sparsessm import kernels
from sparsessm.architectures import adapt
from sparsessm.calibration import loss, prices
from sparsessm.calibration.prices import output_fisher, output_norms

TOKENS = torch.randint(0, 64, (3, 17), generator=torch.Generator().manual_seed(0))
HOOKED = ("in_proj", "x_proj", "out_proj")


def stock_fisher(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Mean squared gradients by autograd through transformers' own forward.

    It does not call dt_proj as a module, so its gradient g is solved for in W_dt^T g = gradient at the step
    part of x_proj's output: uniquely, the rank exceeds D in these models."""
    outputs: dict[str, Tensor] = {}
    hooks = []

    def watch(module: nn.Module, name: str) -> None:
        def keep(_: Any, __: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output
            outputs[name].retain_grad()

        hooks.append(module.register_forward_hook(keep))

    for i, block in enumerate(model.backbone.layers):
        watch(block, f"backbone.layers.{i}.mixer.A_log")
        for kind in HOOKED:
            watch(getattr(block.mixer, kind), f"backbone.layers.{i}.mixer.{kind}.weight")
    logits = model(tokens, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    grads = {name: output.grad for name, output in outputs.items() if output.grad is not None}
    assert grads.keys() == outputs.keys()
    for i, block in enumerate(model.backbone.layers):
        step = grads[f"backbone.layers.{i}.mixer.x_proj.weight"][..., : block.mixer.time_step_rank]
        weight = block.mixer.dt_proj.weight.detach()  # (D, rank)
        solved = torch.linalg.lstsq(weight.T, step.flatten(0, 1).T).solution.T  # (tokens, D)
        grads[f"backbone.layers.{i}.mixer.dt_proj.weight"] = solved
    return {name: grad.flatten(0, -2).square().mean(0) for name, grad in grads.items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, right in want.items():
        assert got[name].dtype == torch.float64 and got[name].shape == right.shape
        assert (got[name] - right).abs().max() <= tolerance * right.max(), name


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize(
    "overrides",
    [{}, {"use_bias": True, "use_conv_bias": False}, {"tie_word_embeddings": False}, {"num_hidden_layers": 1},
     {"state_size": 1, "conv_kernel": 1}],
)  # fmt: skip
def test_equals_autograd_on_the_stock_model(overrides: dict[str, Any], windows: int) -> None:
    model = pico_mamba(time_step_rank=64, **overrides).double()
    want = stock_fisher(model, TOKENS[:windows])
    architecture = adapt(model)
    got = output_fisher(architecture, TOKENS[:windows])
    assert_same(got, want, 1e-6)
    more = output_fisher(architecture, TOKENS[:windows], head=True)
    for name in more.keys() & got.keys():
        assert torch.equal(more[name], got[name])
    outer = [target.name for target in architecture.tail.targets]
    assert more.keys() - got.keys() == {*outer, prices.ALSO + outer[-1]}


@pytest.mark.parametrize("level", kernels.LEVELS)
def test_float32(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = output_fisher(adapt(pico_mamba().double()), TOKENS, head=True)
    monkeypatch.setattr(kernels, "LEVEL", level)
    assert_same(output_fisher(adapt(pico_mamba()), TOKENS, head=True), want, 1e-3)


def test_groups_and_rows_of_logits_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = adapt(pico_mamba().double())
    want = output_fisher(architecture, TOKENS, head=True)
    alone = [output_fisher(architecture, window[None]) for window in TOKENS]
    mean = {name: torch.stack([one[name] for one in alone]).mean(0) for name in alone[0]}
    assert_same(mean, {name: want[name] for name in mean}, 1e-6)  # the stock norm computes in float32
    monkeypatch.setattr(prices, "ROWS", 34)  # two windows, then one
    monkeypatch.setattr(loss, "ROWS", 5)
    assert_same(output_fisher(architecture, TOKENS, head=True), want, 1e-6)


def test_the_order_is_that_of_the_model() -> None:
    architecture = adapt(pico_mamba())
    names = [target.name for target in architecture.targets if target.kind != "conv1d"]
    assert list(output_fisher(architecture, TOKENS, head=True)) == [*names, prices.ALSO + names[-1]]


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_is_left_behind(mode: Any) -> None:
    model = pico_mamba()
    model.backbone.layers[0].mixer.D.requires_grad_(False)
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    architecture = adapt(model)
    before = logits_of(architecture, TOKENS)
    want = output_fisher(adapt(pico_mamba()), TOKENS)
    with mode():
        found = output_fisher(architecture, TOKENS.clone())
    assert_same(found, want, 1e-12)
    assert not any(values.requires_grad for values in found.values())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == learning
    assert hooks_of(model) == 0
    assert torch.equal(logits_of(architecture, TOKENS), before)
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is Tensor and x.grad_fn is not None]


def test_what_is_not_finite_is_refused_and_everything_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico_mamba()
    architecture = adapt(model)
    block = architecture.blocks[1]
    forward = block.forward

    def infinite_slope(hidden: Tensor, *args: Any) -> tuple[Tensor, Any]:
        out, state = forward(hidden, *args)
        assert out is not None
        return out + torch.sqrt(hidden * 0), state

    with monkeypatch.context() as patch:
        patch.setattr(block, "forward", infinite_slope)
        with pytest.raises(
            ValueError, match=r"^backbone\.layers\.1: the gradient at its input is not finite"
        ):
            output_fisher(architecture, TOKENS)
    with torch.no_grad():
        model.backbone.layers[0].mixer.out_proj.weight[3, 5] = torch.inf
    with pytest.raises(ValueError, match=r"^backbone\.layers\.0: the output is not finite"):
        output_fisher(architecture, TOKENS)
    assert hooks_of(model) == 0
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("shape", [(17,), (0, 17), (2, 1)])
def test_windows_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="output_fisher needs windows of shape"):
        output_fisher(adapt(pico_mamba()), torch.zeros(shape, dtype=torch.int64))


def test_progress() -> None:
    seen: list[tuple[str, int, int, str]] = []
    output_fisher(adapt(pico_mamba()), TOKENS, lambda *step: seen.append(step))
    assert list(dict.fromkeys(step[:3] for step in seen)) == [("fisher", done, 4) for done in range(5)]
    places = ["block 1 of 2", "block 2 of 2", "head"]
    assert [place for place, _ in groupby(step[3] for step in seen)] == [*places, *places[1::-1]]


def test_norms_by_hand() -> None:
    """The squared length of what a unit error writes if everything in between passes it on as it is."""
    model = pico_mamba()
    architecture = adapt(model)
    norms = output_norms(architecture)
    mixer = model.backbone.layers[1].mixer
    out, step = mixer.out_proj.weight.detach().double(), mixer.dt_proj.weight.detach().double()
    prefix, channels, rank = "backbone.layers.1.mixer.", 32, mixer.time_step_rank
    torch.testing.assert_close(norms[f"{prefix}dt_proj.weight"][7], (out[:, 7] ** 2).sum())
    torch.testing.assert_close(norms[f"{prefix}in_proj.weight"][channels + 7], (out[:, 7] ** 2).sum())
    expected = sum((out[:, d] * step[d, 0]).square().sum() for d in range(channels))
    torch.testing.assert_close(norms[f"{prefix}x_proj.weight"][0], expected)
    torch.testing.assert_close(norms[f"{prefix}x_proj.weight"][rank:], expected.expand(16))  # rank is 1
    assert (norms[f"{prefix}A_log"] == 1).all() and (norms[f"{prefix}out_proj.weight"] == 1).all()
    fisher = output_fisher(architecture, TOKENS)
    assert norms.keys() - {f"backbone.layers.{i}.mixer.conv1d.weight" for i in range(2)} == fisher.keys()
    assert all(norms[name].shape == values.shape for name, values in fisher.items())
