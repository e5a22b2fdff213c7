"""analyze: cells against brute force on stock models, interruptions, the file, what is printed and drawn."""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import command
import pytest
import torch
from pico import TEXT, pico_mamba, pico_tokenizer
from planned import prune
from torch import Tensor, nn
from torch.nn import functional as F

import sparsessm
from sparsessm.architectures import adapt
from sparsessm.pruning import entries
from sparsessm.recipe.recipe import Recipe
from sparsessm.recipe.rules import assign
from sparsessm.studies import cells as measuring
from sparsessm.studies import findings, tolerance
from sparsessm.studies.cells import Cell, measure
from sparsessm.studies.tolerance import Analysis, analyze

pytestmark = pytest.mark.usefixtures("here")

SPARSITIES = [0.25, 0.6]
SMALL: dict[str, Any] = {"data": "text.txt", "samples": 3, "windows": 3, "length": 16}
FAST = ["--data", "text.txt", "--samples", "3", "--windows", "3", "--length", "16"]
CELLS = 2 * 5 * 3  # layers, kinds, sparsities


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and a text."""
    folder = tmp_path_factory.mktemp("shelf")
    pico_mamba().save_pretrained(folder / "dense")
    other = pico_mamba()
    with torch.no_grad():
        other.backbone.layers[0].mixer.out_proj.weight[0, 0] += 1e-3
    other.save_pretrained(folder / "other")
    for name in ("dense", "other"):
        pico_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text(" ".join(random.Random(0).choices(TEXT.split(), k=4000)))
    return folder


def tokens(windows: int, seed: int) -> Tensor:
    return torch.randint(64, (windows, 24), generator=torch.Generator().manual_seed(seed))


def recipe(**fields: Any) -> Recipe:
    return Recipe(allocation="uniform", length=24, **fields)


def alone(cell: Cell, price: str) -> Recipe:
    """What prunes one matrix of the model, and nothing else."""
    repair = {} if cell.kind == "A_log" else {"repair": "self"}
    return recipe(rules=[{"targets": [cell.target]}], sparsity=cell.sparsity, price=price, **repair)


def rules_of(model: nn.Module, calibration: Tensor, price: str) -> Mapping[str, Any]:
    architecture = adapt(model)
    rules = assign(recipe(price=price, repair="self"), architecture.targets).rules
    return entries.priced(architecture, rules, calibration, None)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def divergence(dense: Tensor, pruned: Tensor) -> float:
    """Mean over tokens of KL(dense || pruned), of logits, by its definition."""
    p, q = (F.softmax(logits.double(), -1) for logits in (dense, pruned))
    return float((p * (p.log() - q.log())).sum(-1).mean())


@pytest.mark.parametrize("price", ["none", "fisher"])
@pytest.mark.parametrize("batch", [24, 48, 1000], ids=lambda tokens: f"batches of {tokens}")
def test_every_cell_is_what_a_stock_model_with_that_matrix_pruned_does(
    price: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "BATCH", batch)
    monkeypatch.setattr(measuring, "LOGITS", 7)
    model, calibration, held_out = pico_mamba(), tokens(4, 1), tokens(3, 2)
    before = weights(model)
    rules = rules_of(model, calibration, price)
    cells = sum(measure(adapt(model), rules, SPARSITIES, calibration, held_out), start=[])
    assert same(before, model.state_dict())
    assert [(cell.target, cell.sparsity) for cell in cells] == [(n, s) for n in rules for s in SPARSITIES]
    with torch.no_grad():
        dense = model(held_out).logits
    for cell in cells:
        pruned = copy.deepcopy(model)
        (row,) = prune(adapt(pruned), alone(cell, price), calibration).rows
        with torch.no_grad():
            expected = divergence(dense, pruned(held_out).logits)
        assert cell.kl == pytest.approx(expected, rel=2e-3, abs=1e-9), cell
        assert cell.kl > 0
        assert (cell.entries, cell.pruned) == (row.total, row.pruned)
        assert (cell.layer, cell.family) == (row.layer, row.family)


def inputs_of(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """Parameter name -> what the stock model feeds to that linear layer, (W, L, in) float64."""
    found: dict[str, Tensor] = {}

    def keep(name: str, inputs: Any, output: Tensor) -> None:
        found[f"{name}.weight"] = inputs[0].double()
        if name.endswith("x_proj"):  # the stock mixer multiplies by dt_proj's weight without calling it
            rank = model.config.time_step_rank
            found[f"{name.removesuffix('x_proj')}dt_proj.weight"] = output[..., :rank].double()

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: keep(name, inputs, output))
        for name, module in linear.items()
    ]
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    return found


def test_errors_are_those_of_the_outputs() -> None:
    model, calibration = pico_mamba(), tokens(4, 1)
    inputs = inputs_of(model, calibration)
    rules = rules_of(model, calibration, "fisher")
    cells = sum(measure(adapt(model), rules, SPARSITIES, calibration, tokens(1, 2)), start=[])
    for cell in cells:
        if cell.family == "ssm":
            assert cell.cost == cell.error > 0
            continue
        pruned, seen = copy.deepcopy(model), inputs[cell.target]
        prune(adapt(pruned), alone(cell, "fisher"), calibration)
        weight = model.state_dict()[cell.target].double()
        change = pruned.state_dict()[cell.target] - weight
        energy = (seen @ change.T).square().mean((0, 1))  # (out,)
        assert cell.error == pytest.approx(float(energy.sum()), rel=1e-3)
        assert cell.cost == pytest.approx(float(energy @ rules[cell.target].prices), rel=1e-3)
        signal = (seen @ weight.T).square().mean((0, 1)).sum()
        assert cell.signal == pytest.approx(float(signal), rel=1e-3)


def test_nothing_removed_changes_nothing() -> None:
    found = analyze(sparsessm.load("dense"), sparsities=[0.0], **SMALL)
    assert len(found.cells) == 10
    assert {cell.kl for cell in found.cells} == {0.0}
    assert {cell.pruned for cell in found.cells} == {0}
    assert findings.summary(found)["kinds"]["in_proj"]["tolerates"] == 0.0
    findings.draw(found, Path("zero.png"))


def test_progress_ends_where_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "BATCH", 16)
    calls: list[tuple[str, int, int, str]] = []
    analyze(sparsessm.load("dense"), price="none", progress=lambda *call: calls.append(call), **SMALL)
    assert {stage for stage, _, _, _ in calls} == {"analyze"}
    steps = [done for _, done, _, _ in calls]
    assert steps == sorted(steps)
    assert steps[-1] == calls[0][2] == calls[-1][2]
    assert max(after - before for before, after in zip(steps, steps[1:], strict=False)) < calls[0][2] / 20


class Stop(Exception):
    """What ends a run in the middle."""


def stopping(at: int) -> Any:
    """A progress that gives up after so many calls."""
    calls = 0

    def progress(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Stop

    return progress


@pytest.mark.parametrize("at", [1, 8, 14])
def test_an_interrupted_run_goes_on_where_it_stopped(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = sparsessm.load("dense")
    before, whole = weights(checkpoint.model), analyze(checkpoint, **SMALL)
    with pytest.raises(Stop):
        analyze(checkpoint, out="out", progress=stopping(at), **SMALL)
    assert same(before, checkpoint.model.state_dict())
    kept = tolerance.read("out")
    assert len(kept.cells) < kept.expected == CELLS
    assert json.loads(Path("out/analysis.json").read_text())["complete"] is False
    worked = counted(monkeypatch)
    found = analyze(checkpoint, out="out", **SMALL)
    assert len(worked) == CELLS - len(kept.cells)
    assert found.cells[: len(kept.cells)] == kept.cells
    assert len(found.cells) == CELLS
    for cell, expected in zip(found.cells, whole.cells, strict=True):
        assert cell.target == expected.target
        assert numbers(cell) == pytest.approx(numbers(expected), rel=1e-6)
    assert json.loads(Path("out/analysis.json").read_text())["complete"] is True
    worked.clear()
    assert analyze(checkpoint, out="out", **SMALL).cells == found.cells
    assert not worked


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every matrix that is pruned from now on."""
    worked: list[Any] = []
    solve = measuring.solve
    monkeypatch.setattr(measuring, "solve", lambda *what: worked.append(what) or solve(*what))
    return worked


