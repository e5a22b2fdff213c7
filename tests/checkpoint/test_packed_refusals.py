"""A packed file that somebody or something has changed is refused, and the tensor is named."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import plain_reader
import pytest
import torch
from golden_files import CONV, EMBEDDING, GOLDEN, GOLDENS, IN, A, X, closed, expected, fuzz, opened

from sparsessm import checkpoint
from sparsessm.checkpoint import container, packed, packed_file
from sparsessm.checkpoint.encoding import encode


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of a golden directory, to spoil."""
    for file in (GOLDEN / "lossless").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def spoil(folder: Path, change: Callable[[dict[str, Any], bytearray], bytes | None]) -> None:
    file = folder / container.PACKED
    header, _, arrays = opened(file.read_bytes())
    body = bytearray(arrays)
    metadata = header["__metadata__"]
    before = metadata["checksum"]
    replaced = change(header, body)
    if header.get("__metadata__") is metadata and metadata.get("checksum") == before:
        fuzz().sealed(header, bytes(body))  # what is wrong is not to be found by the checksums
    file.write_bytes(closed(header, bytes(body)) if replaced is None else replaced)


def refused(folder: Path, message: str) -> None:
    for attempt in (packed.read, lambda folder: packed.read(folder, check=False), checkpoint.load):
        with pytest.raises(ValueError, match=message) as caught:
            attempt(folder)
        assert container.PACKED in str(caught.value)


def set_entry(name: str, **fields: Any) -> Callable[[dict[str, Any], bytearray], None]:
    return lambda header, _: header[name].update(fields)


def set_metadata(**fields: Any) -> Callable[[dict[str, Any], bytearray], None]:
    def change(header: dict[str, Any], _: bytearray) -> None:
        header["__metadata__"].update(fields)
        for key in [key for key, value in header["__metadata__"].items() if value is None]:
            del header["__metadata__"][key]

    return change


def set_tensor(name: str, **fields: Any) -> Callable[[dict[str, Any], bytearray], None]:
    """Change what `__metadata__` says of a stock tensor; a field that is None goes."""

    def change(header: dict[str, Any], _: bytearray) -> None:
        tensors = json.loads(header["__metadata__"]["tensors"])
        entry = tensors.setdefault(name, {}) | fields
        tensors[name] = {key: value for key, value in entry.items() if value is not None}
        header["__metadata__"]["tensors"] = json.dumps(tensors)

    return change


def drop_tensor(header: dict[str, Any], body: bytearray) -> None:
    """Remove the array that is last in the file, and the tensor it belongs to."""
    tensors = json.loads(header["__metadata__"]["tensors"])
    name = max((key for key in tensors if key in header), key=lambda key: header[key]["data_offsets"][1])
    begin, end = header.pop(name)["data_offsets"]
    del tensors[name], body[begin:end]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - begin) for offset in entry["data_offsets"]]
    header["__metadata__"]["tensors"] = json.dumps(tensors)


def rename(old: str, new: str) -> Callable[[dict[str, Any], bytearray], None]:
    def change(header: dict[str, Any], _: bytearray) -> None:
        header[new] = header.pop(old)

    return change


def twice(header: dict[str, Any], body: bytearray) -> bytes:
    text = json.dumps(header)
    again = json.dumps({CONV: header[CONV]})[1:-1]
    return closed(f"{text[:-1]}, {again}}}".encode(), bytes(body))


def twice_in_metadata(header: dict[str, Any], body: bytearray) -> None:
    text = header["__metadata__"]["tensors"]
    again = json.dumps({A: json.loads(text)[A]})[1:-1]
    header["__metadata__"]["tensors"] = f"{text[:-1]}, {again}}}"


def raw(header: bytes) -> Callable[[dict[str, Any], bytearray], bytes]:
    return lambda _, body: closed(header, bytes(body))


