"""Runs that are cut short at any place and go on: the same bits, nothing done twice, everything else refused.

`tools/kills.py` kills real processes; here a run ends in a method, at a place that the test chooses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import write_stock
from whereabouts import PLENTY, TOKENS, in_journal, journalled, plain, pruned, same, values, written

from sparsessm.calibration.walk import Stop
from sparsessm.checkpoint import Journal, folder_of, unfinished

RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mamba", {"sparsity": 0.5}),
    ("mamba", {"target": "head", "method": "sparsegpt"}),
    ("mamba", {"method": "magnitude"}),
    ("mamba2", {"pattern": "structured:state", "sparsity": 0.5}),
    ("jamba", {"sparsity": 0.5}),
    ("zamba2", {"sparsity": 0.5, "price": "none"}),
)


class _Cut(Exception):
    """The power is off."""


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_bytes().splitlines()]


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Call it with a number: after so many passes and lines the next one ends in the middle."""
    left = [1 << 30]

    def counted(method: Any, after: bool) -> Any:
        def called(*arguments: Any, **options: Any) -> Any:
            if not after:
                left[0] -= 1
                if left[0] < 0:
                    raise _Cut
            found = method(*arguments, **options)
            if after:
                left[0] -= 1
                if left[0] < 0:
                    raise _Cut
            return found

        return called

    monkeypatch.setattr(Stop, "run", counted(Stop.run, after=False))
    monkeypatch.setattr(Journal, "_add", counted(Journal._add, after=True))
    yield lambda count: left.__setitem__(0, count)


@pytest.mark.parametrize(("name", "fields"), RUNS, ids=str)
def test_a_run_cut_short_anywhere_gives_the_bits_of_one_that_was_not(
    name: str, fields: dict[str, Any], tmp_path: Path, off: Any
) -> None:
    source = written(name, tmp_path / "m", torch.bfloat16)
    whole, report = pruned(source, None, **fields)
    expected = values(whole), plain(report)
    out, cuts = tmp_path / "out", 0
    for count in (1, 2, 4, 9, 17):
        resume = False
        for again in (count, count // 2, 1 << 30):  # cut short twice, then left alone
            off(again)
            try:
                found = journalled(source, out, resume=resume, **fields)
            except _Cut:
                cuts, resume = cuts + 1, True
                continue
            break
        else:
            raise AssertionError("never left alone")
        assert same(found[0], expected[0]) and found[1] == expected[1], count
        done = [(line["stage"], line["block"]) for line in lines_of(folder_of(out)) if "block" in line]
        assert len(done) == len(set(done))
        with unfinished(out, force=True):  # the next count begins anew
            pass
    assert cuts >= 4


def test_what_is_in_memory_goes_on_too(tmp_path: Path, off: Any) -> None:
    source, out = written("mamba", tmp_path / "m"), tmp_path / "out"
    whole, report = pruned(source, None)
    off(12)
    with pytest.raises(_Cut), unfinished(out) as journal:
        in_journal(source, journal, PLENTY)
    off(1 << 30)
    with unfinished(out, resume=True) as journal:
        found, record = in_journal(source, journal, PLENTY)
    assert same(found, values(whole)) and record == plain(report)


@pytest.fixture
def cut(tmp_path: Path, off: Any) -> tuple[Path, Path]:
    """A source, and where the result of a run that was cut short would be."""
    source, out = written("mamba", tmp_path / "m"), tmp_path / "out"
    off(14)
    with pytest.raises(_Cut):
        journalled(source, out, resume=False)
    off(1 << 30)
    assert any("block" in line for line in lines_of(folder_of(out)))
    return source, out


def test_an_unfinished_run_is_named_and_neither_lost_nor_taken_for_something_else(
    cut: tuple[Path, Path],
) -> None:
    source, out = cut
    before = lines_of(folder_of(out))
    with pytest.raises(ValueError, match=r"holds an unfinished run \(\d+ blocks done.*--resume.*--force"):
        journalled(source, out, resume=False)
    with pytest.raises(ValueError, match="something else: sparsity 0.5, now 0.6"):
        journalled(source, out, resume=True, sparsity=0.6)
    with pytest.raises(ValueError, match="calibration [0-9a-f]{12}"):
        with unfinished(out, resume=True) as journal:
            in_journal(source, journal, tokens=TOKENS.flip(1))
    write_stock(source, torch.bfloat16)
    with pytest.raises(ValueError, match="weights [0-9a-f]{12}"):
        journalled(source, out, resume=True)
    assert lines_of(folder_of(out)) == before


@pytest.mark.parametrize("kind", ["*.safetensors", "states-*"])
def test_a_damaged_file_is_refused(cut: tuple[Path, Path], kind: str) -> None:
    source, out = cut
    for file in folder_of(out).glob(kind):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.*begin anew \(--force\)"):
        journalled(source, out, resume=True)


def test_a_line_that_was_cut_off_does_not_count(cut: tuple[Path, Path]) -> None:
    source, out = cut
    whole, report = pruned(source, None)
    with open(folder_of(out) / "journal.jsonl", "ab") as file:
        file.write(b'{"stage": "prune", "blo')
    found, record = journalled(source, out, resume=True)
    assert same(found, values(whole)) and record == plain(report)


@pytest.mark.parametrize("content", [b"[1]\n", b"{}\n", b'{"format": 1}\n', b"\xff\n"])
def test_a_journal_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = folder_of(tmp_path / "out")
    folder.mkdir()
    (folder / "journal.jsonl").write_bytes(content)
    with (
        pytest.raises(ValueError, match=r"not a journal.*--force"),
        unfinished(tmp_path / "out", resume=True),
    ):
        pass


@pytest.mark.parametrize("how", [{"force": True}, {"resume": True}, {}], ids=str)
@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_what_somebody_else_has_there_is_left_alone(tmp_path: Path, kind: str, how: dict[str, bool]) -> None:
    folder = folder_of(tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("years of work")
    if kind == "directory":
        (tmp_path / "other").rename(folder)
    elif kind == "link":
        folder.symlink_to(tmp_path / "other")
    else:
        folder.write_text("years of work")
    with pytest.raises(ValueError, match="is in the way: it is no unfinished run"):
        with unfinished(tmp_path / "out", **how):
            pass
    file = folder if kind == "file" else folder / "thesis.txt"
    assert file.read_text() == "years of work"


def test_two_processes_do_not_work_on_one_result(tmp_path: Path) -> None:
    with unfinished(tmp_path / "out"):
        with pytest.raises(ValueError, match="another process"), unfinished(tmp_path / "out", force=True):
            pass
    assert not folder_of(tmp_path / "out").exists()  # nothing was done that would be lost


def test_the_directory_above_goes_too_where_nothing_was_done(tmp_path: Path) -> None:
    with unfinished(tmp_path / "new/deep/out"):
        assert folder_of(tmp_path / "new/deep/out").is_dir()
    assert not (tmp_path / "new").exists()


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    source = written("mamba", tmp_path / "m")
    odd = {"a": [1, 0.1, float("inf"), None, "x"], "t": {"u": torch.rand(3, dtype=torch.float64)}}
    with unfinished(tmp_path / "out") as journal:
        in_journal(source, journal, method="magnitude")
        assert journal.once("odd", lambda: odd) is odd
    with unfinished(tmp_path / "out", resume=True) as journal:
        found = journal.once("odd", lambda: None)
        assert found["a"] == odd["a"] and torch.equal(found["t"]["u"], odd["t"]["u"])  # type: ignore[index]
