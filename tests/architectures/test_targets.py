"""What would stop the last step is asked before the first: names, places, and room on the disk."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_mamba, pico_tokenizer
from typer.testing import CliRunner

import sparsessm
from sparsessm import checkpoint
from sparsessm.checkpoint import atomic
from sparsessm.cli import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("targets")


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    pico_mamba().save_pretrained(tmp_path / "in")
    pico_tokenizer().save_pretrained(tmp_path / "in")
    return tmp_path / "in"


def entries(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(200, 255),
    letter=st.sampled_from(["a", "é", "雪", "🦀", ".saving-"]),
    exists=st.booleans(),
)
def test_every_name_that_the_file_system_takes_can_be_written_and_recovered(
    folder: Path, size: int, letter: str, exists: bool
) -> None:
    name = (letter * size).encode()[:size].decode(errors="ignore")
    target = folder / name
    if exists:
        target.mkdir()
    assert checkpoint.refuse_target(target) == target
    with atomic.replacing(target, force=exists) as new:
        (new / "content").touch()
        (left,) = entries(folder) - {name}
    assert entries(folder) == {name} and entries(target) == {"content"}
    (folder / left / "old").mkdir(parents=True)  # as a run leaves it that was killed
    (folder / left / "old/first").touch()
    (target / "content").unlink()
    target.rmdir()
    atomic.recover(target)
    assert entries(folder) == {name} and entries(target) == {"first"}
    (target / "first").unlink()
    target.rmdir()


def test_what_belongs_to_a_target_of_a_longer_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".out.saving-x.saving-12345678/old").mkdir(parents=True)
    atomic.recover(tmp_path / "out")
    assert entries(tmp_path) == {".out.saving-x.saving-12345678"}
    atomic.recover(tmp_path / "out.saving-x")
    assert entries(tmp_path) == {"out.saving-x"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "the name of a directory is not empty, is UTF-8"),
        ("a\0b", "the name of a directory is not empty, is UTF-8"),
        ("\udcff", "the name of a directory is not empty, is UTF-8"),
        (".", "is or contains the current directory"),
        ("..", "is or contains the current directory"),
        ("/", "is or contains the current directory"),
        ("/proc", "is a mount point, which cannot be replaced"),
        ("/proc/out", "cannot be made: "),
        ("/dev/null/out", "'/dev/null' is a file"),
        ("file", "is a file; name a directory for the result"),
        ("file/out", "file' is a file"),
        ("file/deep/out", "file' is a file"),
        ("loop", "cannot be made: its links lead in a circle"),
        ("loop/out", "cannot be made: "),
        ("n" * 256, "(its name has 256 bytes; allowed here: 255|too long)"),
        ("new/" + "é" * 128, "(its name has 256 bytes; allowed here: 255|too long)"),
        ("n" * 300 + "/out", "(its name has 300 bytes; allowed here: 255|too long)"),
        ("/".join(["n" * 200] * 25), "(paths in it have up to|too long)"),
        ("/".join(["n" * 200] * 20)[:3990], "(paths in it have up to|too long)"),
    ],
)
def test_a_place_where_nothing_can_be_made_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for force in (False, True):
        with pytest.raises(ValueError, match=words) as caught:
            checkpoint.refuse_existing(name, force)
        assert "\n" not in str(caught.value)
    assert entries(tmp_path) == {"file", "loop"}


def test_the_parent_of_the_current_directory_is_not_moved_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out/inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out/inner")
    with pytest.raises(ValueError, match="is or contains the current directory"):
        checkpoint.refuse_existing(tmp_path / "out", True)


def test_a_link_that_leads_nowhere_yet_is_followed(stock: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("new/place")
    sparsessm.save(sparsessm.load(stock), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "new/place/config.json").is_file()
    assert entries(tmp_path) == {"in", "link", "new"} and entries(tmp_path / "new") == {"place"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_right_to_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked/full").mkdir(parents=True)
    (tmp_path / "locked/full/config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "locked").chmod(0o500)
    try:
        for name in ("locked/out", "locked/a/out"):
            with pytest.raises(ValueError, match=r"cannot be made: Permission denied"):
                checkpoint.refuse_existing(tmp_path / name, False)
        with pytest.raises(ValueError, match="cannot be (made|replaced)"):
            checkpoint.refuse_existing(tmp_path / "locked/full", True)
    finally:
        (tmp_path / "locked").chmod(0o700)


def test_a_disk_with_too_little_room_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"new/out' needs about [\d,]{20,} bytes, .* room for [\d,]+; free"):
        checkpoint.refuse_room(tmp_path / "new/out", 1 << 60)
    checkpoint.refuse_room(tmp_path / "new/out", 1)


@pytest.mark.parametrize("command", ["prune", "save", "pack", "unpack", "demo", "structured"])
def test_room_is_asked_for_before_anything_is_written(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The disk is said to be full; each command is refused, and the directory beside it is untouched."""
    came = sparsessm.load(stock)
    size = sum(t.numel() * 4 for t in {id(t): t for t in came.model.state_dict().values()}.values())
    checkpoint.pack(stock, tmp_path / "packed")
    sparsessm.save(came, tmp_path / "out")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    free = SimpleNamespace(total=1 << 30, used=0, free=size // 8)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(atomic, "_MARGIN", 0)
    if command == "save":
        with pytest.raises(ValueError, match="needs about"):
            sparsessm.save(came, tmp_path / "out", force=True)
    else:
        prune = ["prune", str(stock), "--no-eval"]
        words = {
            "prune": [*prune, "--method", "magnitude"],
            "structured": [*prune, "--pattern", "structured:state"],
            "pack": ["pack", str(stock)],
            "unpack": ["unpack", str(tmp_path / "packed")],
            "demo": ["demo"],
        }[command]
        name = "new" if command == "demo" else "out"
        force = [] if command == "demo" else ["--force"]
        done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / name), "-q", *force])
        assert done.exit_code == 1, done.output
        assert re.fullmatch(r"error: '.*' needs about [\d,]+ bytes, but .*\n", done.output), done.output
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert entries(tmp_path) == {"in", "packed", "out"}


def test_a_smaller_result_needs_less_room(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came = sparsessm.load(stock)
    size = checkpoint.writing.stored_bytes(came)
    free = SimpleNamespace(total=1 << 30, used=0, free=size)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(atomic, "_MARGIN", 0)
    came.files.clear()
    checkpoint.refuse_full(tmp_path / "new", came, 0.9)
    with pytest.raises(ValueError, match=f"room for {size:,}"):
        checkpoint.refuse_full(tmp_path / "new", came)


def test_analyze_may_write_where_it_stands_but_not_over_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert checkpoint.refuse_target(".", replaced=False) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file' is a file"):
        checkpoint.refuse_target("file", replaced=False)
    assert entries(tmp_path) == {"file"}
