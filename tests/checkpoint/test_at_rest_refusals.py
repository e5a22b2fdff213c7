"""Packing, unpacking and looking, which build no model, refuse what loading refuses, and leave nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import python
from directories import names
from packable import SOURCES, edited, stock
from pico import pico_mamba

from sparsessm import checkpoint
from sparsessm.checkpoint import container, packed_file

EXPERT = "model.layers.1.feed_forward.experts.2.up_proj.weight"
IN = "backbone.layers.0.mixer.in_proj.weight"
SPOILED: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = [
    ("jamba mixed", lambda tensors: tensors.pop(EXPERT)),
    ("jamba mixed", lambda tensors: tensors.update({EXPERT: tensors[EXPERT] * torch.inf})),
    ("jamba mixed", lambda tensors: tensors.update({EXPERT: tensors[EXPERT][1:]})),
    ("mamba untied", lambda tensors: tensors.update({"more": torch.ones(2)})),
    ("mamba untied", lambda tensors: tensors.update({IN: tensors[IN].double()})),
    (
        "mamba without generation_config",
        lambda tensors: tensors.update({"lm_head.weight": torch.ones(64, 16)}),
    ),
]


@pytest.mark.parametrize(("kind", "spoil"), SPOILED)
def test_what_loading_refuses_is_refused_in_the_same_words(
    kind: str, spoil: Callable[[dict[str, torch.Tensor]], Any], tmp_path: Path
) -> None:
    SOURCES[kind](tmp_path / "in")
    edited(tmp_path / "in", spoil)
    said = []
    for attempt in (checkpoint.load, lambda f: checkpoint.pack(f, tmp_path / "out"), at_rest):
        with pytest.raises(ValueError) as caught:
            attempt(tmp_path / "in")
        said.append(str(caught.value))
    assert said[0] == said[1] == said[2] and names(tmp_path) == {"in"}


def at_rest(folder: Path) -> checkpoint.AtRest:
    return checkpoint.at_rest(checkpoint.open_checkpoint(folder))


def test_a_damaged_packed_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    checkpoint.pack(stock(tmp_path / "in", pico_mamba()), tmp_path / "packed")
    with open(tmp_path / "packed" / container.PACKED, "r+b") as file:
        file.seek(-5, 2)
        file.write(b"\xff")
    said = []
    for attempt in (checkpoint.load, lambda f: checkpoint.unpack(f, tmp_path / "deep/out"), at_rest):
        with pytest.raises(ValueError, match="is damaged: its checksum is") as caught:
            attempt(tmp_path / "packed")
        said.append(str(caught.value))
    assert said[0] == said[1] == said[2] and names(tmp_path) == {"in", "packed"}


def test_a_source_that_changes_while_it_is_packed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = stock(tmp_path / "in", pico_mamba()), packed_file.write

    def changed(*arguments: Any) -> None:
        with open(folder / "model.safetensors", "ab") as file:
            file.write(b"\0")
        write(*arguments)

    monkeypatch.setattr(packed_file, "write", changed)
    with pytest.raises(ValueError, match=r"model\.safetensors: it was changed while it was read"):
        checkpoint.pack(folder, tmp_path / "out")
    assert names(tmp_path) == {"in"}


@pytest.mark.parametrize("form", ["transformers", "state-spaces"])
def test_a_full_disk(form: str, tmp_path: Path) -> None:
    """A limit on the size of a file is the full disk that a test can have."""
    SOURCES["original" if form == "state-spaces" else "mamba2"](tmp_path / "in")
    checkpoint.pack(tmp_path / "in", tmp_path / "packed")
    done = python(FULL_DISK, tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == 8 and all(os.strerror(errno.EFBIG) in line for line in lines), done
    assert all(
        line.startswith(f"could not write '{tmp_path}/out', nothing was left behind") for line in lines
    )
    assert names(tmp_path) == {"in", "packed"}


FULL_DISK = """
import resource, sys
from sparsessm import checkpoint
for size in (100, 4000, 8000, 10000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    for command, source in (("pack", "in"), ("unpack", "packed")):
        try:
            getattr(checkpoint, command)(f"{sys.argv[1]}/{source}", f"{sys.argv[1]}/out")
        except OSError as error:
            print(error)
"""
