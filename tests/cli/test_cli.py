"""The command line as a whole: tables of what there is, the demo, the program in a process of its own."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
import typer
from command import COMMAND, FAST, in_a_process, refused, run
from programs import Program

import sparsessm
from sparsessm import cli, kernels
from sparsessm.architectures import MODEL_TYPES
from sparsessm.cli import demonstration
from sparsessm.data.texts import DATASETS
from sparsessm.methods import entry_methods

METHODS = entry_methods()

pytestmark = pytest.mark.usefixtures("here")


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


@pytest.mark.usefixtures("little_library")
@pytest.mark.usefixtures("little_library", "short_builtins")
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
    assert "demo-out.small goes on from" in text and "demo-out.int8" in text
    sizes = {
        kind: Path(f"demo-out.{kind}/packed.safetensors").stat().st_size for kind in demonstration.FOLDERS
    }
    assert f"{sizes['packed']:,}" in text and sizes["int8"] < 0.6 * sizes["packed"]
    assert f"{sizes['small']:,}" in text and sizes["small"] < 0.75 * sizes["int8"]
    stock = Path("demo-out/model.safetensors").stat().st_size
    last = f"demo-out.small has {sizes['small']:,} bytes, the dense model {stock:,}; it writes"
    rates = r" [\d,]+ tokens/s, the dense model [\d,]+ \([\d.]+ times as fast\); perplexity [+-][\d.]+%\.$"
    assert re.search(re.escape(last) + rates, " ".join(text.split()))
    del record["perplexity"]["methods"]
    Path("demo-out/pruning.json").write_text(json.dumps(record))
    assert "'demo-out' exists" in refused(*small)  # somebody's own result
    record["perplexity"]["methods"] = methods
    Path("demo-out/pruning.json").write_text(json.dumps(record))
    monkeypatch.setattr(
        demonstration,
        "RUNS",
        {
            demonstration.SAVED: {"method": "magnitude", "target": "projections"},
            demonstration.SMALL: {"method": "rtn", "grid": "int4"},
        },
    )
    document = json.loads(run(*small, "--json", "--quiet").stdout)
    assert document["recipe"]["method"] == "magnitude"
    assert document["text"].startswith(demonstration.PROMPT)
    assert [row["bytes"]["file"] < sizes["packed"] * 1.2 for row in document["packed"]] == [True] * 3
    assert json.loads(Path("demo-out/pruning.json").read_text())["recipe"] == document["recipe"]


def test_as_a_program_stdout_is_only_the_document() -> None:
    done = in_a_process("prune", "dense", "-o", "out", "--json", "--no-eval", *FAST)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == "out"
    assert "Traceback" not in done.stderr
    again = in_a_process("prune", "dense", "-o", "out", *FAST)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith("error: 'out' exists")
    usage = in_a_process("prune", "dense")
    assert usage.returncode == 2
    assert "--out" in usage.stderr
    assert "Traceback" not in usage.stderr


@pytest.mark.parametrize(
    ("sent", "code", "words"), [(signal.SIGINT, 130, ""), (signal.SIGTERM, 143, "--json")]
)
def test_an_interrupted_run_leaves_nothing(sent: signal.Signals, code: int, words: str, here: Path) -> None:
    (here / "text.txt").write_text((here / "text.txt").read_text() * 100)  # seconds to split into tokens
    line = f"prune dense -o out --data text.txt --samples 200 --length 2000 {words}".split()
    before = sorted(here.iterdir())
    program = Program([*COMMAND, *line])
    assert "reading text.txt" in program.stderr.readline()  # it is at work
    time.sleep(0.2)
    program.send_signal(sent)
    rest = program.communicate(timeout=60)[1]
    assert program.returncode == code, rest
    assert "Traceback" not in rest
    assert sorted(here.iterdir()) == before
    last = json.dumps({"event": "interrupted", "text": "nothing was written"})
    assert rest.splitlines()[-1] == (last if words else "interrupted; nothing was written")


def test_a_program_is_told_what_went_wrong_as_an_event() -> None:
    outcome = run("inspect", "no\nwhere", "--json", code=1)
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    event = json.loads(outcome.stderr)
    assert event["event"] == "error" and "nwhere" in event["text"]


def test_the_program_that_the_package_installs() -> None:
    assert isinstance(cli.app, typer.Typer)
    assert callable(cli.main)
