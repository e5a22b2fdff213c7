"""The engines on Mamba-2, FalconMamba and shapes that structured pruning leaves, against the stock models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import Make, assert_rows_are_alone, both, held, native, needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from mamba2_cases import CASES, MAMBA2, PACKED, SHELVED, encoded, made, mixers, near, stock, thin, tokens
from pico import pico_falcon_mamba, pico_mamba, pico_mamba2, pico_tokenizer
from torch import Tensor

from sparsessm import architectures, kernels, runtime
from sparsessm.checkpoint import packed
from sparsessm.evaluation.speed import Subject, measure, storage
from sparsessm.kernels.matrix import Decoder
from sparsessm.runtime import base
from sparsessm.runtime.base import described
from sparsessm.runtime.causal_lm import causal_lm
from sparsessm.runtime.engine import NativeEngine
from sparsessm.runtime.reference import SLAB, ReferenceEngine, expected_shapes
from sparsessm.runtime.state import State


def stepped(engine: Any, ids: Tensor, state: Tensor) -> Tensor:
    return torch.cat([engine.step(token[None], state) for token in ids])


@both
@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_stock_models(make: Make, case: str) -> None:
    model, ids = made(case), tokens(150)
    engine, expected = make(model), stock(model, ids)
    read, state = engine.new_state(1), engine.new_state(1)
    assert near(engine.prompt(ids, read[0], every=True), expected)
    rows = stepped(engine, ids, state)
    assert near(rows, expected) and torch.equal(rows.argmax(1), expected.argmax(1))
    assert near(state, read)


@needs_native
@pytest.mark.parametrize("case", CASES)
def test_levels_agree_and_threads_change_no_bit(case: str) -> None:
    model, ids = made(case), tokens(16)
    expected = stock(model, ids)
    for level in kernels.LEVELS[1:]:
        kernels.LEVEL = level
        engine = encoded(model, threads=1)
        state = engine.new_state(1)
        alone = stepped(engine, ids, state)
        assert near(alone, expected), level
        for threads in (2, 3, 5):
            engine._threads = threads
            other = engine.new_state(1)
            assert torch.equal(stepped(engine, ids, other), alone), (level, threads)
            assert torch.equal(other, state)


@needs_native
@pytest.mark.parametrize("level", kernels.LEVELS[1:])
@pytest.mark.parametrize("dtype", [None, "bf16", "int8"])
def test_a_sequence_is_bit_for_bit_what_it_is_alone(level: str, dtype: str | None, shelf: Path) -> None:
    kernels.LEVEL = level
    for name in ("odd sizes", "heads of 48 channels", "falcon, biases, thin"):
        engine = runtime.load(shelf / f"{name}, {dtype}").engine
        assert isinstance(engine, NativeEngine)
        assert_rows_are_alone(
            engine, lambda n, seed: tokens(n, seed=seed), 7, lambda n, e=engine: setattr(e, "_threads", n)
        )


@both
@pytest.mark.parametrize("case", ["odd sizes", "two taps", "heads without memory", "falcon"])
def test_a_prompt_longer_than_a_slab(make: Make, case: str) -> None:
    model, ids = made(case), tokens(SLAB + 30)
    engine, expected = make(model), stock(model, ids)
    state = engine.new_state(1)[0]
    assert near(engine.prompt(ids, state), expected[-1])
    assert near(engine.prompt(ids[:SLAB], engine.new_state(1)[0]), expected[SLAB - 1])


@needs_native
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_prompt_cut_anywhere_is_the_whole(data: st.DataObject) -> None:
    model = made(data.draw(st.sampled_from(["odd sizes", "two taps", "heads without memory", "falcon"])))
    engine, ids = native(model), tokens(data.draw(st.integers(2, 60)))
    state, other, at, last = engine.new_state(1)[0], engine.new_state(1), 0, torch.empty(0)
    whole = engine.prompt(ids, state)
    while at < len(ids):
        size = data.draw(st.integers(1, len(ids) - at))
        if size == 1 and data.draw(st.booleans()):
            last = engine.step(ids[at : at + 1], other)[0]
        else:
            last = engine.prompt(ids[at : at + size], other[0])
        at += size
    assert near(last, whole) and near(other[0], state)


@needs_native
@pytest.mark.parametrize("case", MAMBA2)
def test_a_state_is_as_large_as_what_is_kept(case: str) -> None:
    model, expected = made(case), 0
    c = model.config
    for mixer in mixers(model):
        kept = int((mixer.A_log < 38).sum())
        mixed = c.num_heads * c.head_dim + 2 * c.n_groups * c.state_size
        expected += (c.conv_kernel - 1) * mixed + kept * c.head_dim * c.state_size
    engine = native(model)
    assert engine.state_size == expected and engine.new_state(3).shape == (3, expected)
    for mixer in mixers(model):  # beyond 38 nothing is forgotten more
        mixer.A_log.data[mixer.A_log >= 38] = 50.0
    assert native(model).state_size == expected


@needs_native
def test_bytes_are_those_of_the_weights() -> None:
    model = pico_mamba2(n_groups=1)
    layers = sum(parameter.nbytes for parameter in model.backbone.layers.parameters())
    head = model.lm_head.weight.nbytes
    engine, own = native(model), native(pico_mamba2(n_groups=1, tie_word_embeddings=True))
    assert engine.nbytes == own.nbytes == layers + head
    assert engine.resident == own.resident + head >= engine.nbytes + head
    with torch.no_grad():
        thin(model)
    thinner = runtime.engine_of(model.config, packed_tensors(model), None)
    assert engine.nbytes - thinner.nbytes > 0.25 * layers  # a bit and half of 32 of each weight


def packed_tensors(model: Any) -> Any:
    """As `pack` encodes."""
    from sparsessm.checkpoint.encoding import encode

    return {name: encode(name, tensor) for name, tensor in model.state_dict().items()}


@needs_native
def test_a_state_that_is_no_number_stays_in_its_sequence() -> None:
    engine = native(pico_mamba2())
    state = engine.new_state(2)
    state[0] = float("nan")
    logits = engine.step(torch.tensor([1, 1]), state)
    assert not torch.isfinite(logits[0]).any() and torch.isfinite(logits[1]).all()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some models as stock directories, and packed in every precision."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in SHELVED:
        model = made(name)
        model.save_pretrained(folder / name)
        pico_tokenizer().save_pretrained(folder / name)
        for dtype, options in PACKED.items():
            packed.pack(folder / name, folder / f"{name}, {dtype}", **options)
    return folder


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("name", SHELVED)
def test_a_packed_model_is_the_definition_on_its_weights(
    shelf: Path, name: str, dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, ids = packed.read(shelf / f"{name}, {dtype}"), tokens(60)
    kinds = {tensor.kind for key, tensor in found.tensors.items() if key.endswith("in_proj.weight")}
    assert kinds == ({"bitmask"} if thin in CASES[name][2] else {"dense"})
    model = runtime.load(shelf / f"{name}, {dtype}")
    weights = {key: tensor.decode(torch.float32) for key, tensor in found.tensors.items()}
    truth = ReferenceEngine(model.config, weights)
    expected = truth.prompt(ids, truth.new_state(1)[0], every=True)
    state = model.engine.new_state(1)
    rows, read = stepped(model.engine, ids, state), model.logits(ids)
    # what int8 weights meet is rounded to 8 bits too, in steps and prompts alike; not by the definition
    rounded = dtype == "int8" and isinstance(model.engine, NativeEngine)
    if rounded:  # a number between two steps of 1/127 may go either way, so single logits differ, few do
        assert near(rows, expected, 0.08) and float((rows - read).abs().mean() / expected.abs().max()) < 1e-3
    else:
        assert near(rows, expected) and near(rows, read)
    if dtype is None:
        assert near(rows, stock(made(name), ids))
        assert near(runtime.load(shelf / name).logits(ids), expected)
    monkeypatch.setattr(kernels, "NATIVE", False)
    slow = runtime.load(shelf / f"{name}, {dtype}")
    assert isinstance(slow.engine, ReferenceEngine) and near(slow.logits(ids), expected)


@pytest.mark.parametrize("case", ["odd sizes", "bounded step sizes", "falcon", "mamba, 50 channels"])
def test_a_state_is_kept_forked_and_saved(case: str, tmp_path: Path) -> None:
    model = runtime.of(held(made(case)))
    whole = model.generate(tokens(9), 30, ignore_eos=True)
    part = model.generate(tokens(9), 12, ignore_eos=True)
    fork = part.state.fork()
    part.state.save(tmp_path / "state")
    before = part.state.array.clone()
    for state in (part.state, fork, State.load(tmp_path / "state")):
        assert part.ids + model.generate([], 18, state=state, ignore_eos=True).ids == whole.ids
    assert torch.equal(part.state.array, before)
    other = runtime.of(held(pico_mamba2(state_size=9)))
    with pytest.raises(ValueError, match="belongs to another model"):
        other.generate([1], 1, state=part.state)


@pytest.mark.parametrize("case", ["odd sizes", "one group", "falcon"])
def test_texts_are_those_of_transformers(case: str) -> None:
    model = made(case)
    ready, ids = runtime.of(held(model)), tokens(9)
    options: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    with torch.inference_mode():
        expected = model.generate(ids[None], **options)[0, len(ids) :].tolist()
        wrapped = causal_lm(ready).generate(ids[None], **options)  # pyright: ignore
    assert wrapped[0, len(ids) :].tolist() == expected
    fed = ids
    for _ in range(20):
        fed = torch.cat([fed, stock(model, fed)[-1:].argmax(1)])
    assert ready.generate(ids, 20, ignore_eos=True).ids == fed[len(ids) :].tolist()
    many = ready.generate([ids.tolist(), [5], ids[:4].tolist()], 20)
    for prompt, found in zip(([5], ids[:4].tolist()), many[1:], strict=True):
        alone = ready.generate(prompt, 20)
        assert found.ids == alone.ids and torch.equal(found.state.array, alone.state.array)


def test_measuring_says_what_a_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsessm.evaluation import timing

    monkeypatch.setattr(timing, "SEGMENT", 1e-4)
    monkeypatch.setattr(timing, "BUFFER", 2**20)
    subjects = []
    for name, model in (("two", pico_mamba2()), ("one", pico_mamba())):
        ready = runtime.of(held(model))
        stored = storage(packed.of(held(model)).tensors)
        subjects.append(Subject(name, ready.engine, ready.config, False, stored))
    found = measure(*subjects, prompt=8, rounds=3, batches=(1, 2))
    record = json.loads(json.dumps(found.record(), allow_nan=False))  # strict JSON has no infinite bound
    two, one = (each["architecture"] for each in record["models"])
    assert two["time_step_limit"] == [0.0, None] and two["num_heads"] == 4 and "num_heads" not in one
    (line,) = (note for note in found.notes if note.startswith("The architectures differ"))
    assert "n_groups 2 and None" in line and "intermediate_size None and 32" in line


@both
def test_a_layout_is_of_one_model(make: Make) -> None:
    first = make(pico_mamba2()).layout
    assert (
        first == make(pico_mamba2()).layout == make(pico_mamba2(time_step_limit=[0.0, float("inf")])).layout
    )
    # weights and their shapes are the same: it is the configuration that tells these apart
    others = [
        make(pico_mamba2(n_groups=1)),
        make(pico_mamba2(time_step_limit=(0.0, 5.0))),
        make(pico_falcon_mamba()),
        make(pico_falcon_mamba(mixer_rms_eps=1e-3)),
        make(pico_mamba()),
    ]
    assert len({first, *(engine.layout for engine in others)}) == 6


def test_the_shapes_are_those_of_the_stock_model() -> None:
    for case in CASES:
        model = made(case)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        assert shapes == expected_shapes(model.config)


def test_what_does_not_run_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "FIELDS", {kind: base.FIELDS[kind] for kind in ("mamba", "bamba")})
    config = SimpleNamespace(model_type="mamba2", hidden_act="silu")
    words = "the runtime does not run model type 'mamba2'; supported: bamba, mamba"
    with pytest.raises(ValueError, match=words):
        runtime.engine_of(config, {}, None)
    with pytest.raises(ValueError, match=words):
        ReferenceEngine(config, {})
    with monkeypatch.context() as refused, pytest.raises(ValueError, match=words):
        refused.setattr(packed, "of", None)  # before any weight is encoded
        runtime.of(held(pico_mamba2()))
    (tmp_path / "config.json").write_text('{"model_type": "mamba2"}')  # and before any is read
    with monkeypatch.context() as refused, pytest.raises(ValueError, match=words):
        refused.setattr(architectures, "MODEL_TYPES", dict(architectures.MODEL_TYPES) | {"mamba2": None})
        runtime.load(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="hidden_act is 'gelu'"):
        native_or_reference(pico_mamba2(hidden_act="gelu"))


def native_or_reference(model: Any) -> Any:
    return runtime.engine_of(model.config, packed.of(held(model)).tensors, None)


@needs_native
def test_heads_that_do_not_fit_are_refused() -> None:
    engine: Any = native(pico_mamba2())
    layer, rest = (
        engine._parts[0],
        {"norm": engine._norm, "embedding": engine._embedding, "head": engine._head},
    )
    sizes = {"width": 16, "states": 8, "taps": 4, "vocabulary": 64, "epsilon": 1e-5}
    sizes |= {"channels": 32, "heads": 4, "groups": 2, "least": 0.0, "most": 1.0}
    assert Decoder(sizes, [layer.native()], rest).state_size == layer.state_size
    wrong: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"heads": 3}, {}, "the same number for every head"),
        ({"groups": 3}, {}, "for every group"),
        ({"states": 9}, {}, "in_x is"),
        ({"groups": 0}, {}, "groups is out of range"),
        ({}, {"keeps": torch.ones(3, dtype=torch.uint8)}, "keeps does not have one entry a head"),
        ({}, {"A": torch.ones(4)}, "A has 4 values, expected 16"),
        ({}, {"gated_norm": torch.ones(31)}, "gated_norm has 31 values"),
        ({}, {"in_dt": layer.in_x}, "in_dt is"),
    ]
    for other_sizes, fields, words in wrong:
        with pytest.raises(ValueError, match=words):
            Decoder(sizes | other_sizes, [layer.native() | fields], rest)
    missing = layer.native()
    del missing["keeps"]
    with pytest.raises(ValueError, match="keeps is missing"):
        Decoder(sizes, [missing], rest)


def test_a_description_is_the_configurations() -> None:
    found = described(pico_mamba2(time_step_limit=(0.5, 2.0)).config)
    assert found["time_step_limit"] == [0.5, 2.0] and found["head_dim"] == 8
