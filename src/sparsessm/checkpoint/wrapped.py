"""Checkpoints of a language model inside a larger one: Qwen3.5 and 3.6 come with a tower for pictures.

Their `config.json` has the language model's fields under `text_config`, and their tensors are called
`model.language_model.*` where the language model alone would call them `model.*`. The language model is what
is pruned here; everything else goes out as it came, so the result is again the whole model (the stock classes
for text alone leave the tower's tensors out on purpose, and so they are `extra` here).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXT = "text_config"
WRAPPERS: Mapping[str, str] = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
"""Model type of the whole -> of its language model."""
_INSIDE, _ALONE = "model.language_model.", "model."
_SHARED = ("tie_word_embeddings", "quantization_config")  # of the whole, where the inner part is silent
_OF_FILES = ("dtype", "torch_dtype", "transformers_version")


def is_wrapped(fields: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of a larger model with a language model that we know inside."""
    kind = fields.get("model_type")
    return isinstance(kind, str) and kind in WRAPPERS and isinstance(fields.get(TEXT), dict)


def text_fields(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the language model, of a `config.json` that may be a larger model's."""
    if not is_wrapped(fields):
        return fields
    outer = {name: fields[name] for name in _SHARED if name in fields}
    return outer | fields[TEXT] | {"model_type": WRAPPERS[fields["model_type"]]}


def alone_fields(fields: Mapping[str, Any], model_class: str) -> dict[str, Any]:
    """A `config.json` of the language model by itself, of that of the whole.

    Args:
        model_class: name of the stock class of the language model.
    """
    outer = {name: fields[name] for name in _OF_FILES if name in fields}
    return {"architectures": [model_class], **outer, **text_fields(fields)}


def with_changes(fields: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` whose language model has other fields."""
    if not is_wrapped(fields):
        return {**fields, **changed}
    return {**fields, TEXT: {**fields[TEXT], **changed}}


def alone(name: str) -> str:
    """What the language model alone calls a tensor of the whole."""
    return _ALONE + name.removeprefix(_INSIDE) if name.startswith(_INSIDE) else name


def inside(name: str) -> str:
    """What the whole calls a tensor of the language model."""
    return _INSIDE + name.removeprefix(_ALONE) if name.startswith(_ALONE) else name
