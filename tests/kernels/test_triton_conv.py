"""The causal convolution in Triton, in its interpreter on the CPU, against the reference in float64."""

from __future__ import annotations

from typing import Any

import forms
import pytest
import torch

programs: Any = pytest.importorskip("sparsessm.kernels.gpu.programs", reason="the extra `gpu` is missing")


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 37, 3), (3, 2, 40)])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_convolution_and_gradients(shape: tuple[int, ...], width: int, silu: bool, started: bool) -> None:
    x = forms.conv_inputs(shape, width, torch.float32, biased=started != silu, started=started)
    forms.assert_conv(programs, x, 1e-5, silu)


def test_an_empty_sequence() -> None:
    x = forms.conv_inputs((2, 0, 5), 4, torch.float32, biased=True, started=True)
    assert programs.causal_conv1d(*x).shape == (2, 0, 5)
    dx, dweight, dbias = programs.causal_conv1d_backward(x[0], *x, silu=True)
    assert dx.shape == (2, 0, 5) and not dweight.any() and not dbias.any()


def test_half_precision_is_read_as_it_is() -> None:
    x = forms.conv_inputs((2, 9, 5), 4, torch.bfloat16, biased=True, started=True)
    y = programs.causal_conv1d(*x, silu=True)
    wanted = programs.causal_conv1d(*(one.float() for one in x), silu=True)
    assert y.dtype == torch.bfloat16
    forms.assert_same([y], [wanted.double()], 5e-3)
