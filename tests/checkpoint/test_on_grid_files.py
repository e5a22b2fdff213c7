"""Results on a grid on the disk: what was measured is what is read, whoever reads it, and nothing is larger
than it says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from whereabouts import MODELS, NOTHING, TOKENS, pruned, same, values, written

import sparsessm
from sparsessm import Run, kernels, runtime
from sparsessm.checkpoint import Streaming, load, packed, unfinished, unpack
from sparsessm.checkpoint.coded import Coded
from sparsessm.checkpoint.stacked import matrices_of
from sparsessm.evaluation.perplexity import measure
from sparsessm.kernels import entropy
from sparsessm.methods import dial
from sparsessm.report.record import Report

GRIDS: tuple[dict[str, Any], ...] = (
    {"bits": 3.5},
    {"bits": 8.0},
    {"grid": "int4:16"},
    {"grid": "int3", "sparsity": 0.5},
    {"grid": "int8:7", "sparsity": 0.3},
    {"method": "gptq", "grid": "int4"},
    {"method": "rtn", "grid": "int2"},
)
LINEAR: dict[str, Any] = {"target": "projections"}
WHOLE: dict[str, Any] = {"target": "matrices"}
PURE = ("mamba", "falcon_mamba", "mamba2")


def saved(source: Path, out: Path, streaming: Streaming | None = None, **fields: Any) -> Report:
    checkpoint = load(source, streaming=streaming)
    report = Run(checkpoint, length=40, **LINEAR | fields).prune(TOKENS, measure=False)
    sparsessm.save(checkpoint, out, report)
    return report


@pytest.mark.parametrize("fields", GRIDS, ids=str)
@pytest.mark.parametrize("name", PURE)
def test_what_is_read_has_the_bits_of_what_was_pruned(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    source, out = written(name, tmp_path / "m", torch.bfloat16), tmp_path / "out"
    checkpoint, report = pruned(source, None, **LINEAR | fields)
    sparsessm.save(checkpoint, out, report)
    for streaming in (None, NOTHING):
        again = load(out, streaming=streaming)
        assert same(values(again), values(checkpoint)) and again.stored == checkpoint.stored
    assert measure(again.architecture(), TOKENS, 1) == measure(checkpoint.architecture(), TOKENS, 1)


@pytest.mark.parametrize("fields", GRIDS, ids=str)
@pytest.mark.parametrize("name", PURE)
def test_the_file_takes_the_bits_that_the_record_says(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Of codes of a fixed width, a start of 8 bytes and at most three broken bytes for every 16 rows more."""
    source, out = written(name, tmp_path / "m", torch.bfloat16), tmp_path / "out"
    report = saved(source, out, **fields)
    tensors = packed.read(out).tensors
    for row in report.rows:
        tensor = tensors[row.target]
        assert isinstance(tensor, Coded) and row.bits is not None
        groups = -(-tensor.shape[0] // 16)
        spare = 8 * tensor.nbytes - row.bits
        assert tensor.kind != "ans" or not spare
        starts = 0 if tensor.kind in ("int", "odd") else 64 * (groups + 1)
        assert 0 <= spare <= starts + 8 * tensor.shape[0] + 8 * groups
    assert {name for name, tensor in tensors.items() if isinstance(tensor, Coded)} == set(report.levels)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mamba", GRIDS[0]),
        ("mamba", GRIDS[3]),
        ("mamba", GRIDS[0] | WHOLE),
        ("falcon_mamba", GRIDS[0] | WHOLE),  # whose embedding is not tied
    ],
    ids=str,
)
def test_streamed_and_resumed_runs_write_the_same_file(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    source = written(name, tmp_path / "m", torch.bfloat16)
    saved(source, tmp_path / "whole", **fields)
    saved(source, tmp_path / "streamed", NOTHING, **fields)
    done = 0

    def stopped(stage: str, step: int, total: int, block: str) -> None:
        nonlocal done
        done += stage == "calibrate"
        if done == 9:  # in the second block
            raise KeyboardInterrupt

    for resume in (False, True):
        with unfinished(tmp_path / "cut", resume=resume) as journal:
            checkpoint = load(source, streaming=Streaming(1, journal.folder))
            journal.holds(checkpoint.residence)
            how = {"journal": journal, "progress": None if resume else stopped}
            run = Run(checkpoint, length=40, **LINEAR | how | fields)
            if not resume:
                with pytest.raises(KeyboardInterrupt):
                    run.prune(TOKENS, measure=False)
                continue
            assert journal.resumed
            sparsessm.save(checkpoint, tmp_path / "cut", run.prune(TOKENS, measure=False))
    files = [(tmp_path / name / "packed.safetensors").read_bytes() for name in ("whole", "streamed", "cut")]
    assert files[0] == files[1] == files[2]


def test_codes_are_coded_once_and_kept_as_the_file_has_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done = []

    def encode(codes: Any, encode: Any = entropy.encode) -> Any:
        done.append(codes.shape)
        return encode(codes)

    monkeypatch.setattr(entropy, "encode", encode)
    monkeypatch.setattr(dial, "coded_bits", lambda codes: 3.0 * codes.numel())  # of the dense model
    checkpoint, report = pruned(written("mamba", tmp_path / "m"), None, **WHOLE, bits=3.25)
    sparsessm.save(checkpoint, tmp_path / "out", report)
    assert len(done) == len(report.levels) == len(report.rows)
    tensors = packed.read(tmp_path / "out").tensors
    for name, kept in report.levels.items():
        assert all(torch.equal(array, tensors[name].arrays[part]) for part, array in kept.arrays.items())
    held = sum(array.nbytes for kept in report.levels.values() for array in kept.arrays.values())
    assert held < 0.5 * sum(row.total for row in report.rows)


@pytest.mark.parametrize("name", PURE)
def test_the_runtime_computes_with_what_was_saved(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where codes are multiplied inputs are rounded, but not by the definition."""
    for how in ({"bits": 4.0}, {"grid": "int4"}):
        source, out = written(name, tmp_path / "m"), tmp_path / "out"
        saved(source, out, **how)
        stock, ids = load(out).model, TOKENS[0]
        with torch.no_grad():
            want = stock(ids[None]).logits[0]
        got = runtime.load(out).logits(ids.tolist())
        assert float((got - want).norm() / want.norm()) < 0.05
        monkeypatch.setattr(kernels, "NATIVE", False)
        got = runtime.load(out).logits(ids.tolist())
        monkeypatch.undo()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def test_unpacked_it_is_a_stock_checkpoint_in_the_stored_dtype(tmp_path: Path) -> None:
    source, out = written("mamba", tmp_path / "m", torch.bfloat16), tmp_path / "out"
    saved(source, out, bits=4.0)
    told = unpack(out, tmp_path / "stock")
    words = r"(\d) matrices were rounded to bfloat16, which changes their values by 0\.[12]\d% at most.*"
    assert (match := re.fullmatch(words, told)) and 1 <= int(match[1]) <= 8
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype="auto").state_dict()
    for name, value in load(out).model.state_dict().items():
        assert torch.equal(stock[name], value.to(stock[name].dtype)), name
    assert stock["backbone.layers.0.mixer.in_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", sorted({*MODELS} - {*PURE}))
def test_hybrids_are_saved_and_read_with_their_experts(name: str, tmp_path: Path) -> None:
    """Experts lie in one tensor, of which a file holds each matrix as the codes that it has."""
    source, out = written(name, tmp_path / "m", torch.bfloat16), tmp_path / "out"
    checkpoint, report = pruned(source, None, **LINEAR | {"bits": 4.0})
    sparsessm.save(checkpoint, out, report)
    for streaming in (None, NOTHING):
        again = load(out, streaming=streaming)
        assert same(values(again), values(checkpoint)) and again.stored == checkpoint.stored
    tensors, targets = packed.read(out).tensors, checkpoint.architecture().targets
    bits = {row.target: row.bits for row in report.rows}
    for target in targets:
        if target.slice is not None:
            found = list(matrices_of(tensors[target.name.rpartition(".")[0]]))[target.slice]
            assert isinstance(found, Coded) and 8 * found.nbytes == bits[target.name]
    spent = [(row.bits, row.total) for row in report.rows if row.bits is not None]
    assert sum(b for b, _ in spent) / sum(total for _, total in spent) == pytest.approx(4.0, rel=0.03)


@pytest.mark.parametrize(
    "spoil", [lambda weight: weight.add_(1e-3), lambda weight: weight[0].zero_()], ids=["moved", "zeroed"]
)
def test_a_matrix_that_was_changed_since_is_refused(spoil: Callable[[Any], Any], tmp_path: Path) -> None:
    checkpoint, report = pruned(written("mamba", tmp_path / "m"), None, target="projections", grid="int4")
    name = "backbone.layers.1.mixer.in_proj.weight"
    with torch.no_grad():
        spoil(checkpoint.model.get_parameter(name))
    with pytest.raises(ValueError, match=f"{name} was changed since it was put on its grid"):
        sparsessm.save(checkpoint, tmp_path / "out", report)
    assert not (tmp_path / "out").exists()


assert set(PURE) <= MODELS.keys()
