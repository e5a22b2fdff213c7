"""The tensors of a checkpoint one by one: checked as `assembly.py` does, and none of them kept.

For whoever cannot have them all in memory: `at_rest.py` passes over them, `skeleton.py` makes a model of them
whose blocks are read when they are needed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import container
from .assembly import checked, most_precise, packed_prefix, stock_model
from .files import SAFETENSORS
from .opened import Opened
from .shelf import Later, Shelf, Stored, Unread
from .stock_names import in_files


class Apart(NamedTuple):
    """A checkpoint that was checked and whose tensors stay in its files.

    Attributes:
        model: without memory for its weights.
        tensors: by their names in the model, each read when it is asked for. sizes: bytes of each as stored.
        held: name in the model -> names in full in the stock files, with the shapes there.
        stored, prefix: as of `Assembled`.
        extra: what stock code leaves out on purpose, by name in the files; each read when it is asked for.
        digest: SHA-256 of all that the files hold.
        soon: says that a tensor of the model will be asked for; takes no memory.
    """

    model: PreTrainedModel
    tensors: Unread
    sizes: Mapping[str, int]
    held: dict[str, dict[str, Tensor]]
    stored: dict[str, torch.dtype]
    prefix: str
    extra: Mapping[str, Tensor]
    digest: str
    soon: Callable[[str], None]


def one_by_one(opened: Opened) -> Apart:
    """Read and check the tensors of a checkpoint as `assemble` does, without a model.

    Raises:
        ValueError: as `assemble`.
    """
    if (header := opened.packed) is not None:
        model, expected, _ = stock_model(opened.source, opened.config, opened.own)
        tensors = container.Tensors(header, {name: tuple(t.shape) for name, t in expected.items()})
        for name in tensors:
            tensors[name]  # refuses a damaged one
        stored = {name: header.stock[name][1] for name in tensors}
        held = {name: in_files(model, name, tensor) for name, tensor in expected.items()}
        names = {part for parts in held.values() for part in parts}
        prefix, digest = packed_prefix(opened, model, names), _digest(header.checksums)
        return Apart(model, tensors, header.sizes, held, stored, prefix, {}, digest, tensors.soon)
    shelf = Shelf(opened.heads, safetensors=opened.folder.stock_files.kind == SAFETENSORS)
    found = checked(opened, shelf)
    places, stored = found.places, most_precise(found)
    parts = {name: {part: found.names[part] for part in some} for name, some in places.held.items()}
    tensors = Stored(shelf, found.empty, parts, stored)
    extra, digest = Later({name: partial(shelf.__getitem__, name) for name in places.extra}), found.checksums
    sizes = {name: math.prod(shape) * stored[name].itemsize for name, shape in tensors.shapes.items()}
    kept = extra, _digest(digest), tensors.soon
    return Apart(found.empty, tensors, sizes, places.held, stored, places.prefix, *kept)


def _digest(checksums: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(checksums), sort_keys=True).encode()).hexdigest()
