"""Run a model: `load(path).generate(prompt)`. Pruning and running meet only on disk.

Place in the flow: after everything that prunes, above `checkpoint/` and `kernels/`.

    base.py         the Engine protocol: tokens in, logits out, a state between
    reference.py    the definition, in plain PyTorch, with reference_parts.py
    families.py     what a stock model consists of: plan.py
    engine.py       the same in native code, from encoded tensors (weights.py)
    part.py         a part of a layer of it; kinds: mamba1.py and mamba2.py (mixer.py), delta.py,
                    attention.py, latent.py, mlp.py
    keys.py         where keys and values lie in a state, and how it grows
    sampling.py     logits -> the next token
    text.py         tokens -> text, piece by piece
    state.py        what a sequence carries, to keep and to continue from
    generation.py   Model: generate, logits
    causal_lm.py    a Model in the words of transformers, for its generate() and for lm_eval
    threads.py      how many threads may be asked for

Importing it is light; torch and transformers come in with `load`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .threads import checked_threads, refuse_torch_threads

if TYPE_CHECKING:
    from sparsessm.checkpoint import Checkpoint, Packed, PackedTensor

    from .base import Engine
    from .generation import Model

__all__ = ["load", "of"]


def load(
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    keys: str = "float32",
) -> Model:
    """Load a model to run it on this machine's CPU.

    Args:
        path: what `sparsessm pack` wrote, or whatever `sparsessm.load` takes: a hub id, a stock directory,
            pruned or not, or "builtin:pycode".
        tokenizer: a hub id, a directory or a `tokenizer.json` to use instead of the model's own.
        threads: so many, of the whole process; None: as many as torch uses.
        keys: how keys and values of attention are held in a state: "float32", or "int8", which takes about
            a quarter of the memory and is not exact.

    Raises:
        TypeError: `path` or `tokenizer` is neither text nor a path.
        ValueError: another word for `keys`, `threads` below 1 or far above the machine's processors, a model
            that does not run here, or as `sparsessm.load`.
    """
    threads = checked_threads(threads)
    from sparsessm.checkpoint.given import checked_path, undisturbed
    from sparsessm.runtime.keys import checked_form

    checked_form(keys)
    checked_path("path", path)
    if tokenizer is not None:
        checked_path("tokenizer", tokenizer)
    with undisturbed():
        return _loaded(path, tokenizer, threads, keys)


def _loaded(
    path: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None, threads: int | None, keys: str
) -> Model:
    from sparsessm.checkpoint import open_checkpoint, packed, tokenizing
    from sparsessm.checkpoint.shelf import give_back

    from .base import refuse_type, refuse_window

    opened = open_checkpoint(path)
    refuse_type(opened.model_type)  # before gigabytes are read
    told = opened.fields  # a field that transformers does not know is not in its configuration
    refuse_window(told.get("sliding_window"), told.get("use_sliding_window"))
    found = packed.stream(opened)
    words = found.tokenizer(tokenizer)
    model = _model(found, words, threads, keys)
    model.notes += tokenizing.notes(words, found.config.vocab_size)
    del found
    give_back()
    return model


def of(checkpoint: Checkpoint, *, threads: int | None = None, keys: str = "float32") -> Model:
    """A model that is in memory already, as it is now.

    Weights may be shared: after a change of the checkpoint's model call this again.

    Args:
        checkpoint: what `sparsessm.load` returned, pruned or not.
        threads, keys: as in `load`.

    Raises:
        ValueError: as in `load`, or a checkpoint as in `sparsessm.prune`.
        TypeError: something else than a checkpoint.
    """
    threads = checked_threads(threads)
    from sparsessm.checkpoint import packed
    from sparsessm.checkpoint.given import working

    from .base import refuse_unsupported

    with working(checkpoint, "runtime.of"):
        refuse_unsupported(checkpoint.model.config)
        return _model(packed.of(checkpoint), checkpoint.tokenizer, threads, keys)


def engine_of(
    config: Any, tensors: Mapping[str, PackedTensor], threads: int | None, keys: str = "float32"
) -> Engine:
    """What reads the tokens: the native engine where it is built, else the definition."""
    import torch

    from sparsessm import kernels

    from .base import refuse_unsupported

    refuse_unsupported(config)
    threads = checked_threads(threads)
    refuse_torch_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    if kernels.NATIVE and kernels.LEVEL != "reference":
        from .engine import NativeEngine

        return NativeEngine(config, tensors, threads, keys)
    from .reference import ReferenceEngine

    weights = {name: found.decode(torch.float32) for name, found in tensors.items()}
    return ReferenceEngine(config, weights, keys)


def _model(packed: Packed, tokenizer: Any, threads: int | None, keys: str) -> Model:
    """Join the parts; which tokens begin and end a text, the stock model's generation config says first."""
    from sparsessm.checkpoint.known_fields import optional

    from .generation import Model

    engine = engine_of(packed.config, packed.tensors, threads, keys)
    notes = packed.notes
    if keys != "float32" and not engine.keys.block:
        notes += (f"the model has no attention, so there are no keys to hold as {keys}",)

    def told(role: str) -> list[int]:
        for holder in (packed.generation, packed.config, tokenizer):
            ids = optional(holder, f"{role}_token_id")
            some = [token for token in (ids if isinstance(ids, list) else [ids]) if isinstance(token, int)]
            if some := [token for token in some if 0 <= token < engine.vocabulary]:
                return some
        return []

    eos = told("eos")
    bos = [*told("bos"), *eos]
    return Model(
        engine,
        tokenizer,
        packed.config,
        eos=eos,
        bos=bos[0] if bos else None,
        source=packed.source,
        notes=notes,
    )
