"""Tensors of several matrices in packed files: the experts of a layer, each in its own form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_reader
import pytest
import torch
from golden_files import CONV, GOLDEN, closed, expected, fuzz, opened, random, same
from hybrids import MIXTURES
from pico import pico_tokenizer
from pico_hybrids import pico_hybrid
from safetensors.torch import load_file
from stock import stock_logits

from sparsessm import checkpoint
from sparsessm.checkpoint import container, packed
from sparsessm.checkpoint.encoding import Encoded, encode
from sparsessm.checkpoint.stacked import Stacked, matrices_of, stacked

ROUTERS = ("conv1d", "router", ".gate.", "_gate.", "A_log", "in_proj_ba", "in_proj_a", "in_proj_b")
SMALL = {"fp32": ROUTERS, "int8": (*ROUTERS, "dt_proj")}  # what keeps its dtype
IDS = torch.arange(24).view(2, 12)


def with_zeros(name: str, share: float = 0.6) -> Any:
    """A pico hybrid in bfloat16, whose odd experts have lost so many weights; large enough to gain by it."""
    model = pico_hybrid(name, hidden_size=32, intermediate_size=32, moe_intermediate_size=32).bfloat16()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if ".experts." in key:
                odd = tensor[1::2]
                odd[odd.abs() < odd.abs().float().quantile(share)] = 0.0
    return model


def written(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MIXTURES)
def test_every_expert_has_its_own_form_and_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    model = with_zeros(name)
    source = written(tmp_path / "in", model)
    done = checkpoint.pack(source, tmp_path / "packed")
    plain = plain_reader.read(tmp_path / "packed" / container.PACKED)
    stacks = 0
    for key, tensor in model.state_dict().items():
        found = done.tensors[key]
        assert same(found.decode(), tensor)
        shape, dtype, entries = plain[key]
        assert (shape, dtype) == ([*tensor.shape], "bfloat16")
        assert same(torch.tensor(entries).reshape(shape), tensor.float())
        if isinstance(found, Stacked):
            stacks += 1
            assert [one.label for one in found.each] == ["dense", "bitmask", "dense", "bitmask"]
            assert found.nbytes == done.outline.sizes[key] < 0.9 * done.sizes[key]
    assert stacks == sum(".experts." in key for key in model.state_dict())
    facts = checkpoint.at_rest(checkpoint.open_checkpoint(tmp_path / "packed"))
    assert sum(facts.sizes.values()) == sum(done.outline.sizes.values())
    checkpoint.unpack(tmp_path / "packed", tmp_path / "back")
    left, right = (load_file(tmp_path / folder / "model.safetensors") for folder in ("in", "back"))
    assert left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", MIXTURES)
def test_int8_and_floats_take_experts_as_they_take_other_matrices(name: str, tmp_path: Path) -> None:
    model = with_zeros(name)
    source = written(tmp_path / "in", model)
    for word, dtype in (("int8", torch.int8), ("fp32", torch.float32)):
        checkpoint.pack(source, tmp_path / word, dtype=word, head="int8" if word == "int8" else None)
        for key, tensor in packed.read(tmp_path / word).tensors.items():
            whole = model.state_dict()[key]
            small = whole.ndim == 1 or any(
                part in key for part in ("conv1d", "router", ".gate.", "_gate.", "A_log")
            )
            small |= key.endswith(
                ("dt_proj.weight", "in_proj_ba.weight", "in_proj_a.weight", "in_proj_b.weight")
            )
            small &= not (word == "fp32" and key.endswith("dt_proj.weight"))
            for place, one in enumerate(matrices_of(tensor) if ".experts." in key else [tensor]):
                assert isinstance(one, Encoded) and one.values.dtype == (
                    torch.bfloat16 if small else dtype
                ), key
                want = (whole[place] if ".experts." in key else whole).float()
                most = want.abs().amax(-1, keepdim=True) / 127 if word == "int8" and not small else 0.0
                assert ((one.decode(torch.float32) - want).abs() <= 0.5001 * most).all(), key
    came = checkpoint.load(tmp_path / "fp32").model
    assert torch.equal(stock_logits(came, IDS), stock_logits(model.float(), IDS))


def test_without_gain_there_is_no_stack(tmp_path: Path) -> None:
    """Dense experts are one tensor, in a file of version 1, as ever."""
    source = written(tmp_path / "in", pico_hybrid("jamba"))
    done = checkpoint.pack(source, tmp_path / "packed")
    header, _, _ = opened((tmp_path / "packed" / container.PACKED).read_bytes())
    assert header["__metadata__"]["version"] == "1" and "stack" not in {
        label for label, _ in done.outline.forms.values()
    }


def test_a_stack_must_fit_its_matrices() -> None:
    whole = random(3, 5, 64, kept=0.1)
    found = stacked("t", whole, lambda name, matrix: encode(name, matrix))
    assert isinstance(found, Stacked) and same(found.decode(), whole)
    found.check()

    def refused(words: str, **fields: Any) -> None:
        parts: dict[str, Any] = {"shape": found.shape, "dtype": found.dtype, "each": found.each} | fields
        with pytest.raises(ValueError, match=f"^t: {words}"):
            Stacked("t", **parts).check()

    refused(r"it has 2 matrices, its shape is \[3, 5, 64\]", each=found.each[:2])
    refused("its matrix 0 is 't.1'", each=found.each[::-1][1:] + found.each[:1])
    refused("its matrix 0 is 't.0', torch.float32", dtype=torch.bfloat16)
    refused("kind stack needs 3 axes, its shape is", shape=(3, 320))


def edited(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The golden file with another description of its stack, and checksums that fit that."""
    header, _, arrays = opened((GOLDEN / "stack" / container.PACKED).read_bytes())
    metadata = header["__metadata__"]
    tensors = json.loads(metadata["tensors"])
    change(tensors)
    metadata["tensors"] = json.dumps(tensors)
    fuzz().sealed(header, arrays)
    return closed(header, arrays)