def numbers(cell: Cell) -> list[float]:
    return [cell.sparsity, cell.entries, cell.pruned, cell.kl, cell.error, cell.signal, cell.cost]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"seed": 1}, "seed 0, now 1"),
        ({"sparsities": [0.3, 0.5]}, "sparsities"),
        ({"windows": 2}, "held_out"),
        ({"samples": 2}, "calibration"),
        ({"price": "none"}, "price none"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_file_of_other_settings_is_not_continued(changed: dict[str, Any], word: str) -> None:
    checkpoint = sparsessm.load("dense")
    analyze(checkpoint, out="out", **SMALL)
    text = Path("out/analysis.json").read_text()
    with pytest.raises(
        ValueError, match=f"out/analysis.json was measured with other settings.*{word}.*--force"
    ):
        analyze(checkpoint, out="out", **{**SMALL, **changed})
    assert Path("out/analysis.json").read_text() == text
    found = analyze(checkpoint, out="out", force=True, **{**SMALL, **changed})
    assert tolerance.read("out").cells == found.cells


def test_a_file_of_another_model_is_not_continued_but_a_moved_model_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = analyze(sparsessm.load("dense"), out="out", **SMALL)
    with pytest.raises(ValueError, match="weights [0-9a-f]{12}..., now [0-9a-f]{12}"):
        analyze(sparsessm.load("other"), out="out", **SMALL)
    Path("moved").symlink_to(Path("dense").resolve())
    worked = counted(monkeypatch)
    assert analyze(sparsessm.load("moved"), out="out", force=True, **SMALL).cells == first.cells
    assert not worked


@pytest.mark.parametrize("text", ["", "[]", '{"format": 7}', '{"format": 1, "cells": [{}], "settings": {}}'])
def test_what_is_no_analysis_is_refused(text: str) -> None:
    Path("out").mkdir()
    Path("out/analysis.json").write_text(text)
    with pytest.raises(ValueError, match="out/analysis.json: not an analysis .*--force"):
        analyze(sparsessm.load("dense"), out="out", **SMALL)
    assert Path("out/analysis.json").read_text() == text
    analyze(sparsessm.load("dense"), out="out", force=True, **SMALL)
    assert len(tolerance.read("out").cells) == CELLS


def test_other_refusals() -> None:
    checkpoint = sparsessm.load("dense")
    with pytest.raises(ValueError, match="sparsity is 1; allowed"):
        analyze(checkpoint, sparsities=[0.5, 1.0], **SMALL)
    with pytest.raises(ValueError, match="at least one"):
        analyze(checkpoint, sparsities=[], **SMALL)
    with pytest.raises(ValueError, match="text.txt is not a directory"):
        analyze(checkpoint, out="text.txt", **SMALL)
    with pytest.raises(ValueError, match="nowhere: no such file"):
        tolerance.read("nowhere")
    with pytest.raises(ValueError, match="'0.3;0.5'; expected numbers"):
        tolerance.parse_sparsities("0.3;0.5")
    assert tolerance.parse_sparsities("0.3, 0.5") == [0.3, 0.5]


def test_a_ruined_model_is_named() -> None:
    model = pico_mamba()
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = math.inf
    rules = rules_of(model, tokens(2, 1), "none")
    with pytest.raises(ValueError, match="layers.0.mixer.in_proj.weight: the logits .* not finite"):
        list(measure(adapt(model), rules, [0.5], tokens(2, 1), tokens(1, 2)))


def test_the_file_is_the_old_one_or_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("out/analysis.json")
    tolerance.write(path, Analysis({"seed": 0}, 1))

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tolerance.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        tolerance.write(path, Analysis({"seed": 1}, 1))
    assert tolerance.read(path).settings == {"seed": 0}
    assert [file.name for file in path.parent.iterdir()] == ["analysis.json"]


def cell(kind: str, layer: int, sparsity: float, kl: float) -> Cell:
    what = (f"layers.{layer}.{kind}", layer, kind, "projections", sparsity, 100, round(100 * sparsity))
    return Cell(*what, kl=kl, error=1.0, signal=2.0, cost=1.0, seconds=0.1)


def test_the_summary() -> None:
    kls = {("a", 0.3): (0.001, 0.002), ("a", 0.5): (0.004, 0.005), ("a", 0.7): (0.02, 0.01)}
    kls |= {("b", 0.3): (0.04, 0.0), ("b", 0.5): (0.1, 0.0), ("b", 0.7): (0.5, 0.0)}
    cells = [cell(kind, layer, s, kl) for (kind, s), pair in kls.items() for layer, kl in enumerate(pair)]
    found = findings.summary(Analysis({"model": "m"}, 12, cells))
    assert found["kinds"]["a"]["kl"] == pytest.approx({"0.3": 0.003, "0.5": 0.009, "0.7": 0.03})
    assert (found["kinds"]["a"]["tolerates"], found["kinds"]["b"]["tolerates"]) == (0.5, None)
    assert (found["kinds"]["a"]["worst"], found["kinds"]["b"]["entries"]) == (0, 200)
    first = found["most_sensitive"][0]
    assert (first["kind"], first["layer"], first["sparsity"]) == ("b", 0, 0.7)
    assert first["share"] == pytest.approx(0.5 / 0.53)
    assert "a up to 50 %; b not even 30 %. Most sensitive is b of layer 0, with 94.3 %" in found["conclusion"]
    (low, middle, high) = findings.maps(Analysis({"model": "m"}, 12, cells))
    assert middle.values == [[0.004, 0.1], [0.005, 0.0]]
    assert findings.bounds([low, middle, high]) == (0.001, 0.5)


def test_kinds_that_a_layer_lacks_stay_empty() -> None:
    found = Analysis({"model": "m"}, 2, [cell("a", 0, 0.5, 0.1), cell("b", 1, 0.5, 0.2)])
    (panel,) = findings.maps(found)
    assert panel.values == [[0.1, None], [None, 0.2]]
    findings.draw(found, Path("picture.png"))
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")


run = partial(command.run, "analyze")


def test_the_command_prints_maps_and_tables(here: Path) -> None:
    before = set(here.iterdir())
    outcome = run("dense", "--sparsities", "0.5", *FAST)
    found = analyze(sparsessm.load("dense"), sparsities=[0.5], **SMALL)
    for cell in found.cells:
        assert findings.brief(cell.kl) in outcome.stdout
    assert "one matrix alone at 50 %" in outcome.stdout
    assert "Most sensitive is" in outcome.stdout
    assert "\x1b" not in outcome.stdout
    assert "analyze: " in outcome.stderr
    assert set(here.iterdir()) == before  # nothing was written


def test_the_command_writes_the_file_and_the_picture() -> None:
    outcome = run("dense", "-o", "out/deep", "--json", "--price", "none", *FAST)
    document = json.loads(outcome.stdout)
    record = json.loads(Path("out/deep/analysis.json").read_text())
    assert document == {**record, "summary": document["summary"]}
    assert record["complete"] and len(record["cells"]) == record["expected"] == CELLS
    assert record["settings"]["methods"]["projections"] == "absorb, removed zero, repair self, price none"
    assert set(document["summary"]["kinds"]) == {"in_proj", "x_proj", "dt_proj", "A_log", "out_proj"}
    assert Path("out/deep/analysis.png").read_bytes().startswith(b"\x89PNG")
    assert Path("out/deep/analysis.png").stat().st_size > 10_000
    assert {path.name for path in Path("out/deep").iterdir()} == {"analysis.json", "analysis.png"}
    again = run("dense", "-o", "out/deep", "--json", "--price", "none", "-q", *FAST)
    assert json.loads(again.stdout) == document
    line = run("dense", "-o", "out/deep", "-q", "--seed", "1", *FAST, code=1).stderr
    assert line.startswith("error: out/deep/analysis.json was measured with other settings")
    assert run("dense", "-o", "out/deep", "-q", "--seed", "1", "--force", *FAST).stdout == ""


def test_ctrl_c_says_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tolerance, "measure", interrupted)
    assert "what is in out/analysis.json is kept" in run("dense", "-o", "out", *FAST, code=130).stderr
    assert "nothing was written" in run("dense", *FAST, code=130).stderr


def test_without_matplotlib_there_is_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "sparsessm[plot]" in run("dense", "-o", "out", "-q", *FAST, code=1).stderr
    assert not Path("out").exists()
    run("dense", "-q", *FAST)
