"""The tokenizer in a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from directories import NEOX
from gguf_files import fields_of, with_tokenizer
from packable import stock
from pico import builtin_tokenizer, pico_mamba, pico_tokenizer
from tokenizers import pre_tokenizers
from tokenizers.processors import TemplateProcessing

from sparsessm.checkpoint import export


def test_tokens_merges_and_ids(tmp_path: Path) -> None:
    tokenizer = pico_tokenizer()
    tokenizer.add_tokens(["a  b"])
    source = with_tokenizer(tmp_path / "m", tokenizer, 72)
    done = export(source, tmp_path / "m.gguf")
    told = {key.removeprefix("tokenizer.ggml."): value for key, value in fields_of(done.file).items()}
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    assert (told["model"], told["pre"], done.notes) == ("gpt2", "gpt-2", ())
    assert told["merges"] == [" ".join(pair) for pair in model["merges"]]
    normal = {index: token for token, index in model["vocab"].items() if index}
    assert {index: told["tokens"][index] for index in normal} == normal
    assert told["tokens"][0] == "<|endoftext|>" and told["tokens"][len(tokenizer) - 1] == "a  b"
    unused = 72 - len(tokenizer)
    assert told["token_type"] == [3, *[1] * (len(tokenizer) - 2), 4, *[5] * unused]
    assert len({*told["tokens"]}) == 72  # llama.cpp refuses two tokens of one name
    assert told["bos_token_id"] == told["eos_token_id"] == 0
    assert told["add_bos_token"] is told["add_eos_token"] is False
    assert "chat_template" not in told and "unknown_token_id" not in told


def test_a_beginning_that_is_added_and_a_template_are_told(tmp_path: Path) -> None:
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    told = fields_of(export(with_tokenizer(tmp_path / "m", tokenizer), tmp_path / "m.gguf").file)
    assert told["tokenizer.ggml.add_bos_token"] is True and told["tokenizer.ggml.add_eos_token"] is False
    assert told["tokenizer.chat_template"] == "{{ messages }}"


def test_other_ways_to_split_are_noted(tmp_path: Path) -> None:
    ours = export(with_tokenizer(tmp_path / "a", builtin_tokenizer(), 4096), tmp_path / "a.gguf")
    assert "'gpt-2' is written, with which some texts become other tokens" in ours.notes[0]
    for how in ({"add_prefix_space": True}, {"add_prefix_space": False, "use_regex": False}):
        other = pico_tokenizer()
        other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**how)
        source = with_tokenizer(tmp_path / "b", other)
        assert len(export(source, tmp_path / "b.gguf", force=True).notes) == 1, how


@pytest.mark.skipif(not NEOX.exists(), reason="needs ../shared/data")
def test_the_tokenizer_of_gpt_neox(tmp_path: Path) -> None:
    stock(tmp_path / "m", pico_mamba(vocab_size=50280))
    done = export(tmp_path / "m", tmp_path / "m.gguf", tokenizer=NEOX)
    told = fields_of(done.file)
    assert (told["tokenizer.ggml.pre"], done.notes) == ("gpt-2", ())
    assert told["tokenizer.ggml.tokens"][12092] == "Hello" and told["tokenizer.ggml.tokens"][1533] == "Ġworld"
    assert told["tokenizer.ggml.tokens"][50276] == "  " and told["tokenizer.ggml.token_type"][50276] == 4
    assert told["tokenizer.ggml.token_type"][50277:] == [5, 5, 5]
