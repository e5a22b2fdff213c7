"""Gradients of the scan and the convolution, at every level this CPU has and in the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scans import SHAPES, assert_close, inputs
from torch import Tensor

from sparsessm import kernels
from sparsessm.kernels import reference

pytestmark = pytest.mark.skipif(not kernels.NATIVE, reason="the native extension is not built")

GRADIENT_SHAPES = [*SHAPES[:4], (2, 1, 5, 3), (2, 9, 6, 1)]
CONV_SHAPES = [(1, 1, 1), (2, 37, 21), (3, 2, 130)]


def conv_inputs(shape: tuple[int, int, int], width: int) -> list[Tensor]:
    """x, weight, bias, before in float32."""
    g = torch.Generator().manual_seed(0)
    shapes = (shape, (shape[2], width), (shape[2],), (shape[0], width - 1, shape[2]))
    return [torch.randn(*s, generator=g) for s in shapes]


def leaves(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]


def assert_same_gradients(run: Any, definition: Any, tensors: list[Tensor | None]) -> None:
    """Of `run` in float32 and of its definition in float64, at a random gradient of the output."""
    got, want = leaves(tensors, torch.float32), leaves(tensors, torch.float64)
    y, exact = run(*got), definition(*want)
    assert y.requires_grad
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(dy)
    exact.backward(dy.double())
    for a, b in zip(got, want, strict=True):
        if a is not None and b is not None:
            assert a.grad is not None and a.grad.dtype == torch.float32
            assert_close(a.grad, b.grad)


@pytest.mark.parametrize("shape", GRADIENT_SHAPES)
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_the_scan_is_differentiable(
    any_level: str, shape: tuple[int, int, int, int], gate: bool, started: bool
) -> None:
    *x, state = inputs(*shape)
    assert_same_gradients(
        lambda *t: kernels.selective_scan(*t, state if started else None)[0],
        lambda *t: reference.selective_scan(*t, state.double() if started else None)[0],
        [*x[:6], x[6] if gate else None],
    )


@pytest.mark.parametrize("shape", CONV_SHAPES)
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_the_convolution_is_differentiable(
    any_level: str, shape: tuple[int, int, int], width: int, silu: bool, biased: bool, started: bool
) -> None:
    x, weight, bias, before = conv_inputs(shape, width)
    assert_same_gradients(
        lambda *t: kernels.causal_conv1d(*t, before if started else None, silu=silu),
        lambda *t: reference.causal_conv1d(*t, before.double() if started else None, silu=silu),
        [x, weight, bias if biased else None],
    )


def test_gradcheck_in_double() -> None:
    *x, state = (t.double().requires_grad_() for t in inputs(1, 5, 3, 2))
    state = state.detach()
    assert torch.autograd.gradcheck(lambda *t: kernels.selective_scan(*t, state)[0], x)
    for width, silu in ((1, True), (4, True), (4, False)):
        *x, before = (t.double().requires_grad_() for t in conv_inputs((2, 3, 3), width))
        past, options = before.detach(), {"silu": silu}
        assert torch.autograd.gradcheck(lambda *t, p=past, o=options: kernels.causal_conv1d(*t, p, **o), x)
        got = kernels.causal_conv1d_backward(torch.ones_like(x[0]), *x, past, **options)
        kernels.causal_conv1d(*x, past, **options).sum().backward()
        for a, b in zip(got, x, strict=True):
            assert_close(a, b.grad)


def test_gradients_of_views(any_level: str) -> None:
    """x and z are halves of one tensor as in the model, delta is transposed, y's gradient is expanded."""

    def run(wide: Tensor, delta: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        x, z = wide.chunk(2, -1)
        u = conv(x, weight, silu=True)
        return scan(u, delta.transpose(1, 2), *others, z)[0].sum()

    x = inputs(2, 19, 24, 6)
    tensors = [torch.cat([x[0], x[6]], -1), x[1].transpose(1, 2).contiguous(), torch.randn(24, 4), *x[2:6]]
    got, want = leaves(list(tensors), torch.float32), leaves(list(tensors), torch.float64)
    conv, scan = kernels.causal_conv1d, kernels.selective_scan
    run(*got).backward()
    conv, scan = reference.causal_conv1d, reference.selective_scan
    run(*want).backward()
    for a, b in zip(got, want, strict=True):
        assert_close(a.grad, b.grad)


def test_gradients_in_half_precision(any_level: str) -> None:
    x = [t.bfloat16().requires_grad_() for t in inputs(2, 19, 24, 6)[:7]]
    kernels.selective_scan(*x)[0].sum().backward()
    want = reference.selective_scan_backward(torch.ones(2, 19, 24).double(), *(t.double() for t in x))
    for a, b in zip(x, want, strict=True):
        assert a.grad.dtype == torch.bfloat16
        assert_close(a.grad, b, 5e-2)


@pytest.mark.parametrize("index", range(7))
def test_one_input_alone_may_want_a_gradient(any_level: str, index: int) -> None:
    x = inputs(2, 7, 5, 3)[:7]
    x[index].requires_grad_()
    kernels.selective_scan(*x)[0].sum().backward()
    want = reference.selective_scan_backward(torch.ones(2, 7, 5).double(), *(t.double() for t in x))
    assert_close(x[index].grad, want[index])
    assert all(t.grad is None for i, t in enumerate(x) if i != index)


def test_without_gradients_there_is_no_graph(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, (signal, weight, bias, _) = inputs(2, 7, 5, 3)[:7], conv_inputs((2, 7, 5), 4)
    with monkeypatch.context() as patch:  # autograd's machinery is not even entered
        for function in (kernels._Scan, kernels._Conv):
            patch.setattr(function, "apply", None)
        assert kernels.selective_scan(*x)[0].grad_fn is None
        assert kernels.causal_conv1d(signal, weight, bias).grad_fn is None
        x[0].requires_grad_()
        weight.requires_grad_()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert kernels.selective_scan(*x)[0].grad_fn is None
                assert kernels.causal_conv1d(signal, weight, bias).grad_fn is None
    assert kernels.selective_scan(*x)[0].grad_fn is not None
    assert kernels.causal_conv1d(signal, weight, bias).grad_fn is not None


def test_no_gradient_flows_through_states(any_level: str) -> None:
    *x, state = inputs(2, 7, 5, 3)
    state.requires_grad_()
    signal, weight, bias, before = conv_inputs((2, 7, 5), 4)
    before.requires_grad_()
    with pytest.raises(ValueError, match="^initial_state requires a gradient"):
        kernels.selective_scan(*x, state)
    with pytest.raises(ValueError, match="^before requires a gradient"):
        kernels.causal_conv1d(signal, weight, bias, before)
    with torch.no_grad():
        kernels.selective_scan(*x, state)
        kernels.causal_conv1d(signal, weight, bias, before)


def test_what_the_native_backward_lacks_is_said(level: str) -> None:
    x = inputs(2, 7, 5, 3)[:7]
    x[0].requires_grad_()
    with pytest.raises(ValueError, match="no gradient flows through the last state"):
        kernels.selective_scan(*x)[1].sum().backward()
    (slope,) = torch.autograd.grad(kernels.selective_scan(*x)[0].square().sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_gradients_of_an_empty_sequence(level: str) -> None:
    x = [t[:, :0] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(inputs(2, 3, 5, 4)[:7])]
    dx, dweight, dbias = kernels.causal_conv1d_backward(
        x[0], x[0], torch.ones(5, 4), torch.ones(5), silu=True
    )
    assert dx.shape == (2, 0, 5) and (dweight == 0).all() and dbias is not None and (dbias == 0).all()
    x[2].requires_grad_()
    kernels.selective_scan(*x)[0].sum().backward()


def test_shapes_are_checked_before_the_convolutions_backward() -> None:
    x, weight, bias, _ = conv_inputs((2, 7, 5), 4)
    with pytest.raises(ValueError, match="^dy has shape"):
        kernels.causal_conv1d_backward(x[:, 1:], x, weight, bias)
    with pytest.raises(ValueError, match="^bias has shape"):
        kernels.causal_conv1d_backward(x, x, weight, bias[1:])
