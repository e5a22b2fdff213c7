"""A checkpoint directory, opened: where it is, what its `config.json` says, and which kind it is.

The hub, a transformers directory, an original state-spaces directory, a packed directory and the models
inside the package all come in here, and are looked for, read and judged once: whoever loads, packs, runs,
measures or inspects a checkpoint asks the `Opened` that came of it. No tensor is read, nothing that is read
is ever executed, and only fields that are known reach a library (`known_fields.py`).
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
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from ..architectures import MODEL_TYPES, refuse_older
from ..architectures.own import Own
from ..data.foreign import first_line
from . import companions, container, known_fields, state_spaces
from .companions import CARD, GENERATION, RECORD
from .files import BIN, CONFIG, SAFETENSORS, tensor_names
from .folder import Folder
from .wrapped import text_fields

_LAYER_LISTS = ("layers_block_type", "layer_types", "hybrid_override_pattern")
"""Fields that some hybrids have in place of, or beside, the number of layers: what each one is."""
_SMALL_FILES = (
    *("*.json", "*.txt", "*.model", "*.model.v*", "*.tiktoken", "*.spm", "*.codes", "*.vocab", "*.jinja"),
    *("*.py", "LICENSE*", "NOTICE*", "*.md", CARD),
)


@dataclass(frozen=True, eq=False)
class Opened:
    """A checkpoint directory and what it says of itself. What takes more than its `config.json` is read, and
    refused where it is wrong, when it is first asked for.

    Attributes:
        source: what was given.
        folder: the directory, whose small files are read once.
        fields: of its `config.json`.
        original: whether that is of the original state-spaces format.
        model_type: transformers' name for the model, one that has an adapter.
    """

    source: str
    folder: Folder
    fields: dict[str, Any]
    original: bool
    model_type: str

    @property
    def format(self) -> container.Format:
        """Of `config.json`, and of the stock checkpoint that it is, or was packed from."""
        return "state-spaces" if self.original else "transformers"

    @cached_property
    def packed(self) -> container.Header | None:
        """The head of its packed file, None where the weights lie in stock files.

        Raises:
            ValueError: the model is not for us; or the file is damaged or belongs to another `config.json`.
        """
        # first: the files of a foreign model are nothing to look into
        _model_type(self.source, self.fields, self.original)
        if not _holds_packed(self.folder.path):
            return None
        header = container.read_header(self.folder.path / container.PACKED)
        if header.format != self.format:
            told = f"layout {header.format!r}, but {CONFIG} is of the other format"
            raise ValueError(f"{header.file}: {told}")
        return header

    @cached_property
    def names(self) -> list[str]:
        """Of the tensors in its files.

        Raises:
            ValueError: as `packed`; there are no weights.
        """
        if self.packed is not None:
            return list(self.packed.stock)
        return [name for names in self.heads.values() for name in names]

    @cached_property
    def heads(self) -> dict[Path, list[str]]:
        """The names of the tensors in each stock file.

        Raises:
            ValueError: there are none; or one is truncated, or something else.
        """
        return tensor_names(self.folder.stock_files)

    @cached_property
    def config(self) -> PretrainedConfig:
        """Of the stock model.

        Raises:
            ValueError: as `names`; more layers than tensors, or fields that are no model's.
        """
        self._refuse_layers()
        return stock_config(self.source, self.fields, self.original)

    @property
    def own(self) -> Own:
        """What the model has that no stock configuration can say; only packed files hold that."""
        return Own() if self.packed is None else Own.told_by(self.packed.shapes, self.config)

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the tensors.

        Raises:
            ValueError: as `packed`; there are none.
        """
        return self.folder.stock_files.paths if self.packed is None else [self.packed.file]

    @cached_property
    def _generation(self) -> tuple[GenerationConfig | None, tuple[str, ...]]:
        if not self.folder.has(GENERATION):
            return None, ()
        return known_fields.generation_config(self.folder.json(GENERATION))

    @property
    def generation(self) -> GenerationConfig | None:
        """What its `generation_config.json` says, None if there is none.

        Raises:
            ValueError: that is not JSON.
        """
        return self._generation[0]

    @cached_property
    def _carried(self) -> tuple[dict[str, bytes], tuple[str, ...]]:
        return companions.carried(self.folder)

    @property
    def files(self) -> dict[str, bytes]:
        """What is carried over as it is, by path, but for the tokenizer: config, licence, code, ..."""
        found, _ = self._carried
        return {name: content for name, content in found.items() if not companions.is_tokenizer_file(name)}

    @property
    def notes(self) -> tuple[str, ...]:
        """What of it is not followed, or not carried over.

        Raises:
            ValueError: as `generation`.
        """
        return (*known_fields.config_notes(self.fields), *self._carried[1], *self._generation[1])

    @property
    def record(self) -> dict[str, Any] | None:
        """Its `pruning.json`, None if it has none.

        Raises:
            ValueError: that is not a JSON object.
        """
        return read_record(self.folder)

    @property
    def ours(self) -> dict[str, bytes]:
        """The record and the card of the run that it came from, by name, of what there is."""
        return {name: self.folder.content(name) for name in (RECORD, CARD) if self.folder.has(name)}

    def _refuse_layers(self) -> None:
        """Refuse more layers than there are tensors, before anything of that size is built."""
        fields = text_fields(self.fields)
        said = fields.get("n_layer" if self.original else "num_hidden_layers")
        kinds = (fields.get(name) for name in _LAYER_LISTS)
        layers = max(
            said if isinstance(said, int) else 0, *(len(k) if isinstance(k, list | str) else 0 for k in kinds)
        )
        if layers > len(self.names):
            what = "tensors" if self.packed is None else "packed tensors"
            raise ValueError(
                f"{self.source}/{CONFIG}: it has {layers} layers, but there are only {len(self.names)} {what}"
            )


