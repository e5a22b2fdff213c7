"""A stock model whose blocks have no weights yet, and what reads them: how `streamed.py` comes to its model.

The tensors of the source are checked as `assembly.assemble` checks them, each once, and none is kept but
those outside of blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures import adapt
from . import container
from .assembly import Assembled, Checked, Source, build, checked, most_precise, prefix_in_files
from .files import SAFETENSORS
from .opened import Opened
from .shelf import Shelf, give_back
from .stock_names import in_files
from .streamed import Read, Streamed, nowhere


def skeleton(
    opened: Opened, folder: Path | None = None, *, keep: bool = False, limit: int = 1 << 28
) -> tuple[Assembled, Streamed]:
    """The model of a checkpoint, and its residence, which reads a block when it is opened.

    Args:
        folder, keep, limit: as of `Streamed`.

    Raises:
        ValueError: as `assembly.assemble`.
    """
    source = _source(opened)
    found = checked(opened, source)
    places = found.places
    model = _without_weights(opened, found)
    reads = {name: partial(_joined, found, source, name) for name in places.held}
    coming = _of_one_block(model)
    homes: dict[nn.Parameter, Read] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in coming:
            if name in reads:
                homes[tensor] = reads[name]
        elif name in reads:
            with torch.no_grad():
                tensor.data = reads[name]()
    give_back()
    extra = Unread({name: partial(source.__getitem__, name) for name in places.extra})
    digest = hashlib.sha256(json.dumps(found.checksums, sort_keys=True).encode()).hexdigest()
    assembled = Assembled(model, most_precise(found), extra, prefix_in_files(opened, found), digest)
    staying = [parameter for parameter in model.parameters() if parameter not in homes]
    return assembled, Streamed(homes, staying, folder, keep=keep, limit=limit)


@final
class Unread(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for and not kept."""

    def __init__(self, reads: Mapping[str, Callable[[], Tensor]]) -> None:
        self._reads = reads

    def __getitem__(self, name: str) -> Tensor:
        return self._reads[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)


@final
class _Decoded:
    """The tensors of a packed file by name, in float32."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].decode(torch.float32)


def _source(opened: Opened) -> Source:
    if opened.packed is None:
        return Shelf(opened.heads, safetensors=opened.folder.stock_files.kind == SAFETENSORS)
    return _Decoded(container.Tensors(opened.packed, opened.packed.shapes))


def _without_weights(opened: Opened, found: Checked) -> PreTrainedModel:
    """The model with all that is computed and not stored; its parameters are nowhere."""
    held = found.places.held
    expected = {name: nowhere(_shape(found, name)) for name in held}
    model = build(opened, found.empty, expected)
    for parameter in model.parameters():  # those that stock code has copied, and what is ours
        parameter.data = nowhere(tuple(parameter.shape))
    # By which names the files hold them is remembered by stock code where it read them by those.
    names = {part for parts in held.values() for part in parts}
    if names != held.keys():
        parts = {part: tensor.to("meta") for some in held.values() for part, tensor in some.items()}
        like = build(opened, found.empty, parts, device="meta")
        model.__dict__["_weight_conversions"] = like.__dict__.get("_weight_conversions")
    return model


def _shape(found: Checked, name: str) -> tuple[int, ...]:
    return tuple(found.shapes[name])


def _of_one_block(model: PreTrainedModel) -> set[int]:
    """Identities of the parameters that are in one block and nowhere else."""
    blocks = adapt(model).blocks
    within = Counter(id(parameter) for block in blocks for parameter in block.layer.parameters())
    layers = {id(parameter) for parameter in model.parameters()}
    return {key for key, count in within.items() if count == 1 and key in layers}


def _joined(found: Checked, source: Source, name: str) -> Tensor:
    """A tensor of the model in float32, a new one, of the parts that the files hold."""
    parts = found.places.held[name]
    if len(parts) == 1:
        (part,) = parts
        values = source[found.names[part]].to(torch.float32, copy=True)
        return values.view(_shape(found, name))
    whole = torch.empty(_shape(found, name))
    rows = whole.view(-1, whole.shape[-1])
    # Which rows a part holds is what stock code makes of their numbers.
    numbers = torch.arange(len(rows)).view(*whole.shape[:-1], 1)
    for part, places in in_files(found.empty, name, numbers).items():
        values = source[found.names[part]]
        rows[places.flatten()] = values.reshape(-1, whole.shape[-1]).to(torch.float32)
    return whole
