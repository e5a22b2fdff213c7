"""Packing, unpacking and looking take one tensor at a time, and give what they would of a whole model."""

from __future__ import annotations

import filecmp
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from command import python
from directories import names, write_original
from golden_files import same
from packable import SOURCES, stock
from pico import pico_mamba, pico_tokenizer
from safetensors.torch import load_file
from torch import Tensor

from sparsessm import checkpoint
from sparsessm.architectures.own import Own
from sparsessm.checkpoint import (
    assembly,
    container,
    files,
    packed,
    packed_file,
    reading,
    shelf,
    values,
    writing,
)
from sparsessm.checkpoint.encoding import TRIED, encode
from sparsessm.checkpoint.packed_tensor import PackedTensor
from sparsessm.checkpoint.stacked import stacked
from sparsessm.evaluation.inspection import inspection


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the state of the model forgets the rest; " * 400)
    SOURCES[request.param](tmp_path / "in")
    return tmp_path / "in"


@contextmanager
def no_model() -> Iterator[None]:
    """None is built inside."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was built")

    with pytest.MonkeyPatch.context() as patch:
        for module in (assembly, reading):
            patch.setattr(module, "assemble", refuse)
        yield


def assert_same_directories(left: Path, right: Path) -> None:
    assert names(left) == names(right)
    for name in names(left):
        assert filecmp.cmp(left / name, right / name, shallow=False), name


def test_it_tells_and_holds_what_a_loaded_one_does(source: Path) -> None:
    came, found = checkpoint.load(source), checkpoint.at_rest(checkpoint.open_checkpoint(source))
    rest = found.checkpoint
    for name in (
        "source",
        "format",
        "stored",
        "trained_length",
        "files",
        "tokenizer_source",
        "prefix",
        "notes",
    ):
        assert getattr(rest, name) == getattr(came, name), name
    assert values.stored_forms(rest) == values.stored_forms(came)
    assert [*found.tensors] == [*values.stored_forms(came)] and set(found.extra) == set(came.extra)
    for name in found.tensors:
        assert same(found.stored(name), values.stored_tensor(came, name)), name
        assert all(tensor.is_meta for tensor in rest.model.state_dict().values())


def test_it_packs_and_unpacks_as_of_a_whole_model(source: Path) -> None:
    came, opened, whole = checkpoint.load(source), checkpoint.open_checkpoint(source), {}
    patterns = packed._patterns(opened.record or {})
    for name in values.stored_forms(came):

        def one(name: str, tensor: Tensor) -> PackedTensor:
            tried = (patterns[name],) if name in patterns else TRIED
            removed = packed._REMOVED if name.endswith("A_log") else (0.0,)
            return encode(name, tensor, patterns=tried, removed=removed)

        tensor = values.stored_tensor(came, name)
        whole[name] = (
            stacked(name, tensor, one) if ".experts." in name and tensor.ndim == 3 else one(name, tensor)
        )
    packed_file.write(Path("whole"), came.format, whole)
    with no_model():
        done = checkpoint.pack(source, "packed")
    assert Path("packed", container.PACKED).read_bytes() == Path("whole").read_bytes()
    assert done.after == Path("whole").stat().st_size
    assert done.sizes == {name: form.nbytes for name, form in values.stored_forms(came).items()}
    for name, tensor in whole.items():
        assert done.outline.forms[name] == (tensor.label, tensor.held)
        assert done.outline.sizes[name] == tensor.nbytes
        assert same(done.tensors[name].decode(), tensor.decode())
    if Own.of(came.model):
        return
    again = checkpoint.load("packed")
    writing.write(again, "saved", writing.stock_weights(again), 0, opened.ours, False)
    with no_model():
        checkpoint.unpack("packed", "out")
    assert_same_directories(Path("out"), Path("saved"))


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"dtype": "fp32"}, {"dtype": "int8", "head": "int8"}])
@pytest.mark.parametrize("name", ["jamba mixed", "mamba mixed", "original"])
def test_other_dtypes_are_encoded_alike_twice(name: str, options: dict[str, str], tmp_path: Path) -> None:
    """The second time nothing is tried: what was found the first time is taken."""
    SOURCES[name](tmp_path / "in")
    done = checkpoint.pack(tmp_path / "in", tmp_path / "out", **options)  # type: ignore[arg-type]
    for found in done.tensors.values():  # held against the checksums of the first time
        assert found.nbytes == done.outline.sizes[found.name]
    came = checkpoint.load(tmp_path / "out")
    writing.write(came, tmp_path / "saved", writing.stock_weights(came), 0, {}, False)
    checkpoint.unpack(tmp_path / "out", tmp_path / "back")
    assert_same_directories(tmp_path / "back", tmp_path / "saved")


def test_it_is_looked_at_as_a_whole_model_is(source: Path) -> None:
    opened = checkpoint.open_checkpoint(source)
    with no_model():
        facts = inspection(checkpoint.at_rest(opened), "it", opened.record)
    state = checkpoint.load(source).model.state_dict()
    for row in (opened.record or {"targets": []})["targets"]:
        held, _, expert = row["target"].rpartition(".")
        tensor = state[held][int(expert)] if expert.isdigit() else state.get(row["target"])
        if tensor is not None:
            assert facts["removed"][row["target"]] == int(
                ((tensor == 0) | (tensor == 38) | (tensor == 11)).sum()
            )
    assert facts["format"] == opened.format and (facts["record"] is None) == (opened.record is None)


# ------------------------------------------------------------------------------------ one at a time


def test_one_tensor_is_alive_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the experts of a layer are joined from theirs one by one."""
    SOURCES["pruned experts"](tmp_path / "in")
    living: list[Callable[[], Any]] = []
    whole = shelf.Stored.__getitem__, container.Tensors.__getitem__

    def watched(read: Any) -> Any:
        def taken(self: Any, name: str) -> Any:
            assert all(alive() is None for alive in living), name
            found = read(self, name)
            living[:] = [weakref.ref(found)]
            return found

        return taken

    for kind, read in zip((shelf.Stored, container.Tensors), whole, strict=True):
        monkeypatch.setattr(kind, "__getitem__", watched(read))
    checkpoint.pack(tmp_path / "in", tmp_path / "packed", dtype="int8")
    checkpoint.pack(tmp_path / "in", tmp_path / "packed", force=True)
    checkpoint.unpack(tmp_path / "packed", tmp_path / "out")
    for folder in ("in", "packed"):
        opened = checkpoint.open_checkpoint(tmp_path / folder)
        inspection(checkpoint.at_rest(opened), "it", opened.record)
    assert living


