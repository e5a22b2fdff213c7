"""The command line, run on real pico models: what it prints where, what it refuses, what it leaves behind."""

from __future__ import annotations

import inspect
import json
import os
import random
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
from sparsessm import cli, kernels, tables
from sparsessm.architectures import MODEL_TYPES, REMOVED_A_LOG
from sparsessm.data import DATASETS
from sparsessm.methods import METHODS
from sparsessm.recipe import Recipe

COMMAND = [sys.executable, "-m", "sparsessm.cli"]
A_LOG = "backbone.layers.{}.mixer.A_log"
FAST = ["--data", "text.txt", "--samples", "3", "--length", "16"]


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
    monkeypatch.setattr(cli, "EVALUATED_TOKENS", 64)
    monkeypatch.setattr(cli, "DEMO_TOKENS", 2048)
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
    outcome = run("prune", "dense", "-o", "out", *FAST)
    model = AutoModelForCausalLM.from_pretrained("out")
    for layer in range(2):
        removed = model.state_dict()[A_LOG.format(layer)] == REMOVED_A_LOG["memoryless"]
        assert int(removed.sum()) == removed.numel() // 2
        assert A_LOG.format(layer) in outcome.stdout
    assert "50.00 %" in outcome.stdout
    assert "Perplexity on text.txt, 4 windows of 16 tokens" in outcome.stdout
    assert "of the bytes of this model" in outcome.stdout
    assert "neither the file smaller nor the model faster" in " ".join(outcome.stdout.split())
    card = Path("out/README.md").read_text()
    assert "| pruned |" in card


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
        ["--method", "exact", "--pattern", "2:4", "--removed", "unit", "--diagonal"],
        ["--method", "sparsessm-vote", "--budget", "model"],
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
    Path("recipe.yaml").write_text("method: magnitude\npattern: 1:4\nmodel: dense\ndata: text.txt\nseed: 3\n")
    document = json.loads(run("prune", "--recipe", "recipe.yaml", "-o", "a", "--no-eval", "--json").stdout)
    assert (document["recipe"]["pattern"], document["recipe"]["sparsity"]) == ("1:4", 0.75)
    assert document["totals"]["ssm"]["pruned"] == 384
    line = ["prune", "--recipe", "recipe.yaml", "-o", "b", "--no-eval", "--json", "--pattern", "3:4"]
    changed = json.loads(run(*line).stdout)["recipe"]
    assert changed == {**document["recipe"], "pattern": "3:4", "sparsity": 0.25}


def test_every_recipe_field_is_an_option_with_the_same_words() -> None:
    options = inspect.signature(cli.prune).parameters
    assert Recipe.model_fields.keys() <= options.keys()
    assert all(options[name].default is None for name in Recipe.model_fields)  # not given is not a value
    text = " ".join(run("prune", "--help").stdout.split())
    for name in METHODS:
        assert name in text
    for name in set(Recipe.model_fields) - {"model"}:
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity", "1"], "sparsity is 1; allowed: 0 <= sparsity < 1"),
        (["--sparsity", "-0.5"], "sparsity is -0.5; allowed: 0 <= sparsity < 1"),
        (["--method", "wnada"], "unknown method 'wnada'; known: random, magnitude"),
        (["--target", "projection"], "unknown target 'projection'; known: ssm"),
        (["--data", "wikitext"], "unknown data set 'wikitext'; known: stdlib, wikitext2, c4, ptb, or a file"),
        (["--data", "absent.txt"], "'absent.txt': no such file"),
        (
            ["--pattern", "2:5"],
            "pattern '2:5': groups of 5 do not divide the model's d_state of 8; allowed M: 2, 4, 8",
        ),
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


@pytest.mark.parametrize("removed", REMOVED_A_LOG)
def test_inspect_counts_in_the_tensors(removed: str) -> None:
    line = ["--method", "magnitude", "--removed", removed, "--sparsity", "0.25"]
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


@pytest.mark.parametrize("change", [1, -1], ids=["one more", "one less"])
def test_inspect_finds_tensors_that_are_not_those_of_the_record(change: int) -> None:
    run("prune", "dense", "-o", "out", "--no-eval", "--quiet", "--method", "magnitude", *FAST)
    tensors = load_file("out/model.safetensors")
    flat = tensors[A_LOG.format(1)].view(-1)
    kept = flat != REMOVED_A_LOG["memoryless"]
    flat[kept.nonzero()[0] if change > 0 else (~kept).nonzero()[0]] = 38.0 if change > 0 else 1.0
    save_file(tensors, "out/model.safetensors", {"format": "pt"})
    words = f"{A_LOG.format(1)} has 128 removed entries, its tensor has {128 + change}"
    assert words in refused("inspect", "out")


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
    for method in cli.DEMO_METHODS:
        assert method in text
    assert "change in % (95 %)" in text
    assert "of the bytes of this model" in text
    record = json.loads(Path("demo-out/pruning.json").read_text())
    methods = record["perplexity"]["methods"]
    assert methods.keys() == set(cli.DEMO_METHODS)
    best = min(methods, key=lambda name: methods[name]["pruned"]["nll"])
    assert record["recipe"]["method"] == best
    assert f"The best, {best}, is saved to demo-out" in text
    del record["perplexity"]["methods"]
    Path("demo-out/pruning.json").write_text(json.dumps(record))
    assert "'demo-out' exists" in refused(*small)  # somebody's own result
    record["perplexity"]["methods"] = methods
    Path("demo-out/pruning.json").write_text(json.dumps(record))
    monkeypatch.setattr(cli, "DEMO_METHODS", ("random",))
    document = json.loads(run(*small, "--json", "--quiet").stdout)
    assert document["best"] == document["recipe"]["method"] == "random"
    assert json.loads(Path("demo-out/pruning.json").read_text())["recipe"] == document["recipe"]


def bash(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, **options)


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


def test_progress_on_a_terminal_is_bars_with_time_left(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with tables.Progress() as progress:
        progress.note("a note")
        progress.say("reading")
        progress.say("dense model")
        for done in range(5):
            progress("calibrate", done, 4)
        progress("calibrate", 1, 4)  # the same stage from its start
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.split("reading")[-1]
    assert "1/1" in last.split("dense model")[0]  # a step that reports nothing is full when the next begins
    assert "1/4" in last.split("dense model")[1]
    assert "left" in last
    assert captured.err.count("a note") == 1


def test_progress_elsewhere_is_lines_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    now = 0.0
    monkeypatch.setattr(tables.time, "monotonic", lambda: now)
    with tables.Progress() as progress:
        for done in range(101):
            now = 0.5 * done
            progress("evaluate", done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "evaluate: 20 of 100, 40 s left",
        "evaluate: 40 of 100, 30 s left",
        "evaluate: 60 of 100, 20 s left",
        "evaluate: 80 of 100, 10 s left",
        "evaluate: 100 of 100, 50 s",
    ]


def test_the_program_that_the_package_installs() -> None:
    assert isinstance(cli.app, typer.Typer)
    assert callable(cli.main)
