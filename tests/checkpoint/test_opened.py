"""A checkpoint is opened once: found once, judged once, and none of its small files or heads is read again.

What is counted is what the interpreter opens, by an audit hook, and the calls of the one function that reads
the head of a packed file. The safetensors library and the tokenizer's links are not among it.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import write_original
from pico import pico_mamba, pico_tokenizer
from typer.testing import CliRunner

import sparsessm
from sparsessm import checkpoint, runtime
from sparsessm.checkpoint import container, opened, packed
from sparsessm.cli.commands import app
from sparsessm.evaluation.speed import measure

_watched: list[tuple[Path, Counter[str]]] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    """Count what is opened in the folder that is watched; a hook cannot be taken away again."""
    if not _watched or event not in ("open", "os.listdir", "os.scandir"):
        return
    folder, seen = _watched[-1]
    path = arguments[0]
    if isinstance(path, str | os.PathLike):
        path = Path(os.path.abspath(path))
        if path == folder:
            seen["the listing"] += 1
        elif path.parent == folder and path.name != container.PACKED:
            seen[path.name] += 1


sys.addaudithook(_note)


@contextmanager
def reads(folder: Path) -> Iterator[Counter[str]]:
    """How often each file of a folder is opened inside, and "the head" of its packed file read."""
    seen: Counter[str] = Counter()
    read_header = container.read_header

    def counted(file: Path) -> container.Header:
        seen["the head"] += file.parent == folder
        return read_header(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(container, "read_header", counted)
        _watched.append((folder, seen))
        try:
            yield seen
        finally:
            _watched.pop()


def command(*words: str) -> None:
    done = CliRunner().invoke(app, [*words])
    assert not done.exit_code, done.output


ASKED: dict[str, Callable[[Path, Path], object]] = {
    "load": lambda folder, _: sparsessm.load(folder),
    "runtime": lambda folder, _: runtime.load(folder).generate("the", 2),
    "causal_lm": lambda folder, _: _wrapped(folder),
    "measure": lambda folder, _: measure(folder, prompt=2, batches=(1,), rounds=1),
    "generate": lambda folder, _: command("generate", str(folder), "the", "-n", "2"),
    "inspect": lambda folder, _: command("inspect", str(folder)),
    "pack": lambda folder, out: checkpoint.pack(folder, out),
    "unpack": lambda folder, out: checkpoint.unpack(folder, out),
    "read": lambda folder, _: packed.read(folder),
}
KINDS = {
    "stock": [name for name in ASKED if name not in ("unpack", "read")],
    "sharded": ["load", "runtime", "measure", "pack"],
    "original": ["load", "runtime", "measure", "pack"],
    "packed": [name for name in ASKED if name != "pack"],
}


def _wrapped(folder: Path) -> object:
    from sparsessm.runtime.causal_lm import causal_lm

    return causal_lm(runtime.load(folder)).generate(torch.tensor([[1, 2]]), max_new_tokens=2)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of each kind, with a licence, code that `config.json` names, and a record."""
    folder = tmp_path_factory.mktemp("shelf")
    pico_mamba().save_pretrained(folder / "dense")
    pico_tokenizer().save_pretrained(folder / "dense")
    model = sparsessm.load(folder / "dense")
    report = sparsessm.prune(model, method="magnitude", target="projections")
    sparsessm.save(model, folder / "stock", report)
    pico_mamba().save_pretrained(folder / "sharded", max_shard_size="4KB")
    write_original(folder / "original", pico_mamba(), torch.float32, ssm_cfg={"d_state": 8})
    for kind in ("stock", "sharded", "original"):
        pico_tokenizer(60 if kind == "original" else 64).save_pretrained(folder / kind)
        (folder / kind / "LICENSE").write_text("yours\n")
        (folder / kind / "code.py").write_text("from . import other\n")
        if kind != "stock":
            (folder / kind / "pruning.json").write_text('{"targets": []}')
    checkpoint.pack(folder / "stock", folder / "packed")
    return folder


@pytest.mark.parametrize(("kind", "what"), [(kind, what) for kind in KINDS for what in KINDS[kind]])
def test_whatever_is_asked_each_file_is_read_once(kind: str, what: str, shelf: Path, tmp_path: Path) -> None:
    with reads(shelf / kind) as seen:
        ASKED[what](shelf / kind, tmp_path / "out")
    for name in [name for name in seen if name.endswith((".safetensors", ".bin"))]:
        del seen[name]  # tensors, which are looked at once to be checked and once to be taken
    assert seen["config.json"] == 1 and seen["the head"] == (kind == "packed")
    assert not {name: count for name, count in seen.items() if count > 1}


def test_a_second_reading_would_be_seen(shelf: Path) -> None:
    with reads(shelf / "packed") as seen:
        for _ in range(2):
            checkpoint.open_checkpoint(shelf / "packed")
        container.read_header(shelf / "packed" / container.PACKED)
        os.listdir(shelf / "packed")
    assert seen["config.json"] == 2 and seen["the head"] == 1 and seen["the listing"] == 3


@pytest.mark.parametrize("what", ["load", "runtime", "measure", "inspect", "unpack"])
def test_a_name_of_the_hub_is_resolved_once(
    what: str, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetched(source: str, allow_patterns: list[str]) -> str:
        asked.append(source)
        return str(shelf / "packed")

    monkeypatch.setattr(opened, "snapshot_download", fetched)
    monkeypatch.chdir(tmp_path)
    ASKED[what](Path("some/model"), tmp_path / "out")
    assert asked == ["some/model"]


def test_an_open_checkpoint_says_what_it_is(shelf: Path) -> None:
    expected = {"stock": ("transformers", None), "packed": ("transformers", "packed.safetensors")}
    expected |= {"sharded": ("transformers", None), "original": ("state-spaces", None)}
    for kind, (form, file) in expected.items():
        found = checkpoint.open_checkpoint(shelf / kind)
        assert (found.format, found.packed and found.packed.file.name) == (form, file)
        assert found.folder.path == shelf / kind and found.source == str(shelf / kind)
        assert found.config.model_type == found.model_type == "mamba" and found.config.hidden_size == 16
        assert found.record is not None and found.ours["pruning.json"].startswith(b"{")
        assert {"config.json", "LICENSE"} <= found.files.keys() and "tokenizer.json" not in found.files
        assert checkpoint.open_checkpoint(found) is found
        twice = kind == "original"  # its writer keeps both names of a tied tensor
        assert len(found.names) == len(dict(pico_mamba().named_parameters())) + twice


def test_what_it_holds_is_what_was_there_when_it_was_opened(shelf: Path, tmp_path: Path) -> None:
    """Nobody sees two versions of a file: what is checked is what is used and written."""
    pico_mamba().save_pretrained(tmp_path / "in")
    pico_tokenizer().save_pretrained(tmp_path / "in")
    content = (tmp_path / "in/config.json").read_bytes()
    found = checkpoint.open_checkpoint(tmp_path / "in")
    (tmp_path / "in/config.json").write_text('{"model_type": "mamba", "hidden_size": 999}')
    assert checkpoint.load(found).files["config.json"] == content
    assert found.config.hidden_size == 16
