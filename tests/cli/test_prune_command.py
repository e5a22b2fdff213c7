"""`sparsessm prune`: what it writes, what it prints where, what it refuses before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import FAST, refused, row_of, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsessm.architectures import REMOVED_A_LOG

pytestmark = pytest.mark.usefixtures("here")

A_LOG = "backbone.layers.{}.mixer.A_log"
LINEAR = "backbone.layers.{}.mixer.{}.weight"
KINDS = ("in_proj", "x_proj", "dt_proj", "out_proj")


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
    events = [json.loads(line) for line in outcome.stderr.splitlines()]
    assert {event["stage"] for event in events if event["event"] == "progress"} >= {"evaluate", "calibrate"}
    assert {"event": "step", "text": "dense model"} in events
    assert "calibrate" not in outcome.stdout
    outcome = run("prune", "dense", "-o", "again", *FAST)
    assert "evaluate: 4 of 4" in outcome.stderr
    assert "calibrate" not in outcome.stdout


def test_quiet_means_quiet() -> None:
    outcome = run("prune", "dense", "-o", "out", "--quiet", "--no-eval", *FAST)
    assert (outcome.stdout, outcome.stderr) == ("", "")
    outcome = run("prune", "dense", "-o", "again", "--quiet", "--json", "--no-eval", *FAST)
    assert json.loads(outcome.stdout)["perplexity"] == {}
    assert outcome.stderr == ""


def test_a_text_that_was_calibrated_and_measured_on_is_named() -> None:
    sentence = "text.txt has no held-out part"
    assert sentence in run("prune", "dense", "-o", "a", "--method", "exact", *FAST).stdout
    assert sentence in Path("a/README.md").read_text()
    assert sentence not in run("prune", "dense", "-o", "b", "--method", "magnitude", *FAST).stdout
    assert sentence not in run("prune", "dense", "-o", "c", "--no-eval", *FAST).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sparsity", "1"], "sparsity is 1; allowed: 0 <= sparsity < 1"),
        (["--sparsity", "-0.5"], "sparsity is -0.5; allowed: 0 <= sparsity < 1"),
        (["--method", "wnada"], "unknown method 'wnada'; known: random, magnitude"),
        (
            ["--target", "projection"],
            "unknown target 'projection'; known: all, matrices, projections, ssm, conv1d, head, embedding",
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
            "ignore: selector 'inproj' selects nothing; known: in_proj, projections, Linear",
        ),
        (["--target", "head", "--ignore", "lm_head"], "target 'head': ignore leaves nothing to prune"),
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
        (
            ["--data", "text.txt", "--length", "1000000"],
            "a window of 1000000; use a shorter length",
        ),
        (["--recipe", "absent.yaml"], "recipe absent.yaml: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments: list[str], words: str, here: Path) -> None:
    before = sorted(here.iterdir())
    assert words in refused("prune", "dense", "-o", "out", "--no-eval", *arguments)
    assert sorted(here.iterdir()) == before


def test_a_model_is_needed_and_must_exist() -> None:
    assert "no model was given; name one on the command line or in the recipe" in refused(
        "prune", "-o", "out"
    )
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
