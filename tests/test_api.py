"""The door as a notebook uses it: load, prune, evaluate, save. test_readme.py runs the README's example."""

from __future__ import annotations

import inspect
import json
import random
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import TEXT, pico_mamba, pico_tokenizer
from typer.testing import CliRunner

import sparsessm
from sparsessm import cli
from sparsessm.architectures import REMOVED_A_LOG
from sparsessm.checkpoint import Checkpoint, reading
from sparsessm.evaluation import perplexity
from sparsessm.recipe.recipe import Recipe
from sparsessm.studies import run as studied_run

TOKENS = torch.arange(40).reshape(2, 20) % 64
FAST: dict[str, Any] = {"data": "text.txt", "samples": 2, "length": 16}


@pytest.fixture
def dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """A pico checkpoint, in a directory with a text."""
    monkeypatch.chdir(tmp_path)
    pico_mamba().save_pretrained("dense")
    pico_tokenizer().save_pretrained("dense")
    Path("text.txt").write_text(" ".join(random.Random(0).choices(TEXT.split(), k=2000)))
    return sparsessm.load("dense")


def removed(checkpoint: Checkpoint) -> list[float]:
    """Share of removed entries, layer by layer, counted in the weights."""
    tensors = checkpoint.model.state_dict()
    return [
        (tensors[name] == REMOVED_A_LOG["memoryless"]).float().mean().item()
        for name in tensors
        if name.endswith("A_log")
    ]


def test_prune_works_in_place_and_save_and_load_change_nothing(dense: Checkpoint) -> None:
    report = sparsessm.prune(dense, sparsity=0.25, target="ssm", allocation="uniform", **FAST, measure=False)
    assert removed(dense) == [0.25, 0.25]
    assert report.totals["ssm"]["pruned"] == 128
    assert report.recipe["model"] == "dense"
    assert report.recipe["length"] == 16
    assert report.sizes["A_log"] == 2 * 256 * 4
    assert sparsessm.save(dense, Path("out"), report) == Path("out")
    again = sparsessm.load(Path("out"))
    with torch.inference_mode():
        torch.testing.assert_close(again.model(TOKENS).logits, dense.model(TOKENS).logits, rtol=0, atol=0)
    assert Recipe.load("out").model_dump() == report.recipe
    with pytest.raises(ValueError, match="'out' exists"):
        sparsessm.save(dense, "out", report)
    sparsessm.save(dense, "out", force=True)
    assert not Path("out/pruning.json").exists()  # no report, no record


def test_fields_replace_those_of_a_recipe(dense: Checkpoint) -> None:
    recipe = Recipe(method="magnitude", sparsity=0.5)
    report = sparsessm.prune(dense, recipe=recipe, sparsity=0.75, measure=False)
    assert removed(dense) == [0.75, 0.75]
    assert report.recipe["method"] == "magnitude"
    assert report.fingerprint == ""  # it looked at no data
    with pytest.raises(ValueError, match="unknown recipe field 'sparsty'"):
        sparsessm.prune(dense, sparsty=0.5, measure=False)
    with pytest.raises(
        ValueError, match="groups of 3 do not divide the 8 entries of a row of .*0.mixer.A_log"
    ):
        sparsessm.prune(dense, target="ssm", pattern="1:3", measure=False)


def test_the_tokenizer_that_was_given_is_in_the_recipe_and_repeats(dense: Checkpoint) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        Path("dense", name).unlink(missing_ok=True)
    pico_tokenizer(60).save_pretrained("words")
    model = sparsessm.load("dense", tokenizer="words")
    report = sparsessm.prune(model, recipe=Recipe(tokenizer="another"), **FAST, measure=False)
    assert report.recipe["tokenizer"] == "words"  # the one that was used
    sparsessm.save(model, "out", report)
    recipe = Recipe.load("out")
    again = sparsessm.load(str(recipe.model), tokenizer=recipe.tokenizer)
    assert sparsessm.prune(again, recipe=recipe, measure=False).fingerprint == report.fingerprint


def test_a_model_with_its_own_tokenizer_says_none(dense: Checkpoint) -> None:
    assert "tokenizer" not in sparsessm.prune(dense, method="magnitude", measure=False).recipe


def test_a_second_pruning_in_memory_is_said(dense: Checkpoint) -> None:
    assert sparsessm.prune(dense, method="magnitude", measure=False).record()["pruned_before"] is False
    second = sparsessm.prune(
        replace(dense), method="random", measure=False
    )  # the same model in another wrapping
    assert second.record()["pruned_before"] is True
    assert (
        sparsessm.prune(sparsessm.load("dense"), method="random", measure=False).record()["pruned_before"]
        is False
    )


def test_an_interrupted_pruning_counts(dense: Checkpoint) -> None:
    def stop(stage: str, done: int, total: int, block: str) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sparsessm.prune(dense, **FAST, progress=stop, measure=False)
    assert sparsessm.prune(dense, method="magnitude", measure=False).pruned_before


