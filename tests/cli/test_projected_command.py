"""Projected states on the command line: pruned, inspected, measured, run, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import FAST as OPTIONS
from command import run
from directories import names, write_stock
from projections import FAST, WORDS, write_dense

import sparsessm
from sparsessm.architectures import projected
from sparsessm.checkpoint import container
from sparsessm.evaluation import before_after

pytestmark = pytest.mark.usefixtures("here")

PRUNE = ["prune", "dense", "--pattern", "structured:state", "--method", "balanced", "--sparsity", "0.5"]


def test_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before_after, "WINDOWS", 2)
    write_dense(Path("dense"))
    before = names(Path())
    told = json.loads(run(*PRUNE, *OPTIONS, "--dry-run", "--json").stdout)
    assert names(Path()) == before
    words = run(*PRUNE, *OPTIONS, "--dry-run").stdout
    assert "balanced" in words and "state" in words
    outcome = run(*PRUNE, *OPTIONS, "-o", "half")
    assert "only sparsessm can load" in " ".join(outcome.stdout.split())
    assert container.PACKED in names(Path("half"))
    model = sparsessm.load("half").model
    assert told["parameters"]["after"] is None and told["axes"]["state"]["after"] == 4

    facts = json.loads(run("inspect", "half", "--json").stdout)
    kinds = {name for name in facts["tensors"] if "projection" in name}
    assert len(kinds) == 2
    gone = [model.config.state_size - r for r in projected.directions_of(model).values()]
    groups = model.config.n_groups
    counted = {f"backbone.layers.{i}.state": count * groups for i, count in enumerate(gone)}
    assert facts["removed"] == counted, "counted in the tensors"
    assert "balanced" in run("inspect", "half").stdout

    found = json.loads(run("eval", "half", "--data", "text.txt", "--length", "16", "--json").stdout)
    expected = sparsessm.evaluate(sparsessm.load("half"), "text.txt", length=16)
    (row,) = found["models"]
    assert row["nll"] == pytest.approx(expected.nll, rel=1e-5) and row["windows"] == expected.windows

    text = run("generate", "half", "the state", "-n", "8", "--temperature", "0").stdout
    assert text.strip()
    refused = run("unpack", "half", "-o", "stock", "--quiet", code=1)
    assert refused.stderr.startswith("error: ") and "projected states" in refused.stderr
    assert not Path("stock").exists()
    run("pack", "half", "-o", "small", "--dtype", "bf16", "--quiet")
    again = run("prune", "half", "-o", "more", *PRUNE[2:], *OPTIONS, "--quiet", code=1)
    assert again.stderr.startswith("error: ") and "projected already" in again.stderr
    assert not Path("more").exists()


def test_a_record_that_says_more_than_the_tensors_is_refused() -> None:
    write_dense(Path("dense"))
    for name, share in (("half", 0.5), ("little", 0.2)):
        model = sparsessm.load("dense")
        report = sparsessm.prune(
            model, **FAST, pattern="structured:state", method="balanced", sparsity=share, measure=False
        )
        sparsessm.save(model, name, report)
    shutil.copy("little/packed.safetensors", "half/packed.safetensors")
    line = run("inspect", "half", code=1).stderr
    assert line.startswith("error: half/pruning.json does not fit the tensors") and ".state has" in line


def test_stock_code_does_not_save_what_it_cannot_say() -> None:
    write_dense(Path("dense"))
    config = Path("dense/config.json").read_bytes()
    model = sparsessm.load("dense")
    sparsessm.save(model, "half", sparsessm.prune(model, **FAST, **WORDS, measure=False))
    with pytest.raises(ValueError, match=r"save it with sparsessm\.save"):
        model.model.save_pretrained("stock")
    assert not Path("stock").exists() and Path("half/config.json").read_bytes() == config


def test_int8_is_not_undone_by_packing_again() -> None:
    write_dense(Path("dense"))
    model = sparsessm.load("dense")
    sparsessm.save(model, "half", sparsessm.prune(model, **FAST, **WORDS, measure=False))
    run("pack", "half", "-o", "small", "--dtype", "int8", "--quiet")
    assert "is already in int8" in run("pack", "small", "-o", "again", code=1).stderr


def test_the_command_line_refuses_other_models_before_any_work() -> None:
    write_stock(Path("dense"))
    line = run(*PRUNE, *OPTIONS, "-o", "out", "--quiet", code=1).stderr
    assert line.startswith("error: method 'balanced' projects the states of Mamba-2 models; this is")
    assert line.count("\n") == 1 and not Path("out").exists()
