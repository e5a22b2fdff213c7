"""`sparsessm eval`: models side by side, on text and on tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import FAST, refused, run
from pico import pico_tokenizer
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("here")


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
