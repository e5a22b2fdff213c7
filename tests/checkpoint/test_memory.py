"""A model is taken tensor by tensor: what runs is the same to the bit, and no float32 model is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from directories import write_original
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_mamba, pico_mamba2, pico_tokenizer
from safetensors.torch import load_file, save_file

import sparsessm
from sparsessm import kernels, runtime
from sparsessm.checkpoint import packed, reading
from sparsessm.kernels.checksum import by_numpy, crc32c


def stock(folder: Path, model: Any, dtype: torch.dtype, **options: Any) -> Path:
    model.to(dtype).save_pretrained(folder, **options)
    pico_tokenizer().save_pretrained(folder)
    return folder


def mixed(folder: Path, model: Any, dtype: torch.dtype) -> Path:
    stock(folder, model, dtype)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: t.float() if name.endswith(("A_log", ".D")) else t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def original(folder: Path, model: Any, dtype: torch.dtype) -> Path:
    write_original(folder, model, dtype, ssm_cfg={"d_state": 8})
    pico_tokenizer(60).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("write", "make", "options"),
    [
        (stock, pico_mamba, {}),
        (stock, pico_mamba, {"tie_word_embeddings": False}),
        (stock, pico_mamba2, {}),
        (mixed, pico_mamba, {}),
        (original, pico_mamba, {}),
        (lambda *a: stock(*a, max_shard_size="4KB"), pico_mamba, {}),
    ],
    ids=["tied", "untied", "mamba2", "mixed dtypes", "original", "sharded"],
)
def test_taken_one_by_one_it_computes_what_the_whole_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, make: Any, options: Any, dtype: torch.dtype
) -> None:
    folder = write(tmp_path / "in", make(**options), dtype)
    whole = runtime.of(sparsessm.load(folder))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(reading, "assemble", refuse)
    came = runtime.load(folder)
    for file in folder.glob("*.*"):  # nothing is mapped any more
        if file.suffix in (".safetensors", ".bin"):
            with open(file, "r+b") as content:
                content.write(b"\xff" * file.stat().st_size)
    tokens = [1, 5, 3, 7, 2, 11]
    assert torch.equal(came.logits(tokens), whole.logits(tokens))
    assert came.engine.layout == whole.engine.layout


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("backbone.layers.0.mixer.D"), r"missing tensors: backbone\.layers\.0\.mixer\.D"),
        (
            lambda t: t.update({"backbone.norm_f.weight": torch.ones(3)}),
            r"wrong shapes: backbone\.norm_f\.weight \(3,\)",
        ),
        (
            lambda t: t["backbone.layers.0.mixer.D"].fill_(torch.nan),
            r"NaN or Inf in: backbone\.layers\.0\.mixer\.D",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["backbone.embeddings.weight"] + 1}),
            r"lm_head\.weight differs from backbone\.embeddings\.weight",
        ),
    ],
)
def test_what_loading_refuses_running_refuses_in_the_same_words(
    tmp_path: Path, spoil: Any, message: str
) -> None:
    folder = stock(tmp_path / "in", pico_mamba(), torch.float32)
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = []
    for attempt in (sparsessm.load, runtime.load):
        with pytest.raises(ValueError, match=message) as caught:
            attempt(folder)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_file_that_changes_between_two_looks_is_refused(tmp_path: Path) -> None:
    folder = stock(tmp_path / "in", pico_mamba(), torch.float32)
    found = packed.stream(folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=r"model\.safetensors: it was changed while it was read"):
        found.tensors["backbone.norm_f.weight"]


def by_bits(content: bytes, before: int) -> int:
    rest = before ^ 0xFFFFFFFF
    for byte in content:
        rest ^= byte
        for _ in range(8):
            rest = rest >> 1 ^ 0x82F63B78 * (rest & 1)
    return rest ^ 0xFFFFFFFF


@settings(deadline=None, max_examples=25)
@given(
    length=st.sampled_from([0, 1, 7, 8, 9, 1023, 1024, 1029, 12287, 12288, 12301, 24600]),
    seed=st.integers(0, 2**31),
    before=st.sampled_from([0, 1, 0xDEADBEEF]),
)
def test_every_way_to_the_checksum_is_the_definition(length: int, seed: int, before: int) -> None:
    content = np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)
    wanted = by_bits(content.tobytes(), before)
    assert crc32c(content, before) == by_numpy(content, before) == wanted
    if kernels.NATIVE:
        assert kernels.native_crc32c(content, before, portable=True) == wanted
    cut = length // 3
    assert crc32c(content[cut:], crc32c(content[:cut], before)) == wanted


def test_the_checksum_that_the_rfc_prints() -> None:
    assert crc32c(np.zeros(32, np.uint8)) == 0x8A9136AA
    assert crc32c(np.arange(32, dtype=np.uint8)) == 0x46DD794E


@pytest.mark.parametrize("form", ["stock", "packed"])
def test_each_tensor_is_read_once(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine asks of every layer which of the possible tensors it has; that reads none."""
    folder = stock(tmp_path / "stock", pico_mamba(), torch.bfloat16)
    sparsessm.checkpoint.pack(folder, tmp_path / "packed")
    found = packed.stream(tmp_path / form).tensors
    read: list[str] = []
    whole = type(found).__getitem__
    monkeypatch.setattr(type(found), "__getitem__", lambda self, name: read.append(name) or whole(self, name))
    runtime.load(tmp_path / form)
    if kernels.LEVEL != "reference":
        assert sorted(read) == sorted(found)
