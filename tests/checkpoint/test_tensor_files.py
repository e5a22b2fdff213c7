"""Files that are written tensor by tensor are to the byte those of the libraries, which take all at once."""

from __future__ import annotations

import io
import json
import weakref
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sparsessm.checkpoint import bin_file, files, tensor_file
from sparsessm.checkpoint.tensor_file import Form

ASKED = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.uint8, torch.int8),
    *(torch.int16, torch.int32, torch.int64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.uint16, torch.uint32, torch.uint64),
]


def holds(dtype: torch.dtype) -> bool:
    """Whether the library can; older ones know fewer."""
    try:
        return bool(save({"t": torch.zeros(16, dtype=torch.uint8).view(dtype)}))
    except (KeyError, SafetensorError):
        return False


DTYPES = [dtype for dtype in ASKED if holds(dtype)]
NAMES = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=6)


def values(dtype: torch.dtype, shape: Iterable[int], seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 2, tuple(shape), generator=draw)
    if dtype.is_floating_point:
        return torch.randn(tuple(shape), generator=draw).to(dtype)
    return numbers.to(dtype)


@st.composite
def dictionaries(draw: Any) -> dict[str, Tensor]:
    names = draw(st.lists(NAMES.filter(lambda name: name != "__metadata__"), unique=True, max_size=8))
    return {
        name: values(
            draw(st.sampled_from(DTYPES)),
            draw(st.lists(st.sampled_from([0, 1, 2, 3, 7]), max_size=3)),
            draw(st.integers(0, 9)),
        )
        for name in names
    }


class Handed:
    """Hands tensors out as copies, notes the order, and sees that no two are alive at a time."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.asked = tensors, []
        self._last: Callable[[], Tensor | None] = lambda: None

    def __call__(self, name: str) -> Tensor:
        assert self._last() is None, "two tensors in memory"
        value = self.tensors[name].clone()
        self._last = weakref.ref(value)
        self.asked.append(name)
        return value


def forms(tensors: dict[str, Tensor]) -> dict[str, Form]:
    return {name: Form.of(tensor) for name, tensor in tensors.items()}


@settings(deadline=None, max_examples=100)
@given(tensors=dictionaries(), notes=st.sampled_from([{"format": "pt"}, {}, {'"\\\t': "é\x7f\x01"}]))
def test_a_safetensors_file_is_that_of_the_library(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], notes: dict[str, str]
) -> None:
    file, hand = tmp_path_factory.mktemp("one") / "ours", Handed(tensors)
    tensor_file.write(file, forms(tensors), hand, notes)
    assert hand.asked == [*tensors]
    assert file.read_bytes() == save(tensors, notes or None)


def test_the_order_of_dtypes_is_that_of_the_library(tmp_path: Path) -> None:
    """Of every dtype that both torch and the library know."""
    dtypes = {name: getattr(torch, name) for name in tensor_file._ORDER if hasattr(torch, name)}
    known = {name: torch.zeros(1, dtype=dtype) for name, dtype in dtypes.items() if holds(dtype)}
    assert len(known) > 10
    tensor_file.write(tmp_path / "ours", forms(known), known.__getitem__, {})
    assert (tmp_path / "ours").read_bytes() == save(known)


def test_what_is_not_contiguous_is_written_row_by_row(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    tensor_file.write(tmp_path / "ours", forms({"t": tensor}), lambda _: tensor, {"format": "pt"})
    assert torch.equal(load_file(tmp_path / "ours")["t"], tensor)


@pytest.mark.parametrize("write", ["safetensors", "bin"])
def test_a_tensor_of_another_form_than_was_said_is_refused(tmp_path: Path, write: str) -> None:
    said = {"t": Form(torch.float32, (3,))}
    with pytest.raises(ValueError, match=r"^t: it is Form\(dtype=torch\.float16"):
        if write == "bin":
            bin_file.write(tmp_path / "ours", {"t": "t"}, said, lambda _: torch.zeros(3).half())
        else:
            tensor_file.write(tmp_path / "ours", said, lambda _: torch.zeros(3).half(), {})


def test_a_dtype_that_the_format_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^t: its dtype is complex128; safetensors can hold bool, "):
        tensor_file.write(tmp_path / "ours", {"t": Form(torch.complex128, (1,))}, lambda _: torch.ones(1), {})


@settings(deadline=None, max_examples=40)
@given(tensors=dictionaries(), most=st.sampled_from([8, 30, 10**6]))
def test_shards_and_their_index(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], most: int
) -> None:
    folder, hand = tmp_path_factory.mktemp("shards"), Handed(tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "SHARD_BYTES", most)
        files.write_safetensors(folder, forms(tensors), hand)
    assert hand.asked == [*tensors]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        assert {file.name for file in folder.iterdir()} == {"model.safetensors"}
        assert (folder / "model.safetensors").read_bytes() == save(tensors, {"format": "pt"})
        return
    told, found = json.loads(index.read_text()), set()
    assert told["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    assert told["weight_map"].keys() == tensors.keys()
    for name in {*told["weight_map"].values()}:
        some = {key: tensors[key] for key, file in told["weight_map"].items() if file == name}
        assert sum(tensor.nbytes for tensor in some.values()) <= most or len(some) == 1
        assert (folder / name).read_bytes() == save(some, {"format": "pt"})
        found |= some.keys()
    assert found == tensors.keys()


@pytest.mark.parametrize("write", ["safetensors", "bin"])
def test_a_written_file_can_be_read_by_whom_the_user_lets_read_files(tmp_path: Path, write: str) -> None:
    tensors = {"t": torch.ones(3)}
    if write == "bin":
        bin_file.write(tmp_path / "ours", {"t": "t"}, forms(tensors), tensors.__getitem__)
    else:
        tensor_file.write(tmp_path / "ours", forms(tensors), tensors.__getitem__, {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ------------------------------------------------------------------------------------------ .bin


@settings(deadline=None, max_examples=60)
@given(tensors=dictionaries(), data=st.data())
def test_a_bin_file_is_that_of_torch(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], data: Any
) -> None:
    file, hand = tmp_path_factory.mktemp("one") / "pytorch_model.bin", Handed(tensors)
    names = {name: name for name in tensors}
    if tensors:
        copied = data.draw(st.lists(st.sampled_from([*tensors]), max_size=2))
        names |= {f"copy {number} of it": name for number, name in enumerate(copied)}
    bin_file.write(file, names, forms(tensors), hand)
    assert hand.asked == [*tensors]
    whole = io.BytesIO()
    torch.save({name: tensors[each] for name, each in names.items()}, whole)
    assert file.read_bytes() == whole.getvalue()
    with zipfile.ZipFile(file) as archive:  # Python holds every record against its checksum
        assert archive.testzip() is None
    for mapped in (True, False):
        found = torch.load(file, weights_only=True, mmap=mapped)
        assert [*found] == [*names]
        for name, each in names.items():
            assert found[name].dtype == tensors[each].dtype
            assert bytes(tensor_file.raw(found[name])) == bytes(tensor_file.raw(tensors[each]))
            assert found[name].data_ptr() == found[each].data_ptr()
        del found


def test_a_name_that_is_met_first_as_a_copy(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(2), "a": torch.zeros(3)}
    bin_file.write(
        tmp_path / "x", {"one": "a", "two": "b", "three": "a"}, forms(tensors), tensors.__getitem__
    )
    found = torch.load(tmp_path / "x", weights_only=True)
    assert {name: found[name].tolist() for name in found} == {
        "one": [0] * 3,
        "two": [1] * 2,
        "three": [0] * 3,
    }
