"""What cannot be read as a checkpoint is refused, and what is wrong is named; nothing in it is executed."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import write_original, write_stock
from pico import pico_mamba, pico_mamba2
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Mamba2Config

from sparsessm import checkpoint
from sparsessm.checkpoint import state_spaces

LAYER = "backbone.layers.1.mixer"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_missing_and_extra_tensors(folder: Path) -> None:
    edit(folder, lambda t: (t.pop(f"{LAYER}.D"), t.update({"stray": torch.zeros(2)})))
    expected = rf"missing tensors: {LAYER}\.D; tensors the model does not have: stray$"
    with pytest.raises(ValueError, match=expected):
        checkpoint.load(folder)


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    edit(folder, lambda t: [t.pop(name) for name in list(t) if "layers.0" in name])
    with pytest.raises(ValueError, match=r"missing tensors: (\S+, ){4}\S+ and 5 more$"):
        checkpoint.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite(folder: Path, value: float, dtype: torch.dtype) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        spoilt = tensors[f"{LAYER}.in_proj.weight"].to(dtype)
        spoilt[3, 2] = value
        tensors[f"{LAYER}.in_proj.weight"] = spoilt

    edit(folder, spoil)
    with pytest.raises(ValueError, match=rf"NaN or Inf in: {LAYER}\.in_proj\.weight$"):
        checkpoint.load(folder)


def test_wrong_shape(folder: Path) -> None:
    edit(folder, lambda t: t.update({f"{LAYER}.A_log": torch.zeros(32, 4)}))
    with pytest.raises(ValueError, match=rf"wrong shapes: {LAYER}\.A_log \(32, 4\), expected \(32, 8\)$"):
        checkpoint.load(folder)


def test_two_different_copies_of_a_tied_head(folder: Path) -> None:
    edit(folder, lambda t: t.update({"lm_head.weight": torch.zeros(64, 16)}))
    with pytest.raises(
        ValueError, match=r"lm_head\.weight differs from backbone\.embeddings\.weight, although"
    ):
        checkpoint.load(folder)


def test_two_different_embeddings(folder: Path) -> None:
    edit(folder, lambda t: t.update({"backbone.embedding.weight": torch.zeros(64, 16)}))
    with pytest.raises(ValueError, match=r"two different tensors for backbone\.embeddings\.weight, under"):
        checkpoint.load(folder)


def test_a_tied_pair_that_is_missing_or_not_finite(folder: Path) -> None:
    edit(folder, lambda t: t.update({"lm_head.weight": torch.full((64, 16), torch.nan)}))
    with pytest.raises(ValueError, match=r"config\.json: NaN or Inf in: lm_head\.weight$"):
        checkpoint.load(folder)
    edit(folder, lambda t: (t.pop("lm_head.weight"), t.pop("backbone.embeddings.weight")))
    with pytest.raises(ValueError, match=r"config\.json: missing tensors: backbone\.embeddings\.weight$"):
        checkpoint.load(folder)


def test_an_untied_head_is_not_the_embedding(tmp_path: Path) -> None:
    write_stock(tmp_path / "in", tie_word_embeddings=False)
    edit(tmp_path / "in", lambda t: t.pop("backbone.embeddings.weight"))
    with pytest.raises(ValueError, match=r"missing tensors: backbone\.embeddings\.weight$"):
        checkpoint.load(tmp_path / "in")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_truncation_at_any_byte(folder: Path, file: str) -> None:
    if file == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / file)
        (folder / "model.safetensors").unlink()
    whole = (folder / file).read_bytes()
    for length in (0, 1, 7, 8, 9, 100, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        (folder / file).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{re.escape(file)}: (truncated|not a file of plain)"):
            checkpoint.load(folder)


@pytest.mark.parametrize("where", [0, 8, 60])
def test_a_corrupt_header(folder: Path, where: int) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[where : where + 8] = b"\xff" * 8
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or not a safetensors file"):
        checkpoint.load(folder)


class Hostile:
    """Unpickling this creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("layout", ["transformers", "state-spaces"])
