"""What somebody gives us to work on, checked before anything is changed: a checkpoint, its model today.

Between `load` and `prune` a model is the user's: it may have been converted, moved, compiled or handed to
another thread, and torch may have been told to make tensors elsewhere. What we cannot take is refused by
name; what does not concern us is put aside for the time of the work.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..data.inert import is_text
from .known_fields import optional
from .reading import Checkpoint

_lock = threading.Lock()
_workers: dict[int, tuple[int, str]] = {}  # id of a model in work -> its thread, and what that does


@contextmanager
def working(checkpoint: Any, what: str) -> Iterator[None]:
    """Work on a checkpoint that was checked, one thread at a time, whatever torch's settings are.

    Args:
        checkpoint: hopefully what `load` returned.
        what: the function that was called, for messages.

    Raises:
        TypeError: it is something else, or its model is no stock model any more.
        ValueError: as `refuse_changed`; or another thread works on its model.
    """
    if not isinstance(checkpoint, Checkpoint):
        more = "; save the model with save_pretrained and load the directory" * isinstance(
            checkpoint, nn.Module
        )
        raise TypeError(
            f"{what} takes what sparsessm.load returned (a Checkpoint), got {type(checkpoint).__name__}{more}"
        )
    refuse_changed(checkpoint)
    key, mine = id(checkpoint.model), threading.get_ident()
    with _lock:
        other = _workers.get(key)
        if other is not None and other[0] != mine:
            raise ValueError(
                f"{what}: another thread is in {other[1]} with this model; load it once for each thread"
            )
        _workers[key] = other or (mine, what)
    try:
        with undisturbed():
            yield
    finally:
        if other is None:
            with _lock:
                del _workers[key]


def refuse_changed(checkpoint: Checkpoint) -> None:
    """Refuse a model that is not what `load` gives: a stock model in float32 on the CPU.

    Raises:
        TypeError: another class.
        ValueError: tensors that have gone, have another dtype, device or layout, or are made on the way.
    """
    model: Any = checkpoint.model
    if not isinstance(model, PreTrainedModel):
        inner = "; give the model inside of it" * isinstance(model, nn.Module)
        raise TypeError(
            f"the checkpoint's model is of type {type(model).__name__}, not the stock model that load "
            f"made{inner}"
        )
    for name, module in model.named_modules():
        if optional(module, "_compiled_call_impl") is not None or type(module).__name__ == "OptimizedModule":
            raise ValueError(
                f"{name or 'the model'} is compiled; load the model anew, and compile the result"
            )
    names = model.state_dict().keys()
    for name in checkpoint.stored:
        if name in names:
            continue
        owner, _, own = name.rpartition(".")
        why = "load the model anew"
        if f"{name}_orig" in names:
            why = f"torch.nn.utils.prune holds it: call torch.nn.utils.prune.remove({owner}, {own!r}) first"
        elif any(".parametrizations." in f".{other}" and other.startswith(owner) for other in names):
            why = "it is parametrised: call torch.nn.utils.parametrize.remove_parametrizations first"
        raise ValueError(f"the model has no tensor {name} any more; {why}")
    for name, tensor in model.named_parameters():
        if why := _unlike_loaded(tensor):
            raise ValueError(f"{name} {why}")


def _unlike_loaded(tensor: torch.Tensor) -> str | None:
    """What a parameter has that `load` never gives it, None if there is nothing."""
    if tensor.is_meta:
        return "is on the meta device, so it has no values; load the model anew"
    if tensor.device.type != "cpu":
        return f"is on {tensor.device}; move the model back with model.cpu()"
    if tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided:
        kind = "quantised" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
        return f"is not a plain dense tensor ({kind}); load the model anew"
    if type(tensor) is not nn.Parameter or type(tensor.data) is not torch.Tensor:
        return f"is a {type(tensor.data).__name__}, not a plain dense tensor; load the model anew"
    if tensor.dtype != torch.float32:
        return f"is {tensor.dtype}; convert the model back with model.float(), as load made it"
    return None


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put aside what a user may have told torch for other work: autocast, inference mode, a default device or
    dtype. Ours is float32 on the CPU."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_FLOAT32)
        yield


class _Float32:
    """float32 as torch's default, which is one of the whole process, while any thread is inside."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, torch.float32

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.set_default_dtype(self._before)


_FLOAT32 = _Float32()


def checked_path(name: str, path: Any) -> str | os.PathLike[str]:
    """`path` if it can be the name of something on a disk and in a record.

    Raises:
        TypeError: neither text nor a path.
        ValueError: a name that is empty or not UTF-8.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(shown := os.fspath(path), str):
        raise TypeError(f"{name} is {path!r}; allowed: a text or a path")
    if not shown or "\0" in shown:
        raise ValueError(f"{name} is {shown!r}; allowed: a name")
    if not is_text(shown):
        raise ValueError(f"{name} is {shown!r}, which is not UTF-8; rename it")
    return path
