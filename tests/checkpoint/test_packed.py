"""Packed checkpoints: every kind there and back, against a reader written from the page, against golden
files, and against files that somebody or something has changed.

`python tests/checkpoint/test_packed.py` writes the golden files anew.
"""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import plain_reader
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pico import pico_mamba, pico_mamba2, pico_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import NEOX, logits, names, stock_logits, write_mixed, write_original, write_stock
from torch import Tensor

import sparsessm
from sparsessm import checkpoint
from sparsessm.checkpoint import Encoded, container, packed, reading
from sparsessm.checkpoint.encoding import bits_of, encode

HERE = Path(__file__).parents[1]
GOLDEN, CORPUS, TOOLS = HERE / "golden", HERE / "corpus/packed", HERE.parent / "tools"
LAYER = "backbone.layers.0.mixer"
IN, X, DT, OUT = (f"{LAYER}.{kind}.weight" for kind in ("in_proj", "x_proj", "dt_proj", "out_proj"))
A, CONV, EMBEDDING = f"{LAYER}.A_log", f"{LAYER}.conv1d.weight", "backbone.embeddings.weight"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def same(left: Tensor, right: Tensor) -> bool:
    """Equal to the bit."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return np.array_equal(bits_of(left.detach()), bits_of(right.detach()))


def random(*shape: int, kept: float = 0.5, dtype: torch.dtype = torch.float32, fill: float = 0.0) -> Tensor:
    draw = torch.Generator().manual_seed(math.prod(shape))
    tensor = torch.randn(shape, generator=draw).to(dtype)
    tensor[torch.rand(shape, generator=draw) >= kept] = fill
    return tensor


def thinned(tensor: Tensor, n: int, m: int, fill: float = 0.0) -> Tensor:
    """The same with N of every M kept, at places that differ from group to group."""
    order = torch.rand(tensor.unflatten(1, (-1, m)).shape, generator=torch.Generator().manual_seed(1))
    rank = order.argsort(-1).argsort(-1)
    return tensor.unflatten(1, (-1, m)).masked_fill(rank >= n, fill).flatten(1)


# ----------------------------------------------------------------------------------------- one tensor


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, float]:
    """(matrix, fill): odd shapes, few or many or all kept, -0.0 and tiny numbers among the values."""
    dtype = draw(st.sampled_from(FLOATS))
    fill = draw(st.sampled_from([0.0, 38.0]))
    rows, columns = draw(st.sampled_from([1, 2, 15, 16, 17, 33])), draw(st.integers(1, 70))
    seed, kept = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.9, 1.0]))
    source = torch.Generator().manual_seed(seed)
    tensor = torch.randn(rows, columns, generator=source)
    special = torch.tensor([-0.0, 0.0, 38.0, 1e-40, 6e-8, -60000.0])
    chosen = torch.rand(rows, columns, generator=source) < 0.2
    tensor[chosen] = special[torch.randint(len(special), (int(chosen.sum()),), generator=source)]
    tensor[torch.rand(rows, columns, generator=source) >= kept] = fill
    if draw(st.booleans()):
        tensor[draw(st.integers(0, rows - 1))] = fill
    return tensor.to(dtype), fill


def read_plainly(encoded: Encoded, folder: Path) -> Tensor:
    file = folder / "plain.safetensors"
    container.write(file, "transformers", {encoded.name: encoded})
    ((shape, dtype, entries),) = plain_reader.read(file).values()
    assert dtype == str(encoded.dtype).removeprefix("torch.")
    return torch.tensor(entries, dtype=torch.float32).reshape(shape)


@given(matrices(), st.sampled_from([None, "dense", "bitmask"]))
@settings(deadline=None, max_examples=150)
def test_what_is_encoded_comes_back_to_the_bit(case: tuple[Tensor, float], kind: str | None) -> None:
    tensor, fill = case
    encoded = encode("t", tensor, fills=(fill, 0.0) if kind is None else (fill,), kind=kind)
    encoded.check()
    assert same(encoded.decode(), tensor)
    assert same(encoded.decode(torch.float32), tensor.float())
    assert kind is None or encoded.kind == kind
    if encoded.kind == "bitmask":
        assert encoded.values.numel() == int((~bits_equal(tensor, encoded.fill)).sum())
    with tempfile.TemporaryDirectory() as folder:
        assert same(read_plainly(encoded, Path(folder)), tensor.float())


def bits_equal(tensor: Tensor, fill: float) -> Tensor:
    whole = torch.full_like(tensor, fill)
    return (tensor == whole) & (tensor.signbit() == whole.signbit())


@given(
    st.sampled_from(FLOATS),
    st.sampled_from([1, 5, 16, 33]),
    st.integers(1, 9),
    st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (2, 3), (3, 5), (1, 7), (16, 33), (1, 256)]),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([0.0, 38.0]),
)
@settings(deadline=None, max_examples=150)
def test_n_of_m(
    dtype: torch.dtype, rows: int, groups: int, nm: tuple[int, int], kept: float, fill: float
) -> None:
    n, m = nm
    tensor = random(rows, groups * m, kept=kept, dtype=dtype, fill=fill)
    tensor[0, 0] = -0.0  # kept, if its group keeps it
    tensor = thinned(tensor, n, m, fill)
    encoded = encode("t", tensor, kind=f"{n}:{m}", fills=(fill,))
    encoded.check()
    assert (encoded.kind, encoded.label) == ("n:m", f"{n}:{m}")
    assert encoded.values.shape == (rows, groups * n)
    assert same(encoded.decode(), tensor)
    mask = encoded.bitmask()
    mask.check()
    assert mask.kind == "bitmask" and mask.values.numel() == rows * groups * n
    assert same(mask.decode(), tensor)
    with tempfile.TemporaryDirectory() as folder:
        assert same(read_plainly(encoded, Path(folder)), tensor.float())
        assert same(read_plainly(mask, Path(folder)), tensor.float())


@given(matrices(), st.sampled_from([None, "dense", "bitmask"]))
@settings(deadline=None, max_examples=100)
def test_int8_is_within_half_a_step(case: tuple[Tensor, float], kind: str | None) -> None:
    tensor, _ = case
    encoded = encode("t", tensor, int8=True, kind=kind)
    encoded.check()
    largest = tensor.float().abs().amax(1, keepdim=True)
    step = largest / 127
    exact = encoded.decode(torch.float32)
    assert ((exact - tensor.float()).abs() <= step * 0.5001 + 1e-37).all()  # below: subnormal steps
    normal = (largest > 1e-30).expand_as(exact)
    assert not (exact.sign() * tensor.float().sign() < 0).any()
    assert (exact[normal & (tensor.float().abs() == largest)].abs() > 0).all()
    assert same(encoded.decode(), exact.to(tensor.dtype))
    assert encoded.values.dtype == torch.int8 and encoded.dtype == tensor.dtype
    with tempfile.TemporaryDirectory() as folder:
        assert torch.equal(read_plainly(encoded, Path(folder)), exact)


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_of_the_largest_numbers(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    encoded = encode("t", torch.tensor([[most, -most, 0.0], [0, 0, 0]], dtype=dtype), int8=True)
    encoded.check()
    assert torch.isfinite(encoded.decode()).all()
    assert encoded.decode()[0, 0] > 0.99 * most and encoded.scale is not None and encoded.scale[1] == 0


def test_int8_n_of_m() -> None:
    tensor = thinned(random(9, 32, kept=1), 1, 4)
    encoded = encode("t", tensor, int8=True, patterns=[(1, 4)])
    encoded.check()
    assert encoded.label == "1:4"
    assert torch.equal(encoded.decode(), encode("t", tensor, int8=True, kind="dense").decode())
    assert torch.equal(encoded.bitmask().decode(), encoded.decode())


def test_the_kind_is_the_smallest() -> None:
    assert encode("t", random(32, 64, kept=1)).kind == "dense"
    assert encode("t", random(32, 64)).kind == "bitmask"
    assert encode("t", thinned(random(32, 64, kept=1), 2, 4)).label == "2:4"
    assert encode("t", thinned(random(32, 64, kept=1), 4, 8)).kind == "bitmask"  # 12 bits against 8
    assert encode("t", thinned(random(32, 64, kept=1), 1, 4), patterns=[(1, 4)]).label == "1:4"
    memoryless = random(32, 16, kept=0.3, fill=38.0)
    found = encode("t", memoryless, fills=(38.0, 0.0))
    assert (found.kind, found.fill) == ("bitmask", 38.0)
    assert encode("t", random(4, 1, 4, kept=0.1)).kind == "dense"  # a convolution
    assert encode("t", random(64, kept=0.1)).kind == "dense"
    for tensor in (random(33, 65), random(17, 64, dtype=torch.bfloat16), thinned(random(16, 64), 2, 4)):
        least = encode("t", tensor).nbytes
        assert all(least <= encode("t", tensor, kind=kind).nbytes for kind in ("dense", "bitmask"))


@pytest.mark.parametrize("columns", [256, 768, 1536, 2560])
@pytest.mark.parametrize("rows", [16, 80, 250])
def test_half_of_a_bf16_matrix(rows: int, columns: int) -> None:
    dense = random(rows, columns, kept=1, dtype=torch.bfloat16)
    order = torch.rand(dense.numel(), generator=torch.Generator().manual_seed(0)).argsort()
    dense.view(-1)[order[: dense.numel() // 2]] = 0
    assert encode("t", dense).nbytes <= 0.57 * dense.nbytes


@pytest.mark.parametrize(
    ("tensor", "more", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.float64), {}, "t: its dtype is float64; allowed: float32, bfloat16"),
        (torch.tensor([[1.0, math.nan]]), {}, "t: NaN or Inf"),
        (torch.tensor([math.inf]), {}, "t: NaN or Inf"),
        (torch.zeros(3), {"int8": True}, r"t: int8 needs 2 axes, its shape is \[3\]"),
        (torch.zeros(3), {"kind": "bitmask"}, r"t: bitmask needs 2 axes"),
        (torch.ones(2, 4), {"kind": "2:4"}, "t: does not fit kind '2:4'"),
        (thinned(random(4, 8, kept=1), 3, 4), {"kind": "2:4"}, "t: does not fit kind '2:4'"),
        (torch.zeros(2, 6), {"kind": "2:4"}, "t: does not fit kind '2:4'"),
        (torch.zeros(2, 6), {"kind": "sparse"}, "t: does not fit kind 'sparse'"),
    ],
)
def test_what_cannot_be_encoded(tensor: Tensor, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        encode("t", tensor, **more)


def changed(array: Tensor | None, at: Any, value: float) -> Tensor:
    assert array is not None
    array = array.clone()
    array[at] = value
    return array


MASKED = encode("t", random(33, 13, kept=0.4), kind="bitmask")
GROUPED = encode("t", thinned(random(3, 12, kept=1), 2, 4), kind="2:4")
THIRDS = encode("t", thinned(random(3, 9, kept=1), 2, 3), kind="2:3")
SCALED = encode("t", random(4, 6), int8=True, kind="dense")


@pytest.mark.parametrize(
    ("encoded", "fields", "message"),
    [
        (MASKED, {"dtype": torch.int8}, "its dtype is torch.int8; allowed: float32"),
        (MASKED, {"dtype": torch.bfloat16}, r"'values' is float32 \[\d+\], expected bfloat16"),
        (MASKED, {"kind": "sparse"}, "its kind is 'sparse'; allowed: 'dense', 'bitmask', 'n:m'"),
        (MASKED, {"shape": (33,)}, r"kind bitmask needs 2 axes, its shape is \[33\]"),
        (MASKED, {"shape": (0, 13)}, r"its shape is \[0, 13\]; allowed"),
        (MASKED, {"shape": ()}, r"its shape is \[\]; allowed"),
        (MASKED, {"shape": (33, 17)}, r"'mask' is uint8 \[33, 2\], expected uint8 \[33, 3\]"),
        (MASKED, {"shape": (49, 13)}, r"'mask' is uint8 \[33, 2\], expected uint8 \[49, 2\]"),
        (MASKED, {"fill": math.nan}, "its fill is nan; allowed"),
        (MASKED, {"fill": 0.1}, "its fill is 0.1; allowed: a finite number that float32 has"),
        (SCALED, {"fill": 38.0}, "its fill is 38.0; a dense or int8 tensor has none but 0"),
        (MASKED, {"mask": None}, "it lacks 'mask', kind bitmask"),
        (MASKED, {"offsets": None}, "it lacks 'offsets', kind bitmask"),
        (MASKED, {"index": torch.zeros(1)}, "it has 'index', kind bitmask"),
        (MASKED, {"mask": MASKED.mask.to(torch.int8)}, r"'mask' is int8 "),  # pyright: ignore
        (MASKED, {"offsets": MASKED.offsets[:-1]}, r"'offsets' is int64 \[3\], expected int64 \[4\]"),  # pyright: ignore
        (MASKED, {"offsets": changed(MASKED.offsets, 0, 1)}, r"'offsets'\[0\] is 1, but the mask has 0 bits"),
        (MASKED, {"offsets": changed(MASKED.offsets, 1, -5)}, r"'offsets'\[1\] is -5, but the mask has \d+"),
        (MASKED, {"offsets": changed(MASKED.offsets, -1, 2**62)}, r"'offsets'\[3\] is 4611686018427387904"),
        (MASKED, {"mask": changed(MASKED.mask, (4, 1), 32)}, "'mask' has bits set behind column 12 in row 4"),
        (MASKED, {"mask": changed(MASKED.mask, (4, 0), 255)}, r"'offsets'\[1\] is "),
        (MASKED, {"values": MASKED.values[:-1]}, r"'mask' keeps \d+ entries, but there are \d+ values"),
        (MASKED, {"values": MASKED.values[None]}, r"'values' is float32 \[1, \d+\], expected"),
        (MASKED, {"values": torch.zeros(500)}, r"'values' is float32 \[500\], expected float32 \[429\]"),
        (MASKED, {"values": changed(MASKED.values, 3, math.nan)}, "'values' holds NaN or Inf"),
        (MASKED, {"scale": torch.ones(33)}, r"'values' is float32 \[\d+\], expected int8"),
        (GROUPED, {"n": 0}, "its kind is '0:4'; allowed: N:M with 0 < N < M <= 256"),
        (GROUPED, {"n": 4}, "its kind is '4:4'"),
        (GROUPED, {"n": 2, "m": 300}, "its kind is '2:300'"),
        (GROUPED, {"n": 2, "m": 5}, "its kind is '2:5', but 5 does not divide its 12 columns"),
        (GROUPED, {"n": 1}, r"'values' is float32 \[3, 6\], expected float32 \[3, 3\]"),
        (
            GROUPED,
            {"index": changed(GROUPED.index, (1, 0), 0)},
            "'index' positions of a group are not strictly",
        ),
        (GROUPED, {"index": changed(GROUPED.index, (1, 1), 0xFF)}, "'index' has bits set behind its last"),
        (THIRDS, {"index": changed(THIRDS.index, (2, 0), 0xFF)}, "'index' holds position 3; allowed: 0 to 2"),
        (GROUPED, {"mask": torch.zeros(1)}, "it has 'mask', kind 2:4"),
        (SCALED, {"values": changed(SCALED.values, (0, 0), -128)}, "'values' holds -128; allowed: -127 to"),
        (SCALED, {"values": SCALED.values.float()}, r"'values' is float32 \[4, 6\], expected int8 \[4, 6\]"),
        (SCALED, {"scale": None}, r"'values' is int8 \[4, 6\], expected float32 \[4, 6\]"),
        (
            SCALED,
            {"scale": changed(SCALED.scale, 1, -1.0)},
            "'scale' holds -1.0; allowed: finite numbers >= 0",
        ),
        (SCALED, {"scale": changed(SCALED.scale, 1, math.nan)}, "'scale' holds nan"),
        (SCALED, {"scale": changed(SCALED.scale, 1, 3e38)}, "'scale' holds [23].*e.38; allowed: .* 127-fold"),
        (SCALED, {"scale": torch.ones(3)}, r"'scale' is float32 \[3\], expected float32 \[4\]"),
        (SCALED, {"shape": (4, 6, 1)}, r"int8 needs 2 axes, its shape is \[4, 6, 1\]"),
    ],
)
def test_arrays_that_stand_for_no_tensor(encoded: Encoded, fields: dict[str, Any], message: str) -> None:
    encoded.check()
    with pytest.raises(ValueError, match=f"^t: {message}"):
        replace(encoded, **fields).check()


# ------------------------------------------------------------------------------------- golden files


def golden_tensors() -> dict[str, Tensor]:
    """A model of one layer, its weights small fractions by a formula, every kind of encoding among them."""
    fields = {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 64}
    tensors = {}
    for number, (name, tensor) in enumerate(pico_mamba(**fields).state_dict().items()):
        if name == "lm_head.weight":
            continue
        steps = torch.arange(tensor.numel()) * 37 + 11 * number
        tensors[name] = ((steps % 61 - 30.5) / 32).reshape(tensor.shape)
    column = torch.arange(16)
    tensors[IN] = torch.where(torch.arange(8) % 4 < 2, tensors[IN], 0.0).bfloat16()  # 2:4
    row = torch.arange(9)[:, None]
    tensors[X] = torch.where((row * 5 + column * 3) % 7 < 3, tensors[X], 0.0).bfloat16()
    tensors[X][2, 5] = -0.0
    tensors[OUT] = torch.where(column % 4 == torch.arange(8)[:, None] % 4, tensors[OUT], 0.0).half()  # 1:4
    tensors[A] = torch.where((column[:, None] + torch.arange(4)) % 4 == 1, tensors[A], 38.0)
    tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16()
    return tensors


def write_golden_source(folder: Path) -> dict[str, Tensor]:
    folder.mkdir()
    tensors = golden_tensors()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    for name in ("config.json", "pruning.json"):
        (folder / name).write_bytes((GOLDEN / "lossless" / name).read_bytes())
    pico_tokenizer().save_pretrained(folder)
    return tensors


def write_golden() -> None:
    """The committed files; only a new version of the format may change them."""
    for name in GOLDENS:
        (GOLDEN / name).mkdir(parents=True, exist_ok=True)
    fields = {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 64}
    config = json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]} | fields, indent=2)
    record = json.dumps({"targets": [{"target": OUT, "pattern": "1:4"}]}, indent=2)
    (GOLDEN / "lossless/config.json").write_text(config + "\n")
    (GOLDEN / "lossless/pruning.json").write_text(record + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        write_golden_source(Path(scratch) / "in")
        for name, options in GOLDENS.items():
            checkpoint.pack(Path(scratch) / "in", Path(scratch) / name, **options)
            for file in (container.PACKED, "config.json", "pruning.json"):
                (GOLDEN / name / file).write_bytes((Path(scratch) / name / file).read_bytes())


GOLDENS: dict[str, dict[str, str]] = {"lossless": {}, "int8": {"dtype": "int8", "head": "int8"}}
LABELS = {IN: "2:4", X: "bitmask", OUT: "1:4", A: "bitmask", DT: "dense", CONV: "dense", EMBEDDING: "dense"}


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
    assert read.tensors.keys() == plain.keys() == tensors.keys() and read.layout == "transformers"
    assert read.config["hidden_size"] == 8 and read.files.keys() == {"config.json", "pruning.json"}
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
    assert read.tensors[A].fill == 38.0


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


# ---------------------------------------------------------------------------------- what is refused


def opened(content: bytes) -> tuple[dict[str, Any], int, bytes]:
    """(header, where the arrays begin, the arrays)."""
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), 8 + length, content[8 + length :]


@cache
def fuzz() -> ModuleType:
    if not TOOLS.is_dir():
        pytest.skip("no tools/ beside the tests (an installed package)")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        import fuzz_packed

        return fuzz_packed


def closed(header: Any, arrays: bytes) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + arrays


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
        (set_metadata(version="2"), "version '2' of the format; known: '1'"),
        (set_metadata(version=1), "version 1 of the format; known: '1'"),
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
        (set_tensor(A, fill=0.1), rf"{A}: its fill is 0\.1; allowed: a finite number that float32 has"),
        (set_tensor(CONV, fill=38.0), rf"{CONV}: its fill is 38\.0; a dense or int8 tensor has none"),
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
    monkeypatch.setattr(container, "HEADER_BYTES", 200)
    with pytest.raises(ValueError, match=r"packed\.safetensors: a header of \d+ bytes; at most 200"):
        container.write(tmp_path / container.PACKED, "transformers", {"t": MASKED})
    with pytest.raises(ValueError, match=r"packed\.safetensors: .*header of \d+ bytes, at most 200"):
        container.read_header(GOLDEN / "lossless" / container.PACKED)


def test_both_kinds_of_weights(golden: Path) -> None:
    (golden / "model.safetensors").touch()
    for attempt in (packed.read, checkpoint.load, packed.is_packed):
        with pytest.raises(
            ValueError, match=r"holds both packed\.safetensors and model\.safetensors; remove"
        ):
            attempt(golden)


# --------------------------------------------------------------------------------------------- fuzz


@cache
def expected() -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in golden_tensors().items()}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return fuzz()


def test_the_check_of_the_fuzzer_can_fail(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (GOLDEN / "lossless" / container.PACKED).read_bytes()
    assert tool.expected() == expected()
    assert tool.one(content, expected(), tmp_path) is None
    assert "the file ends at" in tool.one(content[:-1], expected(), tmp_path)
    monkeypatch.setattr(Encoded, "check", lambda self, contents=True: None)
    monkeypatch.setattr(container, "checksum", lambda parts: "0" * 8)
    header, start, _ = opened(content)
    at = start + header[CONV]["data_offsets"][0]
    changed = re.sub(rb"(checksum\W+)[0-9a-f]{8}", rb"\g<1>00000000", content)
    with pytest.raises(AssertionError):
        tool.one(changed[:at] + struct.pack("<f", math.nan) + changed[at + 4 :], expected(), tmp_path)


@pytest.mark.parametrize("name", GOLDENS)
@given(st.data())
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_bytes_are_refused_or_valid(tool: ModuleType, name: str, data: st.DataObject) -> None:
    content = bytearray((GOLDEN / name / container.PACKED).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255) | st.sampled_from([*b'0129-:,"[]{}.e']))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :][: data.draw(st.integers(0, 3))]
    with tempfile.TemporaryDirectory() as folder:
        tool.one(bytes(content), expected(), Path(folder))


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*")), ids=lambda file: file.name)
def test_inputs_that_the_fuzzer_found(tool: ModuleType, tmp_path: Path, file: Path) -> None:
    tool.one(file.read_bytes(), expected(), tmp_path)


def test_there_are_inputs() -> None:
    assert len(list(CORPUS.glob("*"))) > 10


# ---------------------------------------------------------------------------------- whole checkpoints


def halve(folder: Path, removed: float = 0.5) -> dict[str, Tensor]:
    """Zero entries of the matrices in a stock directory, by magnitude."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "proj.weight" in name:
            edge = tensor.float().abs().flatten().kthvalue(int(removed * tensor.numel())).values
            tensor[tensor.float().abs() <= edge] = 0
        if name.endswith("A_log"):
            tensor[..., ::2] = 38.0
    save_file(tensors, file, {"format": "pt"})
    return tensors


