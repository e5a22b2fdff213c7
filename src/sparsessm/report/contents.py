"""What is in a checkpoint, in bytes and counts: what every record says.

Place in the flow: beside it. Nothing here looks at data or changes a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, dtype

from sparsessm.report.record import kind_of

VOCABULARY = ("embeddings", "embed_tokens", "lm_head")  # kinds
HALVES = {"vocabulary": "embedding and head", "body": "all others"}
Table = tuple[str, list[str], list[list[str]], int]  # title, columns, cells, columns that are words


def contents(tensors: Mapping[str, Tensor], stored: Mapping[str, dtype]) -> dict[str, tuple[int, set[dtype]]]:
    """Kind of tensor -> the bytes it takes in the checkpoint and its dtypes there, the largest first.

    Args:
        tensors: parameters by name, any shape; only their number of elements is read.
        stored: the dtype of each name in the checkpoint; what it lacks (tied tensors) takes no bytes.
    """
    kinds: dict[str, tuple[int, set[dtype]]] = {}
    for name in stored:
        size, dtypes = kinds.get(kind_of(name), (0, set()))
        size += tensors[name].numel() * stored[name].itemsize
        kinds[kind_of(name)] = size, dtypes | {stored[name]}
    return dict(sorted(kinds.items(), key=lambda item: -item[1][0]))


def halves(kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Embedding and head together ("vocabulary") and all others ("body"), as kinds of tensors are: "bytes",
    and "bits" a weight, None of nothing.

    Args:
        kinds: the same, by kind of tensor.
    """
    found = {}
    for half in HALVES:
        part = [kind for name, kind in kinds.items() if (name in VOCABULARY) == (half == "vocabulary")]
        size = sum(kind["bytes"] for kind in part)
        entries = sum(8 * kind["bytes"] / kind["bits"] for kind in part)
        found[half] = {"bytes": size, "bits": 8 * size / entries if entries else None}
    return found
