"""The system is told what will be read soon, and has it in its cache of files then."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pico import pico_mamba, pico_tokenizer
from whereabouts import NOTHING

from sparsessm.architectures import adapt
from sparsessm.checkpoint import Streaming, load, pack
from sparsessm.checkpoint.container import Tensors, read_header
from sparsessm.checkpoint.shelf import Shelf

PAGE = mmap.PAGESIZE


def in_cache(file: Path) -> list[bool]:
    """Of each page of a file, whether the system has it in memory."""
    size = file.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // PAGE))()
    with open(file, "rb") as content:
        mapped = mmap.mmap(content.fileno(), size, access=mmap.ACCESS_COPY)
    there = ctypes.c_char.from_buffer(mapped)
    where, count = ctypes.c_void_p(ctypes.addressof(there)), ctypes.c_size_t(size)
    assert ctypes.CDLL(None).mincore(where, count, pages) == 0
    return [bool(page & 1) for page in pages]


def evict(file: Path) -> None:
    """Nothing of a file is in memory any more; there is nothing to test where that cannot be."""
    with open(file, "rb") as content:
        os.fsync(content.fileno())
        os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(in_cache(file)):
        pytest.skip("the file system keeps its files in memory")


def spans(file: Path) -> dict[str, range]:
    """The whole pages of each array of a safetensors file."""
    with open(file, "rb") as content:
        size = 8 + int.from_bytes(content.read(8), "little")
        head = json.loads(content.read(size - 8))
    offsets = {name: entry["data_offsets"] for name, entry in head.items() if name != "__metadata__"}
    return {name: range(-(-(size + a) // PAGE), (size + b) // PAGE) for name, (a, b) in offsets.items()}


def comes(file: Path, pages: range) -> bool:
    """Whether all of these pages come into memory within some seconds."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if all(in_cache(file)[pages.start : pages.stop]):
            return True
        time.sleep(0.01)
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with blocks of 3 MiB, stock and packed."""
    folder = tmp_path_factory.mktemp("wide")
    pico_mamba(hidden_size=128, intermediate_size=2048, num_hidden_layers=8).save_pretrained(folder / "m")
    pico_tokenizer().save_pretrained(folder / "m")
    pack(folder / "m", folder / "packed")
    state = {"first": torch.zeros(1 << 18), "second": torch.ones(1 << 18), "third": torch.ones(1 << 18)}
    torch.save(state, folder / "old.bin")
    return folder


PLACE = "backbone.layers.{}.mixer.in_proj.weight"
NAME = PLACE.format(5)
# far behind the beginning of the file: who opens it gets that, 8 MiB on some machines


def stock(folder: Path) -> tuple[Path, Callable[[str], None], str]:
    file = folder / "m/model.safetensors"
    return file, Shelf({file: [NAME]}, safetensors=True).soon, NAME


def packed(folder: Path) -> tuple[Path, Callable[[str], None], str]:
    file = folder / "packed/packed.safetensors"
    header = read_header(file)
    return file, Tensors(header, header.shapes).soon, NAME


@pytest.mark.parametrize("kind", [stock, packed])
def test_a_tensor_that_will_be_asked_for_comes_and_others_do_not(
    kind: Callable[[Path], tuple[Path, Callable[[str], None], str]], folder: Path
) -> None:
    file, soon, name = kind(folder)
    where = spans(file)
    evict(file)
    soon(name)
    assert comes(file, where[name])
    assert not any(in_cache(file)[page] for page in where[PLACE.format(7)])


def test_tensors_of_a_bin_come_too(folder: Path) -> None:
    file = folder / "old.bin"
    shelf = Shelf({file: ["first", "second", "third"]}, safetensors=False)
    evict(file)
    shelf.soon("second")
    end = time.monotonic() + 20
    while sum(in_cache(file)) < (1 << 20) // PAGE and time.monotonic() < end:
        time.sleep(0.01)
    assert (1 << 20) // PAGE <= sum(in_cache(file))
    assert torch.equal(shelf["second"], torch.ones(1 << 18))


@pytest.mark.parametrize("source", ["m", "packed"])
def test_a_closed_block_comes_and_an_open_one_is_there(source: str, folder: Path) -> None:
    checkpoint = load(folder / source, streaming=NOTHING)
    blocks, residence = checkpoint.architecture().blocks, checkpoint.residence
    (file,) = (folder / source).glob("*.safetensors")
    evict(file)
    assert residence.expect(blocks[5]) is False
    assert comes(file, spans(file)[NAME])
    assert not any(in_cache(file)[page] for page in spans(file)[PLACE.format(7)])
    with residence.holding(blocks[5]):
        assert residence.expect(blocks[5]) is True
    copy, other = residence.copied(checkpoint.model)
    evict(file)
    other.expect(adapt(copy).blocks[5])
    assert comes(file, spans(file)[NAME])


def test_a_changed_block_comes_from_the_working_directory(folder: Path, tmp_path: Path) -> None:
    checkpoint = load(folder / "m", streaming=Streaming(1, tmp_path))
    block = checkpoint.architecture().blocks[5]
    with checkpoint.residence.holding(block), torch.no_grad():
        for parameter in block.layer.parameters():
            parameter += 1
    file = tmp_path / "00005.safetensors"
    evict(file)
    checkpoint.residence.expect(block)
    assert comes(file, spans(file)["mixer.in_proj.weight"])


def test_what_cannot_be_read_is_said_where_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "old.bin"
    file.write_bytes((folder / "old.bin").read_bytes())
    shelf = Shelf({file: ["first"]}, safetensors=False)
    file.unlink()
    shelf.soon("first")
    with pytest.raises(ValueError, match="old.bin: not readable"):
        shelf["first"]
