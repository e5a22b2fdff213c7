"""report/machine.py: what the record says of the machine, and what a rerun on another one says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import TEXT, pico_mamba, pico_tokenizer
from typer.testing import CliRunner

from sparsessm import kernels
from sparsessm.cli import app
from sparsessm.recipe.recipe import Recipe
from sparsessm.report import machine
from sparsessm.report.record import Report

pytestmark = pytest.mark.usefixtures("here")

pytestmark = pytest.mark.usefixtures("here")


def test_the_same_machine_says_the_same_twice() -> None:
    first, second = machine.current(), machine.current()
    assert first == second and not machine.differences(first, second)
    assert first["threads"] == torch.get_num_threads() and first["kernels"] == kernels.LEVEL
    assert json.loads(json.dumps(first)) == first


def test_what_differs_is_named() -> None:
    now = machine.current()
    assert machine.differences(now | {"threads": 99}, now) == [f"threads 99 (here {now['threads']})"]
    assert machine.differences(now | {"instructions": "Z80"}, now) == [
        f"torch's instruction set 'Z80' (here {now['instructions']!r})"
    ]
    assert len(machine.differences(now | {"cpu": "abacus", "kernels": "none", "blas": "?"}, now)) == 2
    assert machine.differences(now | {"blas": "?"}, now) == ["a BLAS that rounds differently"]


def test_what_a_file_says_is_only_data() -> None:
    now = machine.current()
    assert machine.differences({}, now) == machine.differences({"unknown": 1, "threads": [2]}, now) == []
    (said,) = machine.differences({"cpu": "\x1b[31m" + "x" * 1000}, now | {"cpu": "this"})
    assert "\x1b" not in said and len(said) < 100


def test_a_processor_without_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "missing")
    monkeypatch.setattr("platform.processor", lambda: "")
    assert machine.current()["cpu"] is None
    (tmp_path / "there").write_text("processor : 0\nmodel name\t: Some CPU\nmodel name\t: Other\n")
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "there")
    assert machine.current()["cpu"] == "Some CPU"


def test_the_record_has_the_machine() -> None:
    assert Report({}, [], "", 0.0).record()["machine"] == machine.current()


def prune(*words: Any) -> str:
    done = CliRunner().invoke(app, ["prune", *map(str, words), "--no-eval"])
    assert done.exit_code == 0, done.output
    return done.stderr


def test_a_rerun_with_other_threads_or_kernels_says_so(tmp_path: Path) -> None:
    pico_mamba().save_pretrained("model")
    pico_tokenizer().save_pretrained("model")
    Path("text.txt").write_text(TEXT * 20)
    torch.set_num_threads(1)
    prune("model", "-o", "one", "--data", "text.txt", "--samples", 2, "--length", 16)
    record = json.loads(Path("one/pruning.json").read_text())
    assert record["machine"]["threads"] == 1 and record["machine"]["kernels"] == kernels.LEVEL
    assert "may differ" not in prune("--recipe", "one", "-o", "again")
    assert Path("again/model.safetensors").read_bytes() == Path("one/model.safetensors").read_bytes()
    torch.set_num_threads(2)
    assert "note: one was made with threads 1 (here 2); masks may differ\n" in prune(
        "--recipe", "one", "-o", "two"
    )
    assert "may differ" not in prune("--recipe", "one", "-o", "plain", "--method", "magnitude")
    torch.set_num_threads(1)
    if kernels.LEVEL != "reference":
        kernels.LEVEL = "reference"
        assert "(here 'reference')" in prune("--recipe", "one/pruning.json", "-o", "slow")
    record["machine"], record["versions"]["torch"] = "not a machine", "0.0"
    Path("one/pruning.json").write_text(json.dumps(record))
    assert "was made with torch '0.0' (here " in prune("--recipe", "one", "-o", "old")


def test_a_plain_recipe_was_made_nowhere() -> None:
    Path("recipe.yaml").write_text("sparsity: 0.5\n")
    assert Recipe.made_with("recipe.yaml") == {}


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "SPARSESSM_KERNELS"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True)


def test_the_environment_holds_the_kernels_at_a_level() -> None:
    level = "from sparsessm import kernels; print(kernels.LEVEL)"
    assert python(level, SPARSESSM_KERNELS="reference").stdout == "reference\n"
    assert python(level, SPARSESSM_KERNELS="").stdout == f"{kernels.LEVELS[-1]}\n"
    command = "import sys, sparsessm.cli; sys.argv[1:] = ['--version']; sparsessm.cli.main()"
    refused = python(command, SPARSESSM_KERNELS="avx9")
    allowed = ", ".join(kernels.LEVELS)
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr == f"error: SPARSESSM_KERNELS is 'avx9'; allowed here: {allowed}\n"
