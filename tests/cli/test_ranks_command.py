"""Commands that several processes do together, as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from command import in_a_process

from sparsessm.cli.ranks import own_gpu

pytestmark = pytest.mark.usefixtures("here")

TEXT = ["--data", "text.txt", "--samples", "24", "--length", "256"]  # three lanes of eight windows
PRUNE = ["prune", "dense", *TEXT]


def test_torchrun_gives_the_result_of_one_process() -> None:
    """The real launcher, once; only the first process prints."""
    assert in_a_process(*PRUNE, "-o", "alone", "-q").returncode == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "sparsessm", *PRUNE, "-o", "out", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ranks.weights("out") == ranks.weights("alone") and not Path("out.unfinished").exists()
    alone, record = (json.loads(Path(name, "pruning.json").read_text()) for name in ("alone", "out"))
    assert json.loads(done.stdout)["perplexity"] == record["perplexity"] == alone["perplexity"]


@pytest.mark.parametrize(
    "options",
    [["--samples", "auto"], ["--bits", "4"], ["--structured", "0.3"]],
    ids=lambda options: options[0],
)
def test_every_way_of_a_run_is_shared(options: list[str]) -> None:
    command = [*PRUNE, *options, "-q", "--no-eval"]
    assert in_a_process(*command, "-o", "alone").returncode == 0
    done = ranks.command(2, *command, "-o", "out")
    assert [(code, err) for code, _, err in done] == [(0, "")] * 2
    assert ranks.weights("out") == ranks.weights("alone")


def test_the_first_one_prints_and_the_others_are_silent() -> None:
    done = ranks.command(
        3, "eval", "dense", "--data", "text.txt", "--length", "64", "--json", "-o", "eval.json"
    )
    assert [code for code, _, _ in done] == [0, 0, 0]
    assert [(out, err) for _, out, err in done[1:]] == [("", ""), ("", "")]
    alone = in_a_process("eval", "dense", "--data", "text.txt", "--length", "64", "--json")
    assert json.loads(done[0][1]) == json.loads(alone.stdout) == json.loads(Path("eval.json").read_text())


def until(blocks: int, programs: list[ranks.Program]) -> None:
    """Wait for so many blocks in the journal."""
    journal = Path("out.unfinished/journal.jsonl")
    while programs[0].returncode is None:
        lines = journal.read_text().splitlines() if journal.exists() else []
        if sum('"block"' in line and '"prune"' in line for line in lines) >= blocks:
            return
        time.sleep(0.005)


def test_a_killed_run_goes_on_with_another_number() -> None:
    assert in_a_process(*PRUNE, "-o", "whole", "-q", "--no-eval").returncode == 0
    programs = ranks.start(2, "-m", "sparsessm.cli", *PRUNE, "-o", "out", "--no-eval")
    until(1, programs)
    for program in programs:
        program.send_signal(signal.SIGKILL)
    ranks.ended(programs)
    assert Path("out.unfinished").is_dir() and not Path("out").exists()
    done = ranks.command(3, *PRUNE, "-o", "out", "--no-eval", "--resume")
    assert [code for code, _, _ in done] == [0] * 3 and "going on in" in done[0][2]
    assert ranks.weights("out") == ranks.weights("whole") and not Path("out.unfinished").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_when_one_has_gone(victim: int) -> None:
    programs = ranks.start(3, "-m", "sparsessm.cli", *PRUNE, "-o", "out", "--no-eval")
    until(1, programs)
    programs[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    done = ranks.ended(programs)
    assert time.monotonic() - began < 60
    for rank, (code, _, err) in enumerate(done):
        if rank != victim:
            told = f"error: process {rank}: process {victim} of this run has gone without a word (killed, or"
            assert code == 1 and told in err and err.count("error:") == 1, err
            assert "what is done is kept in out.unfinished: the same command with --resume goes on" in err


def test_the_others_say_who_failed_and_why() -> None:
    """One of four cannot read its text, and says so; the others wait for it."""
    for rank in (0, 1, 3):
        Path(f"text{rank}.txt").write_bytes(Path("text.txt").read_bytes())
    began = time.monotonic()
    done = ranks.command(4, "eval", "dense", "--data", "text{rank}.txt", "--length", "64")
    assert time.monotonic() - began < 60
    assert [code for code, _, _ in done] == [1] * 4
    (own,) = done[2][2].splitlines()
    why = own.removeprefix("error: process 2: ")
    assert "text2.txt" in why
    for rank in (0, 1, 3):
        (told,) = done[rank][2].splitlines()[-1:]
        assert told.startswith(f"error: process {rank}: process 2 of this run has failed: {why[:40]}"), told


def test_who_waits_for_one_that_works_hears_of_a_third(tmp_path: Path) -> None:
    """The first works for a minute and knows nothing; the last waits for it in native code."""
    code = """
