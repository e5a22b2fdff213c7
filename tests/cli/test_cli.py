"""The command line, run on real pico models: what it prints where, what it refuses, what it leaves behind."""

from __future__ import annotations

import inspect
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from pico import TEXT, pico_mamba, pico_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sparsessm
from sparsessm import cli, kernels
from sparsessm.architectures import MODEL_TYPES, REMOVED_A_LOG
from sparsessm.cli import demonstration
from sparsessm.data.texts import DATASETS
from sparsessm.evaluation import before_after
from sparsessm.methods import entry_methods
from sparsessm.recipe.recipe import Recipe

METHODS = entry_methods()

COMMAND = [sys.executable, "-m", "sparsessm.cli"]
A_LOG = "backbone.layers.{}.mixer.A_log"
FAST = ["--data", "text.txt", "--samples", "3", "--length", "16"]
LINEAR = "backbone.layers.{}.mixer.{}.weight"
KINDS = ("in_proj", "x_proj", "dt_proj", "out_proj")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model and a text of ten thousand words."""
    folder = tmp_path_factory.mktemp("shelf")
    pico_mamba().save_pretrained(folder / "dense")
    pico_tokenizer().save_pretrained(folder / "dense")
    words = random.Random(0).choices(TEXT.split(), k=10_000)
    (folder / "text.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test works in a fresh directory that holds `dense` and `text.txt`; little text is evaluated."""
    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(before_after, "WINDOWS", 4)
    monkeypatch.setattr(demonstration, "WINDOWS", 2)
    monkeypatch.setattr(demonstration, "ROUNDS", 1)
    return tmp_path


def run(*arguments: str, code: int = 0) -> Any:
    """Run a command in this process; the outcome has .stdout and .stderr."""
    outcome = CliRunner().invoke(cli.app, list(arguments))
    assert outcome.exit_code == code, (outcome.stdout, outcome.stderr, outcome.exception)
    return outcome


def refused(*arguments: str) -> str:
    """Run a command that must fail with one line on stderr; returns the line."""
    outcome = run(*arguments, "--quiet", code=1)
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_prune_writes_a_stock_checkpoint_and_says_what_it_did() -> None:
    outcome = run("prune", "dense", "-o", "out", "--target", "ssm", "--allocation", "uniform", *FAST)
    model = AutoModelForCausalLM.from_pretrained("out")
    for layer in range(2):
        removed = model.state_dict()[A_LOG.format(layer)] == REMOVED_A_LOG["memoryless"]
        assert int(removed.sum()) == removed.numel() // 2
    assert row_of(outcome.stdout, "A_log")[:7] == [
        "A_log",
        "exact, unstructured",
        "2",
        "256",
        "512",
        "50.00 %",
        "50.00 %",
    ]
    assert "Perplexity on text.txt, 4 windows of 16 tokens" in outcome.stdout
    assert "of the bytes of this model" in outcome.stdout
    assert "neither the file smaller nor the model faster" in " ".join(outcome.stdout.split())
    card = Path("out/README.md").read_text()
    assert "| pruned |" in card


def row_of(text: str, start: str) -> list[str]:
    """The cells of the only table line that begins with a word."""
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()]
    (found,) = [line for line in lines if line[0] == start]
    return found


def test_by_default_half_of_the_projections_and_of_a_log_go() -> None:
    outcome = run("prune", "dense", "-o", "out", *FAST)
    tensors = AutoModelForCausalLM.from_pretrained("out").state_dict()
    dense = load_file("dense/model.safetensors")
    zeros, entries = 0, 0
    for name, tensor in tensors.items():
        if any(name == LINEAR.format(layer, kind) for layer in range(2) for kind in KINDS):
            zeros, entries = zeros + int((tensor == 0).sum()), entries + tensor.numel()
        elif not name.endswith(("A_log", ".D", "lm_head.weight")):
            assert torch.equal(tensor, dense[name]), name
    assert abs(zeros / entries - 0.5) < 1e-3
    for kind in KINDS:
        assert row_of(outcome.stdout, kind)[1:3] == ["absorb, unstructured", "2"]
    assert row_of(outcome.stdout, "all projections")[2:6] == ["8", str(zeros), str(entries), "50.00 %"]
    words = " ".join(outcome.stdout.split())
    assert "`in_proj`, `x_proj`, `dt_proj`, `A_log` and `out_proj` are" in words
    assert "pruning by absorb and exact" in outcome.stderr


