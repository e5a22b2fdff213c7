"""Matrices on a grid: there and back, against a reader written from the page; what is refused."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import plain_reader
import pytest
import torch
from golden_files import FLOATS, same, streams
from hypothesis import given, settings
from hypothesis import strategies as st
from nested_bitmaps import nested
from torch import Tensor

from sparsessm.checkpoint import container, packed_file
from sparsessm.checkpoint.coded import Coded, ans, fixed, plain
from sparsessm.checkpoint.encoding import encode

KINDS = ("int", "odd", "masked")


def scales(*shape: int, seed: int) -> Tensor:
    """Positive, a few of them the smallest and largest that there are with small codes."""
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.01
    drawn.view(-1)[::7] = 6e-8
    return drawn.half()


def factors(size: int, seed: int) -> Tensor:
    """Scales whose lowest seven bits are zero."""
    return (scales(size, seed=seed).view(torch.int16).clamp(min=128) >> 7 << 7).view(torch.float16)


def codes_of(kind: str, width: int, rows: int, columns: int, seed: int) -> Tensor:
    draw, half = torch.Generator().manual_seed(seed), 2 ** (width - 1)
    found = torch.randint(0, 2 * half, (rows, columns), generator=draw)
    if kind == "odd":
        return 2 * found + 1 - 2 * half
    found -= half
    if kind == "masked":
        found += found >= 0
        found[torch.rand(rows, columns, generator=draw) < 0.4] = 0
    elif (found % 2 == 1).all():
        found[0, 0] = -half  # else they were odd
    return found


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Coded, Tensor]:
    """(coded, its values by the formula), of every kind and hostile shapes."""
    rows, columns = draw(st.sampled_from([1, 2, 15, 16, 17, 33])), draw(st.integers(1, 70))
    seed, dtype = draw(st.integers(0, 2**31)), draw(st.sampled_from(FLOATS))
    kind = draw(st.sampled_from([*KINDS, "nested", "ans"]))
    if kind in ("nested", "ans"):
        spread = draw(st.sampled_from([0.0, 0.5, 2.0, 40.0]))
        source = torch.Generator().manual_seed(seed)
        codes = (torch.randn(rows, columns, generator=source) * spread).round().int()
        codes[torch.rand(rows, columns, generator=source) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
        forms = torch.randint(1, draw(st.sampled_from([2, 3, 10])), (rows,), generator=source)
        forms[(codes == 0).all(1) & (torch.rand(rows, generator=source) < 0.5)] = 0
        by_row, by_column = factors(rows, seed=seed), factors(columns, seed=seed + 1)
        values = codes.float() * by_row.float()[:, None] * by_column.float()
        if kind == "ans":
            return ans("t", dtype, streams(codes), by_row, by_column), values
        return nested("t", dtype, codes, by_row, by_column, forms), values
    width, group = draw(st.integers(2, 8)), draw(st.sampled_from([1, 2, 32, 64, 300]))
    codes = codes_of(kind, width, rows, columns, seed)
    by_group = scales(rows, -(-columns // group), seed=seed)
    if kind != "odd":
        by_group.view(-1)[:: draw(st.integers(2, 5))] *= -1
    coded = fixed("t", dtype, codes, by_group, width=width, group=group, masked=kind == "masked")
    assert coded.kind == kind
    values = codes.float() * by_group.float().repeat_interleave(group, 1)[:, :columns]
    return coded, values.masked_fill(codes == 0, 0.0) if kind == "masked" else values


@given(matrices())
@settings(deadline=None, max_examples=200)
def test_what_is_coded_comes_back_to_the_bit(case: tuple[Coded, Tensor]) -> None:
    coded, values = case
    coded.check()
    assert same(coded.decode(torch.float32), values) and same(coded.decode(), values.to(coded.dtype))
    assert same(plain(coded).decode(), values.to(coded.dtype))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "coded.safetensors"
        packed_file.write(file, "transformers", {"t": coded, "u": encode("u", torch.ones(2))})
        entries = plain_reader.read(file)
        header = container.read_header(file)
        read = container.Tensors(header, header.shapes)["t"]
    assert entries["t"][:2] == (list(values.shape), str(coded.dtype).removeprefix("torch."))
    assert same(torch.tensor(entries["t"][2], dtype=torch.float32).view(values.shape), values)
    assert isinstance(read, Coded) and read.label == coded.label
    assert all(torch.equal(read.parts[name], array) for name, array in coded.parts.items())


def test_bytes_are_those_of_the_formula() -> None:
    """A zero takes one bit and others 2 + |code|, factors 8 bits, a row's form 4; 16 rows have a start."""
    codes = torch.tensor([[0, 1, -1, 2, -3, 0, 0, 9]] * 13 + [[0] * 8] * 3)
    forms = torch.tensor([2] * 12 + [1, 0, 0, 0])
    coded = nested("t", torch.float32, codes, torch.ones(16), torch.ones(8), forms)
    assert coded.arrays["planes"].nbytes == -(-(13 * (3 + 3 + 3 + 4 + 5 + 11) + 1) // 8)
    assert coded.nbytes == coded.arrays["planes"].nbytes + 16 + 8 + 8 + 2 * 8
    codes = torch.tensor([[0, 1, -1, 2, -3, 0, 0, 9]] * 16)
    int4 = fixed("t", torch.float32, codes.clamp(-8, 7), torch.ones(16, 1), width=4, group=64, masked=False)
    assert int4.label == "int4:64" and int4.nbytes == 16 * 4 + 16 * 2


def test_a_file_is_of_the_first_version_that_has_its_kinds(tmp_path: Path) -> None:
    eye, ones = torch.eye(3), torch.ones(3)
    tensors: dict[str, Any] = {
        "1": encode("t", eye),
        "2": fixed("t", torch.float32, eye, ones[:, None], width=2, group=3, masked=True),
        "3": ans("t", torch.float32, streams(eye), ones, ones),
    }
    said = {"2": r"'masked2:3'; allowed: 'dense', 'bitmask', 'N:M'$", "3": "'ans'; allowed: .*, 'nested'$"}
    for version, tensor in tensors.items():
        packed_file.write(tmp_path / version, "transformers", {"t": tensor})
        content, this = (tmp_path / version).read_bytes(), b'"version":"%s"'
        assert this % version.encode() in content
        if version in said:
            older = content.replace(this % version.encode(), this % str(int(version) - 1).encode())
            (tmp_path / "older").write_bytes(older)
            with pytest.raises(ValueError, match=rf"'t': kind {said[version]}"):
                container.read_header(tmp_path / "older")


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_code_that_the_width_does_not_have(kind: str, width: int) -> None:
    codes = codes_of(kind, width, 3, 9, seed=1)
    step = 2 if kind == "odd" else 1
    for beyond in (int(codes.max()) + step, int(codes.min()) - step):
        most = 2**width - 1 if kind == "odd" else 2 ** (width - 1)
        if -most <= beyond <= most - (kind == "int"):
            continue  # not drawn
        wrong = codes.clone()
        wrong[1, 2] = beyond
        with pytest.raises(ValueError, match=f"t: a code that {width} bits do not have"):
            fixed("t", torch.float32, wrong, torch.ones(3, 1), width=width, group=64, masked=kind == "masked")


def some(kind: str) -> Coded:
    codes = torch.tensor([[0, 1, -1, 2, -3, 0, 0, 19, 1]] * 17)
    if kind == "ans":
        return ans("t", torch.float16, streams(codes), torch.ones(17), torch.ones(9))
    if kind == "nested":
        return nested("t", torch.float16, codes, torch.ones(17), torch.ones(9), 2 + torch.arange(17) % 2)
    codes = codes_of(kind, 3, 17, 9, seed=2)
    return fixed("t", torch.float16, codes, torch.ones(17, 3), width=3, group=4, masked=kind == "masked")


SPOILT = [
    ("odd", "scales", lambda x: x.index_fill(0, torch.tensor([1]), -1.0), "'scales' holds what is not a pos"),
    (
        "int",
        "scales",
        lambda x: x.index_fill(0, torch.tensor([1]), 0.0),
        "'scales' holds what is not a number",
    ),
    ("masked", "scales", lambda x: x * torch.inf, "'scales' holds what is not a number other than 0"),
    ("odd", "scales", lambda x: x.index_fill(0, torch.tensor([1]), torch.nan), "'scales' holds what is not"),
    ("masked", "scales", lambda x: x[:, :2], "'scales' is torch.float16 [17, 2], expected torch.float16"),
    ("int", "codes", lambda x: x.int(), "'codes' is torch.int32"),
    ("int", "codes", lambda x: x | 128, "'codes' has bits set behind its last column"),
    ("masked", "codes", lambda x: x[:-1], "'codes' has"),
    ("masked", "offsets", lambda x: x + 1, "'offsets' does not count the bits of the mask"),
    ("masked", "mask", lambda x: x | 128, "'mask' has bits set behind column 8"),
    ("nested", "starts", lambda x: x + 1, "'starts' does not rise from 0"),
    ("nested", "starts", lambda x: torch.stack([x[0], x[2], x[2]]), "'planes' goes on behind rows 0"),
    ("nested", "planes", lambda x: x[:-1], "'starts' does not rise from 0"),
    ("nested", "planes", lambda x: torch.full_like(x, 255), "'planes' ends inside of rows 0"),
    ("nested", "planes", lambda x: torch.zeros_like(x), "'planes' goes on behind rows 0"),
    ("nested", "forms", lambda x: x | 8, "'forms' holds 10; allowed: 0 to 9"),
    ("nested", "forms", lambda x: x | 16, "'forms' has bits set behind its last row"),
    ("nested", "columns", lambda x: x * 0, "'columns' holds what is not a positive number"),
    ("nested", "columns", lambda x: x | 255, "'columns' holds what is not a positive number"),
    ("nested", "rows", lambda x: x * 0 + 247, "a value is beyond torch.float16"),
    ("ans", "rows", lambda x: x * 0 + 247, "a value is beyond torch.float16"),
    ("ans", "columns", lambda x: x * 0, "'columns' holds what is not a positive number"),
    ("ans", "ends", lambda x: x + 1, "'ends' does not rise to the"),
    ("ans", "ends", lambda x: x.repeat(2), "'ends' is torch.int64 [2], expected torch.int64 [1]"),
    ("ans", "stream", lambda x: x[:8], "'ends' does not rise to the 8 bytes of 'stream'"),
    ("ans", "stream", lambda x: x * 0, "'stream' does not come out even in rows 0 and on"),
    ("ans", "stream", lambda x: x.view(1, -1), "'stream' is torch.uint8 [1, "),
    ("ans", "classes", lambda x: x[:0].repeat(2).int(), "'classes' is torch.int32 [0]"),
    ("ans", "classes", lambda x: torch.cat([x, x]), "'classes' has"),
    ("ans", "tables", lambda x: x[:-1], "'tables' has 3 tables; allowed: 1, 2, 4, 8 or 16"),
    ("ans", "tables", lambda x: x | 255, "'tables' ends inside of a table"),
]


@pytest.mark.parametrize(("kind", "part", "spoil", "words"), SPOILT)
def test_arrays_that_stand_for_nothing(kind: str, part: str, spoil: Any, words: str) -> None:
    coded = some(kind)
    coded.check()
    with pytest.raises(ValueError) as caught:
        replace(coded, arrays={**coded.arrays, part: spoil(coded.arrays[part])}).check()
    assert str(caught.value).startswith(f"t: {words}")


def test_what_is_not_as_it_is_said() -> None:
    codes, ones = streams(torch.ones(2, 3)), torch.ones(2)
    with pytest.raises(ValueError, match="t: a factor of its columns has more bits than are stored"):
        ans("t", torch.float32, codes, ones, torch.full((3,), 1.01))


def test_arrays_of_another_kind() -> None:
    coded = some("int")
    for arrays in ({"codes": coded.arrays["codes"]}, {**coded.arrays, "mask": coded.arrays["codes"]}):
        with pytest.raises(ValueError, match="t: kind int3:4 has the arrays codes, scales, not"):
            replace(coded, arrays=arrays).check()
    with pytest.raises(ValueError, match="t: kind int3:4 needs 2 axes"):
        replace(coded, shape=(17, 9, 1)).check()
    for wrong in ({"width": 9}, {"group": 0}, {"kind": "even"}):
        with pytest.raises(ValueError, match="t: its kind is '[a-z0-9:]+'; allowed: int, odd or"):
            replace(coded, **wrong).check()


@pytest.mark.parametrize(("kind", "part"), [("nested", "planes"), ("ans", "stream"), ("ans", "tables")])
def test_any_bytes_give_codes_or_one_line(kind: str, part: str) -> None:
    coded, draw = some(kind), torch.Generator().manual_seed(0)
    told = set()
    for _ in range(300):
        held = coded.arrays[part].clone()
        at = torch.randint(len(held), (2,), generator=draw)
        held[at] = torch.randint(256, (2,), generator=draw).to(torch.uint8)
        try:
            replace(coded, arrays={**coded.arrays, part: held}).check()
        except ValueError as error:
            told.add(str(error).partition(" rows")[0])
    own = ("t: 'stream' ", "t: 'tables' ", "t: 'classes' ") if kind == "ans" else (f"t: '{part}' ",)
    assert all(line.startswith(own) for line in told)
    assert len(told) > 1
