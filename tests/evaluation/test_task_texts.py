"""Texts of zero-shot tasks that a tokenizer cannot split end in one line, as those of perplexity do."""

from __future__ import annotations

from typing import Any

import pytest
from pico import pico_mamba, pico_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparsessm.checkpoint import Checkpoint

pytest.importorskip("lm_eval")

from sparsessm.evaluation.tasks import language_model


def harness(tokenizer: Any) -> Any:
    model: Any = pico_mamba()
    return language_model(Checkpoint(model, tokenizer, "pico", "transformers", {}, trained_length=32))


def test_a_text_that_the_tokenizer_cannot_split_is_refused_in_one_line() -> None:
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "the": 1, "state": 2}))  # and no unknown word
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    end = "<|endoftext|>"
    model = harness(PreTrainedTokenizerFast(tokenizer_object=words, bos_token=end, eos_token=end))
    assert model.tok_encode("the state") == [1, 2]
    with pytest.raises(ValueError, match="^the tokenizer cannot split the text: WordLevel error"):
        model.tok_encode("the scan")


class PanicException(BaseException):
    """Named as what native code raises beside all exceptions."""


def test_a_library_that_stops_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = harness(pico_tokenizer())

    def stop(*_: object, **__: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(model.tokenizer, "encode", stop)
    with pytest.raises(ValueError, match="the library of tokenizers failed .index out of bounds"):
        model.tok_encode("the")
