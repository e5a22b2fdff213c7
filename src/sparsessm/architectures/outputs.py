"""Outputs of linear layers, kept as they come: calibration/prices.py asks for the gradients there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


@contextmanager
def kept_outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yields what will hold the output of each of these modules, by its name, once it has run."""
    kept: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(_keeping(kept, name)).remove)
        yield kept


def _keeping(kept: dict[str, Tensor], name: str) -> Callable[..., None]:
    return lambda module, inputs, output: kept.__setitem__(name, output)
