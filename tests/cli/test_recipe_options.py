"""Recipes on the command line: saved, repeated, changed by options, with rules, and dry runs of them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import FAST, refused, row_of, run
from pico import pico_mamba, pico_tokenizer
from safetensors.torch import load_file

from sparsessm import cli
from sparsessm.methods import entry_methods
from sparsessm.recipe.recipe import Recipe

METHODS = entry_methods()

pytestmark = pytest.mark.usefixtures("here")

LINEAR = "backbone.layers.{}.mixer.{}.weight"
KINDS = ("in_proj", "x_proj", "dt_proj", "out_proj")


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
        compute = record["machine"]["compute"]
        del compute["asked"], compute["why"]  # the result says which of both the first run took
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
        "error: rule 2 (inproj): selector 'inproj' selects nothing; known: in_proj, projection"
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
