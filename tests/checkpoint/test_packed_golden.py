"""Packed files to the byte: golden files, which a plain reader and the safetensors library read too."""

from __future__ import annotations

from pathlib import Path

import plain_reader
import pytest
import torch
from golden_files import (
    CODED,
    DT,
    EMBEDDING,
    GOLDEN,
    GOLDENS,
    IN,
    LABELS,
    OUT,
    A,
    X,
    golden_coded,
    golden_tensors,
    opened,
    same,
    write_golden_source,
)
from safetensors import safe_open
from safetensors.torch import load_file

from sparsessm import checkpoint
from sparsessm.checkpoint import container, packed, packed_file


@pytest.mark.parametrize("name", GOLDENS)
def test_packing_gives_the_golden_bytes(tmp_path: Path, name: str) -> None:
    write_golden_source(tmp_path / "in")
    checkpoint.pack(tmp_path / "in", tmp_path / "out", **GOLDENS[name])
    written = (tmp_path / "out" / container.PACKED).read_bytes()
    assert written == (GOLDEN / name / container.PACKED).read_bytes()


@pytest.mark.parametrize("name", GOLDENS)
def test_the_golden_files_hold_the_golden_tensors(name: str) -> None:
    tensors = golden_tensors()
    read = packed.read(GOLDEN / name)
    plain = plain_reader.read(GOLDEN / name / container.PACKED)
    assert read.tensors.keys() == plain.keys() == tensors.keys() and read.format == "transformers"
    assert read.config.hidden_size == 8 and read.notes == ()
    for key, tensor in tensors.items():
        encoded = read.tensors[key]
        shape, dtype, entries = plain[key]
        assert (tuple(shape), dtype) == (tensor.shape, str(tensor.dtype).removeprefix("torch."))
        assert same(encoded.decode(torch.float32), torch.tensor(entries).reshape(shape)), key
        if name == "lossless":
            assert same(encoded.decode(), tensor), key
            assert encoded.label == LABELS.get(key, "dense"), key
        elif key in (IN, X, OUT, EMBEDDING):
            assert encoded.values.dtype == torch.int8
            assert (encoded.decode() - tensor).abs().max() <= tensor.abs().max() / 127
        else:
            assert same(encoded.decode(), tensor), key
    assert read.tensors[A].removed == 38.0


@pytest.mark.parametrize("name", CODED)
def test_coded_tensors_have_the_golden_bytes(tmp_path: Path, name: str) -> None:
    version = CODED[name]
    tensors, file = golden_coded(version), GOLDEN / name / container.PACKED
    packed_file.write(tmp_path / "again", "transformers", tensors)
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    plain, read = plain_reader.read(file), packed.read(GOLDEN / name).tensors
    last = "nested" if version == "2" else "ans"
    assert {read[key].label for key in (IN, DT, OUT, X)} == {"masked3:3", "odd4:2", "int4:16", last}
    assert b'"version":"%s"' % version.encode() in file.read_bytes()
    for key, tensor in tensors.items():
        shape, dtype, entries = plain[key]
        assert (tuple(shape), dtype) == (tensor.shape, str(tensor.dtype).removeprefix("torch."))
        want = torch.tensor(entries).reshape(shape)
        assert same(read[key].decode(torch.float32), want) and same(tensor.decode(torch.float32), want), key


def test_the_library_reads_the_file(tmp_path: Path) -> None:
    """It is a safetensors file, and every array lies at a multiple of its element size."""
    file = GOLDEN / "lossless" / container.PACKED
    read = packed.read(GOLDEN / "lossless")
    arrays = {key: array for tensor in read.tensors.values() for key, array in tensor.parts.items()}
    found = load_file(file)
    assert found.keys() == arrays.keys()
    assert all(same(found[name], arrays[name]) for name in arrays)
    with safe_open(file, "pt") as content:
        assert content.metadata().keys() == {"format", "version", "layout", "tensors", "checksum"}
    header, start, _ = opened(file.read_bytes())
    for entry in (entry for name, entry in header.items() if name != "__metadata__"):
        assert (start + entry["data_offsets"][0]) % plain_reader.SIZES[entry["dtype"]] == 0
    assert start % 8 == 0
