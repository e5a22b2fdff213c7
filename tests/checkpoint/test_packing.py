"""Whole checkpoints packed and unpacked: in every format and precision, with all files beside the weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import NEOX, logits, names, stock_logits, write_mixed, write_original, write_stock
from golden_files import EMBEDDING, FLOATS, IN, OUT, A, X, same, thinned
from pico import pico_mamba, pico_mamba2, pico_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparsessm
from sparsessm import checkpoint
from sparsessm.checkpoint import container, packed, packed_file


def halve(folder: Path, removed: float = 0.5) -> dict[str, Tensor]:
    """Zero entries of the matrices in a stock directory, by magnitude."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "proj.weight" in name:
            edge = tensor.float().abs().flatten().kthvalue(int(removed * tensor.numel())).values
            tensor[tensor.float().abs() <= edge] = 0
        if name.endswith("A_log"):
            tensor[..., ::2] = 38.0
    save_file(tensors, file, {"format": "pt"})
    return tensors


def write_pruned(folder: Path, dtype: torch.dtype, **overrides: object) -> dict[str, Tensor]:
    if overrides:
        write_stock(folder, dtype, **overrides)
    else:
        write_mixed(folder, dtype)
    (folder / "LICENSE").write_text("yours\n")
    (folder / "pruning.json").write_text('{"targets":   []}')
    (folder / "README.md").write_text("# card\r\n")
    return halve(folder)


@pytest.mark.parametrize("dtype", FLOATS)
def test_there_and_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = write_pruned(tmp_path / "in", dtype)
    done = checkpoint.pack(tmp_path / "in", tmp_path / "packed")
    assert names(tmp_path / "packed") == names(tmp_path / "in") - {"model.safetensors"} | {container.PACKED}
    for folder, is_packed in (("packed", True), ("in", False)):
        assert (checkpoint.open_checkpoint(tmp_path / folder).packed is not None) == is_packed
    assert done.before == sum(tensor.nbytes for tensor in tensors.values())
    assert done.after == (tmp_path / "packed" / container.PACKED).stat().st_size
    read = packed.read(tmp_path / "packed")
    assert read.notes == () and read.config.hidden_size == 16
    assert len(read.tokenizer()) == 64
    for name, tensor in tensors.items():
        assert same(read.tensors[name].decode(), tensor), name
        assert same(done.tensors[name].decode(), tensor), name
    assert {read.tensors[name].kind for name in tensors if "in_proj" in name} == {"bitmask"}
    assert checkpoint.unpack(tmp_path / "packed", tmp_path / "out") == ""  # nothing is rounded
    assert names(tmp_path / "out") == names(tmp_path / "in")
    for name in names(tmp_path / "in") - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes(), name
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "in" / name).read_bytes(), name
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == tensors.keys() and all(same(written[name], tensors[name]) for name in tensors)
    assert names(tmp_path) == {"in", "packed", "out"}


def test_a_packed_directory_loads_like_any_other(tmp_path: Path) -> None:
    write_pruned(tmp_path / "in", torch.bfloat16)
    checkpoint.pack(tmp_path / "in", tmp_path / "packed")
    dense, came = checkpoint.load(tmp_path / "in"), checkpoint.load(tmp_path / "packed")
    assert (came.format, came.stored, came.files) == (dense.format, dense.stored, dense.files)
    assert torch.equal(logits(came.model), logits(dense.model))
    assert came.model.lm_head.weight is came.model.backbone.embeddings.weight
    assert checkpoint.read_record(tmp_path / "packed") == {"targets": []}
    file = tmp_path / "packed" / container.PACKED
    with open(file, "r+b") as content:  # it owns its memory
        content.write(b"\0" * file.stat().st_size)
    assert torch.equal(logits(came.model), logits(dense.model))
    checkpoint.save(came, tmp_path / "out")
    assert torch.equal(stock_logits(tmp_path / "out"), logits(dense.model))


@pytest.mark.parametrize("tied", [True, False])
def test_the_original_layout(tmp_path: Path, tied: bool) -> None:
    write_original(
        tmp_path / "in", pico_mamba(tie_word_embeddings=tied), torch.float16, ssm_cfg={"d_state": 8}
    )
    words = tmp_path / "tokenizer.json"
    pico_tokenizer(60).backend_tokenizer.save(str(words))
    checkpoint.pack(tmp_path / "in", tmp_path / "packed", tokenizer=words)
    read = packed.read(tmp_path / "packed")
    assert read.format == "state-spaces" and read.config.hidden_size == 16
    assert ("lm_head.weight" in read.tensors) != tied
    checkpoint.unpack(tmp_path / "packed", tmp_path / "out")
    before, after = (torch.load(tmp_path / d / "pytorch_model.bin", weights_only=True) for d in ("in", "out"))
    assert before.keys() == after.keys() and all(same(after[name], before[name]) for name in before)
    assert (tmp_path / "packed/config.json").read_bytes() == (tmp_path / "in/config.json").read_bytes()


