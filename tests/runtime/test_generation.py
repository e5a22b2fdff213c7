"""Generating: against the stock model, alone and in batches, and what is handed out as text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import both, reference
from pico import pico_mamba, pico_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparsessm.runtime.generation import Generated, Model
from sparsessm.runtime.keys import Keys
from sparsessm.runtime.text import Pieces, Stream

PROMPT = [5, 9, 30, 2, 41, 17]


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of all bytes and nothing else: id 1 + b is byte b; id 0 is <|endoftext|>."""
    end, alphabet = "<|endoftext|>", pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)


BYTES = bytes_tokenizer()


class Script:
    """An engine that continues a given sequence of tokens, whatever it is fed; its state counts tokens."""

    vocabulary, state_size, layout, keys = 257, 1, "script", Keys(1, 0)

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def new_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, 1)

    def step(self, tokens: Tensor, states: Tensor | list[Tensor]) -> Tensor:
        logits = torch.zeros(len(tokens), self.vocabulary)
        for row, state in zip(logits, states, strict=True):
            state += 1
            row[self.ids[int(state)] if state < len(self.ids) else 0] = 1
        return logits

    def prompt(self, tokens: Tensor, state: Tensor, every: bool = False) -> Tensor:
        state += len(tokens) - 1
        return self.step(tokens[:1], state[None])[0]


def scripted(text: str, prompt: str = "x") -> Model:
    """A model that answers `prompt` with this text, byte for byte, then ends."""
    ids = [*BYTES(prompt)["input_ids"], *BYTES(text)["input_ids"]]
    return Model(Script(ids), BYTES, None, eos=[0], bos=0)


def pico(make: Callable[[Any], Any] = reference, **fields: Any) -> Model:
    """Random weights that never end a text by themselves."""
    model = pico_mamba(**fields)
    return Model(make(model), pico_tokenizer(), model.config, bos=0)


@both
def test_greedy_tokens_are_the_stock_models(make: Any) -> None:
    stock = pico_mamba()
    generate: Any = stock.generate
    for length in (1, 2, 6):
        ids = torch.tensor([PROMPT[:length]])
        expected = generate(ids, do_sample=False, max_new_tokens=200, eos_token_id=None, pad_token_id=0)
        done = pico(make).generate(PROMPT[:length], 200)
        assert done.ids == expected[0, length:].tolist()
        assert (done.finish, done.prompt_ids) == ("length", PROMPT[:length])
        assert done.text == pico_tokenizer().decode(done.ids, skip_special_tokens=True)
        assert done.seconds.prompt > 0 and done.seconds.decode > 0


@both
def test_a_sequence_of_a_batch_gets_what_it_gets_alone(make: Any) -> None:
    model = pico(make)
    model.eos = frozenset(range(0, 64, 9))  # some end early
    prompts = [PROMPT[: 1 + i % 6] + [i] for i in range(9)]
    for options in ({}, {"temperature": 1.5}, {"temperature": 1.0, "top_k": 30, "top_p": 0.9}):
        together = model.generate(prompts, 40, **options)
        for prompt, one in zip(prompts, together, strict=True):
            same(model.generate(prompt, 40, **options), one)
    assert len({len(one.ids) for one in together}) > 3
    assert {one.finish for one in together} >= {"eos"}


def same(first: Generated, second: Generated) -> None:
    """All but the time."""
    assert first.ids == second.ids
    assert (first.text, first.finish, first.prompt_ids) == (second.text, second.finish, second.prompt_ids)
    assert torch.equal(first.state.array, second.state.array)
    assert first.state.pending == second.state.pending


