"""Pico models: real configurations, two layers, random weights; the models of every test come from here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

import sparsessm

TEXT = (
    "the state of the model forgets the rest; a scan reads token after token, and what it keeps is small.\n"
    * 3
)


def pico_mamba(**overrides: Any) -> MambaForCausalLM:
    """A Mamba-1 of 2 layers, d_model 16, 8 states, vocabulary 64; the same weights every time."""
    return _made(MambaForCausalLM, MambaConfig, overrides)


def pico_falcon_mamba(**overrides: Any) -> FalconMambaForCausalLM:
    """The same as a FalconMamba, with its norms on B, C and step size."""
    return _made(FalconMambaForCausalLM, FalconMambaConfig, overrides)


def pico_mamba2(**overrides: Any) -> Mamba2ForCausalLM:
    """A Mamba-2 of 2 layers, d_model 16, 4 heads of 8 channels in 2 groups, 8 states, vocabulary 64."""
    shapes = {"num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
    return _made(Mamba2ForCausalLM, Mamba2Config, shapes | overrides)


def _made(kind: Any, config: Any, overrides: dict[str, Any]) -> Any:
    fields = {"vocab_size": 64, "hidden_size": 16, "state_size": 8, "num_hidden_layers": 2} | overrides
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config(**fields))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("A_log", ".D", "norm.weight", "norm_f.weight", "bias")):
                    parameter.add_(0.1 * torch.randn_like(parameter))  # away from their regular start values
    return model.eval()


def pico_tokenizer(vocab_size: int = 64) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the bytes of a short English text; id 0 is <|endoftext|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)


def builtin_tokenizer() -> PreTrainedTokenizerFast:
    """That of the built-in model, which has every byte."""
    file = Path(sparsessm.__file__).parent / "builtin/pycode/tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")