PEAK = """
import sys
from pathlib import Path
from sparsessm import checkpoint
from sparsessm.evaluation.inspection import inspection
def looked(path, out):
    opened = checkpoint.open_checkpoint(path)
    inspection(checkpoint.at_rest(opened), path, opened.record)
def peak(what, path, out):
    held = [line for line in open("/proc/self/status") if line.startswith("VmRSS")]
    Path("/proc/self/clear_refs").write_text("5")
    what(path, out)
    most = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return (int(most[0].split()[1]) - int(held[0].split()[1])) >> 10
for kind in ("stock", "original"):
    for number in (4, 40):  # once to set up what is set up at the first use
        path, out = f"{sys.argv[1]}/{kind}-{number}", f"{sys.argv[1]}/{kind}-{number}-out"
        once = out + str(len(list(Path(sys.argv[1]).iterdir())))
        print(kind, number, peak(checkpoint.pack, path, once), peak(checkpoint.unpack, once, once + "-un"),
              peak(looked, path, None), peak(looked, once, None))
"""


def test_the_peak_does_not_depend_on_the_number_of_layers(tmp_path: Path) -> None:
    """40 layers of 3 MiB are 120 MiB; of a mapped file at most 32 MiB stay beside the tensor in work."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not tell the peak of a process")
    for number in (4, 40):
        fields = {"hidden_size": 256, "num_hidden_layers": number, "expand": 4}
        stock(tmp_path / f"stock-{number}", pico_mamba(**fields))
        write_original(
            tmp_path / f"original-{number}", pico_mamba(**fields), ssm_cfg={"d_state": 8, "expand": 4}
        )
        pico_tokenizer(60).save_pretrained(tmp_path / f"original-{number}")
    rows = [line.split() for line in python(PEAK, tmp_path).stdout.splitlines()]
    assert len(rows) == 4
    assert max(int(peak) for row in rows if row[1] == "40" for peak in row[2:]) < 50, rows


@pytest.mark.parametrize("form", ["safetensors", "bin", "old bin", "shards"])
def test_a_file_that_is_mapped_anew_gives_every_tensor_once(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stock(tmp_path / "in", pico_mamba(), max_shard_size="4KB" if form == "shards" else "5GB")
    held = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    if "bin" in form:
        (folder / "model.safetensors").unlink()
        torch.save(held, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    for module in (files, shelf):
        monkeypatch.setattr(module, "MAPPED", 1000)
    opened = checkpoint.open_checkpoint(folder)
    read = list(files.read_tensors(opened.folder.stock_files))
    assert len(read) == len(held) and all(torch.equal(held[name], tensor) for name, tensor in read)
    found = checkpoint.at_rest(opened)
    assert found.tensors.keys() == held.keys()
    assert all(torch.equal(found.stored(name), tensor) for name, tensor in held.items())
