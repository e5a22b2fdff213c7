"""The golden packed files, a model of one layer by a formula, and what tests of packed files share.

`python tests/golden_files.py` writes the golden files anew; only a new version of the format may change them.
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from nested_bitmaps import nested
from pico import pico_mamba, pico_tokenizer
from safetensors.torch import save_file
from torch import Tensor

from sparsessm import checkpoint
from sparsessm.checkpoint import PackedTensor, container, packed_file
from sparsessm.checkpoint.coded import ans, fixed
from sparsessm.checkpoint.encoding import bits_of, encode
from sparsessm.checkpoint.stacked import stacked
from sparsessm.kernels import entropy

HERE = Path(__file__).parent
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


def streams(codes: Tensor) -> dict[str, Tensor]:
    """Codes, entropy coded."""
    arrays = entropy.encode(codes.short().numpy())
    return {part: torch.from_numpy(array) for part, array in arrays.items()}


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


def changed(array: Tensor | None, at: Any, value: float) -> Tensor:
    assert array is not None
    array = array.clone()
    array[at] = value
    return array


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


def golden_coded(version: str) -> dict[str, PackedTensor]:
    """The same model, its four matrices on grids of every kind; in version 2 every form of a row is there, in
    version 4 the 16 matrices (1, 4) of the convolution have a form each."""
    tensors = {name: encode(name, tensor) for name, tensor in golden_tensors().items()}
    found: dict[str, PackedTensor] = {**tensors}

    def codes(name: str, most: int) -> Tensor:
        rows, columns = tensors[name].shape
        return (torch.arange(rows * columns) * 37 % (2 * most + 1) - most).view(rows, columns)

    def scales(*shape: int) -> Tensor:
        return (torch.arange(math.prod(shape)) % 5 + 1).view(shape).half() / 64

    def put(name: str, codes: Tensor, group: int, width: int, masked: bool) -> None:
        by_group = scales(len(codes), -(-codes.shape[1] // group))
        how: dict[str, Any] = {"width": width, "group": group, "masked": masked}
        found[name] = fixed(name, tensors[name].dtype, codes, by_group, **how)

    put(IN, codes(IN, 4), 3, 3, True)
    put(DT, 2 * codes(DT, 7) + 1, 2, 4, False)
    put(OUT, codes(OUT, 8).clamp(max=7), 16, 4, False)
    wide = codes(X, 40) * (torch.arange(9)[:, None] % 4 > 0)
    wide[1::4] %= 3
    forms = torch.tensor([0, 1, 2, 5, 0, 2, 9, 3, 2])
    if version == "2":
        found[X] = nested(X, tensors[X].dtype, wide, scales(9), scales(16), forms)
    else:
        found[X] = ans(X, tensors[X].dtype, streams(wide), scales(9), scales(16))
    if version == "4":
        found[CONV] = golden_stack(golden_tensors()[CONV])
    return found


def golden_stack(whole: Tensor) -> PackedTensor:
    """(16, 1, 4) as matrices of every kind."""
    some = torch.tensor([[3, 0, -2, 1]])
    factors = torch.full((1,), 1 / 8).half(), torch.full((4,), 1 / 8).half()
    half = torch.where(some != 0, whole, 0.0)

    def fixed_form(name: str, codes: Tensor, masked: bool) -> PackedTensor:
        scales = torch.full((1, 2), 1 / 32, dtype=torch.float16)
        return fixed(name, whole.dtype, codes, scales, width=3, group=2, masked=masked)

    def one(name: str, matrix: Tensor) -> PackedTensor:
        number = int(name.rpartition(".")[2])
        forms = (
            lambda: encode(name, matrix, kind="dense"),
            lambda: encode(name, half[number], kind="bitmask"),
            lambda: encode(name, half[number], kind="3:4"),
            lambda: encode(name, matrix, int8=True),
            lambda: fixed_form(name, some, True),
            lambda: fixed_form(name, 2 * some + 1, False),
            lambda: fixed_form(name, some - 1, False),
            lambda: ans(name, whole.dtype, streams(some * number), *factors),
        )
        return forms[number % len(forms)]()

    return stacked(CONV, whole, one)


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
    for name, version in CODED.items():
        (GOLDEN / name).mkdir(exist_ok=True)
        (GOLDEN / name / "config.json").write_text(config + "\n")
        packed_file.write(GOLDEN / name / container.PACKED, "transformers", golden_coded(version))


GOLDENS: dict[str, dict[str, str]] = {"lossless": {}, "int8": {"dtype": "int8", "head": "int8"}}
CODED = {"coded": "2", "ans": "3", "stack": "4"}
"""Of a later version."""
LABELS = {IN: "2:4", X: "bitmask", OUT: "1:4", A: "bitmask", DT: "dense", CONV: "dense", EMBEDDING: "dense"}


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


@cache
def expected() -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in golden_tensors().items()}


if __name__ == "__main__":
    write_golden()
