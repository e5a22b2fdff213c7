"""Experts in the native engine in every form that a matrix has there: prompts, steps, batches, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import held, native, needs_native
from pico_hybrids import NEW, pico_hybrid
from products import seen
from torch import Tensor

from sparsessm import kernels
from sparsessm.checkpoint import packed
from sparsessm.checkpoint.coded import Coded, ans, fixed
from sparsessm.checkpoint.encoding import encode
from sparsessm.checkpoint.packed_tensor import PackedTensor
from sparsessm.checkpoint.stacked import Stacked, matrices_of, stacked
from sparsessm.kernels import entropy
from sparsessm.kernels.matrix import rounded
from sparsessm.runtime.base import Engine
from sparsessm.runtime.engine import NativeEngine
from sparsessm.runtime.mlp import Experts
from sparsessm.runtime.plan import Experts as Told
from sparsessm.runtime.reference_parts import CURVES, linear, routed

pytestmark = [needs_native, pytest.mark.skipif(not NEW, reason="hybrids need transformers 5")]
WIDE: dict[str, Any] = {"hidden_size": 72, "intermediate_size": 80, "moe_intermediate_size": 80}
MODELS: Mapping[str, dict[str, Any]] = {
    "jamba": {},
    "granitemoehybrid": {},
    "nemotron_h": {},
    "nemotron_h-latent": {"moe_latent_size": 68},
    "qwen3_5_moe_text": {},
    "qwen3_next": {},
}
FORMS = ("bitmask", "2:4", "int8", "sparse int8", "4 bits", "masked", "dial", "each another")


def model_of(name: str) -> Any:
    return pico_hybrid(name, **WIDE | MODELS[name])


def in_form(form: str, name: str, matrix: Tensor) -> PackedTensor:
    """A matrix near to what it was, or with half of its entries."""
    half = torch.where(matrix.abs() < matrix.abs().median(), 0.0, matrix)
    if form == "each another":
        return in_form(FORMS[int(name.rpartition(".")[2]) * 2 % 7], name, matrix)
    if form in ("bitmask", "sparse int8"):
        return encode(name, half, int8=form == "sparse int8", kind="bitmask")
    if form == "int8":
        return encode(name, matrix, int8=True, kind="dense")
    if form == "2:4":
        order = matrix.abs().unflatten(1, (-1, 4)).argsort(-1).argsort(-1)
        return encode(name, torch.where(order.flatten(1) < 2, 0.0, matrix), kind="2:4")
    if form == "dial":
        step = matrix.abs().max() / 20
        codes = (matrix / step).round()
        codes[0, 0] = 300  # beyond eight bits
        arrays = {part: torch.from_numpy(x) for part, x in entropy.encode(codes.short().numpy()).items()}
        rows = torch.full((len(matrix),), 2.0 ** float(step.log2().floor()))
        return ans(name, matrix.dtype, arrays, rows, torch.full((matrix.shape[1],), 1.25))
    width, masked = (3, True) if form == "masked" else (4, False)
    scale = matrix.abs().max() * 2.0 ** (1 - width)
    codes = (matrix / scale).round().clamp(-(1 << width - 1) + masked, (1 << width - 1) - 1).short()
    group = 64 if masked else matrix.shape[1]
    scales = scale.half().expand(len(matrix), -(-matrix.shape[1] // group))
    return fixed(name, matrix.dtype, codes, scales, width=width, group=group, masked=masked)


def tensors_of(model: Any, form: str) -> dict[str, PackedTensor]:
    """The model's tensors dense, those of experts in a form."""
    made: dict[str, PackedTensor] = dict(packed.of(held(model)).tensors)
    for name, tensor in made.items():
        if ".experts." in name:
            made[name] = stacked(name, tensor.decode(), lambda one, matrix: in_form(form, one, matrix))
            assert isinstance(made[name], Stacked)
    return made


def product(tensor: PackedTensor, x: Tensor, rows: slice) -> Tensor:
    """In float64, of some rows, with inputs as the kernels round them before they meet whole numbers."""
    weight = tensor.decode(torch.float32)[rows].double()
    if isinstance(tensor, Coded):
        if 0 < tensor.group < x.shape[1]:
            return rounded(x).double() @ weight.T
        columns = None if tensor.width else tensor.factors("columns")
        return seen(x, torch.from_numpy(tensor.codes())[rows], columns).double() @ weight.T
    return (x if tensor.scaled is False else rounded(x)).double() @ weight.T


