"""Published models whose type transformers has: their `config.json` read, small ones of the same form pruned.

Those of the delta rule are in test_published.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused, run
from pico_hybrids import NEW
from published import BILLIONS, OLDER, PUBLISHED, WRAPPED
from published_small import SMALL, small_fields, write_published
from safetensors.torch import load_file, save_file
from stock import TOKENS, assert_same, stock_logits
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import sparsessm
from sparsessm import checkpoint, runtime
from sparsessm.architectures import MODEL_TYPES, adapt
from sparsessm.checkpoint.assembly import find_places, stock_model
from sparsessm.checkpoint.opened import stock_config
from sparsessm.checkpoint.stock_names import in_files

pytestmark = pytest.mark.skipif(not NEW, reason="the models of transformers 5")
AXES = [
    (name, axis) for name, fields in PUBLISHED.items() for axis in MODEL_TYPES[fields["model_type"]].structure
]


# What a config says of itself and of code, and fields that no stock class of these types has: other releases
# had them, or the training did, and stock code computes what they say anyway.
NAMES = {"_name_or_path", "architectures", "auto_map", "dtype"}
SAYS_NOTHING = set(
    "norm_before_gate rms_norm time_step_init_scheme time_step_scale rms_norm_eps norm_eps init_method n_ctx "
    "attention_head_dim normalization_function attn_layer_indices mamba_use_mlp attn_rotary_emb "
    "d_inner d_model n_layer numb_hidden_layers fused_add_norm pad_vocab_size_multiple ssm_cfg "
    "sliding_window calc_logits_for_entire_prompt mamba_inner_layernorms num_logits_to_keep".split()
)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("model*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_tensors(left: Path, right: Path) -> None:
    before, after = tensors(left), tensors(right)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


def stock(folder: Path) -> PreTrainedModel:
    """The model as stock code reads it, every tensor of which is in the files."""
    told: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    model, found = told
    assert not any(found.values()), found
    return model


def pruned(folder: Path, out: Path, **recipe: Any) -> checkpoint.Checkpoint:
    """Pruned and saved."""
    text = folder.parent / "text.txt"
    text.write_text(" ".join(f"a state {n} is kept" for n in range(400)))
    model = sparsessm.load(folder)
    few = {"data": str(text), "samples": 4, "length": 20, "measure": False}
    sparsessm.save(model, out, sparsessm.prune(model, **few, **recipe))
    return model


def assert_continues(folder: Path, model: PreTrainedModel) -> None:
    """The runtime's greedy continuation of a directory is that of a stock model."""
    ids = TOKENS[0, :20]
    answer = runtime.load(folder).generate(ids.tolist(), 12, ignore_eos=True).ids
    read = torch.cat([ids, torch.tensor(answer)])
    assert stock_logits(model, read[None])[0].argmax(1)[len(ids) - 1 : -1].tolist() == answer


def test_every_type_has_a_published_form() -> None:
    assert PUBLISHED.keys() == BILLIONS.keys() == SMALL.keys()
    kinds = {fields["model_type"] for fields in PUBLISHED.values()} | {*WRAPPED.values(), *OLDER}
    assert MODEL_TYPES.keys() - kinds == {"olmo_hybrid"}  # which has one form, that of transformers


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_as_stock_code_reads_it(name: str) -> None:
    """Every field that a stock model has; the model, built without memory, has as many parameters as its
    publisher tells, and its adapter finds its matrices."""
    fields = json.loads(json.dumps(PUBLISHED[name]))
    ours, theirs = stock_config(name, fields, False), CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    read, told = ours.to_dict(), theirs.to_dict()
    assert {key for key in told if read.get(key, told) != told[key]} <= NAMES | SAYS_NOTHING
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ours)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(BILLIONS[name] * 1e9, rel=0.02)
    targets = [*adapt(model).targets]
    assert {target.family for target in targets} >= {"ssm", "projections"}
    held = sum(target.matrix.numel() for target in targets if target.family == "projections")
    assert held > 0.5 * BILLIONS[name] * 1e9


DELTA = [kind for kind in MODEL_TYPES if kind in (*WRAPPED.values(), *OLDER, "olmo_hybrid")]


