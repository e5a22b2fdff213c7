"""One tensor in every kind of encoding: there and back, against a reader written from the page."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import plain_reader
import pytest
import torch
from golden_files import FLOATS, changed, random, same, thinned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsessm.checkpoint import packed_file
from sparsessm.checkpoint.encoding import Encoded, encode, finite


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
    packed_file.write(file, "transformers", {encoded.name: encoded})
    ((shape, dtype, entries),) = plain_reader.read(file).values()
    assert dtype == str(encoded.dtype).removeprefix("torch.")
    return torch.tensor(entries, dtype=torch.float32).reshape(shape)


@given(matrices(), st.sampled_from([None, "dense", "bitmask"]))
@settings(deadline=None, max_examples=150)
def test_what_is_encoded_comes_back_to_the_bit(case: tuple[Tensor, float], kind: str | None) -> None:
    tensor, fill = case
    encoded = encode("t", tensor, removed=(fill, 0.0) if kind is None else (fill,), kind=kind)
    encoded.check()
    assert same(encoded.decode(), tensor)
    assert same(encoded.decode(torch.float32), tensor.float())
    assert kind is None or encoded.kind == kind
    if encoded.kind == "bitmask":
        assert encoded.values.numel() == int((~bits_equal(tensor, encoded.removed)).sum())
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
    encoded = encode("t", tensor, kind=f"{n}:{m}", removed=(fill,))
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
    found = encode("t", memoryless, removed=(38.0, 0.0))
    assert (found.kind, found.removed) == ("bitmask", 38.0)
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
        (MASKED, {"removed": math.nan}, "its removed value is nan; allowed"),
        (MASKED, {"removed": 0.1}, "its removed value is 0.1; allowed: a finite number that float32 has"),
        (SCALED, {"removed": 38.0}, "its removed value is 38.0; a dense or int8 tensor has none but 0"),
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


@given(
    values=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=9),
    dtype=st.sampled_from([*FLOATS, torch.float64]),
)
@settings(deadline=None, max_examples=150)
def test_whether_a_tensor_is_finite_is_asked_of_its_bits(values: list[int], dtype: torch.dtype) -> None:
    """Random bits are often NaN or Inf in narrow dtypes; beside them stand the ends of every range."""
    tensor = torch.tensor(values, dtype=torch.int32).repeat(2).view(dtype)
    assert finite(tensor) == bool(torch.isfinite(tensor).all())
    ends = torch.finfo(dtype)
    assert finite(torch.tensor([ends.max, ends.min, ends.tiny, -0.0], dtype=dtype))
    for one in (torch.inf, -torch.inf, torch.nan, -torch.nan):
        assert not finite(torch.tensor([[1.0, 2.0], [one, 3.0]], dtype=dtype).T)
    assert finite(torch.empty(0, dtype=dtype)) and finite(torch.tensor(1.0, dtype=dtype))