HUGE = 10**30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # the file as a whole
        (lambda h, b: b"", "truncated or not safetensors: header of 0 bytes"),
        (lambda h, b: b"\1\2\3", "truncated or not safetensors"),
        (lambda h, b: struct.pack("<Q", 2**63) + b"{}", r"header of 9223372036854775808 bytes, at most 2"),
        (lambda h, b: closed(h, b"")[:-40], "truncated or not safetensors: header of"),
        (lambda h, b: closed(h, bytes(b[:-1])), "the file ends at|truncated"),
        (lambda h, b: closed(h, bytes(b) + b"\0"), "truncated or longer than it says"),
        (raw(b"{"), "the header: not readable as JSON"),
        (raw(b"\xff\xfe{}"), "the header: not readable as JSON"),
        (raw(b"[]"), "the header: expected a JSON object, got list"),
        (raw(b"[" * 100_000), "the header: not readable as JSON .nested too deeply"),
        (raw(b'{"a": NaN}'), "NaN is not a JSON number"),
        (raw(b'{"a": ' + b"9" * 5000 + b"}"), "the header: not readable as JSON"),
        (twice, rf"'{CONV}' appears twice"),
        # arrays
        (set_entry(A + ".mask", dtype="F64"), rf"'{A}\.mask': dtype 'F64'; allowed: F32, BF16"),
        (set_entry(A + ".mask", dtype=3), rf"'{A}\.mask': dtype 3; allowed"),
        (set_entry(A + ".mask", dtype=["U8"]), rf"'{A}\.mask': dtype \['U8'\]"),
        (
            set_entry(A + ".mask", more=3),
            rf"'{A}\.mask': expected an object of dtype, shape and data_offsets",
        ),
        (set_entry(A + ".mask", shape=[-16, -1]), rf"'{A}\.mask': shape \[-16, -1\]; allowed"),
        (set_entry(A + ".mask", shape=[16.0, 1]), rf"'{A}\.mask': shape \[16\.0, 1\]; allowed"),
        (set_entry(A + ".mask", shape=[True, 16]), rf"'{A}\.mask': shape \[True, 16\]; allowed"),
        (set_entry(A + ".mask", shape=None), rf"'{A}\.mask': shape None; allowed"),
        (
            set_entry(A + ".mask", shape=[2**32, 2**32]),
            rf"'{A}\.mask': shape \[4294967296, 4294967296\] in U8",
        ),
        (set_entry(A + ".mask", shape=[2**32, 2**32, 0]), rf"'{A}\.mask': shape"),
        (set_entry(A + ".mask", shape=[HUGE]), rf"'{A}\.mask': shape"),
        (set_entry(A + ".mask", shape=[1] * 9), rf"'{A}\.mask': shape \[1, .*; allowed: at most 8"),
        (set_entry(A + ".mask", shape=[1, 16]), rf"{A}: 'mask' is uint8 \[1, 16\], expected uint8 \[16, 1\]"),
        (set_entry(A + ".mask", dtype="I8"), rf"{A}: 'mask' is int8 \[16, 1\], expected uint8"),
        (set_entry(A + ".mask", data_offsets=[0, HUGE]), rf"'{A}\.mask': data_offsets .*; the file ends at"),
        (
            set_entry(A + ".mask", data_offsets=[-16, 0]),
            rf"'{A}\.mask': data_offsets \[-16, 0\]; allowed: two",
        ),
        (set_entry(A + ".mask", data_offsets=[16, 0]), rf"'{A}\.mask': data_offsets \[16, 0\]; the file"),
        (set_entry(A + ".mask", data_offsets=[0]), rf"'{A}\.mask': data_offsets \[0\]; allowed: two"),
        (set_entry(A + ".mask", data_offsets=[0, 16]), "begins at byte .*, the array before it ends at"),
        (set_entry(X + ".values", dtype="F16"), rf"{X}: 'values' is float16 .*, expected bfloat16"),
        (rename(A + ".mask", A + ".musk"), rf"'{A}' is of kind bitmask, but there is no '{A}\.mask'"),
        (rename(CONV, "stray"), rf"'{CONV}' is of kind dense, but there is no '{CONV}'"),
        # the description
        (set_metadata(format=None), "not a packed checkpoint: its __metadata__ does not say format"),
        (set_metadata(format="pt"), "not a packed checkpoint"),
        (lambda h, b: h.pop("__metadata__") and None, "not a packed checkpoint"),
        (lambda h, b: h.update({"__metadata__": [1]}), "not a packed checkpoint"),
        (set_metadata(version="5"), "version '5' of the format; known: '1', '2', '3', '4'"),
        (set_metadata(version=1), "version 1 of the format; known: '1', '2'"),
        (set_metadata(version=None), "version None of the format"),
        (set_metadata(more="x"), "must have format, version, layout, tensors and checksum, and nothing else"),
        (set_metadata(checksum=None), "must have format, version, layout, tensors and checksum"),
        (set_metadata(checksum="00000000"), "the header is damaged: its checksum is"),
        (set_metadata(layout=None), "must have format, version, layout, tensors and checksum"),
        (set_metadata(layout="gguf"), "layout 'gguf'; allowed: transformers, state-spaces"),
        (set_metadata(layout="state-spaces"), "layout 'state-spaces', but config.json is of the other"),
        (set_metadata(tensors=["x"]), "tensors must be a string that holds a JSON object"),
        (set_metadata(tensors="[1"), "__metadata__ tensors: not readable as JSON"),
        (set_metadata(tensors="[1]"), "__metadata__ tensors: expected a JSON object, got list"),
        (set_metadata(tensors="{}"), "belongs to no tensor of __metadata__"),
        (twice_in_metadata, rf"'{A}' appears twice"),
        (set_tensor(A, shape=[16, 5]), rf"wrong shapes: {A} \[16, 5\], expected \[16, 4\]"),
        (set_tensor(A, shape=[HUGE, HUGE]), rf"wrong shapes: {A} \[1000"),
        (set_tensor(A, shape=[16, -4]), rf"'{A}': shape \[16, -4\]; allowed"),
        (set_tensor(A, shape="16"), rf"'{A}': shape '16'; allowed"),
        (set_tensor(A, shape=None), rf"'{A}': expected an object of shape, dtype, kind"),
        (set_tensor(A, more=1), rf"'{A}': expected an object of shape, dtype, kind"),
        (set_tensor(A, dtype="float64"), rf"'{A}': dtype 'float64'; allowed: float32"),
        (set_tensor(A, dtype="bfloat16"), rf"{A}: 'values' is float32 .*, expected bfloat16"),
        (set_tensor(A, kind="sparse"), rf"'{A}': kind 'sparse'; allowed: 'dense', 'bitmask', 'N:M'"),
        (set_tensor(A, kind="0:4"), rf"'{A}': kind '0:4'; allowed"),
        (set_tensor(A, kind="1:4000"), rf"'{A}': kind '1:4000'; allowed"),
        (set_tensor(A, kind="١:٤"), rf"'{A}': kind '.*'; allowed"),
        (set_tensor(A, kind=4), rf"'{A}': kind 4; allowed"),
        (set_tensor(A, kind="dense"), rf"'{A}' is of kind dense, but there is no '{A}'"),
        (set_tensor(A, kind="1:4"), rf"'{A}' is of kind 1:4, but there is no '{A}\.index'"),
        (set_tensor(IN, kind="4:2"), rf"{IN}: its kind is '4:2'; allowed: N:M with 0 < N < M"),
        (set_tensor(IN, kind="2:3"), rf"{IN}: its kind is '2:3', but 3 does not divide its 8 columns"),
        (set_tensor(IN, kind="1:4"), rf"{IN}: 'values' is bfloat16 \[32, 4\], expected bfloat16 \[32, 2\]"),
        (set_tensor(A, fill="x"), rf"'{A}': fill 'x'; allowed"),
        (set_tensor(A, fill=HUGE**9), rf"'{A}': fill 1000.*\.\.\.; allowed"),
        (set_tensor(A, fill=0.1), rf"{A}: its removed value is 0\.1; allowed: a finite number that float32"),
        (set_tensor(CONV, fill=38.0), rf"{CONV}: its removed value is 38\.0; a dense or int8 tensor has"),
        (
            set_tensor("stray", shape=[1], dtype="float32", kind="dense"),
            "'stray' is of kind dense, but there",
        ),
        (drop_tensor, "missing tensors: backbone"),
        (
            set_tensor(X + ".values", shape=[9], dtype="bfloat16", kind="dense"),
            rf"'{X}\.values': '{X}\.values' belongs to another tensor too",
        ),
    ],
)
def test_a_header_that_is_wrong(golden: Path, change: Any, message: str) -> None:
    spoil(golden, change)
    refused(golden, message)


