"""Read a checkpoint: find the directory, have its tensors checked and assembled, read its tokenizer.

The hub, a transformers directory, an original state-spaces directory and the models inside the package all
come in here. Nothing that is read is ever executed, only fields that are known reach a library
(`known_fields.py`), and whatever is wrong with the files is said here, by name.
"""

from __future__ import annotations

import difflib
import importlib.resources
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..architectures import MODEL_TYPES, refuse_older
from . import companions as beside
from . import container, known_fields, state_spaces, tokenizing
from .assembly import assemble
from .assembly import stock_model as stock_model  # where tools look for it
from .companions import CARD, GENERATION, RECORD
from .companions import tokenizer_files as tokenizer_files
from .files import BIN, CONFIG, SAFETENSORS, read_json, tensor_names
from .shelf import give_back

_LAYER_LISTS = ("layers_block_type", "layer_types", "hybrid_override_pattern")
"""Fields that some hybrids have in place of, or beside, the number of layers: what each one is."""
_SMALL_FILES = (
    *(
        "*.json",
        "*.txt",
        "*.model",
        "*.model.v*",
        "*.tiktoken",
        "*.spm",
        "*.codes",
        "*.vocab",
        "*.jinja",
        "*.py",
    ),
    *("LICENSE*", "NOTICE*", "*.md", CARD),
)


@dataclass
class Checkpoint:
    """A model in memory and all that is needed to write it back as it came.

    Attributes:
        model: in float32, on the CPU, in eval mode.
        tokenizer: the tokenizer that belongs to it.
        source: what `load` was given.
        format: the layout on disk, which `save` keeps.
        stored: dtype on disk of each tensor, by its name in `model.state_dict()`.
        trained_length: the tokenizer's `model_max_length` in tokens, None if it states none.
        files: what `save` writes back byte for byte, by path: config, tokenizer, licence, code, ... .
        tokenizer_source: the `tokenizer` that `load` was given, None if it was given none.
        extra: tensors that stock code leaves out on purpose, as they came; `save` writes them back.
        prefix: what the names in the files leave out, "" but for a bare backbone (`MambaModel`).
        notes: what of the source is not followed or not written back; the command shows them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    format: Literal["transformers", "state-spaces"]
    stored: dict[str, torch.dtype]
    trained_length: int | None
    files: dict[str, bytes] = field(default_factory=dict, repr=False)
    tokenizer_source: str | None = None
    extra: dict[str, Tensor] = field(default_factory=dict, repr=False)
    prefix: str = ""
    notes: tuple[str, ...] = ()


def load(source: str | os.PathLike[str], *, tokenizer: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Read a model and its tokenizer.

    Args:
        source: a hub id, a transformers directory (safetensors or `.bin`, one file or sharded), an original
            state-spaces directory, `builtin:NAME`, or a packed directory of either.
        tokenizer: a hub id, a directory or a `tokenizer.json` to use instead of the one in `source`.

    Raises:
        ValueError: the source cannot be found or read, its model type has no adapter, its tensors are
            missing, extra, of a wrong shape or not finite, a file is truncated or asks for foreign code, or
            the tokenizer does not fit.
    """
    source = os.fspath(source)
    with quiet():
        folder, fields, original, packed, config, present = described(source)
        found = assemble(source, folder, config, packed, present, fields.get("architectures"))
        files, notes = beside.carried(folder)
        notes = (*known_fields.config_notes(fields), *notes)
        if (folder / GENERATION).is_file():
            told, more = known_fields.generation_config(read_json(folder / GENERATION))
            found.model.generation_config, notes = told, (*notes, *more)
        words, its_files = read_tokenizer(source, folder, tokenizer, original, config)
    give_back()
    files = {
        name: content for name, content in files.items() if not beside.is_tokenizer_file(name)
    } | its_files
    size = tokenizing.size(words)
    if size > config.vocab_size:
        notes = (
            *notes,
            f"the tokenizer has {size} tokens, the embedding {config.vocab_size} rows; a text "
            "that uses one of the others is refused",
        )
    return Checkpoint(
        model=found.model,
        tokenizer=words,
        source=source,
        format="state-spaces" if original else "transformers",
        stored=found.stored,
        trained_length=tokenizing.trained_length(words),
        files=files,
        tokenizer_source=None if tokenizer is None else os.fspath(tokenizer),
        extra=found.extra,
        prefix=found.prefix,
        notes=notes,
    )


