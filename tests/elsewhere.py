"""A second device, without hardware: its tensors hold their numbers in a tensor on the CPU.

As on a real accelerator an operation on tensors of two devices is refused (here all of them, also those that
CUDA lets pass, as an index on the CPU), numpy cannot look inside, and what a factory makes without
`device=` lies on the CPU. Numbers are the CPU's own, so results can be compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy:0")  # a type that torch knows and asks no driver for
MOVES = {"aten::copy_", "aten::_to_copy", "aten::to"}  # from one device to another


class Remote(Tensor):
    """A tensor on `DEVICE`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Remote:
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Remote({self.held})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.tolist:
            return args[0].held.tolist()
        if func is Tensor.numpy:
            raise TypeError(f"numpy cannot read a tensor on {DEVICE}")
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], Remote(torch.tensor(args[1])))
        if func is Tensor.new_tensor:
            return Remote(args[0].held.new_tensor(*args[1:], **(kwargs or {})))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


class _Given(TorchFunctionMode):
    """Makes `torch.tensor` on `DEVICE`, which never comes to a dispatch mode."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") == DEVICE:
            return Remote(func(*args, **{**kwargs, "device": torch.device("cpu")}))
        return func(*args, **kwargs)


class _Made(TorchDispatchMode):
    """Makes tensors on `DEVICE` where somebody asks for them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    given = tree_flatten((args, kwargs))[0]
    tensors = [x for x in given if isinstance(x, Tensor)]
    remote = {id(x.held): x for x in tensors if isinstance(x, Remote)}
    local = [x for x in tensors if not isinstance(x, Remote)]
    if remote and func._schema.name not in MOVES and any(x.ndim for x in local):
        raise RuntimeError(f"{func} of tensors on two devices, {DEVICE} and cpu")
    wanted = [x for x in given if isinstance(x, torch.device)]
    there = wanted[0] == DEVICE if wanted else bool(remote)

    def on_the_cpu(x: Any) -> Any:
        if isinstance(x, Remote):
            return x.held
        return torch.device("cpu") if isinstance(x, torch.device) else x

    args, kwargs = tree_map(on_the_cpu, (args, kwargs))
    out = func(*args, **kwargs)

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor) or not there:
            return x
        if any(x is other for other in local):  # `to` gives what is there already, but it is not there
            return Remote(x.clone()) if wanted else x
        with torch.inference_mode(x.is_inference()):  # a view is what its base is
            return remote[id(x)] if id(x) in remote else Remote(x)

    return tree_map(placed, out)


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Meanwhile there is a second device."""
    with _Given(), _Made():
        yield DEVICE


def moved(model: Any) -> Any:
    """The same model with all its tensors on the second device; tied weights stay one."""
    found: dict[int, Any] = {}

    def over(tensor: Tensor, make: Callable[[Tensor], Any]) -> Any:
        return found.setdefault(id(tensor), make(Remote(tensor.detach().clone())))

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = over(parameter, nn.Parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = over(buffer, lambda x: x)
    return model
