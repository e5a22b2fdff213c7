"""A stock module that computes something of ours for a time, and linear layers that multiply in a run's
precision so (kernels/products.py): a model's own modules, its hooks included, are otherwise left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from sparsessm.kernels import products


@contextmanager
def instead(module: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    """The module computes `forward` meanwhile."""
    had = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if had is None:
            del module.forward
        else:
            module.forward = had


@contextmanager
def computing(modules: Iterable[nn.Module], compute: str) -> Iterator[None]:
    """These linear layers multiply in this precision meanwhile, as does what calls `products` itself.

    Args:
        compute: "float32", where nothing is touched, or "bfloat16".
    """
    with products.computing(compute), ExitStack() as stack:
        for module in {id(module): module for module in modules}.values() if products.rounds() else ():
            stack.enter_context(instead(module, _multiplying(module)))
        yield


def _multiplying(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda input: products.linear(input, module.weight, module.bias)
