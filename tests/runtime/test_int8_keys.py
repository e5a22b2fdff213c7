"""Keys and values held as bytes: what is stored, what is computed of it, and what becomes of such states."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused, run
from engines import held, native, needs_native
from heard import Heard
from pico import pico_mamba, pico_tokenizer
from pico_hybrids import NEW, pico_hybrid
from torch import Tensor

from sparsessm import kernels, runtime
from sparsessm.checkpoint import packed
from sparsessm.runtime.base import Engine
from sparsessm.runtime.engine import NativeEngine
from sparsessm.runtime.generation import Model
from sparsessm.runtime.keys import BLOCK, Reading, _packed, _unpacked, coded, floats_of
from sparsessm.runtime.reference import ReferenceEngine
from sparsessm.runtime.state import State
from sparsessm.serving.events import Asked
from sparsessm.serving.scheduler import Scheduler

pytestmark = pytest.mark.skipif(not NEW, reason="hybrids need transformers 5")
NAMES = ("bamba", "qwen3_5_text", "olmo_hybrid", "zamba2", "kimi_linear-latent")
LENGTH = 2 * BLOCK + 9
PROMPT = [5, 9, 30, 2, 41, 17]


def bytes_of(model: Any) -> NativeEngine:
    if kernels.LEVEL == "reference":
        pytest.skip("the native kernels are not built, or held back")
    return NativeEngine(model.config, packed.of(held(model)).tensors, keys="int8")


def definition(model: Any) -> Engine:
    return ReferenceEngine(model.config, model.state_dict(), keys="int8")


def ids_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (count,), generator=torch.Generator().manual_seed(seed))


def begun(engine: Engine, tokens: int) -> Tensor:
    return engine.keys.room(engine.new_state(1), tokens)[0]


def stepped(engine: Engine, ids: Tensor, state: Tensor) -> Tensor:
    return torch.cat([engine.step(token[None], [state]) for token in ids])


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_bytes_come_back_and_no_four_of_them_are_an_infinity_or_nan() -> None:
    """The two bytes that a float's exponent touches in all their values, the others at random."""
    some = torch.arange(-127, 128, dtype=torch.int8)
    codes = torch.randint(-127, 128, (255, 255, BLOCK), generator=torch.Generator().manual_seed(0)).to(
        torch.int8
    )
    for word in range(BLOCK // 4):
        codes[:, :, 3 * (BLOCK // 4) + word] = some[:, None]
        codes[:, :, 2 * (BLOCK // 4) + word] = some
    words = _packed(codes)
    assert words.shape == (255, 255, BLOCK // 4) and words.dtype == torch.float32
    assert bool(torch.isfinite(words).all()) and torch.equal(_unpacked(words), codes)
    zero = _packed(torch.zeros(1, BLOCK, dtype=torch.int8)).view(torch.int32)
    assert set(zero.flatten().tolist()) == {0x3F800000}  # 0x7f000000, turned right by one


def test_a_vector_is_rounded_to_255_values() -> None:
    x = torch.tensor([[1.0, -2.54, 0.004, 0.011], [0.0, 0.0, 0.0, 0.0], [1e-36, 0, 0, 0]])
    codes, worth = coded(x)
    assert codes.tolist() == [[50, -127, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert math.isclose(float(worth[0]), 0.02, rel_tol=1e-6) and float(worth[1]) == 0
    for wrong in (math.nan, math.inf, -math.inf):
        codes, worth = coded(torch.tensor([[1.0, wrong], [1.0, 0.5]]))
        assert codes.tolist() == [[0, 0], [127, 64]] and math.isnan(worth[0]) and not math.isnan(worth[1])


@pytest.mark.parametrize("pieces", [(1,) * 70, (63, 1, 6), (64, 6), (65, 5), (70,)])
def test_tokens_of_a_prompt_are_held_piece_by_piece(pieces: tuple[int, ...]) -> None:
    """As if each were rounded by itself; what other parts hold in a block stays."""
    heads, width, place = 3, 5, 7
    x = torch.randn(70, heads, width, generator=torch.Generator().manual_seed(0))
    blocks, start = torch.full((2, place + heads * floats_of(width, True) + 4), 9.0), 0
    known = torch.empty(0)
    for count in pieces:
        reading = Reading(blocks, start, count, None, None, True)
        known, start = reading.add(place, x[start : start + count]), start + count
    codes, worth = coded(x)
    assert torch.equal(known, (codes * worth[..., None]).transpose(0, 1))
    assert float((known - x.transpose(0, 1)).abs().max()) <= float(x.abs().max()) / 253
    assert bool((blocks[:, :place] == 9).all()) and bool((blocks[:, -4:] == 9).all())


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_steps_are_the_definition_at_every_level(name: str) -> None:
    """A number that lies between two bytes may fall on either side, so the bound is that of a few of them."""
    model, ids = pico_hybrid(name), ids_of(LENGTH)
    truth = definition(model)
    expected = truth.prompt(ids, begun(truth, LENGTH), every=True)
    engine = bytes_of(model)
    exact = native(model)
    rounding = far(exact.prompt(ids, begun(exact, LENGTH), every=True), expected)
    assert 1e-4 < rounding < 0.05
    assert far(engine.prompt(ids, begun(engine, LENGTH), every=True), expected) < rounding / 5
    for level in kernels.LEVELS[1:]:
        kernels.LEVEL = level
        assert far(stepped(engine, ids, begun(engine, LENGTH)), expected) < rounding / 5, level
        state = begun(engine, LENGTH)
        engine.prompt(ids[: BLOCK + 1], state)
        assert far(stepped(engine, ids[BLOCK + 1 :], state), expected[BLOCK + 1 :]) < rounding / 5, level


@needs_native
@pytest.mark.parametrize("queries", [1, 3, 5, 6, 7])
def test_any_number_of_queries_meets_a_head_of_keys(queries: int) -> None:
    """Some of them together, the others alone: steps are the prompt's products, in bytes and in floats."""
    heads = {"num_attention_heads": 2 * queries, "num_key_value_heads": 2, "head_dim": 12}
    model, ids = pico_hybrid("falcon_h1", **heads), ids_of(BLOCK + 9)
    for engine, bound in ((native(model), 1e-5), (bytes_of(model), 2e-3)):
        expected = engine.prompt(ids, begun(engine, LENGTH), every=True)
        for level in kernels.LEVELS[1:]:
            kernels.LEVEL = level
            assert far(stepped(engine, ids, begun(engine, LENGTH)), expected) < bound, level


@needs_native
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_are_alone_whatever_the_threads(name: str) -> None:
    engine = bytes_of(pico_hybrid(name))
    rows = [begun(engine, BLOCK + 40) for _ in range(3)]
    for i, row in enumerate(rows):
        engine.prompt(ids_of((1, 30, BLOCK - 1)[i], i), row)
    alone = [row.clone() for row in rows]
    for turn in range(4):
        ids = ids_of(3, turn)
        engine._threads = (1, 2, 3, 5)[turn]
        together = engine.step(ids, rows)
        for i, row in enumerate(alone):
            engine._threads = (1, 5)[turn % 2]
            assert torch.equal(engine.step(ids[i : i + 1], [row])[0], together[i])
            assert torch.equal(row, rows[i]) and bool(torch.isfinite(row).all())


@needs_native
def test_a_block_takes_about_a_quarter() -> None:
    """Of Bamba's 2 heads of 4 channels, keys and values: a byte a number, and a scale for each token."""
    engine = bytes_of(pico_hybrid("bamba"))
    assert engine.keys.block * 4 == 2 * 2 * (4 * BLOCK + 4 * BLOCK)
    wide = {"head_dim": 128, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = pico_hybrid("nemotron_h", **wide)
    assert bytes_of(model).keys.block / native(model).keys.block == (128 + 4) / (4 * 128)


@needs_native
@pytest.mark.parametrize("name", ["bamba", "kimi_linear-latent"])
def test_going_on_from_a_state_is_one_long_text(name: str, tmp_path: Path) -> None:
    model, most = Model(bytes_of(pico_hybrid(name)), pico_tokenizer(), pico_hybrid(name).config, bos=0), BLOCK
    whole = model.generate(PROMPT, most)
    for cut in (1, BLOCK - len(PROMPT) - 1):
        first = model.generate(PROMPT, cut)
        rest = model.generate([], most - cut, state=first.state.fork())
        assert first.ids + rest.ids == whole.ids
        first.state.save(tmp_path / "state")
        again = model.generate("", most - cut, state=State.load(tmp_path / "state"))
        assert again.ids == rest.ids and torch.equal(again.state.array, rest.state.array)
    exact = Model(native(pico_hybrid(name)), pico_tokenizer(), model.config, bos=0)
    with pytest.raises(ValueError, match="state"):
        exact.generate([], 1, state=whole.state)
    prompts = [PROMPT, [3], PROMPT * 12]
    for done, prompt in zip(model.generate(prompts, 20), prompts, strict=True):
        assert done.ids == model.generate(prompt, 20).ids


@needs_native
def test_a_server_answers_as_generate_does() -> None:
    model = Model(
        bytes_of(pico_hybrid("kimi_linear")), pico_tokenizer(), pico_hybrid("kimi_linear").config, bos=0
    )
    scheduler = Scheduler(model, batch=3, cache=1 << 22)
    try:
        base = [(7 * i) % 64 for i in range(BLOCK - 3)]
        for prompt in (base, [*base, 5, 6], [3]):
            heard = Heard()
            scheduler.ask(Asked(prompt, 20), heard)
            heard.done()
            assert heard.ids() == model.generate(prompt, 20).ids
    finally:
        scheduler.close()


@needs_native
def test_the_trained_model_of_the_delta_rule_goes_on_in_bytes() -> None:
    """Over several blocks; the command, and its answer from Python."""
    text = run("generate", "builtin:pydelta", "def main(", "-n", "80", "--keys", "int8", "--quiet").stdout
    done = runtime.load("builtin:pydelta", keys="int8").generate("def main(", 80)
    exact = runtime.load("builtin:pydelta").generate("def main(", 80)
    assert text.rstrip("\n").endswith(done.text.rstrip("\n")) and len(done.ids) == 80
    assert len(done.state.array) < len(exact.state.array)


def test_another_form_is_refused_and_a_model_without_attention_says_so() -> None:
    with pytest.raises(ValueError, match="keys is 'int4'; allowed: float32, int8"):
        runtime.load("builtin:pydelta", keys="int4")
    with pytest.raises(ValueError, match="keys is 'int4'; allowed: float32, int8"):
        ReferenceEngine(pico_hybrid("bamba").config, {}, keys="int4")
    assert "keys is 'int4'" in refused("generate", "builtin:pydelta", "def", "--keys", "int4")
    model = runtime.of(held(pico_mamba()), keys="int8")
    assert model.notes == ("the model has no attention, so there are no keys to hold as int8",)
