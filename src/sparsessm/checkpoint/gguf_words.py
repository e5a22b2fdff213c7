"""A tokenizer in the words of GGUF: what `exporting.py` writes of it.

llama.cpp does not read `tokenizer.json`. It has its own code for byte-level BPE, which takes tokens and
merges from the file, and knows the ways to split a text into words by their names (`tokenizer.ggml.pre`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .known_fields import optional

# As GGUF numbers the kinds of tokens. Control tokens are not printed; user-defined ones are found in a text
# before it is split.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
SAME = {  # pre-tokenizers, by what they are made of -> the name of the same in llama.cpp
    ("ByteLevel",): "gpt-2",
    ("Punctuation", "ByteLevel", "Digits", "Split"): "falcon",
}
NEAREST = "gpt-2"
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # here and in GGUF


@dataclass(frozen=True)
class Words:
    """Of a tokenizer.

    Attributes:
        tokens: one for each row of the embedding. kinds: of each, as a number. merges: as "a b", in order.
        pre: how texts are split, by its name in llama.cpp.
        ids: of the tokens with a role, of those that there are.
        begins, ends: whether a text gets the token for its beginning and its end.
        template: of chats, empty if there is none.
        notes: what llama.cpp will do otherwise.
    """

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    pre: str
    ids: Mapping[str, int]
    begins: bool
    ends: bool
    template: str
    notes: tuple[str, ...]

    def add_to(self, writer: Any) -> None:
        """Give all to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        for role, index in self.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{ROLES[role]}_token_id", index)
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(self.ends)
        if self.template:
            writer.add_chat_template(self.template)


def words(tokenizer: PreTrainedTokenizerBase, config: Any, rows: int) -> Words:
    """What GGUF says of a tokenizer.

    Args:
        config: of the model, which may know the tokens with a role. rows: of the embedding.

    Raises:
        ValueError: it is no byte-level BPE, or has more tokens than rows.
    """
    fields = _fields(tokenizer)
    model = fields["model"]
    tokens = [f"[PAD{index}]" for index in range(rows)]
    kinds = [UNUSED] * rows
    added = {each["id"]: each for each in fields["added_tokens"]}
    named = {index: token for token, index in model["vocab"].items()}
    named |= {index: each["content"] for index, each in added.items()}
    if max(named) >= rows:
        raise ValueError(
            f"the tokenizer has tokens up to number {max(named)}, the embedding {rows} rows; a GGUF file has "
            "as many tokens as rows"
        )
    for index, token in named.items():
        tokens[index], kinds[index] = token, NORMAL
        if index in added:
            kinds[index] = CONTROL if added[index]["special"] else USER_DEFINED
    ids = {}
    for role in ROLES:
        found = optional(tokenizer, f"{role}_token_id")
        found = optional(config, f"{role}_token_id") if found is None else found
        if isinstance(found, int) and 0 <= found < rows:
            ids[role] = found
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    pre, notes = _pre(fields)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    begins = len(whole) > len(bare) and whole[0] == ids.get("bos")
    ends = len(whole) > len(bare) + begins and whole[-1] == ids.get("eos")
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    return Words(tokens, kinds, merges, pre, ids, begins, ends, template, notes)


def _fields(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Its `tokenizer.json`, of a byte-level BPE."""
    kind = "no tokenizer.json"
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        fields = json.loads(tokenizer.backend_tokenizer.to_str())
        kind = fields["model"]["type"]
        if kind == "BPE" and "ByteLevel" in _kinds(fields["pre_tokenizer"]):
            return fields
    raise ValueError(
        f"its tokenizer ({type(tokenizer).__name__}, {kind}) is not exported to GGUF; what is: byte-level "
        "BPE, as of GPT-2 and GPT-NeoX"
    )


def _parts(fields: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer or normalizer."""
    if fields is None:
        return []
    if fields["type"] == "Sequence":
        return [*fields.get("pretokenizers", ()), *fields.get("normalizers", ())]
    return [fields]


def _kinds(fields: Mapping[str, Any] | None) -> tuple[str, ...]:
    return tuple(part["type"] for part in _parts(fields))


def _pre(fields: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The name of how texts are split, and what is not the same."""
    parts = _parts(fields["pre_tokenizer"])
    found = SAME.get(_kinds(fields["pre_tokenizer"]), "")
    for part in parts:
        if part["type"] == "ByteLevel" and (part["add_prefix_space"] or not part.get("use_regex", True)):
            found = ""
    notes = []
    if not found:
        notes.append(
            f"llama.cpp has no name for how this tokenizer splits a text into words; {NEAREST!r} is written, "
            "with which some texts become other tokens than here"
        )
    if set(_kinds(fields["normalizer"])) - {"NFC"}:
        notes.append("llama.cpp does not normalise texts as this tokenizer does")
    return found or NEAREST, tuple(notes)
