"""One GGUF file of a checkpoint, for llama.cpp and what is built on it (Ollama, LM Studio).

Beside `packed.py`. Names, shapes and metadata are those of llama.cpp's own converter, and so is which tensor
takes which type: 2-D matrices the one that is asked for, all others float32. Read and written tensor by
tensor; `docs/runtime.md` says what such a file holds and what it cannot.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..architectures.own import Own
from . import atomic, gguf_blocks, gguf_delta, gguf_hybrids, gguf_words
from .at_rest import AtRest, at_rest, left_out
from .encoding import finite
from .gguf_part import Part
from .opened import local_folder, open_checkpoint

TYPES = ("bf16", "f16", "f32", "q8_0", "q4_0")
PURE = {"mamba": "mamba", "falcon_mamba": "mamba", "mamba2": "mamba2"}  # model type -> architecture in GGUF
NAMES = {**PURE, **gguf_hybrids.NAMES, **gguf_delta.NAMES}
CONTEXT = 1 << 20  # tokens, as the converter says: a state space model has no bound
_STOCK = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
_MATRIX = re.compile(r".*\.(in_proj|x_proj|dt_proj|out_proj|embeddings)\.weight|lm_head\.weight")
_HALF = 65504.0  # the largest float16, in which blocks have their scales
_LARGEST = {"q8_0": 127 * _HALF, "q4_0": 8 * _HALF}


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        file: that was written.
        kind: the type of its matrices, one of `TYPES`.
        nbytes: of the whole file.
        tensors: by their name in it, each with its type and bytes.
        notes: what of the source is not followed, or is otherwise in llama.cpp.
    """

    file: Path
    kind: str
    nbytes: int
    tensors: dict[str, tuple[str, int]]
    notes: tuple[str, ...]


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    type: str | None = None,
    head: str | None = None,
    force: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Exported:
    """Write a model as one GGUF file, whole or not at all.

    Args:
        source: as of `load`.
        out: the file to write.
        type: of the matrices, one of `TYPES`; None: the dtype they are stored in, of several one that holds
            all. Quantised types need rows of whole blocks of 32; a matrix without becomes f16. Blocks
            whose values a scale and codes make exactly keep them, as all of `--grid q4_0` do.
        head: another type for embedding and head, of `TYPES`.
        force: replace a GGUF file that is already there.
        tokenizer: as of `load`.

    Raises:
        ValueError: the package gguf is not installed; GGUF or llama.cpp has no place for the model or its
            tokenizer; `out` cannot be written; a value is too large for its type.
        OSError: writing failed; nothing is left behind, an old file is intact.
    """
    library = _library()
    for what, given in (("type", type), ("head", head)):
        if given is not None and given not in TYPES:
            raise ValueError(f"{what} is {given!r}; allowed: {', '.join(TYPES)}")
    opened = open_checkpoint(source)
    if opened.model_type not in NAMES:
        raise ValueError(
            f"{opened.source!r} is a {opened.model_type} model; exported to GGUF are: {', '.join(NAMES)}"
        )
    target = _refuse_file(out, force, opened.source)
    found = at_rest(opened, tokenizer)
    _refuse_misfit(found)
    checkpoint = found.checkpoint
    parts = list(_parts(found, library))
    rows = next(part.shape[0] for _, part in parts if part.name.startswith("token_embd"))
    words = gguf_words.words(checkpoint.tokenizer, checkpoint.model.config, rows)
    stored = (checkpoint.stored[source] for source, part in parts if source and part.typed)
    kind = type or _STOCK[reduce(torch.promote_types, stored)]
    pieces = list(_pieces(parts, kind, head or kind, library))
    atomic.refuse_room(out, sum(piece.nbytes for piece in pieces))
    try:
        with atomic.replacing(target, force=force, folder=False) as file:
            _write(file, found, kind, pieces, words, library)
    except OSError as error:
        raise OSError(f"could not write {os.fspath(out)!r}, nothing was left behind: {error}") from error
    return Exported(
        file=Path(out),
        kind=kind,
        nbytes=target.stat().st_size,
        tensors={piece.part.name: (piece.kind, piece.nbytes) for piece in pieces},
        notes=(*checkpoint.notes, *left_out(found.extra), *words.notes, *_notes(checkpoint.model.config)),
    )


@dataclass(frozen=True)
class _Piece:
    """A part of the file, its type `kind` and bytes there, `source` its name in the model (None: zeros)."""

    part: Part
    source: str | None
    kind: str
    nbytes: int


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError("a GGUF file needs the package gguf; install sparsessm[gguf]") from None
    return gguf


