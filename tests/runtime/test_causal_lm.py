"""The runtime in the words of transformers: generate, forward and lm_eval as with the stock model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import both, reference
from pico import pico_mamba, pico_tokenizer
from torch import Tensor
from transformers import DynamicCache, MambaForCausalLM, PreTrainedModel

from sparsessm.runtime.causal_lm import Carried, causal_lm
from sparsessm.runtime.generation import Model

TEXTS = ["the state of the model", "a scan", "what it keeps is small"]


def wrapped(make: Any = reference, **fields: Any) -> tuple[Any, MambaForCausalLM]:
    """The same model twice: on the runtime, and stock."""
    stock = pico_mamba(**fields)
    stock.generation_config.eos_token_id = 63  # rare
    model = Model(make(stock), pico_tokenizer(), stock.config, eos=[63], bos=0)
    return causal_lm(model), stock


def padded(side: str = "left") -> dict[str, Tensor]:
    tokenizer = pico_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = side, tokenizer.eos_token
    return dict(tokenizer(TEXTS, return_tensors="pt", padding=True))


@both
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.5, "top_k": 20},
        {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
        {"num_beams": 3},
        {"use_cache": False},
    ],
    ids=str,
)
def test_generate_gives_the_stock_models_tokens(make: Any, options: dict[str, Any]) -> None:
    ours, stock = wrapped(make)
    found = []
    for model in (ours, stock):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            fields = {"do_sample": False, "max_new_tokens": 60, "pad_token_id": 0} | options
            found.append(model.generate(**padded(), **fields))
    assert torch.equal(*found)


def test_it_is_a_stock_model_to_its_users() -> None:
    ours, stock = wrapped()
    assert isinstance(ours, PreTrainedModel) and ours.can_generate() and not ours.training
    assert ours.device.type == "cpu" and ours.dtype == torch.float32
    assert ours.config.to_dict() == stock.config.to_dict()
    assert ours.generation_config.eos_token_id == [63]
    assert list(ours.parameters()) == []
    with pytest.raises(ValueError, match="a model of the runtime cannot be saved"):
        ours.save_pretrained("out")


@both
def test_forward(make: Any) -> None:
    ours, stock = wrapped(make)
    ids = padded()["input_ids"]
    with torch.inference_mode():
        expected = stock(ids, labels=ids)
    found = ours(ids, labels=ids)
    assert torch.allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    assert torch.allclose(ours(ids, logits_to_keep=2).logits, found.logits[:, -2:], rtol=1e-4, atol=1e-5)
    assert len(ours(ids, return_dict=False)) == 2
    assert ours(ids, use_cache=False).cache_params is None


def test_what_is_carried_continues() -> None:
    ours, _ = wrapped()
    ids = padded()["input_ids"]
    whole = ours(ids).logits
    first = ours(ids[:, :4])
    assert isinstance(first.cache_params, Carried) and first.cache_params.get_seq_length() == 4
    rest = ours(ids[:, 4:-1], cache_params=first.cache_params)
    last = ours(ids[:, -1:], cache_params=rest.cache_params)
    parts = torch.cat([first.logits, rest.logits, last.logits], 1)
    assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side: str) -> None:
    ours, _ = wrapped()
    batch = padded(side)
    found = ours(**batch)
    for i, text in enumerate(TEXTS):
        alone = ours(torch.tensor([pico_tokenizer()(text)["input_ids"]]))
        kept = batch["attention_mask"][i].bool()
        assert torch.equal(found.logits[i, kept], alone.logits[0])
        assert not found.logits[i, ~kept].any()
        assert torch.equal(found.cache_params.states[i], alone.cache_params.states[0])
    last = ours(**batch, logits_to_keep=1).logits
    assert torch.allclose(last, found.logits[:, -1:], rtol=1e-4, atol=1e-5)
    some = ours(**batch, logits_to_keep=3).logits
    assert torch.equal(some, found.logits[:, -3:])
    nothing = ours(batch["input_ids"], attention_mask=torch.zeros_like(batch["input_ids"]))
    assert not nothing.logits.any() and not nothing.cache_params.states.any()


def test_what_forward_refuses() -> None:
    ours, _ = wrapped()
    ids = padded()["input_ids"]
    with pytest.raises(ValueError, match=r"input_ids has shape \(3,\); expected \(B, L\)"):
        ours(ids[:, 0])
    with pytest.raises(ValueError, match="input_ids holds token 64; the vocabulary has 0 to 63"):
        ours(ids * 0 + 64)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 2\); expected"):
        ours(ids, attention_mask=torch.ones(3, 2))
    with pytest.raises(ValueError, match="cache_params holds 3 sequences, input_ids 1"):
        ours(ids[:1], cache_params=ours(ids).cache_params)
    with pytest.raises(ValueError, match="cache_params is of type DynamicCache"):
        ours(ids, cache_params=DynamicCache())


@both
def test_the_harness_gives_the_stock_models_likelihoods(make: Any) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    assert lm_eval
    pairs = [(start, f" {end}") for start in TEXTS for end in ("the rest", "a token")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(TEXTS)]
    until: Any = ({"until": ["\n"], "max_gen_toks": 12, "do_sample": False},)
    open_ended = [Instance("generate_until", {}, (text, *until), i) for i, text in enumerate(TEXTS)]
    answers = []
    for model in wrapped(make):
        harness: Any = HFLM(model, tokenizer=pico_tokenizer(), batch_size=2, max_length=64)
        scores = harness.loglikelihood(asked, disable_tqdm=True)
        rolled = harness.loglikelihood_rolling(rolling, disable_tqdm=True)
        answers.append((scores, rolled, harness.generate_until(open_ended, disable_tqdm=True)))
    (ours, our_rolled, our_text), (stock, stock_rolled, stock_text) = answers
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in stock], rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in stock]
    assert our_rolled == pytest.approx(stock_rolled, rel=1e-5)
    assert our_text == stock_text


def test_a_loaded_model_wraps(tmp_path: Path) -> None:
    from sparsessm import runtime

    stock = pico_mamba()
    stock.save_pretrained(tmp_path)
    pico_tokenizer().save_pretrained(tmp_path)
    ready = runtime.load(tmp_path)
    ours: Any = causal_lm(ready)
    ids = torch.tensor([ready.encode("the state")])
    found = ours.generate(ids, do_sample=False, max_new_tokens=20, pad_token_id=0)
    assert found[0, ids.shape[1] :].tolist() == ready.generate("the state", 20).ids
