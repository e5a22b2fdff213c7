"""States of hybrids, whose keys and values grow: generated from, kept, forked, saved, batched, served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import both, held, native, needs_native, reference
from heard import Heard
from packable import pruned
from packable import stock as written
from pico import pico_tokenizer
from pico_hybrids import NEW, pico_hybrid
from torch import Tensor

import sparsessm
from sparsessm import runtime
from sparsessm.checkpoint import pack
from sparsessm.runtime.causal_lm import causal_lm
from sparsessm.runtime.generation import Model
from sparsessm.runtime.keys import BLOCK
from sparsessm.runtime.state import State
from sparsessm.serving.events import Asked
from sparsessm.serving.scheduler import Scheduler

pytestmark = pytest.mark.skipif(not NEW, reason="hybrids need transformers 5")
NAMES = ("bamba", "jamba", "nemotron_h-latent", "zamba2-two-blocks", "kimi_linear-latent")
PROMPT = [5, 9, 30, 2, 41, 17]


def pico(name: str, make: Callable[[Any], Any] = native) -> Model:
    """Random weights that never end a text by themselves."""
    model = pico_hybrid(name)
    return Model(make(model), pico_tokenizer(), model.config, bos=0)


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        with torch.inference_mode():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids = [*ids, int(logits.argmax())]
    return ids[-count:]


@both
@pytest.mark.parametrize("name", NAMES)
def test_going_on_from_a_state_is_one_long_text(make: Any, name: str, tmp_path: Path) -> None:
    """Over the end of a block; a saved state has the blocks that it needs."""
    model, most = pico(name, make), BLOCK + 6
    whole = model.generate(PROMPT, most)
    assert whole.ids == greedy(pico_hybrid(name), PROMPT, most)
    keys = model.engine.keys
    for cut in (0, 1, BLOCK - len(PROMPT) + 1):
        first = model.generate(PROMPT, cut)
        tokens = len(PROMPT) + max(cut, 1) - 1 - (not cut)
        assert keys.tokens(first.state.array) == tokens and len(first.state.array) == keys.size(tokens)
        before = first.state.fork()
        rest = model.generate([], most - cut, state=first.state)
        assert first.ids + rest.ids == whole.ids
        assert torch.equal(before.array, first.state.array)  # not changed
        first.state.save(tmp_path / "state")
        again = model.generate("", most - cut, state=State.load(tmp_path / "state"))
        assert again.ids == rest.ids and torch.equal(again.state.array, rest.state.array)


@needs_native
@pytest.mark.parametrize("name", ["falcon_h1", "kimi_linear"])
def test_a_batch_of_different_lengths_is_each_alone(name: str) -> None:
    model = pico(name)
    prompts = [PROMPT, [3], PROMPT * 12, PROMPT * 10]  # of the last two one is beyond a block, one reaches it
    for done, prompt in zip(model.generate(prompts, 20), prompts, strict=True):
        alone = model.generate(prompt, 20)
        assert done.ids == alone.ids and torch.equal(done.state.array, alone.state.array)


def test_a_damaged_state_is_refused() -> None:
    model = pico("bamba", reference)
    state = model.generate(PROMPT, 3).state
    fixed, block = model.engine.keys.fixed, model.engine.keys.block

    def changed(count: float) -> Tensor:
        array = state.array.clone()
        array[fixed - 1] = count
        return array

    for array, words in (
        (state.array[: fixed - 2], f"it has {fixed - 2} values, this model at least {fixed}"),
        (state.array[:-1], f"it has {fixed + block - 1} values, this model {fixed + block} after 8 tokens"),
        (
            changed(BLOCK + 1),
            f"it has {fixed + block} values, this model {fixed + 2 * block} after 65 tokens",
        ),
        (changed(-1), "it says that -1 tokens were read; allowed: whole numbers from 0"),
        (changed(0.5), "it says that 0.5 tokens were read"),
        (changed(1e9), r"it says that 1e\+09 tokens were read"),
    ):
        with pytest.raises(ValueError, match=f"state: {words}"):
            model.generate([1], 3, state=State(array, state.layout, state.pending))


@needs_native
@pytest.mark.parametrize("name", NAMES)
def test_a_directory_stock_pruned_or_packed_runs(name: str, tmp_path: Path) -> None:
    written(tmp_path / "stock", pico_hybrid(name))
    pruned(tmp_path / "pruned", pico_hybrid(name), sparsity=0.5)
    pack(tmp_path / "pruned", tmp_path / "packed")
    checkpoint = sparsessm.load(tmp_path / "pruned")
    with torch.inference_mode():
        expected = checkpoint.model(torch.tensor([PROMPT * 3]), use_cache=False).logits[0]
    for path in ("pruned", "packed"):
        logits = runtime.load(tmp_path / path).logits(PROMPT * 3)
        assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4
    found = runtime.of(checkpoint).logits(PROMPT * 3)
    assert torch.equal(found, runtime.load(tmp_path / "pruned").logits(PROMPT * 3))
    dense, small = (runtime.load(tmp_path / path).engine for path in ("stock", "packed"))
    assert small.nbytes < dense.nbytes


@needs_native
@pytest.mark.parametrize("beams", [1, 3])
def test_the_wrapper_generates_as_stock(beams: int) -> None:
    model = pico_hybrid("granite-rope")
    wrapped, ids = causal_lm(pico("granite-rope")), torch.tensor([PROMPT, PROMPT[::-1]])
    how: dict[str, Any] = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, use_cache=False, pad_token_id=0, **how)
    assert torch.equal(wrapped.generate(ids, pad_token_id=0, **how), expected)


@needs_native
@pytest.mark.parametrize("name", NAMES)
def test_a_server_answers_as_generate_does(name: str) -> None:
    """Prompts that begin alike, and go on where an answer ended, are read from kept states."""
    model = pico(name)
    scheduler = Scheduler(model, batch=3, cache=1 << 22)
    try:
        base = [(7 * i) % 64 for i in range(BLOCK - 3)]
        prompts = [base, [*base, 5, 6], [*base, 8], [3], PROMPT]
        heard = [Heard() for _ in prompts]
        for prompt, one in zip(prompts, heard, strict=True):
            scheduler.ask(Asked(prompt, 20), one)
        for prompt, one in zip(prompts, heard, strict=True):
            one.done()
            assert one.ids() == model.generate(prompt, 20).ids
        turn = [*base, *heard[0].ids(), 9, 9]
        last = Heard()
        scheduler.ask(Asked(turn, 10), last)
        last.done()
        assert last.ids() == model.generate(turn, 10).ids
        assert last.cached == len(base) + 19  # the last token of an answer is not fed
        size = model.engine.keys.size(len(turn))
        assert scheduler.prefixes.nbytes < len(scheduler.prefixes) * (4 * size + 8 * len(turn) + 4 * 64)
    finally:
        scheduler.close()


def test_traffic_is_watched_by_the_mixers_states() -> None:
    from sparsessm.studies.traffic import Snapshots, read

    model = pico("jamba", reference)
    maker = Snapshots(model, [torch.ones(pair[0]).numpy() for pair in model.engine.sections])
    state, logits, surprise = read(model, torch.tensor(PROMPT))
    assert len(state) > sum(map(sum, model.engine.sections))
    assert maker.take(state, logits, surprise).shape == (len(maker.names),) and len(maker.sections) == 3


def test_what_is_in_memory_is_what_a_checkpoint_has() -> None:
    model = runtime.of(held(pico_hybrid("bamba")))
    assert model.generate(PROMPT, 5, ignore_eos=True).ids == greedy(pico_hybrid("bamba"), PROMPT, 5)
