"""Hybrids with a block that is used twice, with smaller mixers, with a layer less: still stock models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from forward import logits_of
from hybrids import blocks_of, hybrid, shared_targets
from pico_hybrids import FAMILIES
from stock import TOKENS, assert_same, stock_logits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsessm.architectures import Block
from sparsessm.architectures.hybrid import Hybrid
from sparsessm.calibration import slabs
from sparsessm.calibration.walk import walk
from sparsessm.methods.observers import InputGram, InputNorm


def test_a_shared_matrix_is_one_target_and_says_who_uses_it() -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
    shared = shared_targets(hybrid("zamba2"))
    assert [(target.kind, target.layer, target.uses) for target in shared] == [
        (kind, 1, (1, 3)) for kind in names
    ]
    two = shared_targets(hybrid("zamba2-two-blocks"))
    assert [target.uses for target in two] == [(1, 3)] * 6 + [(2, 4)] * 6
    assert not shared_targets(hybrid("zamba2-no-adapters"))  # untied words untie these too in stock code
    for name in FAMILIES.keys() - {"zamba2"}:
        assert not shared_targets(hybrid(name))


@pytest.mark.parametrize("name", ["zamba2", "zamba2-two-blocks"])
@pytest.mark.parametrize("width", [7, 37])
def test_all_uses_of_a_shared_matrix_are_seen(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "LONGEST", width)
    architecture = hybrid(name)
    inputs: dict[str, list[Tensor]] = {}
    handles = []
    for module in architecture.model.modules():
        if isinstance(module, nn.Linear):

            def hook(module: Any, args: Any, key: int = module.weight.data_ptr()) -> None:
                inputs.setdefault(str(key), []).append(args[0].flatten(0, 1).double())

            handles.append(module.register_forward_pre_hook(hook))
    stock_logits(architecture.model)
    for handle in handles:
        handle.remove()
    shared = shared_targets(architecture)
    for stop in walk(architecture, TOKENS):
        for target in (target for target in shared if target.uses[0] == stop.block.index):
            before = stop.hidden.clone()
            x = inputs[str(target.parameter.data_ptr())]
            assert len(x) == len(target.uses)
            rows = torch.cat(x)
            for observer in (InputGram(), InputGram(paired=True), InputNorm()):
                seen = stop.look(target, observer)
                want = rows.mT @ rows / len(rows)
                assert_same(seen.gram, want.diagonal() if seen.diagonal else want)
                if seen.cross is not None:
                    assert_same(seen.cross, want)
            assert torch.equal(stop.hidden, before)


def stock_again(model: PreTrainedModel, folder: Path) -> nn.Module:
    """What stock code reads from what stock code writes."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def parts_beyond(block: Block, axis: str, size: int) -> dict[tuple[str, int], list[int]]:
    """(tensor, dim) -> the positions there that belong to units from `size` on."""
    gone: dict[tuple[str, int], list[int]] = {}
    for units in (a for a in block.axes if a.name == axis):
        for unit in range(size, units.size):
            for part in units.parts:
                start = part.start + unit * part.width
                gone.setdefault((part.tensor, part.dim), []).extend(range(start, start + part.width))
    return gone


def shrink(architecture: Hybrid, axis: str, size: int) -> dict[str, Any]:
    """Take the units from `size` on out of all layers; returns the fields of the new shape."""
    fields = architecture.fields({axis: size})
    for block in blocks_of(architecture):
        tensors = {key: tensor.clone() for key, tensor in block.layer.state_dict().items()}
        for (name, dim), units in parts_beyond(block, axis, size).items():
            keep = [i for i in range(tensors[name].shape[dim]) if i not in units]
            tensors[name] = tensors[name].index_select(dim, torch.tensor(keep))
        if not block.axes:
            continue
        made = architecture.resize(block, fields, tensors)
        assert made is architecture.blocks[block.index]
        assert {a.size for a in made.axes if a.name == axis} == {size}
        assert [t.name for t in made.targets] == [t.name for t in block.targets]
    return fields


