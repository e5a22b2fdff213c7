"""A digest of a file or directory: it changes with what it should, also where only parts are read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from command import refused, run
from safetensors.torch import save_file

from sparsessm.checkpoint import digests
from sparsessm.checkpoint.digests import digest


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_names_sizes_and_contents_count_and_what_is_left_out_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    (folder / "a").write_text("one")
    (folder / "inner/b").write_text("two")
    seen = {digest(folder)}
    (folder / "a").rename(folder / "c")
    seen.add(digest(folder))
    (folder / "inner/b").write_text("2wo")
    seen.add(digest(folder))
    (folder / "note").write_text("")
    assert len(seen) == 3 and digest(folder) not in seen
    assert digest(folder, without=["note"]) in seen
    (tmp_path / "copy").write_text("one")
    assert digest(folder / "c") == digest(tmp_path / "copy")  # of a file the name does not count
    with pytest.raises(OSError):
        digest(folder / "nothing")


def test_one_changed_tensor_of_a_large_file_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "WHOLE", 1000)
    file = tmp_path / "model.safetensors"
    tensors = {name: torch.full((5000,), 1.0) for name in "abc"}
    save_file(tensors, file)
    before = digest(file)
    for name in tensors:
        save_file({**tensors, name: torch.full((5000,), 1.5)}, file)
        assert digest(file) != before, name
    save_file(tensors, file, metadata={"format": "pt"})
    assert digest(file) != before


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x05" + b"\0" * 7 + b"[1,2]", b"\x02" + b"\0" * 7 + b"{}"]
)
def test_a_damaged_large_file_has_a_digest_too(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever loads it says what is wrong."""
    monkeypatch.setattr(digests, "WHOLE", 1000)
    file = tmp_path / "model.safetensors"
    file.write_bytes(content + bytes(3 << 20))
    before = digest(file)
    assert len(before) == 64
    if content != b"\x02" + bytes(7) + b"{}":  # a head without tensors: nothing else belongs to it
        flip(file, (3 << 20) - 1)
        assert digest(file) != before


def test_inspect_refuses_another_file_than_was_expected(here: Path) -> None:
    right = hashlib.sha256((here / "dense/config.json").read_bytes()).hexdigest()
    run("inspect", "dense", "--sha256", f"config.json={right}", "--quiet")
    told = refused(
        "inspect", "dense", "--sha256", f"config.json={right}", "--sha256", f"config.json={'0' * 64}"
    )
    assert f"its SHA-256 is {right}, expected was 000" in told
    assert "'no.json', which is no file in 'dense'" in refused(
        "inspect", "dense", "--sha256", f"no.json={right}"
    )
    assert "which is no file" in refused("inspect", "dense", "--sha256", f"../text.txt={right}")
    for wrong in ("config.json", f"config.json={right[1:]}", f"config.json={'g' * 64}"):
        assert "allowed: FILE=SHA256 with 64 hex digits" in refused("inspect", "dense", "--sha256", wrong)
