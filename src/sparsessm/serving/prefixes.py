"""States of prompts that were read before, so that a common beginning is read once.

Place in the flow: `scheduler.py` asks it before it reads a prompt. A state space model's state has one size
however long the text is, so a prefix of any length costs the same few megabytes; a hybrid's has the keys and
values of its tokens beside them. What is kept: the state at
the end of each prompt, at the end of each answer (where the next turn of a chat goes on), and where a prompt
left the path of an earlier one. States at branches are how Marconi (Pan et al., 2024, arXiv 2411.19379) makes
prefix caching work for recurrent models, which cannot be cut back to an earlier token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

MOST = 1024  # states, however small they are: a search compares with each
SHORTEST = 32  # tokens that are worth a state


class Kept(NamedTuple):
    """A prefix. tokens: int64. array: the state after it, never changed. logits: after it, where known."""

    tokens: np.ndarray
    array: Tensor
    logits: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.array.nbytes + (0 if self.logits is None else self.logits.nbytes)


class Prefixes:
    """Kept states, at most so many bytes of them; the least recently used one goes first.

    Of one thread.

    Attributes:
        limit: bytes; 0 keeps nothing. nbytes: that are taken.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, ids: Sequence[int]) -> tuple[Kept | None, int]:
        """The longest kept prefix of a prompt, and how many tokens it shares with anything that is kept.

        A prefix that is the whole prompt counts only with its logits: something must say what comes next.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        best, shared = None, 0
        for key, kept in self._kept.items():
            common = agreement(kept.tokens, tokens)
            shared = max(shared, common)
            usable = common == len(kept.tokens) and (common < len(tokens) or kept.logits is not None)
            if usable and (best is None or common > len(best[1].tokens)):
                best = key, kept
        if best is None:
            return None, shared
        self._kept.move_to_end(best[0])
        return best[1], shared

    def keep(self, ids: Sequence[int], array: Tensor, logits: Tensor | None = None) -> None:
        """Keep the state after `ids`; both tensors are copied."""
        if len(ids) < SHORTEST or not self.limit:
            return
        tokens = np.asarray(ids, dtype=np.int64)
        key = tokens.tobytes()
        if (known := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            if logits is None or known.logits is not None:
                return
            self._drop(key)
        kept = Kept(tokens, array.clone(), None if logits is None else logits.clone())
        if kept.nbytes > self.limit:
            return
        self._kept[key] = kept
        self.nbytes += kept.nbytes
        while self.nbytes > self.limit or len(self._kept) > MOST:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: bytes) -> None:
        self.nbytes -= self._kept.pop(key).nbytes


def agreement(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two texts have in common at their beginning."""
    most = min(len(one), len(other))
    differ = one[:most] != other[:most]
    return int(differ.argmax()) if differ.any() else most
