"""examples/: notebooks run as they lie there and show tables; the chain and the workflow do what they say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import run
from sources import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
EXECUTE = """
import json, sys
import nbclient, nbformat
book = nbformat.read(sys.argv[1], as_version=4)
shorter = {"samples=8": "samples=1", "samples=4": "samples=1", "length=256": "length=64"}
shorter["builtin:"] = sys.argv[2] + "/builtin/"  # of two layers
library = "import pytest, shortened; shortened.use_library(pytest.MonkeyPatch())"
book.cells.insert(0, nbformat.v4.new_code_cell(library))
for cell in book.cells:
    for many, few in shorter.items():
        cell.source = cell.source.replace(many, few)
nbclient.NotebookClient(book, timeout=600, kernel_name="python3").execute()
del book.cells[0]
print(json.dumps(book))
"""


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def shown(cell: dict[str, Any]) -> dict[str, str]:
    """What a cell that ran shows, by its kind."""
    found: dict[str, str] = {}
    for output in cell.get("outputs", []):
        found |= {"text": output["text"]} if output["output_type"] == "stream" else output["data"]
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_lies_in_git_has_no_outputs(path: Path) -> None:
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, few_layers: Path) -> None:
    places = {"HOME": tmp_path, "IPYTHONDIR": tmp_path / "ipython", "TMPDIR": tmp_path}
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "JUPYTER_PLATFORM_DIRS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXECUTE, str(path), str(few_layers)],
        env=env | {name: str(place) for name, place in places.items()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ran = [shown(cell) for cell in json.loads(done.stdout)["cells"] if cell["cell_type"] == "code"]
    tables = [part["text/html"] for part in ran if "text/html" in part]
    if path.stem == "read-a-report":
        assert len(tables) == 4 and sum("image/png" in part for part in ran) == 2
        assert "<td>sparsity</td><td>0.5</td>" in tables[0]
        assert "all projections" in tables[1] and "<td>pruned</td>" in tables[2]
    else:
        assert "<td>stdlib</td>" in tables[0] and "bits a weight" in tables[1] and len(tables) == 2
        assert "MB with its tokenizer" in ran[2]["text"]
        assert len(ran[3]["text"]) > 20


def steps() -> dict[str, dict[str, Any]]:
    (job,) = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text(encoding="utf-8"))["jobs"].values()
    return {step.get("name", step.get("uses")): step for step in job["steps"]}


def test_the_example_of_a_chain_parses_and_its_dry_run_names_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLES / "chain.yaml", tmp_path)
    told = json.loads(run("run", "chain.yaml", "--dry-run", "--json").stdout)
    names = ["inspect", "analyze", "fit", "eval", "report", "export"]
    assert [step["step"] for step in told["steps"]] == names
    assert {step["state"] for step in told["steps"]} == {"runs"}
    assert {step["why"] for step in told["steps"][3:]} == {"after fit"}
    assert [path.name for path in tmp_path.iterdir()] == ["chain.yaml"]
    commented = [line[2:] for line in Path("chain.yaml").read_text().splitlines() if line.startswith("# - ")]
    assert commented == ["- run: upload # after `hf auth login`"]


def test_the_workflow_runs_the_chain_and_keeps_what_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLES / "chain.yaml", tmp_path)
    words = steps()["run"]["run"].split()
    assert words[0] == "sparsessm"
    told = json.loads(run(*words[1:], "--dry-run", "--json").stdout)
    kept = steps()["actions/cache@v4"]["with"]["path"].split()
    written = {step["out"].partition("/")[0] for step in told["steps"] if step["out"]}
    assert {*kept} == written | {"chain.json"}
