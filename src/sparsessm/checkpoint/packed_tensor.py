"""What every tensor of a packed checkpoint is, however it is stored: the words that `container.py` speaks.

`encoding.py` and `coded.py` are the two ways.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

STOCK = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes a stock tensor may have, by the name that is stored for them."""
_CHUNK = 1 << 22  # entries that are worked on at once where the work takes many bytes for each


@dataclass(frozen=True, eq=False)
class PackedTensor(ABC):
    """A stock tensor, and the arrays that stand for it.

    Attributes:
        name, shape, dtype: of the stock tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    @abstractmethod
    def label(self) -> str:
        """The kind as it is stored."""

    @property
    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The arrays, by their name in a file, in the order in which their checksum takes them."""

    @property
    @abstractmethod
    def held(self) -> str:
        """What the arrays hold, in a word: a dtype, or codes."""

    @property
    @abstractmethod
    def fill(self) -> float | None:
        """The value of the entries that are not stored, as far as the file says it."""

    @property
    @abstractmethod
    def scaled(self) -> bool:
        """Its values are numbers times scales: float32 has them, the stock dtype maybe not."""

    @property
    @abstractmethod
    def itself(self) -> Tensor | None:
        """The array that is the stock tensor, where one is."""

    @abstractmethod
    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, `shape`, newly allocated.

        Args:
            dtype: None for the stock dtype. float32 is exact: nothing is then rounded to a narrower stock
                dtype.
        """

    @abstractmethod
    def check(self, contents: bool = True) -> None:
        """Refuse arrays that do not stand for a tensor.

        Args:
            contents: also look at every byte, not only at dtypes and shapes.

        Raises:
            ValueError: begins with the tensor's name, says what was found and what is allowed.
        """

    @property
    @final
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.parts.values())

    @final
    def own_form(self) -> Iterator[str]:
        """What is wrong with the stock tensor's dtype and shape."""
        if self.dtype not in STOCK.values():
            yield f"its dtype is {self.dtype}; allowed: {', '.join(STOCK)}"
        if not self.shape or min(self.shape) < 1:
            yield f"its shape is {list(self.shape)}; allowed: at least one axis, none of length 0"


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Rows of a matrix that are worked on at once."""
    step = max(1, _CHUNK // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