def test_seeds() -> None:
    model = pico()
    one, two, other = model.generate([PROMPT] * 3, 30, temperature=2.0, seed=[7, 7, 8])
    assert one.ids == two.ids != other.ids
    same(one, model.generate(PROMPT, 30, temperature=2.0, seed=7))
    first, second = model.generate([PROMPT] * 2, 30, temperature=2.0)
    assert first.ids == second.ids
    drawn = [model.generate(PROMPT, 30, temperature=2.0, seed=None).ids for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_an_end_of_text_ends_it_unless_ignored() -> None:
    model = scripted("ab")
    done = model.generate("x", 9)
    assert (done.text, done.finish) == ("ab", "eos")
    assert done.ids == [*BYTES("ab")["input_ids"], 0] and done.state.pending == (0,)
    on = model.generate("x", 9, ignore_eos=True)
    assert (on.finish, on.ids[3:], on.text) == ("length", [0] * 6, "ab")


def test_the_text_is_the_same_whether_somebody_listens() -> None:
    model = pico()
    model.eos = frozenset({7, 12})
    for prompt in range(1, 30):
        silent, heard = model.generate([prompt], 50), []
        same(silent, model.generate([prompt], 50, on_token=heard.append))
        assert "".join(heard) == silent.text


@pytest.mark.parametrize(
    ("text", "stops", "expected", "pieces"),
    [
        ("one\ntwo", "\n", "one", ["o", "n", "e"]),
        ("a END b", ["END"], "a ", ["a", " "]),
        ("a ENx b END", "END", "a ENx b ", ["a", " ", "ENx", " ", "b", " "]),
        ("aab", "ab", "a", ["a"]),
        ("aaab", ["aab", "zz"], "a", ["a"]),
        ("stop", "stop", "", []),
        ("grün ü", "ü", "gr", ["g", "r"]),
        ("a EN", "END", "a EN", ["a", " ", "EN"]),  # the end of the text hands out what was held
        ("x一y", [], "x一y", ["x", "一", "y"]),
    ],
)
def test_stop_strings(text: str, stops: Any, expected: str, pieces: list[str]) -> None:
    heard: list[str] = []
    done = scripted(text).generate("x", 99, stop=stops, on_token=heard.append)
    assert (done.text, heard) == (expected, pieces)
    assert done.finish == ("stop" if expected != text else "eos")
    read = len(done.prompt_ids) + len(done.ids) - 1
    assert (done.state.array.tolist(), done.state.pending) == ([read], tuple(done.ids[-1:]))


def test_the_first_of_several_stops_counts_and_tokens_of_many_letters() -> None:
    letters = {1: "ab", 2: "cSTOPdEND", 3: "x"}
    stream = Stream(lambda ids: "".join(letters[i] for i in ids), ["END", "STOP"])
    assert [stream.push(1), stream.push(2)] == [False, True]
    assert stream.text == "abc"


@pytest.mark.parametrize(
    "text",
    [
        "grün — 漢字 🙂🙃 x",
        "🙂" * 50,
        "e\u0301" * 40 + "\ufffd" * 3 + "漢",
        "\ufffd" * 60 + "a" * 40,
        "a" * 300,
    ],
)
def test_characters_of_several_bytes_come_whole(text: str) -> None:
    heard: list[str] = []
    done = scripted(text).generate("x", 2000, on_token=heard.append)
    assert done.text == "".join(heard) == text
    if "\ufffd" not in text:
        assert heard == list(text)


@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_any_bytes_are_the_text_of_all_of_them(seed: int) -> None:
    """Mostly no UTF-8 at all: bytes at random, of the kinds that begin, continue and break characters."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.tensor([0x41, 0x80, 0xBF, 0xC3, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x99, 0xFF, 0x20, 0xED, 0xA0])
    ids = [int(kinds[i]) + 1 for i in torch.randint(len(kinds), (400,), generator=generator)]
    values = {BYTES.convert_ids_to_tokens(i): i for i in range(257)}
    alphabet = bytes_to_tokens()
    ids = [values[alphabet[i - 1]] for i in ids]
    pieces, longest = Pieces(lambda some: BYTES.decode(some, clean_up_tokenization_spaces=False)), 0
    heard = []
    for token in ids:
        heard.append(pieces.push(token))
        longest = max(longest, len(pieces._ids))
    heard.append(pieces.rest())
    assert "".join(heard) == BYTES.decode(ids, clean_up_tokenization_spaces=False)
    assert longest <= 40  # however long the text, little is decoded anew


def bytes_to_tokens() -> dict[int, str]:
    """The letter that byte-level tokenizers write for each byte (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def test_a_decoder_that_drops_the_first_space() -> None:
    """As sentencepiece ones do."""
    words = ["▁the", "▁cat", "s", "▁sat"]

    def decode(ids: list[int]) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    pieces, ids = Pieces(decode), [0, 1, 2, 3] * 30
    assert "".join([*(pieces.push(token) for token in ids), pieces.rest()]) == decode(ids)
    assert len(pieces._ids) <= 32


def test_an_empty_prompt_is_read_as_the_beginning_of_a_text() -> None:
    model = pico()
    for prompt in ("", []):
        done = model.generate(prompt, 20)
        assert (done.prompt_ids, done.ids) == ([0], model.generate([0], 20).ids)
    assert [one.prompt_ids for one in model.generate(["", "the"], 2)][0] == [0]
    with pytest.raises(
        ValueError, match="prompt is empty, and the model has no token for the beginning of a text"
    ):
        Model(model.engine, model.tokenizer, model.config).generate("", 2)


def test_prompts_of_every_kind() -> None:
    model = pico()
    ids = pico_tokenizer()("the state")["input_ids"]
    expected = model.generate("the state", 9)
    assert expected.prompt_ids == ids
    for prompt in (ids, tuple(ids), torch.tensor(ids)):
        same(model.generate(prompt, 9), expected)
    for prompts in (["the state"] * 2, [ids, ids], ("the state", "the state")):
        first, second = model.generate(prompts, 9)
        same(first, expected)
        same(second, expected)
    assert model.generate(torch.tensor([ids, ids]), 0)[1].prompt_ids == ids  # pyright: ignore


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (5, "prompt is of type int; allowed: a text or token ids"),
        (b"abc", "prompt is of type bytes"),
        (None, "prompt is of type NoneType"),
        ([1, 64], "prompt holds token 64 at 1; the vocabulary has 0 to 63"),
        ([-1], "prompt holds token -1 at 0"),
        ([1.0], "prompt holds 1.0 at 0; allowed: whole numbers, token ids"),
        ([True], "prompt holds True at 0"),
        ([[1, 2], [3, 99]], "prompt 1 holds token 99 at 1"),
        ([[1], 2], "prompt 1 is of type int"),
    ],
)
def test_prompts_that_are_refused(prompt: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pico().generate(prompt, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1; allowed: a whole number from 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"stop": ""}, "stop holds ''; allowed: texts of at least one character"),
        ({"stop": ["a", 3]}, "stop holds 3"),
        ({"stop": 5}, "stop is of type int"),
        ({"seed": -1}, "seed is -1; allowed: 0 to"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": 3}, "top_k has no effect at temperature 0"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pico().generate(PROMPT, **options)


def test_only_one_sequence_streams() -> None:
    with pytest.raises(ValueError, match="on_token needs a single prompt, got 2"):
        pico().generate([PROMPT, PROMPT], 3, on_token=print)  # pyright: ignore


def test_a_damaged_model_is_said_in_words() -> None:
    model = pico_mamba()
    with torch.no_grad():
        model.backbone.norm_f.weight.fill_(math.nan)
    broken = Model(reference(model), pico_tokenizer(), model.config)
    with pytest.raises(ValueError, match="the logits are NaN or infinite"):
        broken.generate(PROMPT, 3)


@both
def test_logits(make: Any) -> None:
    stock = pico_mamba()
    with torch.inference_mode():
        expected = stock(torch.tensor([PROMPT])).logits[0]
    assert torch.allclose(pico(make).logits(PROMPT), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no tokens were given; logits need at least one"):
        pico().logits("")