def brute_force(told: Told, tensors: Mapping[str, PackedTensor], x: Tensor) -> Tensor:
    """Token by token and expert by expert, as the definition routes."""
    plain = {
        name: tensor.decode(torch.float32) for name, tensor in tensors.items() if ".experts." not in name
    }
    wide, down = (list(matrices_of(tensors[name])) for name in (told.wide, told.down))
    inner = x if told.before is None else linear(plain, told.before, x)
    favour = None if told.favour is None else plain[told.favour]
    out = torch.zeros_like(inner, dtype=torch.float64)
    for t, logits in enumerate(linear(plain, told.router, x)):
        for e, weight in routed(told, logits, favour):
            height = wide[e].shape[0] // (2 if told.gated else 1)
            parts = [slice(i * height, (i + 1) * height) for i in range(2 if told.gated else 1)]
            first, *up = (product(wide[e], inner[t : t + 1], rows).float() for rows in parts)
            met = CURVES[told.curve](first) * (up[0] if up else 1)
            out[t] += weight.double() * product(down[e], met, slice(None))[0]
    return out.float() if told.behind is None else linear(plain, told.behind, out.float())


def experts_of(engine: NativeEngine) -> list[tuple[Experts, Told]]:
    found = zip(engine._parts, engine._plan.parts, strict=True)
    return [
        (part, told.what) for part, told in found if isinstance(part, Experts) and isinstance(told.what, Told)
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_experts_of_every_form_give_what_their_matrices_say(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of many tokens, with experts that get one and experts that get many."""
    model = model_of(name)
    tensors = tensors_of(model, form)
    x = torch.randn(37, WIDE["hidden_size"], generator=torch.Generator().manual_seed(3))
    (part, told), *_ = experts_of(NativeEngine(model.config, tensors))
    expected = brute_force(told, tensors, x)
    # the rounding of what goes into down may fall otherwise by the last bit of a float
    bound = 2e-5 if form in ("bitmask", "2:4") else 4e-3
    for level in kernels.LEVELS[1:]:
        monkeypatch.setattr(kernels, "LEVEL", level)
        found = part.read(x, torch.empty(0))
        assert float((found - expected).norm() / expected.norm()) < bound, level
        alone = torch.cat([part.read(row[None], torch.empty(0)) for row in x])
        assert float((alone - found).norm() / found.norm()) < bound, level


def begun(engine: Engine, tokens: int, rows: int = 1) -> Tensor:
    return engine.keys.room(engine.new_state(rows), tokens)


def ids_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_prompt_and_a_row_of_a_batch_is_alone(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where several rows of a batch go to one expert."""
    model = model_of(name)
    engine, ids = NativeEngine(model.config, tensors_of(model, form)), ids_of(20)
    for level in kernels.LEVELS[1:]:
        monkeypatch.setattr(kernels, "LEVEL", level)
        together = engine.prompt(ids, begun(engine, 20)[0], every=True)
        states = begun(engine, 20)
        alone = torch.cat([engine.step(token[None], states) for token in ids])
        assert float((alone - together).norm() / together.norm()) < (
            2e-5 if form in ("bitmask", "2:4") else 0.05
        )
    if form in ("sparse int8", "each another"):
        states = begun(engine, 20, 9)
        rows = [states[i].clone() for i in range(9)]
        for turn in range(3):
            tokens = ids_of(9, turn)
            found = engine.step(tokens, states)
            for row, state in enumerate(rows):
                assert torch.equal(engine.step(tokens[row : row + 1], [state])[0], found[row])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_experts_take_less_memory_than_dense_ones(name: str, form: str) -> None:
    model = model_of(name)
    dense, engine = native(model), NativeEngine(model.config, tensors_of(model, form))
    assert isinstance(dense, NativeEngine)

    def held_by(one: NativeEngine) -> int:
        return sum(p.nbytes for part, _ in experts_of(one) for each in part._each for p in each.products())

    most = {"bitmask": 0.6, "2:4": 0.6, "int8": 0.4, "sparse int8": 0.35, "4 bits": 0.35, "masked": 0.35}
    assert held_by(engine) < most.get(form, 0.6) * held_by(dense)
    assert dense.resident - engine.resident == held_by(dense) - held_by(engine)
    assert engine.nbytes < dense.nbytes


def test_a_step_reads_the_chosen_experts_only() -> None:
    """Weights of experts that nobody chooses may be anything: the logits stay, bit by bit."""
    model = model_of("granitemoehybrid")
    tensors, ids = tensors_of(model, "sparse int8"), ids_of(1)
    for key in [key for key in tensors if key.endswith("router.weight")]:
        tensors[key] = encode(key, 0 * tensors[key].decode())  # of equals the first
    engine = NativeEngine(model.config, tensors)
    chosen = experts_of(engine)[0][1].chosen
    expected = engine.step(ids, begun(engine, 1))
    for key, tensor in tensors.items():
        if isinstance(tensor, Stacked):
            others = (
                encode(one.name, torch.full(one.shape, 1e30), int8=True) for one in tensor.each[chosen:]
            )
            tensors[key] = replace(tensor, each=(*tensor.each[:chosen], *others))
    engine = NativeEngine(model.config, tensors)
    assert torch.equal(engine.step(ids, begun(engine, 1)), expected)
