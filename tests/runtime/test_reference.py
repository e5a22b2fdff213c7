"""The definition of the runtime against the stock model, and the rules that every engine has to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Make, both
from pico import pico_mamba, pico_tokenizer
from torch import Tensor

from sparsessm import kernels, runtime
from sparsessm.checkpoint import packed
from sparsessm.runtime.base import fingerprint
from sparsessm.runtime.reference import SLAB, ReferenceEngine, expected_shapes

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases, untied": {"use_bias": True, "tie_word_embeddings": False},
    "no bias of the convolution": {"use_conv_bias": False},
    "two taps": {"conv_kernel": 2},
    "one tap": {"conv_kernel": 1},
    "ranks": {"time_step_rank": 3, "state_size": 5, "num_hidden_layers": 3, "layer_norm_epsilon": 1e-3},
}


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (count,), generator=torch.Generator().manual_seed(seed))


def stock(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids[None]).logits[0]


def near(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max() / expected.abs().max()) < 1e-4


@both
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_logits_of_a_long_text_are_the_stock_models(make: Make, fields: dict[str, Any]) -> None:
    model = pico_mamba(**fields)
    ids = tokens(400)
    expected, engine = stock(model, ids), make(model)
    state, stepped = engine.new_state(1), engine.new_state(1)
    every = engine.prompt(ids, state[0], every=True)
    assert every.dtype == torch.float32 and every.shape == (400, 64)
    assert near(every, expected)
    rows = torch.cat([engine.step(token[None], stepped) for token in ids])
    assert near(rows, expected)
    assert torch.equal(rows.argmax(-1), expected.argmax(-1))
    assert near(stepped, state)


@both
def test_a_prompt_longer_than_a_slab_and_one_cut_anywhere(make: Make) -> None:
    model = pico_mamba()
    engine, ids = make(model), tokens(SLAB + 90)
    expected = stock(model, ids)
    for cut in (0, 1, 2, 300, SLAB, SLAB + 89):
        state = engine.new_state(1)[0]
        if cut:
            assert near(engine.prompt(ids[:cut], state), expected[cut - 1])
        last = engine.prompt(ids[cut:], state)
        assert last.shape == (64,)
        assert near(last, expected[-1])


@both
def test_a_row_of_a_step_is_bit_for_bit_what_it_is_alone(make: Make) -> None:
    engine = make(pico_mamba())
    states = engine.new_state(7)
    assert states.shape == (7, engine.state_size) and states.dtype == torch.float32 and not states.any()
    for i in range(7):
        engine.prompt(tokens(5 + i, seed=i), states[i])
    alone = [states[i : i + 1].clone() for i in range(7)]
    for turn in range(4):
        ids = tokens(7, seed=turn)
        together = engine.step(ids, states)
        for i in range(7):
            assert torch.equal(engine.step(ids[i : i + 1], alone[i])[0], together[i])
            assert torch.equal(alone[i][0], states[i])


@both
def test_a_layout_is_of_one_model(make: Make) -> None:
    first = make(pico_mamba()).layout
    assert first == make(pico_mamba()).layout
    changed = pico_mamba()
    with torch.no_grad():
        changed.backbone.layers[1].mixer.in_proj.weight[3, 4] += 1e-3
    others = [changed, pico_mamba(layer_norm_epsilon=1e-3), pico_mamba(vocab_size=65)]
    layouts = {first, *(make(model).layout for model in others)}
    assert len(layouts) == 4
    assert all(layout.isalnum() for layout in layouts)


def test_a_fingerprint_sees_order_names_and_every_value() -> None:
    config = pico_mamba().config
    weights = {"a": torch.arange(1000.0), "b": torch.ones(3, dtype=torch.bfloat16)}
    first = fingerprint(config, weights, "x")
    assert first == fingerprint(config, dict(reversed(weights.items())), "x")
    assert first != fingerprint(config, weights, "y")
    assert first != fingerprint(config, {"a": weights["a"], "c": weights["b"]}, "x")
    for place in range(0, 1000, 37):
        other = weights["a"].clone()
        other[place] += 0.5
        assert first != fingerprint(config, weights | {"a": other}, "x")


def test_the_shapes_are_those_of_the_stock_model() -> None:
    for fields in VARIANTS.values():
        model = pico_mamba(**fields)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        assert shapes == expected_shapes(model.config)


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    model = pico_mamba()
    weights = dict(model.state_dict())
    name = "backbone.layers.1.mixer.D"
    with pytest.raises(ValueError, match=rf"{name} has shape \(3,\), expected \(32,\)"):
        ReferenceEngine(model.config, weights | {name: torch.ones(3)})
    del weights[name]
    with pytest.raises(ValueError, match=f"the weights have no {name}"):
        ReferenceEngine(model.config, weights)
    with pytest.raises(ValueError, match="hidden_act is 'gelu'"):
        ReferenceEngine(pico_mamba(hidden_act="gelu").config, model.state_dict())


def test_load_reads_every_kind_of_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico_mamba()
    model.save_pretrained(tmp_path / "dense")
    pico_tokenizer().save_pretrained(tmp_path / "dense")
    packed.pack(tmp_path / "dense", tmp_path / "packed")
    ids = tokens(50).tolist()
    expected = stock(model, torch.tensor(ids))
    for folder in ("dense", "packed"):
        ready = runtime.load(tmp_path / folder)
        assert near(ready.logits(ids), expected)
        assert (ready.eos, ready.bos, ready.source) == ({0}, 0, str(tmp_path / folder))
        assert ready.config.hidden_size == 16
        monkeypatch.setattr(kernels, "NATIVE", False)
        slow = runtime.load(tmp_path / folder)
        assert isinstance(slow.engine, ReferenceEngine)
        assert near(slow.logits(ids), expected)
        monkeypatch.undo()
    other = runtime.load(tmp_path / "packed", tokenizer=tmp_path / "dense")
    assert other.encode("the state") == pico_tokenizer()("the state")["input_ids"]
    for threads in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="threads is .*; allowed: a whole number from 1 to .*, or none"):
            runtime.load(tmp_path / "dense", threads=threads)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no such directory"):
        runtime.load(tmp_path / "absent")


def test_the_tokens_that_end_a_text_are_those_of_the_generation_config(tmp_path: Path) -> None:
    model = pico_mamba()
    model.generation_config.eos_token_id = [5, 7]
    model.save_pretrained(tmp_path)
    pico_tokenizer().save_pretrained(tmp_path)
    assert runtime.load(tmp_path).eos == {5, 7}
    (tmp_path / "generation_config.json").unlink()
    assert runtime.load(tmp_path).eos == {0}
