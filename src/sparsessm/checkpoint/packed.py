"""Packed checkpoints: what is encoded how, a directory written and read, and the form the runtime takes.

Stage 5, behind `writing.py`: a stock checkpoint of a pruned model goes in, a directory that is smaller by
what was removed comes out, and `unpack` gives the stock checkpoint back. `encoding.py` is one tensor,
`container.py` the file; `docs/sparse-format.md` defines both.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from ..architectures import REMOVED_A_LOG, REMOVED_A_LOG_FLOAT16
from ..architectures.own import Own
from . import container, packed_file, reading, writing
from .apart import one_by_one
from .assembly import stock_model
from .at_rest import at_rest, left_out
from .coded import OnGrid, code
from .container import PACKED, Format
from .encoding import TRIED, encode
from .files import CONFIG, parse_json
from .opened import Opened, open_checkpoint, quiet
from .packed_file import Outline
from .packed_tensor import PackedTensor
from .reading import Checkpoint
from .shelf import Unread
from .stacked import stacked
from .values import stored_forms, stored_tensor
from .wrapped import alone_fields, is_wrapped
from .writing import refuse_existing, write

DTYPES = ("fp32", "bf16", "int8")
_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MIXERS = "in_proj|x_proj|out_proj|in_proj_qkvz?|in_proj_z"
_OTHERS = (
    "[qkvog]_proj|gate_proj|up_proj|gate_up_proj|down_proj|input_linear|output_linear"  # attention, MLPs
)
# Latent attention and latent experts; what brings Zamba2's shared blocks to each of their places.
_NARROW = r"[qg]_[ab]_proj|kv_a_proj_with_mqa|kv_b_proj|fc[12]_latent_proj|linear|\w+_adapter_list\.\d+\.[01]"
# The matrices of all experts of a layer: the one kind of tensor that has several.
_EXPERTS = re.compile(r".*\.experts\.(gate_up_proj|up_proj|down_proj)")
# Routers and gates are small and decide; dt_proj is small (a rank of d_model / 16) and sets the step sizes,
# which the state multiplies up.
_INT8 = re.compile(rf".*\.({_MIXERS}|{_OTHERS}|{_NARROW})\.weight|{_EXPERTS.pattern}(\.\d+)?")
_LINEAR = re.compile(rf".*\.dt_proj\.weight|{_INT8.pattern}")
_HEAD = re.compile(r"(backbone|model)\.(embeddings|embed_tokens)\.weight|lm_head\.weight")

# of A_log; a float16 file that was made float32 keeps the value that it had
_REMOVED = tuple(dict.fromkeys((*REMOVED_A_LOG.values(), *REMOVED_A_LOG_FLOAT16.values())))


@dataclass(frozen=True, eq=False)
class Packed:
    """A model as it is stored, its tensors not decoded: what the runtime starts from.

    Attributes:
        source: what `read` or `stream` was given.
        format: of the stock checkpoint that `unpack` writes.
        config: of the stock model.
        tensors: by stock name, as in transformers; a tied head is stored once, under the embedding's name.
        generation: what its `generation_config.json` says, None if there is none.
        tokenizer: call it for the tokenizer; its one argument may name another one, as `load`'s does.
        notes: what of the source is not followed, as `Checkpoint.notes`.
    """

    source: str
    format: Format
    config: PretrainedConfig
    tensors: Mapping[str, PackedTensor]
    generation: GenerationConfig | None = field(repr=False)
    tokenizer: Callable[..., PreTrainedTokenizerBase] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, eq=False)
class Packing:
    """What `pack` did.

    Attributes:
        file: what was written.
        sizes: bytes of the source's tensors by stock name, in their stored dtypes; of tied ones once.
        outline: how they lie in the file.
        notes: what of the source is not followed, or not in what was written.
    """

    file: Path
    sizes: dict[str, int]
    outline: Outline
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> Mapping[str, PackedTensor]:
        """What was written, by stock name; each is read from the file when it is asked for."""
        header = container.read_header(self.file)
        return container.Tensors(header, header.shapes)

    @property
    def after(self) -> int:
        """Bytes of the packed file, its header included."""
        return self.outline.nbytes

    @property
    def before(self) -> int:
        """Bytes of all of the source's tensors."""
        return sum(self.sizes.values())

    @property
    def ratio(self) -> float:
        return self.after / self.before


