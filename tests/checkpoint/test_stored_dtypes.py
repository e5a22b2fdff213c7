"""What a checkpoint's dtypes can hold: weights refused at load, values where they arise, A_log in float16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2, pico_tokenizer
from pico_hybrids import pico_hybrid
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import sparsessm
from sparsessm import checkpoint, kernels, runtime
from sparsessm.architectures import REMOVED_A_LOG_FLOAT16, adapt, removed_a_log
from sparsessm.architectures.target import rounded
from sparsessm.cli import app

DTYPES = ["int64", "int32", "uint8", "bool", "complex64", "float64", "float8_e4m3fn", "float8_e5m2"]
MODELS = {
    "mamba": pico_mamba,
    "falcon_mamba": pico_falcon_mamba,
    "mamba2": pico_mamba2,
    "jamba": lambda: pico_hybrid("jamba"),
    "bamba": lambda: pico_hybrid("bamba"),
}
FAST: dict[str, Any] = {"samples": 2, "length": 32}


def stock(path: Path, model: Any) -> Path:
    model.save_pretrained(path)
    pico_tokenizer().save_pretrained(path)
    return path


def texts(tmp_path: Path) -> str:
    from pico import TEXT

    (tmp_path / "text.txt").write_text(TEXT * 20)
    return str(tmp_path / "text.txt")


def in_dtype(folder: Path, dtype: torch.dtype, *, but: str = "nothing") -> None:
    file = folder / "model.safetensors"
    tensors = {name: t if but in name else t.to(dtype) for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


# ------------------------------------------------------------------------------------------ at load


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["mixer.D", "A_log", "in_proj.weight", "embeddings.weight", "conv1d.bias"])
def test_weights_that_cannot_hold_a_result_are_refused_by_name(
    tmp_path: Path, dtype: str, kind: str, form: str
) -> None:
    folder = stock(tmp_path / "in", pico_mamba())
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(kind))
    tensors[name] = tensors[name].to(getattr(torch, dtype))
    if form == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = rf"cannot hold the result: {name} {dtype}; allowed: float32, bfloat16, float16$"
    with pytest.raises(ValueError, match=words):
        sparsessm.load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_may_be_stored_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = stock(tmp_path / "in", pico_mamba())
    in_dtype(folder, dtype)
    sparsessm.save(sparsessm.load(folder), tmp_path / "out")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)


# ------------------------------------------------------------------------------------------ in the run


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(-7e4, 7e4, width=32), min_size=1, max_size=8))
def test_rounding_to_float16_is_that_of_numpy_or_refused(values: list[float]) -> None:
    with np.errstate(over="ignore"):
        expected = np.array(values, np.float32).astype(np.float16)
    tensor = torch.tensor(values)
    if np.isfinite(expected).all():
        assert torch.equal(rounded(tensor, torch.float16), torch.from_numpy(expected))
    else:
        with pytest.raises(ValueError, match=r"does not fit float16, .*\(largest: 65504\); store the model"):
            rounded(tensor, torch.float16)


def test_a_repaired_value_that_overflows_is_named_in_the_run(tmp_path: Path) -> None:
    """D is at the end of float16, and its refit would move it on: the model is told apart before the save."""
    folder = stock(tmp_path / "in", pico_mamba())
    in_dtype(folder, torch.float16)
    came = sparsessm.load(folder)
    with torch.no_grad():
        for name, parameter in came.model.named_parameters():
            if name.endswith("mixer.D"):
                parameter.fill_(65504.0)
            if name.endswith("x_proj.weight"):
                parameter.mul_(1000.0)
    with pytest.raises(
        ValueError, match=r"layers\.\d\.mixer\.A_log: a repaired value of .* does not fit float16"
    ):
        sparsessm.prune(came, target="ssm", data=texts(tmp_path), **FAST, measure=False)


def test_a_matrix_that_overflows_is_refused(tmp_path: Path) -> None:
    came = sparsessm.load(stock(tmp_path / "in", pico_mamba()))
    stored = dict.fromkeys(came.stored, torch.float16)
    target = next(t for t in adapt(came.model, stored).targets if t.kind == "out_proj")
    before = target.matrix.clone()
    with pytest.raises(ValueError, match="a repaired value of 7e\\+04 does not fit float16"):
        target.replace(torch.full_like(before, 7e4))
    assert torch.equal(target.matrix, before)


# ------------------------------------------------------------------------------------------ A_log in float16


def test_the_value_in_float16_is_memoryless_and_stays_finite() -> None:
    value = REMOVED_A_LOG_FLOAT16["memoryless"]
    half = torch.tensor(value, dtype=torch.float16)
    a = -torch.exp(half)
    assert float(half) == value and torch.isfinite(a)
    assert np.isfinite(-np.exp(np.float16(value)))
    assert torch.isfinite(a * 1.05)  # an exp that is not rounded to the nearest
    delta = torch.tensor([3e-4, 1e-3, 1.0], dtype=torch.float32)
    assert bool((torch.exp(delta * a.float()) < 2.0**-24).all())  # nothing that a float32 sum would see
    assert removed_a_log(torch.bfloat16) == removed_a_log(torch.float32) != removed_a_log(torch.float16)


def a_logs(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.endswith("A_log")}


@pytest.mark.parametrize("name", MODELS)
def test_removed_entries_of_float16_files_stay_finite_through_exp(tmp_path: Path, name: str) -> None:
    folder = stock(tmp_path / "in", MODELS[name]())
    in_dtype(folder, torch.float16)
    came = sparsessm.load(folder)
    report = sparsessm.prune(came, target="ssm", data=texts(tmp_path), **FAST, measure=False)
    sparsessm.save(came, tmp_path / "out", report)
    found = a_logs(tmp_path / "out")
    assert found
    for row in report.rows:
        entries = next(t for n, t in found.items() if n.endswith(row.target.partition("layers.")[2]))
        assert entries.dtype == torch.float16 and torch.isfinite(-torch.exp(entries)).all()
        assert int((entries == 11).sum()) == row.pruned > 0
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--json"])
    counted = json.loads(done.stdout)["removed"]
    assert counted == {row.target: row.pruned for row in report.rows}


def test_the_dtype_of_the_tensor_counts_not_that_of_the_file(tmp_path: Path) -> None:
    folder = stock(tmp_path / "in", pico_mamba())
    in_dtype(folder, torch.float16, but="layers.1.mixer.A_log")
    came = sparsessm.load(folder)
    sparsessm.save(
        came, tmp_path / "out", sparsessm.prune(came, target="ssm", method="magnitude", measure=False)
    )
    values = {name: float(tensor.max()) for name, tensor in a_logs(tmp_path / "out").items()}
    assert sorted(values.values()) == [11.0, 38.0]
    assert values["backbone.layers.1.mixer.A_log"] == 38.0


def test_what_was_removed_before_stays_removed_and_is_counted(tmp_path: Path) -> None:
    folder = stock(tmp_path / "in", pico_mamba())
    in_dtype(folder, torch.float16)
    came = sparsessm.load(folder)
    first = sparsessm.prune(came, target="ssm", sparsity=0.25, method="magnitude", measure=False)
    sparsessm.save(came, tmp_path / "out", first)
    again = sparsessm.load(tmp_path / "out")
    second = sparsessm.prune(again, target="ssm", sparsity=0.5, data=texts(tmp_path), **FAST, measure=False)
    sparsessm.save(again, tmp_path / "twice", second)
    for name, tensor in a_logs(tmp_path / "out").items():
        assert bool((a_logs(tmp_path / "twice")[name][tensor == 11] == 11).all())
    total = sum(tensor.numel() for tensor in a_logs(tmp_path / "out").values())
    assert sum(row.pruned for row in second.rows) == total // 2


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_packed_and_run_without_the_states_that_forget(tmp_path: Path, name: str) -> None:
    folder = stock(tmp_path / "in", MODELS[name]())
    in_dtype(folder, torch.float16)
    came = sparsessm.load(folder)
    sparsessm.save(
        came, tmp_path / "out", sparsessm.prune(came, target="ssm", method="magnitude", measure=False)
    )
    done = checkpoint.pack(tmp_path / "out", tmp_path / "packed")
    for part, tensor in done.tensors.items():
        if part.endswith("A_log"):
            assert tensor.dtype == torch.float16 and tensor.removed in (0.0, 11.0)
    checkpoint.unpack(tmp_path / "packed", tmp_path / "back")
    for part, tensor in a_logs(tmp_path / "out").items():
        assert torch.equal(a_logs(tmp_path / "back")[part], tensor)
    dense, found = runtime.load(folder), runtime.load(tmp_path / "packed")
    ids = list(range(1, 40))
    with torch.inference_mode():
        expected = sparsessm.load(tmp_path / "out").model(torch.tensor([ids])).logits[0]
    assert float((found.logits(ids) - expected).abs().max() / expected.abs().max()) < 1e-4
    if kernels.NATIVE:
        assert found.engine.state_size < dense.engine.state_size
