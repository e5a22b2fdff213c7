"""Checkpoints of hybrids, whose files have other names than `state_dict()`: read, refused, written alike."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_tokenizer
from pico_hybrids import FAMILIES, VARIANTS, pico_hybrid
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsessm import checkpoint
from sparsessm.checkpoint import files, stock_names
from sparsessm.checkpoint.reading import Checkpoint

MIXTURES = {
    "jamba": "model.layers.1.feed_forward.experts.2.up_proj.weight",
    "nemotron_h": "backbone.layers.1.mixer.experts.2.down_proj.weight",
    "granitemoehybrid": "model.layers.1.block_sparse_moe.input_linear.weight",
}
"""A tensor of each that is named otherwise, or part of another one, in memory."""
IN_MEMORY = {
    "jamba": "model.layers.1.feed_forward.experts.gate_up_proj",
    "nemotron_h": "model.layers.1.mixer.experts.down_proj",
    "granitemoehybrid": "model.layers.1.block_sparse_moe.experts.gate_up_proj",
}
TOKENS = torch.arange(40).reshape(2, 20) % 64
STEPS = re.compile(r"A_log|\.D$|dt_bias|norm")


def write(folder: Path, model: PreTrainedModel, **how: Any) -> Path:
    """A directory that stock code wrote."""
    model.save_pretrained(folder, **how)
    pico_tokenizer().save_pretrained(folder)
    return folder


def write_in_memory_names(folder: Path, model: PreTrainedModel) -> Path:
    """What releases of stock code wrote that knew the fused tensors, but not how to take them apart."""
    return write(folder, model, save_original_format=False)


def tensors(folder: Path) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        held |= load_file(file)
    return held


def assert_same_files(left: Path, right: Path) -> None:
    """The same tensors: names, dtypes, shapes, bits."""
    held, other = tensors(left), tensors(right)
    assert held.keys() == other.keys()
    for name, value in held.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def assert_same_model(left: PreTrainedModel, right: PreTrainedModel) -> None:
    held, other = left.state_dict(), right.state_dict()
    assert held.keys() == other.keys()
    assert all(torch.equal(value.float(), other[name].float()) for name, value in held.items())


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    held = tensors(folder)
    change(held)
    save_file({name: value.contiguous() for name, value in held.items()}, folder / "model.safetensors")


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.load(folder)


def stock(folder: Path) -> PreTrainedModel:
    """The model as stock code reads it, every tensor of which is in the files."""
    told: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, found = told
    assert not any(found.values()), found
    return model


# ------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("size", ["50GB", "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_there_and_back(tmp_path: Path, name: str, size: str) -> None:
    model = pico_hybrid(name)
    write(tmp_path / "in", model, max_shard_size=size)
    assert (tmp_path / "in/model.safetensors").is_file() == (size == "50GB")
    came = checkpoint.load(tmp_path / "in")
    assert_same_model(came.model, model)
    assert came.stored.keys() <= model.state_dict().keys()
    assert set(came.stored.values()) == {torch.float32}
    checkpoint.save(came, tmp_path / "out")
    assert_same_files(tmp_path / "in", tmp_path / "out")
    assert_same_model(stock(tmp_path / "out"), model)


@pytest.mark.parametrize("name", ["olmo_hybrid", "kimi_linear"])
def test_a_convolution_in_parts_may_have_more_channels_than_there_are_tensors(
    tmp_path: Path, name: str
) -> None:
    """Files have one for queries, keys and values each; published models have thousands of channels."""
    field = {"olmo_hybrid": "linear_key_head_dim", "kimi_linear": "linear_head_dim"}[name]
    model = pico_hybrid(name, **{field: 64})
    write(tmp_path / "in", model)
    assert max(map(len, model.state_dict().values())) > 2 * len(tensors(tmp_path / "in"))
    came = checkpoint.load(tmp_path / "in")
    assert_same_model(came.model, model)
    checkpoint.save(came, tmp_path / "out")
    assert_same_files(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("name", FAMILIES)
def test_our_shards(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SHARD_BYTES", 5000)
    write(tmp_path / "in", pico_hybrid(name))
    checkpoint.save(checkpoint.load(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out/model.safetensors").exists()
    assert_same_files(tmp_path / "in", tmp_path / "out")
    assert_same_model(checkpoint.load(tmp_path / "out").model, stock(tmp_path / "out"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_made_in_memory_is_written_as_stock_code_does(tmp_path: Path, name: str) -> None:
    model = pico_hybrid(name)
    write(tmp_path / "stock", model)
    made = Checkpoint(model, pico_tokenizer(), "memory", "transformers", {}, None)
    checkpoint.save(made, tmp_path / "ours")
    assert_same_files(tmp_path / "stock", tmp_path / "ours")


@pytest.mark.parametrize("name", FAMILIES)
def test_each_tensor_keeps_its_dtype(tmp_path: Path, name: str) -> None:
    def mix(held: dict[str, Tensor]) -> None:
        for tensor in held:
            if not STEPS.search(tensor):
                held[tensor] = held[tensor].bfloat16()

    edit(write(tmp_path / "in", pico_hybrid(name)), mix)
    came = checkpoint.load(tmp_path / "in")
    assert came.model.dtype == torch.float32
    for tensor, dtype in came.stored.items():
        assert dtype == (torch.float32 if STEPS.search(tensor) else torch.bfloat16), tensor
    checkpoint.save(came, tmp_path / "out")
    assert_same_files(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("name", ["jamba", "nemotron_h"])
def test_experts_of_different_dtypes_take_the_most_precise(tmp_path: Path, name: str) -> None:
    one = MIXTURES[name]
    edit(
        write(tmp_path / "in", pico_hybrid(name).bfloat16()),
        lambda held: held.update({one: held[one].float()}),
    )
    came = checkpoint.load(tmp_path / "in")
    fused = IN_MEMORY[name]
    assert {tensor for tensor, dtype in came.stored.items() if dtype == torch.float32} == {fused}
    checkpoint.save(came, tmp_path / "out")
    before, after = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    assert (
        before.keys() == after.keys()
        and len({key for key in after if after[key].dtype != before[key].dtype}) > 2
    )
    assert all(torch.equal(after[key].float(), value.float()) for key, value in before.items())


@pytest.mark.parametrize("name", MIXTURES)
def test_a_bin_file(tmp_path: Path, name: str) -> None:
    model = pico_hybrid(name)
    write(tmp_path / "in", model)
    torch.save(tensors(tmp_path / "in"), tmp_path / "in/pytorch_model.bin")
    (tmp_path / "in/model.safetensors").rename(tmp_path / "before.safetensors")
    came = checkpoint.load(tmp_path / "in")
    assert_same_model(came.model, model)
    checkpoint.save(came, tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == load_file(tmp_path / "before.safetensors").keys()


@pytest.mark.parametrize("name", MIXTURES)
def test_names_as_in_memory(tmp_path: Path, name: str) -> None:
    """They are read because stock code reads them, and written again for the same reason."""
    model = pico_hybrid(name)
    write_in_memory_names(tmp_path / "in", model)
    assert tensors(tmp_path / "in").keys() == model.state_dict().keys()
    assert_same_model(stock(tmp_path / "in"), model)
    came = checkpoint.load(tmp_path / "in")
    assert_same_model(came.model, model)
    checkpoint.save(came, tmp_path / "out")
    assert_same_files(tmp_path / "in", tmp_path / "out")
    assert_same_model(stock(tmp_path / "out"), model)
    edit(tmp_path / "in", lambda held: held.pop(IN_MEMORY[name]))
    refused(tmp_path / "in", f"missing tensors: {re.escape(IN_MEMORY[name])}$")


@pytest.mark.parametrize("name", ["zamba2", "zamba2-two-blocks"])
def test_a_shared_block_is_stored_once(tmp_path: Path, name: str) -> None:
    """Under either of its names; a second copy may be there if it is equal."""
    model = pico_hybrid(name)
    write(tmp_path / "in", model)
    last = max(i for i, kind in enumerate(model.config.layers_block_type) if kind == "hybrid")
    copies = [key for key in model.state_dict() if f"layers.{last}.shared" in key and "adapter" not in key]
    held = tensors(tmp_path / "in")
    assert copies and not held.keys() & set(copies)
    ties: dict[int, list[str]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        ties.setdefault(id(value), []).append(key)
    first = {keys[-1]: keys[0] for keys in ties.values() if keys[-1] in copies}
    assert first.keys() == set(copies)
    edit(tmp_path / "in", lambda held: held.update({copy: held.pop(first[copy]) for copy in copies}))
    came = checkpoint.load(tmp_path / "in")
    assert_same_model(came.model, model)
    checkpoint.save(came, tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == held.keys()
    edit(tmp_path / "in", lambda held: held.update({first[copies[0]]: held[copies[0]] + 1}))
    refused(tmp_path / "in", rf"{re.escape(copies[0])} differs from .*, although config\.json ties the two")


# ------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("name", MIXTURES)
def test_faults_are_told_by_the_name_in_the_file(tmp_path: Path, name: str) -> None:
    one, folder = MIXTURES[name], write(tmp_path / "in", pico_hybrid(name))
    whole = tensors(folder)
    edit(folder, lambda held: (held.pop(one), held.update({"stray": torch.zeros(2)})))
    refused(folder, rf"missing tensors: {re.escape(one)}; tensors the model does not have: stray$")
    edit(folder, lambda held: (held.pop("stray"), held.update({one: whole[one][..., :-1]})))
    expected = re.escape(str(tuple(whole[one].shape)))
    refused(folder, rf"config\.json: wrong shapes: {re.escape(one)} \(.*\), expected {expected}$")
    edit(folder, lambda held: held.update({one: whole[one] * torch.nan}))
    refused(folder, rf"config\.json: NaN or Inf in: {re.escape(one)}$")
    edit(folder, lambda held: held.update({one: whole[one]}))
    checkpoint.load(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(folder, r"model\.safetensors: truncated")


@pytest.mark.parametrize("name", ["jamba", "nemotron_h"])
def test_another_number_of_experts(tmp_path: Path, name: str) -> None:
    key = {"jamba": "num_experts", "nemotron_h": "n_routed_experts"}[name]
    folder = write(tmp_path / "in", pico_hybrid(name))
    edit_config(folder, **{key: 3})
    extra = re.escape(MIXTURES[name].replace("experts.2", "experts.3"))
    refused(folder, rf"tensors the model does not have: (\S+, )*{extra}.*wrong shapes: ")
    edit_config(folder, **{key: 5})
    missing = re.escape(MIXTURES[name].replace("experts.2", "experts.4"))
    refused(folder, rf"missing tensors: (\S+, )*{missing}.*wrong shapes: ")


def test_more_experts_than_could_be_there_are_not_looked_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", pico_hybrid("jamba"))
    edit_config(folder, num_experts=2**24)
    refused(folder, rf"missing tensors: {re.escape(IN_MEMORY['jamba'])}")


def test_a_tensor_under_both_names(tmp_path: Path) -> None:
    model = pico_hybrid("jamba")
    fused = IN_MEMORY["jamba"]
    edit(write(tmp_path / "in", model), lambda held: held.update({fused: model.state_dict()[fused]}))
    refused(tmp_path / "in", r"tensors the model does not have: (\S+, )+\S+experts\.\d.* and 3 more$")


@pytest.mark.parametrize("name", FAMILIES)
def test_more_layers_than_tensors(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "in", pico_hybrid(name))
    fields: dict[str, Any] = {"num_hidden_layers": 10**6}
    if name == "nemotron_h":
        fields = {"layers_block_type": ["mlp"] * 10**5}
    edit_config(folder, **fields)
    refused(folder, r"config\.json: it has 10+ layers, but there are only \d+ tensors$")


def test_a_value_that_the_dtype_on_disk_does_not_have(tmp_path: Path) -> None:
    came = checkpoint.load(write(tmp_path / "in", pico_hybrid("jamba").half()))
    with torch.no_grad():
        came.model.get_parameter(IN_MEMORY["jamba"])[2, -1, 0] = 1e6
    with pytest.raises(ValueError, match=rf"{re.escape(MIXTURES['jamba'])} has NaN or Inf values in"):
        checkpoint.save(came, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_and_unpacked(tmp_path: Path, name: str) -> None:
    model = pico_hybrid(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter[..., ::2] = 0
    write(tmp_path / "in", model)
    checkpoint.pack(tmp_path / "in", tmp_path / "packed")
    assert_same_model(checkpoint.load(tmp_path / "packed").model, model)
    checkpoint.unpack(tmp_path / "packed", tmp_path / "out")
    assert_same_files(tmp_path / "in", tmp_path / "out")


def test_a_release_with_the_names_on_disk_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico_hybrid("nemotron_h")
    name, tensor = next(iter(model.state_dict().items()))
    assert stock_names.in_files(model, name, tensor).keys() == {name.replace("model.", "backbone.")}
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    assert stock_names.in_files(model, name, tensor) == {name: tensor}