def read(source: str | os.PathLike[str] | Opened, *, check: bool = True) -> Packed:
    """Read a packed directory; the file can be changed or removed afterwards.

    Args:
        source: the directory, or a hub id; or one that is open.
        check: look at every byte of the arrays. Without it only what the head of the file says is checked,
            which is for files that this machine has checked before: wrong arrays then give wrong tensors.

    Raises:
        ValueError: not a packed checkpoint, a version that is not known here, truncated or corrupt, or not
            the model of its `config.json`; says the file, and the tensor where it is one.
    """
    opened = open_checkpoint(source)
    refuse_stock(opened)
    found = stream(opened, check=check)
    return replace(found, tensors=dict(found.tensors))


def stream(source: str | os.PathLike[str] | Opened, *, check: bool = True) -> Packed:
    """A packed or stock directory, its tensors read one by one, when they are asked for, and not kept.

    Of a stock one every tensor is dense in its stored dtype, and looked at here once: what `load` would
    refuse is refused. Its tensors may be mapped, and a copy must be made of what is to stay.

    Args:
        source, check: as for `read`; a stock directory is always checked.

    Raises:
        ValueError: as `read` or `load`; of a packed file's arrays when they are asked for.
    """
    opened = open_checkpoint(source)
    with quiet():
        config, header = opened.config, opened.packed
        if header is None:
            tensors: Mapping[str, PackedTensor] = one_by_one(opened).tensors
        else:
            _, expected, _ = stock_model(opened.source, config, opened.own)
            shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
            tensors = container.Tensors(header, shapes, check)
    words = partial(_tokenizer, opened)
    found = opened.format, config, tensors, opened.generation
    return Packed(opened.source, *found, words, opened.notes)


def of(checkpoint: Checkpoint) -> Packed:
    """A checkpoint in memory in the same form, every tensor dense in its stored dtype."""
    names = stored_forms(checkpoint)
    tensors = {name: encode(name, stored_tensor(checkpoint, name), kind="dense") for name in names}
    config, generation = copy.deepcopy((checkpoint.model.config, checkpoint.model.generation_config))
    words = partial(_held, checkpoint.tokenizer)
    return Packed(checkpoint.source, checkpoint.format, config, tensors, generation, words, checkpoint.notes)