@pytest.mark.parametrize("name", [*PUBLISHED, *DELTA])
def test_the_tensors_of_the_full_size_are_found_in_its_files(name: str) -> None:
    """By the names that stock code gives them there. Of the delta rule four layers of the size that the stock
    class has by default: OLMo-Hybrid's convolution has more channels than there are names."""
    fields = PUBLISHED.get(name, {"model_type": name, "num_hidden_layers": 4})
    empty, expected, copies = stock_model(name, stock_config(name, json.loads(json.dumps(fields)), False))
    names = {part for key, tensor in expected.items() for part in in_files(empty, key, tensor)}
    places = find_places(empty, expected, copies, names)
    assert places.wanted.keys() == names and not places.extra


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_small_one_goes_out_as_it_came_and_no_code_is_run(name: str, tmp_path: Path) -> None:
    write_published(tmp_path / "in", name)
    shards = {path.name for path in (tmp_path / "in").glob("model-*")}
    assert shards == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    came = checkpoint.load(tmp_path / "in")
    assert torch.equal(stock_logits(came.model), stock_logits(stock(tmp_path / "in")))
    code = any(note.startswith("config.json names its own code (auto_map)") for note in came.notes)
    assert code == ("auto_map" in PUBLISHED[name])
    checkpoint.save(came, tmp_path / "out")
    assert_same_tensors(tmp_path / "in", tmp_path / "out")
    kept = [path.name for path in (tmp_path / "in").iterdir() if path.suffix in (".py", ".json")]
    kept.remove("model.safetensors.index.json")
    for file in kept:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "in" / file).read_bytes(), file
    assert sum(file.endswith(".py") for file in kept) == (2 if code else 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_run_of_a_small_one(name: str, tied: bool, tmp_path: Path) -> None:
    write_published(tmp_path / "in", name, tie_word_embeddings=tied)
    model = pruned(tmp_path / "in", tmp_path / "out", sparsity=0.5)
    assert torch.equal(stock_logits(stock(tmp_path / "out")), stock_logits(model.model))
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert told == json.loads(json.dumps(small_fields(name, tie_word_embeddings=tied)))
    shown = json.loads(run("inspect", str(tmp_path / "out"), "--json").stdout)
    assert shown["removed"] and shown["record"]["totals"]["projections"]["sparsity"] == pytest.approx(
        0.5, abs=0.01
    )
    assert_continues(tmp_path / "out", model.model)


@pytest.mark.parametrize(("name", "axis"), AXES)
def test_a_published_form_without_some_of_its_units(name: str, axis: str, tmp_path: Path) -> None:
    """The new sizes stand under the names that the file has, and stock code reads the result."""
    write_published(tmp_path / "in", name)
    layers = (
        len(small_fields(name).get("hybrid_override_pattern", "")) or small_fields(name)["num_hidden_layers"]
    )
    model = pruned(
        tmp_path / "in",
        tmp_path / "out",
        pattern=f"structured:{axis}",
        sparsity=1 / layers if axis == "block" else 0.5,
    )
    assert_same(stock_logits(stock(tmp_path / "out")), stock_logits(model.model))
    before, after = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("in", "out"))
    assert after.keys() - before.keys() <= {"layers_block_type", "expand"}
    assert {key for key in before if after[key] != before[key]}
    if "hybrid_override_pattern" in after and axis == "block":  # the older name says the same
        assert len(after["hybrid_override_pattern"]) == len(after["layers_block_type"]) == layers - 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_packed_one_runs_and_comes_back(name: str, tmp_path: Path) -> None:
    write_published(tmp_path / "in", name)
    checkpoint.pack(tmp_path / "in", tmp_path / "packed")
    assert_continues(tmp_path / "packed", stock(tmp_path / "in"))
    checkpoint.unpack(tmp_path / "packed", tmp_path / "out")
    assert_same_tensors(tmp_path / "in", tmp_path / "out")
    for file in ("config.json", *(path.name for path in (tmp_path / "in").glob("*.py"))):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "in" / file).read_bytes(), file


