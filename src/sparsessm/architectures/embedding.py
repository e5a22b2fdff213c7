"""Token ids -> rows of the embedding: where a tokenizer with more tokens than the model has is found out."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def embedded(embedding: Any, tokens: Tensor) -> Tensor:
    """(W, L) token ids -> (W, L, d_model).

    Raises:
        ValueError: a token that the embedding has no row for, as special tokens that were added to a
            tokenizer alone.
    """
    rows = embedding.weight.shape[0]
    if tokens.numel() and tokens.device.type != "meta":
        low, high = tokens.aminmax()
        if low < 0 or high >= rows:
            token = int(high) if high >= rows else int(low)
            raise ValueError(
                f"the text has token {token}, but the model has only tokens 0 to {rows - 1}: its tokenizer "
                "has more tokens than its embedding has rows; use another text or the model's own tokenizer"
            )
    return embedding(tokens.to(embedding.weight.device))  # where it is now