def pack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    head: str | None = None,
    force: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Packing:
    """Write a checkpoint as a packed directory, whole or not at all.

    Args:
        source: whatever `load` takes and is not packed yet, or a model that no stock checkpoint can hold.
        out: the directory to make.
        dtype: None keeps every value as it is. "fp32" and "bf16": of the linear layers' matrices, those of
            experts among them, embedding and head. "int8": the same, one scale a row, without dt_proj,
            embedding and head. All else keeps its dtype.
        head: "int8" also for the embedding and the head.
        force: replace a checkpoint that is already there.
        tokenizer: as for `load`.

    Raises:
        ValueError: as `load` and `refuse_existing`; the source is packed (and could be stock, or is in int8);
            an option that is not known; a value that the dtype does not have.
        OSError: writing failed; nothing is left behind, an old target is intact.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}, or none for lossless")
    if head not in (None, "int8"):
        raise ValueError(f"unknown dtype {head!r} of the head; known: int8, or none to leave it")
    source = os.fspath(source)
    refuse_existing(out, force, source)
    opened = open_checkpoint(source)
    if opened.packed is not None:
        if not opened.own:
            raise ValueError(
                f"{source!r} is already packed; unpack it first, or pack the model it was made from"
            )
        if any(name.endswith(".scale") for name in opened.packed.spans):
            raise ValueError(f"{source!r} is already in int8; pack the model it was made from")
    found = at_rest(opened, tokenizer)
    checkpoint = _alone(found.checkpoint)
    tensors = _Smallest(found.tensors.shapes, found.stored, opened.record or {}, dtype, head)
    outline = packed_file.outline(checkpoint.format, tensors)
    weights = partial(_write, checkpoint.format, tensors, outline)
    write(checkpoint, out, weights, outline.nbytes, opened.ours, force)
    notes = (*checkpoint.notes, *left_out(found.extra))
    sizes = {name: form.nbytes for name, form in stored_forms(checkpoint).items()}
    return Packing(Path(out) / PACKED, sizes, outline, notes)


def save(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    record: Mapping[str, Any] | None = None,
    card: str | None = None,
    force: bool = False,
    levels: Mapping[str, OnGrid] | None = None,
) -> Path:
    """As `writing.save`; packed, without loss, where a stock checkpoint cannot hold the model.

    Args:
        levels: of the matrices that are on a grid, by name: a stock checkpoint would round them.
    """
    if not levels and not Own.of(checkpoint.model):
        return writing.save(checkpoint, path, record=record, card=card, force=force)
    refuse_existing(path, force, checkpoint.source)  # before the work
    forms = stored_forms(checkpoint)
    shapes = {name: form.shape for name, form in forms.items()}
    tensors = _Smallest(shapes, partial(stored_tensor, checkpoint), record or {}, levels=levels or {})
    outline = packed_file.outline(checkpoint.format, tensors)
    checkpoint, ours = _alone(checkpoint), writing.beside(record, card)
    weights = partial(_write, checkpoint.format, tensors, outline)
    return write(checkpoint, path, weights, outline.nbytes, ours, force)


def _alone(checkpoint: Checkpoint) -> Checkpoint:
    """With the configuration of the model that a packed file holds: of a larger one the language model."""
    fields = parse_json(checkpoint.files.get(CONFIG, b"{}"), CONFIG)
    if not is_wrapped(fields):
        return checkpoint
    own = alone_fields(fields, type(checkpoint.model).__name__)
    return replace(checkpoint, files=checkpoint.files | {CONFIG: (json.dumps(own, indent=2) + "\n").encode()})


def _write(format: Format, tensors: Mapping[str, PackedTensor], outline: Outline, folder: Path) -> None:
    packed_file.write(folder / PACKED, format, tensors, outline)


class _Smallest(Unread):
    """The tensors of a checkpoint, each in the form that takes the least room, made when it is asked for."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        stored: Callable[[str], Tensor],
        record: Mapping[str, Any],
        dtype: str | None = None,
        head: str | None = None,
        levels: Mapping[str, OnGrid] = MappingProxyType({}),
    ) -> None:
        """Of a checkpoint.

        Args:
            shapes: by name. stored: the tensor of a name in the dtype it is stored in.
            record: of the run that it came from. dtype, head: as of `pack`.
            levels: of the matrices that are on a grid, by name, of an expert with its number.
        """
        self._shapes, self._stored, self._dtype, self._head = shapes, stored, dtype, head
        self._patterns, self._levels = _patterns(record), levels
        # Kind and removed value of what was made before: the second time nothing is tried.
        self._found: dict[str, tuple[str, float]] = {}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As `Unread.shapes`."""
        return self._shapes

    def __getitem__(self, name: str) -> PackedTensor:
        tensor = self._stored(name)
        if self._dtype in _FLOATS and (_LINEAR.fullmatch(name) or _HEAD.fullmatch(name)):
            tensor = tensor.to(_FLOATS[self._dtype])
        return stacked(name, tensor, self._one) if _EXPERTS.fullmatch(name) else self._one(name, tensor)

    def _one(self, name: str, tensor: Tensor) -> PackedTensor:
        if name in self._levels:
            found = code(name, tensor.dtype, self._levels[name])
            if not torch.equal(found.decode(), tensor):
                raise ValueError(f"{name} was changed since it was put on its grid; prune it again")
            return found
        quantised = self._dtype == "int8" and bool(_INT8.fullmatch(name))
        quantised |= self._head == "int8" and bool(_HEAD.fullmatch(name))
        if name in self._found:
            kind, value = self._found[name]
            return encode(name, tensor, int8=quantised, patterns=(), removed=(value,), kind=kind)
        removed = _REMOVED if name.endswith(".A_log") else (0.0,)
        tried = (self._patterns[name],) if name in self._patterns else TRIED
        found = encode(name, tensor, int8=quantised, patterns=tried, removed=removed)
        self._found[name] = found.label, found.removed
        return found


def refuse_stock(opened: Opened) -> None:
    """Refuse a directory that is not packed."""
    if opened.packed is None:
        raise ValueError(f"{opened.source!r} is not packed: it has no {PACKED}")


def _patterns(record: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Target -> the N:M it was pruned to, of a `pruning.json`."""
    found = {}
    rows = record.get("targets")
    for row in rows if isinstance(rows, list) else ():
        name, pattern = (row.get("target"), row.get("pattern")) if isinstance(row, dict) else (None, None)
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", pattern) if isinstance(pattern, str) else None
        if match and isinstance(name, str):
            found[name] = int(match[1]), int(match[2])
    return found


def _held(
    tokenizer: PreTrainedTokenizerBase, given: str | os.PathLike[str] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint in memory, which was chosen when it was loaded."""
    if given is not None:
        raise ValueError(
            "the tokenizer of a loaded checkpoint cannot be changed; name it when you load the checkpoint"
        )
    return tokenizer


def _tokenizer(opened: Opened, given: str | os.PathLike[str] | None = None) -> PreTrainedTokenizerBase:
    with quiet():
        words, _ = reading.read_tokenizer(opened, given)
    return words
