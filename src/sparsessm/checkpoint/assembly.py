"""The tensors of a checkpoint: hold them against the model of its `config.json`, and fill that with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..architectures import projected
from ..architectures.own import Own
from ..kernels.checksum import crc32c
from . import container, state_spaces
from .encoding import finite
from .files import CONFIG, few, read_tensors
from .known_fields import optional
from .opened import Opened
from .shelf import Shelf, give_back
from .stock_names import held_as, in_files
from .wrapped import alone

STOCK = Own()  # nothing of its own
FREED = 1 << 25  # bytes of tensors that were looked at and dropped, before their pages are given back
STORED = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that weights may have. They are computed in float32, which holds these exactly: what nobody
changes goes out as it came. float64 would lose half of its digits, whole numbers their repaired values."""


@dataclass(frozen=True)
class Assembled:
    """A model and what its files had.

    Attributes:
        model: in float32, in eval mode.
        stored: dtype on disk of each tensor, by its name in `model.state_dict()`.
        extra: tensors that stock code leaves out on purpose, as they came, by their names in the files.
        prefix: what the names in the files leave out, "" but for a bare backbone.
        digest: SHA-256 of all that the files hold; "" where all is in memory.
    """

    model: PreTrainedModel
    stored: dict[str, torch.dtype]
    extra: Mapping[str, Tensor]
    prefix: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Places:
    """Where the files of a checkpoint hold the tensors of a model; known from names alone.

    Attributes:
        held: name in memory -> names in full in the files, with the shapes that are expected there.
        ties: (name in full of a copy, name in full of what it is a copy of).
        prefix: what the names in the files leave out: name in full = prefix + name in the file.
        extra: names in the files of what stock code leaves out on purpose.
    """

    held: dict[str, dict[str, Tensor]]
    ties: tuple[tuple[str, str], ...]
    prefix: str
    extra: frozenset[str]

    @property
    def wanted(self) -> dict[str, Tensor]:
        """Name in full in the files -> a tensor of the shape expected there."""
        return {part: tensor for parts in self.held.values() for part, tensor in parts.items()}

    def in_full(self, name: str) -> str:
        """The name of a tensor in full, from that in a file."""
        return in_full(self.prefix, name)


def in_full(prefix: str, name: str) -> str:
    """The name of a tensor in full, from that in a file that leaves a prefix out."""
    # In both formats: transformers' own MambaModel maps the original name when it loads a state dict.
    return alone(state_spaces.to_transformers(prefix + name))


def find_places(
    empty: PreTrainedModel,
    expected: Mapping[str, Tensor],
    copies: Mapping[str, str],
    present: Collection[str],
) -> Places:
    """Where the files hold each tensor of a model (see `Places`).

    Args:
        empty: the model, without memory for its weights; `expected` and `copies` are its (`stock_model`).
        present: the names in the files.
    """
    ignored = {name for name in present if _ignored(empty, name)}
    prefix = _left_out(empty, expected, [name for name in present if name not in ignored])
    full = {in_full(prefix, name) for name in present}
    held = held_as(empty, expected, full)
    held_copies = held_as(empty, {copy: expected[name] for copy, name in copies.items()}, full)
    pairs = ((held_copies[copy], held[name]) for copy, name in copies.items())
    ties = tuple(pair for names in pairs for pair in zip(*names, strict=False))
    found = Places(held, ties, prefix, frozenset())
    known = found.wanted.keys() | {copy for copy, _ in ties}
    return replace(found, extra=frozenset(name for name in ignored if found.in_full(name) not in known))


def refuse_misfit(
    source: str, places: Places, shapes: Mapping[str, tuple[int, ...]], not_finite: Iterable[str] = ()
) -> None:
    """Refuse files that do not hold the model of their configuration.

    Args:
        shapes: of the tensors in the files by their names in full, of tied ones once, without the extra ones.
        not_finite: names of those that hold NaN or Inf.

    Raises:
        ValueError: tensors are missing, not known, of another shape or not finite; names the first of them.
    """
    wanted = places.wanted
    missing = [name for name in wanted if name not in shapes]
    if places.prefix and missing and not any(name.startswith(places.prefix) for name in missing):
        raise ValueError(
            f"{source!r} is a bare backbone without {few(missing)}, and {CONFIG} does not tie it to the "
            "embedding; give the whole model"
        )
    wrong = [
        f"{name} {tuple(shapes[name])}, expected {tuple(wanted[name].shape)}"
        for name in wanted
        if name in shapes and tuple(shapes[name]) != tuple(wanted[name].shape)
    ]
    faults = {
        "missing tensors": missing,
        "tensors the model does not have": [name for name in shapes if name not in wanted],
        "wrong shapes": wrong,
        "NaN or Inf in": list(not_finite),
    }
    if any(faults.values()):
        told = "; ".join(f"{what}: {few(names)}" for what, names in faults.items() if names)
        raise ValueError(f"{source!r}: its tensors do not fit {CONFIG}: {told}")


