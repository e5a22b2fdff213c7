"""Quantised matrices of a GGUF file, against the package gguf: values that blocks have are not rounded a
second time, others are rounded as llama.cpp does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import FORMS, MATRICES, expected
from hypothesis import given, settings
from hypothesis import strategies as st
from packable import stock
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2
from whereabouts import pruned

import sparsessm
from sparsessm.checkpoint import export, pack, unpack
from sparsessm.checkpoint.gguf_blocks import CODES, blocks

Array = np.ndarray
HALVES = np.array([6e-8, 6.1e-5, 1e-3, 0.1, 0.3337, 1.0, 17.3, 900.0, 8000.0], np.float16)


def read(data: Array, kind: str) -> Array:
    return gguf.quants.dequantize(data, FORMS[kind.upper()])


def on_blocks(seed: int, kind: str, most: int, rows: int = 9, columns: int = 96) -> Array:
    """Values that blocks have: codes up to `most`, and scales of either sign from the smallest on."""
    rng = np.random.default_rng(seed)
    least, largest = CODES[kind]
    codes = rng.integers(max(least, -most), min(largest, most), (rows, columns // 32, 32), endpoint=True)
    codes *= rng.random((rows, columns // 32, 1)) < 0.9  # some blocks are zero
    scales = rng.choice(HALVES, (rows, columns // 32, 1)) * rng.choice([-1, 1], (rows, columns // 32, 1))
    values = (scales.astype(np.float16).astype(np.float32) * codes.astype(np.float32)).reshape(rows, columns)
    return values.astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["q4_0", "q8_0"]),
    most=st.sampled_from([1, 2, 5, 8, 127]),
)
def test_values_that_blocks_have_stay(seed: int, kind: str, most: int) -> None:
    values = on_blocks(seed, kind, most)
    found = blocks(values, kind, gguf)
    assert found.dtype == np.uint8 and np.array_equal(read(found, kind), values)


def test_llama_cpp_s_own_rounding_does_not_keep_them() -> None:
    """Else there were nothing to find."""
    for kind, least in (("q4_0", 0.2), ("q8_0", 0.5)):
        values = on_blocks(0, kind, 127, rows=200)
        plain = read(gguf.quants.quantize(values, FORMS[kind.upper()]), kind)
        assert (plain != values).any(1).mean() > least


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["q4_0", "q8_0"]), size=st.integers(-30, 3))
def test_other_values_are_rounded_as_llama_cpp_does(seed: int, kind: str, size: int) -> None:
    values = np.random.default_rng(seed).standard_normal((5, 64)).astype(np.float32) * np.float32(10.0**size)
    values[2, :32] = 0
    with np.errstate(all="ignore"):
        assert np.array_equal(blocks(values, kind, gguf), gguf.quants.quantize(values, FORMS[kind.upper()]))


def test_one_value_off_its_grid_costs_its_own_block_alone() -> None:
    values = on_blocks(3, "q4_0", 8, rows=40)
    values[7, 40] *= np.float32(1.0001) if values[7, 40] else 1
    values[7, 41] += np.float32(0.01)
    same = (read(blocks(values, "q4_0", gguf), "q4_0") == values).reshape(40, 3, 32).all(-1)
    assert not same[7, 1] and same.sum() == same.size - 1


def test_matrices_of_many_rows_are_as_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = on_blocks(5, "q4_0", 8, rows=50)
    whole = blocks(values, "q4_0", gguf)
    monkeypatch.setattr("sparsessm.checkpoint.packed_tensor._CHUNK", 96 * 7)
    assert np.array_equal(blocks(values, "q4_0", gguf), whole)


# What was pruned, in the file.

WIDE = {"hidden_size": 64, "num_heads": 16, "head_dim": 8}
MODELS: dict[str, Callable[..., Any]] = {
    "mamba": lambda **how: pico_mamba(hidden_size=64, **how),
    "mamba untied": lambda **how: pico_mamba(hidden_size=64, tie_word_embeddings=False, **how),
    "falcon_mamba": lambda **how: pico_falcon_mamba(hidden_size=64, **how),
    "mamba2": lambda **how: pico_mamba2(**WIDE, n_groups=4, **how),
}
HOW: tuple[dict[str, Any], ...] = (
    {},
    {"sparsity": 0.4},
    {"pattern": "2:4", "method": "sparsegpt"},
    {"method": "gptq"},
    {"method": "rtn"},
    {"method": "wanda", "sparsity": 0.2, "target": "projections"},
)


def rounded(name: str, folder: Path, dtype: torch.dtype, **fields: Any) -> Path:
    """A model that was pruned to these blocks."""
    ignore = [] if name == "mamba2" else ["dt_proj"]  # rows of 4
    source = stock(folder / "dense", MODELS[name]().to(dtype))
    came, report = pruned(source, None, **{"grid": "q4_0", "ignore": ignore, **fields})
    sparsessm.save(came, folder / "m", report)
    return folder / "m"


def changed(source: Path, file: Path, kind: str) -> set[str]:
    """The matrices, by their last name, of which the file has other values than the model."""
    told = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    found = set()
    for name, value in expected(source).items():
        if name.endswith(MATRICES):
            data = read(told[name].data, told[name].tensor_type.name)
            if not np.array_equal(data, value.float().numpy()):
                found.add(name.split(".")[-2])
            elif name != "blk.0.ssm_dt.weight":
                assert told[name].tensor_type in (FORMS[kind.upper()], FORMS.F16), name
    return found


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_what_was_pruned_to_blocks_is_in_the_file_to_the_bit(name: str, how: Any, tmp_path: Path) -> None:
    source = rounded(name, tmp_path, torch.bfloat16, **how)
    done = export(source, tmp_path / "m.gguf", type="q4_0")
    left = {"token_embd", "output"} if how.get("target") else set()
    assert changed(source, done.file, "q4_0") <= left
    assert (done.tensors["blk.0.ssm_in.weight"][0], done.tensors["token_embd.weight"][0]) == ("q4_0", "q4_0")
    whole = export(source, tmp_path / "8.gguf", type="q8_0")  # its codes are among those of wider blocks
    assert changed(source, whole.file, "q8_0") <= left


def test_other_ways_to_the_file(tmp_path: Path) -> None:
    """From a stock checkpoint in float32, and from that packed."""
    source = rounded("mamba2", tmp_path, torch.float32)
    unpack(source, tmp_path / "stock")
    pack(tmp_path / "stock", tmp_path / "packed")
    first = export(source, tmp_path / "m.gguf", type="q4_0").file.read_bytes()
    for name in ("stock", "packed"):
        done = export(tmp_path / name, tmp_path / f"{name}.gguf", type="q4_0")
        assert not changed(source, done.file, "q4_0")
        assert len(done.file.read_bytes()) == len(first)


def test_uniform_grids_of_whole_codes_and_blocks_stay_too(tmp_path: Path) -> None:
    for grid, kind, stays in (
        ("int4:64", "q4_0", True),
        ("int3:32", "q4_0", True),
        ("int4:16", "q4_0", False),
    ):
        source = rounded(
            "mamba2", tmp_path / grid, torch.bfloat16, method="gptq", grid=grid, target="projections"
        )
        done = export(source, tmp_path / f"{grid}.gguf", type=kind)
        assert ("ssm_in" not in changed(source, done.file, kind)) is stays


def test_what_keeps_no_memory_is_finite_beside_blocks(tmp_path: Path) -> None:
    rules = [
        {"targets": ["A_log"], "method": "exact", "sparsity": 0.5},
        {"targets": ["in_proj"], "grid": "q4_0"},
    ]
    source = stock(tmp_path / "dense", MODELS["mamba"]().bfloat16())
    came, report = pruned(source, None, rules=rules)
    sparsessm.save(came, tmp_path / "m", report)
    done = export(tmp_path / "m", tmp_path / "m.gguf", type="q4_0")
    assert "ssm_in" not in changed(tmp_path / "m", done.file, "q4_0")
    (found,) = [t for t in gguf.GGUFReader(done.file).tensors if t.name == "blk.1.ssm_a"]
    assert (found.data < -3e16).mean() > 0.4 and np.isfinite(found.data).all()