import os, sys, time
sys.argv[1:] = ["eval"]
import torch
from sparsessm.cli import ending, ranks
from sparsessm.architectures.ranks import here
def work():
    with ranks.together(ending.at_once):
        rank = here().number
        print(f"ready {rank}", file=sys.stderr, flush=True)
        if rank == 0:
            time.sleep(60)
        if rank == 1:
            time.sleep(60)
        here().given(None)
ending.begin()
ending.finish(ending.run(work))
"""
    programs = ranks.start(3, "-c", code)
    for program in programs:
        assert program.stderr.readline().startswith("ready")
    began = time.monotonic()
    programs[1].send_signal(signal.SIGKILL)
    done = ranks.ended(programs)
    assert time.monotonic() - began < 20
    for rank in (0, 2):
        code, _, err = done[rank]
        assert code == 1 and f"process {rank}: process 1 of this run has gone without a word" in err, err


def test_a_mistake_is_said_by_who_made_it() -> None:
    done = ranks.command(2, *PRUNE, "-o", "out", "--sparsity", "2")
    assert [code for code, _, _ in done] == [1, 1]
    assert all(f"error: process {rank}: sparsity" in err for rank, (_, _, err) in enumerate(done))


def test_what_cannot_be_shared_is_refused() -> None:
    for rank, (code, _, err) in enumerate(ranks.command(2, "pack", "dense", "-o", "packed")):
        told = f"process {rank}: pack runs in one process, and 2 were started; start it alone"
        assert code == 1 and told in err and not Path("packed").exists()
    for code, _, err in ranks.command(2, "eval", "dense", "--tasks", "piqa"):
        assert code == 1 and "eval --tasks runs in one process" in err


def test_analyze_is_shared() -> None:
    options = ["analyze", "dense", *TEXT, "--windows", "40", "--sparsities", "0.5", "-q"]
    assert in_a_process(*options, "-o", "alone").returncode == 0
    assert [code for code, _, _ in ranks.command(2, *options, "-o", "shared")] == [0, 0]
    alone, shared = (json.loads(Path(name, "analysis.json").read_text()) for name in ("alone", "shared"))
    for found in (alone, shared):
        for timed in (found, *found["cells"]):
            del timed["seconds"]
    assert alone == shared and len(alone["cells"]) > 4


def test_who_waits_for_the_others_can_be_ended() -> None:
    """Native code waits, in which Python's handlers do not run."""
    waiting, late = ranks.start(2, "-m", "sparsessm.cli", "eval", "dense", "--data", "text.txt")
    late.send_signal(signal.SIGKILL)
    time.sleep(3)
    waiting.send_signal(signal.SIGTERM)
    began = time.monotonic()
    ranks.ended([waiting, late])
    assert waiting.returncode not in (0, None) and time.monotonic() - began < 20


def test_nccl_takes_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which GPU is a process's own, as torchrun tells; the machine is made up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for processes, local, own in (
        ("2", "1", "cuda:1"),
        ("1", "0", "cuda:0"),
        ("3", "1", None),
        ("2", "", None),
    ):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        monkeypatch.setenv("LOCAL_RANK", local)
        assert own_gpu() == (own and torch.device(own))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert own_gpu() is None
