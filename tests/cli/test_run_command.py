"""`sparsessm run`: a chain of commands as a user meets it. What its file may say: test_chain.py."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import programs
import pytest
import yaml
from command import COMMAND, refused, run

from sparsessm.cli import chaining
from sparsessm.cli.choosing import chosen_in

FEW = {"data": "text.txt", "samples": "3", "length": "16"}
SAMPLES = {"run": "samples", "model": "source", "data": "text.txt", "length": "16"}
PRUNE = {"run": "prune", "model": "source", "out": "half", **FEW, "no-eval": "true"}
HALF = {**PRUNE, "samples": "samples"}
EVAL = {"run": "eval", "model": ["source", "prune"], "data": "text.txt", "length": "16", "limit": "4"}
PACK = {"run": "pack", "model": "prune", "out": "made/packed"}
FIT = {"run": "fit", "model": "source", "max-increase": "0.3%", **FEW}


def write(*steps: dict[str, Any], source: str = "dense") -> None:
    Path("chain.yaml").write_text(yaml.safe_dump({"source": source, "steps": [*steps]}))


def states(*arguments: str, code: int = 0) -> dict[str, tuple[str, str]]:
    """What became of each step, and why."""
    told = json.loads(run("run", "chain.yaml", "--json", *arguments, code=code).stdout)
    return {step["step"]: (step["state"], step["why"]) for step in told["steps"]}


def forked(words: Any, folder: Path, captured: bool) -> tuple[int, str]:
    """Runs a step as `chaining._program` does, without the seconds of a new Python."""
    with chdir(folder):
        done = programs.run([*COMMAND, *words], stdout=None if captured else 1, stderr=2)
    code = done.returncode
    return (128 - code if code < 0 else code), done.stdout


@pytest.fixture(scope="module")
def whole(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder in which a chain ran, from another directory, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(shelf, folder, dirs_exist_ok=True)
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(chaining, "_program", forked)
        write(SAMPLES, HALF, EVAL, PACK)
    return folder, json.loads(run("run", str(folder / "chain.yaml"), "--json").stdout)


@pytest.fixture
def ran(whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The command lines of the steps that start, which do."""
    lines: list[list[str]] = []

    def noted(words: Any, folder: Path, captured: bool) -> tuple[int, str]:
        lines.append([*words])
        return forked(words, folder, captured)

    monkeypatch.setattr(chaining, "_program", noted)
    yield lines


