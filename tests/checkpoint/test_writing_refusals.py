"""A directory appears whole or not at all, and no directory of somebody else's is taken."""

from __future__ import annotations

import errno
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from command import python
from directories import logits, names, write_original, write_stock
from pico import pico_mamba, pico_tokenizer

from sparsessm import checkpoint
from sparsessm.checkpoint import atomic
from sparsessm.checkpoint.reading import Checkpoint


def test_an_existing_target(loaded: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "out"
    checkpoint.save(loaded, target, record={"run": 1})
    with pytest.raises(ValueError, match=r"out' exists; choose another name, or replace it with force=True"):
        checkpoint.save(loaded, target, record={"run": 2})
    assert checkpoint.read_record(target) == {"run": 1}
    (target / "model-00001-of-00009.safetensors").touch()
    checkpoint.save(loaded, target, record={"run": 2}, force=True)
    assert (
        checkpoint.read_record(target) == {"run": 2}
        and not (target / "model-00001-of-00009.safetensors").exists()
    )
    assert names(tmp_path) == {"in", "out"}


def test_targets_that_are_never_taken(loaded: Checkpoint, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter").touch()
    for target, message in (
        (tmp_path / "file", "is a file; name a directory for the result"),
        (tmp_path / "file/below", "cannot be made: .*file' is a file"),
        (tmp_path / "home", r"is not replaced, because it is not a checkpoint \(no config\.json\)"),
        (folder, "overlaps the source"),
        (folder / "below", "overlaps the source"),
        (tmp_path, "overlaps the source"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.refuse_existing(target, True, loaded.source)
        with pytest.raises(ValueError, match=message):
            checkpoint.save(loaded, target, force=True)
    assert names(tmp_path) == {"in", "file", "home"}


def test_parents_are_made_and_unmade(loaded: Checkpoint, tmp_path: Path) -> None:
    loaded.model.backbone.norm_f.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"backbone\.norm_f\.weight has NaN or Inf values in torch\.float32"):
        checkpoint.save(loaded, tmp_path / "a/b/out")
    assert names(tmp_path) == {"in"}
    loaded.model.backbone.norm_f.weight.data[0] = 1e6
    loaded.stored["backbone.norm_f.weight"] = torch.float16
    with pytest.raises(ValueError, match=r"backbone\.norm_f\.weight has NaN or Inf values in torch\.float16"):
        checkpoint.save(loaded, tmp_path / "a/b/out")
    loaded.model.backbone.norm_f.weight.data[0] = 1
    checkpoint.save(loaded, tmp_path / "a/b/out")
    assert names(tmp_path / "a/b") == {"out"}


FULL_DISK = """
import resource, sys
from sparsessm import checkpoint
came = checkpoint.load(sys.argv[1], tokenizer=sys.argv[3] or None)
for size in (100, 4000, 9000, 20000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    for target, force in ((sys.argv[2], True), (sys.argv[2] + "-new/below", False)):
        try:
            checkpoint.save(came, target, force=force)
        except OSError as error:
            print(type(error).__name__, error)
"""


@pytest.mark.parametrize("layout", ["transformers", "state-spaces"])
def test_a_full_disk(tmp_path: Path, layout: str) -> None:
    """A limit on the size of a file is the full disk that a test can have."""
    pico_tokenizer().save_pretrained(tmp_path / "words")
    if layout == "transformers":
        write_stock(tmp_path / "in")
    else:
        write_original(tmp_path / "in", pico_mamba())
    came = checkpoint.load(tmp_path / "in", tokenizer=tmp_path / "words")
    checkpoint.save(came, tmp_path / "out", record={"run": 1})
    done = python(FULL_DISK, tmp_path / "in", tmp_path / "out", tmp_path / "words")
    lines = done.stdout.splitlines()
    assert len(lines) == 8, done
    for line in lines:
        assert re.fullmatch(
            rf"OSError could not write '.*', nothing was left behind: .*{os.strerror(errno.EFBIG)}.*", line
        )
    assert names(tmp_path) == {"in", "out", "words"}
    assert checkpoint.read_record(tmp_path / "out") == {"run": 1}
    assert torch.equal(logits(checkpoint.load(tmp_path / "out").model), logits(came.model))


KILLED = """
import os, signal, sys
from sparsessm import checkpoint
class Files(dict):
    def items(self):  # asked for when the tensors are written and the rest is not
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
        return super().items()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
came = checkpoint.load(sys.argv[1])
came.files = Files(came.files)
checkpoint.save(came, sys.argv[2], force=True)
"""


@pytest.mark.parametrize(
    ("name", "target_exists"), [("SIGKILL", True), ("SIGKILL", False), ("SIGTERM", True), ("SIGINT", True)]
)
def test_a_killed_save(loaded: Checkpoint, tmp_path: Path, name: str, target_exists: bool) -> None:
    target = tmp_path / "out"
    if target_exists:
        checkpoint.save(loaded, target, record={"run": 1})
    done = python(KILLED, tmp_path / "in", target, name)
    # 1 where a second interrupt meets torch's exit handler
    ends = {-getattr(signal, name)} | ({1} if name == "SIGINT" else set())
    assert done.returncode in ends, done
    left = {entry for entry in names(tmp_path) if entry.startswith(".out.saving-")}
    assert bool(left) == (name != "SIGINT")
    assert names(tmp_path) - left == {"in", "out"} - (set() if target_exists else {"out"})
    if target_exists:
        assert checkpoint.read_record(target) == {"run": 1}
    checkpoint.save(loaded, target, force=True)
    assert names(tmp_path) == {"in", "out"}


def test_a_run_killed_between_its_two_renames(loaded: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "out"
    checkpoint.save(loaded, target, record={"run": 1})
    staging = tmp_path / ".out.saving-x"
    (staging / "new").mkdir(parents=True)
    target.rename(staging / "old")
    with pytest.raises(ValueError, match="out' exists"):
        checkpoint.refuse_existing(target, False)
    assert checkpoint.read_record(target) == {"run": 1} and names(tmp_path) == {"in", "out"}


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    message = "appeared while the result was being written"
    with pytest.raises(FileExistsError, match=message), atomic.replacing(target) as folder:
        (folder / "mine").touch()
        atomic.recover(target)
        assert (folder / "mine").exists()
        target.mkdir()
        (target / "another").touch()
    assert names(tmp_path) == {"out"} and names(target) == {"another"}


def test_force_does_not_take_a_project(tmp_path: Path) -> None:
    """A config.json does not make a checkpoint, and a checkpoint's neighbours stay."""
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    (project / "config.json").write_text('{"name": "webapp"}')
    with pytest.raises(ValueError, match="config.json is of something else"):
        checkpoint.refuse_existing(project, True)
    (project / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="it also has '.git'"):
        checkpoint.refuse_existing(project, True)
    (project / ".git").rmdir()
    checkpoint.refuse_existing(project, True)
    (project / "notes.md").touch()
    with pytest.raises(ValueError, match="it also has 'notes.md'"):
        checkpoint.refuse_existing(project, True)