class Described(NamedTuple):
    """What is said of a checkpoint, before a tensor is read.

    Attributes:
        folder: its directory. fields: of its `config.json`. original: whether its layout is the original one.
        packed: the head of its packed file, None for stock files. config: of the stock model.
        present: the names of its tensors.
    """

    folder: Path
    fields: dict[str, Any]
    original: bool
    packed: container.Header | None
    config: transformers.PretrainedConfig
    present: list[str]


def described(source: str) -> Described:
    """Find a checkpoint and read all that is said of it.

    Raises:
        ValueError: as `load`, but for what only the tensors show.
    """
    folder = find(source)
    fields = read_json(folder / CONFIG)
    original = state_spaces.is_original(fields)
    _kind(source, fields, original)  # first: the files of a foreign model are nothing to look into
    packed = packed_header(source, folder, fields, original)
    present = tensor_names(folder) if packed is None else list(packed.stock)
    if packed is None:
        _refuse_layers(source, fields, original, len(present))
    return Described(folder, fields, original, packed, stock_config(source, fields, original), present)


def companions(folder: Path) -> dict[str, bytes]:
    """What is carried over as it is, by path, but for the tokenizer: config, licence, code, ..."""
    files, _ = beside.carried(folder)
    return {name: content for name, content in files.items() if not beside.is_tokenizer_file(name)}


