"""`sparsessm report`: from a result to a page, measured once, and refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pages
import pytest
from command import FAST, refused, run

from sparsessm.evaluation import beside_dense

UNITS = ["--pattern", "structured:channel", "--sparsity", "0.5"]


@pytest.fixture(autouse=True)
def little(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little text."""
    monkeypatch.setattr(beside_dense, "WINDOWS", 4)
    monkeypatch.setattr(beside_dense, "TOKENS", 64)


def pruned(out: str, *options: str, model: str = "dense") -> Path:
    run("prune", model, "-o", out, "--no-eval", "--quiet", *options, *FAST)
    return Path(out)


def read(file: str | Path) -> pages.Reader:
    return pages.Reader(Path(file).read_text(encoding="utf-8"))


def report(*arguments: str) -> dict[str, Any]:
    return json.loads(run("report", *arguments, "--json").stdout)


@pytest.mark.parametrize(
    ("options", "pictures"), [(["--bits", "4"], 4), (UNITS, 2), (["--sparsity", "0.5"], 3)]
)
def test_a_result_becomes_a_page(options: list[str], pictures: int) -> None:
    out = pruned("out", *options)
    document = report("out")
    page = read(out / "report.html")
    assert document["out"] == "out/report.html" and document["bytes"] == (out / "report.html").stat().st_size
    assert len(page.all_of("svg")) == pictures
    found = document["measured"]
    assert found["perplexity"]["dense"]["windows"] == 4 and found["against"] == "dense"
    weights = next(file for file in out.iterdir() if file.suffix == ".safetensors")
    assert found["sizes"]["result"]["weights"] == weights.stat().st_size
    assert found["sizes"]["dense"]["weights"] == Path("dense/model.safetensors").stat().st_size
    assert f"{found['perplexity']['pruned']['perplexity']:.2f}" in page.text
    assert found["speed"]["ratios"]["decode"]["1"]["median"] > 0
    assert "no held-out part" in page.text  # text.txt was calibrated on, too
    kept = json.loads((out / "measured.json").read_text())
    assert kept == found


def test_what_was_measured_is_kept_until_the_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned("out", "--sparsity", "0.5")
    first = report("out")["measured"]
    with monkeypatch.context() as patch:
        patch.setattr(beside_dense._Work, "measure", None)  # a second measurement would fail
        assert report("out", "-o", "other.html")["measured"] == first
        assert "measured before" in run("report", "out").stdout
    assert report("out", "--force")["measured"]["day"] == first["day"]
    assert report("out", "--data", "stdlib")["measured"]["asked"]["data"] == "stdlib"
    pruned("again", "--sparsity", "0.7")
    shutil.copy("again/model.safetensors", "out/model.safetensors")
    assert report("out")["measured"]["weights"] != first["weights"]
    for content in ("{", '{"format": 1}'):
        Path("out/measured.json").write_text(content)
        assert report("out")["measured"]["perplexity"]


def test_a_source_that_is_gone_is_said_and_can_be_named() -> None:
    pruned("out", "--sparsity", "0.5")
    shutil.move("dense", "moved")
    found = report("out")["measured"]
    assert not found["perplexity"] and found["against"] == "" and found["speed"]["models"]
    assert any("dense model was not found" in sentence for sentence in found["missing"])
    assert "The dense model was not found" in read("out/report.html").text
    assert report("out", "--against", "moved")["measured"]["perplexity"]
    assert "no such directory" in refused("report", "out", "--against", "./nothing")
    assert "no-such-data" in refused("report", "out", "--against", "moved", "--data", "no-such-data")


def test_without_measuring_the_record_is_shown() -> None:
    run("prune", "dense", "-o", "out", "--quiet", "--sparsity", "0.5", *FAST)
    found = report("out", "--no-eval")["measured"]
    assert not found["speed"] and not Path("out/measured.json").exists()
    record = json.loads(Path("out/pruning.json").read_text())
    page = read("out/report.html")
    assert f"{record['perplexity']['pruned']['perplexity']:.2f}" in page.text
    assert "Nothing was measured for this page" in page.text
    assert "--data has no effect" in refused("report", "out", "--no-eval", "--data", "stdlib")


def test_an_old_record_with_few_fields() -> None:
    out = pruned("out", "--sparsity", "0.5")
    record = json.loads((out / "pruning.json").read_text())
    few = {name: record[name] for name in ("format", "recipe", "totals", "targets")}
    (out / "pruning.json").write_text(json.dumps(few))
    report("out", "--no-eval")
    assert len(read("out/report.html").all_of("svg")) == 2


def test_layers_of_different_widths_and_a_packed_result() -> None:
    pruned("own", *UNITS, "--allocation", "loss")
    assert report("own")["measured"]["perplexity"]
    pruned("zeros", "--sparsity", "0.5")
    run("pack", "zeros", "-o", "packed", "--quiet")
    assert report("packed")["measured"]["perplexity"]


def broken(here: Path) -> None:
    Path("out/pruning.json").unlink()


def old_format(here: Path) -> None:
    Path("out/pruning.json").write_text('{"format": 99}')


def foreign(here: Path) -> None:
    Path("out/report.html").write_text("<p>mine</p>")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (broken, "no result of `sparsessm prune`"),
        (old_format, "record format 99"),
        (foreign, "is no report"),
    ],
)
def test_what_cannot_be_shown_is_refused(change: Callable[[Path], None], said: str, here: Path) -> None:
    pruned("out", "--sparsity", "0.5")
    change(here)
    before = {file: file.read_bytes() for file in Path("out").iterdir()}
    assert said in refused("report", "out", "--no-eval")
    assert {file: file.read_bytes() for file in Path("out").iterdir()} == before


def test_places_that_are_no_place() -> None:
    pruned("out", "--sparsity", "0.5")
    assert "is a directory" in refused("report", "out", "--no-eval", "-o", "dense")
    assert "no such directory: 'builtin:pycode'" in refused("report", "builtin:pycode")
    assert "no pruning.json" in refused("report", "dense", "--no-eval")
    Path("mine.html").write_text("mine")
    assert report("out", "--no-eval", "-o", "mine.html", "--force")["out"] == "mine.html"


def test_the_page_belongs_to_the_result_and_goes_with_it() -> None:
    pruned("out", "--sparsity", "0.5")
    report("out")
    pruned("out", "--sparsity", "0.6", "--force")
    assert not {"report.html", "measured.json"} & {file.name for file in Path("out").iterdir()}
    report("out")
    pruned("twice", "--sparsity", "0.7", model="out")
    assert not {"report.html", "measured.json"} & {file.name for file in Path("twice").iterdir()}
