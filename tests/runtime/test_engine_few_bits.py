"""Engines of codes of few bits against the definition with the same inputs; and how small they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_rows_are_alone, held, needs_native, stepped
from pico import pico_mamba, pico_mamba2
from products import seen
from torch import Tensor

import sparsessm
from sparsessm import kernels, runtime
from sparsessm.checkpoint.coded import Coded, ans, fixed
from sparsessm.checkpoint.encoding import encode
from sparsessm.checkpoint.packed_tensor import PackedTensor
from sparsessm.kernels import entropy
from sparsessm.kernels.matrix import rounded
from sparsessm.runtime.engine import NativeEngine
from sparsessm.runtime.plan import Mamba
from sparsessm.runtime.reference import ReferenceEngine

pytestmark = needs_native
MODELS: dict[str, Any] = {
    "mamba": lambda: pico_mamba(hidden_size=72, intermediate_size=144, time_step_rank=65),
    "mamba, untied": lambda: pico_mamba(hidden_size=80, intermediate_size=96, tie_word_embeddings=False),
    "mamba2": lambda: pico_mamba2(hidden_size=72, num_heads=9, head_dim=16, n_groups=3),
}
RESCALED = 2.0**-4


GRIDS = {
    "dial": (0, 0, False),
    "4 bits": (4, 10**4, False),
    "masked": (3, 32, True),
    "groups": (5, 64, False),
}
"""Bits of a code, columns of a scale, whether zeros are masked."""


def few_bits(model: Any, grid: str = "dial") -> dict[str, PackedTensor]:
    """All matrices as codes near to what they were."""
    width, group, masked = GRIDS[grid]
    made: dict[str, PackedTensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if tensor.ndim != 2 or name.endswith("A_log"):
            made[name] = encode(name, tensor)
        elif width:
            scale = tensor.abs().max() * 2.0 ** (1 - width)
            codes = (tensor / scale).round().clamp(-(1 << width - 1) + masked, (1 << width - 1) - 1).short()
            scales = scale.half().expand(len(tensor), -(-tensor.shape[1] // group))
            made[name] = fixed(name, tensor.dtype, codes, scales, width=width, group=group, masked=masked)
        else:
            rows, columns = (torch.full((size,), RESCALED) for size in tensor.shape)
            codes = (tensor / RESCALED**2).round()
            codes[0, 0], codes[-1, -1] = 300, -200  # beyond eight bits
            arrays = entropy.encode(codes.short().numpy())
            made[name] = ans(
                name, tensor.dtype, {k: torch.from_numpy(v) for k, v in arrays.items()}, rows, columns
            )
    return made


class Rounding(ReferenceEngine):
    """The definition, where what meets codes is rounded as our kernels do."""

    def __init__(self, config: Any, tensors: dict[str, PackedTensor]) -> None:
        super().__init__(config, {name: tensor.decode(torch.float32) for name, tensor in tensors.items()})
        self._tensors = tensors

    def _product(self, name: str, x: Tensor, parts: list[int]) -> Tensor:
        found = self._tensors[name]
        assert isinstance(found, Coded)
        codes, weights = torch.from_numpy(found.codes()), found.decode(torch.float32)
        if 0 < found.group < x.shape[1]:  # a scale for some columns: none of them is moved
            return rounded(x) @ weights.T
        columns = None if found.width else found.factors("columns")
        pairs = zip(codes.split(parts), weights.split(parts), strict=True)
        return torch.cat([seen(x, some, columns) @ weight.T for some, weight in pairs], dim=-1)

    def _linear(self, mixer: Mamba, name: str, x: Tensor) -> Tensor:
        prefix = f"{mixer.name}.{name}"
        rows, parts = self._tensors[f"{prefix}.weight"].shape[0], []
        if name == "in_proj" and mixer.dual:  # gate, convolution, step sizes
            inner, steps = mixer.config.num_heads * mixer.config.head_dim, mixer.config.num_heads
            parts = [inner, rows - inner - steps, steps]
        elif name == "in_proj":
            parts = [rows // 2, rows // 2]
        out = self._product(f"{prefix}.weight", x, parts or [rows])
        bias = self._weights.get(f"{prefix}.bias")
        return out if bias is None else out + bias

    def _logits(self, hidden: Tensor) -> Tensor:
        tied = "lm_head.weight" not in self._tensors
        name = "backbone.embeddings.weight" if tied else "lm_head.weight"
        normed = self._named(hidden, "backbone.norm_f.weight")
        return self._product(name, normed, [self._tensors[name].shape[0]])


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("case", MODELS)
def test_codes_are_read_as_what_they_say(case: str, grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[case]()
    tensors, ids = few_bits(model, grid), tokens(40)
    truth = Rounding(model.config, tensors)
    expected = truth.prompt(ids, truth.new_state(1)[0], every=True)
    plain = ReferenceEngine(
        model.config, {name: part.decode(torch.float32) for name, part in tensors.items()}
    )
    unrounded = plain.prompt(ids, plain.new_state(1)[0], every=True)
    engine: Any = None
    for level in kernels.LEVELS[1:]:
        monkeypatch.setattr(kernels, "LEVEL", level)
        engine = NativeEngine(model.config, tensors, 2)
        state, read = engine.new_state(1), engine.new_state(1)
        rows, told = stepped(engine, ids, state), engine.prompt(ids, read[0], every=True)
        off = float((unrounded - expected).norm())
        for found in (
            rows,
            told,
        ):  # few inputs lie so that the last bit of a sum decides how they are rounded
            assert float((found - expected).norm()) < 0.8 * off and off < 0.1 * float(expected.norm()), level
    assert_rows_are_alone(engine, lambda n, seed: tokens(n, seed), 3, torch.set_num_threads)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("case", MODELS)
def test_memory_is_that_of_few_bits(case: str, grid: str) -> None:
    model = MODELS[case]()
    tensors = few_bits(model, grid)
    few = NativeEngine(model.config, tensors)
    dense = NativeEngine(model.config, {name: encode(name, part.decode()) for name, part in tensors.items()})
    assert few.resident < 0.6 * dense.resident and few.nbytes < 0.6 * dense.nbytes


def test_a_pruned_directory_runs_as_it_was_measured(here: Path) -> None:
    checkpoint = held(MODELS["mamba2"]())
    report = sparsessm.prune(checkpoint, bits=3.25, data="text.txt", samples=2, length=32, measure=False)
    sparsessm.save(checkpoint, "out", report)
    model, ids = runtime.load("out"), tokens(48)
    with torch.no_grad():
        stock = checkpoint.model(ids[None]).logits[0]
    assert float((model.logits(ids.tolist()) - stock).norm() / stock.norm()) < 0.05
    assert model.engine.resident < 0.75 * runtime.of(checkpoint).engine.resident