@pytest.mark.skipif(not NEOX.exists(), reason="needs ../shared/data")
def test_a_tokenizer_named_at_reading(tmp_path: Path) -> None:
    write_original(tmp_path / "in", pico_mamba(vocab_size=50280), vocab_size=50277)
    checkpoint.pack(tmp_path / "in", tmp_path / "packed", tokenizer=NEOX)
    assert packed.read(tmp_path / "packed").tokenizer(NEOX)("Hello world").input_ids == [12092, 1533]


SMALL = ("A_log", ".D", "norm.weight", "norm_f.weight", "bias", "conv1d.weight")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("word", "target"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_another_dtype(tmp_path: Path, dtype: torch.dtype, word: str, target: torch.dtype) -> None:
    tensors = write_pruned(tmp_path / "in", dtype)
    checkpoint.pack(tmp_path / "in", tmp_path / "packed", dtype=word)
    read = packed.read(tmp_path / "packed")
    for name, tensor in tensors.items():
        wanted = tensor if name.endswith(SMALL) else tensor.to(target)
        assert same(read.tensors[name].decode(), wanted), name
    assert checkpoint.load(tmp_path / "packed").stored[EMBEDDING] == target


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", [None, "int8"])
def test_int8(tmp_path: Path, head: str | None, tied: bool) -> None:
    tensors = write_pruned(tmp_path / "in", torch.bfloat16, tie_word_embeddings=tied)
    checkpoint.pack(tmp_path / "in", tmp_path / "packed", dtype="int8", head=head)
    read = packed.read(tmp_path / "packed")
    of_head = {EMBEDDING, "lm_head.weight"} if head else set()
    for name, tensor in tensors.items():
        quantised = name in of_head or name.endswith(("in_proj.weight", "x_proj.weight", "out_proj.weight"))
        assert (read.tensors[name].values.dtype == torch.int8) == quantised, name
        assert read.tensors[name].dtype == tensor.dtype
        assert quantised or same(read.tensors[name].decode(), tensor), name
    came = checkpoint.load(tmp_path / "packed")
    loaded = came.model.state_dict()
    for name, tensor in read.tensors.items():
        assert same(loaded[name], tensor.decode(torch.float32)), name
    difference = (logits(came.model) - logits(checkpoint.load(tmp_path / "in").model)).abs().max()
    assert 0 < difference < 0.02
    checkpoint.unpack(tmp_path / "packed", tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(same(written[name], tensor.decode()) for name, tensor in read.tensors.items())


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_mamba2(tmp_path: Path, dtype: str | None) -> None:
    model = pico_mamba2(time_step_limit=(0.001, 0.5))
    model.save_pretrained(tmp_path / "in")
    pico_tokenizer().save_pretrained(tmp_path / "in")
    tensors = halve(tmp_path / "in")
    read = checkpoint.pack(tmp_path / "in", tmp_path / "packed", dtype=dtype)
    for name, tensor in tensors.items():
        quantised = dtype == "int8" and name.endswith(("in_proj.weight", "out_proj.weight"))
        assert (read.tensors[name].values.dtype == torch.int8) == quantised, name
        assert quantised or same(read.tensors[name].decode(), tensor), name
    assert {read.tensors[name].kind for name in (IN, OUT)} == {"bitmask"}
    assert tuple(checkpoint.load(tmp_path / "packed").model.config.time_step_limit) == (0.001, 0.5)
    checkpoint.unpack(tmp_path / "packed", tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(same(written[name], found.decode()) for name, found in read.tensors.items())


def test_the_pattern_of_the_record_is_tried(tmp_path: Path) -> None:
    write_stock(tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    tensors[X] = thinned(tensors[X], 1, 8)
    save_file(tensors, tmp_path / "in/model.safetensors", {"format": "pt"})
    rows: list[Any] = [{"target": X, "pattern": "1:8"}, {"target": IN, "pattern": "unstructured"}, {}, 3]
    (tmp_path / "in/pruning.json").write_text(json.dumps({"targets": rows}))
    assert checkpoint.pack(tmp_path / "in", tmp_path / "out").tensors[X].label == "1:8"
    (tmp_path / "in/pruning.json").write_text('{"targets": 3}')
    found = checkpoint.pack(tmp_path / "in", tmp_path / "out", force=True).tensors[X]
    assert found.label == "bitmask" and same(found.decode(), tensors[X])


def test_of_a_checkpoint_in_memory(tmp_path: Path) -> None:
    tensors = write_pruned(tmp_path / "in", torch.float16)
    came = checkpoint.load(tmp_path / "in")
    held = packed.of(came)
    assert held.tensors.keys() == tensors.keys() and held.format == "transformers"
    assert all(same(held.tensors[name].values, tensors[name]) for name in tensors)
    assert {tensor.kind for tensor in held.tensors.values()} == {"dense"}
    assert held.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert held.config.hidden_size == 16 and held.tokenizer() is came.tokenizer
    with pytest.raises(ValueError, match="name it when you load"):
        held.tokenizer("other")
    came.stored[A] = torch.float64
    with pytest.raises(ValueError, match=f"^{A}: its dtype is float64; allowed"):
        packed.of(came)


def test_what_pack_and_unpack_refuse(tmp_path: Path) -> None:
    write_stock(tmp_path / "in")
    source, out = tmp_path / "in", tmp_path / "out"
    with pytest.raises(ValueError, match="unknown dtype 'int4'; known: fp32, bf16, int8, or none"):
        checkpoint.pack(source, out, dtype="int4")
    with pytest.raises(ValueError, match="unknown dtype 'bf16' of the head; known: int8"):
        checkpoint.pack(source, out, head="bf16")
    for attempt in (checkpoint.unpack, lambda source, _: packed.read(source)):
        with pytest.raises(ValueError, match=r"in' is not packed: it has no packed\.safetensors"):
            attempt(source, out)
    with pytest.raises(ValueError, match="overlaps the source"):
        checkpoint.pack(source, source / "packed")
    assert names(tmp_path) == {"in"}
    checkpoint.pack(source, out)
    with pytest.raises(ValueError, match=r"out' is already packed; unpack it first"):
        checkpoint.pack(out, tmp_path / "again")
    for attempt, start in ((checkpoint.pack, source), (checkpoint.unpack, out)):
        checkpoint.pack(source, tmp_path / "other", force=True)
        with pytest.raises(ValueError, match=r"other' exists; choose another name"):
            attempt(start, tmp_path / "other")
        attempt(start, tmp_path / "other", force=True)
    assert names(tmp_path) == {"in", "out", "other"}
    (out / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="it also has 'mine.txt'"):
        checkpoint.pack(source, out, force=True)


def test_a_packed_directory_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stock(tmp_path / "in")
    checkpoint.pack(tmp_path / "in", tmp_path / "packed")
    asked: list[str] = []

    def fetched(source: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path / "packed")

    monkeypatch.setattr("sparsessm.checkpoint.opened.snapshot_download", fetched)
    assert packed.read("some/model").source == "some/model"
    assert {container.PACKED, "README.md", "*.json"} <= set(asked) and "pytorch_model*.bin" not in asked
    assert torch.equal(logits(checkpoint.load("some/model").model), logits(pico_mamba()))
    with pytest.raises(ValueError, match=r"'some/model' is already packed; unpack it first"):
        checkpoint.pack("some/model", tmp_path / "out")
    checkpoint.unpack("some/model", tmp_path / "out")


def test_a_failing_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stock(tmp_path / "in")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_file, "write", fail)
    with pytest.raises(OSError, match="nothing was left behind: .*No space left"):
        checkpoint.pack(tmp_path / "in", tmp_path / "out")
    assert names(tmp_path) == {"in"}


def test_a_value_that_bf16_does_not_have(tmp_path: Path) -> None:
    write_stock(tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    tensors[IN][0, 0] = 3.4e38
    save_file(tensors, tmp_path / "in/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"^{IN}: NaN or Inf"):
        checkpoint.pack(tmp_path / "in", tmp_path / "out", dtype="bf16")
    assert names(tmp_path) == {"in"}


@pytest.mark.parametrize(
    ("pattern", "label", "most"), [("unstructured", "bitmask", 0.57), ("2:4", "2:4", 0.57)]
)
def test_the_built_in_model(tmp_path: Path, pattern: str, label: str, most: float) -> None:
    model = sparsessm.load("builtin:pycode")
    fields: dict[str, Any] = {"pattern": pattern} if pattern != "unstructured" else {"sparsity": 0.5}
    report = sparsessm.prune(model, method="magnitude", target="projections", **fields, measure=False)
    sparsessm.save(model, tmp_path / "pruned", report)
    done = checkpoint.pack(tmp_path / "pruned", tmp_path / "packed")
    linear = [tensor for name, tensor in done.tensors.items() if "proj.weight" in name]
    assert {tensor.label for tensor in linear} <= {label, "bitmask", "dense"}
    large = [tensor for tensor in linear if tensor.shape[1] >= 256 and tensor.label == label]
    assert large
    size = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in linear)
    assert sum(tensor.nbytes for tensor in linear) <= most * size
    assert 0.5 < done.ratio < 0.9
    again = sparsessm.load(tmp_path / "packed")
    tokens = torch.arange(100).reshape(2, 50)
    with torch.inference_mode():
        assert torch.equal(again.model(tokens).logits, model.model(tokens).logits)
    assert checkpoint.read_record(tmp_path / "packed") == checkpoint.read_record(tmp_path / "pruned")