@pytest.mark.parametrize("axis", ["state", "head", "channel"])
@pytest.mark.parametrize("name", [*FAMILIES, "falcon_h1-normed-after", "zamba2-two-blocks", "bamba-biased"])
def test_smaller_mixers_are_stock_models(name: str, axis: str, tmp_path: Path) -> None:
    architecture = hybrid(name)
    if axis not in architecture.structure:
        return
    sizes = architecture.sizes(axis)
    if not sizes:
        with pytest.raises(ValueError, match="takes multiples of hidden_size 16 only"):
            architecture.fields({axis: 1})
        return
    shared = [(target.name, target.uses) for target in shared_targets(architecture)]
    architecture.settle(shrink(architecture, axis, sizes[-1]))
    assert [(target.name, target.uses) for target in shared_targets(architecture)] == shared
    model: Any = architecture.model
    want = stock_logits(model)
    assert_same(logits_of(architecture, TOKENS), want)
    assert_same(stock_logits(stock_again(model, tmp_path)), want, 1e-6)


# What makes units silent: tensors that write or read them. (A norm over all channels would notice some gone.)
SILENCED: Mapping[str, tuple[str, ...]] = {
    "state": ("in_proj.weight", "in_proj.bias", "conv1d.bias"),
    "head": ("out_proj.weight",),
    "channel": ("out_proj.weight", "x_proj.weight"),
}


@pytest.mark.parametrize(
    ("name", "axis"),
    [("falcon_h1", "head"), ("falcon_h1", "channel"), ("jamba", "channel")]
    + [(name, "state") for name in ("bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2")]
    + [("bamba-biased", "state")],
)
def test_units_that_do_nothing_can_be_taken_out(name: str, axis: str) -> None:
    """The axes name all places of a unit, and only those: without silent units nothing changes."""
    architecture = hybrid(name)
    size = architecture.sizes(axis)[-1]
    for block in blocks_of(architecture):
        held = block.layer.state_dict()
        for (tensor, dim), units in parts_beyond(block, axis, size).items():
            if tensor.endswith(SILENCED[axis]):
                held[tensor].index_fill_(dim, torch.tensor(units), 0.0)
    want = logits_of(architecture, TOKENS)
    shrink(architecture, axis, size)
    assert_same(logits_of(architecture, TOKENS), want)


def test_no_layer_goes_where_every_second_one_has_experts() -> None:
    """Those behind it would change their kind."""
    assert hybrid("qwen3_next").structure == ("block",)
    architecture = hybrid("qwen3_next", decoder_sparse_step=2)
    assert architecture.structure == ()
    with pytest.raises(ValueError, match="no layer of a Qwen3Next model can be left out"):
        architecture.drop(0)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("jamba", "zamba2")])
def test_a_layer_less_is_a_stock_model(name: str, tmp_path: Path) -> None:
    architecture = hybrid(name)
    model: Any = architecture.model
    with torch.inference_mode():
        hidden = architecture.embed(TOKENS)
        for block in architecture.blocks[1:]:
            out, _ = block.forward(hidden)
            assert out is not None
            hidden = out
        want = architecture.head(hidden)
    count = len(architecture.blocks)
    architecture.drop(0)
    assert [block.index for block in architecture.blocks] == list(range(count - 1))
    assert architecture.tail.index == architecture.tail.targets[0].layer == count - 1
    assert_same(logits_of(architecture, TOKENS), want)
    assert_same(stock_logits(model), want)
    with torch.inference_mode():  # the numbers of the layers count in a cache
        assert_same(model(TOKENS, use_cache=True).logits, want)
    assert_same(stock_logits(stock_again(model, tmp_path)), want, 1e-6)


@pytest.mark.parametrize("name", ["jamba", "zamba2"])  # numbers say what a layer is; layers share weights
def test_layers_that_the_configuration_cannot_leave_out_are_refused(name: str) -> None:
    architecture = hybrid(name)
    assert "block" not in architecture.structure
    with pytest.raises(
        ValueError, match=f"no layer of a {type(architecture).__name__} model can be left out"
    ):
        architecture.drop(0)
    assert len(architecture.blocks) == 4 and architecture.model.config.num_hidden_layers == 4