def read_record(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The `pruning.json` of a checkpoint; None if it has none.

    Args:
        path: whatever `load` takes as a source; of a hub id no weights are fetched.

    Raises:
        ValueError: the source cannot be found, or the file is not a JSON object.
    """
    with quiet():
        folder = find(os.fspath(path), weights=False)
    return read_json(folder / RECORD) if (folder / RECORD).exists() else None


def local_folder(source: str) -> Path | None:
    """The directory on this machine that `source` names, None if it names none."""
    if not source.startswith("builtin:"):
        return Path(source) if os.path.isdir(source) else None
    name = source.removeprefix("builtin:")
    shelf = importlib.resources.files("sparsessm").joinpath("builtin")
    models = shelf.iterdir() if shelf.is_dir() else ()
    known = sorted(model.name for model in models if model.joinpath(CONFIG).is_file())
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean 'builtin:{near[0]}'?" if near else ""
        raise ValueError(f"unknown built-in model {name!r}; known: {', '.join(known) or 'none'}{hint}")
    return Path(str(shelf.joinpath(name, CONFIG))).parent


def find(source: str, *, weights: bool = True) -> Path:
    """The directory `source` names; a hub id is fetched into the hub's own cache first.

    Without `weights` only the small files are fetched: the model that a tokenizer came with may be large.

    Raises:
        ValueError: there is none, or it is no model but an adapter, or pointers of git-lfs.
    """
    folder = _found(source, weights)
    beside.refuse_others(source, folder, weights=weights)
    return folder


def _found(source: str, weights: bool) -> Path:
    if (folder := local_folder(source)) is not None:
        return folder
    if os.path.exists(source):
        raise ValueError(f"{source!r} is a file; give the directory of the checkpoint")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise ValueError(f"no such directory: {source!r}")
    try:
        preferred = ["model*.safetensors", container.PACKED]
        wanted = [*_SMALL_FILES, *preferred] if weights else [*_SMALL_FILES]
        folder = Path(snapshot_download(source, allow_patterns=wanted))
        if weights and not any(path for pattern in preferred for path in folder.glob(pattern)):
            snapshot_download(source, allow_patterns=["pytorch_model*.bin"])
    except Exception as error:  # a dozen kinds, by cause: offline, unknown, private, interrupted
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{source!r} is not a local directory, and the hub did not provide it: {reason}"
        ) from error
    return folder


def is_packed(folder: Path) -> bool:
    """True if a checkpoint directory holds its weights packed.

    Raises:
        ValueError: it holds them in a stock file too, and which of the two is meant is anybody's guess.
    """
    if not (folder / container.PACKED).is_file():
        return False
    stock = [name for name in (SAFETENSORS, BIN) for name in (name, f"{name}.index.json")]
    if both := [name for name in stock if (folder / name).exists()]:
        raise ValueError(f"{str(folder)!r} holds both {container.PACKED} and {both[0]}; remove one of them")
    return True


def stock_config(source: str, fields: dict[str, Any], original: bool) -> transformers.PretrainedConfig:
    """The stock configuration object for the fields of a `config.json` of either format."""
    kind = _kind(source, fields, original)
    try:
        told = state_spaces.settings(fields) if original else dict(fields)
        return transformers.CONFIG_MAPPING[kind].from_dict(known_fields.config_fields(kind, told))
    except Exception as error:  # each transformers release has its own validation errors
        raise ValueError(f"{source}/{CONFIG}: {error}") from error


def _kind(source: str, fields: Mapping[str, Any], original: bool) -> str:
    """The model type in transformers, one that has an adapter."""
    kind = state_spaces.model_type(fields) if original else fields.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        raise ValueError(f"{source!r}: no adapter for model_type {kind!r}; supported: {known}")
    refuse_older(kind)
    if fields.get("quantization_config"):
        raise ValueError(f"{source!r} is quantised (quantization_config); prune the model it was made from")
    return kind


def _refuse_layers(
    source: str, fields: Mapping[str, Any], original: bool, tensors: int, what: str = "tensors"
) -> None:
    """Refuse more layers than there are tensors, before anything of that size is built."""
    said = fields.get("n_layer" if original else "num_hidden_layers")
    kinds = (fields.get(name) for name in _LAYER_LISTS)
    layers = max(
        said if isinstance(said, int) else 0, *(len(k) if isinstance(k, list | str) else 0 for k in kinds)
    )
    if layers > tensors:
        raise ValueError(f"{source}/{CONFIG}: it has {layers} layers, but there are only {tensors} {what}")


def packed_header(
    source: str, folder: Path, fields: dict[str, Any], original: bool
) -> container.Header | None:
    """The head of a packed directory's weights, None for a directory of stock weights.

    Args:
        fields: of `config.json`; the rest of it is checked where the model is built.
    """
    if not is_packed(folder):
        return None
    header = container.read_header(folder / container.PACKED)
    if (header.layout == "state-spaces") != original:
        raise ValueError(f"{header.file}: layout {header.layout!r}, but {CONFIG} is of the other layout")
    _refuse_layers(source, fields, original, len(header.stock), "packed tensors")
    return header


def read_tokenizer(
    source: str,
    folder: Path,
    given: str | os.PathLike[str] | None,
    original: bool,
    config: transformers.PretrainedConfig,
) -> tuple[PreTrainedTokenizerBase, dict[str, bytes]]:
    """The tokenizer, and the files it came from if they can be carried over as they are.

    It may have more tokens than the embedding has rows: who meets one of them in a text refuses it.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if given is None and not tokenizing.present(folder):
        if not original:
            raise ValueError(f"no tokenizer in {source!r}; name one with tokenizer= (--tokenizer)")
        given = state_spaces.TOKENIZER
    if given is not None:
        given = os.fspath(given)
        if os.path.isfile(given):
            if beside.is_pointer(Path(given)):
                raise ValueError(
                    f"{given}: this is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"
                )
            return tokenizing.read_file(given, config), {}
        try:
            folder = find(given, weights=False)
        except ValueError as error:
            takes = "tokenizer= (--tokenizer) takes a hub id, a directory or a tokenizer.json"
            raise ValueError(f"no tokenizer: {error}; {takes}") from error
    return tokenizing.read(folder), tokenizer_files(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and warnings off the terminal: the faults it would mention are raised here."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