def test_results_go_to_stdout_and_progress_to_stderr() -> None:
    outcome = run("prune", "dense", "-o", "out", "--json", *FAST)
    document = json.loads(outcome.stdout)
    assert document["recipe"] == json.loads(Path("out/pruning.json").read_text())["recipe"]
    assert document["perplexity"]["pruned"]["windows"] == 4
    assert "calibrate: " in outcome.stderr
    assert "evaluate: 4 of 4" in outcome.stderr
    assert "calibrate" not in outcome.stdout


def test_quiet_means_quiet() -> None:
    outcome = run("prune", "dense", "-o", "out", "--quiet", "--no-eval", *FAST)
    assert (outcome.stdout, outcome.stderr) == ("", "")
    outcome = run("prune", "dense", "-o", "again", "--quiet", "--json", "--no-eval", *FAST)
    assert json.loads(outcome.stdout)["perplexity"] == {}
    assert outcome.stderr == ""


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "random", "--seed", "7"],
        ["--method", "sparsessm", "--time-weights", "discount:0.9", "--sparsity", "0.3"],
        ["--method", "exact", "--target", "ssm", "--pattern", "2:4", "--removed", "unit", "--diagonal"],
        ["--method", "sparsessm-vote", "--target", "ssm", "--allocation", "loss"],
        ["--method", "wanda", "--allocation", "owl:0.05", "--ignore", "layer:0"],
        ["--method", "sparsegpt", "--pattern", "1:4", "--ignore", "dt_proj", "--ignore", "A_log"],
        ["--method", "absorb", "--repair", "dense-target:0.5", "--price", "norms"],
    ],
    ids=lambda options: options[1],
)
def test_a_saved_recipe_gives_the_same_masks_bit_for_bit(options: list[str]) -> None:
    run("prune", "dense", "-o", "first", "--no-eval", "--quiet", *FAST, *options)
    run("prune", "--recipe", "first/pruning.json", "-o", "second", "--no-eval", "--quiet")
    first, second = (load_file(f"{name}/model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    records = [json.loads(Path(name, "pruning.json").read_text()) for name in ("first", "second")]
    for record in records:
        del record["seconds"]
    assert records[0] == records[1]


def test_options_given_replace_fields_of_the_recipe_and_others_do_not() -> None:
    Path("recipe.yaml").write_text(
        "method: magnitude\ntarget: ssm\npattern: 1:4\nmodel: dense\ndata: text.txt\nseed: 3\n"
    )
    document = json.loads(run("prune", "--recipe", "recipe.yaml", "-o", "a", "--no-eval", "--json").stdout)
    assert (document["recipe"]["pattern"], document["recipe"]["sparsity"]) == ("1:4", 0.75)
    assert document["totals"]["ssm"]["pruned"] == 384
    line = ["prune", "--recipe", "recipe.yaml", "-o", "b", "--no-eval", "--json", "--pattern", "3:4"]
    changed = json.loads(run(*line).stdout)["recipe"]
    assert changed == {**document["recipe"], "pattern": "3:4", "sparsity": 0.25}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--method", "magnitude"], {"method": "magnitude", "sparsity": 0.3}),
        (["--method", "sparsessm", "--time-weights", "linear"], {"time_weights": "linear"}),
        (["--pattern", "1:4"], {"pattern": "1:4", "sparsity": 0.75}),
        (["--sparsity", "0.75"], {"method": "exact", "diagonal": True, "sparsity": 0.75}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_replace_fields_of_a_result(options: list[str], expected: dict[str, Any]) -> None:
    first = ["--method", "exact", "--diagonal", "--sparsity", "0.3", "--allocation", "loss", *FAST]
    run("prune", "dense", "-o", "first", "--target", "ssm", "--no-eval", "--quiet", *first)
    line = ["prune", "--recipe", "first/pruning.json", "-o", "second", "--no-eval", "--json", *options]
    document = json.loads(run(*line).stdout)
    assert document["recipe"].items() >= {**expected, "data": "text.txt", "samples": 3, "length": 16}.items()
    share = document["totals"]["ssm"]["sparsity"]
    assert share == pytest.approx(document["recipe"]["sparsity"], abs=0.01)


def test_options_beside_a_result_that_do_not_fit_are_refused() -> None:
    first = ["--target", "ssm", "--pattern", "2:4", *FAST]
    run("prune", "dense", "-o", "first", "--no-eval", "--quiet", *first)
    line = ["prune", "--recipe", "first", "-o", "second"]
    assert "sparsity is 0.7, but pattern '2:4'" in refused(*line, "--sparsity", "0.7")
    assert "diagonal has no effect" in refused(*line, "--method", "magnitude", "--diagonal")


def test_a_result_made_with_another_tokenizer_repeats(shelf: Path) -> None:
    Path("bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("bare", name).write_bytes((shelf / "dense" / name).read_bytes())
    pico_tokenizer(60).save_pretrained("words")
    line = ["-o", "first", "--tokenizer", "words", "--no-eval", "--json", *FAST]
    first = json.loads(run("prune", "bare", *line).stdout)
    assert first["recipe"]["tokenizer"] == "words"
    again = json.loads(run("prune", "--recipe", "first", "-o", "second", "--no-eval", "--json").stdout)
    assert again["recipe"] == first["recipe"]
    assert again["calibration"] == first["calibration"]


def test_a_text_that_was_calibrated_and_measured_on_is_named() -> None:
    sentence = "text.txt has no held-out part"
    assert sentence in run("prune", "dense", "-o", "a", "--method", "exact", *FAST).stdout
    assert sentence in Path("a/README.md").read_text()
    assert sentence not in run("prune", "dense", "-o", "b", "--method", "magnitude", *FAST).stdout
    assert sentence not in run("prune", "dense", "-o", "c", "--no-eval", *FAST).stdout


def test_every_recipe_field_is_an_option_with_the_same_words() -> None:
    options = inspect.signature(cli.prune).parameters
    fields = Recipe.model_fields.keys() - {"rules"}  # a recipe file only
    assert fields <= options.keys()
    assert all(options[name].default is None for name in fields)  # not given is not a value
    text = " ".join(run("prune", "--help").stdout.split())
    for name in METHODS:
        assert name in text
    for name in fields - {"model"}:
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity", "1"], "sparsity is 1; allowed: 0 <= sparsity < 1"),
        (["--sparsity", "-0.5"], "sparsity is -0.5; allowed: 0 <= sparsity < 1"),
        (["--method", "wnada"], "unknown method 'wnada'; known: random, magnitude"),
        (
            ["--target", "projection"],
            "unknown target 'projection'; known: all, projections, ssm, conv1d, head",
        ),
        (["--data", "wikitext"], "unknown data set 'wikitext'; known: stdlib, wikitext2, c4, ptb, or a file"),
        (["--data", "absent.txt"], "'absent.txt': no such file"),
        (
            ["--pattern", "2:5", "--target", "ssm"],
            "pattern '2:5': groups of 5 do not divide the 8 entries of a row of backbone.layers.0.mixer.A_log"
            "; allowed M: 2, 4, 8; or leave it dense: ignore A_log",
        ),
        (
            ["--pattern", "2:4"],
            "groups of 4 do not divide the 1 entries of a row of backbone.layers.0.mixer.dt_proj.weight; "
            "allowed M: none; or leave it dense: ignore dt_proj",
        ),
        (
            ["--ignore", "inproj"],
            "ignore: selector 'inproj' hits nothing; known: in_proj, projections, Linear",
        ),
        (["--target", "head", "--ignore", "lm_head"], "target 'head': all of it is ignored"),
        (["--samples", "many"], "samples is 'many'; allowed: a number from 1 to 100000, or auto"),
        (
            ["--repair", "slef"],
            "unknown repair 'slef'; known: none, self, dense-target; did you mean 'self'?",
        ),
        (["--price", "fischer"], "unknown price 'fischer'; known: none, fisher, norms"),
        (["--allocation", "lost"], "unknown allocation 'lost'; known: uniform, hessian-trace, owl, loss"),
        (["--method", "exact", "--target", "head"], "method 'exact' does not prune target 'head'"),
        (["--pattern", "2:4", "--sparsity", "0.7"], "sparsity is 0.7, but pattern '2:4' keeps 2 of 4"),
        (["--method", "magnitude", "--diagonal"], "diagonal has no effect with method 'magnitude'"),
        (["--data", "text.txt", "--length", "1000000"], "one window of 1000000; use a shorter length"),
        (["--recipe", "absent.yaml"], "recipe absent.yaml: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments: list[str], words: str, here: Path) -> None:
    before = sorted(here.iterdir())
    assert words in refused("prune", "dense", "-o", "out", "--no-eval", *arguments)
    assert sorted(here.iterdir()) == before


def test_a_model_is_needed_and_must_exist() -> None:
    assert "no model: name one on the command line or in the recipe" in refused("prune", "-o", "out")
    assert "builtin:pycode" in refused("prune", "builtin:pycod", "-o", "out")
    assert "'no/such/place'" in refused("eval", "no/such/place")


def test_an_existing_target_is_refused_before_any_work_unless_forced(here: Path) -> None:
    run("prune", "dense", "-o", "out", "--no-eval", "--quiet", "--method", "random", *FAST)
    before = Path("out/model.safetensors").read_bytes()
    assert "'out' exists" in refused("prune", "no-such-model", "-o", "out")
    assert Path("out/model.safetensors").read_bytes() == before
    run("prune", "dense", "-o", "out", "--no-eval", "--quiet", "--force", "--method", "magnitude", *FAST)
    assert Path("out/model.safetensors").read_bytes() != before
    assert sorted(path.name for path in here.iterdir()) == ["dense", "out", "text.txt"]


def test_eval_compares_with_the_first_model_on_the_same_windows() -> None:
    run(
        "prune",
        "dense",
        "-o",
        "out",
        "--no-eval",
        "--quiet",
        "--method",
        "magnitude",
        "--sparsity",
        "0.9",
        *FAST,
    )
    line = ["eval", "dense", "out", "--data", "text.txt", "--length", "16", "--limit", "30"]
    dense, pruned = json.loads(run(*line, "--json").stdout)["models"]
    assert (dense["windows"], dense["length"], dense["change"]) == (30, 16, None)
    assert pruned["change"]["mean"] == pytest.approx(pruned["perplexity"] / dense["perplexity"] - 1)
    assert pruned["change"]["low"] <= pruned["change"]["mean"] <= pruned["change"]["high"]
    outcome = run(*line)
    assert "Perplexity on text.txt, 30 windows of 16 tokens" in outcome.stdout
    assert f"{pruned['perplexity']:.2f} ({pruned['low']:.2f} to {pruned['high']:.2f})" in outcome.stdout
    alone = run("eval", "dense", "--data", "text.txt", "--length", "16", "--limit", "1", "--json")
    assert json.loads(alone.stdout)["models"][0]["low"] is None  # one window has no interval


def test_eval_of_models_with_different_tokenizers_gives_no_change(shelf: Path) -> None:
    Path("other").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("other", name).write_bytes((shelf / "dense" / name).read_bytes())
    pico_tokenizer(40).save_pretrained("other")
    line = ["eval", "dense", "other", "--data", "text.txt", "--length", "16", "--limit", "5"]
    first, second = json.loads(run(*line, "--json").stdout)["models"]
    assert first["fingerprint"] != second["fingerprint"]
    assert (first["change"], second["change"]) == (None, None)
    text = " ".join(run(*line).stdout.split())
    for record in (first, second):
        assert f"{record['bits_per_byte']:.4f}" in text
    assert "The tokenizer of other splits the text differently from that of dense" in text
    assert "compare bits per byte, not perplexities" in text
    assert run(*line, "--quiet").stdout == ""


def quiz() -> None:
    """Two tasks in `quiz`, of 5 documents each: multiple choice, and the last word of a text."""
    Path("quiz").mkdir()
    rows = [{"start": "the state of", "ends": ["the model", "a scan"], "right": n % 2} for n in range(5)]
    Path("quiz/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = "dataset_path: json\ndataset_kwargs: {data_files: {test: quiz/rows.jsonl}, cache_dir: cache}\n"
    data += 'test_split: test\ndoc_to_text: "{{start}}"\n'
    choice = 'output_type: multiple_choice\ndoc_to_choice: "{{ends}}"\ndoc_to_target: right\n'
    cloze = 'output_type: loglikelihood\ndoc_to_target: " {{ends[0]}}"\n'
    Path("quiz/choice.yaml").write_text(f"task: choice\n{data}{choice}")
    Path("quiz/cloze.yaml").write_text(f"task: cloze\n{data}{cloze}")


def test_eval_of_zero_shot_tasks() -> None:
    pytest.importorskip("lm_eval")
    quiz()
    line = ["eval", "dense", "--tasks", "choice,cloze", "--include-path", "quiz", "--limit", "3"]
    outcome = run(*line)
    assert "the first 3 documents of each task" in outcome.stdout
    assert "choice: 6 of 6" in outcome.stderr
    assert "choice" not in outcome.stdout.splitlines()[0]
    shown = {
        tuple(line.split("│")[n].strip() for n in (1, 2, 3)) for line in outcome.stdout.splitlines()[4:8]
    }
    assert shown == {
        ("choice", "acc", "3"),
        ("choice", "acc_norm", "3"),
        ("cloze", "perplexity", "3"),
        ("cloze", "acc", "3"),
    }
    run("prune", "dense", "-o", "out", "--no-eval", "-q", "--method", "magnitude", "--sparsity", "0.9", *FAST)
    both = [*line[:2], "out", *line[2:]]
    first, second = json.loads(run(*both, "--json", "--quiet").stdout)["models"]
    assert (first["model"], first["change"]) == ("dense", None)
    before, after = (model["scores"][1]["metrics"]["perplexity"] for model in (first, second))
    assert len(before["values"]) == 3
    change = second["change"]["cloze"]["perplexity"]
    assert change["value"] == pytest.approx(after["value"] - before["value"])
    text = run(*both).stdout
    assert f"{after['value']:.2f} ± {after['stderr']:.2f}" in text
    assert f"{change['value']:+.2f} ± {change['stderr']:.2f}" in text
    silent = run(*line, "--quiet")
    assert (silent.stdout, silent.stderr) == ("", "")


def test_eval_refuses_what_has_no_effect_or_is_no_task() -> None:
    assert "--include-path has no effect without --tasks" in refused("eval", "dense", "--include-path", ".")
    assert "--data has no effect with --tasks" in refused("eval", "dense", "--tasks", "a", "--data", "stdlib")
    assert "--length has no effect with --tasks" in refused("eval", "dense", "--tasks", "a", "--length", "9")
    assert "no task; name some" in refused("eval", "dense", "--tasks", ",")


def test_a_ruined_model_is_measured_too(shelf: Path) -> None:
    shutil.copytree(shelf / "dense", "ruined")
    tensors = load_file("ruined/model.safetensors")
    tensors["backbone.norm_f.weight"] *= 1e6
    save_file(tensors, "ruined/model.safetensors", {"format": "pt"})
    line = ["eval", "dense", "ruined", "--data", "text.txt", "--length", "16", "--limit", "20"]
    ruined = json.loads(run(*line, "--json").stdout)["models"][1]
    assert ruined["perplexity"] is None
    assert ruined["change"] == {"mean": None, "low": None, "high": None}
    assert ruined["nll"] > 709
    assert "- (- to -)" in run(*line).stdout


@pytest.mark.parametrize("removed", REMOVED_A_LOG)
def test_inspect_counts_in_the_tensors(removed: str) -> None:
    line = ["--method", "magnitude", "--removed", removed, "--sparsity", "0.25", "--target", "ssm"]
    run("prune", "dense", "-o", "out", "--no-eval", "--quiet", *line, *FAST)
    document = json.loads(run("inspect", "out", "--json").stdout)
    assert document["removed"] == {A_LOG.format(0): 64, A_LOG.format(1): 64}
    assert document["tensors"]["A_log"] == {"bytes": 2 * 256 * 4, "dtypes": ["float32"]}
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


MIXED = """\
model: dense
data: text.txt
samples: 3
length: 16
ignore: [layer:0, layer:-1]
rules:
- targets: [in_proj]
  pattern: 2:4
- targets: [out_proj]
  sparsity: 0.6
- targets: [A_log]
  method: exact
"""


def test_a_mixed_recipe_from_a_file() -> None:
    """2:4 on in_proj, unstructured on out_proj, exact on A_log; the first and the last layer dense."""
    pico_mamba(num_hidden_layers=4).save_pretrained("four")
    pico_tokenizer().save_pretrained("four")
    Path("recipe.yaml").write_text(MIXED)
    line = ["--recipe", "recipe.yaml", "-o", "out", "--no-eval"]
    document = json.loads(run("prune", "four", *line, "--json").stdout)
    rows = {row["target"]: row for row in document["targets"]}
    expected = {
        "in_proj.weight": ("absorb", "2:4", "uniform", 512),
        "out_proj.weight": ("absorb", "unstructured", "loss:0.1", 307),
        "A_log": ("exact", "unstructured", "loss:1", 128),
    }
    assert rows.keys() == {f"backbone.layers.{n}.mixer.{kind}" for n in (1, 2) for kind in expected}
    for kind, (method, pattern, allocation, pruned) in expected.items():
        pair = [rows[f"backbone.layers.{n}.mixer.{kind}"] for n in (1, 2)]
        for row in pair:
            assert (row["method"], row["pattern"], row["allocation"]) == (method, pattern, allocation)
        assert abs(sum(row["pruned"] for row in pair) - 2 * pruned) <= 2, kind
    tensors, dense = load_file("out/model.safetensors"), load_file("four/model.safetensors")
    for n in (1, 2):
        groups = (tensors[LINEAR.format(n, "in_proj")] != 0).reshape(-1, 4).sum(1)
        assert (groups == 2).all()
    changed = {name for name in tensors if not torch.equal(tensors[name], dense[name])}
    assert changed == {*rows, "backbone.layers.1.mixer.D", "backbone.layers.2.mixer.D"}
    again = json.loads(run("prune", "--recipe", "out", "-o", "again", "--no-eval", "--json").stdout)
    assert again["recipe"] == document["recipe"]
    repeated = load_file("again/model.safetensors")
    assert all(torch.equal(tensors[name], repeated[name]) for name in tensors)
    page = Path("out/README.md").read_text()
    assert "| rule 1 | `pattern: 2:4; targets: in_proj` |" in page
    text = run("inspect", "out").stdout
    assert "rule 2" in text and "sparsity: 0.6; targets: out_proj" in text


def test_a_dry_run_says_what_every_rule_hits_and_writes_nothing(here: Path) -> None:
    pico_mamba(num_hidden_layers=4, tie_word_embeddings=True).save_pretrained("four")
    pico_tokenizer().save_pretrained("four")
    Path("recipe.yaml").write_text(MIXED.replace("text.txt", "absent.txt"))  # no text is needed
    before = sorted(here.rglob("*"))
    line = ["prune", "four", "--recipe", "recipe.yaml", "--dry-run"]
    document = json.loads(run(*line, "--json").stdout)
    told = [
        (r["rule"], r["family"], r["targets"], r["entries"], r["method"], r["pattern"], r["sparsity"])
        for r in document["rules"]
    ]
    assert told == [
        ("rule 1 (in_proj)", "projections", {"in_proj": 2}, 2048, "absorb", "2:4", 0.5),
        ("rule 2 (out_proj)", "projections", {"out_proj": 2}, 1024, "absorb", "unstructured", 0.6),
        ("rule 3 (A_log)", "ssm", {"A_log": 2}, 512, "exact", "unstructured", 0.5),
    ]
    repairs = [(r["repair"], r["price"], r["allocation"], r["removed"]) for r in document["rules"]]
    assert repairs == [
        ("dense-target:1", "fisher", "uniform", "zero"),
        ("dense-target:1", "fisher", "loss:0.1", "zero"),
        ("none", "none", "loss:1", "memoryless"),
    ]
    sizes = document["bytes"]
    now = sum(tensor.nbytes for tensor in load_file("four/model.safetensors").values())
    saved = 2048 * 4 - (2048 // 8 + 1024 * 4) + 1024 * 4 - (1024 // 8 + 2 * 205 * 4)
    assert (sizes["now"], sizes["after"], sizes["packed"]) == (now, now, now - saved)
    assert sizes["dense"]["in_proj"] == 2 * 1024 * 4  # layers 0 and 3
    assert sizes["dense"]["conv1d.bias"] == 4 * 32 * 4
    text = run(*line).stdout
    assert row_of(text, "rule 2")[2:8] == [
        "absorb",
        "unstructured",
        "0.6",
        "dense-target:1",
        "fisher",
        "loss:0.1",
    ]
    assert f"{now:,}" in text and f"{now - saved:,}" in text
    assert "nothing was written" in text
    assert run(*line, "--quiet").stdout == ""
    assert sorted(here.rglob("*")) == before


def test_a_dry_run_foretells_the_run() -> None:
    """Its bytes are those of the pruned model's matrices, packed."""
    for options in (["--sparsity", "0.7"], ["--method", "wanda"], ["--sparsity", "0"]):
        line = ["prune", "dense", "--target", "projections", "--allocation", "uniform", *options, *FAST]
        sizes = json.loads(run(*line, "--dry-run", "--json").stdout)["bytes"]
        run(*line, "-o", "out", "--force", "--no-eval", "--quiet")
        packed = 0
        for name, tensor in load_file("out/model.safetensors").items():
            size = -(-tensor.numel() // 8) + int((tensor != 0).sum()) * 4
            linear = any(name.endswith(f".{kind}.weight") for kind in KINDS)
            packed += min(size, tensor.nbytes) if linear else tensor.nbytes
        assert sizes["packed"] == pytest.approx(packed, rel=1e-3)
        assert sizes["packed"] <= sizes["now"]


def test_a_dry_run_refuses_what_a_run_would(here: Path) -> None:
    Path("recipe.yaml").write_text("rules:\n- targets: in_proj\n- targets: [inproj]\n")
    line = ["prune", "dense", "--recipe", "recipe.yaml", "--dry-run"]
    words = refused(*line)
    assert words.startswith(
        "error: rule 2 (inproj): selector 'inproj' hits nothing; known: in_proj, projection"
    )
    assert words.endswith("did you mean 'in_proj'?")
    assert "rule 2 (in_proj, Linear) prunes nothing" in refused(*line, "--recipe", _rules("in_proj, Linear"))
    Path("out").mkdir()
    assert "'out' exists" in refused("prune", "dense", "-o", "out", "--dry-run")
    usage = run("prune", "dense", code=2)
    assert "--out" in usage.stderr and "--dry-run" in usage.stderr


def _rules(second: str) -> str:
    text = f"rules:\n- targets: [projections]\n- targets: [{second}]\n"
    Path("second.yaml").write_text(text)
    return "second.yaml"


def test_inspect_of_a_dense_model() -> None:
    assert "no pruning.json" in run("inspect", "dense").stdout
    document = json.loads(run("inspect", "dense", "--json").stdout)
    assert (document["record"], document["removed"]) == (None, {})


def test_list_shows_every_row_of_every_table() -> None:
    text = run("list").stdout
    for name in [*METHODS, *DATASETS, *MODEL_TYPES, "unstructured", "N:M"]:
        assert name in text


def test_version_and_bare_call() -> None:
    assert run("--version").stdout.startswith(f"sparsessm {sparsessm.__version__} ")
    assert "Usage" in run(code=2).output


def test_missing_kernels_are_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "NATIVE", False)
    outcome = run("inspect", "dense")
    assert outcome.stderr == "note: the native kernels are not installed; the slow reference is used\n"


def test_demo_shows_every_method_and_replaces_only_a_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["demo", "--samples", "1"]
    text = run(*small).stdout
    for name in demonstration.RUNS:
        assert name in text
    assert "change in % (95 %)" in text
    assert "of the bytes of this model" in text
    record = json.loads(Path("demo-out/pruning.json").read_text())
    methods = record["perplexity"]["methods"]
    assert methods.keys() == set(demonstration.RUNS)
    assert record["recipe"]["target"] == "all" and "method" not in record["recipe"]
    assert record["perplexity"]["pruned"] == methods[demonstration.SAVED]["pruned"]
    assert f"'{demonstration.SAVED}' is saved to demo-out" in text
    assert "demo-out.packed goes on from" in text and "demo-out.int8" in text
    sizes = {
        kind: Path(f"demo-out.{kind}/packed.safetensors").stat().st_size for kind in demonstration.PACKED
    }
    assert f"{sizes['packed']:,}" in text and sizes["int8"] < 0.6 * sizes["packed"]
    del record["perplexity"]["methods"]
    Path("demo-out/pruning.json").write_text(json.dumps(record))
    assert "'demo-out' exists" in refused(*small)  # somebody's own result
    record["perplexity"]["methods"] = methods
    Path("demo-out/pruning.json").write_text(json.dumps(record))
    monkeypatch.setattr(
        demonstration, "RUNS", {demonstration.SAVED: {"method": "magnitude", "target": "projections"}}
    )
    document = json.loads(run(*small, "--json", "--quiet").stdout)
    assert document["recipe"]["method"] == "magnitude"
    assert document["text"].startswith(demonstration.PROMPT)
    assert [row["bytes"]["file"] < sizes["packed"] * 1.2 for row in document["packed"]] == [True, True]
    assert json.loads(Path("demo-out/pruning.json").read_text())["recipe"] == document["recipe"]


def bash(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, **options)


def test_inspect_of_a_hub_id_reads_the_record_that_came_with_it(here: Path) -> None:
    snapshot = here / "hub/models--some--pruned/snapshots/0123abc"
    snapshot.parent.mkdir(parents=True)
    run("prune", "dense", "-o", str(snapshot), "--no-eval", "--quiet", "--method", "magnitude", *FAST)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0123abc")
    offline = {**os.environ, "HF_HOME": str(here), "HF_HUB_OFFLINE": "1"}
    offline.pop("HF_HUB_CACHE", None)
    done = bash("inspect", "some/pruned", "--json", env=offline)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["record"]["recipe"]["method"] == "magnitude"


def test_as_a_program_stdout_is_only_the_document() -> None:
    done = bash("prune", "dense", "-o", "out", "--json", "--no-eval", *FAST)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == "out"
    assert "Traceback" not in done.stderr
    again = bash("prune", "dense", "-o", "out", *FAST)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith("error: 'out' exists")
    usage = bash("prune", "dense")
    assert usage.returncode == 2
    assert "--out" in usage.stderr
    assert "Traceback" not in usage.stderr


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(sent: signal.Signals, code: int, here: Path) -> None:
    line = ["prune", "dense", "-o", "out", "--data", "text.txt", "--samples", "200", "--length", "2000"]
    before = sorted(here.iterdir())
    program = subprocess.Popen([*COMMAND, *line], stderr=subprocess.PIPE, text=True, env=os.environ)
    assert program.stderr
    assert "reading text.txt" in program.stderr.readline()  # it is at work
    time.sleep(0.2)
    program.send_signal(sent)
    rest = program.communicate(timeout=60)[1]
    assert program.returncode == code, rest
    assert "Traceback" not in rest
    assert sorted(here.iterdir()) == before


def test_the_program_that_the_package_installs() -> None:
    assert isinstance(cli.app, typer.Typer)
    assert callable(cli.main)