def _refuse_file(path: str | os.PathLike[str], force: bool, source: str) -> Path:
    shown = os.fspath(path)
    target, origin = atomic.refuse_target(path), local_folder(source)
    if target.is_dir():
        raise ValueError(f"{shown!r} is a directory; name a file for the result")
    if origin is not None and origin.resolve() in target.parents:
        raise ValueError(f"{shown!r} lies in the source {source!r}; write the result somewhere else")
    if target.exists():
        if not force:
            raise ValueError(
                f"{shown!r} exists; choose another name, or replace it with force=True (--force)"
            )
        with open(target, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{shown!r} is not replaced, because it is no GGUF file; remove it yourself")
    return target


def _refuse_misfit(found: AtRest) -> None:
    """Refuse what GGUF, or llama.cpp's code for it, has no place for."""
    source, config = found.checkpoint.source, _config(found)
    if own := Own.of(found.checkpoint.model):
        what = "projected states" if own.directions else "layers of different widths"
        raise ValueError(f"{source!r} has {what}, which no GGUF file can hold; our runtime runs it")
    if config.model_type not in PURE:
        for misfit in _form(config).misfits(config, iter(found.tensors.shapes)):
            raise ValueError(f"{source!r} {misfit}")
        return
    inner, allowed = _inner(config), 2 * config.hidden_size
    if config.model_type != "mamba2" and inner != allowed:
        raise ValueError(
            f"{source!r} has {inner} channels; llama.cpp runs a {config.model_type} of this width only with "
            f"{allowed}"
        )
    if config.use_bias:
        raise ValueError(f"{source!r} has biases of in_proj and out_proj, for which llama.cpp has no place")
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"{source!r} has the activation {config.hidden_act!r}; llama.cpp has silu")
    if config.model_type == "mamba2" and tuple(config.time_step_limit) != (0.0, math.inf):
        low, high = config.time_step_limit
        raise ValueError(f"{source!r} limits its steps to {low} and {high}; llama.cpp has no limits")


def _notes(config: Any) -> Iterator[str]:
    if config.model_type not in PURE:
        yield from _form(config).notes(config)
        return
    if config.model_type == "falcon_mamba" and config.mixer_rms_eps != config.layer_norm_epsilon:
        yield (
            f"llama.cpp computes all norms with the epsilon {config.layer_norm_epsilon:g}; those of B, C and "
            f"the step size have {config.mixer_rms_eps:g} here"
        )
    inner = _inner(config)
    if config.model_type == "mamba2" and (inner != 2 * config.hidden_size or inner % config.state_size):
        yield (
            f"older versions of llama.cpp (b9190) do not run a mamba2 of {inner} channels, width "
            f"{config.hidden_size} and {config.state_size} states; newer ones (b11549) do"
        )


def _form(config: Any) -> ModuleType:
    """What knows how a model with attention is written."""
    return gguf_delta if config.model_type in gguf_delta.NAMES else gguf_hybrids


def _config(found: AtRest) -> Any:
    return found.checkpoint.model.config


def _inner(config: Any) -> int:
    """Its channels."""
    if config.model_type == "mamba2":
        return config.num_heads * config.head_dim
    return config.intermediate_size


def _parts(found: AtRest, library: Any) -> Iterator[tuple[str | None, Part]]:
    """What the file will hold, in order, each with the tensor that it is made of (None: zeros)."""
    config = _config(found)
    which = {name: arch for arch, name in library.MODEL_ARCH_NAMES.items()}[_architecture(config)]
    named = library.get_tensor_name_map(which, config.num_hidden_layers)
    shapes = found.tensors.shapes
    for source, shape in shapes.items():
        made = list(
            (_pure if config.model_type in PURE else _form(config).parts)(config, source, shape, named)
        )
        if not made:
            raise ValueError(
                f"{found.checkpoint.source!r} has a tensor {source!r}, which GGUF has no name for"
            )
        yield from ((source, part) for part in made)
        bias = source.replace(".weight", ".bias")
        wanted = config.model_type not in gguf_delta.NAMES  # llama.cpp wants one there
        if wanted and source.endswith("conv1d.weight") and bias not in shapes:
            name = made[0].name.replace(".weight", ".bias")
            yield None, Part(name, shape[:1], torch.zeros_like, False)


