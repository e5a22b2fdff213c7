"""A tensor of a GGUF file, and which are never quantised."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

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
