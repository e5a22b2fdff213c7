"""A stock model whose blocks have no weights yet, and what reads them: how `streamed.py` comes to its model.

The tensors of the source are checked as `assembly.assemble` checks them, each once, and none is kept but
those outside of blocks.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures import adapt
from .apart import Apart, one_by_one
from .assembly import Assembled, build
from .opened import Opened
from .shelf import give_back
from .streamed import Source, Streamed, nowhere


def skeleton(
    opened: Opened, folder: Path | None = None, *, keep: bool = False, limit: int = 1 << 28
) -> tuple[Assembled, Streamed]:
    """The model of a checkpoint, and its residence, which reads a block when it is opened.

    Args:
        folder, keep, limit: as of `Streamed`.

    Raises:
        ValueError: as `assembly.assemble`.
    """
    found = one_by_one(opened)
    model = _without_weights(opened, found)
    sources = {name: _Stored(found, name) for name in found.held}
    coming = _of_one_block(model)
    homes: dict[nn.Parameter, Source] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in coming and name in sources:
            homes[tensor] = sources[name]
        elif name in sources:
            tensor.data = sources[name].read()
    give_back()
    staying = [parameter for parameter in model.parameters() if parameter not in homes]
    assembled = Assembled(model, found.stored, found.extra, found.prefix, found.digest)
    return assembled, Streamed(homes, staying, folder, keep=keep, limit=limit)


@final
class _Stored(Source):
    """A tensor of the model in the source's files."""

    def __init__(self, found: Apart, name: str) -> None:
        self._found, self._name = found, name

    def read(self) -> Tensor:
        return self._found.tensors[self._name].decode(torch.float32)

    def soon(self) -> None:
        self._found.soon(self._name)


def _without_weights(opened: Opened, found: Apart) -> PreTrainedModel:
    """The model with all that is computed and not stored; its parameters are nowhere."""
    none = {name: nowhere(shape) for name, shape in found.tensors.shapes.items()}
    model = build(opened, found.model, none, nowhere=nowhere)
    for parameter in model.parameters():  # those that stock code has copied, and what is ours
        parameter.data = nowhere(tuple(parameter.shape))
    # By which names the files hold them is remembered by stock code where it read them by those.
    names = {part for parts in found.held.values() for part in parts}
    if names != found.held.keys():
        parts = {part: tensor.to("meta") for some in found.held.values() for part, tensor in some.items()}
        like = build(opened, found.model, parts, device="meta")
        model.__dict__["_weight_conversions"] = like.__dict__.get("_weight_conversions")
    return model


def _of_one_block(model: PreTrainedModel) -> set[int]:
    """Identities of the parameters that are in one block and nowhere else."""
    blocks = adapt(model).blocks
    within = Counter(id(parameter) for block in blocks for parameter in block.layer.parameters())
    return {key for key, count in within.items() if count == 1}
