"""`sparsessm inspect`: what is removed is counted in the tensors, and held against the record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command import FAST, new_python, refused, run
from safetensors.torch import load_file, save_file

from sparsessm.architectures import REMOVED_A_LOG

pytestmark = pytest.mark.usefixtures("here")

A_LOG = "backbone.layers.{}.mixer.A_log"
LINEAR = "backbone.layers.{}.mixer.{}.weight"
KINDS = ("in_proj", "x_proj", "dt_proj", "out_proj")


@pytest.mark.parametrize("removed", REMOVED_A_LOG)
def test_inspect_counts_in_the_tensors(removed: str) -> None:
    line = ["--method", "magnitude", "--removed", removed, "--sparsity", "0.25", "--target", "ssm"]
    run("prune", "dense", "-o", "out", "--no-eval", "--quiet", *line, *FAST)
    document = json.loads(run("inspect", "out", "--json").stdout)
    assert document["removed"] == {A_LOG.format(0): 64, A_LOG.format(1): 64}
    assert document["tensors"]["A_log"] == {"bytes": 2 * 256 * 4, "dtypes": ["float32"], "bits": 32}
    sizes = sum(tensor.nbytes for tensor in load_file("out/model.safetensors").values())
    assert sum(kind["bytes"] for kind in document["tensors"].values()) == sizes
    assert document["record"]["recipe"]["removed"] == removed
    text = run("inspect", "out").stdout
    assert f"{sizes:,} bytes of tensors" in text
    assert "25.00 %" in text


def test_inspect_finds_tensors_that_are_not_those_of_the_record() -> None:
    line = ["--method", "magnitude", "--target", "ssm", *FAST]
    run("prune", "dense", "-o", "out", "--no-eval", "--quiet", *line)
    tensors = load_file("out/model.safetensors")
    flat = tensors[A_LOG.format(1)].view(-1)
    flat[(flat == REMOVED_A_LOG["memoryless"]).nonzero()[0]] = 1.0
    save_file(tensors, "out/model.safetensors", {"format": "pt"})
    words = f"{A_LOG.format(1)} has 128 removed entries, but the tensor has 127"
    assert words in refused("inspect", "out")


@pytest.mark.parametrize("removed", REMOVED_A_LOG)
def test_inspect_of_a_model_pruned_twice(removed: str) -> None:
    more = ["--no-eval", "--quiet", "--target", "ssm", "--removed", removed, *FAST]
    run("prune", "dense", "-o", "once", "--method", "random", "--sparsity", "0.5", *more)
    run("prune", "once", "-o", "twice", "--method", "random", "--sparsity", "0.25", "--seed", "5", *more)
    document = json.loads(run("inspect", "twice", "--json").stdout)
    assert document["record"]["recipe"]["model"] == "once"
    for row in document["record"]["targets"]:
        assert row["pruned"] == 128  # what the first run removed is gone too
        assert document["removed"][row["target"]] >= 128  # those of the first run are still removed


def test_an_entry_that_had_the_removed_value_before_is_no_fault(shelf: Path) -> None:
    shutil.copytree(shelf / "dense", "started")
    tensors = load_file("started/model.safetensors")
    tensors[A_LOG.format(0)][:, 0] = 0.0  # A = -1 in the first state, as models start
    save_file(tensors, "started/model.safetensors", {"format": "pt"})
    line = ["--method", "random", "--removed", "unit", "--sparsity", "0.1", "--no-eval", "--quiet"]
    run("prune", "started", "-o", "out", "--target", "ssm", *line)
    document = json.loads(run("inspect", "out", "--json").stdout)
    assert document["removed"][A_LOG.format(0)] >= 32
    assert "counted again" in run("inspect", "out").stdout


def test_inspect_of_linear_layers_counts_zeros() -> None:
    line = ["--target", "projections", "--method", "sparsegpt", "--sparsity", "0.25", *FAST]
    run("prune", "dense", "-o", "out", "--no-eval", "--quiet", *line)
    document = json.loads(run("inspect", "out", "--json").stdout)
    rows = {row["target"]: row for row in document["record"]["targets"]}
    assert rows.keys() == {LINEAR.format(layer, kind) for layer in range(2) for kind in KINDS}
    for name, row in rows.items():
        assert document["removed"][name] == row["pruned"], name
        assert (row["removed"], row["repair"], row["damping"]) == ("zero", "self", 0.01)
    text = "".join(run("inspect", "out").stdout.split())
    assert all(name in text for name in rows)  # each target, where `prune` has a line a kind
    assert "sparsegpt,unstructured" in text and "allprojections" in text
    tensors = load_file("out/model.safetensors")
    name = LINEAR.format(1, "x_proj")
    flat = tensors[name].view(-1)
    flat[flat != 0] = torch.where(torch.arange(int((flat != 0).sum())) < 3, 0.0, flat[flat != 0])
    save_file(tensors, "out/model.safetensors", {"format": "pt"})
    document = json.loads(run("inspect", "out", "--json").stdout)
    assert document["removed"][name] == rows[name]["pruned"] + 3  # weights that are zero by themselves
    flat[(flat == 0).nonzero()[:4, 0]] = 1.0
    save_file(tensors, "out/model.safetensors", {"format": "pt"})
    words = (
        f"{name} has {rows[name]['pruned']} removed entries, but the tensor has {rows[name]['pruned'] - 1}"
    )
    assert words in refused("inspect", "out")


def test_inspect_of_a_dense_model() -> None:
    assert "no pruning.json" in run("inspect", "dense").stdout
    document = json.loads(run("inspect", "dense", "--json").stdout)
    assert (document["record"], document["removed"]) == (None, {})


def test_inspect_of_a_hub_id_reads_the_record_that_came_with_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = here / "hub/models--some--pruned/snapshots/0123abc"
    snapshot.parent.mkdir(parents=True)
    run("prune", "dense", "-o", str(snapshot), "--no-eval", "--quiet", "--method", "magnitude", *FAST)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0123abc")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    offline = {"HF_HOME": str(here), "HF_HUB_OFFLINE": "1"}
    done = new_python("-m", "sparsessm", "inspect", "some/pruned", "--json", **offline)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["record"]["recipe"]["method"] == "magnitude"


def test_inspect_says_what_a_packed_file_takes() -> None:
    run("prune", "dense", "-o", "few", "--bits", "4", "--target", "matrices", "--no-eval", "--quiet", *FAST)
    document = json.loads(run("inspect", "few", "--json").stdout)
    sizes = {kind: found["bytes"] for kind, found in document["tensors"].items()}
    arrays = load_file("few/packed.safetensors")
    assert sum(sizes.values()) == sum(array.nbytes for array in arrays.values())
    part = sum(array.nbytes for name, array in arrays.items() if ".in_proj." in name)
    assert sizes["in_proj"] == part
    entries = sum(row["total"] for row in document["record"]["targets"] if "in_proj" in row["target"])
    assert document["tensors"]["in_proj"]["bits"] == pytest.approx(8 * part / entries)
    lines = run("inspect", "few").stdout.splitlines()
    (outer,) = (line for line in lines if "embedding and head" in line)
    assert f"{sizes['embeddings'] + sizes.get('lm_head', 0):,}" in outer


@pytest.mark.parametrize("target", ["matrices", "projections"])
def test_a_dry_run_says_the_same_halves(target: str) -> None:
    """Where both are on the dial their sum is known, and the dry run says so."""
    line = ["prune", "dense", "--bits", "4", "--target", target, "--no-eval", *FAST]
    foretold = json.loads(run(*line, "--dry-run", "--json").stdout)["bytes"]
    halves, sizes = foretold["halves"], {}
    assert halves["vocabulary"]["bytes"] + halves["body"]["bytes"] == foretold["packed"]
    assert halves["vocabulary"]["bits"] == (4 if target == "matrices" else 32)
    assert foretold["even"] == (target == "matrices")
    lines = run(*line, "--dry-run").stdout.splitlines()
    run(*line, "-o", target, "--quiet")
    seen = run("inspect", target).stdout.splitlines()
    for name, half in (("embedding and head", "vocabulary"), ("all others", "body")):
        (told,), (found,) = ([one for one in text if name in one] for text in (lines, seen))
        cells = [cell.strip() for cell in told.strip("│ ").split("│")]
        assert foretold["even"] == cells[0].endswith(", if bits were shared evenly")
        assert cells[1] == f"{halves[half]['bytes']:,}" and cells[3] == f"{halves[half]['bits']:.3g}"
        sizes[half] = int(found.strip("│ ").split("│")[2].replace(",", ""))
    assert sum(sizes.values()) == pytest.approx(foretold["packed"], rel=0.05)
    if target == "projections":
        assert sizes == {half: pytest.approx(halves[half]["bytes"], rel=0.05) for half in halves}