def test_a_hostile_pickle_is_not_executed(tmp_path: Path, form: str, layout: str) -> None:
    folder, trace = tmp_path / "in", tmp_path / "executed"
    if layout == "transformers":
        write_stock(folder)
        (folder / "model.safetensors").unlink()
    else:
        write_original(folder, pico_mamba())
    content = {"backbone.norm_f.weight": torch.ones(16), "x": Hostile(trace)}
    if form == "bare":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content["x"]))
    else:
        torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin: not a file of plain tensors; refused, nothing in it was"
    ):
        checkpoint.load(folder)
    assert not trace.exists()
    pickle.loads(pickle.dumps(content["x"]))  # the trap does work
    assert trace.exists()


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"a": 3}, {3: torch.zeros(2)}])
def test_a_bin_of_something_else(tmp_path: Path, content: object) -> None:
    write_original(tmp_path / "in", pico_mamba())
    torch.save(content, tmp_path / "in/pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin: expected a (tensor|dictionary of tensors), got"
    ):
        checkpoint.load(tmp_path / "in")


@pytest.mark.parametrize("named", ["absent.safetensors", "../in/model.safetensors", "/etc/passwd"])
def test_an_index_that_names_other_files(folder: Path, named: str) -> None:
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), named)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=rf"names files that are not beside it: {re.escape(named)}$"):
        checkpoint.load(folder)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    for name in "ab":
        (folder / f"{name}.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    weight_map = {"x": "a.safetensors", "y": "b.safetensors"}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"b\.safetensors: tensor \S+ is in more than one shard"):
        checkpoint.load(folder)


def test_an_index_without_a_map(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        checkpoint.load(folder)


def test_a_directory_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors or pytorch_model\.bin in "):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/at/all", r"no such directory: 'nowhere/at/all'"),
        ("./nowhere", r"no such directory: '\./nowhere'"),
        ("builtin:pycod", r"unknown built-in model 'pycod'; known: "),
    ],
)
def test_a_source_that_is_not_there(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.load(source)


def test_a_file_or_an_empty_directory_as_source(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a file; give the directory of the checkpoint"):
        checkpoint.load(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no config\.json in .*: not a checkpoint directory"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff\xfe"])
def test_a_config_that_is_not_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"config\.json: (not readable as JSON|expected a JSON object, got list)"
    ):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "no adapter for model_type 'gpt2'; supported: .*mamba"),
        ({"model_type": None}, "no adapter for model_type None"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantised"),
        ({"hidden_size": "wide"}, r"config\.json"),
        ({"hidden_size": -3}, r"config\.json: hidden_size is -3; allowed: a whole number from 0 to"),
        ({"num_hidden_layers": 3}, r"missing tensors: backbone\.layers\.2\..* and 5 more"),
    ],
)
def test_a_config_that_does_not_fit(folder: Path, fields: dict[str, object], message: str) -> None:
    edit_config(folder, **fields)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(folder)


