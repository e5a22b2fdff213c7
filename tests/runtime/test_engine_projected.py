"""The engines on models with projected states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import Make, assert_rows_are_alone, both, held, native, needs_native, reference, stepped
from lively import stock
from pico import pico_mamba2
from projections import B1, C1, FORGETS, cases, ids_of, made, with_projections
from stock import difference

from sparsessm import kernels, runtime
from sparsessm.architectures import projected
from sparsessm.checkpoint import packed
from sparsessm.runtime.engine import NativeEngine
from sparsessm.runtime.reference import SLAB, ReferenceEngine, expected_shapes
from sparsessm.runtime.state import State

pytestmark = pytest.mark.usefixtures("here")


@both
@cases
def test_engines_are_the_model_in_memory(make: Make, case: str) -> None:
    model, ids = made(case), ids_of(70)
    want, engine = stock(model, ids[None])[0], make(model)
    read, state = engine.new_state(1), engine.new_state(1)
    assert difference(engine.prompt(ids, read[0], every=True), want) <= 2e-5
    assert difference(stepped(engine, ids, state), want) <= 2e-5
    assert state.numel() == 0 or float((state - read).abs().max()) <= 2e-5 * float(read.abs().max())
    mixed, other = engine.new_state(1), ids_of(9, seed=1)
    engine.prompt(ids[:40], mixed[0])  # from prompts to steps and back
    assert difference(stepped(engine, ids[40:50], mixed), want[40:50]) <= 2e-5
    assert difference(engine.prompt(ids[50:], mixed[0]), want[-1]) <= 2e-5
    assert difference(engine.prompt(other, engine.new_state(1)[0]), stock(model, other[None])[0, -1]) <= 2e-5


@both
def test_a_prompt_longer_than_a_slab(make: Make) -> None:
    model, ids = made(FORGETS), ids_of(SLAB + 20)
    assert (
        difference(
            (engine := make(model)).prompt(ids, engine.new_state(1)[0]), stock(model, ids[None])[0, -1]
        )
        <= 2e-5
    )


@needs_native
@cases
def test_levels_agree_and_threads_change_no_bit(case: str) -> None:
    model, ids = made(case), ids_of(16)
    want = stock(model, ids[None])[0]
    tensors = packed.of(held(model)).tensors
    for level in kernels.LEVELS[1:]:
        kernels.LEVEL = level
        engine = NativeEngine(model.config, tensors, threads=1)
        state = engine.new_state(1)
        alone = stepped(engine, ids, state)
        assert difference(alone, want) <= 2e-5, level
        engine = NativeEngine(model.config, tensors, threads=2)
        other = engine.new_state(1)
        assert torch.equal(stepped(engine, ids, other), alone) and torch.equal(other, state), level


@both
@pytest.mark.parametrize("case", [FORGETS, "odd sizes, biases", "heads of 48 channels, 17 and 16"])
def test_a_sequence_is_bit_for_bit_what_it_is_alone(make: Make, case: str) -> None:
    engine = make(made(case))
    most = 2 if make is native else 1  # a BLAS's sums may depend on them
    assert_rows_are_alone(
        engine, lambda n, seed: ids_of(n, seed=seed), 5, lambda n: torch.set_num_threads(min(n, most))
    )


@both
@cases
def test_a_state_is_smaller_by_the_directions_that_went(make: Make, case: str) -> None:
    model = made(case)
    c, expected = model.config, 0
    directions = projected.directions_of(model)
    for index, layer in enumerate(model.backbone.layers):
        # only the native engine leaves out heads without memory
        kept = c.num_heads if make is reference else int((layer.mixer.A_log < 38).sum())
        convolution = (c.conv_kernel - 1) * (c.num_heads * c.head_dim + 2 * c.n_groups * c.state_size)
        expected += convolution + kept * c.head_dim * directions.get(index, c.state_size)
    engine = make(model)
    assert engine.state_size == expected and engine.new_state(3).shape == (3, expected)


@both
def test_a_layout_is_of_one_projected_model(make: Make) -> None:
    fields, r = {"state_size": 6}, {0: 3, 1: 3}
    models = [
        pico_mamba2(**fields),
        with_projections(pico_mamba2(**fields), r),
        with_projections(pico_mamba2(**fields), r, seed=1),
        with_projections(pico_mamba2(**fields), {0: 3}),
        with_projections(pico_mamba2(**fields), {0: 3, 1: 2}),
    ]
    layouts = [make(model).layout for model in models]
    assert len(set(layouts)) == 5
    assert make(with_projections(pico_mamba2(**fields), r)).layout == layouts[1]
    first, other = (runtime.of(held(model)) for model in models[:2])
    part = other.generate([1, 2], 2, ignore_eos=True)
    with pytest.raises(ValueError, match="belongs to another model"):
        first.generate([1], 1, state=part.state)


@both
def test_weights_that_the_engine_holds_count_the_projections(make: Make) -> None:
    dense, model = pico_mamba2(), with_projections(pico_mamba2(), {0: 3, 1: 5})
    more = sum(getattr(layer.mixer, name).nbytes for layer in model.backbone.layers
               for name in projected.MATRICES)  # fmt: skip
    assert make(model).nbytes - make(dense).nbytes == more


@cases
def test_shapes_are_those_of_the_model(case: str) -> None:
    model = made(case)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert expected_shapes(model.config, projected.directions_of(model)) == shapes
    assert projected.directions_in(shapes, model.config) == projected.directions_of(model)
    assert sorted(projected.named_in(shapes)) == [n for n in sorted(shapes) if n.endswith("_projection")]


@pytest.mark.parametrize("name", [B1, C1])
def test_one_projection_without_the_other_is_refused_by_the_definition(name: str) -> None:
    model = made("two groups, 3 and 5 of 8")
    weights = {key: tensor for key, tensor in model.state_dict().items() if key != name}
    with pytest.raises(ValueError, match=f"have no {name}"):
        ReferenceEngine(model.config, weights)


@pytest.mark.parametrize("shape", [(2, 7, 8), (2, 3, 7), (1, 3, 8), (2, 3, 8, 1)])
def test_a_projection_of_another_shape_is_refused_by_the_definition(shape: tuple[int, ...]) -> None:
    model = made("two groups, 3 and 5 of 8")
    with pytest.raises(ValueError, match=rf"{B1} has shape"):
        ReferenceEngine(model.config, model.state_dict() | {B1: torch.ones(shape)})


@pytest.mark.parametrize("shape", [(2, 9, 8), (5, 8), (2, 0, 8)])
def test_a_pair_of_another_shape_is_refused_by_the_definition(shape: tuple[int, ...]) -> None:
    model = made("two groups, 3 and 5 of 8")
    pair = {name: torch.ones(shape) for name in (B1, C1)}
    with pytest.raises(ValueError, match="_projection"):
        ReferenceEngine(model.config, model.state_dict() | pair)


@needs_native
@pytest.mark.parametrize("directions", [0, 9, -1])
def test_directions_that_there_cannot_be_are_refused_by_the_decoder(directions: int) -> None:
    from sparsessm.kernels.matrix import Decoder

    model = made("two groups, 3 and 5 of 8")
    engine: Any = native(model)
    layers = [layer.native() for layer in engine._parts]
    sizes = {"width": 16, "states": 8, "taps": 4, "vocabulary": 64, "epsilon": 1e-5}
    sizes |= type(engine._parts[0]).sizes(model.config)
    rest = {"norm": engine._norm, "embedding": engine._embedding, "head": engine._head}
    Decoder(sizes, layers, rest)
    with pytest.raises(ValueError, match="directions must be between 1 and the number of states"):
        Decoder(sizes, [layers[0] | {"directions": directions}, layers[1]], rest)
    short = {"B_projection": layers[0]["B_projection"][:-1]}
    with pytest.raises(ValueError, match="B_projection"):
        Decoder(sizes, [layers[0] | short, layers[1]], rest)


def test_a_text_is_what_the_model_in_memory_goes_on_with() -> None:
    model = made("33 and 15 of 40")
    ids = fed = ids_of(9)
    for _ in range(12):
        fed = torch.cat([fed, stock(model, fed[None])[0, -1:].argmax(1)])
    ready = runtime.of(held(model))
    assert ready.generate(ids, 12, ignore_eos=True).ids == fed[9:].tolist()
    part = ready.generate(ids, 5, ignore_eos=True)
    part.state.save("state")
    fork = State.load("state")
    assert part.ids + ready.generate([], 7, state=fork, ignore_eos=True).ids == fed[9:].tolist()
