"""Trains the tokenizer of `builtin:pycode`: byte-level BPE on the training side of `stdlib`.

Byte-level, so any text round-trips. Digits stay single; a line break and its indentation form one piece whose
last space belongs to the next word, so that " return" is one entry at every depth. Run by train_builtin.py
where the folder has no tokenizer yet.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparsessm.data.texts import stdlib_modules

END = "<|endoftext|>"
PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*\n *(?= \S)|\s*\n|\s+(?!\S)|\s+"


def train_tokenizer(entries: int, length: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of `entries` entries whose longest input is said to be `length` tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for _, text in stdlib_modules(held_out=False)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )
