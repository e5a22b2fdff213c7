"""The names and shapes of tensors in stock files, where they are not those in memory.

transformers 5 computes mixtures with the experts of a layer in one tensor and names some tensors anew, but
its files keep what they always held: a matrix for each expert, `backbone.` for `model.`. The names in
`model.state_dict()` are those of the rest of this package; these are met only here, in files and in messages
about files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from math import prod

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .tensor_file import Form

_SOME = 9
"""Rows that tell whether each is a part by itself (an expert), or all together are a few parts: OLMo-Hybrid's
and Kimi Linear's convolutions have one for queries, keys and values each, however many channels there are."""


def in_files(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What the stock writer makes of one tensor of `model.state_dict()`: the parts by their names in a file.

    Mostly the tensor itself under its own name. For a model that was read, the names that were read: stock
    code remembers which of its rules it used.
    """
    # No public function tells a file's names without writing the file; this is what `save_pretrained` calls.
    # It takes any number of tensors, and here each is one in memory and one or several in a file, so that one
    # at a time is enough and says which parts are whose. Release 4 has no other names in memory than on disk.
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {name: tensor}
    return revert_weight_conversion(model, {name: tensor})


def held_as(
    model: PreTrainedModel, wanted: Mapping[str, Tensor], present: Collection[str]
) -> dict[str, dict[str, Tensor]]:
    """How a checkpoint holds each tensor: name in memory -> names in the files, in the shapes expected there.

    Stock code also reads a tensor by its name in memory, and so it is held here if that name is there.

    Args:
        model: without memory for its weights.
        wanted: its tensors, by their names in memory.
        present: names that the files have.
    """
    found: dict[str, dict[str, Tensor]] = {}
    room = 2 * len(present)  # more parts than this are not looked for: a config may ask for any number
    for name, tensor in wanted.items():
        small = tensor.ndim < 3 or len(tensor) <= room
        if name not in present and (small or len(_names(model, name, tensor)) < min(_SOME, len(tensor))):
            found[name] = in_files(model, name, tensor)
            room -= len(found[name])
        else:
            found[name] = {name: tensor}
    gone = [name for name, parts in found.items() if not parts.keys() & set(present)]
    if gone and any(n in present and _names(model, n, tensor) != {n} for n, tensor in wanted.items()):
        found |= {name: {name: wanted[name]} for name in gone}  # a file with names as in memory lacks those
    return found


def joined(
    model: PreTrainedModel,
    name: str,
    form: Form,
    parts: Collection[str],
    part: Callable[[str], Tensor],
) -> Tensor:
    """One tensor of `model.state_dict()`, made of its parts in files: what `in_files` takes apart.

    Args:
        model: without memory for its weights.
        form: of the tensor.
        parts: their names. part: the part of a name; asked for one by one.

    Returns:
        The tensor; where there is only one part, that part itself if it has the dtype.
    """
    dtype, shape = form
    if len(parts) == 1:
        (only,) = parts
        return part(only).to(dtype).reshape(shape)
    # Stock code takes tensors apart along their first two axes, and tells only by doing it: it is given the
    # numbers of the rows, of one entry each, and what comes out are the rows of each part.
    rows = torch.arange(prod(shape[:2])).reshape(*shape[:2], *[1] * len(shape[2:]))
    whole = torch.empty(shape, dtype=dtype)
    for short, places in in_files(model, name, rows).items():
        value = part(short)
        whole.view(rows.numel(), -1)[places.reshape(-1)] = value.reshape(places.numel(), -1).to(dtype)
        del value
    return whole


def _names(model: PreTrainedModel, name: str, tensor: Tensor) -> set[str]:
    """Names of a tensor's first parts: of a thousand experts a few tell enough."""
    return set(in_files(model, name, tensor[:_SOME] if tensor.ndim else tensor))