def assemble(opened: Opened) -> Assembled:
    """Read, check and assemble the tensors of a checkpoint."""
    found = checked(opened)
    tensors, prefix = found.tensors, found.places.prefix
    if opened.packed is not None:  # It has the names in memory; with those on disk `save` writes the like.
        parts = {name: in_files(found.empty, name, tensors[name]) for name in found.places.held}
        tensors = {part: tensor for some in parts.values() for part, tensor in some.items()}
        prefix = packed_prefix(opened, found.empty, tensors)
    return Assembled(build(opened, found.empty, tensors), most_precise(found), found.extra, prefix)


def float32_bytes(opened: Opened) -> int:
    """What a model takes in memory."""
    _, expected, _ = stock_model(opened.source, opened.config, opened.own)
    return sum(4 * tensor.numel() for tensor in expected.values())


def build(
    opened: Opened,
    empty: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    device: str = "cpu",
    nowhere: Callable[[tuple[int, ...]], Tensor] | None = None,
) -> PreTrainedModel:
    """The model of these tensors, in float32 and in eval mode.

    Args:
        tensors: by their names in files, or in memory.
        nowhere: shape -> what holds no values; given if `tensors` are such, so that no layer takes memory
            for longer than it is made.
    """
    own, tensors = opened.own, dict(tensors)
    # What no stock model has comes in behind the stock code, which would leave it out.
    wide = tuple(f"backbone.layers.{index}." for index in own.widths)
    names = [*projected.named_in(tensors), *(name for name in tensors if wide and name.startswith(wide))]
    ours = {name: tensors.pop(name) for name in names}
    if nowhere is not None and wide:  # in place of layers that stock code would fill with random numbers
        _, stock, _ = stock_model(opened.source, opened.config)
        tensors |= {n: nowhere(tuple(t.shape)) for n, t in stock.items() if n.startswith(wide)}
    placed: dict[str, Any] = {} if device == "cpu" else {"device_map": {"": device}}
    with torch.random.fork_rng([], enabled=bool(own)):  # stock code draws for what is left out here
        model = type(empty).from_pretrained(
            None, config=opened.config, state_dict=tensors, dtype=torch.float32, **placed
        )
    own.give(model, None if nowhere is None else partial(_emptied, nowhere))
    if nowhere is None:
        model.load_state_dict(ours, strict=False)
    return model.eval()


def _emptied(nowhere: Callable[[tuple[int, ...]], Tensor], layer: torch.nn.Module) -> None:
    """Its weights take no memory."""
    for parameter in layer.parameters():
        parameter.data = nowhere(tuple(parameter.shape))


def most_precise(found: Checked) -> dict[str, torch.dtype]:
    """Name in the model -> dtype of the tensor; of one that is several in the files one that holds all."""
    return {
        name: reduce(torch.promote_types, [found.stored[part] for part in parts])
        for name, parts in found.places.held.items()
    }


def packed_prefix(opened: Opened, model: PreTrainedModel, names: Collection[str]) -> str:
    """What the names in the stock files of a packed model leave out; `names` are those in full."""
    bare = opened.fields.get("architectures") == [type(model.base_model).__name__]
    return _bare_prefix(model, names) if bare else ""


class Checked(NamedTuple):
    """Tensors of a checkpoint that fit its model.

    Attributes:
        empty: the model, without memory for its weights. places: where the files hold what.
        tensors: by their names in full in the files, in float32; on `meta` if they can be had again.
        stored: the dtypes that they had. names: the names that they had, which may be the other one of two.
        extra: those that stock code leaves out on purpose, as they came.
        checksums: of what the files hold, by the names there; only where no tensor is kept.
    """

    empty: PreTrainedModel
    places: Places
    tensors: dict[str, Tensor]
    stored: dict[str, torch.dtype]
    names: dict[str, str]
    extra: dict[str, Tensor]
    checksums: dict[str, str]


