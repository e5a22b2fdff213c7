"""A sequence's state as a thing of its own: kept, copied, written to a file, continued from.

Place in the flow: `generation.py` hands one out with every answer and takes one to go on from. A Mamba's
state has the same size after ten tokens and after a million, so keeping one costs little; a hybrid's grows
with the text by what its attention keeps (keys.py).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_FORMAT = "sparsessm state 1"


@dataclass
class State:
    """What a sequence carries after its first tokens.

    Attributes:
        array: float32 (state_size,), of a model with attention longer, after the last token that was fed.
        layout: `Engine.layout` of the model it belongs to.
        pending: tokens that follow and were not fed yet, usually one: the last that was generated, or the
            last of a prompt. They are fed first when the sequence goes on.
    """

    array: Tensor
    layout: str
    pending: tuple[int, ...] = ()

    def fork(self) -> State:
        """An independent copy."""
        return State(self.array.clone(), self.layout, self.pending)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, which appears whole or not at all and replaces an existing one.

        Raises:
            ValueError: it cannot be written.
        """
        from sparsessm.checkpoint.files import write_one

        notes = {"format": _FORMAT, "layout": self.layout, "pending": json.dumps(list(self.pending))}
        write_one(Path(path), {"state": self.array.contiguous()}, notes)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> State:
        """Read what `save` wrote; whether it fits a model, `Model.generate` says.

        Raises:
            ValueError: no such file, it is corrupt or something else, or its values are not finite.
        """
        from sparsessm.checkpoint.files import from_json, read_one

        tensors, notes = read_one(Path(path))
        if notes.get("format") != _FORMAT or tensors.keys() != {"state"}:
            told = notes.get("format", "none")
            raise ValueError(f"{path}: not a saved state (format: {told}, expected: {_FORMAT})")
        try:
            pending = from_json(notes["pending"])
            layout = notes["layout"]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: a damaged state ({error!r})") from error
        if not isinstance(pending, list) or not all(type(token) is int and token >= 0 for token in pending):
            raise ValueError(f"{path}: a damaged state (pending tokens {str(pending)[:80]})")
        state = cls(tensors["state"], layout, tuple(pending))
        state.refuse_damaged(str(path))
        return state

    def refuse_damaged(self, name: str) -> None:
        """Check what can be checked without the model.

        Raises:
            ValueError: the array is no vector of float32, or holds NaN or Inf; the message begins with
                `name`.
        """
        array = self.array
        if array.dtype != torch.float32 or array.dim() != 1:
            shape = f"{str(array.dtype).removeprefix('torch.')} {tuple(array.shape)}"
            raise ValueError(f"{name}: the state is {shape}; expected a vector of float32")
        if not bool(torch.isfinite(array).all()):
            raise ValueError(f"{name}: the state holds NaN or Inf")
