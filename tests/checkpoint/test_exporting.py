"""One GGUF file: names, shapes, values and metadata as llama.cpp reads them, and what is refused."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from directories import edit
from gguf_files import FORMS, MATRICES, expected, fields_of, same_blocks, stored, with_tokenizer
from packable import mixed_dtypes, original, projected, pruned, stock
from pico import builtin_tokenizer, pico_falcon_mamba, pico_mamba, pico_mamba2
from pico_hybrids import pico_hybrid
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from whereabouts import pruned as run

import sparsessm
from sparsessm import checkpoint
from sparsessm.architectures.own import Own
from sparsessm.checkpoint import Exported, atomic, export, exporting

WIDE = {"hidden_size": 64, "num_heads": 16, "head_dim": 8, "n_groups": 4}


def wide(kind: Callable[..., Any], **fields: Any) -> Callable[[Path], Path]:
    known = WIDE if kind is pico_mamba2 else {"hidden_size": 64}
    return lambda folder: stock(folder, kind(**known, **fields))


def memoryless(folder: Path) -> Path:
    return pruned(folder, pico_mamba(), target="ssm", sparsity=0.5)


def packed(folder: Path) -> Path:
    checkpoint.pack(memoryless(folder.with_name("stock")), folder)
    return folder


def on_grid(folder: Path) -> Path:
    source = stock(folder.with_name("stock"), pico_mamba2().bfloat16())
    came, report = run(source, None, target="projections", bits=4.0)
    sparsessm.save(came, folder, report)
    return folder


def mixed(folder: Path) -> Path:
    stock(folder, pico_mamba())
    tensors = load_file(folder / "model.safetensors")
    mixed_dtypes(tensors)
    first = "backbone.embeddings.weight"  # what it is alone must not decide
    tensors[first] = tensors[first].bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


SOURCES: dict[str, Callable[[Path], Any]] = {
    "mamba": wide(pico_mamba),
    "mamba untied": wide(pico_mamba, tie_word_embeddings=False),
    "mamba bfloat16": lambda f: stock(f, pico_mamba().bfloat16()),
    "mamba float16": lambda f: stock(f, pico_mamba().half()),
    "mamba mixed": mixed,
    "mamba without biases of the convolution": lambda f: stock(f, pico_mamba(use_conv_bias=False)),
    "falcon_mamba": wide(pico_falcon_mamba),
    "falcon_mamba untied": lambda f: stock(f, pico_falcon_mamba(tie_word_embeddings=False).bfloat16()),
    "mamba2 in groups": wide(pico_mamba2),
    "mamba2 untied": lambda f: stock(f, pico_mamba2(tie_word_embeddings=False).half()),
    "mamba2 with fewer heads": lambda f: stock(f, pico_mamba2(num_heads=2, expand=1)),
    "original": original,
    "memoryless": memoryless,
    "packed": packed,
    "on a grid": on_grid,
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_tensor_is_the_stock_model_s(name: str, tmp_path: Path) -> None:
    SOURCES[name](source := tmp_path / "m")
    whole = expected(source)
    for kind in ("f32", "bf16", "q8_0", "q4_0"):
        done = export(source, tmp_path / "m.gguf", type=kind, force=True)
        read = {tensor.name: tensor for tensor in gguf.GGUFReader(done.file).tensors}
        assert read.keys() == whole.keys() == done.tensors.keys()
        assert done.kind == kind and done.nbytes == done.file.stat().st_size
        for short, value in whole.items():
            found = read[short]
            assert found.shape.tolist() == list(value.shape)[::-1], short
            wanted, content = stored(value, kind if short.endswith(MATRICES) else "f32")
            assert found.tensor_type is FORMS[wanted.upper()], short
            assert same_blocks(found.data, wanted, content, value), short
            assert done.tensors[short] == (wanted, len(content))
            assert np.isfinite(gguf.quants.dequantize(found.data, found.tensor_type)).all(), short


@pytest.mark.parametrize("name", ["mamba", "mamba untied"])
def test_embedding_and_head_may_have_a_type_of_their_own(name: str, tmp_path: Path) -> None:
    SOURCES[name](source := tmp_path / "m")
    done = export(source, tmp_path / "m.gguf", type="q4_0", head="q8_0")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(done.file).tensors}
    outer = {"token_embd.weight"} | ({"output.weight"} if "untied" in name else set())
    for short, value in expected(source).items():
        if short.endswith(MATRICES):
            wanted, content = stored(value, "q8_0" if short in outer else "q4_0")
            assert read[short].data.tobytes() == content and done.tensors[short][0] == wanted
    assert done.kind == "q4_0" and outer <= read.keys()
    assert fields_of(done.file)["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0


def test_values_of_blocks_are_near_the_stock_values(tmp_path: Path) -> None:
    wide(pico_mamba)(source := tmp_path / "m")
    whole, blocks = expected(source)["blk.0.ssm_in.weight"], (-1, 64 // 32, 32)
    for kind, step in (("q8_0", 127), ("q4_0", 8)):
        done = export(source, tmp_path / f"{kind}.gguf", type=kind)
        (found,) = [t for t in gguf.GGUFReader(done.file).tensors if t.name == "blk.0.ssm_in.weight"]
        error = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type)) - whole
        least = whole.view(blocks).abs().amax(-1) / step
        assert (error.view(blocks).abs().amax(-1) <= 1.01 * least).all() and error.any()


def test_what_keeps_no_memory_is_finite(tmp_path: Path) -> None:
    done = export(memoryless(tmp_path / "m"), tmp_path / "m.gguf")
    (found,) = [t for t in gguf.GGUFReader(done.file).tensors if t.name == "blk.1.ssm_a"]
    gone = found.data < -3e16
    assert gone.mean() == 0.5 and np.isfinite(found.data).all()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mamba", "f32"),
        ("mamba bfloat16", "bf16"),
        ("mamba2 untied", "f16"),
        ("mamba mixed", "f32"),
        ("on a grid", "bf16"),
    ],
)
def test_the_type_is_that_of_the_stock_model(name: str, kind: str, tmp_path: Path) -> None:
    SOURCES[name](source := tmp_path / "m")
    done = export(source, tmp_path / "m.gguf")
    assert done.kind == kind
    told = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "f16": "MOSTLY_F16"}[kind]
    assert fields_of(done.file)["general.file_type"] == gguf.LlamaFileType[told]


def test_what_is_said_of_a_mamba(tmp_path: Path) -> None:
    for name, norms in (("mamba", False), ("falcon_mamba", True)):
        SOURCES[name](source := tmp_path / name)
        told = fields_of(export(source, tmp_path / f"{name}.gguf").file)
        assert told["general.architecture"] == "mamba" and told["general.name"] == name
        assert {key: told[f"mamba.{key}"] for key in KEYS} == KEYS
        assert told["mamba.ssm.dt_b_c_rms"] is norms
        sizes = [told[f"mamba.ssm.{key}"] for key in ("time_step_rank", "inner_size", "state_size")]
        assert sizes == [4, 128, 8]


KEYS = {
    "context_length": 2**20,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 0,
    "attention.head_count": 0,
    "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
    "ssm.conv_kernel": 4,
}


def test_what_is_said_of_a_mamba2(tmp_path: Path) -> None:
    SOURCES["mamba2 in groups"](source := tmp_path / "m")
    told = fields_of(export(source, tmp_path / "m.gguf").file)
    keys = KEYS | {
        "attention.head_count": 16,  # read by some versions only, in place of the next
        "ssm.time_step_rank": 16,
        "ssm.inner_size": 128,
        "ssm.state_size": 8,
        "ssm.group_count": 4,
    }
    assert told["general.architecture"] == "mamba2" and "mamba2.ssm.dt_b_c_rms" not in told
    assert {key: told[f"mamba2.{key}"] for key in keys} == keys


# What is refused.


def words_only(folder: Path) -> Path:
    library = Tokenizer(models.WordLevel({"a": 0, "<u>": 1}, unk_token="<u>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return with_tokenizer(folder, PreTrainedTokenizerFast(tokenizer_object=library))


def edited(folder: Path, **fields: Any) -> Path:
    stock(folder, pico_mamba2() if "time_step_limit" in fields else pico_mamba())
    edit(folder / "config.json", **fields)
    return folder


def too_large(folder: Path) -> Path:
    stock(folder, pico_mamba().bfloat16())
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.layers.1.mixer.out_proj.weight"][0, 0] = 1e7
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def widths(folder: Path) -> None:
    came = checkpoint.load(stock(folder.with_name("stock"), pico_mamba()))
    Own(widths={1: 24}).give(came.model)
    for parameter in came.model.backbone.layers[1].parameters():  # pyright: ignore[reportAttributeAccessIssue]
        parameter.data.fill_(0.5)
    sparsessm.save(came, folder)


REFUSED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "hybrid": (
        lambda f: stock(f, pico_hybrid("zamba2")),
        {},
        "is a zamba2 model; exported to GGUF are: mamba, falcon_mamba, mamba2, bamba",
    ),
    "projected": (projected, {}, "has projected states, which no GGUF file can hold"),
    "widths": (widths, {}, "has layers of different widths, which no GGUF file can hold"),
    "channels": (
        lambda f: stock(f, pico_mamba(intermediate_size=48)),
        {},
        "has 48 channels; llama.cpp runs a mamba of this width only with 32",
    ),
    "biases": (lambda f: stock(f, pico_mamba(use_bias=True)), {}, "has biases of in_proj and out_proj"),
    "activation": (lambda f: edited(f, hidden_act="gelu"), {}, "activation 'gelu'; llama.cpp has silu"),
    "limits": (lambda f: edited(f, time_step_limit=[0.0, 0.5]), {}, "limits its steps to 0.0 and 0.5"),
    "words": (words_only, {}, r"its tokenizer \(.*, WordLevel\) is not exported to GGUF"),
    "more tokens than rows": (
        lambda f: with_tokenizer(f, builtin_tokenizer()),
        {},
        "has tokens up to number 4095, the embedding 64 rows",
    ),
    "type": (wide(pico_mamba), {"type": "q2_k"}, "type is 'q2_k'; allowed: bf16, f16, f32, q8_0, q4_0"),
    "head": (wide(pico_mamba), {"head": "int8"}, "head is 'int8'; allowed: bf16, f16, f32, q8_0, q4_0"),
    "too large for float16": (
        too_large,
        {"type": "f16"},
        r"out_proj.weight \(blk.1.ssm_out.weight\) has values that are too large for f16",
    ),
    "too large for blocks": (too_large, {"type": "q4_0"}, "too large for q4_0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_nothing(name: str, here: Path) -> None:
    make, options, message = REFUSED[name]
    make(here / "m")
    (here / "out").mkdir()
    with pytest.raises(ValueError, match=message):
        export(here / "m", here / "out/m.gguf", **options)
    assert not [*(here / "out").iterdir()]


def exported(folder: Path) -> Exported:
    return export(stock(folder / "m", pico_mamba()), folder / "m.gguf", type="bf16")


def test_files_are_kept_and_replaced(tmp_path: Path) -> None:
    file = exported(tmp_path).file
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"m.gguf' exists; .* force=True \(--force\)"):
        export(tmp_path / "m", file, type="f32")
    assert file.read_bytes() == before
    export(tmp_path / "m", file, type="f32", force=True)
    assert file.read_bytes() != before
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("notes.txt", "is no GGUF file"),
        ("folder", "is a directory; name a file"),
        ("m/model.safetensors", "lies in the source"),
        ("m/new.gguf", "lies in the source"),
    ):
        with pytest.raises(ValueError, match=message):
            export(tmp_path / "m", tmp_path / name, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "m", "m.gguf", "notes.txt"]


def test_a_disk_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = exported(tmp_path).file
    before, written = file.read_bytes(), []

    def full(self: Any, tensor: Any) -> None:
        written.append(tensor.nbytes)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="could not write .*m.gguf', nothing was left behind: .*No space left"):
        export(tmp_path / "m", file, type="f32", force=True)
    assert file.read_bytes() == before and len(written) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.gguf"]
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: type("", (), {"free": 100}))
    with pytest.raises(ValueError, match="but its disk has room for 100"):
        export(tmp_path / "m", file, force=True)


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is not kept: each array has gone when the next one is made."""
    alive: list[weakref.ref[Any]] = []
    make = exporting._data

    def watched(*given: Any) -> Any:
        assert not [one for one in alive if one() is not None]
        array = make(*given)
        alive.append(weakref.ref(array))
        return array

    monkeypatch.setattr(exporting, "_data", watched)
    assert len(exported(tmp_path).tensors) == len(alive) == 22


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"needs the package gguf; install sparsessm\[gguf\]"):
        export(stock(tmp_path / "m", pico_mamba()), tmp_path / "m.gguf")


def test_what_older_versions_do_not_run_is_noted(tmp_path: Path) -> None:
    for name, count in (("mamba2 in groups", 0), ("mamba2 with fewer heads", 1)):
        done = export(SOURCES[name](tmp_path / name), tmp_path / f"{name}.gguf")
        assert len(done.notes) == count
    assert "(b9190) do not run a mamba2 of 16 channels, width 16 and 8 states" in done.notes[0]


def test_epsilons_that_differ_are_noted(tmp_path: Path) -> None:
    done = export(SOURCES["falcon_mamba"](tmp_path / "m"), tmp_path / "m.gguf")
    assert any(
        "all norms with the epsilon 1e-05; those of B, C and the step size have 1e-06" in n
        for n in done.notes
    )