def write_pruned(folder: Path, dtype: torch.dtype, **overrides: object) -> dict[str, Tensor]:
    if overrides:
        write_stock(folder, dtype, **overrides)
    else:
        write_mixed(folder, dtype)
    (folder / "LICENSE").write_text("yours\n")
    (folder / "pruning.json").write_text('{"targets":   []}')
    (folder / "README.md").write_text("# card\r\n")
    return halve(folder)


@pytest.mark.parametrize("dtype", FLOATS)
def test_there_and_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = write_pruned(tmp_path / "in", dtype)
    done = checkpoint.pack(tmp_path / "in", tmp_path / "packed")
    assert names(tmp_path / "packed") == names(tmp_path / "in") - {"model.safetensors"} | {container.PACKED}
    assert checkpoint.is_packed(tmp_path / "packed") and not checkpoint.is_packed(tmp_path / "in")
    assert done.before == sum(tensor.nbytes for tensor in tensors.values())
    assert done.after == (tmp_path / "packed" / container.PACKED).stat().st_size
    read = packed.read(tmp_path / "packed")
    assert done.packed.files == read.files and done.packed.config == read.config
    assert "tokenizer.json" in read.files and read.files["README.md"] == b"# card\r\n"
    assert len(read.tokenizer()) == 64 and len(done.packed.tokenizer()) == 64
    for name, tensor in tensors.items():
        assert same(read.tensors[name].decode(), tensor), name
        assert same(done.packed.tensors[name].decode(), tensor), name
    assert {read.tensors[name].kind for name in tensors if "in_proj" in name} == {"bitmask"}
    assert checkpoint.unpack(tmp_path / "packed", tmp_path / "out") == tmp_path / "out"
    assert names(tmp_path / "out") == names(tmp_path / "in")
    for name in names(tmp_path / "in") - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes(), name
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "in" / name).read_bytes(), name
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == tensors.keys() and all(same(written[name], tensors[name]) for name in tensors)
    assert names(tmp_path) == {"in", "packed", "out"}