def poke(name: str, offset: int, value: bytes) -> Callable[[dict[str, Any], bytearray], None]:
    def change(header: dict[str, Any], body: bytearray) -> None:
        begin, end = header[name]["data_offsets"]
        assert offset + len(value) <= end - begin
        body[begin + offset : begin + offset + len(value)] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poke(CONV, 0, struct.pack("<f", math.nan)), f"{CONV}: 'values' holds NaN or Inf"),
        (poke(X + ".values", 2, b"\x80\x7f"), f"{X}: 'values' holds NaN or Inf"),
        (poke(A + ".mask", 3, b"\x12"), rf"{A}: 'mask' has bits set behind column 3 in row 3"),
        (
            poke(X + ".mask", 0, b"\xff\xff"),
            rf"{X}: 'offsets'\[1\] is \d+, but the mask has \d+ bits before it",
        ),
        (
            poke(X + ".offsets", 8, struct.pack("<q", 2**60)),
            rf"{X}: 'offsets'\[1\] is 1152921504606846976, but",
        ),
        (
            poke(X + ".offsets", 0, struct.pack("<q", -1)),
            rf"{X}: 'offsets'\[0\] is -1, but the mask has 0 bits",
        ),
        (poke(IN + ".index", 0, b"\0"), f"{IN}: 'index' positions of a group are not strictly increasing"),
    ],
)
def test_arrays_that_are_wrong(golden: Path, change: Any, message: str) -> None:
    spoil(golden, change)
    for attempt in (packed.read, checkpoint.load):
        with pytest.raises(ValueError, match=rf"packed\.safetensors: {message}"):
            attempt(golden)
    packed.read(golden, check=False)  # the head is right, and nobody asked for more


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poke(X + ".scale", 0, struct.pack("<f", -1.0)), rf"{X}: 'scale' holds -1\.0; allowed"),
        (poke(X + ".scale", 0, struct.pack("<f", math.inf)), rf"{X}: 'scale' holds inf; allowed"),
        (poke(X + ".values", 0, b"\x80"), f"{X}: 'values' holds -128; allowed: -127 to 127"),
        (set_entry(X + ".values", dtype="U8"), rf"{X}: 'values' is uint8 \[.*\], expected int8"),
        (rename(X + ".scale", X + ".scales"), rf"'{X}\.scales' belongs to no tensor"),
        (
            rename(EMBEDDING + ".scale", "x"),
            rf"'{EMBEDDING}' is of kind dense, but there is no '{EMBEDDING}'",
        ),
    ],
)
def test_int8_that_is_wrong(golden: Path, change: Any, message: str) -> None:
    (golden / container.PACKED).write_bytes((GOLDEN / "int8" / container.PACKED).read_bytes())
    packed.read(golden)
    spoil(golden, change)
    with pytest.raises(ValueError, match=message):
        packed.read(golden)


