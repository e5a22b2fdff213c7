"""What runs a model: the `Engine` every implementation is, and the name of a model's state.

Place in the flow: the lowest file of `runtime/`. `reference.py` is the slow definition, `engine.py` the fast
one; `generation.py` uses either and cannot tell which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

FIELDS = (  # of a configuration: what decides, together with the weights, what a model computes
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "state_size",
    "conv_kernel",
    "time_step_rank",
    "num_hidden_layers",
    "layer_norm_epsilon",
    "use_bias",
    "use_conv_bias",
)
_SAMPLES = 64  # values of a tensor that go into a fingerprint as they are
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Engine(Protocol):
    """A model that reads tokens and carries a state of fixed size from one to the next.

    What a sequence gets must not depend on the others in the batch: row i of `step` is bit for bit what
    `step` gives for that row alone. Tokens and shapes are the caller's responsibility (`generation.py`).
    """

    @property
    def vocabulary(self) -> int:
        """V, the number of logits; tokens are 0 to V - 1."""
        ...

    @property
    def state_size(self) -> int:
        """float32 values that a sequence carries."""
        ...

    @property
    def layout(self) -> str:
        """A short hash of the model and of the order of the values in its state."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one decoding step reads."""
        ...

    @property
    def resident(self) -> int:
        """Bytes of weights in memory, those included that a step does not read, such as an embedding that is
        only looked up; small tables and the rounding to pages are not in it."""
        ...

    def new_state(self, batch: int) -> Tensor:
        """The beginning of `batch` sequences: float32 zeros (batch, state_size)."""
        ...

    def prompt(self, tokens: Tensor, state: Tensor, every: bool = False) -> Tensor:
        """Read several tokens of one sequence.

        Args:
            tokens: int64 (L,), L >= 1.
            state: float32 (state_size,), contiguous; advanced in place.
            every: logits after every token, not only after the last.

        Returns:
            float32 (V,), or (L, V) with `every`.
        """
        ...

    def step(self, tokens: Tensor, state: Tensor) -> Tensor:
        """Read one token of each sequence.

        Args:
            tokens: int64 (B,).
            state: float32 (B, state_size), contiguous; advanced in place.

        Returns:
            float32 (B, V), logits after the token.
        """
        ...


def refuse_unsupported(config: Any) -> None:
    """Check that a Mamba of this configuration is what the engines compute.

    Raises:
        ValueError: an activation other than SiLU.
    """
    if (activation := getattr(config, "hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {activation!r}; a Mamba with 'silu' is supported")


def fingerprint(config: Any, weights: Mapping[str, Tensor], order: str) -> str:
    """A short hash of a model and of the order of its state: equal for equal weights, in every process.

    Made of the configuration, every tensor's name, shape and dtype, the exact sum of its bits and some of its
    values: a model that was pruned, packed with loss or trained further has another one.

    Args:
        config: has the attributes `FIELDS`.
        weights: parameter name -> tensor.
        order: names the order of the values in the state, different for engines that order them differently.

    Returns:
        16 hexadecimal digits.
    """
    told = hashlib.sha256(repr([order, *(getattr(config, name) for name in FIELDS)]).encode())
    for name in sorted(weights):
        values = weights[name].detach().contiguous().flatten()
        bits = values.view(_BITS[values.element_size()])
        some = bits[:: max(1, len(bits) // _SAMPLES)].tolist()
        # a sum of integers is the same for every number of threads, and a tensor is only read once
        told.update(
            repr((name, tuple(weights[name].shape), str(values.dtype), int(bits.sum()), some)).encode()
        )
    return told.hexdigest()[:16]
