"""Whole units out of a model: what is left computes what the full model computes with those units masked, in
the STOCK forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forward import logits_of
from lively import FOUR, ODD, TOKENS, TWO, falcon, mamba, mamba2, name_of, stock
from silenced import drawn, silence, take_out
from stock import difference
from transformers import AutoModelForCausalLM

from sparsessm.architectures import adapt
from sparsessm.architectures.axes import cut

BIASES: list[dict[str, Any]] = [
    {},
    {"use_bias": True, "use_conv_bias": True},
    {"use_bias": True, "use_conv_bias": False},
    {"use_conv_bias": False, "conv_kernel": 2},
]
# Half the channels of heads of 6 in a stream of 12: 12 heads x 3 = 36
ODD2 = {"hidden_size": 12, "expand": 6, "num_heads": 12, "head_dim": 6, "state_size": 3, "n_groups": 3}
CASES: list[tuple[Callable[..., Any], dict[str, Any], str, int]] = [
    (mamba, {}, "state", 5),
    (mamba, ODD, "state", 1),
    (mamba, {}, "channel", 16),
    (mamba, ODD, "channel", 5),
    (mamba, {"tie_word_embeddings": False, "hidden_size": 8}, "channel", 1),
    (falcon, {}, "state", 5),
    (falcon, ODD, "state", 1),
    (falcon, {}, "channel", 16),
    (falcon, ODD, "channel", 5),
    (mamba2, {}, "state", 5),
    (mamba2, TWO, "state", 3),
    (mamba2, FOUR, "state", 1),
    (mamba2, {}, "head", 4),
    (mamba2, TWO, "head", 1),
    (mamba2, TWO, "head", 3),
    (mamba2, FOUR, "head", 1),
    (mamba2, {}, "channel", 4),
    (mamba2, TWO, "channel", 2),
    (mamba2, FOUR, "channel", 6),
    (mamba2, ODD2, "head", 2),
    (mamba2, ODD2, "channel", 3),
    (mamba2, ODD2, "state", 2),
]


@pytest.mark.parametrize("biases", BIASES, ids=name_of)
@pytest.mark.parametrize(("make", "shapes", "axis", "size"), CASES, ids=name_of)
def test_a_smaller_model_is_the_full_one_with_units_silenced(
    make: Callable[..., Any], shapes: dict[str, Any], axis: str, size: int, biases: dict[str, Any]
) -> None:
    full = make(**shapes, **biases)
    small = copy.deepcopy(full)
    architecture = adapt(small)
    keeps = drawn(architecture, axis, size)
    dense = stock(full)
    for layer, masks in zip(full.backbone.layers, keeps, strict=True):
        silence(layer.mixer, axis, masks)
    take_out(architecture, axis, size, keeps)
    want, got = stock(full), stock(small)
    assert difference(want, dense) > 1e-2, "units that nobody hears prove nothing"
    assert difference(got, want) <= 1e-5
    assert difference(logits_of(architecture, TOKENS), got) <= 1e-5
    assert difference(logits_of(adapt(small), TOKENS), got) <= 1e-5
    anew = type(small)(copy.deepcopy(small.config)).eval()
    anew.load_state_dict(small.state_dict())
    assert torch.equal(stock(anew), got)


@pytest.mark.parametrize(
    ("make", "shapes", "axis", "size"), [CASES[i] for i in (0, 3, 8, 10, 12, 17)], ids=name_of
)
def test_a_smaller_model_comes_back_from_its_files(
    make: Callable[..., Any], shapes: dict[str, Any], axis: str, size: int, tmp_path: Path
) -> None:
    """By stock code alone: the configuration in the file says all shapes."""
    model = make(**shapes)
    architecture = adapt(model)
    take_out(architecture, axis, size, drawn(architecture, axis, size))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(stock(loaded), stock(model))


@pytest.mark.parametrize(
    ("make", "shapes", "sizes"),
    [
        (mamba, {}, {"channel": 16, "state": 3}),
        (falcon, ODD, {"state": 2, "channel": 7}),
        (mamba2, TWO, {"head": 2, "state": 3}),
        (mamba2, TWO, {"channel": 4, "state": 3, "head": 2}),
        (mamba2, {**FOUR, "hidden_size": 8, "expand": 8}, {"channel": 6, "head": 1, "state": 1}),
    ],
    ids=name_of,
)
def test_several_axes_one_after_the_other(
    make: Callable[..., Any], shapes: dict[str, Any], sizes: dict[str, int]
) -> None:
    full = make(**shapes, use_bias=True)
    small = copy.deepcopy(full)
    architecture, reference = adapt(small), adapt(full)
    for seed, (axis, size) in enumerate(sizes.items()):
        every = drawn(reference, axis, size, seed)  # in the numbers of the full model
        for layer, masks in zip(full.backbone.layers, every, strict=True):
            silence(layer.mixer, axis, masks)
        here = [
            masks[: sum(one.name == axis for one in block.axes)]
            for block, masks in zip(architecture.blocks, every, strict=True)
        ]
        take_out(architecture, axis, size, here)
    if "channel" in sizes and "head" in sizes:
        assert list(sizes).index("channel") < list(sizes).index("head"), "heads take their channels along"
    assert difference(stock(small), stock(full)) <= 1e-5
    assert difference(logits_of(architecture, TOKENS), stock(small)) <= 1e-5
    anew = type(small)(copy.deepcopy(small.config)).eval()
    anew.load_state_dict(small.state_dict())
    assert torch.equal(stock(anew), stock(small))


def test_cutting_leaves_the_tensors_given_alone() -> None:
    model = mamba()
    architecture = adapt(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    block = architecture.blocks[0]
    axes = [one for one in block.axes if one.name == "state"]
    smaller = cut(block.layer.state_dict(), axes, [torch.arange(8) % 2 == 0])
    assert smaller["mixer.x_proj.weight"].shape == (3 + 8, 32)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    copied = block.copy()
    architecture.resize(block, {"state_size": 4}, smaller)
    assert copied.axes[0].size == 8 and model.config.state_size == 8, "the config waits for settle"


def test_a_new_layer_draws_nothing_from_the_global_generator() -> None:
    architecture = adapt(mamba())
    before = torch.get_rng_state()
    take_out(architecture, "state", 2, drawn(architecture, "state", 2))
    assert torch.equal(torch.get_rng_state(), before)
    layer = architecture.blocks[0].layer
    assert not layer.training and all(
        parameter.requires_grad == architecture.blocks[1].layer.mixer.D.requires_grad
        for parameter in layer.parameters()
    )
