"""The tensors of a checkpoint: hold them against the model of its `config.json`, and fill that with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..architectures import projected
from ..architectures.own import Own
from . import container, state_spaces
from .encoding import finite
from .files import CONFIG, few, read_tensors
from .shelf import Shelf, Stored, give_back
from .stock_names import held_as, in_files

STOCK = Own()  # nothing of its own
FREED = 1 << 25  # bytes of tensors that were looked at and dropped, before their pages are given back


def assemble(
    source: str, folder: Path, config: transformers.PretrainedConfig, packed: container.Header | None
) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """Read, check and assemble the tensors; returns the model and the dtype each tensor had on disk."""
    own = STOCK if packed is None else Own.told_by(packed.shapes, config)
    empty, held, tensors, stored, _ = _checked(source, folder, config, packed, own)
    if packed is not None:  # It has the names in memory; with those on disk `save` will write the like.
        tensors = {part: t for name in held for part, t in in_files(empty, name, tensors[name]).items()}
    # What no stock model has comes in behind the stock code, which would leave it out.
    wide = tuple(f"backbone.layers.{index}." for index in own.widths)
    names = [*projected.named_in(tensors), *(name for name in tensors if wide and name.startswith(wide))]
    ours = {name: tensors.pop(name) for name in names}
    with torch.random.fork_rng([], enabled=bool(own)):  # stock code draws for what is left out here
        model = type(empty).from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)
    own.give(model)
    model.load_state_dict(ours, strict=False)
    most_precise = {
        name: reduce(torch.promote_types, [stored[part] for part in parts]) for name, parts in held.items()
    }
    return model.eval(), most_precise


def one_by_one(source: str, folder: Path, config: transformers.PretrainedConfig) -> Stored:
    """Read and check a stock checkpoint as `assemble` does, without a model: its tensors come when asked for.

    Only for models whose tensors have the same names in files and in memory, which those that run have.
    """
    shelf = Shelf(folder)
    _, held, tensors, _, names = _checked(source, folder, config, None, STOCK, shelf)
    whole = {name: part for name, parts in held.items() for part in parts}
    shapes = {name: tuple(tensors[part].shape) for name, part in whole.items()}
    return Stored(shelf, {name: names[part] for name, part in whole.items()}, shapes)


def _checked(
    source: str,
    folder: Path,
    config: transformers.PretrainedConfig,
    packed: container.Header | None,
    own: Own,
    shelf: Shelf | None = None,
) -> tuple[
    PreTrainedModel,
    dict[str, dict[str, Tensor]],
    dict[str, Tensor],
    dict[str, torch.dtype],
    dict[str, str],
]:
    """Read all tensors and hold them against the model.

    Args:
        shelf: where a tensor can be had again; with it none is kept, only shapes.

    Returns:
        The model without memory; name in memory -> names in files; by these the tensors in float32, or on
        `meta`, the dtypes they had, and the names they really had, which may be the other one of two.
    """
    empty, expected, copies = stock_model(source, config, own)
    tensors: dict[str, Tensor] = {}  # by their names in the files, as all that is said about them
    stored: dict[str, torch.dtype] = {}
    names: dict[str, str] = {}
    not_finite: list[str] = []

    def differ(name: str, value: Tensor) -> bool:
        other = tensors[name] if shelf is None else shelf[names[name]]
        return not torch.equal(other.float(), value.float())

    for given, value, dtype in _weights(folder, packed, expected, copied=shelf is None):
        # In both formats: transformers' own MambaModel maps the original name when it loads a state dict.
        name = state_spaces.to_transformers(given)
        if not finite(value):
            not_finite.append(name)
        if name in tensors and differ(name, value):
            raise ValueError(f"{source!r} holds two different tensors for {name}, under its two names")
        tensors[name], stored[name] = value if shelf is None else value.to("meta"), dtype
        names[name] = given
    held = held_as(empty, expected, tensors)
    held_copies = held_as(empty, {copy: expected[name] for copy, name in copies.items()}, tensors)
    ties = ((held_copies[copy], held[name]) for copy, name in copies.items())
    # A tied pair may be stored under either name, or both.
    for copy, name in (pair for names in ties for pair in zip(*names, strict=False)):
        if copy not in tensors:
            continue
        value, dtype, given = tensors.pop(copy), stored.pop(copy), names.pop(copy)
        if name not in tensors:
            tensors[name], stored[name], names[name] = value, dtype, given
        elif not {copy, name} & set(not_finite) and differ(name, value if shelf is None else shelf[given]):
            raise ValueError(f"{source!r}: {copy} differs from {name}, although {CONFIG} ties the two")
    wanted = {part: tensor for parts in held.values() for part, tensor in parts.items()}
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    faults = {
        "missing tensors": [name for name in wanted if name not in tensors],
        "tensors the model does not have": [name for name in tensors if name not in wanted],
        "wrong shapes": shapes,
        "NaN or Inf in": not_finite,
    }
    if any(faults.values()):
        told = "; ".join(f"{what}: {few(names)}" for what, names in faults.items() if names)
        raise ValueError(f"{source!r} does not hold the model of its {CONFIG}: {told}")
    return empty, held, tensors, stored, names


def stock_model(
    source: str, config: transformers.PretrainedConfig, own: Own = STOCK
) -> tuple[PreTrainedModel, dict[str, Tensor], dict[str, str]]:
    """The stock model of a configuration without memory for its weights, and its tensors (see `untied`).

    Args:
        own: what it has that the configuration cannot say.
    """
    try:
        with torch.device("meta"):  # shapes only
            empty = transformers.AutoModelForCausalLM.from_config(config)
            empty.tie_weights()
            own.give(empty)
    except Exception as error:
        raise ValueError(f"{source}/{CONFIG} describes no model that can be built: {error}") from error
    return empty, *untied(empty)


def _weights(
    folder: Path, packed: container.Header | None, expected: Mapping[str, Tensor], copied: bool
) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """(name, tensor, dtype on disk) of every tensor; `copied`: in float32 and in memory of its own."""
    if packed is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        for name, encoded in container.read_tensors(packed, shapes):
            yield name, encoded.decode(torch.float32), encoded.dtype
        return
    used = 0
    for name, tensor in read_tensors(folder):
        if not copied:
            used += tensor.nbytes
            yield name, tensor, tensor.dtype
            if used > FREED:
                give_back()
                used = 0
            continue
        # A copy even in the same dtype: the file would stay mapped, and whoever rewrites it change the model.
        value = tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()
        yield name, value, tensor.dtype


def untied(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors a checkpoint holds, each once, and the tied names: copy -> the name it is stored under."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    copies: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            copies[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, copies