def checked(opened: Opened, shelf: Shelf | None = None) -> Checked:
    """Read all tensors and hold them against the model.

    Args:
        shelf: where a tensor can be had again; with it none is kept, only shapes.
    """
    source = opened.source
    empty, expected, copies = stock_model(source, opened.config, opened.own)
    places = find_places(empty, expected, copies, opened.names)
    tensors: dict[str, Tensor] = {}  # by their names in full, as all that is said about them
    stored: dict[str, torch.dtype] = {}
    names: dict[str, str] = {}
    extra: dict[str, Tensor] = {}
    not_finite: list[str] = []
    checksums: dict[str, str] = {}

    def differ(name: str, value: Tensor) -> bool:
        other = tensors[name] if shelf is None else shelf[names[name]]
        if other.dtype != value.dtype:
            other, value = other.float(), value.float()
        return not torch.equal(other, value)

    for given, tensor, dtype in _weights(opened, expected):
        if given in places.extra:
            if shelf is None:
                extra[given] = tensor.clone()
            continue
        name = places.in_full(given)
        if dtype in STORED and not finite(tensor):
            not_finite.append(name)
        if shelf is not None:
            bits = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            checksums[given] = f"{dtype} {tuple(tensor.shape)} {crc32c(bits):08x}"
        if name in tensors and differ(name, tensor):
            raise ValueError(f"{source!r} holds two different tensors for {name}, under two names")
        if shelf is not None:
            value = tensor.to("meta")
        else:
            # A copy even in the same dtype: the file would stay mapped, and whoever rewrites it change the
            # model.
            value = tensor.to(torch.float32, copy=True) if dtype in STORED else tensor.clone()
        tensors[name], stored[name], names[name] = value, dtype, given
    _refuse_dtypes(source, [*places.wanted, *(copy for copy, _ in places.ties)], stored)
    # A tied pair may be stored under either name, or both.
    for copy, name in places.ties:
        if copy not in tensors:
            continue
        value, dtype, given = tensors.pop(copy), stored.pop(copy), names.pop(copy)
        if name not in tensors:
            tensors[name], stored[name], names[name] = value, dtype, given
        elif not {copy, name} & set(not_finite) and differ(name, value if shelf is None else shelf[given]):
            raise ValueError(f"{source!r}: {copy} differs from {name}, although {CONFIG} ties the two")
    refuse_misfit(source, places, {name: tuple(t.shape) for name, t in tensors.items()}, not_finite)
    return Checked(empty, places, tensors, stored, names, extra, checksums)


def _ignored(empty: PreTrainedModel, name: str) -> bool:
    """Whether stock code leaves a tensor out on purpose: parts of other tasks, and what it computes anew."""
    patterns = [*(optional(empty, "_keys_to_ignore_on_load_unexpected") or ()), r"rotary_emb\.inv_freq"]
    return any(re.search(pattern, name) for pattern in patterns)


def _left_out(empty: PreTrainedModel, expected: Mapping[str, Tensor], present: Collection[str]) -> str:
    """What the names of a bare backbone leave out, as the stock writer of such a class does; else ""."""
    if not present or any(name.startswith(("backbone.", "model.", "lm_head.")) for name in present):
        return ""
    first = {name: tensor[:2] if tensor.ndim else tensor for name, tensor in expected.items()}
    names = {part for name, tensor in first.items() for part in in_files(empty, name, tensor)}
    prefix = _bare_prefix(empty, names)
    return prefix if any(prefix + name in names for name in present) else ""


def _bare_prefix(empty: PreTrainedModel, names: Collection[str]) -> str:
    """The prefix of the backbone in files; `names` are those of the whole model there."""
    likely = (f"{empty.base_model_prefix}.", "backbone.", "model.")
    return next((p for p in likely if any(name.startswith(p) for name in names)), "")


def _refuse_dtypes(source: str, names: Iterable[str], stored: Mapping[str, torch.dtype]) -> None:
    """Refuse weights of the model in dtypes that cannot hold the result; those of no weight do not matter."""
    held = dict.fromkeys(name for name in names if name in stored)
    if strange := [f"{name} {_word(stored[name])}" for name in held if stored[name] not in STORED]:
        raise ValueError(
            f"{source!r} has weights of a dtype that cannot hold the result: {few(strange)}; allowed: "
            f"{', '.join(map(_word, STORED))}"
        )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
        raise ValueError(f"{source}/{CONFIG} does not describe a model that can be built: {error}") from error
    return empty, *untied(empty)


def _weights(opened: Opened, expected: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """(name, tensor, dtype on disk) of every tensor; of a packed file in float32, of others as stored."""
    if opened.packed is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        for name, encoded in container.read_tensors(opened.packed, shapes):
            yield name, encoded.decode(torch.float32), encoded.dtype
        return
    used = 0
    for name, tensor in read_tensors(opened.folder.stock_files):
        used += tensor.nbytes
        yield name, tensor, tensor.dtype
        if used > FREED:
            del tensor
            give_back()
            used = 0


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