def of_stack(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors[CONV].update(fields)


def first(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors[CONV]["each"][0].update(fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (of_stack(shape=[15, 1, 4]), "allowed: a list of 15 objects"),
        (of_stack(shape=[2**60, 1, 4]), f"allowed: a list of {2**60} objects"),
        (of_stack(shape=[16, 4]), "allowed: 3 axes for a stack"),
        (of_stack(shape="all"), "shape 'all'; allowed: at most 8 whole numbers"),
        (of_stack(dtype="int8"), "dtype 'int8'; allowed: float32, bfloat16, float16"),
        (of_stack(dtype="bfloat16"), f"{CONV}.0: 'values' is float32"),
        (of_stack(each={}), "expected an object of shape, dtype, kind and each"),
        (of_stack(each=[None] * 16), "each holds objects of kind, checksum and, if need be, fill"),
        (of_stack(fill=0.0), "expected an object of shape, dtype, kind and each"),
        (of_stack(kind="dense"), "expected an object of shape, dtype, kind, checksum"),
        (lambda t: t[CONV].pop("each"), "expected an object of shape, dtype, kind and each"),
        (lambda t: t[CONV]["each"].pop(), "allowed: a list of 16 objects"),
        (lambda t: t[CONV]["each"].reverse(), f"{CONV}.0' is of kind ans, but there is no"),
        (lambda t: t.update({f"{CONV}.3": t["backbone.norm_f.weight"]}), f"'{CONV}.3' is there twice"),
        (first(shape=[1, 4]), "each holds objects of kind, checksum and, if need be, fill"),
        (first(kind="stack"), f"{CONV}.0': kind 'stack'; allowed: 'dense', 'bitmask'"),
        (first(kind="bitmask"), f"{CONV}.0' is of kind bitmask, but there is no"),
        (first(fill=1.0), f"{CONV}.0: its removed value is 1.0"),
    ],
)
def test_a_stack_that_is_not_one_is_refused(
    change: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path
) -> None:
    for file in (GOLDEN / "stack").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / container.PACKED).write_bytes(edited(change))
    for attempt in (packed.read, checkpoint.load):
        with pytest.raises(ValueError, match=container.PACKED) as caught:
            attempt(tmp_path)
        assert words in str(caught.value)


def test_an_older_version_has_no_stack(tmp_path: Path) -> None:
    content = (GOLDEN / "stack" / container.PACKED).read_bytes()
    (tmp_path / "older").write_bytes(content.replace(b'"version":"4"', b'"version":"3"'))
    with pytest.raises(ValueError, match="expected an object of shape, dtype, kind, checksum"):
        container.read_header(tmp_path / "older")


def test_a_flipped_bit_in_a_matrix_names_it(tmp_path: Path) -> None:
    content = bytearray((GOLDEN / "stack" / container.PACKED).read_bytes())
    header, start, _ = opened(bytes(content))
    content[start + header[f"{CONV}.5.codes"]["data_offsets"][0]] ^= 1
    (tmp_path / "spoiled").write_bytes(content)
    with pytest.raises(ValueError, match=f"tensor {CONV}.5 is damaged"):
        dict(container.read_tensors(container.read_header(tmp_path / "spoiled"), expected()))


def test_matrices_of_a_dense_tensor_are_its_slices() -> None:
    whole = random(3, 4, 5, kept=1.0)
    each = list(matrices_of(encode("t", whole)))
    assert [one.name for one in each] == ["t.0", "t.1", "t.2"]
    assert all(same(one.decode(), part) for one, part in zip(each, whole, strict=True))