def test_a_packed_directory_loads_like_any_other(tmp_path: Path) -> None:
    write_pruned(tmp_path / "in", torch.bfloat16)
    checkpoint.pack(tmp_path / "in", tmp_path / "packed")
    dense, came = checkpoint.load(tmp_path / "in"), checkpoint.load(tmp_path / "packed")
    assert (came.format, came.stored, came.files) == (dense.format, dense.stored, dense.files)
    assert torch.equal(logits(came.model), logits(dense.model))
    assert came.model.lm_head.weight is came.model.backbone.embeddings.weight
    assert checkpoint.read_record(tmp_path / "packed") == {"targets": []}
    file = tmp_path / "packed" / container.PACKED
    with open(file, "r+b") as content:  # it owns its memory
        content.write(b"\0" * file.stat().st_size)
    assert torch.equal(logits(came.model), logits(dense.model))
    checkpoint.save(came, tmp_path / "out")
    assert torch.equal(stock_logits(tmp_path / "out"), logits(dense.model))


@pytest.mark.parametrize("tied", [True, False])
def test_the_original_layout(tmp_path: Path, tied: bool) -> None:
    write_original(
        tmp_path / "in", pico_mamba(tie_word_embeddings=tied), torch.float16, ssm_cfg={"d_state": 8}
    )
    words = tmp_path / "tokenizer.json"
    pico_tokenizer(60).backend_tokenizer.save(str(words))
    done = checkpoint.pack(tmp_path / "in", tmp_path / "packed", tokenizer=words)
    read = packed.read(tmp_path / "packed")
    assert read.layout == done.packed.layout == "state-spaces" and read.config["hidden_size"] == 16
    assert ("lm_head.weight" in read.tensors) != tied
    checkpoint.unpack(tmp_path / "packed", tmp_path / "out")
    before, after = (torch.load(tmp_path / d / "pytorch_model.bin", weights_only=True) for d in ("in", "out"))
    assert before.keys() == after.keys() and all(same(after[name], before[name]) for name in before)
    assert (tmp_path / "packed/config.json").read_bytes() == (tmp_path / "in/config.json").read_bytes()


