"""Whole blocks: what a model without them is, and which go."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from forward import logits_of
from lively import TOKENS, falcon, loss, mamba, mamba2, ordered, stock, without
from stock import difference
from torch import Tensor, nn
from transcription import block_influence

from sparsessm.architectures import adapt
from sparsessm.calibration.loss import losses
from sparsessm.pruning import blocks
from sparsessm.pruning.units import shrink


@pytest.mark.parametrize("make", [mamba, falcon, mamba2])
@pytest.mark.parametrize("gone", [[0], [4], [2, 0], [0, 0, 0, 0], [3, 1]])
def test_a_dropped_block_is_an_entry_less_in_the_list_of_layers(
    make: Callable[..., Any], gone: list[int]
) -> None:
    model = make(num_hidden_layers=5, tie_word_embeddings=False)
    left = copy.deepcopy(model)
    stored = {name: (name, 0) for name in model.state_dict()}  # anything that says where it was
    architecture = adapt(model, stored)  # pyright: ignore[reportArgumentType]
    numbers = list(range(5))
    for index in gone:
        architecture.drop(index)
        del left.backbone.layers[index]
        del numbers[index]
    left.config.num_hidden_layers = len(numbers)
    assert torch.equal(stock(model), stock(left))
    assert difference(logits_of(architecture, TOKENS), stock(left)) <= 2e-5
    assert model.config.num_hidden_layers == len(numbers) == len(architecture.blocks)
    for now, block in enumerate(architecture.blocks):
        layer = model.backbone.layers[now]
        assert block.layer is layer and block.index == now and layer.mixer.layer_idx == now
        assert block.name == f"backbone.layers.{now}" and {target.layer for target in block.targets} == {now}
    want = {
        name.replace(f"layers.{was}.", f"layers.{now}."): (name, 0)
        for now, was in enumerate(numbers)
        for name in stored
        if f"layers.{was}." in name
    } | {name: value for name, value in stored.items() if "layers." not in name}
    assert dict(architecture.stored) == want and want.keys() == model.state_dict().keys()
    for target in architecture.targets:
        assert target.stored == want[target.name], "each target rounds to the dtype of its own weights"
    assert architecture.tail.index == len(numbers)


@pytest.mark.parametrize("make", [mamba, falcon, mamba2])
def test_a_model_without_some_blocks_generates_with_a_cache(make: Callable[..., Any]) -> None:
    """A layer number that did not move up would read another layer's state."""
    model = make(num_hidden_layers=4)
    architecture = adapt(model)
    architecture.drop(2)
    architecture.drop(0)
    fed = TOKENS[:2, :9]
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    how["attention_mask"] = torch.ones_like(fed)  # or token 0 would be taken for padding
    cached, plain = (model.generate(fed, use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached, plain) and cached.shape == (2, 17)
    for _ in range(3):  # greedy, by hand
        fed = torch.cat([fed, stock(model, fed)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached[:, :12], fed)


def test_the_head_s_layer_number_moves_up_with_the_blocks() -> None:
    architecture = adapt(mamba())
    architecture.drop(0)
    assert architecture.tail.targets[0].layer == architecture.tail.index == 1


def speaking(model: Any) -> tuple[Any, Tensor]:
    """A model of five blocks that add much or little to the stream, and text that it knows: its own."""
    with torch.no_grad():
        for layer, size in zip(model.backbone.layers, (20.0, 1e-2, 10.0, 1.0, 1e-3), strict=True):
            layer.mixer.out_proj.weight *= size
        model.backbone.norm_f.weight *= 4
    tokens = torch.randint(0, 64, (300, 1), generator=torch.Generator().manual_seed(3))  # several groups
    for _ in range(16):
        tokens = torch.cat([tokens, stock(model, tokens)[:, -1:].argmax(-1)], 1)
    return model, tokens


@pytest.mark.parametrize("make", [mamba, falcon, mamba2])
def test_blocks_go_by_the_stock_loss_without_them(make: Callable[..., Any]) -> None:
    """Greedy, as if all single removals from what is left were tried, where blocks differ as trained ones."""
    model, tokens = speaking(make(num_hidden_layers=5))
    gone: list[int] = []
    for _ in range(2):
        costs = {i: loss(without(model, [*gone, i]), tokens) for i in range(5) if i not in gone}
        gone.append(min(costs, key=lambda i: costs[i]))
    architecture = adapt(copy.deepcopy(model))
    wanted = ordered(architecture, pattern="structured:block", sparsity=0.4, repair="none")
    shrink(architecture, wanted, tokens)
    want = without(model, gone)
    got = architecture.model.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.state_dict().items())
    assert torch.equal(stock(architecture.model), stock(want))
    for index, cost in costs.items():
        assert blocks._loss_without(adapt(model), tokens, [gone[0], index]) == pytest.approx(cost, rel=1e-5)
    for index, cost in blocks._each_alone(adapt(model), tokens)[1].items():
        assert cost == pytest.approx(loss(without(model, [index]), tokens), rel=1e-5)
    assert float(losses(adapt(model), tokens).mean()) == pytest.approx(loss(model, tokens))


def test_a_block_that_cannot_win_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks' costs are set far apart, so that after the first turn one question a turn is enough."""
    model, tokens = speaking(mamba(num_hidden_layers=5))
    asked: list[list[int]] = []
    before = blocks._loss_without

    def counted(architecture: Any, tokens: Tensor, gone: Sequence[int]) -> float:
        asked.append(sorted(gone))
        return before(architecture, tokens, gone)

    monkeypatch.setattr(blocks, "_loss_without", counted)
    architecture = adapt(model)
    wanted = ordered(architecture, pattern="structured:block", sparsity=0.6, repair="none")
    gone = blocks.chosen_blocks(architecture, wanted, tokens, None)
    assert set(gone) == {1, 3, 4}
    assert len(asked) < 1 + 4 + 3, "the dense model, then not all that are left in two more turns"


def test_blocks_go_by_how_little_they_turn_the_dense_stream() -> None:
    model = mamba(num_hidden_layers=6)
    costs = {}

    def hook(number: int) -> Callable[..., None]:
        def hear(module: nn.Module, args: Any, out: Any) -> None:
            new = out[0] if isinstance(out, tuple) else out
            costs[number] = block_influence(*(x.double().flatten(0, 1).numpy() for x in (args[0], new)))

        return hear

    heard = copy.deepcopy(model)
    for number, layer in enumerate(heard.backbone.layers):
        layer.register_forward_hook(hook(number))
    stock(heard)
    architecture = adapt(copy.deepcopy(model))
    shrink(
        architecture,
        ordered(architecture, pattern="structured:block", method="cosine", repair="none"),
        TOKENS,
    )
    gone = sorted(costs, key=lambda i: costs[i])[:3]
    assert torch.equal(stock(architecture.model), stock(without(model, gone)))


def test_blocks_and_units_together() -> None:
    model = mamba(num_hidden_layers=4)
    architecture = adapt(model)
    wanted = ordered(architecture, pattern="structured:state=0.5,channel=0.5,block=0.25")
    rows = shrink(architecture, wanted, TOKENS)
    assert [row.family for row in rows] == ["block", *["channel", "state"] * 3]
    assert len({row.layer for row in rows[1:]}) == 3, "named after the layers of the dense model"
    assert len(architecture.blocks) == 3
    for block in architecture.blocks:
        assert {one.name: one.size for one in block.axes} == {"state": 4, "channel": 16}
    config = architecture.model.config
    assert (config.state_size, config.intermediate_size, config.num_hidden_layers) == (4, 16, 3)
    assert difference(logits_of(architecture, TOKENS), stock(model)) <= 1e-5
