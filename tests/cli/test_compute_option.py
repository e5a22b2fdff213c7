"""`--compute`: what was asked for, what it was, and that a result is repeated in its precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import FAST, refused, run

from sparsessm.kernels import products

pytestmark = pytest.mark.usefixtures("here")


def pruned(out: str, *words: str) -> dict[str, Any]:
    run("prune", "-o", out, "--quiet", "--no-eval", *words)
    return json.loads(Path(out, "pruning.json").read_text())


def weights(out: str) -> bytes:
    return Path(out, "model.safetensors").read_bytes()


@pytest.mark.parametrize("tiles", [False, True])
def test_a_result_says_its_precision_and_is_repeated_in_it(
    tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = products.units()
    if tiles and products.FAST not in here:
        pytest.skip("this CPU has no tiles")
    monkeypatch.setattr(products, "units", lambda: here if tiles else ())
    used = "bfloat16" if tiles else "float32"
    auto = pruned("auto", "dense", *FAST)
    assert auto["recipe"]["compute"] == used
    said = auto["machine"]["compute"]
    assert (said["asked"], said["used"], said["by"]) == ("auto", used, "amx" if tiles else "torch")
    other = pruned("other", "dense", "--compute", "float32" if tiles else "bfloat16", *FAST)
    assert other["recipe"]["compute"] != used and weights("other") != weights("auto")
    for name in ("auto", "other"):
        again = pruned("again", "--recipe", name, "--force")
        assert again["recipe"] == json.loads(Path(name, "pruning.json").read_text())["recipe"]
        assert again["machine"]["compute"]["why"] == "asked for" and weights("again") == weights(name)


def test_perplexity_is_measured_in_the_precision_that_was_asked_for() -> None:
    found = {}
    for compute in ("float32", "bfloat16"):
        line = ["eval", "dense", "--data", "text.txt", "--length", "16", "--limit", "5", "--json"]
        (found[compute],) = json.loads(run(*line, "--compute", compute).stdout)["models"]
        assert found[compute]["compute"] == compute
    exact, rounded = (found[compute]["perplexity"] for compute in found)
    assert exact != rounded == pytest.approx(exact, rel=0.01)


def test_an_unknown_precision_is_refused_by_name() -> None:
    known = "unknown compute 'float16'; known: float32, bfloat16, auto; did you mean 'bfloat16'?"
    assert known in refused("prune", "dense", "-o", "out", "--compute", "float16")
    for command in ("eval", "analyze"):
        told = refused(command, "dense", "--data", "text.txt", "--length", "16", "--compute", "float16")
        assert "compute is 'float16'; allowed: float32, bfloat16, auto" in told
    told = refused("eval", "dense", "--tasks", "quiz", "--compute", "float32")
    assert "--compute has no effect with --tasks" in told


def test_analyze_tells_its_precision() -> None:
    line = ["analyze", "dense", "--data", "text.txt", "--length", "16", "--samples", "2", "--windows", "2"]
    line += ["--price", "none", "--sparsities", "0.5", "--json"]
    exact, rounded = (json.loads(run(*line, *more).stdout) for more in ([], ["--compute", "bfloat16"]))
    assert [one["settings"]["compute"] for one in (exact, rounded)] == ["float32", "bfloat16"]
    assert exact["cells"] != rounded["cells"] and len(exact["cells"]) == len(rounded["cells"])
