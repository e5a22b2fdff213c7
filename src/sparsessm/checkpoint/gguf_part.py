"""What the models with attention have in common in GGUF: a tensor of the file, and their metadata."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

FLOATS = re.compile(r".*(\.ssm_conv1d\.|\.ssm_[ad]$|norm|\.ffn_gate_inp(_shexp)?\.|bias$).*")
"""Names in GGUF of what is always float32."""


@dataclass(frozen=True)
class Part:
    """A tensor of the file.

    Attributes:
        name: in GGUF. shape: there.
        make: of the stock tensor in float32, which `A_log` goes through first. typed: it takes the type of
            matrices. outer: it is embedding or head.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor]
    typed: bool
    outer: bool = False


def describe_attention(writer: Any, config: Any, keys: int | list[int], head: int, epsilon: float) -> None:
    """What llama.cpp asks of every model with attention.

    Args:
        keys: heads of keys and values, of all layers or of each. head: entries of one. epsilon: of norms.
    """
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(keys)
    writer.add_layer_norm_rms_eps(epsilon)
    writer.add_key_length(head)
    writer.add_value_length(head)
