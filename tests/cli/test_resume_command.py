"""`--resume`, `--memory` and the directory of an unfinished run, as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import FAST, refused, run

from sparsessm.calibration.walk import Stop
from sparsessm.checkpoint import memory

pytestmark = pytest.mark.usefixtures("here")

PRUNE = ["prune", "dense", *FAST, "--memory", "256MiB"]


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """After so many passes of windows an exception comes."""
    real, left = Stop.run, [1 << 30]
    ends: list[BaseException] = []

    def counted(self: Stop, *arguments: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            left[0] = 1 << 30
            raise ends[-1]
        real(self, *arguments, **options)

    monkeypatch.setattr(Stop, "run", counted)

    def end(count: int, error: BaseException) -> None:
        left[0] = count
        ends.append(error)

    return end


def files(folder: str) -> dict[str, bytes]:
    """Every file of a result; of its record and card not the seconds."""
    found = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "README.md"}
    found["pruning.json"] = json.dumps({**json.loads(found["pruning.json"]), "seconds": 0}).encode()
    return found


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted; what is done is kept in out.unfinished"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device; what is done is kept"),
        (MemoryError(), 1, "error: out of memory while working on: "),
    ],
    ids=repr,
)
def test_what_was_done_is_kept_and_the_same_command_goes_on(
    error: BaseException, code: int, told: str, after: Callable[[int, BaseException], None]
) -> None:
    run(*PRUNE, "-o", "whole")
    after(9, error)
    ended = run(*PRUNE, "-o", "out", "--quiet", code=code)
    assert ended.stderr.startswith(told) and "--resume goes on" in ended.stderr
    assert not Path("out").exists()
    line = refused(*PRUNE, "-o", "out")
    assert "out.unfinished" in line and "--resume" in line and "--force" in line
    line = refused(*PRUNE, "-o", "out", "--resume", "--sparsity", "0.6")
    assert "sparsity 0.5, now 0.6" in line
    went = run(*PRUNE, "-o", "out", "--resume")
    assert "going on in" in went.stderr
    assert files("out") == files("whole") and not Path("out.unfinished").exists()


def test_what_was_done_can_be_replaced(after: Callable[[int, BaseException], None]) -> None:
    after(9, KeyboardInterrupt())
    run(*PRUNE, "-o", "out", code=130)
    run(*PRUNE, "-o", "out", "--sparsity", "0.6", "--force")
    assert json.loads(Path("out/pruning.json").read_text())["recipe"]["sparsity"] == 0.6
    assert not Path("out.unfinished").exists()


def test_resume_begins_where_there_is_nothing_to_go_on_from() -> None:
    run(*PRUNE, "-o", "out", "--resume")
    assert Path("out/pruning.json").is_file()
    assert "'out' exists" in refused(*PRUNE, "-o", "out", "--resume")


def test_a_mistake_leaves_nothing_behind(here: Path) -> None:
    before = sorted(here.iterdir())
    refused(*PRUNE, "-o", "out", "--length", "100000")
    assert sorted(here.iterdir()) == before


def test_little_memory_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["dense", "--data", "text.txt", "--length", "16", "--json"]
    whole = json.loads(run("eval", *words).stdout)
    monkeypatch.setattr(memory, "_LEAST", 1)
    assert json.loads(run("eval", *words, "--memory", "4K").stdout) == whole


@pytest.mark.parametrize("size", ["6 G B", "GB", "-1GB", "1e9", "6i", "100MB", "0", "inf", "1_000GB"])
def test_a_size_is_a_size(size: str) -> None:
    assert f"memory is {size!r}; allowed: " in refused("eval", "dense", f"--memory={size}")


def test_sizes() -> None:
    assert memory.size_of("6GB") == 6 * 10**9 and memory.size_of("1.5 gib") == 3 << 29
    assert memory.size_of(10**9) == memory.size_of("1000000000") == 10**9
    assert 0 < memory.free() and memory.allowed(None) >= memory.free() // 4