def test_all_steps_run_and_their_results_lie_beside_the_chain(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, told = whole
    assert [step["state"] for step in told["steps"]] == ["ran"] * 4
    assert {path.name for path in folder.iterdir()} == {
        "chain.yaml", "chain.json", "dense", "text.txt", "samples.json", "half", "eval.json", "made",
    }  # fmt: skip
    dense, half = json.loads((folder / "eval.json").read_text())["models"]
    assert (dense["model"], half["model"], half["windows"]) == ("dense", "half", 4)
    assert told["steps"][2]["result"] == json.loads((folder / "eval.json").read_text())
    assert (folder / "made/packed/packed.safetensors").is_file()


@pytest.mark.usefixtures("ran")
def test_nothing_runs_again_where_nothing_has_changed(started: list[list[str]]) -> None:
    before = Path("chain.json").read_bytes()
    assert states() == {name: ("skipped", "") for name in ("samples", "prune", "eval", "pack")}
    assert not started and Path("chain.json").read_bytes() == before
    Path("half/report.html").write_text("a page")  # says nothing new about the model
    os.utime("dense/model.safetensors")
    assert states("--dry-run")["eval"] == ("skipped", "")


@pytest.mark.usefixtures("ran")
def test_a_changed_option_runs_that_step_and_only_what_follows_from_it(started: list[list[str]]) -> None:
    write(SAMPLES, HALF, {**EVAL, "limit": "5"}, PACK)
    left = ("skipped", "")
    assert states() == {"samples": left, "prune": left, "eval": ("ran", "changed: limit"), "pack": left}
    assert [words[0] for words in started] == ["eval"] and "--force" in started[0]
    assert json.loads(Path("eval.json").read_text())["models"][0]["windows"] == 5
    write(SAMPLES, {**HALF, "seed": "1"}, {**EVAL, "limit": "5"}, PACK)
    after = ("runs", "after prune")
    found = {"samples": left, "prune": ("runs", "changed: seed"), "eval": after, "pack": after}
    assert states("--dry-run") == found
    write(SAMPLES, {**HALF, "memory": "1GB"}, {**EVAL, "limit": "5"}, PACK)  # gives the same bits
    assert {state for state, _ in states("--dry-run").values()} == {"skipped"}


@pytest.mark.usefixtures("ran")
def test_what_a_step_reads_and_wrote_is_looked_at() -> None:
    """The size and the time of a file stay, one byte of it changes."""

    def changed(file: str) -> dict[str, tuple[str, str]]:
        path, before = Path(file), Path(file).stat()
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        told = states("--dry-run")
        content[-1] ^= 1
        path.write_bytes(content)
        return told

    assert changed("text.txt")["samples"] == ("runs", "changed: text.txt")
    assert changed("text.txt")["prune"] == ("runs", "after samples")
    assert changed("dense/model.safetensors")["samples"] == ("runs", "changed: dense")
    told = changed("half/model.safetensors")
    assert told["prune"] == ("runs", "half was changed") and told["eval"] == ("runs", "after prune")
    Path("eval.json").unlink()
    assert states("--dry-run") == {
        **dict.fromkeys(("samples", "prune", "pack"), ("skipped", "")),
        "eval": ("runs", "eval.json is gone"),
    }
    record = json.loads(Path("chain.json").read_text())
    record["steps"]["prune"]["versions"]["torch"] = "1.0"
    Path("chain.json").write_text(json.dumps(record))
    assert states("--dry-run")["prune"] == ("runs", "changed: torch")
    assert {why for _, why in states("--dry-run", "--force").values()} == {
        "--force",
        "after samples",
        "after prune",
    }


@pytest.mark.usefixtures("here")
def test_a_step_that_fails_ends_the_chain_with_its_exit_code_and_its_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    write({**FIT, "max-size": "1KB"}, {"run": "pack", "model": "fit"})
    outcome = run("run", "chain.yaml", code=3)
    assert "│ fit  │ fit     │ failed │" in outcome.stdout and "pack" not in outcome.stdout
    assert "step fit ended with exit code 3; the steps before it are kept" in outcome.stderr
    assert not Path("fit").exists() and "Nothing was written." in capfd.readouterr().out
    write({**PRUNE, "data": "nowhere.txt"})
    outcome = run("run", "chain.yaml", "--quiet", code=1)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and "nowhere.txt" in line and outcome.stdout == outcome.stderr == ""
    assert states("--dry-run") == {"prune": ("runs", "it did not end well")}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_takes_its_step_along_and_goes_on(
    number: signal.Signals, started: list[list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    write({**PRUNE, "samples": "300", "no-eval": "false"})
    journal = Path("half.unfinished/journal.jsonl")
    with programs.Program([*COMMAND, "run", "chain.yaml", "--quiet"], stderr=None) as program:
        until = time.monotonic() + 120
        while not (journal.is_file() and journal.read_bytes().count(b"\n") > 2) and time.monotonic() < until:
            time.sleep(0.005)
        program.send_signal(number)
        code = program.wait()
        said = program.stderr.read() if program.stderr else ""  # ends with the last who could write
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    assert "half.unfinished: the same command with --resume goes on" in said
    assert ("the steps that are done are kept, the same command goes on" in said) == (code > 0)
    handle = os.open("half.unfinished", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody works there any more
    os.close(handle)
    if number == signal.SIGTERM:
        assert states() == {"prune": ("ran", "it did not end well")}
        assert started[0][:2] == ["prune", "--resume"] and Path("half/pruning.json").is_file()
        assert "going on in" in capfd.readouterr().err


@pytest.mark.usefixtures("ran")
def test_the_number_of_windows_that_is_found_is_the_one_that_is_taken(started: list[list[str]]) -> None:
    """Found by a step, it is what `prune --samples auto` finds; another document runs the step again."""
    text = ["--data", "text.txt", "--length", "16"]
    run("prune", "dense", *text, "--samples", "auto", "-o", "auto", "--no-eval", "-q")
    found, auto = (
        json.loads(Path("samples.json").read_text()),
        json.loads(Path("auto/pruning.json").read_text()),
    )
    assert found["samples"] == auto["recipe"]["samples"] and len(found["curve"]) > 1
    assert json.loads(Path("half/pruning.json").read_text())["recipe"]["samples"] == found["samples"]
    assert "'samples.json' exists" in refused("samples", "dense", *text, "-o", "samples.json")
    Path("samples.json").write_text('{"samples": true}')
    assert states("--dry-run")["samples"] == ("runs", "samples.json was changed")
    with pytest.raises(ValueError, match="does not say a number of samples"):
        chosen_in(Path("samples.json"))


@pytest.mark.usefixtures("here")
def test_what_the_chain_did_not_make_is_not_replaced(started: list[list[str]]) -> None:
    write(PRUNE, {**EVAL, "out": "text.json"})
    Path("text.json").write_text("mine")
    assert "step eval: 'text.json' exists, and this chain did not make it" in refused("run", "chain.yaml")
    assert not started and not Path("chain.json").exists() and Path("text.json").read_text() == "mine"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"chain": 2, "steps": {}}', '{"chain": 1, "steps": {"prune": {"state": 1}}}', "\0"],
)
def test_a_record_of_something_else_is_not_overwritten(content: str) -> None:
    write(PRUNE)
    Path("chain.json").write_text(content)
    assert "chain.json" in refused("run", "chain.yaml") and Path("chain.json").read_text() == content


@pytest.mark.usefixtures("here")
def test_two_runs_of_one_chain_do_not_meet() -> None:
    write(PRUNE)
    with open("chain.yaml") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process runs it" in refused("run", "chain.yaml")
    assert states("--dry-run") == {"prune": ("runs", "it did not run yet")}
    assert not Path("chain.json").exists()