def _pure(config: Any, source: str, shape: tuple[int, ...], named: Any) -> Iterator[Part]:
    """As `gguf_hybrids.parts`, of a model of Mamba layers alone."""
    if source.endswith("conv1d.weight"):
        shape = (shape[0], shape[-1])
    elif config.model_type == "mamba2":
        if source.endswith((".A_log", ".D")):
            shape = (*shape, 1)
        elif source.endswith(".mixer.norm.weight"):
            shape = (config.n_groups, shape[0] // config.n_groups)
    name = named.get_name(source.replace(".dt_bias", ".dt_proj.bias"), try_suffixes=(".weight", ".bias"))
    if name is not None:
        outer = name.startswith(("token_embd", "output."))
        yield Part(name, shape, lambda whole: whole, bool(_MATRIX.fullmatch(source)), outer)


def _pieces(parts: Iterable[tuple[str | None, Part]], kind: str, head: str, library: Any) -> Iterator[_Piece]:
    """The same in their types; nothing is read for it.

    Args:
        kind: of matrices. head: of embedding and head.
    """
    for source, part in parts:
        held = "f32" if not part.typed else head if part.outer else kind
        if held in _LARGEST and part.shape[-1] % _blocks(library, held)[0]:
            held = "f16"
        entries, nbytes = _blocks(library, held)
        yield _Piece(part, source, held, math.prod(part.shape) // entries * nbytes)


def _architecture(config: Any) -> str:
    return PURE.get(config.model_type) or _form(config).architecture(config)


def _blocks(library: Any, kind: str) -> tuple[int, int]:
    """Entries and bytes of a block."""
    return library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind.upper()]]


def _write(
    file: Path, found: AtRest, kind: str, pieces: list[_Piece], words: gguf_words.Words, library: Any
) -> None:
    with closing(library.GGUFWriter(None, _architecture(_config(found)))) as writer:
        _describe(writer, found, kind, library)
        words.add_to(writer)
        for piece in pieces:
            form = library.GGMLQuantizationType[piece.kind.upper()]
            # the dtype is not looked at beside the form, as long as it is not that of bytes
            writer.add_tensor_info(
                piece.part.name, piece.part.shape, np.dtype(np.float32), piece.nbytes, form
            )
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece in pieces:
            writer.write_tensor_data(_data(found, piece, library))


def _describe(writer: Any, found: AtRest, kind: str, library: Any) -> None:
    """The metadata that llama.cpp's code for the model asks for."""
    config, mamba2 = _config(found), _config(found).model_type == "mamba2"
    name = found.checkpoint.source.rstrip("/").rpartition("/")[2]
    whole = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    writer.add_name(name.removeprefix("builtin:") or _architecture(config))
    writer.add_file_type(library.LlamaFileType[whole])
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    if config.model_type not in PURE:
        _form(config).describe(writer, config)
        return
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(0)  # there is none, but llama.cpp wants to be told
    # The converter says 0 heads of attention. For Mamba-2 some versions of llama.cpp (b9190) take this number
    # for that of its own heads, and refuse the file; to others it is nothing.
    writer.add_head_count(config.num_heads if mamba2 else 0)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(_inner(config))
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.num_heads if mamba2 else config.time_step_rank)
    if mamba2:
        writer.add_ssm_group_count(config.n_groups)
    else:
        writer.add_ssm_dt_b_c_rms(config.model_type == "falcon_mamba")


def _data(found: AtRest, piece: _Piece, library: Any) -> Any:
    """The array of a tensor, as it goes into the file.

    Raises:
        ValueError: it has values that its type does not.
    """
    if piece.source is None:
        return np.zeros(piece.part.shape, np.float32)
    value = found.exact(piece.source).to(torch.float32)
    if piece.source.endswith(".A_log"):
        value = -value.exp()
    value = piece.part.make(value).reshape(piece.part.shape)
    if (largest := _LARGEST.get(piece.kind)) is not None:
        if float(value.abs().max()) > largest:
            raise _too_large(piece)
        return gguf_blocks.blocks(value.flatten(0, -2).numpy(), piece.kind, library)
    held: Tensor = value.to({name: dtype for dtype, name in _STOCK.items()}[piece.kind])
    if not finite(held):
        raise _too_large(piece)
    held = held.contiguous()
    return (held.view(torch.int16) if held.dtype is torch.bfloat16 else held).numpy()  # numpy has no bfloat16


def _too_large(piece: _Piece) -> ValueError:
    return ValueError(f"{piece.source} ({piece.part.name}) has values that are too large for {piece.kind}")