def open_checkpoint(source: str | os.PathLike[str] | Opened) -> Opened:
    """Find a checkpoint and read its `config.json`; what is open already is given back.

    Args:
        source: a hub id, a directory or `builtin:NAME`.

    Raises:
        ValueError: there is none, it is no model but an adapter, or pointers of git-lfs; or its model type
            has no adapter here.
    """
    if isinstance(source, Opened):
        return source
    source = os.fspath(source)
    folder = find(source)
    fields = folder.json(CONFIG)
    original = state_spaces.is_original(fields)
    return Opened(source, folder, fields, original, _adapted(source, fields, original))


def find(source: str, *, weights: bool = True) -> Folder:
    """The directory `source` names; a hub id is fetched into the hub's own cache first.

    Without `weights` only the small files are fetched: the model that a tokenizer came with may be large.

    Raises:
        ValueError: there is none, or it is no model but an adapter, or pointers of git-lfs.
    """
    with quiet():
        folder = Folder(_found(source, weights))
    companions.refuse_others(source, folder, weights=weights)
    return folder


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
        reason = first_line(error)
        raise ValueError(
            f"{source!r} is not a local directory, and the hub did not provide it: {reason}"
        ) from error
    return folder


def _holds_packed(folder: Path) -> bool:
    if not (folder / container.PACKED).is_file():
        return False
    stock = [name for name in (SAFETENSORS, BIN) for name in (name, f"{name}.index.json")]
    if both := [name for name in stock if (folder / name).exists()]:
        raise ValueError(f"{str(folder)!r} holds both {container.PACKED} and {both[0]}; remove one of them")
    return True


def read_record(source: str | os.PathLike[str] | Folder) -> dict[str, Any] | None:
    """The `pruning.json` of a checkpoint; None if it has none.

    Args:
        source: whatever `load` takes; of a hub id no weights are fetched.

    Raises:
        ValueError: the source cannot be found, or the file is not a JSON object.
    """
    folder = source if isinstance(source, Folder) else find(os.fspath(source), weights=False)
    return folder.json(RECORD) if (folder.path / RECORD).exists() else None


def stock_config(source: str, fields: Mapping[str, Any], original: bool) -> PretrainedConfig:
    """The stock configuration object for the fields of a `config.json` of either format.

    Raises:
        ValueError: a model that is not for us, or fields that are no model's.
    """
    kind = _model_type(source, fields, original)
    try:
        told = state_spaces.settings(fields) if original else dict(text_fields(fields))
        return transformers.CONFIG_MAPPING[kind].from_dict(known_fields.config_fields(kind, told))
    except Exception as error:  # each transformers release has its own validation errors
        raise ValueError(f"{source}/{CONFIG}: {error}") from error


def _adapted(source: str, fields: Mapping[str, Any], original: bool) -> str:
    """The model type in transformers, one that has an adapter."""
    kind = state_spaces.model_type(fields) if original else text_fields(fields).get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        raise ValueError(f"{source!r}: no adapter for model_type {kind!r}; supported: {known}")
    return kind


def _model_type(source: str, fields: Mapping[str, Any], original: bool) -> str:
    """The same, of a model that can be pruned here."""
    refuse_older(kind := _adapted(source, fields, original))
    if text_fields(fields).get("quantization_config"):
        raise ValueError(f"{source!r} is quantised (quantization_config); prune the model it was made from")
    return kind


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