@pytest.mark.skipif(not NEOX.exists(), reason="needs ../shared/data")
def test_a_tokenizer_named_at_reading(tmp_path: Path) -> None:
    write_original(tmp_path / "in", pico_mamba(vocab_size=50280), vocab_size=50277)
    checkpoint.pack(tmp_path / "in", tmp_path / "packed", tokenizer=NEOX)
    assert packed.read(tmp_path / "packed").tokenizer(NEOX)("Hello world").input_ids == [12092, 1533]


SMALL = ("A_log", ".D", "norm.weight", "norm_f.weight", "bias", "conv1d.weight")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("word", "target"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_another_dtype(tmp_path: Path, dtype: torch.dtype, word: str, target: torch.dtype) -> None:
    tensors = write_pruned(tmp_path / "in", dtype)
    checkpoint.pack(tmp_path / "in", tmp_path / "packed", dtype=word)
    read = packed.read(tmp_path / "packed")
    for name, tensor in tensors.items():
        wanted = tensor if name.endswith(SMALL) else tensor.to(target)
        assert same(read.tensors[name].decode(), wanted), name
    assert checkpoint.load(tmp_path / "packed").stored[EMBEDDING] == target


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", [None, "int8"])
def test_int8(tmp_path: Path, head: str | None, tied: bool) -> None:
    tensors = write_pruned(tmp_path / "in", torch.bfloat16, tie_word_embeddings=tied)
    checkpoint.pack(tmp_path / "in", tmp_path / "packed", dtype="int8", head=head)
    read = packed.read(tmp_path / "packed")
    of_head = {EMBEDDING, "lm_head.weight"} if head else set()
    for name, tensor in tensors.items():
        quantised = name in of_head or name.endswith(("in_proj.weight", "x_proj.weight", "out_proj.weight"))
        assert (read.tensors[name].values.dtype == torch.int8) == quantised, name
        assert read.tensors[name].dtype == tensor.dtype
        assert quantised or same(read.tensors[name].decode(), tensor), name
    came = checkpoint.load(tmp_path / "packed")
    loaded = came.model.state_dict()
    for name, tensor in read.tensors.items():
        assert same(loaded[name], tensor.decode(torch.float32)), name
    difference = (logits(came.model) - logits(checkpoint.load(tmp_path / "in").model)).abs().max()
    assert 0 < difference < 0.02
    checkpoint.unpack(tmp_path / "packed", tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(same(written[name], tensor.decode()) for name, tensor in read.tensors.items())


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_mamba2(tmp_path: Path, dtype: str | None) -> None:
    model = pico_mamba2(time_step_limit=(0.001, 0.5))
    model.save_pretrained(tmp_path / "in")
    pico_tokenizer().save_pretrained(tmp_path / "in")
    tensors = halve(tmp_path / "in")
    read = checkpoint.pack(tmp_path / "in", tmp_path / "packed", dtype=dtype).packed
    for name, tensor in tensors.items():
        quantised = dtype == "int8" and name.endswith(("in_proj.weight", "out_proj.weight"))
        assert (read.tensors[name].values.dtype == torch.int8) == quantised, name
        assert quantised or same(read.tensors[name].decode(), tensor), name
    assert {read.tensors[name].kind for name in (IN, OUT)} == {"bitmask"}
    assert tuple(checkpoint.load(tmp_path / "packed").model.config.time_step_limit) == (0.001, 0.5)
    checkpoint.unpack(tmp_path / "packed", tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(same(written[name], found.decode()) for name, found in read.tensors.items())


def test_the_pattern_of_the_record_is_tried(tmp_path: Path) -> None:
    write_stock(tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    tensors[X] = thinned(tensors[X], 1, 8)
    save_file(tensors, tmp_path / "in/model.safetensors", {"format": "pt"})
    rows: list[Any] = [{"target": X, "pattern": "1:8"}, {"target": IN, "pattern": "unstructured"}, {}, 3]
    (tmp_path / "in/pruning.json").write_text(json.dumps({"targets": rows}))
    assert checkpoint.pack(tmp_path / "in", tmp_path / "out").packed.tensors[X].label == "1:8"
    (tmp_path / "in/pruning.json").write_text('{"targets": 3}')
    found = checkpoint.pack(tmp_path / "in", tmp_path / "out", force=True).packed.tensors[X]
    assert found.label == "bitmask" and same(found.decode(), tensors[X])


def test_of_a_checkpoint_in_memory(tmp_path: Path) -> None:
    tensors = write_pruned(tmp_path / "in", torch.float16)
    came = checkpoint.load(tmp_path / "in")
    held = packed.of(came)
    assert held.tensors.keys() == tensors.keys() and held.layout == "transformers"
    assert all(same(held.tensors[name].values, tensors[name]) for name in tensors)
    assert {tensor.kind for tensor in held.tensors.values()} == {"dense"}
    assert held.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert held.config["hidden_size"] == 16 and held.tokenizer() is came.tokenizer
    assert held.files == came.files
    with pytest.raises(ValueError, match="name it when you load"):
        held.tokenizer("other")
    came.stored[A] = torch.float64
    with pytest.raises(ValueError, match=f"^{A}: its dtype is float64; allowed"):
        packed.of(came)


def test_what_pack_and_unpack_refuse(tmp_path: Path) -> None:
    write_stock(tmp_path / "in")
    source, out = tmp_path / "in", tmp_path / "out"
    with pytest.raises(ValueError, match="unknown dtype 'int4'; known: fp32, bf16, int8, or none"):
        checkpoint.pack(source, out, dtype="int4")
    with pytest.raises(ValueError, match="unknown dtype 'bf16' of the head; known: int8"):
        checkpoint.pack(source, out, head="bf16")
    for attempt in (checkpoint.unpack, lambda source, _: packed.read(source)):
        with pytest.raises(ValueError, match=r"in' is not packed: it has no packed\.safetensors"):
            attempt(source, out)
    with pytest.raises(ValueError, match="overlaps the source"):
        checkpoint.pack(source, source / "packed")
    assert names(tmp_path) == {"in"}
    checkpoint.pack(source, out)
    with pytest.raises(ValueError, match=r"out' is already packed; unpack it first"):
        checkpoint.pack(out, tmp_path / "again")
    for attempt, start in ((checkpoint.pack, source), (checkpoint.unpack, out)):
        checkpoint.pack(source, tmp_path / "other", force=True)
        with pytest.raises(ValueError, match=r"other' exists; choose another name"):
            attempt(start, tmp_path / "other")
        attempt(start, tmp_path / "other", force=True)
    assert names(tmp_path) == {"in", "out", "other"}
    (out / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="it also has 'mine.txt'"):
        checkpoint.pack(source, out, force=True)


def test_a_packed_directory_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stock(tmp_path / "in")
    checkpoint.pack(tmp_path / "in", tmp_path / "packed")
    asked: list[str] = []

    def fetched(source: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path / "packed")

    monkeypatch.setattr(reading, "snapshot_download", fetched)
    assert packed.read("some/model").source == "some/model"
    assert {container.PACKED, "README.md", "*.json"} <= set(asked) and "pytorch_model*.bin" not in asked
    assert torch.equal(logits(checkpoint.load("some/model").model), logits(pico_mamba()))
    with pytest.raises(ValueError, match=r"'some/model' is already packed; unpack it first"):
        checkpoint.pack("some/model", tmp_path / "out")
    checkpoint.unpack("some/model", tmp_path / "out")
    assert not packed.is_packed("some/model")


def test_a_failing_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stock(tmp_path / "in")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container, "write", fail)
    with pytest.raises(OSError, match="nothing was left behind: .*No space left"):
        checkpoint.pack(tmp_path / "in", tmp_path / "out")
    assert names(tmp_path) == {"in"}


def test_a_value_that_bf16_does_not_have(tmp_path: Path) -> None:
    write_stock(tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    tensors[IN][0, 0] = 3.4e38
    save_file(tensors, tmp_path / "in/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"^{IN}: NaN or Inf"):
        checkpoint.pack(tmp_path / "in", tmp_path / "out", dtype="bf16")
    assert names(tmp_path) == {"in"}


@pytest.mark.parametrize(
    ("pattern", "label", "most"), [("unstructured", "bitmask", 0.57), ("2:4", "2:4", 0.57)]
)
def test_the_built_in_model(tmp_path: Path, pattern: str, label: str, most: float) -> None:
    model = sparsessm.load("builtin:pycode")
    fields: dict[str, Any] = {"pattern": pattern} if pattern != "unstructured" else {"sparsity": 0.5}
    report = sparsessm.prune(model, method="magnitude", target="projections", **fields, measure=False)
    sparsessm.save(model, tmp_path / "pruned", report)
    done = checkpoint.pack(tmp_path / "pruned", tmp_path / "packed")
    linear = [tensor for name, tensor in done.packed.tensors.items() if "proj.weight" in name]
    assert {tensor.label for tensor in linear} <= {label, "bitmask", "dense"}
    large = [tensor for tensor in linear if tensor.shape[1] >= 256 and tensor.label == label]
    assert large
    size = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in linear)
    assert sum(tensor.nbytes for tensor in linear) <= most * size
    assert 0.5 < done.ratio < 0.9
    again = sparsessm.load(tmp_path / "packed")
    tokens = torch.arange(100).reshape(2, 50)
    with torch.inference_mode():
        assert torch.equal(again.model(tokens).logits, model.model(tokens).logits)
    assert reading.read_record(tmp_path / "packed") == reading.read_record(tmp_path / "pruned")


if __name__ == "__main__":
    write_golden()