def test_progress_is_told_and_evaluate_stays_a_function(dense: Checkpoint) -> None:
    told: list[tuple[str, int, int]] = []
    places: dict[str, list[str]] = {}

    def progress(stage: str, done: int, total: int, block: str) -> None:
        told.append((stage, done, total))
        places.setdefault(stage, []).append(block)

    for _ in range(2):
        measured = sparsessm.evaluate(dense, "text.txt", length=16, limit=3, progress=progress)
    assert (measured.windows, measured.length, measured.data) == (3, 16, "text.txt")
    assert measured.perplexity > 1
    sparsessm.prune(dense, target="ssm", allocation="uniform", **FAST, progress=progress, measure=False)
    assert {"evaluate", "calibrate"} == {stage for stage, _, _ in told}
    assert ("evaluate", 3, 3) in told
    assert told[-1][1] == told[-1][2]
    told.clear(), places.clear()
    sparsessm.prune(dense, **FAST, progress=progress, measure=False)
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["fisher", "survey", "calibrate"]
    last = {stage: (done, total) for stage, done, total in told}
    assert all(done == total for done, total in last.values()), last
    blocks = [f"block {number} of 2" for number in (1, 2)]
    assert list(dict.fromkeys(places["survey"])) == list(dict.fromkeys(places["calibrate"])) == blocks
    assert places["fisher"][0] == blocks[0]
    assert "head" in places["fisher"]
    assert places["fisher"][-1] == blocks[0]  # the way back ends where it began


def test_a_window_has_the_length_the_model_was_trained_on(dense: Checkpoint) -> None:
    short = replace(dense, trained_length=32)
    assert sparsessm.evaluate(short, "text.txt", limit=1).length == 32
    assert sparsessm.prune(short, data="text.txt", samples=1, measure=False).recipe["length"] == 32


def test_the_card_names_a_hub_model_as_its_base_and_no_local_one(dense: Checkpoint) -> None:
    report = sparsessm.prune(dense, method="magnitude", measure=False)
    sparsessm.save(dense, "local", report)
    assert "base_model" not in Path("local/README.md").read_text()
    sparsessm.save(replace(dense, source="org/mamba"), "hub", report)
    assert "\nbase_model: org/mamba\n" in Path("hub/README.md").read_text()
    totals = json.loads(Path("hub/pruning.json").read_text())["totals"]
    assert (totals["ssm"]["pruned"], totals["projections"]["pruned"]) == (256, 2112)


def test_by_default_half_of_the_whole_model_goes(dense: Checkpoint) -> None:
    before = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    report = sparsessm.prune(dense, **FAST, measure=False)
    assert {family: round(total["sparsity"], 2) for family, total in report.totals.items()} == {
        "projections": 0.5,
        "ssm": 0.5,
    }
    pruned = {row.target for row in report.rows} | {name for row in report.rows for name in row.repaired}
    assert pruned == {
        f"backbone.layers.{layer}.mixer.{kind}"
        for layer in range(2)
        for kind in ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "A_log", "D", "out_proj.weight")
    }
    for name, tensor in dense.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in pruned), name


@pytest.mark.parametrize("function", [sparsessm.load, sparsessm.prune, sparsessm.evaluate, sparsessm.save])
def test_every_function_is_typed_and_says_what_it_raises(function: Callable[..., object]) -> None:
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    assert "Raises:" in (function.__doc__ or "")
    for name in signature.parameters:
        assert f"{name}:" in (function.__doc__ or "")


def example() -> str:
    """The code in the package's own docstring."""
    lines = (sparsessm.__doc__ or "").splitlines()
    return textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line)).strip()


def test_the_readme_shows_the_example_of_the_docstring() -> None:
    assert f"```python\n{example()}\n```" in (Path(__file__).parents[1] / "README.md").read_text()


def test_python_measures_as_the_command_does(dense: Checkpoint) -> None:
    report = sparsessm.prune(dense, target="ssm", data="text.txt", samples=2, length=32)
    sparsessm.save(dense, "from-python", report)
    line = ["prune", "dense", "-o", "from-command", "--target", "ssm", "--data", "text.txt", "--samples", "2"]
    outcome = CliRunner().invoke(cli.app, [*line, "--length", "32", "--quiet"])
    assert outcome.exit_code == 0, outcome.stderr
    folders = "from-python", "from-command"
    records = [json.loads(Path(folder, "pruning.json").read_text()) for folder in folders]
    assert records[0]["perplexity"] == records[1]["perplexity"] and records[0]["perplexity"]["difference"]
    assert records[0]["targets"] == records[1]["targets"]
    cards = [Path(folder, "README.md").read_text() for folder in folders]
    assert cards[0] == cards[1] and "perplexity" in cards[0].lower()
    again = sparsessm.load("dense")
    assert not sparsessm.prune(
        again, target="ssm", data="text.txt", samples=2, length=32, measure=False
    ).perplexity


def test_a_run_adapts_and_plans_once(dense: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for module, name in ((reading, "adapt"), (perplexity, "adapt"), (studied_run, "make_plan")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, real=real, name=name: (calls.append(name), real(*given))[1]
        )
    report = sparsessm.prune(dense, target="ssm", **FAST)
    assert report.perplexity and calls == ["adapt", "make_plan"]


def test_a_run_saves_what_it_did(dense: Checkpoint) -> None:
    run = sparsessm.Run(dense, target="ssm", **FAST)
    report = run.prune(measure=False)
    assert json.loads((run.save("out") / "pruning.json").read_text())["targets"] == report.record()["targets"]
    with pytest.raises(ValueError, match="'out'"):
        run.save("out")