@pytest.mark.parametrize("name", GOLDENS)
def test_every_flipped_bit_is_noticed_and_the_tensor_named(golden: Path, name: str) -> None:
    """All bits of the header and of its length, and of the arrays one bit of each byte, another each time."""
    file = golden / container.PACKED
    content, shapes = (GOLDEN / name / container.PACKED).read_bytes(), expected()
    header, start, _ = opened(content)
    owner = {}
    for array, entry in header.items():
        if array != "__metadata__":
            stock = next(stock for stock in shapes if array == stock or array.startswith(f"{stock}."))
            owner |= dict.fromkeys(range(*(start + offset for offset in entry["data_offsets"])), stock)
    whole = container.read_header(GOLDEN / name / container.PACKED)
    for place in range(len(content)):
        for bit in range(8) if place < start and place % 5 == 0 else (place * 5 % 8,):
            spoiled = bytearray(content)
            spoiled[place] ^= 1 << bit
            file.write_bytes(spoiled)
            with pytest.raises(ValueError, match=r"packed\.safetensors\b") as caught:
                if place < start:
                    dict(container.read_tensors(container.read_header(file), shapes))
                else:
                    container.Tensors(replace(whole, file=file), shapes)[owner[place]]
            if place >= start:
                assert f"tensor {owner[place]} is damaged: its checksum is" in str(caught.value)


