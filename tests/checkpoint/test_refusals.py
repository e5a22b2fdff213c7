"""Checkpoints: what `load` and `save` refuse, by name, and what a save that fails leaves behind (nothing)."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_mamba, pico_mamba2, pico_tokenizer
from safetensors.torch import load_file, save_file
from test_checkpoint import logits, names, run, write_original, write_stock
from torch import Tensor
from transformers import Mamba2Config

from sparsessm import checkpoint
from sparsessm.checkpoint import atomic, state_spaces
from sparsessm.checkpoint.reading import Checkpoint

LAYER = "backbone.layers.1.mixer"


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    write_stock(tmp_path / "in")
    return tmp_path / "in"


@pytest.fixture
def loaded(stock: Path) -> Checkpoint:
    return checkpoint.load(stock)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


# ------------------------------------------------------------------------------------------ reading


def test_missing_and_extra_tensors(stock: Path) -> None:
    edit(stock, lambda t: (t.pop(f"{LAYER}.D"), t.update({"stray": torch.zeros(2)})))
    expected = rf"missing tensors: {LAYER}\.D; tensors the model does not have: stray$"
    with pytest.raises(ValueError, match=expected):
        checkpoint.load(stock)


def test_many_missing_tensors_are_counted(stock: Path) -> None:
    edit(stock, lambda t: [t.pop(name) for name in list(t) if "layers.0" in name])
    with pytest.raises(ValueError, match=r"missing tensors: (\S+, ){4}\S+ and 5 more$"):
        checkpoint.load(stock)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite(stock: Path, value: float, dtype: torch.dtype) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        spoilt = tensors[f"{LAYER}.in_proj.weight"].to(dtype)
        spoilt[3, 2] = value
        tensors[f"{LAYER}.in_proj.weight"] = spoilt

    edit(stock, spoil)
    with pytest.raises(ValueError, match=rf"NaN or Inf in: {LAYER}\.in_proj\.weight$"):
        checkpoint.load(stock)


def test_wrong_shape(stock: Path) -> None:
    edit(stock, lambda t: t.update({f"{LAYER}.A_log": torch.zeros(32, 4)}))
    with pytest.raises(ValueError, match=rf"wrong shapes: {LAYER}\.A_log \(32, 4\), expected \(32, 8\)$"):
        checkpoint.load(stock)


def test_two_different_copies_of_a_tied_head(stock: Path) -> None:
    edit(stock, lambda t: t.update({"lm_head.weight": torch.zeros(64, 16)}))
    with pytest.raises(
        ValueError, match=r"lm_head\.weight differs from backbone\.embeddings\.weight, although"
    ):
        checkpoint.load(stock)


def test_two_different_embeddings(stock: Path) -> None:
    edit(stock, lambda t: t.update({"backbone.embedding.weight": torch.zeros(64, 16)}))
    with pytest.raises(ValueError, match=r"two different tensors for backbone\.embeddings\.weight, under"):
        checkpoint.load(stock)


def test_a_tied_pair_that_is_missing_or_not_finite(stock: Path) -> None:
    edit(stock, lambda t: t.update({"lm_head.weight": torch.full((64, 16), torch.nan)}))
    with pytest.raises(ValueError, match=r"config\.json: NaN or Inf in: lm_head\.weight$"):
        checkpoint.load(stock)
    edit(stock, lambda t: (t.pop("lm_head.weight"), t.pop("backbone.embeddings.weight")))
    with pytest.raises(ValueError, match=r"config\.json: missing tensors: backbone\.embeddings\.weight$"):
        checkpoint.load(stock)


def test_an_untied_head_is_not_the_embedding(tmp_path: Path) -> None:
    write_stock(tmp_path / "in", tie_word_embeddings=False)
    edit(tmp_path / "in", lambda t: t.pop("backbone.embeddings.weight"))
    with pytest.raises(ValueError, match=r"missing tensors: backbone\.embeddings\.weight$"):
        checkpoint.load(tmp_path / "in")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_truncation_at_any_byte(stock: Path, file: str) -> None:
    if file == "pytorch_model.bin":
        torch.save(load_file(stock / "model.safetensors"), stock / file)
        (stock / "model.safetensors").unlink()
    whole = (stock / file).read_bytes()
    for length in (0, 1, 7, 8, 9, 100, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        (stock / file).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{re.escape(file)}: (truncated|not a file of plain)"):
            checkpoint.load(stock)


@pytest.mark.parametrize("where", [0, 8, 60])
def test_a_corrupt_header(stock: Path, where: int) -> None:
    content = bytearray((stock / "model.safetensors").read_bytes())
    content[where : where + 8] = b"\xff" * 8
    (stock / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or not a safetensors file"):
        checkpoint.load(stock)


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
def test_an_index_that_names_other_files(stock: Path, named: str) -> None:
    weight_map = dict.fromkeys(load_file(stock / "model.safetensors"), named)
    (stock / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (stock / "model.safetensors").rename(stock / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=rf"names files that are not beside it: {re.escape(named)}$"):
        checkpoint.load(stock)


def test_a_tensor_in_two_shards(stock: Path) -> None:
    for name in "ab":
        (stock / f"{name}.safetensors").write_bytes((stock / "model.safetensors").read_bytes())
    weight_map = {"x": "a.safetensors", "y": "b.safetensors"}
    (stock / "model.safetensors").unlink()
    (stock / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"b\.safetensors: tensor \S+ is in more than one shard"):
        checkpoint.load(stock)


def test_an_index_without_a_map(stock: Path) -> None:
    (stock / "model.safetensors").unlink()
    (stock / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        checkpoint.load(stock)


def test_a_directory_without_weights(stock: Path) -> None:
    (stock / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors or pytorch_model\.bin in "):
        checkpoint.load(stock)


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


def test_a_file_or_an_empty_directory_as_source(stock: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a file; give the directory of the checkpoint"):
        checkpoint.load(stock / "model.safetensors")
    with pytest.raises(ValueError, match=r"no config\.json in .*: not a checkpoint directory"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff\xfe"])
def test_a_config_that_is_not_json(stock: Path, text: str) -> None:
    (stock / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"config\.json: (not readable as JSON|expected a JSON object, got list)"
    ):
        checkpoint.load(stock)


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
def test_a_config_that_does_not_fit(stock: Path, fields: dict[str, object], message: str) -> None:
    edit_config(stock, **fields)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(stock)


def test_tokenizers_that_do_not_fit(stock: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no tokenizer: no such directory: '\./absent'; tokenizer= \(--tokenizer\)"
    ):
        checkpoint.load(stock, tokenizer="./absent")
    with pytest.raises(ValueError, match=r"config\.json: not a tokenizer\.json"):
        checkpoint.load(stock, tokenizer=stock / "config.json")
    (stock / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="the tokenizer in .* cannot be read"):
        checkpoint.load(stock)
    (stock / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer in .*; name one with tokenizer= \(--tokenizer\)"):
        checkpoint.load(stock)


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


def test_a_foreign_model_is_not_looked_into(stock: Path) -> None:
    edit_config(stock, model_type="gpt2", num_hidden_layers=10**9)
    (stock / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="no adapter for model_type 'gpt2'"):
        checkpoint.load(stock)


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


# ------------------------------------------------------------------------------------------ writing


def test_an_existing_target(loaded: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "out"
    checkpoint.save(loaded, target, record={"run": 1})
    with pytest.raises(ValueError, match=r"out' exists; choose another name, or replace it with force=True"):
        checkpoint.save(loaded, target, record={"run": 2})
    assert checkpoint.read_record(target) == {"run": 1}
    (target / "model-00001-of-00009.safetensors").touch()
    checkpoint.save(loaded, target, record={"run": 2}, force=True)
    assert (
        checkpoint.read_record(target) == {"run": 2}
        and not (target / "model-00001-of-00009.safetensors").exists()
    )
    assert names(tmp_path) == {"in", "out"}


def test_targets_that_are_never_taken(loaded: Checkpoint, stock: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter").touch()
    for target, message in (
        (tmp_path / "file", "is a file; name a directory for the result"),
        (tmp_path / "file/below", "cannot be made: .*file' is a file"),
        (tmp_path / "home", r"is not replaced, because it is not a checkpoint \(no config\.json\)"),
        (stock, "overlaps the source"),
        (stock / "below", "overlaps the source"),
        (tmp_path, "overlaps the source"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.refuse_existing(target, True, loaded.source)
        with pytest.raises(ValueError, match=message):
            checkpoint.save(loaded, target, force=True)
    assert names(tmp_path) == {"in", "file", "home"}


def test_parents_are_made_and_unmade(loaded: Checkpoint, tmp_path: Path) -> None:
    loaded.model.backbone.norm_f.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"backbone\.norm_f\.weight has NaN or Inf values in torch\.float32"):
        checkpoint.save(loaded, tmp_path / "a/b/out")
    assert names(tmp_path) == {"in"}
    loaded.model.backbone.norm_f.weight.data[0] = 1e6
    loaded.stored["backbone.norm_f.weight"] = torch.float16
    with pytest.raises(ValueError, match=r"backbone\.norm_f\.weight has NaN or Inf values in torch\.float16"):
        checkpoint.save(loaded, tmp_path / "a/b/out")
    loaded.model.backbone.norm_f.weight.data[0] = 1
    checkpoint.save(loaded, tmp_path / "a/b/out")
    assert names(tmp_path / "a/b") == {"out"}


FULL_DISK = """
import resource, sys
from sparsessm import checkpoint
came = checkpoint.load(sys.argv[1], tokenizer=sys.argv[3] or None)
for size in (100, 4000, 9000, 20000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    for target, force in ((sys.argv[2], True), (sys.argv[2] + "-new/below", False)):
        try:
            checkpoint.save(came, target, force=force)
        except OSError as error:
            print(type(error).__name__, error)
"""


@pytest.mark.parametrize("layout", ["transformers", "state-spaces"])
def test_a_full_disk(tmp_path: Path, layout: str) -> None:
    """A limit on the size of a file is the full disk that a test can have."""
    pico_tokenizer().save_pretrained(tmp_path / "words")
    if layout == "transformers":
        write_stock(tmp_path / "in")
    else:
        write_original(tmp_path / "in", pico_mamba())
    came = checkpoint.load(tmp_path / "in", tokenizer=tmp_path / "words")
    checkpoint.save(came, tmp_path / "out", record={"run": 1})
    done = run(FULL_DISK, tmp_path / "in", tmp_path / "out", tmp_path / "words")
    lines = done.stdout.splitlines()
    assert len(lines) == 8, done
    for line in lines:
        assert re.fullmatch(
            rf"OSError could not write '.*', nothing was left behind: .*{os.strerror(errno.EFBIG)}.*", line
        )
    assert names(tmp_path) == {"in", "out", "words"}
    assert checkpoint.read_record(tmp_path / "out") == {"run": 1}
    assert torch.equal(logits(checkpoint.load(tmp_path / "out").model), logits(came.model))


KILLED = """
import os, signal, sys
from sparsessm import checkpoint
class Files(dict):
    def items(self):  # asked for when the tensors are written and the rest is not
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
        return super().items()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
came = checkpoint.load(sys.argv[1])
came.files = Files(came.files)
checkpoint.save(came, sys.argv[2], force=True)
"""


@pytest.mark.parametrize(
    ("name", "target_exists"), [("SIGKILL", True), ("SIGKILL", False), ("SIGTERM", True), ("SIGINT", True)]
)
def test_a_killed_save(loaded: Checkpoint, tmp_path: Path, name: str, target_exists: bool) -> None:
    target = tmp_path / "out"
    if target_exists:
        checkpoint.save(loaded, target, record={"run": 1})
    done = run(KILLED, tmp_path / "in", target, name)
    # 1 where a second interrupt meets torch's exit handler
    ends = {-getattr(signal, name)} | ({1} if name == "SIGINT" else set())
    assert done.returncode in ends, done
    left = {entry for entry in names(tmp_path) if entry.startswith(".out.saving-")}
    assert bool(left) == (name != "SIGINT")
    assert names(tmp_path) - left == {"in", "out"} - (set() if target_exists else {"out"})
    if target_exists:
        assert checkpoint.read_record(target) == {"run": 1}
    checkpoint.save(loaded, target, force=True)
    assert names(tmp_path) == {"in", "out"}


def test_a_run_killed_between_its_two_renames(loaded: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "out"
    checkpoint.save(loaded, target, record={"run": 1})
    staging = tmp_path / ".out.saving-x"
    (staging / "new").mkdir(parents=True)
    target.rename(staging / "old")
    with pytest.raises(ValueError, match="out' exists"):
        checkpoint.refuse_existing(target, False)
    assert checkpoint.read_record(target) == {"run": 1} and names(tmp_path) == {"in", "out"}


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    message = "appeared while the result was being written"
    with pytest.raises(FileExistsError, match=message), atomic.replacing(target) as folder:
        (folder / "mine").touch()
        atomic.recover(target)
        assert (folder / "mine").exists()
        target.mkdir()
        (target / "another").touch()
    assert names(tmp_path) == {"out"} and names(target) == {"another"}


def test_force_does_not_take_a_project(tmp_path: Path) -> None:
    """A config.json does not make a checkpoint, and a checkpoint's neighbours stay."""
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    (project / "config.json").write_text('{"name": "webapp"}')
    with pytest.raises(ValueError, match="config.json is of something else"):
        checkpoint.refuse_existing(project, True)
    (project / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="it also has '.git'"):
        checkpoint.refuse_existing(project, True)
    (project / ".git").rmdir()
    checkpoint.refuse_existing(project, True)
    (project / "notes.md").touch()
    with pytest.raises(ValueError, match="it also has 'notes.md'"):
        checkpoint.refuse_existing(project, True)