def test_tokenizers_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no tokenizer: no such directory: '\./absent'; tokenizer= \(--tokenizer\)"
    ):
        checkpoint.load(folder, tokenizer="./absent")
    with pytest.raises(ValueError, match=r"config\.json: not a tokenizer\.json"):
        checkpoint.load(folder, tokenizer=folder / "config.json")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="the tokenizer in .* cannot be read"):
        checkpoint.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer in .*; name one with tokenizer= \(--tokenizer\)"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"ssm_cfg": {"layer": "Mamba3"}},
            r"ssm_cfg\.layer is 'Mamba3'; supported in this format: M",
        ),
        ({"ssm_cfg": {"layer": ["Mamba2"]}}, r"ssm_cfg\.layer is \['Mamba2'\]; supported"),
        ({"ssm_cfg": {"headdim": 8}}, r"unknown field ssm_cfg\.headdim; known: .*d_state"),
        ({"ssm_cfg": {"expand": 0.01}}, r"ssm_cfg\.expand must give at least one channel, got 0\.01"),
        ({"ssm_cfg": {"expand": float("inf")}}, r"ssm_cfg\.expand must give at least one channel, got inf"),
        ({"ssm_cfg": {"expand": -1.5}}, r"ssm_cfg\.expand must give at least one channel, got -1\.5"),
        ({"ssm_cfg": {"expand": "2"}}, r"ssm_cfg\.expand must be a whole number of at least 1, got '2'"),
        ({"ssm_cfg": {"d_stat": 8}}, r"unknown field ssm_cfg\.d_stat; known: .*d_state"),
        ({"ssm_cfg": {"d_state": 0}}, r"ssm_cfg\.d_state must be a whole number of at least 1, got 0"),
        ({"ssm_cfg": [1]}, "ssm_cfg must be an object"),
        ({"rms_norm": False}, "rms_norm is false"),
        ({"tie_embeddings": "yes"}, "tie_embeddings must be true or false, got 'yes'"),
        ({"d_intermediate": 64}, "d_intermediate is 64; only models with no MLP layers"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\]; only models with no attention layers"),
        ({"colour": "red"}, "unknown field colour"),
    ],
)
def test_original_configs_that_are_something_else(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    write_original(tmp_path / "in", pico_mamba(), **fields)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        checkpoint.load(tmp_path / "in")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {},
            r"ssm_cfg: 32 channels \(expand \* d_model\) do not divide into heads of headdim 64 in 1 groups",
        ),
        (
            {"headdim": 8, "ngroups": 3},
            "ssm_cfg: 32 channels .* do not divide into heads of headdim 8 in 3 groups",
        ),
        ({"D_has_hdim": True}, r"ssm_cfg\.D_has_hdim is true; only models with one D for each head are"),
        ({"rmsnorm": False}, r"ssm_cfg\.rmsnorm is false; only models with a norm behind the scan are"),
        ({"norm_before_gate": True}, r"ssm_cfg\.norm_before_gate is true; only models with the gate before"),
        ({"norm_before_gate": 1}, r"ssm_cfg\.norm_before_gate must be true or false, got 1"),
        ({"d_ssm": 16}, r"ssm_cfg\.d_ssm is 16; only models that scan all 32 channels are"),
        ({"expand": 2.0}, r"ssm_cfg\.expand must be a whole number of at least 1, got 2\.0"),
        (
            {"headdim": 8, "dt_limit": [1, 0]},
            r"ssm_cfg\.dt_limit must be two numbers, .* first, got \[1, 0\]",
        ),
        ({"headdim": 8, "dt_limit": 3}, r"ssm_cfg\.dt_limit must be two numbers, the lower one first, got 3"),
        ({"dt_rank": 1}, r"unknown field ssm_cfg\.dt_rank; known: .*headdim"),
    ],
)
def test_original_mamba_2_configs_that_are_something_else(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    write_original(tmp_path / "in", pico_mamba2(), ssm_cfg={"layer": "Mamba2"} | fields)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        checkpoint.load(tmp_path / "in")


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin", "legacy bin", "state-spaces"])
def test_a_billion_layers(tmp_path: Path, form: str) -> None:
    """Refused by the head of the weights: nothing of that size is built, not even a list."""
    folder, file = tmp_path / "in", tmp_path / "in/model.safetensors"
    if form == "state-spaces":
        write_original(folder, pico_mamba(), n_layer=10**9)
    else:
        model = write_stock(folder)
        edit_config(folder, num_hidden_layers=10**9)
        tensors = load_file(file)
        if form != "safetensors":
            file.unlink()
        if form == "shards":
            model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
            for path in [*(tmp_path / "shards").glob("model*")]:
                path.rename(folder / path.name)
        elif form != "safetensors":
            new = form == "bin"
            torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    count = 23 if form == "state-spaces" else 22  # both names of the tied pair, or one
    with pytest.raises(
        ValueError, match=rf"config\.json: it has 1000000000 layers, but there are only {count} tensors$"
    ):
        checkpoint.load(folder)


def test_a_foreign_model_is_not_looked_into(folder: Path) -> None:
    edit_config(folder, model_type="gpt2", num_hidden_layers=10**9)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="no adapter for model_type 'gpt2'"):
        checkpoint.load(folder)


def test_the_defaults_of_the_original_config() -> None:
    fields = state_spaces.settings({"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}})
    assert fields["vocab_size"] == 50280 and fields["state_size"] == 16 and fields["time_step_rank"] == "auto"
    assert state_spaces.settings({"d_model": 8, "n_layer": 1, "vocab_size": 5})["vocab_size"] == 8


def test_the_config_of_a_published_mamba_2() -> None:
    published = {
        "d_model": 768,
        "d_intermediate": 0,
        "n_layer": 24,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }
    assert state_spaces.is_original(published) and state_spaces.model_type(published) == "mamba2"
    config = Mamba2Config(**state_spaces.settings(published))
    assert (config.num_heads, config.head_dim, config.n_groups, config.state_size) == (24, 64, 1, 128)
    assert (config.vocab_size, config.chunk_size, config.conv_kernel) == (50288, 256, 4)
    assert list(config.time_step_limit) == [0.0, float("inf")] and config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)