def test_what_was_not_asked_for_is_not_checked(golden: Path) -> None:
    file = golden / container.PACKED
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    packed.read(golden, check=False)
    for attempt in (packed.read, checkpoint.load, lambda path: checkpoint.unpack(path, f"{path}.out")):
        with pytest.raises(ValueError, match=r"packed\.safetensors: tensor backbone\S+ is damaged"):
            attempt(golden)
    with pytest.raises(AssertionError, match="backbone"):
        plain_reader.read(file)


def test_every_truncation_is_noticed(golden: Path) -> None:
    file = golden / container.PACKED
    content, shapes = file.read_bytes(), expected()
    for length in range(0, len(content), 7):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"packed\.safetensors: "):
            dict(container.read_tensors(container.read_header(file), shapes))


def test_a_file_that_shrinks_while_it_is_read(golden: Path) -> None:
    file = golden / container.PACKED
    header = container.read_header(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"packed\.safetensors: backbone\S+: the file ended inside 'backbone"
    ):
        list(container.read_tensors(header, expected()))
    file.unlink()
    with pytest.raises(ValueError, match="not readable"):
        list(container.read_tensors(header, expected()))
    with pytest.raises(ValueError, match="not readable"):
        container.read_header(file)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 16}, r"wrong shapes: backbone\.embeddings\.weight \[64, 8\], expected \[64, 16\], "),
        ({"num_hidden_layers": 2}, r"missing tensors: backbone\.layers\.1\.norm\.weight, "),
        ({"num_hidden_layers": 10**9}, "it has 1000000000 layers, but there are only 12 packed tensors"),
        ({"tie_word_embeddings": False}, r"missing tensors: lm_head\.weight"),
        ({"use_conv_bias": False}, r"tensors the model does not have: backbone.*conv1d\.bias"),
    ],
)
def test_a_config_that_does_not_fit(golden: Path, fields: dict[str, Any], message: str) -> None:
    config = json.loads((golden / "config.json").read_text())
    (golden / "config.json").write_text(json.dumps(config | fields))
    for attempt in (packed.read, checkpoint.load):
        with pytest.raises(ValueError, match=message):
            attempt(golden)


def test_a_header_that_would_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (container, packed_file):
        monkeypatch.setattr(module, "HEADER_BYTES", 200)
    with pytest.raises(ValueError, match=r"packed\.safetensors: a header of \d+ bytes; at most 200"):
        packed_file.write(tmp_path / container.PACKED, "transformers", {"t": encode("t", torch.ones(33, 13))})
    with pytest.raises(ValueError, match=r"packed\.safetensors: .*header of \d+ bytes, at most 200"):
        container.read_header(GOLDEN / "lossless" / container.PACKED)


def test_both_kinds_of_weights(golden: Path) -> None:
    (golden / "model.safetensors").touch()
    for attempt in (packed.read, checkpoint.load, lambda path: checkpoint.open_checkpoint(path).packed):
        with pytest.raises(
            ValueError, match=r"holds both packed\.safetensors and model\.safetensors; remove"
        ):
            attempt(golden)
