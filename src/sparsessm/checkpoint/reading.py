"""Read a checkpoint that was opened (`opened.py`): its tensors, checked and assembled, and its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architectures import Architecture, InMemory, Residence, adapt
from ..architectures.on_device import OnDevice, chosen
from ..architectures.ranks import here
from ..architectures.residence import SHARE
from . import companions, state_spaces, tokenizing
from .assembly import Assembled, assemble, float32_bytes
from .container import Format
from .folder import Folder
from .memory import allowed
from .opened import Opened, find, open_checkpoint, quiet
from .shelf import give_back
from .skeleton import skeleton


@dataclass
class Checkpoint:
    """A model in memory and all that is needed to write it back as it came.

    Attributes:
        model: in float32, on the CPU but for blocks that are open on a GPU, in eval mode.
        tokenizer: the tokenizer that belongs to it.
        source: what `load` was given.
        format: on disk, which `save` keeps.
        stored: dtype on disk of each tensor, by its name in `model.state_dict()`.
        trained_length: the tokenizer's `model_max_length` in tokens, None if it states none.
        files: what `save` writes back byte for byte, by path: config, tokenizer, licence, code, ... .
        tokenizer_source: the `tokenizer` that `load` was given, None if it was given none.
        extra: tensors that stock code leaves out on purpose, as they came; `save` writes them back.
        prefix: what the names in the files leave out, "" but for a bare backbone (`MambaModel`).
        notes: what of the source is not followed or not written back; the command shows them.
        residence: where the model's weights are; not all need be in memory.
        digest: SHA-256 of the tensors as they were read; "" where all are in memory.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    format: Format
    stored: dict[str, torch.dtype]
    trained_length: int | None
    files: dict[str, bytes] = field(default_factory=dict, repr=False)
    tokenizer_source: str | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    prefix: str = ""
    notes: tuple[str, ...] = ()
    residence: Residence = InMemory()
    digest: str = ""

    def architecture(self, compute: str = "float32") -> Architecture:
        """The model as the loops see it.

        Args:
            compute: the precision of products, as of `adapt`.
        """
        return adapt(self.model, self.stored, self.residence, compute)


@dataclass(frozen=True)
class Streaming:
    """How a model is held that need not be in memory as a whole.

    Attributes:
        memory: bytes that all may take. A model that takes more than half of it in float32 is read block by
            block, each time it is needed.
        folder: where what is changed is written, in any case; None: only where the model is not in memory,
            into a temporary directory.
    """

    memory: int
    folder: Path | None = None

    @classmethod
    def within(cls, memory: str | int | None, folder: Path | None = None) -> Streaming:
        """Of a size as a user says it, "6GB"; None: half of what is free.

        Raises:
            ValueError: as `memory.size_of`.
        """
        return cls(allowed(memory), folder)


def load(
    source: str | os.PathLike[str] | Opened,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    streaming: Streaming | None = None,
    device: str = "cpu",
) -> Checkpoint:
    """Read a model and its tokenizer.

    Args:
        source: a hub id, a transformers directory (safetensors or `.bin`, one file or sharded), an original
            state-spaces directory, `builtin:NAME`, or a packed directory of either; or one that is open.
        tokenizer: a hub id, a directory or a `tokenizer.json` to use instead of the one in `source`.
        streaming: how much memory there is; None: as much as the model takes.
        device: that computes: "cpu", "cuda", "cuda:N", or "auto". The weights of one block are on a GPU at a
            time; elsewhere they are in memory.

    Raises:
        ValueError: a device that is not there; the source cannot be found or read, its model type has no
            adapter, its tensors are missing, extra, of a wrong shape or not finite, a file is truncated or
            asks for foreign code, or the tokenizer does not fit.
    """
    where = chosen(device, here())
    opened = open_checkpoint(source)
    with quiet():
        found, residence = _held(opened, streaming)
        if where.type != "cpu":
            residence = OnDevice(residence, where)
        return described(opened, found, residence, tokenizer)


def described(
    opened: Opened,
    found: Assembled,
    residence: Residence,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """A model with all else that its directory says.

    Args:
        found: whose tensors were checked. tokenizer: as of `load`.

    Raises:
        ValueError: as `load`, of the tokenizer and the small files.
    """
    files, notes = opened.files, opened.notes
    if opened.generation is not None:
        found.model.generation_config = opened.generation
    words, its_files = read_tokenizer(opened, tokenizer)
    give_back()
    return Checkpoint(
        model=found.model,
        tokenizer=words,
        source=opened.source,
        format=opened.format,
        stored=found.stored,
        trained_length=tokenizing.trained_length(words),
        files=files | its_files,
        tokenizer_source=None if tokenizer is None else os.fspath(tokenizer),
        extra=found.extra,
        prefix=found.prefix,
        notes=(*notes, *tokenizing.notes(words, opened.config.vocab_size)),
        residence=residence,
        digest=found.digest,
    )


def _held(opened: Opened, streaming: Streaming | None) -> tuple[Assembled, Residence]:
    if streaming is None:
        return assemble(opened), InMemory()
    fits = 2 * float32_bytes(opened) <= streaming.memory
    if fits and streaming.folder is None:
        return assemble(opened), InMemory(streaming.memory)
    return skeleton(opened, streaming.folder, keep=fits, limit=streaming.memory // SHARE)


def read_tokenizer(
    opened: Opened, given: str | os.PathLike[str] | None
) -> tuple[PreTrainedTokenizerBase, dict[str, bytes]]:
    """The tokenizer, and the files it came from if they can be carried over as they are.

    It may have more tokens than the embedding has rows: who meets one of them in a text refuses it.

    Args:
        given: as `load`'s `tokenizer`.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    folder = opened.folder
    if given is None and not tokenizing.present(folder):
        if not opened.original:
            raise ValueError(f"no tokenizer in {opened.source!r}; name one with tokenizer= (--tokenizer)")
        given = state_spaces.TOKENIZER
    if given is not None:
        given = os.fspath(given)
        if os.path.isfile(given):
            companions.refuse_pointer(Folder(Path(given).parent), Path(given).name)
            return tokenizing.read_file(given, opened.config), {}
        try:
            folder = find(given, weights=False)
        except ValueError as error:
            takes = "tokenizer= (--tokenizer) takes a hub id, a directory or a tokenizer.json"
            raise ValueError(f"no tokenizer: {error}; {takes}") from error
    return tokenizing.read(folder), companions.tokenizer_files(folder)
