"""examples/: notebooks run as they lie there and show tables; the workflow's programs do what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from sources import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
EXECUTE = """
import json, sys
import nbclient, nbformat
book = nbformat.read(sys.argv[1], as_version=4)
for cell in book.cells:  # fewer windows, shorter ones
    for many, few in {"samples=8": "samples=1", "samples=4": "samples=1", "length=256": "length=64"}.items():
        cell.source = cell.source.replace(many, few)
nbclient.NotebookClient(book, timeout=600, kernel_name="python3").execute()
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
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    places = {"HOME": tmp_path, "IPYTHONDIR": tmp_path / "ipython", "TMPDIR": tmp_path}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "JUPYTER_PLATFORM_DIRS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXECUTE, str(path)],
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


@pytest.mark.parametrize(("mean", "code"), [(0.019, 0), (-0.01, 0), (0.021, 1)])
def test_the_workflow_fails_above_its_limit(tmp_path: Path, mean: float, code: int) -> None:
    models = [{"perplexity": 10.0}, {"perplexity": 10 * (1 + mean), "change": {"mean": mean}}]
    (tmp_path / "eval.json").write_text(json.dumps({"models": models}))
    program = steps()["is it within the limit?"]["run"]
    env = {**os.environ, "LIMIT": "0.02"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == code and not done.stderr
    assert f"{mean:+.2%}, limit +2.00%" in done.stdout


def test_the_workflow_prunes_and_measures(tmp_path: Path) -> None:
    """Its own two lines, on a small model's texts."""
    text = tmp_path / "texts"
    (text / "use").mkdir(parents=True)
    (text / "use/a.txt").write_text("import os\nprint(os.sep)\n" * 400)
    (text / "aside.jsonl").write_text(json.dumps({"text": "import sys\nprint(sys.path)\n" * 400}))
    env = {**os.environ, "MODEL": "builtin:pycode", "BITS": "4.25", "OMP_NUM_THREADS": "1"}
    env["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    for name, fewer in (
        ("prune", "--samples 2 --length 64 --target projections"),
        ("measure", "--length 64 --limit 4"),
    ):
        line = steps()[name]["run"].replace(" --data", f" {fewer} --data")
        subprocess.run(["bash", "-ec", line], cwd=tmp_path, env=env, check=True, capture_output=True)
    dense, small = json.loads((tmp_path / "eval.json").read_text())["models"]
    assert small["change"]["low"] <= small["change"]["mean"] <= small["change"]["high"]
    assert dense["model"] == "builtin:pycode" and dense["windows"] == 4