def test_newer_fields_of_nemotron_and_layers_for_drafting(tmp_path: Path) -> None:
    """As in Nemotron 3.5: kinds of layers by name, in the older words, and what drafts (of tests that quote
    it). A shorter model has a shorter list, and the layers for drafting as they came."""
    write_published(
        tmp_path / "in",
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        hybrid_override_pattern=None,
        layers_block_type=["mamba", "moe", "mamba", "attention", "mamba", "moe"],
        mtp_layers_block_type=["attention", "moe"],
        num_nextn_predict_layers=1,
        moe_latent_size=8,
    )
    drafts = {
        "mtp.layers.0.mixer.q_proj.weight": torch.ones(16, 16),
        "mtp.layers.1.norm.weight": torch.ones(16),
    }
    edit_shard(tmp_path / "in", **drafts)
    model = pruned(tmp_path / "in", tmp_path / "out", pattern="structured:block", sparsity=1 / 6)
    assert_same(stock_logits(stock(tmp_path / "out")), stock_logits(model.model))
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert told["num_hidden_layers"] == len(told["layers_block_type"]) == 5
    assert told["mtp_layers_block_type"] == ["attention", "moe"]
    assert all(torch.equal(tensors(tmp_path / "out")[name], value) for name, value in drafts.items())
    assert_continues(tmp_path / "out", model.model)


def edit_shard(folder: Path, **more: Tensor) -> None:
    """Tensors in the second shard and in the index that stock code wrote nothing of."""
    file, index = folder / "model-00002-of-00002.safetensors", folder / "model.safetensors.index.json"
    save_file({**load_file(file), **more}, file, {"format": "pt"})
    told = json.loads(index.read_text())
    told["weight_map"] |= dict.fromkeys(more, file.name)
    index.write_text(json.dumps(told))


EXTRA: Mapping[str, Mapping[str, Tensor]] = {
    # layers for drafting, and what older code kept of the positions
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": {"mtp.layers.0.eh_proj.weight": torch.ones(16, 32)},
    "ibm-ai-platform/Bamba-9B": {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(2)},
    "tiiuae/Falcon-H1-0.5B-Base": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
}


@pytest.mark.parametrize("name", EXTRA)
def test_tensors_that_stock_code_leaves_out_go_out_as_they_came(name: str, tmp_path: Path) -> None:
    write_published(tmp_path / "in", name)
    edit_shard(tmp_path / "in", **EXTRA[name])
    assert checkpoint.load(tmp_path / "in").extra.keys() == EXTRA[name].keys()
    pruned(tmp_path / "in", tmp_path / "out", sparsity=0.5, target="ssm", method="magnitude")
    after = tensors(tmp_path / "out")
    assert after.keys() == tensors(tmp_path / "in").keys()
    for key, tensor in EXTRA[name].items():
        assert torch.equal(after[key], tensor)


@pytest.mark.parametrize("name", ["ibm-granite/granite-4.0-h-tiny", "Zyphra/Zamba2-1.2B"])
def test_a_tensor_that_nobody_knows_is_named(name: str, tmp_path: Path) -> None:
    write_published(tmp_path / "in", name)
    edit_shard(tmp_path / "in", **{"model.layers.1.stray.weight": torch.ones(2)})
    line = refused("inspect", str(tmp_path / "in"))
    assert line.endswith("tensors the model does not have: model.layers.1.stray.weight")


@pytest.mark.parametrize("name", ["nvidia/Nemotron-H-8B-Base-8K", "ai21labs/Jamba-v0.1"])
def test_a_shard_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    write_published(tmp_path / "in", name)
    (tmp_path / "in/model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refused("inspect", str(tmp_path / "in"))


def test_fields_of_zamba2s_first_code_are_no_model_of_transformers(tmp_path: Path) -> None:
    """Before transformers had the type, its fields had other names (of the benchmark in mlstm_kernels). Stock
    code does not read them, and so neither do we: the shapes are told."""
    write_published(tmp_path / "in", "Zyphra/Zamba2-2.7B")
    fields = small_fields("Zyphra/Zamba2-2.7B")
    for now, once in {
        "mamba_d_state": "state_size",
        "mamba_d_conv": "conv_dimension",
        "mamba_expand": "expansion_factor",
        "intermediate_size": "ffn_hidden_size",
        "adapter_rank": "lora_rank",
    }.items():
        fields[once] = fields.pop(now)
    fields |= {"use_shared_attention_lora": False, "use_shared_block_lora": True, "ft_lora": False}
    (tmp_path / "in/config.json").write_text(json.dumps(fields))
    assert "its tensors do not fit config.json: wrong shapes: model.layers.0" in refused(
        "inspect", str(tmp_path / "in")
    )
