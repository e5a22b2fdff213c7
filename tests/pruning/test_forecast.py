"""What a dry run says of time, memory and disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from whereabouts import MODELS, NOTHING, PLENTY, TOKENS, same, values, written

from sparsessm import Run
from sparsessm.checkpoint import Streaming, load, unfinished
from sparsessm.checkpoint.memory import peak, resident
from sparsessm.pruning import forecast as forecasts
from sparsessm.report.cost import cost_table, time_in_words


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_measured_and_not_changed(name: str, tmp_path: Path) -> None:
    checkpoint = load(written(name, tmp_path / "m"), streaming=NOTHING)
    before = values(checkpoint)
    found = Run(checkpoint, length=40).forecast()
    assert found is not None and found.memory > 0 and found.disk > 0
    assert all(seconds >= 0 for seconds in found.seconds.values()) and found.seconds["blocks"] > 0
    assert same(before, values(checkpoint))


def forecast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **fields: Any) -> forecasts.Forecast:
    """By a clock that takes a second between two looks."""
    ticks = iter(range(1 << 30))
    monkeypatch.setattr(forecasts.time, "perf_counter", lambda: float(next(ticks)))
    folder = tmp_path / "m"
    checkpoint = load(folder if folder.exists() else written("mamba", folder))
    found = Run(checkpoint, length=64, **fields).forecast(measure=fields.get("seed", 0) == 0)
    assert found is not None
    return found


def test_what_grows_with_the_windows_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one, two = (forecast(monkeypatch, tmp_path, samples=count) for count in (512, 1024))
    looking = two.seconds["blocks"] - one.seconds["blocks"]
    # 512 windows of 64 tokens, each a second for 2,048 tokens: 2 layers, 5 looks, 1 pass that goes on
    assert looking == pytest.approx(2 * (5 + 1) * 512 * 64 / 2048, rel=0.01)
    assert two.seconds["prices"] == one.seconds["prices"] and two.seconds["survey"] == one.seconds["survey"]
    assert one.faster[0].startswith("--price none saves about ")
    assert one.faster[1].startswith("half of the samples (256) saves about ")
    assert two.disk > one.disk


def test_what_is_not_done_takes_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = forecast(
        monkeypatch, tmp_path, method="magnitude", target="projections", allocation="uniform", seed=1
    )
    assert found.seconds["prices"] == found.seconds["survey"] == found.seconds["perplexity"] == 0


def test_memory_is_what_the_probe_took_and_what_grows_with_the_windows(tmp_path: Path) -> None:
    source, tokens = written("mamba", tmp_path / "m"), 16 * 64
    found = {}
    for streaming in (NOTHING, Streaming(PLENTY)):
        run = Run(load(source, streaming=streaming), samples=16, length=64)
        how: dict[str, Any] = {"measured": 0, "peak": lambda: 1000}
        rules = run.plan.assignment.rules
        found[streaming.memory] = forecasts.forecast(run.architecture, rules, 16, 64, **how).memory
    config: Any = load(source).model.config
    states = 4 * tokens * config.hidden_size  # of two models, in two places each
    kept = 16 * tokens * config.intermediate_size
    assert found == {NOTHING.memory: 1000, PLENTY: 1000 + 4 * states + kept}


def test_a_vocabulary_is_solved_in_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its other rows take as long each, and are in memory too."""
    how: dict[str, Any] = {"bits": 4.0, "samples": 2}
    all_of_it = forecast(monkeypatch, tmp_path, **how)
    monkeypatch.setattr(forecasts, "PROBED", 16)
    part = forecast(monkeypatch, tmp_path, **how)
    rows = load(tmp_path / "m").model.config.vocab_size
    assert rows > 16
    assert part.seconds["blocks"] - all_of_it.seconds["blocks"] == pytest.approx(rows / 16 - 1)
    without = forecast(monkeypatch, tmp_path, **how | {"target": "projections"})
    assert without.seconds["blocks"] < all_of_it.seconds["blocks"]
    assert without.seconds["survey"] < all_of_it.seconds["survey"]


def test_the_peak_of_this_process_is_what_it_once_had() -> None:
    before, held = peak(), torch.ones(1 << 24)
    del held
    assert resident() <= peak() and peak() >= before


def test_whole_units_are_not_foretold(tmp_path: Path) -> None:
    checkpoint = load(written("mamba", tmp_path / "m"))
    assert Run(checkpoint, length=40, pattern="structured:state").forecast() is None


def test_the_table_adds_up() -> None:
    seconds = {"prices": 100.0, "survey": 200.0, "blocks": 7000.0, "perplexity": 0.0}
    *_, cells, _ = cost_table({"seconds": seconds, "memory": 5 * 10**9, "disk": 0})
    assert ["in all, about", "2.0 h"] in cells and ["memory, about", "5.0 GB"] in cells
    assert [time_in_words(s) for s in (0, 89, 90, 5399, 5400)] == ["0 s", "89 s", "2 min", "90 min", "1.5 h"]


@pytest.mark.parametrize("fields", [{"sparsity": 0.5}, {"target": "matrices", "bits": 8.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_disk_holds_changed_blocks_as_wide_as_they_are(
    dtype: torch.dtype, fields: dict[str, Any], tmp_path: Path
) -> None:
    source, out = written("mamba", tmp_path / "m", dtype), tmp_path / "out"
    with unfinished(out) as journal:
        checkpoint = load(source, streaming=Streaming(1, journal.folder))
        journal.holds(checkpoint.residence)
        run = Run(checkpoint, journal=journal, length=40, **fields)
        foretold = run.plan.working(run.architecture)
        report, found = run.prune(TOKENS, measure=False), 0
        for file in journal.folder.glob("?????.safetensors"):
            found += sum(tensor.nbytes for tensor in load_file(file).values())
        noted = sum(row.bits // 8 for row in report.rows if row.bits)
        assert 0.9 * foretold < found + noted <= foretold
    states = 16 * TOKENS.numel() * load(source).model.config.hidden_size  # of two models, twice each
    alone = Run(load(source), length=40, samples=len(TOKENS), **fields).forecast(measure=False)
    assert alone is not None and alone.disk == foretold + states
