"""The door with Triton's functions behind it, on a second device: arguments, results and gradients meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import forms
import pytest
import torch
from elsewhere import Remote, elsewhere
from torch import Tensor
from torch.utils._pytree import tree_map

from sparsessm import kernels
from sparsessm.kernels import gpu, reference
from sparsessm.kernels.ssd import ssd_scan

programs: Any = pytest.importorskip("sparsessm.kernels.gpu.programs", reason="the extra `gpu` is missing")


class Reached:
    """programs.py for tensors on the second device, which Triton cannot read: it gets what they hold."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def run(*given: Any, **options: Any) -> Any:
            given, options = tree_map(lambda x: x.held if isinstance(x, Remote) else x, (given, options))
            return tree_map(moved, getattr(programs, name)(*given, **options))

        return run


@pytest.fixture(autouse=True)
def triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "form", lambda x: Reached())


def moved(x: Any) -> Any:
    return Remote(x) if isinstance(x, Tensor) else x


def here(x: Any) -> Any:
    return tree_map(lambda one: one.held if isinstance(one, Remote) else one, x)


def test_results() -> None:
    x = forms.scan_inputs((2, 5, 3, 4), torch.float32)
    heads = forms.ssd_inputs((1, 5, 2, 3, 1, 4), torch.float32)
    options: Any = {"removed": "unit", "energy": True, "gram": "full"}
    with elsewhere():
        *got, sums = here(kernels.selective_scan_stats(*map(moved, x), **options))
        scanned = here(ssd_scan(*map(moved, heads), every=2))
    *wanted, exact = reference.selective_scan_stats(*map(forms.double, x), **options)
    forms.assert_same((*got, *sums), (*wanted, *exact), 1e-5)
    forms.assert_same(scanned, reference.ssd_scan(*map(forms.double, heads), every=2), 1e-5)


def gradients(run: Callable[..., Tensor], x: list[Any]) -> list[Tensor]:
    leaves = [one.detach().clone().requires_grad_() for one in x]
    return here([*torch.autograd.grad(run(*leaves).square().sum(), leaves)])


def test_gradients() -> None:
    *x, state = forms.scan_inputs((2, 5, 3, 4), torch.float32)
    *conv, before = forms.conv_inputs((2, 5, 3), 4, torch.float32, True, True)
    with elsewhere():
        scanned = gradients(lambda *t: kernels.selective_scan(*t, moved(state))[0], [*map(moved, x)])
        convolved = gradients(
            lambda *t: kernels.causal_conv1d(*t, moved(before), silu=True), [*map(moved, conv)]
        )
    x, state, conv, before = tree_map(forms.double, (x, state, conv, before))
    forms.assert_same(scanned, gradients(lambda *t: reference.selective_scan(*t, state)[0], x), 1e-5)
    wanted = gradients(lambda *t: reference.causal_conv1d(*t, before, silu=True), conv)
    forms.assert_same(convolved, wanted, 1e-5)
